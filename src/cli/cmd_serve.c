/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage serve: offer regions to other hosts until a signal ends it. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "base/clock.h"
#include "base/uri.h"
#include "mount/control.h"
#include "wire/server.h"

#include <json-c/json.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct serve_conf {
	struct far_opt_list listen, layer;
	bool read_only, insecure;
	uint64_t max_request, lease;
	int64_t max_blocked;
	char *connections, *control, *run;
	char *tls_cert, *tls_key, *tls_ca, *tls_psk;
	struct far_opt_list allow;
	char *token_file, *jwks_file, *oidc_issuer, *oidc_ca, *issuer, *audience;
	int tls_min;
};

static const char *const serve_versions[] = { "1.2", "1.3", NULL };

static const struct far_opt serve_options[] = {
	{ "listen", FAR_OPT_LIST, offsetof(struct serve_conf, listen), .value_name = "URI",
	  .help = "accept connections here: grpc://HOST:PORT, grpcs://HOST:PORT, nbd://HOST:PORT, nbds://HOST:PORT, any://HOST:PORT, "
		  "grpc+unix:///?socket=PATH, nbd+unix:///?socket=PATH, stdio:, nbd+stdio:; may be repeated" },
	{ "layer", FAR_OPT_LIST, offsetof(struct serve_conf, layer), .value_name = "NAME[:KEY=VALUE,...]",
	  .help = "wrap every SOURCE in a layer; may be repeated, the first is outermost" },
	{ "read-only", FAR_OPT_BOOL, offsetof(struct serve_conf, read_only), .help = "refuse writes" },
	{ "max-request", FAR_OPT_SIZE, offsetof(struct serve_conf, max_request), .min = 4096, .max = 1 << 30,
	  .value_name = "SIZE", .help = "longest read or write that is answered", .def = "32M" },
	{ "max-blocked", FAR_OPT_INT, offsetof(struct serve_conf, max_blocked), .min = 1, .max = 4096,
	  .value_name = "N", .help = "threads that may wait for a store", .def = "64" },
	{ "lease", FAR_OPT_DURATION, offsetof(struct serve_conf, lease), .min = 100e6, .max = 3.6e12, .value_name = "DURATION",
	  .help = "how long a writer that is not heard of keeps others out", .def = "10s" },
	{ "connections", FAR_OPT_STRING, offsetof(struct serve_conf, connections), .value_name = "DEMAND+BULK",
	  .help = "connections to each network SOURCE", .def = "2+2" },
	{ "insecure", FAR_OPT_BOOL, offsetof(struct serve_conf, insecure),
	  .help = "listen beyond loopback without encryption" },
	{ "tls-cert", FAR_OPT_STRING, offsetof(struct serve_conf, tls_cert), .value_name = "FILE",
	  .help = "certificate for TLS, with those between it and its authority (PEM)" },
	{ "tls-key", FAR_OPT_STRING, offsetof(struct serve_conf, tls_key), .value_name = "FILE",
	  .help = "its private key (PEM)", .def = "in the certificate's file" },
	{ "tls-ca", FAR_OPT_STRING, offsetof(struct serve_conf, tls_ca), .value_name = "FILE",
	  .help = "clients must show a certificate that one of these authorities has signed (PEM)" },
	{ "tls-psk", FAR_OPT_STRING, offsetof(struct serve_conf, tls_psk), .value_name = "FILE",
	  .help = "keys shared with clients, in place of certificates: lines NAME:HEX" },
	{ "tls-min", FAR_OPT_ENUM, offsetof(struct serve_conf, tls_min), .names = serve_versions, .value_name = "VERSION",
	  .help = "oldest version of TLS that will do: 1.2 or 1.3", .def = "1.3" },
	{ "allow", FAR_OPT_LIST, offsetof(struct serve_conf, allow), .value_name = "NAME=ro|rw[:EXPORT]",
	  .help = "give rights to a name of a client's certificate, shared key or token; all others have none; may be repeated" },
	{ "token-file", FAR_OPT_STRING, offsetof(struct serve_conf, token_file), .value_name = "FILE",
	  .help = "gRPC calls must bring one of these tokens: lines NAME:TOKEN" },
	{ "jwks-file", FAR_OPT_STRING, offsetof(struct serve_conf, jwks_file), .value_name = "FILE",
	  .help = "gRPC calls must bring a JSON Web Token that one of these keys has signed" },
	{ "oidc-issuer", FAR_OPT_STRING, offsetof(struct serve_conf, oidc_issuer), .value_name = "URL",
	  .help = "the same with the keys of this OpenID Connect issuer" },
	{ "oidc-ca", FAR_OPT_STRING, offsetof(struct serve_conf, oidc_ca), .value_name = "FILE",
	  .help = "authorities that may sign the issuer's own certificate (PEM)", .def = "the system's" },
	{ "issuer", FAR_OPT_STRING, offsetof(struct serve_conf, issuer), .value_name = "ISS",
	  .help = "issuer that the tokens of --jwks-file must name" },
	{ "audience", FAR_OPT_STRING, offsetof(struct serve_conf, audience), .value_name = "AUD",
	  .help = "audience that signed tokens must be for" },
	{ "run", FAR_OPT_STRING, offsetof(struct serve_conf, run), .value_name = "CMD",
	  .help = "run a shell command with $FARPAGE_URI set to the first listener, then end; its exit code is returned" },
	{ "control", FAR_OPT_STRING, offsetof(struct serve_conf, control), .value_name = "PATH",
	  .help = "make a control socket here, for status, flush and stop" },
	FAR_OPT_END
};

struct serve_export {
	char *name;
	struct far_backend *b;
};

struct serve {
	struct serve_export *exports;
	size_t n;
	struct far_server *server;
	bool stdio;
	int wake; /* eventfd: the control socket asks for the end */
	char *uri, *path; /* of the first listener; path: of its unix socket, else NULL */
	pid_t child;      /* of --run; 0: none */
	int child_code;
	bool asked;       /* a signal has been passed on to it */
};

/* "[NAME=]SOURCE": a name is what stands before '=' if no ':' or '/' comes earlier. */
static const char *serve_split(const char *arg, size_t index, char *name, size_t n)
{
	size_t stop = strcspn(arg, "=:/?");

	snprintf(name, n, "%s", index == 0 ? "default" : "");
	if (arg[stop] != '=' || stop == 0)
		return arg;
	snprintf(name, n, "%.*s", (int)stop, arg);
	return arg + stop + 1;
}

static int serve_open_one(struct serve *s, const struct serve_conf *conf, const char *arg)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct far_error err = { 0 };
	struct far_backend *b;
	char name[256];
	const char *uri = serve_split(arg, s->n, name, sizeof name);

	if (!name[0])
		return cli_usage(&cli_serve, "SOURCE '%s' has no name: only the first may do without. Write NAME=%s", arg,
				 arg);
	opts.read_only = conf->read_only;
	if (cli_connections(conf->connections, &opts, &err) < 0)
		return cli_usage(&cli_serve, "%s", err.text);
	if (cli_open(uri, &opts, &conf->layer, &b, &err) < 0)
		return cli_fail("cannot serve", &err);
	s->exports[s->n++] = (struct serve_export){ strdup(name), b };
	return CLI_GO;
}

static int serve_open(struct serve *s, const struct serve_conf *conf, const struct cli_args *args)
{
	struct far_server_opts opts = FAR_SERVER_OPTS_INIT;
	struct far_error err = { 0 };
	int code = CLI_GO;

	s->exports = calloc(args->n, sizeof *s->exports);
	FAR_ASSERT(s->exports);
	for (size_t i = 0; i < args->n && code == CLI_GO; i++)
		code = serve_open_one(s, conf, args->v[i]);
	if (code != CLI_GO)
		return code;
	opts.insecure = conf->insecure;
	opts.max_request = conf->max_request;
	opts.max_threads = (uint32_t)conf->max_blocked;
	opts.lease_ms = (uint32_t)(conf->lease / FAR_MSEC);
	opts.tls_cert = conf->tls_cert;
	opts.tls_key = conf->tls_key;
	opts.tls_ca = conf->tls_ca;
	opts.tls_psk = conf->tls_psk;
	opts.tls12 = conf->tls_min == 0;
	opts.token_file = conf->token_file;
	opts.jwks_file = conf->jwks_file;
	opts.oidc_issuer = conf->oidc_issuer;
	opts.oidc_ca = conf->oidc_ca;
	opts.issuer = conf->issuer;
	opts.audience = conf->audience;
	FAR_CLEANUP(far_free_cleanup) const char **allow = calloc(conf->allow.n + 1, sizeof *allow);
	FAR_ASSERT(allow);
	for (size_t i = 0; i < conf->allow.n; i++)
		allow[i] = conf->allow.v[i];
	opts.allow = allow;
	if (far_server_new(&opts, &s->server, &err) < 0)
		return cli_fail("cannot serve", &err);
	for (size_t i = 0; i < s->n; i++)
		if (far_server_export(s->server, s->exports[i].name, s->exports[i].b, &err) < 0)
			return cli_fail("cannot serve", &err);
	return CLI_GO;
}

/* What --run's command is told of the first listener. */
static void serve_remember(struct serve *s, const char *bound)
{
	const char *socket = strstr(bound, "?socket="), *end = strstr(bound, "://");

	if (s->uri || !end)
		return;
	const char *first = bound, *scheme = "";
	if (!strncmp(bound, "any", 3)) { /* that is no scheme to dial */
		first += 3;
		scheme = "nbd";
	}
	int n = socket ? asprintf(&s->uri, "%s%.*s/%s%s", scheme, (int)(end - first) + 3, first, s->exports[0].name, socket)
		       : asprintf(&s->uri, "%s%s/%s", scheme, first, s->exports[0].name);
	if (n < 0)
		s->uri = NULL;
	s->path = socket ? strdup(socket + 8) : NULL;
	if (s->path)
		far_uri_decode(s->path);
}

/* The listener's URI with the default export's name as its path. */
static void serve_print(const struct serve *s, const char *bound)
{
	size_t base = strcspn(bound, "?");
	const char *query = bound + base;
	const char *slash = strstr(bound, "://");
	const char *path = slash && (size_t)(slash - bound) < base ? memchr(slash + 3, '/', (size_t)(query - slash) - 3) : NULL;

	if (path)
		base = (size_t)(path - bound);
	if (slash)
		printf("listening %.*s/%s%s size=%" PRIu64 "\n", (int)base, bound, s->exports[0].name, query,
		       far_size(s->exports[0].b));
	else
		printf("listening %s size=%" PRIu64 "\n", bound, far_size(s->exports[0].b));
	fflush(stdout);
}

static bool serve_is_stdio(const char *uri)
{
	return !strcmp(uri, "stdio:") || !strcmp(uri, "nbd+stdio:");
}

/* The peer is at standard input and output; they belong to it from here on, and the server ends when it has gone. What
 * this process would say there it says on standard error. */
static int serve_stdio(struct serve *s, bool nbd)
{
	struct far_error err = { 0 };
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	int in = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3), out = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);

	if (s->stdio || null < 0 || in < 0 || out < 0 || dup2(null, STDIN_FILENO) < 0 ||
	    dup2(STDERR_FILENO, STDOUT_FILENO) < 0) {
		cli_say("cannot serve standard input and output: %s", s->stdio ? "they are served already" : far_strerror(errno));
		far_fd_close(&in);
		far_fd_close(&out);
		far_fd_close(&null);
		return CLI_FAILED;
	}
	far_fd_close(&null);
	s->stdio = true;
	return far_server_serve_pair(s->server, in, out, nbd, s->wake, &err) < 0 ? cli_fail("cannot serve", &err) : CLI_GO;
}

static int serve_listen(struct serve *s, const struct serve_conf *conf)
{
	struct far_error err = { 0 };

	for (size_t i = 0; i < conf->listen.n; i++) {
		int code = serve_is_stdio(conf->listen.v[i]) ? serve_stdio(s, conf->listen.v[i][0] == 'n') : CLI_GO;
		if (code != CLI_GO)
			return code;
	}
	for (size_t i = 0; i < conf->listen.n; i++) {
		char *bound = NULL;
		if (serve_is_stdio(conf->listen.v[i]))
			continue;
		if (far_server_listen(s->server, conf->listen.v[i], &bound, &err) < 0)
			return cli_fail("cannot serve", &err);
		serve_print(s, bound ? bound : conf->listen.v[i]);
		serve_remember(s, bound ? bound : conf->listen.v[i]);
		free(bound);
	}
	return CLI_GO;
}

#define SERVE_FDS_START 3

/* How many sockets systemd has opened for this process. */
static int serve_activated(void)
{
	const char *pid = getenv("LISTEN_PID"), *n = getenv("LISTEN_FDS");

	if (!pid || !n || strtol(pid, NULL, 10) != (long)getpid())
		return 0;
	long count = strtol(n, NULL, 10);
	return count > 0 && count <= 16 ? (int)count : 0;
}

/* Take them over. A socket's name (FileDescriptorName=) says what is spoken on it: grpc, grpcs, nbd, nbds; on any other
 * both gRPC and NBD are. */
static int serve_adopt(struct serve *s, int n)
{
	const char *names = getenv("LISTEN_FDNAMES");
	struct far_error err = { 0 };

	for (int i = 0; i < n; i++) {
		char scheme[16] = "any", *bound = NULL;
		size_t len = names ? strcspn(names, ":") : 0;
		static const char *const known[] = { "grpc", "grpcs", "nbd", "nbds" };
		for (size_t k = 0; k < FAR_ARRAY_LEN(known); k++)
			if (len == strlen(known[k]) && !memcmp(names, known[k], len))
				snprintf(scheme, sizeof scheme, "%s", known[k]);
		names = names && names[len] ? names + len + 1 : NULL;
		if (far_server_adopt(s->server, scheme, SERVE_FDS_START + i, &bound, &err) < 0)
			return cli_fail("cannot serve", &err);
		if (bound) {
			serve_print(s, bound);
			serve_remember(s, bound);
		}
		free(bound);
	}
	/* Not for the children of this process. */
	unsetenv("LISTEN_PID");
	unsetenv("LISTEN_FDS");
	unsetenv("LISTEN_FDNAMES");
	return CLI_GO;
}

/* Flush all; 0 or the first error, which is said. */
static int serve_flush(struct serve *s)
{
	int first = 0;

	for (size_t i = 0; i < s->n; i++) {
		if (!(far_facts(s->exports[i].b)->caps & FAR_CAP_WRITE))
			continue;
		int r = far_flush(s->exports[i].b);
		if (r < 0) {
			cli_say("cannot flush export '%s': %s. What was written last may be lost", s->exports[i].name,
				far_strerror(r));
			first = first ? first : r;
		}
	}
	return first;
}

static struct json_object *serve_control_cb(void *opaque, const char *op, struct json_object *req)
{
	struct serve *s = opaque;

	if (strcmp(op, "flush") == 0) {
		int r = serve_flush(s);
		return r < 0 ? far_control_error(r, "the flush failed: %s", far_strerror(r)) : far_control_ok();
	}
	if (strcmp(op, "stop") == 0) {
		eventfd_write(s->wake, 1);
		return far_control_ok();
	}
	if (strcmp(op, "status") != 0)
		return far_control_error(-EOPNOTSUPP, "'%s' is for mounts: this is 'farpage serve'", op);
	struct json_object *o = far_control_ok(), *list = json_object_new_array();
	far_control_put(&o, "kind", json_object_new_string("serve"));
	far_control_put(&o, "pid", json_object_new_int((int)getpid()));
	for (size_t i = 0; i < s->n; i++) {
		struct json_object *e = json_object_new_object();
		far_control_put(&e, "name", json_object_new_string(s->exports[i].name));
		far_control_put(&e, "size", json_object_new_int64((int64_t)far_size(s->exports[i].b)));
		if (!e || !list || json_object_array_add(list, e)) {
			json_object_put(e);
			json_object_put(list);
			list = NULL; /* without memory: the answer as a whole says so */
		}
	}
	far_control_put(&o, "exports", list);
	return o;
}

/* SIGHUP where there is something to read again: certificates and keys. */
static void serve_reload(struct serve *s)
{
	struct far_error err = { 0 };

	if (far_server_reload(s->server, &err) < 0)
		cli_say("nothing was read again, everything stays as it was: %s", err.text);
	else
		cli_say("certificates, keys and tokens were read again");
}

/* A signal; true: it means the end. --run's command gets it first, and its own end is ours. */
static bool serve_signal(struct serve *s, const struct serve_conf *conf, int sig)
{
	if (sig == SIGCHLD) {
		if (!cli_run_ended(s->child, &s->child_code))
			return false;
		s->child = 0;
		return true;
	}
	if (sig == SIGHUP && (conf->tls_cert || conf->tls_psk || conf->token_file || conf->jwks_file)) {
		serve_reload(s);
		return false;
	}
	if (!s->child || s->asked)
		return true;
	s->asked = true;
	kill(s->child, sig);
	return false;
}

static void serve_wait(struct serve *s, const struct serve_conf *conf, int signals)
{
	struct pollfd p[2] = { { .fd = signals, .events = POLLIN }, { .fd = s->wake, .events = POLLIN } };
	int sig;

	for (;;) {
		while (poll(p, 2, -1) < 0 && errno == EINTR)
			;
		if (p[1].revents)
			return;
		while ((sig = cli_signal_take(signals)) != 0)
			if (serve_signal(s, conf, sig))
				return;
	}
}

static void serve_second_cb(int sig)
{
	static const char text[] = "farpage: stopped by a second signal: what was written last may not be saved.\n";
	ssize_t n = write(STDERR_FILENO, text, sizeof text - 1);

	(void)n;
	_exit(CLI_SIGNAL);
}

/* From the first signal on a second one ends everything at once. */
static void serve_arm_second(void)
{
	struct sigaction sa = { .sa_handler = serve_second_cb };
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
	sigprocmask(SIG_UNBLOCK, &set, NULL);
}

static int serve_run_open(struct serve *s, const struct serve_conf *conf, const struct cli_args *args)
{
	struct far_error err = { 0 };
	struct far_control *control = NULL;
	int signals = cli_signals(conf->run != NULL), activated = serve_activated();

	if (signals < 0 || s->wake < 0) {
		cli_say("cannot serve: no descriptor for signals: %s", far_strerror(errno));
		return CLI_FAILED;
	}
	int code = serve_open(s, conf, args);
	if (code == CLI_GO && conf->control && far_control_open(conf->control, NULL, &control, &err) < 0)
		code = cli_fail("cannot serve", &err);
	if (code == CLI_GO && control && far_control_start(control, serve_control_cb, s, &err) < 0)
		code = cli_fail("cannot serve", &err);
	if (code == CLI_GO)
		code = serve_listen(s, conf);
	if (code == CLI_GO && activated)
		code = serve_adopt(s, activated);
	if (code == CLI_GO && conf->run && cli_run_start(conf->run, s->path ? s->path : s->uri ? s->uri : "",
							 s->uri ? s->uri : "", &s->child) < 0)
		code = CLI_FAILED;
	if (code == CLI_GO) {
		serve_wait(s, conf, signals);
		serve_arm_second();
		far_server_stop(s->server);
		if (s->child) /* `stop` while it still runs: it loses what was served */
			kill(s->child, SIGTERM);
		code = serve_flush(s) < 0 ? CLI_UNSAVED : s->child_code;
	}
	far_control_close(control);
	close(signals);
	return code;
}

static int serve_run(int argc, char **argv)
{
	struct serve_conf conf = { .max_request = 32 * FAR_MIB, .max_blocked = 64, .lease = 10 * FAR_SEC, .tls_min = 1 };
	struct serve s = { .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) };
	struct cli_args args;
	int code = cli_parse(&cli_serve, &conf, argc, argv, &args);

	if (code == CLI_GO && !conf.listen.n && !serve_activated())
		code = cli_usage(&cli_serve, "--listen is missing: say where, such as --listen grpc://127.0.0.1:1337");
	if (code == CLI_GO)
		code = serve_run_open(&s, &conf, &args);
	if (s.server)
		far_server_stop(s.server);
	far_server_free(s.server);
	for (size_t i = 0; i < s.n; i++) {
		far_close(s.exports[i].b);
		free(s.exports[i].name);
	}
	free(s.exports);
	free(s.uri);
	free(s.path);
	far_fd_close(&s.wake);
	cli_parse_fini(&cli_serve, &conf, &args);
	return code;
}

const struct cli_verb cli_serve = {
	.name = "serve", .synopsis = "[NAME=]SOURCE... --listen URI...", .cannot = "cannot serve",
	.about = "Offer regions to other hosts.", .options = serve_options, .min_args = 1, .max_args = 1024,
	.run = serve_run,
};
