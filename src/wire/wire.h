/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Wires: protocols that carry a backend over a connection. A folder each; the client halves are leaves of the registry
 * (src/open.c), the server halves stand behind struct far_server (server.c). */
#ifndef FAR_WIRE_H
#define FAR_WIRE_H

#include "backend/backend.h"

far_leaf_open far_grpc_open; /* grpc://host:port/EXPORT, grpc+unix:///EXPORT?socket=PATH */
far_leaf_open far_nbd_open;  /* nbd://host:port/EXPORT, nbd+unix:///EXPORT?socket=PATH, nbds the same */

far_leaf_open far_exec_open; /* exec:COMMAND: gRPC over the command's standard input and output */

/* The client half over one connected stream socket, which it owns from success on; there is no second connection and
 * no reconnect. `where` names the peer in messages. */
int far_grpc_open_fd(int fd, const char *where, const struct far_open_opts *opts, struct far_backend **out,
		     struct far_error *err);

#endif
