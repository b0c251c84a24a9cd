/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * libfuse can mount too, but it gives no error number and writes its reasons to standard error. Here every failure
 * becomes a sentence. fusermount3 speaks on its standard error, which is a pipe to us.
 */
#define _GNU_SOURCE
#include "frontend/fuse_mount.h"

#include "base/io.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define FUSE_DEVICE "/dev/fuse"
#define FUSE_HELPER "fusermount3"
#define FUSE_SUBTYPE "farpage"

extern char **environ;

/* What it said, without its name before it, and its exit code. */
static int fuse_helper_end(pid_t pid, int fd, char *said, size_t said_len)
{
	size_t got = 0;
	int status;

	far_io_read_some(fd, said, said_len - 1, &got);
	while (got && said[got - 1] == '\n')
		got--;
	said[got] = 0;
	char *colon = strstr(said, ": ");
	if (colon && !strncmp(said, "fusermount", 10))
		memmove(said, colon + 2, strlen(colon + 2) + 1);
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return 0; /* the program reaps all children itself: judge by what was done */
	return WIFEXITED(status) ? WEXITSTATUS(status) : -EIO;
}

/* Run fusermount3 with these arguments; comm >= 0: the socket on which it hands the descriptor over. Its exit code or
 * -errno; what it said is in `said`, without its name and the newline. */
static int fuse_helper(char *const argv[], int comm, char *said, size_t said_len)
{
	size_t n = 0;
	char var[40], **env = NULL;
	posix_spawn_file_actions_t fa;
	posix_spawnattr_t at;
	sigset_t none, pipes;
	int p[2], r;
	pid_t pid;

	said[0] = 0;
	while (environ[n])
		n++;
	env = calloc(n + 2, sizeof *env);
	if (!env)
		return -ENOMEM;
	size_t e = 0;
	for (size_t i = 0; i < n; i++) {
		if (strncmp(environ[i], "_FUSE_COMMFD=", 13))
			env[e++] = environ[i];
	}
	if (comm >= 0) {
		snprintf(var, sizeof var, "_FUSE_COMMFD=%d", comm);
		env[e] = var;
	}
	if (pipe2(p, O_CLOEXEC)) {
		r = -errno;
		free(env);
		return r;
	}
	posix_spawn_file_actions_init(&fa);
	posix_spawn_file_actions_adddup2(&fa, p[1], 2);
	if (comm >= 0)
		posix_spawn_file_actions_adddup2(&fa, comm, comm); /* onto itself: clears close-on-exec */
	posix_spawnattr_init(&at);
	sigemptyset(&none);
	sigemptyset(&pipes);
	sigaddset(&pipes, SIGPIPE);
	posix_spawnattr_setsigmask(&at, &none);
	posix_spawnattr_setsigdefault(&at, &pipes);
	posix_spawnattr_setflags(&at, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	r = -posix_spawnp(&pid, FUSE_HELPER, &fa, &at, argv, env);
	posix_spawn_file_actions_destroy(&fa);
	posix_spawnattr_destroy(&at);
	free(env);
	close(p[1]);
	if (r == 0)
		r = fuse_helper_end(pid, p[0], said, said_len);
	close(p[0]);
	return r;
}

/* Commas and backslashes of a value inside -o. */
static void fuse_escape(char *out, size_t len, const char *in)
{
	size_t n = 0;

	for (; *in && n + 3 < len; in++) {
		if (*in == ',' || *in == '\\')
			out[n++] = '\\';
		out[n++] = *in;
	}
	out[n] = 0;
}

static int fuse_receive_fd(int sock)
{
	char byte, ctl[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &byte, 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = ctl, .msg_controllen = sizeof ctl };
	ssize_t n;
	int fd;

	do
		n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&m) : NULL;
	if (!c || c->cmsg_type != SCM_RIGHTS)
		return -EPROTO;
	memcpy(&fd, CMSG_DATA(c), sizeof fd);
	return fd;
}

static int fuse_attach_helper(const struct far_fuse_mount_conf *conf, int *fd, struct far_error *err)
{
	char source[600], opts[800], said[400];
	int s[2], r;

	fuse_escape(source, sizeof source, conf->source);
	snprintf(opts, sizeof opts, "fsname=%s,subtype=" FUSE_SUBTYPE ",default_permissions%s", source,
		 conf->read_only ? ",ro" : "");
	char *argv[] = { (char *)FUSE_HELPER, (char *)"-o", opts, (char *)"--", (char *)conf->target, NULL };
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s))
		return far_error_set(err, errno, "cannot mount on %s: %s", conf->shown, far_strerror(errno));
	r = fuse_helper(argv, s[0], said, sizeof said);
	close(s[0]);
	if (r == -ENOENT) {
		r = far_error_set(err, ENOENT, "cannot mount on %s: %s is missing. Install it with 'apt install fuse3'",
				  conf->shown, FUSE_HELPER);
	} else if (r < 0) {
		r = far_error_set(err, -r, "cannot mount on %s: starting %s: %s", conf->shown, FUSE_HELPER, far_strerror(-r));
	} else if (r > 0) {
		r = far_error_set(err, EPERM, "cannot mount on %s: %s says '%s'. Check that the target is yours and writable, "
				  "or use --as nbd-socket", conf->shown, FUSE_HELPER, said);
	} else {
		r = fuse_receive_fd(s[1]);
		if (r < 0)
			far_error_set(err, -r, "cannot mount on %s: %s gave no connection", conf->shown, FUSE_HELPER);
	}
	close(s[1]);
	if (r < 0)
		return r;
	*fd = r;
	return 0;
}

int far_fuse_mount_attach(const struct far_fuse_mount_conf *conf, int *out, struct far_error *err)
{
	char opts[200];
	int r;
	int fd = open(FUSE_DEVICE, O_RDWR | O_CLOEXEC);

	if (fd < 0 && (errno == ENOENT || errno == ENODEV || errno == ENXIO))
		return far_error_set(err, ENOENT, "cannot mount on %s: " FUSE_DEVICE " is missing. "
				     "Load it with 'modprobe fuse', or use --as nbd-socket.", conf->shown);
	if (fd < 0 && errno == EACCES)
		return far_error_set(err, EACCES, "cannot mount on %s: this user may not open " FUSE_DEVICE ". "
				     "Allow it with 'chmod 666 " FUSE_DEVICE "' as root, or use --as nbd-socket", conf->shown);
	if (fd < 0)
		return far_error_set(err, errno, "cannot mount on %s: opening " FUSE_DEVICE ": %s. Give this process the "
				     "device (docker run --device " FUSE_DEVICE "), or use --as nbd-socket", conf->shown,
				     far_strerror(errno));
	snprintf(opts, sizeof opts, "fd=%d,rootmode=%o,user_id=%u,group_id=%u,default_permissions", fd,
		 conf->dir ? S_IFDIR : S_IFREG, geteuid(), getegid());
	unsigned long flags = MS_NOSUID | MS_NODEV | (conf->read_only ? MS_RDONLY : 0);
	r = mount(conf->source, conf->target, "fuse." FUSE_SUBTYPE, flags, opts) ? -errno : 0;
	if (r == 0) {
		*out = fd;
		return 0;
	}
	close(fd);
	if (r == -EPERM && geteuid() != 0)
		return fuse_attach_helper(conf, out, err);
	if (r == -EPERM)
		return far_error_set(err, EPERM, "cannot mount on %s: this process may not mount. Give it CAP_SYS_ADMIN "
				     "(docker run --cap-add SYS_ADMIN), or use --as nbd-socket", conf->shown);
	if (r == -EBUSY)
		return far_error_set(err, EBUSY, "cannot mount on %s: something else is mounted there or uses it. "
				     "Unmount it with 'umount %s' first", conf->shown, conf->shown);
	if (r == -ENODEV)
		return far_error_set(err, ENODEV, "cannot mount on %s: the kernel does not know FUSE. "
				     "Load it with 'modprobe fuse', or use --as nbd-socket", conf->shown);
	return far_error_set(err, -r, "cannot mount on %s: %s", conf->shown, far_strerror(-r));
}

/* Undo the octal escapes of mountinfo in place. */
static void fuse_unescape(char *s)
{
	char *o = s;

	while (*s) {
		if (s[0] == '\\' && s[1] >= '0' && s[1] <= '3' && s[2] && s[3]) {
			*o++ = (char)((s[1] - '0') * 64 + (s[2] - '0') * 8 + (s[3] - '0'));
			s += 4;
		} else {
			*o++ = *s++;
		}
	}
	*o = 0;
}

int far_fuse_mount_find(const char *target, unsigned *major, unsigned *minor, bool *ours)
{
	FILE *f = fopen("/proc/self/mountinfo", "re");
	char *line = NULL;
	size_t cap = 0;
	int found = 0;

	if (!f)
		return -errno;
	for (;;) {
		errno = 0;
		if (getline(&line, &cap, f) <= 0) {
			found = errno ? -errno : found;
			break;
		}
		unsigned ma, mi;
		int at = 0;
		/* id parent major:minor root mountpoint options ... */
		if (sscanf(line, "%*d %*d %u:%u %*s %n", &ma, &mi, &at) != 2 || at == 0)
			continue;
		char *path = line + at, *end = strchr(path, ' ');
		if (!end)
			continue;
		*end = 0;
		char *type = strstr(end + 1, " - "); /* optional fields end here, then the type */
		fuse_unescape(path);
		if (!strcmp(path, target)) {
			*major = ma;
			*minor = mi;
			if (ours)
				*ours = type && !strncmp(type + 3, "fuse." FUSE_SUBTYPE " ", sizeof "fuse." FUSE_SUBTYPE);
			found = 1; /* later lines lie on top */
		}
	}
	free(line);
	fclose(f);
	return found;
}

int far_fuse_mount_detach(const char *target, bool lazy)
{
	char said[400];
	char *argv[] = { (char *)FUSE_HELPER, (char *)(lazy ? "-uz" : "-u"), (char *)"--", (char *)target, NULL };
	int r = umount2(target, UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) ? -errno : 0;

	if (r != -EPERM)
		return r;
	r = fuse_helper(argv, -1, said, sizeof said);
	if (r <= 0)
		return r;
	far_log(FAR_LOG_DEBUG, "fuse[%s]: %s: %s", target, FUSE_HELPER, said);
	return strstr(said, "busy") ? -EBUSY : -EPERM;
}

int far_fuse_mount_abort_fd(unsigned minor)
{
	char path[80];

	snprintf(path, sizeof path, "/sys/fs/fuse/connections/%u/abort", minor);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd >= 0)
		return fd;
#if defined(SYS_fsopen) && defined(SYS_fsconfig) && defined(SYS_fsmount)
	/* Containers often do not mount the control file system: a look at it without mounting it anywhere. */
	int fs = (int)syscall(SYS_fsopen, "fusectl", 1 /* FSOPEN_CLOEXEC */);
	if (fs < 0)
		return -1;
	if (syscall(SYS_fsconfig, fs, 6 /* FSCONFIG_CMD_CREATE */, NULL, NULL, 0) == 0) {
		int m = (int)syscall(SYS_fsmount, fs, 1 /* FSMOUNT_CLOEXEC */, 0);
		if (m >= 0) {
			snprintf(path, sizeof path, "%u/abort", minor);
			fd = openat(m, path, O_WRONLY | O_CLOEXEC);
			close(m);
		}
	}
	close(fs);
#endif
	return fd;
}

void far_fuse_mount_read_ahead(unsigned major, unsigned minor, unsigned kib)
{
	char path[80], text[20];

	snprintf(path, sizeof path, "/sys/class/bdi/%u:%u/read_ahead_kb", major, minor);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	int n = snprintf(text, sizeof text, "%u", kib);
	if (far_io_write(fd, text, (size_t)n))
		far_log(FAR_LOG_DEBUG, "fuse: cannot set %s", path);
	close(fd);
}
