/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What `farpage bench` does to a file and measures: any file, a mount of ours or of somebody else's. The content is a
 * pattern that depends on the offset alone, so whoever reads can check what came without having been told.
 */
#ifndef FAR_BENCH_IO_H
#define FAR_BENCH_IO_H

#include "base/base.h"

enum bench_way { BENCH_BUFFERED, BENCH_DIRECT, BENCH_MAPPED };

struct bench_io {
	const char *path;
	struct far_backend *remote; /* bench_random(): instead of the file, by far_read(); else NULL */
	uint64_t size;       /* bytes at the start of the file that are used; a multiple of 4096 */
	uint64_t block;      /* of one read or write */
	uint64_t chunk;      /* acts on distinct chunks: how far apart they may be at least */
	uint64_t ns;         /* acts that repeat: how long */
	unsigned ops;        /* acts that count: how many */
	unsigned threads;
	enum bench_way way;
	uint64_t seed;
	/* How much of the time of the read at this offset a part below has to answer for (the delay layer); 0 as long as
	 * there was none. The times of bench_first() are what is above it. NULL: nothing. */
	uint64_t (*less)(void *opaque, uint64_t off);
	void *opaque;
};

/* Times in ns. What an act does not measure stays 0. */
struct bench_io_result {
	uint64_t bytes, ops, ns;   /* moved, calls, from the first to the last */
	uint64_t p50, p99, longest; /* of one call */
	uint64_t idle_p99, busy_p99; /* absent: of a local read before and meanwhile */
	uint64_t wrong;            /* bytes that differ from the pattern; an act goes on after them */
};

/* The bytes that belong at off. */
void bench_pattern(void *buf, uint64_t off, size_t len);
/* How many of len bytes differ from what belongs at off. `pages`: look at one word of each 4 KiB only. */
uint64_t bench_check(const void *buf, uint64_t off, size_t len, bool pages);

/* Each returns 0 or -errno, with the file's path and the step that failed in err. */

/* Write the pattern over [0, size), then fsync. ns counts both, longest is of one write. */
int bench_fill(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* Read [0, size) from start to end by blocks, one word of each page checked while the clock runs. Opening is counted.
 * The page cache is as it is. Stops early after ns if that is not 0. */
int bench_read(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* The same with every byte checked, untimed. */
int bench_verify(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* Reads of `block` at random aligned offsets for ns, by `threads`. */
int bench_random(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* `ops` reads of 4 KiB in distinct chunks, in random order, one after the other; stops early after ns if that is not 0. */
int bench_first(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* `threads` read 4 KiB each of distinct chunks of [chunk, size) all at once; longest is the last one's time. Meanwhile
 * another thread reads the first chunk, which is local by then. */
int bench_absent(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* `ops` writes of `block` bytes of the pattern to distinct chunks. */
int bench_scatter(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* Writes of `block` bytes of the pattern for ns, in order and round again, or at random. No fsync. */
int bench_write(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
int bench_rewrite(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* Writes of `block` bytes in order, an fsync after each, for ns or, if that is 0, `ops` of them. */
int bench_sync(const struct bench_io *io, struct bench_io_result *res, struct far_error *err);
/* Drop what the page cache has of the file: fdatasync, then advice. */
int bench_drop(const char *path, struct far_error *err);

#endif
