/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What the wires' server halves and far_server (server.c) know of each other. */
#ifndef FAR_SERVER_H
#define FAR_SERVER_H

#include "base/clock.h"
#include "base/crew.h"
#include "net/access.h"
#include "net/tls.h"

#include <stdatomic.h>

struct far_owner;
struct far_loans;

struct far_export {
	char *name;
	struct far_backend *b;
	struct far_owner *owner; /* of b: shared by all exports of the same backend, as the next */
	struct far_loans *loans; /* NULL: replies are copied */
	/* What a mount knows beyond its bytes; NULL: it is no mount. look: FAR_EXPORT_* at off, and in *run for how many
	 * bytes from there the same is so, 1 to len. prefetch: fetch this soon. Neither waits for anything. */
	unsigned (*look)(void *hooks, uint64_t off, uint64_t len, uint64_t *run);
	void (*prefetch)(void *hooks, uint64_t off, uint64_t len);
	void *hooks;
};
#define FAR_EXPORT_LOCAL 1u
#define FAR_EXPORT_DIRTY 2u

struct far_server_env {
	/* fixed once connections exist */
	struct far_export *exports;
	size_t exports_n;
	uint64_t max_request;
	uint64_t handshake, stall; /* patience, ns: for a greeting; for a peer that neither sends nor takes what it must */
	uint64_t memory_max;
	unsigned spinning_max;
	/* Put TLS over a connection in the clear; NULL: there is no certificate. Nothing is read ahead. 0 or -errno. */
	int (*starttls)(void *tls, struct far_conn *conn);
	void *tls;
	struct far_access *access; /* who may do what; NULL: nothing is asked of anybody */
	bool plain; /* only the Backend service, as the Go servers of the r3map family */
	/* atomic: bytes of requests and replies that are held for peers. A connection whose peer makes it hold much is
	 * made to wait once all together hold memory_max. */
	_Atomic uint64_t memory;
	/* Connections that wait without sleeping. They must leave CPUs to what they wait for. */
	_Atomic unsigned spinning;
};

/* What a caller may do with an export of env's. */
enum far_right far_server_right(const struct far_server_env *env, const struct far_caller *who, const struct far_export *e);
/* The export of that name; "" and "default": the first. NULL: there is none. */
const struct far_export *far_server_find(const struct far_server_env *env, const char *name, size_t len);

/* Serve what is read from `in` and written to `out`, which are the server's from now on; `ended`: an eventfd that is written
 * to when that connection has gone. */
int far_server_serve_pair(struct far_server *s, int in, int out, bool nbd, int ended, struct far_error *err);

/* For tests: shorter patience; the plain service only. Before the first connection. */
void far_server_patience(struct far_server *s, uint64_t handshake, uint64_t stall);
void far_server_plain(struct far_server *s);

/* What a mount knows of its only export (struct far_export). Before listening. */
void far_server_hooks(struct far_server *s, unsigned (*look)(void *hooks, uint64_t off, uint64_t len, uint64_t *run),
		      void (*prefetch)(void *hooks, uint64_t off, uint64_t len), void *hooks);
/* NBD on the unix socket `path`, which is no URI. */
int far_server_listen_nbd(struct far_server *s, const char *path, struct far_error *err);

/* Take over a socket that listens already (socket activation); fd is the server's from then on, or closed. `scheme`: what
 * is spoken there, as in the URI of a listener. */
int far_server_adopt(struct far_server *s, const char *scheme, int fd, char **bound, struct far_error *err);

/* A server half: serve an open connection on a seat of the crew. *conn is taken over on success, and is no longer open to
 * the caller. ended(opaque) is called when the connection is gone. */
struct far_grpc_conn;
int far_grpc_conn_start(const struct far_server_env *env, struct far_crew *crew, struct far_conn *conn,
			void (*ended)(void *opaque), void *opaque, struct far_grpc_conn **out);
/* End it soon; any thread, as long as ended() has not been called. */
void far_grpc_conn_kill(struct far_grpc_conn *c);

/* `tls`: nothing but STARTTLS is answered in the clear. */
struct far_nbd_conn;
int far_nbd_conn_start(const struct far_server_env *env, struct far_crew *crew, struct far_conn *conn, bool tls,
		       void (*ended)(void *opaque), void *opaque, struct far_nbd_conn **out);
void far_nbd_conn_kill(struct far_nbd_conn *c);

#endif
