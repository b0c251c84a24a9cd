/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A mount whose frontend is a pointer. Without a local store of its own the pointer's region is the only one:
 *
 *     program -> memory = local store of the pointer's region -> the stack that mount.c built
 *
 * With one there are two, each with a chunk map, a puller and a pusher. The outer one is bounded by local_max and may give
 * its chunks back at any time; what lasts, and who may write, is the inner one's business:
 *
 *     program -> memory = local store of the outer region -> the inner region's face -> local store, and the stack
 */
#define _GNU_SOURCE
#include "mount/mount_int.h"

struct far_region *far_mnt_top(struct far_mnt *m)
{
	return m->pointer ? far_pointer_region(m->pointer) : m->region;
}

void far_mnt_pointer_inner(const struct far_mnt *m, struct far_mount_opts *o)
{
	*o = m->o;
	o->local_max = 0;
	o->pull_first = 0;
	o->record_order = NULL;
	o->before_flush = NULL;
	o->before_close = NULL;
	o->chunk_local = NULL;
	o->progress = NULL;
}

int far_mnt_pointer_open(struct far_mnt *m, struct far_error *err)
{
	struct far_mount_opts o = m->o;
	struct far_pointer_conf pc = {
		.below = m->region ? far_region_backend(m->region) : m->remote,
		.borrowed = m->region != NULL,
		.source = m->source,
		.writable = m->writable,
		.managed = m->mode == FAR_MODE_MANAGED,
		.opts = &o,
		.given = m->given,
	};

	if (m->region) /* what is durable locally is so in the local store, to which a flush must come */
		o.durable = FAR_DURABLE_REMOTE;
	return far_pointer_open(&pc, &m->pointer, err);
}

int far_mnt_pointer_flush(struct far_mnt *m)
{
	return far_pointer_flush(m->pointer);
}

int far_mnt_pointer_wait_percent(struct far_mnt *m, uint64_t bytes)
{
	/* What is in the local store is here; it is that store which is filled in the background. */
	struct far_region *r = m->region ? m->region : far_pointer_region(m->pointer);

	if (!r)
		return 0;
	return m->mode == FAR_MODE_MANAGED ? far_region_wait_local(r, bytes) : -EOPNOTSUPP;
}

/* What goes to and from the remote is the inner region's to tell, what is in memory the pointer's. */
void far_mnt_pointer_status(struct far_mnt *m, struct far_status *st)
{
	struct far_status in = FAR_STATUS_INIT;

	far_pointer_status(m->pointer, st);
	st->mode = m->mode;
	st->bytes = m->bytes;
	if (!m->region)
		return;
	far_region_status(m->region, &in);
	st->local = far_max(in.local, st->local);
	st->dirty = far_min(in.dirty + st->dirty, m->bytes);
	st->oldest_dirty_ms = far_max(in.oldest_dirty_ms, st->oldest_dirty_ms);
	st->pulled = in.pulled;
	st->pushed = in.pushed;
	st->inflight = in.inflight;
	st->demand_reads = in.demand_reads;
	st->errors = in.errors;
	st->last_error = in.last_error;
	st->last_error_at = in.last_error_at;
	st->pull_rate = in.pull_rate;
	st->push_rate = in.push_rate;
	st->window = in.window;
	st->local_errors += in.local_errors;
	st->local_full |= in.local_full;
}

uint64_t far_mnt_bytes(const struct far_mnt *m)
{
	return m->bytes;
}

void *far_mnt_addr(const struct far_mnt *m)
{
	return m->pointer ? far_pointer_addr(m->pointer) : NULL;
}

int far_mnt_populate(struct far_mnt *m, uint64_t off, uint64_t len)
{
	return m->pointer ? far_pointer_populate(m->pointer, off, len) : -EOPNOTSUPP;
}

int far_mnt_discard(struct far_mnt *m, uint64_t off, uint64_t len)
{
	if (!m->pointer)
		return -EOPNOTSUPP;
	return m->writable ? far_pointer_discard(m->pointer, off, len) : -EROFS;
}

int far_mnt_heal(struct far_mnt *m, uint64_t off, uint64_t len)
{
	return m->pointer ? far_pointer_heal(m->pointer, off, len) : -EOPNOTSUPP;
}

int far_mnt_stored(struct far_mnt *m, uint64_t off, uint64_t len)
{
	if (!m->pointer)
		return -EOPNOTSUPP;
	return m->writable ? far_pointer_stored(m->pointer, off, len) : -EROFS;
}
