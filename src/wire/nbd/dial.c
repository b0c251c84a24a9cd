/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Opening an NBD client: URI, options, the first contact. With facts of an earlier time it opens without contact too; the
 * export is then compared when a call gets through.
 */
#define _GNU_SOURCE
#include "wire/nbd/client.h"
#include "wire/wire.h"

#include "base/clock.h"
#include "base/options.h"
#include "base/uri.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DIAL_PORT 10809
#define DIAL_KNOWN_MS 3000 /* how long a server is tried for that need not be there */
#define DIAL_NAME_MAX 4096 /* the protocol's limit of an export's name */

struct dial_conf {
	int64_t connections;
	uint64_t size, timeout, max_io;
	char *socket, *tls_certificates, *tls_psk_file;
	bool tls_verify;
};

static const struct far_opt dial_options[] = {
	{ "connections", FAR_OPT_INT, offsetof(struct dial_conf, connections), 1, FAR_NBD_CONNECTIONS, NULL, "N",
	  "connections, where the server allows more than one", "4" },
	{ "size", FAR_OPT_SIZE, offsetof(struct dial_conf, size), .value_name = "BYTES",
	  .help = "the size that the export must have" },
	{ "timeout", FAR_OPT_DURATION, offsetof(struct dial_conf, timeout), .min = 1e6, .max = 3.6e12,
	  .value_name = "TIME", .help = "how long one call may take", .def = "10s" },
	{ "max-request", FAR_OPT_SIZE, offsetof(struct dial_conf, max_io), .min = 512, .max = 32 << 20,
	  .value_name = "BYTES", .help = "longest single read or write", .def = "8M" },
	{ "socket", FAR_OPT_STRING, offsetof(struct dial_conf, socket), .value_name = "PATH",
	  .help = "unix socket (nbd+unix, nbds+unix)" },
	{ "tls-certificates", FAR_OPT_STRING, offsetof(struct dial_conf, tls_certificates), .value_name = "DIR",
	  .help = "ca-cert.pem, and client-cert.pem with client-key.pem (nbds)" },
	{ "tls-psk-file", FAR_OPT_STRING, offsetof(struct dial_conf, tls_psk_file), .value_name = "FILE",
	  .help = "pre-shared keys, one USER:KEY a line (nbds)" },
	{ "tls-verify", FAR_OPT_BOOL, offsetof(struct dial_conf, tls_verify), .help = "check the server's certificate (nbds)",
	  .def = "1" },
	FAR_OPT_END,
};

/* libnbd checks a certificate against the host's name, and not at all where there is none. */
static int dial_check_tls(const struct far_uri *u, const struct dial_conf *conf, bool tls, bool local, struct far_error *err)
{
	if (!tls && (conf->tls_certificates || conf->tls_psk_file))
		return far_error_set(err, EINVAL, "%s: 'tls-...' goes with nbds:// only: nothing is encrypted with nbd://", u->text);
	if (conf->tls_certificates && conf->tls_psk_file)
		return far_error_set(err, EINVAL, "%s: give tls-certificates or tls-psk-file, not both", u->text);
	if (tls && local && !conf->tls_psk_file && conf->tls_verify)
		return far_error_set(err, EINVAL, "%s: a unix socket has no host name that a certificate could be checked "
				     "against: use tls-psk-file=FILE, or tls-verify=0 to trust whoever answers", u->text);
	if (conf->tls_psk_file && access(conf->tls_psk_file, R_OK))
		return far_error_set(err, errno, "%s: cannot read %s: %s", u->text, conf->tls_psk_file, far_strerror(errno));
	/* Without this file libnbd would turn to other certificates by itself. */
	char ca[1024];
	int n = snprintf(ca, sizeof ca, "%s/ca-cert.pem", conf->tls_certificates ? conf->tls_certificates : "");
	if (conf->tls_certificates && (n < 0 || (size_t)n >= sizeof ca || access(ca, R_OK)))
		return far_error_set(err, ENOENT, "%s: cannot read %s/ca-cert.pem: %s", u->text, conf->tls_certificates,
				     far_strerror(errno));
	return 0;
}

static int dial_address(struct far_nbd_client *c, const struct far_uri *u, struct dial_conf *conf, struct far_error *err)
{
	bool local = !strcmp(u->variant, "unix"), tls = !strcmp(u->scheme, "nbds");
	struct far_nbd_peer *p = &c->peer;
	char where[400];

	if (local && !conf->socket)
		return far_error_set(err, EINVAL, "%s: a unix socket needs its path: %s+unix:///EXPORT?socket=PATH", u->text,
				     u->scheme);
	if (!local && (!u->host[0] || conf->socket))
		return far_error_set(err, EINVAL, "%s: %s", u->text,
				     conf->socket ? "'socket' goes with nbd+unix:// only" : "the host is missing: nbd://HOST:PORT");
	int r = dial_check_tls(u, conf, tls, local, err);
	if (r)
		return r;
	const char *name = u->path + (u->path[0] == '/');
	if (strlen(name) > DIAL_NAME_MAX)
		return far_error_set(err, ENAMETOOLONG, "the export's name is longer than %d bytes", DIAL_NAME_MAX);
	snprintf(where, sizeof where, "%.*s%s%s", (int)strcspn(u->text, "?"), u->text, local ? "?socket=" : "",
		 local ? conf->socket : "");
	p->where = strdup(where);
	p->export = strdup(name);
	p->port = u->port ? u->port : DIAL_PORT;
	p->host = local ? NULL : strdup(u->host);
	p->socket = conf->socket;
	p->tls = tls;
	p->tls_verify = conf->tls_verify;
	p->tls_certificates = conf->tls_certificates;
	p->tls_psk_file = conf->tls_psk_file;
	p->tls_username = u->user[0] ? strdup(u->user) : NULL;
	conf->socket = conf->tls_certificates = conf->tls_psk_file = NULL;
	if (!p->where || !p->export || (!local && !p->host) || (u->user[0] && !p->tls_username))
		return far_error_set(err, ENOMEM, "cannot open %s: %s", u->text, far_strerror(ENOMEM));
	return 0;
}

static int dial_facts(const struct far_nbd_client *c, const struct far_nbd_export *e, const struct far_open_opts *opts,
		      uint64_t max_io, struct far_facts *f, struct far_error *err)
{
	if (e->bytes > FAR_SIZE_MAX)
		return far_error_set(err, EFBIG, "cannot open %s: a region has less than 2^63 bytes", c->peer.where);
	if (e->bytes % e->block)
		return far_error_set(err, EINVAL, "cannot open %s: its size, %" PRIu64 " bytes, is no multiple of the server's smallest "
				     "block, %u: its end cannot be read; let the server round the size", c->peer.where, e->bytes,
				     e->block);
	if (e->read_only && !opts->read_only)
		far_log(FAR_LOG_INFO, "%s: the server lets it be read only", c->peer.where);
	*f = (struct far_facts){
		.size = sizeof *f,
		.bytes = e->bytes,
		.chunk = e->block > 1 ? e->block : 0,
		.max_io = far_max(far_min(e->max_io, max_io), e->block),
		.caps = FAR_CAP_REMOTE | (opts->read_only || e->read_only ? 0 : FAR_CAP_WRITE) |
			(e->flush ? FAR_CAP_DURABLE | FAR_CAP_FLUSH : 0),
	};
	return 0;
}

/* With facts of an earlier time: the server need not be there. */
static int dial_known(struct far_nbd_client *c, const struct far_open_opts *opts, uint64_t max_io, struct far_facts *f,
		      uint64_t *until, struct far_error *err)
{
	memcpy(f, opts->known, far_min(opts->known->size, sizeof *f));
	f->size = sizeof *f;
	f->caps |= FAR_CAP_REMOTE;
	if (opts->read_only)
		f->caps &= ~(uint32_t)FAR_CAP_WRITE;
	f->max_io = far_max(far_min(f->max_io ? f->max_io : max_io, max_io), far_max(f->chunk, 1));
	*until = far_min(*until, far_now() + DIAL_KNOWN_MS * FAR_MSEC);
	far_mutex_lock(&c->lock);
	c->facts = *f;
	c->opened = true;
	far_mutex_unlock(&c->lock);
	int r = far_nbd_client_contact(c, *until, err);
	if (!r || r == -EIO || !far_error_is_transient(r))
		return r;
	far_log(FAR_LOG_INFO, "%s: cannot be reached now (%s); opened with what was known of it", c->peer.where, far_strerror(r));
	if (err)
		*err = (struct far_error){ 0 };
	return 0;
}

static int dial(struct far_nbd_client *c, const struct far_open_opts *opts, const struct dial_conf *conf,
		struct far_backend **out, struct far_error *err)
{
	uint64_t ms = opts->deadline_ms ? opts->deadline_ms : 30000, until = far_min(far_deadline(), far_now() + ms * FAR_MSEC);
	uint64_t want = conf->size != UINT64_MAX ? conf->size : opts->bytes ? opts->bytes : UINT64_MAX;
	struct far_facts f;
	int r;

	c->timeout = conf->timeout;
	if (opts->known) {
		r = dial_known(c, opts, conf->max_io, &f, &until, err);
	} else {
		r = far_nbd_client_contact(c, until, err);
		if (!r)
			r = dial_facts(c, &c->export, opts, conf->max_io, &f, err);
	}
	if (!r && want != UINT64_MAX && want != f.bytes)
		r = far_error_set(err, EINVAL, "%s is %" PRIu64 " bytes, not %" PRIu64 ": leave ?size= away", c->peer.where, f.bytes,
				  want);
	if (!r) {
		r = far_nbd_client_start(c, &f, until, out);
		if (r)
			far_error_set(err, -r, "cannot open %s: %s", c->peer.where, far_strerror(r));
	}
	return r;
}

int far_nbd_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out, struct far_error *err)
{
	unsigned demand = opts->demand_connections, bulk = opts->bulk_connections;
	struct dial_conf conf = { .connections = (int64_t)far_min((demand ? demand : 2) + (bulk ? bulk : 2), FAR_NBD_CONNECTIONS),
				  .size = UINT64_MAX, .timeout = 10 * FAR_SEC, .max_io = 8 * FAR_MIB,
				  .tls_verify = true };
	struct far_nbd_client *c = NULL;
	int r = far_opt_parse(dial_options, &conf, u->text, u->query, '&', true, err);

	if (!r) {
		r = far_nbd_client_new((unsigned)conf.connections, &c);
		if (r)
			far_error_set(err, -r, "cannot open %s: %s", u->text, far_strerror(r));
	}
	if (!r)
		r = dial_address(c, u, &conf, err);
	if (!r)
		r = dial(c, opts, &conf, out, err);
	if (r && c)
		far_nbd_client_free(c);
	far_opt_fini(dial_options, &conf);
	return r;
}
