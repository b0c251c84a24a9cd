/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* How far something is, on standard error: a bar that is drawn over itself on a terminal, a line for each tenth else. */
#ifndef FAR_PROGRESS_H
#define FAR_PROGRESS_H

#include "base/base.h"

struct progress {
	char head[400];    /* what stands before the bar: "hostb/app.db  256 MiB  managed (round trip 40 ms)" */
	char name[200];    /* how plain lines begin: "hostb/app.db" */
	uint64_t total;    /* 0: unknown */
	bool tty, drawn, quiet;
	unsigned tenth;
	size_t width;      /* of the line that stands on the terminal */
	uint64_t began, last, seen_at, seen; /* for progress_rate() */
	double rate;
};

void progress_init(struct progress *p, const char *name, const char *head, uint64_t total, bool quiet);
/* done of total, moving at rate bytes a second. Draws at most ten times a second. */
void progress_update(struct progress *p, uint64_t done, double rate);
/* A rate for callers that have none: smoothed over about a second. */
double progress_rate(struct progress *p, uint64_t done);
/* The last line: "HEAD  TEXT" over the bar on a terminal, "NAME  TEXT" else. NULL: only end the line. */
void progress_end(struct progress *p, const char *text);

/* Take the bar off the terminal: what is printed next stands in its place. */
void progress_clear(struct progress *p);

/* "256 MiB", "1.5 GiB", "25 MB/s"; buf holds at least 24. */
const char *progress_size(char *buf, size_t n, uint64_t bytes);
const char *progress_speed(char *buf, size_t n, double rate);

#endif
