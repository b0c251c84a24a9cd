/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Servers that are not there, come back, come back as somebody else, move, or fall silent. */
#define _GNU_SOURCE
#include "peer.h"
#include "proxy.h"

#include "backend/backend.h"
#include "wire/server.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#define SIZE 65536
#define PAGE 4096

static char dir[] = "/tmp/farpage-again-XXXXXX";

struct rig {
	struct proxy proxy;
	struct far_server *s;
	struct far_backend *b, *far;
	bool plain;
};

/* Serve what `uri` opens; the proxy leads there. */
static void rig_serve(struct rig *r, const char *uri)
{
	char *bound;

	if (uri)
		assert_int_equal(far_open(uri, NULL, &r->b, NULL), 0);
	assert_int_equal(far_server_new(NULL, &r->s, NULL), 0);
	if (r->plain)
		far_server_plain(r->s);
	assert_int_equal(far_server_export(r->s, "disk", r->b, NULL), 0);
	assert_int_equal(far_server_listen(r->s, "grpc://127.0.0.1:0", &bound, NULL), 0);
	proxy_lead(&r->proxy, atoi(strrchr(bound, ':') + 1));
	free(bound);
}

/* The server ends; what it served goes too unless `keep`. */
static void rig_end(struct rig *r, bool keep)
{
	far_server_stop(r->s);
	far_server_free(r->s);
	r->s = NULL;
	if (!keep) {
		far_close(r->b);
		r->b = NULL;
	}
}

static int rig_dial(struct rig *r, const char *query, const struct far_facts *known, struct far_error *err)
{
	struct far_open_opts o = FAR_OPEN_OPTS_INIT;
	char uri[120];

	o.known = known;
	snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d%s", r->proxy.port, query);
	return far_open(uri, &o, &r->far, err);
}

static void rig_open(struct rig *r, const char *uri, const char *query)
{
	bool plain = r->plain;

	memset(r, 0, sizeof *r);
	r->plain = plain;
	assert_true(proxy_start(&r->proxy, 1));
	rig_serve(r, uri);
	assert_int_equal(rig_dial(r, query, NULL, NULL), 0);
}

static void rig_close(struct rig *r)
{
	far_close(r->far);
	proxy_stop(&r->proxy);
	if (r->s)
		rig_end(r, false);
}

/* Again while the error is a passing one, at most ten seconds. */
#define AGAIN(call)                                                                                                    \
	({                                                                                                             \
		uint64_t end_ = far_now() + 10 * FAR_SEC;                                                              \
		int r_;                                                                                                \
		while (far_error_is_transient(r_ = (call)) && far_now() < end_)                                        \
			far_sleep_until(far_now() + 5 * FAR_MSEC, false);                                              \
		r_;                                                                                                    \
	})

static int read_byte(struct rig *r, uint64_t off)
{
	uint8_t c;
	int e = far_read(r->far, off, &c, 1, 0);

	return e ? e : c;
}

static uint64_t instance(struct rig *r)
{
	struct far_origin o = FAR_ORIGIN_INIT;

	return far_origin(r->far, &o, FAR_NOWAIT) ? 0 : o.instance;
}

/* A server that is restarted: what was flushed is there, and a flush after the restart says what was not. */
static void test_restart(void **state)
{
	struct rig r = { .plain = false };
	uint8_t page[PAGE];

	rig_open(&r, "mem:64K", "");
	memset(page, 1, sizeof page);
	assert_int_equal(far_write(r.far, 0, page, PAGE, 0), 0);
	assert_int_equal(far_flush(r.far), 0);
	uint64_t before = instance(&r);
	assert_int_not_equal(before, 0);
	rig_end(&r, true);
	rig_serve(&r, NULL);
	assert_int_equal(AGAIN(far_flush(r.far)), 0); /* nothing was lost */
	assert_int_not_equal(instance(&r), before);
	assert_int_equal(AGAIN(far_write(r.far, 0, page, PAGE, 0)), 0);
	rig_end(&r, true);
	rig_serve(&r, NULL);
	assert_int_equal(AGAIN(far_flush(r.far)), -EREMOTEIO);
	assert_int_equal(far_flush(r.far), 0); /* said once */
	assert_int_equal(far_write(r.far, 0, page, PAGE, 0), 0);
	assert_int_equal(far_flush(r.far), 0);
	/* A write that carries its flush tells too. */
	assert_int_equal(far_write(r.far, PAGE, page, PAGE, 0), 0);
	rig_end(&r, true);
	rig_serve(&r, NULL);
	assert_int_equal(AGAIN(far_write(r.far, 2 * PAGE, page, PAGE, FAR_FLUSH)), -EREMOTEIO);
	assert_int_equal(far_write(r.far, PAGE, page, PAGE, FAR_FLUSH), 0);
	struct far_counters c = { .size = sizeof c };
	far_counters(r.far, &c);
	assert_true(c.connects >= 4 && c.reconnects >= 3 && c.reconnects < c.connects);
	rig_close(&r);
}

/* The same two servers away. */
static void test_restart_behind(void **state)
{
	struct rig r = { .plain = false };
	struct far_server *s;
	struct far_backend *far;
	uint8_t page[PAGE] = { 1 };
	char *bound;

	rig_open(&r, "mem:64K", "");
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "disk", r.far, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &bound, NULL), 0);
	assert_int_equal(far_open(bound, NULL, &far, NULL), 0);
	for (unsigned flush = 0; flush <= FAR_FLUSH; flush += FAR_FLUSH) {
		struct far_origin before = FAR_ORIGIN_INIT, after = FAR_ORIGIN_INIT;
		assert_int_equal(AGAIN(far_write(far, 0, page, PAGE, 0)), 0);
		assert_int_equal(far_origin(far, &before, FAR_NOWAIT), 0);
		rig_end(&r, true);
		rig_serve(&r, NULL);
		if (flush)
			assert_int_equal(AGAIN(far_write(far, PAGE, page, PAGE, FAR_FLUSH)), -EREMOTEIO);
		else
			assert_int_equal(AGAIN(far_flush(far)), -EREMOTEIO);
		assert_int_equal(far_origin(far, &after, FAR_NOWAIT), 0);
		assert_true(before.instance != after.instance);
		assert_int_equal(AGAIN(far_write(far, 0, page, PAGE, 0)), 0);
		assert_int_equal(AGAIN(far_flush(far)), 0);
	}
	free(bound);
	far_close(far);
	far_server_stop(s);
	far_server_free(s);
	rig_close(&r);
}

/* The plain service cannot tell: every lost connection may have been a restart. */
static void test_plain_restart(void **state)
{
	struct rig r = { .plain = true };
	struct far_origin o = FAR_ORIGIN_INIT;
	uint8_t page[PAGE] = { 3 };

	rig_open(&r, "mem:64K", "?size=64K");
	assert_int_equal(far_origin(r.far, &o, 0), 0);
	assert_int_equal(o.version, 0);
	assert_int_equal(far_write(r.far, 0, page, PAGE, FAR_BULK), 0);
	uint64_t before = instance(&r);
	assert_int_equal(far_flush(r.far), 0);
	assert_true(instance(&r) == before);
	assert_int_equal(far_write(r.far, 0, page, PAGE, FAR_BULK), 0);
	rig_end(&r, true);
	rig_serve(&r, NULL);
	assert_int_equal(AGAIN(far_flush(r.far)), 0); /* on another lane than the write's */
	assert_true(instance(&r) > before);
	/* A shorter one is not what was opened. */
	rig_end(&r, false);
	rig_serve(&r, "mem:60K");
	assert_int_equal(AGAIN(read_byte(&r, 0)), -ESTALE);
	rig_end(&r, false);
	rig_serve(&r, "mem:64K");
	uint64_t end = far_now() + 10 * FAR_SEC;
	while (read_byte(&r, 0) < 0 && far_now() < end)
		;
	assert_int_equal(read_byte(&r, 0), 0);
	rig_close(&r);
}

/* A write to a peer without sessions is held back, newer ones are acknowledged, then it lands. */
static void test_plain_late_write(void **state)
{
	struct rig r = { .plain = true };
	uint8_t page[PAGE], back[PAGE];

	rig_open(&r, "mem:64K", "?size=64K&silence=200ms&timeout=1s");
	memset(page, 1, sizeof page);
	assert_int_equal(far_write(r.far, 0, page, PAGE, 0), 0);
	memset(page, 2, sizeof page);
	proxy_set(&r.proxy, PROXY_HOLD, 1, 0); /* its data */
	assert_true(far_error_is_transient(far_write(r.far, 0, page, PAGE, 0)));
	for (int i = 3; i < 6; i++) {
		memset(page, i, sizeof page);
		assert_int_equal(AGAIN(far_write(r.far, 100, page, PAGE - 200, 0)), 0);
	}
	assert_true(proxy_release(&r.proxy));
	assert_int_equal(far_read(r.b, 0, back, PAGE, 0), 0);
	assert_int_equal(back[PAGE / 2], 2); /* it has landed: only sessions forbid that */
	assert_int_equal(AGAIN(far_flush(r.far)), 0);
	assert_int_equal(far_read(r.b, 0, back, PAGE, 0), 0);
	assert_int_equal(back[0], 2);
	assert_int_equal(back[100], 5);
	assert_int_equal(back[PAGE - 101], 5);
	rig_close(&r);
}

/* The same with sessions: it never lands, and the caller hears of nothing. */
static void test_late_write(void **state)
{
	struct rig r = { .plain = false };
	uint8_t page[PAGE], back[PAGE];

	rig_open(&r, "mem:64K", "?silence=200ms");
	memset(page, 1, sizeof page);
	assert_int_equal(far_write(r.far, 0, page, PAGE, 0), 0);
	memset(page, 2, sizeof page);
	proxy_set(&r.proxy, PROXY_HOLD, 1, 0);
	assert_int_equal(far_write(r.far, 0, page, PAGE, 0), 0);
	for (int i = 3; i < 6; i++) {
		memset(page, i, sizeof page);
		assert_int_equal(far_write(r.far, 0, page, PAGE, 0), 0);
	}
	assert_true(proxy_release(&r.proxy));
	assert_int_equal(far_read(r.b, 0, back, PAGE, 0), 0);
	assert_memory_equal(back, page, PAGE);
	rig_close(&r);
}

/* ------------------------------------------------------------------------------------- somebody else comes back */

static void file_make(const char *name, int fill, char *uri, size_t n)
{
	uint8_t page[SIZE];
	char path[200];

	snprintf(path, sizeof path, "%s/%s", dir, name);
	memset(page, fill, sizeof page);
	int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
	assert_int_equal(write(fd, page, sizeof page), sizeof page);
	close(fd);
	snprintf(uri, n, "file:%s", path);
}

/* As a backup would: bytes, attributes and times. */
static bool file_copy(const char *from, const char *to, char *uri, size_t n)
{
	char a[200], b[200], record[1024];
	uint8_t page[SIZE];
	struct stat st;

	snprintf(a, sizeof a, "%s/%s", dir, from);
	snprintf(b, sizeof b, "%s/%s", dir, to);
	int in = open(a, O_RDONLY), out = open(b, O_CREAT | O_TRUNC | O_WRONLY, 0600);
	assert_int_equal(read(in, page, sizeof page), sizeof page);
	assert_int_equal(write(out, page, sizeof page), sizeof page);
	ssize_t k = fgetxattr(in, "user.farpage", record, sizeof record);
	bool ok = k > 0 && fsetxattr(out, "user.farpage", record, (size_t)k, 0) == 0;
	assert_int_equal(fstat(in, &st), 0);
	assert_int_equal(futimens(out, (struct timespec[]){ st.st_atim, st.st_mtim }), 0);
	close(in);
	close(out);
	snprintf(uri, n, "file:%s", b);
	return ok;
}

static void test_somebody_else(void **state)
{
	struct rig r = { .plain = false };
	struct far_origin o = FAR_ORIGIN_INIT;
	struct far_lease l = FAR_LEASE_INIT;
	char one[250], two[250], old[250];
	uint8_t page[PAGE];

	file_make("one", 1, one, sizeof one);
	file_make("two", 2, two, sizeof two);
	rig_open(&r, one, "");
	l.writer = "again";
	memset(page, 9, sizeof page);
	assert_int_equal(far_lease(r.far, &l), 0);
	assert_int_equal(far_write(r.far, 0, page, PAGE, FAR_FLUSH), 0);
	assert_int_equal(far_flush(r.far), 0);
	assert_int_equal(far_origin(r.far, &o, 0), 0);
	uint64_t version = o.version;
	rig_end(&r, false);
	bool kept = file_copy("one", "old", old, sizeof old);
	rig_serve(&r, one);
	if (!kept) {
		print_message("skip: the file system of /tmp keeps no user attributes\n");
		rig_close(&r);
		skip();
	}
	assert_int_equal(AGAIN(read_byte(&r, 0)), 9);
	uint64_t end = far_now() + 10 * FAR_SEC;
	while (o.version == version && far_now() < end) {
		page[0]++;
		assert_int_equal(far_write(r.far, 0, page, PAGE, 0), 0);
		assert_int_equal(far_flush(r.far), 0);
		assert_int_equal(far_origin(r.far, &o, 0), 0);
	}
	assert_true(o.version > version);
	/* Another region of the same size. */
	rig_end(&r, false);
	rig_serve(&r, two);
	assert_int_equal(AGAIN(read_byte(&r, 0)), -ESTALE);
	assert_int_equal(far_write(r.far, 0, page, PAGE, 0), -ESTALE);
	assert_int_equal(far_flush(r.far), -ESTALE);
	assert_int_equal(far_lease(r.far, &l), -ESTALE);
	rig_end(&r, false);
	/* The right one again. */
	rig_serve(&r, one);
	end = far_now() + 10 * FAR_SEC;
	while (read_byte(&r, 0) < 0 && far_now() < end)
		;
	assert_int_equal(read_byte(&r, 0), page[0]);
	rig_end(&r, false);
	/* An older copy of it. */
	rig_serve(&r, old);
	assert_int_equal(AGAIN(read_byte(&r, 0)), -ESTALE);
	rig_end(&r, false);
	/* Of another size. */
	rig_serve(&r, "mem:128K");
	assert_int_equal(AGAIN(read_byte(&r, 0)), -ESTALE);
	rig_close(&r);
}

/* ------------------------------------------------------------------------------------------- not there at all */

static void test_offline(void **state)
{
	struct rig r = { .plain = false };
	struct far_error err;
	struct far_facts known, wrong;
	uint8_t page[PAGE] = { 5 };

	for (int plain = 0; plain < 2; plain++) {
		r.plain = plain;
		rig_open(&r, "mem:64K", plain ? "?size=64K" : "");
		known = *far_facts(r.far);
		far_close(r.far);
		rig_end(&r, true);
		/* Refused: opens at once, calls fail as they do on a lost connection. */
		proxy_refuse(&r.proxy, true);
		uint64_t began = far_now();
		assert_int_equal(rig_dial(&r, "", &known, &err), 0);
		assert_true(far_now() - began < 2 * FAR_SEC);
		assert_memory_equal(far_facts(r.far), &known, sizeof known);
		assert_true(far_error_is_transient(far_write(r.far, 0, page, PAGE, 0)));
		assert_int_equal(instance(&r), 0);
		/* There: it works, with its real service. */
		proxy_refuse(&r.proxy, false);
		rig_serve(&r, NULL);
		assert_int_equal(AGAIN(far_write(r.far, 0, page, PAGE, 0)), 0);
		assert_int_equal(far_flush(r.far), 0);
		assert_int_equal(read_byte(&r, 0), 5);
		assert_int_not_equal(instance(&r), 0);
		assert_int_equal(far_zero(r.far, 0, PAGE, 0), 0);
		assert_int_equal(read_byte(&r, 0), 0);
		far_close(r.far);
		/* There while it is opened, and another size than known. */
		wrong = known;
		wrong.bytes = plain ? 2 * SIZE : SIZE / 2;
		assert_int_equal(rig_dial(&r, "", &wrong, &err), -ESTALE);
		assert_non_null(strstr(err.text, "is"));
		/* The same, found out later. */
		rig_end(&r, true);
		proxy_refuse(&r.proxy, true);
		assert_int_equal(rig_dial(&r, "", &wrong, &err), 0);
		proxy_refuse(&r.proxy, false);
		rig_serve(&r, NULL);
		assert_int_equal(AGAIN(read_byte(&r, 0)), -ESTALE);
		rig_close(&r);
	}
}

static void test_offline_silent(void **state)
{
	struct rig r = { .plain = false };
	struct far_facts known;
	struct far_error err;

	rig_open(&r, "mem:64K", "");
	known = *far_facts(r.far);
	far_close(r.far);
	proxy_set(&r.proxy, PROXY_MUTE, 0, 0);
	uint64_t began = far_now();
	assert_int_equal(rig_dial(&r, "", &known, &err), 0);
	assert_true(far_now() - began < 6 * FAR_SEC);
	assert_int_equal(AGAIN(read_byte(&r, 0)), 0);
	rig_close(&r);
}

/* Many who wait for a peer that is not there cause few dials, and all go on when it is. */
struct waiter {
	struct far_thread t;
	struct rig *r;
	_Atomic bool *stop;
	unsigned calls, good;
	int last;
};

static void *waiter_run(void *arg)
{
	struct waiter *w = arg;

	while (!*w->stop) {
		w->last = read_byte(w->r, 0);
		w->calls++;
		w->good += w->last >= 0;
		if (w->last < 0 && !far_error_is_transient(w->last))
			break;
	}
	return NULL;
}

static void test_no_storm(void **state)
{
	enum { N = 256 };
	struct rig r = { .plain = false };
	struct waiter *w = calloc(N, sizeof *w);
	_Atomic bool stop = false;

	rig_open(&r, "mem:64K", "");
	proxy_refuse(&r.proxy, true);
	assert_true(far_error_is_transient(read_byte(&r, 0)));
	for (int i = 0; i < N; i++) {
		w[i].r = &r;
		w[i].stop = &stop;
		assert_int_equal(far_thread_start(&w[i].t, "waiter", waiter_run, &w[i]), 0);
	}
	far_sleep_until(far_now() + FAR_SEC, false); /* the pauses have grown */
	unsigned before = proxy_dialled(&r.proxy);
	far_sleep_until(far_now() + 2 * FAR_SEC, false);
	unsigned dials = proxy_dialled(&r.proxy) - before;
	print_message("%u dials in a second's time of failing, %u in the two seconds after it\n", before, dials);
	assert_true(before <= 30 && dials <= 8);
	proxy_refuse(&r.proxy, false);
	assert_int_equal(AGAIN(read_byte(&r, 0)), 0);
	stop = true;
	for (int i = 0; i < N; i++)
		far_thread_join(&w[i].t);
	for (int i = 0; i < N; i++)
		assert_true(w[i].last >= 0 || far_error_is_transient(w[i].last));
	free(w);
	rig_close(&r);
}

/* ---------------------------------------------------------------------------------------------- silence, bits */

/* A connection that has fallen silent is found long before the call's deadline; a slow answer is waited for. */
static void test_half_open(void **state)
{
	struct rig r = { .plain = false };
	struct slow slow;
	struct far_thread t;
	struct waiter w = { .r = &r };
	_Atomic bool stop = true;

	rig_open(&r, "mem:64K", "?silence=700ms");
	proxy_set(&r.proxy, PROXY_MUTE, 0, 0);
	uint64_t began = far_now();
	int e = read_byte(&r, 0);
	uint64_t took = far_now() - began;
	assert_true(far_error_is_transient(e));
	assert_true(took >= 500 * FAR_MSEC && took < 5 * FAR_SEC);
	assert_int_equal(read_byte(&r, 0), 0);
	rig_close(&r);
	/* The server's backend takes its time: pings are answered meanwhile. */
	memset(&r, 0, sizeof r);
	assert_true(proxy_start(&r.proxy, 1));
	r.b = slow_open(&slow, SIZE);
	rig_serve(&r, NULL);
	assert_int_equal(rig_dial(&r, "?silence=700ms", NULL, NULL), 0);
	slow_hold(&slow, true);
	w.stop = &stop;
	stop = false;
	assert_int_equal(far_thread_start(&t, "waiter", waiter_run, &w), 0);
	assert_true(slow_wait_inside(&slow, 1));
	far_sleep_until(far_now() + 2 * FAR_SEC, false); /* three silences */
	stop = true;
	slow_hold(&slow, false);
	far_thread_join(&t);
	assert_int_equal(w.last, 0);
	assert_int_equal(w.calls, 1);
	rig_close(&r);
	slow_free(&slow);
}

/* A path that takes long for what is on it is not a dead one: bytes that the other side's system takes are a sign of life. */
struct narrow {
	struct far_thread t;
	int listener, port;
};

static void *narrow_run(void *arg)
{
	struct narrow *n = arg;
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
				   .sin_port = htons((uint16_t)n->port) };
	int a = accept(n->listener, NULL, NULL), b = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	static char buf[65536];
	ssize_t k = 1;

	if (connect(b, (struct sockaddr *)&sin, sizeof sin))
		k = 0;
	while (k > 0) {
		struct pollfd p[2] = { { .fd = a, .events = POLLIN }, { .fd = b, .events = POLLIN } };
		if (poll(p, 2, -1) < 0)
			continue;
		if (p[1].revents && (k = recv(b, buf, sizeof buf, 0)) > 0)
			k = send(a, buf, (size_t)k, MSG_NOSIGNAL);
		if (k > 0 && p[0].revents && (k = recv(a, buf, 4096, 0)) > 0) {
			far_sleep_until(far_now() + (uint64_t)k * 2 * FAR_USEC, false); /* 500 kB a second */
			k = send(b, buf, (size_t)k, MSG_NOSIGNAL);
		}
	}
	close(a);
	close(b);
	return NULL;
}

static void test_slow_path(void **state)
{
	struct rig r = { .plain = false };
	struct narrow n;
	struct far_counters c = { .size = sizeof c };
	struct far_open_opts o = FAR_OPEN_OPTS_INIT;
	struct far_backend *far;
	int small = 8192;
	char uri[120];
	uint8_t *buf = calloc(1, 1 << 20);

	rig_open(&r, "mem:1M", "");
	n.port = r.proxy.server_port;
	int listen_port;
	n.listener = tcp_listen(&listen_port);
	assert_int_equal(setsockopt(n.listener, SOL_SOCKET, SO_RCVBUF, &small, sizeof small), 0);
	assert_int_equal(far_thread_start(&n.t, "narrow", narrow_run, &n), 0);
	o.demand_connections = o.bulk_connections = 1;
	snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d?silence=1500ms", listen_port);
	assert_int_equal(far_open(uri, &o, &far, NULL), 0);
	uint64_t began = far_now();
	assert_int_equal(far_write(far, 0, buf, 1 << 20, 0), 0);
	assert_true(far_now() - began > FAR_SEC);
	far_counters(far, &c);
	assert_int_equal(c.connects, 1);
	far_close(far);
	far_thread_join(&n.t);
	close(n.listener);
	free(buf);
	rig_close(&r);
}

/* A bit of the bytes themselves: found and fetched again, unless nobody wants that. */
static void test_flipped(void **state)
{
	struct rig r = { .plain = false };
	struct far_counters c = { .size = sizeof c };
	uint8_t page[PAGE];

	for (int sums = 1; sums >= 0; sums--) {
		rig_open(&r, "mem:64K", sums ? "" : "?sums=0");
		memset(page, 0x11, sizeof page);
		assert_int_equal(far_write(r.far, 0, page, PAGE, 0), 0);
		/* Headers and data of the request, headers of the reply, its data: a bit in the middle of them. */
		proxy_set(&r.proxy, PROXY_FLIP, 3, 8 * 2000);
		assert_int_equal(far_read(r.far, 0, page, PAGE, 0), 0);
		unsigned odd = 0;
		for (int i = 0; i < PAGE; i++)
			odd += page[i] != 0x11;
		far_counters(r.far, &c);
		assert_int_equal(odd, sums ? 0 : 1);
		assert_int_equal(c.checksum_errors, sums ? 1 : 0);
		rig_close(&r);
	}
}

/* ---------------------------------------------------------------------------------------------- it has moved */

static const char *host_is = "127.0.0.1";
int __real_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list);
int __wrap_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list);

int __wrap_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list)
{
	return __real_getaddrinfo(host && !strcmp(host, "moving.test") ? host_is : host, port, hints, list);
}

static void test_address_changes(void **state)
{
	struct far_server *s[2];
	struct far_backend *b, *far;
	char *bound, uri[100];
	uint8_t c;

	assert_int_equal(far_open("mem:64K", NULL, &b, NULL), 0);
	for (int i = 0; i < 2; i++) {
		assert_int_equal(far_server_new(NULL, &s[i], NULL), 0);
		assert_int_equal(far_server_export(s[i], "disk", b, NULL), 0);
	}
	assert_int_equal(far_server_listen(s[0], "grpc://127.0.0.1:0", &bound, NULL), 0);
	int port = atoi(strrchr(bound, ':') + 1);
	free(bound);
	snprintf(uri, sizeof uri, "grpc://moving.test:%d", port);
	assert_int_equal(far_open(uri, NULL, &far, NULL), 0);
	assert_int_equal(far_read(far, 0, &c, 1, 0), 0);
	far_server_stop(s[0]);
	far_server_free(s[0]);
	snprintf(uri, sizeof uri, "grpc://127.0.0.2:%d", port);
	assert_int_equal(far_server_listen(s[1], uri, NULL, NULL), 0);
	host_is = "127.0.0.2";
	assert_int_equal(AGAIN(far_read(far, 0, &c, 1, 0)), 0);
	far_close(far);
	far_server_stop(s[1]);
	far_server_free(s[1]);
	far_close(b);
}

static int remove_all(void **state)
{
	static const char *const names[] = { "one", "two", "old" };
	char path[200];

	for (size_t i = 0; i < FAR_ARRAY_LEN(names); i++) {
		snprintf(path, sizeof path, "%s/%s", dir, names[i]);
		unlink(path);
	}
	return rmdir(dir);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_restart),        cmocka_unit_test(test_plain_restart),
		cmocka_unit_test(test_restart_behind),
		cmocka_unit_test(test_late_write),     cmocka_unit_test(test_plain_late_write),
		cmocka_unit_test(test_somebody_else),  cmocka_unit_test(test_offline),
		cmocka_unit_test(test_offline_silent), cmocka_unit_test(test_no_storm),
		cmocka_unit_test(test_half_open),      cmocka_unit_test(test_slow_path),
		cmocka_unit_test(test_flipped),
		cmocka_unit_test(test_address_changes),
	};
	signal(SIGPIPE, SIG_IGN);
	if (!mkdtemp(dir))
		return 1;
	cmocka_set_test_filter(getenv("FAR_ONLY"));
	far_log_set_level(getenv("FAR_DEBUG") ? FAR_LOG_DEBUG : FAR_LOG_ERROR);
	return cmocka_run_group_tests(tests, NULL, remove_all);
}
