/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A stranger's client (grpcio, from the installed .proto files) on our server. */
#define _GNU_SOURCE
#include "peer.h"

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#define PYTHON "/usr/bin/python3"
#define SKIP 77

extern char **environ;

static int run(const char *const *argv)
{
	pid_t pid;
	int status;

	if (posix_spawn(&pid, argv[0], NULL, NULL, (char **)argv, environ) || waitpid(pid, &status, 0) != pid)
		return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int main(int argc, char **argv)
{
	const char *probe[] = { PYTHON, "-c", "import grpc, grpc_tools", NULL };
	struct far_backend *mem;
	struct far_server *s;
	struct far_error err = { .code = 0 };
	char *uri, data[6] = "";

	if (argc != 3) {
		fprintf(stderr, "usage: %s CLIENT.PY PROTO-DIRECTORY\n", argv[0]);
		return 2;
	}
	if (run(probe)) {
		puts("skip: python3-grpcio or python3-grpc-tools is missing");
		return SKIP;
	}
	if (far_open("mem:4000001", NULL, &mem, &err) || far_server_new(NULL, &s, &err) ||
	    far_server_export(s, "disk", mem, &err) || far_server_listen(s, "grpc://127.0.0.1:0", &uri, &err)) {
		fprintf(stderr, "%s\n", err.text);
		return 1;
	}
	const char *client[] = { PYTHON, argv[1], uri + strlen("grpc://"), argv[2], NULL };
	int r = run(client);
	/* What it wrote is here. */
	if (r == 0 && (far_read(mem, 0, data, 5, 0) || strcmp(data, "plain"))) {
		fprintf(stderr, "the client's write did not arrive\n");
		r = 1;
	}
	far_server_stop(s);
	far_server_free(s);
	far_close(mem);
	free(uri);
	return r ? 1 : 0;
}
