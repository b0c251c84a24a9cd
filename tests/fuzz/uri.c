/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Any text as a URI: it is refused with a sentence, or all its parts are there and keep their promises. */
#define _GNU_SOURCE
#include "base/uri.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct far_error err = { 0 };
	struct far_uri u, again;
	char scheme[64];
	char *text = malloc(size + 1);

	memcpy(text, data, size);
	text[size] = 0;
	int r = far_uri_parse(&u, text, &err);
	far_uri_scheme(text, scheme, sizeof scheme);
	if (r) {
		FAR_ASSERT(r == -EINVAL && err.code == EINVAL && err.text[0]);
	} else {
		FAR_ASSERT(!strcmp(u.text, text) && u.scheme[0] && u.variant && u.user && u.host && u.path && u.query);
		FAR_ASSERT(u.port >= 0 && u.port <= 65535 && (u.has_port || !u.port));
		FAR_ASSERT(!strchr(u.scheme, '+') && !strchr(u.scheme, ':'));
		FAR_ASSERT(strlen(u.path) + strlen(u.query) + strlen(u.host) + strlen(u.user) <= size);
		if (strlen(u.scheme) + strlen(u.variant) + 1 < sizeof scheme)
			FAR_ASSERT(!strncmp(scheme, u.scheme, strlen(u.scheme)));
		FAR_ASSERT(!far_uri_parse(&again, u.text, NULL) && !strcmp(again.path, u.path));
		far_uri_fini(&again);
	}
	far_uri_fini(&u);
	if (!far_uri_decode(text))
		FAR_ASSERT(strlen(text) <= size);
	free(text);
	return 0;
}
