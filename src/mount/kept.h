/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A local store that lasts: where its chunk map is, and whether what it holds belongs to the remote that is there. */
#ifndef FAR_KEPT_H
#define FAR_KEPT_H

#include "region/persist.h"

/* The map's path for a local store's URI, malloc'd: `map` if given, else the store's path and ".farmap". NULL: the store
 * is memory and nothing lasts. -EINVAL: a block device without `map`, or `map` with a store in memory. */
int far_kept_path(const char *local, const char *map, char **out, struct far_error *err);
/* Open the map of the options' local store; *out is NULL when nothing lasts. */
int far_kept_open(const struct far_mount_opts *o, struct far_persist **out, struct far_error *err);
/* The map of a local store or of a map's own path ("file:X", "dir:X", "X.farmap"), for looking at it. *local gets the
 * store's URI, malloc'd. */
int far_kept_find(const char *what, enum far_persist_mode mode, char **local, struct far_persist **out,
		  struct far_error *err);
/* The store that a map belongs to must be there with its size: a new empty one would read as zeros. */
int far_kept_check_store(const char *local, const struct far_persist *p, struct far_error *err);
/* "~12.0 MiB": an upper bound of what the remote lacks. */
uint64_t far_kept_dirty(const struct far_persist_info *i);
/* Whether we were the last to write what this map was filled from. */
bool far_kept_ours(const struct far_persist_info *i);

/*
 * The remote has been reached: does what is kept belong to it? o NULL: the peer tells nothing of its content. If not,
 * and opts say so and the region is not open yet, forget clean chunks. 0; -EINVAL (another size); -ESTALE with the sentence.
 */
struct far_kept {
	struct far_persist *p;
	const struct far_mount_opts *o;
	const char *source;
	bool open;      /* the region is: nothing can be forgotten any more */
	bool forgotten; /* answer: clean chunks were forgotten */
	bool behind;    /* answer: read-only, and others have written since: follow.c has to catch up from what the map knows */
};
int far_kept_check(struct far_kept *k, const struct far_facts *f, const struct far_origin *o, struct far_error *err);
/* The same sentence for what a lease was refused with. o: what is there. */
int far_kept_refuse(struct far_kept *k, const struct far_origin *o, struct far_error *err);

#endif
