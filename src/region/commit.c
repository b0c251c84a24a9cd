/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A commit: what is fresh is looked at, the local store is flushed, and then the file says what was seen before the flush.
 * persist.c has the rules that this keeps. The steps, in this order for a reason:
 *
 *   the table of half-written chunks is copied      so that what it says is in the local store before the flush begins
 *   the fresh bits are taken, with each one's state a bit that is set again from here on means newer content
 *   the local store is flushed
 *   the table is written, if a chunk is half-written a page that says so needs its entry
 *   decisions, chunk by chunk; marks that may go
 *   checksums are written                            before the pages that call their chunks clean
 *   pages are written, and everything is durable
 *
 * What fails leaves its bits set and its pages `ahead`: the next commit does it again.
 */
#define _GNU_SOURCE
#include "region/persist_int.h"

#include "base/pool.h"
#include "region/partial.h"
#include "region/region_int.h"

#include <stdlib.h>

struct commit {
	struct far_persist *p;
	enum far_commit what;
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

static void commit_partial(void *opaque, const struct far_partial *e)
{
	struct commit *c = opaque;
	size_t len = farmap_put_partial(NULL, e);

	if (c->err || !commit_grow(c, &c->partials, &c->partials_room, c->partials_n + len, 1) ||
	    !commit_grow(c, &c->partial_ids, &c->partial_ids_room, c->partial_ids_n + 1, sizeof *c->partial_ids))
		return;
	farmap_put_partial(c->partials + c->partials_n, e);
	c->partials_n += len;
	c->partial_ids[c->partial_ids_n++] = e->chunk;
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

	far_chunkmap_each_partial(p->r->map, commit_partial, c);
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
	far_persist_set_fresh(c->p, i);
}

/* Take the mark of chunk i's group away if nothing in it may be newer than what was flushed. */
static void commit_unmark(struct commit *c, uint64_t i)
{
	struct far_persist *p = c->p;
	uint64_t g = i / FARMAP_GROUP, first = g * FARMAP_GROUP, end = far_min(first + FARMAP_GROUP, p->chunks);
	struct farmap_segment *s = &p->seg[g / FARMAP_GROUPS];
	uint64_t bit = (uint64_t)1 << (g % FARMAP_GROUPS);
	bool quiet = true;

	atomic_fetch_and_explicit(&s->durable, ~bit, memory_order_seq_cst);
	for (uint64_t k = first; quiet && k < end; k++)
		quiet = far_chunkmap_is_quiet(p->r->map, k) && !farmap_bit(p->fresh_bits, k) && !far_push_unstable(p->r, k);
	if (quiet) {
		s->marks &= ~bit;
		s->ahead = true;
	} else if (s->marks & bit) {
		atomic_fetch_or_explicit(&s->durable, bit, memory_order_seq_cst);
	}
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
	if (farmap_bit(p->fresh_bits, i) || far_chunkmap_state(p->r->map, i) != FAR_CLEAN || !summed)
		return;
	if (far_push_unstable(p->r, i)) {
		/* The remote may yet forget it: it stays what it is, DIRTY or marked. */
		commit_again(c, i);
		return;
	}
	if (farmap_kind(s, k) != FAR_PERSIST_CLEAN)
		err = farmap_set_kind(s, k, FAR_PERSIST_CLEAN);
	if (!err && farmap_marked(s, k))
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
			if (c->what == FAR_COMMIT_ALL)
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
		c->err = c->err ? c->err : err; /* then all of them come again */
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
			farmap_bit_clear(p->sums_dirty, page);
			any = true;
			err = farmap_write_sums(p, page);
			if (err)
				farmap_bit_set(p->sums_dirty, page);
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
int far_commit_run(struct far_persist *p, enum far_commit what)
{
	struct commit c = { .p = p, .what = what };

	/* What a commit that failed has decided goes first: else this one's table of half-written chunks may leave out a chunk
	 * that the file still calls half-written. */
	int late = commit_pages(&c);
	if (late)
		return late;
	commit_partials(&c);
	if (!c.err)
		commit_collect(&c);
	int err = c.err ? c.err : far_persist_flush_local(p);
	if (!err)
		err = commit_table(&c);
	if (!err) {
		commit_decide(&c);
		err = c.err;
	}
	if (!err && what == FAR_COMMIT_ALL) {
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
			if (!dirty && farmap_bit(p->fresh_bits, i))
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
int far_commit_exact(struct far_persist *p)
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
			if (farmap_bit_clear(p->sums_dirty, page))
				err = farmap_write_sums(p, page);
	}
	if (!err && any)
		err = farmap_sync(p);
	return err ? err : commit_pages(&c);
}
