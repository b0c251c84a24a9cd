/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One suite of checks, run over a list of subjects: every backend, every layer over memory, every wire. To add one:
 * an array of them in a file of this folder, ended by one without a name, and its line in `others` of contract.c.
 */
#ifndef CONTRACT_H
#define CONTRACT_H

#include "base/base.h"

enum contract_flags {
	CONTRACT_FORGETS = 1 << 0,   /* writes are not kept: only zeros and codes are checked */
	CONTRACT_SPARSE = 1 << 1,    /* 1 TiB costs nothing */
	CONTRACT_NO_READ_ONLY = 1 << 2, /* cannot be opened read-only by far_open_opts */
	CONTRACT_SLOW = 1 << 3,      /* a call costs more than 50 us: fewer rounds */
	CONTRACT_CLOSES = 1 << 4,    /* close() closes the backend, too */
	CONTRACT_BLIND = 1 << 5,     /* sparse, but calls holes data that it has not looked at */
};

struct contract_subject {
	const char *name;
	/* Open a fresh region of `bytes`, all zeros. `dir` is an empty directory that may be used. *ctx is given to close,
	 * after far_close(b). opts is never NULL; with read_only, the region may have been made by a first open. */
	int (*open)(const struct contract_subject *s, const char *dir, uint64_t bytes, const struct far_open_opts *opts,
		    struct far_backend **b, void **ctx);
	void (*close)(void *ctx); /* may be NULL */
	/* What this machine lacks for it; NULL, also from it: nothing. Its checks are skipped then. */
	const char *(*lacks)(const struct contract_subject *s);
	unsigned flags;
	/* of the subjects that are made of a URI and layers: %d is the directory, %s the size */
	const char *uri;
	const char *layers[6]; /* innermost first */
};

/* open of those */
int contract_open_uri(const struct contract_subject *s, const char *dir, uint64_t bytes,
		      const struct far_open_opts *opts, struct far_backend **b, void **ctx);

#endif
