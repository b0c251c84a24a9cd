/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Client and server together over real sockets: what goes in comes out, at every size and edge, from many threads; names,
 * sizes and options; both services. */
#define _GNU_SOURCE
#include "peer.h"

#include "wire/server.h"
#include "wire/wire.h"

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

#define LIST 300 /* more than are ever on their way together */

/* Lists of pieces that do not touch each other, against a plain array. */
static void lists(struct far_backend *b, uint64_t size, bool writes)
{
	uint8_t *truth = malloc(size), *buf = malloc(size);
	struct far_io *io = calloc(LIST, sizeof *io);
	size_t n = 1 + rnd() % LIST, part = size / n;

	assert_int_equal(far_read(b, 0, truth, size, 0), 0);
	for (size_t k = 0; k < size; k++)
		buf[k] = (uint8_t)(rnd() >> 24);
	for (size_t i = 0; i < n; i++) {
		size_t len = 1 + rnd() % part, at = i * part + rnd() % (part - len + 1);
		io[i] = (struct far_io){ .off = at, .buf = buf + at, .len = len, .result = 1 };
		if (writes)
			memcpy(truth + at, buf + at, len);
	}
	assert_int_equal((writes ? far_write_many : far_read_many)(b, io, n, rnd() & 1 ? FAR_BULK : 0), 0);
	for (size_t i = 0; i < n; i++) {
		assert_int_equal(io[i].result, 0);
		assert_memory_equal(io[i].buf, truth + io[i].off, io[i].len);
	}
	assert_int_equal(far_read(b, 0, buf, size, 0), 0);
	assert_memory_equal(buf, truth, size);
	free(io);
	free(truth);
	free(buf);
}

static void test_lists(void **state)
{
	for (int plain = 0; plain < 2; plain++) {
		struct rig r;
		rig_open(&r, "mem:3000001", plain, plain ? "?size=3000001" : "");
		for (int i = 0; i < 60; i++)
			lists(r.far, i % 3 ? 3000001 : 20000, i & 1);
		rig_close(&r);
	}
}

/* They are on their way together: a server that takes its time takes it once. */
static void test_list_takes_one_trip(void **state)
{
	struct far_io io[32];
	struct far_backend *mem, *slow, *far;
	struct far_server *s;
	uint8_t buf[32][100];
	char *uri;

	assert_int_equal(far_open("mem:1M", NULL, &mem, NULL), 0);
	assert_int_equal(far_layer_open("delay:rtt=100ms", mem, &slow, NULL), 0);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "disk", slow, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &uri, NULL), 0);
	assert_int_equal(far_open(uri, NULL, &far, NULL), 0);
	for (size_t i = 0; i < 32; i++)
		io[i] = (struct far_io){ .off = i * 5000, .buf = buf[i], .len = sizeof buf[i] };
	memset(buf, 9, sizeof buf);
	uint64_t began = far_now();
	assert_int_equal(far_write_many(far, io, 32, 0), 0);
	memset(buf, 0, sizeof buf);
	assert_int_equal(far_read_many(far, io, 32, 0), 0);
	uint64_t took = far_now() - began;
	assert_true(buf[0][0] == 9 && buf[31][99] == 9);
	assert_true(took >= 200 * FAR_MSEC && took < 64 * 100 * FAR_MSEC / 2);
	far_close(far);
	far_server_stop(s);
	far_server_free(s);
	far_close(slow);
	free(uri);
}

/* A peer that goes silent under a long list: it ends in about the time of one call, not of each. */
static void test_list_to_a_silent_peer(void **state)
{
	struct far_io io[LIST];
	struct slow slow;
	struct far_backend *b = slow_open(&slow, 1 << 20), *far, *again;
	struct far_server *s;
	char *uri, name[200], buf[64];

	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "disk", b, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &uri, NULL), 0);
	snprintf(name, sizeof name, "%s?timeout=500ms", uri);
	for (size_t i = 0; i < LIST; i++)
		io[i] = (struct far_io){ .off = i * 1000, .buf = buf, .len = sizeof buf };
	for (int write = 0; write < 2; write++) {
		assert_int_equal(far_open(name, NULL, &far, NULL), 0);
		slow_hold(&slow, true);
		uint64_t began = far_now();
		assert_int_equal((write ? far_write_many : far_read_many)(far, io, LIST, 0), -ETIMEDOUT);
		assert_true(far_now() - began < 10 * FAR_SEC);
		assert_int_equal(io[0].result, -ETIMEDOUT);
		assert_int_equal(io[LIST - 1].result, -ETIMEDOUT);
		assert_int_equal(far_layer_open("retry:deadline=1s", far, &again, NULL), 0);
		began = far_now();
		assert_int_equal((write ? far_write_many : far_read_many)(again, io, LIST, 0), -ETIMEDOUT);
		assert_true(far_now() - began < 5 * FAR_SEC);
		slow_hold(&slow, false);
		assert_int_equal((write ? far_write_many : far_read_many)(again, io, LIST, 0), 0);
		far_close(again);
	}
	far_server_stop(s);
	far_server_free(s);
	far_close(b);
	slow_free(&slow);
	free(uri);
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
		struct far_io io[] = { { 0, &c, 1, 1 }, { 1, &c, 1, 1 }, { 2, &c, 1, 1 } };
		assert_int_equal(far_read_many(far, io, 3, 0), -codes[i]);
		assert_true(io[1].result == -codes[i] && io[2].result == -codes[i]);
		assert_int_equal(far_write_many(far, io, 3, 0), -codes[i]);
		assert_true(io[1].result == -codes[i] && io[2].result == -codes[i]);
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
		cmocka_unit_test(test_many_threads),     cmocka_unit_test(test_unix_and_fd),
		cmocka_unit_test(test_lists),            cmocka_unit_test(test_list_takes_one_trip),
		cmocka_unit_test(test_list_to_a_silent_peer),
		cmocka_unit_test(test_names_and_sizes),  cmocka_unit_test(test_read_only),
		cmocka_unit_test(test_errors_exact),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
