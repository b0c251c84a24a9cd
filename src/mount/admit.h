/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The gate in front of a network remote: calls pass while it is certain that the remote is the one that the local store
 * belongs to and, for a writer, that nobody else may write. See lease.c for who opens it.
 */
#ifndef FAR_ADMIT_H
#define FAR_ADMIT_H

#include "backend/backend.h"

struct far_admit;

/* A layer over inner, closed at first. Calls that find it closed wait, at most max_wait ns (FAR_NEVER: the thread's
 * deadline alone), with -ETIMEDOUT; -EAGAIN with FAR_NOWAIT. inner changes owner only on success. */
int far_admit_new(struct far_backend *inner, uint64_t max_wait, struct far_backend **out, struct far_admit **gate);
/* Before it is opened for the first time: doubt() is called when a call that was let through came back with -ESTALE. The
 * gate is closed then, and the call waits for what far_admit_open() or far_admit_fence() say. NULL: calls just fail. */
void far_admit_on_doubt(struct far_admit *a, void (*doubt)(void *opaque), void *opaque);
/* Open until then, of far_now_slept(); FAR_NEVER: for good. */
void far_admit_open(struct far_admit *a, uint64_t until);
/* Every call fails with -ESTALE from now on. */
void far_admit_fence(struct far_admit *a);

#endif
