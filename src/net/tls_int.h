/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What tls.c (connections), tls_keys.c (what they begin with) and tls_peer.c (whom they met) know of each other. */
#ifndef FAR_TLS_INT_H
#define FAR_TLS_INT_H

#include "net/tls.h"

#include <openssl/ssl.h>
#include <stdatomic.h>

#define FAR_PSK_MAX 64 /* bytes of a shared key */

struct far_tls_psk {
	char *name;
	uint8_t key[FAR_PSK_MAX];
	size_t n;
};

/* What the files held when they were read. It does not change; connections hold references. */
struct far_tls_keys {
	_Atomic unsigned refs;
	bool server;
	SSL_CTX *ctx;
	BIO_METHOD *bio;            /* carries bytes between OpenSSL and a connection's buffers */
	struct far_tls_psk *psk;
	size_t psk_n, psk_mine;     /* client: psk_mine is ours */
	uint8_t alpn[32];           /* as on the wire: a length byte and the name */
	size_t alpn_n;
};

/* The newest, with a reference. */
struct far_tls_keys *far_tls_keys_get(struct far_tls *t);
void far_tls_keys_put(struct far_tls_keys *k);

/* tls.c */
BIO_METHOD *far_tls_bio_method(void); /* NULL without memory */

/* In the application data of each SSL: what callbacks saw. */
struct far_tls_seen {
	char psk[128];   /* the name of the shared key that was used; "" none */
	char names[160]; /* of a certificate that was refused, for a message */
};

/* tls_peer.c */
/* Called for each certificate that is looked at. */
int far_tls_verify_cb(int ok, X509_STORE_CTX *store);
/* What went wrong, as a sentence: e is OpenSSL's error, 0: the peer hung up; `name`: whom a client expected. -errno. */
int far_tls_reason(SSL *ssl, const char *name, unsigned long e, char *buf, size_t n);
/* Note a name, or all of those in a certificate, once each, leaving out what could pass for another. 0 or -ENOMEM. */
int far_tls_peer_add(struct far_peer *p, const unsigned char *name, int n);
int far_tls_peer_certificate(struct far_peer *p, X509 *x);

#endif
