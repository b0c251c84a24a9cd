/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Moves or compares all bytes of one backend with many workers; see copy_engine.c. */
#ifndef FAR_COPY_ENGINE_H
#define FAR_COPY_ENGINE_H

#include "base/base.h"

struct copy_engine;

struct copy_conf {
	struct far_backend *src;
	struct far_backend *dst; /* NULL: out_fd is the destination, written in order */
	int out_fd;
	bool verify;             /* compare src with dst instead of writing */
	bool fresh;              /* dst holds only zeros: zeros need not be written */
	bool sink;               /* dst forgets what it gets: do not look for zeros */
	uint64_t piece;          /* bytes a call; a multiple of both backends' chunks */
	unsigned workers;
};

struct copy_result {
	uint64_t done;    /* bytes that are dealt with, zeros included */
	uint64_t zeros;   /* of them: known or found to be zeros */
	int error;        /* 0 or -errno; -ESHUTDOWN after copy_stop() */
	uint64_t at;      /* where the error, or the first difference, is */
	bool differs;     /* verify: there is a difference, at `at` */
	bool writing;     /* the error is dst's */
};

int copy_start(const struct copy_conf *conf, struct copy_engine **out, struct far_error *err);
/* Wait until the end or far_now() == until; true: all workers have ended. *res is filled either way. */
bool copy_wait(struct copy_engine *e, uint64_t until, struct copy_result *res);
void copy_stop(struct copy_engine *e);
/* After copy_wait() gave true. */
void copy_free(struct copy_engine *e);

#endif
