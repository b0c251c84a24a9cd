/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The n-th allocation of the thread that sets something up fails, n = 1, 2 ... until it succeeds: -ENOMEM and a sentence,
 * nothing leaks (the address sanitizer looks), and what was given stays its owner's. The linker wraps the allocators. */
#define _GNU_SOURCE
#include "peer.h"

#include "base/pool.h"
#include "wire/server.h"
#include "wire/wire.h"

#include <sys/socket.h>
#include <unistd.h>

static _Thread_local unsigned fail_in; /* 0: never; 1: the next one */

static bool fails(void)
{
	return fail_in && !--fail_in;
}

#define WRAP(ret, name, params, args) \
	ret __real_##name params; \
	ret __wrap_##name params; \
	ret __wrap_##name params \
	{ \
		if (fails()) { \
			errno = ENOMEM; \
			return NULL; \
		} \
		return __real_##name args; \
	}

WRAP(void *, malloc, (size_t n), (n))
WRAP(void *, calloc, (size_t n, size_t m), (n, m))
WRAP(void *, realloc, (void *p, size_t n), (p, n))
WRAP(char *, strdup, (const char *s), (s))
WRAP(void *, far_buf_get, (size_t n), (n))

static void nomem(int r, const struct far_error *err)
{
	assert_int_equal(r, -ENOMEM);
	assert_int_equal(err->code, ENOMEM);
	assert_true(err->text[0] != 0);
}

/* Again and again until it works; counts how often it did not. */
#define UNTIL_DONE(call, after_failure) \
	do { \
		unsigned n_ = 0; \
		int r_; \
		do { \
			struct far_error err = { .code = 0 }; \
			fail_in = ++n_; \
			r_ = (call); \
			fail_in = 0; \
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
		fail_in = n;
		int r = far_read(far, 0, &c, 1, FAR_BULK);
		int w = far_write(far, 0, &c, 1, 0);
		int e = far_extents(far, 0, 4096, x, 4, &got);
		fail_in = 0;
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
		fail_in = n;
		int k = far_grpc_open_fd(sv[1], "the pair", NULL, &b, &err);
		fail_in = 0;
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

/* Requests that find no memory are answered so; the session goes on. */
static void test_requests(void **state)
{
	struct slow slow;
	struct far_backend *b = slow_open(&slow, 1 << 20);
	struct peer *p = malloc(sizeof *p);
	static uint8_t big[100000];
	unsigned refused = 0;

	peer_over_session(p, b, 1 << 20);
	peer_drive(p, 0);
	for (unsigned n = 1; n < 12; n++) {
		struct far_pb_out o = { big, 0, sizeof big };
		size_t len;
		far_pb_put_uint(&o, 2, 4096);
		far_pb_put_head(&o, 5, 90000);
		uint8_t *m = peer_message(big, o.n + 90000, &len);
		int32_t id = peer_submit(p, "POST", FAR_GRPC_REGION "Write", "application/grpc", NULL, NULL, m, len, false);
		static const uint8_t extents[] = { 0, 0, 0, 0, 4, 0x18, 0x80, 0x80, 0x04 };
		int32_t id2 = peer_submit(p, "POST", FAR_GRPC_REGION "Extents", "application/grpc", NULL, NULL, extents,
					  sizeof extents, false);
		fail_in = n; /* the peer's own allocations count too: some of these rounds fail nothing of ours */
		const uint8_t *data;
		ssize_t k;
		while ((k = nghttp2_session_mem_send(p->h2, &data)) > 0)
			assert_int_equal(far_session_feed(p->session, data, (size_t)k), 0);
		struct far_request *r;
		while ((r = far_session_next(p->session))) {
			if (!far_request_run(r, FAR_NOWAIT))
				assert_true(far_request_run(r, 0));
			far_session_finish(p->session, r);
		}
		fail_in = 0;
		assert_true(peer_drive(p, id) && peer_drive(p, id2));
		int a = peer_of(p, id)->status, c = peer_of(p, id2)->status;
		/* Answered, told to try again, or (when not even the request's own struct was there) the stream was reset. */
		assert_true((a == 0 || a == 14 || a == -1) && (c == 0 || c == 14 || c == -1));
		refused += a != 0 || c != 0;
		free(m);
	}
	assert_true(refused >= 3);
	peer_free(p);
	free(p);
	far_close(b);
	slow_free(&slow);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_server_and_client), cmocka_unit_test(test_requests) };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
