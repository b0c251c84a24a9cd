/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A long thin link: every call waits its own round trip (with jitter), and the bytes of all calls share a pipe of
 * `rate` bytes a second, one for each direction.
 *
 *   read:   round trip | place in the pipe down, inner call meanwhile | until its last byte is through
 *   write:  place in the pipe up, until its last byte is through | round trip | inner call
 *
 * So the inner call of a write happens last: one that gives up (-ETIMEDOUT, -ESHUTDOWN) has changed nothing.
 *
 * A wait sleeps to 300 us before its end, then spins: a sleeper wakes 50 to 100 us late. Bulk calls only sleep, and so
 * does who finds one spinner for each two CPUs already: spinners that outnumber the CPUs delay each other more.
 *
 * `lock` guards the pipes and the totals, and is the one that sleepers wait with; never held across the inner call.
 */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/clock.h"
#include "base/options.h"
#include "base/thread.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DELAY_SPIN (300 * FAR_USEC)

enum delay_direction { DELAY_DOWN, DELAY_UP };

struct delay_conf {
	uint64_t rtt, jitter; /* ns */
	uint64_t rate;        /* bytes a second; 0: unlimited */
};

struct delay {
	/* fixed after open */
	struct far_backend *inner;
	struct delay_conf conf;
	int max_spinners;
	/* atomic: only their own value matters */
	_Atomic bool stopped;
	_Atomic int spinners;
	_Atomic uint64_t rng;

	struct far_mutex lock;
	struct far_cond wake; /* stop */
	uint64_t pipe_free[2] FAR_GUARDED_BY(lock); /* when the last byte that was placed is through */
	struct far_delay_stats stats FAR_GUARDED_BY(lock);
};

static const struct far_opt delay_options[] = {
	{ "rtt", FAR_OPT_DURATION, offsetof(struct delay_conf, rtt), 0, 3600e9, NULL, "TIME", "round trip of every call", "0" },
	{ "jitter", FAR_OPT_DURATION, offsetof(struct delay_conf, jitter), 0, 3600e9, NULL, "TIME",
	  "up to this much more, at random", "0" },
	{ "rate", FAR_OPT_SIZE, offsetof(struct delay_conf, rate), .value_name = "SIZE",
	  .help = "bytes a second, each direction", .def = "unlimited" },
	FAR_OPT_END,
};

/* splitmix64: good enough for jitter, and one atomic add. */
static uint64_t delay_random(struct delay *d)
{
	uint64_t z = atomic_fetch_add_explicit(&d->rng, 0x9e3779b97f4a7c15, memory_order_relaxed);
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static bool delay_stopped(struct delay *d)
{
	return atomic_load_explicit(&d->stopped, memory_order_relaxed);
}

static void delay_sleep(struct delay *d, uint64_t until)
{
	far_mutex_lock(&d->lock);
	while (!delay_stopped(d) && far_now() < until)
		far_cond_wait_until(&d->wake, &d->lock, until);
	far_mutex_unlock(&d->lock);
}

static int delay_wait(struct delay *d, uint64_t until, unsigned flags)
{
	uint64_t deadline = far_deadline(), end = far_min(until, deadline);

	if (flags & FAR_BULK)
		goto sleep;
	delay_sleep(d, end - far_min(end, DELAY_SPIN));
	if (atomic_fetch_add_explicit(&d->spinners, 1, memory_order_relaxed) < d->max_spinners)
		while (!delay_stopped(d) && far_now() < end)
			far_cpu_relax();
	atomic_fetch_sub_explicit(&d->spinners, 1, memory_order_relaxed);
sleep:
	delay_sleep(d, end);
	if (delay_stopped(d))
		return -ESHUTDOWN;
	return until > deadline ? -ETIMEDOUT : 0;
}

/* Take the next `len` bytes of the pipe, which are not sent before `now`; when the last one is through. */
static uint64_t delay_place(struct delay *d, enum delay_direction dir, uint64_t now, uint64_t len)
{
	if (!d->conf.rate || !len)
		return now;
	uint64_t ns = (uint64_t)((unsigned __int128)len * FAR_SEC / d->conf.rate);
	far_mutex_lock(&d->lock);
	uint64_t done = far_max(d->pipe_free[dir], now) + ns;
	d->pipe_free[dir] = done;
	far_mutex_unlock(&d->lock);
	return done;
}

static uint64_t delay_trip(struct delay *d)
{
	return d->conf.rtt + (d->conf.jitter ? delay_random(d) % (d->conf.jitter + 1) : 0);
}

static void delay_count(struct delay *d, uint64_t waited)
{
	far_mutex_lock(&d->lock);
	d->stats.calls++;
	d->stats.last_ns = waited;
	d->stats.total_ns += waited;
	far_mutex_unlock(&d->lock);
}

/* True when nothing is to be waited for. */
static bool delay_none(const struct delay *d)
{
	return !d->conf.rtt && !d->conf.jitter && !d->conf.rate;
}

static uint64_t delay_bytes(const struct far_io *io, size_t n)
{
	uint64_t bytes = 0;

	for (size_t i = 0; i < n; i++)
		bytes += io[i].len;
	return bytes;
}

static void delay_refuse(struct far_io *io, size_t n, int r)
{
	for (size_t i = 0; i < n; i++)
		io[i].result = r;
}

/* Those of a list share one round trip. */
static void delay_read_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	struct delay *d = self;
	uint64_t start = far_now();

	if (delay_none(d)) {
		far_read_many(d->inner, io, n, flags);
		return;
	}
	int r = flags & FAR_NOWAIT ? -EAGAIN : delay_wait(d, start + delay_trip(d), flags);
	if (r) {
		delay_refuse(io, n, r);
		return;
	}
	uint64_t begin = far_now(), done = delay_place(d, DELAY_DOWN, begin, delay_bytes(io, n));
	if (far_read_many(d->inner, io, n, flags))
		return;
	uint64_t after = far_now();
	r = done > after ? delay_wait(d, done, flags) : 0;
	if (r)
		delay_refuse(io, n, r);
	else
		delay_count(d, begin - start + (far_now() - after));
}

static int delay_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct far_io one = { .off = off, .buf = buf, .len = len };

	delay_read_many(self, &one, 1, flags);
	return one.result;
}

/* Wait as a call does that sends `up` bytes. */
static int delay_send(struct delay *d, uint64_t up, unsigned flags)
{
	uint64_t start = far_now();

	if (delay_none(d))
		return 0;
	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	int r = delay_wait(d, delay_place(d, DELAY_UP, start, up) + delay_trip(d), flags);
	if (!r)
		delay_count(d, far_now() - start);
	return r;
}

static int delay_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct delay *d = self;
	int r = delay_send(d, len, flags);
	return r ? r : far_write(d->inner, off, buf, len, flags);
}

static void delay_write_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	struct delay *d = self;
	int r = delay_send(d, delay_bytes(io, n), flags);

	if (r)
		delay_refuse(io, n, r);
	else
		far_write_many(d->inner, io, n, flags);
}

static int delay_flush(void *self)
{
	struct delay *d = self;
	int r = delay_send(d, 0, 0);
	return r ? r : far_flush(d->inner);
}

static int delay_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct delay *d = self;
	int r = delay_send(d, 0, flags);
	return r ? r : far_discard(d->inner, off, len, flags);
}

static int delay_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct delay *d = self;
	int r = delay_send(d, 0, flags);
	return r ? r : far_zero(d->inner, off, len, flags);
}

static int delay_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct delay *d = self;
	int r = delay_send(d, 0, 0);
	return r ? r : far_extents(d->inner, off, len, out, max, n);
}

static void delay_stop(void *self)
{
	struct delay *d = self;

	far_mutex_lock(&d->lock);
	atomic_store_explicit(&d->stopped, true, memory_order_relaxed);
	far_cond_broadcast(&d->wake);
	far_mutex_unlock(&d->lock);
	far_stop(d->inner);
}

static void delay_free(struct delay *d)
{
	far_cond_fini(&d->wake);
	far_mutex_fini(&d->lock);
	free(d);
}

static void delay_close(void *self)
{
	struct delay *d = self;
	far_close(d->inner);
	delay_free(d);
}

static struct far_backend *delay_inner(void *self)
{
	struct delay *d = self;
	return d->inner;
}

/* No share: a mapping would go round the link. */
static const struct far_ops delay_ops = {
	FAR_OPS_INIT,
	.read = delay_read,
	.write = delay_write,
	.flush = delay_flush,
	.discard = delay_discard,
	.zero = delay_zero,
	.extents = delay_extents,
	.read_many = delay_read_many,
	.write_many = delay_write_many,
	.stop = delay_stop,
	.close = delay_close,
	.inner = delay_inner,
};

void far_delay_stats(struct far_backend *b, struct far_delay_stats *st)
{
	struct delay *d = far_backend_self(b, delay_read);

	far_mutex_lock(&d->lock);
	*st = d->stats;
	far_mutex_unlock(&d->lock);
}

static int delay_open(const void *conf, struct far_backend *inner, struct far_backend **out, struct far_error *err)
{
	struct far_facts facts = *far_facts(inner);
	struct delay *d = calloc(1, sizeof *d);
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	if (!d)
		return far_error_set(err, ENOMEM, "layer delay: %s.", far_strerror(ENOMEM));
	d->inner = inner;
	d->conf = *(const struct delay_conf *)conf;
	d->max_spinners = cpus > 2 ? (int)(cpus / 2) : 1;
	d->rng = far_now();
	far_mutex_init(&d->lock);
	far_cond_init(&d->wake);
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	facts.caps |= FAR_CAP_REMOTE;
	int r = far_layer_new(&far_layer_delay, &delay_ops, d, &facts, out, err);
	if (r)
		delay_free(d);
	return r;
}

const struct far_layer far_layer_delay = {
	.name = "delay",
	.help = "wait as on a long thin link",
	.options = delay_options,
	.conf_size = sizeof(struct delay_conf),
	.open = delay_open,
};
