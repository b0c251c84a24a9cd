/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Model test of a managed region in bad weather: the remote fails calls, some of them after it has carried them out, and
 * is restarted again and again, which makes it forget what it had not flushed; the local store fails reads and writes.
 * Four threads write, read, flush, evict, pin, refresh; a plain array is the truth. A read returns the last bytes whose
 * write was acknowledged, or an error. After a flush that returned 0, the disk of the remote has what this thread had
 * written. In half of the rounds the map lives in a file: in their middle the region is closed without a flush, the remote
 * restarted, and the region opened again, with all that was written. At the end everything is flushed and compared, then
 * the region is fenced: it keeps what it has, and nothing goes to the remote any more. The chunk map's checker runs
 * whenever all threads have ended.
 *
 *   storm [SECONDS [SEED]]     rounds of about two seconds with other options each; a seed replays the first round
 */
#include "base/clock.h"
#include "base/thread.h"
#include "layer/layer.h"
#include "region/region_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define THREADS 4
#define SLOT 1536 /* bytes that belong to one thread, then comes the next: three sectors, so slots share sectors not pages */
#define ROUND (2 * FAR_SEC)
#define HANG (40 * FAR_SEC)

#define MUST(c)                                                                                                        \
	do {                                                                                                           \
		if (!(c)) {                                                                                            \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #c);                                        \
			abort();                                                                                       \
		}                                                                                                      \
	} while (0)

struct store { /* the remote: a server with a page cache and a disk */
	struct far_mutex lock;
	uint64_t bytes, seed;
	uint64_t chunk; /* takes whole ones only; 0: anything */
	unsigned char *cache, *disk;
	uint64_t instance, heard, restarts;
	unsigned rate;   /* of 1000 calls fail */
	_Atomic uint64_t changes;
};

struct storm {
	struct far_region *r;
	struct far_backend *face;
	struct store s;
	unsigned char *truth;
	uint64_t bytes;
	_Atomic bool end;
	bool ragged;
	char dir[32]; /* of the local store and the map's file; "": both in memory */
	struct far_mount_opts o;
	char fault[100]; /* layer over the local store */
};

struct worker {
	struct storm *m;
	unsigned id;
	uint64_t seed, ops, errors, flushes;
	struct far_thread t;
};

static uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

/* ------------------------------------------------------------------------------------------------------- the remote */

enum fate { WORKS, FAILS, FAILS_LATE };

/* The call reaches the server, whichever runs now. */
static enum fate store_call(struct store *s) FAR_NO_TSA
{
	far_mutex_lock(&s->lock);
	s->heard = s->instance;
	uint64_t x = rnd(&s->seed) % 1000;
	return x >= s->rate ? WORKS : x % 2 ? FAILS : FAILS_LATE;
}

static int store_end(struct store *s, enum fate f) FAR_NO_TSA
{
	far_mutex_unlock(&s->lock);
	return f == WORKS ? 0 : -ECONNRESET;
}

static int store_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct store *s = self;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	enum fate f = store_call(s);
	if (f == WORKS)
		memcpy(buf, s->cache + off, len);
	return store_end(s, f);
}

static int store_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct store *s = self;
	enum fate f = store_call(s);

	s->changes++;
	if (f != FAILS)
		memcpy(s->cache + off, buf, len);
	return store_end(s, f);
}

static int store_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct store *s = self;
	enum fate f = store_call(s);

	s->changes++;
	if (f != FAILS)
		memset(s->cache + off, 0, (size_t)len);
	return store_end(s, f);
}

static int store_flush(void *self)
{
	struct store *s = self;
	enum fate f = store_call(s);

	if (f != FAILS)
		memcpy(s->disk, s->cache, (size_t)s->bytes);
	return store_end(s, f);
}

static int store_origin(void *self, struct far_origin *out, unsigned flags)
{
	struct store *s = self;

	far_mutex_lock(&s->lock);
	out->instance = s->heard;
	far_mutex_unlock(&s->lock);
	return 0;
}

static void store_close(void *self)
{
	(void)self;
}

/* What had not been flushed is lost, or some pages of it got to the disk by themselves. */
static void store_restart(struct store *s)
{
	far_mutex_lock(&s->lock);
	for (uint64_t off = 0; off < s->bytes; off += 4096)
		if (rnd(&s->seed) % 4 == 0)
			memcpy(s->disk + off, s->cache + off, (size_t)far_min(4096, s->bytes - off));
	memcpy(s->cache, s->disk, (size_t)s->bytes);
	s->instance++;
	s->restarts++;
	far_mutex_unlock(&s->lock);
}

/* ------------------------------------------------------------------------------------------------------ the threads */

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

static void put(struct worker *w, uint64_t off, uint64_t len, bool zero)
{
	unsigned char buf[SLOT];
	int err;
	uint64_t until = far_now() + HANG;

	for (uint64_t k = 0; k < len; k++)
		buf[k] = zero ? 0 : (unsigned char)rnd(&w->seed);
	/* What a failed write leaves behind is unknown, so it is done again until it is done. */
	do {
		err = zero ? far_zero(w->m->face, off, len, 0) : far_write(w->m->face, off, buf, (size_t)len, 0);
		w->errors += err != 0;
		MUST(err != -ETIMEDOUT && far_now() < until);
	} while (err);
	memcpy(w->m->truth + off, buf, (size_t)len);
}

/* Everything this thread has ever written is on the remote's disk; nobody else writes there. */
static void check_disk(struct worker *w)
{
	far_mutex_lock(&w->m->s.lock);
	for (uint64_t off = w->id * SLOT; off + SLOT <= w->m->bytes / (SLOT * THREADS) * (SLOT * THREADS); off += SLOT * THREADS)
		check(w, w->m->s.disk + off, off, SLOT, "disk after flush");
	far_mutex_unlock(&w->m->s.lock);
}

static void *work(void *arg)
{
	struct worker *w = arg;
	struct storm *m = w->m;
	unsigned char buf[SLOT];
	uint64_t off, len;

	for (; !m->end && pick(w, &off, &len); w->ops++) {
		unsigned op = (unsigned)(rnd(&w->seed) % 100);
		uint64_t at = off & ~(uint64_t)0xffff, some = far_min(0x20000, m->bytes - at);
		int err = 0;
		uint64_t old = far_deadline_limit(far_now() + HANG);
		if (op < 40) {
			put(w, off, len, op < 4);
		} else if (op < 88) {
			err = far_read(m->face, off, buf, (size_t)len, op < 50 ? FAR_NOWAIT : 0);
			if (!err)
				check(w, buf, off, len, "read");
		} else if (op < 91) {
			err = far_flush(m->face);
			if (!err) {
				check_disk(w);
				w->flushes++;
			}
		} else if (op < 94) {
			far_region_evict(m->r, at, some);
		} else if (op < 96) {
			err = far_region_refresh(m->r, off, len);
			MUST(!err);
		} else if (op < 97) {
			err = far_region_pin(m->r, at, some / 4);
			MUST(!err || err == -ENOSPC);
		} else if (op < 98) {
			MUST(!far_region_unpin(m->r, at, some));
		} else {
			far_region_prefetch(m->r, off, 1 << 18);
		}
		MUST(err != -ETIMEDOUT);
		far_deadline_restore(old);
		w->errors += err && err != -EAGAIN;
	}
	return NULL;
}

/* -------------------------------------------------------------------------------------------------------- one round */

static void read_all(struct storm *m)
{
	struct worker w = { .m = m, .id = 77 };
	unsigned char buf[4096];

	for (uint64_t off = 0; off < m->bytes; off += sizeof buf) {
		uint64_t len = far_min(sizeof buf, m->bytes - off), until = far_now() + HANG;
		int err;
		while ((err = far_read(m->face, off, buf, (size_t)len, 0))) /* transient errors of both sides */
			if (far_now() >= until) {
				fprintf(stderr, "offset %llu: %s\n", (unsigned long long)off, strerror(-err));
				MUST(!err);
			}
		check(&w, buf, off, len, "read of everything");
	}
}

/* Another owner comes: what is here stays readable, nothing more goes there. */
static void fenced(struct storm *m, struct worker *w)
{
	uint64_t off, len, until = far_now() + HANG;
	char c = 1;

	for (unsigned k = 0; k < 50 && pick(w, &off, &len); k++)
		put(w, off, len, false);
	far_region_fence(m->r);
	MUST(far_write(m->face, 0, &c, 1, 0) == -ESTALE);
	MUST(far_zero(m->face, 0, 1, 0) == -ESTALE);
	MUST(far_flush(m->face) == -ESTALE);
	/* Those on their way may still arrive. */
	struct far_status st = FAR_STATUS_INIT;
	uint64_t changes, calm = 0;
	for (changes = m->s.changes; calm < 20; far_sleep_until(far_now() + FAR_MSEC, false)) {
		calm = m->s.changes == changes ? calm + 1 : 0;
		changes = m->s.changes;
		MUST(far_now() < until);
	}
	read_all(m);
	far_region_status(m->r, &st);
	MUST(st.lease == FAR_LEASE_FENCED);
	MUST(m->s.changes == changes);
}

static struct far_mount_opts options(uint64_t *seed, char *words, size_t cap)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;

	o.chunk = (uint64_t)4096 << rnd(seed) % 5;
	o.push_interval_ms = 1 + (uint32_t)(rnd(seed) % 20);
	o.deadline_ms = 20000;
	o.push_workers = (int)(rnd(seed) % 4) * 2;
	o.pull_workers = rnd(seed) % 3 ? -1 : 0;
	o.local_max = rnd(seed) % 4 ? (64 << 10) + rnd(seed) % (512 << 10) : 0;
	o.dirty_max = rnd(seed) % 3 ? 0 : 256 << 10;
	o.max_partial = rnd(seed) % 2 ? 0 : 5;
	snprintf(words, cap, "chunk %llu, local-max %llu, dirty-max %llu, %d pullers, %d pushers", (unsigned long long)o.chunk,
		 (unsigned long long)o.local_max, (unsigned long long)o.dirty_max, o.pull_workers, o.push_workers);
	return o;
}

static void store_open(struct storm *m, uint64_t seed, uint64_t *rng)
{
	far_mutex_init(&m->s.lock);
	m->s.bytes = m->bytes;
	m->s.seed = seed * 31 + 7;
	m->s.instance = m->s.heard = 1;
	m->s.rate = (unsigned)(rnd(rng) % 3 * 10);
	m->s.chunk = rnd(rng) % 3 ? 0 : 4096;
	m->s.cache = malloc((size_t)m->bytes);
	m->s.disk = malloc((size_t)m->bytes);
	m->truth = malloc((size_t)m->bytes);
	for (uint64_t k = 0; k < m->bytes; k++)
		m->truth[k] = k % 8192 < 4096 ? (unsigned char)rnd(rng) : 0;
	memcpy(m->s.cache, m->truth, (size_t)m->bytes);
	memcpy(m->s.disk, m->truth, (size_t)m->bytes);
}

static void must(int err, const struct far_error *e)
{
	if (err) {
		fprintf(stderr, "%s\n", e->text);
		abort();
	}
}

static void region_open(struct storm *m)
{
	const struct far_ops ops = { FAR_OPS_INIT, .read = store_read, .write = store_write, .zero = store_zero,
				     .flush = store_flush, .origin = store_origin, .close = store_close };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_region_conf conf = { .local_is_zero = !m->dir[0], .opts = &m->o };
	struct far_error err = { 0 };
	char spec[100];

	facts.bytes = m->bytes;
	facts.chunk = m->s.chunk;
	facts.caps = FAR_CAP_WRITE | FAR_CAP_DURABLE | FAR_CAP_REMOTE;
	MUST(!far_backend_new(&ops, &m->s, &facts, &conf.remote));
	snprintf(spec, sizeof spec, m->dir[0] ? "file:%s/local?size=%llu" : "mem:%s%llu", m->dir, (unsigned long long)m->bytes);
	must(far_open(spec, NULL, &conf.local, &err), &err);
	must(far_layer_open(m->fault, conf.local, &conf.local, &err), &err);
	snprintf(spec, sizeof spec, "%s/map", m->dir);
	if (m->dir[0])
		must(far_persist_open(spec, FAR_PERSIST_WRITABLE, &conf.persist, &err), &err);
	must(far_region_open(&conf, &m->r, &err), &err);
	m->face = far_region_backend(m->r);
}

static void region_close(struct storm *m)
{
	far_region_stop(m->r);
	far_region_join(m->r);
	far_chunkmap_check(m->r->map);
	far_region_close(m->r);
}

/* Run the threads for a time; then nobody but the region's own works. */
static void weather(struct storm *m, struct worker *w, uint64_t *rng, uint64_t time)
{
	m->end = false;
	for (unsigned k = 0; k < THREADS; k++)
		MUST(!far_thread_start(&w[k].t, "storm", work, &w[k]));
	for (uint64_t until = far_now() + time; far_now() < until;) {
		far_sleep_until(far_now() + (1 + rnd(rng) % 60) * FAR_MSEC, false);
		store_restart(&m->s);
	}
	m->end = true;
	for (unsigned k = 0; k < THREADS; k++)
		far_thread_join(&w[k].t);
}

static void remove_files(struct storm *m)
{
	const char *names[] = { "local", "map" };
	char path[50];

	for (unsigned k = 0; m->dir[0] && k < 2; k++) {
		snprintf(path, sizeof path, "%s/%s", m->dir, names[k]);
		unlink(path);
	}
	if (m->dir[0])
		rmdir(m->dir);
}

static void round_run(uint64_t seed)
{
	uint64_t rng = seed * 2654435761u + 1, errors = 0, ops = 0, flushes = 0;
	char words[200];
	struct storm *m = calloc(1, sizeof *m);
	struct worker w[THREADS];
	int e;

	m->o = options(&rng, words, sizeof words);
	m->bytes = ((1 << 20) + rnd(&rng) % (1 << 20)) & (rnd(&rng) % 2 ? ~(uint64_t)0xfff : ~(uint64_t)0);
	m->ragged = rnd(&rng) % 2;
	if (rnd(&rng) % 2) {
		strcpy(m->dir, "/tmp/farpage-storm-XXXXXX");
		MUST(mkdtemp(m->dir));
	}
	uint64_t kind = rnd(&rng) % 4; /* ENOSPC is an error of writes alone */
	snprintf(m->fault, sizeof m->fault, "fault:rate=%s,errno=%s,ops=%s,seed=%llu", kind ? "0.004" : "0",
		 kind == 1 ? "ENOSPC" : "EIO", kind == 1 ? "write" : "read+write+flush", (unsigned long long)seed);
	printf("# seed %llu: %s%s\n", (unsigned long long)seed, words, m->dir[0] ? ", map in a file" : "");
	fflush(stdout);
	store_open(m, seed, &rng);
	region_open(m);
	for (unsigned k = 0; k < THREADS; k++)
		w[k] = (struct worker){ .m = m, .id = k, .seed = seed * 7919 + k + 1 };
	weather(m, w, &rng, ROUND / 2);
	if (m->dir[0]) {
		region_close(m);
		store_restart(&m->s);
		region_open(m);
		if (rnd(&rng) % 2)
			read_all(m);
	}
	weather(m, w, &rng, ROUND / 2);
	uint64_t until = far_now() + HANG;
	while ((e = far_flush(m->face)))
		MUST(e != -ETIMEDOUT && far_now() < until);
	for (unsigned k = 0; k < THREADS; k++)
		check_disk(&w[k]);
	store_restart(&m->s); /* nothing of that may depend on its memory */
	read_all(m);
	fenced(m, &w[0]);
	region_close(m);
	for (unsigned k = 0; k < THREADS; k++) {
		errors += w[k].errors;
		ops += w[k].ops;
		flushes += w[k].flushes;
	}
	printf("ok - storm, seed %llu: %llu operations in %d threads, %llu good flushes, %llu restarts, %llu calls failed\n",
	       (unsigned long long)seed, (unsigned long long)ops, THREADS, (unsigned long long)flushes,
	       (unsigned long long)m->s.restarts, (unsigned long long)errors);
	fflush(stdout);
	remove_files(m);
	far_mutex_fini(&m->s.lock);
	free(m->s.cache);
	free(m->s.disk);
	free(m->truth);
	free(m);
}

int main(int argc, char **argv)
{
	uint64_t seconds = argc > 1 ? strtoull(argv[1], NULL, 0) : 30, began = far_now();
	uint64_t seed = argc > 2 ? strtoull(argv[2], NULL, 0) : began % 1000000;
	unsigned n = 0;

	far_log_set_level(FAR_LOG_ERROR);
	do {
		round_run(seed + n);
		n++;
	} while (far_now() - began < seconds * FAR_SEC);
	printf("1..%u\n", n);
	return 0;
}
