/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What a power cut leaves. While a record runs, every write, hole, change of size and sync of some files is kept in
 * order, and whatever else a test wants to know the place of. Afterwards a cut walks through it, entry by entry, and at
 * each place builds the files as they may be found when the power comes back:
 *
 *  - what was written before the last sync of that file is there;
 *  - of each sector of 512 bytes that was written since, any of its states from then until now may be there. So writes
 *    are torn, left out, and seen out of order, as far as a file system and a disk can do that: one sector never gets
 *    older again;
 *  - what was written before a sync that *failed* is lost unless its page is written once more: the kernel takes such
 *    pages for clean, and the next sync says 0 without them.
 */
#ifndef FAR_TEST_RECORD_H
#define FAR_TEST_RECORD_H

#include "base/thread.h"

#define RECORD_FILES 3
#define RECORD_SECTOR 512u

enum record_kind { RECORD_WRITE, RECORD_ZERO, RECORD_SIZE, RECORD_SYNC, RECORD_FAILED, RECORD_NOTE };
struct record_entry {
	enum record_kind kind;
	unsigned file;
	uint64_t off; /* NOTE: what the test said; SIZE: the size */
	uint64_t len;
	unsigned char *data; /* WRITE */
};

struct record_image;
struct record {
	struct far_mutex lock;
	const char *path[RECORD_FILES];          /* NULL: a file that only the test knows, see record_wrote() */
	const unsigned char *base[RECORD_FILES]; /* content at the beginning, base_n bytes, durable; NULL: no file yet */
	uint64_t base_n[RECORD_FILES];
	const struct record_image *after[RECORD_FILES]; /* instead: as it was chosen there, see record_cut_choose() */
	struct record_entry *e;
	size_t n, room;
};

/* Fields path and base are set. Uses inject_hooks(); `before` of those may be given as well. */
struct inject_io;
void record_start(struct record *r, int (*before)(void *opaque, struct inject_io *io), void *opaque);
void record_stop(struct record *r);
void record_free(struct record *r);
/* Any thread. */
void record_wrote(struct record *r, unsigned file, uint64_t off, const void *buf, size_t len);
void record_synced(struct record *r, unsigned file);
void record_sync_failed(struct record *r, unsigned file);
void record_note(struct record *r, uint64_t note);

enum record_how {
	RECORD_NONE,    /* nothing since the last sync */
	RECORD_ALL,     /* everything */
	RECORD_SECTORS, /* each sector as it was at a moment of its own */
	RECORD_PAGES,   /* each page of 4096 bytes likewise */
	RECORD_WITHOUT, /* all but one of the writes, and what came later in its sectors */
	RECORD_ONLY,    /* one of the writes */
	RECORD_HOWS,
};

struct record_image {
	uint64_t *sector; /* numbers of all sectors that were ever written, ascending */
	size_t n;
	unsigned char *old, *now, *out; /* n sectors: at the last sync, now, as chosen */
	uint64_t old_size, now_size, out_size;
	size_t *since; /* entries since the last sync */
	size_t since_n;
	size_t lost_n; /* those before the last sync that failed */
};

struct record_cut {
	struct record *r;
	size_t at; /* the cut is before entry `at` */
	struct record_image image[RECORD_FILES];
};
void record_cut_begin(struct record_cut *c, struct record *r);
void record_cut_end(struct record_cut *c);
/* Move behind the next entry, which is returned; NULL: there is none. */
const struct record_entry *record_cut_step(struct record_cut *c);
/* Whether the file is the same whatever the disk did: nothing since its last sync. */
bool record_cut_certain(const struct record_cut *c, unsigned file);
/* Choose what is left of the file; random is changed. */
void record_cut_choose(struct record_cut *c, unsigned file, enum record_how how, uint64_t *random);
/* Make it so: the file at the path, which keeps its inode, or these bytes. */
void record_cut_store(const struct record_cut *c, unsigned file, const char *path);
void record_cut_copy(const struct record_cut *c, unsigned file, unsigned char *to, uint64_t bytes);

uint64_t record_random(uint64_t *state);

#endif
