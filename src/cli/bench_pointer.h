/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A pointer to be measured: one child of the bench maps a region of the pattern, does one act on it and ends. A child, so
 * that the bench stays free of threads while it forks, and each act finds a process without history.
 */
#ifndef FAR_BENCH_POINTER_H
#define FAR_BENCH_POINTER_H

#include "base/base.h"

struct pointer_work;

struct pointer_conf {
	int (*act)(struct pointer_work *w);
	enum far_mechanism mechanism;
	enum far_tracking tracking;
	enum far_mode mode;
	bool read_only;
	bool share;        /* the store's pages may be mapped as they are */
	bool grpc;         /* the store is another process, over loopback */
	int pull_workers, push_workers; /* as in far_mount_opts */
	uint64_t size, chunk, rtt, rate;
	unsigned ops, threads;
	uint64_t seed;
};

/* Times in ns. What an act does not measure stays 0. */
struct pointer_result {
	int code;                   /* negative errno */
	struct far_error err;
	uint64_t bytes, ns, open_ns; /* of the act; ns counts open_ns where an act begins with mapping */
	uint64_t p50, p99, longest;
	uint64_t wrong;             /* bytes */
	uint64_t cpu_ns;            /* of the child meanwhile */
	uint64_t huge;              /* bytes of the memory that are mapped in huge pages at the end */
	double value;               /* of acts whose figure is none of these */
	struct far_status st;
	char note[160];
};

/* The child's own failure is in res->code; else 0. */
int bench_pointer_run(const struct pointer_conf *conf, struct pointer_result *res);

/* The acts (bench_pointer_acts.c). */
int bench_pointer_seq(struct pointer_work *w);    /* map, then touch each page in order */
int bench_pointer_share(struct pointer_work *w);  /* map, populate, read every word */
int bench_pointer_single(struct pointer_work *w); /* touch a page of each of `ops` chunks at random */
int bench_pointer_read(struct pointer_work *w);   /* read every word when all is local */
int bench_pointer_store(struct pointer_work *w);  /* store into each page: p50 the first time, ns the second; of one page */
int bench_pointer_find(struct pointer_work *w);   /* find a hundredth of the pages that were stored into */
int bench_pointer_pull(struct pointer_work *w);   /* map, then wait until all is local */
int bench_pointer_absent(struct pointer_work *w); /* `threads` touch as many absent chunks at once */
int bench_pointer_trace(struct pointer_work *w);  /* touch `ops` chunks at random, and again with the trace of that */

/* bench_picture.c: a run of a pointer on which everything happens, and its chunk map over time as an SVG. */
int bench_picture(const char *path, struct far_error *err);

#endif
