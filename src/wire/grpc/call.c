/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A call's request, and how its reply is taken as it comes: headers, one message, trailers, the end of the stream. All but
 * far_call_request() run under the channel's lock. */
#include "wire/grpc/channel.h"

#include <string.h>

#define CALL_REPLY_MAX (64u << 20)

static struct far_call *call_of(struct far_h2_stream *s)
{
	return far_container_of(s, struct far_call, s);
}

void far_call_request(struct far_call *call, const struct far_pb_out *o, const void *body, size_t body_n)
{
	FAR_ASSERT(o->n <= o->cap && o->n + FAR_GRPC_PREFIX <= FAR_H2_HEAD && o->n + body_n <= UINT32_MAX);
	far_grpc_prefix(call->req.head, (uint32_t)(o->n + body_n));
	if (o->n)
		memcpy(call->req.head + FAR_GRPC_PREFIX, o->p, o->n);
	call->req.head_n = (uint8_t)(o->n + FAR_GRPC_PREFIX);
	call->req.body = body;
	call->req.body_n = body_n;
}

/* The call has its outcome. Nothing of the session refers to it any more. */
void far_call_done(struct far_call *call, int result)
{
	if (call->done)
		return;
	call->done = true;
	call->result = result;
	far_channel_done(call); /* the last that touches it */
}

void far_call_header(struct far_h2 *h, struct far_h2_stream *s, const char *name, size_t name_n, const char *value,
			   size_t value_n)
{
	struct far_call *call = call_of(s);
#define IS(text) (name_n == sizeof(text) - 1 && !memcmp(name, text, sizeof(text) - 1))

	if (IS(":status")) {
		call->http_status = 0;
		for (size_t i = 0; i < value_n && i < 3; i++)
			call->http_status = call->http_status * 10 + (unsigned)(value[i] - '0');
	} else if (IS("content-type")) {
		call->bad_type = value_n < 16 || memcmp(value, "application/grpc", 16) != 0;
	} else if (IS("grpc-status")) {
		unsigned v = 0;
		for (size_t i = 0; i < value_n && i < 4; i++)
			v = value[i] >= '0' && value[i] <= '9' ? v * 10 + (unsigned)(value[i] - '0') : 998;
		call->grpc_status = value_n ? v : 998;
	} else if (IS("grpc-message")) {
		far_grpc_percent_decode(call->text, sizeof call->text, value, value_n);
	} else if (IS("farpage-errno")) {
		size_t n = (size_t)far_min(value_n, sizeof call->errno_name - 1);
		memcpy(call->errno_name, value, n);
		call->errno_name[n] = 0;
	}
#undef IS
}

/* A whole prefix is in. 0 or the reason to refuse the reply. */
static int call_prefix(struct far_call *call)
{
	if (call->got_message || call->s.in.len > CALL_REPLY_MAX)
		return -EPROTO;
	call->got_message = true;
	return !call->fields && call->s.in.len > call->buf_cap ? -EPROTO : 0;
}

static int call_body(struct far_call *call, const uint8_t *data, size_t n)
{
	if (call->fields)
		return far_pb_stream_feed(&call->pb, data, n);
	if (data != call->buf + call->buf_n)
		memcpy(call->buf + call->buf_n, data, n);
	call->buf_n += n;
	return 0;
}

static int call_take_data(struct far_call *call, const uint8_t *data, size_t len)
{
	while (len || (call->s.in.in_body && !call->s.in.left)) {
		int r;
		if (!call->s.in.in_body) {
			size_t used;
			r = far_grpc_deframe(&call->s.in, data, len, &used);
			data += used;
			len -= used;
			if (r == 0 && call->s.in.in_body)
				r = call_prefix(call);
			if (r)
				return r == -EOPNOTSUPP ? -EPROTO : r;
			continue;
		}
		size_t n = (size_t)far_min(len, call->s.in.left);
		r = call_body(call, data, n);
		if (r)
			return r;
		data += n;
		len -= n;
		if (far_grpc_deframe_body(&call->s.in, n) && call->fields && !far_pb_stream_done(&call->pb))
			return -EPROTO;
	}
	return 0;
}

void far_call_data(struct far_h2 *h, struct far_h2_stream *s, const uint8_t *data, size_t len)
{
	struct far_call *call = call_of(s);

	if (call->refused)
		return;
	if (call->http_status != 200 || call->bad_type)
		return; /* somebody else's page of text: the headers tell what is wrong */
	call->refused = call_take_data(call, data, len);
	if (call->refused)
		far_h2_reset(h, s->id, NGHTTP2_CANCEL);
}

size_t far_call_want(struct far_h2 *h, struct far_h2_stream *s, uint8_t **dst)
{
	struct far_call *call = call_of(s);

	if (call->refused || !call->s.in.in_body)
		return 0;
	if (call->fields)
		return (size_t)far_min(far_pb_stream_want(&call->pb, dst), call->s.in.left);
	*dst = call->buf + call->buf_n;
	return (size_t)far_min(call->s.in.left, call->buf_cap - call->buf_n);
}

/* What a finished stream means. */
static int call_outcome(struct far_call *call, uint32_t code)
{
	if (call->refused)
		return call->refused;
	if (call->grpc_status == FAR_CALL_NO_STATUS) {
		if (code == NGHTTP2_REFUSED_STREAM)
			call->untouched = true;
		if (code != NGHTTP2_NO_ERROR)
			return -ECONNRESET;
		if (call->http_status >= 500 || call->http_status == 429)
			return -ECONNRESET; /* a proxy that cannot reach its server */
		return -EPROTO;
	}
	if (call->grpc_status)
		return far_grpc_errno_of(call->grpc_status, call->errno_name[0] ? call->errno_name : NULL);
	if (call->http_status != 200 || call->bad_type || !call->got_message || !far_grpc_deframe_done(&call->s.in))
		return -EPROTO;
	return 0;
}

void far_call_closed(struct far_h2 *h, struct far_h2_stream *s, uint32_t code)
{
	struct far_call *call = call_of(s);

	s->id = 0;
	far_call_done(call, call_outcome(call, code));
}
