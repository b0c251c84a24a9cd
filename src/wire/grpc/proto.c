/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "wire/grpc/proto.h"

#include "base/hash.h"

#include <string.h>

#define PROTO_CHECK 99

static const char *const proto_names[] = {
	[FAR_M_READ_AT] = "ReadAt",   [FAR_M_WRITE_AT] = "WriteAt", [FAR_M_SYNC] = "Sync",
	[FAR_M_EXPORTS] = "Exports",  [FAR_M_DESCRIBE] = "Describe", [FAR_M_READ] = "Read",
	[FAR_M_PULL] = "Pull",        [FAR_M_WRITE] = "Write",      [FAR_M_ZERO] = "Zero",
	[FAR_M_DISCARD] = "Discard",  [FAR_M_EXTENTS] = "Extents",  [FAR_M_FLUSH] = "Flush",
	[FAR_M_LEASE] = "Lease",      [FAR_M_WATCH] = "Watch",
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

/* ------------------------------------------------------------------------------------------------- checksums */

static uint64_t proto_seed(const char *export, size_t n, uint64_t off)
{
	return off ^ far_hash64(export, n);
}

void far_grpc_sum_data(uint8_t out[FAR_GRPC_SUM], const char *export, size_t export_n, uint64_t off, const void *data,
		       size_t len)
{
	far_hash128(out, data, len, proto_seed(export, export_n, off));
}

void far_grpc_sum_cold(uint8_t out[FAR_GRPC_SUM], const char *export, size_t export_n, uint64_t off, const void *data,
		       size_t len)
{
	far_hash128_cold(out, data, len, proto_seed(export, export_n, off));
}

void far_grpc_sum_span(uint8_t out[FAR_GRPC_SUM], const char *export, size_t export_n, uint64_t off, uint64_t len)
{
	uint8_t bytes[8];

	for (unsigned i = 0; i < 8; i++)
		bytes[i] = (uint8_t)(len >> 8 * i);
	far_grpc_sum_data(out, export, export_n, off, bytes, sizeof bytes);
}

void far_grpc_put_check(struct far_pb_out *o)
{
	far_pb_put_fixed(o, PROTO_CHECK, o->n <= o->cap ? far_hash64(o->p, o->n) : 0);
}

int far_grpc_check(const uint8_t *p, size_t n, bool *had)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;
	const uint8_t *at = p;
	int r;

	*had = false;
	while ((r = far_pb_next(&in, &f)) > 0) {
		if (f.num == PROTO_CHECK && f.wire == FAR_PB_I64 && f.value) {
			if (in.p != in.end || f.value != far_hash64(p, (size_t)(at - p)))
				return -EBADMSG;
			*had = true;
		}
		at = in.p;
	}
	return r;
}

/* -------------------------------------------------------------------------------------------------- requests */

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

/* Which member a field of our own service is; both directions read this table. */
enum proto_kind { PROTO_U64, PROTO_OFF, PROTO_U32, PROTO_BOOL, PROTO_TEXT, PROTO_SUM, PROTO_DATA, PROTO_RANGES };

struct proto_field {
	uint32_t methods; /* bits */
	uint8_t num, kind;
	uint16_t at;      /* offset of the member; a TEXT's or DATA's length is at `len_at` */
	uint16_t len_at;
};

#define M(x) (1U << FAR_M_##x)
#define AT(member) offsetof(struct far_grpc_request, member)
#define PROTO_SPANS (M(ZERO) | M(DISCARD))
#define PROTO_CHECKED (M(DESCRIBE) | M(EXTENTS) | M(FLUSH) | M(LEASE) | M(WATCH))

/* In the order in which they are written: data last. */
static const struct proto_field proto_fields[] = {
	{ ~(uint32_t)M(EXPORTS), 1, PROTO_TEXT, AT(export), AT(export_n) },
	{ M(READ) | M(PULL), 2, PROTO_RANGES, 0, 0 },
	{ M(READ), 3, PROTO_BOOL, AT(bulk), 0 },
	{ M(READ) | M(PULL), 4, PROTO_BOOL, AT(zeros), 0 },
	{ M(READ), 5, PROTO_BOOL, AT(sums), 0 },
	{ M(PULL), 3, PROTO_U64, AT(piece), 0 },
	{ M(WRITE) | PROTO_SPANS | M(EXTENTS), 2, PROTO_OFF, AT(off), 0 },
	{ M(WRITE), 3, PROTO_BOOL, AT(flush), 0 },
	{ M(WRITE) | PROTO_SPANS, 4, PROTO_BOOL, AT(bulk), 0 },
	{ PROTO_SPANS | M(EXTENTS), 3, PROTO_U64, AT(len), 0 },
	{ M(EXTENTS) | M(WATCH), 4, PROTO_U32, AT(max), 0 },
	{ M(DESCRIBE) | M(FLUSH) | M(LEASE), 2, PROTO_U64, AT(session), 0 },
	{ M(DESCRIBE) | M(FLUSH) | M(LEASE), 3, PROTO_U64, AT(generation), 0 },
	{ PROTO_SPANS, 5, PROTO_U64, AT(session), 0 },
	{ PROTO_SPANS, 6, PROTO_U64, AT(generation), 0 },
	{ M(WRITE), 6, PROTO_U64, AT(session), 0 },
	{ M(WRITE), 7, PROTO_U64, AT(generation), 0 },
	{ M(LEASE), 4, PROTO_TEXT, AT(writer), AT(writer_n) },
	{ M(LEASE), 5, PROTO_TEXT, AT(holder), AT(holder_n) },
	{ M(LEASE), 6, PROTO_U64, AT(epoch), 0 },
	{ M(LEASE), 7, PROTO_U64, AT(revision), 0 },
	{ M(LEASE), 8, PROTO_BOOL, AT(take_over), 0 },
	{ M(LEASE), 9, PROTO_BOOL, AT(release), 0 },
	{ M(WATCH), 2, PROTO_U64, AT(instance), 0 },
	{ M(WATCH), 3, PROTO_U64, AT(since), 0 },
	{ M(WRITE) | PROTO_SPANS, 8, PROTO_SUM, AT(sum), 0 },
	{ M(WRITE), 5, PROTO_DATA, AT(data), AT(data_n) },
};
#undef AT

static int proto_region_bytes(const struct proto_field *pf, const struct far_pb_field *f, struct far_grpc_request *r)
{
	uint8_t *at = (uint8_t *)r + pf->at;

	switch (pf->kind) {
	case PROTO_TEXT:
	case PROTO_DATA:
		*(const uint8_t **)at = f->data;
		*(size_t *)((uint8_t *)r + pf->len_at) = f->len;
		return 0;
	case PROTO_SUM:
		*(const uint8_t **)at = f->data;
		return f->len == FAR_GRPC_SUM ? 0 : -EPROTO;
	default:
		if (r->ranges_n == FAR_GRPC_MAX_RANGES)
			return -E2BIG;
		return proto_range(f, &r->ranges[r->ranges_n++]);
	}
}

static int proto_region_field(enum far_grpc_method m, const struct far_pb_field *f, struct far_grpc_request *r)
{
	for (size_t i = 0; i < sizeof proto_fields / sizeof *proto_fields; i++) {
		const struct proto_field *pf = &proto_fields[i];
		uint8_t *at = (uint8_t *)r + pf->at;
		bool bytes = pf->kind >= PROTO_TEXT;
		if (pf->num != f->num || !(pf->methods & 1U << m) || f->wire != (bytes ? FAR_PB_BYTES : FAR_PB_VARINT))
			continue;
		if (bytes)
			return proto_region_bytes(pf, f, r);
		if (pf->kind == PROTO_BOOL)
			*(bool *)at = f->value != 0;
		else if (pf->kind == PROTO_U32)
			*(uint32_t *)at = (uint32_t)f->value;
		else
			*(uint64_t *)at = f->value;
		return 0;
	}
	return 0;
}

int far_grpc_decode_request(enum far_grpc_method m, const uint8_t *p, size_t n, struct far_grpc_request *out)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;
	int r = 0;

	memset(out, 0, offsetof(struct far_grpc_request, ranges));
	if (far_grpc_is_region(m) && (PROTO_CHECKED & 1U << m))
		r = far_grpc_check(p, n, &out->checked);
	/* A flipped bit can make a field swallow those behind it: who may write must not hang on that. */
	if (r == 0 && (m == FAR_M_LEASE || m == FAR_M_WATCH) && !out->checked)
		r = -EBADMSG;
	if (r)
		return r;
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

static void proto_put(struct far_pb_out *o, const struct proto_field *pf, const struct far_grpc_request *r)
{
	const uint8_t *at = (const uint8_t *)r + pf->at;

	switch ((enum proto_kind)pf->kind) {
	case PROTO_BOOL:
		far_pb_put_uint(o, pf->num, *(const bool *)at);
		break;
	case PROTO_U32:
		far_pb_put_uint(o, pf->num, *(const uint32_t *)at);
		break;
	case PROTO_U64:
	case PROTO_OFF:
		far_pb_put_uint(o, pf->num, *(const uint64_t *)at);
		break;
	case PROTO_TEXT:
		far_pb_put_bytes(o, pf->num, *(const void *const *)at, *(const size_t *)((const uint8_t *)r + pf->len_at));
		break;
	case PROTO_SUM:
		far_pb_put_bytes(o, pf->num, r->sum, r->sum ? FAR_GRPC_SUM : 0);
		break;
	case PROTO_DATA:
		far_pb_put_head(o, pf->num, r->data_n);
		break;
	case PROTO_RANGES:
		for (unsigned i = 0; i < r->ranges_n; i++)
			far_grpc_encode_range(o, pf->num, r->ranges[i].off, r->ranges[i].len);
		break;
	}
}

void far_grpc_encode_request(struct far_pb_out *o, enum far_grpc_method m, const struct far_grpc_request *r)
{
	for (size_t i = 0; i < sizeof proto_fields / sizeof *proto_fields; i++)
		if (proto_fields[i].methods & 1U << m)
			proto_put(o, &proto_fields[i], r);
	if (PROTO_CHECKED & 1U << m)
		far_grpc_put_check(o);
}

/* --------------------------------------------------------------------------------------------------- replies */

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
	far_pb_put_uint(o, 9, e->instance);
	far_pb_put_uint(o, 10, e->epoch);
	far_pb_put_uint(o, 11, e->revision);
	far_pb_put_uint(o, 12, e->change);
	far_pb_put_bytes(o, 13, e->writer, strlen(e->writer));
	far_pb_put_uint(o, 14, e->sums);
	far_pb_put_uint(o, 15, e->sessions);
}

static int proto_text(const struct far_pb_field *f, char *out, size_t cap)
{
	if (f->len >= cap || memchr(f->data, 0, f->len))
		return -EPROTO;
	memcpy(out, f->data, f->len);
	out[f->len] = 0;
	return 0;
}

static int proto_export_text(const struct far_pb_field *f, struct far_grpc_export *e)
{
	switch (f->num) {
	case 1:
		return proto_text(f, e->name, sizeof e->name);
	case 7:
		return proto_text(f, e->identity, sizeof e->identity);
	case 8:
		return proto_text(f, e->version, sizeof e->version);
	case 13:
		return proto_text(f, e->writer, sizeof e->writer);
	default:
		return 0;
	}
}

static void proto_export_number(uint32_t num, uint64_t value, struct far_grpc_export *e)
{
	uint64_t *const numbers[] = { [2] = &e->size, [3] = &e->chunk, [4] = &e->max_request, [9] = &e->instance,
				      [10] = &e->epoch, [11] = &e->revision, [12] = &e->change, [15] = NULL };
	bool *const flags[] = { [5] = &e->read_only, [6] = &e->durable, [14] = &e->sums, [15] = &e->sessions };

	if (num > 15)
		return;
	if (numbers[num])
		*numbers[num] = value;
	else if (flags[num])
		*flags[num] = value != 0;
}

int far_grpc_decode_export(const uint8_t *p, size_t n, struct far_grpc_export *e)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;

	memset(e, 0, sizeof *e);
	int r = far_grpc_check(p, n, &e->checked);
	if (r)
		return r;
	while ((r = far_pb_next(&in, &f)) > 0) {
		if (f.wire == FAR_PB_BYTES && proto_export_text(&f, e))
			return -EPROTO;
		if (f.wire == FAR_PB_VARINT)
			proto_export_number(f.num, f.value, e);
	}
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
	bool checked;

	*count = 0;
	int r = far_grpc_check(p, n, &checked);
	if (r)
		return r;
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

void far_grpc_encode_sum_reply(struct far_pb_out *o, const uint8_t *sum)
{
	far_pb_put_bytes(o, 1, sum, sum ? FAR_GRPC_SUM : 0);
}

int far_grpc_decode_sum_reply(const uint8_t *p, size_t n, const uint8_t **sum)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;
	int r;

	*sum = NULL;
	while ((r = far_pb_next(&in, &f)) > 0) {
		if (f.num != 1 || f.wire != FAR_PB_BYTES)
			continue;
		if (f.len != FAR_GRPC_SUM)
			return -EPROTO;
		*sum = f.data;
	}
	return r;
}

void far_grpc_encode_written(struct far_pb_out *o, const struct far_grpc_written *w)
{
	far_grpc_encode_sum_reply(o, w->sum);
	far_pb_put_uint(o, 2, w->flushed);
	far_pb_put_uint(o, 3, w->instance);
	far_pb_put_uint(o, 4, w->revision);
	far_grpc_put_check(o);
}

int far_grpc_decode_written(const uint8_t *p, size_t n, struct far_grpc_written *w)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;

	*w = (struct far_grpc_written){ 0 };
	int r = far_grpc_check(p, n, &w->checked);
	if (r == 0)
		r = far_grpc_decode_sum_reply(p, n, &w->sum);
	if (r)
		return r;
	while ((r = far_pb_next(&in, &f)) > 0) {
		if (f.wire == FAR_PB_VARINT && f.num == 2)
			w->flushed = f.value != 0;
		else if (f.wire == FAR_PB_VARINT && f.num == 3)
			w->instance = f.value;
		else if (f.wire == FAR_PB_VARINT && f.num == 4)
			w->revision = f.value;
	}
	return r;
}

void far_grpc_encode_flushed(struct far_pb_out *o, const struct far_grpc_flushed *f)
{
	far_pb_put_uint(o, 1, f->instance);
	far_pb_put_uint(o, 2, f->revision);
	far_grpc_put_check(o);
}

int far_grpc_decode_flushed(const uint8_t *p, size_t n, struct far_grpc_flushed *out)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;

	*out = (struct far_grpc_flushed){ 0 };
	int r = far_grpc_check(p, n, &out->checked);
	if (r)
		return r;
	while ((r = far_pb_next(&in, &f)) > 0) {
		if (f.wire == FAR_PB_VARINT && f.num == 1)
			out->instance = f.value;
		else if (f.wire == FAR_PB_VARINT && f.num == 2)
			out->revision = f.value;
	}
	return r;
}

static void proto_put_export(struct far_pb_out *o, uint32_t num, const struct far_grpc_export *e)
{
	uint8_t buf[512]; /* a name of 127, three texts of 63, 63 and 39, numbers */
	struct far_pb_out in = { buf, 0, sizeof buf };

	far_grpc_encode_export(&in, e);
	FAR_ASSERT(in.n <= in.cap);
	far_pb_put_bytes(o, num, buf, in.n);
}

void far_grpc_encode_lease(struct far_pb_out *o, const struct far_grpc_lease *l)
{
	far_pb_put_uint(o, 1, l->answer);
	far_pb_put_uint(o, 2, l->ttl_ms);
	far_pb_put_uint(o, 3, l->left_ms);
	far_pb_put_uint(o, 4, l->gone);
	far_pb_put_bytes(o, 5, l->other, strlen(l->other));
	proto_put_export(o, 6, &l->export);
	far_grpc_put_check(o);
}

int far_grpc_decode_lease(const uint8_t *p, size_t n, struct far_grpc_lease *l)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;

	memset(l, 0, sizeof *l);
	int r = far_grpc_check(p, n, &l->checked);
	if (r)
		return r;
	while ((r = far_pb_next(&in, &f)) > 0) {
		if (f.wire == FAR_PB_VARINT && f.num == 1) {
			if (f.value > FAR_GRPC_READ_ONLY)
				return -EPROTO;
			l->answer = (enum far_grpc_answer)f.value;
		} else if (f.wire == FAR_PB_VARINT && f.num == 2) {
			l->ttl_ms = (uint32_t)far_min(f.value, UINT32_MAX);
		} else if (f.wire == FAR_PB_VARINT && f.num == 3) {
			l->left_ms = (uint32_t)far_min(f.value, UINT32_MAX);
		} else if (f.wire == FAR_PB_VARINT && f.num == 4) {
			l->gone = f.value != 0;
		} else if (f.wire == FAR_PB_BYTES && f.num == 5) {
			if (proto_text(&f, l->other, sizeof l->other))
				return -EPROTO;
		} else if (f.wire == FAR_PB_BYTES && f.num == 6) {
			if (far_grpc_decode_export(f.data, f.len, &l->export))
				return -EPROTO;
		}
	}
	return r;
}

void far_grpc_encode_watch(struct far_pb_out *o, const struct far_grpc_watch *w, const struct far_extent *list, size_t n)
{
	far_pb_put_uint(o, 1, w->all);
	for (size_t i = 0; i < n; i++)
		far_grpc_encode_range(o, 2, list[i].off, list[i].len);
	proto_put_export(o, 3, &w->export);
	far_grpc_put_check(o);
}

int far_grpc_decode_watch(const uint8_t *p, size_t n, struct far_grpc_watch *w, struct far_extent *out, size_t max,
			  size_t *count)
{
	struct far_pb_in in = { p, p + n };
	struct far_pb_field f;
	struct far_grpc_range x;

	memset(w, 0, sizeof *w);
	*count = 0;
	int r = far_grpc_check(p, n, &w->checked);
	if (r)
		return r;
	while ((r = far_pb_next(&in, &f)) > 0) {
		if (f.wire == FAR_PB_VARINT && f.num == 1) {
			w->all = w->all || f.value;
		} else if (f.wire == FAR_PB_BYTES && f.num == 2) {
			if (proto_range(&f, &x))
				return -EPROTO;
			if (*count == max)
				w->all = true;
			else
				out[(*count)++] = (struct far_extent){ .off = x.off, .len = x.len };
		} else if (f.wire == FAR_PB_BYTES && f.num == 3 && far_grpc_decode_export(f.data, f.len, &w->export)) {
			return -EPROTO;
		}
	}
	for (size_t i = 0; !r && i < *count; i++)
		if (out[i].off > w->export.size || out[i].len > w->export.size - out[i].off)
			return -EPROTO;
	return r;
}
