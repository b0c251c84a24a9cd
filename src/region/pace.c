/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A fetch takes the path's own time and that of its own bytes on the link (`base`), and the wait behind what else is queued.
 * The wait is what a demand fetch suffers too, on whichever connection it goes, so bulk is paced by it.
 *
 *     STARTING -> STEADY             pace_start(): a period brought hardly more than the one before, and fetches waited;
 *                                    or two periods
 *     STEADY -> DRAINING -> STEADY   pace_drain(): nothing as short as `base` was seen for ten seconds, or waits do not end
 *
 * Starting: what arrives widens the window, by half each round trip, except while fetches wait: TCP's own start looks like
 * a queue, and ends by itself. The wait is seen a round trip late, so a window that doubled would have filled a queue of a
 * whole round trip by then. Steady, far away: once a round trip, the least wait of that time (one that was kept from a CPU
 * says nothing of the link) is compared with what is allowed. Longer: the window goes back to a little less than what the
 * path is known to hold (its shortest fetch, the rate that it was seen to have), and below that only after several round
 * trips, because hosts that are short of CPUs look the same. Shorter, and the window is what held back: it grows to there,
 * then slowly beyond, and faster when that costs no wait for long, for then the path holds more than it did. So the link is
 * used nearly whole, and the queue is as short as the extents allow.
 *
 * Near by there is no queue but in the hosts, and waits are the CPUs': the window is twice what the path holds.
 */
#include "region/pace.h"

#define PACE_BASE_AGE (10 * FAR_SEC)
#define PACE_DRAIN_AGAIN FAR_SEC
#define PACE_PERIOD (5 * FAR_MSEC)
#define PACE_WAIT (100 * FAR_USEC) /* what may wait at least */
#define PACE_TOGETHER 4
#define PACE_SPARE 16 /* this part of the link stays free, or a burst would wait for long */
#define PACE_PATIENCE 4 /* round trips in a row that say the same */

double far_pace_rate(const struct far_pace *p)
{
	double best = 0;

	for (unsigned k = 0; k < FAR_PACE_SAMPLES; k++)
		best = p->rate[k] > best ? p->rate[k] : best;
	return best;
}

/* The rate of several periods together: what comes in a burst after a pause is faster than the link. */
static double pace_mean(const struct far_pace *p)
{
	double bytes = 0, span = 0;

	for (unsigned k = 1; k <= PACE_TOGETHER; k++) {
		unsigned i = (p->n_rate - k) % FAR_PACE_SAMPLES;
		bytes += p->rate[i] * (double)p->span[i];
		span += (double)p->span[i];
	}
	return span > 0 ? bytes / span : 0;
}

void far_pace_init(struct far_pace *p, uint64_t window, bool fixed, uint64_t max, uint64_t now)
{
	*p = (struct far_pace){ .window = window, .fixed = fixed, .starting = !fixed, .max = max, .period = now,
				.wait = UINT64_MAX };
}

uint64_t far_pace_window(const struct far_pace *p, uint64_t now)
{
	return now < p->draining && far_pace_is_far(p) ? p->window / 2 : p->window;
}

/* The wait that is no loss to anybody: a small part of the round trip, and smaller where that is short, because there a
 * wait is felt and the window is easy to fill. */
static uint64_t pace_allowed(const struct far_pace *p)
{
	uint64_t part = far_min((uint64_t)((double)p->base * (double)p->base / (640.0 * FAR_MSEC)), p->base / 20);

	return far_max(PACE_WAIT, part);
}

/* What bulk may wait for itself while the window is still to be found. */
static bool pace_crowded(const struct far_pace *p, uint64_t wait)
{
	return wait > far_max(FAR_MSEC, p->base / 8);
}

/* For two round trips half of the window is used: what is shortest then is the path as it is now. */
static void pace_drain(struct far_pace *p, uint64_t now)
{
	p->next_base = UINT64_MAX;
	p->drained = now;
	p->draining = now + 2 * p->base;
}

static void pace_base(struct far_pace *p, uint64_t took, uint64_t len, uint64_t now)
{
	if (!p->base || took <= p->base) {
		p->base = took;
		p->base_len = len;
		p->base_at = now;
	}
	if (p->draining) {
		p->next_base = far_min(p->next_base, took);
		if (now < p->draining)
			return;
		p->base = far_max(p->base, p->next_base);
		p->base_len = len;
		/* Hosts that are short of CPUs look like a longer path: soon look again. */
		p->base_at = now - (p->late >= PACE_PATIENCE ? PACE_BASE_AGE - PACE_DRAIN_AGAIN : 0);
		p->late = 0;
		p->draining = 0;
	} else if (now - p->base_at > PACE_BASE_AGE && !p->fixed) {
		pace_drain(p, now);
	}
}

/* How long a fetch waited that took so long: a longer one than the shortest has more to put on the link. */
static uint64_t pace_wait(const struct far_pace *p, uint64_t took, uint64_t len)
{
	uint64_t more = len > p->base_len && p->top > 0 ? (uint64_t)((double)(len - p->base_len) * (double)FAR_SEC / p->top) : 0;

	return took > p->base + more ? took - p->base - more : 0;
}

static void pace_start(struct far_pace *p, double rate)
{
	if (rate >= 1.25 * p->start_rate) {
		p->start_rate = rate;
		p->start_flat = 0;
		return;
	}
	if (++p->start_flat < 2 && !pace_crowded(p, p->wait))
		return;
	p->starting = false;
	if (far_pace_is_far(p)) /* by what was there a round trip ago: what waited is too much */
		p->window = (uint64_t)((double)p->window * (double)p->base / (double)(p->base + p->wait));
}

static void pace_far(struct far_pace *p, uint64_t now, uint64_t extent)
{
	uint64_t allowed = pace_allowed(p), holds = (uint64_t)(p->top * (double)p->base / (double)FAR_SEC);
	uint64_t aim = holds - holds / PACE_SPARE;

	if (holds / extent < PACE_SPARE) /* one extent less would leave more than that */
		aim = far_max(aim, holds / extent * extent);
	uint64_t queued = (uint64_t)((double)p->window * (double)p->wait / (double)(p->base + p->wait));
	p->late = p->wait > 2 * allowed ? p->late + 1 : 0;
	p->growths = p->wait > allowed ? 0 : p->growths + p->full;
	if (p->wait > allowed && p->window > aim) {
		p->window -= p->late ? far_min(queued, p->window - aim) : (p->window - aim) / 2;
	} else if (p->late >= PACE_PATIENCE) { /* the link has got slower, the path longer, or others use it */
		p->window = far_max(p->window - far_min(queued / 2, p->window / 8), holds / 2);
		p->top = far_max(p->top * 0.95, far_pace_rate(p));
		if (now - p->drained > PACE_DRAIN_AGAIN)
			pace_drain(p, now);
	} else if (p->full && !p->late) {
		uint64_t step = (p->window / 128) << far_min(p->growths / PACE_PATIENCE, 5);
		p->window += p->window < aim && p->growths ? far_max((aim - p->window) / 2, p->window / 128) : step;
	}
	p->window = far_min(p->window, p->max);
}

static void pace_near(struct far_pace *p)
{
	uint64_t window = far_min((uint64_t)(2 * far_pace_rate(p) * (double)p->base / (double)FAR_SEC), p->max);

	p->window = p->starting ? far_max(window, p->window) : window;
}

bool far_pace_arrived(struct far_pace *p, uint64_t len, uint64_t began, uint64_t now, uint64_t extent)
{
	uint64_t took = far_max(now - began, 1);

	pace_base(p, took, len, now);
	uint64_t wait = pace_wait(p, took, len);
	p->wait = far_min(p->wait, wait);
	p->bytes += len;
	if (p->starting && (!far_pace_is_far(p) || !pace_crowded(p, wait)))
		p->window = far_min(p->window + (far_pace_is_far(p) ? len / 2 : len), p->max);
	uint64_t span = now - p->period;
	if (span < far_max(p->base, PACE_PERIOD))
		return false;
	double rate = (double)p->bytes * (double)FAR_SEC / (double)span;
	p->rate[p->n_rate % FAR_PACE_SAMPLES] = rate;
	p->span[p->n_rate++ % FAR_PACE_SAMPLES] = span;
	p->top = far_max(p->top, pace_mean(p));
	if (p->starting)
		pace_start(p, rate);
	else if (!p->fixed && far_pace_is_far(p) && !p->draining)
		pace_far(p, now, extent);
	if (!p->fixed && !far_pace_is_far(p))
		pace_near(p);
	if (!p->fixed)
		p->window = far_max(p->window, (far_pace_is_far(p) ? 2 : 4) * extent);
	p->period = now;
	p->bytes = 0;
	p->wait = UINT64_MAX;
	p->full = false;
	return true;
}
