/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The server's side of one connection as a state machine: bytes in, requests out, replies in, bytes out. No descriptor,
 * no lock: the owner serialises everything but far_request_run().
 */
#ifndef FAR_GRPC_SESSION_H
#define FAR_GRPC_SESSION_H

#include "wire/grpc/h2.h"
#include "wire/grpc/proto.h"
#include "wire/loans.h"
#include "wire/server.h"

#include "base/thread.h"

struct far_session;
struct far_owner;

#define FAR_REQUEST_SMALL 512
#define FAR_SESSION_HELLOS 8

struct far_request {
	struct far_h2_stream s;
	struct far_session *session;
	struct far_request *next;             /* in the queue */
	struct far_request *all_next, **all_prev;
	unsigned refs;                        /* the stream, the run, messages on their way */
	bool gone;                            /* the stream is closed: nobody wants the answer */
	bool queued, running, answered, streaming;
	enum far_grpc_method method;

	/* headers */
	bool post, grpc, has_path, has_export;
	uint64_t deadline;
	size_t header_bytes;
	char export[128];

	/* the message */
	uint8_t *body;
	size_t body_n, body_cap;              /* body_cap 0: `small` */
	size_t body_held;                     /* what of it counts as memory that is used */
	bool whole;                           /* a message is complete */
	uint8_t small[FAR_REQUEST_SMALL];

	/* the answer */
	enum far_grpc_status status;
	const char *errno_name;
	char text[160];
	struct far_reply *reply;
	/* Pull */
	unsigned range, pieces;               /* range that is being sent; pieces on their way */
	uint64_t range_at;
	bool decoded, last;
	bool verified;                        /* the checksum of what it carries fits */
	/* who asks */
	char *auth;                           /* value of "authorization" that the session does not know; NULL: none */
	struct far_caller *who;               /* NULL: not known yet, or the connection's own */

	struct far_grpc_request msg;          /* last: not cleared as a whole */
};

struct far_session {
	struct far_h2 h2;
	struct far_server_env *env;
	struct far_request *queue, **queue_end;
	struct far_request *all;
	unsigned requests;     /* request structs that exist */
	unsigned open;         /* streams */
	unsigned running;
	uint64_t held;         /* bytes of requests and replies */
	uint64_t replies;      /* of replies alone */
	bool greeted;          /* the peer has said SETTINGS */
	_Atomic bool stuck;    /* the socket was full when last written to; read without any lock */
	_Atomic bool demand;   /* somebody waits for what is read here; read without any lock */
	uint64_t resets_since; /* flood of resets: a bucket that empties with time */
	unsigned resets;
	/* whom the peer has said to be (Describe with a session), for each owner; more than fit are not counted */
	/* who is at the other end: by the connection, set by the owner before the first request runs; by the last token */
	struct far_caller *who, *token_who;
	char *token;
	struct far_mutex hello_lock;
	unsigned hellos FAR_GUARDED_BY(hello_lock);
	struct {
		struct far_owner *owner;
		uint64_t session;
	} hello[FAR_SESSION_HELLOS] FAR_GUARDED_BY(hello_lock);
};

/* *s is zeroed memory. */
int far_session_init(struct far_session *s, struct far_server_env *env);
/* No run is going on. */
void far_session_fini(struct far_session *s);

/* 0 or -errno: the connection must end. */
int far_session_feed(struct far_session *s, const uint8_t *data, size_t len);

/* Where the next bytes from the peer belong (far_h2_direct). The place stays until far_session_placed() is called with
 * *pin, though the session may be used by others meanwhile. */
size_t far_session_place(struct far_session *s, uint8_t **dst, struct far_request **pin);
void far_session_placed(struct far_request *pin);

/* The next request to run, NULL if there is none or the peer must first take what is held for it. The caller runs it and
 * then finishes it. */
struct far_request *far_session_next(struct far_session *s);
bool far_session_ready(const struct far_session *s); /* whether far_session_next() would give one */

/* Carry it out, without any lock. flags: FAR_NOWAIT: true if it is done, false if it would block: then again without. */
bool far_request_run(struct far_request *r, unsigned flags);
/* Queue the answer; the request is no longer the caller's. */
void far_session_finish(struct far_session *s, struct far_request *r);

/* private to session.c and service.c */
void far_session_hello(struct far_session *s, struct far_owner *owner, uint64_t session); /* any thread */
bool far_session_said(struct far_session *s, const struct far_owner *owner); /* whether there was one for this owner */
struct far_reply {
	struct far_h2_msg m;
	struct far_request *request;
	void *buf;   /* NULL: none, or what is sent is on loan */
	size_t cap;  /* bytes that are held for the peer */
	struct far_loan loan;
};
struct far_reply *far_reply_new(struct far_request *r, size_t cap); /* NULL without memory; cap 0: no buffer */
void far_reply_free(struct far_reply *reply);
/* Refuse with a status and a text. Returns true. */
bool far_request_fail(struct far_request *r, enum far_grpc_status status, const char *fmt, ...) FAR_PRINTF(3, 4);

#endif
