/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The pure half: messages of every method, replies, prefixes, percent coding. The first byte chooses. What is cut into
 * pieces must give what it gives whole. */
#include "wire/grpc/frame.h"
#include "wire/grpc/proto.h"

#include <stdlib.h>
#include <string.h>

/* Replies with a check: whatever is accepted comes out the same again. */
static void replies(unsigned which, const uint8_t *data, size_t size)
{
	uint8_t buf[FAR_GRPC_LEASE_MAX + FAR_GRPC_WATCH_MAX(8)];
	struct far_pb_out o = { buf, 0, sizeof buf };
	struct far_grpc_lease l, l2;
	struct far_grpc_watch w, w2;
	struct far_grpc_flushed f, f2;
	struct far_extent x[8];
	const uint8_t *sum;
	size_t n;

	if (which == 0 && far_grpc_decode_lease(data, size, &l) == 0) {
		far_grpc_encode_lease(&o, &l);
		FAR_ASSERT(far_grpc_decode_lease(buf, o.n, &l2) == 0 && l2.answer == l.answer && l2.ttl_ms == l.ttl_ms);
	} else if (which == 1 && far_grpc_decode_watch(data, size, &w, x, 8, &n) == 0) {
		far_grpc_encode_watch(&o, &w, x, n);
		FAR_ASSERT(far_grpc_decode_watch(buf, o.n, &w2, x, 8, &n) == 0 && w2.all == w.all);
	} else if (which == 2 && far_grpc_decode_flushed(data, size, &f) == 0) {
		far_grpc_encode_flushed(&o, &f);
		FAR_ASSERT(far_grpc_decode_flushed(buf, o.n, &f2) == 0 && f2.revision == f.revision);
	} else if (which == 3) {
		struct far_grpc_written d;
		far_grpc_decode_sum_reply(data, size, &sum);
		far_grpc_decode_written(data, size, &d);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct seen {
	uint64_t sum, bytes;
	uint8_t buf[256];
};

static int seen_value(void *opaque, uint32_t num, uint64_t value)
{
	struct seen *s = opaque;
	s->sum = s->sum * 31 + num * 7 + value;
	return 0;
}

static int seen_bytes(void *opaque, uint32_t num, uint64_t len, uint8_t **dst)
{
	struct seen *s = opaque;
	s->sum = s->sum * 31 + num * 11 + len;
	*dst = num == 2 && len <= sizeof s->buf ? s->buf : NULL;
	return 0;
}

static void stream(const uint8_t *data, size_t size, size_t step)
{
	struct seen whole = { .sum = 0 }, cut = { .sum = 0 };
	struct far_pb_stream a = { .value = seen_value, .bytes = seen_bytes, .opaque = &whole };
	struct far_pb_stream b = { .value = seen_value, .bytes = seen_bytes, .opaque = &cut };
	int ra = far_pb_stream_feed(&a, data, size), rb = 0;

	for (size_t at = 0; at < size && rb == 0; at += step)
		rb = far_pb_stream_feed(&b, data + at, (size_t)far_min(step, size - at));
	FAR_ASSERT(ra == rb);
	FAR_ASSERT(ra || (whole.sum == cut.sum && !memcmp(whole.buf, cut.buf, sizeof whole.buf)));
	FAR_ASSERT(ra || far_pb_stream_done(&a) == far_pb_stream_done(&b));
	/* What the whole parser takes, the one for pieces takes too. */
	struct far_pb_in in = { data, data + size };
	struct far_pb_field f;
	int r;
	while ((r = far_pb_next(&in, &f)) > 0)
		;
	FAR_ASSERT((r == 0) == (ra == 0 && far_pb_stream_done(&a)));
}

static void text(const uint8_t *data, size_t size)
{
	char out[64], back[256], again[256];
	uint64_t ns;

	far_grpc_percent_decode(out, sizeof out, (const char *)data, size);
	far_grpc_percent_encode(back, sizeof back, out);
	far_grpc_percent_decode(again, sizeof again, back, strlen(back));
	FAR_ASSERT(!strcmp(again, out));
	far_grpc_percent_encode(out, size % sizeof out, again);
	far_grpc_timeout((const char *)data, size, &ns);
	far_grpc_method_of((const char *)data, size);
}

static void frames(const uint8_t *data, size_t size)
{
	struct far_grpc_deframer d = { .have = 0 };

	while (size) {
		size_t used;
		if (d.in_body) {
			used = (size_t)far_min(size, d.left);
			far_grpc_deframe_body(&d, used);
		} else if (far_grpc_deframe(&d, data, size, &used)) {
			return;
		}
		data += used;
		size -= used;
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct far_grpc_request r;
	struct far_grpc_export e;
	struct far_extent x[8];
	size_t n;

	if (size < 2)
		return 0;
	unsigned what = data[0] % (FAR_M_NONE + 9), arg = data[1];
	data += 2;
	size -= 2;
	if (what < FAR_M_NONE)
		far_grpc_decode_request((enum far_grpc_method)what, data, size, &r);
	else if (what == FAR_M_NONE)
		far_grpc_decode_export(data, size, &e);
	else if (what == FAR_M_NONE + 1)
		far_grpc_decode_extents(data, size, arg, (uint64_t)arg << 32, x, 8, &n);
	else if (what == FAR_M_NONE + 2)
		stream(data, size, arg % 7 + 1);
	else if (what == FAR_M_NONE + 3)
		text(data, size);
	else if (what == FAR_M_NONE + 4)
		frames(data, size);
	else
		replies(what - FAR_M_NONE - 5, data, size);
	return 0;
}
