/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Keeps the chunk map's file true while a region runs. What the file says of a chunk, and what it means after a crash:
 *
 *   ABSENT            the local store's bytes mean nothing
 *   CLEAN             they are durable and the remote has the same; a checksum tells whether they still are what they were
 *   CLEAN, marked     they may be newer than the remote's: counts as DIRTY
 *   DIRTY             they are durable and the remote may lack them
 *   PARTIAL           the same, of the ranges in the table of half-written chunks
 *
 * The rules that make this true at every moment, also when the power goes:
 *
 *  1. A chunk becomes CLEAN, DIRTY or PARTIAL in the file only after a flush of the local store that began after the
 *     chunk was so in memory.
 *  2. Before the first write into a local chunk of an unmarked group its group is marked, durably. So it does not matter
 *     how much of the write gets to the disk.
 *  3. A mark, DIRTY or PARTIAL goes away only when the chunk is clean in memory, the remote has flushed what was pushed,
 *     and the local store was flushed after the last change.
 *  4. Before a chunk's room is given back it is ABSENT in the file, durably.
 *  5. A flush (of either kind) ends only after a flush of the local store. So what a marked, DIRTY or PARTIAL chunk holds
 *     after a crash is never older than what a flush has acknowledged, and it is safe to push it again.
 *
 * `fresh` bits say which chunks have news for the file. A bit is set before the change of state that shows new content,
 * so a commit that took the bits, flushed the local store and then finds the bit still clear knows that the content is
 * what it flushed. Every second (less often where that takes long), and when somebody wants it, a commit looks at the
 * fresh ones.
 *
 * The turn: one thread at a time works on the file and on what `seg` says; it is a lock that may be held while the disk
 * works, so nobody takes it with another lock held. Marks are read without it: a writer pins its chunk, then looks at the
 * mark; a commit that takes a mark away does that first and then looks for pins and dirty chunks. One of both sees the other.
 */
#define _GNU_SOURCE
#include "region/persist_int.h"

#include "base/clock.h"
#include "region/partial.h"
#include "region/region_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define PERSIST_INTERVAL FAR_SEC
#define PERSIST_INTERVAL_MAX (5 * FAR_SEC)
#define PERSIST_SHARE 9 /* a commit may take a tenth of the disk's time */
#define PERSIST_AHEAD 8u  /* groups marked at once when writes go forward */
#define PERSIST_AROUND 16u /* when they go to and fro */
#define PERSIST_BURST 3u  /* marks within a second that show it */

/* ------------------------------------------------------------------------------------------------------ the turn */

static void turn_take(struct far_persist *p) FAR_EXCLUDES(p->lock)
{
	far_mutex_lock(&p->lock);
	while (p->turn)
		far_cond_wait(&p->change, &p->lock);
	p->turn = true;
	far_mutex_unlock(&p->lock);
}

static void turn_give(struct far_persist *p) FAR_EXCLUDES(p->lock)
{
	far_mutex_lock(&p->lock);
	p->turn = false;
	far_cond_broadcast(&p->change);
	far_mutex_unlock(&p->lock);
}

/* ------------------------------------------------------------------------------------------------------ the bits */

static bool persist_idle(const struct far_persist *p)
{
	return !p || !p->r || p->passive;
}

void far_persist_set_fresh(struct far_persist *p, uint64_t i)
{
	_Atomic bool *fresh = &p->seg[i / FARMAP_CHUNKS].fresh;

	farmap_bit_set(p->fresh_bits, i);
	if (!atomic_load_explicit(fresh, memory_order_seq_cst))
		atomic_store_explicit(fresh, true, memory_order_seq_cst);
}

void far_persist_fresh(struct far_persist *p, uint64_t i, uint64_t n)
{
	if (persist_idle(p))
		return;
	for (uint64_t k = i; k < i + n; k++)
		far_persist_set_fresh(p, k);
	if (!atomic_load_explicit(&p->unsynced, memory_order_seq_cst))
		atomic_store_explicit(&p->unsynced, true, memory_order_seq_cst);
}

void far_persist_sum(struct far_persist *p, uint64_t i, const void *buf, size_t len)
{
	if (persist_idle(p))
		return;
	struct farmap_sum sum = farmap_sum_of(buf, len);
	/* A commit that sees halves of two writes a wrong checksum; but whoever calls has a newer state to show, and comes
	 * again with it. */
	__atomic_store_n(&p->sums[i].lo, sum.lo, __ATOMIC_RELAXED);
	__atomic_store_n(&p->sums[i].hi, sum.hi, __ATOMIC_RELAXED);
	farmap_bit_set(p->sums_dirty, i / FARMAP_SUMS);
}

bool far_persist_any_unverified(struct far_persist *p)
{
	return p && p->r && atomic_load_explicit(&p->unverified_n, memory_order_acquire);
}

bool far_persist_is_unverified(struct far_persist *p, uint64_t i, uint64_t n)
{
	if (!far_persist_any_unverified(p))
		return false;
	for (uint64_t k = i; k < i + n; k++)
		if (farmap_bit(p->unverified, k))
			return true;
	return false;
}

void far_persist_unsum(struct far_persist *p, uint64_t i)
{
	if (persist_idle(p))
		return;
	__atomic_store_n(&p->sums[i].lo, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&p->sums[i].hi, 0, __ATOMIC_RELAXED);
}

int far_persist_check(struct far_persist *p, uint64_t i, const void *buf, size_t len)
{
	int err = far_persist_verify(p, i, buf, len);

	if (err) { /* perhaps the page is being written right now */
		turn_take(p);
		err = far_persist_verify(p, i, buf, len);
		turn_give(p);
	}
	return err;
}

void far_persist_verified(struct far_persist *p, uint64_t i, uint64_t n)
{
	if (!far_persist_any_unverified(p))
		return;
	for (uint64_t k = i; k < i + n; k++)
		if (farmap_bit_clear(p->unverified, k))
			atomic_fetch_sub_explicit(&p->unverified_n, 1, memory_order_acq_rel);
}

/* ---------------------------------------------------------------------------------------------- before a write */

static bool marks_are_durable(struct far_persist *p, uint64_t i, uint64_t n)
{
	for (uint64_t g = i / FARMAP_GROUP; g <= (i + n - 1) / FARMAP_GROUP; g++)
		if (!(atomic_load_explicit(&p->seg[g / FARMAP_GROUPS].durable, memory_order_seq_cst) >> (g % FARMAP_GROUPS) & 1))
			return false;
	return true;
}

/* Mark the groups of [i, i+n), and some behind or around them when more writes are to be expected there. With the turn. */
static int mark_groups(struct far_persist *p, uint64_t i, uint64_t n)
{
	uint64_t first = i / FARMAP_GROUP, last = (i + n - 1) / FARMAP_GROUP, all = far_div_up(p->chunks, FARMAP_GROUP);
	int err = 0;

	uint64_t now = far_now();
	p->mark_burst = now - p->mark_at < FAR_SEC ? p->mark_burst + 1 : 0;
	p->mark_at = now;
	if (first && p->seg[(first - 1) / FARMAP_GROUPS].marks >> ((first - 1) % FARMAP_GROUPS) & 1) {
		last = far_min(last + PERSIST_AHEAD, all - 1);
	} else if (p->mark_burst >= PERSIST_BURST) {
		first -= first % PERSIST_AROUND;
		last = far_min(last - last % PERSIST_AROUND + PERSIST_AROUND - 1, all - 1);
	}
	for (uint64_t g = first; !err && g <= last; g++) {
		p->seg[g / FARMAP_GROUPS].marks |= (uint64_t)1 << (g % FARMAP_GROUPS);
		if (g == last || g % FARMAP_GROUPS == FARMAP_GROUPS - 1)
			err = farmap_write_segment(p, g / FARMAP_GROUPS);
	}
	if (!err)
		err = farmap_sync(p);
	/* After a failure the marks stay: they say too much, which is safe, and nobody goes by them. */
	for (uint64_t s = first / FARMAP_GROUPS; s <= last / FARMAP_GROUPS; s++) {
		p->seg[s].ahead |= err != 0;
		if (!err)
			atomic_store_explicit(&p->seg[s].durable, p->seg[s].marks, memory_order_seq_cst);
	}
	return err;
}

int far_persist_before_write(struct far_persist *p, uint64_t i, uint64_t n, unsigned flags)
{
	int err = 0;

	if (persist_idle(p))
		return 0;
	if (!marks_are_durable(p, i, n)) {
		if (flags & FAR_NOWAIT)
			return -EAGAIN;
		turn_take(p);
		if (!marks_are_durable(p, i, n))
			err = mark_groups(p, i, n);
		turn_give(p);
	}
	if (!err)
		far_persist_fresh(p, i, n);
	return err;
}

int far_persist_forget(struct far_persist *p, const uint64_t *chunks, size_t n)
{
	int err = 0;
	bool any = false;

	if (persist_idle(p))
		return 0;
	turn_take(p);
	for (size_t k = 0; !err && k < n; k++) {
		struct farmap_segment *g = &p->seg[chunks[k] / FARMAP_CHUNKS];
		if (farmap_kind(g, chunks[k] % FARMAP_CHUNKS) == FAR_PERSIST_ABSENT && !g->ahead)
			continue;
		farmap_set_kind(g, chunks[k] % FARMAP_CHUNKS, FAR_PERSIST_ABSENT);
		any = true;
	}
	for (size_t k = 0; any && !err && k < n; k++)
		if (p->seg[chunks[k] / FARMAP_CHUNKS].ahead)
			err = farmap_write_segment(p, chunks[k] / FARMAP_CHUNKS);
	if (any && !err)
		err = farmap_sync(p);
	if (any && err)
		for (size_t k = 0; k < n; k++)
			p->seg[chunks[k] / FARMAP_CHUNKS].ahead = true;
	turn_give(p);
	for (size_t k = 0; !err && k < n; k++)
		far_persist_verified(p, chunks[k], 1);
	return err;
}

/* ------------------------------------------------------------------------------------------------------- flushes */

/* Flush the local store, if anything was written since the last time; one at a time, for who finds nothing to flush must
 * know that the flush before has ended well. */
int far_persist_flush_local(struct far_persist *p)
{
	int err = 0;

	far_mutex_lock(&p->lock);
	while (p->flushing)
		far_cond_wait(&p->change, &p->lock);
	bool news = atomic_exchange_explicit(&p->unsynced, false, memory_order_seq_cst);
	p->flushing = news;
	far_mutex_unlock(&p->lock);
	if (!news)
		return 0;
	err = far_flush(p->r->local);
	far_mutex_lock(&p->lock);
	if (err)
		atomic_store_explicit(&p->unsynced, true, memory_order_seq_cst);
	p->flushing = false;
	far_cond_broadcast(&p->change);
	far_mutex_unlock(&p->lock);
	return err;
}

/* A commit that began after we came does our work as well. */
int far_persist_commit(struct far_persist *p)
{
	int err = 0;

	if (persist_idle(p))
		return 0;
	far_mutex_lock(&p->lock);
	uint64_t mine = ++p->commit_want;
	while (p->turn && p->commit_done < mine)
		far_cond_wait(&p->change, &p->lock);
	bool done = p->commit_done >= mine;
	uint64_t covers = p->commit_want;
	if (!done)
		p->turn = true;
	far_mutex_unlock(&p->lock);
	if (done)
		return 0;
	err = far_commit_run(p, FAR_COMMIT_DIRTY);
	far_mutex_lock(&p->lock);
	p->turn = false;
	if (!err)
		p->commit_done = far_max(p->commit_done, covers);
	far_cond_broadcast(&p->change);
	far_mutex_unlock(&p->lock);
	return err;
}

/* ------------------------------------------------------------------------------------------------------ the thread */

uint64_t far_persist_sync_begin(struct far_persist *p)
{
	if (persist_idle(p))
		return 0;
	far_mutex_lock(&p->lock);
	uint64_t ticket = ++p->sync_want;
	far_cond_broadcast(&p->change);
	far_mutex_unlock(&p->lock);
	return ticket;
}

int far_persist_sync_wait(struct far_persist *p, uint64_t ticket)
{
	uint64_t until = far_deadline();
	int err = 0;

	if (persist_idle(p))
		return 0;
	far_mutex_lock(&p->lock);
	while (!err && p->sync_tried < ticket)
		if (p->stopped)
			err = -ESHUTDOWN;
		else if (!far_cond_wait_until(&p->change, &p->lock, until) && far_now() >= until)
			err = -ETIMEDOUT;
	if (!err && p->sync_done < ticket)
		err = p->sync_error;
	far_mutex_unlock(&p->lock);
	return err;
}

static void persist_sync_locked(struct far_persist *p) FAR_REQUIRES(p->lock)
{
	uint64_t covers = p->sync_want;

	far_mutex_unlock(&p->lock);
	int err = far_persist_flush_local(p);
	far_mutex_lock(&p->lock);
	p->sync_tried = covers;
	p->sync_error = err;
	if (!err)
		p->sync_done = covers;
	far_cond_broadcast(&p->change);
}

static void *persist_thread(void *arg)
{
	struct far_persist *p = arg;
	uint64_t next = far_now() + PERSIST_INTERVAL;
	bool told = false;

	far_mutex_lock(&p->lock);
	while (!p->stopped) {
		if (p->sync_want > p->sync_tried) {
			persist_sync_locked(p);
		} else if (far_now() >= next) {
			far_mutex_unlock(&p->lock);
			turn_take(p);
			uint64_t began = far_now();
			int err = far_commit_run(p, FAR_COMMIT_ALL);
			uint64_t took = far_now() - began;
			turn_give(p);
			if (err && !told)
				far_log(FAR_LOG_WARNING, "the chunk map %s cannot be written: %s. What is pulled now is pulled again "
					"after a crash", p->path, far_strerror(err));
			told = err != 0;
			next = far_now() + far_min(far_max(PERSIST_SHARE * took, PERSIST_INTERVAL), PERSIST_INTERVAL_MAX);
			far_mutex_lock(&p->lock);
		} else {
			far_cond_wait_until(&p->change, &p->lock, next);
		}
	}
	far_mutex_unlock(&p->lock);
	return NULL;
}

/* ---------------------------------------------------------------------------------------------------- begin and end */

static uint64_t persist_local_id(struct far_region *r)
{
	struct stat st;
	int fd;

	return far_share(r->local, &fd) == 0 && fstat(fd, &st) == 0 ? (uint64_t)st.st_ino : 0;
}

static int persist_restore_partials(struct far_persist *p)
{
	struct far_partial *e;
	size_t at = 0;
	int err;

	while ((e = farmap_get_partial(p, &at, &err))) {
		if (farmap_kind(&p->seg[e->chunk / FARMAP_CHUNKS], e->chunk % FARMAP_CHUNKS) != FAR_PERSIST_PARTIAL) {
			free(e);
		} else if (far_chunkmap_state(p->r->map, e->chunk) != FAR_ABSENT) { /* told twice: no file of ours */
			free(e);
			return -EUCLEAN;
		} else if (far_partial_whole(e)) {
			far_chunkmap_restore(p->r->map, e->chunk, 1, true);
			free(e);
		} else {
			far_chunkmap_restore_partial(p->r->map, e);
		}
	}
	return err;
}

static void persist_restore(struct far_persist *p)
{
	uint64_t clean = 0;

	for (uint64_t s = 0; s < p->segments; s++) {
		struct farmap_segment *g = &p->seg[s];
		unsigned end = (unsigned)far_min(FARMAP_CHUNKS, p->chunks - s * FARMAP_CHUNKS);
		for (unsigned k = 0, n; g->kinds && k < end; k += n) {
			uint64_t i = s * FARMAP_CHUNKS + k;
			enum far_persist_kind kind = far_persist_chunk(p, i);
			for (n = 1; k + n < end && far_persist_chunk(p, i + n) == kind; n++)
				;
			if (kind == FAR_PERSIST_DIRTY || kind == FAR_PERSIST_CLEAN)
				far_chunkmap_restore(p->r->map, i, n, kind == FAR_PERSIST_DIRTY);
			for (unsigned u = 0; kind == FAR_PERSIST_CLEAN && u < n; u++)
				atomic_fetch_or_explicit(&p->unverified[(i + u) / 64], (uint64_t)1 << ((i + u) % 64),
							 memory_order_relaxed);
			clean += kind == FAR_PERSIST_CLEAN ? n : 0;
		}
		atomic_store(&g->durable, g->marks);
	}
	atomic_store(&p->unverified_n, clean);
}

static int persist_memory(struct far_persist *p)
{
	size_t words = (size_t)(p->chunks / 64 + 1), bytes = (size_t)far_max(p->chunks, 1) * sizeof *p->sums;

	p->fresh_bits = calloc(words, sizeof *p->fresh_bits);
	p->unverified = calloc(words, sizeof *p->unverified);
	p->sums_dirty = calloc((size_t)(p->chunks / FARMAP_SUMS / 64 + 1), sizeof *p->sums_dirty);
	p->sums = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p->sums == MAP_FAILED)
		p->sums = NULL;
	return p->fresh_bits && p->unverified && p->sums_dirty && p->sums ? 0 : -ENOMEM;
}

static void persist_memory_free(struct far_persist *p)
{
	free((void *)p->fresh_bits);
	free((void *)p->unverified);
	free((void *)p->sums_dirty);
	if (p->sums)
		munmap(p->sums, (size_t)far_max(p->chunks, 1) * sizeof *p->sums);
	p->fresh_bits = p->unverified = p->sums_dirty = NULL;
	p->sums = NULL;
}

static int persist_check_same(struct far_persist *p, struct far_region *r, struct far_error *err)
{
	uint64_t id = persist_local_id(r);

	if (p->info.bytes != r->bytes)
		return far_error_set(err, EINVAL, "the local store belongs to a region of %" PRIu64 " bytes, the remote has %" PRIu64
				     ": use another --local", p->info.bytes, r->bytes);
	if (p->info.chunk != r->chunk)
		return far_error_set(err, EINVAL, "the local store was filled with chunks of %" PRIu64 " bytes: give --chunk %" PRIu64
				     ", or use another --local", p->info.chunk, p->info.chunk);
	if (p->local_id && id && p->local_id != id && !r->o.force)
		return far_error_set(err, ESTALE, "the local store is not the file that %s was made for. Bring that back, give "
				     "--force if it is a copy of it, or move the map away to begin with an empty one", p->path);
	p->local_id = id;
	return 0;
}

int far_persist_begin(struct far_persist *p, struct far_region *r, struct far_error *err)
{
	int e = 0;

	if (!p)
		return 0;
	if (p->is_new) {
		p->local_id = persist_local_id(r);
		e = p->passive ? -EBUSY : farmap_create(p, r->bytes, r->chunk);
		if (e)
			return far_error_set(err, -e, "cannot make the chunk map %s: %s", p->path, far_strerror(e));
	} else {
		e = persist_check_same(p, r, err);
		if (e)
			return e;
		atomic_store(&r->local_zero, false); /* bytes of chunks that are absent by now may lie there */
	}
	e = persist_memory(p);
	p->r = r;
	if (!e && !p->is_new) {
		persist_restore(p);
		e = persist_restore_partials(p);
	}
	/* From here on the file is no longer as it was left. */
	p->info.clean = false;
	if (!e && !p->passive)
		e = farmap_write_header(p);
	if (!e && !p->passive)
		e = farmap_sync(p);
	if (!e)
		e = far_thread_start(&p->thread, "far-persist", persist_thread, p);
	if (!e)
		return 0;
	p->r = NULL;
	persist_memory_free(p);
	return far_error_set(err, -e, "cannot use the chunk map %s: %s", p->path, far_strerror(e));
}

void far_persist_end(struct far_persist *p)
{
	if (!p || !p->r)
		return;
	far_mutex_lock(&p->lock);
	p->stopped = true;
	far_cond_broadcast(&p->change);
	far_mutex_unlock(&p->lock);
	far_thread_join(&p->thread);
	int err = 0;
	if (!p->passive) {
		turn_take(p);
		err = far_commit_run(p, FAR_COMMIT_ALL);
		if (!err)
			err = far_commit_exact(p);
		p->info.clean = true;
		if (!err)
			err = farmap_write_header(p);
		if (!err)
			err = farmap_sync(p);
		turn_give(p);
	}
	if (err)
		far_log(FAR_LOG_WARNING, "the chunk map %s could not be closed in order: %s. It will be opened as after a crash",
			p->path, far_strerror(err));
	p->r = NULL;
	persist_memory_free(p);
}

static void persist_text(char *to, size_t room, const char *from)
{
	snprintf(to, room, "%.*s", (int)room - 1, from);
}

int far_persist_remember(struct far_persist *p, const char *source, const struct far_facts *facts,
			 const struct far_origin *origin, bool fenced)
{
	int err = 0;

	if (!p || p->passive || p->mode == FAR_PERSIST_LOOK)
		return 0;
	turn_take(p);
	if (source)
		persist_text(p->info.source, sizeof p->info.source, source);
	if (facts)
		p->info.facts = *facts;
	if (origin)
		p->info.origin = *origin;
	p->info.fenced = fenced;
	if (p->seg) { /* else it is written when the region begins */
		err = farmap_write_header(p);
		if (!err)
			err = farmap_sync(p);
	}
	turn_give(p);
	return err;
}

int far_persist_discard_clean(struct far_persist *p)
{
	int err = 0;

	if (!p || p->is_new || p->passive)
		return 0;
	turn_take(p);
	for (uint64_t s = 0; s < p->segments; s++) {
		struct farmap_segment *g = &p->seg[s];
		for (unsigned k = 0; g->kinds && k < FARMAP_CHUNKS; k++)
			if (farmap_kind(g, k) == FAR_PERSIST_CLEAN && !farmap_marked(g, k))
				farmap_set_kind(g, k, FAR_PERSIST_ABSENT);
		if (!err && g->ahead)
			err = farmap_write_segment(p, s);
	}
	if (!err)
		err = farmap_sync(p);
	farmap_count(p);
	turn_give(p);
	return err;
}
