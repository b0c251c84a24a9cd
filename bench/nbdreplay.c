/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * nbdreplay SOCKET EXPORT BATCH SECONDS [SEED]: the cheapest NBD client that there can be, so that what is measured is the
 * server. BATCH random 4 KiB reads are written at once, their replies taken in as they come, and so on. It says how many
 * requests a second were answered, and how many it could ask for if no server ever let it wait, and fails if a reply is not what
 * the protocol says.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define REPLY (16 + BLOCK)
#define BATCH_MAX 1024

struct request {
	uint32_t magic;
	uint16_t flags, type;
	uint64_t cookie, off;
	uint32_t len;
} __attribute__((packed));

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void put(int fd, const void *p, size_t n)
{
	for (size_t at = 0; at < n;) {
		ssize_t k = write(fd, (const char *)p + at, n - at);
		if (k <= 0)
			die("write");
		at += (size_t)k;
	}
}

static void get(int fd, void *p, size_t n)
{
	for (size_t at = 0; at < n;) {
		ssize_t k = read(fd, (char *)p + at, n - at);
		if (k <= 0)
			die("read");
		at += (size_t)k;
	}
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Seconds of CPU that this process has used. */
static double busy(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Negotiate with GO, in simple replies; the export's size. */
static uint64_t hello(int fd, const char *export)
{
	static uint8_t buf[4096], out[4 + 16 + 4 + 256 + 2];
	uint64_t magic = htobe64(0x49484156454f5054), size = 0;
	uint32_t n = (uint32_t)strlen(export), v[] = { htobe32(3), htobe32(7), htobe32(4 + n + 2), htobe32(n) };

	memcpy(out, &v[0], 4); /* the client's flags; then the option */
	memcpy(out + 4, &magic, 8);
	memcpy(out + 12, &v[1], 12);
	memcpy(out + 24, export, n); /* no information is asked for */
	get(fd, buf, 18);
	put(fd, out, 24 + n + 2);
	for (;;) {
		uint32_t head[5];
		get(fd, head, sizeof head);
		uint32_t kind = be32toh(head[3]), len = be32toh(head[4]);
		if (kind == 1)
			return be64toh(size);
		if (kind != 3 || len > sizeof buf)
			break;
		get(fd, buf, len);
		if (len == 12 && !buf[0] && !buf[1])
			memcpy(&size, buf + 2, 8);
	}
	fprintf(stderr, "nbdreplay: no such export\n");
	exit(1);
}

int main(int argc, char **argv)
{
	static struct request q[BATCH_MAX];
	static char in[BATCH_MAX * REPLY];
	struct sockaddr_un a = { .sun_family = AF_UNIX };

	if (argc < 5 || strlen(argv[1]) >= sizeof a.sun_path || strlen(argv[2]) > 255 || atoi(argv[3]) < 1 || atoi(argv[3]) > BATCH_MAX) {
		fprintf(stderr, "usage: nbdreplay SOCKET EXPORT BATCH SECONDS [SEED]\n");
		return 2;
	}
	memcpy(a.sun_path, argv[1], strlen(argv[1]));
	int fd = socket(AF_UNIX, SOCK_STREAM, 0), batch = atoi(argv[3]);
	if (fd < 0 || connect(fd, (struct sockaddr *)&a, sizeof a))
		die(argv[1]);
	uint64_t blocks = hello(fd, argv[2]) / BLOCK, done = 0, seed = argc > 5 ? strtoull(argv[5], NULL, 0) : 1;
	if (!blocks) {
		fprintf(stderr, "nbdreplay: the export is shorter than a block\n");
		return 1;
	}
	double began = now(), end = began + atof(argv[4]);
	while (now() < end) {
		for (int i = 0; i < batch; i++) {
			seed = seed * 6364136223846793005u + 1442695040888963407u;
			q[i] = (struct request){ htobe32(0x25609513), 0, 0, htobe64((uint64_t)i),
						 htobe64((seed >> 24) % blocks * BLOCK), htobe32(BLOCK) };
		}
		put(fd, q, sizeof q[0] * (size_t)batch);
		get(fd, in, (size_t)REPLY * (size_t)batch);
		for (int i = 0; i < batch; i++) {
			uint32_t head[2];
			memcpy(head, in + (size_t)i * REPLY, sizeof head);
			if (head[0] != htobe32(0x67446698) || head[1]) {
				fprintf(stderr, "nbdreplay: a reply is wrong\n");
				return 1;
			}
		}
		done += (uint64_t)batch;
	}
	double took = now() - began;
	printf("%.0f %.0f\n", (double)done / took, (double)done / busy());
	return 0;
}
