/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What the files of this folder share. Locks: pull.lock and push.lock are each private to their file, kept_lock to
 * evict.c; the first two may be held while the chunk map takes its own. */
#ifndef FAR_REGION_INT_H
#define FAR_REGION_INT_H

#include "base/clock.h"
#include "base/thread.h"
#include "region/chunkmap.h"
#include "region/order.h"
#include "region/persist_int.h"
#include "region/region.h"

#include <stdatomic.h>

struct far_pull;
struct far_push;

struct far_region {
	/* fixed after open */
	struct far_backend *remote, *local;
	struct far_backend *face; /* this region as a backend */
	struct far_mount_opts o;
	uint64_t bytes, chunk;
	unsigned shift;
	bool writable;
	bool ahead_only, remote_borrowed;
	uint64_t ahead_max;   /* chunks that a sequential reader may be ahead of itself */
	void (*all_local)(void *opaque);
	void *all_local_opaque;
	struct far_chunkmap *map;
	struct far_trace *trace; /* NULL: nothing is recorded */
	struct far_pull *pull;
	struct far_push *push;
	struct far_persist *persist; /* NULL: the map lives in memory */
	struct far_region_memory memory; /* self NULL: the local store changes only through calls */
	_Atomic uint64_t *bad;       /* bit i: it was said that chunk i cannot be read */
	_Atomic uint64_t *kept;      /* bit i: chunk i is pinned by far_region_pin(); set and taken back under kept_lock */
	struct far_mutex kept_lock;

	/* atomic */
	_Atomic uint64_t last_fault; /* chunk that a program last waited for */
	_Atomic unsigned allowing[2], allow_turn; /* stores that are being allowed, see far_stored_settle() */
	_Atomic uint64_t fault_run;  /* how often in a row that was forward */
	_Atomic bool stopped;
	_Atomic bool fenced;
	_Atomic bool was_all_local;  /* all_local has been called */
	_Atomic bool local_zero;     /* whatever is absent reads as zeros in the local store: zeros need no write */
	_Atomic uint64_t pulled, pushed, inflight, demand_reads, errors;
	_Atomic unsigned blocked;
	_Atomic int last_error;
	_Atomic uint64_t last_error_at; /* ms since 1970 */
	_Atomic uint64_t local_errors;
	_Atomic int local_error;        /* of the last write that needed new room in the local store; 0: it worked */
	_Atomic unsigned bad_n;         /* bits set in `bad` */
	_Atomic uint64_t local_said;    /* when that was logged */
	_Atomic uint64_t pinned;        /* bytes of chunks in `kept` */
	_Atomic uint64_t evict_hand; /* chunk where the clock stands */
	_Atomic uint64_t evict_pause; /* the clock does not walk before this time */
	_Atomic uint64_t evicting;   /* bytes of chunks that are on their way out */
	_Atomic unsigned faulted_n;
	struct {
		_Atomic uint64_t chunk1, at; /* chunk and one; when */
	} faulted[16]; /* the last chunks that a program waited for, a ring */
};

/* cache.c: the data paths. */
int far_cache_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags);
int far_cache_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags);
int far_cache_zero(void *self, uint64_t off, uint64_t len, unsigned flags);
/* Carry out a claim: read the run from the remote, fill the local store, end the claim. urgent: an offset that a program
 * waits for, UINT64_MAX: none. flags: FAR_BULK, FAR_NOWAIT. 1: done, and the page at `urgent` is there; 0: done. */
int far_cache_fetch(struct far_region *r, struct far_fetch *f, uint64_t first, uint64_t n, uint64_t urgent, unsigned flags);
/* The only chunk of a claim, FILLING with e (far_chunkmap_fill_begin()), from a remote that has it at hand; err: do not even
 * try. Ends all of it. */
int far_cache_fill_near(struct far_region *r, struct far_fetch *f, uint64_t i, struct far_partial *e, int err);
/* Make chunk i local, and those after it up to max in the same call if they are absent too. */
int far_cache_need(struct far_region *r, uint64_t i, uint64_t max);
/* Chunks have become local: tell who waits for that. */
void far_cache_arrived(struct far_region *r);
void far_region_remote_failed(struct far_region *r, int err);
/* A read of chunk i from the local store failed: count it, and say so once a chunk if the bytes are nowhere else. */
void far_cache_unreadable(struct far_region *r, uint64_t i, int err, bool lost);

/* evict.c */
int far_evict_open(struct far_region *r);
void far_evict_close(struct far_region *r);
/* Give clean chunks back until the local store is inside its budget. */
void far_evict_trim(struct far_region *r);
bool far_evict_kept(struct far_region *r, uint64_t i); /* pinned by far_region_pin() */
/* A program waits for chunk i: the budget leaves it here until the program can have gone on. */
void far_evict_faulted(struct far_region *r, uint64_t i);
/* Clean chunk i cannot be read from the local store. True: it is not local any more, fetch it again. */
bool far_evict_unreadable(struct far_region *r, uint64_t i);

/* pull.c */
int far_pull_open(struct far_region *r, struct far_error *err);
void far_pull_stop(struct far_region *r);
void far_pull_join(struct far_region *r);  /* after stop */
void far_pull_close(struct far_region *r); /* after both pullers and pushers were joined: they use each other */
/* A demand fetch begins or ends: it takes window from the puller. */
void far_pull_demand_begin(struct far_region *r, uint64_t len);
void far_pull_demand_end(struct far_region *r, uint64_t len, int err);
/* Somebody waited for [i, i+n) / has read them: what may come next is fetched ahead. */
void far_pull_fault(struct far_region *r, uint64_t i, uint64_t n);
void far_pull_touched(struct far_region *r, uint64_t i, uint64_t n);
/* Chunks became local, or room was made: wake who waits for that. */
void far_pull_progress(struct far_region *r);
void far_pull_missed(struct far_region *r, uint64_t i); /* the walk may have passed chunk i while it was busy */
void far_pull_again(struct far_region *r); /* chunks were dropped: walk the order from its start */
void far_pull_status(struct far_region *r, struct far_status *st);

/* push.c */
int far_push_open(struct far_region *r);
int far_push_start(struct far_region *r); /* its threads, last of all: after a restart they have work at once */
void far_push_stop(struct far_region *r);
void far_push_join(struct far_region *r);
void far_push_close(struct far_region *r);
/* Before a write of len bytes: wait while too much is dirty. 0, -EAGAIN (FAR_NOWAIT), -ETIMEDOUT, -ESHUTDOWN. */
int far_push_throttle(struct far_region *r, uint64_t len, unsigned flags);
/* After a write: a sleeping pusher hears of it. */
void far_push_dirtied(struct far_region *r);
int far_push_flush(struct far_region *r);
/* The region was fenced: whoever waits ends with -ESTALE. */
void far_push_fence(struct far_region *r);
/* Chunk i was pushed, but no flush of the remote has covered that yet. Only a chunk that is or was just pushed becomes
 * unstable, before it becomes clean. */
bool far_push_unstable(struct far_region *r, uint64_t i);
/* Flush the remote so that what was pushed becomes stable: here, or soon by a pusher. True: it was done here, there are
 * no pushers. */
int far_push_settle(struct far_region *r);
bool far_push_settle_soon(struct far_region *r);
void far_push_status(struct far_region *r, struct far_status *st);

/* Wait until every chunk whose stores have been allowed so far counts as dirty. Nobody who allows one waits for anything. */
void far_stored_settle(struct far_region *r);

#endif
