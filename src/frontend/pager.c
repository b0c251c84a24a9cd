/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What happens to a page fault:
 *
 *     received   by the thread that sits on this CPU's seat
 *     shown      the chunk is local and the page only missing: zeros, or what another fault has just brought
 *     fetched    by that thread: on its seat as long as nothing blocks, after leaving it as soon as something does; parked
 *                when no thread is left
 *     failed     at the deadline, or with an error: the page is poisoned and the thread gets SIGBUS. With --on-fail wait
 *                it is tried again for as long as the mapping stands. A backend that does not keep the deadline (the
 *                program's own may know nothing of it) is not waited for: the receivers look at what is blocked
 *
 * A store into a protected page (synchronous tracking) is told to the region, then allowed.
 *
 * Events (remap, unmap, remove, fork) change what later faults mean, and two receivers could take an event and the fault
 * after it in the wrong order. So reading and taking note is one step, under `lock`. What a remove means for the region
 * may take longer; `removing` holds its range until that is done, and faults there wait for it.
 *
 * Who sits where, and for which maps, is in receivers.c.
 */
#define _GNU_SOURCE
#include "frontend/pager_int.h"

#include "base/clock.h"
#include "base/pool.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PAGER_AGAIN (100 * FAR_MSEC) /* between tries that wait for ever */
#define PAGER_GRANULE (64 * FAR_KIB) /* stores that one fault allows */
#define PAGER_GRANULES 4           /* ... to who stores page after page: so many of these */

/* One fault or event on its way. */
struct pager_work {
	struct far_receivers *v;
	struct far_member *x; /* held */
	struct far_seat *seat; /* NULL: this thread may block */
	struct far_uffd_event e;
	uint64_t off;
	int child;             /* the child's descriptor; -1: it is the process itself */
	int slot;
	bool counted;          /* in n_watched, if it is watched */
	bool watched;          /* whoever takes the slot's `until` gives up */
	uint64_t until;
};

/* ----------------------------------------------------------------------------------------------------------- blocking */

static bool pager_is_watched(const struct pager_work *w)
{
	return w->child < 0 && w->e.kind != FAR_EVENT_STORE && w->until != FAR_NEVER;
}

static void pager_count(struct pager_work *w)
{
	struct far_member *x = w->x;

	if (w->slot != -1)
		return;
	atomic_fetch_add_explicit(&x->n_blocked, 1, memory_order_relaxed);
	if (!w->counted)
		atomic_fetch_add(&w->v->n_watched, pager_is_watched(w));
	w->counted = true;
	w->slot = PAGER_SLOTS;
	for (int k = 0; k < PAGER_SLOTS; k++) {
		uint64_t none = 0;
		if (!atomic_compare_exchange_strong_explicit(&x->slot[k].off1, &none, w->off + 1, memory_order_relaxed,
							     memory_order_relaxed))
			continue;
		bool watched = pager_is_watched(w);
		atomic_store_explicit(&x->slot[k].since, far_now(), memory_order_relaxed);
		atomic_store(&x->slot[k].until, watched ? w->until + PAGER_WATCH_MS * FAR_MSEC : FAR_NEVER);
		w->watched = watched;
		w->slot = k;
		return;
	}
}

static bool pager_may_block(void *opaque)
{
	struct pager_work *w = opaque;

	bool first = !w->counted;

	/* Before the next thread sits down, which decides by it how long it sleeps. */
	if (first)
		atomic_fetch_add(&w->v->n_watched, pager_is_watched(w));
	w->counted = true;
	if (w->seat && !far_crew_leave(w->seat)) {
		if (first)
			atomic_fetch_sub(&w->v->n_watched, pager_is_watched(w));
		w->counted = !first;
		return false;
	}
	w->seat = NULL;
	pager_count(w);
	return true;
}

static void pager_release(struct pager_work *w)
{
	struct far_member *x = w->x;

	if (w->slot >= 0) {
		if (w->slot < PAGER_SLOTS) {
			atomic_store(&x->slot[w->slot].until, FAR_NEVER); /* the next one's is not known as soon as its offset */
			atomic_store(&x->slot[w->slot].off1, 0);
		}
		atomic_fetch_sub_explicit(&x->n_blocked, 1, memory_order_relaxed);
		atomic_fetch_sub(&w->v->n_watched, pager_is_watched(w));
	}
	far_mutex_lock(&w->v->lock);
	if (--x->users == 0)
		far_cond_broadcast(&w->v->changed);
	far_mutex_unlock(&w->v->lock);
}

/* ------------------------------------------------------------------------------------------------------------- faults */

static bool pager_removing(struct far_member *x, uint64_t off) FAR_NO_TSA
{
	if (!atomic_load_explicit(&x->n_removing, memory_order_acquire))
		return false;
	far_mutex_lock(&x->v->lock);
	struct pager_removing *q = x->removing;
	while (q && off - q->off >= q->len)
		q = q->next;
	far_mutex_unlock(&x->v->lock);
	return q != NULL;
}

static int pager_wait_removing(struct far_member *x, uint64_t off)
{
	int err = 0;

	while (!err && pager_removing(x, off)) {
		far_mutex_lock(&x->v->lock);
		if (!far_cond_wait_until(&x->v->changed, &x->v->lock, far_min(far_deadline(), far_now() + 10 * FAR_MSEC)) &&
		    far_now() >= far_deadline())
			err = -ETIMEDOUT;
		far_mutex_unlock(&x->v->lock);
	}
	return err;
}

/* The page is there, or its chunk is local: 1, 0 otherwise, or -errno. */
static int pager_show(struct pager_work *w)
{
	struct far_member *x = w->x;

	/* Behind the end, or memory that mremap has added there; given back by a program whose pages are its own. */
	if (w->off >= far_size(far_region_backend(x->c.region)) || far_memory_is_gone(x->c.memory, w->off))
		return far_memory_appear(x->c.memory, w->e.addr) ? -EIO : 1;
	if (!far_region_hold(x->c.region, w->off))
		return 0;
	int err = far_memory_appear(x->c.memory, w->e.addr);
	far_region_release(x->c.region, w->off);
	if (err != -ENODATA)
		return err ? err : 1;
	/* Read-only, and the program has dropped the page: it is fetched again. */
	if (!pager_may_block(w))
		return -EAGAIN;
	return far_region_refresh(x->c.region, w->off, 1);
}

/* 0: done; -EAGAIN: nobody is left to block; else why not. */
static int pager_fetch(struct pager_work *w)
{
	struct far_member *x = w->x;
	int err = 0;

	if (far_memory_has_poison(x->c.memory) && !pager_may_block(w)) /* healing may change mappings */
		return -EAGAIN;
	while (!err) {
		if (pager_removing(x, w->off)) {
			err = pager_may_block(w) ? pager_wait_removing(x, w->off) : -EAGAIN;
			continue;
		}
		err = pager_show(w);
		if (err)
			break;
		err = far_region_fault(x->c.region, w->off, pager_may_block, w);
		if (err > 0 && far_memory_drops(x->c.memory)) /* a fill passes over what is being dropped: who waits looks again */
			far_uffd_wake(w->v->uffd, w->e.addr, PAGER_PAGE);
	}
	return err > 0 ? 0 : err;
}

static void pager_allow_cb(void *opaque, uint64_t off, uint64_t len)
{
	struct far_member *x = opaque;
	uint64_t n, addr, end = off + len;

	for (off = off / PAGER_PAGE * PAGER_PAGE; off < end; off += n) {
		addr = far_memory_addr(x->c.memory, off, &n);
		n = far_min(n, far_div_up(end - off, PAGER_PAGE) * PAGER_PAGE);
		if (addr)
			far_uffd_protect(far_receivers_uffd(x->v), addr, n, false, FAR_UFFD_NO_WAKE);
	}
}

/* What a store into w->off, in a chunk that is held, allows: [*off, *off + what is returned), one granule, or several to who
 * goes on where the last ended. All of its chunks are held. */
static uint64_t pager_store_hold(struct pager_work *w, uint64_t bytes, uint64_t *off)
{
	struct far_member *x = w->x;
	uint64_t chunk = far_region_chunk(x->c.region), n = far_min(PAGER_GRANULE, far_max(chunk, PAGER_PAGE)), len = n;

	*off = w->off / n * n;
	if (atomic_load_explicit(&x->store_next, memory_order_relaxed) == *off)
		while (len < PAGER_GRANULES * n && *off + len < bytes &&
		       ((*off + len) % chunk || far_region_hold(x->c.region, *off + len)))
			len += n;
	atomic_store_explicit(&x->store_next, *off + len, memory_order_relaxed);
	return len;
}

static void pager_store_release(struct far_member *x, uint64_t off, uint64_t len)
{
	uint64_t chunk = far_region_chunk(x->c.region), end = off + len;

	for (; off < end; off = (off / chunk + 1) * chunk)
		far_region_release(x->c.region, off);
}

/* A store into a protected page. Where the chunk is local it is told for those around it, too. */
static int pager_store(struct pager_work *w)
{
	struct far_member *x = w->x;
	uint64_t bytes = far_size(far_region_backend(x->c.region)), off = w->off, len = PAGER_PAGE, held = 0;
	int err;

	if (off >= bytes) {
		pager_allow_cb(x, off, len);
		return far_uffd_wake(w->v->uffd, w->e.addr, PAGER_PAGE);
	}
	if (far_region_hold(x->c.region, off))
		held = len = pager_store_hold(w, bytes, &off);
	len = far_min(len, bytes - off);
	err = far_region_stored(x->c.region, off, len, w->seat ? FAR_NOWAIT : 0, pager_allow_cb, x);
	pager_store_release(x, off, held);
	if (err == -EAGAIN && pager_may_block(w))
		err = far_region_stored(x->c.region, w->off, far_min(PAGER_PAGE, bytes - w->off), 0, pager_allow_cb, x);
	return err ? err : far_uffd_wake(w->v->uffd, w->e.addr, PAGER_PAGE);
}

/* A child's private copy: it is given the bytes, and has nothing to do with the chunk afterwards. */
static int pager_child_fetch(struct pager_work *w)
{
	_Alignas(64) char page[PAGER_PAGE];
	struct far_backend *face = far_region_backend(w->x->c.region);
	uint64_t done;

	if (!pager_may_block(w))
		return -EAGAIN;
	memset(page, 0, sizeof page);
	uint64_t n = w->off < far_size(face) ? far_min(PAGER_PAGE, far_size(face) - w->off) : 0;
	int err = n ? far_read(face, w->off, page, (size_t)n, 0) : 0;
	if (!err)
		err = far_uffd_copy(w->child, w->e.addr, page, PAGER_PAGE, 0, &done);
	return err == -EEXIST ? far_uffd_wake(w->child, w->e.addr, PAGER_PAGE) : err;
}

static int pager_serve(struct pager_work *w)
{
	if (w->child >= 0 && w->e.kind == FAR_EVENT_STORE) /* its own copy: nobody asks what is in it */
		return far_uffd_protect(w->child, w->e.addr, PAGER_PAGE, false, 0);
	if (w->child >= 0)
		return pager_child_fetch(w);
	return w->e.kind == FAR_EVENT_STORE ? pager_store(w) : pager_fetch(w);
}

/* A receiver has given up already. */
static bool pager_was_given_up(struct pager_work *w)
{
	return w->watched && atomic_exchange(&w->x->slot[w->slot].until, FAR_NEVER) == FAR_NEVER;
}

static int pager_poison_cb(void *opaque)
{
	struct pager_work *w = opaque;
	return far_memory_poison(w->x->c.memory, w->e.addr, PAGER_PAGE);
}

/* The thread gets SIGBUS. */
static void pager_give_up(struct pager_work *w, int err)
{
	struct far_member *x = w->x;
	uint64_t done;

	if (pager_was_given_up(w))
		return;
	/* The mapping goes in a moment, and wakes whoever waits there. A mapping that stands for a mark must not come after. */
	if (atomic_load(&x->stopped) && w->child < 0 && w->e.kind != FAR_EVENT_STORE && !far_memory_marks(x->c.memory))
		return;

	pager_may_block(w); /* where it changes mappings that has to be read of by a receiver */
	/* Who ends a map ends the waiting for it, and as a rule nobody waits: the page came, and the rest of its extent did not. */
	if (!atomic_load(&x->stopped))
		far_log(FAR_LOG_ERROR, "bytes %" PRIu64 " to %" PRIu64 " of %s cannot be had (%s): who uses them gets SIGBUS", w->off,
			w->off + PAGER_PAGE, x->c.source, far_strerror(err));
	if (w->child >= 0)
		err = far_uffd_poison(w->child, w->e.addr, PAGER_PAGE, &done);
	else if (w->e.kind == FAR_EVENT_STORE) { /* the page is there: the store is let through, and found when it ends */
		far_memory_suspect(x->c.memory, w->off, PAGER_PAGE);
		pager_allow_cb(x, w->off, PAGER_PAGE);
		err = far_uffd_wake(w->v->uffd, w->e.addr, PAGER_PAGE);
	} else {
		err = far_region_alone(x->c.region, w->off, pager_poison_cb, w);
		if (err == -EAGAIN) /* it is here, or comes: look again */
			err = far_uffd_wake(w->v->uffd, w->e.addr, PAGER_PAGE);
	}
	if (err && err != -ESRCH && err != -ENOENT && err != -EEXIST)
		far_log(FAR_LOG_ERROR, "that cannot be told to the program (%s): it waits until its mapping ends", far_strerror(err));
}

/* Blocked calls of x that did not end at their deadline: the program is told, they may end when they like. Without
 * UFFDIO_POISON that changes mappings, which another receiver has to read of: not on a seat then. */
static void pager_watch_member(struct far_member *x)
{
	uint64_t now = far_now(), n;

	if (atomic_load(&x->stopped) && !far_memory_marks(x->c.memory))
		return;
	for (int k = 0; k < PAGER_SLOTS; k++) {
		uint64_t until = atomic_load(&x->slot[k].until), off1 = atomic_load(&x->slot[k].off1);
		if (!off1 || now < until || !atomic_compare_exchange_strong(&x->slot[k].until, &until, FAR_NEVER))
			continue;
		uint64_t addr = far_memory_addr(x->c.memory, off1 - 1, &n);
		if (!addr)
			continue;
		far_log(FAR_LOG_ERROR, "bytes %" PRIu64 " to %" PRIu64 " of %s did not come in time: who uses them gets SIGBUS",
			off1 - 1, off1 - 1 + PAGER_PAGE, x->c.source);
		int err = far_memory_poison(x->c.memory, addr, PAGER_PAGE);
		if (err)
			far_log(FAR_LOG_ERROR, "that cannot be told to the program (%s): it waits until its mapping ends", far_strerror(err));
	}
}

/* One receiver does it for all; off its seat, see above. */
void far_pager_watch(struct far_receivers *v, struct far_seat *seat)
{
	struct far_member *x;
	uint64_t now = far_now(), next = atomic_load(&v->watch_at);

	if (now < next || !atomic_compare_exchange_strong(&v->watch_at, &next, now + PAGER_WATCH_MS * FAR_MSEC) ||
	    !far_crew_leave(seat))
		return;
	for (unsigned k = 0;; k++) {
		unsigned at = 0;
		far_mutex_lock(&v->lock);
		for (x = v->members; x && at < k; x = x->next)
			at++;
		if (x)
			x->users++;
		far_mutex_unlock(&v->lock);
		if (!x)
			return;
		pager_watch_member(x);
		far_mutex_lock(&v->lock);
		if (--x->users == 0)
			far_cond_broadcast(&v->changed);
		far_mutex_unlock(&v->lock);
	}
}

/* On a thread that may block, or on a seat. False: it could not go on there. */
static bool pager_run(struct pager_work *w)
{
	struct far_member *x = w->x;
	uint64_t old = far_deadline_limit(w->until);
	int err;

	while ((err = pager_serve(w)) && err != -EAGAIN && w->until == FAR_NEVER && !atomic_load(&x->stopped) &&
	       err != -ESRCH && err != -ENOENT) {
		if (!pager_may_block(w)) {
			err = -EAGAIN;
			break;
		}
		far_sleep_until(far_now() + PAGER_AGAIN, false);
	}
	far_deadline_restore(old);
	if (err == -EAGAIN && w->seat)
		return false;
	if (err == -ESRCH && w->child < 0) /* a child that has ended is nobody's loss */
		atomic_store(&w->v->gone, true);
	else if (err && err != -ENOENT && err != -ESRCH)
		pager_give_up(w, err);
	return true;
}

static void pager_parked_cb(void *arg)
{
	struct pager_work *w = arg;

	w->seat = NULL;
	pager_count(w);
	pager_run(w);
	pager_release(w);
	free(w);
}

static void pager_fault(struct pager_work *w, struct far_seat *seat)
{
	atomic_fetch_add_explicit(&w->x->faults, 1, memory_order_relaxed);
	w->until = w->x->c.deadline == FAR_NEVER ? FAR_NEVER : far_now() + w->x->c.deadline;
	if (pager_run(w)) {
		pager_release(w);
		return;
	}
	struct pager_work *copy = malloc(sizeof *copy);
	if (copy)
		*copy = *w;
	if (!copy || far_crew_park(seat, pager_parked_cb, copy)) {
		free(copy); /* no memory: it asks again */
		far_uffd_wake(w->child >= 0 ? w->child : w->v->uffd, w->e.addr, PAGER_PAGE);
		pager_release(w);
	}
}

/* ------------------------------------------------------------------------------------------------------------- events */

/* The member that has this address; held. */
static struct far_member *pager_find_locked(struct far_receivers *v, uint64_t addr, uint64_t *off) FAR_REQUIRES(v->lock)
{
	for (struct far_member *x = v->members; x; x = x->next)
		if (far_memory_off(x->c.memory, addr, off)) {
			x->users++;
			return x;
		}
	return NULL;
}

static void pager_remove_begin_locked(struct pager_work *w) FAR_REQUIRES(w->v->lock)
{
	struct far_member *x = w->x;
	struct pager_removing *q = malloc(sizeof *q);

	far_memory_dropping(x->c.memory, w->off, w->e.len);
	if (!q)
		return; /* then a fault may see what was there before */
	*q = (struct pager_removing){ x->removing, w->off, w->e.len };
	x->removing = q;
	atomic_fetch_add_explicit(&x->n_removing, 1, memory_order_release);
}

/* The program has dropped pages: they are zero now, and so says the region. */
static void pager_remove(struct pager_work *w)
{
	struct far_member *x = w->x;
	struct pager_removing **p;

	uint64_t old = far_deadline_limit(w->until);
	int err = far_memory_discarded(x->c.memory, x->c.region, w->off, w->e.len);
	far_deadline_restore(old);
	far_memory_dropped(x->c.memory, w->off, w->e.len);
	if (err)
		far_log(FAR_LOG_WARNING, "a discard of bytes %" PRIu64 " to %" PRIu64 " of %s is not told yet (%s)", w->off,
			w->off + w->e.len, x->c.source, far_strerror(err));
	far_mutex_lock(&w->v->lock);
	for (p = &x->removing; *p && ((*p)->off != w->off || (*p)->len != w->e.len); p = &(*p)->next)
		;
	if (*p) {
		struct pager_removing *q = *p;
		*p = q->next;
		free(q);
		atomic_fetch_sub_explicit(&x->n_removing, 1, memory_order_release);
	}
	far_cond_broadcast(&w->v->changed);
	far_mutex_unlock(&w->v->lock);
}

static void pager_remove_cb(void *arg)
{
	struct pager_work *w = arg;

	pager_remove(w);
	pager_release(w);
	free(w);
}

/* Take note of what was read. True: *w is to be carried out. */
static bool pager_note_locked(struct pager_work *w) FAR_REQUIRES(w->v->lock)
{
	struct far_receivers *v = w->v;
	bool fault = w->e.kind == FAR_EVENT_MISSING || w->e.kind == FAR_EVENT_MINOR || w->e.kind == FAR_EVENT_STORE;

	if (w->e.kind == FAR_EVENT_FORK) {
		struct pager_child *c = malloc(sizeof *c);
		if (c) {
			*c = (struct pager_child){ v->children, w->e.fd };
			v->children = c;
			far_pager_ring(v->child_fd); /* the first seat has more to look at */
		} else {
			close(w->e.fd); /* it would read zeros, but it could not have forked without memory either */
		}
		return false;
	}
	if (w->child >= 0 && !fault) /* its own business */
		return false;
	if (w->e.kind == FAR_EVENT_REMAP || w->e.kind == FAR_EVENT_UNMAP) {
		for (struct far_member *x = v->members; x; x = x->next)
			if (w->e.kind == FAR_EVENT_REMAP)
				far_memory_remapped(x->c.memory, w->e.addr, w->e.to, w->e.len);
			else
				far_memory_unmapped(x->c.memory, w->e.addr, w->e.len);
		return false;
	}
	if (w->e.kind == FAR_EVENT_REMOVE)
		for (struct far_member *x = v->members; x; x = x->next)
			if (far_memory_removed(x->c.memory, w->e.addr, w->e.len) || far_memory_forget(x->c.memory, w->e.addr, w->e.len))
				return false;
	w->x = pager_find_locked(w->v, w->e.addr, &w->off);
	if (!w->x)
		return fault;
	if (w->e.kind == FAR_EVENT_REMOVE)
		pager_remove_begin_locked(w);
	return true;
}

/* This thread waits for an event to be read: somebody else must read it. */
static void pager_leave_cb(void *arg)
{
	far_crew_leave(arg);
}

/* One event of a descriptor. False: there was none. */
static bool pager_receive_one(struct far_receivers *v, int fd, struct far_seat *seat)
{
	struct pager_work w = { .v = v, .seat = seat, .child = fd == v->uffd ? -1 : fd, .slot = -1 };
	uint64_t done;

	far_mutex_lock(&w.v->lock);
	for (struct far_member *x = v->members; x; x = x->next)
		far_memory_reading(x->c.memory, true);
	int n = far_uffd_read(fd, &w.e);
	bool go = n > 0 && pager_note_locked(&w);
	for (struct far_member *x = v->members; x; x = x->next)
		far_memory_reading(x->c.memory, false);
	far_mutex_unlock(&w.v->lock);
	if (!go)
		return n > 0;
	if (!w.x) { /* memory that mremap has added behind a region, or of a map that ends */
		static const _Alignas(4096) char zeros[4096];
		int err = v->ours ? far_uffd_copy(fd, w.e.addr, zeros, PAGER_PAGE, 0, &done)
				  : far_uffd_poison(fd, w.e.addr, PAGER_PAGE, &done); /* registered, and not handed over */
		if (err && err != -ENOENT && err != -ESRCH)
			far_uffd_wake(fd, w.e.addr, PAGER_PAGE);
	} else if (w.e.kind != FAR_EVENT_REMOVE) {
		pager_fault(&w, seat);
	} else {
		w.until = far_now() + far_min(w.x->c.deadline, 3600 * FAR_SEC);
		struct pager_work *copy = far_crew_leave(seat) ? NULL : malloc(sizeof *copy);
		if (copy)
			*copy = w;
		if (!copy || far_crew_park(seat, pager_remove_cb, copy)) {
			free(copy);
			pager_remove(&w);
			pager_release(&w);
		}
	}
	return true;
}

bool far_pager_receive(struct far_receivers *v, int fd, struct far_seat *seat)
{
	far_uffd_on_wait(pager_leave_cb, seat);
	bool got = pager_receive_one(v, fd, seat);
	far_uffd_on_wait(NULL, NULL);
	return got;
}
