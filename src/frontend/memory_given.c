/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Pages that a program drops while others are filled in; another process' memory, and how it is left.
 *
 * When the program of another process drops pages (a balloon, madvise) they are zero from then on; `gone` has a bit for each. A fill passes them
 * over, a touch finds zeros. If it was not handed over as writable its stores are its own business, and the region has
 * nothing to do with any of that; else it is told as well. Of memory of ours that is tracked the ranges that are being
 * dropped are known until the region has been told. The kernel lets the program go on, and so drop the pages, as soon as
 * the event has been read; a fill that had looked at either before and reached the kernel after would bring old bytes back,
 * and the program could read them. So reading events and filling exclude each other:
 *
 *     fill      filling++, look at `reading` (set: filling--, wait), look at those, one ioctl that does not wait, filling--
 *     read      reading = true, wait for filling == 0, read and note, reading = false
 *
 * A fill that the kernel turns away until an event has been read waits outside, or the reader would wait for it.
 */
#define _GNU_SOURCE
#include "frontend/memory_int.h"

#include "base/clock.h"

#include <stdlib.h>

#define GIVEN_PIECE (64 * FAR_KIB) /* of a fill at once: the reader of events waits so long */
#define GIVEN_SHOWN (512 * FAR_KIB) /* the same, where pages are only shown */

int far_mem_given_open(struct far_memory *m)
{
	m->apart = m->c.foreign || m->c.tracking != FAR_TRACK_NONE;
	if (!m->c.foreign || !(m->c.have & FAR_UFFD_EVENTS))
		return 0;
	m->gone = calloc((size_t)(m->pages_len / MEM_PAGE / 64 + 1), sizeof *m->gone);
	return m->gone ? 0 : -ENOMEM;
}

bool far_memory_is_gone(struct far_memory *m, uint64_t off)
{
	uint64_t i = off / MEM_PAGE;

	return m->gone && off < m->pages_len && atomic_load_explicit(&m->gone[i / 64], memory_order_acquire) >> (i % 64) & 1;
}

bool far_memory_forget(struct far_memory *m, uint64_t addr, uint64_t len)
{
	uint64_t off;

	if (!m->gone)
		return false;
	for (uint64_t at = addr; at < addr + len; at += MEM_PAGE)
		if (far_memory_off(m, at, &off))
			atomic_fetch_or_explicit(&m->gone[off / MEM_PAGE / 64], (uint64_t)1 << (off / MEM_PAGE % 64), memory_order_release);
	return m->c.tracking == FAR_TRACK_NONE;
}

void far_memory_reading(struct far_memory *m, bool begin)
{
	if (!m->apart)
		return;
	atomic_store(&m->reading, begin); /* in one order with `filling`: each sees the other */
	for (unsigned n = 0; begin && atomic_load(&m->filling); n++)
		n < 200 ? far_cpu_relax() : far_thread_yield(); /* it may want this CPU */
}

void far_mem_fill_begin(struct far_memory *m)
{
	for (;;) {
		atomic_fetch_add(&m->filling, 1);
		if (!atomic_load(&m->reading))
			return;
		atomic_fetch_sub(&m->filling, 1);
		while (atomic_load_explicit(&m->reading, memory_order_acquire))
			far_thread_yield();
	}
}

void far_mem_fill_end(struct far_memory *m)
{
	atomic_fetch_sub(&m->filling, 1);
}

/* From `off` on what the program has not dropped, or is not dropping now: [*from, *to). False: nothing before end. */
static bool given_kept(struct far_memory *m, uint64_t off, uint64_t end, uint64_t *from, uint64_t *to)
{
	if (!m->gone)
		return far_mem_kept(m, off, end, false, from, to);
	while (off < end && far_memory_is_gone(m, off))
		off += MEM_PAGE;
	*from = *to = off;
	while (*to < end && !far_memory_is_gone(m, *to))
		*to += MEM_PAGE;
	return off < end;
}

/* What is gone, or leaves now, is passed over. */
int far_mem_guarded_fill(struct far_memory *m, uint64_t addr, uint64_t off, const char *src, uint64_t len)
{
	unsigned turns = 0, flags = FAR_UFFD_ONCE | (m->arms ? FAR_UFFD_ARM : 0);
	int err = 0;

	for (uint64_t at = 0, from, to, done; at < len && !err; at += done) {
		done = far_min(len - at, src ? GIVEN_PIECE : GIVEN_SHOWN);
		far_mem_fill_begin(m);
		if (given_kept(m, off + at, off + at + done, &from, &to)) {
			at = from - off;
			done = to - from;
			err = src ? far_uffd_copy(m->c.uffd, addr + at, src + at, done, flags, &done)
				  : far_uffd_continue(m->c.uffd, addr + at, done, flags, &done);
		}
		far_mem_fill_end(m);
		turns = err == -EAGAIN && !done ? turns : 0;
		if (err == -EEXIST) /* the program has it already */
			done += MEM_PAGE;
		if (err == -EEXIST)
			err = 0;
		else if (err == -EAGAIN)
			err = far_uffd_wait(&turns);
	}
	return err;
}

/* Zeros ahead of a fault, as far as nothing is there; none where the program drops pages, or has yet to do so. */
void far_mem_guarded_zeros(struct far_memory *m, uint64_t addr, uint64_t off, const char *zeros, uint64_t len)
{
	uint64_t from, to, done;

	far_mem_fill_begin(m);
	if (far_mem_kept(m, off, off + len, true, &from, &to) && from == off)
		far_uffd_copy(m->c.uffd, addr, zeros, to - off, FAR_UFFD_ONCE | (m->arms ? FAR_UFFD_ARM : 0), &done);
	far_mem_fill_end(m);
}

/* ------------------------------------------------------------------------------------------------ leaving it */

/* One page that is missing: zero, if that is what it is, else SIGBUS from now on. */
static int given_leave_page(struct far_memory *m, struct far_region *r, uint64_t addr, uint64_t off)
{
	int err = -ENODATA;

	if (off >= m->c.bytes || far_memory_is_gone(m, off)) {
		err = far_memory_appear(m, addr);
	} else if (far_region_hold(r, off)) {
		err = far_memory_appear(m, addr);
		far_region_release(r, off);
	}
	return err ? far_memory_poison(m, addr, MEM_PAGE) : 0;
}

/* Which pages of [addr, addr+len) are there. Without a pagemap nobody knows: then each is asked for. */
static int given_present(struct far_memory *m, uint64_t addr, uint64_t len, bool *here)
{
	if (m->c.pagemap >= 0)
		return far_uffd_present(m->c.pagemap, addr, len, here);
	for (uint64_t k = 0; k < len / MEM_PAGE; k++)
		here[k] = false;
	return 0;
}

void far_memory_leave(struct far_memory *m, struct far_region *r)
{
	bool here[64], all = m->c.have & FAR_UFFD_POISON;
	int err = 0;

	if (!all) /* it would be zeros; touches wait for who takes the memory over, or for ever */
		return;
	for (uint64_t off = 0, n; off < m->pages_len && !err; off += n) {
		uint64_t together, addr = far_memory_addr(m, off, &together);
		n = far_min(far_min(m->pages_len - off, together), sizeof here * MEM_PAGE);
		if (!addr)
			continue;
		err = given_present(m, addr, n, here);
		for (uint64_t k = 0; k < n / MEM_PAGE && !err; k++)
			if (!here[k])
				err = given_leave_page(m, r, addr + k * MEM_PAGE, off + k * MEM_PAGE);
	}
	/* Nothing is missing any more, so it can be ordinary memory again. */
	for (uint64_t off = 0, n; off < m->pages_len && !err; off += n) {
		uint64_t addr = far_memory_addr(m, off, &n);
		n = far_min(m->pages_len - off, n);
		if (addr)
			far_uffd_unregister(m->c.uffd, addr, n);
	}
	if (err && err != -ESRCH)
		far_log(FAR_LOG_ERROR, "memory of another process cannot be left in order (%s): touches of absent pages wait there",
			far_strerror(err));
}
