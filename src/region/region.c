/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Puts a region together and takes it apart. */
#include "region/region_int.h"

#include <stdlib.h>
#include <string.h>

static int region_flush_op(void *self)
{
	return far_region_flush(self);
}

/* Zeros need no data: whole chunks are given as zeros to the local store, and pushed as such. */
static int region_zero_op(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return far_cache_zero(self, off, len, flags);
}

static void region_no_close(void *self)
{
	(void)self; /* the region owns its face, not the other way round */
}

static const struct far_ops region_ops = {
	FAR_OPS_INIT,
	.read = far_cache_read,
	.write = far_cache_write,
	.flush = region_flush_op,
	.discard = region_zero_op,
	.zero = region_zero_op,
	.close = region_no_close,
};

static int region_defaults(struct far_mount_opts *o, struct far_error *err)
{
	if (!o->chunk)
		o->chunk = 64 * FAR_KIB;
	if (o->chunk < 4 * FAR_KIB || o->chunk > 32 * FAR_MIB || (o->chunk & (o->chunk - 1)))
		return far_error_set(err, EINVAL, "a chunk of %" PRIu64 " bytes cannot be used: give a power of two from "
				     "4K to 32M", o->chunk);
	if (!o->dirty_max)
		o->dirty_max = FAR_GIB;
	if (!o->push_interval_ms)
		o->push_interval_ms = 1000;
	if (!o->deadline_ms)
		o->deadline_ms = 30000;
	if (!o->max_partial)
		o->max_partial = 65536;
	return 0;
}

static int region_face(struct far_region *r)
{
	struct far_facts facts = *far_facts(r->remote);

	facts.chunk = 0;
	facts.max_io = 0;
	facts.caps &= FAR_CAP_DURABLE;
	if (r->writable)
		facts.caps |= FAR_CAP_WRITE;
	return far_backend_new(&region_ops, r, &facts, &r->face);
}

static int region_bad(struct far_region *r)
{
	r->bad = calloc((size_t)(far_chunkmap_chunks(r->map) / 64 + 1), sizeof *r->bad);
	return r->bad ? 0 : -ENOMEM;
}

/* What the caller gave, checked. */
static int region_take(struct far_region *r, const struct far_region_conf *conf, struct far_error *err)
{
	const struct far_facts *facts = far_facts(conf->remote);

	r->o = *conf->opts;
	r->remote = conf->remote;
	r->local = conf->local;
	r->persist = conf->persist;
	if (conf->memory)
		r->memory = *conf->memory;
	r->ahead_only = conf->ahead_only;
	r->remote_borrowed = conf->remote_borrowed;
	r->bytes = facts->bytes;
	r->writable = (facts->caps & FAR_CAP_WRITE) && !r->o.read_only;
	r->local_zero = conf->local_is_zero;
	r->all_local = conf->all_local;
	r->all_local_opaque = conf->opaque;
	int e = region_defaults(&r->o, err);
	if (e)
		return e;
	if (far_size(r->local) != r->bytes)
		return far_error_set(err, EINVAL, "the local store has %" PRIu64 " bytes and the remote %" PRIu64
				     ": they must be the same", far_size(r->local), r->bytes);
	r->chunk = r->o.chunk;
	r->shift = (unsigned)__builtin_ctzll(r->chunk);
	/* A program that reads memory says nothing until it meets the next absent page. */
	r->ahead_max = far_max((r->memory.self ? 64 * FAR_MIB : 8 * FAR_MIB) >> r->shift, 4);
	return 0;
}

int far_region_open(const struct far_region_conf *conf, struct far_region **out, struct far_error *err)
{
	struct far_region *r = calloc(1, sizeof *r);
	int e;

	if (!r)
		return far_error_set(err, ENOMEM, "no memory for a region");
	e = region_take(r, conf, err);
	if (e)
		goto fail;
	e = far_chunkmap_open(&r->map, r->bytes, r->shift, r->o.max_partial);
	if (!e)
		e = far_evict_open(r);
	if (!e)
		e = region_bad(r);
	if (!e)
		e = region_face(r);
	if (e) {
		far_error_set(err, -e, "cannot set up a region of %" PRIu64 " bytes: %s", r->bytes, far_strerror(e));
		goto fail;
	}
	if (r->o.record_order) {
		e = far_trace_open(&r->trace, r->o.record_order, r->bytes, r->shift, err);
		if (e)
			goto fail;
	}
	/* Each uses those above it, and has threads from then on. */
	e = far_push_open(r);
	if (e) {
		far_error_set(err, -e, "no memory for the pusher");
		goto fail;
	}
	e = far_persist_begin(r->persist, r, err);
	if (!e)
		e = far_pull_open(r, err);
	if (e)
		goto fail;
	e = far_push_start(r);
	if (e) {
		far_error_set(err, -e, "cannot start the pusher's threads: %s", far_strerror(e));
		goto fail;
	}
	*out = r;
	return 0;
fail:
	if (r->pull)
		far_pull_stop(r);
	if (r->push)
		far_push_stop(r);
	far_region_join(r);
	far_persist_end(r->persist);
	far_pull_close(r);
	far_push_close(r);
	far_trace_close(r->trace);
	far_close(r->face);
	far_evict_close(r);
	far_chunkmap_close(r->map);
	free((void *)r->bad);
	free(r);
	return e;
}

struct far_backend *far_region_backend(struct far_region *r)
{
	return r->face;
}

int far_region_collect(struct far_region *r)
{
	return r->memory.self ? r->memory.collect(r->memory.self, r) : 0;
}

int far_region_flush(struct far_region *r)
{
	if (atomic_load_explicit(&r->fenced, memory_order_acquire))
		return -ESTALE;
	int err = r->o.before_flush ? r->o.before_flush(r->o.opaque) : 0;
	if (err)
		return err;
	if (!r->writable)
		return 0;
	err = far_region_collect(r);
	if (err)
		return err;
	far_stored_settle(r);
	if (r->o.durable == FAR_DURABLE_LOCAL)
		return r->persist ? far_persist_commit(r->persist) : far_flush(r->local);
	/* The local store is flushed beside it: persist.c, rule 5. */
	uint64_t ticket = far_persist_sync_begin(r->persist);
	err = far_push_flush(r);
	return err ? err : far_persist_sync_wait(r->persist, ticket);
}

void far_region_fence(struct far_region *r)
{
	if (!atomic_exchange_explicit(&r->fenced, true, memory_order_acq_rel))
		far_push_fence(r);
}

int far_region_push(struct far_region *r)
{
	return r->writable && r->o.durable == FAR_DURABLE_LOCAL ? far_push_flush(r) : 0;
}

int far_region_remember(struct far_region *r, const struct far_facts *facts, const struct far_origin *origin, bool fenced)
{
	return far_persist_remember(r->persist, NULL, facts, origin, fenced);
}

enum far_region_look far_region_look(struct far_region *r, uint64_t off)
{
	switch (far_chunkmap_state(r->map, off >> r->shift)) {
	case FAR_ABSENT:
	case FAR_EVICTING:
		return FAR_LOOK_ABSENT;
	case FAR_FETCHING:
	case FAR_FILLING:
		return FAR_LOOK_FETCHING;
	case FAR_CLEAN:
		return FAR_LOOK_LOCAL;
	default:
		return FAR_LOOK_DIRTY;
	}
}

void far_region_status(struct far_region *r, struct far_status *st)
{
	struct far_status s = FAR_STATUS_INIT;
	struct far_counters c = FAR_COUNTERS_INIT;
	int local = atomic_load_explicit(&r->local_error, memory_order_relaxed);

	far_counters(r->remote, &c);
	s.reconnects = c.reconnects;
	s.checksum_errors = c.checksum_errors;
	s.last_error_at = atomic_load_explicit(&r->last_error_at, memory_order_relaxed);
	s.local_errors = atomic_load_explicit(&r->local_errors, memory_order_relaxed);
	s.local_full = local == ENOSPC || local == EDQUOT;
	s.pinned = atomic_load_explicit(&r->pinned, memory_order_relaxed);
	s.persistent = r->persist != NULL;
	s.lease = atomic_load_explicit(&r->fenced, memory_order_relaxed) ? FAR_LEASE_FENCED : FAR_LEASE_NONE;
	s.mode = FAR_MODE_MANAGED;
	s.bytes = r->bytes;
	s.local = far_chunkmap_local(r->map);
	s.dirty = far_chunkmap_dirty(r->map);
	s.pulled = atomic_load_explicit(&r->pulled, memory_order_relaxed);
	s.pushed = atomic_load_explicit(&r->pushed, memory_order_relaxed);
	s.inflight = atomic_load_explicit(&r->inflight, memory_order_relaxed);
	s.demand_reads = atomic_load_explicit(&r->demand_reads, memory_order_relaxed);
	s.blocked = atomic_load_explicit(&r->blocked, memory_order_relaxed);
	s.errors = atomic_load_explicit(&r->errors, memory_order_relaxed);
	s.last_error = atomic_load_explicit(&r->last_error, memory_order_relaxed);
	far_pull_status(r, &s);
	far_push_status(r, &s);
	s.size = st->size;
	memcpy(st, &s, far_min(st->size, sizeof s));
}

void far_region_own_remote(struct far_region *r)
{
	r->remote_borrowed = false;
}

void far_region_stop(struct far_region *r)
{
	atomic_store_explicit(&r->stopped, true, memory_order_release);
	far_pull_stop(r);
	far_push_stop(r);
	far_chunkmap_stop(r->map);
	far_stop(r->face);
	if (!r->remote_borrowed)
		far_stop(r->remote);
	if (!r->persist) /* else it is still flushed */
		far_stop(r->local);
}

void far_region_join(struct far_region *r)
{
	far_pull_join(r);
	far_push_join(r);
}

void far_region_close(struct far_region *r)
{
	if (!r)
		return;
	far_region_stop(r);
	far_region_join(r);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
	far_chunkmap_check(r->map);
#endif
	far_persist_end(r->persist);
	far_persist_close(r->persist);
	far_pull_close(r);
	far_push_close(r);
	int err = far_trace_close(r->trace);
	if (err)
		far_log(FAR_LOG_WARNING, "cannot write the recorded order to %s: %s", r->o.record_order, far_strerror(err));
	far_close(r->face);
	far_evict_close(r);
	far_chunkmap_close(r->map);
	free((void *)r->bad);
	if (!r->remote_borrowed)
		far_close(r->remote);
	far_close(r->local);
	free(r);
}
