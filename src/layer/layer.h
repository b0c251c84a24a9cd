/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Layers wrap a backend and look like one. Each has one file, an option table, and an entry in far_layers. */
#ifndef FAR_LAYER_H
#define FAR_LAYER_H

#include "backend/backend.h"

struct far_opt;

struct far_layer {
	const char *name;
	const char *help;                /* one line */
	const struct far_opt *options;   /* of `conf` */
	size_t conf_size;
	/* conf is filled with defaults by `defaults` (may be NULL: zeros), then parsed, then given here. inner changes
	 * owner only on success. */
	void (*defaults)(void *conf);
	int (*open)(const void *conf, struct far_backend *inner, struct far_backend **out, struct far_error *err);
};

extern const struct far_layer *const far_layers[]; /* ended by NULL */

extern const struct far_layer far_layer_chunked; /* any I/O over a backend that takes whole chunks only */
extern const struct far_layer far_layer_strict;  /* refuses what is not a whole aligned chunk */
extern const struct far_layer far_layer_tracked; /* remembers which chunks were written */
extern const struct far_layer far_layer_gated;   /* calls wait until it is opened */
extern const struct far_layer far_layer_delay;   /* round trip, jitter, rate */
extern const struct far_layer far_layer_fault;   /* errors, disconnects, wrong bytes, on purpose */
extern const struct far_layer far_layer_retry;   /* tries again, with back-off and a deadline */

/* far_backend_new() for a layer's open, with the sentence when it fails. */
int far_layer_new(const struct far_layer *l, const struct far_ops *ops, void *self, const struct far_facts *facts,
		  struct far_backend **out, struct far_error *err);

/* delay: what calls really waited in the layer, the inner call not counted. b must be what the delay layer's open
 * returned; calls of several threads are mixed. */
struct far_delay_stats {
	uint64_t calls, total_ns, last_ns;
};
void far_delay_stats(struct far_backend *b, struct far_delay_stats *st);

/* gated: closed at first when the option `closed` was given. b must be what the gated layer's open returned. Closing
 * waits for the calls that are inside: -ETIMEDOUT at the thread's deadline, -ESHUTDOWN; the gate is closed all the
 * same. */
void far_gated_open(struct far_backend *b);
int far_gated_close(struct far_backend *b);

/* retry: failed tries, tries made again, calls that ended with a passing error all the same. */
struct far_retry_stats {
	uint64_t failed, retries, gave_up;
};
void far_retry_stats(struct far_backend *b, struct far_retry_stats *st);

/* tracked: start recording; take the offsets of the chunks written since (sorted, malloc'd) and stop or go on. */
void far_tracked_start(struct far_backend *b);
int far_tracked_take(struct far_backend *b, bool go_on, uint64_t **offsets, size_t *n);

/* window.c: parts of `inner`, one after the other (their kinds mean nothing), as one region. They lie inside it; one whose
 * chunk is not 0 is wrapped in `chunked` first, or has one part that is all of it. inner is closed with it if `owned`, and
 * changes owner only on success. */
int far_window_new(struct far_backend *inner, bool owned, const struct far_extent *part, size_t n, struct far_backend **out);

#endif
