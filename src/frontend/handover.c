/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Messages of the three hand-over formats, see doc/handover.md. The first byte tells which it is: 'F' of our magic, '['
 * of a JSON list, and 0, the highest byte of a big-endian address, from Go. Everything here comes from another process,
 * which may be hostile: a length is compared with what is there before it is used, numbers that do not make sense are
 * refused by name, and nothing is kept after an error.
 */
#define _GNU_SOURCE
#include "frontend/handover.h"

#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HANDOVER_VERSION 1
#define HANDOVER_HEAD 48   /* bytes of our header */
#define HANDOVER_RANGE 24  /* bytes a range in it */
#define HANDOVER_GO 8
#define HANDOVER_TOP ((uint64_t)1 << 56) /* no address of a program lies above */
#define HANDOVER_WRITABLE 1u

static const char handover_magic[8] = "FARUFFD\n";
static const char handover_answer_magic[8] = "FARUFFD!";

/* ------------------------------------------------------------------------------------------------ numbers */

static uint64_t handover_get(const unsigned char *p, unsigned bytes)
{
	uint64_t v = 0;

	for (unsigned k = bytes; k-- > 0;)
		v = v << 8 | p[k];
	return v;
}

static void handover_put(unsigned char *p, unsigned bytes, uint64_t v)
{
	for (unsigned k = 0; k < bytes; k++, v >>= 8)
		p[k] = (unsigned char)v;
}

static uint64_t handover_page(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

/* ------------------------------------------------------------------------------------------------ receiving */

size_t far_handover_want(const struct far_handover_in *in)
{
	if (in->complete)
		return 0;
	if (!in->n)
		return 1;
	if (in->whole)
		return in->whole - in->n;
	/* The length of ours stands in the first 16 bytes. Where JSON ends is known when it is there; then nothing follows. */
	return in->format == FAR_HANDOVER_FARPAGE ? 16 - in->n : FAR_HANDOVER_MAX_BYTES - in->n;
}

static int handover_begin(struct far_handover_in *in, unsigned char c, struct far_error *err)
{
	if (c == (unsigned char)handover_magic[0]) {
		in->format = FAR_HANDOVER_FARPAGE;
	} else if (c == '[') {
		in->format = FAR_HANDOVER_FIRECRACKER;
	} else if (c == 0) {
		in->format = FAR_HANDOVER_GO;
		in->whole = HANDOVER_GO;
	} else {
		return far_error_set(err, EPROTO, "no hand-over of memory begins with the byte 0x%02x: the peer must send one of the "
				     "formats of doc/handover.md", c);
	}
	return 0;
}

/* Follow the brackets of JSON up to the one that closes the list. Returns how many of these bytes belong to it. */
static size_t handover_scan(struct far_handover_in *in, const unsigned char *p, size_t n)
{
	for (size_t k = 0; k < n; k++) {
		unsigned char c = p[k];
		if (in->escaped) {
			in->escaped = false;
		} else if (in->quoted) {
			in->escaped = c == '\\';
			in->quoted = c != '"';
		} else if (c == '"') {
			in->quoted = true;
		} else if (c == '[' || c == '{') {
			in->depth++;
		} else if ((c == ']' || c == '}') && --in->depth == 0) {
			in->complete = true;
			return k + 1;
		}
	}
	return n;
}

static int handover_grow(struct far_handover_in *in, size_t n)
{
	size_t cap = (size_t)far_max(in->cap, 512);

	while (cap < in->n + n)
		cap *= 2;
	if (cap == in->cap)
		return 0;
	unsigned char *p = realloc(in->buf, cap);
	if (!p)
		return -ENOMEM;
	in->buf = p;
	in->cap = cap;
	return 0;
}

/* The first 16 bytes of our format are here. */
static int handover_head(struct far_handover_in *in, struct far_error *err)
{
	uint64_t len = handover_get(in->buf + 12, 4);

	if (memcmp(in->buf, handover_magic, sizeof handover_magic) != 0)
		return far_error_set(err, EPROTO, "the hand-over begins like farpage's and goes on otherwise: the peer must send one of "
				     "the formats of doc/handover.md");
	if (len < HANDOVER_HEAD || len > FAR_HANDOVER_MAX_BYTES)
		return far_error_set(err, EPROTO, "the hand-over's length, %" PRIu64 " bytes, is outside %d to %d", len, HANDOVER_HEAD,
				     FAR_HANDOVER_MAX_BYTES);
	in->whole = (size_t)len;
	return 0;
}

int far_handover_feed(struct far_handover_in *in, const void *buf, size_t n, struct far_error *err)
{
	const unsigned char *p = buf;
	size_t keep = n;
	int e = 0;

	if (!n)
		return 0;
	if (n > far_handover_want(in))
		return far_error_set(err, EPROTO, "the hand-over has more bytes than it says");
	if (!in->n)
		e = handover_begin(in, p[0], err);
	if (e)
		return e;
	if (in->format == FAR_HANDOVER_FIRECRACKER)
		keep = handover_scan(in, p, n);
	if (handover_grow(in, keep))
		return far_error_set(err, ENOMEM, "no memory for a hand-over");
	memcpy(in->buf + in->n, p, keep);
	in->n += keep;
	for (; keep < n; keep++)
		if (!memchr(" \t\r\n", p[keep], 5)) /* and the zero byte that may carry the descriptor */
			return far_error_set(err, EPROTO, "something follows the list of mappings: one list is sent, and nothing else");
	if (in->format == FAR_HANDOVER_FIRECRACKER && !in->complete && in->n == FAR_HANDOVER_MAX_BYTES)
		return far_error_set(err, EPROTO, "the list of mappings does not end within %d bytes", FAR_HANDOVER_MAX_BYTES);
	if (in->format == FAR_HANDOVER_FARPAGE && !in->whole && in->n == 16)
		e = handover_head(in, err);
	if (in->whole && in->n == in->whole)
		in->complete = true;
	return e;
}

void far_handover_in_fini(struct far_handover_in *in)
{
	free(in->buf);
	*in = (struct far_handover_in){ 0 };
}

/* ------------------------------------------------------------------------------------------------ ranges */

static int handover_by_off(const void *a, const void *b)
{
	const struct far_handover_range *x = a, *y = b;
	return x->off < y->off ? -1 : x->off > y->off;
}

static int handover_by_addr(const void *a, const void *b)
{
	const struct far_handover_range *x = a, *y = b;
	return x->addr < y->addr ? -1 : x->addr > y->addr;
}

static int handover_check_one(const struct far_handover_range *r, int code, struct far_error *err)
{
	uint64_t mask = handover_page() - 1;

	if (!r->addr || !r->len || (r->addr & mask) || (r->len & mask) || (r->off & mask))
		return far_error_set(err, code, "memory at %#" PRIx64 ", %" PRIu64 " bytes, offset %" PRIu64 " was handed over: it must be "
				     "whole pages of %" PRIu64 " bytes", r->addr, r->len, r->off, mask + 1);
	if (r->addr >= HANDOVER_TOP || r->len > HANDOVER_TOP - r->addr || r->off > FAR_SIZE_MAX - r->len)
		return far_error_set(err, code, "memory at %#" PRIx64 ", %" PRIu64 " bytes, offset %" PRIu64 " was handed over: no memory "
				     "and no region reaches that far", r->addr, r->len, r->off);
	return 0;
}

/* Each range is whole pages, and no two have an address or an offset in common. Sorted by offset afterwards. */
static int handover_check(struct far_handover_range *r, size_t n, struct far_error *err)
{
	int e = 0;

	for (size_t k = 0; k < n && !e; k++)
		e = handover_check_one(&r[k], EPROTO, err);
	if (e)
		return e;
	qsort(r, n, sizeof *r, handover_by_addr);
	for (size_t k = 1; k < n; k++)
		if (r[k].addr - r[k - 1].addr < r[k - 1].len)
			return far_error_set(err, EPROTO, "two ranges of memory were handed over that have the address %#" PRIx64 " in common",
					     r[k].addr);
	qsort(r, n, sizeof *r, handover_by_off);
	for (size_t k = 1; k < n; k++)
		if (r[k].off - r[k - 1].off < r[k - 1].len)
			return far_error_set(err, EPROTO, "two ranges of memory were handed over that have the offset %" PRIu64 " in common",
					     r[k].off);
	return 0;
}

/* ------------------------------------------------------------------------------------------------ decoding */

static int handover_decode_go(const struct far_handover_in *in, struct far_handover *h, struct far_error *err)
{
	uint64_t addr = 0;

	for (unsigned k = 0; k < HANDOVER_GO; k++)
		addr = addr << 8 | in->buf[k];
	if (!addr || addr % handover_page() || addr >= HANDOVER_TOP)
		return far_error_set(err, EPROTO, "the address %#" PRIx64 " was handed over: it is not the start of a page", addr);
	h->range = calloc(1, sizeof *h->range);
	if (!h->range)
		return far_error_set(err, ENOMEM, "no memory for a hand-over");
	h->range[0].addr = addr;
	h->n = 1;
	return 0;
}

static int handover_decode_ours(const struct far_handover_in *in, struct far_handover *h, unsigned *with, struct far_error *err)
{
	const unsigned char *p = in->buf;
	uint64_t oldest = handover_get(p + 10, 2), flags = handover_get(p + 24, 4), page = handover_get(p + 28, 4);
	uint64_t n = handover_get(p + 32, 4), first = handover_get(p + 40, 4), step = handover_get(p + 44, 4);

	*with = (unsigned)handover_get(p + 36, 4);
	if (oldest > HANDOVER_VERSION)
		return far_error_set(err, EPROTONOSUPPORT, "the hand-over is for version %" PRIu64 " and newer, and this farpage knows "
				     "version %d. Use a newer one", oldest, HANDOVER_VERSION);
	if (page != handover_page())
		return far_error_set(err, EPROTONOSUPPORT, "memory in pages of %" PRIu64 " bytes was handed over: only %" PRIu64
				     " are served", page, handover_page());
	if (!n || n > FAR_HANDOVER_MAX_RANGES || first < HANDOVER_HEAD || first > in->n || step < HANDOVER_RANGE ||
	    step > in->n || n * step > in->n - first)
		return far_error_set(err, EPROTO, "the hand-over says %" PRIu64 " ranges of %" PRIu64 " bytes from byte %" PRIu64
				     " on, and has %zu bytes; from 1 to %d ranges are possible", n, step, first, in->n,
				     FAR_HANDOVER_MAX_RANGES);
	if (!(*with & FAR_HANDOVER_UFFD) || (*with & ~(unsigned)FAR_HANDOVER_ALL))
		return far_error_set(err, EPROTO, "the hand-over's list of descriptors, %#x, is none of version %d", *with,
				     HANDOVER_VERSION);
	h->features = handover_get(p + 16, 8);
	h->writable = flags & HANDOVER_WRITABLE;
	h->range = calloc(n, sizeof *h->range);
	if (!h->range)
		return far_error_set(err, ENOMEM, "no memory for a hand-over");
	h->n = n;
	for (size_t k = 0; k < n; k++, first += step)
		h->range[k] = (struct far_handover_range){ handover_get(p + first, 8), handover_get(p + first + 8, 8),
							   handover_get(p + first + 16, 8) };
	return handover_check(h->range, h->n, err);
}

static bool handover_number(struct json_object *o, const char *key, uint64_t *out)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, key, &v) || !json_object_is_type(v, json_type_int))
		return false;
	int64_t x = json_object_get_int64(v);
	*out = (uint64_t)x;
	return x >= 0;
}

/* page_size is what its name says; page_size_kib, in spite of it, is bytes too. Older senders have neither. */
static int handover_mapping(struct json_object *o, struct far_handover_range *r, struct far_error *err)
{
	uint64_t page;

	if (!json_object_is_type(o, json_type_object) || !handover_number(o, "base_host_virt_addr", &r->addr) ||
	    !handover_number(o, "size", &r->len) || !handover_number(o, "offset", &r->off))
		return far_error_set(err, EPROTO, "the list of mappings has one without the numbers base_host_virt_addr, size and offset");
	if (!handover_number(o, "page_size", &page) && !handover_number(o, "page_size_kib", &page))
		return 0;
	if (page == handover_page() || page == handover_page() / 1024)
		return 0;
	return far_error_set(err, EPROTONOSUPPORT, "memory in pages of %" PRIu64 " bytes was handed over: only %" PRIu64
			     " are served. Restore the snapshot without huge pages", page, handover_page());
}

static int handover_decode_json(const struct far_handover_in *in, struct far_handover *h, struct far_error *err)
{
	struct json_tokener *t = json_tokener_new_ex(8);
	struct json_object *o = t ? json_tokener_parse_ex(t, (const char *)in->buf, (int)in->n) : NULL;
	size_t n = o && json_object_is_type(o, json_type_array) ? json_object_array_length(o) : 0;
	int e = 0;

	if (!t)
		e = far_error_set(err, ENOMEM, "no memory for a hand-over");
	else if (!o)
		e = far_error_set(err, EPROTO, "the list of mappings is no JSON: %s", json_tokener_error_desc(json_tokener_get_error(t)));
	else if (!n || n > FAR_HANDOVER_MAX_RANGES)
		e = far_error_set(err, EPROTO, "the list of mappings has %zu of them: from 1 to %d are possible", n,
				  FAR_HANDOVER_MAX_RANGES);
	if (!e && !(h->range = calloc(n, sizeof *h->range)))
		e = far_error_set(err, ENOMEM, "no memory for a hand-over");
	for (size_t k = 0; k < n && !e; k++, h->n = k)
		e = handover_mapping(json_object_array_get_idx(o, k), &h->range[k], err);
	json_object_put(o);
	if (t)
		json_tokener_free(t);
	return e ? e : handover_check(h->range, h->n, err);
}

int far_handover_decode(const struct far_handover_in *in, struct far_handover *h, unsigned *with, struct far_error *err)
{
	int e;

	FAR_ASSERT(in->complete);
	h->format = in->format;
	h->range = NULL;
	h->n = 0;
	*with = FAR_HANDOVER_UFFD;
	switch (in->format) {
	case FAR_HANDOVER_GO:
		e = handover_decode_go(in, h, err);
		break;
	case FAR_HANDOVER_FIRECRACKER:
		e = handover_decode_json(in, h, err);
		break;
	default:
		e = handover_decode_ours(in, h, with, err);
	}
	if (e) {
		free(h->range);
		h->range = NULL;
		h->n = 0;
	}
	return e;
}

/* ------------------------------------------------------------------------------------------------ encoding */

static int handover_encode_json(const struct far_handover *h, void **out, size_t *n, struct far_error *err)
{
	char *text = NULL;
	size_t len = 0;
	FILE *f = open_memstream(&text, &len);

	if (!f)
		return far_error_set(err, ENOMEM, "no memory for a hand-over");
	for (size_t k = 0; k < h->n; k++)
		fprintf(f, "%s{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64 ",\"offset\":%" PRIu64 ",\"page_size\":%" PRIu64
			",\"page_size_kib\":%" PRIu64 "}", k ? "," : "[", h->range[k].addr, h->range[k].len, h->range[k].off,
			handover_page(), handover_page());
	fputs("]", f);
	if (fclose(f)) {
		free(text);
		return far_error_set(err, ENOMEM, "no memory for a hand-over");
	}
	if (len > FAR_HANDOVER_MAX_BYTES) {
		free(text);
		return far_error_set(err, EINVAL, "cannot hand memory over: %zu mappings are too many for one message", h->n);
	}
	*out = text;
	*n = len;
	return 0;
}

static void handover_encode_ours(const struct far_handover *h, unsigned with, unsigned char *p, size_t len)
{
	memcpy(p, handover_magic, sizeof handover_magic);
	handover_put(p + 8, 2, HANDOVER_VERSION);
	handover_put(p + 10, 2, 1);
	handover_put(p + 12, 4, len);
	handover_put(p + 16, 8, h->features);
	handover_put(p + 24, 4, h->writable ? HANDOVER_WRITABLE : 0);
	handover_put(p + 28, 4, handover_page());
	handover_put(p + 32, 4, h->n);
	handover_put(p + 36, 4, with);
	handover_put(p + 40, 4, HANDOVER_HEAD);
	handover_put(p + 44, 4, HANDOVER_RANGE);
	p += HANDOVER_HEAD;
	for (size_t k = 0; k < h->n; k++, p += HANDOVER_RANGE) {
		handover_put(p, 8, h->range[k].addr);
		handover_put(p + 8, 8, h->range[k].len);
		handover_put(p + 16, 8, h->range[k].off);
	}
}

int far_handover_encode(const struct far_handover *h, unsigned with, void **out, size_t *n, struct far_error *err)
{
	size_t len = h->format == FAR_HANDOVER_GO ? HANDOVER_GO : HANDOVER_HEAD + h->n * HANDOVER_RANGE;
	int e = 0;

	if (!h->n || h->n > FAR_HANDOVER_MAX_RANGES)
		return far_error_set(err, EINVAL, "cannot hand over %zu ranges of memory: from 1 to %d are possible", h->n,
				     FAR_HANDOVER_MAX_RANGES);
	if (h->format == FAR_HANDOVER_GO && (h->n > 1 || h->range[0].off))
		return far_error_set(err, EINVAL, "cannot hand memory over in the Go format: it knows one range that begins at offset 0");
	for (size_t k = 0; k < h->n && !e && h->format != FAR_HANDOVER_GO; k++)
		e = handover_check_one(&h->range[k], EINVAL, err);
	if (e)
		return e;
	if (h->format == FAR_HANDOVER_FIRECRACKER)
		return handover_encode_json(h, out, n, err);
	unsigned char *p = calloc(1, len);
	if (!p)
		return far_error_set(err, ENOMEM, "no memory for a hand-over");
	if (h->format == FAR_HANDOVER_GO)
		for (unsigned k = 0; k < HANDOVER_GO; k++)
			p[k] = (unsigned char)(h->range[0].addr >> (8 * (HANDOVER_GO - 1 - k)));
	else
		handover_encode_ours(h, with, p, len);
	*out = p;
	*n = len;
	return 0;
}

/* ------------------------------------------------------------------------------------------------ answers */

size_t far_handover_answer(void *buf, int code, const char *text)
{
	size_t len = text ? strnlen(text, FAR_HANDOVER_MAX_TEXT) : 0;
	unsigned char *p = buf;

	memcpy(p, handover_answer_magic, sizeof handover_answer_magic);
	handover_put(p + 8, 2, HANDOVER_VERSION);
	handover_put(p + 10, 2, 0);
	handover_put(p + 12, 4, FAR_HANDOVER_ANSWER + len);
	handover_put(p + 16, 4, (uint64_t)(code < 0 ? -code : code));
	handover_put(p + 20, 4, 0);
	if (len)
		memcpy(p + FAR_HANDOVER_ANSWER, text, len);
	return FAR_HANDOVER_ANSWER + len;
}

size_t far_handover_answer_len(const void *buf)
{
	uint64_t len = handover_get((const unsigned char *)buf + 12, 4);
	bool ours = memcmp(buf, handover_answer_magic, sizeof handover_answer_magic) == 0;

	return ours && len >= FAR_HANDOVER_ANSWER && len <= FAR_HANDOVER_ANSWER + FAR_HANDOVER_MAX_TEXT ? (size_t)len : 0;
}

int far_handover_answer_read(const void *buf, size_t n, struct far_error *err)
{
	uint64_t code = handover_get((const unsigned char *)buf + 16, 4);
	char text[FAR_HANDOVER_MAX_TEXT + 1];
	size_t len = n - FAR_HANDOVER_ANSWER;

	FAR_ASSERT(n == far_handover_answer_len(buf));
	if (!code)
		return 0;
	memcpy(text, (const char *)buf + FAR_HANDOVER_ANSWER, len);
	text[len] = 0;
	for (char *p = text; *p; p++) /* it may be shown on a terminal */
		if ((unsigned char)*p < ' ' || *p == 127)
			*p = ' ';
	int e = code < 4096 ? (int)code : EPROTO;
	return far_error_set(err, e, "the pager refused the memory: %s", *text ? text : far_strerror(e));
}
