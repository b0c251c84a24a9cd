/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The client half as a backend: its calls. Each picks a connection (lanes.c; a new one was greeted by hello.c, so the peer's
 * kind is known), puts its request together for the service that the peer speaks, and takes the reply apart.
 *
 * What became of a call decides what comes next:
 *
 *   DONE      answered, also with an error of the peer's own: the caller gets it
 *   AGAIN     the peer cannot have seen it, or has refused it for the first time: made again at once
 *   GARBLED   a checksum did not fit, or the answer makes no sense: this connection takes no more calls, the call is made
 *             again on another one, three times in all
 *   LOST      no answer. A read ends with the error (the retry layer above knows how long to go on), unless it was us who
 *             ended the connection. A change has an unknown fate: fence.c, then it is made again while there is time
 *   FENCED    a change that was refused because its generation is over or its session unknown: the same
 *
 * Changes towards a peer without sessions are not made again here: see plain.c.
 *
 * Checksums (where the peer has them and the user wants them): of a read's bytes, checked when they are in the caller's
 * buffer; of a write's, checked by the peer before it writes and echoed; `check` in small messages.
 */
#include "wire/grpc/client.h"

#include "backend/backend.h"

#include <stdlib.h>
#include <string.h>

#define CLIENT_TRIES 3  /* of a call that the peer cannot have seen, or that was garbled */
#define CLIENT_ROUNDS 8 /* of a call that fences ended */

enum client_fate { CLIENT_DONE, CLIENT_AGAIN, CLIENT_GARBLED, CLIENT_LOST, CLIENT_FENCED };

/* One call of any kind. */
struct client_op {
	/* what */
	enum far_grpc_method m; /* of farpage.v1; the plain service's counterpart is found from it */
	uint64_t off, len;
	void *dst;
	const void *src;
	unsigned flags;
	uint64_t generation;
	const struct far_lease *lease;
	uint64_t instance, since;
	uint32_t max;
	/* the reply of all but reads */
	uint8_t *reply;
	size_t reply_cap, reply_n;
	struct far_channel *channel; /* make it on this one; NULL: on any */
	/* how it went */
	bool region, refused;
	uint64_t told_by; /* the instance, 0: unknown */
	struct far_hello_seen seen;
	enum client_fate fate;
};

uint64_t far_client_deadline(const struct far_client *c)
{
	return c->timeout == FAR_NEVER ? far_deadline() : far_min(far_deadline(), far_now() + c->timeout);
}

/* ---------------------------------------------------------------------------------------------- one exchange */

static const char *client_path(const struct client_op *op)
{
	static const char *const region[] = {
		[FAR_M_DESCRIBE] = FAR_GRPC_REGION "Describe", [FAR_M_READ] = FAR_GRPC_REGION "Read",
		[FAR_M_WRITE] = FAR_GRPC_REGION "Write",       [FAR_M_ZERO] = FAR_GRPC_REGION "Zero",
		[FAR_M_DISCARD] = FAR_GRPC_REGION "Discard",   [FAR_M_EXTENTS] = FAR_GRPC_REGION "Extents",
		[FAR_M_FLUSH] = FAR_GRPC_REGION "Flush",       [FAR_M_LEASE] = FAR_GRPC_REGION "Lease",
		[FAR_M_WATCH] = FAR_GRPC_REGION "Watch",
	};
	if (op->region)
		return region[op->m];
	return op->m == FAR_M_READ ? FAR_GRPC_BACKEND "ReadAt" : op->m == FAR_M_WRITE ? FAR_GRPC_BACKEND "WriteAt" :
	       op->m == FAR_M_FLUSH ? FAR_GRPC_BACKEND "Sync" : NULL;
}

/* A call with its buffers, and a read's reply of either service: number 1 (N, or the kinds), bytes 2, sums 3. */
struct client_call {
	struct far_call call;
	struct client_op *op;
	size_t got;
	uint64_t n;
	uint8_t kinds[8];
	uint64_t kinds_n;
	uint8_t sum[FAR_GRPC_SUM]; /* came with a read, or is expected from a change */
	bool has_sum;
	uint8_t head[FAR_H2_HEAD - FAR_GRPC_PREFIX];
	uint8_t body[FAR_H2_HEAD + 512]; /* of a request that does not fit the head */
};

static int client_read_value(void *opaque, uint32_t num, uint64_t value)
{
	struct client_call *k = opaque;

	if (num == 1 && k->op->region && k->kinds_n < sizeof k->kinds)
		k->kinds[k->kinds_n++] = (uint8_t)far_min(value, 255);
	else if (num == 1 && !k->op->region)
		k->n = value;
	return 0;
}

static int client_read_bytes(void *opaque, uint32_t num, uint64_t len, uint8_t **dst)
{
	struct client_call *k = opaque;

	if (num == 2) {
		if (len != k->op->len)
			return -EPROTO;
		*dst = k->op->dst;
		k->got = (size_t)len;
	} else if (num == 1 && k->op->region) {
		if (len != 1)
			return -EPROTO;
		*dst = k->kinds;
		k->kinds_n = 1;
	} else if (num == 3 && k->op->region) {
		if (len != FAR_GRPC_SUM)
			return -EPROTO;
		*dst = k->sum;
		k->has_sum = true;
	}
	return 0;
}

static int client_request_plain(struct client_op *op, struct client_call *k)
{
	struct far_pb_out o = { k->head, 0, sizeof k->head };

	if (op->m == FAR_M_READ) {
		far_pb_put_uint(&o, 1, op->len);
		far_pb_put_uint(&o, 2, op->off);
	} else if (op->m == FAR_M_WRITE) {
		far_pb_put_uint(&o, 1, op->off);
		far_pb_put_head(&o, 2, op->len);
	} else if (op->m != FAR_M_FLUSH) {
		return -EOPNOTSUPP;
	}
	far_call_request(&k->call, &o, op->src, op->src ? op->len : 0);
	return 0;
}

static void client_request(struct far_client *c, struct client_op *op, struct client_call *k)
{
	struct far_grpc_request rq;
	bool sums = far_client_flag(&c->sums);

	memset(&rq, 0, offsetof(struct far_grpc_request, ranges));
	rq.export = c->export;
	rq.export_n = c->export_n;
	rq.off = (int64_t)op->off;
	rq.len = op->len;
	rq.max = op->max;
	rq.bulk = (op->flags & FAR_BULK) != 0;
	rq.flush = (op->flags & FAR_FLUSH) != 0;
	if (op->generation && c->writable) {
		rq.session = c->session;
		rq.generation = op->generation;
	}
	if (op->m == FAR_M_READ) {
		rq.zeros = true;
		rq.sums = sums;
		rq.ranges_n = 1;
		rq.ranges[0] = (struct far_grpc_range){ op->off, op->len };
	} else if (sums && (op->m == FAR_M_WRITE || op->m == FAR_M_ZERO || op->m == FAR_M_DISCARD)) {
		if (op->m == FAR_M_WRITE)
			far_grpc_sum_data(k->sum, c->export, c->export_n, op->off, op->src, op->len);
		else
			far_grpc_sum_span(k->sum, c->export, c->export_n, op->off, op->len);
		rq.sum = k->sum;
	} else if (op->m == FAR_M_LEASE) {
		const struct far_lease *l = op->lease;
		rq.writer = l->writer;
		rq.writer_n = strlen(l->writer);
		rq.holder = l->holder;
		rq.holder_n = l->holder ? strnlen(l->holder, sizeof l->other - 1) : 0;
		rq.epoch = l->epoch;
		rq.revision = l->version;
		rq.take_over = l->take_over;
		rq.release = l->release;
	} else if (op->m == FAR_M_WATCH) {
		rq.instance = op->instance;
		rq.since = op->since;
	}
	rq.data_n = op->m == FAR_M_WRITE ? op->len : 0;
	if (op->m == FAR_M_WRITE || op->m == FAR_M_READ) {
		struct far_pb_out o = { k->head, 0, sizeof k->head };
		far_grpc_encode_request(&o, op->m, &rq);
		far_call_request(&k->call, &o, op->src, op->src ? op->len : 0);
	} else {
		struct far_pb_out o = { k->body, 0, sizeof k->body }, none = { k->head, 0, sizeof k->head };
		far_grpc_encode_request(&o, op->m, &rq);
		FAR_ASSERT(o.n <= o.cap);
		far_call_request(&k->call, &none, k->body, o.n);
	}
}

/* Whether what came is what was asked for. */
static int client_check_read(struct far_client *c, struct client_op *op, struct client_call *k)
{
	uint8_t sum[FAR_GRPC_SUM];
	bool zeros = k->kinds_n == 1 && k->kinds[0] == 1 && !k->got;

	if (!op->region)
		return k->n == op->len && k->got == op->len ? 0 : -EPROTO;
	if (k->kinds_n > 1 || (!zeros && ((k->kinds_n && k->kinds[0]) || k->got != op->len)))
		return -EPROTO;
	if (zeros)
		memset(op->dst, 0, op->len);
	if (!far_client_flag(&c->sums))
		return 0;
	if (zeros)
		far_grpc_sum_span(sum, c->export, c->export_n, op->off, op->len);
	else
		far_grpc_sum_data(sum, c->export, c->export_n, op->off, op->dst, op->len);
	return k->has_sum && !memcmp(sum, k->sum, sizeof sum) ? 0 : -EBADMSG;
}

static int client_check_plain_write(const struct client_op *op)
{
	struct far_pb_in in = { op->reply, op->reply + op->reply_n };
	struct far_pb_field f;
	uint64_t n = 0;
	int r;

	while ((r = far_pb_next(&in, &f)) > 0)
		if (f.num == 1 && f.wire == FAR_PB_VARINT)
			n = f.value;
	return r ? r : n == op->len ? 0 : -EPROTO;
}

static bool client_check_flushed(const struct client_op *op)
{
	struct far_grpc_written w;

	return far_grpc_decode_written(op->reply, op->reply_n, &w) == 0 && w.checked && w.flushed;
}

static int client_check(struct far_client *c, struct client_op *op, struct client_call *k)
{
	bool sums = far_client_flag(&c->sums), had = false;
	const uint8_t *sum;

	switch (op->m) {
	case FAR_M_READ:
		return client_check_read(c, op, k);
	case FAR_M_WRITE:
	case FAR_M_ZERO:
	case FAR_M_DISCARD:
		if (!op->region)
			return client_check_plain_write(op);
		if (far_grpc_decode_sum_reply(op->reply, op->reply_n, &sum))
			return -EPROTO;
		if (sums && op->m == FAR_M_WRITE && (op->flags & FAR_FLUSH) && !client_check_flushed(op))
			return -EBADMSG;
		return !sums || (sum && !memcmp(sum, k->sum, FAR_GRPC_SUM)) ? 0 : -EBADMSG;
	default: {
		int r = op->region ? far_grpc_check(op->reply, op->reply_n, &had) : 0;
		return r ? r : sums && op->region && !had ? -EBADMSG : 0;
	}
	}
}

/* What became of a call that ended with r. */
static enum client_fate client_fate(struct far_client *c, struct client_op *op, const struct far_channel *channel,
				    const struct far_call *call, int r)
{
	bool answered = call->grpc_status != FAR_CALL_NO_STATUS;

	if (r == 0)
		return CLIENT_DONE;
	if (call->untouched)
		return CLIENT_AGAIN;
	if (r == -ESHUTDOWN && !answered)
		return CLIENT_DONE;
	if (r == -EPROTO || r == -EBADMSG)
		return CLIENT_GARBLED;
	/* The stream alone was reset: the peer could make no sense of it. */
	if (!answered && r == -ECONNRESET && far_channel_usable(channel) && far_client_flag(&c->sums))
		return CLIENT_GARBLED;
	if (!answered || r == -ETIMEDOUT)
		return CLIENT_LOST;
	if (r == -ECANCELED || r == -ENOTCONN)
		return CLIENT_FENCED;
	if (!far_client_flag(&c->sums) || r == -EREMOTEIO)
		return CLIENT_DONE;
	/* A peer of ours names its errors, and does not refuse what was checked before it was sent. */
	if (!call->errno_name[0] || r == -ENOENT || r == -EINVAL || r == -EOPNOTSUPP)
		return CLIENT_GARBLED;
	/* An error that the application would see is believed when it is said twice. */
	if (!far_error_is_transient(r) && !op->refused) {
		op->refused = true;
		return CLIENT_AGAIN;
	}
	return CLIENT_DONE;
}

/* Make the call once. */
static int client_once(struct far_client *c, struct client_op *op, uint64_t deadline)
{
	int lane = (op->flags & FAR_BULK) ? FAR_LANE_BULK : FAR_LANE_DEMAND;
	struct far_channel *channel;

	op->fate = CLIENT_DONE;
	int r = op->channel ? 0 : far_lanes_pick(&c->lanes, lane, deadline, &channel, NULL);
	if (r && r != -ESTALE && r != -ESHUTDOWN && (r == -EBADMSG || !far_error_is_transient(r)))
		op->fate = CLIENT_AGAIN; /* most likely the greeting was garbled */
	if (r)
		return r;
	if (op->channel)
		far_channel_get(channel = op->channel);
	if ((op->m == FAR_M_WRITE || op->m == FAR_M_ZERO || op->m == FAR_M_DISCARD) && far_hello_fenced(c)) {
		far_channel_put(channel);
		return -ESTALE;
	}
	op->told_by = far_channel_tag(channel, 0);
	struct client_call k;
	bool patient = false;
	memset(&k, 0, offsetof(struct client_call, head));
	op->region = far_client_kind(c) == FAR_CLIENT_REGION;
	op->seen = far_hello_seen(c);
	k.op = op;
	k.call.path = client_path(op);
	k.call.tell_deadline = op->region;
	if (op->m == FAR_M_READ) {
		k.call.fields = true;
		k.call.pb = (struct far_pb_stream){ .value = client_read_value, .bytes = client_read_bytes, .opaque = &k };
	} else {
		k.call.buf = op->reply;
		k.call.buf_cap = op->reply_cap;
	}
	if (op->region)
		client_request(c, op, &k);
	else
		r = client_request_plain(op, &k);
	if (r == 0) {
		uint64_t bytes = op->m == FAR_M_READ || op->m == FAR_M_WRITE ? op->len : 0;
		uint64_t began = far_now();
		far_channel_load(channel, (int64_t)bytes);
		r = far_channel_call(channel, &k.call, deadline, c->timeout);
		far_channel_load(channel, -(int64_t)bytes);
		op->reply_n = k.call.buf_n;
		if (r == 0)
			r = client_check(c, op, &k);
		op->fate = client_fate(c, op, channel, &k.call, r);
		patient = r == -ETIMEDOUT && far_now() - began >= far_min(c->timeout, c->lanes.quiet + c->lanes.patience);
	}
	if (r == -EBADMSG)
		atomic_fetch_add_explicit(&c->checksum_errors, 1, memory_order_relaxed);
	/* A flipped bit in a header may have spoilt the connection for good: it may even be deaf to some calls only. */
	if ((op->fate == CLIENT_GARBLED || patient) && !c->lanes.once)
		far_channel_retire(channel);
	if (r == 0 && op->m == FAR_M_WRITE && !far_client_flag(&c->sessions))
		far_channel_mark(channel, 1);
	/* Without sessions all that can be done about a change that may still land is to hang up. */
	if (op->fate == CLIENT_LOST && op->m == FAR_M_WRITE && !far_client_flag(&c->sessions) && !c->lanes.once)
		far_channel_kill(channel, -ECONNRESET);
	far_channel_put(channel);
	if (r && k.call.grpc_status && k.call.grpc_status != FAR_CALL_NO_STATUS)
		far_log(FAR_LOG_DEBUG, "%s: %s: status %u: %s", c->where, k.call.path, k.call.grpc_status, k.call.text);
	return r;
}

/* An error that only this file understands becomes one that callers know. */
static int client_error(int r)
{
	return r == -ECANCELED || r == -ENOTCONN ? -ECONNRESET : r;
}

/* A call that changes nothing. */
static int client_ask(struct far_client *c, struct client_op *op)
{
	uint64_t deadline = far_client_deadline(c);
	unsigned tries = 0, rounds = 0;
	int r;

	for (;;) {
		r = client_once(c, op, deadline);
		bool again = false;
		switch (op->fate) {
		case CLIENT_DONE:
			break;
		case CLIENT_AGAIN:
		case CLIENT_GARBLED:
			again = ++tries < CLIENT_TRIES && (!c->lanes.once || op->fate == CLIENT_GARBLED || op->refused);
			break;
		case CLIENT_LOST: /* -ECANCELED: a fence ended the connection */
		case CLIENT_FENCED:
			again = r == -ECANCELED && ++rounds < CLIENT_ROUNDS;
			break;
		}
		if (!again)
			return client_error(r);
	}
}

/* After a change: whether it is made again. */
static bool client_change_again(struct far_client *c, struct client_op *op, unsigned *tries, unsigned *rounds,
				uint64_t deadline)
{
	bool sessions = far_client_flag(&c->sessions);

	switch (op->fate) {
	case CLIENT_AGAIN:
		return ++*tries < CLIENT_TRIES && (!c->lanes.once || op->refused);
	case CLIENT_GARBLED:
		return ++*tries < CLIENT_TRIES && sessions;
	case CLIENT_LOST:
	case CLIENT_FENCED:
		return ++*rounds < CLIENT_ROUNDS && sessions && !c->lanes.once && far_now() < deadline;
	default:
		return false;
	}
}

/* A call that belongs to a generation; `change`: done again later it would undo something. */
static int client_ordered(struct far_client *c, struct client_op *op, bool change)
{
	uint64_t deadline = far_client_deadline(c);
	unsigned tries = 0, rounds = 0;

	for (;;) {
		int r = far_fence_enter(c, deadline, &op->generation);
		if (r)
			return client_error(r);
		r = client_once(c, op, deadline);
		if (op->fate == CLIENT_FENCED || (change && (op->fate == CLIENT_LOST || op->fate == CLIENT_GARBLED)))
			far_fence_break(c, op->generation);
		if (r == 0 && change && far_client_flag(&c->sessions))
			far_hello_changed(c, op->told_by);
		if (!client_change_again(c, op, &tries, &rounds, deadline))
			return client_error(r);
	}
}

int far_client_read_back(struct far_client *c, uint64_t off, void *buf, size_t len)
{
	struct client_op op = { .m = FAR_M_READ, .off = off, .len = len, .dst = buf };

	return client_ask(c, &op);
}

int far_client_write_again(struct far_client *c, uint64_t off, const void *buf, size_t len)
{
	uint8_t reply[64];
	struct client_op op = { .m = FAR_M_WRITE, .off = off, .src = buf, .len = len, .reply = reply,
				.reply_cap = sizeof reply };

	return client_error(client_once(c, &op, far_client_deadline(c)));
}

/* -------------------------------------------------------------------------------------------- the operations */

static int client_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct client_op op = { .m = FAR_M_READ, .off = off, .len = len, .dst = buf, .flags = flags };

	return flags & FAR_NOWAIT ? -EAGAIN : client_ask(self, &op);
}

static int client_change(struct far_client *c, enum far_grpc_method m, uint64_t off, const void *src, uint64_t len,
			 unsigned flags, uint64_t *told_by)
{
	uint8_t reply[64];
	struct client_op op = { .m = m, .off = off, .src = src, .len = len, .flags = flags, .reply = reply,
				.reply_cap = sizeof reply };

	bool entered;
	int r = flags & FAR_NOWAIT ? -EAGAIN : far_plain_begin(c, off, src, len, far_client_deadline(c), &entered);
	if (r)
		return r;
	r = client_ordered(c, &op, true);
	bool lost = m == FAR_M_WRITE && (op.fate == CLIENT_LOST || op.fate == CLIENT_GARBLED);
	int p = far_plain_end(c, off, src, len, lost && r ? 1 : r, entered);
	if (told_by)
		*told_by = op.told_by;
	return r ? r : p;
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
	struct client_op op = { .m = FAR_M_FLUSH, .reply = reply, .reply_cap = sizeof reply };
	int r = far_plain_settle(c, far_client_deadline(c));
	bool done = false;

	size_t n = far_lanes_up(&c->lanes, up, FAR_ARRAY_LEN(up));
	for (size_t i = 0; i < n; i++) {
		uint64_t marks = far_channel_mark(up[i], 0);
		if (!r && marks && (c->lanes.once || far_channel_alive(up[i]))) {
			op.channel = up[i];
			r = client_once(c, &op, far_client_deadline(c));
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

static int client_flush(void *self)
{
	struct far_client *c = self;
	uint8_t reply[64];
	struct far_grpc_flushed f;
	struct client_op op = { .m = FAR_M_FLUSH, .reply = reply, .reply_cap = sizeof reply };
	uint64_t changes = far_hello_changes(c);

	if (far_client_kind(c) != FAR_CLIENT_UNKNOWN && !far_client_flag(&c->sessions))
		return client_flush_plain(c);
	int r = client_ordered(c, &op, false);
	if (r == -EREMOTEIO)
		far_hello_forgotten(c);
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
	if (r || !flush)
		return r;
	if (!sessions)
		return client_flush(c);
	struct far_grpc_flushed f = { .instance = told_by };
	return far_hello_flushed(c, &f, changes + 1);
}

static int client_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	size_t cap = 64 * FAR_KIB;
	struct client_op op = { .m = FAR_M_EXTENTS, .off = off, .len = len, .reply = malloc(cap), .reply_cap = cap,
				.max = (uint32_t)far_min(max, 1024) }; /* they need at most 28 bytes each and a little */

	if (!op.reply)
		return -ENOMEM;
	int r = client_ask(self, &op);
	if (r == 0)
		r = far_grpc_decode_extents(op.reply, op.reply_n, off, len, out, max, n);
	free(op.reply);
	return r;
}

static int client_describe(struct far_client *c)
{
	uint8_t reply[1024];
	struct far_grpc_export e;
	struct client_op op = { .m = FAR_M_DESCRIBE, .reply = reply, .reply_cap = sizeof reply };
	int r = client_ordered(c, &op, false);

	if (r == 0)
		r = far_grpc_decode_export(reply, op.reply_n, &e);
	return r ? r : far_hello_note(c, &e, &op.seen);
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
	struct client_op op = { .m = FAR_M_LEASE, .lease = l, .reply = reply, .reply_cap = sizeof reply };

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
	struct client_op op = { .m = FAR_M_WATCH, .instance = instance, .since = since, .max = (uint32_t)max,
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
	.counters = client_counters,
	.stop = client_stop,
	.close = client_close,
};
