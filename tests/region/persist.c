/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The chunk map's file: what a region finds again after an orderly end and after kill -9, and what it refuses. The remote
 * is memory shared with the children that are killed. */
#include "base/clock.h"
#include "base/io.h"
#include "base/thread.h"
#include "region/chunkmap.h"
#include "region/region.h"

#include <setjmp.h>
#include <stdarg.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define CHUNK 4096
#define CHUNKS 1000
#define BYTES (CHUNKS * CHUNK - 1234)

struct shared {
	_Atomic int fail; /* errno of every call */
	_Atomic unsigned reads, writes;
	unsigned char data[CHUNKS * CHUNK];
};

static struct shared *remote;
static char dir[64], local_path[96], map_path[110];

static int shared_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	if (remote->fail)
		return -remote->fail;
	remote->reads++;
	memcpy(buf, remote->data + off, len);
	return 0;
}

static int shared_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	if (remote->fail)
		return -remote->fail;
	remote->writes++;
	memcpy(remote->data + off, buf, len);
	return 0;
}

static int shared_flush(void *self)
{
	return -remote->fail;
}

/* A local store whose slow reader reads the second half of a chunk again when it is told to. */
static bool slow_local;
static _Thread_local bool slow;
static _Atomic bool slow_reading, slow_go;
static _Atomic int slow_result;

static int slow_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	int err = far_read(self, off, buf, len, flags);

	if (err || !slow || len < CHUNK || slow_go)
		return err;
	slow_reading = true;
	while (!slow_go)
		far_thread_yield();
	return far_read(self, off + len / 2, (char *)buf + len / 2, len - len / 2, flags);
}

static int slow_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return far_write(self, off, buf, len, flags);
}

static int slow_flush(void *self)
{
	return far_flush(self);
}

static void slow_close(void *self)
{
	far_close(self);
}

static struct far_backend *slow_wrap(struct far_backend *inner)
{
	const struct far_ops ops = { FAR_OPS_INIT, .read = slow_read, .write = slow_write, .flush = slow_flush,
				     .close = slow_close };
	struct far_facts facts = { .size = sizeof facts, .bytes = BYTES, .caps = FAR_CAP_WRITE | FAR_CAP_DURABLE };
	struct far_backend *b;

	assert_int_equal(far_backend_new(&ops, inner, &facts, &b), 0);
	return b;
}

static int try_open(struct far_mount_opts o, enum far_persist_mode mode, struct far_region **out, struct far_error *err)
{
	const struct far_ops ops = { FAR_OPS_INIT, .read = shared_read, .write = shared_write, .flush = shared_flush };
	struct far_facts facts = { .size = sizeof facts, .bytes = BYTES, .caps = FAR_CAP_WRITE | FAR_CAP_DURABLE };
	struct far_region_conf conf = { .opts = &o };
	char uri[140];

	int e = far_persist_open(map_path, mode, &conf.persist, err);
	if (e)
		return e;
	snprintf(uri, sizeof uri, "file:%s?size=%d", local_path, BYTES);
	assert_int_equal(far_open(uri, NULL, &conf.local, err), 0);
	if (slow_local)
		conf.local = slow_wrap(conf.local);
	assert_int_equal(far_backend_new(&ops, remote, &facts, &conf.remote), 0);
	e = far_region_open(&conf, out, err);
	if (e) {
		far_persist_close(conf.persist);
		far_close(conf.local);
		far_close(conf.remote);
	}
	return e;
}

static struct far_mount_opts quiet(enum far_durable durable)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;

	o.chunk = CHUNK;
	o.pull_workers = o.push_workers = 0;
	o.deadline_ms = 2000;
	o.durable = durable;
	return o;
}

static struct far_region *open_region(struct far_mount_opts o)
{
	struct far_region *r;
	struct far_error err = { 0 };

	if (try_open(o, FAR_PERSIST_WRITABLE, &r, &err))
		fail_msg("%s", err.text);
	return r;
}

static int setup(void **state)
{
	snprintf(dir, sizeof dir, "/tmp/farpage-persist-XXXXXX");
	assert_non_null(mkdtemp(dir));
	snprintf(local_path, sizeof local_path, "%s/cache.img", dir);
	snprintf(map_path, sizeof map_path, "%s.farmap", local_path);
	remote = mmap(NULL, sizeof *remote, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	assert_ptr_not_equal(remote, MAP_FAILED);
	for (size_t k = 0; k < BYTES; k++)
		remote->data[k] = (unsigned char)(k * 31 + k / CHUNK * 7 + 1);
	return 0;
}

static int teardown(void **state)
{
	unlink(local_path);
	unlink(map_path);
	rmdir(dir);
	munmap(remote, sizeof *remote);
	return 0;
}

/* Run fn in a child with a region and kill it with -9 afterwards. */
static void in_child(struct far_mount_opts o, void (*fn)(struct far_region *r))
{
	fflush(NULL);
	pid_t pid = fork();
	assert_true(pid >= 0);
	if (!pid) {
		struct far_region *r = open_region(o);
		fn(r);
		kill(getpid(), SIGKILL);
		_exit(99);
	}
	int status;
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static unsigned char *expect_new(void)
{
	unsigned char *e = malloc(BYTES);
	assert_non_null(e);
	memcpy(e, remote->data, BYTES);
	return e;
}

static void read_all(struct far_region *r, const unsigned char *expect)
{
	unsigned char *buf = malloc(BYTES);

	assert_non_null(buf);
	int err = far_read(far_region_backend(r), 0, buf, BYTES, 0);
	assert_int_equal(err, 0);
	for (size_t k = 0; k < BYTES; k++)
		if (buf[k] != expect[k])
			fail_msg("byte %zu (chunk %zu) is %u, not %u", k, k / CHUNK, buf[k], expect[k]);
	free(buf);
}

static void pull_all(struct far_region *r)
{
	assert_int_equal(far_region_wait(r, 0, BYTES), 0);
}

/* Until the file says that so many chunks are here. */
static void wait_for_map(uint64_t chunks)
{
	uint64_t until = far_now() + 20 * FAR_SEC, local = 0;

	while (local != chunks && far_now() < until) {
		struct far_persist *p;
		struct far_error err;
		far_sleep_until(far_now() + 20 * FAR_MSEC, false);
		if (far_persist_open(map_path, FAR_PERSIST_LOOK, &p, &err) == 0) {
			local = far_persist_info(p)->local;
			far_persist_close(p);
		}
	}
	if (local != chunks) {
		fprintf(stderr, "the map says %llu chunks, not %llu\n", (unsigned long long)local, (unsigned long long)chunks);
		_exit(98);
	}
}

static void clean_restart(void **state)
{
	unsigned char *expect = expect_new();
	struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));

	pull_all(r);
	assert_int_equal(far_write(far_region_backend(r), 5000, "hello", 5, 0), 0);
	memcpy(expect + 5000, "hello", 5);
	assert_int_equal(far_region_flush(r), 0);
	far_region_close(r);
	struct far_persist *p;
	struct far_error err;
	assert_int_equal(far_persist_open(map_path, FAR_PERSIST_LOOK, &p, &err), 0);
	assert_true(far_persist_info(p)->clean);
	assert_int_equal(far_persist_info(p)->local, CHUNKS);
	assert_int_equal(far_persist_info(p)->dirty, 0);
	far_persist_close(p);
	remote->fail = EIO; /* it is not asked */
	r = open_region(quiet(FAR_DURABLE_REMOTE));
	read_all(r, expect);
	struct far_status st = FAR_STATUS_INIT;
	far_region_status(r, &st);
	assert_int_equal(st.local, BYTES);
	assert_int_equal(st.dirty, 0);
	far_region_close(r);
	free(expect);
}

/* Whole chunks, parts of pulled ones, parts of absent ones; durable here, the remote away. */
static const struct {
	uint64_t off;
	size_t len;
} writes[] = {
	{ 10 * CHUNK, 3 * CHUNK }, { 100 * CHUNK + 7, 100 }, { 200 * CHUNK + 512, 1024 }, { 300 * CHUNK - 700, 9000 },
	{ 3 * CHUNK, CHUNK }, { 20 * CHUNK + 1000, 1 }, { BYTES - 10, 10 }, { 600 * CHUNK, 64 * CHUNK },
};

static void write_some(struct far_region *r, unsigned char *expect)
{
	unsigned char buf[64 * CHUNK];

	for (size_t k = 0; k < FAR_ARRAY_LEN(writes); k++) {
		memset(buf, (int)(0x80 + k), writes[k].len);
		if (r)
			assert_int_equal(far_write(far_region_backend(r), writes[k].off, buf, writes[k].len, 0), 0);
		if (expect)
			memcpy(expect + writes[k].off, buf, writes[k].len);
	}
}

static void child_local(struct far_region *r)
{
	assert_int_equal(far_region_wait(r, 0, 50 * CHUNK), 0);
	wait_for_map(50);
	remote->fail = ETIMEDOUT;
	write_some(r, NULL);
	assert_int_equal(far_region_flush(r), 0);
}

static void killed_offline(void **state)
{
	unsigned char *expect = expect_new(), *was = expect_new(), buf[CHUNK];

	in_child(quiet(FAR_DURABLE_LOCAL), child_local);
	write_some(NULL, expect);
	assert_memory_equal(remote->data, was, BYTES);
	struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));
	for (size_t k = 0; k < FAR_ARRAY_LEN(writes); k++)
		for (size_t at = 0; at < writes[k].len; at += CHUNK) {
			size_t n = far_min(CHUNK, writes[k].len - at);
			assert_int_equal(far_read(far_region_backend(r), writes[k].off + at, buf, n, 0), 0);
			assert_memory_equal(buf, expect + writes[k].off + at, n);
		}
	assert_int_not_equal(far_region_flush(r), 0); /* the remote is still away */
	remote->fail = 0;
	read_all(r, expect);
	assert_int_equal(far_region_flush(r), 0);
	assert_memory_equal(remote->data, expect, BYTES);
	far_region_close(r);
	free(expect);
	free(was);
}

static void child_remote(struct far_region *r)
{
	assert_int_equal(far_region_wait(r, 0, 50 * CHUNK), 0);
	wait_for_map(50);
	write_some(r, NULL);
	assert_int_equal(far_region_flush(r), 0);
	/* Not flushed: may come or not, but nothing of the flushed may go. */
	assert_int_equal(far_write(far_region_backend(r), 700 * CHUNK, "x", 1, 0), 0);
}

static void killed_after_flush(void **state)
{
	unsigned char *expect = expect_new();

	in_child(quiet(FAR_DURABLE_REMOTE), child_remote);
	write_some(NULL, expect);
	assert_memory_equal(remote->data, expect, BYTES);
	struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));
	unsigned char x;
	assert_int_equal(far_read(far_region_backend(r), 700 * CHUNK, &x, 1, 0), 0);
	if (x == 'x')
		expect[700 * CHUNK] = 'x';
	read_all(r, expect);
	assert_int_equal(far_region_flush(r), 0);
	assert_memory_equal(remote->data, expect, BYTES);
	far_region_close(r);
	free(expect);
}

static void child_evict(struct far_region *r)
{
	pull_all(r);
	wait_for_map(CHUNKS);
	assert_int_equal(far_region_evict(r, 0, BYTES), 0);
}

static void killed_after_eviction(void **state)
{
	unsigned char *expect = expect_new();

	in_child(quiet(FAR_DURABLE_REMOTE), child_evict);
	struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));
	read_all(r, expect);
	struct far_status st = FAR_STATUS_INIT;
	far_region_status(r, &st);
	assert_int_equal(st.local_errors, 0); /* it was told, not found out */
	far_region_close(r);
	free(expect);
}

static void child_pull(struct far_region *r)
{
	pull_all(r);
	wait_for_map(CHUNKS);
}

static void killed_after_pull(void **state)
{
	unsigned char *expect = expect_new();

	in_child(quiet(FAR_DURABLE_REMOTE), child_pull);
	remote->fail = EIO;
	struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));
	read_all(r, expect);
	far_region_close(r);
	free(expect);
}

static void flip(const char *path, uint64_t off)
{
	int fd = open(path, O_RDWR);
	unsigned char c;

	assert_true(fd >= 0);
	assert_int_equal(far_io_pread(fd, off, &c, 1, 0), 0);
	c ^= 0x10;
	assert_int_equal(far_io_pwrite(fd, off, &c, 1, 0), 0);
	close(fd);
}

static void rotten_byte(void **state)
{
	unsigned char *expect = expect_new();

	in_child(quiet(FAR_DURABLE_REMOTE), child_pull);
	flip(local_path, 77 * CHUNK + 5);
	flip(local_path, 99 * CHUNK + 5);
	struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));
	/* A write of a part of a rotten chunk must not make the rot newer than the remote. */
	assert_int_equal(far_write(far_region_backend(r), 99 * CHUNK + 100, "w", 1, 0), 0);
	expect[99 * CHUNK + 100] = 'w';
	read_all(r, expect);
	struct far_status st = FAR_STATUS_INIT;
	far_region_status(r, &st);
	assert_int_equal(st.local_errors, 2);
	assert_int_equal(far_region_flush(r), 0);
	assert_memory_equal(remote->data, expect, BYTES);
	far_region_close(r);
	free(expect);
}

static void *slow_reader(void *arg)
{
	unsigned char buf[10];

	slow = true;
	slow_result = far_read(far_region_backend(arg), 7 * CHUNK, buf, sizeof buf, 0);
	return NULL;
}

/* Who looks at a chunk while another, who has looked already, writes it must not take that for rot. */
static void looked_at_while_written(void **state)
{
	in_child(quiet(FAR_DURABLE_REMOTE), child_pull);
	slow_local = true;
	struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));
	struct far_thread t = { 0 };
	struct far_status st = FAR_STATUS_INIT;

	slow_reading = slow_go = false;
	assert_int_equal(far_thread_start(&t, "slow", slow_reader, r), 0);
	while (!slow_reading)
		far_thread_yield();
	assert_int_equal(far_write(far_region_backend(r), 7 * CHUNK + 3000, "news", 4, 0), 0);
	slow_go = true;
	far_thread_join(&t);
	assert_int_equal(slow_result, 0);
	far_region_status(r, &st);
	assert_int_equal(st.local_errors, 0);
	far_region_close(r);
	slow_local = false;
}

static void expect_refusal(enum far_persist_mode mode, uint64_t chunk, int code, const char *text)
{
	struct far_mount_opts o = quiet(FAR_DURABLE_REMOTE);
	struct far_error err = { 0 };
	struct far_region *r;

	o.chunk = chunk;
	assert_int_equal(try_open(o, mode, &r, &err), -code);
	if (!strstr(err.text, text))
		fail_msg("'%s' does not say '%s'", err.text, text);
}

static void refusals(void **state)
{
	in_child(quiet(FAR_DURABLE_REMOTE), child_pull);
	expect_refusal(FAR_PERSIST_WRITABLE, 8192, EINVAL, "--chunk 4096");
	flip(map_path, 100);
	flip(map_path, 4096 + 100);
	expect_refusal(FAR_PERSIST_WRITABLE, CHUNK, EUCLEAN, "damaged");
	flip(map_path, 100);
	flip(map_path, 4096 + 100);
	flip(map_path, 100); /* one copy is enough */
	far_region_close(open_region(quiet(FAR_DURABLE_REMOTE)));
	flip(map_path, 8 + 1); /* format 0x1001 */
	flip(map_path, 4096 + 8 + 1);
	expect_refusal(FAR_PERSIST_WRITABLE, CHUNK, EPROTONOSUPPORT, "newer farpage");
	assert_int_equal(truncate(map_path, 0), 0);
	int fd = open(map_path, O_WRONLY);
	assert_int_equal(far_io_pwrite(fd, 0, "something else", 14, 0), 0);
	close(fd);
	expect_refusal(FAR_PERSIST_WRITABLE, CHUNK, EINVAL, "no chunk map");
}

static void one_at_a_time(void **state)
{
	struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));
	struct far_mount_opts o = quiet(FAR_DURABLE_REMOTE);
	struct far_region *a, *b;
	struct far_error err;

	expect_refusal(FAR_PERSIST_WRITABLE, CHUNK, EBUSY, "another mount");
	expect_refusal(FAR_PERSIST_READ_ONLY, CHUNK, EBUSY, "another mount");
	far_region_close(r);
	o.read_only = true;
	unsigned char *expect = expect_new();
	assert_int_equal(try_open(o, FAR_PERSIST_READ_ONLY, &a, &err), 0);
	assert_int_equal(try_open(o, FAR_PERSIST_READ_ONLY, &b, &err), 0);
	expect_refusal(FAR_PERSIST_WRITABLE, CHUNK, EBUSY, "another mount");
	read_all(a, expect);
	assert_int_equal(far_region_evict(a, 0, BYTES), 0);
	read_all(b, expect);
	read_all(a, expect);
	far_region_close(a);
	far_region_close(b);
	free(expect);
}

/* Rounds of random writes, flushes and evictions, each killed at its end; sectors know which write they are of. */
static unsigned seed;
static unsigned round_now;

static unsigned rnd(unsigned *s)
{
	*s = *s * 1664525u + 1013904223u;
	return *s >> 8;
}

struct oracle {
	uint32_t acked[BYTES / 512 + 1], newest[BYTES / 512 + 1]; /* number of the write */
	uint32_t number;
};
static struct oracle *oracle; /* shared with the child */

static void child_random(struct far_region *r)
{
	static uint32_t buf[16 * 128];
	unsigned s = seed + round_now * 977;

	for (unsigned n = 0; n < 120; n++) {
		unsigned what = rnd(&s) % 10;
		if (what < 6) {
			unsigned first = rnd(&s) % (BYTES / 512 - 16), sectors = 1 + rnd(&s) % 16;
			if (what == 0) {
				first &= ~7u;
				sectors = 8;
			}
			uint32_t number = oracle->number + 1;
			for (unsigned k = 0; k < sectors; k++)
				oracle->newest[first + k] = number;
			oracle->number = number;
			for (unsigned k = 0; k < sectors * 128; k++)
				buf[k] = number;
			assert_int_equal(far_write(far_region_backend(r), (uint64_t)first * 512, buf, sectors * 512, 0), 0);
		} else if (what < 8) {
			static uint32_t at[BYTES / 512 + 1];
			memcpy(at, oracle->newest, sizeof at);
			assert_int_equal(far_region_flush(r), 0);
			memcpy(oracle->acked, at, sizeof at);
		} else if (what == 8) {
			assert_int_equal(far_region_evict(r, 0, BYTES), 0);
		} else {
			assert_int_equal(far_region_wait(r, rnd(&s) % (CHUNKS / 2) * CHUNK, 100 * CHUNK), 0);
		}
	}
}

static void killed_at_random(void **state)
{
	static uint32_t buf[BYTES / 4 + 1];

	seed = (unsigned)time(NULL);
	print_message("seed %u\n", seed);
	oracle = mmap(NULL, sizeof *oracle, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memset(remote->data, 0, BYTES);
	for (round_now = 0; round_now < 12; round_now++) {
		struct far_mount_opts o = quiet(round_now % 2 ? FAR_DURABLE_LOCAL : FAR_DURABLE_REMOTE);
		o.push_workers = round_now % 3;
		o.push_interval_ms = 5;
		in_child(o, child_random);
		struct far_region *r = open_region(quiet(FAR_DURABLE_REMOTE));
		assert_int_equal(far_read(far_region_backend(r), 0, buf, BYTES, 0), 0);
		for (unsigned k = 0; k < BYTES / 512; k++) {
			for (unsigned w = 1; w < 128; w++)
				assert_int_equal(buf[k * 128 + w], buf[k * 128]);
			if (buf[k * 128] < oracle->acked[k] || buf[k * 128] > oracle->newest[k])
				fail_msg("round %u: sector %u is of write %u; acknowledged %u, newest %u", round_now, k, buf[k * 128],
					 oracle->acked[k], oracle->newest[k]);
			oracle->acked[k] = oracle->newest[k] = buf[k * 128];
		}
		assert_int_equal(far_region_flush(r), 0);
		assert_memory_equal(remote->data, buf, BYTES);
		far_region_close(r);
	}
	munmap(oracle, sizeof *oracle);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(clean_restart, setup, teardown),
		cmocka_unit_test_setup_teardown(killed_after_pull, setup, teardown),
		cmocka_unit_test_setup_teardown(killed_offline, setup, teardown),
		cmocka_unit_test_setup_teardown(killed_after_flush, setup, teardown),
		cmocka_unit_test_setup_teardown(killed_after_eviction, setup, teardown),
		cmocka_unit_test_setup_teardown(rotten_byte, setup, teardown),
		cmocka_unit_test_setup_teardown(looked_at_while_written, setup, teardown),
		cmocka_unit_test_setup_teardown(refusals, setup, teardown),
		cmocka_unit_test_setup_teardown(one_at_a_time, setup, teardown),
		cmocka_unit_test_setup_teardown(killed_at_random, setup, teardown),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
