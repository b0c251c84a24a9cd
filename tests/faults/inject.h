/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Faults of memory and disk, put between farpage and the C library by the linker (--wrap, see meson.build): whatever the
 * library asks for passes through here. What the C library does inside itself does not; calls that allocate there
 * (fopen, getaddrinfo ...) count as one allocation. nghttp2 allocates through hooks of ours, json-c's makers count each.
 */
#ifndef FAR_TEST_INJECT_H
#define FAR_TEST_INJECT_H

#include "base/base.h"

/* ---------------------------------------------------------------------------------------------------- allocations */

enum inject_scope {
	INJECT_THREAD,  /* of the thread that begins: the same each time */
	INJECT_PROCESS, /* of all threads, as they come */
};

/* From now on the n-th allocation fails (0: none), and with `all` every later one too. */
void inject_begin(unsigned n, enum inject_scope scope, bool all);
/* Nothing fails any more. Whether something had failed. */
bool inject_end(void);
/* What this thread allocates is not counted: the test's own. */
void inject_pause(bool on);

/* For leaks that the address sanitizer does not see. */
unsigned inject_open_files(void);
unsigned inject_threads(void);
/* The process ends with a message if this is not called again in time; 0: no more. */
void inject_watch(const char *what, unsigned n, unsigned seconds);

/* ----------------------------------------------------------------------------------------------------------- disks */

enum inject_op {
	INJECT_PREAD,
	INJECT_PWRITE,
	INJECT_SYNC,  /* fdatasync, fsync */
	INJECT_PUNCH, /* fallocate: [off, off+len) reads as zeros afterwards */
	INJECT_TRUNCATE, /* to off bytes */
};
struct inject_io {
	enum inject_op op;
	int fd;
	uint64_t off;
	size_t len;      /* before(): may be made smaller, then that much is transferred (0: as at the end of the file) */
	const void *buf; /* PWRITE */
};
struct inject_hooks {
	/* Before the kernel is asked: errno to fail, 0 to go on. Any thread. */
	int (*before)(void *opaque, struct inject_io *io);
	/* After it did it, under the same lock when `serial`. */
	void (*after)(void *opaque, const struct inject_io *io);
	void *opaque;
	bool serial; /* one call at a time, so that after() sees the order in which things happened */
};
/* NULL: none. Not while calls run. Concern whatever file is used; the hooks look at fd. */
void inject_hooks(const struct inject_hooks *h);
/* Whether fd is the file at that path. */
bool inject_is(int fd, const char *path);

#endif
