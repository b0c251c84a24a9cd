/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The NBD client over servers that are not ours: nbdkit's memory, with and without what a server may lack. */
#define _GNU_SOURCE
#include "contract.h"

#include "base/clock.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define NBDKIT "/usr/bin/nbdkit"
#define PATIENCE (20 * FAR_SEC)

struct nbdkit {
	pid_t pid;
	char socket[300], pid_file[300];
};

static const char *nbd_lacks(const struct contract_subject *s)
{
	return access(NBDKIT, X_OK) ? "nbdkit is not installed" : NULL;
}

static void nbd_close(void *ctx)
{
	struct nbdkit *k = ctx;

	kill(k->pid, SIGTERM);
	while (waitpid(k->pid, NULL, 0) < 0 && errno == EINTR)
		;
	unlink(k->socket);
	unlink(k->pid_file);
	free(k);
}

/* layers: what comes before the plugin's name on nbdkit's command line. */
static int nbd_start(struct nbdkit *k, const struct contract_subject *s, const char *dir, uint64_t bytes)
{
	char size[32];
	const char *argv[20] = { NBDKIT, "-f", "-U", k->socket, "-P", k->pid_file };
	int n = 6;

	snprintf(k->socket, sizeof k->socket, "%s/nbdkit.sock", dir);
	snprintf(k->pid_file, sizeof k->pid_file, "%s/nbdkit.pid", dir);
	snprintf(size, sizeof size, "%" PRIu64, bytes);
	for (size_t i = 0; i < FAR_ARRAY_LEN(s->layers) && s->layers[i] && s->layers[i][0] == '-'; i++)
		argv[n++] = s->layers[i];
	argv[n++] = "memory";
	argv[n++] = size;
	for (size_t i = 0; i < FAR_ARRAY_LEN(s->layers) && s->layers[i]; i++)
		if (s->layers[i][0] != '-')
			argv[n++] = s->layers[i];
	k->pid = fork();
	if (k->pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGTERM);
		int null = open("/dev/null", O_WRONLY);
		dup2(null, 1);
		execv(NBDKIT, (char **)argv);
		_exit(127);
	}
	struct stat st;
	for (uint64_t end = far_now() + PATIENCE; stat(k->pid_file, &st) || !st.st_size;) {
		if (k->pid < 0 || waitpid(k->pid, NULL, WNOHANG) || far_now() > end)
			return -ENOENT;
		far_sleep_until(far_now() + FAR_MSEC, false);
	}
	return 0;
}

static int nbd_open(const struct contract_subject *s, const char *dir, uint64_t bytes, const struct far_open_opts *opts,
		    struct far_backend **b, void **ctx)
{
	struct nbdkit *k = calloc(1, sizeof *k);
	struct far_error err = { .text = "" };
	char uri[600];

	if (!k)
		return -ENOMEM;
	int r = nbd_start(k, s, dir, bytes);
	if (r) {
		fprintf(stderr, "nbdkit does not start\n");
		free(k);
		return r;
	}
	snprintf(uri, sizeof uri, s->uri, k->socket);
	r = far_open(uri, opts, b, &err);
	if (r) {
		fprintf(stderr, "%s\n", err.text);
		nbd_close(k);
		return r;
	}
	*ctx = k;
	return 0;
}

#define NBD(n, f, u, ...) \
	{ .name = n, .open = nbd_open, .close = nbd_close, .lacks = nbd_lacks, .uri = u, .layers = { __VA_ARGS__ }, .flags = f }

const struct contract_subject contract_nbd[] = {
	NBD("nbd", CONTRACT_SLOW | CONTRACT_SPARSE, "nbd+unix:///?socket=%s", NULL),
	NBD("nbd-single", CONTRACT_SLOW | CONTRACT_SPARSE, "nbd+unix:///?socket=%s&connections=1&max-request=4096", NULL),
	/* No structured replies, so no extents; no zeroing; one connection only. */
	NBD("nbd-bare", CONTRACT_SLOW, "nbd+unix:///?socket=%s", "--no-sr", "--filter=nozero", "--filter=multi-conn",
	    "multi-conn-mode=disable"),
	{ .name = NULL },
};
