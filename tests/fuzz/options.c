/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Any text as a list of options, as a size and as a duration. The first byte picks the separator and the decoding. */
#define _GNU_SOURCE
#include "base/options.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

struct conf {
	bool flag;
	int64_t number;
	uint64_t size, duration;
	double part;
	char *text;
	int mode;
	struct far_opt_list list;
};

static const char *const modes[] = { "auto", "direct", "managed", NULL };

static const struct far_opt table[] = {
	{ "f", FAR_OPT_BOOL, offsetof(struct conf, flag) },
	{ "n", FAR_OPT_INT, offsetof(struct conf, number), -5, 100, .also = "auto", .also_value = 50 },
	{ "s", FAR_OPT_SIZE, offsetof(struct conf, size), 4096, 1 << 25 },
	{ "d", FAR_OPT_DURATION, offsetof(struct conf, duration), 0, 3600e9 },
	{ "p", FAR_OPT_FLOAT, offsetof(struct conf, part), 0, 1 },
	{ "t", FAR_OPT_STRING, offsetof(struct conf, text) },
	{ "m", FAR_OPT_ENUM, offsetof(struct conf, mode), .names = modes },
	{ "l", FAR_OPT_LIST, offsetof(struct conf, list) },
	FAR_OPT_END,
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct conf c = { .size = 4096 };
	struct far_error err = { 0 };
	uint64_t v;
	char buf[32];

	if (!size)
		return 0;
	char *text = malloc(size);
	memcpy(text, data + 1, size - 1);
	text[size - 1] = 0;
	int r = far_opt_parse(table, &c, "fuzz", text, data[0] & 1 ? ',' : '&', data[0] & 2, &err);
	FAR_ASSERT(!r || (r == -EINVAL && err.code == EINVAL && err.text[0]));
	FAR_ASSERT(c.number >= -5 && c.number <= 100 && c.size >= 4096 && c.size <= 1 << 25);
	FAR_ASSERT(c.part >= 0 && c.part <= 1 && c.mode >= 0 && c.mode < 3 && c.duration <= 3600000000000);
	far_opt_fini(table, &c);
	r = far_parse_size(text, &v);
	FAR_ASSERT(!r || r == -EINVAL);
	if (!r)
		FAR_ASSERT(strlen(far_format_size(buf, 16, v)) < 16);
	r = far_parse_duration(text, &v);
	FAR_ASSERT(!r || r == -EINVAL);
	if (!r)
		FAR_ASSERT(strlen(far_format_duration(buf, 16, v)) < 16);
	free(text);
	return 0;
}
