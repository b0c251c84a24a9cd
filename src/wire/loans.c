/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A reply to a long read is summed and sent from the store's own pages, which spares a copy: private memory lies in this
 * process anyway, a sealed memory file is mapped. A file is never lent: whoever cuts it would kill the server by SIGBUS.
 *
 * The sum goes before the bytes, and they are read once more when they are sent. So they must not change in between:
 *
 *  1. While a change runs (`changing`) nothing is lent. A change of what is on loan waits until it has been sent.
 *  2. A peer that takes nothing must not stop writers: after LOANS_PATIENCE the change is made. The peer then finds that
 *     the sum does not fit, and asks again in a way that is answered from a copy (far_loans_doubt). It is rare: to a
 *     connection on which replies pile up nothing is lent (far_session.stuck).
 *  3. Changes that the server does not make, by who shares the memory file or writes to the backend beside it, end in the
 *     same way. Nobody ever takes a wrong byte for a right one.
 *
 * Looking at a hole of a memory file would fill it: what is not all there is not lent. cachestat(2) tells that without
 * walking the page table, for a fifth of what mincore(2) takes; before Linux 6.5 it is mincore().
 *
 * The lock is innermost: sessions give loans back while they hold theirs.
 */
#define _GNU_SOURCE
#include "wire/loans.h"

#include "backend/backend.h"
#include "base/clock.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOANS_MIN ((size_t)32 << 10) /* below, a copy costs less than the look whether the pages are there */
#define LOANS_MAX ((size_t)4 << 20)
#define LOANS_PATIENCE (500 * FAR_MSEC)
#define LOANS_DOUBT (10 * FAR_SEC)
#define LOANS_PAGE ((uint64_t)4096)
#ifndef SYS_cachestat
#define SYS_cachestat 451 /* on every architecture */
#endif

struct far_loans {
	/* fixed */
	const char *base;
	void *mapped; /* NULL: somebody else's memory */
	int fd;       /* of what is mapped; the backend's */
	uint64_t size;

	struct far_mutex lock;
	struct far_cond returned;
	struct far_loan *list FAR_GUARDED_BY(lock);
	unsigned changing FAR_GUARDED_BY(lock), waiting FAR_GUARDED_BY(lock);
	uint64_t doubt FAR_GUARDED_BY(lock); /* nothing is lent before this time */
};

/* A memory file that cannot be cut. */
static void *loans_map(struct far_backend *b, uint64_t size, int *fd)
{
	if (!(far_facts(b)->caps & FAR_CAP_SHARE) || far_share(b, fd))
		return NULL;
	int seals = fcntl(*fd, F_GET_SEALS);
	if (seals < 0 || !(seals & F_SEAL_SHRINK))
		return NULL;
	void *map = mmap(NULL, size, PROT_READ, MAP_SHARED | MAP_NORESERVE, *fd, 0);
	if (map == MAP_FAILED)
		return NULL;
	madvise(map, size, MADV_DONTFORK);
	return map;
}

struct far_loans *far_loans_new(struct far_backend *b)
{
	uint64_t size = far_size(b);
	const char *base = far_heap_address(b);

	if (!size || sysconf(_SC_PAGESIZE) != (long)LOANS_PAGE)
		return NULL;
	int fd = -1;
	void *mapped = base ? NULL : loans_map(b, size, &fd);
	if (!base && !mapped)
		return NULL;
	struct far_loans *l = calloc(1, sizeof *l);
	if (!l) {
		if (mapped)
			munmap(mapped, size);
		return NULL;
	}
	l->base = base ? base : mapped;
	l->mapped = mapped;
	l->fd = fd;
	l->size = size;
	far_mutex_init(&l->lock);
	far_cond_init(&l->returned);
	return l;
}

void far_loans_free(struct far_loans *l) FAR_NO_TSA
{
	if (!l)
		return;
	FAR_ASSERT(!l->list && !l->changing);
	if (l->mapped)
		munmap(l->mapped, l->size);
	far_cond_fini(&l->returned);
	far_mutex_fini(&l->lock);
	free(l);
}

/* cachestat(2): how many of the n pages from `off` on are there; -1: this kernel does not tell. */
static int64_t loans_cached(const struct far_loans *l, uint64_t off, size_t n)
{
	struct {
		uint64_t off, len;
	} range = { off, n * LOANS_PAGE };
	struct {
		uint64_t cached, dirty, writeback, evicted, recently;
	} stat = { 0 };

	return syscall(SYS_cachestat, l->fd, &range, &stat, 0) ? -1 : (int64_t)stat.cached;
}

/* Whether all pages of the range are there. Private memory has no pages that could not be looked at. */
static bool loans_present(const struct far_loans *l, uint64_t off, size_t len)
{
	unsigned char there[LOANS_MAX / LOANS_PAGE + 1];
	size_t skip = (size_t)(off % LOANS_PAGE), n = (size_t)far_div_up(skip + len, LOANS_PAGE);

	if (!l->mapped)
		return true;
	int64_t cached = loans_cached(l, off - skip, n);
	if (cached >= 0)
		return (uint64_t)cached >= n;
	if (mincore((char *)l->mapped + off - skip, skip + len, there))
		return false;
	for (size_t i = 0; i < n; i++)
		if (!(there[i] & 1))
			return false;
	return true;
}

const void *far_loan_take(struct far_loans *l, uint64_t off, size_t len, struct far_loan *loan)
{
	loan->of = NULL;
	if (!l || len < LOANS_MIN || len > LOANS_MAX || off > l->size || len > l->size - off)
		return NULL;
	far_mutex_lock(&l->lock);
	bool lend = !l->changing && (!l->doubt || far_now() >= l->doubt);
	if (lend) {
		*loan = (struct far_loan){ l, off, len, false, l->list, &l->list };
		if (l->list)
			l->list->prev = &loan->next;
		l->list = loan;
	}
	far_mutex_unlock(&l->lock);
	if (!lend)
		return NULL;
	if (!loans_present(l, off, len)) { /* looked at only now: a discard cannot come in between */
		far_loan_return(loan);
		return NULL;
	}
	return l->base + off;
}

void far_loan_return(struct far_loan *loan)
{
	struct far_loans *l = loan->of;

	if (!l)
		return;
	far_mutex_lock(&l->lock);
	*loan->prev = loan->next;
	if (loan->next)
		loan->next->prev = loan->prev;
	if (l->waiting)
		far_cond_broadcast(&l->returned);
	far_mutex_unlock(&l->lock);
	loan->of = NULL;
}

void far_loans_doubt(struct far_loans *l)
{
	if (!l)
		return;
	far_mutex_lock(&l->lock);
	l->doubt = far_now() + LOANS_DOUBT;
	far_mutex_unlock(&l->lock);
}

/* Something of the range that is on loan and worth waiting for. */
static struct far_loan *loans_lent(struct far_loans *l, uint64_t off, uint64_t len) FAR_REQUIRES(l->lock)
{
	for (struct far_loan *i = l->list; i; i = i->next)
		if (!i->late && i->off < off + len && off < i->off + i->len)
			return i;
	return NULL;
}

int far_loans_change_begin(struct far_loans *l, uint64_t off, uint64_t len, bool wait)
{
	int r = 0;

	if (!l)
		return 0;
	far_mutex_lock(&l->lock);
	l->changing++; /* from here on nothing new is lent */
	if (loans_lent(l, off, len)) {
		uint64_t until = far_now() + LOANS_PATIENCE;
		r = wait ? 0 : -EAGAIN;
		l->waiting++;
		while (wait && loans_lent(l, off, len) && far_cond_wait_until(&l->returned, &l->lock, until))
			;
		for (struct far_loan *i; wait && (i = loans_lent(l, off, len));)
			i->late = true;
		l->waiting--;
	}
	if (r)
		l->changing--;
	far_mutex_unlock(&l->lock);
	return r;
}

void far_loans_change_end(struct far_loans *l)
{
	if (!l)
		return;
	far_mutex_lock(&l->lock);
	l->changing--;
	far_mutex_unlock(&l->lock);
}
