/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One NBD connection of the server, on one seat of the crew. The thread on the seat takes in as many requests as one
 * read brings, carries out at once what does not wait (FAR_NOWAIT), and puts the answers behind each other into one
 * buffer, which is written when there is nothing more to do: a client that sends many requests at once costs one read
 * and one write. A request that would wait becomes a *job*: the thread leaves the seat to another (base/crew.h) and
 * carries it out itself; its answer overtakes or is overtaken by others, as the protocol allows.
 *
 *     greeting -> negotiation (hello.c) -> serving -> over
 *                                          each request: answered in the batch, or a job: away -> queue -> sent
 *
 * Invariants:
 *  1. What is marked as the seat's is touched by the thread on the seat only. It ends to be so the moment that
 *     far_crew_leave() has given the seat away: a job holds all that it needs.
 *  2. One thread writes at a time. While no job is away that is the seat's; else who has `sending`. A job's thread that
 *     finds it taken leaves its answer in `queue`, which whoever sends empties before giving `sending` back.
 *  3. The seat waits where it must: for room in the socket, for jobs to end when they hold too much. All of these waits
 *     end when `dead` is set, with the deadline for a peer that takes nothing, or with the jobs.
 *  4. What jobs hold (their buffers) is counted in `held` here and in the environment's `memory`.
 */
#include "wire/nbd/service.h"

#include "backend/backend.h"
#include "base/pool.h"
#include "base/thread.h"
#include "wire/loans.h"

#include <stdatomic.h>
#include <stdlib.h>

#define CONN_IN ((size_t)256 << 10)
#define CONN_OUT ((size_t)256 << 10)
#define CONN_SEGS 64
#define CONN_INLINE ((size_t)64 << 10)  /* a longer write gets a buffer of its own, a longer read is sent from one */
#define CONN_JOBS 1024                  /* that may be away */
#define CONN_HELD (64 * FAR_MIB)        /* that they may hold together, but that one is always possible */
#define CONN_SMALL FAR_MIB              /* so much a connection may hold whatever the others do */
#define CONN_LOOK (5 * FAR_MSEC)        /* how often to look whether others have let go of memory */

struct nbd_job {
	struct nbd_job *next;
	struct far_nbd_conn *conn;
	struct far_nbd_request q;
	uint8_t *buf;    /* of the pool: data of a read or write */
	size_t cap;
	uint8_t *status; /* a whole reply, malloc()ed */
	size_t status_n;
	size_t body_n;   /* bytes of buf to be sent */
	size_t head_n;
	uint8_t head[FAR_NBD_FAIL_MAX];
};

/* A part of the batch. */
struct nbd_seg {
	const void *p;
	size_t n;
	struct far_loan loan; /* p is on loan */
	void *buf;            /* p is in this buffer of the pool */
	size_t cap;
};

enum nbd_next { NBD_MORE, NBD_NEED, NBD_LEFT, NBD_END };

struct far_nbd_conn {
	/* fixed */
	struct far_server_env *env;
	struct far_conn conn;
	void (*ended)(void *opaque);
	void *opaque;
	uint64_t born;
	/* the seat's */
	struct far_nbd_hello hello;
	struct far_nbd_peer peer;
	bool serving;
	uint8_t *in, *out;
	size_t in_at, in_n, out_n;
	struct nbd_seg seg[CONN_SEGS];
	unsigned segs;
	size_t beside;           /* bytes of the batch that are not in `out` */
	struct nbd_job *filling; /* a write whose bytes are still coming in */
	size_t filled;
	uint64_t skip;           /* bytes of a refused write still to come */
	struct far_spin spin;
	uint64_t dry;            /* since when nothing comes; 0: something came last */
	uint64_t moved;          /* when something came last */
	/* atomic */
	_Atomic unsigned away;   /* jobs that are not yet sent; only the seat adds to it */
	_Atomic bool dead;

	struct far_mutex lock;
	struct far_cond changed; /* sending, away, held, dead */
	bool sending FAR_GUARDED_BY(lock);
	struct nbd_job *queue FAR_GUARDED_BY(lock), **queue_end FAR_GUARDED_BY(lock);
	uint64_t held FAR_GUARDED_BY(lock);
};

/* ---------------------------------------------------------------------------------------------------- the end */

static void conn_die_locked(struct far_nbd_conn *c) FAR_REQUIRES(c->lock)
{
	if (!atomic_exchange(&c->dead, true))
		c->conn.ops->shutdown(&c->conn);
	far_cond_broadcast(&c->changed);
}

static void conn_die(struct far_nbd_conn *c)
{
	far_mutex_lock(&c->lock);
	conn_die_locked(c);
	far_mutex_unlock(&c->lock);
}

void far_nbd_conn_kill(struct far_nbd_conn *c)
{
	conn_die(c);
}

/* -------------------------------------------------------------------------------------------------------- jobs */

static void conn_job_free(struct nbd_job *j)
{
	far_buf_put(j->buf, j->cap);
	free(j->status);
	free(j);
}

/* Wait until the jobs that are away leave room for n more bytes. False: there is no end to it. */
static bool conn_room(struct far_nbd_conn *c, size_t n)
{
	uint64_t until = far_now() + c->env->stall;
	bool room = false;

	far_mutex_lock(&c->lock);
	while (!room && !atomic_load(&c->dead)) {
		bool much = c->held && (c->held + n > CONN_HELD || atomic_load(&c->away) >= CONN_JOBS);
		bool all = c->held + n > CONN_SMALL && atomic_load(&c->env->memory) + n > c->env->memory_max;
		room = !much && !all;
		if (!room && all && !c->held && far_now() >= until)
			break;
		if (!room)
			far_cond_wait_until(&c->changed, &c->lock, all ? far_now() + CONN_LOOK : FAR_NEVER);
	}
	far_mutex_unlock(&c->lock);
	return room;
}

/* A job with room for n bytes of data, counted in `held`; NULL: no memory. The batch is sent before any waiting. */
static struct nbd_job *conn_job_new(struct far_nbd_conn *c, const struct far_nbd_request *q, size_t n)
{
	if (!conn_room(c, n))
		return NULL;
	struct nbd_job *j = calloc(1, sizeof *j);
	if (j && n) {
		j->buf = far_buf_get(n);
		j->cap = n;
	}
	if (!j || (n && !j->buf)) {
		free(j);
		return NULL;
	}
	j->conn = c;
	j->q = *q;
	far_mutex_lock(&c->lock);
	c->held += sizeof *j + n;
	far_mutex_unlock(&c->lock);
	atomic_fetch_add(&c->env->memory, sizeof *j + n);
	return j;
}

static void conn_unhold_locked(struct far_nbd_conn *c, const struct nbd_job *j) FAR_REQUIRES(c->lock)
{
	uint64_t n = sizeof *j + j->cap;

	c->held -= n;
	atomic_fetch_sub(&c->env->memory, n);
}

static void conn_job_drop(struct nbd_job *j)
{
	struct far_nbd_conn *c = j->conn;

	far_mutex_lock(&c->lock);
	conn_unhold_locked(c, j);
	far_mutex_unlock(&c->lock);
	conn_job_free(j);
}

/* ------------------------------------------------------------------------------------------------------ sending */

/* All of it, waiting for room. iov is changed. */
static int conn_write(struct far_nbd_conn *c, struct iovec *iov, int n)
{
	uint64_t since = 0;

	while (n) {
		if (atomic_load_explicit(&c->dead, memory_order_relaxed))
			return -ESHUTDOWN;
		ssize_t k = c->conn.ops->writev(&c->conn, iov, n);
		if (k == -EAGAIN) {
			since = since ? since : far_now();
			int r = c->conn.ops->wait(&c->conn, false, true, since + c->env->stall);
			if (r)
				return r;
			continue;
		}
		if (k <= 0)
			return k ? (int)k : -EIO;
		since = 0;
		while (n && (size_t)k >= iov->iov_len) {
			k -= (ssize_t)iov->iov_len;
			iov++;
			n--;
		}
		if (n) {
			iov->iov_base = (uint8_t *)iov->iov_base + k;
			iov->iov_len -= (size_t)k;
		}
	}
	return 0;
}

static int conn_job_iov(const struct nbd_job *j, struct iovec *iov)
{
	int n = 0;

	if (j->head_n)
		iov[n++] = (struct iovec){ (void *)(uintptr_t)j->head, j->head_n };
	if (j->status)
		iov[n++] = (struct iovec){ j->status, j->status_n };
	if (j->body_n)
		iov[n++] = (struct iovec){ j->buf, j->body_n };
	return n;
}

/* Send what the jobs have left in the queue; the caller has `sending`. */
static void conn_queue_send(struct far_nbd_conn *c) FAR_REQUIRES(c->lock)
{
	while (c->queue) {
		struct iovec iov[CONN_SEGS];
		struct nbd_job *list = c->queue, **end = &list;
		int n = 0;
		while (*end && n + 3 <= CONN_SEGS) {
			n += conn_job_iov(*end, iov + n);
			end = &(*end)->next;
		}
		c->queue = *end;
		*end = NULL;
		if (!c->queue)
			c->queue_end = &c->queue;
		far_mutex_unlock(&c->lock);
		int r = conn_write(c, iov, n);
		far_mutex_lock(&c->lock);
		if (r)
			conn_die_locked(c);
		while (list) {
			struct nbd_job *j = list;
			list = j->next;
			conn_unhold_locked(c, j);
			atomic_fetch_sub(&c->away, 1);
			conn_job_free(j);
		}
		far_cond_broadcast(&c->changed);
	}
}

/* A job is done: send its answer, or leave it to who is sending. Nothing may be touched afterwards but by the crew. */
static void conn_job_send(struct nbd_job *j)
{
	struct far_nbd_conn *c = j->conn;

	far_mutex_lock(&c->lock);
	j->next = NULL;
	*c->queue_end = j;
	c->queue_end = &j->next;
	if (!c->sending) {
		c->sending = true;
		conn_queue_send(c);
		c->sending = false;
		far_cond_broadcast(&c->changed);
	}
	far_mutex_unlock(&c->lock);
}

static int conn_batch_write(struct far_nbd_conn *c)
{
	struct iovec iov[CONN_SEGS];

	for (unsigned i = 0; i < c->segs; i++)
		iov[i] = (struct iovec){ (void *)(uintptr_t)c->seg[i].p, c->seg[i].n };
	int r = conn_write(c, iov, (int)c->segs);
	for (unsigned i = 0; i < c->segs; i++) {
		far_loan_return(&c->seg[i].loan);
		far_buf_put(c->seg[i].buf, c->seg[i].cap);
	}
	c->segs = 0;
	c->out_n = 0;
	c->beside = 0;
	return r;
}

/* Send the seat's batch. False: the connection is dead. */
static bool conn_flush(struct far_nbd_conn *c)
{
	if (c->segs) {
		/* Nobody else can be writing, and only this thread could change that. */
		bool alone = !atomic_load_explicit(&c->away, memory_order_acquire);
		if (!alone) {
			far_mutex_lock(&c->lock);
			while (c->sending)
				far_cond_wait(&c->changed, &c->lock);
			c->sending = true;
			far_mutex_unlock(&c->lock);
		}
		int r = conn_batch_write(c);
		if (r)
			conn_die(c);
		if (!alone) {
			far_mutex_lock(&c->lock);
			conn_queue_send(c);
			c->sending = false;
			far_cond_broadcast(&c->changed);
			far_mutex_unlock(&c->lock);
		}
	}
	return !atomic_load_explicit(&c->dead, memory_order_relaxed);
}

/* Room for n bytes in the batch's buffer, and for one part beside it. */
static uint8_t *conn_out(struct far_nbd_conn *c, size_t n)
{
	if (n > CONN_OUT - c->out_n || c->segs + 2 > CONN_SEGS || c->beside >= CONN_SMALL)
		conn_flush(c);
	return c->out + c->out_n;
}

/* n bytes were put where conn_out() said. */
static void conn_put(struct far_nbd_conn *c, size_t n)
{
	struct nbd_seg *last = c->segs ? &c->seg[c->segs - 1] : NULL;

	if (last && (const uint8_t *)last->p + last->n == c->out + c->out_n && !last->loan.of && !last->buf)
		last->n += n;
	else
		c->seg[c->segs++] = (struct nbd_seg){ .p = c->out + c->out_n, .n = n };
	c->out_n += n;
}

/* ---------------------------------------------------------------------------------------------------- requests */

static void conn_fail(struct far_nbd_conn *c, const struct far_nbd_request *q, int err, const char *why)
{
	uint8_t *p = conn_out(c, FAR_NBD_FAIL_MAX);

	conn_put(c, far_nbd_put_fail(&c->peer, p, q, err, why));
}

/* The answer of a request that is done, in a job of its own. */
static void conn_job_answer(struct nbd_job *j, int err)
{
	struct far_nbd_peer *peer = &j->conn->peer;

	j->body_n = 0;
	if (err) {
		j->head_n = far_nbd_put_fail(peer, j->head, &j->q, err, NULL);
	} else if (j->q.type == FAR_NBD_BLOCK_STATUS) {
		j->head_n = 0;
	} else if (j->q.type != FAR_NBD_READ || (!j->q.len && peer->form != FAR_NBD_SIMPLE)) {
		j->head_n = far_nbd_put_done(peer->form, j->head, &j->q, 0);
	} else if (far_nbd_is_hole(peer, j->buf, (size_t)j->q.len)) {
		j->head_n = far_nbd_put_hole(peer->form, j->head, &j->q);
	} else {
		j->head_n = far_nbd_put_data(peer->form, j->head, &j->q);
		j->body_n = (size_t)j->q.len;
	}
}

static void conn_job_run(struct nbd_job *j)
{
	struct far_nbd_peer *peer = &j->conn->peer;
	int err = j->q.type == FAR_NBD_BLOCK_STATUS ? far_nbd_status(peer, &j->q, 0, &j->status, &j->status_n)
						    : far_nbd_perform(peer, &j->q, j->buf, 0);

	conn_job_answer(j, err);
	conn_job_send(j);
}

static void conn_job_cb(void *arg)
{
	conn_job_run(arg);
}

/* The request would wait: let somebody else sit here, and carry it out. */
static enum nbd_next conn_away(struct far_nbd_conn *c, struct far_seat *seat, struct nbd_job *j)
{
	atomic_fetch_add_explicit(&c->away, 1, memory_order_release);
	if (far_crew_leave(seat)) {
		conn_job_run(j);
		return NBD_LEFT;
	}
	if (far_crew_park(seat, conn_job_cb, j)) {
		conn_job_answer(j, -ENOMEM);
		conn_job_send(j);
	}
	return NBD_MORE;
}

/* The same for a request that has no job yet; `data` is what a write carries, and is copied. */
static enum nbd_next conn_away_new(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q,
				   const void *data)
{
	size_t n = q->type == FAR_NBD_READ || q->type == FAR_NBD_WRITE ? (size_t)q->len : 0;

	if (!conn_flush(c))
		return NBD_END;
	struct nbd_job *j = conn_job_new(c, q, n);
	if (!j) {
		conn_fail(c, q, -ENOMEM, NULL);
		return NBD_MORE;
	}
	if (data)
		memcpy(j->buf, data, n);
	return conn_away(c, seat, j);
}

/* A read straight from the store's own pages. */
static bool conn_read_lent(struct far_nbd_conn *c, const struct far_nbd_request *q)
{
	uint8_t *p = conn_out(c, FAR_NBD_HEAD_MAX);
	struct nbd_seg *seg = &c->seg[c->segs + 1];
	const void *bytes = far_loan_take(c->peer.e->loans, q->off, (size_t)q->len, &seg->loan);

	if (!bytes)
		return false;
	if (far_nbd_is_hole(&c->peer, bytes, (size_t)q->len)) {
		far_loan_return(&seg->loan);
		conn_put(c, far_nbd_put_hole(c->peer.form, p, q));
		return true;
	}
	/* The head goes into a part of its own, so that the loan's place in the list is where it was taken. */
	c->seg[c->segs] = (struct nbd_seg){ .p = p, .n = far_nbd_put_data(c->peer.form, p, q) };
	c->out_n += c->seg[c->segs].n;
	seg->p = bytes;
	seg->n = (size_t)q->len;
	seg->buf = NULL;
	c->segs += 2;
	c->beside += seg->n;
	return true;
}

static enum nbd_next conn_read_long(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q)
{
	uint8_t *p = conn_out(c, FAR_NBD_HEAD_MAX);
	size_t n = (size_t)q->len;
	/* A very long one is a job, whose memory is counted. */
	void *buf = n <= CONN_SMALL ? far_buf_get(n) : NULL;
	int err = buf ? far_read(c->peer.e->b, q->off, buf, n, FAR_NOWAIT) : -EAGAIN;

	if (err || far_nbd_is_hole(&c->peer, buf, n)) {
		far_buf_put(buf, n);
		if (err == -EAGAIN)
			return conn_away_new(c, seat, q, NULL);
		if (err)
			conn_fail(c, q, err, NULL);
		else
			conn_put(c, far_nbd_put_hole(c->peer.form, p, q));
		return NBD_MORE;
	}
	conn_put(c, far_nbd_put_data(c->peer.form, p, q));
	c->seg[c->segs++] = (struct nbd_seg){ .p = buf, .n = n, .buf = buf, .cap = n };
	c->beside += n;
	return NBD_MORE;
}

static enum nbd_next conn_read(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q)
{
	size_t n = (size_t)q->len, head = far_nbd_data_head(c->peer.form);

	if (conn_read_lent(c, q))
		return NBD_MORE;
	if (n > CONN_INLINE)
		return conn_read_long(c, seat, q);
	uint8_t *p = conn_out(c, FAR_NBD_HEAD_MAX + n);
	int err = n ? far_read(c->peer.e->b, q->off, p + head, n, FAR_NOWAIT) : 0;
	if (err == -EAGAIN)
		return conn_away_new(c, seat, q, NULL);
	if (err)
		conn_fail(c, q, err, NULL);
	else if (!n && c->peer.form != FAR_NBD_SIMPLE)
		conn_put(c, far_nbd_put_done(c->peer.form, p, q, 0));
	else if (far_nbd_is_hole(&c->peer, p + head, n))
		conn_put(c, far_nbd_put_hole(c->peer.form, p, q));
	else
		conn_put(c, far_nbd_put_data(c->peer.form, p, q) + n);
	return NBD_MORE;
}

static enum nbd_next conn_status(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q)
{
	uint8_t *buf;
	size_t n;
	int err = far_nbd_status(&c->peer, q, FAR_NOWAIT, &buf, &n);

	if (err == -EAGAIN)
		return conn_away_new(c, seat, q, NULL);
	if (err) {
		conn_fail(c, q, err, NULL);
		return NBD_MORE;
	}
	memcpy(conn_out(c, n), buf, n);
	conn_put(c, n);
	free(buf);
	return NBD_MORE;
}

static enum nbd_next conn_perform(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q, void *data)
{
	if (q->type == FAR_NBD_READ)
		return conn_read(c, seat, q);
	if (q->type == FAR_NBD_BLOCK_STATUS)
		return conn_status(c, seat, q);
	int err = far_nbd_perform(&c->peer, q, data, FAR_NOWAIT);
	if (err == -EAGAIN)
		return conn_away_new(c, seat, q, data);
	if (err)
		conn_fail(c, q, err, NULL);
	else
		conn_put(c, far_nbd_put_done(c->peer.form, conn_out(c, FAR_NBD_HEAD_MAX), q, 0));
	return NBD_MORE;
}

/* A write's bytes are all here, in its own buffer. */
static enum nbd_next conn_filled(struct far_nbd_conn *c, struct far_seat *seat)
{
	struct nbd_job *j = c->filling;
	int err = far_nbd_perform(&c->peer, &j->q, j->buf, FAR_NOWAIT);

	c->filling = NULL;
	if (err == -EAGAIN)
		return conn_flush(c) ? conn_away(c, seat, j) : (conn_job_drop(j), NBD_END);
	if (err)
		conn_fail(c, &j->q, err, NULL);
	else
		conn_put(c, far_nbd_put_done(c->peer.form, conn_out(c, FAR_NBD_HEAD_MAX), &j->q, 0));
	conn_job_drop(j);
	return NBD_MORE;
}

/* The client says no more: what it has asked for is done first. One that knows no flush means its bytes to be kept. */
static enum nbd_next conn_goodbye(struct far_nbd_conn *c)
{
	if (!c->serving || !conn_flush(c))
		return NBD_END;
	far_mutex_lock(&c->lock);
	while (atomic_load(&c->away) && !atomic_load(&c->dead))
		far_cond_wait(&c->changed, &c->lock);
	far_mutex_unlock(&c->lock);
	if (atomic_load(&c->peer.unflushed)) {
		struct far_nbd_request q = { .type = FAR_NBD_FLUSH };
		int err = far_nbd_perform(&c->peer, &q, NULL, 0);
		if (err)
			far_log(FAR_LOG_WARNING, "export '%s': the flush when an NBD client left failed: %s", c->peer.e->name,
				far_strerror(err));
	}
	return NBD_END;
}

/* A write longer than what waits in `in`: gets a buffer of its own. */
static enum nbd_next conn_fill(struct far_nbd_conn *c, const struct far_nbd_request *q, const uint8_t *data, size_t there)
{
	if (!conn_flush(c))
		return NBD_END;
	struct nbd_job *j = conn_job_new(c, q, (size_t)q->len);
	if (!j) {
		c->skip = q->payload;
		conn_fail(c, q, -ENOMEM, NULL);
		return NBD_MORE;
	}
	memcpy(j->buf, data, there);
	c->in_at += there;
	c->filled = there;
	c->filling = j;
	return NBD_MORE;
}

/* Deal with what stands next in `in`. */
static enum nbd_next conn_next(struct far_nbd_conn *c, struct far_seat *seat)
{
	size_t head = c->peer.form == FAR_NBD_EXTENDED ? FAR_NBD_REQUEST_EXT_BYTES : FAR_NBD_REQUEST_BYTES;
	size_t there = c->in_n - c->in_at;
	struct far_nbd_request q;
	const char *why;

	if (c->filling)
		return c->filled == c->filling->cap ? conn_filled(c, seat) : NBD_NEED;
	if (c->skip) {
		size_t n = (size_t)far_min(c->skip, there);
		c->skip -= n;
		c->in_at += n;
		return n ? NBD_MORE : NBD_NEED;
	}
	if (there < head)
		return NBD_NEED;
	uint8_t *data = c->in + c->in_at + head;
	if (far_nbd_decode_request(c->peer.form, c->in + c->in_at, &q))
		return NBD_END;
	there -= head;
	if (q.type == FAR_NBD_DISC)
		return conn_goodbye(c);
	int err = far_nbd_check(&c->peer, &q, &why);
	if (err) {
		c->in_at += head;
		c->skip = q.payload;
		conn_fail(c, &q, err, why);
		return NBD_MORE;
	}
	if (q.payload > there && q.payload <= CONN_INLINE)
		return NBD_NEED;
	c->in_at += head;
	if (q.payload > there)
		return conn_fill(c, &q, data, there);
	c->in_at += q.payload;
	return conn_perform(c, seat, &q, data);
}

/* ------------------------------------------------------------------------------------------------- negotiation */

static enum nbd_next conn_hello_out(struct far_nbd_conn *c)
{
	struct far_nbd_hello *h = &c->hello;
	struct iovec iov = { h->out, h->out_n };
	int r = h->out_n ? conn_write(c, &iov, 1) : 0;

	h->out_n = 0;
	return r ? NBD_END : NBD_MORE;
}

static enum nbd_next conn_hello(struct far_nbd_conn *c)
{
	struct far_nbd_hello *h = &c->hello;
	size_t used;

	if (far_nbd_hello_feed(h, c->in + c->in_at, c->in_n - c->in_at, &used))
		return NBD_END;
	c->in_at += used;
	bool said = h->out_n > 0;
	if (conn_hello_out(c) == NBD_END || h->over)
		return NBD_END;
	if (h->starttls) {
		/* What came behind it in the clear may be somebody else's. */
		if (c->in_at != c->in_n || c->env->starttls(c->env->tls, &c->conn))
			return NBD_END;
		far_nbd_hello_encrypted(h);
		return NBD_NEED;
	}
	if (h->export) {
		far_nbd_peer_init(&c->peer, h);
		c->serving = true;
		return NBD_MORE;
	}
	return said || (used && c->in_at != c->in_n) ? NBD_MORE : NBD_NEED;
}

/* ------------------------------------------------------------------------------------------------------ the seat */

/* How long the peer may be silent now. */
static uint64_t conn_patience(const struct far_nbd_conn *c)
{
	if (!c->serving)
		return c->born + c->env->handshake + (c->hello.flags_seen ? c->env->stall : 0);
	if (c->filling || c->skip || c->in_at != c->in_n)
		return c->moved + c->env->stall;
	return FAR_NEVER;
}

static ssize_t conn_read_some(struct far_nbd_conn *c, const struct iovec *iov, int n)
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

/* Take bytes in, or sleep until there are some. False: the end. */
static bool conn_receive(struct far_nbd_conn *c)
{
	struct iovec iov[2];
	size_t direct = 0;
	int n = 0;

	if (c->in_at) {
		memmove(c->in, c->in + c->in_at, c->in_n - c->in_at);
		c->in_n -= c->in_at;
		c->in_at = 0;
	}
	if (c->filling) {
		direct = c->filling->cap - c->filled;
		iov[n++] = (struct iovec){ c->filling->buf + c->filled, direct };
	}
	iov[n++] = (struct iovec){ c->in + c->in_n, CONN_IN - c->in_n };
	ssize_t k = conn_read_some(c, iov, n);
	if (k > 0) {
		size_t first = (size_t)far_min((uint64_t)k, direct);
		c->filled += first;
		c->in_n += (size_t)k - first;
		c->moved = far_now();
		return true;
	}
	if (k == 0)
		conn_goodbye(c);
	return k == -EAGAIN && c->conn.ops->wait(&c->conn, true, false, conn_patience(c)) == 0;
}

static bool conn_run(void *opaque, struct far_seat *seat)
{
	struct far_nbd_conn *c = opaque;
	enum nbd_next next;

	do
		next = c->serving ? conn_next(c, seat) : conn_hello(c);
	while (next == NBD_MORE && !atomic_load_explicit(&c->dead, memory_order_relaxed));
	if (next == NBD_LEFT)
		return true; /* the connection is somebody else's by now */
	if (next == NBD_NEED && conn_flush(c) && conn_receive(c))
		return true;
	conn_flush(c);
	conn_die(c);
	return false;
}

static void conn_free(struct far_nbd_conn *c) FAR_NO_TSA
{
	if (c->filling)
		conn_job_drop(c->filling);
	FAR_ASSERT(!c->queue && !c->held);
	for (unsigned i = 0; i < c->segs; i++) {
		far_loan_return(&c->seg[i].loan);
		far_buf_put(c->seg[i].buf, c->seg[i].cap);
	}
	far_nbd_hello_fini(&c->hello);
	far_conn_close(&c->conn);
	far_cond_fini(&c->changed);
	far_mutex_fini(&c->lock);
	far_buf_put(c->in, CONN_IN);
	far_buf_put(c->out, CONN_OUT);
	free(c);
}

static void conn_ended(void *opaque)
{
	struct far_nbd_conn *c = opaque;
	void (*ended)(void *) = c->ended;
	void *arg = c->opaque;

	/* First out of the server's list, so that nobody can reach it any more. */
	ended(arg);
	conn_free(c);
}

int far_nbd_conn_start(const struct far_server_env *env, struct far_crew *crew, struct far_conn *conn, bool tls,
		       void (*ended)(void *opaque), void *opaque, struct far_nbd_conn **out)
{
	struct far_nbd_conn *c = calloc(1, sizeof *c);

	if (!c)
		return -ENOMEM;
	far_mutex_init(&c->lock);
	far_cond_init(&c->changed);
	c->env = (struct far_server_env *)(uintptr_t)env;
	c->ended = ended;
	c->opaque = opaque;
	c->queue_end = &c->queue;
	c->born = c->moved = far_now();
	c->in = far_buf_get(CONN_IN);
	c->out = far_buf_get(CONN_OUT);
	int r = c->in && c->out ? far_nbd_hello_init(&c->hello, env, tls) : -ENOMEM;
	if (r == 0) {
		c->conn = *conn;
		*out = c; /* before the seat may end it */
		r = far_crew_seat(crew, -1, conn_run, conn_ended, c);
	}
	if (r) {
		c->conn.ops = NULL; /* it stays the caller's */
		conn_free(c);
		return r;
	}
	conn->ops = NULL;
	return 0;
}
