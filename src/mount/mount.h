/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A mount served by this process: what `farpage mount` and the child farpage-serve run. A program that wants to use the
 * file itself goes through far_mount_open() in farpage.h, which puts this into a child.
 */
#ifndef FAR_MNT_H
#define FAR_MNT_H

#include "backend/backend.h"
#include "region/persist.h"

struct far_mnt;

struct far_mnt_conf {
	struct far_backend *remote;       /* layers already around it; owned by the mount, which also closes it when open fails */
	struct far_persist *persist;      /* the local store's map (far_kept_open()); NULL: none. Owned as the remote is */
	const char *source;               /* its URI, for messages and `mount` */
	const char *name;                 /* of the file inside a directory */
	const char *target;
	bool network;                     /* the URI names a network peer: AUTO measures the round trip */
	bool offline;                     /* the remote was opened by what the map knows and has not been reached */
	bool pointer;                     /* shown as memory of this process, not as a file: `target` is only said to others */
	bool socket;                      /* shown as an NBD server on the socket nbd.sock in the directory `target` */
	struct far_handover *given;       /* with `pointer`: as memory of another process; taken on success */
	bool asked_managed;               /* an option that only a managed mount has was given */
	char *const *local_layers;        /* --local-layer, outermost first */
	size_t n_local_layers;
	struct far_mount_opts opts;       /* chunk and the rest; strings are borrowed until close, a local_backend is owned as
					   * the remote is */
};

/* Opens the region (pulling starts), then the frontend, in parallel with the pull. */
int far_mnt_open(const struct far_mnt_conf *conf, struct far_mnt **out, struct far_error *err);
const char *far_mnt_path(const struct far_mnt *m);
enum far_mode far_mnt_mode(const struct far_mnt *m);
const char *far_mnt_why(const struct far_mnt *m); /* "managed (round trip 40 ms)", "direct (round trip 0.1 ms)" ... */
/* What fsync does, for a thread of this process (which must never fsync its own mount). Honours the deadline. */
int far_mnt_flush(struct far_mnt *m);
/* The same, and whatever --durable says all of it is on the remote. */
int far_mnt_push(struct far_mnt *m);
int far_mnt_wait(struct far_mnt *m, uint64_t off, uint64_t len);
int far_mnt_wait_percent(struct far_mnt *m, unsigned percent);
int far_mnt_prefetch(struct far_mnt *m, uint64_t off, uint64_t len);
int far_mnt_evict(struct far_mnt *m, uint64_t off, uint64_t len);
int far_mnt_pin(struct far_mnt *m, uint64_t off, uint64_t len, bool pin);
void far_mnt_status(struct far_mnt *m, struct far_status *st);
uint64_t far_mnt_bytes(const struct far_mnt *m); /* the region's size */
/* Of a pointer; -EOPNOTSUPP for a file. */
void *far_mnt_addr(const struct far_mnt *m);
int far_mnt_populate(struct far_mnt *m, uint64_t off, uint64_t len);
int far_mnt_discard(struct far_mnt *m, uint64_t off, uint64_t len);
int far_mnt_heal(struct far_mnt *m, uint64_t off, uint64_t len);
int far_mnt_stored(struct far_mnt *m, uint64_t off, uint64_t len);
/* True once somebody else has unmounted it. Waits until `until`. */
bool far_mnt_ended(struct far_mnt *m, uint64_t until);
/*
 * The orderly end: before_flush, flush, before_close, unmount. If a program still holds the file: flush, write the
 * holders ("sqlite3 (4711)") to holders, detach, serve open handles until they close or `until` passes, flush again.
 * 0, or the flush's error: then dirty bytes are left (far_mnt_status). With a chunk map the file is gone all the same, else
 * the mount still stands, to be tried again or far_mnt_close()d.
 */
int far_mnt_finish(struct far_mnt *m, uint64_t until, char *holders, size_t holders_len);
/* Give up: blocked calls end, nothing is flushed, everything is freed. After far_mnt_finish() it only frees. */
void far_mnt_close(struct far_mnt *m);

#endif
