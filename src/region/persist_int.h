/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The chunk map's file: layout and pages (farmap.c), and what keeps it true while a region runs (persist.c). */
#ifndef FAR_PERSIST_INT_H
#define FAR_PERSIST_INT_H

#include "base/thread.h"
#include "region/chunkmap.h"
#include "region/persist.h"

#include <stdatomic.h>

#define FARMAP_FORMAT 1u
#define FARMAP_PAGE ((size_t)4096)
#define FARMAP_CHUNKS 15360u                 /* chunks a segment */
#define FARMAP_GROUP 256u                    /* chunks a mark */
#define FARMAP_GROUPS (FARMAP_CHUNKS / FARMAP_GROUP)
#define FARMAP_SUMS 240u                     /* checksums a page */
#define FARMAP_SUM_PAGES (FARMAP_CHUNKS / FARMAP_SUMS)
#define FARMAP_HEADERS 2u
#define FARMAP_SEGMENT ((2 + FARMAP_SUM_PAGES) * FARMAP_PAGE)
#define FARMAP_PARTIALS_MAX ((uint64_t)1 << 30) /* bytes of one copy of the table of half-written chunks */

struct far_region;

struct farmap_sum {
	uint64_t lo, hi; /* both 0: none */
};

/* A segment's page as it stands, or will stand, on disk. */
struct farmap_segment {
	uint64_t marks;         /* bit g: chunks of group g may be dirty; with the turn */
	_Atomic uint64_t durable; /* those marks that writers may go by: they are on disk and stay there */
	uint8_t *kinds;         /* 2 bits a chunk, enum far_persist_kind; NULL: all absent */
	uint64_t seq;           /* of the newest copy; 0: none was ever written */
	uint8_t slot;           /* where that is */
	bool synced;            /* it is durable: the next goes into the other slot */
	bool lost;              /* a sync of it failed: only one that follows another write of it says anything */
	bool ahead;             /* kinds or marks say more than the newest copy */
	_Atomic bool fresh;     /* some of its chunks have their fresh bit set */
};

struct farmap_blob { /* where the table of half-written chunks lies; len 0: there is none */
	uint64_t off, len;
	struct farmap_sum sum;
};

struct far_persist {
	/* fixed after open */
	char *path;
	int fd;
	enum far_persist_mode mode;
	bool is_new;  /* nothing was read from the file */
	bool passive; /* another read-only mount keeps the file: this one only read it */

	struct far_persist_info info;
	uint64_t header_seq;
	uint8_t header_slot;
	bool header_synced, header_lost; /* as in a segment */
	uint64_t local_id; /* inode of the local store; 0: unknown */
	uint64_t chunks, segments;
	struct farmap_segment *seg;
	struct farmap_blob blob;
	uint8_t *partials;      /* the table as it was read, blob.len bytes */

	/* while a region is open: persist.c */
	struct far_region *r;
	_Atomic uint64_t *fresh_bits, *unverified; /* a bit a chunk */
	_Atomic uint64_t unverified_n;
	uint64_t mark_at;         /* when groups were marked last, with the turn */
	unsigned mark_burst;      /* how often within a second of each other */
	struct farmap_sum *sums;  /* a sparse mapping, an entry a chunk */
	_Atomic uint64_t *sums_dirty; /* a bit a page of checksums */
	_Atomic bool unsynced;    /* the local store may hold bytes that are not durable */

	struct far_mutex lock;
	struct far_cond change;
	bool turn FAR_GUARDED_BY(lock);     /* somebody writes the file */
	bool flushing FAR_GUARDED_BY(lock); /* somebody flushes the local store */
	bool stopped FAR_GUARDED_BY(lock);
	uint64_t commit_want FAR_GUARDED_BY(lock), commit_done FAR_GUARDED_BY(lock);
	uint64_t sync_want FAR_GUARDED_BY(lock), sync_done FAR_GUARDED_BY(lock), sync_tried FAR_GUARDED_BY(lock);
	int sync_error FAR_GUARDED_BY(lock); /* of the newest try */
	struct far_thread thread;
};

static inline enum far_persist_kind farmap_kind(const struct farmap_segment *s, unsigned k)
{
	return s->kinds ? (enum far_persist_kind)(s->kinds[k / 4] >> (k % 4 * 2) & 3) : FAR_PERSIST_ABSENT;
}

static inline bool farmap_marked(const struct farmap_segment *s, unsigned k)
{
	return s->marks >> (k / FARMAP_GROUP) & 1;
}

/* The bits a chunk. */
static inline bool farmap_bit(_Atomic uint64_t *bits, uint64_t i)
{
	return atomic_load_explicit(&bits[i / 64], memory_order_seq_cst) >> (i % 64) & 1;
}

static inline bool farmap_bit_set(_Atomic uint64_t *bits, uint64_t i) /* false: it was */
{
	uint64_t bit = (uint64_t)1 << (i % 64);
	return !farmap_bit(bits, i) && !(atomic_fetch_or_explicit(&bits[i / 64], bit, memory_order_seq_cst) & bit);
}

static inline bool farmap_bit_clear(_Atomic uint64_t *bits, uint64_t i) /* false: it was */
{
	uint64_t bit = (uint64_t)1 << (i % 64);
	return farmap_bit(bits, i) && (atomic_fetch_and_explicit(&bits[i / 64], ~bit, memory_order_seq_cst) & bit);
}

/* farmap.c. All that write need the turn, or that nobody else can be there. 0 or -errno. */
int farmap_set_kind(struct farmap_segment *s, unsigned k, enum far_persist_kind kind); /* -ENOMEM */
int farmap_create(struct far_persist *p, uint64_t bytes, uint64_t chunk);
int farmap_write_header(struct far_persist *p);      /* not durable before farmap_sync() */
int farmap_write_segment(struct far_persist *p, uint64_t s);
int farmap_write_sums(struct far_persist *p, uint64_t page); /* those that p->sums has over those in the file */
int farmap_read_sum(struct far_persist *p, uint64_t i, struct farmap_sum *sum); /* -ENODATA: none; -EBADMSG: torn page */
int farmap_write_partials(struct far_persist *p, const void *data, size_t len); /* header too; durable */
int farmap_sync(struct far_persist *p);
struct farmap_sum farmap_sum_of(const void *buf, size_t len);
uint64_t farmap_len(const struct far_persist *p, uint64_t i); /* of chunk i */
void farmap_count(struct far_persist *p);             /* info.local, dirty, partial */

/* The table of half-written chunks, one after the other. */
struct far_partial;
/* Bytes that e takes; written to out if that is not NULL. */
size_t farmap_put_partial(uint8_t *out, const struct far_partial *e);
/* The entry at *at, moved on. NULL at the end, or when the table is not well formed: *err. free() it. */
struct far_partial *farmap_get_partial(const struct far_persist *p, size_t *at, int *err);

/* commit.c, with the turn. Bring the file up to what is known: of dirty chunks alone, or of all. 0 or -errno: then it is
 * tried again with the next. */
enum far_commit { FAR_COMMIT_DIRTY, FAR_COMMIT_ALL };
int far_commit_run(struct far_persist *p, enum far_commit what);
/* At the end, after a commit of all: marks go, each chunk is called what it is. */
int far_commit_exact(struct far_persist *p);

/* persist.c, for commit.c. */
void far_persist_set_fresh(struct far_persist *p, uint64_t i); /* of the file's business alone: nothing is unsynced */
int far_persist_flush_local(struct far_persist *p);

/* persist.c, for the rest of the region. p may be NULL everywhere: nothing happens, 0. */

/* The region begins: the file is made, or the chunk map gets what it says. *local_zero is cleared if bytes of absent chunks
 * may lie in the local store. */
int far_persist_begin(struct far_persist *p, struct far_region *r, struct far_error *err);
/* No thread works in the region any more: what is known is written, as closed in order if that succeeds. */
void far_persist_end(struct far_persist *p);

/* Call before the change of state that shows new content of chunks [i, i+n) (filled, written, pushed). */
void far_persist_fresh(struct far_persist *p, uint64_t i, uint64_t n);
/* Chunks [i, i+n) are local and pinned, and will be written: after 0 a crash cannot take them for clean. -EAGAIN with
 * FAR_NOWAIT; errors of the file: then nothing may be written. */
int far_persist_before_write(struct far_persist *p, uint64_t i, uint64_t n, unsigned flags);
/* These chunks' room will be given back or their bytes be replaced: after 0 they are absent on disk. */
int far_persist_forget(struct far_persist *p, const uint64_t *chunks, size_t n);
/* Chunk i is what buf says when it next becomes clean. */
void far_persist_sum(struct far_persist *p, uint64_t i, const void *buf, size_t len);
/* The checksum given before does not fit any more. */
void far_persist_unsum(struct far_persist *p, uint64_t i);
/* far_persist_verify() beside commits. */
int far_persist_check(struct far_persist *p, uint64_t i, const void *buf, size_t len);
/* Of [i, i+n), was clean in the file and has not been looked at since. */
bool far_persist_is_unverified(struct far_persist *p, uint64_t i, uint64_t n);
bool far_persist_any_unverified(struct far_persist *p);
/* Chunk i was looked at (0 and -EBADMSG of far_persist_verify() alike), or has new content. */
void far_persist_verified(struct far_persist *p, uint64_t i, uint64_t n);
/* Make all that was written to the local store before durable, beside other work: begin gives a ticket for wait. */
uint64_t far_persist_sync_begin(struct far_persist *p);
int far_persist_sync_wait(struct far_persist *p, uint64_t ticket);
/* Make all that was written before durable here, with the knowledge that the remote lacks it. */
int far_persist_commit(struct far_persist *p);

#endif
