/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * backend URI SIZE BLOCK CALLERS[xLIST] MILLISECONDS read|write: CALLERS threads at random blocks of a remote region, each
 * with one call going, or with a list of so many blocks at a time (far_read_many, far_write_many; the time of a block is that
 * of its list). Prints blocks a second, p50 and p99 in microseconds. The region holds the pattern of `farpage bench`. Every
 * byte that is read is compared; what was written (the same bytes inverted) is read back and compared when the clock has
 * stopped, and put back.
 * tests/interop/go/bench.go is the same job on the Go family's client.
 */
#include <farpage.h>

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CALLERS_MAX 512
#define STEP 0x9e3779b97f4a7c15
#define TIMES_MAX 4000000u

static struct far_backend *remote;
static unsigned char *image;
static _Atomic unsigned char *written;
static size_t size, block, list = 1;
static bool writing;
static uint64_t until;

struct caller {
	pthread_t thread;
	uint64_t seed;
	uint32_t *times; /* ns */
	size_t n, max;
	int result;
};

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next(uint64_t *seed)
{
	uint64_t z = *seed += STEP;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static int check(const struct far_io *io)
{
	if (!memcmp(io->buf, image + io->off, block))
		return 0;
	fprintf(stderr, "backend: wrong data at %" PRIu64 "\n", io->off);
	return -EIO;
}

/* The next list: blocks of its own for each place, so that none is there twice. */
static void choose(struct caller *c, struct far_io *io)
{
	for (size_t i = 0; i < list; i++) {
		io[i].off = (next(&c->seed) % (size / block / list) * list + i) * block;
		if (writing)
			io[i].buf = image + io[i].off;
	}
}

static int carry_out(struct far_io *io)
{
	int r = writing ? far_write_many(remote, io, list, 0) : far_read_many(remote, io, list, 0);

	for (size_t i = 0; i < list && !r && !writing; i++)
		r = check(&io[i]);
	return r;
}

static void *call(void *arg)
{
	struct caller *c = arg;
	struct far_io *io = calloc(list, sizeof *io);
	unsigned char *buf = malloc(list * block);
	uint64_t t = now();

	c->result = io && buf ? 0 : -ENOMEM;
	for (size_t i = 0; i < list && !c->result; i++) {
		io[i].buf = buf + i * block;
		io[i].len = block;
	}
	while (!c->result && t < until) {
		choose(c, io);
		c->result = carry_out(io);
		uint64_t then = t;
		t = now();
		for (size_t i = 0; i < list; i++) {
			if (c->n < c->max)
				c->times[c->n++] = (uint32_t)(t - then);
			written[io[i].off / block] = 1;
		}
	}
	free(buf);
	free(io);
	return NULL;
}

static void invert(uint64_t off, size_t len)
{
	for (size_t i = 0; i < len; i++)
		image[off + i] ^= 0xff;
}

/* What was written is there; then the pattern is again. */
static int look_and_put_back(void)
{
	unsigned char *buf = malloc(block);
	int r = buf ? 0 : -ENOMEM;

	for (size_t i = 0; i < size / block && !r; i++) {
		if (!written[i])
			continue;
		struct far_io io = { .off = i * block, .buf = buf };
		r = far_read(remote, io.off, buf, block, 0);
		r = r ? r : check(&io);
		invert(i * block, block);
		if (!r)
			r = far_write(remote, i * block, image + i * block, block, 0);
	}
	free(buf);
	return r;
}

static int by_length(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static void report(struct caller *c, unsigned callers, uint64_t took)
{
	size_t n = 0, at = 0;

	for (unsigned i = 0; i < callers; i++)
		n += c[i].n;
	uint32_t *all = calloc(n + 1, sizeof *all);
	for (unsigned i = 0; i < callers && all; at += c[i++].n)
		memcpy(all + at, c[i].times, c[i].n * sizeof *all);
	if (!all || !n)
		exit(1);
	qsort(all, n, sizeof *all, by_length);
	printf("%.1f %.1f %.1f\n", (double)n * 1e9 / (double)took, all[(n - 1) / 2] / 1e3, all[(n - 1) * 99 / 100] / 1e3);
	free(all);
}

int main(int argc, char **argv)
{
	static struct caller c[CALLERS_MAX];
	struct far_error err = { 0 };

	if (argc != 7 || !(size = strtoull(argv[2], NULL, 10)) || !(block = strtoull(argv[3], NULL, 10)) || size % block) {
		fprintf(stderr, "usage: backend URI SIZE BLOCK CALLERS[xLIST] MILLISECONDS read|write\n");
		return 2;
	}
	char *x;
	unsigned callers = (unsigned)strtoul(argv[4], &x, 10), started = 0;
	if (*x == 'x')
		list = strtoul(x + 1, NULL, 10);
	writing = strcmp(argv[6], "write") == 0;
	image = malloc(size);
	written = calloc(size / block, 1);
	if (callers < 1 || !list || list > size / block || callers > CALLERS_MAX || !image || !written)
		return 2;
	for (size_t i = 0; i < size / 8; i++)
		((uint64_t *)(void *)image)[i] = (i + 1) * STEP;
	if (writing)
		invert(0, size);
	if (far_open(argv[1], NULL, &remote, &err)) {
		fprintf(stderr, "backend: %s\n", err.text);
		return 1;
	}
	uint64_t begin = now();
	until = begin + strtoull(argv[5], NULL, 10) * 1000000;
	for (; started < callers; started++) {
		struct caller *one = &c[started];
		one->seed = started;
		one->max = TIMES_MAX / callers;
		one->times = malloc(one->max * sizeof *one->times);
		if (!one->times || pthread_create(&one->thread, NULL, call, one))
			break;
	}
	int r = started == callers ? 0 : -ENOMEM;
	for (unsigned i = 0; i < started; i++) {
		pthread_join(c[i].thread, NULL);
		r = r ? r : c[i].result;
	}
	uint64_t took = now() - begin;
	if (!r && writing)
		r = look_and_put_back();
	far_close(remote);
	if (r) {
		fprintf(stderr, "backend: %s\n", strerror(-r));
		return 1;
	}
	report(c, callers, took);
	return 0;
}
