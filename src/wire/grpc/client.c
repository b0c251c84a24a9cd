/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The client half as a backend: its operations. Each is a call (exchange.c), and what became of it decides what comes next:
 *
 *   DONE      the caller gets it
 *   AGAIN     made again at once
 *   GARBLED   made again on another connection, three times in all
 *   LOST      a read ends with the error (the retry layer above knows how long to go on), unless it was us who ended the
 *             connection. A change has an unknown fate: fence.c, then it is made again while there is time
 *   FENCED    the same
 *
 * Changes towards a peer without sessions are not made again here: see plain.c.
 */
#include "wire/grpc/exchange.h"

#include "backend/backend.h"

#include <stdlib.h>
#include <string.h>

#define CLIENT_TRIES 3  /* of a call that the peer cannot have seen, or that was garbled */
#define CLIENT_ROUNDS 8 /* of a call that fences ended */
/* Long reads are made in parts, of this size at least; near by with so many on their way. */
#define CLIENT_LONG ((size_t)FAR_MIB)
#define CLIENT_PART ((size_t)256 * FAR_KIB)
#define CLIENT_AHEAD 2
#define CLIENT_FAR 256 /* calls of a list that are on their way at a time, far away */
#define CLIENT_NEAR 32 /* and near by */
#define CLIENT_REPLY 64 /* to a change, at most */
#define CLIENT_COOL (100 * FAR_MSEC) /* TCP begins anew after 200 ms or more */

uint64_t far_client_deadline(const struct far_client *c)
{
	return c->timeout == FAR_NEVER ? far_deadline() : far_min(far_deadline(), far_now() + c->timeout);
}

/* An error that only this file understands becomes one that callers know. */
static int client_error(int r)
{
	return r == -ECANCELED || r == -ENOTCONN ? -ECONNRESET : r;
}

/* A call that changes nothing. It may have been made for the first time already. */
static int client_ask_until(struct far_client *c, struct far_exchange *op, uint64_t deadline)
{
	unsigned tries = 0, rounds = 0;
	int r;

	for (;;) {
		r = op->made ? op->result : far_exchange(c, op, deadline);
		op->made = false;
		bool again = false;
		switch (op->fate) {
		case FAR_FATE_DONE:
			break;
		case FAR_FATE_AGAIN:
		case FAR_FATE_GARBLED:
			op->careful = op->careful || op->fate == FAR_FATE_GARBLED;
			again = ++tries < CLIENT_TRIES && (!c->lanes.once || op->fate == FAR_FATE_GARBLED || op->refused);
			break;
		case FAR_FATE_LOST: /* -ECANCELED: a fence ended the connection */
		case FAR_FATE_FENCED:
			again = r == -ECANCELED && ++rounds < CLIENT_ROUNDS;
			break;
		}
		if (!again)
			return client_error(r);
	}
}

static int client_ask(struct far_client *c, struct far_exchange *op)
{
	return client_ask_until(c, op, far_client_deadline(c));
}

/* After a change: whether it is made again. */
static bool client_change_again(struct far_client *c, struct far_exchange *op, unsigned *tries, unsigned *rounds,
				uint64_t deadline)
{
	bool sessions = far_client_flag(&c->sessions);

	switch (op->fate) {
	case FAR_FATE_AGAIN:
		return ++*tries < CLIENT_TRIES && (!c->lanes.once || op->refused);
	case FAR_FATE_GARBLED:
		return ++*tries < CLIENT_TRIES && sessions;
	case FAR_FATE_LOST:
	case FAR_FATE_FENCED:
		return ++*rounds < CLIENT_ROUNDS && sessions && !c->lanes.once && far_now() < deadline;
	default:
		return false;
	}
}

/* A call that belongs to a generation; `change`: done again later it would undo something. It may have been made for the
 * first time already. */
static int client_ordered(struct far_client *c, struct far_exchange *op, bool change)
{
	uint64_t deadline = far_client_deadline(c);
	unsigned tries = 0, rounds = 0;

	for (;;) {
		int r = op->made ? 0 : far_fence_enter(c, deadline, &op->generation);
		if (r)
			return client_error(r);
		r = op->made ? op->result : far_exchange(c, op, deadline);
		op->made = false;
		if (op->fate == FAR_FATE_FENCED || (change && (op->fate == FAR_FATE_LOST || op->fate == FAR_FATE_GARBLED)))
			far_fence_break(c, op->generation);
		if (r == 0 && change && far_client_flag(&c->sessions))
			far_hello_changed(c, op->told_by);
		if (!client_change_again(c, op, &tries, &rounds, deadline))
			return client_error(r);
	}
}

int far_client_read_back(struct far_client *c, uint64_t off, void *buf, size_t len)
{
	struct far_exchange op = { .m = FAR_M_READ, .off = off, .len = len, .dst = buf };

	return client_ask(c, &op);
}

int far_client_write_again(struct far_client *c, uint64_t off, const void *buf, size_t len)
{
	uint8_t reply[CLIENT_REPLY];
	struct far_exchange op = { .m = FAR_M_WRITE, .off = off, .src = buf, .len = len, .reply = reply,
				.reply_cap = sizeof reply };

	return client_error(far_exchange(c, &op, far_client_deadline(c)));
}

/* -------------------------------------------------------------------------------------------- the operations */

/*
 * A connection that has carried little of late begins slowly (RFC 5681, 4.1): what does not fit its first flight takes one or
 * two round trips more. Far away that is what a fault would pay that comes after a pause. So of what is pulled a little goes
 * over the demand lane now and then. So much of a read of len bytes: 0 mostly.
 */
static size_t client_warms(struct far_client *c, size_t len, unsigned flags)
{
	size_t chunk = (size_t)c->facts.chunk, n = chunk ? (size_t)far_div_up(FAR_WARM, chunk) * chunk : FAR_WARM;
	uint64_t at = atomic_load_explicit(&c->warmed, memory_order_relaxed);

	if (!(flags & FAR_BULK) || len < n || n > 2 * FAR_WARM || atomic_load_explicit(&c->lanes.near, memory_order_relaxed))
		return 0;
	uint64_t now = far_now();
	return now - at >= CLIENT_COOL && atomic_compare_exchange_strong(&c->warmed, &at, now) ? n : 0;
}

/* A long read in parts: while one part is checked the next one is on its way, and near by each stays in a CPU's cache from
 * the store through the socket and both checksums. Far away all parts are asked for at once. */
static int client_read_parts(struct far_client *c, uint64_t off, void *buf, size_t len, unsigned flags, size_t warm)
{
	struct far_exchange op[FAR_EXCHANGE_READS];
	uint64_t deadline = far_client_deadline(c);
	size_t part = far_max(CLIENT_PART, (size_t)far_div_up(len, FAR_EXCHANGE_READS - 1));
	size_t chunk = (size_t)c->facts.chunk; /* does not change once it is known, and it is */
	bool near = atomic_load_explicit(&c->lanes.near, memory_order_relaxed);
	unsigned n = 0;

	part = chunk ? (size_t)far_div_up(part, chunk) * chunk : part;
	if (warm)
		op[n++] = (struct far_exchange){ .m = FAR_M_READ, .off = off, .len = warm, .dst = buf,
						 .flags = flags & ~(unsigned)FAR_BULK };
	for (size_t at = warm; at < len; at += part)
		op[n++] = (struct far_exchange){ .m = FAR_M_READ, .off = off + at, .len = far_min(part, len - at),
						 .dst = (char *)buf + at, .flags = flags };
	/* What was not made, or failed, is made by itself, with all that belongs to that. */
	far_exchange_many(c, op, n, near ? CLIENT_AHEAD : n, deadline);
	int r = 0;
	for (unsigned i = 0; i < n && r == 0; i++)
		r = client_ask_until(c, &op[i], deadline);
	return r;
}

/* How many calls of a list are on their way. */
static size_t client_ahead(struct far_client *c)
{
	return atomic_load_explicit(&c->lanes.near, memory_order_relaxed) ? CLIENT_NEAR : CLIENT_FAR;
}

static int client_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct far_client *c = self;
	struct far_exchange op = { .m = FAR_M_READ, .off = off, .len = len, .dst = buf, .flags = flags };

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	if (far_client_kind(c) == FAR_CLIENT_REGION) {
		size_t warm = client_warms(c, len, flags);
		if (len >= CLIENT_LONG || warm)
			return client_read_parts(c, off, buf, len, flags, warm);
	}
	return client_ask(c, &op);
}

static int client_change_op(struct far_client *c, struct far_exchange *op)
{
	bool entered = false;
	int r = op->made ? 0 : far_plain_begin(c, op->off, op->src, op->len, far_client_deadline(c), &entered);

	if (r)
		return r;
	r = client_ordered(c, op, true);
	bool lost = op->m == FAR_M_WRITE && (op->fate == FAR_FATE_LOST || op->fate == FAR_FATE_GARBLED);
	int p = far_plain_end(c, op->off, op->src, op->len, lost && r ? 1 : r, entered);
	return r ? r : p;
}

static int client_change(struct far_client *c, enum far_grpc_method m, uint64_t off, const void *src, uint64_t len,
			 unsigned flags, uint64_t *told_by)
{
	uint8_t reply[CLIENT_REPLY];
	struct far_exchange op = { .m = m, .off = off, .src = src, .len = len, .flags = flags, .reply = reply,
				.reply_cap = sizeof reply };
	int r = flags & FAR_NOWAIT ? -EAGAIN : client_change_op(c, &op);

	if (told_by)
		*told_by = op.told_by;
	return r;
}

static int client_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return client_change(self, FAR_M_ZERO, off, NULL, len, flags, NULL);
}

static int client_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return client_change(self, FAR_M_DISCARD, off, NULL, len, flags, NULL);
}

/* A peer that tells no instance: a Sync on each connection that was written on proves that the process that has the bytes
 * is the one that made them durable; a connection that is gone counts as another instance (far_hello_origin). */
static int client_flush_plain(struct far_client *c)
{
	struct far_channel *up[FAR_LANES * FAR_LANES_MAX];
	uint8_t reply[64];
	struct far_exchange op = { .m = FAR_M_FLUSH, .reply = reply, .reply_cap = sizeof reply };
	int r = far_plain_settle(c, far_client_deadline(c));
	bool done = false;

	size_t n = far_lanes_up(&c->lanes, up, FAR_ARRAY_LEN(up));
	for (size_t i = 0; i < n; i++) {
		uint64_t marks = far_channel_mark(up[i], 0);
		if (!r && marks && (c->lanes.once || far_channel_alive(up[i]))) {
			op.channel = up[i];
			r = far_exchange(c, &op, far_client_deadline(c));
			done = true;
			if (r == 0)
				far_channel_mark(up[i], -(int64_t)marks);
		}
		far_channel_put(up[i]);
	}
	op.channel = NULL;
	return client_error(r || done ? r : client_ask(c, &op));
}

/* What is behind the peer is another one than when its connections were greeted: greet anew. */
static void client_regreet(struct far_client *c, uint64_t instance)
{
	struct far_channel *up[FAR_LANES * FAR_LANES_MAX];
	size_t n = far_lanes_up(&c->lanes, up, FAR_ARRAY_LEN(up));

	for (size_t i = 0; i < n; i++) {
		if (c->lanes.once)
			far_channel_tag(up[i], instance);
		else
			far_channel_retire(up[i]);
		far_channel_put(up[i]);
	}
}

static int client_describe(struct far_client *c)
{
	uint8_t reply[1024];
	struct far_grpc_export e;
	struct far_exchange op = { .m = FAR_M_DESCRIBE, .reply = reply, .reply_cap = sizeof reply };
	int r = client_ordered(c, &op, false);

	if (r == 0)
		r = far_grpc_decode_export(reply, op.reply_n, &e);
	return r ? r : far_hello_note(c, &e, &op.seen);
}

/* The peer says that what is behind it has forgotten something, and is another instance by that. */
static void client_forgotten(struct far_client *c, uint64_t changes)
{
	far_hello_forgotten(c, changes);
	if (!c->lanes.once || client_describe(c) == 0)
		client_regreet(c, far_hello_instance(c));
}

static int client_flush(void *self)
{
	struct far_client *c = self;
	uint8_t reply[64];
	struct far_grpc_flushed f;
	struct far_exchange op = { .m = FAR_M_FLUSH, .reply = reply, .reply_cap = sizeof reply };
	uint64_t changes = far_hello_changes(c);

	if (far_client_kind(c) != FAR_CLIENT_UNKNOWN && !far_client_flag(&c->sessions))
		return client_flush_plain(c);
	int r = client_ordered(c, &op, false);
	if (r == -EREMOTEIO)
		client_forgotten(c, changes);
	if (r || !op.region || !far_client_flag(&c->sessions))
		return r;
	r = far_grpc_decode_flushed(reply, op.reply_n, &f);
	if (r)
		return r;
	if (f.instance != op.told_by)
		client_regreet(c, f.instance);
	return far_hello_flushed(c, &f, changes);
}

static int client_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct far_client *c = self;
	/* The plain service has no flush in a write; nor is it known whom an unreached peer will turn out to be. */
	bool sessions = far_client_flag(&c->sessions), flush = flags & FAR_FLUSH;
	uint64_t told_by, changes = flush ? far_hello_changes(c) : 0;

	int r = client_change(c, FAR_M_WRITE, off, buf, len, sessions ? flags : flags & ~(unsigned)FAR_FLUSH, &told_by);
	if (r == -EREMOTEIO)
		client_forgotten(c, changes);
	if (r || !flush)
		return r;
	if (!sessions)
		return client_flush(c);
	struct far_grpc_flushed f = { .instance = told_by };
	return far_hello_flushed(c, &f, changes + 1);
}

/* The first try of several, together; nothing of it where changes are in doubt. */
static void client_try(struct far_client *c, struct far_exchange *op, size_t n)
{
	uint64_t generation;

	if (op->m == FAR_M_WRITE) {
		if (!far_plain_sound(c) || far_fence_enter(c, far_client_deadline(c), &generation))
			return;
		for (size_t i = 0; i < n; i++)
			op[i].generation = generation;
	}
	far_exchange_many(c, op, n, client_ahead(c), far_deadline());
}

/* What the first try did not settle is made by itself, with all that belongs to that; what it did not begin is tried together
 * again, unless there is no time or no connection any more. */
static void client_many(struct far_client *c, struct far_exchange *op, struct far_io *io, size_t n)
{
	int lost = 0;

	for (size_t i = 0; i < n && !lost;) {
		client_try(c, op + i, n - i);
		uint64_t old = far_deadline_limit(far_client_deadline(c));
		do {
			int r = op[i].m == FAR_M_WRITE ? client_change_op(c, &op[i]) : client_ask(c, &op[i]);
			io[i].result = r;
			if (r != -EIO && far_error_is_transient(r))
				lost = r;
		} while (++i < n && op[i].made);
		far_deadline_restore(old);
		for (size_t k = i; lost && k < n; k++)
			io[k].result = lost;
	}
}

static void client_read_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	struct far_exchange *op = malloc(n * sizeof *op);

	for (size_t i = 0; i < n; i++) {
		if (op)
			op[i] = (struct far_exchange){ .m = FAR_M_READ, .off = io[i].off, .len = io[i].len, .dst = io[i].buf,
						       .flags = flags };
		else
			io[i].result = client_read(self, io[i].off, io[i].buf, io[i].len, flags);
	}
	if (op)
		client_many(self, op, io, n);
	free(op);
}

static void client_write_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	struct far_exchange *op = malloc(n * (sizeof *op + CLIENT_REPLY));
	uint8_t *reply = (uint8_t *)(op + n);

	for (size_t i = 0; i < n; i++) {
		if (op)
			op[i] = (struct far_exchange){ .m = FAR_M_WRITE, .off = io[i].off, .src = io[i].buf, .len = io[i].len,
						       .flags = flags, .reply = reply + i * CLIENT_REPLY, .reply_cap = CLIENT_REPLY };
		else
			io[i].result = client_write(self, io[i].off, io[i].buf, io[i].len, flags);
	}
	if (op)
		client_many(self, op, io, n);
	free(op);
}

static int client_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	size_t cap = 64 * FAR_KIB;
	struct far_exchange op = { .m = FAR_M_EXTENTS, .off = off, .len = len, .reply = malloc(cap), .reply_cap = cap,
				.max = (uint32_t)far_min(max, 1024) }; /* they need at most 28 bytes each and a little */

	if (!op.reply)
		return -ENOMEM;
	int r = client_ask(self, &op);
	if (r == 0)
		r = far_grpc_decode_extents(op.reply, op.reply_n, off, len, out, max, n);
	free(op.reply);
	return r;
}

static int client_origin(void *self, struct far_origin *out, unsigned flags)
{
	struct far_client *c = self;
	int r = 0;

	/* A peer that tells nothing: what counts is whether its connections live, which far_hello_origin() knows. */
	if (!(flags & FAR_NOWAIT)) {
		r = client_describe(c);
		if (r == -EOPNOTSUPP)
			r = 0;
	}
	if (!far_hello_origin(c, out))
		return r ? r : -EAGAIN;
	return r;
}

static int client_lease(void *self, struct far_lease *l)
{
	struct far_client *c = self;
	uint8_t reply[FAR_GRPC_LEASE_MAX];
	struct far_grpc_lease a;
	struct far_exchange op = { .m = FAR_M_LEASE, .lease = l, .reply = reply, .reply_cap = sizeof reply };

	if (!c->writable)
		return -EROFS;
	if (far_client_kind(c) != FAR_CLIENT_UNKNOWN && !far_client_flag(&c->sessions))
		return -EOPNOTSUPP;
	int r = client_ordered(c, &op, false);
	if (r == 0)
		r = far_grpc_decode_lease(reply, op.reply_n, &a);
	if (r) {
		far_hello_origin(c, &l->origin);
		return r;
	}
	static const int codes[] = { [FAR_GRPC_GRANTED] = 0, [FAR_GRPC_BUSY] = -EBUSY, [FAR_GRPC_STALE] = -ESTALE,
				     [FAR_GRPC_READ_ONLY] = -EROFS };
	l->ttl_ms = a.ttl_ms;
	l->left_ms = a.left_ms;
	l->gone = a.gone;
	memcpy(l->other, a.other, sizeof l->other);
	if (a.answer == FAR_GRPC_GRANTED) /* before the new epoch is noted: changes that run are not fenced by it */
		far_hello_leased(c, l->release ? 0 : a.export.epoch);
	r = far_hello_note(c, &a.export, &op.seen);
	far_hello_origin(c, &l->origin);
	return r ? r : (unsigned)a.answer < FAR_ARRAY_LEN(codes) ? codes[a.answer] : -EPROTO;
}

static int client_watch(void *self, uint64_t instance, uint64_t since, struct far_extent *out, size_t max, size_t *n,
			bool *all, struct far_origin *now)
{
	struct far_client *c = self;
	struct far_grpc_watch w;

	if (far_client_kind(c) != FAR_CLIENT_UNKNOWN && !far_client_flag(&c->sessions))
		return -EOPNOTSUPP;
	max = far_min(max, 1024);
	size_t cap = FAR_GRPC_WATCH_MAX(max);
	struct far_exchange op = { .m = FAR_M_WATCH, .instance = instance, .since = since, .max = (uint32_t)max,
				.reply = malloc(cap), .reply_cap = cap };
	if (!op.reply)
		return -ENOMEM;
	int r = client_ask(c, &op);
	if (r == 0)
		r = far_grpc_decode_watch(op.reply, op.reply_n, &w, out, max, n);
	free(op.reply);
	if (r == 0) {
		*all = w.all;
		r = far_hello_note(c, &w.export, &op.seen);
		far_hello_origin(c, now);
	}
	return r;
}

static void client_counters(void *self, struct far_counters *sum)
{
	struct far_client *c = self;
	uint64_t connects, reconnects, lost;

	far_lanes_count(&c->lanes, &connects, &reconnects, &lost);
	sum->connects += connects;
	sum->reconnects += reconnects;
	sum->checksum_errors += atomic_load_explicit(&c->checksum_errors, memory_order_relaxed);
}

static void client_stop(void *self)
{
	struct far_client *c = self;

	far_lanes_stop(&c->lanes);
}

static void client_close(void *self)
{
	far_client_free(self);
}

const struct far_ops far_client_ops = {
	FAR_OPS_INIT,
	.read = client_read,
	.write = client_write,
	.flush = client_flush,
	.discard = client_discard,
	.zero = client_zero,
	.extents = client_extents,
	.origin = client_origin,
	.lease = client_lease,
	.watch = client_watch,
	.read_many = client_read_many,
	.write_many = client_write_many,
	.counters = client_counters,
	.stop = client_stop,
	.close = client_close,
};
