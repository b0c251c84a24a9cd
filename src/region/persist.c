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
#include "base/pool.h"
#include "region/partial.h"
#include "region/region_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define PERSIST_INTERVAL FAR_SEC
#define PERSIST_INTERVAL_MAX (30 * FAR_SEC)
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

static bool bit_get(_Atomic uint64_t *bits, uint64_t i)
{
	return atomic_load_explicit(&bits[i / 64], memory_order_seq_cst) >> (i % 64) & 1;
}

static bool bit_set(_Atomic uint64_t *bits, uint64_t i) /* false: it was */
{
	uint64_t bit = (uint64_t)1 << (i % 64);
	return !bit_get(bits, i) && !(atomic_fetch_or_explicit(&bits[i / 64], bit, memory_order_seq_cst) & bit);
}

static bool bit_clear(_Atomic uint64_t *bits, uint64_t i) /* false: it was */
{
	uint64_t bit = (uint64_t)1 << (i % 64);
	return bit_get(bits, i) && (atomic_fetch_and_explicit(&bits[i / 64], ~bit, memory_order_seq_cst) & bit);
}

static bool persist_idle(const struct far_persist *p)
{
	return !p || !p->r || p->passive;
}

static void fresh_set(struct far_persist *p, uint64_t i)
{
	_Atomic bool *fresh = &p->seg[i / FARMAP_CHUNKS].fresh;

	bit_set(p->fresh_bits, i);
	if (!atomic_load_explicit(fresh, memory_order_seq_cst))
		atomic_store_explicit(fresh, true, memory_order_seq_cst);
}

void far_persist_fresh(struct far_persist *p, uint64_t i, uint64_t n)
{
	if (persist_idle(p))
		return;
	for (uint64_t k = i; k < i + n; k++)
		fresh_set(p, k);
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
	bit_set(p->sums_dirty, i / FARMAP_SUMS);
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
		if (bit_get(p->unverified, k))
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
		if (bit_clear(p->unverified, k))
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

/* ------------------------------------------------------------------------------------------------------ a commit */

enum commit_what { COMMIT_DIRTY, COMMIT_ALL };

struct commit {
	struct far_persist *p;
	enum commit_what what;
	struct commit_chunk {
		uint64_t chunk;
		enum far_chunk state; /* before the local store was flushed */
		bool unstable;        /* read after it */
	} *list;
	size_t n, room;
	uint8_t *partials; /* the new table */
	size_t partials_n, partials_room;
	uint64_t *partial_ids; /* chunks in it, sorted */
	size_t partial_ids_n, partial_ids_room;
	bool any_partial;
	int err;
};

static bool commit_grow(struct commit *c, void *array, size_t *room, size_t need, size_t each)
{
	void **a = array;

	if (need <= *room)
		return true;
	size_t more = far_max(need, *room * 2 + 64);
	void *bigger = realloc(*a, more * each);
	if (!bigger) {
		c->err = -ENOMEM;
		return false;
	}
	*a = bigger;
	*room = more;
	return true;
}

static void commit_partial(struct commit *c, const struct far_partial *e)
{
	size_t len = farmap_put_partial(NULL, e);

	if (c->err || !commit_grow(c, &c->partials, &c->partials_room, c->partials_n + len, 1) ||
	    !commit_grow(c, &c->partial_ids, &c->partial_ids_room, c->partial_ids_n + 1, sizeof *c->partial_ids))
		return;
	farmap_put_partial(c->partials + c->partials_n, e);
	c->partials_n += len;
	c->partial_ids[c->partial_ids_n++] = e->chunk;
}

static void commit_partial_cb(void *opaque, const struct far_partial *e)
{
	commit_partial(opaque, e);
}

static int commit_by_id(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

static bool commit_has_partial(const struct commit *c, uint64_t i)
{
	return c->partial_ids_n && bsearch(&i, c->partial_ids, c->partial_ids_n, sizeof i, commit_by_id);
}

/* The half-written chunks of now; and those of the old table that are whole by now but still PARTIAL in their page, for the
 * time between the two writes. */
static void commit_partials(struct commit *c)
{
	struct far_persist *p = c->p;
	struct far_partial *e;
	size_t at = 0, live;
	int err;

	far_chunkmap_each_partial(p->r->map, commit_partial_cb, c);
	if (c->err)
		return;
	if (c->partial_ids_n)
		qsort(c->partial_ids, c->partial_ids_n, sizeof *c->partial_ids, commit_by_id);
	live = c->partial_ids_n;
	while (!c->err && (e = farmap_get_partial(p, &at, &err))) {
		bool live_too = live && bsearch(&e->chunk, c->partial_ids, live, sizeof e->chunk, commit_by_id);
		if (!live_too && farmap_kind(&p->seg[e->chunk / FARMAP_CHUNKS], e->chunk % FARMAP_CHUNKS) == FAR_PERSIST_PARTIAL) {
			far_partial_add(e, 0, e->len);
			commit_partial(c, e);
		}
		free(e);
	}
	c->partial_ids_n = live;
}

/* Take the fresh bits. */
static void commit_collect(struct commit *c)
{
	struct far_persist *p = c->p;

	for (uint64_t s = 0; s < p->segments; s++) {
		if (!atomic_load_explicit(&p->seg[s].fresh, memory_order_seq_cst))
			continue;
		atomic_store_explicit(&p->seg[s].fresh, false, memory_order_seq_cst);
		uint64_t end = far_min(far_div_up(p->chunks, 64), (s + 1) * (FARMAP_CHUNKS / 64));
		for (uint64_t w = s * (FARMAP_CHUNKS / 64); w < end; w++) {
			uint64_t bits = atomic_load_explicit(&p->fresh_bits[w], memory_order_relaxed);
			if (bits)
				bits = atomic_exchange_explicit(&p->fresh_bits[w], 0, memory_order_seq_cst);
			for (; bits; bits &= bits - 1) {
				uint64_t i = w * 64 + (uint64_t)__builtin_ctzll(bits);
				if (c->err || !commit_grow(c, &c->list, &c->room, c->n + 1, sizeof *c->list)) {
					far_persist_fresh(p, i, 1);
					continue;
				}
				enum far_chunk state = far_chunkmap_state(p->r->map, i);
				c->any_partial |= state == FAR_PARTIAL || state == FAR_FETCHING_PARTIAL ||
						 state == FAR_PUSHING_PARTIAL || state == FAR_FILLING;
				c->list[c->n++] = (struct commit_chunk){ i, state, far_push_unstable(p->r, i) };
			}
		}
	}
}

/* Look at it again next time; it has no news for the local store. */
static void commit_again(struct commit *c, uint64_t i)
{
	fresh_set(c->p, i);
}

/* Take the mark of chunk i's group away if nothing in it may be newer than what was flushed. */
static bool commit_unmark(struct commit *c, uint64_t i)
{
	struct far_persist *p = c->p;
	uint64_t g = i / FARMAP_GROUP, first = g * FARMAP_GROUP, end = far_min(first + FARMAP_GROUP, p->chunks);
	struct farmap_segment *s = &p->seg[g / FARMAP_GROUPS];
	uint64_t bit = (uint64_t)1 << (g % FARMAP_GROUPS);
	bool quiet = true;

	atomic_fetch_and_explicit(&s->durable, ~bit, memory_order_seq_cst);
	for (uint64_t k = first; quiet && k < end; k++)
		quiet = far_chunkmap_is_quiet(p->r->map, k) && !bit_get(p->fresh_bits, k) && !far_push_unstable(p->r, k);
	if (quiet) {
		s->marks &= ~bit;
		s->ahead = true;
	} else if (s->marks & bit) {
		atomic_fetch_or_explicit(&s->durable, bit, memory_order_seq_cst);
	}
	return quiet;
}

/* It became clean without anybody having had all of its bytes in hand: half-written ones that were pushed as they were. */
static int commit_sum(struct far_persist *p, uint64_t i)
{
	size_t len = (size_t)farmap_len(p, i);
	char *buf;

	if (__atomic_load_n(&p->sums[i].lo, __ATOMIC_RELAXED) | __atomic_load_n(&p->sums[i].hi, __ATOMIC_RELAXED))
		return 0;
	if (!(buf = far_buf_get(len)))
		return -ENOMEM;
	int err = far_read(p->r->local, i << p->r->shift, buf, len, 0);
	if (!err)
		far_persist_sum(p, i, buf, len);
	far_buf_put(buf, len);
	return err;
}

static void commit_clean(struct commit *c, uint64_t i)
{
	struct far_persist *p = c->p;
	struct farmap_segment *s = &p->seg[i / FARMAP_CHUNKS];
	unsigned k = i % FARMAP_CHUNKS;
	int err = 0;

	/* Checked after the checksum: what changes from here on comes again. */
	bool summed = far_chunkmap_state(p->r->map, i) == FAR_CLEAN && !commit_sum(p, i);
	if (bit_get(p->fresh_bits, i) || far_chunkmap_state(p->r->map, i) != FAR_CLEAN || !summed)
		return;
	if (far_push_unstable(p->r, i)) {
		/* The remote may yet forget it: it stays what it is, DIRTY or marked. */
		commit_again(c, i);
	} else if (farmap_kind(s, k) != FAR_PERSIST_CLEAN) {
		err = farmap_set_kind(s, k, FAR_PERSIST_CLEAN);
	}
	if (!err && farmap_marked(s, k) && !far_push_unstable(p->r, i))
		commit_unmark(c, i);
	c->err = c->err ? c->err : err;
}

/* What is to be said of the fresh ones, now that the local store is flushed. */
static void commit_decide(struct commit *c)
{
	struct far_persist *p = c->p;

	for (size_t n = 0; n < c->n; n++) {
		uint64_t i = c->list[n].chunk;
		struct farmap_segment *s = &p->seg[i / FARMAP_CHUNKS];
		enum far_persist_kind kind = farmap_kind(s, i % FARMAP_CHUNKS);
		int err = 0;

		switch (c->list[n].state) {
		case FAR_CLEAN:
			/* What was written and pushed already counts like dirty: a flush of the remote has yet to cover it. */
			if (c->list[n].unstable && (kind == FAR_PERSIST_ABSENT || kind == FAR_PERSIST_PARTIAL))
				err = farmap_set_kind(s, i % FARMAP_CHUNKS, FAR_PERSIST_DIRTY);
			if (c->what == COMMIT_ALL)
				commit_clean(c, i);
			else
				commit_again(c, i);
			break;
		case FAR_DIRTY:
		case FAR_PUSHING:
		case FAR_REDIRTY:
			if (kind != FAR_PERSIST_DIRTY && !(kind == FAR_PERSIST_CLEAN && farmap_marked(s, i % FARMAP_CHUNKS)))
				err = farmap_set_kind(s, i % FARMAP_CHUNKS, FAR_PERSIST_DIRTY);
			break;
		case FAR_PARTIAL:
		case FAR_FETCHING_PARTIAL:
		case FAR_PUSHING_PARTIAL:
			if (!commit_has_partial(c, i))
				commit_again(c, i);
			else if (kind != FAR_PERSIST_PARTIAL)
				err = farmap_set_kind(s, i % FARMAP_CHUNKS, FAR_PERSIST_PARTIAL);
			break;
		case FAR_FILLING: /* what was written before is still told by its entry */
			if (kind == FAR_PERSIST_ABSENT && commit_has_partial(c, i))
				err = farmap_set_kind(s, i % FARMAP_CHUNKS, FAR_PERSIST_PARTIAL);
			commit_again(c, i);
			break;
		case FAR_ABSENT:
		case FAR_FETCHING:
		case FAR_EVICTING:
			break;
		}
		if (err)
			commit_again(c, i);
		c->err = c->err ? c->err : err;
	}
}

/* Groups may be marked in which nothing was written, so nothing brings them up again: look at all once nothing is dirty. */
static void commit_unmark_all(struct commit *c)
{
	struct far_persist *p = c->p;

	if (far_chunkmap_dirty(p->r->map))
		return;
	for (uint64_t s = 0; s < p->segments; s++)
		for (uint64_t marks = p->seg[s].marks; marks; marks &= marks - 1)
			commit_unmark(c, (s * FARMAP_GROUPS + (uint64_t)__builtin_ctzll(marks)) * FARMAP_GROUP);
}

/* New checksums, before the pages that call their chunks clean. */
static int commit_sums(struct commit *c)
{
	struct far_persist *p = c->p;
	bool any = false;
	int err = 0;

	for (uint64_t w = 0; !err && w < p->chunks / FARMAP_SUMS / 64 + 1; w++)
		for (uint64_t bits = atomic_load(&p->sums_dirty[w]); !err && bits; bits &= bits - 1) {
			uint64_t page = w * 64 + (uint64_t)__builtin_ctzll(bits);
			bit_clear(p->sums_dirty, page);
			any = true;
			err = farmap_write_sums(p, page);
			if (err)
				bit_set(p->sums_dirty, page);
		}
	return err || !any ? err : farmap_sync(p);
}

static int commit_pages(struct commit *c)
{
	struct far_persist *p = c->p;
	bool any = false;
	int err = 0;

	for (uint64_t s = 0; !err && s < p->segments; s++)
		if (p->seg[s].ahead) {
			err = farmap_write_segment(p, s);
			any = true;
		}
	if (!err && any)
		err = farmap_sync(p);
	if (err && any) /* which of them got there is unknown */
		for (uint64_t s = 0; s < p->segments; s++)
			p->seg[s].ahead |= !p->seg[s].synced;
	return err;
}

/* Flush the local store, if anything was written since the last time; one at a time, for who finds nothing to flush must
 * know that the flush before has ended well. */
static int persist_flush_local(struct far_persist *p)
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

/* PARTIAL in a page needs its entry in the table: so that goes first. */
static int commit_table(struct commit *c)
{
	if (!c->any_partial)
		return 0;
	int err = farmap_write_partials(c->p, c->partials, c->partials_n);
	if (!err) {
		free(c->p->partials);
		c->p->partials = c->partials;
		c->partials = NULL;
	}
	return err;
}

/* With the turn. */
static int commit_run(struct far_persist *p, enum commit_what what)
{
	struct commit c = { .p = p, .what = what };

	commit_partials(&c);
	if (!c.err)
		commit_collect(&c);
	int err = c.err ? c.err : persist_flush_local(p);
	if (!err)
		err = commit_table(&c);
	if (!err) {
		commit_decide(&c);
		err = c.err;
	}
	if (!err && what == COMMIT_ALL) {
		commit_unmark_all(&c);
		err = commit_sums(&c);
	}
	if (!err)
		err = commit_pages(&c);
	if (err)
		for (size_t n = 0; n < c.n; n++)
			far_persist_fresh(p, c.list[n].chunk, 1);
	free(c.list);
	free(c.partials);
	free(c.partial_ids);
	return err;
}

/* Whether each chunk of the group could be given the kind that it has, now that nobody writes any more. */
static bool commit_exact_group(struct far_persist *p, uint64_t first, uint64_t end)
{
	for (uint64_t i = first; i < end; i++) {
		struct farmap_segment *s = &p->seg[i / FARMAP_CHUNKS];
		enum far_persist_kind kind = farmap_kind(s, i % FARMAP_CHUNKS);
		bool dirty = false;

		switch (far_chunkmap_state(p->r->map, i)) {
		case FAR_DIRTY:
		case FAR_PUSHING:
		case FAR_REDIRTY:
			dirty = true;
			break;
		case FAR_CLEAN:
			dirty = far_push_unstable(p->r, i);
			if (!dirty && bit_get(p->fresh_bits, i))
				return false;
			break;
		case FAR_PARTIAL:
		case FAR_FETCHING_PARTIAL:
		case FAR_PUSHING_PARTIAL:
			if (kind != FAR_PERSIST_PARTIAL)
				return false;
			break;
		default:
			if (kind != FAR_PERSIST_ABSENT)
				return false;
		}
		if (dirty && farmap_set_kind(s, i % FARMAP_CHUNKS, FAR_PERSIST_DIRTY))
			return false;
	}
	return true;
}

/* At the end, after a commit, with the turn: marks go. Else the next mount would push whole groups, perhaps over what
 * somebody else has written by then. */
static int commit_exact(struct far_persist *p)
{
	struct commit c = { .p = p };
	bool any = false;
	int err = 0;

	for (uint64_t g = 0; !err && g < far_div_up(p->chunks, FARMAP_GROUP); g++) {
		struct farmap_segment *s = &p->seg[g / FARMAP_GROUPS];
		uint64_t bit = (uint64_t)1 << (g % FARMAP_GROUPS), first = g * FARMAP_GROUP;
		uint64_t end = far_min(first + FARMAP_GROUP, p->chunks);
		if (!(s->marks & bit))
			continue;
		s->ahead = any = true;
		if (!commit_exact_group(p, first, end))
			continue;
		atomic_fetch_and_explicit(&s->durable, ~bit, memory_order_seq_cst);
		s->marks &= ~bit;
		for (uint64_t page = first / FARMAP_SUMS; !err && page <= (end - 1) / FARMAP_SUMS; page++)
			if (bit_clear(p->sums_dirty, page))
				err = farmap_write_sums(p, page);
	}
	if (!err && any)
		err = farmap_sync(p);
	return err ? err : commit_pages(&c);
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
	err = commit_run(p, COMMIT_DIRTY);
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
	int err = persist_flush_local(p);
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
			int err = commit_run(p, COMMIT_ALL);
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
		e = farmap_sync(p);
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
		err = commit_run(p, COMMIT_ALL);
		if (!err)
			err = commit_exact(p);
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
