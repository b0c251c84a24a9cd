/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "record.h"

#include "base/io.h"
#include "inject.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint64_t record_random(uint64_t *state)
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15u);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

/* -------------------------------------------------------------------------------------------------------- recording */

static void record_add(struct record *r, enum record_kind kind, unsigned file, uint64_t off, uint64_t len, const void *data)
{
	struct record_entry e = { kind, file, off, len, NULL };

	inject_pause(true);
	if (data) {
		e.data = malloc((size_t)len);
		FAR_ASSERT(e.data);
		memcpy(e.data, data, (size_t)len);
	}
	far_mutex_lock(&r->lock);
	if (r->n == r->room) {
		r->room = r->room ? 2 * r->room : 1024;
		r->e = realloc(r->e, r->room * sizeof *r->e);
		FAR_ASSERT(r->e);
	}
	r->e[r->n++] = e;
	far_mutex_unlock(&r->lock);
	inject_pause(false);
}

void record_wrote(struct record *r, unsigned file, uint64_t off, const void *buf, size_t len)
{
	record_add(r, RECORD_WRITE, file, off, len, buf);
}

void record_synced(struct record *r, unsigned file)
{
	record_add(r, RECORD_SYNC, file, 0, 0, NULL);
}

void record_sync_failed(struct record *r, unsigned file)
{
	record_add(r, RECORD_FAILED, file, 0, 0, NULL);
}

void record_note(struct record *r, uint64_t note)
{
	record_add(r, RECORD_NOTE, 0, note, 0, NULL);
}

static void record_after(void *opaque, const struct inject_io *io)
{
	struct record *r = opaque;
	unsigned f = 0;

	if (io->op == INJECT_PREAD)
		return;
	while (f < RECORD_FILES && !(r->path[f] && inject_is(io->fd, r->path[f])))
		f++;
	if (f == RECORD_FILES)
		return;
	switch (io->op) {
	case INJECT_PWRITE:
		record_add(r, RECORD_WRITE, f, io->off, io->len, io->buf);
		break;
	case INJECT_PUNCH:
		record_add(r, RECORD_ZERO, f, io->off, io->len, NULL);
		break;
	case INJECT_TRUNCATE:
		record_add(r, RECORD_SIZE, f, io->off, 0, NULL);
		break;
	case INJECT_SYNC:
		record_synced(r, f);
		break;
	case INJECT_PREAD:
		break;
	}
}

void record_start(struct record *r, int (*before)(void *opaque, struct inject_io *io), void *opaque)
{
	struct inject_hooks h = { .before = before, .after = record_after, .opaque = r, .serial = true };

	FAR_ASSERT(!before || opaque == r);
	far_mutex_init(&r->lock);
	r->e = NULL;
	r->n = r->room = 0;
	inject_hooks(&h);
}

void record_stop(struct record *r)
{
	inject_hooks(NULL);
}

void record_free(struct record *r)
{
	for (size_t i = 0; i < r->n; i++)
		free(r->e[i].data);
	free(r->e);
	far_mutex_fini(&r->lock);
}

/* ---------------------------------------------------------------------------------------------------------- cutting */

#define RECORD_PAGE 4096u

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
	return x < y ? -1 : x > y;
}

/* First sector of the image at or after number s. */
static size_t image_find(const struct record_image *m, uint64_t s)
{
	size_t lo = 0, hi = m->n;

	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;
		if (m->sector[mid] < s)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo;
}

static void image_index(struct record_image *m, const struct record *r, unsigned file)
{
	size_t room = 0;

	for (size_t i = 0; i < r->n; i++)
		if (r->e[i].kind == RECORD_WRITE && r->e[i].file == file)
			room += (size_t)(r->e[i].len / RECORD_SECTOR + 2);
	const struct record_image *after = r->after[file];
	room += after ? after->n : 0;
	m->sector = malloc((room + 1) * sizeof *m->sector);
	for (size_t i = 0; after && i < after->n; i++)
		m->sector[m->n++] = after->sector[i];
	for (size_t i = 0; i < r->n; i++) {
		const struct record_entry *e = &r->e[i];
		if (e->kind == RECORD_WRITE && e->file == file && e->len)
			for (uint64_t s = e->off / RECORD_SECTOR; s <= (e->off + e->len - 1) / RECORD_SECTOR; s++)
				m->sector[m->n++] = s;
	}
	qsort(m->sector, m->n, sizeof *m->sector, compare);
	size_t n = 0;
	for (size_t i = 0; i < m->n; i++)
		if (!n || m->sector[i] != m->sector[n - 1])
			m->sector[n++] = m->sector[i];
	m->n = n;
	m->old = calloc(n + 1, RECORD_SECTOR);
	m->now = calloc(n + 1, RECORD_SECTOR);
	m->out = calloc(n + 1, RECORD_SECTOR);
	m->since = malloc((r->n + 1) * sizeof *m->since);
	for (size_t i = 0; i < n && r->base[file]; i++) {
		uint64_t at = m->sector[i] * RECORD_SECTOR;
		if (at < r->base_n[file])
			memcpy(m->old + i * RECORD_SECTOR, r->base[file] + at, (size_t)far_min(RECORD_SECTOR, r->base_n[file] - at));
	}
	for (size_t i = 0; after && i < after->n; i++)
		memcpy(m->old + image_find(m, after->sector[i]) * RECORD_SECTOR, after->out + i * RECORD_SECTOR, RECORD_SECTOR);
	memcpy(m->now, m->old, n * RECORD_SECTOR);
	m->old_size = m->now_size = after ? after->out_size : r->base[file] ? r->base_n[file] : 0;
}

void record_cut_begin(struct record_cut *c, struct record *r)
{
	memset(c, 0, sizeof *c);
	c->r = r;
	for (unsigned f = 0; f < RECORD_FILES; f++)
		image_index(&c->image[f], r, f);
}

void record_cut_end(struct record_cut *c)
{
	for (unsigned f = 0; f < RECORD_FILES; f++) {
		struct record_image *m = &c->image[f];
		free(m->sector);
		free(m->old);
		free(m->now);
		free(m->out);
		free(m->since);
	}
}

/* The range of bytes of e in sector i of the image. False: none. */
static bool entry_in(const struct record_image *m, const struct record_entry *e, size_t i, uint64_t *from, uint64_t *to)
{
	uint64_t at = m->sector[i] * RECORD_SECTOR, end = at + RECORD_SECTOR;

	if (e->kind == RECORD_SIZE) { /* what is cut off is zero if the file grows again */
		*from = far_max(at, e->off);
		*to = end;
	} else {
		*from = far_max(at, e->off);
		*to = far_min(end, e->off + e->len);
	}
	return *from < *to;
}

static void entry_apply(const struct record_image *m, const struct record_entry *e, size_t i, unsigned char *data)
{
	uint64_t from, to, at = m->sector[i] * RECORD_SECTOR;
	unsigned char *p = data + i * RECORD_SECTOR;

	if (!entry_in(m, e, i, &from, &to))
		return;
	if (e->kind == RECORD_WRITE)
		memcpy(p + (from - at), e->data + (from - e->off), (size_t)(to - from));
	else
		memset(p + (from - at), 0, (size_t)(to - from));
}

static uint64_t entry_end(const struct record_entry *e)
{
	return e->kind == RECORD_SIZE ? UINT64_MAX : e->off + e->len;
}

static uint64_t entry_size(const struct record_entry *e, uint64_t size)
{
	if (e->kind == RECORD_SIZE)
		return e->off;
	return e->kind == RECORD_WRITE ? far_max(size, e->off + e->len) : size;
}

/* Whether one of the entries [from, to) since the sync is in this sector, or in its page. */
static bool image_touched(const struct record_cut *c, const struct record_image *m, size_t i, size_t from, size_t to, bool page)
{
	uint64_t at = m->sector[i] * RECORD_SECTOR, end = at + RECORD_SECTOR;

	if (page) {
		at -= at % RECORD_PAGE;
		end = at + RECORD_PAGE;
	}
	for (size_t k = from; k < to; k++) {
		const struct record_entry *e = &c->r->e[m->since[k]];
		if (e->off < end && at < entry_end(e))
			return true;
	}
	return false;
}

/* A sync that failed came after it, and nothing after that. */
static bool image_lost(const struct record_cut *c, const struct record_image *m, size_t i)
{
	return m->lost_n && image_touched(c, m, i, 0, m->lost_n, false) &&
	       !image_touched(c, m, i, m->lost_n, m->since_n, true);
}

static void image_sync(const struct record_cut *c, struct record_image *m)
{
	for (size_t i = 0; i < m->n; i++)
		if (!image_lost(c, m, i))
			memcpy(m->old + i * RECORD_SECTOR, m->now + i * RECORD_SECTOR, RECORD_SECTOR);
	m->old_size = m->now_size;
	m->since_n = m->lost_n = 0;
}

const struct record_entry *record_cut_step(struct record_cut *c)
{
	if (c->at == c->r->n)
		return NULL;
	const struct record_entry *e = &c->r->e[c->at];
	struct record_image *m = &c->image[e->file];

	if (e->kind == RECORD_SYNC) {
		image_sync(c, m);
	} else if (e->kind == RECORD_FAILED) {
		m->lost_n = m->since_n;
	} else if (e->kind != RECORD_NOTE) {
		for (size_t i = image_find(m, e->off / RECORD_SECTOR); i < m->n && m->sector[i] * RECORD_SECTOR < entry_end(e); i++)
			entry_apply(m, e, i, m->now);
		m->now_size = entry_size(e, m->now_size);
		m->since[m->since_n++] = c->at;
	}
	c->at++;
	return e;
}

bool record_cut_certain(const struct record_cut *c, unsigned file)
{
	return c->image[file].since_n == 0;
}

/* Up to which of the entries since the sync (its index in `since`) this sector shows. */
static size_t choose_limit(const struct record_cut *c, const struct record_image *m, enum record_how how, size_t i,
			   uint64_t salt, size_t one)
{
	const struct record_entry *e = &c->r->e[m->since[one]];
	uint64_t from, to, seed;

	switch (how) {
	case RECORD_NONE:
		return 0;
	case RECORD_ALL:
	case RECORD_HOWS:
		return m->since_n;
	case RECORD_SECTORS:
		seed = salt ^ m->sector[i] * 0x9e3779b97f4a7c15u;
		return (size_t)(record_random(&seed) % (m->since_n + 1));
	case RECORD_PAGES:
		seed = salt ^ m->sector[i] / 8 * 0x9e3779b97f4a7c15u;
		return (size_t)(record_random(&seed) % (m->since_n + 1));
	case RECORD_WITHOUT:
		return entry_in(m, e, i, &from, &to) ? one : m->since_n;
	case RECORD_ONLY:
		return entry_in(m, e, i, &from, &to) ? one + 1 : 0;
	}
	return 0;
}

void record_cut_choose(struct record_cut *c, unsigned file, enum record_how how, uint64_t *random)
{
	struct record_image *m = &c->image[file];

	memcpy(m->out, m->old, m->n * RECORD_SECTOR);
	m->out_size = m->old_size;
	if (!m->since_n)
		return;
	uint64_t salt = record_random(random);
	size_t one = (size_t)(record_random(random) % m->since_n);
	for (size_t i = 0; i < m->n; i++) {
		size_t limit = choose_limit(c, m, how, i, salt, one);
		if (limit == m->since_n && image_lost(c, m, i))
			limit = 0;
		for (size_t k = 0; k < limit; k++)
			entry_apply(m, &c->r->e[m->since[k]], i, m->out);
	}
	size_t limit = how == RECORD_NONE ? 0 : how == RECORD_ALL ? m->since_n :
		       (size_t)(record_random(random) % (m->since_n + 1));
	for (size_t k = 0; k < limit; k++)
		m->out_size = entry_size(&c->r->e[m->since[k]], m->out_size);
}

void record_cut_store(const struct record_cut *c, unsigned file, const char *path)
{
	const struct record_image *m = &c->image[file];
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	FAR_ASSERT(fd >= 0 && ftruncate(fd, 0) == 0 && ftruncate(fd, (off_t)m->out_size) == 0);
	for (size_t i = 0, n; i < m->n; i += n) {
		uint64_t at = m->sector[i] * RECORD_SECTOR;
		for (n = 1; i + n < m->n && m->sector[i + n] == m->sector[i] + n; n++)
			;
		if (at >= m->out_size)
			break;
		uint64_t len = far_min(n * RECORD_SECTOR, m->out_size - at);
		const unsigned char *p = m->out + i * RECORD_SECTOR;
		for (uint64_t k = 0; k < len; k += RECORD_SECTOR) { /* holes stay holes */
			uint64_t part = far_min(RECORD_SECTOR, len - k);
			FAR_ASSERT(far_is_zero(p + k, part) || pwrite(fd, p + k, part, (off_t)(at + k)) == (ssize_t)part);
		}
	}
	FAR_ASSERT(close(fd) == 0);
}

void record_cut_copy(const struct record_cut *c, unsigned file, unsigned char *to, uint64_t bytes)
{
	const struct record_image *m = &c->image[file];

	memcpy(to, c->r->base[file], (size_t)far_min(bytes, c->r->base_n[file]));
	for (size_t i = 0; i < m->n; i++) {
		uint64_t at = m->sector[i] * RECORD_SECTOR;
		if (at < bytes)
			memcpy(to + at, m->out + i * RECORD_SECTOR, (size_t)far_min(RECORD_SECTOR, bytes - at));
	}
}
