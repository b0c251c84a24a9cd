/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The library's memory face: far_map() and its family, over a mount in this process (mount.c). What the caller gives,
 * a backend or a local store of his own, changes owner only when all has succeeded; until then each stands behind a guest,
 * a layer whose end leaves it alone.
 */
#define _GNU_SOURCE
#include "base/clock.h"
#include "mount/child.h"
#include "mount/face.h"
#include "mount/kept.h"
#include "mount/mount.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAP_KNOWN_MS 5000 /* how long a remote may take that we can begin without */

struct map {
	struct far_mount face;
	struct far_mount_opts o; /* its strings are the ones below */
	char *local, *order, *record_order, *map, *source;
	struct far_mnt *mnt;
};

/* ---------------------------------------------------------------------------------------------------------- guests */

struct map_guest {
	struct far_backend *b;
	bool ours;
};

static struct far_backend *map_guest_b(void *self)
{
	return ((struct map_guest *)self)->b;
}

static int map_guest_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	return far_read(map_guest_b(self), off, buf, len, flags);
}

static int map_guest_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return far_write(map_guest_b(self), off, buf, len, flags);
}

static int map_guest_flush(void *self)
{
	return far_flush(map_guest_b(self));
}

static int map_guest_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return far_discard(map_guest_b(self), off, len, flags);
}

static int map_guest_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return far_zero(map_guest_b(self), off, len, flags);
}

static int map_guest_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	return far_extents(map_guest_b(self), off, len, out, max, n);
}

static int map_guest_share(void *self, int *fd)
{
	return far_share(map_guest_b(self), fd);
}

static void map_guest_stop(void *self)
{
	struct map_guest *g = self;
	if (g->ours)
		far_stop(g->b);
}

static void map_guest_close(void *self)
{
	struct map_guest *g = self;
	if (g->ours)
		far_close(g->b);
	free(g);
}

static int map_guest_new(struct far_backend *b, struct far_backend **out, struct map_guest **guest)
{
	static const struct far_ops ops = {
		FAR_OPS_INIT,
		.read = map_guest_read,
		.write = map_guest_write,
		.flush = map_guest_flush,
		.discard = map_guest_discard,
		.zero = map_guest_zero,
		.extents = map_guest_extents,
		.share = map_guest_share,
		.stop = map_guest_stop,
		.close = map_guest_close,
		.inner = map_guest_b,
	};
	struct map_guest *g = calloc(1, sizeof *g);

	if (!g)
		return -ENOMEM;
	g->b = b;
	int r = far_backend_new(&ops, g, far_facts(b), out);
	if (r)
		free(g);
	else
		*guest = g;
	return r;
}

/* ------------------------------------------------------------------------------------------------------------ open */

static void map_free(struct map *m)
{
	free(m->local);
	free(m->order);
	free(m->record_order);
	free(m->map);
	free(m->source);
	free(m);
}

static bool map_keep(char **mine, const char **theirs)
{
	if (!*theirs)
		return true;
	*mine = strdup(*theirs);
	*theirs = *mine;
	return *mine != NULL;
}

static bool map_asked_managed(const struct far_mount_opts *o)
{
	return o->local || o->local_backend || o->map || o->order || o->priority || o->record_order ||
	       o->durable != FAR_DURABLE_REMOTE || o->pull_workers >= 0 || o->push_workers >= 0 || o->local_max || o->dirty_max ||
	       o->push_interval_ms || o->pull_first || o->window;
}

static int map_check(const struct far_mount_opts *o, const char *source, struct far_error *err)
{
	if (o->chunk && (o->chunk & (o->chunk - 1)))
		return far_error_set(err, EINVAL, "cannot map %s: a chunk of %" PRIu64 " bytes is not a power of two", source, o->chunk);
	if (o->local && o->local_backend)
		return far_error_set(err, EINVAL, "cannot map %s: give a local store as a URI or as a backend, not both", source);
	if (o->mode == FAR_MODE_DIRECT && (o->local || o->local_backend || o->map))
		return far_error_set(err, EINVAL, "cannot map %s: a direct mount keeps no local copy. Leave out mode, or local and map",
				     source);
	if (o->force && !o->discard_clean)
		return far_error_set(err, EINVAL, "cannot map %s: `force` goes with `discard_clean`", source);
	if (o->take_over && o->read_only)
		return far_error_set(err, EINVAL, "cannot map %s: `take_over` takes the right to write, `read_only` wants none", source);
	if (o->address && (uintptr_t)o->address % (uintptr_t)sysconf(_SC_PAGESIZE))
		return far_error_set(err, EINVAL, "cannot map %s at %p: that is not the beginning of a page", source, o->address);
	return 0;
}

static int map_new(const struct far_mount_opts *opts, const char *source, struct map **out, struct far_error *err)
{
	struct map *m = calloc(1, sizeof *m);

	if (!m)
		return far_error_set(err, ENOMEM, "cannot map %s: out of memory", source);
	m->o = (struct far_mount_opts)FAR_MOUNT_OPTS_INIT;
	if (opts)
		memcpy(&m->o, opts, far_min(opts->size, sizeof m->o));
	m->o.size = sizeof m->o;
	m->source = strdup(source);
	int r = 0;
	if (!map_keep(&m->local, &m->o.local) || !map_keep(&m->order, &m->o.order) || !map_keep(&m->map, &m->o.map) ||
	    !map_keep(&m->record_order, &m->o.record_order) || !m->source)
		r = far_error_set(err, ENOMEM, "cannot map %s: out of memory", source);
	if (!r)
		r = map_check(&m->o, source, err);
	if (r)
		map_free(m);
	else
		*out = m;
	return r;
}

/* What the local store's last mount knows lets us begin while the remote is out of reach. One that is another one than
 * the map's is opened as it is: the mount compares and says more. */
static int map_open_remote(const struct map *m, const struct far_persist *map, struct far_backend **out, bool *offline,
			   struct far_error *err)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct far_origin o = FAR_ORIGIN_INIT;

	opts.read_only = m->o.read_only;
	opts.deadline_ms = m->o.deadline_ms;
	if (!map || far_persist_is_new(map) || !(far_persist_info(map)->facts.caps & FAR_CAP_REMOTE))
		return far_open(m->source, &opts, out, err);
	opts.known = &far_persist_info(map)->facts;
	opts.deadline_ms = (uint32_t)far_min(opts.deadline_ms ? opts.deadline_ms : MAP_KNOWN_MS, MAP_KNOWN_MS);
	int r = far_open(m->source, &opts, out, err);
	if (r == 0) { /* opening has asked, and waited */
		*offline = far_origin(*out, &o, FAR_NOWAIT) == -EAGAIN;
		return 0;
	}
	if (r != -ESTALE)
		return r;
	opts.known = NULL;
	return far_open(m->source, &opts, out, err);
}

static const struct far_face_ops map_face;

/* remote and persist go to the mount, which closes them on failure. */
static int map_mount(struct map *m, struct far_backend *remote, struct far_persist *persist, bool offline, struct far_error *err)
{
	struct far_mnt_conf mc = { .remote = remote, .persist = persist, .source = m->source, .pointer = true, .offline = offline,
				   .target = "as memory", .network = far_facts(remote)->caps & FAR_CAP_REMOTE,
				   .asked_managed = map_asked_managed(&m->o), .opts = m->o };
	struct map_guest *guest = NULL;

	if (m->o.local_backend) {
		int r = map_guest_new(m->o.local_backend, &mc.opts.local_backend, &guest);
		if (r) {
			far_close(remote);
			far_persist_close(persist);
			return far_error_set(err, -r, "cannot map %s: %s", m->source, far_strerror(r));
		}
	}
	int r = far_mnt_open(&mc, &m->mnt, err);
	if (!r && guest)
		guest->ours = true;
	m->face.ops = &map_face;
	return r;
}

int far_map(struct far_backend *b, const struct far_mount_opts *opts, struct far_mount **out, struct far_error *err)
{
	struct far_backend *outer;
	struct map_guest *guest;
	struct map *m;
	int r = map_new(opts, "the program's own backend", &m, err);

	if (r)
		return r;
	if (m->o.outside) {
		r = far_error_set(err, EOPNOTSUPP, "a backend of the program's own cannot be served by another process: give a URI to "
				  "far_map_uri(), or leave `outside` out");
	} else if ((r = map_guest_new(b, &outer, &guest))) {
		far_error_set(err, -r, "cannot map %s: %s", m->source, far_strerror(r));
	} else {
		/* It has no name by which a later mount would know it again: what is local is not kept for that. */
		r = map_mount(m, outer, NULL, false, err);
	}
	if (r) {
		map_free(m);
		return r;
	}
	guest->ours = true;
	*out = &m->face;
	return 0;
}

int far_map_uri(const char *uri, const struct far_mount_opts *opts, struct far_mount **out, struct far_error *err)
{
	struct far_persist *persist = NULL;
	struct far_backend *remote;
	bool offline = false;
	struct map *m;
	int r = map_new(opts, uri, &m, err);

	if (r)
		return r;
	if (m->o.outside) {
		r = far_outside_open(uri, &m->o, out, err);
		map_free(m);
		return r;
	}
	if (m->o.mode != FAR_MODE_DIRECT)
		r = far_kept_open(&m->o, &persist, err);
	if (!r && (r = map_open_remote(m, persist, &remote, &offline, err)))
		far_persist_close(persist);
	if (!r)
		r = map_mount(m, remote, persist, offline, err);
	if (r) {
		map_free(m);
		return r;
	}
	*out = &m->face;
	return 0;
}

/* ------------------------------------------------------------------------------------------------------- the face */

static struct far_mnt *map_mnt(const struct far_mount *m)
{
	return ((const struct map *)m)->mnt;
}

static void *map_addr(const struct far_mount *m)
{
	return far_mnt_addr(map_mnt(m));
}

static int map_flush(struct far_mount *m)
{
	return far_mnt_flush(map_mnt(m));
}

static uint64_t map_limit(int timeout_ms)
{
	return far_deadline_limit(timeout_ms < 0 ? FAR_NEVER : far_now() + (uint64_t)timeout_ms * FAR_MSEC);
}

static int map_wait(struct far_mount *m, unsigned percent, int timeout_ms)
{
	uint64_t old = map_limit(timeout_ms);
	int r = far_mnt_wait_percent(map_mnt(m), percent);

	far_deadline_restore(old);
	return r;
}

/* -EINVAL: not a range of the region. */
static int map_inside(struct far_mount *m, uint64_t off, uint64_t len)
{
	uint64_t bytes = far_mnt_bytes(map_mnt(m));
	return off > bytes || len > bytes - off ? -EINVAL : 0;
}

static int map_wait_range(struct far_mount *m, uint64_t off, uint64_t len, int timeout_ms)
{
	int r = map_inside(m, off, len);
	if (r || !len)
		return r;
	uint64_t old = map_limit(timeout_ms);
	r = far_mnt_wait(map_mnt(m), off, len);
	far_deadline_restore(old);
	return r;
}

static int map_range(struct far_mount *face, enum far_face_range what, uint64_t off, uint64_t len)
{
	struct far_mnt *m = map_mnt(face);
	int r = map_inside(face, off, len);

	if (r || !len)
		return r;
	switch (what) {
	case FAR_FACE_PIN:
	case FAR_FACE_UNPIN:
		return far_mnt_pin(m, off, len, what == FAR_FACE_PIN);
	case FAR_FACE_EVICT:
		return far_mnt_evict(m, off, len);
	case FAR_FACE_POPULATE:
		return far_mnt_populate(m, off, len);
	case FAR_FACE_DISCARD:
		return far_mnt_discard(m, off, len);
	case FAR_FACE_HEAL:
		return far_mnt_heal(m, off, len);
	case FAR_FACE_STORED:
		return far_mnt_stored(m, off, len);
	}
	return -EOPNOTSUPP;
}

static int map_status(struct far_mount *m, struct far_status *st)
{
	far_mnt_status(map_mnt(m), st);
	return 0;
}

static int map_close(struct far_mount *face)
{
	struct map *m = (struct map *)face;
	int r = far_mnt_finish(m->mnt, 0, NULL, 0);

	far_mnt_close(m->mnt);
	map_free(m);
	return r;
}

static const struct far_face_ops map_face = {
	.addr = map_addr,
	.flush = map_flush,
	.wait = map_wait,
	.wait_range = map_wait_range,
	.range = map_range,
	.status = map_status,
	.close = map_close,
};
