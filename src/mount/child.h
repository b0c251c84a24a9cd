/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A child farpage-serve that serves memory instead of a file: what outside.c needs of child.c. */
#ifndef FAR_CHILD_H
#define FAR_CHILD_H

#include "base/base.h"

/* Start it. When it has the source it says on a socket how large it is; hand_over(opaque, socket, err) reads that and sends
 * memory. -ENOTCONN from there: the child has gone, and its own words are the error. */
int far_child_open_memory(const char *uri, const struct far_mount_opts *opts,
			  int (*hand_over)(void *opaque, int socket, struct far_error *err), void *opaque,
			  struct far_mount **out, struct far_error *err);
/* Readable when the child has ended. */
int far_child_life(struct far_mount *m);

/* What the child says first on that socket. Both ends are of one build, and of one host. */
struct far_child_hello {
	uint64_t bytes;
	uint64_t writable;
};

/* outside.c: far_map_uri() with `outside`. */
int far_outside_open(const char *uri, const struct far_mount_opts *opts, struct far_mount **out, struct far_error *err);

#endif
