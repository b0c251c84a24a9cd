/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* TLS over a connection, both ends in this process: bytes both ways at once in odd pieces, after clear text, ends and
 * shutdowns, what each failure says; and connections that a user brings. */
#define _GNU_SOURCE
#include "base/thread.h"
#include "net/tls.h"

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

static char dir[] = "/tmp/farpage-tls.XXXXXX";
static char cert[64], key[64], psk[64], wrong[64];
static struct far_tls *server, *client;

static void made(const char *path, const void *what, bool is_key)
{
	FILE *f = fopen(path, "w");

	assert_non_null(f);
	assert_int_equal(is_key ? PEM_write_PrivateKey(f, what, NULL, NULL, 0, NULL, NULL) : PEM_write_X509(f, what), 1);
	fclose(f);
}

/* One certificate that signs itself, for localhost. */
static int make(void **state)
{
	far_log_set_level(FAR_LOG_ERROR);
	assert_non_null(mkdtemp(dir));
	snprintf(cert, sizeof cert, "%s/cert.pem", dir);
	snprintf(key, sizeof key, "%s/key.pem", dir);
	snprintf(psk, sizeof psk, "%s/psk", dir);
	snprintf(wrong, sizeof wrong, "%s/wrong", dir);
	EVP_PKEY *k = EVP_EC_gen("P-256");
	X509 *x = X509_new();
	X509_set_version(x, 2);
	ASN1_INTEGER_set(X509_get_serialNumber(x), 1);
	X509_gmtime_adj(X509_getm_notBefore(x), -3600);
	X509_gmtime_adj(X509_getm_notAfter(x), 3600);
	X509_set_pubkey(x, k);
	X509_NAME_add_entry_by_txt(X509_get_subject_name(x), "CN", MBSTRING_ASC, (const unsigned char *)"tester", -1, -1, 0);
	X509_set_issuer_name(x, X509_get_subject_name(x));
	X509_EXTENSION *e = X509V3_EXT_conf_nid(NULL, NULL, NID_subject_alt_name, "DNS:localhost,DNS:second,URI:spiffe://x/y");
	X509_add_ext(x, e, -1);
	X509_EXTENSION_free(e);
	assert_true(X509_sign(x, k, EVP_sha256()) > 0);
	made(cert, x, false);
	made(key, k, true);
	X509_free(x);
	EVP_PKEY_free(k);
	FILE *f = fopen(psk, "w");
	fprintf(f, "# a comment\nalice:00112233445566778899aabbccddeeff\n");
	fclose(f);
	f = fopen(wrong, "w");
	fprintf(f, "alice:ff112233445566778899aabbccddeeff\n");
	fclose(f);
	struct far_error err = { 0 };
	struct far_tls_opts o = { .cert = cert, .key = key, .ca = cert, .alpn = "h2" };
	if (far_tls_new_server(&o, &server, &err) || far_tls_new_client(&o, &client, &err))
		fail_msg("%s", err.text);
	return 0;
}

static int unmake(void **state)
{
	far_tls_put(server);
	far_tls_put(client);
	unlink(cert);
	unlink(key);
	unlink(psk);
	unlink(wrong);
	return rmdir(dir);
}

static void pair(struct far_conn c[2], int room)
{
	int sv[2];

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
	for (int i = 0; i < 2; i++) {
		if (room)
			setsockopt(sv[i], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
		assert_int_equal(far_conn_socket(&c[i], sv[i]), 0);
	}
}

static void wrap(struct far_conn c[2])
{
	assert_int_equal(far_tls_server(server, &c[0]), 0);
	assert_int_equal(far_tls_client(client, "localhost", &c[1]), 0);
}

/* One thread that writes a known stream in odd pieces, or reads and compares it. */
struct mover {
	struct far_conn *c;
	uint64_t total, seed;
	bool reads;
	int result;
};

static uint8_t byte_at(uint64_t at, uint64_t seed)
{
	return (uint8_t)((at * 0x9e3779b97f4a7c15u + seed) >> 56);
}

static uint64_t next(uint64_t *rng)
{
	*rng = *rng * 6364136223846793005 + 1442695040888963407;
	return *rng >> 33;
}

static void *mover(void *arg)
{
	struct mover *m = arg;
	uint64_t rng = m->seed * 7 + m->reads, at = 0, until = far_now() + 60 * FAR_SEC;
	static const size_t cap = 300000;
	uint8_t *buf = malloc(cap);

	while (at < m->total && !m->result) {
		struct iovec v[5];
		size_t n = 1 + next(&rng) % 5, used = 0;
		for (size_t i = 0; i < n; i++) {
			size_t len = next(&rng) % 3 ? next(&rng) % 40 : next(&rng) % 60000;
			v[i] = (struct iovec){ buf + used, far_min(len, m->total - at - used) };
			used += v[i].iov_len;
		}
		if (!used)
			continue;
		for (size_t i = 0; i < used && !m->reads; i++)
			buf[i] = byte_at(at + i, m->seed);
		/* A writer comes back with the bytes that are left, as it must. */
		size_t done = 0;
		int first = 0;
		while (done < used && !m->result) {
			ssize_t k = (m->reads ? m->c->ops->readv : m->c->ops->writev)(m->c, v + first, (int)n - first);
			if (k == -EAGAIN) {
				m->result = m->c->ops->wait(m->c, m->reads, !m->reads, until);
				continue;
			}
			if (k <= 0) {
				m->result = k ? (int)k : -EPIPE;
				break;
			}
			for (size_t i = 0; i < (size_t)k && m->reads; i++)
				if (buf[done + i] != byte_at(at + done + i, m->seed))
					m->result = -EILSEQ;
			done += (size_t)k;
			if (m->reads)
				break;
			while (first < (int)n && (size_t)k >= v[first].iov_len)
				k -= (ssize_t)v[first++].iov_len;
			if (first < (int)n) {
				v[first].iov_base = (uint8_t *)v[first].iov_base + k;
				v[first].iov_len -= (size_t)k;
			}
		}
		at += done;
	}
	free(buf);
	return NULL;
}

static void run(struct far_conn c[2], uint64_t total)
{
	struct mover m[4];
	struct far_thread t[4] = { 0 };

	for (int i = 0; i < 4; i++) {
		m[i] = (struct mover){ .c = &c[i / 2], .total = total, .reads = i % 2, .seed = (uint64_t)(i == 0 || i == 3) + 5 };
		assert_int_equal(far_thread_start(&t[i], "mover", mover, &m[i]), 0);
	}
	for (int i = 0; i < 4; i++) {
		far_thread_join(&t[i]);
		if (m[i].result)
			fail_msg("end %d, %s: %s", i / 2, m[i].reads ? "reading" : "writing", far_strerror(m[i].result));
	}
}

static void bytes_go_both_ways_at_once(void **state)
{
	struct far_conn c[2];

	for (int room = 0; room < 40000; room += 9000) {
		pair(c, room);
		wrap(c);
		run(c, 3 << 20);
		struct far_peer p;
		for (int i = 0; i < 2; i++) {
			assert_int_equal(far_conn_peer(&c[i], &p), 0);
			assert_int_equal(p.n, 4);
			assert_string_equal(p.names[0], "localhost");
			assert_string_equal(p.names[2], "spiffe://x/y");
			assert_string_equal(p.names[3], "tester");
			far_peer_fini(&p);
			far_conn_close(&c[i]);
		}
	}
}

static void clear_text_may_come_before(void **state)
{
	struct far_conn c[2];
	struct iovec v = { (char[]){ "start" }, 5 };
	char buf[5];

	pair(c, 0);
	assert_int_equal(c[1].ops->writev(&c[1], &v, 1), 5);
	v.iov_base = buf;
	assert_int_equal(c[0].ops->readv(&c[0], &v, 1), 5);
	wrap(c);
	run(c, 100000);
	far_conn_close(&c[0]);
	far_conn_close(&c[1]);
}

static void *reader(void *arg)
{
	struct far_conn *c = arg;
	char buf[100];
	struct iovec v = { buf, sizeof buf };
	ssize_t k;

	while ((k = c->ops->readv(c, &v, 1)) == -EAGAIN)
		c->ops->wait(c, true, false, far_now() + 30 * FAR_SEC);
	return (void *)(intptr_t)(k > 0);
}

static void a_shutdown_ends_who_waits(void **state)
{
	struct far_conn c[2];
	struct far_thread t[2] = { 0 };

	pair(c, 0);
	wrap(c);
	run(c, 1000);
	for (int i = 0; i < 2; i++)
		assert_int_equal(far_thread_start(&t[i], "reader", reader, &c[i]), 0);
	far_sleep_until(far_now() + 20 * FAR_MSEC, false);
	uint64_t began = far_now();
	c[0].ops->shutdown(&c[0]);
	for (int i = 0; i < 2; i++)
		far_thread_join(&t[i]);
	assert_true(far_now() - began < 20 * FAR_SEC);
	char b = 0, why[300];
	struct iovec v = { &b, 1 };
	/* The peer was told, so it is an end and no loss. */
	assert_int_equal(c[1].ops->readv(&c[1], &v, 1), 0);
	assert_true(c[0].ops->writev(&c[0], &v, 1) < 0);
	far_conn_why(&c[1], why, sizeof why);
	assert_string_equal(why, "");
	far_conn_close(&c[0]);
	far_conn_close(&c[1]);
}

static void a_cut_is_no_end(void **state)
{
	struct far_conn c[2];
	char b;
	struct iovec v = { &b, 1 };

	pair(c, 0);
	wrap(c);
	run(c, 1000);
	shutdown(c[0].fd, SHUT_RDWR);
	assert_int_equal(c[1].ops->wait(&c[1], true, false, far_now() + 10 * FAR_SEC), 0);
	assert_int_equal(c[1].ops->readv(&c[1], &v, 1), -ECONNRESET);
	assert_int_equal(c[1].ops->readv(&c[1], &v, 1), -ECONNRESET);
	far_conn_close(&c[0]);
	far_conn_close(&c[1]);
}

struct shaker {
	struct far_conn *c;
	int r;
};

static void *shaker(void *arg)
{
	struct shaker *s = arg;
	struct far_error err;

	s->r = far_tls_handshake(s->c, far_now() + 10 * FAR_SEC, -1, &err);
	return NULL;
}

/* What the client's handshake says; the server's code in *theirs. */
static int shake(struct far_tls *s, struct far_tls *k, const char *name, int *theirs, char *why)
{
	struct far_conn c[2];
	struct far_thread t = { 0 };
	struct far_error err = { 0 };

	pair(c, 0);
	assert_int_equal(far_tls_server(s, &c[0]), 0);
	assert_int_equal(far_tls_client(k, name, &c[1]), 0);
	struct shaker sh = { &c[0], 0 };
	assert_int_equal(far_thread_start(&t, "shaker", shaker, &sh), 0);
	int r = far_tls_handshake(&c[1], far_now() + 10 * FAR_SEC, -1, &err);
	if (r) /* what the server has to say comes after that in TLS 1.3 */
		c[1].ops->shutdown(&c[1]);
	far_thread_join(&t);
	*theirs = sh.r;
	snprintf(why, 300, "%.299s", err.text);
	if (!r) {
		char b;
		struct iovec v = { &b, 1 };
		ssize_t n;
		if (sh.r)
			while ((n = c[1].ops->readv(&c[1], &v, 1)) == -EAGAIN)
				c[1].ops->wait(&c[1], true, false, far_now() + 10 * FAR_SEC);
		if (sh.r)
			far_conn_why(&c[1], why, 300);
	}
	far_conn_close(&c[0]);
	far_conn_close(&c[1]);
	return r;
}

static void shared_keys_and_names_are_checked(void **state)
{
	struct far_tls_opts o = { .psk = psk }, bad = { .psk = wrong }, none = { .ca = cert };
	struct far_tls *s, *k, *w, *bare;
	char why[300];
	int theirs;

	assert_int_equal(far_tls_new_server(&o, &s, NULL), 0);
	assert_int_equal(far_tls_new_client(&o, &k, NULL), 0);
	assert_int_equal(far_tls_new_client(&bad, &w, NULL), 0);
	assert_int_equal(far_tls_new_client(&none, &bare, NULL), 0);
	if (shake(s, k, "any", &theirs, why))
		fail_msg("%s; %s", why, far_strerror(theirs));
	assert_int_equal(theirs, 0);
	assert_true(shake(s, w, "any", &theirs, why) < 0);
	assert_true(theirs < 0);
	assert_true(shake(s, bare, "localhost", &theirs, why) < 0);
	assert_int_equal(shake(server, client, "second", &theirs, why), 0);
	assert_int_equal(shake(server, client, "third", &theirs, why), -EACCES);
	assert_non_null(strstr(why, "for another name"));
	/* No certificate where one is asked for: the server's word comes later, and says so. */
	assert_int_equal(shake(server, bare, "localhost", &theirs, why), 0);
	assert_int_equal(theirs, -EACCES);
	assert_non_null(strstr(why, "wants a certificate"));
	far_tls_put(s);
	far_tls_put(k);
	far_tls_put(w);
	far_tls_put(bare);
}

static void a_handshake_has_a_deadline_and_can_be_cancelled(void **state)
{
	struct far_conn c[2];
	struct far_error err;
	int p[2];

	pair(c, 0);
	assert_int_equal(far_tls_client(client, "localhost", &c[1]), 0);
	assert_int_equal(far_tls_handshake(&c[1], far_now() + 50 * FAR_MSEC, -1, &err), -ETIMEDOUT);
	assert_int_equal(pipe(p), 0);
	close(p[1]);
	assert_int_equal(far_tls_handshake(&c[1], FAR_NEVER, p[0], &err), -ESHUTDOWN);
	close(p[0]);
	far_conn_close(&c[0]);
	far_conn_close(&c[1]);
}

static void what_is_no_tls_is_told_so(void **state)
{
	struct far_conn c[2];
	struct far_error err;
	char text[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
	uint8_t answer[16];
	struct iovec v = { text, sizeof text - 1 }, a = { answer, sizeof answer };

	pair(c, 0);
	assert_int_equal(far_tls_server(server, &c[0]), 0);
	assert_true(c[1].ops->writev(&c[1], &v, 1) > 0);
	assert_int_equal(far_tls_handshake(&c[0], far_now() + 10 * FAR_SEC, -1, &err), -EPROTO);
	assert_non_null(strstr(err.text, "clear"));
	ssize_t n = c[1].ops->readv(&c[1], &a, 1);
	assert_true(n >= 3 && far_tls_looks_like(answer, (size_t)n));
	far_conn_close(&c[0]);
	far_conn_close(&c[1]);
}

/* ------------------------------------------------------------------------------------- connections of the user's */

struct mine {
	struct far_conn c;
	_Atomic int closed;
};

static ssize_t mine_readv(void *self, const struct iovec *iov, int n)
{
	struct mine *m = self;
	return m->c.ops->readv(&m->c, iov, n > 1 ? 1 : n); /* short counts are allowed */
}

static ssize_t mine_writev(void *self, const struct iovec *iov, int n)
{
	struct mine *m = self;
	struct iovec one = { iov->iov_base, far_min(iov->iov_len, 5000) };
	return m->c.ops->writev(&m->c, &one, 1);
}

static int mine_wait(void *self, bool in, bool out, int timeout_ms)
{
	struct mine *m = self;
	return m->c.ops->wait(&m->c, in, out, timeout_ms < 0 ? FAR_NEVER : far_now() + (uint64_t)timeout_ms * FAR_MSEC);
}

static void mine_shutdown(void *self)
{
	struct mine *m = self;
	m->c.ops->shutdown(&m->c);
}

static void mine_close(void *self)
{
	struct mine *m = self;
	m->closed++;
	far_conn_close(&m->c);
}

static const struct far_stream_ops mine_ops = { FAR_STREAM_OPS_INIT, .readv = mine_readv, .writev = mine_writev,
						.wait = mine_wait, .shutdown = mine_shutdown, .close = mine_close };

static void a_users_connection_carries_a_region(void **state)
{
	struct far_stream_ops half = { FAR_STREAM_OPS_INIT, .readv = mine_readv };
	struct mine m[2] = { 0 };
	struct far_conn c[2];
	struct far_backend *mem, *far;
	struct far_server *s;
	struct far_error err = { 0 };
	char in[9000], out[9000];

	pair(c, 0);
	wrap(c);
	m[0].c = c[0];
	m[1].c = c[1];
	assert_int_equal(far_open("mem:1M", NULL, &mem, NULL), 0);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "x", mem, NULL), 0);
	assert_int_equal(far_server_serve_stream(s, &half, &m[0], &err), -EINVAL);
	assert_int_equal(far_open_stream(&half, &m[1], "half", NULL, &far, &err), -EINVAL);
	assert_int_equal(m[0].closed + m[1].closed, 0);
	if (far_server_serve_stream(s, &mine_ops, &m[0], &err) || far_open_stream(&mine_ops, &m[1], "mine", NULL, &far, &err))
		fail_msg("%s", err.text);
	memset(in, 7, sizeof in);
	assert_int_equal(far_write(far, 100, in, sizeof in, 0), 0);
	assert_int_equal(far_read(far, 100, out, sizeof out, 0), 0);
	assert_memory_equal(in, out, sizeof in);
	far_close(far);
	assert_int_equal(m[1].closed, 1);
	far_server_free(s);
	assert_int_equal(m[0].closed, 1);
	far_close(mem);

	/* Nobody answers: it stays the user's. */
	struct far_open_opts o = FAR_OPEN_OPTS_INIT;
	o.deadline_ms = 100;
	pair(c, 0);
	m[1] = (struct mine){ .c = c[1] };
	assert_int_equal(far_open_stream(&mine_ops, &m[1], "mine", &o, &far, &err), -ETIMEDOUT);
	assert_int_equal(m[1].closed, 0);
	far_conn_close(&m[1].c);
	far_conn_close(&c[0]);
}

static void two_descriptors_are_a_connection(void **state)
{
	struct far_conn c[2];
	int a[2], b[2];

	assert_int_equal(pipe(a) | pipe(b), 0);
	assert_int_equal(far_conn_pair(&c[0], a[0], b[1]), 0);
	assert_int_equal(far_conn_pair(&c[1], b[0], a[1]), 0);
	wrap(c);
	run(c, 1 << 20);
	far_conn_close(&c[0]);
	far_conn_close(&c[1]);
	struct far_error err;
	assert_int_equal(far_conn_command(&c[0], "cat; exit 7", &err), 0);
	struct iovec v = { (char[]){ "hello" }, 5 };
	char buf[5], why[300];
	assert_int_equal(c[0].ops->writev(&c[0], &v, 1), 5);
	assert_int_equal(c[0].ops->wait(&c[0], true, false, far_now() + 10 * FAR_SEC), 0);
	v.iov_base = buf;
	assert_int_equal(c[0].ops->readv(&c[0], &v, 1), 5);
	assert_memory_equal(buf, "hello", 5);
	c[0].ops->shutdown(&c[0]);
	for (why[0] = 0; !why[0];)
		far_conn_why(&c[0], why, sizeof why);
	assert_non_null(strstr(why, "exit code 7"));
	far_conn_close(&c[0]);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(bytes_go_both_ways_at_once),
		cmocka_unit_test(clear_text_may_come_before),
		cmocka_unit_test(a_shutdown_ends_who_waits),
		cmocka_unit_test(a_cut_is_no_end),
		cmocka_unit_test(shared_keys_and_names_are_checked),
		cmocka_unit_test(a_handshake_has_a_deadline_and_can_be_cancelled),
		cmocka_unit_test(what_is_no_tls_is_told_so),
		cmocka_unit_test(a_users_connection_carries_a_region),
		cmocka_unit_test(two_descriptors_are_a_connection),
	};

	return cmocka_run_group_tests(tests, make, unmake);
}
