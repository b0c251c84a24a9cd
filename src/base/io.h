/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Files: full transfers, EINTR handled. The only way to reach a file's data, so that a test can record or break it. */
#ifndef FAR_IO_H
#define FAR_IO_H

#include "base/base.h"

/* 0 or -errno; -ENODATA when the file ends before len. flags: FAR_NOWAIT (preadv2 RWF_NOWAIT: -EAGAIN). */
int far_io_pread(int fd, uint64_t off, void *buf, size_t len, unsigned flags);
int far_io_pwrite(int fd, uint64_t off, const void *buf, size_t len, unsigned flags);
/* After a file was made: its name is durable as well. */
int far_io_sync_parent(const char *path);
int far_io_fdatasync(int fd);
int far_io_fsync(int fd);
/* A small value that is kept beside the file and moves with it (an extended attribute), replaced as a whole; durable
 * after far_io_fsync(). *n = 0: there is none. -EOPNOTSUPP: the file system keeps none; -ENOBUFS: longer than cap. */
int far_io_attr_get(int fd, const char *name, void *buf, size_t cap, size_t *n);
int far_io_attr_set(int fd, const char *name, const void *buf, size_t n);
/* Make [off, off+len) read as zeros, the room given back (punch) or kept (zero) where the file system can do that.
 * -EOPNOTSUPP: it cannot; write zeros. Never changes the file's size. */
int far_io_punch(int fd, uint64_t off, uint64_t len);
int far_io_zero(int fd, uint64_t off, uint64_t len);
/* Holes and data of [off, off+len), as far_extents() has it; what cannot be told is data. */
int far_io_extents(int fd, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n);
/* Descriptors of streams. -ENODATA at the end before len. */
int far_io_read(int fd, void *buf, size_t len);
int far_io_write(int fd, const void *buf, size_t len);
/* Read as much as there is up to len; *got < len only at the end. */
int far_io_read_some(int fd, void *buf, size_t len, size_t *got);

/* Whether all len bytes are zero; any alignment. */
bool far_is_zero(const void *buf, size_t len);

#endif
