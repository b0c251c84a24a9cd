/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The cached layer: reads and writes on the chunk map and the local store, and the fetch that turns an absent chunk
 * into a local one. The calling thread does all of it; chunkmap.c says who may do what to which chunk.
 *
 * A write holds claims on at most CACHE_BATCH chunks and never waits while it holds one, so writers cannot block each
 * other in a circle.
 */
#include "region/region_int.h"

#include "base/io.h"
#include "base/pool.h"
#include "region/partial.h"

#include <string.h>

#define CACHE_BATCH 64
#define CACHE_LOCAL_TRIES 3
#define CACHE_PAGE ((uint64_t)4096)
#define CACHE_PIECE (256 * FAR_KIB)
#define CACHE_STAGE_CHUNKS (FAR_STAGE / 4096)
#define CACHE_SAY_AGAIN (60 * FAR_SEC)
#define CACHE_SAY_BAD 20

void far_region_remote_failed(struct far_region *r, int err)
{
	atomic_fetch_add_explicit(&r->errors, 1, memory_order_relaxed);
	atomic_store_explicit(&r->last_error, -err, memory_order_relaxed);
	atomic_store_explicit(&r->last_error_at, far_wall_ms(), memory_order_relaxed);
}

/* A write that needed new room in the local store has ended with err. The end of a thread's deadline says nothing of it. */
static void cache_local_wrote(struct far_region *r, int err)
{
	if (err == -ESHUTDOWN || err == -ETIMEDOUT || atomic_load_explicit(&r->local_error, memory_order_relaxed) == -err)
		return;
	atomic_store_explicit(&r->local_error, -err, memory_order_relaxed);
	if (!err)
		return;
	uint64_t now = far_now(), said = atomic_load_explicit(&r->local_said, memory_order_relaxed);
	if (now - said >= CACHE_SAY_AGAIN &&
	    atomic_compare_exchange_strong_explicit(&r->local_said, &said, now, memory_order_relaxed, memory_order_relaxed))
		far_log(FAR_LOG_WARNING, "the local store takes no more bytes (%s): writes that need room there fail until "
			"there is some", far_strerror(err));
}

void far_cache_unreadable(struct far_region *r, uint64_t i, int err, bool lost)
{
	uint64_t bit = (uint64_t)1 << (i % 64);

	atomic_fetch_add_explicit(&r->local_errors, 1, memory_order_relaxed);
	if (!lost || (atomic_fetch_or_explicit(&r->bad[i / 64], bit, memory_order_relaxed) & bit))
		return;
	/* A disk that dies as a whole does not get a line for each of a million chunks. */
	unsigned n = atomic_fetch_add_explicit(&r->bad_n, 1, memory_order_relaxed);
	if (n < CACHE_SAY_BAD || n % 1024 == 0)
		far_log(FAR_LOG_ERROR, "bytes %" PRIu64 " to %" PRIu64 " cannot be read from the local store (%s), and the "
			"remote does not have their newest state: write them again", i << r->shift,
			(i << r->shift) + far_chunkmap_len(r->map, i), far_strerror(err));
}

/* -------------------------------------------------------------------------------------------------------- fetches */

/* Bytes [from, to) of a chunk at `base`, whose data is in buf, into the local store. */
static int cache_store(struct far_region *r, uint64_t base, const char *buf, uint64_t from, uint64_t to, unsigned flags)
{
	return far_write(r->local, base + from, buf + from, (size_t)(to - from), flags & (FAR_BULK | FAR_FILL));
}

/* The whole of a chunk, or of several, in the order that serves who waits at `first` (bytes from base): that page first. */
static int cache_store_all(struct far_region *r, uint64_t base, const char *buf, uint64_t len, uint64_t first, unsigned flags)
{
	if (first >= len || len <= 4 * CACHE_PAGE)
		return cache_store(r, base, buf, 0, len, flags);
	uint64_t from = first / CACHE_PAGE * CACHE_PAGE, to = far_min(from + CACHE_PAGE, len);
	int err = cache_store(r, base, buf, from, to, flags);
	if (!err && from)
		err = cache_store(r, base, buf, 0, from, flags);
	return err || to == len ? err : cache_store(r, base, buf, to, len, flags);
}

/* [base, base+len), one chunk or several, has come from the remote; *e says what of it is wanted. */
static int cache_put(struct far_region *r, struct far_partial *e, uint64_t base, const char *buf, uint64_t len, uint64_t first,
		     unsigned flags)
{
	uint64_t from = 0, to;
	int err = 0;

	if (!e && r->memory.self)
		r->memory.came(r->memory.self, base, buf, len);
	if (!e) {
		if (atomic_load_explicit(&r->local_zero, memory_order_acquire) && far_is_zero(buf, (size_t)len)) {
			if (first >= len && r->memory.self)
				r->memory.zeros(r->memory.self, base, buf, len);
			if (first >= len)
				return 0;
			from = first / CACHE_PAGE * CACHE_PAGE; /* who waits for it is served at once */
			return cache_store(r, base, buf, from, far_min(from + CACHE_PAGE, len), flags);
		}
		err = cache_store_all(r, base, buf, len, first, flags);
		/* In memory the program may have stored beside what came: that stays. */
		if (err && ((flags & FAR_FILL) || far_discard(r->local, base, len, 0)))
			atomic_store_explicit(&r->local_zero, false, memory_order_release);
	} else {
		for (; !err && far_partial_missing(e, &from, &to); from = to)
			err = cache_store(r, base, buf, from, to, flags);
	}
	cache_local_wrote(r, err);
	return err;
}

static void cache_filled(struct far_region *r, struct far_partial *e, uint64_t i, const char *buf, int err)
{
	uint64_t base = i << r->shift, len = far_chunkmap_len(r->map, i);

	if (!err) {
		far_persist_verified(r->persist, i, 1);
		if (!e || !far_chunkmap_has_news(r->map, i)) /* what was written here has been pushed: it is in buf too */
			far_persist_sum(r->persist, i, buf, (size_t)len);
		far_persist_fresh(r->persist, i, 1);
	}
	far_chunkmap_fill_end(r->map, i, e, !err);
	if (!err && r->o.chunk_local)
		r->o.chunk_local(r->o.opaque, base, len);
}

/* *shown: the page at `first` is there now. */
static int cache_fill(struct far_region *r, struct far_fetch *f, uint64_t i, const char *buf, uint64_t first, bool *shown,
		      unsigned flags)
{
	uint64_t len = far_chunkmap_len(r->map, i);
	struct far_partial *e;

	far_chunkmap_fill_begin(r->map, f, &e);
	bool whole = !e;
	int err = cache_put(r, e, i << r->shift, buf, len, first, flags);
	cache_filled(r, e, i, buf, err);
	*shown |= !err && whole && first < len;
	return err;
}

/* n chunks in a staged buffer: in one step if all of each is wanted. Writers in the middle of a copy are waited for with
 * others' chunks in hand, which is safe, for they wait for nothing. */
static int cache_fill_staged(struct far_region *r, struct far_fetch *f, uint64_t i, uint64_t n, const char *buf, unsigned flags)
{
	struct far_partial *e[CACHE_STAGE_CHUNKS];
	bool whole = true;
	int err = 0;

	for (uint64_t k = 0; k < n; k++) {
		far_chunkmap_fill_begin(r->map, f, &e[k]);
		whole &= !e[k];
	}
	if (whole)
		err = cache_put(r, NULL, i << r->shift, buf, n << r->shift, UINT64_MAX, flags);
	for (uint64_t k = 0; k < n; k++) {
		const char *at = buf + (k << r->shift);
		if (!whole && !err)
			err = cache_put(r, e[k], (i + k) << r->shift, at, r->chunk, UINT64_MAX, flags);
		cache_filled(r, e[k], i + k, at, err);
	}
	return err;
}

void far_cache_arrived(struct far_region *r)
{
	far_pull_progress(r);
	if (r->all_local && far_chunkmap_local(r->map) == r->bytes && !far_persist_any_unverified(r->persist) &&
	    !atomic_exchange_explicit(&r->was_all_local, true, memory_order_relaxed))
		r->all_local(r->all_local_opaque);
}

/* What was claimed has been read into buf. `urgent`: offset that somebody waits for. */
static int cache_fill_run(struct far_region *r, struct far_fetch *f, uint64_t first, uint64_t n, const char *buf, bool staged,
			  uint64_t urgent, bool *shown, unsigned flags)
{
	uint64_t many = staged ? FAR_STAGE >> r->shift : 1;
	int err = 0;

	for (uint64_t i = first; !err && i < first + n; i += many) {
		const char *at = buf + ((i - first) << r->shift);
		err = many > 1 ? cache_fill_staged(r, f, i, many, at, flags)
			       : cache_fill(r, f, i, at, urgent - (i << r->shift), shown, flags);
	}
	return err;
}

/* [off, off+len) of the claim. */
static int cache_fetch_piece(struct far_region *r, struct far_fetch *f, uint64_t off, uint64_t len, char *buf, bool staged,
			     uint64_t urgent, bool *shown, unsigned flags)
{
	int err = far_read(r->remote, off, buf, (size_t)len, flags);

	if (err) {
		if (staged)
			atomic_store_explicit(&r->local_zero, false, memory_order_release);
		if (!(flags & FAR_NOWAIT && err == -EAGAIN))
			far_region_remote_failed(r, err);
		return err;
	}
	atomic_fetch_add_explicit(&r->pulled, len, memory_order_relaxed);
	return cache_fill_run(r, f, off >> r->shift, far_div_up(len, r->chunk), buf, staged, urgent, shown,
			      r->memory.self ? flags | FAR_FILL : flags);
}

int far_cache_fetch(struct far_region *r, struct far_fetch *f, uint64_t first, uint64_t n, uint64_t urgent, unsigned flags)
{
	uint64_t off = first << r->shift, len = far_min(n << r->shift, r->bytes - off), piece = len;
	char *stage = r->memory.stage ? r->memory.stage(r->memory.self, off, len) : NULL;
	bool shown = false;

	/* From memory to memory: what stays in the cache on its way. */
	if (r->memory.self && !stage && !(far_facts(r->remote)->caps & FAR_CAP_REMOTE))
		piece = far_min(len, far_max(CACHE_PIECE, r->chunk));
	char *buf = stage ? stage : far_buf_get((size_t)piece);
	int err = buf ? 0 : -ENOMEM;

	atomic_fetch_add_explicit(&r->inflight, len, memory_order_relaxed);
	for (uint64_t at = 0; at < len && !err; at += piece)
		err = cache_fetch_piece(r, f, off + at, far_min(piece, len - at), buf, stage != NULL, urgent, &shown, flags);
	atomic_fetch_sub_explicit(&r->inflight, len, memory_order_relaxed);
	far_chunkmap_fetch_end(r->map, f, err);
	if (stage)
		r->memory.unstage(r->memory.self, stage, len);
	else
		far_buf_put(buf, (size_t)piece);
	far_cache_arrived(r);
	if (flags & FAR_BULK) /* who fetches on demand trims after it has used the chunk: the rest may all be dirty */
		far_evict_trim(r);
	return err ? err : shown;
}

int far_cache_fill_near(struct far_region *r, struct far_fetch *f, uint64_t i, struct far_partial *e, int err)
{
	uint64_t off = i << r->shift, len = far_chunkmap_len(r->map, i), piece = len;

	/* What stays in the cache on its way leaves there what the program has at hand, too. */
	if (!e && !r->persist && !r->memory.wants_whole)
		piece = far_min(len, CACHE_PIECE);
	char *buf = far_buf_get((size_t)piece);
	if (!err && !buf)
		err = -ENOMEM;
	for (uint64_t at = 0, n; at < len && !err; at += n) {
		n = far_min(piece, len - at);
		err = far_read(r->remote, off + at, buf, (size_t)n, 0);
		if (!err)
			atomic_fetch_add_explicit(&r->pulled, n, memory_order_relaxed);
		else
			far_region_remote_failed(r, err);
		if (!err)
			err = cache_put(r, e, off + at, buf, n, UINT64_MAX, FAR_FILL);
	}
	cache_filled(r, e, i, buf, err);
	far_chunkmap_fetch_end(r->map, f, err);
	far_buf_put(buf, (size_t)piece);
	far_cache_arrived(r);
	return err;
}

static int cache_need_now(struct far_region *r, uint64_t i, uint64_t max)
{
	uint64_t io = far_facts(r->remote)->max_io, n, len;

	max = far_min(max, far_max((io ? far_min(io, 4 * FAR_MIB) : 4 * FAR_MIB) >> r->shift, 1));
	struct far_fetch *f = far_chunkmap_claim(r->map, i, max, &n);
	if (!f) {
		int err = n ? -ENOMEM : far_chunkmap_wait(r->map, i);
		return err == -EAGAIN ? 0 : err; /* whoever had it could not go on: look again */
	}
	len = n << r->shift;
	atomic_fetch_add_explicit(&r->demand_reads, 1, memory_order_relaxed);
	far_pull_demand_begin(r, len);
	far_pull_fault(r, i, n);
	int err = far_cache_fetch(r, f, i, n, UINT64_MAX, 0);
	far_pull_demand_end(r, len, err);
	return err;
}

int far_cache_need(struct far_region *r, uint64_t i, uint64_t max)
{
	if (atomic_load_explicit(&r->stopped, memory_order_acquire))
		return -ESHUTDOWN;
	atomic_fetch_add_explicit(&r->blocked, 1, memory_order_relaxed);
	int err = cache_need_now(r, i, max);
	atomic_fetch_sub_explicit(&r->blocked, 1, memory_order_relaxed);
	return err;
}

/* ---------------------------------------------------------------------------------------------------------- reads */

/* The remote has all that was written to chunk i, safely. Whatever was written here before this call began and is not
 * there has made the chunk something else than absent, or has left news in it. */
static bool cache_is_remote(struct far_region *r, uint64_t i)
{
	enum far_chunk s = far_chunkmap_state(r->map, i);

	return s == FAR_ABSENT || (s == FAR_PARTIAL && !far_chunkmap_has_news(r->map, i) && !far_push_unstable(r, i));
}

/* The local store is full or failed: the remote's bytes go to the reader alone, after a flush if it lacks some of them;
 * else err. */
static int cache_read_past(struct far_region *r, uint64_t i, uint64_t off, void *buf, size_t len, int err)
{
	if (!cache_is_remote(r, i) && (far_chunkmap_state(r->map, i) != FAR_PARTIAL || far_push_flush(r) ||
				       !cache_is_remote(r, i)))
		return err;
	uint64_t base = i << r->shift, all = far_chunkmap_len(r->map, i);
	char *chunk = far_facts(r->remote)->chunk ? far_buf_get((size_t)all) : buf; /* it may take whole ones only */
	if (!chunk)
		return -ENOMEM;
	err = chunk == buf ? far_read(r->remote, off, buf, len, 0) : far_read(r->remote, base, chunk, (size_t)all, 0);
	if (err)
		far_region_remote_failed(r, err);
	if (chunk != buf) {
		memcpy(buf, chunk + (off - base), err ? 0 : len);
		far_buf_put(chunk, (size_t)all);
	}
	return err;
}

/* The chunks [i, i+n), which the reader had pinned, gave `err`. 0: chunk i is not local any more, or may be tried alone;
 * else the error for the reader. */
static int cache_read_failed(struct far_region *r, uint64_t i, uint64_t n, unsigned *failures, int err)
{
	if (err == -EAGAIN || err == -ESHUTDOWN || err == -ETIMEDOUT || err == -ENOMEM)
		return err;
	++*failures;
	if (n > 1)
		return 0;
	bool again = far_evict_unreadable(r, i) && *failures < 3 * CACHE_LOCAL_TRIES;
	far_cache_unreadable(r, i, err, !again);
	return again ? 0 : err == -EBADMSG ? err : -EIO;
}

/* What the chunk map's file called clean is looked at before it is used for the first time. [i, i+n) is pinned. */
static int cache_verify(struct far_region *r, uint64_t i, uint64_t n)
{
	for (uint64_t k = i; k < i + n; k++) {
		size_t len = (size_t)far_chunkmap_len(r->map, k);
		if (!far_persist_is_unverified(r->persist, k, 1))
			continue;
		char *buf = far_buf_get(len);
		int err = buf ? far_read(r->local, k << r->shift, buf, len, 0) : -ENOMEM;
		if (!err)
			err = far_persist_check(r->persist, k, buf, len);
		far_buf_put(buf, len);
		/* A writer that has looked at it meanwhile may have changed it under our eyes. */
		if (err && far_persist_is_unverified(r->persist, k, 1))
			return err == -ENOMEM ? err : -EBADMSG;
		far_persist_verified(r->persist, k, 1);
	}
	if (!far_persist_any_unverified(r->persist))
		far_cache_arrived(r);
	return 0;
}

/* How often in a row the local store has failed this read, and chunk i, where it stands, was fetched. */
struct cache_tries {
	unsigned failures, fetches;
};

/* Chunk i is absent and [off, off+len) of it is wanted. 0: look again; 1: the bytes are in buf; or -errno. */
static int cache_read_absent(struct far_region *r, uint64_t i, uint64_t max, uint64_t off, void *buf, size_t len,
			     struct cache_tries *t)
{
	/* What is written there cannot be read again, or others need the room more urgently. */
	bool past = t->failures >= CACHE_LOCAL_TRIES || t->fetches >= CACHE_LOCAL_TRIES;
	int err = -EAGAIN;

	if (r->trace)
		far_trace_touch(r->trace, i, 1);
	if (!past || far_chunkmap_state(r->map, i) != FAR_ABSENT)
		err = far_cache_need(r, i, max);
	t->fetches++;
	if (!err)
		return 0;
	if (past || t->failures || atomic_load_explicit(&r->local_error, memory_order_relaxed))
		err = cache_read_past(r, i, off, buf, len, err);
	return err == -EAGAIN ? 0 : err ? err : 1;
}

int far_cache_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct far_region *r = self;
	uint64_t end = off + len;
	struct cache_tries t = { 0, 0 };
	bool fetched = false;
	char *p = buf;

	while (off < end) {
		uint64_t i = off >> r->shift, last = t.failures ? i : (end - 1) >> r->shift;
		uint64_t n = far_chunkmap_pin(r->map, i, last - i + 1);
		uint64_t stop = n ? far_min(end, (i + n) << r->shift) : far_min(end, (i + 1) << r->shift);
		int err = 0;

		if (!n && far_chunkmap_pin_partial(r->map, i, off - (i << r->shift), stop - (i << r->shift)))
			n = 1;
		if (!n) {
			if (flags & FAR_NOWAIT)
				return -EAGAIN;
			fetched = true;
			err = cache_read_absent(r, i, last - i + 1, off, p, (size_t)(stop - off), &t);
			if (err < 0)
				return err;
			if (!err)
				continue;
		} else {
			if (r->trace)
				far_trace_touch(r->trace, i, n);
			far_pull_touched(r, i, n);
			if (far_persist_is_unverified(r->persist, i, n))
				err = flags & FAR_NOWAIT ? -EAGAIN : cache_verify(r, i, n);
			if (!err)
				err = far_read(r->local, off, p, (size_t)(stop - off), flags & FAR_NOWAIT);
			far_chunkmap_unpin(r->map, i, n);
			if (err) {
				err = cache_read_failed(r, i, n, &t.failures, err);
				if (err)
					return err;
				continue;
			}
		}
		p += stop - off;
		off = stop;
		t = (struct cache_tries){ 0, 0 };
	}
	if (fetched)
		far_evict_trim(r);
	return 0;
}

/* --------------------------------------------------------------------------------------------------------- writes */

struct cache_batch {
	uint64_t first;
	unsigned n;
	struct {
		uint32_t from, to;
		unsigned ragged;
		enum far_claim claim;
	} c[CACHE_BATCH];
};

/* Claim chunks from `off` on as long as that needs no waiting. Returns where the claimed bytes end; the claim that
 * stopped it is in *why when nothing was claimed. */
static uint64_t batch_claim(struct far_region *r, struct cache_batch *b, uint64_t off, uint64_t end, enum far_claim *why)
{
	b->first = off >> r->shift;
	b->n = 0;
	while (off < end && b->n < CACHE_BATCH) {
		uint64_t i = off >> r->shift, base = i << r->shift;
		uint32_t from = (uint32_t)(off - base);
		uint32_t to = (uint32_t)far_min(end - base, far_chunkmap_len(r->map, i));
		unsigned ragged;

		*why = far_chunkmap_write_begin(r->map, i, from, to, &ragged);
		if (*why == FAR_CLAIM_WAIT || *why == FAR_CLAIM_FETCH)
			break;
		b->c[b->n].from = from;
		b->c[b->n].to = to;
		b->c[b->n].ragged = ragged;
		b->c[b->n++].claim = *why;
		off = base + to;
	}
	return off;
}

/* copied: bytes may have reached the local store, err or not. */
static void batch_end(struct far_region *r, struct cache_batch *b, int err, bool copied)
{
	for (unsigned k = 0; k < b->n; k++) {
		uint64_t i = b->first + k;
		if (!copied && b->c[k].claim == FAR_CLAIM_PRESENT) {
			far_chunkmap_unpin(r->map, i, 1);
			continue;
		}
		if (err && copied && b->c[k].claim == FAR_CLAIM_WHOLE &&
		    far_discard(r->local, i << r->shift, far_chunkmap_len(r->map, i), 0))
			atomic_store_explicit(&r->local_zero, false, memory_order_release);
		if (err && copied && b->c[k].claim == FAR_CLAIM_PARTIAL) /* it may be absent afterwards, with some of it there */
			atomic_store_explicit(&r->local_zero, false, memory_order_release);
		if (copied) {
			far_persist_unsum(r->persist, i);
			far_persist_fresh(r->persist, i, 1);
		}
		far_chunkmap_write_end(r->map, i, b->c[k].from, b->c[k].to, b->c[k].claim, b->c[k].ragged, !err);
		if (!err && b->c[k].claim == FAR_CLAIM_WHOLE && r->o.chunk_local)
			r->o.chunk_local(r->o.opaque, i << r->shift, far_chunkmap_len(r->map, i));
	}
}

/* The chunk map's file learns of it first. */
static int batch_announce(struct far_region *r, struct cache_batch *b, unsigned flags)
{
	int err = 0;

	for (unsigned k = 0, n; r->persist && !err && k < b->n; k += n) {
		for (n = 0; k + n < b->n && b->c[k + n].claim == FAR_CLAIM_PRESENT; n++)
			;
		if (n)
			err = far_persist_before_write(r->persist, b->first + k, n, flags);
		n += !n;
	}
	if (!err) /* what is overwritten as a whole need not be looked at any more */
		far_persist_verified(r->persist, b->first, b->n);
	return err;
}

/* A write of a part keeps the other bytes: they must be what they were. Only the first and the last chunk can be. */
static int batch_verify(struct far_region *r, uint64_t off, uint64_t end, unsigned flags)
{
	uint64_t ends[2] = { off >> r->shift, (end - 1) >> r->shift };
	int err = 0;

	for (unsigned k = 0; !err && k < 2; k++) {
		while (!err && far_persist_is_unverified(r->persist, ends[k], 1)) {
			if (flags & FAR_NOWAIT)
				return -EAGAIN;
			if (!far_chunkmap_pin(r->map, ends[k], 1))
				break;
			err = cache_verify(r, ends[k], 1);
			far_chunkmap_unpin(r->map, ends[k], 1);
			if (err != -EBADMSG)
				continue;
			bool again = far_evict_unreadable(r, ends[k]);
			far_cache_unreadable(r, ends[k], err, !again);
			err = again ? 0 : -EIO;
		}
	}
	return err;
}

/* Write one batch from `off` on; *stop is where it ended. -EALREADY: nothing was written, look again. */
static int cache_write_batch(struct far_region *r, uint64_t off, uint64_t end, const char *buf, unsigned flags,
			     uint64_t *stop)
{
	enum far_claim why = FAR_CLAIM_WAIT;
	struct cache_batch b;
	int err;

	*stop = batch_claim(r, &b, off, end, &why);
	if (!b.n) {
		if (flags & FAR_NOWAIT)
			return -EAGAIN;
		err = why == FAR_CLAIM_FETCH ? far_cache_need(r, b.first, 1) : far_chunkmap_wait(r->map, b.first);
		/* Another's fetch that failed is no error of ours: the write may not need it. */
		return err && (why == FAR_CLAIM_FETCH || err == -ETIMEDOUT || err == -ESHUTDOWN) ? err : -EALREADY;
	}
	/* The rest might have to wait, and -EAGAIN says that nothing was written. */
	err = (flags & FAR_NOWAIT) && *stop < end ? -EAGAIN : batch_announce(r, &b, flags);
	if (err) {
		batch_end(r, &b, err, false);
		return err;
	}
	if (r->trace)
		far_trace_touch(r->trace, b.first, b.n);
	err = buf ? far_write(r->local, off, buf, (size_t)(*stop - off), flags & FAR_NOWAIT)
		  : far_zero(r->local, off, *stop - off, flags & FAR_NOWAIT);
	batch_end(r, &b, err, err != -EAGAIN);
	bool fresh = b.c[0].claim != FAR_CLAIM_PRESENT || b.c[b.n - 1].claim != FAR_CLAIM_PRESENT;
	if (fresh && err != -EAGAIN && (buf || err))
		cache_local_wrote(r, err);
	if (fresh)
		far_cache_arrived(r);
	far_push_dirtied(r);
	return err;
}

/* buf == NULL writes zeros. */
static int cache_write(struct far_region *r, uint64_t off, const char *buf, uint64_t len, unsigned flags)
{
	uint64_t end = off + len, stop;

	while (off < end) {
		if (atomic_load_explicit(&r->fenced, memory_order_acquire))
			return -ESTALE;
		int err = far_push_throttle(r, far_min(end - off, CACHE_BATCH << r->shift), flags);
		if (!err && far_persist_any_unverified(r->persist))
			err = batch_verify(r, off, end, flags);
		if (!err)
			err = cache_write_batch(r, off, end, buf, flags, &stop);
		if (err == -EALREADY)
			continue;
		if (err)
			return err;
		if (buf)
			buf += stop - off;
		off = stop;
	}
	far_evict_trim(r);
	return 0;
}

int far_cache_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return cache_write(self, off, buf, len, flags);
}

int far_cache_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return cache_write(self, off, NULL, len, flags);
}
