/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "net/net.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* Bytes that a peer has not acknowledged for this long mean that it is gone (half-open connections). */
#define CONN_USER_TIMEOUT_MS 20000
#define CONN_KEEPALIVE_S 15
/* So many packets were sent again, and one in so many bytes: the path loses them, and bbr bears that best. */
#define CONN_LOST_MIN 10
#define CONN_LOST_BYTES (2000 * 1448)

static ssize_t conn_readv(struct far_conn *c, const struct iovec *iov, int n)
{
	ssize_t r;
	do
		r = readv(c->fd, iov, n);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : r;
}

static ssize_t conn_writev(struct far_conn *c, const struct iovec *iov, int n)
{
	struct msghdr m = { .msg_iov = (struct iovec *)iov, .msg_iovlen = (size_t)n };
	ssize_t r;
	do
		r = sendmsg(c->fd, &m, MSG_NOSIGNAL);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : r;
}

static int conn_wait(struct far_conn *c, bool in, bool out, uint64_t until)
{
	struct pollfd p = { .fd = c->fd, .events = (short)((in ? POLLIN : 0) | (out ? POLLOUT : 0)) };

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

static uint64_t conn_unacked(struct far_conn *c)
{
	int n = 0;

	return ioctl(c->fd, SIOCOUTQ, &n) || n < 0 ? 0 : (uint64_t)n;
}

static void conn_shutdown(struct far_conn *c)
{
	shutdown(c->fd, SHUT_RDWR);
}

static void conn_close(struct far_conn *c)
{
	far_fd_close(&c->fd);
}

static const struct far_conn_ops conn_ops = {
	.readv = conn_readv,
	.writev = conn_writev,
	.wait = conn_wait,
	.unacked = conn_unacked,
	.shutdown = conn_shutdown,
	.close = conn_close,
};

static void conn_set(int fd, int level, int name, int value)
{
	/* Every one of these is a help, none is needed: a unix socket refuses most of them. */
	(void)setsockopt(fd, level, name, &value, sizeof value);
}

static bool conn_is_loopback(const struct sockaddr *sa)
{
	if (sa->sa_family == AF_INET)
		return (ntohl(((const struct sockaddr_in *)sa)->sin_addr.s_addr) >> 24) == 127;
	const struct in6_addr *a6 = &((const struct sockaddr_in6 *)sa)->sin6_addr;
	return IN6_IS_ADDR_LOOPBACK(a6) || (IN6_IS_ADDR_V4MAPPED(a6) && a6->s6_addr[12] == 127);
}

static bool conn_paces(int fd)
{
	char name[16] = "";
	socklen_t n = sizeof name - 1;

	return getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &n) == 0 && !strncmp(name, "bbr", 3);
}

/* Take another control than one that paces (bbr). A socket that once had one goes on pacing, so this comes before it is
 * connected, or before it listens. */
static void conn_unpace(int fd)
{
	if (conn_paces(fd) && setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5))
		(void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

void far_conn_brisk(struct far_conn *c)
{
	c->pacing = FAR_CONN_BRISK;
}

/* What the system gives to new sockets. */
static bool conn_system_paces(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	bool paces = fd >= 0 && conn_paces(fd);

	far_fd_close(&fd);
	return paces;
}

void far_conn_sent(struct far_conn *c, uint64_t bytes)
{
	struct tcp_info info;
	socklen_t n = sizeof info;

	if (c->fd < 0 || c->pacing == FAR_CONN_BRISK || c->pacing == FAR_CONN_OWN)
		return;
	if (c->pacing == FAR_CONN_NEW) {
		c->pacing = conn_system_paces() ? FAR_CONN_EASED : FAR_CONN_OWN;
		return;
	}
	if (getsockopt(c->fd, IPPROTO_TCP, TCP_INFO, &info, &n) || info.tcpi_total_retrans < CONN_LOST_MIN ||
	    (uint64_t)info.tcpi_total_retrans * CONN_LOST_BYTES < bytes)
		return;
	(void)setsockopt(c->fd, IPPROTO_TCP, TCP_CONGESTION, "bbr", 3);
	c->pacing = FAR_CONN_OWN;
}

int far_conn_socket(struct far_conn *c, int fd)
{
	int type;
	socklen_t n = sizeof type;

	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &n))
		return -errno;
	if (type != SOCK_STREAM)
		return -EINVAL;
	int fl = fcntl(fd, F_GETFL);
	if (fl < 0 || fcntl(fd, F_SETFL, fl | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC))
		return -errno;
	conn_set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	conn_set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	conn_set(fd, IPPROTO_TCP, TCP_KEEPIDLE, CONN_KEEPALIVE_S);
	conn_set(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
	conn_set(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
	conn_set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, CONN_USER_TIMEOUT_MS);
	conn_unpace(fd);
	*c = (struct far_conn){ .ops = &conn_ops, .fd = fd };
	return 0;
}

void far_conn_close(struct far_conn *c)
{
	if (c->ops)
		c->ops->close(c);
	c->ops = NULL;
}

int far_conn_peer(struct far_conn *c, struct far_peer *p)
{
	*p = (struct far_peer){ 0 };
	return c->ops && c->ops->peer ? c->ops->peer(c, p) : 0;
}

void far_peer_fini(struct far_peer *p)
{
	for (size_t i = 0; i < p->n; i++)
		free(p->names[i]);
	free(p->names);
	*p = (struct far_peer){ 0 };
}

void far_conn_why(struct far_conn *c, char *buf, size_t n)
{
	buf[0] = 0;
	if (c->ops && c->ops->why)
		c->ops->why(c, buf, n);
}

bool far_conn_is_local(const struct far_conn *c)
{
	struct sockaddr_storage ss;
	socklen_t n = sizeof ss;

	if (c->fd < 0 || getpeername(c->fd, (struct sockaddr *)&ss, &n))
		return false;
	return ss.ss_family == AF_UNIX ||
	       ((ss.ss_family == AF_INET || ss.ss_family == AF_INET6) && conn_is_loopback((struct sockaddr *)&ss));
}

/* Wait for a connect in progress to end. */
static int conn_finish(int fd, uint64_t until, int cancel)
{
	struct pollfd p[2] = { { .fd = fd, .events = POLLOUT }, { .fd = cancel, .events = POLLIN } };

	for (;;) {
		int r = poll(p, 2, far_deadline_poll_ms(until));
		if (r < 0 && errno == EINTR)
			continue;
		if (r < 0)
			return -errno;
		if (r == 0)
			return -ETIMEDOUT;
		if (p[1].revents)
			return -ESHUTDOWN;
		int e = 0;
		socklen_t n = sizeof e;
		if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &e, &n))
			return -errno;
		return -e;
	}
}

static int conn_try(const struct sockaddr *sa, socklen_t len, uint64_t until, int cancel, int *out)
{
	int fd = socket(sa->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	conn_unpace(fd);
	int r = connect(fd, sa, len) ? -errno : 0;
	if (r == -EINPROGRESS || r == -EINTR)
		r = conn_finish(fd, until, cancel);
	/* A unix socket whose queue is full says EAGAIN and cannot be polled for room. */
	while (r == -EAGAIN && sa->sa_family == AF_UNIX && far_now() < until) {
		far_sleep_until(far_min(until, far_now() + 2 * FAR_MSEC), false);
		r = connect(fd, sa, len) ? -errno : 0;
	}
	if (r) {
		far_fd_close(&fd);
		return r == -EAGAIN ? -ETIMEDOUT : r;
	}
	*out = fd;
	return 0;
}

static int conn_unix_addr(struct sockaddr_un *sun, const char *path, struct far_error *err)
{
	*sun = (struct sockaddr_un){ .sun_family = AF_UNIX };
	if (strlen(path) >= sizeof sun->sun_path)
		return far_error_set(err, ENAMETOOLONG, "the socket path '%s' is longer than the %zu bytes that the system allows",
				     path, sizeof sun->sun_path - 1);
	memcpy(sun->sun_path, path, strlen(path));
	return 0;
}

static int conn_resolve(const struct far_net_addr *a, bool passive, struct addrinfo **list, struct far_error *err)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV | (passive ? AI_PASSIVE : 0) };
	char port[16];

	snprintf(port, sizeof port, "%d", a->port);
	int r = getaddrinfo(a->host && a->host[0] ? a->host : NULL, port, &hints, list);
	if (r)
		return far_error_set(err, r == EAI_MEMORY ? ENOMEM : r == EAI_AGAIN ? ETIMEDOUT : EHOSTUNREACH,
				     "the host name '%s' cannot be looked up: %s", a->host ? a->host : "", gai_strerror(r));
	return 0;
}

int far_conn_connect(struct far_conn *c, const struct far_net_addr *a, uint64_t until, int cancel,
		     struct far_error *err)
{
	int fd = -1, r = -EHOSTUNREACH;

	if (a->command)
		return far_conn_command(c, a->command, err);
	if (a->path) {
		struct sockaddr_un sun;
		r = conn_unix_addr(&sun, a->path, err);
		if (r)
			return r;
		r = conn_try((struct sockaddr *)&sun, sizeof sun, until, cancel, &fd);
	} else {
		struct addrinfo *list;
		r = conn_resolve(a, false, &list, err);
		if (r)
			return r;
		r = -EHOSTUNREACH;
		for (struct addrinfo *ai = list; ai && fd < 0 && r != -ESHUTDOWN; ai = ai->ai_next) {
			/* A silent first address must leave time for the next one. */
			uint64_t now = far_now(), limit = until;
			if (ai->ai_next && until > now)
				limit = now + far_min((until - now) / 2, 5 * FAR_SEC);
			r = conn_try(ai->ai_addr, ai->ai_addrlen, limit, cancel, &fd);
		}
		freeaddrinfo(list);
	}
	if (r == 0) {
		r = far_conn_socket(c, fd);
		if (r)
			far_fd_close(&fd);
	}
	if (r && a->path)
		return far_error_set(err, -r, "cannot connect to the socket %s: %s", a->path, far_strerror(r));
	if (r)
		return far_error_set(err, -r, "cannot connect to %s port %d: %s%s", a->host, a->port, far_strerror(r),
				     r == -ECONNREFUSED ? "; is the server running?" : "");
	return 0;
}

static int conn_listen_unix(const struct far_net_addr *a, int *out, struct far_error *err)
{
	struct sockaddr_un sun;
	int r = conn_unix_addr(&sun, a->path, err);
	if (r)
		return r;
	FAR_CLEANUP(far_close_cleanup) int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return far_error_set(err, errno, "cannot make a socket: %s", far_strerror(errno));
	r = bind(fd, (struct sockaddr *)&sun, sizeof sun) ? -errno : 0;
	if (r == -EADDRINUSE) {
		/* Left over from a server that died: nobody answers, so the name may be taken again. */
		int probe = -1;
		int e = conn_try((struct sockaddr *)&sun, sizeof sun, far_now() + FAR_SEC, -1, &probe);
		far_fd_close(&probe);
		struct stat st; /* a file that is no socket refuses connections too, and is not ours to remove */
		if (e == -ECONNREFUSED && lstat(a->path, &st) == 0 && S_ISSOCK(st.st_mode) && unlink(a->path) == 0)
			r = bind(fd, (struct sockaddr *)&sun, sizeof sun) ? -errno : 0;
	}
	if (r == 0 && listen(fd, 128))
		r = -errno;
	if (r)
		return far_error_set(err, -r, "cannot listen on the socket %s: %s%s", a->path, far_strerror(r),
				     r == -EADDRINUSE ? "; another server has it, choose another path" : "");
	*out = fd;
	fd = -1;
	return 0;
}

static int conn_listen_tcp(const struct addrinfo *ai, int *out, int *port)
{
	FAR_CLEANUP(far_close_cleanup) int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	conn_set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	conn_unpace(fd); /* what is accepted has it too */
	if (bind(fd, ai->ai_addr, ai->ai_addrlen) || listen(fd, 128))
		return -errno;
	struct sockaddr_storage ss;
	socklen_t n = sizeof ss;
	if (getsockname(fd, (struct sockaddr *)&ss, &n))
		return -errno;
	/* sin_port and sin6_port lie at the same place. */
	*port = ntohs(((struct sockaddr_in *)&ss)->sin_port);
	*out = fd;
	fd = -1;
	return 0;
}

int far_net_listen(const struct far_net_addr *a, bool insecure, int *fd, int *port, struct far_error *err)
{
	struct addrinfo *list;

	*port = 0;
	if (a->path)
		return conn_listen_unix(a, fd, err);
	int r = conn_resolve(a, true, &list, err);
	if (r)
		return r;
	if (!insecure && !conn_is_loopback(list->ai_addr))
		r = far_error_set(err, EPERM,
				  "will not listen on %s: the traffic would be in the clear beyond this host; give --insecure "
				  "if that is meant, or listen on 127.0.0.1",
				  a->host && a->host[0] ? a->host : "every address");
	else if ((r = conn_listen_tcp(list, fd, port)) != 0)
		far_error_set(err, -r, "cannot listen on %s port %d: %s%s", a->host && a->host[0] ? a->host : "*", a->port,
			      far_strerror(r), r == -EADDRINUSE ? "; choose another port, or 0 for a free one" : "");
	freeaddrinfo(list);
	return r;
}

static int conn_name(int fd, const struct sockaddr_storage *ss, socklen_t len, char **name)
{
	char host[64], port[16];

	if (ss->ss_family == AF_UNIX) {
		const struct sockaddr_un *sun = (const struct sockaddr_un *)ss;
		size_t n = len > offsetof(struct sockaddr_un, sun_path) ? len - offsetof(struct sockaddr_un, sun_path) : 0;
		*name = n && sun->sun_path[0] ? strndup(sun->sun_path, n) : strdup("/");
		return *name ? 0 : -ENOMEM;
	}
	if (getnameinfo((const struct sockaddr *)ss, len, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV))
		return -EINVAL;
	int r = asprintf(name, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
	return r < 0 ? -ENOMEM : 0;
}

int far_net_adopt(int fd, bool insecure, char **name, struct far_error *err)
{
	struct sockaddr_storage ss;
	socklen_t n = sizeof ss, len = sizeof(int);
	int listens = 0, type = 0;

	if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) || !listens ||
	    getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) || type != SOCK_STREAM || getsockname(fd, (struct sockaddr *)&ss, &n))
		return far_error_set(err, EINVAL, "descriptor %d was handed over to listen on, but is no stream socket that does", fd);
	bool inet = ss.ss_family == AF_INET || ss.ss_family == AF_INET6;
	if (!inet && ss.ss_family != AF_UNIX)
		return far_error_set(err, EINVAL, "descriptor %d was handed over to listen on, but is neither TCP nor a unix socket", fd);
	int r = conn_name(fd, &ss, n, name);
	if (r)
		return far_error_set(err, -r, "cannot tell the address of descriptor %d: %s", fd, far_strerror(r));
	int fl = fcntl(fd, F_GETFL);
	if (inet && !insecure && !conn_is_loopback((struct sockaddr *)&ss))
		r = far_error_set(err, EPERM, "will not listen on %s: the traffic would be in the clear beyond this host; give --insecure if "
				  "that is meant", *name);
	else if (fl < 0 || fcntl(fd, F_SETFL, fl | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC))
		r = far_error_set(err, errno, "cannot use descriptor %d: %s", fd, far_strerror(errno));
	if (r) {
		free(*name);
		*name = NULL;
	}
	return r;
}

int far_net_accept(int fd, int *out)
{
	int c;
	do
		c = accept4(fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	while (c < 0 && errno == EINTR);
	if (c < 0)
		return -errno;
	*out = c;
	return 0;
}

int far_net_wait_readable(int fd, int cancel, uint64_t until)
{
	struct pollfd p[2] = { { .fd = fd, .events = POLLIN }, { .fd = cancel, .events = POLLIN } };

	for (;;) {
		int r = poll(p, 2, far_deadline_poll_ms(until));
		if (r < 0 && errno == EINTR)
			continue;
		if (r < 0)
			return -errno;
		if (r == 0)
			return -ETIMEDOUT;
		return p[1].revents ? -ESHUTDOWN : 0;
	}
}
