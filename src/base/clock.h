/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Time, and the deadline that a thread's work must keep. All times are nanoseconds of CLOCK_MONOTONIC. */
#ifndef FAR_CLOCK_H
#define FAR_CLOCK_H

#include "base/base.h"

#define FAR_USEC ((uint64_t)1000)
#define FAR_MSEC ((uint64_t)1000000)
#define FAR_SEC ((uint64_t)1000000000)
#define FAR_NEVER UINT64_MAX

uint64_t far_now(void);
/* The same, but it goes on while the machine sleeps: for what others count as well. */
uint64_t far_now_slept(void);
uint64_t far_wall_ms(void); /* milliseconds since 1970: to be shown, not to be reckoned with */
/* A hint to the CPU inside a spin. */
static inline void far_cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}
/* Sleep until `when`; to 300 us before it by the kernel's timer, the rest spinning when `precise`. */
void far_sleep_until(uint64_t when, bool precise);

/*
 * The deadline: the absolute time by which the work that this thread is doing must have ended. The outermost caller
 * sets it (a frontend, the retry layer, a worker); everything below that waits (connections, delay, gate, a wait for
 * another's fetch) honours it with -ETIMEDOUT. Thread-local; FAR_NEVER where nobody set one.
 */
uint64_t far_deadline(void);
/* Shorten the deadline to `when` if that is earlier; returns the old one, to be given to far_deadline_restore(). */
uint64_t far_deadline_limit(uint64_t when);
void far_deadline_restore(uint64_t old);
/* Milliseconds left for poll(2): -1 for ever, 0 passed; rounded up. */
int far_deadline_poll_ms(uint64_t deadline);

#endif
