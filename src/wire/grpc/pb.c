/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "wire/grpc/pb.h"

#include <string.h>

#define PB_MAX_FIELD ((1U << 29) - 1)

int far_pb_varint(const uint8_t **p, const uint8_t *end, uint64_t *value)
{
	uint64_t v = 0;

	for (unsigned shift = 0; *p < end && shift < 70; shift += 7) {
		uint8_t b = *(*p)++;
		if (shift == 63 && b > 1)
			return -EPROTO;
		v |= (uint64_t)(b & 0x7f) << shift;
		if (!(b & 0x80)) {
			*value = v;
			return 0;
		}
	}
	return -EPROTO;
}

/* Split a tag; -EPROTO for field numbers and wire types that do not exist. */
static int pb_tag(uint64_t tag, uint32_t *num, unsigned *wire)
{
	*wire = tag & 7;
	if (tag >> 3 == 0 || tag >> 3 > PB_MAX_FIELD)
		return -EPROTO;
	*num = (uint32_t)(tag >> 3);
	return *wire == FAR_PB_VARINT || *wire == FAR_PB_I64 || *wire == FAR_PB_BYTES || *wire == FAR_PB_I32 ? 0 : -EPROTO;
}

static uint64_t pb_fixed(const uint8_t *p, size_t n)
{
	uint64_t v = 0;
	while (n--)
		v = v << 8 | p[n];
	return v;
}

int far_pb_next(struct far_pb_in *in, struct far_pb_field *f)
{
	uint64_t v;
	unsigned wire;

	if (in->p == in->end)
		return 0;
	if (far_pb_varint(&in->p, in->end, &v) || pb_tag(v, &f->num, &wire))
		return -EPROTO;
	*f = (struct far_pb_field){ .num = f->num, .wire = (enum far_pb_wire)wire };
	if (wire == FAR_PB_VARINT)
		return far_pb_varint(&in->p, in->end, &f->value) ? -EPROTO : 1;
	if (wire == FAR_PB_BYTES) {
		if (far_pb_varint(&in->p, in->end, &v) || v > (size_t)(in->end - in->p))
			return -EPROTO;
		f->data = in->p;
		f->len = (size_t)v;
		in->p += v;
		return 1;
	}
	size_t n = wire == FAR_PB_I64 ? 8 : 4;
	if ((size_t)(in->end - in->p) < n)
		return -EPROTO;
	f->value = pb_fixed(in->p, n);
	in->p += n;
	return 1;
}

size_t far_pb_varint_size(uint64_t value)
{
	size_t n = 1;
	while (value >>= 7)
		n++;
	return n;
}

static void pb_put_varint(struct far_pb_out *o, uint64_t v)
{
	do {
		if (o->n < o->cap)
			o->p[o->n] = (uint8_t)((v & 0x7f) | (v > 0x7f ? 0x80 : 0));
		o->n++;
		v >>= 7;
	} while (v);
}

void far_pb_put_uint(struct far_pb_out *o, uint32_t num, uint64_t value)
{
	if (!value)
		return;
	pb_put_varint(o, (uint64_t)num << 3 | FAR_PB_VARINT);
	pb_put_varint(o, value);
}

void far_pb_put_fixed(struct far_pb_out *o, uint32_t num, uint64_t value)
{
	pb_put_varint(o, (uint64_t)num << 3 | FAR_PB_I64);
	for (unsigned i = 0; i < 8; i++, o->n++)
		if (o->n < o->cap)
			o->p[o->n] = (uint8_t)(value >> 8 * i);
}

void far_pb_put_head(struct far_pb_out *o, uint32_t num, uint64_t len)
{
	pb_put_varint(o, (uint64_t)num << 3 | FAR_PB_BYTES);
	pb_put_varint(o, len);
}

void far_pb_put_bytes(struct far_pb_out *o, uint32_t num, const void *data, size_t len)
{
	if (!len)
		return;
	far_pb_put_head(o, num, len);
	if (o->n <= o->cap && len <= o->cap - o->n)
		memcpy(o->p + o->n, data, len);
	o->n += len;
}

enum { PB_TAG, PB_VALUE, PB_LEN, PB_BODY, PB_FIXED };

/* A varint is whole. */
static int pb_stream_number(struct far_pb_stream *s)
{
	uint64_t v = s->acc;
	unsigned wire;

	s->acc = 0;
	s->shift = 0;
	switch (s->state) {
	case PB_TAG:
		if (pb_tag(v, &s->num, &wire))
			return -EPROTO;
		s->wire = (uint8_t)wire;
		s->state = wire == FAR_PB_VARINT ? PB_VALUE : wire == FAR_PB_BYTES ? PB_LEN : PB_FIXED;
		s->left = wire == FAR_PB_I64 ? 8 : 4;
		s->dst = NULL;
		return 0;
	case PB_VALUE:
		s->state = PB_TAG;
		return s->value(s->opaque, s->num, v);
	default:
		s->dst = NULL;
		s->left = v;
		s->state = v ? PB_BODY : PB_TAG;
		return s->bytes(s->opaque, s->num, v, &s->dst);
	}
}

static void pb_stream_body(struct far_pb_stream *s, const uint8_t *data, size_t n)
{
	if (s->dst) {
		if (s->dst != data)
			memcpy(s->dst, data, n);
		s->dst += n;
	}
	s->left -= n;
	if (!s->left)
		s->state = PB_TAG;
}

int far_pb_stream_feed(struct far_pb_stream *s, const uint8_t *data, size_t len)
{
	while (len) {
		if (s->state == PB_BODY || s->state == PB_FIXED) {
			size_t n = (size_t)far_min(len, s->left);
			pb_stream_body(s, data, n);
			data += n;
			len -= n;
			continue;
		}
		uint8_t b = *data++;
		len--;
		if (s->shift > 63 || (s->shift == 63 && b > 1))
			return -EPROTO;
		s->acc |= (uint64_t)(b & 0x7f) << s->shift;
		s->shift = (uint8_t)(s->shift + 7);
		if (b & 0x80)
			continue;
		int r = pb_stream_number(s);
		if (r)
			return r;
	}
	return 0;
}

bool far_pb_stream_done(const struct far_pb_stream *s)
{
	return s->state == PB_TAG && s->shift == 0;
}

size_t far_pb_stream_want(const struct far_pb_stream *s, uint8_t **dst)
{
	if (s->state != PB_BODY || !s->dst)
		return 0;
	*dst = s->dst;
	return (size_t)s->left;
}
