/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The frontend of `--as nbd-socket`: an NBD server of one export on a unix socket in the target's directory. What it
 * serves is a thin backend over the region, or over the remote of a direct mount, that gives each call the mount's
 * deadline, and for which a flush is the mount's own.
 */
#define _GNU_SOURCE
#include "base/clock.h"
#include "mount/mount_int.h"
#include "wire/server.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

#define SOCKET_LOOK ((uint64_t)1 << 30) /* bytes whose chunks are looked at in one go */

static struct far_backend *socket_below(struct far_mnt *m)
{
	return m->region ? far_region_backend(m->region) : m->remote;
}

/* The deadline begins when the call begins to wait. */
static uint64_t socket_begin(const struct far_mnt *m, unsigned flags)
{
	return far_deadline_limit(m->deadline == FAR_NEVER || flags & FAR_NOWAIT ? FAR_NEVER : far_now() + m->deadline);
}

static int socket_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct far_mnt *m = self;
	uint64_t old = socket_begin(m, flags);
	int r = far_read(socket_below(m), off, buf, len, flags);

	far_deadline_restore(old);
	return r;
}

static int socket_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct far_mnt *m = self;
	uint64_t old = socket_begin(m, flags);
	int r = far_write(socket_below(m), off, buf, len, flags);

	far_deadline_restore(old);
	return r;
}

static int socket_flush(void *self)
{
	struct far_mnt *m = self;
	uint64_t old = socket_begin(m, 0);
	int r = far_mnt_flush(m);

	far_deadline_restore(old);
	return r;
}

static int socket_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct far_mnt *m = self;
	uint64_t old = socket_begin(m, flags);
	int r = far_discard(socket_below(m), off, len, flags);

	far_deadline_restore(old);
	return r;
}

static int socket_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct far_mnt *m = self;
	uint64_t old = socket_begin(m, flags);
	int r = far_zero(socket_below(m), off, len, flags);

	far_deadline_restore(old);
	return r;
}

static int socket_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct far_mnt *m = self;
	uint64_t old = socket_begin(m, 0);
	int r = far_extents(socket_below(m), off, len, out, max, n);

	far_deadline_restore(old);
	return r;
}

static void socket_close_op(void *self)
{
}

static const struct far_ops socket_ops = {
	FAR_OPS_INIT,
	.read = socket_read,
	.write = socket_write,
	.flush = socket_flush,
	.discard = socket_discard,
	.zero = socket_zero,
	.extents = socket_extents,
	.close = socket_close_op,
};

static unsigned socket_state(struct far_region *r, uint64_t off)
{
	switch (far_region_look(r, off)) {
	case FAR_LOOK_LOCAL:
		return FAR_EXPORT_LOCAL;
	case FAR_LOOK_DIRTY:
		return FAR_EXPORT_LOCAL | FAR_EXPORT_DIRTY;
	default:
		return 0;
	}
}

static unsigned socket_look_cb(void *hooks, uint64_t off, uint64_t len, uint64_t *run)
{
	struct far_mnt *m = hooks;

	if (!m->region) { /* direct: nothing is kept here */
		*run = len;
		return 0;
	}
	uint64_t chunk = far_region_chunk(m->region), end = off + far_min(len, SOCKET_LOOK), at = off - off % chunk + chunk;
	unsigned state = socket_state(m->region, off);
	while (at < end && socket_state(m->region, at) == state)
		at += chunk;
	*run = far_min(at, end) - off;
	return state;
}

static void socket_prefetch_cb(void *hooks, uint64_t off, uint64_t len)
{
	struct far_mnt *m = hooks;

	if (m->region)
		far_region_prefetch(m->region, off, len);
}

static int socket_path(struct far_mnt *m, const char *target, struct far_error *err)
{
	FAR_CLEANUP(far_free_cleanup) char *real = realpath(target, NULL);

	if (!real)
		return far_error_set(err, errno, "cannot make a socket in %s: %s", target, far_strerror(errno));
	if (asprintf(&m->path, "%s/nbd.sock", real) < 0) {
		m->path = NULL;
		return far_error_set(err, ENOMEM, "no memory for the path");
	}
	return 0;
}

int far_mnt_socket_open(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err)
{
	struct far_server_opts so = FAR_SERVER_OPTS_INIT;
	struct far_facts facts = { .size = sizeof facts, .bytes = m->bytes,
				   .caps = (m->writable ? FAR_CAP_WRITE | FAR_CAP_DURABLE : 0) | FAR_CAP_REMOTE };
	int e = socket_path(m, conf->target, err);

	if (e)
		return e;
	so.max_threads = m->o.max_blocked ? m->o.max_blocked : 256;
	e = far_backend_new(&socket_ops, m, &facts, &m->shown);
	if (e)
		return far_error_set(err, -e, "cannot serve %s: %s", m->path, far_strerror(e));
	e = far_server_new(&so, &m->server, err);
	if (!e)
		e = far_server_export(m->server, conf->name, m->shown, err);
	if (e)
		return e;
	far_server_hooks(m->server, socket_look_cb, socket_prefetch_cb, m);
	return far_server_listen_nbd(m->server, m->path, err);
}

void far_mnt_socket_close(struct far_mnt *m)
{
	far_server_free(m->server);
	far_close(m->shown);
	m->server = NULL;
	m->shown = NULL;
}
