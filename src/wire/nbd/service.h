/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What each command does to an export. No connection, no waiting lines: see conn.c for those. */
#ifndef FAR_NBD_SERVICE_H
#define FAR_NBD_SERVICE_H

#include "wire/nbd/hello.h"

/* What was agreed on with one client. */
struct far_nbd_peer {
	/* fixed once transmission begins */
	const struct far_server_env *env;
	const struct far_export *e;
	enum far_nbd_form form;
	unsigned contexts;
	uint64_t size;
	uint32_t min, max;
	bool writable;
	bool fast_zero;  /* zeros cost less than writing them */
	bool memory;     /* no call waits for anything */
	/* atomic: something was written since the last flush that this client asked for; it has asked for one */
	_Atomic bool unflushed, flushes;
};

void far_nbd_peer_init(struct far_nbd_peer *peer, const struct far_nbd_hello *h);

/* Whether the request makes sense: 0, or -errno with a sentence. */
int far_nbd_check(const struct far_nbd_peer *peer, const struct far_nbd_request *q, const char **why);

/* Carry out a request that was checked. `data`: the bytes of a write, room for those of a read, else NULL. With FAR_NOWAIT
 * -EAGAIN: nothing is lost if it is done again without. 0 or -errno. Not for BLOCK_STATUS and DISC. */
int far_nbd_perform(struct far_nbd_peer *peer, const struct far_nbd_request *q, void *data, unsigned flags);

/* Read of a connection; iov[0] is a part of the export's memory at `off` (far_backend_place), and changes by it. As readv()
 * of far_conn_ops; -ECANCELED: it may not be changed, far_nbd_perform() tells why. */
ssize_t far_nbd_receive(struct far_nbd_peer *peer, uint64_t off, struct far_conn *conn, const struct iovec *iov, int n);

/* BLOCK_STATUS: all the chunks of its reply in *out, to be freed. 0, -EAGAIN with FAR_NOWAIT, -errno. */
int far_nbd_status(struct far_nbd_peer *peer, const struct far_nbd_request *q, unsigned flags, uint8_t **out, size_t *n);

/* Whether the reply to this read may say that all of it is zero, and it is. */
bool far_nbd_is_hole(const struct far_nbd_peer *peer, const void *data, size_t len);

/* A reply with an error and a sentence, or without where there is no room for one. At most FAR_NBD_FAIL_MAX bytes. */
#define FAR_NBD_FAIL_MAX 256
size_t far_nbd_put_fail(const struct far_nbd_peer *peer, uint8_t *p, const struct far_nbd_request *q, int err,
			const char *why);

#endif
