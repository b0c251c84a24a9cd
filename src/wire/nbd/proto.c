/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "wire/nbd/proto.h"

int far_nbd_decode_request(enum far_nbd_form form, const uint8_t *p, struct far_nbd_request *q)
{
	bool ext = form == FAR_NBD_EXTENDED;

	if (far_nbd_get32(p) != (ext ? FAR_NBD_REQUEST_EXT_MAGIC : FAR_NBD_REQUEST_MAGIC))
		return -EPROTO;
	q->flags = far_nbd_get16(p + 4);
	q->type = far_nbd_get16(p + 6);
	q->cookie = far_nbd_get64(p + 8);
	q->off = far_nbd_get64(p + 16);
	q->len = ext ? far_nbd_get64(p + 24) : far_nbd_get32(p + 24);
	/* In compact form only a write has something behind it; in extended form the flag says so, and a write that lacks
	 * it is taken at its word: nothing else could come. */
	q->payload = q->type == FAR_NBD_WRITE || (ext && q->flags & FAR_NBD_PAYLOAD_LEN) ? q->len : 0;
	return 0;
}

size_t far_nbd_put_chunk(enum far_nbd_form form, uint8_t *p, const struct far_nbd_request *q, uint16_t flags, uint16_t type,
			 uint32_t len)
{
	uint8_t *at = far_nbd_put32(p, form == FAR_NBD_EXTENDED ? FAR_NBD_CHUNK_EXT_MAGIC : FAR_NBD_CHUNK_MAGIC);

	at = far_nbd_put16(at, flags);
	at = far_nbd_put16(at, type);
	at = far_nbd_put64(at, q->cookie);
	if (form == FAR_NBD_EXTENDED) {
		at = far_nbd_put64(at, q->off);
		at = far_nbd_put64(at, len);
	} else {
		at = far_nbd_put32(at, len);
	}
	return (size_t)(at - p);
}

static size_t proto_simple(uint8_t *p, uint32_t error, uint64_t cookie)
{
	far_nbd_put32(p, FAR_NBD_SIMPLE_MAGIC);
	far_nbd_put32(p + 4, error);
	far_nbd_put64(p + 8, cookie);
	return 16;
}

size_t far_nbd_put_done(enum far_nbd_form form, uint8_t *p, const struct far_nbd_request *q, uint32_t error)
{
	/* Simple replies may stand among structured ones, except to reads. */
	if (form == FAR_NBD_SIMPLE || (form == FAR_NBD_STRUCTURED && q->type != FAR_NBD_READ && !error))
		return proto_simple(p, error, q->cookie);
	if (!error)
		return far_nbd_put_chunk(form, p, q, FAR_NBD_CHUNK_DONE, FAR_NBD_CHUNK_NONE, 0);
	size_t n = far_nbd_put_chunk(form, p, q, FAR_NBD_CHUNK_DONE, FAR_NBD_CHUNK_ERROR, 6);
	far_nbd_put32(p + n, error);
	far_nbd_put16(p + n + 4, 0);
	return n + 6;
}

size_t far_nbd_put_data(enum far_nbd_form form, uint8_t *p, const struct far_nbd_request *q)
{
	if (form == FAR_NBD_SIMPLE)
		return proto_simple(p, 0, q->cookie);
	size_t n = far_nbd_put_chunk(form, p, q, FAR_NBD_CHUNK_DONE, FAR_NBD_CHUNK_OFFSET_DATA, (uint32_t)(8 + q->len));
	far_nbd_put64(p + n, q->off);
	return n + 8;
}

size_t far_nbd_put_hole(enum far_nbd_form form, uint8_t *p, const struct far_nbd_request *q)
{
	size_t n = far_nbd_put_chunk(form, p, q, FAR_NBD_CHUNK_DONE, FAR_NBD_CHUNK_OFFSET_HOLE, 12);

	far_nbd_put64(p + n, q->off);
	far_nbd_put32(p + n + 8, (uint32_t)q->len);
	return n + 12;
}

size_t far_nbd_put_option_reply(uint8_t *p, uint32_t option, uint32_t type, uint32_t len)
{
	far_nbd_put64(p, FAR_NBD_OPT_REPLY_MAGIC);
	far_nbd_put32(p + 8, option);
	far_nbd_put32(p + 12, type);
	far_nbd_put32(p + 16, len);
	return 20;
}

uint32_t far_nbd_errno(int err)
{
	switch (-err) {
	case 0:
		return 0;
	case EPERM:
	case EACCES:
	case EROFS:
	case ESTALE: /* another holds the lease, or has taken the region over */
	case EBUSY:
		return 1;
	case ENOMEM:
		return 12;
	case EINVAL:
		return 22;
	case ENOSPC:
	case EDQUOT:
	case EFBIG:
		return 28;
	case EOVERFLOW:
		return 75;
	case EOPNOTSUPP:
		return 95;
	case ESHUTDOWN:
		return 108;
	default:
		return 5;
	}
}
