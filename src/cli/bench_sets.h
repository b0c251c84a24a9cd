/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The sets of `farpage bench`: what is measured against what. */
#ifndef FAR_BENCH_SETS_H
#define FAR_BENCH_SETS_H

#include "cli/bench_io.h"
#include "cli/bench_out.h"

enum bench_backend { BENCH_ON_OWN = -1, BENCH_ON_MEM, BENCH_ON_FILE, BENCH_ON_DIR, BENCH_ON_GRPC };

struct bench {
	enum far_mode mode;         /* AUTO: both */
	enum bench_backend backend; /* OWN: the set's own */
	uint64_t size, ns, block; /* of a case; 0: the set's own */
	uint64_t rtt;             /* FAR_NEVER: the set's own */
	uint64_t chunk;
	unsigned ops, threads;
	enum bench_way way;
	uint64_t seed;
	/* of pointers only */
	const char *only;         /* one case; NULL: all */
	enum far_mechanism mechanism;
	enum far_tracking tracking;
	bool read_only;
	bool quiet;               /* print no table */
	struct bench_rows rows;
	bool failed;
};

struct bench_set {
	const char *name, *about;
	void (*run)(struct bench *b);
};
extern const struct bench_set bench_sets[]; /* ended by a NULL name */
void bench_pointer(struct bench *b); /* the set "pointer"; the only one with named cases */
bool bench_pointer_has(const char *name);

/* One act on a file that is there already. */
struct bench_act {
	const char *name, *about;
	int (*act)(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
	bool writes, latency; /* the row's value is p50, not a rate */
};
extern const struct bench_act bench_acts[]; /* ended by a NULL name */
/* CLI_OK, CLI_FAILED or CLI_USAGE, the message printed. */
int bench_on(struct bench *b, const struct bench_act *act, const char *path);

#endif
