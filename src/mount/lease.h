/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The right to write, as a mount holds it; and the moment when a remote that was out of reach is found to be the right
 * one. See lease.c. */
#ifndef FAR_LEASE_H
#define FAR_LEASE_H

#include "mount/admit.h"
#include "mount/kept.h"

struct far_leaser;

struct far_leaser_conf {
	struct far_backend *remote;  /* the stack below the gate; stays the caller's */
	struct far_admit *gate;      /* NULL: none, the remote is on this host */
	struct far_kept *kept;       /* the caller's */
	const char *target;          /* shown to others as where it is mounted */
	bool writable;               /* a lease is wanted */
	bool take_over;
	bool alone;                  /* a store on this host that is locked for us: who had the lease is dead */
	bool may_be_offline;         /* there is a local copy to begin with */
	bool offline;                /* it is known to be: do not ask now */
	uint64_t deadline;           /* ns: how long a dead holder is waited for */
	/* From the thread of the leaser: the lease was granted or renewed (or, read-only, the remote was found); somebody
	 * else owns the region now, and one sentence about it. */
	void (*heard)(void *opaque, const struct far_origin *o);
	void (*fenced)(void *opaque, const struct far_origin *o, const char *why);
	void *opaque;
};

/* Ask once, and wait for a dead holder. 0; then far_leaser_offline() says whether the remote was reached. -EBUSY,
 * -ESTALE ... with the sentence. */
int far_leaser_open(const struct far_leaser_conf *conf, struct far_leaser **out, struct far_error *err);
bool far_leaser_offline(const struct far_leaser *l); /* at the start */
bool far_leaser_found(struct far_leaser *l); /* the remote was reached and is the right one */
void far_leaser_origin(struct far_leaser *l, struct far_origin *o); /* the newest that is known; all 0: nothing is */
enum far_lease_state far_leaser_state(struct far_leaser *l);
/* A read-only mount that began offline asks by itself: 0, or -errno with a sentence if that is for good. */
int far_leaser_find(struct far_leaser *l, struct far_error *err);
/* Renew from now on, on a thread. */
int far_leaser_start(struct far_leaser *l);
/* Ask no more, and give the lease back if it is held; nothing is pushed afterwards. May be called again. */
void far_leaser_release(struct far_leaser *l);
/* The thread ends soon; for who is about to stop the remote. */
void far_leaser_stop(struct far_leaser *l);
void far_leaser_close(struct far_leaser *l);

#endif
