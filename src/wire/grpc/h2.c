/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The batch. What nghttp2 wants to send is gathered into one vector of pieces: frame headers and small frames are copied
 * into `small`, payloads are borrowed from the messages. A batch is written to its end before the next is made, so:
 *
 *  1. `small` is filled from its start and never moves while a piece points into it;
 *  2. a message that was handed out whole goes to `sent` and is released only when the batch has been written;
 *  3. a message of the owner's (no release) may be borrowed by the batch even after its stream is gone: its owner calls
 *     far_h2_detach() before the memory goes away.
 *
 * Receiving. The header of a DATA frame tells how many bytes of which stream come next (`data_stream`, `data_left`); when
 * the stream's owner knows where they belong, the socket can be read straight to that place. nghttp2 hands out pointers
 * into its input, so the owner finds its bytes where they should be and copies nothing.
 *
 * A peer that breaks the rules is told which (GOAWAY, by nghttp2), and hears nothing more. Three things are held against it
 * that nghttp2 lets pass: headers without end (h2_header_cb), a number that was left out (h2_begin_frame_cb), and answers
 * that it provokes and does not take (far_h2_feed).
 */
#include "wire/grpc/h2.h"

#include <stdlib.h>
#include <string.h>

/* Frames that nghttp2 packs itself are at most 16 KiB. */
#define H2_ROOM (16384 + 64)
#define H2_BATCH_MAX (4u << 20)
/* Of one block, unpacked: what is over the limit of a request, but not far, gets an answer. */
#define H2_HEADERS_MAX (4 * FAR_H2_HEADERS)
/* Frames; an honest peer causes three a stream, and acknowledgements. */
#define H2_QUEUE_MAX (4 * FAR_H2_MAX_STREAMS + 2000)

static struct far_h2_stream *h2_stream(struct far_h2 *h, int32_t id)
{
	return id ? nghttp2_session_get_stream_user_data(h->session, id) : NULL;
}

/* ------------------------------------------------------------------------------------------------ batch */

static void h2_add(struct far_h2 *h, const void *base, size_t len)
{
	struct iovec *last = h->iov_n > h->iov_at ? &h->iov[h->iov_n - 1] : NULL;

	if (!len)
		return;
	if (last && (const uint8_t *)last->iov_base + last->iov_len == base) {
		last->iov_len += len;
	} else {
		FAR_ASSERT(h->iov_n < FAR_H2_IOV);
		h->iov[h->iov_n++] = (struct iovec){ (void *)base, len };
	}
	h->batch_bytes += len;
}

static void h2_add_small(struct far_h2 *h, const void *data, size_t len)
{
	FAR_ASSERT(len <= FAR_H2_SMALL - h->small_n);
	memcpy(h->small + h->small_n, data, len);
	h2_add(h, h->small + h->small_n, len);
	h->small_n += len;
}

static bool h2_room(const struct far_h2 *h)
{
	return h->small_n + H2_ROOM <= FAR_H2_SMALL && h->iov_n + 8 <= FAR_H2_IOV && h->batch_bytes < H2_BATCH_MAX;
}

/* The batch borrows nothing any more. */
static void h2_settle(struct far_h2 *h)
{
	struct far_h2_msg *m;

	h->iov_at = h->iov_n = 0;
	h->batch_bytes = h->small_n = 0;
	while ((m = h->sent)) {
		h->sent = m->next;
		m->release(m);
	}
	while (h->copies) {
		void *next = *(void **)h->copies;
		free(h->copies);
		h->copies = next;
	}
}

static void h2_msg_done(struct far_h2 *h, struct far_h2_msg *m)
{
	m->next = NULL;
	if (!m->release)
		return;
	if (!far_h2_pending(h)) {
		m->release(m);
		return;
	}
	m->next = h->sent;
	h->sent = m;
}

void far_h2_wrote(struct far_h2 *h, size_t n)
{
	while (n) {
		struct iovec *v = &h->iov[h->iov_at];
		FAR_ASSERT(h->iov_at < h->iov_n);
		size_t k = (size_t)far_min(n, v->iov_len);
		v->iov_base = (uint8_t *)v->iov_base + k;
		v->iov_len -= k;
		n -= k;
		if (!v->iov_len)
			h->iov_at++;
	}
	if (!far_h2_pending(h))
		h2_settle(h);
}

void far_h2_drop(struct far_h2 *h)
{
	FAR_ASSERT(!h->writing);
	h2_settle(h);
}

static bool h2_inside(const struct iovec *v, const void *base, size_t len)
{
	return (uintptr_t)v->iov_base - (uintptr_t)base < len;
}

bool far_h2_borrows(const struct far_h2 *h, const void *base, size_t len)
{
	for (unsigned i = h->iov_at; i < h->iov_n; i++)
		if (h2_inside(&h->iov[i], base, len))
			return true;
	return false;
}

int far_h2_detach(struct far_h2 *h, const void *base, size_t len)
{
	FAR_ASSERT(!h->writing);
	for (unsigned i = h->iov_at; i < h->iov_n; i++) {
		struct iovec *v = &h->iov[i];
		if (!h2_inside(v, base, len))
			continue;
		void **copy = malloc(sizeof *copy + v->iov_len);
		if (!copy)
			return -ENOMEM;
		*copy = h->copies;
		h->copies = copy;
		memcpy(copy + 1, v->iov_base, v->iov_len);
		v->iov_base = copy + 1;
	}
	return 0;
}

bool far_h2_fill(struct far_h2 *h, int *err)
{
	*err = 0;
	if (far_h2_pending(h))
		return true;
	while (h->dirty && h2_room(h) && !h->broken) {
		const uint8_t *data;
		ssize_t n = nghttp2_session_mem_send(h->session, &data);
		if (n < 0) {
			*err = n == NGHTTP2_ERR_NOMEM ? -ENOMEM : -EPROTO;
			return false;
		}
		if (n == 0) {
			/* Nothing more, or a DATA frame that found no room. */
			if (h2_room(h))
				h->dirty = false;
			break;
		}
		h2_add_small(h, data, (size_t)n);
	}
	*err = h->broken;
	return !h->broken && far_h2_pending(h);
}

/* What nghttp2 said to something that had to be queued: other errors than this one mean that the stream is gone. */
static void h2_queued(struct far_h2 *h, int r)
{
	if (r == NGHTTP2_ERR_NOMEM)
		h->broken = -ENOMEM;
	h->dirty = true;
}

/* ----------------------------------------------------------------------------------------------- sending */

static size_t h2_unsent(const struct far_h2_stream *s)
{
	size_t n = 0;
	for (const struct far_h2_msg *m = s->out; m; m = m->next)
		n += m->head_n + m->body_n - m->at;
	return n;
}

static ssize_t h2_read_cb(nghttp2_session *session, int32_t id, uint8_t *buf, size_t length, uint32_t *flags,
			  nghttp2_data_source *source, void *user)
{
	struct far_h2 *h = user;
	struct far_h2_stream *s = h2_stream(h, id);

	if (!s)
		return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
	size_t left = h2_unsent(s);
	if (!left && s->more)
		return NGHTTP2_ERR_DEFERRED;
	*flags |= NGHTTP2_DATA_FLAG_NO_COPY;
	if (left > length)
		return (ssize_t)length;
	if (!s->more) {
		*flags |= NGHTTP2_DATA_FLAG_EOF;
		if (h->ops->body_out) {
			*flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
			h->ops->body_out(h, s);
		}
	}
	return (ssize_t)left;
}

static int h2_send_data_cb(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *framehd, size_t length,
			   nghttp2_data_source *source, void *user)
{
	struct far_h2 *h = user;
	struct far_h2_stream *s = h2_stream(h, frame->hd.stream_id);

	if (!s)
		return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
	if (!h2_room(h))
		return NGHTTP2_ERR_WOULDBLOCK;
	h2_add_small(h, framehd, 9);
	while (length) {
		struct far_h2_msg *m = s->out;
		FAR_ASSERT(m);
		if (m->at < m->head_n) {
			size_t k = (size_t)far_min(length, m->head_n - m->at);
			/* Many tiny messages in one frame could use up the pieces; they are copied, so they cannot. */
			h2_add_small(h, m->head + m->at, k);
			m->at += k;
			length -= k;
		}
		size_t k = (size_t)far_min(length, m->head_n + m->body_n - m->at);
		if (k)
			h2_add(h, (const uint8_t *)m->body + (m->at - m->head_n), k);
		m->at += k;
		length -= k;
		if (m->at == m->head_n + m->body_n) {
			s->out = m->next;
			h2_msg_done(h, m);
		}
	}
	return 0;
}

static ssize_t h2_length_cb(nghttp2_session *session, uint8_t frame_type, int32_t stream_id, int32_t session_window,
			    int32_t stream_window, uint32_t max_frame, void *user)
{
	return (ssize_t)far_min(max_frame, FAR_H2_FRAME);
}

void far_h2_queue(struct far_h2 *h, struct far_h2_stream *s, struct far_h2_msg *m)
{
	struct far_h2_msg **at = &s->out;

	m->next = NULL;
	m->at = 0;
	while (*at)
		at = &(*at)->next;
	*at = m;
	if (s->id && s->more)
		far_h2_resume(h, s);
}

int far_h2_request(struct far_h2 *h, struct far_h2_stream *s, const nghttp2_nv *nv, size_t n)
{
	nghttp2_data_provider body = { .read_callback = h2_read_cb };
	int32_t id = nghttp2_submit_request(h->session, NULL, nv, n, &body, s);

	if (id < 0)
		return id == NGHTTP2_ERR_NOMEM ? -ENOMEM : -ESTALE;
	s->id = id;
	h->dirty = true;
	return 0;
}

int far_h2_respond(struct far_h2 *h, struct far_h2_stream *s, const nghttp2_nv *nv, size_t n, bool body)
{
	nghttp2_data_provider provider = { .read_callback = h2_read_cb };
	int r = nghttp2_submit_response(h->session, s->id, nv, n, body ? &provider : NULL);

	h2_queued(h, r);
	return r == 0 ? 0 : r == NGHTTP2_ERR_NOMEM ? -ENOMEM : -EPROTO;
}

void far_h2_trailers(struct far_h2 *h, struct far_h2_stream *s, const nghttp2_nv *nv, size_t n)
{
	h2_queued(h, nghttp2_submit_trailer(h->session, s->id, nv, n));
}

void far_h2_resume(struct far_h2 *h, struct far_h2_stream *s)
{
	h2_queued(h, nghttp2_session_resume_data(h->session, s->id));
}

void far_h2_forget(struct far_h2 *h, struct far_h2_stream *s)
{
	if (s->id)
		nghttp2_session_set_stream_user_data(h->session, s->id, NULL);
	while (s->out) {
		struct far_h2_msg *m = s->out;
		s->out = m->next;
		h2_msg_done(h, m);
	}
}

void far_h2_reset(struct far_h2 *h, int32_t id, uint32_t code)
{
	h2_queued(h, nghttp2_submit_rst_stream(h->session, NGHTTP2_FLAG_NONE, id, code));
}

/* --------------------------------------------------------------------------------------------- receiving */

static int h2_begin_frame_cb(nghttp2_session *session, const nghttp2_frame_hd *hd, void *user)
{
	struct far_h2 *h = user;

	h->data_left = 0;
	if (hd->type == NGHTTP2_HEADERS)
		h->header_bytes = 0;
	if (hd->type == NGHTTP2_HEADERS && h->ops->begin) {
		/* A number that a client has passed over is used up (RFC 9113, 5.1.1). The last such gap is known. */
		if (hd->stream_id > h->gap_from && hd->stream_id < h->gap_to)
			far_h2_end(h, NGHTTP2_PROTOCOL_ERROR);
		if (hd->stream_id > h->newest) {
			if (hd->stream_id > h->newest + 2) {
				h->gap_from = h->newest;
				h->gap_to = hd->stream_id;
			}
			h->newest = hd->stream_id;
		}
	}
	if (hd->type == NGHTTP2_DATA && !(hd->flags & NGHTTP2_FLAG_PADDED)) {
		h->data_stream = hd->stream_id;
		h->data_left = hd->length;
	}
	return 0;
}

static int h2_begin_headers_cb(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	struct far_h2 *h = user;

	if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST)
		return 0;
	struct far_h2_stream *s = h->ops->begin ? h->ops->begin(h, frame->hd.stream_id) : NULL;
	if (!s)
		return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
	nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, s);
	return 0;
}

static int h2_header_cb(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_n,
			const uint8_t *value, size_t value_n, uint8_t flags, void *user)
{
	struct far_h2 *h = user;
	struct far_h2_stream *s = h2_stream(h, frame->hd.stream_id);

	h->header_bytes += name_n + value_n + 32;
	if (h->header_bytes > H2_HEADERS_MAX)
		far_h2_end(h, NGHTTP2_ENHANCE_YOUR_CALM);
	else if (s)
		h->ops->header(h, s, (const char *)name, name_n, (const char *)value, value_n);
	return 0;
}

static int h2_data_cb(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t len, void *user)
{
	struct far_h2 *h = user;
	struct far_h2_stream *s = h2_stream(h, id);

	h->data_left -= (size_t)far_min(len, h->data_left);
	if (s)
		h->ops->data(h, s, data, len);
	return 0;
}

static int h2_frame_cb(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	struct far_h2 *h = user;
	struct far_h2_stream *s = h2_stream(h, frame->hd.stream_id);
	bool headers = frame->hd.type == NGHTTP2_HEADERS, data = frame->hd.type == NGHTTP2_DATA;

	/* Whether the peer has said all is known before its headers are judged. */
	if (s && headers)
		s->peer_done = (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) != 0;
	if (s && headers && h->ops->headers_end)
		h->ops->headers_end(h, s);
	/* The owner may have let go of it just now. */
	if ((headers || data) && (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) && (s = h2_stream(h, frame->hd.stream_id))) {
		s->peer_done = true;
		if (h->ops->end)
			h->ops->end(h, s);
	}
	if (h->ops->frame)
		h->ops->frame(h, frame);
	return 0;
}

/* A reset that is queued with the answer would overtake it: it is queued when the answer has gone. */
static int h2_sent_cb(nghttp2_session *session, const nghttp2_frame *frame, void *user)
{
	struct far_h2 *h = user;

	if (frame->hd.type != NGHTTP2_HEADERS || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM))
		return 0;
	struct far_h2_stream *s = h2_stream(h, frame->hd.stream_id);
	if (s && s->early && !s->peer_done)
		far_h2_reset(h, s->id, NGHTTP2_NO_ERROR);
	return 0;
}

static int h2_close_cb(nghttp2_session *session, int32_t id, uint32_t code, void *user)
{
	struct far_h2 *h = user;
	struct far_h2_stream *s = h2_stream(h, id);

	if (s) {
		far_h2_forget(h, s);
		h->ops->closed(h, s, code);
	}
	return 0;
}

int far_h2_feed(struct far_h2 *h, const uint8_t *data, size_t len)
{
	h->dirty = true;
	ssize_t n = nghttp2_session_mem_recv(h->session, data, len);
	if (n != (ssize_t)len)
		return n == NGHTTP2_ERR_NOMEM ? -ENOMEM : -EPROTO;
	return nghttp2_session_get_outbound_queue_size(h->session) > H2_QUEUE_MAX ? -EPROTO : 0;
}

void far_h2_end(struct far_h2 *h, uint32_t code)
{
	h2_queued(h, nghttp2_session_terminate_session(h->session, code));
}

size_t far_h2_direct(struct far_h2 *h, uint8_t **dst)
{
	struct far_h2_stream *s = h->data_left ? h2_stream(h, h->data_stream) : NULL;

	return s ? (size_t)far_min(h->data_left, h->ops->want(h, s, dst)) : 0;
}

bool far_h2_over(struct far_h2 *h)
{
	return !far_h2_pending(h) && !nghttp2_session_want_read(h->session) && !nghttp2_session_want_write(h->session);
}

/* ------------------------------------------------------------------------------------------------- set-up */

static int h2_session(struct far_h2 *h, bool server)
{
	nghttp2_session_callbacks *cb;
	nghttp2_option *opt = NULL;

	if (nghttp2_session_callbacks_new(&cb))
		return -ENOMEM;
	if (nghttp2_option_new(&opt)) {
		nghttp2_session_callbacks_del(cb);
		return -ENOMEM;
	}
	nghttp2_option_set_no_closed_streams(opt, 1);
	nghttp2_session_callbacks_set_on_begin_frame_callback(cb, h2_begin_frame_cb);
	nghttp2_session_callbacks_set_on_begin_headers_callback(cb, h2_begin_headers_cb);
	nghttp2_session_callbacks_set_on_header_callback(cb, h2_header_cb);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(cb, h2_data_cb);
	nghttp2_session_callbacks_set_on_frame_recv_callback(cb, h2_frame_cb);
	nghttp2_session_callbacks_set_on_frame_send_callback(cb, h2_sent_cb);
	nghttp2_session_callbacks_set_on_stream_close_callback(cb, h2_close_cb);
	nghttp2_session_callbacks_set_send_data_callback(cb, h2_send_data_cb);
	nghttp2_session_callbacks_set_data_source_read_length_callback(cb, h2_length_cb);
	int r = server ? nghttp2_session_server_new2(&h->session, cb, h, opt) :
			 nghttp2_session_client_new2(&h->session, cb, h, opt);
	nghttp2_option_del(opt);
	nghttp2_session_callbacks_del(cb);
	return r ? -ENOMEM : 0;
}

int far_h2_init(struct far_h2 *h, bool server, const struct far_h2_ops *ops)
{
	static const nghttp2_settings_entry settings[] = {
		{ NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, FAR_H2_STREAM_WINDOW },
		{ NGHTTP2_SETTINGS_MAX_FRAME_SIZE, FAR_H2_FRAME },
		{ NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, FAR_H2_HEADERS },
		{ NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, FAR_H2_MAX_STREAMS }, /* the server's own */
		{ NGHTTP2_SETTINGS_ENABLE_PUSH, 0 },                            /* the client's own */
	};
	nghttp2_settings_entry mine[4];

	h->ops = ops;
	int r = h2_session(h, server);
	if (r)
		return r;
	memcpy(mine, settings, 3 * sizeof mine[0]);
	mine[3] = settings[server ? 3 : 4];
	if (nghttp2_submit_settings(h->session, NGHTTP2_FLAG_NONE, mine, 4) ||
	    nghttp2_session_set_local_window_size(h->session, NGHTTP2_FLAG_NONE, 0, FAR_H2_CONN_WINDOW)) {
		far_h2_fini(h);
		return -ENOMEM;
	}
	h->dirty = true;
	return 0;
}

void far_h2_fini(struct far_h2 *h)
{
	nghttp2_session_del(h->session);
	h->session = NULL;
	h2_settle(h);
}
