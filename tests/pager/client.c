/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A program that hands memory over and then does what it is told on standard input, a line each, with a line as answer. The
 * formats other than farpage's are written out here, by hand, as the programs that they come from write them.
 *
 * client SOCKET BYTES HOW [OFFSET [blocking]]
 *     HOW  farpage, pieces (three, out of order), writable-async, writable-sync, writable-hash; go (and closes the
 *          connection), go-twice (the userfaultfd in both places); firecracker; unregistered, nowhere, no-api: bad ones
 */
#define _GNU_SOURCE
#include <farpage.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096u
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15)
#endif
#define FEATURE_POISON (1 << 14)

static const char *how;
static char *memory;
static size_t bytes;
static uint64_t offset;
static int uffd, conn;
static uint64_t features; /* of the kernel */
static sigjmp_buf bus;

static void say(const char *text)
{
	puts(text);
	fflush(stdout);
}

static void on_bus(int sig)
{
	(void)sig;
	siglongjmp(bus, 1);
}

static int connect_to(const char *path)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(sun.sun_path, sizeof sun.sun_path, "%s", path);
	return fd < 0 || connect(fd, (struct sockaddr *)&sun, sizeof sun) ? -1 : fd;
}

static int open_uffd(uint64_t want, bool ready)
{
	struct uffdio_api all = { .api = UFFD_API }, api = { .api = UFFD_API, .features = want };
	int probe = (int)syscall(SYS_userfaultfd, O_CLOEXEC), fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	if (probe < 0 || fd < 0) {
		printf("skipped: userfaultfd: %s\n", strerror(errno));
		exit(0);
	}
	if (ioctl(probe, UFFDIO_API, &all) == 0)
		features = all.features;
	close(probe);
	if ((want & features) != want) {
		printf("skipped: this kernel has not the features %#" PRIx64 "\n", (uint64_t)(want & ~features));
		exit(0);
	}
	if (ready && ioctl(fd, UFFDIO_API, &api))
		exit(2);
	return fd;
}

static void register_memory(char *p, size_t len, uint64_t mode)
{
	struct uffdio_register reg = { .range = { (uintptr_t)p, len }, .mode = mode };

	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		exit(3);
}

static void send_fds(const void *buf, size_t n, const int *fd, size_t fds)
{
	char control[CMSG_SPACE(2 * sizeof(int))] __attribute__((aligned(8))) = { 0 };
	struct iovec iov = { (void *)(uintptr_t)buf, n };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = CMSG_SPACE(fds * sizeof(int)) };
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(fds * sizeof(int));
	memcpy(CMSG_DATA(c), fd, fds * sizeof(int));
	if (sendmsg(conn, &m, 0) != (ssize_t)n)
		exit(4);
}

static void send_go(void)
{
	unsigned char addr[8];
	int fd[2] = { strcmp(how, "go-twice") ? 0 : uffd, uffd };

	for (int k = 0; k < 8; k++)
		addr[k] = (unsigned char)((uintptr_t)memory >> (56 - 8 * k));
	if (write(conn, addr, 8) != 8)
		exit(4);
	send_fds("", 1, fd, 2);
	close(conn); /* as Go programs do */
	conn = -1;
}

static void send_firecracker(void)
{
	char json[200];
	int n = snprintf(json, sizeof json, "[{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%zu,\"offset\":%" PRIu64 ",\"page_size_kib\":4096}]",
			 (uint64_t)(uintptr_t)memory, bytes, offset);

	send_fds(json, (size_t)n, &uffd, 1);
}

/* 0, or it has said why not. */
static int send_ours(void)
{
	struct far_handover_range r[3] = { { (uintptr_t)memory, bytes, offset } };
	struct far_handover h = FAR_HANDOVER_INIT;
	struct far_error err = { 0 };

	h.uffd = uffd;
	h.range = r;
	h.n = 1;
	if (strcmp(how, "pieces") == 0) { /* the last third first */
		size_t third = bytes / 3 / PAGE * PAGE;
		r[0] = (struct far_handover_range){ (uintptr_t)memory + 2 * third, bytes - 2 * third, 2 * third };
		r[1] = (struct far_handover_range){ (uintptr_t)memory, third, 0 };
		r[2] = (struct far_handover_range){ (uintptr_t)memory + third, third, third };
		h.n = 3;
	}
	if (strcmp(how, "nowhere") == 0)
		r[0].addr = 0x10000;
	h.writable = strncmp(how, "writable", 8) == 0;
	h.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	h.mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	h.process = (int)syscall(SYS_pidfd_open, getpid(), 0);
	int e = far_uffd_send(conn, &h, &err);
	close(h.pagemap);
	close(h.mem);
	close(h.process);
	if (e)
		say(err.text);
	return e;
}

/* One byte, and the answer: 24 bytes and perhaps a sentence. */
static void flush_now(bool last)
{
	unsigned char a[500];

	if (last ? shutdown(conn, SHUT_WR) : write(conn, "F", 1) != 1)
		say("cannot ask");
	else if (recv(conn, a, 24, MSG_WAITALL) != 24 || memcmp(a, "FARUFFD!", 8))
		say("no answer");
	else
		say(a[16] | a[17] << 8 ? "failed" : "flushed");
}

static void check(uint64_t at, uint64_t len, bool zero)
{
	if (sigsetjmp(bus, 1)) {
		say("SIGBUS");
		return;
	}
	for (uint64_t k = at; k < at + len; k += zero ? 1 : 8) {
		uint64_t word = 0;
		if (zero)
			word = (unsigned char)memory[k];
		else
			memcpy(&word, memory + k, 8);
		if (word != (zero ? 0 : k + offset)) {
			printf("wrong at %" PRIu64 ": %#" PRIx64 "\n", k, word);
			fflush(stdout);
			return;
		}
	}
	say("right");
}

static _Atomic uint64_t tried = UINT64_MAX;

static void *try_cb(void *arg)
{
	uint64_t word;

	memcpy(&word, (char *)arg, 8);
	atomic_store(&tried, word);
	return NULL;
}

static void tried_is(uint64_t want)
{
	for (int k = 0; k < 6000 && atomic_load(&tried) == UINT64_MAX; k++)
		usleep(10000);
	say(atomic_load(&tried) == want ? "right" : "wrong");
}

static void *block_cb(void *arg)
{
	(void)arg;
	for (int k = 0; k < 2000; k++) {
		fcntl(uffd, F_SETFL, 0);
		usleep(500);
	}
	return NULL;
}

static void obey(const char *socket_path)
{
	static uint64_t where;
	uint64_t a, b;
	char line[200];
	pthread_t t;

	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "check %" SCNu64 " %" SCNu64, &a, &b) == 2) {
			check(a, b, false);
		} else if (sscanf(line, "zero %" SCNu64 " %" SCNu64, &a, &b) == 2) {
			check(a, b, true);
		} else if (sscanf(line, "store %" SCNu64 " %" SCNu64, &a, &b) == 2) {
			memcpy(memory + a, &b, 8);
			say("stored");
		} else if (sscanf(line, "try %" SCNu64, &a) == 1) {
			where = a;
			pthread_create(&t, NULL, try_cb, memory + a);
			usleep(300000); /* that it waits cannot be seen otherwise than by waiting */
			say(atomic_load(&tried) == UINT64_MAX ? "waits" : "does not wait");
		} else if (strcmp(line, "tried\n") == 0) {
			tried_is(where + offset);
		} else if (strcmp(line, "again\n") == 0) {
			close(conn);
			conn = connect_to(socket_path);
			if (send_ours() == 0)
				say("ready");
		} else if (sscanf(line, "drop %" SCNu64 " %" SCNu64, &a, &b) == 2) {
			say(madvise(memory + a, b, MADV_DONTNEED) ? "cannot" : "dropped");
		} else if (strcmp(line, "block\n") == 0) {
			say(fcntl(uffd, F_SETFL, 0) ? "cannot" : "blocking");
		} else if (strcmp(line, "flush\n") == 0) {
			flush_now(false);
		} else if (strcmp(line, "last\n") == 0) {
			flush_now(true);
		} else if (strcmp(line, "feature poison\n") == 0) {
			say(features & FEATURE_POISON ? "yes" : "no");
		} else {
			say("what?");
		}
	}
}

int main(int argc, char **argv)
{
	uint64_t want = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP, mode = UFFDIO_REGISTER_MODE_MISSING;

	if (argc < 4)
		return 2;
	bytes = strtoull(argv[2], NULL, 0);
	how = argv[3];
	offset = argc > 4 ? strtoull(argv[4], NULL, 0) : 0;
	if (strncmp(how, "go", 2) == 0)
		want = 0;
	if (strcmp(how, "writable-async") == 0)
		want |= UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_ASYNC;
	if (strcmp(how, "writable-sync") == 0)
		want |= UFFD_FEATURE_PAGEFAULT_FLAG_WP;
	if (want & UFFD_FEATURE_PAGEFAULT_FLAG_WP)
		mode |= UFFDIO_REGISTER_MODE_WP;
	signal(SIGBUS, on_bus);
	uffd = open_uffd(want, strcmp(how, "no-api"));
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (strcmp(how, "unregistered") && strcmp(how, "no-api"))
		register_memory(memory, bytes, mode);
	conn = connect_to(argv[1]);
	if (conn < 0) {
		say("cannot connect");
		return 1;
	}
	if (strncmp(how, "go", 2) == 0)
		send_go();
	else if (strcmp(how, "firecracker") == 0)
		send_firecracker();
	else if (send_ours())
		return 1;
	if (argc > 5) { /* again and again, while it is served */
		pthread_t t;
		pthread_create(&t, NULL, block_cb, NULL);
	}
	say("ready");
	obey(argv[1]);
	return 0;
}
