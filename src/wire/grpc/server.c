/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One connection of the server, on one seat of the crew. The thread on the seat reads, feeds the session and carries out
 * what comes of it; before it would block in a backend it leaves the seat to another (base/crew.h), answers by itself,
 * and looks whether more is to be done before it goes.
 *
 * Invariants:
 *  1. Only the thread on the seat reads. The session is touched under `lock`, the backend without it.
 *  2. One thread writes at a time (`sending`). The one on the seat never blocks in it: it waits for room and for input at
 *     once. A thread off the seat waits for room, for at most `stall`.
 *  3. `dead` is set once; then the seat ends as soon as nobody runs, and ended() frees everything.
 */
#include "wire/server.h"

#include "base/thread.h"
#include "wire/grpc/session.h"

#include <stdlib.h>
#include <string.h>

#define CONN_SPARE 32768
#define CONN_LOOK (50 * FAR_MSEC) /* how often the connection is told how much was sent */
#define CONN_BATCH (128 * FAR_KIB) /* this much is written before the next request is begun */

struct far_grpc_conn {
	/* fixed */
	const struct far_server_env *env;
	struct far_conn conn;
	void (*ended)(void *opaque);
	void *opaque;
	uint64_t born;
	/* the seat's */
	uint8_t *spare;
	struct far_spin spin;
	uint64_t dry; /* since when nothing comes; 0: something came last */

	struct far_mutex lock;
	struct far_session s FAR_GUARDED_BY(lock);
	bool sending FAR_GUARDED_BY(lock), dead FAR_GUARDED_BY(lock);
	uint64_t sent FAR_GUARDED_BY(lock), looked FAR_GUARDED_BY(lock); /* bytes; when the connection was told of them */
	bool brisk FAR_GUARDED_BY(lock); /* the connection has been told that somebody waits */
	uint64_t moved FAR_GUARDED_BY(lock); /* when bytes moved last, either way */
	uint64_t full FAR_GUARDED_BY(lock);  /* since when the peer takes nothing, whatever it sends; 0: it does */
};

static void server_die(struct far_grpc_conn *c) FAR_REQUIRES(c->lock)
{
	if (!c->dead)
		c->conn.ops->shutdown(&c->conn);
	c->dead = true;
}

/* Write what there is. False: the socket is full. */
static bool server_send(struct far_grpc_conn *c) FAR_REQUIRES(c->lock)
{
	struct far_h2 *h = &c->s.h2;
	int err = 0;

	if (c->sending)
		return true; /* whoever writes looks again before it stops */
	if (!c->brisk && atomic_load_explicit(&c->s.demand, memory_order_relaxed)) {
		c->brisk = true;
		far_conn_brisk(&c->conn);
	}
	c->sending = true;
	while (!c->dead && far_h2_fill(h, &err)) {
		h->writing = true;
		const struct iovec *iov = h->iov + h->iov_at;
		int n = (int)(h->iov_n - h->iov_at);
		far_mutex_unlock(&c->lock);
		ssize_t k = c->conn.ops->writev(&c->conn, iov, n);
		uint64_t now = far_now();
		far_mutex_lock(&c->lock);
		h->writing = false;
		if (k == -EAGAIN) {
			c->sending = false;
			c->full = c->full ? c->full : now;
			atomic_store_explicit(&c->s.stuck, true, memory_order_relaxed);
			return false;
		}
		if (k <= 0) {
			server_die(c);
			break;
		}
		c->moved = now;
		c->full = 0;
		c->sent += (uint64_t)k;
		if (now - c->looked > CONN_LOOK) {
			c->looked = now;
			far_conn_sent(&c->conn, c->sent);
		}
		far_h2_wrote(h, (size_t)k);
	}
	atomic_store_explicit(&c->s.stuck, false, memory_order_relaxed);
	if (err || far_h2_over(h))
		server_die(c);
	c->sending = false;
	return true;
}

/* The same from a thread that is not on the seat: it waits for room. */
static void server_send_all(struct far_grpc_conn *c) FAR_REQUIRES(c->lock)
{
	while (!c->dead && !server_send(c)) {
		uint64_t until = c->full + c->env->stall;
		c->sending = true;
		far_mutex_unlock(&c->lock);
		int r = c->conn.ops->wait(&c->conn, false, true, until);
		far_mutex_lock(&c->lock);
		c->sending = false;
		if (r)
			server_die(c);
	}
}

/* How long the peer may be silent now. */
static uint64_t server_patience(struct far_grpc_conn *c) FAR_REQUIRES(c->lock)
{
	uint64_t full = c->full ? c->full + c->env->stall : FAR_NEVER;

	if (!c->s.greeted)
		return c->born + c->env->handshake;
	if (c->s.running || (!c->s.open && !far_h2_pending(&c->s.h2)))
		return full;
	return far_min(full, c->moved + c->env->stall);
}

static ssize_t server_read_once(struct far_grpc_conn *c, const struct iovec *iov, int n)
{
	ssize_t k = c->conn.ops->readv(&c->conn, iov, n);

	if (k == -EAGAIN && !c->dry)
		c->dry = far_now();
	while (k == -EAGAIN && far_spin_wanted(&c->spin) && far_now() - c->dry < FAR_SPIN) {
		far_thread_yield();
		k = c->conn.ops->readv(&c->conn, iov, n);
	}
	if (k > 0 && c->dry) {
		far_spin_learn(&c->spin, far_now() - c->dry);
		c->dry = 0;
	}
	return k;
}

/* Take bytes in, or sleep until there are some (or room, if something waits to be written). */
static void server_receive(struct far_grpc_conn *c, bool room) FAR_REQUIRES(c->lock)
{
	struct iovec iov[2];
	uint8_t *dst = NULL;
	int n = 0;
	/* A thread off the seat that sends may close the stream meanwhile: the place is held on to. */
	struct far_request *pin;
	size_t direct = far_session_place(&c->s, &dst, &pin);

	if (direct)
		iov[n++] = (struct iovec){ dst, direct };
	iov[n++] = (struct iovec){ c->spare, CONN_SPARE };
	far_mutex_unlock(&c->lock);
	ssize_t k = server_read_once(c, iov, n);
	uint64_t now = far_now();
	far_mutex_lock(&c->lock);
	if (k > 0) {
		size_t first = (size_t)far_min((uint64_t)k, direct);
		int r = first ? far_session_feed(&c->s, dst, first) : 0;
		if (r == 0 && (size_t)k > first)
			r = far_session_feed(&c->s, c->spare, (size_t)k - first);
		far_session_placed(pin);
		c->moved = now;
		if (r || now > server_patience(c))
			server_die(c);
		return;
	}
	far_session_placed(pin);
	if (k != -EAGAIN) {
		server_die(c);
		return;
	}
	uint64_t until = server_patience(c);
	if (c->s.queue && !c->dead) /* held back until others have let go of memory: nobody tells us when */
		until = far_min(until, now + 5 * FAR_MSEC);
	far_mutex_unlock(&c->lock);
	int r = c->conn.ops->wait(&c->conn, true, !room, until);
	now = far_now();
	far_mutex_lock(&c->lock);
	if (r == -ETIMEDOUT && now < server_patience(c))
		r = 0;
	if (r)
		server_die(c);
}

/* Off the seat: carry out `r`, then whatever else is ready, and leave nothing unsent. */
static void server_finish_off_seat(struct far_grpc_conn *c, struct far_request *r)
{
	while (r) {
		far_request_run(r, 0);
		far_mutex_lock(&c->lock);
		far_session_finish(&c->s, r);
		server_send_all(c);
		r = c->dead ? NULL : far_session_next(&c->s);
		far_mutex_unlock(&c->lock);
	}
}

static void server_parked(void *arg)
{
	struct far_request *r = arg;
	struct far_grpc_conn *c = far_container_of(r->session, struct far_grpc_conn, s);

	server_finish_off_seat(c, r);
}

static bool server_carry_out(struct far_grpc_conn *c, struct far_seat *seat, struct far_request *r)
{
	if (!far_request_run(r, FAR_NOWAIT)) {
		if (far_crew_leave(seat)) {
			server_finish_off_seat(c, r);
			return true;
		}
		if (far_crew_park(seat, server_parked, r) == 0)
			return true;
		far_request_fail(r, FAR_GRPC_UNAVAILABLE, "out of memory");
	}
	far_mutex_lock(&c->lock);
	far_session_finish(&c->s, r);
	far_mutex_unlock(&c->lock);
	return true;
}

/* Before the first request runs: who the connection's peer is. */
static void server_meet(struct far_grpc_conn *c) FAR_REQUIRES(c->lock)
{
	struct far_peer peer;
	int r;

	if (!c->env->access || c->s.who || !c->s.queue)
		return;
	r = far_conn_peer(&c->conn, &peer);
	if (r == 0)
		r = far_access_peer(c->env->access, &peer, &c->s.who);
	if (r)
		server_die(c);
}

static bool server_run(void *opaque, struct far_seat *seat)
{
	struct far_grpc_conn *c = opaque;
	struct far_request *r = NULL;
	bool room = true;

	far_mutex_lock(&c->lock);
	if (c->s.replies >= CONN_BATCH || !far_session_ready(&c->s))
		room = server_send(c);
	server_meet(c);
	if (!c->dead && room)
		r = far_session_next(&c->s);
	if (!r && !c->dead)
		server_receive(c, room);
	bool on = !c->dead;
	far_mutex_unlock(&c->lock);
	return r ? server_carry_out(c, seat, r) : on;
}

static void server_free(struct far_grpc_conn *c) FAR_NO_TSA
{
	far_session_fini(&c->s);
	far_conn_close(&c->conn);
	far_mutex_fini(&c->lock);
	free(c->spare);
	free(c);
}

static void server_ended(void *opaque)
{
	struct far_grpc_conn *c = opaque;
	void (*ended)(void *) = c->ended;
	void *arg = c->opaque;

	/* First out of the server's list, so that nobody can reach it any more. */
	ended(arg);
	server_free(c);
}

void far_grpc_conn_kill(struct far_grpc_conn *c)
{
	far_mutex_lock(&c->lock);
	server_die(c);
	far_mutex_unlock(&c->lock);
}

int far_grpc_conn_start(const struct far_server_env *env, struct far_crew *crew, struct far_conn *conn,
			void (*ended)(void *opaque), void *opaque, struct far_grpc_conn **out)
{
	struct far_grpc_conn *c = calloc(1, sizeof *c);

	if (!c)
		return -ENOMEM;
	c->spare = malloc(CONN_SPARE);
	int r = c->spare ? far_session_init(&c->s, (struct far_server_env *)env) : -ENOMEM;
	if (r) {
		free(c->spare);
		free(c);
		return r;
	}
	far_mutex_init(&c->lock);
	c->env = env;
	c->ended = ended;
	c->opaque = opaque;
	c->born = c->moved = far_now();
	c->conn = *conn;
	*out = c; /* before the seat may end it */
	r = far_crew_seat(crew, -1, server_run, server_ended, c);
	if (r) {
		c->conn.ops = NULL; /* it stays the caller's */
		server_free(c);
		return r;
	}
	conn->ops = NULL;
	return 0;
}
