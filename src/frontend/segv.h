/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Where userfaultfd is refused altogether: memory whose pages are PROT_NONE until they are filled. A handler of SIGSEGV
 * fills them through a second mapping and opens them with mprotect(2); other signals of the program's own go on to its own
 * handler. Read-only. System calls that are given absent memory fail with EFAULT: far_mount_populate() first.
 */
#ifndef FAR_SEGV_H
#define FAR_SEGV_H

#include "backend/backend.h"

struct far_segv;
/* `shared`: a memfd that is the region's memory, len bytes in whole pages. fill(opaque, off) makes the chunk of `off`
 * local in it: 0, or -errno: then the thread gets SIGBUS. It runs on the thread that faulted, in a signal handler: it may
 * take only locks of its own that are never held while the memory is touched. */
int far_segv_open(int shared, uint64_t len, uint64_t chunk, void *address, int (*fill)(void *opaque, uint64_t off),
		  void *opaque, struct far_segv **out, struct far_error *err);
char *far_segv_addr(const struct far_segv *s);
/* [off, off+len) has been filled: open it. Any thread. */
int far_segv_show(struct far_segv *s, uint64_t off, uint64_t len);
/* Close it again (evicted). */
int far_segv_hide(struct far_segv *s, uint64_t off, uint64_t len);
void far_segv_close(struct far_segv *s);

#endif
