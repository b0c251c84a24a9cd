/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The pusher: workers that go round the region and write what is dirty to the remote, neighbours joined. flush.c has the
 * flush that waits for them, and what happens between a push and the flush of the remote that makes it safe.
 *
 * A round walks the region once from its start. It ends early when a push fails, with a growing pause before the next; a
 * chunk that the local store cannot read fails alone. Workers that find nothing to do sleep; one of them, the leader,
 * watches the clock. A fenced region pushes nothing any more.
 *
 * `oldest`: when a round that began at T has ended whole, all that was dirty at T is on the remote, so what is dirty now
 * has become so after T.
 */
#include "region/push_int.h"

#include "base/io.h"
#include "base/pool.h"
#include "region/partial.h"

#include <stdlib.h>

#define PUSH_EXTENT_MAX (2 * FAR_MIB)
#define PUSH_ZERO_MAX (64 * FAR_MIB)
#define PUSH_RANGES_MAX 4 /* calls for a half-written chunk; more: fetch the rest and make one */
#define PUSH_BACKOFF_MAX (10 * FAR_SEC)

struct push_job {
	uint64_t first, n, began;
	uint64_t more, more_began; /* chunks of zeros behind them that were claimed as well */
	bool local;                /* it was the local store that failed */
};

/* ---------------------------------------------------------------------------------------------------------- rounds */

void far_push_round_locked(struct far_push *p)
{
	struct push_round *g = &p->rounds[++p->n_round % 2];

	p->round = true;
	p->cursor = 0;
	if (!g->busy) /* else it goes on being the older one */
		g->began = far_now();
	g->ended = false;
	g->whole = true;
	far_cond_broadcast(&p->work);
}

/* Nothing dirty may be left, or nothing that is older than a round that has ended. */
static void push_older_locked(struct far_push *p, const struct push_round *g) FAR_REQUIRES(p->lock)
{
	uint64_t old = atomic_load_explicit(&p->oldest, memory_order_relaxed), none = 0;

	if (!far_chunkmap_dirty(p->r->map)) {
		/* Pairs with far_push_dirtied(): it finds 0, or we find the dirty bytes. */
		atomic_store_explicit(&p->oldest, 0, memory_order_seq_cst);
		if (far_chunkmap_dirty(p->r->map))
			atomic_compare_exchange_strong(&p->oldest, &none, far_now());
	} else if (g->ended && g->whole && !g->busy && old && old < g->began) {
		atomic_compare_exchange_strong(&p->oldest, &old, g->began);
	}
}

static void push_round_ended_locked(struct far_push *p) FAR_REQUIRES(p->lock)
{
	struct push_round *g = &p->rounds[p->n_round % 2];

	if (p->round) {
		p->next_round = far_now() + p->r->o.push_interval_ms * FAR_MSEC;
		g->ended = true;
		push_older_locked(p, g);
	}
	p->round = false;
	far_cond_broadcast(&p->work);
}

/* -------------------------------------------------------------------------------------------------------- one push */

void far_push_refused(struct far_region *r, int err)
{
	far_region_remote_failed(r, err);
	if (err != -ESTALE || atomic_load_explicit(&r->fenced, memory_order_relaxed))
		return;
	far_log(FAR_LOG_ERROR, "the remote takes no more changes from here: somebody else owns the region now; %" PRIu64
		" KiB that it lacks stay in the local store", far_chunkmap_dirty(r->map) / FAR_KIB);
	far_region_fence(r);
}

/* Pieces that take long are cut smaller, so that throttled writers go on smoothly; a fast path gets larger ones. None may
 * come near the deadline of one piece, however fast the first ones seemed. */
static void push_resize_locked(struct far_push *p, uint64_t took, bool zeros) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	uint64_t limit = r->o.deadline_ms * FAR_MSEC;
	uint64_t io = far_facts(r->remote)->max_io;
	uint64_t most = zeros ? PUSH_ZERO_MAX : io ? far_min(io, PUSH_EXTENT_MAX) : PUSH_EXTENT_MAX;
	uint64_t *extent = zeros ? &p->zero_extent : &p->extent;

	p->fastest = p->fastest ? far_min(p->fastest + p->fastest / 64, took) : took;
	if (took > far_min(2 * p->fastest + 60 * FAR_MSEC, limit / 4) && *extent / 2 >= r->chunk)
		*extent /= 2;
	else if (took < far_min(2 * p->fastest + 20 * FAR_MSEC, limit / 8) && *extent * 2 <= most)
		*extent *= 2;
}

/* From the local store, what is being pushed. */
static int push_read(struct far_region *r, uint64_t off, char *buf, size_t len)
{
	if (r->memory.self)
		r->memory.arm(r->memory.self, off, len);
	int err = far_read(r->local, off, buf, len, 0);
	if (!err && r->memory.self)
		r->memory.pushed(r->memory.self, off, buf, len);
	return err;
}

static bool push_reads_zero(struct far_region *r, uint64_t i, char *buf)
{
	size_t len = (size_t)far_chunkmap_len(r->map, i);

	if (push_read(r, i << r->shift, buf, len) || !far_is_zero(buf, len))
		return false;
	far_persist_sum(r->persist, i, buf, len);
	return true;
}

/* The job is all zeros: claim what follows it as long as that is, too, so that discarding a large range takes few calls. */
static void push_more_zeros(struct far_push *p, struct push_job *j, char *buf)
{
	struct far_region *r = p->r;
	uint64_t next = j->first + j->n, n = 0;

	far_mutex_lock(&p->lock);
	uint64_t most = p->zero_extent >> r->shift;
	j->more_began = ++p->sequence;
	while (j->n + n < most && next + n < far_chunkmap_chunks(r->map) && far_chunkmap_push_begin_one(r->map, next + n))
		n++;
	far_mutex_unlock(&p->lock);
	while (j->more < n && push_reads_zero(r, next + j->more, buf))
		j->more++;
	if (j->more == n)
		return;
	far_mutex_lock(&p->lock);
	far_chunkmap_push_end(r->map, next + j->more, n - j->more, false);
	p->cursor = far_min(p->cursor, next + j->more);
	far_mutex_unlock(&p->lock);
}

/* Read the run from the local store, write it to the remote. */
static int push_move(struct far_push *p, struct push_job *j, unsigned flags)
{
	struct far_region *r = p->r;
	uint64_t off = j->first << r->shift, len = far_min(j->n << r->shift, r->bytes - off);
	char *buf = far_buf_get((size_t)len);
	int err = buf ? push_read(r, off, buf, (size_t)len) : -ENOMEM;

	j->local = err && err != -ENOMEM;
	for (uint64_t i = j->first; r->persist && !err && i < j->first + j->n; i++)
		far_persist_sum(r->persist, i, buf + ((i - j->first) << r->shift), (size_t)far_chunkmap_len(r->map, i));
	if (!err) {
		bool zero = far_is_zero(buf, (size_t)len);
		if (zero)
			push_more_zeros(p, j, buf);
		uint64_t all = far_min((j->n + j->more) << r->shift, r->bytes - off);
		atomic_fetch_add_explicit(&r->inflight, all, memory_order_relaxed);
		err = zero ? far_zero(r->remote, off, all, flags & ~(unsigned)FAR_FLUSH)
			   : far_write(r->remote, off, buf, (size_t)len, flags);
		if (zero && !err && (flags & FAR_FLUSH))
			err = far_flush(r->remote);
		if (err == -EREMOTEIO)
			err = 0; /* done, see flush.c */
		atomic_fetch_sub_explicit(&r->inflight, all, memory_order_relaxed);
		if (err)
			far_push_refused(r, err);
		else
			atomic_fetch_add_explicit(&r->pushed, all, memory_order_relaxed);
	}
	far_buf_put(buf, (size_t)len);
	return err;
}

static void push_count_locked(struct far_push *p, uint64_t bytes) FAR_REQUIRES(p->lock)
{
	uint64_t now = far_now();

	p->show_bytes += bytes;
	if (now - p->show_at >= FAR_SEC) {
		p->show_rate = (double)p->show_bytes * (double)FAR_SEC / (double)(now - p->show_at);
		p->show_at = now;
		p->show_bytes = 0;
	}
}

/* Carry out a job whose chunks are PUSHING, and end it. */
static int push_job_locked(struct far_push *p, struct push_job *j, unsigned flags) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	struct far_push_last last;

	far_push_last_begin_locked(p, j->first, j->n, j->began, &last);
	far_mutex_unlock(&p->lock);
	uint64_t before = far_push_instance(r), start = far_now();
	int err = push_move(p, j, last.flush ? flags | FAR_FLUSH : flags);
	uint64_t after = far_push_instance(r), took = far_now() - start;
	if (j->local && j->n == 1)
		far_cache_unreadable(r, j->first, err, true);
	far_mutex_lock(&p->lock);
	if (j->local && j->n > 1) {
		/* One of them cannot be read: each by itself, so that the others get through. */
		int first_err = 0;
		far_push_last_end_locked(p, &last, before, after, err);
		for (uint64_t k = 0; k < j->n; k++) {
			struct push_job one = { .first = j->first + k, .n = 1, .began = j->began };
			err = push_job_locked(p, &one, flags);
			first_err = first_err ? first_err : err;
			j->local = !err || one.local;
		}
		return first_err;
	}
	far_push_ended_locked(p, j->first, j->n, j->began, before, after, err);
	if (j->more)
		far_push_ended_locked(p, j->first + j->n, j->more, j->more_began, before, after, err);
	last.mine = j->more ? 2 : 1;
	far_push_last_end_locked(p, &last, before, after, err);
	if (!err)
		push_count_locked(p, (j->n + j->more) << r->shift);
	if (!err || err == -ETIMEDOUT)
		push_resize_locked(p, took, j->more > 0);
	return err;
}

/* Write them together; the last one by itself and after the others, if it carries a flush. */
static int push_list(struct far_region *r, struct far_io *io, size_t n, unsigned flags, bool flush)
{
	struct far_io *last = &io[n - 1];
	uint64_t len = 0;
	int err = 0;

	for (size_t k = 0; k < n; k++)
		len += io[k].len;
	atomic_fetch_add_explicit(&r->inflight, len, memory_order_relaxed);
	if (n > flush)
		err = far_write_many(r->remote, io, n - flush, flags);
	if (!err && flush)
		err = far_write(r->remote, last->off, last->buf, last->len, flags | FAR_FLUSH);
	if (err == -EREMOTEIO)
		err = 0; /* done, see flush.c */
	atomic_fetch_sub_explicit(&r->inflight, len, memory_order_relaxed);
	if (err)
		far_push_refused(r, err);
	else
		atomic_fetch_add_explicit(&r->pushed, len, memory_order_relaxed);
	return err;
}

/* What is here of a half-written chunk, a few ranges at a time; the last one with the flush, if it carries one. */
static int push_ranges(struct far_region *r, struct push_job *j, const struct far_partial *e, unsigned flags, bool flush)
{
	uint64_t base = j->first << r->shift, from = 0, to = 0;
	bool more = far_partial_present(e, &from, &to);
	int err = 0;

	while (more && !err) {
		struct far_io io[PUSH_RANGES_MAX];
		size_t n = 0;
		while (more && !err && n < PUSH_RANGES_MAX) {
			struct far_io *one = &io[n++];
			*one = (struct far_io){ .off = base + from, .len = (size_t)(to - from), .buf = far_buf_get((size_t)(to - from)) };
			err = one->buf ? push_read(r, one->off, one->buf, one->len) : -ENOMEM;
			j->local = err && err != -ENOMEM;
			from = to;
			more = far_partial_present(e, &from, &to);
		}
		err = err ? err : push_list(r, io, n, flags, flush && !more);
		while (n--)
			far_buf_put(io[n].buf, io[n].len);
	}
	if (j->local)
		far_cache_unreadable(r, j->first, err, true);
	return err;
}

static unsigned push_count_ranges(const struct far_partial *e)
{
	unsigned n = 0;

	for (uint64_t from = 0, to; far_partial_present(e, &from, &to); from = to)
		n++;
	return n;
}

/* Half-written, and the remote takes parts: what is here goes there as it is, if that is few calls, or if there is no room
 * for the rest. False: it is to be made whole. */
static bool push_partial_locked(struct far_push *p, struct push_job *j, unsigned flags, int *err) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	bool full = atomic_load_explicit(&r->local_error, memory_order_relaxed);
	struct far_partial *e;
	struct far_push_last last;

	if (far_facts(r->remote)->chunk || !far_chunkmap_push_begin_partial(r->map, j->first, full, &e))
		return false;
	if (!full && push_count_ranges(e) > PUSH_RANGES_MAX) {
		far_chunkmap_push_end_partial(r->map, j->first, false);
		free(e);
		return false;
	}
	j->n = 1;
	j->began = ++p->sequence;
	far_push_last_begin_locked(p, j->first, 1, j->began, &last);
	far_mutex_unlock(&p->lock);
	uint64_t before = far_push_instance(r);
	*err = push_ranges(r, j, e, flags, last.flush);
	uint64_t after = far_push_instance(r);
	free(e);
	far_mutex_lock(&p->lock);
	far_push_ended_partial_locked(p, j->first, j->began, before, after, *err);
	last.mine = 1;
	far_push_last_end_locked(p, &last, before, after, *err);
	far_mutex_unlock(&p->lock);
	far_pull_missed(r, j->first);
	far_mutex_lock(&p->lock);
	return true;
}

/* Half-written: fetch the rest, then push the whole. */
static int push_whole_locked(struct far_push *p, struct push_job *j) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	int err = 0;

	far_mutex_unlock(&p->lock);
	while (!err && !far_chunkmap_is_local(r->map, j->first) && far_chunkmap_has_news(r->map, j->first))
		err = far_cache_need(r, j->first, 1);
	far_mutex_lock(&p->lock);
	j->n = err || far_chunkmap_push_begin_one(r->map, j->first);
	return err;
}

bool far_push_step_locked(struct far_push *p)
{
	struct far_region *r = p->r;
	struct push_job j = { 0 };
	bool partial;
	int err = 0;

	if (atomic_load_explicit(&r->fenced, memory_order_acquire) ||
	    !far_chunkmap_push_begin(r->map, &p->cursor, far_max(p->extent >> r->shift, 1), &j.first, &j.n, &partial))
		return false;
	struct push_round *g = &p->rounds[p->n_round % 2];
	p->busy++;
	g->busy++;
	unsigned flags = p->flushes || p->throttled ? 0 : FAR_BULK;
	uint64_t old = far_deadline_limit(far_now() + r->o.deadline_ms * FAR_MSEC);
	if (!partial || !push_partial_locked(p, &j, flags, &err)) {
		if (partial)
			err = push_whole_locked(p, &j);
		j.began = ++p->sequence;
		if (err)
			far_push_failed_locked(p, j.first, j.began, err);
		else if (j.n)
			err = push_job_locked(p, &j, flags);
	}
	far_deadline_restore(old);
	p->busy--;
	g->busy--;
	if (err && j.local) {
		g->whole = false;
	} else if (err) {
		p->backoff = p->backoff ? far_min(2 * p->backoff, PUSH_BACKOFF_MAX) : FAR_SEC;
		p->next_round = far_now() + p->backoff;
		p->round = false; /* the rest would fail as well */
		g->whole = false;
	} else if (j.n) {
		p->backoff = 0;
	}
	push_older_locked(p, g);
	far_cond_broadcast(&p->done);
	return true;
}

/* -------------------------------------------------------------------------------------------------------- workers */

static void push_sleep_locked(struct far_push *p) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;

	if (p->leader || atomic_load_explicit(&r->fenced, memory_order_acquire)) {
		far_cond_wait(&p->work, &p->lock);
		return;
	}
	p->leader = true;
	uint64_t settle = far_push_settle_at_locked(p);
	if (far_chunkmap_dirty(r->map)) {
		far_cond_wait_until(&p->work, &p->lock, far_min(p->next_round, settle));
	} else {
		/* Pairs with far_push_dirtied(): it sees the flag, or we see the dirty bytes. */
		atomic_store_explicit(&p->sleeping, true, memory_order_seq_cst);
		if (!far_chunkmap_dirty(r->map))
			far_cond_wait_until(&p->work, &p->lock, settle);
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
		if (atomic_load_explicit(&r->fenced, memory_order_acquire)) {
			push_sleep_locked(p);
		} else if (far_push_settle_at_locked(p) <= far_now()) {
			far_push_settle_now_locked(p);
		} else if (p->round) {
			if (!far_push_step_locked(p))
				push_round_ended_locked(p);
		} else if (far_chunkmap_dirty(r->map) && far_now() >= p->next_round) {
			far_push_round_locked(p);
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
	uint64_t none = 0;

	atomic_thread_fence(memory_order_seq_cst);
	if (!atomic_load_explicit(&p->oldest, memory_order_seq_cst))
		atomic_compare_exchange_strong(&p->oldest, &none, far_now());
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
		else if (atomic_load_explicit(&r->fenced, memory_order_acquire))
			err = -ESTALE;
		if (err)
			break;
		if (!p->round && far_now() >= (p->backoff ? p->next_round : 0))
			far_push_round_locked(p);
		if (!p->max_threads && far_push_step_locked(p))
			continue;
		if (!p->max_threads)
			p->round = false;
		if (!far_cond_wait_until(&p->done, &p->lock, far_min(far_deadline(), far_now() + 100 * FAR_MSEC)) &&
		    far_now() >= far_deadline())
			err = -ETIMEDOUT;
	}
	p->throttled--;
	far_mutex_unlock(&p->lock);
	return err;
}

void far_push_fence(struct far_region *r)
{
	far_mutex_lock(&r->push->lock);
	far_cond_broadcast(&r->push->work);
	far_cond_broadcast(&r->push->done);
	far_mutex_unlock(&r->push->lock);
}

void far_push_status(struct far_region *r, struct far_status *st)
{
	struct far_push *p = r->push;
	uint64_t now = far_now(), oldest = atomic_load_explicit(&p->oldest, memory_order_seq_cst);

	far_mutex_lock(&p->lock);
	uint64_t span = now - p->show_at;
	if (span > 2 * FAR_SEC || (p->show_rate == 0 && span > 50 * FAR_MSEC))
		st->push_rate = (double)p->show_bytes * (double)FAR_SEC / (double)span;
	else
		st->push_rate = p->show_rate;
	far_mutex_unlock(&p->lock);
	if (oldest && far_chunkmap_dirty(r->map) && now > oldest)
		st->oldest_dirty_ms = (now - oldest) / FAR_MSEC;
}

/* ---------------------------------------------------------------------------------------------------- open, close */

int far_push_open(struct far_region *r)
{
	struct far_push *p = calloc(1, sizeof *p);

	if (!p || far_unstable_init(&p->unstable, far_chunkmap_chunks(r->map))) {
		free(p);
		return -ENOMEM;
	}
	far_mutex_init(&p->lock);
	far_cond_init(&p->work);
	far_cond_init(&p->done);
	p->r = r;
	r->push = p;
	far_mutex_lock(&p->lock);
	p->extent = p->zero_extent = far_max(256 * FAR_KIB, r->chunk);
	p->show_at = far_now();
	p->next_round = far_now() + r->o.push_interval_ms * FAR_MSEC;
	p->instance = far_push_instance(r);
	if (r->writable)
		p->max_threads = r->o.push_workers < 0 ? 8 : (unsigned)far_min((uint64_t)r->o.push_workers, PUSH_THREADS_MAX);
	far_mutex_unlock(&p->lock);
	return 0;
}

int far_push_start(struct far_region *r)
{
	struct far_push *p = r->push;
	int err = 0;

	if (far_chunkmap_dirty(r->map)) /* from before a restart; since when is not known */
		atomic_store_explicit(&p->oldest, far_now(), memory_order_seq_cst);
	far_mutex_lock(&p->lock);
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
	far_unstable_fini(&p->unstable);
	far_cond_fini(&p->work);
	far_cond_fini(&p->done);
	far_mutex_fini(&p->lock);
	free(p);
	r->push = NULL;
}
