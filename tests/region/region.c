/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What a managed region promises, over a remote that counts, fails, holds calls and remembers their order on request. */
#include "fixture.h"

/* ---------------------------------------------------------------------------------------------------------- reading */

/* W-A19, W-B7 (D7, D8): no size is special: not a multiple of a chunk, shorter than one. */
static void reads_what_the_remote_has(void **state)
{
	const uint64_t sizes[] = { 1, 4095, 4096, 4097, 10 * CHUNK, 10 * CHUNK + 777 };
	struct far_mount_opts o = quiet();
	unsigned char buf[11 * CHUNK];

	for (size_t s = 0; s < FAR_ARRAY_LEN(sizes); s++) {
		struct fixture f;
		setup_bytes(&f, sizes[s], &o);
		assert_int_equal(far_read(f.face, 0, buf, (size_t)sizes[s], 0), 0);
		for (uint64_t k = 0; k < sizes[s]; k++)
			assert_int_equal(buf[k], pattern(k));
		assert_int_equal(status(&f).local, sizes[s]);
		assert_int_equal(far_read(f.face, sizes[s] - 1, buf, 2, 0), -EINVAL);
		teardown(&f);
	}
}

static void an_empty_region_works(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char c;

	o.pull_workers = -1;
	o.push_workers = -1;
	setup(&f, 0, &o);
	assert_int_equal(far_read(f.face, 0, &c, 0, 0), 0);
	assert_int_equal(far_write(f.face, 0, &c, 1, 0), -ENOSPC);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(far_region_wait_local(f.r, 100), 0);
	teardown(&f);
}

static void nowait_never_asks_the_remote(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char buf[CHUNK];

	setup(&f, 4, &o);
	assert_int_equal(far_read(f.face, 0, buf, CHUNK, FAR_NOWAIT), -EAGAIN);
	assert_int_equal(f.s.reads, 0);
	assert_int_equal(far_read(f.face, 0, buf, CHUNK, 0), 0);
	assert_int_equal(far_read(f.face, 100, buf, 5, FAR_NOWAIT), 0);
	/* A part that was written here can be read before the rest has come. */
	assert_int_equal(far_write(f.face, CHUNK + 512, "x", 1, 0), 0);
	assert_int_equal(far_read(f.face, CHUNK + 512, buf, 1, FAR_NOWAIT), 0);
	assert_int_equal(buf[0], 'x');
	assert_int_equal(far_read(f.face, CHUNK + 511, buf, 2, FAR_NOWAIT), -EAGAIN);
	teardown(&f);
}

struct reader {
	struct fixture *f;
	struct far_thread t;
	uint64_t off;
	int err;
	unsigned char byte;
};

static void *read_one(void *arg)
{
	struct reader *r = arg;
	r->err = far_read(r->f->face, r->off, &r->byte, 1, 0);
	return NULL;
}

static void many_readers_of_one_chunk_fetch_once(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct reader r[16];

	setup(&f, 4, &o);
	f.s.hold_reads = true;
	for (unsigned k = 0; k < 16; k++) {
		r[k] = (struct reader){ .f = &f, .off = CHUNK + k };
		assert_int_equal(far_thread_start(&r[k].t, "reader", read_one, &r[k]), 0);
	}
	EVENTUALLY(status(&f).blocked == 16);
	remote_release(&f.s);
	for (unsigned k = 0; k < 16; k++) {
		far_thread_join(&r[k].t);
		assert_int_equal(r[k].err, 0);
		assert_int_equal(r[k].byte, pattern(CHUNK + k));
	}
	assert_int_equal(f.s.reads, 1);
	teardown(&f);
}

/* W-A7, W-A11: a failed fetch leaves the chunk absent, tells everyone who waited, and the next try works. */
static void a_failed_fetch_fails_all_and_is_tried_again(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct reader r[8];
	unsigned char c;

	setup(&f, 4, &o);
	f.s.hold_reads = true;
	f.s.fail_reads = EIO;
	for (unsigned k = 0; k < 8; k++) {
		r[k] = (struct reader){ .f = &f, .off = k };
		assert_int_equal(far_thread_start(&r[k].t, "reader", read_one, &r[k]), 0);
	}
	EVENTUALLY(status(&f).blocked == 8);
	remote_release(&f.s);
	for (unsigned k = 0; k < 8; k++) {
		far_thread_join(&r[k].t);
		assert_int_equal(r[k].err, -EIO);
	}
	assert_int_equal(f.s.reads, 1);
	assert_int_equal(status(&f).local, 0);
	assert_int_equal(status(&f).last_error, EIO);
	f.s.fail_reads = 0;
	assert_int_equal(far_read(f.face, 0, &c, 1, 0), 0);
	assert_int_equal(c, pattern(0));
	teardown(&f);
}

static void a_wait_for_the_remote_keeps_its_deadline(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char c;

	setup(&f, 4, &o);
	f.s.hold_reads = true;
	uint64_t old = far_deadline_limit(far_now() + 50 * FAR_MSEC);
	assert_int_equal(far_read(f.face, 0, &c, 1, 0), -ETIMEDOUT);
	far_deadline_restore(old);
	teardown(&f);
}

static void *read_shortly(void *arg)
{
	uint64_t old = far_deadline_limit(far_now() + 50 * FAR_MSEC);

	read_one(arg);
	far_deadline_restore(old);
	return NULL;
}

/* Who is in a hurry gives up; who waits for what he had begun to fetch has time left, and fetches it himself. */
static void a_deadline_is_no_one_elses(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct reader hasty, patient;

	setup(&f, 4, &o);
	hasty = patient = (struct reader){ .f = &f, .off = 7 };
	f.s.hold_reads = true;
	assert_int_equal(far_thread_start(&hasty.t, "hasty", read_shortly, &hasty), 0);
	EVENTUALLY(status(&f).blocked == 1);
	assert_int_equal(far_thread_start(&patient.t, "patient", read_one, &patient), 0);
	far_thread_join(&hasty.t);
	remote_release(&f.s);
	far_thread_join(&patient.t);
	assert_int_equal(hasty.err, -ETIMEDOUT);
	assert_int_equal(patient.err, 0);
	assert_int_equal(patient.byte, pattern(7));
	teardown(&f);
}

static void stop_ends_who_waits(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct reader r = { .f = &f };

	setup(&f, 4, &o);
	f.s.hold_reads = true;
	assert_int_equal(far_thread_start(&r.t, "reader", read_one, &r), 0);
	EVENTUALLY(status(&f).blocked == 1);
	far_region_stop(f.r);
	far_thread_join(&r.t);
	assert_int_equal(r.err, -ESHUTDOWN);
	assert_int_equal(far_read(f.face, CHUNK, &r.byte, 1, 0), -ESHUTDOWN);
	teardown(&f);
}

/* ---------------------------------------------------------------------------------------------------------- writing */

static void a_write_of_a_part_needs_no_remote(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	unsigned char buf[2 * CHUNK];

	setup(&f, 4, &o);
	assert_int_equal(far_write(f.face, 1000, "hello", 5, 0), 0);
	assert_int_equal(far_write(f.face, CHUNK, buf, CHUNK, 0), 0); /* whole */
	assert_int_equal(f.s.reads, 0);
	assert_int_equal(far_read(f.face, 0, buf, CHUNK, 0), 0);
	assert_int_equal(f.s.reads, 1);
	for (unsigned k = 0; k < CHUNK; k++)
		assert_int_equal(buf[k], k >= 1000 && k < 1005 ? (unsigned char)"hello"[k - 1000] : pattern(k));
	teardown(&f);
}

static void parts_that_become_the_whole_need_no_fetch(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char buf[CHUNK];

	setup(&f, 4, &o);
	memset(buf, 7, sizeof buf);
	for (unsigned k = 0; k < CHUNK; k += 100) /* ragged, one after the other */
		assert_int_equal(far_write(f.face, k, buf, far_min(100, CHUNK - k), 0), 0);
	assert_int_equal(far_read(f.face, 0, buf, CHUNK, FAR_NOWAIT), 0);
	assert_int_equal(f.s.reads, 0);
	teardown(&f);
}

static void more_ragged_ranges_than_fit_fetch_first(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	unsigned char c;

	setup(&f, 4, &o);
	for (unsigned k = 0; k < 5; k++)
		assert_int_equal(far_write(f.face, 10 + 600 * k, "y", 1, 0), 0);
	assert_int_equal(f.s.reads, 1);
	for (unsigned k = 0; k < 5; k++) {
		assert_int_equal(far_read(f.face, 10 + 600 * k, &c, 1, 0), 0);
		assert_int_equal(c, 'y');
		assert_int_equal(far_read(f.face, 11 + 600 * k, &c, 1, 0), 0);
		assert_int_equal(c, pattern(11 + 600 * k));
	}
	teardown(&f);
}

static void a_full_side_table_fetches_first(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.max_partial = 2;
	setup(&f, 8, &o);
	for (unsigned k = 0; k < 4; k++)
		assert_int_equal(far_write(f.face, k * CHUNK + 512, "z", 1, 0), 0);
	assert_int_equal(f.s.reads, 2);
	teardown(&f);
}

/* ------------------------------------------------------------------------------------------------------------ flush */

static void assert_on_remote(struct fixture *f, uint64_t off, const void *want, size_t len)
{
	far_mutex_lock(&f->s.lock);
	assert_memory_equal(f->s.data + off, want, len);
	assert_true(f->s.durable);
	far_mutex_unlock(&f->s.lock);
}

/* W-A1, W-A3, W-A4 (D1, D3): without background push, flush pushes, and the remote's own flush is part of it. */
static void flush_reaches_the_remote_and_its_flush(void **state)
{
	const int workers[] = { 0, 1, 8 };

	for (size_t k = 0; k < FAR_ARRAY_LEN(workers); k++) {
		struct far_mount_opts o = quiet();
		struct fixture f;
		o.push_workers = workers[k];
		o.push_interval_ms = 1000 * 1000;
		setup(&f, 300, &o);
		for (unsigned c = 0; c < 300; c += 3)
			assert_int_equal(far_write(f.face, c * CHUNK + 5, "data", 4, 0), 0);
		assert_int_equal(far_region_flush(f.r), 0);
		for (unsigned c = 0; c < 300; c += 3)
			assert_on_remote(&f, c * CHUNK + 5, "data", 4);
		assert_int_equal(status(&f).dirty, 0);
		unsigned flushes = f.s.flushes;
		assert_int_equal(far_region_flush(f.r), 0); /* nothing new: no need to ask again */
		assert_int_equal(f.s.flushes, flushes);
		teardown(&f);
	}
}

/* W-A3: a flush that cannot push fails, and fails again, until the bytes are there. */
static void flush_fails_until_the_bytes_are_there(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = 2;
	setup(&f, 8, &o);
	f.s.fail_writes = EIO;
	assert_int_equal(far_write(f.face, 0, "data", 4, 0), 0);
	assert_int_equal(far_region_flush(f.r), -EIO);
	assert_int_equal(far_region_flush(f.r), -EIO);
	assert_true(status(&f).dirty >= 4 && status(&f).dirty <= CHUNK / 15);
	f.s.fail_writes = 0;
	f.s.fail_flush = ENOSPC;
	assert_int_equal(far_region_flush(f.r), -ENOSPC);
	assert_int_equal(far_region_flush(f.r), -ENOSPC); /* pushed by now, but not durable */
	f.s.fail_flush = 0;
	assert_int_equal(far_region_flush(f.r), 0);
	assert_on_remote(&f, 0, "data", 4);
	teardown(&f);
}

struct writer {
	struct fixture *f;
	struct far_thread t;
	_Atomic bool end;
	_Atomic uint64_t wrote;
};

static void *write_for_ever(void *arg)
{
	struct writer *w = arg;
	uint64_t n = 0;

	while (!w->end) {
		n++;
		assert_int_equal(far_write(w->f->face, n % 16 * CHUNK, &n, sizeof n, 0), 0);
		w->wrote = n;
	}
	return NULL;
}

static void flush_ends_under_endless_writes(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct writer w = { .f = &f };

	o.push_workers = 2;
	o.push_interval_ms = 1;
	setup(&f, 16, &o);
	assert_int_equal(far_thread_start(&w.t, "writer", write_for_ever, &w), 0);
	EVENTUALLY(w.wrote > 100);
	for (unsigned k = 0; k < 50; k++) {
		uint64_t before = w.wrote, there = 0;
		uint64_t old = far_deadline_limit(far_now() + LONG_TIME);
		assert_int_equal(far_region_flush(f.r), 0);
		far_deadline_restore(old);
		far_mutex_lock(&f.s.lock); /* the newest number on the remote is at least the newest before the flush */
		for (unsigned c = 0; c < 16; c++) {
			uint64_t n;
			memcpy(&n, f.s.data + c * CHUNK, sizeof n);
			if (n % 16 == c && n < (uint64_t)1 << 40)
				there = far_max(there, n);
		}
		far_mutex_unlock(&f.s.lock);
		assert_true(there >= before);
	}
	w.end = true;
	far_thread_join(&w.t);
	teardown(&f);
}

static void *flush_thread(void *arg)
{
	struct reader *r = arg;
	r->err = far_region_flush(r->f->r);
	return NULL;
}

/* W-A2 (D4): a write while its chunk is being pushed is neither lost nor covered by a push that began before it. */
static void a_write_during_a_push_is_pushed_again(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct reader first = { .f = &f }, second = { .f = &f };

	o.push_workers = 1;
	o.push_interval_ms = 1;
	setup(&f, 4, &o);
	f.s.hold_writes = true;
	assert_int_equal(far_write(f.face, 0, "old!", 4, 0), 0);
	EVENTUALLY(f.s.held == 1);
	assert_int_equal(far_thread_start(&first.t, "flush", flush_thread, &first), 0);
	assert_int_equal(far_write(f.face, 0, "new!", 4, 0), 0);
	assert_int_equal(far_thread_start(&second.t, "flush", flush_thread, &second), 0);
	remote_release(&f.s);
	far_thread_join(&second.t);
	assert_int_equal(second.err, 0);
	assert_on_remote(&f, 0, "new!", 4);
	far_thread_join(&first.t);
	assert_int_equal(first.err, 0);
	teardown(&f);
}

static void flush_keeps_its_deadline(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = 1;
	setup(&f, 4, &o);
	f.s.hold_writes = true;
	assert_int_equal(far_write(f.face, 0, "x", 1, 0), 0);
	uint64_t old = far_deadline_limit(far_now() + 50 * FAR_MSEC);
	assert_int_equal(far_region_flush(f.r), -ETIMEDOUT);
	far_deadline_restore(old);
	teardown(&f);
}

static void durable_local_asks_only_the_local_store(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.durable = FAR_DURABLE_LOCAL;
	setup(&f, 4, &o);
	assert_int_equal(far_write(f.face, 0, "x", 1, 0), 0);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(f.s.writes, 0);
	teardown(&f);
}

static int refuse(void *opaque)
{
	++*(int *)opaque;
	return *(int *)opaque == 1 ? -EBUSY : 0;
}

static void before_flush_may_refuse(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	int calls = 0;

	o.before_flush = refuse;
	o.opaque = &calls;
	setup(&f, 4, &o);
	assert_int_equal(far_write(f.face, 0, "x", 1, 0), 0);
	assert_int_equal(far_region_flush(f.r), -EBUSY);
	assert_int_equal(f.s.writes, 0);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(calls, 2);
	teardown(&f);
}

/* ------------------------------------------------------------------------------------------------------- background */

static void everything_is_pulled_and_nothing_pulled_is_pushed(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.pull_workers = -1;
	o.push_workers = -1;
	o.push_interval_ms = 1;
	setup_bytes(&f, 1000 * CHUNK + 33, &o);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	assert_int_equal(status(&f).local, 1000 * CHUNK + 33);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(f.s.writes, 0);
	assert_int_equal(status(&f).pulled, 1000 * CHUNK + 33);
	teardown(&f);
}

static void dirty_bytes_are_pushed_by_themselves(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = -1;
	o.push_interval_ms = 20;
	setup(&f, 8, &o);
	assert_int_equal(far_write(f.face, 3 * CHUNK, "data", 4, 0), 0);
	EVENTUALLY(status(&f).dirty == 0);
	far_mutex_lock(&f.s.lock);
	assert_memory_equal(f.s.data + 3 * CHUNK, "data", 4);
	far_mutex_unlock(&f.s.lock);
	teardown(&f);
}

/* W-B1, W-B2 (D5): the puller meets errors, goes on when the remote is back, and says what it met to who waits. */
static void the_puller_survives_an_outage(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.pull_workers = 8;
	o.push_workers = 8;
	f.s.fail_reads = 0;
	setup(&f, 64, &o);
	assert_int_equal(far_region_wait(f.r, 0, CHUNK), 0);
	teardown(&f);

	setup(&f, 4096, &o);
	f.s.fail_reads = ECONNRESET;
	EVENTUALLY(status(&f).errors > 0 || status(&f).local == 4096 * CHUNK);
	int err = far_region_wait_local(f.r, UINT64_MAX);
	assert_true(err == -ECONNRESET || err == 0);
	f.s.fail_reads = 0;
	uint64_t until = far_now() + LONG_TIME;
	do
		err = far_region_wait_local(f.r, UINT64_MAX);
	while (err && far_now() < until);
	assert_int_equal(err, 0);
	teardown(&f);
}

static void a_waited_range_comes_first(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.pull_workers = 1;
	o.window = CHUNK;
	setup(&f, 2048, &o);
	assert_int_equal(far_region_wait(f.r, 2000 * CHUNK, 10), 0);
	assert_true(far_read(f.face, 2000 * CHUNK, &(char){ 0 }, 1, FAR_NOWAIT) == 0);
	teardown(&f);
}

static int64_t from_the_end(void *opaque, uint64_t off)
{
	return (int64_t)off;
}

static void the_order_is_kept(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.pull_workers = 1;
	o.window = 1;
	o.order = "ranges:400K-404K,0-4K";
	setup(&f, 256, &o);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	assert_int_equal(f.s.order[0], 400 * 1024);
	assert_int_equal(f.s.order[1], 0);
	assert_int_equal(f.s.order[2], CHUNK);
	teardown(&f);

	struct far_order order; /* 1 MiB, then the last 2 of 4 MiB, then all */
	assert_int_equal(far_order_parse(&order, "hint:mp4", 1024 * CHUNK, 12, NULL), 0);
	assert_int_equal(order.n, 3);
	assert_true(order.run[0].first == 0 && order.run[0].n == 256);
	assert_true(order.run[1].first == 512 && order.run[1].n == 512);
	assert_true(order.run[2].first == 0 && order.run[2].n == 1024);
	far_order_fini(&order);

	o.order = NULL;
	o.priority = from_the_end;
	setup(&f, 16, &o);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	for (unsigned k = 0; k < 16; k++)
		assert_int_equal(f.s.order[k], (15 - k) * CHUNK);
	teardown(&f);
}

static void a_recorded_order_can_be_played(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char path[] = "/tmp/farpage-trace-XXXXXX", order[64], c;

	close(mkstemp(path));
	o.record_order = path;
	setup(&f, 64, &o);
	assert_int_equal(far_read(f.face, 40 * CHUNK, &c, 1, 0), 0);
	assert_int_equal(far_read(f.face, 7 * CHUNK, &c, 1, 0), 0);
	assert_int_equal(far_read(f.face, 40 * CHUNK, &c, 1, 0), 0);
	teardown(&f);

	snprintf(order, sizeof order, "trace:%s", path);
	o.record_order = NULL;
	o.order = order;
	o.pull_workers = 1;
	o.window = 1;
	setup(&f, 64, &o);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	assert_int_equal(f.s.order[0], 40 * CHUNK);
	assert_int_equal(f.s.order[1], 7 * CHUNK);
	assert_int_equal(f.s.order[2], 0);
	teardown(&f);
	unlink(path);
}

/* Pull all of it: the first touch first, then the rest of its trace with what lies between, the second trace, the rest. False:
 * the calls were many, as they are for a while on a machine that keeps the puller waiting. */
static bool pulls_in_few_calls(const struct far_mount_opts *o)
{
	struct fixture f;
	unsigned k = 0, again;

	setup(&f, 64, o);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	assert_int_equal(f.s.order[0], 45 * CHUNK);
	bool few = f.s.order[1] == 41 * CHUNK && f.s.n_order < 24; /* of 31 touches */
	while (k < f.s.n_order && f.s.order[k] >= 17 * CHUNK && f.s.order[k] <= 45 * CHUNK)
		k++;
	assert_true(k < f.s.n_order);
	few = few && f.s.order[k] == 1 * CHUNK;
	for (again = k; few && again < f.s.n_order && f.s.order[again] != 56 * CHUNK; again++)
		few = f.s.order[again] != 0; /* the rest comes last */
	few = few && again < f.s.n_order;
	teardown(&f);
	return few;
}

/* Two traces one behind the other; what was touched in any order is fetched in few calls. */
static void traces_are_merged_and_joined(void **state)
{
	struct far_mount_opts o = quiet();
	char path[] = "/tmp/farpage-trace-XXXXXX", order[64];
	FILE *file = fdopen(mkstemp(path), "w");

	fprintf(file, "farpage-trace 1\n");
	for (unsigned k = 0; k < 15; k++) /* 45, 43, 41 ... 17: down, every second one */
		fprintf(file, "%u %u\n", (45 - 2 * k) * CHUNK, CHUNK);
	fprintf(file, "farpage-trace 1\n\n# the second\n");
	for (unsigned k = 0; k < 16; k++) /* 63 and 2, 62 and 3 ... */
		fprintf(file, "%u %u\n", (k % 2 ? 1 + k / 2 : 63 - k / 2) * CHUNK, k == 15 ? 1 : CHUNK);
	fprintf(file, "%u %u\n", 45 * CHUNK, CHUNK); /* again */
	fclose(file);
	snprintf(order, sizeof order, "trace:%s", path);
	o.order = order;
	o.pull_workers = 1;
	o.window = 1;
	bool few = false;
	for (int tries = 0; tries < 20 && !few; tries++)
		few = pulls_in_few_calls(&o);
	assert_true(few);
	unlink(path);
}

struct allowed {
	struct fixture f;
	struct far_thread t;
	_Atomic bool flushed;
	unsigned writes; /* that the remote had seen when the flush was over */
	int err;
};

static void *flush_what_was_allowed(void *opaque)
{
	struct allowed *a = opaque;

	a->err = far_region_flush(a->f.r);
	a->writes = a->f.s.writes;
	a->flushed = true;
	return NULL;
}

/* The program stores as soon as it may, and flushes before whoever allowed it has come to say so. */
static void allow_and_flush(void *opaque, uint64_t off, uint64_t len)
{
	struct allowed *a = opaque;
	uint64_t end = far_now() + 200 * FAR_MSEC;

	assert_int_equal(far_thread_start(&a->t, "flush", flush_what_was_allowed, a), 0);
	while (!a->flushed && far_now() < end)
		far_thread_yield();
}

static void a_flush_covers_stores_that_are_being_allowed(void **state)
{
	struct far_mount_opts o = quiet();
	struct allowed a = { .flushed = false };
	char c;

	setup(&a.f, 8, &o);
	assert_int_equal(far_read(a.f.face, 3 * CHUNK, &c, 1, 0), 0);
	assert_int_equal(far_region_stored(a.f.r, 3 * CHUNK, CHUNK, 0, allow_and_flush, &a), 0);
	far_thread_join(&a.t);
	assert_int_equal(a.err, 0);
	assert_int_equal(a.writes, 1);
	teardown(&a.f);
}

static void bad_options_are_refused_with_a_sentence(void **state)
{
	const struct {
		uint64_t chunk;
		const char *order, *says;
	} bad[] = {
		{ 5000, NULL, "power of two" },
		{ 2048, NULL, "power of two" },
		{ 64 << 20, NULL, "power of two" },
		{ 0, "backwards", "is not an order" },
		{ 0, "ranges:", "is not a list of ranges" },
		{ 0, "ranges:5", "is not a range" },
		{ 0, "ranges:2M-1M", "is not a range" },
		{ 0, "trace:/nonexistent/file", "cannot read the trace" },
	};

	for (size_t k = 0; k < FAR_ARRAY_LEN(bad); k++) {
		struct far_mount_opts o = quiet();
		struct far_region_conf conf = { .opts = &o };
		struct far_region *r = NULL;
		struct far_error err = { 0 };
		o.chunk = bad[k].chunk;
		o.order = bad[k].order;
		assert_int_equal(far_open("mem:1M", NULL, &conf.remote, &err), 0);
		assert_int_equal(far_open("mem:1M", NULL, &conf.local, &err), 0);
		assert_true(far_region_open(&conf, &r, &err) < 0);
		assert_null(r);
		if (!strstr(err.text, bad[k].says))
			fail_msg("'%s' does not say '%s'", err.text, bad[k].says);
		far_close(conf.remote);
		far_close(conf.local);
	}
}

static void writers_past_the_budget_wait_for_the_push(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char buf[CHUNK];

	memset(buf, 1, sizeof buf);
	o.push_workers = 2;
	o.dirty_max = 16 * CHUNK;
	setup(&f, 1024, &o);
	for (unsigned k = 0; k < 1024; k++) {
		assert_int_equal(far_write(f.face, k * CHUNK, buf, CHUNK, 0), 0);
		assert_true(status(&f).dirty <= 16 * CHUNK);
	}
	f.s.hold_writes = true;
	int err = 0;
	for (unsigned k = 0; k < 20 && !err; k++)
		err = far_write(f.face, k * CHUNK, buf, CHUNK, FAR_NOWAIT);
	assert_int_equal(err, -EAGAIN);
	teardown(&f);
}

static void the_local_budget_is_kept(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	unsigned char c;

	o.local_max = 32 * CHUNK;
	o.push_workers = 1;
	setup(&f, 1024, &o);
	for (unsigned k = 0; k < 1024; k++) {
		uint64_t off = (k * 37 % 1024) * CHUNK + k;
		assert_int_equal(far_read(f.face, off, &c, 1, 0), 0);
		assert_int_equal(c, pattern(off));
		assert_true(status(&f).local <= 32 * CHUNK);
	}
	teardown(&f);
}

static void evicted_chunks_are_fetched_again_and_dirty_ones_stay(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	unsigned char c;

	setup(&f, 8, &o);
	assert_int_equal(far_read(f.face, 0, &c, 1, 0), 0);
	assert_int_equal(far_write(f.face, CHUNK, f.s.data, CHUNK, 0), 0);
	assert_int_equal(far_region_evict(f.r, 0, 8 * CHUNK), 0);
	assert_int_equal(status(&f).local, CHUNK);
	assert_int_equal(far_read(f.face, 5, &c, 1, 0), 0);
	assert_int_equal(c, pattern(5));
	assert_int_equal(f.s.reads, 2);
	teardown(&f);
}

static void what_was_evicted_is_pulled_for_who_waits(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.pull_workers = 2;
	setup(&f, 64, &o);
	uint64_t old = far_deadline_limit(far_now() + LONG_TIME);
	assert_int_equal(far_region_wait_local(f.r, 64 * CHUNK), 0);
	assert_int_equal(far_region_evict(f.r, 0, 64 * CHUNK), 0);
	assert_int_equal(far_region_wait_local(f.r, 20 * CHUNK), 0);
	far_deadline_restore(old);
	assert_true(status(&f).local >= 20 * CHUNK);
	teardown(&f);
}

static unsigned order_of(struct fixture *f, uint64_t chunk)
{
	for (unsigned k = 0; k < f->s.n_order; k++)
		if (f->s.order[k] == chunk * CHUNK)
			return k;
	return UINT32_MAX;
}

/* W-B31 (D17): the whole window of the puller is stuck, and who asks for a chunk gets it all the same. */
static void a_reader_does_not_stand_behind_the_pull(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	unsigned char c;

	o.pull_workers = 4;
	o.order = "ranges:4000K-";
	setup(&f, 2000, &o);
	f.s.hold_from = 1000 * CHUNK;
	f.s.hold_reads = true;
	for (unsigned k = 0; k < 100; k++) {
		assert_int_equal(far_read(f.face, k * 7 * CHUNK, &c, 1, 0), 0);
		assert_int_equal(c, pattern(k * 7 * CHUNK));
	}
	teardown(&f);
}

/* The background is held up at chunk 1000; what lies ahead of a sequential reader is fetched before it goes on. */
static void a_sequential_reader_is_fetched_ahead(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	unsigned char c;

	o.pull_workers = 1;
	o.order = "ranges:4000K-";
	o.window = CHUNK;
	setup(&f, 2000, &o);
	f.s.hold_from = 1000 * CHUNK;
	f.s.hold_reads = true;
	EVENTUALLY(f.s.held == 1 || status(&f).local >= 1000 * CHUNK);
	for (unsigned k = 0; k < 4; k++) {
		assert_int_equal(far_read(f.face, k * CHUNK, &c, 1, 0), 0);
		assert_int_equal(c, pattern(k * CHUNK));
	}
	bool held = f.s.held == 1;
	remote_release(&f.s);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	if (held)
		assert_true(order_of(&f, 4) < order_of(&f, 1999));
	else
		skip();
	teardown(&f);
}

static _Atomic unsigned told[64];

static void tell(void *opaque, uint64_t off, uint64_t len)
{
	for (uint64_t k = off / CHUNK; k < far_div_up(off + len, CHUNK); k++)
		told[k]++;
}

static void chunk_local_tells_each_chunk_once(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.pull_workers = -1;
	o.chunk_local = tell;
	setup(&f, 64, &o);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	for (unsigned k = 0; k < 64; k++)
		assert_int_equal(told[k], 1);
	teardown(&f);
}

/* ------------------------------------------------------------------------------------------------- the map alone */

static void a_large_map_is_cheap_to_open(void **state)
{
	struct far_chunkmap *m;
	long before = 0, after = 0, ignored;
	FILE *s = fopen("/proc/self/statm", "re");

	assert_int_equal(fscanf(s, "%ld %ld", &ignored, &before), 2);
	fclose(s);
	assert_int_equal(far_chunkmap_open(&m, (uint64_t)1 << 40, 16, 65536), 0);
	s = fopen("/proc/self/statm", "re");
	assert_int_equal(fscanf(s, "%ld %ld", &ignored, &after), 2);
	fclose(s);
	assert_true((after - before) * sysconf(_SC_PAGESIZE) < 1 << 20);
	far_chunkmap_close(m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(reads_what_the_remote_has),
		cmocka_unit_test(an_empty_region_works),
		cmocka_unit_test(nowait_never_asks_the_remote),
		cmocka_unit_test(many_readers_of_one_chunk_fetch_once),
		cmocka_unit_test(a_failed_fetch_fails_all_and_is_tried_again),
		cmocka_unit_test(a_wait_for_the_remote_keeps_its_deadline),
		cmocka_unit_test(a_deadline_is_no_one_elses),
		cmocka_unit_test(stop_ends_who_waits),
		cmocka_unit_test(a_write_of_a_part_needs_no_remote),
		cmocka_unit_test(parts_that_become_the_whole_need_no_fetch),
		cmocka_unit_test(more_ragged_ranges_than_fit_fetch_first),
		cmocka_unit_test(a_full_side_table_fetches_first),
		cmocka_unit_test(flush_reaches_the_remote_and_its_flush),
		cmocka_unit_test(flush_fails_until_the_bytes_are_there),
		cmocka_unit_test(flush_ends_under_endless_writes),
		cmocka_unit_test(a_write_during_a_push_is_pushed_again),
		cmocka_unit_test(flush_keeps_its_deadline),
		cmocka_unit_test(durable_local_asks_only_the_local_store),
		cmocka_unit_test(before_flush_may_refuse),
		cmocka_unit_test(everything_is_pulled_and_nothing_pulled_is_pushed),
		cmocka_unit_test(dirty_bytes_are_pushed_by_themselves),
		cmocka_unit_test(the_puller_survives_an_outage),
		cmocka_unit_test(a_waited_range_comes_first),
		cmocka_unit_test(the_order_is_kept),
		cmocka_unit_test(a_recorded_order_can_be_played),
		cmocka_unit_test(traces_are_merged_and_joined),
		cmocka_unit_test(a_flush_covers_stores_that_are_being_allowed),
		cmocka_unit_test(bad_options_are_refused_with_a_sentence),
		cmocka_unit_test(writers_past_the_budget_wait_for_the_push),
		cmocka_unit_test(the_local_budget_is_kept),
		cmocka_unit_test(evicted_chunks_are_fetched_again_and_dirty_ones_stay),
		cmocka_unit_test(what_was_evicted_is_pulled_for_who_waits),
		cmocka_unit_test(a_reader_does_not_stand_behind_the_pull),
		cmocka_unit_test(a_sequential_reader_is_fetched_ahead),
		cmocka_unit_test(chunk_local_tells_each_chunk_once),
		cmocka_unit_test(a_large_map_is_cheap_to_open),
	};
	return cmocka_run_group_tests_name("region", tests, NULL, NULL);
}
