/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Any text as a set of keys, and any text as a token against a set that is good: refused with a sentence. */
#include "net/jwt.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char good[] = "{\"keys\":[{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"kid\":\"d\",\"x\":\"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\"}]}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct far_jwks *keys;
	struct far_jwt_rules rules = { .issuer = "i", .audience = "a", .now = 1700000000 };
	struct far_error err = { 0 };
	struct far_jwks *set;
	struct far_jwt jwt;
	char why[160] = "";

	if (!keys)
		FAR_ASSERT(far_jwks_parse(good, strlen(good), &keys, NULL) == 0);
	if (far_jwks_parse((const char *)data, size, &set, &err) == 0) {
		far_jwt_check((const char *)data, size, set, &rules, &jwt, why, sizeof why);
		far_jwks_put(set);
	} else {
		FAR_ASSERT(err.code && err.text[0]);
	}
	int r = far_jwt_check((const char *)data, size, keys, &rules, &jwt, why, sizeof why);
	FAR_ASSERT((r == -EACCES || r == -ENOKEY) && why[0]);
	return 0;
}
