/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One thread accepts; each connection gets a slot with a thread of its own, because `wait` and `flush` last. A slot is
 *
 *   FREE -> BUSY   control_accept_cb(), the accepting thread alone
 *   BUSY -> DONE   the slot's thread, as its last act
 *   DONE -> FREE   control_reap(), the accepting thread (or far_control_close() after it ended), which joins the thread
 *
 * Only the state is shared, under `lock`; fd and thread belong to whoever the state says. far_control_close() sets `ending`
 * and shuts the reading side of every connection: a thread that reads a request sees the end, one that carries out a
 * request may still write its answer.
 */
#define _GNU_SOURCE
#include "mount/control.h"

#include "base/clock.h"
#include "base/thread.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define CONTROL_SLOTS 16
#define CONTROL_LINE ((size_t)65536)

enum control_state { CONTROL_FREE, CONTROL_BUSY, CONTROL_DONE };

struct control_slot {
	struct far_control *c;
	enum control_state state; /* under c->lock */
	int fd;
	struct far_thread thread;
};

struct far_control {
	/* fixed after open */
	char path[PATH_MAX];
	int listen_fd, wake_fd;
	far_control_fn *fn;
	void *opaque;
	/* under lock */
	struct far_mutex lock;
	bool ending FAR_GUARDED_BY(&lock);
	struct control_slot slot[CONTROL_SLOTS];
	/* the owner */
	struct far_thread thread;
};

/* ------------------------------------------------------------------------------------------------- paths */

static uint64_t control_hash(const char *s)
{
	uint64_t h = 0xcbf29ce484222325u; /* FNV-1a */

	for (; *s; s++)
		h = (h ^ (unsigned char)*s) * 0x100000001b3u;
	return h;
}

/* The directory of the sockets; made if `make`. It must be ours alone: others could answer in our place. */
static int control_dir(char *buf, size_t n, bool make, struct far_error *err)
{
	const char *run = getenv("XDG_RUNTIME_DIR");
	struct stat st;

	if (geteuid() == 0)
		snprintf(buf, n, "/run/farpage");
	else if (run && run[0] == '/')
		snprintf(buf, n, "%s/farpage", run);
	else
		snprintf(buf, n, "/tmp/farpage-%u", (unsigned)geteuid());
	if (make && mkdir(buf, 0700) < 0 && errno != EEXIST)
		return far_error_set(err, errno,
				     "cannot make the directory %s for the control socket: %s. Name another place with --control",
				     buf, far_strerror(errno));
	if (lstat(buf, &st) < 0)
		return make ? far_error_set(err, errno, "cannot use %s: %s. Name another place with --control", buf,
					    far_strerror(errno))
			    : -errno;
	if (!S_ISDIR(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 077))
		return far_error_set(err, EPERM,
				     "cannot use %s for control sockets: others may enter it. Make it yours with mode 0700, or "
				     "use --control",
				     buf);
	return 0;
}

static int control_default_path(const char *real, bool make, char *buf, size_t n, struct far_error *err)
{
	char dir[PATH_MAX - 64];
	int r = control_dir(dir, sizeof dir, make, err);

	if (r == 0)
		snprintf(buf, n, "%s/%016" PRIx64 ".sock", dir, control_hash(real));
	return r;
}

static int control_address(const char *path, struct sockaddr_un *sa, struct far_error *err)
{
	*sa = (struct sockaddr_un){ .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof sa->sun_path)
		return far_error_set(err, ENAMETOOLONG,
				     "cannot use the control socket %s: its path is longer than %zu bytes. Choose a shorter one",
				     path, sizeof sa->sun_path - 1);
	strcpy(sa->sun_path, path);
	return 0;
}

/* A connected socket, or -errno. */
static int control_connect(const char *path, struct far_error *err)
{
	struct sockaddr_un sa;
	int r = control_address(path, &sa, err);

	if (r < 0)
		return r;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	if (connect(fd, (struct sockaddr *)&sa, sizeof sa) < 0) {
		r = -errno;
		close(fd);
		return r;
	}
	return fd;
}

/* ------------------------------------------------------------------------------------------------- lines */

/* Read up to a newline or the end into buf (terminated). 0, -EMSGSIZE, -ETIMEDOUT or -errno. */
static int control_read_line(int fd, char *buf, size_t n, uint64_t deadline)
{
	size_t at = 0;

	while (at + 1 < n) {
		struct pollfd p = { .fd = fd, .events = POLLIN };
		int r = poll(&p, 1, far_deadline_poll_ms(deadline));
		if (r == 0)
			return -ETIMEDOUT;
		ssize_t got = r < 0 ? -1 : read(fd, buf + at, n - at - 1);
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		at += (size_t)got;
		buf[at] = '\0';
		if (got == 0 || memchr(buf, '\n', at))
			return at ? 0 : -ECONNRESET;
	}
	return -EMSGSIZE;
}

static int control_send(int fd, const char *line, size_t n)
{
	for (size_t at = 0; at < n;) {
		ssize_t put = send(fd, line + at, n - at, MSG_NOSIGNAL);
		if (put < 0 && errno == EINTR)
			continue;
		if (put < 0)
			return -errno;
		at += (size_t)put;
	}
	return 0;
}

static int control_write_json(int fd, struct json_object *o)
{
	const char *text = !o ? NULL :
			   json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE);
	size_t n = text ? strlen(text) : 0;
	char *line = text ? malloc(n + 1) : NULL;

	if (!line)
		return -ENOMEM;
	memcpy(line, text, n);
	line[n++] = '\n';
	int r = control_send(fd, line, n);
	free(line);
	return r;
}

/* An answer that there was memory for, or else that there was none. */
static void control_reply(int fd, struct json_object *o)
{
	static const char none[] = "{\"ok\":false,\"code\":12,\"error\":\"no memory for the answer: try again\"}\n";

	_Static_assert(ENOMEM == 12, "as the text has it");
	if (control_write_json(fd, o) == -ENOMEM)
		control_send(fd, none, sizeof none - 1);
}

void far_control_put(struct json_object **o, const char *key, struct json_object *v)
{
	if (*o && v && json_object_object_add(*o, key, v) == 0)
		return;
	json_object_put(v);
	json_object_put(*o);
	*o = NULL;
}

struct json_object *far_control_ok(void)
{
	struct json_object *o = json_object_new_object();

	far_control_put(&o, "ok", json_object_new_boolean(true));
	return o;
}

/* A far_status as JSON and back; doc/status.md explains each. */
static const struct {
	const char *key;
	size_t offset;
} control_numbers[] = {
#define N(key, field) { key, offsetof(struct far_status, field) }
	N("size", bytes), N("local", local), N("dirty", dirty), N("pulled", pulled), N("pushed", pushed),
	N("inflight", inflight), N("window", window), N("demand_reads", demand_reads), N("blocked", blocked),
	N("errors", errors), N("reconnects", reconnects), N("checksum_errors", checksum_errors),
	N("local_errors", local_errors), N("pinned", pinned), N("epoch", epoch), N("oldest_dirty_ms", oldest_dirty_ms),
	N("last_error_at", last_error_at),
#undef N
};
static const char *const control_modes[] = { "auto", "direct", "managed" };
static const char *const control_leases[] = { "none", "held", "unsure", "fenced" };
static const char *const control_mechanisms[] = { "auto", "share", "move", "continue", "copy", "sigsegv" };
static const char *const control_trackings[] = { "auto", "none", "async", "sync", "hash" };
static const char *const control_follows[] = { "none", "frozen", "following", "lost" };

static void control_add(struct json_object **o, const char *key, uint64_t v)
{
	far_control_put(o, key, json_object_new_int64((int64_t)v));
}

static void control_add_name(struct json_object **o, const char *key, const char *const *names, unsigned v)
{
	far_control_put(o, key, json_object_new_string(names[v]));
}

/* Only if it is a pointer. */
static void control_add_pointer(struct json_object **o, const struct far_status *st)
{
	struct json_object *list = json_object_new_array(), *one;

	control_add_name(o, "mechanism", control_mechanisms, st->mechanism);
	control_add_name(o, "tracking", control_trackings, st->tracking);
	far_control_put(o, "kernel_faults", json_object_new_boolean(st->kernel_faults));
	far_control_put(o, "outside", json_object_new_boolean(st->outside));
	control_add(o, "faults", st->faults);
	control_add(o, "poisoned", st->poisoned);
	for (unsigned k = 0; list && k < st->n_blocked && k < FAR_ARRAY_LEN(st->blocked_at); k++) {
		one = json_object_new_object();
		control_add(&one, "offset", st->blocked_at[k]);
		control_add(&one, "ms", st->blocked_ms[k]);
		if (!one || json_object_array_add(list, one)) {
			json_object_put(one);
			json_object_put(list);
			list = NULL;
		}
	}
	far_control_put(o, "blocked_at", list);
}

struct json_object *far_control_status(const struct far_status *st)
{
	struct json_object *o = far_control_ok();

	control_add_name(&o, "mode", control_modes, st->mode);
	for (size_t i = 0; i < FAR_ARRAY_LEN(control_numbers); i++)
		control_add(&o, control_numbers[i].key, *(const uint64_t *)((const char *)st + control_numbers[i].offset));
	control_add(&o, "pull_rate", (uint64_t)st->pull_rate);
	control_add(&o, "push_rate", (uint64_t)st->push_rate);
	control_add(&o, "last_errno", (uint64_t)st->last_error);
	if (st->last_error)
		far_control_put(&o, "last_error", json_object_new_string(far_strerror(st->last_error)));
	else if (o && json_object_object_add(o, "last_error", NULL))
		far_control_put(&o, "last_error", NULL);
	control_add_name(&o, "lease", control_leases, st->lease);
	control_add_name(&o, "follow", control_follows, st->follow);
	far_control_put(&o, "persistent", json_object_new_boolean(st->persistent));
	far_control_put(&o, "local_full", json_object_new_boolean(st->local_full));
	if (st->mechanism != FAR_MECH_AUTO)
		control_add_pointer(&o, st);
	return o;
}

static uint64_t control_get(struct json_object *o, const char *key)
{
	struct json_object *v;
	return json_object_object_get_ex(o, key, &v) ? (uint64_t)json_object_get_int64(v) : 0;
}

static unsigned control_get_name(struct json_object *o, const char *key, const char *const *names, unsigned n)
{
	struct json_object *v;
	const char *s = json_object_object_get_ex(o, key, &v) ? json_object_get_string(v) : NULL;

	for (unsigned i = 0; s && i < n; i++)
		if (strcmp(s, names[i]) == 0)
			return i;
	return 0;
}

static bool control_get_bool(struct json_object *o, const char *key)
{
	struct json_object *v;
	return json_object_object_get_ex(o, key, &v) && json_object_get_boolean(v);
}

static void control_read_pointer(struct json_object *o, struct far_status *st)
{
	struct json_object *list, *one;

	st->mechanism = (enum far_mechanism)control_get_name(o, "mechanism", control_mechanisms, FAR_ARRAY_LEN(control_mechanisms));
	st->tracking = (enum far_tracking)control_get_name(o, "tracking", control_trackings, FAR_ARRAY_LEN(control_trackings));
	st->kernel_faults = control_get_bool(o, "kernel_faults");
	st->outside = control_get_bool(o, "outside");
	st->faults = control_get(o, "faults");
	st->poisoned = control_get(o, "poisoned");
	if (!json_object_object_get_ex(o, "blocked_at", &list) || !json_object_is_type(list, json_type_array))
		return;
	for (size_t k = 0; k < json_object_array_length(list) && k < FAR_ARRAY_LEN(st->blocked_at); k++) {
		one = json_object_array_get_idx(list, k);
		st->blocked_at[k] = control_get(one, "offset");
		st->blocked_ms[k] = control_get(one, "ms");
		st->n_blocked = (uint32_t)k + 1;
	}
}

void far_control_read_status(struct json_object *o, struct far_status *out)
{
	struct far_status st = FAR_STATUS_INIT;

	st.mode = (enum far_mode)control_get_name(o, "mode", control_modes, FAR_ARRAY_LEN(control_modes));
	for (size_t i = 0; i < FAR_ARRAY_LEN(control_numbers); i++)
		*(uint64_t *)((char *)&st + control_numbers[i].offset) = control_get(o, control_numbers[i].key);
	st.pull_rate = (double)control_get(o, "pull_rate");
	st.push_rate = (double)control_get(o, "push_rate");
	st.last_error = (int)control_get(o, "last_errno");
	st.lease = (enum far_lease_state)control_get_name(o, "lease", control_leases, FAR_ARRAY_LEN(control_leases));
	st.follow = (enum far_follow)control_get_name(o, "follow", control_follows, FAR_ARRAY_LEN(control_follows));
	st.persistent = control_get_bool(o, "persistent");
	st.local_full = control_get_bool(o, "local_full");
	control_read_pointer(o, &st);
	st.size = out->size;
	memcpy(out, &st, far_min(out->size, sizeof st));
}

struct json_object *far_control_error(int code, const char *fmt, ...)
{
	struct json_object *o = json_object_new_object();
	char text[480];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	far_control_put(&o, "ok", json_object_new_boolean(false));
	far_control_put(&o, "code", json_object_new_int(code < 0 ? -code : code));
	far_control_put(&o, "error", json_object_new_string(text));
	return o;
}

/* ------------------------------------------------------------------------------------------------ server */

bool far_control_ending(struct far_control *c)
{
	far_mutex_lock(&c->lock);
	bool ending = c->ending;
	far_mutex_unlock(&c->lock);
	return ending;
}

/* Only this user and root may give orders, wherever --control put the socket. */
static bool control_may(int fd)
{
	struct ucred cred;
	socklen_t n = sizeof cred;

	return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &n) == 0 && (cred.uid == geteuid() || cred.uid == 0);
}

static struct json_object *control_answer(struct far_control *c, const char *line)
{
	struct json_object *req = json_tokener_parse(line), *op = NULL, *reply;

	if (!req || !json_object_is_type(req, json_type_object) || !json_object_object_get_ex(req, "op", &op) ||
	    !json_object_is_type(op, json_type_string))
		reply = far_control_error(EPROTO, "the request is not a JSON object with an \"op\"");
	else
		reply = c->fn(c->opaque, json_object_get_string(op), req);
	json_object_put(req);
	return reply;
}

static void *control_slot_main(void *arg)
{
	struct control_slot *s = arg;
	struct far_control *c = s->c;
	char *line = malloc(CONTROL_LINE);
	struct json_object *reply;

	if (line && control_read_line(s->fd, line, CONTROL_LINE, far_now() + 10 * FAR_SEC) == 0) {
		reply = control_may(s->fd) ? control_answer(c, line)
					   : far_control_error(EPERM, "only the user who started this instance may control it");
		control_reply(s->fd, reply);
		json_object_put(reply);
	}
	free(line);
	shutdown(s->fd, SHUT_RDWR); /* the number is closed when the slot is used again: the caller must not wait for that */
	far_mutex_lock(&c->lock);
	s->state = CONTROL_DONE;
	far_mutex_unlock(&c->lock);
	return NULL;
}

/* Join what is done; returns a free slot or NULL. */
static struct control_slot *control_reap(struct far_control *c)
{
	struct control_slot *free_slot = NULL;

	for (size_t i = 0; i < CONTROL_SLOTS; i++) {
		struct control_slot *s = &c->slot[i];
		far_mutex_lock(&c->lock);
		enum control_state state = s->state;
		far_mutex_unlock(&c->lock);
		if (state == CONTROL_DONE) {
			far_thread_join(&s->thread);
			far_mutex_lock(&c->lock); /* far_control_close() must not shut down a number that is another's by now */
			far_fd_close(&s->fd);
			s->state = state = CONTROL_FREE;
			far_mutex_unlock(&c->lock);
		}
		if (state == CONTROL_FREE)
			free_slot = s;
	}
	return free_slot;
}

static void control_accept(struct far_control *c)
{
	struct control_slot *s = control_reap(c);
	int fd = accept4(c->listen_fd, NULL, NULL, SOCK_CLOEXEC);

	if (fd < 0)
		return;
	if (!s) {
		struct json_object *busy = far_control_error(EBUSY, "%d requests are being answered already", CONTROL_SLOTS);
		control_write_json(fd, busy);
		json_object_put(busy);
		close(fd);
		return;
	}
	far_mutex_lock(&c->lock);
	s->fd = fd;
	s->state = CONTROL_BUSY;
	far_mutex_unlock(&c->lock);
	if (far_thread_start(&s->thread, "far-control", control_slot_main, s) < 0) {
		far_mutex_lock(&c->lock);
		s->state = CONTROL_FREE;
		far_fd_close(&s->fd);
		far_mutex_unlock(&c->lock);
	}
}

static void *control_main(void *arg)
{
	struct far_control *c = arg;
	struct pollfd p[2] = { { .fd = c->listen_fd, .events = POLLIN }, { .fd = c->wake_fd, .events = POLLIN } };

	while (!far_control_ending(c)) {
		if (poll(p, 2, -1) > 0 && (p[0].revents & POLLIN))
			control_accept(c);
	}
	return NULL;
}

/* Bind; a socket file that nobody listens on is what a killed instance left. */
static int control_bind(int fd, const char *path, struct far_error *err)
{
	struct sockaddr_un sa;
	int r = control_address(path, &sa, err);

	if (r < 0)
		return r;
	if (bind(fd, (struct sockaddr *)&sa, sizeof sa) == 0)
		return 0;
	if (errno == EADDRINUSE) {
		int other = control_connect(path, NULL);
		if (other >= 0) {
			close(other);
			return far_error_set(err, EADDRINUSE,
					     "another farpage runs there already (control socket %s). End it with 'farpage stop'",
					     path);
		}
		struct stat st;
		if (other == -ECONNREFUSED && lstat(path, &st) == 0 && S_ISSOCK(st.st_mode) && unlink(path) == 0 &&
		    bind(fd, (struct sockaddr *)&sa, sizeof sa) == 0)
			return 0;
	}
	r = errno;
	return far_error_set(err, r, "cannot make the control socket %s: %s. Name another place with --control", path,
			     far_strerror(r));
}

int far_control_open(const char *path, const char *target, struct far_control **out, struct far_error *err)
{
	char real[PATH_MAX];
	struct far_control *c = calloc(1, sizeof *c);
	int r = 0;

	if (!c)
		return far_error_set(err, ENOMEM, "there is no memory for the control socket");
	far_mutex_init(&c->lock);
	c->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	c->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	for (size_t i = 0; i < CONTROL_SLOTS; i++) {
		c->slot[i].c = c;
		c->slot[i].fd = -1;
	}
	if (c->wake_fd < 0 || c->listen_fd < 0)
		r = far_error_set(err, errno, "cannot make the control socket: %s", far_strerror(errno));
	else if (path)
		snprintf(c->path, sizeof c->path, "%s", path);
	else if (!realpath(target, real))
		r = far_error_set(err, errno, "cannot use %s: %s", target, far_strerror(errno));
	else
		r = control_default_path(real, true, c->path, sizeof c->path, err);
	if (r == 0)
		r = control_bind(c->listen_fd, c->path, err);
	if (r == 0 && (chmod(c->path, 0600) < 0 || listen(c->listen_fd, 16) < 0)) {
		r = far_error_set(err, errno, "cannot listen on the control socket %s: %s", c->path, far_strerror(errno));
		unlink(c->path);
	}
	if (r < 0) {
		far_fd_close(&c->wake_fd);
		far_fd_close(&c->listen_fd);
		far_mutex_fini(&c->lock);
		free(c);
		return r;
	}
	*out = c;
	return 0;
}

int far_control_start(struct far_control *c, far_control_fn *fn, void *opaque, struct far_error *err)
{
	c->fn = fn;
	c->opaque = opaque;
	int r = far_thread_start(&c->thread, "far-control", control_main, c);
	return r < 0 ? far_error_set(err, -r, "cannot start a thread for the control socket: %s", far_strerror(r)) : 0;
}

void far_control_close(struct far_control *c)
{
	if (!c)
		return;
	far_mutex_lock(&c->lock);
	c->ending = true;
	far_mutex_unlock(&c->lock);
	eventfd_write(c->wake_fd, 1);
	far_thread_join(&c->thread);
	far_mutex_lock(&c->lock);
	for (size_t i = 0; i < CONTROL_SLOTS; i++)
		if (c->slot[i].state == CONTROL_BUSY)
			shutdown(c->slot[i].fd, SHUT_RD);
	far_mutex_unlock(&c->lock);
	for (size_t i = 0; i < CONTROL_SLOTS; i++) {
		far_thread_join(&c->slot[i].thread);
		far_fd_close(&c->slot[i].fd);
	}
	unlink(c->path);
	far_fd_close(&c->listen_fd);
	far_fd_close(&c->wake_fd);
	far_mutex_fini(&c->lock);
	free(c);
}

/* ------------------------------------------------------------------------------------------------ client */

/* The socket of whoever serves target: named by target itself, or by the directory that target lies in (a region that
 * was mounted in a directory). */
static int control_find(const char *target, struct far_error *err)
{
	char real[PATH_MAX], path[PATH_MAX];

	if (!realpath(target, real))
		return far_error_set(err, errno, "cannot find %s: %s", target, far_strerror(errno));
	for (int i = 0; i < 2; i++) {
		int r = control_default_path(real, false, path, sizeof path, err);
		if (r < 0 && r != -ENOENT)
			return r;
		int fd = r < 0 ? r : control_connect(path, err);
		if (fd >= 0)
			return fd;
		char *slash = strrchr(real, '/');
		if (!slash || slash == real)
			break;
		*slash = '\0';
	}
	return far_error_set(err, ENOENT,
			     "nothing is mounted at %s by this user. Check the path, or name the instance's --control socket",
			     target);
}

static int control_reach(const char *path, const char *target, struct far_error *err)
{
	if (!path)
		return control_find(target, err);
	int fd = control_connect(path, err);
	if (fd < 0 && !err->code)
		far_error_set(err, -fd, "nobody answers at the control socket %s: %s", path, far_strerror(fd));
	return fd;
}

int far_control_call(const char *path, const char *target, struct json_object *req, int timeout_ms,
		 struct json_object **reply, struct far_error *err)
{
	uint64_t deadline = timeout_ms < 0 ? FAR_NEVER : far_now() + (uint64_t)timeout_ms * FAR_MSEC;
	struct json_object *o = NULL, *field;
	char *line = malloc(CONTROL_LINE);
	int fd = control_reach(path, target, err);
	int r = !line ? -ENOMEM : fd;

	if (r >= 0)
		r = control_write_json(fd, req);
	if (r >= 0)
		r = control_read_line(fd, line, CONTROL_LINE, deadline);
	if (r < 0 && fd >= 0)
		far_error_set(err, -r, "no answer came: %s", far_strerror(r));
	if (r == 0) {
		o = json_tokener_parse(line);
		if (!o || !json_object_object_get_ex(o, "ok", &field)) {
			r = far_error_set(err, EPROTO, "the answer is not one that farpage gives");
		} else if (!json_object_get_boolean(field)) {
			int code = json_object_object_get_ex(o, "code", &field) ? json_object_get_int(field) : 0;
			const char *text = json_object_object_get_ex(o, "error", &field) ? json_object_get_string(field) : "";
			r = far_error_set(err, code > 0 ? code : EIO, "%s", text);
		}
	}
	if (reply)
		*reply = o;
	else
		json_object_put(o);
	far_fd_close(&fd);
	free(line);
	return r;
}
