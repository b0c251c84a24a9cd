/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A channel from its making to its end, what is known of it, and the doors for those that have bytes and no socket (tests and
 * fuzzers). How calls share it is channel.c's.
 */
#include "wire/grpc/channel_int.h"

#include "net/tls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void far_channel_kill(struct far_channel *c, int err)
{
	far_mutex_lock(&c->lock);
	far_chan_die(c, err);
	far_chan_unlock(c);
}

void far_channel_retire(struct far_channel *c)
{
	far_mutex_lock(&c->lock);
	c->draining = true;
	atomic_store_explicit(&c->gone, true, memory_order_release);
	far_chan_unlock(c);
}

bool far_channel_alive(struct far_channel *c)
{
	far_mutex_lock(&c->lock);
	if (!c->calls && !c->reading && !c->dead) {
		far_chan_hear(c);
		far_chan_pass(c);
	}
	bool alive = !c->dead && !c->draining;
	far_chan_unlock(c);
	return alive;
}

void far_channel_keep_alive(struct far_channel *c, uint64_t quiet, uint64_t dead, unsigned max_pings)
{
	far_mutex_lock(&c->lock);
	c->quiet = quiet;
	c->patience = dead;
	c->max_pings = max_pings;
	far_chan_unlock(c);
}

bool far_channel_usable(const struct far_channel *c)
{
	return !atomic_load_explicit(&c->gone, memory_order_acquire);
}

bool far_channel_why(struct far_channel *c, char *buf, size_t n)
{
	far_mutex_lock(&c->lock);
	bool wants_tls = c->wants_tls;
	far_chan_unlock(c);
	if (c->conn.ops)
		far_conn_why(&c->conn, buf, n);
	else
		buf[0] = 0;
	if (wants_tls)
		snprintf(buf, n, "it speaks TLS: write grpcs://");
	return buf[0];
}

uint64_t far_channel_tag(struct far_channel *c, uint64_t tag)
{
	if (tag)
		atomic_store_explicit(&c->tag, tag, memory_order_relaxed);
	return atomic_load_explicit(&c->tag, memory_order_relaxed);
}

uint64_t far_channel_mark(struct far_channel *c, int64_t change)
{
	return (uint64_t)(atomic_fetch_add_explicit(&c->marks, change, memory_order_relaxed) + change);
}

void far_channel_owe(struct far_channel *c, int calls, int64_t bytes)
{
	atomic_fetch_add_explicit(&c->owed_calls, calls, memory_order_relaxed);
	atomic_fetch_add_explicit(&c->owed, bytes, memory_order_relaxed);
}

uint64_t far_channel_owed(const struct far_channel *c, int *calls)
{
	*calls = atomic_load_explicit(&c->owed_calls, memory_order_relaxed);
	return (uint64_t)atomic_load_explicit(&c->owed, memory_order_relaxed);
}

int far_channel_new(struct far_conn *conn, const char *authority, struct far_channel **out)
{
	struct far_channel *c = calloc(1, sizeof *c);

	if (!c)
		return -ENOMEM;
	far_mutex_init(&c->lock);
	c->authority = strdup(authority);
	c->spare = malloc(CHANNEL_SPARE);
	atomic_init(&c->refs, 1);
	far_mutex_lock(&c->lock);
	c->heard = far_now();
	c->quiet = c->patience = FAR_NEVER;
	int r = c->authority && c->spare ? far_h2_init(&c->h2, false, &far_chan_ops) : -ENOMEM;
	far_chan_unlock(c);
	if (r) {
		far_mutex_fini(&c->lock);
		free(c->authority);
		free(c->spare);
		free(c);
		return r;
	}
	if (conn) {
		c->conn = *conn;
		c->tls = far_conn_is_tls(conn);
		conn->ops = NULL;
	}
	*out = c;
	return 0;
}

void far_channel_get(struct far_channel *c)
{
	atomic_fetch_add_explicit(&c->refs, 1, memory_order_relaxed);
}

void far_channel_put(struct far_channel *c) FAR_NO_TSA
{
	if (!c || atomic_fetch_sub_explicit(&c->refs, 1, memory_order_acq_rel) != 1)
		return;
	FAR_ASSERT(!c->calls);
	far_h2_fini(&c->h2);
	far_conn_close(&c->conn);
	far_mutex_fini(&c->lock);
	free(c->authority);
	free(c->authorization);
	free(c->spare);
	free(c);
}

void far_channel_authorize(struct far_channel *c, char *value)
{
	c->authorization = value;
}

int far_channel_submit(struct far_channel *c, struct far_call *call)
{
	call->channel = c;
	far_event_init(&call->event);
	far_mutex_lock(&c->lock);
	int r = far_chan_submit(c, call, FAR_NEVER);
	if (r == 0)
		far_chan_link(c, call);
	far_chan_unlock(c);
	return r;
}

int far_channel_feed(struct far_channel *c, const uint8_t *data, size_t len)
{
	far_mutex_lock(&c->lock);
	int r = c->dead ? c->error : 0;
	while (r == 0 && len) {
		uint8_t *dst;
		size_t n = (size_t)far_min(len, far_h2_direct(&c->h2, &dst));
		if (n) {
			memcpy(dst, data, n);
			r = far_h2_feed(&c->h2, dst, n);
		} else {
			n = (size_t)far_min(len, 64);
			r = far_h2_feed(&c->h2, data, n);
		}
		data += n;
		len -= n;
	}
	if (r)
		far_chan_die(c, r);
	far_chan_unlock(c);
	return r;
}

size_t far_channel_take(struct far_channel *c, uint8_t *buf, size_t cap)
{
	size_t n = 0;
	int r = 0;

	far_mutex_lock(&c->lock);
	while (!c->dead && n < cap && far_h2_fill(&c->h2, &r)) {
		const struct iovec *v = &c->h2.iov[c->h2.iov_at];
		size_t k = (size_t)far_min(v->iov_len, cap - n);
		memcpy(buf + n, v->iov_base, k);
		n += k;
		far_h2_wrote(&c->h2, k);
	}
	if (r)
		far_chan_die(c, r);
	far_chan_unlock(c);
	return n;
}

void far_channel_end(struct far_channel *c, struct far_call *call, int err)
{
	far_mutex_lock(&c->lock);
	far_chan_abandon(c, call, err);
	far_chan_leave(c, call);
	far_chan_unlock(c);
}
