/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Negotiation: what a client and the server agree on before the first request. Bytes go in and come out; no connection. */
#ifndef FAR_NBD_HELLO_H
#define FAR_NBD_HELLO_H

#include "wire/nbd/proto.h"
#include "wire/server.h"

#define FAR_NBD_GREETING 18
#define FAR_NBD_OPTION_MAX 65536 /* bytes of an option that are looked at; what is longer is refused */

/* Metadata contexts; an id on the wire is one more than the number here. */
enum far_nbd_context {
	FAR_NBD_CONTEXT_ALLOCATION, /* base:allocation */
	FAR_NBD_CONTEXT_LOCAL,      /* farpage:local: 1: it is here */
	FAR_NBD_CONTEXT_DIRTY,      /* farpage:dirty: 1: newer here than on the remote */
	FAR_NBD_CONTEXTS
};

struct far_nbd_hello {
	/* fixed after init */
	const struct far_server_env *env;
	bool tls, required; /* the connection is encrypted; it must be */
	struct far_caller *who; /* set by the owner, before each feed where env->access is; freed with the rest */

	bool flags_seen, no_zeroes;
	enum far_nbd_form form;
	unsigned contexts;                    /* bit: enum far_nbd_context */
	const struct far_export *context_for; /* for which export they were chosen */
	unsigned options;                     /* how many have come */
	uint64_t skip;                        /* bytes of a refused option that are still to come */

	/* what is to be sent; the caller takes it and sets out_n to 0 */
	uint8_t *out;
	size_t out_n, out_cap;

	/* the end; one of them at most */
	const struct far_export *export; /* transmission of this export begins */
	bool over;                       /* once `out` is sent, hang up */
	bool starttls;                   /* once `out` is sent, encrypt: then far_nbd_hello_encrypted() */
};

/* *h is zeroed memory; the greeting is in `out`. -ENOMEM. */
int far_nbd_hello_init(struct far_nbd_hello *h, const struct far_server_env *env, bool tls_required);
void far_nbd_hello_fini(struct far_nbd_hello *h);
/* Take up to n bytes; *used tells how many. What was not used is to be given again with more behind it; nothing is used
 * after the end. -EPROTO: no sense can be made of it, -ENOMEM. */
int far_nbd_hello_feed(struct far_nbd_hello *h, const uint8_t *p, size_t n, size_t *used);
/* Everything that was said in the clear is forgotten. */
void far_nbd_hello_encrypted(struct far_nbd_hello *h);

/* Of an export, in the form that was agreed on. */
uint16_t far_nbd_export_flags(const struct far_nbd_hello *h, const struct far_export *e);
/* Whether the caller may change it, and it can be changed. */
bool far_nbd_writable(const struct far_nbd_hello *h, const struct far_export *e);
/* Smallest unit of a request; 0: the export cannot be served. */
uint32_t far_nbd_min_block(const struct far_export *e);
uint32_t far_nbd_max_block(const struct far_server_env *env, const struct far_export *e);

#endif
