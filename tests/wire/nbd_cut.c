/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * nbd_cut URI PORT BELOW STEP [FIRST]: the NBD client, and a link that is cut once after so many bytes, one way or the other.
 *
 * URI is a server that somebody has started at 127.0.0.1:PORT, with %d in place of the port; it serves at least 64 KiB that
 * are ours to write. BELOW limits the bytes after which is cut in each direction, beside what the exchange has (0: does
 * not); every STEP-th is taken, from FIRST on. For each cut two clients: one that is told of errors and calls again, and one
 * with the retry layer, which must not be told of any but a flush's -EREMOTEIO. In the end every byte is what was written
 * last; no call takes longer than its deadline. Prints what it has done; nbd_cuts.py has the servers.
 */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/thread.h"
#include "farpage.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SIZE 65536
#define PIECE 96
#define CONNS 8
#define NEVER UINT64_MAX
#define CALL (10 * FAR_SEC)
#define SLACK (5 * FAR_SEC) /* of a loaded machine */

enum { UP, DOWN };

/* ------------------------------------------------------------------------------------------------ what cuts */

struct pair {
	int fd[2]; /* the client's, the server's; -1: none */
};

static struct {
	struct far_thread thread;
	struct far_mutex lock;
	int listener, wake[2], port, server_port;
	struct pair pair[CONNS]; /* the thread's */
	/* under lock */
	uint64_t at[2], seen[2];
	bool armed, done, reset, stop;
} cut;

static void cut_close(int *fd, bool reset)
{
	struct linger now = { .l_onoff = 1, .l_linger = 0 };

	if (*fd < 0)
		return;
	if (reset)
		(void)!setsockopt(*fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
	close(*fd);
	*fd = -1;
}

static void cut_end(struct pair *p, bool reset)
{
	/* Whatever the server has got of the old connection it has dealt with before a new one is let through: NBD has no
	 * means against a write that is late, and this is no test of that. */
	char skip[4096];
	struct pollfd fd = { .fd = p->fd[1], .events = POLLIN };

	cut_close(&p->fd[0], reset);
	shutdown(p->fd[1], SHUT_WR);
	while (poll(&fd, 1, 5000) > 0 && read(p->fd[1], skip, sizeof skip) > 0)
		;
	cut_close(&p->fd[1], false);
}

/* How many of n bytes may pass; *end: it is cut behind them. */
static size_t cut_judge(int way, size_t n, bool *end, bool *reset)
{
	far_mutex_lock(&cut.lock);
	*end = cut.armed && !cut.done && cut.seen[way] + n >= cut.at[way];
	if (*end) {
		n = (size_t)(cut.at[way] - cut.seen[way]);
		cut.done = true;
	}
	cut.seen[way] += n;
	*reset = cut.reset;
	far_mutex_unlock(&cut.lock);
	return n;
}

static void cut_move(struct pair *p, int way)
{
	/* Some servers send their answers in pieces, and the next one when the last is acknowledged. */
	int on = 1;
	(void)!setsockopt(p->fd[way], IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
	char buf[16384];
	ssize_t n = recv(p->fd[way], buf, sizeof buf, MSG_DONTWAIT);
	bool end, reset;

	if (n < 0 && errno == EAGAIN)
		return;
	if (n <= 0) {
		cut_end(p, false);
		return;
	}
	size_t k = cut_judge(way, (size_t)n, &end, &reset), sent = 0;
	while (sent < k) {
		ssize_t w = send(p->fd[!way], buf + sent, k - sent, MSG_NOSIGNAL);
		if (w <= 0) {
			end = true;
			break;
		}
		sent += (size_t)w;
	}
	if (end)
		cut_end(p, reset);
}

static void cut_at_once(int fd)
{
	int on = 1;

	(void)!setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static int cut_dial(int port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = { htonl(INADDR_LOOPBACK) } };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	cut_at_once(fd);
	if (connect(fd, (struct sockaddr *)&a, sizeof a) == 0)
		return fd;
	close(fd);
	return -1;
}

static void cut_accept(void)
{
	struct pair *p = cut.pair;
	int fd = accept4(cut.listener, NULL, NULL, SOCK_CLOEXEC);

	while (p < cut.pair + CONNS && p->fd[0] >= 0)
		p++;
	if (fd < 0 || p == cut.pair + CONNS) {
		fprintf(stderr, "too many connections\n");
		abort();
	}
	cut_at_once(fd);
	p->fd[0] = fd;
	p->fd[1] = cut_dial(cut.server_port);
	if (p->fd[1] < 0)
		cut_close(&p->fd[0], true);
}

static void *cut_run(void *arg)
{
	struct pollfd fd[2 + 2 * CONNS];
	bool stop = false;

	while (!stop) {
		fd[0] = (struct pollfd){ .fd = cut.listener, .events = POLLIN };
		fd[1] = (struct pollfd){ .fd = cut.wake[0], .events = POLLIN };
		for (int i = 0; i < 2 * CONNS; i++)
			fd[2 + i] = (struct pollfd){ .fd = cut.pair[i / 2].fd[i % 2], .events = POLLIN };
		poll(fd, 2 + 2 * CONNS, -1);
		for (int i = 0; i < 2 * CONNS; i++)
			if (fd[2 + i].revents && cut.pair[i / 2].fd[i % 2] == fd[2 + i].fd && fd[2 + i].fd >= 0)
				cut_move(&cut.pair[i / 2], i % 2);
		if (fd[0].revents)
			cut_accept();
		far_mutex_lock(&cut.lock);
		stop = cut.stop;
		far_mutex_unlock(&cut.lock);
	}
	for (int i = 0; i < CONNS; i++)
		if (cut.pair[i].fd[0] >= 0)
			cut_end(&cut.pair[i], true);
	return NULL;
}

static void cut_arm(int way, uint64_t at, bool reset)
{
	far_mutex_lock(&cut.lock);
	cut.armed = at != NEVER;
	cut.at[way] = at;
	cut.at[!way] = NEVER;
	cut.seen[UP] = cut.seen[DOWN] = 0;
	cut.done = false;
	cut.reset = reset;
	far_mutex_unlock(&cut.lock);
}

static bool cut_done(uint64_t seen[2])
{
	far_mutex_lock(&cut.lock);
	bool done = cut.done;
	if (seen)
		memcpy(seen, cut.seen, sizeof cut.seen);
	far_mutex_unlock(&cut.lock);
	return done;
}

static void cut_start(int server_port)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
	socklen_t n = sizeof a;

	far_mutex_init(&cut.lock);
	cut.server_port = server_port;
	cut.listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(cut.listener, (struct sockaddr *)&a, sizeof a) || listen(cut.listener, 16) || pipe(cut.wake) ||
	    getsockname(cut.listener, (struct sockaddr *)&a, &n))
		abort();
	cut.port = ntohs(a.sin_port);
	for (int i = 0; i < CONNS; i++)
		cut.pair[i].fd[0] = cut.pair[i].fd[1] = -1;
	far_thread_start(&cut.thread, "cut", cut_run, NULL);
}

static void cut_stop(void)
{
	far_mutex_lock(&cut.lock);
	cut.stop = true;
	far_mutex_unlock(&cut.lock);
	(void)!write(cut.wake[1], "x", 1);
	far_thread_join(&cut.thread);
	close(cut.listener);
}

/* ------------------------------------------------------------------------------------------------- the scene */

static struct {
	char uri[512];
	bool retry;
	int way;
	uint64_t at;
	struct far_backend *b;
	uint8_t want[SIZE];
	uint32_t rng;
	_Atomic unsigned told, forgotten; /* errors that a caller was told of; flushes that could not vouch */
} scene;

#define FAIL(...)                                                                                                      \
	do {                                                                                                           \
		fprintf(stderr, "cut %s after %llu bytes, %s: ", scene.way == UP ? "up" : "down",                      \
			(unsigned long long)scene.at, scene.retry ? "with retries" : "bare");                          \
		fprintf(stderr, __VA_ARGS__);                                                                          \
		fprintf(stderr, "\n");                                                                                 \
		exit(1);                                                                                               \
	} while (0)

struct call {
	enum { READ, WRITE, WRITE_FLUSHED, ZERO, FLUSH, EXTENTS } what;
	uint64_t off;
	size_t len;
	struct far_thread thread;
};
static const char *const call_names[] = { "read", "write", "write and flush", "zero", "flush", "extents" };

static int call_extents(struct call *c)
{
	struct far_extent e[8];
	size_t n = 0;
	int r = far_extents(scene.b, c->off, c->len, e, 8, &n);
	uint64_t at = c->off;

	for (size_t i = 0; !r && i < n; i++) {
		if (e[i].off != at || !e[i].len)
			FAIL("extents that do not follow each other");
		for (uint64_t k = 0; e[i].kind == FAR_EXTENT_ZERO && k < e[i].len && at + k < SIZE; k++)
			if (scene.want[at + k])
				FAIL("a byte at %llu is said to be zero", (unsigned long long)(at + k));
		at += e[i].len;
	}
	return r;
}

static int call_once(struct call *c)
{
	uint8_t *buf;
	int r;

	switch (c->what) {
	case READ:
		buf = malloc(c->len);
		memset(buf, 0xee, c->len);
		r = far_read(scene.b, c->off, buf, c->len, 0);
		if (!r && memcmp(buf, scene.want + c->off, c->len))
			FAIL("a read of %zu at %llu gave other bytes", c->len, (unsigned long long)c->off);
		free(buf);
		return r;
	case WRITE:
	case WRITE_FLUSHED:
		return far_write(scene.b, c->off, scene.want + c->off, c->len, c->what == WRITE ? 0 : FAR_FLUSH);
	case ZERO:
		return far_zero(scene.b, c->off, c->len, 0);
	case FLUSH:
		return far_flush(scene.b);
	default:
		return call_extents(c);
	}
}

/* Until it is done: what fails must have been cut, and nothing is cut twice. */
static void *call_run(void *arg)
{
	struct call *c = arg;
	bool flushes = c->what == FLUSH || c->what == WRITE_FLUSHED;

	for (int tries = 0;; tries++) {
		uint64_t began = far_now(), old = far_deadline_limit(began + CALL);
		int r = call_once(c);
		far_deadline_restore(old);
		if (far_now() - began > CALL + SLACK)
			FAIL("%s outlived its deadline", call_names[c->what]);
		if (!r)
			return NULL;
		bool vouch = flushes && r == -EREMOTEIO;
		scene.forgotten += vouch;
		scene.told += !vouch;
		if (!cut_done(NULL))
			FAIL("%s: %s, and nothing was cut", call_names[c->what], far_strerror(r));
		if (scene.retry && !vouch)
			FAIL("%s: %s, in spite of the retries", call_names[c->what], far_strerror(r));
		if (tries == 3)
			FAIL("%s: %s, again and again", call_names[c->what], far_strerror(r));
	}
}

static void scene_call(int what, uint64_t off, size_t len)
{
	struct call c = { .what = what, .off = off, .len = len };

	for (size_t i = 0; i < len && (what == WRITE || what == WRITE_FLUSHED); i++)
		scene.want[off + i] = (uint8_t)((scene.rng = scene.rng * 1664525 + 1013904223) >> 24);
	if (what == ZERO)
		memset(scene.want + off, 0, len);
	call_run(&c);
}

/* Three callers share the connection. */
static void scene_crowd(void)
{
	struct call c[3] = { { .what = READ, .off = 300, .len = PIECE }, { .what = WRITE, .off = 5000, .len = PIECE },
			     { .what = READ, .off = 9000, .len = PIECE } };

	for (size_t i = 0; i < PIECE; i++)
		scene.want[5000 + i] = (uint8_t)(scene.at + i);
	for (int i = 0; i < 3; i++)
		if (far_thread_start(&c[i].thread, "caller", call_run, &c[i]))
			FAIL("no thread");
	for (int i = 0; i < 3; i++)
		far_thread_join(&c[i].thread);
}

static int scene_dial(struct far_error *err)
{
	struct far_open_opts o = FAR_OPEN_OPTS_INIT;
	uint64_t began = far_now();

	o.deadline_ms = CALL / FAR_MSEC;
	int r = far_open(scene.uri, &o, &scene.b, err);
	if (far_now() - began > CALL + SLACK)
		FAIL("opening outlived its deadline");
	return r;
}

/* Opening is told that it was cut, with a sentence, and is done again. */
static void scene_open(void)
{
	struct far_error err = { 0 };
	int r = scene_dial(&err);

	if (r) {
		scene.told++;
		if (!cut_done(NULL) || !err.text[0])
			FAIL("opening: %s (%s), and nothing was cut", far_strerror(r), err.text);
		r = scene_dial(&err);
	}
	if (r)
		FAIL("opening once more: %s (%s)", far_strerror(r), err.text);
	if (scene.retry && (r = far_layer_open("retry:deadline=10s,backoff=1ms,max-backoff=10ms", scene.b, &scene.b, &err)))
		FAIL("the retry layer: %s", err.text);
}

static void scene_play(uint64_t seen[2])
{
	scene_open();
	scene_call(READ, 0, PIECE);
	scene_call(WRITE, 100, PIECE);
	scene_call(READ, 100, PIECE);
	scene_call(ZERO, 120, PIECE);
	scene_call(EXTENTS, 0, SIZE);
	scene_call(FLUSH, 0, 0);
	scene_call(WRITE_FLUSHED, 300, PIECE);
	scene_crowd();
	scene_call(READ, 100, 3 * PIECE);
	scene_call(FLUSH, 0, 0);
	cut_done(seen);
	scene_call(READ, 0, SIZE);
	far_close(scene.b);
}

int main(int argc, char **argv)
{
	uint64_t whole[2], now[2], cuts = 0, hit = 0, began = far_now();

	if (argc < 5)
		return 2;
	signal(SIGPIPE, SIG_IGN);
	far_log_set_level(getenv("FAR_DEBUG") ? FAR_LOG_DEBUG : FAR_LOG_ERROR);
	cut_start(atoi(argv[2]));
	snprintf(scene.uri, sizeof scene.uri, argv[1], cut.port);
	uint64_t below = strtoull(argv[3], NULL, 10), step = strtoull(argv[4], NULL, 10);
	uint64_t first = argc > 5 ? strtoull(argv[5], NULL, 10) : 1;
	cut_arm(UP, NEVER, false);
	scene_open();
	scene_call(WRITE_FLUSHED, 0, SIZE);
	far_close(scene.b);
	cut_arm(UP, NEVER, false);
	scene_play(whole);
	if (scene.told)
		FAIL("errors without a cut");
	for (scene.way = UP; scene.way <= DOWN; scene.way++)
		for (scene.at = first; scene.at <= whole[scene.way] && (!below || scene.at <= below); scene.at += step)
			for (int k = 0; k < 2; k++) {
				scene.retry = k;
				cut_arm(scene.way, scene.at, (scene.at + (uint64_t)k) % 2);
				scene_play(now);
				cuts++;
				hit += cut_done(NULL);
			}
	cut_stop();
	printf("%llu bytes up, %llu down; %llu of %llu cuts hit, %u errors told, %u flushes could not vouch; %.1f s\n",
	       (unsigned long long)whole[UP], (unsigned long long)whole[DOWN], (unsigned long long)hit, (unsigned long long)cuts,
	       scene.told, scene.forgotten, (double)(far_now() - began) / (double)FAR_SEC);
	return hit == cuts && scene.told ? 0 : 1;
}
