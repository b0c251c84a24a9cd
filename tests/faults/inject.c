/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "inject.h"

#include <dirent.h>
#include <execinfo.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <netdb.h>
#include <nghttp2/nghttp2.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---------------------------------------------------------------------------------------------------- allocations */

static _Atomic unsigned inject_left; /* 0: nothing fails; 1: the next one */
static _Atomic bool inject_all, inject_hit, inject_armed;
static enum inject_scope inject_scope;
static _Thread_local bool inject_mine, inject_paused;
static bool inject_trace;

void inject_begin(unsigned n, enum inject_scope scope, bool all)
{
	inject_scope = scope;
	inject_trace = getenv("FARPAGE_INJECT") != NULL;
	inject_mine = true;
	inject_hit = false;
	inject_all = all;
	inject_left = n;
	inject_armed = n != 0;
}

bool inject_end(void)
{
	inject_armed = false;
	inject_left = 0;
	inject_mine = false;
	return inject_hit;
}

void inject_pause(bool on)
{
	inject_paused = on;
}

static bool inject_fails(void)
{
	if (!inject_armed || inject_paused || (inject_scope == INJECT_THREAD && !inject_mine))
		return false;
	unsigned left = inject_left;
	while (left > 1 && !atomic_compare_exchange_weak(&inject_left, &left, left - 1))
		;
	if (left != 1)
		return false;
	if (!inject_all && !atomic_compare_exchange_strong(&inject_left, &left, 0))
		return false;
	inject_hit = true;
	if (inject_trace) { /* FARPAGE_INJECT=1: where each failure was put */
		void *at[12];
		inject_paused = true;
		backtrace_symbols_fd(at, backtrace(at, 12), 2);
		inject_paused = false;
		dprintf(2, "\n");
	}
	return true;
}

#define WRAP(ret, name, params, args, code, failed) \
	ret __real_##name params; \
	ret __wrap_##name params; \
	ret __wrap_##name params \
	{ \
		if (inject_fails()) { \
			errno = code; \
			return failed; \
		} \
		return __real_##name args; \
	}

WRAP(void *, malloc, (size_t n), (n), ENOMEM, NULL)
WRAP(void *, calloc, (size_t n, size_t m), (n, m), ENOMEM, NULL)
WRAP(void *, realloc, (void *p, size_t n), (p, n), ENOMEM, NULL)
WRAP(void *, reallocarray, (void *p, size_t n, size_t m), (p, n, m), ENOMEM, NULL)
WRAP(char *, strdup, (const char *s), (s), ENOMEM, NULL)
WRAP(char *, strndup, (const char *s, size_t n), (s, n), ENOMEM, NULL)
WRAP(void *, far_buf_get, (size_t n), (n), ENOMEM, NULL)
WRAP(void *, mmap64, (void *p, size_t n, int prot, int flags, int fd, off_t off), (p, n, prot, flags, fd, off), ENOMEM,
     MAP_FAILED)
WRAP(int, memfd_create, (const char *name, unsigned flags), (name, flags), ENOMEM, -1)
WRAP(int, eventfd, (unsigned v, int flags), (v, flags), ENOMEM, -1)
WRAP(int, pthread_create, (pthread_t *t, const pthread_attr_t *a, void *(*fn)(void *), void *arg), (t, a, fn, arg), EAGAIN,
     EAGAIN)
WRAP(DIR *, opendir, (const char *p), (p), ENOMEM, NULL)
WRAP(DIR *, fdopendir, (int fd), (fd), ENOMEM, NULL)
WRAP(char *, realpath, (const char *p, char *out), (p, out), ENOMEM, NULL)
WRAP(FILE *, fopen64, (const char *p, const char *mode), (p, mode), ENOMEM, NULL)
WRAP(ssize_t, __getdelim, (char **s, size_t *n, int c, FILE *f), (s, n, c, f), ENOMEM, -1)
WRAP(int, getaddrinfo, (const char *h, const char *s, const struct addrinfo *i, struct addrinfo **o), (h, s, i, o), ENOMEM,
     EAI_MEMORY)
WRAP(int, vasprintf, (char **s, const char *fmt, va_list ap), (s, fmt, ap), ENOMEM, -1)
WRAP(int, posix_spawn, (pid_t *pid, const char *p, const posix_spawn_file_actions_t *fa, const posix_spawnattr_t *sa,
			char *const argv[], char *const env[]), (pid, p, fa, sa, argv, env), ENOMEM, ENOMEM)

WRAP(struct json_object *, json_object_new_object, (void), (), ENOMEM, NULL)
WRAP(struct json_object *, json_object_new_array, (void), (), ENOMEM, NULL)
WRAP(struct json_object *, json_object_new_string, (const char *s), (s), ENOMEM, NULL)
WRAP(struct json_object *, json_object_new_int, (int32_t v), (v), ENOMEM, NULL)
WRAP(struct json_object *, json_object_new_int64, (int64_t v), (v), ENOMEM, NULL)
WRAP(struct json_object *, json_object_new_uint64, (uint64_t v), (v), ENOMEM, NULL)
WRAP(struct json_object *, json_object_new_double, (double v), (v), ENOMEM, NULL)
WRAP(struct json_object *, json_object_new_boolean, (json_bool v), (v), ENOMEM, NULL)
WRAP(struct json_object *, json_tokener_parse, (const char *s), (s), ENOMEM, NULL)
WRAP(const char *, json_object_to_json_string_ext, (struct json_object *o, int flags), (o, flags), ENOMEM, NULL)
WRAP(int, json_object_object_add, (struct json_object *o, const char *k, struct json_object *v), (o, k, v), ENOMEM, -1)

WRAP(int, nghttp2_session_callbacks_new, (nghttp2_session_callbacks **cb), (cb), ENOMEM, NGHTTP2_ERR_NOMEM)
WRAP(int, nghttp2_option_new, (nghttp2_option **o), (o), ENOMEM, NGHTTP2_ERR_NOMEM)

int __wrap_asprintf(char **s, const char *fmt, ...) FAR_PRINTF(2, 3);
int __wrap_asprintf(char **s, const char *fmt, ...)
{
	va_list ap;
	va_start(ap, fmt);
	int n = __wrap_vasprintf(s, fmt, ap);
	va_end(ap);
	return n;
}

static void *http2_malloc(size_t n, void *opaque)
{
	return inject_fails() ? NULL : __real_malloc(n);
}

static void http2_free(void *p, void *opaque)
{
	free(p);
}

static void *http2_calloc(size_t n, size_t m, void *opaque)
{
	return inject_fails() ? NULL : __real_calloc(n, m);
}

static void *http2_realloc(void *p, size_t n, void *opaque)
{
	return inject_fails() ? NULL : __real_realloc(p, n);
}

static nghttp2_mem http2_mem = { NULL, http2_malloc, http2_free, http2_calloc, http2_realloc };

int __wrap_nghttp2_session_server_new2(nghttp2_session **s, const nghttp2_session_callbacks *cb, void *user,
				       const nghttp2_option *o);
int __wrap_nghttp2_session_server_new2(nghttp2_session **s, const nghttp2_session_callbacks *cb, void *user,
				       const nghttp2_option *o)
{
	return nghttp2_session_server_new3(s, cb, user, o, &http2_mem);
}

int __wrap_nghttp2_session_client_new2(nghttp2_session **s, const nghttp2_session_callbacks *cb, void *user,
				       const nghttp2_option *o);
int __wrap_nghttp2_session_client_new2(nghttp2_session **s, const nghttp2_session_callbacks *cb, void *user,
				       const nghttp2_option *o)
{
	return nghttp2_session_client_new3(s, cb, user, o, &http2_mem);
}

/* ----------------------------------------------------------------------------------------------------------- leaks */

static unsigned inject_count(const char *path)
{
	DIR *d = __real_opendir(path);
	unsigned n = 0;

	while (d && readdir(d))
		n++;
	if (d)
		closedir(d);
	return n;
}

unsigned inject_open_files(void)
{
	return inject_count("/proc/self/fd");
}

unsigned inject_threads(void)
{
	return inject_count("/proc/self/task");
}

static char watched[200];

static void inject_late(int sig)
{
	if (write(2, watched, strlen(watched)) < 0)
		abort();
	abort();
}

void inject_watch(const char *what, unsigned n, unsigned seconds)
{
	snprintf(watched, sizeof watched, "%.150s: hangs after failure %u\n", what, n);
	signal(SIGALRM, inject_late);
	alarm(seconds);
}

/* ----------------------------------------------------------------------------------------------------------- disks */

static struct inject_hooks hooks;
static pthread_mutex_t hooks_lock = PTHREAD_MUTEX_INITIALIZER;

void inject_hooks(const struct inject_hooks *h)
{
	hooks = h ? *h : (struct inject_hooks){ 0 };
}

bool inject_is(int fd, const char *path)
{
	struct stat a, b;
	return !fstat(fd, &a) && !stat(path, &b) && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/* Before and after around the real call, which gives -1 and errno on failure. */
#define AROUND(io, call) \
	({ \
		struct inject_hooks *h_ = &hooks; \
		bool serial_ = h_->serial; \
		if (serial_) \
			pthread_mutex_lock(&hooks_lock); \
		int e_ = h_->before ? h_->before(h_->opaque, &(io)) : 0; \
		ssize_t r_ = e_ ? -1 : (ssize_t)(call); \
		if (!e_ && r_ < 0) \
			e_ = errno; \
		if (r_ >= 0 && h_->after) { \
			if ((io).op == INJECT_PWRITE || (io).op == INJECT_PREAD) \
				(io).len = (size_t)r_; \
			h_->after(h_->opaque, &(io)); \
		} \
		if (serial_) \
			pthread_mutex_unlock(&hooks_lock); \
		if (r_ < 0) \
			errno = e_; \
		r_; \
	})

ssize_t __real_pread64(int fd, void *buf, size_t n, off_t off);
ssize_t __wrap_pread64(int fd, void *buf, size_t n, off_t off);
ssize_t __wrap_pread64(int fd, void *buf, size_t n, off_t off)
{
	struct inject_io io = { INJECT_PREAD, fd, (uint64_t)off, n, NULL };
	return AROUND(io, __real_pread64(fd, buf, io.len, off));
}

/* Only farpage's FAR_NOWAIT reads come this way, with one buffer. */
ssize_t __real_preadv64v2(int fd, const struct iovec *v, int n, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *v, int n, off_t off, int flags);
ssize_t __wrap_preadv64v2(int fd, const struct iovec *v, int n, off_t off, int flags)
{
	struct inject_io io = { INJECT_PREAD, fd, (uint64_t)off, v->iov_len, NULL };
	struct iovec one = *v;
	FAR_ASSERT(n == 1);
	return AROUND(io, (one.iov_len = io.len, __real_preadv64v2(fd, &one, 1, off, flags)));
}

ssize_t __real_pwrite64(int fd, const void *buf, size_t n, off_t off);
ssize_t __wrap_pwrite64(int fd, const void *buf, size_t n, off_t off);
ssize_t __wrap_pwrite64(int fd, const void *buf, size_t n, off_t off)
{
	struct inject_io io = { INJECT_PWRITE, fd, (uint64_t)off, n, buf };
	return AROUND(io, __real_pwrite64(fd, buf, io.len, off));
}

int __real_fdatasync(int fd);
int __wrap_fdatasync(int fd);
int __wrap_fdatasync(int fd)
{
	struct inject_io io = { INJECT_SYNC, fd, 0, 0, NULL };
	return (int)AROUND(io, __real_fdatasync(fd));
}

int __real_fsync(int fd);
int __wrap_fsync(int fd);
int __wrap_fsync(int fd)
{
	struct inject_io io = { INJECT_SYNC, fd, 0, 0, NULL };
	return (int)AROUND(io, __real_fsync(fd));
}

int __real_fallocate64(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate64(int fd, int mode, off_t off, off_t len);
int __wrap_fallocate64(int fd, int mode, off_t off, off_t len)
{
	struct inject_io io = { INJECT_PUNCH, fd, (uint64_t)off, (size_t)len, NULL };
	if (!(mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)))
		return __real_fallocate64(fd, mode, off, len);
	return (int)AROUND(io, __real_fallocate64(fd, mode, off, len));
}

int __real_ftruncate64(int fd, off_t len);
int __wrap_ftruncate64(int fd, off_t len);
int __wrap_ftruncate64(int fd, off_t len)
{
	struct inject_io io = { INJECT_TRUNCATE, fd, (uint64_t)len, 0, NULL };
	return (int)AROUND(io, __real_ftruncate64(fd, len));
}
