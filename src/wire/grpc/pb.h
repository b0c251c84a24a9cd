/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Protocol buffers, as much of them as a handful of small messages needs: varints and byte strings, unknown fields
 * skipped, nothing allocated, byte strings borrowed from the input. Groups (deprecated) are refused.
 */
#ifndef FAR_GRPC_PB_H
#define FAR_GRPC_PB_H

#include "base/base.h"

enum far_pb_wire { FAR_PB_VARINT = 0, FAR_PB_I64 = 1, FAR_PB_BYTES = 2, FAR_PB_I32 = 5 };

struct far_pb_in {
	const uint8_t *p, *end;
};

struct far_pb_field {
	uint32_t num;
	enum far_pb_wire wire;
	uint64_t value;      /* VARINT, I64, I32 */
	const uint8_t *data; /* BYTES: into the input */
	size_t len;
};

/* The next field: 1, 0 at the end, -EPROTO. */
int far_pb_next(struct far_pb_in *in, struct far_pb_field *f);
/* A varint from [*p, end): 0 and *p moved on, or -EPROTO (cut short, or more than 64 bits). */
int far_pb_varint(const uint8_t **p, const uint8_t *end, uint64_t *value);

/* Encoding into a buffer of fixed size. n may pass cap: then nothing more is written and the result is no good. */
struct far_pb_out {
	uint8_t *p;
	size_t n, cap;
};
void far_pb_put_uint(struct far_pb_out *o, uint32_t num, uint64_t value); /* zero is left out */
void far_pb_put_fixed(struct far_pb_out *o, uint32_t num, uint64_t value); /* fixed64; zero is written too */
void far_pb_put_bytes(struct far_pb_out *o, uint32_t num, const void *data, size_t len); /* empty is left out */
/* Tag and length only: the caller puts the bytes behind. */
void far_pb_put_head(struct far_pb_out *o, uint32_t num, uint64_t len);
size_t far_pb_varint_size(uint64_t value);

/*
 * A message that arrives in pieces, whose long byte strings go straight to where they are wanted. value() is called for
 * numbers; bytes() at the beginning of a byte string and names the place for its len bytes, or NULL to skip them. Either
 * returns 0 or -errno, which ends the parse.
 */
struct far_pb_stream {
	int (*value)(void *opaque, uint32_t num, uint64_t value);
	int (*bytes)(void *opaque, uint32_t num, uint64_t len, uint8_t **dst);
	void *opaque;
	/* private */
	uint64_t acc;
	uint64_t left;
	uint8_t *dst;
	uint32_t num;
	uint8_t shift, wire, state;
};

/* 0, -EPROTO, or what a callback returned. Data that already lies where it belongs is not copied. */
int far_pb_stream_feed(struct far_pb_stream *s, const uint8_t *data, size_t len);
/* Whether a message may end here. */
bool far_pb_stream_done(const struct far_pb_stream *s);
/* Where the next bytes belong and how many; 0 when that is not known. */
size_t far_pb_stream_want(const struct far_pb_stream *s, uint8_t **dst);

#endif
