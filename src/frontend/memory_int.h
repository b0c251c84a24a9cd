/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What memory.c (where the pages are, filling, reading) and its neighbours share: memory_drop.c (pages that leave),
 * memory_track.c (what was stored), memory_poison.c, memory_given.c. */
#ifndef FAR_MEMORY_INT_H
#define FAR_MEMORY_INT_H

#include "base/thread.h"
#include "frontend/memory.h"

#include <stdatomic.h>

#define MEM_PAGE ((uint64_t)4096)
#define MEM_RECENT 256 /* blocks of pushes that are looked at once more */

/* Where the region lies. Never changed: a new one takes its place, old ones stay until the end. */
struct mem_table {
	struct mem_table *older;
	size_t n;
	struct far_handover_range range[];
};

struct mem_run {
	uint64_t off, len;
};
struct mem_runs {
	struct mem_run *v;
	size_t n, cap;
};

/* The program has been let go on to drop [off, end), whole pages, and may not have done it yet. */
struct mem_drop {
	uint64_t off, end, at;
};

struct far_memory {
	struct far_memory_conf c; /* fixed; range is not used after open */
	struct far_region_memory calls;
	bool ours;                /* the memory of this process */
	bool arms;                /* pages appear write-protected */
	uint64_t pages_len;       /* the region in whole pages */
	_Atomic(struct mem_table *) table;
	_Atomic uint64_t *hash;   /* of each chunk's bytes as the remote has them; 0: not known. NULL: not kept */
	/* With asynchronous tracking, NULL else. */
	_Atomic uint64_t *whole;  /* bit i: each page of chunk i has been filled in, and none was dropped since */
	_Atomic uint64_t *fresh;  /* bit i: chunk i was moved in, so it counts as written, and nobody has looked at it yet */
	_Atomic uint64_t *zero;   /* bit i: chunk i came as zeros. Read-only maps; NULL: any missing page of a local chunk is zero */
	_Atomic uint64_t *gone;   /* bit i: page i was dropped by its program. NULL: not kept (memory_given.c) */
	bool apart;               /* events are read while nothing is filled; fixed (memory_given.c) */
	_Atomic unsigned filling; /* fills that are in the kernel */
	_Atomic bool reading;     /* an event may be read now */
	_Atomic unsigned unpoisoned; /* fills that run, where poison is a mapping */
	_Atomic unsigned n_poison;
	_Atomic bool any_late;    /* of drops_late and drops_unknown */
	_Atomic bool drops;       /* the program has dropped pages at least once */
	_Atomic bool any_dropping;
	_Atomic bool lost_track;  /* no memory to remember a suspect: everything is one */

	struct far_mutex lock;
	struct far_cond changed;
	struct mem_runs dropping FAR_GUARDED_BY(lock); /* by offset: the program drops it, and the region does not know yet */
	struct mem_runs own FAR_GUARDED_BY(lock);      /* [addr, len) that we drop ourselves, whose events have not come yet */
	struct mem_runs poison FAR_GUARDED_BY(lock);   /* by offset */
	struct mem_runs suspect FAR_GUARDED_BY(lock);  /* stored, and nobody has been told yet */
	bool collecting FAR_GUARDED_BY(lock);
	unsigned evictions FAR_GUARDED_BY(lock);       /* that run; none begins while a collect runs */
	unsigned n_recent FAR_GUARDED_BY(lock);
	struct {
		uint64_t off, len, hash, at;
	} recent[MEM_RECENT] FAR_GUARDED_BY(lock);     /* the last pushes, a ring */
	struct mem_drop *drops_late FAR_GUARDED_BY(lock); /* memory_drop.c */
	size_t n_drops_late FAR_GUARDED_BY(lock), cap_drops_late FAR_GUARDED_BY(lock);
	uint64_t drops_unknown FAR_GUARDED_BY(lock);   /* one could not be remembered, and counts as late until then; 0: none */

	struct far_mutex heal_lock; /* held while mappings of poisoned pages are replaced; taken before `lock` */

	struct far_mutex attic_lock;
	/* Where evicted pages go before they are let go: made once, under the lock, its length first. Who reads events looks at
	 * both without it. */
	_Atomic(char *) attic;
	uint64_t attic_len;
	uint64_t attic_at FAR_GUARDED_BY(attic_lock);

	struct far_mutex stage_lock;
	char *stage[64] FAR_GUARDED_BY(stage_lock);    /* free staging buffers of MEM_STAGE bytes */
	unsigned n_stage FAR_GUARDED_BY(stage_lock);
};
#define MEM_STAGE (2 * FAR_STAGE) /* a puller's longest extent */

int far_mem_add_locked(struct mem_runs *r, uint64_t off, uint64_t len);
/* memory.c. Take [off, off+len) out of what the list has; how many bytes that were. */
uint64_t far_mem_cut_locked(struct mem_runs *r, uint64_t off, uint64_t len);
/* -EEXIST: the page is there; -ENODATA: it is not. */
int far_mem_look(struct far_memory *m, uint64_t addr);
/* memory.c: pieces of [off, off+len) that lie together; 0 is unmapped. fn's first non-zero return ends it. */
int far_mem_each(struct far_memory *m, uint64_t off, uint64_t len,
		 int (*fn)(void *opaque, uint64_t addr, uint64_t off, uint64_t len), void *opaque);
static inline uint64_t far_mem_chunk(const struct far_memory *m)
{
	return (uint64_t)1 << m->c.shift;
}
static inline uint64_t far_mem_chunk_len(const struct far_memory *m, uint64_t i)
{
	return far_min(far_mem_chunk(m), m->c.bytes - (i << m->c.shift));
}
/* memory_stage.c */
/* Bytes that lie in the second mapping are shown as the huge pages they are; false: they are not, show them one by one. */
bool far_mem_fill_huge(struct far_memory *m, uint64_t addr, uint64_t off, const char *src, uint64_t len);
int far_mem_fill_moved(struct far_memory *m, uint64_t addr, char *src, uint64_t len, unsigned flags, uint64_t *done);
void *far_mem_stage(void *self, uint64_t off, uint64_t len);
void far_mem_unstage(void *self, void *buf, uint64_t len);
void far_mem_zeros(void *self, uint64_t off, const void *buf, uint64_t len);
int far_mem_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags);
bool far_mem_is_poisoned(struct far_memory *m, uint64_t off, uint64_t len);
bool far_mem_is_staged(struct far_memory *m, uint64_t off, const void *buf, uint64_t len);
static inline uint64_t far_mem_page_up(uint64_t x)
{
	return far_div_up(x, MEM_PAGE) * MEM_PAGE;
}

/* memory_drop.c */
/* Before a call that makes the kernel report what we do, and when that call has failed. */
int far_mem_own_begin(struct far_memory *m, uint64_t addr, uint64_t len);
void far_mem_own_cancel(struct far_memory *m, uint64_t addr, uint64_t len);
/* Drop pages of this process, whatever is in them. */
int far_mem_drop(struct far_memory *m, uint64_t addr, uint64_t len);
/* From `off` on, what the program is not dropping at this moment, nor, with `late`, may have yet to drop: [*from, *to). False:
 * nothing before end. */
bool far_mem_kept(struct far_memory *m, uint64_t off, uint64_t end, bool late, uint64_t *from, uint64_t *to);
/* Whether the program may drop something of [off, off+len) yet that the region knows to be zero. */
bool far_mem_drops_late(struct far_memory *m, uint64_t off, uint64_t len);
/* What is absent by now of what was late becomes a suspect. No eviction runs. */
void far_mem_drops_look(struct far_memory *m);
/* The page at `off` is about to appear. */
void far_mem_drops_met(struct far_memory *m, uint64_t addr, uint64_t off);

/* memory_given.c */
int far_mem_given_open(struct far_memory *m);
/* In between no event is read, so a program that drops pages does so later, or it is noted already.
 * For nothing that waits for an event to be read (with FAR_UFFD_ONCE it does not). */
void far_mem_fill_begin(struct far_memory *m);
void far_mem_fill_end(struct far_memory *m);
/* src NULL: pages of shared memory are shown. */
int far_mem_guarded_fill(struct far_memory *m, uint64_t addr, uint64_t off, const char *src, uint64_t len);
void far_mem_guarded_zeros(struct far_memory *m, uint64_t addr, uint64_t off, const char *zeros, uint64_t len);

/* memory_track.c */
/* [off, off+len) was filled in, or is about to be dropped. */
void far_mem_whole(struct far_memory *m, uint64_t off, uint64_t len);
void far_mem_not_whole(struct far_memory *m, uint64_t off, uint64_t len);
void far_mem_track_open(struct far_memory *m);
uint64_t far_mem_hash(const void *buf, uint64_t len); /* as in m->hash: never 0 */
/* The chunk of `off` holds something else than the remote, or nobody knows. */
void far_mem_differs(struct far_memory *m, uint64_t off);

/* memory_evict.c */
/* 0: [off, off+len), one chunk, is gone. -EBUSY: a store into it may not have been seen yet; the next collect tells. */
int far_mem_evict(struct far_memory *m, uint64_t off, uint64_t len);

#endif
