/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The server: exports, listeners, connections. One thread a listener accepts; connections live on seats of one crew.
 *
 *     new -> (export)* -> (listen | serve)* -> stopped -> freed
 *
 * Under `lock`: the list of connections. A connection leaves the list in server_ended(), on the crew's thread that was
 * the last to deal with it; far_server_stop() kills what is on the list and waits until the crew has gone.
 */
#define _GNU_SOURCE
#include "wire/server.h"

#include "backend/backend.h"
#include "base/options.h"
#include "base/thread.h"
#include "base/uri.h"
#include "net/net.h"
#include "wire/loans.h"
#include "wire/tell.h"
#include "wire/wire.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define SERVER_MAX_REQUEST (32 * FAR_MIB)
#define SERVER_MAX_REQUEST_MAX (1024 * FAR_MIB)
#define SERVER_THREADS 64
#define SERVER_CONNECTIONS 256
#define SERVER_LISTENERS 16
#define SERVER_MEMORY (512 * FAR_MIB)
#define SERVER_PORT 1337
#define SERVER_NBD_PORT 10809

enum server_wire { SERVER_GRPC, SERVER_NBD, SERVER_ANY };

/* What a listener speaks, by its URI's scheme. */
static const struct server_scheme {
	const char *name;
	enum server_wire wire;
	bool tls;
	int port;
} server_schemes[] = {
	{ "grpc", SERVER_GRPC, false, SERVER_PORT },
	{ "grpcs", SERVER_GRPC, true, SERVER_PORT },
	{ "nbd", SERVER_NBD, false, SERVER_NBD_PORT },
	{ "nbds", SERVER_NBD, true, SERVER_NBD_PORT },
	{ "any", SERVER_ANY, false, SERVER_PORT }, /* by the first bytes; see wire/tell.h */
};

struct server_address {
	struct far_net_addr net;
	const struct server_scheme *scheme;
};

struct server_conn {
	struct far_server *server;
	enum server_wire wire;
	union {
		struct far_grpc_conn *grpc;
		struct far_nbd_conn *nbd;
		struct far_conn conn; /* while it is not known what the peer speaks */
	};
	int told; /* eventfd of somebody who wants to know of its end; -1: nobody */
	struct server_conn *next, **prev;
};

struct server_listener {
	struct far_server *server;
	struct far_thread thread;
	int fd;
	const struct server_scheme *scheme;
	char *path; /* of a unix socket, removed at the end */
};

struct far_server {
	/* fixed once the first listener or connection is there */
	struct far_server_env env;
	struct far_crew *crew;
	bool insecure;
	struct far_tls *tls; /* NULL: no certificate was given */
	uint32_t lease_ms;
	int cancel; /* eventfd, readable once stopping */

	struct far_mutex lock;
	struct server_conn *conns FAR_GUARDED_BY(lock);
	unsigned conns_n FAR_GUARDED_BY(lock);
	bool busy FAR_GUARDED_BY(lock), stopping FAR_GUARDED_BY(lock), stopped FAR_GUARDED_BY(lock);
	struct server_listener listeners[SERVER_LISTENERS] FAR_GUARDED_BY(lock);
	unsigned listeners_n FAR_GUARDED_BY(lock);
};

const struct far_export *far_server_find(const struct far_server_env *env, const char *name, size_t len)
{
	for (size_t i = 0; i < env->exports_n; i++)
		if (strlen(env->exports[i].name) == len && !memcmp(env->exports[i].name, name, len))
			return &env->exports[i];
	if (env->exports_n && (!len || (len == 7 && !memcmp(name, "default", 7))))
		return &env->exports[0];
	return NULL;
}

enum far_right far_server_right(const struct far_server_env *env, const struct far_caller *who, const struct far_export *e)
{
	if (!env->access)
		return FAR_RIGHT_WRITE;
	return who ? far_access_right(env->access, who, e->name, e == env->exports) : FAR_RIGHT_NONE;
}

void far_server_patience(struct far_server *s, uint64_t handshake, uint64_t stall)
{
	s->env.handshake = handshake;
	s->env.stall = stall;
}

void far_server_plain(struct far_server *s)
{
	s->env.plain = true;
}

static int server_starttls(void *tls, struct far_conn *conn)
{
	return far_tls_server(tls, conn);
}

/* Certificates, and who may do what. */
static int server_guard(struct far_server *s, const struct far_server_opts *o, struct far_error *err)
{
	struct far_tls_opts tls = { .cert = o->tls_cert, .key = o->tls_key, .ca = o->tls_ca, .psk = o->tls_psk, .alpn = "h2",
				    .tls12 = o->tls12 };
	struct far_access_opts access = { .allow = o->allow, .token_file = o->token_file, .jwks_file = o->jwks_file,
					  .oidc_issuer = o->oidc_issuer, .oidc_ca = o->oidc_ca, .issuer = o->issuer,
					  .audience = o->audience, .named = o->tls_ca || o->tls_psk };

	if (!o->tls_cert && !o->tls_psk && (o->tls_key || o->tls_ca))
		return far_error_set(err, EINVAL, "TLS needs a certificate, too: give tls-cert");
	int r = o->tls_cert || o->tls_psk ? far_tls_new_server(&tls, &s->tls, err) : 0;
	if (s->tls) {
		s->env.starttls = server_starttls;
		s->env.tls = s->tls;
	}
	return r ? r : far_access_new(&access, &s->env.access, err);
}

int far_server_new(const struct far_server_opts *opts, struct far_server **out, struct far_error *err)
{
	struct far_server_opts o = FAR_SERVER_OPTS_INIT;

	if (opts)
		memcpy(&o, opts, far_min(opts->size, sizeof o));
	if (o.max_request > SERVER_MAX_REQUEST_MAX)
		return far_error_set(err, EINVAL, "the longest request can be at most %llu bytes, not %" PRIu64,
				     (unsigned long long)SERVER_MAX_REQUEST_MAX, o.max_request);
	struct far_server *s = calloc(1, sizeof *s);
	if (!s)
		return far_error_set(err, ENOMEM, "out of memory");
	far_mutex_init(&s->lock);
	s->insecure = o.insecure;
	s->lease_ms = o.lease_ms;
	s->env.max_request = o.max_request ? o.max_request : SERVER_MAX_REQUEST;
	s->env.handshake = 10 * FAR_SEC;
	s->env.stall = 30 * FAR_SEC;
	s->env.memory_max = far_max(SERVER_MEMORY, 8 * s->env.max_request);
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	s->env.spinning_max = cpus > 3 ? (unsigned)cpus / 2 : 1;
	s->cancel = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int r = s->cancel < 0 ? -errno : 0;
	if (r == 0) {
		r = server_guard(s, &o, err);
		if (r) {
			far_tls_put(s->tls);
			far_fd_close(&s->cancel);
			far_mutex_fini(&s->lock);
			free(s);
			return r;
		}
	}
	if (r == 0)
		r = far_crew_open(&s->crew, "far-serve", SERVER_CONNECTIONS + (o.max_threads ? o.max_threads : SERVER_THREADS));
	if (r) {
		far_access_free(s->env.access);
		far_tls_put(s->tls);
		far_fd_close(&s->cancel);
		far_mutex_fini(&s->lock);
		free(s);
		return far_error_set(err, -r, "cannot make a server: %s", far_strerror(r));
	}
	*out = s;
	return 0;
}

/* The owner of a backend that is exported already, or a new one. */
static int server_owner(struct far_server *s, const char *name, struct far_backend *b, struct far_owner **out,
			struct far_error *err)
{
	for (size_t i = 0; i < s->env.exports_n; i++)
		if (s->env.exports[i].b == b) {
			*out = s->env.exports[i].owner;
			return 0;
		}
	int r = far_owner_new(b, s->lease_ms, out);
	if (r == -EBUSY)
		return far_error_set(err, EBUSY, "cannot export '%s': it is open for writing already, in another process or as another "
				     "export. End that, or open it read-only here", name);
	return r ? far_error_set(err, -r, "cannot export '%s': the record beside its content: %s", name, far_strerror(r)) : 0;
}

int far_server_export(struct far_server *s, const char *name, struct far_backend *b, struct far_error *err)
{
	size_t n = strlen(name);

	if (!n || n > 127)
		return far_error_set(err, EINVAL, "an export's name has 1 to 127 bytes, '%s' has %zu", name, n);
	far_mutex_lock(&s->lock);
	bool busy = s->busy;
	far_mutex_unlock(&s->lock);
	if (busy)
		return far_error_set(err, EBUSY, "exports are added before the server listens, '%s' came after", name);
	for (size_t i = 0; i < s->env.exports_n; i++)
		if (!strcmp(s->env.exports[i].name, name))
			return far_error_set(err, EEXIST, "there are two exports called '%s'; give one of them another name", name);
	struct far_export *list = realloc(s->env.exports, (s->env.exports_n + 1) * sizeof *list);
	char *copy = strdup(name);
	struct far_owner *owner = NULL;
	if (list)
		s->env.exports = list;
	int r = list && copy ? server_owner(s, name, b, &owner, err) : far_error_set(err, ENOMEM, "out of memory");
	if (r) {
		free(copy);
		return r;
	}
	size_t same = 0;
	while (same < s->env.exports_n && list[same].b != b)
		same++;
	struct far_loans *loans = same < s->env.exports_n ? list[same].loans : far_loans_new(b);
	list[s->env.exports_n++] = (struct far_export){ .name = copy, .b = b, .owner = owner, .loans = loans };
	return 0;
}

void far_server_hooks(struct far_server *s, unsigned (*look)(void *hooks, uint64_t off, uint64_t len, uint64_t *run),
		      void (*prefetch)(void *hooks, uint64_t off, uint64_t len), void *hooks)
{
	s->env.exports[0].look = look;
	s->env.exports[0].prefetch = prefetch;
	s->env.exports[0].hooks = hooks;
}

/* --------------------------------------------------------------------------------------------- connections */

static void server_ended(void *opaque)
{
	struct server_conn *sc = opaque;
	struct far_server *s = sc->server;

	far_mutex_lock(&s->lock);
	*sc->prev = sc->next;
	if (sc->next)
		sc->next->prev = sc->prev;
	s->conns_n--;
	far_mutex_unlock(&s->lock);
	if (sc->told >= 0)
		(void)eventfd_write(sc->told, 1);
	free(sc);
}

static bool server_tell_run(void *opaque, struct far_seat *seat);

static int server_start(struct far_server *s, struct server_conn *sc, struct far_conn *conn, bool tls)
{
	if (sc->wire == SERVER_ANY) {
		sc->conn = *conn;
		int r = far_crew_seat(s->crew, -1, server_tell_run, NULL, sc);
		if (r == 0)
			conn->ops = NULL;
		return r;
	}
	if (sc->wire == SERVER_NBD)
		return far_nbd_conn_start(&s->env, s->crew, conn, tls, server_ended, sc, &sc->nbd);
	return far_grpc_conn_start(&s->env, s->crew, conn, server_ended, sc, &sc->grpc);
}

/* *conn becomes the server's on success. NBD: with `tls` nothing else is answered before STARTTLS. */
static int server_add(struct far_server *s, enum server_wire wire, struct far_conn *conn, bool tls, int told)
{
	struct server_conn *sc = calloc(1, sizeof *sc);
	int r = sc ? 0 : -ENOMEM;

	if (r)
		return r;
	sc->server = s;
	sc->wire = wire;
	sc->told = told;
	/* Under the lock from start to list: it may end at once, and then waits here to leave the list. */
	far_mutex_lock(&s->lock);
	s->busy = true;
	if (s->stopping)
		r = -ESHUTDOWN;
	else if (s->conns_n >= SERVER_CONNECTIONS)
		r = -EMFILE;
	else
		r = server_start(s, sc, conn, tls);
	if (r == 0) {
		sc->next = s->conns;
		sc->prev = &s->conns;
		if (sc->next)
			sc->next->prev = &sc->next;
		s->conns = sc;
		s->conns_n++;
	}
	far_mutex_unlock(&s->lock);
	if (r)
		free(sc);
	return r;
}

/* A seat that lasts until it is known what the peer speaks. The connection then has one of its own. */
static bool server_tell_run(void *opaque, struct far_seat *seat)
{
	struct server_conn *sc = opaque;
	struct far_server *s = sc->server;
	struct far_conn conn = sc->conn; /* only shut down by others meanwhile */
	bool tls;
	enum server_wire wire = far_tell_grpc(&conn, far_now() + s->env.handshake, s->cancel, &tls) ? SERVER_GRPC : SERVER_NBD;
	int r = 0;

	far_mutex_lock(&s->lock);
	if (s->stopping)
		r = -ESHUTDOWN;
	else if (tls)
		r = s->tls ? far_tls_server(s->tls, &conn) : -EPROTO;
	if (r == 0) {
		sc->wire = wire;
		r = server_start(s, sc, &conn, false);
	}
	far_mutex_unlock(&s->lock);
	if (r) { /* else sc may be gone by now */
		far_conn_close(&conn);
		server_ended(sc);
	}
	return false;
}

int far_server_serve(struct far_server *s, int fd, struct far_error *err)
{
	struct far_conn conn = { 0 };
	int r = far_conn_socket(&conn, fd);

	if (r == 0)
		r = server_add(s, SERVER_GRPC, &conn, false, -1); /* fd stays the caller's if this fails */
	return r ? far_error_set(err, -r, "cannot serve the connection: %s", far_strerror(r)) : 0;
}

/* The handshake is made on the connection's seat: nobody who is slow in it keeps others from being accepted. */
static int server_accepted(struct far_server *s, const struct server_listener *l, int fd)
{
	const struct server_scheme *as = l->scheme;
	struct far_conn conn = { 0 };
	int r = far_conn_socket(&conn, fd);

	if (r)
		far_fd_close(&fd);
	if (r == 0 && as->tls && as->wire == SERVER_GRPC)
		r = far_tls_server(s->tls, &conn);
	if (r == 0)
		r = server_add(s, as->wire, &conn, as->tls, -1);
	if (r)
		far_conn_close(&conn);
	return r;
}

static void *server_accept(void *arg)
{
	struct server_listener *l = arg;
	struct far_server *s = l->server;
	uint64_t told = 0;

	while (far_net_wait_readable(l->fd, s->cancel, FAR_NEVER) == 0) {
		int fd;
		int r = far_net_accept(l->fd, &fd);
		if (r == 0) {
			r = server_accepted(s, l, fd);
			if (r) {
				uint64_t now = far_now();
				if (!told || now - told > 10 * FAR_SEC)
					far_log(FAR_LOG_WARNING, "a connection was turned away: %s%s", far_strerror(r),
						r == -EMFILE ? " (256 at most)" : "");
				told = now;
			}
		} else if (r == -EMFILE || r == -ENFILE || r == -ENOBUFS || r == -ENOMEM) {
			/* It stays in the queue: do not spin on it. */
			far_net_wait_readable(s->cancel, -1, far_now() + 100 * FAR_MSEC);
		}
	}
	return NULL;
}

/* ------------------------------------------------------------------------------------------------ listeners */

struct server_conf {
	char *socket;
};

static const struct far_opt server_options[] = {
	{ "socket", FAR_OPT_STRING, offsetof(struct server_conf, socket), .value_name = "PATH",
	  .help = "unix socket (grpc+unix, nbd+unix and the like)" },
	FAR_OPT_END,
};

static const struct server_scheme *server_scheme(const char *name)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(server_schemes); i++)
		if (!strcmp(server_schemes[i].name, name))
			return &server_schemes[i];
	return NULL;
}

static int server_address(const struct far_server *s, const struct far_uri *u, const struct server_conf *conf,
			  struct server_address *to, struct far_error *err)
{
	bool local = !strcmp(u->variant, "unix");

	to->scheme = server_scheme(u->scheme);
	if (!to->scheme || (u->variant[0] && !local))
		return far_error_set(err, EINVAL, "cannot listen on '%s': use grpc://HOST:PORT, nbd://HOST:PORT, grpcs:// or nbds:// "
				     "for TLS, any://HOST:PORT for both, grpc+unix:///?socket=PATH, nbd+unix:///?socket=PATH, "
				     "or of the farpage command stdio: or nbd+stdio:", u->text);
	if (to->scheme->tls && !s->tls)
		return far_error_set(err, EINVAL, "cannot listen on '%s': TLS needs a certificate and its key; give --tls-cert and "
				     "--tls-key", u->text);
	if (u->path[0] && strcmp(u->path, "/"))
		return far_error_set(err, EINVAL, "cannot listen on '%s': a listener has no path; clients name the export", u->text);
	if (local && !conf->socket)
		return far_error_set(err, EINVAL, "cannot listen on '%s': add ?socket=PATH", u->text);
	if (!local && conf->socket)
		return far_error_set(err, EINVAL, "cannot listen on '%s': 'socket' goes with grpc+unix://, nbd+unix:// and the like "
				     "only", u->text);
	to->net = (struct far_net_addr){ .host = u->host, .port = u->has_port ? u->port : to->scheme->port,
					 .path = local ? conf->socket : NULL };
	return 0;
}

static int server_bound_unix(const char *scheme, const char *path, char **out)
{
	char encoded[512];

	return far_uri_encode(path, encoded, sizeof encoded) ? asprintf(out, "%s+unix:///?socket=%s", scheme, encoded) : -1;
}

static int server_bound(const struct server_address *to, int port, char **out)
{
	const struct far_net_addr *a = &to->net;
	const char *scheme = to->scheme->name;

	if (!out)
		return 0;
	int n;
	if (a->path)
		n = server_bound_unix(scheme, a->path, out);
	else
		n = asprintf(out, strchr(a->host, ':') ? "%s://[%s]:%d" : "%s://%s:%d", scheme, a->host, port);
	if (n < 0)
		*out = NULL;
	return n < 0 ? -ENOMEM : 0;
}

/* Whether every export can be offered in blocks that NBD knows. */
static int server_nbd_blocks(const struct far_server *s, struct far_error *err)
{
	for (size_t i = 0; i < s->env.exports_n; i++) {
		uint64_t chunk = far_facts(s->env.exports[i].b)->chunk;
		if (chunk > 65536 || (chunk & (chunk - 1)))
			return far_error_set(err, EINVAL, "cannot offer '%s' over NBD: its store takes whole chunks of %" PRIu64
					     " bytes only. Add --layer chunked", s->env.exports[i].name, chunk);
	}
	return 0;
}

/* Whether this kind of listener can offer every export, and ask for what is asked of callers. */
static int server_may_listen(const struct far_server *s, const struct server_scheme *scheme, struct far_error *err)
{
	if (scheme->wire == SERVER_GRPC)
		return 0;
	if (s->env.access && far_access_wants_token(s->env.access))
		return far_error_set(err, EINVAL, "cannot listen on %s://: NBD has no tokens, and this server asks for one; serve it "
				     "from a process of its own, with certificates", scheme->name);
	return server_nbd_blocks(s, err);
}

/* Whether a listener may be beyond this host. Tokens never go there in the clear, whatever else may. */
static bool server_may_be_far(const struct far_server *s, const struct server_scheme *scheme)
{
	return scheme->tls || (s->insecure && !(s->env.access && far_access_wants_token(s->env.access)));
}

/* Begin to accept on fd, which becomes the server's, as `path` does. */
static int server_listener_start(struct far_server *s, const struct server_scheme *scheme, int fd, char *path)
{
	int r = 0;

	far_mutex_lock(&s->lock);
	s->busy = true;
	if (s->stopping)
		r = -ESHUTDOWN;
	else if (s->listeners_n == SERVER_LISTENERS)
		r = -EMFILE;
	if (r == 0) {
		struct server_listener *l = &s->listeners[s->listeners_n];
		*l = (struct server_listener){ .server = s, .scheme = scheme, .fd = fd, .path = path };
		r = far_thread_start(&l->thread, "far-accept", server_accept, l);
		s->listeners_n += r == 0;
	}
	far_mutex_unlock(&s->lock);
	if (r) {
		far_fd_close(&fd);
		free(path);
	}
	return r;
}

static int server_listen_on(struct far_server *s, const struct server_address *to, char **bound, struct far_error *err)
{
	const struct far_net_addr *a = &to->net;
	int fd, port;
	int r = server_may_listen(s, to->scheme, err);

	if (r == 0)
		r = far_net_listen(a, server_may_be_far(s, to->scheme), &fd, &port, err);
	if (r)
		return r;
	char *path = a->path ? strdup(a->path) : NULL;
	char *text = NULL;
	r = (a->path && !path) ? -ENOMEM : server_bound(to, port, bound ? &text : NULL);
	if (r) {
		far_fd_close(&fd);
		free(path);
	} else {
		r = server_listener_start(s, to->scheme, fd, path);
	}
	if (r) {
		free(text);
		return far_error_set(err, -r, "cannot listen: %s", far_strerror(r));
	}
	if (bound)
		*bound = text;
	return 0;
}

int far_server_serve_stream(struct far_server *s, const struct far_stream_ops *ops, void *self, struct far_error *err)
{
	struct far_conn conn = { 0 };
	int r = far_conn_given(&conn, ops, self);

	if (r == 0) {
		r = server_add(s, SERVER_GRPC, &conn, false, -1);
		if (r)
			far_conn_given_back(&conn);
	}
	return r ? far_error_set(err, -r, "cannot serve the connection: %s", far_strerror(r)) : 0;
}

int far_server_serve_pair(struct far_server *s, int in, int out, bool nbd, int ended, struct far_error *err)
{
	struct far_conn conn = { 0 };

	if (nbd) {
		int r = server_may_listen(s, server_scheme("nbd"), err);
		if (r)
			return r;
	}
	int r = far_conn_pair(&conn, in, out);
	if (r == 0) {
		r = server_add(s, nbd ? SERVER_NBD : SERVER_GRPC, &conn, false, ended);
		if (r)
			far_conn_close(&conn);
	}
	return r ? far_error_set(err, -r, "cannot serve standard input and output: %s%s", far_strerror(r),
				 r == -EINVAL ? "; they must be pipes, sockets or a terminal" : "") : 0;
}

int far_server_reload(struct far_server *s, struct far_error *err)
{
	int r = s->tls ? far_tls_reload(s->tls, err) : 0;

	return r || !s->env.access ? r : far_access_reload(s->env.access, err);
}

int far_server_listen(struct far_server *s, const char *uri, char **bound, struct far_error *err)
{
	struct server_conf conf = { 0 };
	struct server_address to = { 0 };
	struct far_uri u;

	if (!s->env.exports_n)
		return far_error_set(err, EINVAL, "cannot listen on '%s': there is nothing to serve yet", uri);
	int r = far_uri_parse(&u, uri, err);
	if (r == 0)
		r = far_opt_parse(server_options, &conf, uri, u.query, '&', true, err);
	if (r == 0)
		r = server_address(s, &u, &conf, &to, err);
	if (r == 0)
		r = server_listen_on(s, &to, bound, err);
	far_opt_fini(server_options, &conf);
	far_uri_fini(&u);
	return r;
}

int far_server_listen_nbd(struct far_server *s, const char *path, struct far_error *err)
{
	struct server_address to = { .net = { .path = path }, .scheme = server_scheme("nbd") };

	return server_listen_on(s, &to, NULL, err);
}

int far_server_adopt(struct far_server *s, const char *scheme, int fd, char **bound, struct far_error *err)
{
	struct server_address to = { .scheme = server_scheme(scheme) };
	char *name = NULL;
	int r = 0;

	if (!to.scheme)
		r = far_error_set(err, EINVAL, "a socket cannot be taken over for '%s': use grpc, nbd, any, grpcs or nbds", scheme);
	else if (to.scheme->tls && !s->tls)
		r = far_error_set(err, EINVAL, "a socket cannot be taken over for '%s': TLS needs a certificate and its key", scheme);
	else
		r = server_may_listen(s, to.scheme, err);
	if (r == 0)
		r = far_net_adopt(fd, server_may_be_far(s, to.scheme), &name, err);
	if (r) {
		far_fd_close(&fd);
		return r;
	}
	/* Its path, if it has one, is whose it was before. */
	r = server_listener_start(s, to.scheme, fd, NULL);
	if (r == 0 && bound &&
	    (name[0] == '/' ? server_bound_unix(scheme, name, bound) : asprintf(bound, "%s://%s", scheme, name)) < 0)
		*bound = NULL;
	free(name);
	return r ? far_error_set(err, -r, "cannot listen: %s", far_strerror(r)) : 0;
}

/* ------------------------------------------------------------------------------------------------------ end */

static void server_stop_listeners(struct far_server *s) FAR_NO_TSA
{
	uint64_t one = 1;
	ssize_t w = write(s->cancel, &one, sizeof one);

	(void)w;
	/* Nobody adds one any more: `stopping` is set. */
	for (unsigned i = 0; i < s->listeners_n; i++) {
		struct server_listener *l = &s->listeners[i];
		far_thread_join(&l->thread);
		if (l->path)
			unlink(l->path);
		far_fd_close(&l->fd);
		free(l->path);
	}
}

void far_server_stop(struct far_server *s)
{
	if (!s)
		return;
	far_mutex_lock(&s->lock);
	bool first = !s->stopping;
	s->stopping = true;
	far_mutex_unlock(&s->lock);
	if (!first)
		return;
	server_stop_listeners(s);
	far_mutex_lock(&s->lock);
	for (struct server_conn *c = s->conns; c; c = c->next) {
		if (c->wire == SERVER_ANY)
			c->conn.ops->shutdown(&c->conn);
		else if (c->wire == SERVER_NBD)
			far_nbd_conn_kill(c->nbd);
		else
			far_grpc_conn_kill(c->grpc);
	}
	far_mutex_unlock(&s->lock);
	far_crew_close(s->crew);
	s->crew = NULL;
	for (size_t i = 0; i < s->env.exports_n; i++)
		far_owner_farewell(s->env.exports[i].owner);
}

void far_server_free(struct far_server *s)
{
	if (!s)
		return;
	far_server_stop(s);
	for (size_t i = 0; i < s->env.exports_n; i++) {
		size_t first = 0;
		while (s->env.exports[first].b != s->env.exports[i].b)
			first++;
		if (first == i) {
			far_owner_free(s->env.exports[i].owner);
			far_loans_free(s->env.exports[i].loans);
		}
		free(s->env.exports[i].name);
	}
	free(s->env.exports);
	far_tls_put(s->tls);
	far_access_free(s->env.access);
	far_fd_close(&s->cancel);
	far_mutex_fini(&s->lock);
	free(s);
}
