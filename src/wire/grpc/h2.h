/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * An HTTP/2 session (nghttp2) with gRPC's needs on top, fed with bytes and giving bytes: no descriptor, no thread, no
 * lock in here. The client half and the server half share it. Its owner serialises all calls by a lock of its own; only
 * the bytes of a batch may be written, and the place that far_h2_direct() names be read into, outside that lock.
 */
#ifndef FAR_GRPC_H2_H
#define FAR_GRPC_H2_H

#include "wire/grpc/frame.h"

#include <nghttp2/nghttp2.h>
#include <sys/uio.h>

#define FAR_H2_FRAME ((1U << 20) + 1024) /* a MiB and what stands before it fit one frame */
#define FAR_H2_STREAM_WINDOW (16 << 20)
#define FAR_H2_CONN_WINDOW (256 << 20)
#define FAR_H2_MAX_STREAMS 1024
#define FAR_H2_HEADERS 16384 /* of one request or answer, as SETTINGS_MAX_HEADER_LIST_SIZE counts */
#define FAR_H2_IOV 256
#define FAR_H2_SMALL 65536
#define FAR_H2_HEAD 240 /* the longest: a Write with a name of 127 bytes, a session and a sum */

/* A message to be sent: the gRPC prefix and the first bytes in `head`, then the borrowed body. */
struct far_h2_msg {
	struct far_h2_msg *next;
	const void *body;
	size_t body_n;
	size_t at; /* bytes handed to the batch, head included */
	/* Called when nothing points into it any more; NULL: its owner keeps it (see far_h2_detach). */
	void (*release)(struct far_h2_msg *m);
	uint8_t head_n;
	uint8_t head[FAR_H2_HEAD];
};

/* What a stream's owner has of it: base of a client's call and of a server's request. */
struct far_h2_stream {
	int32_t id;
	bool more;              /* more messages will be queued: do not end the body yet */
	bool peer_done;         /* the peer has said all */
	bool early;             /* answered before that: tell the peer to stop once the answer is out */
	struct far_h2_msg *out; /* to be sent, in order */
	struct far_grpc_deframer in;
};

struct far_h2;

/* All are called from far_h2_feed() or far_h2_fill(). Streams whose owner has let go (far_h2_forget) are not reported. */
struct far_h2_ops {
	/* Server: a request begins; NULL refuses it. */
	struct far_h2_stream *(*begin)(struct far_h2 *h, int32_t id);
	void (*header)(struct far_h2 *h, struct far_h2_stream *s, const char *name, size_t name_n, const char *value,
		       size_t value_n);
	void (*headers_end)(struct far_h2 *h, struct far_h2_stream *s); /* may be NULL */
	void (*data)(struct far_h2 *h, struct far_h2_stream *s, const uint8_t *data, size_t len);
	/* The peer has said all. May be NULL. */
	void (*end)(struct far_h2 *h, struct far_h2_stream *s);
	/* The stream is no more; code: an HTTP/2 error code. */
	void (*closed)(struct far_h2 *h, struct far_h2_stream *s, uint32_t code);
	/* Where the next bytes of this stream's data belong; 0: unknown. */
	size_t (*want)(struct far_h2 *h, struct far_h2_stream *s, uint8_t **dst);
	/* Server: the body is out, add the trailers. NULL: the body ends the stream (client). */
	void (*body_out)(struct far_h2 *h, struct far_h2_stream *s);
	/* Any other frame that may be of interest; may be NULL. */
	void (*frame)(struct far_h2 *h, const nghttp2_frame *frame);
};

struct far_h2 {
	nghttp2_session *session;
	const struct far_h2_ops *ops;
	bool dirty;   /* there may be something to send that is not in the batch */
	int broken;   /* -errno: something could not even be queued; its peer would wait for it, so the session is over */
	bool writing; /* set by the owner while it writes the batch outside its lock */
	/* the DATA frame that is being received */
	int32_t data_stream;
	size_t data_left; /* 0: none, or one with padding */
	size_t header_bytes;              /* of the block that is being received */
	int32_t newest, gap_from, gap_to; /* streams of the peer; those strictly between the last two were left out */
	/* the batch: [iov_at, iov_n) is to be written */
	unsigned iov_at, iov_n;
	size_t batch_bytes, small_n;
	struct far_h2_msg *sent; /* released when the batch has been written */
	void *copies;            /* likewise freed */
	struct iovec iov[FAR_H2_IOV];
	uint8_t small[FAR_H2_SMALL];
};

int far_h2_init(struct far_h2 *h, bool server, const struct far_h2_ops *ops); /* settings are queued. 0 or -ENOMEM */
void far_h2_fini(struct far_h2 *h);

/* Bytes from the peer. 0 or -EPROTO: the session is over. */
int far_h2_feed(struct far_h2 *h, const uint8_t *data, size_t len);
/* Say GOAWAY with this code and hear nothing more; also from within callbacks. */
void far_h2_end(struct far_h2 *h, uint32_t code);
/* Where the next bytes from the peer belong, all of them payload of one stream, and how many; 0: not known. */
size_t far_h2_direct(struct far_h2 *h, uint8_t **dst);

/* Make a batch if there is none. True if there is something to write. *err: 0 or -errno: the session is over. */
bool far_h2_fill(struct far_h2 *h, int *err);
static inline bool far_h2_pending(const struct far_h2 *h) { return h->iov_at < h->iov_n; }
/* n bytes of the batch were written. */
void far_h2_wrote(struct far_h2 *h, size_t n);
/* The batch will never be written. */
void far_h2_drop(struct far_h2 *h);
/* Nothing more to say and nothing more to hear. */
bool far_h2_over(struct far_h2 *h);

/* Queue a message; release may run at once if the stream is gone. */
void far_h2_queue(struct far_h2 *h, struct far_h2_stream *s, struct far_h2_msg *m);
/* There is something to send after the body had come to a halt. */
void far_h2_resume(struct far_h2 *h, struct far_h2_stream *s);
/* Client: send a request with the queued messages as its body. 0 or -errno (-ESTALE: no stream ids are left). */
int far_h2_request(struct far_h2 *h, struct far_h2_stream *s, const nghttp2_nv *nv, size_t n);
/* Server, from body_out: the last headers. Without memory for them the session is over. */
void far_h2_trailers(struct far_h2 *h, struct far_h2_stream *s, const nghttp2_nv *nv, size_t n);
/* Server: send headers; with a body the queued messages follow, without one they end the stream. */
int far_h2_respond(struct far_h2 *h, struct far_h2_stream *s, const nghttp2_nv *nv, size_t n, bool body);
/* The stream's owner goes away: it is never reported again, its queued messages are let go. */
void far_h2_forget(struct far_h2 *h, struct far_h2_stream *s);
void far_h2_reset(struct far_h2 *h, int32_t id, uint32_t code);
/* Whether the batch borrows something of [base, base+len). */
bool far_h2_borrows(const struct far_h2 *h, const void *base, size_t len);
/* Replace what the batch borrows of [base, base+len) by copies; not while `writing`. 0 or -ENOMEM. */
int far_h2_detach(struct far_h2 *h, const void *base, size_t len);

#define FAR_H2_NV(name, value) \
	{ (uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, sizeof(value) - 1, \
	  NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE }

#endif
