/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * How memory is used while the clock runs: the same loops for a pointer (bench_pointer.c) and for what it is held against
 * (bench/bare.c), which has nothing of farpage in it but this.
 */
#ifndef FAR_BENCH_TOUCH_H
#define FAR_BENCH_TOUCH_H

#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define TOUCH_PAGE 4096

static inline uint64_t touch_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static inline void touch_pause(uint64_t ns)
{
	struct timespec ts = { 0, (long)ns };

	if (ns)
		nanosleep(&ts, NULL);
}

static inline uint64_t touch_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15u);

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

/* One word of a page, which the compiler cannot leave out. */
static inline uint64_t touch_read(const void *p)
{
	return *(const volatile uint64_t *)p;
}

/* The first word of each page, in order. */
static inline uint64_t touch_pages(const char *p, size_t len)
{
	uint64_t sum = 0;

	for (size_t at = 0; at < len; at += TOUCH_PAGE)
		sum += touch_read(p + at);
	return sum;
}

/* Every word. */
static inline uint64_t touch_sum(const char *p, size_t len)
{
	const uint64_t *w = (const uint64_t *)(const void *)p;
	uint64_t a = 0, b = 0, c = 0, d = 0;

	for (size_t i = 0; i < len / 8; i += 4) {
		a += w[i];
		b += w[i + 1];
		c += w[i + 2];
		d += w[i + 3];
	}
	return a + b + c + d;
}

/* The first word of each page is stored. */
static inline void touch_store_pages(char *p, size_t len, uint64_t word)
{
	for (size_t at = 0; at < len; at += TOUCH_PAGE)
		*(volatile uint64_t *)(void *)(p + at) = word + at;
}

/* The numbers 0 to n-1 in random order; NULL without memory. */
static inline uint32_t *touch_shuffled(uint32_t n, uint64_t seed)
{
	uint32_t *v = malloc(n * sizeof *v);

	for (uint32_t i = 0; v && i < n; i++) {
		uint32_t j = (uint32_t)(touch_random(&seed) % (i + 1));
		v[i] = v[j];
		v[j] = i;
	}
	return v;
}

static inline int touch_compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

struct touch_times {
	uint64_t p50, p99, longest, mean;
};

/* Sorts them. */
static inline struct touch_times touch_times(uint64_t *ns, size_t n)
{
	struct touch_times t = { 0 };

	if (!n)
		return t;
	qsort(ns, n, sizeof *ns, touch_compare);
	for (size_t i = 0; i < n; i++)
		t.mean += ns[i];
	t.p50 = ns[n / 2];
	t.p99 = ns[n - 1 - n / 100];
	t.longest = ns[n - 1];
	t.mean /= n;
	return t;
}

/*
 * One word of a random page in each of `n` chunks, in the order given, with a pause before each, and before that whatever
 * settle() waits for when i chunks have been touched, if there is one; ns[] takes the times. Returns how many of the words were
 * not what belongs there.
 */
static inline uint64_t touch_chunks(const char *p, const uint32_t *order, size_t n, uint64_t chunk, uint64_t pause,
				    uint64_t seed, uint64_t *ns, uint64_t (*word)(uint64_t off),
				    void (*settle)(void *arg, size_t i), void *arg)
{
	uint64_t wrong = 0;

	for (size_t i = 0; i < n; i++) {
		uint64_t off = order[i] * chunk + touch_random(&seed) % (chunk / TOUCH_PAGE) * TOUCH_PAGE;
		if (settle)
			settle(arg, i);
		touch_pause(pause);
		uint64_t begin = touch_now(), got = touch_read(p + off);
		ns[i] = touch_now() - begin;
		wrong += got != word(off);
	}
	return wrong;
}

#endif
