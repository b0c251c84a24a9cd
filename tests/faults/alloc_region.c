/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Managed regions and mounts without memory: the n-th allocation fails, n = 1, 2 ... An open that fails leaves its
 * backends with their owner and nothing behind; a call that fails loses no byte that was acknowledged before; and once
 * there is memory again everything goes on, the flush included.
 */
#define _GNU_SOURCE
#include "rig.h"

#include "layer/layer.h"
#include "mount/control.h"
#include "mount/mount.h"

#include <json-c/json.h>
#include <sys/stat.h>
#include <unistd.h>

#define BYTES (24 * RIG_CHUNK + 1000)

static char tmp[64];

/* ----------------------------------------------------------------------------------------------------------- opening */

struct opening {
	struct rig_remote s;
	struct far_mount_opts o;
	struct far_region_conf conf;
	struct far_region *r;
};

static int opening_call(void *ctx, struct far_error *err)
{
	struct opening *t = ctx;
	t->conf.opts = &t->o;
	return far_region_open(&t->conf, &t->r, err);
}

static void opening_after(void *ctx, int r)
{
	struct opening *t = ctx;
	unsigned char c = 0;

	if (r) {
		assert_null(t->r);
		assert_int_equal(far_read(t->conf.remote, 5, &c, 1, 0), 0);
		assert_int_equal(c, t->s.data[5]);
		assert_int_equal(far_read(t->conf.local, 5, &c, 1, 0), 0);
		return;
	}
	assert_int_equal(far_read(far_region_backend(t->r), 5, &c, 1, 0), 0);
	assert_int_equal(c, t->s.data[5]);
	uint64_t old = far_deadline_limit(far_now() + 10 * FAR_SEC);
	assert_int_equal(far_region_wait(t->r, 0, BYTES), 0);
	far_deadline_restore(old);
	far_region_close(t->r);
	t->r = NULL;
	t->conf.remote = rig_remote_backend(&t->s);
	assert_int_equal(far_open("mem:99304", NULL, &t->conf.local, NULL), 0);
}

static int64_t falling(void *opaque, uint64_t off)
{
	return -(int64_t)off;
}

static void region_opens_or_says_no(void **state)
{
	static const char *const orders[] = { NULL, "ranges:0-8K,64K-", "hint:mp4", "trace:", NULL };
	struct opening t = { 0 };
	char trace[100], record[100];

	snprintf(trace, sizeof trace, "%s/trace", tmp);
	rig_remote_init(&t.s, BYTES);
	t.conf.remote = rig_remote_backend(&t.s);
	assert_int_equal(far_open("mem:99304", NULL, &t.conf.local, NULL), 0);
	for (size_t i = 0; i < FAR_ARRAY_LEN(orders); i++) {
		char order[120] = "";
		t.o = rig_quiet();
		if (i == 0) { /* the first one records what the trace reads */
			t.o.record_order = trace;
		} else if (orders[i]) {
			snprintf(order, sizeof order, "%s%s", orders[i], strcmp(orders[i], "trace:") ? "" : trace);
			t.o.order = order;
		} else {
			t.o.priority = falling;
		}
		t.o.pull_workers = i == 4 ? 0 : 2;
		t.o.push_workers = 2;
		snprintf(record, sizeof record, "region, %s", i == 0 ? "recording" : *order ? orders[i] : "priority");
		rig_each_allocation(&(struct rig_case){ .what = record, .call = opening_call, .after = opening_after, .ctx = &t });
	}
	far_close(t.conf.remote);
	far_close(t.conf.local);
	rig_remote_fini(&t.s);
}

/* ------------------------------------------------------------------------------------------------ with a chunk map */

struct keeping {
	struct rig_remote s;
	char local[140], map[100];
	struct far_region *r;
	struct far_persist *p;
	bool open_map; /* the map alone, or the region on it */
	unsigned char byte;
};

static int keeping_call(void *ctx, struct far_error *err)
{
	struct keeping *t = ctx;
	struct far_mount_opts o = rig_quiet();
	struct far_region_conf conf = { .opts = &o, .persist = t->p };

	if (t->open_map)
		return far_persist_open(t->map, FAR_PERSIST_WRITABLE, &t->p, err);
	inject_pause(true);
	assert_int_equal(far_open(t->local, NULL, &conf.local, NULL), 0);
	conf.remote = rig_remote_backend(&t->s);
	inject_pause(false);
	int e = far_region_open(&conf, &t->r, err);
	if (e) {
		far_close(conf.local);
		far_close(conf.remote);
	}
	return e;
}

static void keeping_after(void *ctx, int r)
{
	struct keeping *t = ctx;
	unsigned char c = 0;

	if (t->open_map) {
		assert_true(!r || !t->p);
		far_persist_close(t->p);
		t->p = NULL;
		return;
	}
	if (r) {
		assert_null(t->r);
		far_persist_close(t->p);
	} else { /* half a chunk, so that there is a table to be read next time */
		struct far_backend *b = far_region_backend(t->r);
		assert_int_equal(far_read(b, 5, &c, 1, 0), 0);
		assert_int_equal(c, t->s.data[5]);
		assert_int_equal(far_read(b, 3 * RIG_CHUNK + 7, &c, 1, 0), 0);
		assert_int_equal(c, t->byte ? t->byte : t->s.data[3 * RIG_CHUNK + 7]);
		t->byte++;
		assert_int_equal(far_write(b, 3 * RIG_CHUNK + 7, &t->byte, 1, 0), 0);
		far_region_close(t->r);
		t->r = NULL;
	}
	assert_int_equal(far_persist_open(t->map, FAR_PERSIST_WRITABLE, &t->p, NULL), 0);
}

static void region_with_a_map_opens_or_says_no(void **state)
{
	struct keeping t = { 0 };

	rig_remote_init(&t.s, BYTES);
	snprintf(t.local, sizeof t.local, "file:%s/kept?size=%u", tmp, BYTES);
	snprintf(t.map, sizeof t.map, "%s/kept.farmap", tmp);
	assert_int_equal(far_persist_open(t.map, FAR_PERSIST_WRITABLE, &t.p, NULL), 0);
	rig_each_allocation(&(struct rig_case){ .what = "region, new map", .call = keeping_call, .after = keeping_after, .ctx = &t });
	assert_true(t.byte > 0);
	rig_each_allocation(&(struct rig_case){ .what = "region, old map", .call = keeping_call, .after = keeping_after, .ctx = &t });
	far_persist_close(t.p);
	t.p = NULL;
	t.open_map = true;
	rig_each_allocation(&(struct rig_case){ .what = "map", .call = keeping_call, .after = keeping_after, .ctx = &t });
	rig_remote_fini(&t.s);
}

/* ----------------------------------------------------------------------------------------------------------- calls */

struct hot {
	struct rig_remote s;
	struct rig_model m;
	struct far_region *r;
	struct far_backend *face;
	const char *what;
	unsigned version;
	unsigned failed;
	bool budget, durable_local;
};

static void hot_result(struct hot *t, const char *call, int e)
{
	if (e && e != -ENOMEM)
		fail_msg("%s: %s without memory says %s", t->what, call, far_strerror(e));
	t->failed += e != 0;
}

static void hot_write(struct hot *t, uint64_t off, size_t len)
{
	static unsigned char buf[8 * RIG_CHUNK];

	rig_fill(buf, off, len, ++t->version);
	int e = far_write(t->face, off, buf, len, 0);
	rig_model_wrote(&t->m, off, buf, len, e);
	hot_result(t, "a write", e);
}

static void hot_zero(struct hot *t, uint64_t off, uint64_t len, bool discard)
{
	int e = discard ? far_discard(t->face, off, len, 0) : far_zero(t->face, off, len, 0);
	rig_model_wrote(&t->m, off, NULL, len, e);
	hot_result(t, "a zero", e);
}

static void hot_read(struct hot *t, uint64_t off, size_t len)
{
	static unsigned char buf[BYTES];
	int e = far_read(t->face, off, buf, len, 0);
	if (!e)
		rig_model_read(&t->m, off, buf, len, t->what);
	hot_result(t, "a read", e);
}

/* Every path through the region that allocates, and those around them. */
static void hot_calls(struct hot *t)
{
	struct far_extent x[8];
	struct far_status st = FAR_STATUS_INIT;
	size_t n;

	hot_write(t, RIG_CHUNK + 100, 600);                   /* part of an absent chunk */
	hot_write(t, RIG_CHUNK + 3000, 20);
	hot_write(t, 2 * RIG_CHUNK, RIG_CHUNK);               /* a whole one */
	hot_write(t, 3 * RIG_CHUNK + 77, 2 * RIG_CHUNK + 10); /* over several */
	hot_write(t, 24 * RIG_CHUNK + 10, 900);               /* the short last one */
	hot_read(t, RIG_CHUNK, 2 * RIG_CHUNK);                /* half here, half there */
	hot_read(t, 6 * RIG_CHUNK, 3 * RIG_CHUNK);
	hot_zero(t, 9 * RIG_CHUNK, RIG_CHUNK, false);
	hot_zero(t, 10 * RIG_CHUNK + 512, 700, true);
	hot_result(t, "extents", far_extents(t->face, 0, BYTES, x, 8, &n));
	hot_result(t, "a flush", far_region_flush(t->r));
	hot_write(t, 6 * RIG_CHUNK + 5, 30);
	hot_result(t, "an eviction", far_region_evict(t->r, 0, BYTES));
	hot_read(t, 7 * RIG_CHUNK - 9, RIG_CHUNK);
	hot_write(t, 12 * RIG_CHUNK + 1, 3);                  /* more ragged pieces than are remembered */
	hot_write(t, 12 * RIG_CHUNK + 1001, 3);
	hot_write(t, 12 * RIG_CHUNK + 2001, 3);
	hot_write(t, 12 * RIG_CHUNK + 3001, 3);
	far_region_prefetch(t->r, 14 * RIG_CHUNK, RIG_CHUNK);
	far_region_prefetch(t->r, 18 * RIG_CHUNK, RIG_CHUNK);
	if (!t->budget) /* else the puller may have to stop before that range */
		hot_result(t, "waiting", far_region_wait(t->r, 16 * RIG_CHUNK, RIG_CHUNK));
	far_region_status(t->r, &st);
	hot_result(t, "a flush", far_region_flush(t->r));
}

static int hot_call(void *ctx, struct far_error *err)
{
	struct hot *t = ctx;
	t->failed = 0;
	hot_calls(t);
	return 0;
}

/* There is memory again. */
static void hot_after(void *ctx, int r)
{
	struct hot *t = ctx;
	int e = far_region_flush(t->r);

	if (e == -ENOMEM) /* of a push that was on its way */
		e = far_region_flush(t->r);
	if (!e && t->durable_local)
		e = far_region_push(t->r);
	if (e)
		fail_msg("%s: the flush still fails with memory: %s", t->what, far_strerror(e));
	rig_model_read(&t->m, 0, t->s.data, BYTES, "on the remote after the flush");
	hot_read(t, 0, BYTES);
	assert_int_equal(far_region_flush(t->r) || far_region_push(t->r), 0);
	rig_model_read(&t->m, 0, t->s.data, BYTES, "on the remote after the second flush");
	assert_int_equal(far_region_evict(t->r, 0, BYTES), 0);
}

static void hot_run(const char *what, const char *local, bool kept, struct far_mount_opts o, enum inject_scope scope)
{
	struct hot t = { .what = what, .budget = o.local_max != 0, .durable_local = o.durable == FAR_DURABLE_LOCAL };
	struct far_region_conf conf = { .opts = &o, .local_is_zero = true };
	struct far_error err = { 0 };
	char file[120], map[120];

	rig_remote_init(&t.s, BYTES);
	rig_model_init(&t.m, t.s.data, BYTES);
	conf.remote = rig_remote_backend(&t.s);
	snprintf(file, sizeof file, "file:%s/local?size=%u", tmp, BYTES);
	assert_int_equal(far_open(local ? local : file, NULL, &conf.local, &err), 0);
	if (far_facts(conf.local)->chunk) {
		struct far_backend *outer;
		assert_int_equal(far_layer_open("chunked", conf.local, &outer, NULL), 0);
		conf.local = outer;
	}
	snprintf(map, sizeof map, "%s/local.farmap", tmp);
	if (kept)
		assert_int_equal(far_persist_open(map, FAR_PERSIST_WRITABLE, &conf.persist, &err), 0);
	if (far_region_open(&conf, &t.r, &err))
		fail_msg("%s", err.text);
	t.face = far_region_backend(t.r);
	rig_each_allocation(&(struct rig_case){ .what = what, .scope = scope, .call = hot_call, .after = hot_after, .ctx = &t,
						.no_text = true });
	far_region_close(t.r);
	rig_model_fini(&t.m);
	rig_remote_fini(&t.s);
}

static void calls_lose_nothing(void **state)
{
	struct far_mount_opts o = rig_quiet();
	char dir[100];

	hot_run("calls on memory", "mem:99304", false, o, INJECT_THREAD);
	hot_run("calls on private memory", "mem:99304?private=1", false, o, INJECT_THREAD);
	hot_run("calls on a file", NULL, false, o, INJECT_THREAD);
	snprintf(dir, sizeof dir, "dir:%s/local-dir?size=%u&chunk=8K", tmp, BYTES);
	hot_run("calls on a directory", dir, false, o, INJECT_THREAD);
	hot_run("calls on a file with a map", NULL, true, o, INJECT_THREAD);
	o.durable = FAR_DURABLE_LOCAL;
	hot_run("calls on a file, durable there", NULL, true, o, INJECT_THREAD);
	o.durable = FAR_DURABLE_REMOTE;
	o.max_partial = 1;
	o.local_max = 8 * RIG_CHUNK;
	hot_run("calls with little room", "mem:99304", false, o, INJECT_THREAD);
}

static void calls_with_workers_lose_nothing(void **state)
{
	struct far_mount_opts o = rig_quiet();

	o.pull_workers = 2;
	o.push_workers = 2;
	o.push_interval_ms = 1;
	o.local_max = 12 * RIG_CHUNK;
	hot_run("calls beside workers", "mem:99304", false, o, INJECT_PROCESS);
	hot_run("calls with a map beside workers", NULL, true, o, INJECT_PROCESS);
}

/* ----------------------------------------------------------------------------------------------------------- mounts */

struct mounting {
	struct rig_remote s;
	struct far_mnt_conf conf;
	struct far_mnt *m;
};

static int mounting_call(void *ctx, struct far_error *err)
{
	struct mounting *t = ctx;
	return far_mnt_open(&t->conf, &t->m, err);
}

static void mounting_after(void *ctx, int r)
{
	struct mounting *t = ctx;
	char holders[100];

	t->conf.remote = rig_remote_backend(&t->s); /* the old one went with the mount */
	if (r) {
		assert_null(t->m);
		return;
	}
	struct stat st;
	assert_int_equal(stat(far_mnt_path(t->m), &st), 0);
	assert_int_equal(st.st_size, BYTES);
	assert_int_equal(far_mnt_finish(t->m, far_now() + 10 * FAR_SEC, holders, sizeof holders), 0);
	far_mnt_close(t->m);
	t->m = NULL;
}

static void mount_opens_or_says_no(void **state)
{
	struct mounting t = { .conf = { .source = "rig:", .name = "region" } };

	if (access("/dev/fuse", R_OK | W_OK)) {
		print_message("skip: /dev/fuse cannot be used here\n");
		skip();
	}
	rig_remote_init(&t.s, BYTES);
	char target[100], store[100];
	snprintf(target, sizeof target, "%s/mnt", tmp);
	snprintf(store, sizeof store, "file:%s/mounted", tmp);
	assert_int_equal(mkdir(target, 0700), 0);
	t.conf.target = target;
	for (int managed = 0; managed < 3; managed++) {
		t.conf.opts = rig_quiet();
		t.conf.opts.local = managed == 2 ? store : NULL;
		t.conf.opts.mode = managed ? FAR_MODE_MANAGED : FAR_MODE_DIRECT;
		t.conf.network = managed;
		t.conf.remote = rig_remote_backend(&t.s);
		rig_each_allocation(&(struct rig_case){ .what = managed == 2 ? "managed mount with a map" :
									managed ? "managed mount" : "direct mount",
							.call = mounting_call, .after = mounting_after, .ctx = &t });
		far_close(t.conf.remote);
	}
	rig_remote_fini(&t.s);
}

/* ------------------------------------------------------------------------------------------- mounts through a child */

struct child {
	struct far_mount *m;
	struct far_mount_opts o;
	char target[100];
};
static const char *serve_exe;

static int child_call(void *ctx, struct far_error *err)
{
	struct child *t = ctx;
	return far_mount_open_uri("mem:1M", t->target, &t->o, &t->m, err);
}

static void child_after(void *ctx, int r)
{
	struct child *t = ctx;
	struct far_status st = FAR_STATUS_INIT;

	if (r) {
		assert_null(t->m);
		return;
	}
	int e = far_mount_status(t->m, &st);
	assert_int_equal(e, 0);
	assert_int_equal(st.bytes, 1 << 20);
	assert_int_equal(far_mount_close(t->m), 0);
	t->m = NULL;
}

/* The child is looked for beside the program. */
static bool child_beside_us(char *link, size_t size)
{
	ssize_t n = readlink("/proc/self/exe", link, size - 20);

	if (n <= 0 || !serve_exe)
		return false;
	link[n] = 0;
	strcpy(strrchr(link, '/'), "/farpage-serve");
	unlink(link);
	return symlink(serve_exe, link) == 0;
}

static void child_mount_opens_or_says_no(void **state)
{
	struct child t = { .o = FAR_MOUNT_OPTS_INIT };
	char link[600] = "";

	if (access("/dev/fuse", R_OK | W_OK) || !child_beside_us(link, sizeof link)) {
		print_message("skip: %s\n", *link ? "farpage-serve cannot be put beside the test" :
						     "/dev/fuse cannot be used here, or no farpage-serve was named");
		skip();
	}
	snprintf(t.target, sizeof t.target, "%s/child", tmp);
	assert_int_equal(mkdir(t.target, 0700), 0);
	t.o.mode = FAR_MODE_MANAGED;
	rig_each_allocation(&(struct rig_case){ .what = "mount through a child", .call = child_call, .after = child_after, .ctx = &t,
						.once = true });
	unlink(link);
}

/* ---------------------------------------------------------------------------------------------------- control socket */

struct controlling {
	struct far_control *c;
	char path[100];
	bool wrong;
};

static struct json_object *controlling_fn(void *opaque, const char *op, struct json_object *req)
{
	struct far_status st = FAR_STATUS_INIT;
	st.bytes = 4711;
	return far_control_status(&st);
}

static int controlling_open(void *ctx, struct far_error *err)
{
	struct controlling *t = ctx;
	return far_control_open(t->path, NULL, &t->c, err);
}

static int controlling_start(void *ctx, struct far_error *err)
{
	struct controlling *t = ctx;
	return far_control_start(t->c, controlling_fn, NULL, err);
}

static void controlling_opened(void *ctx, int r)
{
	struct controlling *t = ctx;
	if (r)
		assert_null(t->c);
	else
		far_control_close(t->c);
	t->c = NULL;
}

static void controlling_started(void *ctx, int r)
{
	struct controlling *t = ctx;

	far_control_close(t->c);
	assert_int_equal(far_control_open(t->path, NULL, &t->c, NULL), 0);
}

static bool controlling_asks(struct controlling *t, struct far_error *err)
{
	struct json_object *req, *reply = NULL, *v;
	bool right = false;

	inject_pause(true);
	req = json_object_new_object();
	json_object_object_add(req, "op", json_object_new_string("status"));
	inject_pause(false);
	int r = far_control_call(t->path, NULL, req, 10000, &reply, err);
	if (!r)
		right = json_object_object_get_ex(reply, "size", &v) && json_object_get_int64(v) == 4711;
	t->wrong |= !r && !right;
	json_object_put(reply);
	json_object_put(req);
	return right;
}

/* Whatever fails on either side, an answer that looks right is right, and the next one comes. */
static void controlling_answers(struct controlling *t)
{
	struct far_error err = { 0 };
	bool hit;

	assert_int_equal(far_control_start(t->c, controlling_fn, NULL, NULL), 0);
	for (unsigned n = 1; n < 500; n++) {
		inject_watch("control socket", n, 60);
		inject_begin(n, INJECT_PROCESS, false);
		controlling_asks(t, &err);
		hit = inject_end();
		if (t->wrong)
			fail_msg("control socket: allocation %u fails and the answer is wrong", n);
		if (!controlling_asks(t, &err))
			fail_msg("control socket: no answer after allocation %u failed: %s", n, err.text);
		if (!hit)
			return;
	}
	fail_msg("control socket: never ends");
}

static void control_socket_says_no(void **state)
{
	struct controlling t = { 0 };

	snprintf(t.path, sizeof t.path, "%s/control", tmp);
	rig_each_allocation(&(struct rig_case){ .what = "control socket opens", .call = controlling_open,
						.after = controlling_opened, .ctx = &t });
	assert_int_equal(far_control_open(t.path, NULL, &t.c, NULL), 0);
	rig_each_allocation(&(struct rig_case){ .what = "control socket starts", .call = controlling_start,
						.after = controlling_started, .ctx = &t });
	controlling_answers(&t);
	far_control_close(t.c);
}

static int setup(void **state)
{
	strcpy(tmp, "/tmp/farpage-faults-XXXXXX");
	return mkdtemp(tmp) ? 0 : -1;
}

static int teardown(void **state)
{
	char cmd[100];
	snprintf(cmd, sizeof cmd, "rm -rf '%s'", tmp);
	return system(cmd);
}

int main(int argc, char **argv)
{
	serve_exe = argc > 1 ? argv[1] : NULL;
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(region_opens_or_says_no),        cmocka_unit_test(region_with_a_map_opens_or_says_no),
		cmocka_unit_test(calls_lose_nothing),
		cmocka_unit_test(calls_with_workers_lose_nothing), cmocka_unit_test(mount_opens_or_says_no),
		cmocka_unit_test(child_mount_opens_or_says_no),
		cmocka_unit_test(control_socket_says_no),
	};
	far_log_set_level(FAR_LOG_ERROR);
	return cmocka_run_group_tests(tests, setup, teardown);
}
