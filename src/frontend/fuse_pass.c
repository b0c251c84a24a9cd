/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Passthrough: on a read-only mount, once everything is local in a file or memory file, the kernel reads and maps that
 * itself (6.9+, root), at its full speed and without us. What was opened so cannot be taken back before it is closed:
 * far_fuse_not_local() is refused while such a handle is open.
 *
 * libfuse 3.14 does not know it. So its answer to INIT goes through our writev, which adds the flags, and the answer to
 * OPEN is our own struct. The kernel wants all handles of a file to be of one kind at a time. Our counts fall when a
 * RELEASE arrives, later than the kernel's own: an open that follows the kind we still count is always allowed.
 */
#define _GNU_SOURCE
#include "frontend/fuse_int.h"

#include <linux/fuse.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* linux/fuse.h of 6.9 */
#define FUSE_PASS_FLAG2 (1u << 5) /* FUSE_PASSTHROUGH, bit 37 of the 64 */
#define FUSE_PASS_OPEN (1u << 7)  /* FOPEN_PASSTHROUGH */
struct fuse_pass_map {
	int32_t fd;
	uint32_t flags;
	uint64_t padding;
};
#define FUSE_PASS_BACKING_OPEN _IOW(229, 1, struct fuse_pass_map)

#define FUSE_PASS_FH 2 /* in fi->fh: the handle passes through */

void far_fuse_pass_init(struct far_fuse *f, const void *request, size_t n)
{
	struct fuse_in_header h;
	struct fuse_init_in in;

	if (!f->read_only || f->changing || geteuid() != 0 || n < sizeof h + sizeof in)
		return;
	memcpy(&h, request, sizeof h);
	memcpy(&in, (const char *)request + sizeof h, sizeof in);
	f->can_pass = h.opcode == FUSE_INIT && (in.flags & FUSE_INIT_EXT) && (in.flags2 & FUSE_PASS_FLAG2);
}

ssize_t far_fuse_pass_writev(int fd, struct iovec *iov, int n, void *arg)
{
	struct far_fuse *f = arg;
	struct fuse_init_out out;

	if (!atomic_load_explicit(&f->ready, memory_order_relaxed) && f->can_pass && n == 2 &&
	    iov[1].iov_len == sizeof out) {
		memcpy(&out, iov[1].iov_base, sizeof out);
		out.flags |= FUSE_INIT_EXT;
		out.flags2 |= FUSE_PASS_FLAG2;
		out.unused[0] = 1; /* max_stack_depth: a plain file system lies under us */
		struct iovec both[2] = { iov[0], { &out, sizeof out } };
		return writev(fd, both, 2);
	}
	return writev(fd, iov, n);
}

void far_fuse_pass_offer(struct far_fuse *f)
{
	struct fuse_pass_map map = { .fd = f->share_fd };

	if (!f->can_pass || f->share_fd < 0)
		return;
	int id = ioctl(f->fd, FUSE_PASS_BACKING_OPEN, &map);
	far_log(FAR_LOG_DEBUG, "fuse[%s]: passthrough: %s", f->path, id > 0 ? "on" : far_strerror(errno));
	far_mutex_lock(&f->lock);
	if (id > 0 && !f->evicts)
		f->backing = id;
	far_mutex_unlock(&f->lock);
}

int far_fuse_pass_open(struct far_fuse *f, fuse_req_t req, struct fuse_file_info *fi)
{
	far_mutex_lock(&f->lock);
	int32_t id = f->passed || (f->backing > 0 && !f->cached) ? f->backing : 0;
	if (id > 0)
		f->passed++;
	else
		f->cached++;
	far_mutex_unlock(&f->lock);
	int r;
	if (id > 0) {
		fi->fh |= FUSE_PASS_FH;
		struct fuse_open_out out = { .fh = fi->fh, .open_flags = FUSE_PASS_OPEN, .padding = (uint32_t)id };
		r = fuse_reply_buf(req, (const char *)&out, sizeof out);
	} else {
		r = fuse_reply_open(req, fi);
	}
	if (r) /* the opener has gone: no release follows */
		far_fuse_pass_release(f, fi);
	return r;
}

void far_fuse_pass_release(struct far_fuse *f, const struct fuse_file_info *fi)
{
	far_mutex_lock(&f->lock);
	if (fi->fh & FUSE_PASS_FH)
		f->passed--;
	else
		f->cached--;
	far_mutex_unlock(&f->lock);
}
