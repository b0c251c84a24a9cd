/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Where userfaultfd is refused altogether: a view of shared memory that is PROT_NONE where nothing has been filled in. A
 * handler of SIGSEGV waits until it has been, through another mapping, and mprotect(2) has opened the view; other signals
 * of the program's own go on to its own handler. Read-only. System calls that are given absent memory fail with EFAULT:
 * far_mount_populate() first. A program that installs a handler of its own for SIGSEGV afterwards takes ours away.
 */
#ifndef FAR_SEGV_H
#define FAR_SEGV_H

#include "base/base.h"

struct far_segv;
/* `shared`: a descriptor of the region's memory, len bytes; borrowed. chunk: a power of two, at least a page. fill(opaque,
 * off) makes the chunk of `off` hold its bytes and calls far_segv_show() for it while it cannot go away: 0, or -errno:
 * then the thread that touched it gets SIGBUS. It runs on threads of ours, many at once, and may block.
 * -EOPNOTSUPP: not on this machine. */
int far_segv_open(int shared, uint64_t len, uint64_t chunk, void *address, int (*fill)(void *opaque, uint64_t off),
		  void *opaque, struct far_segv **out, struct far_error *err);
char *far_segv_addr(const struct far_segv *s);
/* [off, off+len), whole chunks, has been filled: open it. Any thread. 0 or -errno: it stays closed. */
int far_segv_show(struct far_segv *s, uint64_t off, uint64_t len);
/* Close it again, before its bytes go away. A touch calls fill again. */
int far_segv_hide(struct far_segv *s, uint64_t off, uint64_t len);
bool far_segv_shown(const struct far_segv *s, uint64_t off); /* a guess */
uint64_t far_segv_faults(const struct far_segv *s);
/* How many threads wait; of the first `max` where and since when (far_now()), in no order. */
unsigned far_segv_blocked(const struct far_segv *s, uint64_t *off, uint64_t *since, unsigned max);
/* Touches of what is closed raise SIGBUS from now on. fill must end soon by itself. */
void far_segv_stop(struct far_segv *s);
/* Stops, waits until no thread is in fill, takes the view away. */
void far_segv_close(struct far_segv *s);

#endif
