/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The file frontend: one file whose content is a backend's, served through FUSE. */
#ifndef FAR_FUSE_H
#define FAR_FUSE_H

#include "base/base.h"

struct far_fuse;

struct far_fuse_conf {
	struct far_backend *b;   /* stays the caller's; read with FAR_NOWAIT first, see crew.h */
	const char *target;      /* an existing directory or file */
	const char *name;        /* of the file inside a directory; no '/' */
	const char *source;      /* what `mount` shows */
	bool read_only;
	bool pulling;            /* only a part is local yet; far_fuse_all_local() says when that is over */
	bool keep_cache;         /* nobody else changes the content: the page cache outlives an open. Else each open drops
				  * it, and for that waits for every cached read that is under way */
	bool changing;           /* somebody else may change it: no handle passes through, so that far_fuse_not_local() can't fail */
	unsigned max_blocked;    /* threads that may wait for b; what is more is parked. 0: 256 */
	uint64_t deadline;       /* ns a request may take; FAR_NEVER: no limit */
};

/* Mounted and served by threads of its own when it returns 0. -ENOENT: /dev/fuse or the target is missing; -EPERM,
 * -EBUSY ...: the sentence says what to do. */
int far_fuse_open(const struct far_fuse_conf *conf, struct far_fuse **out, struct far_error *err);
const char *far_fuse_path(const struct far_fuse *f); /* absolute, of the file */
/* Drop what the page cache holds of [off, off+len); len 0: to the end. From a thread that serves nothing. */
int far_fuse_invalidate(struct far_fuse *f, uint64_t off, uint64_t len);
/* Everything is local now, so the kernel may read further ahead. If `local` is not NULL, every byte stays in it from now
 * on, until far_fuse_not_local(): read straight from its pages if it shows them, and on a read-only mount of root's let the
 * kernel do even that by itself. It stays the caller's. Any thread. */
void far_fuse_all_local(struct far_fuse *f, struct far_backend *local);
/* Something is about to be evicted: after 0 nothing reads straight from local's pages any more. -EBUSY: a program has
 * opened the file so that the kernel does. */
int far_fuse_not_local(struct far_fuse *f);
/* Calls that wait for the backend now. */
unsigned far_fuse_blocked(const struct far_fuse *f);
/* Unmount: 0, or -EBUSY while a program holds the file (nothing has changed then). */
int far_fuse_unmount(struct far_fuse *f);
/* Detach lazily: the path is free at once, open handles are served until they close. */
int far_fuse_detach(struct far_fuse *f);
/* Wait until it is unmounted by whomever and the last handle is closed, at most until `until`. False: not yet. */
bool far_fuse_wait(struct far_fuse *f, uint64_t until);
/* Abort what is left (programs get errors), unmount, end the threads, free. Waits for calls that are in the backend:
 * far_stop() it first to end those. */
void far_fuse_close(struct far_fuse *f);

#endif
