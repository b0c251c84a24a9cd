/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* How much bulk may be on its way at once. The caller's lock guards it; nothing here waits or asks for the time. */
#ifndef FAR_REGION_PACE_H
#define FAR_REGION_PACE_H

#include "base/base.h"
#include "base/clock.h"

#include <stdbool.h>
#include <stdint.h>

#define FAR_PACE_SAMPLES 8
#define FAR_PACE_NEAR (2 * FAR_MSEC) /* a path whose shortest fetch takes longer is a far one */

struct far_pace {
	uint64_t window;      /* bytes */
	uint64_t base;        /* ns: the shortest fetch of the last seconds; 0: none yet */
	/* the rest is its own */
	uint64_t max;
	bool fixed;           /* the user has said how much */
	bool starting;        /* the rate has not met a limit yet */
	uint64_t base_len, next_base, base_at;
	uint64_t draining;    /* until then half of the window, so that the queue empties and `base` is seen again; 0: not now */
	uint64_t drained;     /* when that began last */
	uint64_t period, bytes, wait; /* since when, what arrived since, the least wait since */
	bool full;            /* the window was what held back */
	double rate[FAR_PACE_SAMPLES], start_rate;
	uint64_t span[FAR_PACE_SAMPLES];
	double top;           /* bytes a second that the link can do, whoever has it now */
	unsigned n_rate, start_flat, growths, late;
};

/* `window` to begin with; `fixed`: to stay with. */
void far_pace_init(struct far_pace *p, uint64_t window, bool fixed, uint64_t max, uint64_t now);
/* `len` bytes that were asked for at `began` have come. True: a period has ended, and what is derived from rate and
 * window is to be derived anew. `extent`: what is asked for at a time; a window is some of them. */
bool far_pace_arrived(struct far_pace *p, uint64_t len, uint64_t began, uint64_t now, uint64_t extent);
/* What may be on its way now. */
uint64_t far_pace_window(const struct far_pace *p, uint64_t now);
/* Bytes a second: the best of the last periods. */
double far_pace_rate(const struct far_pace *p);
static inline bool far_pace_is_far(const struct far_pace *p)
{
	return p->base > FAR_PACE_NEAR;
}

#endif
