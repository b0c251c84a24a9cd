/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What a chunk map's file says, for who has no region open: info, check, copy --dirty. */
#include "region/persist_int.h"

#include "region/partial.h"

#include <stdlib.h>

enum far_persist_kind far_persist_chunk(struct far_persist *p, uint64_t i)
{
	struct farmap_segment *g = &p->seg[i / FARMAP_CHUNKS];
	enum far_persist_kind kind = farmap_kind(g, i % FARMAP_CHUNKS);

	return kind == FAR_PERSIST_CLEAN && farmap_marked(g, i % FARMAP_CHUNKS) ? FAR_PERSIST_DIRTY : kind;
}

/* What of half-written chunks is here, by chunk; the table is small beside the rest. */
static int partial_each_range(struct far_persist *p, uint64_t i, int (*fn)(void *opaque, uint64_t off, uint64_t len),
			      void *opaque)
{
	struct far_partial *e;
	uint64_t len = farmap_len(p, i);
	size_t at = 0;
	int err;

	while ((e = farmap_get_partial(p, &at, &err))) {
		uint64_t from = 0, a = 0, b = 0;
		bool mine = e->chunk == i;
		while (mine && !err && from < len) {
			a = from;
			if (!far_partial_missing(e, &a, &b))
				a = b = len;
			if (a > from)
				err = fn(opaque, i * p->info.chunk + from, a - from);
			from = b;
		}
		free(e);
		if (err || mine)
			return err;
	}
	return err;
}

int far_persist_each_dirty(struct far_persist *p, int (*fn)(void *opaque, uint64_t off, uint64_t len), void *opaque)
{
	uint64_t from = 0, run = 0;
	int err = 0;

	for (uint64_t i = 0; !err && i <= p->chunks; i++) {
		enum far_persist_kind kind = FAR_PERSIST_ABSENT;
		if (i < p->chunks)
			kind = far_persist_chunk(p, i);
		if (kind == FAR_PERSIST_DIRTY && !run)
			from = i * p->info.chunk;
		if (kind == FAR_PERSIST_DIRTY) {
			run += farmap_len(p, i);
			continue;
		}
		if (run)
			err = fn(opaque, from, run);
		run = 0;
		if (!err && kind == FAR_PERSIST_PARTIAL)
			err = partial_each_range(p, i, fn, opaque);
	}
	return err;
}

int far_persist_verify(struct far_persist *p, uint64_t i, const void *buf, size_t len)
{
	struct farmap_sum want, is;
	int err = farmap_read_sum(p, i, &want);

	if (err)
		return err;
	is = farmap_sum_of(buf, len);
	return is.lo == want.lo && is.hi == want.hi ? 0 : -EBADMSG;
}
