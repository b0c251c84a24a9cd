/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* One client connection and the calls on it. No thread of its own: callers share sending and reading. */
#ifndef FAR_GRPC_CHANNEL_H
#define FAR_GRPC_CHANNEL_H

#include "base/thread.h"
#include "net/net.h"
#include "wire/grpc/h2.h"
#include "wire/grpc/pb.h"

struct far_channel;

/* A unary call. It lives on its caller's stack from begin to finish. */
struct far_call {
	/* fixed before the call */
	const char *path;          /* "/package.Service/Method" */
	const char *export_header; /* metadata farpage-export; NULL: none */
	bool tell_deadline;        /* send grpc-timeout */
	struct far_h2_msg req;     /* head, body; filled by far_call_request() */
	/* How the reply is taken. With `fields` its fields are taken as they come (long byte strings straight to their
	 * place); else the whole message goes to `buf`, which holds at most buf_cap. */
	bool fields;
	struct far_pb_stream pb;
	uint8_t *buf;
	size_t buf_cap, buf_n;

	/* the outcome */
	int result;            /* 0 or -errno */
	unsigned grpc_status;  /* of the reply; FAR_CALL_NO_STATUS */
	bool untouched;        /* failed before the peer can have seen it: may be tried again at once */
	char text[160];        /* grpc-message, decoded */

	/* private, under the channel's lock */
	struct far_h2_stream s;
	struct far_call *next, *prev;
	struct far_channel *channel;
	uint64_t deadline;
	struct far_event event; /* its caller sleeps on it; set under the lock */
	char errno_name[16];
	unsigned http_status;
	unsigned pinned;       /* a reader is reading into this call's memory */
	bool waiting, leaving, done, got_message, bad_type;
	bool linked;           /* on the channel's list, from begin to finish */
	int refused;           /* why the reply is no good, -errno */
};
#define FAR_CALL_NO_STATUS 999u

/* Put prefix and protobuf head into the request: `o` is a buffer of head bytes with what stands before `body`. */
void far_call_request(struct far_call *call, const struct far_pb_out *o, const void *body, size_t body_n);

/* private to call.c and channel.c: what the session reports of a call; the call has its outcome; its
 * caller may go, and is woken if it sleeps. */
void far_call_header(struct far_h2 *h, struct far_h2_stream *s, const char *name, size_t name_n, const char *value,
		     size_t value_n);
void far_call_data(struct far_h2 *h, struct far_h2_stream *s, const uint8_t *data, size_t len);
size_t far_call_want(struct far_h2 *h, struct far_h2_stream *s, uint8_t **dst);
void far_call_closed(struct far_h2 *h, struct far_h2_stream *s, uint32_t code);
void far_call_done(struct far_call *call, int result);
void far_channel_done(struct far_call *call);

/* Wrap a connection; conn is taken over on success. authority is copied. */
int far_channel_new(struct far_conn *conn, const char *authority, struct far_channel **out);
/* Before the first call: the value of "authorization" that goes with each; taken over. */
void far_channel_authorize(struct far_channel *c, char *value);
/* References: whoever makes calls holds one. The last one closes the connection. */
void far_channel_get(struct far_channel *c);
void far_channel_put(struct far_channel *c);

/* Make the call; ends at `deadline` at the latest. Returns call->result. `silence`: a connection on which nothing at all
 * was heard for so long (ns) when a call runs out of time is given up. */
int far_channel_call(struct far_channel *c, struct far_call *call, uint64_t deadline, uint64_t silence);
/* The same in two steps, for a caller with several calls: begin() only puts the request together, finish() sends it and
 * whatever else there is, and waits. Whoever has begun calls finishes them one by one and waits for nothing else
 * meanwhile, but for calls on another channel if these were pushed: sent, as far as there was room. */
void far_channel_begin(struct far_channel *c, struct far_call *call, uint64_t deadline);
void far_channel_push(struct far_channel *c);
int far_channel_finish(struct far_channel *c, struct far_call *call, uint64_t deadline, uint64_t silence);
/* Every pending and later call gets err. */
void far_channel_kill(struct far_channel *c, int err);
/* No new calls; those that are pending go on. */
void far_channel_retire(struct far_channel *c);
/* Read what the peer has said meanwhile, without waiting; false: it has ended. */
bool far_channel_alive(struct far_channel *c);
/* While calls are pending: PING after `quiet` ns of silence, dead after `dead` more; at most max_pings in a row. Off
 * where this is not called. */
void far_channel_keep_alive(struct far_channel *c, uint64_t quiet, uint64_t dead, unsigned max_pings);
/* Whether new calls may be made on it: neither dead nor told to go away. */
bool far_channel_usable(const struct far_channel *c);
/* For spreading: what callers have asked for and not yet got, so much more or less of it; and how much it is. */
void far_channel_owe(struct far_channel *c, int calls, int64_t bytes);
uint64_t far_channel_owed(const struct far_channel *c, int *calls);

/* Why it has failed, if there is more to say than its error; false: there is not. */
bool far_channel_why(struct far_channel *c, char *buf, size_t n);

/* Two numbers for the owner: a tag that stays (0: only ask), and a count. */
uint64_t far_channel_tag(struct far_channel *c, uint64_t tag);
uint64_t far_channel_mark(struct far_channel *c, int64_t change);

/* For tests and fuzzers: the session without a socket. Submit without waiting, feed bytes, take bytes. */
int far_channel_submit(struct far_channel *c, struct far_call *call);
int far_channel_feed(struct far_channel *c, const uint8_t *data, size_t len);
size_t far_channel_take(struct far_channel *c, uint8_t *buf, size_t cap);
void far_channel_end(struct far_channel *c, struct far_call *call, int err);

#endif
