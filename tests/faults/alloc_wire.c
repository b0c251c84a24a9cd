/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The n-th allocation of the thread that sets something up fails, n = 1, 2 ... until it succeeds: -ENOMEM and a sentence,
 * nothing leaks (the address sanitizer looks), and what was given stays its owner's. The linker wraps the allocators. */
#define _GNU_SOURCE
#include "../wire/peer.h"

#include "base/pool.h"
#include "wire/server.h"
#include "wire/wire.h"

#include "rig.h"

#include <sys/socket.h>
#include <unistd.h>

static void nomem(int r, const struct far_error *err)
{
	/* No memory, no thread; or HTTP/2 found none for a header and told the peer, which hung up. */
	if (r != -ENOMEM && r != -EAGAIN && r != -ECONNRESET)
		fail_msg("without memory it says %s (%s)", far_strerror(r), err->text);
	assert_int_equal(err->code, -r);
	assert_true(err->text[0] != 0);
}

/* Again and again until it works; counts how often it did not. */
#define UNTIL_DONE(call, after_failure) \
	do { \
		unsigned n_ = 0; \
		int r_; \
		do { \
			struct far_error err = { .code = 0 }; \
			inject_begin(++n_, INJECT_THREAD, false); \
			r_ = (call); \
			inject_end(); \
			if (r_) { \
				nomem(r_, &err); \
				after_failure; \
			} \
		} while (r_ && n_ < 200); \
		assert_in_range(n_, 2, 199); \
	} while (0)

static void test_server_and_client(void **state)
{
	struct far_backend *mem, *far = NULL;
	struct far_server *s = NULL;
	char *uri = NULL, name[100], c = 0;
	int sv[2];

	assert_int_equal(far_open("mem:1M", NULL, &mem, NULL), 0);
	UNTIL_DONE(far_server_new(NULL, &s, &err), assert_null(s));
	UNTIL_DONE(far_server_export(s, "disk", mem, &err), );
	UNTIL_DONE(far_server_listen(s, "grpc://127.0.0.1:0", &uri, &err), assert_null(uri));

	snprintf(name, sizeof name, "%s/disk?timeout=5s", uri);
	UNTIL_DONE(far_open(name, NULL, &far, &err), assert_null(far));
	assert_int_equal(far_read(far, 0, &c, 1, 0), 0);
	/* Data calls: they fail, and the next one works. The first few dial the bulk lane. */
	for (unsigned n = 1; n < 20; n++) {
		struct far_extent x[4];
		size_t got;
		inject_begin(n, INJECT_THREAD, false);
		int r = far_read(far, 0, &c, 1, FAR_BULK);
		int w = far_write(far, 0, &c, 1, 0);
		int e = far_extents(far, 0, 4096, x, 4, &got);
		inject_end();
		assert_true((r == 0 || r == -ENOMEM) && (w == 0 || w == -ENOMEM) && (e == 0 || e == -ENOMEM));
		assert_int_equal(far_read(far, 0, &c, 1, 0), 0);
	}
	far_close(far);
	far = NULL;

	/* Over a pair: the descriptors stay ours until it works. */
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
	UNTIL_DONE(far_server_serve(s, sv[0], &err), );
	assert_int_equal(far_grpc_open_fd(sv[1], "the pair", NULL, &far, NULL), 0);
	assert_int_equal(far_read(far, 0, &c, 1, 0), 0);
	far_close(far);
	for (unsigned n = 1, r = 1; r; n++) {
		struct far_error err = { .code = 0 };
		struct far_backend *b = NULL;
		assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
		assert_int_equal(far_server_serve(s, sv[0], NULL), 0);
		inject_begin(n, INJECT_THREAD, false);
		int k = far_grpc_open_fd(sv[1], "the pair", NULL, &b, &err);
		inject_end();
		r = k != 0;
		if (k) {
			nomem(k, &err);
			assert_int_equal(close(sv[1]), 0);
		}
		far_close(b);
		assert_true(n < 100);
	}
	far_server_free(s);
	far_close(mem);
	free(uri);
}

/* Move what the peer has to say into the session and carry out what it asks for. False: the session ended. */
static bool requests_run(struct peer *p)
{
	const uint8_t *data;
	struct far_request *r;
	ssize_t k;

	while ((k = nghttp2_session_mem_send(p->h2, &data)) > 0)
		if (far_session_feed(p->session, data, (size_t)k))
			return false;
	while ((r = far_session_next(p->session))) {
		if (!far_request_run(r, FAR_NOWAIT))
			assert_true(far_request_run(r, 0));
		far_session_finish(p->session, r);
	}
	return true;
}

/* Requests that find no memory are answered so; the session goes on, or ends as a whole where HTTP/2 itself had none. */
static void test_requests(void **state)
{
	static const uint8_t extents[] = { 0, 0, 0, 0, 4, 0x18, 0x80, 0x80, 0x04 };
	struct slow slow;
	struct far_backend *b = slow_open(&slow, 1 << 20);
	static uint8_t big[100000];
	unsigned refused = 0, ended = 0, n = 0;
	bool hit = true;

	while (hit && n < 500) {
		struct peer *p = malloc(sizeof *p);
		struct far_pb_out o = { big, 0, sizeof big };
		size_t len;
		peer_over_session(p, b, 1 << 20);
		peer_drive(p, 0);
		far_pb_put_uint(&o, 2, 4096);
		far_pb_put_head(&o, 5, 90000);
		uint8_t *m = peer_message(big, o.n + 90000, &len);
		int32_t id = peer_submit(p, "POST", FAR_GRPC_REGION "Write", "application/grpc", NULL, NULL, m, len, false);
		int32_t id2 = peer_submit(p, "POST", FAR_GRPC_REGION "Extents", "application/grpc", NULL, NULL, extents,
					  sizeof extents, false);
		inject_watch("requests", ++n, 60);
		inject_begin(n, INJECT_THREAD, false); /* the peer's own count too: some rounds fail nothing of ours */
		bool alive = requests_run(p);
		hit = inject_end();
		if (alive && peer_drive(p, id) && peer_drive(p, id2)) {
			int w = peer_of(p, id)->status, e = peer_of(p, id2)->status;
			/* Answered, told to try again, or (not even the request's own struct was there) the stream was reset. */
			assert_true((w == 0 || w == 14 || w == -1) && (e == 0 || e == 14 || e == -1));
			assert_true(hit || (w == 0 && e == 0));
			refused += w != 0 || e != 0;
		} else {
			assert_true(hit);
			ended++;
		}
		free(m);
		peer_free(p);
		free(p);
	}
	assert_false(hit);
	print_message("requests: %u allocations, %u refused, %u sessions ended\n", n - 1, refused, ended);
	assert_true(refused >= 3);
	far_close(b);
	slow_free(&slow);
}

/* ---------------------------------------------------------------------------------------------------------- calls */

#define BYTES 300000u

struct calls {
	struct rig_model m;
	struct far_backend *store, *far;
	unsigned version;
};

/* What a caller may hear: no memory here, or a server that has none, which its client takes for one to be tried again. */
static void calls_result(const char *call, int e)
{
	if (e && e != -ENOMEM && e != -EIO && e != -ECONNRESET && e != -EAGAIN && e != -ETIMEDOUT && e != -EPIPE &&
	    e != -ECONNREFUSED)
		fail_msg("%s without memory says %s", call, far_strerror(e));
}

static void calls_make(struct calls *t)
{
	static unsigned char buf[70000];
	struct far_extent x[8];
	size_t n;
	int e;

	for (unsigned k = 0; k < 3; k++) {
		uint64_t off = k * 100001;
		rig_fill(buf, off, sizeof buf, ++t->version);
		e = far_write(t->far, off, buf, k ? sizeof buf : 100, 0);
		rig_model_wrote(&t->m, off, buf, k ? sizeof buf : 100, e);
		calls_result("a write", e);
	}
	struct far_io io[3];
	for (unsigned k = 0; k < 3; k++)
		io[k] = (struct far_io){ .off = 60000 + k * 70000, .buf = buf + k * 20000, .len = 20000 };
	rig_fill(buf, 60000, sizeof buf, ++t->version);
	far_write_many(t->far, io, 3, 0);
	for (unsigned k = 0; k < 3; k++) {
		rig_model_wrote(&t->m, io[k].off, io[k].buf, io[k].len, io[k].result);
		calls_result("one of a list of writes", io[k].result);
	}
	e = far_zero(t->far, 150000, 5000, 0);
	rig_model_wrote(&t->m, 150000, NULL, 5000, e);
	calls_result("a zero", e);
	e = far_discard(t->far, 8192, 8192, 0);
	rig_model_wrote(&t->m, 8192, NULL, 8192, e);
	calls_result("a discard", e);
	calls_result("a flush", far_flush(t->far));
	calls_result("extents", far_extents(t->far, 0, BYTES, x, 8, &n));
	struct far_lease l = FAR_LEASE_INIT;
	struct far_origin o = FAR_ORIGIN_INIT;
	bool all;
	l.writer = "alloc";
	l.take_over = true; /* an answer that was lost may have been a grant */
	calls_result("a lease", far_lease(t->far, &l));
	l.release = true;
	calls_result("giving it back", far_lease(t->far, &l));
	calls_result("origin", far_origin(t->far, &o, 0));
	calls_result("watch", far_watch(t->far, o.instance, 0, x, 8, &n, &all, &o));
	for (unsigned k = 0; k < 2; k++) {
		e = far_read(t->far, 99000, buf, sizeof buf, k ? FAR_BULK : 0);
		if (!e)
			rig_model_read(&t->m, 99000, buf, sizeof buf, "over the wire");
		calls_result("a read", e);
	}
	far_read_many(t->far, io, 3, 0);
	for (unsigned k = 0; k < 3; k++) {
		if (!io[k].result)
			rig_model_read(&t->m, io[k].off, io[k].buf, io[k].len, "in a list over the wire");
		calls_result("one of a list of reads", io[k].result);
	}
}

/* A round in which the n-th allocation of both sides together fails, then one in which none does. */
static void calls_rounds(struct calls *t, const char *what)
{
	static unsigned char all[BYTES];
	bool hit = true;
	unsigned n = 0;

	for (; hit && n < 2000; ) {
		inject_watch(what, ++n, 60);
		uint64_t began = far_now();
		inject_begin(n, INJECT_PROCESS, false);
		calls_make(t);
		hit = inject_end();
		if (getenv("FARPAGE_INJECT"))
			print_message("%u: %llu ms\n", n, (unsigned long long)((far_now() - began) / FAR_MSEC));
		/* What was on its way when it failed has ended when the next calls are answered on new connections: the
		 * server carries out what an old one had sent, so no more than two rounds may be unsure. */
		int e = far_read(t->far, 0, all, BYTES, 0);
		if (e)
			e = far_read(t->far, 0, all, BYTES, 0);
		if (e)
			fail_msg("%s: after allocation %u failed no read works: %s", what, n, far_strerror(e));
		rig_model_read(&t->m, 0, all, BYTES, what);
		assert_int_equal(far_flush(t->far), 0);
		assert_int_equal(far_read(t->store, 0, all, BYTES, 0), 0);
		rig_model_read(&t->m, 0, all, BYTES, "on the server");
	}
	print_message("%s: %u allocations\n", what, n - 1);
	assert_false(hit);
}

static void test_calls(void **state)
{
	unsigned files = inject_open_files(), threads = inject_threads();

	for (int hardened = 0; hardened < 2; hardened++) {
		struct calls t = { 0 };
		struct far_server *s;
		static unsigned char zeros[BYTES];
		char *uri, name[100];
		assert_int_equal(far_open("mem:300000", NULL, &t.store, NULL), 0);
		rig_model_init(&t.m, zeros, BYTES);
		assert_int_equal(far_server_new(NULL, &s, NULL), 0);
		assert_int_equal(far_server_export(s, "disk", t.store, NULL), 0);
		assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &uri, NULL), 0);
		snprintf(name, sizeof name, "%s/disk?timeout=5s", uri);
		assert_int_equal(far_open(name, NULL, &t.far, NULL), 0);
		if (hardened) {
			struct far_backend *outer;
			assert_int_equal(far_layer_open("retry:backoff=1ms", t.far, &outer, NULL), 0);
			t.far = outer;
		}
		calls_rounds(&t, hardened ? "calls with retry" : "calls");
		far_close(t.far);
		far_server_free(s);
		far_close(t.store);
		rig_model_fini(&t.m);
		free(uri);
	}
	rig_no_leak("calls", files, threads);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_server_and_client), cmocka_unit_test(test_requests),
					   cmocka_unit_test(test_calls) };
	far_log_set_level(FAR_LOG_ERROR);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
