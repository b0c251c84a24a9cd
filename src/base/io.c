/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "base/io.h"

#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

int far_io_pread(int fd, uint64_t off, void *buf, size_t len, unsigned flags)
{
	char *p = buf;

	while (len) {
		struct iovec iov = { p, len };
		ssize_t n = (flags & FAR_NOWAIT) ? preadv2(fd, &iov, 1, (off_t)off, RWF_NOWAIT)
						 : pread(fd, p, len, (off_t)off);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && (flags & FAR_NOWAIT) && (errno == EOPNOTSUPP || errno == ENOSYS))
			return -EAGAIN;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -ENODATA;
		p += n;
		off += (uint64_t)n;
		len -= (size_t)n;
	}
	return 0;
}

int far_io_pwrite(int fd, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	const char *p = buf;

	if (flags & FAR_NOWAIT)
		return -EAGAIN; /* half a NOWAIT write could not be taken back */
	while (len) {
		ssize_t n = pwrite(fd, p, len, (off_t)off);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			return -EIO;
		p += n;
		off += (uint64_t)n;
		len -= (size_t)n;
	}
	return 0;
}

int far_io_fdatasync(int fd)
{
	int r;
	do
		r = fdatasync(fd);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int far_io_sync_parent(const char *path)
{
	char dir[PATH_MAX];
	const char *slash = strrchr(path, '/');
	size_t n = slash ? (size_t)(slash - path) : 0;

	if (n >= sizeof dir)
		return -ENAMETOOLONG;
	memcpy(dir, path, n);
	dir[n] = 0;
	int fd = open(!slash ? "." : n ? dir : "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	int r = far_io_fsync(fd);
	close(fd);
	return r == -EINVAL ? 0 : r; /* some file systems have nothing to sync there */
}

int far_io_fsync(int fd)
{
	int r;

	do
		r = fsync(fd);
	while (r < 0 && errno == EINTR);
	return r < 0 ? -errno : 0;
}

int far_io_attr_get(int fd, const char *name, void *buf, size_t cap, size_t *n)
{
	ssize_t k = fgetxattr(fd, name, buf, cap);

	*n = k > 0 ? (size_t)k : 0;
	if (k >= 0 || errno == ENODATA)
		return 0;
	return errno == ERANGE ? -ENOBUFS : errno == EPERM || errno == ENOSYS ? -EOPNOTSUPP : -errno;
}

int far_io_attr_set(int fd, const char *name, const void *buf, size_t n)
{
	if (fsetxattr(fd, name, buf, n, 0) == 0)
		return 0;
	return errno == EPERM || errno == ENOSYS ? -EOPNOTSUPP : -errno;
}

static int io_fallocate(int fd, int mode, uint64_t off, uint64_t len)
{
	int r;
	do
		r = fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len);
	while (r < 0 && errno == EINTR);
	if (!r)
		return 0;
	/* Block devices take whole sectors only and say EINVAL; old file systems say ENOSYS. */
	return errno == EINVAL || errno == ENOSYS || errno == ENODEV ? -EOPNOTSUPP : -errno;
}

int far_io_punch(int fd, uint64_t off, uint64_t len)
{
	return io_fallocate(fd, FALLOC_FL_PUNCH_HOLE, off, len);
}

int far_io_zero(int fd, uint64_t off, uint64_t len)
{
	int r = io_fallocate(fd, FALLOC_FL_ZERO_RANGE, off, len);
	return r == -EOPNOTSUPP ? far_io_punch(fd, off, len) : r;
}

int far_io_extents(int fd, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	uint64_t pos = off, end = off + len;

	for (*n = 0; pos < end && *n < max; (*n)++) {
		off_t data = lseek(fd, (off_t)pos, SEEK_DATA);
		bool hole = data < 0 ? errno == ENXIO : (uint64_t)data > pos;
		uint64_t to = end;
		if (hole && data >= 0)
			to = far_min((uint64_t)data, end);
		if (!hole) {
			/* A hole punched between the two calls gives to <= pos; "data" is never wrong. */
			off_t next = lseek(fd, (off_t)pos, SEEK_HOLE);
			if (next >= 0 && (uint64_t)next > pos)
				to = far_min((uint64_t)next, end);
		}
		out[*n] = (struct far_extent){ pos, to - pos, hole ? FAR_EXTENT_ZERO : FAR_EXTENT_DATA };
		pos = to;
	}
	return 0;
}

int far_io_read_some(int fd, void *buf, size_t len, size_t *got)
{
	*got = 0;
	while (*got < len) {
		ssize_t n = read(fd, (char *)buf + *got, len - *got);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		*got += (size_t)n;
	}
	return 0;
}

int far_io_read(int fd, void *buf, size_t len)
{
	size_t got;
	int r = far_io_read_some(fd, buf, len, &got);
	return r ? r : got < len ? -ENODATA : 0;
}

int far_io_write(int fd, const void *buf, size_t len)
{
	const char *p = buf;

	while (len) {
		ssize_t n = write(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		p += n;
		len -= (size_t)n;
	}
	return 0;
}

bool far_is_zero(const void *buf, size_t len)
{
	const unsigned char *p = buf;

	/* The first 16 bytes by hand, then the buffer against itself 16 bytes on: memcmp is the fastest loop there is. */
	for (size_t i = 0; i < len && i < 16; i++)
		if (p[i])
			return false;
	return len <= 16 || memcmp(p, p + 16, len - 16) == 0;
}
