/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A lease that has run out may be somebody else's now. So the right to speak to the remote has an end, which is moved on
 * with each renewal; a call that begins after it waits, as it would for a connection. Reads wait too: bytes that another
 * has written meanwhile beside those that are here would be a mixture that never existed.
 *
 *     closed (until = 0)  -> open until T    far_admit_open()
 *     open until T        -> closed          by itself, when T has passed; or when the remote says ESTALE: it may be another
 *                                            one, or another's. lease.c asks it, and opens or fences
 *     any                 -> fenced          far_admit_fence(), for good
 *
 * The time is one that goes on while this machine sleeps: somebody else may have taken the lease by then.
 *
 * The open gate costs one atomic load and a look at the clock. `lock` guards only sleeping.
 */
#define _GNU_SOURCE
#include "mount/admit.h"

#include "base/clock.h"
#include "base/thread.h"

#include <stdatomic.h>
#include <stdlib.h>

struct far_admit {
	/* fixed */
	struct far_backend *inner;
	uint64_t max_wait;
	/* atomic; written under lock, so that who sleeps misses no change */
	_Atomic uint64_t until;
	_Atomic bool fenced, stopped;
	void (*doubt)(void *opaque); /* fixed before the gate is opened */
	void *opaque;

	struct far_mutex lock;
	struct far_cond changed;
};

static bool admit_is_open(struct far_admit *a)
{
	uint64_t until = atomic_load_explicit(&a->until, memory_order_acquire);
	return until == FAR_NEVER || (until && far_now_slept() < until);
}

static int admit_wait(struct far_admit *a)
{
	uint64_t end = far_deadline();
	int r = 0;

	if (a->max_wait != FAR_NEVER)
		end = far_min(end, far_now() + a->max_wait);
	far_mutex_lock(&a->lock);
	for (;;) {
		r = atomic_load(&a->stopped) ? -ESHUTDOWN : atomic_load(&a->fenced) ? -ESTALE : 0;
		if (r || admit_is_open(a))
			break;
		if (!far_cond_wait_until(&a->changed, &a->lock, end)) {
			r = -ETIMEDOUT;
			break;
		}
	}
	far_mutex_unlock(&a->lock);
	return r;
}

static int admit_enter(struct far_admit *a, unsigned flags)
{
	if (atomic_load_explicit(&a->fenced, memory_order_acquire))
		return -ESTALE;
	if (admit_is_open(a))
		return 0;
	return flags & FAR_NOWAIT ? -EAGAIN : admit_wait(a);
}

/* After a call: whether it is to be made again. Only who opens for a time can open again. */
static bool admit_again(struct far_admit *a, int r)
{
	uint64_t until = atomic_load_explicit(&a->until, memory_order_acquire);

	if (r != -ESTALE || !a->doubt || until == FAR_NEVER || atomic_load_explicit(&a->fenced, memory_order_acquire))
		return false;
	far_mutex_lock(&a->lock);
	if (atomic_load(&a->until) == until)
		atomic_store_explicit(&a->until, 0, memory_order_release);
	far_mutex_unlock(&a->lock);
	a->doubt(a->opaque);
	return true;
}

/* The call, each time the gate lets it through. */
#define ADMIT(a, flags, call)                                                                                           \
	({                                                                                                              \
		int r_;                                                                                                 \
		do                                                                                                      \
			r_ = admit_enter(a, flags);                                                                     \
		while (!r_ && admit_again(a, r_ = (call)));                                                             \
		r_;                                                                                                     \
	})

static int admit_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct far_admit *a = self;
	return ADMIT(a, flags, far_read(a->inner, off, buf, len, flags));
}

static int admit_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct far_admit *a = self;
	return ADMIT(a, flags, far_write(a->inner, off, buf, len, flags));
}

static int admit_flush(void *self)
{
	struct far_admit *a = self;
	return ADMIT(a, 0, far_flush(a->inner));
}

static int admit_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct far_admit *a = self;
	return ADMIT(a, flags, far_discard(a->inner, off, len, flags));
}

static int admit_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct far_admit *a = self;
	return ADMIT(a, flags, far_zero(a->inner, off, len, flags));
}

static int admit_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct far_admit *a = self;
	return ADMIT(a, 0, far_extents(a->inner, off, len, out, max, n));
}

static void admit_many(void *self, bool write, struct far_io *io, size_t n, unsigned flags)
{
	struct far_admit *a = self;
	int refused = admit_enter(a, flags);

	if (!refused)
		(write ? far_write_many : far_read_many)(a->inner, io, n, flags);
	for (size_t i = 0; i < n; i++) {
		if (refused)
			io[i].result = refused;
		else if (admit_again(a, io[i].result))
			io[i].result = write ? admit_write(a, io[i].off, io[i].buf, io[i].len, flags)
					     : admit_read(a, io[i].off, io[i].buf, io[i].len, flags);
	}
}

static void admit_read_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	admit_many(self, false, io, n, flags);
}

static void admit_write_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	admit_many(self, true, io, n, flags);
}

static void admit_stop(void *self)
{
	struct far_admit *a = self;

	far_mutex_lock(&a->lock);
	atomic_store(&a->stopped, true);
	far_cond_broadcast(&a->changed);
	far_mutex_unlock(&a->lock);
	far_stop(a->inner);
}

static void admit_close(void *self)
{
	struct far_admit *a = self;

	far_close(a->inner);
	far_cond_fini(&a->changed);
	far_mutex_fini(&a->lock);
	free(a);
}

static struct far_backend *admit_inner(void *self)
{
	struct far_admit *a = self;
	return a->inner;
}

static const struct far_ops admit_ops = {
	FAR_OPS_INIT,
	.read = admit_read,
	.write = admit_write,
	.flush = admit_flush,
	.discard = admit_discard,
	.zero = admit_zero,
	.extents = admit_extents,
	.read_many = admit_read_many,
	.write_many = admit_write_many,
	.stop = admit_stop,
	.close = admit_close,
	.inner = admit_inner,
};

int far_admit_new(struct far_backend *inner, uint64_t max_wait, struct far_backend **out, struct far_admit **gate)
{
	struct far_facts facts = *far_facts(inner);
	struct far_admit *a = calloc(1, sizeof *a);

	if (!a)
		return -ENOMEM;
	a->inner = inner;
	a->max_wait = max_wait;
	far_mutex_init(&a->lock);
	far_cond_init(&a->changed);
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	int r = far_backend_new(&admit_ops, a, &facts, out);
	if (r) {
		far_cond_fini(&a->changed);
		far_mutex_fini(&a->lock);
		free(a);
		return r;
	}
	*gate = a;
	return 0;
}

void far_admit_on_doubt(struct far_admit *a, void (*doubt)(void *opaque), void *opaque)
{
	a->doubt = doubt;
	a->opaque = opaque;
}

void far_admit_open(struct far_admit *a, uint64_t until)
{
	far_mutex_lock(&a->lock);
	atomic_store_explicit(&a->until, until, memory_order_release);
	far_cond_broadcast(&a->changed);
	far_mutex_unlock(&a->lock);
}

void far_admit_fence(struct far_admit *a)
{
	far_mutex_lock(&a->lock);
	atomic_store_explicit(&a->fenced, true, memory_order_release);
	far_cond_broadcast(&a->changed);
	far_mutex_unlock(&a->lock);
}
