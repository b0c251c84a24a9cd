/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "wire/grpc/frame.h"

#include <string.h>

int far_grpc_deframe(struct far_grpc_deframer *d, const uint8_t *data, size_t len, size_t *used)
{
	size_t n = (size_t)far_min(len, FAR_GRPC_PREFIX - d->have);

	memcpy(d->prefix + d->have, data, n);
	d->have = (uint8_t)(d->have + n);
	*used = n;
	if (d->have < FAR_GRPC_PREFIX)
		return 0;
	if (d->prefix[0] > 1)
		return -EPROTO;
	if (d->prefix[0] == 1)
		return -EOPNOTSUPP;
	d->len = (uint32_t)d->prefix[1] << 24 | (uint32_t)d->prefix[2] << 16 | (uint32_t)d->prefix[3] << 8 | d->prefix[4];
	d->left = d->len;
	d->in_body = true;
	return 0;
}

bool far_grpc_deframe_body(struct far_grpc_deframer *d, size_t n)
{
	FAR_ASSERT(d->in_body && n <= d->left);
	d->left -= (uint32_t)n;
	if (d->left)
		return false;
	d->in_body = false;
	d->have = 0;
	return true;
}

bool far_grpc_deframe_done(const struct far_grpc_deframer *d)
{
	return !d->in_body && d->have == 0;
}

void far_grpc_prefix(uint8_t out[FAR_GRPC_PREFIX], uint32_t len)
{
	out[0] = 0;
	out[1] = (uint8_t)(len >> 24);
	out[2] = (uint8_t)(len >> 16);
	out[3] = (uint8_t)(len >> 8);
	out[4] = (uint8_t)len;
}

size_t far_grpc_percent_encode(char *out, size_t cap, const char *text)
{
	static const char hex[] = "0123456789ABCDEF";
	size_t n = 0;

	for (const uint8_t *p = (const uint8_t *)text; *p; p++) {
		bool plain = *p >= 0x20 && *p < 0x7f && *p != '%';
		if (n + (plain ? 1 : 3) >= cap)
			break;
		if (plain) {
			out[n++] = (char)*p;
			continue;
		}
		out[n++] = '%';
		out[n++] = hex[*p >> 4];
		out[n++] = hex[*p & 15];
	}
	if (cap)
		out[n] = 0;
	return n;
}

static int frame_hex(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

size_t far_grpc_percent_decode(char *out, size_t cap, const char *in, size_t len)
{
	size_t n = 0;

	for (size_t i = 0; i < len && n + 1 < cap; i++) {
		char c = in[i];
		if (c == '%' && len - i > 2 && frame_hex(in[i + 1]) >= 0 && frame_hex(in[i + 2]) >= 0) {
			c = (char)(frame_hex(in[i + 1]) << 4 | frame_hex(in[i + 2]));
			i += 2;
		}
		out[n++] = c ? c : '?';
	}
	if (cap)
		out[n] = 0;
	return n;
}

int far_grpc_timeout(const char *text, size_t len, uint64_t *ns)
{
	static const struct {
		char unit;
		uint64_t ns;
	} units[] = { { 'H', 3600000000000 }, { 'M', 60000000000 }, { 'S', 1000000000 },
		      { 'm', 1000000 }, { 'u', 1000 }, { 'n', 1 } };
	uint64_t v = 0;

	if (len < 2 || len > 9) /* at most 8 digits and a unit */
		return -EINVAL;
	for (size_t i = 0; i + 1 < len; i++) {
		if (text[i] < '0' || text[i] > '9')
			return -EINVAL;
		v = v * 10 + (uint64_t)(text[i] - '0');
	}
	for (size_t i = 0; i < FAR_ARRAY_LEN(units); i++) {
		if (units[i].unit == text[len - 1]) {
			*ns = v * units[i].ns;
			return 0;
		}
	}
	return -EINVAL;
}

/* Both directions stand in one table. The first line with an errno is what is sent for it, the first line with a status
 * what it is taken for. A server that is stopping (ESHUTDOWN there) is a lost connection here: another try may find it
 * up again. */
static const struct {
	int err;
	enum far_grpc_status status;
	const char *name;
} frame_codes[] = {
	{ EIO, FAR_GRPC_UNKNOWN, "EIO" },
	{ EREMOTEIO, FAR_GRPC_UNKNOWN, "EREMOTEIO" },
	{ EINVAL, FAR_GRPC_INVALID_ARGUMENT, "EINVAL" },
	{ EINVAL, FAR_GRPC_OUT_OF_RANGE, NULL },
	{ ETIMEDOUT, FAR_GRPC_DEADLINE_EXCEEDED, "ETIMEDOUT" },
	{ ENOENT, FAR_GRPC_NOT_FOUND, "ENOENT" },
	{ EROFS, FAR_GRPC_PERMISSION_DENIED, "EROFS" },
	{ EPERM, FAR_GRPC_PERMISSION_DENIED, "EPERM" },
	{ EACCES, FAR_GRPC_PERMISSION_DENIED, "EACCES" },
	{ ENOSPC, FAR_GRPC_RESOURCE_EXHAUSTED, "ENOSPC" },
	{ EDQUOT, FAR_GRPC_RESOURCE_EXHAUSTED, "EDQUOT" },
	{ ENOMEM, FAR_GRPC_RESOURCE_EXHAUSTED, "ENOMEM" },
	{ EROFS, FAR_GRPC_FAILED_PRECONDITION, NULL },
	{ ESTALE, FAR_GRPC_FAILED_PRECONDITION, "ESTALE" },
	{ ENOTCONN, FAR_GRPC_FAILED_PRECONDITION, "ENOTCONN" },
	{ EBUSY, FAR_GRPC_FAILED_PRECONDITION, "EBUSY" },
	{ ECANCELED, FAR_GRPC_ABORTED, "ECANCELED" },
	{ ESTALE, FAR_GRPC_ABORTED, NULL },
	{ EOPNOTSUPP, FAR_GRPC_UNIMPLEMENTED, "EOPNOTSUPP" },
	{ EPROTO, FAR_GRPC_INTERNAL, "EPROTO" },
	{ ECONNRESET, FAR_GRPC_UNAVAILABLE, "ECONNRESET" },
	{ ECONNREFUSED, FAR_GRPC_UNAVAILABLE, "ECONNREFUSED" },
	{ EPIPE, FAR_GRPC_UNAVAILABLE, "EPIPE" },
	{ ESHUTDOWN, FAR_GRPC_UNAVAILABLE, NULL },
	{ ECONNRESET, FAR_GRPC_CANCELLED, NULL },
	{ EBADMSG, FAR_GRPC_DATA_LOSS, "EBADMSG" },
	{ EIO, FAR_GRPC_DATA_LOSS, NULL },
	{ EACCES, FAR_GRPC_UNAUTHENTICATED, NULL },
};

enum far_grpc_status far_grpc_status_of(int err)
{
	if (!err)
		return FAR_GRPC_OK;
	for (size_t i = 0; i < FAR_ARRAY_LEN(frame_codes); i++)
		if (frame_codes[i].err == -err)
			return frame_codes[i].status;
	return FAR_GRPC_UNKNOWN;
}

int far_grpc_errno_of(unsigned status, const char *name)
{
	if (status == FAR_GRPC_OK)
		return 0;
	for (size_t i = 0; name && i < FAR_ARRAY_LEN(frame_codes); i++)
		if (frame_codes[i].name && !strcmp(frame_codes[i].name, name))
			return -frame_codes[i].err;
	for (size_t i = 0; i < FAR_ARRAY_LEN(frame_codes); i++)
		if ((unsigned)frame_codes[i].status == status)
			return -frame_codes[i].err;
	return -EIO;
}

const char *far_grpc_errno_name(int err)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(frame_codes); i++)
		if (frame_codes[i].name && frame_codes[i].err == -err)
			return frame_codes[i].name;
	return NULL;
}
