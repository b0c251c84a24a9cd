/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The pusher: workers that go round the region and write what is dirty to the remote, neighbours joined, and the flush
 * that waits for them.
 *
 * A flush takes a stamp, and a list of the chunks that hold news at that moment: one bit a chunk in `listed`, and a
 * second one in `later` for those that only a push begun after the stamp may take off. A chunk that is PUSHING at the
 * stamp and not REDIRTY was written before its push began, so the end of that push takes it off. Writes after the stamp
 * do not lengthen the list, so a flush ends under endless writes. It fails as soon as a push of a listed chunk fails;
 * the chunk stays dirty, so the next flush lists it again.
 *
 * Invariants, under lock: pushes begin and end (chunk map included) while it is held, so that a flush sees each chunk
 * either before or after; `began` of a push is a number from the same sequence as the stamps.
 */
#include "region/region_int.h"

#include "base/io.h"
#include "base/pool.h"

#include <stdlib.h>

#define PUSH_THREADS_MAX 32
#define PUSH_EXTENT_MAX (2 * FAR_MIB)
#define PUSH_BACKOFF_MAX (10 * FAR_SEC)

struct push_flush {
	struct push_flush *next;
	struct far_region *r;
	uint64_t *listed, *later; /* bit i: chunk i */
	uint64_t left, stamp;
	int err;
};

struct far_push {
	struct far_region *r;
	unsigned max_threads; /* fixed after open */

	_Atomic bool sleeping; /* nothing is dirty, the leader sleeps without a limit */

	struct far_mutex lock;
	struct far_cond work, done; /* for workers; for flushes and throttled writers */
	struct far_thread thread[PUSH_THREADS_MAX] FAR_GUARDED_BY(lock);
	unsigned threads FAR_GUARDED_BY(lock), busy FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
	bool round FAR_GUARDED_BY(lock);  /* the cursor is on its way */
	bool leader FAR_GUARDED_BY(lock); /* one idle worker watches the clock, the others only wait */
	uint64_t cursor FAR_GUARDED_BY(lock), next_round FAR_GUARDED_BY(lock), backoff FAR_GUARDED_BY(lock);
	uint64_t sequence FAR_GUARDED_BY(lock);
	unsigned throttled FAR_GUARDED_BY(lock);
	struct push_flush *flushes FAR_GUARDED_BY(lock);
	uint64_t pushes FAR_GUARDED_BY(lock), flushed FAR_GUARDED_BY(lock); /* that ended; that a remote flush covered */
	uint64_t extent FAR_GUARDED_BY(lock), fastest FAR_GUARDED_BY(lock);
};

/* ------------------------------------------------------------------------------------------------------- one push */

static void push_round_locked(struct far_push *p) FAR_REQUIRES(p->lock)
{
	p->round = true;
	p->cursor = 0;
	far_cond_broadcast(&p->work);
}

static void push_listed_end_locked(struct far_push *p, uint64_t first, uint64_t n, uint64_t began, int err)
	FAR_REQUIRES(p->lock)
{
	for (struct push_flush *f = p->flushes; f; f = f->next)
		for (uint64_t i = first; i < first + n; i++) {
			uint64_t bit = (uint64_t)1 << (i % 64);
			if (!(f->listed[i / 64] & bit) || ((f->later[i / 64] & bit) && began <= f->stamp))
				continue;
			if (err) {
				f->err = err;
			} else {
				f->listed[i / 64] &= ~bit;
				f->left--;
			}
		}
}

/* Pieces that take long are cut smaller, so that throttled writers go on smoothly; a fast path gets larger ones. */
static void push_resize_locked(struct far_push *p, uint64_t took) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	uint64_t io = far_facts(r->remote)->max_io;
	uint64_t most = io ? far_min(io, PUSH_EXTENT_MAX) : PUSH_EXTENT_MAX;

	p->fastest = p->fastest ? far_min(p->fastest + p->fastest / 64, took) : took;
	if (took > 2 * p->fastest + 60 * FAR_MSEC && p->extent / 2 >= r->chunk)
		p->extent /= 2;
	else if (took < 2 * p->fastest + 20 * FAR_MSEC && p->extent * 2 <= most)
		p->extent *= 2;
}

/* Read the run from the local store, write it to the remote. */
static int push_move(struct far_region *r, uint64_t first, uint64_t n, unsigned flags)
{
	uint64_t off = first << r->shift, len = far_min(n << r->shift, r->bytes - off);
	char *buf = far_buf_get((size_t)len);
	int err = buf ? far_read(r->local, off, buf, (size_t)len, 0) : -ENOMEM;

	for (uint64_t i = first; r->persist && !err && i < first + n; i++)
		far_persist_sum(r->persist, i, buf + ((i - first) << r->shift), (size_t)far_chunkmap_len(r->map, i));
	if (!err) {
		atomic_fetch_add_explicit(&r->inflight, len, memory_order_relaxed);
		err = far_is_zero(buf, (size_t)len) ? far_zero(r->remote, off, len, flags)
						    : far_write(r->remote, off, buf, (size_t)len, flags);
		atomic_fetch_sub_explicit(&r->inflight, len, memory_order_relaxed);
		if (err)
			far_region_remote_failed(r, err);
		else
			atomic_fetch_add_explicit(&r->pushed, len, memory_order_relaxed);
	}
	far_buf_put(buf, (size_t)len);
	return err;
}

/* Push the next run of the round. False: the round has nothing more to begin. */
static bool push_step_locked(struct far_push *p) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	uint64_t first, n, began;
	bool partial;
	int err = 0;

	if (!far_chunkmap_push_begin(r->map, &p->cursor, far_max(p->extent >> r->shift, 1), &first, &n, &partial))
		return false;
	p->busy++;
	unsigned flags = p->flushes || p->throttled ? 0 : FAR_BULK;
	uint64_t start = far_now(), old = far_deadline_limit(start + r->o.deadline_ms * FAR_MSEC);
	if (partial) { /* half-written: fetch the rest first */
		far_mutex_unlock(&p->lock);
		while (!err && !far_chunkmap_is_local(r->map, first) && far_chunkmap_state(r->map, first) != FAR_ABSENT)
			err = far_cache_need(r, first, 1);
		far_mutex_lock(&p->lock);
		n = err || far_chunkmap_push_begin_one(r->map, first);
	}
	began = ++p->sequence;
	if (n && !err) {
		far_mutex_unlock(&p->lock);
		start = far_now();
		err = push_move(r, first, n, flags);
		far_mutex_lock(&p->lock);
		far_persist_fresh(r->persist, first, n);
		far_chunkmap_push_end(r->map, first, n, !err);
	}
	far_deadline_restore(old);
	p->busy--;
	if (n) {
		push_listed_end_locked(p, first, n, began, err);
		p->pushes++;
	}
	if (err) {
		p->backoff = p->backoff ? far_min(2 * p->backoff, PUSH_BACKOFF_MAX) : FAR_SEC;
		p->next_round = far_now() + p->backoff;
		p->round = false; /* the rest would fail as well */
	} else if (n) {
		p->backoff = 0;
		push_resize_locked(p, far_now() - start);
	}
	far_cond_broadcast(&p->done);
	return true;
}

/* -------------------------------------------------------------------------------------------------------- workers */

static void push_sleep_locked(struct far_push *p) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;

	if (p->leader) {
		far_cond_wait(&p->work, &p->lock);
		return;
	}
	p->leader = true;
	if (far_chunkmap_dirty(r->map)) {
		far_cond_wait_until(&p->work, &p->lock, p->next_round);
	} else {
		/* Pairs with far_push_dirtied(): it sees the flag, or we see the dirty bytes. */
		atomic_store_explicit(&p->sleeping, true, memory_order_seq_cst);
		if (!far_chunkmap_dirty(r->map))
			far_cond_wait(&p->work, &p->lock);
		atomic_store_explicit(&p->sleeping, false, memory_order_relaxed);
	}
	p->leader = false;
}

static void *push_worker(void *arg)
{
	struct far_region *r = arg;
	struct far_push *p = r->push;

	far_mutex_lock(&p->lock);
	while (!p->stopped) {
		if (p->round) {
			if (push_step_locked(p))
				continue;
			if (p->round)
				p->next_round = far_now() + r->o.push_interval_ms * FAR_MSEC;
			p->round = false;
			far_cond_broadcast(&p->work);
		} else if (far_chunkmap_dirty(r->map) && far_now() >= p->next_round) {
			push_round_locked(p);
		} else {
			push_sleep_locked(p);
		}
	}
	far_mutex_unlock(&p->lock);
	return NULL;
}

void far_push_dirtied(struct far_region *r)
{
	struct far_push *p = r->push;

	atomic_thread_fence(memory_order_seq_cst);
	if (!atomic_load_explicit(&p->sleeping, memory_order_seq_cst))
		return;
	far_mutex_lock(&p->lock);
	if (p->next_round < far_now())
		p->next_round = far_now() + r->o.push_interval_ms * FAR_MSEC;
	far_cond_broadcast(&p->work);
	far_mutex_unlock(&p->lock);
}

int far_push_throttle(struct far_region *r, uint64_t len, unsigned flags)
{
	struct far_push *p = r->push;
	int err = 0;

	if (far_chunkmap_dirty(r->map) + len <= r->o.dirty_max)
		return 0;
	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	far_mutex_lock(&p->lock);
	p->throttled++;
	/* A write longer than the whole budget goes on when nothing else is dirty. */
	while (!err && far_chunkmap_dirty(r->map) && far_chunkmap_dirty(r->map) + len > r->o.dirty_max) {
		if (p->stopped)
			err = -ESHUTDOWN;
		else if (!p->round && far_now() >= p->next_round - far_min(p->next_round, p->backoff ? 0 : FAR_NEVER))
			push_round_locked(p);
		else if (p->max_threads == 0 && push_step_locked(p))
			continue;
		else if (!far_cond_wait_until(&p->done, &p->lock, far_min(far_deadline(), far_now() + 100 * FAR_MSEC)) &&
			 far_now() >= far_deadline())
			err = -ETIMEDOUT;
	}
	p->throttled--;
	far_mutex_unlock(&p->lock);
	return err;
}

/* ---------------------------------------------------------------------------------------------------------- flush */

static void push_list(void *opaque, uint64_t i, enum far_chunk s)
{
	struct push_flush *f = opaque;
	uint64_t bit = (uint64_t)1 << (i % 64);

	f->listed[i / 64] |= bit;
	if (s != FAR_PUSHING)
		f->later[i / 64] |= bit;
	f->left++;
}

/* Wait until the list is empty. Without workers this thread pushes. */
static int push_wait_locked(struct far_push *p, struct push_flush *f) FAR_REQUIRES(p->lock)
{

	while (f->left && !f->err) {
		if (p->stopped)
			return -ESHUTDOWN;
		if (far_now() >= far_deadline())
			return -ETIMEDOUT;
		if (!p->round)
			push_round_locked(p);
		if (p->max_threads == 0 && push_step_locked(p))
			continue;
		if (p->max_threads == 0)
			p->round = false;
		if (f->left && !f->err && (p->busy || p->max_threads))
			far_cond_wait_until(&p->done, &p->lock, far_min(far_deadline(), far_now() + FAR_SEC));
	}
	return f->err;
}

static int push_remote_flush(struct far_region *r)
{
	struct far_push *p = r->push;

	far_mutex_lock(&p->lock);
	uint64_t covers = p->pushes;
	bool needed = covers > p->flushed;
	far_mutex_unlock(&p->lock);
	if (!needed)
		return 0;
	int err = far_flush(r->remote);
	if (err) {
		far_region_remote_failed(r, err);
		return err;
	}
	far_mutex_lock(&p->lock);
	p->flushed = far_max(p->flushed, covers);
	far_mutex_unlock(&p->lock);
	return 0;
}

bool far_push_is_unstable(struct far_region *r, uint64_t i)
{
	far_mutex_lock(&r->push->lock);
	bool unstable = r->push->pushes > r->push->flushed;
	far_mutex_unlock(&r->push->lock);
	return unstable;
}

int far_push_flush(struct far_region *r)
{
	struct far_push *p = r->push;
	size_t words = (size_t)(far_chunkmap_chunks(r->map) / 64 + 1);
	struct push_flush f = { .r = r }, **at;

	f.listed = calloc(words, sizeof *f.listed);
	f.later = calloc(words, sizeof *f.later);
	if (!f.listed || !f.later) {
		free(f.listed);
		free(f.later);
		return -ENOMEM;
	}
	far_mutex_lock(&p->lock);
	f.stamp = ++p->sequence;
	far_chunkmap_each_dirty(r->map, push_list, &f);
	f.next = p->flushes;
	p->flushes = &f;
	if (f.left)
		push_round_locked(p); /* from the start, whatever the cursor has passed */
	int err = push_wait_locked(p, &f);
	for (at = &p->flushes; *at != &f; at = &(*at)->next)
		;
	*at = f.next;
	far_mutex_unlock(&p->lock);
	free(f.listed);
	free(f.later);
	return err ? err : push_remote_flush(r);
}

/* ---------------------------------------------------------------------------------------------------- open, close */

int far_push_open(struct far_region *r)
{
	struct far_push *p = calloc(1, sizeof *p);
	int err = 0;

	if (!p)
		return -ENOMEM;
	far_mutex_init(&p->lock);
	far_cond_init(&p->work);
	far_cond_init(&p->done);
	p->r = r;
	r->push = p;
	far_mutex_lock(&p->lock);
	p->extent = far_max(256 * FAR_KIB, r->chunk);
	if (r->writable)
		p->max_threads = r->o.push_workers < 0 ? 8 : (unsigned)far_min((uint64_t)r->o.push_workers, PUSH_THREADS_MAX);
	while (!err && p->threads < p->max_threads) {
		err = far_thread_start(&p->thread[p->threads], "far-push", push_worker, r);
		p->threads += !err;
	}
	far_mutex_unlock(&p->lock);
	return err; /* the caller stops and closes */
}

void far_push_stop(struct far_region *r)
{
	far_mutex_lock(&r->push->lock);
	r->push->stopped = true;
	far_cond_broadcast(&r->push->work);
	far_cond_broadcast(&r->push->done);
	far_mutex_unlock(&r->push->lock);
}

void far_push_join(struct far_region *r) FAR_NO_TSA
{
	for (unsigned k = 0; r->push && k < r->push->threads; k++)
		far_thread_join(&r->push->thread[k]);
}

void far_push_close(struct far_region *r) FAR_NO_TSA
{
	struct far_push *p = r->push;

	if (!p)
		return;
	FAR_ASSERT(!p->flushes);
	far_cond_fini(&p->work);
	far_cond_fini(&p->done);
	far_mutex_fini(&p->lock);
	free(p);
	r->push = NULL;
}
