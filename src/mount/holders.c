/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "mount/holders.h"

#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool holders_fd(const char *pid, const char *path)
{
	char dir[64], link[512], to[PATH_MAX];
	struct dirent *e;
	bool found = false;

	snprintf(dir, sizeof dir, "/proc/%.20s/fd", pid);
	DIR *d = opendir(dir);
	while (d && !found && (e = readdir(d))) {
		snprintf(link, sizeof link, "%s/%s", dir, e->d_name);
		ssize_t n = readlink(link, to, sizeof to - 1);
		if (n > 0) {
			to[n] = 0;
			found = strcmp(to, path) == 0;
		}
	}
	if (d)
		closedir(d);
	return found;
}

static bool holders_map(const char *pid, const char *path)
{
	char name[64], *line = NULL;
	size_t cap = 0, len = strlen(path);
	bool found = false;
	ssize_t n;

	snprintf(name, sizeof name, "/proc/%.20s/maps", pid);
	FILE *f = fopen(name, "re");
	while (f && !found && (n = getline(&line, &cap, f)) > 0) {
		if (line[n - 1] == '\n')
			line[--n] = 0;
		found = (size_t)n > len && strcmp(line + (size_t)n - len, path) == 0;
	}
	free(line);
	if (f)
		fclose(f);
	return found;
}

void far_holders(const char *path, char *out, size_t len)
{
	DIR *d = opendir("/proc");
	struct dirent *e;
	size_t at = 0;

	if (len)
		out[0] = 0;
	while (d && (e = readdir(d))) {
		char name[64], comm[32] = "?";

		if (e->d_name[0] < '0' || e->d_name[0] > '9' ||
		    (!holders_fd(e->d_name, path) && !holders_map(e->d_name, path)))
			continue;
		snprintf(name, sizeof name, "/proc/%.20s/comm", e->d_name);
		FILE *f = fopen(name, "re");
		if (f && fgets(comm, sizeof comm, f))
			comm[strcspn(comm, "\n")] = 0;
		if (f)
			fclose(f);
		int n = snprintf(out + at, len - at, "%s%s (%.20s)", at ? ", " : "", comm, e->d_name);
		if (n < 0 || (size_t)n >= len - at)
			break;
		at += (size_t)n;
	}
	if (d)
		closedir(d);
}
