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
 *  5. Bytes of a long write that are read straight to their `place` change the store only within far_nbd_receive(), which
 *     tells its owner and those who have it on loan. A write that breaks off leaves what had come, as any write may.
 */
#include "wire/nbd/conn.h"

#include "backend/backend.h"
#include "base/pool.h"

#include <stdlib.h>

#define CONN_IN ((size_t)256 << 10)
#define CONN_INLINE ((size_t)64 << 10)  /* a longer write gets a buffer of its own, a longer read is sent from one */
#define CONN_POINT ((size_t)2 << 10)    /* a shorter read is copied into the batch */
#define CONN_NEXT (FAR_NBD_REQUEST_EXT_BYTES + 4096)
#define CONN_CROWD (200 * FAR_USEC)     /* a yield that takes longer: others want this CPU */
#define CONN_CALM 256
#define CONN_CALM_MAX 16384
#define CONN_LINGER (20 * FAR_USEC)     /* a sleep, at first and at most */
#define CONN_LINGER_MAX (40 * FAR_USEC)
#define CONN_MANY 6                     /* so many requests make one worth while */
#define CONN_SOME 3                     /* so many make a longer one worth while */
#define CONN_DOUBTS 3                   /* so many sleeps in a row for too little end them */
#define CONN_TRIAL 32

enum { CONN_QUIET, CONN_MEASURE, CONN_OTHER }; /* far_nbd_conn.stage */
enum nbd_next { NBD_MORE, NBD_NEED, NBD_LEFT, NBD_END };

/* ---------------------------------------------------------------------------------------------------- requests */

static void conn_fail(struct far_nbd_conn *c, const struct far_nbd_request *q, int err, const char *why)
{
	uint8_t *p = far_nbd_out(c, FAR_NBD_FAIL_MAX);

	far_nbd_put(c, far_nbd_put_fail(&c->peer, p, q, err, why));
}

/* The same once all that the request carries is past: a client that is still sending does not wait for an answer to it yet,
 * and libnbd would take it for one to nothing. */
static void conn_refuse(struct far_nbd_conn *c, const struct far_nbd_request *q, int err, const char *why)
{
	if (!q->payload) {
		conn_fail(c, q, err, why);
		return;
	}
	c->skip = q->payload;
	c->refused = *q;
	c->refused_err = err;
	c->refused_why = why;
}

/* The answer of a request that is done, in a job of its own. */
static void conn_job_answer(struct far_nbd_job *j, int err)
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

static void conn_job_run(struct far_nbd_job *j)
{
	struct far_nbd_peer *peer = &j->conn->peer;
	int err = j->q.type == FAR_NBD_BLOCK_STATUS ? far_nbd_status(peer, &j->q, 0, &j->status, &j->status_n)
						    : far_nbd_perform(peer, &j->q, j->buf, 0);

	conn_job_answer(j, err);
	far_nbd_job_send(j);
}

static void conn_job_cb(void *arg)
{
	conn_job_run(arg);
}

/* The request would wait: let somebody else sit here, and carry it out. */
static enum nbd_next conn_away(struct far_nbd_conn *c, struct far_seat *seat, struct far_nbd_job *j)
{
	atomic_fetch_add_explicit(&c->away, 1, memory_order_release);
	if (far_crew_leave(seat)) {
		conn_job_run(j);
		return NBD_LEFT;
	}
	if (far_crew_park(seat, conn_job_cb, j)) {
		conn_job_answer(j, -ENOMEM);
		far_nbd_job_send(j);
	}
	return NBD_MORE;
}

/* The same for a request that has no job yet; `data` is what a write carries, and is copied. */
static enum nbd_next conn_away_new(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q,
				   const void *data)
{
	size_t n = q->type == FAR_NBD_READ || q->type == FAR_NBD_WRITE ? (size_t)q->len : 0;

	if (!far_nbd_flush(c))
		return NBD_END;
	struct far_nbd_job *j = far_nbd_job_new(c, q, n);
	if (!j) {
		conn_fail(c, q, -ENOMEM, NULL);
		return NBD_MORE;
	}
	if (data && n)
		memcpy(j->buf, data, n);
	return conn_away(c, seat, j);
}

/* A read whose bytes are sent from where they are in the store; its part of the batch may have them on loan. The head goes
 * into a part of its own, at p. */
static void conn_read_from(struct far_nbd_conn *c, const struct far_nbd_request *q, uint8_t *p, const void *bytes)
{
	struct far_nbd_seg *seg = &c->seg[c->segs + 1];
	size_t n = (size_t)q->len;

	if (far_nbd_is_hole(&c->peer, bytes, n)) {
		far_loan_return(&seg->loan);
		far_nbd_put(c, far_nbd_put_hole(c->peer.form, p, q));
		return;
	}
	c->seg[c->segs] = (struct far_nbd_seg){ .p = p, .n = far_nbd_put_data(c->peer.form, p, q) };
	c->out_n += c->seg[c->segs].n;
	seg->p = bytes;
	seg->n = n;
	seg->buf = NULL;
	seg->points = true;
	seg->off = q->off;
	c->segs += 2;
	c->beside += n;
}

/*
 * A read straight from the store's own pages. Long ones are on loan: nobody changes them before they are sent. What is
 * shorter may be changed by other connections, as the answer is still on its way; of this one's own changes see
 * conn_settle().
 */
static bool conn_read_there(struct far_nbd_conn *c, const struct far_nbd_request *q)
{
	uint8_t *p = far_nbd_out(c, FAR_NBD_HEAD_MAX);
	struct far_nbd_seg *seg = &c->seg[c->segs + 1];
	size_t n = (size_t)q->len;
	const void *bytes = far_loan_take(c->peer.e->loans, q->off, n, &seg->loan); /* its place in the batch stays */

	if (!bytes && c->peer.memory && n >= CONN_POINT && n <= CONN_INLINE)
		bytes = far_backend_bytes(c->peer.e->b, q->off, n);
	if (bytes)
		conn_read_from(c, q, p, bytes);
	return bytes;
}

/* Before a change: what the batch points at there is sent as it was when it was read. False: the connection is dead. */
static bool conn_settle(struct far_nbd_conn *c, const struct far_nbd_request *q)
{
	for (unsigned i = 0; i < c->segs; i++) {
		const struct far_nbd_seg *s = &c->seg[i];
		if (s->points && s->off < q->off + q->len && q->off < s->off + s->n)
			return far_nbd_flush(c);
	}
	return true;
}

static enum nbd_next conn_read_long(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q)
{
	uint8_t *p = far_nbd_out(c, FAR_NBD_HEAD_MAX);
	size_t n = (size_t)q->len;
	/* A very long one is a job, whose memory is counted. */
	void *buf = n <= FAR_NBD_SMALL ? far_buf_get(n) : NULL;
	int err = buf ? far_read(c->peer.e->b, q->off, buf, n, FAR_NOWAIT) : -EAGAIN;

	if (err || far_nbd_is_hole(&c->peer, buf, n)) {
		far_buf_put(buf, n);
		if (err == -EAGAIN)
			return conn_away_new(c, seat, q, NULL);
		if (err)
			conn_fail(c, q, err, NULL);
		else
			far_nbd_put(c, far_nbd_put_hole(c->peer.form, p, q));
		return NBD_MORE;
	}
	far_nbd_put(c, far_nbd_put_data(c->peer.form, p, q));
	c->seg[c->segs++] = (struct far_nbd_seg){ .p = buf, .n = n, .buf = buf, .cap = n };
	c->beside += n;
	return NBD_MORE;
}

static enum nbd_next conn_read(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q)
{
	size_t n = (size_t)q->len, head = far_nbd_data_head(c->peer.form);

	if (conn_read_there(c, q))
		return NBD_MORE;
	if (n > CONN_INLINE)
		return conn_read_long(c, seat, q);
	uint8_t *p = far_nbd_out(c, FAR_NBD_HEAD_MAX + n);
	int err = n ? far_read(c->peer.e->b, q->off, p + head, n, FAR_NOWAIT) : 0;
	if (err == -EAGAIN)
		return conn_away_new(c, seat, q, NULL);
	if (err)
		conn_fail(c, q, err, NULL);
	else if (!n && c->peer.form != FAR_NBD_SIMPLE)
		far_nbd_put(c, far_nbd_put_done(c->peer.form, p, q, 0));
	else if (far_nbd_is_hole(&c->peer, p + head, n))
		far_nbd_put(c, far_nbd_put_hole(c->peer.form, p, q));
	else
		far_nbd_put(c, far_nbd_put_data(c->peer.form, p, q) + n);
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
	memcpy(far_nbd_out(c, n), buf, n);
	far_nbd_put(c, n);
	free(buf);
	return NBD_MORE;
}

static enum nbd_next conn_perform(struct far_nbd_conn *c, struct far_seat *seat, const struct far_nbd_request *q, void *data)
{
	if (q->type == FAR_NBD_READ)
		return conn_read(c, seat, q);
	if (q->type == FAR_NBD_BLOCK_STATUS)
		return conn_status(c, seat, q);
	if (!conn_settle(c, q))
		return NBD_END;
	int err = far_nbd_perform(&c->peer, q, data, FAR_NOWAIT);
	if (err == -EAGAIN)
		return conn_away_new(c, seat, q, data);
	if (err)
		conn_fail(c, q, err, NULL);
	else
		far_nbd_put(c, far_nbd_put_done(c->peer.form, far_nbd_out(c, FAR_NBD_HEAD_MAX), q, 0));
	return NBD_MORE;
}

/* A write's bytes are all here, in its own buffer. */
static enum nbd_next conn_filled(struct far_nbd_conn *c, struct far_seat *seat)
{
	struct far_nbd_job *j = c->filling;
	int err = far_nbd_perform(&c->peer, &j->q, j->buf, FAR_NOWAIT);

	c->filling = NULL;
	if (err == -EAGAIN)
		return far_nbd_flush(c) ? conn_away(c, seat, j) : (far_nbd_job_drop(j), NBD_END);
	if (err)
		conn_fail(c, &j->q, err, NULL);
	else
		far_nbd_put(c, far_nbd_put_done(c->peer.form, far_nbd_out(c, FAR_NBD_HEAD_MAX), &j->q, 0));
	far_nbd_job_drop(j);
	return NBD_MORE;
}

/* The client says no more: what it has asked for is done first. One that knows no flush means its bytes to be kept. */
static enum nbd_next conn_goodbye(struct far_nbd_conn *c)
{
	if (!c->serving || !far_nbd_flush(c))
		return NBD_END;
	far_mutex_lock(&c->lock);
	while (atomic_load(&c->away) && !atomic_load(&c->dead))
		far_cond_wait(&c->changed, &c->lock);
	far_mutex_unlock(&c->lock);
	if (atomic_load(&c->peer.unflushed) && !atomic_load(&c->peer.flushes)) {
		struct far_nbd_request q = { .type = FAR_NBD_FLUSH };
		int err = far_nbd_perform(&c->peer, &q, NULL, 0);
		if (err)
			far_log(FAR_LOG_WARNING, "export '%s': the flush when an NBD client left failed: %s", c->peer.e->name,
				far_strerror(err));
	}
	return NBD_END;
}

/* Memory takes a long write as it comes: straight from the socket where its pages are there (CONN_NEXT keeps those of the
 * next one out of `in`), else in pieces that are still in the CPU's caches. */
static void conn_stream_begin(struct far_nbd_conn *c, const struct far_nbd_request *q)
{
	c->stream = *q;
	c->streaming = true;
	c->streamed = 0;
	c->stream_err = 0;
	c->place = far_backend_place(c->peer.e->b, q->off, (size_t)q->len);
	c->room = c->place ? CONN_NEXT : CONN_IN;
}

static enum nbd_next conn_stream(struct far_nbd_conn *c, size_t there)
{
	struct far_nbd_request *q = &c->stream, piece = *q;
	uint64_t left = q->len - c->streamed;

	if (!left) {
		piece.len = 0; /* what is left to be done is to flush, if that was asked for */
		int err = c->stream_err ? c->stream_err : far_nbd_perform(&c->peer, &piece, NULL, 0);
		c->streaming = false;
		c->place = NULL;
		if (err)
			conn_fail(c, q, err, NULL);
		else
			far_nbd_put(c, far_nbd_put_done(c->peer.form, far_nbd_out(c, FAR_NBD_HEAD_MAX), q, 0));
		return NBD_MORE;
	}
	if (c->place ? !there : there < CONN_INLINE && there < left)
		return NBD_NEED;
	piece.off += c->streamed;
	piece.len = far_min(there, left);
	piece.flags &= (uint16_t)~FAR_NBD_FUA;
	if (!c->stream_err)
		c->stream_err = far_nbd_perform(&c->peer, &piece, c->in + c->in_at, 0);
	c->in_at += piece.len;
	c->streamed += piece.len;
	return NBD_MORE;
}

/* A write longer than what waits in `in`: gets a buffer of its own. */
static enum nbd_next conn_fill(struct far_nbd_conn *c, const struct far_nbd_request *q, const uint8_t *data, size_t there)
{
	if (!far_nbd_flush(c))
		return NBD_END;
	struct far_nbd_job *j = far_nbd_job_new(c, q, (size_t)q->len);
	if (!j) {
		conn_refuse(c, q, -ENOMEM, NULL);
		return NBD_MORE;
	}
	memcpy(j->buf, data, there);
	c->in_at += there;
	c->filled = there;
	c->filling = j;
	return NBD_MORE;
}

/* A read that stands behind the one that is about to be made: the bytes of the two shall not come one after the other from
 * where memory is slow, which takes as long as all the rest. */
static void conn_foresee(struct far_nbd_conn *c, size_t head)
{
	struct far_nbd_request q;

	if (c->peer.memory && c->in_n - c->in_at >= head && !far_nbd_decode_request(c->peer.form, c->in + c->in_at, &q) &&
	    q.type == FAR_NBD_READ)
		far_backend_soon(c->peer.e->b, q.off, (size_t)far_min(q.len, CONN_INLINE));
}

/* Deal with what stands next in `in`. */
static enum nbd_next conn_next(struct far_nbd_conn *c, struct far_seat *seat)
{
	size_t head = c->peer.form == FAR_NBD_EXTENDED ? FAR_NBD_REQUEST_EXT_BYTES : FAR_NBD_REQUEST_BYTES;
	size_t there = c->in_n - c->in_at;
	struct far_nbd_request q;
	const char *why;

	if (c->streaming)
		return conn_stream(c, there);
	if (c->filling)
		return c->filled == c->filling->cap ? conn_filled(c, seat) : NBD_NEED;
	if (c->skip) {
		size_t n = (size_t)far_min(c->skip, there);
		c->skip -= n;
		c->in_at += n;
		if (!c->skip)
			conn_fail(c, &c->refused, c->refused_err, c->refused_why);
		return n ? NBD_MORE : NBD_NEED;
	}
	if (there < head)
		return NBD_NEED;
	uint8_t *data = c->in + c->in_at + head;
	if (far_nbd_decode_request(c->peer.form, c->in + c->in_at, &q))
		return NBD_END;
	there -= head;
	c->came++;
	if (q.type == FAR_NBD_DISC)
		return conn_goodbye(c);
	int err = far_nbd_check(&c->peer, &q, &why);
	if (err) {
		c->in_at += head;
		conn_refuse(c, &q, err, why);
		return NBD_MORE;
	}
	if (q.payload > there && q.payload <= CONN_INLINE) {
		c->room = CONN_IN;
		return NBD_NEED;
	}
	c->in_at += head;
	if (q.payload > there && c->peer.memory && far_nbd_flush(c)) { /* no loan of ours is in its way */
		conn_stream_begin(c, &q);
		return NBD_MORE;
	}
	c->room = CONN_IN;
	if (q.payload > there)
		return conn_fill(c, &q, data, there);
	c->in_at += q.payload;
	if (q.type == FAR_NBD_READ)
		conn_foresee(c, head);
	return conn_perform(c, seat, &q, data);
}

/* ------------------------------------------------------------------------------------------------- negotiation */

static enum nbd_next conn_hello_out(struct far_nbd_conn *c)
{
	struct far_nbd_hello *h = &c->hello;
	struct iovec iov = { h->out, h->out_n };
	int r = h->out_n ? far_nbd_write(c, &iov, 1) : 0;

	h->out_n = 0;
	return r ? NBD_END : NBD_MORE;
}

/* Who is at the other end, once something has come from it. */
static int conn_meet(struct far_nbd_conn *c)
{
	struct far_peer peer;

	if (!c->env->access || c->hello.who || c->in_at == c->in_n)
		return 0;
	int r = far_conn_peer(&c->conn, &peer);
	return r ? r : far_access_peer(c->env->access, &peer, &c->hello.who);
}

static enum nbd_next conn_hello(struct far_nbd_conn *c)
{
	struct far_nbd_hello *h = &c->hello;
	size_t used;

	if (conn_meet(c))
		return NBD_END;
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
	if (c->filling || c->streaming || c->skip || c->in_at != c->in_n)
		return c->moved + c->env->stall;
	return FAR_NEVER;
}

static ssize_t conn_readv(struct far_nbd_conn *c, const struct iovec *iov, int n)
{
	if (!c->place)
		return c->conn.ops->readv(&c->conn, iov, n);
	ssize_t k = far_nbd_receive(&c->peer, c->stream.off + c->streamed, &c->conn, iov, n);
	if (k == -ECANCELED || k == -EFAULT) {
		/* The rest goes the usual way, which finds the same or is only counted. */
		c->stream_err = k == -EFAULT ? -ENOSPC : 0;
		c->place = NULL;
		c->room = CONN_IN;
		k = -EAGAIN;
	}
	return k;
}

/* Spin for a while. Where others want this CPU a yield gives it to them for longer than any wait would take: then spinning
 * is left alone for some time, each time for longer. */
static ssize_t conn_spin(struct far_nbd_conn *c, const struct iovec *iov, int n)
{
	uint64_t now = c->dry;
	bool placed = c->place;
	ssize_t k;

	do {
		far_thread_yield();
		k = conn_readv(c, iov, n);
		uint64_t then = now;
		now = far_now();
		if (now - then > CONN_CROWD) {
			c->crowd = (unsigned)far_min(far_max(c->crowd * 2, CONN_CALM), CONN_CALM_MAX);
			c->crowded = c->crowd;
		}
	} while (k == -EAGAIN && !c->crowded && now - c->dry < FAR_SPIN && placed == !!c->place);
	if (!c->crowded)
		c->crowd -= far_min(c->crowd, CONN_CALM / 64);
	return k;
}

/*
 * What a client sends one by one is answered at the least cost if it is not read so: with many requests on their way nobody
 * waits for any one of them, and a short sleep makes one read and one write of them all, and spares the client waking us
 * up. Whether it pays is tried now and then, the other way for CONN_TRIAL reads after as many of this one: sleeps must bring
 * many requests each, and no fewer in a second.
 */
static void conn_judge(struct far_nbd_conn *c)
{
	uint64_t took = c->moved - c->tried_at, rate = c->tried ? c->tried * FAR_SEC / far_max(took, 1) : 0;

	if (c->stage == CONN_QUIET) {
		c->stage = CONN_MEASURE;
	} else if (c->stage == CONN_MEASURE) {
		c->stage = CONN_OTHER;
		c->rate = rate;
	} else {
		uint64_t sleeping = c->lingers ? c->rate : rate, awake = c->lingers ? rate : c->rate;
		bool pays = sleeping >= awake - awake / 8;
		c->calm = pays == c->lingers ? (unsigned)far_min(c->calm * 2, CONN_CALM_MAX) : CONN_CALM;
		c->lingers = pays;
		c->stage = CONN_QUIET;
	}
	c->trial = c->stage == CONN_QUIET ? c->calm : CONN_TRIAL;
	c->tried = 0;
	c->tried_at = c->moved;
}

static void conn_linger(struct far_nbd_conn *c)
{
	unsigned came = c->came;

	c->came = 0;
	c->tried += came;
	if (c->lingered && came >= CONN_SOME && came < CONN_MANY && c->nap < CONN_LINGER_MAX)
		c->nap *= 2; /* many are on their way, but slowly */
	else if (c->lingered && came)
		c->few = came < CONN_MANY ? c->few + 1 : 0;
	if (c->few >= (c->lingers ? CONN_DOUBTS : 1)) {
		c->calm = c->lingers ? CONN_CALM : (unsigned)far_min(c->calm * 2, CONN_CALM_MAX);
		c->trial = c->calm;
		c->stage = CONN_QUIET;
		c->lingers = false;
		c->few = 0;
		c->nap = CONN_LINGER;
	} else if (--c->trial == 0) {
		conn_judge(c);
	}
	c->lingered = came && c->lingers == (c->stage != CONN_OTHER);
	if (c->lingered) {
		far_thread_on_time();
		far_sleep_until(far_now() + c->nap, false);
	}
}

static ssize_t conn_read_some(struct far_nbd_conn *c, const struct iovec *iov, int n)
{
	bool placed = c->place;
	ssize_t k = conn_readv(c, iov, n);

	if (placed && !c->place)
		return k; /* iov is not what is to be read into any more */
	if (k == -EAGAIN && !c->dry)
		c->dry = far_now();
	if (k == -EAGAIN && c->crowded) {
		c->crowded--;
	} else if (k == -EAGAIN && !c->lingered && far_spin_wanted(&c->spin)) {
		if (atomic_fetch_add_explicit(&c->env->spinning, 1, memory_order_relaxed) < c->env->spinning_max)
			k = conn_spin(c, iov, n);
		atomic_fetch_sub_explicit(&c->env->spinning, 1, memory_order_relaxed);
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
	if (c->place) {
		direct = (size_t)(c->stream.len - c->streamed);
		iov[n++] = (struct iovec){ c->place + c->streamed, direct };
	}
	iov[n++] = (struct iovec){ c->in + c->in_n, (c->in_n < c->room ? c->room : CONN_IN) - c->in_n };
	if (c->serving && !c->filling && !c->streaming)
		conn_linger(c);
	ssize_t k = conn_read_some(c, iov, n);
	if (k > 0) {
		size_t first = (size_t)far_min((uint64_t)k, direct);
		if (c->filling)
			c->filled += first;
		else
			c->streamed += first;
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
	if (next == NBD_NEED && far_nbd_flush(c) && conn_receive(c))
		return true;
	far_nbd_flush(c);
	far_nbd_conn_kill(c);
	return false;
}

static void conn_free(struct far_nbd_conn *c) FAR_NO_TSA
{
	if (c->filling)
		far_nbd_job_drop(c->filling);
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
	far_buf_put(c->out, FAR_NBD_OUT);
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
	c->calm = c->trial = CONN_CALM;
	c->nap = CONN_LINGER;
	c->born = c->moved = far_now();
	c->room = CONN_IN;
	c->in = far_buf_get(CONN_IN);
	c->out = far_buf_get(FAR_NBD_OUT);
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
