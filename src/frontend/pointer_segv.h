/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A pointer that is served by SIGSEGV (segv.h): a region whose local store is an anonymous file, and a view of that. */
#ifndef FAR_POINTER_SEGV_H
#define FAR_POINTER_SEGV_H

#include "frontend/pointer.h"
#include "region/region.h"

struct far_segv_pointer;

/* conf->below is owned from success on, unless borrowed. */
int far_segv_pointer_open(const struct far_pointer_conf *conf, struct far_segv_pointer **out, struct far_error *err);
char *far_segv_pointer_addr(const struct far_segv_pointer *p);
struct far_region *far_segv_pointer_region(struct far_segv_pointer *p);
int far_segv_pointer_populate(struct far_segv_pointer *p, uint64_t off, uint64_t len);
int far_segv_pointer_refresh(struct far_segv_pointer *p, uint64_t off, uint64_t len);
/* Fills faults, n_blocked, blocked_at, blocked_ms. */
void far_segv_pointer_status(struct far_segv_pointer *p, struct far_status *st);
void far_segv_pointer_stop(struct far_segv_pointer *p);
void far_segv_pointer_close(struct far_segv_pointer *p);

#endif
