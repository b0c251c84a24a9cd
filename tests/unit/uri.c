/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "base/uri.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

struct parts {
	const char *text, *scheme, *variant, *user, *host;
	int port; /* -1: none */
	const char *path, *query;
	bool authority;
};

static void uris_are_taken_apart(void **state)
{
	static const struct parts good[] = {
		{ "mem:64M", "mem", "", "", "", -1, "64M", "", false },
		{ "MEM:64M", "mem", "", "", "", -1, "64M", "", false },
		{ "null:", "null", "", "", "", -1, "", "", false },
		{ "file:x.db", "file", "", "", "", -1, "x.db", "", false },
		{ "file:/a/b%20c%3f?size=1M&direct=1", "file", "", "", "", -1, "/a/b c?", "size=1M&direct=1", false },
		{ "file:///a", "file", "", "", "", -1, "/a", "", true },
		{ "grpc://127.0.0.1:1337", "grpc", "", "", "127.0.0.1", 1337, "", "", true },
		{ "grpc://h/", "grpc", "", "", "h", -1, "/", "", true },
		{ "grpc://h:0/x?size=4K", "grpc", "", "", "h", 0, "/x", "size=4K", true },
		{ "grpc://[::1]:1337/x", "grpc", "", "", "::1", 1337, "/x", "", true },
		{ "grpc://[fe80::1%25eth0]", "grpc", "", "", "fe80::1%eth0", -1, "", "", true },
		{ "grpc+unix:///disk?socket=/run/a%2fb", "grpc", "unix", "", "", -1, "/disk", "socket=/run/a%2fb", true },
		{ "redis://me%40x:pw@h:6379/0", "redis", "", "me@x:pw", "h", 6379, "/0", "", true },
		{ "s3://a@b@h/k", "s3", "", "a@b", "h", -1, "/k", "", true },
		{ "x://h?a=/?b", "x", "", "", "h", -1, "", "a=/?b", true },
		{ "x://h:65535", "x", "", "", "h", 65535, "", "", true },
		{ "exec:ssh host 'a?b' %zz", "exec", "", "", "", -1, "ssh host 'a?b' %zz", "", false },
		{ "exec://x", "exec", "", "", "", -1, "//x", "", false },
		{ "nbd+exec:nbdkit -s?", "nbd", "exec", "", "", -1, "nbdkit -s?", "", false },
		{ "stdio:", "stdio", "", "", "", -1, "", "", false },
	};

	for (size_t i = 0; i < FAR_ARRAY_LEN(good); i++) {
		const struct parts *p = &good[i];
		struct far_error err = { .text = "" };
		struct far_uri u;
		if (far_uri_parse(&u, p->text, &err))
			fail_msg("%s: %s", p->text, err.text);
		assert_string_equal(u.text, p->text);
		assert_string_equal(u.scheme, p->scheme);
		assert_string_equal(u.variant, p->variant);
		assert_string_equal(u.user, p->user);
		assert_string_equal(u.host, p->host);
		assert_string_equal(u.path, p->path);
		assert_string_equal(u.query, p->query);
		assert_int_equal(u.has_port, p->port >= 0);
		assert_int_equal(u.port, p->port < 0 ? 0 : p->port);
		assert_int_equal(u.authority, p->authority);
		far_uri_fini(&u);
	}
}

static void each_refusal_has_its_sentence(void **state)
{
	static const struct {
		const char *text, *want;
	} bad[] = {
		{ "", "'' is no URI: it must begin with a scheme such as file: or grpc:." },
		{ "x.db", "'x.db' is no URI: it must begin with a scheme such as file: or grpc:." },
		{ ":x", "':x' is no URI: it must begin with a scheme such as file: or grpc:." },
		{ "./a:b", "'./a:b' is no URI: it must begin with a scheme such as file: or grpc:." },
		{ "file:%zz", "'file:%zz' is no URI: a '%' needs two hexadecimal digits after it; write %25 for '%' itself." },
		{ "file:a%", "'file:a%' is no URI: a '%' needs two hexadecimal digits after it; write %25 for '%' itself." },
		{ "file:a%00b", "'file:a%00b' is no URI: a '%' needs two hexadecimal digits after it; write %25 for '%' itself." },
		{ "grpc://h%", "'grpc://h%' is no URI: a '%' needs two hexadecimal digits after it." },
		{ "grpc://u%@h", "'grpc://u%@h' is no URI: a '%' needs two hexadecimal digits after it." },
		{ "grpc://h:", "'grpc://h:' is no URI: a number must follow the ':' after the host." },
		{ "grpc://h:x", "'grpc://h:x' is no URI: the port must be a number from 0 to 65535." },
		{ "grpc://h:65536", "'grpc://h:65536' is no URI: the port must be a number from 0 to 65535." },
		{ "grpc://h:-1", "'grpc://h:-1' is no URI: the port must be a number from 0 to 65535." },
		{ "grpc://h:99999999999", "'grpc://h:99999999999' is no URI: the port must be a number from 0 to 65535." },
		{ "grpc://::1/x", "'grpc://::1/x' is no URI: an IPv6 address stands in brackets, as in [::1]:1337." },
		{ "grpc://[::1", "'grpc://[::1' is no URI: an IPv6 address stands in brackets, as in [::1]:1337." },
		{ "grpc://[::1]x", "'grpc://[::1]x' is no URI: an IPv6 address stands in brackets, as in [::1]:1337." },
		{ "grpc://a b/", "'grpc://a b/' is no URI: the host has a blank in it." },
		{ "grpc://a%0ab/", "'grpc://a%0ab/' is no URI: the host has a blank in it." },
	};

	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++) {
		struct far_error err = { .text = "" };
		struct far_uri u;
		assert_int_equal(far_uri_parse(&u, bad[i].text, &err), -EINVAL);
		assert_string_equal(err.text, bad[i].want);
		far_uri_fini(&u);
		far_uri_fini(&u);
	}
}

static void the_scheme_alone(void **state)
{
	static const struct {
		const char *text, *want;
	} cases[] = { { "grpc+unix:///x", "grpc+unix" }, { "MEM:1", "mem" }, { "x.db", "" }, { "./x:y", "" }, { "/x:y", "" },
		      { "", "" }, { "a", "" }, { "1a:x", "" }, { "a-b1:x", "a-b1" }, { "averylongschemename:x", "" } };
	char buf[16];

	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		memset(buf, 'x', sizeof buf);
		far_uri_scheme(cases[i].text, buf, sizeof buf);
		assert_string_equal(buf, cases[i].want);
	}
}

static void decoding_is_all_or_nothing(void **state)
{
	char good[] = "%41b%7E%e4", bad[] = "%41%4";

	assert_int_equal(far_uri_decode(good), 0);
	assert_string_equal(good, "Ab~\xe4");
	assert_int_equal(far_uri_decode(bad), -EINVAL);
	assert_string_equal(bad, "%41%4");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(uris_are_taken_apart),
		cmocka_unit_test(each_refusal_has_its_sentence),
		cmocka_unit_test(the_scheme_alone),
		cmocka_unit_test(decoding_is_all_or_nothing),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
