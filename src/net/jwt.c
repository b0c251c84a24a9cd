/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "net/jwt.h"


#include <json-c/json.h>
#include <openssl/bn.h>
#include <openssl/core_names.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/param_build.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define JWT_KEYS_MAX 64
#define JWT_DEPTH 8          /* of JSON */
#define JWT_NAME_MAX 255     /* kid, sub */
#define JWT_RSA_MIN 2048
#define JWT_RSA_MAX 8192

enum jwt_alg { JWT_RS256, JWT_ES256, JWT_EDDSA, JWT_ALGS };

static const char *const jwt_names[JWT_ALGS] = { "RS256", "ES256", "EdDSA" };

struct jwt_key {
	char *kid; /* NULL: it has none */
	enum jwt_alg alg;
	EVP_PKEY *key;
};

struct far_jwks {
	_Atomic unsigned refs;
	struct jwt_key *keys;
	size_t n;
};

/* ------------------------------------------------------------------------------------------------------- pieces */

/* base64url without padding. Its length, or -1: other characters, an impossible length, bits that mean nothing. */
static ssize_t jwt_decode(const char *text, size_t n, uint8_t *out, size_t cap)
{
	uint32_t bits = 0;
	size_t k = 0;

	if (n % 4 == 1 || n / 4 * 3 + (n % 4 ? n % 4 - 1 : 0) > cap)
		return -1;
	for (size_t i = 0; i < n; i++) {
		char c = text[i];
		int v = c >= 'A' && c <= 'Z' ? c - 'A' : c >= 'a' && c <= 'z' ? c - 'a' + 26 : c >= '0' && c <= '9' ? c - '0' + 52 :
			c == '-' ? 62 : c == '_' ? 63 : -1;
		if (v < 0)
			return -1;
		bits = bits << 6 | (uint32_t)v;
		if (i % 4)
			out[k++] = (uint8_t)(bits >> (6 - 2 * (i % 4)));
	}
	/* What the last character has beyond whole bytes is zero: there is one way only to write a token. */
	if ((n % 4 == 2 && bits & 15) || (n % 4 == 3 && bits & 3))
		return -1;
	return (ssize_t)k;
}

/* An object, whole, and nothing behind it. NULL: it is none. */
static struct json_object *jwt_json(const char *text, size_t n)
{
	struct json_tokener *tok = n <= INT32_MAX ? json_tokener_new_ex(JWT_DEPTH) : NULL;

	if (!tok)
		return NULL;
	json_tokener_set_flags(tok, JSON_TOKENER_STRICT);
	struct json_object *o = json_tokener_parse_ex(tok, text, (int)n);
	bool whole = json_tokener_get_error(tok) == json_tokener_success;
	json_tokener_free(tok);
	if (whole && json_object_is_type(o, json_type_object))
		return o;
	json_object_put(o);
	return NULL;
}

/* A text of an object; NULL: it has none, or one with a zero byte in it or longer than max. */
static const char *jwt_text(struct json_object *o, const char *key, size_t max)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, key, &v) || !json_object_is_type(v, json_type_string))
		return NULL;
	size_t n = (size_t)json_object_get_string_len(v);
	const char *s = json_object_get_string(v);
	return n <= max && strlen(s) == n ? s : NULL;
}

static bool jwt_has(struct json_object *o, const char *key)
{
	return json_object_object_get_ex(o, key, NULL);
}

/* A NumericDate: 0 and its seconds, -ENOENT: not there, -EINVAL: no number, or one that is no time. */
static int jwt_time(struct json_object *o, const char *key, int64_t *out)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, key, &v))
		return -ENOENT;
	double d = json_object_get_double(v);
	if ((!json_object_is_type(v, json_type_int) && !json_object_is_type(v, json_type_double)) || !(d >= 0 && d < 1e15))
		return -EINVAL;
	*out = (int64_t)d;
	return 0;
}

/* --------------------------------------------------------------------------------------------------- sets of keys */

/* A number of a key: base64url, big end first. */
static BIGNUM *jwt_number(struct json_object *o, const char *key, size_t max)
{
	uint8_t raw[JWT_RSA_MAX / 8];
	const char *text = jwt_text(o, key, sizeof raw * 2);
	ssize_t n = text ? jwt_decode(text, strlen(text), raw, far_min(max, sizeof raw)) : -1;

	return n > 0 ? BN_bin2bn(raw, (int)n, NULL) : NULL;
}

static EVP_PKEY *jwt_make(const char *type, OSSL_PARAM_BLD *b)
{
	OSSL_PARAM *params = OSSL_PARAM_BLD_to_param(b);
	EVP_PKEY_CTX *ctx = EVP_PKEY_CTX_new_from_name(NULL, type, NULL);
	EVP_PKEY *key = NULL;

	if (params && ctx && EVP_PKEY_fromdata_init(ctx) == 1 &&
	    EVP_PKEY_fromdata(ctx, &key, EVP_PKEY_PUBLIC_KEY, params) != 1)
		key = NULL;
	EVP_PKEY_CTX_free(ctx);
	OSSL_PARAM_free(params);
	return key;
}

static EVP_PKEY *jwt_rsa(struct json_object *o)
{
	BIGNUM *n = jwt_number(o, "n", JWT_RSA_MAX / 8), *e = jwt_number(o, "e", 8);
	OSSL_PARAM_BLD *b = OSSL_PARAM_BLD_new();
	EVP_PKEY *key = NULL;

	if (n && e && b && BN_num_bits(n) >= JWT_RSA_MIN && BN_num_bits(n) <= JWT_RSA_MAX && BN_is_odd(e) && !BN_is_one(e) &&
	    OSSL_PARAM_BLD_push_BN(b, OSSL_PKEY_PARAM_RSA_N, n) && OSSL_PARAM_BLD_push_BN(b, OSSL_PKEY_PARAM_RSA_E, e))
		key = jwt_make("RSA", b);
	OSSL_PARAM_BLD_free(b);
	BN_free(n);
	BN_free(e);
	return key;
}

static EVP_PKEY *jwt_ec(struct json_object *o)
{
	const char *x = jwt_text(o, "x", 64), *y = jwt_text(o, "y", 64);
	uint8_t point[65] = { 4 }; /* uncompressed */
	OSSL_PARAM_BLD *b = OSSL_PARAM_BLD_new();
	EVP_PKEY *key = NULL;

	if (x && y && b && jwt_decode(x, strlen(x), point + 1, 32) == 32 && jwt_decode(y, strlen(y), point + 33, 32) == 32 &&
	    OSSL_PARAM_BLD_push_utf8_string(b, OSSL_PKEY_PARAM_GROUP_NAME, "prime256v1", 0) &&
	    OSSL_PARAM_BLD_push_octet_string(b, OSSL_PKEY_PARAM_PUB_KEY, point, sizeof point))
		key = jwt_make("EC", b);
	OSSL_PARAM_BLD_free(b);
	return key;
}

static EVP_PKEY *jwt_ed25519(struct json_object *o)
{
	const char *x = jwt_text(o, "x", 64);
	uint8_t raw[32];

	if (!x || jwt_decode(x, strlen(x), raw, sizeof raw) != sizeof raw)
		return NULL;
	return EVP_PKEY_new_raw_public_key(EVP_PKEY_ED25519, NULL, raw, sizeof raw);
}

/* What a key is, by its own kind; what it says of `alg` must not be something else. False: of no use here. */
static bool jwt_key(struct json_object *o, struct jwt_key *k)
{
	const char *kty = jwt_text(o, "kty", 16), *crv = jwt_text(o, "crv", 16), *alg = jwt_text(o, "alg", 16);
	const char *use = jwt_text(o, "use", 16), *kid = jwt_text(o, "kid", JWT_NAME_MAX);

	if (!kty || (jwt_has(o, "use") && (!use || strcmp(use, "sig"))) || (jwt_has(o, "kid") && !kid))
		return false;
	if (!strcmp(kty, "RSA"))
		k->alg = JWT_RS256;
	else if (!strcmp(kty, "EC") && crv && !strcmp(crv, "P-256"))
		k->alg = JWT_ES256;
	else if (!strcmp(kty, "OKP") && crv && !strcmp(crv, "Ed25519"))
		k->alg = JWT_EDDSA;
	else
		return false;
	if (jwt_has(o, "alg") && (!alg || strcmp(alg, jwt_names[k->alg])))
		return false;
	k->key = k->alg == JWT_RS256 ? jwt_rsa(o) : k->alg == JWT_ES256 ? jwt_ec(o) : jwt_ed25519(o);
	ERR_clear_error();
	if (!k->key)
		return false;
	k->kid = kid ? strdup(kid) : NULL;
	return true;
}

int far_jwks_parse(const char *text, size_t n, struct far_jwks **out, struct far_error *err)
{
	struct json_object *o = n <= FAR_JWKS_MAX ? jwt_json(text, n) : NULL, *list;
	struct far_jwks *set = calloc(1, sizeof *set);
	int r = set ? 0 : far_error_set(err, ENOMEM, "out of memory");

	if (set)
		atomic_init(&set->refs, 1);
	if (r == 0 && (!o || !json_object_object_get_ex(o, "keys", &list) || !json_object_is_type(list, json_type_array)))
		r = far_error_set(err, EINVAL, "it is no set of keys: no JSON object with a list 'keys', or longer than %d bytes",
				  FAR_JWKS_MAX);
	size_t many = r == 0 ? json_object_array_length(list) : 0;
	if (r == 0 && many > JWT_KEYS_MAX)
		r = far_error_set(err, EINVAL, "it has %zu keys, %d are allowed", many, JWT_KEYS_MAX);
	if (r == 0 && !(set->keys = calloc(many ? many : 1, sizeof *set->keys)))
		r = far_error_set(err, ENOMEM, "out of memory");
	for (size_t i = 0; r == 0 && i < many; i++) {
		struct json_object *one = json_object_array_get_idx(list, i);
		if (json_object_is_type(one, json_type_object) && jwt_key(one, &set->keys[set->n]))
			set->n++;
	}
	if (r == 0 && !set->n)
		r = far_error_set(err, EINVAL, "it has no key for RS256 (2048 to 8192 bits), ES256 or EdDSA (Ed25519)");
	json_object_put(o);
	if (r)
		far_jwks_put(set);
	else
		*out = set;
	return r;
}

int far_jwks_read(const char *path, struct far_jwks **out, struct far_error *err)
{
	FILE *f = fopen(path, "re");
	char *text = f ? malloc(FAR_JWKS_MAX + 1) : NULL;
	int r = f ? text ? 0 : -ENOMEM : -errno;
	size_t n = 0;

	if (r == 0)
		n = fread(text, 1, FAR_JWKS_MAX + 1, f);
	if (r == 0 && ferror(f))
		r = -EIO;
	if (r)
		far_error_set(err, -r, "the set of keys %s cannot be read: %s", path, far_strerror(r));
	else if ((r = far_jwks_parse(text, n, out, err)) != 0)
		far_error_prefix(err, "the set of keys %s", path);
	if (f)
		fclose(f);
	free(text);
	return r;
}

struct far_jwks *far_jwks_get(struct far_jwks *k)
{
	atomic_fetch_add_explicit(&k->refs, 1, memory_order_relaxed);
	return k;
}

void far_jwks_put(struct far_jwks *k)
{
	if (!k || atomic_fetch_sub_explicit(&k->refs, 1, memory_order_acq_rel) != 1)
		return;
	for (size_t i = 0; i < k->n; i++) {
		free(k->keys[i].kid);
		EVP_PKEY_free(k->keys[i].key);
	}
	free(k->keys);
	free(k);
}

/* -------------------------------------------------------------------------------------------------------- tokens */

static int jwt_refuse(char *why, size_t n, const char *text)
{
	snprintf(why, n, "%s", text);
	return -EACCES;
}

/* r and s of 32 bytes each as ECDSA's own form. Its length, 0: failed. */
static size_t jwt_es256_form(const uint8_t *raw, uint8_t *out, size_t cap)
{
	ECDSA_SIG *sig = ECDSA_SIG_new();
	BIGNUM *r = BN_bin2bn(raw, 32, NULL), *s = BN_bin2bn(raw + 32, 32, NULL);
	int n = 0;

	if (sig && r && s && ECDSA_SIG_set0(sig, r, s)) {
		r = s = NULL; /* they are the signature's */
		n = i2d_ECDSA_SIG(sig, NULL);
		uint8_t *p = out;
		n = n > 0 && (size_t)n <= cap ? i2d_ECDSA_SIG(sig, &p) : 0;
	}
	BN_free(r);
	BN_free(s);
	ECDSA_SIG_free(sig);
	return n > 0 ? (size_t)n : 0;
}

static bool jwt_verify(const struct jwt_key *k, const char *text, size_t n, const uint8_t *sig, size_t sig_n)
{
	uint8_t form[80];
	bool ok = false;

	if (k->alg == JWT_ES256) {
		if (sig_n != 64)
			return false;
		sig_n = jwt_es256_form(sig, form, sizeof form);
		sig = form;
	}
	EVP_MD_CTX *ctx = EVP_MD_CTX_new();
	if (ctx && sig_n && EVP_DigestVerifyInit(ctx, NULL, k->alg == JWT_EDDSA ? NULL : EVP_sha256(), NULL, k->key) == 1)
		ok = EVP_DigestVerify(ctx, sig, sig_n, (const uint8_t *)text, n) == 1;
	EVP_MD_CTX_free(ctx);
	ERR_clear_error();
	return ok;
}

/* The key for a token's header. *out NULL: none of that id. */
static int jwt_pick(struct json_object *head, const struct far_jwks *set, const struct jwt_key **out, char *why, size_t n)
{
	const char *alg = jwt_text(head, "alg", 16), *kid = jwt_text(head, "kid", JWT_NAME_MAX);
	const struct jwt_key *found = NULL;
	size_t fits = 0;
	int want = -1;

	for (int i = 0; i < JWT_ALGS && alg; i++)
		if (!strcmp(alg, jwt_names[i]))
			want = i;
	if (want < 0)
		return jwt_refuse(why, n, "the token is signed in a way that is not accepted: RS256, ES256 and EdDSA are");
	if (jwt_has(head, "crit"))
		return jwt_refuse(why, n, "the token's header wants something that is not known here (crit)");
	if (jwt_has(head, "kid") && !kid)
		return jwt_refuse(why, n, "the token's key id is no text of at most 255 bytes");
	for (size_t i = 0; i < set->n; i++) {
		const struct jwt_key *k = &set->keys[i];
		bool same = kid ? k->kid && !strcmp(k->kid, kid) : true;
		/* Found by its id alone: a token cannot choose what a key is used for. */
		if (kid && same && (int)k->alg != want)
			return jwt_refuse(why, n, "the token says another algorithm than its key is for");
		if (same && (int)k->alg == want) {
			found = k;
			fits++;
		}
	}
	if (!kid && fits > 1)
		return jwt_refuse(why, n, "the token names no key, and there are several");
	*out = found;
	return 0;
}

static bool jwt_for(struct json_object *claims, const char *audience)
{
	struct json_object *v;

	if (!json_object_object_get_ex(claims, "aud", &v))
		return false;
	size_t many = json_object_is_type(v, json_type_array) ? json_object_array_length(v) : 1;
	for (size_t i = 0; i < far_min(many, 64); i++) {
		struct json_object *one = json_object_is_type(v, json_type_array) ? json_object_array_get_idx(v, i) : v;
		if (json_object_is_type(one, json_type_string) &&
		    (size_t)json_object_get_string_len(one) == strlen(audience) && !strcmp(json_object_get_string(one), audience))
			return true;
	}
	return false;
}

static int jwt_claims(struct json_object *c, const struct far_jwt_rules *rules, struct far_jwt *out, char *why, size_t n)
{
	const char *iss = jwt_text(c, "iss", 1024), *sub = jwt_text(c, "sub", JWT_NAME_MAX);
	int64_t exp, nbf;

	if (jwt_time(c, "exp", &exp))
		return jwt_refuse(why, n, "the token does not say until when it is good (exp)");
	if (exp + FAR_JWT_SKEW <= rules->now)
		return jwt_refuse(why, n, "the token has expired; get a new one");
	int r = jwt_time(c, "nbf", &nbf);
	if (r == -EINVAL || (r == 0 && nbf > rules->now + FAR_JWT_SKEW))
		return jwt_refuse(why, n, "the token is not good yet (nbf); is the clock right?");
	if (rules->issuer && (!iss || strcmp(iss, rules->issuer)))
		return jwt_refuse(why, n, "the token is from another issuer (iss)");
	if (rules->audience && !jwt_for(c, rules->audience))
		return jwt_refuse(why, n, "the token is for somebody else (aud)");
	if (jwt_has(c, "sub") && !sub)
		return jwt_refuse(why, n, "the token's subject is no text of at most 255 bytes (sub)");
	for (const char *p = sub; p && *p; p++)
		if ((unsigned char)*p < ' ' || *p == 127)
			return jwt_refuse(why, n, "the token's subject has control characters in it (sub)");
	out->expires = exp + FAR_JWT_SKEW;
	snprintf(out->subject, sizeof out->subject, "%s", sub ? sub : "");
	return 0;
}

/* One part of the token as JSON. */
static struct json_object *jwt_part(const char *text, size_t n, uint8_t *buf, size_t cap)
{
	ssize_t k = jwt_decode(text, n, buf, cap);

	return k > 0 ? jwt_json((const char *)buf, (size_t)k) : NULL;
}

int far_jwt_check(const char *token, size_t len, const struct far_jwks *keys, const struct far_jwt_rules *rules,
		  struct far_jwt *out, char *why, size_t n)
{
	uint8_t buf[FAR_JWT_MAX], sig[JWT_RSA_MAX / 8];
	const struct jwt_key *key = NULL;

	if (len > FAR_JWT_MAX)
		return jwt_refuse(why, n, "the token is longer than 8192 bytes");
	const char *dot = memchr(token, '.', len), *end = token + len;
	const char *dot2 = dot ? memchr(dot + 1, '.', (size_t)(end - dot) - 1) : NULL;
	if (!dot2 || memchr(dot2 + 1, '.', (size_t)(end - dot2) - 1))
		return jwt_refuse(why, n, "the token does not have three parts");
	struct json_object *head = jwt_part(token, (size_t)(dot - token), buf, sizeof buf);
	int r = head ? jwt_pick(head, keys, &key, why, n) : jwt_refuse(why, n, "the token's header is no JSON in base64url");
	json_object_put(head);
	if (r)
		return r;
	if (!key) {
		jwt_refuse(why, n, "the token is signed with a key that is not in the set");
		return -ENOKEY;
	}
	ssize_t sig_n = jwt_decode(dot2 + 1, (size_t)(end - dot2) - 1, sig, sizeof sig);
	if (sig_n <= 0 || !jwt_verify(key, token, (size_t)(dot2 - token), sig, (size_t)sig_n))
		return jwt_refuse(why, n, "the token's signature is wrong");
	/* Nothing that it claims is looked at before this. */
	struct json_object *claims = jwt_part(dot + 1, (size_t)(dot2 - dot) - 1, buf, sizeof buf);
	r = claims ? jwt_claims(claims, rules, out, why, n) : jwt_refuse(why, n, "the token's claims are no JSON in base64url");
	json_object_put(claims);
	return r;
}
