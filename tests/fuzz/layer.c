/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Any text as a layer: refused with a sentence, or a backend that keeps its deadline and its bytes. */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/clock.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define BYTES 5000

static unsigned char store[BYTES];

static int store_read(void *opaque, uint64_t off, void *buf, size_t len)
{
	memcpy(buf, store + off, len);
	return 0;
}

static int store_write(void *opaque, uint64_t off, const void *buf, size_t len)
{
	memcpy(store + off, buf, len);
	return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct far_backend *inner, *b;
	struct far_error err = { 0 };
	unsigned char buf[BYTES], back[BYTES];
	char *text = malloc(size + 1);

	memcpy(text, data, size);
	text[size] = 0;
	FAR_ASSERT(!far_backend_from(store_read, store_write, BYTES, NULL, NULL, &inner));
	int r = far_layer_open(text, inner, &b, &err);
	if (r) {
		FAR_ASSERT(err.code == -r && err.text[0]);
		far_close(inner);
	} else {
		uint64_t old = far_deadline_limit(far_now() + 100 * FAR_USEC);
		memset(buf, (int)size, sizeof buf);
		FAR_ASSERT(far_size(b) == BYTES);
		if (!far_write(b, 0, buf, BYTES, 0) && !far_read(b, 0, back, BYTES, 0) && !strstr(text, "corrupt"))
			FAR_ASSERT(!memcmp(buf, back, BYTES));
		if (!far_facts(b)->chunk && !far_write(b, 4990, buf + 1, 3, 0))
			FAR_ASSERT(store[4991] == buf[1]);
		far_flush(b);
		far_discard(b, 0, BYTES, 0);
		far_deadline_restore(old);
		far_close(b);
	}
	free(text);
	return 0;
}
