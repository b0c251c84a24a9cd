/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "base/io.h"

#include <string.h>
#include <sys/uio.h>
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
