/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The window of a pull over a link that is computed here: used nearly whole, with hardly a queue, whatever happens. */
#include "region/pace.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#define FLYING 65536

struct link {
	double rate; /* bytes a second */
	uint64_t trip; /* there and back */
	uint64_t stall_every, stall; /* the client has no CPU for so long */
	uint64_t extent;
	/* the link and what is on its way */
	uint64_t now, free, inflight;
	struct {
		uint64_t began, comes;
	} fly[FLYING];
	unsigned head, tail;
	struct far_pace pace;
	/* what was seen since the last look */
	uint64_t since, bytes, waits, waits_n, longest;
};

static void ask(struct link *l)
{
	while (!l->inflight || l->inflight + l->extent <= far_pace_window(&l->pace, l->now)) {
		uint64_t there = l->now + l->trip / 2, wait = l->free > there ? l->free - there : 0;
		l->free = there + wait + (uint64_t)((double)l->extent * 1e9 / l->rate);
		l->fly[l->head % FLYING].began = l->now;
		l->fly[l->head++ % FLYING].comes = l->free + l->trip / 2;
		l->inflight += l->extent;
		assert_true(l->head - l->tail < FLYING);
		l->waits += wait;
		l->waits_n++;
		l->longest = far_max(l->longest, wait);
	}
	l->pace.full = true;
}

static uint64_t seen(const struct link *l, uint64_t comes)
{
	uint64_t into = l->stall_every ? comes % l->stall_every : l->stall;

	return l->stall_every && into < l->stall ? comes - into + l->stall : comes;
}

static void run(struct link *l, uint64_t ns)
{
	uint64_t end = l->now + ns;

	l->since = l->now;
	l->bytes = l->waits = l->waits_n = l->longest = 0;
	while (l->now < end) {
		ask(l);
		unsigned i = l->tail++ % FLYING;
		l->now = far_max(l->now, seen(l, l->fly[i].comes));
		l->inflight -= l->extent;
		l->bytes += l->extent;
		far_pace_arrived(&l->pace, l->extent, l->fly[i].began, l->now, l->extent);
	}
}

static double used(const struct link *l)
{
	return (double)l->bytes * 1e9 / (double)(l->now - l->since) / l->rate;
}

static double wait_ms(const struct link *l)
{
	return l->waits_n ? (double)l->waits / (double)l->waits_n / 1e6 : 0;
}

static struct link *begin(double rate, uint64_t trip)
{
	struct link *l = calloc(1, sizeof *l);

	assert_non_null(l);
	l->rate = rate;
	l->trip = trip;
	l->extent = 64 * FAR_KIB;
	l->now = FAR_SEC;
	far_pace_init(&l->pace, FAR_MIB, false, 128 * FAR_MIB, l->now);
	return l;
}

static void test_far(void **state)
{
	static const unsigned trips[] = { 5, 10, 40, 100 };

	for (size_t i = 0; i < FAR_ARRAY_LEN(trips); i++)
		for (double rate = 15e6; rate < 1e9; rate *= 8) {
			struct link *l = begin(rate, trips[i] * FAR_MSEC);
			run(l, (trips[i] * 25) * FAR_MSEC);
			run(l, 8 * FAR_SEC);
			double own = 64 * 1024e3 / rate; /* ms that an extent takes on the link */
			printf("%u ms, %.0f MB/s: used %.3f, wait %.2f ms, longest %.2f\n", trips[i], rate / 1e6, used(l), wait_ms(l),
			       (double)l->longest / 1e6);
			assert_true(used(l) >= 0.9);
			assert_true(wait_ms(l) < 0.3 + trips[i] / 12.0 + 1.5 * own);
			free(l);
		}
}

/* Whoever waits for something while the window is still to be found does not wait for long. */
static void test_start(void **state)
{
	for (unsigned trip = 10; trip <= 100; trip *= 2) {
		struct link *l = begin(120e6, trip * FAR_MSEC);
		run(l, 4 * trip * FAR_MSEC);
		double first = (double)l->longest / 1e6;
		run(l, 12 * trip * FAR_MSEC);
		double then = (double)l->longest / 1e6;
		printf("%u ms: longest wait %.2f ms, then %.2f; used %.3f of 12 round trips\n", trip, first, then, used(l));
		assert_true(far_max(first, then) < 9 + 0.4 * trip); /* the first requests go out together */
		assert_true(used(l) >= 0.6);
		free(l);
	}
}

/* Another rate: a lower one is felt as a queue that goes away, a higher one is found. */
static void test_changes(void **state)
{
	struct link *l = begin(120e6, 10 * FAR_MSEC);

	run(l, 2 * FAR_SEC);
	l->rate = 30e6;
	run(l, 2 * FAR_SEC);
	run(l, 2 * FAR_SEC);
	printf("slower: used %.3f, wait %.2f ms\n", used(l), wait_ms(l));
	assert_true(used(l) >= 0.9 && wait_ms(l) < 8);
	l->rate = 120e6;
	run(l, 2 * FAR_SEC);
	run(l, 2 * FAR_SEC);
	printf("faster: used %.3f, wait %.2f ms\n", used(l), wait_ms(l));
	assert_true(used(l) >= 0.9 && wait_ms(l) < 2);
	l->trip = 30 * FAR_MSEC;
	run(l, 25 * FAR_SEC);
	run(l, 2 * FAR_SEC);
	printf("longer: used %.3f, wait %.2f ms\n", used(l), wait_ms(l));
	assert_true(used(l) >= 0.9 && wait_ms(l) < 3);
	free(l);
}

/* A host whose CPUs are busy does not make the window small: what it could use meanwhile, it uses. */
static void test_stalls(void **state)
{
	for (unsigned every = 50; every <= 400; every *= 2) {
		struct link *l = begin(120e6, 10 * FAR_MSEC);
		l->stall_every = every * FAR_MSEC;
		l->stall = 20 * FAR_MSEC;
		run(l, 2 * FAR_SEC);
		run(l, 5 * FAR_SEC);
		double most = 1 - (20.0 - 10) / every; /* what is on its way when a stall begins still comes */
		printf("stalls each %u ms: used %.3f of %.3f, wait %.2f ms\n", every, used(l), most, wait_ms(l));
		assert_true(used(l) >= 0.7 * most);
		free(l);
	}
}

static void test_near_and_fixed(void **state)
{
	struct link *l = begin(1e9, 100 * FAR_USEC);

	run(l, FAR_SEC);
	assert_false(far_pace_is_far(&l->pace));
	assert_true(used(l) >= 0.95);
	free(l);
	l = begin(120e6, 40 * FAR_MSEC);
	far_pace_init(&l->pace, FAR_MIB, true, 128 * FAR_MIB, l->now);
	run(l, FAR_SEC);
	assert_int_equal(far_pace_window(&l->pace, l->now), FAR_MIB);
	free(l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_far),
		cmocka_unit_test(test_start),
		cmocka_unit_test(test_changes),
		cmocka_unit_test(test_stalls),
		cmocka_unit_test(test_near_and_fixed),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
