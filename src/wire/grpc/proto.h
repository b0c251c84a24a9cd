/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The messages of both services (backend.proto, farpage.proto) as structs, and the names of the methods. Pure: requests
 * are decoded from bytes and borrow from them; replies are encoded into a buffer. */
#ifndef FAR_GRPC_PROTO_H
#define FAR_GRPC_PROTO_H

#include "wire/grpc/pb.h"

#define FAR_GRPC_BACKEND "/com.pojtinger.felicitas.r3map.mount.v1.Backend/"
#define FAR_GRPC_REGION "/farpage.v1.Region/"

enum far_grpc_method {
	FAR_M_READ_AT,
	FAR_M_WRITE_AT,
	FAR_M_SYNC,
	FAR_M_EXPORTS,
	FAR_M_DESCRIBE,
	FAR_M_READ,
	FAR_M_PULL,
	FAR_M_WRITE,
	FAR_M_ZERO,
	FAR_M_DISCARD,
	FAR_M_EXTENTS,
	FAR_M_FLUSH,
	FAR_M_NONE,
};
enum far_grpc_method far_grpc_method_of(const char *path, size_t len); /* FAR_M_NONE: no such method */
static inline bool far_grpc_is_region(enum far_grpc_method m) { return m >= FAR_M_EXPORTS && m < FAR_M_NONE; }

struct far_grpc_range {
	uint64_t off, len;
};
#define FAR_GRPC_MAX_RANGES 128

/* A request of any method. The strings and `data` point into the message. */
struct far_grpc_request {
	const char *export; /* not terminated; NULL: no field */
	size_t export_n;
	int64_t off;        /* ReadAt and WriteAt may be negative: the server refuses that */
	int32_t length;     /* ReadAt */
	uint64_t len;       /* a span's */
	uint64_t piece;
	uint32_t max;
	bool bulk, zeros, flush;
	const uint8_t *data;
	size_t data_n;
	unsigned ranges_n;
	struct far_grpc_range ranges[FAR_GRPC_MAX_RANGES];
};

/* 0, -EPROTO, or -E2BIG: more ranges than FAR_GRPC_MAX_RANGES. */
int far_grpc_decode_request(enum far_grpc_method m, const uint8_t *p, size_t n, struct far_grpc_request *out);

struct far_grpc_export {
	char name[128];
	uint64_t size, chunk, max_request;
	bool read_only, durable;
	char identity[64], version[64];
};
void far_grpc_encode_export(struct far_pb_out *o, const struct far_grpc_export *e);
int far_grpc_decode_export(const uint8_t *p, size_t n, struct far_grpc_export *e); /* 0 or -EPROTO */

void far_grpc_encode_range(struct far_pb_out *o, uint32_t num, uint64_t off, uint64_t len); /* a nested Range */
void far_grpc_encode_extent(struct far_pb_out *o, const struct far_extent *x);              /* of an ExtentsReply */
/* 0 or -EPROTO: not valid, no extent at all, or they do not cover [off, ...) in order inside `len` without gaps. */
int far_grpc_decode_extents(const uint8_t *p, size_t n, uint64_t off, uint64_t len, struct far_extent *out, size_t max,
			    size_t *count);

#endif
