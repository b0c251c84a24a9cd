/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A directory with one file a chunk, named by the chunk's byte offset in decimal. Every file has the size of a whole
 * chunk, the last one padded with zeros. No file: zeros. A file of length 0 (a crash while it was made) is zeros too;
 * any other short file has lost data and is -EIO.
 */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "backend/dir_files.h"

#include "base/io.h"
#include "base/options.h"
#include "base/uri.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#define DIR_DEFAULT_CHUNK 4096
#define DIR_META ".farpage"
#define DIR_RECORD ".farpage.record"
#define DIR_PROBES 4096       /* files looked at by one call of extents */
#define DIR_NO_SIZE UINT64_MAX

struct dir {
	/* fixed after open */
	int fd;
	uint64_t bytes, chunk;
	bool writable;
	struct far_dir_files *files;
};

struct dir_conf {
	uint64_t size, chunk;
	int64_t max_open;
};

static const struct far_opt dir_options[] = {
	{ "size", FAR_OPT_SIZE, offsetof(struct dir_conf, size), 0, 0x1p63, NULL, "SIZE",
	  "size of the region; makes a missing directory" },
	{ "chunk", FAR_OPT_SIZE, offsetof(struct dir_conf, chunk), 1, 0x1p30, NULL, "SIZE", "bytes a file", "4096" },
	{ "max-open", FAR_OPT_INT, offsetof(struct dir_conf, max_open), 1, 65536, NULL, "N", "files open at once", "512" },
	FAR_OPT_END,
};

static int dir_read_chunk(struct dir *d, uint64_t index, char *buf, size_t len, unsigned flags)
{
	struct far_dir_file *s;
	struct stat st;

	int r = far_dir_files_get(d->files, index, false, flags, &s);
	if (r == -ENOENT) {
		memset(buf, 0, len);
		return 0;
	}
	if (r)
		return r;
	r = far_io_pread(far_dir_file_fd(s), 0, buf, len, flags);
	if (r == -ENODATA) {
		r = fstat(far_dir_file_fd(s), &st) < 0 ? -errno : st.st_size ? -EIO : 0;
		if (!r)
			memset(buf, 0, len);
	}
	far_dir_files_put(d->files, s, false);
	return r;
}

static int dir_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct dir *d = self;
	int r = 0;

	for (char *p = buf; !r && len;) {
		size_t n = far_min(len, d->chunk);
		r = dir_read_chunk(d, off / d->chunk, p, n, flags);
		off += n;
		p += n;
		len -= n;
	}
	return r;
}

static int dir_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct dir *d = self;
	struct far_dir_file *s;
	int r = 0;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	for (const char *p = buf; !r && len;) {
		size_t n = far_min(len, d->chunk);
		r = far_dir_files_get(d->files, off / d->chunk, true, flags, &s);
		if (r)
			break;
		r = far_io_pwrite(far_dir_file_fd(s), 0, p, n, 0);
		if (!r && n < d->chunk) {
			/* A short file that a reader had opened first: the last chunk is padded all the same. */
			struct stat st;
			if (fstat(far_dir_file_fd(s), &st) < 0 ||
			    ((uint64_t)st.st_size < d->chunk && ftruncate(far_dir_file_fd(s), (off_t)d->chunk) < 0))
				r = -errno;
		}
		far_dir_files_put(d->files, s, true);
		off += n;
		p += n;
		len -= n;
	}
	return r;
}

/* ----------------------------------------------------------------------------------------------------- discard */

/* Whether a name is that of a chunk, and which. */
static bool dir_parse_name(struct dir *d, const char *name, uint64_t *index)
{
	uint64_t off = 0;

	if (!*name || (*name == '0' && name[1]))
		return false;
	for (; *name; name++)
		if (*name < '0' || *name > '9' || __builtin_mul_overflow(off, 10, &off) ||
		    __builtin_add_overflow(off, *name - '0', &off))
			return false;
	*index = off / d->chunk;
	return off % d->chunk == 0 && off < d->bytes;
}

/* Many chunks, few of which have files: go through the names that are there. */
static int dir_remove_listed(struct dir *d, uint64_t first, uint64_t last)
{
	uint64_t index;
	int r = 0, fd = openat(d->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *list = fd < 0 ? NULL : fdopendir(fd);

	if (!list) {
		r = -errno;
		far_fd_close(&fd);
		return r;
	}
	for (struct dirent *e; !r && (errno = 0, e = readdir(list));)
		if (dir_parse_name(d, e->d_name, &index) && index >= first && index <= last)
			r = far_dir_files_remove(d->files, index);
	if (!r && errno)
		r = -errno;
	closedir(list);
	return r;
}

static int dir_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct dir *d = self;
	uint64_t first = off / d->chunk, last = (off + len - 1) / d->chunk;
	int r = 0;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	if (last - first >= DIR_PROBES)
		return dir_remove_listed(d, first, last);
	for (uint64_t i = first; !r && i <= last; i++)
		r = far_dir_files_remove(d->files, i);
	return r;
}

static int dir_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct dir *d = self;
	uint64_t end = off + len;
	struct stat st;
	char name[32];

	*n = 0;
	for (int i = 0; off < end && i < DIR_PROBES; i++) {
		uint64_t size = far_min(d->chunk, end - off);
		snprintf(name, sizeof name, "%" PRIu64, off);
		int r = fstatat(d->fd, name, &st, AT_SYMLINK_NOFOLLOW) < 0 ? -errno : 0;
		if (r && r != -ENOENT)
			return r;
		enum far_extent_kind kind = r || !st.st_size ? FAR_EXTENT_ZERO : FAR_EXTENT_DATA;
		if (*n && out[*n - 1].kind == kind)
			out[*n - 1].len += size;
		else if (*n < max)
			out[(*n)++] = (struct far_extent){ off, size, kind };
		else
			break;
		off += size;
	}
	return 0;
}

static int dir_flush(void *self)
{
	struct dir *d = self;
	return far_dir_files_flush(d->files);
}

/* A small file with a new content, whole in any case; its name is durable when the directory is synced. */
static int dir_replace(struct dir *d, const char *name, const char *other, const void *buf, size_t n)
{
	FAR_CLEANUP(far_close_cleanup) int fd = openat(d->fd, other, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);

	if (fd < 0)
		return -errno;
	int r = far_io_write(fd, buf, n);
	if (!r)
		r = far_io_fdatasync(fd);
	if (!r && renameat(d->fd, other, d->fd, name) < 0)
		r = -errno;
	return r;
}

/* Whoever writes records holds a lock on the directory, so that two processes never do. */
static int dir_record_write(void *self, const void *buf, size_t n)
{
	struct dir *d = self;

	if (flock(d->fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK)
		return -EBUSY;
	int r = dir_replace(d, DIR_RECORD, DIR_RECORD ".new", buf, n);
	if (!r)
		far_dir_files_renamed(d->files);
	return r;
}

static int dir_record_read(void *self, void *buf, size_t cap, size_t *n)
{
	struct dir *d = self;
	FAR_CLEANUP(far_close_cleanup) int fd = openat(d->fd, DIR_RECORD, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

	*n = 0;
	if (fd < 0)
		return errno == ENOENT ? 0 : -errno;
	return far_io_read_some(fd, buf, cap, n);
}

static void dir_stop(void *self)
{
	struct dir *d = self;
	far_dir_files_stop(d->files);
}

static void dir_close(void *self)
{
	struct dir *d = self;

	far_dir_files_close(d->files);
	far_fd_close(&d->fd);
	free(d);
}

static const struct far_ops dir_ops = {
	FAR_OPS_INIT,
	.read = dir_read,
	.write = dir_write,
	.flush = dir_flush,
	.discard = dir_discard,
	.zero = dir_discard,
	.extents = dir_extents,
	.stop = dir_stop,
	.close = dir_close,
	.record_read = dir_record_read,
	.record_write = dir_record_write,
};

/* -------------------------------------------------------------------------------------------------------- open */

static int dir_fail(const struct far_uri *u, int code, const char *why, struct far_error *err)
{
	return far_error_set(err, code, "cannot open '%.150s': %s.", u->text, why ? why : far_strerror(code));
}

/* What `.farpage` says. -ENOENT: there is none. */
static int dir_load_meta(struct dir *d, const struct far_uri *u, struct far_error *err)
{
	FAR_CLEANUP(far_close_cleanup) int fd = openat(d->fd, DIR_META, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	char text[256];
	size_t got;
	int end = 0;

	if (fd < 0)
		return errno == ENOENT ? -ENOENT : dir_fail(u, errno, NULL, err);
	int r = far_io_read_some(fd, text, sizeof text - 1, &got);
	if (r)
		return dir_fail(u, -r, NULL, err);
	text[got] = 0;
	if (sscanf(text, "farpage directory 1\nsize %" SCNu64 "\nchunk %" SCNu64 "\n%n", &d->bytes, &d->chunk, &end) != 2 ||
	    (size_t)end != got || d->bytes > FAR_SIZE_MAX || !d->chunk || d->chunk > FAR_GIB)
		return far_error_set(err, EIO, "cannot open '%.150s': its file .farpage is damaged. Remove it and give "
				     "?size= and &chunk= as they were.", u->text);
	return 0;
}

static int dir_save_meta(struct dir *d)
{
	char text[128];
	int n = snprintf(text, sizeof text, "farpage directory 1\nsize %" PRIu64 "\nchunk %" PRIu64 "\n", d->bytes, d->chunk);

	int r = dir_replace(d, DIR_META, DIR_META ".new", text, (size_t)n);
	return r ? r : far_io_fsync(d->fd);
}

static int dir_open_path(struct dir *d, const struct far_uri *u, bool create, struct far_error *err)
{
	d->fd = open(u->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (d->fd < 0 && errno == ENOENT && create) {
		if (mkdir(u->path, 0700) < 0)
			return dir_fail(u, errno, errno == ENOENT ? "the directory above it does not exist" : NULL, err);
		d->fd = open(u->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	}
	if (d->fd >= 0)
		return 0;
	return dir_fail(u, errno, errno == ENOENT ? "it does not exist. Add ?size=SIZE to create it" :
			errno == ENOTDIR ? "it is not a directory. Use file: for a file" : NULL, err);
}

static int dir_find_size(struct dir *d, const struct far_uri *u, const struct dir_conf *conf, struct far_error *err)
{
	int r = dir_load_meta(d, u, err);
	bool known = !r;

	if (r && r != -ENOENT)
		return r;
	if (!known && conf->size == DIR_NO_SIZE)
		return dir_fail(u, EINVAL, "the directory does not tell its size: add ?size=SIZE", err);
	if (known && conf->size != DIR_NO_SIZE && conf->size != d->bytes)
		return far_error_set(err, EINVAL, "cannot open '%.150s': it exists with size %" PRIu64 ", not %" PRIu64 ".",
				     u->text, d->bytes, conf->size);
	if (known && conf->chunk && conf->chunk != d->chunk)
		return far_error_set(err, EINVAL, "cannot open '%.150s': it exists with chunk %" PRIu64 ", not %" PRIu64 ".",
				     u->text, d->chunk, conf->chunk);
	if (known)
		return 0;
	d->bytes = conf->size;
	d->chunk = conf->chunk ? conf->chunk : DIR_DEFAULT_CHUNK;
	if (d->bytes > FAR_SIZE_MAX)
		return dir_fail(u, EINVAL, "a region has less than 2^63 bytes", err);
	r = d->writable ? dir_save_meta(d) : 0;
	return r ? dir_fail(u, -r, NULL, err) : 0;
}

static int dir_setup(struct dir *d, const struct far_uri *u, struct far_error *err)
{
	struct dir_conf conf = { .size = DIR_NO_SIZE, .max_open = 512 };

	int r = far_opt_parse(dir_options, &conf, u->text, u->query, '&', true, err);
	if (r)
		return r;
	if (!*u->path || *u->host)
		return dir_fail(u, EINVAL, "write dir:PATH", err);
	r = dir_open_path(d, u, conf.size != DIR_NO_SIZE && d->writable, err);
	if (!r)
		r = dir_find_size(d, u, &conf, err);
	if (!r && far_dir_files_open(d->fd, d->chunk, d->writable, (unsigned)conf.max_open, &d->files))
		r = dir_fail(u, ENOMEM, NULL, err);
	return r;
}

int far_dir_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out,
		 struct far_error *err)
{
	struct far_facts facts = { .size = sizeof facts, .caps = FAR_CAP_DURABLE };
	struct dir *d = calloc(1, sizeof *d);

	if (!d)
		return dir_fail(u, ENOMEM, NULL, err);
	d->fd = -1;
	d->writable = !opts->read_only;
	int r = dir_setup(d, u, err);
	facts.bytes = d->bytes;
	facts.chunk = d->chunk;
	if (d->writable)
		facts.caps |= FAR_CAP_WRITE;
	char record[FAR_RECORD_MAX];
	size_t n;
	if (!r && !dir_record_read(d, record, sizeof record, &n))
		far_record_facts(record, n, &facts);
	if (!r) {
		r = far_backend_new(&dir_ops, d, &facts, out);
		if (r)
			dir_fail(u, -r, NULL, err);
	}
	if (r)
		dir_close(d);
	return r;
}
