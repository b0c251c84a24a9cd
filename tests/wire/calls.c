/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Client and server together over real sockets: what goes in comes out, at every size and edge, from many threads; names,
 * sizes and options; both services. */
#define _GNU_SOURCE
#include "peer.h"

#include "wire/server.h"
#include "wire/wire.h"

#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

struct rig {
	struct far_server *server;
	struct far_backend *mem, *far;
	char *uri;
};

static void rig_open(struct rig *r, const char *mem, bool plain, const char *suffix)
{
	struct far_error err = { .code = 0 };
	char uri[200];

	assert_int_equal(far_open(mem, NULL, &r->mem, &err), 0);
	assert_int_equal(far_server_new(NULL, &r->server, &err), 0);
	assert_int_equal(far_server_export(r->server, "disk", r->mem, &err), 0);
	if (plain)
		far_server_plain(r->server);
	assert_int_equal(far_server_listen(r->server, "grpc://127.0.0.1:0", &r->uri, &err), 0);
	snprintf(uri, sizeof uri, "%s%s", r->uri, suffix);
	if (far_open(uri, NULL, &r->far, &err))
		fail_msg("%s", err.text);
}

static void rig_close(struct rig *r)
{
	far_close(r->far);
	far_server_stop(r->server);
	far_server_free(r->server);
	far_close(r->mem);
	free(r->uri);
}

static uint64_t seed = 88172645463325252ull;

static uint64_t rnd(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

/* Random operations against a plain array. */
static void against_array(struct far_backend *b, uint64_t size, int rounds, uint64_t longest)
{
	uint8_t *truth = calloc(1, size + 1), *buf = malloc(longest + 1);

	for (int i = 0; i < rounds; i++) {
		uint64_t off = rnd() % (size + 1), len = far_min(rnd() % longest, size - off);
		unsigned flags = rnd() & 1 ? FAR_BULK : 0;
		switch (rnd() % 8) {
		case 0:
		case 1:
		case 2:
			for (uint64_t k = 0; k < len; k++)
				buf[k] = (uint8_t)(rnd() >> 24);
			assert_int_equal(far_write(b, off, buf, len, flags), 0);
			memcpy(truth + off, buf, len);
			break;
		case 3:
			assert_int_equal(far_zero(b, off, len, flags), 0);
			memset(truth + off, 0, len);
			break;
		case 4:
			assert_int_equal(far_discard(b, off, len, flags), 0);
			memset(truth + off, 0, len);
			break;
		default:
			memset(buf, 0xa5, len + 1);
			assert_int_equal(far_read(b, off, buf, len, flags), 0);
			assert_memory_equal(buf, truth + off, len);
			assert_int_equal(buf[len], 0xa5);
		}
	}
	assert_int_equal(far_flush(b), 0);
	free(truth);
	free(buf);
}

static const struct {
	const char *mem;
	uint64_t size;
} sizes[] = { { "mem:1", 1 }, { "mem:4095", 4095 }, { "mem:4097", 4097 }, { "mem:1048581", 1048581 },
	      { "mem:9437185", 9437185 } };

static void test_region_service(void **state)
{
	printf("seed %llu\n", (unsigned long long)seed);
	for (size_t i = 0; i < FAR_ARRAY_LEN(sizes); i++) {
		struct rig r;
		rig_open(&r, sizes[i].mem, false, "");
		assert_int_equal(far_size(r.far), sizes[i].size);
		assert_int_equal(far_facts(r.far)->caps & (FAR_CAP_WRITE | FAR_CAP_REMOTE), FAR_CAP_WRITE | FAR_CAP_REMOTE);
		against_array(r.far, sizes[i].size, 300, far_min(sizes[i].size + 1, 3 << 20));
		rig_close(&r);
	}
}

static void test_plain_service(void **state)
{
	printf("seed %llu\n", (unsigned long long)seed);
	for (size_t i = 0; i < FAR_ARRAY_LEN(sizes); i++) {
		struct rig r;
		char q[40];
		snprintf(q, sizeof q, "?size=%llu", (unsigned long long)sizes[i].size);
		rig_open(&r, sizes[i].mem, true, q);
		assert_int_equal(far_size(r.far), sizes[i].size);
		assert_int_equal(far_facts(r.far)->max_io, 2 << 20);
		against_array(r.far, sizes[i].size, 200, far_min(sizes[i].size + 1, 5 << 20));
		rig_close(&r);
	}
}

static void test_empty_region(void **state)
{
	struct rig r;
	char c;

	rig_open(&r, "mem:0", false, "");
	assert_int_equal(far_size(r.far), 0);
	assert_int_equal(far_read(r.far, 0, &c, 0, 0), 0);
	assert_int_equal(far_read(r.far, 0, &c, 1, 0), -EINVAL);
	assert_int_equal(far_write(r.far, 0, &c, 1, 0), -ENOSPC);
	assert_int_equal(far_flush(r.far), 0);
	rig_close(&r);
	rig_open(&r, "mem:0", true, "?size=0");
	assert_int_equal(far_size(r.far), 0);
	rig_close(&r);
}

static void test_zeros_travel_as_flag(void **state)
{
	struct rig r;
	uint8_t *buf = malloc(1 << 20);
	struct far_extent x[8];
	size_t n;

	rig_open(&r, "mem:4M", false, "");
	memset(buf, 0xff, 1 << 20);
	assert_int_equal(far_read(r.far, 1 << 20, buf, 1 << 20, 0), 0);
	for (size_t i = 0; i < 1 << 20; i++)
		assert_int_equal(buf[i], 0);
	memset(buf, 1, 65536);
	assert_int_equal(far_write(r.far, 1 << 20, buf, 65536, 0), 0);
	assert_int_equal(far_extents(r.far, 0, 4 << 20, x, 8, &n), 0);
	assert_int_equal(n, 3);
	assert_true(x[0].kind == FAR_EXTENT_ZERO && x[0].len == 1 << 20);
	assert_true(x[1].kind == FAR_EXTENT_DATA && x[1].off == 1 << 20 && x[1].len == 65536);
	assert_true(x[2].kind == FAR_EXTENT_ZERO && x[2].off + x[2].len == 4 << 20);
	assert_int_equal(far_extents(r.far, 0, 4 << 20, x, 2, &n), 0);
	assert_int_equal(n, 2);
	free(buf);
	rig_close(&r);
}

struct worker {
	struct far_thread t;
	struct far_backend *b;
	unsigned id, rounds;
	size_t len;
	int failed;
};

/* Each has its own stripe; neighbours' bytes in it are an error. */
static void *worker_run(void *arg)
{
	struct worker *w = arg;
	uint8_t *buf = malloc(w->len), *back = malloc(w->len);

	for (unsigned i = 0; i < w->rounds && !w->failed; i++) {
		memset(buf, (int)(w->id * 7 + i + 1), w->len);
		memset(back, 0, w->len);
		uint64_t off = (uint64_t)w->id * w->len;
		unsigned flags = (w->id + i) & 1 ? FAR_BULK : 0;
		w->failed = far_write(w->b, off, buf, w->len, flags);
		if (!w->failed)
			w->failed = far_read(w->b, off, back, w->len, flags);
		if (!w->failed && memcmp(buf, back, w->len))
			w->failed = -EILSEQ;
	}
	free(buf);
	free(back);
	return NULL;
}

/* Numbered 0, step, 2 step ... */
static struct worker *workers_start(struct far_backend *b, unsigned n, unsigned step, unsigned rounds, size_t len)
{
	struct worker *w = calloc(n, sizeof *w);

	for (unsigned i = 0; i < n; i++) {
		w[i] = (struct worker){ .b = b, .id = i * step, .rounds = rounds, .len = len };
		assert_int_equal(far_thread_start(&w[i].t, "worker", worker_run, &w[i]), 0);
	}
	return w;
}

static void workers_end(struct worker *w, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		far_thread_join(&w[i].t);
		assert_int_equal(w[i].failed, 0);
	}
	free(w);
}

static void workers(struct far_backend *b, unsigned n, unsigned rounds, size_t len)
{
	workers_end(workers_start(b, n, 1, rounds, len), n);
}

static void test_many_threads(void **state)
{
	static const struct {
		unsigned n, rounds;
		size_t len;
	} runs[] = { { 2, 300, 100 }, { 8, 60, 65536 }, { 16, 12, 1 << 20 }, { 64, 20, 4096 } };

	for (int plain = 0; plain < 2; plain++) {
		struct rig r;
		rig_open(&r, "mem:16M", plain, plain ? "?size=16M" : "");
		for (size_t i = 0; i < FAR_ARRAY_LEN(runs); i++)
			workers(r.far, runs[i].n, runs[i].rounds, runs[i].len);
		rig_close(&r);
	}
}

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
	struct worker w[8];
	for (unsigned i = 0; i < 8; i++) {
		w[i] = (struct worker){ .b = far_slow, .id = i, .rounds = 1, .len = 512 };
		assert_int_equal(far_thread_start(&w[i].t, "worker", worker_run, &w[i]), 0);
	}
	assert_true(slow_wait_inside(&slow, 8));
	for (int i = 0; i < 100; i++)
		assert_int_equal(far_read(far_mem, 0, &c, 1, 0), 0);
	slow_hold(&slow, false);
	for (unsigned i = 0; i < 8; i++) {
		far_thread_join(&w[i].t);
		assert_int_equal(w[i].failed, 0);
	}
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
	enum { N = 5, PIECE = 8192, LEN = 40 * PIECE };
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
	assert_true(slow_wait_inside(&slow, 1)); /* who wrote reads for all, to the end */
	assert_int_equal(getrusage(RUSAGE_THREAD, &before), 0);
	for (unsigned i = 0; i < N; i++)
		assert_int_equal(far_read(far, 0, buf, LEN, 0), 0);
	assert_int_equal(getrusage(RUSAGE_THREAD, &after), 0);
	print_message("woken %ld times for %d reads\n", after.ru_nvcsw - before.ru_nvcsw, N);
	assert_in_range(after.ru_nvcsw - before.ru_nvcsw, 1, 4 * N); /* and now and then for a lock */
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
		r.slow.mem[i] = (uint8_t)(rnd() >> 24);
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

static void test_unix_and_fd(void **state)
{
	char dir[] = "/tmp/far-wire-XXXXXX", uri[200], *bound;
	struct far_backend *mem, *far;
	struct far_server *s;
	struct far_error err;
	int sv[2];
	char c = 7, d = 0;

	assert_non_null(mkdtemp(dir));
	snprintf(uri, sizeof uri, "grpc+unix:///?socket=%s/s", dir);
	assert_int_equal(far_open("mem:1M", NULL, &mem, NULL), 0);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "disk", mem, NULL), 0);
	assert_int_equal(far_server_listen(s, uri, &bound, &err), 0);
	assert_string_equal(bound, uri);
	assert_int_equal(far_open(uri, NULL, &far, &err), 0);
	assert_int_equal(far_write(far, 100, &c, 1, 0), 0);
	far_close(far);
	snprintf(uri, sizeof uri, "grpc+unix:///disk?socket=%s/s", dir);
	assert_int_equal(far_open(uri, NULL, &far, &err), 0);
	assert_int_equal(far_read(far, 100, &d, 1, 0), 0);
	assert_int_equal(d, 7);
	far_close(far);
	/* A second listener on a path where somebody answers. */
	struct far_server *s2;
	assert_int_equal(far_server_new(NULL, &s2, NULL), 0);
	assert_int_equal(far_server_export(s2, "disk", mem, NULL), 0);
	snprintf(uri, sizeof uri, "grpc+unix:///?socket=%s/s", dir);
	assert_int_equal(far_server_listen(s2, uri, NULL, &err), -EADDRINUSE);
	far_server_free(s2);
	/* One connected pair. */
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
	assert_int_equal(far_server_serve(s, sv[0], &err), 0);
	assert_int_equal(far_grpc_open_fd(sv[1], "the parent", NULL, &far, &err), 0);
	d = 0;
	assert_int_equal(far_read(far, 100, &d, 1, FAR_BULK), 0);
	assert_int_equal(d, 7);
	workers(far, 8, 20, 65536);
	far_server_stop(s);
	assert_true(far_error_is_transient(far_read(far, 100, &d, 1, 0)));
	far_close(far);
	far_server_free(s);
	far_close(mem);
	free(bound);
	assert_int_equal(rmdir(dir), 0); /* the socket's name is gone */
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

static void open_fails(const char *base, const char *suffix, int code, const char *text)
{
	struct far_backend *b = NULL;
	struct far_error err = { .code = 0 };
	char uri[300];

	snprintf(uri, sizeof uri, "%s%s", base, suffix);
	assert_int_equal(far_open(uri, NULL, &b, &err), -code);
	assert_null(b);
	if (!strstr(err.text, text))
		fail_msg("'%s' does not say '%s'", err.text, text);
}

static void test_names_and_sizes(void **state)
{
	struct far_backend *a, *b, *far;
	struct far_server *s, *plain;
	struct far_error err;
	char *uri, *uri2, two[200];

	assert_int_equal(far_open("mem:1M", NULL, &a, NULL), 0);
	assert_int_equal(far_open("mem:2M", NULL, &b, NULL), 0);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", NULL, &err), -EINVAL); /* nothing to serve */
	assert_int_equal(far_server_export(s, "a", a, NULL), 0);
	assert_int_equal(far_server_export(s, "b", b, NULL), 0);
	assert_int_equal(far_server_export(s, "a", b, &err), -EEXIST);
	assert_int_equal(far_server_export(s, "", b, &err), -EINVAL);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &uri, NULL), 0);
	assert_int_equal(far_server_export(s, "c", b, &err), -EBUSY);

	static const struct {
		const char *path;
		uint64_t size;
	} good[] = { { "", 1 << 20 }, { "/", 1 << 20 }, { "/default", 1 << 20 }, { "/a", 1 << 20 }, { "/b", 2 << 20 },
		     { "?size=1M", 1 << 20 }, { "/b?size=2M&timeout=5s", 2 << 20 } };
	for (size_t i = 0; i < FAR_ARRAY_LEN(good); i++) {
		snprintf(two, sizeof two, "%s%s", uri, good[i].path);
		assert_int_equal(far_open(two, NULL, &far, &err), 0);
		assert_int_equal(far_size(far), good[i].size);
		far_close(far);
	}
	open_fails(uri, "/c", ENOENT, "it has: a, b");
	open_fails(uri, "?size=3M", EINVAL, "not 3145728");
	open_fails(uri, "?sise=3M", EINVAL, "size");
	open_fails(uri, "?socket=/x", EINVAL, "socket");
	open_fails("grpc+unix:///", "", EINVAL, "socket=PATH");
	open_fails("grpc+unix:///?socket=/nowhere/at/all", "", ENOENT, "/nowhere/at/all");
	open_fails("grpc:///x", "", EINVAL, "host");

	assert_int_equal(far_server_new(NULL, &plain, NULL), 0);
	far_server_plain(plain);
	assert_int_equal(far_server_export(plain, "a", a, NULL), 0);
	assert_int_equal(far_server_listen(plain, "grpc://127.0.0.1:0", &uri2, NULL), 0);
	open_fails(uri2, "", EINVAL, "does not tell its size: add ?size=BYTES");
	open_fails(uri2, "?size=1048577", EINVAL, "shorter than 1048577");
	open_fails(uri2, "/b?size=1M", ENOENT, "no exports by name");
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	opts.bytes = 1 << 20;
	assert_int_equal(far_open(uri2, &opts, &far, &err), 0);
	assert_int_equal(far_size(far), 1 << 20);
	far_close(far);

	/* Listeners that cannot be. */
	static const struct {
		const char *uri;
		int code;
		const char *text;
	} bad[] = {
		{ "grpc://127.0.0.1:0/a", EINVAL, "no path" },
		{ "grpc://0.0.0.0:0", EPERM, "--insecure" },
		{ "grpc://:0", EPERM, "--insecure" },
		{ "http://127.0.0.1:0", EINVAL, "grpc://HOST:PORT" },
		{ "grpc+unix:///", EINVAL, "socket=PATH" },
		{ "grpc://127.0.0.1:0?what=1", EINVAL, "what" },
	};
	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++) {
		int r = far_server_listen(s, bad[i].uri, NULL, &err);
		if (r != -bad[i].code || !strstr(err.text, bad[i].text))
			fail_msg("%s: %d '%s'", bad[i].uri, r, err.text);
	}
	assert_int_equal(far_server_listen(plain, uri, NULL, &err), -EADDRINUSE);
	assert_non_null(strstr(err.text, "another port"));
	far_server_free(plain);
	far_server_free(s);
	far_close(a);
	far_close(b);
	free(uri);
	free(uri2);
}

static void test_read_only(void **state)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct far_backend *mem, *far;
	struct far_server *s;
	char *uri, c = 1;

	opts.read_only = true;
	assert_int_equal(far_open("mem:1M", &opts, &mem, NULL), 0);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "ro", mem, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &uri, NULL), 0);
	assert_int_equal(far_open(uri, NULL, &far, NULL), 0);
	assert_int_equal(far_facts(far)->caps & FAR_CAP_WRITE, 0);
	assert_int_equal(far_write(far, 0, &c, 1, 0), -EROFS);
	assert_int_equal(far_read(far, 0, &c, 1, 0), 0);
	far_close(far);
	far_server_free(s);
	far_close(mem);
	free(uri);
}

/* The backend's own error comes through exactly. */
static void test_errors_exact(void **state)
{
	static const int codes[] = { EIO, ENOSPC, EROFS, ESTALE, EDQUOT, ETIMEDOUT, EACCES, EPERM, EPROTO };
	struct slow slow;
	struct far_backend *b = slow_open(&slow, 4096), *far;
	struct far_server *s;
	char *uri, c = 0;

	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "disk", b, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &uri, NULL), 0);
	assert_int_equal(far_open(uri, NULL, &far, NULL), 0);
	for (size_t i = 0; i < FAR_ARRAY_LEN(codes); i++) {
		slow.error = -codes[i];
		assert_int_equal(far_read(far, 0, &c, 1, 0), -codes[i]);
		assert_int_equal(far_write(far, 0, &c, 1, 0), -codes[i]);
		assert_int_equal(far_flush(far), -codes[i]);
	}
	slow.error = -ESHUTDOWN; /* theirs, not ours: another try may help */
	assert_true(far_error_is_transient(far_read(far, 0, &c, 1, 0)));
	slow.error = 0;
	assert_int_equal(far_read(far, 0, &c, 1, 0), 0);
	far_close(far);
	far_server_free(s);
	far_close(b);
	slow_free(&slow);
	free(uri);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_region_service),   cmocka_unit_test(test_plain_service),
		cmocka_unit_test(test_empty_region),     cmocka_unit_test(test_zeros_travel_as_flag),
		cmocka_unit_test(test_many_threads),     cmocka_unit_test(test_512_in_flight),
		cmocka_unit_test(test_slow_call_stops_nobody), cmocka_unit_test(test_unix_and_fd),
		cmocka_unit_test(test_woken_once),
		cmocka_unit_test(test_second_connection),
		cmocka_unit_test(test_kept_warm),
		cmocka_unit_test(test_long_reads),
		cmocka_unit_test(test_names_and_sizes),  cmocka_unit_test(test_read_only),
		cmocka_unit_test(test_errors_exact),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
