/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Any offset and length over a backend that takes whole chunks only.
 *
 * A read passes whole chunks straight into the caller's buffer; chunks of which only a part is wanted go through a
 * scratch buffer, and small requests through one, so that they cost one inner call. A write of a part reads the chunk,
 * changes it and writes it back.
 *
 * Two writes that touch the same chunk take turns, or one would write back what the other has just changed: each
 * write claims its range, rounded out to chunks, in the order of arrival (`claims`), and runs once no earlier claim
 * overlaps. Readers claim nothing. A claim is one list entry on its caller's stack; `lock` is not held while it runs.
 */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/clock.h"
#include "base/options.h"
#include "base/pool.h"
#include "base/thread.h"

#include <stdlib.h>
#include <string.h>

#define CHUNKED_ONE_CALL FAR_MIB /* requests up to this go through one scratch buffer */

struct chunked_claim {
	uint64_t first, last; /* chunks */
	struct chunked_claim *next, **prev;
};

struct chunked {
	/* fixed after open */
	struct far_backend *inner;
	uint64_t bytes, chunk;

	struct far_mutex lock;
	struct far_cond freed;
	struct chunked_claim *claims FAR_GUARDED_BY(lock), **last FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
};

struct chunked_conf {
	uint64_t chunk;
};

static const struct far_opt chunked_options[] = {
	{ "chunk", FAR_OPT_SIZE, offsetof(struct chunked_conf, chunk), 1, 0x1p30, NULL, "SIZE",
	  "chunk to read and write below", "the chunk of what is below" },
	FAR_OPT_END,
};

static uint64_t chunked_floor(const struct chunked *c, uint64_t off)
{
	return off - off % c->chunk;
}

/* The end of the chunk that ends at or after `off`; the region's end if that comes first. */
static uint64_t chunked_ceil(const struct chunked *c, uint64_t off)
{
	uint64_t rest = off % c->chunk;
	return rest ? far_min(c->bytes, off - rest + c->chunk) : off;
}

static bool chunked_must_wait_locked(struct chunked *c, const struct chunked_claim *mine) FAR_REQUIRES(&c->lock)
{
	for (const struct chunked_claim *o = c->claims; o != mine; o = o->next)
		if (o->first <= mine->last && mine->first <= o->last)
			return true;
	return false;
}

static void chunked_unlink_locked(struct chunked *c, struct chunked_claim *cl) FAR_REQUIRES(&c->lock)
{
	*cl->prev = cl->next;
	*(cl->next ? &cl->next->prev : &c->last) = cl->prev;
	far_cond_broadcast(&c->freed);
}

static int chunked_claim(struct chunked *c, struct chunked_claim *cl, uint64_t off, uint64_t len, unsigned flags)
{
	uint64_t deadline = far_deadline();
	int r = 0;

	cl->first = off / c->chunk;
	cl->last = (off + len - 1) / c->chunk;
	cl->next = NULL;
	far_mutex_lock(&c->lock);
	cl->prev = c->last;
	*c->last = cl;
	c->last = &cl->next;
	while (!r && chunked_must_wait_locked(c, cl)) {
		if (c->stopped)
			r = -ESHUTDOWN;
		else if (flags & FAR_NOWAIT)
			r = -EAGAIN;
		else if (!far_cond_wait_until(&c->freed, &c->lock, deadline) && far_now() >= deadline)
			r = -ETIMEDOUT;
	}
	if (r)
		chunked_unlink_locked(c, cl);
	far_mutex_unlock(&c->lock);
	return r;
}

static void chunked_unclaim(struct chunked *c, struct chunked_claim *cl)
{
	far_mutex_lock(&c->lock);
	chunked_unlink_locked(c, cl);
	far_mutex_unlock(&c->lock);
}

/* Read [off, off+len), by one inner call into scratch. */
static int chunked_read_around(struct chunked *c, uint64_t off, void *buf, size_t len, unsigned flags)
{
	uint64_t from = chunked_floor(c, off), n = chunked_ceil(c, off + len) - from;
	char *scratch = far_buf_get(n);

	if (!scratch)
		return -ENOMEM;
	int r = far_read(c->inner, from, scratch, n, flags);
	if (!r)
		memcpy(buf, scratch + (off - from), len);
	far_buf_put(scratch, n);
	return r;
}

static int chunked_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct chunked *c = self;
	uint64_t end = off + len, from = chunked_floor(c, off), to = chunked_ceil(c, end);
	uint64_t a = far_min(chunked_ceil(c, off), end), z = end == to ? end : far_max(chunked_floor(c, end), a);
	char *p = buf;
	int r = 0;

	if (from == off && to == end)
		return far_read(c->inner, off, buf, len, flags);
	if (to - from <= CHUNKED_ONE_CALL || a == end)
		return chunked_read_around(c, off, buf, len, flags);
	/* [off, a) part of a chunk, [a, z) whole chunks, [z, end) part of one */
	if (a > off)
		r = chunked_read_around(c, off, p, a - off, flags);
	if (!r && z > a)
		r = far_read(c->inner, a, p + (a - off), z - a, flags);
	if (!r && end > z)
		r = chunked_read_around(c, z, p + (z - off), end - z, flags);
	return r;
}

/* Write [off, off+len) (or zeros, without buf) through scratch: only the chunks at its ends are read first. Claimed. */
static int chunked_patch(struct chunked *c, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	uint64_t end = off + len, from = chunked_floor(c, off), to = chunked_ceil(c, end);
	uint64_t head = chunked_ceil(c, from + 1), tail = chunked_floor(c, end - 1);
	char *scratch = far_buf_get(to - from);
	int r = 0;

	if (!scratch)
		return -ENOMEM;
	if (off > from || (end < to && tail == from))
		r = far_read(c->inner, from, scratch, head - from, flags);
	if (!r && end < to && tail != from)
		r = far_read(c->inner, tail, scratch + (tail - from), to - tail, flags);
	if (!r) {
		if (buf)
			memcpy(scratch + (off - from), buf, len);
		else
			memset(scratch + (off - from), 0, len);
		r = far_write(c->inner, from, scratch, to - from, flags);
	}
	far_buf_put(scratch, to - from);
	return r;
}

/* The three parts of a claimed write: part of a chunk, whole chunks, part of one. */
static int chunked_write_claimed(struct chunked *c, uint64_t off, const char *p, size_t len, unsigned flags)
{
	uint64_t end = off + len, from = chunked_floor(c, off), to = chunked_ceil(c, end);
	uint64_t a = far_min(chunked_ceil(c, off), end), z = end == to ? end : far_max(chunked_floor(c, end), a);
	int r = 0;

	if (from == off && to == end)
		return far_write(c->inner, off, p, len, flags);
	if (to - from <= CHUNKED_ONE_CALL || a == end)
		return chunked_patch(c, off, p, len, flags);
	if (a > off)
		r = chunked_patch(c, off, p, a - off, flags);
	if (!r && z > a)
		r = far_write(c->inner, a, p + (a - off), z - a, flags);
	if (!r && end > z)
		r = chunked_patch(c, z, p + (z - off), end - z, flags);
	return r;
}

static int chunked_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct chunked *c = self;
	struct chunked_claim cl;

	/* What is made of several inner calls could stop half-way, and -EAGAIN says that nothing was done. */
	if ((flags & FAR_NOWAIT) && (off % c->chunk || chunked_ceil(c, off + len) != off + len))
		return -EAGAIN;
	int r = chunked_claim(c, &cl, off, len, flags);
	if (r)
		return r;
	r = chunked_write_claimed(c, off, buf, len, flags);
	chunked_unclaim(c, &cl);
	return r;
}

static int chunked_flush(void *self)
{
	struct chunked *c = self;
	return far_flush(c->inner);
}

typedef int chunked_range_fn(struct far_backend *b, uint64_t off, uint64_t len, unsigned flags);

/* Whole chunks by the inner operation, the parts at the ends by writing zeros into them. */
static int chunked_clear(struct chunked *c, uint64_t off, uint64_t len, unsigned flags, chunked_range_fn *fn)
{
	uint64_t end = off + len, to = chunked_ceil(c, end);
	uint64_t a = far_min(chunked_ceil(c, off), end), z = end == to ? end : far_max(chunked_floor(c, end), a);
	struct chunked_claim cl;

	if ((flags & FAR_NOWAIT) && (a > off || end > z))
		return -EAGAIN;
	int r = chunked_claim(c, &cl, off, len, flags);
	if (r)
		return r;
	if (a > off)
		r = chunked_patch(c, off, NULL, a - off, flags);
	if (!r && z > a)
		r = fn(c->inner, a, z - a, flags);
	if (!r && end > z)
		r = chunked_patch(c, z, NULL, end - z, flags);
	chunked_unclaim(c, &cl);
	return r;
}

static int chunked_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return chunked_clear(self, off, len, flags, far_discard);
}

static int chunked_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return chunked_clear(self, off, len, flags, far_zero);
}

static int chunked_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct chunked *c = self;
	return far_extents(c->inner, off, len, out, max, n);
}

static int chunked_share(void *self, int *fd)
{
	struct chunked *c = self;
	return far_share(c->inner, fd);
}

static void chunked_stop(void *self)
{
	struct chunked *c = self;

	far_mutex_lock(&c->lock);
	c->stopped = true;
	far_cond_broadcast(&c->freed);
	far_mutex_unlock(&c->lock);
	far_stop(c->inner);
}

static void chunked_free(struct chunked *c)
{
	far_cond_fini(&c->freed);
	far_mutex_fini(&c->lock);
	free(c);
}

static void chunked_close(void *self)
{
	struct chunked *c = self;
	FAR_ASSERT(!c->claims);
	far_close(c->inner);
	chunked_free(c);
}
static struct far_backend *chunked_inner(void *self)
{
	struct chunked *c = self;
	return c->inner;
}


static const struct far_ops chunked_ops = {
	FAR_OPS_INIT,
	.read = chunked_read,
	.write = chunked_write,
	.flush = chunked_flush,
	.discard = chunked_discard,
	.zero = chunked_zero,
	.extents = chunked_extents,
	.share = chunked_share,
	.stop = chunked_stop,
	.close = chunked_close,
	.inner = chunked_inner,
};

static int chunked_open(const void *conf, struct far_backend *inner, struct far_backend **out, struct far_error *err)
{
	struct far_facts facts = *far_facts(inner);
	uint64_t chunk = ((const struct chunked_conf *)conf)->chunk;

	if (!chunk && !(chunk = facts.chunk))
		return far_error_set(err, EINVAL, "layer chunked: what is below takes any offset and length. Give chunk=SIZE to "
						  "use whole chunks all the same.");
	if (facts.chunk && chunk % facts.chunk)
		return far_error_set(err, EINVAL, "layer chunked: chunk=%" PRIu64 " is no multiple of the %" PRIu64
						  " bytes that what is below takes.", chunk, facts.chunk);
	struct chunked *c = calloc(1, sizeof *c);
	if (!c)
		return far_error_set(err, ENOMEM, "layer chunked: %s.", far_strerror(ENOMEM));
	c->inner = inner;
	c->bytes = facts.bytes;
	c->chunk = chunk;
	c->last = &c->claims;
	far_mutex_init(&c->lock);
	far_cond_init(&c->freed);
	facts.chunk = facts.max_io = 0;
	facts.caps &= ~(uint32_t)FAR_CAP_FLUSH; /* one write here may be three there */
	int r = far_layer_new(&far_layer_chunked, &chunked_ops, c, &facts, out, err);
	if (r)
		chunked_free(c);
	return r;
}

const struct far_layer far_layer_chunked = {
	.name = "chunked",
	.help = "any offset and length over what takes whole chunks only",
	.options = chunked_options,
	.conf_size = sizeof(struct chunked_conf),
	.open = chunked_open,
};
