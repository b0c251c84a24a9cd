/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "region/order.h"

#include "base/options.h"
#include "base/thread.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ORDER_TRACE_HEAD "farpage-trace 1\n"
#define ORDER_GROUP_MAX 1024 /* runs of a trace that are pulled by place, not by time */

static int order_add(struct far_order *o, uint64_t first, uint64_t n)
{
	if (!n)
		return 0;
	if (o->n && o->run[o->n - 1].first + o->run[o->n - 1].n == first) {
		o->run[o->n - 1].n += n;
		return 0;
	}
	if ((o->n & (o->n - 1)) == 0) { /* grow at powers of two */
		struct far_order_run *r = reallocarray(o->run, o->n ? 2 * o->n : 1, sizeof *r);
		if (!r)
			return -ENOMEM;
		o->run = r;
	}
	o->run[o->n++] = (struct far_order_run){ first, n };
	return 0;
}

int far_ranges_parse(const char *text, uint64_t bytes, int (*fn)(void *opaque, uint64_t off, uint64_t len), void *opaque,
		     struct far_error *err)
{
	const char *p = text;

	do {
		size_t len = strcspn(p, ",");
		char item[64], *dash;
		uint64_t from = 0, to = bytes; /* either end may be left open */

		if (len == 0 || len >= sizeof item)
			return far_error_set(err, EINVAL, "'%s' is not a list of ranges: write FROM-TO,FROM-TO with "
					     "sizes, such as 0-1M,900M-", text);
		memcpy(item, p, len);
		item[len] = 0;
		dash = strchr(item, '-');
		if (dash)
			*dash++ = 0;
		if (!dash || (*item && far_parse_size(item, &from)) || (*dash && far_parse_size(dash, &to)) || from > to)
			return far_error_set(err, EINVAL, "'%.*s' is not a range: write FROM-TO with sizes, such as "
					     "0-1M or 900M-", (int)len, p);
		from = far_min(from, bytes);
		to = far_min(to, bytes);
		int r = fn(opaque, from, to - from);
		if (r)
			return far_error_set(err, -r, "cannot use the range '%.*s': %s", (int)len, p, far_strerror(r));
		p += len;
	} while (*p++ == ',');
	return 0;
}

struct order_build {
	struct far_order *o;
	unsigned shift;
};

static int order_range(void *opaque, uint64_t off, uint64_t len)
{
	struct order_build *b = opaque;
	uint64_t first = off >> b->shift;
	return len ? order_add(b->o, first, ((off + len - 1) >> b->shift) - first + 1) : 0;
}

static int order_trace_line(struct order_build *b, const char *line, uint64_t bytes, unsigned long number, const char *path,
			    struct far_error *err)
{
	uint64_t off, len;
	char rest;

	/* A first line in the middle: traces were merged by writing one behind the other. */
	if (line[0] == '#' || line[0] == '\n' || !strcmp(line, ORDER_TRACE_HEAD))
		return 0;
	if (sscanf(line, "%" SCNu64 " %" SCNu64 " %c", &off, &len, &rest) != 2)
		return far_error_set(err, EINVAL, "%s line %lu is not 'OFFSET LENGTH'", path, number);
	if (off < bytes && len && order_range(b, off, far_min(len, bytes - off))) /* a longer region's is fine */
		return far_error_set(err, ENOMEM, "no memory for the pull order");
	return 0;
}

static int order_trace_read(struct order_build *b, const char *path, uint64_t bytes, struct far_error *err)
{
	FILE *f = fopen(path, "re");
	char line[128];
	unsigned long number = 1;
	int r = 0;

	if (!f)
		return far_error_set(err, errno, "cannot read the trace %s: %s", path, far_strerror(errno));
	if (!fgets(line, sizeof line, f) || strcmp(line, ORDER_TRACE_HEAD) != 0)
		r = far_error_set(err, EINVAL, "%s is not a trace of this version: its first line must be "
				  "'farpage-trace 1'", path);
	while (!r && fgets(line, sizeof line, f))
		r = order_trace_line(b, line, bytes, ++number, path, err);
	fclose(f);
	return r;
}

static int order_by_place(const void *a, const void *b)
{
	const struct far_order_run *x = a, *y = b;
	return x->first < y->first ? -1 : x->first > y->first;
}

/* Sort the runs and add them, joined across gaps of one chunk: that costs less than another call. */
static int order_join(struct far_order *o, struct far_order_run *run, size_t n)
{
	int r = 0;

	qsort(run, n, sizeof *run, order_by_place);
	for (size_t i = 0; i < n && !r;) {
		uint64_t first = run[i].first, end = first;
		for (; i < n && (end == first || run[i].first <= end + 1); i++)
			end = far_max(end, run[i].first + run[i].n);
		r = order_add(o, first, end - first);
	}
	return r;
}

/* Touches of one run of a program are in the order of time, which is any order in the region, one call a chunk. What was
 * touched soon after one another is needed soon after one another, so it may be fetched by place: in groups that grow,
 * because the first touches are the ones that somebody waits for already. */
static int order_trace(struct order_build *b, const char *path, uint64_t bytes, struct far_error *err)
{
	struct far_order raw = { 0 };
	struct order_build read = { &raw, b->shift };
	int r = order_trace_read(&read, path, bytes, err), e = 0;
	size_t group = 1;

	for (size_t at = 0; !r && !e && at < raw.n; at += group, group = far_min(2 * group, ORDER_GROUP_MAX))
		e = order_join(b->o, raw.run + at, far_min(group, raw.n - at));
	if (e)
		r = far_error_set(err, ENOMEM, "no memory for the pull order");
	far_order_fini(&raw);
	return r;
}

/* A film's index (the moov box) lies at its start or, more often, at its end; its length grows with the film's. */
static int order_mp4(struct order_build *b, uint64_t bytes)
{
	uint64_t head = far_min(bytes, FAR_MIB), tail = far_min(bytes, far_max(2 * FAR_MIB, bytes / 256));
	int r = order_range(b, 0, head);
	return r ? r : order_range(b, bytes - tail, tail);
}

int far_order_parse(struct far_order *o, const char *text, uint64_t bytes, unsigned shift, struct far_error *err)
{
	struct order_build b = { o, shift };
	int r = 0;

	*o = (struct far_order){ 0 };
	if (text && strncmp(text, "ranges:", 7) == 0)
		r = far_ranges_parse(text + 7, bytes, order_range, &b, err);
	else if (text && strncmp(text, "trace:", 6) == 0)
		r = order_trace(&b, text + 6, bytes, err);
	else if (text && strcmp(text, "hint:mp4") == 0)
		r = order_mp4(&b, bytes) ? far_error_set(err, ENOMEM, "no memory for the pull order") : 0;
	else if (text && strcmp(text, "sequential") != 0)
		r = far_error_set(err, EINVAL, "'%s' is not an order: use sequential, ranges:FROM-TO,..., trace:FILE or "
				  "hint:mp4", text);
	if (!r && order_add(o, 0, far_div_up(bytes, (uint64_t)1 << shift)))
		r = far_error_set(err, ENOMEM, "no memory for the pull order");
	if (r)
		far_order_fini(o);
	return r;
}

struct order_key {
	int64_t priority;
	uint64_t chunk;
};

static int order_compare(const void *a, const void *b)
{
	const struct order_key *x = a, *y = b;
	if (x->priority != y->priority)
		return x->priority > y->priority ? -1 : 1;
	return x->chunk < y->chunk ? -1 : x->chunk > y->chunk;
}

int far_order_by(struct far_order *o, int64_t (*priority)(void *opaque, uint64_t off), void *opaque, uint64_t bytes,
		 unsigned shift)
{
	uint64_t chunks = far_div_up(bytes, (uint64_t)1 << shift);
	struct order_key *key = calloc((size_t)chunks + 1, sizeof *key);
	int r = 0;

	*o = (struct far_order){ 0 };
	if (!key)
		return -ENOMEM;
	for (uint64_t i = 0; i < chunks; i++)
		key[i] = (struct order_key){ priority(opaque, i << shift), i };
	qsort(key, (size_t)chunks, sizeof *key, order_compare);
	for (uint64_t i = 0; i < chunks && !r; i++)
		r = order_add(o, key[i].chunk, 1);
	free(key);
	if (r)
		far_order_fini(o);
	return r;
}

void far_order_fini(struct far_order *o)
{
	free(o->run);
	*o = (struct far_order){ 0 };
}

/* ------------------------------------------------------------------------------------------------------ recording */

struct far_trace {
	char *path;
	uint64_t bytes;
	unsigned shift;
	_Atomic uint64_t *seen;
	struct far_mutex lock;
	struct far_order order FAR_GUARDED_BY(lock);
	bool full FAR_GUARDED_BY(lock); /* no memory: what is there is kept */
};

int far_trace_open(struct far_trace **out, const char *path, uint64_t bytes, unsigned shift, struct far_error *err)
{
	struct far_trace *t = calloc(1, sizeof *t);
	FILE *f = fopen(path, "ae"); /* found out now, not at the end of a long run */

	if (!f) {
		free(t);
		return far_error_set(err, errno, "cannot write the trace %s: %s", path, far_strerror(errno));
	}
	fclose(f);
	if (t) {
		t->path = strdup(path);
		t->seen = calloc((size_t)(bytes >> shift) / 64 + 2, sizeof *t->seen);
	}
	if (!t || !t->path || !t->seen) {
		if (t) {
			free(t->path);
			free((void *)t->seen);
		}
		free(t);
		return far_error_set(err, ENOMEM, "no memory to record a trace");
	}
	t->bytes = bytes;
	t->shift = shift;
	far_mutex_init(&t->lock);
	*out = t;
	return 0;
}

void far_trace_touch(struct far_trace *t, uint64_t chunk, uint64_t n)
{
	for (uint64_t i = chunk; i < chunk + n; i++) {
		uint64_t bit = (uint64_t)1 << (i % 64);
		if (atomic_load_explicit(&t->seen[i / 64], memory_order_relaxed) & bit)
			continue;
		if (atomic_fetch_or_explicit(&t->seen[i / 64], bit, memory_order_relaxed) & bit)
			continue;
		far_mutex_lock(&t->lock);
		t->full = t->full || order_add(&t->order, i, 1);
		far_mutex_unlock(&t->lock);
	}
}

int far_trace_close(struct far_trace *t) FAR_NO_TSA
{
	int r = 0;

	if (!t)
		return 0;
	FILE *f = fopen(t->path, "we");
	if (f) {
		fputs(ORDER_TRACE_HEAD, f);
		for (size_t i = 0; i < t->order.n; i++) {
			uint64_t off = t->order.run[i].first << t->shift;
			fprintf(f, "%" PRIu64 " %" PRIu64 "\n", off,
				far_min(t->order.run[i].n << t->shift, t->bytes - off));
		}
		r = ferror(f) ? -EIO : 0;
		if (fclose(f) && !r)
			r = -errno;
	} else {
		r = -errno;
	}
	far_order_fini(&t->order);
	far_mutex_fini(&t->lock);
	free(t->path);
	free((void *)t->seen);
	free(t);
	return r;
}
