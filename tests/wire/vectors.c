/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Recorded exchanges between a Go client and a Go server: our server gets the client's bytes and must say what the Go
 * server said; our client gets the server's bytes and must understand them. */
#include "peer.h"

#include "backend/backend.h"
#include "wire/grpc/channel.h"

#define REGION (1u << 20)

static void pattern(uint8_t *p)
{
	for (size_t i = 0; i < REGION; i += 8)
		for (int k = 0; k < 8; k++)
			p[i + (size_t)k] = (uint8_t)((uint64_t)i >> (56 - 8 * k));
}

enum { WROTE = 1, TEXT_DIFFERS = 2, FAILS = 4 };
static const struct vector {
	const char *name;
	int flags;
	const char *method;
	int64_t off;
	int32_t length;
	unsigned calls;
	int status;
} vectors[] = {
	{ "grpc-backend-readat-4", 0, "ReadAt", 4096, 4, 1, 0 },
	{ "grpc-backend-readat-64k", 0, "ReadAt", 65536, 65536, 1, 0 },
	{ "grpc-backend-readat-3-at-once", WROTE, "ReadAt", 0, 4096, 3, 0 },
	{ "grpc-backend-writeat-4", 0, "WriteAt", 4096, 4, 1, 0 },
	{ "grpc-backend-idle-1700ms", WROTE, "ReadAt", 4096, 4, 1, 0 },
	{ "grpc-backend-sync", 0, "Sync", 0, 0, 1, 0 },
	{ "grpc-backend-error-too-large", 0, "ReadAt", 0, 33554433, 1, 2 },
	{ "grpc-backend-error-past-end", 0, "ReadAt", 1048576, 4096, 1, 2 },
	{ "grpc-backend-error-short-tail", 0, "ReadAt", 1046528, 4096, 1, 2 },
	{ "grpc-backend-error-negative-offset", TEXT_DIFFERS, "ReadAt", -1, 4, 1, 2 },
	{ "grpc-backend-error-odd-text", TEXT_DIFFERS | FAILS, "ReadAt", 4096, 4, 1, 2 },
};

/* Give a server's bytes to an nghttp2 client that has opened the streams. */
static void decode(struct peer *p, const uint8_t *bytes, size_t n, unsigned calls)
{
	const uint8_t *data;

	peer_over_fd(p, 0);
	p->fd = -1;
	for (unsigned i = 0; i < calls; i++)
		peer_submit(p, "POST", "/x", "application/grpc", NULL, NULL, "", 0, false);
	while (nghttp2_session_mem_send(p->h2, &data) > 0)
		;
	assert_true(nghttp2_session_mem_recv(p->h2, bytes, n) == (ssize_t)n);
}

static void collect(struct far_session *s, uint8_t **out, size_t *n)
{
	struct far_request *r;
	int err;

	while ((r = far_session_next(s))) {
		if (!far_request_run(r, FAR_NOWAIT))
			assert_true(far_request_run(r, 0));
		far_session_finish(s, r);
	}
	while (far_h2_fill(&s->h2, &err)) {
		struct iovec v = s->h2.iov[s->h2.iov_at];
		*out = realloc(*out, *n + v.iov_len);
		assert_non_null(*out);
		memcpy(*out + *n, v.iov_base, v.iov_len);
		*n += v.iov_len;
		far_h2_wrote(&s->h2, v.iov_len);
	}
}

/* What must not be replayed frame by frame: the Go client's farewell, which names a stream of its own as the last one it
 * heard of (nghttp2 ends the session there; in life nothing is pending by then), and acknowledgements of settings that
 * only the recorded peer sent. */
static size_t clean(uint8_t *bytes, size_t n, size_t at)
{
	unsigned acks = 0;
	size_t out = at;

	while (at + 9 <= n) {
		const uint8_t *f = bytes + at;
		size_t len = 9 + ((size_t)f[0] << 16 | (size_t)f[1] << 8 | f[2]);
		assert_true(len <= n - at);
		bool ack = f[3] == NGHTTP2_SETTINGS && f[4] == NGHTTP2_FLAG_ACK;
		acks += ack;
		if (f[3] != NGHTTP2_GOAWAY && !(ack && acks > 1)) {
			memmove(bytes + out, f, len);
			out += len;
		}
		at += len;
	}
	assert_int_equal(at, n);
	return out;
}

/* Our server with the recorded client: in pieces of `step` bytes. */
static void replay_client(const struct vector *v, size_t step)
{
	struct slow slow;
	struct far_backend *b = slow_open(&slow, REGION);
	struct far_export e = { (char *)"reg", b, NULL };
	struct far_server_env env = { .exports = &e, .exports_n = 1, .max_request = 32 << 20, .memory_max = 1 << 30 };
	struct far_session *s = calloc(1, sizeof *s);
	size_t n, theirs_n, ours_n = 0;
	uint8_t *bytes = vector_load(v->name, '>', &n), *theirs = vector_load(v->name, '<', &theirs_n), *ours = NULL;
	struct peer *a = malloc(sizeof *a), *o = malloc(sizeof *o);

	assert_int_equal(far_owner_new(b, 0, &e.owner), 0);
	n = clean(bytes, n, 24); /* behind the preface */
	theirs_n = clean(theirs, theirs_n, 0);
	pattern(slow.mem);
	if (v->flags & WROTE)
		memcpy(slow.mem + 4096, "\x00\x11\x22\x33", 4);
	if (v->flags & FAILS)
		slow.error = -EIO;
	assert_int_equal(far_session_init(s, &env), 0);
	for (size_t at = 0; at < n; at += step) {
		assert_int_equal(far_session_feed(s, bytes + at, (size_t)far_min(step, n - at)), 0);
		collect(s, &ours, &ours_n);
	}
	decode(a, theirs, theirs_n, v->calls);
	ours_n = clean(ours, ours_n, 0);
	decode(o, ours, ours_n, v->calls);
	for (unsigned i = 0; i < v->calls; i++) {
		assert_true(o->s[i].ended);
		assert_int_equal(o->s[i].http, 200);
		assert_int_equal(o->s[i].status, a->s[i].status);
		assert_int_equal(o->s[i].status, v->status);
		if (!(v->flags & TEXT_DIFFERS))
			assert_string_equal(o->s[i].message, a->s[i].message);
		assert_int_equal(o->s[i].data_n, a->s[i].data_n);
		if (o->s[i].data_n)
			assert_memory_equal(o->s[i].data, a->s[i].data, o->s[i].data_n);
	}
	if (!strcmp(v->method, "WriteAt"))
		assert_memory_equal(slow.mem + 4096, "\x00\x11\x22\x33", 4);
	far_session_fini(s);
	assert_int_equal(env.memory, 0);
	far_owner_free(e.owner);
	peer_free(a);
	peer_free(o);
	free(a);
	free(o);
	free(s);
	free(bytes);
	free(theirs);
	free(ours);
	far_close(b);
	slow_free(&slow);
}

static void test_our_server(void **state)
{
	static const size_t steps[] = { 1, 7, 1000, 1 << 20 };

	for (size_t i = 0; i < FAR_ARRAY_LEN(vectors); i++) {
		printf("%s\n", vectors[i].name);
		for (size_t k = 0; k < FAR_ARRAY_LEN(steps); k++)
			replay_client(&vectors[i], steps[k]);
	}
}

struct reading {
	struct far_call call;
	uint8_t buf[65536];
	uint64_t n, len;
	int32_t length;
};

static int reading_value(void *opaque, uint32_t num, uint64_t value)
{
	struct reading *r = opaque;
	if (num == 1)
		r->n = value;
	return 0;
}

static int reading_bytes(void *opaque, uint32_t num, uint64_t len, uint8_t **dst)
{
	struct reading *r = opaque;
	if (num != 2)
		return 0;
	if (len != (uint64_t)r->length)
		return -EPROTO;
	r->len = len;
	*dst = r->buf;
	return 0;
}

/* Our client with the recorded server. `wrong`: it asked for another length than what comes. */
static void replay_server(const struct vector *v, size_t step, bool wrong)
{
	struct far_channel *c;
	struct reading *r = calloc(3, sizeof *r);
	size_t n;
	uint8_t *bytes = vector_load(v->name, '<', &n), sink[4096], head[64], want[65536];
	bool read = !strcmp(v->method, "ReadAt");
	static uint8_t region[REGION];

	n = clean(bytes, n, 0);
	pattern(region);
	if (v->flags & WROTE)
		memcpy(region + 4096, "\x00\x11\x22\x33", 4);
	assert_int_equal(far_channel_new(NULL, "127.0.0.1", &c), 0);
	for (unsigned i = 0; i < v->calls; i++) {
		char path[100];
		struct far_pb_out o = { head, 0, sizeof head };
		snprintf(path, sizeof path, FAR_GRPC_BACKEND "%s", v->method);
		r[i].call = (struct far_call){ .path = FAR_GRPC_BACKEND "ReadAt", .fields = read, .buf = want, .buf_cap = 64,
					       .pb = { .value = reading_value, .bytes = reading_bytes, .opaque = &r[i] } };
		r[i].length = wrong ? v->length + 1 : v->length;
		far_call_request(&r[i].call, &o, NULL, 0);
		assert_int_equal(far_channel_submit(c, &r[i].call), 0);
	}
	while (far_channel_take(c, sink, sizeof sink))
		;
	for (size_t at = 0; at < n; at += step) {
		far_channel_feed(c, bytes + at, (size_t)far_min(step, n - at));
		while (far_channel_take(c, sink, sizeof sink))
			;
	}
	for (unsigned i = 0; i < v->calls; i++) {
		assert_true(r[i].call.done);
		if (wrong && v->status == 0) {
			assert_int_equal(r[i].call.result, -EPROTO);
		} else if (v->status) {
			assert_int_equal(r[i].call.result, -EIO);
			assert_int_equal(r[i].call.grpc_status, v->status);
			assert_true(r[i].call.text[0] != 0);
		} else {
			assert_int_equal(r[i].call.result, 0);
		}
		if (v->status == 0 && read && !wrong) {
			assert_int_equal(r[i].n, v->length);
			/* Streams in the order of the Go client's calls, which is its own. */
			bool found = false;
			for (unsigned k = 0; k < v->calls && !found; k++)
				found = !memcmp(r[i].buf, region + v->off + k * 4096, (size_t)v->length);
			assert_true(found);
		}
		far_channel_end(c, &r[i].call, -EIO);
	}
	if (!strcmp(v->name, "grpc-backend-error-odd-text"))
		assert_string_equal(r[0].call.text, "50% done\n\t\"\xc3\xa9\" <a&b> \\ ~\x7f");
	far_channel_put(c);
	free(r);
	free(bytes);
}

static void test_our_client(void **state)
{
	static const size_t steps[] = { 1, 13, 1 << 20 };

	for (size_t i = 0; i < FAR_ARRAY_LEN(vectors); i++) {
		printf("%s\n", vectors[i].name);
		for (size_t k = 0; k < FAR_ARRAY_LEN(steps); k++) {
			replay_server(&vectors[i], steps[k], false);
			if (!strcmp(vectors[i].method, "ReadAt"))
				replay_server(&vectors[i], steps[k], true);
		}
	}
}

/* The Go server's farewell ends the connection for new calls. */
static void test_goaway(void **state)
{
	struct far_channel *c;
	size_t n;
	uint8_t *bytes = vector_load("grpc-raw-too-many-pings", '<', &n), sink[4096];

	assert_int_equal(far_channel_new(NULL, "x", &c), 0);
	while (far_channel_take(c, sink, sizeof sink))
		;
	assert_true(far_channel_usable(c));
	far_channel_feed(c, bytes, n);
	assert_false(far_channel_usable(c));
	struct far_pb_out o = { sink, 0, sizeof sink };
	struct far_call call = { .path = "/x", .buf = sink, .buf_cap = 8 };
	far_call_request(&call, &o, NULL, 0);
	assert_int_equal(far_channel_call(c, &call, far_now() + FAR_SEC, FAR_SEC), -ECONNRESET);
	assert_true(call.untouched);
	far_channel_put(c);
	free(bytes);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_our_server),
		cmocka_unit_test(test_our_client),
		cmocka_unit_test(test_goaway),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
