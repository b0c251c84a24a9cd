/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* relay PORT RTT_US: a way to 127.0.0.1:PORT that takes half of RTT_US in each direction. Prints its own port, relays until
 * it is killed. Bytes keep their order; nothing limits how many are on their way. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#define MAX_WAYS 256
#define PIECE 65536

struct piece {
	struct piece *next;
	uint64_t due;
	size_t n, at; /* n == 0: the end */
	char data[];
};

/* One direction of one connection; its other direction is ways[index ^ 1]. */
struct way {
	int from, to;
	struct piece *first, **last;
	int ended; /* nothing more comes from `from` */
};

static struct way ways[MAX_WAYS];
static unsigned n_ways;
static uint64_t delay;

static uint64_t now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void add(int from, int to)
{
	ways[n_ways] = (struct way){ .from = from, .to = to };
	ways[n_ways].last = &ways[n_ways].first;
	n_ways++;
}

static void take(struct way *w)
{
	struct piece *p = malloc(sizeof *p + PIECE);
	if (!p)
		die("malloc");
	ssize_t n = recv(w->from, p->data, PIECE, MSG_DONTWAIT);
	if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
		free(p);
		return;
	}
	p->n = n > 0 ? (size_t)n : 0;
	p->at = 0;
	p->next = NULL;
	p->due = now() + delay;
	*w->last = p;
	w->last = &p->next;
	w->ended = n <= 0;
}

/* What is due goes out. */
static void give(struct way *w)
{
	while (w->first && w->first->due <= now()) {
		struct piece *p = w->first;
		if (!p->n) {
			shutdown(w->to, SHUT_WR);
		} else {
			ssize_t n = send(w->to, p->data + p->at, p->n - p->at, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (n < 0 && errno == EAGAIN)
				return;
			p->at += n > 0 ? (size_t)n : p->n; /* an error: nobody takes it */
			if (p->at < p->n)
				return;
		}
		w->first = p->next;
		if (!w->first)
			w->last = &w->first;
		free(p);
	}
}

static int loopback(int port, int listening)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port),
				 .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	if (fd < 0)
		die("socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (listening ? bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 16) : connect(fd, (struct sockaddr *)&a, sizeof a))
		die(listening ? "listen" : "connect");
	return fd;
}

static void turn(int listener, int port)
{
	struct pollfd fds[MAX_WAYS + 1] = { { .fd = listener, .events = POLLIN } };
	uint64_t next = UINT64_MAX, at = now();
	struct timespec t = { 0, 0 };

	for (unsigned i = 0; i < n_ways; i++) {
		give(&ways[i]);
		if (ways[i].first && ways[i].first->due < next)
			next = ways[i].first->due;
		fds[i + 1] = (struct pollfd){ .fd = ways[i].ended ? -1 : ways[i].from, .events = POLLIN };
	}
	if (next > at) {
		t.tv_sec = (time_t)((next - at) / 1000000000u);
		t.tv_nsec = (long)((next - at) % 1000000000u);
	}
	if (next <= at) /* it was due and was not taken: look again soon */
		t.tv_nsec = 100000;
	if (ppoll(fds, n_ways + 1, next == UINT64_MAX ? NULL : &t, NULL) < 0 && errno != EINTR)
		die("ppoll");
	for (unsigned i = 0; i < n_ways; i++)
		if (fds[i + 1].revents)
			take(&ways[i]);
	if ((fds[0].revents & POLLIN) && n_ways + 2 <= MAX_WAYS) {
		int one = 1, fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC), far = loopback(port, 0);
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		add(fd, far);
		add(far, fd);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in a;
	socklen_t len = sizeof a;

	if (argc != 3) {
		fprintf(stderr, "usage: relay PORT RTT_US\n");
		return 2;
	}
	prctl(PR_SET_PDEATHSIG, SIGTERM);
	prctl(PR_SET_TIMERSLACK, 1000);
	delay = strtoull(argv[2], NULL, 10) * 500;
	int listener = loopback(0, 1);
	if (getsockname(listener, (struct sockaddr *)&a, &len))
		die("getsockname");
	printf("%d\n", ntohs(a.sin_port));
	fflush(stdout);
	for (;;)
		turn(listener, atoi(argv[1]));
}
