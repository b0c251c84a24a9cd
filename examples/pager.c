/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A pager of one's own: it serves the memory of other programs, which connect to a unix socket and hand it over, from a
 * generated pattern (every 8 bytes hold their own offset), from a file, or from any URI, through layers if wanted.
 * example-lend is such a program.  Usage: pager SOCKET pattern:BYTES|URI [LAYER...]   (until standard input ends) */
#include <farpage.h>

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define MAX 64

static struct far_pager *pagers[MAX];
static atomic_bool gone[MAX]; /* its process has ended: the main loop closes it */

static int pattern_read(void *opaque, uint64_t off, void *buf, size_t len)
{
	unsigned char *p = buf;

	for (size_t i = 0; i < len; i++, off++)
		p[i] = (unsigned char)((off & ~(uint64_t)7) >> (8 * (off & 7)));
	return 0;
}

static int listen_at(const char *path)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(sun.sun_path, sizeof sun.sun_path, "%s", path);
	unlink(path);
	return fd < 0 || bind(fd, (struct sockaddr *)&sun, sizeof sun) || listen(fd, 8) ? -1 : fd;
}

static void ended(void *opaque)
{
	atomic_store((atomic_bool *)opaque, true);
}

/* One program's memory. A peer of any format, also a hostile one: what came is checked by far_uffd_receive(). */
static void serve(int fd, struct far_backend *b)
{
	struct far_mount_opts opts = FAR_MOUNT_OPTS_INIT;
	struct far_handover h = FAR_HANDOVER_INIT;
	struct far_error err = { 0 };
	int k = 0;

	if (far_uffd_receive(fd, &h, &err)) {
		fprintf(stderr, "%s\n", err.text);
		return;
	}
	while (k < MAX && pagers[k])
		k++;
	opts.read_only = true;
	int r = k == MAX ? -EUSERS : far_pager_open(&h, b, &opts, ended, &gone[k], &pagers[k], &err);
	far_uffd_accept(fd, &h, r, err.text);
	if (r)
		fprintf(stderr, "%s\n", err.text);
	far_handover_fini(&h);
}

static void forget(int k)
{
	struct far_status st = FAR_STATUS_INIT;

	far_pager_status(pagers[k], &st);
	printf("served %llu faults, %llu bytes\n", (unsigned long long)st.faults, (unsigned long long)st.local);
	fflush(stdout);
	far_pager_close(pagers[k]);
	pagers[k] = NULL;
	atomic_store(&gone[k], false);
}

int main(int argc, char **argv)
{
	struct far_error err = { 0 };
	struct far_backend *b;
	int r;

	if (argc < 3)
		return 2;
	if (strncmp(argv[2], "pattern:", 8) == 0)
		r = far_backend_from(pattern_read, NULL, strtoull(argv[2] + 8, NULL, 0), NULL, NULL, &b);
	else
		r = far_open(argv[2], NULL, &b, &err);
	for (int i = 3; !r && i < argc; i++)
		r = far_layer_open(argv[i], b, &b, &err);
	int fd = r ? -1 : listen_at(argv[1]);
	if (fd < 0) {
		fprintf(stderr, "cannot serve %s on %s: %s\n", argv[2], argv[1], r ? err.text : strerror(errno));
		return 1;
	}
	puts("listening");
	fflush(stdout);
	for (;;) {
		struct pollfd p[2] = { { .fd = fd, .events = POLLIN }, { .fd = 0, .events = POLLIN } };
		poll(p, 2, 100);
		if (p[1].revents)
			break;
		if (p[0].revents) {
			int client = accept(fd, NULL, NULL);
			serve(client, b);
			close(client);
		}
		for (int k = 0; k < MAX; k++)
			if (pagers[k] && atomic_load(&gone[k]))
				forget(k);
	}
	for (int k = 0; k < MAX; k++)
		if (pagers[k])
			forget(k);
	far_close(b);
	close(fd);
	return 0;
}
