/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Files: full transfers, EINTR handled. The only way to reach a file's data, so that a test can record or break it. */
#ifndef FAR_IO_H
#define FAR_IO_H

#include "base/base.h"

/* 0 or -errno; -ENODATA when the file ends before len. flags: FAR_NOWAIT (preadv2 RWF_NOWAIT: -EAGAIN). */
int far_io_pread(int fd, uint64_t off, void *buf, size_t len, unsigned flags);
int far_io_pwrite(int fd, uint64_t off, const void *buf, size_t len, unsigned flags);
int far_io_fdatasync(int fd);
/* Descriptors of streams. -ENODATA at the end before len. */
int far_io_read(int fd, void *buf, size_t len);
int far_io_write(int fd, const void *buf, size_t len);
/* Read as much as there is up to len; *got < len only at the end. */
int far_io_read_some(int fd, void *buf, size_t len, size_t *got);

/* Whether all len bytes are zero; any alignment. */
bool far_is_zero(const void *buf, size_t len);

#endif
