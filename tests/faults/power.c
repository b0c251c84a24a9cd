/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The power goes out. A managed region with a chunk map in a file is worked on: pulls, writes of parts and wholes, holes,
 * flushes of both kinds, evictions, restarts. Everything that reaches its two files and its remote is recorded, and for
 * every place in that record the files are made what a power cut may leave (record.h), opened again, and compared with
 * an oracle that knows each sector's history:
 *
 *  - opening is never refused;
 *  - each sector reads as one of its states since the last acknowledged flush: nothing older, torn or foreign. A sector
 *    that is always written whole is never torn. One that was written in parts may be while writes to it are not flushed,
 *    byte by byte: in a half-written chunk some of its bytes are here and some only on the remote;
 *  - then a flush brings just that to the remote, and what is read after an eviction is still that.
 *
 * power SEED [SCENARIO]: suite `long` runs them all, with reorderings, disks that fail while the work is done, and a second
 * power cut while a mount is busy with what the first one left.
 */
#define _GNU_SOURCE
#include "record.h"
#include "rig.h"

#include "mount/kept.h"

#include <unistd.h>

#define CHUNKS 520u
#define BYTES ((uint64_t)(CHUNKS - 1) * RIG_CHUNK + 1000)
#define SECTORS (CHUNKS * RIG_CHUNK / RECORD_SECTOR)
#define LOCAL 0
#define MAP 1
#define REMOTE 2
#define NOTE_WRITE ((uint64_t)1 << 62)   /* version of the oracle begins */
#define NOTE_FLUSHED ((uint64_t)1 << 61) /* this flush was acknowledged */

/* Chunks that are worked on: some neighbours in three groups of the map, the short last one. */
static const uint64_t hot[] = { 0, 1, 2, 3, 4, 5, 7, 254, 255, 256, 257, 258, 300, 512, 513, 516, 517, 518, 519 };

struct scenario {
	const char *name;
	unsigned steps, restarts, settles;
	enum far_durable durable;
	bool alternate; /* durable changes with each restart */
	int workers;
	uint64_t local_max;
	bool failing; /* the disk, now and then */
};
static const struct scenario scenarios[] = {
	{ .name = "durable remote", .steps = 90, .restarts = 1, .settles = 2 },
	{ .name = "durable local", .steps = 150, .restarts = 2, .settles = 3, .durable = FAR_DURABLE_LOCAL },
	{ .name = "workers and evictions", .steps = 200, .restarts = 2, .settles = 3, .alternate = true, .workers = 2,
	  .local_max = 9 * RIG_CHUNK },
	{ .name = "failing disk", .steps = 200, .restarts = 3, .settles = 2, .failing = true },
	{ .name = "failing disk, durable local", .steps = 200, .restarts = 3, .settles = 2, .durable = FAR_DURABLE_LOCAL,
	  .workers = 2, .failing = true },
};

/* A sector's states: 0 is what the remote had, the others in order. */
struct history {
	unsigned char (*v)[RECORD_SECTOR];
	unsigned n, room;
	unsigned sure;      /* state that it has at least; later ones are of writes that failed, wholly or in part */
	uint64_t ragged[8]; /* bit: this state was made by a write of a part, or one that failed */
};

struct oracle {
	struct history h[SECTORS];
	struct change {
		uint64_t first, n; /* sectors */
	} *change;
	size_t changes, change_room;
	unsigned (*flush)[SECTORS]; /* states at the beginning of each flush that was acknowledged */
	size_t flushes, flush_room;
};

struct power {
	const struct scenario *s;
	uint64_t seed, random;
	char local[100], map[100];
	struct rig_remote remote;
	unsigned char *remote_base;
	struct record rec, *now; /* all of the work; what is being recorded */
	struct record_cut *cut;  /* where the power goes out */
	struct oracle o;
	struct far_region *r;
	struct far_backend *face;
	enum far_durable durable;
	/* the disk fails; under the hooks' lock */
	bool failing, fail_next;
	uint64_t fail_random;
	unsigned failed;
};

static char tmp[64];

static uint64_t pick(struct power *p, uint64_t n)
{
	return record_random(&p->random) % n;
}

/* ----------------------------------------------------------------------------------------------------------- oracle */

static void oracle_init(struct oracle *o, const unsigned char *data)
{
	memset(o, 0, sizeof *o);
	for (uint64_t s = 0; s < SECTORS; s++) {
		struct history *h = &o->h[s];
		uint64_t at = s * RECORD_SECTOR;
		h->room = 1;
		h->n = 1;
		h->v = calloc(1, sizeof *h->v);
		if (at < BYTES)
			memcpy(h->v[0], data + at, (size_t)far_min(RECORD_SECTOR, BYTES - at));
	}
}

static void oracle_fini(struct oracle *o)
{
	for (uint64_t s = 0; s < SECTORS; s++)
		free(o->h[s].v);
	free(o->change);
	free(o->flush);
}

/* A change of these bytes (NULL: zeros) begins. Its number. */
static size_t oracle_change(struct oracle *o, uint64_t off, const unsigned char *buf, uint64_t len)
{
	uint64_t first = off / RECORD_SECTOR, last = (off + len - 1) / RECORD_SECTOR;

	for (uint64_t s = first; s <= last; s++) {
		struct history *h = &o->h[s];
		uint64_t at = s * RECORD_SECTOR, from = far_max(at, off), to = far_min(at + RECORD_SECTOR, off + len);
		if (h->n == h->room) {
			h->room *= 2;
			h->v = realloc(h->v, h->room * sizeof *h->v);
		}
		memcpy(h->v[h->n], h->v[h->n - 1], RECORD_SECTOR);
		if (buf)
			memcpy(h->v[h->n] + (from - at), buf + (from - off), (size_t)(to - from));
		else
			memset(h->v[h->n] + (from - at), 0, (size_t)(to - from));
		FAR_ASSERT(h->n < 512);
		if (to - from < far_min(RECORD_SECTOR, BYTES - at))
			h->ragged[h->n / 64] |= (uint64_t)1 << (h->n % 64);
		h->n++;
	}
	if (o->changes == o->change_room) {
		o->change_room = o->change_room ? 2 * o->change_room : 64;
		o->change = realloc(o->change, o->change_room * sizeof *o->change);
	}
	o->change[o->changes] = (struct change){ first, last - first + 1 };
	return o->changes++;
}

/* How it ended. */
static void oracle_changed(struct oracle *o, size_t id, uint64_t off, uint64_t len, int err)
{
	for (uint64_t s = o->change[id].first; s < o->change[id].first + o->change[id].n; s++) {
		struct history *h = &o->h[s];
		uint64_t at = s * RECORD_SECTOR;
		bool whole = off <= at && far_min(at + RECORD_SECTOR, BYTES) <= off + len;
		if (err)
			h->ragged[(h->n - 1) / 64] |= (uint64_t)1 << ((h->n - 1) % 64);
		else if (whole || h->sure == h->n - 2)
			h->sure = h->n - 1;
	}
}

/* The mount ended on a disk that failed: only flushes count. */
static void oracle_forget(struct oracle *o, const unsigned *flushed)
{
	for (uint64_t s = 0; s < SECTORS; s++) {
		struct history *h = &o->h[s];
		if (h->sure != (flushed ? flushed[s] : 0)) {
			h->sure = flushed ? flushed[s] : 0;
			for (unsigned v = h->sure + 1; v < h->n; v++)
				h->ragged[v / 64] |= (uint64_t)1 << (v % 64);
		}
	}
}

/* A flush begins: what it will have promised. Its number. */
static size_t oracle_flush(struct oracle *o)
{
	if (o->flushes == o->flush_room) {
		o->flush_room = o->flush_room ? 2 * o->flush_room : 16;
		o->flush = realloc(o->flush, o->flush_room * sizeof *o->flush);
	}
	for (uint64_t s = 0; s < SECTORS; s++)
		o->flush[o->flushes][s] = o->h[s].sure;
	return o->flushes++;
}

/* --------------------------------------------------------------------------------------------------------- working */

static void remote_wrote(void *opaque, uint64_t off, const void *buf, size_t len)
{
	struct power *p = opaque;
	if (p->now)
		record_wrote(p->now, REMOTE, off, buf, len);
}

static void remote_flushed(void *opaque)
{
	struct power *p = opaque;
	if (p->now)
		record_synced(p->now, REMOTE);
}

static int power_before(void *opaque, struct inject_io *io)
{
	struct power *p = far_container_of((struct record *)opaque, struct power, rec);
	bool local = p->failing && inject_is(io->fd, p->local), map = p->failing && !local && inject_is(io->fd, p->map);
	uint64_t dice = record_random(&p->fail_random) % 100;
	int err = 0;

	if (!local && !map)
		return 0;
	if (io->op == INJECT_PWRITE && p->fail_next) {
		p->fail_next = false;
		err = EIO;
	} else if (io->op == INJECT_PWRITE && dice < 4 && io->len > 1) {
		io->len /= 2; /* and the rest fails */
		p->fail_next = true;
	} else if ((io->op == INJECT_PWRITE && dice < 9) || (io->op == INJECT_PUNCH && dice < 10)) {
		err = dice % 2 ? ENOSPC : EIO;
	} else if (io->op == INJECT_SYNC && (map ? dice < 12 : p->durable == FAR_DURABLE_REMOTE && dice < 2)) {
		err = EIO;
		record_sync_failed(&p->rec, map ? MAP : LOCAL);
	}
	p->failed += err != 0;
	return err;
}

static void power_result(struct power *p, const char *call, int e)
{
	if (e && (!p->failed || (e != -EIO && e != -ENOSPC)))
		fail_msg("%s, seed %llu: %s says %s", p->s->name, (unsigned long long)p->seed, call, far_strerror(e));
}

/* Whether all of it is one hole, as a mount looks. */
static bool is_zero(struct far_backend *b)
{
	struct far_extent x;
	size_t n;
	return !far_extents(b, 0, far_size(b), &x, 1, &n) && x.kind == FAR_EXTENT_ZERO && x.len == far_size(b);
}

/* What happened to the map lately, for people. */
static void power_story(const struct power *p)
{
	static const char *const kinds[] = { "write", "hole", "size", "sync", "failed sync", "note" };
	const struct record *r = p->cut ? p->cut->r : &p->rec;
	size_t end = p->cut ? p->cut->at : r->n;

	for (size_t i = end > 60 ? end - 60 : 0; i < end; i++)
		if (r->e[i].file == MAP)
			print_message("%zu: %s %llu+%llu\n", i, kinds[r->e[i].kind], (unsigned long long)r->e[i].off,
				      (unsigned long long)r->e[i].len);
}

/* As a mount opens it. */
static void power_open(struct power *p, const struct far_mount_opts *o, const char *when)
{
	struct far_region_conf conf = { .opts = o };
	struct far_error err = { 0 };
	char uri[140];

	snprintf(uri, sizeof uri, "file:%s?size=%llu", p->local, (unsigned long long)BYTES);
	conf.remote = rig_remote_backend(&p->remote);
	if (far_persist_open(p->map, FAR_PERSIST_WRITABLE, &conf.persist, &err)) {
		power_story(p);
		fail_msg("%s: the map is refused: %s", when, err.text);
	}
	if (far_kept_check_store(uri, conf.persist, &err))
		fail_msg("%s: the local store does not fit the map: %s", when, err.text);
	if (far_open(uri, NULL, &conf.local, &err))
		fail_msg("%s: the local store is refused: %s", when, err.text);
	conf.local_is_zero = is_zero(conf.local);
	if (far_region_open(&conf, &p->r, &err))
		fail_msg("%s: the region is refused: %s", when, err.text);
	p->face = far_region_backend(p->r);
}

static struct far_mount_opts power_opts(const struct power *p)
{
	struct far_mount_opts o = rig_quiet();

	o.durable = p->durable;
	o.pull_workers = p->s->workers;
	o.push_workers = p->s->workers;
	o.push_interval_ms = 20;
	o.local_max = p->s->local_max;
	o.order = "ranges:0-32K,1M-1060K,2040K-";
	return o;
}

static void power_write(struct power *p)
{
	static unsigned char buf[4 * RIG_CHUNK];
	uint64_t i = hot[pick(p, FAR_ARRAY_LEN(hot))], base = i * RIG_CHUNK, off = base, len = RIG_CHUNK;

	switch (pick(p, 6)) {
	case 0: /* all of it */
		break;
	case 1: /* and its neighbours */
		len = (1 + pick(p, 3)) * RIG_CHUNK;
		break;
	case 2: /* sectors */
		off += pick(p, 8) * RECORD_SECTOR;
		len = (1 + pick(p, 4)) * RECORD_SECTOR;
		break;
	default: /* ragged */
		off += pick(p, RIG_CHUNK - 1);
		len = 1 + pick(p, 3000);
	}
	if (off >= BYTES)
		off = base;
	len = far_min(len, BYTES - off);
	bool zero = pick(p, 6) == 0;
	rig_fill(buf, off, (size_t)len, (unsigned)p->o.changes + 1);
	size_t id = oracle_change(&p->o, off, zero ? NULL : buf, len);
	record_note(&p->rec, NOTE_WRITE | id);
	int e = zero ? far_zero(p->face, off, len, 0) : far_write(p->face, off, buf, (size_t)len, 0);
	oracle_changed(&p->o, id, off, len, e);
	power_result(p, "a write", e);
}

/* What the running region shows is always the newest, or of writes that failed since. */
static void power_read(struct power *p, uint64_t i)
{
	unsigned char buf[RIG_CHUNK];
	uint64_t off = i * RIG_CHUNK, len = far_min(RIG_CHUNK, BYTES - off);
	int e = far_read(p->face, off, buf, (size_t)len, 0);

	power_result(p, "a read", e);
	for (uint64_t k = 0; !e && k < len; k++) {
		const struct history *h = &p->o.h[(off + k) / RECORD_SECTOR];
		unsigned v = h->sure;
		while (v < h->n && h->v[v][k % RECORD_SECTOR] != buf[k])
			v++;
		if (v == h->n)
			fail_msg("%s, seed %llu: byte %llu is not what was written", p->s->name, (unsigned long long)p->seed,
				 (unsigned long long)(off + k));
	}
}

static void power_flush(struct power *p)
{
	size_t id = oracle_flush(&p->o);
	int e = far_region_flush(p->r);

	power_result(p, "a flush", e);
	if (e)
		p->o.flushes--;
	else
		record_note(&p->rec, NOTE_FLUSHED | id);
}

static unsigned power_syncs(struct power *p)
{
	unsigned n = 0;

	far_mutex_lock(&p->rec.lock);
	for (size_t i = 0; i < p->rec.n; i++)
		n += p->rec.e[i].kind == RECORD_SYNC && p->rec.e[i].file == MAP;
	far_mutex_unlock(&p->rec.lock);
	return n;
}

/* Wait until the map's own thread has written what it knows. */
static void power_settle(struct power *p)
{
	power_read(p, hot[pick(p, FAR_ARRAY_LEN(hot))]);
	power_write(p);
	unsigned n = power_syncs(p);
	uint64_t until = far_now() + 3 * FAR_SEC;
	while (power_syncs(p) == n && far_now() < until)
		far_sleep_until(far_now() + 5 * FAR_MSEC, false);
}

static void power_work(struct power *p)
{
	const struct scenario *s = p->s;
	struct far_mount_opts o;

	for (unsigned part = 0; part <= s->restarts; part++) {
		p->durable = s->alternate ? (part % 2 ? FAR_DURABLE_LOCAL : FAR_DURABLE_REMOTE) : s->durable;
		o = power_opts(p);
		p->failing = false;
		power_open(p, &o, "at work");
		p->failing = s->failing;
		unsigned steps = s->steps / (s->restarts + 1);
		for (unsigned k = 0; k < steps; k++) {
			uint64_t what = pick(p, 10), i = hot[pick(p, FAR_ARRAY_LEN(hot))];
			if (what < 5)
				power_write(p);
			else if (what < 7)
				power_read(p, i);
			else if (what == 7)
				power_flush(p);
			else if (what == 8)
				power_result(p, "an eviction", far_region_evict(p->r, i * RIG_CHUNK,
										far_min(5 * RIG_CHUNK, BYTES - i * RIG_CHUNK)));
			else if (pick(p, 4) == 0)
				power_result(p, "an eviction", far_region_evict(p->r, 0, BYTES));
			if (s->settles && (k + 1) % (steps / s->settles) == 0 && part < 2)
				power_settle(p);
		}
		far_region_close(p->r);
		if (p->failed)
			oracle_forget(&p->o, p->o.flushes ? p->o.flush[p->o.flushes - 1] : NULL);
	}
	p->failing = false;
}

/* --------------------------------------------------------------------------------------------------------- looking */

struct look {
	struct power *p;
	struct record_cut *c;
	unsigned lo[SECTORS], hi[SECTORS]; /* states that may be there */
	unsigned char seen[SECTORS][RECORD_SECTOR];
	const unsigned char (*exact)[RECORD_SECTOR]; /* a flush of the mount before the last cut promised just this */
	unsigned n, twice;
	char when[160];
};

/* A sector that parts were written of: each byte is in one of its own states. */
static bool look_torn(const struct look *l, uint64_t s, const unsigned char *buf, size_t n)
{
	const struct history *h = &l->p->o.h[s];
	bool ragged = false;

	for (unsigned v = 1; v <= l->hi[s]; v++)
		ragged |= h->ragged[v / 64] >> (v % 64) & 1;
	for (size_t k = 0; ragged && k < n; k++) {
		unsigned v = l->lo[s];
		while (v <= l->hi[s] && h->v[v][k] != buf[k])
			v++;
		ragged = v <= l->hi[s];
	}
	return ragged;
}

/* What happened to a sector up to the cut, for people. */
static void look_story(struct look *l, const struct record_cut *c, uint64_t s)
{
	static const char *const files[] = { "local", "map", "remote" }, *const kinds[] = { "write", "hole", "size", "sync",
											"failed sync" };
	uint64_t chunk = s * RECORD_SECTOR / RIG_CHUNK;

	for (size_t i = 0; i < c->at; i++) {
		const struct record_entry *e = &c->r->e[i];
		if (e->kind == RECORD_NOTE && c->r != &l->p->rec) {
			print_message("%zu: the flush of the first mount acknowledged\n", i);
		} else if (e->kind == RECORD_NOTE && e->off & NOTE_FLUSHED) {
			print_message("%zu: flush acknowledged, state %u\n", i, l->p->o.flush[e->off & ~NOTE_FLUSHED][s]);
		} else if (e->kind == RECORD_NOTE) {
			struct change *ch = &l->p->o.change[e->off & ~NOTE_WRITE];
			if (ch->first <= s && s < ch->first + ch->n)
				print_message("%zu: the program writes the sector\n", i);
		} else if (e->kind == RECORD_SYNC || e->kind == RECORD_FAILED || e->file == MAP) {
			print_message("%zu: %s %s %llu+%llu\n", i, files[e->file], kinds[e->kind], (unsigned long long)e->off,
				      (unsigned long long)e->len);
		} else if (e->off / RIG_CHUNK <= chunk && chunk <= (e->off + e->len - (e->len != 0)) / RIG_CHUNK) {
			print_message("%zu: %s %s %llu+%llu of the chunk\n", i, files[e->file], kinds[e->kind],
				      (unsigned long long)e->off, (unsigned long long)e->len);
		}
	}
}

static void look_read(struct look *l, bool first)
{
	struct power *p = l->p;
	unsigned char buf[RIG_CHUNK];

	for (size_t k = 0; k < FAR_ARRAY_LEN(hot); k++) {
		uint64_t off = hot[k] * RIG_CHUNK, len = far_min(RIG_CHUNK, BYTES - off);
		int e = far_read(p->face, off, buf, (size_t)len, 0);
		if (e)
			fail_msg("%s: chunk %llu cannot be read: %s", l->when, (unsigned long long)hot[k], far_strerror(e));
		for (uint64_t at = 0; at < len; at += RECORD_SECTOR) {
			uint64_t s = (off + at) / RECORD_SECTOR;
			size_t n = (size_t)far_min(RECORD_SECTOR, len - at);
			const struct history *h = &p->o.h[s];
			unsigned v = l->lo[s], old = 0;
			if (first && l->exact && memcmp(buf + at, l->exact[s], n))
				fail_msg("%s, and again: sector %llu is not what the flush after the first cut promised", l->when,
					 (unsigned long long)s);
			if (!first) {
				if (memcmp(buf + at, l->seen[s], n))
					fail_msg("%s: sector %llu is not what it was before", l->when, (unsigned long long)s);
				continue;
			}
			while (v <= l->hi[s] && memcmp(buf + at, h->v[v], n))
				v++;
			if (v > l->hi[s] && !look_torn(l, s, buf + at, n)) {
				while (old < h->n && memcmp(buf + at, h->v[old], n))
					old++;
				look_story(l, l->c, s);
				fail_msg("%s: sector %llu (chunk %llu) is %s %u, it should be state %u to %u", l->when,
					 (unsigned long long)s, (unsigned long long)hot[k],
					 old < h->n ? "state" : "none of its states:", old, l->lo[s], l->hi[s]);
			}
			memcpy(l->seen[s], buf + at, n);
		}
	}
}

static void look_remote(struct look *l)
{
	for (size_t k = 0; k < FAR_ARRAY_LEN(hot); k++) {
		uint64_t off = hot[k] * RIG_CHUNK, len = far_min(RIG_CHUNK, BYTES - off);
		for (uint64_t at = 0; at < len; at += RECORD_SECTOR)
			if (memcmp(l->p->remote.data + off + at, l->seen[(off + at) / RECORD_SECTOR],
				   (size_t)far_min(RECORD_SECTOR, len - at))) {
				look_story(l, l->p->cut, (off + at) / RECORD_SECTOR);
				fail_msg("%s: the flush has not brought sector %llu to the remote", l->when,
					 (unsigned long long)((off + at) / RECORD_SECTOR));
			}
	}
}

/* The files and the remote as a cut leaves them. */
static void look_put(struct look *l, struct record_cut *c, enum record_how local, enum record_how map, bool remote_kept)
{
	static const char *const hows[] = { "none", "all", "sectors", "pages", "all but one", "only one" };
	struct power *p = l->p;

	snprintf(l->when, sizeof l->when, "%s, seed %llu, entry %zu of %zu (unsynced: local %s, map %s; remote %s)%s", p->s->name,
		 (unsigned long long)p->seed, c->at, c->r->n, hows[local], hows[map], remote_kept ? "kept" : "lost",
		 c->r == &p->rec ? "" : " of a second power cut");
	inject_watch(l->when, 0, 30);
	p->cut = c;
	record_cut_choose(c, LOCAL, local, &p->random);
	record_cut_choose(c, MAP, map, &p->random);
	record_cut_choose(c, REMOTE, remote_kept ? RECORD_ALL : RECORD_NONE, &p->random);
	record_cut_store(c, LOCAL, p->local);
	record_cut_store(c, MAP, p->map);
	record_cut_copy(c, REMOTE, p->remote.data, BYTES);
	p->remote.instance += !remote_kept;
}

/* The power comes back: everything is looked at, and brought to the remote. */
static void look_mount(struct look *l)
{
	struct power *p = l->p;
	struct far_mount_opts o = rig_quiet();

	o.durable = p->s->durable;
	power_open(p, &o, l->when);
	look_read(l, true);
	int e = o.durable == FAR_DURABLE_LOCAL ? far_region_push(p->r) : far_region_flush(p->r);
	if (e)
		fail_msg("%s: the flush fails: %s", l->when, far_strerror(e));
	if (p->now && o.durable == FAR_DURABLE_REMOTE)
		record_note(p->now, NOTE_FLUSHED);
	look_remote(l);
	assert_int_equal(far_region_evict(p->r, 0, BYTES), 0);
	look_read(l, false);
	far_region_close(p->r);
	l->n++;
}

static void look_open(struct look *l, struct record_cut *c, enum record_how local, enum record_how map, bool remote_kept)
{
	look_put(l, c, local, map, remote_kept);
	look_mount(l);
}

/* The power goes out again, while all that is done. */
static void look_twice(struct look *l, struct record_cut *c)
{
	struct power *p = l->p;
	struct record again = { .path = { p->local, p->map }, .base_n = { [REMOTE] = BYTES } };
	unsigned char *remote = malloc(BYTES), (*exact)[RECORD_SECTOR] = malloc(sizeof l->seen);
	const struct record_entry *e;
	struct record_cut d;

	look_put(l, c, (enum record_how)pick(p, RECORD_HOWS), (enum record_how)pick(p, RECORD_HOWS), pick(p, 2));
	memcpy(remote, p->remote.data, BYTES);
	again.base[REMOTE] = remote;
	again.after[LOCAL] = &c->image[LOCAL];
	again.after[MAP] = &c->image[MAP];
	p->now = &again;
	record_start(&again, NULL, NULL);
	look_mount(l);
	record_stop(&again);
	p->now = NULL;
	memcpy(exact, l->seen, sizeof l->seen);
	record_cut_begin(&d, &again);
	while ((e = record_cut_step(&d))) {
		if (e->kind == RECORD_NOTE)
			l->exact = exact;
		look_open(l, &d, RECORD_ALL, RECORD_ALL, pick(p, 2));
		look_open(l, &d, (enum record_how)pick(p, RECORD_HOWS), (enum record_how)pick(p, RECORD_HOWS), pick(p, 2));
		l->twice += 2;
	}
	l->exact = NULL;
	record_cut_end(&d);
	record_free(&again);
	free(remote);
	free(exact);
}

static void look_at(struct look *l, struct record_cut *c, bool reorder)
{
	bool local = record_cut_certain(c, LOCAL), map = record_cut_certain(c, MAP);

	look_open(l, c, RECORD_ALL, RECORD_ALL, c->at % 2);
	if (local && map)
		return;
	look_open(l, c, RECORD_NONE, RECORD_NONE, c->at / 2 % 2);
	if (!local && !map) {
		look_open(l, c, RECORD_NONE, RECORD_ALL, c->at / 2 % 2);
		look_open(l, c, RECORD_ALL, RECORD_NONE, c->at % 2);
	}
	look_open(l, c, RECORD_SECTORS, RECORD_SECTORS, c->at / 3 % 2);
	if (reorder && pick(l->p, 12) == 0)
		look_twice(l, c);
	for (unsigned k = 0; reorder && k < 6; k++)
		look_open(l, c, (enum record_how)pick(l->p, RECORD_HOWS), (enum record_how)pick(l->p, RECORD_HOWS), pick(l->p, 2));
}

static void look_everywhere(struct power *p, bool reorder)
{
	struct look *l = calloc(1, sizeof *l);
	const struct record_entry *e;
	struct record_cut c;
	size_t kinds[RECORD_NOTE + 1] = { 0 };

	l->p = p;
	l->c = &c;
	p->now = NULL;
	record_cut_begin(&c, &p->rec);
	while ((e = record_cut_step(&c))) {
		kinds[e->kind]++;
		if (e->kind == RECORD_NOTE && e->off & NOTE_WRITE) {
			struct change *ch = &p->o.change[e->off & ~NOTE_WRITE];
			for (uint64_t s = ch->first; s < ch->first + ch->n; s++)
				l->hi[s]++;
		} else if (e->kind == RECORD_NOTE) {
			memcpy(l->lo, p->o.flush[e->off & ~NOTE_FLUSHED], sizeof l->lo);
		}
		look_at(l, &c, reorder);
	}
	print_message("%s: %zu writes, %zu holes, %zu syncs, %zu notes, %u failures: %u power cuts, %u of them in a mount after one\n",
		      p->s->name, kinds[RECORD_WRITE],
		      kinds[RECORD_ZERO], kinds[RECORD_SYNC], kinds[RECORD_NOTE], p->failed, l->n, l->twice);
	inject_watch("", 0, 0);
	record_cut_end(&c);
	free(l);
}

static void power_run(const struct scenario *s, uint64_t seed, bool reorder)
{
	struct power *p = calloc(1, sizeof *p);

	print_message("%s: seed %llu\n", s->name, (unsigned long long)seed);
	p->s = s;
	p->seed = p->random = p->fail_random = seed;
	snprintf(p->local, sizeof p->local, "%s/local", tmp);
	snprintf(p->map, sizeof p->map, "%s/local.farmap", tmp);
	rig_remote_init(&p->remote, BYTES);
	p->remote_base = malloc(BYTES);
	memcpy(p->remote_base, p->remote.data, BYTES);
	oracle_init(&p->o, p->remote_base);
	p->rec.path[LOCAL] = p->local;
	p->rec.path[MAP] = p->map;
	p->rec.base[REMOTE] = p->remote_base;
	p->rec.base_n[REMOTE] = BYTES;
	p->remote.wrote = remote_wrote;
	p->remote.flushed = remote_flushed;
	p->remote.opaque = p;
	p->now = &p->rec;
	record_start(&p->rec, power_before, &p->rec);
	power_work(p);
	record_stop(&p->rec);
	look_everywhere(p, reorder);
	record_free(&p->rec);
	oracle_fini(&p->o);
	rig_remote_fini(&p->remote);
	free(p->remote_base);
	assert_int_equal(unlink(p->local) || unlink(p->map), 0);
	free(p);
}

static uint64_t seed = 1;
static int only = -1;
static bool all;

static void power_cuts(void **state)
{
	for (size_t k = 0; k < FAR_ARRAY_LEN(scenarios); k++)
		if (only < 0 ? all || k == 0 : k == (size_t)only)
			power_run(&scenarios[k], seed + k, all);
}

static int setup(void **state)
{
	snprintf(tmp, sizeof tmp, "%s/farpage-power-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
	return mkdtemp(tmp) ? 0 : -1;
}

static int teardown(void **state)
{
	char cmd[100];
	snprintf(cmd, sizeof cmd, "rm -rf '%s'", tmp);
	return system(cmd);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(power_cuts) };

	all = getenv("FARPAGE_LONG") != NULL;
	if (argc > 1)
		seed = strtoull(argv[1], NULL, 0);
	if (argc > 2)
		only = atoi(argv[2]);
	far_log_set_level(FAR_LOG_ERROR);
	return cmocka_run_group_tests(tests, setup, teardown);
}
