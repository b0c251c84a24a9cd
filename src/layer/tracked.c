/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Remembers which chunks were written since tracking began: one bit a chunk, no lock.
 *
 * A write sets its bits after the inner write, also a failed one, which may have changed something. Set before, a take
 * in between could hand the bit out, its owner read the old bytes, and the write would then be on nobody's list. The
 * bits are set before the write is answered; a caller that wants a last and complete take stops the writers first.
 */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/options.h"

#include <stdatomic.h>
#include <stdlib.h>

#define TRACKED_MAX_CHUNKS ((uint64_t)1 << 32)
#define TRACKED_DEFAULT_CHUNK (64 * FAR_KIB)

struct tracked {
	/* fixed after open */
	struct far_backend *inner;
	uint64_t chunk, words;
	/* atomic: release in tracked_mark(), acquire in far_tracked_take(), so that who takes a bit sees the write */
	_Atomic uint64_t *bits;
	_Atomic bool on; /* release in far_tracked_start(), acquire in tracked_mark() */
};

struct tracked_conf {
	uint64_t chunk;
};

static const struct far_opt tracked_options[] = {
	{ "chunk", FAR_OPT_SIZE, offsetof(struct tracked_conf, chunk), 1, 0x1p30, NULL, "SIZE", "unit of the list",
	  "the chunk of what is below, or 64K" },
	FAR_OPT_END,
};

static void tracked_mark(struct tracked *t, uint64_t off, uint64_t len)
{
	if (!atomic_load_explicit(&t->on, memory_order_acquire))
		return;
	for (uint64_t i = off / t->chunk, last = (off + len - 1) / t->chunk; i <= last;) {
		uint64_t to = far_min(last, i | 63), n = to - i + 1;
		uint64_t mask = (n == 64 ? UINT64_MAX : ((uint64_t)1 << n) - 1) << (i % 64);
		atomic_fetch_or_explicit(&t->bits[i / 64], mask, memory_order_release);
		i = to + 1;
	}
}

static int tracked_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct tracked *t = self;
	return far_read(t->inner, off, buf, len, flags);
}

static int tracked_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct tracked *t = self;
	int r = far_write(t->inner, off, buf, len, flags);
	if (r != -EAGAIN)
		tracked_mark(t, off, len);
	return r;
}

static int tracked_flush(void *self)
{
	struct tracked *t = self;
	return far_flush(t->inner);
}

static int tracked_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct tracked *t = self;
	int r = far_discard(t->inner, off, len, flags);
	if (r != -EAGAIN)
		tracked_mark(t, off, len);
	return r;
}

static int tracked_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct tracked *t = self;
	int r = far_zero(t->inner, off, len, flags);
	if (r != -EAGAIN)
		tracked_mark(t, off, len);
	return r;
}

static int tracked_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct tracked *t = self;
	return far_extents(t->inner, off, len, out, max, n);
}

static void tracked_stop(void *self)
{
	struct tracked *t = self;
	far_stop(t->inner);
}

static void tracked_close(void *self)
{
	struct tracked *t = self;
	far_close(t->inner);
	free((void *)t->bits);
	free(t);
}

static struct far_backend *tracked_inner(void *self)
{
	struct tracked *t = self;
	return t->inner;
}

/* No share: a store through a mapping would go unseen. */
static const struct far_ops tracked_ops = {
	FAR_OPS_INIT,
	.read = tracked_read,
	.write = tracked_write,
	.flush = tracked_flush,
	.discard = tracked_discard,
	.zero = tracked_zero,
	.extents = tracked_extents,
	.stop = tracked_stop,
	.close = tracked_close,
	.inner = tracked_inner,
};

void far_tracked_start(struct far_backend *b)
{
	struct tracked *t = far_backend_self(b, tracked_read);
	atomic_store_explicit(&t->on, true, memory_order_release);
}

struct tracked_list {
	uint64_t *v;
	size_t n, max;
};

static int tracked_append(struct tracked_list *l, uint64_t off)
{
	if (l->n == l->max) {
		size_t max = l->max ? l->max * 2 : 64;
		uint64_t *v = reallocarray(l->v, max, sizeof *v);
		if (!v)
			return -ENOMEM;
		l->v = v;
		l->max = max;
	}
	l->v[l->n++] = off;
	return 0;
}

int far_tracked_take(struct far_backend *b, bool go_on, uint64_t **offsets, size_t *n)
{
	struct tracked *t = far_backend_self(b, tracked_read);
	struct tracked_list l = { 0 };

	if (!go_on)
		atomic_store_explicit(&t->on, false, memory_order_release);
	for (uint64_t w = 0; w < t->words; w++) {
		if (!atomic_load_explicit(&t->bits[w], memory_order_relaxed))
			continue;
		uint64_t word = atomic_exchange_explicit(&t->bits[w], 0, memory_order_acquire);
		for (; word; word &= word - 1)
			if (tracked_append(&l, (w * 64 + (uint64_t)__builtin_ctzll(word)) * t->chunk))
				goto put_back;
		continue;
put_back: /* nothing may be lost: what was taken is marked again */
		atomic_fetch_or_explicit(&t->bits[w], word, memory_order_release);
		while (l.n--)
			atomic_fetch_or_explicit(&t->bits[l.v[l.n] / t->chunk / 64],
						 (uint64_t)1 << (l.v[l.n] / t->chunk % 64), memory_order_release);
		free(l.v);
		return -ENOMEM;
	}
	*offsets = l.v;
	*n = l.n;
	return 0;
}

static int tracked_open(const void *conf, struct far_backend *inner, struct far_backend **out, struct far_error *err)
{
	struct far_facts facts = *far_facts(inner);
	uint64_t chunk = ((const struct tracked_conf *)conf)->chunk;

	if (!chunk)
		chunk = facts.chunk ? facts.chunk : TRACKED_DEFAULT_CHUNK;
	if (far_div_up(facts.bytes, chunk) > TRACKED_MAX_CHUNKS)
		return far_error_set(err, EFBIG, "layer tracked: %" PRIu64 " bytes are too many chunks of %" PRIu64
						 ". Give a larger chunk=SIZE.", facts.bytes, chunk);
	struct tracked *t = calloc(1, sizeof *t);
	if (!t)
		return far_error_set(err, ENOMEM, "layer tracked: %s.", far_strerror(ENOMEM));
	t->inner = inner;
	t->chunk = chunk;
	t->words = far_div_up(far_div_up(facts.bytes, chunk), 64);
	t->bits = calloc(far_max(t->words, 1), sizeof *t->bits);
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	int r = t->bits ? far_layer_new(&far_layer_tracked, &tracked_ops, t, &facts, out, err) :
			  far_error_set(err, ENOMEM, "layer tracked: %s.", far_strerror(ENOMEM));
	if (r) {
		free((void *)t->bits);
		free(t);
	}
	return r;
}

const struct far_layer far_layer_tracked = {
	.name = "tracked",
	.help = "remember which chunks are written",
	.options = tracked_options,
	.conf_size = sizeof(struct tracked_conf),
	.open = tracked_open,
};
