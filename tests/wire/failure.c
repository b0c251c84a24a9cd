/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Ends that die, hang, answer late or answer nonsense: every call ends in time with a code that says what to do, and the
 * next one works. */
#define _GNU_SOURCE
#include "peer.h"

#include "wire/server.h"
#include "wire/wire.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define READ_AT FAR_GRPC_BACKEND "ReadAt"

/* ------------------------------------------------------------------------ a server that is another process */

static pid_t server_spawn(int port, bool hold, int *out_port)
{
	int pipefd[2];

	assert_int_equal(pipe(pipefd), 0);
	pid_t pid = fork();
	assert_true(pid >= 0);
	if (pid == 0) {
		struct slow slow;
		struct far_server *s;
		char uri[64], *bound;
		struct far_backend *b = slow_open(&slow, 1 << 20);
		slow.hold = hold;
		snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d", port);
		if (far_server_new(NULL, &s, NULL) || far_server_export(s, "disk", b, NULL) ||
		    far_server_listen(s, uri, &bound, NULL))
			_exit(1);
		port = atoi(strrchr(bound, ':') + 1);
		if (write(pipefd[1], &port, sizeof port) != sizeof port)
			_exit(1);
		for (;;)
			pause();
	}
	close(pipefd[1]);
	assert_int_equal(read(pipefd[0], out_port, sizeof *out_port), sizeof *out_port);
	close(pipefd[0]);
	return pid;
}

static void server_kill(pid_t pid)
{
	kill(pid, SIGKILL);
	assert_int_equal(waitpid(pid, NULL, 0), pid);
}

struct caller {
	struct far_thread t;
	struct far_backend *b;
	uint8_t buf[4096];
	int result;
	uint64_t began, ended;
	uint64_t deadline; /* from now; 0: none */
	uint64_t off;
	unsigned flags;
	bool write;
};

static void *caller_run(void *arg)
{
	struct caller *c = arg;

	c->began = far_now();
	uint64_t old = far_deadline_limit(c->deadline ? c->began + c->deadline : FAR_NEVER);
	c->result = c->write ? far_write(c->b, c->off, c->buf, sizeof c->buf, c->flags) :
			       far_read(c->b, c->off, c->buf, sizeof c->buf, c->flags);
	far_deadline_restore(old);
	c->ended = far_now();
	return NULL;
}

static void test_server_killed(void **state)
{
	enum { N = 16 };
	struct caller c[N];
	struct far_backend *far;
	char uri[100], byte;
	int port;
	pid_t pid = server_spawn(0, true, &port);

	snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d", port);
	assert_int_equal(far_open(uri, NULL, &far, NULL), 0);
	for (int i = 0; i < N; i++) {
		c[i] = (struct caller){ .b = far, .off = (uint64_t)i * 4096, .flags = i & 1 ? FAR_BULK : 0,
					.write = i & 2 };
		assert_int_equal(far_thread_start(&c[i].t, "caller", caller_run, &c[i]), 0);
	}
	/* They wait: a call with a short deadline that runs out behind them is the sign that the server has them. */
	uint64_t old = far_deadline_limit(far_now() + 100 * FAR_MSEC);
	assert_int_equal(far_read(far, 0, &byte, 1, 0), -ETIMEDOUT);
	far_deadline_restore(old);
	uint64_t killed = far_now();
	server_kill(pid);
	for (int i = 0; i < N; i++) {
		far_thread_join(&c[i].t);
		assert_true(far_error_is_transient(c[i].result));
		assert_true(c[i].ended - killed < 5 * FAR_SEC);
	}
	/* Nobody there: at once, and transient. */
	int r = far_read(far, 0, &byte, 1, 0);
	assert_int_equal(r, -ECONNREFUSED);
	assert_true(far_error_is_transient(r));
	/* The same port again: the next call works, with no new object. */
	pid = server_spawn(port, false, &port);
	assert_int_equal(far_read(far, 0, &byte, 1, 0), 0);
	assert_int_equal(far_read(far, 0, &byte, 1, FAR_BULK), 0);
	server_kill(pid);
	/* Killed while nobody calls: the next call finds a new server without noticing. */
	pid = server_spawn(port, false, &port);
	uint64_t until = far_now() + 20 * FAR_MSEC;
	while (far_now() < until)
		far_cpu_relax();
	assert_int_equal(far_read(far, 0, &byte, 1, 0), 0);
	far_close(far);
	server_kill(pid);
}

/* ------------------------------------------------------------------------------ in this process, by hand */

struct rig {
	struct slow slow;
	struct far_backend *b, *far;
	struct far_server *s;
	char *uri;
};

static void rig_open(struct rig *r, uint64_t handshake, uint64_t stall)
{
	r->b = slow_open(&r->slow, 4 << 20);
	assert_int_equal(far_server_new(NULL, &r->s, NULL), 0);
	if (handshake)
		far_server_patience(r->s, handshake, stall);
	assert_int_equal(far_server_export(r->s, "disk", r->b, NULL), 0);
	assert_int_equal(far_server_listen(r->s, "grpc://127.0.0.1:0", &r->uri, NULL), 0);
	assert_int_equal(far_open(r->uri, NULL, &r->far, NULL), 0);
}

static void rig_close(struct rig *r)
{
	slow_hold(&r->slow, false);
	far_close(r->far);
	far_server_stop(r->s);
	far_server_free(r->s);
	far_close(r->b);
	slow_free(&r->slow);
	free(r->uri);
}

static void test_nowait(void **state)
{
	struct rig r;
	char c;

	rig_open(&r, 0, 0);
	assert_int_equal(far_read(r.far, 0, &c, 1, FAR_NOWAIT), -EAGAIN);
	assert_int_equal(far_write(r.far, 0, &c, 1, FAR_NOWAIT), -EAGAIN);
	assert_int_equal(r.slow.calls, 0);
	rig_close(&r);
}

static void test_deadline(void **state)
{
	struct rig r;
	struct caller c = { .deadline = 50 * FAR_MSEC };

	rig_open(&r, 0, 0);
	c.b = r.far;
	memset(r.slow.mem, 0x55, 4096);
	slow_hold(&r.slow, true);
	memset(c.buf, 0x11, sizeof c.buf);
	caller_run(&c);
	assert_int_equal(c.result, -ETIMEDOUT);
	assert_true(c.ended - c.began >= 50 * FAR_MSEC && c.ended - c.began < 2 * FAR_SEC);
	/* The answer that comes later does not touch the buffer, and the connection goes on. */
	slow_hold(&r.slow, false);
	uint8_t other[4096];
	for (int i = 0; i < 50; i++)
		assert_int_equal(far_read(r.far, 0, other, sizeof other, 0), 0);
	assert_int_equal(other[0], 0x55);
	for (size_t i = 0; i < sizeof c.buf; i++)
		assert_int_equal(c.buf[i], 0x11);
	/* A write that ran out of time returns before its buffer is let go of. */
	slow_hold(&r.slow, true);
	c.write = true;
	caller_run(&c);
	assert_int_equal(c.result, -ETIMEDOUT);
	memset(c.buf, 0, sizeof c.buf);
	slow_hold(&r.slow, false);
	assert_int_equal(far_read(r.far, 0, other, sizeof other, 0), 0);
	rig_close(&r);
}

/* The server hears of the deadline: it does not go on waiting in its backend for a caller who has gone. */
static void test_deadline_travels(void **state)
{
	struct rig r;
	struct caller c = { .deadline = 50 * FAR_MSEC };

	rig_open(&r, 0, 0);
	c.b = r.far;
	slow_hold(&r.slow, true);
	caller_run(&c);
	assert_int_equal(c.result, -ETIMEDOUT);
	uint64_t end = far_now() + 10 * FAR_SEC;
	far_mutex_lock(&r.slow.lock);
	while ((!r.slow.max_inside || r.slow.inside) && far_cond_wait_until(&r.slow.cond, &r.slow.lock, end))
		;
	assert_int_equal(r.slow.max_inside, 1);
	assert_int_equal(r.slow.inside, 0);
	far_mutex_unlock(&r.slow.lock);
	rig_close(&r);
}

/* The URI's timeout, and a connection on which nothing is heard for so long is given up. */
static void test_timeout(void **state)
{
	struct rig r;
	char uri[200];
	struct far_backend *far;
	struct caller c = { .deadline = 0 };

	rig_open(&r, 0, 0);
	snprintf(uri, sizeof uri, "%s?timeout=100ms", r.uri);
	assert_int_equal(far_open(uri, NULL, &far, NULL), 0);
	slow_hold(&r.slow, true);
	c.b = far;
	caller_run(&c);
	assert_int_equal(c.result, -ETIMEDOUT);
	assert_true(c.ended - c.began >= 100 * FAR_MSEC && c.ended - c.began < 2 * FAR_SEC);
	slow_hold(&r.slow, false);
	caller_run(&c);
	assert_int_equal(c.result, 0);
	far_close(far);
	rig_close(&r);
}

static void test_stop(void **state)
{
	enum { N = 8 };
	struct rig r;
	struct caller c[N];

	rig_open(&r, 0, 0);
	slow_hold(&r.slow, true);
	for (int i = 0; i < N; i++) {
		c[i] = (struct caller){ .b = r.far, .off = (uint64_t)i * 4096, .flags = i & 1 ? FAR_BULK : 0,
					.write = i & 2 };
		assert_int_equal(far_thread_start(&c[i].t, "caller", caller_run, &c[i]), 0);
	}
	assert_true(slow_wait_inside(&r.slow, N));
	far_stop(r.far);
	for (int i = 0; i < N; i++) {
		far_thread_join(&c[i].t);
		assert_int_equal(c[i].result, -ESHUTDOWN);
	}
	far_stop(r.far);
	assert_int_equal(far_read(r.far, 0, c[0].buf, 1, 0), -ESHUTDOWN);
	assert_int_equal(far_flush(r.far), -ESHUTDOWN);
	rig_close(&r);
}

/* Stopped while it dials: somebody listens on the port and answers no one. */
static void test_stop_while_dialling(void **state)
{
	struct rig r;
	struct caller c = { .deadline = 0 };
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1, fill[4];
	struct pollfd nothing = { .fd = -1 };

	rig_open(&r, 0, 0);
	far_server_stop(r.s);
	assert_true(far_error_is_transient(far_read(r.far, 0, c.buf, 1, 0))); /* the old connection is known to be dead */
	sin.sin_port = htons((uint16_t)atoi(strrchr(r.uri, ':') + 1));
	assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&sin, sizeof sin), 0);
	assert_int_equal(listen(fd, 0), 0);
	for (size_t i = 0; i < FAR_ARRAY_LEN(fill); i++) {
		fill[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		(void)!connect(fill[i], (struct sockaddr *)&sin, sizeof sin);
	}
	c.b = r.far;
	assert_int_equal(far_thread_start(&c.t, "caller", caller_run, &c), 0);
	poll(&nothing, 1, 50); /* most likely it dials by now; if not, the outcome is the same */
	far_stop(r.far);
	uint64_t stopped = far_now();
	far_thread_join(&c.t);
	assert_int_equal(c.result, -ESHUTDOWN);
	assert_true(c.ended < stopped + 5 * FAR_SEC);
	for (size_t i = 0; i < FAR_ARRAY_LEN(fill); i++)
		close(fill[i]);
	close(fd);
	rig_close(&r);
}

/* The server stops while calls run in its backend: it waits for them, their callers hear at once. */
static void *stopper(void *arg)
{
	far_server_stop(arg);
	return NULL;
}

static void test_server_stop(void **state)
{
	struct rig r;
	struct caller c = { .deadline = 0 };
	struct far_thread t;

	rig_open(&r, 0, 0);
	slow_hold(&r.slow, true);
	c.b = r.far;
	assert_int_equal(far_thread_start(&c.t, "caller", caller_run, &c), 0);
	assert_true(slow_wait_inside(&r.slow, 1));
	assert_int_equal(far_thread_start(&t, "stopper", stopper, r.s), 0);
	far_thread_join(&c.t);
	assert_true(far_error_is_transient(c.result));
	slow_hold(&r.slow, false);
	far_thread_join(&t);
	rig_close(&r);
}

/* ---------------------------------------------------------------------------------- peers of the server */

static bool ended_within(int fd, uint64_t ns)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	uint64_t end = far_now() + ns;
	char buf[65536];

	while (poll(&p, 1, far_deadline_poll_ms(end)) > 0)
		if (recv(fd, buf, sizeof buf, 0) <= 0)
			return true;
	return false;
}

static void test_half_open(void **state)
{
	struct rig r;
	char c;

	rig_open(&r, 200 * FAR_MSEC, 300 * FAR_MSEC);
	/* Says nothing. */
	int silent = tcp_connect(r.uri);
	/* Says half a greeting. */
	int half = tcp_connect(r.uri);
	assert_int_equal(send(half, "PRI * HTT", 9, 0), 9);
	/* Greets well and is silent then: that is its right. */
	static const char hello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
	int idle = tcp_connect(r.uri);
	assert_int_equal(send(idle, hello, sizeof hello - 1, 0), sizeof hello - 1);
	/* Begins a request and does not end it. */
	struct peer *p = malloc(sizeof *p);
	peer_over_fd(p, tcp_connect(r.uri));
	peer_submit(p, "POST", READ_AT, "application/grpc", NULL, NULL, "\0\0", 2, true);
	peer_drive(p, 0);
	assert_true(ended_within(silent, LIMIT));
	assert_true(ended_within(half, LIMIT));
	assert_true(ended_within(p->fd, LIMIT));
	assert_false(ended_within(idle, 700 * FAR_MSEC));
	assert_int_equal(far_read(r.far, 0, &c, 1, 0), 0);
	close(silent);
	close(half);
	close(idle);
	peer_free(p);
	free(p);
	rig_close(&r);
}

/* A byte now and then is no greeting. */
static void test_greets_for_ever(void **state)
{
	static const char hello[24 + 9 + 240] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\xf0\4"; /* then many settings */
	struct rig r;
	char c;

	rig_open(&r, 300 * FAR_MSEC, 300 * FAR_MSEC);
	int fd = tcp_connect(r.uri);
	bool ended = false;
	uint64_t end = far_now() + LIMIT;
	for (size_t i = 0; !ended && far_now() < end; i++) {
		if (i < sizeof hello)
			(void)!send(fd, hello + i, 1, MSG_NOSIGNAL);
		ended = ended_within(fd, 20 * FAR_MSEC);
	}
	assert_true(ended);
	assert_int_equal(far_read(r.far, 0, &c, 1, 0), 0);
	close(fd);
	rig_close(&r);
}

/* Takes nothing, but never stops talking. */
static void test_talks_and_never_takes(void **state)
{
	static const uint8_t unknown[] = { 0, 0, 0, 0x55, 0, 0, 0, 0, 0 };
	struct rig r;
	uint8_t msg[16];
	const uint8_t *data;
	size_t n;
	ssize_t k;
	char c;
	struct far_pb_out o = { msg, 0, sizeof msg };

	rig_open(&r, FAR_SEC, 300 * FAR_MSEC);
	far_pb_put_uint(&o, 1, 1 << 20);
	uint8_t *m = peer_message(msg, o.n, &n);
	struct peer *p = malloc(sizeof *p);
	peer_over_fd(p, tcp_connect(r.uri));
	for (int i = 0; i < 200; i++)
		peer_submit(p, "POST", READ_AT, "application/grpc", NULL, NULL, m, n, false);
	while ((k = nghttp2_session_mem_send(p->h2, &data)) > 0)
		assert_int_equal(send(p->fd, data, (size_t)k, 0), k);
	bool ended = false;
	uint64_t end = far_now() + LIMIT;
	while (!ended && far_now() < end) {
		k = send(p->fd, unknown, sizeof unknown, MSG_NOSIGNAL);
		ended = k < 0 && (errno == EPIPE || errno == ECONNRESET);
		poll(NULL, 0, 5);
	}
	assert_true(ended);
	assert_int_equal(far_read(r.far, 0, &c, 1, 0), 0);
	free(m);
	peer_free(p);
	free(p);
	rig_close(&r);
}

/* Asks for much and takes nothing; others are served meanwhile. */
static void test_never_takes(void **state)
{
	struct rig r;
	uint8_t msg[16], *buf = malloc(1 << 20);
	size_t n;
	struct far_pb_out o = { msg, 0, sizeof msg };

	rig_open(&r, FAR_SEC, 300 * FAR_MSEC);
	far_pb_put_uint(&o, 1, 1 << 20);
	uint8_t *m = peer_message(msg, o.n, &n);
	struct peer *p = malloc(sizeof *p);
	peer_over_fd(p, tcp_connect(r.uri));
	for (int i = 0; i < 200; i++)
		peer_submit(p, "POST", READ_AT, "application/grpc", NULL, NULL, m, n, false);
	const uint8_t *data;
	ssize_t k;
	while ((k = nghttp2_session_mem_send(p->h2, &data)) > 0)
		assert_int_equal(send(p->fd, data, (size_t)k, 0), k);
	uint64_t end = far_now() + 800 * FAR_MSEC;
	while (far_now() < end)
		assert_int_equal(far_read(r.far, 0, buf, 1 << 20, 0), 0);
	/* Given up after the stall: what still lies in the sockets' buffers comes, then the end, long before 200 MiB. */
	size_t got = 0;
	while ((k = recv(p->fd, buf, 1 << 20, 0)) > 0 || (k < 0 && errno == EAGAIN && far_now() < end + LIMIT))
		got += k > 0 ? (size_t)k : 0;
	assert_true(k <= 0 && got < 50 << 20);
	assert_int_equal(far_read(r.far, 0, buf, 1 << 20, 0), 0);
	free(m);
	free(buf);
	peer_free(p);
	free(p);
	rig_close(&r);
}

static void test_flood(void **state)
{
	struct rig r;
	struct peer *p = malloc(sizeof *p);
	char c;
	bool on = true;

	rig_open(&r, 0, 0);
	peer_over_fd(p, tcp_connect(r.uri));
	for (int i = 0; i < 2500 && on; i++) {
		int32_t id = peer_submit(p, "POST", READ_AT, "application/grpc", NULL, NULL, "\0", 1, true);
		on = peer_drive(p, 0);
		nghttp2_submit_rst_stream(p->h2, 0, id, NGHTTP2_CANCEL);
		on = on && peer_drive(p, 0);
	}
	assert_true(!on || ended_within(p->fd, LIMIT));
	assert_int_equal(far_read(r.far, 0, &c, 1, 0), 0);
	peer_free(p);
	free(p);
	rig_close(&r);
}

/* More connections than are taken: the surplus is closed, the others go on. */
static void test_many_connections(void **state)
{
	enum { N = 300 };
	struct rig r;
	int fd[N], closed = 0;
	char c;

	rig_open(&r, 0, 0);
	for (int i = 0; i < N; i++) {
		fd[i] = tcp_connect(r.uri);
		assert_true(fd[i] >= 0);
	}
	uint64_t end = far_now() + LIMIT;
	while (closed < N - 255 && far_now() < end) {
		closed = 0;
		for (int i = 0; i < N; i++) {
			struct pollfd p = { .fd = fd[i], .events = POLLRDHUP };
			closed += poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP));
		}
	}
	assert_int_equal(closed, N - 255); /* the rig's own connection is one of the 256 */
	assert_int_equal(far_read(r.far, 0, &c, 1, 0), 0);
	for (int i = 0; i < N; i++)
		close(fd[i]);
	rig_close(&r);
}

/* ---------------------------------------------------------------------------------- peers of the client */

enum nonsense { HANG, CLOSE, TEXT, ZEROS, GREET_THEN_CLOSE };

struct odd_server {
	struct far_thread t;
	int fd;
	enum nonsense how;
	_Atomic bool stop;
};

static void *odd_run(void *arg)
{
	struct odd_server *o = arg;
	int held[64], n = 0;

	while (!o->stop && n < 64) {
		struct pollfd p = { .fd = o->fd, .events = POLLIN };
		if (poll(&p, 1, 20) <= 0)
			continue;
		int fd = accept(o->fd, NULL, NULL);
		if (fd < 0)
			continue;
		char buf[4096] = "HTTP/1.1 400 Bad Request\r\n\r\nno";
		if (o->how == TEXT)
			(void)!write(fd, buf, strlen(buf));
		if (o->how == ZEROS) {
			memset(buf, 0, sizeof buf);
			(void)!write(fd, buf, sizeof buf);
		}
		if (o->how == GREET_THEN_CLOSE) {
			(void)!write(fd, "\0\0\0\4\0\0\0\0\0", 9);
			(void)!read(fd, buf, sizeof buf);
		}
		if (o->how == CLOSE || o->how == GREET_THEN_CLOSE)
			close(fd);
		else
			held[n++] = fd;
	}
	while (n)
		close(held[--n]);
	return NULL;
}

static void test_odd_servers(void **state)
{
	static const struct {
		enum nonsense how;
		int code[2];
		const char *text;
	} cases[] = {
		{ HANG, { ETIMEDOUT, ETIMEDOUT }, "does not answer in time" },
		{ CLOSE, { ECONNRESET, EPIPE }, "cannot open" },
		{ TEXT, { EPROTO, EPROTO }, "another kind of server" },
		{ ZEROS, { EPROTO, EPROTO }, "another kind of server" },
		{ GREET_THEN_CLOSE, { ECONNRESET, EPIPE }, "cannot open" },
	};
	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		struct odd_server o = { .how = cases[i].how };
		struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
		struct far_backend *far = NULL;
		struct far_error err = { .code = 0 };
		char uri[100];
		int port;
		o.fd = tcp_listen(&port);
		opts.deadline_ms = 300;
		assert_int_equal(far_thread_start(&o.t, "odd", odd_run, &o), 0);
		snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d", port);
		uint64_t began = far_now();
		int r = far_open(uri, &opts, &far, &err);
		assert_true(far_now() - began < 5 * FAR_SEC);
		if ((r != -cases[i].code[0] && r != -cases[i].code[1]) || !strstr(err.text, cases[i].text))
			fail_msg("case %zu: %d '%s'", i, r, err.text);
		o.stop = true;
		far_thread_join(&o.t);
		close(o.fd);
	}
	/* Nobody there. */
	struct far_backend *far = NULL;
	struct far_error err;
	int port, fd = tcp_listen(&port);
	char uri[100];
	close(fd);
	snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d", port);
	assert_int_equal(far_open(uri, NULL, &far, &err), -ECONNREFUSED);
	assert_non_null(strstr(err.text, "is the server running?"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_server_killed), /* first: it forks, and must have no threads then */
		cmocka_unit_test(test_nowait),        cmocka_unit_test(test_deadline),
		cmocka_unit_test(test_deadline_travels),
		cmocka_unit_test(test_timeout),       cmocka_unit_test(test_stop),
		cmocka_unit_test(test_stop_while_dialling),
		cmocka_unit_test(test_server_stop),   cmocka_unit_test(test_half_open),
		cmocka_unit_test(test_greets_for_ever), cmocka_unit_test(test_talks_and_never_takes),
		cmocka_unit_test(test_never_takes),   cmocka_unit_test(test_flood),
		cmocka_unit_test(test_many_connections), cmocka_unit_test(test_odd_servers),
	};
	signal(SIGPIPE, SIG_IGN);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
