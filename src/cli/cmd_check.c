/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage check: whether a local store still holds what was pulled into it. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "mount/kept.h"
#include "cli/progress.h"

#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>

#define CHECK_NAMED 20 /* bad chunks that are named one by one */

struct check_conf {
	char *map;
	bool json, quiet;
};

static const struct far_opt check_options[] = {
	{ "map", FAR_OPT_STRING, offsetof(struct check_conf, map), .value_name = "FILE",
	  .help = "the chunk map", .def = "the local store's path and .farmap" },
	{ "json", FAR_OPT_BOOL, offsetof(struct check_conf, json), .help = "write JSON" },
	{ "quiet", FAR_OPT_BOOL, offsetof(struct check_conf, quiet), .help = "no progress" },
	FAR_OPT_END
};

struct check {
	const char *what;
	struct far_persist *map;
	struct far_backend *local;
	uint64_t fits, bad, unknown, dirty, absent;
	struct json_object *list; /* offsets of bad ones */
};

static int check_open(struct check *c, const struct check_conf *conf, struct far_error *err)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	char *local = NULL;
	int r;

	opts.read_only = true;
	if (conf->map) {
		r = far_persist_open(conf->map, FAR_PERSIST_WRITABLE, &c->map, err);
		local = strdup(c->what);
	} else {
		r = far_kept_find(c->what, FAR_PERSIST_WRITABLE, &local, &c->map, err);
	}
	if (!r && far_persist_is_new(c->map))
		r = far_error_set(err, ENOENT, "cannot check %s: it has no chunk map %s. Name another one with --map", c->what,
				  far_persist_path(c->map));
	if (!r)
		r = local ? far_kept_check_store(local, c->map, err) : far_error_set(err, ENOMEM, "no memory");
	if (!r)
		r = far_open(local, &opts, &c->local, err);
	if (!r && far_size(c->local) != far_persist_info(c->map)->bytes)
		r = far_error_set(err, EINVAL, "%s is not the local store of %s: their sizes differ", c->what,
				  far_persist_path(c->map));
	free(local);
	return r;
}

static void check_bad(struct check *c, const struct check_conf *conf, uint64_t off, size_t len, int r)
{
	if (c->bad++ < CHECK_NAMED && !conf->json)
		printf("bad: %" PRIu64 "-%" PRIu64 "%s%s\n", off, off + len, r == -EBADMSG ? "" : ": ",
		       r == -EBADMSG ? "" : far_strerror(r));
	json_object_array_add(c->list, json_object_new_int64((int64_t)off));
}

static int check_chunks(struct check *c, const struct check_conf *conf)
{
	const struct far_persist_info *i = far_persist_info(c->map);
	char *buf = malloc((size_t)i->chunk);
	struct progress p;

	if (!buf)
		return -ENOMEM;
	progress_init(&p, "check", c->what, i->bytes, conf->quiet);
	for (uint64_t k = 0, off = 0; off < i->bytes; k++, off += i->chunk) {
		size_t len = (size_t)far_min(i->chunk, i->bytes - off);
		enum far_persist_kind kind = far_persist_chunk(c->map, k);
		if (kind == FAR_PERSIST_ABSENT) {
			c->absent++;
			continue;
		}
		int r = far_read(c->local, off, buf, len, 0); /* what is unsaved must be readable, too */
		if (!r && kind == FAR_PERSIST_CLEAN)
			r = far_persist_verify(c->map, k, buf, len);
		if (r && r != -ENODATA)
			check_bad(c, conf, off, len, r);
		else if (kind != FAR_PERSIST_CLEAN)
			c->dirty++;
		else if (r)
			c->unknown++;
		else
			c->fits++;
		progress_update(&p, off, progress_rate(&p, off));
	}
	progress_clear(&p);
	free(buf);
	return 0;
}

static int check_say(const struct check *c, const struct check_conf *conf)
{
	const struct far_persist_info *i = far_persist_info(c->map);

	if (conf->json) {
		struct json_object *o = json_object_new_object();
		json_object_object_add(o, "chunk", json_object_new_int64((int64_t)i->chunk));
		json_object_object_add(o, "good", json_object_new_int64((int64_t)c->fits));
		json_object_object_add(o, "bad", json_object_new_int64((int64_t)c->bad));
		json_object_object_add(o, "unknown", json_object_new_int64((int64_t)c->unknown));
		json_object_object_add(o, "unsaved", json_object_new_int64((int64_t)c->dirty));
		json_object_object_add(o, "absent", json_object_new_int64((int64_t)c->absent));
		json_object_object_add(o, "bad_offsets", json_object_get(c->list));
		puts(json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
		json_object_put(o);
	} else {
		printf("%s: of chunks of %" PRIu64 " bytes %" PRIu64 " fit their checksum, %" PRIu64 " do not, %" PRIu64 " have none, %"
		       PRIu64 " are unsaved, %" PRIu64 " absent\n", c->what, i->chunk, c->fits, c->bad, c->unknown, c->dirty, c->absent);
	}
	if (!c->bad)
		return CLI_OK;
	cli_say("%" PRIu64 " chunks of %s are not what was put there. A mount fetches clean ones anew when they are read; look at "
		"the disk they are on", c->bad, c->what);
	return CLI_FAILED;
}

static int check_run(int argc, char **argv)
{
	struct check_conf conf = { 0 };
	struct far_error err = { 0 };
	struct check c = { 0 };
	struct cli_args args;
	int code = cli_parse(&cli_check, &conf, argc, argv, &args);

	if (code == CLI_GO) {
		c.what = args.v[0];
		c.list = json_object_new_array();
		int r = check_open(&c, &conf, &err);
		if (!r && (r = check_chunks(&c, &conf)))
			far_error_set(&err, -r, "cannot check %s: %s", c.what, far_strerror(r));
		code = r ? cli_fail("cannot check", &err) : check_say(&c, &conf);
	}
	far_close(c.local);
	far_persist_close(c.map);
	json_object_put(c.list);
	cli_parse_fini(&cli_check, &conf, &args);
	return code;
}

const struct cli_verb cli_check = {
	.name = "check", .synopsis = "LOCAL", .cannot = "cannot check",
	.about = "Compare a local store that is not mounted with its checksums.", .options = check_options, .min_args = 1,
	.max_args = 1, .run = check_run,
};
