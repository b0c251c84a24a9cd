/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "rig.h"

static int remote_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct rig_remote *s = self;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	far_mutex_lock(&s->lock);
	memcpy(buf, s->data + off, len);
	far_mutex_unlock(&s->lock);
	return 0;
}

static int remote_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct rig_remote *s = self;

	far_mutex_lock(&s->lock);
	memcpy(s->data + off, buf, len);
	if (s->wrote)
		s->wrote(s->opaque, off, buf, len);
	far_mutex_unlock(&s->lock);
	return 0;
}

static int remote_flush(void *self)
{
	struct rig_remote *s = self;

	far_mutex_lock(&s->lock);
	s->version++;
	if (s->flushed)
		s->flushed(s->opaque);
	far_mutex_unlock(&s->lock);
	return 0;
}

static int remote_origin(void *self, struct far_origin *o, unsigned flags)
{
	struct rig_remote *s = self;

	far_mutex_lock(&s->lock);
	snprintf(o->identity, sizeof o->identity, "rig");
	o->instance = s->instance;
	o->version = s->version;
	o->epoch = 1;
	far_mutex_unlock(&s->lock);
	return 0;
}

static void remote_close(void *self)
{
	(void)self;
}

void rig_remote_init(struct rig_remote *s, uint64_t bytes)
{
	*s = (struct rig_remote){ .bytes = bytes, .instance = 1, .version = 1 };
	far_mutex_init(&s->lock);
	s->data = malloc((size_t)bytes + 1);
	rig_fill(s->data, 0, (size_t)bytes, 0);
}

void rig_remote_fini(struct rig_remote *s)
{
	far_mutex_fini(&s->lock);
	free(s->data);
}

struct far_backend *rig_remote_backend(struct rig_remote *s)
{
	const struct far_ops ops = { FAR_OPS_INIT, .read = remote_read, .write = remote_write, .flush = remote_flush,
				     .origin = remote_origin, .close = remote_close };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_backend *b;

	facts.bytes = s->bytes;
	facts.caps = FAR_CAP_WRITE | FAR_CAP_DURABLE | FAR_CAP_REMOTE;
	snprintf(facts.identity, sizeof facts.identity, "rig");
	assert_int_equal(far_backend_new(&ops, s, &facts, &b), 0);
	return b;
}

/* ----------------------------------------------------------------------------------------------------------- model */

#define SET(m, k) (&(m)->set[4 * (k)])

static void set_only(struct rig_model *m, uint64_t k, unsigned char v)
{
	memset(SET(m, k), 0, 4 * sizeof(uint64_t));
	SET(m, k)[v / 64] = (uint64_t)1 << (v % 64);
	m->want[k] = v;
}

void rig_model_init(struct rig_model *m, const unsigned char *data, uint64_t bytes)
{
	m->bytes = bytes;
	m->want = malloc((size_t)bytes + 1);
	m->set = malloc((size_t)(bytes + 1) * 4 * sizeof *m->set);
	for (uint64_t k = 0; k < bytes; k++)
		set_only(m, k, data[k]);
}

void rig_model_fini(struct rig_model *m)
{
	free(m->want);
	free(m->set);
}

void rig_model_wrote(struct rig_model *m, uint64_t off, const unsigned char *buf, uint64_t len, int err)
{
	for (uint64_t k = 0; k < len; k++) {
		unsigned char v = buf ? buf[k] : 0;
		if (err)
			SET(m, off + k)[v / 64] |= (uint64_t)1 << (v % 64);
		else
			set_only(m, off + k, v);
	}
}

void rig_model_copy(struct rig_model *to, const struct rig_model *from)
{
	memcpy(to->want, from->want, (size_t)from->bytes);
	memcpy(to->set, from->set, (size_t)from->bytes * 4 * sizeof *from->set);
}

void rig_model_read(struct rig_model *m, uint64_t off, const unsigned char *buf, uint64_t len, const char *what)
{
	for (uint64_t k = 0; k < len; k++) {
		unsigned char v = buf[k];
		if (!(SET(m, off + k)[v / 64] >> (v % 64) & 1))
			fail_msg("%s: byte %llu (chunk %llu) is %02x, it should be %02x", what, (unsigned long long)(off + k),
				 (unsigned long long)((off + k) / RIG_CHUNK), v, m->want[off + k]);
		set_only(m, off + k, v);
	}
}

/* ----------------------------------------------------------------------------------------------------------- other */

struct far_mount_opts rig_quiet(void)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	o.chunk = RIG_CHUNK;
	o.pull_workers = 0;
	o.push_workers = 0;
	o.deadline_ms = 10000;
	return o;
}

void rig_fill(unsigned char *buf, uint64_t off, size_t len, unsigned v)
{
	for (size_t k = 0; k < len; k++) {
		uint64_t x = (off + k) * 0x9e3779b97f4a7c15u + v * 0xd6e8feb86659fd93u;
		buf[k] = (unsigned char)(x >> 56);
	}
}

void rig_no_leak(const char *what, unsigned files, unsigned threads)
{
	uint64_t until = far_now() + 10 * FAR_SEC;

	while ((inject_threads() > threads || inject_open_files() > files) && far_now() < until)
		far_sleep_until(far_now() + FAR_MSEC, false);
	if (inject_threads() > threads)
		fail_msg("%s: left %u threads behind", what, inject_threads() - threads);
	if (inject_open_files() > files)
		fail_msg("%s: left %u descriptors open", what, inject_open_files() - files);
}

static void each_allocation(const struct rig_case *c, bool all)
{
	unsigned files = inject_open_files(), threads = inject_threads(), n = 0, most = c->most ? c->most : 2000;
	bool hit;

	do {
		struct far_error err = { 0 };
		n++;
		inject_watch(c->what, n, 60);
		inject_begin(n, c->scope, all);
		int r = c->call(c->ctx, &err);
		hit = inject_end();
		if (r && !hit)
			fail_msg("%s: fails without a failed allocation: %s (%s)", c->what, far_strerror(r), err.text);
		if (r && r != -ENOMEM && r != -EAGAIN)
			fail_msg("%s: allocation %u fails and it says %s (%s)", c->what, n, far_strerror(r), err.text);
		if (r && !c->no_text && (!err.text[0] || err.code != -r))
			fail_msg("%s: allocation %u fails, %s, and there is no sentence", c->what, n, far_strerror(r));
		c->after(c->ctx, r);
		if (r)
			rig_no_leak(c->what, files, threads);
	} while (hit && n < most);
	inject_watch("", 0, 0);
	if (hit)
		fail_msg("%s: still fails after %u allocations", c->what, n);
	if (n < 2)
		fail_msg("%s: allocates nothing: the test does not see it", c->what);
	print_message("%s: %u allocations%s\n", c->what, n - 1, all ? ", all from the n-th on" : "");
}

void rig_each_allocation(const struct rig_case *c)
{
	each_allocation(c, false);
	if (!c->once)
		each_allocation(c, true);
}
