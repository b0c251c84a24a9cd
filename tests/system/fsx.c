/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 *     fsx PATH SECONDSs|OPERATIONS [SEED]
 *
 * Random reads, writes, mapped reads and writes, direct I/O, msync, fsync, punch, zero, cache drops, closing and opening
 * again on a file of fixed size, compared with an array after every read. The seed is printed and gives the same
 * operations again. Nobody else may write to the file. The content is left changed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_LEN ((size_t)256 << 10)
#define HISTORY 64

static const char *path;
static int fd = -1, direct = -1;
static uint64_t size, rng, seed, n_ops;
static unsigned char *truth, *map;
static char history[HISTORY][120];

static uint64_t rnd(void)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng * 0x2545F4914F6CDD1Dull;
}

static void fail(const char *fmt, ...)
{
	va_list ap;

	printf("fsx: %s: seed %" PRIu64 ", operation %" PRIu64 ": ", path, seed, n_ops);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\nthe last operations, newest last:\n");
	for (uint64_t i = n_ops < HISTORY ? 0 : n_ops - HISTORY + 1; i <= n_ops; i++)
		printf("  %" PRIu64 " %s\n", i, history[i % HISTORY]);
	exit(1);
}

static void note(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(history[n_ops % HISTORY], sizeof history[0], fmt, ap);
	va_end(ap);
}

static void must(bool ok, const char *what)
{
	if (!ok)
		fail("%s: %s", what, strerror(errno));
}

static void open_all(void)
{
	fd = open(path, O_RDWR | O_CLOEXEC);
	must(fd >= 0, "open");
	direct = open(path, O_RDWR | O_CLOEXEC | O_DIRECT);
	must(direct >= 0 || errno == EINVAL, "open O_DIRECT");
	map = size ? mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : NULL;
	must(map != MAP_FAILED, "mmap");
}

static void close_all(void)
{
	if (map)
		must(munmap(map, size) == 0, "munmap");
	if (direct >= 0)
		must(close(direct) == 0, "close");
	must(close(fd) == 0, "close");
}

static void compare(const unsigned char *got, uint64_t off, size_t len)
{
	if (!memcmp(got, truth + off, len))
		return;
	for (size_t i = 0; i < len; i++) {
		if (got[i] != truth[off + i])
			fail("byte %" PRIu64 " is %02x, should be %02x", off + i, got[i], truth[off + i]);
	}
}

/* Where and how much: often small, often at edges of pages and chunks, often at the end. */
static void range(uint64_t *off, size_t *len)
{
	static const uint64_t edges[] = { 512, 4096, 65536, 1 << 20 };
	uint64_t l = 1 + rnd() % (rnd() % 4 ? 9000 : MAX_LEN), o = rnd() % size;

	if (rnd() % 3 == 0) {
		uint64_t e = edges[rnd() % 4];
		o = o / e * e;
		if (rnd() % 2)
			l = (l + e - 1) / e * e;
		else if (rnd() % 2 && o)
			o -= 1 + rnd() % (o < 9 ? o : 9);
	}
	if (rnd() % 16 == 0)
		o = size > l ? size - l : 0;
	if (l > MAX_LEN)
		l = MAX_LEN;
	if (l > size - o)
		l = size - o;
	*off = o;
	*len = (size_t)l;
}

static void fill(unsigned char *p, size_t len)
{
	uint64_t x = rnd();
	bool zero = rnd() % 20 == 0;

	for (size_t i = 0; i < len; i++) {
		if (i % 8 == 0)
			x = x * 6364136223846793005ull + 1442695040888963407ull;
		p[i] = zero ? 0 : (unsigned char)(x >> (8 + 5 * (i % 8)));
	}
}

static void op_read(uint64_t off, size_t len, unsigned char *buf, bool dio)
{
	int from = fd;

	if (dio && direct >= 0) {
		off = off / 4096 * 4096;
		len = (len + 4095) / 4096 * 4096;
		from = direct;
	}
	size_t want = len > size - off ? (size_t)(size - off) : len;
	note("%s %" PRIu64 "+%zu", from == fd ? "read" : "direct read", off, len);
	ssize_t n = pread(from, buf, len, (off_t)off);
	must(n >= 0, "read");
	if ((size_t)n != want)
		fail("read gave %zd bytes of %zu", n, want);
	compare(buf, off, want);
}

static void op_write(uint64_t off, size_t len, unsigned char *buf, bool dio)
{
	int to = fd;

	if (dio && direct >= 0 && size >= 4096) {
		off = off / 4096 * 4096;
		len = (len + 4095) / 4096 * 4096;
		if (len > size - off)
			len = (size_t)(size - off) / 4096 * 4096;
		if (!len)
			return;
		to = direct;
	}
	note("%s %" PRIu64 "+%zu", to == fd ? "write" : "direct write", off, len);
	fill(buf, len);
	ssize_t n = pwrite(to, buf, len, (off_t)off);
	must(n >= 0, "write");
	if ((size_t)n != len)
		fail("write took %zd bytes of %zu", n, len);
	memcpy(truth + off, buf, len);
}

static void op_clear(uint64_t off, size_t len, bool punch)
{
	note("%s %" PRIu64 "+%zu", punch ? "punch" : "zero", off, len);
	if (fallocate(fd, FALLOC_FL_KEEP_SIZE | (punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE), (off_t)off,
		      (off_t)len)) {
		if (errno == EOPNOTSUPP)
			return;
		must(false, punch ? "punch" : "zero");
	}
	memset(truth + off, 0, len);
}

static void op_step(unsigned char *buf)
{
	uint64_t off;
	size_t len;
	unsigned what = (unsigned)(rnd() % 100);

	range(&off, &len);
	if (what < 18) {
		op_read(off, len, buf, false);
	} else if (what < 38) {
		op_write(off, len, buf, false);
	} else if (what < 52) {
		note("mapped read %" PRIu64 "+%zu", off, len);
		memcpy(buf, map + off, len);
		compare(buf, off, len);
	} else if (what < 70) {
		note("mapped write %" PRIu64 "+%zu", off, len);
		fill(truth + off, len);
		memcpy(map + off, truth + off, len);
	} else if (what < 74) {
		op_read(off, len, buf, true);
	} else if (what < 78) {
		op_write(off, len, buf, true);
	} else if (what < 82) {
		uint64_t page = off / 4096 * 4096;
		note("msync %" PRIu64 "+%zu", page, len);
		must(msync(map + page, len, rnd() % 2 ? MS_SYNC : MS_ASYNC) == 0, "msync");
	} else if (what < 84) {
		note("fsync");
		must((rnd() % 2 ? fsync(fd) : fdatasync(fd)) == 0, "fsync");
	} else if (what < 89) {
		op_clear(off, len, true);
	} else if (what < 93) {
		op_clear(off, len, false);
	} else if (what < 97) {
		note("drop the cache of %" PRIu64 "+%zu", off, len);
		madvise(map + off / 4096 * 4096, len, MADV_DONTNEED);
		posix_fadvise(fd, (off_t)off, (off_t)len, POSIX_FADV_DONTNEED);
	} else if (what < 98) {
		note("same size, a byte past the end");
		must(ftruncate(fd, (off_t)size) == 0, "ftruncate to the same size");
		must(pread(fd, buf, 10, (off_t)size) == 0, "read past the end");
	} else {
		note("close and open");
		close_all();
		open_all();
	}
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

int main(int argc, char **argv)
{
	struct stat st;
	char *end;

	if (argc < 3 || argc > 4) {
		fprintf(stderr, "usage: fsx PATH SECONDSs|OPERATIONS [SEED]\n");
		return 2;
	}
	path = argv[1];
	uint64_t limit = strtoull(argv[2], &end, 10), until = UINT64_MAX;
	if (*end == 's') {
		until = now_ns() + limit * 1000000000u;
		limit = UINT64_MAX;
	}
	seed = argc > 3 ? strtoull(argv[3], NULL, 10) : now_ns() % 1000000000u;
	rng = seed * 0x9E3779B97F4A7C15ull + 1;
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("fsx: %s: seed %" PRIu64 "\n", path, seed);
	if (stat(path, &st) || !S_ISREG(st.st_mode)) {
		fprintf(stderr, "fsx: %s is no regular file\n", path);
		return 2;
	}
	size = (uint64_t)st.st_size;
	truth = malloc(size + 1);
	unsigned char *buf = NULL;
	must(truth && posix_memalign((void **)&buf, 4096, MAX_LEN + 4096) == 0, "memory");
	open_all();
	for (uint64_t off = 0; off < size;) {
		ssize_t n = pread(fd, truth + off, size - off, (off_t)off);
		must(n > 0, "first read");
		off += (uint64_t)n;
	}
	while (size && n_ops < limit && now_ns() < until) {
		op_step(buf);
		n_ops++;
	}
	note("last look");
	if (size)
		compare(map, 0, size);
	close_all();
	open_all();
	posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	for (uint64_t off = 0; off < size; off += MAX_LEN)
		op_read(off, size - off < MAX_LEN ? (size_t)(size - off) : MAX_LEN, buf, false);
	close_all();
	printf("fsx: %s: %" PRIu64 " operations, all as expected\n", path, n_ops);
	free(buf);
	free(truth);
	return 0;
}
