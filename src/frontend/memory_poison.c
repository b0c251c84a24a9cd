/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Pages whose use raises SIGBUS, because what belongs there cannot be had: a mark of the kernel's (UFFDIO_POISON), or a
 * mapping of an empty file where it has none. `poison` has them by offset; n_poison is how many runs that are, so that
 * nobody takes a lock to find that there are none.
 *
 * A fill goes over the kernel's mark. The other kind has to go first, and must not come over a page that appears at the
 * same moment: a fill counts itself in `unpoisoned` and then looks; who poisons adds to the list and then waits for those
 * that are counted. heal_lock is held while mappings are replaced.
 */
#define _GNU_SOURCE
#include "frontend/memory_int.h"

#include "base/clock.h"

#include <sys/mman.h>
#include <unistd.h>

/* Without UFFDIO_POISON: a mapping of an empty file, whose use raises SIGBUS as well. */
static int poison_map(struct far_memory *m, uint64_t addr, uint64_t len)
{
	int fd = memfd_create("farpage-poison", MFD_CLOEXEC);
	int err = fd < 0 ? -errno : far_mem_own_begin(m, addr, len);

	if (!err && mmap((void *)(uintptr_t)addr, (size_t)len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
		err = -errno;
		far_mem_own_cancel(m, addr, len);
	}
	if (fd >= 0)
		close(fd);
	return err ? err : far_uffd_wake(m->c.uffd, addr, len);
}

/* Memory again, which must not be touched before it is registered: until then it may not be accessed. */
static int poison_unmap(struct far_memory *m, uint64_t addr, uint64_t off, uint64_t len)
{
	void *at = (void *)(uintptr_t)addr;
	bool shared = m->c.mechanism == FAR_MECH_CONTINUE, writable = m->c.tracking != FAR_TRACK_NONE;
	unsigned modes = FAR_UFFD_MISSING | (shared ? FAR_UFFD_MINORS : 0) | (m->arms ? FAR_UFFD_PROTECT : 0);

	if (mmap(at, (size_t)len, PROT_NONE, MAP_FIXED | (shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE),
		 shared ? m->c.shared : -1, shared ? (off_t)off : 0) == MAP_FAILED)
		return -errno;
	madvise(at, (size_t)len, MADV_DONTFORK);
	int err = far_uffd_register(m->c.uffd, addr, len, modes);
	if (!err && mprotect(at, (size_t)len, PROT_READ | (writable || m->c.mechanism == FAR_MECH_MOVE ? PROT_WRITE : 0)))
		err = -errno;
	return err;
}

static void poison_cut(struct far_memory *m, uint64_t off, uint64_t len)
{
	far_mutex_lock(&m->lock);
	far_mem_cut_locked(&m->poison, off, len);
	atomic_store_explicit(&m->n_poison, (unsigned)m->poison.n, memory_order_release);
	far_mutex_unlock(&m->lock);
}

/* A page of shared memory that was write-protected leaves a mark when it goes, and the kernel refuses to poison that. */
static int poison_mark(struct far_memory *m, uint64_t addr, uint64_t len)
{
	uint64_t done = 0;
	bool here = true;
	int err = far_uffd_poison(m->c.uffd, addr, len, &done);

	if (err != -EEXIST || m->c.mechanism != FAR_MECH_CONTINUE || !m->arms)
		return err;
	if (far_uffd_mapped(m->c.pagemap, addr, MEM_PAGE, &here) || here)
		return -EEXIST;
	far_uffd_protect(m->c.uffd, addr, len, false, FAR_UFFD_NO_WAKE);
	return far_uffd_poison(m->c.uffd, addr, len, &done);
}

int far_memory_poison(struct far_memory *m, uint64_t addr, uint64_t len)
{
	uint64_t off;
	int err;

	if (!far_memory_off(m, addr, &off))
		return far_uffd_wake(m->c.uffd, addr, len);
	if (!(m->c.have & FAR_UFFD_POISON) && !m->ours)
		return -EOPNOTSUPP;
	far_uffd_will_wait();
	far_mutex_lock(&m->heal_lock);
	far_mutex_lock(&m->lock);
	err = far_mem_add_locked(&m->poison, off, len);
	atomic_store_explicit(&m->n_poison, (unsigned)m->poison.n, memory_order_release);
	far_mutex_unlock(&m->lock);
	if (err) {
		far_mutex_unlock(&m->heal_lock);
		return err;
	}
	/* From now on a fill heals first, and waits for us; those that began before must be through. */
	while (!(m->c.have & FAR_UFFD_POISON) && atomic_load(&m->unpoisoned))
		far_sleep_until(far_now() + 20 * FAR_USEC, false);
	if (m->c.have & FAR_UFFD_POISON)
		err = poison_mark(m, addr, len);
	else if (far_mem_look(m, addr) == -EEXIST) /* the mapping would replace what is there */
		err = -EEXIST;
	else
		err = poison_map(m, addr, len);
	if (err) { /* it came while we gave up, or it is gone */
		poison_cut(m, off, len);
		far_uffd_wake(m->c.uffd, addr, len);
	}
	far_mutex_unlock(&m->heal_lock);
	return err == -EEXIST || err == -ENOENT || err == -ESRCH ? 0 : err;
}

static int poison_heal_piece(void *opaque, uint64_t addr, uint64_t off, uint64_t len)
{
	struct far_memory *m = opaque;
	int err = 0;

	for (uint64_t at = off; at < off + len && !err; at += MEM_PAGE) {
		if (!far_mem_is_poisoned(m, at, MEM_PAGE))
			continue;
		/* A fill goes over the kernel's own mark; the empty file has to go first, and only then the note of it: who finds
		 * none fills. */
		if (addr && !(m->c.have & FAR_UFFD_POISON))
			err = poison_unmap(m, addr + (at - off), at, MEM_PAGE);
		if (!err)
			poison_cut(m, at, MEM_PAGE);
	}
	return err;
}

int far_memory_heal(struct far_memory *m, uint64_t off, uint64_t len)
{
	if (!far_mem_is_poisoned(m, off, len))
		return 0;
	far_uffd_will_wait(); /* whoever has the lock may wait for an event to be read */
	far_mutex_lock(&m->heal_lock);
	int err = far_mem_each(m, off, len, poison_heal_piece, m);
	far_mutex_unlock(&m->heal_lock);
	return err;
}

bool far_memory_marks(const struct far_memory *m)
{
	return m->c.have & FAR_UFFD_POISON;
}

uint64_t far_memory_poisoned(struct far_memory *m)
{
	uint64_t sum = 0;

	far_mutex_lock(&m->lock);
	for (size_t k = 0; k < m->poison.n; k++)
		sum += m->poison.v[k].len;
	far_mutex_unlock(&m->lock);
	return sum;
}

bool far_mem_is_poisoned(struct far_memory *m, uint64_t off, uint64_t len)
{
	uint64_t at;

	return atomic_load_explicit(&m->n_poison, memory_order_acquire) && far_memory_next_poison(m, off, off + len, &at);
}

bool far_memory_has_poison(const struct far_memory *m)
{
	return atomic_load_explicit(&m->n_poison, memory_order_relaxed) != 0;
}

bool far_memory_next_poison(struct far_memory *m, uint64_t from, uint64_t end, uint64_t *off)
{
	bool found = false;

	far_mutex_lock(&m->lock);
	for (size_t k = 0; k < m->poison.n; k++) {
		uint64_t a = far_max(m->poison.v[k].off, from), b = m->poison.v[k].off + m->poison.v[k].len;
		if (a < far_min(b, end) && (!found || a < *off)) {
			*off = a;
			found = true;
		}
	}
	far_mutex_unlock(&m->lock);
	return found;
}
