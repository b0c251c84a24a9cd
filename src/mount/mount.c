/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A mount is a stack that is built bottom up and taken apart top down:
 *
 *     frontend (FUSE)
 *     region: chunk map, puller, pusher      managed only
 *     retry                                  one budget for the whole mount
 *     chunked                                if the remote takes whole chunks only
 *     the layers that were asked for
 *     remote
 */
#define _GNU_SOURCE
#include "mount/mount.h"

#include "base/clock.h"
#include "base/options.h"
#include "frontend/fuse.h"
#include "layer/layer.h"
#include "mount/holders.h"
#include "region/region.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MNT_FAR_AWAY FAR_MSEC /* a longer round trip than this asks for a managed mount */

struct far_mnt {
	struct far_mount_opts o;
	enum far_mode mode;
	char why[96];
	uint64_t bytes;
	struct far_backend *remote;   /* direct: the whole stack; managed: owned by the region */
	struct far_region *region;    /* NULL when direct */
	struct far_fuse *fuse;        /* NULL once unmounted */
	_Atomic(struct far_fuse *) ready; /* the frontend, once mounted */
	struct far_backend *local;    /* the region's; NULL if it may lose chunks again by itself */
	_Atomic bool all_local;       /* whoever of this and `ready` comes second tells the frontend */
	char *path;
	uint64_t deadline;            /* ns; FAR_NEVER: wait */
};

/* The shortest of three reads of the first bytes. */
static int mnt_round_trip(struct far_backend *b, uint64_t *rtt, struct far_error *err)
{
	char buf[512];
	size_t len = (size_t)far_min(far_size(b), sizeof buf);

	*rtt = 0;
	for (int k = 0; k < 3 && len; k++) {
		uint64_t began = far_now();
		int e = far_read(b, 0, buf, len, 0);
		if (e)
			return far_error_set(err, -e, "the first bytes of the remote cannot be read: %s. Look at the host that "
					     "serves it", far_strerror(e));
		uint64_t took = far_now() - began;
		*rtt = k ? far_min(*rtt, took) : took;
	}
	return 0;
}

static int mnt_choose_mode(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	char d[16];
	uint64_t rtt = 0;
	int e = 0;

	m->mode = m->o.mode;
	if (conf->network)
		e = mnt_round_trip(m->remote, &rtt, err);
	if (e)
		return e;
	if (m->mode == FAR_MODE_AUTO)
		m->mode = conf->asked_managed || rtt > MNT_FAR_AWAY ? FAR_MODE_MANAGED : FAR_MODE_DIRECT;
	const char *word = m->mode == FAR_MODE_MANAGED ? "managed" : "direct";
	if (conf->network)
		snprintf(m->why, sizeof m->why, "%s (round trip %s)", word, far_format_duration(d, sizeof d, rtt));
	else
		snprintf(m->why, sizeof m->why, "%s", word);
	return 0;
}

static int mnt_wrap(struct far_backend **b, const char *spec, struct far_error *err)
{
	struct far_backend *outer;
	int e = far_layer_open(spec, *b, &outer, err);
	if (!e)
		*b = outer;
	return e;
}

/* Whether the whole of b is one hole. */
static bool mnt_is_zero(struct far_backend *b)
{
	struct far_extent x;
	uint64_t at = 0;
	size_t n;

	while (at < far_size(b)) {
		if (far_extents(b, at, far_size(b) - at, &x, 1, &n) || x.kind != FAR_EXTENT_ZERO || !x.len)
			return false;
		at += x.len;
	}
	return true;
}

static int mnt_open_local(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_backend **out,
			  bool *is_zero, struct far_error *err)
{
	const char *uri = m->o.local ? m->o.local : "mem:";
	struct far_backend *b = NULL;
	char *full = NULL;
	int e;

	if (m->o.local_backend) {
		b = m->o.local_backend;
	} else {
		if (strcmp(uri, "mem:") == 0) /* huge pages, if all of it will be here anyway and no kernel may read it */
			e = asprintf(&full, "mem:%" PRIu64 "%s", m->bytes,
				     m->o.pull_workers && !m->o.local_max && !m->o.read_only ? "?private=1" : "");
		else if (strstr(uri, "size=") || strncmp(uri, "mem:", 4) == 0)
			e = asprintf(&full, "%s", uri);
		else
			e = asprintf(&full, "%s%csize=%" PRIu64, uri, strchr(uri, '?') ? '&' : '?', m->bytes);
		if (e < 0)
			return far_error_set(err, ENOMEM, "no memory for the local store's name");
		e = far_open(full, NULL, &b, err);
		free(full);
		if (e)
			return far_error_prefix(err, "local store");
	}
	uint64_t ram = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
	if (strncmp(uri, "mem:", 4) == 0 && !m->o.local_backend && m->bytes > ram / 2 && !m->o.local_max)
		far_log(FAR_LOG_WARNING, "the local store is memory and may grow past half of this host's: use --local "
			"file:PATH or --local-max SIZE");
	e = far_facts(b)->chunk ? mnt_wrap(&b, "chunked", err) : 0;
	for (size_t k = conf->n_local_layers; k-- > 0 && !e;)
		e = mnt_wrap(&b, conf->local_layers[k], err);
	if (e) {
		if (!m->o.local_backend)
			far_close(b);
		return e;
	}
	*is_zero = strncmp(uri, "mem:", 4) == 0 && !m->o.local_backend ? true : mnt_is_zero(b);
	*out = b;
	return 0;
}

/* From a thread of the puller, or of a caller. */
static void mnt_all_local_cb(void *opaque)
{
	struct far_mnt *m = opaque;

	atomic_store(&m->all_local, true);
	struct far_fuse *f = atomic_load(&m->ready);
	if (f)
		far_fuse_all_local(f, m->local);
}

static int mnt_open_region(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	struct far_region_conf rc = { .remote = m->remote, .opts = &m->o, .all_local = mnt_all_local_cb, .opaque = m };
	int e = mnt_open_local(m, conf, &rc.local, &rc.local_is_zero, err);

	if (e)
		return e;
	m->local = m->o.local_max ? NULL : rc.local; /* before the first callback */
	e = far_region_open(&rc, &m->region, err);
	if (e && !m->o.local_backend)
		far_close(rc.local);
	return e;
}

static int mnt_open_frontend(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	struct far_fuse_conf fc = {
		.b = m->region ? far_region_backend(m->region) : m->remote,
		.target = conf->target,
		.name = conf->name,
		.source = conf->source,
		.read_only = m->o.read_only || !(far_facts(m->remote)->caps & FAR_CAP_WRITE),
		.pulling = m->mode == FAR_MODE_MANAGED,
		.keep_cache = m->mode == FAR_MODE_MANAGED,
		.max_blocked = m->o.max_blocked ? m->o.max_blocked : 256,
		.deadline = m->deadline,
	};
	int e = 0;

	if (m->region && m->o.pull_first) {
		uint64_t old = far_deadline_limit(FAR_NEVER);
		e = far_region_wait_local(m->region, m->o.pull_first);
		far_deadline_restore(old);
		if (e)
			return far_error_set(err, -e, "cannot pull the first %" PRIu64 " bytes: %s", m->o.pull_first,
					     far_strerror(e));
	}
	e = far_fuse_open(&fc, &m->fuse, err);
	if (e)
		return e;
	atomic_store(&m->ready, m->fuse);
	if (atomic_load(&m->all_local))
		far_fuse_all_local(m->fuse, m->local);
	m->path = strdup(far_fuse_path(m->fuse));
	return m->path ? 0 : far_error_set(err, ENOMEM, "no memory for the path");
}

/* One retry budget a mount, and whole chunks for who needs them. On failure *b is what it was. */
static int mnt_harden(struct far_mnt *m, bool network, struct far_backend **b, struct far_error *err)
{
	/* Back-off alone keeps 256 blocked calls from being a storm; a program gets its error at the deadline, not before. */
	static const char always[] = "eio-tries=4,budget=1000000";
	char spec[96];
	int e = far_facts(*b)->chunk ? mnt_wrap(b, "chunked", err) : 0;

	if (e || !network) /* what fails on this host's own disks fails again */
		return e;
	if (m->deadline == FAR_NEVER)
		snprintf(spec, sizeof spec, "retry:deadline=8760h,%s", always);
	else
		snprintf(spec, sizeof spec, "retry:deadline=%ums,%s", m->o.deadline_ms, always);
	return mnt_wrap(b, spec, err);
}

int far_mnt_open(const struct far_mnt_conf *conf, struct far_mnt **out, struct far_error *err)
{
	struct far_mnt *m = calloc(1, sizeof *m);
	int e;

	if (!m)
		return far_error_set(err, ENOMEM, "no memory for a mount");
	m->o = conf->opts;
	if (!m->o.deadline_ms)
		m->o.deadline_ms = 30000;
	m->deadline = m->o.on_fail == FAR_ON_FAIL_WAIT ? FAR_NEVER : m->o.deadline_ms * FAR_MSEC;
	m->remote = conf->remote;
	m->bytes = far_size(m->remote);
	uint64_t old = far_deadline_limit(far_now() + m->o.deadline_ms * FAR_MSEC);
	e = mnt_harden(m, conf->network, &m->remote, err);
	if (!e)
		e = mnt_choose_mode(m, conf, err);
	if (!e && m->mode == FAR_MODE_MANAGED)
		e = mnt_open_region(m, conf, err);
	far_deadline_restore(old);
	if (!e)
		e = mnt_open_frontend(m, conf, err);
	if (e) {
		far_mnt_close(m);
		return e;
	}
	*out = m;
	return 0;
}

const char *far_mnt_path(const struct far_mnt *m)
{
	return m->path;
}

enum far_mode far_mnt_mode(const struct far_mnt *m)
{
	return m->mode;
}

const char *far_mnt_why(const struct far_mnt *m)
{
	return m->why;
}

int far_mnt_flush(struct far_mnt *m)
{
	if (m->region)
		return far_region_flush(m->region);
	int err = m->o.before_flush ? m->o.before_flush(m->o.opaque) : 0;
	return err ? err : far_facts(m->remote)->caps & FAR_CAP_WRITE ? far_flush(m->remote) : 0;
}

int far_mnt_wait(struct far_mnt *m, uint64_t off, uint64_t len)
{
	return m->region ? far_region_wait(m->region, off, len) : -EOPNOTSUPP;
}

int far_mnt_wait_percent(struct far_mnt *m, unsigned percent)
{
	uint64_t want = percent >= 100 ? m->bytes : (uint64_t)((double)m->bytes * percent / 100.0);
	return m->region ? far_region_wait_local(m->region, want) : -EOPNOTSUPP;
}

int far_mnt_prefetch(struct far_mnt *m, uint64_t off, uint64_t len)
{
	if (!m->region)
		return -EOPNOTSUPP;
	far_region_prefetch(m->region, off, len);
	return 0;
}

int far_mnt_evict(struct far_mnt *m, uint64_t off, uint64_t len)
{
	if (!m->region)
		return -EOPNOTSUPP;
	int e = m->fuse ? far_fuse_not_local(m->fuse) : 0;
	if (e)
		return e;
	return far_region_evict(m->region, off, len);
}

void far_mnt_status(struct far_mnt *m, struct far_status *st)
{
	if (m->region) {
		far_region_status(m->region, st);
		return;
	}
	struct far_status s = { .size = st->size, .mode = FAR_MODE_DIRECT, .bytes = m->bytes };
	s.blocked = m->fuse ? far_fuse_blocked(m->fuse) : 0;
	memcpy(st, &s, far_min(st->size, sizeof s));
}

bool far_mnt_ended(struct far_mnt *m, uint64_t until)
{
	return !m->fuse || far_fuse_wait(m->fuse, until);
}

int far_mnt_finish(struct far_mnt *m, uint64_t until, char *holders, size_t holders_len)
{
	int err = far_mnt_flush(m); /* each push below it has the deadline; the whole may take longer */

	if (holders_len)
		holders[0] = 0;
	if (!err && m->o.before_close)
		err = m->o.before_close(m->o.opaque);
	if (err || !m->fuse)
		return err;
	/* Unmounting makes the kernel write back what programs stored through mappings: flush again after it. */
	if (far_fuse_unmount(m->fuse) == -EBUSY) {
		far_holders(m->path, holders, holders_len);
		if (holders_len && holders[0])
			far_log(FAR_LOG_WARNING, "%s is held open by %s: it is served until they close it or the deadline passes.",
				m->path, holders);
		far_fuse_detach(m->fuse);
	}
	far_fuse_wait(m->fuse, until);
	return far_mnt_flush(m);
}

void far_mnt_close(struct far_mnt *m)
{
	if (!m)
		return;
	/* Whoever is blocked in a backend must get out before the frontend's threads can end. */
	if (m->region) {
		far_region_stop(m->region);
		far_region_join(m->region); /* they may be telling the frontend something */
	} else if (m->fuse) {
		far_stop(m->remote);
	}
	far_fuse_close(m->fuse);
	if (m->region)
		far_region_close(m->region);
	else
		far_close(m->remote);
	free(m->path);
	free(m);
}
