/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Parts of a backend, one after the other, as one region. Not among the layers that a command can name: it is made from a
 * list. Read-only after open but for what the inner backend does; a call that touches several parts is cut at their edges.
 */
#define _GNU_SOURCE
#include "layer/layer.h"

#include <stdlib.h>
#include <string.h>

struct window_part {
	uint64_t at;  /* in the window */
	uint64_t off; /* in the inner backend */
	uint64_t len;
};

struct window {
	struct far_backend *inner;
	bool owned;
	size_t n;
	struct window_part part[];
};

/* The part that holds `at`, which lies inside the window. */
static const struct window_part *window_find(const struct window *w, uint64_t at)
{
	size_t lo = 0, hi = w->n;

	while (hi - lo > 1) {
		size_t mid = lo + (hi - lo) / 2;
		if (w->part[mid].at <= at)
			lo = mid;
		else
			hi = mid;
	}
	return &w->part[lo];
}

/* What of [at, at+len) lies in one part: its offset in the inner backend and its length. */
static uint64_t window_piece(const struct window *w, uint64_t at, uint64_t len, uint64_t *off)
{
	const struct window_part *p = window_find(w, at);

	*off = p->off + (at - p->at);
	return far_min(len, p->len - (at - p->at));
}

static int window_read(void *self, uint64_t at, void *buf, size_t len, unsigned flags)
{
	struct window *w = self;
	uint64_t off, n;
	int e = 0;

	for (char *p = buf; len && !e; p += n, at += n, len -= n) {
		n = window_piece(w, at, len, &off);
		e = far_read(w->inner, off, p, (size_t)n, flags);
	}
	return e;
}

static int window_write(void *self, uint64_t at, const void *buf, size_t len, unsigned flags)
{
	struct window *w = self;
	uint64_t off, n;
	int e = 0;

	for (const char *p = buf; len && !e; p += n, at += n, len -= n) {
		n = window_piece(w, at, len, &off);
		e = far_write(w->inner, off, p, (size_t)n, flags);
	}
	return e;
}

static int window_flush(void *self)
{
	return far_flush(((struct window *)self)->inner);
}

static int window_discard(void *self, uint64_t at, uint64_t len, unsigned flags)
{
	struct window *w = self;
	uint64_t off, n;
	int e = 0;

	for (; len && !e; at += n, len -= n) {
		n = window_piece(w, at, len, &off);
		e = far_discard(w->inner, off, n, flags);
	}
	return e;
}

static int window_zero(void *self, uint64_t at, uint64_t len, unsigned flags)
{
	struct window *w = self;
	uint64_t off, n;
	int e = 0;

	for (; len && !e; at += n, len -= n) {
		n = window_piece(w, at, len, &off);
		e = far_zero(w->inner, off, n, flags);
	}
	return e;
}

/* The cover may end early: of the first part. */
static int window_extents(void *self, uint64_t at, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct window *w = self;
	uint64_t off, piece = window_piece(w, at, len, &off);
	int e = far_extents(w->inner, off, piece, out, max, n);

	for (size_t k = 0; !e && k < *n; k++)
		out[k].off = out[k].off - off + at;
	return e;
}

static void window_stop(void *self)
{
	struct window *w = self;
	if (w->owned)
		far_stop(w->inner);
}

static void window_close(void *self)
{
	struct window *w = self;
	if (w->owned)
		far_close(w->inner);
	free(w);
}

static struct far_backend *window_inner(void *self)
{
	return ((struct window *)self)->inner;
}

static const struct far_ops window_ops = {
	FAR_OPS_INIT,
	.read = window_read,
	.write = window_write,
	.flush = window_flush,
	.discard = window_discard,
	.zero = window_zero,
	.extents = window_extents,
	.stop = window_stop,
	.close = window_close,
	.inner = window_inner,
};

/* Offsets of another region: nothing that is asked of the inner backend in offsets, and no record, may pass through. */
static int window_watch(void *self, uint64_t instance, uint64_t since, struct far_extent *out, size_t max, size_t *n, bool *all,
			struct far_origin *now)
{
	int e = far_watch(((struct window *)self)->inner, instance, since, out, max, n, all, now);

	*n = 0;
	*all = *all || (!e && now->change != since);
	return e;
}

static int window_no_record(void *self, void *buf, size_t cap, size_t *n)
{
	return -EOPNOTSUPP;
}

static int window_no_record_write(void *self, const void *buf, size_t n)
{
	return -EOPNOTSUPP;
}

int far_window_new(struct far_backend *inner, bool owned, const struct far_extent *part, size_t n, struct far_backend **out)
{
	struct far_facts facts = *far_facts(inner);
	struct far_ops ops = window_ops;
	struct window *w = calloc(1, sizeof *w + n * sizeof w->part[0]);
	bool whole = n == 1 && part[0].off == 0 && part[0].len == facts.bytes;

	if (!w)
		return -ENOMEM;
	w->inner = inner;
	w->owned = owned;
	w->n = n;
	facts.bytes = 0;
	for (size_t k = 0; k < n; k++) {
		FAR_ASSERT(part[k].len && part[k].off <= far_size(inner) && part[k].len <= far_size(inner) - part[k].off);
		w->part[k] = (struct window_part){ facts.bytes, part[k].off, part[k].len };
		facts.bytes += part[k].len;
	}
	facts.caps &= ~(unsigned)FAR_CAP_SHARE;
	if (!whole) {
		facts.identity[0] = facts.version[0] = 0;
		ops.watch = window_watch;
		ops.record_read = window_no_record;
		ops.record_write = window_no_record_write;
	}
	int e = far_backend_new(&ops, w, &facts, out);
	if (e)
		free(w);
	return e;
}
