/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A managed region: a remote backend, a local store, and who has each chunk. It looks like a backend itself (the cached
 * layer), so any frontend can stand on it. Pulling starts when it is opened.
 */
#ifndef FAR_REGION_H
#define FAR_REGION_H

#include "backend/backend.h"
#include "region/persist.h"

struct far_region;

#define FAR_STAGE ((uint64_t)2 << 20) /* a huge page */

/*
 * A local store that a program changes without asking: memory behind a pointer. Nobody else's calls change its bytes once
 * a chunk is local, but fills (far_write with FAR_FILL) and discards.
 */
struct far_region_memory {
	void *self;
	/* Find what was stored since the last look and call far_region_stored() for it. Everything that was stored before the
	 * call has been told when it returns 0, also what another thread's call found that was still running. */
	int (*collect)(void *self, struct far_region *r);
	/* [off, off+len) is about to be read for a push: what is stored there from now on is found by a later collect. */
	void (*arm)(void *self, uint64_t off, uint64_t len);
	/* Whether all pages of [off, off+len) are here, in a chunk that is not local: else nothing was stored there. */
	bool (*there)(void *self, uint64_t off, uint64_t len);
	/* These bytes were read for that push. */
	void (*pushed)(void *self, uint64_t off, const void *buf, uint64_t len);
	/* These bytes are what the remote has, and are about to be filled in: whole chunks, or with wants_whole false any part. */
	bool wants_whole;
	void (*came)(void *self, uint64_t off, const void *buf, uint64_t len);
	/* A buffer from which a fill of whole huge pages costs no copy, for a claimed range of whole aligned FAR_STAGE; NULL:
	 * take any. It may be the place itself, which after a read that failed is not zero any more. */
	void *(*stage)(void *self, uint64_t off, uint64_t len);
	void (*unstage)(void *self, void *buf, uint64_t len);
	/* These bytes, all zero, will not be filled in. */
	void (*zeros)(void *self, uint64_t off, const void *buf, uint64_t len);
};

struct far_region_conf {
	const struct far_region_memory *memory; /* what `local` is, if it is memory behind a pointer; else NULL. Copied */
	struct far_backend *remote;  /* owned from success on */
	bool remote_borrowed;        /* ... but not this one: it is neither stopped nor closed */
	struct far_backend *local;   /* same size, any I/O; owned from success on */
	struct far_persist *persist; /* the chunk map's file; NULL: state lives in memory. Owned from success on */
	bool ahead_only;             /* pull only what is asked for or foreseen, whatever the order */
	bool local_is_zero;          /* it reads as zeros everywhere now: zero chunks need no write */
	/* Called once on a thread of the puller or of a caller when all of it is local for the first time; NULL: nobody
	 * wants to know. */
	void (*all_local)(void *opaque);
	void *opaque;
	const struct far_mount_opts *opts; /* everything but mode, local, local_backend; copied */
};

/* -EINVAL: chunk no power of two in range, sizes differ, order cannot be read. */
int far_region_open(const struct far_region_conf *conf, struct far_region **out, struct far_error *err);

/* The region as a backend, for a frontend; owned by the region: never far_close() it. far_flush() on it is
 * far_region_flush(). */
struct far_backend *far_region_backend(struct far_region *r);

/* Flush stamps: see DESIGN.md 5. Bounded under endless writes; honours the thread's deadline. */
int far_region_flush(struct far_region *r);
/* The same to the remote, whatever `durable` says. */
int far_region_push(struct far_region *r);
/* Wait until [off, off+len) is local, fetching it before the rest. Honours the thread's deadline. */
int far_region_wait(struct far_region *r, uint64_t off, uint64_t len);
/* Wait until this many bytes are local, no matter which. */
int far_region_wait_local(struct far_region *r, uint64_t bytes);
/* Give local clean chunks inside [off, off+len) back; busy and dirty ones stay. */
int far_region_evict(struct far_region *r, uint64_t off, uint64_t len);
/* Keep the chunks of the range from eviction, and fetch them soon; or let them go. */
int far_region_pin(struct far_region *r, uint64_t off, uint64_t len);
int far_region_unpin(struct far_region *r, uint64_t off, uint64_t len);
/* Another owner has the region: writes and flushes fail with -ESTALE from now on, nothing is pushed any more, what is
 * dirty stays. Reads of local chunks go on; those of absent ones too. */
void far_region_fence(struct far_region *r);
/* The remote's bytes in the range have changed: forget clean chunks there (without giving their room back while others
 * share the local store). Waits for fetches that run. When it returns no later read shows older bytes. */
int far_region_refresh(struct far_region *r, uint64_t off, uint64_t len);
/* The chunk map's file remembers what is known of the remote. Nothing to do without one. */
int far_region_remember(struct far_region *r, const struct far_facts *facts, const struct far_origin *origin, bool fenced);
/* Memory behind a pointer. A program waits at `off`: make that page local, then the chunk around it, and ask for what may
 * come next. Before it blocks it asks may_block(opaque). 0: look again with far_region_hold(); 1: the page has been
 * filled; -EAGAIN: it may not block and would have to. Honours the thread's deadline. */
int far_region_fault(struct far_region *r, uint64_t off, bool (*may_block)(void *opaque), void *opaque);
/* Call fn(opaque) while nothing can be filled into the chunk of `off`, which is not local: 0 or its error; -EAGAIN: it is
 * local, or somebody else has it. */
int far_region_alone(struct far_region *r, uint64_t off, int (*fn)(void *opaque), void *opaque);
/* Pin the chunk of `off`; false: it is not local. */
uint64_t far_region_chunk(const struct far_region *r); /* its size */
bool far_region_hold(struct far_region *r, uint64_t off);
void far_region_release(struct far_region *r, uint64_t off);
/* far_region_stored(): the pages have been dropped, what is missing is zero now. */
#define FAR_STORED_ZEROS (1u << 9)
/* [off, off+len), whole pages, was stored by the program, or will be as soon as allow(opaque, off, len) lets it: that is
 * called, if given, for each part, when the chunk cannot go away any more and before it counts as dirty. It must not
 * block. FAR_NOWAIT: -EAGAIN rather than wait (parts before that have been done; doing them again is harmless). */
int far_region_stored(struct far_region *r, uint64_t off, uint64_t len, unsigned flags,
		      void (*allow)(void *opaque, uint64_t off, uint64_t len), void *opaque);
/* Ask the puller to take [off, off+len) next. */
void far_region_prefetch(struct far_region *r, uint64_t off, uint64_t len);
/* What a flush does first: find what the program has stored. */
int far_region_collect(struct far_region *r);
/* What the chunk of `off` is at this moment, for who draws it. */
enum far_region_look { FAR_LOOK_ABSENT, FAR_LOOK_FETCHING, FAR_LOOK_LOCAL, FAR_LOOK_DIRTY };
enum far_region_look far_region_look(struct far_region *r, uint64_t off);
void far_region_status(struct far_region *r, struct far_status *st);
/* Blocked and later calls return -ESHUTDOWN. Does not flush. */
void far_region_stop(struct far_region *r);
/* After stop: wait until the background threads have ended; calls of others may still be on their way out. */
void far_region_join(struct far_region *r);
/* The remote was borrowed, and is stopped and closed with the region from now on. */
void far_region_own_remote(struct far_region *r);
/* Stop, then free, remote and local included. Does not flush. */
void far_region_close(struct far_region *r);

#endif
