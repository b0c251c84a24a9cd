/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The client's side of a connection with three calls on their way, fed with what a server may say. A call that succeeds
 * has all its bytes, and nothing is written beyond them. */
#include "wire/grpc/channel.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct fuzz_call {
	struct far_call call;
	uint8_t *dst;
	size_t len, got;
	uint64_t n;
};

static int fuzz_value(void *opaque, uint32_t num, uint64_t value)
{
	struct fuzz_call *f = opaque;
	if (num == 1)
		f->n = value;
	return 0;
}

static int fuzz_bytes(void *opaque, uint32_t num, uint64_t len, uint8_t **dst)
{
	struct fuzz_call *f = opaque;
	if (num != 2)
		return 0;
	if (len != f->len)
		return -EPROTO;
	f->got = (size_t)len;
	*dst = f->dst;
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const size_t lens[3] = { 4, 4096, 64 };
	struct fuzz_call f[3];
	struct far_channel *c;
	uint8_t sink[512], head[16];

	if (!size || far_channel_new(NULL, "localhost", &c))
		return 0;
	size_t step = data[0] ? data[0] : 4096;
	data++;
	size--;
	for (int i = 0; i < 3; i++) {
		struct far_pb_out o = { head, 0, sizeof head };
		memset(&f[i], 0, sizeof f[i]);
		f[i].len = lens[i];
		f[i].dst = malloc(lens[i]);
		FAR_ASSERT(f[i].dst);
		f[i].call.path = "/com.pojtinger.felicitas.r3map.mount.v1.Backend/ReadAt";
		f[i].call.fields = i < 2;
		f[i].call.buf = f[i].dst;
		f[i].call.buf_cap = lens[i];
		f[i].call.pb = (struct far_pb_stream){ .value = fuzz_value, .bytes = fuzz_bytes, .opaque = &f[i] };
		far_pb_put_uint(&o, 1, lens[i]);
		far_call_request(&f[i].call, &o, NULL, 0);
		FAR_ASSERT(far_channel_submit(c, &f[i].call) == 0);
	}
	while (far_channel_take(c, sink, sizeof sink))
		;
	while (size) {
		size_t n = (size_t)far_min(step, size);
		if (far_channel_feed(c, data, n))
			break;
		data += n;
		size -= n;
		far_channel_take(c, sink, sizeof sink);
	}
	for (int i = 0; i < 3; i++) {
		far_channel_end(c, &f[i].call, -ETIMEDOUT);
		FAR_ASSERT(f[i].call.result <= 0);
		FAR_ASSERT(f[i].call.buf_n <= lens[i]);
		free(f[i].dst);
	}
	far_channel_put(c);
	return 0;
}
