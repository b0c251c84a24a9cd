/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* In which order a region is pulled: a list of runs of chunks, in the end always all of them. */
#ifndef FAR_ORDER_H
#define FAR_ORDER_H

#include "base/base.h"

struct far_order_run {
	uint64_t first, n; /* chunks */
};
struct far_order {
	struct far_order_run *run;
	size_t n;
};

/* "sequential" (also NULL), "ranges:0-1M,900M-" (bytes, end exclusive, open end: to the end), "trace:FILE" (the format
 * is in doc/trace.md), "hint:mp4" (first 1 MiB and last 1/256, at least 2 MiB: where a film's index lies). What is named comes first, the rest follows from the start, as one last run. -EINVAL, or the file's error. */
int far_order_parse(struct far_order *o, const char *text, uint64_t bytes, unsigned shift, struct far_error *err);
/* By falling priority(off); equal ones by rising offset. */
int far_order_by(struct far_order *o, int64_t (*priority)(void *opaque, uint64_t off), void *opaque, uint64_t bytes,
		 unsigned shift);
void far_order_fini(struct far_order *o);
/* "A-B,C-,D" of sizes; calls fn for each range inside [0, bytes). -EINVAL with a sentence. Shared with `wait`. */
int far_ranges_parse(const char *text, uint64_t bytes, int (*fn)(void *opaque, uint64_t off, uint64_t len), void *opaque,
		     struct far_error *err);

/* A recording of first touches. */
struct far_trace;
int far_trace_open(struct far_trace **out, const char *path, uint64_t bytes, unsigned shift, struct far_error *err);
void far_trace_touch(struct far_trace *t, uint64_t chunk, uint64_t n); /* any thread */
int far_trace_close(struct far_trace *t);                             /* writes the file */

#endif
