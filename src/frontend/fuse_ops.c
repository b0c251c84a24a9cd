/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * How each request is answered: at once where that takes no time, else as a call that leaves the receiver (see fuse.c for
 * the picture). A call of a program that was killed meanwhile is answered early, by fuse_killed(); whoever carries it
 * out learns from fuse_still_wanted() that the request is gone.
 */
#define _GNU_SOURCE
#include "frontend/fuse_int.h"

#include "base/clock.h"
#include "base/pool.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define FUSE_FOREVER 86400.0 /* seconds that the kernel may keep names and attributes */
#define FUSE_IN_SKIP (4096 - sizeof(struct fuse_in_header) - sizeof(struct fuse_write_in)) /* aligns a write's data */
#define FUSE_EXTENTS 64
#define FUSE_SHARE_MIN ((size_t)32 << 10) /* below, a copy costs less than the look whether the pages are there */
#define FUSE_BACKGROUND 4096

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
	/* under f->lock */
	struct fuse_call *next, **link; /* among the killable */
	bool asking, killed;            /* fuse_killable() is at it, and has to answer by itself */
	bool answered;                  /* by fuse_killed(): the request is gone */
};

/* The seat this thread receives at, while it does. */
static _Thread_local struct fuse_seat *fuse_here;
static _Thread_local bool fuse_small;

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

/* Whether the process that waits for this request has been killed: then SIGKILL stands among its pending signals. */
static bool fuse_is_killed(fuse_req_t req)
{
	unsigned long long thread = 0, group = 0;
	char path[40], line[200];

	snprintf(path, sizeof path, "/proc/%d/status", (int)fuse_req_ctx(req)->pid);
	FILE *p = fopen(path, "re");
	if (!p)
		return false;
	while (fgets(line, sizeof line, p)) {
		sscanf(line, "SigPnd: %llx", &thread);
		sscanf(line, "ShdPnd: %llx", &group);
	}
	fclose(p);
	return (thread | group) >> (SIGKILL - 1) & 1;
}

/* On a receiver, when the program that waits got a signal. Other signals than a deadly one wait until the call is over, as
 * with any file; the thread that carries out the call of a dead one finds nobody to answer later. */
static void fuse_killed(fuse_req_t req, void *arg)
{
	struct far_fuse *f = arg;
	bool ours = false;

	if (!fuse_is_killed(req))
		return;
	far_mutex_lock(&f->lock);
	for (struct fuse_call *c = f->killable; c; c = c->next) {
		if (c->req != req)
			continue;
		c->killed = true;
		ours = c->answered = !c->asking;
		break;
	}
	far_mutex_unlock(&f->lock);
	if (ours)
		fuse_reply_err(req, EINTR);
}

/* Between these two the call may be answered by fuse_killed(). Writes may not: one that lands after its answer could
 * undo a later one. False of the first: its program is dead already, there is nothing to carry out (libfuse has called
 * fuse_killed() in here, with the request's lock held, so that one did not answer). False of the second: it has been
 * answered. */
static bool fuse_killable(struct fuse_call *c)
{
	struct far_fuse *f = c->f;

	far_mutex_lock(&f->lock);
	c->asking = true;
	c->next = f->killable;
	c->link = &f->killable;
	if (c->next)
		c->next->link = &c->next;
	f->killable = c;
	far_mutex_unlock(&f->lock);
	fuse_req_interrupt_func(c->req, fuse_killed, f);
	far_mutex_lock(&f->lock);
	c->asking = false;
	bool alive = !c->killed;
	far_mutex_unlock(&f->lock);
	return alive;
}

static bool fuse_still_wanted(struct fuse_call *c)
{
	struct far_fuse *f = c->f;

	far_mutex_lock(&f->lock);
	*c->link = c->next;
	if (c->next)
		c->next->link = c->link;
	bool wanted = !c->answered;
	far_mutex_unlock(&f->lock);
	return wanted;
}

static void fuse_answer_read(struct fuse_call *c)
{
	void *buf = far_buf_get(c->len);
	int r = buf ? 0 : -ENOMEM;

	if (!fuse_killable(c))
		r = -EINTR;
	else if (!r)
		r = far_read(c->f->b, c->off, buf, c->len, 0);
	if (!fuse_still_wanted(c))
		;
	else if (r)
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
		r = fuse_killable(c) ? far_flush(f->b) : -EINTR;
		if (fuse_still_wanted(c))
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
	if (far_fuse_pass_open(f, req, fi) && writes)
		atomic_fetch_sub(&f->writers, 1); /* the opener has gone: no release follows */
}

static void fuse_op_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct far_fuse *f = fuse_req_userdata(req);

	far_fuse_pass_release(f, fi);
	if (fi->fh & 1)
		atomic_fetch_sub(&f->writers, 1);
	fuse_reply_err(req, 0);
}

/*
 * Reply straight from the backend's pages: one copy less. Only if all of them are in memory: to touch a hole would fill
 * it, to touch the disk would block the receiver. A page that goes away in between makes the kernel's copy fail, and
 * the program gets EIO; if its place is a hole by then, zeros, as a read a little later would.
 */
static bool fuse_reply_shared(struct far_fuse *f, fuse_req_t req, uint64_t off, size_t len)
{
	unsigned char there[FUSE_IO_MAX / FUSE_PAGE + 1];
	size_t skip = off % FUSE_PAGE, pages = (skip + len + FUSE_PAGE - 1) / FUSE_PAGE;

	if (!atomic_load_explicit(&f->share, memory_order_relaxed) || pages > sizeof there)
		return false;
	atomic_fetch_add(&f->share_users, 1);
	const char *share = atomic_load(&f->share);
	bool all = share && mincore((char *)share + off - skip, skip + len, there) == 0;
	for (size_t i = 0; i < pages && all; i++)
		all = there[i] & 1;
	if (all)
		fuse_reply_buf(req, share + off, len);
	atomic_fetch_sub(&f->share_users, 1);
	return all;
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
	if (!fuse_small && fuse_reply_shared(f, req, at, len))
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
const struct fuse_lowlevel_ops far_fuse_ops = {
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

size_t far_fuse_ops_skip(void)
{
	return FUSE_IN_SKIP;
}

bool far_fuse_ops_here(void)
{
	return fuse_here != NULL;
}

void far_fuse_ops_touch(struct far_fuse *f)
{
	fuse_set_times(f, &(struct stat){ 0 }, FUSE_SET_ATTR_MTIME_NOW | FUSE_SET_ATTR_ATIME_NOW);
}

bool far_fuse_ops_process(struct fuse_seat *s, struct far_seat *seat, size_t n)
{
	struct fuse_buf buf = { .mem = s->in + FUSE_IN_SKIP, .size = n };

	fuse_here = s;
	fuse_small = false;
	s->seat = seat;
	if (!atomic_load_explicit(&s->f->ready, memory_order_relaxed))
		far_fuse_pass_init(s->f, buf.mem, n);
	fuse_session_process_buf(s->f->se, &buf);
	return fuse_small;
}
