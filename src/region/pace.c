/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A fetch takes the path's own time and that of its own bytes on the link (`base`), and the wait behind what else is queued.
 * The wait is what a demand fetch suffers too, on whichever connection it goes, so bulk is paced by it.
 *
 *     STARTING -> STEADY             pace_start(): two periods brought no more than the one before, or bulk waits for itself
 *     STEADY -> DRAINING -> STEADY   pace_base(): nothing as short as `base` was seen for ten seconds
 *
 * Starting: what arrives widens the window, so that it doubles each round trip, except while fetches wait: TCP's own start
 * looks like a queue, and ends by itself. Steady, far away: once a round trip, the least wait of that time (one that was kept from a CPU
 * says nothing of the link) is compared with what is allowed. Longer: half of what waits is taken from the window.
 * Shorter, and the window is what held back: it grows, faster each time in a row, because another has left the link to us.
 * So the link is used whole, and the queue is as short as the extents allow.
 *
 * Near by there is no queue but in the hosts, and waits are the CPUs': the window is twice what the path holds.
 */
#include "region/pace.h"

#define PACE_BASE_AGE (10 * FAR_SEC)
#define PACE_PERIOD (5 * FAR_MSEC)
#define PACE_WAIT (250 * FAR_USEC) /* what may wait at least */
#define PACE_GROWTHS 6

double far_pace_rate(const struct far_pace *p)
{
	double best = 0;

	for (unsigned k = 0; k < FAR_PACE_SAMPLES; k++)
		best = p->rate[k] > best ? p->rate[k] : best;
	return best;
}

/* What a burst after a pause does not falsify. */
static double pace_mean(const struct far_pace *p)
{
	unsigned n = p->n_rate < FAR_PACE_SAMPLES ? p->n_rate : FAR_PACE_SAMPLES;
	double sum = 0;

	for (unsigned k = 0; k < n; k++)
		sum += p->rate[k];
	return n ? sum / n : 0;
}

void far_pace_init(struct far_pace *p, uint64_t window, bool fixed, uint64_t max, uint64_t now)
{
	*p = (struct far_pace){ .window = window, .fixed = fixed, .starting = !fixed, .max = max, .period = now,
				.wait = UINT64_MAX };
}

uint64_t far_pace_window(const struct far_pace *p, uint64_t now)
{
	return now < p->draining ? p->window / 2 : p->window;
}

/* The wait that is no loss to anybody: a small part of the round trip. */
static uint64_t pace_allowed(const struct far_pace *p)
{
	return far_max(PACE_WAIT, p->base / 32);
}

/* The shortest fetch. Two spans of ten seconds, so that the path may get longer. */
static void pace_base(struct far_pace *p, uint64_t took, uint64_t len, uint64_t now)
{
	if (!p->base || took <= p->base) {
		p->base = p->next_base = took;
		p->base_len = len;
		p->base_at = now;
		return;
	}
	p->next_base = far_min(p->next_base, took);
	if (now - p->base_at <= PACE_BASE_AGE)
		return;
	if (!p->draining && far_pace_is_far(p) && !p->fixed) {
		p->next_base = took;
		p->draining = now + 2 * p->base;
	} else if (now > p->draining) {
		p->base = p->next_base;
		p->base_len = len;
		p->next_base = UINT64_MAX;
		p->base_at = now;
		p->draining = 0;
	}
}

/* How long a fetch waited that took so long: a longer one than the shortest has more to put on the link. */
static uint64_t pace_wait(const struct far_pace *p, uint64_t took, uint64_t len)
{
	uint64_t more = len > p->base_len && p->top > 0 ? (uint64_t)((double)(len - p->base_len) * (double)FAR_SEC / p->top) : 0;

	return took > p->base + more ? took - p->base - more : 0;
}

static void pace_start(struct far_pace *p, double rate, uint64_t least)
{
	if (rate >= 1.25 * p->start_rate) {
		p->start_rate = rate;
		p->start_flat = 0;
		return;
	}
	if (++p->start_flat < 2)
		return;
	p->starting = false;
	if (far_pace_is_far(p)) /* by what was there a round trip ago: what waited is too much */
		p->window = far_max((uint64_t)((double)p->window * (double)p->base / (double)(p->base + p->wait)), least);
}

static void pace_far(struct far_pace *p, uint64_t least)
{
	uint64_t allowed = pace_allowed(p);

	if (p->wait > 2 * allowed) {
		uint64_t queued = (uint64_t)((double)p->window * (double)p->wait / (double)(p->base + p->wait));
		p->window -= queued / 2;
		p->growths = 0;
	} else if (p->wait < allowed && p->full) {
		double step = pace_mean(p) * (double)allowed / (double)FAR_SEC / 2;
		p->window += (uint64_t)far_min(step * (double)(1u << p->growths), (double)p->window / 4);
		p->growths += p->growths < PACE_GROWTHS;
	} else {
		p->growths = 0;
	}
	p->window = far_max(far_min(p->window, p->max), least);
}

static void pace_near(struct far_pace *p, uint64_t least)
{
	uint64_t window = far_min((uint64_t)(2 * far_pace_rate(p) * (double)p->base / (double)FAR_SEC), p->max);

	p->window = far_max(p->starting ? far_max(window, p->window) : window, least);
}

bool far_pace_arrived(struct far_pace *p, uint64_t len, uint64_t began, uint64_t now, uint64_t least)
{
	uint64_t took = far_max(now - began, 1);

	pace_base(p, took, len, now);
	uint64_t wait = pace_wait(p, took, len);
	p->wait = far_min(p->wait, wait);
	p->bytes += len;
	if (p->starting && (!far_pace_is_far(p) || wait <= far_max(2 * FAR_MSEC, p->base / 4)))
		p->window = far_min(p->window + len, p->max);
	uint64_t span = now - p->period;
	if (span < far_max(p->base, PACE_PERIOD))
		return false;
	double rate = (double)p->bytes * (double)FAR_SEC / (double)span;
	p->rate[p->n_rate++ % FAR_PACE_SAMPLES] = rate;
	p->top = p->top > pace_mean(p) ? p->top : pace_mean(p);
	if (p->starting)
		pace_start(p, rate, least);
	else if (!p->fixed && far_pace_is_far(p) && now >= p->draining)
		pace_far(p, least);
	if (!p->fixed && !far_pace_is_far(p))
		pace_near(p, least);
	p->period = now;
	p->bytes = 0;
	p->wait = UINT64_MAX;
	p->full = false;
	return true;
}
