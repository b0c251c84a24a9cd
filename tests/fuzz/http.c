/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Any bytes as the head of an HTTP answer, line by line: what is kept is whole and makes sense. */
#include "backend/http_head.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct far_http_head h = { 0 };

	for (size_t at = 0; at < size;) {
		const uint8_t *end = memchr(data + at, '\n', size - at);
		size_t n = end ? (size_t)(end - data) + 1 - at : size - at;
		char *line = malloc(n); /* exactly as long as it is: reading past it is found */
		memcpy(line, data + at, n);
		far_http_head_line(&h, line, n);
		free(line);
		at += n;
		FAR_ASSERT(h.status == 0 || (h.status >= 100 && h.status <= 999));
		FAR_ASSERT(memchr(h.tag, 0, sizeof h.tag) && memchr(h.modified, 0, sizeof h.modified));
		if (h.ranged && !h.unsatisfied)
			FAR_ASSERT(h.first <= h.last && h.last <= FAR_SIZE_MAX && (!h.has_total || h.last < h.total));
		FAR_ASSERT(h.total <= FAR_SIZE_MAX && h.length <= FAR_SIZE_MAX);
	}
	return 0;
}
