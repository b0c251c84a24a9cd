/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The chunk map's side for pushers: which chunks hold what the remote lacks, and the arrows of a push. chunkmap.c draws
 * them. */
#include "region/chunkmap_int.h"

bool far_chunkmap_push_begin_one(struct far_chunkmap *m, uint64_t i)
{
	uint16_t w = load(m, i);

	while (state_of(w) == FAR_DIRTY)
		if (cas(m, i, &w, with_state(w, FAR_PUSHING)))
			return true;
	return false;
}

/* The first group at or after g whose hint is set, its bit cleared; or UINT64_MAX. */
static uint64_t hint_take(struct far_chunkmap *m, uint64_t g)
{
	uint64_t groups = far_div_up(m->chunks, GROUP);

	while (g < groups) {
		uint64_t h = atomic_load_explicit(&m->hint[g / 64], memory_order_seq_cst) >> (g % 64);
		if (!h) {
			g = (g / 64 + 1) * 64;
			continue;
		}
		g += (uint64_t)__builtin_ctzll(h);
		atomic_fetch_and_explicit(&m->hint[g / 64], ~((uint64_t)1 << (g % 64)), memory_order_seq_cst);
		return g;
	}
	return UINT64_MAX;
}

bool far_chunkmap_has_news(struct far_chunkmap *m, uint64_t i)
{
	enum far_chunk s;
	return holds_news(m, i, &s);
}

/* Invariant 6: a hint is taken back only when nothing dirty is left in its group. */
static void hint_restore(struct far_chunkmap *m, uint64_t g)
{
	uint64_t end = far_min((g + 1) * GROUP, m->chunks);
	enum far_chunk s;

	for (uint64_t i = g * GROUP; i < end; i++)
		if (holds_news(m, i, &s)) {
			hint(m, i);
			return;
		}
}

bool far_chunkmap_push_begin(struct far_chunkmap *m, uint64_t *cursor, uint64_t max, uint64_t *first, uint64_t *n,
			     bool *partial)
{
	uint64_t i = *cursor;

	*partial = false;
	while (i < m->chunks) {
		uint64_t g = hint_take(m, i / GROUP);
		if (g == UINT64_MAX)
			break;
		i = far_max(i, g * GROUP);
		uint64_t end = far_min((g + 1) * GROUP, m->chunks);
		for (; i < end; i++) {
			enum far_chunk s;
			bool pushing = far_chunkmap_push_begin_one(m, i);
			bool half = !pushing && holds_news(m, i, &s) &&
				    (s == FAR_PARTIAL || s == FAR_FETCHING_PARTIAL || s == FAR_FILLING);
			if (!half && !pushing)
				continue;
			*first = i;
			*n = 1;
			*partial = half;
			while (!half && *n < max && i + *n < m->chunks && far_chunkmap_push_begin_one(m, i + *n))
				++*n;
			hint_restore(m, g);
			*cursor = i + *n;
			return true;
		}
		hint_restore(m, g);
	}
	*cursor = m->chunks;
	return false;
}

void far_chunkmap_push_end(struct far_chunkmap *m, uint64_t first, uint64_t n, bool ok)
{
	for (uint64_t i = first; i < first + n; i++) {
		uint16_t w = load(m, i), was, is;
		do {
			was = w;
			FAR_ASSERT(state_of(w) == FAR_PUSHING || state_of(w) == FAR_REDIRTY);
			is = state_of(w) == FAR_PUSHING && ok ? no_news(with_state(w, FAR_CLEAN)) : with_state(w, FAR_DIRTY);
		} while (!cas(m, i, &w, is));
		count_news(m, i, was, is);
		if (state_of(is) == FAR_DIRTY)
			hint(m, i);
	}
}

bool far_chunkmap_push_begin_partial(struct far_chunkmap *m, uint64_t i, bool crowded, struct far_partial **e)
{
	struct far_partial *copy = far_partial_new(i, far_chunkmap_len(m, i)), *it;
	bool got = false;

	if (!copy)
		return false;
	far_mutex_lock(&m->lock);
	uint16_t w = load(m, i);
	bool room = crowded || m->n_partial <= m->max_partial / 2;
	while (!got && room && state_of(w) == FAR_PARTIAL && news_of(w)) {
		it = *partial_at_locked(m, i);
		if (!it->n_valid && !it->n_ragged) /* the first write is not there yet */
			break;
		if (!cas(m, i, &w, with_state(w, FAR_PUSHING_PARTIAL)))
			continue;
		it->again = false;
		far_partial_copy(copy, it);
		got = true;
	}
	far_mutex_unlock(&m->lock);
	if (!got)
		free(copy);
	else
		*e = copy;
	return got;
}

void far_chunkmap_push_end_partial(struct far_chunkmap *m, uint64_t i, bool ok)
{
	far_mutex_lock(&m->lock);
	struct far_partial *e = *partial_at_locked(m, i);
	bool whole = far_partial_whole(e), clean = ok && !e->again;
	uint16_t w = load(m, i), was, is;
	do {
		was = w;
		FAR_ASSERT(state_of(w) == FAR_PUSHING_PARTIAL);
		is = with_state(w, !whole ? FAR_PARTIAL : clean ? FAR_CLEAN : FAR_DIRTY);
		is = clean ? no_news(is) : is;
	} while (!cas(m, i, &w, is));
	count_news(m, i, was, is);
	if (whole) {
		partial_free_locked(m, i);
		count_local(m, i, true);
	}
	if (!clean)
		hint(m, i);
	if (atomic_load(&m->waiters))
		far_cond_broadcast(&m->changed);
	far_mutex_unlock(&m->lock);
}

bool far_chunkmap_redirty(struct far_chunkmap *m, uint64_t i)
{
	uint16_t w = load(m, i), was, is;

	for (;;) {
		enum far_chunk s = state_of(w);
		if (s == FAR_EVICTING) { /* it will look at the chunk's mark and let go */
			far_thread_yield();
			w = load(m, i);
			continue;
		}
		/* What was pushed and is being filled, was half-written. */
		if (news_of(w) || (s != FAR_CLEAN && s != FAR_PARTIAL && s != FAR_FETCHING_PARTIAL && s != FAR_FILLING))
			return false;
		was = w;
		is = add_news(m, i, s == FAR_CLEAN ? with_state(w, FAR_DIRTY) : w, far_chunkmap_len(m, i));
		if (!cas(m, i, &w, is))
			continue;
		count_news(m, i, was, is);
		hint(m, i);
		return true;
	}
}

void far_chunkmap_each_dirty(struct far_chunkmap *m, void (*fn)(void *opaque, uint64_t i, enum far_chunk s), void *opaque)
{
	uint64_t words = far_div_up(far_div_up(m->chunks, GROUP), 64);

	for (uint64_t h = 0; h < words; h++) {
		uint64_t bits = atomic_load_explicit(&m->hint[h], memory_order_seq_cst);
		while (bits) {
			uint64_t g = h * 64 + (uint64_t)__builtin_ctzll(bits);
			bits &= bits - 1;
			uint64_t end = far_min((g + 1) * GROUP, m->chunks);
			for (uint64_t i = g * GROUP; i < end; i++) {
				enum far_chunk s;
				if (!holds_news(m, i, &s))
					continue;
				if (s == FAR_PUSHING_PARTIAL) { /* PUSHING and REDIRTY in one */
					far_mutex_lock(&m->lock);
					const struct far_partial *e = *partial_at_locked(m, i);
					s = e && e->again ? FAR_REDIRTY : e ? FAR_PUSHING : far_chunkmap_state(m, i);
					far_mutex_unlock(&m->lock);
				}
				fn(opaque, i, s);
			}
		}
	}
}
