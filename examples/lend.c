/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The other side of example-pager and `farpage page`: a program that hands memory of its own over, then uses it. It says
 * whether every 8 bytes hold their own offset, which is what `pattern:` has, or a sum.  Usage: lend SOCKET BYTES [OFFSET] */
#include <farpage.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static int connect_to(const char *path)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(sun.sun_path, sizeof sun.sun_path, "%s", path);
	return fd < 0 || connect(fd, (struct sockaddr *)&sun, sizeof sun) ? -1 : fd;
}

/* Memory whose absent pages wait for whoever has the descriptor. */
static int make_memory(size_t len, char **out)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	char *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct uffdio_register reg = { .range = { (uintptr_t)p, len }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	if (fd < 0 || p == MAP_FAILED || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg))
		return -1;
	*out = p;
	return fd;
}

int main(int argc, char **argv)
{
	size_t len = argc > 2 ? strtoull(argv[2], NULL, 0) : 0;
	uint64_t off = argc > 3 ? strtoull(argv[3], NULL, 0) : 0, sum = 0, right = 0;
	struct far_handover h = FAR_HANDOVER_INIT;
	struct far_error err = { 0 };
	char *p;

	if (argc < 3)
		return 2;
	int fd = connect_to(argv[1]);
	h.uffd = make_memory(len, &p);
	if (fd < 0 || h.uffd < 0) {
		fprintf(stderr, "cannot lend memory over %s: %s\n", argv[1], strerror(errno));
		return 1;
	}
	struct far_handover_range range = { .addr = (uintptr_t)p, .len = len, .off = off };
	h.range = &range;
	h.n = 1;
	h.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	h.mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
	h.process = (int)syscall(SYS_pidfd_open, getpid(), 0);
	if (far_uffd_send(fd, &h, &err)) {
		fprintf(stderr, "%s\n", err.text);
		return 1;
	}
	/* h.uffd stays open: when its last copy is closed the kernel fills what is absent with zeros. */
	for (size_t at = 0; at + 8 <= len; at += 8) {
		uint64_t word;
		memcpy(&word, p + at, 8);
		right += word == off + at; /* on a little-endian machine */
		sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
	}
	if (right == len / 8)
		printf("all %zu bytes hold their own offset\n", len);
	else
		printf("sum %016llx\n", (unsigned long long)sum);
	return 0;
}
