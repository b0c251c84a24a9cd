/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* One thread moves all bytes. The sockets of both sides are local and their buffers larger than any test's messages, so it
 * writes without care for room. */
#define _GNU_SOURCE
#include "proxy.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

const char *const proxy_names[PROXY_FAULTS] = { "none", "cut", "tear", "delay", "flip", "mute", "hold" };

#define PREFACE 24
#define FRAME_HEAD 9

static bool proxy_write(int fd, const uint8_t *p, size_t n)
{
	while (n) {
		ssize_t k = send(fd, p, n, MSG_NOSIGNAL);
		if (k <= 0)
			return false;
		p += k;
		n -= (size_t)k;
	}
	return true;
}

static void proxy_close_conn(struct proxy *p, struct proxy_conn *c)
{
	if (c->hold) {
		far_mutex_lock(&p->lock);
		p->held--;
		far_mutex_unlock(&p->lock);
	}
	far_fd_close(&c->client);
	far_fd_close(&c->server);
	free(c->up.buf);
	free(c->down.buf);
	memset(&c->up, 0, sizeof c->up);
	memset(&c->down, 0, sizeof c->down);
	c->mute = c->hold = false;
	c->until = 0;
}

/* The fault that befalls this message, if any. */
static enum proxy_fault proxy_judge(struct proxy *p)
{
	enum proxy_fault f = PROXY_NONE;

	far_mutex_lock(&p->lock);
	unsigned n = p->messages++;
	if (p->fault != PROXY_NONE && ((n == p->at && !p->done) || (p->second && n == p->at + p->second))) {
		p->done = true;
		f = p->fault;
		p->held += f == PROXY_HOLD;
	}
	far_mutex_unlock(&p->lock);
	return f;
}

/* Let whole frames through. False: the connection ends. */
static bool proxy_move(struct proxy *p, struct proxy_conn *c, bool up)
{
	struct proxy_pipe *q = up ? &c->up : &c->down;
	int to = up ? c->server : c->client;
	size_t at = 0;
	bool ok = true;

	while (ok && !c->mute && !c->hold && far_now() >= c->until) {
		if (up && !q->greeted) {
			if (q->n - at < PREFACE)
				break;
			ok = proxy_write(to, q->buf + at, PREFACE);
			at += PREFACE;
			q->greeted = true;
			continue;
		}
		if (q->n - at < FRAME_HEAD)
			break;
		uint8_t *f = q->buf + at;
		size_t n = FRAME_HEAD + ((size_t)f[0] << 16 | (size_t)f[1] << 8 | f[2]);
		if (q->n - at < n)
			break;
		enum proxy_fault fault = f[3] <= 1 ? proxy_judge(p) : PROXY_NONE; /* DATA or HEADERS */
		if (fault == PROXY_CUT || fault == PROXY_TEAR) {
			if (fault == PROXY_TEAR)
				proxy_write(to, f, n / 2);
			return false;
		}
		if (fault == PROXY_FLIP) {
			unsigned bit = p->seed % (unsigned)(8 * n);
			f[bit / 8] ^= (uint8_t)(1 << (bit % 8));
		}
		c->mute = c->mute || fault == PROXY_MUTE;
		c->hold = c->hold || fault == PROXY_HOLD;
		if (fault == PROXY_DELAY)
			c->until = far_now() + p->delay;
		if (c->mute || c->hold)
			break;
		if (fault == PROXY_DELAY) {
			/* This one waits here; it has been judged, so it goes with the rest of the pause. */
			far_sleep_until(c->until, false);
		}
		ok = proxy_write(to, f, n);
		at += n;
	}
	if (at)
		memmove(q->buf, q->buf + at, q->n - at);
	q->n -= at;
	return ok;
}

static bool proxy_read(int fd, struct proxy_pipe *q)
{
	if (q->cap - q->n < 65536) {
		q->cap = q->cap ? 2 * q->cap : 131072;
		q->buf = realloc(q->buf, q->cap);
		FAR_ASSERT(q->buf);
	}
	ssize_t k = recv(fd, q->buf + q->n, q->cap - q->n, MSG_DONTWAIT);
	if (k < 0 && (errno == EAGAIN || errno == EINTR))
		return true;
	if (k <= 0) {
		q->ended = true;
		return false;
	}
	q->n += (size_t)k;
	return true;
}

static int proxy_dial(int port)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
				   .sin_port = htons((uint16_t)port) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	if (connect(fd, (struct sockaddr *)&sin, sizeof sin))
		far_fd_close(&fd);
	return fd;
}

static void proxy_accept(struct proxy *p)
{
	int fd = accept4(p->fd, NULL, NULL, SOCK_CLOEXEC), on = 1;

	if (fd < 0)
		return;
	far_mutex_lock(&p->lock);
	p->dialled++;
	bool refuse = p->refuse;
	int port = p->server_port;
	far_mutex_unlock(&p->lock);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	for (int i = 0; i < PROXY_CONNS && !refuse; i++) {
		if (p->conn[i].client >= 0 || p->conn[i].server >= 0)
			continue;
		p->conn[i].client = fd;
		p->conn[i].server = proxy_dial(port);
		if (p->conn[i].server < 0)
			proxy_close_conn(p, &p->conn[i]);
		return;
	}
	close(fd);
}

/* Its time has come: what was held goes to the server, and then the client's end. Its answers are nobody's any more. */
static void proxy_let_go(struct proxy *p, struct proxy_conn *c)
{
	char sink[65536];
	uint64_t end = far_now() + 5 * FAR_SEC;
	struct pollfd pf = { .fd = c->server, .events = POLLIN };

	if (proxy_write(c->server, c->up.buf, c->up.n))
		shutdown(c->server, SHUT_WR);
	while (far_now() < end && poll(&pf, 1, 100) >= 0)
		if (pf.revents && recv(c->server, sink, sizeof sink, MSG_DONTWAIT) <= 0)
			break;
	proxy_close_conn(p, c);
}

static void proxy_serve(struct proxy *p, struct proxy_conn *c, short client, short server)
{
	bool ok = true;

	if (c->client >= 0 && client && !proxy_read(c->client, &c->up) && !proxy_move(p, c, true))
		ok = false;
	if (c->server >= 0 && server && !proxy_read(c->server, &c->down) && !proxy_move(p, c, false))
		ok = false;
	ok = ok && (c->client < 0 || proxy_move(p, c, true)) && (c->client < 0 || proxy_move(p, c, false));
	if (c->mute || c->hold) {
		/* The ends do not hear of each other any more; the server's stays for what is held. */
		if (c->up.ended)
			far_fd_close(&c->client);
		if (c->down.ended || (c->mute && c->client < 0))
			proxy_close_conn(p, c);
		return;
	}
	if (!ok || c->up.ended || c->down.ended)
		proxy_close_conn(p, c);
}

static void *proxy_run(void *arg)
{
	struct proxy *p = arg;

	for (;;) {
		struct pollfd pf[2 + 2 * PROXY_CONNS] = { { .fd = p->fd, .events = POLLIN },
							   { .fd = p->wake[0], .events = POLLIN } };
		far_mutex_lock(&p->lock);
		bool stop = p->stop, release = p->release, refuse = p->refuse;
		far_mutex_unlock(&p->lock);
		for (int i = 0; i < PROXY_CONNS; i++) {
			struct proxy_conn *c = &p->conn[i];
			if (stop || (refuse && !c->hold))
				proxy_close_conn(p, c);
			if (release && c->hold && c->server >= 0)
				proxy_let_go(p, c);
			pf[2 + 2 * i] = (struct pollfd){ .fd = c->client, .events = POLLIN };
			pf[3 + 2 * i] = (struct pollfd){ .fd = c->server, .events = POLLIN };
		}
		if (stop)
			return NULL;
		char byte[16];
		if (poll(pf, 2 + 2 * PROXY_CONNS, -1) < 0)
			continue;
		if (pf[1].revents && read(p->wake[0], byte, sizeof byte) < 0)
			continue;
		for (int i = 0; i < PROXY_CONNS; i++)
			if (pf[2 + 2 * i].revents || pf[3 + 2 * i].revents)
				proxy_serve(p, &p->conn[i], pf[2 + 2 * i].revents, pf[3 + 2 * i].revents);
		if (pf[0].revents)
			proxy_accept(p);
	}
}

static void proxy_wake(struct proxy *p)
{
	(void)!write(p->wake[1], "", 1);
}

bool proxy_start(struct proxy *p, int server_port)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof sin;

	memset(p, 0, sizeof *p);
	for (int i = 0; i < PROXY_CONNS; i++)
		p->conn[i].client = p->conn[i].server = -1;
	p->server_port = server_port;
	p->delay = 200 * FAR_MSEC;
	far_mutex_init(&p->lock);
	p->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (bind(p->fd, (struct sockaddr *)&sin, sizeof sin) || listen(p->fd, 64) ||
	    getsockname(p->fd, (struct sockaddr *)&sin, &len) || pipe2(p->wake, O_CLOEXEC))
		return false;
	p->port = ntohs(sin.sin_port);
	return far_thread_start(&p->t, "proxy", proxy_run, p) == 0;
}

void proxy_set(struct proxy *p, enum proxy_fault fault, unsigned at, unsigned seed)
{
	proxy_set_twice(p, fault, at, 0, seed);
}

void proxy_set_twice(struct proxy *p, enum proxy_fault fault, unsigned at, unsigned second, unsigned seed)
{
	far_mutex_lock(&p->lock);
	p->fault = fault;
	p->at = at;
	p->second = second;
	p->seed = seed;
	p->messages = 0;
	p->done = p->release = false;
	far_mutex_unlock(&p->lock);
}

bool proxy_release(struct proxy *p)
{
	uint64_t end = far_now() + 10 * FAR_SEC;
	unsigned held;

	far_mutex_lock(&p->lock);
	p->release = true;
	far_mutex_unlock(&p->lock);
	proxy_wake(p);
	do {
		far_mutex_lock(&p->lock);
		held = p->held;
		far_mutex_unlock(&p->lock);
		if (held)
			far_sleep_until(far_now() + FAR_MSEC, false);
	} while (held && far_now() < end);
	return !held;
}

void proxy_refuse(struct proxy *p, bool on)
{
	far_mutex_lock(&p->lock);
	p->refuse = on;
	far_mutex_unlock(&p->lock);
	proxy_wake(p);
}

void proxy_lead(struct proxy *p, int server_port)
{
	far_mutex_lock(&p->lock);
	p->server_port = server_port;
	far_mutex_unlock(&p->lock);
}

unsigned proxy_dialled(struct proxy *p)
{
	far_mutex_lock(&p->lock);
	unsigned n = p->dialled;
	far_mutex_unlock(&p->lock);
	return n;
}

unsigned proxy_messages(struct proxy *p, bool *done)
{
	far_mutex_lock(&p->lock);
	unsigned n = p->messages;
	if (done)
		*done = p->done;
	far_mutex_unlock(&p->lock);
	return n;
}

void proxy_stop(struct proxy *p)
{
	far_mutex_lock(&p->lock);
	p->stop = true;
	far_mutex_unlock(&p->lock);
	proxy_wake(p);
	far_thread_join(&p->t);
	close(p->fd);
	close(p->wake[0]);
	close(p->wake[1]);
	far_mutex_fini(&p->lock);
}
