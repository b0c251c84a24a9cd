/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage bench: measure mounts made for the purpose, or any file. The sets stand in bench_sets.c. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "base/clock.h"
#include "cli/bench_pointer.h"
#include "cli/bench_sets.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

struct bench_conf {
	char *on, *svg, *only, *picture;
	bool json, quiet, read_only;
	uint64_t size, seconds, block, rtt, chunk;
	int64_t ops, threads, seed;
	int way, mode, backend, mechanism, tracking;
};

static const char *const bench_modes[] = { "both", "direct", "managed", NULL };
static const char *const bench_backends[] = { "memory", "file", "directory", "grpc", NULL };
static const char *const bench_mechanisms[] = { "auto", "share", "move", "continue", "copy", "sigsegv", NULL };
static const char *const bench_trackings[] = { "auto", "none", "async", "sync", "hash", NULL };
static const char *const bench_ways[] = { "buffered", "direct", "mapped", NULL };

#define OPT(k, knd, field) { .key = (k), .kind = FAR_OPT_##knd, .offset = offsetof(struct bench_conf, field)
static const struct far_opt bench_options[] = {
	OPT("json", BOOL, json), .help = "write JSON instead of the table" },
	OPT("svg", STRING, svg), .value_name = "FILE", .help = "draw a chart of each set into FILE" },
	OPT("size", SIZE, size), .min = 65536, .value_name = "SIZE", .def = "the set's own",
	    .help = "bytes of the region" },
	OPT("seconds", DURATION, seconds), .min = 1e6, .value_name = "DURATION", .def = "the set's own",
	    .help = "how long one measurement may take" },
	OPT("rtt", DURATION, rtt), .value_name = "DURATION", .def = "the set's own", .help = "round trip to the store" },
	OPT("mode", ENUM, mode), .names = bench_modes, .value_name = "both|direct|managed", .def = "both",
	    .help = "mounts that are measured" },
	OPT("backend", ENUM, backend), .names = bench_backends, .value_name = "memory|file|directory|grpc",
	    .def = "the set's own", .help = "the store; grpc: memory served over loopback" },
	OPT("chunk", SIZE, chunk), .min = 4096, .max = 32 << 20, .value_name = "SIZE", .def = "64K",
	    .help = "unit of transfer; with --on, how far apart distinct chunks are" },
	OPT("block", SIZE, block), .min = 4096, .max = 1 << 30, .value_name = "SIZE", .def = "1M",
	    .help = "of one read or write" },
	OPT("on", STRING, on), .value_name = "FILE",
	    .help = "do NAME to FILE, or random to a URI: fill, read, cold, verify, random, first, absent, scatter, write, rewrite, sync or drop" },
	OPT("way", ENUM, way), .names = bench_ways, .value_name = "buffered|direct|mapped", .def = "buffered",
	    .help = "how FILE is read or written" },
	OPT("ops", INT, ops), .min = 1, .max = 1 << 30, .value_name = "N", .def = "the set's own",
	    .help = "calls, where calls are counted" },
	OPT("threads", INT, threads), .min = 1, .max = 4096, .value_name = "N", .def = "1, or 64 for absent chunks",
	    .help = "that read at once" },
	OPT("seed", INT, seed), .max = 1e15, .value_name = "N", .def = "1", .help = "of random offsets" },
	OPT("case", STRING, only), .value_name = "CASE", .def = "all", .help = "of the set pointer" },
	OPT("mechanism", ENUM, mechanism), .names = bench_mechanisms, .value_name = "share|move|continue|copy|sigsegv",
	    .def = "the case's own", .help = "how a pointer's pages are filled" },
	OPT("tracking", ENUM, tracking), .names = bench_trackings, .value_name = "async|sync|hash", .def = "auto",
	    .help = "how stores through a pointer are found" },
	OPT("read-only", BOOL, read_only), .help = "map pointers read-only where nothing is stored" },
	OPT("picture", STRING, picture), .value_name = "FILE",
	    .help = "let a pointer run for two seconds and draw its chunk map over time into FILE" },
	FAR_OPT_END
};
#undef OPT

static const struct bench_act *bench_act_find(const char *name)
{
	for (const struct bench_act *a = bench_acts; a->name; a++)
		if (strcmp(a->name, name) == 0)
			return a;
	return NULL;
}

static int bench_check_conf(const struct bench_conf *c, const struct cli_args *args)
{
	const struct bench_set *s = bench_sets;

	if (c->picture && (args->n || c->on))
		return cli_usage(&cli_bench, "--picture is a run of its own: leave NAME and --on out");
	if (c->only && (!args->n || strcmp(args->v[0], "pointer") != 0 || !bench_pointer_has(c->only)))
		return cli_usage(&cli_bench, "--case goes with the set pointer and is one of seq, share, single, first, read, "
				 "store, find, pull, absent, trace");
	if (c->block % 4096 || c->chunk % 4096 || c->size % 4096)
		return cli_usage(&cli_bench, "--size, --chunk and --block are multiples of 4096");
	if (!c->on && c->chunk & (c->chunk - 1))
		return cli_usage(&cli_bench, "--chunk %" PRIu64 " is not a power of two", c->chunk);
	if (c->on && (!args->n || !bench_act_find(args->v[0])))
		return cli_usage(&cli_bench, "with --on NAME is what to do: fill, read, cold, verify, random, first, absent, "
				 "scatter, write, rewrite, sync or drop");
	while (!c->on && args->n && s->name && strcmp(s->name, args->v[0]) != 0)
		s++;
	if (!s->name) {
		char names[200] = "";
		for (s = bench_sets; s->name; s++)
			snprintf(names + strlen(names), sizeof names - strlen(names), " %s", s->name);
		return cli_usage(&cli_bench, "there is no set '%s'. Sets:%s", args->v[0], names);
	}
	return CLI_GO;
}

static int bench_go(const struct bench_conf *c, const struct cli_args *args)
{
	struct bench b = { .mode = (enum far_mode)c->mode, .backend = (enum bench_backend)c->backend, .size = c->size, .ns = c->seconds, .block = c->block, .rtt = c->rtt, .chunk = c->chunk,
			   .ops = (unsigned)c->ops, .threads = (unsigned)c->threads, .way = (enum bench_way)c->way,
			   .seed = (uint64_t)c->seed, .only = c->only,
			   .mechanism = (enum far_mechanism)c->mechanism, .tracking = (enum far_tracking)c->tracking,
			   .read_only = c->read_only, .quiet = c->json };
	struct far_error err = { 0 };
	int code = CLI_OK;

	signal(SIGPIPE, SIG_IGN);
	if (c->picture)
		return bench_picture(c->picture, &err) < 0 ? cli_fail("cannot draw", &err) : CLI_OK;
	if (c->on)
		code = bench_on(&b, bench_act_find(args->v[0]), c->on);
	for (const struct bench_set *s = bench_sets; s->name && !c->on; s++)
		if (!args->n || strcmp(args->v[0], s->name) == 0)
			s->run(&b);
	if (c->json)
		bench_rows_json(&b.rows);
	int r = c->svg ? bench_rows_svg(&b.rows, c->svg) : 0;
	if (r < 0)
		cli_say("cannot write %s: %s", c->svg, far_strerror(r));
	bench_rows_free(&b.rows);
	return code != CLI_OK ? code : r < 0 || b.failed ? CLI_FAILED : CLI_OK;
}

static int bench_run_verb(int argc, char **argv)
{
	struct bench_conf conf = { .rtt = FAR_NEVER, .seed = 1, .backend = BENCH_ON_OWN };
	struct cli_args args;
	int code = cli_parse(&cli_bench, &conf, argc, argv, &args);

	if (code == CLI_GO)
		code = bench_check_conf(&conf, &args);
	if (code == CLI_GO)
		code = bench_go(&conf, &args);
	cli_parse_fini(&cli_bench, &conf, &args);
	return code;
}

const struct cli_verb cli_bench = {
	.name = "bench", .synopsis = "[NAME]", .cannot = "cannot measure",
	.about = "Measure how fast regions are here: one set by NAME, or all.", .options = bench_options, .min_args = 0,
	.max_args = 1, .run = bench_run_verb,
};
