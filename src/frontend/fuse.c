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
#define _GNU_SOURCE
#include "frontend/fuse.h"

#include "base/clock.h"
#include "base/pool.h"
#include "frontend/fuse_int.h"
#include "frontend/fuse_mount.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

#define FUSE_INIT_WAIT (10 * FAR_SEC)
/* KiB that the kernel reads ahead. Two requests of 1 MiB at once keep two CPUs busy; across a network a fault in a
 * mapping waits for all of it. While a puller is at work it is the one that reads ahead, and in larger pieces. */
#define FUSE_AHEAD_LOCAL 2048
#define FUSE_AHEAD_REMOTE 1024
#define FUSE_AHEAD_PULLING 256

static _Thread_local bool fuse_thread_ready;

static void fuse_log_line(enum fuse_log_level level, const char *fmt, va_list ap)
{
	char text[300];
	int n = vsnprintf(text, sizeof text, fmt, ap);

	if (n > 0 && (size_t)n < sizeof text && text[n - 1] == '\n')
		text[n - 1] = 0;
	far_log(FAR_LOG_DEBUG, "libfuse: %s", text);
}

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
	size_t skip = far_fuse_ops_skip();

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
	ssize_t n = read(f->fd, s->in + skip, FUSE_IN - skip);
	if (n < 0 && errno == EAGAIN)
		return fuse_poll(f);
	if (n < 0) /* ENOENT: that request was interrupted; EIO: it had no room; ENODEV, ECONNABORTED: the end */
		return errno == EINTR || errno == ENOENT || errno == EIO;
	bool small = far_fuse_ops_process(s, seat, (size_t)n);
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
	if (small)
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
	if (far_fuse_mount_find(f->target, &major, &minor, &ours) > 0 && ours)
		return far_error_set(err, EBUSY, "cannot mount on %s: a region is mounted there already. "
				     "End that with 'farpage stop %s'", shown, shown);
	return 0;
}

/* Map the backend's pages where it shows them. Without them reads copy once more, nothing else. */
static void fuse_map_share(struct far_fuse *f, struct far_backend *b)
{
	const char *p = far_heap_address(b);
	int fd;

	if (f->bytes == 0 || sysconf(_SC_PAGESIZE) != (long)FUSE_PAGE)
		return;
	if (!p) {
		if (!(far_facts(b)->caps & FAR_CAP_SHARE) || far_share(b, &fd))
			return;
		void *map = mmap(NULL, f->bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
		if (map == MAP_FAILED)
			return;
		madvise(map, f->bytes, MADV_DONTFORK);
		p = f->mapped = map;
		f->share_fd = fd;
	}
	far_mutex_lock(&f->lock);
	if (!f->evicts)
		atomic_store(&f->share, p);
	far_mutex_unlock(&f->lock);
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
	f->changing = conf->changing;
	f->max_blocked = conf->max_blocked ? conf->max_blocked : 256;
	if (f->max_blocked > 65535)
		f->max_blocked = 65535;
	f->uid = geteuid();
	f->gid = getegid();
	f->ino = f->dir ? FUSE_INO_FILE : FUSE_ROOT_ID;
	far_fuse_ops_touch(f);
	f->name = strdup(name);
	if (!f->name || asprintf(&f->path, "%s%s%s", f->target, f->dir ? "/" : "", f->dir ? name : "") < 0)
		return far_error_set(err, ENOMEM, "cannot mount on %s: out of memory", conf->target);
	fuse_map_share(f, f->b);
	return 0;
}

/* We receive ourselves. */
static ssize_t fuse_no_read(int fd, void *buf, size_t len, void *opaque)
{
	errno = ENOSYS;
	return -1;
}

static int fuse_connect(struct far_fuse *f, const struct far_fuse_conf *conf, struct far_error *err)
{
	struct far_fuse_mount_conf mc = { .target = f->target, .shown = conf->target, .dir = f->dir,
					  .source = conf->source ? conf->source : "farpage", .read_only = f->read_only };
	static const struct fuse_custom_io io = { .writev = far_fuse_pass_writev, .read = fuse_no_read };
	char arg0[] = "farpage", *argv[] = { arg0, NULL };
	struct fuse_args args = FUSE_ARGS_INIT(1, argv);

	fuse_set_log_func(fuse_log_line);
	f->se = fuse_session_new(&args, &far_fuse_ops, sizeof far_fuse_ops, f);
	fuse_opt_free_args(&args);
	if (!f->se)
		return far_error_set(err, ENOMEM, "cannot mount on %s: libfuse makes no session", conf->target);
	int r = far_fuse_mount_attach(&mc, &f->fd, err);
	if (r)
		return r;
	if (fuse_session_custom_io(f->se, &io, f->fd)) { /* takes the descriptor over */
		far_fuse_mount_detach(f->target, true);
		far_fd_close(&f->fd);
		return far_error_set(err, EIO, "cannot mount on %s: libfuse refuses the connection", conf->target);
	}
	r = far_fuse_mount_find(f->target, &f->major, &f->minor, NULL);
	if (r < 0) { /* not knowing which one is ours we would never take it off again */
		far_fuse_mount_detach(f->target, true);
		return far_error_set(err, -r, "cannot mount on %s: the list of mounts cannot be read: %s", conf->target,
				     far_strerror(r));
	}
	if (r)
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
	f->fd = f->abort_fd = f->poll_fd = f->share_fd = -1;
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
	far_fuse_pass_offer(f);
	*out = f;
	return 0;
}

const char *far_fuse_path(const struct far_fuse *f)
{
	return f->path;
}

void far_fuse_all_local(struct far_fuse *f, struct far_backend *local)
{
	if (local && !atomic_exchange(&f->told, true) && !f->mapped) {
		FAR_ASSERT(far_size(local) == f->bytes);
		fuse_map_share(f, local);
		far_fuse_pass_offer(f);
	}
	fuse_read_ahead(f, FUSE_AHEAD_LOCAL);
}

int far_fuse_not_local(struct far_fuse *f)
{
	far_mutex_lock(&f->lock);
	if (f->passed) {
		far_mutex_unlock(&f->lock);
		return -EBUSY;
	}
	f->evicts = true;
	f->backing = 0;
	atomic_store(&f->share, NULL);
	far_mutex_unlock(&f->lock);
	while (atomic_load(&f->share_users)) /* a copy by the kernel, 1 MiB at most */
		sched_yield();
	return 0;
}

int far_fuse_invalidate(struct far_fuse *f, uint64_t off, uint64_t len)
{
	FAR_ASSERT(!far_fuse_ops_here());
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
	int found = gone ? 0 : far_fuse_mount_find(f->target, &major, &minor, NULL);
	return found < 0 || (found && major == f->major && minor == f->minor); /* unknown: taking it off will tell */
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
	if (f->mapped)
		munmap(f->mapped, f->bytes);
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
