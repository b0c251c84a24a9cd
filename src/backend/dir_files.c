/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The open files of a directory backend. At most `max_open` of them; `slots` is their table, found by a hash of the
 * chunk's index:
 *
 *     FREE -> BUSY -> OPEN          files_claim, get: one thread opens (for a write makes) the file, others wait
 *     BUSY -> FREE                  get: there is no such file, or it could not be opened
 *     OPEN -> FREE                  files_evict_locked: refs == 0, the least recently used; another slot is needed
 *     OPEN -> BUSY -> FREE          remove: refs == 1, a whole chunk is discarded; refs > 1 punches instead
 *
 *  1. A slot with refs > 0 is never closed under its user. With all in use the next caller waits for one.
 *  2. `newest` to `oldest` holds the OPEN slots with refs == 0, most recently used first.
 *  3. Each call holds one slot at a time, so waiting for a slot ends.
 *  4. A chunk that was written since it was last synced is on record: in its slot (dirty), or in `evicted` when the slot
 *     was given away, or, when that list is full, through sync_all. Flush takes the whole record and syncs it; one
 *     flush at a time, so that a second one cannot answer before the first one's files are on the disk.
 *  5. A failed fsync is remembered for ever: the kernel may have dropped the pages, and the next call would say 0.
 *
 * `lock` is never held while a file is opened, read, written, synced or closed.
 */
#define _GNU_SOURCE
#include "backend/dir_files.h"

#include "base/clock.h"
#include "base/io.h"
#include "base/pool.h"
#include "base/thread.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILES_MAX_EVICTED 65536 /* synced one by one; more are one syncfs() */

enum files_state { FILES_FREE, FILES_BUSY, FILES_OPEN };

struct far_dir_file {
	uint64_t index;
	int fd;
	enum files_state state;
	unsigned refs;
	bool dirty;
	struct far_dir_file *next;       /* of its hash bucket, or of the free list */
	struct far_dir_file *newer, *older; /* idle list */
};

struct far_dir_files {
	/* fixed after open */
	int dir;
	uint64_t chunk;
	bool writable;
	unsigned max_open, buckets;

	struct far_mutex lock;
	struct far_cond change; /* a slot became OPEN, FREE or idle; a flush ended; stop */
	struct far_dir_file *slots, **bucket FAR_GUARDED_BY(lock);
	struct far_dir_file *free FAR_GUARDED_BY(lock);
	struct far_dir_file *newest FAR_GUARDED_BY(lock), *oldest FAR_GUARDED_BY(lock);
	uint64_t *evicted FAR_GUARDED_BY(lock);
	size_t n_evicted FAR_GUARDED_BY(lock), max_evicted FAR_GUARDED_BY(lock);
	bool sync_all FAR_GUARDED_BY(lock);
	bool names_changed FAR_GUARDED_BY(lock);
	bool flushing FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
	int sync_error FAR_GUARDED_BY(lock);
};

static struct far_dir_file **files_bucket_locked(struct far_dir_files *d, uint64_t index) FAR_REQUIRES(&d->lock)
{
	return &d->bucket[(index * 0x9e3779b97f4a7c15 >> 32) & (d->buckets - 1)];
}

static struct far_dir_file *files_find_locked(struct far_dir_files *d, uint64_t index) FAR_REQUIRES(&d->lock)
{
	struct far_dir_file *s = *files_bucket_locked(d, index);
	while (s && s->index != index)
		s = s->next;
	return s;
}

static void files_unhash_locked(struct far_dir_files *d, struct far_dir_file *s) FAR_REQUIRES(&d->lock)
{
	struct far_dir_file **p = files_bucket_locked(d, s->index);
	while (*p != s)
		p = &(*p)->next;
	*p = s->next;
}

static void files_free_locked(struct far_dir_files *d, struct far_dir_file *s) FAR_REQUIRES(&d->lock)
{
	files_unhash_locked(d, s);
	*s = (struct far_dir_file){ .fd = -1, .next = d->free };
	d->free = s;
}

static void files_idle_add_locked(struct far_dir_files *d, struct far_dir_file *s) FAR_REQUIRES(&d->lock)
{
	s->newer = NULL;
	s->older = d->newest;
	*(s->older ? &s->older->newer : &d->oldest) = s;
	d->newest = s;
}

static void files_idle_del_locked(struct far_dir_files *d, struct far_dir_file *s) FAR_REQUIRES(&d->lock)
{
	*(s->newer ? &s->newer->older : &d->newest) = s->older;
	*(s->older ? &s->older->newer : &d->oldest) = s->newer;
	s->newer = s->older = NULL;
}

/* Put a chunk on record that must be synced by the next flush. */
static void files_remember_locked(struct far_dir_files *d, uint64_t index) FAR_REQUIRES(&d->lock)
{
	if (d->sync_all)
		return;
	if (d->n_evicted == d->max_evicted) {
		size_t max = d->max_evicted ? d->max_evicted * 2 : 256;
		uint64_t *v = max <= FILES_MAX_EVICTED ? reallocarray(d->evicted, max, sizeof *v) : NULL;
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
static int files_evict_locked(struct far_dir_files *d) FAR_REQUIRES(&d->lock)
{
	struct far_dir_file *s = d->oldest;
	if (!s)
		return -1;
	FAR_ASSERT(s->state == FILES_OPEN && !s->refs);
	int fd = s->fd;
	if (s->dirty)
		files_remember_locked(d, s->index);
	files_idle_del_locked(d, s);
	files_free_locked(d, s);
	return fd;
}

static void files_name(struct far_dir_files *d, uint64_t index, char name[32])
{
	snprintf(name, 32, "%" PRIu64, index * d->chunk);
}

/* A file that is made gets its full length before anyone else sees it. */
static int files_create(struct far_dir_files *d, const char *name, int *fd)
{
	*fd = openat(d->dir, name, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
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

static int files_open_file(struct far_dir_files *d, uint64_t index, bool create, int *fd)
{
	struct stat st;
	char name[32];

	files_name(d, index, name);
	*fd = openat(d->dir, name, (d->writable ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (*fd < 0 && errno == ENOENT && create)
		return files_create(d, name, fd);
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
static int files_claim(struct far_dir_files *d, uint64_t index, unsigned flags, struct far_dir_file **out, int *victim)
{
	uint64_t deadline = far_deadline();
	int r = 0;

	*victim = -1;
	*out = NULL;
	far_mutex_lock(&d->lock);
	while (!r && !*out) {
		struct far_dir_file *s = files_find_locked(d, index);
		if (d->stopped) {
			r = -ESHUTDOWN;
		} else if (s && s->state == FILES_OPEN) {
			if (!s->refs++)
				files_idle_del_locked(d, s);
			*out = s;
		} else if (flags & FAR_NOWAIT) {
			r = -EAGAIN;
		} else if (!s && (d->free || d->oldest)) {
			if (!d->free)
				*victim = files_evict_locked(d);
			s = d->free;
			d->free = s->next;
			struct far_dir_file **b = files_bucket_locked(d, index);
			*s = (struct far_dir_file){ .index = index, .fd = -1, .state = FILES_BUSY, .refs = 1, .next = *b };
			*b = s;
			*out = s;
		} else if (!far_cond_wait_until(&d->change, &d->lock, deadline) && far_now() >= deadline) {
			r = -ETIMEDOUT;
		}
	}
	far_mutex_unlock(&d->lock);
	return r;
}

int far_dir_files_get(struct far_dir_files *d, uint64_t index, bool create, unsigned flags, struct far_dir_file **out)
{
	struct far_dir_file *s;
	int victim, fd;
	int r = files_claim(d, index, flags, &s, &victim);

	if (r)
		return r;
	far_fd_close(&victim);
	/* Ours alone while BUSY; once OPEN, state does not change while we hold a reference. */
	if (s->state == FILES_BUSY) {
		r = files_open_file(d, index, create, &fd);
		far_mutex_lock(&d->lock);
		if (r) {
			files_free_locked(d, s);
		} else {
			s->fd = fd;
			s->state = FILES_OPEN;
		}
		far_cond_broadcast(&d->change);
		far_mutex_unlock(&d->lock);
	}
	*out = s;
	return r;
}

void far_dir_files_put(struct far_dir_files *d, struct far_dir_file *s, bool wrote)
{
	far_mutex_lock(&d->lock);
	s->dirty |= wrote;
	if (!--s->refs) {
		files_idle_add_locked(d, s);
		far_cond_broadcast(&d->change);
	}
	far_mutex_unlock(&d->lock);
}

/* ------------------------------------------------------------------------------------------------------- flush */

struct files_record {
	uint64_t *index;
	size_t n;
	bool all, names;
};

static int files_compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

/* Take everything that is on record; we are the one flush until files_flush_end(). */
static int files_flush_begin(struct far_dir_files *d, struct files_record *rec)
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

static void files_flush_end(struct far_dir_files *d, int r, bool lost)
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

static int files_sync_record(struct far_dir_files *d, struct files_record *rec, bool *lost)
{
	int r = 0;

	if (rec->all) {
		*lost = syncfs(d->dir) < 0;
		return *lost ? -errno : 0;
	}
	qsort(rec->index, rec->n, sizeof *rec->index, files_compare);
	for (size_t i = 0; !r && i < rec->n; i++) {
		struct far_dir_file *s;
		if (i && rec->index[i] == rec->index[i - 1])
			continue;
		r = far_dir_files_get(d, rec->index[i], false, 0, &s);
		if (r == -ENOENT) { /* discarded meanwhile */
			r = 0;
			continue;
		}
		if (r)
			break;
		r = fsync(s->fd) < 0 ? -errno : 0;
		*lost = r != 0;
		far_dir_files_put(d, s, false);
	}
	if (!r && rec->names && fsync(d->dir) < 0) {
		r = -errno;
		*lost = true;
	}
	return r;
}

void far_dir_files_renamed(struct far_dir_files *d)
{
	far_mutex_lock(&d->lock);
	d->names_changed = true;
	far_mutex_unlock(&d->lock);
}

int far_dir_files_flush(struct far_dir_files *d)
{
	struct files_record rec = { 0 };
	bool lost = false;

	int r = files_flush_begin(d, &rec);
	if (r)
		return r;
	r = files_sync_record(d, &rec, &lost);
	files_flush_end(d, r, lost);
	free(rec.index);
	return r;
}

/* ----------------------------------------------------------------------------------------------------- discard */

static int files_write_zeros(struct far_dir_files *d, struct far_dir_file *s)
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

int far_dir_files_remove(struct far_dir_files *d, uint64_t index)
{
	struct far_dir_file *s;
	char name[32];

	int r = far_dir_files_get(d, index, false, 0, &s);
	if (r)
		return r == -ENOENT ? 0 : r;
	far_mutex_lock(&d->lock);
	bool alone = s->refs == 1;
	if (alone)
		s->state = FILES_BUSY;
	far_mutex_unlock(&d->lock);
	if (!alone) {
		r = far_io_punch(s->fd, 0, d->chunk);
		if (r == -EOPNOTSUPP)
			r = files_write_zeros(d, s);
		far_dir_files_put(d, s, true);
		return r;
	}
	files_name(d, index, name);
	r = unlinkat(d->dir, name, 0) < 0 && errno != ENOENT ? -errno : 0;
	far_fd_close(&s->fd);
	far_mutex_lock(&d->lock);
	if (s->dirty && r)
		files_remember_locked(d, index);
	d->names_changed = true;
	files_free_locked(d, s);
	far_cond_broadcast(&d->change);
	far_mutex_unlock(&d->lock);
	return r;
}

int far_dir_file_fd(const struct far_dir_file *f)
{
	return f->fd;
}

void far_dir_files_stop(struct far_dir_files *d)
{
	far_mutex_lock(&d->lock);
	d->stopped = true;
	far_cond_broadcast(&d->change);
	far_mutex_unlock(&d->lock);
}

void far_dir_files_close(struct far_dir_files *d)
{
	if (!d)
		return;
	for (unsigned i = 0; d->slots && i < d->max_open; i++) {
		FAR_ASSERT(!d->slots[i].refs);
		far_fd_close(&d->slots[i].fd);
	}
	far_cond_fini(&d->change);
	far_mutex_fini(&d->lock);
	free(d->evicted);
	free(d->bucket);
	free(d->slots);
	free(d);
}

int far_dir_files_open(int dir, uint64_t chunk, bool writable, unsigned max_open, struct far_dir_files **out)
{
	struct far_dir_files *d = calloc(1, sizeof *d);

	if (!d)
		return -ENOMEM;
	*d = (struct far_dir_files){ .dir = dir, .chunk = chunk, .writable = writable, .max_open = max_open };
	far_mutex_init(&d->lock);
	far_cond_init(&d->change);
	for (d->buckets = 1; d->buckets < d->max_open; d->buckets *= 2)
		;
	d->slots = calloc(d->max_open, sizeof *d->slots);
	d->bucket = calloc(d->buckets, sizeof *d->bucket);
	if (!d->slots || !d->bucket) {
		far_dir_files_close(d);
		return -ENOMEM;
	}
	for (unsigned i = d->max_open; i--;) {
		d->slots[i] = (struct far_dir_file){ .fd = -1, .next = d->free };
		d->free = &d->slots[i];
	}
	*out = d;
	return 0;
}
