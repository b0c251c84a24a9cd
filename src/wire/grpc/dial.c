/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Opening a client: options, address, the first contact. With facts of an earlier time it opens without contact too: what
 * the peer is and keeps is then found by the first hello that gets through (hello.c), on behalf of whichever call dials.
 */
#define _GNU_SOURCE
#include "wire/grpc/client.h"
#include "wire/wire.h"

#include "base/options.h"
#include "base/uri.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define DIAL_PLAIN_MAX (2 * FAR_MIB)
#define DIAL_MAX_IO (8 * FAR_MIB)
#define DIAL_PORT 1337
#define DIAL_KNOWN_MS 3000 /* how long a peer is tried for that need not be there */
#define DIAL_TRIES 3       /* when the first answer was garbled */

void far_client_free(struct far_client *c)
{
	far_plain_free(c);
	far_lanes_fini(&c->lanes);
	far_mutex_fini(&c->lock);
	far_cond_fini(&c->cond);
	free(c->export);
	free(c);
}

static uint64_t dial_random(void)
{
	uint64_t v = 0;

	if (getrandom(&v, sizeof v, GRND_NONBLOCK) != sizeof v)
		v = far_now() * 6364136223846793005 ^ (uint64_t)getpid() << 40;
	return v ? v : 1;
}

static struct far_client *dial_new(const char *where, const char *export, const struct far_open_opts *opts)
{
	struct far_client *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	c->export = strdup(export);
	if (!c->export || far_lanes_init(&c->lanes, where, opts->demand_connections ? opts->demand_connections : 2,
					 opts->bulk_connections ? opts->bulk_connections : 2)) {
		free(c->export);
		free(c);
		return NULL;
	}
	far_mutex_init(&c->lock);
	far_cond_init(&c->cond);
	c->export_n = strlen(export);
	c->where = c->lanes.where;
	atomic_store_explicit(&c->shortest, FAR_NEVER, memory_order_relaxed);
	c->timeout = 10 * FAR_SEC;
	c->writable = !opts->read_only;
	c->no_sums = opts->no_checksums;
	c->session = dial_random();
	c->generation = 1;
	c->lanes.greet = far_hello_greet;
	c->lanes.opaque = c;
	return c;
}

/* Dial, and let the peer describe itself. */
static int dial_contact(struct far_client *c, uint64_t deadline, struct far_error *err)
{
	int r = 0;

	for (int i = 0; i < DIAL_TRIES; i++) {
		struct far_channel *channel = NULL;
		if (err)
			err->code = 0;
		r = far_lanes_pick(&c->lanes, FAR_LANE_DEMAND, deadline, &channel, err);
		if (r == 0 && c->lanes.once)
			r = far_hello_greet(c, channel, deadline, err);
		far_channel_put(channel);
		if (r != -EBADMSG)
			break;
	}
	if (r && err && !err->code)
		far_error_set(err, -r, "cannot open %s: %s", c->where, far_strerror(r));
	return r;
}

static void dial_rely_on(struct far_client *c, const struct far_facts *f)
{
	far_mutex_lock(&c->lock);
	c->facts = *f;
	c->has_facts = true;
	memcpy(c->identity, f->identity, sizeof c->identity);
	far_mutex_unlock(&c->lock);
}

/* Whether the failure says that nobody is there, rather than that somebody else is. */
static bool dial_unreachable(int r)
{
	return far_error_is_transient(r) && r != -EIO && r != -EBADMSG && r != -EBUSY;
}

struct dial_want {
	uint64_t bytes, max_io;
	bool sized; /* the user told the size */
};

/* With facts of an earlier time. */
static int dial_known(struct far_client *c, const struct far_open_opts *opts, const struct dial_want *want,
		      struct far_facts *f, struct far_error *err)
{
	memcpy(f, opts->known, far_min(opts->known->size, sizeof *f));
	f->size = sizeof *f;
	f->identity[sizeof f->identity - 1] = f->version[sizeof f->version - 1] = 0;
	f->caps |= FAR_CAP_REMOTE | FAR_CAP_FLUSH;
	if (opts->read_only)
		f->caps &= ~(uint32_t)FAR_CAP_WRITE;
	f->max_io = far_min(f->max_io ? f->max_io : DIAL_PLAIN_MAX, want->max_io);
	if (f->chunk)
		f->max_io = far_max(f->max_io - f->max_io % f->chunk, f->chunk);
	if (want->sized && want->bytes != f->bytes)
		return far_error_set(err, EINVAL, "%s was %" PRIu64 " bytes, not %" PRIu64 ": leave the size away", c->where,
				     f->bytes, want->bytes);
	dial_rely_on(c, f);
	uint64_t wait = far_min(opts->deadline_ms ? opts->deadline_ms : DIAL_KNOWN_MS, DIAL_KNOWN_MS);
	int r = dial_contact(c, far_min(far_deadline(), far_now() + wait * FAR_MSEC), err);
	if (!dial_unreachable(r))
		return r;
	far_log(FAR_LOG_INFO, "%s: cannot be reached now (%s); opened with what was known of it", c->where, far_strerror(r));
	if (err)
		*err = (struct far_error){ 0 };
	return 0;
}

/* The peer must answer now. */
static int dial_fresh(struct far_client *c, const struct far_open_opts *opts, const struct dial_want *want,
		      struct far_facts *f, struct far_error *err)
{
	uint64_t old = far_deadline_limit(far_now() + (opts->deadline_ms ? opts->deadline_ms : 30000) * FAR_MSEC);
	int r = dial_contact(c, far_deadline(), err);

	f->caps = FAR_CAP_REMOTE | FAR_CAP_FLUSH | (opts->read_only ? 0 : FAR_CAP_WRITE);
	if (r == 0 && far_client_kind(c) == FAR_CLIENT_PLAIN) {
		f->bytes = want->bytes;
		f->max_io = far_min(DIAL_PLAIN_MAX, want->max_io);
		f->caps |= FAR_CAP_DURABLE;
		dial_rely_on(c, f);
	} else if (r == 0) {
		far_mutex_lock(&c->lock);
		struct far_grpc_export e = c->heard;
		far_mutex_unlock(&c->lock);
		if (want->sized && want->bytes != e.size)
			r = far_error_set(err, EINVAL, "%s is %" PRIu64 " bytes, not %" PRIu64 ": leave ?size= away", c->where,
					  e.size, want->bytes);
		else
			r = far_hello_facts(c, &e, want->max_io, f, err);
		if (r == 0)
			dial_rely_on(c, f);
	}
	far_deadline_restore(old);
	return r;
}

/* Everything after the connection's address is known. Takes c over, also on failure. */
static int dial_start(struct far_client *c, const struct far_open_opts *opts, const struct dial_want *want,
		      struct far_backend **out, struct far_error *err)
{
	struct far_facts facts = FAR_FACTS_INIT;

	c->plain_sized = want->sized;
	c->plain_bytes = want->bytes;
	int r = (opts->known ? dial_known : dial_fresh)(c, opts, want, &facts, err);
	if (r == 0) {
		r = far_backend_new(&far_client_ops, c, &facts, out);
		if (r)
			far_error_set(err, -r, "cannot open %s: %s", c->where, far_strerror(r));
	}
	if (r)
		far_client_free(c);
	return r;
}

struct dial_conf {
	uint64_t size, timeout, max_io, silence;
	char *socket;
	char *token_file, *tls_ca, *tls_cert, *tls_key, *tls_name;
	int tls_min;
	bool sums;
};

static const char *const dial_versions[] = { "1.2", "1.3", NULL };

static const struct far_opt dial_options[] = {
	{ "size", FAR_OPT_SIZE, offsetof(struct dial_conf, size), .value_name = "BYTES",
	  .help = "size of a remote that does not tell its own" },
	{ "timeout", FAR_OPT_DURATION, offsetof(struct dial_conf, timeout), .min = 1e6, .max = 3.6e12,
	  .value_name = "TIME", .help = "how long one call may take", .def = "10s" },
	{ "max-request", FAR_OPT_SIZE, offsetof(struct dial_conf, max_io), .min = 512, .max = 32 << 20,
	  .value_name = "BYTES", .help = "longest single read or write", .def = "8M" },
	{ "silence", FAR_OPT_DURATION, offsetof(struct dial_conf, silence), .min = 1e6, .max = 3.6e12, .value_name = "TIME",
	  .help = "how long a connection with calls pending may give no sign of life", .def = "7s" },
	{ "sums", FAR_OPT_BOOL, offsetof(struct dial_conf, sums), .help = "checksums of the bytes that travel", .def = "1" },
	{ "socket", FAR_OPT_STRING, offsetof(struct dial_conf, socket), .value_name = "PATH",
	  .help = "unix socket (grpc+unix, grpcs+unix)" },
	{ "token-file", FAR_OPT_STRING, offsetof(struct dial_conf, token_file), .value_name = "FILE",
	  .help = "file whose first line is a token to show to the server; over TLS, or within this host" },
	{ "tls-ca", FAR_OPT_STRING, offsetof(struct dial_conf, tls_ca), .value_name = "FILE",
	  .help = "authorities that may sign the server's certificate (PEM)", .def = "the system's" },
	{ "tls-cert", FAR_OPT_STRING, offsetof(struct dial_conf, tls_cert), .value_name = "FILE",
	  .help = "certificate to show to the server (PEM)" },
	{ "tls-key", FAR_OPT_STRING, offsetof(struct dial_conf, tls_key), .value_name = "FILE", .help = "its private key (PEM)",
	  .def = "in the certificate's file" },
	{ "tls-name", FAR_OPT_STRING, offsetof(struct dial_conf, tls_name), .value_name = "NAME",
	  .help = "name that the server's certificate must be for", .def = "the host's" },
	{ "tls-min", FAR_OPT_ENUM, offsetof(struct dial_conf, tls_min), .names = dial_versions, .value_name = "VERSION",
	  .help = "oldest version of TLS that will do", .def = "1.3" },
	FAR_OPT_END,
};

static int dial_address(struct far_client *c, const struct far_uri *u, const struct dial_conf *conf, struct far_error *err)
{
	bool local = !strcmp(u->variant, "unix");
	char text[300];

	if (u->variant[0] && !local)
		return far_error_set(err, EINVAL, "%s: '%s+%s' is not known; use grpc://HOST:PORT or grpc+unix:///?socket=PATH",
				     u->text, u->scheme, u->variant);
	if (local && !conf->socket)
		return far_error_set(err, EINVAL, "%s: a unix socket needs its path: grpc+unix:///EXPORT?socket=PATH", u->text);
	if (!local && (!u->host[0] || conf->socket))
		return far_error_set(err, EINVAL, "%s: %s", u->text,
				     conf->socket ? "'socket' goes with grpc+unix:// only" : "the host is missing: grpc://HOST:PORT");
	struct far_lanes *l = &c->lanes;
	l->port = u->port ? u->port : DIAL_PORT;
	if (local)
		l->path = strdup(conf->socket);
	else
		l->host = strdup(u->host);
	snprintf(text, sizeof text, local ? "localhost" : strchr(u->host, ':') ? "[%s]:%d" : "%s:%d", u->host, l->port);
	l->authority = strdup(text);
	return l->authority && (l->path || l->host) ? 0 : far_error_set(err, ENOMEM, "out of memory");
}

/* The token, and for grpcs what TLS needs. Options of it without it are a mistake: nothing falls back to clear text silently. */
static int dial_tls(struct far_client *c, const struct far_uri *u, const struct dial_conf *conf, struct far_error *err)
{
	struct far_tls_opts o = { .cert = conf->tls_cert, .key = conf->tls_key, .ca = conf->tls_ca, .alpn = "h2",
				  .tls12 = conf->tls_min == 0 };

	c->lanes.token_file = conf->token_file ? strdup(conf->token_file) : NULL;
	if (conf->token_file && !c->lanes.token_file)
		return far_error_set(err, ENOMEM, "out of memory");
	if (strcmp(u->scheme, "grpcs")) {
		if (conf->tls_ca || conf->tls_cert || conf->tls_key || conf->tls_name || conf->tls_min != 1)
			return far_error_set(err, EINVAL, "%s: options of TLS go with grpcs:// only; %s:// is in the clear", c->where,
					     u->scheme);
		return 0;
	}
	c->lanes.tls_name = strdup(conf->tls_name ? conf->tls_name : u->host[0] ? u->host : "localhost");
	if (!c->lanes.tls_name)
		return far_error_set(err, ENOMEM, "out of memory");
	c->lanes.tls_name[strcspn(c->lanes.tls_name, "%")] = 0; /* an address's zone stands in no certificate */
	int r = far_tls_new_client(&o, &c->lanes.tls, err);
	return r ? far_error_prefix(err, "cannot open %s", c->where) : 0;
}

int far_grpc_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out, struct far_error *err)
{
	struct dial_conf conf = { .size = UINT64_MAX, .timeout = 10 * FAR_SEC, .max_io = DIAL_MAX_IO,
				  .silence = 7 * FAR_SEC, .tls_min = 1, .sums = true };
	char where[400];
	struct far_client *c = NULL;

	snprintf(where, sizeof where, "%.*s", (int)strcspn(u->text, "?"), u->text);
	int r = far_opt_parse(dial_options, &conf, where, u->query, '&', true, err);
	if (r == 0) {
		c = dial_new(!strcmp(u->variant, "unix") && conf.socket ? conf.socket : where,
			       u->path + (u->path[0] == '/'), opts);
		r = c ? dial_address(c, u, &conf, err) : far_error_set(err, ENOMEM, "out of memory");
	}
	if (r == 0)
		r = dial_tls(c, u, &conf, err);
	if (r == 0 && strlen(c->export) > 127)
		r = far_error_set(err, ENAMETOOLONG, "%s: the export's name is longer than 127 bytes", where);
	if (r == 0) {
		struct dial_want want = { .sized = conf.size != UINT64_MAX || opts->bytes, .max_io = conf.max_io,
					  .bytes = conf.size != UINT64_MAX ? conf.size : opts->bytes };
		c->timeout = conf.timeout;
		c->no_sums = c->no_sums || !conf.sums;
		c->lanes.quiet = conf.silence * 2 / 7;
		c->lanes.patience = conf.silence - c->lanes.quiet;
		r = dial_start(c, opts, &want, out, err);
	} else if (c) {
		far_client_free(c);
	}
	far_opt_fini(dial_options, &conf);
	return r;
}

int far_exec_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out, struct far_error *err)
{
	struct dial_want want = { .sized = opts->bytes != 0, .bytes = opts->bytes, .max_io = DIAL_MAX_IO };
	struct far_open_opts one = *opts;

	if (!u->path[0])
		return far_error_set(err, EINVAL, "%s: the command is missing: exec:COMMAND", u->text);
	one.demand_connections = one.bulk_connections = 1;
	struct far_client *c = dial_new(u->text, opts->export_name ? opts->export_name : "", &one);
	if (c) {
		/* What is behind a second command would be another server, which may not have the content open as well. */
		c->lanes.single = true;
		c->lanes.n[FAR_LANE_BULK] = 0;
		c->lanes.command = strdup(u->path);
		c->lanes.authority = strdup("localhost");
	}
	if (!c || !c->lanes.command || !c->lanes.authority) {
		if (c)
			far_client_free(c);
		return far_error_set(err, ENOMEM, "out of memory");
	}
	return dial_start(c, &one, &want, out, err);
}

/* The client half over a connection that is there. It is taken over on success only. */
static int dial_over(struct far_conn *conn, const char *where, const struct far_open_opts *opts, struct far_backend **out,
		     struct far_error *err)
{
	struct dial_want want = { .sized = opts->bytes != 0, .bytes = opts->bytes, .max_io = DIAL_MAX_IO };
	struct far_open_opts one = *opts;
	struct far_channel *channel = NULL;

	one.demand_connections = one.bulk_connections = 1;
	struct far_client *c = dial_new(where, opts->export_name ? opts->export_name : "", &one);
	int r = c ? far_channel_new(conn, "localhost", &channel) : -ENOMEM;
	if (r) {
		if (c)
			far_client_free(c);
		return far_error_set(err, -r, "cannot use the connection to %s: %s", where, far_strerror(r));
	}
	/* There is no second connection to turn to, so a slow peer is waited for; the thread's deadline still holds. */
	c->timeout = FAR_NEVER;
	far_lanes_adopt(&c->lanes, channel);
	return dial_start(c, &one, &want, out, err);
}

/* What a failed opening closes is not the user's own. */
struct dial_stream {
	struct far_stream_ops ops;
	void *self;
	bool open;
};

static ssize_t dial_stream_readv(void *self, const struct iovec *iov, int n)
{
	struct dial_stream *d = self;

	return d->ops.readv(d->self, iov, n);
}

static ssize_t dial_stream_writev(void *self, const struct iovec *iov, int n)
{
	struct dial_stream *d = self;

	return d->ops.writev(d->self, iov, n);
}

static int dial_stream_wait(void *self, bool in, bool out, int timeout_ms)
{
	struct dial_stream *d = self;

	return d->ops.wait(d->self, in, out, timeout_ms);
}

static void dial_stream_shutdown(void *self)
{
	struct dial_stream *d = self;

	d->ops.shutdown(d->self);
}

static void dial_stream_close(void *self)
{
	struct dial_stream *d = self;

	if (d->open && d->ops.close)
		d->ops.close(d->self);
	free(d);
}

int far_open_stream(const struct far_stream_ops *ops, void *self, const char *where, const struct far_open_opts *opts,
		    struct far_backend **out, struct far_error *err)
{
	static const struct far_stream_ops mine = { FAR_STREAM_OPS_INIT, .readv = dial_stream_readv,
						    .writev = dial_stream_writev, .wait = dial_stream_wait,
						    .shutdown = dial_stream_shutdown, .close = dial_stream_close };
	struct far_open_opts o = FAR_OPEN_OPTS_INIT;
	struct dial_stream *d = calloc(1, sizeof *d);
	struct far_conn conn = { 0 };

	if (opts)
		memcpy(&o, opts, far_min(opts->size, sizeof o));
	o.size = sizeof o;
	int r = d ? 0 : -ENOMEM;
	if (r == 0) {
		memcpy(&d->ops, ops, far_min(ops->size, sizeof d->ops));
		d->self = self;
		if (!d->ops.readv || !d->ops.writev || !d->ops.wait || !d->ops.shutdown)
			r = -EINVAL;
	}
	if (r == 0)
		r = far_conn_given(&conn, &mine, d);
	if (r) {
		free(d);
		return far_error_set(err, -r, "cannot use the connection to %s: %s", where, far_strerror(r));
	}
	r = dial_over(&conn, where, &o, out, err);
	if (r == 0)
		d->open = true;
	else
		far_conn_close(&conn); /* if it is still there; it frees d */
	return r;
}

int far_grpc_open_fd(int fd, const char *where, const struct far_open_opts *opts, struct far_backend **out,
		     struct far_error *err)
{
	static const struct far_open_opts none = FAR_OPEN_OPTS_INIT;
	struct far_conn conn = { 0 };
	int own = dup(fd); /* the caller keeps fd if this fails later */
	int r = own < 0 ? -errno : far_conn_socket(&conn, own);

	if (r) {
		far_fd_close(&own);
		return far_error_set(err, -r, "cannot use the connection to %s: %s", where, far_strerror(r));
	}
	r = dial_over(&conn, where, opts ? opts : &none, out, err);
	if (r)
		far_conn_close(&conn);
	else
		close(fd);
	return r;
}
