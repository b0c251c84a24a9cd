/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A mount is a stack that is built bottom up and taken apart top down:
 *
 *     frontend: FUSE, or a pointer, which has a region of its own (mount_pointer.c), or a socket (mount_socket.c)
 *     region: chunk map, puller, pusher      managed only; under a pointer only if a local store was given
 *     admit                                  open while it is certain that we may speak to this remote (lease.c)
 *     retry                                  one budget for the whole mount
 *     chunked                                if the remote takes whole chunks only
 *     owned                                  managed mounts of a store without a server: who may write, kept beside it
 *     the layers that were asked for
 *     remote
 *
 * Before the region is opened the remote is asked who it is, and the map of the local store whether it belongs to that
 * (kept.c). A remote that is out of reach is no obstacle if there is a map: its facts are then what the map remembers,
 * and lease.c or follow.c go on asking.
 */
#define _GNU_SOURCE
#include "mount/mount.h"

#include "base/clock.h"
#include "base/options.h"
#include "layer/layer.h"
#include "mount/aside.h"
#include "mount/holders.h"
#include "mount/mount_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MNT_FAR_AWAY FAR_MSEC /* a longer round trip than this asks for a managed mount */

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

static bool mnt_has_map(const struct far_mnt *m)
{
	return m->kept.p && !far_persist_is_new(m->kept.p);
}

static int mnt_choose_mode(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	char d[16];
	uint64_t rtt = 0;
	int e = 0;

	m->mode = m->o.mode;
	if (mnt_has_map(m)) { /* it may be out of reach */
		m->mode = FAR_MODE_MANAGED;
		return 0;
	}
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
		m->local_taken = true;
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
		far_close(b);
		return e;
	}
	struct far_backend *aside;
	if (far_persist_passive(m->kept.p)) {
		e = far_aside_new(b, &aside);
		if (e) {
			far_close(b);
			return far_error_set(err, -e, "local store: %s", far_strerror(e));
		}
		b = aside;
		m->aside = true;
	}
	*is_zero = strncmp(uri, "mem:", 4) == 0 && !m->o.local_backend ? true : !mnt_has_map(m) && mnt_is_zero(b);
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
	struct far_mount_opts inner;
	struct far_region_conf rc = { .remote = m->remote, .opts = &m->o, .all_local = mnt_all_local_cb, .opaque = m,
				      .persist = m->kept.p };

	if (mnt_has_map(m))
		m->o.chunk = far_persist_info(m->kept.p)->chunk;
	if (m->wants_pointer) {
		far_mnt_pointer_inner(m, &inner);
		rc.opts = &inner;
	}
	int e = mnt_open_local(m, conf, &rc.local, &rc.local_is_zero, err);
	if (e)
		return e;
	m->local = m->o.local_max ? NULL : rc.local; /* before the first callback */
	e = far_region_open(&rc, &m->region, err);
	if (e)
		far_close(rc.local);
	m->kept.open = !e;
	return e;
}

/* ------------------------------------------------------------------------------------- whose region it is */

static void mnt_tell_map(struct far_mnt *m, const struct far_origin *o)
{
	int e = m->region ? far_region_remember(m->region, NULL, o, false) : 0;

	if (e)
		far_log(FAR_LOG_WARNING, "the chunk map %s cannot be written: %s", far_persist_path(m->kept.p), far_strerror(e));
}

/* From the thread of lease.c or follow.c: what is known of the remote now. */
static void mnt_heard_cb(void *opaque, const struct far_origin *o)
{
	struct far_mnt *m = opaque;
	/* Who holds the lease needs no more than this; for the others each change counts. */
	if (m->writable && o->epoch == m->heard.epoch && o->version == m->heard.version &&
	    strcmp(o->identity, m->heard.identity) == 0)
		return;
	m->heard = *o;
	mnt_tell_map(m, o);
}

static void mnt_fenced_cb(void *opaque, const struct far_origin *o, const char *why)
{
	struct far_status st = FAR_STATUS_INIT;
	struct far_mnt *m = opaque;
	char size[24], saved[300] = "";

	if (m->region) {
		far_region_fence(m->region);
		far_region_remember(m->region, NULL, NULL, true);
	}
	if (far_mnt_top(m)) {
		far_region_fence(far_mnt_top(m));
		far_region_status(far_mnt_top(m), &st);
	}
	if (st.dirty && m->kept.p && !m->pointer)
		snprintf(saved, sizeof saved, ". %s are unsaved: end this mount, then save them with 'farpage copy --dirty %.150s file:NEW'",
			 far_format_size(size, sizeof size, st.dirty), m->o.local);
	else if (st.dirty)
		snprintf(saved, sizeof saved, ". %s are unsaved: copy what you need from the %s before this mount ends", far_format_size(size, sizeof size, st.dirty),
			 m->pointer ? "memory" : "file");
	far_log(FAR_LOG_ERROR, "%s. Writes fail from now on and nothing is pushed%s", why, saved);
}

/* The first question to the remote, and the comparison with what is local. */
static int mnt_claim(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	struct far_leaser_conf lc = {
		.remote = m->below, .gate = m->gate, .kept = &m->kept, .target = conf->target, .writable = m->writable,
		.take_over = m->o.take_over, .alone = m->alone, .may_be_offline = mnt_has_map(m), .offline = conf->offline, .deadline = m->o.deadline_ms * FAR_MSEC,
		.heard = mnt_heard_cb, .fenced = mnt_fenced_cb, .opaque = m,
	};
	struct far_origin o;

	if (!conf->network && m->mode != FAR_MODE_MANAGED)
		return 0;
	int e = far_leaser_open(&lc, &m->leaser, err);
	if (e || !m->kept.p || far_leaser_offline(m->leaser))
		return e;
	far_leaser_origin(m->leaser, &o);
	e = far_persist_remember(m->kept.p, m->source, far_facts(m->below), m->kept.behind ? NULL : &o, false);
	return e ? far_error_set(err, -e, "cannot write the chunk map %s: %s", far_persist_path(m->kept.p), far_strerror(e)) : 0;
}

/* It is only said: a remote that has gone away meanwhile must not hold us up. */
static int mnt_round_trip_soon(struct far_mnt *m, uint64_t *rtt)
{
	uint64_t old = far_deadline_limit(far_now() + 2 * FAR_SEC);
	int e = mnt_round_trip(m->below, rtt, NULL);

	far_deadline_restore(old);
	return e;
}

/* What is said at first where there is a map, so that no mode had to be measured. */
static void mnt_say_mapped(struct far_mnt *m, const struct far_mnt_conf *conf)
{
	struct far_status st = FAR_STATUS_INIT;
	uint64_t rtt = 0;
	char d[16];

	far_region_status(m->region, &st);
	unsigned percent = st.bytes ? (unsigned)((double)st.local * 100 / (double)st.bytes) : 100;
	if (far_leaser_offline(m->leaser))
		snprintf(m->why, sizeof m->why, "managed (remote out of reach: offline, %u %% local)", percent);
	else if (conf->network && mnt_round_trip_soon(m, &rtt) == 0)
		snprintf(m->why, sizeof m->why, "managed (round trip %s, %u %% local)", far_format_duration(d, sizeof d, rtt), percent);
	else
		snprintf(m->why, sizeof m->why, "managed (%u %% local)", percent);
}

static int mnt_find_cb(void *opaque, struct far_error *err)
{
	struct far_mnt *m = opaque;
	return far_leaser_find(m->leaser, err);
}

/* The threads that go on asking. */
static int mnt_watch_remote(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	struct far_follower_conf fc = {
		.remote = m->below, .region = m->region, .fuse = m->fuse, .pointer = m->pointer, .gate = m->gate, .source = m->source,
		.interval = (m->o.follow_ms ? m->o.follow_ms : 1000) * FAR_MSEC, .heard = mnt_heard_cb, .opaque = m,
		.from = FAR_ORIGIN_INIT,
	};
	int e = m->leaser && m->writable ? far_leaser_start(m->leaser) : 0;
	bool never = m->o.follow_ms == UINT32_MAX, late = m->kept.behind || (m->leaser && far_leaser_offline(m->leaser));

	fc.once = never;
	if (never)
		fc.interval = FAR_SEC;
	if (!e && !m->writable && (!never || late)) {
		if (late) {
			fc.find = mnt_find_cb;
			fc.from = far_persist_info(m->kept.p)->origin;
		} else if (m->leaser) {
			far_leaser_origin(m->leaser, &fc.from);
		}
		e = far_follower_open(&fc, &m->follower);
	}
	return e ? far_error_set(err, -e, "cannot start a thread: %s", far_strerror(e)) : 0;
}

static int mnt_pull_first(struct far_mnt *m, struct far_error *err)
{
	struct far_region *r = m->region ? m->region : far_mnt_top(m);

	if (!r || !m->o.pull_first || m->mode != FAR_MODE_MANAGED || far_leaser_offline(m->leaser))
		return 0;
	uint64_t old = far_deadline_limit(FAR_NEVER);
	int e = far_region_wait_local(r, m->o.pull_first);
	far_deadline_restore(old);
	return e ? far_error_set(err, -e, "cannot pull the first %" PRIu64 " bytes: %s", m->o.pull_first, far_strerror(e)) : 0;
}

static int mnt_open_fuse(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	struct far_fuse_conf fc = {
		.b = m->region ? far_region_backend(m->region) : m->remote,
		.target = conf->target,
		.name = conf->name,
		.source = conf->source,
		.read_only = !m->writable,
		.changing = !m->writable && conf->network &&
			    (m->o.follow_ms != UINT32_MAX || m->kept.behind || far_leaser_offline(m->leaser)),
		.pulling = m->mode == FAR_MODE_MANAGED,
		.keep_cache = m->mode == FAR_MODE_MANAGED,
		.max_blocked = m->o.max_blocked ? m->o.max_blocked : 256,
		.deadline = m->deadline,
	};
	int e = far_fuse_open(&fc, &m->fuse, err);

	if (e)
		return e;
	atomic_store(&m->ready, m->fuse);
	if (atomic_load(&m->all_local))
		far_fuse_all_local(m->fuse, m->local);
	m->path = strdup(far_fuse_path(m->fuse));
	return m->path ? 0 : far_error_set(err, ENOMEM, "no memory for the path");
}

static int mnt_open_frontend(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	int e;

	if (m->wants_pointer) {
		e = far_mnt_pointer_open(m, err);
		return e ? e : mnt_pull_first(m, err);
	}
	e = mnt_pull_first(m, err);
	if (e)
		return e;
	return conf->socket ? far_mnt_socket_open(m, conf, err) : mnt_open_fuse(m, conf, err);
}

/* Who may write, whole chunks for who needs them, one retry budget a mount, the gate. On failure m->remote is what it was
 * or wraps that. */
static int mnt_harden(struct far_mnt *m, bool network, struct far_error *err)
{
	/* Back-off alone keeps 256 blocked calls from being a storm; a program gets its error at the deadline, not before. */
	static const char always[] = "eio-tries=4,budget=1000000";
	char spec[96];
	int e = far_facts(m->remote)->chunk ? mnt_wrap(&m->remote, "chunked", err) : 0;

	if (e || !network) /* what fails on this host's own disks fails again */
		return e;
	if (m->deadline == FAR_NEVER)
		snprintf(spec, sizeof spec, "retry:deadline=8760h,%s", always);
	else
		snprintf(spec, sizeof spec, "retry:deadline=%ums,%s", m->o.deadline_ms, always);
	return mnt_wrap(&m->remote, spec, err);
}

static int mnt_guard(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	struct far_backend *outer;
	int e = 0;

	if (!conf->network && m->mode == FAR_MODE_MANAGED && m->writable && !(far_facts(m->remote)->caps & FAR_CAP_REMOTE)) {
		e = far_owned_new(m->remote, &outer);
		if (!e) {
			m->remote = outer;
			m->alone = true;
		} else if (e == -EBUSY) {
			return far_error_set(err, EBUSY, "cannot mount %.200s for writing: another mount or server of farpage on this host "
					     "has it. End that one, or use --read-only", m->source);
		} else if (e != -EOPNOTSUPP) { /* without a record it has no owner: then it is on its own */
			return far_error_set(err, -e, "cannot find out who may write to %s: %s", m->source, far_strerror(e));
		}
	}
	m->below = m->remote;
	if (!conf->network)
		return 0;
	e = far_admit_new(m->remote, m->deadline, &outer, &m->gate);
	if (e)
		return far_error_set(err, -e, "cannot mount %s: %s", m->source, far_strerror(e));
	m->remote = outer;
	return 0;
}

static int mnt_build(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	uint64_t old = far_deadline_limit(far_now() + m->o.deadline_ms * FAR_MSEC);
	int e = mnt_harden(m, conf->network, err);

	if (!e)
		e = mnt_choose_mode(m, conf, err);
	if (!e)
		e = mnt_guard(m, conf, err);
	if (!e)
		e = mnt_claim(m, conf, err);
	bool mapped = mnt_has_map(m);
	if (!e && m->mode == FAR_MODE_MANAGED && (!m->wants_pointer || m->o.local || m->o.local_backend))
		e = mnt_open_region(m, conf, err);
	if (!e && mapped)
		mnt_say_mapped(m, conf);
	far_deadline_restore(old);
	return e;
}

int far_mnt_open(const struct far_mnt_conf *conf, struct far_mnt **out, struct far_error *err)
{
	struct far_mnt *m = calloc(1, sizeof *m);

	if (!m) {
		far_close(conf->remote);
		far_close(conf->opts.local_backend);
		far_persist_close(conf->persist);
		return far_error_set(err, ENOMEM, "no memory for a mount");
	}
	m->o = conf->opts;
	m->wants_pointer = conf->pointer;
	m->given = conf->given;
	if (!m->o.deadline_ms)
		m->o.deadline_ms = 30000;
	m->deadline = m->o.on_fail == FAR_ON_FAIL_WAIT ? FAR_NEVER : m->o.deadline_ms * FAR_MSEC;
	m->remote = conf->remote;
	m->bytes = far_size(m->remote);
	m->writable = !m->o.read_only && (far_facts(m->remote)->caps & FAR_CAP_WRITE);
	m->source = strdup(conf->source ? conf->source : "the remote");
	m->kept = (struct far_kept){ .p = conf->persist, .o = &m->o, .source = m->source };
	int e = m->source ? mnt_build(m, conf, err) : far_error_set(err, ENOMEM, "no memory for a mount");
	if (!e)
		e = mnt_open_frontend(m, conf, err);
	if (!e)
		e = mnt_watch_remote(m, conf, err);
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
	if (m->leaser && far_leaser_offline(m->leaser) && far_leaser_found(m->leaser))
		return "managed (began offline)";
	return m->why;
}

/* With --durable local what was flushed is not on the remote yet. */
int far_mnt_push(struct far_mnt *m)
{
	struct far_region *r = m->region ? m->region : far_mnt_top(m);
	int err = far_mnt_flush(m);
	return err || !r ? err : far_region_push(r);
}

int far_mnt_flush(struct far_mnt *m)
{
	if (m->pointer)
		return far_mnt_pointer_flush(m);
	if (m->region)
		return far_region_flush(m->region);
	int err = m->o.before_flush ? m->o.before_flush(m->o.opaque) : 0;
	return err ? err : far_facts(m->remote)->caps & FAR_CAP_WRITE ? far_flush(m->remote) : 0;
}

int far_mnt_wait(struct far_mnt *m, uint64_t off, uint64_t len)
{
	struct far_region *r = far_mnt_top(m);

	if (!r) /* the pages of a backend that shares them are here */
		return m->pointer ? 0 : -EOPNOTSUPP;
	return far_region_wait(r, off, len);
}

int far_mnt_wait_percent(struct far_mnt *m, unsigned percent)
{
	uint64_t want = percent >= 100 ? m->bytes : (uint64_t)((double)m->bytes * percent / 100.0);

	if (m->pointer)
		return far_mnt_pointer_wait_percent(m, want);
	return m->region ? far_region_wait_local(m->region, want) : -EOPNOTSUPP;
}

int far_mnt_prefetch(struct far_mnt *m, uint64_t off, uint64_t len)
{
	struct far_region *r = far_mnt_top(m);

	if (!r)
		return m->pointer ? 0 : -EOPNOTSUPP;
	far_region_prefetch(r, off, len);
	return 0;
}

int far_mnt_evict(struct far_mnt *m, uint64_t off, uint64_t len)
{
	struct far_region *r = far_mnt_top(m);

	if (!r)
		return m->pointer ? 0 : -EOPNOTSUPP;
	int e = m->fuse ? far_fuse_not_local(m->fuse) : 0;
	if (e)
		return e;
	return far_region_evict(r, off, len);
}

int far_mnt_pin(struct far_mnt *m, uint64_t off, uint64_t len, bool pin)
{
	struct far_region *r = far_mnt_top(m);

	if (!r)
		return m->pointer ? 0 : -EOPNOTSUPP;
	return pin ? far_region_pin(r, off, len) : far_region_unpin(r, off, len);
}

void far_mnt_status(struct far_mnt *m, struct far_status *st)
{
	struct far_status s = FAR_STATUS_INIT;
	struct far_counters c = FAR_COUNTERS_INIT;
	struct far_origin o = FAR_ORIGIN_INIT;
	size_t size = st->size;

	if (m->pointer) {
		far_mnt_pointer_status(m, &s);
	} else if (m->region) {
		far_region_status(m->region, &s);
	} else {
		s.mode = FAR_MODE_DIRECT;
		s.bytes = m->bytes;
		s.blocked = m->fuse ? far_fuse_blocked(m->fuse) : 0;
	}
	far_counters(m->remote, &c);
	s.reconnects = c.reconnects;
	s.checksum_errors = c.checksum_errors;
	s.persistent = m->region && m->kept.p;
	s.local_full &= !m->aside;
	if (m->leaser) {
		far_leaser_origin(m->leaser, &o);
		s.lease = far_leaser_state(m->leaser);
		s.epoch = s.lease == FAR_LEASE_NONE ? 0 : o.epoch;
	}
	s.follow = m->follower ? far_follower_state(m->follower) : m->writable ? FAR_FOLLOW_NONE : FAR_FOLLOW_FROZEN;
	s.size = size;
	memcpy(st, &s, far_min(size, sizeof s));
}

bool far_mnt_ended(struct far_mnt *m, uint64_t until)
{
	if (m->pointer || m->server)
		return false;
	return !m->fuse || far_fuse_wait(m->fuse, until);
}

/* The map learns what the last flush made of the remote. */
static void mnt_remember(struct far_mnt *m)
{
	struct far_origin o = FAR_ORIGIN_INIT;

	if (m->region && m->kept.p && m->leaser && far_leaser_state(m->leaser) == FAR_LEASE_HELD &&
	    far_origin(m->below, &o, FAR_NOWAIT) == 0)
		mnt_tell_map(m, &o);
}

/* Nothing is pushed any more; the lease is another's to take. */
static void mnt_let_go(struct far_mnt *m)
{
	mnt_remember(m);
	if (m->gate)
		far_admit_fence(m->gate);
	if (m->leaser)
		far_leaser_release(m->leaser);
}

/* The file goes; what the kernel wrote back for it is flushed. */
static int mnt_unmount(struct far_mnt *m, uint64_t until, char *holders, size_t holders_len)
{
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

/* The last push. Each call has the deadline, the whole may take longer. Where pushes wait for ever, this one does not if
 * the bytes are safe in the local store, nor at the end of a pointer, which a program may be waiting for in its own last
 * lines: it goes on as long as something moves. */
static int mnt_last_push(struct far_mnt *m)
{
	struct far_status st = FAR_STATUS_INIT;
	uint64_t before;
	int err;

	if (m->deadline != FAR_NEVER || (!m->pointer && !(m->region && m->kept.p)))
		return far_mnt_push(m);
	do {
		far_mnt_status(m, &st);
		before = st.pushed;
		uint64_t old = far_deadline_limit(far_now() + m->o.deadline_ms * FAR_MSEC);
		err = far_mnt_push(m);
		far_deadline_restore(old);
		far_mnt_status(m, &st);
	} while (err == -ETIMEDOUT && st.pushed != before);
	return err;
}

int far_mnt_finish(struct far_mnt *m, uint64_t until, char *holders, size_t holders_len)
{
	int err = mnt_last_push(m);

	if (holders_len)
		holders[0] = 0;
	if (!err && m->o.before_close)
		err = m->o.before_close(m->o.opaque);
	if (m->server && (!err || (m->region && m->kept.p))) {
		far_server_stop(m->server); /* what a client has written until now is pushed with the rest */
		int last = mnt_last_push(m);
		err = err ? err : last;
		mnt_let_go(m);
		return err;
	}
	/* Where the local store lasts the file may go all the same: the rest is pushed by the next mount. */
	if ((err && !(m->region && m->kept.p)) || !m->fuse)
		return err;
	int after = mnt_unmount(m, until, holders, holders_len);
	if (!err)
		err = after ? after : mnt_last_push(m);
	mnt_let_go(m);
	return err;
}

void far_mnt_close(struct far_mnt *m)
{
	if (!m)
		return;
	if (m->follower)
		far_follower_stop(m->follower);
	if (m->leaser)
		far_leaser_stop(m->leaser);
	if (m->leaser && far_leaser_state(m->leaser) == FAR_LEASE_HELD)
		mnt_let_go(m);
	/* Whoever is blocked in a backend must get out before the frontend's threads can end. */
	if (m->region)
		far_region_stop(m->region);
	else if (m->fuse || m->server)
		far_stop(m->remote);
	far_server_stop(m->server);
	if (m->pointer)
		far_pointer_stop(m->pointer);
	if (m->region)
		far_region_join(m->region); /* they may be telling the frontend something */
	far_follower_close(m->follower);
	far_fuse_close(m->fuse);
	far_mnt_socket_close(m);
	far_leaser_close(m->leaser);
	far_pointer_close(m->pointer);
	if (m->region)
		far_region_close(m->region);
	else if (!m->pointer)
		far_close(m->remote);
	if (!m->region)
		far_persist_close(m->kept.p);
	if (!m->local_taken)
		far_close(m->o.local_backend);
	free(m->path);
	free(m->source);
	free(m);
}
