/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The client half as a backend. Which service the peer speaks is found once, at open: farpage.v1 if it answers Describe,
 * else the plain Backend service, whose size must be known here and whose messages must stay small. Connections are
 * lanes.c's, one connection with its calls is channel.c's.
 */
#include "wire/grpc/lanes.h"
#include "wire/grpc/proto.h"
#include "wire/wire.h"

#include "base/options.h"
#include "base/uri.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CLIENT_PLAIN_MAX (2 * FAR_MIB)
#define CLIENT_MAX_IO (8 * FAR_MIB)
#define CLIENT_PORT 1337
#define CLIENT_TRIES 3 /* of a call that the peer cannot have seen */

struct client {
	/* fixed after open */
	const char *where; /* for messages: the URI without its query; of the lanes */
	char *export;
	bool region;       /* the peer speaks farpage.v1 */
	uint64_t timeout;
	struct far_lanes lanes;
};

/* ----------------------------------------------------------------------------------------------------- calls */

static uint64_t client_deadline(const struct client *c)
{
	return c->timeout == FAR_NEVER ? far_deadline() : far_min(far_deadline(), far_now() + c->timeout);
}

/* Make the call; one that the peer cannot have seen is made again on another connection. */
static int client_call(struct client *c, struct far_call *call, unsigned flags, uint64_t bytes, struct far_error *err)
{
	int lane = (flags & FAR_BULK) ? FAR_LANE_BULK : FAR_LANE_DEMAND;
	uint64_t deadline = client_deadline(c);
	int r = 0;

	for (int i = 0; i < CLIENT_TRIES; i++) {
		struct far_channel *channel;
		r = far_lanes_pick(&c->lanes, lane, deadline, &channel, err);
		if (r)
			return r;
		far_channel_load(channel, (int64_t)bytes);
		call->tell_deadline = c->region;
		r = far_channel_call(channel, call, deadline, c->timeout);
		far_channel_load(channel, -(int64_t)bytes);
		far_channel_put(channel);
		if (r == 0 || !call->untouched || c->lanes.once)
			break;
	}
	if (r && call->grpc_status && call->grpc_status != FAR_CALL_NO_STATUS)
		far_log(FAR_LOG_DEBUG, "%s: %s: status %u: %s", c->where, call->path, call->grpc_status, call->text);
	return r;
}

/* A call whose reply is a small whole message. */
static int client_small(struct client *c, const char *path, const struct far_pb_out *o, const void *body, size_t body_n,
			uint8_t *buf, size_t cap, size_t *got, unsigned flags)
{
	struct far_call call = { .path = path, .buf = buf, .buf_cap = cap };

	far_call_request(&call, o, body, body_n);
	int r = client_call(c, &call, flags, body_n, NULL);
	if (r == 0 && got)
		*got = call.buf_n;
	return r;
}

/* A read's reply, of either service: number 1 (N, or the kinds) and bytes 2. */
struct client_read {
	struct far_call call;
	uint8_t *dst;
	size_t len, got;
	uint64_t n;
	bool region, has_n;
	uint8_t kinds[8];
	uint64_t kinds_n;
};

static int client_read_value(void *opaque, uint32_t num, uint64_t value)
{
	struct client_read *rd = opaque;

	if (num == 1 && rd->region && rd->kinds_n < sizeof rd->kinds) {
		rd->kinds[rd->kinds_n++] = (uint8_t)far_min(value, 255);
	} else if (num == 1 && !rd->region) {
		rd->n = value;
		rd->has_n = true;
	}
	return 0;
}

static int client_read_bytes(void *opaque, uint32_t num, uint64_t len, uint8_t **dst)
{
	struct client_read *rd = opaque;

	if (num == 2) {
		if (len != rd->len)
			return -EPROTO;
		*dst = rd->dst;
		rd->got = (size_t)len;
	} else if (num == 1 && rd->region) {
		if (len != 1)
			return -EPROTO;
		*dst = rd->kinds;
		rd->kinds_n = 1;
	}
	return 0;
}

/* Whether what came is what was asked for. */
static int client_read_check(struct client_read *rd)
{
	if (!rd->region)
		return rd->n == rd->len && rd->got == rd->len ? 0 : -EPROTO;
	if (rd->kinds_n > 1)
		return -EPROTO;
	if (rd->kinds_n == 1 && rd->kinds[0] == 1 && !rd->got) {
		memset(rd->dst, 0, rd->len);
		return 0;
	}
	return (!rd->kinds_n || rd->kinds[0] == 0) && rd->got == rd->len ? 0 : -EPROTO;
}

/* Room for what stands before a request's long bytes. */
struct client_head {
	uint8_t bytes[FAR_H2_HEAD - FAR_GRPC_PREFIX];
};

static struct far_pb_out client_begin(const struct client *c, struct client_head *h)
{
	struct far_pb_out o = { h->bytes, 0, sizeof h->bytes };

	if (c->region)
		far_pb_put_bytes(&o, 1, c->export, strlen(c->export));
	return o;
}

static int client_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct client *c = self;
	struct client_head head;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	struct client_read rd = {
		.call = { .path = c->region ? FAR_GRPC_REGION "Read" : FAR_GRPC_BACKEND "ReadAt",
			  .fields = true,
			  .pb = { .value = client_read_value, .bytes = client_read_bytes } },
		.dst = buf, .len = len, .region = c->region,
	};
	rd.call.pb.opaque = &rd;
	struct far_pb_out o = client_begin(c, &head);
	if (c->region) {
		far_grpc_encode_range(&o, 2, off, len);
		far_pb_put_uint(&o, 3, (flags & FAR_BULK) != 0);
		far_pb_put_uint(&o, 4, 1);
	} else {
		far_pb_put_uint(&o, 1, len);
		far_pb_put_uint(&o, 2, off);
	}
	far_call_request(&rd.call, &o, NULL, 0);
	int r = client_call(c, &rd.call, flags, len, NULL);
	return r ? r : client_read_check(&rd);
}

static int client_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct client *c = self;
	struct client_head head;
	uint8_t reply[64];
	size_t got;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	struct far_pb_out o = client_begin(c, &head);
	far_pb_put_uint(&o, c->region ? 2 : 1, off);
	if (c->region)
		far_pb_put_uint(&o, 4, (flags & FAR_BULK) != 0);
	far_pb_put_head(&o, c->region ? 5 : 2, len);
	int r = client_small(c, c->region ? FAR_GRPC_REGION "Write" : FAR_GRPC_BACKEND "WriteAt", &o, buf, len, reply,
			     sizeof reply, &got, flags);
	if (r || c->region)
		return r;
	struct far_pb_in in = { reply, reply + got };
	struct far_pb_field f;
	uint64_t n = 0;
	while ((r = far_pb_next(&in, &f)) > 0)
		if (f.num == 1 && f.wire == FAR_PB_VARINT)
			n = f.value;
	return r ? r : n == len ? 0 : -EPROTO;
}

static int client_flush(void *self)
{
	struct client *c = self;
	struct client_head head;
	uint8_t reply[64];
	struct far_pb_out o = client_begin(c, &head);

	return client_small(c, c->region ? FAR_GRPC_REGION "Flush" : FAR_GRPC_BACKEND "Sync", &o, NULL, 0, reply,
			    sizeof reply, NULL, 0);
}

static int client_span(struct client *c, const char *path, uint64_t off, uint64_t len, unsigned flags)
{
	struct client_head head;
	uint8_t reply[64];

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	struct far_pb_out o = client_begin(c, &head);
	far_pb_put_uint(&o, 2, off);
	far_pb_put_uint(&o, 3, len);
	far_pb_put_uint(&o, 4, (flags & FAR_BULK) != 0);
	return client_small(c, path, &o, NULL, 0, reply, sizeof reply, NULL, flags);
}

static int client_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return client_span(self, FAR_GRPC_REGION "Zero", off, len, flags);
}

static int client_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return client_span(self, FAR_GRPC_REGION "Discard", off, len, flags);
}

static int client_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct client *c = self;
	struct client_head head;
	size_t got, cap = 64 * FAR_KIB;
	struct far_pb_out o = client_begin(c, &head);

	far_pb_put_uint(&o, 2, off);
	far_pb_put_uint(&o, 3, len);
	far_pb_put_uint(&o, 4, far_min(max, 1024)); /* 1024 extents need at most 28 bytes each and a little */
	uint8_t *buf = malloc(cap);
	if (!buf)
		return -ENOMEM;
	int r = client_small(c, FAR_GRPC_REGION "Extents", &o, NULL, 0, buf, cap, &got, 0);
	if (r == 0)
		r = far_grpc_decode_extents(buf, got, off, len, out, max, n);
	free(buf);
	return r;
}

/* -------------------------------------------------------------------------------------------- open and close */

static void client_stop(void *self)
{
	struct client *c = self;

	far_lanes_stop(&c->lanes);
}

static void client_close(void *self)
{
	struct client *c = self;

	far_lanes_fini(&c->lanes);
	free(c->export);
	free(c);
}

static struct client *client_new(const char *where, const char *export, const struct far_open_opts *opts)
{
	struct client *c = calloc(1, sizeof *c);

	if (!c)
		return NULL;
	c->export = strdup(export);
	if (!c->export || far_lanes_init(&c->lanes, where, opts->demand_connections ? opts->demand_connections : 2,
					 opts->bulk_connections ? opts->bulk_connections : 2)) {
		free(c->export);
		free(c);
		return NULL;
	}
	c->where = c->lanes.where;
	c->timeout = 10 * FAR_SEC;
	return c;
}

/* The sentence for an export that is not there: which ones are. */
static int client_no_export(struct client *c, struct far_error *err)
{
	char names[300] = "";
	size_t got = 0, cap = 64 * FAR_KIB, at = 0;
	struct far_pb_out o = { NULL, 0, 0 };
	uint8_t *buf = malloc(cap);
	struct far_pb_field f;

	int r = buf ? client_small(c, FAR_GRPC_REGION "Exports", &o, NULL, 0, buf, cap, &got, 0) : -ENOMEM;
	struct far_pb_in in = { buf, buf + got };
	while (r == 0 && far_pb_next(&in, &f) > 0) {
		struct far_grpc_export e;
		if (f.num != 1 || f.wire != FAR_PB_BYTES || far_grpc_decode_export(f.data, f.len, &e))
			continue;
		int k = snprintf(names + at, sizeof names - at, "%s%s", at ? ", " : "", e.name);
		if (k < 0 || (size_t)k >= sizeof names - at)
			break;
		at += (size_t)k;
	}
	free(buf);
	return far_error_set(err, ENOENT, "%s has no export '%s'; it has: %s", c->where, c->export,
			     names[0] ? names : "(none it tells)");
}

/* Ask farpage.v1. 0: answered; -EOPNOTSUPP: the peer has the plain service only. */
static int client_describe(struct client *c, struct far_grpc_export *e, struct far_error *err)
{
	struct client_head head;
	uint8_t buf[1024];
	struct far_call call = { .path = FAR_GRPC_REGION "Describe", .buf = buf, .buf_cap = sizeof buf };

	c->region = true;
	struct far_pb_out o = client_begin(c, &head);
	far_call_request(&call, &o, NULL, 0);
	if (err)
		err->code = 0;
	int r = client_call(c, &call, 0, 0, err);
	if (r == 0 && far_grpc_decode_export(buf, call.buf_n, e))
		r = -EPROTO;
	if (r == 0 || call.grpc_status == FAR_GRPC_UNIMPLEMENTED)
		return r ? -EOPNOTSUPP : 0;
	if (call.grpc_status == FAR_GRPC_NOT_FOUND)
		return client_no_export(c, err);
	if (err && err->code)
		return r;
	if (r == -EPROTO)
		return far_error_set(err, EPROTO, "%s does not answer as a gRPC server does; is it another kind of server?",
				     c->where);
	if (r == -ETIMEDOUT)
		return far_error_set(err, ETIMEDOUT, "%s does not answer in time; is it a gRPC server, and is it alive?",
				     c->where);
	const char *next = r == -ECONNREFUSED ? "Is the server running, and is this its port?"
			   : r == -ECONNRESET || r == -EPIPE ? "It hung up: is it a gRPC server, or one that wants TLS?"
			   : "Look at the server's messages";
	return far_error_set(err, -r, "cannot open %s: %s%s%s. %s", c->where, far_strerror(r), call.text[0] ? ": " : "",
			     call.text, next);
}

/* A peer with the plain service only: its size must be told, and its last byte is looked at. */
static int client_plain(struct client *c, uint64_t bytes, bool known, struct far_error *err)
{
	uint8_t last;

	c->region = false;
	if (c->export[0] && strcmp(c->export, "default"))
		return far_error_set(err, ENOENT, "%s has no exports by name, so '%s' cannot be chosen; leave the path away",
				     c->where, c->export);
	if (!known)
		return far_error_set(err, EINVAL, "%s does not tell its size: add ?size=BYTES", c->where);
	if (!bytes)
		return 0;
	/* Straight to the call: the text of the answer is wanted. */
	struct client_head head;
	struct client_read rd = {
		.call = { .path = FAR_GRPC_BACKEND "ReadAt", .fields = true,
			  .pb = { .value = client_read_value, .bytes = client_read_bytes } },
		.dst = &last, .len = 1,
	};
	rd.call.pb.opaque = &rd;
	struct far_pb_out o = client_begin(c, &head);
	far_pb_put_uint(&o, 1, 1);
	far_pb_put_uint(&o, 2, bytes - 1);
	far_call_request(&rd.call, &o, NULL, 0);
	int r = client_call(c, &rd.call, 0, 1, err);
	if (r == 0)
		r = client_read_check(&rd);
	if (r == 0)
		return 0;
	if (rd.call.grpc_status == FAR_GRPC_UNKNOWN && !strcmp(rd.call.text, "EOF"))
		return far_error_set(err, EINVAL, "%s: the remote is shorter than %" PRIu64 " bytes", c->where, bytes);
	if (rd.call.grpc_status == FAR_GRPC_UNIMPLEMENTED)
		return far_error_set(err, EPROTO, "%s speaks gRPC, but no service that farpage knows", c->where);
	return far_error_set(err, -r, "cannot read from %s: %s%s%s", c->where, far_strerror(r), rd.call.text[0] ? ": " : "",
			     rd.call.text);
}

static int client_facts(struct client *c, const struct far_grpc_export *e, uint64_t bytes, bool known, bool read_only,
			uint64_t max_io, struct far_facts *f, struct far_error *err)
{
	*f = (struct far_facts)FAR_FACTS_INIT;
	f->caps = FAR_CAP_REMOTE | (read_only ? 0 : FAR_CAP_WRITE);
	if (!c->region) {
		f->bytes = bytes;
		f->max_io = far_min(CLIENT_PLAIN_MAX, max_io);
		f->caps |= FAR_CAP_DURABLE;
		return 0;
	}
	if (known && bytes != e->size)
		return far_error_set(err, EINVAL, "%s is %" PRIu64 " bytes, not %" PRIu64 ": leave ?size= away", c->where, e->size,
				     bytes);
	if (e->size > FAR_SIZE_MAX || e->chunk > FAR_SIZE_MAX || !e->max_request)
		return far_error_set(err, EPROTO, "%s describes its export in a way that makes no sense", c->where);
	f->bytes = e->size;
	f->chunk = e->chunk;
	f->max_io = far_min(far_min(e->max_request, CLIENT_MAX_IO), max_io);
	if (f->chunk) {
		if (f->chunk > e->max_request)
			return far_error_set(err, EPROTO, "%s takes whole chunks of %" PRIu64 " bytes only but at most %" PRIu64
					     " a request", c->where, e->chunk, e->max_request);
		f->max_io = far_max(f->max_io - f->max_io % f->chunk, f->chunk);
	}
	if (e->read_only)
		f->caps &= ~(uint32_t)FAR_CAP_WRITE;
	if (e->durable)
		f->caps |= FAR_CAP_DURABLE;
	memcpy(f->identity, e->identity, sizeof f->identity);
	memcpy(f->version, e->version, sizeof f->version);
	return 0;
}

/* Everything after the connection's address is known. Takes c over, also on failure. */
static int client_start(struct client *c, const struct far_open_opts *opts, uint64_t bytes, bool known, uint64_t max_io,
			struct far_backend **out, struct far_error *err)
{
	struct far_grpc_export e = { .size = 0 };
	struct far_facts facts;
	struct far_ops ops = { FAR_OPS_INIT, .read = client_read, .write = client_write, .flush = client_flush,
			       .stop = client_stop, .close = client_close };
	uint64_t old = far_deadline_limit(far_now() + (opts->deadline_ms ? opts->deadline_ms : 30000) * FAR_MSEC);

	int r = client_describe(c, &e, err);
	if (r == -EOPNOTSUPP)
		r = client_plain(c, bytes, known, err);
	if (r == 0)
		r = client_facts(c, &e, bytes, known, opts->read_only, max_io, &facts, err);
	far_deadline_restore(old);
	if (r == 0) {
		if (c->region) {
			ops.zero = client_zero;
			ops.discard = client_discard;
			ops.extents = client_extents;
		}
		r = far_backend_new(&ops, c, &facts, out);
		if (r)
			far_error_set(err, -r, "cannot open %s: %s", c->where, far_strerror(r));
	}
	if (r)
		client_close(c);
	return r;
}

struct client_conf {
	uint64_t size, timeout, max_io;
	char *socket;
};

static const struct far_opt client_options[] = {
	{ "size", FAR_OPT_SIZE, offsetof(struct client_conf, size), .value_name = "BYTES",
	  .help = "size of a remote that does not tell its own" },
	{ "timeout", FAR_OPT_DURATION, offsetof(struct client_conf, timeout), .min = 1e6, .max = 3.6e12,
	  .value_name = "TIME", .help = "how long one call may take", .def = "10s" },
	{ "max-request", FAR_OPT_SIZE, offsetof(struct client_conf, max_io), .min = 512, .max = 32 << 20,
	  .value_name = "BYTES", .help = "longest single read or write", .def = "8M" },
	{ "socket", FAR_OPT_STRING, offsetof(struct client_conf, socket), .value_name = "PATH",
	  .help = "unix socket (grpc+unix)" },
	FAR_OPT_END,
};

static int client_address(struct client *c, const struct far_uri *u, const struct client_conf *conf, struct far_error *err)
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
	l->port = u->port ? u->port : CLIENT_PORT;
	if (local)
		l->path = strdup(conf->socket);
	else
		l->host = strdup(u->host);
	snprintf(text, sizeof text, local ? "localhost" : strchr(u->host, ':') ? "[%s]:%d" : "%s:%d", u->host, l->port);
	l->authority = strdup(text);
	return l->authority && (l->path || l->host) ? 0 : far_error_set(err, ENOMEM, "out of memory");
}

int far_grpc_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out, struct far_error *err)
{
	struct client_conf conf = { .size = UINT64_MAX, .timeout = 10 * FAR_SEC, .max_io = CLIENT_MAX_IO };
	char where[400];
	struct client *c = NULL;

	snprintf(where, sizeof where, "%.*s", (int)strcspn(u->text, "?"), u->text);
	int r = far_opt_parse(client_options, &conf, where, u->query, '&', true, err);
	if (r == 0) {
		c = client_new(!strcmp(u->variant, "unix") && conf.socket ? conf.socket : where,
			       u->path + (u->path[0] == '/'), opts);
		r = c ? client_address(c, u, &conf, err) : far_error_set(err, ENOMEM, "out of memory");
	}
	if (r == 0 && strlen(c->export) > 127)
		r = far_error_set(err, ENAMETOOLONG, "%s: the export's name is longer than 127 bytes", where);
	if (r == 0) {
		bool known = conf.size != UINT64_MAX || opts->bytes;
		c->timeout = conf.timeout;
		r = client_start(c, opts, conf.size != UINT64_MAX ? conf.size : opts->bytes, known, conf.max_io, out, err);
	} else if (c) {
		client_close(c);
	}
	far_opt_fini(client_options, &conf);
	return r;
}

int far_grpc_open_fd(int fd, const char *where, const struct far_open_opts *opts, struct far_backend **out,
		     struct far_error *err)
{
	static const struct far_open_opts none = FAR_OPEN_OPTS_INIT;
	struct far_open_opts one = opts ? *opts : none;
	struct far_conn conn = { 0 };

	one.demand_connections = one.bulk_connections = 1;
	struct client *c = client_new(where, "", &one);
	int r = c ? 0 : -ENOMEM;
	int own = dup(fd); /* the caller keeps fd if this fails later */
	if (r == 0)
		r = far_conn_socket(&conn, own);
	if (r)
		far_fd_close(&own);
	struct far_channel *channel = NULL;
	if (r == 0)
		r = far_channel_new(&conn, "localhost", &channel);
	if (r) {
		far_conn_close(&conn);
		if (c)
			client_close(c);
		return far_error_set(err, -r, "cannot use the connection to %s: %s", where, far_strerror(r));
	}
	/* There is no second connection to turn to, so a slow peer is waited for; the thread's deadline still holds. */
	c->timeout = FAR_NEVER;
	far_lanes_adopt(&c->lanes, channel);
	r = client_start(c, &one, one.bytes, one.bytes != 0, CLIENT_MAX_IO, out, err);
	if (r == 0)
		close(fd);
	return r;
}
