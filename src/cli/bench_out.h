/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The rows that `farpage bench` has measured, and how they are shown: a table as they come, JSON or a picture at the end. */
#ifndef FAR_BENCH_OUT_H
#define FAR_BENCH_OUT_H

#include "base/base.h"

struct bench_row {
	const char *set;     /* "rtt" */
	char series[32];     /* "managed": one line in the picture */
	char x[32];          /* "40 ms": the place on its axis */
	char how[120];       /* the mechanism: "file <- FUSE <- delay <- memory" */
	double value;        /* what the picture shows */
	const char *unit;    /* of value: "MiB/s", "us", ... */
	double with_open;    /* value with the time to open counted; 0: the same */
	double open_ms;
	double p50_us, p99_us, longest_us; /* 0: not measured */
	double cpu_s_gib;    /* of all ends, for each GiB; 0: not measured */
	uint64_t checked, wrong; /* bytes held against the pattern, bytes that differ */
	char note[200];      /* "skip: ...", "failed: ..." or what else is to be said */
	bool skipped, failed;
};

struct bench_rows {
	struct bench_row *v;
	size_t n;
};

void bench_rows_add(struct bench_rows *rows, const struct bench_row *row); /* aborts without memory */
void bench_rows_free(struct bench_rows *rows);
/* One line of the table; a heading before the first of a set. */
void bench_row_print(const struct bench_row *row, const struct bench_row *before);
void bench_rows_json(const struct bench_rows *rows);
/* A chart for each set. 0 or -errno. */
int bench_rows_svg(const struct bench_rows *rows, const char *path);

#endif
