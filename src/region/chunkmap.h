/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Who has each chunk. Two bytes a chunk in one memfd; nothing here touches data or the network. */
#ifndef FAR_CHUNKMAP_H
#define FAR_CHUNKMAP_H

#include "base/base.h"

enum far_chunk {
	FAR_ABSENT,           /* only the remote has it */
	FAR_FETCHING,         /* its owner is reading it from the remote */
	FAR_CLEAN,            /* here and on the remote, the same */
	FAR_DIRTY,            /* newer here */
	FAR_PUSHING,          /* newer here, a copy is on its way */
	FAR_REDIRTY,          /* written again while a copy was on its way */
	FAR_PARTIAL,          /* some ranges were written here, the rest only the remote has */
	FAR_FETCHING_PARTIAL, /* the same, and its owner is reading the rest */
	FAR_PUSHING_PARTIAL,  /* the same, and a copy of those ranges is on its way to the remote */
	FAR_FILLING,          /* one thread alone moves bytes into the local store */
	FAR_EVICTING,         /* one thread alone gives its room back */
};

struct far_chunkmap;
struct far_fetch; /* a claim on a run of chunks; whoever got it must end it */
struct far_partial;

/* shift: log2 of the chunk size. -ENOMEM. */
int far_chunkmap_open(struct far_chunkmap **out, uint64_t bytes, unsigned shift, uint32_t max_partial);
void far_chunkmap_close(struct far_chunkmap *m);
/* Waits end with -ESHUTDOWN from now on. */
void far_chunkmap_stop(struct far_chunkmap *m);

uint64_t far_chunkmap_chunks(const struct far_chunkmap *m);
uint64_t far_chunkmap_len(const struct far_chunkmap *m, uint64_t i); /* of chunk i: short for the last */
enum far_chunk far_chunkmap_state(struct far_chunkmap *m, uint64_t i);
bool far_chunkmap_is_local(struct far_chunkmap *m, uint64_t i);
uint64_t far_chunkmap_local(struct far_chunkmap *m); /* bytes in local chunks */
uint64_t far_chunkmap_dirty(struct far_chunkmap *m); /* bytes the remote lacks, to a fifteenth of a chunk */

/* Readers. Pin as many of [i, i+max) as are local without a gap; returns how many. Pinned chunks stay local. */
uint64_t far_chunkmap_pin(struct far_chunkmap *m, uint64_t i, uint64_t max);
void far_chunkmap_unpin(struct far_chunkmap *m, uint64_t i, uint64_t n);
/* Pin a half-written chunk if bytes [from, to) of it were written here; then far_chunkmap_unpin(m, i, 1). */
bool far_chunkmap_pin_partial(struct far_chunkmap *m, uint64_t i, uint64_t from, uint64_t to);

/* Writers: begin, copy into the local store, end. */
enum far_claim {
	FAR_CLAIM_PRESENT, /* local and pinned */
	FAR_CLAIM_PARTIAL, /* half-written and pinned */
	FAR_CLAIM_WHOLE,   /* absent, a whole-chunk write: nobody else may touch it until the end */
	FAR_CLAIM_FETCH,   /* no room to remember the range: fetch it first, then begin again */
	FAR_CLAIM_WAIT,    /* somebody else is moving it: far_chunkmap_wait(), then begin again */
};
enum far_claim far_chunkmap_write_begin(struct far_chunkmap *m, uint64_t i, uint64_t from, uint64_t to, unsigned *ragged);
/* ok: the copy succeeded. After a failed WHOLE the caller has made the local store's room zero again if it could. */
void far_chunkmap_write_end(struct far_chunkmap *m, uint64_t i, uint64_t from, uint64_t to, enum far_claim claim,
			    unsigned ragged, bool ok);

/* Fetchers. Claim a run of absent or half-written chunks that begins at i; *n is 0 if chunk i is neither, and then
 * nothing is claimed. NULL without memory with *n > 0. */
struct far_fetch *far_chunkmap_claim(struct far_chunkmap *m, uint64_t i, uint64_t max, uint64_t *n);
/* Data of the claim's next chunk (one after the other from its first) is in hand: nobody else touches the chunk until
 * fill_end. *e is NULL when all of it is wanted, else far_partial_missing() tells which ranges. */
void far_chunkmap_fill_begin(struct far_chunkmap *m, struct far_fetch *f, struct far_partial **e);
void far_chunkmap_fill_end(struct far_chunkmap *m, uint64_t i, struct far_partial *e, bool ok);
/* err: 0 or -errno. Chunks of the claim that were not filled go back; everyone who waits gets err. Frees f. */
void far_chunkmap_fetch_end(struct far_chunkmap *m, struct far_fetch *f, int err);
/* Wait while chunk i is being fetched, filled or evicted: 0: look again; the error of the fetch, if that is not another
 * thread's deadline; -ETIMEDOUT, at the thread's own; -ESHUTDOWN. */
int far_chunkmap_wait(struct far_chunkmap *m, uint64_t i);

/* Pushers. Find the next run of at most max dirty chunks at or after *cursor and make it PUSHING; *cursor moves on.
 * A half-written chunk comes alone, unclaimed, with *partial set: push its ranges, or fetch it and then
 * far_chunkmap_push_begin_one(). False:
 * none up to the end. One caller at a time. */
bool far_chunkmap_push_begin(struct far_chunkmap *m, uint64_t *cursor, uint64_t max, uint64_t *first, uint64_t *n,
			     bool *partial);
bool far_chunkmap_push_begin_one(struct far_chunkmap *m, uint64_t i);
void far_chunkmap_push_end(struct far_chunkmap *m, uint64_t first, uint64_t n, bool ok);
/* Push what is here of half-written chunk i: *e is a copy of its entry, to be freed. False: it is not half-written any
 * more, is being fetched, has no news, or there is no memory; and, without `crowded`, when half of the side table is used:
 * it would keep its place there. */
bool far_chunkmap_push_begin_partial(struct far_chunkmap *m, uint64_t i, bool crowded, struct far_partial **e);
void far_chunkmap_push_end_partial(struct far_chunkmap *m, uint64_t i, bool ok);
/* The remote may have forgotten what was pushed of chunk i: if it counts as clean it is dirty again. False: it did not.
 * Nobody may evict it meanwhile for longer than a look at it takes. */
bool far_chunkmap_redirty(struct far_chunkmap *m, uint64_t i);
/* Whether chunk i holds something the remote lacks; call fn for every one that does. */
bool far_chunkmap_has_news(struct far_chunkmap *m, uint64_t i);
void far_chunkmap_each_dirty(struct far_chunkmap *m, void (*fn)(void *opaque, uint64_t i, enum far_chunk s), void *opaque);

/* Evictors: begin succeeds on a clean chunk, or a half-written one without news, that nobody has pinned. */
bool far_chunkmap_evict_begin(struct far_chunkmap *m, uint64_t i);
void far_chunkmap_evict_end(struct far_chunkmap *m, uint64_t i, bool ok);
/* Whether the chunk was used since this was last asked (second chance). */
bool far_chunkmap_test_touched(struct far_chunkmap *m, uint64_t i);

/* The chunk map's file (persist.c). restore: chunks [i, i+n) are local; before any other thread. */
void far_chunkmap_restore(struct far_chunkmap *m, uint64_t i, uint64_t n, bool dirty);
void far_chunkmap_restore_partial(struct far_chunkmap *m, struct far_partial *e); /* e becomes the map's */
/* Call fn for every half-written chunk; it must not call back. */
void far_chunkmap_each_partial(struct far_chunkmap *m, void (*fn)(void *opaque, const struct far_partial *e), void *opaque);
/* Nothing of it is newer than the remote's, and nobody has it pinned. */
bool far_chunkmap_is_quiet(struct far_chunkmap *m, uint64_t i);

/* What must always hold; for tests and debug builds. */
void far_chunkmap_check(struct far_chunkmap *m);

#endif
