/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Shared memory in huge pages without anything that an administrator would have to set up. A tmpfs decides for itself
 * whether it uses huge pages, so we make one of our own; it needs no place in the file tree and goes away with the last
 * descriptor. Making one needs CAP_SYS_ADMIN, which anybody has inside a user namespace of his own: a short-lived child
 * enters one, makes the file, and leaves the descriptor in the table that it shares with us. That child is a copy of a
 * program with threads, so it makes system calls only. It ends without a signal: the program's wait(2) does not see it.
 */
#define _GNU_SOURCE
#include "frontend/uffd.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SYS_fsopen
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#endif
#define HUGEMEM_SET_STRING 1 /* FSCONFIG_SET_STRING */
#define HUGEMEM_CREATE 6     /* FSCONFIG_CMD_CREATE */
#define HUGEMEM_CLOEXEC 1    /* FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC */
#define HUGEMEM_PAGE (2 * FAR_MIB)

static int hugemem_set(int fs, const char *key, const char *value)
{
	return syscall(SYS_fsconfig, fs, HUGEMEM_SET_STRING, key, value, 0) ? -errno : 0;
}

/* A file on a new tmpfs. Only system calls. */
static int hugemem_tmpfs(uint64_t len, int *fd)
{
	int fs = (int)syscall(SYS_fsopen, "tmpfs", HUGEMEM_CLOEXEC), mnt = -1, f = -1, r;

	if (fs < 0)
		return -errno;
	r = hugemem_set(fs, "huge", "always");
	if (r == 0)
		r = hugemem_set(fs, "size", "0"); /* no limit but the machine's */
	if (r == 0)
		r = hugemem_set(fs, "mode", "0700");
	if (r == 0 && syscall(SYS_fsconfig, fs, HUGEMEM_CREATE, NULL, NULL, 0))
		r = -errno;
	if (r == 0) {
		mnt = (int)syscall(SYS_fsmount, fs, HUGEMEM_CLOEXEC, 0);
		r = mnt < 0 ? -errno : 0;
	}
	if (r == 0) {
		f = openat(mnt, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
		r = f < 0 || ftruncate(f, (off_t)len) ? -errno : 0;
	}
	if (mnt >= 0)
		close(mnt);
	close(fs);
	if (r && f >= 0)
		close(f);
	if (r == 0)
		*fd = f;
	return r;
}

static int hugemem_put(const char *path, const char *text, size_t n)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC), r;

	if (fd < 0)
		return -errno;
	r = write(fd, text, n) == (ssize_t)n ? 0 : -EIO;
	close(fd);
	return r;
}

/* The child's life: its exit code says how far it came, the descriptor's number is left in shared memory. */
static _Noreturn void hugemem_child(uint64_t len, const char *uid_map, const char *gid_map, int *shared)
{
	int fd = -1, r = unshare(CLONE_NEWUSER | CLONE_NEWNS) ? -errno : 0;

	if (r == 0)
		r = hugemem_put("/proc/self/setgroups", "deny", 4);
	if (r == 0)
		r = hugemem_put("/proc/self/uid_map", uid_map, strlen(uid_map));
	if (r == 0)
		r = hugemem_put("/proc/self/gid_map", gid_map, strlen(gid_map));
	if (r == 0)
		r = hugemem_tmpfs(len, &fd);
	*shared = r ? r : fd;
	_exit(0);
}

static int hugemem_namespace(uint64_t len, int *fd)
{
	char uid_map[32], gid_map[32];
	int *shared = mmap(NULL, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int got, status;
	pid_t pid;

	if (shared == MAP_FAILED)
		return -errno;
	*shared = -ECHILD;
	snprintf(uid_map, sizeof uid_map, "0 %u 1", (unsigned)geteuid());
	snprintf(gid_map, sizeof gid_map, "0 %u 1", (unsigned)getegid());
	pid = (pid_t)syscall(SYS_clone, CLONE_FILES, NULL, NULL, NULL, NULL);
	if (pid == 0)
		hugemem_child(len, uid_map, gid_map, shared);
	got = pid < 0 ? -errno : 0;
	while (got == 0 && waitpid(pid, &status, __WCLONE) < 0)
		if (errno != EINTR)
			got = -errno;
	if (got == 0)
		got = *shared;
	munmap(shared, (size_t)sysconf(_SC_PAGESIZE));
	if (got < 0)
		return got;
	*fd = got;
	return 0;
}

/* Whether memfd_create(2) gives huge pages here, at least to who asks with MADV_HUGEPAGE. */
static bool hugemem_memfd_works(void)
{
	char text[128];
	int fd = open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);

	far_fd_close(&fd);
	if (n <= 0)
		return false;
	text[n] = '\0';
	return !strstr(text, "[never]") && !strstr(text, "[deny]");
}

int far_hugemem_open(uint64_t len, int *fd)
{
	uint64_t rounded = far_div_up(len, HUGEMEM_PAGE) * HUGEMEM_PAGE;
	int f = -1, r;

	if (len > FAR_SIZE_MAX - HUGEMEM_PAGE || access("/sys/kernel/mm/transparent_hugepage", F_OK))
		return -EOPNOTSUPP;
	r = hugemem_tmpfs(rounded, &f);
	if (r)
		r = hugemem_namespace(rounded, &f);
	if (r && hugemem_memfd_works()) {
		f = memfd_create("farpage", MFD_CLOEXEC);
		r = f < 0 || ftruncate(f, (off_t)rounded) ? -errno : 0;
		if (r)
			far_fd_close(&f);
	}
	if (r)
		return -EOPNOTSUPP;
	*fd = f;
	return 0;
}
