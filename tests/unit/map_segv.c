/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* far_map() without userfaultfd: read-only maps served by SIGSEGV, and maps of a backend's own pages. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/thread.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

#define CHUNK ((uint64_t)64 * 1024)

/* A remote whose bytes follow from where they are, and that fails or waits when it is told to. */
static struct source {
	uint64_t bytes;
	_Atomic int fail;
	_Atomic unsigned reads;
	_Atomic char plus;
} source;

static char byte_at(uint64_t off)
{
	return (char)(off / 4096 * 13 + off % 251 + 1 + atomic_load(&source.plus));
}

static int source_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	(void)self, (void)flags;
	atomic_fetch_add(&source.reads, 1);
	for (size_t i = 0; i < len; i++)
		((char *)buf)[i] = byte_at(off + i);
	return atomic_load(&source.fail);
}

static int source_flush(void *self)
{
	(void)self;
	return 0;
}

static void source_close(void *self)
{
	(void)self;
}

static struct far_mount *map_source(uint64_t bytes, struct far_mount_opts *o)
{
	static const struct far_ops ops = { .size = sizeof ops, .read = source_read, .flush = source_flush, .close = source_close };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_error err = { 0 };
	struct far_backend *b;
	struct far_mount *m;

	source.bytes = facts.bytes = bytes;
	atomic_store(&source.fail, 0);
	atomic_store(&source.reads, 0);
	assert_int_equal(far_backend_new(&ops, &source, &facts, &b), 0);
	o->mechanism = FAR_MECH_SIGSEGV;
	o->read_only = true;
	if (far_map(b, o, &m, &err))
		fail_msg("%s", err.text);
	return m;
}

static void check(struct far_mount *m, uint64_t step)
{
	volatile const char *p = far_addr(m);

	for (uint64_t i = 0; i < source.bytes; i += step)
		if (p[i] != byte_at(i))
			fail_msg("byte %lu of %lu is %d", (unsigned long)i, (unsigned long)source.bytes, p[i]);
	for (uint64_t i = source.bytes; i % 4096; i++)
		assert_int_equal(p[i], 0);
}

static void reads(void **state)
{
	static const uint64_t sizes[] = { 1, 4096, 5000, 65536, 3 * 65536 + 17, 8 << 20 };

	(void)state;
	for (size_t k = 0; k < 2 * sizeof sizes / sizeof sizes[0]; k++) {
		struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
		struct far_status st = FAR_STATUS_INIT;
		o.mode = k % 2 ? FAR_MODE_MANAGED : FAR_MODE_DIRECT;
		struct far_mount *m = map_source(sizes[k / 2], &o);
		check(m, 1021);
		assert_int_equal(far_mount_status(m, &st), 0);
		assert_int_equal(st.mechanism, FAR_MECH_SIGSEGV);
		assert_int_equal(st.tracking, FAR_TRACK_NONE);
		assert_false(st.kernel_faults);
		assert_true(st.faults >= 1 && st.faults <= 2 + sizes[k / 2] / CHUNK);
		assert_int_equal(far_mount_close(m), 0);
	}
}

static void nothing(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_mount *m = map_source(0, &o);

	(void)state;
	assert_int_equal(*(volatile char *)far_addr(m), 0);
	assert_int_equal(far_mount_close(m), 0);
}

struct reader {
	struct far_thread thread;
	struct far_mount *m;
	unsigned seed;
	bool wrong;
};

static void *reader_run(void *arg)
{
	struct reader *r = arg;
	volatile const char *p = far_addr(r->m);
	sigset_t none;

	sigemptyset(&none);
	pthread_sigmask(SIG_SETMASK, &none, NULL);
	for (unsigned k = 0; k < 2000; k++) {
		uint64_t off = (uint64_t)rand_r(&r->seed) % source.bytes;
		if (p[off] != byte_at(off))
			r->wrong = true;
	}
	return NULL;
}

/* An eighth of the region fits: evictions under readers. */
static void evicts(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_status st = FAR_STATUS_INIT;
	struct reader r[8];

	(void)state;
	o.local_max = 1 << 20;
	struct far_mount *m = map_source(8 << 20, &o);
	for (unsigned i = 0; i < 8; i++) {
		r[i] = (struct reader){ .m = m, .seed = i + 1 };
		assert_int_equal(far_thread_start(&r[i].thread, "reader", reader_run, &r[i]), 0);
	}
	for (unsigned i = 0; i < 8; i++) {
		far_thread_join(&r[i].thread);
		assert_false(r[i].wrong);
	}
	assert_int_equal(far_mount_status(m, &st), 0);
	if (st.local > (1 << 20) + 32 * CHUNK)
		fail_msg("%lu bytes are local", (unsigned long)st.local);
	assert_true(atomic_load(&source.reads) > 128);
	assert_int_equal(far_mount_close(m), 0);
}

static void populates(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_status st = FAR_STATUS_INIT;
	int fd = open("/dev/null", O_WRONLY), mem = memfd_create("x", MFD_CLOEXEC);

	(void)state;
	o.mode = FAR_MODE_DIRECT;
	struct far_mount *m = map_source(4 << 20, &o);
	const char *p = far_addr(m);
	assert_int_equal(write(mem, p + CHUNK, 100), -1);
	assert_int_equal(errno, EFAULT); /* the kernel does not ask us */
	assert_int_equal(far_mount_populate(m, CHUNK + 5, 5 * CHUNK), 0);
	assert_int_equal(write(mem, p + CHUNK + 5, 5 * CHUNK), 5 * CHUNK);
	assert_int_equal(far_mount_status(m, &st), 0);
	assert_int_equal(st.faults, 0);
	assert_int_equal(far_mount_discard(m, 0, CHUNK), -EROFS);
	assert_int_equal(far_mount_close(m), 0);
	close(fd);
	close(mem);
}

static sigjmp_buf back;

static void catches(int sig)
{
	siglongjmp(back, sig);
}

static int raised(const volatile char *p)
{
	struct sigaction sa = { .sa_handler = catches }, old;
	int sig;

	sigaction(SIGBUS, &sa, &old);
	sig = sigsetjmp(back, 1);
	if (sig == 0)
		(void)*p;
	sigaction(SIGBUS, &old, NULL);
	return sig;
}

static void fails(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;

	(void)state;
	o.deadline_ms = 300;
	o.mode = FAR_MODE_DIRECT;
	struct far_mount *m = map_source(4 << 20, &o);
	volatile const char *p = far_addr(m);
	assert_int_equal(raised(p), 0);
	atomic_store(&source.fail, -EIO);
	assert_int_equal(raised(p + 32 * CHUNK), SIGBUS);
	assert_int_equal(raised(p), 0);
	atomic_store(&source.fail, 0);
	assert_int_equal(far_mount_heal(m, 0, 4 << 20), 0);
	assert_int_equal(raised(p + 32 * CHUNK), 0);
	check(m, 4093);
	assert_int_equal(far_mount_close(m), 0);
}

static void refused(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_error err = { 0 };
	struct far_backend *b;
	struct far_mount *m;

	(void)state;
	assert_int_equal(far_open("mem:1M", NULL, &b, &err), 0);
	o.mechanism = FAR_MECH_SIGSEGV;
	assert_int_equal(far_map(b, &o, &m, &err), -EOPNOTSUPP);
	assert_non_null(strstr(err.text, "read-only"));
	far_close(b);
}

/* ------------------------------------------------------------------------------------------------------------- share */

static char path[] = "/tmp/far-map-share-XXXXXX";

static void shares(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_status st = FAR_STATUS_INIT;
	struct far_error err = { 0 };
	struct far_mount *m;
	char uri[100], got[16];
	int fd = mkstemp(path);

	(void)state;
	assert_true(fd >= 0 && ftruncate(fd, 3 * 65536 + 10) == 0);
	assert_int_equal(pwrite(fd, "hello", 5, 70000), 5);
	snprintf(uri, sizeof uri, "file:%s", path);
	o.mode = FAR_MODE_DIRECT;
	if (far_map_uri(uri, &o, &m, &err))
		fail_msg("%s", err.text);
	assert_int_equal(far_mount_status(m, &st), 0);
	assert_int_equal(st.mechanism, FAR_MECH_SHARE);
	assert_int_equal(st.tracking, FAR_TRACK_NONE);
	assert_true(st.kernel_faults);
	char *p = far_addr(m);
	assert_memory_equal(p + 70000, "hello", 5);
	memcpy(p + 3 * 65536 + 5, "end", 3);
	assert_int_equal(p[3 * 65536 + 4095], 0);
	assert_int_equal(far_mount_flush(m), 0);
	assert_int_equal(pread(fd, got, 3, 3 * 65536 + 5), 3);
	assert_memory_equal(got, "end", 3);
	assert_int_equal(far_mount_populate(m, 0, 3 * 65536), 0);
	assert_int_equal(far_mount_discard(m, 70000, 5), 0);
	assert_int_equal(p[70000], 0);
	assert_int_equal(far_mount_close(m), 0);

	o.read_only = true;
	assert_int_equal(far_map_uri(uri, &o, &m, &err), 0);
	assert_int_equal(((char *)far_addr(m))[3 * 65536 + 5], 'e');
	assert_int_equal(far_mount_close(m), 0);
	close(fd);
	unlink(path);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(nothing), cmocka_unit_test(reads), cmocka_unit_test(evicts),  cmocka_unit_test(populates),
		cmocka_unit_test(fails), cmocka_unit_test(refused), cmocka_unit_test(shares),
	};

	return cmocka_run_group_tests_name("map_segv", tests, NULL, NULL);
}
