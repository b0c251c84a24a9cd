/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The one registry: scheme -> constructor. The table of the user's own schemes is the library's only list that
 * changes while it runs; entries are added at its end and never removed.
 */
#define _GNU_SOURCE
#include "open.h"

#include "backend/backend.h"
#include "base/thread.h"
#include "base/uri.h"
#include "wire/wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define OPEN_MAX_USER 32
#define OPEN_DEADLINE_MS 30000

static const struct open_leaf {
	const char *name;
	const char *variants; /* words that may follow '+', separated by blanks */
	far_leaf_open *open;
	const char *form, *help;
} open_leaves[] = {
	{ "mem", "", far_mem_open, "mem:SIZE?private=1", "memory of this process" },
	{ "file", "", far_file_open, "file:PATH?size=SIZE&direct=1", "a file or a block device" },
	{ "dir", "", far_dir_open, "dir:PATH?size=SIZE&chunk=SIZE&max-open=N", "a directory with one file a chunk" },
	{ "null", "", far_null_open, "null:SIZE", "reads zeros, forgets writes" },
	{ "grpc", "unix", far_grpc_open, "grpc://HOST:PORT/EXPORT, grpc+unix:///EXPORT?socket=PATH",
	  "a region that another farpage, or a Go program of the r3map family, serves" },
	{ "exec", "", far_exec_open, "exec:COMMAND", "what a command serves on its standard input and output" },
	{ "grpcs", "unix", far_grpc_open, "grpcs://HOST:PORT/EXPORT?tls-ca=FILE", "the same over TLS" },
	{ "nbd", "unix", far_nbd_open, "nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH", "an export of any NBD server" },
	{ "nbds", "unix", far_nbd_open, "nbds://HOST:PORT/EXPORT?tls-certificates=DIR", "the same over TLS" },
	{ "http", "", far_http_open, "http://HOST/PATH, https://HOST/PATH", "an object on a web server, to be read" },
	{ "https", "", far_http_open, "https://HOST/PATH?tls-ca=FILE", "the same over TLS" },
};

static struct far_mutex open_lock = FAR_MUTEX_INIT;
static struct open_user {
	char *name, *help;
	struct far_scheme scheme;
} open_user[OPEN_MAX_USER] FAR_GUARDED_BY(open_lock);
static size_t open_users FAR_GUARDED_BY(open_lock);

static const struct open_leaf *open_find_leaf(const char *name)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(open_leaves); i++)
		if (!strcmp(open_leaves[i].name, name))
			return &open_leaves[i];
	return NULL;
}

static bool open_find_user(const char *name, struct far_scheme *out)
{
	bool found = false;

	far_mutex_lock(&open_lock);
	for (size_t i = 0; i < open_users && !found; i++)
		if (!strcmp(open_user[i].name, name)) {
			*out = open_user[i].scheme;
			found = true;
		}
	far_mutex_unlock(&open_lock);
	return found;
}

bool far_scheme_info(size_t i, struct far_scheme_info *info)
{
	if (i < FAR_ARRAY_LEN(open_leaves)) {
		*info = (struct far_scheme_info){ open_leaves[i].form, open_leaves[i].help };
		return true;
	}
	i -= FAR_ARRAY_LEN(open_leaves);
	far_mutex_lock(&open_lock);
	bool there = i < open_users;
	if (there)
		*info = (struct far_scheme_info){ open_user[i].name, open_user[i].help };
	far_mutex_unlock(&open_lock);
	return there;
}

static bool open_name_ok(const char *s)
{
	size_t n = s ? strlen(s) : 0;
	return n && n < 32 && s[0] >= 'a' && s[0] <= 'z' && strspn(s, "abcdefghijklmnopqrstuvwxyz0123456789+-") == n;
}

/* "grpc+unix" belongs to us as "grpc" does. */
static bool open_taken(const char *name)
{
	struct far_scheme s;
	char base[32];

	snprintf(base, sizeof base, "%.*s", (int)strcspn(name, "+"), name);
	return open_find_leaf(base) || open_find_user(name, &s);
}

int far_scheme_register(const struct far_scheme *scheme)
{
	struct far_scheme copy = { 0 };

	memcpy(&copy, scheme, far_min(scheme->size, sizeof copy));
	if (!copy.open || !open_name_ok(copy.name))
		return -EINVAL;
	if (open_taken(copy.name))
		return -EEXIST;
	struct open_user u = { strdup(copy.name), strdup(copy.help ? copy.help : ""), copy };
	int r = u.name && u.help ? 0 : -ENOMEM;
	far_mutex_lock(&open_lock);
	if (!r && open_users == OPEN_MAX_USER)
		r = -ENOSPC;
	if (!r)
		open_user[open_users++] = u;
	far_mutex_unlock(&open_lock);
	if (r) {
		free(u.name);
		free(u.help);
	}
	return r;
}

static int open_unknown(const char *uri, struct far_error *err)
{
	char known[250] = "";
	size_t at = 0;

	for (size_t i = 0; i < FAR_ARRAY_LEN(open_leaves) && at < sizeof known; i++)
		at += (size_t)snprintf(known + at, sizeof known - at, "%s%s", at ? ", " : "", open_leaves[i].name);
	far_mutex_lock(&open_lock);
	for (size_t i = 0; i < open_users && at < sizeof known; i++)
		at += (size_t)snprintf(known + at, sizeof known - at, ", %s", open_user[i].name);
	far_mutex_unlock(&open_lock);
	return far_error_set(err, EINVAL, "cannot open '%.150s': unknown scheme. The known ones are %s.", uri, known);
}

static int open_no_scheme(const char *uri, struct far_error *err)
{
	struct stat st;
	const char *scheme = stat(uri, &st) == 0 && S_ISDIR(st.st_mode) ? "dir" : "file";

	return far_error_set(err, EINVAL, "cannot open '%.150s': it has no scheme. For a %s on this host write %s:%.150s.",
			     uri, scheme[0] == 'd' ? "directory" : "file", scheme, uri);
}

static bool open_variant_ok(const char *variants, const char *v)
{
	size_t n = strlen(v);

	for (const char *p = variants; n && (p = strstr(p, v)); p += n)
		if ((p == variants || p[-1] == ' ') && (!p[n] || p[n] == ' '))
			return true;
	return !n;
}

static int open_leaf(const char *uri, const struct far_open_opts *opts, struct far_backend **out, struct far_error *err)
{
	struct far_uri u;
	int r = far_uri_parse(&u, uri, err);

	if (!r) {
		const struct open_leaf *l = open_find_leaf(u.scheme);
		if (!l)
			r = open_unknown(uri, err);
		else if (!open_variant_ok(l->variants, u.variant))
			r = far_error_set(err, EINVAL, "cannot open '%.150s': '%s' cannot be combined with '+%.40s'.", uri,
					  u.scheme, u.variant);
		else
			r = l->open(&u, opts, out, err);
	}
	far_uri_fini(&u);
	return r;
}

int far_open(const char *uri, const struct far_open_opts *opts, struct far_backend **out, struct far_error *err)
{
	struct far_open_opts o = FAR_OPEN_OPTS_INIT;
	struct far_scheme user;
	char scheme[32];
	int r;

	if (opts)
		memcpy(&o, opts, far_min(opts->size, sizeof o));
	o.size = sizeof o;
	if (!o.deadline_ms)
		o.deadline_ms = OPEN_DEADLINE_MS;
	far_uri_scheme(uri, scheme, sizeof scheme);
	if (!*scheme)
		return strchr(uri, ':') && uri[strcspn(uri, "/:")] == ':' && uri[0] != '.' ? open_unknown(uri, err) :
											      open_no_scheme(uri, err);
	if (err)
		*err = (struct far_error){ 0 };
	if (open_find_user(scheme, &user))
		r = user.open(user.opaque, uri, &o, out, err);
	else
		r = open_leaf(uri, &o, out, err);
	if (r && err && !err->code)
		far_error_set(err, -r, "cannot open '%.150s': %s.", uri, far_strerror(r));
	if (!r && o.read_only)
		far_backend_set_read_only(*out);
	return r;
}
