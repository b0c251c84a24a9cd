/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A region whose local store is memory behind a pointer: the program reads and writes it without calling anybody. What
 * it meets that is not there comes in as a fault; what it has stored is told afterwards, by whoever found it. Telling is
 * a write whose copy has been made already, so the chunk map needs no arrows of its own for it:
 *
 *     write_begin                  the chunk cannot go away
 *     allow()                      a store that waits for it may happen now (synchronous tracking)
 *     write_end                    dirty; a flush that begins in between waits for this (far_stored_settle())
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

int far_region_alone(struct far_region *r, uint64_t off, int (*fn)(void *opaque), void *opaque)
{
	uint64_t n;
	struct far_fetch *f = far_chunkmap_claim(r->map, off >> r->shift, 1, &n);

	if (!f)
		return n ? -ENOMEM : -EAGAIN;
	int err = fn(opaque);
	far_chunkmap_fetch_end(r->map, f, -EAGAIN); /* who waits for it looks again */
	return err == -EAGAIN ? -EIO : err;
}

/* ------------------------------------------------------------------------------------------------------------ faults */

/*
 * How many chunks the fault at chunk i should bring: one where the program jumps, twice as many each time where it goes
 * forward, that is where everything between the last fault and this one is local. What threads make of the two counters
 * together is a guess, as all of this is.
 */
static uint64_t stored_extent(struct far_region *r, uint64_t i)
{
	uint64_t last = atomic_exchange_explicit(&r->last_fault, i, memory_order_relaxed), run = 0;

	if (i > last && i - last <= r->ahead_max) {
		uint64_t at = last + 1;
		while (at < i && far_chunkmap_is_local(r->map, at))
			at++;
		run = at < i ? 0 : far_min(atomic_load_explicit(&r->fault_run, memory_order_relaxed) + 1, 9);
	}
	atomic_store_explicit(&r->fault_run, run, memory_order_relaxed);
	uint64_t most = (r->memory.stage ? FAR_STAGE : STORED_MOST) >> r->shift;
	return far_max(1, far_min((uint64_t)1 << run, most));
}

static void stored_count(struct far_region *r, uint64_t i, uint64_t n, uint64_t len)
{
	atomic_fetch_add_explicit(&r->demand_reads, 1, memory_order_relaxed);
	far_pull_demand_begin(r, len);
	far_pull_fault(r, i, n);
}

/*
 * Chunk i is claimed, and the remote has it at hand: the page that is waited for first, then this CPU for who waits for it,
 * then all bookkeeping and the rest; from the seat if that is little. The page appears when the chunk is FILLING already: a
 * discard of it waits for the whole, so nothing older can come over it. 1: the page is there.
 */
static int stored_fetch_page(struct far_region *r, struct far_fetch *f, uint64_t off, const char *page,
			     bool (*may_block)(void *opaque), void *opaque)
{
	uint64_t i = off >> r->shift, base = i << r->shift, len = far_chunkmap_len(r->map, i);
	struct far_partial *e;

	far_chunkmap_fill_begin(r->map, f, &e);
	/* Of a half-written chunk only the gaps may be filled: a missing page may be one that was made zero here. */
	int err = e ? 0 : far_write(r->local, off, page, (size_t)far_min(STORED_PAGE, base + len - off), FAR_FILL);
	bool shown = !e && !err;
	if (shown)
		far_thread_yield();
	stored_count(r, i, 1, len);
	if (len > STORED_AT_ONCE)
		may_block(opaque); /* if it may not, the seat waits for some copying */
	err = far_cache_fill_near(r, f, i, e, err);
	far_pull_demand_end(r, len, err);
	return shown ? 1 : err; /* if the rest did not come, whoever touches it asks again */
}

/* The claim on n chunks is carried out. */
static int stored_carry_out(struct far_region *r, struct far_fetch *f, uint64_t n, uint64_t off, const char *page,
			    bool (*may_block)(void *opaque), void *opaque)
{
	uint64_t i = off >> r->shift, len = far_min(n << r->shift, r->bytes - (i << r->shift));

	if (page && n == 1)
		return stored_fetch_page(r, f, off, page, may_block, opaque);
	stored_count(r, i, n, len);
	int err = far_cache_fetch(r, f, i, n, off, 0);
	far_pull_demand_end(r, len, err < 0 ? err : 0);
	return err;
}

/*
 * A remote that is memory, or as good as that, is asked by the thread on the seat: leaving it would take longer. A program
 * that goes from page to page wants what follows at once, and as much of it in one step as stays in the cache, or as is a
 * huge page.
 */
static int stored_fetch(struct far_region *r, uint64_t off, bool (*may_block)(void *opaque), void *opaque)
{
	const struct far_facts *facts = far_facts(r->remote);
	bool near = !(facts->caps & FAR_CAP_REMOTE) && !facts->chunk;
	uint64_t i = off >> r->shift, n, extent = near ? stored_extent(r, i) : 1;
	uint64_t whole = r->memory.stage ? FAR_STAGE >> r->shift : 0;
	_Alignas(64) char page[STORED_PAGE];

	if (whole > 1 && extent > 1) /* up to the next huge page, or all of one */
		extent = i % whole ? far_min(extent, whole - i % whole) : whole;
	struct far_fetch *f = far_chunkmap_claim(r->map, i, extent, &n);
	if (!f && n)
		return -ENOMEM;
	if (!f) /* somebody else fetches it, or it has come by now */
		return far_chunkmap_is_local(r->map, i) ? 0 : may_block(opaque) ? far_chunkmap_wait(r->map, i) : -EAGAIN;
	near = near && far_read(r->remote, off, page, (size_t)far_min(sizeof page, r->bytes - off), FAR_NOWAIT) == 0;
	if (!near && !may_block(opaque)) {
		far_chunkmap_fetch_end(r->map, f, -EAGAIN);
		return -EAGAIN;
	}
	return stored_carry_out(r, f, n, off, near ? page : NULL, may_block, opaque);
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
	far_evict_faulted(r, off >> r->shift);
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
	unsigned turn = atomic_load(&r->allow_turn) & 1;
	atomic_fetch_add(&r->allowing[turn], 1);
	if (allow)
		allow(opaque, (i << r->shift) + from, to - from);
	if (r->trace)
		far_trace_touch(r->trace, i, 1);
	far_chunkmap_write_end(r->map, i, from, to, claim, ragged, true);
	atomic_fetch_sub(&r->allowing[turn], 1);
	if (claim != FAR_CLAIM_PRESENT)
		far_cache_arrived(r);
	return 0;
}

/*
 * Another thread of the program may store into what has just been allowed, and flush, before the chunk is dirty. That store
 * came before this flush, so who allowed it is counted: once each count has been seen at zero, it is through. The turn sends
 * those who come meanwhile to the other count.
 */
void far_stored_settle(struct far_region *r)
{
	for (unsigned k = 0; k < 2; k++) {
		atomic_store(&r->allow_turn, !k);
		while (atomic_load(&r->allowing[k]))
			far_thread_yield();
	}
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
