/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The first words on a connection: Describe, with session and generation. The answer says which service the peer speaks
 * and what it keeps now, which is compared with what this client relies on:
 *
 *   facts      size, chunk, longest request: fixed when the client was opened, perhaps offline with facts of an earlier time
 *   identity   which content; once heard, no other one will do
 *   epoch, revision   the newest that had been seen when it was asked; smaller ones mean that an older copy was put back
 *
 * If it does not fit, the connection is not used and the dial has failed with -ESTALE, until a hello fits again; the first
 * of a series is logged. An answer that no check vouches for (the peer does not know the method, or the export) counts only
 * when it comes twice in a row: bits may have been flipped on the way.
 *
 * What was written but not flushed when the peer became another instance may be forgotten there: the flush that finds that
 * out fails once with -EREMOTEIO, after which the instance that far_origin() tells is another one. Who keeps a copy writes
 * it again; who does not must know.
 *
 * A peer with the plain Backend service has no identity. A new connection to it, after one was lost, reads the region's
 * last byte, which finds a shorter one out.
 */
#define _GNU_SOURCE
#include "wire/grpc/client.h"

#include <stdio.h>
#include <string.h>

#define HELLO_JUMPS 64

/* ------------------------------------------------------------------------------------------- what was heard */

/* Why `e` is not what this client relies on; false: it is. */
static bool hello_differs_locked(struct far_client *c, const struct far_grpc_export *e, const struct far_hello_seen *seen,
				 char *why, size_t n) FAR_REQUIRES(c->lock)
{
	const struct far_facts *f = &c->facts;

	if (c->has_facts && e->size != f->bytes)
		snprintf(why, n, "it has %" PRIu64 " bytes now, not %" PRIu64, e->size, f->bytes);
	else if (c->has_facts && e->chunk && (!f->chunk || f->chunk % e->chunk))
		snprintf(why, n, "it takes only whole chunks of %" PRIu64 " bytes now", e->chunk);
	else if (c->has_facts && e->max_request < f->max_io)
		snprintf(why, n, "it takes at most %" PRIu64 " bytes a request now, not %" PRIu64, e->max_request, f->max_io);
	else if (c->identity[0] && strcmp(c->identity, e->identity))
		snprintf(why, n, "it is another content (identity '%s', not '%s')", e->identity, c->identity);
	else if (e->sessions && e->epoch && e->epoch < seen->epoch) /* 0: it keeps no record and knows none yet */
		snprintf(why, n, "an older copy was put back (epoch %" PRIu64 " after %" PRIu64 ")", e->epoch, seen->epoch);
	else if (e->sessions && e->revision && e->revision < seen->revision)
		snprintf(why, n, "an older copy was put back (revision %" PRIu64 " after %" PRIu64 ")", e->revision, seen->revision);
	else
		return false;
	return true;
}

/* Make it known once that every call fails, or that they do not any more. */
static void hello_judge(struct far_client *c, bool stale, const char *why)
{
	far_mutex_lock(&c->lock);
	bool news = c->stale != stale;
	c->stale = stale;
	far_mutex_unlock(&c->lock);
	if (news && stale)
		far_log(FAR_LOG_ERROR, "%s: not what was opened: %s; every call fails until the right content is served there again, "
			"or this one is opened anew", c->where, why);
	else if (news)
		far_log(FAR_LOG_WARNING, "%s: the right content is served there again", c->where);
}

static int hello_take(struct far_client *c, const struct far_grpc_export *e, const struct far_hello_seen *seen,
		      struct far_error *err)
{
	char why[200] = "";

	far_mutex_lock(&c->lock);
	c->heard = *e;
	c->has_heard = true;
	c->odd = 0;
	bool differs = hello_differs_locked(c, e, seen, why, sizeof why);
	if (!differs) {
		if (!c->identity[0])
			memcpy(c->identity, e->identity, sizeof c->identity);
		if (e->sessions) {
			c->seen.epoch = far_max(c->seen.epoch, e->epoch);
			c->seen.revision = far_max(c->seen.revision, e->revision);
		}
	}
	far_mutex_unlock(&c->lock);
	hello_judge(c, differs, why);
	return differs ? far_error_set(err, ESTALE, "%s is not what it was: %s", c->where, why) : 0;
}

struct far_hello_seen far_hello_seen(struct far_client *c)
{
	far_mutex_lock(&c->lock);
	struct far_hello_seen seen = c->seen;
	far_mutex_unlock(&c->lock);
	return seen;
}

int far_hello_note(struct far_client *c, const struct far_grpc_export *e, const struct far_hello_seen *seen)
{
	int r = hello_take(c, e, seen, NULL);

	if (r) /* this connection leads to it, and others may: each call must say hello again */
		far_lanes_reset(&c->lanes, -ESTALE);
	return r;
}

void far_hello_changed(struct far_client *c, uint64_t instance)
{
	far_mutex_lock(&c->lock);
	c->changes++;
	c->forgotten = c->forgotten || (c->unflushed && c->unflushed != instance);
	c->unflushed = instance;
	far_mutex_unlock(&c->lock);
}

void far_hello_leased(struct far_client *c, uint64_t epoch)
{
	far_mutex_lock(&c->lock);
	c->leased = epoch;
	far_mutex_unlock(&c->lock);
}

bool far_hello_fenced(struct far_client *c)
{
	far_mutex_lock(&c->lock);
	bool fenced = c->leased && c->heard.epoch > c->leased;
	far_mutex_unlock(&c->lock);
	return fenced;
}

uint64_t far_hello_changes(struct far_client *c)
{
	far_mutex_lock(&c->lock);
	uint64_t changes = c->changes;
	far_mutex_unlock(&c->lock);
	return changes;
}

int far_hello_flushed(struct far_client *c, const struct far_grpc_flushed *f, uint64_t changes)
{
	far_mutex_lock(&c->lock);
	bool forgotten = c->forgotten || (c->unflushed && c->unflushed != f->instance);
	c->forgotten = false;
	c->unflushed = c->changes == changes ? 0 : f->instance;
	c->heard.instance = f->instance;
	if (f->revision > c->seen.revision)
		c->seen.revision = c->heard.revision = f->revision;
	far_mutex_unlock(&c->lock);
	return forgotten ? -EREMOTEIO : 0;
}

void far_hello_forgotten(struct far_client *c, uint64_t changes)
{
	far_mutex_lock(&c->lock);
	c->instance++;
	if (c->changes == changes)
		c->unflushed = 0; /* said for all of them */
	far_mutex_unlock(&c->lock);
}

uint64_t far_hello_instance(struct far_client *c)
{
	far_mutex_lock(&c->lock);
	uint64_t instance = c->heard.instance;
	far_mutex_unlock(&c->lock);
	return instance;
}

bool far_hello_origin(struct far_client *c, struct far_origin *out)
{
	uint64_t connects, reconnects, lost;

	far_lanes_count(&c->lanes, &connects, &reconnects, &lost);
	far_mutex_lock(&c->lock);
	bool heard = c->has_heard;
	if (heard && c->heard.sessions) {
		memcpy(out->identity, c->heard.identity, sizeof out->identity);
		memcpy(out->writer, c->heard.writer, sizeof out->writer);
		out->epoch = c->heard.epoch;
		out->version = c->heard.revision;
		out->instance = c->heard.instance + c->instance;
		out->change = c->heard.change;
	} else if (heard) {
		/* Each lost connection may mean a new process that has forgotten what was not flushed. */
		out->instance = c->session + c->instance + lost;
	}
	far_mutex_unlock(&c->lock);
	return heard;
}

int far_hello_facts(struct far_client *c, const struct far_grpc_export *e, uint64_t max_io, struct far_facts *f,
		    struct far_error *err)
{
	if (e->size > FAR_SIZE_MAX || e->chunk > FAR_SIZE_MAX || !e->max_request)
		return far_error_set(err, EPROTO, "%s describes its export in a way that makes no sense", c->where);
	f->bytes = e->size;
	f->chunk = e->chunk;
	f->max_io = far_min(e->max_request, max_io);
	if (f->chunk) {
		if (f->chunk > e->max_request)
			return far_error_set(err, EPROTO, "%s takes whole chunks of %" PRIu64 " bytes only but at most %" PRIu64
					     " a request", c->where, e->chunk, e->max_request);
		f->max_io = far_max(f->max_io - f->max_io % f->chunk, f->chunk);
	}
	if (e->read_only)
		f->caps &= ~(uint32_t)FAR_CAP_WRITE;
	if (e->durable)
		f->caps |= FAR_CAP_DURABLE;
	memcpy(f->identity, e->identity, sizeof f->identity);
	memcpy(f->version, e->version, sizeof f->version);
	return 0;
}

/* ---------------------------------------------------------------------------------------------- saying it */

struct hello {
	struct far_call call;
	struct far_channel *channel;
	uint64_t deadline;
	struct far_hello_seen seen; /* when it was asked */
	uint8_t head[FAR_H2_HEAD - FAR_GRPC_PREFIX];
	uint8_t reply[1024];
};

static int hello_call(struct far_client *c, struct hello *h, const char *path, const struct far_pb_out *o)
{
	h->call = (struct far_call){ .path = path, .buf = h->reply, .buf_cap = sizeof h->reply, .tell_deadline = true };
	far_call_request(&h->call, o, NULL, 0);
	return far_channel_call(h->channel, &h->call, h->deadline, c->timeout);
}

/* The sentence for an export that is not there: which ones are. */
static int hello_no_export(struct far_client *c, struct hello *h, struct far_error *err)
{
	static uint8_t none[1];
	char names[300] = "";
	size_t at = 0;
	struct far_pb_out o = { none, 0, 0 };
	struct far_pb_field f;

	int r = hello_call(c, h, FAR_GRPC_REGION "Exports", &o);
	struct far_pb_in in = { h->reply, h->reply + h->call.buf_n };
	while (r == 0 && far_pb_next(&in, &f) > 0) {
		struct far_grpc_export e;
		if (f.num != 1 || f.wire != FAR_PB_BYTES || far_grpc_decode_export(f.data, f.len, &e))
			continue;
		int k = snprintf(names + at, sizeof names - at, "%s%s", at ? ", " : "", e.name);
		if (k < 0 || (size_t)k >= sizeof names - at)
			break;
		at += (size_t)k;
	}
	return far_error_set(err, ENOENT, "%s has no export '%s'; it has: %s", c->where, c->export,
			     names[0] ? names : "(none it tells)");
}

static bool hello_one_byte(const struct hello *h)
{
	struct far_pb_in in = { h->reply, h->reply + h->call.buf_n };
	struct far_pb_field f;
	uint64_t n = 0;
	size_t len = 0;

	while (far_pb_next(&in, &f) > 0) {
		if (f.num == 1 && f.wire == FAR_PB_VARINT)
			n = f.value;
		else if (f.num == 2 && f.wire == FAR_PB_BYTES)
			len = f.len;
	}
	return n == 1 && len == 1;
}

/* The plain service: look at the region's last byte. */
static int hello_plain(struct far_client *c, struct hello *h, struct far_error *err)
{
	struct far_pb_out o = { h->head, 0, sizeof h->head };

	far_mutex_lock(&c->lock);
	bool opened = c->has_facts;
	uint64_t bytes = opened ? c->facts.bytes : c->plain_bytes;
	far_mutex_unlock(&c->lock);
	if (c->export[0] && strcmp(c->export, "default"))
		return far_error_set(err, ENOENT, "%s has no exports by name, so '%s' cannot be chosen; leave the path away",
				     c->where, c->export);
	if (!opened && !c->plain_sized)
		return far_error_set(err, EINVAL, "%s does not tell its size: add ?size=BYTES", c->where);
	if (!bytes)
		return 0;
	far_pb_put_uint(&o, 1, 1);
	far_pb_put_uint(&o, 2, bytes - 1);
	int r = hello_call(c, h, FAR_GRPC_BACKEND "ReadAt", &o);
	if (r == 0 && !hello_one_byte(h))
		r = -EPROTO;
	if (r == 0) {
		hello_judge(c, false, "");
		return 0;
	}
	const char *text = h->call.text;
	if (h->call.grpc_status == FAR_GRPC_UNKNOWN && !strcmp(text, "EOF")) {
		if (opened)
			hello_judge(c, true, "it is shorter than it was");
		return far_error_set(err, opened ? ESTALE : EINVAL, "%s: the remote is shorter than %" PRIu64 " bytes", c->where, bytes);
	}
	if (h->call.grpc_status == FAR_GRPC_UNIMPLEMENTED)
		return far_error_set(err, EPROTO, "%s speaks gRPC, but no service that farpage knows", c->where);
	return far_error_set(err, -r, "cannot read from %s: %s%s%s", c->where, far_strerror(r), text[0] ? ": " : "", text);
}

static int hello_failed(struct far_client *c, struct hello *h, int r, struct far_error *err)
{
	const char *text = h->call.text;

	if (r == -EPROTO)
		return far_error_set(err, EPROTO, "%s does not answer as a gRPC server does; is it another kind of server?",
				     c->where);
	if (r == -ETIMEDOUT)
		return far_error_set(err, ETIMEDOUT, "%s does not answer in time; is it a gRPC server, and is it alive?",
				     c->where);
	const char *next = r == -ECONNREFUSED ? "Is the server running, and is this its port?"
			   : r == -ECONNRESET || r == -EPIPE ? "It hung up: is it a gRPC server, or one that wants TLS?"
			   : "Look at the server's messages";
	return far_error_set(err, -r, "cannot open %s: %s%s%s. %s", c->where, far_strerror(r), text[0] ? ": " : "", text, next);
}

/* The peer that spoke farpage.v1 does not know the method or the export: believed when said twice. */
static int hello_odd(struct far_client *c, const char *why, struct far_error *err)
{
	far_mutex_lock(&c->lock);
	bool believed = ++c->odd >= 2;
	far_mutex_unlock(&c->lock);
	if (believed)
		hello_judge(c, true, why);
	return far_error_set(err, believed ? ESTALE : EBADMSG, "%s is not what it was: %s", c->where, why);
}

/* The first answer of a peer decides which service it speaks. */
static int hello_unimplemented(struct far_client *c, struct hello *h, struct far_error *err)
{
	far_mutex_lock(&c->lock);
	bool region = c->has_facts && (c->facts.identity[0] || c->facts.chunk);
	if (far_client_kind(c) == FAR_CLIENT_UNKNOWN && !region)
		c->heard = (struct far_grpc_export){ .instance = 0 };
	far_mutex_unlock(&c->lock);
	if (far_client_kind(c) == FAR_CLIENT_REGION || region)
		return hello_odd(c, "it does not speak farpage.v1 any more", err);
	/* Asked once more in other words: a flipped bit must not make a peer plain for good. */
	struct far_pb_out o = { h->head, 0, sizeof h->head };
	int r = hello_call(c, h, FAR_GRPC_REGION "Exports", &o);
	if (r == 0 || h->call.grpc_status != FAR_GRPC_UNIMPLEMENTED)
		return hello_failed(c, h, r ? r : -EBADMSG, err);
	r = hello_plain(c, h, err);
	if (r == 0) {
		far_mutex_lock(&c->lock);
		c->has_heard = true;
		far_mutex_unlock(&c->lock);
		atomic_store_explicit(&c->kind, FAR_CLIENT_PLAIN, memory_order_release);
	}
	return r;
}

static int hello_described(struct far_client *c, struct hello *h, uint64_t gen, struct far_error *err)
{
	struct far_grpc_export e;
	int r = far_grpc_decode_export(h->reply, h->call.buf_n, &e);

	/* Who has checksums sends them always. */
	if (r == 0 && !e.checked && (e.sums || far_client_flag(&c->sums)))
		r = -EBADMSG;
	if (r == -EBADMSG)
		atomic_fetch_add_explicit(&c->checksum_errors, 1, memory_order_relaxed);
	if (r)
		return hello_failed(c, h, r, err);
	r = hello_take(c, &e, &h->seen, err);
	if (r)
		return r;
	far_channel_tag(h->channel, e.instance);
	far_mutex_lock(&c->lock);
	c->acked = far_max(c->acked, gen);
	far_mutex_unlock(&c->lock);
	atomic_store_explicit(&c->sums, e.sums && !c->no_sums, memory_order_release);
	atomic_store_explicit(&c->sessions, e.sessions, memory_order_release);
	atomic_store_explicit(&c->kind, FAR_CLIENT_REGION, memory_order_release);
	return 0;
}

int far_hello_greet(void *opaque, struct far_channel *channel, uint64_t deadline, struct far_error *err)
{
	struct far_client *c = opaque;
	struct hello h = { .channel = channel, .deadline = far_min(deadline, far_client_deadline(c)) };
	struct far_grpc_request rq;
	uint64_t gen;
	int r;

	if (far_client_kind(c) == FAR_CLIENT_PLAIN) {
		uint64_t connects, reconnects, lost;
		far_lanes_count(&c->lanes, &connects, &reconnects, &lost);
		return lost ? hello_plain(c, &h, err) : 0;
	}
	for (int i = 0;; i++) {
		struct far_pb_out o = { h.head, 0, sizeof h.head };
		far_mutex_lock(&c->lock);
		gen = c->generation;
		h.seen = c->seen;
		far_mutex_unlock(&c->lock);
		memset(&rq, 0, offsetof(struct far_grpc_request, ranges));
		rq.export = c->export;
		rq.export_n = c->export_n;
		rq.session = c->writable ? c->session : 0;
		rq.generation = c->writable ? gen : 0;
		far_grpc_encode_request(&o, FAR_M_DESCRIBE, &rq);
		r = hello_call(c, &h, FAR_GRPC_REGION "Describe", &o);
		if (r != -ECANCELED || h.call.grpc_status == FAR_CALL_NO_STATUS || i == HELLO_JUMPS)
			break;
		/* The peer has heard of a newer generation: bits of a number may have been flipped. Leave it behind. */
		far_mutex_lock(&c->lock);
		if (c->generation == gen)
			c->generation = 2 * gen + 1;
		far_mutex_unlock(&c->lock);
	}
	if (r == 0)
		return hello_described(c, &h, gen, err);
	if (h.call.grpc_status == FAR_GRPC_UNIMPLEMENTED)
		return hello_unimplemented(c, &h, err);
	if (h.call.grpc_status == FAR_GRPC_NOT_FOUND && far_client_kind(c) == FAR_CLIENT_UNKNOWN)
		return hello_no_export(c, &h, err);
	if (h.call.grpc_status == FAR_GRPC_NOT_FOUND)
		return hello_odd(c, "it has no such export any more", err);
	return hello_failed(c, &h, r, err);
}
