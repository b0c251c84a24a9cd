/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * NBD on the wire: numbers, and the bytes of headers. Nothing here reads or writes a connection. Everything is big-endian.
 * The protocol is that of NetworkBlockDevice/nbd, doc/proto.md: fixed newstyle negotiation, simple and structured replies,
 * extended headers.
 */
#ifndef FAR_NBD_PROTO_H
#define FAR_NBD_PROTO_H

#include "base/base.h"

#include <endian.h>
#include <string.h>

#define FAR_NBD_MAGIC 0x4e42444d41474943       /* "NBDMAGIC" */
#define FAR_NBD_OPT_MAGIC 0x49484156454f5054   /* "IHAVEOPT" */
#define FAR_NBD_OPT_REPLY_MAGIC 0x0003e889045565a9
#define FAR_NBD_REQUEST_MAGIC 0x25609513
#define FAR_NBD_REQUEST_EXT_MAGIC 0x21e41c71
#define FAR_NBD_SIMPLE_MAGIC 0x67446698
#define FAR_NBD_CHUNK_MAGIC 0x668e33ef
#define FAR_NBD_CHUNK_EXT_MAGIC 0x6e8a278c

/* handshake flags, both ways */
#define FAR_NBD_FIXED_NEWSTYLE 1
#define FAR_NBD_NO_ZEROES 2

enum far_nbd_option {
	FAR_NBD_OPT_EXPORT_NAME = 1,
	FAR_NBD_OPT_ABORT = 2,
	FAR_NBD_OPT_LIST = 3,
	FAR_NBD_OPT_STARTTLS = 5,
	FAR_NBD_OPT_INFO = 6,
	FAR_NBD_OPT_GO = 7,
	FAR_NBD_OPT_STRUCTURED_REPLY = 8,
	FAR_NBD_OPT_LIST_META_CONTEXT = 9,
	FAR_NBD_OPT_SET_META_CONTEXT = 10,
	FAR_NBD_OPT_EXTENDED_HEADERS = 11,
};

#define FAR_NBD_REP_ERROR (UINT32_C(1) << 31)
enum far_nbd_rep {
	FAR_NBD_REP_ACK = 1,
	FAR_NBD_REP_SERVER = 2,
	FAR_NBD_REP_INFO = 3,
	FAR_NBD_REP_META_CONTEXT = 4,
};
#define FAR_NBD_REP_ERR_UNSUP (FAR_NBD_REP_ERROR | 1)
#define FAR_NBD_REP_ERR_POLICY (FAR_NBD_REP_ERROR | 2)
#define FAR_NBD_REP_ERR_INVALID (FAR_NBD_REP_ERROR | 3)
#define FAR_NBD_REP_ERR_TLS_REQD (FAR_NBD_REP_ERROR | 5)
#define FAR_NBD_REP_ERR_UNKNOWN (FAR_NBD_REP_ERROR | 6)
#define FAR_NBD_REP_ERR_TOO_BIG (FAR_NBD_REP_ERROR | 9)
#define FAR_NBD_REP_ERR_EXT_HEADER_REQD (FAR_NBD_REP_ERROR | 10)

enum far_nbd_info { FAR_NBD_INFO_EXPORT, FAR_NBD_INFO_NAME, FAR_NBD_INFO_DESCRIPTION, FAR_NBD_INFO_BLOCK_SIZE };

enum far_nbd_export_flags {
	FAR_NBD_HAS_FLAGS = 1 << 0,
	FAR_NBD_READ_ONLY = 1 << 1,
	FAR_NBD_SEND_FLUSH = 1 << 2,
	FAR_NBD_SEND_FUA = 1 << 3,
	FAR_NBD_SEND_TRIM = 1 << 5,
	FAR_NBD_SEND_WRITE_ZEROES = 1 << 6,
	FAR_NBD_SEND_DF = 1 << 7,
	FAR_NBD_CAN_MULTI_CONN = 1 << 8,
	FAR_NBD_SEND_CACHE = 1 << 10,
	FAR_NBD_SEND_FAST_ZERO = 1 << 11,
};

enum far_nbd_command {
	FAR_NBD_READ,
	FAR_NBD_WRITE,
	FAR_NBD_DISC,
	FAR_NBD_FLUSH,
	FAR_NBD_TRIM,
	FAR_NBD_CACHE,
	FAR_NBD_WRITE_ZEROES,
	FAR_NBD_BLOCK_STATUS,
};

enum far_nbd_command_flags {
	FAR_NBD_FUA = 1 << 0,
	FAR_NBD_NO_HOLE = 1 << 1,
	FAR_NBD_DF = 1 << 2,
	FAR_NBD_REQ_ONE = 1 << 3,
	FAR_NBD_FAST_ZERO = 1 << 4,
	FAR_NBD_PAYLOAD_LEN = 1 << 5, /* extended headers: `len` is what follows, not what is meant */
};

#define FAR_NBD_CHUNK_DONE 1
enum far_nbd_chunk {
	FAR_NBD_CHUNK_NONE = 0,
	FAR_NBD_CHUNK_OFFSET_DATA = 1,
	FAR_NBD_CHUNK_OFFSET_HOLE = 2,
	FAR_NBD_CHUNK_BLOCK_STATUS = 5,
	FAR_NBD_CHUNK_BLOCK_STATUS_EXT = 6,
	FAR_NBD_CHUNK_ERROR = 0x8001,
};

/* of base:allocation */
#define FAR_NBD_STATE_HOLE 1
#define FAR_NBD_STATE_ZERO 2

#define FAR_NBD_STRING_MAX 4096
#define FAR_NBD_REQUEST_BYTES 28
#define FAR_NBD_REQUEST_EXT_BYTES 32
#define FAR_NBD_HEAD_MAX 64 /* the longest reply header, with what stands in a chunk before its data */

/* The forms that replies can have, as negotiated. */
enum far_nbd_form { FAR_NBD_SIMPLE, FAR_NBD_STRUCTURED, FAR_NBD_EXTENDED };

static inline uint16_t far_nbd_get16(const uint8_t *p)
{
	uint16_t v;
	memcpy(&v, p, sizeof v);
	return be16toh(v);
}
static inline uint32_t far_nbd_get32(const uint8_t *p)
{
	uint32_t v;
	memcpy(&v, p, sizeof v);
	return be32toh(v);
}
static inline uint64_t far_nbd_get64(const uint8_t *p)
{
	uint64_t v;
	memcpy(&v, p, sizeof v);
	return be64toh(v);
}
static inline uint8_t *far_nbd_put16(uint8_t *p, uint16_t v)
{
	v = htobe16(v);
	memcpy(p, &v, sizeof v);
	return p + sizeof v;
}
static inline uint8_t *far_nbd_put32(uint8_t *p, uint32_t v)
{
	v = htobe32(v);
	memcpy(p, &v, sizeof v);
	return p + sizeof v;
}
static inline uint8_t *far_nbd_put64(uint8_t *p, uint64_t v)
{
	v = htobe64(v);
	memcpy(p, &v, sizeof v);
	return p + sizeof v;
}

struct far_nbd_request {
	uint16_t flags, type;
	uint64_t cookie, off, len;
	uint64_t payload; /* bytes that follow the header */
};

/* From FAR_NBD_REQUEST_BYTES or, in extended form, FAR_NBD_REQUEST_EXT_BYTES. -EPROTO: the magic is another. */
int far_nbd_decode_request(enum far_nbd_form form, const uint8_t *p, struct far_nbd_request *q);

/* Each writes at most FAR_NBD_HEAD_MAX bytes to p and returns how many. */
/* The request is done, or failed with one of the protocol's error numbers; no data, no text. Not for reads that succeeded. */
size_t far_nbd_put_done(enum far_nbd_form form, uint8_t *p, const struct far_nbd_request *q, uint32_t error);
/* The head of all the data of a read, that follows; its length is far_nbd_data_head(form). */
size_t far_nbd_put_data(enum far_nbd_form form, uint8_t *p, const struct far_nbd_request *q);
/* A read of which every byte is zero; not in simple form. */
size_t far_nbd_put_hole(enum far_nbd_form form, uint8_t *p, const struct far_nbd_request *q);
/* A chunk's header alone; not in simple form. */
size_t far_nbd_put_chunk(enum far_nbd_form form, uint8_t *p, const struct far_nbd_request *q, uint16_t flags, uint16_t type,
			 uint32_t len);
static inline size_t far_nbd_data_head(enum far_nbd_form form)
{
	return form == FAR_NBD_SIMPLE ? 16 : form == FAR_NBD_STRUCTURED ? 28 : 40;
}
size_t far_nbd_put_option_reply(uint8_t *p, uint32_t option, uint32_t type, uint32_t len); /* 20 bytes */

/* The protocol's number for an error (-errno). */
uint32_t far_nbd_errno(int err);

#endif
