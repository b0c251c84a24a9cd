/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What the tests of this folder share: a remote in memory, a region over it, and a model that knows which bytes may be
 * read after calls of which some failed. */
#ifndef FAR_TEST_RIG_H
#define FAR_TEST_RIG_H

#include "base/clock.h"
#include "base/thread.h"
#include "region/region.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "inject.h"

#define RIG_CHUNK 4096u

/* A remote: bytes, and hooks that see each change in order. */
struct rig_remote {
	struct far_mutex lock;
	unsigned char *data;
	uint64_t bytes;
	uint64_t instance, version;
	void (*wrote)(void *opaque, uint64_t off, const void *buf, size_t len); /* under lock; NULL: nobody looks */
	void (*flushed)(void *opaque);
	void *opaque;
};
void rig_remote_init(struct rig_remote *s, uint64_t bytes);
void rig_remote_fini(struct rig_remote *s);
/* Another object over the same bytes each time. */
struct far_backend *rig_remote_backend(struct rig_remote *s);

/*
 * The model: for each byte the set of values that it may have. A call that succeeded leaves one; one that failed adds
 * what it tried to write. A value that was read once stays: what flips back later was wrong the first time.
 */
struct rig_model {
	unsigned char *want; /* one value of the set */
	uint64_t *set;       /* 4 words a byte */
	uint64_t bytes;
};
void rig_model_init(struct rig_model *m, const unsigned char *data, uint64_t bytes);
void rig_model_fini(struct rig_model *m);
/* A write of these bytes (NULL: zeros) returned err. */
void rig_model_wrote(struct rig_model *m, uint64_t off, const unsigned char *buf, uint64_t len, int err);
/* `to` may be all that `from` may. */
void rig_model_copy(struct rig_model *to, const struct rig_model *from);
/* These were read. Fails the test, saying where, if they may not be there. */
void rig_model_read(struct rig_model *m, uint64_t off, const unsigned char *buf, uint64_t len, const char *what);

/* No background work; a call may take 10 s. */
struct far_mount_opts rig_quiet(void);
/* Content of version v at off. */
void rig_fill(unsigned char *buf, uint64_t off, size_t len, unsigned v);

/* Run `call` again and again, the n-th allocation failing, n = 1, 2 ... until none did; then the same with all from the
 * n-th on failing. A failure must be -ENOMEM or -EAGAIN with a sentence. `after` looks at what is left and tidies up; it
 * gets the call's result. */
struct rig_case {
	const char *what;
	enum inject_scope scope;
	int (*call)(void *ctx, struct far_error *err);
	void (*after)(void *ctx, int r);
	void *ctx;
	bool no_text; /* has no struct far_error */
	bool once;    /* not the second form: it takes long */
	unsigned most; /* more rounds than this mean that it never ends; 0: 2000 */
};
void rig_each_allocation(const struct rig_case *c);
/* Threads or descriptors that were left behind since `files`, `threads` were counted; threads get time to end. */
void rig_no_leak(const char *what, unsigned files, unsigned threads);

#endif
