/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A stand-in for a virtual machine monitor that restores a snapshot: it has no farpage in it. The guest's memory is two
 * pieces, as below and above a hole for devices; it is handed to a pager the way Firecracker does it, and the guest goes on
 * at once. Its processors read pages and look whether they are the snapshot's, store into others and look whether the
 * stores stay, and a balloon gives pages back and looks whether they are zeros afterwards, while the pager still pulls.
 *
 * vmm SOCKET SNAPSHOT SEED [late|die|hold]
 *     late   the descriptor comes in a message of its own
 *     die    killed in the middle (by itself)
 *     hold   when all is well: print "holding" and wait for the end of standard input
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096u
#define CPUS 3

static const unsigned char *want; /* the snapshot's memory, as it is on disk */
static unsigned char *piece[2];
static size_t pages, low;         /* pages in all, and in the first piece */
static _Atomic unsigned long reads, stores, ballooned;
static _Atomic bool *stored;      /* by page: a processor has stored there */
static uint64_t seed;

static void die(const char *what, size_t page)
{
	printf("wrong: %s, page %zu\n", what, page);
	fflush(stdout);
	_exit(1);
}

static unsigned char *guest(size_t page)
{
	return page < low ? piece[0] + page * PAGE : piece[1] + (page - low) * PAGE;
}

static uint64_t next(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x;
}

/* Page by its number: 0 and 1 of 4 are only read, 2 is stored to, 3 is the balloon's. */
static void look(size_t page)
{
	if (memcmp(guest(page), want + page * PAGE, PAGE))
		die("a page differs from the snapshot", page);
	atomic_fetch_add(&reads, 1);
}

static void store(size_t page, unsigned cpu)
{
	unsigned char *p = guest(page);

	if (page / 4 % CPUS != cpu) /* each page has one processor */
		return;
	if (atomic_load(&stored[page])) {
		if (*(uint64_t *)(void *)p != (page ^ seed) || memcmp(p + 8, want + page * PAGE + 8, PAGE - 8))
			die("a store is gone", page);
		return;
	}
	*(uint64_t *)(void *)p = page ^ seed; /* the rest of the page is the snapshot's */
	atomic_store(&stored[page], true);
	atomic_fetch_add(&stores, 1);
}

static void *processor(void *arg)
{
	unsigned cpu = (unsigned)(uintptr_t)arg;
	uint64_t x = seed * 31 + cpu + 1;

	for (size_t k = 0; k < 2 * pages; k++) {
		size_t page = next(&x) % pages;
		if (page % 4 < 2)
			look(page);
		else if (page % 4 == 2)
			store(page, cpu);
	}
	return NULL;
}

/* What has been given back is zero from then on, whatever the pager has on its way. */
static void *balloon(void *arg)
{
	static const unsigned char zeros[PAGE];
	uint64_t x = seed + 77;

	for (size_t k = 0; k < pages / 4; k++) {
		size_t page = next(&x) % (pages / 4) * 4 + 3;
		if (page >= pages)
			continue;
		if (next(&x) % 2 && !atomic_load(&stored[page]))
			look(page); /* it may have been there */
		if (madvise(guest(page), PAGE, MADV_DONTNEED))
			die("madvise", page);
		atomic_store(&stored[page], true);
		if (memcmp(guest(page), zeros, PAGE))
			die("a page that was given back is not zero", page);
		atomic_fetch_add(&ballooned, 1);
	}
	return NULL;
}

static int hand_over(const char *path, int uffd, bool late)
{
	char json[400], control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8))) = { 0 };
	int n = snprintf(json, sizeof json,
			 "[{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%zu,\"offset\":0,\"page_size\":4096,\"page_size_kib\":4096},"
			 "{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%zu,\"offset\":%zu,\"page_size\":4096,\"page_size_kib\":4096}]",
			 (uint64_t)(uintptr_t)piece[0], low * PAGE, (uint64_t)(uintptr_t)piece[1], (pages - low) * PAGE, low * PAGE);
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	struct iovec iov = { json, (size_t)n };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(sun.sun_path, sizeof sun.sun_path, "%s", path);
	if (fd < 0 || connect(fd, (struct sockaddr *)&sun, sizeof sun))
		return -1;
	if (late) {
		if (write(fd, json, (size_t)n) != n)
			return -1;
		usleep(20000); /* so that it is a read of its own there */
		iov = (struct iovec){ json + n, 1 };
	}
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &uffd, sizeof uffd);
	return sendmsg(fd, &m, 0) > 0 ? fd : -1;
}

static int memory(size_t len, unsigned char **out, int uffd)
{
	*out = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct uffdio_register reg = { .range = { (uintptr_t)*out, len }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	return *out == MAP_FAILED ? -1 : ioctl(uffd, UFFDIO_REGISTER, &reg);
}

int main(int argc, char **argv)
{
	const char *how = argc > 4 ? argv[4] : "";
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	pthread_t t[CPUS + 1];
	struct stat st;
	char end;

	if (argc < 4)
		return 2;
	seed = strtoull(argv[3], NULL, 0) * 2654435761u + 1;
	int file = open(argv[2], O_RDONLY | O_CLOEXEC);
	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api)) {
		printf("skipped: userfaultfd: %s\n", strerror(errno));
		return 77;
	}
	if (file < 0 || fstat(file, &st))
		return 2;
	pages = (size_t)st.st_size / PAGE;
	low = pages / 4 * 3;
	want = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, file, 0);
	stored = calloc(pages, sizeof *stored);
	if (want == MAP_FAILED || !stored || memory(low * PAGE, &piece[0], uffd) || memory((pages - low) * PAGE, &piece[1], uffd))
		return 2;
	int conn = hand_over(argv[1], uffd, strcmp(how, "late") == 0);
	if (conn < 0) {
		printf("cannot hand over: %s\n", strerror(errno));
		return 1;
	}
	for (unsigned k = 0; k < CPUS; k++)
		pthread_create(&t[k], NULL, processor, (void *)(uintptr_t)k);
	pthread_create(&t[CPUS], NULL, balloon, NULL);
	if (strcmp(how, "die") == 0) {
		while (atomic_load(&reads) < 100)
			usleep(1000);
		kill(getpid(), SIGKILL);
	}
	for (unsigned k = 0; k <= CPUS; k++)
		pthread_join(t[k], NULL);
	for (size_t k = 0; k < pages; k++) /* in the end everything once more */
		if (k % 4 < 2)
			look(k);
		else if (k % 4 == 2)
			store(k, (unsigned)(k / 4 % CPUS));
	printf("restored %zu pages; %lu were looked at, %lu stored to, %lu given back: all right\n", pages, reads, stores, ballooned);
	fflush(stdout);
	if (strcmp(how, "hold") == 0) {
		puts("holding");
		fflush(stdout);
		(void)!read(0, &end, 1);
	}
	return 0;
}
