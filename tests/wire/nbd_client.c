/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The NBD client against a server of a hundred lines that does as each test says: late, out of order, gone, restarted. */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "base/clock.h"
#include "base/thread.h"

#include <arpa/inet.h>
#include <endian.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#define SIZE ((uint64_t)1 << 20)
#define SEEN 256
#define CONNS 64

enum { CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_ZEROES };
#define FLAG_FUA 1
#define EXPORT (1 | 4 | 8 | 64) /* flags, flush, FUA, zeroes */
#define MULTI 256

struct request {
	uint16_t flags, cmd;
	uint64_t cookie, off;
	uint32_t len;
};

struct server {
	int fd, port;
	uint16_t flags;
	struct far_thread accepts, serves[CONNS];
	struct far_mutex lock;
	struct far_cond cond;
	/* under lock */
	struct request seen[SEEN];
	unsigned n, conns, held;
	int conn[CONNS];
	bool stop;
	unsigned hold;    /* reads wait until so many are here, then go out last first */
	uint64_t late;    /* ns before a read is answered */
	uint8_t fill;     /* what reads give */
};

struct session {
	struct server *s;
	unsigned i;
};

static bool take(int fd, void *p, size_t n)
{
	for (size_t got = 0; got < n;) {
		ssize_t k = read(fd, (char *)p + got, n - got);
		if (k <= 0)
			return false;
		got += (size_t)k;
	}
	return true;
}

static void give(int fd, const void *p, size_t n)
{
	(void)!send(fd, p, n, MSG_NOSIGNAL);
}

static void reply(int fd, uint64_t cookie, const void *data, size_t n)
{
	struct __attribute__((packed)) { uint32_t magic, error; uint64_t cookie; } r = { htobe32(0x67446698), 0, cookie };

	give(fd, &r, sizeof r);
	if (n)
		give(fd, data, n);
}

static bool negotiate(struct server *s, int fd)
{
	struct __attribute__((packed)) { uint64_t magic; uint32_t opt, len; } o;
	struct __attribute__((packed)) { uint64_t magic; uint32_t opt, type, len; } a;
	struct __attribute__((packed)) { uint16_t type; uint64_t size; uint16_t flags; } e = { 0, htobe64(SIZE), htobe16(s->flags) };
	char skip[512];
	uint32_t client;

	give(fd, "NBDMAGICIHAVEOPT\0\3", 18);
	if (!take(fd, &client, 4))
		return false;
	for (;;) {
		if (!take(fd, &o, sizeof o) || be32toh(o.len) > sizeof skip || !take(fd, skip, be32toh(o.len)))
			return false;
		a.magic = htobe64(0x3e889045565a9);
		a.opt = o.opt;
		a.len = 0;
		if (o.opt != htobe32(7)) {
			a.type = htobe32(0x80000001);
			give(fd, &a, sizeof a);
			continue;
		}
		a.type = htobe32(3);
		a.len = htobe32(sizeof e);
		give(fd, &a, sizeof a);
		give(fd, &e, sizeof e);
		a.type = htobe32(1);
		a.len = 0;
		give(fd, &a, sizeof a);
		return true;
	}
}

static void answer_reads(struct server *s, int fd, struct request *held, unsigned n)
{
	static __thread uint8_t data[65536];

	while (n--) {
		for (uint32_t i = 0; i < held[n].len; i++)
			data[i] = (uint8_t)(s->fill + (held[n].off + i) / 512);
		reply(fd, held[n].cookie, data, held[n].len);
	}
}

static void *serve(void *opaque)
{
	struct session *me = opaque;
	struct server *s = me->s;
	int fd = s->conn[me->i];
	struct __attribute__((packed)) { uint32_t magic; uint16_t flags, cmd; uint64_t cookie, off; uint32_t len; } q;
	struct request held[64];
	static __thread char data[65536];
	unsigned n = 0;

	free(me);
	if (!negotiate(s, fd))
		return NULL;
	while (take(fd, &q, sizeof q)) {
		struct request r = { be16toh(q.flags), be16toh(q.cmd), q.cookie, be64toh(q.off), be32toh(q.len) };
		if (r.cmd == CMD_DISC || (r.cmd == CMD_WRITE && !take(fd, data, r.len)))
			break;
		far_mutex_lock(&s->lock);
		if (s->n < SEEN)
			s->seen[s->n++] = r;
		unsigned hold = s->hold;
		uint64_t late = s->late;
		far_cond_broadcast(&s->cond);
		far_mutex_unlock(&s->lock);
		if (r.cmd != CMD_READ) {
			reply(fd, r.cookie, NULL, 0);
			continue;
		}
		if (late)
			far_sleep_until(far_now() + late, false);
		held[n++] = r;
		if (n >= hold) {
			answer_reads(s, fd, held, n);
			n = 0;
		}
	}
	shutdown(fd, SHUT_RDWR);
	return NULL;
}

static void *accepts(void *opaque)
{
	struct server *s = opaque;

	for (;;) {
		int fd = accept(s->fd, NULL, NULL);
		far_mutex_lock(&s->lock);
		bool stop = s->stop || fd < 0 || s->conns == CONNS;
		unsigned i = s->conns;
		if (!stop)
			s->conn[s->conns++] = fd;
		far_mutex_unlock(&s->lock);
		if (stop) {
			if (fd >= 0)
				close(fd);
			return NULL;
		}
		struct session *me = malloc(sizeof *me);
		*me = (struct session){ s, i };
		assert_int_equal(far_thread_start(&s->serves[i], "serve", serve, me), 0);
	}
}

static struct server *server_open(uint16_t flags)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t n = sizeof a;
	struct server *s = calloc(1, sizeof *s);

	far_mutex_init(&s->lock);
	far_cond_init(&s->cond);
	s->flags = flags;
	s->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	assert_int_equal(bind(s->fd, (struct sockaddr *)&a, sizeof a) | listen(s->fd, 16), 0);
	assert_int_equal(getsockname(s->fd, (struct sockaddr *)&a, &n), 0);
	s->port = ntohs(a.sin_port);
	assert_int_equal(far_thread_start(&s->accepts, "accepts", accepts, s), 0);
	return s;
}

/* End all connections, as a restart does; or one. */
static void server_drop(struct server *s, int which)
{
	far_mutex_lock(&s->lock);
	for (unsigned i = 0; i < s->conns; i++)
		if (which < 0 || i == (unsigned)which)
			shutdown(s->conn[i], SHUT_RDWR);
	far_mutex_unlock(&s->lock);
}

static void server_close(struct server *s)
{
	far_mutex_lock(&s->lock);
	s->stop = true;
	far_mutex_unlock(&s->lock);
	shutdown(s->fd, SHUT_RDWR);
	far_thread_join(&s->accepts);
	server_drop(s, -1);
	for (unsigned i = 0; i < s->conns; i++) {
		far_thread_join(&s->serves[i]);
		close(s->conn[i]);
	}
	close(s->fd);
	far_cond_fini(&s->cond);
	far_mutex_fini(&s->lock);
	free(s);
}

static struct far_backend *client_open(struct server *s, const char *query)
{
	struct far_error err = { .text = "" };
	struct far_backend *b = NULL;
	char uri[200];

	snprintf(uri, sizeof uri, "nbd://127.0.0.1:%d%s", s->port, query);
	if (far_open(uri, NULL, &b, &err))
		fail_msg("%s", err.text);
	return b;
}

static unsigned count(struct server *s, uint16_t cmd, uint16_t flags)
{
	unsigned n = 0;

	far_mutex_lock(&s->lock);
	for (unsigned i = 0; i < s->n; i++)
		n += s->seen[i].cmd == cmd && (s->seen[i].flags & flags) == flags;
	far_mutex_unlock(&s->lock);
	return n;
}

static uint64_t instance(struct far_backend *b)
{
	struct far_origin o = FAR_ORIGIN_INIT;

	assert_int_equal(far_origin(b, &o, FAR_NOWAIT), 0);
	return o.instance;
}

/* ------------------------------------------------------------------------------------------------ */

static void test_a_flush_after_a_restart_says_so_once(void **state)
{
	struct server *s = server_open(EXPORT | MULTI);
	struct far_backend *b = client_open(s, "");
	char buf[512] = "x";
	uint64_t was = instance(b);

	server_drop(s, -1);
	assert_int_equal(far_read(b, 0, buf, 512, 0), 0); /* nothing was written: nothing can be forgotten */
	assert_int_equal(far_flush(b), 0);
	assert_int_equal(far_write(b, 0, buf, 512, 0), 0);
	assert_int_equal(far_flush(b), 0);
	server_drop(s, -1);
	assert_int_equal(far_read(b, 0, buf, 512, 0), 0);
	assert_int_equal(far_flush(b), 0); /* it was flushed before */
	assert_true(instance(b) == was);
	assert_int_equal(far_write(b, 0, buf, 512, 0), 0);
	server_drop(s, -1);
	int r;
	while ((r = far_write(b, 0, buf, 512, 0)) && far_error_is_transient(r))
		;
	assert_int_equal(r, 0);
	assert_int_equal(far_flush(b), -EREMOTEIO);
	assert_true(instance(b) != was);
	assert_int_equal(far_flush(b), 0);
	far_close(b);
	server_close(s);
}

static void test_a_connection_that_is_left_proves_the_server(void **state)
{
	struct server *s = server_open(EXPORT | MULTI);
	struct far_backend *b = client_open(s, "?connections=3");
	char buf[512] = "x";

	assert_int_equal(far_write(b, 0, buf, 512, 0), 0);
	server_drop(s, 1);
	server_drop(s, 2);
	assert_int_equal(far_flush(b), 0);
	far_close(b);
	server_close(s);
}

static void test_fua_where_it_is_enough(void **state)
{
	struct server *s = server_open(EXPORT);
	struct far_backend *b = client_open(s, "");
	char buf[512] = "x";

	assert_int_equal(far_write(b, 0, buf, 512, FAR_FLUSH), 0);
	assert_int_equal(count(s, CMD_WRITE, FLAG_FUA), 1);
	assert_int_equal(count(s, CMD_FLUSH, 0), 0);
	assert_int_equal(far_write(b, 512, buf, 512, 0), 0);
	assert_int_equal(far_write(b, 0, buf, 512, FAR_FLUSH), 0); /* the one before has to be covered, too */
	assert_int_equal(count(s, CMD_WRITE, FLAG_FUA), 1);
	assert_int_equal(count(s, CMD_FLUSH, 0), 1);
	assert_int_equal(far_write(b, 0, buf, 512, FAR_FLUSH), 0);
	assert_int_equal(count(s, CMD_WRITE, FLAG_FUA), 2);
	far_close(b);
	server_close(s);
}

static void test_a_late_answer_changes_no_buffer(void **state)
{
	struct server *s = server_open(EXPORT);
	struct far_backend *b = client_open(s, "");
	static uint8_t buf[32768], was[32768];

	s->fill = 7;
	far_mutex_lock(&s->lock);
	s->late = 300 * FAR_MSEC;
	far_mutex_unlock(&s->lock);
	memset(buf, 0xee, sizeof buf);
	uint64_t began = far_now(), old = far_deadline_limit(began + 50 * FAR_MSEC);
	assert_int_equal(far_read(b, 0, buf, sizeof buf, 0), -ETIMEDOUT);
	far_deadline_restore(old);
	assert_true(far_now() - began < 250 * FAR_MSEC || getenv("VALGRIND"));
	memcpy(was, buf, sizeof buf);
	/* Until the server has tried to answer: its next read on another connection comes after it. */
	far_sleep_until(began + 400 * FAR_MSEC, false);
	far_mutex_lock(&s->lock);
	s->late = 0;
	far_mutex_unlock(&s->lock);
	assert_int_equal(memcmp(buf, was, sizeof buf), 0);
	assert_int_equal(far_read(b, 0, buf, sizeof buf, 0), 0);
	assert_true(buf[0] == 7 && buf[512] == 8);
	far_close(b);
	server_close(s);
}

struct reader {
	struct far_thread t;
	struct far_backend *b;
	uint64_t off;
	int r;
	uint8_t buf[512];
};

static void *reader(void *opaque)
{
	struct reader *m = opaque;

	m->r = far_read(m->b, m->off, m->buf, sizeof m->buf, 0);
	return NULL;
}

static void test_replies_out_of_order(void **state)
{
	struct server *s = server_open(EXPORT);
	struct far_backend *b = client_open(s, "?connections=1");
	static struct reader m[32];

	s->hold = FAR_ARRAY_LEN(m);
	for (int round = 0; round < 20; round++) {
		for (size_t i = 0; i < FAR_ARRAY_LEN(m); i++) {
			m[i] = (struct reader){ .b = b, .off = i * 512 };
			assert_int_equal(far_thread_start(&m[i].t, "reader", reader, &m[i]), 0);
		}
		for (size_t i = 0; i < FAR_ARRAY_LEN(m); i++) {
			far_thread_join(&m[i].t);
			assert_int_equal(m[i].r, 0);
			assert_int_equal(m[i].buf[0], i);
			assert_int_equal(m[i].buf[511], i);
		}
	}
	far_close(b);
	server_close(s);
}

static void test_stop_ends_what_waits(void **state)
{
	struct server *s = server_open(EXPORT);
	struct far_backend *b = client_open(s, "");
	static struct reader m[8];

	s->hold = 100;
	for (size_t i = 0; i < FAR_ARRAY_LEN(m); i++) {
		m[i] = (struct reader){ .b = b, .off = i * 512 };
		assert_int_equal(far_thread_start(&m[i].t, "reader", reader, &m[i]), 0);
	}
	far_mutex_lock(&s->lock);
	while (s->n < FAR_ARRAY_LEN(m))
		assert_true(far_cond_wait_until(&s->cond, &s->lock, far_now() + 20 * FAR_SEC));
	far_mutex_unlock(&s->lock);
	far_stop(b);
	for (size_t i = 0; i < FAR_ARRAY_LEN(m); i++) {
		far_thread_join(&m[i].t);
		assert_int_equal(m[i].r, -ESHUTDOWN);
	}
	far_close(b);
	server_close(s);
}

/* One caller's deadline ends a connection; the others' reads are made again elsewhere. */
static void test_one_that_gives_up_does_not_take_others_along(void **state)
{
	struct server *s = server_open(EXPORT);
	struct far_backend *b = client_open(s, "?connections=1");
	static struct reader m[4];
	uint8_t buf[512];

	s->hold = 5;
	for (size_t i = 0; i < FAR_ARRAY_LEN(m); i++) {
		m[i] = (struct reader){ .b = b, .off = i * 512 };
		assert_int_equal(far_thread_start(&m[i].t, "reader", reader, &m[i]), 0);
	}
	far_mutex_lock(&s->lock);
	while (s->n < FAR_ARRAY_LEN(m))
		assert_true(far_cond_wait_until(&s->cond, &s->lock, far_now() + 20 * FAR_SEC));
	s->hold = 0;
	s->n = 0;
	s->late = 0;
	s->hold = 6; /* the fifth does not make it full */
	far_mutex_unlock(&s->lock);
	uint64_t old = far_deadline_limit(far_now() + 50 * FAR_MSEC);
	int r = far_read(b, 0, buf, sizeof buf, 0);
	far_deadline_restore(old);
	assert_int_equal(r, -ETIMEDOUT);
	far_mutex_lock(&s->lock);
	s->hold = 1;
	far_mutex_unlock(&s->lock);
	/* Those that were made again before that wait for one more. */
	(void)far_read(b, 0, buf, sizeof buf, 0);
	for (size_t i = 0; i < FAR_ARRAY_LEN(m); i++) {
		far_thread_join(&m[i].t);
		assert_int_equal(m[i].r, 0);
		assert_int_equal(m[i].buf[0], i);
	}
	far_close(b);
	server_close(s);
}

static void test_writes_of_unknown_fate_are_not_made_again(void **state)
{
	struct server *s = server_open(EXPORT);
	struct far_backend *b = client_open(s, "");
	char buf[512] = "x";

	server_drop(s, -1);
	far_sleep_until(far_now() + 20 * FAR_MSEC, false); /* an idle connection is looked at after 10 ms */
	assert_int_equal(far_write(b, 0, buf, 512, 0), 0);
	assert_int_equal(count(s, CMD_WRITE, 0), 1);
	far_close(b);
	server_close(s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_flush_after_a_restart_says_so_once),
		cmocka_unit_test(test_a_connection_that_is_left_proves_the_server),
		cmocka_unit_test(test_fua_where_it_is_enough),
		cmocka_unit_test(test_a_late_answer_changes_no_buffer),
		cmocka_unit_test(test_replies_out_of_order),
		cmocka_unit_test(test_stop_ends_what_waits),
		cmocka_unit_test(test_one_that_gives_up_does_not_take_others_along),
		cmocka_unit_test(test_writes_of_unknown_fate_are_not_made_again),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
