/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The pure half: protobuf fields against libprotobuf-c, prefixes, percent coding, status codes, whole messages. */
#include "peer.h"

#ifdef HAVE_PROTOBUF_C
#include "backend.pb-c.h"
#include "farpage.pb-c.h"
#endif

static void test_varint(void **state)
{
	static const struct {
		const char *bytes;
		size_t n;
		int result;
		uint64_t value;
	} cases[] = {
		{ "\x00", 1, 0, 0 },
		{ "\x7f", 1, 0, 127 },
		{ "\x80\x20", 2, 0, 4096 },
		{ "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 10, 0, UINT64_MAX },
		{ "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", 10, -EPROTO, 0 },
		{ "\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01", 11, -EPROTO, 0 },
		{ "\x80", 1, -EPROTO, 0 },
		{ "", 0, -EPROTO, 0 },
	};
	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		const uint8_t *p = (const uint8_t *)cases[i].bytes;
		uint64_t v = 0;
		assert_int_equal(far_pb_varint(&p, p + cases[i].n, &v), cases[i].result);
		if (!cases[i].result)
			assert_true(v == cases[i].value);
	}
}

static void test_bad_fields(void **state)
{
	static const struct {
		const char *bytes;
		size_t n;
	} cases[] = {
		{ "\x00\x01", 2 },                     /* field 0 */
		{ "\x0b", 1 },                         /* a group */
		{ "\x0e\x01", 2 },                     /* wire type 6 */
		{ "\x0a\x05" "abcd", 6 },              /* bytes longer than the message */
		{ "\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11 },
		{ "\x09\x01\x02\x03", 4 },             /* a fixed64 cut short */
		{ "\x08", 1 },
	};
	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		struct far_pb_in in = { (const uint8_t *)cases[i].bytes, (const uint8_t *)cases[i].bytes + cases[i].n };
		struct far_pb_field f;
		assert_int_equal(far_pb_next(&in, &f), -EPROTO);
	}
}

/* The vectors of the format's description. */
static void test_known_messages(void **state)
{
	uint8_t buf[64];
	struct far_pb_out o = { buf, 0, sizeof buf };
	struct far_grpc_request r;

	far_pb_put_uint(&o, 1, 4096);
	far_pb_put_uint(&o, 2, 8192);
	assert_int_equal(o.n, 6);
	assert_memory_equal(buf, "\x08\x80\x20\x10\x80\x40", 6);
	assert_int_equal(far_grpc_decode_request(FAR_M_READ_AT, buf, 6, &r), 0);
	assert_int_equal(r.length, 4096);
	assert_int_equal(r.off, 8192);
	static const uint8_t write_at[] = { 0x08, 0x80, 0x20, 0x12, 0x04, 0, 0x11, 0x22, 0x33 };
	assert_int_equal(far_grpc_decode_request(FAR_M_WRITE_AT, write_at, sizeof write_at, &r), 0);
	assert_int_equal(r.off, 4096);
	assert_int_equal(r.data_n, 4);
	assert_memory_equal(r.data, write_at + 5, 4);
	/* A negative length takes ten bytes. */
	static const uint8_t negative[] = { 0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01 };
	assert_int_equal(far_grpc_decode_request(FAR_M_READ_AT, negative, sizeof negative, &r), 0);
	assert_int_equal(r.length, -1);
	/* Fields in any order, unknown ones skipped, the last one wins. */
	static const uint8_t odd[] = { 0x1a, 0x02, 'x', 'y', 0x10, 0x05, 0x21, 1, 2, 3, 4, 5, 6, 7, 8, 0x08, 0x03, 0x10, 0x09 };
	assert_int_equal(far_grpc_decode_request(FAR_M_READ_AT, odd, sizeof odd, &r), 0);
	assert_int_equal(r.length, 3);
	assert_int_equal(r.off, 9);
}

struct sink {
	uint8_t data[64];
	uint64_t numbers[8], bytes_len;
};

static int sink_value(void *opaque, uint32_t num, uint64_t value)
{
	struct sink *s = opaque;
	if (num < 8)
		s->numbers[num] = value;
	return 0;
}

static int sink_bytes(void *opaque, uint32_t num, uint64_t len, uint8_t **dst)
{
	struct sink *s = opaque;
	if (num == 2 && len > sizeof s->data)
		return -EPROTO;
	*dst = num == 2 ? s->data : NULL;
	if (num == 2)
		s->bytes_len = len;
	return 0;
}

/* However a message is cut, the same comes out. */
static void test_stream_cuts(void **state)
{
	static const uint8_t msg[] = { 0x08, 0x80, 0x20, 0x1a, 0x03, 'a', 'b', 'c', 0x12, 0x05, 'h', 'e', 'l', 'l', 'o',
				       0x25, 1, 2, 3, 4, 0x28, 0x07, 0x32, 0x00 };
	for (size_t a = 0; a <= sizeof msg; a++) {
		for (size_t b = a; b <= sizeof msg; b++) {
			struct sink s = { .bytes_len = 0 };
			struct far_pb_stream p = { .value = sink_value, .bytes = sink_bytes, .opaque = &s };
			assert_int_equal(far_pb_stream_feed(&p, msg, a), 0);
			assert_int_equal(far_pb_stream_feed(&p, msg + a, b - a), 0);
			assert_int_equal(far_pb_stream_feed(&p, msg + b, sizeof msg - b), 0);
			assert_true(far_pb_stream_done(&p));
			assert_int_equal(s.numbers[1], 4096);
			assert_int_equal(s.numbers[5], 7);
			assert_int_equal(s.bytes_len, 5);
			assert_memory_equal(s.data, "hello", 5);
		}
	}
	struct sink s;
	struct far_pb_stream p = { .value = sink_value, .bytes = sink_bytes, .opaque = &s };
	assert_int_equal(far_pb_stream_feed(&p, msg, 12), 0);
	assert_false(far_pb_stream_done(&p));
	uint8_t *dst;
	assert_int_equal(far_pb_stream_want(&p, &dst), 3);
	assert_ptr_equal(dst, s.data + 2);
}

static void test_percent(void **state)
{
	char out[128], back[128];

	/* As the Go server does it. */
	far_grpc_percent_encode(out, sizeof out, "50% done\n\t\"\xc3\xa9\" <a&b> \\ ~\x7f");
	assert_string_equal(out, "50%25 done%0A%09\"%C3%A9\" <a&b> \\ ~%7F");
	far_grpc_percent_decode(back, sizeof back, out, strlen(out));
	assert_string_equal(back, "50% done\n\t\"\xc3\xa9\" <a&b> \\ ~\x7f");
	assert_int_equal(far_grpc_percent_encode(out, 4, "a%b"), 1); /* never half an escape */
	assert_string_equal(out, "a");
	far_grpc_percent_decode(back, sizeof back, "%zz%4", 5);
	assert_string_equal(back, "%zz%4");
	far_grpc_percent_decode(back, sizeof back, "%00", 3);
	assert_string_equal(back, "?");
	assert_int_equal(far_grpc_percent_decode(back, 3, "abcdef", 6), 2);
}

static void test_deframe(void **state)
{
	static const uint8_t bytes[] = { 0, 0, 0, 1, 2 };
	struct far_grpc_deframer d = { .have = 0 };
	size_t used;

	for (int i = 0; i < 5; i++) {
		assert_false(d.in_body);
		assert_int_equal(far_grpc_deframe(&d, bytes + i, 1, &used), 0);
		assert_int_equal(used, 1);
	}
	assert_true(d.in_body);
	assert_int_equal(d.len, 258);
	assert_false(far_grpc_deframe_done(&d));
	assert_false(far_grpc_deframe_body(&d, 257));
	assert_true(far_grpc_deframe_body(&d, 1));
	assert_true(far_grpc_deframe_done(&d));
	struct far_grpc_deframer c = { .have = 0 };
	assert_int_equal(far_grpc_deframe(&c, (const uint8_t *)"\1\0\0\0\0", 5, &used), -EOPNOTSUPP);
	struct far_grpc_deframer e = { .have = 0 };
	assert_int_equal(far_grpc_deframe(&e, (const uint8_t *)"\2\0\0\0\0", 5, &used), -EPROTO);
}

static void test_timeout(void **state)
{
	uint64_t ns;

	assert_int_equal(far_grpc_timeout("1S", 2, &ns), 0);
	assert_true(ns == FAR_SEC);
	assert_int_equal(far_grpc_timeout("250m", 4, &ns), 0);
	assert_true(ns == 250 * FAR_MSEC);
	assert_int_equal(far_grpc_timeout("99999999H", 9, &ns), 0);
	static const char *const bad[] = { "", "S", "1", "-1S", "1x", "123456789S", "1.5S" };
	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++)
		assert_int_equal(far_grpc_timeout(bad[i], strlen(bad[i]), &ns), -EINVAL);
}

static void test_status(void **state)
{
	static const int exact[] = { EIO, EINVAL, ETIMEDOUT, ENOENT, EROFS, EPERM, EACCES, ENOSPC, EDQUOT, ESTALE,
				     EOPNOTSUPP, EPROTO, ECONNRESET, ECANCELED, EBADMSG, ENOTCONN, EBUSY };

	for (size_t i = 0; i < FAR_ARRAY_LEN(exact); i++) {
		enum far_grpc_status s = far_grpc_status_of(-exact[i]);
		assert_int_equal(far_grpc_errno_of(s, far_grpc_errno_name(-exact[i])), -exact[i]);
		assert_true(far_grpc_errno_of(s, NULL) < 0);
	}
	/* By the status alone. */
	assert_int_equal(far_grpc_errno_of(FAR_GRPC_UNKNOWN, NULL), -EIO);
	assert_int_equal(far_grpc_errno_of(FAR_GRPC_OUT_OF_RANGE, NULL), -EINVAL);
	assert_int_equal(far_grpc_errno_of(FAR_GRPC_PERMISSION_DENIED, NULL), -EROFS);
	assert_int_equal(far_grpc_errno_of(FAR_GRPC_FAILED_PRECONDITION, NULL), -EROFS);
	assert_int_equal(far_grpc_errno_of(FAR_GRPC_UNAVAILABLE, NULL), -ECONNRESET);
	assert_int_equal(far_grpc_errno_of(FAR_GRPC_DEADLINE_EXCEEDED, NULL), -ETIMEDOUT);
	assert_int_equal(far_grpc_errno_of(77, "ENOSUCH"), -EIO);
	assert_int_equal(far_grpc_status_of(-ESHUTDOWN), FAR_GRPC_UNAVAILABLE);
	assert_int_equal(far_grpc_status_of(0), FAR_GRPC_OK);
}

static void test_methods(void **state)
{
	assert_int_equal(far_grpc_method_of("/farpage.v1.Region/Read", 23), FAR_M_READ);
	assert_int_equal(far_grpc_method_of("/farpage.v1.Region/Rea", 22), FAR_M_NONE);
	assert_int_equal(far_grpc_method_of("/farpage.v1.Region/ReadAt", 25), FAR_M_NONE);
	assert_int_equal(far_grpc_method_of(FAR_GRPC_BACKEND "ReadAt", strlen(FAR_GRPC_BACKEND "ReadAt")), FAR_M_READ_AT);
	assert_int_equal(far_grpc_method_of("", 0), FAR_M_NONE);
}

static void test_extents_checked(void **state)
{
	struct far_extent in[3] = { { 100, 50, FAR_EXTENT_DATA }, { 150, 10, FAR_EXTENT_ZERO }, { 161, 1, FAR_EXTENT_DATA } };
	struct far_extent out[8];
	uint8_t buf[128];
	size_t n;

	for (int k = 1; k <= 3; k++) {
		struct far_pb_out o = { buf, 0, sizeof buf };
		for (int i = 0; i < k; i++)
			far_grpc_encode_extent(&o, &in[i]);
		int r = far_grpc_decode_extents(buf, o.n, 100, 100, out, 8, &n);
		assert_int_equal(r, k == 3 ? -EPROTO : 0); /* the third leaves a gap */
		if (!r)
			assert_memory_equal(out, in, (size_t)k * sizeof in[0]);
	}
	struct far_pb_out o = { buf, 0, sizeof buf };
	far_grpc_encode_extent(&o, &in[0]);
	assert_int_equal(far_grpc_decode_extents(buf, o.n, 100, 49, out, 8, &n), -EPROTO); /* longer than asked */
	assert_int_equal(far_grpc_decode_extents(buf, 0, 100, 49, out, 8, &n), -EPROTO);   /* none */
}

static void export_fill(struct far_grpc_export *e)
{
	*e = (struct far_grpc_export){ .name = "disk", .size = 1 << 20, .chunk = 512, .max_request = 7, .read_only = true,
				       .sums = true, .sessions = true, .identity = "id", .version = "v", .writer = "w-1",
				       .instance = UINT64_MAX, .epoch = 3, .revision = 4, .change = 5 };
}

static void export_same(const struct far_grpc_export *a, const struct far_grpc_export *b)
{
	assert_string_equal(a->name, b->name);
	assert_string_equal(a->identity, b->identity);
	assert_string_equal(a->version, b->version);
	assert_string_equal(a->writer, b->writer);
	assert_true(a->size == b->size && a->chunk == b->chunk && a->max_request == b->max_request);
	assert_true(a->read_only == b->read_only && a->durable == b->durable && a->sums == b->sums && a->sessions == b->sessions);
	assert_true(a->instance == b->instance && a->epoch == b->epoch && a->revision == b->revision && a->change == b->change);
}

/* Every request comes out as it went in; of one with a check no bit can be flipped without being noticed. */
static void test_requests(void **state)
{
	uint8_t sum[FAR_GRPC_SUM] = "0123456789abcde", buf[512], bad[512];
	struct far_grpc_request in = { .export = "disk", .export_n = 4, .session = UINT64_MAX, .generation = 2, .off = 4096,
				       .len = 77, .max = 9, .bulk = true, .zeros = true, .flush = true, .sums = true,
				       .take_over = true, .release = true, .epoch = 5, .revision = 6, .instance = 8, .since = 10,
				       .writer = "me", .writer_n = 2, .holder = "host: 1", .holder_n = 7, .sum = sum, .data_n = 0,
				       .piece = 3, .ranges_n = 2, .ranges = { { 1, 2 }, { 3, 0 } } };
	struct far_grpc_request out;

	for (int m = FAR_M_EXPORTS; m < FAR_M_NONE; m++) {
		struct far_pb_out o = { buf, 0, sizeof buf }, again = { bad, 0, sizeof bad };
		far_grpc_encode_request(&o, (enum far_grpc_method)m, &in);
		assert_true(o.n <= o.cap);
		assert_int_equal(far_grpc_decode_request((enum far_grpc_method)m, buf, o.n, &out), 0);
		far_grpc_encode_request(&again, (enum far_grpc_method)m, &out);
		assert_int_equal(again.n, o.n);
		assert_memory_equal(buf, bad, o.n);
		assert_int_equal(out.checked, m == FAR_M_DESCRIBE || m >= FAR_M_EXTENTS);
		for (size_t bit = 0; out.checked && bit < (o.n - 10) * 8; bit++) {
			memcpy(bad, buf, o.n);
			bad[bit / 8] ^= (uint8_t)(1 << bit % 8);
			struct far_grpc_request x;
			int r = far_grpc_decode_request((enum far_grpc_method)m, bad, o.n, &x);
			assert_true(r < 0 || !x.checked); /* the check itself may be taken for something else */
			if (m == FAR_M_LEASE || m == FAR_M_WATCH)
				assert_true(r < 0);
		}
	}
	struct far_pb_out o = { buf, 0, sizeof buf };
	far_grpc_encode_request(&o, FAR_M_LEASE, &in);
	assert_int_equal(far_grpc_decode_request(FAR_M_LEASE, buf, o.n, &out), 0);
	assert_true(out.session == in.session && out.generation == 2 && out.epoch == 5 && out.revision == 6 && out.take_over);
	assert_true(out.release && out.writer_n == 2 && out.holder_n == 7 && !memcmp(out.holder, "host: 1", 7));
	far_pb_put_uint(&o, 1000, 1);
	assert_int_equal(far_grpc_decode_request(FAR_M_LEASE, buf, o.n, &out), -EBADMSG); /* not the last field */
}

static void test_replies(void **state)
{
	struct far_extent list[2] = { { 0, 4096, FAR_EXTENT_DATA }, { 8192, 1, FAR_EXTENT_DATA } }, got[2];
	struct far_grpc_lease l = { .answer = FAR_GRPC_STALE, .ttl_ms = 1, .left_ms = 2, .gone = true, .other = "them" }, l2;
	struct far_grpc_watch w = { .all = false }, w2;
	struct far_grpc_flushed f = { 11, 12, false }, f2;
	uint8_t buf[FAR_GRPC_LEASE_MAX + FAR_GRPC_WATCH_MAX(2)], sum[FAR_GRPC_SUM] = "x";
	const uint8_t *back;
	size_t n;

	export_fill(&l.export);
	export_fill(&w.export);
	struct far_pb_out o = { buf, 0, FAR_GRPC_LEASE_MAX };
	far_grpc_encode_lease(&o, &l);
	assert_int_equal(far_grpc_decode_lease(buf, o.n, &l2), 0);
	assert_true(l2.checked && l2.answer == l.answer && l2.ttl_ms == 1 && l2.left_ms == 2 && l2.gone);
	assert_string_equal(l2.other, "them");
	export_same(&l2.export, &l.export);
	buf[3] ^= 4;
	assert_int_equal(far_grpc_decode_lease(buf, o.n, &l2), -EBADMSG);

	o = (struct far_pb_out){ buf, 0, FAR_GRPC_WATCH_MAX(2) };
	far_grpc_encode_watch(&o, &w, list, 2);
	assert_int_equal(far_grpc_decode_watch(buf, o.n, &w2, got, 2, &n), 0);
	assert_true(n == 2 && !w2.all && got[0].off == 0 && got[0].len == 4096 && got[1].off == 8192 && got[1].len == 1);
	export_same(&w2.export, &w.export);
	assert_int_equal(far_grpc_decode_watch(buf, o.n, &w2, got, 1, &n), 0);
	assert_true(n == 1 && w2.all); /* what has no room is not forgotten */
	list[1].len = 1 << 20;
	o.n = 0;
	far_grpc_encode_watch(&o, &w, list, 2);
	assert_int_equal(far_grpc_decode_watch(buf, o.n, &w2, got, 2, &n), -EPROTO); /* beyond the end */

	o = (struct far_pb_out){ buf, 0, 64 };
	far_grpc_encode_flushed(&o, &f);
	assert_int_equal(far_grpc_decode_flushed(buf, o.n, &f2), 0);
	assert_true(f2.checked && f2.instance == 11 && f2.revision == 12);
	struct far_grpc_written d = { .sum = sum, .flushed = true, .instance = 3, .revision = 4 }, d2;
	o.n = 0;
	far_grpc_encode_written(&o, &d);
	assert_int_equal(far_grpc_decode_written(buf, o.n, &d2), 0);
	assert_true(d2.checked && d2.flushed && d2.instance == 3 && d2.revision == 4);
	assert_memory_equal(d2.sum, sum, sizeof sum);
	for (size_t bit = 0; bit < o.n * 8; bit++) {
		buf[bit / 8] ^= (uint8_t)(1 << bit % 8);
		assert_true(far_grpc_decode_written(buf, o.n, &d2) || !d2.checked);
		buf[bit / 8] ^= (uint8_t)(1 << bit % 8);
	}
	o.n = 0;
	far_grpc_encode_sum_reply(&o, sum);
	assert_int_equal(far_grpc_decode_sum_reply(buf, o.n, &back), 0);
	assert_memory_equal(back, sum, sizeof sum);
	assert_int_equal(far_grpc_decode_sum_reply(buf, 0, &back), 0);
	assert_null(back);
}

/* The checksums as they stand in the protocol's text, so that another program can be compared with it. */
static void test_sums(void **state)
{
	uint8_t a[FAR_GRPC_SUM], b[FAR_GRPC_SUM];

	far_grpc_sum_data(a, "disk", 4, 4096, "hello", 5);
	far_grpc_sum_data(b, "disk", 4, 4097, "hello", 5);
	assert_memory_not_equal(a, b, sizeof a);
	far_grpc_sum_data(b, "disj", 4, 4096, "hello", 5);
	assert_memory_not_equal(a, b, sizeof a);
	far_grpc_sum_span(a, "", 0, 0, 8);
	far_grpc_sum_data(b, NULL, 0, 0, "\x08\0\0\0\0\0\0", 8);
	assert_memory_equal(a, b, sizeof a);
}

#ifdef HAVE_PROTOBUF_C
static uint64_t oracle_seed = 0x9e3779b97f4a7c15;

static uint64_t oracle_random(void)
{
	oracle_seed ^= oracle_seed << 13;
	oracle_seed ^= oracle_seed >> 7;
	oracle_seed ^= oracle_seed << 17;
	return oracle_seed >> (oracle_seed & 63);
}

/* What libprotobuf-c packs we read the same, and the other way round. */
static void test_oracle(void **state)
{
	printf("seed %#llx\n", (unsigned long long)oracle_seed);
	for (int i = 0; i < 2000; i++) {
		uint8_t data[300], buf[1024], mine[1024];
		struct far_grpc_request r;
		Farpage__V1__WriteRequest w = FARPAGE__V1__WRITE_REQUEST__INIT;
		char name[] = "disk";
		w.export = i & 1 ? name : (char *)"";
		w.offset = oracle_random();
		w.flush = i & 2;
		w.bulk = i & 4;
		w.data.data = data;
		w.data.len = oracle_random() % sizeof data;
		for (size_t k = 0; k < w.data.len; k++)
			data[k] = (uint8_t)oracle_random();
		size_t n = farpage__v1__write_request__pack(&w, buf);
		assert_int_equal(far_grpc_decode_request(FAR_M_WRITE, buf, n, &r), 0);
		assert_int_equal(r.export_n, i & 1 ? 4 : 0);
		assert_true((uint64_t)r.off == w.offset && r.flush == (bool)w.flush && r.bulk == (bool)w.bulk);
		assert_int_equal(r.data_n, w.data.len);
		if (w.data.len)
			assert_memory_equal(r.data, data, w.data.len);

		struct far_pb_out o = { mine, 0, sizeof mine };
		far_pb_put_bytes(&o, 1, w.export, strlen(w.export));
		far_pb_put_uint(&o, 2, w.offset);
		far_pb_put_uint(&o, 3, w.flush != 0);
		far_pb_put_uint(&o, 4, w.bulk != 0);
		far_pb_put_bytes(&o, 5, data, w.data.len);
		assert_int_equal(o.n, n);
		assert_memory_equal(mine, buf, n);

		struct far_grpc_export e = { .size = oracle_random(), .chunk = oracle_random() & 0xffff, .max_request = 1u << 25,
					     .read_only = i & 1, .durable = i & 2, .name = "a region", .version = "7" };
		o = (struct far_pb_out){ mine, 0, sizeof mine };
		far_grpc_encode_export(&o, &e);
		Farpage__V1__Export *x = farpage__v1__export__unpack(NULL, o.n, mine);
		assert_non_null(x);
		assert_true(x->size == e.size && x->chunk == e.chunk && x->max_request == e.max_request);
		assert_true((bool)x->read_only == e.read_only && (bool)x->durable == e.durable);
		assert_string_equal(x->name, e.name);
		assert_string_equal(x->version, e.version);
		assert_int_equal(farpage__v1__export__pack(x, buf), o.n);
		assert_memory_equal(buf, mine, o.n);
		farpage__v1__export__free_unpacked(x, NULL);
	}
	/* Bytes at random: whenever the oracle takes them we do, with the same values. */
	unsigned taken = 0;
	for (int i = 0; i < 200000; i++) {
		uint8_t b[12];
		size_t n = oracle_random() % sizeof b;
		for (size_t k = 0; k < n; k++)
			b[k] = (uint8_t)(oracle_random() & 0x97);
		struct far_grpc_request r;
		Com__Pojtinger__Felicitas__R3map__Mount__V1__ReadAtArgs *x =
			com__pojtinger__felicitas__r3map__mount__v1__read_at_args__unpack(NULL, n, b);
		int mine = far_grpc_decode_request(FAR_M_READ_AT, b, n, &r);
		if (x && mine == 0) {
			taken++;
			assert_int_equal(r.length, x->length);
			assert_true(r.off == x->off);
		}
		if (x)
			com__pojtinger__felicitas__r3map__mount__v1__read_at_args__free_unpacked(x, NULL);
	}
	assert_true(taken > 1000);
}
#endif

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_varint),       cmocka_unit_test(test_bad_fields),
		cmocka_unit_test(test_known_messages), cmocka_unit_test(test_stream_cuts),
		cmocka_unit_test(test_percent),      cmocka_unit_test(test_deframe),
		cmocka_unit_test(test_timeout),      cmocka_unit_test(test_status),
		cmocka_unit_test(test_methods),      cmocka_unit_test(test_extents_checked),
		cmocka_unit_test(test_requests),     cmocka_unit_test(test_replies),
		cmocka_unit_test(test_sums),
#ifdef HAVE_PROTOBUF_C
		cmocka_unit_test(test_oracle),
#endif
	};
#ifndef HAVE_PROTOBUF_C
	puts("skip: libprotobuf-c or protoc-c is missing, no oracle");
#endif
	return cmocka_run_group_tests(tests, NULL, NULL);
}
