/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Model test of the pointer: threads load and store through the memory itself, each thread on ranges of its own that lie
 * among the others' in the same chunks and pages; a plain array is the truth. Pull, push, flush, eviction, discards and
 * madvise(2) run meanwhile. Every load is compared; after every flush the remote's own bytes are compared with what this
 * thread had stored before; at the end all of the remote is compared, and the memory itself.
 *
 * The first page holds counters that all threads add to: a store that is lost on its way, by a push or by an eviction,
 * is a sum that is too small.
 *
 *   pointer [OPERATIONS [SEED [KIND|N]]]     a seed replays one run; KIND is one of ../pointer/face.c, N is one setting
 */
#define _GNU_SOURCE
#include "../pointer/face.h"

#include "base/clock.h"
#include "base/thread.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

#define THREADS 4
#define PAGE 4096u
#define COUNTERS 512u
#define HANG 60 /* seconds for one call */

#define MUST(c)                                                                                                        \
	do {                                                                                                           \
		if (!(c)) {                                                                                            \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #c);                                        \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

struct model {
	struct far_mount *m;
	struct far_backend *remote; /* its own bytes, past every layer */
	unsigned char *p, *truth;
	uint64_t bytes, slot;
	unsigned ops;
	bool read_only, faulty, advises, bounded, starved;
};

struct worker {
	struct model *m;
	unsigned id;
	uint64_t seed, failed, flushes;
	uint32_t added[COUNTERS];
	unsigned char buf[3 * PAGE];
	struct far_thread t;
};

struct setting {
	const char *name, *kind;
	uint64_t bytes, slot, chunk;
	uint64_t local_max, dirty_max;
	const char *layer;
	bool no_pull, no_push;
	bool starved;  /* the threads hardly get a CPU: what a system call was about to do is long in coming */
	unsigned part; /* of the operations: one in so many */
};

static uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

/* A random range inside one of this thread's slots; often all of it. */
static void pick(struct worker *w, uint64_t *off, uint64_t *len)
{
	uint64_t slot = w->m->slot, slots = (w->m->bytes - PAGE) / (slot * THREADS);
	uint64_t base = PAGE + (rnd(&w->seed) % slots * THREADS + w->id) * slot;
	uint64_t from = rnd(&w->seed) % slot, to = from + 1 + rnd(&w->seed) % (slot - from);

	if (rnd(&w->seed) % 8 == 0) {
		from = 0;
		to = slot;
	}
	*off = base + from;
	*len = to - from;
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

/* A touch that failed leaves its pages poisoned until they are healed. */
static void mend(struct worker *w, uint64_t off, uint64_t len)
{
	int tries = 0;

	MUST(w->m->faulty);
	w->failed++;
	while (far_mount_heal(w->m->m, off, len)) /* the remote fails again */
		MUST(++tries < 1000);
}

static void load(struct worker *w, uint64_t off, uint64_t len)
{
	while (face_copy(w->buf, w->m->p + off, (size_t)len))
		mend(w, off, len);
	check(w, w->buf, off, len, "load");
}

static void store(struct worker *w, uint64_t off, uint64_t len, unsigned how)
{
	struct model *m = w->m;
	int r = 0, tries = 0;

	for (uint64_t k = 0; k < len; k++)
		w->buf[k] = how < 2 ? 0 : (unsigned char)rnd(&w->seed);
	do {
		if (r)
			mend(w, off, len);
		r = how == 0 ? far_mount_discard(m->m, off, len)
			     : how == 1 ? face_zero(m->p + off, (size_t)len) : face_copy(m->p + off, w->buf, (size_t)len);
	} while (r && m->faulty && ++tries < 1000);
	MUST(!r);
	memcpy(m->truth + off, w->buf, (size_t)len);
}

/* A program gives pages of its own back: they are zeros from then on. */
static void advise(struct worker *w, uint64_t off, uint64_t len)
{
	struct model *m = w->m;
	uint64_t first = far_div_up(off, PAGE) * PAGE, end = (off + len) / PAGE * PAGE;

	if (first >= end)
		return;
	MUST(!madvise(m->p + first, (size_t)(end - first), MADV_DONTNEED));
	memset(m->truth + first, 0, (size_t)(end - first));
	if (rnd(&w->seed) % 2)
		load(w, first, end - first);
}

static void add(struct worker *w)
{
	unsigned k = (unsigned)(rnd(&w->seed) % COUNTERS);

	__atomic_fetch_add((uint64_t *)(void *)w->m->p + k, 1, __ATOMIC_RELAXED);
	w->added[k]++;
}

static int flush(struct worker *w, uint64_t off, uint64_t len)
{
	int r = far_mount_flush(w->m->m);

	MUST(!r || w->m->faulty);
	w->failed += r != 0;
	w->flushes += !r;
	if (!r && !w->m->read_only) { /* this thread's bytes have not changed since: they are there */
		MUST(!far_read(w->m->remote, off, w->buf, (size_t)len, 0));
		check(w, w->buf, off, len, "remote after a flush");
	}
	return r;
}

static void change(struct worker *w, uint64_t off, uint64_t len)
{
	if (w->m->advises && rnd(&w->seed) % (w->m->starved ? 2 : 16) == 0)
		advise(w, off, len);
	else
		store(w, off, len, (unsigned)(rnd(&w->seed) % 24));
}

/* A CPU that is always wanted by somebody else. */
static void *burn(void *arg)
{
	while (!atomic_load_explicit((_Atomic bool *)arg, memory_order_relaxed))
		far_cpu_relax();
	return NULL;
}

static void *work(void *arg)
{
	struct worker *w = arg;
	struct model *m = w->m;
	uint64_t off, len;
	int r = 0;

	face_ready();
	if (m->starved)
		MUST(!setpriority(PRIO_PROCESS, 0, 19));
	for (unsigned k = 0; k < m->ops; k++) {
		unsigned op = (unsigned)(rnd(&w->seed) % 100);
		pick(w, &off, &len);
		uint64_t at = off & ~(uint64_t)0xffff, some = far_min(0x20000, m->bytes - at);
		if (op < 36 && !m->read_only)
			change(w, off, len);
		else if (op < 42 && !m->read_only && !m->faulty)
			add(w);
		else if (op < 84)
			load(w, off, len);
		else if (op < 86)
			flush(w, off, len);
		else if (op < 94)
			r = far_mount_evict(m->m, at, some);
		else if (op < 96)
			r = far_mount_populate(m->m, off, len);
		else if (op < 97)
			r = far_mount_pin(m->m, at, some / 4);
		else if (op < 99)
			r = far_mount_unpin(m->m, at, some);
		else
			r = far_mount_wait_range(m->m, off, len, m->bounded ? 20 : HANG * 1000);
		if (r && !m->faulty && r != -ENOSPC && r != -EBUSY && !(m->bounded && r == -ETIMEDOUT)) {
			fprintf(stderr, "thread %u, operation %u, kind %u: %s\n", w->id, k, op, strerror(-r));
			abort();
		}
		r = 0;
	}
	return NULL;
}

static void must(int r, const struct far_error *e)
{
	if (r) {
		fprintf(stderr, "%s (%s)\n", e->text, strerror(-r));
		abort();
	}
}

/* The remote: random bytes with runs of zeros; the mount owns a second handle to them, behind the layer. */
static struct far_backend *remote_open(struct model *m, const struct setting *s, uint64_t *rng)
{
	struct far_backend *again;
	struct far_error err = { 0 };
	char uri[64];
	int fd;

	snprintf(uri, sizeof uri, "mem:%llu", (unsigned long long)s->bytes);
	must(far_open(uri, NULL, &m->remote, &err), &err);
	m->truth = calloc(1, (size_t)s->bytes + 1);
	for (uint64_t k = PAGE; k < s->bytes; k++)
		m->truth[k] = k % 8192 < 4096 ? 0 : (unsigned char)rnd(rng);
	MUST(!far_write(m->remote, 0, m->truth, (size_t)s->bytes, 0));
	MUST(!far_share(m->remote, &fd));
	snprintf(uri, sizeof uri, "file:/proc/self/fd/%d", fd);
	must(far_open(uri, NULL, &again, &err), &err);
	if (s->layer)
		must(far_layer_open(s->layer, again, &again, &err), &err);
	return again;
}

/* Whatever lies beyond the region reads as zeros, may be stored, and goes nowhere. */
static void beyond(struct model *m)
{
	uint64_t end = far_div_up(m->bytes, PAGE) * PAGE;

	for (uint64_t k = m->bytes; k < end; k++)
		MUST(m->p[k] == 0);
	if (!m->read_only && end > m->bytes)
		memset(m->p + m->bytes, 0x77, (size_t)(end - m->bytes));
}

/* An eviction that could not tell whether a chunk was stored leaves that to the next look: it is dirty for a while after a
 * flush that had nothing to do with it. */
static void flush_at_the_end(struct model *m)
{
	struct far_status st = FAR_STATUS_INIT;
	int r, tries = 0;

	do {
		r = far_mount_flush(m->m);
		MUST(!r || m->faulty);
		MUST(!far_mount_status(m->m, &st));
	} while ((r || st.dirty) && ++tries < (m->faulty ? 1000 : 20));
	MUST(!r && st.dirty == 0);
}

static void compare_all(struct model *m, struct worker *w)
{
	unsigned char *all = malloc((size_t)m->bytes + 1);
	uint64_t *sum = (uint64_t *)(void *)m->truth;

	for (unsigned k = 0; k < COUNTERS; k++)
		for (unsigned t = 0; t < THREADS; t++)
			sum[k] += w[t].added[k];
	w[0].id = 99;
	MUST(!far_read(m->remote, 0, all, (size_t)m->bytes, 0));
	check(&w[0], all, 0, m->bytes, "remote at the end");
	while (face_copy(all, m->p, (size_t)m->bytes))
		mend(&w[0], 0, m->bytes);
	check(&w[0], all, 0, m->bytes, "memory at the end");
	free(all);
}

static struct far_mount_opts options(const struct setting *s, const struct face_kind *k, char *room, size_t cap)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;

	face_kind_apply(k, &o, s->bytes, room, cap);
	o.chunk = s->chunk;
	o.push_interval_ms = 5;
	o.local_max = s->local_max;
	o.dirty_max = s->dirty_max;
	o.deadline_ms = HANG * 1000;
	o.follow_ms = UINT32_MAX;
	if (s->no_pull)
		o.pull_workers = 0;
	if (s->no_push)
		o.push_workers = 0;
	return o;
}

static void run(unsigned number, const struct setting *s, uint64_t seed, unsigned ops)
{
	const struct face_kind *kind = face_kind_find(s->kind);
	const char *lacks = face_kind_lacks(kind);
	static struct worker w[THREADS];
	struct far_error err = { 0 };
	struct far_thread burners[2];
	_Atomic bool ended = false;
	uint64_t rng = seed * 2654435761u + 1, failed = 0, flushes = 0, began = far_now();
	char room[64];

	if (lacks) {
		printf("ok %u - %s, %s # SKIP not here: %s\n", number, s->name, s->kind, lacks);
		return;
	}
	struct model m = { .bytes = s->bytes, .slot = s->slot, .ops = ops, .read_only = kind->read_only,
			   .faulty = s->layer && strncmp(s->layer, "fault", 5) == 0,
			   .bounded = s->local_max != 0, .starved = s->starved,
			   .advises = strcmp(s->kind, "share") && !kind->read_only };
	struct far_backend *remote = remote_open(&m, s, &rng);
	struct far_mount_opts o = options(s, kind, room, sizeof room);
	int r = face_map(kind, remote, &o, &m.m, &err);
	if (r == -EOPNOTSUPP && kind->choosy) {
		printf("ok %u - %s, %s # SKIP %s\n", number, s->name, s->kind, err.text);
		far_close(remote);
		far_close(m.remote);
		free(m.truth);
		return;
	}
	must(r, &err);
	m.p = far_addr(m.m);
	for (unsigned k = 0; k < THREADS; k++) {
		w[k] = (struct worker){ .m = &m, .id = k, .seed = seed * 7919 + k + 1 };
		MUST(!far_thread_start(&w[k].t, "model", work, &w[k]));
	}
	for (unsigned k = 0; k < FAR_ARRAY_LEN(burners) && s->starved; k++)
		MUST(!far_thread_start(&burners[k], "burner", burn, &ended));
	for (unsigned k = 0; k < THREADS; k++) {
		far_thread_join(&w[k].t);
		failed += w[k].failed;
		flushes += w[k].flushes;
	}
	atomic_store(&ended, true);
	for (unsigned k = 0; k < FAR_ARRAY_LEN(burners) && s->starved; k++)
		far_thread_join(&burners[k]);
	if (!m.faulty)
		beyond(&m);
	flush_at_the_end(&m);
	compare_all(&m, w);
	r = far_mount_close(m.m);
	MUST(!r || m.faulty);
	far_close(m.remote);
	free(m.truth);
	printf("ok %u - %s, %s (seed %llu, %u operations in each of %d threads, %llu flushes, %llu touches and calls failed on "
	       "purpose, %.1f s)\n", number, s->name, s->kind, (unsigned long long)seed, ops, THREADS,
	       (unsigned long long)flushes, (unsigned long long)failed, (double)(far_now() - began) / FAR_SEC);
	fflush(stdout);
}

#define SIZE (1 << 20)
#define ODD ((1 << 21) + 777)
static const struct setting settings[] = {
	{ "4 KiB chunks", "copy-async", SIZE, 1536, 4096 },
	{ "whole pages of one's own", "copy-async", SIZE, 2 * PAGE, 65536 },
	{ "size no multiple of anything", "copy-async", ODD, 1111, 65536 },
	{ "4 KiB chunks", "copy-sync", SIZE, 1536, 4096 },
	{ "whole pages of one's own", "copy-sync", SIZE, 2 * PAGE, 65536 },
	{ "size no multiple of anything", "copy-sync", ODD, 1111, 65536 },
	{ "4 KiB chunks", "copy-hash", SIZE, 1536, 4096 },
	{ "size no multiple of anything", "copy-hash", ODD, 1111, 16384 },
	{ "chunks of a huge page", "continue-sync", 2 * ODD, 2 * PAGE, 2 << 20 },
	{ "64 KiB chunks", "continue-sync", ODD, 1536, 65536 },
	{ "hardly a CPU", "continue-sync", 2 * SIZE, 2 * PAGE, 16384, .starved = true, .part = 10 },
	{ "64 KiB chunks", "continue-hash", ODD, 1536, 65536 },
	{ "huge pages, written", "move-hash", 2 * ODD, 1536, 65536 },
	{ "mapped, not copied", "share", ODD, 1536, 65536 },
	{ "what is chosen here", "auto", ODD, 1536, 65536 },
	{ "pull and push", "managed", ODD, 1536, 16384 },
	{ "tight budgets", "managed", SIZE, 1536, 4096, .local_max = 256 << 10, .dirty_max = 64 << 10 },
	{ "tight budgets, whole pages", "managed", 2 * SIZE, 2 * PAGE, 16384, .local_max = 512 << 10, .dirty_max = 128 << 10 },
	{ "tight budgets, hardly a CPU", "managed", 2 * SIZE, 2 * PAGE, 16384, .local_max = 512 << 10, .dirty_max = 128 << 10,
	  .starved = true, .part = 2 },
	{ "tight budgets, hardly a CPU", "managed-sync", 2 * SIZE, 2 * PAGE, 16384, .local_max = 512 << 10, .dirty_max = 128 << 10,
	  .starved = true, .part = 2 },
	{ "tight budgets", "managed-sync", SIZE, 1536, 4096, .local_max = 256 << 10, .dirty_max = 64 << 10 },
	{ "tight budgets", "managed-hash", SIZE, 1536, 4096, .local_max = 256 << 10, .dirty_max = 64 << 10 },
	{ "no background pull", "managed", ODD, 1536, 65536, .no_pull = true },
	{ "no background push", "managed", ODD, 1536, 65536, .no_push = true },
	{ "a store of its own below", "local", ODD, 1536, 16384 },
	{ "a store of its own, a tight budget", "local", SIZE, 1536, 4096, .local_max = 256 << 10 },
	{ "a store of its own below", "local-sync", ODD, 1536, 16384 },
	{ "a slow remote", "managed", SIZE, 1536, 16384, .layer = "delay:rtt=200us" },
	{ "a remote that fails", "managed", SIZE, 1536, 4096, .layer = "fault:rate=0.05" },
	{ "only read, huge pages", "move", 2 * ODD, 1536, 65536 },
	{ "only read, by SIGSEGV", "sigsegv", ODD, 1536, 65536 },
	{ "only read, by SIGSEGV, a tight budget", "sigsegv", ODD, 1536, 65536, .local_max = 512 << 10, .part = 10 },
};

int main(int argc, char **argv)
{
	unsigned ops = argc > 1 ? (unsigned)atoi(argv[1]) : 1500;
	uint64_t seed = argc > 2 && *argv[2] ? strtoull(argv[2], NULL, 0) : far_now() % 1000000;
	const char *only = argc > 3 ? argv[3] : NULL;

	setvbuf(stdout, NULL, _IOLBF, 0);
	face_ready(); /* a map that handles SIGSEGV passes on to this what is not its own */
	printf("1..%zu\n# seed %llu, FARPAGE_WITHOUT=%s\n", FAR_ARRAY_LEN(settings), (unsigned long long)seed,
	       getenv("FARPAGE_WITHOUT") ? getenv("FARPAGE_WITHOUT") : "");
	for (unsigned k = 0; k < FAR_ARRAY_LEN(settings); k++)
		if (!only || !strcmp(only, settings[k].kind) || strtoul(only, NULL, 10) == k + 1)
			run(k + 1, &settings[k], seed, settings[k].layer ? ops / 3 : settings[k].part ? ops / settings[k].part : ops);
	return 0;
}
