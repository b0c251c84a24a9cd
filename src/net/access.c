/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Rules are fixed; token file and key set are replaced as a whole by a reload, which counts `round` up: what was found out
 * about a token in an older round is found out anew. Tokens are kept and compared as their SHA-256, all of them each time,
 * so that neither memory nor time tells one.
 */
#define _GNU_SOURCE
#include "net/access.h"

#include "base/thread.h"
#include "net/oidc.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ACCESS_TOKEN_MIN 16
#define ACCESS_TOKENS_MAX 4096
#define ACCESS_NAME_MAX 255

struct access_rule {
	char *name, *export; /* export NULL: all */
	enum far_right right;
};

struct access_token {
	char *name;
	uint8_t hash[32];
};

struct access_tokens {
	struct access_token *v;
	size_t n;
};

struct far_access {
	/* fixed */
	struct access_rule *rules;
	size_t rules_n;
	char *token_file, *jwks_file, *issuer, *audience;
	struct far_oidc *oidc;
	_Atomic uint64_t round;

	struct far_mutex lock;
	struct access_tokens tokens FAR_GUARDED_BY(lock);
	struct far_jwks *keys FAR_GUARDED_BY(lock);
};

struct far_caller {
	_Atomic unsigned refs;
	struct far_peer names;
	int64_t expires; /* seconds since 1970; INT64_MAX: never */
	uint64_t round;  /* of the token; 0: it has none */
};

/* --------------------------------------------------------------------------------------------------------- rules */

static int access_rule(struct access_rule *rule, const char *text, struct far_error *err)
{
	const char *eq = strrchr(text, '=');
	size_t n = eq ? strcspn(eq + 1, ":") : 0;
	bool ro = n == 2 && !strncmp(eq + 1, "ro", 2), rw = n == 2 && !strncmp(eq + 1, "rw", 2);

	if (!eq || eq == text || eq - text > ACCESS_NAME_MAX || (!ro && !rw) || (eq[1 + n] == ':' && !eq[2 + n]))
		return far_error_set(err, EINVAL, "'%.100s' is no rule: write NAME=ro or NAME=rw, and :EXPORT behind it for one export",
				     text);
	rule->right = rw ? FAR_RIGHT_WRITE : FAR_RIGHT_READ;
	rule->name = strndup(text, (size_t)(eq - text));
	rule->export = eq[1 + n] ? strdup(eq + 2 + n) : NULL;
	return rule->name && (rule->export || !eq[1 + n]) ? 0 : far_error_set(err, ENOMEM, "out of memory");
}

static int access_rules(struct far_access *a, const char *const *allow, struct far_error *err)
{
	size_t n = 0;
	int r = 0;

	while (allow && allow[n])
		n++;
	if (!n)
		return 0;
	a->rules = calloc(n, sizeof *a->rules);
	if (!a->rules)
		return far_error_set(err, ENOMEM, "out of memory");
	for (; a->rules_n < n && r == 0; a->rules_n++)
		r = access_rule(&a->rules[a->rules_n], allow[a->rules_n], err);
	return r;
}

enum far_right far_access_right(const struct far_access *a, const struct far_caller *c, const char *export, bool first)
{
	enum far_right most = a->rules_n ? FAR_RIGHT_NONE : FAR_RIGHT_WRITE;

	for (size_t i = 0; i < a->rules_n; i++) {
		const struct access_rule *rule = &a->rules[i];
		if (rule->right <= most ||
		    (rule->export && strcmp(rule->export, export) && !(first && !strcmp(rule->export, "default"))))
			continue;
		bool any = !strcmp(rule->name, "*");
		for (size_t k = 0; k < c->names.n && !any; k++)
			any = !strcmp(rule->name, c->names.names[k]);
		if (any)
			most = rule->right;
	}
	return most;
}

/* ------------------------------------------------------------------------------------------------------ token files */

static void access_tokens_free(struct access_tokens *t)
{
	for (size_t i = 0; i < t->n; i++)
		free(t->v[i].name);
	free(t->v);
	*t = (struct access_tokens){ 0 };
}

/* Letters, digits and what RFC 6750 has beside them. */
static bool access_token_ok(const char *s)
{
	size_t n = strspn(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/=");

	return n >= ACCESS_TOKEN_MIN && n <= FAR_JWT_MAX && !s[n];
}

static void access_hash(const char *token, uint8_t hash[32])
{
	unsigned n = 0;

	FAR_ASSERT(EVP_Digest(token, strlen(token), hash, &n, EVP_sha256(), NULL) == 1 && n == 32);
}

static int access_token_line(struct access_tokens *t, char *line)
{
	char *colon = strrchr(line, ':');
	const char *token = colon ? colon + 1 : line;

	if (!access_token_ok(token) || colon == line || (colon && colon - line > ACCESS_NAME_MAX) || t->n == ACCESS_TOKENS_MAX)
		return -EINVAL;
	struct access_token *v = realloc(t->v, (t->n + 1) * sizeof *v);
	if (!v)
		return -ENOMEM;
	t->v = v;
	v[t->n].name = colon ? strndup(line, (size_t)(colon - line)) : strdup("token");
	if (!v[t->n].name)
		return -ENOMEM;
	access_hash(token, v[t->n++].hash);
	return 0;
}

/* The next line that says something, without its end; NULL at the end or with *r set. */
static char *access_line(FILE *f, char **line, size_t *cap, size_t *number, size_t *bytes, int *r)
{
	for (ssize_t n; (n = getline(line, cap, f)) >= 0;) {
		char *text = *line + strspn(*line, " \t");
		++*number;
		*bytes += (size_t)n;
		if (*bytes > (4u << 20)) {
			*r = -EFBIG;
			return NULL;
		}
		text[strcspn(text, " \t\r\n")] = 0;
		if (*text && *text != '#')
			return text;
	}
	*r = ferror(f) ? -EIO : 0;
	return NULL;
}

static int access_tokens_read(const char *path, struct access_tokens *t, struct far_error *err)
{
	FILE *f = fopen(path, "re");
	char *line = NULL, *text;
	size_t cap = 0, number = 0, bytes = 0;
	int r = f ? 0 : -errno;

	while (r == 0 && (text = access_line(f, &line, &cap, &number, &bytes, &r)))
		r = access_token_line(t, text);
	if (line)
		OPENSSL_cleanse(line, cap);
	free(line);
	if (f)
		fclose(f);
	if (r == 0 && !t->n)
		return far_error_set(err, EINVAL, "the file of tokens %s has no line NAME:TOKEN", path);
	if (r)
		access_tokens_free(t);
	if (r == -EINVAL)
		return far_error_set(err, EINVAL, "line %zu of the file of tokens %s is not NAME:TOKEN with %d letters, digits or -._~+/= "
				     "at least", number, path, ACCESS_TOKEN_MIN);
	return r ? far_error_set(err, -r, "the file of tokens %s cannot be read: %s", path, far_strerror(r)) : 0;
}

int far_token_read(const char *path, char **out, struct far_error *err)
{
	FILE *f = fopen(path, "re");
	char *line = NULL, *text = NULL;
	size_t cap = 0, number = 0, bytes = 0;
	int r = f ? 0 : -errno;

	if (r == 0)
		text = access_line(f, &line, &cap, &number, &bytes, &r);
	if (text) {
		char *colon = strrchr(text, ':');
		*out = access_token_ok(colon ? colon + 1 : text) ? strdup(colon ? colon + 1 : text) : NULL;
		r = *out ? 0 : -EINVAL;
	} else if (r == 0) {
		r = -EINVAL;
	}
	if (line)
		OPENSSL_cleanse(line, cap);
	free(line);
	if (f)
		fclose(f);
	if (r == -EINVAL)
		return far_error_set(err, EINVAL, "the file %s does not begin with a token of %d to %d letters, digits or -._~+/=", path,
				     ACCESS_TOKEN_MIN, FAR_JWT_MAX);
	return r ? far_error_set(err, -r, "the token's file %s cannot be read: %s", path, far_strerror(r)) : 0;
}

/* ---------------------------------------------------------------------------------------------------------- callers */

static int access_caller(struct far_peer *names, int64_t expires, uint64_t round, struct far_caller **out)
{
	struct far_caller *c = calloc(1, sizeof *c);

	if (!c) {
		far_peer_fini(names);
		return -ENOMEM;
	}
	atomic_init(&c->refs, 1);
	c->names = *names;
	c->expires = expires;
	c->round = round;
	*names = (struct far_peer){ 0 };
	*out = c;
	return 0;
}

int far_access_peer(struct far_access *a, struct far_peer *peer, struct far_caller **out)
{
	return access_caller(peer, INT64_MAX, 0, out);
}

static int access_named(const char *name, int64_t expires, uint64_t round, struct far_caller **out)
{
	struct far_peer p = { .names = calloc(1, sizeof *p.names) };

	if (p.names && *name) {
		p.names[0] = strdup(name);
		p.n = 1;
	}
	if (!p.names || (*name && !p.names[0])) {
		far_peer_fini(&p);
		return -ENOMEM;
	}
	return access_caller(&p, expires, round, out);
}

struct far_caller *far_caller_get(struct far_caller *c)
{
	atomic_fetch_add_explicit(&c->refs, 1, memory_order_relaxed);
	return c;
}

void far_caller_put(struct far_caller *c)
{
	if (!c || atomic_fetch_sub_explicit(&c->refs, 1, memory_order_acq_rel) != 1)
		return;
	far_peer_fini(&c->names);
	free(c);
}

static int64_t access_now(void)
{
	return (int64_t)(far_wall_ms() / 1000);
}

bool far_caller_holds(const struct far_caller *c, const struct far_access *a)
{
	return !c->round || (c->round == atomic_load_explicit(&a->round, memory_order_acquire) &&
			     (c->expires == INT64_MAX || c->expires > access_now()));
}

/* ----------------------------------------------------------------------------------------------------------- tokens */

/* Among those of the file: its name (malloc'd) or NULL. */
static int access_find(struct far_access *a, const char *token, char **name)
{
	uint8_t hash[32];
	const char *found = NULL;

	*name = NULL;
	access_hash(token, hash);
	far_mutex_lock(&a->lock);
	for (size_t i = 0; i < a->tokens.n; i++)
		if (!CRYPTO_memcmp(a->tokens.v[i].hash, hash, sizeof hash))
			found = a->tokens.v[i].name;
	if (found)
		*name = strdup(found);
	far_mutex_unlock(&a->lock);
	return found && !*name ? -ENOMEM : 0;
}

/* Against one set of keys. */
static int access_signed(struct far_access *a, const char *token, struct far_jwks *keys, struct far_jwt *jwt,
			 struct far_error *err)
{
	struct far_jwt_rules rules = { .issuer = a->issuer, .audience = a->audience, .now = access_now() };
	char why[160];
	int r = far_jwt_check(token, strlen(token), keys, &rules, jwt, why, sizeof why);

	return r ? far_error_set(err, -r, "%s", why) : 0;
}

static int access_issued(struct far_access *a, const char *token, bool wait, struct far_jwt *jwt, struct far_error *err)
{
	struct far_jwks *keys = NULL, *newer = NULL;
	int r = far_oidc_keys(a->oidc, NULL, wait, &keys, err);

	if (r)
		return r;
	r = access_signed(a, token, keys, jwt, err);
	if (r == -ENOKEY) {
		r = far_oidc_keys(a->oidc, keys, wait, &newer, err);
		if (r == 0)
			r = access_signed(a, token, newer, jwt, err);
	}
	far_jwks_put(keys);
	far_jwks_put(newer);
	return r;
}

int far_access_token(struct far_access *a, const char *header, bool wait, struct far_caller **out, struct far_error *err)
{
	uint64_t round = atomic_load_explicit(&a->round, memory_order_acquire);
	FAR_CLEANUP(far_free_cleanup) char *name = NULL;
	struct far_jwt jwt;

	if (strncasecmp(header, "Bearer ", 7))
		return far_error_set(err, EACCES, "a bearer token is asked for, not another kind of credentials");
	const char *token = header + 7 + strspn(header + 7, " ");
	int r = access_find(a, token, &name);
	if (r)
		return r;
	if (name)
		return access_named(name, INT64_MAX, round, out);
	far_mutex_lock(&a->lock);
	struct far_jwks *keys = a->keys ? far_jwks_get(a->keys) : NULL;
	far_mutex_unlock(&a->lock);
	r = -EACCES;
	if (keys)
		r = access_signed(a, token, keys, &jwt, err);
	if (r && a->oidc)
		r = access_issued(a, token, wait, &jwt, err);
	far_jwks_put(keys);
	if (!keys && !a->oidc)
		return far_error_set(err, EACCES, "the token is not one of those that are known");
	if (r == -EAGAIN || r == -ENOMEM || r == -ETIMEDOUT)
		return r;
	if (r)
		return err && err->code ? (err->code = EACCES, -EACCES) : -EACCES;
	return access_named(jwt.subject, jwt.expires, round, out);
}

bool far_access_wants_token(const struct far_access *a)
{
	return a->token_file || a->jwks_file || a->oidc;
}

/* ---------------------------------------------------------------------------------------------------------- set-up */

int far_access_reload(struct far_access *a, struct far_error *err)
{
	struct access_tokens tokens = { 0 };
	struct far_jwks *keys = NULL;
	int r = a->token_file ? access_tokens_read(a->token_file, &tokens, err) : 0;

	if (r == 0 && a->jwks_file)
		r = far_jwks_read(a->jwks_file, &keys, err);
	if (r) {
		access_tokens_free(&tokens);
		return r;
	}
	far_mutex_lock(&a->lock);
	struct access_tokens old = a->tokens;
	struct far_jwks *old_keys = a->keys;
	a->tokens = tokens;
	a->keys = keys;
	far_mutex_unlock(&a->lock);
	atomic_fetch_add_explicit(&a->round, 1, memory_order_release);
	access_tokens_free(&old);
	far_jwks_put(old_keys);
	return 0;
}

static bool access_copy(char **to, const char *from)
{
	*to = from ? strdup(from) : NULL;
	return !from || *to;
}

static int access_check(const struct far_access_opts *o, struct far_error *err)
{
	bool tokens = o->jwks_file || o->oidc_issuer;

	if (o->allow && o->allow[0] && !tokens && !o->token_file && !o->named)
		return far_error_set(err, EINVAL, "rules need names, and nobody proves one: give tls-ca or tls-psk, or tokens");
	if (tokens && !o->audience)
		return far_error_set(err, EINVAL, "signed tokens are taken only for a named audience: give audience, as the issuer writes it "
				     "into tokens for this server");
	if (o->jwks_file && !o->issuer && !o->oidc_issuer)
		return far_error_set(err, EINVAL, "the set of keys %s needs the issuer whose tokens they sign", o->jwks_file);
	if (o->oidc_issuer && o->issuer && strcmp(o->issuer, o->oidc_issuer))
		return far_error_set(err, EINVAL, "there can be one issuer only: '%s' or '%s'", o->issuer, o->oidc_issuer);
	if (o->oidc_ca && !o->oidc_issuer)
		return far_error_set(err, EINVAL, "the authorities %s have no issuer that they are for", o->oidc_ca);
	return 0;
}

int far_access_new(const struct far_access_opts *o, struct far_access **out, struct far_error *err)
{
	if (!(o->allow && o->allow[0]) && !o->token_file && !o->jwks_file && !o->oidc_issuer)
		return o->oidc_ca || o->audience || o->issuer ? far_error_set(err, EINVAL, "an audience or an issuer is of use with signed "
									      "tokens only: give their keys") : 0;
	int r = access_check(o, err);
	struct far_access *a = r ? NULL : calloc(1, sizeof *a);
	if (!a)
		return r ? r : far_error_set(err, ENOMEM, "out of memory");
	far_mutex_init(&a->lock);
	atomic_init(&a->round, 1);
	if (!access_copy(&a->token_file, o->token_file) || !access_copy(&a->jwks_file, o->jwks_file) ||
	    !access_copy(&a->issuer, o->issuer ? o->issuer : o->oidc_issuer) || !access_copy(&a->audience, o->audience))
		r = far_error_set(err, ENOMEM, "out of memory");
	if (r == 0)
		r = access_rules(a, o->allow, err);
	if (r == 0 && o->oidc_issuer)
		r = far_oidc_open(o->oidc_issuer, o->oidc_ca, &a->oidc, err);
	if (r == 0)
		r = far_access_reload(a, err);
	if (r)
		far_access_free(a);
	else
		*out = a;
	return r;
}

void far_access_free(struct far_access *a) FAR_NO_TSA
{
	if (!a)
		return;
	for (size_t i = 0; i < a->rules_n; i++) {
		free(a->rules[i].name);
		free(a->rules[i].export);
	}
	free(a->rules);
	access_tokens_free(&a->tokens);
	far_jwks_put(a->keys);
	far_oidc_close(a->oidc);
	far_mutex_fini(&a->lock);
	free(a->token_file);
	free(a->jwks_file);
	free(a->issuer);
	free(a->audience);
	free(a);
}
