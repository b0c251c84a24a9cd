/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The control socket of a running mount or server: one JSON object a line each way over a unix socket in a directory
 * that only its owner may enter. Request {"op": "status", ...}; answer {"ok": true, ...} or
 * {"ok": false, "code": ERRNO, "error": "SENTENCE"}.
 */
#ifndef FAR_CONTROL_H
#define FAR_CONTROL_H

#include "base/base.h"

struct json_object;
struct far_control;

/* Answers one request; runs on a thread of the control socket, several at once. Returns a new object. */
typedef struct json_object *far_control_fn(void *opaque, const char *op, struct json_object *req);

/* Bind the socket: at `path` if given, else where the hash of target's real path says. Call before a mount covers the
 * target. Connections wait until far_control_start(). -EADDRINUSE: another instance answers there. */
int far_control_open(const char *path, const char *target, struct far_control **out, struct far_error *err);
int far_control_start(struct far_control *c, far_control_fn *fn, void *opaque, struct far_error *err);
/* True once far_control_close() has begun: a handler that waits returns then. */
bool far_control_ending(struct far_control *c);
/* Take no more requests, let those that run answer, remove the socket. */
void far_control_close(struct far_control *c);

/* Objects of answers and requests. Without memory they are NULL, and far_control_put() makes *o NULL: then it is sent as
 * "no memory", never without a field. v is taken over. */
void far_control_put(struct json_object **o, const char *key, struct json_object *v);
struct json_object *far_control_ok(void);
/* A status as an answer's fields, after "ok". */
struct json_object *far_control_status(const struct far_status *st);
/* The way back; out->size says how much of it there is. What the other does not know is 0. */
void far_control_read_status(struct json_object *o, struct far_status *out);
struct json_object *far_control_error(int code, const char *fmt, ...) FAR_PRINTF(2, 3);

/* Send one request to the instance that holds target (or that listens at path) and wait for its answer. timeout_ms -1:
 * for ever. The answer has "ok": true; a refusal is an error with its code and sentence, and *reply is set all the
 * same if it is not NULL. -ENOENT: nobody is there. */
int far_control_call(const char *path, const char *target, struct json_object *req, int timeout_ms,
		 struct json_object **reply, struct far_error *err);

#endif
