/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * TLS over any connection. A struct far_tls holds what does not belong to one connection: certificate, key, whom to trust,
 * shared keys. It is read from files, and read again on demand: connections that exist keep what they began with.
 *
 *     far_tls_new() -> far_tls_server() or far_tls_client() on a far_conn -> use it as any far_conn
 *
 * TLS 1.3, and 1.2 where it is asked for; no renegotiation, no resumption, no tickets. A server asks for a certificate if
 * it was told whom to trust, and refuses who has none. A client always checks the server's certificate and its name.
 */
#ifndef FAR_TLS_H
#define FAR_TLS_H

#include "net/net.h"

struct far_tls;

struct far_tls_opts {
	const char *cert; /* PEM: a certificate and those between it and the authority. NULL: none */
	const char *key;  /* PEM: its private key. NULL: it is in the same file */
	const char *ca;   /* PEM: who may sign the peer's certificate. NULL: client: the system's; server: no certificate is
			   * asked for */
	const char *psk;  /* lines "NAME:HEX": keys that both ends know, in place of certificates. NULL: none */
	const char *psk_name; /* client: whose line; NULL: the first */
	const char *alpn; /* "h2": client: offer it; server: take it, and refuse a client that offers only others. NULL: none */
	bool tls12;       /* 1.2 will do */
};

/* 0, or -errno with a sentence that names the file. */
int far_tls_new_server(const struct far_tls_opts *opts, struct far_tls **out, struct far_error *err);
int far_tls_new_client(const struct far_tls_opts *opts, struct far_tls **out, struct far_error *err);
/* Read the files again. On failure everything stays as it was. Any thread. */
int far_tls_reload(struct far_tls *t, struct far_error *err);
struct far_tls *far_tls_get(struct far_tls *t); /* one more reference; returns t */
void far_tls_put(struct far_tls *t);            /* NULL is fine */

/*
 * Put TLS over an open connection, at its beginning or after plain bytes were exchanged (STARTTLS). Nothing that the peer
 * sent may have been read ahead: what came before it was told to begin came from somebody who can speak in clear text
 * only, so whoever finds such bytes hangs up. The handshake is made by the first readv(), writev() or wait(), as far as
 * that goes without blocking. *conn stays the same to its user; on failure it is as it was. `name`: what the server's
 * certificate must be for, a DNS name or an address.
 */
int far_tls_server(struct far_tls *t, struct far_conn *conn);
int far_tls_client(struct far_tls *t, const char *name, struct far_conn *conn);
/* Make the handshake now. -EACCES: a check failed; -EPROTO: the peer speaks no TLS, or not ours; -ETIMEDOUT at `until`;
 * -ESHUTDOWN as soon as `cancel` (-1: none) can be read. Not on a connection without TLS. */
int far_tls_handshake(struct far_conn *conn, uint64_t until, int cancel, struct far_error *err);
bool far_conn_is_tls(const struct far_conn *conn);

/* Whether bytes that a peer sent first are the beginning of a TLS handshake, or its alert; n >= 3. */
static inline bool far_tls_looks_like(const uint8_t *p, size_t n)
{
	return n >= 3 && (p[0] == 0x16 || p[0] == 0x15) && p[1] == 3 && p[2] <= 4;
}

#endif
