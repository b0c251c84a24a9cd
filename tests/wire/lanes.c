/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* How many callers share few connections: who waits for whom, who is woken, when another connection is made and what goes
 * over which. */
#define _GNU_SOURCE
#include "peer.h"

#include "wire/server.h"
#include "wire/wire.h"

#include <limits.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

/* A server of a backend whose calls can be held up, and a client. */
struct slow_rig {
	struct slow slow;
	struct far_backend *b, *far;
	struct far_server *s;
	char *uri;
};

static void slow_rig_open(struct slow_rig *r, size_t size, unsigned threads)
{
	struct far_server_opts opts = FAR_SERVER_OPTS_INIT;

	opts.max_threads = threads;
	r->b = slow_open(&r->slow, size);
	assert_int_equal(far_server_new(&opts, &r->s, NULL), 0);
	assert_int_equal(far_server_export(r->s, "disk", r->b, NULL), 0);
	assert_int_equal(far_server_listen(r->s, "grpc://127.0.0.1:0", &r->uri, NULL), 0);
	assert_int_equal(far_open(r->uri, NULL, &r->far, NULL), 0);
}

static void slow_rig_close(struct slow_rig *r)
{
	far_close(r->far);
	far_server_stop(r->s);
	far_server_free(r->s);
	far_close(r->b);
	slow_free(&r->slow);
	free(r->uri);
}

/* 512 calls that are all in flight at once: the backend lets none go before the last is in. */
static void test_512_in_flight(void **state)
{
	enum { N = 512 };
	struct slow_rig r;

	slow_rig_open(&r, N * 4096, N + 16);
	slow_hold(&r.slow, true);
	struct worker *w = workers_start(r.far, N, 1, 1, 4096);
	assert_true(slow_wait_inside(&r.slow, N));
	slow_hold(&r.slow, false);
	workers_end(w, N);
	slow_rig_close(&r);
}

/* A call that waits in the backend holds up no other of its connection. */
static void test_slow_call_stops_nobody(void **state)
{
	struct slow slow;
	struct far_backend *b = slow_open(&slow, 1 << 20), *mem, *far_slow, *far_mem;
	struct far_server *s;
	char *uri, one[200], two[200], c;

	assert_int_equal(far_open("mem:1M", NULL, &mem, NULL), 0);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "slow", b, NULL), 0);
	assert_int_equal(far_server_export(s, "mem", mem, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &uri, NULL), 0);
	snprintf(one, sizeof one, "%s/slow", uri);
	snprintf(two, sizeof two, "%s/mem", uri);
	assert_int_equal(far_open(one, NULL, &far_slow, NULL), 0);
	assert_int_equal(far_open(two, NULL, &far_mem, NULL), 0);
	slow_hold(&slow, true);
	struct worker *w = workers_start(far_slow, 8, 1, 1, 512);
	assert_true(slow_wait_inside(&slow, 8));
	for (int i = 0; i < 100; i++)
		assert_int_equal(far_read(far_mem, 0, &c, 1, 0), 0);
	slow_hold(&slow, false);
	workers_end(w, 8);
	far_close(far_slow);
	far_close(far_mem);
	far_server_stop(s);
	far_server_free(s);
	far_close(b);
	far_close(mem);
	slow_free(&slow);
	free(uri);
}

static void *held_write_run(void *arg)
{
	far_write(arg, 0, "x", 1, 0);
	return NULL;
}

struct slowly {
	struct far_thread t;
	int from, to;
	size_t piece; /* so many bytes a millisecond; 0: as they come */
};

static void *slowly_run(void *arg)
{
	struct slowly *s = arg;
	char buf[16384];
	ssize_t n;

	while ((n = read(s->from, buf, s->piece ? s->piece : sizeof buf)) > 0) {
		assert_int_equal(write(s->to, buf, (size_t)n), n);
		if (s->piece)
			usleep(1000);
	}
	shutdown(s->to, SHUT_WR);
	return NULL;
}

/* A caller whose reply another one reads, piece by piece, is woken when it is whole, not for each piece. */
static void test_woken_once(void **state)
{
	enum { N = 10, PIECE = 8192, LEN = 40 * PIECE };
	long least = LONG_MAX;
	struct slow slow;
	struct far_backend *b = slow_open(&slow, LEN), *far;
	struct far_server *s;
	struct rusage before, after;
	struct far_thread t;
	uint8_t *buf = malloc(LEN);
	int near[2], away[2];

	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, near), 0);
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, away), 0);
	struct slowly up = { .from = near[1], .to = away[0] }, down = { .from = away[0], .to = near[1], .piece = PIECE };
	assert_int_equal(far_thread_start(&up.t, "up", slowly_run, &up), 0);
	assert_int_equal(far_thread_start(&down.t, "down", slowly_run, &down), 0);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "disk", b, NULL), 0);
	assert_int_equal(far_server_serve(s, away[1], NULL), 0);
	assert_int_equal(far_grpc_open_fd(near[0], "the other end", NULL, &far, NULL), 0);
	memset(slow.mem, 7, LEN); /* zeros would not be sent */
	slow.reads_go = true;
	slow_hold(&slow, true);
	assert_int_equal(far_thread_start(&t, "writer", held_write_run, far), 0);
	assert_true(slow_wait_inside(&slow, 1)); /* who wrote reads for all, once it has come to that */
	for (unsigned i = 0; i < N; i++) {
		assert_int_equal(getrusage(RUSAGE_THREAD, &before), 0);
		assert_int_equal(far_read(far, 0, buf, LEN, 0), 0);
		assert_int_equal(getrusage(RUSAGE_THREAD, &after), 0);
		least = far_min(least, after.ru_nvcsw - before.ru_nvcsw);
	}
	print_message("woken %ld times for a reply of 40 pieces\n", least);
	assert_in_range(least, 1, 4); /* and now and then for a lock */
	slow_hold(&slow, false);
	far_thread_join(&t);
	far_close(far);
	far_server_stop(s);
	far_server_free(s);
	far_thread_join(&up.t);
	far_thread_join(&down.t);
	close(near[1]);
	close(away[0]);
	far_close(b);
	slow_free(&slow);
	free(buf);
}

struct long_read {
	struct far_thread t;
	struct far_backend *b;
	uint8_t *buf;
	size_t len;
	int result;
};

static void *long_read_run(void *arg)
{
	struct long_read *l = arg;

	l->result = far_read(l->b, 0, l->buf, l->len, FAR_BULK);
	return NULL;
}

/* The backend holds a read up, and tells how many parts of it are with it at once. */
static void long_read(struct long_read *l, struct slow *slow, unsigned parts, int error)
{
	slow_hold(slow, true);
	slow->max_inside = 0;
	assert_int_equal(far_thread_start(&l->t, "reader", long_read_run, l), 0);
	assert_true(slow_wait_inside(slow, parts));
	slow->error = error;
	slow_hold(slow, false);
	far_thread_join(&l->t);
	assert_int_equal(l->result, error);
	assert_int_equal(slow->max_inside, parts);
	slow->error = 0;
}

/* Let it see how near the peer is. */
static void come_near(struct far_backend *far)
{
	uint64_t took = FAR_NEVER, end = far_now() + LIMIT;
	char c;

	while (took > FAR_MSEC && far_now() < end) {
		uint64_t began = far_now();
		assert_int_equal(far_read(far, 0, &c, 1, 0), 0);
		took = far_now() - began;
	}
	assert_true(took <= FAR_MSEC);
}

/* Long reads are made in parts: all at once far away, near by two at a time; both give the right bytes, or the error. */
static void test_long_reads(void **state)
{
	enum { LEN = (4 << 20) + 77 };
	struct slow_rig r;
	uint8_t *buf = malloc(LEN);

	slow_rig_open(&r, LEN, 0);
	for (size_t i = 0; i < LEN; i++)
		r.slow.mem[i] = (uint8_t)(i * 2654435761u >> 24);
	struct long_read l = { .b = r.far, .buf = buf, .len = LEN };
	long_read(&l, &r.slow, 9, 0); /* how far it is is not known yet: one is over the demand lane */
	assert_memory_equal(buf, r.slow.mem, LEN);
	come_near(r.far);
	memset(buf, 0, LEN);
	long_read(&l, &r.slow, 2, 0);
	assert_memory_equal(buf, r.slow.mem, LEN);
	long_read(&l, &r.slow, 2, -ENOSPC);
	memset(buf, 0, LEN);
	assert_int_equal(far_read(r.far, 0, buf, LEN, 0), 0);
	assert_memory_equal(buf, r.slow.mem, LEN);
	slow_rig_close(&r);
	free(buf);
}

/* Another client, which knows how far the peer is: calls take `delay`. */
static void slow_rig_anew(struct slow_rig *r, uint64_t delay)
{
	char c;

	far_close(r->far);
	r->slow.delay = delay;
	assert_int_equal(far_open(r->uri, NULL, &r->far, NULL), 0);
	if (delay)
		assert_int_equal(far_read(r->far, 0, &c, 1, 0), 0);
	else
		come_near(r->far);
}

/* A few calls share one connection. More get a second one, where that is quickly made. */
static void test_second_connection(void **state)
{
	struct slow_rig r;

	slow_rig_open(&r, 16 * 512, 0);
	for (unsigned distant = 0; distant < 2; distant++) {
		slow_rig_anew(&r, distant ? 10 * FAR_MSEC : 0);
		for (unsigned n = 3; n <= 8; n += 5) {
			struct far_counters sum = { .size = sizeof sum };
			slow_hold(&r.slow, true);
			struct worker *w = workers_start(r.far, n, 2, 1, 512); /* whose first call is no bulk */
			assert_true(slow_wait_inside(&r.slow, n));
			far_counters(r.far, &sum);
			assert_int_equal(sum.connects, n > 3 && !distant ? 2 : 1);
			slow_hold(&r.slow, false);
			workers_end(w, n);
		}
	}
	slow_rig_close(&r);
}

/* Far away a little of what is pulled is read as if somebody waited, now and then: it keeps that connection's window open. */
static void test_kept_warm(void **state)
{
	enum { N = 40, LEN = 192 << 10 };
	struct slow_rig r;
	uint8_t *buf = malloc(LEN);

	slow_rig_open(&r, LEN, 0);
	for (unsigned i = 0; i < LEN; i++)
		r.slow.mem[i] = (uint8_t)(i * 7 + (i >> 12));
	for (unsigned distant = 0; distant < 2; distant++) {
		slow_rig_anew(&r, distant ? 10 * FAR_MSEC : 0);
		r.slow.demand = 0;
		uint64_t began = far_now();
		for (unsigned i = 0; i < N; i++) {
			memset(buf, 0, LEN);
			assert_int_equal(far_read(r.far, 0, buf, LEN, FAR_BULK), 0);
			assert_memory_equal(buf, r.slow.mem, LEN);
		}
		uint64_t took = far_now() - began, most = 1 + took / (100 * FAR_MSEC);
		print_message("%zu KiB of %d in %" PRIu64 " ms\n", r.slow.demand >> 10, N * LEN >> 10, took / FAR_MSEC);
		assert_in_range(r.slow.demand, distant ? 2 * 65536 : 0, distant ? most * 65536 : 0);
		/* Who waits keeps it warm by himself. */
		began = far_now();
		assert_int_equal(far_read(r.far, 0, buf, 65536, 0), 0);
		r.slow.demand = 0;
		assert_int_equal(far_read(r.far, 0, buf, LEN, FAR_BULK), 0);
		assert_true(!r.slow.demand || far_now() - began > 100 * FAR_MSEC);
	}
	slow_rig_close(&r);
	free(buf);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_512_in_flight),
		cmocka_unit_test(test_slow_call_stops_nobody),
		cmocka_unit_test(test_woken_once),
		cmocka_unit_test(test_second_connection),
		cmocka_unit_test(test_kept_warm),
		cmocka_unit_test(test_long_reads),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
