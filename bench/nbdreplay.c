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

/* Negotiate with EXPORT_NAME, in simple replies; the export's size. */
static uint64_t hello(int fd, const char *export)
{
	uint8_t buf[18], head[20];
	uint64_t magic = htobe64(0x49484156454f5054), size;
	uint32_t flags = htobe32(3), option = htobe32(1), len = htobe32((uint32_t)strlen(export));

	get(fd, buf, 18);
	memcpy(head, &flags, 4);
	memcpy(head + 4, &magic, 8);
	memcpy(head + 12, &option, 4);
	memcpy(head + 16, &len, 4);
	put(fd, head, sizeof head);
	put(fd, export, strlen(export));
	get(fd, buf, 10);
	memcpy(&size, buf, 8);
	return be64toh(size);
}

int main(int argc, char **argv)
{
	static struct request q[BATCH_MAX];
	static char in[BATCH_MAX * REPLY];
	struct sockaddr_un a = { .sun_family = AF_UNIX };

	if (argc < 5 || strlen(argv[1]) >= sizeof a.sun_path || atoi(argv[3]) < 1 || atoi(argv[3]) > BATCH_MAX) {
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
