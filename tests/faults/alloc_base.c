/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The n-th allocation fails, n = 1, 2 ... until the constructor succeeds: it says -ENOMEM, leaks nothing (the address
 * sanitizer looks), leaves *out alone and the inner backend with its owner. The linker wraps the allocators. */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "base/options.h"
#include "base/uri.h"
#include "layer/layer.h"

#include "inject.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static char tmp[64];

static void opens_or_says_no(const char *uri)
{
	unsigned n = 0;
	int r;

	do {
		struct far_backend *b = NULL;
		struct far_error err = { .text = "" };
		inject_begin(++n, INJECT_THREAD, false);
		r = far_open(uri, NULL, &b, &err);
		inject_end();
		if (r) {
			assert_int_equal(r, -ENOMEM);
			assert_null(b);
			assert_non_null(strstr(err.text, "Cannot allocate memory"));
		}
		far_close(b);
	} while (r && n < 100);
	assert_in_range(n, 2, 99);
}

static void leaves(void **state)
{
	char uri[200];

	opens_or_says_no("mem:1M");
	opens_or_says_no("mem:1M?private=1");
	opens_or_says_no("null:");
	snprintf(uri, sizeof uri, "file:%s/x?size=1M&direct=no", tmp);
	opens_or_says_no(uri);
	snprintf(uri, sizeof uri, "dir:%s/d?size=1M&max-open=3", tmp);
	opens_or_says_no(uri);
}

static void layers(void **state)
{
	static const char *const specs[] = { "chunked:chunk=4K", "strict:chunk=4K", "tracked", "gated:closed=no", "delay:rtt=1us",
					     "fault:ops=read", "retry:tries=3" };

	for (size_t i = 0; i < FAR_ARRAY_LEN(specs); i++) {
		struct far_backend *inner, *b;
		unsigned n = 0;
		char buf[4096];
		int r;
		assert_int_equal(far_open("mem:1M", NULL, &inner, NULL), 0);
		do {
			struct far_error err = { .text = "" };
			b = NULL;
			inject_begin(++n, INJECT_THREAD, false);
			r = far_layer_open(specs[i], inner, &b, &err);
			inject_end();
			if (r) {
				assert_int_equal(r, -ENOMEM);
				assert_null(b);
				assert_non_null(strstr(err.text, "Cannot allocate memory"));
				assert_int_equal(far_read(inner, 0, buf, 4096, 0), 0);
			}
		} while (r && n < 100);
		assert_in_range(n, 2, 99);
		assert_int_equal(far_read(b, 0, buf, 4096, 0), 0);
		far_close(b);
	}
}

static int nothing(void *opaque, uint64_t off, void *buf, size_t len)
{
	return 0;
}

static void four_functions(void **state)
{
	struct far_backend *b = NULL;
	unsigned n = 0;
	int r;

	do {
		inject_begin(++n, INJECT_THREAD, false);
		r = far_backend_from(nothing, NULL, 5, NULL, NULL, &b);
		inject_end();
		assert_true(!r || (r == -ENOMEM && !b));
	} while (r);
	assert_int_equal(n, 3);
	far_close(b);
}

static int scheme_open(void *opaque, const char *uri, const struct far_open_opts *opts, struct far_backend **out,
		       struct far_error *err)
{
	return -EIO;
}

static void schemes(void **state)
{
	struct far_scheme s = { .size = sizeof s, .name = "alloc", .help = "x", .open = scheme_open };
	unsigned n = 0;
	int r;

	do {
		inject_begin(++n, INJECT_THREAD, false);
		r = far_scheme_register(&s);
		inject_end();
		assert_true(!r || r == -ENOMEM);
	} while (r);
	assert_int_equal(n, 3);
}

struct conf {
	char *text;
	struct far_opt_list list;
};

static void options(void **state)
{
	static const struct far_opt table[] = { { "text", FAR_OPT_STRING, offsetof(struct conf, text) },
						{ "list", FAR_OPT_LIST, offsetof(struct conf, list) }, FAR_OPT_END };
	unsigned n = 0;
	int r;

	do {
		struct conf c = { 0 };
		inject_begin(++n, INJECT_THREAD, false);
		r = far_opt_parse(table, &c, "t", "text=a,list=b,text=c,list=d", ',', true, NULL);
		inject_end();
		assert_true(!r || r == -ENOMEM);
		far_opt_fini(table, &c);
	} while (r && n < 100);
	assert_int_equal(n, 8);
}

/* Marks that could not be handed out are not lost. */
static void tracked_take(void **state)
{
	struct far_backend *inner, *b;
	uint64_t *v;
	size_t count;
	unsigned n = 0;
	int r;

	assert_int_equal(far_open("mem:1M", NULL, &inner, NULL), 0);
	assert_int_equal(far_layer_open("tracked:chunk=1", inner, &b, NULL), 0);
	far_tracked_start(b);
	assert_int_equal(far_zero(b, 0, 200, 0), 0);
	do {
		inject_begin(++n, INJECT_THREAD, false);
		r = far_tracked_take(b, true, &v, &count);
		inject_end();
		assert_true(!r || r == -ENOMEM);
	} while (r);
	assert_int_equal(n, 4);
	assert_int_equal(count, 200);
	free(v);
	far_close(b);
}

/* Who may write: the object, and a layer of it for a store without a server. */
static void owner(void **state)
{
	struct far_backend *inner, *b = NULL;
	struct far_owner *o = NULL;
	unsigned n = 0;
	int r;

	assert_int_equal(far_open("mem:1M", NULL, &inner, NULL), 0);
	do {
		inject_begin(++n, INJECT_THREAD, false);
		r = far_owner_new(inner, 1000, &o);
		inject_end();
		assert_true(!r || (r == -ENOMEM && !o));
	} while (r && n < 100);
	assert_in_range(n, 2, 99);
	/* What it does: a call fails as a whole or is done, and the next one works. */
	for (n = 1; n < 20; n++) {
		struct far_lease l = FAR_LEASE_INIT;
		struct far_origin now = FAR_ORIGIN_INIT;
		struct far_extent x[4];
		size_t got;
		bool all;
		l.writer = "alloc";
		for (unsigned k = 0; k < 2; k++) {
			inject_begin(k ? 0 : n, INJECT_THREAD, false);
			int s = far_owner_session(o, n, 1);
			if (!s)
				far_owner_connected(o, n, 1);
			int c = s ? -ENOMEM : far_owner_change_begin(o, n, 1, 0);
			if (!c)
				far_owner_change_end(o, n, 1, 0, 4096, true);
			int f = far_owner_flush(o, &now);
			int g = s ? -ENOMEM : far_owner_lease(o, n, 1, &l);
			l.release = true;
			int h = g ? 0 : far_owner_lease(o, n, 1, &l);
			l.release = false;
			int w = far_owner_watch(o, now.instance, 0, x, 4, &got, &all, &now);
			inject_end();
			if (k)
				assert_true(!s && !c && !f && !g && !h && !w);
			else
				assert_true((!s || s == -ENOMEM) && (!c || c == -ENOMEM) && (!f || f == -ENOMEM) &&
					    (!g || g == -ENOMEM) && (!h || h == -ENOMEM) && (!w || w == -ENOMEM));
			if (!s)
				far_owner_connected(o, n, -1);
		}
	}
	far_owner_free(o);
	n = 0;
	do {
		inject_begin(++n, INJECT_THREAD, false);
		r = far_owned_new(inner, &b);
		inject_end();
		assert_true(!r || (r == -ENOMEM && !b));
	} while (r && n < 100);
	assert_in_range(n, 2, 99);
	far_close(b);
}

static int setup(void **state)
{
	strcpy(tmp, "/tmp/farpage-alloc-XXXXXX");
	return mkdtemp(tmp) ? 0 : -1;
}

static int teardown(void **state)
{
	char cmd[100];
	snprintf(cmd, sizeof cmd, "rm -rf '%s'", tmp);
	return system(cmd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(leaves),  cmocka_unit_test(layers),  cmocka_unit_test(four_functions),
		cmocka_unit_test(schemes), cmocka_unit_test(options), cmocka_unit_test(tracked_take),
		cmocka_unit_test(owner),
	};
	return cmocka_run_group_tests(tests, setup, teardown);
}
