/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Pages that leave: dropped by us, dropped by the program, unmapped or moved by it.
 *
 * Dropping pages makes the kernel tell us that pages were dropped, as if the program had done it. `own` holds what we drop
 * ourselves until that event has come.
 *
 * What the program drops of writable memory is zero from then on. The kernel lets it go on, to drop the pages, as soon as
 * the event has been read, and does not say when that is done:
 *
 *     event read      `dropping`: fills leave the range alone, faults there wait; the range is also in `drops_late`
 *     told            far_memory_discarded(): the region knows that it is zero; faults and fills go on
 *     seen            a page is absent, when a collect looks or a fault meets it: told once more, for a push may have read
 *                     it before. Gone from `drops_late`, page by page
 *
 * Until then the chunk is not evicted: pushed as it was and let go, it would come back from the remote as it was. No page
 * there may come back, as zeros, without being seen: a fault meets it, and the zeros that are brought ahead of faults stop
 * before it. After MADV_FREE the pages stay until memory is short; so after DROP_LATE they count as seen.
 */
#define _GNU_SOURCE
#include "frontend/memory_int.h"

#include "base/clock.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DROP_LATE (60 * FAR_SEC) /* a thread with nothing but idle time was seen to need four */
#define DROP_SOON (2 * FAR_MSEC) /* is waited for, so that a program that drops much has few late ones */

/* --------------------------------------------------------------------------------------------------------- dropped by us */

/* Before a call that makes the kernel report what we do. */
int far_mem_own_begin(struct far_memory *m, uint64_t addr, uint64_t len)
{
	if (!(m->c.have & FAR_UFFD_EVENTS))
		return 0;
	far_mutex_lock(&m->lock);
	int err = 0;
	if (m->own.n == m->own.cap) { /* never joined with a neighbour: each is taken out by its own events */
		size_t cap = m->own.cap ? 2 * m->own.cap : 16;
		struct mem_run *v = reallocarray(m->own.v, cap, sizeof *v);
		err = v ? 0 : -ENOMEM;
		m->own.v = v ? v : m->own.v;
		m->own.cap = v ? cap : m->own.cap;
	}
	if (!err)
		m->own.v[m->own.n++] = (struct mem_run){ addr, len };
	far_mutex_unlock(&m->lock);
	return err;
}

/* Whether a mapping of this process ends at addr. Seldom asked. */
static bool drop_vma_ends(uint64_t addr)
{
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	uint64_t x = 0;
	unsigned field = 0; /* of the line: 0 where it begins, 1 where it ends, 2 the rest */
	bool found = false;
	char buf[1024];
	ssize_t n;

	while (fd >= 0 && !found && (n = read(fd, buf, sizeof buf)) > 0)
		for (ssize_t k = 0; k < n && !found; k++) {
			char c = buf[k];
			if (c == '\n') {
				field = 0;
				x = 0;
			} else if (field < 2 && (c == '-' || c == ' ')) {
				found = field == 1 && x == addr;
				field++;
				x = 0;
			} else if (field < 2) {
				x = x << 4 | (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
			}
		}
	if (fd >= 0)
		close(fd);
	return found;
}

/* Whether this event is of a drop of ours. The kernel does not say whose it is, and the program may drop a part of the
 * same range at the same moment: ours is the one that is as long, or that ends where a mapping ends, for it reports each
 * mapping by itself, in order. */
static bool drop_own_take(struct far_memory *m, uint64_t addr, uint64_t len)
{
	bool ours = false, part = false;

	far_mutex_lock(&m->lock);
	for (size_t k = 0; k < m->own.n && !ours; k++) {
		struct mem_run *v = &m->own.v[k];
		ours = v->off == addr && v->len == len;
		part |= v->off == addr && v->len > len;
		if (ours)
			*v = m->own.v[--m->own.n];
	}
	far_mutex_unlock(&m->lock);
	if (ours || !part || !drop_vma_ends(addr + len))
		return ours;
	far_mutex_lock(&m->lock);
	for (size_t k = 0; k < m->own.n && !ours; k++) {
		struct mem_run *v = &m->own.v[k];
		if (v->off != addr || v->len <= len)
			continue;
		ours = true;
		v->off += len;
		v->len -= len;
	}
	far_mutex_unlock(&m->lock);
	return ours;
}

/* It failed in the middle: what is left of it will not be reported. */
void far_mem_own_cancel(struct far_memory *m, uint64_t addr, uint64_t len)
{
	far_mutex_lock(&m->lock);
	for (size_t k = 0; k < m->own.n; k++)
		if (m->own.v[k].off >= addr && m->own.v[k].off + m->own.v[k].len == addr + len) {
			m->own.v[k] = m->own.v[--m->own.n];
			break;
		}
	far_mutex_unlock(&m->lock);
}

/* Drop pages of this process, whatever is in them. */
int far_mem_drop(struct far_memory *m, uint64_t addr, uint64_t len)
{
	int err = far_mem_own_begin(m, addr, len);

	if (err)
		return err;
	if (madvise((void *)(uintptr_t)addr, (size_t)len, MADV_DONTNEED) == 0)
		return 0;
	err = -errno; /* locked memory: from there on nothing was dropped or reported */
	far_mem_own_cancel(m, addr, len);
	return err;
}

/* ------------------------------------------------------------------------------------------------ not seen to be done */

/* Of shared memory the bytes themselves are dropped by us. */
static bool drop_may_be_late(const struct far_memory *m)
{
	return m->c.mechanism != FAR_MECH_CONTINUE;
}

static bool drop_late_add_locked(struct far_memory *m, struct mem_drop d) FAR_REQUIRES(m->lock)
{
	if (m->n_drops_late == m->cap_drops_late) {
		size_t cap = m->cap_drops_late ? 2 * m->cap_drops_late : 16;
		struct mem_drop *v = reallocarray(m->drops_late, cap, sizeof *v);
		if (!v)
			return false;
		m->drops_late = v;
		m->cap_drops_late = cap;
	}
	m->drops_late[m->n_drops_late++] = d;
	return true;
}

static void drop_late_add(struct far_memory *m, uint64_t off, uint64_t end)
{
	struct mem_drop d = { off, end, far_now() };

	far_mutex_lock(&m->lock);
	if (!drop_late_add_locked(m, d))
		m->drops_unknown = d.at + DROP_LATE;
	atomic_store(&m->any_late, true);
	far_mutex_unlock(&m->lock);
}

/* [off, end) is told by the next collect, and late no more. Without memory to cut one in two it stays, and is told again. */
static void drop_seen(struct far_memory *m, uint64_t off, uint64_t end)
{
	far_memory_suspect(m, off, end - off);
	far_mutex_lock(&m->lock);
	for (size_t k = m->n_drops_late; k--;) { /* backwards: the last takes the place of one that ends */
		struct mem_drop d = m->drops_late[k];
		if (d.end <= off || end <= d.off)
			continue;
		if (d.off < off && end < d.end && !drop_late_add_locked(m, (struct mem_drop){ end, d.end, d.at }))
			continue;
		if (d.off < off)
			m->drops_late[k].end = off;
		else if (end < d.end)
			m->drops_late[k].off = end;
		else
			m->drops_late[k] = m->drops_late[--m->n_drops_late];
	}
	atomic_store(&m->any_late, m->n_drops_late || m->drops_unknown);
	far_mutex_unlock(&m->lock);
}

bool far_mem_drops_late(struct far_memory *m, uint64_t off, uint64_t len)
{
	if (!atomic_load(&m->any_late))
		return false;
	far_mutex_lock(&m->lock);
	bool late = m->drops_unknown != 0;
	for (size_t k = 0; k < m->n_drops_late && !late; k++)
		late = m->drops_late[k].off < off + len && off < m->drops_late[k].end;
	far_mutex_unlock(&m->lock);
	return late;
}

void far_mem_drops_met(struct far_memory *m, uint64_t addr, uint64_t off)
{
	if (far_mem_drops_late(m, off, MEM_PAGE) && far_mem_look(m, addr) == -ENODATA)
		drop_seen(m, off, off + MEM_PAGE);
}

/* Pages that are absent: they were dropped, or never were there. Nothing brings them back as they were. */
static int drop_look_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct far_memory *m = opaque;
	bool here[64];
	int err = 0;

	for (uint64_t at = 0, n; at < len && !err; at += n) {
		n = far_min(len - at, FAR_ARRAY_LEN(here) * MEM_PAGE);
		memset(here, 0, sizeof here); /* unmapped is dropped, too */
		err = addr ? far_uffd_present(m->c.pagemap, addr + at, n, here) : 0;
		for (uint64_t k = 0, first; k < n / MEM_PAGE && !err; k++) {
			for (first = k; k < n / MEM_PAGE && !here[k]; k++)
				;
			if (first < k)
				drop_seen(m, off + at + first * MEM_PAGE, off + at + k * MEM_PAGE);
		}
	}
	return err;
}

/* No eviction runs that began before this was late: it would have pages elsewhere for a moment. */
static void drop_look(struct far_memory *m, uint64_t off, uint64_t end)
{
	if (m->c.pagemap >= 0)
		far_mem_each(m, off, end - off, drop_look_piece, m); /* what cannot be told counts as there */
}

void far_mem_drops_look(struct far_memory *m)
{
	struct mem_drop *v = NULL;
	size_t n;

	if (!atomic_load(&m->any_late))
		return;
	far_mutex_lock(&m->lock);
	n = m->n_drops_late;
	if (n)
		v = malloc(n * sizeof *v);
	if (v)
		memcpy(v, m->drops_late, n * sizeof *v);
	/* Without memory for a list nobody knows: then all is told, each time. */
	if ((n && !v) || m->drops_unknown)
		atomic_store(&m->lost_track, true);
	if (m->drops_unknown && far_now() >= m->drops_unknown)
		m->drops_unknown = 0;
	atomic_store(&m->any_late, m->n_drops_late || m->drops_unknown);
	far_mutex_unlock(&m->lock);
	for (size_t k = 0; v && k < n; k++) {
		if (far_now() - v[k].at < DROP_LATE)
			drop_look(m, v[k].off, v[k].end);
		else
			drop_seen(m, v[k].off, v[k].end);
	}
	free(v);
}

/* ------------------------------------------------------------------------------------------------------- dropped by it */

/* One chunk's part is zero now. */
static int drop_tell(struct far_memory *m, struct far_region *r, uint64_t off, uint64_t len)
{
	bool held = far_region_hold(r, off);
	int err = far_region_stored(r, off, len, FAR_STORED_ZEROS, NULL, NULL);

	if (held)
		far_region_release(r, off);
	if (err || !m->ours || (held && m->c.mechanism != FAR_MECH_CONTINUE))
		return err;
	/* The kernel has dropped, of shared memory, only the program's view. And what was on its way when it dropped the pages
	 * may have come after that; from the first telling on nothing comes any more. */
	err = far_memory_drop(m, off, len);
	return err ? err : far_region_stored(r, off, len, FAR_STORED_ZEROS, NULL, NULL);
}

/*
 * Before the kernel drops the pages a push may read what is in them, so they are told once more by the next collect, and
 * again when they are seen to be absent. Faults there wait until this has ended. After MADV_FREE the program may go on
 * storing into pages that stay: so pages of a chunk that is local are not dropped here.
 */
int far_memory_discarded(struct far_memory *m, struct far_region *r, uint64_t off, uint64_t len)
{
	uint64_t end = far_min(off + len, m->c.bytes), down = off / MEM_PAGE * MEM_PAGE, up = far_mem_page_up(off + len), until;
	int err = 0;

	if (m->c.tracking == FAR_TRACK_NONE) /* read-only: it is only forgotten, the next touch brings it again */
		return 0;
	if (drop_may_be_late(m))
		drop_late_add(m, down, up);
	for (uint64_t at = off, n; at < end && !err; at += n) {
		n = far_min(end, at / far_mem_chunk(m) * far_mem_chunk(m) + far_mem_chunk(m)) - at;
		err = drop_tell(m, r, at, n);
	}
	if (off < end)
		far_memory_suspect(m, off, end - off);
	for (until = far_now() + DROP_SOON; far_now() < until && far_mem_drops_late(m, down, up - down);) {
		far_mutex_lock(&m->lock);
		bool still = m->evictions == 0; /* one that begins now sees that this is late */
		far_mutex_unlock(&m->lock);
		if (still)
			drop_look(m, down, up);
		far_sleep_until(far_now() + 50 * FAR_USEC, false);
	}
	return err;
}

void far_memory_dropping(struct far_memory *m, uint64_t off, uint64_t len)
{
	uint64_t down = off / MEM_PAGE * MEM_PAGE, up = far_mem_page_up(off + len);

	atomic_store_explicit(&m->drops, true, memory_order_release);
	far_mutex_lock(&m->lock);
	if (m->dropping.n == m->dropping.cap) { /* without memory for it what was there before may be seen again */
		size_t cap = m->dropping.cap ? 2 * m->dropping.cap : 16;
		struct mem_run *v = reallocarray(m->dropping.v, cap, sizeof *v);
		m->dropping.v = v ? v : m->dropping.v;
		m->dropping.cap = v ? cap : m->dropping.cap;
	}
	if (m->dropping.n < m->dropping.cap)
		m->dropping.v[m->dropping.n++] = (struct mem_run){ down, up - down };
	atomic_store(&m->any_dropping, m->dropping.n != 0);
	far_mutex_unlock(&m->lock);
}

bool far_memory_drops(const struct far_memory *m)
{
	return atomic_load_explicit(&m->drops, memory_order_relaxed);
}

void far_memory_dropped(struct far_memory *m, uint64_t off, uint64_t len)
{
	uint64_t down = off / MEM_PAGE * MEM_PAGE, up = far_mem_page_up(off + len);

	far_mutex_lock(&m->lock);
	for (size_t k = 0; k < m->dropping.n; k++)
		if (m->dropping.v[k].off == down && m->dropping.v[k].len == up - down) {
			m->dropping.v[k] = m->dropping.v[--m->dropping.n];
			break;
		}
	atomic_store(&m->any_dropping, m->dropping.n != 0);
	far_mutex_unlock(&m->lock);
}

/* [off, end) takes the place at *a away, or ends what can be taken from there. */
static bool drop_passes(uint64_t off, uint64_t end, uint64_t *a, uint64_t *b)
{
	bool passes = *a >= off && *a < end;

	if (passes)
		*a = end;
	else if (off > *a)
		*b = far_min(*b, off);
	return passes;
}

bool far_mem_kept(struct far_memory *m, uint64_t off, uint64_t end, bool late, uint64_t *from, uint64_t *to)
{
	*from = off;
	*to = end;
	if (!atomic_load(&m->any_dropping) && !(late && atomic_load(&m->any_late)))
		return off < end;
	far_mutex_lock(&m->lock);
	for (bool passed = true; passed;) {
		passed = false;
		*to = end;
		for (size_t k = 0; k < m->dropping.n; k++)
			passed |= drop_passes(m->dropping.v[k].off, m->dropping.v[k].off + m->dropping.v[k].len, from, to);
		for (size_t k = 0; late && k < m->n_drops_late; k++)
			passed |= drop_passes(m->drops_late[k].off, m->drops_late[k].end, from, to);
	}
	far_mutex_unlock(&m->lock);
	return *from < end;
}

/* ---------------------------------------------------------------------------------------- what the program changed */

/* The program drops pages, as soon as this has been read: its chunks are not whole any more. */
static void drop_dropping(struct far_memory *m, uint64_t addr, uint64_t len)
{
	for (uint64_t at = addr, off, n; at < addr + len; at += n) {
		if (far_memory_off(m, at, &off)) {
			far_memory_addr(m, off, &n);
			n = far_min(n, addr + len - at);
			far_mem_not_whole(m, off, n);
		} else {
			n = MEM_PAGE;
		}
	}
}

bool far_memory_removed(struct far_memory *m, uint64_t addr, uint64_t len)
{
	uint64_t attic = (uint64_t)(uintptr_t)m->attic;

	if (m->whole)
		drop_dropping(m, addr, len);
	return (attic && addr >= attic && addr < attic + m->attic_len) || drop_own_take(m, addr, len);
}

/* Put [off, off+len) at another address, 0: nowhere. Without memory for that the old table stays: then faults there are
 * not found, and wait. */
static void drop_place(struct far_memory *m, uint64_t off, uint64_t len, uint64_t to)
{
	struct mem_table *old = atomic_load_explicit(&m->table, memory_order_acquire);
	struct mem_table *t = malloc(sizeof *t + (3 * old->n + 1) * sizeof t->range[0]);
	uint64_t end = off + len;
	size_t n = 0;

	if (!t) {
		far_log(FAR_LOG_ERROR, "no memory to follow a change of mappings: touches of the moved range will wait");
		return;
	}
	for (size_t k = 0; k < old->n; k++) {
		struct far_handover_range r = old->range[k];
		uint64_t a = far_max(r.off, off), b = far_min(r.off + r.len, end);
		if (a >= b) {
			t->range[n++] = r;
			continue;
		}
		if (r.off < a)
			t->range[n++] = (struct far_handover_range){ r.addr, a - r.off, r.off };
		t->range[n++] = (struct far_handover_range){ to ? to + (a - off) : 0, b - a, a };
		if (b < r.off + r.len)
			t->range[n++] = (struct far_handover_range){ r.addr ? r.addr + (b - r.off) : 0, r.off + r.len - b, b };
	}
	t->n = n;
	t->older = old;
	atomic_store_explicit(&m->table, t, memory_order_release);
}

/* By address, which may cover several pieces. */
static void drop_replace(struct far_memory *m, uint64_t addr, uint64_t len, uint64_t to)
{
	for (uint64_t at = addr, off, n; at < addr + len; at += n) {
		if (!far_memory_off(m, at, &off)) {
			n = MEM_PAGE;
			continue;
		}
		far_memory_addr(m, off, &n);
		n = far_min(n, addr + len - at);
		far_mem_not_whole(m, off, n);
		drop_place(m, off, n, to ? to + (at - addr) : 0);
	}
}

void far_memory_unmapped(struct far_memory *m, uint64_t addr, uint64_t len)
{
	if (!drop_own_take(m, addr, len))
		drop_replace(m, addr, len, 0);
}

void far_memory_remapped(struct far_memory *m, uint64_t from, uint64_t to, uint64_t len)
{
	drop_replace(m, from, len, to);
}
