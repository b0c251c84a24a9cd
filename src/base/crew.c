/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A thread of a crew is in one of these states; each arrow names the function that takes it:
 *
 *     idle    -> sits     crew_give_locked() by another thread that leaves its seat, or far_crew_seat()
 *     sits    -> away     far_crew_leave(): another thread sits there from now on
 *     sits    -> free     crew_sit(): run() returned false, the seat has no successor
 *     away    -> free     crew_sit(): run() returned
 *     free    -> sits     crew_main(): a seat waits for its first thread
 *     free    -> works    crew_main(): parked work; back to free when fn() returns
 *     free    -> idle     crew_idle_locked(), on the thread's own condition variable; the last one in is first out, for
 *                         its stack is warm and the ones below it may end
 *     idle    -> ended    crew_idle_locked(): a second without work and more than CREW_KEEP are idle, or close
 *
 * Invariants, under the crew's lock:
 *  1. A seat counts in `refs` whoever sits on it (or is on the way to it), every thread that is away from it, and its
 *     parked work. It ends when that reaches 0; a seat that has not ended has exactly one sitter to come or sitting.
 *  2. There is always one thread more than seats (crew_open and far_crew_seat see to it, CREW_KEEP keeps it), so that
 *     parked work finds a thread even if no other can be started.
 *  3. Work is parked only while nobody is idle: a thread looks for it before it goes idle.
 *
 * A thread keeps the CPU of its last seat while it is away: what it waits for is then finished where the request came
 * in, where waking the program is cheap; setting the mask back and forth would cost two system calls a request. Only a
 * thread that takes a seat of another CPU moves.
 *
 * An ended thread cannot join itself: it joins the one that ended before it and leaves itself in `dead` for the next.
 */
#define _GNU_SOURCE
#include "base/crew.h"

#include "base/clock.h"
#include "base/thread.h"

#include <sched.h>
#include <stdlib.h>

#define CREW_KEEP 4            /* idle threads that stay */
#define CREW_IDLE FAR_SEC      /* the others end after this long */
#define CREW_LOOK 8            /* idle threads looked at for one that is on the right CPU already */

struct far_seat {
	/* fixed after far_crew_seat() */
	struct far_crew *crew;
	int cpu;
	bool (*run)(void *opaque, struct far_seat *seat);
	void (*ended)(void *opaque);
	void *opaque;
	/* under the crew's lock */
	unsigned refs;
	struct far_seat *next; /* in `waiting` */
};

struct crew_worker {
	struct far_crew *crew;
	struct far_thread thread;
	struct far_cond wake;
	/* under the crew's lock */
	struct far_seat *given;   /* the seat to take */
	struct crew_worker *next; /* below it among the idle */
	bool idle, started;
	/* owner thread only */
	struct far_seat *sits;
	int cpu;
};

struct crew_work {
	struct crew_work *next;
	struct far_seat *seat;
	void (*fn)(void *arg);
	void *arg;
};

struct far_crew {
	/* fixed after open */
	char name[16];
	unsigned max;
	cpu_set_t mask; /* of the opener */
	struct far_mutex lock;
	struct far_cond changed; /* a seat or a thread has ended */
	unsigned threads FAR_GUARDED_BY(lock), seats FAR_GUARDED_BY(lock), n_idle FAR_GUARDED_BY(lock);
	struct crew_worker *idle FAR_GUARDED_BY(lock);
	struct crew_worker *dead FAR_GUARDED_BY(lock);
	struct far_seat *waiting FAR_GUARDED_BY(lock);
	struct crew_work *parked FAR_GUARDED_BY(lock), **parked_end FAR_GUARDED_BY(lock);
	bool closing FAR_GUARDED_BY(lock);
};

static _Thread_local struct crew_worker *crew_self;

static void crew_pin(struct crew_worker *w, int cpu)
{
	if (w->cpu == cpu)
		return;
	cpu_set_t set = w->crew->mask;
	if (cpu >= 0 && cpu < CPU_SETSIZE) {
		CPU_ZERO(&set);
		CPU_SET(cpu, &set);
	}
	/* A CPU that is gone by now costs speed, nothing else. */
	sched_setaffinity(0, sizeof set, &set);
	w->cpu = cpu;
}

/* One of those that counted in refs is done with the seat. */
static void crew_unref_locked(struct far_crew *c, struct far_seat *s) FAR_REQUIRES(c->lock)
{
	FAR_ASSERT(s->refs > 0);
	if (--s->refs)
		return;
	if (s->ended) {
		far_mutex_unlock(&c->lock);
		s->ended(s->opaque);
		far_mutex_lock(&c->lock);
	}
	free(s);
	c->seats--;
	far_cond_broadcast(&c->changed);
}

static void crew_sit(struct crew_worker *w, struct far_seat *s)
{
	struct far_crew *c = w->crew;

	crew_pin(w, s->cpu);
	w->sits = s;
	while (s->run(s->opaque, s) && w->sits == s)
		;
	w->sits = NULL;
	far_mutex_lock(&c->lock);
	crew_unref_locked(c, s);
	far_mutex_unlock(&c->lock);
}

static void crew_unlink_locked(struct far_crew *c, struct crew_worker *w) FAR_REQUIRES(c->lock)
{
	struct crew_worker **p = &c->idle;

	while (*p != w)
		p = &(*p)->next;
	*p = w->next;
	w->idle = false;
	c->n_idle--;
}

/* Give the seat to an idle thread; false when there is none. */
static bool crew_give_locked(struct far_crew *c, struct far_seat *s) FAR_REQUIRES(c->lock)
{
	struct crew_worker *w = c->idle, *best = w;

	for (unsigned i = 0; w && i < CREW_LOOK; i++, w = w->next) {
		if (w->cpu == s->cpu) {
			best = w;
			break;
		}
	}
	if (!best)
		return false;
	crew_unlink_locked(c, best);
	best->given = s;
	far_cond_signal(&best->wake);
	return true;
}

/* Wait for a seat or work. False: end. */
static bool crew_idle_locked(struct far_crew *c, struct crew_worker *w) FAR_REQUIRES(c->lock)
{
	uint64_t until = c->n_idle < CREW_KEEP ? FAR_NEVER : far_now() + CREW_IDLE;

	w->next = c->idle;
	c->idle = w;
	c->n_idle++;
	w->idle = true;
	while (w->idle) {
		if (far_cond_wait_until(&w->wake, &c->lock, until) || !w->idle)
			continue;
		if (c->n_idle > CREW_KEEP) {
			crew_unlink_locked(c, w);
			return false;
		}
		until = FAR_NEVER;
	}
	return true;
}

static void crew_reap(struct crew_worker *w)
{
	if (!w)
		return;
	far_thread_join(&w->thread);
	far_cond_fini(&w->wake);
	free(w);
}

static void *crew_main(void *arg)
{
	struct crew_worker *w = arg;
	struct far_crew *c = w->crew;

	crew_self = w;
	far_mutex_lock(&c->lock);
	for (;;) {
		struct far_seat *s = w->given;
		struct crew_work *p = c->parked;
		if (!s && c->waiting) {
			s = c->waiting;
			c->waiting = s->next;
		}
		if (s) {
			w->given = NULL;
			far_mutex_unlock(&c->lock);
			crew_sit(w, s);
			far_mutex_lock(&c->lock);
		} else if (p) {
			c->parked = p->next;
			if (!c->parked)
				c->parked_end = &c->parked;
			far_mutex_unlock(&c->lock);
			p->fn(p->arg);
			far_mutex_lock(&c->lock);
			crew_unref_locked(c, p->seat);
			free(p);
		} else if (c->closing || !crew_idle_locked(c, w)) {
			break;
		}
	}
	/* Whoever started this thread may still be writing its handle down. */
	while (!w->started)
		far_cond_wait(&w->wake, &c->lock);
	struct crew_worker *before = c->dead;
	c->dead = w;
	far_mutex_unlock(&c->lock);
	crew_reap(before);
	/* Counted out last: close frees the crew once nobody is left but `dead`. */
	far_mutex_lock(&c->lock);
	c->threads--;
	far_cond_broadcast(&c->changed);
	far_mutex_unlock(&c->lock);
	return NULL;
}

/* Start a thread that was counted in `threads` already; on failure it is counted out again. */
static int crew_start(struct far_crew *c, struct far_seat *given)
{
	struct crew_worker *w = calloc(1, sizeof *w);
	int r = -ENOMEM;

	if (w) {
		w->crew = c;
		w->given = given;
		w->cpu = -1;
		far_cond_init(&w->wake);
		r = far_thread_start(&w->thread, c->name, crew_main, w);
	}
	far_mutex_lock(&c->lock);
	if (r) {
		c->threads--;
	} else {
		w->started = true;
		far_cond_signal(&w->wake);
	}
	far_mutex_unlock(&c->lock);
	if (r && w) {
		far_cond_fini(&w->wake);
		free(w);
	}
	return r;
}

int far_crew_open(struct far_crew **out, const char *name, unsigned max_threads)
{
	struct far_crew *c = calloc(1, sizeof *c);

	if (!c)
		return -ENOMEM;
	for (size_t i = 0; i < sizeof c->name - 1 && name[i]; i++)
		c->name[i] = name[i];
	c->max = max_threads < 2 ? 2 : max_threads;
	if (sched_getaffinity(0, sizeof c->mask, &c->mask)) {
		for (int i = 0; i < CPU_SETSIZE; i++)
			CPU_SET(i, &c->mask);
	}
	far_mutex_init(&c->lock);
	far_cond_init(&c->changed);
	far_mutex_lock(&c->lock);
	c->parked_end = &c->parked;
	c->threads = 1;
	far_mutex_unlock(&c->lock);
	int r = crew_start(c, NULL);
	if (r) {
		far_cond_fini(&c->changed);
		far_mutex_fini(&c->lock);
		free(c);
		return r;
	}
	*out = c;
	return 0;
}

void far_crew_close(struct far_crew *c)
{
	if (!c)
		return;
	FAR_ASSERT(!crew_self || crew_self->crew != c);
	far_mutex_lock(&c->lock);
	while (c->seats)
		far_cond_wait(&c->changed, &c->lock);
	FAR_ASSERT(!c->parked && !c->waiting);
	c->closing = true;
	while (c->idle) {
		struct crew_worker *w = c->idle;
		crew_unlink_locked(c, w);
		far_cond_signal(&w->wake);
	}
	while (c->threads)
		far_cond_wait(&c->changed, &c->lock);
	struct crew_worker *last = c->dead;
	far_mutex_unlock(&c->lock);
	crew_reap(last);
	far_cond_fini(&c->changed);
	far_mutex_fini(&c->lock);
	free(c);
}

int far_crew_seat(struct far_crew *c, int cpu, bool (*run)(void *opaque, struct far_seat *seat),
		  void (*ended)(void *opaque), void *opaque)
{
	struct far_seat *s = calloc(1, sizeof *s);
	int r = 0;

	if (!s)
		return -ENOMEM;
	*s = (struct far_seat){ .crew = c, .cpu = cpu, .run = run, .ended = ended, .opaque = opaque, .refs = 1 };
	far_mutex_lock(&c->lock);
	FAR_ASSERT(!c->closing);
	if (c->seats + 1 >= c->max) {
		far_mutex_unlock(&c->lock);
		free(s);
		return -EAGAIN;
	}
	c->seats++;
	if (c->n_idle > 1) {
		crew_give_locked(c, s);
		far_mutex_unlock(&c->lock);
		return 0;
	}
	if (c->threads < c->max) {
		c->threads++;
		far_mutex_unlock(&c->lock);
		r = crew_start(c, s);
		if (!r)
			return 0;
		far_mutex_lock(&c->lock);
		c->seats--;
		far_mutex_unlock(&c->lock);
		free(s);
		return r;
	}
	if (!crew_give_locked(c, s)) {
		s->next = c->waiting;
		c->waiting = s;
	}
	far_mutex_unlock(&c->lock);
	return 0;
}

bool far_crew_leave(struct far_seat *s)
{
	struct crew_worker *w = crew_self;
	struct far_crew *c = s->crew;
	bool left;

	if (!w || w->sits != s)
		return true;
	far_mutex_lock(&c->lock);
	s->refs++;
	left = crew_give_locked(c, s);
	if (!left && c->threads < c->max) {
		c->threads++;
		far_mutex_unlock(&c->lock);
		left = crew_start(c, s) == 0;
		far_mutex_lock(&c->lock);
	}
	if (!left)
		s->refs--;
	far_mutex_unlock(&c->lock);
	if (left)
		w->sits = NULL;
	return left;
}

int far_crew_park(struct far_seat *s, void (*fn)(void *arg), void *arg)
{
	struct far_crew *c = s->crew;
	struct crew_work *p = calloc(1, sizeof *p);

	if (!p)
		return -ENOMEM;
	*p = (struct crew_work){ .seat = s, .fn = fn, .arg = arg };
	far_mutex_lock(&c->lock);
	s->refs++;
	*c->parked_end = p;
	c->parked_end = &p->next;
	if (c->idle) {
		/* One became free since leave was refused: wake it up, it looks for work. */
		struct crew_worker *w = c->idle;
		crew_unlink_locked(c, w);
		far_cond_signal(&w->wake);
	}
	far_mutex_unlock(&c->lock);
	return 0;
}
