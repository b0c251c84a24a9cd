/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "mount/aside.h"

/* The object is the inner backend itself. */
static int aside_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	return far_read(self, off, buf, len, flags);
}

static int aside_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return -ENOSPC;
}

static int aside_clear(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return -ENOSPC;
}

static int aside_flush(void *self)
{
	return 0;
}

static int aside_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	return far_extents(self, off, len, out, max, n);
}

static void aside_stop(void *self)
{
	far_stop(self);
}

static void aside_close(void *self)
{
	far_close(self);
}

int far_aside_new(struct far_backend *inner, struct far_backend **out)
{
	static const struct far_ops ops = {
		FAR_OPS_INIT,
		.read = aside_read,
		.write = aside_write,
		.flush = aside_flush,
		.discard = aside_clear,
		.zero = aside_clear,
		.extents = aside_extents,
		.stop = aside_stop,
		.close = aside_close,
	};
	struct far_facts facts = *far_facts(inner);

	facts.caps = (facts.caps | FAR_CAP_WRITE) & ~(uint32_t)FAR_CAP_SHARE;
	return far_backend_new(&ops, inner, &facts, out);
}
