/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "cli/map_info.h"

#include "mount/kept.h"
#include "cli/progress.h"

#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

bool map_info_is_map(const char *what)
{
	size_t n = strlen(what);
	return n > 7 && strcmp(what + n - 7, ".farmap") == 0 && strncmp(what, "file:", 5) != 0 && strncmp(what, "dir:", 4) != 0;
}

int map_info_find(const char *what, struct far_persist **out, struct far_error *err)
{
	char *path = NULL, *local = NULL;
	bool there = map_info_is_map(what);

	*out = NULL;
	if (!there && (strncmp(what, "file:", 5) == 0 || strncmp(what, "dir:", 4) == 0)) {
		there = far_kept_path(what, NULL, &path, NULL) == 0 && path && access(path, F_OK) == 0;
		free(path);
	}
	if (!there)
		return 0;
	int r = far_kept_find(what, FAR_PERSIST_LOOK, &local, out, err);
	free(local);
	return r;
}

static const char *map_info_time(uint64_t seconds, char *buf, size_t n)
{
	time_t t = (time_t)seconds;
	struct tm tm;

	if (!seconds || !localtime_r(&t, &tm) || !strftime(buf, n, "%Y-%m-%d %H:%M:%S", &tm))
		snprintf(buf, n, "unknown");
	return buf;
}

static const char *map_info_chunks(uint64_t chunks, const struct far_persist_info *i, char *buf, size_t n)
{
	return progress_size(buf, n, chunks > i->bytes / far_max(i->chunk, 1) ? i->bytes : chunks * i->chunk);
}

void map_info_text(const struct far_persist *p)
{
	const struct far_persist_info *i = far_persist_info(p);
	char a[40], b[40];

	printf("%s\n", far_persist_path(p));
	printf("  chunk map   format %u, of a region of %" PRIu64 " bytes in chunks of %" PRIu64 "\n", i->format, i->bytes, i->chunk);
	printf("  remote      %s\n", i->source[0] ? i->source : "not known yet");
	if (i->origin.identity[0])
		printf("  identity    %s, epoch %" PRIu64 ", version %" PRIu64 "\n", i->origin.identity, i->origin.epoch,
		       i->origin.version);
	printf("  this copy   %s%s\n", i->id, i->fenced ? ", FENCED: somebody else has taken the region over"
			     : far_kept_ours(i) ? ", the last one to have the right to write" : "");
	printf("  local       %" PRIu64 " chunks (%s)\n", i->local, map_info_chunks(i->local, i, a, sizeof a));
	printf("  unsaved     %s%" PRIu64 " chunks (%s)%s\n", i->clean ? "" : "at most ", i->dirty + i->partial,
	       map_info_chunks(i->dirty + i->partial, i, a, sizeof a),
	       i->partial ? ", some of them in part" : "");
	printf("  closed      %s\n", i->clean ? "in order" : "not: it is mounted, or its mount was killed");
	printf("  made        %s, last written %s\n", map_info_time(i->created, a, sizeof a),
	       map_info_time(i->written, b, sizeof b));
}

struct json_object *map_info_json(const struct far_persist *p)
{
	const struct far_persist_info *i = far_persist_info(p);
	const struct {
		const char *key;
		uint64_t v;
	} numbers[] = { { "format", i->format }, { "size", i->bytes }, { "chunk", i->chunk }, { "epoch", i->origin.epoch },
			{ "version", i->origin.version }, { "local_chunks", i->local }, { "dirty_chunks", i->dirty },
			{ "partial_chunks", i->partial }, { "created", i->created }, { "written", i->written } };
	const struct {
		const char *key, *v;
	} strings[] = { { "path", far_persist_path(p) }, { "id", i->id }, { "source", i->source },
			{ "identity", i->origin.identity }, { "writer", i->origin.writer } };
	struct json_object *o = json_object_new_object();

	for (size_t k = 0; k < FAR_ARRAY_LEN(strings); k++)
		json_object_object_add(o, strings[k].key, json_object_new_string(strings[k].v));
	for (size_t k = 0; k < FAR_ARRAY_LEN(numbers); k++)
		json_object_object_add(o, numbers[k].key, json_object_new_int64((int64_t)numbers[k].v));
	json_object_object_add(o, "clean", json_object_new_boolean(i->clean));
	json_object_object_add(o, "fenced", json_object_new_boolean(i->fenced));
	return o;
}
