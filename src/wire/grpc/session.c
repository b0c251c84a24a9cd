/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A request's life; the function at each arrow:
 *
 *     (begin) -> reading -> queued -> running -> answered -> (freed)
 *                   |          |         |           |
 *      session_begin|   session_end  far_session_next far_session_finish     the last reference goes: session_unref
 *                   |          |         |
 *                   +--refused-+---------+---- session_refuse: the answer is known before the request is whole, or it is
 *                                              not run at all
 *     a Pull goes round: running -> answered (a piece) -> queued again when few pieces are on their way (session_sent)
 *
 * Invariants:
 *  1. `refs` counts the stream (until session_closed), the run (from next to finish), every reply on its way, and whoever
 *     is reading from the socket into the body.
 *  2. A request is in the queue only while its stream is open; closing takes it out.
 *  3. Bytes held for the peer (bodies as far as they were touched, replies until they are written) stand in `held` here and
 *     in the server's `memory`; each is given back where it was taken: session_body_free, far_reply_free.
 */
#include "wire/grpc/session.h"

#include "backend/backend.h"
#include "base/pool.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SESSION_REQUESTS (2 * FAR_H2_MAX_STREAMS)
#define SESSION_SMALL_MESSAGE 16384 /* longest message of a method that carries no data */
#define SESSION_HELD (64 * FAR_MIB) /* a peer that does not take its replies gets no more of them */
#define SESSION_PIECES 2
#define SESSION_TOUCH (2 * FAR_MIB)  /* the first byte of a body may cost a whole huge page */
#define SESSION_RESETS 1000         /* requests that did not come to their end, at once; */
#define SESSION_RESETS_PER_S 100    /* and so many a second */

static struct far_session *session_of(struct far_h2 *h)
{
	return far_container_of(h, struct far_session, h2);
}

static struct far_request *session_request_of(struct far_h2_stream *s)
{
	return far_container_of(s, struct far_request, s);
}

/* ------------------------------------------------------------------------------------------ memory, replies */

static void session_hold(struct far_session *s, int64_t n)
{
	s->held += (uint64_t)n;
	atomic_fetch_add_explicit(&s->env->memory, (uint64_t)n, memory_order_relaxed);
}

static bool session_crowded(const struct far_session *s)
{
	return atomic_load_explicit(&s->env->memory, memory_order_relaxed) > s->env->memory_max;
}

static void session_body_free(struct far_request *r)
{
	if (r->body_cap) {
		far_buf_put(r->body, r->body_cap);
		session_hold(r->session, -(int64_t)r->body_held);
	}
	r->body = r->small;
	r->body_cap = r->body_n = r->body_held = 0;
}

static void session_unref(struct far_request *r)
{
	struct far_session *s = r->session;

	FAR_ASSERT(r->refs);
	if (--r->refs)
		return;
	session_body_free(r);
	far_caller_put(r->who);
	free(r->auth);
	*r->all_prev = r->all_next;
	if (r->all_next)
		r->all_next->all_prev = r->all_prev;
	s->requests--;
	free(r);
}

static void session_enqueue(struct far_session *s, struct far_request *r)
{
	r->next = NULL;
	r->queued = true;
	*s->queue_end = r;
	s->queue_end = &r->next;
}

static void session_dequeue(struct far_session *s, struct far_request *r)
{
	struct far_request **at = &s->queue;

	while (*at != r)
		at = &(*at)->next;
	*at = r->next;
	if (!r->next)
		s->queue_end = at;
	r->queued = false;
}

/* A reply was written, or never will be. */
static void session_sent(struct far_h2_msg *m)
{
	struct far_reply *reply = far_container_of(m, struct far_reply, m);
	struct far_request *r = reply->request;
	struct far_session *s = r->session;

	session_hold(s, -(int64_t)reply->cap);
	s->replies -= reply->cap;
	far_reply_free(reply);
	if (r->streaming) {
		r->pieces--;
		if (!r->gone && !r->last && !r->queued && !r->running)
			session_enqueue(s, r);
	}
	session_unref(r);
}

struct far_reply *far_reply_new(struct far_request *r, size_t cap)
{
	struct far_reply *reply = malloc(sizeof *reply);

	if (!reply)
		return NULL;
	*reply = (struct far_reply){ .request = r, .cap = cap, .m = { .release = session_sent } };
	if (cap && !(reply->buf = far_buf_get(cap))) {
		free(reply);
		return NULL;
	}
	return reply;
}

void far_reply_free(struct far_reply *reply)
{
	if (!reply)
		return;
	far_loan_return(&reply->loan);
	far_buf_put(reply->buf, reply->cap);
	free(reply);
}

/* -------------------------------------------------------------------------------------------------- answers */

bool far_request_fail(struct far_request *r, enum far_grpc_status status, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(r->text, sizeof r->text, fmt, ap);
	va_end(ap);
	r->status = status;
	far_reply_free(r->reply);
	r->reply = NULL;
	return true;
}

/* The status' headers; the text lies in `text` until nghttp2 has copied it. */
static size_t session_status(struct far_request *r, nghttp2_nv *nv, char *number, char *text, size_t text_cap)
{
	nghttp2_nv status = FAR_H2_NV("grpc-status", ""), message = FAR_H2_NV("grpc-message", "");
	nghttp2_nv name = FAR_H2_NV("farpage-errno", "");
	size_t n = 0;

	status.value = (uint8_t *)number;
	status.valuelen = (size_t)sprintf(number, "%d", (int)r->status);
	status.flags = message.flags = NGHTTP2_NV_FLAG_NO_COPY_NAME;
	message.value = (uint8_t *)text;
	message.valuelen = far_grpc_percent_encode(text, text_cap, r->text);
	nv[n++] = status;
	nv[n++] = message;
	if (r->errno_name && r->status) {
		name.value = (uint8_t *)r->errno_name;
		name.valuelen = strlen(r->errno_name);
		nv[n++] = name;
	}
	return n;
}

/* An answer without a message: headers only. */
static void session_respond_status(struct far_session *s, struct far_request *r)
{
	nghttp2_nv nv[6] = { FAR_H2_NV(":status", "200"), FAR_H2_NV("content-type", "application/grpc") };
	char number[16], text[3 * sizeof r->text];

	size_t n = 2 + session_status(r, nv + 2, number, text, sizeof text);
	r->answered = true;
	far_h2_respond(&s->h2, &r->s, nv, n, false);
}

static void session_respond_http(struct far_session *s, struct far_request *r, const char *status)
{
	nghttp2_nv nv = FAR_H2_NV(":status", "000");

	nv.value = (uint8_t *)status;
	r->answered = true;
	far_h2_respond(&s->h2, &r->s, &nv, 1, false);
}

/* Answer a request that is not whole. What still comes of it is thrown away; the peer is told to stop. */
static void session_refuse(struct far_session *s, struct far_request *r, enum far_grpc_status status, const char *text)
{
	far_request_fail(r, status, "%s", text);
	session_body_free(r);
	r->s.early = true;
	session_respond_status(s, r);
}

static void session_body_out(struct far_h2 *h, struct far_h2_stream *st)
{
	struct far_request *r = session_request_of(st);
	nghttp2_nv nv[4];
	char number[16], text[3 * sizeof r->text];

	size_t n = session_status(r, nv, number, text, sizeof text);
	far_h2_trailers(h, st, nv, n);
}

void far_session_finish(struct far_session *s, struct far_request *r)
{
	static const nghttp2_nv nv[] = { FAR_H2_NV(":status", "200"), FAR_H2_NV("content-type", "application/grpc") };
	struct far_reply *reply = r->reply;
	bool first = !r->answered;

	r->reply = NULL;
	r->running = false;
	s->running--;
	if (r->auth && r->who) {
		free(s->token);
		far_caller_put(s->token_who);
		s->token = r->auth;
		s->token_who = far_caller_get(r->who);
		r->auth = NULL;
	}
	session_body_free(r);
	if (r->gone) {
		far_reply_free(reply);
		session_unref(r);
		return;
	}
	if (r->method == FAR_M_PULL && (reply || r->answered)) {
		r->streaming = true;
		r->last = r->last || r->status != FAR_GRPC_OK;
		r->s.more = !r->last;
	}
	if (reply) {
		session_hold(s, (int64_t)reply->cap);
		s->replies += reply->cap;
		r->refs++;
		r->pieces += r->streaming;
		far_h2_queue(&s->h2, &r->s, &reply->m);
	}
	r->answered = true;
	if (first && reply)
		far_h2_respond(&s->h2, &r->s, nv, 2, true);
	else if (first)
		session_respond_status(s, r);
	else if (r->last)
		far_h2_resume(&s->h2, &r->s);
	if (r->streaming && !r->last && r->pieces < SESSION_PIECES)
		session_enqueue(s, r);
	session_unref(r);
}

/* ------------------------------------------------------------------------------------- requests as they come */

static struct far_h2_stream *session_begin(struct far_h2 *h, int32_t id)
{
	struct far_session *s = session_of(h);

	if (s->requests >= SESSION_REQUESTS)
		return NULL;
	struct far_request *r = malloc(sizeof *r);
	if (!r)
		return NULL;
	memset(r, 0, offsetof(struct far_request, small));
	memset(&r->status, 0, offsetof(struct far_request, msg) - offsetof(struct far_request, status));
	r->s.id = id;
	r->session = s;
	r->refs = 1;
	r->method = FAR_M_NONE;
	r->deadline = FAR_NEVER;
	r->body = r->small;
	r->all_next = s->all;
	r->all_prev = &s->all;
	if (s->all)
		s->all->all_prev = &r->all_next;
	s->all = r;
	s->requests++;
	s->open++;
	return &r->s;
}

/* Credentials: those of the last call are known already. What does not fit is found missing later. */
static void session_auth(struct far_request *r, const char *value, size_t n)
{
	struct far_session *s = r->session;

	if (s->token && strlen(s->token) == n && !memcmp(s->token, value, n) && far_caller_holds(s->token_who, s->env->access))
		r->who = far_caller_get(s->token_who);
	else if (!memchr(value, 0, n))
		r->auth = strndup(value, n);
}

static void session_header(struct far_h2 *h, struct far_h2_stream *st, const char *name, size_t name_n, const char *value,
			   size_t value_n)
{
	struct far_request *r = session_request_of(st);
	uint64_t ns;
#define IS(text) (name_n == sizeof(text) - 1 && !memcmp(name, text, sizeof(text) - 1))

	r->header_bytes += name_n + value_n + 32;
	if (r->answered || r->header_bytes > FAR_H2_HEADERS)
		return;
	if (IS(":path")) {
		r->method = far_grpc_method_of(value, value_n);
		if (far_grpc_is_region(r->method) && r->session->env->plain)
			r->method = FAR_M_NONE;
		if (r->method == FAR_M_NONE) /* for the message of the refusal */
			snprintf(r->text, sizeof r->text, "%.*s", (int)far_min(value_n, 120), value);
		r->has_path = true;
	} else if (IS(":method")) {
		r->post = value_n == 4 && !memcmp(value, "POST", 4);
	} else if (IS("content-type")) {
		r->grpc = value_n >= 16 && !memcmp(value, "application/grpc", 16) &&
			  (value_n == 16 || value[16] == '+' || value[16] == ';');
	} else if (IS("grpc-timeout")) {
		if (far_grpc_timeout(value, value_n, &ns) == 0)
			r->deadline = far_now() + ns;
	} else if (IS("authorization") && r->session->env->access && !r->auth && !r->who) {
		session_auth(r, value, value_n);
	} else if (IS("farpage-export")) {
		r->has_export = value_n < sizeof r->export;
		snprintf(r->export, sizeof r->export, "%.*s", (int)far_min(value_n, sizeof r->export - 1), value);
	}
#undef IS
}

static void session_headers_end(struct far_h2 *h, struct far_h2_stream *st)
{
	struct far_session *s = session_of(h);
	struct far_request *r = session_request_of(st);
	char path[sizeof r->text + 20];

	if (r->answered)
		return;
	if (!r->post || !r->grpc) {
		r->s.early = true;
		session_respond_http(s, r, r->post ? "415" : "405");
	} else if (r->header_bytes > FAR_H2_HEADERS) {
		session_refuse(s, r, FAR_GRPC_RESOURCE_EXHAUSTED, "too many headers");
	} else if (r->method == FAR_M_NONE) {
		snprintf(path, sizeof path, "unknown method %s", r->text);
		session_refuse(s, r, FAR_GRPC_UNIMPLEMENTED, path);
	} else {
		r->text[0] = 0;
	}
}

/* The prefix of a message is in. False: refused. */
static bool session_prefix(struct far_session *s, struct far_request *r)
{
	bool data = r->method == FAR_M_WRITE || r->method == FAR_M_WRITE_AT;
	uint64_t limit = data ? s->env->max_request + 512 : SESSION_SMALL_MESSAGE;
	uint32_t len = r->s.in.len;

	if (r->whole) {
		session_refuse(s, r, FAR_GRPC_INVALID_ARGUMENT, "more than one message in a request");
		return false;
	}
	if (len > limit) {
		char text[96];
		snprintf(text, sizeof text, "received message larger than max (%" PRIu32 " vs. %" PRIu64 ")", len, limit);
		session_refuse(s, r, FAR_GRPC_RESOURCE_EXHAUSTED, text);
		return false;
	}
	r->body = r->small;
	if (len > sizeof r->small) {
		r->body = far_buf_get(len);
		if (!r->body) {
			r->body = r->small;
			session_refuse(s, r, FAR_GRPC_UNAVAILABLE, "out of memory");
			return false;
		}
		r->body_cap = len;
	}
	return true;
}

static bool session_body(struct far_session *s, struct far_request *r, const uint8_t *data, size_t n)
{
	/* When peers together make the server hold too much, a request that is not the only one of its connection is
	 * turned away; it may be tried again. The only one goes on, so that something always does. */
	if (r->body_cap && session_crowded(s) && s->held > r->body_held) {
		session_refuse(s, r, FAR_GRPC_UNAVAILABLE, "the server holds too much data at the moment, try again");
		return false;
	}
	if (r->body + r->body_n != data)
		memcpy(r->body + r->body_n, data, n);
	r->body_n += n;
	if (r->body_n > r->body_held && r->body_cap) {
		size_t held = (size_t)far_min(r->body_cap, (r->body_n + SESSION_TOUCH - 1) / SESSION_TOUCH * SESSION_TOUCH);
		session_hold(s, (int64_t)(held - r->body_held));
		r->body_held = held;
	}
	return true;
}

static void session_data(struct far_h2 *h, struct far_h2_stream *st, const uint8_t *data, size_t len)
{
	struct far_session *s = session_of(h);
	struct far_request *r = session_request_of(st);

	while (!r->answered && (len || (st->in.in_body && !st->in.left))) {
		if (!st->in.in_body) {
			size_t used;
			int e = far_grpc_deframe(&st->in, data, len, &used);
			data += used;
			len -= used;
			if (e == -EOPNOTSUPP)
				session_refuse(s, r, FAR_GRPC_UNIMPLEMENTED, "compressed messages are not supported");
			else if (e)
				session_refuse(s, r, FAR_GRPC_INTERNAL, "a message's prefix has an unknown flag");
			else if (st->in.in_body && !session_prefix(s, r))
				return;
			continue;
		}
		size_t n = (size_t)far_min(len, st->in.left);
		if (n && !session_body(s, r, data, n))
			return;
		data += n;
		len -= n;
		if (far_grpc_deframe_body(&st->in, n))
			r->whole = true;
	}
}

static size_t session_want(struct far_h2 *h, struct far_h2_stream *st, uint8_t **dst)
{
	struct far_request *r = session_request_of(st);

	if (r->answered || !st->in.in_body || !r->body_cap)
		return 0;
	*dst = r->body + r->body_n;
	return st->in.left;
}

static void session_end(struct far_h2 *h, struct far_h2_stream *st)
{
	struct far_session *s = session_of(h);
	struct far_request *r = session_request_of(st);

	if (r->answered)
		return;
	if (!r->whole || !far_grpc_deframe_done(&st->in)) {
		far_request_fail(r, FAR_GRPC_INTERNAL, "the request ended before its message did");
		session_respond_status(s, r);
		return;
	}
	session_enqueue(s, r);
}

/* Opening streams and resetting them at once, or having them reset by what breaks a rule, makes work that no limit on open
 * streams bounds. */
static void session_reset(struct far_session *s)
{
	uint64_t now = far_now();
	if (!s->resets_since)
		s->resets_since = now;
	uint64_t drained = (now - s->resets_since) / (FAR_SEC / SESSION_RESETS_PER_S);
	if (drained) {
		s->resets -= (unsigned)far_min(drained, s->resets);
		s->resets_since = now;
	}
	if (++s->resets > SESSION_RESETS)
		far_h2_end(&s->h2, NGHTTP2_ENHANCE_YOUR_CALM);
}

static void session_closed(struct far_h2 *h, struct far_h2_stream *st, uint32_t code)
{
	struct far_session *s = session_of(h);
	struct far_request *r = session_request_of(st);

	r->gone = true;
	s->open--;
	if (r->queued)
		session_dequeue(s, r);
	if (code)
		session_reset(s);
	session_unref(r);
}

static void session_frame(struct far_h2 *h, const nghttp2_frame *frame)
{
	if (frame->hd.type == NGHTTP2_SETTINGS && !(frame->hd.flags & NGHTTP2_FLAG_ACK))
		session_of(h)->greeted = true;
	if (frame->hd.type == NGHTTP2_RST_STREAM && !frame->rst_stream.error_code)
		session_reset(session_of(h));
}

static const struct far_h2_ops session_ops = {
	.begin = session_begin,
	.header = session_header,
	.headers_end = session_headers_end,
	.data = session_data,
	.end = session_end,
	.closed = session_closed,
	.want = session_want,
	.body_out = session_body_out,
	.frame = session_frame,
};

/* ----------------------------------------------------------------------------------------------- the owner's */

int far_session_init(struct far_session *s, struct far_server_env *env)
{
	s->env = env;
	far_mutex_init(&s->hello_lock);
	s->queue_end = &s->queue;
	int r = far_h2_init(&s->h2, true, &session_ops);
	if (r)
		far_mutex_fini(&s->hello_lock);
	return r;
}

void far_session_hello(struct far_session *s, struct far_owner *owner, uint64_t session)
{
	far_mutex_lock(&s->hello_lock);
	unsigned i = 0;
	while (i < s->hellos && (s->hello[i].owner != owner || s->hello[i].session != session))
		i++;
	bool fresh = i == s->hellos && i < FAR_SESSION_HELLOS;
	if (fresh) {
		s->hello[i].owner = owner;
		s->hello[i].session = session;
		s->hellos++;
	}
	far_mutex_unlock(&s->hello_lock);
	if (fresh)
		far_owner_connected(owner, session, 1);
}

bool far_session_said(struct far_session *s, const struct far_owner *owner)
{
	far_mutex_lock(&s->hello_lock);
	bool said = false;
	for (unsigned i = 0; i < s->hellos; i++)
		said |= s->hello[i].owner == owner;
	far_mutex_unlock(&s->hello_lock);
	return said;
}

void far_session_fini(struct far_session *s)
{
	struct far_request *r;

	for (unsigned i = 0; i < s->hellos; i++)
		far_owner_connected(s->hello[i].owner, s->hello[i].session, -1);
	far_mutex_fini(&s->hello_lock);
	far_caller_put(s->who);
	far_caller_put(s->token_who);
	free(s->token);
	far_h2_drop(&s->h2);
	while ((r = s->all)) {
		FAR_ASSERT(!r->gone);
		r->gone = true;
		far_h2_forget(&s->h2, &r->s);
		session_unref(r);
	}
	far_h2_fini(&s->h2);
	FAR_ASSERT(s->held == 0 && s->replies == 0 && s->requests == 0);
}

int far_session_feed(struct far_session *s, const uint8_t *data, size_t len)
{
	return far_h2_feed(&s->h2, data, len);
}

size_t far_session_place(struct far_session *s, uint8_t **dst, struct far_request **pin)
{
	size_t n = far_h2_direct(&s->h2, dst);

	*pin = NULL;
	if (n) {
		*pin = session_request_of(nghttp2_session_get_stream_user_data(s->h2.session, s->h2.data_stream));
		(*pin)->refs++;
	}
	return n;
}

void far_session_placed(struct far_request *pin)
{
	if (pin)
		session_unref(pin);
}

bool far_session_ready(const struct far_session *s)
{
	return s->queue && s->replies < SESSION_HELD && (!session_crowded(s) || s->replies < FAR_MIB);
}

struct far_request *far_session_next(struct far_session *s)
{
	struct far_request *r = s->queue;

	if (!far_session_ready(s))
		return NULL;
	session_dequeue(s, r);
	r->refs++;
	r->running = true;
	s->running++;
	return r;
}
