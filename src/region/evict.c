/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Giving room of the local store back: by hand, by budget, because the local store cannot read it back, or because the
 * remote has other bytes by now. Chunks are claimed up to 64 at a time, punched one after the other, and let go
 * together, so that whoever must write something down before a punch does it once for all of them. Nothing is waited
 * for while claims are held.
 *
 *   by hand, by budget   chunks without news that are not pinned by far_region_pin() and that the remote cannot forget
 *   unreadable           the same, pinned or not: it is fetched again
 *   refreshed            the same, pinned or not, and chunks on their way are waited for
 *
 * Invariants:
 *  1. A chunk is looked at after it was claimed: `kept` is set, or the mark of an unstable push, before whoever set it
 *     relies on it, so an evictor either sees it and gives the claim back, or had the claim before.
 *  2. A pinned chunk that was evicted all the same (the claim came first, or it was refreshed) is asked for again.
 *  3. The budget does not take a chunk that a program has just waited for. Where all else is pinned or dirty it would be
 *     the only one to go, and the program would wait for it again, for ever.
 *  4. evicting is the sum of what is claimed, so that several threads together do not evict more than is needed.
 */
#include "region/region_int.h"

#include <stdlib.h>

#define EVICT_BATCH 64
#define EVICT_USE (5 * FAR_MSEC) /* for a thread that has waited for a page to get a CPU and use it */

struct evict_batch {
	bool keep_pinned;
	unsigned n;
	uint64_t bytes; /* of its chunks */
	uint64_t chunk[EVICT_BATCH];
};

/* ---------------------------------------------------------------------------------------------------------- batches */

bool far_evict_kept(struct far_region *r, uint64_t i)
{
	return atomic_load_explicit(&r->kept[i / 64], memory_order_seq_cst) >> (i % 64) & 1;
}

static bool evict_claim(struct far_region *r, struct evict_batch *b, uint64_t i)
{
	if (b->keep_pinned && far_evict_kept(r, i))
		return false;
	if (!far_chunkmap_evict_begin(r->map, i))
		return false;
	if ((b->keep_pinned && far_evict_kept(r, i)) || far_push_unstable(r, i)) {
		far_chunkmap_evict_end(r->map, i, false);
		return false;
	}
	uint64_t len = far_chunkmap_len(r->map, i);
	b->chunk[b->n++] = i;
	b->bytes += len;
	atomic_fetch_add_explicit(&r->evicting, len, memory_order_relaxed);
	return true;
}

/* Punch what was claimed and let it go, also where the punch failed if `anyway`. The batch is empty afterwards. How many
 * are gone. */
static unsigned evict_run(struct far_region *r, struct evict_batch *b, bool anyway)
{
	unsigned n = 0;

	/* On disk they are absent first. What others read as well keeps its room. */
	int forgot = b->n ? far_persist_forget(r->persist, b->chunk, b->n) : 0;
	bool keep = far_persist_shared(r->persist);

	for (unsigned k = 0; k < b->n; k++) {
		uint64_t i = b->chunk[k], len = far_chunkmap_len(r->map, i);
		int err = forgot || keep ? forgot : far_discard(r->local, i << r->shift, len, 0);

		/* What a program has stored and nobody has seen yet is not thrown away. */
		bool gone = !err || (anyway && !(r->memory.self && err == -EBUSY));
		if (keep || (err && gone))
			atomic_store_explicit(&r->local_zero, false, memory_order_release);
		far_chunkmap_evict_end(r->map, i, gone);
		n += gone;
		if (far_evict_kept(r, i))
			far_region_prefetch(r, i << r->shift, len);
	}
	atomic_fetch_sub_explicit(&r->evicting, b->bytes, memory_order_relaxed);
	b->n = 0;
	b->bytes = 0;
	return n;
}

int far_region_evict(struct far_region *r, uint64_t off, uint64_t len)
{
	struct evict_batch b = { .keep_pinned = true };

	if (off > r->bytes || len > r->bytes - off)
		return -EINVAL;
	for (uint64_t i = far_div_up(off, r->chunk); i < far_div_up(off + len, r->chunk); i++) {
		if (off + len == r->bytes || (i + 1) << r->shift <= off + len)
			evict_claim(r, &b, i);
		if (b.n == EVICT_BATCH)
			evict_run(r, &b, false);
	}
	evict_run(r, &b, false);
	far_pull_progress(r);
	return 0;
}

/* ----------------------------------------------------------------------------------------------------------- budget */

/* More is here than the budget allows, what is on its way out not counted. */
static bool evict_over(struct far_region *r)
{
	uint64_t going = atomic_load_explicit(&r->evicting, memory_order_relaxed), local = far_chunkmap_local(r->map);

	return local > r->o.local_max && local - r->o.local_max > going;
}

void far_evict_faulted(struct far_region *r, uint64_t i)
{
	if (!r->o.local_max)
		return;
	unsigned k = atomic_fetch_add_explicit(&r->faulted_n, 1, memory_order_relaxed) % FAR_ARRAY_LEN(r->faulted);
	atomic_store_explicit(&r->faulted[k].at, far_now(), memory_order_relaxed);
	atomic_store_explicit(&r->faulted[k].chunk1, i + 1, memory_order_relaxed);
}

static bool evict_in_use(struct far_region *r, uint64_t i, uint64_t now)
{
	for (size_t k = 0; k < FAR_ARRAY_LEN(r->faulted); k++)
		if (atomic_load_explicit(&r->faulted[k].chunk1, memory_order_relaxed) == i + 1 &&
		    now < atomic_load_explicit(&r->faulted[k].at, memory_order_relaxed) + EVICT_USE)
			return true;
	return false;
}

/* A clock: a chunk that was used since the hand last passed gets a second chance. Two rounds at most: what is left
 * then is dirty, in use, pinned, or not safe on the remote yet. */
static void evict_clock(struct far_region *r)
{
	uint64_t n = far_chunkmap_chunks(r->map), began = far_now();
	struct evict_batch b = { .keep_pinned = true };
	unsigned gone = 0;

	if (began < atomic_load_explicit(&r->evict_pause, memory_order_relaxed))
		return;
	for (uint64_t steps = 0; steps < 2 * n && evict_over(r); steps++) {
		uint64_t i = atomic_fetch_add_explicit(&r->evict_hand, 1, memory_order_relaxed) % n;
		if (!far_chunkmap_test_touched(r->map, i) && !evict_in_use(r, i, began))
			evict_claim(r, &b, i);
		if (b.n == EVICT_BATCH)
			gone += evict_run(r, &b, false);
	}
	gone += evict_run(r, &b, false);
	/* Nothing is left to give: a large region is not walked again at each write until that may have changed. */
	uint64_t now = far_now();
	if (!gone && evict_over(r))
		atomic_store_explicit(&r->evict_pause, now + far_min(10 * (now - began), FAR_SEC), memory_order_relaxed);
}

void far_evict_trim(struct far_region *r)
{
	if (!r->o.local_max || !evict_over(r))
		return;
	evict_clock(r);
	if (evict_over(r) && far_push_settle_soon(r)) {
		atomic_store_explicit(&r->evict_pause, 0, memory_order_relaxed);
		evict_clock(r);
	}
}

/* ----------------------------------------------------------------------------------------------- unreadable, refresh */

bool far_evict_unreadable(struct far_region *r, uint64_t i)
{
	struct evict_batch b = { 0 };
	uint64_t until = far_min(far_deadline(), far_now() + FAR_SEC);

	/* Others that read it have it pinned for a moment; they fail as well and come here. */
	while (!evict_claim(r, &b, i)) {
		enum far_chunk s = far_chunkmap_state(r->map, i);
		if (s != FAR_CLEAN || far_now() >= until)
			return s == FAR_ABSENT || s == FAR_FETCHING || s == FAR_FILLING || s == FAR_EVICTING;
		if (far_push_unstable(r, i) && far_push_settle(r))
			return false;
		far_sleep_until(far_now() + FAR_MSEC, false);
	}
	evict_run(r, &b, true);
	return true;
}

/* Whether chunk i holds nothing older than this call, or has been claimed; else *wait says how to go on. */
static bool refresh_one(struct far_region *r, struct evict_batch *b, uint64_t i)
{
	switch (far_chunkmap_state(r->map, i)) {
	case FAR_CLEAN:
		return far_push_unstable(r, i) || evict_claim(r, b, i);
	case FAR_PARTIAL: /* the rest of one with news is fetched later */
		return far_chunkmap_has_news(r->map, i) || far_push_unstable(r, i) || evict_claim(r, b, i);
	case FAR_FETCHING:
	case FAR_FETCHING_PARTIAL:
	case FAR_PUSHING_PARTIAL:
	case FAR_FILLING:
	case FAR_EVICTING:
		return false;
	default: /* absent; or written here: newer */
		return true;
	}
}

int far_region_refresh(struct far_region *r, uint64_t off, uint64_t len)
{
	struct evict_batch b = { 0 };
	int err = 0;

	if (off > r->bytes || len > r->bytes - off)
		return -EINVAL;
	uint64_t first = off >> r->shift, end = len ? ((off + len - 1) >> r->shift) + 1 : first;
	for (uint64_t i = first; i < end && !err;) {
		if (refresh_one(r, &b, i)) {
			i++;
		} else {
			evict_run(r, &b, true); /* nothing is waited for with claims in hand */
			far_chunkmap_wait(r->map, i); /* the error of another's fetch is none of ours */
			if (atomic_load_explicit(&r->stopped, memory_order_acquire))
				err = -ESHUTDOWN;
			else if (far_now() >= far_deadline())
				err = -ETIMEDOUT;
			enum far_chunk s = far_chunkmap_state(r->map, i);
			if (!err && (s == FAR_CLEAN || s == FAR_PARTIAL)) /* pinned by a reader: microseconds */
				far_sleep_until(far_now() + 50 * FAR_USEC, false);
		}
		if (b.n == EVICT_BATCH)
			evict_run(r, &b, true);
	}
	evict_run(r, &b, true);
	far_pull_again(r);
	return err;
}

/* ------------------------------------------------------------------------------------------------------------- pins */

/* Set or take back the pins of [first, end); how many bytes that changed, or would change. */
static uint64_t evict_mark_locked(struct far_region *r, uint64_t first, uint64_t end, bool set, bool apply)
	FAR_REQUIRES(r->kept_lock)
{
	uint64_t bytes = 0;

	for (uint64_t i = first; i < end; i++) {
		uint64_t bit = (uint64_t)1 << (i % 64);
		if (far_evict_kept(r, i) == set)
			continue;
		bytes += far_chunkmap_len(r->map, i);
		if (apply && set)
			atomic_fetch_or_explicit(&r->kept[i / 64], bit, memory_order_seq_cst);
		else if (apply)
			atomic_fetch_and_explicit(&r->kept[i / 64], ~bit, memory_order_seq_cst);
	}
	return bytes;
}

int far_region_pin(struct far_region *r, uint64_t off, uint64_t len)
{
	int err = 0;

	if (off > r->bytes || len > r->bytes - off)
		return -EINVAL;
	if (!len)
		return 0;
	uint64_t first = off >> r->shift, end = ((off + len - 1) >> r->shift) + 1;
	far_mutex_lock(&r->kept_lock);
	uint64_t more = evict_mark_locked(r, first, end, true, false);
	uint64_t pinned = atomic_load_explicit(&r->pinned, memory_order_relaxed);
	if (r->o.local_max && pinned + more > r->o.local_max) {
		err = -ENOSPC;
	} else {
		evict_mark_locked(r, first, end, true, true);
		atomic_store_explicit(&r->pinned, pinned + more, memory_order_relaxed);
	}
	far_mutex_unlock(&r->kept_lock);
	if (!err)
		far_region_prefetch(r, off, len);
	return err;
}

/* Chunks of which a part is in the range are let go as a whole, as they were pinned. */
int far_region_unpin(struct far_region *r, uint64_t off, uint64_t len)
{
	if (off > r->bytes || len > r->bytes - off)
		return -EINVAL;
	if (!len)
		return 0;
	uint64_t first = off >> r->shift, end = ((off + len - 1) >> r->shift) + 1;
	far_mutex_lock(&r->kept_lock);
	atomic_fetch_sub_explicit(&r->pinned, evict_mark_locked(r, first, end, false, true), memory_order_relaxed);
	far_mutex_unlock(&r->kept_lock);
	return 0;
}

int far_evict_open(struct far_region *r)
{
	r->kept = calloc((size_t)(far_chunkmap_chunks(r->map) / 64 + 1), sizeof *r->kept);
	if (!r->kept)
		return -ENOMEM;
	far_mutex_init(&r->kept_lock);
	return 0;
}

void far_evict_close(struct far_region *r)
{
	if (!r->kept)
		return;
	free((void *)r->kept);
	far_mutex_fini(&r->kept_lock);
}
