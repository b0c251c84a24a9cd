/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What mount.c and mount_pointer.c share. */
#ifndef FAR_MNT_INT_H
#define FAR_MNT_INT_H

#include "mount/mount.h"

#include "frontend/fuse.h"
#include "frontend/pointer.h"
#include "mount/follow.h"
#include "mount/lease.h"
#include "region/region.h"

#include <stdatomic.h>

struct far_mnt {
	struct far_mount_opts o;
	enum far_mode mode;
	char why[96];
	char *source;
	uint64_t bytes;
	bool writable;
	bool alone;                   /* the remote is a store here, locked for us */
	bool aside;                   /* another mount keeps the local store: see aside.h */
	struct far_kept kept;         /* what is local, and whether it belongs to this remote */
	struct far_backend *below;    /* the stack under the gate: for questions that must not wait for it */
	struct far_admit *gate;       /* NULL: none */
	struct far_origin heard;      /* the last that the map was told; of the thread of the leaser or follower */
	struct far_leaser *leaser;    /* NULL: a store on this host that is not managed */
	struct far_follower *follower; /* NULL: writable */
	struct far_backend *remote;   /* the whole stack; owned by the region or the pointer, if there is one */
	struct far_handover *given;   /* while it is opened: another process' memory */
	bool wants_pointer;           /* the frontend is one, or will be */
	struct far_region *region;    /* NULL when direct, or when the pointer's own is the only one */
	struct far_fuse *fuse;        /* NULL once unmounted, or if it is a pointer */
	struct far_pointer *pointer;  /* NULL: a file, or a socket */
	struct far_server *server;    /* NULL: no socket */
	struct far_backend *shown;    /* what it serves */
	_Atomic(struct far_fuse *) ready; /* the frontend, once mounted */
	bool local_taken;             /* o.local_backend belongs to the region, or is closed */
	struct far_backend *local;    /* the region's; NULL if it may lose chunks again by itself */
	_Atomic bool all_local;       /* whoever of this and `ready` comes second tells the frontend */
	char *path;
	uint64_t deadline;            /* ns; FAR_NEVER: wait */
};

/* What a region below a pointer is told: bounds, hooks and recordings are the pointer's. */
void far_mnt_pointer_inner(const struct far_mnt *m, struct far_mount_opts *o);
int far_mnt_pointer_open(struct far_mnt *m, struct far_error *err);
int far_mnt_socket_open(struct far_mnt *m, const struct far_mnt_conf *conf, struct far_error *err);
void far_mnt_socket_close(struct far_mnt *m);
int far_mnt_pointer_flush(struct far_mnt *m);
int far_mnt_pointer_wait_percent(struct far_mnt *m, uint64_t bytes);
void far_mnt_pointer_status(struct far_mnt *m, struct far_status *st);
/* What the program sees is made of this region's chunks; NULL: there is none. */
struct far_region *far_mnt_top(struct far_mnt *m);

#endif
