/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Limbo is a ring of slots, the oldest is overwritten first. A chunk is in it only while the region has it not:
 *
 *     put      the region has evicted it, clean: what is below has the same bytes
 *     taken    the region fetches it: the slot is free, the chunk is hot until somebody asks
 *     dropped  written, discarded or zeroed on its way below; the slot's turn has come; pause
 *
 * Invariants, under the lock:
 *  1. slot[where[i] - 1].chunk == i for each chunk i whose where[i] is not 0.
 *  2. What is in limbo is what is below: an eviction that began before a pause puts nothing after it (`epoch`).
 */
#define _GNU_SOURCE
#include "frontend/victim.h"

#include "base/thread.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

struct far_victim {
	/* fixed after open, but for `owned`, which is set once before the face has users */
	struct far_backend *below;
	bool owned;
	unsigned shift;
	uint64_t bytes, chunks;
	uint32_t n;  /* slots */
	char *mem;   /* n chunks */
	struct far_mutex lock;
	uint64_t *slot FAR_GUARDED_BY(lock);  /* the chunk in each, plus 1; 0: none */
	uint32_t *where FAR_GUARDED_BY(lock); /* of each chunk, its slot plus 1; 0: none */
	uint64_t *hot FAR_GUARDED_BY(lock);   /* a bit a chunk */
	uint32_t hand FAR_GUARDED_BY(lock);
	unsigned paused FAR_GUARDED_BY(lock);
	uint64_t epoch FAR_GUARDED_BY(lock), hits FAR_GUARDED_BY(lock);
};

static uint64_t victim_len(const struct far_victim *v, uint64_t i)
{
	return far_min((uint64_t)1 << v->shift, v->bytes - (i << v->shift));
}

static void victim_drop_locked(struct far_victim *v, uint64_t i) FAR_REQUIRES(v->lock)
{
	if (v->where[i])
		v->slot[v->where[i] - 1] = 0;
	v->where[i] = 0;
}

static void victim_drop(struct far_victim *v, uint64_t off, uint64_t len)
{
	far_mutex_lock(&v->lock);
	for (uint64_t i = off >> v->shift; i <= (off + len - 1) >> v->shift; i++)
		victim_drop_locked(v, i);
	far_mutex_unlock(&v->lock);
}

/* A whole chunk out of limbo, if it is there. */
static bool victim_take(struct far_victim *v, uint64_t i, char *buf)
{
	bool hit;

	far_mutex_lock(&v->lock);
	hit = v->where[i] && !v->paused;
	if (hit) {
		memcpy(buf, v->mem + ((uint64_t)(v->where[i] - 1) << v->shift), (size_t)victim_len(v, i));
		victim_drop_locked(v, i);
		v->hot[i / 64] |= (uint64_t)1 << (i % 64);
		v->hits++;
	}
	far_mutex_unlock(&v->lock);
	return hit;
}

static int victim_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct far_victim *v = self;
	uint64_t end = off + len, miss = off;
	char *p = buf;
	int r = 0;

	/* What is missed between two hits is read in one call. */
	for (uint64_t at = off, n; at < end && r == 0; at += n) {
		uint64_t i = at >> v->shift, all = victim_len(v, i);
		n = far_min(end, (i << v->shift) + all) - at;
		if (n < all || !victim_take(v, i, p + (at - off)))
			continue;
		if (miss < at)
			r = far_read(v->below, miss, p + (miss - off), (size_t)(at - miss), flags);
		miss = at + n;
	}
	return r || miss >= end ? r : far_read(v->below, miss, p + (miss - off), (size_t)(end - miss), flags);
}

static int victim_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct far_victim *v = self;

	victim_drop(v, off, len);
	return far_write(v->below, off, buf, len, flags);
}

static int victim_flush(void *self)
{
	return far_flush(((struct far_victim *)self)->below);
}

static int victim_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct far_victim *v = self;

	victim_drop(v, off, len);
	return far_discard(v->below, off, len, flags);
}

static int victim_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct far_victim *v = self;

	victim_drop(v, off, len);
	return far_zero(v->below, off, len, flags);
}

static int victim_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	return far_extents(((struct far_victim *)self)->below, off, len, out, max, n);
}

static struct far_backend *victim_inner(void *self)
{
	return ((struct far_victim *)self)->below;
}

static void victim_stop(void *self)
{
	struct far_victim *v = self;

	if (v->owned)
		far_stop(v->below);
}

static void victim_free(struct far_victim *v)
{
	if (v->mem)
		munmap(v->mem, (size_t)v->n << v->shift);
	free(v->slot);
	free(v->where);
	free(v->hot);
	far_mutex_fini(&v->lock);
	free(v);
}

static void victim_close(void *self)
{
	struct far_victim *v = self;

	if (v->owned)
		far_close(v->below);
	victim_free(v);
}

void far_victim_own(struct far_victim *v)
{
	v->owned = true;
}

int far_victim_new(struct far_backend *below, unsigned shift, uint64_t most, struct far_victim **out, struct far_backend **face)
{
	static const struct far_ops ops = {
		FAR_OPS_INIT, .read = victim_read, .write = victim_write, .flush = victim_flush, .discard = victim_discard,
		.zero = victim_zero, .extents = victim_extents, .inner = victim_inner, .stop = victim_stop, .close = victim_close,
	};
	struct far_facts facts = *far_facts(below);
	struct far_victim *v = calloc(1, sizeof *v);
	void *mem;
	int r;

	if (!v)
		return -ENOMEM;
	v->below = below;
	v->shift = shift;
	v->bytes = facts.bytes;
	v->chunks = far_div_up(facts.bytes, (uint64_t)1 << shift);
	v->n = (uint32_t)far_min(far_max(most >> shift, 1), UINT32_MAX - 1);
	far_mutex_init(&v->lock);
	v->slot = calloc(v->n, sizeof *v->slot);
	v->where = calloc((size_t)v->chunks + 1, sizeof *v->where);
	v->hot = calloc((size_t)(v->chunks / 64 + 1), sizeof *v->hot);
	mem = mmap(NULL, (size_t)v->n << shift, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	v->mem = mem == MAP_FAILED ? NULL : mem;
	if (v->mem) {
		madvise(v->mem, (size_t)v->n << shift, MADV_DONTFORK);
		madvise(v->mem, (size_t)v->n << shift, MADV_DONTDUMP);
	}
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	r = v->slot && v->where && v->hot && v->mem ? far_backend_new(&ops, v, &facts, face) : -ENOMEM;
	if (r) {
		victim_free(v);
		return r;
	}
	*out = v;
	return 0;
}

uint64_t far_victim_epoch(struct far_victim *v)
{
	far_mutex_lock(&v->lock);
	uint64_t epoch = v->epoch;
	far_mutex_unlock(&v->lock);
	return epoch;
}

void far_victim_put(struct far_victim *v, uint64_t off, const void *buf, uint64_t len, uint64_t epoch)
{
	uint64_t i = off >> v->shift;

	far_mutex_lock(&v->lock);
	if (!v->paused && v->epoch == epoch && len == victim_len(v, i) && off == i << v->shift) {
		uint32_t s = v->hand++ % v->n;
		if (v->slot[s])
			victim_drop_locked(v, v->slot[s] - 1);
		victim_drop_locked(v, i);
		v->slot[s] = i + 1;
		v->where[i] = s + 1;
		memcpy(v->mem + ((uint64_t)s << v->shift), buf, (size_t)len);
	}
	far_mutex_unlock(&v->lock);
}

bool far_victim_spare(struct far_victim *v, uint64_t off)
{
	uint64_t i = off >> v->shift, bit = (uint64_t)1 << (i % 64);

	far_mutex_lock(&v->lock);
	bool hot = !v->paused && (v->hot[i / 64] & bit);
	v->hot[i / 64] &= ~bit;
	far_mutex_unlock(&v->lock);
	return hot;
}

void far_victim_pause(struct far_victim *v)
{
	far_mutex_lock(&v->lock);
	v->paused++;
	v->epoch++;
	for (uint32_t s = 0; s < v->n; s++)
		if (v->slot[s])
			victim_drop_locked(v, v->slot[s] - 1);
	far_mutex_unlock(&v->lock);
}

void far_victim_resume(struct far_victim *v)
{
	far_mutex_lock(&v->lock);
	v->paused--;
	far_mutex_unlock(&v->lock);
}

uint64_t far_victim_hits(struct far_victim *v)
{
	far_mutex_lock(&v->lock);
	uint64_t hits = v->hits;
	far_mutex_unlock(&v->lock);
	return hits;
}
