/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Attaching a FUSE connection to a path and taking it off again; private to the file frontend. */
#ifndef FAR_FUSE_MOUNT_H
#define FAR_FUSE_MOUNT_H

#include "base/base.h"

struct far_fuse_mount_conf {
	const char *target; /* absolute, exists */
	const char *shown;  /* the target as the user wrote it, for messages */
	const char *source; /* what `mount` shows */
	bool dir;
	bool read_only;
};

/* Mount and give the connection's descriptor. With mount(2) where that is allowed, else through fusermount3. */
int far_fuse_mount_attach(const struct far_fuse_mount_conf *conf, int *fd, struct far_error *err);
/* The device number of what is mounted on `target` (the topmost), and whether it is a region. 1, 0: nothing is, -errno:
 * the list of mounts cannot be read now. */
int far_fuse_mount_find(const char *target, unsigned *major, unsigned *minor, bool *ours);
/* 0, -EBUSY (only if not lazy), or another code. */
int far_fuse_mount_detach(const char *target, bool lazy);
/* A descriptor that ends connection `minor` when something is written to it; -1 when there is no way to get one. */
int far_fuse_mount_abort_fd(unsigned minor);
/* How far the kernel reads ahead. Needs root; best effort. */
void far_fuse_mount_read_ahead(unsigned major, unsigned minor, unsigned kib);

#endif
