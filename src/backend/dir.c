/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A directory with one file a chunk, named by the chunk's byte offset in decimal. Every file has the size of a whole
 * chunk, the last one padded with zeros. No file: zeros. A file of length 0 (a crash while it was made) is zeros too;
 * any other short file has lost data and is -EIO.
 *
 * At most `max_open` files are open. `slots` is the table of them, found by a hash of the chunk's index:
 *
 *     FREE -> BUSY -> OPEN          dir_get: one thread opens (and for a write makes) the file, others wait
 *     BUSY -> FREE                  dir_get: there is no such file, or it could not be opened
 *     OPEN -> FREE                  dir_evict_locked: refs == 0, the least recently used; another slot is needed
 *     OPEN -> BUSY -> FREE          dir_remove: refs == 1, a whole chunk is discarded; refs > 1 punches instead
 *
 *  1. A slot with refs > 0 is never closed under its user. With all in use the next caller waits for one.
 *  2. `idle` holds the OPEN slots with refs == 0, most recently used first.
 *  3. Each call holds one slot at a time, so waiting for a slot ends.
 *  4. A chunk that was written since it was last synced is on record: in its slot (dirty), or in `evicted` when the slot
 *     was given away, or, when that list is full, through sync_all. Flush takes the whole record and syncs it; one
 *     flush at a time, so that a second one cannot answer before the first one's files are on the disk.
 *  5. A failed fsync is remembered for ever: the kernel may have dropped the pages, and the next call would say 0.
 *
 * `lock` is never held while a file is opened, read, written, synced or closed.
 */
#define _GNU_SOURCE
#include "backend/backend.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/options.h"
#include "base/pool.h"
#include "base/thread.h"
#include "base/uri.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DIR_DEFAULT_CHUNK 4096
#define DIR_META ".farpage"
#define DIR_MAX_EVICTED 65536 /* synced one by one; more are one syncfs() */
#define DIR_PROBES 4096       /* files looked at by one call of extents */
#define DIR_NO_SIZE UINT64_MAX

enum dir_state { DIR_FREE, DIR_BUSY, DIR_OPEN };

struct dir_slot {
	uint64_t index;
	int fd;
	enum dir_state state;
	unsigned refs;
	bool dirty;
	struct dir_slot *next;       /* of its hash bucket, or of the free list */
	struct dir_slot *newer, *older; /* idle list */
};

struct dir {
	/* fixed after open */
	int fd;
	uint64_t bytes, chunk;
	bool writable;
	unsigned max_open, buckets;

	struct far_mutex lock;
	struct far_cond change; /* a slot became OPEN, FREE or idle; a flush ended; stop */
	struct dir_slot *slots, **bucket FAR_GUARDED_BY(lock);
	struct dir_slot *free FAR_GUARDED_BY(lock);
	struct dir_slot *newest FAR_GUARDED_BY(lock), *oldest FAR_GUARDED_BY(lock);
	uint64_t *evicted FAR_GUARDED_BY(lock);
	size_t n_evicted FAR_GUARDED_BY(lock), max_evicted FAR_GUARDED_BY(lock);
	bool sync_all FAR_GUARDED_BY(lock);
	bool names_changed FAR_GUARDED_BY(lock);
	bool flushing FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
	int sync_error FAR_GUARDED_BY(lock);
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

static struct dir_slot **dir_bucket_locked(struct dir *d, uint64_t index) FAR_REQUIRES(&d->lock)
{
	return &d->bucket[(index * 0x9e3779b97f4a7c15 >> 32) & (d->buckets - 1)];
}

static struct dir_slot *dir_find_locked(struct dir *d, uint64_t index) FAR_REQUIRES(&d->lock)
{
	struct dir_slot *s = *dir_bucket_locked(d, index);
	while (s && s->index != index)
		s = s->next;
	return s;
}

static void dir_unhash_locked(struct dir *d, struct dir_slot *s) FAR_REQUIRES(&d->lock)
{
	struct dir_slot **p = dir_bucket_locked(d, s->index);
	while (*p != s)
		p = &(*p)->next;
	*p = s->next;
}

static void dir_free_locked(struct dir *d, struct dir_slot *s) FAR_REQUIRES(&d->lock)
{
	dir_unhash_locked(d, s);
	*s = (struct dir_slot){ .fd = -1, .next = d->free };
	d->free = s;
}

static void dir_idle_add_locked(struct dir *d, struct dir_slot *s) FAR_REQUIRES(&d->lock)
{
	s->newer = NULL;
	s->older = d->newest;
	*(s->older ? &s->older->newer : &d->oldest) = s;
	d->newest = s;
}

static void dir_idle_del_locked(struct dir *d, struct dir_slot *s) FAR_REQUIRES(&d->lock)
{
	*(s->newer ? &s->newer->older : &d->newest) = s->older;
	*(s->older ? &s->older->newer : &d->oldest) = s->newer;
	s->newer = s->older = NULL;
}

/* Put a chunk on record that must be synced by the next flush. */
static void dir_remember_locked(struct dir *d, uint64_t index) FAR_REQUIRES(&d->lock)
{
	if (d->sync_all)
		return;
	if (d->n_evicted == d->max_evicted) {
		size_t max = d->max_evicted ? d->max_evicted * 2 : 256;
		uint64_t *v = max <= DIR_MAX_EVICTED ? reallocarray(d->evicted, max, sizeof *v) : NULL;
		if (!v) {
			d->sync_all = true;
			return;
		}
		d->evicted = v;
		d->max_evicted = max;
	}
	d->evicted[d->n_evicted++] = index;
}

/* The slot that was used least recently becomes free; the descriptor that the caller must close, or -1. */
static int dir_evict_locked(struct dir *d) FAR_REQUIRES(&d->lock)
{
	struct dir_slot *s = d->oldest;
	if (!s)
		return -1;
	FAR_ASSERT(s->state == DIR_OPEN && !s->refs);
	int fd = s->fd;
	if (s->dirty)
		dir_remember_locked(d, s->index);
	dir_idle_del_locked(d, s);
	dir_free_locked(d, s);
	return fd;
}

static void dir_name(struct dir *d, uint64_t index, char name[32])
{
	snprintf(name, 32, "%" PRIu64, index * d->chunk);
}

/* A file that is made gets its full length before anyone else sees it. */
static int dir_create(struct dir *d, const char *name, int *fd)
{
	*fd = openat(d->fd, name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (*fd < 0)
		return -errno;
	if (ftruncate(*fd, (off_t)d->chunk) < 0) {
		int r = -errno;
		far_fd_close(fd);
		return r;
	}
	far_mutex_lock(&d->lock);
	d->names_changed = true;
	far_mutex_unlock(&d->lock);
	return 0;
}

static int dir_open_file(struct dir *d, uint64_t index, bool create, int *fd)
{
	struct stat st;
	char name[32];

	dir_name(d, index, name);
	*fd = openat(d->fd, name, (d->writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (*fd < 0 && errno == ENOENT && create)
		return dir_create(d, name, fd);
	if (*fd < 0)
		return -errno;
	int r = fstat(*fd, &st) < 0 ? -errno : S_ISREG(st.st_mode) ? 0 : -EIO;
	if (!r && create && (uint64_t)st.st_size < d->chunk && ftruncate(*fd, (off_t)d->chunk) < 0)
		r = -errno;
	if (r)
		far_fd_close(fd);
	return r;
}

/* A slot for `index`, BUSY and ours, or the OPEN one with one more reference. *victim must be closed by the caller. */
static int dir_claim(struct dir *d, uint64_t index, unsigned flags, struct dir_slot **out, int *victim)
{
	uint64_t deadline = far_deadline();
	int r = 0;

	*victim = -1;
	*out = NULL;
	far_mutex_lock(&d->lock);
	while (!r && !*out) {
		struct dir_slot *s = dir_find_locked(d, index);
		if (d->stopped) {
			r = -ESHUTDOWN;
		} else if (s && s->state == DIR_OPEN) {
			if (!s->refs++)
				dir_idle_del_locked(d, s);
			*out = s;
		} else if (flags & FAR_NOWAIT) {
			r = -EAGAIN;
		} else if (!s && (d->free || d->oldest)) {
			if (!d->free)
				*victim = dir_evict_locked(d);
			s = d->free;
			d->free = s->next;
			struct dir_slot **b = dir_bucket_locked(d, index);
			*s = (struct dir_slot){ .index = index, .fd = -1, .state = DIR_BUSY, .refs = 1, .next = *b };
			*b = s;
			*out = s;
		} else if (!far_cond_wait_until(&d->change, &d->lock, deadline) && far_now() >= deadline) {
			r = -ETIMEDOUT;
		}
	}
	far_mutex_unlock(&d->lock);
	return r;
}

/* The open file of a chunk, in use until dir_put(). -ENOENT: there is none (never when `create`). */
static int dir_get(struct dir *d, uint64_t index, bool create, unsigned flags, struct dir_slot **out)
{
	struct dir_slot *s;
	int victim, fd;
	int r = dir_claim(d, index, flags, &s, &victim);

	if (r)
		return r;
	far_fd_close(&victim);
	/* Ours alone while BUSY; once OPEN, state does not change while we hold a reference. */
	if (s->state == DIR_BUSY) {
		r = dir_open_file(d, index, create, &fd);
		far_mutex_lock(&d->lock);
		if (r) {
			dir_free_locked(d, s);
		} else {
			s->fd = fd;
			s->state = DIR_OPEN;
		}
		far_cond_broadcast(&d->change);
		far_mutex_unlock(&d->lock);
	}
	*out = s;
	return r;
}

static void dir_put(struct dir *d, struct dir_slot *s, bool wrote)
{
	far_mutex_lock(&d->lock);
	s->dirty |= wrote;
	if (!--s->refs) {
		dir_idle_add_locked(d, s);
		far_cond_broadcast(&d->change);
	}
	far_mutex_unlock(&d->lock);
}

static int dir_read_chunk(struct dir *d, uint64_t index, char *buf, size_t len, unsigned flags)
{
	struct dir_slot *s;
	struct stat st;

	int r = dir_get(d, index, false, flags, &s);
	if (r == -ENOENT) {
		memset(buf, 0, len);
		return 0;
	}
	if (r)
		return r;
	r = far_io_pread(s->fd, 0, buf, len, flags);
	if (r == -ENODATA) {
		r = fstat(s->fd, &st) < 0 ? -errno : st.st_size ? -EIO : 0;
		if (!r)
			memset(buf, 0, len);
	}
	dir_put(d, s, false);
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
	struct dir_slot *s;
	int r = 0;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	for (const char *p = buf; !r && len;) {
		size_t n = far_min(len, d->chunk);
		r = dir_get(d, off / d->chunk, true, flags, &s);
		if (r)
			break;
		r = far_io_pwrite(s->fd, 0, p, n, 0);
		if (!r && n < d->chunk) {
			/* A short file that a reader had opened first: the last chunk is padded all the same. */
			struct stat st;
			if (fstat(s->fd, &st) < 0 ||
			    ((uint64_t)st.st_size < d->chunk && ftruncate(s->fd, (off_t)d->chunk) < 0))
				r = -errno;
		}
		dir_put(d, s, true);
		off += n;
		p += n;
		len -= n;
	}
	return r;
}

/* ------------------------------------------------------------------------------------------------------- flush */

struct dir_record {
	uint64_t *index;
	size_t n;
	bool all, names;
};

static int dir_compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

/* Take everything that is on record; we are the one flush until dir_flush_end(). */
static int dir_flush_begin(struct dir *d, struct dir_record *rec)
{
	uint64_t deadline = far_deadline();
	int r = 0;

	far_mutex_lock(&d->lock);
	while (!r && d->flushing && !d->stopped)
		if (!far_cond_wait_until(&d->change, &d->lock, deadline) && far_now() >= deadline)
			r = -ETIMEDOUT;
	if (!r)
		r = d->stopped ? -ESHUTDOWN : d->sync_error;
	if (!r)
		rec->index = calloc(d->n_evicted + d->max_open, sizeof *rec->index);
	if (!r && !rec->index)
		r = -ENOMEM;
	if (!r) {
		d->flushing = true;
		rec->all = d->sync_all;
		rec->names = d->names_changed;
		if (d->n_evicted)
			memcpy(rec->index, d->evicted, d->n_evicted * sizeof *rec->index);
		rec->n = d->n_evicted;
		d->sync_all = d->names_changed = false;
		d->n_evicted = 0;
		for (unsigned i = 0; i < d->max_open; i++)
			if (d->slots[i].dirty) {
				d->slots[i].dirty = false;
				rec->index[rec->n++] = d->slots[i].index;
			}
	}
	far_mutex_unlock(&d->lock);
	return r;
}

static void dir_flush_end(struct dir *d, int r, bool lost)
{
	far_mutex_lock(&d->lock);
	if (r) /* nothing of the record is taken for synced */
		d->sync_all = d->names_changed = true;
	if (r && lost)
		d->sync_error = r;
	d->flushing = false;
	far_cond_broadcast(&d->change);
	far_mutex_unlock(&d->lock);
}

static int dir_sync_record(struct dir *d, struct dir_record *rec, bool *lost)
{
	int r = 0;

	if (rec->all) {
		*lost = syncfs(d->fd) < 0;
		return *lost ? -errno : 0;
	}
	qsort(rec->index, rec->n, sizeof *rec->index, dir_compare);
	for (size_t i = 0; !r && i < rec->n; i++) {
		struct dir_slot *s;
		if (i && rec->index[i] == rec->index[i - 1])
			continue;
		r = dir_get(d, rec->index[i], false, 0, &s);
		if (r == -ENOENT) { /* discarded meanwhile */
			r = 0;
			continue;
		}
		if (r)
			break;
		r = fsync(s->fd) < 0 ? -errno : 0;
		*lost = r != 0;
		dir_put(d, s, false);
	}
	if (!r && rec->names && fsync(d->fd) < 0) {
		r = -errno;
		*lost = true;
	}
	return r;
}

static int dir_flush(void *self)
{
	struct dir *d = self;
	struct dir_record rec = { 0 };
	bool lost = false;

	int r = dir_flush_begin(d, &rec);
	if (r)
		return r;
	r = dir_sync_record(d, &rec, &lost);
	dir_flush_end(d, r, lost);
	free(rec.index);
	return r;
}

/* ----------------------------------------------------------------------------------------------------- discard */

static int dir_write_zeros(struct dir *d, struct dir_slot *s)
{
	size_t n = far_min(d->chunk, FAR_MIB);
	void *zeros = far_buf_get(n);
	int r = zeros ? 0 : -ENOMEM;

	if (zeros)
		memset(zeros, 0, n);
	for (uint64_t at = 0; !r && at < d->chunk; at += n)
		r = far_io_pwrite(s->fd, at, zeros, far_min(n, d->chunk - at), 0);
	far_buf_put(zeros, n);
	return r;
}

/* Remove the file of a chunk, or punch it when somebody else is using it. */
static int dir_remove(struct dir *d, uint64_t index)
{
	struct dir_slot *s;
	char name[32];

	int r = dir_get(d, index, false, 0, &s);
	if (r)
		return r == -ENOENT ? 0 : r;
	far_mutex_lock(&d->lock);
	bool alone = s->refs == 1;
	if (alone)
		s->state = DIR_BUSY;
	far_mutex_unlock(&d->lock);
	if (!alone) {
		r = far_io_punch(s->fd, 0, d->chunk);
		if (r == -EOPNOTSUPP)
			r = dir_write_zeros(d, s);
		dir_put(d, s, true);
		return r;
	}
	dir_name(d, index, name);
	r = unlinkat(d->fd, name, 0) < 0 && errno != ENOENT ? -errno : 0;
	far_fd_close(&s->fd);
	far_mutex_lock(&d->lock);
	if (s->dirty && r)
		dir_remember_locked(d, index);
	d->names_changed = true;
	dir_free_locked(d, s);
	far_cond_broadcast(&d->change);
	far_mutex_unlock(&d->lock);
	return r;
}

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
			r = dir_remove(d, index);
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
		r = dir_remove(d, i);
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
		dir_name(d, off / d->chunk, name);
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

static void dir_stop(void *self)
{
	struct dir *d = self;

	far_mutex_lock(&d->lock);
	d->stopped = true;
	far_cond_broadcast(&d->change);
	far_mutex_unlock(&d->lock);
}

static void dir_close(void *self)
{
	struct dir *d = self;

	for (unsigned i = 0; d->slots && i < d->max_open; i++) {
		FAR_ASSERT(!d->slots[i].refs);
		far_fd_close(&d->slots[i].fd);
	}
	far_fd_close(&d->fd);
	far_cond_fini(&d->change);
	far_mutex_fini(&d->lock);
	free(d->evicted);
	free(d->bucket);
	free(d->slots);
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
	FAR_CLEANUP(far_close_cleanup) int fd = openat(d->fd, DIR_META ".new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC |
						       O_NOFOLLOW, 0600);

	if (fd < 0)
		return -errno;
	int r = far_io_write(fd, text, (size_t)n);
	if (!r)
		r = far_io_fdatasync(fd);
	if (!r && (renameat(d->fd, DIR_META ".new", d->fd, DIR_META) < 0 || fsync(d->fd) < 0))
		r = -errno;
	return r;
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

static int dir_alloc(struct dir *d)
{
	for (d->buckets = 1; d->buckets < d->max_open; d->buckets *= 2)
		;
	d->slots = calloc(d->max_open, sizeof *d->slots);
	d->bucket = calloc(d->buckets, sizeof *d->bucket);
	if (!d->slots || !d->bucket)
		return -ENOMEM;
	for (unsigned i = d->max_open; i--;) {
		d->slots[i] = (struct dir_slot){ .fd = -1, .next = d->free };
		d->free = &d->slots[i];
	}
	return 0;
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
	d->max_open = (unsigned)conf.max_open;
	if (!r && dir_alloc(d))
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
	far_mutex_init(&d->lock);
	far_cond_init(&d->change);
	d->fd = -1;
	d->writable = !opts->read_only;
	int r = dir_setup(d, u, err);
	facts.bytes = d->bytes;
	facts.chunk = d->chunk;
	if (d->writable)
		facts.caps |= FAR_CAP_WRITE;
	if (!r) {
		r = far_backend_new(&dir_ops, d, &facts, out);
		if (r)
			dir_fail(u, -r, NULL, err);
	}
	if (r)
		dir_close(d);
	return r;
}
