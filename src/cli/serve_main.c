/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage-serve: the child of a program that uses the library's file face (mount/child.c); not for people. It is the
 * verb `mount` with a socket to the program: see struct mount_parent. */
#include "cli/cli.h"
#include "cli/mount_loop.h"

#include <stdlib.h>
#include <string.h>

static const char *serve_value(const char *arg, const char *key)
{
	size_t n = strlen(key);
	return strncmp(arg, key, n) == 0 ? arg + n : NULL;
}

int main(int argc, char **argv)
{
	struct mount_parent p = { .life_fd = -1, .backend_fd = -1, .memory_fd = -1 };
	const char *v;
	int k = 1;

	for (; k < argc && argv[k][0] == '-'; k++) {
		if ((v = serve_value(argv[k], "--life=")))
			p.life_fd = atoi(v);
		else if ((v = serve_value(argv[k], "--backend=")))
			p.backend_fd = atoi(v);
		else if ((v = serve_value(argv[k], "--memory=")))
			p.memory_fd = atoi(v);
		else if ((v = serve_value(argv[k], "--hooks=")))
			p.hooks = v;
	}
	if (p.life_fd < 0 || k >= argc || strcmp(argv[k], "mount") != 0) {
		cli_say("farpage-serve is started by programs that use the library. Use 'farpage mount'");
		return CLI_USAGE;
	}
	return mount_for_parent(argc - k, argv + k, &p);
}
