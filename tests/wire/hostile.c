/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What a peer may get wrong, on purpose or not: each thing has its answer, and the server goes on. In-process. */

#include "peer.h"

#include <arpa/inet.h>

#define SIZE ((1u << 20) + 5)
#define MAX 65536

#define READ_AT FAR_GRPC_BACKEND "ReadAt"
#define WRITE_AT FAR_GRPC_BACKEND "WriteAt"

struct fixture {
	struct slow slow;
	struct far_backend *b;
	struct peer *p;
};

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof *f);

	f->b = slow_open(&f->slow, SIZE);
	f->p = malloc(sizeof *f->p);
	peer_over_session(f->p, f->b, MAX);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	peer_free(f->p);
	free(f->p);
	far_close(f->b);
	slow_free(&f->slow);
	free(f);
	return 0;
}

/* The server still answers a good request. */
static void alive(struct fixture *f)
{
	struct peer_stream *s = peer_call(f->p, READ_AT, "\x08\x04", 2);

	assert_int_equal(s->http, 200);
	assert_int_equal(s->status, 0);
	assert_int_equal(s->data_n, 5 + 2 + 2 + 4);
}

struct numbers {
	const char *path;
	int64_t length, off;
	int status;
	const char *text; /* NULL: any */
};

/* W-C1 (D9): a negative length is a status, not the end of the server. W-C2: offsets and lengths are held to the range. */
static void test_backend_numbers(void **state)
{
	static const struct numbers cases[] = {
		{ READ_AT, 4, 0, 0, "" },
		{ READ_AT, 0, 0, 0, "" },
		{ READ_AT, 0, SIZE, 0, "" },
		{ READ_AT, 5, SIZE - 5, 0, "" },
		{ READ_AT, MAX, 0, 0, "" },
		{ READ_AT, MAX + 1, 0, 2, "max chunk size exceeded" },
		{ READ_AT, INT32_MAX, 0, 2, "max chunk size exceeded" },
		{ READ_AT, -1, 0, 3, NULL },
		{ READ_AT, INT32_MIN, 0, 3, NULL },
		{ READ_AT, 4, -1, 2, NULL },
		{ READ_AT, 4, INT64_MIN, 2, NULL },
		{ READ_AT, 1, SIZE, 2, "EOF" },
		{ READ_AT, 6, SIZE - 5, 2, "EOF" },
		{ READ_AT, 4, INT64_MAX, 2, "EOF" },
		{ READ_AT, 0, SIZE + 1, 2, "EOF" },
	};
	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		uint8_t msg[32];
		struct far_pb_out o = { msg, 0, sizeof msg };
		far_pb_put_uint(&o, 1, (uint64_t)cases[i].length);
		far_pb_put_uint(&o, 2, (uint64_t)cases[i].off);
		struct peer_stream *s = peer_call(((struct fixture *)*state)->p, cases[i].path, msg, o.n);
		assert_int_equal(s->status, cases[i].status);
		if (cases[i].text)
			assert_string_equal(s->message, cases[i].text);
		if (cases[i].status)
			assert_int_equal(s->data_n, 0);
	}
	alive(*state);
}

/* W-C2: a write has a limit too. */
static void test_backend_writes(void **state)
{
	static const struct {
		int64_t off;
		size_t n;
		int status;
	} cases[] = {
		{ 0, 4, 0 }, { SIZE - 4, 4, 0 }, { SIZE, 0, 0 }, { SIZE - 4, 5, 11 }, { SIZE, 1, 11 }, { INT64_MAX, 4, 11 },
		{ -1, 4, 2 }, { INT64_MIN, 4, 2 }, { 0, MAX, 0 }, { 0, MAX + 1, 2 }, { 0, MAX + 600, 8 },
	};
	uint8_t *msg = malloc(MAX + 1000), *data = calloc(1, MAX + 1000);

	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		struct far_pb_out o = { msg, 0, MAX + 1000 };
		far_pb_put_uint(&o, 1, (uint64_t)cases[i].off);
		far_pb_put_bytes(&o, 2, data, cases[i].n);
		struct peer_stream *s = peer_call(((struct fixture *)*state)->p, WRITE_AT, msg, o.n);
		assert_int_equal(s->status, cases[i].status);
	}
	free(msg);
	free(data);
	alive(*state);
}

static void region_case(struct fixture *f, const char *method, const struct far_pb_out *o, int status, const char *errno_name)
{
	char path[64];

	assert_true(o->n <= o->cap);
	snprintf(path, sizeof path, FAR_GRPC_REGION "%s", method);
	struct peer_stream *s = peer_call(f->p, path, o->p, o->n);
	if (s->status != status)
		fail_msg("%s: status %d (%s) instead of %d", method, s->status, s->message, status);
	if (errno_name)
		assert_string_equal(s->errno_name, errno_name);
}

static void test_region_ranges(void **state)
{
	static const struct {
		uint64_t off, len;
		int read, span;
	} cases[] = {
		{ 0, 0, 0, 0 },
		{ 0, 10, 0, 0 },
		{ SIZE, 0, 0, 0 },
		{ SIZE - 1, 1, 0, 0 },
		{ SIZE - 1, 2, 11, 11 },
		{ SIZE + 1, 0, 11, 11 },
		{ 0, SIZE, 8, 0 }, /* a read longer than a request may be; a zero has no such limit */
		{ 0, UINT64_MAX, 11, 11 },
		{ UINT64_MAX, 1, 11, 11 },
		{ UINT64_MAX, UINT64_MAX, 11, 11 },
		{ 1, UINT64_MAX, 11, 11 },
		{ 1ull << 63, 1, 11, 11 },
	};
	struct fixture *f = *state;
	uint8_t msg[64];

	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		struct far_pb_out o = { msg, 0, sizeof msg };
		far_grpc_encode_range(&o, 2, cases[i].off, cases[i].len);
		region_case(f, "Read", &o, cases[i].read, NULL);
		region_case(f, "Pull", &o, cases[i].span, NULL);
		o.n = 0;
		far_pb_put_uint(&o, 2, cases[i].off);
		far_pb_put_uint(&o, 3, cases[i].len);
		region_case(f, "Zero", &o, cases[i].span, NULL);
		region_case(f, "Discard", &o, cases[i].span, NULL);
		region_case(f, "Extents", &o, cases[i].span, NULL);
		o.n = 0;
		far_pb_put_uint(&o, 2, cases[i].off);
		far_pb_put_bytes(&o, 5, "x", 1);
		region_case(f, "Write", &o, cases[i].off < SIZE ? 0 : 11, NULL);
	}
	/* Together longer than a request may be, each alone not. */
	struct far_pb_out o = { msg, 0, sizeof msg };
	far_grpc_encode_range(&o, 2, 0, MAX / 2 + 1);
	far_grpc_encode_range(&o, 2, 0, MAX / 2);
	region_case(f, "Read", &o, 8, NULL);
	/* More ranges than are taken. */
	uint8_t many[4096];
	o = (struct far_pb_out){ many, 0, sizeof many };
	for (int i = 0; i < FAR_GRPC_MAX_RANGES; i++)
		far_grpc_encode_range(&o, 2, (uint64_t)i, 1);
	region_case(f, "Read", &o, 0, NULL);
	far_grpc_encode_range(&o, 2, 0, 1);
	region_case(f, "Read", &o, 3, NULL);
	alive(f);
}

static void test_names_and_errors(void **state)
{
	struct fixture *f = *state;
	uint8_t msg[300];
	static const char *const methods[] = { "Describe", "Read", "Pull", "Write", "Zero", "Discard", "Extents", "Flush" };
	static const struct {
		const char *name;
		int status;
	} names[] = { { "", 0 }, { "default", 0 }, { "disk", 0 }, { "dis", 5 }, { "diskk", 5 }, { "../disk", 5 } };
	char longest[250];

	memset(longest, 'x', sizeof longest - 1);
	longest[sizeof longest - 1] = 0;
	for (size_t m = 0; m < FAR_ARRAY_LEN(methods); m++) {
		struct far_pb_out o = { msg, 0, sizeof msg };
		for (size_t i = 0; i < FAR_ARRAY_LEN(names); i++) {
			o.n = 0;
			far_pb_put_bytes(&o, 1, names[i].name, strlen(names[i].name));
			region_case(f, methods[m], &o, names[i].status, NULL);
		}
		o.n = 0;
		far_pb_put_bytes(&o, 1, longest, strlen(longest));
		region_case(f, methods[m], &o, 5, NULL);
		/* What is no message. */
		o = (struct far_pb_out){ (uint8_t *)"\x0a\x7f", 2, 2 };
		region_case(f, methods[m], &o, 3, NULL);
		o = (struct far_pb_out){ (uint8_t *)"\x0b", 1, 1 };
		region_case(f, methods[m], &o, 3, NULL);
	}
	struct far_pb_out o = { msg, 0, sizeof msg };
	far_grpc_encode_range(&o, 2, 0, 1);
	static const struct {
		int error, status;
		const char *name;
	} errors[] = { { -EIO, 2, "EIO" }, { -ENOSPC, 8, "ENOSPC" }, { -EROFS, 7, "EROFS" }, { -ESTALE, 9, "ESTALE" },
		       { -ESHUTDOWN, 14, "" }, { -ETIMEDOUT, 4, "ETIMEDOUT" }, { -EPROTO, 13, "EPROTO" } };
	for (size_t i = 0; i < FAR_ARRAY_LEN(errors); i++) {
		f->slow.error = errors[i].error;
		region_case(f, "Read", &o, errors[i].status, errors[i].name);
	}
	f->slow.error = 0;
	alive(f);
}

struct odd {
	const char *method, *path, *type, *name, *value;
	const char *body;
	size_t n;
	int http, status;
};

static void test_http(void **state)
{
	static const char ok[] = "\0\0\0\0\2\x08\x04";
	static const struct odd cases[] = {
		{ "POST", READ_AT, "application/grpc", NULL, NULL, ok, 7, 200, 0 },
		{ "POST", READ_AT, "application/grpc+proto", NULL, NULL, ok, 7, 200, 0 },
		{ "POST", READ_AT, "application/grpc", "farpage-export", "disk", ok, 7, 200, 0 },
		{ "POST", READ_AT, "application/grpc", "farpage-export", "other", ok, 7, 200, 5 },
		{ "POST", READ_AT, "application/grpc", "grpc-timeout", "10S", ok, 7, 200, 0 },
		{ "POST", READ_AT, "application/grpc", "grpc-timeout", "1n", ok, 7, 200, 4 },
		{ "POST", READ_AT, "application/grpc", "grpc-timeout", "soon", ok, 7, 200, 0 },
		{ "GET", READ_AT, "application/grpc", NULL, NULL, ok, 7, 405, -1 },
		{ "POST", READ_AT, "application/json", NULL, NULL, ok, 7, 415, -1 },
		{ "POST", READ_AT, "application/grpcx", NULL, NULL, ok, 7, 415, -1 },
		{ "POST", READ_AT, NULL, NULL, NULL, ok, 7, 415, -1 },
		{ "POST", FAR_GRPC_BACKEND "Nothing", "application/grpc", NULL, NULL, ok, 7, 200, 12 },
		{ "POST", "/", "application/grpc", NULL, NULL, ok, 7, 200, 12 },
		{ "POST", READ_AT, "application/grpc", NULL, NULL, NULL, 0, 200, 13 },              /* no body at all */
		{ "POST", READ_AT, "application/grpc", NULL, NULL, "\0\0", 2, 200, 13 },            /* half a prefix */
		{ "POST", READ_AT, "application/grpc", NULL, NULL, "\0\0\0\0\2\x08", 6, 200, 13 },  /* half a message */
		{ "POST", READ_AT, "application/grpc", NULL, NULL, "\1\0\0\0\2\x08\4", 7, 200, 12 }, /* compressed */
		{ "POST", READ_AT, "application/grpc", NULL, NULL, "\7\0\0\0\2\x08\4", 7, 200, 13 },
		{ "POST", READ_AT, "application/grpc", NULL, NULL, "\0\xff\xff\xff\xff\x08\4", 7, 200, 8 },
		{ "POST", READ_AT, "application/grpc", NULL, NULL, "\0\0\0\x40\1\x08\4", 7, 200, 8 },
		{ "POST", READ_AT, "application/grpc", NULL, NULL, "\0\0\0\0\2\x08\4\0\0\0\0\2\x08\4", 14, 200, 3 },
		{ "POST", READ_AT, "application/grpc", NULL, NULL, "\0\0\0\0\0", 5, 200, 0 },       /* all zero: an empty read */
		{ "POST", FAR_GRPC_BACKEND "Sync", "application/grpc", NULL, NULL, "\0\0\0\0\0", 5, 200, 0 },
	};
	struct fixture *f = *state;

	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		const struct odd *c = &cases[i];
		int32_t id = peer_submit(f->p, c->method, c->path, c->type, c->name, c->value, c->body, c->n, false);
		assert_true(peer_drive(f->p, id));
		struct peer_stream *s = peer_of(f->p, id);
		if (s->http != c->http || s->status != c->status)
			fail_msg("case %zu: http %d status %d (%s) instead of %d and %d", i, s->http, s->status, s->message, c->http,
				 c->status);
	}
	/* A request without a path is no HTTP/2 request: the stream is reset. */
	int32_t id = peer_submit(f->p, "POST", NULL, "application/grpc", NULL, NULL, ok, 7, false);
	assert_true(peer_drive(f->p, id));
	assert_int_equal(peer_of(f->p, id)->status, -1);
	alive(f);
}

static void test_read_only(void **state)
{
	struct fixture *f = *state;
	uint8_t msg[32];

	f->slow.error = -EROFS;
	struct far_pb_out o = { msg, 0, sizeof msg };
	far_pb_put_bytes(&o, 2, "abcd", 4);
	struct peer_stream *s = peer_call(f->p, WRITE_AT, msg, o.n);
	assert_int_equal(s->status, 7);
	f->slow.error = 0;
	alive(f);
}

/* More streams than are allowed: the surplus is refused, the rest stays. */
static void test_many_streams(void **state)
{
	struct fixture *f = *state;
	unsigned refused = 0, open = 0;
	enum { N = 1500 };

	for (int i = 0; i < N; i++)
		peer_submit(f->p, "POST", READ_AT, "application/grpc", NULL, NULL, "\0", 1, true);
	peer_drive(f->p, 0);
	for (int i = 0; i < N; i++) {
		refused += f->p->s[i].closed && f->p->s[i].code == NGHTTP2_REFUSED_STREAM;
		open += !f->p->s[i].closed;
	}
	assert_int_equal(open, FAR_H2_MAX_STREAMS);
	assert_int_equal(refused, N - FAR_H2_MAX_STREAMS);
	assert_int_equal(f->p->session->requests, FAR_H2_MAX_STREAMS);
}

/* Opening and resetting for ever ends the connection. */
static void test_rapid_reset(void **state)
{
	struct fixture *f = *state;
	const uint8_t *data;
	ssize_t n;
	int r = 0, rounds = 0;

	for (; rounds < 2000 && r == 0 && !far_h2_over(&f->p->session->h2); rounds++) {
		int32_t id = peer_submit(f->p, "POST", READ_AT, "application/grpc", NULL, NULL, "\0", 1, true);
		while ((n = nghttp2_session_mem_send(f->p->h2, &data)) > 0)
			r |= far_session_feed(f->p->session, data, (size_t)n);
		nghttp2_submit_rst_stream(f->p->h2, 0, id, NGHTTP2_CANCEL);
		while ((n = nghttp2_session_mem_send(f->p->h2, &data)) > 0)
			r |= far_session_feed(f->p->session, data, (size_t)n);
		assert_true(f->p->session->requests <= 1);
		while (far_h2_fill(&f->p->session->h2, &r))
			far_h2_wrote(&f->p->session->h2, f->p->session->h2.iov[f->p->session->h2.iov_at].iov_len);
	}
	assert_true(rounds < 2000);
	assert_true(rounds > 500); /* a few are nothing unusual */
}

/* Answers that a peer provokes and does not take are not gathered for ever: here refusals of streams beyond the limit. */
static void test_refusals_bound(void **state)
{
	struct fixture *f = *state;
	static const uint8_t hello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
	struct far_session *s = calloc(1, sizeof *s);
	int r, rounds = 0;

	assert_int_equal(far_session_init(s, &f->p->env), 0);
	assert_int_equal(far_session_feed(s, hello, sizeof hello - 1), 0);
	for (r = 0; rounds < 20000 && r == 0; rounds++) {
		uint32_t id = htonl(2 * (uint32_t)rounds + 1);
		uint8_t open[] = { 0, 0, 3, 1, 4, 0, 0, 0, 0, 0x83, 0x86, 0x84 };
		memcpy(open + 5, &id, 4);
		r = far_session_feed(s, open, sizeof open);
	}
	assert_int_equal(r, -EPROTO);
	assert_true(rounds > FAR_H2_MAX_STREAMS && rounds < 10000);
	assert_int_equal(s->requests, FAR_H2_MAX_STREAMS);
	far_session_fini(s);
	free(s);
	alive(f);
}

/* Peers that make the server hold too much are turned away, all but one at a time. */
static void test_memory_bound(void **state)
{
	struct fixture *f = *state;
	static uint8_t body[5 + 60000];

	f->p->env.memory_max = 100000;
	far_grpc_prefix(body, 65000);
	int32_t id[4];
	for (int i = 0; i < 4; i++)
		id[i] = peer_submit(f->p, "POST", WRITE_AT, "application/grpc", NULL, NULL, body, sizeof body, true);
	peer_drive(f->p, 0);
	unsigned refused = 0;
	for (int i = 0; i < 4; i++)
		refused += peer_of(f->p, id[i])->status == 14;
	assert_true(refused >= 2 && refused <= 3);
	assert_true(f->p->env.memory <= 100000 + 65000);
	f->p->env.memory_max = 512 << 20;
	alive(f);
}

/* A peer that asks and asks and takes nothing: what is held for it has an end. */
static void test_replies_bound(void **state)
{
	struct fixture *f = *state;
	uint8_t msg[16];
	const uint8_t *data;
	ssize_t n;
	struct far_pb_out o = { msg, 0, sizeof msg };
	size_t len;
	struct far_request *r;
	unsigned ran = 0;

	far_pb_put_uint(&o, 1, MAX);
	uint8_t *m = peer_message(msg, o.n, &len);
	for (int i = 0; i < 1000; i++)
		peer_submit(f->p, "POST", READ_AT, "application/grpc", NULL, NULL, m, len, false);
	f->p->session->env->max_request = 1 << 20;
	while ((n = nghttp2_session_mem_send(f->p->h2, &data)) > 0)
		assert_int_equal(far_session_feed(f->p->session, data, (size_t)n), 0);
	f->p->env.memory_max = 4 << 20;
	while ((r = far_session_next(f->p->session))) {
		assert_true(far_request_run(r, 0));
		far_session_finish(f->p->session, r);
		ran++;
	}
	assert_true(ran < 100);
	assert_true(f->p->session->replies <= 5 << 20);
	/* Once it takes them, all are answered. */
	for (int i = 0; i < 1000; i++)
		assert_true(peer_drive(f->p, 2 * i + 1));
	for (int i = 0; i < 1000; i++)
		assert_int_equal(f->p->s[i].status, 0);
	free(m);
}

/* Bytes that are no HTTP/2 end the connection, nothing else. */
static void test_garbage(void **state)
{
	struct fixture *f = *state;
	static const char *const greetings[] = { "GET / HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSX\r\n\r\n",
						 "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" };
	for (size_t i = 0; i < FAR_ARRAY_LEN(greetings); i++) {
		struct far_session *s = calloc(1, sizeof *s);
		assert_int_equal(far_session_init(s, &f->p->env), 0);
		assert_true(far_session_feed(s, (const uint8_t *)greetings[i], strlen(greetings[i])) < 0);
		far_session_fini(s);
		free(s);
	}
	/* A good greeting, then a frame longer than was allowed. */
	struct far_session *s = calloc(1, sizeof *s);
	assert_int_equal(far_session_init(s, &f->p->env), 0);
	static const uint8_t hello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
	assert_int_equal(far_session_feed(s, hello, sizeof hello - 1), 0);
	assert_true(s->greeted);
	int err, r = far_session_feed(s, (const uint8_t *)"\xff\xff\xff\0\0\0\0\0\1", 9);
	while (far_h2_fill(&s->h2, &err))
		far_h2_wrote(&s->h2, s->h2.iov[s->h2.iov_at].iov_len);
	assert_true(r < 0 || far_h2_over(&s->h2));
	far_session_fini(s);
	free(s);
	alive(f);
}

int main(void)
{
#define T(x) cmocka_unit_test_setup_teardown(x, setup, teardown)
	const struct CMUnitTest tests[] = {
		T(test_backend_numbers), T(test_backend_writes), T(test_region_ranges), T(test_names_and_errors),
		T(test_http),            T(test_read_only),      T(test_many_streams),  T(test_rapid_reset),
		T(test_refusals_bound),
		T(test_memory_bound),    T(test_replies_bound),  T(test_garbage),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
