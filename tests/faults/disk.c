/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The disk under the local store and its chunk map is full, or fails: at the n-th of what is asked of it, n = 1, 2 ...,
 * once or from there on until it is mended. Whatever fails,
 *
 *  - a call fails with that error or does its work; nothing that was acknowledged is lost, nothing wrong is ever read;
 *  - when the disk works again everything goes on: the next flush succeeds (after a failed sync of the local store only
 *    when it has been opened again: what the kernel has dropped nobody knows), and all is on the remote;
 *  - opening again is never refused.
 *
 * Suite `faults`: n up to 50; `long`: until nothing fails any more.
 */
#define _GNU_SOURCE
#include "rig.h"

#include "record.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <unistd.h>

#define BYTES (24 * RIG_CHUNK + 1000)

static char tmp[64], local[100], map[120];

/* ------------------------------------------------------------------------------------------------------- the disk */

struct disk {
	const char *name;
	int error;
	unsigned ops;  /* bit: enum inject_op */
	bool partly;   /* half of the transfer is made first */
	bool all;      /* stays so until it is mended */
	bool at_end;   /* reads: as if the file ended there */
	/* while it runs */
	_Atomic unsigned left;
	_Atomic bool hit, sync_failed;
};

#define OP(o) (1u << (o))
#define WRITES (OP(INJECT_PWRITE) | OP(INJECT_PUNCH) | OP(INJECT_TRUNCATE))
static struct disk disks[] = {
	{ .name = "full once", .error = ENOSPC, .ops = WRITES },
	{ .name = "full until mended", .error = ENOSPC, .ops = WRITES, .partly = true, .all = true },
	{ .name = "a write fails", .error = EIO, .ops = WRITES, .partly = true },
	{ .name = "a sync fails", .error = EIO, .ops = OP(INJECT_SYNC) },
	{ .name = "writes and syncs fail until mended", .error = EIO, .ops = WRITES | OP(INJECT_SYNC), .all = true },
	{ .name = "a read fails", .error = EIO, .ops = OP(INJECT_PREAD) },
	{ .name = "reads fail until mended", .error = EIO, .ops = OP(INJECT_PREAD), .all = true },
	{ .name = "a read is short", .error = EIO, .ops = OP(INJECT_PREAD), .at_end = true },
};

static int disk_before(void *opaque, struct inject_io *io)
{
	struct disk *d = opaque;

	if (!(d->ops & OP(io->op)) || !(inject_is(io->fd, local) || inject_is(io->fd, map)))
		return 0;
	unsigned left = d->left;
	while (left > 1 && !atomic_compare_exchange_weak(&d->left, &left, left - 1))
		;
	if (left != 1)
		return 0;
	if (d->partly && io->op == INJECT_PWRITE && io->len > 1 && !d->hit) {
		d->hit = true;
		io->len /= 2; /* the caller comes again with the rest, and fails then */
		return 0;
	}
	d->hit = true;
	if (!d->all)
		d->left = 0;
	if (d->at_end) {
		io->len = 0;
		return 0;
	}
	if (io->op == INJECT_SYNC && inject_is(io->fd, local))
		d->sync_failed = true;
	return d->error;
}

static void disk_break(struct disk *d, unsigned n)
{
	d->hit = d->sync_failed = false;
	d->left = n;
}

static void disk_mend(struct disk *d)
{
	d->left = 0;
}

/* ------------------------------------------------------------------------------------------------------- the work */

struct work {
	struct disk *d;
	struct rig_remote s;
	struct rig_model m, durable_m; /* what may be read now; and when all since the last flush may be lost */
	struct far_region *r;
	struct far_backend *face;
	unsigned n, version;
	enum far_durable durable;
	char what[120];
};

/* 0 or what the disk said. */
static int work_result(struct work *w, const char *call, int e)
{
	if (e && (e != -w->d->error || !w->d->hit) && !(w->d->sync_failed && e == -EIO))
		fail_msg("%s: %s says %s", w->what, call, far_strerror(e));
	return e;
}

static void work_write(struct work *w, uint64_t off, size_t len)
{
	static unsigned char buf[8 * RIG_CHUNK];

	rig_fill(buf, off, len, ++w->version);
	int e = far_write(w->face, off, buf, len, 0);
	rig_model_wrote(&w->m, off, buf, len, e);
	rig_model_wrote(&w->durable_m, off, buf, len, -1);
	work_result(w, "a write", e);
}

static void work_zero(struct work *w, uint64_t off, uint64_t len)
{
	int e = far_zero(w->face, off, len, 0);
	rig_model_wrote(&w->m, off, NULL, len, e);
	rig_model_wrote(&w->durable_m, off, NULL, len, -1);
	work_result(w, "a zero", e);
}

static void work_read(struct work *w, uint64_t off, size_t len)
{
	static unsigned char buf[BYTES];
	int e = far_read(w->face, off, buf, len, 0);
	if (!e)
		rig_model_read(&w->m, off, buf, len, w->what);
	work_result(w, "a read", e);
}

static void work_flush(struct work *w)
{
	if (work_result(w, "a flush", far_region_flush(w->r)))
		return;
	if (w->durable == FAR_DURABLE_REMOTE)
		rig_model_read(&w->m, 0, w->s.data, BYTES, "on the remote after a flush");
	rig_model_copy(&w->durable_m, &w->m);
}

/* 0 or -errno, with a sentence that names what the disk said. */
static int work_open(struct work *w)
{
	struct far_mount_opts o = rig_quiet();
	struct far_region_conf conf = { .opts = &o };
	struct far_error err = { 0 };
	char uri[140];

	o.durable = w->durable;
	snprintf(uri, sizeof uri, "file:%s?size=%u", local, BYTES);
	int e = far_persist_open(map, FAR_PERSIST_WRITABLE, &conf.persist, &err);
	if (e)
		goto fail;
	e = far_open(uri, NULL, &conf.local, &err);
	if (e)
		goto fail;
	conf.remote = rig_remote_backend(&w->s);
	e = far_region_open(&conf, &w->r, &err);
	if (!e) {
		w->face = far_region_backend(w->r);
		return 0;
	}
fail:
	if (e != -w->d->error || !w->d->hit || !err.text[0])
		fail_msg("%s: opening says %s (%s)", w->what, far_strerror(e), err.text);
	far_close(conf.remote);
	far_close(conf.local);
	far_persist_close(conf.persist);
	return e;
}

static void work_make(struct work *w)
{
	work_write(w, RIG_CHUNK + 100, 600);
	work_write(w, 2 * RIG_CHUNK, RIG_CHUNK);
	work_write(w, 3 * RIG_CHUNK + 77, 2 * RIG_CHUNK + 10);
	work_read(w, RIG_CHUNK, 2 * RIG_CHUNK);
	work_read(w, 6 * RIG_CHUNK, 4 * RIG_CHUNK);
	work_write(w, 24 * RIG_CHUNK + 10, 900);
	work_flush(w);
	work_write(w, 6 * RIG_CHUNK + 5, 30); /* a clean chunk: its group is marked first */
	work_zero(w, 9 * RIG_CHUNK, RIG_CHUNK);
	work_zero(w, 10 * RIG_CHUNK + 512, 700);
	work_write(w, 7 * RIG_CHUNK + 1000, RIG_CHUNK);
	work_result(w, "an eviction", far_region_evict(w->r, 0, BYTES));
	work_read(w, 2 * RIG_CHUNK - 9, RIG_CHUNK);
	work_flush(w);
	work_write(w, 12 * RIG_CHUNK + 1, 3);
	work_write(w, 12 * RIG_CHUNK + 1001, 3);
	work_write(w, 12 * RIG_CHUNK + 2001, 3);
	work_write(w, 2 * RIG_CHUNK + 9, 100);
	work_flush(w);
	work_result(w, "an eviction", far_region_evict(w->r, 0, BYTES));
	work_read(w, 0, BYTES);
}

static void work_reopen(struct work *w)
{
	far_region_close(w->r);
	w->r = NULL;
	if (work_open(w))
		fail_msg("%s: cannot be opened again on a disk that works", w->what);
}

/* The disk works again. */
static void work_after(struct work *w)
{
	disk_mend(w->d);
	if (!w->r && work_open(w))
		fail_msg("%s: cannot be opened on a disk that works", w->what);
	int e = far_region_flush(w->r);
	if (e && w->d->sync_failed) {
		work_reopen(w);
		rig_model_copy(&w->m, &w->durable_m); /* no flush has promised more, and the last one failed */
		e = far_region_flush(w->r);
	}
	if (e)
		fail_msg("%s: the flush still fails on a disk that works: %s", w->what, far_strerror(e));
	if (w->durable == FAR_DURABLE_LOCAL)
		assert_int_equal(far_region_push(w->r), 0);
	w->d->hit = w->d->sync_failed = false; /* no error is forgiven any more */
	rig_model_read(&w->m, 0, w->s.data, BYTES, "on the remote after the flush");
	work_read(w, 0, BYTES);
	work_write(w, 5 * RIG_CHUNK + 1, 2 * RIG_CHUNK);
	work_reopen(w);
	work_read(w, 0, BYTES);
	assert_int_equal(far_region_flush(w->r), 0);
	assert_int_equal(far_region_evict(w->r, 0, BYTES), 0);
	work_read(w, 0, BYTES);
}

/* False: nothing failed. */
static bool disk_round(struct disk *d, unsigned n, bool open_too, enum far_durable durable)
{
	struct work w = { .d = d, .n = n, .durable = durable };

	snprintf(w.what, sizeof w.what, "%s, at %u, %s%s", d->name, n, durable ? "durable local" : "durable remote",
		 open_too ? ", while opening" : "");
	inject_watch(w.what, n, 60);
	rig_remote_init(&w.s, BYTES);
	rig_model_init(&w.m, w.s.data, BYTES);
	rig_model_init(&w.durable_m, w.s.data, BYTES);
	if (!open_too)
		assert_int_equal(work_open(&w), 0);
	disk_break(d, n);
	if (!open_too || !work_open(&w))
		work_make(&w);
	bool hit = d->hit;
	work_after(&w);
	far_region_close(w.r);
	rig_model_fini(&w.m);
	rig_model_fini(&w.durable_m);
	rig_remote_fini(&w.s);
	assert_int_equal(unlink(local) || unlink(map), 0);
	return hit;
}

static void disk_fails(struct disk *d)
{
	struct inject_hooks h = { .before = disk_before, .opaque = d };
	unsigned most = getenv("FARPAGE_LONG") ? 100000 : 50, files = inject_open_files(), threads = inject_threads();

	inject_hooks(&h);
	for (int durable = 0; durable < 2; durable++)
		for (int open_too = 0; open_too < 2; open_too++) {
			unsigned n = 1;
			while (n <= most && disk_round(d, n, open_too, (enum far_durable)durable))
				n++;
			print_message("%s, durable %s%s: %u places%s\n", d->name, durable ? "local" : "remote",
				      open_too ? ", opening too" : "", n - 1, n > most ? ", more with FARPAGE_LONG=1" : "");
			assert_true(n > 3);
		}
	inject_hooks(NULL);
	inject_watch("", 0, 0);
	rig_no_leak(d->name, files, threads);
}

static void disk_full_or_failing(void **state)
{
	for (size_t k = 0; k < FAR_ARRAY_LEN(disks); k++)
		disk_fails(&disks[k]);
}

/* ------------------------------------------------------------------------------------------------ going on by itself */

/* A full disk stops the pull; what is here goes on; room is enough for it to go on. */
static void a_full_disk_stops_the_pull(void **state)
{
	struct disk d = { .name = "full", .error = ENOSPC, .ops = OP(INJECT_PWRITE), .all = true };
	struct inject_hooks h = { .before = disk_before, .opaque = &d };
	struct work w = { .d = &d, .what = "a full disk stops the pull" };
	struct far_status st = FAR_STATUS_INIT;
	struct far_mount_opts o = rig_quiet();
	struct far_region_conf conf = { .opts = &o };
	struct far_error err = { 0 };
	char uri[140];

	o.pull_workers = 2;
	inject_watch(w.what, 0, 60);
	rig_remote_init(&w.s, BYTES);
	rig_model_init(&w.m, w.s.data, BYTES);
	rig_model_init(&w.durable_m, w.s.data, BYTES);
	snprintf(uri, sizeof uri, "file:%s?size=%u", local, BYTES);
	assert_int_equal(far_persist_open(map, FAR_PERSIST_WRITABLE, &conf.persist, &err), 0);
	assert_int_equal(far_open(uri, NULL, &conf.local, &err), 0);
	conf.remote = rig_remote_backend(&w.s);
	inject_hooks(&h);
	disk_break(&d, 8);
	int e = far_region_open(&conf, &w.r, &err);
	assert_int_equal(e, 0);
	w.face = far_region_backend(w.r);
	uint64_t until = far_now() + 10 * FAR_SEC;
	do {
		far_region_status(w.r, &st);
		far_sleep_until(far_now() + FAR_MSEC, false);
	} while (!st.local_full && far_now() < until);
	assert_true(st.local_full);
	assert_true(st.local < BYTES);
	work_read(&w, 0, BYTES); /* past the local store */
	work_write(&w, 20 * RIG_CHUNK, RIG_CHUNK);
	disk_mend(&d);
	uint64_t old = far_deadline_limit(far_now() + 30 * FAR_SEC);
	e = far_region_wait_local(w.r, BYTES);
	far_deadline_restore(old);
	if (e)
		fail_msg("the pull does not go on when there is room again: %s", far_strerror(e));
	d.hit = false;
	far_region_status(w.r, &st);
	assert_false(st.local_full);
	work_write(&w, 20 * RIG_CHUNK, RIG_CHUNK);
	work_flush(&w);
	work_read(&w, 0, BYTES);
	far_region_close(w.r);
	inject_hooks(NULL);
	inject_watch("", 0, 0);
	rig_model_fini(&w.m);
	rig_model_fini(&w.durable_m);
	rig_remote_fini(&w.s);
	assert_int_equal(unlink(local) || unlink(map), 0);
}

/* Bytes that change on the disk while nobody looks: clean chunks are fetched again, and counted. */
static void rotten_chunks_are_fetched_again(void **state)
{
	struct disk d = { .name = "rotten" };
	struct work w = { .d = &d, .what = "rotten chunks" };
	struct far_status st = FAR_STATUS_INIT;
	uint64_t random = 4711;

	rig_remote_init(&w.s, BYTES);
	rig_model_init(&w.m, w.s.data, BYTES);
	rig_model_init(&w.durable_m, w.s.data, BYTES);
	assert_int_equal(work_open(&w), 0);
	work_write(&w, 3 * RIG_CHUNK, 2 * RIG_CHUNK);
	work_read(&w, 0, BYTES);
	work_flush(&w);
	far_region_close(w.r);
	for (unsigned i = 0; i < 25; i++) { /* a bit of every second chunk */
		off_t at = (off_t)(i * RIG_CHUNK + record_random(&random) % (i == 24 ? 1000 : RIG_CHUNK));
		int fd = open(local, O_RDWR | O_CLOEXEC);
		unsigned char c = 0;
		assert_true(fd >= 0 && pread(fd, &c, 1, at) == 1);
		c ^= (unsigned char)(1u << (record_random(&random) % 8));
		assert_true(i % 2 || pwrite(fd, &c, 1, at) == 1);
		close(fd);
	}
	assert_int_equal(work_open(&w), 0);
	work_read(&w, 0, BYTES);
	far_region_status(w.r, &st);
	assert_int_equal(st.local_errors, 13);
	work_write(&w, 4 * RIG_CHUNK + 5, 100); /* a write into one does not make it good */
	work_flush(&w);
	far_region_close(w.r);
	rig_model_fini(&w.m);
	rig_model_fini(&w.durable_m);
	rig_remote_fini(&w.s);
	assert_int_equal(unlink(local) || unlink(map), 0);
}

/* Each begins with no files, whatever the one before left. */
static int clear(void **state)
{
	inject_hooks(NULL);
	snprintf(local, sizeof local, "%s/%" PRIu64, tmp, far_now());
	snprintf(map, sizeof map, "%s.farmap", local);
	return 0;
}

static int setup(void **state)
{
	snprintf(tmp, sizeof tmp, "%s/farpage-disk-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
	return mkdtemp(tmp) ? 0 : -1;
}

static int teardown(void **state)
{
	char cmd[100];
	snprintf(cmd, sizeof cmd, "rm -rf '%s'", tmp);
	return system(cmd);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test_setup(disk_full_or_failing, clear),
					    cmocka_unit_test_setup(a_full_disk_stops_the_pull, clear),
					    cmocka_unit_test_setup(rotten_chunks_are_fetched_again, clear) };
	far_log_set_level((enum far_log_level)-1); /* it says what fails, thousands of times */
	return cmocka_run_group_tests(tests, setup, teardown);
}
