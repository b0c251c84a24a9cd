/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "wire/nbd/refusal.h"

#include "base/base.h"

#include <errno.h>
#include <string.h>

/* What libnbd and GnuTLS say, and what it means. The first that fits counts. `when`: only over TLS with a shared key, or
 * without one. Without a code it was an alert, or else the connection may have been lost, which is tried again. */
static const struct refusal {
	const char *said;
	enum { ALWAYS, WITH_KEY, WITHOUT_KEY } when;
	int code;
	const char *means;
} refusals[] = {
	{ "requires TLS", ALWAYS, EACCES, "the server speaks TLS only: use nbds://" },
	{ "server refused TLS", ALWAYS, EPROTO, "the server speaks no TLS, and nbds:// sends nothing in the clear" },
	{ "certificate verification", ALWAYS, EACCES,
	  "the server's certificate is signed by an unknown authority, has expired, or is for another name; tls-certificates=DIR "
	  "says whom to believe" },
	{ "Insufficient credentials", WITH_KEY, EACCES,
	  "the server has a certificate and asks for no shared key: use tls-certificates=DIR" },
	{ "gnutls_handshake", WITH_KEY, 0, "the server does not know this name with this key" },
	{ "gnutls_handshake", WITHOUT_KEY, 0,
	  "the server has broken off the handshake of TLS; it may want a shared key (tls-psk-file=FILE), or another version" },
	{ "gnutls_record", WITHOUT_KEY, 0,
	  "the server has ended the connection after the handshake of TLS; it may want another client-cert.pem, or one at all" },
	{ "disconnected unexpectedly", WITHOUT_KEY, 0,
	  "the server has ended the connection; it may want another client-cert.pem, or one at all" },
};

const char *far_nbd_refusal(const char *text, bool tls, bool shared_key, int *code)
{
	for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
		const struct refusal *r = &refusals[i];
		if (!strstr(text, r->said) || (r->when != ALWAYS && (!tls || (r->when == WITH_KEY) != shared_key)))
			continue;
		*code = r->code ? r->code : strstr(text, "fatal alert") ? EACCES : ECONNRESET;
		return r->means;
	}
	return NULL;
}
