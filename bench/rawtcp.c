/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * rawtcp BYTES BLOCK [huge|small]: one stream over loopback from one process to another, written and read by BLOCK, nothing
 * checked. Both ends use one block of memory again and again, which stays in their caches; with the third word they move
 * BYTES of memory into fresh memory, in huge or in small pages, as whoever pulls a region must.
 * Prints MiB a second and the CPU seconds of both ends. What a protocol over TCP can be held against: the same socket
 * options and the same congestion control as farpage's own connections (the host's default, but reno in place of bbr,
 * whose pacing costs timers on loopback).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double raw_now(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static double raw_cpu(int who)
{
	struct rusage u;
	getrusage(who, &u);
	return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static int raw_fail(const char *what)
{
	perror(what);
	return 1;
}

/* The sender: a byte has come, so the receiver is ready. */
static int raw_send(int listener, uint64_t bytes, size_t block, const char *buf, size_t step)
{
	int fd = accept(listener, NULL, NULL), one = 1;
	char go, control[16] = "";
	socklen_t len = sizeof control - 1;

	if (fd < 0 || read(fd, &go, 1) != 1)
		return raw_fail("accept");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, control, &len) == 0 && !strncmp(control, "bbr", 3))
		setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
	while (bytes) {
		ssize_t n = write(fd, buf, bytes < block ? bytes : block);
		if (n < 0)
			return raw_fail("write");
		bytes -= (uint64_t)n;
		buf += step ? n : 0;
	}
	close(fd);
	return 0;
}

/* `block` bytes that are there, or fresh memory. */
static char *raw_memory(uint64_t bytes, size_t block, const char *pages)
{
	size_t len = pages ? bytes : block;
	char *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (pages ? 0 : MAP_POPULATE), -1, 0);

	if (p != MAP_FAILED && pages)
		madvise(p, len, strcmp(pages, "huge") ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
	return p;
}

int main(int argc, char **argv)
{
	const char *pages = argc == 4 ? argv[3] : NULL;
	uint64_t bytes = argc > 2 ? strtoull(argv[1], NULL, 10) : 0, left;
	size_t block = argc > 2 ? strtoull(argv[2], NULL, 10) : 0, step = pages != NULL;
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof a;
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (!bytes || !block || argc > 4 || (pages && strcmp(pages, "huge") && strcmp(pages, "small"))) {
		fprintf(stderr, "usage: rawtcp BYTES BLOCK [huge|small]\n");
		return 2;
	}
	char *buf = raw_memory(bytes, block, pages), ready;
	int filled[2];
	if (buf == MAP_FAILED || listener < 0 || bind(listener, (void *)&a, sizeof a) < 0 || listen(listener, 1) < 0 ||
	    getsockname(listener, (void *)&a, &len) < 0 || pipe(filled))
		return raw_fail("listen");
	if (!pages)
		memset(buf, 0x5a, block);
	pid_t pid = fork();
	if (pid < 0)
		return raw_fail("fork");
	if (pid == 0) {
		memset(buf, 0xa5, pages ? bytes : block); /* pages of its own */
		if (write(filled[1], "", 1) != 1)
			return raw_fail("write");
		_exit(raw_send(listener, bytes, block, buf, step));
	}
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), status;
	if (fd < 0 || read(filled[0], &ready, 1) != 1 || connect(fd, (void *)&a, sizeof a) < 0)
		return raw_fail("connect");
	double begin = raw_now(), cpu = raw_cpu(RUSAGE_SELF);
	if (write(fd, "", 1) != 1)
		return raw_fail("write");
	char *to = buf;
	for (left = bytes; left;) {
		ssize_t n = read(fd, to, left < block ? left : block);
		if (n <= 0)
			return raw_fail("read");
		left -= (uint64_t)n;
		to += step ? n : 0;
	}
	double seconds = raw_now() - begin;
	waitpid(pid, &status, 0);
	printf("%.1f %.3f\n", (double)bytes / 1048576 / seconds, raw_cpu(RUSAGE_SELF) - cpu + raw_cpu(RUSAGE_CHILDREN));
	return status != 0;
}
