/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A program's memory as the local store of a region: a backend whose pages are at an address, filled through userfaultfd,
 * read in place, changed by the program without asking. Three jobs:
 *
 *     fill     far_write(FAR_FILL): pages that are there already stay, for the program may have stored into them
 *     find     what was stored since the last look (asynchronous, by faults, or by hashing)
 *     evict    far_discard(): atomically against stores: -EBUSY if one may not have been seen yet
 *
 * A page that is not there, in a chunk that is local, is zero. The range may lie in another process, and in several
 * pieces there (mremap).
 */
#ifndef FAR_MEMORY_H
#define FAR_MEMORY_H

#include "backend/backend.h"
#include "frontend/uffd.h"
#include "frontend/victim.h"
#include "region/region.h"

struct far_memory;

struct far_memory_conf {
	int uffd;             /* borrowed */
	int pagemap;          /* of the process that has the memory; borrowed */
	bool foreign;         /* it is another process': not read in place, not dropped */
	int mem;              /* its /proc/PID/mem; borrowed; -1: not given */
	const struct far_handover_range *range; /* copied; `off` rises, together they cover the region up to whole pages */
	size_t n;
	uint64_t bytes;       /* the region's size */
	unsigned shift;       /* of its chunks */
	enum far_mechanism mechanism; /* MOVE, CONTINUE or COPY */
	enum far_tracking tracking;
	bool evicts;          /* there is a budget: chunks will be dropped under a program that may store into them */
	unsigned have;        /* enum far_uffd_have */
	char *alias;          /* CONTINUE: the second mapping of the shared memory; borrowed */
	int shared;           /* CONTINUE: its descriptor; borrowed */
	struct far_victim *victim;  /* where evicted bytes go; borrowed; NULL: nowhere */
	struct far_backend *remote; /* for pages that were unmapped while they were dirty */
	/* Waits until every change of mappings that the program is making now is noted here. Not for receivers. */
	void (*settle)(void *opaque);
	void *opaque;
};
/* The memory as a backend; owned by the caller, its close ends it. */
int far_memory_new(const struct far_memory_conf *conf, struct far_memory **out, struct far_backend **store);
/* What the region calls. */
const struct far_region_memory *far_memory_calls(struct far_memory *m);

/* Where offset `off` is now, and how many bytes from there on lie together; 0: unmapped. */
uint64_t far_memory_addr(struct far_memory *m, uint64_t off, uint64_t *len);
/* The offset at an address; false: none of ours. */
bool far_memory_off(struct far_memory *m, uint64_t addr, uint64_t *off);
/* A page that is still missing in a chunk that is local and pinned appears, as zeros; whoever waits for it goes on.
 * -ENODATA: read-only, and not known to be zero: the program has dropped it, it is to be fetched again. */
int far_memory_appear(struct far_memory *m, uint64_t addr);
/* Pages of [addr, addr+len) raise SIGBUS from now on; whoever waits there goes on into that. */
int far_memory_poison(struct far_memory *m, uint64_t addr, uint64_t len);
int far_memory_heal(struct far_memory *m, uint64_t off, uint64_t len);
bool far_memory_marks(const struct far_memory *m); /* by the kernel's own mark, not by another mapping */
uint64_t far_memory_poisoned(struct far_memory *m); /* bytes */
bool far_memory_has_poison(const struct far_memory *m);
/* The first poisoned page in [from, end). */
bool far_memory_next_poison(struct far_memory *m, uint64_t from, uint64_t end, uint64_t *off);

/* The program changed its mappings. remove: the range [addr, addr+len) is about to be dropped: true if it is we who do it. */
bool far_memory_removed(struct far_memory *m, uint64_t addr, uint64_t len);
void far_memory_unmapped(struct far_memory *m, uint64_t addr, uint64_t len);
void far_memory_remapped(struct far_memory *m, uint64_t from, uint64_t to, uint64_t len);
/* From the first on fills leave the range alone, until the region has been told with far_memory_discarded(). */
void far_memory_dropping(struct far_memory *m, uint64_t off, uint64_t len);
void far_memory_dropped(struct far_memory *m, uint64_t off, uint64_t len);
/* ... and it was the program, in a region that can be written: these are zeros now. */
bool far_memory_drops(const struct far_memory *m); /* it has dropped pages at least once */
int far_memory_discarded(struct far_memory *m, struct far_region *r, uint64_t off, uint64_t len);
/* [off, off+len) may have been stored: the next collect tells. */
void far_memory_suspect(struct far_memory *m, uint64_t off, uint64_t len);
/*
 * Another process' memory (memory_given.c). Its program drops pages: forget() takes note, and is true if the region need not
 * be told: the memory is not writable. Around reading events: reading(begin), reading(end).
 */
bool far_memory_forget(struct far_memory *m, uint64_t addr, uint64_t len);
bool far_memory_is_gone(struct far_memory *m, uint64_t off);
void far_memory_reading(struct far_memory *m, bool begin);
/* Nobody serves it from now on: what is missing there becomes zero if it is zero, else it raises SIGBUS. Receivers run, the
 * region has been stopped. */
void far_memory_leave(struct far_memory *m, struct far_region *r);
/* Drop the pages of [off, off+len), whatever is in them. */
int far_memory_drop(struct far_memory *m, uint64_t off, uint64_t len);

#endif
