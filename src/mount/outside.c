/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Memory of this process that another one serves: far_map_uri() with `outside`. A child, farpage-serve, opens the source
 * and says how large it is; the memory is mapped and registered here, and handed over in farpage's own format
 * (doc/handover.md). Everything but the memory itself is the child's, and asked over its control socket, as for a file.
 *
 * This process keeps its copy of the userfaultfd: without one the kernel would fill what is absent with zeros when the child
 * dies. It reads from it only then:
 *
 *     SERVED    the child lives. The guard waits for its end, or for ours
 *     ORPHANED  it has ended by itself. Each touch of an absent page waits for the deadline, then raises SIGBUS (on_fail wait:
 *               waits). A store into a protected page is let through. Flushes and questions fail with -ENOTCONN
 *     CLOSED    far_mount_close(): the child has flushed and left; the memory goes
 */
#define _GNU_SOURCE
#include "mount/child.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/thread.h"
#include "frontend/pointer.h"
#include "frontend/uffd.h"
#include "mount/face.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define OUTSIDE_PAGE ((uint64_t)4096)
#define OUTSIDE_HUGE ((uint64_t)2 << 20)
#define OUTSIDE_WORDS "cannot map %s in another process"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

/* Touches that wait, after the child's end: first come, first given up. */
struct outside_wait {
	uint64_t addr, until;
};

struct outside {
	struct far_mount face;
	/* fixed after open */
	struct far_mount_opts o;
	const char *uri;         /* while it is opened */
	struct far_mount *child;
	char *addr;
	uint64_t bytes, len;     /* of the region; in whole pages */
	bool writable;
	unsigned have;           /* of the userfaultfd */
	int uffd, stop;          /* stop: eventfd */
	struct far_thread guard;

	/* of the guard */
	struct outside_wait *wait;
	size_t first, n, cap;
};

static struct outside *outside_of(const struct far_mount *m)
{
	return far_container_of(m, struct outside, face);
}

/* ------------------------------------------------------------------------------------------------ the guard */

struct outside_empty {
	void *at;
	int done; /* eventfd */
};

static void *outside_empty_cb(void *arg)
{
	struct outside_empty *x = arg;
	int fd = memfd_create("farpage-poison", MFD_CLOEXEC);

	if (fd >= 0)
		mmap(x->at, OUTSIDE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	far_fd_close(&fd);
	eventfd_write(x->done, 1);
	return NULL;
}

static void outside_event(struct outside *m, struct far_uffd_event *e);

static void outside_read(struct outside *m)
{
	struct far_uffd_event e;

	while (far_uffd_read(m->uffd, &e) > 0)
		outside_event(m, &e);
}

/* An empty file in the page's place raises SIGBUS as well, where the kernel has no mark for that. The kernel reports that
 * the page was unmapped, and lets who did it go on when this has been read: so it is another thread. */
static void outside_empty(struct outside *m, uint64_t addr)
{
	struct outside_empty x = { (void *)(uintptr_t)addr, eventfd(0, EFD_CLOEXEC) };
	struct far_thread t = { .running = false };

	if (x.done >= 0 && far_thread_start(&t, "far-poison", outside_empty_cb, &x) == 0)
		for (bool done = false; !done;) {
			struct pollfd p[2] = { { .fd = m->uffd, .events = POLLIN }, { .fd = x.done, .events = POLLIN } };
			if (poll(p, 2, -1) < 0 && errno != EINTR)
				break;
			outside_read(m);
			done = p[1].revents;
		}
	far_thread_join(&t);
	far_fd_close(&x.done);
	far_uffd_wake(m->uffd, addr, OUTSIDE_PAGE);
}

static void outside_poison(struct outside *m, uint64_t addr)
{
	uint64_t done;

	if (m->have & FAR_UFFD_POISON)
		far_uffd_poison(m->uffd, addr, OUTSIDE_PAGE, &done);
	else
		outside_empty(m, addr);
}

static void outside_note(struct outside *m, uint64_t addr)
{
	if (m->o.on_fail == FAR_ON_FAIL_WAIT)
		return;
	if (m->first && m->n == m->cap) { /* make room at the end */
		memmove(m->wait, m->wait + m->first, (m->n - m->first) * sizeof *m->wait);
		m->n -= m->first;
		m->first = 0;
	}
	if (m->n == m->cap) {
		size_t cap = m->cap ? 2 * m->cap : 64;
		struct outside_wait *w = reallocarray(m->wait, cap, sizeof *w);
		if (!w) { /* no memory to wait with: it asks again, until there is */
			far_uffd_wake(m->uffd, addr, OUTSIDE_PAGE);
			return;
		}
		m->wait = w;
		m->cap = cap;
	}
	m->wait[m->n++] = (struct outside_wait){ addr, far_now() + m->o.deadline_ms * FAR_MSEC };
}

static void outside_event(struct outside *m, struct far_uffd_event *e)
{
	if (e->kind == FAR_EVENT_STORE)
		far_uffd_protect(m->uffd, e->addr, e->len, false, 0);
	else if (e->kind == FAR_EVENT_MISSING || e->kind == FAR_EVENT_MINOR)
		outside_note(m, e->addr);
	else if (e->kind == FAR_EVENT_FORK)
		far_fd_close(&e->fd);
}

/* Wait until something can be read, the first of those that wait is to be given up, or the end. False: the end. */
static bool outside_turn(struct outside *m)
{
	struct pollfd p[2] = { { .fd = m->uffd, .events = POLLIN }, { .fd = m->stop, .events = POLLIN } };
	uint64_t until = m->first < m->n ? m->wait[m->first].until : FAR_NEVER;

	if ((poll(p, 2, far_deadline_poll_ms(until)) < 0 && errno != EINTR) || p[1].revents)
		return false;
	outside_read(m);
	while (m->first < m->n && m->wait[m->first].until <= far_now())
		outside_poison(m, m->wait[m->first++].addr);
	return true;
}

static void *outside_guard_cb(void *arg)
{
	struct outside *m = arg;
	struct pollfd p[2] = { { .fd = far_child_life(m->child), .events = POLLIN }, { .fd = m->stop, .events = POLLIN } };

	while (poll(p, 2, -1) < 0 && errno == EINTR)
		;
	if (p[1].revents)
		return NULL;
	far_log(FAR_LOG_ERROR, "farpage-serve, which served memory at %p, has ended: what is absent there %s, and nothing is pushed any "
		"more. Close it and map it again", (void *)m->addr,
		m->o.on_fail == FAR_ON_FAIL_WAIT ? "waits" : "raises SIGBUS after the deadline");
	while (outside_turn(m))
		;
	return NULL;
}

/* ------------------------------------------------------------------------------------------------ open */

static int outside_mmap(struct outside *m, struct far_error *err)
{
	int prot = PROT_READ | (m->writable ? PROT_WRITE : 0), flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	uint64_t all = m->len + OUTSIDE_HUGE;
	char *raw;

	if (m->o.address) {
		raw = mmap(m->o.address, (size_t)m->len, prot, flags | MAP_FIXED_NOREPLACE, -1, 0);
		if (raw != MAP_FAILED && raw != m->o.address) { /* a kernel that does not know the flag took it for a hint */
			munmap(raw, (size_t)m->len);
			raw = MAP_FAILED;
			errno = EEXIST;
		}
		if (raw == MAP_FAILED)
			return far_error_set(err, errno, OUTSIDE_WORDS " at %p: %s. Choose another address, or none", m->uri, m->o.address,
					     far_strerror(errno));
		m->addr = raw;
		return 0;
	}
	raw = mmap(NULL, (size_t)all, prot, flags, -1, 0);
	if (raw == MAP_FAILED)
		return far_error_set(err, errno, OUTSIDE_WORDS ": %" PRIu64 " bytes: %s", m->uri, m->len, far_strerror(errno));
	m->addr = (char *)(far_div_up((uintptr_t)raw, OUTSIDE_HUGE) * OUTSIDE_HUGE);
	if (m->addr > raw)
		munmap(raw, (size_t)(m->addr - raw));
	munmap(m->addr + m->len, (size_t)(raw + all - (m->addr + m->len)));
	return 0;
}

/* How stores will be found is decided by what the descriptor can do. */
static void outside_choose(struct outside *m)
{
	unsigned wp = FAR_UFFD_WP | FAR_UFFD_WP_ASYNC;

	m->have = far_uffd_have() & ~(unsigned)(FAR_UFFD_FORK | FAR_UFFD_MINOR | FAR_UFFD_WP_SHMEM);
	if (!(m->have & FAR_UFFD_SCAN))
		m->have &= ~(unsigned)FAR_UFFD_WP_ASYNC;
	if (!m->writable || m->o.tracking == FAR_TRACK_HASH)
		m->have &= ~wp;
	else if (m->o.tracking == FAR_TRACK_SYNC)
		m->have &= ~(unsigned)FAR_UFFD_WP_ASYNC;
}

static int outside_memory(struct outside *m, struct far_error *err)
{
	int r = outside_mmap(m, err);

	if (r)
		return r;
	madvise(m->addr, (size_t)m->len, MADV_DONTFORK); /* a child would read zeros: nobody serves its faults */
	madvise(m->addr, (size_t)m->len, MADV_NOHUGEPAGE);
	outside_choose(m);
	r = far_uffd_open(m->have, &m->uffd);
	if (r)
		return far_error_set(err, -r, OUTSIDE_WORDS ": userfaultfd cannot be used: %s", m->uri,
				     *far_uffd_why() ? far_uffd_why() : far_strerror(r));
	r = far_uffd_register(m->uffd, (uint64_t)(uintptr_t)m->addr, m->len,
			      FAR_UFFD_MISSING | (m->have & FAR_UFFD_WP ? FAR_UFFD_PROTECT : 0));
	return r ? far_error_set(err, -r, OUTSIDE_WORDS ": userfaultfd refuses the memory: %s", m->uri, far_strerror(r)) : 0;
}

static int outside_send(struct outside *m, int socket, struct far_error *err)
{
	struct far_handover_range range = { .addr = (uint64_t)(uintptr_t)m->addr, .len = m->len };
	struct far_handover h = FAR_HANDOVER_INIT;

	h.uffd = m->uffd;
	h.range = &range;
	h.n = 1;
	h.writable = m->writable;
	h.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	h.mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	h.process = (int)syscall(SYS_pidfd_open, getpid(), 0);
	int r = h.pagemap < 0 || h.mem < 0 ? far_error_set(err, ENOENT, OUTSIDE_WORDS ": /proc/self cannot be opened; is /proc mounted?", m->uri)
					   : far_uffd_send(socket, &h, err);
	far_fd_close(&h.pagemap);
	far_fd_close(&h.mem);
	far_fd_close(&h.process);
	return r;
}

/* From far_child_open_memory(): the child has the source. */
static int outside_hand_over_cb(void *opaque, int socket, struct far_error *err)
{
	struct outside *m = opaque;
	struct far_child_hello hello;

	if (far_io_read(socket, &hello, sizeof hello))
		return -ENOTCONN;
	m->bytes = hello.bytes;
	m->writable = hello.writable;
	m->len = far_div_up(far_max(m->bytes, 1), OUTSIDE_PAGE) * OUTSIDE_PAGE;
	int r = outside_memory(m, err);
	if (r)
		return r;
	r = outside_send(m, socket, err);
	return r == -ECONNRESET || r == -EPIPE ? -ENOTCONN : r;
}

static int outside_check(const struct far_mount_opts *o, const char *uri, struct far_error *err)
{
	if (o->mechanism != FAR_MECH_AUTO && o->mechanism != FAR_MECH_COPY)
		return far_error_set(err, EOPNOTSUPP, OUTSIDE_WORDS " by anything but UFFDIO_COPY: leave `mechanism` out", uri);
	if (o->tracking == FAR_TRACK_NONE && !o->read_only)
		return far_error_set(err, EINVAL, OUTSIDE_WORDS " without finding what is stored: give `read_only`, or leave `tracking` out",
				     uri);
	if (o->local_max)
		return far_error_set(err, EOPNOTSUPP, OUTSIDE_WORDS " with a bound on its memory: only this process can give pages back. "
				     "Leave local_max or `outside` out", uri);
	if (o->inherit)
		return far_error_set(err, EOPNOTSUPP, OUTSIDE_WORDS " so that children see it too: leave `inherit` or `outside` out", uri);
	if (o->address && (uintptr_t)o->address % OUTSIDE_PAGE)
		return far_error_set(err, EINVAL, OUTSIDE_WORDS " at %p: that is not the beginning of a page", uri, o->address);
	return 0;
}

static void outside_free(struct outside *m)
{
	if (m->stop >= 0)
		eventfd_write(m->stop, 1);
	far_thread_join(&m->guard);
	if (m->addr) {
		/* Nobody reads events any more, so none may be raised; and who waits must find no memory, rather than zeros. */
		mprotect(m->addr, (size_t)m->len, PROT_NONE);
		if (m->uffd >= 0)
			far_uffd_unregister(m->uffd, (uint64_t)(uintptr_t)m->addr, m->len);
		munmap(m->addr, (size_t)m->len);
	}
	far_fd_close(&m->uffd);
	far_fd_close(&m->stop);
	free(m->wait);
	free(m);
}

static const struct far_face_ops outside_face;

int far_outside_open(const char *uri, const struct far_mount_opts *opts, struct far_mount **out, struct far_error *err)
{
	struct outside *m = calloc(1, sizeof *m);

	if (!m)
		return far_error_set(err, ENOMEM, OUTSIDE_WORDS ": out of memory", uri);
	m->face.ops = &outside_face;
	m->uri = uri;
	m->uffd = m->stop = -1;
	m->o = (struct far_mount_opts)FAR_MOUNT_OPTS_INIT;
	memcpy(&m->o, opts, far_min(opts->size, sizeof m->o));
	m->o.size = sizeof m->o;
	if (!m->o.deadline_ms)
		m->o.deadline_ms = 30000;
	if (m->o.read_only) /* pages that have changed cannot be taken back from there */
		m->o.follow_ms = UINT32_MAX;
	int r = outside_check(&m->o, uri, err);
	if (!r)
		r = far_child_open_memory(uri, &m->o, outside_hand_over_cb, m, &m->child, err);
	if (!r) {
		m->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		r = m->stop < 0 ? -errno : far_thread_start(&m->guard, "far-guard", outside_guard_cb, m);
		if (r) {
			far_error_set(err, -r, OUTSIDE_WORDS ": %s", uri, far_strerror(r));
			far_mount_close(m->child);
		}
	}
	if (r) {
		outside_free(m);
		return r;
	}
	m->uri = NULL;
	*out = &m->face;
	return 0;
}

/* ------------------------------------------------------------------------------------------------ the face */

static void *outside_addr(const struct far_mount *face)
{
	return outside_of(face)->addr;
}

static int outside_flush(struct far_mount *face)
{
	return far_mount_flush(outside_of(face)->child);
}

static int outside_wait(struct far_mount *face, unsigned percent, int timeout_ms)
{
	return far_mount_wait(outside_of(face)->child, percent, timeout_ms);
}

static int outside_inside(const struct outside *m, uint64_t off, uint64_t len)
{
	return off > m->bytes || len > m->bytes - off ? -EINVAL : 0;
}

static int outside_wait_range(struct far_mount *face, uint64_t off, uint64_t len, int timeout_ms)
{
	int r = outside_inside(outside_of(face), off, len);
	return r || !len ? r : far_mount_wait_range(outside_of(face)->child, off, len, timeout_ms);
}

/* As the program's own madvise() would: the kernel tells the child. The ends are stores. */
static int outside_discard(struct outside *m, uint64_t off, uint64_t len)
{
	uint64_t end = off + len, a = far_min(far_div_up(off, OUTSIDE_PAGE) * OUTSIDE_PAGE, end);
	uint64_t b = end == m->bytes ? end : far_max(end / OUTSIDE_PAGE * OUTSIDE_PAGE, a);

	if (!m->writable)
		return -EROFS;
	memset(m->addr + off, 0, (size_t)(a - off));
	memset(m->addr + b, 0, (size_t)(end - b));
	uint64_t whole = far_div_up(b - a, OUTSIDE_PAGE) * OUTSIDE_PAGE;
	return a < b && madvise(m->addr + a, (size_t)whole, MADV_DONTNEED) ? -errno : 0;
}

static int outside_range(struct far_mount *face, enum far_face_range what, uint64_t off, uint64_t len)
{
	struct outside *m = outside_of(face);
	int r = outside_inside(m, off, len);

	if (r || !len)
		return r;
	switch (what) {
	case FAR_FACE_DISCARD:
		return outside_discard(m, off, len);
	case FAR_FACE_EVICT:
		return -EOPNOTSUPP;
	case FAR_FACE_STORED:
		return m->writable ? m->child->ops->range(m->child, what, off, len) : -EROFS;
	default:
		return m->child->ops->range(m->child, what, off, len);
	}
}

static int outside_status(struct far_mount *face, struct far_status *st)
{
	struct far_status s = FAR_STATUS_INIT;
	size_t size = st->size;
	int r = far_mount_status(outside_of(face)->child, &s);

	if (r)
		return r;
	s.kernel_faults = outside_of(face)->have & FAR_UFFD_KERNEL; /* only who opened the descriptor knows */
	memcpy(st, &s, far_min(size, sizeof s));
	st->size = size;
	return 0;
}

static int outside_close(struct far_mount *face)
{
	struct outside *m = outside_of(face);

	eventfd_write(m->stop, 1); /* the child's end is no accident from here on */
	far_thread_join(&m->guard);
	int r = far_mount_close(m->child);
	outside_free(m);
	return r;
}

static const struct far_face_ops outside_face = {
	.addr = outside_addr,
	.flush = outside_flush,
	.wait = outside_wait,
	.wait_range = outside_wait_range,
	.range = outside_range,
	.status = outside_status,
	.close = outside_close,
};
