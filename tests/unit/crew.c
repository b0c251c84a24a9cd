/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Leader and followers: a seat always has its receiver while others block, parked work runs, everything ends. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/crew.h"
#include "base/thread.h"

#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmocka.h>

#define LIMIT (20 * FAR_SEC)

/* A counter of requests that receivers take from, and a door at which the slow ones wait. */
struct desk {
	struct far_mutex lock;
	struct far_cond changed;
	unsigned todo;              /* requests that wait */
	bool shut;                  /* no more will come */
	bool slow, open;            /* requests block until open */
	unsigned blocked, max_blocked, done, parked, settled, ended, receiving, max_receiving;
	int cpu;                    /* where requests must be taken, -1 anywhere */
	bool wrong_cpu;
};

static void desk_init(struct desk *d)
{
	*d = (struct desk){ .cpu = -1 };
	far_mutex_init(&d->lock);
	far_cond_init(&d->changed);
}

static void desk_wait(struct desk *d, const unsigned *what, unsigned n)
{
	uint64_t until = far_now() + LIMIT;

	far_mutex_lock(&d->lock);
	while (*what < n && far_cond_wait_until(&d->changed, &d->lock, until))
		;
	assert_true(*what >= n);
	far_mutex_unlock(&d->lock);
}

static void desk_block(struct desk *d)
{
	far_mutex_lock(&d->lock);
	if (++d->blocked > d->max_blocked)
		d->max_blocked = d->blocked;
	far_cond_broadcast(&d->changed);
	while (!d->open)
		far_cond_wait(&d->changed, &d->lock);
	d->blocked--;
	d->done++;
	far_cond_broadcast(&d->changed);
	far_mutex_unlock(&d->lock);
}

static void desk_parked(void *arg)
{
	desk_block(arg);
}

/* A slow request has been left for or parked: what is parked from now on comes behind it. */
static void desk_settled(struct desk *d)
{
	far_mutex_lock(&d->lock);
	d->settled++;
	far_cond_broadcast(&d->changed);
	far_mutex_unlock(&d->lock);
}

static bool desk_run(void *opaque, struct far_seat *seat)
{
	struct desk *d = opaque;

	far_mutex_lock(&d->lock);
	if (++d->receiving > d->max_receiving)
		d->max_receiving = d->receiving;
	while (!d->todo && !d->shut)
		far_cond_wait(&d->changed, &d->lock);
	d->receiving--;
	bool got = d->todo > 0, slow = d->slow;
	if (got)
		d->todo--;
	if (d->cpu >= 0 && sched_getcpu() != d->cpu)
		d->wrong_cpu = true;
	if (got && !slow) {
		d->done++;
		far_cond_broadcast(&d->changed);
	}
	far_mutex_unlock(&d->lock);
	if (!got)
		return false;
	if (!slow)
		return true;
	if (far_crew_leave(seat)) {
		assert_true(far_crew_leave(seat)); /* once more is harmless */
		desk_settled(d);
		desk_block(d);
		return false; /* does not count any more */
	}
	far_mutex_lock(&d->lock);
	d->parked++;
	far_cond_broadcast(&d->changed);
	far_mutex_unlock(&d->lock);
	assert_int_equal(far_crew_park(seat, desk_parked, d), 0);
	desk_settled(d);
	return true;
}

static void desk_ended(void *opaque)
{
	struct desk *d = opaque;

	far_mutex_lock(&d->lock);
	d->ended++;
	far_cond_broadcast(&d->changed);
	far_mutex_unlock(&d->lock);
}

static void desk_set(struct desk *d, unsigned todo, bool slow, bool open, bool shut)
{
	far_mutex_lock(&d->lock);
	d->todo += todo;
	d->slow = slow;
	d->open = open;
	d->shut = shut;
	far_cond_broadcast(&d->changed);
	far_mutex_unlock(&d->lock);
}

static void desk_fini(struct desk *d)
{
	far_cond_fini(&d->changed);
	far_mutex_fini(&d->lock);
}

static void test_empty(void **state)
{
	struct far_crew *c = NULL;

	assert_int_equal(far_crew_open(&c, "a name that is too long for it", 0), 0);
	far_crew_close(c);
	far_crew_close(NULL);
}

static void test_fast(void **state)
{
	struct far_crew *c;
	struct desk d;

	desk_init(&d);
	assert_int_equal(far_crew_open(&c, "t", 8), 0);
	assert_int_equal(far_crew_seat(c, -1, desk_run, desk_ended, &d), 0);
	desk_set(&d, 1000, false, false, false);
	desk_wait(&d, &d.done, 1000);
	assert_int_equal(d.max_receiving, 1);
	desk_set(&d, 0, false, false, true);
	far_crew_close(c);
	assert_int_equal(d.ended, 1);
	desk_fini(&d);
}

/* All but one of the threads block, the seat goes on receiving, and what is too much is parked and done later. */
static void test_block(void **state)
{
	struct far_crew *c;
	struct desk d;

	desk_init(&d);
	assert_int_equal(far_crew_open(&c, "t", 16), 0);
	assert_int_equal(far_crew_seat(c, -1, desk_run, desk_ended, &d), 0);
	desk_set(&d, 40, true, false, false);
	desk_wait(&d, &d.blocked, 15);
	desk_wait(&d, &d.parked, 25);
	assert_int_equal(d.max_receiving, 1);
	desk_set(&d, 5, false, false, false); /* fast ones are still served */
	desk_wait(&d, &d.done, 5);
	assert_int_equal(d.max_blocked, 15);
	desk_set(&d, 0, false, false, true); /* nobody sits any more, but the seat has not ended */
	desk_wait(&d, &d.blocked, 16);
	assert_int_equal(d.ended, 0);
	desk_set(&d, 0, true, true, true);
	far_crew_close(c);
	assert_int_equal(d.done, 45);
	assert_int_equal(d.ended, 1);
	desk_fini(&d);
}

static void test_pinned(void **state)
{
	struct far_crew *c;
	struct desk d[2];
	cpu_set_t mask;
	int cpu[2] = { -1, -1 };

	assert_int_equal(sched_getaffinity(0, sizeof mask, &mask), 0);
	for (int i = 0; i < CPU_SETSIZE; i++) {
		if (CPU_ISSET(i, &mask)) {
			cpu[0] = cpu[0] < 0 ? i : cpu[0];
			cpu[1] = i;
		}
	}
	assert_int_equal(far_crew_open(&c, "t", 32), 0);
	for (int i = 0; i < 2; i++) {
		desk_init(&d[i]);
		d[i].cpu = cpu[i];
		assert_int_equal(far_crew_seat(c, cpu[i], desk_run, desk_ended, &d[i]), 0);
	}
	for (unsigned round = 1; round <= 20; round++) {
		for (int i = 0; i < 2; i++)
			desk_set(&d[i], 5, true, false, false);
		for (int i = 0; i < 2; i++)
			desk_wait(&d[i], &d[i].blocked, 5);
		for (int i = 0; i < 2; i++)
			desk_set(&d[i], 0, true, true, false);
		for (int i = 0; i < 2; i++)
			desk_wait(&d[i], &d[i].done, round * 5);
	}
	for (int i = 0; i < 2; i++)
		desk_set(&d[i], 0, false, true, true);
	far_crew_close(c);
	for (int i = 0; i < 2; i++) {
		assert_false(d[i].wrong_cpu);
		assert_int_equal(d[i].ended, 1);
		desk_fini(&d[i]);
	}
}

/* Seats come and go, one thread is always left over. */
static void test_seats(void **state)
{
	struct far_crew *c;
	struct desk d[8];

	assert_int_equal(far_crew_open(&c, "t", 5), 0);
	for (int i = 0; i < 8; i++) {
		desk_init(&d[i]);
		assert_int_equal(far_crew_seat(c, -1, desk_run, desk_ended, &d[i]), i < 4 ? 0 : -EAGAIN);
	}
	for (int i = 0; i < 4; i++) {
		desk_set(&d[i], 10, true, false, false);
		/* All of them: a later desk's must not stand before this one's, whose desk opens first. */
		desk_wait(&d[i], &d[i].settled, 10);
		assert_true(d[i].parked >= 9); /* the fifth thread may have been free for one */
	}
	for (int i = 0; i < 4; i++) {
		desk_set(&d[i], 0, true, true, true);
		desk_wait(&d[i], &d[i].ended, 1);
		assert_int_equal(d[i].done, 10);
	}
	for (int i = 4; i < 8; i++) {
		/* The seats before have ended, perhaps not yet been counted out. */
		uint64_t until = far_now() + LIMIT;
		int r;
		while ((r = far_crew_seat(c, -1, desk_run, desk_ended, &d[i])) == -EAGAIN && far_now() < until)
			sched_yield();
		assert_int_equal(r, 0);
		desk_set(&d[i], 10, false, true, true);
	}
	far_crew_close(c);
	for (int i = 0; i < 8; i++) {
		assert_int_equal(d[i].done, 10);
		desk_fini(&d[i]);
	}
}

static unsigned threads_here(void)
{
	FILE *f = fopen("/proc/self/status", "re");
	char line[200];
	unsigned n = 0;

	assert_non_null(f);
	while (fgets(line, sizeof line, f))
		sscanf(line, "Threads: %u", &n);
	fclose(f);
	return n;
}

static void test_shrink(void **state)
{
	struct far_crew *c;
	struct desk d;
	unsigned before = threads_here();

	desk_init(&d);
	assert_int_equal(far_crew_open(&c, "t", 64), 0);
	assert_int_equal(far_crew_seat(c, -1, desk_run, desk_ended, &d), 0);
	desk_set(&d, 40, true, false, false);
	desk_wait(&d, &d.blocked, 40);
	assert_true(threads_here() >= before + 41);
	desk_set(&d, 0, true, true, false);
	desk_wait(&d, &d.done, 40);
	uint64_t until = far_now() + LIMIT;
	while (threads_here() > before + 5 && far_now() < until)
		far_sleep_until(far_now() + 20 * FAR_MSEC, false);
	assert_true(threads_here() <= before + 5);
	desk_set(&d, 0, true, true, true);
	far_crew_close(c);
	desk_fini(&d);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_empty),  cmocka_unit_test(test_fast),  cmocka_unit_test(test_block),
		cmocka_unit_test(test_pinned), cmocka_unit_test(test_seats), cmocka_unit_test(test_shrink),
	};
	return cmocka_run_group_tests_name("crew", tests, NULL, NULL);
}
