/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * For tests of the file frontend: a child process that serves a mount, told what to do over a socket, and a backend whose
 * bytes lie in a memfd and whose behaviour and counters lie in memory that test and child share. The test's own process
 * never serves what it reads.
 */
#ifndef FUSE_SERVE_H
#define FUSE_SERVE_H

#include "base/clock.h"
#include "base/io.h"
#include "frontend/fuse.h"
#include "region/region.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define SERVE_LIMIT (30 * FAR_SEC)

/* Shared between test and child. What is absent (from `absent` on) answers -EAGAIN to FAR_NOWAIT, and otherwise waits
 * until `open`, `rtt` ns more, or -ETIMEDOUT at the thread's deadline, -ESHUTDOWN after stop. */
struct serve_shared {
	_Atomic uint64_t absent, rtt;
	_Atomic bool open, stopped;
	_Atomic int read_error, write_error, flush_error; /* negative errno, or 0 */
	_Atomic unsigned reads, writes, flushes, discards, zeros;
	_Atomic unsigned waiting, waiting_max, waited;
};

struct serve {
	pid_t pid;
	int sock, memfd;
	uint64_t bytes;
	struct serve_shared *sh;
	char dir[64], path[200];
};

struct serve_conf {
	uint64_t bytes;
	bool file;      /* the target is a file, not a directory */
	bool read_only, keep_cache, share;
	unsigned max_blocked;
	uint64_t deadline; /* 0: 30 s */
	const char *uri;   /* instead of the test backend */
	bool managed;      /* the test backend is the remote of a region that pulls, pushes and, with local_max, evicts */
	uint64_t local_max;
};

/* ------------------------------------------------------------------------------------------------- the child */

static int serve_wait(struct serve *s, uint64_t off, uint64_t len, unsigned flags)
{
	struct serve_shared *sh = s->sh;
	uint64_t deadline = far_deadline();
	int r = 0;

	if (off + len <= atomic_load(&sh->absent))
		return 0;
	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	unsigned n = atomic_fetch_add(&sh->waiting, 1) + 1, max = atomic_load(&sh->waiting_max);
	while (n > max && !atomic_compare_exchange_weak(&sh->waiting_max, &max, n))
		;
	while (!atomic_load(&sh->open) && !r) {
		if (atomic_load(&sh->stopped))
			r = -ESHUTDOWN;
		else if (far_now() >= deadline)
			r = -ETIMEDOUT;
		else
			far_sleep_until(far_now() + FAR_MSEC, false);
	}
	if (!r && atomic_load(&sh->rtt))
		far_sleep_until(far_now() + atomic_load(&sh->rtt), false);
	atomic_fetch_sub(&sh->waiting, 1);
	atomic_fetch_add(&sh->waited, 1);
	return r;
}

static int serve_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct serve *s = self;
	int r = serve_wait(s, off, len, flags);

	if (r)
		return r;
	atomic_fetch_add(&s->sh->reads, 1);
	r = atomic_load(&s->sh->read_error);
	return r ? r : far_io_pread(s->memfd, off, buf, len, 0);
}

static int serve_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct serve *s = self;
	int r = serve_wait(s, off, len, flags);

	if (r)
		return r;
	atomic_fetch_add(&s->sh->writes, 1);
	r = atomic_load(&s->sh->write_error);
	return r ? r : far_io_pwrite(s->memfd, off, buf, len, 0);
}

static int serve_flush(void *self)
{
	struct serve *s = self;
	atomic_fetch_add(&s->sh->flushes, 1);
	int r = atomic_load(&s->sh->absent) == UINT64_MAX ? 0 : serve_wait(s, s->bytes, 1, 0);
	if (r)
		return r;
	return atomic_load(&s->sh->flush_error);
}

static int serve_punch(struct serve *s, uint64_t off, uint64_t len)
{
	return fallocate(s->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len) ? -errno : 0;
}

static int serve_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct serve *s = self;
	atomic_fetch_add(&s->sh->discards, 1);
	return serve_punch(s, off, len);
}

static int serve_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct serve *s = self;
	atomic_fetch_add(&s->sh->zeros, 1);
	return serve_punch(s, off, len);
}

static int serve_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct serve *s = self;
	off_t data = lseek(s->memfd, (off_t)off, SEEK_DATA);
	uint64_t end = off + len, d = data < 0 ? end : far_min((uint64_t)data, end);

	*n = 1;
	if (d > off) {
		out[0] = (struct far_extent){ off, d - off, FAR_EXTENT_ZERO };
	} else {
		uint64_t hole = (uint64_t)lseek(s->memfd, (off_t)off, SEEK_HOLE);
		out[0] = (struct far_extent){ off, far_min(hole, end) - off, FAR_EXTENT_DATA };
	}
	return 0;
}

static int serve_share(void *self, int *fd)
{
	*fd = ((struct serve *)self)->memfd;
	return 0;
}

static void serve_stop(void *self)
{
	atomic_store(&((struct serve *)self)->sh->stopped, true);
}

static void serve_close(void *self)
{
}

static int serve_backend(struct serve *s, const struct serve_conf *conf, struct far_backend **b)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = serve_read, .write = serve_write,
		.flush = serve_flush, .discard = serve_discard, .zero = serve_zero, .extents = serve_extents,
		.share = serve_share, .stop = serve_stop, .close = serve_close };
	struct far_error err;

	if (conf->uri) {
		int r = far_open(conf->uri, NULL, b, &err);
		if (r)
			fprintf(stderr, "%s\n", err.text);
		return r;
	}
	struct far_facts facts = { .size = sizeof facts, .bytes = conf->bytes,
				   .caps = FAR_CAP_WRITE | (conf->share ? FAR_CAP_SHARE : 0) };
	return far_backend_new(&ops, s, &facts, b);
}

static int serve_region(const struct serve_conf *conf, struct far_backend *remote, struct far_region **out,
			struct far_backend **kept)
{
	struct far_mount_opts opts = FAR_MOUNT_OPTS_INIT;
	struct far_backend *local;
	struct far_error err = { 0 };
	char uri[60];

	snprintf(uri, sizeof uri, "mem:%" PRIu64, conf->bytes);
	int r = far_open(uri, NULL, &local, &err);
	if (r)
		return r;
	opts.chunk = 65536;
	opts.pull_workers = 2;
	opts.push_workers = 2;
	opts.push_interval_ms = 5;
	opts.local_max = conf->local_max;
	r = far_region_open(&(struct far_region_conf){ .remote = remote, .local = local, .local_is_zero = true,
						       .opts = &opts }, out, &err);
	if (r)
		fprintf(stderr, "%s\n", err.text);
	*kept = conf->local_max ? NULL : local;
	return r;
}

/* u: unmount, d: detach, w: wait up to the limit, W: is it over, s: stop the backend, b: blocked calls,
 * i: invalidate everything, a: wait until everything is local and say so, n: take it back, q: close and end. Each is answered with a number. */
static void serve_child(struct serve *s, const struct serve_conf *conf)
{
	struct far_backend *b = NULL, *local = NULL;
	struct far_fuse *f = NULL;
	struct far_region *region = NULL;
	struct far_error err = { 0 };
	struct far_fuse_conf fc = { .target = s->path, .name = "region", .source = "test,with comma",
				    .read_only = conf->read_only, .keep_cache = conf->keep_cache,
				    .max_blocked = conf->max_blocked,
				    .deadline = conf->deadline ? conf->deadline : SERVE_LIMIT };
	char c;
	int64_t r = serve_backend(s, conf, &b);

	if (!r && conf->managed)
		r = serve_region(conf, b, &region, &local);
	if (region)
		b = far_region_backend(region);
	fc.b = b;
	if (!r)
		r = far_fuse_open(&fc, &f, &err);
	if (r)
		fprintf(stderr, "%s\n", err.text);
	if (far_io_write(s->sock, &r, sizeof r) || r)
		_exit(1);
	while (far_io_read(s->sock, &c, 1) == 0) {
		r = 0;
		if (c == 'u')
			r = far_fuse_unmount(f);
		else if (c == 'd')
			r = far_fuse_detach(f);
		else if (c == 'w')
			r = far_fuse_wait(f, far_now() + SERVE_LIMIT);
		else if (c == 'W')
			r = far_fuse_wait(f, far_now());
		else if (c == 's')
			region ? far_region_stop(region) : far_stop(b);
		else if (c == 'b')
			r = far_fuse_blocked(f);
		else if (c == 'i')
			r = far_fuse_invalidate(f, 0, 0);
		else if (c == 'a')
			r = region ? far_region_wait_local(region, conf->bytes) : 0, far_fuse_all_local(f, local);
		else if (c == 'n')
			r = far_fuse_not_local(f);
		if (c == 'q')
			break;
		if (far_io_write(s->sock, &r, sizeof r))
			break;
	}
	region ? far_region_stop(region) : far_stop(b);
	far_fuse_close(f);
	region ? far_region_close(region) : far_close(b);
	r = 0;
	far_io_write(s->sock, &r, sizeof r);
	_exit(0);
}

/* -------------------------------------------------------------------------------------------------- the test */

static inline int64_t serve_tell(struct serve *s, char c)
{
	int64_t r = -EPIPE;

	if (far_io_write(s->sock, &c, 1) || far_io_read(s->sock, &r, sizeof r))
		return -EPIPE;
	return r;
}

static inline void serve_start(struct serve *s, const struct serve_conf *conf)
{
	int pair[2];
	int64_t r = -1;

	*s = (struct serve){ .bytes = conf->bytes };
	snprintf(s->dir, sizeof s->dir, "/tmp/far-fuse-XXXXXX");
	assert_non_null(mkdtemp(s->dir));
	snprintf(s->path, sizeof s->path, "%s/%s", s->dir, conf->file ? "disk" : "mnt");
	if (conf->file)
		close(open(s->path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	else
		assert_int_equal(mkdir(s->path, 0700), 0);
	s->sh = mmap(NULL, sizeof *s->sh, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	assert_ptr_not_equal(s->sh, MAP_FAILED);
	atomic_store(&s->sh->absent, UINT64_MAX);
	s->memfd = memfd_create("test", MFD_CLOEXEC);
	assert_int_equal(ftruncate(s->memfd, (off_t)conf->bytes), 0);
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
	fflush(stdout);
	s->pid = fork();
	if (s->pid == 0) {
		close(pair[1]);
		s->sock = pair[0];
		serve_child(s, conf);
	}
	close(pair[0]);
	s->sock = pair[1];
	assert_int_equal(far_io_read(s->sock, &r, sizeof r), 0);
	assert_int_equal(r, 0);
	if (!conf->file)
		strcat(s->path, "/region");
}

/* Close the mount and end the child; it must end by itself, and leave no mount behind. */
static inline void serve_end(struct serve *s)
{
	int status = -1;

	assert_int_equal(serve_tell(s, 'q'), 0);
	assert_int_equal(waitpid(s->pid, &status, 0), s->pid);
	assert_int_equal(status, 0);
	close(s->sock);
	close(s->memfd);
	munmap(s->sh, sizeof *s->sh);
	char *slash = strrchr(s->path, '/');
	if (!strcmp(slash, "/region")) {
		*slash = 0;
		assert_int_equal(rmdir(s->path), 0);
	} else {
		assert_int_equal(unlink(s->path), 0);
	}
	assert_int_equal(rmdir(s->dir), 0);
}

/* Until *what >= n, or the limit. */
static inline bool serve_until(const _Atomic unsigned *what, unsigned n)
{
	uint64_t until = far_now() + SERVE_LIMIT;

	while (atomic_load(what) < n && far_now() < until)
		far_sleep_until(far_now() + FAR_MSEC, false);
	return atomic_load(what) >= n;
}

/* True, and says so, when there is nothing to test with. */
static inline bool serve_skip(const char *name)
{
	if (access("/dev/fuse", F_OK)) {
		printf("%s: skipped: /dev/fuse is missing\n", name);
		return true;
	}
	if (geteuid() != 0 && system("command -v fusermount3 >/dev/null")) {
		printf("%s: skipped: not root, and fusermount3 is missing\n", name);
		return true;
	}
	return false;
}

/* The file `name` beside this program. */
static inline void serve_beside(const char *name, char *out, size_t len)
{
	ssize_t n = readlink("/proc/self/exe", out, len - 1);

	assert_true(n > 0);
	out[n] = 0;
	char *slash = strrchr(out, '/');
	assert_true((size_t)(slash + 1 - out) + strlen(name) < len);
	strcpy(slash + 1, name);
}

#endif
