/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Sending, and the jobs whose answers are sent: invariants 2 to 4 of conn.c. */
#include "wire/nbd/conn.h"

#include "backend/backend.h"
#include "base/pool.h"

#include <stdlib.h>

#define SEND_JOBS 1024                  /* that may be away */
#define SEND_HELD (64 * FAR_MIB)        /* that they may hold together, but that one is always possible */
#define SEND_LOOK (5 * FAR_MSEC)        /* how often to look whether others have let go of memory */

/* ---------------------------------------------------------------------------------------------------- the end */

static void send_die_locked(struct far_nbd_conn *c) FAR_REQUIRES(c->lock)
{
	if (!atomic_exchange(&c->dead, true))
		c->conn.ops->shutdown(&c->conn);
	far_cond_broadcast(&c->changed);
}

void far_nbd_conn_kill(struct far_nbd_conn *c)
{
	far_mutex_lock(&c->lock);
	send_die_locked(c);
	far_mutex_unlock(&c->lock);
}

/* -------------------------------------------------------------------------------------------------------- jobs */

static void send_free(struct far_nbd_job *j)
{
	far_buf_put(j->buf, j->cap);
	free(j->status);
	free(j);
}

/* Wait until the jobs that are away leave room for n more bytes. False: there is no end to it. */
static bool send_memory(struct far_nbd_conn *c, size_t n)
{
	uint64_t until = far_now() + c->env->stall;
	bool room = false;

	far_mutex_lock(&c->lock);
	while (!room && !atomic_load(&c->dead)) {
		bool much = c->held && (c->held + n > SEND_HELD || atomic_load(&c->away) >= SEND_JOBS);
		bool all = c->held + n > FAR_NBD_SMALL && atomic_load(&c->env->memory) + n > c->env->memory_max;
		room = !much && !all;
		if (!room && all && !c->held && far_now() >= until)
			break;
		if (!room)
			far_cond_wait_until(&c->changed, &c->lock, all ? far_now() + SEND_LOOK : FAR_NEVER);
	}
	far_mutex_unlock(&c->lock);
	return room;
}

struct far_nbd_job *far_nbd_job_new(struct far_nbd_conn *c, const struct far_nbd_request *q, size_t n)
{
	if (!send_memory(c, n))
		return NULL;
	struct far_nbd_job *j = calloc(1, sizeof *j);
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

static void send_unhold_locked(struct far_nbd_conn *c, const struct far_nbd_job *j) FAR_REQUIRES(c->lock)
{
	uint64_t n = sizeof *j + j->cap;

	c->held -= n;
	atomic_fetch_sub(&c->env->memory, n);
}

void far_nbd_job_drop(struct far_nbd_job *j)
{
	struct far_nbd_conn *c = j->conn;

	far_mutex_lock(&c->lock);
	send_unhold_locked(c, j);
	far_mutex_unlock(&c->lock);
	send_free(j);
}

/* ------------------------------------------------------------------------------------------------------ sending */

int far_nbd_write(struct far_nbd_conn *c, struct iovec *iov, int n)
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

static int send_iov(const struct far_nbd_job *j, struct iovec *iov)
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
static void send_queue(struct far_nbd_conn *c) FAR_REQUIRES(c->lock)
{
	while (c->queue) {
		struct iovec iov[FAR_NBD_SEGS];
		struct far_nbd_job *list = c->queue, **end = &list;
		int n = 0;
		while (*end && n + 3 <= FAR_NBD_SEGS) {
			n += send_iov(*end, iov + n);
			end = &(*end)->next;
		}
		c->queue = *end;
		*end = NULL;
		if (!c->queue)
			c->queue_end = &c->queue;
		far_mutex_unlock(&c->lock);
		int r = far_nbd_write(c, iov, n);
		far_mutex_lock(&c->lock);
		if (r)
			send_die_locked(c);
		while (list) {
			struct far_nbd_job *j = list;
			list = j->next;
			send_unhold_locked(c, j);
			atomic_fetch_sub(&c->away, 1);
			send_free(j);
		}
		far_cond_broadcast(&c->changed);
	}
}

void far_nbd_job_send(struct far_nbd_job *j)
{
	struct far_nbd_conn *c = j->conn;

	far_mutex_lock(&c->lock);
	j->next = NULL;
	*c->queue_end = j;
	c->queue_end = &j->next;
	if (!c->sending) {
		c->sending = true;
		send_queue(c);
		c->sending = false;
		far_cond_broadcast(&c->changed);
	}
	far_mutex_unlock(&c->lock);
}

static int send_batch(struct far_nbd_conn *c)
{
	struct iovec iov[FAR_NBD_SEGS];

	for (unsigned i = 0; i < c->segs; i++)
		iov[i] = (struct iovec){ (void *)(uintptr_t)c->seg[i].p, c->seg[i].n };
	int r = far_nbd_write(c, iov, (int)c->segs);
	for (unsigned i = 0; i < c->segs; i++) {
		far_loan_return(&c->seg[i].loan);
		far_buf_put(c->seg[i].buf, c->seg[i].cap);
	}
	c->segs = 0;
	c->out_n = 0;
	c->beside = 0;
	return r;
}

bool far_nbd_flush(struct far_nbd_conn *c)
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
		int r = send_batch(c);
		if (r)
			far_nbd_conn_kill(c);
		if (!alone) {
			far_mutex_lock(&c->lock);
			send_queue(c);
			c->sending = false;
			far_cond_broadcast(&c->changed);
			far_mutex_unlock(&c->lock);
		}
	}
	return !atomic_load_explicit(&c->dead, memory_order_relaxed);
}

uint8_t *far_nbd_out(struct far_nbd_conn *c, size_t n)
{
	if (n > FAR_NBD_OUT - c->out_n || c->segs + 2 > FAR_NBD_SEGS || c->beside >= FAR_NBD_SMALL)
		far_nbd_flush(c);
	return c->out + c->out_n;
}

void far_nbd_put(struct far_nbd_conn *c, size_t n)
{
	struct far_nbd_seg *last = c->segs ? &c->seg[c->segs - 1] : NULL;

	if (last && (const uint8_t *)last->p + last->n == c->out + c->out_n && !last->loan.of && !last->buf)
		last->n += n;
	else
		c->seg[c->segs++] = (struct far_nbd_seg){ .p = c->out + c->out_n, .n = n };
	c->out_n += n;
}
