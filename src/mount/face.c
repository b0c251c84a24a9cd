/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The functions of farpage.h that work on any face: see face.h. */
#include "mount/face.h"

const char *far_path(const struct far_mount *m)
{
	return m->ops->path ? m->ops->path(m) : NULL;
}

int far_fd(struct far_mount *m)
{
	return m->ops->fd ? m->ops->fd(m) : -EOPNOTSUPP;
}

void *far_addr(const struct far_mount *m)
{
	return m->ops->addr ? m->ops->addr(m) : NULL;
}

int far_mount_flush(struct far_mount *m)
{
	return m->ops->flush(m);
}

int far_mount_wait(struct far_mount *m, unsigned percent, int timeout_ms)
{
	return m->ops->wait(m, percent, timeout_ms);
}

int far_mount_wait_range(struct far_mount *m, uint64_t off, uint64_t len, int timeout_ms)
{
	return m->ops->wait_range(m, off, len, timeout_ms);
}

int far_mount_pin(struct far_mount *m, uint64_t off, uint64_t len)
{
	return m->ops->range(m, FAR_FACE_PIN, off, len);
}

int far_mount_unpin(struct far_mount *m, uint64_t off, uint64_t len)
{
	return m->ops->range(m, FAR_FACE_UNPIN, off, len);
}

int far_mount_evict(struct far_mount *m, uint64_t off, uint64_t len)
{
	return m->ops->range(m, FAR_FACE_EVICT, off, len);
}

int far_mount_populate(struct far_mount *m, uint64_t off, uint64_t len)
{
	return m->ops->range(m, FAR_FACE_POPULATE, off, len);
}

int far_mount_discard(struct far_mount *m, uint64_t off, uint64_t len)
{
	return m->ops->range(m, FAR_FACE_DISCARD, off, len);
}

int far_mount_heal(struct far_mount *m, uint64_t off, uint64_t len)
{
	return m->ops->range(m, FAR_FACE_HEAL, off, len);
}

int far_mount_stored(struct far_mount *m, uint64_t off, uint64_t len)
{
	return m->ops->range(m, FAR_FACE_STORED, off, len);
}

int far_mount_status(struct far_mount *m, struct far_status *st)
{
	return m->ops->status(m, st);
}

int far_mount_close(struct far_mount *m)
{
	return m ? m->ops->close(m) : 0;
}
