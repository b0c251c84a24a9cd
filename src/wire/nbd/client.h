/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The NBD client's parts: client.c (calls), link.c (one connection), dial.c (options, opening). */
#ifndef FAR_NBD_CLIENT_H
#define FAR_NBD_CLIENT_H

#include "backend/backend.h"
#include "wire/nbd/link.h"

#define FAR_NBD_CONNECTIONS 16

struct far_nbd_slot {
	struct far_nbd_link *link; /* NULL: none now */
	uint64_t born;             /* writes answered before it was made */
	bool used;                 /* there was one before */
};

struct far_nbd_client {
	/* fixed after open */
	struct far_nbd_peer peer;
	unsigned connections;
	uint64_t timeout;
	int cancel; /* eventfd: stopped */
	struct far_facts facts;
	/* atomic, relaxed: a call that fails looks whether that was us */
	_Atomic bool stopping;

	struct far_mutex lock;
	struct far_cond cond; /* a dial has ended, stop */
	struct far_nbd_slot slots[FAR_NBD_CONNECTIONS] FAR_GUARDED_BY(lock);
	struct far_nbd_export export FAR_GUARDED_BY(lock); /* does not change once known */
	bool opened FAR_GUARDED_BY(lock);                  /* facts are what every connection must show */
	bool known FAR_GUARDED_BY(lock);                   /* the server has described its export */
	bool dialing FAR_GUARDED_BY(lock), stopped FAR_GUARDED_BY(lock);
	int dial_error FAR_GUARDED_BY(lock);
	uint64_t dials FAR_GUARDED_BY(lock), dial_failed FAR_GUARDED_BY(lock);
	uint64_t writes FAR_GUARDED_BY(lock), flushed FAR_GUARDED_BY(lock), instance FAR_GUARDED_BY(lock);
	uint64_t connects FAR_GUARDED_BY(lock), reconnects FAR_GUARDED_BY(lock);
};

/* The peer is to be filled in by the caller; its strings are freed with the client. */
int far_nbd_client_new(unsigned connections, struct far_nbd_client **out);
void far_nbd_client_free(struct far_nbd_client *c);
/* The first connection: afterwards c->export is known. */
int far_nbd_client_contact(struct far_nbd_client *c, uint64_t until, struct far_error *err);
/* Make it a backend with these facts; opens the other connections, if the server is there and allows them. On failure c
 * is still the caller's. */
int far_nbd_client_start(struct far_nbd_client *c, const struct far_facts *facts, uint64_t until, struct far_backend **out);
/* The backend's read operation; far_backend_is() knows it by this. */
int far_nbd_client_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags);

#endif
