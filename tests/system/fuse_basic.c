/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Every call on the one file, errno by errno, at odd sizes; then fsx on it. */
#define _GNU_SOURCE
#include "fuse_serve.h"

#include <dirent.h>
#include <linux/falloc.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>

#define CHECK_ERRNO(call, e)                                                                                           \
	do {                                                                                                           \
		errno = 0;                                                                                             \
		assert_int_equal((call), -1);                                                                          \
		assert_int_equal(errno, e);                                                                            \
	} while (0)

static void fill(unsigned char *p, size_t len, unsigned seed)
{
	for (size_t i = 0; i < len; i++)
		p[i] = (unsigned char)(seed + i * 7 + (i >> 8));
}

static void test_attributes(void **state)
{
	struct serve s;
	struct stat st;
	struct statvfs v;
	struct timespec times[2] = { { .tv_sec = 1000, .tv_nsec = 5 }, { .tv_sec = 2000, .tv_nsec = 7 } };
	char other[300];

	serve_start(&s, &(struct serve_conf){ .bytes = 100001 });
	assert_int_equal(stat(s.path, &st), 0);
	assert_true(S_ISREG(st.st_mode));
	assert_int_equal(st.st_mode & 07777, 0600);
	assert_int_equal(st.st_size, 100001);
	assert_int_equal(st.st_uid, geteuid());
	assert_int_equal(st.st_nlink, 1);
	assert_int_equal(utimensat(AT_FDCWD, s.path, times, 0), 0);
	assert_int_equal(stat(s.path, &st), 0);
	assert_int_equal(st.st_mtim.tv_sec, 2000);
	assert_int_equal(st.st_mtim.tv_nsec, 7);
	CHECK_ERRNO(chmod(s.path, 0644), EPERM);
	assert_int_equal(chmod(s.path, 0600), 0);
	if (geteuid() == 0)
		CHECK_ERRNO(chown(s.path, 12, 12), EPERM);
	CHECK_ERRNO(truncate(s.path, 5), EPERM);
	CHECK_ERRNO(truncate(s.path, 100002), EPERM);
	assert_int_equal(truncate(s.path, 100001), 0);
	CHECK_ERRNO(open(s.path, O_RDWR | O_TRUNC), EPERM);
	CHECK_ERRNO(open(s.path, O_RDONLY | O_DIRECTORY), ENOTDIR);
	CHECK_ERRNO(unlink(s.path), EPERM);
	CHECK_ERRNO(getxattr(s.path, "user.x", other, sizeof other), EOPNOTSUPP);
	CHECK_ERRNO(setxattr(s.path, "user.x", "y", 1, 0), EOPNOTSUPP);
	snprintf(other, sizeof other, "%s2", s.path);
	CHECK_ERRNO(stat(other, &st), ENOENT);
	CHECK_ERRNO(open(other, O_CREAT | O_WRONLY, 0600), EPERM);
	CHECK_ERRNO(mkdir(other, 0700), EPERM);
	CHECK_ERRNO(symlink("x", other), EPERM);
	CHECK_ERRNO(mkfifo(other, 0600), EPERM);
	CHECK_ERRNO(rename(s.path, other), EPERM);
	CHECK_ERRNO(link(s.path, other), EPERM);
	CHECK_ERRNO(rmdir(other), ENOENT);
	assert_int_equal(access(s.path, R_OK | W_OK), 0);
	assert_int_equal(statvfs(s.path, &v), 0);
	assert_int_equal(v.f_blocks, 25);
	assert_int_equal(v.f_bfree, 0);
	serve_end(&s);
}

static void test_directory(void **state)
{
	struct serve s;
	char dir[200];
	unsigned seen = 0;

	serve_start(&s, &(struct serve_conf){ .bytes = 5 });
	strcpy(dir, s.path);
	*strrchr(dir, '/') = 0;
	for (int round = 0; round < 2; round++) {
		DIR *d = opendir(dir);
		struct dirent *e;
		assert_non_null(d);
		seen = 0;
		while ((e = readdir(d)))
			seen += !strcmp(e->d_name, ".") ? 1 : !strcmp(e->d_name, "..") ? 10 :
				!strcmp(e->d_name, "region") ? 100 : 1000;
		assert_int_equal(seen, 111);
		closedir(d);
	}
	serve_end(&s);
}

/* What is on the mount, through every way of reading it, equals `want`. */
static void check_content(struct serve *s, const unsigned char *want, size_t len)
{
	unsigned char *buf = aligned_alloc(4096, len / 4096 * 4096 + 8192);
	int fd = open(s->path, O_RDONLY), dfd = open(s->path, O_RDONLY | O_DIRECT);

	assert_true(fd >= 0 && dfd >= 0);
	assert_int_equal(pread(fd, buf, len + 10, 0), len);
	assert_memory_equal(buf, want, len);
	memset(buf, 0xee, len);
	assert_int_equal(pread(dfd, buf, len / 4096 * 4096 + 4096, 0), len);
	assert_memory_equal(buf, want, len);
	assert_int_equal(pread(fd, buf, 10, (off_t)len), 0);
	assert_int_equal(pread(fd, buf, 10, (off_t)len + 100000), 0);
	if (len) {
		assert_int_equal(pread(fd, buf, 10, (off_t)len - 1), 1);
		for (int kind = 0; kind < 2; kind++) {
			unsigned char *m = mmap(NULL, len, PROT_READ, kind ? MAP_PRIVATE : MAP_SHARED, fd, 0);
			assert_ptr_not_equal(m, MAP_FAILED);
			assert_memory_equal(m, want, len);
			munmap(m, len);
		}
	}
	close(fd);
	close(dfd);
	free(buf);
}

static void one_size(size_t len, bool file, bool keep_cache, bool share)
{
	struct serve s;
	unsigned char *want = malloc(len + 100), *back = malloc(len + 100);

	serve_start(&s, &(struct serve_conf){ .bytes = len, .file = file, .keep_cache = keep_cache, .share = share });
	memset(want, 0, len);
	check_content(&s, want, len);
	int fd = open(s.path, O_RDWR);
	assert_true(fd >= 0);
	fill(want, len, 1);
	if (len)
		assert_int_equal(pwrite(fd, want, len, 0), len);
	check_content(&s, want, len);
	CHECK_ERRNO(pwrite(fd, "x", 1, (off_t)len), ENOSPC);
	CHECK_ERRNO(pwrite(fd, "x", 1, (off_t)len + 5000), ENOSPC);
	if (len > 10) {
		fill(want + len - 5, 5, 99);
		memcpy(back, want + len - 5, 5);
		memset(back + 5, 1, 20);
		assert_int_equal(pwrite(fd, back, 25, (off_t)len - 5), 5); /* what still fits */
		check_content(&s, want, len);
	}
	if (len) {
		unsigned char *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		unsigned char *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
		assert_ptr_not_equal(m, MAP_FAILED);
		assert_ptr_not_equal(p, MAP_FAILED);
		m[len / 2] = want[len / 2] = 0x5a;
		m[len - 1] = want[len - 1] = 0xa5;
		p[0] ^= 0xff; /* nobody else's business */
		check_content(&s, want, len);
		assert_int_equal(msync(m, len, MS_SYNC), 0);
		assert_int_equal(pread(s.memfd, back, len, 0), len);
		assert_memory_equal(back, want, len);
		assert_true(atomic_load(&s.sh->flushes) >= 1);
		munmap(p, len);
		munmap(m, len);
	}
	close(fd);
	assert_int_equal(serve_tell(&s, 'i'), 0);
	check_content(&s, want, len);
	struct stat st;
	assert_int_equal(fstat(s.memfd, &st), 0);
	assert_int_equal(st.st_size, len);
	serve_end(&s);
	free(want);
	free(back);
}

static void test_sizes(void **state)
{
	static const size_t sizes[] = { 0, 1, 4095, 4096, 4097, 65537, 3000001 };

	for (size_t i = 0; i < FAR_ARRAY_LEN(sizes); i++)
		one_size(sizes[i], i % 2, i % 3 == 0, i % 2 == 0);
	one_size(65537, true, true, true);
	one_size(1 << 20, false, false, false);
}

static void test_terabyte(void **state)
{
	struct serve s;
	uint64_t bytes = (uint64_t)1 << 40;
	char c[8] = { 0 };
	struct stat st;

	serve_start(&s, &(struct serve_conf){ .bytes = bytes, .share = true });
	int fd = open(s.path, O_RDWR);
	assert_true(fd >= 0);
	assert_int_equal(lseek(fd, 0, SEEK_END), bytes);
	assert_int_equal(pwrite(fd, "abcdefgh", 8, (off_t)(bytes - 8)), 8);
	assert_int_equal(pwrite(fd, "middle!!", 8, (off_t)(bytes / 2)), 8);
	CHECK_ERRNO(pwrite(fd, "x", 1, (off_t)bytes), ENOSPC);
	close(fd);
	fd = open(s.path, O_RDONLY);
	assert_int_equal(pread(fd, c, 8, (off_t)(bytes - 8)), 8);
	assert_memory_equal(c, "abcdefgh", 8);
	assert_int_equal(lseek(fd, 0, SEEK_DATA), bytes / 2);
	assert_int_equal(lseek(fd, (off_t)(bytes / 2), SEEK_HOLE), bytes / 2 + 4096);
	assert_int_equal(lseek(fd, (off_t)(bytes / 2 + 4096), SEEK_DATA), bytes - 4096);
	assert_int_equal(lseek(fd, (off_t)(bytes - 1), SEEK_HOLE), bytes);
	close(fd);
	/* Reading never filled a hole, neither through a mapping of the pages nor else. */
	assert_int_equal(fstat(s.memfd, &st), 0);
	assert_true(st.st_blocks <= 64);
	serve_end(&s);
}

static void test_seek_and_fallocate(void **state)
{
	struct serve s;
	size_t len = 300000;
	unsigned char *want = malloc(len);
	int keep = FALLOC_FL_KEEP_SIZE;

	serve_start(&s, &(struct serve_conf){ .bytes = len, .share = true });
	int fd = open(s.path, O_RDWR);
	fill(want, len, 3);
	assert_int_equal(pwrite(fd, want, len, 0), len);
	assert_int_equal(fallocate(fd, keep | FALLOC_FL_PUNCH_HOLE, 8192, 8192), 0);
	memset(want + 8192, 0, 8192);
	assert_int_equal(atomic_load(&s.sh->discards), 1);
	assert_int_equal(fallocate(fd, keep | FALLOC_FL_ZERO_RANGE, 100000, 777), 0);
	memset(want + 100000, 0, 777);
	assert_int_equal(atomic_load(&s.sh->zeros), 1);
	check_content(&s, want, len);
	assert_int_equal(fallocate(fd, FALLOC_FL_ZERO_RANGE, (off_t)len - 100, 100), 0);
	assert_int_equal(fallocate(fd, keep | FALLOC_FL_PUNCH_HOLE, (off_t)len - 300, 10000), 0);
	memset(want + len - 300, 0, 300);
	check_content(&s, want, len);
	assert_int_equal(fallocate(fd, keep | FALLOC_FL_PUNCH_HOLE, (off_t)len + 10, 10000), 0);
	assert_int_equal(fallocate(fd, 0, 0, (off_t)len), 0);
	assert_int_equal(fallocate(fd, keep, 0, (off_t)len + 5), 0);
	CHECK_ERRNO(fallocate(fd, 0, 0, (off_t)len + 1), ENOSPC);
	CHECK_ERRNO(fallocate(fd, FALLOC_FL_ZERO_RANGE, (off_t)len - 1, 2), ENOSPC);
	CHECK_ERRNO(fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 0, 4096), EOPNOTSUPP);
	CHECK_ERRNO(fallocate(fd, FALLOC_FL_INSERT_RANGE, 0, 4096), EOPNOTSUPP);
	struct stat st;
	assert_int_equal(fstat(fd, &st), 0);
	assert_int_equal(st.st_size, len);
	/* Somebody may have dirty pages in a mapping that we have not been told of: no holes are shown. */
	assert_int_equal(lseek(fd, 0, SEEK_HOLE), len);
	assert_int_equal(lseek(fd, 9000, SEEK_DATA), 9000);
	CHECK_ERRNO(lseek(fd, (off_t)len, SEEK_DATA), ENXIO);
	close(fd);
	fd = open(s.path, O_RDONLY);
	/* The release of the writer's handle comes a little after its close. */
	uint64_t until = far_now() + SERVE_LIMIT;
	while (lseek(fd, 0, SEEK_HOLE) != 8192 && far_now() < until)
		;
	assert_int_equal(lseek(fd, 0, SEEK_HOLE), 8192);
	assert_int_equal(lseek(fd, 8200, SEEK_HOLE), 8200);
	assert_int_equal(lseek(fd, 8200, SEEK_DATA), 16384);
	assert_int_equal(lseek(fd, 16384, SEEK_HOLE), len);
	CHECK_ERRNO(lseek(fd, (off_t)len, SEEK_HOLE), ENXIO);
	close(fd);
	free(want);
	serve_end(&s);
}

/* A mapped store that was never synced must not be lost to a copy that asks for holes. */
static void test_dirty_hole(void **state)
{
	struct serve s;
	char c[4] = { 0 };

	serve_start(&s, &(struct serve_conf){ .bytes = 1 << 20 });
	int fd = open(s.path, O_RDWR);
	char *m = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert_ptr_not_equal(m, MAP_FAILED);
	close(fd); /* the mapping stays */
	memcpy(m + 500000, "here", 4);
	fd = open(s.path, O_RDONLY);
	off_t data = lseek(fd, 0, SEEK_DATA);
	assert_true(data >= 0 && data <= 500000);
	assert_int_equal(pread(fd, c, 4, 500000), 4);
	assert_memory_equal(c, "here", 4);
	munmap(m, 1 << 20);
	close(fd);
	serve_end(&s);
}

static void test_read_only(void **state)
{
	struct serve s;
	struct stat st;

	serve_start(&s, &(struct serve_conf){ .bytes = 10000, .read_only = true, .keep_cache = true });
	assert_int_equal(stat(s.path, &st), 0);
	assert_int_equal(st.st_mode & 07777, 0400);
	CHECK_ERRNO(open(s.path, O_RDWR), EROFS);
	CHECK_ERRNO(truncate(s.path, 0), EROFS);
	int fd = open(s.path, O_RDONLY);
	assert_true(fd >= 0);
	assert_ptr_equal(mmap(NULL, 10000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
	assert_int_equal(errno, EACCES);
	char *m = mmap(NULL, 10000, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	assert_ptr_not_equal(m, MAP_FAILED);
	m[3] = 1;
	munmap(m, 10000);
	assert_int_equal(fsync(fd), 0);
	close(fd);
	serve_end(&s);
}

/* A read-only mount whose bytes are all in a memory file: by passthrough or not, they are the same, the calls come to us or
 * not, and nothing may be evicted under an open handle that passes through. */
static void test_passthrough(void **state)
{
	struct serve s;
	size_t len = 3000001;
	unsigned char *want = malloc(len);
	char c;

	serve_start(&s, &(struct serve_conf){ .bytes = len, .read_only = true, .keep_cache = true, .share = true });
	fill(want, len, 9);
	assert_int_equal(far_io_pwrite(s.memfd, 0, want, len, 0), 0);
	check_content(&s, want, len);
	int fd = open(s.path, O_RDONLY);
	assert_int_equal(pread(fd, &c, 1, 5), 1);
	assert_int_equal(c, (char)want[5]);
	CHECK_ERRNO(lseek(fd, (off_t)len, SEEK_DATA), ENXIO);
	int64_t r = serve_tell(&s, 'n');
	printf("test_passthrough: this kernel and user %s it\n", r ? "have" : "do not have");
	if (r) {
		assert_int_equal(r, -EBUSY);
		assert_int_equal(atomic_load(&s.sh->reads), 0);
	}
	close(fd);
	uint64_t until = far_now() + SERVE_LIMIT; /* the release comes a little after the close */
	while (r && (r = serve_tell(&s, 'n')) && far_now() < until)
		far_sleep_until(far_now() + FAR_MSEC, false);
	assert_int_equal(r, 0);
	check_content(&s, want, len);
	fd = open(s.path, O_RDONLY | O_DIRECT);
	unsigned char *buf = aligned_alloc(4096, 4096);
	unsigned before = atomic_load(&s.sh->reads);
	assert_int_equal(pread(fd, buf, 4096, 0), 4096);
	assert_int_equal(atomic_load(&s.sh->reads), before + 1); /* by us again */
	free(buf);
	close(fd);
	free(want);
	serve_end(&s);
}

/* The backend's errors, as a program sees them. */
static void test_errors(void **state)
{
	static const struct {
		int code, seen;
	} errors[] = { { -EIO, EIO }, { -ETIMEDOUT, EIO }, { -ESHUTDOWN, EIO }, { -EPROTO, EIO }, { -EINVAL, EIO },
		       { -EACCES, EIO }, { -ESTALE, ESTALE }, { -ENOSPC, ENOSPC }, { -EROFS, EROFS } };
	struct serve s;
	char *buf = aligned_alloc(4096, 4096);

	memset(buf, 1, 4096);
	serve_start(&s, &(struct serve_conf){ .bytes = 100000 });
	int fd = open(s.path, O_RDWR | O_DIRECT), cached = open(s.path, O_RDWR);
	for (size_t i = 0; i < FAR_ARRAY_LEN(errors); i++) {
		atomic_store(&s.sh->read_error, errors[i].code);
		CHECK_ERRNO(pread(fd, buf, 4096, 4096), errors[i].seen);
		atomic_store(&s.sh->read_error, 0);
		assert_int_equal(pread(fd, buf, 4096, 4096), 4096);
		atomic_store(&s.sh->write_error, errors[i].code);
		CHECK_ERRNO(pwrite(fd, buf, 4096, 4096), errors[i].seen);
		CHECK_ERRNO(pwrite(cached, buf, 100, 4096), errors[i].seen);
		atomic_store(&s.sh->write_error, 0);
		assert_int_equal(pwrite(fd, buf, 4096, 4096), 4096);
		atomic_store(&s.sh->flush_error, errors[i].code);
		CHECK_ERRNO(fsync(fd), errors[i].seen);
		atomic_store(&s.sh->flush_error, 0);
		assert_int_equal(fsync(fd), 0);
	}
	close(fd);
	close(cached);
	serve_end(&s);
	free(buf);
}

static void test_locks_and_poll(void **state)
{
	struct serve s;
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 10 };

	serve_start(&s, &(struct serve_conf){ .bytes = 10000 });
	int a = open(s.path, O_RDWR), b = open(s.path, O_RDWR);
	assert_int_equal(flock(a, LOCK_EX | LOCK_NB), 0);
	CHECK_ERRNO(flock(b, LOCK_EX | LOCK_NB), EWOULDBLOCK);
	assert_int_equal(fcntl(a, F_OFD_SETLK, &l), 0);
	CHECK_ERRNO(fcntl(b, F_OFD_SETLK, &l), EAGAIN);
	struct pollfd p = { .fd = a, .events = POLLIN | POLLOUT };
	assert_int_equal(poll(&p, 1, 0), 1);
	assert_int_equal(p.revents, POLLIN | POLLOUT);
	close(a);
	close(b);
	serve_end(&s);
}

static void run_fsx(struct serve *s, const char *ops)
{
	char program[300], seed[30];
	int status = -1;

	serve_beside("fsx", program, sizeof program);
	snprintf(seed, sizeof seed, "%" PRIu64, far_now() % 1000000);
	fflush(stdout);
	pid_t pid = fork();
	if (pid == 0) {
		execl(program, "fsx", s->path, ops, seed, (char *)NULL);
		_exit(127);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

static void test_fsx(void **state)
{
	static const struct {
		uint64_t bytes;
		const char *ops;
		bool file, keep_cache, share;
		uint64_t absent; /* from here on calls leave the receiver */
	} runs[] = { { 1, "50", false, true, true, UINT64_MAX },
		     { 4097, "500", true, true, false, UINT64_MAX },
		     { 1000001, "3000", false, true, true, UINT64_MAX },
		     { 1000001, "3000", true, false, false, 300000 },
		     { 8 << 20, "4000", true, true, false, 0 },
		     { (8 << 20) + 4095, "4000", true, true, true, UINT64_MAX } };

	for (size_t i = 0; i < FAR_ARRAY_LEN(runs); i++) {
		struct serve s;
		serve_start(&s, &(struct serve_conf){ .bytes = runs[i].bytes, .file = runs[i].file,
						      .keep_cache = runs[i].keep_cache, .share = runs[i].share,
						      .max_blocked = i == 4 ? 2 : 0 });
		atomic_store(&s.sh->open, true);
		atomic_store(&s.sh->absent, runs[i].absent);
		run_fsx(&s, runs[i].ops);
		serve_end(&s);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_attributes), cmocka_unit_test(test_directory),
		cmocka_unit_test(test_sizes),	   cmocka_unit_test(test_terabyte),
		cmocka_unit_test(test_seek_and_fallocate), cmocka_unit_test(test_dirty_hole),
		cmocka_unit_test(test_read_only),  cmocka_unit_test(test_passthrough),
		cmocka_unit_test(test_errors),
		cmocka_unit_test(test_locks_and_poll), cmocka_unit_test(test_fsx),
	};

	signal(SIGPIPE, SIG_IGN);
	if (serve_skip("fuse_basic"))
		return 77;
	return cmocka_run_group_tests_name("fuse_basic", tests, NULL, NULL);
}
