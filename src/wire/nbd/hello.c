/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Fixed newstyle negotiation, seen from the server:
 *
 *     greeting sent -> client's flags -> option* -> transmission (GO, EXPORT_NAME)
 *                                               -> end          (ABORT, nonsense)
 *                                               -> encryption   (STARTTLS), and again from "option*"
 *
 * An option is taken when all of it has come; one that is too long is refused and skipped. Every option but EXPORT_NAME
 * is answered and the client may go on. go-nbd's client sends GO and LIST in ways of its own, which are understood too:
 * no client flags, and a GO whose length says 0.
 */
#include "wire/nbd/hello.h"

#include "backend/backend.h"

#include <stdlib.h>

#define HELLO_OPTIONS_MAX 2048 /* a client that goes on haggling is not one */
#define HELLO_OPTION_HEAD 16
#define HELLO_PREFERRED 4096
#define HELLO_OUT 65536 /* past this the client must take answers before it is heard again */

static const char *const hello_contexts[FAR_NBD_CONTEXTS] = {
	[FAR_NBD_CONTEXT_ALLOCATION] = "base:allocation",
	[FAR_NBD_CONTEXT_LOCAL] = "farpage:local",
	[FAR_NBD_CONTEXT_DIRTY] = "farpage:dirty",
};

/* ---------------------------------------------------------------------------------------------------- output */

/* Room for n more bytes at the end of `out`, counted in already. */
static uint8_t *hello_room(struct far_nbd_hello *h, size_t n)
{
	if (n > h->out_cap - h->out_n) {
		size_t cap = h->out_cap * 2 + n + 256;
		uint8_t *p = realloc(h->out, cap);
		if (!p)
			return NULL;
		h->out = p;
		h->out_cap = cap;
	}
	h->out_n += n;
	return h->out + h->out_n - n;
}

static int hello_reply(struct far_nbd_hello *h, uint32_t option, uint32_t type, const void *data, size_t n)
{
	uint8_t *p = hello_room(h, 20 + n);

	if (!p)
		return -ENOMEM;
	far_nbd_put_option_reply(p, option, type, (uint32_t)n);
	if (n)
		memcpy(p + 20, data, n);
	return 0;
}

/* The text is for people. */
static int hello_refuse(struct far_nbd_hello *h, uint32_t option, uint32_t type, const char *why)
{
	return hello_reply(h, option, type, why, strlen(why));
}

/* ------------------------------------------------------------------------------------------------ the export */

uint32_t far_nbd_min_block(const struct far_export *e)
{
	uint64_t chunk = far_facts(e->b)->chunk;

	if (chunk <= 1)
		return 1;
	return chunk <= 65536 && !(chunk & (chunk - 1)) ? (uint32_t)chunk : 0;
}

uint32_t far_nbd_max_block(const struct far_server_env *env, const struct far_export *e)
{
	uint64_t max = far_min(env->max_request, UINT64_C(1) << 30), min = far_max(far_nbd_min_block(e), 1);

	return (uint32_t)far_max(max - max % min, min);
}

bool far_nbd_writable(const struct far_nbd_hello *h, const struct far_export *e)
{
	return (far_facts(e->b)->caps & FAR_CAP_WRITE) && far_server_right(h->env, h->who, e) == FAR_RIGHT_WRITE;
}

uint16_t far_nbd_export_flags(const struct far_nbd_hello *h, const struct far_export *e)
{
	/* One backend stands behind all connections, with no cache for each: a flush on one covers what was answered on
	 * the others. */
	unsigned f = FAR_NBD_HAS_FLAGS | FAR_NBD_SEND_FLUSH | FAR_NBD_SEND_FUA | FAR_NBD_SEND_CACHE | FAR_NBD_CAN_MULTI_CONN;

	if (h->form != FAR_NBD_SIMPLE)
		f |= FAR_NBD_SEND_DF;
	if (!far_nbd_writable(h, e))
		f |= FAR_NBD_READ_ONLY;
	else
		f |= FAR_NBD_SEND_TRIM | FAR_NBD_SEND_WRITE_ZEROES | FAR_NBD_SEND_FAST_ZERO;
	return (uint16_t)f;
}

static int hello_info_export(struct far_nbd_hello *h, uint32_t option, const struct far_export *e)
{
	uint8_t info[12];

	far_nbd_put16(info, FAR_NBD_INFO_EXPORT);
	far_nbd_put64(info + 2, far_size(e->b));
	far_nbd_put16(info + 10, far_nbd_export_flags(h, e));
	return hello_reply(h, option, FAR_NBD_REP_INFO, info, sizeof info);
}

static int hello_info_name(struct far_nbd_hello *h, uint32_t option, const struct far_export *e)
{
	size_t n = strlen(e->name);
	uint8_t *p = hello_room(h, 22 + n);

	if (!p)
		return -ENOMEM;
	far_nbd_put_option_reply(p, option, FAR_NBD_REP_INFO, (uint32_t)(2 + n));
	far_nbd_put16(p + 20, FAR_NBD_INFO_NAME);
	memcpy(p + 22, e->name, n);
	return 0;
}

/* Sent whether it is asked for or not: some clients do not ask and need it. */
static int hello_info_block_size(struct far_nbd_hello *h, uint32_t option, const struct far_export *e)
{
	uint32_t min = far_nbd_min_block(e);
	uint8_t info[14];

	far_nbd_put16(info, FAR_NBD_INFO_BLOCK_SIZE);
	far_nbd_put32(info + 2, min);
	far_nbd_put32(info + 6, (uint32_t)far_max(min, HELLO_PREFERRED));
	far_nbd_put32(info + 10, far_nbd_max_block(h->env, e));
	return hello_reply(h, option, FAR_NBD_REP_INFO, info, sizeof info);
}

static const struct far_export *hello_find(const struct far_nbd_hello *h, const uint8_t *name, size_t n)
{
	const struct far_export *e = n <= FAR_NBD_STRING_MAX ? far_server_find(h->env, (const char *)name, n) : NULL;

	/* What the caller may not use is not there for it. */
	return e && far_nbd_min_block(e) && far_server_right(h->env, h->who, e) != FAR_RIGHT_NONE ? e : NULL;
}

/* --------------------------------------------------------------------------------------------------- options */

/* INFO and GO: name, then which infos are wanted. */
static int hello_go(struct far_nbd_hello *h, uint32_t option, const uint8_t *p, size_t n)
{
	size_t name_n = n >= 6 ? far_nbd_get32(p) : 0;

	if (n < 6 || name_n > n - 6 || n - 6 - name_n != (size_t)2 * far_nbd_get16(p + 4 + name_n))
		return hello_refuse(h, option, FAR_NBD_REP_ERR_INVALID, "the option's lengths do not fit each other");
	const struct far_export *e = hello_find(h, p + 4, name_n);
	if (!e)
		return hello_refuse(h, option, FAR_NBD_REP_ERR_UNKNOWN, "there is no such export");
	int r = hello_info_export(h, option, e);
	for (size_t at = 6 + name_n; at < n && r == 0; at += 2)
		if (far_nbd_get16(p + at) == FAR_NBD_INFO_NAME) {
			r = hello_info_name(h, option, e);
			break;
		}
	if (r == 0)
		r = hello_info_block_size(h, option, e);
	if (r == 0)
		r = hello_reply(h, option, FAR_NBD_REP_ACK, NULL, 0);
	if (r == 0 && option == FAR_NBD_OPT_GO)
		h->export = e;
	return r;
}

/* The old way in: no answer but the export's size, and no way to say no but to hang up. */
static int hello_export_name(struct far_nbd_hello *h, const uint8_t *p, size_t n)
{
	const struct far_export *e = h->form == FAR_NBD_EXTENDED ? NULL : hello_find(h, p, n);
	size_t len = h->no_zeroes ? 10 : 134;

	if (!e) {
		h->over = true;
		return 0;
	}
	uint8_t *out = hello_room(h, len);
	if (!out)
		return -ENOMEM;
	memset(out, 0, len);
	far_nbd_put64(out, far_size(e->b));
	far_nbd_put16(out + 8, far_nbd_export_flags(h, e));
	h->export = e;
	return 0;
}

static int hello_list(struct far_nbd_hello *h)
{
	int r = 0;

	for (size_t i = 0; i < h->env->exports_n && r == 0; i++) {
		const char *name = h->env->exports[i].name;
		size_t n = strlen(name);
		if (!far_nbd_min_block(&h->env->exports[i]) || far_server_right(h->env, h->who, &h->env->exports[i]) == FAR_RIGHT_NONE)
			continue;
		uint8_t *p = hello_room(h, 24 + n);
		if (!p)
			return -ENOMEM;
		far_nbd_put_option_reply(p, FAR_NBD_OPT_LIST, FAR_NBD_REP_SERVER, (uint32_t)(4 + n));
		far_nbd_put32(p + 20, (uint32_t)n);
		memcpy(p + 24, name, n);
	}
	return r ? r : hello_reply(h, FAR_NBD_OPT_LIST, FAR_NBD_REP_ACK, NULL, 0);
}

/* Whether a query names the context; in a list a namespace ("base:") names all of its own. */
static bool hello_query(const uint8_t *q, size_t n, const char *context, bool list)
{
	size_t all = strlen(context), space = strcspn(context, ":") + 1;

	return (n == all || (list && n == space)) && !memcmp(q, context, n);
}

static int hello_put_context(struct far_nbd_hello *h, uint32_t option, unsigned which)
{
	size_t n = strlen(hello_contexts[which]);
	uint8_t *p = hello_room(h, 24 + n);

	if (!p)
		return -ENOMEM;
	far_nbd_put_option_reply(p, option, FAR_NBD_REP_META_CONTEXT, (uint32_t)(4 + n));
	far_nbd_put32(p + 20, option == FAR_NBD_OPT_SET_META_CONTEXT ? which + 1 : 0);
	memcpy(p + 24, hello_contexts[which], n);
	return 0;
}

/* The contexts that the queries name; false: their lengths do not fit. */
static bool hello_queries(const uint8_t *p, size_t n, uint32_t count, bool list, unsigned *chosen)
{
	for (uint32_t i = 0; i < count; i++) {
		size_t len = n >= 4 ? far_nbd_get32(p) : 0;
		if (n < 4 || len > n - 4 || len > FAR_NBD_STRING_MAX)
			return false;
		for (unsigned c = 0; c < FAR_NBD_CONTEXTS; c++)
			if (hello_query(p + 4, len, hello_contexts[c], list))
				*chosen |= 1u << c;
		p += 4 + len;
		n -= 4 + len;
	}
	return n == 0;
}

static int hello_meta(struct far_nbd_hello *h, uint32_t option, const uint8_t *p, size_t n)
{
	bool list = option == FAR_NBD_OPT_LIST_META_CONTEXT;
	unsigned chosen = 0;

	if (!list)
		h->contexts = 0;
	if (h->form == FAR_NBD_SIMPLE)
		return hello_refuse(h, option, FAR_NBD_REP_ERR_INVALID, "ask for structured replies first");
	size_t name_n = n >= 8 ? far_nbd_get32(p) : 0;
	if (n < 8 || name_n > n - 8)
		return hello_refuse(h, option, FAR_NBD_REP_ERR_INVALID, "the option's lengths do not fit each other");
	uint32_t count = far_nbd_get32(p + 4 + name_n);
	if (!hello_queries(p + 8 + name_n, n - 8 - name_n, count, list, &chosen))
		return hello_refuse(h, option, FAR_NBD_REP_ERR_INVALID, "the queries' lengths do not fit");
	const struct far_export *e = hello_find(h, p + 4, name_n);
	if (!e)
		return hello_refuse(h, option, FAR_NBD_REP_ERR_UNKNOWN, "there is no such export");
	if (list && !count)
		chosen = (1u << FAR_NBD_CONTEXTS) - 1;
	int r = 0;
	for (unsigned c = 0; c < FAR_NBD_CONTEXTS && r == 0; c++)
		if (chosen & 1u << c)
			r = hello_put_context(h, option, c);
	if (!list) {
		h->contexts = chosen;
		h->context_for = e;
	}
	return r ? r : hello_reply(h, option, FAR_NBD_REP_ACK, NULL, 0);
}

static int hello_form(struct far_nbd_hello *h, uint32_t option, size_t n)
{
	if (n)
		return hello_refuse(h, option, FAR_NBD_REP_ERR_INVALID, "the option carries no data");
	if (option == FAR_NBD_OPT_STRUCTURED_REPLY && h->form == FAR_NBD_EXTENDED)
		return hello_refuse(h, option, FAR_NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are agreed on already");
	h->form = option == FAR_NBD_OPT_EXTENDED_HEADERS ? FAR_NBD_EXTENDED : FAR_NBD_STRUCTURED;
	return hello_reply(h, option, FAR_NBD_REP_ACK, NULL, 0);
}

static int hello_starttls(struct far_nbd_hello *h, size_t n)
{
	uint32_t option = FAR_NBD_OPT_STARTTLS;

	if (n || h->tls)
		return hello_refuse(h, option, FAR_NBD_REP_ERR_INVALID, n ? "the option carries no data" : "it is encrypted already");
	if (!h->env->starttls)
		return hello_refuse(h, option, FAR_NBD_REP_ERR_POLICY, "this server has no certificate");
	h->starttls = true;
	return hello_reply(h, option, FAR_NBD_REP_ACK, NULL, 0);
}

void far_nbd_hello_encrypted(struct far_nbd_hello *h)
{
	h->tls = true;
	h->starttls = false;
	far_caller_put(h->who);
	h->who = NULL;
	h->form = FAR_NBD_SIMPLE;
	h->contexts = 0;
	h->context_for = NULL;
}

static int hello_option(struct far_nbd_hello *h, uint32_t option, const uint8_t *p, size_t n)
{
	if (h->required && !h->tls && option != FAR_NBD_OPT_ABORT && option != FAR_NBD_OPT_STARTTLS) {
		h->over = option == FAR_NBD_OPT_EXPORT_NAME;
		return h->over ? 0 : hello_refuse(h, option, FAR_NBD_REP_ERR_TLS_REQD, "this server speaks TLS only: ask for STARTTLS");
	}
	switch (option) {
	case FAR_NBD_OPT_EXPORT_NAME:
		return hello_export_name(h, p, n);
	case FAR_NBD_OPT_ABORT:
		h->over = true;
		return hello_reply(h, option, FAR_NBD_REP_ACK, NULL, 0);
	case FAR_NBD_OPT_LIST:
		return n ? hello_refuse(h, option, FAR_NBD_REP_ERR_INVALID, "the option carries no data") : hello_list(h);
	case FAR_NBD_OPT_STARTTLS:
		return hello_starttls(h, n);
	case FAR_NBD_OPT_INFO:
	case FAR_NBD_OPT_GO:
		return hello_go(h, option, p, n);
	case FAR_NBD_OPT_STRUCTURED_REPLY:
	case FAR_NBD_OPT_EXTENDED_HEADERS:
		return hello_form(h, option, n);
	case FAR_NBD_OPT_LIST_META_CONTEXT:
	case FAR_NBD_OPT_SET_META_CONTEXT:
		return hello_meta(h, option, p, n);
	default:
		return hello_refuse(h, option, FAR_NBD_REP_ERR_UNSUP, "unknown option");
	}
}

/* ---------------------------------------------------------------------------------------------------- input */

/* How long the option at p really is, its head not counted. False: more must come before that is known. */
static bool hello_length(uint32_t option, const uint8_t *p, size_t n, uint64_t *len)
{
	*len = far_nbd_get32(p + 12);
	if (*len || (option != FAR_NBD_OPT_GO && option != FAR_NBD_OPT_INFO))
		return true;
	/* go-nbd: the length is always 0, the lengths inside are right. */
	if (n < HELLO_OPTION_HEAD + 4)
		return false;
	*len = (uint64_t)far_nbd_get32(p + 16) + 6;
	if (*len > FAR_NBD_OPTION_MAX)
		return true;
	if (n < HELLO_OPTION_HEAD + *len)
		return false;
	*len += (uint64_t)2 * far_nbd_get16(p + 16 + *len - 2);
	return true;
}

/* One step: bytes used, 0: more must come, or -errno. */
static ssize_t hello_step(struct far_nbd_hello *h, const uint8_t *p, size_t n)
{
	uint64_t len;

	if (h->skip) {
		size_t k = (size_t)far_min(h->skip, n);
		h->skip -= k;
		return (ssize_t)k;
	}
	if (!h->flags_seen) {
		if (n < 4)
			return 0;
		uint32_t flags = far_nbd_get32(p);
		if (flags & ~(uint32_t)(FAR_NBD_FIXED_NEWSTYLE | FAR_NBD_NO_ZEROES))
			return -EPROTO;
		h->no_zeroes = flags & FAR_NBD_NO_ZEROES;
		h->flags_seen = true;
		return 4;
	}
	if (n >= 8 && far_nbd_get64(p) != FAR_NBD_OPT_MAGIC)
		return -EPROTO;
	if (n < HELLO_OPTION_HEAD)
		return 0;
	uint32_t option = far_nbd_get32(p + 8);
	if (!hello_length(option, p, n, &len))
		return 0;
	if (len <= FAR_NBD_OPTION_MAX && n - HELLO_OPTION_HEAD < len)
		return 0;
	if (++h->options > HELLO_OPTIONS_MAX)
		return -EPROTO;
	if (len > FAR_NBD_OPTION_MAX) {
		h->skip = len;
		h->over = option == FAR_NBD_OPT_EXPORT_NAME;
		int r = h->over ? 0 : hello_refuse(h, option, FAR_NBD_REP_ERR_TOO_BIG, "the option is too long");
		return r ? r : HELLO_OPTION_HEAD;
	}
	int r = hello_option(h, option, p + HELLO_OPTION_HEAD, (size_t)len);
	return r ? r : (ssize_t)(HELLO_OPTION_HEAD + len);
}

int far_nbd_hello_feed(struct far_nbd_hello *h, const uint8_t *p, size_t n, size_t *used)
{
	*used = 0;
	while (*used < n && h->out_n < HELLO_OUT && !h->export && !h->over && !h->starttls) {
		ssize_t k = hello_step(h, p + *used, n - *used);
		if (k < 0)
			return (int)k;
		if (k == 0)
			break;
		*used += (size_t)k;
	}
	return 0;
}

int far_nbd_hello_init(struct far_nbd_hello *h, const struct far_server_env *env, bool tls_required)
{
	h->env = env;
	h->required = tls_required;
	uint8_t *p = hello_room(h, FAR_NBD_GREETING);
	if (!p)
		return -ENOMEM;
	p = far_nbd_put64(p, FAR_NBD_MAGIC);
	p = far_nbd_put64(p, FAR_NBD_OPT_MAGIC);
	far_nbd_put16(p, FAR_NBD_FIXED_NEWSTYLE | FAR_NBD_NO_ZEROES);
	return 0;
}

void far_nbd_hello_fini(struct far_nbd_hello *h)
{
	free(h->out);
	far_caller_put(h->who);
}
