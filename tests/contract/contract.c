/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "contract.h"

#include "backend/backend.h"
#include "base/clock.h"
#include "base/thread.h"

#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmocka.h>

static const uint64_t sizes[] = { 0, 1, 4095, 4096, 4097, 3 * 4096 + 5, 70001 };
static uint64_t seed;

/* -------------------------------------------------------------------------------------------------- helpers */

/* A region of a subject, opened for one check. */
struct region {
	const struct contract_subject *s;
	struct far_backend *b;
	void *ctx;
	char dir[64];
	uint64_t bytes, unit; /* unit: every offset and length is a multiple of it, or ends at the region's end */
};

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static int open_owned(const struct contract_subject *s, const char *dir, uint64_t bytes,
		      const struct far_open_opts *opts, struct far_backend **b, void **ctx);

static void close_subject(const struct contract_subject *s, struct far_backend *b, void *ctx)
{
	if (!(s->flags & CONTRACT_CLOSES))
		far_close(b);
	if (s->close)
		s->close(ctx);
}

static void region_open(struct region *r, const struct contract_subject *s, uint64_t bytes, bool read_only)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;

	const char *lacks = s->lacks ? s->lacks(s) : NULL;
	if (lacks) {
		print_message("skipped: not here: %s\n", lacks);
		skip();
	}
	*r = (struct region){ .s = s, .bytes = bytes };
	strcpy(r->dir, "/tmp/farpage-contract-XXXXXX");
	assert_non_null(mkdtemp(r->dir));
	if (read_only) {
		/* made by a first open, then opened for reading */
		assert_int_equal(s->open(s, r->dir, bytes, &opts, &r->b, &r->ctx), 0);
		close_subject(s, r->b, r->ctx);
		opts.read_only = true;
	}
	assert_int_equal(s->open(s, r->dir, bytes, &opts, &r->b, &r->ctx), 0);
	assert_true(far_size(r->b) == bytes);
	r->unit = far_facts(r->b)->chunk ? far_facts(r->b)->chunk : 1;
}

static void region_close(struct region *r)
{
	close_subject(r->s, r->b, r->ctx);
	nftw(r->dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static bool forgets(const struct region *r)
{
	return r->s->flags & CONTRACT_FORGETS;
}

/* Round [off, off+*len) outwards to what the region takes. */
static uint64_t fit(const struct region *r, uint64_t off, uint64_t *len)
{
	uint64_t end = off + *len;

	off -= off % r->unit;
	end = end % r->unit ? far_min(end - end % r->unit + r->unit, r->bytes) : end;
	*len = end - off;
	return off;
}

static uint64_t next(uint64_t *rng)
{
	*rng = *rng * 6364136223846793005 + 1442695040888963407;
	return *rng >> 33;
}

static void fill(unsigned char *p, size_t n, uint64_t *rng)
{
	for (size_t i = 0; i < n; i++)
		p[i] = (unsigned char)(1 + next(rng) % 255);
}

static void *room(size_t n)
{
	unsigned char *p = malloc(n ? n : 1);
	assert_non_null(p);
	memset(p, 0xaa, n);
	return p;
}

/* The whole region against what it must hold. */
static void verify(struct region *r, const unsigned char *want)
{
	unsigned char *got = room(r->bytes);

	assert_int_equal(far_read(r->b, 0, got, r->bytes, 0), 0);
	if (forgets(r))
		assert_true(r->bytes == 0 || (got[0] == 0 && !memcmp(got, got + 1, r->bytes - 1)));
	else
		assert_memory_equal(got, want, r->bytes);
	free(got);
}

#define SUBJECT const struct contract_subject *s = *state
#define EACH_SIZE(r) \
	for (size_t size_i = 0; size_i < FAR_ARRAY_LEN(sizes); size_i++) \
		for (bool once = (region_open(&(r), s, sizes[size_i], false), true); once; once = false, region_close(&(r)))

/* --------------------------------------------------------------------------------------------------- checks */

/* W-A9, W-A10: what was never written reads as zeros, whatever the buffer held before. */
static void check_zero_reads(void **state)
{
	SUBJECT;
	struct region r;

	EACH_SIZE(r) {
		unsigned char *zero = calloc(1, r.bytes + 1), *buf = room(r.bytes);
		verify(&r, zero);
		for (uint64_t at = 0; at < r.bytes; at += 1000) {
			uint64_t len = far_min(1000, r.bytes - at), off = fit(&r, at, &len);
			memset(buf, 0xaa, r.bytes);
			assert_int_equal(far_read(r.b, off, buf, len, 0), 0);
			assert_memory_equal(buf, zero, len);
		}
		free(zero);
		free(buf);
	}
}

static void check_edges(void **state)
{
	SUBJECT;
	struct region r;

	EACH_SIZE(r) {
		unsigned char buf[16] = { 0 };
		struct far_extent e[2];
		size_t n = 7;
		static const uint64_t beyond[] = { 1, 4096, FAR_SIZE_MAX, UINT64_MAX };
		assert_int_equal(far_read(r.b, 0, buf, 0, 0), 0);
		assert_int_equal(far_read(r.b, r.bytes, buf, 0, 0), 0);
		assert_int_equal(far_write(r.b, r.bytes, buf, 0, 0), 0);
		assert_int_equal(far_discard(r.b, r.bytes, 0, 0), 0);
		assert_int_equal(far_zero(r.b, r.bytes, 0, 0), 0);
		assert_int_equal(far_extents(r.b, r.bytes, 0, e, 2, &n), 0);
		assert_int_equal(n, 0);
		assert_int_equal(far_read(r.b, r.bytes, buf, 1, 0), -EINVAL);
		assert_int_equal(far_write(r.b, r.bytes, buf, 1, 0), -ENOSPC);
		assert_int_equal(far_extents(r.b, r.bytes, 1, e, 2, &n), -EINVAL);
		assert_int_equal(far_extents(r.b, 0, r.bytes, e, 0, &n), -EINVAL);
		for (size_t i = 0; i < FAR_ARRAY_LEN(beyond); i++) {
			uint64_t off = beyond[i] == UINT64_MAX ? UINT64_MAX : r.bytes + beyond[i];
			assert_int_equal(far_read(r.b, off, buf, 1, 0), -EINVAL);
			assert_int_equal(far_read(r.b, off, buf, 0, 0), -EINVAL);
			assert_int_equal(far_write(r.b, off, buf, 1, 0), -ENOSPC);
			assert_int_equal(far_discard(r.b, off, 1, 0), -ENOSPC);
			assert_int_equal(far_zero(r.b, off, UINT64_MAX, 0), -ENOSPC);
			assert_int_equal(far_read(r.b, 0, buf, beyond[i] == UINT64_MAX ? SIZE_MAX : r.bytes + beyond[i], 0), -EINVAL);
		}
		if (!r.bytes)
			continue;
		/* first and last byte, and across the end */
		uint64_t one = 1, last = fit(&r, r.bytes - 1, &one);
		unsigned char *want = calloc(1, r.bytes), *buf2 = room(r.unit);
		memset(buf2, 1, r.unit);
		assert_int_equal(far_write(r.b, 0, buf2, far_min(r.unit, r.bytes), 0), 0);
		memset(want, 1, far_min(r.unit, r.bytes));
		memset(buf2, 2, r.unit);
		assert_int_equal(far_write(r.b, last, buf2, one, 0), 0);
		memset(want + last, 2, one);
		assert_int_equal(far_write(r.b, last, buf2, one + 1, 0), -ENOSPC);
		assert_int_equal(far_read(r.b, last, buf2, one + 1, 0), -EINVAL);
		verify(&r, want);
		free(want);
		free(buf2);
	}
}

/* A list of random reads, or of writes next to each other, on the region and on `model`. */
static void random_list(struct region *r, unsigned char *model, unsigned char *buf, uint64_t *rng)
{
	struct far_io io[5];
	size_t n = next(rng) % 6;
	uint64_t part = r->bytes / 5 - r->bytes / 5 % r->unit;
	bool write = next(rng) % 2 && part;

	for (size_t i = 0; i < n; i++) {
		uint64_t at = next(rng) % r->bytes, len = 1 + next(rng) % far_min(r->bytes - at, 5000);
		uint64_t off = write ? i * part : fit(r, at, &len);
		io[i] = (struct far_io){ .off = off, .len = write ? part : len, .buf = write ? buf + off : room(len), .result = 1 };
	}
	if (write)
		fill(buf, n * part, rng);
	if (write)
		assert_int_equal(far_write_many(r->b, io, n, next(rng) % 4 ? FAR_BULK : FAR_FLUSH), 0);
	else
		assert_int_equal(far_read_many(r->b, io, n, next(rng) % 4 ? 0 : FAR_BULK), 0);
	for (size_t i = 0; i < n; i++) {
		assert_int_equal(io[i].result, 0);
		if (write)
			memcpy(model + io[i].off, io[i].buf, io[i].len);
		else if (!forgets(r))
			assert_memory_equal(io[i].buf, model + io[i].off, io[i].len);
		if (!write)
			free(io[i].buf);
	}
}

/* One that lies outside ends none of the others. */
static void check_list_with_errors(void **state)
{
	SUBJECT;
	struct region r;
	unsigned char *a, *b, *c;

	region_open(&r, s, 70001, false);
	uint64_t unit = far_div_up(512, r.unit) * r.unit;
	a = room(unit);
	b = room(unit);
	c = room(unit);
	memset(a, 1, unit);
	memset(b, 2, unit);
	struct far_io io[] = { { 0, a, unit, 7 }, { 70001, b, 1, 7 }, { 2 * unit, b, unit, 7 }, { 0, c, 0, 7 } };
	assert_int_equal(far_write_many(r.b, io, FAR_ARRAY_LEN(io), FAR_FLUSH), -ENOSPC);
	assert_true(io[0].result == 0 && io[1].result == -ENOSPC && io[2].result == 0 && io[3].result == 0);
	io[0].buf = c;
	assert_int_equal(far_read_many(r.b, io, FAR_ARRAY_LEN(io), 0), -EINVAL);
	assert_true(io[0].result == 0 && io[1].result == -EINVAL && io[2].result == 0 && io[3].result == 0);
	if (!forgets(&r))
		assert_memory_equal(a, c, unit);
	assert_int_equal(far_read_many(r.b, NULL, 0, 0), 0);
	far_stop(r.b);
	assert_int_equal(far_read_many(r.b, io, 1, 0), -ESHUTDOWN);
	assert_int_equal(far_read_many(r.b, io, 3, 0), -ESHUTDOWN);
	assert_true(io[0].result == -ESHUTDOWN && io[2].result == -ESHUTDOWN);
	free(a);
	free(b);
	free(c);
	region_close(&r);
}

/* One random operation on the region and on `model`. */
static void random_op(struct region *r, unsigned char *model, unsigned char *buf, uint64_t *rng)
{
	uint64_t at = next(rng) % r->bytes, len = 1 + next(rng) % far_min(r->bytes - at, next(rng) % 4 ? 5000 : 70000);
	uint64_t off = fit(r, at, &len);

	switch (next(rng) % 10) {
	case 8:
	case 9:
		random_list(r, model, buf, rng);
		break;
	case 0:
	case 1:
	case 2:
		fill(buf, len, rng);
		assert_int_equal(far_write(r->b, off, buf, len, next(rng) % 2 ? FAR_BULK : 0), 0);
		memcpy(model + off, buf, len);
		break;
	case 3:
		assert_int_equal(far_discard(r->b, off, len, 0), 0);
		memset(model + off, 0, len);
		break;
	case 4:
		assert_int_equal(far_zero(r->b, off, len, 0), 0);
		memset(model + off, 0, len);
		break;
	case 5:
		assert_int_equal(far_flush(r->b), 0);
		break;
	default:
		memset(buf, 0xaa, len);
		assert_int_equal(far_read(r->b, off, buf, len, 0), 0);
		if (!forgets(r))
			assert_memory_equal(buf, model + off, len);
	}
}

static void check_model(void **state)
{
	SUBJECT;
	struct region r;
	uint64_t rng = seed;

	EACH_SIZE(r) {
		unsigned char *model = calloc(1, r.bytes + 1), *buf = room(r.bytes);
		for (int i = 0; r.bytes && i < (s->flags & CONTRACT_SLOW ? 60 : 300); i++)
			random_op(&r, model, buf, &rng);
		verify(&r, model);
		free(model);
		free(buf);
	}
}

static void check_overlap_and_tail(void **state)
{
	SUBJECT;
	struct region r;
	uint64_t rng = seed;

	EACH_SIZE(r) {
		unsigned char *model = calloc(1, r.bytes + 1), *buf = room(r.bytes);
		for (uint64_t at = 0; at < r.bytes; at += 700) {
			uint64_t len = far_min(1500, r.bytes - at), off = fit(&r, at, &len);
			fill(buf, len, &rng);
			assert_int_equal(far_write(r.b, off, buf, len, 0), 0);
			memcpy(model + off, buf, len);
		}
		verify(&r, model);
		/* the tail again: at its exact length, and as the end of a long write */
		for (uint64_t from = 0; r.bytes && from < 3; from++) {
			uint64_t at = from * (r.bytes / 3), len = r.bytes - at, off = fit(&r, at, &len);
			fill(buf, len, &rng);
			assert_int_equal(far_write(r.b, off, buf, len, 0), 0);
			memcpy(model + off, buf, len);
			verify(&r, model);
		}
		free(model);
		free(buf);
	}
}

static void check_misaligned(void **state)
{
	SUBJECT;
	struct region r;
	unsigned char buf[64] = { 0 };

	region_open(&r, s, 10 * 4096 + 5, false);
	if (r.unit > 1 && r.unit < r.bytes) {
		assert_int_equal(far_read(r.b, 1, buf, 1, 0), -EINVAL);
		assert_int_equal(far_read(r.b, 0, buf, 1, 0), -EINVAL);
		assert_int_equal(far_write(r.b, 0, buf, 1, 0), -EINVAL);
		assert_int_equal(far_write(r.b, r.unit - 1, buf, 1, 0), -EINVAL);
		assert_int_equal(far_discard(r.b, 1, r.unit - 1, 0), -EINVAL);
		assert_int_equal(far_zero(r.b, 1, r.unit, 0), -EINVAL);
		assert_int_equal(far_write(r.b, r.bytes - 1, buf, 1, 0), (r.bytes - 1) % r.unit ? -EINVAL : 0);
	}
	region_close(&r);
}

#define WRITERS 6
#define SLICE 37

struct writer {
	struct region *r;
	unsigned char *model;
	unsigned id;
	int rounds;
	_Atomic int failed; /* line */
	struct far_thread t;
};

#define CHECK(c) \
	do { \
		if (!(c)) { \
			atomic_store(&w->failed, __LINE__); \
			goto out; \
		} \
	} while (0)

/* Slices of all writers lie side by side in the same chunks; each writer reads its own ones back. */
static void *writer_run(void *arg)
{
	struct writer *w = arg;
	struct region *r = w->r;
	uint64_t slice = r->unit > 1 ? r->unit : SLICE, rng = seed + w->id;
	unsigned char *buf = malloc(slice), *back = malloc(slice);

	for (int round = 0; round < w->rounds; round++)
		for (uint64_t off = w->id * slice; off < r->bytes; off += WRITERS * slice) {
			size_t n = far_min(slice, r->bytes - off);
			fill(buf, n, &rng);
			if (next(&rng) % 8 == 0) {
				memset(buf, 0, n);
				CHECK(!far_zero(r->b, off, n, 0));
			} else {
				CHECK(!far_write(r->b, off, buf, n, 0));
			}
			memcpy(w->model + off, buf, n);
			memset(back, 0xaa, n);
			CHECK(!far_read(r->b, off, back, n, 0));
			CHECK(forgets(r) || !memcmp(buf, back, n));
			if (next(&rng) % 64 == 0)
				CHECK(!far_flush(r->b));
		}
out:
	free(buf);
	free(back);
	return NULL;
}

/* W-A14: parts of one chunk written at the same time; none of the writes is lost. */
static void check_parallel(void **state)
{
	SUBJECT;
	struct writer w[WRITERS];
	struct region r;

	region_open(&r, s, s->flags & CONTRACT_SLOW ? 9001 : 30001, false);
	unsigned char *model = calloc(1, r.bytes);
	for (unsigned i = 0; i < WRITERS; i++) {
		w[i] = (struct writer){ .r = &r, .model = model, .id = i, .rounds = s->flags & CONTRACT_SLOW ? 1 : 4 };
		assert_int_equal(far_thread_start(&w[i].t, "writer", writer_run, &w[i]), 0);
	}
	for (unsigned i = 0; i < WRITERS; i++)
		far_thread_join(&w[i].t);
	for (unsigned i = 0; i < WRITERS; i++)
		assert_int_equal(w[i].failed, 0);
	verify(&r, model);
	free(model);
	region_close(&r);
}

static void check_clear(void **state)
{
	SUBJECT;
	struct region r;

	for (int zero = 0; zero < 2; zero++)
		EACH_SIZE(r) {
			unsigned char *model = calloc(1, r.bytes + 1), *buf = room(r.bytes);
			for (uint64_t at = 0; at < r.bytes; at += 1 + r.bytes / 7) {
				uint64_t len = 1 + (r.bytes - at) / 2, off = fit(&r, at, &len);
				memset(buf, 0x55, r.bytes);
				memset(model, 0x55, r.bytes);
				assert_int_equal(far_write(r.b, 0, buf, r.bytes, 0), 0);
				assert_int_equal((zero ? far_zero : far_discard)(r.b, off, len, 0), 0);
				memset(model + off, 0, len);
				verify(&r, model);
			}
			free(model);
			free(buf);
		}
}

/* The answer covers the range from its start, in order, without gaps; what is called zero reads as zeros. */
static void walk_extents(struct region *r, const unsigned char *model, uint64_t from, uint64_t end, size_t max)
{
	struct far_extent e[5];

	for (uint64_t at = from; at < end;) {
		size_t n = 0;
		assert_int_equal(far_extents(r->b, at, end - at, e, max, &n), 0);
		assert_in_range(n, 1, max);
		for (size_t i = 0; i < n; i++) {
			assert_true(e[i].off == at && e[i].len > 0 && e[i].len <= end - at);
			if (e[i].kind == FAR_EXTENT_ZERO && !forgets(r))
				assert_true(model[at] == 0 && !memcmp(model + at, model + at + 1, e[i].len - 1));
			at += e[i].len;
		}
	}
}

static void check_extents(void **state)
{
	SUBJECT;
	struct region r;
	uint64_t rng = seed;

	EACH_SIZE(r) {
		unsigned char *model = calloc(1, r.bytes + 1), *buf = room(r.bytes);
		for (int i = 0; r.bytes && i < 12; i++) {
			random_op(&r, model, buf, &rng);
			walk_extents(&r, model, 0, r.bytes, 5);
			walk_extents(&r, model, next(&rng) % r.bytes, r.bytes, 1);
			walk_extents(&r, model, r.bytes / 3, r.bytes - r.bytes / 4, 2);
		}
		free(model);
		free(buf);
	}
}

static void check_stop(void **state)
{
	SUBJECT;
	struct region r;

	EACH_SIZE(r) {
		struct far_extent e;
		unsigned char buf[1];
		size_t n;
		int fd;
		far_stop(r.b);
		far_stop(r.b);
		assert_int_equal(far_read(r.b, 0, buf, 1, 0), -ESHUTDOWN);
		assert_int_equal(far_read(r.b, 0, buf, 1, FAR_NOWAIT), -ESHUTDOWN);
		assert_int_equal(far_write(r.b, 0, buf, 1, 0), -ESHUTDOWN);
		assert_int_equal(far_flush(r.b), -ESHUTDOWN);
		assert_int_equal(far_discard(r.b, 0, 1, 0), -ESHUTDOWN);
		assert_int_equal(far_zero(r.b, 0, 1, 0), -ESHUTDOWN);
		assert_int_equal(far_extents(r.b, 0, 1, &e, 1, &n), -ESHUTDOWN);
		assert_int_equal(far_share(r.b, &fd), -ESHUTDOWN);
	}
}

static void *stop_reader_run(void *arg)
{
	struct writer *w = arg;
	struct region *r = w->r;
	unsigned char *buf = malloc(r->bytes);
	int e;

	do
		e = far_read(r->b, 0, buf, r->bytes, 0);
	while (!e);
	atomic_store(&w->failed, e);
	free(buf);
	return NULL;
}

/* Readers that never end by themselves end with -ESHUTDOWN, and with nothing else. */
static void check_stop_while_busy(void **state)
{
	SUBJECT;
	struct writer w[3];
	struct region r;

	region_open(&r, s, 30001, false);
	for (unsigned i = 0; i < 3; i++) {
		w[i] = (struct writer){ .r = &r, .id = i };
		assert_int_equal(far_thread_start(&w[i].t, "reader", stop_reader_run, &w[i]), 0);
	}
	far_sleep_until(far_now() + 2 * FAR_MSEC, false); /* into the middle of calls; passes without, too */
	far_stop(r.b);
	for (unsigned i = 0; i < 3; i++) {
		far_thread_join(&w[i].t);
		assert_int_equal(w[i].failed, -ESHUTDOWN);
	}
	region_close(&r);
}

static void check_read_only(void **state)
{
	SUBJECT;
	struct region r;
	unsigned char *buf;

	if (s->flags & CONTRACT_NO_READ_ONLY)
		return;
	region_open(&r, s, 9000, true);
	buf = room(r.bytes);
	assert_false(far_facts(r.b)->caps & FAR_CAP_WRITE);
	assert_int_equal(far_read(r.b, 0, buf, r.bytes, 0), 0);
	assert_int_equal(far_write(r.b, 0, buf, r.bytes, 0), -EROFS);
	assert_int_equal(far_discard(r.b, 0, r.bytes, 0), -EROFS);
	assert_int_equal(far_zero(r.b, 0, r.bytes, 0), -EROFS);
	assert_int_equal(far_write(r.b, r.bytes + 1, buf, 1, 0), -EROFS);
	assert_int_equal(far_flush(r.b), 0);
	free(buf);
	region_close(&r);
}

/* A record beside the content: none at first, replaced as a whole, seen through every layer, no part of the content. */
static void check_record(void **state)
{
	SUBJECT;
	struct region r;
	char buf[FAR_RECORD_MAX + 1], in[FAR_RECORD_MAX + 1];
	size_t n = 99;
	bool must = (s->open == contract_open_uri || s->open == open_owned) && strncmp(s->uri, "null:", 5);

	region_open(&r, s, 9000, false);
	int e = far_record_read(r.b, buf, sizeof buf, &n);
	assert_true(e == 0 || (e == -EOPNOTSUPP && !must));
	if (e) {
		assert_int_equal(far_record_write(r.b, "x", 1), -EOPNOTSUPP);
		region_close(&r);
		return;
	}
	unsigned char *zeros = calloc(1, r.bytes);
	size_t first = n; /* an owner has said something already */
	for (size_t len = FAR_RECORD_MAX; len > 0; len /= 3) {
		memset(in, (int)len, len);
		assert_int_equal(far_record_write(r.b, in, len), 0);
		assert_int_equal(far_flush(r.b), 0);
		assert_int_equal(far_record_read(r.b, buf, sizeof buf, &n), 0);
		assert_int_equal(n, len);
		assert_memory_equal(buf, in, len);
	}
	assert_int_equal(far_record_write(r.b, in, FAR_RECORD_MAX + 1), -EINVAL);
	verify(&r, zeros);
	free(zeros);
	region_close(&r);
	if (first || (s->flags & CONTRACT_NO_READ_ONLY))
		return;
	region_open(&r, s, 9000, true);
	assert_int_equal(far_record_write(r.b, "x", 1), -EROFS);
	assert_int_equal(far_record_read(r.b, buf, sizeof buf, &n), 0);
	assert_int_equal(n, 0);
	region_close(&r);
}

/* FAR_NOWAIT: all or -EAGAIN and nothing. */
static void check_nowait(void **state)
{
	SUBJECT;
	struct region r;
	uint64_t rng = seed;

	EACH_SIZE(r) {
		unsigned char *model = calloc(1, r.bytes + 1), *buf = room(r.bytes);
		for (int i = 0; r.bytes && i < 40; i++) {
			uint64_t at = next(&rng) % r.bytes, len = 1 + next(&rng) % (r.bytes - at), off = fit(&r, at, &len);
			int e, kind = i % 4;
			fill(buf, len, &rng);
			if (kind == 0)
				e = far_write(r.b, off, buf, len, FAR_NOWAIT);
			else if (kind == 1)
				e = far_discard(r.b, off, len, FAR_NOWAIT);
			else if (kind == 2)
				e = far_zero(r.b, off, len, FAR_NOWAIT);
			else
				e = far_read(r.b, off, buf, len, FAR_NOWAIT);
			assert_true(e == 0 || e == -EAGAIN);
			if (!e && kind == 3 && !forgets(&r))
				assert_memory_equal(buf, model + off, len);
			if (!e && kind == 0)
				memcpy(model + off, buf, len);
			if (!e && (kind == 1 || kind == 2))
				memset(model + off, 0, len);
			verify(&r, model);
			if (i % 10 == 0) {
				memset(model, i + 1, r.bytes);
				assert_int_equal(far_write(r.b, 0, model, r.bytes, 0), 0);
			}
		}
		free(model);
		free(buf);
	}
}

static void check_share(void **state)
{
	SUBJECT;
	struct region r;
	int fd = -1;

	region_open(&r, s, 3 * 4096, false);
	if (!(far_facts(r.b)->caps & FAR_CAP_SHARE)) {
		assert_int_equal(far_share(r.b, &fd), -EOPNOTSUPP);
	} else {
		unsigned char *buf = room(r.bytes);
		assert_int_equal(far_share(r.b, &fd), 0);
		unsigned char *p = mmap(NULL, r.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		assert_true(p != MAP_FAILED);
		memset(buf, 3, r.bytes);
		assert_int_equal(far_write(r.b, 0, buf, r.bytes, 0), 0);
		assert_memory_equal(p, buf, r.bytes);
		p[5000] = 9;
		assert_int_equal(far_read(r.b, 0, buf, r.bytes, 0), 0);
		assert_int_equal(buf[5000], 9);
		munmap(p, r.bytes);
		free(buf);
	}
	region_close(&r);
}

/* 1 TiB of nothing: the far end works, and asking for holes does not take a probe a chunk at once. */
static void check_sparse(void **state)
{
	SUBJECT;
	uint64_t big = (uint64_t)1 << 40;
	struct region r;
	struct far_extent e[4];
	size_t n;

	if (!(s->flags & CONTRACT_SPARSE))
		return;
	region_open(&r, s, big + 5, false);
	uint64_t len = 10, off = fit(&r, big - 5, &len);
	unsigned char *buf = room(len);
	memset(buf, 7, len);
	assert_int_equal(far_write(r.b, off, buf, len, 0), 0);
	memset(buf, 0xaa, len);
	assert_int_equal(far_read(r.b, off, buf, len, 0), 0);
	assert_int_equal(buf[0], forgets(&r) ? 0 : 7);
	assert_int_equal(buf[len - 1], forgets(&r) ? 0 : 7);
	assert_int_equal(far_extents(r.b, 0, r.bytes, e, 4, &n), 0);
	if (!(s->flags & CONTRACT_BLIND))
		assert_int_equal(e[0].kind, FAR_EXTENT_ZERO);
	/* who is blind to holes takes all of them for data that was cleared: less of it, at the end */
	uint64_t from = s->flags & CONTRACT_BLIND ? r.bytes - (64 << 20) : 0;
	assert_int_equal(far_discard(r.b, from, r.bytes - from, 0), 0);
	assert_int_equal(far_read(r.b, off, buf, len, 0), 0);
	assert_int_equal(buf[0] | buf[len - 1], 0);
	free(buf);
	region_close(&r);
}

/* --------------------------------------------------------------------------------------------------- subjects */

static void expand(const char *pattern, const char *dir, uint64_t bytes, char *out, size_t n)
{
	size_t at = 0;

	for (; *pattern && at + 1 < n; pattern++) {
		if (pattern[0] == '%' && pattern[1] == 'd')
			at += (size_t)snprintf(out + at, n - at, "%s", dir);
		else if (pattern[0] == '%' && pattern[1] == 's')
			at += (size_t)snprintf(out + at, n - at, "%" PRIu64, bytes);
		else {
			out[at++] = *pattern;
			continue;
		}
		pattern++;
	}
	assert_true(at < n);
	out[at] = 0;
}

int contract_open_uri(const struct contract_subject *s, const char *dir, uint64_t bytes,
		      const struct far_open_opts *opts, struct far_backend **b, void **ctx)
{
	struct far_error err;
	char uri[300];

	expand(s->uri, dir, bytes, uri, sizeof uri);
	int r = far_open(uri, opts, b, &err);
	if (r) {
		fprintf(stderr, "%s\n", err.text);
		return r;
	}
	for (size_t i = 0; i < FAR_ARRAY_LEN(s->layers) && s->layers[i]; i++)
		if ((r = far_layer_open(s->layers[i], *b, b, &err))) {
			fprintf(stderr, "%s\n", err.text);
			far_close(*b);
			return r;
		}
	return 0;
}

/* Four functions over an array. */
struct array {
	uint64_t bytes;
	struct far_mutex lock;
	unsigned char data[];
};

static int array_read(void *opaque, uint64_t off, void *buf, size_t len)
{
	struct array *a = opaque;
	far_mutex_lock(&a->lock);
	memcpy(buf, a->data + off, len);
	far_mutex_unlock(&a->lock);
	return 0;
}

static int array_write(void *opaque, uint64_t off, const void *buf, size_t len)
{
	struct array *a = opaque;
	far_mutex_lock(&a->lock);
	memcpy(a->data + off, buf, len);
	far_mutex_unlock(&a->lock);
	return 0;
}

static struct array *array_new(uint64_t bytes)
{
	struct array *a = calloc(1, sizeof *a + bytes);
	assert_non_null(a);
	a->bytes = bytes;
	far_mutex_init(&a->lock);
	return a;
}

static int open_from(const struct contract_subject *s, const char *dir, uint64_t bytes,
		     const struct far_open_opts *opts, struct far_backend **b, void **ctx)
{
	*ctx = array_new(bytes);
	return far_backend_from(array_read, opts->read_only ? NULL : array_write, bytes, NULL, *ctx, b);
}

/* The required operations only, and a max_io that is no round number. */
/* A store with an owner of its own. */
static int open_owned(const struct contract_subject *s, const char *dir, uint64_t bytes,
		      const struct far_open_opts *opts, struct far_backend **b, void **ctx)
{
	struct far_backend *inner;
	int r = contract_open_uri(s, dir, bytes, opts, &inner, ctx);

	if (r)
		return r;
	r = far_owned_new(inner, b);
	if (r)
		far_close(inner);
	return r;
}

static int minimal_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	return len > 777 ? -EIO : array_read(self, off, buf, len);
}

static int minimal_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return len > 777 ? -EIO : array_write(self, off, buf, len);
}

static int minimal_flush(void *self)
{
	return 0;
}

static int open_minimal(const struct contract_subject *s, const char *dir, uint64_t bytes,
			const struct far_open_opts *opts, struct far_backend **b, void **ctx)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = minimal_read, .write = minimal_write, .flush = minimal_flush };
	struct far_facts facts = { .size = sizeof facts, .bytes = bytes, .max_io = 777,
				   .caps = opts->read_only ? 0 : FAR_CAP_WRITE };

	*ctx = array_new(bytes);
	return far_backend_new(&ops, *ctx, &facts, b);
}

#define URI(n, u, f, ...) { .name = n, .open = contract_open_uri, .uri = u, .flags = f, .layers = { __VA_ARGS__ } }

static const struct contract_subject builtin[] = {
	URI("mem", "mem:%s", CONTRACT_SPARSE),
	URI("mem-private", "mem:%s?private=1", CONTRACT_SPARSE | CONTRACT_BLIND),
	URI("file", "file:%d/x?size=%s", CONTRACT_SPARSE),
	URI("file-direct", "file:%d/x?size=%s&direct=1", CONTRACT_SPARSE | CONTRACT_SLOW),
	URI("dir", "dir:%d?size=%s", CONTRACT_SPARSE | CONTRACT_SLOW),
	URI("dir-odd", "dir:%d/sub?size=%s&chunk=1000&max-open=2", CONTRACT_SLOW),
	URI("null", "null:%s", CONTRACT_SPARSE | CONTRACT_FORGETS),
	{ .name = "from", .open = open_from, .close = free },
	{ .name = "minimal", .open = open_minimal, .close = free },
	{ .name = "owned", .uri = "file:%d/x?size=%s", .open = open_owned, .flags = CONTRACT_SPARSE },
	{ .name = "owned-mem", .uri = "mem:%s", .open = open_owned, .flags = CONTRACT_SPARSE },
	URI("chunked-mem", "mem:%s", CONTRACT_SPARSE, "chunked:chunk=4096"),
	URI("chunked-odd", "mem:%s", 0, "chunked:chunk=1000"),
	URI("chunked-large", "mem:%s", 0, "chunked:chunk=32M"),
	URI("chunked-1", "mem:%s", 0, "chunked:chunk=1"),
	URI("chunked-strict", "mem:%s", 0, "strict:chunk=512", "chunked"),
	URI("chunked-dir", "dir:%d?size=%s&max-open=1", CONTRACT_SLOW, "chunked"),
	URI("strict", "mem:%s", CONTRACT_SPARSE, "strict:chunk=4096"),
	URI("strict-odd", "mem:%s", 0, "strict:chunk=7"),
	URI("tracked", "mem:%s", CONTRACT_SPARSE, "tracked"),
	URI("gated", "mem:%s", CONTRACT_SPARSE, "gated"),
	URI("delay-none", "mem:%s", CONTRACT_SPARSE, "delay"),
	URI("delay", "mem:%s", CONTRACT_SLOW, "delay:rtt=100us,jitter=50us,rate=1G"),
	URI("fault-none", "mem:%s", CONTRACT_SPARSE, "fault"),
	URI("retry", "mem:%s", CONTRACT_SPARSE, "retry"),
	URI("retry-fault", "mem:%s", CONTRACT_SLOW, "fault:every=3,seed=5", "retry:backoff=50us,max-backoff=100us,budget=1000000"),
	URI("retry-late", "mem:%s", CONTRACT_SLOW, "fault:rate=0.3,errno=ECONNRESET,late",
	    "retry:backoff=50us,max-backoff=100us,budget=1000000"),
	URI("stack", "dir:%d?size=%s&chunk=512", CONTRACT_SLOW, "strict:chunk=1024", "tracked", "gated", "chunked", "retry"),
};

/* Subjects of other files. */
extern const struct contract_subject contract_grpc[], contract_managed[], contract_nbd[], contract_pointer[], contract_memory[];
static const struct contract_subject *const others[] = { contract_grpc, contract_managed, contract_nbd, contract_pointer, contract_memory };

static const struct {
	const char *name;
	void (*fn)(void **state);
} checks[] = {
	{ "zero-reads", check_zero_reads },
	{ "edges", check_edges },
	{ "model", check_model },
	{ "list-with-errors", check_list_with_errors },
	{ "overlap-and-tail", check_overlap_and_tail },
	{ "misaligned", check_misaligned },
	{ "parallel", check_parallel },
	{ "clear", check_clear },
	{ "extents", check_extents },
	{ "stop", check_stop },
	{ "stop-while-busy", check_stop_while_busy },
	{ "read-only", check_read_only },
	{ "nowait", check_nowait },
	{ "share", check_share },
	{ "sparse", check_sparse },
	{ "record", check_record },
};

#define MAX_TESTS 1000

static size_t add_tests(struct CMUnitTest *tests, size_t n, const struct contract_subject *s, const char *only)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(checks); i++) {
		char name[100];
		snprintf(name, sizeof name, "%s/%s", s->name, checks[i].name);
		if (only && !strstr(name, only))
			continue;
		assert_true(n < MAX_TESTS);
		tests[n++] = (struct CMUnitTest){ .name = strdup(name), .test_func = checks[i].fn, .initial_state = (void *)s };
	}
	return n;
}

/* contract [PART-OF-A-NAME]; CONTRACT_SEED=N replays. */
int main(int argc, char **argv)
{
	static struct CMUnitTest tests[MAX_TESTS];
	const char *only = argc > 1 ? argv[1] : NULL, *env = getenv("CONTRACT_SEED");
	size_t n = 0;

	seed = env ? strtoull(env, NULL, 0) : far_now();
	printf("CONTRACT_SEED=%" PRIu64 "\n", seed);
	fflush(stdout);
	for (size_t i = 0; i < FAR_ARRAY_LEN(builtin); i++)
		n = add_tests(tests, n, &builtin[i], only);
	for (size_t i = 0; i < FAR_ARRAY_LEN(others); i++)
		for (const struct contract_subject *o = others[i]; o->name; o++)
			n = add_tests(tests, n, o, only);
	return _cmocka_run_group_tests("contract", tests, n, NULL, NULL);
}
