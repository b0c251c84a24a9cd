/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One object a mount. It asks the remote who it is, lets kept.c compare that with what is local, takes the lease, and
 * renews it each third of its time. Only then, and only as long as the lease is certain, the gate lets calls through:
 * a mount that began without the remote reads and writes locally until this has happened.
 *
 *                    granted                     renewal failed
 *     UNSURE  ----------------------->  HELD  ----------------->  UNSURE     leaser_try()
 *     (offline start)                                               |
 *        |    the other's                                           | granted again, nobody was there meanwhile
 *        |    epoch is newer                                        v
 *        +--------------------------->  FENCED                     HELD
 *
 *     NONE: read-only, or the peer knows no leases: the gate opens for good once the remote was found to be the right one.
 *
 * Invariants:
 *  1. The gate's time is counted from before the request was sent: the server's count begins later, so it ends later.
 *  2. The epoch that is asked with is one that was granted to this local copy, or 0 where nothing local depends on it.
 *  3. FENCED is for good, and no call is on its way to the gate's inside afterwards but those that had passed it before;
 *     the server refuses these.
 *  4. leaser_try() runs on one thread at a time: the opener's, then the leaser's, then, when that was joined, who releases.
 */
#define _GNU_SOURCE
#include "mount/lease.h"

#include "base/clock.h"
#include "base/thread.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define LEASER_TRY (5 * FAR_SEC)      /* one question */
#define LEASER_BACKOFF (250 * FAR_MSEC)
#define LEASER_BACKOFF_MAX (1 * FAR_SEC)
#define LEASER_TTL (10 * FAR_SEC)     /* of a peer that does not say */

struct far_leaser {
	/* fixed after open */
	struct far_leaser_conf c;
	char writer[40];
	char holder[128];
	bool offline; /* at the start */
	/* of the thread that tries */
	_Atomic bool known; /* the remote was found to be the right one */
	bool none;         /* the peer knows no leases, or none is wanted */
	bool granted;      /* in this process */
	bool told_busy, told_away;
	uint64_t backoff;
	struct far_origin origin_then; /* what kept.c compared with */

	struct far_mutex lock;
	struct far_cond wake;
	bool stop FAR_GUARDED_BY(lock);
	bool released FAR_GUARDED_BY(lock);
	enum far_lease_state state FAR_GUARDED_BY(lock);
	struct far_origin origin FAR_GUARDED_BY(lock);
	uint64_t next FAR_GUARDED_BY(lock); /* when to try */
	struct far_thread thread;
};

static void leaser_set(struct far_leaser *l, enum far_lease_state state)
{
	far_mutex_lock(&l->lock);
	l->state = state;
	far_mutex_unlock(&l->lock);
}

static void leaser_set_origin(struct far_leaser *l, const struct far_origin *o)
{
	far_mutex_lock(&l->lock);
	l->origin = *o;
	far_mutex_unlock(&l->lock);
}

static void leaser_admit(struct far_leaser *l, uint64_t until)
{
	if (l->c.gate)
		far_admit_open(l->c.gate, until);
}

/* The remote refuses us: is it another one, or another's? From any thread that calls it. */
static void leaser_doubt_cb(void *opaque)
{
	struct far_leaser *l = opaque;

	far_mutex_lock(&l->lock);
	l->next = 0;
	far_cond_broadcast(&l->wake);
	far_mutex_unlock(&l->lock);
}

/* ------------------------------------------------------------------------------------------------ questions */

/* A peer of the plain service has no more than a number for its connection. */
static bool leaser_tells(struct far_leaser *l, const struct far_origin *o)
{
	struct far_origin now = FAR_ORIGIN_INIT;
	struct far_extent x;
	bool all;
	size_t n;

	return o->identity[0] || far_watch(l->c.remote, o->instance, o->change, &x, 1, &n, &all, &now) != -EOPNOTSUPP;
}

/* Who is it, and does it fit? */
static int leaser_find(struct far_leaser *l, struct far_error *err)
{
	struct far_origin o = FAR_ORIGIN_INIT;
	int r = far_origin(l->c.remote, &o, 0);
	bool tells = r == 0 && leaser_tells(l, &o);

	if (r && r != -EOPNOTSUPP)
		return r;
	r = far_kept_check(l->c.kept, far_facts(l->c.remote), tells ? &o : NULL, err);
	if (r)
		return r;
	l->known = true;
	l->none = !tells || !l->c.writable;
	l->origin_then = o;
	leaser_set_origin(l, &o);
	return 0;
}

/* What we may claim to have held, invariant 2. */
static void leaser_claim(struct far_leaser *l, struct far_lease *a)
{
	const struct far_kept *k = l->c.kept;

	if (l->granted) {
		far_mutex_lock(&l->lock);
		a->epoch = l->origin.epoch;
		a->version = l->origin.version;
		far_mutex_unlock(&l->lock);
	} else if (k->p && !k->forgotten && !far_persist_is_new(k->p) && far_kept_ours(far_persist_info(k->p))) {
		a->epoch = far_persist_info(k->p)->origin.epoch;
		a->version = far_persist_info(k->p)->origin.version;
	}
}

/* What is local was filled while somebody else owned the region: it fits only if nothing at all has happened since. (And
 * where we claim an epoch, another one in the answer means that somebody was there meanwhile.) */
static bool leaser_moved(const struct far_leaser *l, const struct far_lease *a)
{
	const struct far_kept *k = l->c.kept;

	return !l->granted && !a->epoch && k->p && !k->forgotten && !far_persist_is_new(k->p) &&
	       (a->origin.instance != l->origin_then.instance || a->origin.change != l->origin_then.change);
}

static int leaser_ask(struct far_leaser *l, struct far_lease *a)
{
	uint64_t began = far_now(), began_slept = far_now_slept();

	*a = (struct far_lease)FAR_LEASE_INIT;
	a->writer = l->writer;
	a->holder = l->holder;
	a->take_over = l->c.take_over && !l->granted;
	leaser_claim(l, a);
	uint64_t claimed = a->epoch;
	int r = far_lease(l->c.remote, a);
	a->epoch = claimed;
	if (!r && (leaser_moved(l, a) || (claimed && !a->take_over && a->origin.epoch != claimed))) {
		struct far_lease back = *a;
		back.release = true;
		back.epoch = a->origin.epoch;
		far_lease(l->c.remote, &back);
		r = -ESTALE;
	}
	if (r == -EOPNOTSUPP || r == -EROFS) {
		l->none = true;
		return 0;
	}
	if (r)
		return r;
	uint64_t ttl = a->ttl_ms ? a->ttl_ms * FAR_MSEC : LEASER_TTL;
	l->granted = true;
	far_mutex_lock(&l->lock);
	l->origin = a->origin;
	l->state = FAR_LEASE_HELD;
	l->next = began + ttl / 3;
	far_mutex_unlock(&l->lock);
	leaser_admit(l, began_slept + ttl);
	return 0;
}

/* One attempt. 0: the gate is open. a: the lease's answer, if it came to that. */
static int leaser_try(struct far_leaser *l, struct far_lease *a, struct far_error *err)
{
	uint64_t old = far_deadline_limit(far_now() + LEASER_TRY);
	int r = l->known ? 0 : leaser_find(l, err);

	*a = (struct far_lease)FAR_LEASE_INIT;
	if (!r && !l->none)
		r = leaser_ask(l, a);
	far_deadline_restore(old);
	if (!r && l->none) {
		leaser_set(l, FAR_LEASE_NONE);
		/* Else follow.c opens, when it has seen what changed meanwhile. */
		if (l->c.writable || !(l->offline || l->c.kept->behind))
			leaser_admit(l, FAR_NEVER);
	}
	return r;
}

int far_leaser_find(struct far_leaser *l, struct far_error *err)
{
	struct far_lease a;
	return leaser_try(l, &a, err);
}

/* --------------------------------------------------------------------------------------------------- thread */

/* For good: somebody else owns the region, or what is there is not what was known. */
static void leaser_fence(struct far_leaser *l, const struct far_origin *o, const char *why)
{
	if (l->c.gate)
		far_admit_fence(l->c.gate);
	leaser_set(l, FAR_LEASE_FENCED);
	l->c.fenced(l->c.opaque, o, why);
}

/* Whether a refusal means that the region is another's; else it may be granted later. */
static bool leaser_lost(struct far_leaser *l, int r, const struct far_lease *a)
{
	const struct far_kept *k = l->c.kept;
	struct far_origin known;

	far_leaser_origin(l, &known);
	if (known.identity[0] && a->origin.identity[0] && strcmp(known.identity, a->origin.identity) != 0)
		return false; /* a stranger at its address */
	uint64_t ours = l->granted ? a->epoch : k->p && far_kept_ours(far_persist_info(k->p)) ?
			far_persist_info(k->p)->origin.epoch : 0;

	return r == -ESTALE || (r == -EBUSY && ours && a->origin.epoch > ours);
}

static void leaser_failed(struct far_leaser *l, int r, const struct far_lease *a, const struct far_error *e)
{
	char why[400];

	if (e->code) { /* kept.c's sentence */
		leaser_fence(l, &a->origin, e->text);
		return;
	}
	bool answered = a->origin.instance || a->origin.identity[0];
	if (l->known && answered && leaser_lost(l, r, a)) {
		if (a->origin.epoch < a->epoch || a->origin.version < a->version)
			snprintf(why, sizeof why, "%.150s holds older content than it had: an old copy was put back", l->c.kept->source);
		else
			snprintf(why, sizeof why, "%s has taken %.150s over", a->other[0] ? a->other : "another mount",
				 l->c.kept->source);
		leaser_fence(l, &a->origin, why);
		return;
	}
	if (r == -EBUSY && !l->told_busy)
		far_log(FAR_LOG_WARNING, "%s has %s mounted for writing: nothing is pushed until it lets go", a->other,
			l->c.kept->source);
	l->told_busy |= r == -EBUSY;
	if (r == -ESTALE && !l->told_away)
		far_log(FAR_LOG_WARNING, "another region answers at %s than the one that is mounted here: waiting for the right one",
			l->c.kept->source);
	l->told_away |= r == -ESTALE;
	far_mutex_lock(&l->lock);
	l->state = l->none || !l->c.writable ? FAR_LEASE_NONE : FAR_LEASE_UNSURE;
	l->next = far_now() + l->backoff;
	far_mutex_unlock(&l->lock);
	l->backoff = far_min(l->backoff * 2, LEASER_BACKOFF_MAX);
}

static void leaser_step(struct far_leaser *l)
{
	struct far_error e = { 0 };
	struct far_origin o;
	struct far_lease a;
	bool began = l->offline && !l->known, was_away = began || l->backoff != LEASER_BACKOFF;
	int r = leaser_try(l, &a, &e);

	if (r) {
		leaser_failed(l, r, &a, &e);
		return;
	}
	l->backoff = LEASER_BACKOFF;
	l->told_busy = l->told_away = false;
	if (was_away)
		far_log(began ? FAR_LOG_WARNING : FAR_LOG_INFO, "%s is in reach again", l->c.kept->source);
	far_leaser_origin(l, &o);
	l->c.heard(l->c.opaque, &o);
}

static bool leaser_over_locked(const struct far_leaser *l) FAR_REQUIRES(l->lock)
{
	return l->stop || l->state == FAR_LEASE_FENCED || (l->none && l->known);
}

static void *leaser_main(void *arg)
{
	struct far_leaser *l = arg;

	far_mutex_lock(&l->lock);
	while (!leaser_over_locked(l)) {
		if (far_cond_wait_until(&l->wake, &l->lock, l->next))
			continue; /* told something */
		far_mutex_unlock(&l->lock);
		leaser_step(l);
		far_mutex_lock(&l->lock);
	}
	far_mutex_unlock(&l->lock);
	return NULL;
}

/* ----------------------------------------------------------------------------------------------- open and end */

static int leaser_writer(struct far_leaser *l)
{
	unsigned char random[16];

	if (l->c.kept->p) {
		snprintf(l->writer, sizeof l->writer, "%s", far_persist_info(l->c.kept->p)->id);
		return 0;
	}
	if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random)
		return -EIO;
	for (size_t k = 0; k < sizeof random; k++)
		snprintf(l->writer + 2 * k, 3, "%02x", random[k]);
	return 0;
}

static void leaser_holder(struct far_leaser *l)
{
	char host[64] = "a host";

	gethostname(host, sizeof host - 1);
	snprintf(l->holder, sizeof l->holder, "%s (process %d, %.60s)", host, (int)getpid(), l->c.target);
}

/* The other's process is gone, its lease is not: it ends by itself. */
static int leaser_wait(struct far_leaser *l, struct far_lease *a, struct far_error *err)
{
	uint64_t until = far_now() + far_min(a->left_ms * FAR_MSEC + FAR_SEC, l->c.deadline);
	int r = -EBUSY;

	far_log(FAR_LOG_WARNING, "%s had %s mounted and is gone: waiting up to %u s for its lease to end", a->other,
		l->c.kept->source, (a->left_ms + 999) / 1000);
	while (r == -EBUSY && a->gone && far_now() < until) {
		far_sleep_until(far_min(until, far_now() + far_max(50, far_min(a->left_ms, 500)) * FAR_MSEC), false);
		r = leaser_try(l, a, err);
	}
	return r;
}

static int leaser_refused(struct far_leaser *l, int r, const struct far_lease *a, struct far_error *err)
{
	const char *source = l->c.kept->source;

	if (r == -EBUSY)
		return far_error_set(err, EBUSY, "cannot mount %.150s for writing: %s has it mounted. End that mount, use --read-only, or "
				     "take it over with --take-over", source, a->other[0] ? a->other : "another mount");
	return far_error_set(err, -r, "cannot mount %.200s: %s. Look at the host that serves it", source, far_strerror(r));
}

/* The first attempt, with all that a person may have to be told. */
static int leaser_first(struct far_leaser *l, struct far_error *err)
{
	struct far_error e = { 0 };
	struct far_lease a;
	int r = l->c.offline && l->c.may_be_offline ? -ENOTCONN : leaser_try(l, &a, &e);

	if (r == -EBUSY && a.gone && !e.code && l->c.alone) {
		l->c.take_over = true;
		r = leaser_try(l, &a, &e);
	}
	if (r == -EBUSY && a.gone && !e.code)
		r = leaser_wait(l, &a, &e);
	if (r == -ESTALE && !e.code && l->known) { /* the lease's answer: forget clean chunks if that was asked for, once */
		r = far_kept_refuse(l->c.kept, &a.origin, &e);
		if (!r)
			r = leaser_try(l, &a, &e);
	}
	if (r && !e.code && l->c.may_be_offline && (far_error_is_transient(r) || r == -ETIMEDOUT)) {
		l->offline = true;
		leaser_set(l, l->c.writable ? FAR_LEASE_UNSURE : FAR_LEASE_NONE);
		return 0;
	}
	if (r && e.code) {
		if (err)
			*err = e;
		return r;
	}
	return r ? leaser_refused(l, r, &a, err) : 0;
}

int far_leaser_open(const struct far_leaser_conf *conf, struct far_leaser **out, struct far_error *err)
{
	struct far_leaser *l = calloc(1, sizeof *l);

	if (!l)
		return far_error_set(err, ENOMEM, "no memory for a lease");
	l->c = *conf;
	l->backoff = LEASER_BACKOFF;
	far_mutex_init(&l->lock);
	far_cond_init(&l->wake);
	far_mutex_lock(&l->lock);
	l->origin = (struct far_origin)FAR_ORIGIN_INIT;
	far_mutex_unlock(&l->lock);
	if (l->c.gate)
		far_admit_on_doubt(l->c.gate, leaser_doubt_cb, l);
	int r = leaser_writer(l);
	if (r)
		far_error_set(err, -r, "cannot make up a name for this writer: %s", far_strerror(r));
	leaser_holder(l);
	if (!r)
		r = leaser_first(l, err);
	if (r) {
		far_leaser_close(l);
		return r;
	}
	*out = l;
	return 0;
}

int far_leaser_start(struct far_leaser *l)
{
	if (l->known ? l->none : !l->c.writable)
		return 0;
	return far_thread_start(&l->thread, "far-lease", leaser_main, l);
}

bool far_leaser_found(struct far_leaser *l)
{
	return atomic_load(&l->known);
}

bool far_leaser_offline(const struct far_leaser *l)
{
	return l->offline;
}

void far_leaser_origin(struct far_leaser *l, struct far_origin *o)
{
	far_mutex_lock(&l->lock);
	*o = l->origin;
	far_mutex_unlock(&l->lock);
}

enum far_lease_state far_leaser_state(struct far_leaser *l)
{
	far_mutex_lock(&l->lock);
	enum far_lease_state state = l->state;
	far_mutex_unlock(&l->lock);
	return state;
}

void far_leaser_stop(struct far_leaser *l)
{
	far_mutex_lock(&l->lock);
	l->stop = true;
	far_cond_broadcast(&l->wake);
	far_mutex_unlock(&l->lock);
}

void far_leaser_release(struct far_leaser *l)
{
	struct far_lease a = FAR_LEASE_INIT;

	far_leaser_stop(l);
	if (far_leaser_state(l) != FAR_LEASE_HELD)
		return; /* the thread may be asking who does not answer: it is joined when the remote was stopped */
	far_thread_join(&l->thread);
	far_mutex_lock(&l->lock);
	bool ours = l->state == FAR_LEASE_HELD && !l->released;
	l->released = true;
	a.epoch = l->origin.epoch;
	a.version = l->origin.version;
	far_mutex_unlock(&l->lock);
	if (!ours)
		return;
	a.writer = l->writer;
	a.holder = l->holder;
	a.release = true;
	uint64_t old = far_deadline_limit(far_now() + FAR_SEC);
	far_lease(l->c.remote, &a); /* if it does not arrive, the lease ends by itself */
	far_deadline_restore(old);
}

void far_leaser_close(struct far_leaser *l)
{
	if (!l)
		return;
	far_leaser_stop(l);
	far_thread_join(&l->thread);
	if (l->c.gate)
		far_admit_on_doubt(l->c.gate, NULL, NULL);
	far_cond_fini(&l->wake);
	far_mutex_fini(&l->lock);
	free(l);
}
