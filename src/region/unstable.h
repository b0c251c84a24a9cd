/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Which chunks were pushed but not yet covered by a flush of the remote. Plain data: the push lock guards all but
 * far_unstable_has(). */
#ifndef FAR_UNSTABLE_H
#define FAR_UNSTABLE_H

#include "base/base.h"

#include <stdatomic.h>

/* Bit i: chunk i. `sum` has a bit for each word that is not zero, so that a large map with few bits is walked quickly. */
struct far_unstable_set {
	_Atomic uint64_t *word;
	uint64_t *sum;
	bool any;
};

struct far_unstable {
	struct far_unstable_set fresh;   /* pushed since the last flush of the remote began */
	struct far_unstable_set covered; /* a flush that runs covers them, or one that failed would have */
	uint64_t words, since;           /* since: time of the oldest, FAR_NEVER: none */
};

int far_unstable_init(struct far_unstable *u, uint64_t chunks); /* -ENOMEM */
void far_unstable_fini(struct far_unstable *u);
void far_unstable_add(struct far_unstable *u, uint64_t first, uint64_t n);
/* Any thread, without the lock. A chunk that moves from fresh to covered is seen all the time. */
bool far_unstable_has(const struct far_unstable *u, uint64_t i);
static inline bool far_unstable_any(const struct far_unstable *u)
{
	return u->fresh.any || u->covered.any;
}
/* A flush of the remote begins; one at a time. */
void far_unstable_cover(struct far_unstable *u);
/* It went well; it began at `began`. */
void far_unstable_settle(struct far_unstable *u, uint64_t began);
/* Call fn for each, then forget them all. */
void far_unstable_take(struct far_unstable *u, void (*fn)(void *opaque, uint64_t i), void *opaque);

#endif
