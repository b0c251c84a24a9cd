/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One connection, made of a libnbd handle. There is no thread: a caller hands its command to libnbd, which sends it at
 * once if it can, and then either drives the connection (polls, lets libnbd read) or sleeps until somebody has driven its
 * reply in. A driver whose own reply is there passes the wheel on.
 *
 *      UP --an error, the end, far_nbd_link_break()--> DYING --link_bury()--> CLOSED
 *
 *   DYING   no command is added; the driver (there is one as long as anything is pending) finds libnbd's handle dead
 *   CLOSED  the handle and every descriptor are closed, what lay unsent in the socket was thrown away (a reset)
 *
 * 1. libnbd fills callers' buffers itself, so nobody returns before its reply is in or the handle is closed. A call whose
 *    time is over therefore ends the connection: the shutdown wakes the driver, and that takes no time of the peer's.
 * 2. A command without a reply is ended by link_bury() only, after the close: what is sent next, on another connection,
 *    cannot be overtaken by bytes of ours that were still on this side.
 * 3. libnbd has a lock of its own, held while it calls us back. Order: libnbd's lock, then `lock`. So nothing of libnbd's
 *    is called under `lock`.
 * 4. libnbd reads as long as there is something to read. A server that never ends what it says would keep the driver inside:
 *    so it calls us back now and then, and what has no end, or no end in time, is ended by a shutdown (link_enough()). It does
 *    not for errors without end for one read: there the driver's own look at the clock ends it, as soon as the socket was empty
 *    for a moment, which it is again and again because libnbd reads in small pieces while the kernel fills in large ones; or
 *    another call's deadline, or far_stop().
 * 5. `users` counts who is inside libnbd to add a command; the handle is closed when there is none.
 */
#define _GNU_SOURCE
#include "wire/nbd/link.h"

#include "net/net.h"
#include "wire/nbd/refusal.h"
#include "wire/nbd/trust.h"

#include <libnbd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define LINK_MAX_IO ((uint32_t)32 << 20) /* where the server names no limit: what every one takes */
#define LINK_IDLE (10 * FAR_MSEC) /* after that a connection is looked at before it is used */
#define LINK_BYE (200 * FAR_MSEC)
#define LINK_STEPS 10000 /* of libnbd's states, from the greeting to the first command; some 200 are usual */
#define LINK_OFTEN 64    /* chunks, states: how often the time is looked at */
#define LINK_CONTEXT "base:allocation"

struct far_nbd_link {
	/* fixed after open */
	struct nbd_handle *h;
	struct far_conn conn; /* the same socket as libnbd's, by a descriptor of its own */
	int wake;             /* eventfd: the driver looks again what it waits for */
	_Atomic unsigned refs;

	struct far_mutex lock;
	struct far_cond quiet; /* users is 0, closed, or DYING and left by its driver */
	struct far_nbd_op *ops FAR_GUARDED_BY(lock); /* pending, oldest first */
	unsigned pending FAR_GUARDED_BY(lock), users FAR_GUARDED_BY(lock);
	bool driven FAR_GUARDED_BY(lock), dying FAR_GUARDED_BY(lock), closed FAR_GUARDED_BY(lock);

	/* the driver's: whoever has set `driven` */
	struct far_spin spin;
	uint64_t turned; /* when it ended */

	/* while it is being opened */
	unsigned steps;
	int fd; /* libnbd's */
	uint64_t until;
};

/* ------------------------------------------------------------------------------------------------ completion */

static void link_remove_locked(struct far_nbd_link *l, struct far_nbd_op *op) FAR_REQUIRES(&l->lock)
{
	struct far_nbd_op **at = &l->ops;

	while (*at != op)
		at = &(*at)->next;
	*at = op->next;
	l->pending--;
}

/* What a server's error number means to us. */
static int link_error(const struct far_nbd_op *op, int e)
{
	switch (e) {
	case EPERM:
		return op->cmd == FAR_NBD_WRITE || op->cmd == FAR_NBD_ZERO ? -EROFS : -EPERM;
	case ENOMEM:
		return -ENOBUFS; /* the server's memory, which it may have again soon */
	case ESHUTDOWN:
		return -ECONNABORTED; /* it is the server that ends, not we */
	case EOVERFLOW:
		return -EIO;
	default:
		return e > 0 && e < 4096 ? -e : -EIO;
	}
}

struct link_cookie {
	struct far_nbd_link *l;
	struct far_nbd_op *op;
};

static void link_done_locked(struct far_nbd_link *l, struct far_nbd_op *op, int r) FAR_REQUIRES(&l->lock)
{
	link_remove_locked(l, op);
	op->error = r;
	atomic_store_explicit(&op->done, true, memory_order_release);
	far_cond_signal(&op->cond);
}

/* Called by libnbd, on the driver's thread or on one that adds a command, with libnbd's lock held. */
static int link_complete_cb(void *opaque, int *error)
{
	struct link_cookie *k = opaque;
	struct far_nbd_link *l = k->l;
	struct far_nbd_op *op = k->op;

	/* ENOTCONN is no error of the protocol: libnbd gives up. The op stays until the socket is closed. */
	if (*error == ENOTCONN)
		return 1;
	int r = *error ? link_error(op, *error) : 0;
	if (!r && op->cmd == FAR_NBD_READ && op->seen != op->len)
		r = -EPROTO; /* a hole in a structured reply */
	far_mutex_lock(&l->lock);
	link_done_locked(l, op, r);
	far_mutex_unlock(&l->lock);
	return 1;
}

/* Some of an answer has come: has there been more than was asked for, or is it late? */
static void link_enough(struct link_cookie *k)
{
	if (k->op->seen > k->op->len || (++k->op->chunks % LINK_OFTEN == 0 && far_now() >= k->op->until))
		far_nbd_link_break(k->l);
}

static int link_chunk_cb(void *opaque, const void *buf, size_t len, uint64_t off, unsigned status, int *error)
{
	struct link_cookie *k = opaque;

	if (status != LIBNBD_READ_ERROR)
		k->op->seen += len;
	link_enough(k);
	return 0;
}

/* libnbd has checked that the entries are whole, not what they say. */
static int link_extents_cb(void *opaque, const char *context, uint64_t off, uint32_t *e, size_t n, int *error)
{
	struct link_cookie *k = opaque;
	struct far_nbd_op *op = k->op;
	uint64_t end = op->off + op->len, at = op->off;

	link_enough(k);
	if (strcmp(context, LINK_CONTEXT) || off != op->off || op->n)
		return 0;
	for (size_t i = 0; i + 1 < n && at < end; i += 2) {
		uint64_t len = far_min(e[i], end - at);
		enum far_extent_kind kind = e[i + 1] & LIBNBD_STATE_ZERO ? FAR_EXTENT_ZERO : FAR_EXTENT_DATA;
		if (!len)
			break;
		if (op->n && op->extents[op->n - 1].kind == kind)
			op->extents[op->n - 1].len += len;
		else if (op->n < op->max)
			op->extents[op->n++] = (struct far_extent){ at, len, kind };
		else
			break;
		at += len;
	}
	return 0;
}

/* ------------------------------------------------------------------------------------------------ the end of it */

static bool link_is_dead(struct far_nbd_link *l)
{
	return nbd_aio_is_dead(l->h) || nbd_aio_is_closed(l->h);
}

void far_nbd_link_break(struct far_nbd_link *l)
{
	far_mutex_lock(&l->lock);
	l->dying = true;
	if (!l->closed)
		l->conn.ops->shutdown(&l->conn);
	far_mutex_unlock(&l->lock);
}

/* By the driver, or by nobody else than whoever holds the last reference. Throws away what was not sent yet. */
static void link_bury(struct far_nbd_link *l)
{
	struct linger now = { .l_onoff = 1, .l_linger = 0 };

	far_mutex_lock(&l->lock);
	l->dying = true;
	while (l->users)
		far_cond_wait(&l->quiet, &l->lock);
	far_mutex_unlock(&l->lock);
	(void)setsockopt(l->conn.fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
	nbd_close(l->h);
	far_mutex_lock(&l->lock);
	far_conn_close(&l->conn); /* under the lock: far_nbd_link_break() shuts it down */
	l->h = NULL;
	l->closed = true;
	while (l->ops) {
		l->ops->lost = l->ops->sent;
		link_done_locked(l, l->ops, -ECONNRESET);
	}
	far_cond_broadcast(&l->quiet);
	far_mutex_unlock(&l->lock);
}

/* ------------------------------------------------------------------------------------------------ driving */

/* Let libnbd do what the socket is ready for. */
static void link_turn(struct far_nbd_link *l, unsigned direction, short revents)
{
	bool over = revents & (POLLHUP | POLLERR | POLLNVAL);

	/* A state that another thread has changed meanwhile takes no harm: libnbd refuses, or tries and would block. */
	if ((direction & LIBNBD_AIO_DIRECTION_READ) && (over || (revents & POLLIN)))
		nbd_aio_notify_read(l->h);
	else if ((direction & LIBNBD_AIO_DIRECTION_WRITE) && (over || (revents & POLLOUT)))
		nbd_aio_notify_write(l->h);
	else if (over)
		nbd_aio_notify_read(l->h);
}

static int link_poll(struct far_nbd_link *l, struct pollfd p[2], uint64_t until)
{
	uint64_t began = far_now();
	int n = 0;

	if (far_spin_wanted(&l->spin))
		while (!(n = poll(p, 2, 0)) && far_now() - began < FAR_SPIN)
			far_thread_yield();
	if (!n)
		n = poll(p, 2, far_deadline_poll_ms(until));
	far_spin_learn(&l->spin, far_now() - began);
	return n;
}

/* Until op's reply is in (0), the link is buried (0: so is the op), or `until` (-ETIMEDOUT). */
static int link_drive(struct far_nbd_link *l, struct far_nbd_op *op, uint64_t until)
{
	while (!atomic_load_explicit(&op->done, memory_order_acquire)) {
		if (link_is_dead(l)) {
			link_bury(l);
			return 0;
		}
		unsigned direction = nbd_aio_get_direction(l->h);
		struct pollfd p[2] = {
			{ .fd = l->conn.fd, .events = (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
							      (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0)) },
			{ .fd = l->wake, .events = POLLIN },
		};
		int n = link_poll(l, p, until);
		if (far_now() >= until) /* also if something comes, again and again, that is not the reply */
			return -ETIMEDOUT;
		uint64_t v;
		if (n > 0 && p[1].revents && read(l->wake, &v, sizeof v) < 0 && errno != EAGAIN)
			return -errno;
		if (n > 0 && p[0].revents)
			link_turn(l, direction, p[0].revents);
	}
	return 0;
}

/* Let go of the wheel: to somebody who waits for a reply, other than `op`. */
static void link_yield_locked(struct far_nbd_link *l, const struct far_nbd_op *op) FAR_REQUIRES(&l->lock)
{
	l->driven = false;
	l->turned = far_now();
	if (l->ops && l->ops != op)
		far_cond_signal(&l->ops->cond);
	else if (l->ops && l->ops->next)
		far_cond_signal(&l->ops->next->cond);
	if (l->dying)
		far_cond_broadcast(&l->quiet);
}

/* Wait for op's end. Whoever finds nobody at the wheel takes it. */
static int link_wait(struct far_nbd_link *l, struct far_nbd_op *op, uint64_t until)
{
	bool late = false;

	far_mutex_lock(&l->lock);
	while (!atomic_load_explicit(&op->done, memory_order_relaxed)) {
		int r = 0;
		if (!l->driven) {
			l->driven = true;
			far_mutex_unlock(&l->lock);
			r = link_drive(l, op, until);
			far_mutex_lock(&l->lock);
			link_yield_locked(l, op);
		} else if (!far_cond_wait_until(&op->cond, &l->lock, until)) {
			r = -ETIMEDOUT;
		}
		if (r && !late && !atomic_load_explicit(&op->done, memory_order_relaxed)) {
			late = true;
			until = FAR_NEVER; /* until it is closed, which is our own work */
			far_mutex_unlock(&l->lock);
			far_nbd_link_break(l);
			far_mutex_lock(&l->lock);
		}
	}
	far_mutex_unlock(&l->lock);
	return op->error == -ECONNRESET && (late || far_now() >= until) ? -ETIMEDOUT : op->error;
}

/* ------------------------------------------------------------------------------------------------ commands */

static int64_t link_issue(struct far_nbd_link *l, struct far_nbd_op *op, struct link_cookie *k)
{
	nbd_completion_callback done = { .callback = link_complete_cb, .user_data = k };
	uint32_t fua = op->fua ? LIBNBD_CMD_FLAG_FUA : 0;

	switch (op->cmd) {
	case FAR_NBD_READ:
		return nbd_aio_pread_structured(l->h, op->in, op->len, op->off,
						(nbd_chunk_callback){ .callback = link_chunk_cb, .user_data = k }, done, 0);
	case FAR_NBD_WRITE:
		return nbd_aio_pwrite(l->h, op->out, op->len, op->off, done, fua);
	case FAR_NBD_FLUSH:
		return nbd_aio_flush(l->h, done, 0);
	case FAR_NBD_ZERO:
		return nbd_aio_zero(l->h, op->len, op->off, done, fua | (op->hole ? 0 : LIBNBD_CMD_FLAG_NO_HOLE));
	default:
		return nbd_aio_block_status(l->h, op->len, op->off,
					    (nbd_extent_callback){ .callback = link_extents_cb, .user_data = k }, done, 0);
	}
}

/* Add op to those that are pending. */
static int link_enter(struct far_nbd_link *l, struct far_nbd_op *op)
{
	far_mutex_lock(&l->lock);
	int r = l->dying ? -ENOTCONN : 0;
	if (!r) {
		struct far_nbd_op **at = &l->ops;
		while (*at)
			at = &(*at)->next;
		*at = op;
		l->pending++;
		l->users++;
	}
	far_mutex_unlock(&l->lock);
	return r;
}

static void link_leave(struct far_nbd_link *l, struct far_nbd_op *op, int refused, bool dead, bool blocked)
{
	uint64_t one = 1;

	far_mutex_lock(&l->lock);
	/* One that libnbd would not take, because the connection ended: link_bury() ends it like the others. */
	if (refused && !dead && !atomic_load_explicit(&op->done, memory_order_relaxed))
		link_done_locked(l, op, refused);
	l->dying = l->dying || dead;
	if (!--l->users)
		far_cond_broadcast(&l->quiet);
	/* The driver sleeps with what it knew before. */
	if (l->driven && (dead || blocked) && write(l->wake, &one, sizeof one) < 0)
		l->conn.ops->shutdown(&l->conn); /* cannot be: the counter is far from full */
	far_mutex_unlock(&l->lock);
}

int far_nbd_link_call(struct far_nbd_link *l, struct far_nbd_op *op, uint64_t until)
{
	struct link_cookie k = { l, op };
	int refused = 0;

	op->next = NULL;
	op->sent = op->lost = false;
	op->n = 0;
	op->seen = 0;
	op->chunks = 0;
	op->until = until;
	op->error = 0;
	atomic_store_explicit(&op->done, false, memory_order_relaxed);
	far_cond_init(&op->cond);
	int r = link_enter(l, op);
	if (!r) {
		op->sent = true;
		if (link_issue(l, op, &k) < 0) {
			op->sent = false;
			refused = nbd_get_errno() ? -nbd_get_errno() : -EIO;
		}
		bool dead = link_is_dead(l), blocked = !dead && (nbd_aio_get_direction(l->h) & LIBNBD_AIO_DIRECTION_WRITE);
		link_leave(l, op, refused, dead, blocked);
		r = link_wait(l, op, until);
	}
	far_cond_fini(&op->cond);
	return r;
}

unsigned far_nbd_link_pending(struct far_nbd_link *l)
{
	far_mutex_lock(&l->lock);
	unsigned n = l->pending;
	far_mutex_unlock(&l->lock);
	return n;
}

bool far_nbd_link_alive(struct far_nbd_link *l)
{
	struct pollfd p = { .events = POLLIN };

	far_mutex_lock(&l->lock);
	bool alive = !l->dying, look = alive && !l->pending && !l->driven && !l->users && far_now() - l->turned > LINK_IDLE;
	l->driven = l->driven || look;
	far_mutex_unlock(&l->lock);
	if (!look)
		return alive;
	/* With nothing pending a server has nothing to say; TLS has (tickets), which libnbd reads. */
	p.fd = l->conn.fd;
	if (poll(&p, 1, 0) > 0) {
		link_turn(l, nbd_aio_get_direction(l->h), p.revents);
		if (link_is_dead(l)) {
			link_bury(l);
			alive = false;
		}
	}
	far_mutex_lock(&l->lock);
	link_yield_locked(l, NULL);
	alive = alive && !l->dying;
	far_mutex_unlock(&l->lock);
	return alive;
}

void far_nbd_link_wait_closed(struct far_nbd_link *l)
{
	far_mutex_lock(&l->lock);
	/* With calls pending there is, or will be, a driver that buries it. */
	while (!l->closed && (l->driven || l->ops))
		far_cond_wait(&l->quiet, &l->lock);
	bool mine = !l->closed;
	l->driven = l->driven || mine;
	far_mutex_unlock(&l->lock);
	if (mine)
		link_bury(l);
}

struct far_nbd_link *far_nbd_link_get(struct far_nbd_link *l)
{
	atomic_fetch_add_explicit(&l->refs, 1, memory_order_relaxed);
	return l;
}

/* Say that we go, so that the server does not speak of a broken connection. */
static void link_bye(struct far_nbd_link *l)
{
	uint64_t until = far_now() + LINK_BYE;

	if (nbd_aio_disconnect(l->h, 0))
		return;
	while (!link_is_dead(l) && far_now() < until) {
		unsigned direction = nbd_aio_get_direction(l->h);
		struct pollfd p = { .fd = l->conn.fd, .events = direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : POLLIN };
		if (poll(&p, 1, far_deadline_poll_ms(until)) > 0)
			link_turn(l, direction, p.revents);
	}
}

void far_nbd_link_put(struct far_nbd_link *l)
{
	if (!l || atomic_fetch_sub_explicit(&l->refs, 1, memory_order_acq_rel) > 1)
		return;
	if (!l->closed) {
		if (!l->dying)
			link_bye(l);
		link_bury(l);
	}
	far_fd_close(&l->wake);
	far_cond_fini(&l->quiet);
	far_mutex_fini(&l->lock);
	free(l);
}

/* ------------------------------------------------------------------------------------------------ opening */

/* The reason that libnbd gives, in words of our own or at least without the names of its functions before it. */
static int link_refused(const struct far_nbd_peer *p, struct far_error *err)
{
	const char *text = nbd_get_error();
	int e = nbd_get_errno();

	const char *means = text ? far_nbd_refusal(text, p->tls, p->tls_psk_file != NULL, &e) : NULL;
	if (means)
		return far_error_set(err, e, "cannot open %s: %s", p->where, means);
	for (const char *colon; text && !strncmp(text, "nbd_", 4) && (colon = strstr(text, ": ")); text = colon + 2)
		;
	/* Without a number: the server ended the connection, or speaks something else. */
	e = e > 0 ? e : ECONNRESET;
	return far_error_set(err, e, "cannot open %s: %.300s", p->where, text && *text ? text : far_strerror(e));
}

static int link_settings(const struct far_nbd_peer *p, const char *certificates, struct nbd_handle *h)
{
	int r = nbd_set_export_name(h, p->export) | nbd_add_meta_context(h, LINK_CONTEXT) |
		nbd_set_tls(h, p->tls ? LIBNBD_TLS_REQUIRE : LIBNBD_TLS_DISABLE);

	/* Every byte of a read is counted as it comes. */
	r |= nbd_set_pread_initialize(h, false);
	if (p->tls)
		r |= nbd_set_tls_verify_peer(h, p->tls_verify);
	if (certificates)
		r |= nbd_set_tls_certificates(h, certificates);
	if (p->tls_psk_file)
		r |= nbd_set_tls_psk_file(h, p->tls_psk_file);
	if (p->tls_username)
		r |= nbd_set_tls_username(h, p->tls_username);
	return r ? -1 : 0;
}

/* libnbd connects by itself where it must know the host's name: for the certificate. */
static int link_connect(struct far_nbd_link *l, const struct far_nbd_peer *p, uint64_t until, int cancel,
			struct far_error *err)
{
	struct far_net_addr a = { .host = p->host, .port = p->port, .path = p->socket };
	char port[8];

	if (p->tls && p->host) {
		snprintf(port, sizeof port, "%d", p->port);
		return nbd_aio_connect_tcp(l->h, p->host, port) ? link_refused(p, err) : 0;
	}
	int r = far_conn_connect(&l->conn, &a, until, cancel, err);
	if (r)
		return r;
	int fd = dup(l->conn.fd);
	if (fd < 0)
		return far_error_set(err, errno, "cannot open %s: %s", p->where, far_strerror(errno));
	return nbd_aio_connect_socket(l->h, fd) ? link_refused(p, err) : 0;
}

/* Called at each change of libnbd's state, which is what it has to say for debugging. */
static int link_step_cb(void *opaque, const char *context, const char *text)
{
	struct far_nbd_link *l = opaque;

	if (++l->steps > LINK_STEPS || (l->steps % LINK_OFTEN == 0 && far_now() >= l->until))
		(void)shutdown(l->fd, SHUT_RDWR);
	return 0;
}

static int link_lost(struct far_nbd_link *l, const struct far_nbd_peer *p, struct far_error *err)
{
	if (l->steps > LINK_STEPS)
		return far_error_set(err, EPROTO, "cannot open %s: the server's greeting has no end", p->where);
	if (far_now() >= l->until)
		return far_error_set(err, ETIMEDOUT, "cannot open %s: no whole answer in time; is it an NBD server?", p->where);
	return link_refused(p, err);
}

/* Some servers send an answer in pieces, the next when the last was acknowledged, which by itself takes 40 ms each. */
static void link_acknowledge(int fd)
{
	int on = 1;

	(void)!setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on); /* a unix socket has none */
}

/* Until commands can be sent. */
static int link_shake(struct far_nbd_link *l, const struct far_nbd_peer *p, uint64_t until, int cancel,
			  struct far_error *err)
{
	while (!nbd_aio_is_ready(l->h)) {
		if (link_is_dead(l))
			return link_lost(l, p, err);
		unsigned direction = nbd_aio_get_direction(l->h);
		struct pollfd fd[2] = {
			{ .fd = nbd_aio_get_fd(l->h), .events = (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
								       (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0)) },
			{ .fd = cancel, .events = POLLIN },
		};
		l->fd = fd[0].fd;
		int n = poll(fd, 2, far_deadline_poll_ms(until));
		if (n > 0 && fd[1].revents)
			return far_error_set(err, ESHUTDOWN, "cannot open %s: %s", p->where, far_strerror(ESHUTDOWN));
		if (far_now() >= until)
			return link_lost(l, p, err);
		if (n > 0) {
			link_turn(l, direction, fd[0].revents);
			link_acknowledge(fd[0].fd);
		}
	}
	return 0;
}

/* Through greeting, TLS and options. */
static int link_handshake(struct far_nbd_link *l, const struct far_nbd_peer *p, uint64_t until, int cancel,
			  struct far_error *err)
{
	bool ours = nbd_get_debug(l->h) == 0; /* else somebody looks for a fault: LIBNBD_DEBUG */

	l->until = until;
	if (ours && (nbd_set_debug_callback(l->h, (nbd_debug_callback){ .callback = link_step_cb, .user_data = l }) ||
		     nbd_set_debug(l->h, true)))
		return link_refused(p, err);
	int r = link_shake(l, p, until, cancel, err);
	if (ours)
		(void)(nbd_set_debug(l->h, false) | nbd_clear_debug_callback(l->h));
	if (r || l->conn.ops)
		return r;
	int fd = dup(nbd_aio_get_fd(l->h));
	r = fd < 0 ? -errno : far_conn_socket(&l->conn, fd);
	if (r)
		far_fd_close(&fd);
	return r ? far_error_set(err, -r, "cannot open %s: %s", p->where, far_strerror(r)) : 0;
}

static int link_describe(struct far_nbd_link *l, const struct far_nbd_peer *p, struct far_nbd_export *e,
			 struct far_error *err)
{
	int64_t bytes = nbd_get_size(l->h), block = nbd_get_block_size(l->h, LIBNBD_SIZE_MINIMUM),
		max = nbd_get_block_size(l->h, LIBNBD_SIZE_MAXIMUM);

	if (bytes < 0)
		return far_error_set(err, EPROTO, "cannot open %s: the server tells no size of the export that makes sense",
				     p->where);
	if (block > (int64_t)FAR_MIB || (block > 0 && (block & (block - 1))) || (max > 0 && (max < 512 || max < block)))
		return far_error_set(err, EPROTO, "cannot open %s: the server's block sizes make no sense (%" PRIi64 " to %" PRIi64
				     " bytes)", p->where, block, max);
	*e = (struct far_nbd_export){
		.bytes = (uint64_t)bytes,
		.block = block > 1 ? (uint32_t)block : 1,
		.max_io = max > 0 ? (uint32_t)far_min((uint64_t)max, LINK_MAX_IO) : LINK_MAX_IO,
		.read_only = nbd_is_read_only(l->h) > 0,
		.flush = nbd_can_flush(l->h) > 0,
		.fua = nbd_can_fua(l->h) > 0,
		.zero = nbd_can_zero(l->h) > 0,
		.multi = nbd_can_multi_conn(l->h) > 0,
		.extents = nbd_can_meta_context(l->h, LINK_CONTEXT) > 0,
	};
	e->max_io -= e->max_io % e->block;
	return 0;
}

/* Connect and agree, with certificates from this folder; NULL: none are needed. */
static int link_start(struct far_nbd_link *l, const struct far_nbd_peer *p, const char *certificates, uint64_t until, int cancel,
		      struct far_nbd_export *e, struct far_error *err)
{
	int r = l->wake < 0 ? far_error_set(err, errno, "cannot open %s: %s", p->where, far_strerror(errno)) :
		!l->h || link_settings(p, certificates, l->h) ? link_refused(p, err) : link_connect(l, p, until, cancel, err);

	if (!r)
		r = link_handshake(l, p, until, cancel, err);
	return r ? r : link_describe(l, p, e, err);
}

int far_nbd_link_open(const struct far_nbd_peer *p, uint64_t until, int cancel, struct far_nbd_link **out,
		      struct far_nbd_export *e, struct far_error *err)
{
	struct far_nbd_link *l = calloc(1, sizeof *l);
	struct far_nbd_trust trust = { .made = false };
	struct far_error own = { 0 }, unheard = { 0 };
	int r = 0;

	err = err ? err : &unheard;
	if (!l)
		return far_error_set(err, ENOMEM, "cannot open %s: %s", p->where, far_strerror(ENOMEM));
	far_mutex_init(&l->lock);
	far_cond_init(&l->quiet);
	atomic_init(&l->refs, 1);
	l->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	l->h = nbd_create();
	bool unsaid = p->tls && p->tls_verify && !p->tls_certificates && !p->tls_psk_file;
	if (unsaid && (r = far_nbd_trust_open(&trust, &own)))
		far_error_set(err, -r, "cannot open %s: %s", p->where, own.text);
	if (!r)
		r = link_start(l, p, unsaid ? trust.dir : p->tls_certificates, until, cancel, e, err);
	far_nbd_trust_close(&trust);
	if (!r) {
		*out = l;
		return 0;
	}
	nbd_close(l->h);
	far_conn_close(&l->conn);
	l->closed = true;
	far_nbd_link_put(l);
	return r;
}
