/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What each method does. A request is decoded, checked against its export and carried out; with FAR_NOWAIT it may be
 * left half done and is then begun anew. Every number from the peer is checked before it is added or allocated. */
#include "wire/grpc/session.h"

#include "backend/backend.h"
#include "base/io.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SERVICE_PIECE (256 * FAR_KIB)
#define SERVICE_PIECE_MIN 4096
#define SERVICE_PIECE_MAX (4 * FAR_MIB)
#define SERVICE_EXTENTS 1024
#define SERVICE_SUMS_IN_HEAD 8 /* of so many ranges kinds and sums fit into the reply's head */
#define SERVICE_LEAD 4096      /* of more: so much room before the data, which keeps that aligned */

/* A backend's or owner's error as a status. */
static bool service_error(struct far_request *r, int err, const char *what)
{
	r->errno_name = far_grpc_errno_name(err);
	return far_request_fail(r, far_grpc_status_of(err), "%s: %s", what, far_strerror(err));
}

/* Why a change may not be made. */
static bool service_refused(struct far_request *r, int err)
{
	static const struct {
		int err;
		const char *why;
	} list[] = {
		{ -ESTALE, "another client holds the lease of this export" },
		{ -ECANCELED, "it belongs to an older generation of its session: nothing was done" },
		{ -ENOTCONN, "this server does not know the session: say Describe first" },
		{ -EBADMSG, "the checksum does not fit what arrived: nothing was done" },
	};

	for (size_t i = 0; i < FAR_ARRAY_LEN(list); i++)
		if (list[i].err == err) {
			r->errno_name = far_grpc_errno_name(err);
			return far_request_fail(r, far_grpc_status_of(err), "%s", list[i].why);
		}
	return service_error(r, err, "refused");
}

/* Who asks. False: refused, or with FAR_NOWAIT to be done anew; *done says which. */
static bool service_who(struct far_request *r, unsigned flags, bool *done)
{
	struct far_access *a = r->session->env->access;
	struct far_error err = { .text = "out of memory" };

	*done = true;
	if (!a || r->who || !far_access_wants_token(a))
		return true;
	if (!r->auth) {
		r->errno_name = far_grpc_errno_name(-EACCES);
		return !far_request_fail(r, FAR_GRPC_UNAUTHENTICATED, "a token is needed: metadata 'authorization: Bearer TOKEN'; farpage "
					 "takes it from token-file=");
	}
	int e = far_access_token(a, r->auth, !(flags & FAR_NOWAIT), &r->who, &err);
	*done = e != -EAGAIN;
	if (!e || !*done)
		return !e;
	if (e != -EACCES)
		return !far_request_fail(r, FAR_GRPC_UNAVAILABLE, "the token cannot be looked at now: %s", err.text);
	r->errno_name = far_grpc_errno_name(-EACCES);
	return !far_request_fail(r, FAR_GRPC_UNAUTHENTICATED, "%s", err.text);
}

static enum far_right service_right(struct far_request *r, const struct far_export *e)
{
	return far_server_right(r->session->env, r->who ? r->who : r->session->who, e);
}

/* Whether the caller may do this with the export. */
static bool service_allowed(struct far_request *r, const struct far_export *e)
{
	bool change = r->method == FAR_M_WRITE_AT || r->method == FAR_M_WRITE || r->method == FAR_M_ZERO ||
		      r->method == FAR_M_DISCARD;
	enum far_right right = service_right(r, e);

	if (right == FAR_RIGHT_WRITE || (right == FAR_RIGHT_READ && !change))
		return true;
	r->errno_name = far_grpc_errno_name(-EACCES);
	return !far_request_fail(r, FAR_GRPC_PERMISSION_DENIED, right == FAR_RIGHT_READ ? "you may read export '%s', not change it" :
				 "you may not use export '%s'", e->name);
}

/* Begin a change. False: refused or, with FAR_NOWAIT, to be done anew; then *done says which. */
static bool service_begin(struct far_request *r, const struct far_export *e, uint64_t off, uint64_t len, unsigned flags,
			  bool *done)
{
	int err = 0;

	/* A flipped bit can make a field swallow those behind it, session and checksum among them. */
	if (!r->msg.session && far_grpc_is_region(r->method) && far_session_said(r->session, e->owner))
		err = -EBADMSG;
	if (!err)
		err = far_owner_change_begin(e->owner, r->msg.session, r->msg.generation, flags & FAR_NOWAIT);
	if (!err && (err = far_loans_change_begin(e->loans, off, len, !(flags & FAR_NOWAIT))) != 0)
		far_owner_change_end(e->owner, r->msg.session, r->msg.generation, off, len, false);
	*done = !(err == -EAGAIN && (flags & FAR_NOWAIT));
	if (err && *done)
		service_refused(r, err);
	return err == 0;
}

/* The change's end; `err` is what the backend said. */
static void service_end(struct far_request *r, const struct far_export *e, uint64_t off, uint64_t len, int err)
{
	far_loans_change_end(e->loans);
	far_owner_change_end(e->owner, r->msg.session, r->msg.generation, off, len, err != -EAGAIN);
}

/* The first bytes of a reply: prefix, then what `o` has put behind it, then body_n bytes of the reply's buffer. */
static void service_frame(struct far_reply *reply, const struct far_pb_out *o, size_t body_n)
{
	FAR_ASSERT(o->n <= o->cap);
	far_grpc_prefix(reply->m.head, (uint32_t)(o->n + body_n));
	reply->m.head_n = (uint8_t)(FAR_GRPC_PREFIX + o->n);
	reply->m.body = reply->buf;
	reply->m.body_n = body_n;
}

static struct far_pb_out service_head(struct far_reply *reply)
{
	return (struct far_pb_out){ reply->m.head + FAR_GRPC_PREFIX, 0, sizeof reply->m.head - FAR_GRPC_PREFIX };
}

/* The buffer for the answer; kept from the try without waiting to the one with. */
static struct far_reply *service_reply(struct far_request *r, size_t cap)
{
	if (!r->reply)
		r->reply = far_reply_new(r, cap);
	if (!r->reply)
		far_request_fail(r, FAR_GRPC_UNAVAILABLE, "out of memory");
	return r->reply;
}

/* An empty message, or one with the sum that the request had. */
static bool service_done(struct far_request *r, const uint8_t *sum)
{
	struct far_reply *reply = service_reply(r, 0);

	if (reply) {
		struct far_pb_out o = service_head(reply);
		far_grpc_encode_sum_reply(&o, sum);
		service_frame(reply, &o, 0);
	}
	return true;
}

/* ----------------------------------------------------------------------------------- the plain Backend service */

static bool service_read_at(struct far_request *r, const struct far_export *e, unsigned flags)
{
	const struct far_grpc_request *m = &r->msg;
	uint64_t size = far_size(e->b);

	if (m->length < 0)
		return far_request_fail(r, FAR_GRPC_INVALID_ARGUMENT, "negative length");
	if ((uint64_t)m->length > r->session->env->max_request)
		return far_request_fail(r, FAR_GRPC_UNKNOWN, "max chunk size exceeded");
	if (m->off < 0)
		return far_request_fail(r, FAR_GRPC_UNKNOWN, "negative offset");
	uint64_t off = (uint64_t)m->off;
	size_t len = (size_t)m->length;
	if (off > size || len > size - off)
		return far_request_fail(r, FAR_GRPC_UNKNOWN, "EOF");
	struct far_reply *reply = service_reply(r, len);
	if (!reply)
		return true;
	int err = far_read(e->b, off, reply->buf, len, flags);
	if (err == -EAGAIN && flags)
		return false;
	if (err)
		return service_error(r, err, "read");
	struct far_pb_out o = service_head(reply);
	far_pb_put_uint(&o, 1, len);
	if (len)
		far_pb_put_head(&o, 2, len);
	service_frame(reply, &o, len);
	return true;
}

static bool service_write_at(struct far_request *r, const struct far_export *e, unsigned flags)
{
	const struct far_grpc_request *m = &r->msg;
	uint64_t size = far_size(e->b);

	if (m->off < 0)
		return far_request_fail(r, FAR_GRPC_UNKNOWN, "negative offset");
	if (m->data_n > r->session->env->max_request)
		return far_request_fail(r, FAR_GRPC_UNKNOWN, "max chunk size exceeded");
	if (!(far_facts(e->b)->caps & FAR_CAP_WRITE))
		return far_request_fail(r, FAR_GRPC_PERMISSION_DENIED, "the region is read-only");
	uint64_t off = (uint64_t)m->off;
	if (off > size || m->data_n > size - off)
		return far_request_fail(r, FAR_GRPC_OUT_OF_RANGE, "short write"); /* a region never grows */
	bool done;
	if (!service_begin(r, e, off, m->data_n, flags, &done))
		return done;
	int err = far_write(e->b, off, m->data, m->data_n, flags);
	service_end(r, e, off, m->data_n, err);
	if (err == -EAGAIN && flags)
		return false;
	if (err)
		return service_error(r, err, "write");
	struct far_reply *reply = service_reply(r, 0);
	if (reply) {
		struct far_pb_out o = service_head(reply);
		far_pb_put_uint(&o, 1, m->data_n);
		service_frame(reply, &o, 0);
	}
	return true;
}

static bool service_flush(struct far_request *r, const struct far_export *e, unsigned flags)
{
	struct far_origin now;

	if (flags & FAR_NOWAIT)
		return false;
	int err = far_owner_flush(e->owner, &now);
	if (err)
		return service_error(r, err, "flush");
	if (r->method == FAR_M_SYNC)
		return service_done(r, NULL);
	struct far_reply *reply = service_reply(r, 0);
	if (reply) {
		struct far_grpc_flushed f = { .instance = now.instance, .revision = now.version };
		struct far_pb_out o = service_head(reply);
		far_grpc_encode_flushed(&o, &f);
		service_frame(reply, &o, 0);
	}
	return true;
}

/* ------------------------------------------------------------------------------------------ farpage.v1: facts */

/* `now`: what the owner says; NULL: to be asked. */
static void service_describe(struct far_request *r, const struct far_export *e, const struct far_origin *now,
			     struct far_grpc_export *x)
{
	const struct far_facts *f = far_facts(e->b);
	struct far_origin own;

	if (!now) {
		far_owner_origin(e->owner, &own);
		now = &own;
	}

	memset(x, 0, sizeof *x);
	memcpy(x->name, e->name, far_min(strlen(e->name), sizeof x->name - 1));
	x->size = f->bytes;
	x->chunk = f->chunk;
	x->max_request = r->session->env->max_request;
	x->read_only = !(f->caps & FAR_CAP_WRITE) || service_right(r, e) != FAR_RIGHT_WRITE;
	x->durable = (f->caps & FAR_CAP_DURABLE) != 0;
	memcpy(x->identity, now->identity, sizeof x->identity - 1);
	if (now->version)
		snprintf(x->version, sizeof x->version, "%" PRIu64 ".%" PRIu64, now->epoch, now->version);
	else
		memcpy(x->version, f->version, sizeof x->version - 1);
	memcpy(x->writer, now->writer, sizeof x->writer - 1);
	x->instance = now->instance;
	x->epoch = now->epoch;
	x->revision = now->version;
	x->change = now->change;
	x->sums = x->sessions = true;
}

static bool service_describe_one(struct far_request *r, const struct far_export *e, unsigned flags)
{
	struct far_grpc_export x;

	/* Changes of an older generation may have to be waited for. */
	if (r->msg.session && (flags & FAR_NOWAIT))
		return false;
	int err = far_owner_session(e->owner, r->msg.session, r->msg.generation);
	if (err)
		return service_refused(r, err);
	if (r->msg.session)
		far_session_hello(r->session, e->owner, r->msg.session);
	struct far_reply *reply = service_reply(r, 1024);
	if (!reply)
		return true;
	service_describe(r, e, NULL, &x);
	struct far_pb_out body = { reply->buf, 0, reply->cap }, o = service_head(reply);
	far_grpc_encode_export(&body, &x);
	far_grpc_put_check(&body);
	FAR_ASSERT(body.n <= body.cap);
	service_frame(reply, &o, body.n);
	return true;
}

static bool service_exports(struct far_request *r)
{
	const struct far_server_env *env = r->session->env;
	size_t each = 512; /* two texts of 63, a name of 127, numbers */
	struct far_reply *reply = service_reply(r, env->exports_n * each + 16);

	if (!reply)
		return true;
	struct far_pb_out body = { reply->buf, 0, reply->cap }, o = service_head(reply);
	for (size_t i = 0; i < env->exports_n; i++) {
		uint8_t one[512];
		struct far_pb_out x = { one, 0, sizeof one };
		struct far_grpc_export e;
		if (service_right(r, &env->exports[i]) == FAR_RIGHT_NONE)
			continue;
		service_describe(r, &env->exports[i], NULL, &e);
		far_grpc_encode_export(&x, &e);
		far_pb_put_bytes(&body, 1, one, x.n);
	}
	service_frame(reply, &o, body.n);
	return true;
}

/* ------------------------------------------------------------------------------------------- farpage.v1: data */

/* The ranges are inside the region; *total, if wanted, is at most max_request. */
static bool service_ranges(struct far_request *r, const struct far_export *e, uint64_t *total)
{
	uint64_t size = far_size(e->b), sum = 0;

	for (unsigned i = 0; i < r->msg.ranges_n; i++) {
		const struct far_grpc_range *x = &r->msg.ranges[i];
		if (x->off > size || x->len > size - x->off)
			return !far_request_fail(r, FAR_GRPC_OUT_OF_RANGE, "a range lies outside the region of %" PRIu64 " bytes",
						 size);
		if (total && x->len > r->session->env->max_request - sum)
			return !far_request_fail(r, FAR_GRPC_RESOURCE_EXHAUSTED, "more than max_request bytes (%" PRIu64 ")",
						 r->session->env->max_request);
		if (total)
			sum += x->len;
	}
	if (total)
		*total = sum;
	return true;
}

/* The reply's message before the data: kinds, sums, the data's head. Short it goes into the head, else right before the
 * data into the buffer, where `lead` bytes were left free. */
static void service_read_frame(struct far_request *r, struct far_reply *reply, size_t lead, const uint8_t *kinds,
			       const uint8_t *sums, size_t data_n)
{
	uint8_t bytes[FAR_GRPC_MAX_RANGES * (FAR_GRPC_SUM + 1) + 32];
	struct far_pb_out o = service_head(reply), pre = { bytes, 0, sizeof bytes }, *to = lead ? &pre : &o;
	size_t n = r->msg.ranges_n;

	if (kinds)
		far_pb_put_bytes(to, 1, kinds, n); /* packed; each is a varint of one byte */
	if (sums)
		far_pb_put_bytes(to, 3, sums, n * FAR_GRPC_SUM);
	if (data_n)
		far_pb_put_head(to, 2, data_n);
	FAR_ASSERT(pre.n <= pre.cap && pre.n <= lead);
	if (pre.n)
		memcpy((uint8_t *)reply->buf + lead - pre.n, bytes, pre.n);
	service_frame(reply, &o, pre.n + data_n);
	reply->m.body = (uint8_t *)reply->buf + lead - pre.n;
}

/* A long range straight from the store's pages. False: it is copied. A peer that does not want to hear of zeros asks again
 * for what did not fit its sum. */
static bool service_read_lent(struct far_request *r, const struct far_export *e)
{
	const struct far_grpc_request *m = &r->msg;
	uint64_t off = m->ranges[0].off;
	size_t len = (size_t)m->ranges[0].len;
	uint8_t sum[FAR_GRPC_SUM];

	if (!m->zeros)
		far_loans_doubt(e->loans);
	if (m->ranges_n != 1 || r->reply || atomic_load_explicit(&r->session->stuck, memory_order_relaxed))
		return false;
	struct far_reply *reply = e->loans ? far_reply_new(r, 0) : NULL;
	const void *p = reply ? far_loan_take(e->loans, off, len, &reply->loan) : NULL;
	if (!p || far_is_zero(p, len)) {
		far_reply_free(reply);
		return false;
	}
	reply->cap = len;
	r->reply = reply;
	if (m->sums)
		far_grpc_sum_cold(sum, m->export, m->export_n, off, p, len);
	service_read_frame(r, reply, 0, NULL, m->sums ? sum : NULL, len);
	reply->m.body = p;
	return true;
}

static bool service_read(struct far_request *r, const struct far_export *e, unsigned flags)
{
	const struct far_grpc_request *m = &r->msg;
	uint8_t kinds[FAR_GRPC_MAX_RANGES], sums[FAR_GRPC_MAX_RANGES * FAR_GRPC_SUM];
	uint64_t total = 0;
	size_t at = m->sums && m->ranges_n > SERVICE_SUMS_IN_HEAD ? SERVICE_LEAD : 0, lead = at;
	bool any = false;

	if (!m->bulk)
		atomic_store_explicit(&r->session->demand, true, memory_order_relaxed);
	if (!service_ranges(r, e, &total) || service_read_lent(r, e))
		return true;
	struct far_reply *reply = service_reply(r, (size_t)total + lead);
	if (!reply)
		return true;
	for (unsigned i = 0; i < m->ranges_n; i++) {
		uint8_t *p = (uint8_t *)reply->buf + at;
		uint64_t off = m->ranges[i].off;
		size_t len = (size_t)m->ranges[i].len;
		int err = far_read(e->b, off, p, len, flags | (m->bulk ? FAR_BULK : 0));
		if (err == -EAGAIN && (flags & FAR_NOWAIT))
			return false;
		if (err)
			return service_error(r, err, "read");
		kinds[i] = m->zeros && len && far_is_zero(p, len);
		any |= kinds[i];
		if (m->sums && kinds[i])
			far_grpc_sum_span(sums + i * FAR_GRPC_SUM, m->export, m->export_n, off, len);
		else if (m->sums)
			far_grpc_sum_data(sums + i * FAR_GRPC_SUM, m->export, m->export_n, off, p, len);
		if (!kinds[i])
			at += len;
	}
	service_read_frame(r, reply, lead, any ? kinds : NULL, m->sums ? sums : NULL, at - lead);
	return true;
}

static bool service_pull(struct far_request *r, const struct far_export *e, unsigned flags)
{
	const struct far_grpc_request *m = &r->msg;
	uint64_t max = far_min(SERVICE_PIECE_MAX, r->session->env->max_request);
	uint64_t piece = far_min(far_max(m->piece ? m->piece : SERVICE_PIECE, far_min(SERVICE_PIECE_MIN, max)), max);

	if (!r->answered && !service_ranges(r, e, NULL))
		return true;
	while (r->range < m->ranges_n && r->range_at == m->ranges[r->range].len) {
		r->range++;
		r->range_at = 0;
	}
	if (r->range == m->ranges_n) {
		r->last = true;
		return true;
	}
	const struct far_grpc_range *x = &m->ranges[r->range];
	uint64_t off = x->off + r->range_at;
	size_t len = (size_t)far_min(piece, x->len - r->range_at);
	struct far_reply *reply = service_reply(r, len);
	if (!reply)
		return true;
	int err = far_read(e->b, off, reply->buf, len, flags | FAR_BULK);
	if (err == -EAGAIN && (flags & FAR_NOWAIT))
		return false;
	if (err)
		return service_error(r, err, "read");
	bool zero = m->zeros && far_is_zero(reply->buf, len);
	struct far_pb_out o = service_head(reply);
	far_pb_put_uint(&o, 1, off);
	far_pb_put_uint(&o, 2, len);
	far_pb_put_uint(&o, 3, zero);
	if (!zero)
		far_pb_put_head(&o, 4, len);
	service_frame(reply, &o, zero ? 0 : len);
	r->range_at += len;
	r->last = r->range + 1 == m->ranges_n && r->range_at == x->len;
	return true;
}

/* The flush in a write is answered for, too: a flipped bit could have taken it out of the request. */
static bool service_written(struct far_request *r, const struct far_origin *now)
{
	struct far_grpc_written w = { .sum = r->msg.sum, .flushed = true, .instance = now->instance, .revision = now->version };
	struct far_reply *reply = service_reply(r, 0);

	if (reply) {
		struct far_pb_out o = service_head(reply);
		far_grpc_encode_written(&o, &w);
		service_frame(reply, &o, 0);
	}
	return true;
}

/* The checksum of a change, if it has one, before anything is done. False: it does not fit, refused. */
static bool service_verify(struct far_request *r)
{
	const struct far_grpc_request *m = &r->msg;
	uint8_t sum[FAR_GRPC_SUM];

	if (!m->sum || r->verified)
		return true;
	if (r->method == FAR_M_WRITE)
		far_grpc_sum_data(sum, m->export, m->export_n, (uint64_t)m->off, m->data, m->data_n);
	else
		far_grpc_sum_span(sum, m->export, m->export_n, (uint64_t)m->off, m->len);
	r->verified = !memcmp(sum, m->sum, sizeof sum);
	return r->verified || !service_refused(r, -EBADMSG);
}

static bool service_write(struct far_request *r, const struct far_export *e, unsigned flags)
{
	const struct far_grpc_request *m = &r->msg;
	uint64_t off = (uint64_t)m->off, size = far_size(e->b);

	if (m->data_n > r->session->env->max_request)
		return far_request_fail(r, FAR_GRPC_RESOURCE_EXHAUSTED, "more than max_request bytes (%" PRIu64 ")",
					r->session->env->max_request);
	if (!(far_facts(e->b)->caps & FAR_CAP_WRITE))
		return service_error(r, -EROFS, "write");
	if (off > size || m->data_n > size - off)
		return far_request_fail(r, FAR_GRPC_OUT_OF_RANGE, "the write ends outside the region of %" PRIu64 " bytes", size);
	if (m->flush && (flags & FAR_NOWAIT))
		return false;
	if (!service_verify(r))
		return true;
	bool done;
	if (!service_begin(r, e, off, m->data_n, flags, &done))
		return done;
	int err = far_write(e->b, off, m->data, m->data_n, flags | (m->bulk ? FAR_BULK : 0));
	service_end(r, e, off, m->data_n, err);
	if (err == -EAGAIN && (flags & FAR_NOWAIT))
		return false;
	struct far_origin now;
	if (err == 0 && m->flush)
		err = far_owner_flush(e->owner, &now);
	if (err)
		return service_error(r, err, "write");
	return m->flush ? service_written(r, &now) : service_done(r, m->sum);
}

static bool service_span(struct far_request *r, const struct far_export *e, unsigned flags)
{
	const struct far_grpc_request *m = &r->msg;
	uint64_t off = (uint64_t)m->off, size = far_size(e->b);
	unsigned f = flags | (m->bulk ? FAR_BULK : 0);

	if (!(far_facts(e->b)->caps & FAR_CAP_WRITE))
		return service_error(r, -EROFS, "write");
	if (off > size || m->len > size - off)
		return far_request_fail(r, FAR_GRPC_OUT_OF_RANGE, "the range lies outside the region of %" PRIu64 " bytes", size);
	if (!service_verify(r))
		return true;
	bool done;
	if (!service_begin(r, e, off, m->len, flags, &done))
		return done;
	int err = r->method == FAR_M_ZERO ? far_zero(e->b, off, m->len, f) : far_discard(e->b, off, m->len, f);
	service_end(r, e, off, m->len, err);
	if (err == -EAGAIN && (flags & FAR_NOWAIT))
		return false;
	return err ? service_error(r, err, r->method == FAR_M_ZERO ? "zero" : "discard") : service_done(r, m->sum);
}

static bool service_extents(struct far_request *r, const struct far_export *e, unsigned flags)
{
	const struct far_grpc_request *m = &r->msg;
	uint64_t off = (uint64_t)m->off, size = far_size(e->b);
	size_t max = m->max ? (size_t)far_min(m->max, SERVICE_EXTENTS) : SERVICE_EXTENTS, n = 0;

	if (off > size || m->len > size - off)
		return far_request_fail(r, FAR_GRPC_OUT_OF_RANGE, "the range lies outside the region of %" PRIu64 " bytes", size);
	if ((flags & FAR_NOWAIT) && (far_facts(e->b)->caps & FAR_CAP_REMOTE))
		return false;
	struct far_reply *reply = service_reply(r, max * 40 + 32);
	struct far_extent *list = malloc(max * sizeof *list);
	if (!reply || !list) {
		free(list);
		return far_request_fail(r, FAR_GRPC_UNAVAILABLE, "out of memory");
	}
	int err = m->len ? far_extents(e->b, off, m->len, list, max, &n) : 0;
	struct far_pb_out body = { reply->buf, 0, reply->cap }, o = service_head(reply);
	for (size_t i = 0; !err && i < n; i++)
		far_grpc_encode_extent(&body, &list[i]);
	free(list);
	if (err)
		return service_error(r, err, "extents");
	far_grpc_put_check(&body);
	FAR_ASSERT(body.n <= body.cap);
	service_frame(reply, &o, body.n);
	return true;
}

/* ------------------------------------------------------------------------------------- farpage.v1: lease, watch */

/* A text of a request as a string; false: longer than cap or with a zero byte in it. */
static bool service_text(char *out, size_t cap, const char *p, size_t n)
{
	if (n >= cap || (n && memchr(p, 0, n)))
		return false;
	if (n)
		memcpy(out, p, n);
	out[n] = 0;
	return true;
}

static bool service_lease(struct far_request *r, const struct far_export *e, unsigned flags)
{
	const struct far_grpc_request *m = &r->msg;
	struct far_lease l = FAR_LEASE_INIT;
	char writer[sizeof l.origin.writer], holder[sizeof l.other];

	if (flags & FAR_NOWAIT)
		return false;
	if (!service_text(writer, sizeof writer, m->writer, m->writer_n) ||
	    !service_text(holder, sizeof holder, m->holder, m->holder_n))
		return far_request_fail(r, FAR_GRPC_INVALID_ARGUMENT, "the writer has 1 to 39 characters, the holder up to 127");
	l.writer = writer;
	l.holder = holder;
	l.epoch = m->epoch;
	l.version = m->revision;
	l.take_over = m->take_over;
	l.release = m->release;
	int err = service_right(r, e) == FAR_RIGHT_WRITE ? far_owner_lease(e->owner, m->session, m->generation, &l) : -EROFS;
	struct far_grpc_lease out = { .ttl_ms = l.ttl_ms, .left_ms = l.left_ms, .gone = l.gone };
	if (err == -EBUSY)
		out.answer = FAR_GRPC_BUSY;
	else if (err == -ESTALE)
		out.answer = FAR_GRPC_STALE;
	else if (err == -EROFS)
		out.answer = FAR_GRPC_READ_ONLY;
	else if (err)
		return service_refused(r, err);
	struct far_reply *reply = service_reply(r, FAR_GRPC_LEASE_MAX);
	if (!reply)
		return true;
	memcpy(out.other, l.other, sizeof out.other);
	service_describe(r, e, &l.origin, &out.export);
	struct far_pb_out body = { reply->buf, 0, reply->cap }, o = service_head(reply);
	far_grpc_encode_lease(&body, &out);
	FAR_ASSERT(body.n <= body.cap);
	service_frame(reply, &o, body.n);
	return true;
}

static bool service_watch(struct far_request *r, const struct far_export *e)
{
	const struct far_grpc_request *m = &r->msg;
	size_t max = m->max ? (size_t)far_min(m->max, SERVICE_EXTENTS) : SERVICE_EXTENTS, n = 0;
	struct far_reply *reply = service_reply(r, FAR_GRPC_WATCH_MAX(max));
	struct far_extent *list = malloc(max * sizeof *list);
	struct far_grpc_watch out = { .all = false };
	struct far_origin now;

	if (!reply || !list) {
		free(list);
		return far_request_fail(r, FAR_GRPC_UNAVAILABLE, "out of memory");
	}
	int err = far_owner_watch(e->owner, m->instance, m->since, list, max, &n, &out.all, &now);
	if (err == 0) {
		service_describe(r, e, &now, &out.export);
		struct far_pb_out body = { reply->buf, 0, reply->cap }, o = service_head(reply);
		far_grpc_encode_watch(&body, &out, list, n);
		FAR_ASSERT(body.n <= body.cap);
		service_frame(reply, &o, body.n);
	}
	free(list);
	return err ? service_error(r, err, "watch") : true;
}

/* ---------------------------------------------------------------------------------------------------- dispatch */

static bool service_export(struct far_request *r, const struct far_export **e)
{
	const char *name = r->msg.export;
	size_t n = r->msg.export_n;

	if (!n && r->has_export) {
		name = r->export;
		n = strlen(r->export);
	}
	*e = far_server_find(r->session->env, name, n);
	if (!*e)
		return !far_request_fail(r, FAR_GRPC_NOT_FOUND, "no export '%.*s'", (int)far_min(n, 100), name);
	return true;
}

static bool service_run(struct far_request *r, unsigned flags)
{
	const struct far_export *e;
	bool done;

	if (!service_who(r, flags, &done))
		return done;
	if (!r->decoded) {
		int err = far_grpc_decode_request(r->method, r->body, r->body_n, &r->msg);
		if (err == -E2BIG)
			return far_request_fail(r, FAR_GRPC_INVALID_ARGUMENT, "more than %d ranges", FAR_GRPC_MAX_RANGES);
		if (err == -EBADMSG)
			return service_refused(r, err);
		if (err)
			return far_request_fail(r, FAR_GRPC_INVALID_ARGUMENT, "the message cannot be decoded");
		/* A Pull outlives its message: nothing but the name points into it, which is copied. */
		if (r->method == FAR_M_PULL && r->msg.export_n && r->msg.export_n < sizeof r->export) {
			memcpy(r->export, r->msg.export, r->msg.export_n);
			r->export[r->msg.export_n] = 0;
			r->has_export = true;
			r->msg.export_n = 0;
		}
		r->decoded = true;
	}
	if (r->method == FAR_M_EXPORTS)
		return service_exports(r);
	if (!service_export(r, &e) || !service_allowed(r, e))
		return true;
	switch (r->method) {
	case FAR_M_READ_AT:
		return service_read_at(r, e, flags);
	case FAR_M_WRITE_AT:
		return service_write_at(r, e, flags);
	case FAR_M_SYNC:
	case FAR_M_FLUSH:
		return service_flush(r, e, flags);
	case FAR_M_DESCRIBE:
		return service_describe_one(r, e, flags);
	case FAR_M_READ:
		return service_read(r, e, flags);
	case FAR_M_PULL:
		return service_pull(r, e, flags);
	case FAR_M_WRITE:
		return service_write(r, e, flags);
	case FAR_M_ZERO:
	case FAR_M_DISCARD:
		return service_span(r, e, flags);
	case FAR_M_EXTENTS:
		return service_extents(r, e, flags);
	case FAR_M_LEASE:
		return service_lease(r, e, flags);
	case FAR_M_WATCH:
		return service_watch(r, e);
	default:
		return far_request_fail(r, FAR_GRPC_UNIMPLEMENTED, "unknown method");
	}
}

bool far_request_run(struct far_request *r, unsigned flags)
{
	if (r->deadline != FAR_NEVER && far_now() >= r->deadline)
		return far_request_fail(r, FAR_GRPC_DEADLINE_EXCEEDED, "the deadline passed");
	uint64_t old = far_deadline_limit(r->deadline);
	bool done = service_run(r, flags);
	far_deadline_restore(old);
	return done;
}
