/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* How a pointer is made: what is chosen from kernel, region and options, and what is refused when it is forced. */
#define _GNU_SOURCE
#include "frontend/pointer.h"

#include "frontend/uffd.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#define ALL ((FAR_UFFD_COLLAPSE << 1) - 1)
#define PULLS { .pull_workers = -1 }
#define LINUX_6_1 (ALL & ~(FAR_UFFD_MOVE | FAR_UFFD_POISON | FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN | FAR_UFFD_MINOR_WP | \
			  FAR_UFFD_COLLAPSE))

static const struct far_facts remote = { .size = sizeof(struct far_facts), .bytes = FAR_GIB,
					 .caps = FAR_CAP_WRITE | FAR_CAP_REMOTE };
static const struct far_facts near = { .size = sizeof(struct far_facts), .bytes = FAR_GIB,
				       .caps = FAR_CAP_WRITE | FAR_CAP_SHARE };
static const struct far_facts tiny = { .size = sizeof(struct far_facts), .bytes = 5000, .caps = FAR_CAP_WRITE };

static void touch(void *opaque, uint64_t off, uint64_t len)
{
	(void)opaque, (void)off, (void)len;
}

static const struct {
	unsigned have;
	const struct far_facts *facts;
	struct far_mount_opts opts;
	bool writable, managed;
	enum far_mechanism m;
	enum far_tracking t;
} chosen[] = {
	{ ALL, &remote, PULLS, true, true, FAR_MECH_MOVE, FAR_TRACK_ASYNC },
	{ ALL, &remote, PULLS, false, true, FAR_MECH_CONTINUE, FAR_TRACK_NONE }, /* a read-only map is not to be written to */
	{ ALL, &remote, PULLS, true, false, FAR_MECH_MOVE, FAR_TRACK_ASYNC },
	{ ALL, &remote, PULLS, false, false, FAR_MECH_COPY, FAR_TRACK_NONE },    /* not 2 MiB for each touch */
	{ ALL, &remote, { 0 }, false, true, FAR_MECH_COPY, FAR_TRACK_NONE },     /* nor where nobody pulls the rest */
	{ ALL, &remote, { .local_max = FAR_GIB }, true, true, FAR_MECH_COPY, FAR_TRACK_ASYNC },
	{ ALL, &remote, { .inherit = true, .pull_workers = -1 }, false, true, FAR_MECH_COPY, FAR_TRACK_NONE },
	{ ALL, &remote, { .outside = true, .pull_workers = -1 }, true, true, FAR_MECH_COPY, FAR_TRACK_ASYNC },
	{ ALL, &tiny, PULLS, true, true, FAR_MECH_COPY, FAR_TRACK_ASYNC },
	{ ALL, &near, PULLS, true, false, FAR_MECH_SHARE, FAR_TRACK_NONE },
	{ 0, &near, PULLS, true, false, FAR_MECH_SHARE, FAR_TRACK_NONE },
	{ ALL, &near, PULLS, true, true, FAR_MECH_MOVE, FAR_TRACK_ASYNC },
	{ ALL, &near, { .inherit = true }, false, false, FAR_MECH_COPY, FAR_TRACK_NONE },
	{ ALL, &near, { .record_order = "x" }, true, false, FAR_MECH_MOVE, FAR_TRACK_ASYNC },
	{ ALL, &near, { .chunk_local = touch }, false, false, FAR_MECH_COPY, FAR_TRACK_NONE },
	{ ALL & ~FAR_UFFD_MOVE, &remote, PULLS, true, true, FAR_MECH_COPY, FAR_TRACK_ASYNC },
	{ ALL & ~FAR_UFFD_MOVE, &remote, PULLS, true, false, FAR_MECH_COPY, FAR_TRACK_ASYNC },
	{ ALL & ~(FAR_UFFD_MOVE | FAR_UFFD_HUGE), &remote, PULLS, true, true, FAR_MECH_COPY, FAR_TRACK_ASYNC },
	{ ALL & ~FAR_UFFD_MOVE, &remote, { .local_max = FAR_GIB }, true, true, FAR_MECH_COPY, FAR_TRACK_SYNC },
	{ ALL & ~FAR_UFFD_THP, &remote, PULLS, true, true, FAR_MECH_COPY, FAR_TRACK_ASYNC },
	{ ALL & ~(FAR_UFFD_MOVE | FAR_UFFD_WP_ASYNC), &remote, PULLS, true, true, FAR_MECH_CONTINUE, FAR_TRACK_SYNC },
	{ LINUX_6_1, &remote, PULLS, false, true, FAR_MECH_CONTINUE, FAR_TRACK_NONE },
	{ LINUX_6_1, &remote, PULLS, true, true, FAR_MECH_COPY, FAR_TRACK_SYNC },
	/* System calls that store into clean pages would fail: no synchronous tracking in user mode. */
	{ LINUX_6_1 & ~FAR_UFFD_KERNEL, &remote, PULLS, true, true, FAR_MECH_COPY, FAR_TRACK_HASH },
	{ ALL & ~FAR_UFFD_KERNEL, &remote, PULLS, true, true, FAR_MECH_MOVE, FAR_TRACK_ASYNC },
	{ FAR_UFFD_ANY, &remote, PULLS, true, true, FAR_MECH_COPY, FAR_TRACK_HASH },
	{ 0, &remote, PULLS, false, true, FAR_MECH_SIGSEGV, FAR_TRACK_NONE },
	/* forced */
	{ ALL, &remote, { .mechanism = FAR_MECH_COPY, .tracking = FAR_TRACK_SYNC }, true, true, FAR_MECH_COPY, FAR_TRACK_SYNC },
	{ ALL, &remote, { .mechanism = FAR_MECH_MOVE }, false, true, FAR_MECH_MOVE, FAR_TRACK_NONE },
	{ ALL, &remote, { .mechanism = FAR_MECH_MOVE, .tracking = FAR_TRACK_HASH }, true, true, FAR_MECH_MOVE, FAR_TRACK_HASH },
	{ ALL, &tiny, { .mechanism = FAR_MECH_CONTINUE }, true, true, FAR_MECH_CONTINUE, FAR_TRACK_SYNC },
	{ LINUX_6_1, &remote, { .mechanism = FAR_MECH_CONTINUE }, true, true, FAR_MECH_CONTINUE, FAR_TRACK_HASH },
	{ ALL, &remote, { .mechanism = FAR_MECH_SIGSEGV }, false, true, FAR_MECH_SIGSEGV, FAR_TRACK_NONE },
	{ ALL, &near, { .mechanism = FAR_MECH_SHARE, .record_order = "x" }, true, false, FAR_MECH_SHARE, FAR_TRACK_NONE },
};

static void chooses(void **state)
{
	(void)state;
	for (size_t i = 0; i < FAR_ARRAY_LEN(chosen); i++) {
		enum far_mechanism m = FAR_MECH_AUTO;
		enum far_tracking t = FAR_TRACK_AUTO;
		struct far_error err = { 0 };
		if (far_pointer_settle(chosen[i].have, chosen[i].facts, &chosen[i].opts, chosen[i].writable, chosen[i].managed,
				       &m, &t, &err))
			fail_msg("row %zu: %s", i, err.text);
		if (m != chosen[i].m || t != chosen[i].t)
			fail_msg("row %zu: %s, %s", i, far_mechanism_word(m), far_tracking_word(t));
	}
}

static const struct {
	unsigned have;
	const struct far_facts *facts;
	struct far_mount_opts opts;
	bool writable, managed;
	const char *says;
} refused[] = {
	{ 0, &remote, { 0 }, true, true, "a writable pointer needs userfaultfd" },
	{ LINUX_6_1, &remote, { .mechanism = FAR_MECH_MOVE }, false, true, "UFFDIO_MOVE (6.8)" },
	{ ALL & ~FAR_UFFD_HUGE, &remote, { .mechanism = FAR_MECH_CONTINUE }, false, true, "in huge pages" },
	{ ALL, &remote, { .mechanism = FAR_MECH_CONTINUE, .inherit = true }, false, true, "a child" },
	{ ALL, &remote, { .mechanism = FAR_MECH_SHARE }, false, false, "no pages of its own" },
	{ ALL, &near, { .mechanism = FAR_MECH_SHARE }, false, true, "local copy" },
	{ ALL, &remote, { .mechanism = FAR_MECH_SIGSEGV }, true, true, "read-only" },
	{ 0, &remote, { .mechanism = FAR_MECH_COPY }, false, true, "userfaultfd" },
	{ ALL, &remote, { .mechanism = (enum far_mechanism)99 }, false, true, "no such mechanism" },
	{ LINUX_6_1, &remote, { .tracking = FAR_TRACK_ASYNC }, true, true, "(6.7)" },
	{ LINUX_6_1, &remote, { .mechanism = FAR_MECH_CONTINUE, .tracking = FAR_TRACK_SYNC }, true, true, "hash works" },
	{ ALL, &remote, { .mechanism = FAR_MECH_MOVE, .tracking = FAR_TRACK_SYNC }, true, true, "async and hash work" },
	{ LINUX_6_1 & ~FAR_UFFD_KERNEL, &remote, { .local_max = FAR_GIB }, true, true, "UFFDIO_MOVE (6.8)" },
	{ LINUX_6_1, &remote, { .local_max = FAR_GIB, .tracking = FAR_TRACK_HASH }, true, true, "synchronous" },
	{ FAR_UFFD_ANY, &remote, { .tracking = FAR_TRACK_SYNC }, true, true, "(5.7)" },
	{ ALL, &remote, { .tracking = FAR_TRACK_NONE }, true, true, "writable" },
};

static void refuses(void **state)
{
	(void)state;
	for (size_t i = 0; i < FAR_ARRAY_LEN(refused); i++) {
		enum far_mechanism m;
		enum far_tracking t;
		struct far_error err = { 0 };
		int r = far_pointer_settle(refused[i].have, refused[i].facts, &refused[i].opts, refused[i].writable,
					   refused[i].managed, &m, &t, &err);
		if (r != -EOPNOTSUPP || !strstr(err.text, refused[i].says))
			fail_msg("row %zu: %d, '%s'", i, r, err.text);
	}
}

static void words(void **state)
{
	struct far_mount_opts opts = { 0 };

	(void)state;
	assert_string_equal(far_mechanism_word(FAR_MECH_CONTINUE), "continue");
	assert_string_equal(far_mechanism_word((enum far_mechanism)99), "?");
	assert_string_equal(far_tracking_word(FAR_TRACK_HASH), "hash");
	assert_string_equal(far_tracking_word((enum far_tracking)99), "?");
	for (enum far_mechanism m = FAR_MECH_SHARE; m <= FAR_MECH_SIGSEGV; m++)
		assert_string_not_equal(far_pointer_words(m), far_pointer_words(FAR_MECH_AUTO));
	assert_string_equal(far_pointer_why_not(ALL, &remote, &opts, true, true, FAR_MECH_MOVE), "");
	assert_string_not_equal(far_pointer_why_not(ALL, &remote, &opts, false, true, FAR_MECH_MOVE), "");
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(chooses), cmocka_unit_test(refuses), cmocka_unit_test(words),
	};

	return cmocka_run_group_tests_name("choose", tests, NULL, NULL);
}
