/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A client made of nghttp2 alone, which sends what a test wants, however wrong; and small helpers of the wire's tests. */
#ifndef FAR_TEST_PEER_H
#define FAR_TEST_PEER_H

#include "base/clock.h"
#include "base/thread.h"
#include "wire/grpc/frame.h"
#include "wire/grpc/proto.h"
#include "wire/grpc/session.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LIMIT (20 * FAR_SEC)
#define PEER_STREAMS 4096

struct peer_stream {
	/* the request */
	const uint8_t *body;
	size_t body_n, at;
	bool hang; /* the body never ends */
	/* the reply */
	int http, status; /* -1: not seen */
	char message[256], errno_name[32];
	uint8_t *data;
	size_t data_n;
	bool ended, closed;
	uint32_t code;
};

struct peer {
	nghttp2_session *h2;
	struct peer_stream s[PEER_STREAMS]; /* by (id - 1) / 2 */
	bool goaway;
	uint32_t goaway_code;
	int fd; /* -1: none */
	struct far_session *session; /* fed in this process instead */
	struct far_server_env env;
	struct far_export export;
};

/* In-process: a session over one export. */
void peer_over_session(struct peer *p, struct far_backend *b, uint64_t max_request);
/* Over a connected socket. */
void peer_over_fd(struct peer *p, int fd);
void peer_free(struct peer *p);

/* Submit a request with these header values (NULL: leave it out) and body. Returns the stream id. */
int32_t peer_submit(struct peer *p, const char *method, const char *path, const char *type, const char *name,
		    const char *value, const void *body, size_t n, bool hang);
/* Move bytes both ways until the stream is closed (id 0: until nothing moves), at most LIMIT. False: the connection
 * ended first. */
bool peer_drive(struct peer *p, int32_t id);
struct peer_stream *peer_of(struct peer *p, int32_t id);

/* A message with its prefix; freed by the caller. */
uint8_t *peer_message(const void *body, size_t n, size_t *out_n);
/* Make a whole call with a message of these bytes. */
struct peer_stream *peer_call(struct peer *p, const char *path, const void *msg, size_t n);

/* Hexadecimal lines of a recording. dir: '>' or '<'. Lines of that direction joined. */
uint8_t *vector_load(const char *name, char dir, size_t *n);

int tcp_connect(const char *uri); /* of "grpc://127.0.0.1:PORT"; -1 on failure */
int tcp_listen(int *port);

/* A backend over memory whose calls can be held up. */
struct slow {
	struct far_mutex lock;
	struct far_cond cond;
	uint8_t *mem;
	size_t size;
	unsigned inside, max_inside, calls;
	bool hold;
	bool reads_go; /* although others are held up */
	uint64_t delay; /* of each call */
	size_t demand; /* bytes that were read for somebody who waits */
	int error; /* what calls give instead */
	bool would_block;
};
struct far_backend *slow_open(struct slow *s, size_t size);
void slow_hold(struct slow *s, bool hold);
bool slow_wait_inside(struct slow *s, unsigned n);
void slow_free(struct slow *s);

/* A thread that writes and reads back a stripe of its own, again and again; every second one says that it is bulk. */
struct worker {
	struct far_thread t;
	struct far_backend *b;
	unsigned id, rounds;
	size_t len;
	int failed;
};
/* Numbered 0, step, 2 step ... */
struct worker *workers_start(struct far_backend *b, unsigned n, unsigned step, unsigned rounds, size_t len);
void workers_end(struct worker *w, unsigned n); /* all went well; w is freed */
void workers(struct far_backend *b, unsigned n, unsigned rounds, size_t len); /* both */

#endif
