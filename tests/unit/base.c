/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Errors, clock and deadline, buffer pool, file I/O. */
#define _GNU_SOURCE
#include "base/base.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/io.h"
#include "base/pool.h"
#include "base/thread.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#include <cmocka.h>

static void errors_are_set_and_prefixed(void **state)
{
	struct far_error err = { 0 };
	char *text = malloc(2000);

	assert_int_equal(far_error_set(&err, ENOENT, "no %s", "x"), -ENOENT);
	assert_string_equal(err.text, "no x");
	assert_int_equal(far_error_prefix(&err, "opening %d", 3), -ENOENT);
	assert_string_equal(err.text, "opening 3: no x");
	assert_int_equal(far_error_set(NULL, EIO, "x"), -EIO);
	assert_int_equal(far_error_prefix(NULL, "x"), -EIO);
	memset(text, 'a', 1999);
	text[1999] = 0;
	far_error_set(&err, EIO, "%s", text);
	assert_int_equal(strlen(err.text), sizeof err.text - 1);
	assert_int_equal(far_error_prefix(&err, "%s", text), -EIO);
	assert_int_equal(strlen(err.text), sizeof err.text - 1);
	assert_string_equal(far_strerror(-ENOENT), far_strerror(ENOENT));
	assert_string_equal(far_strerror(99999), "unknown error");
	free(text);
}

static void a_broken_promise_aborts(void **state)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		close(STDERR_FILENO);
		FAR_ASSERT(1 == 2);
		_exit(0);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
}

static void deadlines_only_shrink(void **state)
{
	assert_true(far_deadline() == FAR_NEVER);
	assert_int_equal(far_deadline_poll_ms(FAR_NEVER), -1);
	assert_int_equal(far_deadline_poll_ms(1), 0);
	uint64_t now = far_now();
	uint64_t old = far_deadline_limit(now + 100 * FAR_SEC);
	assert_true(old == FAR_NEVER && far_deadline() == now + 100 * FAR_SEC);
	uint64_t outer = far_deadline_limit(now + 200 * FAR_SEC);
	assert_true(outer == far_deadline() && far_deadline() == now + 100 * FAR_SEC);
	far_deadline_limit(now + 50 * FAR_SEC);
	assert_true(far_deadline() == now + 50 * FAR_SEC);
	assert_in_range(far_deadline_poll_ms(far_deadline()), 1, 50000);
	far_deadline_restore(outer);
	far_deadline_restore(old);
	assert_true(far_deadline() == FAR_NEVER);
	assert_int_equal(far_deadline_poll_ms(FAR_NEVER - 1), INT32_MAX);
}

static void *deadline_of_thread(void *arg)
{
	*(uint64_t *)arg = far_deadline();
	return NULL;
}

static void deadlines_belong_to_their_thread(void **state)
{
	struct far_thread t = { 0 };
	uint64_t seen = 0, old = far_deadline_limit(far_now() + FAR_SEC);

	assert_int_equal(far_thread_start(&t, "deadline", deadline_of_thread, &seen), 0);
	far_thread_join(&t);
	far_thread_join(&t);
	assert_true(seen == FAR_NEVER);
	far_deadline_restore(old);
}

static void sleeping_is_never_short(void **state)
{
	for (int precise = 0; precise < 2; precise++) {
		uint64_t when = far_now() + FAR_MSEC;
		far_sleep_until(when, precise);
		assert_true(far_now() >= when);
	}
	far_sleep_until(0, true);
}

static void conditions_time_out(void **state)
{
	struct far_mutex l;
	struct far_cond c;
	uint64_t until = far_now() + FAR_MSEC;

	far_mutex_init(&l);
	far_cond_init(&c);
	far_mutex_lock(&l);
	assert_false(far_mutex_trylock(&l));
	while (far_cond_wait_until(&c, &l, until))
		;
	far_mutex_unlock(&l);
	assert_true(far_now() >= until);
	far_cond_fini(&c);
	far_mutex_fini(&l);
}

static void buffers_are_aligned_and_come_back(void **state)
{
	static const size_t lens[] = { 0, 1, 4096, 4097, 65536, (1 << 20) + 1, 32 << 20, (32 << 20) + 1 };

	for (size_t i = 0; i < FAR_ARRAY_LEN(lens); i++) {
		unsigned char *a = far_buf_get(lens[i]), *b = far_buf_get(lens[i]);
		assert_non_null(a);
		assert_non_null(b);
		assert_ptr_not_equal(a, b);
		assert_int_equal((uintptr_t)a % 4096, 0);
		if (lens[i])
			a[0] = a[lens[i] - 1] = 1;
		far_buf_put(a, lens[i]);
		far_buf_put(b, lens[i]);
		if (lens[i] <= 32 << 20) {
			unsigned char *c = far_buf_get(lens[i]);
			assert_ptr_equal(c, b);
			far_buf_put(c, lens[i]);
		}
	}
	far_buf_put(NULL, 5);
	assert_null(far_buf_get((size_t)1 << 62));
}

static void zeros_are_seen_at_any_place(void **state)
{
	unsigned char buf[100];

	for (size_t at = 0; at < 4; at++)
		for (size_t n = 0; n < 90; n++) {
			memset(buf, 0xff, sizeof buf);
			memset(buf + at, 0, n);
			assert_true(far_is_zero(buf + at, n));
			for (size_t i = 0; i < n; i++) {
				buf[at + i] = 1;
				assert_false(far_is_zero(buf + at, n));
				buf[at + i] = 0;
			}
		}
}

static void files_are_moved_in_full(void **state)
{
	char buf[10] = "123456789";
	int fd = memfd_create("t", 0);

	assert_int_equal(far_io_pwrite(fd, 5, buf, 10, 0), 0);
	assert_int_equal(far_io_pwrite(fd, 5, buf, 10, FAR_NOWAIT), -EAGAIN);
	memset(buf, 0, sizeof buf);
	assert_int_equal(far_io_pread(fd, 5, buf, 10, 0), 0);
	assert_string_equal(buf, "123456789");
	assert_int_equal(far_io_pread(fd, 6, buf, 10, 0), -ENODATA);
	assert_int_equal(far_io_pread(fd, 100, buf, 1, 0), -ENODATA);
	assert_int_equal(far_io_pread(-1, 0, buf, 1, 0), -EBADF);
	assert_int_equal(far_io_fdatasync(-1), -EBADF);
	assert_int_equal(far_io_fdatasync(fd), 0);
	size_t got;
	assert_int_equal(lseek(fd, 0, SEEK_SET), 0);
	assert_int_equal(far_io_read_some(fd, buf, 10, &got), 0);
	assert_int_equal(got, 10);
	assert_int_equal(far_io_read(fd, buf, 5), 0);
	assert_int_equal(far_io_read(fd, buf, 1), -ENODATA);
	close(fd);
}

static void holes_are_made_and_found(void **state)
{
	struct far_extent e[3];
	char buf[16];
	size_t n;
	int fd = memfd_create("t", 0);

	assert_int_equal(ftruncate(fd, 1 << 20), 0);
	assert_int_equal(far_io_extents(fd, 0, 1 << 20, e, 3, &n), 0);
	assert_int_equal(n, 1);
	assert_true(e[0].kind == FAR_EXTENT_ZERO && e[0].len == 1 << 20);
	assert_int_equal(far_io_pwrite(fd, 8192, "x", 1, 0), 0);
	assert_int_equal(far_io_extents(fd, 10, (1 << 20) - 10, e, 3, &n), 0);
	assert_int_equal(n, 3);
	assert_true(e[0].off == 10 && e[0].kind == FAR_EXTENT_ZERO && e[0].len == 8182);
	assert_true(e[1].off == 8192 && e[1].kind == FAR_EXTENT_DATA && e[1].len == 4096);
	assert_true(e[2].off == 12288 && e[2].kind == FAR_EXTENT_ZERO);
	assert_int_equal(far_io_extents(fd, 10, 8190, e, 1, &n), 0);
	assert_true(n == 1 && e[0].len == 8182);
	assert_int_equal(far_io_zero(fd, 8000, 500), 0);
	assert_int_equal(far_io_pread(fd, 8190, buf, 16, 0), 0);
	assert_true(far_is_zero(buf, 16));
	assert_int_equal(far_io_punch(fd, 0, 1 << 20), 0);
	assert_int_equal(far_io_extents(fd, 0, 1 << 20, e, 3, &n), 0);
	assert_int_equal(n, 1);
	assert_int_equal(lseek(fd, 0, SEEK_END), 1 << 20);
	close(fd);
	/* a pipe tells nothing: all data */
	int p[2];
	assert_int_equal(pipe(p), 0);
	assert_int_equal(far_io_extents(p[0], 5, 100, e, 3, &n), 0);
	assert_true(n == 1 && e[0].off == 5 && e[0].len == 100 && e[0].kind == FAR_EXTENT_DATA);
	assert_int_equal(far_io_punch(p[1], 0, 10) < 0, 1);
	close(p[0]);
	close(p[1]);
}

/* Whatever way the CPU takes, what is stored and sent is the same: the published values of XXH3. */
static void hashes(void **state)
{
	static const uint8_t empty[FAR_HASH128] = { 0x99, 0xaa, 0x06, 0xd3, 0x01, 0x47, 0x98, 0xd8,
						    0x60, 0x01, 0xc3, 0x24, 0x46, 0x8d, 0x49, 0x7f };
	uint8_t out[FAR_HASH128], *buf = malloc(100000);

	far_hash128(out, NULL, 0, 0);
	assert_memory_equal(out, empty, sizeof out);
	assert_true(far_hash64("", 0) == 0x2d06800538d394c2);
	for (size_t i = 0; i < 100000; i++)
		buf[i] = (uint8_t)(i * 7 + i / 251);
	for (size_t n = 1; n <= 100000; n = n * 3 + 1) {
		XXH128_canonical_t c;
		XXH128_canonicalFromHash(&c, XXH3_128bits_withSeed(buf, n, 12345));
		far_hash128(out, buf, n, 12345);
		assert_memory_equal(out, c.digest, sizeof out);
		far_hash128_cold(out, buf, n, 12345);
		assert_memory_equal(out, c.digest, sizeof out);
		assert_true(far_hash64(buf, n) == XXH3_64bits(buf, n));
	}
	free(buf);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(errors_are_set_and_prefixed),
		cmocka_unit_test(a_broken_promise_aborts),
		cmocka_unit_test(deadlines_only_shrink),
		cmocka_unit_test(deadlines_belong_to_their_thread),
		cmocka_unit_test(sleeping_is_never_short),
		cmocka_unit_test(conditions_time_out),
		cmocka_unit_test(buffers_are_aligned_and_come_back),
		cmocka_unit_test(zeros_are_seen_at_any_place),
		cmocka_unit_test(files_are_moved_in_full),
		cmocka_unit_test(holes_are_made_and_found),
		cmocka_unit_test(hashes),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
