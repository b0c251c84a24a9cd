/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A regular file or a block device. No lock: pread and pwrite of many threads go to the kernel side by side.
 *
 * With ?direct=1 there are two descriptors. Whole aligned blocks pass through the O_DIRECT one, from the caller's
 * buffer or a bounce buffer. A block that is written in part goes through the page cache, where the kernel keeps
 * concurrent writers of one block apart; reading, changing and writing it here would lose one of two updates.
 *
 * A failed fdatasync is remembered: the kernel may have dropped the dirty pages, and a second call would say 0.
 *
 * The record is an extended attribute of a regular file. fdatasync need not make it durable, so the flush after a change of
 * it is an fsync. Whoever writes records holds a lock on one byte far behind the content, so that two processes never do.
 */
#define _GNU_SOURCE
#include "backend/backend.h"

#include "base/io.h"
#include "base/options.h"
#include "base/pool.h"
#include "base/uri.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_BLOCK ((uint64_t)4096) /* a multiple of every device's logical block */
#define FILE_BOUNCE ((uint64_t)1 << 20)
#define FILE_ATTR "user.farpage"
#define FILE_LOCK_AT ((off_t)1 << 62)

struct file {
	/* fixed after open */
	int fd;
	int direct_fd; /* -1 without ?direct=1 */
	uint64_t bytes;
	bool regular;
	/* atomic: changes of the record, and how many of them an fsync has covered */
	_Atomic unsigned attr_changes, attr_synced;
	/* atomic: first failed flush, relaxed: only its own value matters */
	_Atomic int flush_error;
};

struct file_conf {
	uint64_t size;
	bool direct;
};

#define FILE_NO_SIZE UINT64_MAX

static const struct far_opt file_options[] = {
	{ "size", FAR_OPT_SIZE, offsetof(struct file_conf, size), 0, 0x1p63, NULL, "SIZE",
	  "create the file with this size; it must equal the size of one that exists" },
	{ "direct", FAR_OPT_BOOL, offsetof(struct file_conf, direct), .help = "past the page cache (O_DIRECT)" },
	FAR_OPT_END,
};

/* The file was cut by someone else: its bytes are lost, not zero. */
static int file_pread(int fd, uint64_t off, void *buf, size_t len, unsigned flags)
{
	int r = far_io_pread(fd, off, buf, len, flags);
	return r == -ENODATA ? -EIO : r;
}

static bool file_aligned(uint64_t off, const void *buf, size_t len)
{
	return (off | (uintptr_t)buf | len) % FILE_BLOCK == 0;
}

/* Read through a bounce buffer whole blocks around what is wanted, up to the end of the file. */
static int file_read_bounced(struct file *f, uint64_t off, char *buf, size_t len)
{
	char *bounce = far_buf_get(FILE_BOUNCE);
	int r = 0;

	if (!bounce)
		return -ENOMEM;
	while (!r && len) {
		uint64_t from = off - off % FILE_BLOCK;
		size_t n = far_min(len, FILE_BOUNCE - (off - from)), got = 0, need = (size_t)(off - from) + n;
		size_t ask = far_min(far_div_up(need, FILE_BLOCK) * FILE_BLOCK, FILE_BOUNCE);
		while (!r && got < need) {
			ssize_t k = pread(f->direct_fd, bounce + got, ask - got, (off_t)(from + got));
			if (k < 0 && errno == EINTR)
				continue;
			r = k < 0 ? -errno : k == 0 ? -EIO : 0;
			got += k > 0 ? (size_t)k : 0;
			if (got % FILE_BLOCK && got < need)
				r = -EIO; /* ends before the region does */
		}
		if (!r)
			memcpy(buf, bounce + (off - from), n);
		buf += n;
		off += n;
		len -= n;
	}
	far_buf_put(bounce, FILE_BOUNCE);
	return r;
}

static int file_write_bounced(struct file *f, uint64_t off, const char *buf, size_t len)
{
	char *bounce = far_buf_get(FILE_BOUNCE);
	int r = 0;

	if (!bounce)
		return -ENOMEM;
	while (!r && len) {
		size_t n = far_min(len, FILE_BOUNCE);
		memcpy(bounce, buf, n);
		r = far_io_pwrite(f->direct_fd, off, bounce, n, 0);
		buf += n;
		off += n;
		len -= n;
	}
	far_buf_put(bounce, FILE_BOUNCE);
	return r;
}

static int file_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct file *f = self;

	if (f->direct_fd < 0)
		return file_pread(f->fd, off, buf, len, flags);
	if (flags & FAR_NOWAIT)
		return -EAGAIN; /* always goes to the device */
	if (file_aligned(off, buf, len))
		return file_pread(f->direct_fd, off, buf, len, 0);
	return file_read_bounced(f, off, buf, len);
}

static int file_write_direct(struct file *f, uint64_t off, const char *buf, size_t len)
{
	uint64_t end = off + len;
	uint64_t from = far_min(far_div_up(off, FILE_BLOCK) * FILE_BLOCK, end), to = far_max(end - end % FILE_BLOCK, from);
	int r = 0;

	if (from > off)
		r = far_io_pwrite(f->fd, off, buf, from - off, 0);
	if (!r && to > from)
		r = file_aligned(from, buf + (from - off), to - from) ?
			    far_io_pwrite(f->direct_fd, from, buf + (from - off), to - from, 0) :
			    file_write_bounced(f, from, buf + (from - off), to - from);
	if (!r && end > to)
		r = far_io_pwrite(f->fd, to, buf + (to - off), end - to, 0);
	return r;
}

static int file_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct file *f = self;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	return f->direct_fd < 0 ? far_io_pwrite(f->fd, off, buf, len, 0) : file_write_direct(f, off, buf, len);
}

static int file_flush(void *self)
{
	struct file *f = self;
	int r = atomic_load_explicit(&f->flush_error, memory_order_relaxed);

	if (!r) {
		unsigned changes = atomic_load(&f->attr_changes);
		bool whole = changes != atomic_load(&f->attr_synced);
		r = whole ? far_io_fsync(f->fd) : far_io_fdatasync(f->fd);
		if (!r && whole)
			atomic_store(&f->attr_synced, changes); /* an older number only makes the next one an fsync, too */
		if (r)
			atomic_store_explicit(&f->flush_error, r, memory_order_relaxed);
	}
	return r;
}

static int file_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct file *f = self;
	return (flags & FAR_NOWAIT) ? -EAGAIN : far_io_punch(f->fd, off, len);
}

static int file_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct file *f = self;
	return (flags & FAR_NOWAIT) ? -EAGAIN : far_io_zero(f->fd, off, len);
}

static int file_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct file *f = self;
	struct stat st;

	/* Past the end of a file that was cut lies no hole but lost data. */
	if (fstat(f->fd, &st) < 0)
		return -errno;
	if (S_ISREG(st.st_mode) && (uint64_t)st.st_size < f->bytes)
		return -EIO;
	return far_io_extents(f->fd, off, len, out, max, n);
}

static int file_share(void *self, int *fd)
{
	struct file *f = self;
	*fd = f->fd;
	return 0;
}

static int file_record_read(void *self, void *buf, size_t cap, size_t *n)
{
	struct file *f = self;
	return f->regular ? far_io_attr_get(f->fd, FILE_ATTR, buf, cap, n) : -EOPNOTSUPP;
}

/* The lock belongs to the open file, not to the process: every write takes what is there already. */
static int file_record_write(void *self, const void *buf, size_t n)
{
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = FILE_LOCK_AT, .l_len = 1 };
	struct file *f = self;

	if (!f->regular)
		return -EOPNOTSUPP;
	if (fcntl(f->fd, F_OFD_SETLK, &lock) < 0 && (errno == EAGAIN || errno == EACCES))
		return -EBUSY; /* a file system without locks keeps nobody out */
	int r = far_io_attr_set(f->fd, FILE_ATTR, buf, n);
	if (!r)
		atomic_fetch_add(&f->attr_changes, 1);
	return r;
}

static int file_record_mark(void *self, uint64_t *mark)
{
	struct file *f = self;
	struct stat st;

	if (fstat(f->fd, &st) < 0)
		return -errno;
	*mark = (uint64_t)st.st_mtim.tv_sec * 1000000000 + (uint64_t)st.st_mtim.tv_nsec;
	return 0;
}

static void file_close(void *self)
{
	struct file *f = self;
	far_fd_close(&f->fd);
	far_fd_close(&f->direct_fd);
	free(f);
}

static const struct far_ops file_ops = {
	FAR_OPS_INIT,
	.read = file_read,
	.write = file_write,
	.flush = file_flush,
	.discard = file_discard,
	.zero = file_zero,
	.extents = file_extents,
	.share = file_share,
	.record_read = file_record_read,
	.record_write = file_record_write,
	.record_mark = file_record_mark,
	.close = file_close,
};

static int file_fail(const struct far_uri *u, int code, const char *why, struct far_error *err)
{
	return far_error_set(err, code, "cannot open '%.150s': %s.", u->text, why ? why : far_strerror(code));
}

/* Durable when it returns: a chunk map that is made next speaks of a file of this size. */
static int file_give_size(struct file *f, const struct far_uri *u, uint64_t size, struct far_error *err)
{
	int r = ftruncate(f->fd, (off_t)size) < 0 ? -errno : far_io_fsync(f->fd);
	return r ? file_fail(u, -r, r == -EFBIG ? "the file system takes no file of that size" : NULL, err) : 0;
}

/* Make a sparse file of the size that was asked for; one that appears meanwhile is somebody else's. */
static int file_create(struct file *f, const struct far_uri *u, uint64_t size, struct far_error *err)
{
	f->fd = open(u->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
	if (f->fd < 0)
		return file_fail(u, errno, errno == ENOENT ? "its directory does not exist; create it first" : NULL, err);
	int r = file_give_size(f, u, size, err);
	if (r) {
		unlink(u->path);
		return r;
	}
	r = far_io_sync_parent(u->path);
	return r ? file_fail(u, -r, NULL, err) : 0;
}

static int file_find_size(struct file *f, const struct far_uri *u, uint64_t want, bool grow, uint32_t *caps,
			  struct far_error *err)
{
	struct stat st;

	if (fstat(f->fd, &st) < 0)
		return file_fail(u, errno, NULL, err);
	if (S_ISDIR(st.st_mode))
		return far_error_set(err, EISDIR, "cannot open '%.150s': it is a directory. Use dir:%.150s for one file a chunk.",
				     u->text, u->path);
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
		return file_fail(u, EINVAL, "it is neither a regular file nor a block device", err);
	f->bytes = (uint64_t)st.st_size;
	if (S_ISBLK(st.st_mode) && ioctl(f->fd, BLKGETSIZE64, &f->bytes) < 0)
		return file_fail(u, errno, NULL, err);
	if (grow && S_ISREG(st.st_mode) && !st.st_size && want != FILE_NO_SIZE) {
		/* The power went out while it was made. */
		int r = file_give_size(f, u, want, err);
		if (r)
			return r;
		f->bytes = want;
	}
	if (want != FILE_NO_SIZE && want != f->bytes)
		return far_error_set(err, EINVAL,
				     "cannot open '%.150s': it exists with %" PRIu64 " bytes, not %" PRIu64
				     ". Leave ?size= out to take it as it is.", u->text, f->bytes, want);
	f->regular = S_ISREG(st.st_mode);
	if (f->regular)
		*caps |= FAR_CAP_SHARE;
	return 0;
}

static int file_open_direct(struct file *f, const struct far_uri *u, int mode, struct far_error *err)
{
	f->direct_fd = open(u->path, mode | O_DIRECT | O_CLOEXEC);
	if (f->direct_fd < 0)
		return file_fail(u, errno, errno == EINVAL ?
				 "its file system has no direct I/O; leave ?direct=1 out" : NULL, err);
	return 0;
}

static int file_no_entry(const struct far_uri *u, int code, int mode, struct far_error *err)
{
	bool readable = mode == O_RDWR && (code == EACCES || code == EROFS || code == EPERM) && !access(u->path, R_OK);
	return file_fail(u, code, readable ? "it may only be read; open it read-only" : NULL, err);
}

static int file_open(struct file *f, const struct far_uri *u, const struct far_open_opts *opts, struct far_facts *facts,
		     struct far_error *err)
{
	struct file_conf conf = { .size = FILE_NO_SIZE };
	int mode = opts->read_only ? O_RDONLY : O_RDWR;

	int r = far_opt_parse(file_options, &conf, u->text, u->query, '&', true, err);
	if (r)
		return r;
	if (!*u->path || *u->host)
		return file_fail(u, EINVAL, "write file:PATH", err);
	if (conf.size != FILE_NO_SIZE && conf.size > FAR_SIZE_MAX)
		return file_fail(u, EINVAL, "a region has less than 2^63 bytes", err);
	/* O_NONBLOCK: a FIFO must not hold us up; it means nothing to files and devices. */
	f->fd = open(u->path, mode | O_CLOEXEC | O_NONBLOCK);
	if (f->fd < 0 && errno == ENOENT && conf.size != FILE_NO_SIZE && !opts->read_only)
		r = file_create(f, u, conf.size, err);
	else if (f->fd < 0 && errno == ENOENT)
		r = file_fail(u, ENOENT, opts->read_only ? "it does not exist" :
			      "it does not exist. Add ?size=SIZE to create it", err);
	else if (f->fd < 0 && errno == EISDIR)
		r = far_error_set(err, EISDIR, "cannot open '%.150s': it is a directory. Use dir:%.150s for one file a chunk.",
				  u->text, u->path);
	else if (f->fd < 0)
		r = file_no_entry(u, errno, mode, err);
	if (r)
		return r;
	r = file_find_size(f, u, conf.size, !opts->read_only, &facts->caps, err);
	if (!r && conf.direct)
		r = file_open_direct(f, u, mode, err);
	facts->bytes = f->bytes;
	char record[FAR_RECORD_MAX];
	size_t n;
	if (!r && !file_record_read(f, record, sizeof record, &n))
		far_record_facts(record, n, facts);
	return r;
}

int far_file_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out,
		  struct far_error *err)
{
	struct far_facts facts = { .size = sizeof facts, .caps = FAR_CAP_DURABLE };
	struct file *f = calloc(1, sizeof *f);

	if (!f)
		return file_fail(u, ENOMEM, NULL, err);
	f->fd = f->direct_fd = -1;
	int r = file_open(f, u, opts, &facts, err);
	if (!opts->read_only)
		facts.caps |= FAR_CAP_WRITE;
	if (!r) {
		r = far_backend_new(&file_ops, f, &facts, out);
		if (r)
			file_fail(u, -r, NULL, err);
	}
	if (r)
		file_close(f);
	return r;
}
