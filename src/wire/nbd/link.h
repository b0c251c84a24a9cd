/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* One connection of an NBD client. Callers share it: whoever waits for a reply reads those of others, too. */
#ifndef FAR_NBD_LINK_H
#define FAR_NBD_LINK_H

#include "base/thread.h"
#include "farpage.h"

/* How to reach the server; fixed. Strings are NULL where they do not apply. */
struct far_nbd_peer {
	char *where;  /* for messages */
	char *host;   /* TCP */
	char *socket; /* unix */
	char *export;
	int port;
	bool tls, tls_verify;
	char *tls_certificates, *tls_psk_file, *tls_username;
};

/* What the server says of its export. */
struct far_nbd_export {
	uint64_t bytes;
	uint32_t block, max_io; /* smallest, largest request */
	bool read_only, flush, fua, zero, multi, extents;
};

enum far_nbd_command { FAR_NBD_READ, FAR_NBD_WRITE, FAR_NBD_FLUSH, FAR_NBD_ZERO, FAR_NBD_EXTENTS };

/* One command. It and its buffer are not touched any more when far_nbd_link_call() returns, whatever it returns. */
struct far_nbd_op {
	enum far_nbd_command cmd;
	uint64_t off, len;
	void *in;
	const void *out;
	bool fua, hole;
	struct far_extent *extents;
	size_t max, n;

	/* link.c's */
	struct far_nbd_op *next;
	struct far_cond cond;
	_Atomic bool done;
	bool sent, lost; /* lost: the server may or may not have carried it out */
	int error;
	uint64_t seen, until;
	unsigned chunks;
};

struct far_nbd_link;

/* Connect and agree on everything. -ETIMEDOUT at `until`, -ESHUTDOWN when `cancel` can be read. */
int far_nbd_link_open(const struct far_nbd_peer *p, uint64_t until, int cancel, struct far_nbd_link **out,
		      struct far_nbd_export *e, struct far_error *err);
/* Many callers at once. -ETIMEDOUT at `until`: the connection is ended, since nothing else takes a buffer back. After an
 * error with op->lost, and after -ETIMEDOUT, the socket has been closed before this returns. */
int far_nbd_link_call(struct far_nbd_link *l, struct far_nbd_op *op, uint64_t until);
/* Whether calls can be made. An idle connection is looked at: one that the server has closed is not alive. */
bool far_nbd_link_alive(struct far_nbd_link *l);
unsigned far_nbd_link_pending(struct far_nbd_link *l);
/* End it; pending calls end with -ECONNRESET. Any thread. */
void far_nbd_link_break(struct far_nbd_link *l);
/* Wait until nothing of a broken one can reach the server any more. */
void far_nbd_link_wait_closed(struct far_nbd_link *l);
struct far_nbd_link *far_nbd_link_get(struct far_nbd_link *l);
void far_nbd_link_put(struct far_nbd_link *l); /* the last one says good-bye and frees it */

#endif
