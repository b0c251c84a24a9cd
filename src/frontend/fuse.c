/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One file whose content is a backend's, through FUSE. We mount (fuse_mount.c), libfuse lays out the messages, and our
 * own receivers carry them: a seat of the crew on each CPU, all reading the same descriptor, because waking another
 * CPU costs more than answering.
 *
 * A receiver answers what is local at once: FAR_NOWAIT. On -EAGAIN, and for everything that may take long (flush,
 * punch, seek), it makes a *call* of the request, leaves the seat to a spare, and carries the call out where it may
 * block. If all threads are taken, the call is parked: its header, and for a write the receive buffer with the data.
 * Either way there is one reply to each request, by fuse_answer(), no later than the deadline allows.
 *
 *     receive -> answered at once          fuse_op_read(), fuse_op_write()
 *     receive -> leave -> fuse_answer()    fuse_call()
 *     receive -> park -> fuse_parked()     fuse_call(), when far_crew_leave() refused
 *
 * The end: the kernel answers ENODEV to every receiver when the last user of the mount is gone (unmounted, or detached
 * and closed), or at once when the connection is aborted. Then all seats end and `live` falls to 0. Where the abort
 * file cannot be reached, receivers poll an eventfd beside the connection instead (`poll_fd`).
 *
 * Invariants:
 *  1. A thread that has left its seat touches the seat's buffers no more: its successor receives into them. A write
 *     takes the receive buffer along (fuse_take()).
 *  2. No thread that serves touches the mount: device numbers come from mountinfo, not from stat(2).
 *  3. Sizes never change, so the kernel never has to be told of one; times are the only attribute that moves.
 *  4. While a handle is open for writing, pages may be dirty in the page cache that no WRITE has told us of: then
 *     lseek(SEEK_DATA) calls everything data. The kernel writes all dirty pages back before the last such handle goes.
 */
#define FUSE_USE_VERSION 312
#define _GNU_SOURCE
#include "frontend/fuse.h"

#include "backend/backend.h"
#include "base/clock.h"
#include "base/crew.h"
#include "base/pool.h"
#include "base/thread.h"
#include "frontend/fuse_mount.h"

#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

#define FUSE_FOREVER 86400.0 /* seconds that the kernel may keep names and attributes */
#define FUSE_INO_FILE 2      /* in a directory; as a file mount the root, 1, is the file */
#define FUSE_IO_MAX ((size_t)1 << 20) /* of one request: the kernel's limit of 256 pages */
#define FUSE_IN (FUSE_IO_MAX + 2 * 4096)
#define FUSE_IN_SKIP (4096 - sizeof(struct fuse_in_header) - sizeof(struct fuse_write_in)) /* aligns a write's data */
#define FUSE_EXTENTS 64
#define FUSE_INIT_WAIT (10 * FAR_SEC)
#define FUSE_SHARE_MIN ((size_t)32 << 10) /* below, a copy costs less than the look whether the pages are there */
#define FUSE_PAGE ((size_t)4096)
#define FUSE_BACKGROUND 4096
/* KiB that the kernel reads ahead. Two requests of 1 MiB at once keep two CPUs busy; across a network a fault in a mapping
 * waits for all of it. While a puller is at work it is the one that reads ahead, and in larger pieces. */
#define FUSE_AHEAD_LOCAL 2048
#define FUSE_AHEAD_REMOTE 1024
#define FUSE_AHEAD_PULLING 256

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
	bool dir, read_only, keep_cache;
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
	/* The backend's own pages, mapped for reading; NULL if it does not show them. Set once, release; acquire in reads. */
	_Atomic(const char *) share;
	_Atomic int64_t mtime, atime, ctime; /* ns since 1970; relaxed: nothing hangs on their order */
	struct far_mutex lock;
	struct far_cond changed;
	unsigned live FAR_GUARDED_BY(lock); /* seats that have not ended */
	bool detached FAR_GUARDED_BY(lock); /* the path is not ours any more */
};

enum fuse_what { FUSE_CALL_READ, FUSE_CALL_WRITE, FUSE_CALL_FLUSH, FUSE_CALL_DISCARD, FUSE_CALL_ZERO, FUSE_CALL_SEEK };

/* A request that may block, on its way through leave or park. */
struct fuse_call {
	struct far_fuse *f;
	fuse_req_t req;
	enum fuse_what what;
	uint64_t off, len, until;
	int whence;
	const void *data; /* of a write, inside mem */
	void *mem;        /* a receive buffer, given back after the answer */
};

/* The seat this thread receives at, while it does. */
static _Thread_local struct fuse_seat *fuse_here;
static _Thread_local bool fuse_thread_ready;
static _Thread_local bool fuse_small; /* what it answered last was a small read: somebody waits for each of them */

/* ---------------------------------------------------------------------------------------------- small things */

/* What a program sees. */
static int fuse_errno(int r)
{
	switch (-r) {
	case ENOSPC:
	case EROFS:
	case ESTALE:
	case EDQUOT:
	case ENOMEM:
	case EOPNOTSUPP:
	case ENXIO:
		return -r;
	default:
		return EIO;
	}
}

static int64_t fuse_clock(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_REALTIME_COARSE, &ts);
	return (int64_t)ts.tv_sec * (int64_t)FAR_SEC + ts.tv_nsec;
}

static struct timespec fuse_timespec(int64_t ns)
{
	int64_t s = ns / (int64_t)FAR_SEC, rest = ns % (int64_t)FAR_SEC;
	if (rest < 0) {
		s--;
		rest += (int64_t)FAR_SEC;
	}
	return (struct timespec){ .tv_sec = (time_t)s, .tv_nsec = (long)rest };
}

static void fuse_modified(struct far_fuse *f)
{
	int64_t now = fuse_clock();
	atomic_store_explicit(&f->mtime, now, memory_order_relaxed);
	atomic_store_explicit(&f->ctime, now, memory_order_relaxed);
}

static void fuse_log_line(enum fuse_log_level level, const char *fmt, va_list ap)
{
	char text[300];
	int n = vsnprintf(text, sizeof text, fmt, ap);

	if (n > 0 && (size_t)n < sizeof text && text[n - 1] == '\n')
		text[n - 1] = 0;
	far_log(FAR_LOG_DEBUG, "libfuse: %s", text);
}

static void fuse_stat(const struct far_fuse *f, fuse_ino_t ino, struct stat *st)
{
	*st = (struct stat){ .st_ino = ino, .st_nlink = 1, .st_uid = f->uid, .st_gid = f->gid, .st_blksize = 4096 };
	st->st_mtim = fuse_timespec(atomic_load_explicit(&f->mtime, memory_order_relaxed));
	st->st_atim = fuse_timespec(atomic_load_explicit(&f->atime, memory_order_relaxed));
	st->st_ctim = fuse_timespec(atomic_load_explicit(&f->ctime, memory_order_relaxed));
	if (ino == f->ino) {
		st->st_mode = S_IFREG | (f->read_only ? 0400 : 0600);
		st->st_size = (off_t)f->bytes;
		st->st_blocks = (blkcnt_t)far_div_up(f->bytes, 512);
	} else {
		st->st_mode = S_IFDIR | (f->read_only ? 0500 : 0700);
		st->st_nlink = 2;
	}
}

/* ------------------------------------------------------------------------------------------ calls that block */

/* The end of a run of one kind from `off` on, and whether it is zeros. */
static int fuse_run_of(struct far_fuse *f, uint64_t off, uint64_t *end, bool *zero)
{
	struct far_extent e[FUSE_EXTENTS];
	uint64_t at = off;
	size_t n;

	for (;;) {
		int r = far_extents(f->b, at, f->bytes - at, e, FUSE_EXTENTS, &n);
		if (r)
			return r;
		for (size_t i = 0; i < n; i++) {
			bool z = e[i].kind == FAR_EXTENT_ZERO;
			if (at == off)
				*zero = z;
			else if (z != *zero)
				goto out;
			at = e[i].off + e[i].len;
		}
		if (at >= f->bytes)
			break;
	}
out:
	*end = at;
	return 0;
}

static void fuse_seek(const struct fuse_call *c)
{
	struct far_fuse *f = c->f;
	uint64_t off = c->off, end = f->bytes;
	bool zero = false;
	int r = 0;

	if (off >= f->bytes) {
		fuse_reply_err(c->req, ENXIO);
		return;
	}
	if (atomic_load(&f->writers) == 0)
		r = fuse_run_of(f, off, &end, &zero);
	if (!r && zero != (c->whence == SEEK_HOLE)) {
		off = end; /* runs alternate: what was asked for starts where this one ends */
		if (off >= f->bytes && c->whence == SEEK_DATA)
			r = -ENXIO;
	}
	if (r)
		fuse_reply_err(c->req, fuse_errno(r));
	else
		fuse_reply_lseek(c->req, (off_t)off);
}

static void fuse_answer_read(const struct fuse_call *c)
{
	void *buf = far_buf_get(c->len);
	int r = buf ? far_read(c->f->b, c->off, buf, c->len, 0) : -ENOMEM;

	if (r)
		fuse_reply_err(c->req, fuse_errno(r));
	else
		fuse_reply_buf(c->req, buf, c->len);
	far_buf_put(buf, c->len);
}

/* Carry the call out, reply, and give back what it holds. */
static void fuse_answer(struct fuse_call *c)
{
	struct far_fuse *f = c->f;
	uint64_t old = far_deadline_limit(c->until);
	int r = 0;

	switch (c->what) {
	case FUSE_CALL_READ:
		fuse_answer_read(c);
		break;
	case FUSE_CALL_WRITE:
		r = far_write(f->b, c->off, c->data, c->len, 0);
		if (r)
			fuse_reply_err(c->req, fuse_errno(r));
		else
			fuse_reply_write(c->req, c->len);
		break;
	case FUSE_CALL_SEEK:
		fuse_seek(c);
		break;
	case FUSE_CALL_FLUSH:
		r = far_flush(f->b);
		fuse_reply_err(c->req, r ? fuse_errno(r) : 0);
		break;
	case FUSE_CALL_DISCARD:
	case FUSE_CALL_ZERO:
		r = c->what == FUSE_CALL_ZERO ? far_zero(f->b, c->off, c->len, 0) :
						far_discard(f->b, c->off, c->len, 0);
		fuse_reply_err(c->req, r ? fuse_errno(r) : 0);
		break;
	}
	far_deadline_restore(old);
	far_buf_put(c->mem, FUSE_IN);
	atomic_fetch_sub(&f->blocked, 1);
}

static void fuse_parked(void *arg)
{
	struct fuse_call *c = arg;

	fuse_answer(c);
	free(c);
}

/* Take the receive buffer along: the seat's next receive makes itself a new one. */
static void fuse_take(struct fuse_seat *s, struct fuse_call *c)
{
	c->mem = s->in;
	s->in = NULL;
}

/* From a handler, its last act: the request may block from here on. */
static void fuse_call(struct fuse_call c)
{
	struct fuse_seat *s = fuse_here;
	struct far_fuse *f = c.f;

	/* A flush moves all that was written since the last one, however long that takes; the calls below it that wait for
	 * the remote have deadlines of their own. */
	bool unlimited = f->deadline == FAR_NEVER || c.what == FUSE_CALL_FLUSH;
	c.until = unlimited ? FAR_NEVER : far_now() + f->deadline;
	atomic_fetch_add(&f->blocked, 1);
	if (c.what == FUSE_CALL_WRITE)
		fuse_take(s, &c);
	if (far_crew_leave(s->seat)) {
		fuse_answer(&c);
		return;
	}
	struct fuse_call *p = malloc(sizeof *p);
	if (p) {
		*p = c;
		if (far_crew_park(s->seat, fuse_parked, p) == 0)
			return;
		free(p);
	}
	atomic_fetch_sub(&f->blocked, 1);
	far_buf_put(c.mem, FUSE_IN);
	fuse_reply_err(c.req, ENOMEM);
}

/* -------------------------------------------------------------------------------------------------- handlers */

static void fuse_op_init(void *opaque, struct fuse_conn_info *conn)
{
	struct far_fuse *f = opaque;

	/* Splicing is slower than copying where pipes stop at 1 MiB; the size cannot change, so a changed time is no
	 * reason to drop pages; truncation comes as an attribute, to be refused by its size. */
	conn->want &= ~(unsigned)(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE |
				  FUSE_CAP_AUTO_INVAL_DATA | FUSE_CAP_ATOMIC_O_TRUNC | FUSE_CAP_WRITEBACK_CACHE |
				  FUSE_CAP_POSIX_LOCKS | FUSE_CAP_FLOCK_LOCKS);
	conn->want |= conn->capable & (FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS);
	conn->max_write = FUSE_IO_MAX;
	/* Read-ahead, write-back and O_DIRECT count against this. At the limit the kernel holds back those for local bytes
	 * too; we park and go on, so it has to be far above the number of threads. */
	conn->max_background = conn->congestion_threshold =
		f->max_blocked > FUSE_BACKGROUND ? f->max_blocked : FUSE_BACKGROUND;
}

static void fuse_op_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct far_fuse *f = fuse_req_userdata(req);
	struct fuse_entry_param e = { .attr_timeout = FUSE_FOREVER, .entry_timeout = FUSE_FOREVER };

	if (!f->dir) {
		fuse_reply_err(req, ENOTDIR);
		return;
	}
	if (!strcmp(name, f->name)) {
		e.ino = f->ino;
		e.generation = 1;
		fuse_stat(f, f->ino, &e.attr);
	}
	fuse_reply_entry(req, &e); /* ino 0: there is no such name, and never will be */
}

static void fuse_op_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct stat st;

	fuse_stat(fuse_req_userdata(req), ino, &st);
	fuse_reply_attr(req, &st, FUSE_FOREVER);
}

static void fuse_set_times(struct far_fuse *f, const struct stat *st, int set)
{
	int64_t now = fuse_clock();

	if (set & (FUSE_SET_ATTR_MTIME | FUSE_SET_ATTR_MTIME_NOW))
		atomic_store_explicit(&f->mtime, set & FUSE_SET_ATTR_MTIME_NOW ? now :
				      st->st_mtim.tv_sec * (int64_t)FAR_SEC + st->st_mtim.tv_nsec, memory_order_relaxed);
	if (set & (FUSE_SET_ATTR_ATIME | FUSE_SET_ATTR_ATIME_NOW))
		atomic_store_explicit(&f->atime, set & FUSE_SET_ATTR_ATIME_NOW ? now :
				      st->st_atim.tv_sec * (int64_t)FAR_SEC + st->st_atim.tv_nsec, memory_order_relaxed);
	atomic_store_explicit(&f->ctime, now, memory_order_relaxed);
}

static void fuse_op_setattr(fuse_req_t req, fuse_ino_t ino, struct stat *attr, int set, struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);
	struct stat st;

	fuse_stat(f, ino, &st);
	if (((set & FUSE_SET_ATTR_SIZE) && attr->st_size != st.st_size) ||
	    ((set & FUSE_SET_ATTR_MODE) && (attr->st_mode & 07777) != (st.st_mode & 07777)) ||
	    ((set & FUSE_SET_ATTR_UID) && attr->st_uid != st.st_uid) ||
	    ((set & FUSE_SET_ATTR_GID) && attr->st_gid != st.st_gid)) {
		fuse_reply_err(req, EPERM);
		return;
	}
	fuse_set_times(f, attr, set);
	fuse_stat(f, ino, &st);
	fuse_reply_attr(req, &st, FUSE_FOREVER);
}

static void fuse_op_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);
	bool writes = (fi->flags & O_ACCMODE) != O_RDONLY;

	if (ino != f->ino) {
		fuse_reply_err(req, EISDIR);
		return;
	}
	if (writes && f->read_only) {
		fuse_reply_err(req, EROFS);
		return;
	}
	fi->keep_cache = f->keep_cache;
	fi->fh = writes;
	if (writes)
		atomic_fetch_add(&f->writers, 1);
	if (fuse_reply_open(req, fi) && writes)
		atomic_fetch_sub(&f->writers, 1); /* the opener has gone: no release follows */
}

static void fuse_op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);

	if (fi->fh)
		atomic_fetch_sub(&f->writers, 1);
	fuse_reply_err(req, 0);
}

/*
 * Reply straight from the backend's pages: one copy less. Only if all of them are in memory: to touch a hole would fill
 * it, to touch the disk would block the receiver. A page that goes away in between makes the kernel's copy fail, and
 * the program gets EIO; if its place is a hole by then, zeros, as a read a little later would.
 */
static bool fuse_reply_shared(const char *share, fuse_req_t req, uint64_t off, size_t len)
{
	unsigned char there[FUSE_IO_MAX / FUSE_PAGE + 1];
	size_t skip = off % FUSE_PAGE, pages = (skip + len + FUSE_PAGE - 1) / FUSE_PAGE;

	if (pages > sizeof there || mincore((char *)share + off - skip, skip + len, there))
		return false;
	for (size_t i = 0; i < pages; i++) {
		if (!(there[i] & 1))
			return false;
	}
	fuse_reply_buf(req, share + off, len);
	return true;
}

static void fuse_op_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);
	struct fuse_seat *s = fuse_here;
	uint64_t at = (uint64_t)off;

	if (at >= f->bytes || size == 0) {
		fuse_reply_buf(req, NULL, 0);
		return;
	}
	size_t len = (size_t)far_min(size, f->bytes - at);
	fuse_small = len < FUSE_SHARE_MIN;
	const char *share = len < FUSE_SHARE_MIN ? NULL : atomic_load_explicit(&f->share, memory_order_acquire);
	if (share && fuse_reply_shared(share, req, at, len))
		return;
	if (!s->out)
		s->out = far_buf_get(FUSE_IO_MAX);
	int r = -EAGAIN;
	if (s->out && len <= FUSE_IO_MAX)
		r = far_read(f->b, at, s->out, len, FAR_NOWAIT);
	if (r == -EAGAIN)
		fuse_call((struct fuse_call){ .f = f, .req = req, .what = FUSE_CALL_READ, .off = at, .len = len });
	else if (r)
		fuse_reply_err(req, fuse_errno(r));
	else
		fuse_reply_buf(req, s->out, len);
}

static void fuse_op_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off,
			  struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);
	uint64_t at = (uint64_t)off;

	if (f->read_only || at >= f->bytes) {
		fuse_reply_err(req, f->read_only ? EROFS : ENOSPC);
		return;
	}
	size_t len = (size_t)far_min(size, f->bytes - at);
	fuse_modified(f);
	int r = far_write(f->b, at, buf, len, FAR_NOWAIT);
	if (r == -EAGAIN)
		fuse_call((struct fuse_call){ .f = f, .req = req, .what = FUSE_CALL_WRITE, .off = at, .len = len,
					      .data = buf });
	else if (r)
		fuse_reply_err(req, fuse_errno(r));
	else
		fuse_reply_write(req, len);
}

static void fuse_op_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);

	if (ino == f->ino && !f->read_only)
		fuse_call((struct fuse_call){ .f = f, .req = req, .what = FUSE_CALL_FLUSH });
	else
		fuse_reply_err(req, 0);
}

static void fuse_op_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t off, off_t length,
			      struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);
	uint64_t at = (uint64_t)off, len = (uint64_t)length;
	bool beyond = at > f->bytes || len > f->bytes - at;

	if (mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)) {
		fuse_reply_err(req, EOPNOTSUPP);
		return;
	}
	if (f->read_only) {
		fuse_reply_err(req, EROFS);
		return;
	}
	if (beyond && !(mode & FALLOC_FL_KEEP_SIZE)) {
		fuse_reply_err(req, ENOSPC);
		return;
	}
	len = at >= f->bytes ? 0 : far_min(len, f->bytes - at);
	if (len == 0 || !(mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))) {
		fuse_reply_err(req, 0); /* every byte of a region has its place already */
		return;
	}
	fuse_modified(f);
	fuse_call((struct fuse_call){ .f = f, .req = req, .off = at, .len = len,
				      .what = mode & FALLOC_FL_ZERO_RANGE ? FUSE_CALL_ZERO : FUSE_CALL_DISCARD });
}

static void fuse_op_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
	if (whence != SEEK_DATA && whence != SEEK_HOLE)
		fuse_reply_err(req, EINVAL);
	else
		fuse_call((struct fuse_call){ .f = fuse_req_userdata(req), .req = req, .what = FUSE_CALL_SEEK,
					      .off = (uint64_t)off, .whence = whence });
}

static void fuse_op_statfs(fuse_req_t req, fuse_ino_t ino)
{
	struct far_fuse *f = fuse_req_userdata(req);
	struct statvfs v = { .f_bsize = 4096, .f_frsize = 4096, .f_blocks = far_div_up(f->bytes, 4096),
			     .f_files = 1, .f_namemax = NAME_MAX };

	fuse_reply_statfs(req, &v);
}

static void fuse_op_readdir(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);
	const char *names[] = { ".", "..", f->name };
	const fuse_ino_t inos[] = { FUSE_ROOT_ID, FUSE_ROOT_ID, f->ino };
	char buf[1024];
	size_t used = 0;

	size = (size_t)far_min(size, sizeof buf);
	for (off_t i = off; i >= 0 && i < 3; i++) {
		struct stat st;
		fuse_stat(f, inos[i], &st);
		size_t n = fuse_add_direntry(req, buf + used, size - used, names[i], &st, i + 1);
		if (n > size - used)
			break;
		used += n;
	}
	fuse_reply_buf(req, buf, used);
}

/* Nothing is made, removed or renamed here. */
static void fuse_op_no_mknod(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev)
{
	fuse_reply_err(req, EPERM);
}

static void fuse_op_no_mkdir(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode)
{
	fuse_reply_err(req, EPERM);
}

static void fuse_op_no_remove(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	fuse_reply_err(req, EPERM);
}

static void fuse_op_no_symlink(fuse_req_t req, const char *link, fuse_ino_t parent, const char *name)
{
	fuse_reply_err(req, EPERM);
}

static void fuse_op_no_rename(fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t newparent,
			      const char *newname, unsigned flags)
{
	fuse_reply_err(req, EPERM);
}

static void fuse_op_no_link(fuse_req_t req, fuse_ino_t ino, fuse_ino_t newparent, const char *newname)
{
	fuse_reply_err(req, EPERM);
}

static void fuse_op_no_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode,
			      struct fuse_file_info *fi)
{
	fuse_reply_err(req, EPERM);
}

/* What is not here is ENOSYS, which the kernel takes as "do it yourself": flush (close writes dirty pages back and asks
 * us nothing), access (default_permissions), locks, attributes' extensions, poll, ioctl. */
static const struct fuse_lowlevel_ops fuse_ops = {
	.init = fuse_op_init,
	.lookup = fuse_op_lookup,
	.getattr = fuse_op_getattr,
	.setattr = fuse_op_setattr,
	.open = fuse_op_open,
	.release = fuse_op_release,
	.read = fuse_op_read,
	.write = fuse_op_write,
	.fsync = fuse_op_fsync,
	.fallocate = fuse_op_fallocate,
	.lseek = fuse_op_lseek,
	.statfs = fuse_op_statfs,
	.readdir = fuse_op_readdir,
	.mknod = fuse_op_no_mknod,
	.mkdir = fuse_op_no_mkdir,
	.unlink = fuse_op_no_remove,
	.rmdir = fuse_op_no_remove,
	.symlink = fuse_op_no_symlink,
	.rename = fuse_op_no_rename,
	.link = fuse_op_no_link,
	.create = fuse_op_no_create,
};

/* ------------------------------------------------------------------------------------------------- receivers */

/* Wait for a request where the connection cannot be aborted and does not block. False: told to end. */
static bool fuse_poll(const struct far_fuse *f)
{
	if (f->poll_fd < 0)
		return true;
	struct pollfd p[2] = { { .fd = f->fd, .events = POLLIN }, { .fd = f->poll_fd, .events = POLLIN } };

	while (poll(p, 2, -1) < 0) {
		if (errno != EINTR)
			return false;
	}
	return p[1].revents == 0;
}

/* Without a receive buffer: again in a moment. */
static bool fuse_out_of_memory(void)
{
	far_sleep_until(far_now() + 10 * FAR_MSEC, false);
	return true;
}

static bool fuse_receive(void *opaque, struct far_seat *seat)
{
	struct fuse_seat *s = opaque;
	struct far_fuse *f = s->f;

	if (!fuse_thread_ready) {
		/* Write-back of this very mount must not be what our own allocations wait for. Needs privilege. */
		prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
		fuse_thread_ready = true;
	}
	if (!s->in)
		s->in = far_buf_get(FUSE_IN);
	if (!s->in)
		return fuse_out_of_memory();
	/* libfuse has a call for this, which writes to standard error when the connection is aborted. */
	ssize_t n = read(f->fd, s->in + FUSE_IN_SKIP, FUSE_IN - FUSE_IN_SKIP);
	if (n < 0 && errno == EAGAIN)
		return fuse_poll(f);
	if (n < 0) /* ENOENT: that request was interrupted; EIO: it had no room; ENODEV, ECONNABORTED: the end */
		return errno == EINTR || errno == ENOENT || errno == EIO;
	struct fuse_buf buf = { .mem = s->in + FUSE_IN_SKIP, .size = (size_t)n };
	fuse_here = s;
	fuse_small = false;
	s->seat = seat;
	fuse_session_process_buf(f->se, &buf);
	/* From here on the seat may be another thread's. */
	if (!atomic_load_explicit(&f->ready, memory_order_relaxed)) {
		far_mutex_lock(&f->lock);
		atomic_store_explicit(&f->ready, true, memory_order_relaxed);
		far_cond_broadcast(&f->changed);
		far_mutex_unlock(&f->lock);
	}
	/*
	 * The kernel wakes the receiver that has waited longest, wherever it is. If the program has just been woken on this
	 * CPU, let it run first: its next request is then there before this thread waits, and stays on this CPU.
	 */
	if (fuse_small)
		sched_yield();
	return true;
}

static void fuse_seat_ended(void *opaque)
{
	struct fuse_seat *s = opaque;
	struct far_fuse *f = s->f;

	far_buf_put(s->in, FUSE_IN);
	far_buf_put(s->out, FUSE_IO_MAX);
	far_mutex_lock(&f->lock);
	f->live--;
	far_cond_broadcast(&f->changed);
	far_mutex_unlock(&f->lock);
}

/* A seat on each CPU that this process may use. One that cannot be had is done without, as long as there is one. */
static int fuse_start(struct far_fuse *f)
{
	cpu_set_t set;
	int r = -EAGAIN;

	if (sched_getaffinity(0, sizeof set, &set)) {
		CPU_ZERO(&set);
		CPU_SET(0, &set);
	}
	unsigned n = (unsigned)CPU_COUNT(&set);
	f->seats = calloc(n, sizeof *f->seats);
	if (!f->seats)
		return -ENOMEM;
	r = far_crew_open(&f->crew, "far-fuse", n + f->max_blocked);
	if (r)
		return r;
	for (int cpu = 0; cpu < CPU_SETSIZE && f->n_seats < n; cpu++) {
		if (!CPU_ISSET(cpu, &set))
			continue;
		struct fuse_seat *s = &f->seats[f->n_seats];
		s->f = f;
		far_mutex_lock(&f->lock);
		f->live++;
		far_mutex_unlock(&f->lock);
		r = far_crew_seat(f->crew, cpu, fuse_receive, fuse_seat_ended, s);
		if (r) {
			far_mutex_lock(&f->lock);
			f->live--;
			far_mutex_unlock(&f->lock);
			break;
		}
		f->n_seats++;
	}
	return f->n_seats ? 0 : r;
}

/* ---------------------------------------------------------------------------------------------- open and end */

static int fuse_check_target(struct far_fuse *f, const char *shown, struct far_error *err)
{
	struct stat st;
	struct statvfs v;
	unsigned major, minor;
	bool ours = false;

	/* Attributes may be cached, what statvfs says is not. */
	if (stat(shown, &st) || statvfs(shown, &v)) {
		int e = errno;
		if (e == ENOENT)
			return far_error_set(err, e, "cannot mount on %s: there is no such file or directory. "
					     "Make an empty one first", shown);
		if (e == ENOTCONN)
			return far_error_set(err, e, "cannot mount on %s: the server of an earlier mount has died. "
					     "Take that mount away with 'fusermount3 -u %s'", shown, shown);
		return far_error_set(err, e, "cannot mount on %s: %s", shown, far_strerror(e));
	}
	if (!S_ISDIR(st.st_mode) && !S_ISREG(st.st_mode))
		return far_error_set(err, EINVAL, "cannot mount on %s: it is neither a directory nor a regular file", shown);
	f->dir = S_ISDIR(st.st_mode);
	f->target = realpath(shown, NULL);
	if (!f->target)
		return far_error_set(err, errno, "cannot mount on %s: %s", shown, far_strerror(errno));
	if (far_fuse_mount_find(f->target, &major, &minor, &ours) && ours)
		return far_error_set(err, EBUSY, "cannot mount on %s: a region is mounted there already. "
				     "End that with 'farpage stop %s'", shown, shown);
	return 0;
}

/* Map the backend's pages where it shows them. Without them reads copy once more, nothing else. */
static void fuse_map_share(struct far_fuse *f, struct far_backend *b)
{
	int fd;

	if (!(far_facts(b)->caps & FAR_CAP_SHARE) || f->bytes == 0 || sysconf(_SC_PAGESIZE) != (long)FUSE_PAGE ||
	    far_share(b, &fd))
		return;
	void *p = mmap(NULL, f->bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
	if (p == MAP_FAILED)
		return;
	madvise(p, f->bytes, MADV_DONTFORK);
	atomic_store_explicit(&f->share, p, memory_order_release);
}

static int fuse_set_up(struct far_fuse *f, const struct far_fuse_conf *conf, struct far_error *err)
{
	const char *name = conf->name ? conf->name : "region";
	int r = fuse_check_target(f, conf->target, err);

	if (r)
		return r;
	if (f->dir && (!*name || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, "..") ||
		       strlen(name) > NAME_MAX))
		return far_error_set(err, EINVAL, "cannot mount on %s: '%s' is no file name", conf->target, name);
	f->b = conf->b;
	f->bytes = far_size(conf->b);
	f->deadline = conf->deadline;
	f->read_only = conf->read_only || !(far_facts(conf->b)->caps & FAR_CAP_WRITE);
	f->keep_cache = conf->keep_cache;
	f->max_blocked = conf->max_blocked ? conf->max_blocked : 256;
	if (f->max_blocked > 65535)
		f->max_blocked = 65535;
	f->uid = geteuid();
	f->gid = getegid();
	f->ino = f->dir ? FUSE_INO_FILE : FUSE_ROOT_ID;
	fuse_set_times(f, &(struct stat){ 0 }, FUSE_SET_ATTR_MTIME_NOW | FUSE_SET_ATTR_ATIME_NOW);
	f->name = strdup(name);
	if (!f->name || asprintf(&f->path, "%s%s%s", f->target, f->dir ? "/" : "", f->dir ? name : "") < 0)
		return far_error_set(err, ENOMEM, "cannot mount on %s: out of memory", conf->target);
	fuse_map_share(f, f->b);
	return 0;
}

static int fuse_connect(struct far_fuse *f, const struct far_fuse_conf *conf, struct far_error *err)
{
	struct far_fuse_mount_conf mc = { .target = f->target, .shown = conf->target, .dir = f->dir,
					  .source = conf->source ? conf->source : "farpage", .read_only = f->read_only };
	char arg0[] = "farpage", *argv[] = { arg0, NULL }, fd_name[40];
	struct fuse_args args = FUSE_ARGS_INIT(1, argv);

	fuse_set_log_func(fuse_log_line);
	f->se = fuse_session_new(&args, &fuse_ops, sizeof fuse_ops, f);
	fuse_opt_free_args(&args);
	if (!f->se)
		return far_error_set(err, ENOMEM, "cannot mount on %s: libfuse makes no session", conf->target);
	int r = far_fuse_mount_attach(&mc, &f->fd, err);
	if (r)
		return r;
	snprintf(fd_name, sizeof fd_name, "/dev/fd/%d", f->fd);
	if (fuse_session_mount(f->se, fd_name)) { /* only takes the descriptor over */
		far_fuse_mount_detach(f->target, true);
		far_fd_close(&f->fd);
		return far_error_set(err, EIO, "cannot mount on %s: libfuse refuses the connection", conf->target);
	}
	if (far_fuse_mount_find(f->target, &f->major, &f->minor, NULL))
		f->abort_fd = far_fuse_mount_abort_fd(f->minor);
	if (f->abort_fd < 0) {
		f->poll_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		fcntl(f->fd, F_SETFL, fcntl(f->fd, F_GETFL) | O_NONBLOCK);
	}
	return 0;
}

static void fuse_read_ahead(struct far_fuse *f, unsigned kib)
{
	if (f->major || f->minor)
		far_fuse_mount_read_ahead(f->major, f->minor, kib);
}

int far_fuse_open(const struct far_fuse_conf *conf, struct far_fuse **out, struct far_error *err)
{
	struct far_fuse *f = calloc(1, sizeof *f);

	if (!f)
		return far_error_set(err, ENOMEM, "cannot mount on %s: out of memory", conf->target);
	f->fd = f->abort_fd = f->poll_fd = -1;
	far_mutex_init(&f->lock);
	far_cond_init(&f->changed);
	far_mutex_lock(&f->lock);
	f->detached = true;
	far_mutex_unlock(&f->lock);
	int r = fuse_set_up(f, conf, err);
	if (!r)
		r = fuse_connect(f, conf, err);
	if (r) {
		far_fuse_close(f);
		return r;
	}
	far_mutex_lock(&f->lock);
	f->detached = false;
	far_mutex_unlock(&f->lock);
	r = fuse_start(f);
	/* INIT's answer sets the read-ahead to the default: ours must come after it. */
	uint64_t until = far_now() + FUSE_INIT_WAIT;
	far_mutex_lock(&f->lock);
	while (!r && !atomic_load(&f->ready) && f->live) {
		if (!far_cond_wait_until(&f->changed, &f->lock, until))
			r = -ETIMEDOUT;
	}
	if (!r && !f->live)
		r = -ENOTCONN;
	far_mutex_unlock(&f->lock);
	if (r) {
		far_error_set(err, -r, "cannot mount on %s: serving it: %s", conf->target, far_strerror(-r));
		far_fuse_close(f);
		return r;
	}
	fuse_read_ahead(f, conf->pulling ? FUSE_AHEAD_PULLING :
			   far_facts(f->b)->caps & FAR_CAP_REMOTE ? FUSE_AHEAD_REMOTE : FUSE_AHEAD_LOCAL);
	*out = f;
	return 0;
}

const char *far_fuse_path(const struct far_fuse *f)
{
	return f->path;
}

void far_fuse_all_local(struct far_fuse *f)
{
	fuse_read_ahead(f, FUSE_AHEAD_LOCAL);
}

int far_fuse_invalidate(struct far_fuse *f, uint64_t off, uint64_t len)
{
	FAR_ASSERT(!fuse_here);
	int r = fuse_lowlevel_notify_inval_inode(f->se, f->ino, (off_t)off, (off_t)len);
	return r == -ENOENT ? 0 : r; /* the kernel has never heard of the file */
}

unsigned far_fuse_blocked(const struct far_fuse *f)
{
	return atomic_load(&f->blocked);
}

/* Whether our mount still lies on the target. */
static bool fuse_mounted(struct far_fuse *f)
{
	unsigned major, minor;

	far_mutex_lock(&f->lock);
	bool gone = f->detached;
	far_mutex_unlock(&f->lock);
	return !gone && far_fuse_mount_find(f->target, &major, &minor, NULL) && major == f->major && minor == f->minor;
}

static int fuse_take_off(struct far_fuse *f, bool lazy)
{
	if (!fuse_mounted(f))
		return 0;
	int r = far_fuse_mount_detach(f->target, lazy);
	if (r && !fuse_mounted(f))
		r = 0; /* somebody else was faster */
	if (!r) {
		far_mutex_lock(&f->lock);
		f->detached = true;
		far_mutex_unlock(&f->lock);
	}
	return r;
}

int far_fuse_unmount(struct far_fuse *f)
{
	return fuse_take_off(f, false);
}

int far_fuse_detach(struct far_fuse *f)
{
	return fuse_take_off(f, true);
}

bool far_fuse_wait(struct far_fuse *f, uint64_t until)
{
	far_mutex_lock(&f->lock);
	while (f->live && far_cond_wait_until(&f->changed, &f->lock, until))
		;
	bool over = f->live == 0;
	far_mutex_unlock(&f->lock);
	return over;
}

void far_fuse_close(struct far_fuse *f)
{
	if (!f)
		return;
	if (f->se) {
		/* Abort first: what is blocked in the kernel would hold the unmounting up. */
		if (f->abort_fd >= 0 && write(f->abort_fd, "1", 1) != 1)
			far_log(FAR_LOG_DEBUG, "fuse[%s]: abort: %s", f->path, far_strerror(errno));
		if (f->poll_fd >= 0)
			eventfd_write(f->poll_fd, 1);
		fuse_take_off(f, true);
		far_crew_close(f->crew);
		fuse_session_destroy(f->se); /* closes the connection */
	}
	if (f->share)
		munmap((char *)f->share, f->bytes);
	far_fd_close(&f->abort_fd);
	far_fd_close(&f->poll_fd);
	far_cond_fini(&f->changed);
	far_mutex_fini(&f->lock);
	free(f->seats);
	free(f->target);
	free(f->path);
	free(f->name);
	free(f);
}
