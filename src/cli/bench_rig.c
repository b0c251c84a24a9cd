/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A rig is one or two children of the bench, which itself stays free of threads while it forks:
 *
 *     bench ---socket---  server child    store, far_server         only with grpc
 *           `--socket---  mount child     [store] delay, probes, far_mnt
 *
 * Over its socket a child gets one request at a time and answers it. The end of the socket is the end of the child: it
 * gives up what it holds and removes its folder. The mount's child is made last and holds no socket of the server's, so
 * when the bench is killed both see their end.
 *
 * The bench must not serve what it reads: a thread that waits for a page could then be the one that brings it.
 */
#define _GNU_SOURCE
#include "cli/bench_rig.h"

#include "backend/backend.h"
#include "base/clock.h"
#include "cli/bench_io.h"
#include "cli/cli.h"
#include "mount/mount.h"

#include <ftw.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define RIG_BLOCK (1 << 20)
#define RIG_NAME_MAX 200
#define RIG_WARM_MAX (2 * FAR_GIB) /* more would take longer than what is measured */

enum rig_op { RIG_STATUS, RIG_FLUSH, RIG_WAIT };

struct rig_request {
	enum rig_op op;
	unsigned percent;
};

struct rig_answer {
	int result;
	struct far_error err;
	struct bench_rig_status status;
	uint64_t cpu_made;
	char text[RIG_NAME_MAX]; /* the mount's path, the server's URI */
};

struct rig_child {
	pid_t pid;
	int fd; /* ours of the socket; -1: no such child */
};

struct bench_rig {
	struct bench_rig_conf conf;
	struct rig_child server, mount;
	char uri[RIG_NAME_MAX], path[RIG_NAME_MAX];
	uint64_t open_ns, touched;
	uint64_t cpu_made; /* what making and filling the store took */
	_Atomic uint64_t *delays; /* shared with the mount's child, one a chunk; NULL without probe */
	size_t n_delays;
};

/* What a child works with. */
struct rig_work {
	struct bench_rig *rig;
	int fd;
	char folder[64];
	struct far_backend *store;
	struct far_server *server;
	struct far_mnt *mnt;
	struct rig_answer answer;
};

/* ------------------------------------------------------------------------------------------------- probes */

/* Two of them, over and under the delay layer: the difference is what it waited. The thread carries it between them. */
struct rig_probe {
	struct bench_rig *rig; /* NULL: the lower one */
	struct far_backend *inner;
};

static _Thread_local uint64_t rig_below;

static int rig_probe_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct rig_probe *p = self;
	uint64_t begin = far_now();

	rig_below = p->rig ? 0 : rig_below;
	int r = far_read(p->inner, off, buf, len, flags);
	uint64_t took = far_now() - begin;
	if (!p->rig) {
		rig_below += took;
		return r;
	}
	for (uint64_t at = off / p->rig->conf.chunk; !r && at <= (off + len - 1) / p->rig->conf.chunk; at++)
		atomic_store_explicit(&p->rig->delays[at], far_max(took - far_min(took, rig_below), 1), memory_order_relaxed);
	return r;
}

static int rig_probe_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct rig_probe *p = self;
	return far_write(p->inner, off, buf, len, flags);
}

static int rig_probe_flush(void *self)
{
	struct rig_probe *p = self;
	return far_flush(p->inner);
}

static int rig_probe_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct rig_probe *p = self;
	return far_extents(p->inner, off, len, out, max, n);
}

static void rig_probe_stop(void *self)
{
	struct rig_probe *p = self;
	far_stop(p->inner);
}

static void rig_probe_close(void *self)
{
	struct rig_probe *p = self;
	far_close(p->inner);
	free(p);
}

static int rig_probe_open(struct bench_rig *rig, struct far_backend **b)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = rig_probe_read, .write = rig_probe_write,
					    .flush = rig_probe_flush, .extents = rig_probe_extents, .stop = rig_probe_stop,
					    .close = rig_probe_close };
	struct far_facts facts = *far_facts(*b);
	struct rig_probe *p = malloc(sizeof *p);

	if (!p)
		return -ENOMEM;
	*p = (struct rig_probe){ rig, *b };
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	int r = far_backend_new(&ops, p, &facts, b);
	if (r)
		free(p);
	return r;
}

/* -------------------------------------------------------------------------------------- in either child */

static int rig_remove_cb(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	return remove(path);
}

static int rig_folder(struct rig_work *w, struct far_error *err)
{
	const char *tmp = getenv("TMPDIR");
	int n = snprintf(w->folder, sizeof w->folder, "%s/farpage-bench.XXXXXX", tmp && tmp[0] ? tmp : "/tmp");

	if (n >= (int)sizeof w->folder)
		strcpy(w->folder, "/tmp/farpage-bench.XXXXXX");
	if (mkdtemp(w->folder))
		return 0;
	int r = far_error_set(err, errno, "cannot make a folder %s: %s", w->folder, far_strerror(errno));
	w->folder[0] = 0;
	return r;
}

static int rig_fill(struct far_backend *b, struct far_error *err)
{
	char *buf = malloc(RIG_BLOCK);
	int r = buf ? 0 : -ENOMEM;

	for (uint64_t off = 0; off < far_size(b) && !r; off += RIG_BLOCK) {
		size_t len = (size_t)far_min(RIG_BLOCK, far_size(b) - off);
		bench_pattern(buf, off, len);
		r = far_write(b, off, buf, len, FAR_BULK);
	}
	free(buf);
	return r ? far_error_set(err, -r, "cannot fill the store: %s", far_strerror(r)) : 0;
}

static int rig_wrap(struct far_backend **b, const char *spec, struct far_error *err)
{
	struct far_backend *outer;
	int r = far_layer_open(spec, *b, &outer, err);

	if (!r)
		*b = outer;
	return r;
}

/* The store, full, in *b. */
static int rig_store(struct rig_work *w, struct far_backend **b, struct far_error *err)
{
	const struct bench_rig_conf *c = &w->rig->conf;
	struct far_backend *raw;
	char uri[200];
	int r = 0;

	if (c->store == BENCH_MEM)
		snprintf(uri, sizeof uri, "mem:%" PRIu64, c->size);
	else if (c->store == BENCH_FILE)
		snprintf(uri, sizeof uri, "file:%s/store?size=%" PRIu64, w->folder, c->size);
	else
		snprintf(uri, sizeof uri, "dir:%s/store?size=%" PRIu64 "&chunk=%" PRIu64, w->folder, c->size, c->chunk);
	r = far_open(uri, NULL, &raw, err);
	if (r)
		return r;
	r = c->empty ? 0 : rig_fill(raw, err);
	if (!r && c->chunking == BENCH_CHUNK_SERVER)
		r = rig_wrap(&raw, "chunked", err);
	if (r)
		far_close(raw);
	else
		*b = raw;
	return r;
}

static void rig_proc_status(const char *key, uint64_t *out)
{
	char line[128];
	FILE *f = fopen("/proc/self/status", "re");

	while (f && fgets(line, sizeof line, f))
		if (strncmp(line, key, strlen(key)) == 0)
			*out = strtoull(line + strlen(key), NULL, 10) * FAR_KIB;
	if (f)
		fclose(f);
}

static void rig_usage(struct bench_rig_status *st)
{
	struct rusage u;

	getrusage(RUSAGE_SELF, &u);
	st->cpu_ns = (uint64_t)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * FAR_SEC +
		     (uint64_t)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * FAR_USEC;
	rig_proc_status("VmRSS:", &st->rss);
}

static void rig_serve(struct rig_work *w, const struct rig_request *q)
{
	struct rig_answer *a = &w->answer;

	a->result = 0;
	switch (q->op) {
	case RIG_STATUS:
		rig_usage(&a->status);
		a->status.st = (struct far_status)FAR_STATUS_INIT;
		if (w->mnt)
			far_mnt_status(w->mnt, &a->status.st);
		break;
	case RIG_FLUSH:
		a->result = w->mnt ? far_mnt_flush(w->mnt) : 0;
		break;
	case RIG_WAIT:
		a->result = w->mnt ? far_mnt_wait_percent(w->mnt, q->percent) : 0;
		break;
	}
}

/* Answer the opening, then each request; returns when the bench is gone or wants no more. */
static void rig_loop(struct rig_work *w, int result, const struct far_error *err)
{
	struct rig_request q;

	w->answer.result = result;
	w->answer.err = *err;
	rig_usage(&w->answer.status);
	while (send(w->fd, &w->answer, sizeof w->answer, MSG_NOSIGNAL) == (ssize_t)sizeof w->answer && !result &&
	       recv(w->fd, &q, sizeof q, 0) == (ssize_t)sizeof q)
		rig_serve(w, &q);
}

/* ----------------------------------------------------------------------------------------------- children */

static void rig_server_child(struct rig_work *w)
{
	struct far_server_opts opts = FAR_SERVER_OPTS_INIT;
	struct far_error err = { 0 };
	char *bound = NULL;
	int r = rig_folder(w, &err);

	if (!r)
		r = rig_store(w, &w->store, &err);
	if (!r)
		r = far_server_new(&opts, &w->server, &err);
	if (!r)
		r = far_server_export(w->server, "default", w->store, &err);
	if (!r)
		r = far_server_listen(w->server, "grpc://127.0.0.1:0", &bound, &err);
	snprintf(w->answer.text, sizeof w->answer.text, "%s", bound ? bound : "");
	free(bound);
	rig_usage(&w->answer.status);
	w->answer.cpu_made = w->answer.status.cpu_ns;
	rig_loop(w, r, &err);
	if (w->server)
		far_server_stop(w->server);
	far_server_free(w->server);
	far_close(w->store);
}

/* Probe, delay, probe. */
static int rig_distance(struct rig_work *w, struct far_backend **b, struct far_error *err)
{
	const struct bench_rig_conf *c = &w->rig->conf;
	char spec[96];
	int r = 0;

	if (c->chunking == BENCH_CHUNK_CLIENT && far_facts(*b)->chunk)
		r = rig_wrap(b, "chunked", err);
	if (!r && c->probe)
		r = rig_probe_open(NULL, b);
	snprintf(spec, sizeof spec, "delay:rtt=%" PRIu64 "us,rate=%" PRIu64, c->rtt / FAR_USEC, c->rate);
	if (!r && (c->rtt || c->rate || c->probe))
		r = rig_wrap(b, spec, err);
	if (!r && c->probe)
		r = rig_probe_open(w->rig, b);
	return r;
}

static int rig_mount(struct rig_work *w, struct far_backend *b, char *target, struct far_error *err)
{
	const struct bench_rig_conf *c = &w->rig->conf;
	struct far_mnt_conf mc = { .remote = b, .source = "bench", .name = "region", .target = target, .network = c->grpc,
				   .opts = FAR_MOUNT_OPTS_INIT };
	int r = rig_distance(w, &mc.remote, err);

	mc.opts.mode = c->managed ? FAR_MODE_MANAGED : FAR_MODE_DIRECT;
	mc.opts.chunk = c->chunk;
	mc.opts.window = c->window;
	mc.opts.dirty_max = c->dirty_max;
	mc.opts.pull_workers = c->pull_workers;
	if (!r && mkdir(target, 0700) < 0)
		r = far_error_set(err, errno, "cannot make %s: %s", target, far_strerror(errno));
	if (r) {
		far_close(mc.remote);
		return r;
	}
	return far_mnt_open(&mc, &w->mnt, err);
}

void bench_rig_warm(uint64_t bytes)
{
	uint64_t free_bytes = (uint64_t)sysconf(_SC_AVPHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
	size_t len = (size_t)far_min(bytes, far_min(free_bytes / 2, RIG_WARM_MAX));
	char *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return;
	madvise(p, len, MADV_HUGEPAGE);
	for (size_t at = 0; at < len; at += 4096)
		p[at] = 1;
	munmap(p, len);
}

static void rig_mount_child(struct rig_work *w)
{
	const struct bench_rig_conf *c = &w->rig->conf;
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct bench_rig_status before = { 0 };
	struct far_backend *b = NULL;
	struct far_error err = { 0 };
	char target[80];
	int r = rig_folder(w, &err);

	snprintf(target, sizeof target, "%s/mnt", w->folder);
	if (!r && !c->grpc)
		r = rig_store(w, &b, &err);
	if (!r && !c->empty)
		bench_rig_warm(c->managed ? 2 * c->size : c->size);
	rig_usage(&before);
	uint64_t begin = far_now();
	if (!r && c->grpc)
		r = far_open(w->rig->uri, &opts, &b, &err);
	if (!r)
		r = rig_mount(w, b, target, &err);
	w->answer.status.open_ns = far_now() - begin;
	rig_usage(&w->answer.status);
	w->answer.cpu_made = before.cpu_ns;
	w->answer.status.touched = w->answer.status.rss - far_min(before.rss, w->answer.status.rss);
	snprintf(w->answer.text, sizeof w->answer.text, "%s", w->mnt ? far_mnt_path(w->mnt) : "");
	rig_loop(w, r, &err);
	far_mnt_close(w->mnt); /* nobody needs the bytes any more: no flush */
}

static int rig_spawn(struct bench_rig *rig, struct rig_child *child, void (*fn)(struct rig_work *), struct rig_answer *a,
		     struct far_error *err)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return far_error_set(err, errno, "cannot make a socket: %s", far_strerror(errno));
	fflush(NULL);
	pid_t pid = fork();
	if (pid == 0) {
		struct rig_work w = { .rig = rig, .fd = pair[1] };
		close(pair[0]);
		far_fd_close(&rig->server.fd);
		cli_signals(false); /* the terminal's signals are for the bench: its end is ours */
		fn(&w);
		if (w.folder[0])
			nftw(w.folder, rig_remove_cb, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
		_exit(0);
	}
	close(pair[1]);
	*child = (struct rig_child){ pid, pair[0] };
	if (pid < 0)
		return far_error_set(err, errno, "cannot make a process: %s", far_strerror(errno));
	if (recv(child->fd, a, sizeof *a, 0) != (ssize_t)sizeof *a)
		return far_error_set(err, EIO, "a process of the bench ended before it was ready");
	if (a->result && err)
		*err = a->err;
	return a->result;
}

/* -------------------------------------------------------------------------------------------- in the bench */

static void rig_end(struct rig_child *c)
{
	if (c->fd < 0)
		return;
	far_fd_close(&c->fd);
	while (c->pid > 0 && waitpid(c->pid, NULL, 0) < 0 && errno == EINTR)
		;
}

int bench_rig_open(const struct bench_rig_conf *conf, struct bench_rig **out, struct far_error *err)
{
	struct bench_rig *rig = calloc(1, sizeof *rig);
	struct rig_answer a = { 0 };
	int r = 0;

	if (!rig)
		return far_error_set(err, ENOMEM, "no memory for a rig");
	rig->conf = *conf;
	rig->server.fd = rig->mount.fd = -1;
	if (!rig->conf.chunk)
		rig->conf.chunk = 64 * FAR_KIB;
	if (conf->probe) {
		rig->n_delays = (size_t)far_div_up(conf->size, rig->conf.chunk);
		rig->delays = mmap(NULL, rig->n_delays * 8, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		if (rig->delays == MAP_FAILED) {
			free(rig);
			return far_error_set(err, ENOMEM, "no memory for a rig");
		}
	}
	if (conf->grpc) {
		r = rig_spawn(rig, &rig->server, rig_server_child, &a, err);
		memcpy(rig->uri, a.text, sizeof rig->uri);
		rig->cpu_made = a.cpu_made;
	}
	if (!r)
		r = rig_spawn(rig, &rig->mount, rig_mount_child, &a, err);
	memcpy(rig->path, a.text, sizeof rig->path);
	rig->open_ns = a.status.open_ns;
	rig->touched = a.status.touched;
	rig->cpu_made += a.cpu_made;
	if (r)
		bench_rig_close(rig);
	else
		*out = rig;
	return r;
}

const char *bench_rig_path(const struct bench_rig *r)
{
	return r->path;
}

static int rig_call(struct rig_child *c, struct rig_request q, struct rig_answer *a)
{
	if (send(c->fd, &q, sizeof q, MSG_NOSIGNAL) != (ssize_t)sizeof q || recv(c->fd, a, sizeof *a, 0) != (ssize_t)sizeof *a)
		return -EPIPE;
	return a->result;
}

int bench_rig_status(struct bench_rig *r, struct bench_rig_status *st)
{
	struct rig_answer a = { 0 };
	uint64_t cpu = 0;
	int e = 0;

	if (r->server.fd >= 0)
		e = rig_call(&r->server, (struct rig_request){ .op = RIG_STATUS }, &a);
	cpu = a.status.cpu_ns;
	if (!e)
		e = rig_call(&r->mount, (struct rig_request){ .op = RIG_STATUS }, &a);
	*st = a.status;
	st->cpu_ns += cpu;
	st->cpu_ns -= far_min(r->cpu_made, st->cpu_ns);
	st->open_ns = r->open_ns;
	st->touched = r->touched;
	return e;
}

int bench_rig_flush(struct bench_rig *r)
{
	struct rig_answer a;
	return rig_call(&r->mount, (struct rig_request){ .op = RIG_FLUSH }, &a);
}

int bench_rig_wait(struct bench_rig *r, unsigned percent)
{
	struct rig_answer a;
	return rig_call(&r->mount, (struct rig_request){ .op = RIG_WAIT, .percent = percent }, &a);
}

uint64_t bench_rig_delay(void *rig, uint64_t off)
{
	struct bench_rig *r = rig;
	return atomic_load_explicit(&r->delays[off / r->conf.chunk], memory_order_relaxed);
}

void bench_rig_close(struct bench_rig *r)
{
	if (!r)
		return;
	rig_end(&r->mount);
	rig_end(&r->server);
	if (r->delays)
		munmap((void *)r->delays, r->n_delays * 8);
	free(r);
}
