/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What a program has stored into its memory, found without its help.
 *
 *     async   the kernel notes each page that is written. collect reads the notes and clears them in one step; arm clears
 *             those of what a push is about to read.
 *     sync    pages are write-protected; a store is a fault, which the pager allows after telling. arm protects again.
 *     hash    each chunk's bytes are compared with what the remote has, by a hash of them.
 *
 * A note that was cleared and not told yet is known to nobody but the collect that runs: so only one runs at a time, and
 * whoever wants all stores told waits for it and then runs its own. What could not be told stays in `suspect`.
 *
 * The kernel's notes are in the page table, and a page that leaves it takes its note along. Of shared memory any page may
 * (its huge page is split, or reclaimed), which is why that is tracked in other ways; of private memory one that is all
 * zeros, when its huge page is split. The write-protection of a clean page is kept, though. So in a chunk that was filled
 * completely (`whole`), a page that is absent, or the kernel's page of zeros, has been stored into.
 *
 * Hashes settle what the notes cannot: pages that were moved in count as written until they are looked at (`fresh`), and an
 * eviction must not drop a store that nobody has noted. hash[i] is of the bytes that the remote has in chunk i, as they
 * were filled in or read for a push (a push that fails leaves the chunk dirty, and then nobody asks); 0: not known.
 *
 * Direct I/O into a page pins it when it begins and changes it when it ends. A push in between has read the old bytes and
 * armed the page, and no note tells of the change. So pushes of the last seconds are compared once more.
 */
#define _GNU_SOURCE
#include "frontend/memory_int.h"

#include "base/clock.h"
#include "base/hash.h"
#include "base/io.h"
#include "base/pool.h"

#include <stdlib.h>
#include <sys/mman.h>

#define TRACK_RECENT (10 * FAR_SEC)
#define TRACK_BLOCK (64 * FAR_KIB) /* of a push that is looked at once more */
#define TRACK_SUSPECTS 4096
#define TRACK_POPULATE_WRITE 23 /* MADV_POPULATE_WRITE, 5.14 */

/* ------------------------------------------------------------------------------------------------------------- hashes */

uint64_t far_mem_hash(const void *buf, uint64_t len)
{
	uint64_t h = far_hash64(buf, (size_t)len);
	return h ? h : 1;
}

static void track_set(struct far_memory *m, uint64_t i, uint64_t h)
{
	atomic_store_explicit(&m->hash[i], h, memory_order_release);
}

void far_mem_differs(struct far_memory *m, uint64_t off)
{
	if (m->hash && off < m->c.bytes)
		track_set(m, off >> m->c.shift, 0);
}

/* Whole chunks in buf are what the remote has; a part of one is nothing that could be compared. */
static void track_same(struct far_memory *m, uint64_t off, const char *buf, uint64_t len)
{
	for (uint64_t at = 0; at < len;) {
		uint64_t i = (off + at) >> m->c.shift, all = far_mem_chunk_len(m, i);
		bool whole = (off + at) == i << m->c.shift && len - at >= all;
		uint64_t n = whole ? all : far_min(len - at, ((i + 1) << m->c.shift) - (off + at));
		track_set(m, i, whole ? far_mem_hash(buf + at, all) : 0);
		at += n;
	}
}

/* Which chunks are zero: what is missing there need not be asked for. */
static void track_zero(struct far_memory *m, uint64_t off, const char *buf, uint64_t len)
{
	for (uint64_t at = 0; at < len; at += far_mem_chunk(m)) {
		uint64_t i = (off + at) >> m->c.shift, bit = (uint64_t)1 << (i % 64);
		if (far_is_zero(buf + at, (size_t)far_min(far_mem_chunk(m), len - at)))
			atomic_fetch_or_explicit(&m->zero[i / 64], bit, memory_order_release);
		else
			atomic_fetch_and_explicit(&m->zero[i / 64], ~bit, memory_order_release);
	}
}

static void track_bits(_Atomic uint64_t *bits, uint64_t first, uint64_t end, bool set)
{
	for (uint64_t i = first; bits && i < end; i++) {
		uint64_t bit = (uint64_t)1 << (i % 64);
		if (set)
			atomic_fetch_or_explicit(&bits[i / 64], bit, memory_order_release);
		else if (atomic_load_explicit(&bits[i / 64], memory_order_relaxed) & bit)
			atomic_fetch_and_explicit(&bits[i / 64], ~bit, memory_order_release);
	}
}

static bool track_bit(const _Atomic uint64_t *bits, uint64_t i)
{
	return bits && (atomic_load_explicit(&bits[i / 64], memory_order_acquire) >> (i % 64) & 1);
}

/* Whether it was set; it is not any more. */
static bool track_bit_take(_Atomic uint64_t *bits, uint64_t i)
{
	uint64_t bit = (uint64_t)1 << (i % 64);

	return track_bit(bits, i) && (atomic_fetch_and_explicit(&bits[i / 64], ~bit, memory_order_acq_rel) & bit);
}

void far_mem_whole(struct far_memory *m, uint64_t off, uint64_t len)
{
	uint64_t end = off + len >= m->c.bytes ? far_div_up(m->c.bytes, far_mem_chunk(m)) : (off + len) >> m->c.shift;

	track_bits(m->whole, far_div_up(off, far_mem_chunk(m)), end, true);
}

void far_mem_not_whole(struct far_memory *m, uint64_t off, uint64_t len)
{
	uint64_t end = far_min(off + len, m->c.bytes);

	if (off < end)
		track_bits(m->whole, off >> m->c.shift, ((end - 1) >> m->c.shift) + 1, false);
}

static void track_came(void *self, uint64_t off, const void *buf, uint64_t len)
{
	struct far_memory *m = self;

	if (m->zero)
		track_zero(m, off, buf, len);
	if (!m->hash)
		return;
	if (far_mem_is_staged(m, off, buf, len))
		track_bits(m->fresh, off >> m->c.shift, (off + len) >> m->c.shift, true);
	if (m->c.evicts || m->c.tracking == FAR_TRACK_HASH || far_mem_is_staged(m, off, buf, len))
		track_same(m, off, buf, len);
	else
		for (uint64_t at = off; at < off + len; at += far_mem_chunk(m))
			far_mem_differs(m, at);
}

static void track_remember_push(struct far_memory *m, uint64_t off, const char *buf, uint64_t len)
{
	uint64_t now = far_now();

	for (uint64_t at = 0, n; at < len; at += n) {
		n = far_min(len - at, TRACK_BLOCK - (off + at) % TRACK_BLOCK);
		uint64_t h = far_mem_hash(buf + at, n);
		far_mutex_lock(&m->lock);
		unsigned k = m->n_recent++ % MEM_RECENT;
		m->recent[k].off = off + at;
		m->recent[k].len = n;
		m->recent[k].hash = h;
		m->recent[k].at = now;
		far_mutex_unlock(&m->lock);
	}
}

static void track_pushed(void *self, uint64_t off, const void *buf, uint64_t len)
{
	struct far_memory *m = self;

	if (m->hash)
		track_same(m, off, buf, len);
	track_remember_push(m, off, buf, len);
}

/* More than can be remembered: then everything is looked at. */
void far_memory_suspect(struct far_memory *m, uint64_t off, uint64_t len)
{
	far_mutex_lock(&m->lock);
	if (m->suspect.n >= TRACK_SUSPECTS || far_mem_add_locked(&m->suspect, off, len))
		atomic_store(&m->lost_track, true);
	far_mutex_unlock(&m->lock);
}

/* --------------------------------------------------------------------------------------------------------------- arm */

static int track_nothing(void *opaque, uint64_t addr, uint64_t len)
{
	return 0;
}

static int track_arm_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct far_memory *m = opaque;
	uint64_t pages = far_div_up(len, MEM_PAGE) * MEM_PAGE;
	int err = 0;

	if (!addr)
		return 0;
	if (m->c.tracking == FAR_TRACK_ASYNC)
		err = far_uffd_written(m->c.pagemap, addr, pages, true, track_nothing, NULL);
	else if (m->c.tracking == FAR_TRACK_SYNC)
		err = far_uffd_protect(m->c.uffd, addr, pages, true, 0);
	/* It counts as written still, or as unprotected: then it is told as stored and pushed once more, nothing is lost. */
	if (err && err != -ENOENT && err != -ESRCH)
		far_memory_suspect(m, off, len);
	return 0;
}

static void track_arm(void *self, uint64_t off, uint64_t len)
{
	uint64_t from = off / MEM_PAGE * MEM_PAGE;

	far_mem_each(self, from, off + len - from, track_arm_piece, self);
}

static int track_there_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct far_memory *m = opaque;
	bool here[64];

	for (uint64_t n; addr && len; addr += n, len -= n) {
		n = far_min(len, FAR_ARRAY_LEN(here) * MEM_PAGE);
		int err = m->c.mechanism == FAR_MECH_CONTINUE ? far_uffd_mapped(m->c.pagemap, addr, n, here)
							      : far_uffd_present(m->c.pagemap, addr, n, here);
		for (uint64_t k = 0; k < n / MEM_PAGE && !err; k++)
			err = here[k] ? 0 : -ENOENT;
		if (err)
			return err;
	}
	return addr ? 0 : -ENOENT;
}

static bool track_there(void *self, uint64_t off, uint64_t len)
{
	uint64_t from = off / MEM_PAGE * MEM_PAGE, end = far_div_up(off + len, MEM_PAGE) * MEM_PAGE;

	/* To the kernel a poisoned page is there, and written. */
	return !far_mem_is_poisoned(self, from, end - from) && far_mem_each(self, from, end - from, track_there_piece, self) == 0;
}

/* ----------------------------------------------------------------------------------------------------------- collect */

/* The process that had the memory has ended, or it has another now. */
static bool track_lost(struct far_memory *m)
{
	bool here;
	uint64_t n, addr = far_memory_addr(m, 0, &n);

	return m->c.foreign && far_uffd_present(m->c.pagemap, addr, MEM_PAGE, &here) == -ESRCH;
}

/* Whether [off, off+len), inside one chunk, is known to hold what `hash` is of. */
static bool track_is(struct far_memory *m, struct far_region *r, uint64_t off, uint64_t len, uint64_t hash)
{
	char *buf = hash ? far_buf_get((size_t)len) : NULL;
	bool same = false;

	if (buf && far_region_hold(r, off)) {
		int err = far_mem_read(m, off, buf, (size_t)len, 0);
		same = err ? track_lost(m) : far_mem_hash(buf, len) == hash; /* nobody stores into what is gone */
		far_region_release(r, off);
	}
	far_buf_put(buf, (size_t)len);
	return same;
}

/* [off, off+len) may have been stored; noted: the kernel says so. What cannot be told now is told later. */
static int track_tell(struct far_memory *m, struct far_region *r, uint64_t off, uint64_t len, bool noted)
{
	uint64_t end = far_min(off + len, m->c.bytes);
	int err = 0;

	while (off < end && !err) {
		uint64_t i = off >> m->c.shift, n = far_min(end, (i + 1) << m->c.shift) - off;
		uint64_t h = m->hash ? atomic_load_explicit(&m->hash[i], memory_order_acquire) : 0;
		/* What was moved in counts as written all at once: look at each chunk, once. */
		if (noted && !track_bit_take(m->fresh, i))
			h = 0;
		if (!h || !track_is(m, r, i << m->c.shift, far_mem_chunk_len(m, i), h))
			err = far_region_stored(r, off, n, 0, NULL, NULL);
		if (err)
			far_memory_suspect(m, off, end - off);
		off += n;
	}
	return err;
}

struct track_scan {
	struct far_memory *m;
	uint64_t addr, off; /* of the piece */
	bool whole;         /* its chunks are */
	struct mem_runs found;
};

static int track_found(void *opaque, uint64_t addr, uint64_t len)
{
	struct track_scan *s = opaque;

	if (far_mem_add_locked(&s->found, s->off + (addr - s->addr), len))
		atomic_store(&s->m->lost_track, true);
	return 0;
}

static int track_scan_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct track_scan *s = opaque;

	if (!addr)
		return 0;
	s->addr = addr;
	s->off = off;
	return (s->whole ? far_uffd_written_whole : far_uffd_written)(s->m->c.pagemap, addr, len, true, track_found, s);
}

/* Pages of chunks of one kind after the other. */
static int track_scan_pages(struct track_scan *s)
{
	struct far_memory *m = s->m;
	uint64_t chunks = far_div_up(m->pages_len, far_mem_chunk(m));
	int err = 0;

	for (uint64_t i = 0, end; i < chunks; i = end) {
		s->whole = track_bit(m->whole, i);
		for (end = i + 1; end < chunks && track_bit(m->whole, end) == s->whole; end++)
			;
		uint64_t off = i << m->c.shift;
		int e = far_mem_each(m, off, far_min(end << m->c.shift, m->pages_len) - off, track_scan_piece, s);
		/* Unmapped or moved meanwhile, or gone with its process: the next look finds it where it is. */
		err = err ? err : e == -ESRCH || e == -ENOENT ? 0 : e;
	}
	return err;
}

static int track_scan(struct far_memory *m, struct far_region *r)
{
	struct track_scan s = { .m = m };
	int err = track_scan_pages(&s);

	for (size_t k = 0; k < s.found.n; k++) { /* all of it, or it would be forgotten */
		int e = track_tell(m, r, s.found.v[k].off, s.found.v[k].len, true);
		err = err ? err : e;
	}
	free(s.found.v);
	return err;
}

/* Compare everything that is local; without hashes all of it counts as stored. */
static int track_compare_all(struct far_memory *m, struct far_region *r)
{
	uint64_t chunks = far_div_up(m->c.bytes, far_mem_chunk(m));
	int err = 0;

	for (uint64_t i = 0; i < chunks && !err; i++) {
		uint64_t off = i << m->c.shift;
		if (far_region_hold(r, off)) {
			far_region_release(r, off);
			err = track_tell(m, r, off, far_mem_chunk_len(m, i), false);
			continue;
		}
		/* Pages that came before the rest, which failed or is on its way: nobody knows whether they were stored. */
		for (uint64_t at = off, end = off + far_mem_chunk_len(m, i); at < end && !err; at += MEM_PAGE)
			if (track_there(m, at, 1))
				err = far_region_stored(r, at, far_min(MEM_PAGE, end - at), 0, NULL, NULL);
	}
	return err;
}

/* The last pushes once more: direct I/O may have ended after they read. */
static int track_again(struct far_memory *m, struct far_region *r)
{
	uint64_t now = far_now();
	int err = 0;

	for (unsigned k = 0; k < MEM_RECENT && !err; k++) {
		far_mutex_lock(&m->lock);
		uint64_t off = m->recent[k].off, len = m->recent[k].len, h = m->recent[k].hash;
		bool due = len && now - m->recent[k].at < TRACK_RECENT;
		if (!due)
			m->recent[k].len = 0;
		far_mutex_unlock(&m->lock);
		bool local = due && far_region_hold(r, off);
		if (local)
			far_region_release(r, off);
		if (!local || track_is(m, r, off, len, h))
			continue;
		far_mutex_lock(&m->lock);
		if (m->recent[k].off == off && m->recent[k].hash == h)
			m->recent[k].len = 0;
		far_mutex_unlock(&m->lock);
		err = far_region_stored(r, off, len, 0, NULL, NULL);
		if (err)
			far_memory_suspect(m, off, len);
	}
	return err;
}

/* What MADV_FREE has left here stays: the kernel must not take it later, when nobody looks. */
static int track_keep_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct far_memory *m = opaque;
	bool here[64];

	for (uint64_t at = 0, n; addr && at < len; at += n) {
		uint64_t pages = far_min(far_div_up(len - at, MEM_PAGE), FAR_ARRAY_LEN(here)), k = 0;
		n = pages * MEM_PAGE;
		if (far_uffd_present(m->c.pagemap, addr + at, n, here))
			return 0;
		while (k < pages) {
			uint64_t first = k;
			for (; k < pages && here[k] == here[first]; k++)
				;
			if (here[first]) /* a kernel before 5.14 cannot; then it may become zero, as MADV_FREE says */
				madvise((void *)(uintptr_t)(addr + at + first * MEM_PAGE), (size_t)((k - first) * MEM_PAGE),
					TRACK_POPULATE_WRITE);
		}
	}
	return 0;
}

static int track_suspects(struct far_memory *m, struct far_region *r)
{
	struct mem_runs s;
	int err = 0;

	far_mutex_lock(&m->lock);
	s = m->suspect;
	m->suspect = (struct mem_runs){ 0 };
	far_mutex_unlock(&m->lock);
	for (size_t k = 0; k < s.n; k++) {
		if (m->ours && m->c.mechanism != FAR_MECH_CONTINUE)
			far_mem_each(m, s.v[k].off, s.v[k].len, track_keep_piece, m);
		int e = far_region_stored(r, s.v[k].off, s.v[k].len, 0, NULL, NULL);
		if (e)
			far_memory_suspect(m, s.v[k].off, s.v[k].len);
		err = err ? err : e;
	}
	free(s.v);
	if (atomic_exchange(&m->lost_track, false)) {
		int e = track_compare_all(m, r);
		if (e)
			atomic_store(&m->lost_track, true);
		err = err ? err : e;
	}
	return err;
}

static int track_collect(void *self, struct far_region *r)
{
	struct far_memory *m = self;
	int err = 0, e;

	if (m->c.tracking == FAR_TRACK_NONE)
		return 0;
	far_mutex_lock(&m->lock);
	while (m->collecting && !err)
		err = far_cond_wait_until(&m->changed, &m->lock, far_deadline()) ? 0 : -ETIMEDOUT;
	if (!err)
		m->collecting = true; /* no eviction begins from now on */
	while (m->evictions && !err) /* microseconds */
		far_cond_wait(&m->changed, &m->lock);
	far_mutex_unlock(&m->lock);
	if (err)
		return err;

	far_mem_drops_look(m);
	err = track_suspects(m, r);
	e = track_again(m, r);
	err = err ? err : e;
	if (m->c.tracking == FAR_TRACK_ASYNC)
		e = track_scan(m, r);
	else if (m->c.tracking == FAR_TRACK_HASH)
		e = track_compare_all(m, r);
	err = err ? err : e;

	far_mutex_lock(&m->lock);
	m->collecting = false;
	far_cond_broadcast(&m->changed);
	far_mutex_unlock(&m->lock);
	return err;
}

/* --------------------------------------------------------------------------------------------------------------- open */

void far_mem_track_open(struct far_memory *m)
{
	m->calls = (struct far_region_memory){
		.self = m,
		.collect = track_collect,
		.arm = track_arm,
		.there = track_there,
		.pushed = track_pushed,
		.wants_whole = m->hash || m->zero,
		.came = track_came,
		.stage = m->ours && (m->c.mechanism == FAR_MECH_MOVE ||
				     (m->c.mechanism == FAR_MECH_CONTINUE && m->c.tracking == FAR_TRACK_NONE)) ? far_mem_stage : NULL,
		.unstage = far_mem_unstage,
		.zeros = far_mem_zeros,
	};
}
