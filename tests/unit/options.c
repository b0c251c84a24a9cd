/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Numbers, sizes, durations; option tables of every kind, and each sentence they refuse with. */
#define _GNU_SOURCE
#include "base/options.h"

#include "base/clock.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

struct conf {
	bool flag;
	int64_t number;
	uint64_t size, duration, open_end;
	double part;
	char *text;
	int mode;
	struct far_opt_list list;
	int64_t any;
};

static const char *const modes[] = { "auto", "direct", "managed", NULL };

static const struct far_opt table[] = {
	{ "flag", FAR_OPT_BOOL, offsetof(struct conf, flag) },
	{ "number", FAR_OPT_INT, offsetof(struct conf, number), -5, 100, .also = "auto", .also_value = -1 },
	{ "size", FAR_OPT_SIZE, offsetof(struct conf, size), 4096, 1 << 25, .also = "none", .also_value = 0 },
	{ "open-end", FAR_OPT_SIZE, offsetof(struct conf, open_end), 512, 0 },
	{ "duration", FAR_OPT_DURATION, offsetof(struct conf, duration), 0, 3600e9 },
	{ "part", FAR_OPT_FLOAT, offsetof(struct conf, part), 0, 1 },
	{ "text", FAR_OPT_STRING, offsetof(struct conf, text) },
	{ "mode", FAR_OPT_ENUM, offsetof(struct conf, mode), .names = modes },
	{ "list", FAR_OPT_LIST, offsetof(struct conf, list) },
	{ "any", FAR_OPT_INT, offsetof(struct conf, any) },
	FAR_OPT_END,
};

static void sizes_are_read(void **state)
{
	static const struct {
		const char *text;
		uint64_t want;
	} good[] = { { "0", 0 }, { "4096", 4096 }, { "64K", 65536 }, { "64k", 65536 }, { "64KiB", 65536 }, { "64KB", 65536 },
		     { "1M", 1 << 20 }, { "1.5G", 3 * (uint64_t)1 << 29 }, { "0.5K", 512 }, { "2T", (uint64_t)2 << 40 },
		     { "512B", 512 }, { "18446744073709551615", UINT64_MAX }, { "15E", (uint64_t)15 << 60 },
		     { "0000000000000000000000001", 1 }, { "1.0", 1 } };
	static const char *const bad[] = { "", "K", "-1", "+1", " 1", "1 ", "1X", "1KX", "1iB", "1Ki", "1.", ".5", "0.3", "1.5B",
					   "18446744073709551616", "16E", "99999999999T", "1e3", "0x10", "1KBB",
					   "0.0000000000000000001", "1.00000000000000000000000K" };
	uint64_t v;

	for (size_t i = 0; i < FAR_ARRAY_LEN(good); i++) {
		assert_int_equal(far_parse_size(good[i].text, &v), 0);
		assert_true(v == good[i].want);
	}
	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++)
		assert_int_equal(far_parse_size(bad[i], &v), -EINVAL);
}

static void durations_are_read(void **state)
{
	static const struct {
		const char *text;
		uint64_t want;
	} good[] = { { "0", 0 }, { "1", FAR_SEC }, { "1.5", 1500 * FAR_MSEC }, { "250us", 250 * FAR_USEC }, { "40ms", 40 * FAR_MSEC },
		     { "0.5ms", 500 * FAR_USEC }, { "30s", 30 * FAR_SEC }, { "2m", 120 * FAR_SEC }, { "1h", 3600 * FAR_SEC },
		     { "7ns", 7 }, { "0.1us", 100 } };
	static const char *const bad[] = { "", "ms", "-1s", "1d", "1 s", "1ss", "1.s", "99999999999h", "5124096h" };
	uint64_t v;

	for (size_t i = 0; i < FAR_ARRAY_LEN(good); i++) {
		assert_int_equal(far_parse_duration(good[i].text, &v), 0);
		assert_true(v == good[i].want);
	}
	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++)
		assert_int_equal(far_parse_duration(bad[i], &v), -EINVAL);
}

static void sizes_and_durations_are_shown(void **state)
{
	static const struct {
		uint64_t v;
		const char *want;
	} size[] = { { 0, "0 B" }, { 1023, "1023 B" }, { 1024, "1.0 KiB" }, { 4096, "4.0 KiB" }, { 10188, "9.9 KiB" },
		     { 10189, "10 KiB" }, { 268435456, "256 MiB" }, { 1048575, "1.0 MiB" }, { 1048064, "1.0 MiB" },
		     { 1047552, "1023 KiB" }, { UINT64_MAX, "16 EiB" }, { (uint64_t)3 << 29, "1.5 GiB" } },
	  dur[] = { { 0, "0 ns" }, { 999, "999 ns" }, { 1500, "1.5 us" }, { 40 * FAR_MSEC, "40 ms" }, { 999600, "1.0 ms" },
		    { 2 * FAR_SEC, "2.0 s" }, { 59 * FAR_SEC, "59 s" }, { 59700 * FAR_MSEC, "0m59s" }, { 61 * FAR_SEC, "1m01s" },
		    { 3661 * FAR_SEC, "1h01m" } };
	char buf[32];

	for (size_t i = 0; i < FAR_ARRAY_LEN(size); i++)
		assert_string_equal(far_format_size(buf, sizeof buf, size[i].v), size[i].want);
	for (size_t i = 0; i < FAR_ARRAY_LEN(dur); i++)
		assert_string_equal(far_format_duration(buf, sizeof buf, dur[i].v), dur[i].want);
	assert_true(strlen(far_format_size(buf, 16, UINT64_MAX)) < 16);
	assert_true(strlen(far_format_duration(buf, 16, UINT64_MAX)) < 16);
}

static void every_kind_is_set(void **state)
{
	struct conf c = { 0 };
	struct far_error err;

	assert_int_equal(far_opt_parse(table, &c, "t", "flag,number=7,size=64K,open-end=1T,duration=40ms,part=0.25,text=a,mode=managed,"
						       "list=x,,list=y=z,any=-3,", ',', false, &err), 0);
	assert_true(c.flag && c.number == 7 && c.size == 65536 && c.open_end == (uint64_t)1 << 40);
	assert_true(c.duration == 40 * FAR_MSEC && c.part == 0.25 && c.mode == 2 && c.any == -3);
	assert_string_equal(c.text, "a");
	assert_int_equal(c.list.n, 2);
	assert_string_equal(c.list.v[0], "x");
	assert_string_equal(c.list.v[1], "y=z");
	assert_int_equal(far_opt_parse(table, &c, "t", "flag=no&number=auto&size=none&text=b%26%3D&text=c%2c", '&', true, &err), 0);
	assert_true(!c.flag && c.number == -1 && c.size == 0);
	assert_string_equal(c.text, "c,");
	far_opt_fini(table, &c);
	assert_null(c.text);
	assert_null(c.list.v);
}

static void bools_have_many_names(void **state)
{
	static const char *const yes[] = { "", "1", "true", "yes", "on" }, *const no[] = { "0", "false", "no", "off" };
	struct conf c;

	for (size_t i = 0; i < FAR_ARRAY_LEN(yes); i++) {
		c.flag = false;
		assert_int_equal(far_opt_set(table, &c, "t", "flag", yes[i], NULL), 0);
		assert_true(c.flag);
	}
	for (size_t i = 0; i < FAR_ARRAY_LEN(no); i++) {
		c.flag = true;
		assert_int_equal(far_opt_set(table, &c, "t", "flag", no[i], NULL), 0);
		assert_false(c.flag);
	}
}

static void each_refusal_has_its_sentence(void **state)
{
	static const struct {
		const char *key, *value, *want;
	} bad[] = {
		{ "nope", "1", "layer t: unknown option 'nope'. The known ones are flag, number, size, open-end, duration, part, text, "
			       "mode, list, any." },
		{ "flag", "maybe", "layer t: 'maybe' is no value for 'flag': give yes or no." },
		{ "number", "x", "layer t: 'x' is no value for 'number': give a whole number or auto." },
		{ "number", "", "layer t: '' is no value for 'number': give a whole number or auto." },
		{ "number", " 1", "layer t: ' 1' is no value for 'number': give a whole number or auto." },
		{ "number", "1.5", "layer t: '1.5' is no value for 'number': give a whole number or auto." },
		{ "number", "-6", "layer t: '-6' is out of range for 'number': give -5 to 100 or auto." },
		{ "number", "101", "layer t: '101' is out of range for 'number': give -5 to 100 or auto." },
		{ "any", "9223372036854775808", "layer t: '9223372036854775808' is no value for 'any': give a whole number." },
		{ "size", "-1", "layer t: '-1' is no value for 'size': give a size such as 4096, 64K or 1.5G or none." },
		{ "size", "1K", "layer t: '1K' is out of range for 'size': give 4.0 KiB to 32 MiB or none." },
		{ "open-end", "511", "layer t: '511' is out of range for 'open-end': give 512 B or more." },
		{ "duration", "1d", "layer t: '1d' is no value for 'duration': give a duration such as 250us, 40ms, 1.5s or 2m." },
		{ "duration", "2h", "layer t: '2h' is out of range for 'duration': give 0 ns to 1h00m." },
		{ "part", "x", "layer t: 'x' is no value for 'part': give a number." },
		{ "part", "nan", "layer t: 'nan' is no value for 'part': give a number." },
		{ "part", "1e999", "layer t: '1e999' is no value for 'part': give a number." },
		{ "part", "1.1", "layer t: '1.1' is out of range for 'part': give 0 to 1." },
		{ "mode", "x", "layer t: 'x' is no value for 'mode': give one of auto, direct, managed." },
	};
	struct conf c = { 0 };
	struct far_error err;

	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++) {
		assert_int_equal(far_opt_set(table, &c, "layer t", bad[i].key, bad[i].value, &err), -EINVAL);
		assert_int_equal(err.code, EINVAL);
		assert_string_equal(err.text, bad[i].want);
		assert_int_equal(far_opt_set(table, &c, "layer t", bad[i].key, bad[i].value, NULL), -EINVAL);
	}
	assert_int_equal(far_opt_parse(table, &c, "mem:1M", "text=%4", '&', true, &err), -EINVAL);
	assert_string_equal(err.text, "mem:1M: a '%' in option 'text' needs two hexadecimal digits after it.");
	static const struct far_opt none[] = { FAR_OPT_END };
	assert_int_equal(far_opt_parse(none, NULL, "mem:1M", "x", '&', true, &err), -EINVAL);
	assert_string_equal(err.text, "mem:1M: unknown option 'x': it takes none.");
	assert_memory_equal(&c, &(struct conf){ 0 }, sizeof c);
}

static void long_texts_stay_inside_the_sentence(void **state)
{
	struct far_error err;
	struct conf c = { 0 };
	char *text = malloc(100001);

	memset(text, 'k', 100000);
	text[100000] = 0;
	assert_int_equal(far_opt_parse(table, &c, "t", text, ',', false, &err), -EINVAL);
	assert_true(strlen(err.text) < sizeof err.text);
	memcpy(text, "mode=", 5);
	assert_int_equal(far_opt_parse(table, &c, "t", text, ',', false, &err), -EINVAL);
	assert_true(strlen(err.text) < sizeof err.text);
	memcpy(text, "text=", 5);
	assert_int_equal(far_opt_parse(table, &c, "t", text, ',', false, &err), 0);
	assert_int_equal(strlen(c.text), 99995);
	far_opt_fini(table, &c);
	free(text);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(sizes_are_read),
		cmocka_unit_test(durations_are_read),
		cmocka_unit_test(sizes_and_durations_are_shown),
		cmocka_unit_test(every_kind_is_set),
		cmocka_unit_test(bools_have_many_names),
		cmocka_unit_test(each_refusal_has_its_sentence),
		cmocka_unit_test(long_texts_stay_inside_the_sentence),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
