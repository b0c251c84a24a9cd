/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A second chance for what was evicted from memory behind a pointer. Memory has no access bits, so nobody knows which chunks
 * are cold; but one that is touched again soon after its eviction was not. Evicted bytes go into a bounded limbo, as a
 * layer between the region and what is below: a fetch of such a chunk costs no round trip, and marks it as hot.
 */
#ifndef FAR_VICTIM_H
#define FAR_VICTIM_H

#include "backend/backend.h"

struct far_victim;

/* `below` is borrowed until far_victim_own(): from then on it is stopped and closed with the face. At most `most` bytes are kept, chunks of 1 << shift. */
int far_victim_new(struct far_backend *below, unsigned shift, uint64_t most, struct far_victim **out, struct far_backend **face);
void far_victim_own(struct far_victim *v);
/* Before a chunk is looked at in order to be evicted: what far_victim_put() asks for. */
uint64_t far_victim_epoch(struct far_victim *v);
/* The chunk at `off` has been evicted, clean; these were its bytes. */
void far_victim_put(struct far_victim *v, uint64_t off, const void *buf, uint64_t len, uint64_t epoch);
/* Whether the chunk at `off` was fetched from limbo since this was asked last: then it had better stay this time. */
bool far_victim_spare(struct far_victim *v, uint64_t off);
/* What is below has changed: nothing is given from limbo, put there or spared between these two, and it is empty. */
void far_victim_pause(struct far_victim *v);
void far_victim_resume(struct far_victim *v);
uint64_t far_victim_hits(struct far_victim *v);

#endif
