/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* URIs as farpage writes them: SCHEME[+unix]://[user@]host[:port]/path?key=value, and SCHEME:rest (mem:, file:, ...).
 * Percent-decoding in path and values; the first '?' starts the query. */
#ifndef FAR_URI_H
#define FAR_URI_H

#include "base/base.h"

struct far_uri {
	char *text;    /* the whole, as given */
	char *scheme;  /* lower case, without "+unix": "grpc" */
	char *variant; /* what followed '+': "unix", "exec", "stdio", "http"; "" if nothing */
	char *user;    /* decoded; "" if none */
	char *host;    /* decoded, brackets of an IPv6 address removed; "" if none */
	int port;      /* 0: none given, or ":0" */
	bool has_port; /* ":PORT" was there */
	char *path;    /* decoded; of "mem:64M" it is "64M", of "grpc://h/x" it is "/x"; "" if none */
	char *query;   /* raw, without '?'; "" if none */
	bool authority; /* "//" was there */
};

/* -EINVAL with a sentence. Everything is freed by far_uri_fini(), also after failure. exec: and stdio: take the rest
 * literally as path, without a query. */
int far_uri_parse(struct far_uri *u, const char *text, struct far_error *err);
void far_uri_fini(struct far_uri *u);
/* The scheme of `text` alone with its "+variant", in lower case, into buf; "" if it has none or does not fit. A path such as ./x or /x has none. */
void far_uri_scheme(const char *text, char *buf, size_t n);
/* `s` as a path or a value in a URI: what means something there becomes %XX. False: it does not fit into n bytes. */
bool far_uri_encode(const char *s, char *buf, size_t n);
/* Decode %XX in place. -EINVAL: a '%' without two hexadecimal digits, or %00. */
int far_uri_decode(char *s);

#endif
