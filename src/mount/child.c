/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The library's file face: far_mount_open() and its family. A process that uses a file which it serves itself can
 * become unkillable, so the file is served by a child, farpage-serve, which is the `mount` verb of the command with
 * three things added:
 *
 *     life       a socket: the child writes its path there once usable, and ends in good order when it closes
 *     backend    a socket: a backend of the caller's, served to the child over gRPC by a server in this process
 *     hooks      a control socket of ours on which the child asks before it flushes or closes, and reports chunks
 *     memory     a socket: instead of a file it serves memory of ours, which outside.c hands over there
 *
 * Everything else (flush, wait, status, stop) goes through the child's own control socket, as `farpage status` does.
 * Both control sockets lie in a directory of their own, made for this mount and removed with it.
 */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/thread.h"
#include "frontend/fuse_mount.h"
#include "mount/child.h"
#include "mount/control.h"
#include "mount/face.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHILD_LIFE_FD 3 /* numbers in the child */
#define CHILD_BACKEND_FD 4
#define CHILD_MEMORY_FD 5
#define CHILD_ARGS 48
#define CHILD_END_SLACK (5 * FAR_SEC)

struct child {
	struct far_mount face;
	/* fixed after open */
	struct far_mount_opts o;
	char dir[64];             /* of the sockets */
	char control[96], hooks_path[96];
	char *path, *target;
	pid_t pid;
	int life_fd;
	struct far_backend *backend; /* the caller's; NULL: the child opened a URI */
	struct far_server *server;   /* serves it to the child */
	struct far_control *hooks;
	int (*hand_over)(void *opaque, int socket, struct far_error *err); /* NULL: a file */
	void *opaque;

	struct far_mutex lock;
	int fd FAR_GUARDED_BY(lock); /* of far_fd(); -1: not opened yet */
};

/* ----------------------------------------------------------------------------------------------------------- hooks */

static void child_locals(struct child *m, struct json_object *req)
{
	struct json_object *list, *pair;

	if (!m->o.chunk_local || !json_object_object_get_ex(req, "ranges", &list))
		return;
	for (size_t k = 0; k < json_object_array_length(list); k++) {
		pair = json_object_array_get_idx(list, k);
		m->o.chunk_local(m->o.opaque, (uint64_t)json_object_get_int64(json_object_array_get_idx(pair, 0)),
				 (uint64_t)json_object_get_int64(json_object_array_get_idx(pair, 1)));
	}
}

/* The child asks or tells; on a thread of the control socket. */
static struct json_object *child_hook_cb(void *opaque, const char *op, struct json_object *req)
{
	struct child *m = opaque;
	struct far_status st = FAR_STATUS_INIT;
	int r = 0;

	if (strcmp(op, "before-flush") == 0) {
		r = m->o.before_flush ? m->o.before_flush(m->o.opaque) : 0;
	} else if (strcmp(op, "before-close") == 0) {
		r = m->o.before_close ? m->o.before_close(m->o.opaque) : 0;
	} else if (strcmp(op, "local") == 0) {
		child_locals(m, req);
	} else if (strcmp(op, "progress") == 0 && m->o.progress) {
		far_control_read_status(req, &st);
		m->o.progress(m->o.opaque, &st);
	}
	return r ? far_control_error(r, "the program's %s hook refused: %s", op, far_strerror(r)) : far_control_ok();
}

/* ----------------------------------------------------------------------------------------------------------- spawn */

/* farpage-serve lies beside the library, or in libexec beside its folder, or beside the program that holds the library. */
static int child_find(char *out, size_t n, struct far_error *err)
{
	static const char *const places[] = { "%s/farpage-serve", "%s/farpage/farpage-serve", "%s/../farpage/farpage-serve",
					      "%s/../libexec/farpage-serve", "%s/../../libexec/farpage-serve" };
	char dir[PATH_MAX];
	Dl_info info;

	if (!dladdr((void *)(uintptr_t)far_version, &info) || !info.dli_fname)
		snprintf(dir, sizeof dir, "./");
	else if (!realpath(info.dli_fname, dir))
		return far_error_set(err, errno, "cannot look for farpage-serve beside %s: %s", info.dli_fname,
				     far_strerror(errno));
	char *slash = strrchr(dir, '/');
	if (slash)
		*slash = 0;
	for (size_t k = 0; k < FAR_ARRAY_LEN(places); k++) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
		snprintf(out, n, places[k], dir);
#pragma GCC diagnostic pop
		if (access(out, X_OK) == 0)
			return 0;
	}
	return far_error_set(err, ENOENT, "cannot find farpage-serve beside %s: it serves the file. Install farpage whole", dir);
}

struct child_args {
	char *v[CHILD_ARGS];
	size_t n;
	bool lost; /* no memory */
};

static void child_arg(struct child_args *a, const char *fmt, ...) FAR_PRINTF(2, 3);
static void child_arg(struct child_args *a, const char *fmt, ...)
{
	va_list ap;

	FAR_ASSERT(a->n + 1 < CHILD_ARGS);
	va_start(ap, fmt);
	if (vasprintf(&a->v[a->n], fmt, ap) < 0)
		a->lost = true;
	else
		a->n++;
	va_end(ap);
}

static void child_args_options(struct child_args *a, const struct far_mount_opts *o)
{
	static const char *const modes[] = { "auto", "direct", "managed" };

	if (o->mode != FAR_MODE_AUTO)
		child_arg(a, "--mode=%s", modes[o->mode]);
	if (o->read_only)
		child_arg(a, "--read-only");
	if (o->chunk)
		child_arg(a, "--chunk=%" PRIu64, o->chunk);
	if (o->local)
		child_arg(a, "--local=%s", o->local);
	if (o->map)
		child_arg(a, "--map=%s", o->map);
	if (o->take_over)
		child_arg(a, "--take-over");
	if (o->discard_clean)
		child_arg(a, "--discard-clean");
	if (o->force)
		child_arg(a, "--force");
	if (o->follow_ms == UINT32_MAX)
		child_arg(a, "--follow=never");
	else if (o->follow_ms)
		child_arg(a, "--follow=%ums", o->follow_ms);
	if (o->local_max)
		child_arg(a, "--local-max=%" PRIu64, o->local_max);
	if (o->dirty_max)
		child_arg(a, "--dirty-max=%" PRIu64, o->dirty_max);
	if (o->pull_workers >= 0)
		child_arg(a, "--pull-workers=%d", o->pull_workers);
	if (o->push_workers >= 0)
		child_arg(a, "--push-workers=%d", o->push_workers);
	if (o->push_interval_ms)
		child_arg(a, "--push-interval=%ums", o->push_interval_ms);
	if (o->pull_first)
		child_arg(a, "--pull-first=%" PRIu64, o->pull_first);
	if (o->window)
		child_arg(a, "--window=%" PRIu64, o->window);
	if (o->order)
		child_arg(a, "--order=%s", o->order);
	if (o->record_order)
		child_arg(a, "--record-order=%s", o->record_order);
	if (o->durable == FAR_DURABLE_LOCAL)
		child_arg(a, "--durable=local");
	if (o->deadline_ms)
		child_arg(a, "--deadline=%ums", o->deadline_ms);
	if (o->on_fail == FAR_ON_FAIL_WAIT)
		child_arg(a, "--on-fail=wait");
	if (o->max_blocked)
		child_arg(a, "--max-blocked=%u", o->max_blocked);
	if (o->max_partial)
		child_arg(a, "--max-partial=%u", o->max_partial);
}

static bool child_has_hooks(const struct far_mount_opts *o)
{
	return o->before_flush || o->before_close || o->chunk_local || o->progress;
}

static int child_spawn(struct child *m, const char *exe, char **argv, int life, int backend, int memory, int errors)
{
	extern char **environ;
	posix_spawn_file_actions_t act;
	posix_spawnattr_t attr;
	sigset_t none, all;

	sigemptyset(&none);
	sigfillset(&all);
	posix_spawnattr_init(&attr);
	posix_spawnattr_setsigmask(&attr, &none);
	posix_spawnattr_setsigdefault(&attr, &all);
	/* A process group of its own: Ctrl-C is for the program, which then closes its mounts. */
	posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
	posix_spawn_file_actions_init(&act);
	posix_spawn_file_actions_addopen(&act, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
	posix_spawn_file_actions_addopen(&act, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
	posix_spawn_file_actions_adddup2(&act, errors, STDERR_FILENO);
	posix_spawn_file_actions_adddup2(&act, life, CHILD_LIFE_FD);
	if (backend >= 0)
		posix_spawn_file_actions_adddup2(&act, backend, CHILD_BACKEND_FD);
	if (memory >= 0)
		posix_spawn_file_actions_adddup2(&act, memory, CHILD_MEMORY_FD);
	int r = posix_spawn(&m->pid, exe, &act, &attr, argv, environ);
	posix_spawn_file_actions_destroy(&act);
	posix_spawnattr_destroy(&attr);
	return -r;
}

/* The last line that the child wrote to its standard error, as the error's sentence. */
static int child_error(struct child *m, int errors, struct far_error *err)
{
	char text[2000] = "", *line = text, *end;
	int status = 0, code = EIO;
	ssize_t n = pread(errors, text, sizeof text - 1, 0);

	text[n > 0 ? n : 0] = 0;
	while (waitpid(m->pid, &status, 0) < 0 && errno == EINTR)
		;
	m->pid = -1;
	if (WIFEXITED(status))
		code = WEXITSTATUS(status) == 2 ? EINVAL : WEXITSTATUS(status) == 4 ? ETIMEDOUT : EIO;
	for (end = text + strlen(text); end > text && end[-1] == '\n';)
		*--end = 0;
	if ((end = strrchr(text, '\n')))
		line = end + 1;
	if (strncmp(line, "farpage: ", 9) == 0)
		line += 9;
	return far_error_set(err, code, "%s", *line ? line : "cannot mount: farpage-serve ended without a word");
}

/* Wait for "PATH\n" on the life socket. */
static int child_ready(struct child *m, int errors, struct far_error *err)
{
	char line[PATH_MAX + 1];
	size_t at = 0;

	while (at < sizeof line - 1) {
		ssize_t n = read(m->life_fd, line + at, sizeof line - 1 - at);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return child_error(m, errors, err);
		at += (size_t)n;
		if (line[at - 1] == '\n')
			break;
	}
	line[at - 1] = 0;
	m->path = strdup(line);
	return m->path ? 0 : far_error_set(err, ENOMEM, "cannot mount: out of memory");
}

/* High numbers, so that putting them on 3, 4 and 5 cannot overwrite one of them. */
static int child_pair(int pair[2])
{
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return -errno;
	for (int k = 0; k < 2; k++) {
		int high = fcntl(pair[k], F_DUPFD_CLOEXEC, 10), code = errno;
		close(pair[k]);
		pair[k] = high;
		if (high < 0)
			return -code;
	}
	return 0;
}

/* The child has its memory, or *r says why not. False: its own words say more. */
static bool child_hand_over(struct child *m, int *socket, int *r, struct far_error *err)
{
	*r = m->hand_over ? m->hand_over(m->opaque, *socket, err) : 0;
	far_fd_close(socket);
	if (!*r || *r == -ENOTCONN)
		return false;
	far_fd_close(&m->life_fd);
	while (waitpid(m->pid, NULL, 0) < 0 && errno == EINTR)
		;
	m->pid = -1;
	return true;
}

static void child_command(const struct child *m, struct child_args *a, const char *uri, const char *target)
{
	child_arg(a, "farpage-serve");
	child_arg(a, "--life=%d", CHILD_LIFE_FD);
	if (m->backend)
		child_arg(a, "--backend=%d", CHILD_BACKEND_FD);
	if (m->hand_over)
		child_arg(a, "--memory=%d", CHILD_MEMORY_FD);
	if (child_has_hooks(&m->o))
		child_arg(a, "--hooks=%s", m->hooks_path);
	child_arg(a, "mount");
	child_arg(a, "--quiet");
	child_arg(a, "--control=%s", m->control);
	child_args_options(a, &m->o);
	child_arg(a, "--");
	child_arg(a, "%s", uri);
	child_arg(a, "%s", target);
	a->v[a->n] = NULL;
}

static int child_start(struct child *m, const char *uri, const char *target, struct far_error *err)
{
	struct child_args a = { .n = 0 };
	char exe[PATH_MAX + 64];
	int life[2] = { -1, -1 }, back[2] = { -1, -1 }, memory[2] = { -1, -1 };
	int errors = memfd_create("farpage-serve-errors", MFD_CLOEXEC);
	int r = errors < 0 ? far_error_set(err, errno, "cannot mount on %s: %s", target, far_strerror(errno))
			   : child_find(exe, sizeof exe, err);

	if (r)
		goto out;
	r = child_pair(life);
	if (!r && m->backend)
		r = child_pair(back);
	if (!r && m->hand_over)
		r = child_pair(memory);
	if (r) {
		far_error_set(err, -r, "cannot mount on %s: %s", target, far_strerror(r));
		goto out;
	}
	if (m->backend) {
		r = far_server_serve(m->server, back[0], err);
		if (r)
			goto out;
		back[0] = -1;
	}
	child_command(m, &a, uri, target);
	r = a.lost ? -ENOMEM : child_spawn(m, exe, a.v, life[1], back[1], memory[1], errors);
	if (r) {
		far_error_set(err, -r, "cannot start %s: %s", exe, far_strerror(r));
		goto out;
	}
	m->life_fd = life[0];
	life[0] = -1;
	far_fd_close(&life[1]); /* so that the child's end is the only one */
	far_fd_close(&back[1]);
	far_fd_close(&memory[1]);
	if (!child_hand_over(m, &memory[0], &r, err))
		r = child_ready(m, errors, err);
out:
	for (size_t k = 0; k < a.n; k++)
		free(a.v[k]);
	far_fd_close(&life[0]);
	far_fd_close(&life[1]);
	far_fd_close(&back[0]);
	far_fd_close(&back[1]);
	far_fd_close(&memory[0]);
	far_fd_close(&memory[1]);
	far_fd_close(&errors);
	return r;
}

/* ---------------------------------------------------------------------------------------------------- open, close */

static void child_free(struct child *m)
{
	far_fd_close(&m->fd);
	far_fd_close(&m->life_fd);
	far_control_close(m->hooks);
	if (m->server) {
		far_server_stop(m->server);
		far_server_free(m->server);
	}
	if (m->dir[0])
		rmdir(m->dir);
	far_mutex_fini(&m->lock);
	free(m->path);
	free(m->target);
	free(m);
}

static int child_prepare(struct child *m, struct far_error *err)
{
	const char *run = getenv("XDG_RUNTIME_DIR");
	int r;

	snprintf(m->dir, sizeof m->dir, "%s/farpage-XXXXXX", run && run[0] == '/' && strlen(run) < 40 ? run : "/tmp");
	if (!mkdtemp(m->dir)) {
		r = far_error_set(err, errno, "cannot make the directory %s: %s", m->dir, far_strerror(errno));
		m->dir[0] = 0;
		return r;
	}
	snprintf(m->control, sizeof m->control, "%s/control", m->dir);
	snprintf(m->hooks_path, sizeof m->hooks_path, "%s/hooks", m->dir);
	if (child_has_hooks(&m->o)) {
		r = far_control_open(m->hooks_path, NULL, &m->hooks, err);
		if (!r)
			r = far_control_start(m->hooks, child_hook_cb, m, err);
		if (r)
			return r;
	}
	if (!m->backend)
		return 0;
	struct far_server_opts so = FAR_SERVER_OPTS_INIT;
	r = far_server_new(&so, &m->server, err);
	return r ? r : far_server_export(m->server, "default", m->backend, err);
}

static const struct far_face_ops child_face;

static int child_open(struct far_backend *b, const char *uri, const char *target, const struct far_mount_opts *opts,
		      int (*hand_over)(void *opaque, int socket, struct far_error *err), void *opaque, struct far_mount **out,
		      struct far_error *err)
{
	struct child *m = calloc(1, sizeof *m);

	if (!m)
		return far_error_set(err, ENOMEM, "cannot mount on %s: out of memory", target);
	m->o = (struct far_mount_opts)FAR_MOUNT_OPTS_INIT;
	if (opts)
		memcpy(&m->o, opts, far_min(opts->size, sizeof m->o));
	m->face.ops = &child_face;
	m->backend = b;
	m->hand_over = hand_over;
	m->opaque = opaque;
	m->life_fd = m->fd = -1;
	m->pid = -1;
	far_mutex_init(&m->lock);
	int r = 0;
	if (m->o.local_backend || m->o.priority)
		r = far_error_set(err, EOPNOTSUPP, "cannot mount on %s: a local store or an order given as code is not in "
				  "this version; give a URI or a list of ranges", target);
	m->target = hand_over ? NULL : realpath(target, NULL); /* NULL: the child says what is wrong with it */
	if (!r)
		r = child_prepare(m, err);
	if (!r)
		r = child_start(m, uri, target, err);
	if (r) {
		child_free(m);
		return r;
	}
	*out = &m->face;
	return 0;
}

int far_mount_open_uri(const char *uri, const char *target, const struct far_mount_opts *opts, struct far_mount **out,
		       struct far_error *err)
{
	return child_open(NULL, uri, target, opts, NULL, NULL, out, err);
}

int far_mount_open(struct far_backend *b, const char *target, const struct far_mount_opts *opts, struct far_mount **out,
		   struct far_error *err)
{
	return child_open(b, "fd:", target, opts, NULL, NULL, out, err);
}

int far_child_open_memory(const char *uri, const struct far_mount_opts *opts,
			  int (*hand_over)(void *opaque, int socket, struct far_error *err), void *opaque,
			  struct far_mount **out, struct far_error *err)
{
	return child_open(NULL, uri, "memory", opts, hand_over, opaque, out, err);
}

/* ------------------------------------------------------------------------------------------------------- the face */

static struct child *child_of(struct far_mount *m)
{
	return (struct child *)m;
}

static const char *child_path(const struct far_mount *m)
{
	return ((const struct child *)m)->path;
}

static int child_fd(struct far_mount *face)
{
	struct child *m = child_of(face);

	far_mutex_lock(&m->lock);
	if (m->fd < 0) {
		m->fd = open(m->path, (m->o.read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
		if (m->fd < 0 && (errno == EACCES || errno == EROFS))
			m->fd = open(m->path, O_RDONLY | O_CLOEXEC);
	}
	int r = m->fd < 0 ? -errno : m->fd;
	far_mutex_unlock(&m->lock);
	return r;
}

static int child_ask(struct child *m, struct json_object *req, int timeout_ms, struct json_object **reply)
{
	struct far_error err = { 0 };
	int r = far_control_call(m->control, NULL, req, timeout_ms, reply, &err);

	json_object_put(req);
	return r == -ENOENT || r == -ECONNREFUSED ? -ENOTCONN : r;
}

static struct json_object *child_request(const char *op, int timeout_ms)
{
	struct json_object *req = json_object_new_object();

	far_control_put(&req, "op", json_object_new_string(op));
	if (timeout_ms >= 0)
		far_control_put(&req, "timeout_ms", json_object_new_int(timeout_ms));
	return req;
}

static int child_flush(struct far_mount *face)
{
	struct child *m = child_of(face);
	if (m->hand_over)
		return child_ask(m, child_request("flush", -1), -1, NULL);

	int fd = child_fd(face);
	/* Pages that were stored through a mapping are the kernel's to write back: fsync, from a process that does not
	 * serve. It says no more than EIO; the server knows the code. */
	if (fd < 0)
		return fd;
	int r = fsync(fd) < 0 ? -errno : 0;
	int why = child_ask(m, child_request("flush", -1), -1, NULL);
	return why ? why : r;
}

int far_child_life(struct far_mount *m)
{
	return child_of(m)->life_fd;
}

static int child_wait(struct far_mount *m, unsigned percent, int timeout_ms)
{
	struct json_object *req = child_request("wait", timeout_ms);

	far_control_put(&req, "percent", json_object_new_int((int)far_min(percent, 100)));
	return child_ask(child_of(m), req, -1, NULL);
}

/* Ask for something on a range. */
static int child_ask_range(struct child *m, const char *op, uint64_t off, uint64_t len, int timeout_ms)
{
	struct json_object *req = child_request(op, timeout_ms);
	char range[48];

	if (len > FAR_SIZE_MAX || off > FAR_SIZE_MAX - len)
		len = FAR_SIZE_MAX - far_min(off, FAR_SIZE_MAX);
	snprintf(range, sizeof range, "%" PRIu64 "-%" PRIu64, off, off + len);
	far_control_put(&req, "ranges", json_object_new_string(range));
	return child_ask(m, req, -1, NULL);
}

static int child_wait_range(struct far_mount *m, uint64_t off, uint64_t len, int timeout_ms)
{
	return child_ask_range(child_of(m), "wait", off, len, timeout_ms);
}

static int child_range(struct far_mount *m, enum far_face_range what, uint64_t off, uint64_t len)
{
	static const char *const words[] = { [FAR_FACE_PIN] = "pin", [FAR_FACE_UNPIN] = "unpin", [FAR_FACE_EVICT] = "evict",
					     [FAR_FACE_POPULATE] = "populate", [FAR_FACE_HEAL] = "heal", [FAR_FACE_STORED] = "stored" };

	if (what >= FAR_ARRAY_LEN(words) || !words[what] || (what > FAR_FACE_EVICT && !child_of(m)->hand_over))
		return -EOPNOTSUPP;
	return child_ask_range(child_of(m), words[what], off, len, -1);
}

static int child_status(struct far_mount *m, struct far_status *st)
{
	struct json_object *reply = NULL;
	int r = child_ask(child_of(m), child_request("status", -1), 10000, &reply);

	if (!r)
		far_control_read_status(reply, st);
	json_object_put(reply);
	return r;
}

/* Wait for the child to end; what has not ended by then is killed: it has been told twice. */
static void child_reap(struct child *m)
{
	uint64_t until = far_now() + (m->o.deadline_ms ? m->o.deadline_ms : 30000) * FAR_MSEC + CHILD_END_SLACK;
	int status;

	far_fd_close(&m->life_fd);
	while (m->pid > 0 && waitpid(m->pid, &status, WNOHANG) == 0) {
		if (far_now() > until)
			kill(m->pid, SIGKILL);
		far_sleep_until(far_now() + 2 * FAR_MSEC, false);
	}
	m->pid = -1;
}

static int child_close(struct far_mount *face)
{
	struct child *m = child_of(face);

	far_fd_close(&m->fd);
	int r = child_ask(m, child_request("stop", -1), -1, NULL);
	child_reap(m);
	unsigned major, minor;
	bool ours;
	if (r == -ENOTCONN && m->target && far_fuse_mount_find(m->target, &major, &minor, &ours) > 0 && ours)
		far_fuse_mount_detach(m->target, true); /* what a killed child left behind */
	struct far_backend *b = m->backend;
	child_free(m);
	far_close(b);
	return r;
}

static const struct far_face_ops child_face = {
	.path = child_path,
	.fd = child_fd,
	.flush = child_flush,
	.wait = child_wait,
	.wait_range = child_wait_range,
	.range = child_range,
	.status = child_status,
	.close = child_close,
};
