/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "region/unstable.h"

#include "base/clock.h"

#include <stdlib.h>

static int unstable_set_init(struct far_unstable_set *s, uint64_t words)
{
	s->word = calloc((size_t)words, sizeof *s->word);
	s->sum = calloc((size_t)far_div_up(words, 64), sizeof *s->sum);
	return s->word && s->sum ? 0 : -ENOMEM;
}

int far_unstable_init(struct far_unstable *u, uint64_t chunks)
{
	u->words = chunks / 64 + 1;
	u->since = FAR_NEVER;
	int err = unstable_set_init(&u->fresh, u->words);
	if (!err)
		err = unstable_set_init(&u->covered, u->words);
	if (err)
		far_unstable_fini(u);
	return err;
}

void far_unstable_fini(struct far_unstable *u)
{
	free((void *)u->fresh.word);
	free(u->fresh.sum);
	free((void *)u->covered.word);
	free(u->covered.sum);
	*u = (struct far_unstable){ 0 };
}

static void unstable_or(struct far_unstable_set *s, uint64_t w, uint64_t bits)
{
	atomic_fetch_or_explicit(&s->word[w], bits, memory_order_seq_cst);
	s->sum[w / 64] |= (uint64_t)1 << (w % 64);
	s->any = true;
}

void far_unstable_add(struct far_unstable *u, uint64_t first, uint64_t n)
{
	if (!far_unstable_any(u))
		u->since = far_now();
	for (uint64_t i = first; i < first + n; i++)
		unstable_or(&u->fresh, i / 64, (uint64_t)1 << (i % 64));
}

bool far_unstable_has(const struct far_unstable *u, uint64_t i)
{
	uint64_t bit = (uint64_t)1 << (i % 64);

	/* In this order: cover() sets it there before it takes it away here. */
	return (atomic_load_explicit(&u->fresh.word[i / 64], memory_order_seq_cst) & bit) ||
	       (atomic_load_explicit(&u->covered.word[i / 64], memory_order_seq_cst) & bit);
}

/* The next word at or after *w that is not zero. */
static bool unstable_next(const struct far_unstable *u, const struct far_unstable_set *s, uint64_t *w)
{
	while (*w < u->words) {
		uint64_t h = s->sum[*w / 64] >> (*w % 64);
		if (h) {
			*w += (uint64_t)__builtin_ctzll(h);
			return true;
		}
		*w = (*w / 64 + 1) * 64;
	}
	return false;
}

static void unstable_clear(const struct far_unstable *u, struct far_unstable_set *s)
{
	for (uint64_t w = 0; s->any && unstable_next(u, s, &w); w++) {
		atomic_store_explicit(&s->word[w], 0, memory_order_seq_cst);
		s->sum[w / 64] &= ~((uint64_t)1 << (w % 64));
	}
	s->any = false;
}

void far_unstable_cover(struct far_unstable *u)
{
	for (uint64_t w = 0; u->fresh.any && unstable_next(u, &u->fresh, &w); w++)
		unstable_or(&u->covered, w, atomic_load_explicit(&u->fresh.word[w], memory_order_relaxed));
	unstable_clear(u, &u->fresh);
}

void far_unstable_settle(struct far_unstable *u, uint64_t began)
{
	unstable_clear(u, &u->covered);
	u->since = u->fresh.any ? began : FAR_NEVER;
}

void far_unstable_take(struct far_unstable *u, void (*fn)(void *opaque, uint64_t i), void *opaque)
{
	/* The marks stay until fn has run: an evictor must not find the chunk without one before. */
	struct far_unstable_set *set[] = { &u->covered, &u->fresh };

	for (unsigned k = 0; k < 2; k++)
		for (uint64_t w = 0; set[k]->any && unstable_next(u, set[k], &w); w++) {
			uint64_t bits = atomic_load_explicit(&set[k]->word[w], memory_order_relaxed);
			for (; bits; bits &= bits - 1)
				fn(opaque, w * 64 + (uint64_t)__builtin_ctzll(bits));
		}
	unstable_clear(u, &u->covered);
	unstable_clear(u, &u->fresh);
	u->since = FAR_NEVER;
}
