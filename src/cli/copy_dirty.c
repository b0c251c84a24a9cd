/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "cli/copy_dirty.h"

#include "mount/kept.h"

#include <stdlib.h>

#define DIRTY_PIECE (2 * FAR_MIB)

struct copy_dirty {
	struct far_persist *map;
	struct far_backend *local, *dst;
	char *buf;
	uint64_t done, at;
	bool writing;
};

int copy_dirty_open(const char *src, struct copy_dirty **out, struct far_error *err)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct copy_dirty *d = calloc(1, sizeof *d);
	char *local = NULL;
	int r = 0;

	opts.read_only = true;
	if (!d || !(d->buf = malloc(DIRTY_PIECE)))
		r = far_error_set(err, ENOMEM, "cannot copy %s: no memory", src);
	if (!r)
		r = far_kept_find(src, FAR_PERSIST_WRITABLE, &local, &d->map, err);
	if (!r && far_persist_is_new(d->map))
		r = far_error_set(err, ENOENT, "cannot copy what is unsaved in %s: it has no chunk map %s", src,
				  far_persist_path(d->map));
	if (!r)
		r = far_kept_check_store(local, d->map, err);
	if (!r)
		r = far_open(local, &opts, &d->local, err);
	if (!r && far_size(d->local) != far_persist_info(d->map)->bytes)
		r = far_error_set(err, EINVAL, "%s is not the local store of %s: their sizes differ", src, far_persist_path(d->map));
	free(local);
	if (r) {
		copy_dirty_close(d);
		return r;
	}
	*out = d;
	return 0;
}

uint64_t copy_dirty_size(const struct copy_dirty *d)
{
	return far_size(d->local);
}

static int copy_dirty_range_cb(void *opaque, uint64_t off, uint64_t len)
{
	struct copy_dirty *d = opaque;

	while (len) {
		size_t n = (size_t)far_min(len, DIRTY_PIECE);
		d->at = off;
		d->writing = false;
		int r = far_read(d->local, off, d->buf, n, FAR_BULK);
		if (!r) {
			d->writing = true;
			r = far_write(d->dst, off, d->buf, n, FAR_BULK);
		}
		if (r)
			return r;
		d->done += n;
		off += n;
		len -= n;
	}
	return 0;
}

int copy_dirty_go(struct copy_dirty *d, struct far_backend *dst, uint64_t *done, uint64_t *at, bool *writing)
{
	d->dst = dst;
	int r = far_persist_each_dirty(d->map, copy_dirty_range_cb, d);
	*done = d->done;
	*at = d->at;
	*writing = d->writing;
	return r;
}

void copy_dirty_close(struct copy_dirty *d)
{
	if (!d)
		return;
	far_close(d->local);
	far_persist_close(d->map);
	free(d->buf);
	free(d);
}
