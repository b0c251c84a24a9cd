/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 *     none --fetch--> KEYS --an hour, or an unknown key--> fetched again by one caller, the others wait for it
 *
 * Invariants:
 *  1. One caller fetches at a time, without the lock (`fetching`).
 *  2. Attempts are OIDC_PAUSE apart, whoever asks: tokens with invented key ids cost the issuer nothing.
 *  3. Keys that are here stay in use when they cannot be fetched again, for at most OIDC_OLD.
 *  4. Both documents come over TLS, from a server whose certificate was checked; no redirects, no other protocols, bounded.
 */
#define _GNU_SOURCE
#include "net/oidc.h"

#include "base/clock.h"
#include "base/thread.h"

#include <curl/curl.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OIDC_PAUSE (5 * FAR_SEC)
#define OIDC_AGE (3600 * FAR_SEC)
#define OIDC_OLD (24 * OIDC_AGE)
#define OIDC_TIMEOUT_MS 3500 /* less than a client waits for its first answer: it is to hear why */
#define OIDC_DOCUMENT_MAX (256 << 10)

struct far_oidc {
	/* fixed */
	char *issuer, *ca;

	struct far_mutex lock;
	struct far_cond cond;
	struct far_jwks *keys FAR_GUARDED_BY(lock);
	uint64_t fetched FAR_GUARDED_BY(lock), tried FAR_GUARDED_BY(lock); /* 0: never */
	bool fetching FAR_GUARDED_BY(lock);
	struct far_error error FAR_GUARDED_BY(lock); /* of the last attempt */
};

struct oidc_body {
	char *data;
	size_t n, max;
};

static size_t oidc_write_cb(char *data, size_t size, size_t n, void *opaque)
{
	struct oidc_body *b = opaque;

	if (n > b->max - b->n)
		return 0;
	memcpy(b->data + b->n, data, n);
	b->n += n;
	return n;
}

/* GET a document into b->data, which has room for b->max bytes and one more. */
static int oidc_get(struct far_oidc *o, const char *url, struct oidc_body *b, uint64_t until, struct far_error *err)
{
	char text[CURL_ERROR_SIZE] = "";
	uint64_t now = far_now();
	long ms = until > now ? (long)far_min((until - now) / FAR_MSEC + 1, OIDC_TIMEOUT_MS) : 1;
	CURL *c = curl_easy_init();
	long status = 0;

	if (!c)
		return far_error_set(err, ENOMEM, "out of memory");
	curl_easy_setopt(c, CURLOPT_URL, url);
	curl_easy_setopt(c, CURLOPT_PROTOCOLS_STR, "https");
	curl_easy_setopt(c, CURLOPT_FOLLOWLOCATION, 0L);
	curl_easy_setopt(c, CURLOPT_NOSIGNAL, 1L);
	curl_easy_setopt(c, CURLOPT_TIMEOUT_MS, ms);
	curl_easy_setopt(c, CURLOPT_SSLVERSION, (long)CURL_SSLVERSION_TLSv1_2);
	curl_easy_setopt(c, CURLOPT_WRITEFUNCTION, oidc_write_cb);
	curl_easy_setopt(c, CURLOPT_WRITEDATA, b);
	curl_easy_setopt(c, CURLOPT_ERRORBUFFER, text);
	curl_easy_setopt(c, CURLOPT_USERAGENT, "farpage/0.1");
	if (o->ca)
		curl_easy_setopt(c, CURLOPT_CAINFO, o->ca);
	CURLcode r = curl_easy_perform(c);
	curl_easy_getinfo(c, CURLINFO_RESPONSE_CODE, &status);
	curl_easy_cleanup(c);
	if (r == CURLE_WRITE_ERROR)
		return far_error_set(err, EFBIG, "%s is longer than %zu bytes", url, b->max);
	if (r != CURLE_OK)
		return far_error_set(err, EACCES, "%s cannot be fetched: %s", url, text[0] ? text : curl_easy_strerror(r));
	if (status != 200)
		return far_error_set(err, EACCES, "%s cannot be fetched: the server answers %ld", url, status);
	return 0;
}

static const char *oidc_text(struct json_object *o, const char *key)
{
	struct json_object *v;

	if (!json_object_object_get_ex(o, key, &v) || !json_object_is_type(v, json_type_string))
		return NULL;
	const char *text = json_object_get_string(v);
	return strlen(text) == (size_t)json_object_get_string_len(v) ? text : NULL;
}

int far_oidc_document(const char *text, size_t n, const char *expect, char **uri, struct far_error *err)
{
	struct json_tokener *tok = json_tokener_new_ex(16);
	struct json_object *doc = tok ? json_tokener_parse_ex(tok, text, (int)n) : NULL;
	const char *issuer = json_object_is_type(doc, json_type_object) ? oidc_text(doc, "issuer") : NULL;
	const char *keys = issuer ? oidc_text(doc, "jwks_uri") : NULL;
	int r = 0;

	json_tokener_free(tok);
	if (!issuer || strcmp(issuer, expect))
		r = far_error_set(err, EACCES, "%s has the document of another issuer: '%.100s'", expect, issuer ? issuer : "");
	else if (!keys || strncmp(keys, "https://", 8) || strlen(keys) > 2048)
		r = far_error_set(err, EACCES, "%s tells no https:// address of its keys", expect);
	else if (!(*uri = strdup(keys)))
		r = far_error_set(err, ENOMEM, "out of memory");
	json_object_put(doc);
	return r;
}

/* Where the keys are, by the issuer's own word. *uri is malloc'd. */
static int oidc_discover(struct far_oidc *o, struct oidc_body *b, uint64_t until, char **uri, struct far_error *err)
{
	FAR_CLEANUP(far_free_cleanup) char *url = NULL;
	size_t n = strlen(o->issuer);

	if (asprintf(&url, "%.*s/.well-known/openid-configuration", (int)(n - (o->issuer[n - 1] == '/')), o->issuer) < 0) {
		url = NULL;
		return far_error_set(err, ENOMEM, "out of memory");
	}
	b->n = 0;
	b->max = OIDC_DOCUMENT_MAX;
	int r = oidc_get(o, url, b, until, err);
	return r ? r : far_oidc_document(b->data, b->n, o->issuer, uri, err);
}

static int oidc_fetch(struct far_oidc *o, uint64_t until, struct far_jwks **out, struct far_error *err)
{
	FAR_CLEANUP(far_free_cleanup) char *uri = NULL;
	FAR_CLEANUP(far_free_cleanup) char *data = malloc(FAR_JWKS_MAX + 1);
	struct oidc_body b = { .data = data };

	if (!data)
		return far_error_set(err, ENOMEM, "out of memory");
	int r = oidc_discover(o, &b, until, &uri, err);
	b.n = 0;
	b.max = FAR_JWKS_MAX;
	if (r == 0)
		r = oidc_get(o, uri, &b, until, err);
	if (r == 0) {
		r = far_jwks_parse(data, b.n, out, err);
		if (r)
			far_error_prefix(err, "%s", uri);
	}
	return r;
}

int far_oidc_keys(struct far_oidc *o, const struct far_jwks *than, bool wait, struct far_jwks **out, struct far_error *err)
{
	int r = 0;

	far_mutex_lock(&o->lock);
	for (;;) {
		uint64_t now = far_now();
		bool fit = o->keys && o->keys != than;
		bool old = fit && now - o->fetched > OIDC_AGE;
		bool may = !o->fetching && (!o->tried || now - o->tried > OIDC_PAUSE);
		if (fit && (!old || !may) && now - o->fetched < OIDC_OLD)
			break;
		if (!o->fetching && !may) {
			r = o->error.code ? far_error_set(err, EACCES, "%s", o->error.text) :
				far_error_set(err, EACCES, "the token's key is not one of the issuer's");
			break;
		}
		if (!wait) {
			r = -EAGAIN;
			break;
		}
		if (o->fetching) {
			if (!far_cond_wait_until(&o->cond, &o->lock, far_deadline())) {
				r = far_error_set(err, ETIMEDOUT, "the issuer's keys did not come in time");
				break;
			}
			continue;
		}
		struct far_jwks *keys = NULL;
		struct far_error e = { 0 };
		o->fetching = true;
		o->tried = now;
		far_mutex_unlock(&o->lock);
		int f = oidc_fetch(o, now + OIDC_TIMEOUT_MS * FAR_MSEC, &keys, &e);
		if (f)
			far_log(FAR_LOG_WARNING, "oidc: %s", e.text);
		far_mutex_lock(&o->lock);
		o->fetching = false;
		o->error = e;
		if (f == 0) {
			far_jwks_put(o->keys);
			o->keys = keys;
			o->fetched = far_now();
		}
		far_cond_broadcast(&o->cond);
	}
	if (r == 0)
		*out = far_jwks_get(o->keys);
	far_mutex_unlock(&o->lock);
	return r;
}

int far_oidc_open(const char *issuer, const char *ca, struct far_oidc **out, struct far_error *err)
{
	if (strncmp(issuer, "https://", 8) || !issuer[8] || strlen(issuer) > 1024)
		return far_error_set(err, EINVAL, "the issuer of tokens must be an https:// address, not '%.100s'", issuer);
	struct far_oidc *o = calloc(1, sizeof *o);
	if (!o)
		return far_error_set(err, ENOMEM, "out of memory");
	if (curl_global_init(CURL_GLOBAL_DEFAULT)) {
		free(o);
		return far_error_set(err, ENOMEM, "libcurl cannot be set up");
	}
	o->issuer = strdup(issuer);
	o->ca = ca ? strdup(ca) : NULL;
	far_mutex_init(&o->lock);
	far_cond_init(&o->cond);
	if (!o->issuer || (ca && !o->ca)) {
		far_oidc_close(o);
		return far_error_set(err, ENOMEM, "out of memory");
	}
	*out = o;
	return 0;
}

void far_oidc_close(struct far_oidc *o) FAR_NO_TSA
{
	if (!o)
		return;
	far_jwks_put(o->keys);
	far_mutex_fini(&o->lock);
	far_cond_fini(&o->cond);
	free(o->issuer);
	free(o->ca);
	free(o);
	curl_global_cleanup();
}
