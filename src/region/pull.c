/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The puller: worker threads that walk the order and fetch what is absent, in extents, as much at a time as the path
 * carries. Requests (prefetch, wait) go before the order; demand fetches are made by whoever needs them and only take
 * window from the puller.
 *
 * pace.c says how much may be on its way (the window). An extent is what the path delivers in a millisecond, because a
 * demand fetch may come to wait behind one; or more if the workers could not fill the window otherwise: a power of two of
 * chunks, at most 2 MiB (4 MiB where the round trip is over 10 ms). Near by it is what 10 ms deliver, 512 KiB at most, as
 * long as the threads fill the window with that: it then stays in a CPU's cache on its way from the store through the socket
 * to the local store; where that takes huge pages, it is one of those.
 *
 * Invariants, under lock: inflight is the sum of the extents that workers are fetching; a worker claims its extent
 * before it lets go of the lock, so that the cursor never passes a chunk that nobody took.
 */
#include "region/pace.h"
#include "region/region_int.h"

#include <stdlib.h>

#define PULL_THREADS_MAX 32
#define PULL_FAULTS 16
#define PULL_BACKOFF_MAX (10 * FAR_SEC)
#define PULL_EXTENT_FIRST (256 * FAR_KIB)
#define PULL_EXTENT_NEAR (512 * FAR_KIB)
#define PULL_NO_TRIGGER UINT64_MAX
#define PULL_ASK_AGAIN (50 * FAR_MSEC)

struct pull_request {
	struct pull_request *next;
	uint64_t first, end;
};

struct far_pull {
	struct far_region *r;
	/* fixed after open */
	struct far_order order;
	unsigned max_threads;

	_Atomic unsigned waiters;   /* that sleep on `progress` until a range is local */
	_Atomic uint64_t want;      /* others do until so many bytes are, or more; FAR_NEVER: nobody */
	_Atomic uint64_t trigger;   /* reading this chunk asks for more ahead */

	struct far_mutex lock;
	struct far_cond work, progress;
	struct far_thread thread[PULL_THREADS_MAX] FAR_GUARDED_BY(lock);
	unsigned threads FAR_GUARDED_BY(lock), idle FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
	size_t run FAR_GUARDED_BY(lock);   /* the cursor: run of the order, chunk in it */
	uint64_t at FAR_GUARDED_BY(lock);
	bool done FAR_GUARDED_BY(lock);    /* the order was walked to its end */
	struct pull_request *requests FAR_GUARDED_BY(lock);
	int error FAR_GUARDED_BY(lock);    /* of the last fetch; 0 after one that went well */
	uint64_t errors FAR_GUARDED_BY(lock), backoff FAR_GUARDED_BY(lock), resume FAR_GUARDED_BY(lock);

	struct far_pace pace FAR_GUARDED_BY(lock);
	uint64_t inflight FAR_GUARDED_BY(lock), demand FAR_GUARDED_BY(lock);
	uint64_t extent FAR_GUARDED_BY(lock);

	/* what status shows */
	uint64_t show_at FAR_GUARDED_BY(lock), show_bytes FAR_GUARDED_BY(lock);
	double show_rate FAR_GUARDED_BY(lock);
	uint64_t progress_at FAR_GUARDED_BY(lock);

	/* prefetch */
	uint64_t fault[PULL_FAULTS] FAR_GUARDED_BY(lock);
	unsigned n_fault FAR_GUARDED_BY(lock);
	int64_t stride FAR_GUARDED_BY(lock);
	uint64_t ahead FAR_GUARDED_BY(lock), next FAR_GUARDED_BY(lock); /* depth; first chunk not asked for yet */
};

/* -------------------------------------------------------------------------------------------------- what comes next */

static bool wanted(struct far_region *r, uint64_t i)
{
	enum far_chunk s = far_chunkmap_state(r->map, i);
	return s == FAR_ABSENT || s == FAR_PARTIAL;
}

/* Pinned chunks come in at the cost of others. */
static bool pull_has_room(struct far_region *r, uint64_t first, uint64_t len)
{
	return !r->o.local_max || far_chunkmap_local(r->map) + len <= r->o.local_max || far_evict_kept(r, first);
}

/* The local store took nothing when last asked: one fetch at a time finds out whether it does again. */
static bool pull_probing_locked(struct far_pull *p) FAR_REQUIRES(p->lock)
{
	return p->inflight && atomic_load_explicit(&p->r->local_error, memory_order_relaxed);
}

/* The next chunk to fetch and where its run ends. The cursor stays on it. */
static bool pull_next_locked(struct far_pull *p, uint64_t *first, uint64_t *end) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;

	while (p->requests) {
		struct pull_request *q = p->requests;
		while (q->first < q->end && !wanted(r, q->first))
			q->first++;
		if (q->first < q->end) {
			*first = q->first;
			*end = q->end;
			return true;
		}
		p->requests = q->next;
		free(q);
	}
	while (p->run < p->order.n) {
		struct far_order_run *o = &p->order.run[p->run];
		while (p->at < o->n && !wanted(r, o->first + p->at))
			p->at++;
		if (p->at < o->n) {
			*first = o->first + p->at;
			*end = o->first + o->n;
			return true;
		}
		p->run++;
		p->at = 0;
	}
	return false;
}

/* ------------------------------------------------------------------------------------------------------ the window */

/* From memory to memory. Workers that fill small pages side by side wait for each other's lock: one lock is 2 MiB. */
static bool pull_is_memory(struct far_region *r)
{
	return r->memory.self && !(far_facts(r->remote)->caps & FAR_CAP_REMOTE);
}

static bool pull_huge(struct far_region *r)
{
	return r->memory.stage || pull_is_memory(r);
}

/* The extent that goes with the window. */
static void pull_resize_locked(struct far_pull *p) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	double rate = far_pace_rate(&p->pace);
	bool far = far_pace_is_far(&p->pace);
	uint64_t io = far_facts(r->remote)->max_io;
	uint64_t most = p->pace.base > 10 * FAR_MSEC ? 4 * FAR_MIB : 2 * FAR_MIB;
	uint64_t brisk = far ? most : pull_huge(r) ? FAR_STAGE : PULL_EXTENT_NEAR;
	uint64_t extent = r->chunk, each = (uint64_t)(rate * (far ? 0.001 : 0.010));

	if (io)
		most = far_min(most, io);
	while (extent * 2 <= far_min(brisk, most) && extent * 2 <= each)
		extent *= 2;
	while (extent * 2 <= most && extent * p->max_threads < p->pace.window) /* all threads together can fill the window */
		extent *= 2;
	p->extent = extent;
}

static void pull_sample_locked(struct far_pull *p, uint64_t len, uint64_t began) FAR_REQUIRES(p->lock)
{
	uint64_t now = far_now();

	if (far_pace_arrived(&p->pace, len, began, now, p->extent))
		pull_resize_locked(p);
	p->show_bytes += len;
	if (now - p->show_at >= FAR_SEC) {
		p->show_rate = (double)p->show_bytes * (double)FAR_SEC / (double)(now - p->show_at);
		p->show_at = now;
		p->show_bytes = 0;
	}
}

/* Whether another extent may be asked for now. */
static bool pull_has_window_locked(struct far_pull *p) FAR_REQUIRES(p->lock)
{
	if (!p->inflight || p->inflight + p->demand + p->extent <= far_pace_window(&p->pace, far_now()))
		return true;
	p->pace.full = true;
	return false;
}

/* Wake a worker if there may be something for it. One that has just ended a fetch looks by itself, and wakes the next
 * when it has found something and there is window left: a wake-up for nothing costs as much as half a fetch near by. */
static void pull_wake_locked(struct far_pull *p) FAR_REQUIRES(p->lock)
{
	if (p->idle && (p->requests || p->run < p->order.n) && pull_has_window_locked(p))
		far_cond_signal(&p->work);
}

void far_pull_demand_begin(struct far_region *r, uint64_t len)
{
	far_mutex_lock(&r->pull->lock);
	r->pull->demand += len;
	far_mutex_unlock(&r->pull->lock);
}

void far_pull_again(struct far_region *r)
{
	struct far_pull *p = r->pull;

	far_mutex_lock(&p->lock);
	p->run = 0;
	p->at = 0;
	pull_wake_locked(p);
	far_mutex_unlock(&p->lock);
}

void far_pull_demand_end(struct far_region *r, uint64_t len, int err)
{
	struct far_pull *p = r->pull;

	far_mutex_lock(&p->lock);
	p->demand -= len;
	if (err) { /* the cursor may have passed it: it is absent again */
		p->run = 0;
		p->at = 0;
	}
	pull_wake_locked(p);
	far_mutex_unlock(&p->lock);
}

/* -------------------------------------------------------------------------------------------------------- workers */

static void *pull_worker(void *arg);
static void pull_request_locked(struct far_pull *p, uint64_t first, uint64_t end) FAR_REQUIRES(p->lock);

static void pull_spawn_locked(struct far_pull *p) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	if (p->threads < p->max_threads && !far_thread_start(&p->thread[p->threads], "far-pull", pull_worker, r))
		p->threads++;
}

static void pull_failed_locked(struct far_pull *p, int err) FAR_REQUIRES(p->lock)
{
	p->error = err;
	p->errors++;
	p->backoff = p->backoff ? far_min(2 * p->backoff, PULL_BACKOFF_MAX) : 100 * FAR_MSEC;
	if (atomic_load_explicit(&p->r->local_error, memory_order_relaxed))
		p->backoff = far_min(p->backoff, FAR_SEC); /* no remote suffers from asking again */
	p->resume = far_now() + p->backoff;
	/* What failed is absent again: walk the order once more from its start. */
	p->run = 0;
	p->at = 0;
}

/* Hooks run with no lock held; `progress` about ten times a second. */
static void pull_report(struct far_region *r)
{
	struct far_status st = FAR_STATUS_INIT;
	uint64_t now = far_now();
	bool due = false;

	if (!r->o.progress)
		return;
	far_mutex_lock(&r->pull->lock);
	if (now - r->pull->progress_at >= 100 * FAR_MSEC || far_chunkmap_local(r->map) == r->bytes) {
		r->pull->progress_at = now;
		due = true;
	}
	far_mutex_unlock(&r->pull->lock);
	if (due) {
		far_region_status(r, &st);
		r->o.progress(r->o.opaque, &st);
	}
}

/* One extent, claimed under the lock, fetched without it. */
static void pull_fetch_locked(struct far_pull *p, uint64_t first, uint64_t end) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	uint64_t n, max = far_max(p->extent >> r->shift, 1), whole = FAR_STAGE >> r->shift;

	if (pull_huge(r) && whole) /* so that what follows is whole huge pages */
		max = max < whole || first % whole ? far_min(max, whole - first % whole) : max / whole * whole;
	struct far_fetch *f = far_chunkmap_claim(r->map, first, far_min(end - first, max), &n);

	if (!f) {
		if (n)
			pull_failed_locked(p, -ENOMEM);
		return; /* somebody was faster */
	}
	uint64_t len = n << r->shift, began = far_now();
	p->inflight += len;
	if (p->idle)
		pull_wake_locked(p);
	else if (pull_has_window_locked(p))
		pull_spawn_locked(p);
	far_mutex_unlock(&p->lock);

	uint64_t old = far_deadline_limit(began + r->o.deadline_ms * FAR_MSEC);
	int err = far_cache_fetch(r, f, first, n, UINT64_MAX, FAR_BULK);
	far_deadline_restore(old);
	pull_report(r);

	far_mutex_lock(&p->lock);
	p->inflight -= len;
	if (err) {
		pull_failed_locked(p, err);
		if (far_evict_kept(r, first))
			pull_request_locked(p, first, first + n);
		far_cond_broadcast(&p->progress);
	} else {
		p->error = 0;
		p->backoff = 0;
		pull_sample_locked(p, len, began);
	}
}

static void pull_idle_locked(struct far_pull *p, uint64_t until) FAR_REQUIRES(p->lock)
{
	p->idle++;
	far_cond_wait_until(&p->work, &p->lock, until);
	p->idle--;
}

static void *pull_worker(void *arg)
{
	struct far_region *r = arg;
	struct far_pull *p = r->pull;
	uint64_t first, end;

	far_mutex_lock(&p->lock);
	while (!p->stopped) {
		if (p->resume > far_now())
			pull_idle_locked(p, p->resume);
		else if (!pull_next_locked(p, &first, &end))
			pull_idle_locked(p, FAR_NEVER);
		else if (!pull_has_room(r, first, p->extent))
			pull_idle_locked(p, far_now() + FAR_SEC);
		else if (pull_probing_locked(p) || !pull_has_window_locked(p))
			pull_idle_locked(p, FAR_NEVER);
		else
			pull_fetch_locked(p, first, end);
	}
	far_mutex_unlock(&p->lock);
	return NULL;
}

/* ------------------------------------------------------------------------------------------------ requests, prefetch */

static void pull_request_locked(struct far_pull *p, uint64_t first, uint64_t end) FAR_REQUIRES(p->lock)
{
	struct pull_request *q = malloc(sizeof *q);

	if (!q || !p->max_threads || first >= end) {
		free(q);
		return; /* a wish, not a duty */
	}
	*q = (struct pull_request){ p->requests, first, end };
	p->requests = q;
	if (p->idle)
		far_cond_signal(&p->work);
}

void far_pull_missed(struct far_region *r, uint64_t i)
{
	if (!r->pull->max_threads || !wanted(r, i))
		return;
	far_mutex_lock(&r->pull->lock);
	pull_request_locked(r->pull, i, i + 1);
	far_mutex_unlock(&r->pull->lock);
}

void far_region_prefetch(struct far_region *r, uint64_t off, uint64_t len)
{
	if (off >= r->bytes || !len)
		return;
	len = far_min(len, r->bytes - off);
	far_mutex_lock(&r->pull->lock);
	pull_request_locked(r->pull, off >> r->shift, ((off + len - 1) >> r->shift) + 1);
	far_mutex_unlock(&r->pull->lock);
}

/* The stride that more than half of the last faults have in common (Boyer and Moore's vote), or 0. */
static int64_t pull_stride_locked(struct far_pull *p) FAR_REQUIRES(p->lock)
{
	unsigned n = p->n_fault < PULL_FAULTS ? p->n_fault : PULL_FAULTS, votes = 0, count = 0;
	int64_t best = 0;

	for (int round = 0; round < 2; round++)
		for (unsigned k = 1; k < n; k++) {
			int64_t d = (int64_t)(p->fault[(p->n_fault - k) % PULL_FAULTS] -
					      p->fault[(p->n_fault - k - 1) % PULL_FAULTS]);
			if (round)
				count += d == best;
			else if (!votes)
				best = d, votes = 1;
			else
				votes += d == best ? 1 : -1u;
		}
	return n >= 3 && 2 * count > n - 1 ? best : 0;
}

/* Ask for `ahead` steps of the stride from p->next on; a read of the one in the middle asks again. */
static void pull_ahead_locked(struct far_pull *p) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	uint64_t chunks = far_chunkmap_chunks(r->map), i = p->next, middle = PULL_NO_TRIGGER;

	if (p->stride == 1) {
		uint64_t end = far_min(i + p->ahead, chunks);
		pull_request_locked(p, i, end);
		middle = i < end ? i : PULL_NO_TRIGGER;
		i = end;
	} else {
		for (uint64_t k = 0; k < p->ahead && i < chunks; k++, i += (uint64_t)p->stride) {
			pull_request_locked(p, i, i + 1);
			middle = k == 0 ? i : middle;
		}
	}
	p->next = i;
	atomic_store_explicit(&p->trigger, middle, memory_order_relaxed);
}

void far_pull_fault(struct far_region *r, uint64_t i, uint64_t n)
{
	struct far_pull *p = r->pull;

	if (!p->max_threads)
		return;
	far_mutex_lock(&p->lock);
	/* A sequential reader that asks for several chunks at once counts as that many steps of one. */
	for (uint64_t k = 0; k < far_min(n, PULL_FAULTS); k++)
		p->fault[p->n_fault++ % PULL_FAULTS] = i + n - far_min(n, PULL_FAULTS) + k;
	int64_t stride = pull_stride_locked(p);
	bool hit = stride && stride == p->stride && i == p->next;
	p->ahead = !stride ? p->ahead / 2 : hit ? far_min(2 * p->ahead, r->ahead_max) : far_max(p->ahead / 2, 1);
	p->stride = stride;
	atomic_store_explicit(&p->trigger, PULL_NO_TRIGGER, memory_order_relaxed);
	if (stride && p->ahead) {
		p->next = i + n - 1 + (uint64_t)stride;
		pull_ahead_locked(p);
	}
	far_mutex_unlock(&p->lock);
}

void far_pull_touched(struct far_region *r, uint64_t i, uint64_t n)
{
	struct far_pull *p = r->pull;
	uint64_t t = atomic_load_explicit(&p->trigger, memory_order_relaxed);

	if (t - i >= n || !atomic_compare_exchange_strong(&p->trigger, &t, PULL_NO_TRIGGER))
		return;
	far_mutex_lock(&p->lock);
	p->ahead = far_min(2 * far_max(p->ahead, 1), r->ahead_max);
	pull_ahead_locked(p);
	far_mutex_unlock(&p->lock);
}

/* -------------------------------------------------------------------------------------------------------- waiting */

void far_pull_progress(struct far_region *r)
{
	struct far_pull *p = r->pull;

	if (!atomic_load(&p->waiters) && far_chunkmap_local(r->map) < atomic_load(&p->want))
		return;
	far_mutex_lock(&p->lock);
	atomic_store(&p->want, FAR_NEVER); /* who goes on waiting says so again */
	far_cond_broadcast(&p->progress);
	far_mutex_unlock(&p->lock);
}

/* Sleep until something moves, or for `longest`. -ETIMEDOUT, -ESHUTDOWN, or the error that the puller met since `errors`. */
static int pull_sleep_locked(struct far_pull *p, uint64_t errors, uint64_t longest) FAR_REQUIRES(p->lock)
{
	uint64_t until = far_deadline();

	if (p->stopped)
		return -ESHUTDOWN;
	if (p->errors != errors && p->error)
		return p->error;
	if (longest == FAR_NEVER || until - far_min(until, far_now()) < longest)
		return far_cond_wait_until(&p->progress, &p->lock, until) ? 0 : -ETIMEDOUT;
	far_cond_wait_until(&p->progress, &p->lock, far_now() + longest);
	return 0;
}

int far_region_wait(struct far_region *r, uint64_t off, uint64_t len)
{
	struct far_pull *p = r->pull;
	int err = 0;

	if (off > r->bytes || len > r->bytes - off)
		return -EINVAL;
	if (!len)
		return 0;
	uint64_t i = off >> r->shift, end = ((off + len - 1) >> r->shift) + 1;
	if (!p->max_threads) { /* nobody pulls: fetch it here */
		for (; i < end && !err; i += !err && far_chunkmap_is_local(r->map, i))
			if (!far_chunkmap_is_local(r->map, i))
				err = far_cache_need(r, i, end - i);
		far_evict_trim(r);
		return err;
	}
	far_region_prefetch(r, off, len);
	atomic_fetch_add(&p->waiters, 1);
	far_mutex_lock(&p->lock);
	uint64_t errors = p->errors;
	while (!err) {
		while (i < end && far_chunkmap_is_local(r->map, i))
			i++;
		if (i == end)
			break;
		if (pull_has_room(r, i, p->extent)) {
			if (!p->requests && wanted(r, i)) /* it came and was dropped again before we looked */
				pull_request_locked(p, i, end);
			err = pull_sleep_locked(p, errors, PULL_ASK_AGAIN);
			continue;
		}
		far_mutex_unlock(&p->lock); /* the puller has stopped for want of room: come in at the cost of others */
		err = far_cache_need(r, i, 1);
		i += !err;
		far_evict_trim(r);
		far_mutex_lock(&p->lock);
	}
	far_mutex_unlock(&p->lock);
	atomic_fetch_sub(&p->waiters, 1);
	return err;
}

int far_region_wait_local(struct far_region *r, uint64_t bytes)
{
	struct far_pull *p = r->pull;
	uint64_t want = far_min(bytes, r->bytes);
	int err = 0;

	if (far_chunkmap_local(r->map) < want)
		far_pull_again(r); /* what was evicted by hand is not pulled by itself */
	far_mutex_lock(&p->lock);
	uint64_t errors = p->errors;
	for (;;) {
		/* First said, then looked: far_pull_progress() looks after it has been counted. */
		if (atomic_load(&p->want) > want)
			atomic_store(&p->want, want);
		if (far_chunkmap_local(r->map) >= want || (err = pull_sleep_locked(p, errors, FAR_NEVER)))
			break;
	}
	far_mutex_unlock(&p->lock);
	return err;
}

void far_pull_status(struct far_region *r, struct far_status *st)
{
	struct far_pull *p = r->pull;
	uint64_t now = far_now();

	far_mutex_lock(&p->lock);
	uint64_t span = now - p->show_at;
	if (span > 2 * FAR_SEC)
		st->pull_rate = (double)p->show_bytes * (double)FAR_SEC / (double)span;
	else if (p->show_rate == 0 && span > 50 * FAR_MSEC)
		st->pull_rate = (double)p->show_bytes * (double)FAR_SEC / (double)span;
	else
		st->pull_rate = p->show_rate;
	st->window = p->pace.window;
	far_mutex_unlock(&p->lock);
}

/* ---------------------------------------------------------------------------------------------------- open, close */

int far_pull_open(struct far_region *r, struct far_error *err)
{
	struct far_pull *p = calloc(1, sizeof *p);
	int e;

	if (!p)
		return far_error_set(err, ENOMEM, "no memory for the puller");
	e = r->o.priority ? far_order_by(&p->order, r->o.priority, r->o.opaque, r->bytes, r->shift)
			  : far_order_parse(&p->order, r->o.order, r->bytes, r->shift, err);
	if (e) {
		free(p);
		return r->o.priority ? far_error_set(err, -e, "no memory for the pull order") : e;
	}
	if (r->ahead_only && !r->o.priority)
		p->order.n -= p->order.n > 0; /* what nobody named */
	far_mutex_init(&p->lock);
	far_cond_init(&p->work);
	far_cond_init(&p->progress);
	p->r = r;
	r->pull = p;
	far_mutex_lock(&p->lock);
	p->max_threads = r->o.pull_workers < 0 ? PULL_THREADS_MAX
					       : (unsigned)far_min((uint64_t)r->o.pull_workers, PULL_THREADS_MAX);
	p->extent = far_max(pull_is_memory(r) ? FAR_STAGE : PULL_EXTENT_FIRST, r->chunk);
	if (far_facts(r->remote)->max_io)
		p->extent = far_max(r->chunk, far_min(p->extent, far_facts(r->remote)->max_io));
	far_pace_init(&p->pace, r->o.window ? r->o.window : 4 * p->extent, r->o.window != 0, PULL_THREADS_MAX * 4 * FAR_MIB,
		      far_now());
	p->trigger = PULL_NO_TRIGGER;
	p->want = FAR_NEVER;
	p->show_at = far_now();
	pull_spawn_locked(p);
	bool none = p->max_threads && !p->threads;
	far_mutex_unlock(&p->lock);
	if (none) { /* whoever waits for the pull would wait for ever */
		far_pull_close(r);
		return far_error_set(err, EAGAIN, "cannot start the puller's first thread: %s", far_strerror(EAGAIN));
	}
	return 0;
}

void far_pull_stop(struct far_region *r)
{
	far_mutex_lock(&r->pull->lock);
	r->pull->stopped = true;
	far_cond_broadcast(&r->pull->work);
	far_cond_broadcast(&r->pull->progress);
	far_mutex_unlock(&r->pull->lock);
}

void far_pull_join(struct far_region *r) FAR_NO_TSA
{
	for (unsigned k = 0; r->pull && k < r->pull->threads; k++) /* no new ones: it is stopped */
		far_thread_join(&r->pull->thread[k]);
}

void far_pull_close(struct far_region *r) FAR_NO_TSA
{
	struct far_pull *p = r->pull;

	if (!p)
		return;
	while (p->requests) {
		struct pull_request *q = p->requests;
		p->requests = q->next;
		free(q);
	}
	far_order_fini(&p->order);
	far_cond_fini(&p->work);
	far_cond_fini(&p->progress);
	far_mutex_fini(&p->lock);
	free(p);
	r->pull = NULL;
}
