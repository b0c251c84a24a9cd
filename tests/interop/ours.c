/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * farpage's side of a trial against another peer: a region by its URI, or memory that is handed over. It does what it is
 * told on standard input, a line each, and answers with one; tests/interop/go/client.go understands the same lines.
 *
 * ours URI               read OFF LEN; write OFF HEX; get FILE CHUNK DEPTH; put FILE CHUNK DEPTH; sync
 * ours hand-over SOCKET FILE
 *                        hand memory over as userfaultfd-go does, compare it with FILE: "equal N"
 */
#define _GNU_SOURCE
#include <farpage.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define DEPTH_MAX 1024

static struct far_backend *remote;

static unsigned char *load(const char *path, size_t *n)
{
	struct stat st;
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &st))
		return NULL;
	*n = (size_t)st.st_size;
	void *p = mmap(NULL, *n, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	return p == MAP_FAILED ? NULL : p;
}

/* All of a region by many callers. */
struct whole {
	unsigned char *want;
	size_t n, chunk;
	bool put;
	_Atomic uint64_t next;
	_Atomic int error, inside, most;
	_Atomic uint64_t wrong; /* the first place that differed, + 1 */
};

static int whole_one(struct whole *w, uint64_t at, unsigned char *buf)
{
	size_t len = w->chunk < w->n - at ? w->chunk : w->n - at;
	int inside = atomic_fetch_add(&w->inside, 1) + 1, most = atomic_load(&w->most);

	while (inside > most && !atomic_compare_exchange_weak(&w->most, &most, inside))
		;
	int r = w->put ? far_write(remote, at, w->want + at, len, 0) : far_read(remote, at, buf, len, 0);
	atomic_fetch_sub(&w->inside, 1);
	if (!r && !w->put && memcmp(buf, w->want + at, len))
		atomic_store(&w->wrong, at + 1);
	return r;
}

static void *whole_run(void *arg)
{
	struct whole *w = arg;
	unsigned char *buf = malloc(w->chunk);
	int r = buf ? 0 : -ENOMEM;

	while (!r) {
		uint64_t at = atomic_fetch_add(&w->next, 1) * w->chunk;
		if (at >= w->n)
			break;
		r = whole_one(w, at, buf);
	}
	if (r)
		atomic_store(&w->error, r);
	free(buf);
	return NULL;
}

static void whole(const char *path, size_t chunk, unsigned depth, bool put)
{
	struct whole w = { .chunk = chunk, .put = put };
	pthread_t thread[DEPTH_MAX];
	unsigned n = 0;

	w.want = load(path, &w.n);
	if (!w.want || !chunk || depth > DEPTH_MAX || w.n != far_size(remote)) {
		printf("error: what is to be compared has not the region's size\n");
		return;
	}
	while (n < depth && !pthread_create(&thread[n], NULL, whole_run, &w))
		n++;
	for (unsigned i = 0; i < n; i++)
		pthread_join(thread[i], NULL);
	if (w.error)
		printf("error: %s\n", strerror(-w.error));
	else if (w.wrong)
		printf("error: other bytes at %" PRIu64 "\n", w.wrong - 1);
	else
		printf("equal %zu at once %d\n", w.n, w.most);
	munmap(w.want, w.n);
}

static void say_read(uint64_t off, size_t len)
{
	unsigned char *p = calloc(1, len + 1);
	int r = p ? far_read(remote, off, p, len, 0) : -ENOMEM;

	if (r)
		printf("error: %s", strerror(-r));
	for (size_t i = 0; i < len && !r; i++)
		printf("%02x", p[i]);
	puts("");
	free(p);
}

static void say_write(uint64_t off, const char *hex)
{
	size_t n = strlen(hex) / 2;
	unsigned char *p = calloc(1, n + 1);
	unsigned byte;

	for (size_t i = 0; p && i < n && sscanf(hex + 2 * i, "%2x", &byte) == 1; i++)
		p[i] = (unsigned char)byte;
	int r = p ? far_write(remote, off, p, n, 0) : -ENOMEM;
	if (r)
		printf("error: %s\n", strerror(-r));
	else
		printf("ok %zu\n", n);
	free(p);
}

static int commands(void)
{
	char *line = NULL, word[20], a[4096];
	unsigned long long x, y;
	size_t cap = 0;

	while (getline(&line, &cap, stdin) > 0) {
		if (sscanf(line, "read %llu %llu", &x, &y) == 2) {
			say_read(x, y);
		} else if (sscanf(line, "write %llu %4095s", &x, a) == 2) {
			say_write(x, a);
		} else if (sscanf(line, "%3s %4095s %llu %llu", word, a, &x, &y) == 4) {
			whole(a, x, (unsigned)y, strcmp(word, "put") == 0);
		} else {
			int r = far_flush(remote);
			if (r)
				printf("error: %s\n", strerror(-r));
			else
				puts("ok");
		}
		fflush(stdout);
	}
	free(line);
	return 0;
}

static int hand_over(const char *path, const char *file)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	struct uffdio_api api = { .api = UFFD_API };
	struct far_handover h = FAR_HANDOVER_INIT;
	struct far_error err = { 0 };
	size_t n;
	unsigned char *want = load(file, &n);

	if (!want)
		return 2;
	size_t len = (n + 4095) / 4096 * 4096;
	char *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register reg = { .range = { (uintptr_t)memory, len }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct far_handover_range range = { (uintptr_t)memory, len, 0 };
	int conn = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	h.format = FAR_HANDOVER_GO;
	h.uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	if (h.uffd < 0 || ioctl(h.uffd, UFFDIO_API, &api) || ioctl(h.uffd, UFFDIO_REGISTER, &reg)) {
		printf("skipped: userfaultfd: %s\n", strerror(errno));
		return 77;
	}
	h.range = &range;
	h.n = 1;
	snprintf(sun.sun_path, sizeof sun.sun_path, "%s", path);
	if (connect(conn, (struct sockaddr *)&sun, sizeof sun)) {
		printf("cannot connect: %s\n", strerror(errno));
		return 1;
	}
	if (far_uffd_send(conn, &h, &err)) {
		printf("%s\n", err.text);
		return 1;
	}
	if (memcmp(memory, want, n)) {
		printf("the memory differs from the file\n");
		return 1;
	}
	printf("equal %zu\n", n);
	return 0;
}

int main(int argc, char **argv)
{
	struct far_error err = { 0 };

	if (argc == 4 && strcmp(argv[1], "hand-over") == 0)
		return hand_over(argv[2], argv[3]);
	if (argc != 2) {
		fprintf(stderr, "usage: ours URI | ours hand-over SOCKET FILE\n");
		return 2;
	}
	if (far_open(argv[1], NULL, &remote, &err)) {
		printf("error: %s\n", err.text);
		return 1;
	}
	puts("open");
	fflush(stdout);
	int r = commands();
	far_close(remote);
	return r;
}
