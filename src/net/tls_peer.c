/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Who is at the other end of a TLS connection: the names that a certificate carries, and, when the two did not come to
 * terms, a sentence that says why. Nothing here has a state; tls.c calls it with its connection's lock held.
 */
#include "net/tls_int.h"

#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------------------------------------------ why it failed */

/* The names that a certificate carries, for a message. */
static void peer_names_of(X509 *x, char *buf, size_t n)
{
	GENERAL_NAMES *list = X509_get_ext_d2i(x, NID_subject_alt_name, NULL, NULL);
	size_t at = 0;

	buf[0] = 0;
	for (int i = 0; i < sk_GENERAL_NAME_num(list) && at < n; i++) {
		GENERAL_NAME *g = sk_GENERAL_NAME_value(list, i);
		if (g->type == GEN_DNS)
			at += (size_t)snprintf(buf + at, n - at, "%s%.*s", at ? ", " : "", ASN1_STRING_length(g->d.dNSName),
					       (const char *)ASN1_STRING_get0_data(g->d.dNSName));
		char text[INET6_ADDRSTRLEN];
		int len = g->type == GEN_IPADD ? ASN1_STRING_length(g->d.iPAddress) : 0;
		if ((len == 4 || len == 16) &&
		    inet_ntop(len == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(g->d.iPAddress), text, sizeof text))
			at += (size_t)snprintf(buf + at, n - at, "%s%s", at ? ", " : "", text);
	}
	GENERAL_NAMES_free(list);
	if (!buf[0])
		X509_NAME_get_text_by_NID(X509_get_subject_name(x), NID_commonName, buf, (int)n);
	for (char *p = buf; *p; p++)
		if ((unsigned char)*p < ' ' || *p == 127)
			*p = '?';
}

int far_tls_verify_cb(int ok, X509_STORE_CTX *store)
{
	SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
	struct far_tls_seen *seen = ssl ? SSL_get_app_data(ssl) : NULL;
	X509 *x = X509_STORE_CTX_get0_cert(store);

	if (!ok && seen && x)
		peer_names_of(x, seen->names, sizeof seen->names);
	return ok;
}

static void peer_why_certificate(SSL *ssl, const char *name, char *buf, size_t n)
{
	const struct far_tls_seen *seen = SSL_get_app_data(ssl);
	const char *whose = SSL_is_server(ssl) ? "the client's" : "the server's";
	long v = SSL_get_verify_result(ssl);

	switch (v) {
	case X509_V_ERR_CERT_HAS_EXPIRED:
		snprintf(buf, n, "%s certificate has expired", whose);
		break;
	case X509_V_ERR_CERT_NOT_YET_VALID:
		snprintf(buf, n, "%s certificate is not valid yet; is the clock right?", whose);
		break;
	case X509_V_ERR_HOSTNAME_MISMATCH:
	case X509_V_ERR_IP_ADDRESS_MISMATCH:
		snprintf(buf, n, "the server's certificate is for another name: for %.120s, not for %.80s; tls-name= "
			 "says which one to expect", seen->names[0] ? seen->names : "nobody", name);
		break;
	case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
	case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
	case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
	case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
	case X509_V_ERR_CERT_SIGNATURE_FAILURE:
	case X509_V_ERR_CERT_UNTRUSTED:
		snprintf(buf, n, "%s certificate is signed by an unknown authority (%s); tls-ca says whom to trust", whose,
			 X509_verify_cert_error_string(v));
		break;
	default:
		snprintf(buf, n, "%s certificate was refused: %s", whose, X509_verify_cert_error_string(v));
	}
}

/* Sentences for what OpenSSL found and for what the peer said. */
static const struct peer_reason {
	int reason, code;
	const char *text;
} peer_reasons[] = {
	{ SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE, EACCES, "the client has shown no certificate" },
	{ SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED, EACCES, "the server wants a certificate: give tls-cert and tls-key" },
	{ SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED, EACCES, "the peer says that our certificate has expired" },
	{ SSL_R_SSLV3_ALERT_BAD_CERTIFICATE, EACCES, "the peer refuses our certificate" },
	{ SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN, EACCES, "the peer refuses our certificate" },
	{ SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE, EACCES, "the peer has no use for our certificate: is it for this purpose?" },
	{ SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED, EACCES, "the peer says that our certificate was revoked" },
	{ SSL_R_TLSV1_ALERT_UNKNOWN_CA, EACCES, "the peer does not know the authority that signed our certificate" },
	{ SSL_R_TLSV1_ALERT_ACCESS_DENIED, EACCES, "the peer refuses us" },
	{ SSL_R_TLSV1_ALERT_DECRYPT_ERROR, EACCES, "the peer has another shared key for our name, or found our signature wrong" },
	{ SSL_R_PSK_IDENTITY_NOT_FOUND, EACCES, "the client's name is not in the file of shared keys" },
	{ SSL_R_BINDER_DOES_NOT_VERIFY, EACCES, "the client has another shared key for its name" },
	{ SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC, EPROTO, "bytes were changed on their way, or the shared keys differ" },
	{ SSL_R_HTTP_REQUEST, EPROTO, "the peer speaks in clear text, this is a TLS connection" },
	{ SSL_R_HTTPS_PROXY_REQUEST, EPROTO, "the peer speaks in clear text, this is a TLS connection" },
	{ SSL_R_WRONG_VERSION_NUMBER, EPROTO, "the peer speaks no TLS: is it a port for clear text?" },
	{ SSL_R_PACKET_LENGTH_TOO_LONG, EPROTO, "the peer speaks no TLS: is it a port for clear text?" },
	{ SSL_R_BAD_RECORD_TYPE, EPROTO, "the peer speaks no TLS: is it a port for clear text?" },
	{ SSL_R_UNEXPECTED_MESSAGE, EPROTO, "the peer speaks no TLS: is it a port for clear text?" },
	{ SSL_R_UNSUPPORTED_PROTOCOL, EPROTO, "the peer's newest version of TLS is too old; tls-min=1.2 allows 1.2" },
	{ SSL_R_VERSION_TOO_LOW, EPROTO, "the peer's newest version of TLS is too old; tls-min=1.2 allows 1.2" },
	{ SSL_R_TLSV1_ALERT_PROTOCOL_VERSION, EPROTO, "the peer refuses our version of TLS, or we spoke no TLS" },
	{ SSL_R_NO_SHARED_CIPHER, EPROTO, "no cipher in common; does one of us have shared keys only?" },
	{ SSL_R_SSLV3_ALERT_HANDSHAKE_FAILURE, EPROTO, "the peer found nothing in common: ciphers, certificates or shared keys" },
	{ SSL_R_NO_APPLICATION_PROTOCOL, EPROTO, "no protocol in common (ALPN): is this the right port?" },
	{ SSL_R_TLSV1_ALERT_NO_APPLICATION_PROTOCOL, EPROTO, "no protocol in common (ALPN): is this the right port?" },
	{ SSL_R_UNEXPECTED_EOF_WHILE_READING, ECONNRESET, "" },
};

int far_tls_reason(SSL *ssl, const char *name, unsigned long e, char *buf, size_t n)
{
	const struct peer_reason *known = NULL;

	if (ERR_GET_LIB(e) == ERR_LIB_SSL && ERR_GET_REASON(e) == SSL_R_CERTIFICATE_VERIFY_FAILED) {
		peer_why_certificate(ssl, name, buf, n);
		return -EACCES;
	}
	for (size_t i = 0; i < FAR_ARRAY_LEN(peer_reasons) && ERR_GET_LIB(e) == ERR_LIB_SSL; i++)
		if (peer_reasons[i].reason == ERR_GET_REASON(e))
			known = &peer_reasons[i];
	const char *text = known ? known->text : e ? ERR_reason_error_string(e) : "";
	snprintf(buf, n, "%s", text ? text : "unknown error of TLS");
	return known ? -known->code : e ? -EPROTO : -ECONNRESET;
}

/* ------------------------------------------------------------------------------------------------- what it is called */

int far_tls_peer_add(struct far_peer *p, const unsigned char *name, int n)
{
	if (n <= 0 || n > 255)
		return 0;
	for (int i = 0; i < n; i++)
		if (name[i] < ' ' || name[i] == 127) /* nothing that could pass for another name */
			return 0;
	for (size_t i = 0; i < p->n; i++)
		if (strlen(p->names[i]) == (size_t)n && !memcmp(p->names[i], name, (size_t)n))
			return 0;
	char **list = realloc(p->names, (p->n + 1) * sizeof *list);
	if (!list)
		return -ENOMEM;
	p->names = list;
	list[p->n] = strndup((const char *)name, (size_t)n);
	return list[p->n++] ? 0 : -ENOMEM;
}

int far_tls_peer_certificate(struct far_peer *p, X509 *x)
{
	GENERAL_NAMES *list = X509_get_ext_d2i(x, NID_subject_alt_name, NULL, NULL);
	int r = 0;

	for (int i = 0; i < sk_GENERAL_NAME_num(list) && r == 0; i++) {
		GENERAL_NAME *g = sk_GENERAL_NAME_value(list, i);
		if (g->type == GEN_DNS || g->type == GEN_EMAIL || g->type == GEN_URI)
			r = far_tls_peer_add(p, ASN1_STRING_get0_data(g->d.ia5), ASN1_STRING_length(g->d.ia5));
	}
	GENERAL_NAMES_free(list);
	X509_NAME *subject = X509_get_subject_name(x);
	for (int at = -1; r == 0 && (at = X509_NAME_get_index_by_NID(subject, NID_commonName, at)) >= 0;) {
		unsigned char *text = NULL;
		int n = ASN1_STRING_to_UTF8(&text, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)));
		r = far_tls_peer_add(p, text, n);
		OPENSSL_free(text);
	}
	return r;
}
