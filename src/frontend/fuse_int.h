/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What fuse.c (mount, receivers, end) and fuse_ops.c (the answers) share. */
#ifndef FAR_FUSE_INT_H
#define FAR_FUSE_INT_H

#define FUSE_USE_VERSION 312

#include "backend/backend.h"
#include "base/crew.h"
#include "base/thread.h"

#include <fuse3/fuse_lowlevel.h>
#include <stdatomic.h>
#include <sys/types.h>
#include <sys/uio.h>

#define FUSE_IO_MAX ((size_t)1 << 20) /* of one request: the kernel's limit of 256 pages */
#define FUSE_IN (FUSE_IO_MAX + 2 * 4096)
#define FUSE_INO_FILE 2 /* in a directory; as a file mount the root, 1, is the file */
#define FUSE_PAGE ((size_t)4096)

struct fuse_call;

struct fuse_seat {
	struct far_fuse *f;
	struct far_seat *seat; /* of the thread that sits */
	char *in;              /* FUSE_IN bytes, or NULL */
	void *out;             /* FUSE_IO_MAX bytes, or NULL */
};

struct far_fuse {
	/* fixed after open */
	struct far_backend *b;
	uint64_t bytes, deadline;
	char *target, *path, *name;
	bool dir, read_only, keep_cache, changing;
	unsigned max_blocked;
	uid_t uid;
	gid_t gid;
	fuse_ino_t ino;
	struct fuse_session *se;
	struct far_crew *crew;
	unsigned major, minor;
	int fd;                 /* of the connection; the session's */
	int abort_fd, poll_fd;  /* one of them is >= 0 */
	unsigned n_seats;
	struct fuse_seat *seats;
	/* atomic */
	_Atomic unsigned blocked;
	_Atomic unsigned writers; /* handles open for writing */
	_Atomic bool ready;       /* the kernel has had the answer to INIT */
	/* The backend's own pages, mapped for reading; NULL if it does not show them, or not now. A reader counts itself in
	 * share_users before it loads the pointer, so that far_fuse_not_local() can wait for it: both seq_cst. */
	_Atomic(const char *) share;
	_Atomic unsigned share_users;
	_Atomic bool told; /* far_fuse_all_local() was called */
	char *mapped; /* what share pointed to first; unmapped at close */
	_Atomic int64_t mtime, atime, ctime; /* ns since 1970; relaxed: nothing hangs on their order */
	struct far_mutex lock;
	struct far_cond changed;
	unsigned live FAR_GUARDED_BY(lock); /* seats that have not ended */
	bool detached FAR_GUARDED_BY(lock); /* the path is not ours any more */
	/* Passthrough, see fuse_pass.c. */
	bool can_pass;  /* the kernel offered it and we took it; set while INIT is answered, read after `ready` */
	int share_fd;   /* whose pages `mapped` is; the backend's */
	int32_t backing FAR_GUARDED_BY(lock);     /* > 0: opens may pass through to it */
	unsigned cached FAR_GUARDED_BY(lock), passed FAR_GUARDED_BY(lock); /* handles of either kind */
	bool evicts FAR_GUARDED_BY(lock);   /* far_fuse_not_local() was called */
	struct fuse_call *killable FAR_GUARDED_BY(lock); /* calls that fuse_killed() may answer */
};

extern const struct fuse_lowlevel_ops far_fuse_ops;

/* fuse_pass.c: look at the INIT request; the hook through which libfuse writes; make share_fd one that opens may pass
 * through to; answer an open, 0 or as fuse_reply_open(); a handle was released. */
void far_fuse_pass_init(struct far_fuse *f, const void *request, size_t n);
ssize_t far_fuse_pass_writev(int fd, struct iovec *iov, int n, void *f);
void far_fuse_pass_offer(struct far_fuse *f);
int far_fuse_pass_open(struct far_fuse *f, fuse_req_t req, struct fuse_file_info *fi);
void far_fuse_pass_release(struct far_fuse *f, const struct fuse_file_info *fi);

/* Carry out the request of n bytes that was received at s->in + far_fuse_ops_skip(). Afterwards the seat may be another
 * thread's. True: a small read was answered, so somebody waits for each of them. */
bool far_fuse_ops_process(struct fuse_seat *s, struct far_seat *seat, size_t n);
size_t far_fuse_ops_skip(void);
/* Whether this thread is one that serves. */
bool far_fuse_ops_here(void);
/* All three times of the file are now. */
void far_fuse_ops_touch(struct far_fuse *f);

#endif
