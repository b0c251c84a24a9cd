/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Any text as an issuer's discovery document: keys over TLS from the issuer that was asked, or a sentence. */
#define _GNU_SOURCE
#include "net/oidc.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct far_error err = { 0 };
	char *uri = NULL;

	if (size > 1 << 20)
		return 0;
	int r = far_oidc_document((const char *)data, size, "https://us", &uri, &err);
	if (r == 0) {
		FAR_ASSERT(!strncmp(uri, "https://", 8) && strlen(uri) <= 2048);
		FAR_ASSERT(memmem(data, size, "issuer", 6) || memchr(data, '\\', size)); /* it said whose it is */
	} else {
		FAR_ASSERT(r == -EACCES && !uri && err.code && err.text[0]);
	}
	free(uri);
	return 0;
}
