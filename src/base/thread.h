/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Threads, locks, condition variables. The only way to reach pthreads, so that clang can check the locking
 * (-Wthread-safety) and a test build can put a scheduler of its own in their place. */
#ifndef FAR_THREAD_H
#define FAR_THREAD_H

#include "base/base.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#if defined(__clang__)
#define FAR_TSA(x) __attribute__((x))
#else
#define FAR_TSA(x)
#endif
#define FAR_CAPABILITY FAR_TSA(capability("mutex"))
/* Only a word for the reader: in C clang looks field names up in attributes of other fields from version 20 on. */
#define FAR_GUARDED_BY(l)
#define FAR_REQUIRES(l) FAR_TSA(requires_capability(l))
#define FAR_EXCLUDES(l) FAR_TSA(locks_excluded(l))
#define FAR_ACQUIRE(...) FAR_TSA(acquire_capability(__VA_ARGS__))
#define FAR_RELEASE(...) FAR_TSA(release_capability(__VA_ARGS__))
#define FAR_TRY_ACQUIRE(...) FAR_TSA(try_acquire_capability(__VA_ARGS__))
#define FAR_NO_TSA FAR_TSA(no_thread_safety_analysis)

struct FAR_CAPABILITY far_mutex {
	pthread_mutex_t m;
};
struct far_cond {
	pthread_cond_t c; /* of CLOCK_MONOTONIC */
};

#define FAR_MUTEX_INIT { PTHREAD_MUTEX_INITIALIZER }

void far_mutex_init(struct far_mutex *l);
void far_mutex_fini(struct far_mutex *l);
void far_mutex_lock(struct far_mutex *l) FAR_ACQUIRE(l);
bool far_mutex_trylock(struct far_mutex *l) FAR_TRY_ACQUIRE(true, l);
void far_mutex_unlock(struct far_mutex *l) FAR_RELEASE(l);

void far_cond_init(struct far_cond *c);
void far_cond_fini(struct far_cond *c);
void far_cond_wait(struct far_cond *c, struct far_mutex *l) FAR_REQUIRES(l);
/* `until`: far_now() time, FAR_NEVER waits for ever. False when the time has passed. */
bool far_cond_wait_until(struct far_cond *c, struct far_mutex *l, uint64_t until) FAR_REQUIRES(l);
void far_cond_signal(struct far_cond *c);
void far_cond_broadcast(struct far_cond *c);

/* What one thread sleeps on. far_event_set() may be the last that touches the memory: the sleeper can be gone before
 * far_event_kick() makes the system call, which only names the address, so that it can be made without the lock under which
 * the event was set. */
struct far_event {
	_Atomic uint32_t v; /* 0: nothing yet */
};
static inline void far_event_init(struct far_event *e)
{
	atomic_init(&e->v, 0);
}
static inline void far_event_set(struct far_event *e, uint32_t v) /* not 0 */
{
	atomic_store_explicit(&e->v, v, memory_order_release);
}
static inline void far_event_clear(struct far_event *e)
{
	atomic_store_explicit(&e->v, 0, memory_order_relaxed);
}
static inline uint32_t far_event_get(const struct far_event *e)
{
	return atomic_load_explicit(&e->v, memory_order_acquire);
}
void far_event_kick(const struct far_event *e);
/* Sleep until it is set; its value, or 0 when the time has passed. */
uint32_t far_event_wait_until(struct far_event *e, uint64_t until);

struct far_thread {
	pthread_t t;
	bool running; /* started and not yet joined */
};
/* All signals are blocked in it. `name` is cut to 15 characters. */
int far_thread_start(struct far_thread *t, const char *name, void *(*fn)(void *), void *arg);
/* Inside a spin that may last: let whoever else wants this CPU run first, perhaps the one that is waited for. */
void far_thread_yield(void);
/* From here on this thread's sleeps end on time, not within the 50 us that the kernel takes. For a thread of ours. */
void far_thread_on_time(void);
void far_thread_join(struct far_thread *t); /* nothing to do if it never started */

#endif
