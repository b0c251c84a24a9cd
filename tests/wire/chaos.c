/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Several threads write, zero, read and flush through one client and the retry layer, each in a part of the region of its
 * own, while connections are cut, garbled, muted and held back at random and the server is restarted. No call fails, every
 * read gives what was written last, and in the end, after all that was held back has come, the server has it too.
 * 4 seconds; with FARPAGE_LONG 60. FAR_SEED repeats the choices, not the timing.
 */
#define _GNU_SOURCE
#include "peer.h"
#include "proxy.h"

#include "wire/server.h"

#include <signal.h>
#include <unistd.h>

#define THREADS 8
#define PART (64 << 10)
#define CALL (20 * FAR_SEC)

struct chaos {
	struct proxy proxy;
	struct far_server *server;
	struct far_backend *store, *far;
	_Atomic bool stop;
};

struct actor {
	struct far_thread t;
	struct chaos *c;
	uint64_t base;
	uint32_t rng;
	uint8_t want[PART], buf[PART];
	unsigned calls;
	char fail[200];
};

static uint32_t next(uint32_t *rng)
{
	return (*rng = *rng * 1664525 + 1013904223) >> 8;
}

static void actor_result(struct actor *a, const char *what, int r, uint64_t began)
{
	a->calls++;
	if (!a->fail[0] && (r || far_now() - began > CALL + 5 * FAR_SEC))
		snprintf(a->fail, sizeof a->fail, "%s: %s after %.1f s", what, far_strerror(r),
			 (double)(far_now() - began) / (double)FAR_SEC);
}

/* Several at once: parts of [off, off+len), every other one of them. */
static void actor_list(struct actor *a, bool write, uint64_t off, size_t len, unsigned flags)
{
	uint64_t began = far_now();
	size_t n = 2 + next(&a->rng) % 40, part = len / (2 * n);
	struct far_io io[41];

	for (size_t i = 0; i < n; i++) {
		uint64_t at = off + 2 * i * part;
		for (size_t k = 0; write && k < part; k++)
			a->want[at + k] = (uint8_t)next(&a->rng);
		io[i] = (struct far_io){ .off = a->base + at, .len = part, .buf = (write ? a->want : a->buf) + at };
	}
	if (write) {
		actor_result(a, "write", far_write_many(a->c->far, io, n, flags), began);
		return;
	}
	actor_result(a, "read", far_read_many(a->c->far, io, n, flags), began);
	for (size_t i = 0; i < n; i++)
		if (!a->fail[0] && memcmp(io[i].buf, a->want + io[i].off - a->base, part))
			snprintf(a->fail, sizeof a->fail, "%zu of a list gave something else", i);
}

static void actor_step(struct actor *a)
{
	uint64_t off = next(&a->rng) % PART, began = far_now();
	size_t len = 1 + next(&a->rng) % far_min(PART - off, 20000);
	unsigned flags = next(&a->rng) % 2 ? FAR_BULK : 0;
	uint32_t what = next(&a->rng) % 20;

	if (what < 7) {
		for (size_t i = 0; i < len; i++)
			a->want[off + i] = (uint8_t)next(&a->rng);
		actor_result(a, "write", far_write(a->c->far, a->base + off, a->want + off, len,
						   flags | (what == 0 ? FAR_FLUSH : 0)), began);
	} else if (what < 9) {
		memset(a->want + off, 0, len);
		actor_result(a, "zero", what == 7 ? far_zero(a->c->far, a->base + off, len, flags) :
					far_discard(a->c->far, a->base + off, len, flags), began);
	} else if (what < 15) {
		actor_result(a, "read", far_read(a->c->far, a->base + off, a->buf, len, flags), began);
		if (!a->fail[0] && memcmp(a->buf, a->want + off, len))
			snprintf(a->fail, sizeof a->fail, "a read at %" PRIu64 " of %zu gave something else", off, len);
	} else if (what < 19) {
		actor_list(a, what < 17, off, len, flags);
	} else {
		actor_result(a, "flush", far_flush(a->c->far), began);
	}
	/* A restart in between: some of what was written could be gone, here it is not. */
	if (!strncmp(a->fail, "write: Remote I/O", 17) || !strncmp(a->fail, "flush: Remote I/O", 17))
		a->fail[0] = 0;
}

static void *actor_run(void *arg)
{
	struct actor *a = arg;

	while (!a->c->stop && !a->fail[0])
		actor_step(a);
	return NULL;
}

static void chaos_serve(struct chaos *c)
{
	char *bound;

	assert_int_equal(far_server_new(NULL, &c->server, NULL), 0);
	assert_int_equal(far_server_export(c->server, "disk", c->store, NULL), 0);
	assert_int_equal(far_server_listen(c->server, "grpc://127.0.0.1:0", &bound, NULL), 0);
	proxy_lead(&c->proxy, atoi(strrchr(bound, ':') + 1));
	free(bound);
}

static void chaos_end(struct chaos *c)
{
	far_server_stop(c->server);
	far_server_free(c->server);
}

static void test_chaos(void **state)
{
	struct chaos *c = calloc(1, sizeof *c);
	struct actor *a = calloc(THREADS, sizeof *a);
	const char *text = getenv("FAR_SEED");
	uint32_t rng = text ? (uint32_t)strtoul(text, NULL, 0) : (uint32_t)(far_now() ^ (uint64_t)getpid() << 16);
	uint64_t end = far_now() + (getenv("FARPAGE_LONG") ? 60 : 4) * FAR_SEC;
	struct far_backend *b;
	char uri[100];
	unsigned faults[PROXY_FAULTS] = { 0 }, restarts = 0, cuts = 0, calls = 0;

	print_message("FAR_SEED=%u\n", rng);
	assert_true(proxy_start(&c->proxy, 1));
	assert_int_equal(far_open("mem:512K", NULL, &c->store, NULL), 0);
	chaos_serve(c);
	snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d?silence=350ms&timeout=3s", c->proxy.port);
	assert_int_equal(far_open(uri, NULL, &b, NULL), 0);
	assert_int_equal(far_layer_open("retry:deadline=20s,backoff=5ms,max-backoff=50ms,budget=100000", b, &c->far, NULL), 0);
	for (int i = 0; i < THREADS; i++) {
		a[i].c = c;
		a[i].base = (uint64_t)i * PART;
		a[i].rng = next(&rng);
		assert_int_equal(far_thread_start(&a[i].t, "actor", actor_run, &a[i]), 0);
	}
	while (far_now() < end) {
		uint32_t what = next(&rng) % 20;
		if (what < 16) {
			enum proxy_fault f = PROXY_CUT + next(&rng) % (PROXY_FAULTS - PROXY_CUT);
			proxy_set(&c->proxy, f, next(&rng) % 100, next(&rng));
			faults[f]++;
		} else if (what < 18) {
			proxy_refuse(&c->proxy, true);
			far_sleep_until(far_now() + next(&rng) % 50 * FAR_MSEC, false);
			proxy_refuse(&c->proxy, false);
			cuts++;
		} else {
			chaos_end(c);
			chaos_serve(c);
			restarts++;
		}
		far_sleep_until(far_now() + (20 + next(&rng) % 200) * FAR_MSEC, false);
		if (next(&rng) % 8 == 0)
			assert_true(proxy_release(&c->proxy));
	}
	proxy_set(&c->proxy, PROXY_NONE, 0, 0);
	c->stop = true;
	for (int i = 0; i < THREADS; i++) {
		far_thread_join(&a[i].t);
		calls += a[i].calls;
	}
	for (unsigned f = PROXY_CUT; f < PROXY_FAULTS; f++)
		print_message("%s: %u, ", proxy_names[f], faults[f]);
	print_message("all connections cut: %u, restarts: %u; %u calls\n", cuts, restarts, calls);
	assert_true(proxy_release(&c->proxy));
	for (int i = 0; i < THREADS; i++) {
		if (a[i].fail[0])
			fail_msg("thread %d: %s", i, a[i].fail);
		assert_int_equal(far_read(c->store, a[i].base, a[i].buf, PART, 0), 0);
		assert_memory_equal(a[i].buf, a[i].want, PART);
	}
	far_close(c->far);
	proxy_stop(&c->proxy);
	chaos_end(c);
	far_close(c->store);
	free(a);
	free(c);
}

/* A change and then what was done about it garbled: the greeting of the connection that fences, for example. */
static void test_garbled_twice(void **state)
{
	struct chaos *c = calloc(1, sizeof *c);
	struct far_backend *b;
	char uri[100], data[100], back[100];
	uint32_t rng = 1;

	assert_true(proxy_start(&c->proxy, 1));
	assert_int_equal(far_open("mem:512K", NULL, &c->store, NULL), 0);
	chaos_serve(c);
	snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d?silence=200ms&timeout=1s", c->proxy.port);
	assert_int_equal(far_open(uri, NULL, &b, NULL), 0);
	assert_int_equal(far_layer_open("retry:deadline=20s,backoff=5ms,max-backoff=50ms,budget=100000", b, &c->far, NULL), 0);
	for (unsigned k = 0; k < 60; k++) {
		memset(data, (int)k, sizeof data);
		proxy_set_twice(&c->proxy, PROXY_FLIP, k % 6, 1 + k / 6 % 10, next(&rng));
		int r = far_write(c->far, 1000, data, sizeof data, 0);
		proxy_set(&c->proxy, PROXY_NONE, 0, 0);
		if (r)
			fail_msg("messages %u and %u: %s", k % 6, k % 6 + 1 + k / 6 % 10, far_strerror(r));
		assert_int_equal(far_read(c->store, 1000, back, sizeof back, 0), 0);
		assert_memory_equal(data, back, sizeof data);
	}
	far_close(c->far);
	proxy_stop(&c->proxy);
	chaos_end(c);
	far_close(c->store);
	free(c);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_chaos), cmocka_unit_test(test_garbled_twice) };

	signal(SIGPIPE, SIG_IGN);
	far_log_set_level(getenv("FAR_DEBUG") ? FAR_LOG_DEBUG : FAR_LOG_ERROR);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
