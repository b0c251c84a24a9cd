/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The heads of HTTP answers, as servers send them and as they should not. */
#include "backend/http_head.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>

#include <cmocka.h>

static struct far_http_head head(const char *const *lines)
{
	struct far_http_head h = { 0 };

	for (; *lines; lines++)
		far_http_head_line(&h, *lines, strlen(*lines));
	return h;
}
#define HEAD(...) head((const char *const[]){ "HTTP/1.1 206 Partial Content\r\n", __VA_ARGS__, "\r\n", NULL })

static void test_a_usual_answer(void **state)
{
	struct far_http_head h = HEAD("content-RANGE:bytes 5-9/100 \r\n", "Content-Length: 5\r\n", "ETag: \"a:b\"\r\n",
				      "Last-Modified: Tue, 15 Nov 1994 12:45:26 GMT\r\n", "Content-Encoding: identity\r\n");

	assert_int_equal(h.status, 206);
	assert_false(h.bad || h.encoded || h.parts || h.unsatisfied);
	assert_true(h.ranged && h.has_total && h.has_length);
	assert_true(h.first == 5 && h.last == 9 && h.total == 100 && h.length == 5);
	assert_string_equal(h.tag, "\"a:b\"");
	assert_string_equal(h.modified, "Tue, 15 Nov 1994 12:45:26 GMT");
	assert_true(far_http_tag_strong(h.tag));
	assert_false(far_http_tag_strong("W/\"x\""));
}

static void test_status_lines(void **state)
{
	static const struct {
		const char *line;
		int status;
	} t[] = { { "HTTP/1.0 200 OK", 200 }, { "HTTP/2 206", 206 }, { "HTTP/1.1 404", 404 }, { "HTTP/1.1", 0 },
		  { "HTTP/1.1 99 x", 0 }, { "HTTP/1.1 2060 x", 0 }, { "HTTP/1.1 20x", 0 }, { "HTTP/1.1 -1", 0 } };

	for (size_t i = 0; i < FAR_ARRAY_LEN(t); i++)
		assert_int_equal(head((const char *const[]){ t[i].line, NULL }).status, t[i].status);
}

static void test_a_new_status_line_forgets(void **state)
{
	struct far_http_head h = HEAD("ETag: \"old\"", "Content-Range: nonsense", "HTTP/1.1 200 OK");

	assert_true(h.status == 200 && !h.bad && !h.tag[0]);
}

static void test_unsatisfied_and_unknown(void **state)
{
	struct far_http_head h = HEAD("Content-Range: bytes */0");
	assert_true(h.ranged && h.unsatisfied && h.has_total && !h.total && !h.bad);
	h = HEAD("Content-Range: bytes 0-0/*");
	assert_true(h.ranged && !h.has_total && !h.bad);
}

static void test_what_makes_no_sense(void **state)
{
	static const char *const lines[] = {
		"Content-Range: bytes 5-4/10", "Content-Range: bytes 0-10/10", "Content-Range: bytes 0-/10",
		"Content-Range: bytes -5/10", "Content-Range: items 0-1/10", "Content-Range: bytes 0-1", "Content-Range:",
		"Content-Range: bytes 0-1/10x", "Content-Range: bytes 0-99999999999999999999/100000000000000000000",
		"Content-Length: -1", "Content-Length: 1,1", "Content-Length: 99999999999999999999", "ETag: unquoted",
		"ETag: \"", "ETag: \"a\"b\"", "ETag: w/\"x\"",
	};

	for (size_t i = 0; i < FAR_ARRAY_LEN(lines); i++)
		if (!HEAD(lines[i]).bad)
			fail_msg("taken: %s", lines[i]);
	assert_true(HEAD("Content-Length: 1", "Content-Length: 2").bad);
	assert_true(HEAD("Content-Range: bytes 0-1/5", "Content-Range: bytes 1-2/5").bad);
	assert_true(HEAD("ETag: \"a\"", "ETag: \"b\"").bad);
	assert_false(HEAD("ETag: \"a\"", "ETag: \"a\"").bad);
	assert_true(HEAD("Content-Encoding: gzip").encoded);
	assert_true(HEAD("Content-Type: multipart/byteranges; boundary=x").parts);
}

static void test_long_and_odd_tags(void **state)
{
	char line[600] = "ETag: \"";

	memset(line + 7, 'x', 500);
	memcpy(line + 507, "\"", 2);
	assert_true(HEAD(line).bad);
	assert_true(HEAD("ETag: \"a\001b\"").bad);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_usual_answer), cmocka_unit_test(test_status_lines),
		cmocka_unit_test(test_a_new_status_line_forgets), cmocka_unit_test(test_unsatisfied_and_unknown),
		cmocka_unit_test(test_what_makes_no_sense), cmocka_unit_test(test_long_and_odd_tags),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
