/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The inside of the chunk map, for chunkmap.c, whose head explains it, and chunkmap_push.c. */
#ifndef FAR_CHUNKMAP_INT_H
#define FAR_CHUNKMAP_INT_H

#include "base/clock.h"
#include "base/thread.h"
#include "region/chunkmap.h"
#include "region/partial.h"

#include <stdatomic.h>
#include <stdlib.h>

#define STATE_MASK 0x000fu
#define PIN_ONE 0x0010u
#define PIN_MASK 0x07f0u
#define TOUCHED 0x0800u
#define NEWS_SHIFT 12
#define NEWS_ALL 15u /* fifteenths of a chunk */

#define BUCKETS 1024u
#define GROUP 64u

struct far_fetch {
	struct far_fetch *next;
	uint64_t first, n;
	uint64_t at;   /* owner only: chunks before it were handed to fill_begin and may be anybody's by now */
	unsigned refs; /* the owner and everyone who waits */
	bool done;
	int err;
	struct far_cond cond;
};

struct far_chunkmap {
	/* fixed after open */
	uint64_t bytes, chunks;
	unsigned shift;
	uint32_t max_partial;
	int fd;
	size_t map_len;
	_Atomic uint16_t *word;
	_Atomic uint64_t *hint; /* bit g: chunks [64g, 64g+64) may hold dirty ones */

	/* atomic */
	_Atomic uint64_t local, dirty;
	_Atomic unsigned waiters; /* that sleep on `changed` */

	struct far_mutex lock;
	struct far_cond changed;
	struct far_partial **bucket FAR_GUARDED_BY(lock);
	uint32_t n_partial FAR_GUARDED_BY(lock);
	struct far_fetch *fetches FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
};

static inline enum far_chunk state_of(uint16_t w)
{
	return (enum far_chunk)(w & STATE_MASK);
}

static inline uint16_t with_state(uint16_t w, enum far_chunk s)
{
	return (uint16_t)((w & ~STATE_MASK) | s);
}

static inline bool is_local(enum far_chunk s)
{
	return s >= FAR_CLEAN && s <= FAR_REDIRTY;
}

static inline bool is_partial(enum far_chunk s)
{
	return s == FAR_PARTIAL || s == FAR_FETCHING_PARTIAL || s == FAR_PUSHING_PARTIAL;
}

static inline bool cas(struct far_chunkmap *m, uint64_t i, uint16_t *w, uint16_t to)
{
	return atomic_compare_exchange_weak_explicit(&m->word[i], w, to, memory_order_seq_cst, memory_order_acquire);
}

static inline uint16_t load(struct far_chunkmap *m, uint64_t i)
{
	return atomic_load_explicit(&m->word[i], memory_order_acquire);
}

static inline void count_local(struct far_chunkmap *m, uint64_t i, bool add)
{
	uint64_t len = far_chunkmap_len(m, i);
	atomic_fetch_add_explicit(&m->local, add ? len : -len, memory_order_relaxed);
}

static inline unsigned news_of(uint16_t w)
{
	return w >> NEWS_SHIFT;
}

/* The word after `len` more bytes were written into chunk i. */
static inline uint16_t add_news(const struct far_chunkmap *m, uint64_t i, uint16_t w, uint64_t len)
{
	uint64_t more = far_div_up(len * NEWS_ALL, far_chunkmap_len(m, i));
	unsigned news = (unsigned)far_min(news_of(w) + more, NEWS_ALL);
	return (uint16_t)((w & ((1u << NEWS_SHIFT) - 1)) | news << NEWS_SHIFT);
}

static inline uint16_t no_news(uint16_t w)
{
	return (uint16_t)(w & ((1u << NEWS_SHIFT) - 1));
}

/* After a swap from `was` to `is`. */
static inline void count_news(struct far_chunkmap *m, uint64_t i, uint16_t was, uint16_t is)
{
	uint64_t len = far_chunkmap_len(m, i);
	uint64_t a = news_of(was) * len / NEWS_ALL, b = news_of(is) * len / NEWS_ALL;

	if (a != b)
		atomic_fetch_add_explicit(&m->dirty, b - a, memory_order_relaxed);
}

static inline void hint(struct far_chunkmap *m, uint64_t i)
{
	uint64_t g = i / GROUP;
	_Atomic uint64_t *h = &m->hint[g / 64];
	uint64_t bit = (uint64_t)1 << (g % 64);

	if (!(atomic_load_explicit(h, memory_order_seq_cst) & bit))
		atomic_fetch_or_explicit(h, bit, memory_order_seq_cst);
}

/* Holds something the remote lacks. */
static inline bool holds_news(struct far_chunkmap *m, uint64_t i, enum far_chunk *s)
{
	uint16_t w = load(m, i);

	*s = state_of(w);
	return news_of(w) > 0;
}

/* Pairs with the increment of `waiters` in changed_wait(): either the waiter sees the new word or we see the waiter. */
static inline void changed_wake(struct far_chunkmap *m) FAR_EXCLUDES(m->lock)
{
	if (atomic_load_explicit(&m->waiters, memory_order_seq_cst)) {
		far_mutex_lock(&m->lock);
		far_cond_broadcast(&m->changed);
		far_mutex_unlock(&m->lock);
	}
}

static inline bool changed_wait_locked(struct far_chunkmap *m, uint64_t until) FAR_REQUIRES(m->lock)
{
	return far_cond_wait_until(&m->changed, &m->lock, until);
}

static inline struct far_partial **partial_at_locked(struct far_chunkmap *m, uint64_t i) FAR_REQUIRES(m->lock)
{
	struct far_partial **p = &m->bucket[(i * 0x9e3779b97f4a7c15u >> 32) % BUCKETS];
	while (*p && (*p)->chunk != i)
		p = &(*p)->next;
	return p;
}

static inline void partial_free_locked(struct far_chunkmap *m, uint64_t i) FAR_REQUIRES(m->lock)
{
	struct far_partial **p = partial_at_locked(m, i), *e = *p;
	FAR_ASSERT(e);
	*p = e->next;
	m->n_partial--;
	free(e);
}

#endif
