/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Refuses what is not whole aligned chunks. The dispatcher does the refusing: the layer only says so in its facts. */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/options.h"

struct strict_conf {
	uint64_t chunk;
};

static const struct far_opt strict_options[] = {
	{ "chunk", FAR_OPT_SIZE, offsetof(struct strict_conf, chunk), 1, 0x1p30, NULL, "SIZE",
	  "take whole aligned chunks of this size only" },
	FAR_OPT_END,
};

static int strict_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	return far_read(self, off, buf, len, flags);
}

static int strict_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return far_write(self, off, buf, len, flags);
}

static int strict_flush(void *self)
{
	return far_flush(self);
}

static int strict_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return far_discard(self, off, len, flags);
}

static int strict_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return far_zero(self, off, len, flags);
}

static int strict_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	return far_extents(self, off, len, out, max, n);
}

static void strict_stop(void *self)
{
	far_stop(self);
}

static void strict_close(void *self)
{
	far_close(self);
}

static struct far_backend *strict_inner(void *self)
{
	return self;
}

/* The object is the inner backend itself. No share: a mapping asks nobody about chunks. */
static const struct far_ops strict_ops = {
	FAR_OPS_INIT,
	.read = strict_read,
	.write = strict_write,
	.flush = strict_flush,
	.discard = strict_discard,
	.zero = strict_zero,
	.extents = strict_extents,
	.stop = strict_stop,
	.close = strict_close,
	.inner = strict_inner,
};

static int strict_open(const void *conf, struct far_backend *inner, struct far_backend **out, struct far_error *err)
{
	struct far_facts facts = *far_facts(inner);
	uint64_t chunk = ((const struct strict_conf *)conf)->chunk;

	if (!chunk)
		return far_error_set(err, EINVAL, "layer strict: give chunk=SIZE.");
	if (facts.chunk && chunk % facts.chunk)
		return far_error_set(err, EINVAL, "layer strict: chunk=%" PRIu64 " is no multiple of the %" PRIu64
						  " bytes that what is below takes.", chunk, facts.chunk);
	facts.chunk = chunk;
	facts.max_io = 0; /* what is below cuts for itself */
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	return far_layer_new(&far_layer_strict, &strict_ops, inner, &facts, out, err);
}

const struct far_layer far_layer_strict = {
	.name = "strict",
	.help = "refuse what is not whole aligned chunks",
	.options = strict_options,
	.conf_size = sizeof(struct strict_conf),
	.open = strict_open,
};
