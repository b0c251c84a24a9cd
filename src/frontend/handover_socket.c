/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Hand-over of memory over a unix stream socket: far_uffd_send(), far_uffd_receive(), far_uffd_accept(). The bytes are
 * handover.c's; here are the descriptors, which come with the first byte of a message (ours, Firecracker) or with a byte
 * of their own behind it (Go).
 *
 * What a peer sends as a descriptor may be anything. It is used only after /proc has said that it is a userfaultfd that
 * was made ready, or the pagemap or the memory of a process; a pipe in the place of one could block a pager for ever.
 * What the userfaultfd can do is read from its fdinfo, not believed. The formats that bring no pagemap and no memory:
 * they are opened for the process that made the connection, where that is allowed, and the process is looked at again
 * afterwards, for its number may be another's by then.
 */
#define _GNU_SOURCE
#include "frontend/handover.h"

#include "base/clock.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* linux/socket.h of 6.5 */
#endif

#define HANDOVER_FDS 8       /* of one hand-over; the rest is closed */
#define HANDOVER_FDS_SENT 253 /* the kernel lets no message have more */
#define HANDOVER_PATIENCE (10 * FAR_SEC)

struct handover_fds {
	int v[HANDOVER_FDS];
	unsigned n;
};

static void handover_fds_close(struct handover_fds *f)
{
	for (unsigned k = 0; k < f->n; k++)
		far_fd_close(&f->v[k]);
	f->n = 0;
}

static int handover_wait(int socket, short events, uint64_t until)
{
	struct pollfd p = { .fd = socket, .events = events };

	for (;;) {
		int r = poll(&p, 1, far_deadline_poll_ms(until));
		if (r > 0)
			return 0;
		if (r == 0)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

/* ------------------------------------------------------------------------------------------------ bytes and descriptors */

/* All n bytes; the descriptors go with the first of them. */
static int handover_write(int socket, const void *buf, size_t n, const int *fd, unsigned fds, uint64_t until)
{
	union {
		char buf[CMSG_SPACE(sizeof(int) * HANDOVER_FDS)];
		struct cmsghdr align;
	} control = { 0 };
	const char *p = buf;

	FAR_ASSERT(fds <= HANDOVER_FDS);
	while (n) {
		struct iovec iov = { (void *)(uintptr_t)p, n };
		struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };
		if (fds) {
			m.msg_control = control.buf;
			m.msg_controllen = CMSG_SPACE(sizeof(int) * fds);
			struct cmsghdr *c = CMSG_FIRSTHDR(&m);
			c->cmsg_level = SOL_SOCKET;
			c->cmsg_type = SCM_RIGHTS;
			c->cmsg_len = CMSG_LEN(sizeof(int) * fds);
			memcpy(CMSG_DATA(c), fd, sizeof(int) * fds);
		}
		ssize_t r = sendmsg(socket, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (r < 0 && errno == EAGAIN) {
			int e = handover_wait(socket, POLLOUT, until);
			if (e)
				return e;
			continue;
		}
		if (r < 0 && errno == EINTR)
			continue;
		if (r < 0)
			return -errno;
		p += r;
		n -= (size_t)r;
		fds = 0;
	}
	return 0;
}

static void handover_take_fds(struct msghdr *m, struct handover_fds *fds)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t k = 0; k < n; k++) {
			int fd;
			memcpy(&fd, CMSG_DATA(c) + k * sizeof fd, sizeof fd);
			if (fds->n < HANDOVER_FDS)
				fds->v[fds->n++] = fd;
			else
				close(fd);
		}
	}
}

/* At most n bytes in *got, 0 at the end; descriptors that came with them are added to *fds. */
static int handover_read(int socket, void *buf, size_t n, size_t *got, struct handover_fds *fds, uint64_t until)
{
	union {
		char buf[CMSG_SPACE(sizeof(int) * HANDOVER_FDS_SENT)];
		struct cmsghdr align;
	} control;

	for (;;) {
		struct iovec iov = { buf, n };
		struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof control };
		ssize_t r = recvmsg(socket, &m, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
		if (r >= 0) {
			handover_take_fds(&m, fds);
			*got = (size_t)r;
			return m.msg_flags & MSG_CTRUNC ? -EPROTO : 0;
		}
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN)
			return -errno;
		int e = handover_wait(socket, POLLIN, until);
		if (e)
			return e;
	}
}

/* ------------------------------------------------------------------------------------------------ what a descriptor is */

static bool handover_link(int fd, char *link, size_t n)
{
	char path[40];

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	ssize_t r = readlink(path, link, n - 1);
	link[r > 0 ? r : 0] = 0;
	return r > 0;
}

static bool handover_is_uffd(int fd)
{
	char link[64];
	return handover_link(fd, link, sizeof link) && strcmp(link, "anon_inode:[userfaultfd]") == 0;
}

/* A line of the descriptor's fdinfo that begins with `key`, what follows in `text`. */
static bool handover_fdinfo(int fd, const char *key, char *text, size_t n)
{
	char path[40], line[256];
	bool found = false;

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
	FILE *f = fopen(path, "re");
	while (f && !found && fgets(line, sizeof line, f)) {
		found = strncmp(line, key, strlen(key)) == 0;
		if (found)
			snprintf(text, n, "%s", line + strlen(key));
	}
	if (f)
		fclose(f);
	return found;
}

/* "API: ABI:FEATURES:IOCTLS", all hexadecimal; the features' highest bits are the kernel's own. */
static uint64_t handover_features(int fd)
{
	unsigned long long abi = 0, features = 0;
	char text[128];

	if (!handover_fdinfo(fd, "API:", text, sizeof text) || sscanf(text, "%llx:%llx", &abi, &features) != 2)
		return 0;
	return features & 0x7fffffff;
}

static bool handover_is_process(int fd)
{
	char text[32];
	return handover_fdinfo(fd, "Pid:", text, sizeof text);
}

/* /proc/PID/NAME: *pid is which process'. */
static bool handover_is_proc(int fd, const char *name, long *pid)
{
	char link[64], tail[16] = "";
	struct statfs st;

	return fstatfs(fd, &st) == 0 && st.f_type == PROC_SUPER_MAGIC && !(fcntl(fd, F_GETFL) & O_PATH) &&
	       handover_link(fd, link, sizeof link) && sscanf(link, "/proc/%ld/%15s", pid, tail) == 2 && strcmp(tail, name) == 0;
}

/* A userfaultfd that nobody agreed on an API with says POLLERR, and so does one in blocking mode: it is made non-blocking,
 * which the other side's copy of it becomes too. */
static int handover_check_uffd(int fd, struct far_error *err)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return far_error_set(err, errno, "the userfaultfd cannot be made non-blocking: %s", far_strerror(errno));
	if (poll(&p, 1, 0) < 0 || (p.revents & POLLERR))
		return far_error_set(err, EPROTO, "the userfaultfd that came has not been made ready: UFFDIO_API and UFFDIO_REGISTER come "
				     "before the hand-over");
	return 0;
}

/* ------------------------------------------------------------------------------------------------ the process behind */

static int handover_open_proc(pid_t pid, const char *name)
{
	char path[48];

	snprintf(path, sizeof path, "/proc/%ld/%s", (long)pid, name);
	return open(path, O_RDONLY | O_CLOEXEC);
}

/* What the peer did not send: of who made the connection. Without the right to it the descriptors stay -1. */
static void handover_find_process(int socket, struct far_handover *h)
{
	struct ucred peer = { 0 };
	socklen_t n = sizeof peer, m = sizeof h->process;
	char dead[32];

	/* Of a socket pair it is who made it: if that is this process, whoever has the other end is not known. */
	if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &n) < 0 || peer.pid <= 0 || peer.pid == getpid())
		return;
	if (getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &h->process, &m) < 0)
		h->process = (int)syscall(SYS_pidfd_open, peer.pid, 0);
	if (h->process < 0)
		return;
	h->pagemap = handover_open_proc(peer.pid, "pagemap");
	h->mem = handover_open_proc(peer.pid, "mem");
	/* Still there after the opens, so it is its memory that was opened, and not that of a later one with its number. */
	struct pollfd p = { .fd = h->process, .events = POLLIN };
	if (poll(&p, 1, 0) == 0 && handover_fdinfo(h->process, "Pid:", dead, sizeof dead) && strtol(dead, NULL, 10) == (long)peer.pid)
		return;
	far_fd_close(&h->pagemap);
	far_fd_close(&h->mem);
	far_fd_close(&h->process);
}

static int handover_place_ours(struct handover_fds *fds, unsigned with, struct far_handover *h, struct far_error *err)
{
	static const char *const names[] = { "userfaultfd", "pagemap", "mem", "pidfd" };
	int *const place[] = { &h->uffd, &h->pagemap, &h->mem, &h->process };
	long pid[4] = { 0 };
	unsigned k = 0;

	if (fds->n != (unsigned)__builtin_popcount(with))
		return far_error_set(err, EPROTO, "the hand-over says that %d descriptors come with it, and %u came", __builtin_popcount(with),
				     fds->n);
	for (unsigned i = 0; i < 4; i++) {
		if (!(with & 1u << i))
			continue;
		int fd = fds->v[k];
		bool right = i == 0 ? handover_is_uffd(fd) : i == 3 ? handover_is_process(fd) : handover_is_proc(fd, names[i], &pid[i]);
		if (!right)
			return far_error_set(err, EPROTO, "descriptor %u of the hand-over is no %s", k, names[i]);
		*place[i] = fd;
		fds->v[k++] = -1;
	}
	if (pid[1] && pid[2] && pid[1] != pid[2])
		return far_error_set(err, EPROTO, "the hand-over's pagemap and mem are of two processes, %ld and %ld", pid[1], pid[2]);
	return 0;
}

/* Go puts something else before it, Firecracker may put something behind it. */
static int handover_place_foreign(struct handover_fds *fds, struct far_handover *h, struct far_error *err)
{
	for (unsigned k = 0; k < fds->n && h->uffd < 0; k++)
		if (handover_is_uffd(fds->v[k])) {
			h->uffd = fds->v[k];
			fds->v[k] = -1;
		}
	return h->uffd < 0 ? far_error_set(err, EPROTO, "%u descriptors came with the hand-over, and none is a userfaultfd", fds->n) : 0;
}

/* ------------------------------------------------------------------------------------------------ receive */

static int handover_receive_error(int e, struct far_error *err)
{
	if (e == -ETIMEDOUT)
		return far_error_set(err, ETIMEDOUT, "cannot receive memory: the peer did not send all of its hand-over in time");
	if (e == -EPROTO)
		return far_error_set(err, EPROTO, "cannot receive memory: the peer sent more descriptors than can be taken");
	return far_error_set(err, -e, "cannot receive memory: %s", far_strerror(e));
}

static int handover_receive_bytes(int socket, struct far_handover_in *in, struct handover_fds *fds, uint64_t until,
				  struct far_error *err)
{
	unsigned char buf[4096];
	size_t want, got = 0;

	while ((want = far_handover_want(in))) {
		int e = handover_read(socket, buf, (size_t)far_min(want, sizeof buf), &got, fds, until);
		if (e)
			return handover_receive_error(e, err);
		if (!got)
			return far_error_set(err, EPROTO, "cannot receive memory: the peer closed the connection after %zu bytes of its "
					     "hand-over", in->n);
		e = far_handover_feed(in, buf, got, err);
		if (e)
			return far_error_prefix(err, "cannot receive memory");
	}
	if (in->format != FAR_HANDOVER_FARPAGE && !fds->n) { /* in a message of their own, with a byte that means nothing */
		int e = handover_read(socket, buf, 1, &got, fds, until);
		if (e)
			return handover_receive_error(e, err);
	}
	return 0;
}

int far_uffd_receive(int socket, struct far_handover *h, struct far_error *err)
{
	uint64_t until = far_min(far_deadline(), far_now() + HANDOVER_PATIENCE);
	struct far_handover got = FAR_HANDOVER_INIT;
	struct far_handover_in in = { 0 };
	struct handover_fds fds = { .n = 0 };
	unsigned with = 0;

	int e = handover_receive_bytes(socket, &in, &fds, until, err);
	if (!e) {
		e = far_handover_decode(&in, &got, &with, err);
		if (!e)
			e = in.format == FAR_HANDOVER_FARPAGE ? handover_place_ours(&fds, with, &got, err)
							      : handover_place_foreign(&fds, &got, err);
		if (!e)
			e = handover_check_uffd(got.uffd, err);
		if (e)
			far_error_prefix(err, "cannot receive memory");
	}
	/* Who speaks our format waits for an answer; the error's sentence is one that it can use. */
	if (e && in.n && in.format == FAR_HANDOVER_FARPAGE && e != -ETIMEDOUT) {
		got.format = FAR_HANDOVER_FARPAGE;
		far_uffd_accept(socket, &got, -e, err ? err->text : far_strerror(e));
	}
	far_handover_in_fini(&in);
	handover_fds_close(&fds);
	if (e) {
		far_handover_fini(&got);
		return e;
	}
	got.features = handover_features(got.uffd);
	if (got.format != FAR_HANDOVER_FARPAGE)
		handover_find_process(socket, &got);
	got.size = far_min(h->size, sizeof got);
	if (got.size < sizeof got) /* an older program has no place for it */
		far_fd_close(&got.process);
	memcpy(h, &got, got.size);
	return 0;
}

int far_uffd_accept(int socket, const struct far_handover *h, int code, const char *text)
{
	char buf[FAR_HANDOVER_ANSWER + FAR_HANDOVER_MAX_TEXT];

	if (h->format != FAR_HANDOVER_FARPAGE)
		return 0;
	return handover_write(socket, buf, far_handover_answer(buf, code, text), NULL, 0,
			      far_min(far_deadline(), far_now() + HANDOVER_PATIENCE));
}

void far_handover_fini(struct far_handover *h)
{
	far_fd_close(&h->uffd);
	far_fd_close(&h->pagemap);
	far_fd_close(&h->mem);
	if (h->size >= sizeof *h)
		far_fd_close(&h->process);
	free(h->range);
	h->range = NULL;
	h->n = 0;
}

/* ------------------------------------------------------------------------------------------------ send */

/* Exactly two descriptors, the second counts: that is what the Go side takes. They must not come with the address, for it
 * is read without looking for them. */
static int handover_send_go(int socket, int uffd, const void *buf, size_t n, uint64_t until)
{
	FAR_CLEANUP(far_close_cleanup) int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	int fd[2] = { null < 0 ? uffd : null, uffd };
	int e = handover_write(socket, buf, n, NULL, 0, until);

	return e ? e : handover_write(socket, "", 1, fd, 2, until);
}

static int handover_read_answer(int socket, uint64_t until, struct far_error *err)
{
	char buf[FAR_HANDOVER_ANSWER + FAR_HANDOVER_MAX_TEXT];
	struct handover_fds fds = { .n = 0 };
	size_t n = 0, whole = FAR_HANDOVER_ANSWER, got;

	while (n < whole) {
		int e = handover_read(socket, buf + n, whole - n, &got, &fds, until);
		handover_fds_close(&fds);
		if (e)
			return far_error_set(err, -e, "cannot hand memory over: the pager did not answer: %s", far_strerror(e));
		if (!got)
			return far_error_set(err, ECONNRESET, "cannot hand memory over: the pager closed the connection without an answer");
		n += got;
		if (n == FAR_HANDOVER_ANSWER && whole == FAR_HANDOVER_ANSWER && !(whole = far_handover_answer_len(buf)))
			return far_error_set(err, EPROTO, "cannot hand memory over: what answered is no pager of farpage");
	}
	int e = far_handover_answer_read(buf, n, err);
	return e ? far_error_prefix(err, "cannot hand memory over") : 0;
}

int far_uffd_send(int socket, const struct far_handover *h, struct far_error *err)
{
	uint64_t until = far_min(far_deadline(), far_now() + 3 * HANDOVER_PATIENCE); /* it may open its source first */
	struct far_handover all = FAR_HANDOVER_INIT;
	const int *const place[] = { &all.uffd, &all.pagemap, &all.mem, &all.process };
	int fd[4];
	unsigned with = 0, fds = 0;
	void *buf = NULL;
	size_t n;

	memcpy(&all, h, far_min(h->size, sizeof all));
	if (all.uffd < 0)
		return far_error_set(err, EINVAL, "cannot hand memory over: there is no userfaultfd");
	for (unsigned k = 0; k < 4; k++)
		if (*place[k] >= 0 && (k == 0 || all.format == FAR_HANDOVER_FARPAGE)) {
			with |= 1u << k;
			fd[fds++] = *place[k];
		}
	int e = far_handover_encode(&all, with, &buf, &n, err);
	if (e)
		return e;
	e = all.format == FAR_HANDOVER_GO ? handover_send_go(socket, all.uffd, buf, n, until)
					  : handover_write(socket, buf, n, fd, fds, until);
	free(buf);
	if (e)
		return far_error_set(err, -e, "cannot hand memory over: %s", far_strerror(e));
	return all.format == FAR_HANDOVER_FARPAGE ? handover_read_answer(socket, until, err) : 0;
}
