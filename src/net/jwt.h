/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * JSON Web Tokens (RFC 7519) signed with RS256, ES256 or EdDSA (Ed25519), and the sets of keys (RFC 7517) that they are
 * checked against. What a key may be used for is fixed when the set is read; what a token says of itself only has to fit.
 */
#ifndef FAR_JWT_H
#define FAR_JWT_H

#include "base/base.h"

#define FAR_JWT_MAX 8192          /* longest token */
#define FAR_JWKS_MAX (512 << 10)  /* longest set of keys */
#define FAR_JWT_SKEW 60           /* seconds by which clocks may differ */

struct far_jwks;

/* Keys that are of no use here (other kinds, for encryption) are left out; one at least must remain. At most 64. */
int far_jwks_parse(const char *text, size_t n, struct far_jwks **out, struct far_error *err);
int far_jwks_read(const char *path, struct far_jwks **out, struct far_error *err);
struct far_jwks *far_jwks_get(struct far_jwks *k);
void far_jwks_put(struct far_jwks *k);

struct far_jwt_rules {
	const char *issuer;   /* `iss` must be it; NULL: not looked at */
	const char *audience; /* must be in `aud`; NULL: not looked at */
	int64_t now;          /* seconds since 1970 */
};

struct far_jwt {
	char subject[256]; /* `sub`; "" if it has none */
	int64_t expires;   /* seconds since 1970, skew included */
};

/*
 * 0; -ENOKEY: the set has no key of that id, a newer set may; -EACCES: refused, `why` (n bytes) says what is wrong.
 */
int far_jwt_check(const char *token, size_t len, const struct far_jwks *keys, const struct far_jwt_rules *rules,
		  struct far_jwt *out, char *why, size_t n);

#endif
