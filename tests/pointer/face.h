/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A pointer seen as a backend: reads and writes are copies from and to the memory, by the thread that calls. So the
 * suites that know backends run over pointers, too. A touch that raises SIGBUS is -EIO here.
 */
#ifndef FAR_TEST_FACE_H
#define FAR_TEST_FACE_H

#include "base/base.h"

/* A way to make a pointer. */
struct face_kind {
	const char *name;
	enum far_mechanism mechanism;
	enum far_tracking tracking;
	unsigned need;    /* of enum far_uffd_have; if all are here it must work */
	bool managed;
	bool local;       /* opts.local: a store of its own below */
	bool choosy;      /* may be refused with -EOPNOTSUPP all the same: for read-only maps, or without a budget */
	bool read_only;   /* can nothing else */
};
extern const struct face_kind face_kinds[]; /* ended by one without a name */
const struct face_kind *face_kind_find(const char *name);
/* What is missing here for this kind, for a sentence that begins with "skip"; NULL: nothing. */
const char *face_kind_lacks(const struct face_kind *k);
/* Put the kind into the options. `room` is for a URI. */
void face_kind_apply(const struct face_kind *k, struct far_mount_opts *o, uint64_t bytes, char *room, size_t cap);

/* far_map(), and what was asked for is what status says. Owns `remote` on success. */
int face_map(const struct face_kind *k, struct far_backend *remote, const struct far_mount_opts *o, struct far_mount **m,
	     struct far_error *err);
/* The mount as a backend, owned by it from then on. */
int face_new(struct far_mount *m, uint64_t bytes, bool read_only, struct far_backend **face);

/* far_thread_start() blocks all signals, which no thread that touches a pointer should do. The calls below do it, too. */
void face_ready(void);
/* A copy or a fill of which either side may be absent; -EIO: SIGBUS was raised on the way. */
int face_copy(void *to, const void *from, size_t len);
int face_zero(void *to, size_t len);
/* Load one byte: 0 to 255, or -EIO. */
int face_peek(const unsigned char *p);

#endif
