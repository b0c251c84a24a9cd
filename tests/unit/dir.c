/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The directory backend: names, padding, open files, flush. fsync and syncfs are wrapped to see what they are asked. */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "base/clock.h"
#include "base/thread.h"

#include <dirent.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char tmp[64];
static _Atomic int sync_errno;
static struct far_mutex sync_lock = FAR_MUTEX_INIT;
static char synced[64][32]; /* names of the files that were fsynced */
static size_t n_synced;
static int n_syncfs;

int __wrap_fsync(int fd);
int __wrap_syncfs(int fd);

int __wrap_fsync(int fd)
{
	char link[64], path[300];

	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t n = readlink(link, path, sizeof path - 1);
	path[n > 0 ? n : 0] = 0;
	far_mutex_lock(&sync_lock);
	if (n_synced < 64)
		snprintf(synced[n_synced++], sizeof synced[0], "%.31s", strrchr(path, '/') ? strrchr(path, '/') + 1 : path);
	far_mutex_unlock(&sync_lock);
	if (sync_errno) {
		errno = sync_errno;
		return -1;
	}
	return 0; /* whether the disk does it is not what is tested, and it is slow */
}

int __wrap_syncfs(int fd)
{
	n_syncfs++;
	return 0;
}

static int was_synced(const char *name)
{
	int n = 0;
	for (size_t i = 0; i < n_synced; i++)
		n += !strcmp(synced[i], name);
	return n;
}

static void opens(struct far_backend **b, const char *query)
{
	struct far_error err;
	char uri[200];

	snprintf(uri, sizeof uri, "dir:%s/d%s", tmp, query);
	if (far_open(uri, NULL, b, &err))
		fail_msg("%s", err.text);
	n_synced = 0;
	n_syncfs = 0;
}

static void refuses(const char *query, int code, const char *part)
{
	struct far_backend *b;
	struct far_error err;
	char uri[200];

	snprintf(uri, sizeof uri, "dir:%s/d%s", tmp, query);
	assert_int_equal(far_open(uri, NULL, &b, &err), -code);
	if (!strstr(err.text, part))
		fail_msg("%s", err.text);
}

static struct stat stat_of(const char *name)
{
	struct stat st = { .st_size = -1 };
	char path[200];

	snprintf(path, sizeof path, "%s/d/%s", tmp, name);
	if (stat(path, &st))
		st.st_size = -1;
	return st;
}

static unsigned count_files(void)
{
	char path[100];
	unsigned n = 0;

	snprintf(path, sizeof path, "%s/d", tmp);
	DIR *d = opendir(path);
	assert_non_null(d);
	for (struct dirent *e; (e = readdir(d));)
		n += e->d_name[0] != '.';
	closedir(d);
	return n;
}

static unsigned count_open(void)
{
	char link[64], path[300], want[100];
	unsigned n = 0;

	snprintf(want, sizeof want, "%s/d/", tmp);
	for (int fd = 0; fd < 256; fd++) {
		snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
		ssize_t k = readlink(link, path, sizeof path - 1);
		if (k > 0) {
			path[k] = 0;
			n += !strncmp(path, want, strlen(want));
		}
	}
	return n;
}

static void put_file(const char *name, const char *data, size_t len)
{
	char path[200];

	snprintf(path, sizeof path, "%s/d/%s", tmp, name);
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	assert_true(fd >= 0);
	assert_int_equal(write(fd, data, len), len);
	close(fd);
}

static void put_text(const char *name, const char *text)
{
	put_file(name, text, strlen(text));
}

/* Decimal offsets, whole chunks, the last one padded: what the Go family reads and writes. */
static void files_are_named_and_padded(void **state)
{
	struct far_backend *b;
	char buf[10000];

	opens(&b, "?size=10000");
	assert_int_equal(far_facts(b)->chunk, 4096);
	memset(buf, 'x', sizeof buf);
	assert_int_equal(far_write(b, 0, buf, 10000, 0), 0);
	assert_int_equal(stat_of("0").st_size, 4096);
	assert_int_equal(stat_of("4096").st_size, 4096);
	assert_int_equal(stat_of("8192").st_size, 4096);
	assert_int_equal(stat_of("0").st_mode & 0777, 0600);
	assert_int_equal(stat_of(".").st_mode & 0777, 0700);
	assert_int_equal(count_files(), 3);
	far_close(b);
	/* what lies beyond the region's end in the last file is not looked at */
	char whole[4096];
	memset(whole, 'y', sizeof whole);
	put_file("8192", whole, 4096);
	opens(&b, "");
	assert_int_equal(far_size(b), 10000);
	assert_int_equal(far_read(b, 8192, buf, 10000 - 8192, 0), 0);
	assert_int_equal(buf[0], 'y');
	far_close(b);
}

/* W-A9: a file that is not there is zeros, and reading it makes none. */
static void reading_makes_no_files_W_A9(void **state)
{
	struct far_backend *b;
	char buf[10000];

	opens(&b, "?size=10000");
	for (int i = 0; i < 3; i++) {
		memset(buf, 'x', sizeof buf);
		assert_int_equal(far_read(b, 0, buf, 10000, 0), 0);
		for (size_t k = 0; k < sizeof buf; k++)
			assert_int_equal(buf[k], 0);
	}
	assert_int_equal(count_files(), 0);
	assert_int_equal(far_discard(b, 0, 10000, 0), 0);
	assert_int_equal(count_files(), 0);
	far_close(b);
}

static void short_files_have_lost_data(void **state)
{
	struct far_backend *b;
	char buf[4096];

	opens(&b, "?size=12288");
	put_file("0", "", 0);     /* made, but not yet written, when the machine stopped */
	put_file("4096", "abc", 3);
	memset(buf, 'x', sizeof buf);
	assert_int_equal(far_read(b, 0, buf, 4096, 0), 0);
	assert_int_equal(buf[0] | buf[4095], 0);
	assert_int_equal(far_read(b, 4096, buf, 4096, 0), -EIO);
	memset(buf, 'z', sizeof buf);
	assert_int_equal(far_write(b, 4096, buf, 4096, 0), 0);
	assert_int_equal(far_read(b, 4096, buf, 4096, 0), 0);
	assert_int_equal(far_read(b, 8192, buf, 4096, 0), 0);
	far_close(b);
	/* a directory in the place of a chunk is no chunk */
	char path[200];
	snprintf(path, sizeof path, "%s/d/8192", tmp);
	assert_int_equal(mkdir(path, 0700), 0);
	opens(&b, "");
	assert_true(far_read(b, 8192, buf, 4096, 0) < 0);
	assert_true(far_write(b, 8192, buf, 4096, 0) < 0);
	far_close(b);
}

static void size_and_chunk_are_remembered(void **state)
{
	struct far_backend *b;
	struct far_open_opts ro = { .size = sizeof ro, .read_only = true };
	char uri[200];

	opens(&b, "?size=5000&chunk=1000");
	far_close(b);
	opens(&b, "");
	assert_true(far_size(b) == 5000 && far_facts(b)->chunk == 1000);
	far_close(b);
	refuses("?size=5001", EINVAL, "it exists with size 5000, not 5001.");
	refuses("?chunk=4096", EINVAL, "it exists with chunk 1000, not 4096.");
	put_text(".farpage", "farpage directory 1\nsize 5000\nchunk 0\n");
	refuses("", EIO, "its file .farpage is damaged. Remove it and give ?size= and &chunk= as they were.");
	put_text(".farpage", "farpage directory 2\nsize 5000\nchunk 1\n");
	refuses("", EIO, "damaged");
	snprintf(uri, sizeof uri, "%s/d/.farpage", tmp);
	assert_int_equal(unlink(uri), 0);
	/* read-only: nothing is written into somebody else's directory */
	snprintf(uri, sizeof uri, "dir:%s/d?size=5000", tmp);
	assert_int_equal(far_open(uri, &ro, &b, NULL), 0);
	assert_int_equal(stat_of(".farpage").st_size, -1);
	far_close(b);
}

static void few_files_are_open(void **state)
{
	struct far_backend *b;
	char buf[100];

	opens(&b, "?size=10000&chunk=100&max-open=3");
	memset(buf, 'x', sizeof buf);
	for (unsigned i = 0; i < 100; i++) {
		assert_int_equal(far_write(b, i * 100, buf, 100, 0), 0);
		assert_in_range(count_open(), 1, 3);
	}
	/* least recently used out: 97 is used again and stays, 98 goes */
	assert_int_equal(far_read(b, 9700, buf, 100, 0), 0);
	assert_int_equal(far_read(b, 0, buf, 100, 0), 0);
	int r = far_read(b, 9700, buf, 100, FAR_NOWAIT);
	assert_true(r == 0 || r == -EAGAIN); /* tmpfs cannot say whether it would wait */
	assert_int_equal(far_read(b, 9800, buf, 100, FAR_NOWAIT), -EAGAIN);
	far_close(b);
	assert_int_equal(count_open(), 0);
}

#define THREADS 8

struct user {
	struct far_backend *b;
	unsigned id;
	_Atomic int failed;
	struct far_thread t;
};

static void *user_run(void *arg)
{
	struct user *u = arg;
	unsigned char buf[64], want[64];
	uint64_t rng = u->id + 1;

	for (int i = 0; i < 4000 && !u->failed; i++) {
		rng = rng * 6364136223846793005 + 1442695040888963407;
		uint64_t chunk = (rng >> 33) % 16 * THREADS + u->id; /* nobody else's */
		memset(want, (int)(rng >> 40), sizeof want);
		if (far_write(u->b, chunk * 64, want, 64, 0) || far_read(u->b, chunk * 64, buf, 64, 0) || memcmp(buf, want, 64))
			u->failed = __LINE__;
		if (i % 500 == 0 && far_flush(u->b))
			u->failed = __LINE__;
		if (i % 100 == 7 && (far_discard(u->b, chunk * 64, 64, 0) || far_read(u->b, chunk * 64, buf, 64, 0) || buf[9]))
			u->failed = __LINE__;
	}
	return NULL;
}

/* W-B10: more threads than open files; no file is closed under its user, and nothing leaks. */
static void files_stay_open_in_use_W_B10(void **state)
{
	static const char *const queries[] = { "?size=8192&chunk=64&max-open=1", "?size=8192&chunk=64&max-open=3" };

	for (size_t q = 0; q < 2; q++) {
		struct user u[THREADS];
		struct far_backend *b;
		opens(&b, queries[q]);
		for (unsigned i = 0; i < THREADS; i++) {
			u[i] = (struct user){ .b = b, .id = i };
			assert_int_equal(far_thread_start(&u[i].t, "user", user_run, &u[i]), 0);
		}
		for (unsigned i = 0; i < THREADS; i++)
			far_thread_join(&u[i].t);
		for (unsigned i = 0; i < THREADS; i++)
			assert_int_equal(u[i].failed, 0);
		assert_in_range(count_open(), 0, 3);
		far_close(b);
		assert_int_equal(count_open(), 0);
	}
}

/* W-B10, the other half: flush covers files that were closed meanwhile, and each only once. */
static void flush_covers_closed_files_W_B10(void **state)
{
	struct far_backend *b;
	char buf[100] = "x";

	opens(&b, "?size=1000&chunk=100&max-open=2");
	for (unsigned i = 0; i < 6; i++)
		assert_int_equal(far_write(b, i * 100, buf, 100, 0), 0);
	assert_int_equal(far_write(b, 0, buf, 100, 0), 0);
	assert_int_equal(far_flush(b), 0);
	assert_int_equal(was_synced("0"), 1);
	assert_int_equal(was_synced("100"), 1);
	assert_int_equal(was_synced("500"), 1);
	assert_int_equal(was_synced("600"), 0);
	assert_int_equal(was_synced("d"), 1); /* the names */
	n_synced = 0;
	assert_int_equal(far_flush(b), 0);
	assert_int_equal(n_synced, 0);
	assert_int_equal(far_write(b, 200, buf, 100, 0), 0);
	assert_int_equal(far_read(b, 0, buf, 100, 0), 0);
	assert_int_equal(far_flush(b), 0);
	assert_int_equal(n_synced, 1);
	assert_int_equal(was_synced("200"), 1);
	n_synced = 0;
	assert_int_equal(far_write(b, 300, buf, 100, 0), 0);
	assert_int_equal(far_discard(b, 300, 100, 0), 0);
	assert_int_equal(stat_of("300").st_size, -1);
	assert_int_equal(far_flush(b), 0);
	assert_int_equal(was_synced("d"), 1);
	far_close(b);
}

static void many_closed_files_are_synced_at_once(void **state)
{
	struct far_backend *b;
	char *buf = calloc(1, 70000);

	opens(&b, "?size=70000&chunk=1&max-open=1");
	assert_int_equal(far_write(b, 0, buf, 70000, 0), 0);
	assert_int_equal(far_flush(b), 0);
	assert_int_equal(n_syncfs, 1);
	assert_int_equal(far_flush(b), 0);
	assert_int_equal(n_syncfs, 1);
	assert_int_equal(far_discard(b, 0, 70000, 0), 0);
	assert_int_equal(count_files(), 0);
	far_close(b);
	free(buf);
}

/* After a failed fsync the pages may be gone: no later flush may say 0. */
static void a_failed_flush_is_not_forgotten(void **state)
{
	struct far_backend *b;
	char buf[100] = "x";

	opens(&b, "?size=1000&chunk=100");
	assert_int_equal(far_write(b, 0, buf, 100, 0), 0);
	sync_errno = EIO;
	assert_int_equal(far_flush(b), -EIO);
	sync_errno = 0;
	assert_int_equal(far_flush(b), -EIO);
	assert_int_equal(far_write(b, 0, buf, 100, 0), 0);
	assert_int_equal(far_flush(b), -EIO);
	far_close(b);
}

static int setup(void **state)
{
	strcpy(tmp, "/tmp/farpage-dir-XXXXXX");
	return mkdtemp(tmp) ? 0 : -1;
}

static int teardown(void **state)
{
	char cmd[100];
	snprintf(cmd, sizeof cmd, "rm -rf '%s'", tmp);
	return system(cmd);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(files_are_named_and_padded),
		TEST(reading_makes_no_files_W_A9),
		TEST(short_files_have_lost_data),
		TEST(size_and_chunk_are_remembered),
		TEST(few_files_are_open),
		TEST(files_stay_open_in_use_W_B10),
		TEST(flush_covers_closed_files_W_B10),
		TEST(many_closed_files_are_synced_at_once),
		TEST(a_failed_flush_is_not_forgotten),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
