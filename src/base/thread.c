/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "base/thread.h"

#include "base/clock.h"

#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

void far_mutex_init(struct far_mutex *l)
{
	FAR_ASSERT(pthread_mutex_init(&l->m, NULL) == 0);
}

void far_mutex_fini(struct far_mutex *l)
{
	FAR_ASSERT(pthread_mutex_destroy(&l->m) == 0);
}

void far_mutex_lock(struct far_mutex *l) FAR_NO_TSA
{
	FAR_ASSERT(pthread_mutex_lock(&l->m) == 0);
}

bool far_mutex_trylock(struct far_mutex *l) FAR_NO_TSA
{
	return pthread_mutex_trylock(&l->m) == 0;
}

void far_mutex_unlock(struct far_mutex *l) FAR_NO_TSA
{
	FAR_ASSERT(pthread_mutex_unlock(&l->m) == 0);
}

void far_cond_init(struct far_cond *c)
{
	pthread_condattr_t a;
	FAR_ASSERT(pthread_condattr_init(&a) == 0);
	FAR_ASSERT(pthread_condattr_setclock(&a, CLOCK_MONOTONIC) == 0);
	FAR_ASSERT(pthread_cond_init(&c->c, &a) == 0);
	pthread_condattr_destroy(&a);
}

void far_cond_fini(struct far_cond *c)
{
	FAR_ASSERT(pthread_cond_destroy(&c->c) == 0);
}

void far_cond_wait(struct far_cond *c, struct far_mutex *l)
{
	FAR_ASSERT(pthread_cond_wait(&c->c, &l->m) == 0);
}

bool far_cond_wait_until(struct far_cond *c, struct far_mutex *l, uint64_t until)
{
	if (until == FAR_NEVER) {
		far_cond_wait(c, l);
		return true;
	}
	struct timespec ts = { .tv_sec = (time_t)(until / FAR_SEC), .tv_nsec = (long)(until % FAR_SEC) };
	int r = pthread_cond_timedwait(&c->c, &l->m, &ts);
	FAR_ASSERT(r == 0 || r == ETIMEDOUT);
	return r == 0;
}

void far_cond_signal(struct far_cond *c)
{
	pthread_cond_signal(&c->c);
}

void far_cond_broadcast(struct far_cond *c)
{
	pthread_cond_broadcast(&c->c);
}

void far_event_kick(const struct far_event *e)
{
	(void)syscall(SYS_futex, &e->v, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

uint32_t far_event_wait_until(struct far_event *e, uint64_t until)
{
	struct timespec ts = { .tv_sec = (time_t)(until / FAR_SEC), .tv_nsec = (long)(until % FAR_SEC) };
	uint32_t v;

	/* WAIT_BITSET takes a point in time, of CLOCK_MONOTONIC; WAIT a span. */
	while (!(v = far_event_get(e)))
		if (syscall(SYS_futex, &e->v, FUTEX_WAIT_BITSET_PRIVATE, 0, until == FAR_NEVER ? NULL : &ts, NULL,
			    FUTEX_BITSET_MATCH_ANY) && errno == ETIMEDOUT)
			return far_event_get(e);
	return v;
}

int far_thread_start(struct far_thread *t, const char *name, void *(*fn)(void *), void *arg)
{
	sigset_t all, old;
	char cut[16];

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	int r = pthread_create(&t->t, NULL, fn, arg);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (r)
		return -r;
	t->running = true;
	snprintf(cut, sizeof cut, "%s", name);
	pthread_setname_np(t->t, cut);
	return 0;
}

void far_thread_yield(void)
{
	sched_yield();
}

void far_thread_on_time(void)
{
	static _Thread_local bool set;

	if (!set)
		prctl(PR_SET_TIMERSLACK, 1000UL);
	set = true;
}

void far_thread_join(struct far_thread *t)
{
	if (!t->running)
		return;
	FAR_ASSERT(pthread_join(t->t, NULL) == 0);
	t->running = false;
}
