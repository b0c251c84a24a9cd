/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "base/clock.h"

#include <limits.h>
#include <time.h>

static _Thread_local uint64_t clock_deadline = FAR_NEVER;

uint64_t far_now(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * FAR_SEC + (uint64_t)ts.tv_nsec;
}

uint64_t far_now_slept(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_BOOTTIME, &ts);
	return (uint64_t)ts.tv_sec * FAR_SEC + (uint64_t)ts.tv_nsec;
}

uint64_t far_wall_ms(void)
{
	struct timespec ts;
	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / FAR_MSEC;
}

void far_sleep_until(uint64_t when, bool precise)
{
	uint64_t margin = precise ? 300 * FAR_USEC : 0;
	uint64_t now = far_now();

	while (now + margin < when) {
		uint64_t to = when - margin;
		struct timespec ts = { .tv_sec = (time_t)(to / FAR_SEC), .tv_nsec = (long)(to % FAR_SEC) };
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
		now = far_now();
	}
	while (precise && far_now() < when)
		far_cpu_relax();
}

uint64_t far_deadline(void)
{
	return clock_deadline;
}

uint64_t far_deadline_limit(uint64_t when)
{
	uint64_t old = clock_deadline;
	if (when < old)
		clock_deadline = when;
	return old;
}

void far_deadline_restore(uint64_t old)
{
	clock_deadline = old;
}

int far_deadline_poll_ms(uint64_t deadline)
{
	if (deadline == FAR_NEVER)
		return -1;
	uint64_t now = far_now();
	if (now >= deadline)
		return 0;
	uint64_t ms = far_div_up(deadline - now, FAR_MSEC);
	return ms > INT_MAX ? INT_MAX : (int)ms;
}
