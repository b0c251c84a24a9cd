/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* --run: a shell command that lives while something is mounted or served. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/wait.h>

int cli_run_start(const char *command, const char *path, const char *uri, pid_t *out)
{
	extern char **environ;
	char *argv[] = { (char *)"sh", (char *)"-c", (char *)(uintptr_t)command, NULL };
	posix_spawnattr_t attr;
	sigset_t none, defaults;

	setenv("FARPAGE", path, 1);
	setenv("FARPAGE_URI", uri, 1);
	sigemptyset(&none);
	sigemptyset(&defaults);
	sigaddset(&defaults, SIGPIPE);
	posix_spawnattr_init(&attr);
	posix_spawnattr_setsigmask(&attr, &none);
	posix_spawnattr_setsigdefault(&attr, &defaults);
	posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
	int r = posix_spawn(out, "/bin/sh", NULL, &attr, argv, environ);
	posix_spawnattr_destroy(&attr);
	if (r)
		cli_say("cannot run '%s': %s", command, far_strerror(r));
	return -r;
}

bool cli_run_ended(pid_t child, int *code)
{
	int status;

	if (child <= 0 || waitpid(child, &status, WNOHANG) != child)
		return false;
	*code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
	return true;
}
