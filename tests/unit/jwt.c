/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Tokens and sets of keys: keys are made here, tokens are signed here, and what is wrong with each is said. */
#define _GNU_SOURCE
#include "net/jwt.h"

#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/rsa.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#define NOW 1700000000

static EVP_PKEY *rsa, *ec, *ed;
static struct far_jwks *keys;

static size_t b64(char *out, const void *data, size_t n)
{
	static const char set[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
	const uint8_t *p = data;
	size_t k = 0;

	for (size_t i = 0; i < n; i += 3) {
		uint32_t v = (uint32_t)p[i] << 16 | (i + 1 < n ? (uint32_t)p[i + 1] << 8 : 0) | (i + 2 < n ? p[i + 2] : 0);
		for (size_t j = 0; j < 4 && j <= n - i; j++)
			out[k++] = set[v >> (18 - 6 * j) & 63];
	}
	out[k] = 0;
	return k;
}

static size_t number(EVP_PKEY *key, const char *name, char *out)
{
	uint8_t raw[600];
	BIGNUM *n = NULL;

	assert_int_equal(EVP_PKEY_get_bn_param(key, name, &n), 1);
	size_t len = (size_t)BN_bn2bin(n, raw);
	BN_free(n);
	return b64(out, raw, len);
}

static size_t coordinate(EVP_PKEY *key, const char *name, char *out)
{
	uint8_t raw[32];
	BIGNUM *n = NULL;

	assert_int_equal(EVP_PKEY_get_bn_param(key, name, &n), 1);
	assert_int_equal(BN_bn2binpad(n, raw, 32), 32);
	BN_free(n);
	return b64(out, raw, 32);
}

/* The public halves as JSON. */
static char *jwk_rsa(const char *more)
{
	char n[800], e[16], *out;

	number(rsa, OSSL_PKEY_PARAM_RSA_N, n);
	number(rsa, OSSL_PKEY_PARAM_RSA_E, e);
	assert_true(asprintf(&out, "{\"kty\":\"RSA\",\"kid\":\"r\",\"n\":\"%s\",\"e\":\"%s\"%s}", n, e, more) > 0);
	return out;
}

static char *jwk_ec(const char *more)
{
	char x[64], y[64], *out;

	coordinate(ec, OSSL_PKEY_PARAM_EC_PUB_X, x);
	coordinate(ec, OSSL_PKEY_PARAM_EC_PUB_Y, y);
	assert_true(asprintf(&out, "{\"kty\":\"EC\",\"crv\":\"P-256\",\"kid\":\"e\",\"x\":\"%s\",\"y\":\"%s\"%s}", x, y, more) > 0);
	return out;
}

static char *jwk_ed(const char *more)
{
	uint8_t raw[32];
	size_t n = sizeof raw;
	char x[64], *out;

	assert_int_equal(EVP_PKEY_get_raw_public_key(ed, raw, &n), 1);
	b64(x, raw, n);
	assert_true(asprintf(&out, "{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"kid\":\"d\",\"x\":\"%s\"%s}", x, more) > 0);
	return out;
}

static struct far_jwks *set_of(const char *one, const char *two, const char *three)
{
	struct far_error err = { 0 };
	struct far_jwks *set;
	char *text;

	assert_true(asprintf(&text, "{\"keys\":[%s%s%s%s%s]}", one, two ? "," : "", two ? two : "", three ? "," : "",
			     three ? three : "") > 0);
	int r = far_jwks_parse(text, strlen(text), &set, &err);
	free(text);
	if (r)
		fail_msg("%s", err.text);
	return set;
}

/* The signature over `text`, as a token has it. */
static size_t sign(EVP_PKEY *key, const char *text, uint8_t *out)
{
	EVP_MD_CTX *ctx = EVP_MD_CTX_new();
	uint8_t raw[1100];
	size_t n = sizeof raw;

	assert_int_equal(EVP_DigestSignInit(ctx, NULL, key == ed ? NULL : EVP_sha256(), NULL, key), 1);
	assert_int_equal(EVP_DigestSign(ctx, raw, &n, (const uint8_t *)text, strlen(text)), 1);
	EVP_MD_CTX_free(ctx);
	if (key != ec) {
		memcpy(out, raw, n);
		return n;
	}
	const uint8_t *p = raw;
	ECDSA_SIG *sig = d2i_ECDSA_SIG(NULL, &p, (long)n);
	assert_non_null(sig);
	assert_int_equal(BN_bn2binpad(ECDSA_SIG_get0_r(sig), out, 32), 32);
	assert_int_equal(BN_bn2binpad(ECDSA_SIG_get0_s(sig), out + 32, 32), 32);
	ECDSA_SIG_free(sig);
	return 64;
}

static char *token(EVP_PKEY *key, const char *head, const char *claims)
{
	size_t cap = 4 * (strlen(head) + strlen(claims)) + 4096;
	char *out = malloc(cap);
	uint8_t sig[1100];
	size_t n = b64(out, head, strlen(head));

	out[n++] = '.';
	n += b64(out + n, claims, strlen(claims));
	out[n] = 0;
	size_t k = sign(key, out, sig);
	out[n++] = '.';
	b64(out + n, sig, k);
	return out;
}

static int check(const struct far_jwks *set, const char *text, struct far_jwt *out, char *why)
{
	struct far_jwt_rules rules = { .issuer = "https://us", .audience = "farpage", .now = NOW };

	return far_jwt_check(text, strlen(text), set, &rules, out, why, 160);
}

#define CLAIMS "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"sub\":\"me\",\"exp\":1700000600}"

static void expect(EVP_PKEY *key, const char *head, const char *claims, int r, const char *word)
{
	char *text = token(key, head, claims), why[160] = "";
	struct far_jwt jwt;
	int got = check(keys, text, &jwt, why);

	if (got != r || (word && !strstr(why, word)))
		fail_msg("%s %s: %d (%s), wanted %d with '%s'", head, claims, got, why, r, word ? word : "");
	free(text);
}

static int make(void **state)
{
	rsa = EVP_RSA_gen(2048);
	ec = EVP_EC_gen("P-256");
	ed = EVP_PKEY_Q_keygen(NULL, NULL, "ED25519");
	char *r = jwk_rsa(""), *e = jwk_ec(",\"alg\":\"ES256\",\"use\":\"sig\""), *d = jwk_ed("");
	keys = set_of(r, e, d);
	free(r);
	free(e);
	free(d);
	return !rsa || !ec || !ed;
}

static int unmake(void **state)
{
	EVP_PKEY_free(rsa);
	EVP_PKEY_free(ec);
	EVP_PKEY_free(ed);
	far_jwks_put(keys);
	return 0;
}

static void each_algorithm_is_verified(void **state)
{
	char *good = token(ec, "{\"alg\":\"ES256\",\"kid\":\"e\"}", CLAIMS), why[160];
	struct far_jwt jwt;

	assert_int_equal(check(keys, good, &jwt, why), 0);
	assert_string_equal(jwt.subject, "me");
	assert_int_equal(jwt.expires, 1700000660);
	free(good);
	expect(rsa, "{\"alg\":\"RS256\",\"kid\":\"r\",\"typ\":\"JWT\"}", CLAIMS, 0, NULL);
	expect(ed, "{\"alg\":\"EdDSA\",\"kid\":\"d\"}", CLAIMS, 0, NULL);
	/* Without an id: the one key that is for it. */
	expect(rsa, "{\"alg\":\"RS256\"}", CLAIMS, 0, NULL);
	expect(ec, "{\"alg\":\"ES256\",\"kid\":\"e\"}", "{\"iss\":\"https://us\",\"aud\":[\"x\",\"farpage\"],\"exp\":1700000600.5}", 0, NULL);
}

static void algorithms_cannot_be_chosen(void **state)
{
	expect(rsa, "{\"alg\":\"none\",\"kid\":\"r\"}", CLAIMS, -EACCES, "not accepted");
	expect(rsa, "{\"alg\":\"HS256\",\"kid\":\"r\"}", CLAIMS, -EACCES, "not accepted");
	expect(rsa, "{\"alg\":\"rs256\",\"kid\":\"r\"}", CLAIMS, -EACCES, "not accepted");
	expect(rsa, "{\"kid\":\"r\"}", CLAIMS, -EACCES, "not accepted");
	expect(rsa, "{\"alg\":[\"RS256\"],\"kid\":\"r\"}", CLAIMS, -EACCES, "not accepted");
	expect(rsa, "{\"alg\":\"ES256\",\"kid\":\"r\"}", CLAIMS, -EACCES, "another algorithm");
	expect(ec, "{\"alg\":\"ES256\",\"kid\":\"r\"}", CLAIMS, -EACCES, "another algorithm");
	expect(ec, "{\"alg\":\"ES256\",\"kid\":\"e\",\"crit\":[\"b64\"],\"b64\":false}", CLAIMS, -EACCES, "crit");
	expect(ec, "{\"alg\":\"ES256\",\"kid\":\"other\"}", CLAIMS, -ENOKEY, "not in the set");
	expect(ec, "{\"alg\":\"ES256\",\"kid\":7}", CLAIMS, -EACCES, "key id");
	expect(ec, "{\"alg\":\"ES256\",\"kid\":\"e\\u0000\"}", CLAIMS, -EACCES, "key id");
	/* Signed by another key than it names. */
	expect(rsa, "{\"alg\":\"EdDSA\",\"kid\":\"d\"}", CLAIMS, -EACCES, "signature");
}

static void claims_are_checked(void **state)
{
	static const char head[] = "{\"alg\":\"EdDSA\",\"kid\":\"d\"}";
	static const struct {
		const char *claims;
		int r;
		const char *word;
	} list[] = {
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\"}", -EACCES, "exp" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":\"1700000600\"}", -EACCES, "exp" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":-1}", -EACCES, "exp" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1e300}", -EACCES, "exp" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1699999940}", -EACCES, "expired" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1699999941}", 0, NULL },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1700000600,\"nbf\":1700000060}", 0, NULL },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1700000600,\"nbf\":1700000061}", -EACCES, "nbf" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1700000600,\"nbf\":\"x\"}", -EACCES, "nbf" },
		{ "{\"iss\":\"https://us/\",\"aud\":\"farpage\",\"exp\":1700000600}", -EACCES, "iss" },
		{ "{\"aud\":\"farpage\",\"exp\":1700000600}", -EACCES, "iss" },
		{ "{\"iss\":\"https://us\",\"exp\":1700000600}", -EACCES, "aud" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage2\",\"exp\":1700000600}", -EACCES, "aud" },
		{ "{\"iss\":\"https://us\",\"aud\":[[\"farpage\"]],\"exp\":1700000600}", -EACCES, "aud" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\\u0000\",\"exp\":1700000600}", -EACCES, "aud" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1700000600,\"sub\":3}", -EACCES, "sub" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1700000600,\"sub\":\"a\\u0000b\"}", -EACCES, "sub" },
		{ "{\"iss\":\"https://us\",\"aud\":\"farpage\",\"exp\":1700000600,\"sub\":\"a\\nb\"}", -EACCES, "sub" },
		{ "[]", -EACCES, "claims" },
		{ "{\"a\":[[[[[[[[[[[[1]]]]]]]]]]]]}", -EACCES, "claims" },
		{ "", -EACCES, "claims" },
	};

	for (size_t i = 0; i < FAR_ARRAY_LEN(list); i++)
		expect(ed, head, list[i].claims, list[i].r, list[i].word);
}

/* Whatever is changed about a good token: it is refused, with a sentence. */
static void a_changed_token_is_refused(void **state)
{
	char *good = token(ec, "{\"alg\":\"ES256\",\"kid\":\"e\"}", CLAIMS), why[160];
	size_t n = strlen(good);
	unsigned seed = (unsigned)time(NULL);
	struct far_jwt jwt;

	printf("seed %u\n", seed);
	srand(seed);
	for (int i = 0; i < 20000; i++) {
		char *bad = malloc(n + 3);
		size_t at = (size_t)rand() % n, len = n;
		memcpy(bad, good, n + 1);
		switch (rand() % 4) {
		case 0:
			bad[at] = (char)(1 + rand() % 255);
			break;
		case 1:
			memmove(bad + at, bad + at + 1, n - at);
			len--;
			break;
		case 2:
			memmove(bad + at + 1, bad + at, n - at + 1);
			bad[at] = good[(size_t)rand() % n];
			len++;
			break;
		default:
			len = at;
			bad[at] = 0;
		}
		why[0] = 0;
		bool same = len == n && !memcmp(bad, good, n);
		int r = check(keys, bad, &jwt, why);
		if (r == 0 ? !same : !why[0])
			fail_msg("%s: %d '%s'", bad, r, why);
		free(bad);
	}
	free(good);
	char *big = malloc(70000);
	memset(big, 'A', 69999);
	big[69999] = 0;
	assert_int_equal(check(keys, big, &jwt, why), -EACCES);
	free(big);
}

static void useless_keys_are_left_out(void **state)
{
	static const char *const bad[] = {
		"{\"kty\":\"oct\",\"kid\":\"r\",\"k\":\"c2VjcmV0\"}",
		"{\"kty\":\"RSA\",\"kid\":\"r\",\"n\":\"AQAB\",\"e\":\"AQAB\"}", /* short */
		"{\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":\"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\",\"y\":\"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\"}",
		"{\"kty\":\"EC\",\"crv\":\"P-521\",\"x\":\"AA\",\"y\":\"AA\"}",
		"{\"kty\":\"OKP\",\"crv\":\"X25519\",\"x\":\"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\"}",
		"{}", "7", "null",
	};
	struct far_error err;
	struct far_jwks *set;
	char text[600];

	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++) {
		snprintf(text, sizeof text, "{\"keys\":[%s]}", bad[i]);
		assert_int_equal(far_jwks_parse(text, strlen(text), &set, &err), -EINVAL);
		assert_non_null(strstr(err.text, "no key"));
	}
	char *wrong[] = { jwk_rsa(",\"alg\":\"RS512\""), jwk_ec(",\"use\":\"enc\""), jwk_ed(",\"alg\":\"none\"") };
	for (size_t i = 0; i < FAR_ARRAY_LEN(wrong); i++) {
		char *one;
		assert_true(asprintf(&one, "{\"keys\":[%s]}", wrong[i]) > 0);
		assert_int_equal(far_jwks_parse(one, strlen(one), &set, &err), -EINVAL);
		free(one);
		free(wrong[i]);
	}
	static const char *const none[] = { "", "[]", "{}", "{\"keys\":7}", "{\"keys\":[]} x", "{\"keys\":[}", "{\"keys\":[]}" };
	for (size_t i = 0; i < FAR_ARRAY_LEN(none); i++)
		assert_int_equal(far_jwks_parse(none[i], strlen(none[i]), &set, &err), -EINVAL);
}

static void a_token_without_an_id_does_not_choose_between_keys(void **state)
{
	char *one = jwk_ed(""), *two = jwk_ed(",\"x5t\":\"y\""), why[160];
	struct far_jwks *set = set_of(one, two, NULL);
	char *text = token(ed, "{\"alg\":\"EdDSA\"}", CLAIMS);
	struct far_jwt jwt;

	assert_int_equal(check(set, text, &jwt, why), -EACCES);
	assert_non_null(strstr(why, "several"));
	free(text);
	free(one);
	free(two);
	far_jwks_put(set);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_algorithm_is_verified),
		cmocka_unit_test(algorithms_cannot_be_chosen),
		cmocka_unit_test(claims_are_checked),
		cmocka_unit_test(a_changed_token_is_refused),
		cmocka_unit_test(useless_keys_are_left_out),
		cmocka_unit_test(a_token_without_an_id_does_not_choose_between_keys),
	};

	return cmocka_run_group_tests(tests, make, unmake);
}
