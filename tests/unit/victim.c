/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The second chance of evicted chunks: what limbo gives back and forgets, and that a hot set survives a scan. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "frontend/victim.h"

#include "frontend/uffd.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define SHIFT 16
#define CHUNK ((uint64_t)1 << SHIFT)
#define CHUNKS 128
#define BUDGET (64 * CHUNK)
#define BYTES (CHUNKS * CHUNK - 100)

static char below_bytes[CHUNKS * CHUNK];
static _Atomic unsigned below_reads[CHUNKS];
static _Atomic unsigned below_calls;

static int below_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	(void)self, (void)flags;
	memcpy(buf, below_bytes + off, len);
	atomic_fetch_add(&below_calls, 1);
	for (uint64_t i = off >> SHIFT; i <= (off + len - 1) >> SHIFT; i++)
		atomic_fetch_add(&below_reads[i], 1);
	return 0;
}

static int below_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	(void)self, (void)flags;
	memcpy(below_bytes + off, buf, len);
	return 0;
}

static int below_flush(void *self)
{
	(void)self;
	return 0;
}

static struct far_backend *below_open(void)
{
	static const struct far_ops ops = { .size = sizeof ops, .read = below_read, .write = below_write, .flush = below_flush };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_backend *b;

	for (uint64_t i = 0; i < sizeof below_bytes; i++)
		below_bytes[i] = (char)(i / 4096 * 5 + i % 251 + 1);
	for (int i = 0; i < CHUNKS; i++)
		atomic_store(&below_reads[i], 0);
	atomic_store(&below_calls, 0);
	facts.bytes = BYTES;
	facts.caps = FAR_CAP_WRITE;
	assert_int_equal(far_backend_new(&ops, below_bytes, &facts, &b), 0);
	return b;
}

static char buf[8 * CHUNK];

static void put(struct far_victim *v, uint64_t i)
{
	uint64_t len = far_min(CHUNK, BYTES - i * CHUNK);

	far_victim_put(v, i * CHUNK, below_bytes + i * CHUNK, len, far_victim_epoch(v));
}

/* Read chunks [i, i+n); how many calls that cost below. */
static unsigned reads(struct far_backend *b, uint64_t i, uint64_t n)
{
	uint64_t len = far_min(n * CHUNK, BYTES - i * CHUNK);

	atomic_store(&below_calls, 0);
	memset(buf, 0xee, sizeof buf);
	assert_int_equal(far_read(b, i * CHUNK, buf, len, 0), 0);
	assert_memory_equal(buf, below_bytes + i * CHUNK, len);
	return atomic_load(&below_calls);
}

static void gives_back(void **state)
{
	struct far_victim *v;
	struct far_backend *b;

	(void)state;
	assert_int_equal(far_victim_new(below_open(), SHIFT, 4 * CHUNK, &v, &b), 0);
	far_victim_own(v);
	put(v, 3);
	put(v, 5);
	put(v, CHUNKS - 1);
	assert_int_equal(reads(b, CHUNKS - 1, 1), 0); /* the short one */
	assert_int_equal(reads(b, 3, 1), 0);
	assert_int_equal(reads(b, 3, 1), 1); /* it was taken out */
	put(v, 3);
	assert_int_equal(reads(b, 2, 5), 3); /* 2, 4, 6 */
	assert_int_equal(far_victim_hits(v), 4);
	assert_true(far_victim_spare(v, 5 * CHUNK));
	assert_false(far_victim_spare(v, 5 * CHUNK)); /* once */
	assert_false(far_victim_spare(v, 6 * CHUNK));
	/* Part of a chunk is read past it. */
	put(v, 7);
	assert_int_equal(far_read(b, 7 * CHUNK, buf, 4096, 0), 0);
	assert_int_equal(reads(b, 7, 1), 0);
	/* The oldest goes first. */
	for (uint64_t i = 10; i < 15; i++)
		put(v, i);
	assert_int_equal(reads(b, 10, 1), 1);
	assert_int_equal(reads(b, 11, 4), 0);
	far_close(b);
}

static void forgets(void **state)
{
	struct far_victim *v;
	struct far_backend *b;
	uint64_t epoch;

	(void)state;
	assert_int_equal(far_victim_new(below_open(), SHIFT, 64 * CHUNK, &v, &b), 0);
	far_victim_own(v);
	for (uint64_t i = 0; i < 8; i++)
		put(v, i);
	assert_int_equal(far_write(b, CHUNK + 10, "x", 1, 0), 0);
	assert_int_equal(reads(b, 1, 1), 1);
	assert_int_equal(far_discard(b, 2 * CHUNK, 2 * CHUNK, 0), 0);
	assert_int_equal(reads(b, 2, 2), 1);
	assert_int_equal(far_zero(b, 4 * CHUNK - 1, 2, 0), 0);
	assert_int_equal(reads(b, 4, 1), 1);
	assert_int_equal(reads(b, 5, 1), 0);
	/* Others have written below. */
	epoch = far_victim_epoch(v);
	far_victim_pause(v);
	memset(below_bytes + 6 * CHUNK, 1, CHUNK);
	assert_false(far_victim_spare(v, 5 * CHUNK));
	put(v, 9);
	assert_int_equal(reads(b, 9, 1), 1);
	far_victim_resume(v);
	assert_int_equal(reads(b, 6, 1), 1);
	far_victim_put(v, 7 * CHUNK, buf, CHUNK, epoch); /* evicted before, with what was there then */
	assert_int_equal(reads(b, 7, 1), 1);
	put(v, 7);
	assert_int_equal(reads(b, 7, 1), 0);
	far_close(b);
}

/* A program that goes back to four chunks again and again while it runs over all the others. */
static void keeps_hot(enum far_mechanism mechanism, bool read_only, bool needed)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_error err = { 0 };
	struct far_mount *m;
	unsigned cold = 0, hot = 0;

	if (!needed) {
		print_message("skipped: this kernel has not all of it\n");
		skip();
	}
	o.mode = FAR_MODE_MANAGED;
	o.mechanism = mechanism;
	o.read_only = read_only;
	o.pull_workers = 0;
	o.local_max = BUDGET;
	if (far_map(below_open(), &o, &m, &err))
		fail_msg("%s", err.text);
	volatile const char *p = far_addr(m);
	for (uint64_t round = 0; round < 6; round++)
		for (uint64_t j = 0; j < CHUNKS - 9; j++) { /* in no order that could be foreseen */
			uint64_t i = 8 + (j * j * 31 + j * 37 + round) % (CHUNKS - 9);
			assert_int_equal(p[i * CHUNK + 9], below_bytes[i * CHUNK + 9]);
			for (uint64_t k = 0; k < 4; k++) {
				uint64_t at = k * CHUNK + (round * 31 + i) % 16 * 4096 + 7;
				assert_int_equal(p[at], below_bytes[at]);
			}
		}
	for (uint64_t k = 0; k < 4; k++)
		hot += atomic_load(&below_reads[k]);
	for (uint64_t i = 8; i < CHUNKS - 1; i++)
		cold += atomic_load(&below_reads[i]);
	print_message("%u fetches of 4 hot chunks, %u of %u others\n", hot, cold, CHUNKS - 9);
	assert_true(cold >= CHUNKS - 9);
	/* Without limbo each would go and come once in a budget's worth of the others. */
	assert_true(5 * hot <= 4 * (4 * cold / (BUDGET / CHUNK)));
	struct far_status st = FAR_STATUS_INIT;
	/* Others are given back after a fault was served: not in the same moment. */
	for (uint64_t until = far_now() + 5 * FAR_SEC, k = 0; far_now() < until; k++) {
		assert_int_equal(far_mount_status(m, &st), 0);
		if (st.local <= BUDGET)
			break;
		far_sleep_until(far_now() + FAR_MSEC, false);
		(void)p[(8 + k % 64) * CHUNK];
	}
	print_message("%llu KiB of at most %llu are here\n", (unsigned long long)st.local >> 10, (unsigned long long)BUDGET >> 10);
	assert_true(st.local <= BUDGET);
	assert_int_equal(far_mount_close(m), 0);
}

static void keeps_hot_read_only(void **state)
{
	(void)state;
	keeps_hot(FAR_MECH_COPY, true, far_uffd_have() & FAR_UFFD_ANY);
}

static void keeps_hot_writable(void **state)
{
	(void)state;
	keeps_hot(FAR_MECH_COPY, false, (far_uffd_have() & (FAR_UFFD_WP_ASYNC | FAR_UFFD_MOVE)) == (FAR_UFFD_WP_ASYNC | FAR_UFFD_MOVE));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(gives_back), cmocka_unit_test(forgets),
		cmocka_unit_test(keeps_hot_read_only), cmocka_unit_test(keeps_hot_writable),
	};

	return cmocka_run_group_tests_name("victim", tests, NULL, NULL);
}
