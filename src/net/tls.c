/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One connection under TLS. OpenSSL never sees the descriptor: it takes encrypted bytes from `in` and puts them into `out`,
 * under `lock`, and the system calls that fill one and empty the other are made without the lock.
 *
 *     inner --tls_fill--> in --SSL--> the reader's buffers          SHAKING -> OPEN -> FAILED (sticky; or `ended`)
 *     inner <--tls_flush-- out <--SSL-- the writer's buffers           ^__ tls_shake() until OpenSSL says that it is done
 *
 * Invariants:
 *  1. An SSL object belongs to one thread at a time: whoever calls OpenSSL holds `lock`. The lock is held for some records
 *     at most, never across a system call.
 *  2. One thread fills (`filling`), one flushes (`flushing`); another one that wants to is told -EAGAIN. in_n and the start
 *     of `in` are the filler's, in_at is OpenSSL's; out_at and the start of `out` are the flusher's, out_n is OpenSSL's. So
 *     neither buffer moves under a system call.
 *  3. Plain bytes are reported as written only when their records have gone to the system. Those that are encrypted already
 *     while the records wait (`owed`) are skipped when the caller comes again with them, as far_conn_ops demands. So nothing
 *     is ever left behind for a caller who has no reason to come again, but what the handshake made; wait() sends that.
 *  4. OpenSSL is given plain bytes only when `out` has room for the record, so that it never keeps half of one to itself.
 *
 * A record holds 16 KiB. Small pieces are gathered into one; long ones are encrypted from where they lie.
 */
#include "net/tls_int.h"

#include "base/pool.h"
#include "base/thread.h"

#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TLS_RECORD 16384
#define TLS_TELL (10 * FAR_SEC)
#define TLS_RECORD_ROOM (TLS_RECORD + 512)    /* encrypted; a message of the handshake may come before it */
#define TLS_BATCH 7                           /* records a system call: with them `out` stays within 128 KiB */
#define TLS_BUFFER (128 * FAR_KIB)
#define TLS_SLICE (20 * FAR_MSEC)

struct tls_conn {
	/* fixed */
	struct far_conn inner;
	struct far_tls_keys *keys;
	char *name;         /* client: whom the certificate must name */
	uint8_t *in, *out;
	uint8_t *stage;     /* the writer's: small pieces of one record */

	struct far_mutex lock;
	SSL *ssl FAR_GUARDED_BY(lock);
	size_t in_at FAR_GUARDED_BY(lock), in_n FAR_GUARDED_BY(lock);
	size_t out_at FAR_GUARDED_BY(lock), out_n FAR_GUARDED_BY(lock);
	size_t owed FAR_GUARDED_BY(lock);
	bool filling FAR_GUARDED_BY(lock), flushing FAR_GUARDED_BY(lock);
	bool open FAR_GUARDED_BY(lock);      /* the handshake is done */
	bool ended FAR_GUARDED_BY(lock);     /* `inner` has no more to read */
	bool farewell FAR_GUARDED_BY(lock);  /* the peer has said that it is its end */
	int error FAR_GUARDED_BY(lock);
	char why[300] FAR_GUARDED_BY(lock);
	bool told FAR_GUARDED_BY(lock);      /* why a client was refused */
	struct far_tls_seen seen FAR_GUARDED_BY(lock);
};

/* Where a caller's pieces have been used up to. */
struct tls_cursor {
	const struct iovec *iov;
	int n;
	size_t at; /* in the first */
};

static void tls_skip(struct tls_cursor *c, size_t k)
{
	while (c->n && k >= c->iov->iov_len - c->at) {
		k -= c->iov->iov_len - c->at;
		c->iov++;
		c->n--;
		c->at = 0;
	}
	c->at += c->n ? k : 0;
}

static struct tls_conn *tls_of(const struct far_conn *c)
{
	return c->state;
}

/* --------------------------------------------------------------------------------- what OpenSSL reads and writes */

/* Called by OpenSSL, under the lock. */
static int tls_bio_read(BIO *b, char *buf, int n) FAR_NO_TSA
{
	struct tls_conn *t = BIO_get_data(b);
	size_t k = (size_t)far_min((uint64_t)n, t->in_n - t->in_at);

	BIO_clear_retry_flags(b);
	if (!k && !t->ended)
		BIO_set_retry_read(b);
	if (!k)
		return t->ended ? 0 : -1;
	memcpy(buf, t->in + t->in_at, k);
	t->in_at += k;
	return (int)k;
}

static int tls_bio_write(BIO *b, const char *buf, int n) FAR_NO_TSA
{
	struct tls_conn *t = BIO_get_data(b);
	size_t k = (size_t)far_min((uint64_t)n, TLS_BUFFER - t->out_n);

	BIO_clear_retry_flags(b);
	if (!k) {
		BIO_set_retry_write(b);
		return -1;
	}
	memcpy(t->out + t->out_n, buf, k);
	t->out_n += k;
	return (int)k;
}

static long tls_bio_ctrl(BIO *b, int cmd, long num, void *ptr) FAR_NO_TSA
{
	struct tls_conn *t = BIO_get_data(b);

	if (cmd == BIO_CTRL_EOF)
		return t->ended && t->in_at == t->in_n;
	return cmd == BIO_CTRL_FLUSH || cmd == BIO_CTRL_DUP;
}

BIO_METHOD *far_tls_bio_method(void)
{
	BIO_METHOD *m = BIO_meth_new(BIO_TYPE_SOURCE_SINK, "far_conn");

	if (!m)
		return NULL;
	BIO_meth_set_read(m, tls_bio_read);
	BIO_meth_set_write(m, tls_bio_write);
	BIO_meth_set_ctrl(m, tls_bio_ctrl);
	return m;
}

/* ------------------------------------------------------------------------------------------------- what failed */

static int tls_fail(struct tls_conn *t, int err) FAR_REQUIRES(t->lock)
{
	if (!t->error)
		t->error = err;
	return t->error;
}

/* A client that speaks in clear text to a TLS port is answered with an alert by hand: OpenSSL says nothing then, and a
 * client of ours knows by it what is wrong. */
static void tls_say_version(struct tls_conn *t) FAR_REQUIRES(t->lock)
{
	static const uint8_t alert[] = { 0x15, 3, 3, 0, 2, 2, 70 };

	if (t->keys->server && !t->out_n) {
		memcpy(t->out, alert, sizeof alert);
		t->out_n = sizeof alert;
	}
}

/* OpenSSL has failed: find out what it was, once. */
static int tls_fail_ssl(struct tls_conn *t) FAR_REQUIRES(t->lock)
{
	unsigned long e = ERR_peek_error();
	int reason = ERR_GET_REASON(e);

	if (t->error) {
		ERR_clear_error();
		return t->error;
	}
	int code = far_tls_reason(t->ssl, t->name, e, t->why, sizeof t->why);
	if (!t->open && (reason == SSL_R_HTTP_REQUEST || reason == SSL_R_WRONG_VERSION_NUMBER))
		tls_say_version(t);
	ERR_clear_error();
	return tls_fail(t, code);
}

/* ------------------------------------------------------------------------------------------------- moving bytes */

/* Send what is encrypted. 0: all is out; -EAGAIN: there is no room, or somebody else sends; or -errno. */
static int tls_flush(struct tls_conn *t) FAR_REQUIRES(t->lock)
{
	while (t->out_at < t->out_n) {
		struct iovec v = { t->out + t->out_at, t->out_n - t->out_at };
		if (t->flushing)
			return -EAGAIN;
		t->flushing = true;
		far_mutex_unlock(&t->lock);
		ssize_t k = t->inner.ops->writev(&t->inner, &v, 1);
		far_mutex_lock(&t->lock);
		t->flushing = false;
		if (k == -EAGAIN)
			return -EAGAIN;
		if (k <= 0)
			return tls_fail(t, k ? (int)k : -EPIPE);
		t->out_at += (size_t)k;
		if (t->out_at == t->out_n)
			t->out_at = t->out_n = 0;
	}
	return 0;
}

/* Get encrypted bytes; those that came before are used up. Their number, 0 at the end, or -EAGAIN, -errno. */
static ssize_t tls_fill(struct tls_conn *t) FAR_REQUIRES(t->lock)
{
	if (t->ended)
		return 0;
	if (t->filling || t->in_at < t->in_n)
		return t->filling ? -EAGAIN : (ssize_t)(t->in_n - t->in_at);
	struct iovec v = { t->in, TLS_BUFFER };
	t->filling = true;
	t->in_at = t->in_n = 0;
	far_mutex_unlock(&t->lock);
	ssize_t k = t->inner.ops->readv(&t->inner, &v, 1);
	far_mutex_lock(&t->lock);
	t->filling = false;
	if (k > 0)
		t->in_n = (size_t)k;
	else if (k == 0)
		t->ended = true;
	else if (k != -EAGAIN)
		return tls_fail(t, (int)k);
	return k;
}

/* As far with the handshake as it goes without blocking. 0: done; -EAGAIN, -errno. */
static int tls_shake(struct tls_conn *t) FAR_REQUIRES(t->lock)
{
	while (!t->error && !t->open) {
		ERR_clear_error();
		int k = SSL_do_handshake(t->ssl);
		int e = SSL_get_error(t->ssl, k);
		if (k == 1)
			t->open = true;
		else if (e != SSL_ERROR_WANT_READ && e != SSL_ERROR_WANT_WRITE)
			tls_fail_ssl(t);
		int f = tls_flush(t); /* alerts too */
		if (t->error || t->open)
			break;
		if (e == SSL_ERROR_WANT_WRITE && f)
			return f;
		ssize_t got = e == SSL_ERROR_WANT_READ ? tls_fill(t) : 1;
		if (got < 0)
			return (int)got;
	}
	return t->error;
}

/* The client only sees an alert; who runs the server wants to know. A flood of them is told once in ten seconds. */
static void tls_tell_refused(struct tls_conn *t)
{
	static _Atomic uint64_t last;
	char why[sizeof t->why];

	far_mutex_lock(&t->lock);
	bool tell = t->keys->server && !t->open && t->why[0] && !t->told;
	t->told |= tell;
	memcpy(why, t->why, sizeof why);
	far_mutex_unlock(&t->lock);
	uint64_t now = far_now(), then = atomic_load(&last);
	if (tell && (!then || now - then > TLS_TELL) && atomic_compare_exchange_strong(&last, &then, now))
		far_log(FAR_LOG_WARNING, "a client's TLS handshake failed: %s", why);
}

static ssize_t tls_readv(struct far_conn *c, const struct iovec *iov, int n)
{
	struct tls_conn *t = tls_of(c);
	struct tls_cursor at = { iov, n, 0 };
	size_t total = 0;
	bool more = true;

	far_mutex_lock(&t->lock);
	ssize_t r = tls_shake(t);
	tls_skip(&at, 0);
	while (r == 0 && at.n && !t->farewell) {
		size_t k = 0;
		if (t->in_at == t->in_n && !SSL_pending(t->ssl)) {
			ssize_t got = more || !total ? tls_fill(t) : -EAGAIN;
			if (got < 0) {
				r = got;
				break;
			}
			more = got == (ssize_t)TLS_BUFFER;
		}
		ERR_clear_error();
		if (SSL_read_ex(t->ssl, (char *)at.iov->iov_base + at.at, at.iov->iov_len - at.at, &k)) {
			tls_skip(&at, k);
			total += k;
			continue;
		}
		int e = SSL_get_error(t->ssl, 0);
		if (e == SSL_ERROR_ZERO_RETURN)
			t->farewell = true;
		else if (e == SSL_ERROR_WANT_WRITE)
			r = tls_flush(t);
		else if (e != SSL_ERROR_WANT_READ)
			r = tls_fail_ssl(t);
	}
	if (t->out_at < t->out_n && !t->flushing)
		tls_flush(t); /* what reading made: an answer to a change of keys, an alert */
	far_mutex_unlock(&t->lock);
	if (r < 0 && r != -EAGAIN)
		tls_tell_refused(t);
	return total ? (ssize_t)total : r;
}

/* The next record's bytes: where they lie, or gathered. */
static const uint8_t *tls_gather(struct tls_conn *t, struct tls_cursor *at, size_t *len)
{
	size_t n = at->iov->iov_len - at->at;

	if (n >= TLS_RECORD || at->n == 1) {
		const uint8_t *p = (const uint8_t *)at->iov->iov_base + at->at;
		*len = (size_t)far_min(n, TLS_RECORD);
		tls_skip(at, *len);
		return p;
	}
	*len = 0;
	while (at->n && *len < TLS_RECORD) {
		n = (size_t)far_min(at->iov->iov_len - at->at, TLS_RECORD - *len);
		memcpy(t->stage + *len, (const uint8_t *)at->iov->iov_base + at->at, n);
		*len += n;
		tls_skip(at, n);
	}
	return t->stage;
}

/* Encrypt some records. Bytes that went into them; *r: -errno. */
static size_t tls_encrypt(struct tls_conn *t, struct tls_cursor *at, int *r) FAR_REQUIRES(t->lock)
{
	size_t total = 0;

	for (int i = 0; i < TLS_BATCH && at->n && t->out_n + TLS_RECORD_ROOM <= TLS_BUFFER; i++) {
		struct tls_cursor before = *at;
		size_t len, k = 0;
		const uint8_t *p = tls_gather(t, at, &len);
		ERR_clear_error();
		if (!SSL_write_ex(t->ssl, p, len, &k)) {
			int e = SSL_get_error(t->ssl, 0);
			*r = e == SSL_ERROR_WANT_READ || e == SSL_ERROR_WANT_WRITE ? -EAGAIN : tls_fail_ssl(t);
			*at = before;
			break;
		}
		if (k < len) {
			*at = before;
			tls_skip(at, k);
		}
		total += k;
	}
	return total;
}

static ssize_t tls_writev(struct far_conn *c, const struct iovec *iov, int n)
{
	struct tls_conn *t = tls_of(c);
	struct tls_cursor at = { iov, n, 0 };
	size_t total = 0, given = 0;

	for (int i = 0; i < n; i++)
		given += iov[i].iov_len;
	far_mutex_lock(&t->lock);
	int r = tls_shake(t);
	if (r == 0)
		r = tls_flush(t);
	if (r == 0 && t->owed) {
		total = (size_t)far_min(t->owed, given);
		t->owed -= total;
		given -= total;
	}
	tls_skip(&at, total);
	while (r == 0 && given) {
		size_t k = tls_encrypt(t, &at, &r);
		given -= k;
		int f = tls_flush(t);
		if (f == 0) {
			total += k;
		} else {
			t->owed += k;
			r = r && r != -EAGAIN ? r : f;
		}
	}
	far_mutex_unlock(&t->lock);
	if (r < 0 && r != -EAGAIN)
		tls_tell_refused(t);
	return total ? (ssize_t)total : r;
}

static int tls_wait(struct far_conn *c, bool in, bool out, uint64_t until)
{
	struct tls_conn *t = tls_of(c);

	for (;;) {
		far_mutex_lock(&t->lock);
		int r = tls_shake(t);
		bool open = t->open;
		/* Whoever asks sees the end, or what is here already, by reading and writing. */
		bool ready = (r && r != -EAGAIN) || (in && open && (SSL_pending(t->ssl) || t->in_at < t->in_n || t->ended));
		if (!ready)
			tls_flush(t);
		bool pending = t->out_at < t->out_n;
		far_mutex_unlock(&t->lock);
		if (r && r != -EAGAIN)
			tls_tell_refused(t);
		if (ready)
			return 0;
		/* Somebody else may end the handshake with the bytes that this thread waits for. */
		uint64_t limit = open ? until : far_min(until, far_now() + TLS_SLICE);
		r = t->inner.ops->wait(&t->inner, in || !open, (out && open) || pending, limit);
		if (r == -ETIMEDOUT && limit < until)
			continue;
		if (r || open)
			return r;
	}
}

static uint64_t tls_unacked(struct far_conn *c)
{
	struct tls_conn *t = tls_of(c);

	return t->inner.ops->unacked(&t->inner);
}

static void tls_shutdown(struct far_conn *c)
{
	struct tls_conn *t = tls_of(c);

	far_mutex_lock(&t->lock);
	if (!t->error && t->open) {
		ERR_clear_error();
		SSL_shutdown(t->ssl); /* so that the peer knows that nothing was cut off */
		ERR_clear_error();
		tls_flush(t);
	}
	far_mutex_unlock(&t->lock);
	t->inner.ops->shutdown(&t->inner);
}

static void tls_free(struct tls_conn *t) FAR_NO_TSA
{
	SSL_free(t->ssl);
	far_tls_keys_put(t->keys);
	far_mutex_fini(&t->lock);
	far_buf_put(t->in, TLS_BUFFER);
	far_buf_put(t->out, TLS_BUFFER);
	far_buf_put(t->stage, TLS_RECORD);
	free(t->name);
	free(t);
}

static void tls_close(struct far_conn *c)
{
	struct tls_conn *t = tls_of(c);

	far_conn_close(&t->inner);
	tls_free(t);
	c->state = NULL;
}

/* ------------------------------------------------------------------------------------------------ who the peer is */

static int tls_peer(struct far_conn *c, struct far_peer *p)
{
	struct tls_conn *t = tls_of(c);
	int r = 0;

	far_mutex_lock(&t->lock);
	/* Unless it was asked for and checked, a certificate proves nothing. */
	bool checked = t->open && SSL_get_verify_mode(t->ssl) & SSL_VERIFY_PEER && SSL_get_verify_result(t->ssl) == X509_V_OK;
	X509 *x = checked ? SSL_get0_peer_certificate(t->ssl) : NULL;
	if (x)
		r = far_tls_peer_certificate(p, x);
	else if (t->open && t->seen.psk[0])
		r = far_tls_peer_add(p, (const unsigned char *)t->seen.psk, (int)strlen(t->seen.psk));
	ERR_clear_error();
	far_mutex_unlock(&t->lock);
	if (r)
		far_peer_fini(p);
	return r;
}

static void tls_why(struct far_conn *c, char *buf, size_t n)
{
	struct tls_conn *t = tls_of(c);

	far_mutex_lock(&t->lock);
	snprintf(buf, n, "%s", t->why);
	far_mutex_unlock(&t->lock);
}

static const struct far_conn_ops tls_ops = {
	.readv = tls_readv,
	.writev = tls_writev,
	.wait = tls_wait,
	.unacked = tls_unacked,
	.shutdown = tls_shutdown,
	.close = tls_close,
	.peer = tls_peer,
	.why = tls_why,
};

/* -------------------------------------------------------------------------------------------------------- set-up */

static bool tls_expect(SSL *ssl, const char *name)
{
	uint8_t address[16];
	bool is_address = inet_pton(AF_INET, name, address) == 1 || inet_pton(AF_INET6, name, address) == 1;

	if (is_address)
		return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), name) == 1;
	SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
	return SSL_set_tlsext_host_name(ssl, name) == 1 && SSL_set1_host(ssl, name) == 1;
}

static int tls_wrap(struct far_tls *owner, const char *name, struct far_conn *conn) FAR_NO_TSA
{
	struct tls_conn *t = calloc(1, sizeof *t);

	if (!t)
		return -ENOMEM;
	far_mutex_init(&t->lock);
	t->keys = far_tls_keys_get(owner);
	t->in = far_buf_get(TLS_BUFFER);
	t->out = far_buf_get(TLS_BUFFER);
	t->stage = far_buf_get(TLS_RECORD);
	t->name = name ? strdup(name) : NULL;
	t->ssl = SSL_new(t->keys->ctx);
	BIO *bio = BIO_new(t->keys->bio);
	bool ok = t->in && t->out && t->stage && t->ssl && bio && (!name || t->name);
	if (bio) {
		BIO_set_data(bio, t);
		BIO_set_init(bio, 1);
	}
	if (!ok || (name && !tls_expect(t->ssl, name))) {
		BIO_free(bio);
		tls_free(t);
		ERR_clear_error();
		return ok ? -EINVAL : -ENOMEM;
	}
	SSL_set_bio(t->ssl, bio, bio);
	SSL_set_app_data(t->ssl, &t->seen);
	if (t->keys->server)
		SSL_set_accept_state(t->ssl);
	else
		SSL_set_connect_state(t->ssl);
	t->inner = *conn;
	*conn = (struct far_conn){ .ops = &tls_ops, .fd = t->inner.fd, .state = t };
	return 0;
}

int far_tls_server(struct far_tls *t, struct far_conn *conn)
{
	return tls_wrap(t, NULL, conn);
}

int far_tls_client(struct far_tls *t, const char *name, struct far_conn *conn)
{
	return name && *name ? tls_wrap(t, name, conn) : -EINVAL;
}

bool far_conn_is_tls(const struct far_conn *conn)
{
	return conn->ops == &tls_ops;
}

int far_tls_handshake(struct far_conn *conn, uint64_t until, int cancel, struct far_error *err)
{
	struct tls_conn *t = tls_of(conn);
	int r;

	FAR_ASSERT(far_conn_is_tls(conn));
	far_mutex_lock(&t->lock);
	while ((r = tls_shake(t)) == -EAGAIN) {
		bool pending = t->out_at < t->out_n;
		far_mutex_unlock(&t->lock);
		/* A kind that is no socket can only be waited for by itself: so look at `cancel` in between. */
		uint64_t now = far_now();
		if (cancel >= 0 && far_net_wait_readable(cancel, -1, now) == 0)
			return far_error_set(err, ESHUTDOWN, "TLS: %s", far_strerror(ESHUTDOWN));
		if (now >= until)
			return far_error_set(err, ETIMEDOUT, "TLS: the peer did not answer in time");
		int w = t->inner.ops->wait(&t->inner, true, pending, far_min(until, now + TLS_SLICE));
		far_mutex_lock(&t->lock);
		if (w && w != -ETIMEDOUT)
			tls_fail(t, w);
	}
	char why[sizeof t->why];
	memcpy(why, t->why, sizeof why);
	far_mutex_unlock(&t->lock);
	return r ? far_error_set(err, -r, "TLS: %s", why[0] ? why : r == -ECONNRESET ? "the peer hung up" : far_strerror(r)) : 0;
}
