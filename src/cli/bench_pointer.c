/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The set "pointer" of `farpage bench`: each case of it on each mechanism that it is about. */
#define _GNU_SOURCE
#include "cli/bench_pointer.h"

#include "base/clock.h"
#include "base/options.h"
#include "cli/bench_sets.h"
#include "frontend/pointer.h"

#include <stdio.h>
#include <string.h>

#define M(m) (1u << FAR_MECH_##m)
enum { POINTER_DIRECT = 1, POINTER_MANAGED = 2 };

struct pointer_case {
	const char *name;
	int (*act)(struct pointer_work *w);
	unsigned mechanisms;  /* bits */
	unsigned modes;
	const char *unit;
	unsigned ops;
	uint64_t chunks[5];   /* one row each; none: 64 KiB or --chunk */
	uint64_t size;        /* 0: 1 GiB */
	uint64_t rtt, rate;
	bool share, grpc, no_pull, no_push, stores;
};

static const struct pointer_case pointer_cases[] = {
	{ "seq", bench_pointer_seq, M(COPY) | M(MOVE) | M(CONTINUE), POINTER_DIRECT | POINTER_MANAGED, "MiB/s" },
	{ "share", bench_pointer_share, M(SHARE), POINTER_DIRECT, "MiB/s", .share = true },
	{ "single", bench_pointer_single, M(COPY) | M(CONTINUE), POINTER_DIRECT, "us", 2000, { 4 * FAR_KIB, 64 * FAR_KIB } },
	{ "first", bench_pointer_single, M(COPY) | M(MOVE) | M(CONTINUE), POINTER_DIRECT, "us", 300,
	  { 4 * FAR_KIB, 64 * FAR_KIB, FAR_MIB, 8 * FAR_MIB } },
	{ "read", bench_pointer_read, M(COPY) | M(MOVE) | M(CONTINUE), POINTER_MANAGED, "MiB/s" },
	{ "store", bench_pointer_store, M(COPY) | M(MOVE) | M(CONTINUE), POINTER_MANAGED, "ns", .no_push = true, .stores = true },
	{ "find", bench_pointer_find, M(COPY) | M(MOVE), POINTER_MANAGED, "ms", .no_push = true, .stores = true },
	{ "pull", bench_pointer_pull, M(COPY) | M(MOVE) | M(CONTINUE), POINTER_MANAGED, "MiB/s", .grpc = true },
	{ "absent", bench_pointer_absent, M(COPY), POINTER_MANAGED, "round trips", .size = 256 * FAR_MIB, .rtt = 40 * FAR_MSEC,
	  .no_pull = true },
	/* Direct, or most of a region of this size would be here before the program has touched it: nothing of that is traced. */
	{ "trace", bench_pointer_trace, M(COPY), POINTER_DIRECT, "x", 200, .rtt = 40 * FAR_MSEC, .rate = 125000000 },
	{ NULL },
};
#undef M

bool bench_pointer_has(const char *name)
{
	for (const struct pointer_case *c = pointer_cases; c->name; c++)
		if (strcmp(c->name, name) == 0)
			return true;
	return false;
}

/* "pointer (copy, async, 0 % huge) <- region, pulling <- delay 40 ms <- memory" */
static void pointer_how(const struct pointer_conf *c, const struct pointer_result *res, char *out, size_t n)
{
	char delay[64] = "", d[16], s[24];

	if (c->rtt || c->rate)
		snprintf(delay, sizeof delay, "delay %s%s%s <- ", far_format_duration(d, sizeof d, c->rtt), c->rate ? " " : "",
			 c->rate ? far_format_size(s, sizeof s, c->rate) : "");
	snprintf(out, n, "pointer (%s, %s, %.0f %% huge) <- %s%s%smemory", far_mechanism_word(res->st.mechanism),
		 far_tracking_word(res->st.tracking), 100 * (double)res->huge / (double)c->size,
		 c->mode != FAR_MODE_MANAGED ? "" : c->pull_workers ? "region, pulling <- " : "region <- ", delay,
		 c->grpc ? "gRPC <- " : "");
}

static void pointer_figures(const struct pointer_case *k, const struct pointer_result *res, struct bench_row *row)
{
	double rate = res->ns ? (double)res->bytes / (double)FAR_MIB / ((double)res->ns / 1e9) : 0;

	row->open_ms = (double)res->open_ns / 1e6;
	row->p50_us = (double)res->p50 / 1e3;
	row->p99_us = (double)res->p99 / 1e3;
	row->longest_us = (double)res->longest / 1e3;
	row->checked = res->bytes;
	row->wrong = res->wrong;
	if (res->bytes >= 64 * FAR_MIB && res->cpu_ns)
		row->cpu_s_gib = (double)res->cpu_ns / 1e9 * (double)FAR_GIB / (double)res->bytes;
	row->value = strcmp(k->unit, "MiB/s") == 0 ? rate : strcmp(k->unit, "us") == 0 ? row->p50_us :
		     strcmp(k->unit, "ms") == 0 ? (double)res->ns / 1e6 : res->value;
	snprintf(row->note, sizeof row->note, "%s", res->note);
}

static void pointer_row(struct bench *b, const struct pointer_case *k, const struct pointer_conf *conf)
{
	struct pointer_result res = { 0 };
	struct bench_row row = { .set = "pointer", .unit = k->unit };
	const struct bench_row *before = b->rows.n ? &b->rows.v[b->rows.n - 1] : NULL;
	char s[24];
	int r = bench_pointer_run(conf, &res);

	snprintf(row.series, sizeof row.series, "%s, %s", k->name, conf->mode == FAR_MODE_MANAGED ? "managed" : "direct");
	snprintf(row.x, sizeof row.x, "%s", k->chunks[0] ? far_format_size(s, sizeof s, conf->chunk) :
		 far_mechanism_word(conf->mechanism));
	if (r) {
		row.skipped = r == -EOPNOTSUPP;
		row.failed = !row.skipped;
		snprintf(row.note, sizeof row.note, "%s: %.180s", row.skipped ? "skip" : "failed", res.err.text);
	} else {
		pointer_how(conf, &res, row.how, sizeof row.how);
		pointer_figures(k, &res, &row);
	}
	b->failed |= row.failed || row.wrong;
	if (!b->quiet)
		bench_row_print(&row, before);
	bench_rows_add(&b->rows, &row);
}

static struct pointer_conf pointer_conf(const struct bench *b, const struct pointer_case *k, enum far_mechanism m,
					enum far_mode mode, uint64_t chunk)
{
	struct pointer_conf c = { .act = k->act, .mechanism = m, .tracking = b->tracking, .mode = mode, .share = k->share,
				  .grpc = k->grpc, .pull_workers = k->no_pull ? 0 : -1, .push_workers = k->no_push ? 0 : -1,
				  .chunk = chunk, .rtt = k->rtt, .rate = k->rate, .seed = b->seed };

	/* Huge pages are moved into, or shown in, what is read; where something is stored, what that costs is measured too. */
	c.read_only = !k->stores && (m == FAR_MECH_MOVE || m == FAR_MECH_CONTINUE || b->read_only);
	c.size = b->size ? b->size : k->size ? k->size : FAR_GIB;
	c.ops = b->ops ? b->ops : k->ops;
	c.ops = (unsigned)far_min(c.ops, c.size / c.chunk);
	c.threads = b->threads ? b->threads : 64;
	if (b->rtt != FAR_NEVER && k->rtt)
		c.rtt = b->rtt;
	if (b->ns && c.rtt) /* one after the other */
		c.ops = (unsigned)far_min(c.ops, b->ns / c.rtt + 1);
	return c;
}

static void pointer_case_run(struct bench *b, const struct pointer_case *k, enum far_mechanism m, enum far_mode mode)
{
	bool own = k->chunks[0] && !b->chunk;

	for (unsigned i = 0; i < FAR_ARRAY_LEN(k->chunks) && (i == 0 || (own && k->chunks[i])); i++) {
		struct pointer_conf c = pointer_conf(b, k, m, mode, own ? k->chunks[i] : b->chunk ? b->chunk : 64 * FAR_KIB);
		if (c.chunk <= c.size)
			pointer_row(b, k, &c);
	}
}

void bench_pointer(struct bench *b)
{
	for (const struct pointer_case *k = pointer_cases; k->name; k++) {
		if (b->only && strcmp(b->only, k->name) != 0)
			continue;
		for (enum far_mechanism m = FAR_MECH_SHARE; m <= FAR_MECH_SIGSEGV; m++) {
			/* A mechanism that was asked for is measured where it usually is not, too. */
			if (b->mechanism != FAR_MECH_AUTO ? m != b->mechanism : !(k->mechanisms & 1u << m))
				continue;
			if (k->modes & POINTER_DIRECT && b->mode != FAR_MODE_MANAGED)
				pointer_case_run(b, k, m, FAR_MODE_DIRECT);
			if (k->modes & POINTER_MANAGED && b->mode != FAR_MODE_DIRECT)
				pointer_case_run(b, k, m, FAR_MODE_MANAGED);
		}
	}
}
