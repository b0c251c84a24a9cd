/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage info: what a region is. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "base/clock.h"
#include "cli/map_info.h"
#include "cli/progress.h"
#include "region/persist.h"

#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

#define INFO_EXTENTS 1024
#define INFO_MAX_ROUNDS 4096 /* a region in more pieces than this is summed up in part */

struct info_conf {
	bool json;
	struct far_opt_list layer;
	char *connections;
	uint64_t deadline;
};

static const struct far_opt info_options[] = {
	{ "json", FAR_OPT_BOOL, offsetof(struct info_conf, json), .help = "write JSON" },
	{ "layer", FAR_OPT_LIST, offsetof(struct info_conf, layer), .value_name = "NAME[:KEY=VALUE,...]",
	  .help = "wrap the region in a layer; may be repeated, the first is outermost" },
	{ "connections", FAR_OPT_STRING, offsetof(struct info_conf, connections), .value_name = "DEMAND+BULK",
	  .help = "connections to a network peer", .def = "2+2" },
	{ "deadline", FAR_OPT_DURATION, offsetof(struct info_conf, deadline), .min = 1e6, .value_name = "DURATION",
	  .help = "how long opening may take", .def = "30s" },
	FAR_OPT_END
};

struct info_sum {
	uint64_t data, zeros, unknown, extents;
	double round_trip; /* seconds, best of three reads of one byte; < 0: none */
};

static void info_add(struct info_sum *s, const struct far_extent *x)
{
	s->extents++;
	if (x->kind == FAR_EXTENT_ZERO)
		s->zeros += x->len;
	else
		s->data += x->len;
}

static void info_extents(struct far_backend *b, struct info_sum *s)
{
	struct far_extent *x = calloc(INFO_EXTENTS, sizeof *x);
	uint64_t off = 0, size = far_size(b);
	size_t n;

	for (int round = 0; x && off < size && round < INFO_MAX_ROUNDS; round++) {
		if (far_extents(b, off, size - off, x, INFO_EXTENTS, &n) < 0 || n == 0)
			break;
		for (size_t i = 0; i < n; i++)
			info_add(s, &x[i]);
		off = x[n - 1].off + x[n - 1].len;
	}
	s->unknown = size - off;
	free(x);
}

static void info_round_trip(struct far_backend *b, struct info_sum *s)
{
	uint64_t chunk = far_facts(b)->chunk, best = FAR_NEVER;
	size_t len = (size_t)far_min(far_max(chunk, 1), far_size(b));
	char *buf = malloc(len + 1);

	s->round_trip = -1;
	for (int i = 0; i < 3 && buf && len; i++) {
		uint64_t from = far_now();
		if (far_read(b, 0, buf, len, 0) < 0)
			break;
		best = far_min(best, far_now() - from);
	}
	free(buf);
	if (best != FAR_NEVER)
		s->round_trip = (double)best / 1e9;
}

static struct json_object *info_caps(uint32_t caps)
{
	static const struct {
		uint32_t bit;
		const char *name;
	} table[] = { { FAR_CAP_WRITE, "write" }, { FAR_CAP_DURABLE, "durable" }, { FAR_CAP_SHARE, "share" },
		      { FAR_CAP_REMOTE, "remote" } };
	struct json_object *list = json_object_new_array();

	for (size_t i = 0; i < FAR_ARRAY_LEN(table); i++)
		if (caps & table[i].bit)
			json_object_array_add(list, json_object_new_string(table[i].name));
	return list;
}

static void info_json(const char *uri, const struct far_facts *f, const struct info_sum *s, const struct far_persist *map)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "uri", json_object_new_string(uri));
	json_object_object_add(o, "size", json_object_new_int64((int64_t)f->bytes));
	json_object_object_add(o, "chunk", json_object_new_int64((int64_t)f->chunk));
	json_object_object_add(o, "max_io", json_object_new_int64((int64_t)f->max_io));
	json_object_object_add(o, "caps", info_caps(f->caps));
	json_object_object_add(o, "identity", f->identity[0] ? json_object_new_string(f->identity) : NULL);
	json_object_object_add(o, "version", f->version[0] ? json_object_new_string(f->version) : NULL);
	json_object_object_add(o, "data", json_object_new_int64((int64_t)s->data));
	json_object_object_add(o, "zeros", json_object_new_int64((int64_t)s->zeros));
	json_object_object_add(o, "extents", json_object_new_int64((int64_t)s->extents));
	json_object_object_add(o, "round_trip_seconds",
			       s->round_trip >= 0 ? json_object_new_double(s->round_trip) : NULL);
	json_object_object_add(o, "map", map ? map_info_json(map) : NULL);
	puts(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
	json_object_put(o);
}

static void info_text(const char *uri, const struct far_facts *f, const struct info_sum *s)
{
	char size[24], data[24], zeros[24];
	struct json_object *caps = info_caps(f->caps);

	printf("%s\n", uri);
	printf("  size        %" PRIu64 " bytes (%s)\n", f->bytes, progress_size(size, sizeof size, f->bytes));
	if (f->chunk)
		printf("  chunk       %" PRIu64 ": only whole aligned chunks\n", f->chunk);
	else
		printf("  chunk       none: any offset and length\n");
	if (f->max_io)
		printf("  longest io  %s\n", progress_size(size, sizeof size, f->max_io));
	printf("  can        ");
	for (size_t i = 0; i < json_object_array_length(caps); i++)
		printf(" %s", json_object_get_string(json_object_array_get_idx(caps, i)));
	printf("%s\n", json_object_array_length(caps) ? "" : " read only");
	json_object_put(caps);
	if (f->identity[0])
		printf("  identity    %s%s%s\n", f->identity, f->version[0] ? " version " : "", f->version);
	printf("  content     %s data, %s zeros in %" PRIu64 " extents%s\n", progress_size(data, sizeof data, s->data),
	       progress_size(zeros, sizeof zeros, s->zeros), s->extents, s->unknown ? "; the rest is not known" : "");
	if (s->round_trip >= 0)
		printf("  round trip  %.2f ms\n", s->round_trip * 1e3);
}

/* A chunk map alone. */
static int info_map(const struct info_conf *conf, const struct far_persist *map)
{
	if (conf->json) {
		struct json_object *o = map_info_json(map);
		puts(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
		json_object_put(o);
	} else {
		map_info_text(map);
	}
	return CLI_OK;
}

static int info_region(const struct info_conf *conf, const char *uri, const struct far_persist *map)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct far_error err = { 0 };
	struct info_sum sum = { 0 };
	struct far_backend *b = NULL;

	opts.deadline_ms = (uint32_t)far_min(conf->deadline / FAR_MSEC, UINT32_MAX);
	if (cli_connections(conf->connections, &opts, &err) < 0)
		return cli_usage(&cli_info, "%s", err.text);
	/* What it can do is asked of a writable one; one that cannot be opened so is read-only. */
	int r = cli_open(uri, &opts, &conf->layer, &b, &err);
	opts.read_only = true;
	if (r == -EACCES || r == -EROFS || r == -EPERM)
		r = cli_open(uri, &opts, &conf->layer, &b, &err);
	if (r < 0)
		return cli_fail("cannot open", &err);
	info_extents(b, &sum);
	info_round_trip(b, &sum);
	if (conf->json)
		info_json(uri, far_facts(b), &sum, map);
	else
		info_text(uri, far_facts(b), &sum);
	if (!conf->json && map)
		map_info_text(map);
	far_close(b);
	return CLI_OK;
}

static int info_run(int argc, char **argv)
{
	struct info_conf conf = { .deadline = 30 * FAR_SEC };
	struct far_persist *map = NULL;
	struct far_error err = { 0 };
	struct cli_args args;
	int code = cli_parse(&cli_info, &conf, argc, argv, &args);

	if (code == CLI_GO && map_info_find(args.v[0], &map, &err) < 0)
		code = cli_fail("cannot explain", &err);
	if (code == CLI_GO)
		code = map_info_is_map(args.v[0]) ? info_map(&conf, map) : info_region(&conf, args.v[0], map);
	far_persist_close(map);
	cli_parse_fini(&cli_info, &conf, &args);
	return code;
}

const struct cli_verb cli_info = {
	.name = "info", .synopsis = "URI", .cannot = "cannot open", .about = "Say what a region, or a chunk map, is.",
	.options = info_options, .min_args = 1, .max_args = 1, .run = info_run,
};
