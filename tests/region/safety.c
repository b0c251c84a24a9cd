/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What keeps a managed region's bytes safe: pins, fences, refreshes, restarts of the remote, errors of the local store. */
#include "fixture.h"

static void fill(struct fixture *f, uint64_t chunk, char c)
{
	char buf[CHUNK];
	memset(buf, c, sizeof buf);
	assert_int_equal(far_write(f->face, chunk * CHUNK, buf, sizeof buf, 0), 0);
}

static unsigned char byte_at(struct fixture *f, uint64_t off)
{
	unsigned char c = 0;
	assert_int_equal(far_read(f->face, off, &c, 1, 0), 0);
	return c;
}

static bool is_local(struct fixture *f, uint64_t chunk)
{
	char c;
	return far_read(f->face, chunk * CHUNK, &c, 1, FAR_NOWAIT) == 0;
}

static unsigned char on_disk(struct fixture *f, uint64_t off)
{
	far_mutex_lock(&f->s.lock);
	unsigned char c = f->s.disk ? f->s.disk[off] : f->s.data[off];
	far_mutex_unlock(&f->s.lock);
	return c;
}

struct caller {
	struct fixture *f;
	struct far_thread t;
	uint64_t off, len;
	_Atomic bool done;
	int err;
};

static void *call_flush(void *arg)
{
	struct caller *c = arg;
	c->err = far_region_flush(c->f->r);
	c->done = true;
	return NULL;
}

static void *call_refresh(void *arg)
{
	struct caller *c = arg;
	c->err = far_region_refresh(c->f->r, c->off, c->len);
	c->done = true;
	return NULL;
}

static void *call_read(void *arg)
{
	struct caller *c = arg;
	char byte;
	c->err = far_read(c->f->face, c->off, &byte, 1, 0);
	c->done = true;
	return NULL;
}

static void *call_write(void *arg)
{
	struct caller *c = arg;
	char buf[CHUNK] = { 1 };
	c->err = far_write(c->f->face, c->off, buf, sizeof buf, 0);
	c->done = true;
	return NULL;
}

static void start(struct caller *c, void *(*fn)(void *))
{
	assert_int_equal(far_thread_start(&c->t, "caller", fn, c), 0);
}

/* ------------------------------------------------------------------------------------------------------------- pins */

static void pinned_chunks_stay(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.local_max = 16 * CHUNK;
	setup(&f, 256, &o);
	assert_int_equal(far_region_pin(f.r, 10 * CHUNK + 5, 3 * CHUNK), 0); /* touches four */
	assert_int_equal(status(&f).pinned, 4 * CHUNK);
	for (unsigned k = 10; k < 14; k++)
		byte_at(&f, k * CHUNK);
	for (unsigned k = 50; k < 256; k++)
		assert_int_equal(byte_at(&f, k * CHUNK), pattern(k * CHUNK));
	assert_true(status(&f).local <= 16 * CHUNK);
	assert_int_equal(far_region_evict(f.r, 0, 256 * CHUNK), 0);
	assert_int_equal(status(&f).local, 4 * CHUNK);
	for (unsigned k = 10; k < 14; k++)
		assert_true(is_local(&f, k));
	assert_int_equal(far_region_pin(f.r, 0, 256 * CHUNK), -ENOSPC);
	assert_int_equal(status(&f).pinned, 4 * CHUNK);
	assert_int_equal(far_region_pin(f.r, 10 * CHUNK, 16 * CHUNK), 0); /* those of before count once */
	assert_int_equal(far_region_pin(f.r, 0, 256 * CHUNK + 1), -EINVAL);
	assert_int_equal(far_region_unpin(f.r, 0, 256 * CHUNK), 0);
	assert_int_equal(status(&f).pinned, 0);
	assert_int_equal(far_region_evict(f.r, 0, 256 * CHUNK), 0);
	assert_int_equal(status(&f).local, 0);
	teardown(&f);
}

/* The budget is used up by others: pinned ones come in all the same, and at once after a failure. */
static void pinned_chunks_are_fetched(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.pull_workers = 2;
	o.local_max = 256 * CHUNK;
	o.window = 64 * CHUNK;
	setup(&f, 1024, &o);
	EVENTUALLY(status(&f).local > 0); /* how near it goes to the budget depends on what the path delivers at once */
	f.s.fail_reads = ECONNRESET;
	assert_int_equal(far_region_pin(f.r, 1000 * CHUNK, 4 * CHUNK), 0);
	EVENTUALLY(status(&f).errors > 0);
	f.s.fail_reads = 0;
	EVENTUALLY(is_local(&f, 1000) && is_local(&f, 1001) && is_local(&f, 1002) && is_local(&f, 1003));
	teardown(&f);
}

/* ----------------------------------------------------------------------------------------------------------- fences */

static void a_fenced_region_keeps_what_it_has(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = 2;
	o.push_interval_ms = 1000 * 1000;
	setup(&f, 16, &o);
	fill(&f, 3, 'a');
	far_region_fence(f.r);
	assert_int_equal(far_write(f.face, 0, "x", 1, 0), -ESTALE);
	assert_int_equal(far_zero(f.face, 0, CHUNK, 0), -ESTALE);
	assert_int_equal(far_region_flush(f.r), -ESTALE);
	assert_int_equal(byte_at(&f, 3 * CHUNK), 'a');
	assert_int_equal(byte_at(&f, 5 * CHUNK), pattern(5 * CHUNK)); /* absent ones too */
	assert_int_equal(f.s.writes, 0);
	assert_int_equal(status(&f).dirty, CHUNK);
	assert_int_equal(status(&f).lease, FAR_LEASE_FENCED);
	teardown(&f);
}

static void a_push_that_is_refused_fences(void **state)
{
	const int workers[] = { 0, 4 };

	for (size_t k = 0; k < FAR_ARRAY_LEN(workers); k++) {
		struct far_mount_opts o = quiet();
		struct fixture f;
		o.push_workers = workers[k];
		o.push_interval_ms = 5;
		setup(&f, 16, &o);
		f.s.fail_writes = ESTALE;
		fill(&f, 3, 'a');
		if (!workers[k])
			assert_int_equal(far_region_flush(f.r), -ESTALE);
		EVENTUALLY(status(&f).lease == FAR_LEASE_FENCED);
		f.s.fail_writes = 0; /* never asked again */
		unsigned writes = f.s.writes;
		assert_int_equal(far_region_flush(f.r), -ESTALE);
		assert_int_equal(far_write(f.face, 0, "x", 1, 0), -ESTALE);
		assert_int_equal(f.s.writes, writes);
		assert_int_equal(status(&f).dirty, CHUNK);
		assert_int_equal(byte_at(&f, 3 * CHUNK), 'a');
		teardown(&f);
	}
}

static void a_fence_ends_who_waits(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct caller flush = { .f = &f }, write = { .f = &f, .off = 9 * CHUNK };

	o.push_workers = 1;
	o.push_interval_ms = 1;
	o.dirty_max = 2 * CHUNK;
	setup(&f, 16, &o);
	f.s.hold_writes = true;
	fill(&f, 1, 'a');
	fill(&f, 3, 'b');
	EVENTUALLY(f.s.held == 1);
	start(&flush, call_flush);
	start(&write, call_write);
	far_sleep_until(far_now() + 20 * FAR_MSEC, false); /* both most likely wait by now; right either way */
	assert_false(write.done);
	far_region_fence(f.r);
	far_thread_join(&write.t);
	far_thread_join(&flush.t);
	assert_int_equal(write.err, -ESTALE);
	assert_int_equal(flush.err, -ESTALE);
	remote_release(&f.s);
	teardown(&f);
}

/* ---------------------------------------------------------------------------------------------------------- refresh */

static void change_remote(struct fixture *f, uint64_t off, unsigned char c)
{
	far_mutex_lock(&f->s.lock);
	f->s.data[off] = c;
	far_mutex_unlock(&f->s.lock);
}

static void a_refresh_drops_what_is_older(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	setup(&f, 256, &o);
	for (unsigned k = 0; k < 256; k++)
		byte_at(&f, k * CHUNK);
	fill(&f, 7, 'd');
	for (unsigned k = 0; k < 256; k++)
		change_remote(&f, k * CHUNK, (unsigned char)(k ^ 0x5a));
	assert_int_equal(byte_at(&f, 4 * CHUNK), pattern(4 * CHUNK));
	assert_int_equal(far_region_refresh(f.r, 4 * CHUNK + 100, 1), 0); /* a byte of it is enough */
	assert_int_equal(byte_at(&f, 4 * CHUNK), 4 ^ 0x5a);
	assert_int_equal(byte_at(&f, 5 * CHUNK), pattern(5 * CHUNK));
	assert_int_equal(far_region_refresh(f.r, 0, 256 * CHUNK), 0);
	for (unsigned k = 0; k < 256; k++)
		assert_int_equal(byte_at(&f, k * CHUNK), k == 7 ? 'd' : k ^ 0x5a); /* what was written here is newer */
	assert_int_equal(far_region_refresh(f.r, 0, 256 * CHUNK + 1), -EINVAL);
	teardown(&f);
}

/* A fetch has read older bytes and has not come back yet: a refresh waits for it and drops them. */
static void a_refresh_waits_for_fetches(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct caller read = { .f = &f, .off = 3 * CHUNK }, refresh = { .f = &f, .off = 0, .len = 8 * CHUNK };

	setup(&f, 16, &o);
	f.s.hold_reads = true;
	start(&read, call_read);
	EVENTUALLY(f.s.held == 1);
	start(&refresh, call_refresh);
	far_sleep_until(far_now() + 20 * FAR_MSEC, false);
	assert_false(refresh.done);
	uint64_t old = far_deadline_limit(far_now() + 20 * FAR_MSEC);
	assert_int_equal(far_region_refresh(f.r, 0, 8 * CHUNK), -ETIMEDOUT);
	far_deadline_restore(old);
	remote_release(&f.s);
	far_thread_join(&read.t);
	far_thread_join(&refresh.t);
	assert_int_equal(read.err, 0);
	assert_int_equal(refresh.err, 0);
	change_remote(&f, 3 * CHUNK, 0x77);
	assert_int_equal(far_region_refresh(f.r, 0, 16 * CHUNK), 0);
	assert_int_equal(byte_at(&f, 3 * CHUNK), 0x77);
	teardown(&f);
}

static void what_was_refreshed_is_pulled_again(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.pull_workers = 2;
	o.read_only = true;
	setup(&f, 64, &o);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	change_remote(&f, 9 * CHUNK, 0x77);
	assert_int_equal(far_region_refresh(f.r, 9 * CHUNK, CHUNK), 0);
	assert_int_equal(far_region_wait_local(f.r, UINT64_MAX), 0);
	assert_int_equal(byte_at(&f, 9 * CHUNK), 0x77);
	teardown(&f);
}

/* --------------------------------------------------------------------------------------------- a remote that forgets */

static void a_restart_makes_pushed_chunks_dirty_again(void **state)
{
	const int workers[] = { 0, 1, 8 };

	for (size_t k = 0; k < FAR_ARRAY_LEN(workers); k++) {
		struct far_mount_opts o = quiet();
		struct fixture f;
		o.push_workers = workers[k];
		o.push_interval_ms = 1;
		setup_how(&f, 64 * CHUNK, &o, FORGETS);
		for (unsigned c = 0; c < 64; c += 2)
			fill(&f, c, (char)(c + 1));
		if (workers[k])
			EVENTUALLY(status(&f).dirty == 0);
		remote_restart(&f.s);
		fill(&f, 1, 'n');
		assert_int_equal(far_region_flush(f.r), 0);
		assert_int_equal(status(&f).dirty, 0);
		for (unsigned c = 0; c < 64; c += 2)
			assert_int_equal(on_disk(&f, c * CHUNK), c + 1);
		assert_int_equal(on_disk(&f, CHUNK), 'n');
		teardown(&f);
	}
}

/* Nothing was written since: the flush alone finds out. */
static void a_flush_of_nothing_new_finds_a_restart(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = 2;
	o.push_interval_ms = 1;
	setup_how(&f, 64 * CHUNK, &o, FORGETS);
	fill(&f, 5, 'a');
	EVENTUALLY(status(&f).dirty == 0);
	remote_restart(&f.s);
	assert_int_equal(on_disk(&f, 5 * CHUNK), pattern(5 * CHUNK));
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(on_disk(&f, 5 * CHUNK), 'a');
	unsigned flushes = f.s.flushes;
	remote_restart(&f.s); /* it has everything on its disk now */
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(f.s.flushes, flushes);
	assert_int_equal(status(&f).dirty, 0);
	teardown(&f);
}

struct restarter {
	struct remote *s;
	struct far_thread t;
	_Atomic bool end;
	_Atomic unsigned n;
};

static void *restart_often(void *arg)
{
	struct restarter *r = arg;

	for (; !r->end; r->n++) {
		remote_restart(r->s);
		far_sleep_until(far_now() + 300 * FAR_USEC, false);
	}
	return NULL;
}

/* Restarts all the time: whenever a flush has said 0, the disk has it. */
static void a_flush_counts_only_under_one_instance(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct restarter r = { .s = &f.s };

	o.push_workers = 4;
	o.push_interval_ms = 1;
	setup_how(&f, 32 * CHUNK, &o, FORGETS);
	assert_int_equal(far_thread_start(&r.t, "restart", restart_often, &r), 0);
	for (unsigned k = 0; k < 60 || r.n < 100; k++) {
		unsigned n = 1 + k % 100;
		for (unsigned c = 0; c < 32; c += 1 + n % 5)
			fill(&f, c, (char)n);
		int err;
		uint64_t old = far_deadline_limit(far_now() + LONG_TIME);
		err = far_region_flush(f.r);
		far_deadline_restore(old);
		assert_int_equal(err, 0);
		for (unsigned c = 0; c < 32; c += 1 + n % 5)
			assert_int_equal(on_disk(&f, c * CHUNK), n);
	}
	r.end = true;
	far_thread_join(&r.t);
	teardown(&f);
}

static void unstable_chunks_are_not_evicted(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = 1;
	o.push_interval_ms = 1;
	setup_how(&f, 64 * CHUNK, &o, FORGETS);
	fill(&f, 5, 'a');
	EVENTUALLY(status(&f).dirty == 0);
	assert_int_equal(far_region_evict(f.r, 0, 64 * CHUNK), 0);
	assert_int_equal(status(&f).local, CHUNK);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(far_region_evict(f.r, 0, 64 * CHUNK), 0);
	assert_int_equal(status(&f).local, 0);
	assert_int_equal(byte_at(&f, 5 * CHUNK), 'a');
	teardown(&f);
}

/* Everything here was pushed and nothing flushed: the budget makes the pusher flush. */
static void a_budget_makes_chunks_stable(void **state)
{
	const int workers[] = { 0, 2 };

	for (size_t k = 0; k < FAR_ARRAY_LEN(workers); k++) {
		struct far_mount_opts o = quiet();
		struct fixture f;
		o.push_workers = workers[k];
		o.push_interval_ms = 1;
		o.local_max = 8 * CHUNK;
		o.dirty_max = workers[k] ? 0 : 4 * CHUNK; /* without workers the writers push */
		setup_how(&f, 256 * CHUNK, &o, FORGETS);
		for (unsigned c = 0; c < 256; c++)
			fill(&f, c, 'q');
		if (!workers[k])
			assert_int_equal(far_region_flush(f.r), 0);
		EVENTUALLY(status(&f).local <= 8 * CHUNK);
		assert_true(f.s.flushes > 0);
		teardown(&f);
	}
}

static void pushed_chunks_become_stable_by_themselves(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = 2;
	o.push_interval_ms = 1;
	setup_how(&f, 64 * CHUNK, &o, FORGETS);
	fill(&f, 5, 'a');
	EVENTUALLY(on_disk(&f, 5 * CHUNK) == 'a'); /* after 5 s */
	assert_int_equal(f.s.flushes, 1);
	teardown(&f);
}

/* ------------------------------------------------------------------------------------------------- the local store */

static void an_unreadable_clean_chunk_is_fetched_again(void **state)
{
	const int codes[] = { EIO, ENODATA };

	for (size_t k = 0; k < FAR_ARRAY_LEN(codes); k++) {
		struct far_mount_opts o = quiet();
		struct fixture f;
		char buf[16 * CHUNK];
		setup_how(&f, 16 * CHUNK, &o, OWN_LOCAL);
		assert_int_equal(far_read(f.face, 0, buf, sizeof buf, 0), 0);
		f.local.fail_from = 3 * CHUNK;
		f.local.fail_to = 3 * CHUNK + 512;
		f.local.fail_reads = codes[k];
		/* It never gets better: the reader is given the remote's bytes, the neighbours' come from here. */
		assert_int_equal(far_read(f.face, 0, buf, sizeof buf, 0), 0);
		for (uint64_t i = 0; i < sizeof buf; i++)
			assert_int_equal((unsigned char)buf[i], pattern(i));
		assert_true(status(&f).local_errors > 0);
		assert_int_equal(status(&f).errors, 0);
		f.local.fail_reads = 0;
		assert_int_equal(byte_at(&f, 3 * CHUNK), pattern(3 * CHUNK));
		assert_true(is_local(&f, 3));
		teardown(&f);
	}
}

static void an_unreadable_dirty_chunk_is_reported(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char buf[2 * CHUNK];

	o.push_workers = 2;
	o.push_interval_ms = 1000 * 1000;
	setup_how(&f, 64 * CHUNK, &o, OWN_LOCAL);
	for (unsigned c = 0; c < 8; c++)
		fill(&f, c, 'a');
	assert_int_equal(far_write(f.face, 20 * CHUNK, "part", 4, 0), 0);
	f.local.fail_from = 3 * CHUNK;
	f.local.fail_to = 4 * CHUNK;
	f.local.fail_reads = EIO;
	assert_int_equal(far_read(f.face, 3 * CHUNK, buf, 1, 0), -EIO);
	assert_int_equal(far_read(f.face, 2 * CHUNK, buf, 2 * CHUNK, 0), -EIO);
	assert_int_equal(far_region_flush(f.r), -EIO);
	/* The others get through, whatever that one does. */
	EVENTUALLY(status(&f).dirty == CHUNK);
	for (unsigned c = 0; c < 8; c++)
		assert_int_equal(on_disk(&f, c * CHUNK), c == 3 ? pattern(c * CHUNK) : 'a');
	assert_int_equal(far_region_flush(f.r), -EIO);
	f.local.fail_from = 20 * CHUNK;
	f.local.fail_to = 21 * CHUNK;
	if (far_region_flush(f.r) == 0) /* it was made whole and pushed before */
		assert_int_equal(on_disk(&f, 20 * CHUNK), 'p');
	f.local.fail_reads = 0;
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(on_disk(&f, 3 * CHUNK), 'a');
	assert_int_equal(status(&f).dirty, 0);
	teardown(&f);
}

/* W-B28: pull stops, writes are refused, reads go past; room is all it takes to go on. */
static void a_full_local_store_recovers(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char buf[CHUNK] = { 1 };

	o.push_workers = 2;
	o.push_interval_ms = 1;
	o.pull_workers = 4;
	o.max_partial = 1;
	setup_how(&f, 1024 * CHUNK, &o, OWN_LOCAL | HALF_FAILS); /* so much is not pulled before it is full */
	fill(&f, 300, 'a');
	f.local.fail_writes = ENOSPC;
	f.s.fail_reads = 0;
	assert_int_equal(far_write(f.face, 700 * CHUNK, buf, CHUNK, 0), -ENOSPC);
	EVENTUALLY(status(&f).local_full);
	assert_int_equal(byte_at(&f, 800 * CHUNK + 3), pattern(800 * CHUNK + 3));
	assert_false(is_local(&f, 800));
	assert_int_equal(far_region_pin(f.r, 900 * CHUNK, CHUNK), 0); /* something to pull */
	assert_int_equal(far_region_wait(f.r, 900 * CHUNK, CHUNK), -ENOSPC);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(on_disk(&f, 300 * CHUNK), 'a');
	f.local.fail_writes = 0;
	EVENTUALLY(is_local(&f, 900));
	EVENTUALLY(!status(&f).local_full);
	fill(&f, 700, 'b');
	assert_int_equal(byte_at(&f, 700 * CHUNK), 'b');
	teardown(&f);
}

/* The local store's disk dies under a read-mostly mount: its reader need not know. */
static void reads_go_past_a_local_store_that_fails(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	setup_how(&f, 64 * CHUNK, &o, OWN_LOCAL);
	byte_at(&f, 0);
	f.local.fail_writes = EIO;
	f.local.fail_reads = EIO;
	for (unsigned c = 0; c < 64; c++)
		assert_int_equal(byte_at(&f, c * CHUNK + c), pattern(c * CHUNK + c));
	assert_false(status(&f).local_full);
	teardown(&f);
}

/* A disk that fills up under half-written chunks: they reach the remote all the same, and their rest can be read. */
static void half_written_chunks_need_no_room(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char buf[512];

	o.push_workers = 2;
	o.push_interval_ms = 1000 * 1000;
	o.chunk = 4 * CHUNK;
	setup_how(&f, 64 * CHUNK, &o, OWN_LOCAL | FORGETS);
	memset(buf, 'h', sizeof buf);
	for (unsigned c = 0; c < 32; c += 4)
		for (unsigned k = 0; k < 6; k++) /* more ranges than are pushed one by one while there is room */
			assert_int_equal(far_write(f.face, c * CHUNK + k * 2048, buf, 512, 0), 0);
	f.local.fail_writes = ENOSPC;
	assert_int_equal(far_read(f.face, 40 * CHUNK, buf, 1, 0), 0); /* past it: it is known to be full now */
	assert_true(status(&f).local_full);
	/* The first reader of a part that is not here has the rest pushed. */
	assert_int_equal(byte_at(&f, 1024), pattern(1024));
	assert_int_equal(far_region_flush(f.r), 0);
	for (unsigned c = 0; c < 32; c += 4)
		for (unsigned k = 0; k < 6; k++) {
			assert_int_equal(on_disk(&f, c * CHUNK + k * 2048), 'h');
			assert_int_equal(byte_at(&f, c * CHUNK + k * 2048), 'h');
			assert_int_equal(byte_at(&f, c * CHUNK + k * 2048 + 512), pattern(c * CHUNK + k * 2048 + 512));
		}
	teardown(&f);
}

/* ------------------------------------------------------------------------------------------------- pushing, status */

static void half_written_chunks_are_pushed_as_they_are(void **state)
{
	const int workers[] = { 0, 2 };

	for (size_t k = 0; k < FAR_ARRAY_LEN(workers); k++) {
		struct far_mount_opts o = quiet();
		struct fixture f;
		unsigned char buf[CHUNK];
		o.push_workers = workers[k];
		o.push_interval_ms = 1000 * 1000;
		setup_how(&f, 16 * CHUNK, &o, FORGETS);
		assert_int_equal(far_write(f.face, 2 * CHUNK + 1000, "hello", 5, 0), 0);
		assert_int_equal(far_write(f.face, 2 * CHUNK + 2048, f.s.data, 1024, 0), 0);
		assert_int_equal(far_region_flush(f.r), 0);
		assert_int_equal(f.s.reads, 0);
		assert_int_equal(status(&f).dirty, 0);
		for (unsigned b = 0; b < CHUNK; b++) {
			buf[b] = pattern(2 * CHUNK + b);
			if (b >= 1000 && b < 1005)
				buf[b] = (unsigned char)"hello"[b - 1000];
			else if (b >= 2048 && b < 3072)
				buf[b] = pattern(b - 2048);
			assert_int_equal(on_disk(&f, 2 * CHUNK + b), buf[b]);
		}
		/* It can be written and pushed again, and what is here need not be fetched. */
		assert_int_equal(far_write(f.face, 2 * CHUNK + 1001, "E", 1, 0), 0);
		assert_true(status(&f).dirty > 0);
		assert_int_equal(far_region_flush(f.r), 0);
		buf[1001] = 'E';
		assert_int_equal(on_disk(&f, 2 * CHUNK + 1001), 'E');
		assert_int_equal(byte_at(&f, 2 * CHUNK + 1001), 'E');
		assert_int_equal(f.s.reads, 0);
		/* Fetched, it is clean. */
		unsigned char got[CHUNK];
		assert_int_equal(far_read(f.face, 2 * CHUNK, got, CHUNK, 0), 0);
		assert_memory_equal(got, buf, CHUNK);
		assert_int_equal(f.s.reads, 1);
		assert_int_equal(status(&f).dirty, 0);
		assert_int_equal(status(&f).local, CHUNK);
		unsigned writes = f.s.writes;
		assert_int_equal(far_region_flush(f.r), 0);
		assert_int_equal(f.s.writes, writes);
		teardown(&f);
	}
}

static void many_ranges_are_fetched_first(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	char buf[512];

	memset(buf, 'm', sizeof buf);
	setup(&f, 16, &o);
	for (unsigned k = 0; k < 5; k++)
		assert_int_equal(far_write(f.face, 3 * CHUNK + k * 1024 % CHUNK + k / 4 * 512, buf, 512, 0), 0);
	for (unsigned c = 5; c < 7; c++)
		for (unsigned k = 0; k < 4; k++)
			assert_int_equal(far_write(f.face, c * CHUNK + k * 1024, buf, 100 + (k > 1) * 412, 0), 0);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(f.s.reads, 0); /* four ranges at most */
	assert_int_equal(f.s.writes, 11);
	assert_int_equal(f.s.lists, 3); /* those of a chunk go out together */
	teardown(&f);

	o.chunk = 4 * CHUNK;
	setup(&f, 16, &o);
	for (unsigned k = 0; k < 8; k++)
		assert_int_equal(far_write(f.face, k * 2048, buf, 512, 0), 0);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(f.s.reads, 1);
	assert_int_equal(f.s.writes, 1);
	for (unsigned k = 0; k < 8; k++)
		assert_int_equal(on_disk(&f, k * 2048), 'm');
	teardown(&f);
}

/* A write while the copy of the half-written chunk is on its way is neither lost nor taken for pushed. */
static void a_half_written_chunk_is_written_while_it_is_pushed(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;
	struct caller flush = { .f = &f };
	char whole[CHUNK];

	for (unsigned k = 0; k < 2; k++) {
		o.push_workers = 1;
		o.push_interval_ms = 1;
		setup_how(&f, 16 * CHUNK, &o, FORGETS);
		f.s.hold_writes = true;
		assert_int_equal(far_write(f.face, 2 * CHUNK + 512, "old!", 4, 0), 0);
		EVENTUALLY(f.s.held == 1);
		assert_int_equal(far_write(f.face, 2 * CHUNK + 512, "new!", 4, 0), 0);
		assert_int_equal(far_write(f.face, 2 * CHUNK + 3000, "more", 4, 0), 0);
		if (k) { /* and it becomes whole by that */
			memset(whole, 'w', sizeof whole);
			assert_int_equal(far_write(f.face, 2 * CHUNK, whole, sizeof whole, 0), 0);
		}
		start(&flush, call_flush);
		remote_release(&f.s);
		far_thread_join(&flush.t);
		assert_int_equal(flush.err, 0);
		assert_int_equal(on_disk(&f, 2 * CHUNK + 512), k ? 'w' : 'n');
		assert_int_equal(on_disk(&f, 2 * CHUNK + 3000), k ? 'w' : 'm');
		assert_int_equal(on_disk(&f, 2 * CHUNK + 100), k ? 'w' : pattern(2 * CHUNK + 100));
		teardown(&f);
	}
}

static void pushed_half_written_chunks_can_be_evicted(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.max_partial = 8;
	setup_how(&f, 64 * CHUNK, &o, FORGETS);
	for (unsigned k = 0; k < 40; k++) { /* their places in the table are used again */
		assert_int_equal(far_write(f.face, k * CHUNK + 512, "half", 4, 0), 0);
		assert_int_equal(far_region_evict(f.r, 0, 64 * CHUNK), 0);
		assert_int_equal(byte_at(&f, k * CHUNK + 513), 'a'); /* not before it was pushed */
		assert_int_equal(far_region_flush(f.r), 0);
		assert_int_equal(far_region_evict(f.r, 0, 64 * CHUNK), 0);
	}
	assert_int_equal(f.s.reads, 0);
	assert_int_equal(byte_at(&f, 5 * CHUNK + 513), 'a');
	assert_int_equal(byte_at(&f, 5 * CHUNK + 511), pattern(5 * CHUNK + 511));
	assert_int_equal(f.s.reads, 1);
	/* A refresh forgets them, too. */
	assert_int_equal(far_write(f.face, 50 * CHUNK + 512, "half", 4, 0), 0);
	assert_int_equal(far_region_flush(f.r), 0);
	change_remote(&f, 50 * CHUNK + 512, 'H');
	assert_int_equal(far_region_refresh(f.r, 0, 64 * CHUNK), 0);
	assert_int_equal(byte_at(&f, 50 * CHUNK + 512), 'H');
	teardown(&f);
}

static void a_restart_makes_half_written_chunks_dirty_again(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = 2;
	o.push_interval_ms = 1;
	setup_how(&f, 16 * CHUNK, &o, FORGETS);
	assert_int_equal(far_write(f.face, 2 * CHUNK + 512, "half", 4, 0), 0);
	assert_int_equal(far_write(f.face, 3 * CHUNK + 512, "both", 4, 0), 0);
	EVENTUALLY(status(&f).dirty == 0);
	assert_int_equal(byte_at(&f, 3 * CHUNK), pattern(3 * CHUNK)); /* this one is whole by now */
	remote_restart(&f.s);
	assert_int_equal(far_region_flush(f.r), 0);
	assert_int_equal(on_disk(&f, 2 * CHUNK + 512), 'h');
	assert_int_equal(on_disk(&f, 3 * CHUNK + 512), 'b');
	teardown(&f);
}

static void long_runs_of_zeros_take_few_calls(void **state)
{
	const int workers[] = { 0, 8 };

	for (size_t k = 0; k < FAR_ARRAY_LEN(workers); k++) {
		struct far_mount_opts o = quiet();
		struct fixture f;
		const uint64_t chunks = 16384; /* 64 MiB */
		o.push_workers = workers[k];
		o.push_interval_ms = 1000 * 1000;
		setup(&f, chunks, &o);
		assert_int_equal(far_discard(f.face, 0, chunks * CHUNK, 0), 0);
		fill(&f, 9999, 'x');
		assert_int_equal(far_region_flush(f.r), 0);
		assert_true(f.s.zeros < 64);
		assert_int_equal(f.s.reads, 0);
		for (uint64_t off = 0; off < chunks * CHUNK; off++)
			if (f.s.data[off] != (off / CHUNK == 9999 ? 'x' : 0))
				fail_msg("byte %llu", (unsigned long long)off);
		teardown(&f);
	}
}

static void the_age_of_dirty_bytes_is_known(void **state)
{
	struct far_mount_opts o = quiet();
	struct fixture f;

	o.push_workers = 2;
	o.push_interval_ms = 10;
	setup(&f, 64, &o);
	assert_int_equal(status(&f).oldest_dirty_ms, 0);
	f.s.fail_writes = ECONNRESET;
	uint64_t began = far_now();
	fill(&f, 3, 'a');
	EVENTUALLY(status(&f).oldest_dirty_ms >= 50);
	assert_true(status(&f).oldest_dirty_ms <= (far_now() - began) / FAR_MSEC);
	EVENTUALLY(status(&f).errors > 0);
	assert_true(status(&f).last_error_at > 1600000000000 && status(&f).last_error == ECONNRESET);
	assert_true(status(&f).reconnects == 3 && status(&f).checksum_errors == 2 && !status(&f).persistent);
	f.s.fail_writes = 0;
	EVENTUALLY(status(&f).dirty == 0);
	assert_int_equal(status(&f).oldest_dirty_ms, 0);
	EVENTUALLY(status(&f).push_rate > 0);
	/* Always something dirty, none of it for long. */
	uint64_t until = far_now() + 2 * FAR_SEC, worst = 0;
	for (unsigned n = 0; far_now() < until; n++) {
		fill(&f, n % 64, (char)n);
		worst = far_max(worst, status(&f).oldest_dirty_ms);
	}
	assert_true(worst < 1800);
	teardown(&f);
}

/* Past the budget a writer goes at the pace of the push, without long stops. */
static void writers_are_slowed_smoothly(void **state)
{
	struct far_mount_opts o = quiet();
	struct far_region_conf conf = { .opts = &o, .local_is_zero = true };
	struct far_region *r;
	struct far_error err = { 0 };
	char buf[16384];
	uint64_t worst = 0;

	memset(buf, 3, sizeof buf);
	o.push_workers = 4;
	o.dirty_max = 4 << 20;
	assert_int_equal(far_open("mem:64M", NULL, &conf.local, &err), 0);
	assert_int_equal(far_open("mem:64M", NULL, &conf.remote, &err), 0);
	assert_int_equal(far_layer_open("delay:rtt=20ms,rate=2M", conf.remote, &conf.remote, &err), 0);
	assert_int_equal(far_region_open(&conf, &r, &err), 0);
	/* 6 MiB at 2 MB/s behind a budget of 4 MiB: a second of waiting, in pieces. Who waited until all was pushed would
	 * stand still for two. */
	for (uint64_t off = 0, last = far_now(); off < 6 << 20; off += sizeof buf) {
		assert_int_equal(far_write(far_region_backend(r), off, buf, sizeof buf, 0), 0);
		uint64_t now = far_now();
		worst = far_max(worst, now - last);
		last = now;
	}
	print_message("longest stop of a writer: %llu ms\n", (unsigned long long)(worst / FAR_MSEC));
	assert_true(worst < FAR_SEC);
	far_region_close(r);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(pinned_chunks_stay),
		cmocka_unit_test(pinned_chunks_are_fetched),
		cmocka_unit_test(a_fenced_region_keeps_what_it_has),
		cmocka_unit_test(a_push_that_is_refused_fences),
		cmocka_unit_test(a_fence_ends_who_waits),
		cmocka_unit_test(a_refresh_drops_what_is_older),
		cmocka_unit_test(a_refresh_waits_for_fetches),
		cmocka_unit_test(what_was_refreshed_is_pulled_again),
		cmocka_unit_test(a_restart_makes_pushed_chunks_dirty_again),
		cmocka_unit_test(a_flush_of_nothing_new_finds_a_restart),
		cmocka_unit_test(a_flush_counts_only_under_one_instance),
		cmocka_unit_test(unstable_chunks_are_not_evicted),
		cmocka_unit_test(a_budget_makes_chunks_stable),
		cmocka_unit_test(pushed_chunks_become_stable_by_themselves),
		cmocka_unit_test(an_unreadable_clean_chunk_is_fetched_again),
		cmocka_unit_test(an_unreadable_dirty_chunk_is_reported),
		cmocka_unit_test(a_full_local_store_recovers),
		cmocka_unit_test(reads_go_past_a_local_store_that_fails),
		cmocka_unit_test(half_written_chunks_need_no_room),
		cmocka_unit_test(half_written_chunks_are_pushed_as_they_are),
		cmocka_unit_test(many_ranges_are_fetched_first),
		cmocka_unit_test(a_half_written_chunk_is_written_while_it_is_pushed),
		cmocka_unit_test(pushed_half_written_chunks_can_be_evicted),
		cmocka_unit_test(a_restart_makes_half_written_chunks_dirty_again),
		cmocka_unit_test(long_runs_of_zeros_take_few_calls),
		cmocka_unit_test(the_age_of_dirty_bytes_is_known),
		cmocka_unit_test(writers_are_slowed_smoothly),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
