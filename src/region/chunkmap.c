/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The state of every chunk, and the arrows between states:
 *
 *   ABSENT ------------> FETCHING           claim           one owner; everyone else waits for its struct far_fetch
 *   FETCHING ----------> FILLING            fill_begin      the data has come
 *   FETCHING ----------> ABSENT             fetch_end       it has not
 *   FETCHING ----------> FETCHING_PARTIAL   write_begin     a write of a part while the fetch runs
 *   ABSENT ------------> PARTIAL            write_begin     a write of a part
 *   ABSENT ------------> FILLING            write_begin     a write of the whole chunk
 *   PARTIAL -----------> FETCHING_PARTIAL   claim
 *   PARTIAL -----------> DIRTY              write_end       the parts have become the whole
 *   PARTIAL -----------> ABSENT             write_end, fetch_end, fill_end: the only write failed
 *   PARTIAL -----------> PUSHING_PARTIAL    push_begin_partial
 *   PUSHING_PARTIAL ---> PARTIAL            push_end_partial, without news if nothing was written meanwhile
 *   PUSHING_PARTIAL ---> CLEAN | DIRTY      push_end_partial: the parts have become the whole meanwhile
 *   FETCHING_PARTIAL --> FILLING            fill_begin      waits until no writer has it pinned
 *   FETCHING_PARTIAL --> PARTIAL            fetch_end       the fetch failed
 *   FILLING -----------> CLEAN | DIRTY      fill_end, write_end
 *   FILLING -----------> ABSENT | PARTIAL   fill_end, write_end: the local store failed
 *   CLEAN -------------> DIRTY              write_end; redirty: the remote has forgotten it
 *   DIRTY -------------> PUSHING            push_begin
 *   PUSHING -----------> REDIRTY            write_end
 *   PUSHING -----------> CLEAN | DIRTY      push_end
 *   REDIRTY -----------> DIRTY              push_end
 *   CLEAN -------------> EVICTING -> ABSENT evict_begin, evict_end
 *   PARTIAL -----------> EVICTING -> ABSENT the same, if it has no news
 *
 * A word is 16 bits: state (4), pins (7), touched (1), news (4). News is how much was written here that the remote lacks,
 * in fifteenths of the chunk, rounded up: 0 when there is none, so that small writes far apart do not fill a budget that
 * is counted in bytes. Every arrow is a compare-and-swap of the word, so pinning and marking dirty take no lock. Invariants:
 *
 *  1. A write marks its chunk dirty after its copy into the local store and before its answer, in the same
 *     compare-and-swap that drops its pin. A push that read half of the copy finds REDIRTY, or DIRTY comes after it.
 *  2. Pins are held in CLEAN, DIRTY, PUSHING and REDIRTY (readers, writers), in the three PARTIALs (writers and readers
 *     of ranges that are here), and in FILLING only those taken before it began.
 *  3. A chunk in one of the PARTIALs, in FILLING after FETCHING_PARTIAL or in EVICTING after PARTIAL, has one struct
 *     far_partial.
 *  4. News is above 0 exactly where the remote lacks something: always in DIRTY, PUSHING, REDIRTY and PUSHING_PARTIAL, and
 *     in PARTIAL, FETCHING_PARTIAL and FILLING after it until the ranges that are here were pushed. `dirty` is the sum of
 *     it over all chunks.
 *  5. A chunk in FETCHING or FETCHING_PARTIAL lies in exactly one struct far_fetch whose `at` has not passed it.
 *  6. The hint bit of a group is set whenever one of its 64 chunks is dirty or being pushed, but for the moment in
 *     which a pusher looks the group over.
 *
 * `lock` guards the side table, the list of fetches and all sleeping. It is never held across a callback or I/O. The arrows
 * of pushers are in chunkmap_push.c.
 */
#define _GNU_SOURCE
#include "region/chunkmap_int.h"

#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---------------------------------------------------------------------------------------------- open, close, facts */

int far_chunkmap_open(struct far_chunkmap **out, uint64_t bytes, unsigned shift, uint32_t max_partial)
{
	struct far_chunkmap *m = calloc(1, sizeof *m);

	if (!m)
		return -ENOMEM;
	m->bytes = bytes;
	m->shift = shift;
	m->chunks = far_div_up(bytes, (uint64_t)1 << shift);
	m->max_partial = max_partial;
	m->map_len = (size_t)far_max(m->chunks * sizeof(uint16_t), 1);
	m->fd = memfd_create("farpage-chunkmap", MFD_CLOEXEC);
	if (m->fd < 0 || ftruncate(m->fd, (off_t)m->map_len) < 0)
		goto fail;
	m->word = mmap(NULL, m->map_len, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
	if (m->word == MAP_FAILED)
		goto fail;
	m->hint = calloc((size_t)far_div_up(m->chunks, (uint64_t)GROUP * 64) + 1, sizeof *m->hint);
	m->bucket = calloc(BUCKETS, sizeof(struct far_partial *));
	if (!m->hint || !m->bucket) {
		munmap((void *)m->word, m->map_len);
		goto fail;
	}
	far_mutex_init(&m->lock);
	far_cond_init(&m->changed);
	*out = m;
	return 0;
fail:
	far_fd_close(&m->fd);
	free((void *)m->hint);
	free(m->bucket);
	free(m);
	return -ENOMEM;
}

void far_chunkmap_close(struct far_chunkmap *m) FAR_NO_TSA
{
	if (!m)
		return;
	FAR_ASSERT(!m->fetches);
	for (unsigned b = 0; b < BUCKETS; b++)
		for (struct far_partial *e = m->bucket[b], *next; e; e = next) {
			next = e->next;
			free(e);
		}
	munmap((void *)m->word, m->map_len);
	close(m->fd);
	free((void *)m->hint);
	free(m->bucket);
	far_cond_fini(&m->changed);
	far_mutex_fini(&m->lock);
	free(m);
}

void far_chunkmap_stop(struct far_chunkmap *m)
{
	far_mutex_lock(&m->lock);
	m->stopped = true;
	for (struct far_fetch *f = m->fetches; f; f = f->next)
		far_cond_broadcast(&f->cond);
	far_cond_broadcast(&m->changed);
	far_mutex_unlock(&m->lock);
}

uint64_t far_chunkmap_chunks(const struct far_chunkmap *m)
{
	return m->chunks;
}

uint64_t far_chunkmap_len(const struct far_chunkmap *m, uint64_t i)
{
	return far_min((uint64_t)1 << m->shift, m->bytes - (i << m->shift));
}

enum far_chunk far_chunkmap_state(struct far_chunkmap *m, uint64_t i)
{
	return state_of(load(m, i));
}

bool far_chunkmap_is_local(struct far_chunkmap *m, uint64_t i)
{
	return is_local(state_of(load(m, i)));
}

uint64_t far_chunkmap_local(struct far_chunkmap *m)
{
	return atomic_load_explicit(&m->local, memory_order_relaxed);
}

uint64_t far_chunkmap_dirty(struct far_chunkmap *m)
{
	return atomic_load_explicit(&m->dirty, memory_order_relaxed);
}

/* ------------------------------------------------------------------------------------------------------- sleeping */

static struct far_fetch *fetch_find_locked(struct far_chunkmap *m, uint64_t i) FAR_REQUIRES(m->lock)
{
	struct far_fetch *f = m->fetches;
	while (f && !(i >= f->first && i - f->first < f->n)) /* the newest first: see struct far_fetch's `at` */
		f = f->next;
	return f;
}

static void fetch_put_locked(struct far_fetch *f)
{
	if (--f->refs == 0) {
		far_cond_fini(&f->cond);
		free(f);
	}
}

static bool in_transit(enum far_chunk s)
{
	return s == FAR_FETCHING || s == FAR_FETCHING_PARTIAL || s == FAR_PUSHING_PARTIAL || s == FAR_FILLING ||
	       s == FAR_EVICTING;
}

int far_chunkmap_wait(struct far_chunkmap *m, uint64_t i)
{
	uint64_t until = far_deadline();
	int err = 0;

	far_mutex_lock(&m->lock);
	struct far_fetch *f = fetch_find_locked(m, i);
	if (f) {
		f->refs++;
		while (!f->done && !m->stopped && !err)
			if (!far_cond_wait_until(&f->cond, &m->lock, until))
				err = -ETIMEDOUT;
		/* Who fetched had less time than this thread: it may try itself. */
		if (f->done)
			err = f->err == -ETIMEDOUT && far_now() < until ? 0 : f->err;
		else if (m->stopped)
			err = -ESHUTDOWN;
		fetch_put_locked(f);
	} else {
		atomic_fetch_add_explicit(&m->waiters, 1, memory_order_seq_cst);
		while (in_transit(state_of(atomic_load(&m->word[i]))) && !fetch_find_locked(m, i) && !err) {
			if (m->stopped)
				err = -ESHUTDOWN;
			else if (!changed_wait_locked(m, until))
				err = -ETIMEDOUT;
		}
		atomic_fetch_sub_explicit(&m->waiters, 1, memory_order_relaxed);
	}
	far_mutex_unlock(&m->lock);
	return err;
}

/* ------------------------------------------------------------------------------------------------------- the pins */

static bool pin_one(struct far_chunkmap *m, uint64_t i)
{
	uint16_t w = load(m, i);

	for (;;) {
		if (!is_local(state_of(w)))
			return false;
		if ((w & PIN_MASK) == PIN_MASK) { /* 127 others are copying; it takes microseconds */
			sched_yield();
			w = load(m, i);
		} else if (cas(m, i, &w, (uint16_t)((w + PIN_ONE) | TOUCHED))) {
			return true;
		}
	}
}

uint64_t far_chunkmap_pin(struct far_chunkmap *m, uint64_t i, uint64_t max)
{
	uint64_t n = 0;
	while (n < max && pin_one(m, i + n))
		n++;
	return n;
}

void far_chunkmap_unpin(struct far_chunkmap *m, uint64_t i, uint64_t n)
{
	for (uint64_t k = i; k < i + n; k++) {
		uint16_t w = atomic_fetch_sub_explicit(&m->word[k], PIN_ONE, memory_order_seq_cst);
		FAR_ASSERT(w & PIN_MASK);
		if (state_of(w) == FAR_FILLING && (w & PIN_MASK) == PIN_ONE)
			changed_wake(m);
	}
}

bool far_chunkmap_test_touched(struct far_chunkmap *m, uint64_t i)
{
	return (load(m, i) & TOUCHED) && (atomic_fetch_and(&m->word[i], (uint16_t)~TOUCHED) & TOUCHED);
}

/* ------------------------------------------------------------------------------------------------- the side table */

static struct far_partial *partial_new_locked(struct far_chunkmap *m, uint64_t i) FAR_REQUIRES(m->lock)
{
	struct far_partial *e = m->n_partial < m->max_partial ? far_partial_new(i, far_chunkmap_len(m, i)) : NULL;

	if (!e)
		return NULL;
	struct far_partial **p = partial_at_locked(m, i);
	e->next = *p;
	*p = e;
	m->n_partial++;
	return e;
}

/* A chunk that is or becomes PARTIAL in `w` goes back to ABSENT if nothing of it is here. */
static uint16_t partial_or_absent_locked(struct far_chunkmap *m, uint64_t i, uint16_t w) FAR_REQUIRES(m->lock)
{
	const struct far_partial *e = *partial_at_locked(m, i);

	return far_partial_empty(e) && !(w & PIN_MASK) ? no_news(with_state(w, FAR_ABSENT)) : with_state(w, FAR_PARTIAL);
}

bool far_chunkmap_pin_partial(struct far_chunkmap *m, uint64_t i, uint64_t from, uint64_t to)
{
	bool got = false;

	if (!is_partial(state_of(load(m, i))))
		return false;
	far_mutex_lock(&m->lock);
	uint16_t w = load(m, i);
	struct far_partial *e = *partial_at_locked(m, i);
	uint64_t a = from, b = 0;
	while (e && !got && is_partial(state_of(w)) &&
	       (!far_partial_missing(e, &a, &b) || a >= to))
		got = (w & PIN_MASK) != PIN_MASK && cas(m, i, &w, (uint16_t)(w + PIN_ONE));
	far_mutex_unlock(&m->lock);
	return got;
}

/* -------------------------------------------------------------------------------------------------------- writers */

/* A write of a part of an absent, half-written or arriving chunk. */
static enum far_claim partial_begin_locked(struct far_chunkmap *m, uint64_t i, uint16_t w, uint64_t from, uint64_t to,
					   unsigned *ragged) FAR_REQUIRES(m->lock)
{
	enum far_chunk s = state_of(w);
	bool fetching = s == FAR_FETCHING || s == FAR_FETCHING_PARTIAL, moving = fetching || s == FAR_PUSHING_PARTIAL;
	bool fresh = s == FAR_ABSENT || s == FAR_FETCHING;
	struct far_partial *e = fresh ? partial_new_locked(m, i) : *partial_at_locked(m, i);

	if (!e)
		return moving ? FAR_CLAIM_WAIT : FAR_CLAIM_FETCH;
	unsigned need = far_partial_ragged(e, from, to);
	if (e->n_ragged + e->pending + need > FAR_PARTIAL_RAGGED)
		return moving ? FAR_CLAIM_WAIT : FAR_CLAIM_FETCH;
	for (;;) {
		bool full = (w & PIN_MASK) == PIN_MASK;
		enum far_chunk to_state = fetching ? FAR_FETCHING_PARTIAL : moving ? s : FAR_PARTIAL;
		uint16_t was = w, next = add_news(m, i, (uint16_t)(with_state(w, to_state) + PIN_ONE), to - from);
		if (!full && cas(m, i, &w, next)) {
			count_news(m, i, was, next);
			break;
		}
		/* Pins come and go without the lock; states with a side table entry change under it. */
		if (full || state_of(w) != s) {
			if (fresh)
				partial_free_locked(m, i);
			return FAR_CLAIM_WAIT;
		}
	}
	if (fresh)
		hint(m, i);
	e->pending += need;
	*ragged = need;
	return FAR_CLAIM_PARTIAL;
}

enum far_claim far_chunkmap_write_begin(struct far_chunkmap *m, uint64_t i, uint64_t from, uint64_t to, unsigned *ragged)
{
	bool whole = from == 0 && to == far_chunkmap_len(m, i);

	*ragged = 0;
	for (;;) {
		uint16_t w = load(m, i);
		enum far_chunk s = state_of(w);

		if (is_local(s)) {
			if (pin_one(m, i))
				return FAR_CLAIM_PRESENT;
		} else if (s == FAR_ABSENT && whole) {
			if (cas(m, i, &w, with_state(w, FAR_FILLING)))
				return FAR_CLAIM_WHOLE;
		} else if (s == FAR_FILLING || s == FAR_EVICTING) {
			return FAR_CLAIM_WAIT;
		} else {
			far_mutex_lock(&m->lock);
			w = load(m, i);
			enum far_claim c = FAR_CLAIM_WAIT;
			bool same = state_of(w) == s;
			if (same)
				c = partial_begin_locked(m, i, w, from, to, ragged);
			far_mutex_unlock(&m->lock);
			if (same)
				return c;
		}
	}
}

/* Mark dirty and drop the pin in one step (invariant 1). False: the chunk is not local; nothing was done. */
static bool present_end(struct far_chunkmap *m, uint64_t i, uint64_t len)
{
	uint16_t w = load(m, i);

	for (;;) {
		enum far_chunk s = state_of(w);
		if (!is_local(s))
			return false;
		enum far_chunk next = s == FAR_CLEAN ? FAR_DIRTY : s == FAR_PUSHING ? FAR_REDIRTY : s;
		uint16_t was = w, is = add_news(m, i, (uint16_t)(with_state(w, next) - PIN_ONE), len);
		if (!cas(m, i, &w, is))
			continue;
		count_news(m, i, was, is);
		if (next != FAR_REDIRTY)
			hint(m, i);
		return true;
	}
}

static void partial_end(struct far_chunkmap *m, uint64_t i, uint64_t from, uint64_t to, unsigned ragged, bool ok)
{
	bool woke = false;

	far_mutex_lock(&m->lock);
	uint16_t w = load(m, i);
	struct far_partial *e = *partial_at_locked(m, i);
	if (is_local(state_of(w))) { /* others have made it whole meanwhile */
		far_mutex_unlock(&m->lock);
		FAR_ASSERT(present_end(m, i, to - from));
		return;
	}
	FAR_ASSERT(e && e->pending >= ragged);
	e->pending -= ragged;
	e->again = true;
	if (ok)
		far_partial_add(e, from, to);
	bool whole = far_partial_whole(e);
	for (;;) {
		enum far_chunk s = state_of(w);
		uint16_t was = w, next = (uint16_t)(w - PIN_ONE);
		if (s == FAR_PARTIAL)
			next = whole ? with_state(next, FAR_DIRTY) : partial_or_absent_locked(m, i, next);
		if (state_of(next) != FAR_ABSENT && !news_of(next)) /* a push has ended since it was counted */
			next = add_news(m, i, next, to - from);
		if (!cas(m, i, &w, next))
			continue;
		count_news(m, i, was, next);
		woke = s == FAR_FILLING && !(next & PIN_MASK);
		if (s == FAR_PARTIAL && state_of(next) != FAR_PARTIAL)
			partial_free_locked(m, i);
		if (s == FAR_PARTIAL && whole)
			count_local(m, i, true);
		break;
	}
	hint(m, i);
	if (woke)
		far_cond_broadcast(&m->changed);
	far_mutex_unlock(&m->lock);
}

void far_chunkmap_write_end(struct far_chunkmap *m, uint64_t i, uint64_t from, uint64_t to, enum far_claim claim,
			    unsigned ragged, bool ok)
{
	if (claim == FAR_CLAIM_PRESENT) {
		/* A failed copy may have changed some bytes: dirty all the same. */
		FAR_ASSERT(present_end(m, i, to - from));
	} else if (claim == FAR_CLAIM_PARTIAL) {
		partial_end(m, i, from, to, ragged, ok);
	} else {
		FAR_ASSERT(claim == FAR_CLAIM_WHOLE);
		uint16_t w = load(m, i), was, is;
		if (ok)
			count_local(m, i, true);
		do {
			was = w;
			is = (uint16_t)(with_state(w, ok ? FAR_DIRTY : FAR_ABSENT) | TOUCHED);
			is = ok ? add_news(m, i, is, to - from) : is;
		} while (!cas(m, i, &w, is));
		count_news(m, i, was, is);
		if (ok)
			hint(m, i);
		changed_wake(m);
	}
}

/* ------------------------------------------------------------------------------------------------------- fetchers */

struct far_fetch *far_chunkmap_claim(struct far_chunkmap *m, uint64_t i, uint64_t max, uint64_t *n)
{
	enum far_chunk s = far_chunkmap_state(m, i);

	*n = 0;
	if (s != FAR_ABSENT && s != FAR_PARTIAL)
		return NULL;
	struct far_fetch *f = calloc(1, sizeof *f);
	if (!f) {
		*n = 1;
		return NULL;
	}
	far_mutex_lock(&m->lock);
	while (*n < max && i + *n < m->chunks) {
		uint16_t w = load(m, i + *n);
		bool got = false;
		do {
			s = state_of(w);
			got = (s == FAR_ABSENT && cas(m, i + *n, &w, with_state(w, FAR_FETCHING))) ||
			      (s == FAR_PARTIAL && cas(m, i + *n, &w, with_state(w, FAR_FETCHING_PARTIAL)));
		} while (!got && (state_of(w) == FAR_ABSENT || state_of(w) == FAR_PARTIAL));
		if (!got)
			break;
		++*n;
	}
	if (*n) {
		f->first = f->at = i;
		f->n = *n;
		f->refs = 1;
		far_cond_init(&f->cond);
		f->next = m->fetches;
		m->fetches = f;
	}
	far_mutex_unlock(&m->lock);
	if (!*n) {
		free(f);
		f = NULL;
	}
	return f;
}

void far_chunkmap_fill_begin(struct far_chunkmap *m, struct far_fetch *f, struct far_partial **e)
{
	uint64_t i = f->at++;
	uint16_t w = load(m, i);

	*e = NULL;
	while (state_of(w) == FAR_FETCHING)
		if (cas(m, i, &w, with_state(w, FAR_FILLING)))
			return;
	FAR_ASSERT(state_of(w) == FAR_FETCHING_PARTIAL);
	far_mutex_lock(&m->lock);
	while (!cas(m, i, &w, with_state(w, FAR_FILLING)))
		;
	atomic_fetch_add_explicit(&m->waiters, 1, memory_order_seq_cst);
	while (atomic_load(&m->word[i]) & PIN_MASK) /* writers in the middle of a copy: microseconds */
		changed_wait_locked(m, FAR_NEVER);
	atomic_fetch_sub_explicit(&m->waiters, 1, memory_order_relaxed);
	*e = *partial_at_locked(m, i);
	far_mutex_unlock(&m->lock);
	FAR_ASSERT(*e);
}

void far_chunkmap_fill_end(struct far_chunkmap *m, uint64_t i, struct far_partial *e, bool ok)
{
	uint16_t w = load(m, i), was, is;

	if (ok)
		count_local(m, i, true);
	if (e) {
		far_mutex_lock(&m->lock);
		do {
			was = w;
			is = !ok ? partial_or_absent_locked(m, i, w) : with_state(w, news_of(w) ? FAR_DIRTY : FAR_CLEAN);
		} while (!cas(m, i, &w, is));
		count_news(m, i, was, is);
		if (state_of(is) != FAR_PARTIAL)
			partial_free_locked(m, i);
		far_mutex_unlock(&m->lock);
		hint(m, i);
	} else {
		while (!cas(m, i, &w, with_state(w, ok ? FAR_CLEAN : FAR_ABSENT)))
			;
	}
	changed_wake(m);
}

void far_chunkmap_fetch_end(struct far_chunkmap *m, struct far_fetch *f, int err)
{
	far_mutex_lock(&m->lock);
	for (uint64_t i = f->at; i < f->first + f->n; i++) {
		uint16_t w = load(m, i), is;
		enum far_chunk s;
		while ((s = state_of(w)) == FAR_FETCHING || s == FAR_FETCHING_PARTIAL) {
			is = s == FAR_FETCHING ? with_state(w, FAR_ABSENT) : partial_or_absent_locked(m, i, w);
			uint16_t was = w;
			if (!cas(m, i, &w, is))
				continue;
			count_news(m, i, was, is);
			if (s == FAR_FETCHING_PARTIAL && state_of(is) == FAR_ABSENT)
				partial_free_locked(m, i);
			break;
		}
	}
	struct far_fetch **p = &m->fetches;
	while (*p != f)
		p = &(*p)->next;
	*p = f->next;
	f->done = true;
	f->err = err;
	far_cond_broadcast(&f->cond);
	if (atomic_load(&m->waiters))
		far_cond_broadcast(&m->changed);
	fetch_put_locked(f);
	far_mutex_unlock(&m->lock);
}

/* ------------------------------------------------------------------------------------------------------- evictors */

bool far_chunkmap_evict_begin(struct far_chunkmap *m, uint64_t i)
{
	uint16_t w = load(m, i);

	while (state_of(w) == FAR_CLEAN && !(w & PIN_MASK))
		if (cas(m, i, &w, (uint16_t)(with_state(w, FAR_EVICTING) & ~TOUCHED)))
			return true;
	if (state_of(w) != FAR_PARTIAL || news_of(w))
		return false;
	bool got = false;
	far_mutex_lock(&m->lock);
	w = load(m, i);
	while (!got && state_of(w) == FAR_PARTIAL && !news_of(w) && !(w & PIN_MASK))
		got = cas(m, i, &w, (uint16_t)(with_state(w, FAR_EVICTING) & ~TOUCHED));
	far_mutex_unlock(&m->lock);
	return got;
}

void far_chunkmap_evict_end(struct far_chunkmap *m, uint64_t i, bool ok)
{
	far_mutex_lock(&m->lock);
	uint16_t w = load(m, i);
	bool entry = *partial_at_locked(m, i) != NULL;
	if (ok && entry)
		partial_free_locked(m, i);
	else if (ok)
		count_local(m, i, false);
	while (!cas(m, i, &w, with_state(w, ok ? FAR_ABSENT : entry ? FAR_PARTIAL : FAR_CLEAN)))
		;
	if (atomic_load(&m->waiters))
		far_cond_broadcast(&m->changed);
	far_mutex_unlock(&m->lock);
}

/* ------------------------------------------------------------------------------------------------ the map's file */

void far_chunkmap_restore(struct far_chunkmap *m, uint64_t i, uint64_t n, bool dirty)
{
	uint64_t len = ((n - 1) << m->shift) + far_chunkmap_len(m, i + n - 1);
	uint16_t w = dirty ? (uint16_t)(FAR_DIRTY | NEWS_ALL << NEWS_SHIFT) : FAR_CLEAN;

	for (uint64_t k = i; k < i + n; k++) {
		atomic_store_explicit(&m->word[k], w, memory_order_relaxed);
		if (dirty)
			hint(m, k);
	}
	atomic_fetch_add_explicit(&m->local, len, memory_order_relaxed);
	if (dirty)
		atomic_fetch_add_explicit(&m->dirty, len, memory_order_relaxed);
}

void far_chunkmap_restore_partial(struct far_chunkmap *m, struct far_partial *e)
{
	uint64_t i = e->chunk, news = far_max((uint64_t)e->n_valid * FAR_PARTIAL_SECTOR, 1);

	far_mutex_lock(&m->lock);
	struct far_partial **p = partial_at_locked(m, i);
	FAR_ASSERT(!*p);
	e->next = NULL;
	*p = e;
	m->n_partial++;
	uint16_t w = add_news(m, i, FAR_PARTIAL, far_min(news, e->len));
	atomic_store_explicit(&m->word[i], w, memory_order_release);
	count_news(m, i, FAR_ABSENT, w);
	hint(m, i);
	far_mutex_unlock(&m->lock);
}

void far_chunkmap_each_partial(struct far_chunkmap *m, void (*fn)(void *opaque, const struct far_partial *e), void *opaque)
{
	far_mutex_lock(&m->lock);
	for (unsigned b = 0; m->n_partial && b < BUCKETS; b++)
		for (const struct far_partial *e = m->bucket[b]; e; e = e->next)
			fn(opaque, e);
	far_mutex_unlock(&m->lock);
}

bool far_chunkmap_is_quiet(struct far_chunkmap *m, uint64_t i)
{
	enum far_chunk s;

	return !(load(m, i) & PIN_MASK) && !holds_news(m, i, &s) && !(load(m, i) & PIN_MASK);
}

void far_chunkmap_check(struct far_chunkmap *m)
{
	uint64_t local = 0, dirty = 0, partial = 0;

	far_mutex_lock(&m->lock);
	for (uint64_t i = 0; i < m->chunks; i++) {
		uint16_t w = load(m, i);
		enum far_chunk s = state_of(w);
		bool entry = *partial_at_locked(m, i) != NULL;

		FAR_ASSERT(s <= FAR_EVICTING);
		FAR_ASSERT(!(w & PIN_MASK) || is_local(s) || entry);
		if (is_partial(s))
			FAR_ASSERT(entry);
		else if (s != FAR_FILLING && s != FAR_EVICTING)
			FAR_ASSERT(!entry);
		FAR_ASSERT((s != FAR_FETCHING && s != FAR_FETCHING_PARTIAL) || fetch_find_locked(m, i));
		local += is_local(s) ? far_chunkmap_len(m, i) : 0;
		dirty += news_of(w) * far_chunkmap_len(m, i) / NEWS_ALL;
		if (s == FAR_DIRTY || s == FAR_PUSHING || s == FAR_REDIRTY || s == FAR_PUSHING_PARTIAL)
			FAR_ASSERT(news_of(w));
		else if (!entry)
			FAR_ASSERT(!news_of(w));
		partial += entry;
	}
	FAR_ASSERT(partial == m->n_partial);
	far_mutex_unlock(&m->lock);
	/* The counters are exact when nobody works. */
	FAR_ASSERT(local == far_chunkmap_local(m));
	FAR_ASSERT(dirty == far_chunkmap_dirty(m));
}
