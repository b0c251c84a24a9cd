/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One call, once. It picks a connection (lanes.c; a new one was greeted by hello.c, so the peer's kind is known), puts its
 * request together for the service that the peer speaks, takes the reply apart, and judges what became of the call.
 *
 * Checksums (where the peer has them and the user wants them): of a read's bytes, checked when they are in the caller's
 * buffer; of a write's, checked by the peer before it writes and echoed; `check` in small messages.
 */
#include "wire/grpc/exchange.h"

#include "backend/backend.h"

#include <stdlib.h>
#include <string.h>

#define EXCHANGE_MEMORY (10 * FAR_SEC)
#define EXCHANGE_NEAR (2 * FAR_MSEC)

static const char *exchange_path(const struct far_exchange *op)
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
struct exchange_call {
	struct far_call call;
	struct far_exchange *op;
	size_t got;
	uint64_t n;
	uint8_t kinds[8];
	uint64_t kinds_n;
	uint8_t sum[FAR_GRPC_SUM]; /* came with a read, or is expected from a change */
	bool has_sum;
	bool begun; /* of several that are made at once, as the next */
	uint64_t deadline;
	uint64_t began;
	uint8_t head[FAR_H2_HEAD - FAR_GRPC_PREFIX];
	uint8_t body[FAR_H2_HEAD + 512]; /* of a request that does not fit the head */
};

static int exchange_read_value(void *opaque, uint32_t num, uint64_t value)
{
	struct exchange_call *k = opaque;

	if (num == 1 && k->op->region && k->kinds_n < sizeof k->kinds)
		k->kinds[k->kinds_n++] = (uint8_t)far_min(value, 255);
	else if (num == 1 && !k->op->region)
		k->n = value;
	return 0;
}

static int exchange_read_bytes(void *opaque, uint32_t num, uint64_t len, uint8_t **dst)
{
	struct exchange_call *k = opaque;

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

static int exchange_request_plain(struct far_exchange *op, struct exchange_call *k)
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

static void exchange_request(struct far_client *c, struct far_exchange *op, struct exchange_call *k)
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
		rq.zeros = !op->careful; /* for a server of ours: answer from a copy, something changed while it was sent */
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
static int exchange_check_read(struct far_client *c, struct far_exchange *op, struct exchange_call *k)
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

static int exchange_check_plain_write(const struct far_exchange *op)
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

static bool exchange_check_flushed(const struct far_exchange *op)
{
	struct far_grpc_written w;

	return far_grpc_decode_written(op->reply, op->reply_n, &w) == 0 && w.checked && w.flushed;
}

static int exchange_check(struct far_client *c, struct far_exchange *op, struct exchange_call *k)
{
	bool sums = far_client_flag(&c->sums), had = false;
	const uint8_t *sum;

	switch (op->m) {
	case FAR_M_READ:
		return exchange_check_read(c, op, k);
	case FAR_M_WRITE:
	case FAR_M_ZERO:
	case FAR_M_DISCARD:
		if (!op->region)
			return exchange_check_plain_write(op);
		if (far_grpc_decode_sum_reply(op->reply, op->reply_n, &sum))
			return -EPROTO;
		if (sums && op->m == FAR_M_WRITE && (op->flags & FAR_FLUSH) && !exchange_check_flushed(op))
			return -EBADMSG;
		return !sums || (sum && !memcmp(sum, k->sum, FAR_GRPC_SUM)) ? 0 : -EBADMSG;
	default: {
		int r = op->region ? far_grpc_check(op->reply, op->reply_n, &had) : 0;
		return r ? r : sums && op->region && !had ? -EBADMSG : 0;
	}
	}
}

/* What became of a call that ended with r. */
static enum far_fate exchange_fate(struct far_client *c, struct far_exchange *op, const struct far_channel *channel,
				    const struct far_call *call, int r)
{
	bool answered = call->grpc_status != FAR_CALL_NO_STATUS;

	if (r == 0)
		return FAR_FATE_DONE;
	if (call->untouched)
		return FAR_FATE_AGAIN;
	if (r == -ESHUTDOWN && !answered)
		return FAR_FATE_DONE;
	if (r == -EPROTO || r == -EBADMSG)
		return FAR_FATE_GARBLED;
	/* The stream alone was reset: the peer could make no sense of it. */
	if (!answered && r == -ECONNRESET && far_channel_usable(channel) && far_client_flag(&c->sums))
		return FAR_FATE_GARBLED;
	if (!answered || r == -ETIMEDOUT)
		return FAR_FATE_LOST;
	if (r == -ECANCELED || r == -ENOTCONN)
		return FAR_FATE_FENCED;
	if (!far_client_flag(&c->sums) || r == -EREMOTEIO)
		return FAR_FATE_DONE;
	/* A peer of ours names its errors, and does not refuse what was checked before it was sent. */
	if (!call->errno_name[0] || r == -ENOENT || r == -EINVAL || r == -EOPNOTSUPP)
		return FAR_FATE_GARBLED;
	/* An error that the application would see is believed when it is said twice. */
	if (!far_error_is_transient(r) && !op->refused) {
		op->refused = true;
		return FAR_FATE_AGAIN;
	}
	return FAR_FATE_DONE;
}

/* Take the channel's part in it: what the call's end says about the connection. */
static void exchange_judge(struct far_client *c, struct far_exchange *op, struct far_channel *channel, int r, bool patient)
{
	bool sessions = far_client_flag(&c->sessions);

	if (r == -EBADMSG)
		atomic_fetch_add_explicit(&c->checksum_errors, 1, memory_order_relaxed);
	/* A flipped bit in a header may have spoilt the connection for good: it may even be deaf to some calls only. */
	if ((op->fate == FAR_FATE_GARBLED || patient) && !c->lanes.once)
		far_channel_retire(channel);
	if (r == 0 && op->m == FAR_M_WRITE && !sessions)
		far_channel_mark(channel, 1);
	/* Without sessions all that can be done about a change that may still land is to hang up. */
	if (op->fate == FAR_FATE_LOST && op->m == FAR_M_WRITE && !sessions && !c->lanes.once)
		far_channel_kill(channel, -ECONNRESET);
}

/* Put the call together for this connection. 0, or why it is not begun. */
static int exchange_prepare(struct far_client *c, struct far_exchange *op, struct far_channel *channel, struct exchange_call *k)
{
	memset(k, 0, offsetof(struct exchange_call, head));
	op->told_by = far_channel_tag(channel, 0);
	op->region = far_client_kind(c) == FAR_CLIENT_REGION;
	if (op->m == FAR_M_DESCRIBE || op->m == FAR_M_LEASE || op->m == FAR_M_WATCH)
		op->seen = far_hello_seen(c);
	k->op = op;
	k->call.path = exchange_path(op);
	k->call.tell_deadline = op->region;
	if (op->m == FAR_M_READ) {
		k->call.fields = true;
		k->call.pb = (struct far_pb_stream){ .value = exchange_read_value, .bytes = exchange_read_bytes, .opaque = k };
	} else {
		k->call.buf = op->reply;
		k->call.buf_cap = op->reply_cap;
	}
	if (!op->region)
		return exchange_request_plain(op, k);
	exchange_request(c, op, k);
	return 0;
}

/* The shortest that a call took of late tells how far away the peer is. */
static void exchange_learn(struct far_client *c, uint64_t took, uint64_t now)
{
	if (took < atomic_load_explicit(&c->shortest, memory_order_relaxed) ||
	    now - atomic_load_explicit(&c->shortest_at, memory_order_relaxed) > EXCHANGE_MEMORY) {
		atomic_store_explicit(&c->shortest, took, memory_order_relaxed);
		atomic_store_explicit(&c->shortest_at, now, memory_order_relaxed);
		atomic_store_explicit(&c->lanes.near, took <= EXCHANGE_NEAR, memory_order_relaxed);
	}
}

static int exchange_lane(const struct far_exchange *op)
{
	return (op->flags & FAR_BULK) ? FAR_LANE_BULK : FAR_LANE_DEMAND;
}

/* The call has ended with r: look at what came. Returns the operation's outcome. */
static int exchange_ended(struct far_client *c, struct far_exchange *op, struct far_channel *channel,
			  struct exchange_call *k, int r)
{
	uint64_t now = far_now(), took = now - k->began;

	op->reply_n = k->call.buf_n;
	if (r == 0)
		exchange_learn(c, took, now);
	if (r == 0 && op->m == FAR_M_READ && op->len >= FAR_WARM && exchange_lane(op) == FAR_LANE_DEMAND)
		atomic_store_explicit(&c->warmed, now, memory_order_relaxed);
	if (r == 0)
		r = exchange_check(c, op, k);
	op->fate = exchange_fate(c, op, channel, &k->call, r);
	bool patient = r == -ETIMEDOUT && took >= far_min(c->timeout, c->lanes.quiet + c->lanes.patience);
	exchange_judge(c, op, channel, r, patient);
	/* The token may have been renewed meanwhile: another connection reads it again. */
	if (k->call.grpc_status == FAR_GRPC_UNAUTHENTICATED && c->lanes.token_file && !c->lanes.once)
		far_channel_retire(channel);
	if (r && k->call.grpc_status && k->call.grpc_status != FAR_CALL_NO_STATUS)
		far_log(FAR_LOG_DEBUG, "%s: %s: status %u: %s", c->where, k->call.path, k->call.grpc_status, k->call.text);
	return r;
}

/* Make the call once, on this connection. */
static int exchange_on(struct far_client *c, struct far_exchange *op, struct far_channel *channel, uint64_t deadline)
{
	struct exchange_call k;
	int r = exchange_prepare(c, op, channel, &k);

	if (r) {
		exchange_judge(c, op, channel, r, false);
		return r;
	}
	int64_t bytes = op->m == FAR_M_READ || op->m == FAR_M_WRITE ? (int64_t)op->len : 0;
	k.began = far_now();
	far_channel_owe(channel, 1, bytes);
	r = far_channel_call(channel, &k.call, deadline, c->timeout);
	far_channel_owe(channel, -1, -bytes);
	return exchange_ended(c, op, channel, &k, r);
}

/* A connection for it, with a reference. */
static int exchange_pick(struct far_client *c, struct far_exchange *op, uint64_t deadline, struct far_channel **channel)
{
	int r = far_lanes_pick(&c->lanes, exchange_lane(op), deadline, channel, NULL);

	op->fate = FAR_FATE_DONE;
	if (r && r != -ESTALE && r != -ESHUTDOWN && (r == -EBADMSG || !far_error_is_transient(r)))
		op->fate = FAR_FATE_AGAIN; /* most likely the greeting was garbled */
	return r;
}

static bool exchange_is_change(const struct far_exchange *op)
{
	return op->m == FAR_M_WRITE || op->m == FAR_M_ZERO || op->m == FAR_M_DISCARD;
}

static void exchange_begin(struct far_client *c, struct far_exchange *op, struct far_channel *channel, struct exchange_call *k,
			   uint64_t deadline)
{
	op->made = true;
	op->fate = FAR_FATE_DONE;
	k->begun = false;
	op->result = exchange_is_change(op) && far_hello_fenced(c) ? -ESTALE : 0;
	if (op->result)
		return;
	op->result = exchange_prepare(c, op, channel, k);
	k->deadline = far_min(deadline, far_client_deadline(c));
	k->began = far_now();
	k->begun = op->result == 0;
	if (!k->begun) {
		exchange_judge(c, op, channel, op->result, false);
		return;
	}
	far_channel_owe(channel, 1, (int64_t)op->len);
	far_channel_begin(channel, &k->call, k->deadline);
}

/* The connections for them, which may have to be made: before any call is begun. False: one has its result. */
static bool exchange_pick_all(struct far_client *c, struct far_exchange *op, size_t n, uint64_t deadline,
			      struct far_channel **channel)
{
	for (size_t i = 0; i < n; i++) {
		if (channel[exchange_lane(&op[i])])
			continue;
		op[i].result = exchange_pick(c, &op[i], far_min(deadline, far_client_deadline(c)), &channel[exchange_lane(&op[i])]);
		op[i].made = op[i].result != 0;
		if (op[i].made)
			return false;
	}
	return true;
}

void far_exchange_many(struct far_client *c, struct far_exchange *op, size_t n, size_t ahead, uint64_t deadline)
{
	struct far_channel *channel[FAR_LANES] = { NULL }, *on;
	struct exchange_call *calls = malloc(far_min(n, ahead) * sizeof *calls);
	size_t begun = 0;

	bool well = calls && exchange_pick_all(c, op, n, deadline, channel);
	for (size_t i = 0; i < n && (well || i < begun); i++) {
		for (; well && begun < far_min(n, i + ahead); begun++)
			exchange_begin(c, &op[begun], channel[exchange_lane(&op[begun])], &calls[begun % ahead],
				       deadline);
		struct exchange_call *k = &calls[i % ahead];
		on = channel[exchange_lane(&op[i])];
		for (int lane = 0; lane < FAR_LANES; lane++)
			if (channel[lane] && channel[lane] != on)
				far_channel_push(channel[lane]);
		if (k->begun) {
			/* What comes of the later ones waits in the socket while this one's checksum is computed. */
			int r = far_channel_finish(on, &k->call, k->deadline, c->timeout);
			far_channel_owe(on, -1, -(int64_t)op[i].len);
			op[i].result = exchange_ended(c, &op[i], on, k, r);
		}
		well = well && op[i].result == 0;
	}
	for (int lane = 0; lane < FAR_LANES; lane++)
		far_channel_put(channel[lane]);
	free(calls);
}

int far_exchange(struct far_client *c, struct far_exchange *op, uint64_t deadline)
{
	struct far_channel *channel = op->channel;
	int r = 0;

	op->fate = FAR_FATE_DONE;
	if (channel)
		far_channel_get(channel);
	else
		r = exchange_pick(c, op, deadline, &channel);
	if (r)
		return r;
	r = exchange_is_change(op) && far_hello_fenced(c) ? -ESTALE : exchange_on(c, op, channel, deadline);
	far_channel_put(channel);
	return r;
}
