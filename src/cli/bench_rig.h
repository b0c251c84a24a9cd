/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Something to measure: a store full of the pattern, perhaps served over loopback, and a mount of it, each in a child
 * process. A child ends by itself when its parent is gone, however that went, and takes mount and files along. */
#ifndef FAR_BENCH_RIG_H
#define FAR_BENCH_RIG_H

#include "base/base.h"

struct bench_rig;

enum bench_store { BENCH_MEM, BENCH_FILE, BENCH_DIR, BENCH_STORES };
enum bench_chunking { BENCH_CHUNK_NONE, BENCH_CHUNK_SERVER, BENCH_CHUNK_CLIENT };

struct bench_rig_conf {
	enum bench_store store;
	bool grpc;                    /* served over grpc://127.0.0.1, else opened by the mount's process */
	enum bench_chunking chunking; /* the store takes whole chunks only: who adapts */
	uint64_t size;
	uint64_t rtt;                 /* ns; the delay layer is left out when rtt and rate are 0 */
	uint64_t rate;                /* bytes a second */
	bool empty;                   /* the store is not filled */
	bool probe;                   /* remember what the delay layer took for each chunk: bench_rig_delay() */
	bool managed;
	int pull_workers;             /* as in far_mount_opts */
	uint64_t chunk, window, dirty_max;
};

struct bench_rig_status {
	struct far_status st;
	uint64_t open_ns; /* from opening the source to a file that can be used */
	uint64_t cpu_ns;  /* of all processes of the rig since the store was full */
	uint64_t rss, touched; /* of the mount's process now; pages it touched to open */
};

int bench_rig_open(const struct bench_rig_conf *conf, struct bench_rig **out, struct far_error *err);
const char *bench_rig_path(const struct bench_rig *r);
int bench_rig_status(struct bench_rig *r, struct bench_rig_status *st);
int bench_rig_flush(struct bench_rig *r);
int bench_rig_wait(struct bench_rig *r, unsigned percent);
/* ns that the delay layer made the last read of the chunk at off wait; 0: there was none. Of a rig with `probe`. */
uint64_t bench_rig_delay(void *rig, uint64_t off);
void bench_rig_close(struct bench_rig *r);

/* Memory that nobody used for a while is slow to come by, above all on a virtual machine that gives it back to its host.
 * Take as much as will be needed (2 GiB at most), and put it back: then it is farpage that is measured. */
void bench_rig_warm(uint64_t bytes);

#endif
