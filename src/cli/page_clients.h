/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The programs whose memory `farpage page` serves, a thread each: see page_clients.c. */
#ifndef FAR_PAGE_CLIENTS_H
#define FAR_PAGE_CLIENTS_H

#include "base/base.h"

struct json_object;
struct page_clients;

struct page_clients_conf {
	struct far_backend *source;        /* stays the caller's; all clients read from it */
	const struct far_mount_opts *opts; /* strings and all: outlives the clients */
	bool writable;                     /* one client at a time may have its stores pushed */
	size_t max;
	bool quiet;
	int wake;                          /* eventfd that is written when a client has gone: then reap */
};

int page_clients_open(const struct page_clients_conf *conf, struct page_clients **out);
/* A connection was accepted; fd is owned from here on, also on failure, which is said. */
void page_clients_add(struct page_clients *c, int fd);
/* Join the threads of those that have gone. Returns how many are there still. */
size_t page_clients_reap(struct page_clients *c);
/* Push what the clients have stored. The first error. */
int page_clients_flush(struct page_clients *c);
/* One object a client, in a new array. */
struct json_object *page_clients_json(struct page_clients *c);
/* Nobody is served any more: what is absent raises SIGBUS in the programs that still have it, stores are flushed first.
 * Frees c. The first flush's error; *left: clients that were still there. */
int page_clients_close(struct page_clients *c, size_t *left);

#endif
