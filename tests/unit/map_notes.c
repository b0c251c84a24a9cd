/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Stores are found although the kernel has forgotten that they happened: holes beside them, huge pages that were split. */
#define _GNU_SOURCE
#include "frontend/uffd.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

#define SIZE ((size_t)8 << 20)
#define CHUNK ((size_t)64 << 10)

static char remote[SIZE];
static unsigned writes;

static int remote_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	(void)self, (void)flags;
	memcpy(buf, remote + off, len);
	return 0;
}

static int remote_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	(void)self, (void)flags;
	__atomic_add_fetch(&writes, 1, __ATOMIC_RELAXED);
	memcpy(remote + off, buf, len);
	return 0;
}

static int remote_flush(void *self)
{
	(void)self;
	return 0;
}

static void remote_close(void *self)
{
	(void)self;
}

static struct far_mount *map_remote(enum far_mechanism mechanism)
{
	static const struct far_ops ops = { .size = sizeof ops, .read = remote_read, .write = remote_write, .flush = remote_flush,
					    .close = remote_close };
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_error err = { 0 };
	struct far_backend *b;
	struct far_mount *m;

	/* The second half is zeros, which no fill brings. */
	for (size_t i = 0; i < SIZE; i++)
		remote[i] = i < SIZE / 2 ? (char)(i / 4096 % 100 + 1) : 0;
	facts.bytes = SIZE;
	facts.caps = FAR_CAP_WRITE;
	assert_int_equal(far_backend_new(&ops, remote, &facts, &b), 0);
	o.mode = FAR_MODE_MANAGED;
	o.mechanism = mechanism;
	o.tracking = mechanism == FAR_MECH_CONTINUE ? FAR_TRACK_AUTO : FAR_TRACK_ASYNC; /* whatever tracks it well */
	o.push_workers = 0;
	if (far_map(b, &o, &m, &err))
		fail_msg("%s", err.text);
	assert_int_equal(far_mount_wait(m, 100, 20000), 0);
	assert_int_equal(far_mount_populate(m, 0, SIZE), 0);
	assert_int_equal(far_mount_flush(m), 0);
	writes = 0;
	return m;
}

static void finds(enum far_mechanism mechanism, unsigned needs)
{
	if ((far_uffd_have() & needs) != needs) {
		print_message("skipped: this kernel has not all of it\n");
		skip();
	}
	struct far_mount *m = map_remote(mechanism);
	char *p = far_addr(m);

	assert_int_equal(far_mount_flush(m), 0);
	assert_int_equal(writes, 0); /* filling is no store */
	memset(p + 5 * 4096, 'a', 10);
	memset(p + 3 * FAR_MIB + 7, 'b', 10);
	memset(p + SIZE / 2 + 9 * 4096, 'c', 10);
	/* Holes in the same huge pages: each is split, and its pages leave the program's page table. */
	assert_int_equal(far_mount_discard(m, FAR_MIB, CHUNK), 0);
	assert_int_equal(madvise(p + 2 * FAR_MIB + CHUNK, CHUNK, MADV_REMOVE) == 0 || mechanism != FAR_MECH_CONTINUE, 1);
	assert_int_equal(far_mount_discard(m, SIZE / 2 + 4 * CHUNK, CHUNK), 0);
	assert_int_equal(far_mount_flush(m), 0);
	assert_memory_equal(remote + 5 * 4096, "aaaaaaaaaa\6", 11);
	assert_memory_equal(remote + 3 * FAR_MIB + 7, "bbbbbbbbbb", 10);
	assert_memory_equal(remote + SIZE / 2 + 9 * 4096, "cccccccccc", 11);
	for (size_t i = 0; i < CHUNK; i++) {
		assert_int_equal(remote[FAR_MIB + i], 0);
		assert_int_equal(p[FAR_MIB + i], 0);
	}
	assert_int_equal(remote[FAR_MIB - 1], (FAR_MIB - 1) / 4096 % 100 + 1);
	assert_memory_equal(p, remote, SIZE);
	/* All is told, and not for ever: what the program has dropped is told once more. */
	assert_int_equal(far_mount_flush(m), 0);
	writes = 0;
	assert_int_equal(far_mount_flush(m), 0);
	assert_int_equal(writes, 0);
	p[5 * 4096] = 'd';
	assert_int_equal(far_mount_flush(m), 0);
	assert_int_equal(remote[5 * 4096], 'd');
	assert_int_equal(far_mount_close(m), 0);
}

static void continues(void **state)
{
	(void)state;
	finds(FAR_MECH_CONTINUE, FAR_UFFD_MINOR | FAR_UFFD_MINOR_WP | FAR_UFFD_WP_SHMEM | FAR_UFFD_HUGE | FAR_UFFD_WP_ASYNC);
}

static void moves(void **state)
{
	(void)state;
	finds(FAR_MECH_MOVE, FAR_UFFD_MOVE | FAR_UFFD_THP | FAR_UFFD_WP_ASYNC);
}

static void copies(void **state)
{
	(void)state;
	finds(FAR_MECH_COPY, FAR_UFFD_WP_ASYNC);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(continues), cmocka_unit_test(moves), cmocka_unit_test(copies),
	};

	return cmocka_run_group_tests_name("map_notes", tests, NULL, NULL);
}
