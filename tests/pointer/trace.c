/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Recorded working sets through a pointer: what is written down is the order of first touches, and a second start pulls
 * in that order, in extents. */
#define _GNU_SOURCE
#include "face.h"

#include "base/clock.h"
#include "base/thread.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define CHUNK 16384u
#define CHUNKS 64u

/* A remote that notes which reads came, in order. */
struct remote {
	struct far_mutex lock;
	unsigned n;
	uint64_t off[4 * CHUNKS], len[4 * CHUNKS];
};

static int remote_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct remote *t = self;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	for (size_t k = 0; k < len; k++)
		((unsigned char *)buf)[k] = (unsigned char)((off + k) / 4096 * 7 + 1);
	if (len < CHUNK) /* the mount measures the way to the remote */
		return 0;
	far_mutex_lock(&t->lock);
	assert_in_range(t->n, 0, 4 * CHUNKS - 1);
	t->off[t->n] = off;
	t->len[t->n++] = len;
	far_mutex_unlock(&t->lock);
	return 0;
}

static int remote_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return 0;
}

static int remote_flush(void *self)
{
	return 0;
}

static void remote_close(void *self)
{
	(void)self;
}

static struct far_mount *map(struct remote *t, struct far_mount_opts o)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = remote_read, .write = remote_write, .flush = remote_flush,
					    .close = remote_close };
	struct far_facts facts = { .size = sizeof facts, .bytes = CHUNK * CHUNKS, .caps = FAR_CAP_WRITE | FAR_CAP_REMOTE };
	struct far_error err = { .text = "" };
	struct far_backend *b;
	struct far_mount *m;

	memset(t, 0, sizeof *t);
	far_mutex_init(&t->lock);
	o.mode = FAR_MODE_MANAGED;
	o.chunk = CHUNK;
	o.push_interval_ms = 10;
	assert_int_equal(far_backend_new(&ops, t, &facts, &b), 0);
	if (far_map(b, &o, &m, &err))
		fail_msg("%s", err.text);
	return m;
}

static void touch(struct far_mount *m, uint64_t chunk, bool write)
{
	unsigned char *p = (unsigned char *)far_addr(m) + chunk * CHUNK + 5000;

	if (write)
		*p = 3;
	else
		assert_int_equal(face_peek(p), (unsigned char)((chunk * CHUNK + 5000) / 4096 * 7 + 1));
}

static void record(const char *path, const uint64_t *chunk, unsigned n)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct remote t;

	o.record_order = path;
	struct far_mount *m = map(&t, o);
	for (unsigned k = 0; k < n; k++)
		touch(m, chunk[k], k % 3 == 2);
	for (unsigned k = 0; k < n; k++)
		touch(m, chunk[k], true);
	assert_int_equal(far_mount_close(m), 0);
}

/* The reads of a start with this order, until all is here. */
static void replay(const char *path, struct remote *t)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	char order[80];

	snprintf(order, sizeof order, "trace:%s", path);
	o.order = order;
	o.pull_workers = 1;
	o.window = 1;
	struct far_mount *m = map(t, o);
	assert_int_equal(far_mount_wait(m, 100, 30000), 0);
	assert_int_equal(far_mount_close(m), 0);
}

static void the_order_of_touches_is_recorded(void **state)
{
	static const uint64_t first[] = { 40, 7, 63, 8, 9, 0, 22 };
	char path[] = "/tmp/farpage-trace-XXXXXX", line[100], want[1000] = "farpage-trace 1\n", got[1000] = "";

	close(mkstemp(path));
	record(path, first, FAR_ARRAY_LEN(first));
	for (unsigned k = 0; k < FAR_ARRAY_LEN(first); k++) {
		bool two = first[k] == 8; /* 8 and 9 are neighbours, one after the other */
		snprintf(line, sizeof line, "%llu %u\n", (unsigned long long)first[k] * CHUNK, two ? 2 * CHUNK : CHUNK);
		strcat(want, line);
		k += two;
	}
	FILE *f = fopen(path, "re");
	assert_non_null(f);
	got[fread(got, 1, sizeof got - 1, f)] = 0;
	fclose(f);
	assert_string_equal(got, want);
	unlink(path);
}

static void a_second_start_follows_it_in_extents(void **state)
{
	static const uint64_t first[] = { 40, 50, 48, 30, 26, 28, 32 }, second[] = { 40, 3, 1, 2 };
	char one[] = "/tmp/farpage-trace-XXXXXX", two[] = "/tmp/farpage-trace-XXXXXX", cmd[200];
	struct remote t;

	close(mkstemp(one));
	close(mkstemp(two));
	record(one, first, FAR_ARRAY_LEN(first));
	replay(one, &t);
	assert_int_equal(t.off[0], 40 * CHUNK);
	assert_int_equal(t.len[0], CHUNK);
	assert_int_equal(t.off[1], 48 * CHUNK); /* 50 and 48 in one call */
	assert_int_equal(t.len[1], 3 * CHUNK);
	assert_int_equal(t.off[2], 26 * CHUNK); /* 30, 26, 28, 32 */
	assert_int_equal(t.len[2], 7 * CHUNK);
	/* merged, as the page about the format says */
	record(two, second, FAR_ARRAY_LEN(second));
	snprintf(cmd, sizeof cmd, "cat %s >> %s", two, one);
	assert_int_equal(system(cmd), 0);
	replay(one, &t);
	assert_int_equal(t.off[0], 40 * CHUNK);
	assert_int_equal(t.off[2], 26 * CHUNK);
	assert_int_equal(t.off[3], 1 * CHUNK); /* 1 to 3; 40 is here already */
	assert_int_equal(t.len[3], 3 * CHUNK);
	unlink(one);
	unlink(two);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_order_of_touches_is_recorded),
		cmocka_unit_test(a_second_start_follows_it_in_extents),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
