/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "base/uri.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int uri_hex(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c = (char)tolower((unsigned char)c);
	return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int far_uri_decode(char *s)
{
	char *to = s;

	/* Checked first, so that a message can still show the text as it was given. */
	for (const char *p = s; *p; p++)
		if (*p == '%' && (uri_hex(p[1]) < 0 || uri_hex(p[2]) < 0 || (p[1] == '0' && p[2] == '0')))
			return -EINVAL;
	for (; *s; s++) {
		if (*s == '%') {
			*to++ = (char)(uri_hex(s[1]) * 16 + uri_hex(s[2]));
			s += 2;
		} else {
			*to++ = *s;
		}
	}
	*to = 0;
	return 0;
}

/* Length of the scheme (with "+variant") before the ':', 0 if there is none. */
static size_t uri_scheme_len(const char *text)
{
	size_t n = 0;

	if (!isalpha((unsigned char)text[0]))
		return 0;
	while (isalnum((unsigned char)text[n]) || text[n] == '+' || text[n] == '-')
		n++;
	return text[n] == ':' ? n : 0;
}

void far_uri_scheme(const char *text, char *buf, size_t n)
{
	size_t len = uri_scheme_len(text);

	if (len >= n)
		len = 0;
	for (size_t i = 0; i < len; i++)
		buf[i] = (char)tolower((unsigned char)text[i]);
	buf[len] = 0;
}

static int uri_nomem(struct far_error *err)
{
	return far_error_set(err, ENOMEM, "%s", far_strerror(ENOMEM));
}

static int uri_bad(const struct far_uri *u, struct far_error *err, const char *why)
{
	return far_error_set(err, EINVAL, "'%.200s' is no URI: %s.", u->text, why);
}

static int uri_port(struct far_uri *u, const char *p, struct far_error *err)
{
	unsigned port = 0;

	if (!*p)
		return uri_bad(u, err, "a number must follow the ':' after the host");
	for (; *p; p++) {
		if (!isdigit((unsigned char)*p) || (port = port * 10 + (unsigned)(*p - '0')) > 65535)
			return uri_bad(u, err, "the port must be a number from 0 to 65535");
	}
	u->port = (int)port;
	u->has_port = true;
	return 0;
}

/* [user@]host[:port]; `text` is ours to cut. */
static int uri_authority(struct far_uri *u, char *text, struct far_error *err)
{
	char *at = strrchr(text, '@'), *host = text, *port = NULL;

	if (at) {
		*at = 0;
		host = at + 1;
	}
	free(u->user);
	u->user = strdup(at ? text : "");
	if (!u->user)
		return uri_nomem(err);
	if (*host == '[') {
		char *end = strchr(++host, ']');
		if (!end || (end[1] && end[1] != ':'))
			return uri_bad(u, err, "an IPv6 address stands in brackets, as in [::1]:1337");
		port = end[1] ? end + 2 : NULL;
		*end = 0;
	} else if ((port = strchr(host, ':'))) {
		*port++ = 0;
		if (strchr(port, ':'))
			return uri_bad(u, err, "an IPv6 address stands in brackets, as in [::1]:1337");
	}
	free(u->host);
	u->host = strdup(host);
	if (!u->host)
		return uri_nomem(err);
	if (far_uri_decode(u->user) || far_uri_decode(u->host))
		return uri_bad(u, err, "a '%' needs two hexadecimal digits after it");
	for (const char *p = u->host; *p; p++)
		if (isspace((unsigned char)*p) || iscntrl((unsigned char)*p))
			return uri_bad(u, err, "the host has a blank in it");
	return port ? uri_port(u, port, err) : 0;
}

static bool uri_literal(const char *s)
{
	return !strcmp(s, "exec") || !strcmp(s, "stdio");
}

static int uri_set_scheme(struct far_uri *u, size_t len, struct far_error *err)
{
	u->scheme = strndup(u->text, len);
	if (!u->scheme)
		return uri_nomem(err);
	for (char *p = u->scheme; *p; p++)
		*p = (char)tolower((unsigned char)*p);
	char *plus = strchr(u->scheme, '+');
	u->variant = strdup(plus ? plus + 1 : "");
	if (!u->variant)
		return uri_nomem(err);
	if (plus)
		*plus = 0;
	return 0;
}

int far_uri_parse(struct far_uri *u, const char *text, struct far_error *err)
{
	*u = (struct far_uri){ 0 };
	u->text = strdup(text);
	if (!u->text)
		return uri_nomem(err);
	size_t len = uri_scheme_len(text);
	if (!len)
		return uri_bad(u, err, "it must begin with a scheme such as file: or grpc:");
	int r = uri_set_scheme(u, len, err);
	if (r)
		return r;
	const char *rest = text + len + 1;
	bool literal = uri_literal(u->scheme) || uri_literal(u->variant);
	const char *query = literal ? NULL : strchr(rest, '?');
	const char *end = query ? query : rest + strlen(rest);

	u->query = strdup(query ? query + 1 : "");
	u->user = strdup("");
	u->host = strdup("");
	if (!u->query || !u->user || !u->host)
		return uri_nomem(err);
	if (!literal && rest[0] == '/' && rest[1] == '/') {
		const char *from = rest + 2;
		const char *slash = memchr(from, '/', (size_t)(end - from));
		rest = slash ? slash : end;
		u->authority = true;
		FAR_CLEANUP(far_free_cleanup) char *part = strndup(from, (size_t)(rest - from));
		r = part ? uri_authority(u, part, err) : uri_nomem(err);
		if (r)
			return r;
	}
	u->path = strndup(rest, (size_t)(end - rest));
	if (!u->path)
		return uri_nomem(err);
	if (!literal && far_uri_decode(u->path))
		return uri_bad(u, err, "a '%' needs two hexadecimal digits after it; write %25 for '%' itself");
	return 0;
}

void far_uri_fini(struct far_uri *u)
{
	free(u->text);
	free(u->scheme);
	free(u->variant);
	free(u->user);
	free(u->host);
	free(u->path);
	free(u->query);
	*u = (struct far_uri){ 0 };
}

bool far_uri_encode(const char *s, char *buf, size_t n)
{
	static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/";
	size_t at = 0;

	for (; *s && at + 4 <= n; s++) {
		if (strchr(plain, *s))
			buf[at++] = *s;
		else
			at += (size_t)snprintf(buf + at, n - at, "%%%02X", (unsigned)(unsigned char)*s);
	}
	if (n)
		buf[at < n ? at : n - 1] = 0;
	return !*s;
}
