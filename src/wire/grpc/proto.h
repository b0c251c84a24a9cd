/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The messages of both services (backend.proto, farpage.proto) as structs, their checksums, and the names of the methods.
 * Pure: what is decoded borrows from the bytes it was decoded from; what is encoded goes into the caller's buffer.
 */
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
	FAR_M_LEASE,
	FAR_M_WATCH,
	FAR_M_NONE,
};
enum far_grpc_method far_grpc_method_of(const char *path, size_t len); /* FAR_M_NONE: no such method */
static inline bool far_grpc_is_region(enum far_grpc_method m) { return m >= FAR_M_EXPORTS && m < FAR_M_NONE; }

struct far_grpc_range {
	uint64_t off, len;
};
#define FAR_GRPC_MAX_RANGES 128

#define FAR_GRPC_SUM 16

/* A request of any method. The strings, `sum` and `data` point into the message. */
struct far_grpc_request {
	const char *export; /* not terminated; NULL: no field */
	size_t export_n;
	int64_t off;        /* ReadAt and WriteAt may be negative: the server refuses that */
	int32_t length;     /* ReadAt */
	uint64_t len;       /* a span's */
	uint64_t piece;
	uint32_t max;
	bool bulk, zeros, flush, sums, take_over, release;
	bool checked;       /* it carried a check, which fits */
	uint64_t session, generation;
	uint64_t epoch, revision;  /* Lease */
	uint64_t instance, since;  /* Watch */
	const char *writer, *holder; /* Lease; not terminated, writer_n and holder_n bytes */
	size_t writer_n, holder_n;
	const uint8_t *sum; /* FAR_GRPC_SUM bytes; NULL: none */
	const uint8_t *data;
	size_t data_n;
	unsigned ranges_n;
	struct far_grpc_range ranges[FAR_GRPC_MAX_RANGES];
};

/* 0, -EPROTO, -E2BIG: more ranges than FAR_GRPC_MAX_RANGES, -EBADMSG: its check does not
 * fit, or a Lease or Watch has none. */
int far_grpc_decode_request(enum far_grpc_method m, const uint8_t *p, size_t n, struct far_grpc_request *out);
/* The request of any method of farpage.v1 with the fields that it has, and its check. Of a Write everything up to the
 * head of the data; data_n bytes are to follow. */
void far_grpc_encode_request(struct far_pb_out *o, enum far_grpc_method m, const struct far_grpc_request *r);

/* The checksums of farpage.proto's head comment: of bytes, and of a length where no bytes travel. */
void far_grpc_sum_data(uint8_t out[FAR_GRPC_SUM], const char *export, size_t export_n, uint64_t off, const void *data,
		       size_t len);
/* The same of bytes that have not been looked at for long. */
void far_grpc_sum_cold(uint8_t out[FAR_GRPC_SUM], const char *export, size_t export_n, uint64_t off, const void *data,
		       size_t len);
void far_grpc_sum_span(uint8_t out[FAR_GRPC_SUM], const char *export, size_t export_n, uint64_t off, uint64_t len);
/* Add the field `check` over the message that o holds from its beginning; nothing follows it. */
void far_grpc_put_check(struct far_pb_out *o);
/* 0, -EPROTO, -EBADMSG: there is one and it does not fit, or it is not the last field. *had: there is one that fits. */
int far_grpc_check(const uint8_t *p, size_t n, bool *had);

struct far_grpc_export {
	char name[128];
	uint64_t size, chunk, max_request;
	bool read_only, durable, sums, sessions;
	bool checked; /* as in a request */
	char identity[64], version[64], writer[40];
	uint64_t instance, epoch, revision, change;
};
/* Without a check: far_grpc_put_check() adds it where the message is not inside another one. */
void far_grpc_encode_export(struct far_pb_out *o, const struct far_grpc_export *e);
int far_grpc_decode_export(const uint8_t *p, size_t n, struct far_grpc_export *e); /* 0, -EPROTO, -EBADMSG */

void far_grpc_encode_range(struct far_pb_out *o, uint32_t num, uint64_t off, uint64_t len); /* a nested Range */
void far_grpc_encode_extent(struct far_pb_out *o, const struct far_extent *x);              /* of an ExtentsReply */
/* 0 or -EPROTO: not valid, no extent at all, or they do not cover [off, ...) in order inside `len` without gaps;
 * -EBADMSG. */
int far_grpc_decode_extents(const uint8_t *p, size_t n, uint64_t off, uint64_t len, struct far_extent *out, size_t max,
			    size_t *count);

/* WriteReply of a Write with flush: with its check. */
struct far_grpc_written {
	const uint8_t *sum; /* NULL: none; decoded it points into the message */
	bool flushed, checked;
	uint64_t instance, revision;
};
void far_grpc_encode_written(struct far_pb_out *o, const struct far_grpc_written *w);
int far_grpc_decode_written(const uint8_t *p, size_t n, struct far_grpc_written *w); /* 0, -EPROTO, -EBADMSG */

/* WriteReply without flush, ZeroReply, DiscardReply. */
void far_grpc_encode_sum_reply(struct far_pb_out *o, const uint8_t *sum); /* NULL: none */
/* 0 or -EPROTO; *sum points into p, NULL: there is none. */
int far_grpc_decode_sum_reply(const uint8_t *p, size_t n, const uint8_t **sum);

struct far_grpc_flushed {
	uint64_t instance, revision;
	bool checked;
};
void far_grpc_encode_flushed(struct far_pb_out *o, const struct far_grpc_flushed *f); /* with its check */
int far_grpc_decode_flushed(const uint8_t *p, size_t n, struct far_grpc_flushed *f);  /* 0, -EPROTO, -EBADMSG */

enum far_grpc_answer { FAR_GRPC_GRANTED, FAR_GRPC_BUSY, FAR_GRPC_STALE, FAR_GRPC_READ_ONLY };

struct far_grpc_lease {
	enum far_grpc_answer answer;
	uint32_t ttl_ms, left_ms;
	bool gone, checked;
	char other[128];
	struct far_grpc_export export;
};
#define FAR_GRPC_LEASE_MAX 1024 /* a buffer for the longest one */
void far_grpc_encode_lease(struct far_pb_out *o, const struct far_grpc_lease *l); /* with its check */
int far_grpc_decode_lease(const uint8_t *p, size_t n, struct far_grpc_lease *l);  /* 0, -EPROTO, -EBADMSG */

struct far_grpc_watch {
	bool all, checked;
	struct far_grpc_export export;
};
/* A buffer that holds every reply with so many ranges. */
#define FAR_GRPC_WATCH_MAX(ranges) (1024 + 32 * (size_t)(ranges))
void far_grpc_encode_watch(struct far_pb_out *o, const struct far_grpc_watch *w, const struct far_extent *list, size_t n);
/* 0, -EPROTO: not valid, or a range beyond the export's size, -EBADMSG. More ranges than max: `all` is set. */
int far_grpc_decode_watch(const uint8_t *p, size_t n, struct far_grpc_watch *w, struct far_extent *out, size_t max,
			  size_t *count);

#endif
