/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A thread of a read-only mount asks what has changed, each `interval`. For each range: the region forgets it, then the
 * page cache or the pointer's pages do, in this order; whoever reads in between gets new bytes. So a change is seen at most an interval, the
 * round trip and the forgetting after it happened.
 *
 *     FOLLOWING -> LOST         no answer, or older content than was seen; said once
 *     LOST      -> FOLLOWING    it answers again
 *     any       -> FROZEN       the peer has no list of changes: this thread ends
 *
 * Older content than was seen is never mixed with what is here: the gate is closed for good, absent chunks fail.
 */
#define _GNU_SOURCE
#include "mount/follow.h"

#include "base/clock.h"
#include "base/thread.h"
#include "frontend/fuse.h"
#include "frontend/pointer.h"

#include <stdlib.h>

#define FOLLOW_TRY (5 * FAR_SEC)
#define FOLLOW_RANGES 256

struct far_follower {
	struct far_follower_conf c; /* fixed, but for `from`: of the thread */
	bool told, over, found;     /* of the thread */
	struct far_extent range[FOLLOW_RANGES];

	struct far_mutex lock;
	struct far_cond wake;
	bool stop FAR_GUARDED_BY(lock);
	enum far_follow state FAR_GUARDED_BY(lock);
	struct far_thread thread;
};

static void follower_set(struct far_follower *f, enum far_follow state)
{
	far_mutex_lock(&f->lock);
	f->state = state;
	far_mutex_unlock(&f->lock);
}

static int follower_drop(struct far_follower *f, uint64_t off, uint64_t len)
{
	int r = f->c.region ? far_region_refresh(f->c.region, off, len) : 0;

	if (!r && f->c.pointer)
		r = far_pointer_refresh(f->c.pointer, off, len);
	return r || !f->c.fuse ? r : far_fuse_invalidate(f->c.fuse, off, len);
}

static void follower_lost(struct far_follower *f, const char *why)
{
	if (!f->told)
		far_log(FAR_LOG_WARNING, "changes of %s cannot be followed: %s. What is here stays as it was", f->c.source, why);
	f->told = true;
	follower_set(f, FAR_FOLLOW_LOST);
}

static void follower_older(struct far_follower *f)
{
	f->told = false;
	f->over = true;
	if (f->c.gate)
		far_admit_fence(f->c.gate);
	follower_lost(f, "it holds older content than was seen, an old copy was put back");
}

/* Let readers see what the answer names. */
static int follower_apply(struct far_follower *f, size_t n, bool all)
{
	uint64_t bytes = far_size(f->c.remote);
	int r = 0;

	if ((all || n) && f->c.region && f->c.fuse)
		r = far_fuse_not_local(f->c.fuse); /* nobody reads past the region from now on */
	if (all)
		return r ? r : follower_drop(f, 0, bytes);
	for (size_t k = 0; k < n && !r; k++)
		if (f->range[k].off < bytes)
			r = follower_drop(f, f->range[k].off, far_min(f->range[k].len, bytes - f->range[k].off));
	return r;
}

static void follower_frozen(struct far_follower *f)
{
	f->over = true;
	if (f->c.find && f->c.gate)
		far_admit_open(f->c.gate, FAR_NEVER);
	follower_set(f, FAR_FOLLOW_FROZEN);
}

/* After a start without the remote: is it the right one? */
static bool follower_find(struct far_follower *f)
{
	struct far_error err = { 0 };
	int r = f->c.find && !f->found ? f->c.find(f->c.opaque, &err) : 0;

	f->found = r == 0;
	if (!r)
		return true;
	if (err.code && f->c.gate)
		far_admit_fence(f->c.gate);
	f->over = err.code != 0;
	follower_lost(f, err.code ? err.text : far_strerror(r));
	return false;
}

static void follower_step(struct far_follower *f)
{
	if (!follower_find(f))
		return;
	struct far_origin now = FAR_ORIGIN_INIT;
	bool all = false;
	size_t n = 0;
	uint64_t old = far_deadline_limit(far_now() + FOLLOW_TRY);
	int r = far_watch(f->c.remote, f->c.from.instance, f->c.from.change, f->range, FOLLOW_RANGES, &n, &all, &now);

	far_deadline_restore(old);
	if (r == -EOPNOTSUPP) {
		follower_frozen(f);
		return;
	}
	if (!r && (now.epoch < f->c.from.epoch || now.version < f->c.from.version)) {
		follower_older(f);
		return;
	}
	if (!r)
		r = follower_apply(f, n, all);
	if (r == -ESHUTDOWN) /* it is this mount that ends */
		return;
	if (r) {
		follower_lost(f, far_strerror(r));
		return;
	}
	bool moved = now.change != f->c.from.change || now.instance != f->c.from.instance || now.version != f->c.from.version ||
		     now.epoch != f->c.from.epoch;
	f->c.from = now;
	f->told = false;
	if (f->c.find && f->c.gate)
		far_admit_open(f->c.gate, FAR_NEVER);
	follower_set(f, f->c.once ? FAR_FOLLOW_FROZEN : FAR_FOLLOW_FOLLOWING);
	if (moved)
		f->c.heard(f->c.opaque, &now);
	f->over = f->c.once;
}

static void *follower_main(void *arg)
{
	struct far_follower *f = arg;

	far_mutex_lock(&f->lock);
	while (!f->stop && !f->over) {
		far_mutex_unlock(&f->lock);
		uint64_t next = far_now() + f->c.interval;
		follower_step(f);
		far_mutex_lock(&f->lock);
		while (!f->stop && !f->over && far_cond_wait_until(&f->wake, &f->lock, next))
			;
	}
	far_mutex_unlock(&f->lock);
	return NULL;
}

int far_follower_open(const struct far_follower_conf *conf, struct far_follower **out)
{
	struct far_follower *f = calloc(1, sizeof *f);

	if (!f)
		return -ENOMEM;
	f->c = *conf;
	far_mutex_init(&f->lock);
	far_cond_init(&f->wake);
	if (conf->find)
		follower_set(f, FAR_FOLLOW_LOST);
	else
		follower_step(f); /* the state is known when the mount is usable */
	int r = f->over ? 0 : far_thread_start(&f->thread, "far-follow", follower_main, f);
	if (r) {
		far_follower_close(f);
		return r;
	}
	*out = f;
	return 0;
}

enum far_follow far_follower_state(struct far_follower *f)
{
	far_mutex_lock(&f->lock);
	enum far_follow state = f->state;
	far_mutex_unlock(&f->lock);
	return state;
}

void far_follower_stop(struct far_follower *f)
{
	far_mutex_lock(&f->lock);
	f->stop = true;
	far_cond_broadcast(&f->wake);
	far_mutex_unlock(&f->lock);
}

void far_follower_close(struct far_follower *f)
{
	if (!f)
		return;
	far_follower_stop(f);
	far_thread_join(&f->thread);
	far_cond_fini(&f->wake);
	far_mutex_fini(&f->lock);
	free(f);
}
