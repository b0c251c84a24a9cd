/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "wire/grpc/proto.h"

#include <string.h>

static const char *const proto_names[] = {
	[FAR_M_READ_AT] = "ReadAt",   [FAR_M_WRITE_AT] = "WriteAt", [FAR_M_SYNC] = "Sync",
	[FAR_M_EXPORTS] = "Exports",  [FAR_M_DESCRIBE] = "Describe", [FAR_M_READ] = "Read",
	[FAR_M_PULL] = "Pull",        [FAR_M_WRITE] = "Write",      [FAR_M_ZERO] = "Zero",
	[FAR_M_DISCARD] = "Discard",  [FAR_M_EXTENTS] = "Extents",  [FAR_M_FLUSH] = "Flush",
};

enum far_grpc_method far_grpc_method_of(const char *path, size_t len)
{
	for (int m = 0; m < FAR_M_NONE; m++) {
		const char *service = far_grpc_is_region((enum far_grpc_method)m) ? FAR_GRPC_REGION : FAR_GRPC_BACKEND;
		size_t a = strlen(service), b = strlen(proto_names[m]);
		if (len == a + b && !memcmp(path, service, a) && !memcmp(path + a, proto_names[m], b))
			return (enum far_grpc_method)m;
	}
	return FAR_M_NONE;
}

static int proto_range(const struct far_pb_field *f, struct far_grpc_range *r)
{
	struct far_pb_in in = { f->data, f->data + f->len };
	struct far_pb_field g;
	int k;

	*r = (struct far_grpc_range){ 0, 0 };
	while ((k = far_pb_next(&in, &g)) > 0) {
		if (g.wire == FAR_PB_VARINT && g.num == 1)
			r->off = g.value;
		else if (g.wire == FAR_PB_VARINT && g.num == 2)
			r->len = g.value;
	}
	return k;
}

/* Fields of the Backend service. */
static void proto_backend_field(enum far_grpc_method m, const struct far_pb_field *f, struct far_grpc_request *r)
{
	if (m == FAR_M_READ_AT && f->wire == FAR_PB_VARINT && f->num == 1)
		r->length = (int32_t)f->value;
	else if (m == FAR_M_READ_AT && f->wire == FAR_PB_VARINT && f->num == 2)
		r->off = (int64_t)f->value;
	else if (m == FAR_M_WRITE_AT && f->wire == FAR_PB_VARINT && f->num == 1)
		r->off = (int64_t)f->value;
	else if (m == FAR_M_WRITE_AT && f->wire == FAR_PB_BYTES && f->num == 2)
		r->data = f->data, r->data_n = f->len;
}

/* Numbers of our own service: which field means what differs by method. */
static void proto_region_number(enum far_grpc_method m, const struct far_pb_field *f, struct far_grpc_request *r)
{
	bool on = f->value != 0;

	switch (m) {
	case FAR_M_READ:
		if (f->num == 3)
			r->bulk = on;
		else if (f->num == 4)
			r->zeros = on;
		break;
	case FAR_M_PULL:
		if (f->num == 3)
			r->piece = f->value;
		else if (f->num == 4)
			r->zeros = on;
		break;
	case FAR_M_WRITE:
		if (f->num == 2)
			r->off = (int64_t)f->value;
		else if (f->num == 3)
			r->flush = on;
		else if (f->num == 4)
			r->bulk = on;
		break;
	default: /* Zero, Discard, Extents */
		if (f->num == 2)
			r->off = (int64_t)f->value;
		else if (f->num == 3)
			r->len = f->value;
		else if (f->num == 4 && m == FAR_M_EXTENTS)
			r->max = (uint32_t)f->value;
		else if (f->num == 4)
			r->bulk = on;
		break;
	}
}

static int proto_region_field(enum far_grpc_method m, const struct far_pb_field *f, struct far_grpc_request *r)
{
	if (f->wire == FAR_PB_VARINT) {
		proto_region_number(m, f, r);
		return 0;
	}
	if (f->wire != FAR_PB_BYTES)
		return 0;
	if (f->num == 1 && m != FAR_M_EXPORTS) {
		r->export = (const char *)f->data;
		r->export_n = f->len;
	} else if (f->num == 2 && (m == FAR_M_READ || m == FAR_M_PULL)) {
		if (r->ranges_n == FAR_GRPC_MAX_RANGES)
			return -E2BIG;
		return proto_range(f, &r->ranges[r->ranges_n++]);
	} else if (f->num == 5 && m == FAR_M_WRITE) {
		r->data = f->data;
		r->data_n = f->len;
	}
	return 0;
}

int far_grpc_decode_request(enum far_grpc_method m, const uint8_t *p, size_t n, struct far_grpc_request *out)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;
	int r;

	memset(out, 0, offsetof(struct far_grpc_request, ranges));
	while ((r = far_pb_next(&in, &f)) > 0) {
		int k = 0;
		if (far_grpc_is_region(m))
			k = proto_region_field(m, &f, out);
		else
			proto_backend_field(m, &f, out);
		if (k)
			return k;
	}
	return r;
}

void far_grpc_encode_export(struct far_pb_out *o, const struct far_grpc_export *e)
{
	far_pb_put_bytes(o, 1, e->name, strlen(e->name));
	far_pb_put_uint(o, 2, e->size);
	far_pb_put_uint(o, 3, e->chunk);
	far_pb_put_uint(o, 4, e->max_request);
	far_pb_put_uint(o, 5, e->read_only);
	far_pb_put_uint(o, 6, e->durable);
	far_pb_put_bytes(o, 7, e->identity, strlen(e->identity));
	far_pb_put_bytes(o, 8, e->version, strlen(e->version));
}

static int proto_text(const struct far_pb_field *f, char *out, size_t cap)
{
	if (f->len >= cap || memchr(f->data, 0, f->len))
		return -EPROTO;
	memcpy(out, f->data, f->len);
	out[f->len] = 0;
	return 0;
}

static int proto_export_field(const struct far_pb_field *f, struct far_grpc_export *e)
{
	if (f->wire == FAR_PB_BYTES && f->num == 1)
		return proto_text(f, e->name, sizeof e->name);
	if (f->wire == FAR_PB_BYTES && f->num == 7)
		return proto_text(f, e->identity, sizeof e->identity);
	if (f->wire == FAR_PB_BYTES && f->num == 8)
		return proto_text(f, e->version, sizeof e->version);
	if (f->wire != FAR_PB_VARINT)
		return 0;
	if (f->num == 2)
		e->size = f->value;
	else if (f->num == 3)
		e->chunk = f->value;
	else if (f->num == 4)
		e->max_request = f->value;
	else if (f->num == 5)
		e->read_only = f->value != 0;
	else if (f->num == 6)
		e->durable = f->value != 0;
	return 0;
}

int far_grpc_decode_export(const uint8_t *p, size_t n, struct far_grpc_export *e)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;
	int r;

	memset(e, 0, sizeof *e);
	while ((r = far_pb_next(&in, &f)) > 0)
		if (proto_export_field(&f, e))
			return -EPROTO;
	return r;
}

void far_grpc_encode_range(struct far_pb_out *o, uint32_t num, uint64_t off, uint64_t len)
{
	uint8_t buf[32];
	struct far_pb_out in = { buf, 0, sizeof buf };

	far_pb_put_uint(&in, 1, off);
	far_pb_put_uint(&in, 2, len);
	far_pb_put_head(o, num, in.n);
	if (o->n <= o->cap && in.n <= o->cap - o->n)
		memcpy(o->p + o->n, buf, in.n);
	o->n += in.n;
}

void far_grpc_encode_extent(struct far_pb_out *o, const struct far_extent *x)
{
	uint8_t buf[40];
	struct far_pb_out in = { buf, 0, sizeof buf };

	far_pb_put_uint(&in, 1, x->off);
	far_pb_put_uint(&in, 2, x->len);
	far_pb_put_uint(&in, 3, x->kind == FAR_EXTENT_ZERO);
	far_pb_put_head(o, 1, in.n);
	if (o->n <= o->cap && in.n <= o->cap - o->n)
		memcpy(o->p + o->n, buf, in.n);
	o->n += in.n;
}

static int proto_extent(const struct far_pb_field *f, struct far_extent *x)
{
	struct far_pb_in in = { f->data, f->data + f->len };
	struct far_pb_field g;
	int r;

	*x = (struct far_extent){ .kind = FAR_EXTENT_DATA };
	while ((r = far_pb_next(&in, &g)) > 0) {
		if (g.wire != FAR_PB_VARINT)
			continue;
		if (g.num == 1)
			x->off = g.value;
		else if (g.num == 2)
			x->len = g.value;
		else if (g.num == 3 && g.value == 1)
			x->kind = FAR_EXTENT_ZERO;
	}
	return r;
}

int far_grpc_decode_extents(const uint8_t *p, size_t n, uint64_t off, uint64_t len, struct far_extent *out, size_t max,
			    size_t *count)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;
	int r;

	*count = 0;
	while ((r = far_pb_next(&in, &f)) > 0) {
		struct far_extent x;
		if (f.num != 1 || f.wire != FAR_PB_BYTES)
			continue;
		if (proto_extent(&f, &x) || x.off != off || !x.len || x.len > len)
			return -EPROTO;
		off += x.len;
		len -= x.len;
		if (*count < max)
			out[(*count)++] = x;
	}
	return r ? r : *count ? 0 : -EPROTO;
}
