/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The region is cut into pieces on a fixed grid, which both backends' chunks divide. Workers claim from the front:
 *
 *   copy_claim()  takes the next piece; a whole run of pieces at once where the source says that it is zero. What the
 *                 source says is asked for ahead by the one worker that finds it missing (`planning`); others wait.
 *   copy_piece()  reads and writes or compares it, with no lock held.
 *
 * Claims are in order, so after an error or a difference at X nothing behind X is claimed any more, everything before
 * it has been claimed, and the lowest `at` is the first one. A stream is written in order: a worker that has read waits
 * until `turn` is its own piece; the others read on meanwhile, which is what hides the round trips.
 */
#define _GNU_SOURCE
#include "cli/copy_engine.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/pool.h"
#include "base/thread.h"

#include <stdlib.h>
#include <string.h>

#define COPY_EXTENTS 256
#define COPY_ZERO_RUN (FAR_GIB)   /* longest run of zeros in one claim */
#define COPY_GRAIN ((size_t)65536) /* zeros shorter than this are written like data */

struct copy_engine {
	/* fixed */
	struct copy_conf conf;
	uint64_t size;
	struct far_thread *thread;
	unsigned n_threads;
	struct far_mutex lock;
	/* under lock */
	struct far_cond changed;
	uint64_t next FAR_GUARDED_BY(&lock);
	uint64_t turn FAR_GUARDED_BY(&lock);      /* a stream's position */
	bool planning FAR_GUARDED_BY(&lock);
	struct far_extent extent[COPY_EXTENTS] FAR_GUARDED_BY(&lock);
	size_t n_extents FAR_GUARDED_BY(&lock), at_extent FAR_GUARDED_BY(&lock);
	unsigned running FAR_GUARDED_BY(&lock);
	bool stop FAR_GUARDED_BY(&lock);
	struct copy_result res FAR_GUARDED_BY(&lock);
};

struct copy_job {
	uint64_t off, len;
	bool zero;
};

/* The extent that holds `off`, or NULL if the list must be asked for again. */
static const struct far_extent *copy_extent_locked(struct copy_engine *e, uint64_t off) FAR_REQUIRES(&e->lock)
{
	while (e->at_extent < e->n_extents) {
		const struct far_extent *x = &e->extent[e->at_extent];
		if (off >= x->off && off - x->off < x->len)
			return x;
		e->at_extent++;
	}
	return NULL;
}

/* Ask the source what lies behind `off`. The lock is dropped meanwhile. */
static void copy_plan_locked(struct copy_engine *e, uint64_t off) FAR_REQUIRES(&e->lock)
{
	struct far_extent *got = calloc(COPY_EXTENTS, sizeof *got);
	size_t n = 0;

	e->planning = true;
	far_mutex_unlock(&e->lock);
	int r = got ? far_extents(e->conf.src, off, e->size - off, got, COPY_EXTENTS, &n) : -ENOMEM;
	far_mutex_lock(&e->lock);
	e->planning = false;
	e->at_extent = 0;
	e->n_extents = 1;
	/* A source that cannot tell is all data; a real failure comes back with the read. */
	e->extent[0] = (struct far_extent){ off, e->size - off, FAR_EXTENT_DATA };
	if (r == 0 && n > 0) {
		memcpy(e->extent, got, n * sizeof *got);
		e->n_extents = n;
	}
	free(got);
	far_cond_broadcast(&e->changed);
}

static bool copy_claim(struct copy_engine *e, struct copy_job *job)
{
	const struct far_extent *x = NULL;
	uint64_t piece = e->conf.piece;
	bool claimed = false;

	far_mutex_lock(&e->lock);
	while (!e->stop && e->next < e->size && !(x = copy_extent_locked(e, e->next))) {
		if (e->planning)
			far_cond_wait(&e->changed, &e->lock);
		else
			copy_plan_locked(e, e->next);
	}
	if (x && !e->stop) {
		uint64_t end = x->off + x->len;
		*job = (struct copy_job){ e->next, far_min(piece, e->size - e->next), false };
		if (end < e->size)
			end -= end % piece;
		if (x->kind == FAR_EXTENT_ZERO && end > e->next) {
			job->zero = true;
			job->len = far_min(end - e->next, COPY_ZERO_RUN / piece * piece);
		}
		e->next += job->len;
		claimed = true;
	}
	far_mutex_unlock(&e->lock);
	return claimed;
}

static void copy_fail(struct copy_engine *e, int error, uint64_t at, bool differs, bool writing)
{
	far_mutex_lock(&e->lock);
	if ((!e->res.error && !e->res.differs) || at < e->res.at) {
		e->res.error = error;
		e->res.at = at;
		e->res.differs = differs;
		e->res.writing = writing;
	}
	e->stop = true;
	far_cond_broadcast(&e->changed);
	far_mutex_unlock(&e->lock);
}

/* ------------------------------------------------------------------------------------------ destinations */

/* Write buf, leaving out its zeros in whole grains. */
static int copy_put(struct copy_engine *e, uint64_t off, const char *buf, size_t len, uint64_t *zeros)
{
	bool far_away = far_facts(e->conf.dst)->caps & FAR_CAP_REMOTE;
	size_t grain = far_away || far_facts(e->conf.dst)->chunk ? len : far_min(COPY_GRAIN, len);
	size_t from = 0;
	int r = 0;

	if (e->conf.sink)
		return far_write(e->conf.dst, off, buf, len, FAR_BULK);
	for (size_t at = 0; at < len && r == 0;) {
		bool zero = far_is_zero(buf + at, far_min(grain, len - at));
		for (from = at, at = far_min(at + grain, len); at < len; at = far_min(at + grain, len))
			if (far_is_zero(buf + at, far_min(grain, len - at)) != zero)
				break;
		if (!zero)
			r = far_write(e->conf.dst, off + from, buf + from, at - from, FAR_BULK);
		else if (!e->conf.fresh)
			r = far_discard(e->conf.dst, off + from, at - from, FAR_BULK);
		if (zero)
			*zeros += at - from;
	}
	return r;
}

/* A stream: wait for our turn, then write (zeros if buf is NULL). */
static int copy_put_stream(struct copy_engine *e, uint64_t off, const char *buf, uint64_t len)
{
	static const char zeros[65536];
	int r = 0;

	far_mutex_lock(&e->lock);
	while (e->turn != off && !e->stop)
		far_cond_wait(&e->changed, &e->lock);
	bool mine = e->turn == off;
	far_mutex_unlock(&e->lock);
	if (!mine)
		return -ESHUTDOWN;
	if (buf)
		r = far_io_write(e->conf.out_fd, buf, len);
	for (uint64_t left = buf ? 0 : len; left && r == 0; left -= far_min(left, sizeof zeros))
		r = far_io_write(e->conf.out_fd, zeros, far_min(left, sizeof zeros));
	far_mutex_lock(&e->lock);
	e->turn += len;
	far_cond_broadcast(&e->changed);
	far_mutex_unlock(&e->lock);
	return r;
}

static int copy_put_zeros(struct copy_engine *e, const struct copy_job *job)
{
	if (!e->conf.dst)
		return copy_put_stream(e, job->off, NULL, job->len);
	if (e->conf.fresh || e->conf.sink)
		return 0;
	return far_discard(e->conf.dst, job->off, job->len, FAR_BULK);
}

/* ------------------------------------------------------------------------------------------------ pieces */

static void copy_done(struct copy_engine *e, uint64_t len, uint64_t zeros)
{
	far_mutex_lock(&e->lock);
	e->res.done += len;
	e->res.zeros += zeros;
	far_mutex_unlock(&e->lock);
}

static void copy_compare(struct copy_engine *e, const struct copy_job *job, const char *a, char *b)
{
	int r = far_read(e->conf.dst, job->off, b, job->len, FAR_BULK);

	if (r < 0) {
		copy_fail(e, r, job->off, false, true);
	} else if (memcmp(a, b, job->len) != 0) {
		size_t i = 0;
		while (a[i] == b[i])
			i++;
		copy_fail(e, 0, job->off + i, true, false);
	} else {
		copy_done(e, job->len, 0);
	}
}

/* Comparing zeros: dst is read piece by piece, the source's piece is known. */
static void copy_compare_zeros(struct copy_engine *e, const struct copy_job *job, char *a, char *b)
{
	uint64_t piece = e->conf.piece;

	memset(a, 0, piece);
	for (uint64_t at = 0; at < job->len; at += piece) {
		struct copy_job one = { job->off + at, far_min(piece, job->len - at), true };
		far_mutex_lock(&e->lock);
		bool stop = e->stop;
		far_mutex_unlock(&e->lock);
		if (stop)
			return;
		copy_compare(e, &one, a, b);
	}
}

static void copy_piece(struct copy_engine *e, const struct copy_job *job, char *a, char *b)
{
	uint64_t zeros = 0;
	int r;

	if (job->zero && e->conf.verify) {
		copy_compare_zeros(e, job, a, b);
		return;
	}
	if (job->zero) {
		r = copy_put_zeros(e, job);
		zeros = job->len;
	} else {
		r = far_read(e->conf.src, job->off, a, job->len, FAR_BULK);
		if (r < 0) {
			copy_fail(e, r, job->off, false, false);
			return;
		}
		if (e->conf.verify) {
			copy_compare(e, job, a, b);
			return;
		}
		r = e->conf.dst ? copy_put(e, job->off, a, job->len, &zeros)
				: copy_put_stream(e, job->off, a, job->len);
	}
	if (r < 0)
		copy_fail(e, r, job->off, false, true);
	else
		copy_done(e, job->len, zeros);
}

static void *copy_worker(void *arg)
{
	struct copy_engine *e = arg;
	char *a = far_buf_get(e->conf.piece);
	char *b = e->conf.verify ? far_buf_get(e->conf.piece) : NULL;
	struct copy_job job;

	if (!a || (e->conf.verify && !b))
		copy_fail(e, -ENOMEM, 0, false, false);
	while (copy_claim(e, &job))
		copy_piece(e, &job, a, b);
	far_buf_put(a, e->conf.piece);
	far_buf_put(b, e->conf.piece);
	far_mutex_lock(&e->lock);
	e->running--;
	far_cond_broadcast(&e->changed);
	far_mutex_unlock(&e->lock);
	return NULL;
}

int copy_start(const struct copy_conf *conf, struct copy_engine **out, struct far_error *err)
{
	struct copy_engine *e = calloc(1, sizeof *e);
	int r = 0;

	if (!e || !(e->thread = calloc(conf->workers, sizeof *e->thread))) {
		free(e);
		return far_error_set(err, ENOMEM, "there is no memory for %u workers", conf->workers);
	}
	e->conf = *conf;
	e->size = far_size(conf->src);
	far_mutex_init(&e->lock);
	far_cond_init(&e->changed);
	uint64_t pieces = far_max(1, far_div_up(e->size, conf->piece));
	for (unsigned i = 0; i < far_min(conf->workers, pieces) && r == 0; i++) {
		far_mutex_lock(&e->lock);
		e->running++;
		far_mutex_unlock(&e->lock);
		r = far_thread_start(&e->thread[i], "far-copy", copy_worker, e);
		if (r == 0) {
			e->n_threads++;
			continue;
		}
		far_mutex_lock(&e->lock);
		e->running--;
		far_mutex_unlock(&e->lock);
	}
	if (e->n_threads == 0) { /* fewer workers than asked for are no failure */
		copy_free(e);
		return far_error_set(err, -r, "cannot start a thread: %s", far_strerror(r));
	}
	*out = e;
	return 0;
}

bool copy_wait(struct copy_engine *e, uint64_t until, struct copy_result *res)
{
	far_mutex_lock(&e->lock);
	while (e->running && far_cond_wait_until(&e->changed, &e->lock, until))
		;
	bool ended = e->running == 0;
	*res = e->res;
	far_mutex_unlock(&e->lock);
	return ended;
}

void copy_stop(struct copy_engine *e)
{
	far_mutex_lock(&e->lock);
	e->stop = true;
	if (!e->res.error && !e->res.differs) {
		e->res.error = -ESHUTDOWN;
		e->res.at = 0; /* later failures are only the consequence */
	}
	far_cond_broadcast(&e->changed);
	far_mutex_unlock(&e->lock);
}

void copy_free(struct copy_engine *e)
{
	if (!e)
		return;
	for (unsigned i = 0; i < e->n_threads; i++)
		far_thread_join(&e->thread[i]);
	far_cond_fini(&e->changed);
	far_mutex_fini(&e->lock);
	free(e->thread);
	free(e);
}
