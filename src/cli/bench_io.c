/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The acts of `farpage bench` on one file. They use system calls as any program would, and know nothing of farpage:
 * what is measured here is what a program sees.
 */
#define _GNU_SOURCE
#include "cli/bench_io.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/thread.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define BENCH_PAGE ((size_t)4096)
#define BENCH_STEP 0x9e3779b97f4a7c15 /* odd: every word of a file differs from all others */
#define BENCH_TIMES_MAX (4u << 20)    /* calls whose times are kept */
#define BENCH_LOCAL_IDLE (300 * FAR_MSEC)

/* --------------------------------------------------------------------------------------------- the pattern */

static uint64_t bench_word(uint64_t off)
{
	return (off / 8 + 1) * BENCH_STEP;
}

void bench_pattern(void *buf, uint64_t off, size_t len)
{
	FAR_ASSERT(off % 8 == 0 && len % 8 == 0);
	uint64_t w = bench_word(off), *p = buf;

	for (size_t i = 0; i < len / 8; i++, w += BENCH_STEP)
		p[i] = w;
}

uint64_t bench_check(const void *buf, uint64_t off, size_t len, bool pages)
{
	size_t by = pages ? BENCH_PAGE / 8 : 1;
	const uint64_t *p = buf;
	uint64_t wrong = 0;

	for (size_t i = 0; i < len / 8; i += by)
		wrong += p[i] != bench_word(off + i * 8);
	return wrong * 8;
}

/* ---------------------------------------------------------------------------------------------------- times */

struct bench_times {
	uint32_t *v; /* units of 10 ns, so that 40 s fit */
	size_t n, max;
	uint64_t longest;
};

static int bench_times_init(struct bench_times *t, size_t max)
{
	*t = (struct bench_times){ .max = max < BENCH_TIMES_MAX ? max : BENCH_TIMES_MAX };
	t->v = malloc(t->max * sizeof *t->v);
	if (!t->v)
		return -ENOMEM;
	memset(t->v, 0, t->max * sizeof *t->v); /* no page fault while the clock runs */
	return 0;
}

static void bench_times_add(struct bench_times *t, uint64_t ns)
{
	t->longest = far_max(t->longest, ns);
	if (t->n < t->max)
		t->v[t->n++] = (uint32_t)far_min(ns / 10, UINT32_MAX);
}

static int bench_times_order(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return x < y ? -1 : x > y;
}

static uint64_t bench_times_at(const struct bench_times *t, unsigned per_thousand)
{
	return t->n ? (uint64_t)t->v[(t->n - 1) * per_thousand / 1000] * 10 : 0;
}

/* Sorts, reads p50 and p99 out, frees. */
static void bench_times_fini(struct bench_times *t, struct bench_io_result *res)
{
	qsort(t->v, t->n, sizeof *t->v, bench_times_order);
	res->p50 = bench_times_at(t, 500);
	res->p99 = bench_times_at(t, 990);
	res->longest = t->longest;
	free(t->v);
}

/* ------------------------------------------------------------------------------------------- small helpers */

static int bench_fail(const struct bench_io *io, struct far_error *err, const char *what, int r)
{
	return far_error_set(err, -r, "cannot %s %s: %s", what, io->path, far_strerror(r));
}

static int bench_open(const struct bench_io *io, int flags, int *fd, struct far_error *err)
{
	*fd = open(io->path, flags | O_CLOEXEC | (io->way == BENCH_DIRECT ? O_DIRECT : 0));
	return *fd < 0 ? bench_fail(io, err, io->way == BENCH_DIRECT ? "open with O_DIRECT" : "open", -errno) : 0;
}

static void *bench_buffer(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

/* splitmix64 */
static uint64_t bench_next(uint64_t *seed)
{
	uint64_t z = *seed += BENCH_STEP;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

/* `n` distinct slots out of [first, slots) in random order; malloc'd, NULL without memory or when there are too few. */
static uint64_t *bench_slots(uint64_t first, uint64_t slots, size_t n, uint64_t seed)
{
	uint64_t count = slots - first;
	uint64_t *v = slots > first && count >= n ? malloc(count * sizeof *v) : NULL;

	if (!v)
		return NULL;
	for (uint64_t i = 0; i < count; i++)
		v[i] = first + i;
	for (uint64_t i = 0; i < n; i++) {
		uint64_t j = i + bench_next(&seed) % (count - i), x = v[i];
		v[i] = v[j];
		v[j] = x;
	}
	return v;
}

int bench_drop(const char *path, struct far_error *err)
{
	struct bench_io io = { .path = path };
	int fd, r = bench_open(&io, O_RDONLY, &fd, err);

	if (r)
		return r;
	fdatasync(fd); /* a read-only file refuses; it has nothing dirty either */
	r = -posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	far_fd_close(&fd);
	return r ? bench_fail(&io, err, "drop the page cache of", r) : 0;
}

/* ---------------------------------------------------------------------------------------------- sequential */

int bench_fill(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	void *buf = bench_buffer(io->block);
	int fd = -1, r = buf ? bench_open(io, O_WRONLY, &fd, err) : bench_fail(io, err, "find memory to write", -ENOMEM);
	struct bench_times times;

	if (r)
		goto unmap;
	r = bench_times_init(&times, io->size / io->block + 1);
	if (r)
		goto close;
	uint64_t start = far_now();
	for (uint64_t off = 0; off < io->size && !r; off += io->block) {
		size_t len = (size_t)far_min(io->block, io->size - off);
		bench_pattern(buf, off, len);
		uint64_t begin = far_now();
		r = far_io_pwrite(fd, off, buf, len, 0);
		bench_times_add(&times, far_now() - begin);
		res->bytes += len;
		res->ops++;
		if (io->ns && far_now() - start > io->ns)
			break;
	}
	if (!r && fsync(fd) < 0)
		r = -errno;
	res->ns = far_now() - start;
	bench_times_fini(&times, res);
close:
	far_fd_close(&fd);
	if (r)
		bench_fail(io, err, "write", r);
unmap:
	if (buf)
		munmap(buf, io->block);
	return r;
}

static int bench_read_mapped(const struct bench_io *io, int fd, bool pages, struct bench_io_result *res)
{
	const char *p = mmap(NULL, io->size, PROT_READ, MAP_SHARED, fd, 0);

	if (p == MAP_FAILED)
		return -errno;
	res->wrong += bench_check(p, 0, io->size, pages);
	res->bytes += io->size;
	munmap((void *)p, io->size);
	return 0;
}

static int bench_read_all(const struct bench_io *io, bool pages, struct bench_io_result *res, struct far_error *err)
{
	void *buf = bench_buffer(io->block);
	uint64_t start = far_now();
	int fd = -1, r = buf ? bench_open(io, O_RDONLY, &fd, err) : bench_fail(io, err, "find memory to read", -ENOMEM);

	if (r)
		goto unmap;
	if (io->way == BENCH_MAPPED)
		r = bench_read_mapped(io, fd, pages, res);
	for (uint64_t off = 0; off < io->size && !r && io->way != BENCH_MAPPED; off += io->block) {
		size_t len = (size_t)far_min(io->block, io->size - off);
		r = far_io_pread(fd, off, buf, len, 0);
		if (!r)
			res->wrong += bench_check(buf, off, len, pages);
		res->bytes += len;
		res->ops++;
		if (io->ns && far_now() - start > io->ns)
			break;
	}
	res->ns = far_now() - start;
	far_fd_close(&fd);
	if (r)
		bench_fail(io, err, "read", r);
unmap:
	if (buf)
		munmap(buf, io->block);
	return r;
}

int bench_read(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	return bench_read_all(io, true, res, err);
}

int bench_verify(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	return bench_read_all(io, false, res, err);
}

/* ------------------------------------------------------------------------------------------- by themselves */

struct bench_worker {
	const struct bench_io *io;
	struct far_thread thread;
	struct bench_times times;
	uint64_t seed, ops, wrong, ns;
	int result;
};

static void *bench_random_cb(void *arg)
{
	struct bench_worker *w = arg;
	const struct bench_io *io = w->io;
	void *buf = bench_buffer(io->block);
	int fd = -1;

	w->result = !buf ? -ENOMEM : io->remote ? 0 : bench_open(io, O_RDONLY, &fd, NULL);
	uint64_t start = far_now(), now = start;
	while (!w->result && now - start < io->ns) {
		uint64_t off = bench_next(&w->seed) % (io->size / io->block) * io->block, begin = now;
		w->result = io->remote ? far_read(io->remote, off, buf, io->block, 0) : far_io_pread(fd, off, buf, io->block, 0);
		now = far_now();
		bench_times_add(&w->times, now - begin);
		w->wrong += bench_check(buf, off, io->block, true);
		w->ops++;
	}
	w->ns = now - start;
	far_fd_close(&fd);
	if (buf)
		munmap(buf, io->block);
	return NULL;
}

/* One list of times out of all workers'. */
static int bench_workers_sum(struct bench_worker *w, unsigned n, struct bench_io_result *res)
{
	struct bench_times all;
	size_t total = 0;
	int r = 0;

	for (unsigned i = 0; i < n; i++)
		total += w[i].times.n;
	r = bench_times_init(&all, total + 1);
	for (unsigned i = 0; i < n; i++) {
		for (size_t k = 0; k < w[i].times.n && !r; k++)
			bench_times_add(&all, (uint64_t)w[i].times.v[k] * 10);
		res->ops += w[i].ops;
		res->bytes += w[i].ops * w[i].io->block;
		res->wrong += w[i].wrong;
		res->ns = far_max(res->ns, w[i].ns);
		free(w[i].times.v);
	}
	if (!r)
		bench_times_fini(&all, res);
	for (unsigned i = 0; i < n && !r; i++)
		r = w[i].result;
	return r;
}

int bench_random(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	struct bench_worker *w = calloc(io->threads, sizeof *w);
	int r = w ? 0 : -ENOMEM;

	for (unsigned i = 0; i < io->threads && !r; i++) {
		w[i].io = io;
		w[i].seed = io->seed + i;
		r = bench_times_init(&w[i].times, (size_t)(io->ns / FAR_USEC / 2 / io->threads + 1000));
	}
	for (unsigned i = 0; i < io->threads && !r; i++)
		r = far_thread_start(&w[i].thread, "bench", bench_random_cb, &w[i]);
	for (unsigned i = 0; w && i < io->threads; i++)
		far_thread_join(&w[i].thread);
	int sum = w ? bench_workers_sum(w, io->threads, res) : -ENOMEM;
	free(w);
	r = r ? r : sum;
	return r ? bench_fail(io, err, "read", r) : 0;
}

int bench_first(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	uint64_t *slots = bench_slots(0, io->size / io->chunk, io->ops, io->seed), start = far_now();
	void *buf = bench_buffer(BENCH_PAGE);
	struct bench_times times = { 0 };
	int fd = -1, r = slots && buf ? bench_times_init(&times, io->ops) : -EINVAL;

	if (!r)
		r = bench_open(io, O_RDONLY, &fd, NULL);
	for (unsigned i = 0; i < io->ops && !r && (!io->ns || far_now() - start < io->ns); i++) {
		uint64_t off = slots[i] * io->chunk;
		if (io->less && io->less(io->opaque, off))
			continue; /* is local, or on its way: no first access */
		uint64_t begin = far_now();
		r = far_io_pread(fd, off, buf, BENCH_PAGE, 0);
		uint64_t took = far_now() - begin, less = io->less ? io->less(io->opaque, off) : 0;
		res->wrong += r ? 0 : bench_check(buf, off, BENCH_PAGE, false);
		bench_times_add(&times, took - far_min(less, took));
		res->ops++;
		res->bytes += BENCH_PAGE;
	}
	res->ns = far_now() - start;
	far_fd_close(&fd);
	if (times.v)
		bench_times_fini(&times, res);
	if (buf)
		munmap(buf, BENCH_PAGE);
	free(slots);
	return r ? bench_fail(io, err, "read a page of each chunk of", r) : 0;
}

int bench_scatter(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	uint64_t *slots = bench_slots(0, io->size / io->chunk, io->ops, io->seed);
	void *buf = bench_buffer(io->block);
	struct bench_times times = { 0 };
	int fd = -1, r = slots && buf ? bench_times_init(&times, io->ops) : -EINVAL;

	if (!r)
		r = bench_open(io, O_WRONLY, &fd, NULL);
	uint64_t start = far_now();
	for (unsigned i = 0; i < io->ops && !r; i++) {
		uint64_t off = slots[i] * io->chunk;
		bench_pattern(buf, off, io->block);
		uint64_t begin = far_now();
		r = far_io_pwrite(fd, off, buf, io->block, 0);
		bench_times_add(&times, far_now() - begin);
		res->ops++;
		res->bytes += io->block;
	}
	res->ns = far_now() - start;
	far_fd_close(&fd);
	if (times.v)
		bench_times_fini(&times, res);
	if (buf)
		munmap(buf, io->block);
	free(slots);
	return r ? bench_fail(io, err, "write to distinct chunks of", r) : 0;
}

/* Writes of one block after the other, at random or each with an fsync, for ns or ops. */
static int bench_writes(const struct bench_io *io, bool random, bool sync, struct bench_io_result *res,
			struct far_error *err)
{
	void *buf = bench_buffer(io->block);
	struct bench_times times = { 0 };
	uint64_t seed = io->seed, blocks = io->size / io->block;
	int fd = -1, r = buf ? bench_times_init(&times, io->ns ? (size_t)(io->ns / FAR_USEC / 2 + 1000) : io->ops) : -ENOMEM;

	if (!r)
		r = bench_open(io, O_WRONLY, &fd, NULL);
	uint64_t start = far_now(), now = start;
	while (!r && (io->ns ? now - start < io->ns : res->ops < io->ops)) {
		uint64_t off = (random ? bench_next(&seed) % blocks : res->ops % blocks) * io->block;
		bench_pattern(buf, off, io->block);
		uint64_t begin = far_now();
		r = far_io_pwrite(fd, off, buf, io->block, 0);
		if (!r && sync)
			r = fsync(fd) < 0 ? -errno : 0;
		now = far_now();
		bench_times_add(&times, now - begin);
		res->ops++;
		res->bytes += io->block;
	}
	res->ns = now - start;
	far_fd_close(&fd);
	if (times.v)
		bench_times_fini(&times, res);
	if (buf)
		munmap(buf, io->block);
	return r ? bench_fail(io, err, sync ? "write and fsync" : "write", r) : 0;
}

int bench_write(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	return bench_writes(io, false, false, res, err);
}

int bench_rewrite(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	return bench_writes(io, true, false, res, err);
}

int bench_sync(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	return bench_writes(io, false, true, res, err);
}

/* ------------------------------------------------------------------------------------- many absent chunks */

/* A gate that all threads pass at once, and the reader of what is local, who goes on until `done`. */
struct bench_absent {
	const struct bench_io *io;
	const uint64_t *slots;
	struct far_mutex lock;
	struct far_cond changed;
	unsigned waiting FAR_GUARDED_BY(lock);
	bool open FAR_GUARDED_BY(lock);
	uint64_t start; /* when it was opened; written before */
	_Atomic uint64_t asked; /* relaxed: when the gate opened, for the local reader; 0: not yet */
	_Atomic bool done;
	_Atomic unsigned next;
};

static void bench_gate_pass(struct bench_absent *a)
{
	far_mutex_lock(&a->lock);
	a->waiting++;
	far_cond_broadcast(&a->changed);
	while (!a->open)
		far_cond_wait(&a->changed, &a->lock);
	far_mutex_unlock(&a->lock);
}

struct bench_absent_one {
	struct bench_absent *a;
	struct far_thread thread;
	uint64_t ns, wrong;
	int result;
};

static void *bench_absent_cb(void *arg)
{
	struct bench_absent_one *o = arg;
	const struct bench_io *io = o->a->io;
	uint64_t off = o->a->slots[atomic_fetch_add(&o->a->next, 1)] * io->chunk;
	char *buf = bench_buffer(BENCH_PAGE), *map = MAP_FAILED;
	int fd = -1;

	o->result = buf ? bench_open(io, O_RDONLY, &fd, NULL) : -ENOMEM;
	if (!o->result && io->way == BENCH_MAPPED) {
		map = mmap(NULL, BENCH_PAGE, PROT_READ, MAP_SHARED, fd, (off_t)off);
		o->result = map == MAP_FAILED ? -errno : 0;
	}
	bench_gate_pass(o->a);
	if (!o->result && map != MAP_FAILED)
		memcpy(buf, map, BENCH_PAGE);
	else if (!o->result)
		o->result = far_io_pread(fd, off, buf, BENCH_PAGE, 0);
	o->ns = far_now() - o->a->start;
	if (!o->result)
		o->wrong = bench_check(buf, off, BENCH_PAGE, false);
	if (map != MAP_FAILED)
		munmap(map, BENCH_PAGE);
	far_fd_close(&fd);
	if (buf)
		munmap(buf, BENCH_PAGE);
	return NULL;
}

struct bench_local {
	struct bench_absent *a;
	struct far_thread thread;
	struct bench_times idle, busy;
	uint64_t wrong;
	int result;
};

/* Reads a page of the first chunk with O_DIRECT again and again, so that each read reaches the mount. */
static void *bench_local_cb(void *arg)
{
	struct bench_local *l = arg;
	struct bench_io io = *l->a->io;
	void *buf = bench_buffer(BENCH_PAGE);
	int fd = -1;

	io.way = BENCH_DIRECT;
	l->result = buf ? bench_open(&io, O_RDONLY, &fd, NULL) : -ENOMEM;
	while (!l->result && !atomic_load(&l->a->done)) {
		uint64_t begin = far_now();
		l->result = far_io_pread(fd, 0, buf, BENCH_PAGE, 0);
		uint64_t end = far_now(), asked = atomic_load_explicit(&l->a->asked, memory_order_relaxed);
		l->wrong += bench_check(buf, 0, BENCH_PAGE, false);
		if (!asked)
			bench_times_add(&l->idle, end - begin);
		else if (begin > asked)
			bench_times_add(&l->busy, end - begin);
	}
	far_fd_close(&fd);
	if (buf)
		munmap(buf, BENCH_PAGE);
	return NULL;
}

static void bench_absent_go(struct bench_absent *a, unsigned started)
{
	far_mutex_lock(&a->lock);
	while (a->waiting < started)
		far_cond_wait(&a->changed, &a->lock);
	far_mutex_unlock(&a->lock);
	far_sleep_until(far_now() + BENCH_LOCAL_IDLE, false); /* the local reader's idle time */
	far_mutex_lock(&a->lock);
	a->start = far_now();
	atomic_store_explicit(&a->asked, a->start, memory_order_relaxed);
	a->open = true;
	far_cond_broadcast(&a->changed);
	far_mutex_unlock(&a->lock);
}

static int bench_absent_run(struct bench_absent *a, struct bench_absent_one *o, struct bench_io_result *res)
{
	struct bench_local local = { .a = a };
	struct bench_io_result idle = { 0 }, busy = { 0 };
	unsigned started = 0;
	int r = bench_times_init(&local.idle, 200000);

	if (!r)
		r = bench_times_init(&local.busy, 200000);
	for (unsigned i = 0; i < a->io->threads && !r; i++) {
		o[i].a = a;
		r = far_thread_start(&o[i].thread, "bench", bench_absent_cb, &o[i]);
		started += !r;
	}
	if (!r)
		r = far_thread_start(&local.thread, "bench-local", bench_local_cb, &local);
	bench_absent_go(a, started);
	for (unsigned i = 0; i < started; i++) {
		far_thread_join(&o[i].thread);
		res->longest = far_max(res->longest, o[i].ns);
		res->wrong += o[i].wrong;
		r = r ? r : o[i].result;
	}
	atomic_store(&a->done, true);
	far_thread_join(&local.thread);
	bench_times_fini(&local.idle, &idle);
	bench_times_fini(&local.busy, &busy);
	res->idle_p99 = idle.p99;
	res->busy_p99 = busy.p99;
	res->wrong += local.wrong;
	res->ops = started;
	res->bytes = started * BENCH_PAGE;
	res->ns = res->longest;
	return r ? r : local.result;
}

int bench_absent(const struct bench_io *io, struct bench_io_result *res, struct far_error *err)
{
	uint64_t *slots = bench_slots(1, io->size / io->chunk, io->threads, io->seed);
	struct bench_absent_one *o = calloc(io->threads, sizeof *o);
	struct bench_absent a = { .io = io, .slots = slots };
	int r = slots && o ? 0 : -EINVAL;

	far_mutex_init(&a.lock);
	far_cond_init(&a.changed);
	if (!r)
		r = bench_absent_run(&a, o, res);
	far_cond_fini(&a.changed);
	far_mutex_fini(&a.lock);
	free(o);
	free(slots);
	return r ? bench_fail(io, err, "read absent chunks of", r) : 0;
}
