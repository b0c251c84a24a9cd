/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* gRPC's own bytes above HTTP/2: the five-byte prefix of a message, the status and its text, the timeout header.
 * Nothing here knows a descriptor or an HTTP/2 session. */
#ifndef FAR_GRPC_FRAME_H
#define FAR_GRPC_FRAME_H

#include "base/base.h"

#define FAR_GRPC_PREFIX 5

enum far_grpc_status {
	FAR_GRPC_OK = 0,
	FAR_GRPC_CANCELLED = 1,
	FAR_GRPC_UNKNOWN = 2,
	FAR_GRPC_INVALID_ARGUMENT = 3,
	FAR_GRPC_DEADLINE_EXCEEDED = 4,
	FAR_GRPC_NOT_FOUND = 5,
	FAR_GRPC_PERMISSION_DENIED = 7,
	FAR_GRPC_RESOURCE_EXHAUSTED = 8,
	FAR_GRPC_FAILED_PRECONDITION = 9,
	FAR_GRPC_ABORTED = 10,
	FAR_GRPC_OUT_OF_RANGE = 11,
	FAR_GRPC_UNIMPLEMENTED = 12,
	FAR_GRPC_INTERNAL = 13,
	FAR_GRPC_UNAVAILABLE = 14,
	FAR_GRPC_DATA_LOSS = 15,
	FAR_GRPC_UNAUTHENTICATED = 16,
};

/* Takes a stream of prefixed messages apart. Zeroed it is ready. */
struct far_grpc_deframer {
	uint8_t prefix[FAR_GRPC_PREFIX];
	uint8_t have;  /* bytes of the prefix */
	bool in_body;  /* the prefix is whole, `left` bytes of the message are to come */
	uint32_t len;  /* of the message */
	uint32_t left;
};
/* Take bytes of a prefix. *used bytes were taken; in_body tells that it is whole. -EPROTO: a flag that is neither 0 nor
 * 1; -EOPNOTSUPP: compressed. */
int far_grpc_deframe(struct far_grpc_deframer *d, const uint8_t *data, size_t len, size_t *used);
/* n bytes of the body were taken; at its end the next prefix is awaited. True at the end. */
bool far_grpc_deframe_body(struct far_grpc_deframer *d, size_t n);
/* Whether the stream may end here. */
bool far_grpc_deframe_done(const struct far_grpc_deframer *d);

void far_grpc_prefix(uint8_t out[FAR_GRPC_PREFIX], uint32_t len);

/* The text of a status: '%', bytes below 0x20 and from 0x7f on become %XX. Cut (never inside an escape) to fit; always
 * terminated. Returns its length. */
size_t far_grpc_percent_encode(char *out, size_t cap, const char *text);
/* Lenient, as the gRPC specification wants it: an escape that is none stays as it is. Zero bytes become '?'. */
size_t far_grpc_percent_decode(char *out, size_t cap, const char *in, size_t len);

/* "1S", "500m" and so on, in nanoseconds; -EINVAL. */
int far_grpc_timeout(const char *text, size_t len, uint64_t *ns);

/* A negative errno for the wire, and back. `name` is what the trailer farpage-errno carries ("ENOSPC"), which is exact
 * where the status is not; NULL or unknown: by the status alone. */
enum far_grpc_status far_grpc_status_of(int err);
int far_grpc_errno_of(unsigned status, const char *name);
const char *far_grpc_errno_name(int err); /* NULL: no name of its own */

#endif
