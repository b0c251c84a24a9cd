/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What push.c and flush.c share: the object, its lock, and the steps that both take under it. */
#ifndef FAR_PUSH_INT_H
#define FAR_PUSH_INT_H

#include "region/region_int.h"
#include "region/unstable.h"

#define PUSH_THREADS_MAX 32

struct push_flush {
	struct push_flush *next;
	struct far_region *r;
	uint64_t *listed, *later; /* bit i: chunk i */
	uint64_t left, stamp;
	int err;
};

/* One walk over the region. Two are told apart, so that one whose last pushes still run does not blur the next. */
struct push_round {
	uint64_t began;
	unsigned busy;     /* pushes of it that run */
	bool ended, whole; /* the cursor reached the end; nothing failed */
};

struct far_push {
	struct far_region *r;
	unsigned max_threads; /* fixed after open */

	_Atomic bool sleeping;      /* nothing is dirty, the leader sleeps without a limit */
	_Atomic bool settle_wanted; /* a flush of the remote would let chunks go that are in the way */
	_Atomic uint64_t oldest;    /* nothing that is dirty has been so since before; 0: nothing is dirty */

	struct far_mutex lock;
	struct far_cond work, done; /* for workers; for flushes and throttled writers */
	struct far_thread thread[PUSH_THREADS_MAX] FAR_GUARDED_BY(lock);
	unsigned threads FAR_GUARDED_BY(lock), busy FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
	bool round FAR_GUARDED_BY(lock);  /* the cursor is on its way */
	bool leader FAR_GUARDED_BY(lock); /* one idle worker watches the clock, the others only wait */
	uint64_t cursor FAR_GUARDED_BY(lock), next_round FAR_GUARDED_BY(lock), backoff FAR_GUARDED_BY(lock);
	unsigned n_round FAR_GUARDED_BY(lock);
	struct push_round rounds[2] FAR_GUARDED_BY(lock); /* n_round % 2: the newest */
	uint64_t sequence FAR_GUARDED_BY(lock);
	unsigned throttled FAR_GUARDED_BY(lock);
	struct push_flush *flushes FAR_GUARDED_BY(lock);
	uint64_t extent FAR_GUARDED_BY(lock), fastest FAR_GUARDED_BY(lock);
	uint64_t zero_extent FAR_GUARDED_BY(lock); /* how long a run of zeros may be given in one call */

	/* flush.c */
	uint64_t pushes FAR_GUARDED_BY(lock), flushed FAR_GUARDED_BY(lock); /* that ended; that a remote flush covered */
	struct far_unstable unstable FAR_GUARDED_BY(lock);
	uint64_t instance FAR_GUARDED_BY(lock); /* of the remote that everything unstable was pushed to */
	uint64_t changes FAR_GUARDED_BY(lock);  /* how often that has become another one */
	bool flushing FAR_GUARDED_BY(lock);     /* a flush of the remote runs */
	uint64_t settle_again FAR_GUARDED_BY(lock); /* one failed: the pushers do not try before */

	/* what status shows */
	uint64_t show_at FAR_GUARDED_BY(lock), show_bytes FAR_GUARDED_BY(lock);
	double show_rate FAR_GUARDED_BY(lock);
};

/* push.c */
void far_push_round_locked(struct far_push *p) FAR_REQUIRES(p->lock);
/* Push the next run of the round. False: the round has nothing more to begin. */
bool far_push_step_locked(struct far_push *p) FAR_REQUIRES(p->lock);
/* A change of the remote failed; no lock is held. */
void far_push_refused(struct far_region *r, int err);

/* flush.c */
/* The instance of the remote that was heard of last; 0: it does not tell. */
uint64_t far_push_instance(struct far_region *r);
/* Whether a push of [first, first+n), made PUSHING at `began`, is the last that all flushes wait for, and may flush the
 * remote in the same call: then that counts as one that has begun, and must be ended after the push was. */
struct far_push_last {
	bool flush;
	uint64_t covers, changes, began;
	unsigned mine; /* pushes of its own that ended */
};
void far_push_last_begin_locked(struct far_push *p, uint64_t first, uint64_t n, uint64_t began, struct far_push_last *l)
	FAR_REQUIRES(p->lock);
void far_push_last_end_locked(struct far_push *p, const struct far_push_last *l, uint64_t before, uint64_t after, int err)
	FAR_REQUIRES(p->lock);
/* A push of [first, first+n) has ended, made PUSHING at `began`; `before` and `after` are the instance around it. Ends it
 * in the chunk map and for the flushes that list it. */
void far_push_ended_locked(struct far_push *p, uint64_t first, uint64_t n, uint64_t began, uint64_t before, uint64_t after,
			   int err) FAR_REQUIRES(p->lock);
/* The same of what is here of half-written chunk i. */
void far_push_ended_partial_locked(struct far_push *p, uint64_t i, uint64_t began, uint64_t before, uint64_t after, int err)
	FAR_REQUIRES(p->lock);
/* Chunk i, claimed for nothing: it could not even be made whole. */
void far_push_failed_locked(struct far_push *p, uint64_t i, uint64_t began, int err) FAR_REQUIRES(p->lock);
/* When a pusher should flush the remote by itself; FAR_NEVER: nothing is unstable, or one runs. */
uint64_t far_push_settle_at_locked(struct far_push *p) FAR_REQUIRES(p->lock);
void far_push_settle_now_locked(struct far_push *p) FAR_REQUIRES(p->lock);

#endif
