/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Giving clean chunks back under a program that may store into them at any moment.
 *
 * The pages are taken away from the program in one step (moved into the attic, where nobody can store), and only then
 * looked at. If they are what the remote has they are let go, else they are put back and the next collect tells. With
 * synchronous tracking a clean chunk's pages are protected, so none of this is needed. What the remote has, and what is
 * suspect, is told by memory_track.c.
 */
#define _GNU_SOURCE
#include "frontend/memory_int.h"

#include "base/clock.h"
#include "base/pool.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

#define EVICT_ATTIC (4 * FAR_MIB)

/* A place of `len` bytes in the attic, empty. */
static char *evict_attic_locked(struct far_memory *m, uint64_t len) FAR_REQUIRES(m->attic_lock)
{
	if (!m->attic) {
		uint64_t all = far_max(EVICT_ATTIC, far_mem_chunk(m));
		void *p = mmap(NULL, (size_t)all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (p == MAP_FAILED)
			return NULL;
		madvise(p, (size_t)all, MADV_DONTFORK);
		madvise(p, (size_t)all, MADV_NOHUGEPAGE);
		if (far_uffd_register(m->c.uffd, (uint64_t)(uintptr_t)p, all, FAR_UFFD_MISSING)) {
			munmap(p, (size_t)all);
			return NULL;
		}
		m->attic_len = all;
		m->attic = p;
	}
	if (m->attic_at + len > m->attic_len) {
		if (madvise(m->attic, (size_t)m->attic_len, MADV_DONTNEED))
			return NULL;
		m->attic_at = 0;
	}
	return m->attic + m->attic_at;
}

/* The pages of [addr, addr+len) are at `to` now, in the attic: read them, missing ones are zero. */
static bool evict_attic_is(struct far_memory *m, const char *at, uint64_t off, uint64_t len, uint64_t hash, uint64_t epoch)
{
	bool here[16];
	char *buf = far_buf_get((size_t)len);
	int err = buf ? 0 : -ENOMEM;

	for (uint64_t k = 0; k < len && !err; k += sizeof here * MEM_PAGE) {
		uint64_t pages = far_min(far_div_up(len - k, MEM_PAGE), FAR_ARRAY_LEN(here));
		err = far_uffd_present(m->c.pagemap, (uint64_t)(uintptr_t)at + k, pages * MEM_PAGE, here);
		for (uint64_t p = 0; p < pages && !err; p++) {
			size_t n = (size_t)far_min(MEM_PAGE, len - k - p * MEM_PAGE);
			if (here[p])
				memcpy(buf + k + p * MEM_PAGE, at + k + p * MEM_PAGE, n);
			else
				memset(buf + k + p * MEM_PAGE, 0, n);
		}
	}
	bool same = !err && far_mem_hash(buf, len) == hash;
	if (same && m->c.victim)
		far_victim_put(m->c.victim, off, buf, len, epoch);
	far_buf_put(buf, (size_t)len);
	return same;
}

/*
 * Pages that the eviction found changed go back, however long that takes. The program may have dropped some of them while
 * they were in the attic, and found nothing to drop: what is being dropped stays behind, as zeros. No event is read while it
 * is looked which those are.
 */
static void evict_put_back(struct far_memory *m, uint64_t off, char *at, uint64_t pages)
{
	uint64_t old = far_deadline(), src = (uint64_t)(uintptr_t)at, from, to, n;
	unsigned turns = 0;

	far_deadline_restore(FAR_NEVER);
	for (uint64_t done = 0; done < pages; done += n) {
		far_mem_fill_begin(m);
		if (!far_mem_kept(m, off + done, off + pages, true, &from, &to)) {
			far_mem_fill_end(m);
			break;
		}
		done = from - off;
		uint64_t together, addr = far_memory_addr(m, from, &together); /* it may have been moved */
		uint64_t len = far_min(to - from, together);
		n = addr ? 0 : len;
		int e = addr ? far_uffd_move(m->c.uffd, addr, src + done, len, FAR_UFFD_ONCE, &n) : 0;
		/* Nothing may be lost: by copying, which needs no more than memory. What is not in the attic is not touched there:
		 * whoever reads events would have to answer. */
		if (e && e != -EAGAIN && e != -EEXIST && !n)
			e = far_mem_look(m, src + done) != -EEXIST ? -EEXIST
								   : far_uffd_copy(m->c.uffd, addr, at + done, MEM_PAGE, FAR_UFFD_ONCE, &n);
		far_mem_fill_end(m);
		if (e == -EAGAIN) {
			turns = n ? 0 : turns;
			far_uffd_wait(&turns);
		} else if (e && !n) {
			FAR_ASSERT(e == -EEXIST || e == -ENOENT);
			n = MEM_PAGE;
		}
	}
	far_deadline_restore(old);
}

static int evict_moving_locked(struct far_memory *m, uint64_t addr, uint64_t off, uint64_t len, uint64_t hash,
				     uint64_t epoch)
	FAR_REQUIRES(m->attic_lock)
{
	uint64_t pages = far_div_up(len, MEM_PAGE) * MEM_PAGE, done;
	char *at = evict_attic_locked(m, pages);

	if (!at)
		return -EBUSY;
	far_mem_not_whole(m, off, len);
	int err = far_uffd_move(m->c.uffd, (uint64_t)(uintptr_t)at, addr, pages, 0, &done);
	/* After a failure in the middle (a page that is pinned or locked), too. */
	if (!err && evict_attic_is(m, at, off, len, hash, epoch)) {
		m->attic_at += pages;
		return 0;
	}
	evict_put_back(m, off, at, pages);
	m->attic_at += pages; /* what could not be moved back lies there until the attic is cleared */
	far_memory_suspect(m, off, len);
	return -EBUSY;
}

static int evict_alias(struct far_memory *m, uint64_t addr, uint64_t off, uint64_t len, uint64_t hash, uint64_t epoch)
{
	uint64_t pages = far_div_up(len, MEM_PAGE) * MEM_PAGE;
	far_mem_not_whole(m, off, len);
	int err = far_mem_drop(m, addr, pages); /* only the program's view of it */

	if (!err && far_mem_hash(m->c.alias + off, len) == hash) {
		if (m->c.victim)
			far_victim_put(m->c.victim, off, m->c.alias + off, len, epoch);
		return fallocate(m->c.shared, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)pages) ? -errno : 0;
	}
	far_memory_suspect(m, off, len);
	return -EBUSY;
}

/* While pages are in the attic a collect would not see what was stored there. */
static bool evict_begin(struct far_memory *m)
{
	far_mutex_lock(&m->lock);
	bool may = !m->collecting;
	m->evictions += may;
	far_mutex_unlock(&m->lock);
	return may;
}

static void evict_end(struct far_memory *m)
{
	far_mutex_lock(&m->lock);
	if (--m->evictions == 0)
		far_cond_broadcast(&m->changed);
	far_mutex_unlock(&m->lock);
}

/* A suspect is told before it may go; and what the program drops. */
static bool evict_is_suspect(struct far_memory *m, uint64_t off, uint64_t len)
{
	uint64_t from, to, end = off + len;
	bool is = far_mem_drops_late(m, off, len) || !far_mem_kept(m, off, end, true, &from, &to) || from != off || to != end;

	far_mutex_lock(&m->lock);
	for (size_t k = 0; k < m->suspect.n && !is; k++)
		is = m->suspect.v[k].off < off + len && off < m->suspect.v[k].off + m->suspect.v[k].len;
	far_mutex_unlock(&m->lock);
	return is || atomic_load(&m->lost_track);
}

/* What nobody can store into is dropped as it is. */
static int evict_still(struct far_memory *m, uint64_t addr, uint64_t off, uint64_t len, uint64_t epoch)
{
	uint64_t pages = far_div_up(len, MEM_PAGE) * MEM_PAGE, n;
	/* A half-written chunk has gaps, which are not zero. */
	char *buf = m->c.victim && m->calls.there(m, off, len) ? far_buf_get((size_t)len) : NULL;
	bool read = buf && far_mem_read(m, off, buf, (size_t)len, 0) == 0;
	/* A hole is punched into locked memory, too: the program's view goes first, if it may. */
	int err = m->c.mechanism == FAR_MECH_CONTINUE && addr && far_memory_addr(m, off, &n) == addr
		  ? far_mem_drop(m, addr, far_min(n, pages)) : 0;

	if (!err)
		err = far_memory_drop(m, off, pages);
	if (!err && read)
		far_victim_put(m->c.victim, off, buf, len, epoch);
	far_buf_put(buf, (size_t)len);
	return err == -EINVAL ? -EBUSY : err; /* locked in memory */
}

static int evict_chunk(struct far_memory *m, uint64_t off, uint64_t len, uint64_t epoch)
{
	uint64_t n, addr = far_memory_addr(m, off, &n), i = off >> m->c.shift;
	uint64_t pages = far_div_up(len, MEM_PAGE) * MEM_PAGE;
	int err;

	if (evict_is_suspect(m, off, len)) /* it is told first */
		return -EBUSY;
	if (m->c.tracking == FAR_TRACK_NONE || m->c.tracking == FAR_TRACK_SYNC)
		return evict_still(m, addr, off, len, epoch);
	uint64_t h = m->hash ? atomic_load_explicit(&m->hash[i], memory_order_acquire) : 0;
	if (!m->hash) /* nobody keeps what the remote has, so none can be given back */
		return -EBUSY;
	if (!h) { /* nobody knows what the remote has: push it, then it is known */
		far_memory_suspect(m, off, len);
		return -EBUSY;
	}
	if (!addr || n < pages || off != i << m->c.shift || len != far_mem_chunk_len(m, i))
		return -EBUSY;
	if (m->c.mechanism == FAR_MECH_CONTINUE)
		return evict_alias(m, addr, off, len, h, epoch);
	if (!(m->c.have & FAR_UFFD_MOVE))
		return -EBUSY;
	far_mutex_lock(&m->attic_lock);
	err = evict_moving_locked(m, addr, off, len, h, epoch);
	far_mutex_unlock(&m->attic_lock);
	return err;
}

int far_mem_evict(struct far_memory *m, uint64_t off, uint64_t len)
{
	uint64_t epoch = m->c.victim ? far_victim_epoch(m->c.victim) : 0;

	if (m->c.victim && far_victim_spare(m->c.victim, off))
		return -EBUSY;
	if (!evict_begin(m))
		return -EBUSY;
	int err = evict_chunk(m, off, len, epoch);
	evict_end(m);
	return err;
}
