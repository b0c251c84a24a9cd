/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Receivers: a thread on each CPU that this process may use, all reading one userfaultfd, for all maps (members).
 *
 * The receivers of this process are one object, made by the first map; after a fork the child has none and makes its own.
 * Those of another process' memory belong to its one map: they begin when it is added and end with it, or with the process.
 * Children that were asked to see a region have userfaultfds of their own, which the receiver on the first seat reads too.
 *
 * A receiver asks for an event before it sleeps in poll(2). It wakes up by itself only where it must: to see that a fault
 * is past its deadline, or that a process has ended which nobody tells of. Whoever blocks has left the seat first.
 *
 * Locks: `lock` guards the lists; it is held across read(2) of the non-blocking descriptor, nothing else.
 */
#define _GNU_SOURCE
#include "frontend/pager_int.h"

#include "base/clock.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#define RECEIVERS_THREADS 256
#define RECEIVERS_LOOK_MS 1000 /* whether the other process is still there */

/* ------------------------------------------------------------------------------------------------------------- seats */

static bool receivers_is_gone(struct far_receivers *v)
{
	static const _Alignas(4096) char zeros[4096];
	uint64_t done;

	if (!v->ours && !atomic_load(&v->gone) && far_uffd_copy(v->uffd, PAGER_PAGE, zeros, PAGER_PAGE, 0, &done) == -ESRCH)
		atomic_store(&v->gone, true);
	return atomic_load(&v->gone);
}

/* Children end, and nobody tells. */
static unsigned receivers_children(struct far_receivers *v, struct pollfd *pf, unsigned max)
{
	static const _Alignas(4096) char zeros[4096];
	unsigned n = 0;
	uint64_t done;

	far_mutex_lock(&v->lock);
	for (struct pager_child **p = &v->children; *p;) {
		struct pager_child *c = *p;
		if (far_uffd_copy(c->fd, PAGER_PAGE, zeros, PAGER_PAGE, 0, &done) == -ESRCH) {
			*p = c->next;
			close(c->fd);
			free(c);
			continue;
		}
		if (n < max)
			pf[n++] = (struct pollfd){ .fd = c->fd, .events = POLLIN };
		p = &c->next;
	}
	far_mutex_unlock(&v->lock);
	return n;
}

/* poll(2) says so at once of a descriptor in blocking mode. Who does it again and again shall not cost a CPU. */
static void receivers_unblock(int uffd)
{
	int flags = fcntl(uffd, F_GETFL);

	if (flags >= 0)
		fcntl(uffd, F_SETFL, flags | O_NONBLOCK);
	far_sleep_until(far_now() + FAR_MSEC, false);
}

static bool receivers_seat_run(void *opaque, struct far_seat *seat)
{
	struct pager_seat *s = opaque;
	struct far_receivers *v = s->v;
	struct pollfd pf[3 + 64] = { { .fd = v->uffd, .events = POLLIN }, { .fd = v->stop_fd, .events = POLLIN },
				     { .fd = s->first ? v->child_fd : -1, .events = POLLIN } };
	unsigned n = 3;
	uint64_t count;

	if (far_pager_receive(v, v->uffd, seat)) /* more may be waiting: look before asking */
		return true;
	if (s->first && v->ours)
		n += receivers_children(v, pf + 3, FAR_ARRAY_LEN(pf) - 3);
	/* A thread that blocks has left its seat: whoever took it comes by here. */
	bool watch = atomic_load(&v->n_watched) != 0;
	int timeout = watch ? PAGER_WATCH_MS : s->first && ((!v->ours && !v->has_pidfd) || n > 3) ? RECEIVERS_LOOK_MS : -1;
	int got = poll(pf, n, timeout);
	if ((got < 0 && errno != EINTR) || pf[1].revents)
		return false;
	if (got > 0 && (pf[0].revents & POLLERR) && !v->ours) /* the other process has made it blocking again */
		receivers_unblock(v->uffd);
	if (got > 0 && pf[2].revents)
		(void)!read(v->child_fd, &count, sizeof count);
	if (got == 0 && receivers_is_gone(v)) {
		far_pager_ring(v->stop_fd);
		return false;
	}
	for (unsigned k = 3; got > 0 && k < n; k++)
		if (pf[k].revents & POLLIN)
			far_pager_receive(v, pf[k].fd, seat);
	if (watch)
		far_pager_watch(v, seat);
	return true;
}

static void receivers_seat_ended_cb(void *opaque)
{
	struct pager_seat *s = opaque;
	struct far_receivers *v = s->v;

	if (s->first && atomic_load(&v->gone) && v->ended)
		v->ended(v->opaque);
}

/* ------------------------------------------------------------------------------------------------------- open, close */

static void receivers_free(struct far_receivers *v) FAR_NO_TSA
{
	far_pager_ring(v->stop_fd);
	far_crew_close(v->crew);
	for (struct pager_child *c = v->children, *next; c; c = next) {
		next = c->next;
		close(c->fd);
		free(c);
	}
	far_fd_close(&v->uffd);
	far_fd_close(&v->stop_fd);
	far_fd_close(&v->child_fd);
	far_cond_fini(&v->changed);
	far_mutex_fini(&v->lock);
	free(v);
}

/* A seat on each CPU that this thread may use. */
static int receivers_seats(struct far_receivers *v)
{
	cpu_set_t mask;
	int err = far_crew_open(&v->crew, "far-page", RECEIVERS_THREADS);

	if (!err && sched_getaffinity(0, sizeof mask, &mask)) {
		CPU_ZERO(&mask);
		CPU_SET(0, &mask);
	}
	for (int cpu = 0; cpu < CPU_SETSIZE && !err && v->seats < RECEIVERS_THREADS / 4; cpu++) {
		if (!CPU_ISSET(cpu, &mask))
			continue;
		struct pager_seat *s = &v->seat[v->seats];
		*s = (struct pager_seat){ v, v->seats == 0 };
		err = far_crew_seat(v->crew, cpu, receivers_seat_run, receivers_seat_ended_cb, s);
		v->seats += !err;
	}
	return err;
}

static int receivers_make(int uffd, bool ours, void (*ended)(void *opaque), void *opaque, struct far_receivers **out)
{
	struct far_receivers *v = calloc(1, sizeof *v);

	if (!v)
		return -ENOMEM;
	v->uffd = uffd;
	v->ours = ours;
	v->ended = ended;
	v->opaque = opaque;
	far_mutex_init(&v->lock);
	far_cond_init(&v->changed);
	v->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	v->child_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	/* What is another's may be touched already: nobody looks before there is somebody to answer (far_member_add). */
	int err = v->stop_fd < 0 || v->child_fd < 0 ? -errno : ours ? receivers_seats(v) : 0;
	if (err) {
		v->uffd = -1;
		receivers_free(v);
		return err;
	}
	*out = v;
	return 0;
}

int far_receivers_new(int uffd, bool has_pidfd, void (*ended)(void *opaque), void *opaque, struct far_receivers **out,
		      struct far_error *err)
{
	int e = receivers_make(uffd, false, ended, opaque, out);

	if (!e)
		(*out)->has_pidfd = has_pidfd; /* no receiver runs yet */
	return e ? far_error_set(err, -e, "cannot start to serve page faults: %s", far_strerror(e)) : 0;
}

/* This process' own: one for each set of features, in practice one, or two where stores are found in both ways. A child
 * after fork has a copy of this, and none of the threads. */
static struct {
	struct far_mutex lock;
	struct {
		struct far_receivers *v;
		unsigned users, have;
	} set[4];
	pid_t pid;
} own = { .lock = FAR_MUTEX_INIT };

/* The memory of the parent's stays behind with the threads that had it. */
static void receivers_after_fork(void)
{
	for (size_t k = 0; k < FAR_ARRAY_LEN(own.set) && own.pid != getpid(); k++) {
		if (own.set[k].v)
			close(own.set[k].v->uffd);
		own.set[k].v = NULL;
		own.set[k].users = 0;
	}
	own.pid = getpid();
}

static int receivers_first(unsigned have, struct far_receivers **out, struct far_error *err)
{
	int fd, e = far_uffd_open(have, &fd);

	if (e)
		return far_error_set(err, -e, "userfaultfd cannot be used: %s", *far_uffd_why() ? far_uffd_why() : far_strerror(e));
	e = receivers_make(fd, true, NULL, NULL, out);
	if (e) {
		far_error_set(err, -e, "cannot start to serve page faults: %s", far_strerror(e));
		close(fd);
	}
	return e;
}

int far_receivers_get(unsigned have, struct far_receivers **out, struct far_error *err)
{
	size_t k = 0, n = FAR_ARRAY_LEN(own.set);
	int e = 0;

	far_mutex_lock(&own.lock);
	receivers_after_fork();
	while (k < n && !(own.set[k].v && own.set[k].have == have))
		k++;
	for (size_t j = 0; k == n && j < n; j++) {
		if (own.set[j].v)
			continue;
		k = j;
		own.set[k].have = have;
		e = receivers_first(have, &own.set[k].v, err);
	}
	if (k == n)
		e = far_error_set(err, EBUSY, "too many maps of this process were opened with other features of userfaultfd");
	if (!e) {
		own.set[k].users++;
		*out = own.set[k].v;
	}
	far_mutex_unlock(&own.lock);
	return e;
}

void far_receivers_put(struct far_receivers *v)
{
	struct far_receivers *last = v;

	if (!v)
		return;
	far_mutex_lock(&own.lock);
	for (size_t k = 0; k < FAR_ARRAY_LEN(own.set); k++) {
		if (own.set[k].v != v)
			continue;
		if (--own.set[k].users)
			last = NULL;
		else
			own.set[k].v = NULL;
	}
	far_mutex_unlock(&own.lock);
	if (last)
		receivers_free(last);
}

/* The kernel refuses every call while a change waits to be read of, and whoever reads does so under the lock. */
void far_receivers_settle_cb(void *receivers)
{
	static const _Alignas(4096) char zeros[4096];
	struct far_receivers *v = receivers;
	uint64_t done;

	far_uffd_copy(v->uffd, PAGER_PAGE, zeros, PAGER_PAGE, 0, &done); /* nothing is there: -ENOENT, when it is its turn */
	far_mutex_lock(&v->lock);
	far_mutex_unlock(&v->lock);
}

int far_receivers_uffd(const struct far_receivers *v)
{
	return v->uffd;
}

/* ------------------------------------------------------------------------------------------------------------ members */

int far_member_add(struct far_receivers *v, const struct far_member_conf *conf, struct far_member **out)
{
	struct far_member *x = calloc(1, sizeof *x);

	if (!x)
		return -ENOMEM;
	x->v = v;
	x->c = *conf;
	for (int k = 0; k < PAGER_SLOTS; k++)
		x->slot[k].until = FAR_NEVER; /* a slot is taken before its `until` is known */
	far_mutex_lock(&v->lock);
	x->next = v->members;
	v->members = x;
	far_mutex_unlock(&v->lock);
	*out = x;
	int err = v->ours ? 0 : receivers_seats(v);
	if (err) {
		far_member_remove(x);
		*out = NULL;
	}
	return err;
}

void far_member_stop(struct far_member *x)
{
	atomic_store(&x->stopped, true);
}

void far_member_remove(struct far_member *x)
{
	struct far_receivers *v = x->v;
	struct far_member **p;

	if (!v->ours) { /* a touch that came when the member has gone could not be answered */
		far_pager_ring(v->stop_fd);
		far_crew_close(v->crew);
		v->crew = NULL;
	}
	far_mutex_lock(&v->lock);
	for (p = &v->members; *p != x; p = &(*p)->next)
		;
	*p = x->next;
	while (x->users)
		far_cond_wait(&v->changed, &v->lock);
	far_mutex_unlock(&v->lock);
	free(x);
}

int far_member_settle(struct far_member *x)
{
	struct far_receivers *v = x->v;
	int err = 0;

	if (!atomic_load_explicit(&x->n_removing, memory_order_acquire))
		return 0;
	far_mutex_lock(&v->lock);
	while (x->removing && !err)
		err = far_cond_wait_until(&v->changed, &v->lock, far_deadline()) ? 0 : -ETIMEDOUT;
	far_mutex_unlock(&v->lock);
	return err;
}

bool far_member_wait_idle(struct far_member *x, uint64_t until)
{
	while (atomic_load_explicit(&x->n_blocked, memory_order_relaxed) && far_now() < until)
		far_sleep_until(far_min(until, far_now() + 10 * FAR_MSEC), false);
	return !atomic_load_explicit(&x->n_blocked, memory_order_relaxed);
}

void far_member_status(struct far_member *x, struct far_status *st)
{
	uint64_t now = far_now();

	st->faults = atomic_load_explicit(&x->faults, memory_order_relaxed);
	st->blocked = atomic_load_explicit(&x->n_blocked, memory_order_relaxed);
	st->n_blocked = 0;
	for (unsigned k = 0; k < PAGER_SLOTS; k++) {
		uint64_t off1 = atomic_load_explicit(&x->slot[k].off1, memory_order_relaxed);
		uint64_t ms = (now - far_min(now, atomic_load_explicit(&x->slot[k].since, memory_order_relaxed))) / FAR_MSEC;
		unsigned at = st->n_blocked;
		if (!off1)
			continue;
		/* Those that have waited longest come first. */
		while (at && st->blocked_ms[at - 1] < ms) {
			if (at < FAR_ARRAY_LEN(st->blocked_at)) {
				st->blocked_at[at] = st->blocked_at[at - 1];
				st->blocked_ms[at] = st->blocked_ms[at - 1];
			}
			at--;
		}
		if (at == FAR_ARRAY_LEN(st->blocked_at))
			continue;
		st->blocked_at[at] = off1 - 1;
		st->blocked_ms[at] = ms;
		st->n_blocked += st->n_blocked < FAR_ARRAY_LEN(st->blocked_at);
	}
}
