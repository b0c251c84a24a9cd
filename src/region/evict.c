/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Giving room of the local store back: by hand and by budget. Chunks are claimed up to 64 at a time, punched one after
 * the other, and let go together, so that whoever must write something down before a punch does it once for all of
 * them. Nothing is waited for while claims are held.
 */
#include "region/region_int.h"

#define EVICT_BATCH 64

struct evict_batch {
	unsigned n;
	uint64_t bytes; /* of its chunks */
	uint64_t chunk[EVICT_BATCH];
};

static bool evict_claim(struct far_region *r, struct evict_batch *b, uint64_t i)
{
	if (!far_chunkmap_evict_begin(r->map, i))
		return false;
	uint64_t len = far_chunkmap_len(r->map, i);
	b->chunk[b->n++] = i;
	b->bytes += len;
	atomic_fetch_add_explicit(&r->evicting, len, memory_order_relaxed);
	return true;
}

/* Punch what was claimed and let it go. The batch is empty afterwards. */
static void evict_run(struct far_region *r, struct evict_batch *b)
{
	/* On disk they are absent first. What others read as well keeps its room. */
	int err = b->n ? far_persist_forget(r->persist, b->chunk, b->n) : 0;
	bool keep = far_persist_shared(r->persist);

	for (unsigned k = 0; k < b->n; k++) {
		uint64_t i = b->chunk[k], len = far_chunkmap_len(r->map, i);
		int e = err || keep ? err : far_discard(r->local, i << r->shift, len, 0);

		far_chunkmap_evict_end(r->map, i, !e);
	}
	atomic_fetch_sub_explicit(&r->evicting, b->bytes, memory_order_relaxed);
	b->n = 0;
	b->bytes = 0;
}

bool far_evict_one(struct far_region *r, uint64_t i)
{
	struct evict_batch b = { 0 };

	if (!evict_claim(r, &b, i))
		return false;
	evict_run(r, &b);
	return true;
}

int far_region_evict(struct far_region *r, uint64_t off, uint64_t len)
{
	struct evict_batch b = { 0 };

	if (off > r->bytes || len > r->bytes - off)
		return -EINVAL;
	for (uint64_t i = far_div_up(off, r->chunk); i < far_div_up(off + len, r->chunk); i++) {
		if (off + len == r->bytes || (i + 1) << r->shift <= off + len)
			evict_claim(r, &b, i);
		if (b.n == EVICT_BATCH)
			evict_run(r, &b);
	}
	evict_run(r, &b);
	far_pull_progress(r);
	return 0;
}

/* More is here than the budget allows, what is on its way out not counted. */
static bool evict_over(struct far_region *r)
{
	uint64_t going = atomic_load_explicit(&r->evicting, memory_order_relaxed), local = far_chunkmap_local(r->map);

	return local > r->o.local_max && local - r->o.local_max > going;
}

/* A clock: a chunk that was used since the hand last passed gets a second chance. Two rounds at most: what is left
 * then is dirty or in use. */
void far_evict_trim(struct far_region *r)
{
	uint64_t n = far_chunkmap_chunks(r->map);
	struct evict_batch b = { 0 };

	if (!r->o.local_max)
		return;
	for (uint64_t steps = 0; steps < 2 * n && evict_over(r); steps++) {
		uint64_t i = atomic_fetch_add_explicit(&r->evict_hand, 1, memory_order_relaxed) % n;
		if (!far_chunkmap_test_touched(r->map, i))
			evict_claim(r, &b, i);
		if (b.n == EVICT_BATCH)
			evict_run(r, &b);
	}
	evict_run(r, &b);
}
