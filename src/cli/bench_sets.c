/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A set is a list of cases. A case opens a rig, does one act on the mounted file and adds one row; a case that cannot be
 * done adds a row that says why. Time to open is measured by the mount's process and shown apart; where a rate is given,
 * "with open" counts it.
 */
#define _GNU_SOURCE
#include "cli/bench_sets.h"

#include "base/clock.h"
#include "base/options.h"
#include "cli/bench_rig.h"
#include "cli/cli.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BENCH_BLOCK FAR_MIB

struct bench_case {
	struct bench *b;
	struct bench_rig_conf rig;
	struct bench_io io;
	struct bench_row row;
	bool local_first; /* wait until all is local before the act */
	int (*act)(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
	void (*finish)(struct bench_case *c, struct bench_rig *rig, const struct bench_io_result *res);
};

static double bench_ms(uint64_t ns)
{
	return (double)ns / 1e6;
}

static double bench_rate(uint64_t bytes, uint64_t ns)
{
	return ns ? (double)bytes / (double)FAR_MIB / ((double)ns / 1e9) : 0;
}

/* "file <- FUSE <- region <- delay 40 ms <- gRPC <- memory" */
static void bench_how(struct bench_case *c)
{
	static const char *const stores[] = { "memory", "file", "directory" };
	const struct bench_rig_conf *r = &c->rig;
	char delay[64] = "", d[16], s[24];

	if (r->rtt || r->rate)
		snprintf(delay, sizeof delay, "delay %s%s%s <- ", far_format_duration(d, sizeof d, r->rtt), r->rate ? " " : "",
			 r->rate ? far_format_size(s, sizeof s, r->rate) : "");
	snprintf(c->row.how, sizeof c->row.how, "FUSE <- %s%s%s%s%s%s", r->managed ? "region <- " : "", delay,
		 r->chunking == BENCH_CHUNK_CLIENT ? "chunked <- " : "", r->grpc ? "gRPC <- " : "",
		 r->chunking == BENCH_CHUNK_SERVER ? "chunked <- " : "", stores[r->store]);
}

static void bench_add(struct bench_case *c)
{
	struct bench *b = c->b;
	const struct bench_row *before = b->rows.n ? &b->rows.v[b->rows.n - 1] : NULL;

	b->failed |= c->row.failed || c->row.wrong;
	if (!b->quiet)
		bench_row_print(&c->row, before);
	bench_rows_add(&b->rows, &c->row);
}

static void bench_latencies(struct bench_row *row, const struct bench_io_result *res)
{
	row->p50_us = (double)res->p50 / 1e3;
	row->p99_us = (double)res->p99 / 1e3;
	row->longest_us = (double)res->longest / 1e3;
}

static int bench_case_act(struct bench_case *c, struct bench_rig *rig, struct far_error *err)
{
	struct bench_rig_status before, after;
	struct bench_io_result res = { 0 };
	int r = c->local_first ? bench_rig_wait(rig, 100) : 0;

	c->io.path = bench_rig_path(rig);
	c->io.opaque = rig;
	if (!r)
		r = bench_rig_status(rig, &before);
	if (r)
		return far_error_set(err, -r, "the mount failed: %s", far_strerror(r));
	r = bench_drop(c->io.path, err);
	if (!r)
		r = c->act(&c->io, &res, err);
	if (r)
		return r;
	r = bench_rig_status(rig, &after);
	if (r)
		return far_error_set(err, -r, "the mount failed: %s", far_strerror(r));
	c->row.open_ms = bench_ms(after.open_ns);
	c->row.checked = res.bytes;
	c->row.wrong = res.wrong;
	/* A managed mount pulls from its first moment on: what it used before the act belongs to the same bytes. */
	uint64_t cpu = after.cpu_ns - (c->rig.managed && !c->local_first ? 0 : before.cpu_ns);
	if (res.bytes >= 64 * FAR_MIB)
		c->row.cpu_s_gib = (double)cpu / 1e9 * (double)FAR_GIB / (double)res.bytes;
	bench_latencies(&c->row, &res);
	c->row.unit = c->row.unit ? c->row.unit : "MiB/s";
	c->row.value = bench_rate(res.bytes, res.ns);
	c->row.with_open = bench_rate(res.bytes, res.ns + after.open_ns);
	if (c->finish)
		c->finish(c, rig, &res);
	return 0;
}

static void bench_run(struct bench_case *c)
{
	struct far_error err = { 0 };
	struct bench_rig *rig = NULL;

	if (c->b->mode != FAR_MODE_AUTO && (c->b->mode == FAR_MODE_MANAGED) != c->rig.managed)
		return;
	c->rig.size = c->rig.size ? c->rig.size : c->b->size ? c->b->size : 256 * FAR_MIB;
	c->rig.chunk = c->rig.chunk ? c->rig.chunk : c->b->chunk ? c->b->chunk : 64 * FAR_KIB;
	c->rig.pull_workers = c->rig.pull_workers ? 0 : -1; /* cases say `true` for "no background pull" */
	c->io.size = c->io.size ? c->io.size : c->rig.size;
	c->io.block = c->io.block ? c->io.block : c->b->block ? c->b->block : BENCH_BLOCK;
	c->io.chunk = c->io.chunk ? c->io.chunk : c->rig.chunk;
	c->io.seed = c->b->seed;
	c->row.unit = c->row.unit ? c->row.unit : "MiB/s";
	bench_how(c);
	if (access("/dev/fuse", R_OK | W_OK) < 0) {
		c->row.skipped = true;
		snprintf(c->row.note, sizeof c->row.note, "skip: /dev/fuse: %s", far_strerror(errno));
	} else if (bench_rig_open(&c->rig, &rig, &err) < 0 || bench_case_act(c, rig, &err) < 0) {
		c->row.failed = true;
		snprintf(c->row.note, sizeof c->row.note, "failed: %.180s", err.text);
	}
	bench_rig_close(rig);
	bench_add(c);
}

/* The store that was asked for, where a set has none of its own. */
static void bench_store(const struct bench *b, struct bench_rig_conf *rig)
{
	if (b->backend == BENCH_ON_GRPC)
		rig->grpc = true;
	else if (b->backend != BENCH_ON_OWN)
		rig->store = (enum bench_store)b->backend;
}

static struct bench_case bench_case(struct bench *b, const char *set, const char *series, const char *x)
{
	struct bench_case c = { .b = b, .row.set = set };

	snprintf(c.row.series, sizeof c.row.series, "%s", series);
	snprintf(c.row.x, sizeof c.row.x, "%s", x);
	return c;
}

static const uint64_t bench_rtts[] = { 0, 1, 2, 5, 10, 20, 40 };

/* The round trips of a set: the one that was asked for, or these. */
static size_t bench_distances(const struct bench *b, const uint64_t *ms, size_t n, uint64_t *out)
{
	if (b->rtt != FAR_NEVER) {
		out[0] = b->rtt;
		return 1;
	}
	for (size_t i = 0; i < n; i++)
		out[i] = ms[i] * FAR_MSEC;
	return n;
}

static const char *bench_distance(char *buf, size_t n, uint64_t rtt)
{
	return rtt ? far_format_duration(buf, n, rtt) : "0 ms";
}

/* -------------------------------------------------------------------------------------------------- latency */

static void bench_latency_finish(struct bench_case *c, struct bench_rig *rig, const struct bench_io_result *res)
{
	c->row.value = c->row.p50_us;
	c->row.with_open = 0;
	snprintf(c->row.note, sizeof c->row.note, "%" PRIu64 " reads; R is what the delay layer took for each", res->ops);
}

static void bench_latency(struct bench *b)
{
	static const uint64_t ms[] = { 0, 1, 10, 40 };
	uint64_t rtt[8], ns = b->ns ? b->ns : 2 * FAR_SEC;
	size_t n = bench_distances(b, ms, FAR_ARRAY_LEN(ms), rtt);
	char d[16];

	for (size_t i = 0; i < 2 * n; i++) {
		bool managed = i % 2;
		struct bench_case c = bench_case(b, "latency", managed ? "managed, pulling" : "direct",
						 bench_distance(d, sizeof d, rtt[i / 2]));
		c.rig = (struct bench_rig_conf){ .size = b->size ? b->size : 512 * FAR_MIB, .rtt = rtt[i / 2],
						 .managed = managed, .probe = true };
		/* The pull takes about as long as the reads. */
		c.rig.rate = managed ? c.rig.size * 9 / 10 * FAR_SEC / ns : 0;
		bench_store(b, &c.rig);
		c.io = (struct bench_io){ .way = BENCH_DIRECT, .ns = ns * 3 / 4, .less = bench_rig_delay };
		c.io.ops = (unsigned)(c.rig.size / (b->chunk ? b->chunk : 64 * FAR_KIB));
		c.row.unit = "us over R";
		c.act = bench_first;
		c.finish = bench_latency_finish;
		bench_run(&c);
	}
}

/* ----------------------------------------------------------------------------------------------- throughput */

static void bench_one_rate(struct bench *b, const char *set, const char *series, const char *x,
			   struct bench_rig_conf rig, bool write, bool local_first)
{
	struct bench_case c = bench_case(b, set, series, x);

	c.rig = rig;
	bench_store(b, &c.rig);
	c.local_first = local_first;
	c.act = write ? bench_fill : bench_read;
	c.io.ns = b->ns ? b->ns : 10 * FAR_SEC;
	bench_run(&c);
}

static void bench_throughput(struct bench *b)
{
	struct bench_rig_conf direct = { 0 }, managed = { .managed = true };

	if (b->rtt != FAR_NEVER)
		direct.rtt = managed.rtt = b->rtt;
	bench_one_rate(b, "throughput", "direct", "read", direct, false, false);
	bench_one_rate(b, "throughput", "direct", "write", direct, true, false);
	bench_one_rate(b, "throughput", "managed, pulling", "read", managed, false, false);
	bench_one_rate(b, "throughput", "managed, local", "read", managed, false, true);
	bench_one_rate(b, "throughput", "managed, local", "write", managed, true, true);
}

static void bench_rtt(struct bench *b)
{
	uint64_t rtt[8];
	size_t n = bench_distances(b, bench_rtts, FAR_ARRAY_LEN(bench_rtts), rtt);
	char d[16];

	for (size_t i = 0; i < 2 * n; i++) {
		struct bench_rig_conf rig = { .rtt = rtt[i / 2], .managed = i % 2 };
		bench_one_rate(b, "rtt", rig.managed ? "managed, pulling" : "direct", bench_distance(d, sizeof d, rig.rtt), rig,
			       false, false);
	}
}

static void bench_window(struct bench *b)
{
	static const uint64_t windows[] = { FAR_MIB, 4 * FAR_MIB, 16 * FAR_MIB, 64 * FAR_MIB, 0 };
	char s[24];

	for (size_t i = 0; i < FAR_ARRAY_LEN(windows); i++) {
		struct bench_rig_conf rig = { .rtt = b->rtt != FAR_NEVER ? b->rtt : 20 * FAR_MSEC, .managed = true,
					      .window = windows[i] };
		bench_one_rate(b, "window", "managed, pulling", windows[i] ? far_format_size(s, sizeof s, windows[i]) : "auto", rig,
			       false, false);
	}
}

static void bench_chunk(struct bench *b)
{
	char s[24];

	for (uint64_t chunk = 4 * FAR_KIB; chunk <= 4 * FAR_MIB; chunk *= 4) {
		struct bench_rig_conf rig = { .rtt = b->rtt != FAR_NEVER ? b->rtt : 10 * FAR_MSEC, .managed = true,
					      .chunk = chunk };
		bench_one_rate(b, "chunk", "managed, pulling", far_format_size(s, sizeof s, chunk), rig, false, false);
	}
}

static void bench_backend(struct bench *b)
{
	static const char *const stores[] = { "memory", "file", "directory" };

	for (unsigned i = 0; i < 4 * BENCH_STORES && b->backend == BENCH_ON_OWN; i++) {
		bool grpc = i % 4 >= 2, write = i % 2;
		char series[32];
		struct bench_rig_conf rig = { .store = (enum bench_store)(i / 4), .grpc = grpc };
		rig.rtt = b->rtt != FAR_NEVER ? b->rtt : 0;
		rig.chunk = rig.store == BENCH_DIR ? FAR_MIB : 0;
		snprintf(series, sizeof series, "%s%s", grpc ? "gRPC, " : "", write ? "write" : "read");
		bench_one_rate(b, "backend", series, stores[rig.store], rig, write, false);
	}
}

static void bench_small_finish(struct bench_case *c, struct bench_rig *rig, const struct bench_io_result *res)
{
	c->row.value = c->row.p50_us;
	c->row.with_open = 0;
}

static void bench_chunking(struct bench *b)
{
	for (unsigned i = 0; i < 4; i++) {
		bool server = i < 2, write = i % 2;
		struct bench_case c = bench_case(b, "chunking", server ? "server" : "client", write ? "write 4K" : "read 4K");
		c.rig = (struct bench_rig_conf){ .store = BENCH_DIR, .grpc = true, .size = 64 * FAR_MIB,
						 .rtt = b->rtt != FAR_NEVER ? b->rtt : 0,
						 .chunking = server ? BENCH_CHUNK_SERVER : BENCH_CHUNK_CLIENT };
		c.io = (struct bench_io){ .way = BENCH_DIRECT, .block = 4096, .threads = 1, .ops = 1000,
					  .ns = b->ns ? b->ns : FAR_SEC };
		c.row.unit = "us";
		c.act = write ? bench_scatter : bench_random;
		c.finish = bench_small_finish;
		bench_run(&c);
	}
}

/* ------------------------------------------------------------------------------------------- under stress */

static void bench_absent_finish(struct bench_case *c, struct bench_rig *rig, const struct bench_io_result *res)
{
	c->row.value = (double)res->longest / (double)c->rig.rtt;
	c->row.with_open = 0;
	snprintf(c->row.note, sizeof c->row.note, "a local read's p99 %.0f us idle, %.0f us meanwhile",
		 (double)res->idle_p99 / 1e3, (double)res->busy_p99 / 1e3);
}

static void bench_fault(struct bench *b)
{
	static const char *const ways[] = { "buffered", "O_DIRECT", "mapped" };

	for (unsigned way = 0; way < FAR_ARRAY_LEN(ways); way++) {
		struct bench_case c = bench_case(b, "fault-64", ways[way], "64 threads");
		c.rig = (struct bench_rig_conf){ .managed = true, .pull_workers = true,
						 .rtt = b->rtt != FAR_NEVER && b->rtt ? b->rtt : 40 * FAR_MSEC };
		c.io = (struct bench_io){ .way = (enum bench_way)way, .threads = b->threads ? b->threads : 64 };
		c.io.chunk = (b->size ? b->size : 256 * FAR_MIB) / (c.io.threads + 1) & ~(64 * FAR_KIB - 1);
		c.row.unit = "round trips";
		c.act = bench_absent;
		c.finish = bench_absent_finish;
		bench_run(&c);
	}
}

static void bench_scatter_finish(struct bench_case *c, struct bench_rig *rig, const struct bench_io_result *res)
{
	c->row.value = (double)res->ops / ((double)res->ns / 1e9);
	c->row.with_open = 0;
}

static void bench_scatters(struct bench *b)
{
	static const uint64_t ms[] = { 0, 40 };
	uint64_t rtt[2];
	size_t n = bench_distances(b, ms, 2, rtt);
	char d[16];

	for (size_t i = 0; i < n; i++) {
		struct bench_case c = bench_case(b, "scatter", "managed", bench_distance(d, sizeof d, rtt[i]));
		c.rig = (struct bench_rig_conf){ .managed = true, .pull_workers = true, .empty = true, .rtt = rtt[i],
						 .size = b->size ? b->size : 4 * FAR_GIB };
		c.io = (struct bench_io){ .way = BENCH_DIRECT, .block = 4096, .ops = b->ops ? b->ops : 20000 };
		c.row.unit = "writes/s";
		c.act = bench_scatter;
		c.finish = bench_scatter_finish;
		bench_run(&c);
	}
}

static void bench_dirty_finish(struct bench_case *c, struct bench_rig *rig, const struct bench_io_result *res)
{
	c->row.with_open = 0;
	snprintf(c->row.note, sizeof c->row.note, "the push may use %.1f MiB/s; budget %.0f MiB",
		 (double)c->rig.rate / (double)FAR_MIB, (double)c->rig.dirty_max / (double)FAR_MIB);
}

static void bench_dirty(struct bench *b)
{
	struct bench_case c = bench_case(b, "dirty", "managed", "past budget");

	c.rig = (struct bench_rig_conf){ .managed = true, .pull_workers = true, .empty = true, .size = 128 * FAR_MIB,
					 .rtt = b->rtt != FAR_NEVER ? b->rtt : 10 * FAR_MSEC, .rate = 50 * FAR_MIB,
					 .dirty_max = 16 * FAR_MIB };
	c.io.block = 128 * FAR_KIB;
	c.act = bench_fill;
	c.finish = bench_dirty_finish;
	bench_run(&c);
}

static int bench_idle(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	far_sleep_until(far_now() + io->ns, false);
	res->ns = io->ns;
	return 0;
}

static void bench_huge_finish(struct bench_case *c, struct bench_rig *rig, const struct bench_io_result *res)
{
	struct bench_rig_status before = { 0 }, after = { 0 };

	bench_rig_status(rig, &before);
	far_sleep_until(far_now() + res->ns, false);
	bench_rig_status(rig, &after);
	c->row.value = c->row.open_ms;
	c->row.with_open = 0;
	snprintf(c->row.note, sizeof c->row.note, "%.0f KiB touched to open; idle %.2f %% CPU", (double)after.touched / 1024,
		 (double)(after.cpu_ns - before.cpu_ns) * 100 / (double)res->ns);
}

static void bench_huge(struct bench *b)
{
	struct bench_case c = bench_case(b, "huge", "managed", "1 TiB");

	c.rig = (struct bench_rig_conf){ .managed = true, .pull_workers = true, .empty = true, .size = 1024 * FAR_GIB };
	c.io.ns = FAR_SEC;
	c.row.unit = "ms to open";
	c.act = bench_idle;
	c.finish = bench_huge_finish;
	bench_run(&c);
}

const struct bench_set bench_sets[] = {
	{ "latency", "first access to a chunk, over what the link takes", bench_latency },
	{ "throughput", "read and write in order", bench_throughput },
	{ "rtt", "read in order, by round trip", bench_rtt },
	{ "window", "read while pulling, by bytes in flight", bench_window },
	{ "chunk", "read while pulling, by chunk size", bench_chunk },
	{ "backend", "read and write in order, by store", bench_backend },
	{ "chunking", "4 KiB to a store of whole chunks, adapted by server or client", bench_chunking },
	{ "fault-64", "64 threads read 64 absent chunks at once", bench_fault },
	{ "scatter", "4 KiB writes to distinct absent chunks", bench_scatters },
	{ "dirty", "writes past the budget of dirty bytes", bench_dirty },
	{ "huge", "opening a region of 1 TiB, and its idle cost", bench_huge },
	{ "pointer", "a region as memory: first touches, single faults, stores, pull", bench_pointer },
	{ NULL, NULL, NULL },
};

/* ---------------------------------------------------------------------------------- a file that is there */

static int bench_drop_act(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	return bench_drop(io->path, err);
}

const struct bench_act bench_acts[] = {
	{ "fill", "write the pattern over it, and fsync", bench_fill, true, false },
	{ "read", "read it in order", bench_read, false, false },
	{ "cold", "drop its page cache, then read it in order", bench_read, false, false },
	{ "verify", "check every byte against the pattern", bench_verify, false, false },
	{ "random", "read blocks at random", bench_random, false, true },
	{ "first", "read 4 KiB of distinct chunks, one by one", bench_first, false, true },
	{ "absent", "threads read distinct chunks at once", bench_absent, false, true },
	{ "scatter", "write blocks to distinct chunks", bench_scatter, true, true },
	{ "write", "write block after block, round and round", bench_write, true, false },
	{ "rewrite", "write blocks at random", bench_rewrite, true, true },
	{ "sync", "write block after block, each with an fsync", bench_sync, true, true },
	{ "drop", "drop its page cache", bench_drop_act, false, false },
	{ NULL, NULL, NULL, false, false },
};

int bench_on(struct bench *b, const struct bench_act *act, const char *path)
{
	struct bench_case c = bench_case(b, act->name, "file", "given");
	struct bench_io_result res = { 0 };
	struct far_backend *remote = NULL;
	struct far_error err = { 0 };
	struct stat st = { 0 };

	if (act->act == bench_random && cli_is_network(path)) {
		if (far_open(path, NULL, &remote, &err) < 0)
			return cli_fail("cannot measure", &err);
		st.st_size = (off_t)far_size(remote);
	} else if (stat(path, &st) < 0) {
		cli_say("cannot measure %s: %s. Give a file to --on", path, far_strerror(errno));
		return CLI_FAILED;
	}
	uint64_t size = b->size ? b->size : (uint64_t)st.st_size;
	c.io = (struct bench_io){ .path = path, .remote = remote, .block = b->block ? b->block : act->latency ? 4096 : BENCH_BLOCK,
				  .chunk = b->chunk ? b->chunk : 64 * FAR_KIB, .ns = b->ns, .way = b->way, .seed = b->seed,
				  .threads = b->threads ? b->threads : act->act == bench_absent ? 64 : 1 };
	c.io.size = (act->writes ? size : far_min(size, (uint64_t)st.st_size)) & ~(uint64_t)4095;
	c.io.ops = b->ops ? b->ops : (unsigned)far_min(c.io.size / c.io.chunk, 10000);
	if ((act->act == bench_random || act->act == bench_rewrite || act->act == bench_write) && !c.io.ns)
		c.io.ns = 2 * FAR_SEC;
	if (!c.io.size || c.io.size < c.io.block)
		return cli_fail("cannot measure", (far_error_set(&err, EINVAL, "%s is smaller than a block", path), &err));
	int r = strcmp(act->name, "cold") == 0 ? bench_drop(path, &err) : 0;
	if (!r)
		r = act->act(&c.io, &res, &err);
	far_close(remote);
	if (r)
		return cli_fail("cannot measure", &err);
	bench_latencies(&c.row, &res);
	c.row.unit = act->latency ? "us" : "MiB/s";
	c.row.value = act->latency ? c.row.p50_us : bench_rate(res.bytes, res.ns);
	c.row.checked = res.bytes;
	c.row.wrong = res.wrong;
	snprintf(c.row.how, sizeof c.row.how, "%.100s", path);
	if (res.idle_p99)
		snprintf(c.row.note, sizeof c.row.note, "a local read's p99 %.0f us idle, %.0f us meanwhile",
			 (double)res.idle_p99 / 1e3, (double)res.busy_p99 / 1e3);
	else if (act->latency)
		snprintf(c.row.note, sizeof c.row.note, "%.2f a second", res.ns ? (double)res.ops * 1e9 / (double)res.ns : 0);
	bench_add(&c);
	return b->failed ? CLI_FAILED : CLI_OK;
}
