/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Model test of the managed region: threads do seeded random operations, each thread on ranges of its own interleaved
 * with the others' inside the same chunks; a plain array is the truth. Pull, push, flush and eviction run meanwhile.
 * Every read is compared; after every flush the remote's own bytes are compared with what this thread had written; at
 * the end the remote is compared whole.
 *
 *   region [OPERATIONS [SEED]]     a seed replays one run; without it a set of configurations is run
 */
#include "base/clock.h"
#include "base/thread.h"
#include "layer/layer.h"
#include "region/region.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define THREADS 4
#define SLOT 1536 /* bytes that belong to one thread, then comes the next: three sectors, so slots share sectors not pages */

struct model {
	struct far_region *r;
	struct far_backend *face, *remote;
	unsigned char *truth;
	uint64_t bytes;
	unsigned ops;
	bool faulty; /* the remote fails now and then: calls may fail, what succeeded must hold */
	bool ragged;
};

struct worker {
	struct model *m;
	unsigned id;
	uint64_t seed, errors;
	struct far_thread t;
};

static uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

/* A random range inside one of this thread's slots. */
static bool pick(struct worker *w, uint64_t *off, uint64_t *len)
{
	uint64_t slots = w->m->bytes / (SLOT * THREADS);

	if (!slots)
		return false;
	uint64_t base = (rnd(&w->seed) % slots * THREADS + w->id) * SLOT;
	uint64_t from = rnd(&w->seed) % SLOT, to = from + 1 + rnd(&w->seed) % (SLOT - from);
	if (!w->m->ragged) {
		from &= ~511u;
		to = far_min((to + 511) & ~511u, SLOT);
	}
	*off = base + from;
	*len = to - from;
	return true;
}

static void check(struct worker *w, const unsigned char *got, uint64_t off, uint64_t len, const char *what)
{
	for (uint64_t k = 0; k < len; k++)
		if (got[k] != w->m->truth[off + k]) {
			fprintf(stderr, "%s: thread %u, byte %llu of [%llu, %llu): got %02x, want %02x\n", what, w->id,
				(unsigned long long)(off + k), (unsigned long long)off, (unsigned long long)(off + len),
				got[k], w->m->truth[off + k]);
			abort();
		}
}

static int put(struct worker *w, uint64_t off, uint64_t len, bool zero)
{
	unsigned char buf[SLOT];
	int err, tries = 0;

	for (uint64_t k = 0; k < len; k++)
		buf[k] = zero ? 0 : (unsigned char)rnd(&w->seed);
	/* What a failed write leaves behind is unknown, so it is done again until it is done. */
	do
		err = zero ? far_zero(w->m->face, off, len, 0) : far_write(w->m->face, off, buf, (size_t)len, 0);
	while (err && w->m->faulty && ++tries < 1000);
	assert(!err);
	memcpy(w->m->truth + off, buf, (size_t)len);
	return 0;
}

static void *work(void *arg)
{
	struct worker *w = arg;
	unsigned char buf[SLOT];
	uint64_t off, len;

	for (unsigned k = 0; k < w->m->ops && pick(w, &off, &len); k++) {
		unsigned op = (unsigned)(rnd(&w->seed) % 100);
		int err = 0;
		if (op < 40) {
			put(w, off, len, op < 4);
		} else if (op < 90) {
			err = far_read(w->m->face, off, buf, (size_t)len, op < 50 ? FAR_NOWAIT : 0);
			if (!err)
				check(w, buf, off, len, "read");
			assert(!err || (op < 50 && err == -EAGAIN) || w->m->faulty);
		} else if (op < 92) {
			err = far_flush(w->m->face);
			assert(!err || w->m->faulty);
			/* This thread's bytes have not changed since: they must be on the remote. */
			if (!err && !far_read(w->m->remote, off, buf, (size_t)len, 0))
				check(w, buf, off, len, "remote after flush");
		} else if (op < 98) {
			far_region_evict(w->m->r, off & ~(uint64_t)0xffff, far_min(0x20000, w->m->bytes - (off & ~(uint64_t)0xffff)));
		} else {
			far_region_prefetch(w->m->r, off, 1 << 18);
		}
		w->errors += err && err != -EAGAIN;
	}
	return NULL;
}

static void run(const char *name, uint64_t seed, unsigned ops, uint64_t bytes, struct far_mount_opts o, const char *layer,
		bool ragged)
{
	struct model m = { .bytes = bytes, .ops = ops, .faulty = layer && strncmp(layer, "fault", 5) == 0, .ragged = ragged };
	struct worker w[THREADS];
	struct far_backend *remote, *inner, *local;
	struct far_error err = { 0 };
	char uri[64];
	uint64_t s = seed * 2654435761u + 1, errors = 0;

	snprintf(uri, sizeof uri, "mem:%llu", (unsigned long long)bytes);
	assert(!far_open(uri, NULL, &inner, &err));
	assert(!far_open(uri, NULL, &local, &err));
	m.truth = malloc((size_t)bytes + 1);
	for (uint64_t k = 0; k < bytes; k++)
		m.truth[k] = k % 8192 < 4096 ? (unsigned char)rnd(&s) : 0;
	assert(!far_write(inner, 0, m.truth, (size_t)bytes, 0));
	/* The region owns a second handle to the same bytes, behind the layer; `inner` stays for looking. */
	int fd;
	assert(!far_share(inner, &fd));
	snprintf(uri, sizeof uri, "file:/proc/self/fd/%d", fd);
	if (far_open(uri, NULL, &remote, &err)) {
		fprintf(stderr, "%s\n", err.text);
		abort();
	}
	if (layer && far_layer_open(layer, remote, &remote, &err)) {
		fprintf(stderr, "%s\n", err.text);
		abort();
	}
	m.remote = inner;
	struct far_region_conf conf = { .remote = remote, .local = local, .local_is_zero = true, .opts = &o };
	if (far_region_open(&conf, &m.r, &err)) {
		fprintf(stderr, "%s\n", err.text);
		abort();
	}
	m.face = far_region_backend(m.r);
	for (unsigned k = 0; k < THREADS; k++) {
		w[k] = (struct worker){ .m = &m, .id = k, .seed = seed * 7919 + k + 1 };
		assert(!far_thread_start(&w[k].t, "model", work, &w[k]));
	}
	for (unsigned k = 0; k < THREADS; k++) {
		far_thread_join(&w[k].t);
		errors += w[k].errors;
	}
	int e, tries = 0;
	while ((e = far_flush(m.face)) && m.faulty && ++tries < 1000)
		;
	assert(!e);
	unsigned char *all = malloc((size_t)bytes + 1);
	assert(!far_read(inner, 0, all, (size_t)bytes, 0));
	w[0].id = 99;
	check(&w[0], all, 0, bytes, "remote at the end");
	struct far_status st = FAR_STATUS_INIT;
	far_region_status(m.r, &st);
	assert(st.dirty == 0);
	far_region_close(m.r);
	far_close(inner);
	free(m.truth);
	free(all);
	printf("ok - %s (seed %llu, %u operations in each of %d threads, %llu calls failed on purpose)\n", name,
	       (unsigned long long)seed, ops, THREADS, (unsigned long long)errors);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	unsigned ops = argc > 1 ? (unsigned)atoi(argv[1]) : 4000;
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : far_now() % 1000000;
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT, t;

	o.chunk = 4096;
	o.push_interval_ms = 5;
	printf("1..8\n");
	run("4 KiB chunks, pull and push", seed, ops, 1 << 20, o, NULL, false);
	run("any byte", seed, ops, 1 << 20, o, NULL, true);
	t = o;
	t.chunk = 65536;
	run("64 KiB chunks, size no multiple of anything", seed, ops, (1 << 21) + 777, t, NULL, true);
	t.pull_workers = 0;
	run("no background pull", seed, ops, (1 << 21) + 777, t, NULL, true);
	t.push_workers = 0;
	run("no background push", seed, ops, (1 << 21) + 777, t, NULL, true);
	t = o;
	t.dirty_max = 64 << 10;
	t.local_max = 256 << 10;
	t.max_partial = 3;
	run("tight budgets", seed, ops, 1 << 20, t, NULL, true);
	run("a slow remote", seed, ops / 4, 1 << 20, o, "delay:rtt=200us", true);
	run("a remote that fails", seed, ops / 4, 1 << 20, o, "fault:rate=0.05", true);
	return 0;
}
