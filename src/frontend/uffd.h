/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The kernel's interface for serving page faults: what it can do here, found out once, and its calls in a form that
 * leaves nothing half done. Headers of older systems know neither MOVE, POISON, PAGEMAP_SCAN nor asynchronous
 * write-protection, so the definitions are here (sources: linux/userfaultfd.h and linux/fs.h of 6.18).
 */
#ifndef FAR_UFFD_H
#define FAR_UFFD_H

#include "base/base.h"

enum far_uffd_have {
	FAR_UFFD_ANY = 1 << 0,      /* userfaultfd works at all */
	FAR_UFFD_KERNEL = 1 << 1,   /* faults inside system calls are served */
	FAR_UFFD_WP = 1 << 2,       /* write-protection of private memory, by faults */
	FAR_UFFD_WP_SHMEM = 1 << 3, /* ... and of shared memory */
	FAR_UFFD_WP_ASYNC = 1 << 4, /* noted by the kernel, and PAGEMAP_SCAN reads it */
	FAR_UFFD_SCAN = 1 << 5,     /* PAGEMAP_SCAN */
	FAR_UFFD_MOVE = 1 << 6,
	FAR_UFFD_POISON = 1 << 7,
	FAR_UFFD_MINOR = 1 << 8,    /* minor faults of shared memory and UFFDIO_CONTINUE */
	FAR_UFFD_EVENTS = 1 << 9,   /* remap, remove, unmap */
	FAR_UFFD_FORK = 1 << 10,    /* fork (CAP_SYS_PTRACE) */
	FAR_UFFD_HUGE = 1 << 11,    /* shared memory in huge pages can be had (far_hugemem_open) */
	FAR_UFFD_MINOR_WP = 1 << 12, /* UFFDIO_CONTINUE can arm (6.4) */
	FAR_UFFD_THP = 1 << 13,     /* private memory in huge pages can be had (MADV_HUGEPAGE) */
	FAR_UFFD_COLLAPSE = 1 << 14, /* a huge page of shared memory can be shown in one step (MADV_COLLAPSE, 6.1; told by SCAN) */
};

/* What is here and not masked. FARPAGE_WITHOUT: a list of move, poison, wp_async, scan, wp, wp_shmem, minor, minor_wp,
 * collapse, huge, thp, events, fork, kernel, uffd, fuse, and 6.1: what Debian 12's own kernel lacks (move, poison, wp_async,
 * scan, minor_wp). Read and asked for at the first call. */
unsigned far_uffd_have(void);
/* The same with this list in place of the environment's, asked for anew: for tests. */
unsigned far_uffd_probe(const char *without);
/* One word for each bit of enum far_uffd_have. */
const char *far_uffd_word(unsigned bit);
/* Why it does not work, and what to do; "" if it does. */
const char *far_uffd_why(void);
/* Whether FARPAGE_WITHOUT names this word. */
bool far_without(const char *word);

/* A new descriptor, non-blocking, close-on-exec, with the API agreed on: events, and what `have` names of KERNEL,
 * WP, WP_SHMEM, WP_ASYNC, MOVE, POISON, MINOR, FORK. */
int far_uffd_open(unsigned have, int *fd);

enum far_uffd_mode { FAR_UFFD_MISSING = 1, FAR_UFFD_PROTECT = 2, FAR_UFFD_MINORS = 4 };
int far_uffd_register(int fd, uint64_t addr, uint64_t len, unsigned modes);
int far_uffd_unregister(int fd, uint64_t addr, uint64_t len);

/*
 * All of these wait out -EAGAIN (the mappings are changing) and go on after a partial transfer. *done, where there is
 * one, is how many bytes from the start were done, also on failure. Addresses and lengths are multiples of a page.
 *   -EEXIST  the page at *done is there already      -ENOENT  it is not registered any more (unmapped, moved)
 *   -ESRCH   the process is gone                      -EBUSY, -EINVAL (MOVE) the page cannot be moved; copy it
 *   -ETIMEDOUT the thread's deadline passed while the mappings were changing
 */
/* The mappings go on changing until the program's fork, mremap, munmap or madvise has had its event read. Before a call of
 * this thread waits for that for more than a moment, fn(arg) is called: a receiver leaves its seat there, so that another
 * reads the event. NULL: none. */
void far_uffd_on_wait(void (*fn)(void *arg), void *arg);
/* This thread is about to wait for something of that kind outside this file. */
void far_uffd_will_wait(void);

enum far_uffd_flag {
	FAR_UFFD_NO_WAKE = 1, /* whoever waits there goes on waiting */
	FAR_UFFD_ARM = 2,     /* the pages are write-protected as they appear */
	FAR_UFFD_ONCE = 4,    /* copy, move, continue: -EAGAIN rather than wait; *done bytes have been done all the same */
};
/* What a call that waits out -EAGAIN does in between; *turns is 0 at first. 0, or -ETIMEDOUT at the thread's deadline. */
int far_uffd_wait(unsigned *turns);
int far_uffd_copy(int fd, uint64_t addr, const void *src, uint64_t len, unsigned flags, uint64_t *done);
/* ARM costs a page of memory each: zeros are copied then. Asynchronous tracking needs none (see far_uffd_written). */
int far_uffd_zero(int fd, uint64_t addr, uint64_t len, unsigned flags, uint64_t *done);
int far_uffd_continue(int fd, uint64_t addr, uint64_t len, unsigned flags, uint64_t *done);
/* [addr, addr+len), whole huge pages of shared memory not registered with PROTECT, shows the file's huge pages there, every
 * byte of them; whoever waits goes on. False: not done, nothing has changed (then far_uffd_continue). */
bool far_uffd_show_huge(int fd, uint64_t addr, uint64_t len);
/* Holes in the source are passed over. Both ranges lie in this process; `addr` is registered with fd. */
int far_uffd_move(int fd, uint64_t addr, uint64_t src, uint64_t len, unsigned flags, uint64_t *done);
int far_uffd_poison(int fd, uint64_t addr, uint64_t len, uint64_t *done);
int far_uffd_protect(int fd, uint64_t addr, uint64_t len, bool protect, unsigned flags);
int far_uffd_wake(int fd, uint64_t addr, uint64_t len);

/* Runs of pages in [addr, addr+len) that were written since they were armed; re-armed in the same step if `arm`. Calls
 * fn for each; stops and returns what it returns if that is not 0, but not before all that was armed has been told.
 * Pages that are absent, or zeros nobody stored into (far_uffd_zero without ARM, a load from them), are not written;
 * poisoned ones are once, when they are first armed. pagemap: an open /proc/PID/pagemap. -EPERM: not registered with
 * PROTECT by a descriptor that has WP_ASYNC. */
int far_uffd_written(int pagemap, uint64_t addr, uint64_t len, bool arm,
		     int (*fn)(void *opaque, uint64_t addr, uint64_t len), void *opaque);
/* The same, three times as fast, where every page was filled with bytes and none was dropped or poisoned since: absent
 * pages and zeros would be told as written and be marked. */
int far_uffd_written_whole(int pagemap, uint64_t addr, uint64_t len, bool arm,
			   int (*fn)(void *opaque, uint64_t addr, uint64_t len), void *opaque);
/* Whether each page of [addr, addr+len) is here (in memory or swapped out): one bool a page. By reading the pagemap,
 * which every kernel has. A page that is only marked counts as here: poisoned, or protected by far_uffd_protect() while it
 * was absent (asynchronous tracking and shared memory). */
int far_uffd_present(int pagemap, uint64_t addr, uint64_t len, bool *here);

/* Whether it is in this mapping now: for shared memory, where a mark stays behind when a page goes. */
int far_uffd_mapped(int pagemap, uint64_t addr, uint64_t len, bool *here);
/* Whether the page at addr is mapped as part of a huge one. False where the kernel cannot tell. */
bool far_uffd_huge(int pagemap, uint64_t addr);

/* What read(2) of the descriptor gives, one at a time. */
struct far_uffd_event {
	enum { FAR_EVENT_MISSING, FAR_EVENT_MINOR, FAR_EVENT_STORE, FAR_EVENT_FORK, FAR_EVENT_REMAP, FAR_EVENT_REMOVE,
	       FAR_EVENT_UNMAP } kind;
	uint64_t addr, len; /* faults: the page and its size; else the range */
	uint64_t to;        /* REMAP: where it is now */
	bool write;         /* faults: by a store */
	int fd;             /* FORK: the child's userfaultfd, non-blocking, owned by who reads it */
};
/* 1: *e is set; 0: nothing there; -errno. */
int far_uffd_read(int fd, struct far_uffd_event *e);

/* A descriptor of shared memory in huge pages, len rounded up to 2 MiB, nothing in it allocated: from a tmpfs of our own
 * that is mounted nowhere (as root), or in a user namespace, or from memfd where the kernel gives those huge pages.
 * -EOPNOTSUPP: there are none here. */
int far_hugemem_open(uint64_t len, int *fd);

#endif
