/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A link that breaks all the time: a relay between client and server cuts its connections after some bytes or holds them
 * up for a moment, while callers with short and long deadlines read and write. What was acknowledged is there, what is
 * read is whole, nothing is touched after a call has returned, and nobody hangs. */
#define _GNU_SOURCE
#include "peer.h"

#include "backend/backend.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <unistd.h>

#define CALLERS 8
#define STRIPE (300 * 1024)
#define SOAK (3 * FAR_SEC)

static _Atomic bool soak_stop;
static _Atomic uint64_t soak_seed = 0x2545f4914f6cdd1d;

static uint64_t rnd(void)
{
	uint64_t x = atomic_fetch_add(&soak_seed, 0x9e3779b97f4a7c15);

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

/* --------------------------------------------------------------------------------------------------- relay */

#define PAIRS 32

struct relay {
	struct far_thread t;
	int listen, port;
	const char *server;
	struct {
		int a, b;
		int64_t left; /* bytes until it is cut */
	} pair[PAIRS];
	unsigned n, cuts;
};

static void relay_cut(struct relay *r, unsigned i)
{
	struct linger hard = { 1, 0 };

	/* Half of them with a reset, half with an orderly end. */
	if (rnd() & 1)
		setsockopt(r->pair[i].a, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
	close(r->pair[i].a);
	close(r->pair[i].b);
	r->pair[i] = r->pair[--r->n];
	r->cuts++;
}

static bool relay_move(struct relay *r, unsigned i, int from, int to)
{
	char buf[32768];
	ssize_t n = recv(from, buf, sizeof buf, MSG_DONTWAIT);

	if (n < 0 && errno == EAGAIN)
		return true;
	if (n <= 0)
		return false;
	for (ssize_t at = 0; at < n;) {
		ssize_t k = send(to, buf + at, (size_t)(n - at), MSG_NOSIGNAL | MSG_DONTWAIT);
		if (k < 0 && errno == EAGAIN) {
			struct pollfd p = { .fd = to, .events = POLLOUT };
			if (soak_stop || poll(&p, 1, 100) <= 0)
				return false; /* stuck both ways: another cut */
			continue;
		}
		if (k <= 0)
			return false;
		at += k;
	}
	r->pair[i].left -= n;
	return r->pair[i].left > 0;
}

static void *relay_run(void *arg)
{
	struct relay *r = arg;

	while (!soak_stop) {
		struct pollfd p[1 + 2 * PAIRS] = { { .fd = r->listen, .events = r->n < PAIRS ? POLLIN : 0 } };
		for (unsigned i = 0; i < r->n; i++) {
			p[1 + 2 * i] = (struct pollfd){ .fd = r->pair[i].a, .events = POLLIN };
			p[2 + 2 * i] = (struct pollfd){ .fd = r->pair[i].b, .events = POLLIN };
		}
		unsigned n = r->n;
		if (poll(p, 1 + 2 * n, 20) <= 0)
			continue;
		for (unsigned i = n; i-- > 0;) {
			bool on = true;
			if (p[1 + 2 * i].revents)
				on = relay_move(r, i, r->pair[i].a, r->pair[i].b);
			if (on && p[2 + 2 * i].revents)
				on = relay_move(r, i, r->pair[i].b, r->pair[i].a);
			if (!on)
				relay_cut(r, i);
		}
		if (p[0].revents) {
			int a = accept(r->listen, NULL, NULL), b = a < 0 ? -1 : tcp_connect(r->server);
			if (b < 0) {
				if (a >= 0)
					close(a);
				continue;
			}
			r->pair[r->n].a = a;
			r->pair[r->n].b = b;
			/* The first one lives long enough to be opened; most die in the middle of something. */
			r->pair[r->n].left = r->cuts || r->n ? (int64_t)(rnd() % (8 << 20)) : 1 << 20;
			r->n++;
		}
	}
	while (r->n)
		relay_cut(r, 0);
	return NULL;
}

/* ------------------------------------------------------------------------------------------------- callers */

struct caller {
	struct far_thread t;
	struct far_backend *b;
	unsigned id, done, failed;
	int odd;      /* a code that is none of the expected ones */
	uint8_t *truth, *buf;
	bool wrong;
};

static bool expected(int r)
{
	return r == 0 || far_error_is_transient(r) || r == -ETIMEDOUT;
}

/* What belongs at a place is always the same: a write that was given up may still land, after a later one. */
static void caller_fill(const struct caller *c, uint8_t *to, uint64_t at, size_t len)
{
	for (size_t i = 0; i < len; i++)
		to[i] = (uint8_t)((at + i) * 31 + ((at + i) >> 8) + c->id) | 1;
}

/* Until it is acknowledged. */
static void caller_write(struct caller *c, uint64_t at, size_t len)
{
	caller_fill(c, c->buf, at, len);
	while (!soak_stop) {
		uint64_t old = far_deadline_limit(far_now() + (rnd() % 4 ? 2 * FAR_SEC : rnd() % (2 * FAR_MSEC)));
		int r = far_write(c->b, (uint64_t)c->id * STRIPE + at, c->buf, len, c->id & 1 ? FAR_BULK : 0);
		far_deadline_restore(old);
		if (!expected(r))
			c->odd = r;
		if (r == 0) {
			memcpy(c->truth + at, c->buf, len);
			c->done++;
			return;
		}
		c->failed++;
		/* The buffer is ours again at once: what is put into it now must not arrive. */
		memset(c->buf, 0xee, len);
		caller_fill(c, c->buf, at, len);
	}
}

static void caller_read(struct caller *c, uint64_t at, size_t len)
{
	uint64_t old = far_deadline_limit(far_now() + (rnd() % 4 ? 2 * FAR_SEC : rnd() % (2 * FAR_MSEC)));

	memset(c->buf, 0x5c, len);
	int r = far_read(c->b, (uint64_t)c->id * STRIPE + at, c->buf, len, c->id & 2 ? FAR_BULK : 0);
	far_deadline_restore(old);
	if (!expected(r))
		c->odd = r;
	if (r) {
		c->failed++;
		memset(c->buf, 0x11, len);
		for (int i = 0; i < 200; i++)
			far_thread_yield();
		for (size_t i = 0; i < len; i++)
			c->wrong |= c->buf[i] != 0x11; /* somebody wrote after the call had ended */
		return;
	}
	c->done++;
	/* A byte that was never acknowledged may have arrived all the same. */
	uint8_t want[4096];
	for (size_t i = 0; i < len; i++) {
		if (i % sizeof want == 0)
			caller_fill(c, want, at + i, (size_t)far_min(sizeof want, len - i));
		c->wrong |= c->buf[i] != want[i % sizeof want] && (c->buf[i] || c->truth[at + i]);
	}
}

static void *caller_run(void *arg)
{
	struct caller *c = arg;

	while (!soak_stop && !c->wrong && !c->odd) {
		uint64_t at = rnd() % STRIPE;
		size_t len = (size_t)(1 + rnd() % (STRIPE - at));
		if (rnd() & 1)
			caller_write(c, at, len);
		else
			caller_read(c, at, len);
	}
	return NULL;
}

static void test_breaking_link(void **state)
{
	struct far_backend *b, *far;
	struct far_server *s;
	struct far_error err = { .code = 0 };
	struct caller c[CALLERS];
	struct relay relay = { .n = 0 };
	char *uri, via[100];
	unsigned done = 0, failed = 0;

	printf("seed %llu\n", (unsigned long long)soak_seed);
	char mem[40];
	snprintf(mem, sizeof mem, "mem:%d", CALLERS * STRIPE);
	assert_int_equal(far_open(mem, NULL, &b, NULL), 0);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "disk", b, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &uri, NULL), 0);
	relay.server = uri;
	relay.listen = tcp_listen(&relay.port);
	assert_int_equal(far_thread_start(&relay.t, "relay", relay_run, &relay), 0);
	snprintf(via, sizeof via, "grpc://127.0.0.1:%d", relay.port);
	if (far_open(via, NULL, &far, &err))
		fail_msg("%s", err.text);
	for (unsigned i = 0; i < CALLERS; i++) {
		c[i] = (struct caller){ .b = far, .id = i, .truth = calloc(1, STRIPE), .buf = malloc(STRIPE) };
		assert_int_equal(far_thread_start(&c[i].t, "caller", caller_run, &c[i]), 0);
	}
	/* It ends when enough has happened, not before the time and not long after it. */
	uint64_t began = far_now();
	struct pollfd nothing = { .fd = -1 };
	while (far_now() - began < SOAK)
		poll(&nothing, 1, 50);
	soak_stop = true;
	far_stop(far);
	for (unsigned i = 0; i < CALLERS; i++) {
		far_thread_join(&c[i].t);
		done += c[i].done;
		failed += c[i].failed;
		if (c[i].odd && c[i].odd != -ESHUTDOWN)
			fail_msg("caller %u: %s", i, far_strerror(c[i].odd));
		assert_false(c[i].wrong);
	}
	far_thread_join(&relay.t);
	far_close(far);
	far_server_stop(s);
	for (unsigned i = 0; i < CALLERS; i++) {
		assert_int_equal(far_read(b, (uint64_t)i * STRIPE, c[i].buf, STRIPE, 0), 0);
		for (size_t k = 0; k < STRIPE; k++)
			if (c[i].truth[k])
				assert_int_equal(c[i].buf[k], c[i].truth[k]);
		free(c[i].truth);
		free(c[i].buf);
	}
	printf("%u calls done, %u failed, %u cuts\n", done, failed, relay.cuts);
	assert_true(done > 50 && failed > 5 && relay.cuts > 5);
	far_server_free(s);
	far_close(b);
	close(relay.listen);
	free(uri);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_breaking_link) };
	signal(SIGPIPE, SIG_IGN);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
