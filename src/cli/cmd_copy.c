/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage copy: any region or stream to any other. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/uri.h"
#include "cli/copy_dirty.h"
#include "cli/copy_engine.h"
#include "cli/progress.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define COPY_PIECE (2 * FAR_MIB)
#define COPY_PIECE_NEAR (512 * FAR_KIB) /* stays in a CPU's cache on its way through both processes */
#define COPY_NEAR FAR_MSEC /* a round trip below this */

struct copy_options {
	bool verify, dirty, json, quiet;
	int64_t workers;
	struct far_opt_list layer;
	char *connections;
	uint64_t deadline;
};

static const struct far_opt copy_options[] = {
	{ "verify", FAR_OPT_BOOL, offsetof(struct copy_options, verify),
	  .help = "read both sides again afterwards and compare them" },
	{ "dirty", FAR_OPT_BOOL, offsetof(struct copy_options, dirty),
	  .help = "SRC is the local store of a mount that has ended: copy only what its remote lacks" },
	{ "layer", FAR_OPT_LIST, offsetof(struct copy_options, layer), .value_name = "NAME[:KEY=VALUE,...]",
	  .help = "wrap SRC in a layer; may be repeated, the first is outermost" },
	{ "workers", FAR_OPT_INT, offsetof(struct copy_options, workers), .min = 1, .max = 256, .value_name = "N",
	  .help = "pieces that are on their way at once", .def = "auto", .also = "auto", .also_value = 0 },
	{ "connections", FAR_OPT_STRING, offsetof(struct copy_options, connections), .value_name = "DEMAND+BULK",
	  .help = "connections to each network peer", .def = "2+2" },
	{ "deadline", FAR_OPT_DURATION, offsetof(struct copy_options, deadline), .min = 1e6, .value_name = "DURATION",
	  .help = "how long opening each side may take", .def = "30s" },
	{ "json", FAR_OPT_BOOL, offsetof(struct copy_options, json), .help = "write the result to standard output as JSON" },
	{ "quiet", FAR_OPT_BOOL, offsetof(struct copy_options, quiet), .help = "no progress and no summary" },
	FAR_OPT_END
};

struct copy {
	const struct copy_options *opts;
	const char *src_uri, *dst_uri;
	struct far_open_opts open;
	struct far_backend *src, *dst;
	int src_fd, dst_fd; /* streams; -1: none */
	int signals;
	bool fresh, sink;
	uint64_t size;      /* of SRC; UINT64_MAX: a stream's, unknown */
	struct copy_result res;
	uint64_t started;
};

/* "-" or "fd:N": its descriptor; -1: a URI; -2: wrong. */
static int copy_stream_fd(const char *arg, int dash)
{
	unsigned fd;
	int end = 0;

	if (strcmp(arg, "-") == 0)
		return dash;
	if (strncmp(arg, "fd:", 3) != 0)
		return -1;
	if (sscanf(arg + 3, "%6u%n", &fd, &end) != 1 || arg[3 + end] || fcntl((int)fd, F_GETFD) < 0)
		return -2;
	return (int)fd;
}

static int copy_streams(struct copy *c)
{
	c->src_fd = copy_stream_fd(c->src_uri, STDIN_FILENO);
	c->dst_fd = copy_stream_fd(c->dst_uri, STDOUT_FILENO);
	if (c->src_fd == -2 || c->dst_fd == -2)
		return cli_usage(&cli_copy, "'%s' is no open descriptor of this process",
				 c->src_fd == -2 ? c->src_uri : c->dst_uri);
	if (c->opts->verify && (c->src_fd >= 0 || c->dst_fd >= 0))
		return cli_usage(&cli_copy, "a stream cannot be read twice: leave out --verify");
	if (c->opts->json && c->dst_fd == STDOUT_FILENO)
		return cli_usage(&cli_copy, "standard output carries the data: leave out --json");
	if (c->opts->layer.n && c->src_fd >= 0)
		return cli_usage(&cli_copy, "--layer wraps a region, and SRC is a stream. Leave it out");
	return CLI_GO;
}

/* ---------------------------------------------------------------------------------------------------- DST */

/* The path of a file: URI, malloc'd; NULL if it is something else. */
static char *copy_file_path(const char *uri)
{
	struct far_uri u = { 0 };
	char scheme[32];
	char *path = NULL;

	far_uri_scheme(uri, scheme, sizeof scheme);
	if (strcmp(scheme, "file") == 0) {
		if (far_uri_parse(&u, uri, NULL) == 0)
			path = strdup(u.path);
		far_uri_fini(&u);
	}
	return path;
}

/* Make a file DST of SRC's size: create it, or set a regular file's length. Anything else is left alone. */
static int copy_prepare_file(struct copy *c, const char *path)
{
	struct stat st, src;
	char *src_path = copy_file_path(c->src_uri);
	int code = CLI_GO;
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666);

	if (fd < 0 || fstat(fd, &st) < 0) {
		cli_say("cannot copy to %s: %s. Choose another DST", c->dst_uri, far_strerror(errno));
		code = CLI_FAILED;
	} else if (src_path && stat(src_path, &src) == 0 && src.st_dev == st.st_dev && src.st_ino == st.st_ino) {
		code = cli_usage(&cli_copy, "SRC and DST are the same file, %s", path);
	} else if (S_ISREG(st.st_mode)) {
		c->fresh = st.st_size == 0;
		if (c->size != UINT64_MAX && ftruncate(fd, (off_t)c->size) < 0) {
			cli_say("cannot copy to %s: its length cannot be set: %s", c->dst_uri, far_strerror(errno));
			code = CLI_FAILED;
		}
	}
	far_fd_close(&fd);
	free(src_path);
	return code;
}

static int copy_open_dst(struct copy *c)
{
	struct far_error err = { 0 };
	char *path = copy_file_path(c->dst_uri);
	char sink[40];
	const char *uri = c->dst_uri;
	int code = path ? copy_prepare_file(c, path) : CLI_GO;

	free(path);
	if (code != CLI_GO)
		return code;
	if (strcmp(uri, "null:") == 0) {
		snprintf(sink, sizeof sink, "null:%" PRIu64, c->size == UINT64_MAX ? FAR_SIZE_MAX : c->size);
		uri = sink;
		c->sink = true;
	} else if (strncmp(uri, "null:", 5) == 0) {
		c->sink = true;
	}
	if (c->size != UINT64_MAX)
		c->open.bytes = c->size; /* what a peer that cannot tell is taken to have */
	if (cli_open(uri, &c->open, NULL, &c->dst, &err) < 0)
		return cli_fail("cannot copy", &err);
	c->open.bytes = 0;
	if (c->size != UINT64_MAX && far_size(c->dst) != c->size) {
		cli_say("cannot copy to %s: it has %" PRIu64 " bytes and %s has %" PRIu64 ". Choose a DST of the same size",
			c->dst_uri, far_size(c->dst), c->src_uri, c->size);
		return CLI_USAGE;
	}
	if (!(far_facts(c->dst)->caps & FAR_CAP_WRITE)) {
		cli_say("cannot copy to %s: it is read-only. Choose another DST", c->dst_uri);
		return CLI_FAILED;
	}
	return CLI_GO;
}

static int copy_open_src(struct copy *c)
{
	struct far_open_opts open = c->open;
	struct far_error err = { 0 };

	open.read_only = true;
	c->size = UINT64_MAX;
	if (c->src_fd >= 0)
		return CLI_GO;
	if (cli_open(c->src_uri, &open, &c->opts->layer, &c->src, &err) < 0)
		return cli_fail("cannot copy", &err);
	c->size = far_size(c->src);
	return CLI_GO;
}

/* ------------------------------------------------------------------------------------------- the moving */

static uint64_t copy_gcd(uint64_t a, uint64_t b)
{
	return b ? copy_gcd(b, a % b) : a;
}

/* About as much as that suits the path, a size that both sides' chunks divide; 0: there is none in reach. */
static uint64_t copy_piece_size(const struct copy *c, bool away)
{
	uint64_t piece = away ? COPY_PIECE : COPY_PIECE_NEAR;
	uint64_t a = far_max(1, far_facts(c->src)->chunk);
	uint64_t b = c->dst ? far_max(1, far_facts(c->dst)->chunk) : 1;
	uint64_t unit = a / copy_gcd(a, b);

	if (unit > 32 * FAR_MIB / b)
		return 0;
	unit *= b;
	return unit > piece ? unit : piece - piece % unit;
}

/* Whether a small read takes so long that many pieces must be on their way at once. */
static bool copy_is_far(struct far_backend *b)
{
	const struct far_facts *f = b ? far_facts(b) : NULL;
	size_t len = f ? (size_t)far_min(f->bytes, f->chunk ? f->chunk : 512) : 0;
	char *buf = len ? malloc(len) : NULL;
	uint64_t began = far_now();

	if (!buf)
		return false;
	int r = far_read(b, 0, buf, len, 0);
	free(buf);
	return r < 0 || far_now() - began > COPY_NEAR;
}

/* Near by, more pieces than CPUs can carry only push each other out of their caches. */
static unsigned copy_workers(const struct copy *c, bool away)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	if (c->opts->workers)
		return (unsigned)c->opts->workers;
	return away ? 32 : (unsigned)far_max(2, far_min((uint64_t)cpus, 16));
}

static void copy_say_error(const struct copy *c, const struct copy_result *res, bool verify)
{
	const char *side = res->writing ? c->dst_uri : c->src_uri;
	char done[24], size[24];

	progress_size(done, sizeof done, res->done);
	progress_size(size, sizeof size, c->size);
	if (res->error == -ESHUTDOWN)
		cli_say("stopped by a signal: %s of %s were %s. %s", done, size, verify ? "compared" : "copied",
			verify ? "Run it again to compare all" : "DST is not complete: run it again");
	else if (res->differs)
		cli_say("%s and %s differ: the first different byte is at offset %" PRIu64 ". Copy again, or find out who else "
			"writes there",
			c->src_uri, c->dst_uri, res->at);
	else
		cli_say("cannot %s %s at offset %" PRIu64 ": %s. %s of %s were done; try again, or add --layer retry",
			res->writing && !verify ? "write to" : "read from", side, res->at, cli_strerror(res->error), done,
			size);
}

static int copy_engine_loop(struct copy *c, struct copy_engine *e, struct copy_result *res, struct progress *p)
{
	unsigned asked = 0;

	while (!copy_wait(e, far_now() + 100 * FAR_MSEC, res)) {
		progress_update(p, res->done, progress_rate(p, res->done));
		int sig = cli_signal_take(c->signals);
		if (!sig || sig == SIGHUP)
			continue;
		if (++asked > 1) {
			cli_say("stopped by a second signal: %s is not complete", c->dst_uri);
			_exit(CLI_SIGNAL);
		}
		copy_stop(e);
		far_stop(c->src);
		far_stop(c->dst);
	}
	progress_clear(p);
	return res->error || res->differs ? -1 : 0;
}

/* One pass over all bytes: copying, or comparing. */
static int copy_pass(struct copy *c, bool verify)
{
	bool away = copy_is_far(c->src) || copy_is_far(c->dst);
	struct copy_conf conf = { .src = c->src, .dst = c->dst, .out_fd = c->dst_fd, .verify = verify, .fresh = c->fresh,
				  .sink = c->sink, .piece = copy_piece_size(c, away), .workers = copy_workers(c, away) };
	struct copy_result res = { 0 };
	struct copy_engine *e;
	struct far_error err = { 0 };
	struct progress p;
	char head[400], size[24];

	if (!conf.piece) {
		cli_say("cannot copy %s to %s: no piece of up to 32 MiB is made of whole chunks of both. Wrap SRC with "
			"--layer chunked",
			c->src_uri, c->dst_uri);
		return CLI_FAILED;
	}
	if (copy_start(&conf, &e, &err) < 0)
		return cli_fail("cannot copy", &err);
	snprintf(head, sizeof head, "%s  %s  %s", verify ? "verify" : "copy", c->dst_uri,
		 progress_size(size, sizeof size, c->size));
	progress_init(&p, verify ? "verify" : "copy", head, c->size, c->opts->quiet || (c->dst_fd >= 0 && !isatty(2)));
	int r = copy_engine_loop(c, e, &res, &p);
	copy_free(e);
	if (!verify)
		c->res = res;
	if (r < 0) {
		copy_say_error(c, &res, verify);
		return res.differs ? CLI_FAILED : cli_exit_code(res.error);
	}
	return CLI_GO;
}

/* A stream to a stream or a region: in order, by this thread. */
static int copy_from_stream_put(struct copy *c, uint64_t off, const char *buf, size_t n)
{
	if (c->dst_fd >= 0)
		return far_io_write(c->dst_fd, buf, n);
	if (c->fresh && far_is_zero(buf, n)) {
		c->res.zeros += n;
		return 0;
	}
	return far_write(c->dst, off, buf, n, FAR_BULK);
}

static int copy_from_stream(struct copy *c, uint64_t limit)
{
	char *buf = malloc(COPY_PIECE);
	struct progress p;
	size_t got = 0;
	int r = buf ? 0 : -ENOMEM;

	progress_init(&p, "copy", "copy", 0, c->opts->quiet || !isatty(STDERR_FILENO));
	while (r == 0) {
		r = far_io_read_some(c->src_fd, buf, COPY_PIECE, &got);
		if (r < 0 || got == 0)
			break;
		if (got > limit - c->res.done) {
			r = -EFBIG;
			break;
		}
		r = copy_from_stream_put(c, c->res.done, buf, got);
		c->res.writing = r < 0;
		c->res.done += got;
		progress_update(&p, c->res.done, progress_rate(&p, c->res.done));
	}
	free(buf);
	progress_clear(&p);
	return r;
}

/* A stream into a file whose length is known only at its end. */
static int copy_stream_to_file(struct copy *c, const char *path)
{
	uint64_t had = 0;
	struct stat st;
	int code = copy_prepare_file(c, path);
	struct far_error err = { 0 };
	char *buf = malloc(COPY_PIECE);
	int fd = code == CLI_GO ? open(path, O_WRONLY | O_CLOEXEC) : -1;
	size_t got = 0;
	int r = 0;

	if (code == CLI_GO && (fd < 0 || !buf || fstat(fd, &st) < 0))
		r = -errno;
	else if (code == CLI_GO)
		had = S_ISREG(st.st_mode) ? (uint64_t)st.st_size : 0;
	while (code == CLI_GO && r == 0) {
		r = far_io_read_some(c->src_fd, buf, COPY_PIECE, &got);
		if (r < 0 || got == 0)
			break;
		bool hole = c->res.done >= had && far_is_zero(buf, got);
		c->res.zeros += hole ? got : 0;
		r = hole ? 0 : far_io_pwrite(fd, c->res.done, buf, got, 0);
		c->res.done += got;
	}
	if (code == CLI_GO && r == 0 && S_ISREG(st.st_mode) && ftruncate(fd, (off_t)c->res.done) < 0)
		r = -errno;
	if (code == CLI_GO && r == 0)
		r = far_io_fdatasync(fd);
	far_fd_close(&fd);
	free(buf);
	if (r < 0) {
		far_error_set(&err, -r, "cannot copy to %s at offset %" PRIu64 ": %s. The file is not complete", c->dst_uri,
			      c->res.done, far_strerror(r));
		cli_fail("cannot copy", &err);
		code = CLI_FAILED;
	}
	return code;
}

static int copy_stream(struct copy *c)
{
	char *path = c->dst_fd < 0 ? copy_file_path(c->dst_uri) : NULL;
	int code = CLI_GO;

	if (path) {
		code = copy_stream_to_file(c, path);
		free(path);
		return code;
	}
	if (c->dst_fd < 0)
		code = copy_open_dst(c);
	if (code != CLI_GO)
		return code;
	uint64_t limit = c->dst ? far_size(c->dst) : UINT64_MAX;
	int r = copy_from_stream(c, limit);
	if (r == 0 && c->dst && !c->sink && c->res.done < limit) {
		cli_say("the stream ended after %" PRIu64 " bytes and %s has %" PRIu64 ". The rest of it is as before",
			c->res.done, c->dst_uri, limit);
		return CLI_FAILED;
	}
	if (r == -EFBIG)
		cli_say("the stream is longer than %s, which has %" PRIu64 " bytes. What came first was written", c->dst_uri,
			limit);
	else if (r < 0)
		cli_say("cannot %s at offset %" PRIu64 ": %s. What came before was copied",
			c->res.writing ? "write" : "read the stream", c->res.done, far_strerror(r));
	return r < 0 ? CLI_FAILED : CLI_GO;
}

static int copy_flush(struct copy *c)
{
	int r = c->dst ? far_flush(c->dst) : 0;

	if (r < 0) {
		cli_say("cannot flush %s: %s. What was written may not last: copy again", c->dst_uri, cli_strerror(r));
		return CLI_FAILED;
	}
	return CLI_GO;
}

static void copy_summary(const struct copy *c)
{
	double s = (double)(far_now() - c->started) / 1e9;
	char size[24], zeros[24], speed[24];

	if (c->opts->json) {
		struct json_object *o = json_object_new_object();
		json_object_object_add(o, "bytes", json_object_new_int64((int64_t)c->res.done));
		json_object_object_add(o, "zeros", json_object_new_int64((int64_t)c->res.zeros));
		json_object_object_add(o, "seconds", json_object_new_double(s));
		json_object_object_add(o, "verified", json_object_new_boolean(c->opts->verify));
		puts(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN));
		json_object_put(o);
	}
	if (c->opts->quiet)
		return;
	fprintf(stderr, "copied %s in %.2f s (%s), %s of it zeros%s\n", progress_size(size, sizeof size, c->res.done), s,
		progress_speed(speed, sizeof speed, s > 0 ? (double)c->res.done / s : 0),
		progress_size(zeros, sizeof zeros, c->res.zeros), c->opts->verify ? "; verified" : "");
}

/* What a mount could not push, at its places in DST. */
static int copy_only_dirty(struct copy *c)
{
	struct copy_dirty *d = NULL;
	struct far_error err = { 0 };
	struct far_backend *outer;
	bool writing = false;
	uint64_t at = 0;

	if (c->opts->verify || c->opts->layer.n || c->src_fd >= 0 || c->dst_fd >= 0)
		return cli_usage(&cli_copy, "--dirty copies from a local store, file:PATH or dir:PATH, to a region: leave out --verify, "
				 "--layer and streams");
	if (copy_dirty_open(c->src_uri, &d, &err) < 0)
		return cli_fail("cannot copy", &err);
	c->size = copy_dirty_size(d);
	int code = copy_open_dst(c);
	if (code == CLI_GO && far_facts(c->dst)->chunk) {
		if (far_layer_open("chunked", c->dst, &outer, &err) < 0)
			code = cli_fail("cannot copy", &err);
		else
			c->dst = outer;
	}
	if (code == CLI_GO) {
		int r = copy_dirty_go(d, c->dst, &c->res.done, &at, &writing);
		if (r < 0) {
			cli_say("cannot %s %s at offset %" PRIu64 ": %s. What came before was copied", writing ? "write to" : "read from",
				writing ? c->dst_uri : c->src_uri, at, cli_strerror(r));
			code = cli_exit_code(r);
		}
	}
	copy_dirty_close(d);
	return code;
}

static int copy_go(struct copy *c)
{
	int code = copy_streams(c);

	if (code == CLI_GO && c->opts->dirty) {
		code = copy_only_dirty(c);
		if (code == CLI_GO)
			code = copy_flush(c);
		if (code == CLI_GO)
			copy_summary(c);
		return code == CLI_GO ? CLI_OK : code;
	}

	if (code == CLI_GO)
		code = copy_open_src(c);
	if (code == CLI_GO && c->src_fd >= 0) {
		code = copy_stream(c);
	} else if (code == CLI_GO) {
		code = c->dst_fd >= 0 ? CLI_GO : copy_open_dst(c);
		if (code == CLI_GO) { /* a signal may end the process while it opens; from here on it is ours */
			c->signals = cli_signals(false);
			code = copy_pass(c, false);
		}
	}
	if (code == CLI_GO)
		code = copy_flush(c);
	if (code == CLI_GO && c->opts->verify)
		code = copy_pass(c, true);
	if (code == CLI_GO)
		copy_summary(c);
	return code == CLI_GO ? CLI_OK : code;
}

static int copy_run(int argc, char **argv)
{
	struct copy_options opts = { .deadline = 30 * FAR_SEC };
	struct copy c = { .opts = &opts, .src_fd = -1, .dst_fd = -1, .signals = -1, .open = FAR_OPEN_OPTS_INIT,
			  .started = far_now() };
	struct far_error err = { 0 };
	struct cli_args args;
	int code = cli_parse(&cli_copy, &opts, argc, argv, &args);

	if (code == CLI_GO && cli_connections(opts.connections, &c.open, &err) < 0)
		code = cli_usage(&cli_copy, "%s", err.text);
	if (code == CLI_GO) {
		c.open.deadline_ms = (uint32_t)far_min(opts.deadline / FAR_MSEC, UINT32_MAX);
		c.src_uri = args.v[0];
		c.dst_uri = args.v[1];
		code = copy_go(&c);
	}
	far_close(c.src);
	far_close(c.dst);
	far_fd_close(&c.signals);
	cli_parse_fini(&cli_copy, &opts, &args);
	return code;
}

const struct cli_verb cli_copy = {
	.name = "copy", .synopsis = "SRC DST", .cannot = "cannot copy",
	.about = "Copy a region: SRC and DST are URIs, - or fd:N.", .options = copy_options, .min_args = 2, .max_args = 2,
	.run = copy_run,
};
