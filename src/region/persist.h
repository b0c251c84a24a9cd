/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The chunk map on disk: what of a region is in the local store, what of it the remote lacks, and of which remote.
 * doc/farmap.md has the format and the order of writes.
 */
#ifndef FAR_PERSIST_H
#define FAR_PERSIST_H

#include "base/base.h"

#define FAR_PERSIST_ID 33

/* What the file says about itself. */
struct far_persist_info {
	char id[FAR_PERSIST_ID];  /* of this local copy, in hex: the `writer` of its leases */
	char source[512];         /* URI of the remote */
	struct far_facts facts;   /* of the remote when it was last seen; bytes and chunk of the *region* are below */
	struct far_origin origin; /* newest that is known: identity, epoch (ours, 0: never held), version */
	uint64_t bytes, chunk;
	uint32_t format;          /* version of the file's format */
	bool clean;               /* it was closed in order */
	bool fenced;              /* another owner has taken the region over */
	uint64_t created, written; /* seconds since 1970 */
	/* chunks; after a crash those of marked groups count as dirty */
	uint64_t local, dirty, partial;
};

enum far_persist_mode {
	FAR_PERSIST_LOOK,      /* nothing is locked, nothing is changed: for `info` */
	FAR_PERSIST_READ_ONLY, /* of a read-only mount: several may have it open */
	FAR_PERSIST_WRITABLE,  /* alone */
};

struct far_persist;

/* Open the map at path. One that is not there is made when the region is opened (not with LOOK: -ENOENT). Errors are
 * sentences with the way out: -EBUSY: another mount has it; -EUCLEAN: damaged; -EPROTONOSUPPORT: of a newer version;
 * -EINVAL: no chunk map. */
int far_persist_open(const char *path, enum far_persist_mode mode, struct far_persist **out, struct far_error *err);
void far_persist_close(struct far_persist *p);
const struct far_persist_info *far_persist_info(const struct far_persist *p); /* bytes == 0 and id set: it is new */
bool far_persist_is_new(const struct far_persist *p);
/* Another read-only mount has the local store as well: no room of it may be given back. */
bool far_persist_shared(const struct far_persist *p);
/* Read-only, and another mount keeps the file: this one only reads it. */
bool far_persist_passive(const struct far_persist *p);
const char *far_persist_path(const struct far_persist *p);

/* Remember what is known of the remote: durable when this returns. Any pointer may be NULL: unchanged. fenced: see info.
 * -ENOSPC and other errors of the file. After the region was opened only through it: far_region_remember(). */
int far_persist_remember(struct far_persist *p, const char *source, const struct far_facts *facts,
			 const struct far_origin *origin, bool fenced);
/* Forget clean chunks, before the region is opened. */
int far_persist_discard_clean(struct far_persist *p);

/* Without a region (info, check, copy --dirty): */
enum far_persist_kind { FAR_PERSIST_ABSENT, FAR_PERSIST_CLEAN, FAR_PERSIST_DIRTY, FAR_PERSIST_PARTIAL };
enum far_persist_kind far_persist_chunk(struct far_persist *p, uint64_t i);
/* Call fn for each range of bytes that the remote lacks, in order, until it returns non-zero, which is then returned. */
int far_persist_each_dirty(struct far_persist *p, int (*fn)(void *opaque, uint64_t off, uint64_t len), void *opaque);
/* Whether this is what chunk i held when it was marked clean: 0, -EBADMSG, or -ENODATA: no checksum is known. */
int far_persist_verify(struct far_persist *p, uint64_t i, const void *buf, size_t len);

#endif
