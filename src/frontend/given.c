/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Memory that another process has given us to serve: far_pager_open() and its family, over a pointer (pointer.h) that maps
 * nothing here. What it stands on is built of the caller's backend, which others may be using too and which outlives it:
 *
 *     window     the parts of the region that the memory shows, one after the other
 *     retry      a remote that fails is asked again until the deadline
 *     chunked    if it takes whole chunks only
 *     window     all of it, so that the caller's backend is neither stopped nor closed from above
 *     backend    the caller's
 *
 * One thread waits for the end of the process (its pidfd; without one the receivers look for it once a second), and the kernel
 * says so at a fill. Whichever is first tells the caller, once: `told`. The callback may not close the pager, for that joins the thread.
 */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/thread.h"
#include "frontend/pointer.h"
#include "layer/layer.h"

#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define GIVEN_FORKS (1u << 1) /* UFFD_FEATURE_EVENT_FORK */

struct far_pager {
	/* fixed after open */
	struct far_mount_opts o;
	char *order, *record_order;
	struct far_pointer *pointer;
	bool writable;
	void (*ended)(void *opaque);
	void *opaque;
	int process, stop; /* pidfd; eventfd */
	int pagemap;       /* -1: none */
	uint64_t addr;     /* some of the memory */
	struct far_thread life;
	_Atomic bool told; /* `ended` was called or is being called */
};

static uint64_t given_pages(uint64_t bytes)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	return far_div_up(bytes, page) * page;
}

/* ------------------------------------------------------------------------------------------------ the end */

/* From the thread below, or from one that fills. */
static void given_ended_cb(void *opaque)
{
	struct far_pager *p = opaque;

	if (!atomic_exchange(&p->told, true) && p->ended)
		p->ended(p->opaque);
}

static void *given_life_cb(void *arg)
{
	struct far_pager *p = arg;
	struct pollfd fd[2] = { { .fd = p->process, .events = POLLIN }, { .fd = p->stop, .events = POLLIN } };

	while (poll(fd, 2, -1) < 0 && errno == EINTR)
		;
	if (fd[0].revents && !fd[1].revents)
		given_ended_cb(p);
	return NULL;
}

/* Memory goes before the process has ended altogether; its pagemap is empty then. */
static bool given_is_gone(struct far_pager *p)
{
	struct pollfd fd = { .fd = p->process, .events = POLLIN };
	uint64_t entry;

	if (atomic_load(&p->told) || (p->process >= 0 && poll(&fd, 1, 0) > 0))
		return true;
	return p->pagemap >= 0 && pread(p->pagemap, &entry, sizeof entry, (off_t)(p->addr / given_pages(1) * sizeof entry)) == 0;
}

/* ------------------------------------------------------------------------------------------------ ranges */

/* The Go format says no length: then the memory is as long as the region, in whole pages. */
static int given_check_ranges(const struct far_handover *h, uint64_t bytes, struct far_error *err)
{
	uint64_t whole = given_pages(bytes);

	if (h->n == 1 && !h->range[0].len)
		h->range[0].len = whole;
	if (!h->n || !whole)
		return far_error_set(err, EINVAL, "cannot serve memory: there is none of it, or the region is empty");
	for (size_t k = 0; k < h->n; k++) {
		const struct far_handover_range *r = &h->range[k];
		if (!r->len || r->off >= whole || r->len > whole - r->off)
			return far_error_set(err, EINVAL, "cannot serve memory for the offsets %" PRIu64 " to %" PRIu64 ": the region ends at %"
					     PRIu64, r->off, r->off + r->len, bytes);
		if (k && r->off < h->range[k - 1].off + h->range[k - 1].len)
			return far_error_set(err, EINVAL, "cannot serve memory: its ranges overlap or are not in order at offset %" PRIu64,
					     r->off);
	}
	return 0;
}

/* Whether the ranges show all of the region. */
static bool given_is_all(const struct far_handover *h, uint64_t bytes)
{
	uint64_t at = 0;

	for (size_t k = 0; k < h->n && h->range[k].off == at; k++)
		at += h->range[k].len;
	return at == given_pages(bytes);
}

/* Put the parts that are shown one after the other, in a window over *b, and the ranges' offsets with them. */
static int given_join(struct far_handover *h, struct far_backend **b)
{
	struct far_extent *part = calloc(h->n, sizeof *part);
	struct far_backend *outer;
	uint64_t at = 0;

	if (!part)
		return -ENOMEM;
	for (size_t k = 0; k < h->n; k++)
		part[k] = (struct far_extent){ .off = h->range[k].off,
					       .len = far_min(h->range[k].len, far_size(*b) - h->range[k].off) };
	int e = far_window_new(*b, true, part, h->n, &outer);
	free(part);
	if (e)
		return e;
	*b = outer;
	for (size_t k = 0; k < h->n; k++) {
		h->range[k].off = at;
		at += h->range[k].len;
	}
	return 0;
}

/* ------------------------------------------------------------------------------------------------ what it stands on */

static int given_wrap(struct far_backend **b, const char *spec, struct far_error *err)
{
	struct far_backend *outer;
	int e = far_layer_open(spec, *b, &outer, err);

	if (!e)
		*b = outer;
	return e;
}

static int given_build(struct far_pager *p, struct far_handover *h, struct far_backend *b, struct far_backend **out,
		       struct far_error *err)
{
	struct far_extent all = { .len = far_size(b) };
	struct far_backend *below;
	char spec[80];
	int e = far_window_new(b, false, &all, 1, &below);

	if (e)
		return far_error_set(err, -e, "cannot serve memory: %s", far_strerror(e));
	if (far_facts(b)->chunk)
		e = given_wrap(&below, "chunked", err);
	if (!e && (far_facts(b)->caps & FAR_CAP_REMOTE)) {
		if (p->o.on_fail == FAR_ON_FAIL_WAIT)
			snprintf(spec, sizeof spec, "retry:deadline=8760h,eio-tries=4,budget=1000000");
		else
			snprintf(spec, sizeof spec, "retry:deadline=%ums,eio-tries=4,budget=1000000", p->o.deadline_ms);
		e = given_wrap(&below, spec, err);
	}
	if (!e && !given_is_all(h, far_size(b)) && (e = given_join(h, &below)))
		far_error_set(err, -e, "cannot serve memory: %s", far_strerror(e));
	if (e)
		far_close(below);
	else
		*out = below;
	return e;
}

/* ------------------------------------------------------------------------------------------------ open */

static int given_check(const struct far_pager *p, const struct far_handover *h, struct far_backend *b, struct far_error *err)
{
	if (h->uffd < 0)
		return far_error_set(err, EINVAL, "cannot serve memory: no userfaultfd was given");
	if (h->features & GIVEN_FORKS)
		return far_error_set(err, EOPNOTSUPP, "cannot serve memory whose children are to be served too: leave UFFD_FEATURE_EVENT_FORK out, "
				     "and use MADV_DONTFORK");
	if (h->writable && (p->o.read_only || !(far_facts(b)->caps & FAR_CAP_WRITE)))
		return far_error_set(err, EROFS, "cannot serve memory whose stores are to be pushed: the region is read-only");
	if (h->writable && (h->pagemap < 0 || h->mem < 0))
		return far_error_set(err, EINVAL, "cannot serve memory whose stores are to be pushed: its pagemap and mem were not given, "
				     "which are /proc/self/pagemap and /proc/self/mem of the process that has it");
	if (p->o.local_max)
		return far_error_set(err, EOPNOTSUPP, "cannot bound another process' memory: only that process can give pages back. Leave "
				     "local_max out");
	if (p->o.local || p->o.local_backend || p->o.map)
		return far_error_set(err, EINVAL, "cannot serve memory with a local store: the memory itself is where the bytes are");
	if (p->o.chunk && (p->o.chunk < given_pages(1) || (p->o.chunk & (p->o.chunk - 1))))
		return far_error_set(err, EINVAL, "cannot serve memory in chunks of %" PRIu64 " bytes: a power of two from 4096 on is "
				     "possible", p->o.chunk);
	return 0;
}

static int given_options(struct far_pager *p, const struct far_mount_opts *opts)
{
	p->o = (struct far_mount_opts)FAR_MOUNT_OPTS_INIT;
	if (opts)
		memcpy(&p->o, opts, far_min(opts->size, sizeof p->o));
	p->o.size = sizeof p->o;
	if (!p->o.deadline_ms)
		p->o.deadline_ms = 30000;
	p->order = p->o.order ? strdup(p->o.order) : NULL;
	p->record_order = p->o.record_order ? strdup(p->o.record_order) : NULL;
	if ((p->o.order && !p->order) || (p->o.record_order && !p->record_order))
		return -ENOMEM;
	p->o.order = p->order;
	p->o.record_order = p->record_order;
	return 0;
}

static void given_free(struct far_pager *p)
{
	far_fd_close(&p->stop);
	far_fd_close(&p->process);
	far_fd_close(&p->pagemap);
	free(p->order);
	free(p->record_order);
	free(p);
}

/* The process' end must be heard of by somebody, so this is not left out. */
static int given_watch(struct far_pager *p, int process)
{
	if (process < 0)
		return 0;
	p->process = fcntl(process, F_DUPFD_CLOEXEC, 0);
	p->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (p->process < 0 || p->stop < 0)
		return -errno;
	return far_thread_start(&p->life, "far-life", given_life_cb, p);
}

static void given_unwatch(struct far_pager *p)
{
	if (p->stop >= 0)
		eventfd_write(p->stop, 1);
	far_thread_join(&p->life);
}

/* What the pointer takes is a copy, so that h is whole if anything fails. */
static int given_copy(const struct far_handover *h, struct far_handover *out)
{
	*out = (struct far_handover)FAR_HANDOVER_INIT;
	memcpy(out, h, far_min(h->size, sizeof *out));
	out->size = sizeof *out;
	out->range = calloc(h->n ? h->n : 1, sizeof *out->range);
	if (!out->range)
		return -ENOMEM;
	memcpy(out->range, h->range, h->n * sizeof *out->range);
	out->uffd = h->uffd < 0 ? -1 : fcntl(h->uffd, F_DUPFD_CLOEXEC, 0);
	if (h->uffd < 0 || out->uffd >= 0)
		return 0;
	free(out->range);
	return -errno;
}

/* Stores are not read then, so nothing is; but "no descriptor" would mean this process' own memory. */
static int given_no_mem(struct far_handover *h)
{
	if (h->mem >= 0)
		return 0;
	h->mem = open("/dev/null", O_RDONLY | O_CLOEXEC);
	return h->mem < 0 ? -errno : 0;
}

static int given_open(struct far_pager *p, struct far_handover *h, struct far_backend *b, struct far_error *err)
{
	struct far_pointer_conf conf = { .writable = h->writable, .managed = p->o.mode != FAR_MODE_DIRECT, .opts = &p->o,
					 .given = h, .ended = given_ended_cb, .opaque = p };
	int e = given_check_ranges(h, far_size(b), err);

	if (!e)
		e = given_build(p, h, b, &conf.below, err);
	if (e)
		return e;
	p->writable = h->writable;
	p->addr = h->range[0].addr;
	p->pagemap = h->pagemap < 0 ? -1 : fcntl(h->pagemap, F_DUPFD_CLOEXEC, 0);
	e = given_watch(p, h->process);
	if (e)
		far_error_set(err, -e, "cannot start a thread: %s", far_strerror(e));
	else
		e = far_pointer_open(&conf, &p->pointer, err);
	if (e) {
		given_unwatch(p);
		far_close(conf.below);
	}
	return e;
}

int far_pager_open(struct far_handover *h, struct far_backend *b, const struct far_mount_opts *opts, void (*ended)(void *opaque),
		   void *opaque, struct far_pager **out, struct far_error *err)
{
	struct far_pager *p = calloc(1, sizeof *p);
	struct far_handover mine;

	if (!p)
		return far_error_set(err, ENOMEM, "cannot serve memory: out of memory");
	p->process = p->stop = p->pagemap = -1;
	p->ended = ended;
	p->opaque = opaque;
	int e = given_options(p, opts);
	if (!e)
		e = given_copy(h, &mine);
	if (e) {
		given_free(p);
		return far_error_set(err, -e, "cannot serve memory: %s", far_strerror(e));
	}
	e = given_check(p, &mine, b, err);
	if (!e && (e = given_no_mem(&mine)))
		far_error_set(err, -e, "cannot serve memory: %s", far_strerror(e));
	if (!e)
		e = given_open(p, &mine, b, err);
	if (e) {
		if (mine.mem != h->mem)
			far_fd_close(&mine.mem);
		far_fd_close(&mine.uffd); /* unless it went with what was half made */
		free(mine.range);
		given_free(p);
		return e;
	}
	far_fd_close(&h->uffd); /* the rest of the descriptors are the pointer's now */
	free(h->range);
	struct far_handover empty = FAR_HANDOVER_INIT;
	empty.size = h->size;
	memcpy(h, &empty, far_min(h->size, sizeof empty));
	*out = p;
	return 0;
}

/* ------------------------------------------------------------------------------------------------ use and end */

int far_pager_flush(struct far_pager *p)
{
	if (given_is_gone(p)) /* and with it what it stored last */
		return -ESRCH;
	if (!p->writable)
		return 0;
	uint64_t old = far_deadline_limit(p->o.on_fail == FAR_ON_FAIL_WAIT ? FAR_NEVER : far_now() + p->o.deadline_ms * FAR_MSEC);
	int e = far_pointer_flush(p->pointer);

	far_deadline_restore(old);
	return e;
}

void far_pager_status(struct far_pager *p, struct far_status *st)
{
	struct far_status all = FAR_STATUS_INIT;
	size_t size = st->size;

	far_pointer_status(p->pointer, &all);
	all.outside = true;
	memcpy(st, &all, far_min(size, sizeof all));
	st->size = size;
}

int far_pager_close(struct far_pager *p)
{
	if (!p)
		return 0;
	int e = p->writable ? far_pager_flush(p) : 0;
	given_unwatch(p);
	far_pointer_stop(p->pointer);
	far_pointer_close(p->pointer);
	given_free(p);
	return e;
}
