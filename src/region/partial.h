/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Which bytes of a half-written chunk are here. Plain data without a lock: the chunk map guards it. */
#ifndef FAR_PARTIAL_H
#define FAR_PARTIAL_H

#include "base/base.h"

#define FAR_PARTIAL_SECTOR 512u
#define FAR_PARTIAL_RAGGED 2

/* Whole sectors in a bitmap, and up to two sectors of which one range is here. The chunk's last sector may be short. */
struct far_partial {
	struct far_partial *next; /* of the chunk map's table */
	uint64_t chunk;
	uint64_t len; /* of the chunk */
	uint32_t sectors, n_valid;
	unsigned n_ragged; /* entries of ragged that are used */
	unsigned pending;  /* entries that writers on their way may still need */
	bool again;        /* written while a copy was on its way to the remote */
	struct {
		uint32_t sector;
		uint16_t from, to;
	} ragged[FAR_PARTIAL_RAGGED];
	uint64_t valid[];
};

/* Nothing is here yet. NULL without memory; free() it. */
struct far_partial *far_partial_new(uint64_t chunk, uint64_t len);
/* How many new ragged entries a write of [from, to) needs. */
unsigned far_partial_ragged(const struct far_partial *e, uint64_t from, uint64_t to);
/* [from, to) is here now. The ragged entries that it needs are free. */
void far_partial_add(struct far_partial *e, uint64_t from, uint64_t to);
static inline bool far_partial_whole(const struct far_partial *e)
{
	return e->n_valid == e->sectors;
}
/* Nothing is here, and no writer is on its way: the only one failed. */
static inline bool far_partial_empty(const struct far_partial *e)
{
	return !e->n_valid && !e->n_ragged && !e->pending;
}
/* The next range at or after *from that is not here. False: no more. */
bool far_partial_missing(const struct far_partial *e, uint64_t *from, uint64_t *to);
/* The next range at or after *from that is here. */
bool far_partial_present(const struct far_partial *e, uint64_t *from, uint64_t *to);
/* All of *e in `out`, which was made for the same chunk. */
void far_partial_copy(struct far_partial *out, const struct far_partial *e);

#endif
