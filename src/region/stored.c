/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A region whose local store is memory behind a pointer: the program reads and writes it without calling anybody. What
 * it meets that is not there comes in as a fault; what it has stored is told afterwards, by whoever found it. Telling is
 * a write whose copy has been made already, so the chunk map needs no arrows of its own for it:
 *
 *     write_begin                  the chunk cannot go away
 *     allow()                      a store that waits for it may happen now (synchronous tracking)
 *     write_end                    dirty
 *
 * A store that happens after write_end finds the page armed again by the push that read it, or is in what that push
 * reads.
 *
 * A page may be there in a chunk that is absent: it came before the rest of a fetch, which then failed. What is in it is
 * what the remote has, or was stored there; a later fetch leaves it, and if it was stored, telling makes the chunk
 * half-written.
 */
#include "region/region_int.h"

#include <string.h>

#define STORED_PAGE 4096
#define STORED_AT_ONCE (64 * FAR_KIB) /* is copied before another thread would have woken up */
#define STORED_MOST (512 * FAR_KIB)

uint64_t far_region_chunk(const struct far_region *r)
{
	return r->chunk;
}

bool far_region_hold(struct far_region *r, uint64_t off)
{
	uint64_t i = off >> r->shift;

	if (!far_chunkmap_pin(r->map, i, 1))
		return false;
	if (r->trace)
		far_trace_touch(r->trace, i, 1);
	return true;
}

void far_region_release(struct far_region *r, uint64_t off)
{
	far_chunkmap_unpin(r->map, off >> r->shift, 1);
}

/* ------------------------------------------------------------------------------------------------------------ faults */

static int stored_fetch(struct far_region *r, uint64_t off, bool (*may_block)(void *opaque), void *opaque)
{
	const struct far_facts *facts = far_facts(r->remote);
	uint64_t i = off >> r->shift, n;
	struct far_fetch *f = far_chunkmap_claim(r->map, i, 1, &n);
	int err;

	if (!f && n)
		return -ENOMEM;
	if (!f) /* somebody else fetches it, or it has come by now */
		return far_chunkmap_is_local(r->map, i) ? 0 : may_block(opaque) ? far_chunkmap_wait(r->map, i) : -EAGAIN;
	uint64_t len = far_chunkmap_len(r->map, i);
	_Alignas(64) char page[STORED_PAGE];
	bool near = !(facts->caps & FAR_CAP_REMOTE) && !facts->chunk && len > STORED_PAGE &&
		    far_read(r->remote, off, page, (size_t)far_min(sizeof page, r->bytes - off), FAR_NOWAIT) == 0;
	if (!near && !may_block(opaque)) {
		far_chunkmap_fetch_end(r->map, f, -EAGAIN);
		return -EAGAIN;
	}
	atomic_fetch_add_explicit(&r->demand_reads, 1, memory_order_relaxed);
	far_pull_demand_begin(r, len);
	far_pull_fault(r, i, 1);
	if (near)
		err = far_cache_fetch_near(r, f, i, page, off - (i << r->shift));
	else
		err = far_cache_fetch(r, f, i, 1, off, 0);
	far_pull_demand_end(r, len, err);
	return err;
}

int far_region_fault(struct far_region *r, uint64_t off, bool (*may_block)(void *opaque), void *opaque)
{
	off = off / STORED_PAGE * STORED_PAGE;
	if (atomic_load_explicit(&r->stopped, memory_order_acquire))
		return -ESHUTDOWN;
	if (r->trace)
		far_trace_touch(r->trace, off >> r->shift, 1);
	atomic_fetch_add_explicit(&r->blocked, 1, memory_order_relaxed);
	int err = stored_fetch(r, off, may_block, opaque);
	atomic_fetch_sub_explicit(&r->blocked, 1, memory_order_relaxed);
	/* Giving memory back waits for a receiver to read of it. */
	if (err >= 0 && r->o.local_max && far_chunkmap_local(r->map) > r->o.local_max && may_block(opaque))
		far_evict_trim(r);
	return err == -EAGAIN && may_block(opaque) ? 0 : err;
}

/* ------------------------------------------------------------------------------------------------------------ stores */

/* One chunk's part. -EALREADY: look again. */
static int stored_chunk(struct far_region *r, uint64_t i, uint64_t from, uint64_t to, unsigned flags,
			void (*allow)(void *opaque, uint64_t off, uint64_t len), void *opaque)
{
	unsigned ragged;
	enum far_claim claim = far_chunkmap_write_begin(r->map, i, from, to, &ragged);
	int err;

	if (claim == FAR_CLAIM_WAIT || claim == FAR_CLAIM_FETCH) {
		if (flags & FAR_NOWAIT)
			return -EAGAIN;
		err = claim == FAR_CLAIM_FETCH ? far_cache_need(r, i, 1) : far_chunkmap_wait(r->map, i);
		/* Another's fetch that failed is no error of ours: telling may not need it. */
		return err && (claim == FAR_CLAIM_FETCH || err == -ETIMEDOUT || err == -ESHUTDOWN) ? err : -EALREADY;
	}
	if (claim != FAR_CLAIM_PRESENT && !(flags & FAR_STORED_ZEROS) &&
	    !r->memory.there(r->memory.self, (i << r->shift) + from, to - from)) {
		/* It was evicted, with what the remote has in it. Whoever waits to store there will meet a missing page. */
		far_chunkmap_write_end(r->map, i, from, to, claim, ragged, false);
		return to - from > STORED_PAGE ? -EALREADY : 0; /* then page by page */
	}
	if (allow)
		allow(opaque, (i << r->shift) + from, to - from);
	if (r->trace)
		far_trace_touch(r->trace, i, 1);
	far_chunkmap_write_end(r->map, i, from, to, claim, ragged, true);
	if (claim != FAR_CLAIM_PRESENT)
		far_cache_arrived(r);
	return 0;
}

int far_region_stored(struct far_region *r, uint64_t off, uint64_t len, unsigned flags,
		      void (*allow)(void *opaque, uint64_t off, uint64_t len), void *opaque)
{
	uint64_t end = far_min(off + len, r->bytes);
	int err;

	while (off < end) {
		uint64_t i = off >> r->shift, base = i << r->shift, to = far_min(end - base, far_chunkmap_len(r->map, i));

		if (!(flags & FAR_STORED_ZEROS) && !far_chunkmap_is_local(r->map, i))
			to = far_min(to, (off - base) / STORED_PAGE * STORED_PAGE + STORED_PAGE);
		err = allow ? far_push_throttle(r, to - (off - base), flags) : 0; /* what has been stored cannot be held up */
		if (!err)
			err = stored_chunk(r, i, off - base, to, flags, allow, opaque);
		if (err == -EALREADY)
			continue;
		if (err)
			return err;
		far_push_dirtied(r);
		off = base + to;
	}
	return 0;
}
