/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The open files of a directory backend: a bounded number of them, least recently used out. For dir.c alone. */
#ifndef FAR_DIR_FILES_H
#define FAR_DIR_FILES_H

#include "base/base.h"

struct far_dir_files;
struct far_dir_file;

/* `dir` stays the caller's. */
int far_dir_files_open(int dir, uint64_t chunk, bool writable, unsigned max_open, struct far_dir_files **out);
void far_dir_files_stop(struct far_dir_files *d);
void far_dir_files_close(struct far_dir_files *d);

/* The open file of a chunk, in use until far_dir_files_put(). -ENOENT: there is none (never when `create`, which makes
 * one of a whole chunk). FAR_NOWAIT: -EAGAIN unless it is open. Waits while all are in use; honours the thread's
 * deadline. */
int far_dir_files_get(struct far_dir_files *d, uint64_t index, bool create, unsigned flags, struct far_dir_file **out);
void far_dir_files_put(struct far_dir_files *d, struct far_dir_file *f, bool wrote);
int far_dir_file_fd(const struct far_dir_file *f);

/* Remove the file of a chunk, or punch it when somebody else is using it. */
int far_dir_files_remove(struct far_dir_files *d, uint64_t index);

/* A name in the directory was changed by the caller: the next flush makes it durable. */
void far_dir_files_renamed(struct far_dir_files *d);
/* Everything that was put as written before, and the names, are on the disk after 0. */
int far_dir_files_flush(struct far_dir_files *d);

#endif
