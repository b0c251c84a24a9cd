/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Receivers of page faults: one a CPU that the process may use, all on one userfaultfd. Every region in memory of this
 * process is a member of one pager; another process' memory has a pager of its own.
 */
#ifndef FAR_PAGER_H
#define FAR_PAGER_H

#include "frontend/memory.h"

struct far_receivers;
struct far_member;

/* This process' own, made for the first and ended after the last who asks. have: enum far_uffd_have. */
int far_receivers_get(unsigned have, struct far_receivers **out, struct far_error *err);
/* Of a descriptor that was handed over, which is taken on success. ended(opaque) is called once, on a thread of the
 * receivers, when its process is gone; nobody looks for that where the caller does, who has its pidfd. */
int far_receivers_new(int uffd, bool has_pidfd, void (*ended)(void *opaque), void *opaque, struct far_receivers **out, struct far_error *err);
void far_receivers_put(struct far_receivers *v);
int far_receivers_uffd(const struct far_receivers *v);
/* Returns when all changes of mappings that had begun are noted. Not on a receiver that still has its seat. */
void far_receivers_settle_cb(void *receivers);

struct far_member_conf {
	struct far_memory *memory;
	struct far_region *region;
	bool writable;
	bool ours;           /* memory of this process */
	uint64_t deadline;   /* ns that a fault may wait; FAR_NEVER: for ever */
	const char *source;  /* for messages; borrowed */
};
/* From now on faults of this memory are served. */
int far_member_add(struct far_receivers *v, const struct far_member_conf *conf, struct far_member **out);
/* Blocked faults end with SIGBUS. */
void far_member_stop(struct far_member *x);
/* Returns when no thread serves it any more. */
void far_member_remove(struct far_member *x);
/* Fills faults, n_blocked, blocked_at, blocked_ms. */
void far_member_status(struct far_member *x, struct far_status *st);
/* Wait until what the program has dropped so far has been told. Honours the thread's deadline. */
int far_member_settle(struct far_member *x);
/* Wait until nobody is blocked, or `until`. */
bool far_member_wait_idle(struct far_member *x, uint64_t until);

#endif
