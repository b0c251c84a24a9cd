/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A managed region over a remote that counts, fails, holds calls, remembers their order and forgets what was not flushed
 * on request; the local store is plain memory or another such backend. */
#ifndef TEST_REGION_FIXTURE_H
#define TEST_REGION_FIXTURE_H

#include "base/clock.h"
#include "base/thread.h"
#include "region/chunkmap.h"
#include "region/order.h"
#include "region/region.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define CHUNK 4096
#define LONG_TIME (20 * FAR_SEC) /* no test takes it; where one does, something hangs */

struct remote {
	unsigned char *data;
	uint64_t bytes;
	_Atomic int fail_reads, fail_writes, fail_flush; /* errno; 0: works */
	_Atomic uint64_t fail_from, fail_to;             /* fail_reads concerns this range; 0, 0: everything */
	_Atomic unsigned zeros;
	unsigned char *disk;      /* what a restart leaves: NULL: everything */
	bool tells;               /* of its instance */
	bool instant;             /* FAR_NOWAIT is no obstacle */
	uint64_t instance;
	_Atomic unsigned reads, writes, flushes, lists;
	_Atomic bool hold_reads, hold_writes;
	_Atomic uint64_t hold_from; /* hold_reads concerns reads from here on */
	struct far_mutex lock;
	struct far_cond changed;
	bool stopped;
	_Atomic unsigned held;
	uint64_t order[4096];
	unsigned n_order;
	bool durable; /* everything written was flushed */
};

struct fixture {
	unsigned how;
	struct remote s, local;
	struct far_region *r;
	struct far_backend *face;
};

static int remote_hold(struct remote *s, _Atomic bool *hold)
{
	int err = 0;

	far_mutex_lock(&s->lock);
	s->held++;
	far_cond_broadcast(&s->changed);
	while (*hold && !s->stopped && !err)
		if (!far_cond_wait_until(&s->changed, &s->lock, far_deadline()))
			err = -ETIMEDOUT;
	s->held--;
	err = s->stopped ? -ESHUTDOWN : err;
	far_mutex_unlock(&s->lock);
	return err;
}

static int remote_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct remote *s = self;

	if ((flags & FAR_NOWAIT) && !s->instant)
		return -EAGAIN;
	s->reads++;
	int err = s->hold_reads && off >= s->hold_from ? remote_hold(s, &s->hold_reads) : 0;
	bool hit = !s->fail_to || (off < s->fail_to && off + len > s->fail_from);
	if (err || (s->fail_reads && hit))
		return err ? err : -s->fail_reads;
	far_mutex_lock(&s->lock);
	if (s->n_order < 4096)
		s->order[s->n_order++] = off;
	memcpy(buf, s->data + off, len);
	far_mutex_unlock(&s->lock);
	return 0;
}

static int remote_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct remote *s = self;

	s->writes++;
	int err = s->hold_writes ? remote_hold(s, &s->hold_writes) : 0;
	if (err || s->fail_writes)
		return err ? err : -s->fail_writes;
	far_mutex_lock(&s->lock);
	memcpy(s->data + off, buf, len);
	s->durable = false;
	far_mutex_unlock(&s->lock);
	return 0;
}

static void remote_write_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	struct remote *s = self;

	s->lists++;
	for (size_t i = 0; i < n; i++)
		io[i].result = remote_write(s, io[i].off, io[i].buf, io[i].len, flags);
}

static int remote_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct remote *s = self;

	s->zeros++;
	int err = s->hold_writes ? remote_hold(s, &s->hold_writes) : 0;
	if (err || s->fail_writes)
		return err ? err : -s->fail_writes;
	far_mutex_lock(&s->lock);
	memset(s->data + off, 0, (size_t)len);
	s->durable = false;
	far_mutex_unlock(&s->lock);
	return 0;
}

static int remote_flush(void *self)
{
	struct remote *s = self;

	s->flushes++;
	if (s->fail_flush)
		return -s->fail_flush;
	far_mutex_lock(&s->lock);
	s->durable = true;
	if (s->disk)
		memcpy(s->disk, s->data, (size_t)s->bytes);
	far_mutex_unlock(&s->lock);
	return 0;
}

static int remote_origin(void *self, struct far_origin *out, unsigned flags)
{
	struct remote *s = self;

	if (!s->tells)
		return -EOPNOTSUPP;
	far_mutex_lock(&s->lock);
	out->instance = s->instance;
	far_mutex_unlock(&s->lock);
	return 0;
}

static void remote_counters(void *self, struct far_counters *c)
{
	c->reconnects += 3;
	c->checksum_errors += 2;
}

/* It is killed and started again. */
static inline void remote_restart(struct remote *s)
{
	far_mutex_lock(&s->lock);
	memcpy(s->data, s->disk, (size_t)s->bytes);
	s->instance++;
	s->durable = true;
	far_mutex_unlock(&s->lock);
}

static void remote_stop(void *self)
{
	struct remote *s = self;
	far_mutex_lock(&s->lock);
	s->stopped = true;
	far_cond_broadcast(&s->changed);
	far_mutex_unlock(&s->lock);
}

static void remote_release(struct remote *s)
{
	far_mutex_lock(&s->lock);
	s->hold_reads = s->hold_writes = false;
	far_cond_broadcast(&s->changed);
	far_mutex_unlock(&s->lock);
}

static void remote_close(void *self)
{
	(void)self;
}

static unsigned char pattern(uint64_t k)
{
	return (unsigned char)(k * 131 + (k >> 12) * 17 + 1);
}

/* A region of `chunks` chunks. Pull and push are off unless the options say otherwise. */
static struct far_mount_opts quiet(void)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	o.chunk = CHUNK;
	o.pull_workers = 0;
	o.push_workers = 0;
	o.deadline_ms = 10000;
	return o;
}

static struct far_backend *remote_open(struct remote *s, uint64_t bytes)
{
	const struct far_ops ops = { FAR_OPS_INIT, .read = remote_read, .write = remote_write, .write_many = remote_write_many, .zero = remote_zero,
				     .flush = remote_flush, .origin = remote_origin, .counters = remote_counters, .stop = remote_stop,
				     .close = remote_close };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_backend *b;

	memset(s, 0, sizeof *s);
	s->bytes = bytes;
	s->data = calloc(1, (size_t)bytes + 1);
	far_mutex_init(&s->lock);
	far_cond_init(&s->changed);
	facts.bytes = bytes;
	facts.caps = FAR_CAP_WRITE | FAR_CAP_DURABLE | FAR_CAP_REMOTE;
	assert_int_equal(far_backend_new(&ops, s, &facts, &b), 0);
	return b;
}

static void remote_free(struct remote *s)
{
	far_cond_fini(&s->changed);
	far_mutex_fini(&s->lock);
	free(s->data);
	free(s->disk);
}

/* Which part of the fixture is out of the ordinary. */
enum { FORGETS = 1, OWN_LOCAL = 2, HALF_FAILS = 4 };

static void setup_how(struct fixture *f, uint64_t bytes, const struct far_mount_opts *o, unsigned how)
{
	struct far_region_conf conf = { .opts = o, .local_is_zero = true };
	struct far_error err = { 0 };
	char uri[40];

	memset(f, 0, sizeof *f);
	conf.remote = remote_open(&f->s, bytes);
	for (uint64_t k = 0; k < bytes; k++)
		f->s.data[k] = pattern(k);
	if (how & FORGETS) {
		f->s.disk = malloc((size_t)bytes + 1);
		memcpy(f->s.disk, f->s.data, (size_t)bytes);
		f->s.tells = true;
		f->s.instance = 1;
	}
	if (how & HALF_FAILS) { /* reads of the second half; pulling begins with the region */
		f->s.fail_from = bytes / 2;
		f->s.fail_to = bytes;
		f->s.fail_reads = ECONNRESET;
	}
	snprintf(uri, sizeof uri, "mem:%llu", (unsigned long long)bytes);
	if (how & OWN_LOCAL)
		conf.local = remote_open(&f->local, bytes);
	else
		assert_int_equal(far_open(uri, NULL, &conf.local, &err), 0);
	f->local.instant = true;
	f->how = how;
	int e = far_region_open(&conf, &f->r, &err);
	if (e)
		fail_msg("%s", err.text);
	f->face = far_region_backend(f->r);
}

static void setup_bytes(struct fixture *f, uint64_t bytes, const struct far_mount_opts *o)
{
	setup_how(f, bytes, o, 0);
}

static void setup(struct fixture *f, uint64_t chunks, const struct far_mount_opts *o)
{
	setup_bytes(f, chunks * CHUNK, o);
}

static void teardown(struct fixture *f)
{
	remote_release(&f->s);
	far_region_close(f->r);
	remote_free(&f->s);
	if (f->how & OWN_LOCAL)
		remote_free(&f->local);
}

static struct far_status status(struct fixture *f)
{
	struct far_status st = FAR_STATUS_INIT;
	far_region_status(f->r, &st);
	return st;
}

/* Wait for a condition, never for a time. */
#define EVENTUALLY(c)                                                                                                  \
	do {                                                                                                           \
		uint64_t until_ = far_now() + LONG_TIME;                                                               \
		while (!(c) && far_now() < until_)                                                                     \
			far_sleep_until(far_now() + FAR_MSEC, false);                                                  \
		assert_true(c);                                                                                        \
	} while (0)

#endif
