/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The region is an ordinary one: its local store is a file in memory, filled by calls. The program has a view of that file
 * which is closed where the region is absent:
 *
 *     show    while a chunk is held: it is local, and cannot go away
 *     hide    before the region's eviction drops its bytes, and after a refresh has made it absent
 *
 * So what is open holds the region's bytes. What is closed may be local too; the next touch opens it.
 */
#define _GNU_SOURCE
#include "frontend/pointer_segv.h"

#include "base/clock.h"
#include "frontend/segv.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PSEGV_PAGE ((uint64_t)4096)
#define PSEGV_TOGETHER (2 * FAR_MIB) /* opened by one touch, if it is there */

struct far_segv_pointer {
	/* fixed after open */
	struct far_region *region;
	struct far_segv *segv;
	struct far_backend *file;  /* the store without what hides; owned by `store` */
	struct far_backend *store; /* owned by the region */
	uint64_t bytes, chunk, wait; /* wait: ns that a touch may wait; FAR_NEVER */
	bool ahead; /* neighbours are opened too */
	int empty; /* a page of zeros, for a region of no bytes */
	/* atomic */
	_Atomic bool stopped;
};

/* -------------------------------------------------------------------------------------------------------- the store */

static int psegv_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	return far_read(((struct far_segv_pointer *)self)->file, off, buf, len, flags);
}

static int psegv_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return far_write(((struct far_segv_pointer *)self)->file, off, buf, len, flags & ~FAR_FILL);
}

static int psegv_flush(void *self)
{
	return far_flush(((struct far_segv_pointer *)self)->file);
}

static int psegv_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return far_zero(((struct far_segv_pointer *)self)->file, off, len, flags);
}

static int psegv_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct far_segv_pointer *p = self;
	int r = p->segv ? far_segv_hide(p->segv, off, len) : 0;

	return r ? r : far_discard(p->file, off, len, flags);
}

static void psegv_close(void *self)
{
	far_close(((struct far_segv_pointer *)self)->file);
}

static int psegv_store(struct far_segv_pointer *p, struct far_error *err)
{
	static const struct far_ops ops = {
		FAR_OPS_INIT, .read = psegv_read, .write = psegv_write, .flush = psegv_flush, .discard = psegv_discard,
		.zero = psegv_zero, .close = psegv_close,
	};
	struct far_facts facts = FAR_FACTS_INIT;
	char uri[40];
	int r;

	snprintf(uri, sizeof uri, "mem:%" PRIu64, p->bytes);
	r = far_open(uri, NULL, &p->file, err);
	if (r)
		return r;
	facts.bytes = p->bytes;
	facts.caps = FAR_CAP_WRITE;
	r = far_backend_new(&ops, p, &facts, &p->store);
	if (r) {
		far_close(p->file);
		return far_error_set(err, -r, "no memory for a map");
	}
	return 0;
}

/* ------------------------------------------------------------------------------------------------------------- fill */

/* Open the chunk of `off` if it is local: 0, -EAGAIN, or the error. */
static int psegv_show(struct far_segv_pointer *p, uint64_t off)
{
	uint64_t from = off / p->chunk * p->chunk;
	int r;

	if (!far_region_hold(p->region, from))
		return -EAGAIN;
	r = far_segv_show(p->segv, from, far_min(p->chunk, p->bytes - from));
	far_region_release(p->region, from);
	return r;
}

/* What lies behind it and has come by itself is opened as well: a touch costs more than mprotect(2). */
static void psegv_ahead(struct far_segv_pointer *p, uint64_t off)
{
	uint64_t next = (off / p->chunk + 1) * p->chunk;
	uint64_t end = far_min(p->bytes, off / PSEGV_TOGETHER * PSEGV_TOGETHER + PSEGV_TOGETHER);

	while (next < end && (far_segv_shown(p->segv, next) || psegv_show(p, next) == 0))
		next += p->chunk;
}

static bool psegv_may_block(void *opaque)
{
	return true;
}

static int psegv_fill_cb(void *opaque, uint64_t off)
{
	struct far_segv_pointer *p = opaque;
	uint64_t old = far_deadline_limit(p->wait == FAR_NEVER ? FAR_NEVER : far_now() + p->wait);
	int r;

	if (!p->bytes) { /* the page that it has all the same */
		far_deadline_restore(old);
		return far_segv_show(p->segv, 0, PSEGV_PAGE);
	}
	off = far_min(off, p->bytes - 1); /* the rest of the last page comes with it */
	while ((r = psegv_show(p, off)) == -EAGAIN) {
		r = far_region_fault(p->region, off, psegv_may_block, NULL);
		if (r >= 0)
			continue;
		if (p->wait != FAR_NEVER || atomic_load(&p->stopped))
			break;
		far_sleep_until(far_now() + 100 * FAR_MSEC, false);
	}
	far_deadline_restore(old);
	if (r == 0 && p->ahead)
		psegv_ahead(p, off);
	else if (r && r != -ESHUTDOWN)
		far_log(FAR_LOG_ERROR, "bytes from %" PRIu64 " cannot be had (%s): who uses them gets SIGBUS",
			off / p->chunk * p->chunk, far_strerror(r));
	return r;
}

/* ------------------------------------------------------------------------------------------------------ open, close */

static int psegv_region(struct far_segv_pointer *p, const struct far_pointer_conf *conf, struct far_error *err)
{
	struct far_mount_opts o = *conf->opts;
	struct far_region_conf rc = {
		.remote = conf->below,
		.remote_borrowed = conf->borrowed,
		.local = p->store,
		.local_is_zero = true,
		.ahead_only = !conf->managed || conf->borrowed,
		.opts = &o,
	};

	o.read_only = true;
	return far_region_open(&rc, &p->region, err);
}

static int psegv_view(struct far_segv_pointer *p, const struct far_pointer_conf *conf, struct far_error *err)
{
	int fd, r;

	if (p->bytes) {
		r = far_share(p->file, &fd);
	} else {
		p->empty = fd = memfd_create("farpage", MFD_CLOEXEC);
		r = fd < 0 || ftruncate(fd, (off_t)PSEGV_PAGE) ? -errno : 0;
	}
	if (r)
		return far_error_set(err, -r, "cannot map the local copy: %s", far_strerror(r));
	return far_segv_open(fd, p->bytes ? p->bytes : PSEGV_PAGE, p->chunk, conf->opts->address, psegv_fill_cb, p, &p->segv, err);
}

int far_segv_pointer_open(const struct far_pointer_conf *conf, struct far_segv_pointer **out, struct far_error *err)
{
	const struct far_mount_opts *o = conf->opts;
	struct far_segv_pointer *p = calloc(1, sizeof *p);
	int r;

	if (!p)
		return far_error_set(err, ENOMEM, "no memory for a map");
	p->bytes = far_size(conf->below);
	p->empty = -1;
	/* A recorded order, and the choice of what to evict, shall see what was touched and not what lay beside it. */
	p->ahead = !o->record_order && !o->local_max;
	p->wait = o->on_fail == FAR_ON_FAIL_WAIT ? FAR_NEVER : (o->deadline_ms ? o->deadline_ms : 30000) * FAR_MSEC;
	r = psegv_store(p, err);
	if (r) {
		free(p);
		return r;
	}
	/* The view first: what fails after the region took what is below could not give it back. */
	p->chunk = o->chunk ? o->chunk : 64 * FAR_KIB;
	if (p->chunk < PSEGV_PAGE || (p->chunk & (p->chunk - 1)))
		r = far_error_set(err, EINVAL, "a chunk of %" PRIu64 " bytes cannot be used: give a power of two from 4K to 32M",
				  p->chunk);
	if (!r)
		r = psegv_view(p, conf, err);
	if (!r)
		r = psegv_region(p, conf, err);
	if (r) {
		far_segv_close(p->segv);
		far_close(p->store);
		far_fd_close(&p->empty);
		free(p);
		return r;
	}
	*out = p;
	return 0;
}

void far_segv_pointer_stop(struct far_segv_pointer *p)
{
	atomic_store(&p->stopped, true);
	far_region_stop(p->region);
	far_region_join(p->region);
	far_segv_stop(p->segv);
}

void far_segv_pointer_close(struct far_segv_pointer *p)
{
	struct far_segv *view;

	if (!p)
		return;
	view = p->segv;
	far_segv_close(view);
	p->segv = NULL;
	far_region_close(p->region);
	far_fd_close(&p->empty);
	free(p);
}

/* ------------------------------------------------------------------------------------------------------- operations */

char *far_segv_pointer_addr(const struct far_segv_pointer *p)
{
	return far_segv_addr(p->segv);
}

struct far_region *far_segv_pointer_region(struct far_segv_pointer *p)
{
	return p->region;
}

int far_segv_pointer_populate(struct far_segv_pointer *p, uint64_t off, uint64_t len)
{
	uint64_t end = far_min(off + len, p->bytes);
	int r = end > off ? far_region_wait(p->region, off, end - off) : 0;

	for (uint64_t at = off / p->chunk * p->chunk; r == 0 && at < end; at += p->chunk)
		while (!far_segv_shown(p->segv, at) && (r = psegv_show(p, at)) == -EAGAIN) {
			/* Given back already. Like a touch it has some time to be used. */
			r = far_region_fault(p->region, at, psegv_may_block, NULL);
			if (r < 0)
				break;
		}
	return far_min(r, 0);
}

int far_segv_pointer_refresh(struct far_segv_pointer *p, uint64_t off, uint64_t len)
{
	uint64_t from = off / p->chunk * p->chunk;
	int r = far_region_refresh(p->region, off, len);

	/* What has come again since is closed as well: the next touch opens it. */
	return r || !len ? r : far_segv_hide(p->segv, from, off + len - from);
}

void far_segv_pointer_status(struct far_segv_pointer *p, struct far_status *st)
{
	uint64_t off[64], since[64], now = far_now();
	unsigned n = far_segv_blocked(p->segv, off, since, FAR_ARRAY_LEN(off));

	st->faults = far_segv_faults(p->segv);
	st->blocked = n;
	st->n_blocked = 0;
	n = n < FAR_ARRAY_LEN(off) ? n : FAR_ARRAY_LEN(off);
	for (; st->n_blocked < FAR_ARRAY_LEN(st->blocked_at) && n; st->n_blocked++) { /* the one that waits longest first */
		unsigned oldest = 0;
		for (unsigned k = 1; k < n; k++)
			if (since[k] < since[oldest])
				oldest = k;
		st->blocked_at[st->n_blocked] = off[oldest];
		st->blocked_ms[st->n_blocked] = (now - far_min(now, since[oldest])) / FAR_MSEC;
		off[oldest] = off[--n];
		since[oldest] = since[n];
	}
}
