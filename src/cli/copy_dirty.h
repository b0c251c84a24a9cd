/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* `farpage copy --dirty`: what of a local store its remote lacks. */
#ifndef FAR_COPY_DIRTY_H
#define FAR_COPY_DIRTY_H

#include "base/base.h"

struct copy_dirty;

/* A local store that is not mounted, and its chunk map. */
int copy_dirty_open(const char *src, struct copy_dirty **out, struct far_error *err);
uint64_t copy_dirty_size(const struct copy_dirty *d); /* of the region */
/* Write each unsaved range to the same place in dst. *done: bytes; *at: where it failed; *writing: it was dst's failure. */
int copy_dirty_go(struct copy_dirty *d, struct far_backend *dst, uint64_t *done, uint64_t *at, bool *writing);
void copy_dirty_close(struct copy_dirty *d);

#endif
