/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What is done to a pointer, and the child that does it:
 *
 *     bench --fork--> child: plain or a store, [delay], far_map(), act --fork--> server of the store, only with grpc
 *
 * The result comes back through memory that bench and child share. The server is made before the child has any thread,
 * and ends when the child's end of a socket is closed, however that came about.
 *
 * "plain" is memory, as bench/bare has it, whose pages cannot be mapped: a remote that costs nothing but a copy.
 */
#define _GNU_SOURCE
#include "cli/bench_pointer.h"

#include "backend/backend.h"
#include "base/clock.h"
#include "base/thread.h"
#include "cli/bench_io.h"
#include "cli/bench_rig.h"
#include "cli/bench_touch.h"
#include "cli/cli.h"
#include "frontend/pointer.h"
#include "region/region.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define ACT_BLOCK FAR_MIB
#define ACT_ROUNDS 5
#define ACT_PAUSE (100 * FAR_USEC)
#define ACT_WAIT_MS 120000

struct pointer_work {
	const struct pointer_conf *conf;
	struct pointer_result *res;
	struct far_error err;
	struct far_backend *store; /* with share, and in the server; else NULL */
	char *plain;               /* with neither: the bytes */
	char uri[128];             /* with grpc */
	struct far_mount *mount;
	char *p;
	char trace[64];            /* file, while there is one */
};

/* ----------------------------------------------------------------------------------------- a plain remote */

static int act_plain_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	memcpy(buf, (char *)self + off, len);
	return 0;
}

static int act_plain_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	memcpy((char *)self + off, buf, len);
	return 0;
}

static int act_plain_flush(void *self)
{
	return 0;
}

/* Over memory that stays the caller's. */
static int act_plain(char *memory, uint64_t bytes, struct far_backend **out)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = act_plain_read, .write = act_plain_write,
					    .flush = act_plain_flush };
	struct far_facts facts = FAR_FACTS_INIT;

	facts.bytes = bytes;
	facts.caps = FAR_CAP_WRITE;
	return far_backend_new(&ops, memory, &facts, out);
}

/* ---------------------------------------------------------------------------------------------- the child */

static int act_store(struct pointer_work *w)
{
	char uri[64], *buf = malloc(ACT_BLOCK);
	int r = buf ? 0 : -ENOMEM;

	snprintf(uri, sizeof uri, "mem:%" PRIu64, w->conf->size);
	if (!r)
		r = far_open(uri, NULL, &w->store, &w->err);
	for (uint64_t off = 0; off < w->conf->size && !r; off += ACT_BLOCK) {
		size_t len = (size_t)far_min(ACT_BLOCK, w->conf->size - off);
		bench_pattern(buf, off, len);
		r = far_write(w->store, off, buf, len, FAR_BULK);
	}
	free(buf);
	return r;
}

static int act_bytes(struct pointer_work *w)
{
	w->plain = mmap(NULL, w->conf->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (w->plain == MAP_FAILED)
		return -errno;
	madvise(w->plain, w->conf->size, MADV_HUGEPAGE);
	bench_pattern(w->plain, 0, w->conf->size);
	return 0;
}

static void act_server(struct pointer_work *w, int fd)
{
	struct far_server_opts opts = FAR_SERVER_OPTS_INIT;
	struct far_server *server = NULL;
	char *bound = NULL, end;
	int r = act_store(w);

	if (!r)
		r = far_server_new(&opts, &server, &w->err);
	if (!r)
		r = far_server_export(server, "default", w->store, &w->err);
	if (!r)
		r = far_server_listen(server, "grpc://127.0.0.1:0", &bound, &w->err);
	snprintf(w->uri, sizeof w->uri, "%s", r ? "" : bound);
	if (send(fd, w->uri, sizeof w->uri, MSG_NOSIGNAL) == (ssize_t)sizeof w->uri && !r)
		while (recv(fd, &end, 1, 0) < 0 && errno == EINTR)
			;
	_exit(0);
}

/* The store, here or in a process of its own. */
static int act_remote(struct pointer_work *w)
{
	int pair[2];

	if (!w->conf->grpc)
		return w->conf->share ? act_store(w) : act_bytes(w);
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	pid_t pid = fork();
	if (pid == 0) {
		close(pair[0]);
		act_server(w, pair[1]);
	}
	close(pair[1]); /* pair[0] is closed by this process' end */
	if (pid < 0)
		return -errno;
	if (recv(pair[0], w->uri, sizeof w->uri, 0) != (ssize_t)sizeof w->uri || !w->uri[0])
		return far_error_set(&w->err, EIO, "the server of the bench could not be started");
	return 0;
}

static int act_map_with(struct pointer_work *w, const char *order, const char *record)
{
	const struct pointer_conf *c = w->conf;
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_backend *b = NULL, *delay;
	char spec[96];
	int r = 0;

	o.mode = c->mode;
	o.read_only = c->read_only;
	o.chunk = c->chunk;
	o.mechanism = c->mechanism;
	o.tracking = c->tracking;
	o.pull_workers = c->pull_workers;
	o.push_workers = c->push_workers;
	o.order = order;
	o.record_order = record;
	uint64_t begin = far_now();
	if (c->grpc)
		r = far_map_uri(w->uri, &o, &w->mount, &w->err);
	else if (c->share)
		r = far_map(w->store, &o, &w->mount, &w->err);
	else
		r = act_plain(w->plain, c->size, &b);
	if (!r && b && (c->rtt || c->rate)) {
		snprintf(spec, sizeof spec, "delay:rtt=%" PRIu64 "us,rate=%" PRIu64, c->rtt / FAR_USEC, c->rate);
		r = far_layer_open(spec, b, &delay, &w->err);
		if (!r)
			b = delay;
	}
	if (!r && b)
		r = far_map(b, &o, &w->mount, &w->err);
	w->res->open_ns = far_now() - begin;
	w->p = r ? NULL : far_addr(w->mount);
	if (r)
		far_close(b);
	return r;
}

static int act_map(struct pointer_work *w)
{
	return act_map_with(w, NULL, NULL);
}

static int act_map_local(struct pointer_work *w)
{
	int r = act_map(w);

	if (!r)
		r = far_mount_populate(w->mount, 0, w->conf->size);
	return r ? r : far_mount_wait(w->mount, 100, ACT_WAIT_MS);
}

/* How much of [p, p+len) is mapped in huge pages. */
static uint64_t act_huge(const char *p, uint64_t len)
{
	FILE *f = fopen("/proc/self/smaps", "re");
	uint64_t from, to, kib, sum = 0;
	bool inside = false;
	char line[256];

	while (f && fgets(line, sizeof line, f)) {
		if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &from, &to) == 2)
			inside = from < (uintptr_t)p + len && to > (uintptr_t)p;
		else if (inside && (sscanf(line, "AnonHugePages: %" SCNu64, &kib) == 1 ||
				    sscanf(line, "ShmemPmdMapped: %" SCNu64, &kib) == 1 ||
				    sscanf(line, "FilePmdMapped: %" SCNu64, &kib) == 1))
			sum += kib * FAR_KIB;
	}
	if (f)
		fclose(f);
	return sum;
}

static uint64_t act_cpu(void)
{
	struct rusage u;

	getrusage(RUSAGE_SELF, &u);
	return (uint64_t)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * FAR_SEC +
	       (uint64_t)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) * FAR_USEC;
}

static void act_child(const struct pointer_conf *conf, struct pointer_result *res)
{
	struct pointer_work w = { .conf = conf, .res = res };
	int r = act_remote(&w);

	bench_rig_warm(conf->grpc ? conf->size : 2 * conf->size);
	if (!r)
		r = conf->act(&w);
	if (w.mount) {
		res->st = (struct far_status)FAR_STATUS_INIT;
		far_mount_status(w.mount, &res->st);
		if (!res->note[0])
			snprintf(res->note, sizeof res->note, "%" PRIu64 " faults, %" PRIu64 " fetches on demand", res->st.faults,
				 res->st.demand_reads);
		res->huge = w.p ? act_huge(w.p, conf->size) : 0;
		far_mount_close(w.mount);
	}
	if (w.trace[0])
		unlink(w.trace);
	res->code = r;
	res->err = w.err;
	if (r && !w.err.code)
		far_error_set(&res->err, -r, "%s", far_strerror(r));
}

int bench_pointer_run(const struct pointer_conf *conf, struct pointer_result *res)
{
	struct pointer_result *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int status = 0;

	if (shared == MAP_FAILED)
		return -errno;
	shared->code = -ECHILD;
	fflush(NULL);
	pid_t parent = getpid(), pid = fork();
	if (pid == 0) {
		/* Ctrl-C ends the bench, and the bench its child. */
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() == parent)
			act_child(conf, shared);
		_exit(0);
	}
	while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	*res = *shared;
	if (pid < 0 || !WIFEXITED(status))
		far_error_set(&res->err, ECHILD, "the process of the bench that had the pointer was ended by signal %d",
			      pid < 0 ? 0 : WTERMSIG(status));
	munmap(shared, sizeof *shared);
	return res->code;
}

/* ----------------------------------------------------------------------------------------------- the acts */

static uint64_t act_word(uint64_t off)
{
	uint64_t w;

	bench_pattern(&w, off, sizeof w);
	return w;
}

int bench_pointer_seq(struct pointer_work *w)
{
	uint64_t begin = far_now(), cpu = act_cpu();
	int r = act_map(w);

	if (r)
		return r;
	touch_pages(w->p, w->conf->size);
	w->res->ns = far_now() - begin;
	w->res->cpu_ns = act_cpu() - cpu;
	w->res->bytes = w->conf->size;
	w->res->wrong = bench_check(w->p, 0, w->conf->size, false);
	return 0;
}

int bench_pointer_share(struct pointer_work *w)
{
	uint64_t begin = far_now();
	int r = act_map(w);

	if (!r)
		r = far_mount_populate(w->mount, 0, w->conf->size);
	if (r)
		return r;
	uint64_t sum = touch_sum(w->p, w->conf->size);
	w->res->ns = far_now() - begin;
	w->res->bytes = w->conf->size;
	w->res->wrong = bench_check(w->p, 0, w->conf->size, false);
	return sum ? 0 : -EIO;
}

/* What is left of a chunk is filled behind the program's back: it is let end, or the next fault would wait for the CPU. */
static void act_settle(void *arg, size_t i)
{
	struct pointer_work *w = arg;
	struct far_status st = FAR_STATUS_INIT;
	uint64_t until = far_now() + FAR_SEC;

	while (far_mount_status(w->mount, &st) == 0 && st.local < i * w->conf->chunk && far_now() < until)
		far_sleep_until(far_now() + ACT_PAUSE, false);
}

int bench_pointer_single(struct pointer_work *w)
{
	const struct pointer_conf *c = w->conf;
	size_t n = (size_t)far_min(c->ops, c->size / c->chunk);
	uint32_t *order = touch_shuffled((uint32_t)(c->size / c->chunk), c->seed);
	uint64_t *ns = calloc(n, sizeof *ns);
	int r = order && ns ? act_map(w) : -ENOMEM;

	if (!r) {
		uint64_t begin = far_now();
		w->res->wrong = 8 * touch_chunks(w->p, order, n, c->chunk, ACT_PAUSE, c->seed, ns, act_word, act_settle, w);
		w->res->ns = far_now() - begin;
		w->res->bytes = n * 8;
		struct touch_times t = touch_times(ns, n);
		w->res->p50 = t.p50;
		w->res->p99 = t.p99;
		w->res->longest = t.longest;
		snprintf(w->res->note, sizeof w->res->note, "%zu faults", n);
	}
	free(order);
	free(ns);
	return r;
}

int bench_pointer_read(struct pointer_work *w)
{
	int r = act_map_local(w);
	uint64_t sum = 0;

	for (unsigned i = 0; i < ACT_ROUNDS && !r; i++) {
		uint64_t begin = far_now();
		sum += touch_sum(w->p, w->conf->size);
		uint64_t ns = far_now() - begin;
		w->res->ns = i ? far_min(w->res->ns, ns) : ns;
	}
	w->res->bytes = w->conf->size;
	if (!r)
		w->res->wrong = bench_check(w->p, 0, w->conf->size, false);
	return r || sum ? r : -EIO;
}

int bench_pointer_store(struct pointer_work *w)
{
	uint64_t pages = w->conf->size / TOUCH_PAGE, best = UINT64_MAX;
	int r = act_map_local(w);

	/* What was filled last may not be armed yet: a flush looks at everything once. */
	if (!r)
		r = far_mount_flush(w->mount);
	for (unsigned i = 0; i < ACT_ROUNDS + 1 && !r; i++) {
		uint64_t begin = far_now();
		touch_store_pages(w->p, w->conf->size, i);
		uint64_t ns = far_now() - begin;
		if (i == 0)
			w->res->p50 = ns / pages;
		else
			best = far_min(best, ns);
	}
	w->res->ns = best;
	w->res->value = (double)best / (double)pages;
	w->res->bytes = w->conf->size;
	return r;
}

/* A pointer without a mount around it: what it does when it looks for stores can be asked for by itself. */
static int act_pointer(struct pointer_work *w, struct far_pointer **out)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_pointer_conf conf = { .writable = true, .managed = true, .opts = &o };
	int r = act_plain(w->plain, w->conf->size, &conf.below);

	if (r)
		return r;
	o.mode = FAR_MODE_MANAGED;
	o.chunk = w->conf->chunk;
	o.mechanism = w->conf->mechanism;
	o.tracking = w->conf->tracking;
	o.push_workers = 0;
	r = far_pointer_open(&conf, out, &w->err);
	if (r) {
		far_close(conf.below);
		return r;
	}
	w->p = far_pointer_addr(*out);
	r = far_pointer_populate(*out, 0, w->conf->size);
	/* Whatever is written by being filled is found now. */
	return r ? r : far_pointer_flush(*out);
}

/* Rounds in which other pages are stored into, and found: what is timed is all that a flush does before it pushes. */
static int act_find_rounds(struct pointer_work *w, struct far_pointer *p, const uint32_t *order, uint64_t n)
{
	struct far_region *region = far_pointer_region(p);
	uint64_t best = UINT64_MAX;
	int r = 0;

	for (unsigned i = 0; i < ACT_ROUNDS && !r; i++) {
		for (uint64_t k = i * n; k < (i + 1) * n; k++)
			touch_store_pages(w->p + (uint64_t)order[k] * TOUCH_PAGE, TOUCH_PAGE, k);
		uint64_t begin = far_now();
		r = far_region_collect(region);
		best = far_min(best, far_now() - begin);
		for (uint64_t k = i * n; k < (i + 1) * n && !r; k++)
			if (far_region_look(region, (uint64_t)order[k] * TOUCH_PAGE) != FAR_LOOK_DIRTY)
				r = far_error_set(&w->err, EIO, "page %" PRIu32 " was stored into and not found", order[k]);
	}
	w->res->ns = best;
	w->res->st = (struct far_status)FAR_STATUS_INIT;
	far_pointer_status(p, &w->res->st);
	w->res->huge = act_huge(w->p, w->conf->size);
	return r;
}

int bench_pointer_find(struct pointer_work *w)
{
	uint64_t pages = w->conf->size / TOUCH_PAGE, n = far_max(1, pages / 100);
	uint32_t *order = touch_shuffled((uint32_t)pages, w->conf->seed);
	struct far_pointer *p = NULL;
	int r = order ? act_pointer(w, &p) : -ENOMEM;

	if (!r)
		r = act_find_rounds(w, p, order, n);
	snprintf(w->res->note, sizeof w->res->note, "%" PRIu64 " of %" PRIu64 " pages", n, pages);
	if (p) {
		far_pointer_stop(p);
		far_pointer_close(p);
	}
	free(order);
	return r;
}

int bench_pointer_pull(struct pointer_work *w)
{
	uint64_t begin = far_now(), cpu = act_cpu();
	int r = act_map(w);

	if (!r)
		r = far_mount_wait(w->mount, 100, ACT_WAIT_MS);
	if (r)
		return r;
	w->res->ns = far_now() - begin;
	w->res->cpu_ns = act_cpu() - cpu;
	w->res->bytes = w->conf->size;
	w->res->wrong = bench_check(w->p, 0, w->conf->size, false);
	return 0;
}

struct act_thread {
	struct far_thread t;
	const char *at;
	uint64_t off, ns;
	_Atomic bool *go;
	bool wrong;
};

static void *act_absent_thread(void *arg)
{
	struct act_thread *a = arg;

	while (!atomic_load_explicit(a->go, memory_order_acquire))
		far_thread_yield();
	uint64_t begin = far_now(), got = touch_read(a->at);
	a->ns = far_now() - begin;
	a->wrong = got != act_word(a->off);
	return NULL;
}

int bench_pointer_absent(struct pointer_work *w)
{
	unsigned n = w->conf->threads;
	uint64_t step = w->conf->size / n / w->conf->chunk * w->conf->chunk;
	struct act_thread *v = calloc(n, sizeof *v);
	_Atomic bool go = false;
	int r = v && step ? act_map(w) : -ENOMEM;

	for (unsigned i = 0; i < n && !r; i++) {
		v[i].off = i * step;
		v[i].at = w->p + v[i].off;
		v[i].go = &go;
		r = far_thread_start(&v[i].t, "bench-absent", act_absent_thread, &v[i]);
	}
	atomic_store_explicit(&go, true, memory_order_release);
	for (unsigned i = 0; i < n && v; i++) {
		far_thread_join(&v[i].t);
		w->res->longest = far_max(w->res->longest, v[i].ns);
		w->res->wrong += v[i].wrong ? 8 : 0;
	}
	w->res->bytes = 8 * n;
	w->res->value = w->conf->rtt ? (double)w->res->longest / (double)w->conf->rtt : 0;
	free(v);
	return r;
}

static int act_start(struct pointer_work *w, const uint32_t *order, uint64_t *ns, uint64_t *took, bool second)
{
	char spec[80];

	snprintf(spec, sizeof spec, "trace:%s", w->trace);
	uint64_t begin = far_now();
	int r = act_map_with(w, second ? spec : NULL, second ? NULL : w->trace);
	if (r)
		return r;
	w->res->wrong += 8 * touch_chunks(w->p, order, w->conf->ops, w->conf->chunk, 0, w->conf->seed, ns, act_word,
					  NULL, NULL);
	*took = far_now() - begin;
	w->res->bytes += w->conf->ops * 8;
	return 0;
}

int bench_pointer_trace(struct pointer_work *w)
{
	const struct pointer_conf *c = w->conf;
	uint32_t *order = touch_shuffled((uint32_t)(c->size / c->chunk), c->seed);
	uint64_t *ns = calloc(c->ops, sizeof *ns), first = 0, second = 0;
	const char *tmp = getenv("TMPDIR");
	int r = order && ns ? 0 : -ENOMEM;

	snprintf(w->trace, sizeof w->trace, "%.40s/farpage-bench.XXXXXX", tmp && tmp[0] && strlen(tmp) <= 40 ? tmp : "/tmp");
	int fd = mkstemp(w->trace);
	if (fd < 0) {
		r = far_error_set(&w->err, errno, "cannot make %s: %s", w->trace, far_strerror(errno));
		w->trace[0] = 0;
	}
	far_fd_close(&fd);
	if (!r)
		r = act_start(w, order, ns, &first, false);
	if (!r) {
		r = far_mount_close(w->mount);
		w->mount = NULL;
	}
	if (!r)
		r = act_start(w, order, ns, &second, true);
	w->res->ns = second;
	w->res->value = second ? (double)first / (double)second : 0;
	snprintf(w->res->note, sizeof w->res->note, "%u chunks at random, %.2f s and then %.2f s", c->ops, (double)first / 1e9,
		 (double)second / 1e9);
	free(order);
	free(ns);
	return r;
}
