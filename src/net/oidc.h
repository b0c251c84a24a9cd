/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The keys of an OpenID Connect issuer: found by its discovery document, fetched over TLS, kept, and fetched again when they
 * are old or when a token names one that is not among them. */
#ifndef FAR_OIDC_H
#define FAR_OIDC_H

#include "net/jwt.h"

struct far_oidc;

/* issuer: "https://...". ca: PEM file of who may sign its certificate, NULL: the system's. Nothing is fetched yet. */
int far_oidc_open(const char *issuer, const char *ca, struct far_oidc **out, struct far_error *err);
void far_oidc_close(struct far_oidc *o);
/* The set of keys, with a reference. `fresh`: newer than `than`, which did not have the key. wait: fetching is allowed, until
 * the thread's deadline. -EAGAIN: it would have to be fetched; -EACCES: it was fetched a short time ago, or cannot be. */
int far_oidc_keys(struct far_oidc *o, const struct far_jwks *than, bool wait, struct far_jwks **out, struct far_error *err);

/* The pure half. A discovery document: is it the one of `issuer`, and where are the keys? *uri is malloc'd, "https://...".
 * 0, -EACCES, -ENOMEM. */
int far_oidc_document(const char *text, size_t n, const char *issuer, char **uri, struct far_error *err);

#endif
