/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A pointer whose world fails: the remote's reads, writes and flushes, or it says nothing at all; no memory for the pages;
 * a full disk under its local store. A touch gives the right bytes, waits, or raises SIGBUS, and never gives others; a
 * flush says 0 only when all is there; and when the world works again, so does the pointer.
 */
#define _GNU_SOURCE
#include "rig.h"

#include "../pointer/face.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define BYTES (24 * RIG_CHUNK + 1000)
#define PAGE 4096u

static char tmp[64];

/* ----------------------------------------------------------------------------------------------- a remote that fails */

/* Over rig_remote's: errors that stay until they are taken away, or silence. */
struct bad {
	struct rig_remote s;
	struct far_backend *b;
	_Atomic int read_error, write_error, flush_error;
	struct far_mutex lock;
	struct far_cond change;
	bool silent FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
	_Atomic unsigned waits;
};

/* 0, or how a call ends whose answer does not come. */
static int bad_wait(struct bad *d)
{
	int r = 0;

	far_mutex_lock(&d->lock);
	d->waits++;
	while (d->silent && !d->stopped && !r) {
		uint64_t until = far_min(far_deadline(), far_now() + FAR_SEC);
		far_cond_wait_until(&d->change, &d->lock, until);
		r = far_now() >= far_deadline() ? -ETIMEDOUT : 0;
	}
	if (d->stopped)
		r = -ESHUTDOWN;
	d->waits--;
	far_mutex_unlock(&d->lock);
	return r;
}

static int bad_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct bad *d = self;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	int r = bad_wait(d);
	return r ? r : d->read_error ? -d->read_error : far_read(d->b, off, buf, len, flags);
}

static int bad_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct bad *d = self;
	int r = bad_wait(d);

	return r ? r : d->write_error ? -d->write_error : far_write(d->b, off, buf, len, flags);
}

static int bad_flush(void *self)
{
	struct bad *d = self;
	int r = bad_wait(d);

	return r ? r : d->flush_error ? -d->flush_error : far_flush(d->b);
}

static void bad_stop(void *self)
{
	struct bad *d = self;

	far_mutex_lock(&d->lock);
	d->stopped = true;
	far_cond_broadcast(&d->change);
	far_mutex_unlock(&d->lock);
}

static void bad_silence(struct bad *d, bool on)
{
	far_mutex_lock(&d->lock);
	d->silent = on;
	far_cond_broadcast(&d->change);
	far_mutex_unlock(&d->lock);
}

static void bad_close(void *self)
{
	(void)self;
}

static struct far_backend *bad_backend(struct bad *d)
{
	const struct far_ops ops = { FAR_OPS_INIT, .read = bad_read, .write = bad_write, .flush = bad_flush,
				     .stop = bad_stop, .close = bad_close };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_backend *b;

	facts.bytes = d->s.bytes;
	facts.caps = FAR_CAP_WRITE | FAR_CAP_DURABLE | FAR_CAP_REMOTE;
	far_mutex_lock(&d->lock);
	d->stopped = d->silent = false;
	far_mutex_unlock(&d->lock);
	assert_int_equal(far_backend_new(&ops, d, &facts, &b), 0);
	return b;
}

static void bad_init(struct bad *d)
{
	memset(d, 0, sizeof *d);
	rig_remote_init(&d->s, BYTES);
	d->b = rig_remote_backend(&d->s);
	far_mutex_init(&d->lock);
	far_cond_init(&d->change);
}

static void bad_fini(struct bad *d)
{
	far_close(d->b);
	rig_remote_fini(&d->s);
	far_cond_fini(&d->change);
	far_mutex_fini(&d->lock);
}

/* --------------------------------------------------------------------------------------------------- pages that fail */

static _Atomic unsigned pages_left; /* calls that fill pages until one fails; 0: none does */
static _Atomic bool pages_all, pages_hit;

int __real_ioctl(int fd, unsigned long what, void *arg);
int __wrap_ioctl(int fd, unsigned long what, void *arg);
int __wrap_ioctl(int fd, unsigned long what, void *arg)
{
	if (_IOC_TYPE(what) == UFFDIO && (_IOC_NR(what) == _UFFDIO_COPY || _IOC_NR(what) == _UFFDIO_ZEROPAGE ||
					  _IOC_NR(what) == 0x05 /* MOVE */ || _IOC_NR(what) == 0x07 /* CONTINUE */)) {
		unsigned left = pages_left;
		while (left > 1 && !atomic_compare_exchange_weak(&pages_left, &left, left - 1))
			;
		if (left == 1 && (pages_all || atomic_compare_exchange_strong(&pages_left, &left, 0))) {
			pages_hit = true;
			errno = ENOMEM;
			return -1;
		}
	}
	return __real_ioctl(fd, what, arg);
}

/* ----------------------------------------------------------------------------------------------------------- the rig */

struct world {
	struct bad d;
	struct rig_model model;
	const struct face_kind *kind;
	struct far_mount_opts o;
	struct far_mount *m;
	unsigned char *p;
	unsigned version;
	char room[160];
};

static void world_options(struct world *w, const struct face_kind *k)
{
	w->kind = k;
	w->o = rig_quiet();
	w->o.follow_ms = UINT32_MAX;
	face_kind_apply(k, &w->o, BYTES, w->room, sizeof w->room);
}

static void world_map(struct world *w)
{
	struct far_backend *b = bad_backend(&w->d);
	struct far_error err = { 0 };
	int e = face_map(w->kind, b, &w->o, &w->m, &err);

	if (e)
		fail_msg("%s: %s (%s)", w->kind->name, err.text, far_strerror(e));
	w->p = far_addr(w->m);
}

static void world_open(struct world *w, void **state)
{
	const struct face_kind *k = *state;
	const char *lacks = face_kind_lacks(k);

	if (lacks) {
		print_message("skipped: not here: %s\n", lacks);
		skip();
	}
	memset(w, 0, sizeof *w);
	inject_watch(k->name, 0, 60);
	bad_init(&w->d);
	rig_model_init(&w->model, w->d.s.data, BYTES);
	world_options(w, k);
}

static void world_close(struct world *w)
{
	if (w->m)
		assert_int_equal(far_mount_close(w->m), 0);
	rig_model_fini(&w->model);
	bad_fini(&w->d);
	inject_watch("", 0, 0);
}

static int world_load(struct world *w, uint64_t off, size_t len)
{
	static unsigned char buf[BYTES];
	int e = face_copy(buf, w->p + off, len);

	if (!e)
		rig_model_read(&w->model, off, buf, len, "a load");
	return e;
}

static int world_store(struct world *w, uint64_t off, size_t len)
{
	static unsigned char buf[BYTES];

	rig_fill(buf, off, len, ++w->version);
	int e = face_copy(w->p + off, buf, len);
	rig_model_wrote(&w->model, off, buf, len, e);
	return e;
}

static struct far_status world_status(struct world *w)
{
	struct far_status st = FAR_STATUS_INIT;

	assert_int_equal(far_mount_status(w->m, &st), 0);
	return st;
}

/* Everything works again: all is there, also on the remote. */
static void world_is_whole(struct world *w)
{
	assert_int_equal(far_mount_heal(w->m, 0, BYTES), 0);
	assert_int_equal(world_status(w).poisoned, 0);
	assert_int_equal(world_load(w, 0, BYTES), 0);
	assert_int_equal(world_store(w, 5 * RIG_CHUNK - 10, 2 * RIG_CHUNK), 0);
	assert_int_equal(far_mount_flush(w->m), 0);
	rig_model_read(&w->model, 0, w->d.s.data, BYTES, "on the remote after a flush");
	assert_int_equal(world_status(w).dirty, 0);
}

/* ----------------------------------------------------------------------------------------------------------- remotes */

static void failed_reads_raise_sigbus_until_healed(void **state)
{
	struct world w;

	world_open(&w, state);
	w.o.deadline_ms = 300;
	world_map(&w);
	assert_int_equal(world_load(&w, 3 * RIG_CHUNK, RIG_CHUNK), 0);
	assert_int_equal(world_store(&w, 3 * RIG_CHUNK + 50, 1000), 0);
	w.d.read_error = EIO;
	uint64_t began = far_now();
	assert_int_equal(face_peek(w.p + 7 * RIG_CHUNK + 5), -EIO);
	assert_true(far_now() - began < 10 * FAR_SEC);
	assert_int_equal(face_peek(w.p + 7 * RIG_CHUNK + 5), -EIO);
	struct far_status st = world_status(&w);
	assert_true(st.poisoned >= PAGE);
	assert_true(st.errors > 0);
	assert_int_equal(world_load(&w, 3 * RIG_CHUNK, RIG_CHUNK), 0); /* what is here stays usable */
	assert_int_equal(world_store(&w, 3 * RIG_CHUNK + 70, 1000), 0);
	assert_int_equal(far_mount_flush(w.m), 0);
	w.d.read_error = 0;
	assert_int_equal(far_mount_heal(w.m, 7 * RIG_CHUNK, RIG_CHUNK), 0);
	assert_int_equal(world_load(&w, 7 * RIG_CHUNK, RIG_CHUNK), 0);
	world_is_whole(&w);
	world_close(&w);
}

struct toucher {
	struct world *w;
	uint64_t off;
	_Atomic int result; /* 1: still waiting */
	struct far_thread t;
};

static void *toucher_run(void *arg)
{
	struct toucher *t = arg;

	t->result = face_peek(t->w->p + t->off) < 0 ? -EIO : 0;
	return NULL;
}

/* Wait until status names an offset inside the page as blocked for so long. */
static void see_blocked(struct world *w, uint64_t off, uint64_t ms)
{
	uint64_t until = far_now() + 20 * FAR_SEC;

	for (;;) {
		struct far_status st = world_status(w);
		for (unsigned k = 0; k < st.n_blocked && k < 8; k++)
			if (st.blocked_at[k] / PAGE == off / PAGE && st.blocked_ms[k] >= ms)
				return;
		if (far_now() > until)
			fail_msg("status names %u blocked offsets, the first %llu for %llu ms, not %llu for %llu ms", st.n_blocked,
				 (unsigned long long)st.blocked_at[0], (unsigned long long)st.blocked_ms[0],
				 (unsigned long long)off, (unsigned long long)ms);
		far_sleep_until(far_now() + 5 * FAR_MSEC, false);
	}
}

static void silence_ends_at_the_deadline(void **state)
{
	struct world w;
	struct toucher t = { .w = &w, .off = 9 * RIG_CHUNK + 77, .result = 1 };

	world_open(&w, state);
	w.o.deadline_ms = 700;
	world_map(&w);
	bad_silence(&w.d, true);
	uint64_t began = far_now();
	assert_int_equal(far_thread_start(&t.t, "toucher", toucher_run, &t), 0);
	see_blocked(&w, t.off, 100);
	far_thread_join(&t.t);
	assert_int_equal(t.result, -EIO);
	assert_true(far_now() - began >= 600 * FAR_MSEC);
	assert_true(world_status(&w).poisoned >= PAGE);
	for (uint64_t until = far_now() + 5 * FAR_SEC; world_status(&w).n_blocked;) { /* who gave up is on its way out */
		assert_true(far_now() < until);
		far_sleep_until(far_now() + FAR_MSEC, false);
	}
	bad_silence(&w.d, false);
	world_is_whole(&w);
	world_close(&w);
}

static void silence_is_waited_out_on_request(void **state)
{
	struct world w;
	struct toucher t = { .w = &w, .off = 2 * RIG_CHUNK + 5, .result = 1 };

	world_open(&w, state);
	w.o.deadline_ms = 100;
	w.o.on_fail = FAR_ON_FAIL_WAIT;
	world_map(&w);
	bad_silence(&w.d, true);
	assert_int_equal(far_thread_start(&t.t, "toucher", toucher_run, &t), 0);
	see_blocked(&w, t.off, 600); /* six deadlines */
	assert_int_equal(t.result, 1);
	assert_int_equal(world_status(&w).poisoned, 0);
	w.d.read_error = EIO; /* an error is no answer either */
	bad_silence(&w.d, false);
	see_blocked(&w, t.off, 900);
	assert_int_equal(t.result, 1);
	w.d.read_error = 0;
	far_thread_join(&t.t);
	assert_int_equal(t.result, 0);
	world_is_whole(&w);
	world_close(&w);
}

static void a_flush_fails_until_all_is_there(void **state)
{
	struct world w;

	world_open(&w, state);
	w.o.deadline_ms = 500;
	if (w.kind->managed)
		w.o.push_workers = 2;
	world_map(&w);
	assert_int_equal(world_store(&w, RIG_CHUNK + 9, 3 * RIG_CHUNK), 0);
	w.d.write_error = ENOSPC;
	assert_int_equal(far_mount_flush(w.m), -ENOSPC);
	assert_int_equal(world_store(&w, 11 * RIG_CHUNK, 100), 0);
	assert_int_equal(far_mount_flush(w.m), -ENOSPC);
	assert_true(world_status(&w).dirty > 0);
	assert_int_equal(far_mount_evict(w.m, 0, BYTES), 0); /* dirty bytes stay */
	assert_int_equal(world_load(&w, 0, 12 * RIG_CHUNK), 0);
	w.d.write_error = 0;
	w.d.flush_error = EIO;
	assert_true(far_mount_flush(w.m) < 0);
	assert_true(far_mount_flush(w.m) < 0);
	w.d.flush_error = 0;
	assert_int_equal(far_mount_flush(w.m), 0);
	rig_model_read(&w.model, 0, w.d.s.data, BYTES, "on the remote after the flush");
	world_is_whole(&w);
	world_close(&w);
}

/* close() says what could not be flushed, ends all the same, and frees everything. */
static void closing_says_what_was_not_flushed(void **state)
{
	struct world w;

	world_open(&w, state);
	w.o.deadline_ms = 300;
	world_map(&w);
	assert_int_equal(world_store(&w, 4 * RIG_CHUNK, 100), 0);
	w.d.write_error = ENOSPC;
	assert_int_equal(far_mount_close(w.m), -ENOSPC);
	w.m = NULL;
	world_close(&w);
}

/* ------------------------------------------------------------------------------------------------------------ memory */

/* The n-th call that fills pages fails, alone or with all after it. */
static void no_memory_for_pages(void **state)
{
	struct world w;

	for (int all = 0; all < 2; all++) {
		unsigned n = 0, sigbus = 0;
		bool hit;
		do {
			world_open(&w, state);
			w.o.deadline_ms = 200;
			w.o.local_max = 8 * RIG_CHUNK;
			world_map(&w);
			pages_all = all;
			pages_hit = false;
			pages_left = ++n;
			for (unsigned k = 0; k < 12 && !(all && sigbus > 20 * n); k++) {
				sigbus += world_load(&w, k * RIG_CHUNK, 2 * RIG_CHUNK) != 0;
				sigbus += world_store(&w, k * 2 * RIG_CHUNK + 100, 200) != 0;
			}
			hit = pages_hit;
			pages_left = 0;
			world_is_whole(&w);
			world_close(&w);
		} while (hit && n < (all ? 6 : 30));
		print_message("%s: %u places%s, %u touches raised SIGBUS\n", w.kind->name, n,
			      all ? ", all from there on" : "", sigbus);
	}
}

static int mapping_call(void *ctx, struct far_error *err)
{
	struct world *w = ctx;
	struct far_backend *b;

	inject_pause(true);
	b = bad_backend(&w->d);
	inject_pause(false);
	int r = far_map(b, &w->o, &w->m, err);
	if (r) {
		inject_pause(true);
		far_close(b); /* it is still ours */
		inject_pause(false);
	}
	return r;
}

static void mapping_after(void *ctx, int r)
{
	struct world *w = ctx;

	if (r) {
		assert_null(w->m);
		return;
	}
	w->p = far_addr(w->m);
	assert_int_equal(world_load(w, 0, BYTES), 0);
	assert_int_equal(world_store(w, 3 * RIG_CHUNK, 1000), 0);
	assert_int_equal(far_mount_close(w->m), 0);
	w->m = NULL;
	rig_model_read(&w->model, 0, w->d.s.data, BYTES, "on the remote after closing");
}

static void mapping_works_or_says_no(void **state)
{
	struct world w;

	world_open(&w, state);
	world_map(&w); /* what a process has once is there then */
	assert_int_equal(far_mount_close(w.m), 0);
	w.m = NULL;
	rig_each_allocation(&(struct rig_case){ .what = w.kind->name, .call = mapping_call, .after = mapping_after, .ctx = &w });
	world_close(&w);
}

/* -------------------------------------------------------------------------------------------------------------- disk */

static _Atomic int disk_error;

static int disk_before(void *opaque, struct inject_io *io)
{
	const char *path = opaque;

	return io->op == INJECT_PWRITE && disk_error && inject_is(io->fd, path) ? disk_error : 0;
}

/* The local store below the memory has no room, then it has. */
static void a_full_local_store(void **state)
{
	struct world w;
	char path[100], uri[160];
	struct inject_hooks h = { .before = disk_before, .opaque = path };

	world_open(&w, state);
	snprintf(path, sizeof path, "%s/local", tmp);
	snprintf(uri, sizeof uri, "file:%s?size=%u", path, BYTES);
	w.o.local = uri;
	w.o.mode = FAR_MODE_MANAGED;
	w.o.deadline_ms = 2000;
	w.o.map = "none";
	world_map(&w);
	assert_int_equal(world_load(&w, 0, 4 * RIG_CHUNK), 0);
	assert_int_equal(world_store(&w, 100, 3 * RIG_CHUNK), 0);
	inject_hooks(&h);
	disk_error = ENOSPC;
	assert_int_equal(far_mount_flush(w.m), -ENOSPC);
	assert_int_equal(world_load(&w, 8 * RIG_CHUNK, 8 * RIG_CHUNK), 0); /* reads go past it */
	assert_int_equal(world_store(&w, 9 * RIG_CHUNK + 7, RIG_CHUNK), 0);
	assert_int_equal(far_mount_flush(w.m), -ENOSPC);
	disk_error = 0;
	uint64_t until = far_now() + 20 * FAR_SEC;
	int e;
	while ((e = far_mount_flush(w.m)) && far_now() < until)
		far_sleep_until(far_now() + 10 * FAR_MSEC, false);
	assert_int_equal(e, 0);
	rig_model_read(&w.model, 0, w.d.s.data, BYTES, "on the remote after the flush");
	world_is_whole(&w);
	inject_hooks(NULL);
	world_close(&w);
	assert_int_equal(unlink(path), 0);
}

/* -------------------------------------------------------------------------------------------------------------- main */

static int setup(void **state)
{
	snprintf(tmp, sizeof tmp, "%s/farpage-pointer-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
	return mkdtemp(tmp) ? 0 : -1;
}

static int teardown(void **state)
{
	char cmd[100];
	snprintf(cmd, sizeof cmd, "rm -rf '%s'", tmp);
	return system(cmd);
}

static const struct {
	const char *name;
	void (*fn)(void **state);
	const char *kinds[6];
} cases[] = {
	{ "failed_reads_raise_sigbus_until_healed", failed_reads_raise_sigbus_until_healed,
	  { "copy-async", "copy-sync", "copy-hash", "continue-sync", "managed", "local" } },
	{ "silence_ends_at_the_deadline", silence_ends_at_the_deadline,
	  { "copy-async", "copy-sync", "continue-sync", "managed", "local" } },
	{ "silence_is_waited_out_on_request", silence_is_waited_out_on_request, { "copy-async", "continue-sync", "managed" } },
	{ "a_flush_fails_until_all_is_there", a_flush_fails_until_all_is_there,
	  { "copy-async", "copy-sync", "copy-hash", "continue-sync", "managed", "local" } },
	{ "closing_says_what_was_not_flushed", closing_says_what_was_not_flushed, { "copy-async", "managed", "local" } },
	{ "no_memory_for_pages", no_memory_for_pages, { "copy-async", "copy-sync", "continue-sync", "move-hash" } },
	{ "mapping_works_or_says_no", mapping_works_or_says_no, { "copy-async", "continue-sync", "managed", "local" } },
	{ "a_full_local_store", a_full_local_store, { "local", "local-sync" } },
};

/* pointer [PART-OF-A-NAME] */
int main(int argc, char **argv)
{
	static struct CMUnitTest tests[60];
	static char names[60][120];
	size_t n = 0;

	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++)
		for (size_t k = 0; k < FAR_ARRAY_LEN(cases[i].kinds) && cases[i].kinds[k]; k++) {
			snprintf(names[n], sizeof names[n], "%s/%s", cases[i].name, cases[i].kinds[k]);
			if (argc > 1 && !strstr(names[n], argv[1]))
				continue;
			tests[n] = (struct CMUnitTest){ .name = names[n], .test_func = cases[i].fn,
							.initial_state = (void *)face_kind_find(cases[i].kinds[k]) };
			n++;
		}
	far_log_set_level((enum far_log_level)-1);
	return _cmocka_run_group_tests("pointer", tests, n, setup, teardown);
}
