/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A program's memory as a local store. The chunk map above says which chunks are local; here is only what the kernel
 * says of pages:
 *
 *     missing   a touch is a fault. In a chunk that is not local: to be fetched. In one that is: zero (with CONTINUE:
 *               whatever the second mapping has there).
 *     present   the program's. Nobody but the program changes it, other than to drop it.
 *     poisoned  a touch raises SIGBUS. A fill replaces it.
 *
 * A fill never replaces a page that is present: UFFDIO_COPY and its kin refuse, and what they refuse is passed over. So a
 * store that happens while the rest of a chunk is still on its way cannot be lost.
 *
 * Addresses change when the program moves pieces (mremap): `table` is replaced as a whole, readers take no lock.
 */
#define _GNU_SOURCE
#include "frontend/memory_int.h"

#include "base/clock.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static const _Alignas(4096) char mem_zeros[64 * 1024];

/* ------------------------------------------------------------------------------------------------------------- where */

uint64_t far_memory_addr(struct far_memory *m, uint64_t off, uint64_t *len)
{
	const struct mem_table *t = atomic_load_explicit(&m->table, memory_order_acquire);

	for (size_t k = 0; k < t->n; k++) {
		const struct far_handover_range *r = &t->range[k];
		if (off - r->off < r->len) {
			*len = r->len - (off - r->off);
			return r->addr ? r->addr + (off - r->off) : 0;
		}
	}
	*len = UINT64_MAX;
	return 0;
}

bool far_memory_off(struct far_memory *m, uint64_t addr, uint64_t *off)
{
	const struct mem_table *t = atomic_load_explicit(&m->table, memory_order_acquire);

	for (size_t k = 0; k < t->n; k++) {
		const struct far_handover_range *r = &t->range[k];
		if (r->addr && addr - r->addr < r->len) {
			*off = r->off + (addr - r->addr);
			return true;
		}
	}
	return false;
}

int far_mem_each(struct far_memory *m, uint64_t off, uint64_t len,
		 int (*fn)(void *opaque, uint64_t addr, uint64_t off, uint64_t len), void *opaque)
{
	int err = 0;

	while (len && !err) {
		uint64_t n, addr = far_memory_addr(m, off, &n);
		n = far_min(n, len);
		err = fn(opaque, addr, off, n);
		off += n;
		len -= n;
	}
	return err;
}

/* ------------------------------------------------------------------------------------------------------------- lists */

int far_mem_add_locked(struct mem_runs *r, uint64_t off, uint64_t len)
{
	if (r->n && r->v[r->n - 1].off + r->v[r->n - 1].len == off) {
		r->v[r->n - 1].len += len;
		return 0;
	}
	if (r->n == r->cap) {
		size_t cap = r->cap ? 2 * r->cap : 16;
		struct mem_run *v = reallocarray(r->v, cap, sizeof *v);
		if (!v)
			return -ENOMEM;
		r->v = v;
		r->cap = cap;
	}
	r->v[r->n++] = (struct mem_run){ off, len };
	return 0;
}

/* Take [off, off+len) out of what the list has; how many bytes that were. */
uint64_t far_mem_cut_locked(struct mem_runs *r, uint64_t off, uint64_t len)
{
	uint64_t end = off + len, cut = 0;

	for (size_t k = 0; k < r->n;) {
		uint64_t a = r->v[k].off, b = a + r->v[k].len, from = far_max(a, off), to = far_min(b, end);
		if (from >= to) {
			k++;
			continue;
		}
		cut += to - from;
		r->v[k] = r->v[--r->n];
		/* There was room for one; a second rest that finds none is only in the way of a list that shrinks. */
		if (a < from)
			r->v[r->n++] = (struct mem_run){ a, from - a };
		if (to < b && far_mem_add_locked(r, to, b - to))
			break;
	}
	return cut;
}

/* ------------------------------------------------------------------------------------------------------------- filling */

struct mem_fill {
	struct far_memory *m;
	const char *buf;  /* of offset `base` on */
	uint64_t base, done;
	bool staged;
};

/* Pages of an alias that the program does not have yet become visible. */
static int mem_fill_alias(struct far_memory *m, uint64_t addr, uint64_t off, const char *src, uint64_t len)
{
	bool here[64];
	int err = 0;

	if (far_mem_fill_huge(m, addr, off, src, len))
		return 0;
	for (uint64_t at = 0, n; at < len && !err; at += n) {
		uint64_t pages = far_min((len - at) / MEM_PAGE, FAR_ARRAY_LEN(here)), k = 0, done;
		n = pages * MEM_PAGE;
		err = far_uffd_mapped(m->c.pagemap, addr + at, n, here);
		while (!err && k < pages) {
			uint64_t from = k;
			for (; k < pages && here[k] == here[from]; k++)
				;
			if (here[from])
				continue;
			if (src != m->c.alias + off)
				memcpy(m->c.alias + off + at + from * MEM_PAGE, src + at + from * MEM_PAGE,
				       (size_t)((k - from) * MEM_PAGE));
			uint64_t first = at + from * MEM_PAGE, n_shown = (k - from) * MEM_PAGE;
			err = m->apart ? far_mem_guarded_fill(m, addr + first, off + first, NULL, n_shown)
				       : far_uffd_continue(m->c.uffd, addr + first, n_shown, 0, &done);
			if (err == -EEXIST) /* nobody else fills it; it was there and not seen, by a kernel that had taken it away */
				err = 0;
		}
	}
	return err;
}

static int mem_fill_copy(struct far_memory *m, uint64_t addr, const char *src, uint64_t len)
{
	int err = 0;

	for (uint64_t at = 0, done; at < len && (!err || err == -EEXIST); at += done) {
		err = far_uffd_copy(m->c.uffd, addr + at, src + at, len - at, m->arms ? FAR_UFFD_ARM : 0, &done);
		if (err == -EEXIST)
			done += MEM_PAGE; /* the program has it already */
		else if (!err)
			done = len - at;
	}
	return err == -EEXIST ? 0 : err;
}

/* What was at `addr` is not there any more, and the event that says why has been read or will be in a moment: bytes that
 * were on their way must follow a piece that has moved, or it would be zero at its new place. */
static bool mem_moved(struct far_memory *m, uint64_t addr, uint64_t off)
{
	uint64_t until = far_now() + (m->c.have & FAR_UFFD_EVENTS ? FAR_SEC : 0), now, n;

	while ((now = far_memory_addr(m, off, &n)) == addr && far_now() < until)
		far_sleep_until(far_now() + 100 * FAR_USEC, false);
	return now && now != addr;
}

/* What the program drops must not come back by a fill that was on its way. */
static int mem_fill_apart(struct mem_fill *f, uint64_t addr, uint64_t off, uint64_t len)
{
	struct far_memory *m = f->m;
	char *src = (char *)(uintptr_t)f->buf + (off - f->base);
	uint64_t done = 0, from, to;
	int err = -EAGAIN;

	if (f->staged && !(addr % FAR_STAGE) && !(len % FAR_STAGE)) {
		far_mem_fill_begin(m);
		if (far_mem_kept(m, off, off + len, false, &from, &to) && from == off && to == off + len)
			err = far_mem_fill_moved(m, addr, src, len, FAR_UFFD_ONCE, &done);
		far_mem_fill_end(m);
	}
	return err ? far_mem_guarded_fill(m, addr + done, off + done, src + done, len - done) : 0;
}

static int mem_fill_kept(struct mem_fill *f, uint64_t addr, uint64_t off, uint64_t len)
{
	const char *src = f->buf + (off - f->base);
	uint64_t done = 0;
	int err = -EINVAL;

	if (f->m->c.mechanism == FAR_MECH_CONTINUE) {
		err = mem_fill_alias(f->m, addr, off, src, len);
	} else {
		if (f->staged && !(addr % FAR_STAGE) && !(len % FAR_STAGE))
			err = far_mem_fill_moved(f->m, addr, (char *)(uintptr_t)src, len, 0, &done);
		if (err)
			err = mem_fill_copy(f->m, addr + done, src + done, len - done);
	}
	return err;
}

static int mem_fill_one(struct mem_fill *f, uint64_t addr, uint64_t off, uint64_t len)
{
	uint64_t end = off + len, from, to;
	int err = 0;

	if (!addr) /* the program has unmapped it */
		return 0;
	if (f->m->apart && f->m->c.mechanism != FAR_MECH_CONTINUE)
		err = mem_fill_apart(f, addr, off, len);
	else if (!atomic_load_explicit(&f->m->drops, memory_order_acquire) || f->m->c.mechanism != FAR_MECH_CONTINUE)
		err = mem_fill_kept(f, addr, off, len);
	else
		for (uint64_t at = off; !err && far_mem_kept(f->m, at, end, false, &from, &to); at = to)
			err = mem_fill_kept(f, addr + (from - off), from, to - from);
	return err;
}

/*
 * -ENOENT is said of what was unmapped or moved since we looked, but also of a range that is not one mapping of the kernel's
 * any more: the program may have changed the protection of a page in the middle, locked it, given advice. So it is done page
 * by page then; what is still refused, and still ours, is an error: a page that did not come must not count as zeros.
 */
static int mem_fill_mapped(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct mem_fill *f = opaque;
	int err = mem_fill_one(f, addr, off, len);
	uint64_t n;

	for (uint64_t at = 0; err == -ENOENT && at < len; at += MEM_PAGE) {
		int e = mem_fill_one(f, addr + at, off + at, MEM_PAGE);
		if (e == -ENOENT && mem_moved(f->m, addr + at, off + at))
			return -ESTALE;
		if (e == -ENOENT && far_memory_addr(f->m, off + at, &n)) /* it is still there */
			return -EFAULT;
		if (e && e != -ENOENT)
			return e == -ESRCH ? 0 : e;
		if (at + MEM_PAGE >= len)
			return 0;
	}
	return err == -ESRCH ? 0 : err; /* gone with its process */
}

/* All pieces; after a move from the beginning, pages that are there already are passed over. */
static int mem_fill_pieces(struct mem_fill *f, uint64_t off, uint64_t len)
{
	int err;

	do
		err = far_mem_each(f->m, off, len, mem_fill_mapped, f);
	while (err == -ESTALE);
	return err;
}

bool far_mem_is_staged(struct far_memory *m, uint64_t off, const void *buf, uint64_t len)
{
	return m->c.mechanism == FAR_MECH_MOVE && !(off % FAR_STAGE) && !(len % FAR_STAGE) && !((uintptr_t)buf % FAR_STAGE);
}

static int mem_fill_now(struct far_memory *m, uint64_t off, const char *buf, uint64_t len)
{
	uint64_t whole = len / MEM_PAGE * MEM_PAGE;
	struct mem_fill f = { .m = m, .buf = buf, .base = off, .staged = far_mem_is_staged(m, off, buf, len) };
	_Alignas(64) char tail[MEM_PAGE];

	if (off % MEM_PAGE || (whole != len && off + len != m->c.bytes))
		return -EINVAL;
	if (atomic_load_explicit(&m->n_poison, memory_order_acquire))
		far_memory_heal(m, off, far_mem_page_up(len));
	int err = whole ? mem_fill_pieces(&f, off, whole) : 0;
	bool all = !m->gone && !atomic_load_explicit(&m->drops, memory_order_acquire); /* nothing was passed over */
	if (!err && whole == len && all)
		far_mem_whole(m, off, len);
	if (err || whole == len)
		return err;
	memcpy(tail, buf + whole, (size_t)(len - whole));
	memset(tail + (len - whole), 0, (size_t)(MEM_PAGE - (len - whole)));
	f = (struct mem_fill){ .m = m, .buf = tail, .base = off + whole };
	err = mem_fill_pieces(&f, off + whole, MEM_PAGE);
	if (!err && all)
		far_mem_whole(m, off, len);
	return err;
}

/* Where poison is another mapping, none must come over a page that appears at this moment. */
static int mem_fill(struct far_memory *m, uint64_t off, const char *buf, uint64_t len)
{
	if (m->c.have & FAR_UFFD_POISON)
		return mem_fill_now(m, off, buf, len);
	for (;;) {
		atomic_fetch_add(&m->unpoisoned, 1);
		if (!far_mem_is_poisoned(m, off, far_mem_page_up(len)))
			break;
		atomic_fetch_sub(&m->unpoisoned, 1);
		int err = far_memory_heal(m, off, far_mem_page_up(len));
		if (err)
			return err;
	}
	int err = mem_fill_now(m, off, buf, len);
	atomic_fetch_sub(&m->unpoisoned, 1);
	return err;
}

/* --------------------------------------------------------------------------------------------- bytes that are there */

struct mem_io {
	struct far_memory *m;
	char *buf;
	const char *from;
	uint64_t base;
};

static int mem_foreign(int fd, uint64_t addr, char *buf, const char *from, uint64_t len)
{
	while (len) {
		ssize_t n = buf ? pread(fd, buf, (size_t)len, (off_t)addr) : pwrite(fd, from, (size_t)len, (off_t)addr);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -EIO;
		addr += (uint64_t)n;
		len -= (uint64_t)n;
		buf = buf ? buf + n : NULL;
		from = from ? from + n : NULL;
	}
	return 0;
}

/* Through the kernel: the program may unmap or poison it under our hands, and an error is better than its SIGBUS. */
static int mem_ours(uint64_t addr, char *buf, uint64_t len)
{
	while (len) {
		struct iovec to = { buf, (size_t)len }, from = { (void *)(uintptr_t)addr, (size_t)len };
		ssize_t n = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
		if (n < 0 && (errno == ENOSYS || errno == EPERM)) { /* a sandbox */
			memcpy(buf, (const void *)(uintptr_t)addr, (size_t)len);
			return 0;
		}
		if (n <= 0)
			return n < 0 && errno == ENOMEM ? -ENOMEM : -EIO;
		addr += (uint64_t)n;
		buf += n;
		len -= (uint64_t)n;
	}
	return 0;
}

/* Whole pages; what is not there is zero. */
static int mem_read_pages(struct far_memory *m, uint64_t addr, char *buf, uint64_t len)
{
	uint64_t page = addr / MEM_PAGE * MEM_PAGE, end = far_mem_page_up(addr + len);
	bool here[64];
	int err = 0;

	while (page < end && !err) {
		uint64_t pages = far_min((end - page) / MEM_PAGE, FAR_ARRAY_LEN(here)), k = 0;
		err = far_uffd_present(m->c.pagemap, page, pages * MEM_PAGE, here);
		while (!err && k < pages) {
			uint64_t first = k;
			for (; k < pages && here[k] == here[first]; k++)
				;
			uint64_t from = far_max(addr, page + first * MEM_PAGE), to = far_min(addr + len, page + k * MEM_PAGE);
			char *out = buf + (from - addr);
			if (!here[first])
				memset(out, 0, (size_t)(to - from));
			else if (m->ours)
				err = mem_ours(from, out, to - from);
			else
				err = mem_foreign(m->c.mem, from, out, NULL, to - from);
		}
		page += pages * MEM_PAGE;
	}
	return err;
}

static int mem_read_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct mem_io *io = opaque;
	struct far_memory *m = io->m;
	char *out = io->buf + (off - io->base);

	if (m->c.mechanism == FAR_MECH_CONTINUE && m->c.alias) {
		memcpy(out, m->c.alias + off, (size_t)len);
		return 0;
	}
	if (!addr) /* unmapped while it was dirty, at least beside it: what the remote has is all that is left */
		return m->c.remote ? far_read(m->c.remote, off, out, (size_t)len, 0) : -EFAULT;
	return mem_read_pages(m, addr, out, len);
}

/* What was read while the program changed its mappings may be another mapping's, or of a hole: once more then. */
int far_mem_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct far_memory *m = self;
	struct mem_io io = { .m = m, .buf = buf, .base = off };
	const struct mem_table *t;
	int err;

	do {
		t = atomic_load_explicit(&m->table, memory_order_acquire);
		err = far_mem_each(m, off, len, mem_read_piece, &io);
		if (m->c.settle)
			m->c.settle(m->c.opaque);
	} while (t != atomic_load_explicit(&m->table, memory_order_acquire));
	return err;
}

/* The page at addr exists from now on. */
static int mem_exist(struct far_memory *m, uint64_t addr)
{
	uint64_t done, off;
	int err;

	if (m->c.mechanism == FAR_MECH_CONTINUE) {
		if (!far_memory_off(m, addr, &off))
			return 0;
		(void)*(volatile char *)(m->c.alias + off);
		if (!m->apart)
			return far_uffd_continue(m->c.uffd, addr, MEM_PAGE, 0, &done);
		err = far_mem_guarded_fill(m, addr, off / MEM_PAGE * MEM_PAGE, NULL, MEM_PAGE);
		return err ? err : far_uffd_wake(m->c.uffd, addr, MEM_PAGE); /* it may have been passed over: then it is asked for again */
	}
	return far_uffd_copy(m->c.uffd, addr, mem_zeros, MEM_PAGE, m->arms ? FAR_UFFD_ARM : 0, &done);
}

static int mem_write_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct mem_io *io = opaque;
	struct far_memory *m = io->m;
	const char *from = io->from + (off - io->base);

	for (uint64_t page = addr / MEM_PAGE * MEM_PAGE; addr && page < addr + len; page += MEM_PAGE) {
		int err = mem_exist(m, page);
		if (err && err != -EEXIST)
			return err;
	}
	if (m->c.mechanism == FAR_MECH_CONTINUE)
		memcpy(m->c.alias + off, from, (size_t)len);
	else if (addr && m->ours)
		memcpy((void *)(uintptr_t)addr, from, (size_t)len);
	else if (addr)
		return mem_foreign(m->c.mem, addr, NULL, from, len);
	return 0;
}

static int mem_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct mem_io io = { .m = self, .from = buf, .base = off };

	if (flags & FAR_FILL)
		return mem_fill(self, off, buf, len);
	for (uint64_t at = off; at < off + len; at += far_mem_chunk(self))
		far_mem_differs(self, at);
	far_mem_differs(self, off + len - 1);
	return far_mem_each(self, off, len, mem_write_piece, &io);
}

static int mem_flush(void *self)
{
	(void)self;
	return 0;
}

/* ------------------------------------------------------------------------------------------------------------ dropping */

static int mem_drop_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct far_memory *m = opaque;

	far_mem_not_whole(m, off, len);
	if (m->c.mechanism == FAR_MECH_CONTINUE)
		return fallocate(m->c.shared, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len) ? -errno : 0;
	return addr ? far_mem_drop(m, addr, len) : 0;
}

int far_memory_drop(struct far_memory *m, uint64_t off, uint64_t len)
{
	return m->ours ? far_mem_each(m, off, len, mem_drop_piece, m) : -EOPNOTSUPP;
}

/* Zeros: whole pages are dropped, so that they appear as zeros again; the rest is overwritten. */
static int mem_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct far_memory *m = self;
	uint64_t end = off + len, a = far_min(far_mem_page_up(off), end);
	uint64_t b = end == m->c.bytes ? far_mem_page_up(end) : end / MEM_PAGE * MEM_PAGE;
	int err = 0;

	if (!m->ours || a >= b)
		a = b = end;
	else
		err = far_memory_drop(m, a, b - a);
	if (err == -EINVAL) { /* locked in memory */
		a = b = end;
		err = 0;
	}
	for (uint64_t k = off; k < end; k += far_mem_chunk(m))
		far_mem_differs(m, k);
	for (uint64_t at = off; at < end && !err;) {
		uint64_t stop = at < a ? a : end, n = far_min(stop - at, sizeof mem_zeros);
		if (at >= a && at < b) {
			at = b;
			continue;
		}
		err = mem_write(m, at, mem_zeros, (size_t)n, flags & ~FAR_FILL);
		at += n;
	}
	return err;
}

static int mem_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return far_mem_evict(self, off, len);
}

/* --------------------------------------------------------------------------------------------------- single pages */

static bool mem_zero_chunk(struct far_memory *m, uint64_t off)
{
	uint64_t i = off >> m->c.shift;
	return atomic_load_explicit(&m->zero[i / 64], memory_order_acquire) >> (i % 64) & 1;
}

/* -EEXIST: it is there by now. */
int far_mem_look(struct far_memory *m, uint64_t addr)
{
	bool here = false;
	int err = m->c.pagemap < 0 ? 0 : far_uffd_present(m->c.pagemap, addr, MEM_PAGE, &here);
	return err ? err : here ? -EEXIST : -ENODATA;
}

int far_memory_appear(struct far_memory *m, uint64_t addr)
{
	uint64_t off, n;

	addr = addr / MEM_PAGE * MEM_PAGE;
	if (!far_memory_off(m, addr, &off))
		return far_uffd_wake(m->c.uffd, addr, MEM_PAGE);
	if (atomic_load_explicit(&m->n_poison, memory_order_acquire))
		far_memory_heal(m, off, MEM_PAGE);
	bool gone = far_memory_is_gone(m, off);
	bool zero = !m->zero || off >= m->c.bytes || gone || mem_zero_chunk(m, off);
	far_mem_drops_met(m, addr, off);
	int err = zero ? mem_exist(m, addr) : far_mem_look(m, addr);
	if (err == -EEXIST)
		return far_uffd_wake(m->c.uffd, addr, MEM_PAGE);
	if (err)
		return err == -ENOENT || err == -ESRCH ? 0 : err;
	if (gone) /* those around it are not */
		return 0;
	/* A run of zeros: those behind it are needed next. The first that is there ends it. */
	uint64_t chunk = far_mem_chunk(m), end = off / chunk * chunk + far_min(chunk, sizeof mem_zeros);
	end = far_min(end, m->pages_len);
	if (m->c.mechanism != FAR_MECH_CONTINUE && off + MEM_PAGE < end && far_memory_addr(m, off, &n)) {
		n = far_min(n, end - off) - MEM_PAGE;
		if (n)
			far_mem_guarded_zeros(m, addr + MEM_PAGE, off + MEM_PAGE, mem_zeros, n);
	}
	return 0;
}

/* --------------------------------------------------------------------------------------------------------- open, close */

static void mem_close(void *self) FAR_NO_TSA
{
	struct far_memory *m = self;

	for (struct mem_table *t = atomic_load(&m->table), *older; t; t = older) {
		older = t->older;
		free(t);
	}
	while (m->n_stage)
		munmap(m->stage[--m->n_stage], MEM_STAGE);
	if (m->attic)
		munmap(m->attic, (size_t)m->attic_len);
	free((void *)m->hash);
	free((void *)m->whole);
	free((void *)m->fresh);
	free((void *)m->zero);
	free((void *)m->gone);
	free(m->own.v);
	free(m->dropping.v);
	free(m->poison.v);
	free(m->suspect.v);
	free(m->drops_late);
	far_cond_fini(&m->changed);
	far_mutex_fini(&m->lock);
	far_mutex_fini(&m->attic_lock);
	far_mutex_fini(&m->heal_lock);
	far_mutex_fini(&m->stage_lock);
	free(m);
}

static const struct far_ops mem_ops = {
	FAR_OPS_INIT,
	.read = far_mem_read,
	.write = mem_write,
	.flush = mem_flush,
	.discard = mem_discard,
	.zero = mem_zero,
	.close = mem_close,
};

static int mem_table_first(struct far_memory *m, const struct far_memory_conf *conf)
{
	struct mem_table *t = malloc(sizeof *t + conf->n * sizeof t->range[0]);

	if (!t)
		return -ENOMEM;
	*t = (struct mem_table){ .n = conf->n };
	memcpy(t->range, conf->range, conf->n * sizeof t->range[0]);
	atomic_store(&m->table, t);
	return 0;
}

int far_memory_new(const struct far_memory_conf *conf, struct far_memory **out, struct far_backend **store)
{
	struct far_facts facts = { .size = sizeof facts, .caps = FAR_CAP_WRITE, .bytes = conf->bytes };
	uint64_t chunks = far_div_up(conf->bytes, (uint64_t)1 << conf->shift);
	struct far_memory *m = calloc(1, sizeof *m);

	if (!m)
		return -ENOMEM;
	m->c = *conf;
	m->c.range = NULL;
	m->ours = !conf->foreign;
	m->pages_len = far_mem_page_up(far_max(conf->bytes, 1));
	m->arms = conf->tracking == FAR_TRACK_ASYNC || conf->tracking == FAR_TRACK_SYNC;
	far_mutex_init(&m->lock);
	far_mutex_init(&m->attic_lock);
	far_mutex_init(&m->heal_lock);
	far_mutex_init(&m->stage_lock);
	far_cond_init(&m->changed);
	/* Where unseen stores can be told from what came only by looking at the bytes. */
	bool hashes = conf->tracking != FAR_TRACK_NONE && conf->tracking != FAR_TRACK_SYNC &&
		      (conf->tracking == FAR_TRACK_HASH || conf->mechanism == FAR_MECH_MOVE || conf->evicts);
	if (hashes)
		m->hash = calloc((size_t)far_max(chunks, 1), sizeof *m->hash);
	bool zeros = conf->tracking == FAR_TRACK_NONE && conf->mechanism != FAR_MECH_CONTINUE;
	if (zeros)
		m->zero = calloc((size_t)(chunks / 64 + 1), sizeof *m->zero);
	bool notes = conf->tracking == FAR_TRACK_ASYNC;
	if (notes) {
		m->whole = calloc((size_t)(chunks / 64 + 1), sizeof *m->whole);
		m->fresh = calloc((size_t)(chunks / 64 + 1), sizeof *m->fresh);
	}
	int err = (hashes && !m->hash) || (zeros && !m->zero) || (notes && (!m->whole || !m->fresh)) ? -ENOMEM
														      : mem_table_first(m, conf);
	if (!err)
		err = far_mem_given_open(m);
	far_mem_track_open(m);
	if (!err)
		err = far_backend_new(&mem_ops, m, &facts, store);
	if (err) {
		mem_close(m);
		return err;
	}
	*out = m;
	return 0;
}

const struct far_region_memory *far_memory_calls(struct far_memory *m)
{
	return &m->calls;
}
