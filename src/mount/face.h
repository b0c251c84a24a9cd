/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What stands behind far_mount_*() of farpage.h. One table for each way in which a program can have a region: as a file
 * that a child serves (child.c), as memory here (map.c), as memory that another process serves. An object begins with
 * struct far_mount; its constructor sets `ops`.
 */
#ifndef FAR_FACE_H
#define FAR_FACE_H

#include "base/base.h"

enum far_face_range {
	FAR_FACE_PIN,
	FAR_FACE_UNPIN,
	FAR_FACE_EVICT,
	FAR_FACE_POPULATE,
	FAR_FACE_DISCARD,
	FAR_FACE_HEAL,
	FAR_FACE_STORED,
};

/* path, fd and addr may be NULL: the face has none. What a face cannot do with a range is -EOPNOTSUPP. */
struct far_face_ops {
	const char *(*path)(const struct far_mount *m);
	int (*fd)(struct far_mount *m);
	void *(*addr)(const struct far_mount *m);
	int (*flush)(struct far_mount *m);
	int (*wait)(struct far_mount *m, unsigned percent, int timeout_ms);
	int (*wait_range)(struct far_mount *m, uint64_t off, uint64_t len, int timeout_ms);
	int (*range)(struct far_mount *m, enum far_face_range what, uint64_t off, uint64_t len);
	int (*status)(struct far_mount *m, struct far_status *st);
	int (*close)(struct far_mount *m); /* frees m */
};

struct far_mount {
	const struct far_face_ops *ops;
};

#endif
