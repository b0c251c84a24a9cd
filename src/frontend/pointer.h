/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The pointer: a region whose local store is memory (memory.h), and the receivers that serve its faults (pager.c). Over a
 * direct stack it is the only region; over one that has a local store of its own it stands on that region's face.
 */
#ifndef FAR_POINTER_H
#define FAR_POINTER_H

#include "backend/backend.h"

struct far_pointer;

struct far_pointer_conf {
	const char *source;         /* for messages; copied */
	struct far_backend *below;  /* owned from success on, unless `borrowed` */
	bool borrowed;
	bool writable;
	bool managed;               /* pull and push in the background, as opts say; else only ahead of faults and in flush */
	const struct far_mount_opts *opts;
	struct far_handover *given; /* another process' memory: taken on success; NULL: map some here */
	void (*ended)(void *opaque); /* of `given`: that process is gone */
	void *opaque;
};
int far_pointer_open(const struct far_pointer_conf *conf, struct far_pointer **out, struct far_error *err);
void *far_pointer_addr(const struct far_pointer *p);
struct far_region *far_pointer_region(struct far_pointer *p); /* NULL: SHARE, there is none */
int far_pointer_flush(struct far_pointer *p);  /* every store that ended before the call */
int far_pointer_populate(struct far_pointer *p, uint64_t off, uint64_t len);
int far_pointer_discard(struct far_pointer *p, uint64_t off, uint64_t len);
int far_pointer_heal(struct far_pointer *p, uint64_t off, uint64_t len);
int far_pointer_stored(struct far_pointer *p, uint64_t off, uint64_t len);
/* The remote's bytes in the range have changed: forget what is clean there. */
int far_pointer_refresh(struct far_pointer *p, uint64_t off, uint64_t len);
void far_pointer_status(struct far_pointer *p, struct far_status *st);
/* Blocked faults end as `on_fail` says, background threads end. Does not flush. */
void far_pointer_stop(struct far_pointer *p);
/* After stop. The memory is unmapped. Does not flush. */
void far_pointer_close(struct far_pointer *p);

/* What is chosen here for a region like this (choose.c). opts->mechanism and opts->tracking, if set, are returned as they
 * are. FAR_MECH_AUTO: nothing works. */
enum far_mechanism far_pointer_choose(unsigned have, const struct far_facts *f, const struct far_mount_opts *o, bool writable,
				      bool managed);
enum far_tracking far_pointer_tracking(unsigned have, enum far_mechanism m, const struct far_mount_opts *o, bool writable);
/* Both, and what is forced is checked: -EOPNOTSUPP with the reason. */
int far_pointer_settle(unsigned have, const struct far_facts *f, const struct far_mount_opts *o, bool writable, bool managed,
		       enum far_mechanism *m, enum far_tracking *t, struct far_error *err);
/* Why this one would not be chosen; "": it could be. */
const char *far_pointer_why_not(unsigned have, const struct far_facts *f, const struct far_mount_opts *o, bool writable,
				bool managed, enum far_mechanism m);
const char *far_mechanism_word(enum far_mechanism m); /* "share", "move", "continue", "copy", "sigsegv" */
const char *far_tracking_word(enum far_tracking t);   /* "none", "async", "sync", "hash" */
/* In words, for doctor. */
const char *far_pointer_words(enum far_mechanism m);
const char *far_pointer_tracking_words(enum far_tracking t);

#endif
