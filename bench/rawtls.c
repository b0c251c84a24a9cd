/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * rawtls BYTES raw|conn CERT KEY [BLOCK]: one TLS 1.3 stream over loopback from one process to another, AES-128-GCM, written
 * and read by BLOCK (256 KiB), nothing checked; both ends use one block of memory again and again. "raw": SSL_write and
 * SSL_read on a blocking socket, as `openssl s_server` and `s_client` do. "conn": farpage's own connection layer, which is
 * non-blocking and lets two threads read and write at once. Prints MiB a second and the CPU seconds of both ends.
 */
#define _GNU_SOURCE
#include "net/tls.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t bytes;
static size_t block = 256 << 10;
static const char *cert, *key;

static void rawtls_fail(const char *what)
{
	fprintf(stderr, "rawtls: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double rawtls_cpu(int who)
{
	struct rusage u;
	getrusage(who, &u);
	return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static SSL *rawtls_ssl(int fd, bool server)
{
	SSL_CTX *ctx = SSL_CTX_new(server ? TLS_server_method() : TLS_client_method());

	SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION);
	SSL_CTX_set_ciphersuites(ctx, "TLS_AES_128_GCM_SHA256");
	if (server && (SSL_CTX_use_certificate_chain_file(ctx, cert) != 1 ||
		       SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM) != 1))
		rawtls_fail("certificate");
	SSL *ssl = SSL_new(ctx);
	SSL_set_fd(ssl, fd);
	if ((server ? SSL_accept(ssl) : SSL_connect(ssl)) != 1)
		rawtls_fail("handshake");
	return ssl;
}

static void rawtls_raw(int fd, bool server, char *buf)
{
	SSL *ssl = rawtls_ssl(fd, server);

	for (uint64_t at = 0; at < bytes;) {
		int k = server ? SSL_write(ssl, buf, (int)far_min(block, bytes - at)) : SSL_read(ssl, buf, (int)block);
		if (k <= 0)
			rawtls_fail("stream");
		at += (uint64_t)k;
	}
	SSL_shutdown(ssl);
}

static void rawtls_conn(int fd, bool server, char *buf)
{
	struct far_tls_opts o = { .cert = server ? cert : NULL, .key = server ? key : NULL, .ca = server ? NULL : cert };
	struct far_conn c = { 0 };
	struct far_error err;
	struct far_tls *t;

	if (far_conn_socket(&c, fd))
		rawtls_fail("socket");
	int r = server ? far_tls_new_server(&o, &t, &err) : far_tls_new_client(&o, &t, &err);
	if (!r)
		r = server ? far_tls_server(t, &c) : far_tls_client(t, "localhost", &c);
	if (!r)
		r = far_tls_handshake(&c, far_now() + 10 * FAR_SEC, -1, &err);
	if (r) {
		fprintf(stderr, "rawtls: %s\n", err.text);
		exit(1);
	}
	for (uint64_t at = 0; at < bytes;) {
		struct iovec v = { buf, (size_t)far_min(block, bytes - at) };
		ssize_t k = server ? c.ops->writev(&c, &v, 1) : c.ops->readv(&c, &v, 1);
		if (k == -EAGAIN) {
			c.ops->wait(&c, !server, server, FAR_NEVER);
			continue;
		}
		if (k <= 0)
			rawtls_fail("stream");
		at += (uint64_t)k;
	}
	c.ops->shutdown(&c);
	far_conn_close(&c);
	far_tls_put(t);
}

int main(int argc, char **argv)
{
	if (argc < 5 || (strcmp(argv[2], "raw") && strcmp(argv[2], "conn"))) {
		fprintf(stderr, "usage: rawtls BYTES raw|conn CERT KEY [BLOCK]\n");
		return 2;
	}
	bytes = strtoull(argv[1], NULL, 10);
	bool raw = argv[2][0] == 'r';
	cert = argv[3];
	key = argv[4];
	if (argc > 5)
		block = strtoul(argv[5], NULL, 10);
	char *buf = aligned_alloc(4096, (block + 4095) / 4096 * 4096);
	memset(buf, 0x5a, block);
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t n = sizeof a;
	int l = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	if (bind(l, (struct sockaddr *)&a, sizeof a) || listen(l, 1) || getsockname(l, (struct sockaddr *)&a, &n))
		rawtls_fail("listen");
	pid_t pid = fork();
	if (pid < 0)
		rawtls_fail("fork");
	int fd = pid ? accept(l, NULL, NULL) : socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
	if (!pid && connect(fd, (struct sockaddr *)&a, sizeof a))
		rawtls_fail("connect");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	uint64_t began = far_now();
	(raw ? rawtls_raw : rawtls_conn)(fd, pid != 0, buf);
	if (!pid)
		_exit(0);
	int status = 0;
	waitpid(pid, &status, 0);
	if (status)
		return 1;
	double took = (double)(far_now() - began) / 1e9;
	printf("%.0f %.3f\n", (double)bytes / took / 1048576, rawtls_cpu(RUSAGE_SELF) + rawtls_cpu(RUSAGE_CHILDREN));
	return 0;
}
