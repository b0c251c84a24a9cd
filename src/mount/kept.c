/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "mount/kept.h"

#include "base/options.h"
#include "base/uri.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum kept_verdict {
	KEPT_FITS,
	KEPT_SIZE,   /* another size */
	KEPT_OTHER,  /* another region */
	KEPT_NEWER,  /* written by somebody else */
	KEPT_OLDER,  /* an older copy was put back */
	KEPT_FENCED, /* somebody took the region over while this was mounted */
};

static int kept_no_memory(struct far_error *err)
{
	return far_error_set(err, ENOMEM, "no memory for the chunk map's name");
}

int far_kept_path(const char *local, const char *map, char **out, struct far_error *err)
{
	struct far_uri u = { 0 };
	struct stat st;
	int r = 0;

	*out = NULL;
	if (map && strcmp(map, "none") == 0)
		return 0;
	if (!local || strncmp(local, "mem:", 4) == 0 || strncmp(local, "null:", 5) == 0) {
		if (map)
			return far_error_set(err, EINVAL, "--map %s belongs to a local store that lasts: give --local file:PATH or "
					     "dir:PATH as well", map);
		return 0;
	}
	if (map) {
		*out = strdup(map);
		return *out ? 0 : kept_no_memory(err);
	}
	r = far_uri_parse(&u, local, err);
	if (!r && (strcmp(u.scheme, "file") != 0 && strcmp(u.scheme, "dir") != 0))
		goto out; /* somebody's own store: its map would need a name */
	if (!r && stat(u.path, &st) == 0 && S_ISBLK(st.st_mode))
		r = far_error_set(err, EINVAL, "the local store %s is a device: say with --map FILE where its chunk map is to be",
				  u.path);
	else if (!r && asprintf(out, "%s.farmap", u.path) < 0)
		r = kept_no_memory(err);
out:
	far_uri_fini(&u);
	return r;
}

/* What of the store is there: its size, or any for a directory. */
int far_kept_check_store(const char *local, const struct far_persist *p, struct far_error *err)
{
	const struct far_persist_info *i = far_persist_info(p);
	struct far_uri u = { 0 };
	struct stat st;
	int r = far_persist_is_new(p) ? 0 : far_uri_parse(&u, local, err);

	if (r || far_persist_is_new(p))
		return r;
	if (stat(u.path, &st) < 0)
		r = far_error_set(err, errno, "the local store %s of the chunk map %s cannot be found: %s. Bring it back, or remove "
				  "the map to begin anew", u.path, far_persist_path(p), far_strerror(errno));
	else if (S_ISREG(st.st_mode) && (uint64_t)st.st_size != i->bytes)
		r = far_error_set(err, EINVAL, "the local store %s has %" PRIu64 " bytes and its chunk map %s is of %" PRIu64
				  ". Bring the right one back, or remove both to begin anew", u.path, (uint64_t)st.st_size,
				  far_persist_path(p), i->bytes);
	far_uri_fini(&u);
	return r;
}

int far_kept_open(const struct far_mount_opts *o, struct far_persist **out, struct far_error *err)
{
	char *path;
	int r = far_kept_path(o->local, o->map, &path, err);

	*out = NULL;
	if (r || !path)
		return r;
	r = far_persist_open(path, o->read_only ? FAR_PERSIST_READ_ONLY : FAR_PERSIST_WRITABLE, out, err);
	free(path);
	if (!r)
		r = far_kept_check_store(o->local, *out, err);
	const struct far_persist_info *i = r ? NULL : far_persist_info(*out);
	if (!r && !far_persist_is_new(*out) && o->chunk && o->chunk != i->chunk)
		r = far_error_set(err, EINVAL, "the chunk map %s has chunks of %" PRIu64 " bytes, not %" PRIu64 ": leave --chunk out, "
				  "or choose another --local", far_persist_path(*out), i->chunk, o->chunk);
	if (r) {
		far_persist_close(*out);
		*out = NULL;
	}
	return r;
}

static bool kept_ends(const char *s, const char *tail)
{
	size_t n = strlen(s), m = strlen(tail);
	return n > m && strcmp(s + n - m, tail) == 0;
}

int far_kept_find(const char *what, enum far_persist_mode mode, char **local, struct far_persist **out,
		  struct far_error *err)
{
	char *path = NULL;
	struct stat st;
	int r = 0;

	*local = NULL;
	if (strncmp(what, "file:", 5) != 0 && strncmp(what, "dir:", 4) != 0 && kept_ends(what, ".farmap")) {
		int n = (int)(strlen(what) - strlen(".farmap"));
		path = strdup(what);
		*local = NULL;
		char *store = strndup(what, (size_t)n);
		bool dir = store && stat(store, &st) == 0 && S_ISDIR(st.st_mode);
		if (!path || !store || asprintf(local, "%s:%s", dir ? "dir" : "file", store) < 0)
			r = kept_no_memory(err);
		free(store);
	} else {
		r = far_kept_path(what, NULL, &path, err);
		if (!r && !path)
			r = far_error_set(err, EINVAL, "%s has no chunk map: name a local store, file:PATH or dir:PATH", what);
		*local = r ? NULL : strdup(what);
		if (!r && !*local)
			r = kept_no_memory(err);
	}
	if (!r)
		r = far_persist_open(path, mode, out, err);
	if (r) {
		free(*local);
		*local = NULL;
	}
	free(path);
	return r;
}

uint64_t far_kept_dirty(const struct far_persist_info *i)
{
	uint64_t chunks = i->dirty + i->partial;
	return i->chunk && chunks < i->bytes / i->chunk ? chunks * i->chunk : chunks ? i->bytes : 0;
}

bool far_kept_ours(const struct far_persist_info *i)
{
	return i->origin.epoch && strcmp(i->origin.writer, i->id) == 0;
}

static enum kept_verdict kept_compare(const struct far_persist_info *i, const char *source, const struct far_facts *f,
				      const struct far_origin *o)
{
	const char *here = i->origin.identity[0] ? i->origin.identity : i->facts.identity;
	const char *there = o && o->identity[0] ? o->identity : f->identity;

	if (f->bytes != i->bytes)
		return KEPT_SIZE;
	if (here[0] && there[0] ? strcmp(here, there) != 0 : strcmp(source, i->source) != 0)
		return KEPT_OTHER;
	if (!o)
		return KEPT_FITS;
	if (far_kept_ours(i) && !o->identity[0] && !o->epoch)
		return i->fenced ? KEPT_FENCED : KEPT_FITS; /* a store that keeps no record: who wrote last is believed */
	if (o->epoch < i->origin.epoch || o->version < i->origin.version)
		return KEPT_OLDER;
	if (far_kept_ours(i))
		/* The same number may have been counted by others, after an old copy was put back and changed. */
		return o->epoch == i->origin.epoch && strcmp(o->writer, i->id) == 0 ? i->fenced ? KEPT_FENCED : KEPT_FITS : KEPT_NEWER;
	if (o->epoch != i->origin.epoch || o->version != i->origin.version)
		return KEPT_NEWER;
	/* A peer that keeps no record has neither; what it counts itself holds as long as it runs. */
	if (o->instance && o->instance == i->origin.instance && o->change != i->origin.change)
		return KEPT_NEWER;
	return i->fenced ? KEPT_FENCED : KEPT_FITS;
}

/* Why what is kept does not fit, and the way out. */
static int kept_say(const struct far_kept *k, enum kept_verdict v, const struct far_facts *f, const struct far_origin *o,
		    struct far_error *err)
{
	const struct far_persist_info *i = far_persist_info(k->p);
	uint64_t dirty = far_kept_dirty(i);
	const char *cannot = k->open ? "" : "cannot mount ";
	char why[240], out[260] = "", size[24];

	switch (v) {
	case KEPT_SIZE:
		return far_error_set(err, EINVAL, "%s%.120s: it has %" PRIu64 " bytes, and what is kept in %.120s is of a "
				     "region of %" PRIu64 ". Choose another --local", cannot, k->source, f->bytes,
				     far_persist_path(k->p), i->bytes);
	case KEPT_OTHER:
		snprintf(why, sizeof why, "is of another region (%.100s)", i->source);
		break;
	case KEPT_OLDER:
		snprintf(why, sizeof why, "is newer: an older copy was put back there (epoch %" PRIu64 ", version %" PRIu64
			 "; known here: %" PRIu64 ", %" PRIu64 ")", o->epoch, o->version, i->origin.epoch, i->origin.version);
		break;
	case KEPT_FENCED:
		snprintf(why, sizeof why, "is out of date: another mount took the region over");
		break;
	default:
		if (o && o->epoch == i->origin.epoch && o->version == i->origin.version) {
			snprintf(why, sizeof why, "may be out of date: what was written there since it was filled cannot be told%s",
				 o->instance == i->origin.instance ? "" : ", its server was restarted");
			break;
		}
		snprintf(why, sizeof why, "is out of date: somebody else has written there since (epoch %" PRIu64 ", known here: %"
			 PRIu64 ")", o ? o->epoch : 0, i->origin.epoch);
	}
	if (k->open)
		;
	else if (dirty)
		snprintf(out, sizeof out, ". Up to %s are unsaved there: save them with 'farpage copy --dirty', or push them over what is "
			 "there now with --discard-clean --force", far_format_size(size, sizeof size, dirty));
	else
		snprintf(out, sizeof out, ". Nothing is unsaved there: forget it with --discard-clean, or choose another --local");
	return far_error_set(err, ESTALE, "%s%.100s: what is kept in %.80s %s%s", cannot, k->source, far_persist_path(k->p), why,
			     out);
}

static int kept_apply(struct far_kept *k, enum kept_verdict v, const struct far_facts *f, const struct far_origin *o,
		      struct far_error *err)
{
	const struct far_persist_info *i = far_persist_info(k->p);
	bool dirty = far_kept_dirty(i) != 0;
	/* A read-only mount that was away catches up: nothing here is anybody's work. */
	bool follow = k->o->read_only && v == KEPT_NEWER && !dirty;

	k->behind = follow && !k->o->discard_clean;
	if (v == KEPT_FITS || k->behind)
		return 0;
	if (v == KEPT_SIZE || k->open || !k->o->discard_clean || (dirty && !k->o->force))
		return kept_say(k, v, f, o, err);
	if (far_persist_shared(k->p))
		return far_error_set(err, EBUSY, "cannot mount %.150s: what is kept in %.150s is out of date, and another mount uses it. "
				     "End that one first", k->source, far_persist_path(k->p));
	int r = far_persist_discard_clean(k->p);
	if (r)
		return far_error_set(err, -r, "cannot forget the clean chunks in %s: %s", far_persist_path(k->p), far_strerror(r));
	k->forgotten = true;
	return 0;
}

int far_kept_check(struct far_kept *k, const struct far_facts *f, const struct far_origin *o, struct far_error *err)
{
	if (!k->p || far_persist_is_new(k->p))
		return 0;
	return kept_apply(k, kept_compare(far_persist_info(k->p), k->source, f, o), f, o, err);
}

int far_kept_refuse(struct far_kept *k, const struct far_origin *o, struct far_error *err)
{
	if (!k->p || far_persist_is_new(k->p))
		return far_error_set(err, ESTALE, "cannot mount %.200s: somebody else has written there at this moment. Try again",
				     k->source);
	const struct far_persist_info *i = far_persist_info(k->p);
	enum kept_verdict v = o->epoch < i->origin.epoch || o->version < i->origin.version ? KEPT_OLDER : KEPT_NEWER;
	return kept_apply(k, v, &i->facts, o, err);
}
