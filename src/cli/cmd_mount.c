/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage mount: a region as a file. This file holds the options; mount_loop.c runs it. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "base/clock.h"
#include "base/uri.h"
#include "base/io.h"
#include "mount/child.h"
#include "mount/control.h"
#include "mount/kept.h"
#include "cli/mount_loop.h"
#include "cli/serve_hooks.h"
#include "wire/wire.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum mount_as { MOUNT_AS_AUTO, MOUNT_AS_FUSE, MOUNT_AS_NBD_SOCKET = 4 };

#define MOUNT_UNSET UINT64_MAX /* "not given": such options make `--mode auto` choose managed */
#define MOUNT_UNSET_INT (-2)

#define MOUNT_NEVER 0x1p62 /* of --follow */
#define MOUNT_KNOWN_MS 5000 /* how long a remote may take that we can begin without */

struct mount_conf {
	int mode, as, durable, on_fail;
	struct far_opt_list layer, local_layer;
	char *local, *map, *run, *name, *order, *record_order, *connections, *control;
	bool background, read_only, quiet, take_over, discard_clean, force;
	uint64_t follow, chunk, local_max, dirty_max, push_interval, pull_first, window, deadline;
	int64_t pull_workers, push_workers, max_blocked, max_partial;
};

static const char *const mount_modes[] = { "auto", "direct", "managed", NULL };
static const char *const mount_as[] = { "auto", "fuse", "nbd", "ublk", "nbd-socket", "char", NULL };
static const char *const mount_durables[] = { "remote", "local", NULL };
static const char *const mount_on_fails[] = { "error", "wait", NULL };

#define OPT(k, knd, field) { .key = (k), .kind = FAR_OPT_##knd, .offset = offsetof(struct mount_conf, field)
static const struct far_opt mount_options[] = {
	OPT("mode", ENUM, mode), .names = mount_modes, .value_name = "auto|direct|managed", .def = "auto",
	    .help = "each access goes to SOURCE (direct), or a local copy is pulled and pushed (managed)" },
	OPT("as", ENUM, as), .names = mount_as, .value_name = "auto|fuse|nbd-socket", .def = "auto",
	    .help = "the frontend: a file, or an NBD server on TARGET/nbd.sock, which needs neither root nor a kernel module" },
	OPT("layer", LIST, layer), .value_name = "NAME[:KEY=VALUE,...]",
	    .help = "wrap SOURCE in a layer, such as delay:rtt=40ms; may be repeated, the first is outermost" },
	OPT("local", STRING, local), .value_name = "URI", .def = "mem:", .help = "where the local copy is kept" },
	OPT("local-layer", LIST, local_layer), .value_name = "NAME[:KEY=VALUE,...]",
	    .help = "wrap the local store in a layer; may be repeated" },
	OPT("map", STRING, map), .value_name = "FILE|none", .def = "the local store's path and .farmap",
	    .help = "where it is kept what of the local copy is there and what of it is unsaved; none: in memory" },
	OPT("discard-clean", BOOL, discard_clean),
	    .help = "if the local copy is not of what SOURCE holds now: forget what is not unsaved" },
	OPT("force", BOOL, force), .help = "with --discard-clean: push what is unsaved over what SOURCE holds now" },
	OPT("take-over", BOOL, take_over), .help = "take the right to write from whoever has SOURCE mounted" },
	OPT("local-max", SIZE, local_max), .value_name = "SIZE", .def = "none", .also = "none",
	    .help = "keep at most this much local; clean chunks are given back" },
	OPT("read-only", BOOL, read_only), .help = "refuse writes" },
	OPT("follow", DURATION, follow), .min = 1e7, .value_name = "DURATION", .def = "1s", .also = "never",
	    .also_value = MOUNT_NEVER, .help = "a read-only mount looks so often for what others have written" },
	OPT("chunk", SIZE, chunk), .min = 4096, .max = 32 << 20, .value_name = "SIZE", .def = "64K",
	    .help = "unit of transfer, a power of two from 4K to 32M" },
	OPT("pull-workers", INT, pull_workers), .max = 1024, .value_name = "N", .def = "auto", .also = "auto",
	    .also_value = -1, .help = "background pulls at once; 0: no background pull" },
	OPT("push-workers", INT, push_workers), .max = 1024, .value_name = "N", .def = "8",
	    .help = "background pushes at once; 0: push only at flush and exit" },
	OPT("push-interval", DURATION, push_interval), .min = 1e6, .value_name = "DURATION", .def = "1s",
	    .help = "time between background pushes" },
	OPT("pull-first", SIZE, pull_first), .value_name = "SIZE", .def = "0",
	    .help = "pull this much before the mount is usable" },
	OPT("order", STRING, order), .value_name = "ORDER", .def = "sequential",
	    .help = "what is pulled first: sequential, ranges:0-1M,900M-, trace:FILE or hint:mp4" },
	OPT("record-order", STRING, record_order), .value_name = "FILE",
	    .help = "write the order of first touches here, for --order trace:FILE" },
	OPT("window", SIZE, window), .value_name = "SIZE", .def = "auto", .also = "auto",
	    .help = "bytes that may be in flight" },
	OPT("connections", STRING, connections), .value_name = "DEMAND+BULK", .def = "2+2",
	    .help = "connections to a network SOURCE" },
	OPT("dirty-max", SIZE, dirty_max), .min = 65536, .value_name = "SIZE", .def = "1G",
	    .help = "slow writers down past this many unsaved bytes" },
	OPT("max-partial", INT, max_partial), .min = 1, .max = 16777216, .value_name = "N", .def = "65536",
	    .help = "half-written absent chunks that are kept track of" },
	OPT("durable", ENUM, durable), .names = mount_durables, .value_name = "remote|local", .def = "remote",
	    .help = "what fsync promises: the bytes are on SOURCE, or in the local store" },
	OPT("deadline", DURATION, deadline), .min = 1e6, .value_name = "DURATION", .def = "30s",
	    .help = "how long an access may wait for SOURCE" },
	OPT("on-fail", ENUM, on_fail), .names = mount_on_fails, .value_name = "error|wait", .def = "error",
	    .help = "after the deadline programs get an error, or go on waiting" },
	OPT("max-blocked", INT, max_blocked), .min = 1, .max = 4096, .value_name = "N", .def = "256",
	    .help = "accesses that may wait for SOURCE at once" },
	OPT("name", STRING, name), .value_name = "NAME", .def = "the export's, or region",
	    .help = "of the file inside a directory" },
	OPT("background", BOOL, background), .help = "return once the file is usable" },
	OPT("run", STRING, run), .value_name = "CMD",
	    .help = "run a shell command with $FARPAGE (the path) and $FARPAGE_URI set, then unmount; its exit code is returned" },
	OPT("control", STRING, control), .value_name = "PATH", .help = "put the control socket here" },
	OPT("quiet", BOOL, quiet), .help = "no progress" },
	FAR_OPT_END
};
#undef OPT

/* The export's name in a network URI's path, "region" for the default one and for local sources. */
static int mount_name(const struct mount_conf *conf, const char *source, char *buf, size_t n)
{
	struct far_uri u = { 0 };

	snprintf(buf, n, "%s", conf->name ? conf->name : "region");
	if (!conf->name && cli_is_network(source) && far_uri_parse(&u, source, NULL) == 0 && u.authority) {
		const char *path = u.path + (u.path[0] == '/');
		if (path[0] && strcmp(path, "default") != 0)
			snprintf(buf, n, "%s", path);
	}
	far_uri_fini(&u);
	if (!buf[0] || strchr(buf, '/') || strcmp(buf, ".") == 0 || strcmp(buf, "..") == 0)
		return cli_usage(&cli_mount, "'%s' cannot be a file's name. Choose one with --name", buf);
	return CLI_GO;
}

static bool mount_asked_managed(const struct mount_conf *c)
{
	return c->local || c->map || c->local_layer.n || c->order || c->record_order || c->durable != -1 ||
	       c->pull_workers != MOUNT_UNSET_INT || c->push_workers != MOUNT_UNSET_INT || c->local_max != MOUNT_UNSET ||
	       c->dirty_max != MOUNT_UNSET || c->push_interval != MOUNT_UNSET || c->pull_first != MOUNT_UNSET ||
	       c->window != MOUNT_UNSET;
}

static uint64_t mount_or(uint64_t v, uint64_t otherwise)
{
	return v == MOUNT_UNSET ? otherwise : v;
}

static void mount_fill(const struct mount_conf *c, struct far_mount_opts *o)
{
	*o = (struct far_mount_opts)FAR_MOUNT_OPTS_INIT;
	o->mode = (enum far_mode)c->mode;
	o->read_only = c->read_only;
	o->chunk = c->chunk;
	o->local = c->local;
	o->map = c->map;
	o->take_over = c->take_over;
	o->discard_clean = c->discard_clean;
	o->force = c->force;
	o->follow_ms = c->follow == (uint64_t)MOUNT_NEVER ? UINT32_MAX : (uint32_t)far_min(c->follow / FAR_MSEC, UINT32_MAX - 1);
	o->local_max = mount_or(c->local_max, 0);
	o->dirty_max = mount_or(c->dirty_max, 0);
	o->pull_workers = c->pull_workers == MOUNT_UNSET_INT ? -1 : (int)c->pull_workers;
	o->push_workers = c->push_workers == MOUNT_UNSET_INT ? -1 : (int)c->push_workers;
	o->push_interval_ms = (uint32_t)(mount_or(c->push_interval, 0) / FAR_MSEC);
	o->pull_first = mount_or(c->pull_first, 0);
	o->window = mount_or(c->window, 0);
	o->order = c->order;
	o->record_order = c->record_order;
	o->durable = c->durable == 1 ? FAR_DURABLE_LOCAL : FAR_DURABLE_REMOTE;
	o->deadline_ms = (uint32_t)far_min(c->deadline / FAR_MSEC, UINT32_MAX);
	o->on_fail = (enum far_on_fail)c->on_fail;
	o->max_blocked = (uint32_t)c->max_blocked;
	o->max_partial = (uint32_t)c->max_partial;
}

static int mount_check(const struct mount_conf *c, const struct cli_args *args, bool memory)
{
	struct stat st;

	if (c->as > MOUNT_AS_FUSE && c->as != MOUNT_AS_NBD_SOCKET)
		return cli_usage(&cli_mount, "--as %s is not in this version. Use --as fuse or --as nbd-socket", mount_as[c->as]);
	if (args->n < 2)
		return cli_usage(&cli_mount, "TARGET is missing: an existing directory or file");
	if (c->background && c->run)
		return cli_usage(&cli_mount, "--background and --run exclude each other. Leave one of them out");
	if (c->mode == FAR_MODE_DIRECT && mount_asked_managed(c))
		return cli_usage(&cli_mount,
				 "--mode direct keeps no local copy: leave out --local, --durable and the pull and push options");
	if (c->force && !c->discard_clean)
		return cli_usage(&cli_mount, "--force goes with --discard-clean: unsaved chunks are pushed, the others forgotten");
	if (c->take_over && c->read_only)
		return cli_usage(&cli_mount, "--take-over takes the right to write, --read-only wants none. Leave one of them out");
	if (c->chunk && (c->chunk & (c->chunk - 1)))
		return cli_usage(&cli_mount, "--chunk %" PRIu64 " is not a power of two", c->chunk);
	if (memory)
		return CLI_GO;
	if (stat(args->v[1], &st) < 0) {
		int code = errno;
		cli_say("cannot mount on %s: %s. %s", args->v[1], far_strerror(code),
			code == ENOENT ? "Make it first, with mkdir or touch"
			: code == ENOTCONN ? "A dead mount lies there: remove it with 'fusermount3 -u'"
					   : "Check the path");
		return CLI_FAILED;
	}
	if (!S_ISDIR(st.st_mode) && c->as == MOUNT_AS_NBD_SOCKET)
		return cli_usage(&cli_mount, "%s is not a directory: the socket is made in one", args->v[1]);
	if (!S_ISDIR(st.st_mode) && !S_ISREG(st.st_mode))
		return cli_usage(&cli_mount, "%s is neither a directory nor a regular file", args->v[1]);
	return CLI_GO;
}

/* The parent of --background: passes the path on, or waits for the child's failure. */
static int mount_parent(pid_t child, int fd)
{
	char line[4200];
	size_t at = 0;
	int status;

	for (ssize_t n; at < sizeof line; at += (size_t)n) {
		n = read(fd, line + at, sizeof line - at);
		if (n <= 0)
			break;
	}
	if (at && line[at - 1] == '\n') {
		fwrite(line, 1, at, stdout);
		return CLI_OK;
	}
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) ? WEXITSTATUS(status) : CLI_FAILED;
}

/* CLI_GO in the process that goes on to mount; *fd is where it announces the path. */
static int mount_daemonise(int *fd)
{
	int pipe_fd[2];

	if (pipe2(pipe_fd, O_CLOEXEC) < 0) {
		cli_say("cannot go to the background: %s", far_strerror(errno));
		return CLI_FAILED;
	}
	fflush(stdout);
	pid_t child = fork();
	if (child < 0) {
		cli_say("cannot go to the background: %s", far_strerror(errno));
		return CLI_FAILED;
	}
	if (child > 0) {
		close(pipe_fd[1]);
		int code = mount_parent(child, pipe_fd[0]);
		close(pipe_fd[0]);
		return code;
	}
	close(pipe_fd[0]);
	setsid();
	*fd = pipe_fd[1];
	return CLI_GO;
}

/* With what the map remembers the remote may be out of reach. A remote that is another one than the map's is opened as it
 * is: the mount compares and says more. */
static int mount_open_known(const struct mount_conf *conf, const char *source, struct far_open_opts *opts,
			    const struct far_persist *map, struct far_backend **out, bool *offline, struct far_error *err)
{
	struct far_origin o = FAR_ORIGIN_INIT;

	if (!map || far_persist_is_new(map) || !cli_is_network(source))
		return cli_open(source, opts, &conf->layer, out, err);
	opts->known = &far_persist_info(map)->facts;
	opts->deadline_ms = (uint32_t)far_min(opts->deadline_ms, MOUNT_KNOWN_MS);
	int r = cli_open(source, opts, &conf->layer, out, err);
	if (r == 0) { /* opening has asked, and waited */
		*offline = far_origin(*out, &o, FAR_NOWAIT) == -EAGAIN;
		return 0;
	}
	if (r != -ESTALE)
		return r;
	opts->known = NULL;
	return cli_open(source, opts, &conf->layer, out, err);
}

static int mount_open_source(const struct mount_conf *conf, const char *source, const struct mount_parent *parent,
			     const struct far_persist *map, struct far_backend **out, bool *offline)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct far_error err = { 0 };

	opts.read_only = conf->read_only;
	opts.deadline_ms = (uint32_t)far_min(conf->deadline / FAR_MSEC, UINT32_MAX);
	if (cli_connections(conf->connections, &opts, &err) < 0)
		return cli_usage(&cli_mount, "%s", err.text);
	int r = parent && parent->backend_fd >= 0
			? far_grpc_open_fd(parent->backend_fd, "the program's own backend", &opts, out, &err)
			: mount_open_known(conf, source, &opts, map, out, offline, &err);
	return r < 0 ? cli_fail("cannot mount", &err) : CLI_GO;
}

/* What the local store's last mount knew. A program's own backend has no name by which it could be known again. */
static int mount_open_map(const struct mount_conf *conf, const struct far_mount_opts *o, const struct mount_parent *parent,
			  struct far_persist **map)
{
	struct far_error err = { 0 };

	if (conf->mode == FAR_MODE_DIRECT || (parent && parent->backend_fd >= 0))
		return CLI_GO;
	return far_kept_open(o, map, &err) < 0 ? cli_fail("cannot mount", &err) : CLI_GO;
}

/* The program learns how large the source is, and hands memory over for it. */
static int mount_take_memory(const struct mount_parent *parent, struct mount_loop *l, struct far_handover *h)
{
	struct far_child_hello hello = { .bytes = far_size(l->conf.remote) };
	struct far_error err = { 0 };
	int socket = parent->memory_fd;

	hello.writable = !l->conf.opts.read_only && (far_facts(l->conf.remote)->caps & FAR_CAP_WRITE);
	int r = far_io_write(socket, &hello, sizeof hello);
	if (r)
		far_error_set(&err, -r, "the program that wants memory has gone: %s", far_strerror(r));
	else
		r = far_uffd_receive(socket, h, &err);
	if (!r)
		r = far_uffd_accept(socket, h, 0, NULL); /* whether it is served it learns by our life */
	close(socket);
	l->conf.given = h;
	l->conf.pointer = true;
	return r ? cli_fail("cannot map", &err) : CLI_GO;
}

static int mount_go(const struct mount_conf *conf, const char *source, const char *target,
		    const struct mount_parent *parent)
{
	bool in_memory = !conf->local || strncmp(conf->local, "mem:", 4) == 0;
	struct mount_loop l = { .deadline = conf->deadline, .source = source, .local = in_memory ? NULL : conf->local,
				.run = conf->run, .ready_fd = -1, .life_fd = -1, .quiet = conf->quiet };
	struct far_handover memory = FAR_HANDOVER_INIT;
	struct serve_hooks *hooks = NULL;
	struct far_error err = { 0 };
	char name[256];
	int code = mount_name(conf, source, name, sizeof name);

	if (code != CLI_GO)
		return code;
	mount_fill(conf, &l.conf.opts);
	l.conf.source = source;
	l.conf.name = name;
	l.conf.target = target;
	l.conf.network = !parent || parent->backend_fd < 0 ? cli_is_network(source) : false;
	l.conf.socket = conf->as == MOUNT_AS_NBD_SOCKET;
	l.conf.asked_managed = mount_asked_managed(conf);
	l.conf.local_layers = conf->local_layer.v;
	l.conf.n_local_layers = conf->local_layer.n;
	if (conf->background)
		code = mount_daemonise(&l.ready_fd);
	if (code != CLI_GO)
		return code;
	if (parent) {
		l.life_fd = parent->life_fd;
		l.ready_fd = fcntl(parent->life_fd, F_DUPFD_CLOEXEC, 0);
		if (parent->hooks && serve_hooks_open(parent->hooks, &l.conf.opts, &hooks, &err) < 0)
			return cli_fail("cannot mount", &err);
	}
	code = mount_open_map(conf, &l.conf.opts, parent, &l.conf.persist);
	l.keeps = l.conf.persist != NULL;
	if (code == CLI_GO)
		code = mount_open_source(conf, source, parent, l.conf.persist, &l.conf.remote, &l.conf.offline);
	if (code == CLI_GO && parent && parent->memory_fd >= 0)
		code = mount_take_memory(parent, &l, &memory);
	if (code == CLI_GO && far_control_open(conf->control, target, &l.control, &err) < 0)
		code = cli_fail("cannot mount", &err);
	if (code == CLI_GO) {
		code = mount_loop_run(&l);
	} else {
		far_close(l.conf.remote);
		far_persist_close(l.conf.persist);
	}
	serve_hooks_close(hooks);
	far_handover_fini(&memory);
	far_fd_close(&l.ready_fd);
	return code;
}

static int mount_main(int argc, char **argv, const struct mount_parent *parent)
{
	struct mount_conf conf = { .durable = -1, .local_max = MOUNT_UNSET, .dirty_max = MOUNT_UNSET,
				   .push_interval = MOUNT_UNSET, .pull_first = MOUNT_UNSET, .window = MOUNT_UNSET,
				   .deadline = 30 * FAR_SEC, .pull_workers = MOUNT_UNSET_INT,
				   .push_workers = MOUNT_UNSET_INT, .max_blocked = 256, .max_partial = 65536 };
	struct cli_args args;
	int code = cli_parse(&cli_mount, &conf, argc, argv, &args);

	if (code == CLI_GO)
		code = mount_check(&conf, &args, parent && parent->memory_fd >= 0);
	if (code == CLI_GO)
		code = mount_go(&conf, args.v[0], args.v[1], parent);
	cli_parse_fini(&cli_mount, &conf, &args);
	return code;
}

int mount_for_parent(int argc, char **argv, const struct mount_parent *parent)
{
	return mount_main(argc, argv, parent);
}

static int mount_run(int argc, char **argv)
{
	return mount_main(argc, argv, NULL);
}

const struct cli_verb cli_mount = {
	.name = "mount", .synopsis = "SOURCE TARGET", .cannot = "cannot mount",
	.about = "Show a region as a file: in the directory TARGET, or as the file TARGET.", .options = mount_options,
	.min_args = 1, .max_args = 2, .run = mount_run,
};
