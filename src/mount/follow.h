/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A read-only mount sees what others write: see follow.c. */
#ifndef FAR_FOLLOW_H
#define FAR_FOLLOW_H

#include "mount/admit.h"
#include "region/region.h"

struct far_fuse;
struct far_pointer;
struct far_follower;

struct far_follower_conf {
	struct far_backend *remote;  /* the stack below the gate; stays the caller's, as do the others */
	struct far_region *region;   /* NULL: a direct mount, or a pointer's own */
	struct far_fuse *fuse;       /* one of these two is set */
	struct far_pointer *pointer;
	struct far_admit *gate;      /* NULL: none */
	const char *source;
	uint64_t interval;           /* ns */
	bool once;                   /* only see what changed while the remote was out of reach, then stay frozen */
	struct far_origin from;      /* what was there before the first byte was read; all 0: not known, the remote was away */
	/* NULL: it was found already. Else the remote was out of reach, `from` is what the local copy knows: 0 when it is
	 * there and the right one; the gate is opened when what has changed since is forgotten. */
	int (*find)(void *opaque, struct far_error *err);
	void (*heard)(void *opaque, const struct far_origin *o); /* everything up to here is seen; on the follower's thread */
	void *opaque;
};

int far_follower_open(const struct far_follower_conf *conf, struct far_follower **out);
enum far_follow far_follower_state(struct far_follower *f);
/* It ends soon; for who is about to stop the remote. */
void far_follower_stop(struct far_follower *f);
void far_follower_close(struct far_follower *f);

#endif
