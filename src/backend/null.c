/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Reads zeros, forgets writes: the far end of a measurement, or of a copy that only checks that it can be read. */
#define _GNU_SOURCE
#include "backend/backend.h"

#include "base/options.h"
#include "base/uri.h"

#include <string.h>

static int null_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	memset(buf, 0, len);
	return 0;
}

static int null_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return 0;
}

static int null_flush(void *self)
{
	return 0;
}

static int null_clear(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return 0;
}

static int null_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	out[0] = (struct far_extent){ off, len, FAR_EXTENT_ZERO };
	*n = 1;
	return 0;
}

static const struct far_ops null_ops = {
	FAR_OPS_INIT,
	.read = null_read,
	.write = null_write,
	.flush = null_flush,
	.discard = null_clear,
	.zero = null_clear,
	.extents = null_extents,
};

int far_null_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out,
		  struct far_error *err)
{
	static const struct far_opt none[] = { FAR_OPT_END };
	struct far_facts facts = { .size = sizeof facts, .bytes = FAR_SIZE_MAX, .caps = FAR_CAP_WRITE };

	int r = far_opt_parse(none, NULL, u->text, u->query, '&', true, err);
	if (r)
		return r;
	if (u->authority || (*u->path && (far_parse_size(u->path, &facts.bytes) || facts.bytes > FAR_SIZE_MAX)))
		return far_error_set(err, EINVAL, "cannot open '%.100s': write null: or null:SIZE.", u->text);
	r = far_backend_new(&null_ops, NULL, &facts, out);
	return r ? far_error_set(err, -r, "cannot open '%.100s': %s.", u->text, far_strerror(r)) : 0;
}
