/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The file of a chunk map: its layout, and reading and writing its pages. doc/farmap.md is its description.
 *
 *     header, twice                          4096 bytes each
 *     segment 0, 1, ...                      for 15360 chunks each: page, twice; 64 pages of checksums
 *     table of half-written chunks, twice    each at most 1 GiB
 *
 * What stands there twice is written in turn: never over the copy that is known to be durable. So one whole copy is
 * left whatever a power cut does, and the one with the higher number counts. Pages of checksums stand there once: one
 * that was torn is as if it held none, and then its clean chunks are fetched again.
 */
#define _GNU_SOURCE
#include "region/persist_int.h"

#include "base/hash.h"
#include "base/io.h"
#include "region/partial.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <endian.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file's numbers are little-endian");

#define FARMAP_CLEAN 1u
#define FARMAP_FENCED 2u

struct farmap_header {
	char magic[8];
	uint32_t format, flags;
	uint64_t seq, bytes, chunk, created, written, local_id;
	char id[40];
	char identity[64], writer[40];
	uint64_t epoch, version, instance, change;
	uint64_t remote_bytes, remote_chunk, remote_max_io;
	uint32_t remote_caps, reserved;
	char remote_identity[64], remote_version[64];
	char source[512];
	uint64_t blob_off, blob_len, blob_lo, blob_hi;
	uint64_t sum; /* XXH3-64 of the bytes before */
};
_Static_assert(sizeof(struct farmap_header) <= FARMAP_PAGE, "a header is a page");

struct farmap_page {
	uint64_t sum; /* XXH3-64 of the bytes behind */
	uint64_t seq, marks, index;
	uint8_t kinds[FARMAP_CHUNKS / 4];
	uint8_t reserved[FARMAP_PAGE - 32 - FARMAP_CHUNKS / 4];
};
_Static_assert(sizeof(struct farmap_page) == FARMAP_PAGE, "a page");

struct farmap_sum_page {
	uint64_t sum; /* XXH3-64 of the bytes behind */
	uint64_t index;
	struct farmap_sum sums[FARMAP_SUMS];
	uint8_t reserved[FARMAP_PAGE - 16 - FARMAP_SUMS * 16];
};
_Static_assert(sizeof(struct farmap_sum_page) == FARMAP_PAGE, "a page");

struct farmap_entry { /* of a half-written chunk; (sectors + 63) / 64 words of valid sectors follow */
	uint64_t chunk;
	uint32_t sectors, n_ragged;
	struct {
		uint32_t sector;
		uint16_t from, to;
	} ragged[FAR_PARTIAL_RAGGED];
};

static const char farmap_magic[8] = { 'F', 'A', 'R', 'M', 'A', 'P', '\r', '\n' };

/* ------------------------------------------------------------------------------------------------------- layout */

static uint64_t segment_off(uint64_t s)
{
	return FARMAP_HEADERS * FARMAP_PAGE + s * FARMAP_SEGMENT;
}

static uint64_t sum_page_off(uint64_t page)
{
	return segment_off(page / FARMAP_SUM_PAGES) + (2 + page % FARMAP_SUM_PAGES) * FARMAP_PAGE;
}

uint64_t farmap_len(const struct far_persist *p, uint64_t i)
{
	return far_min(p->info.chunk, p->info.bytes - i * p->info.chunk);
}

static int farmap_geometry(struct far_persist *p)
{
	p->chunks = far_div_up(p->info.bytes, p->info.chunk);
	p->segments = far_div_up(p->chunks, FARMAP_CHUNKS);
	p->seg = calloc((size_t)p->segments + 1, sizeof *p->seg);
	return p->seg ? 0 : -ENOMEM;
}

int farmap_set_kind(struct farmap_segment *s, unsigned k, enum far_persist_kind kind)
{
	if (!s->kinds && kind == FAR_PERSIST_ABSENT)
		return 0;
	if (!s->kinds)
		s->kinds = calloc(1, FARMAP_CHUNKS / 4);
	if (!s->kinds)
		return -ENOMEM;
	s->ahead = true;
	s->kinds[k / 4] = (uint8_t)((s->kinds[k / 4] & ~(3u << (k % 4 * 2))) | (unsigned)kind << (k % 4 * 2));
	return 0;
}

struct farmap_sum farmap_sum_of(const void *buf, size_t len)
{
	uint64_t h[2]; /* big-endian: high, low */

	far_hash128((uint8_t *)h, buf, len, 0);
	uint64_t high = be64toh(h[0]), low = be64toh(h[1]);
	/* Both zero stands for "none". */
	return (struct farmap_sum){ low, high | !(low | high) };
}

/* ------------------------------------------------------------------------------------------------------ writing */

/* After a failure the kernel takes the pages for clean, and the next fdatasync says 0 without them. */
int farmap_sync(struct far_persist *p)
{
	int err = far_io_fdatasync(p->fd);

	if (err) {
		p->header_lost |= !p->header_synced;
		for (uint64_t s = 0; s < p->segments; s++)
			if (p->seg[s].seq && !p->seg[s].synced)
				p->seg[s].lost = p->seg[s].ahead = true;
		return err;
	}
	p->header_synced |= !p->header_lost;
	for (uint64_t s = 0; s < p->segments; s++)
		p->seg[s].synced |= !p->seg[s].lost;
	return 0;
}

int farmap_write_header(struct far_persist *p)
{
	union {
		struct farmap_header h;
		uint8_t page[FARMAP_PAGE];
	} u = { .page = { 0 } };
	struct farmap_header *h = &u.h;
	const struct far_persist_info *in = &p->info;

	memcpy(h->magic, farmap_magic, sizeof h->magic);
	h->format = FARMAP_FORMAT;
	h->flags = (in->clean ? FARMAP_CLEAN : 0) | (in->fenced ? FARMAP_FENCED : 0);
	h->seq = ++p->header_seq;
	h->bytes = in->bytes;
	h->chunk = in->chunk;
	h->created = in->created;
	h->written = (uint64_t)time(NULL);
	h->local_id = p->local_id;
	memcpy(h->id, in->id, sizeof in->id);
	memcpy(h->identity, in->origin.identity, sizeof h->identity);
	memcpy(h->writer, in->origin.writer, sizeof h->writer);
	h->epoch = in->origin.epoch;
	h->version = in->origin.version;
	h->instance = in->origin.instance;
	h->change = in->origin.change;
	h->remote_bytes = in->facts.bytes;
	h->remote_chunk = in->facts.chunk;
	h->remote_max_io = in->facts.max_io;
	h->remote_caps = in->facts.caps;
	memcpy(h->remote_identity, in->facts.identity, sizeof h->remote_identity);
	memcpy(h->remote_version, in->facts.version, sizeof h->remote_version);
	memcpy(h->source, in->source, sizeof h->source);
	h->blob_off = p->blob.off;
	h->blob_len = p->blob.len;
	h->blob_lo = p->blob.sum.lo;
	h->blob_hi = p->blob.sum.hi;
	h->sum = XXH3_64bits(h, offsetof(struct farmap_header, sum));
	uint8_t slot = p->header_synced ? !p->header_slot : p->header_slot;
	int err = far_io_pwrite(p->fd, slot * FARMAP_PAGE, &u, sizeof u, 0);
	p->header_lost = err != 0; /* it may be there in part, and that part be enough */
	if (!err) {
		p->header_slot = slot;
		p->header_synced = false;
		p->info.written = h->written;
	}
	return err;
}

int farmap_write_segment(struct far_persist *p, uint64_t s)
{
	struct farmap_segment *g = &p->seg[s];
	struct farmap_page page = { .seq = g->seq + 1, .marks = g->marks, .index = s };
	uint8_t slot = g->synced ? !g->slot : g->slot;
	int err = 0;

	if (g->kinds)
		memcpy(page.kinds, g->kinds, sizeof page.kinds);
	page.sum = XXH3_64bits(&page.seq, sizeof page - sizeof page.sum);
	if (!g->seq) {
		/* The other slot gets its room as well: later writes find it there and need no new blocks. */
		struct farmap_page none = { .index = s };
		none.sum = XXH3_64bits(&none.seq, sizeof none - sizeof none.sum);
		slot = 0;
		err = far_io_pwrite(p->fd, segment_off(s) + FARMAP_PAGE, &none, sizeof none, 0);
	}
	if (!err)
		err = far_io_pwrite(p->fd, segment_off(s) + slot * FARMAP_PAGE, &page, sizeof page, 0);
	if (!err) {
		g->slot = slot;
		g->seq++;
		g->synced = g->ahead = g->lost = false;
	} else {
		g->lost |= !g->synced; /* it may be torn, and a sync says nothing of that */
	}
	return err;
}

static bool sum_page_ok(const struct farmap_sum_page *page, uint64_t index)
{
	return page->index == index && page->sum == XXH3_64bits(&page->index, sizeof *page - sizeof page->sum);
}

/* A page that was never written is a hole, or lies behind the end. */
static int sum_page_read(struct far_persist *p, uint64_t index, struct farmap_sum_page *page)
{
	int err = far_io_pread(p->fd, sum_page_off(index), page, sizeof *page, 0);

	if (err == -ENODATA || (!err && far_is_zero(page, sizeof *page)))
		return -ENODATA;
	return err ? err : sum_page_ok(page, index) ? 0 : -EBADMSG;
}

int farmap_write_sums(struct far_persist *p, uint64_t index)
{
	struct farmap_sum_page page;

	if (sum_page_read(p, index, &page))
		memset(&page, 0, sizeof page);
	page.index = index;
	for (unsigned k = 0; k < FARMAP_SUMS; k++) {
		uint64_t i = index * FARMAP_SUMS + k;
		struct farmap_sum now = { 0, 0 };
		if (i < p->chunks) {
			now.lo = __atomic_load_n(&p->sums[i].lo, __ATOMIC_RELAXED);
			now.hi = __atomic_load_n(&p->sums[i].hi, __ATOMIC_RELAXED);
		}
		if (now.lo | now.hi)
			page.sums[k] = now;
	}
	page.sum = XXH3_64bits(&page.index, sizeof page - sizeof page.sum);
	return far_io_pwrite(p->fd, sum_page_off(index), &page, sizeof page, 0);
}

int farmap_read_sum(struct far_persist *p, uint64_t i, struct farmap_sum *sum)
{
	struct farmap_sum_page page;
	int err = sum_page_read(p, i / FARMAP_SUMS, &page);

	if (err)
		return err;
	*sum = page.sums[i % FARMAP_SUMS];
	return sum->lo | sum->hi ? 0 : -ENODATA;
}

int farmap_write_partials(struct far_persist *p, const void *data, size_t len)
{
	uint64_t base = segment_off(p->segments), old = p->blob.off;
	struct farmap_blob was = p->blob;

	if (len > FARMAP_PARTIALS_MAX)
		return -ENOSPC;
	if (p->header_lost) { /* it may point at what is written over next */
		int e = farmap_write_header(p);
		if (!e)
			e = farmap_sync(p);
		if (e)
			return e;
	}
	/* The durable header points at the old one. */
	p->blob = (struct farmap_blob){ old == base ? base + FARMAP_PARTIALS_MAX : base, len, farmap_sum_of(data, len) };
	int err = len ? far_io_pwrite(p->fd, p->blob.off, data, len, 0) : 0;
	if (!err)
		err = farmap_sync(p);
	if (!err)
		err = farmap_write_header(p);
	if (!err)
		err = farmap_sync(p);
	if (err)
		p->blob = was;
	return err;
}

/* ------------------------------------------------------------------------------------------- half-written chunks */

size_t farmap_put_partial(uint8_t *out, const struct far_partial *e)
{
	size_t words = (size_t)far_div_up(e->sectors, 64);
	struct farmap_entry x = { .chunk = e->chunk, .sectors = e->sectors, .n_ragged = e->n_ragged };

	if (out) {
		for (unsigned k = 0; k < e->n_ragged; k++) {
			x.ragged[k].sector = e->ragged[k].sector;
			x.ragged[k].from = e->ragged[k].from;
			x.ragged[k].to = e->ragged[k].to;
		}
		memcpy(out, &x, sizeof x);
		memcpy(out + sizeof x, e->valid, words * sizeof(uint64_t));
	}
	return sizeof x + words * sizeof(uint64_t);
}

static bool entry_ok(const struct far_persist *p, const struct farmap_entry *x)
{
	if (x->chunk >= p->chunks || x->n_ragged > FAR_PARTIAL_RAGGED ||
	    x->sectors != far_div_up(farmap_len(p, x->chunk), FAR_PARTIAL_SECTOR))
		return false;
	for (unsigned k = 0; k < x->n_ragged; k++) {
		uint64_t end = (uint64_t)x->ragged[k].sector * FAR_PARTIAL_SECTOR + x->ragged[k].to;
		if (x->ragged[k].from >= x->ragged[k].to || x->ragged[k].to > FAR_PARTIAL_SECTOR ||
		    end > farmap_len(p, x->chunk))
			return false;
	}
	return true;
}

struct far_partial *farmap_get_partial(const struct far_persist *p, size_t *at, int *err)
{
	struct farmap_entry x;
	uint64_t left = p->partials ? p->blob.len - *at : 0;

	*err = 0;
	if (!left)
		return NULL;
	*err = -EUCLEAN;
	if (left < sizeof x)
		return NULL;
	memcpy(&x, p->partials + *at, sizeof x);
	size_t words = (size_t)far_div_up(x.sectors, 64), room = words * sizeof(uint64_t);
	if (!entry_ok(p, &x) || left - sizeof x < room)
		return NULL;
	struct far_partial *e = far_partial_new(x.chunk, farmap_len(p, x.chunk));
	if (!e) {
		*err = -ENOMEM;
		return NULL;
	}
	memcpy(e->valid, p->partials + *at + sizeof x, room);
	if (x.sectors % 64)
		e->valid[words - 1] &= ((uint64_t)1 << (x.sectors % 64)) - 1;
	for (size_t w = 0; w < words; w++)
		e->n_valid += (uint32_t)__builtin_popcountll(e->valid[w]);
	for (unsigned k = 0; k < x.n_ragged; k++) {
		uint64_t from = (uint64_t)x.ragged[k].sector * FAR_PARTIAL_SECTOR + x.ragged[k].from;
		far_partial_add(e, from, from + x.ragged[k].to - x.ragged[k].from);
	}
	*at += sizeof x + room;
	*err = 0;
	return e;
}

/* ------------------------------------------------------------------------------------------------------ reading */

static void header_take(struct far_persist *p, const struct farmap_header *h)
{
	struct far_persist_info *in = &p->info;

	in->format = h->format;
	in->clean = h->flags & FARMAP_CLEAN;
	in->fenced = h->flags & FARMAP_FENCED;
	in->bytes = h->bytes;
	in->chunk = h->chunk;
	in->created = h->created;
	in->written = h->written;
	memcpy(in->id, h->id, sizeof in->id - 1);
	in->origin = (struct far_origin)FAR_ORIGIN_INIT;
	memcpy(in->origin.identity, h->identity, sizeof h->identity - 1);
	memcpy(in->origin.writer, h->writer, sizeof h->writer - 1);
	in->origin.epoch = h->epoch;
	in->origin.version = h->version;
	in->origin.instance = h->instance;
	in->origin.change = h->change;
	in->facts = (struct far_facts){ .size = sizeof in->facts, .bytes = h->remote_bytes, .chunk = h->remote_chunk,
					.max_io = h->remote_max_io, .caps = h->remote_caps };
	memcpy(in->facts.identity, h->remote_identity, sizeof h->remote_identity - 1);
	memcpy(in->facts.version, h->remote_version, sizeof h->remote_version - 1);
	memcpy(in->source, h->source, sizeof in->source - 1);
	p->local_id = h->local_id;
	p->blob = (struct farmap_blob){ h->blob_off, h->blob_len, { h->blob_lo, h->blob_hi } };
	p->header_seq = h->seq;
}

static bool header_sane(const struct farmap_header *h)
{
	return h->bytes <= FAR_SIZE_MAX && h->chunk >= 4096 && h->chunk <= 32 << 20 && !(h->chunk & (h->chunk - 1)) &&
	       h->blob_len <= FARMAP_PARTIALS_MAX;
}

static int farmap_damaged(const struct far_persist *p, const char *what, struct far_error *err)
{
	return far_error_set(err, EUCLEAN, "the chunk map %s is damaged (%s). What the remote has is safe; to begin with an "
			     "empty local copy, move the map away", p->path, what);
}

static int farmap_read_header(struct far_persist *p, struct far_error *err)
{
	union {
		struct farmap_header h;
		uint8_t page[FARMAP_PAGE];
	} u;
	bool found = false, ours = false;

	for (unsigned slot = 0; slot < FARMAP_HEADERS; slot++) {
		int e = far_io_pread(p->fd, slot * FARMAP_PAGE, &u, sizeof u, 0);
		if (e && e != -ENODATA)
			return far_error_set(err, -e, "cannot read the chunk map %s: %s", p->path, far_strerror(e));
		if (e || memcmp(u.h.magic, farmap_magic, sizeof farmap_magic))
			continue;
		ours = true;
		if (u.h.format > FARMAP_FORMAT)
			return far_error_set(err, EPROTONOSUPPORT, "the chunk map %s has format %u, this farpage knows formats up to "
					     "%u: use a newer farpage", p->path, u.h.format, FARMAP_FORMAT);
		if (u.h.sum != XXH3_64bits(&u.h, offsetof(struct farmap_header, sum)) || !header_sane(&u.h))
			continue;
		if (found && u.h.seq < p->header_seq)
			continue;
		header_take(p, &u.h);
		p->header_slot = (uint8_t)slot;
		found = true;
	}
	if (found)
		return 0;
	if (ours)
		return farmap_damaged(p, "neither copy of its header is whole", err);
	return far_error_set(err, EINVAL, "%s is no chunk map", p->path);
}

static int farmap_read_segment(struct far_persist *p, uint64_t s, struct far_error *err)
{
	struct farmap_segment *g = &p->seg[s];
	struct farmap_page page[2];
	bool any = false, found = false;

	for (unsigned slot = 0; slot < 2; slot++) {
		int e = far_io_pread(p->fd, segment_off(s) + slot * FARMAP_PAGE, &page[slot], FARMAP_PAGE, 0);
		if (e == -ENODATA)
			memset(&page[slot], 0, FARMAP_PAGE);
		else if (e)
			return far_error_set(err, -e, "cannot read the chunk map %s: %s", p->path, far_strerror(e));
		if (far_is_zero(&page[slot], FARMAP_PAGE))
			continue;
		any = true;
		if (page[slot].index != s || page[slot].sum != XXH3_64bits(&page[slot].seq, FARMAP_PAGE - sizeof page[slot].sum))
			continue;
		if (found && page[slot].seq < g->seq)
			continue;
		g->seq = page[slot].seq;
		g->slot = (uint8_t)slot;
		found = true;
	}
	/* The first write of a segment may have been torn in both: nothing durable can have been there. */
	if (!found && any && page[0].seq > 1)
		return farmap_damaged(p, "neither copy of a page of states is whole", err);
	if (!found)
		return 0;
	const struct farmap_page *best = &page[g->slot];
	g->marks = best->marks;
	if (far_is_zero(best->kinds, sizeof best->kinds))
		return 0;
	g->kinds = malloc(FARMAP_CHUNKS / 4);
	if (!g->kinds)
		return far_error_set(err, ENOMEM, "no memory for the chunk map %s", p->path);
	memcpy(g->kinds, best->kinds, FARMAP_CHUNKS / 4);
	return 0;
}

static int farmap_read_partials(struct far_persist *p, struct far_error *err)
{
	if (!p->blob.len)
		return 0;
	p->partials = malloc((size_t)p->blob.len);
	if (!p->partials)
		return far_error_set(err, ENOMEM, "no memory for the chunk map %s", p->path);
	int e = far_io_pread(p->fd, p->blob.off, p->partials, (size_t)p->blob.len, 0);
	struct farmap_sum sum = e ? (struct farmap_sum){ 0, 0 } : farmap_sum_of(p->partials, (size_t)p->blob.len);
	if (e || sum.lo != p->blob.sum.lo || sum.hi != p->blob.sum.hi)
		return farmap_damaged(p, "its table of half-written chunks does not fit its checksum", err);
	return 0;
}

/* Write the page that is there once more. Where it is on the disk already that cannot tear it. */
static int farmap_again(struct far_persist *p, uint64_t off)
{
	uint8_t page[FARMAP_PAGE];
	int err = far_io_pread(p->fd, off, page, sizeof page, 0);

	return err == -ENODATA ? -EIO : err ? err : far_io_pwrite(p->fd, off, page, sizeof page, 0);
}

/* What was read may be in the kernel's memory only: a sync of it may have failed when the file was last open, and the
 * next one would not know. Nothing may be written over the other copies before these are surely on the disk. After an
 * orderly end the segments were synced before the header that says so was written. */
static int farmap_settle(struct far_persist *p, struct far_error *err)
{
	int e = farmap_again(p, p->header_slot * FARMAP_PAGE);

	for (uint64_t s = 0; !e && !p->info.clean && s < p->segments; s++)
		if (p->seg[s].seq)
			e = farmap_again(p, segment_off(s) + p->seg[s].slot * FARMAP_PAGE);
	if (!e && !p->info.clean && p->blob.len)
		e = far_io_pwrite(p->fd, p->blob.off, p->partials, (size_t)p->blob.len, 0);
	if (!e)
		e = farmap_sync(p);
	return e ? far_error_set(err, -e, "cannot write the chunk map %s: %s", p->path, far_strerror(e)) : 0;
}

void farmap_count(struct far_persist *p)
{
	uint64_t n[4] = { 0, 0, 0, 0 };

	for (uint64_t s = 0; s < p->segments; s++) {
		struct farmap_segment *g = &p->seg[s];
		for (unsigned k = 0; g->kinds && k < FARMAP_CHUNKS && s * FARMAP_CHUNKS + k < p->chunks; k++) {
			enum far_persist_kind kind = farmap_kind(g, k);
			if (kind == FAR_PERSIST_CLEAN && farmap_marked(g, k))
				kind = FAR_PERSIST_DIRTY;
			n[kind]++;
		}
	}
	p->info.dirty = n[FAR_PERSIST_DIRTY];
	p->info.partial = n[FAR_PERSIST_PARTIAL];
	p->info.local = n[FAR_PERSIST_CLEAN] + n[FAR_PERSIST_DIRTY];
}

static int farmap_read(struct far_persist *p, struct far_error *err)
{
	int e = farmap_read_header(p, err);

	if (!e && farmap_geometry(p))
		e = far_error_set(err, ENOMEM, "no memory for the chunk map %s", p->path);
	for (uint64_t s = 0; !e && s < p->segments; s++)
		e = farmap_read_segment(p, s, err);
	return e ? e : farmap_read_partials(p, err);
}

/* ----------------------------------------------------------------------------------------------- open and close */

static int farmap_lock_op(int fd, int op, short type, off_t at)
{
	struct flock l = { .l_type = type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1 };

	return fcntl(fd, op, &l) < 0 ? -errno : 0;
}

/* Byte 0: everybody who has the local store open, read-only ones together. Byte 1: the one who writes this file. */
static int farmap_lock(struct far_persist *p, struct far_error *err)
{
	if (p->mode == FAR_PERSIST_LOOK)
		return 0;
	int e = farmap_lock_op(p->fd, F_OFD_SETLK, p->mode == FAR_PERSIST_WRITABLE ? F_WRLCK : F_RDLCK, 0);
	if (e == -EAGAIN || e == -EACCES)
		return far_error_set(err, EBUSY, "another mount has the local store of %s open. Stop it first%s, or use another "
				     "--local", p->path, p->mode == FAR_PERSIST_WRITABLE ? "" : " (or let both be --read-only)");
	if (e)
		return far_error_set(err, -e, "cannot lock the chunk map %s: %s", p->path, far_strerror(e));
	p->passive = p->mode == FAR_PERSIST_READ_ONLY && farmap_lock_op(p->fd, F_OFD_SETLK, F_WRLCK, 1) != 0;
	return 0;
}

static int farmap_new_id(struct far_persist *p)
{
	uint8_t raw[16];

	if (getrandom(raw, sizeof raw, 0) != (ssize_t)sizeof raw)
		return -errno;
	for (unsigned k = 0; k < sizeof raw; k++) {
		p->info.id[2 * k] = "0123456789abcdef"[raw[k] >> 4];
		p->info.id[2 * k + 1] = "0123456789abcdef"[raw[k] & 15];
	}
	p->info.created = (uint64_t)time(NULL);
	p->info.format = FARMAP_FORMAT;
	return 0;
}

/* The power went out while it was made: its first header, all there can be before the first sync, is not whole. */
static bool farmap_unborn(struct far_persist *p, uint64_t size)
{
	union {
		struct farmap_header h;
		uint8_t page[FARMAP_PAGE];
	} u = { .page = { 0 } };

	if (size > FARMAP_PAGE || far_io_pread(p->fd, 0, &u, (size_t)size, 0))
		return false;
	return far_is_zero(&u, 512) ||
	       (!memcmp(u.h.magic, farmap_magic, sizeof farmap_magic) && u.h.format <= FARMAP_FORMAT &&
		(size < FARMAP_PAGE || u.h.sum != XXH3_64bits(&u.h, offsetof(struct farmap_header, sum))));
}

static int farmap_open(struct far_persist *p, struct far_error *err)
{
	struct stat st;
	int flags = p->mode == FAR_PERSIST_LOOK ? O_RDONLY : O_RDWR | O_CREAT;

	p->fd = open(p->path, flags | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
	if (p->fd < 0)
		return far_error_set(err, errno, "cannot open the chunk map %s: %s", p->path, far_strerror(errno));
	if (fstat(p->fd, &st) < 0 || !S_ISREG(st.st_mode))
		return far_error_set(err, EINVAL, "%s is no chunk map: it is no regular file", p->path);
	int e = farmap_lock(p, err);
	if (e)
		return e;
	if (fstat(p->fd, &st) < 0) /* whoever had the lock may have filled it */
		return far_error_set(err, errno, "cannot read the chunk map %s: %s", p->path, far_strerror(errno));
	p->info.origin = (struct far_origin)FAR_ORIGIN_INIT;
	p->info.facts = (struct far_facts)FAR_FACTS_INIT;
	if (p->mode != FAR_PERSIST_LOOK && farmap_unborn(p, (uint64_t)st.st_size)) {
		p->is_new = true;
		e = farmap_new_id(p);
		return e ? far_error_set(err, -e, "no random numbers: %s", far_strerror(e)) : 0;
	}
	e = farmap_read(p, err);
	if (!e)
		farmap_count(p);
	if (!e && p->mode != FAR_PERSIST_LOOK && !p->passive)
		e = farmap_settle(p, err);
	return e;
}

static void farmap_free(struct far_persist *p)
{
	for (uint64_t s = 0; p->seg && s < p->segments; s++)
		free(p->seg[s].kinds);
	free(p->seg);
	free(p->partials);
	far_fd_close(&p->fd);
	free(p->path);
	free(p);
}

int far_persist_open(const char *path, enum far_persist_mode mode, struct far_persist **out, struct far_error *err)
{
	struct far_persist *p = calloc(1, sizeof *p);

	if (!p || !(p->path = strdup(path))) {
		free(p);
		return far_error_set(err, ENOMEM, "no memory for the chunk map %s", path);
	}
	p->fd = -1;
	p->mode = mode;
	int e = farmap_open(p, err);
	if (e) {
		farmap_free(p);
		return e;
	}
	far_mutex_init(&p->lock);
	far_cond_init(&p->change);
	*out = p;
	return 0;
}

void far_persist_close(struct far_persist *p)
{
	struct stat st;

	if (!p)
		return;
	/* Made by open, and no region came of it. */
	if (p->is_new && !p->seg && fstat(p->fd, &st) == 0 && st.st_size == 0)
		unlink(p->path);
	far_cond_fini(&p->change);
	far_mutex_fini(&p->lock);
	farmap_free(p);
}

int farmap_create(struct far_persist *p, uint64_t bytes, uint64_t chunk)
{
	p->info.bytes = bytes;
	p->info.chunk = chunk;
	int err = farmap_geometry(p);
	if (!err)
		err = farmap_write_header(p);
	if (!err)
		err = farmap_sync(p);
	return err ? err : far_io_sync_parent(p->path);
}

const struct far_persist_info *far_persist_info(const struct far_persist *p)
{
	return &p->info;
}

bool far_persist_is_new(const struct far_persist *p)
{
	return p->is_new;
}

const char *far_persist_path(const struct far_persist *p)
{
	return p->path;
}

bool far_persist_passive(const struct far_persist *p)
{
	return p && p->passive;
}

bool far_persist_shared(const struct far_persist *p)
{
	struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1 };

	if (!p || p->mode != FAR_PERSIST_READ_ONLY)
		return false;
	/* Only asked: who comes later finds absent in the file what is given back now. */
	return p->passive || fcntl(p->fd, F_OFD_GETLK, &l) < 0 || l.l_type != F_UNLCK;
}
