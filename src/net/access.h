/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Who may do what. A caller is known by names: those of its certificate or shared key, which the connection has proved, or
 * the one that goes with the token it presents. Rules "NAME=ro|rw[:EXPORT]" give names rights; without any rule whoever has
 * come this far has all of them.
 */
#ifndef FAR_ACCESS_H
#define FAR_ACCESS_H

#include "net/net.h"

struct far_access;
struct far_caller;

enum far_right { FAR_RIGHT_NONE, FAR_RIGHT_READ, FAR_RIGHT_WRITE };

struct far_access_opts {
	const char *const *allow; /* ended by NULL; NULL: no rules */
	const char *token_file;   /* lines "NAME:TOKEN": who may come with a token. NULL: none */
	const char *jwks_file;    /* tokens that these keys have signed, too */
	const char *oidc_issuer, *oidc_ca; /* tokens that this issuer's keys have signed; who may sign its own certificate */
	const char *issuer, *audience;     /* of signed tokens; audience is needed with them */
	bool named;               /* connections can prove names: authorities or shared keys were given */
};

/* *out stays NULL if nothing is asked of anybody. */
int far_access_new(const struct far_access_opts *opts, struct far_access **out, struct far_error *err);
void far_access_free(struct far_access *a); /* NULL is fine; callers may outlive it */
/* Read the files again; on failure everything stays as it was. Tokens are looked at anew after it. */
int far_access_reload(struct far_access *a, struct far_error *err);
/* Whether each call must bring a token. */
bool far_access_wants_token(const struct far_access *a);

/* The caller at the other end of a connection. Takes the names over. */
int far_access_peer(struct far_access *a, struct far_peer *peer, struct far_caller **out);
/*
 * The caller with a token: `header` is the value of "authorization". 0; -EAGAIN: not without waiting (an issuer's keys must
 * be fetched) and `wait` is false; -EACCES with a sentence.
 */
int far_access_token(struct far_access *a, const char *header, bool wait, struct far_caller **out, struct far_error *err);
struct far_caller *far_caller_get(struct far_caller *c);
void far_caller_put(struct far_caller *c); /* NULL is fine */
/* Whether what was found out about it still holds: its token has not expired, no file was read again. */
bool far_caller_holds(const struct far_caller *c, const struct far_access *a);
/* What it may do with an export; the first one is also called "default". */
enum far_right far_access_right(const struct far_access *a, const struct far_caller *c, const char *export, bool first);

/* A token of a client: the first line of a file; of "NAME:TOKEN" what follows the last ':'. *out is malloc'd. */
int far_token_read(const char *path, char **out, struct far_error *err);

#endif
