/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Certificates, keys, authorities and shared keys: read, checked, and replaced as a whole.
 *
 *     far_tls --cur--> far_tls_keys <--- a reference --- each connection that began with it
 *
 * A reload makes a new far_tls_keys from the same file names, and only when all of it is good puts it in the place of the
 * old one. The old one goes with the last connection that uses it.
 */
#define _GNU_SOURCE
#include "net/tls_int.h"

#include "base/thread.h"

#include <openssl/err.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEYS_PSK_FILE_MAX (1 << 20)
#define KEYS_PSK_LINES_MAX 4096

struct far_tls {
	_Atomic unsigned refs;
	/* fixed */
	bool server, tls12;
	char *cert, *key, *ca, *psk, *psk_name, *alpn;

	struct far_mutex lock;
	struct far_tls_keys *cur FAR_GUARDED_BY(lock);
};

/* The first error of OpenSSL's list as text, without its codes; the list is empty afterwards. */
static const char *keys_reason(char *buf, size_t n)
{
	unsigned long e = ERR_peek_error();
	const char *text = e ? ERR_reason_error_string(e) : NULL;

	if (e && ERR_SYSTEM_ERROR(e))
		snprintf(buf, n, "%s", far_strerror(ERR_GET_REASON(e)));
	else
		snprintf(buf, n, "%s", text ? text : "unknown error");
	ERR_clear_error();
	return buf;
}

/* ------------------------------------------------------------------------------------------------ shared keys */

static void keys_psk_free(struct far_tls_keys *k)
{
	for (size_t i = 0; i < k->psk_n; i++) {
		free(k->psk[i].name);
		OPENSSL_cleanse(k->psk[i].key, sizeof k->psk[i].key);
	}
	free(k->psk);
}

static int keys_hex(const char *text, uint8_t *out, size_t cap, size_t *n)
{
	size_t len = strlen(text);

	if (len % 2 || len / 2 > cap || len < 32)
		return -EINVAL;
	for (size_t i = 0; i < len / 2; i++) {
		int hi = OPENSSL_hexchar2int((unsigned char)text[2 * i]), lo = OPENSSL_hexchar2int((unsigned char)text[2 * i + 1]);
		if (hi < 0 || lo < 0)
			return -EINVAL;
		out[i] = (uint8_t)(hi * 16 + lo);
	}
	*n = len / 2;
	return 0;
}

static int keys_psk_line(struct far_tls_keys *k, char *line)
{
	char *colon = strrchr(line, ':');

	if (!colon || colon == line || colon - line > 127 || k->psk_n == KEYS_PSK_LINES_MAX)
		return -EINVAL;
	struct far_tls_psk *list = realloc(k->psk, (k->psk_n + 1) * sizeof *list);
	if (!list)
		return -ENOMEM;
	k->psk = list;
	struct far_tls_psk *p = &list[k->psk_n];
	*p = (struct far_tls_psk){ .name = strndup(line, (size_t)(colon - line)) };
	if (!p->name)
		return -ENOMEM;
	k->psk_n++;
	return keys_hex(colon + 1, p->key, sizeof p->key, &p->n);
}

static int keys_psk_read(struct far_tls_keys *k, const char *path, struct far_error *err)
{
	FILE *f = fopen(path, "re");
	char *line = NULL;
	size_t cap = 0, bytes = 0, number = 0;
	int r = f ? 0 : -errno;

	if (r)
		return far_error_set(err, -r, "the file of shared keys %s cannot be read: %s", path, far_strerror(r));
	for (ssize_t n; r == 0 && (n = getline(&line, &cap, f)) >= 0;) {
		number++;
		line[strcspn(line, "\r\n")] = 0;
		bytes += (size_t)n;
		if (bytes > KEYS_PSK_FILE_MAX)
			r = -EFBIG;
		else if (line[0] && line[0] != '#')
			r = keys_psk_line(k, line);
	}
	if (line)
		OPENSSL_cleanse(line, cap);
	free(line);
	fclose(f);
	if (r == -EINVAL)
		return far_error_set(err, EINVAL, "line %zu of the file of shared keys %s is not NAME:HEX with 16 to %d bytes of key",
				     number, path, FAR_PSK_MAX);
	if (r)
		return far_error_set(err, -r, "the file of shared keys %s cannot be read: %s", path, far_strerror(r));
	if (!k->psk_n)
		return far_error_set(err, EINVAL, "the file of shared keys %s has no line NAME:HEX", path);
	return 0;
}

static int keys_psk_pick(struct far_tls_keys *k, const char *name, const char *path, struct far_error *err)
{
	for (size_t i = 0; name && i < k->psk_n; i++)
		if (!strcmp(k->psk[i].name, name)) {
			k->psk_mine = i;
			return 0;
		}
	return name ? far_error_set(err, ENOENT, "the file of shared keys %s has no line for '%s'", path, name) : 0;
}

static unsigned keys_psk_server_cb(SSL *ssl, const char *identity, unsigned char *psk, unsigned max)
{
	const struct far_tls_keys *k = SSL_CTX_get_app_data(SSL_get_SSL_CTX(ssl));
	struct far_tls_seen *seen = SSL_get_app_data(ssl);
	const struct far_tls_psk *found = NULL;

	for (size_t i = 0; identity && i < k->psk_n; i++)
		if (!strcmp(k->psk[i].name, identity))
			found = &k->psk[i];
	if (!found || found->n > max)
		return 0;
	snprintf(seen->psk, sizeof seen->psk, "%s", found->name);
	memcpy(psk, found->key, found->n);
	return (unsigned)found->n;
}

static unsigned keys_psk_client_cb(SSL *ssl, const char *hint, char *identity, unsigned identity_max, unsigned char *psk,
				   unsigned max)
{
	const struct far_tls_keys *k = SSL_CTX_get_app_data(SSL_get_SSL_CTX(ssl));
	const struct far_tls_psk *p = &k->psk[k->psk_mine];

	if (strlen(p->name) >= identity_max || p->n > max)
		return 0;
	strcpy(identity, p->name);
	memcpy(psk, p->key, p->n);
	return (unsigned)p->n;
}

/* ----------------------------------------------------------------------------------------------- certificates */

/* A key that wants a passphrase is refused: a server that waits for a person is none. */
static int keys_no_passphrase(char *buf, int size, int rw, void *opaque)
{
	*(bool *)opaque = true;
	return -1;
}

static int keys_certificate(struct far_tls *t, SSL_CTX *ctx, struct far_error *err)
{
	const char *key = t->key ? t->key : t->cert;
	bool encrypted = false;
	char why[120];

	if (SSL_CTX_use_certificate_chain_file(ctx, t->cert) != 1)
		return far_error_set(err, EINVAL, "the certificate %s cannot be used: %s", t->cert, keys_reason(why, sizeof why));
	SSL_CTX_set_default_passwd_cb(ctx, keys_no_passphrase);
	SSL_CTX_set_default_passwd_cb_userdata(ctx, &encrypted);
	int ok = SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM);
	SSL_CTX_set_default_passwd_cb_userdata(ctx, NULL);
	SSL_CTX_set_default_passwd_cb(ctx, NULL);
	if (encrypted) {
		ERR_clear_error();
		return far_error_set(err, EINVAL, "the key %s is encrypted with a passphrase; store it without one, readable by its "
				     "owner only", key);
	}
	if (ok != 1 && ERR_GET_REASON(ERR_peek_last_error()) == X509_R_KEY_VALUES_MISMATCH) {
		ERR_clear_error();
		return far_error_set(err, EINVAL, "the key %s does not belong to the certificate %s", key, t->cert);
	}
	if (ok != 1)
		return far_error_set(err, EINVAL, "the key %s cannot be used: %s", key, keys_reason(why, sizeof why));
	if (SSL_CTX_check_private_key(ctx) != 1) {
		ERR_clear_error();
		return far_error_set(err, EINVAL, "the key %s does not belong to the certificate %s", key, t->cert);
	}
	X509 *own = SSL_CTX_get0_certificate(ctx);
	if (own && X509_cmp_current_time(X509_get0_notAfter(own)) < 0)
		far_log(FAR_LOG_WARNING, "the certificate %s has expired: peers will refuse it", t->cert);
	return 0;
}

static int keys_authorities(struct far_tls *t, SSL_CTX *ctx, struct far_error *err)
{
	char why[120];

	if (t->ca && SSL_CTX_load_verify_file(ctx, t->ca) != 1)
		return far_error_set(err, EINVAL, "the certificates of authorities %s cannot be used: %s", t->ca,
				     keys_reason(why, sizeof why));
	if (t->server && t->ca) {
		STACK_OF(X509_NAME) *names = SSL_load_client_CA_file(t->ca); /* tells clients whose certificate will do */
		if (names)
			SSL_CTX_set_client_CA_list(ctx, names);
		SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, far_tls_verify_cb);
	} else if (!t->server) {
		if (!t->ca && SSL_CTX_set_default_verify_paths(ctx) != 1)
			return far_error_set(err, EINVAL, "the system's authorities cannot be used: %s", keys_reason(why, sizeof why));
		SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, far_tls_verify_cb);
	}
	ERR_clear_error();
	return 0;
}

static int keys_alpn_cb(SSL *ssl, const unsigned char **out, unsigned char *out_n, const unsigned char *in, unsigned in_n,
			void *opaque)
{
	const struct far_tls_keys *k = opaque;

	for (unsigned at = 0; at < in_n && in[at] < in_n - at; at += 1u + in[at])
		if (in[at] + 1u == k->alpn_n && !memcmp(in + at, k->alpn, k->alpn_n)) {
			*out = in + at + 1;
			*out_n = in[at];
			return SSL_TLSEXT_ERR_OK;
		}
	return SSL_TLSEXT_ERR_ALERT_FATAL;
}

static void keys_alpn(struct far_tls *t, struct far_tls_keys *k)
{
	size_t n = t->alpn ? strlen(t->alpn) : 0;

	if (!n || n >= sizeof k->alpn)
		return;
	k->alpn[0] = (uint8_t)n;
	memcpy(k->alpn + 1, t->alpn, n);
	k->alpn_n = n + 1;
	if (t->server)
		SSL_CTX_set_alpn_select_cb(k->ctx, keys_alpn_cb, k);
	else
		(void)SSL_CTX_set_alpn_protos(k->ctx, k->alpn, (unsigned)k->alpn_n);
}

static int keys_shape(struct far_tls *t, SSL_CTX *ctx)
{
	SSL_CTX_set_options(ctx, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION | SSL_OP_NO_TICKET |
				 SSL_OP_CIPHER_SERVER_PREFERENCE);
	SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_num_tickets(ctx, 0);
	/* Without it a shared key is refused where certificates are asked for. */
	(void)SSL_CTX_set_session_id_context(ctx, (const unsigned char *)"farpage", 7);
	SSL_CTX_set_security_level(ctx, 2);
	if (!SSL_CTX_set_min_proto_version(ctx, t->tls12 ? TLS1_2_VERSION : TLS1_3_VERSION))
		return -EINVAL;
	/* AES with 128 bits first: it is what a shared key goes with in TLS 1.3, and a fifth faster. */
	if (!SSL_CTX_set_ciphersuites(ctx, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"))
		return -EINVAL;
	const char *old = t->psk ? "ECDHE+AESGCM:ECDHE+CHACHA20:ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES128-GCM-SHA256:"
				   "DHE-PSK-AES256-GCM-SHA384" : "ECDHE+AESGCM:ECDHE+CHACHA20";
	return SSL_CTX_set_cipher_list(ctx, old) ? 0 : -EINVAL;
}

static int keys_fill(struct far_tls *t, struct far_tls_keys *k, struct far_error *err)
{
	char why[120];

	k->ctx = SSL_CTX_new(t->server ? TLS_server_method() : TLS_client_method());
	k->bio = far_tls_bio_method();
	if (!k->ctx || !k->bio || keys_shape(t, k->ctx))
		return far_error_set(err, EINVAL, "TLS cannot be set up: %s", keys_reason(why, sizeof why));
	SSL_CTX_set_app_data(k->ctx, k);
	int r = t->cert ? keys_certificate(t, k->ctx, err) : 0;
	if (r == 0)
		r = keys_authorities(t, k->ctx, err);
	if (r == 0 && t->psk)
		r = keys_psk_read(k, t->psk, err);
	if (r == 0 && t->psk && !t->server)
		r = keys_psk_pick(k, t->psk_name, t->psk, err);
	if (r == 0 && t->psk && t->server)
		SSL_CTX_set_psk_server_callback(k->ctx, keys_psk_server_cb);
	if (r == 0 && t->psk && !t->server)
		SSL_CTX_set_psk_client_callback(k->ctx, keys_psk_client_cb);
	if (r == 0)
		keys_alpn(t, k);
	return r;
}

static int keys_new(struct far_tls *t, struct far_tls_keys **out, struct far_error *err)
{
	struct far_tls_keys *k = calloc(1, sizeof *k);

	if (!k)
		return far_error_set(err, ENOMEM, "out of memory");
	atomic_init(&k->refs, 1);
	k->server = t->server;
	ERR_clear_error();
	int r = keys_fill(t, k, err);
	if (r)
		far_tls_keys_put(k);
	else
		*out = k;
	return r;
}

void far_tls_keys_put(struct far_tls_keys *k)
{
	if (!k || atomic_fetch_sub_explicit(&k->refs, 1, memory_order_acq_rel) != 1)
		return;
	SSL_CTX_free(k->ctx);
	BIO_meth_free(k->bio);
	keys_psk_free(k);
	free(k);
}

struct far_tls_keys *far_tls_keys_get(struct far_tls *t)
{
	far_mutex_lock(&t->lock);
	struct far_tls_keys *k = t->cur;
	atomic_fetch_add_explicit(&k->refs, 1, memory_order_relaxed);
	far_mutex_unlock(&t->lock);
	return k;
}

/* ------------------------------------------------------------------------------------------------------ far_tls */

static bool keys_copy(char **to, const char *from)
{
	*to = from ? strdup(from) : NULL;
	return !from || *to;
}

static int keys_open(bool server, const struct far_tls_opts *o, struct far_tls **out, struct far_error *err)
{
	struct far_tls *t = calloc(1, sizeof *t);

	if (!t)
		return far_error_set(err, ENOMEM, "out of memory");
	atomic_init(&t->refs, 1);
	far_mutex_init(&t->lock);
	t->server = server;
	t->tls12 = o->tls12;
	int r = keys_copy(&t->cert, o->cert) && keys_copy(&t->key, o->key) && keys_copy(&t->ca, o->ca) &&
		keys_copy(&t->psk, o->psk) && keys_copy(&t->psk_name, o->psk_name) && keys_copy(&t->alpn, o->alpn) ?
		0 : far_error_set(err, ENOMEM, "out of memory");
	if (r == 0 && server && !o->cert && !o->psk)
		r = far_error_set(err, EINVAL, "TLS needs a certificate (and its key), or a file of shared keys");
	if (r == 0 && o->key && !o->cert)
		r = far_error_set(err, EINVAL, "the key %s has no certificate with it", o->key);
	struct far_tls_keys *k = NULL;
	if (r == 0)
		r = keys_new(t, &k, err);
	far_mutex_lock(&t->lock);
	t->cur = k;
	far_mutex_unlock(&t->lock);
	if (r)
		far_tls_put(t);
	else
		*out = t;
	return r;
}

int far_tls_new_server(const struct far_tls_opts *opts, struct far_tls **out, struct far_error *err)
{
	return keys_open(true, opts, out, err);
}

int far_tls_new_client(const struct far_tls_opts *opts, struct far_tls **out, struct far_error *err)
{
	return keys_open(false, opts, out, err);
}

int far_tls_reload(struct far_tls *t, struct far_error *err)
{
	struct far_tls_keys *k;
	int r = keys_new(t, &k, err);

	if (r)
		return r;
	far_mutex_lock(&t->lock);
	struct far_tls_keys *old = t->cur;
	t->cur = k;
	far_mutex_unlock(&t->lock);
	far_tls_keys_put(old);
	return 0;
}

struct far_tls *far_tls_get(struct far_tls *t)
{
	atomic_fetch_add_explicit(&t->refs, 1, memory_order_relaxed);
	return t;
}

void far_tls_put(struct far_tls *t) FAR_NO_TSA
{
	if (!t || atomic_fetch_sub_explicit(&t->refs, 1, memory_order_acq_rel) != 1)
		return;
	far_tls_keys_put(t->cur);
	far_mutex_fini(&t->lock);
	free(t->cert);
	free(t->key);
	free(t->ca);
	free(t->psk);
	free(t->psk_name);
	free(t->alpn);
	free(t);
}
