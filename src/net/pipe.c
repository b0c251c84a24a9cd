/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Connections that are no single socket of ours: two descriptors (standard input and output), and a command whose standard
 * input and output are one socket, of which we hold the other end.
 *
 * A command lives as long as its connection: close() hangs up, gives it a moment to end by itself, then asks it to (SIGTERM
 * to its process group), then ends it (SIGKILL), and has waited for it when it returns. It is in a process group of its own,
 * so that a terminal's Ctrl-C reaches who uses the connection, and not the command below it.
 */
#define _GNU_SOURCE
#include "net/net.h"

#include "base/thread.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PIPE_GRACE (500 * FAR_MSEC)
#define PIPE_TERM (2 * FAR_SEC)
#define PIPE_LOOK (2 * FAR_MSEC)

extern char **environ;

/* ---------------------------------------------------------------------------------------------- two descriptors */

struct pipe_pair {
	int in, out;
	int in_flags, out_flags; /* as they were */
	bool socket;             /* out is one */
	int stop[2];             /* a pipe whose end is closed by shutdown() */
	struct far_mutex lock;
	bool ended FAR_GUARDED_BY(lock);
};

static bool pipe_pair_ended(struct pipe_pair *p)
{
	far_mutex_lock(&p->lock);
	bool ended = p->ended;
	far_mutex_unlock(&p->lock);
	return ended;
}

static ssize_t pipe_pair_readv(struct far_conn *c, const struct iovec *iov, int n)
{
	struct pipe_pair *p = c->state;
	ssize_t r;

	if (pipe_pair_ended(p))
		return 0;
	do
		r = readv(p->in, iov, n);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : r;
}

static ssize_t pipe_pair_writev(struct far_conn *c, const struct iovec *iov, int n)
{
	struct pipe_pair *p = c->state;
	struct msghdr m = { .msg_iov = (struct iovec *)iov, .msg_iovlen = (size_t)n };
	ssize_t r;

	if (pipe_pair_ended(p))
		return -EPIPE;
	do
		r = p->socket ? sendmsg(p->out, &m, MSG_NOSIGNAL) : writev(p->out, iov, n);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : r;
}

static int pipe_pair_wait(struct far_conn *c, bool in, bool out, uint64_t until)
{
	struct pipe_pair *p = c->state;
	/* An end that nobody asked for would still be told: left out by a negative number. */
	struct pollfd list[3] = { { .fd = in ? p->in : -1, .events = POLLIN }, { .fd = out ? p->out : -1, .events = POLLOUT },
				  { .fd = p->stop[0], .events = POLLIN } };

	for (;;) {
		int r = poll(list, 3, far_deadline_poll_ms(until));
		if (r > 0)
			return 0;
		if (r == 0)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

static uint64_t pipe_unacked(struct far_conn *c)
{
	return 0;
}

static void pipe_pair_shutdown(struct far_conn *c)
{
	struct pipe_pair *p = c->state;

	far_mutex_lock(&p->lock);
	p->ended = true;
	far_fd_close(&p->stop[1]);
	far_mutex_unlock(&p->lock);
	if (p->socket)
		shutdown(p->out, SHUT_RDWR);
}

static void pipe_pair_free(struct pipe_pair *p) FAR_NO_TSA
{
	far_fd_close(&p->stop[0]);
	far_fd_close(&p->stop[1]);
	far_mutex_fini(&p->lock);
	free(p);
}

static void pipe_pair_close(struct far_conn *c)
{
	struct pipe_pair *p = c->state;

	/* Others may have the same open file: they find it as it was. */
	(void)fcntl(p->in, F_SETFL, p->in_flags);
	(void)fcntl(p->out, F_SETFL, p->out_flags);
	far_fd_close(&p->in);
	far_fd_close(&p->out);
	pipe_pair_free(p);
	c->state = NULL;
}

static const struct far_conn_ops pipe_pair_ops = {
	.readv = pipe_pair_readv,
	.writev = pipe_pair_writev,
	.wait = pipe_pair_wait,
	.unacked = pipe_unacked,
	.shutdown = pipe_pair_shutdown,
	.close = pipe_pair_close,
};

static int pipe_kind(int fd, bool *is_socket)
{
	struct stat st;

	if (fstat(fd, &st))
		return -errno;
	*is_socket = S_ISSOCK(st.st_mode);
	return *is_socket || S_ISFIFO(st.st_mode) || S_ISCHR(st.st_mode) ? 0 : -EINVAL;
}

int far_conn_pair(struct far_conn *c, int in, int out)
{
	struct pipe_pair *p = calloc(1, sizeof *p);
	bool in_socket;

	if (!p)
		return -ENOMEM;
	far_mutex_init(&p->lock);
	*p = (struct pipe_pair){ .in = in, .out = out, .stop = { -1, -1 }, .lock = p->lock };
	int r = pipe_kind(in, &in_socket);
	if (r == 0)
		r = pipe_kind(out, &p->socket);
	if (r == 0 && pipe2(p->stop, O_CLOEXEC | O_NONBLOCK))
		r = -errno;
	p->in_flags = fcntl(in, F_GETFL);
	p->out_flags = fcntl(out, F_GETFL);
	if (r == 0 && (p->in_flags < 0 || p->out_flags < 0 || fcntl(in, F_SETFL, p->in_flags | O_NONBLOCK) ||
		       fcntl(out, F_SETFL, fcntl(out, F_GETFL) | O_NONBLOCK)))
		r = -errno;
	if (r) {
		pipe_pair_free(p);
		return r;
	}
	*c = (struct far_conn){ .ops = &pipe_pair_ops, .fd = -1, .state = p };
	return 0;
}

/* ------------------------------------------------------------------------------------------------------- a command */

struct pipe_command {
	struct far_conn socket;
	struct far_mutex lock;
	pid_t pid FAR_GUARDED_BY(lock);   /* 0: it has been waited for */
	int status FAR_GUARDED_BY(lock);  /* then; -1: somebody else has */
};

/* Wait until it has ended, or `until`. True: it has. */
static bool pipe_reap(struct pipe_command *p, uint64_t until)
{
	for (;;) {
		far_mutex_lock(&p->lock);
		pid_t r = p->pid ? waitpid(p->pid, &p->status, WNOHANG) : 1;
		if (r < 0 && errno != EINTR)
			p->status = -1;
		if (r > 0 || (r < 0 && errno != EINTR))
			p->pid = 0;
		bool gone = !p->pid;
		far_mutex_unlock(&p->lock);
		uint64_t now = far_now();
		if (gone || now >= until)
			return gone;
		far_sleep_until(far_min(until, now + PIPE_LOOK), false);
	}
}

static void pipe_kill(struct pipe_command *p, int sig)
{
	far_mutex_lock(&p->lock);
	if (p->pid && kill(-p->pid, sig) && errno == ESRCH)
		kill(p->pid, sig);
	far_mutex_unlock(&p->lock);
}

static ssize_t pipe_command_readv(struct far_conn *c, const struct iovec *iov, int n)
{
	struct pipe_command *p = c->state;

	return p->socket.ops->readv(&p->socket, iov, n);
}

static ssize_t pipe_command_writev(struct far_conn *c, const struct iovec *iov, int n)
{
	struct pipe_command *p = c->state;

	return p->socket.ops->writev(&p->socket, iov, n);
}

static int pipe_command_wait(struct far_conn *c, bool in, bool out, uint64_t until)
{
	struct pipe_command *p = c->state;

	return p->socket.ops->wait(&p->socket, in, out, until);
}

static void pipe_command_shutdown(struct far_conn *c)
{
	struct pipe_command *p = c->state;

	p->socket.ops->shutdown(&p->socket);
}

static void pipe_command_close(struct far_conn *c)
{
	struct pipe_command *p = c->state;

	far_conn_close(&p->socket);
	if (!pipe_reap(p, far_now() + PIPE_GRACE)) {
		pipe_kill(p, SIGTERM);
		if (!pipe_reap(p, far_now() + PIPE_TERM)) {
			pipe_kill(p, SIGKILL);
			pipe_reap(p, FAR_NEVER);
		}
	}
	far_mutex_fini(&p->lock);
	free(p);
	c->state = NULL;
}

static void pipe_command_why(struct far_conn *c, char *buf, size_t n)
{
	struct pipe_command *p = c->state;

	buf[0] = 0;
	if (!pipe_reap(p, far_now() + 100 * FAR_MSEC))
		return;
	far_mutex_lock(&p->lock);
	int s = p->status;
	far_mutex_unlock(&p->lock);
	if (s != -1 && WIFEXITED(s))
		snprintf(buf, n, "the command has ended with exit code %d", WEXITSTATUS(s));
	else if (s != -1 && WIFSIGNALED(s))
		snprintf(buf, n, "the command was ended by signal %d", WTERMSIG(s));
	else
		snprintf(buf, n, "the command has ended");
}

static const struct far_conn_ops pipe_command_ops = {
	.readv = pipe_command_readv,
	.writev = pipe_command_writev,
	.wait = pipe_command_wait,
	.unacked = pipe_unacked,
	.shutdown = pipe_command_shutdown,
	.close = pipe_command_close,
	.why = pipe_command_why,
};

static int pipe_spawn(const char *command, int fd, pid_t *pid)
{
	char *argv[] = { (char *)(uintptr_t)"sh", (char *)(uintptr_t)"-c", (char *)(uintptr_t)command, NULL };
	posix_spawn_file_actions_t fa;
	posix_spawnattr_t at;
	sigset_t none, all;

	int r = posix_spawn_file_actions_init(&fa);
	if (r)
		return -r;
	r = posix_spawnattr_init(&at);
	if (r) {
		posix_spawn_file_actions_destroy(&fa);
		return -r;
	}
	sigemptyset(&none);
	sigemptyset(&all);
	static const int usual[] = { SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGTERM, SIGCHLD, SIGUSR1, SIGUSR2 };
	for (size_t i = 0; i < FAR_ARRAY_LEN(usual); i++)
		sigaddset(&all, usual[i]);
	r = posix_spawn_file_actions_adddup2(&fa, fd, 0);
	if (!r)
		r = posix_spawn_file_actions_adddup2(&fa, fd, 1);
	posix_spawnattr_setsigmask(&at, &none);
	posix_spawnattr_setsigdefault(&at, &all);
	posix_spawnattr_setpgroup(&at, 0);
	posix_spawnattr_setflags(&at, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
	if (!r)
		r = posix_spawn(pid, "/bin/sh", &fa, &at, argv, environ);
	posix_spawnattr_destroy(&at);
	posix_spawn_file_actions_destroy(&fa);
	return -r;
}

int far_conn_command(struct far_conn *c, const char *command, struct far_error *err)
{
	struct pipe_command *p = calloc(1, sizeof *p);
	int sv[2] = { -1, -1 };
	pid_t pid = 0;
	int r = p ? 0 : -ENOMEM;

	if (r == 0 && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv))
		r = -errno;
	/* Not one of those that the command gets. */
	if (r == 0 && sv[1] < 2) {
		int up = fcntl(sv[1], F_DUPFD_CLOEXEC, 3);
		far_fd_close(&sv[1]);
		sv[1] = up;
		r = up < 0 ? -errno : 0;
	}
	if (r == 0)
		r = far_conn_socket(&p->socket, sv[0]);
	if (r == 0)
		r = pipe_spawn(command, sv[1], &pid);
	far_fd_close(&sv[1]);
	if (r) {
		far_fd_close(&sv[0]);
		free(p);
		return far_error_set(err, -r, "cannot run '%.150s': %s", command, far_strerror(r));
	}
	far_mutex_init(&p->lock);
	far_mutex_lock(&p->lock);
	p->pid = pid;
	far_mutex_unlock(&p->lock);
	*c = (struct far_conn){ .ops = &pipe_command_ops, .fd = p->socket.fd, .state = p };
	return 0;
}
