/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A gate: calls that begin while it is closed wait until it is opened. Closing it waits for the calls that are inside,
 * so that after it nothing moves below. `lock` guards the count of those; it is not held while they run.
 */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/clock.h"
#include "base/options.h"
#include "base/thread.h"

#include <stdlib.h>

struct gated {
	/* fixed after open */
	struct far_backend *inner;

	struct far_mutex lock;
	struct far_cond change; /* opened, stopped, or the last call has left */
	bool closed FAR_GUARDED_BY(lock), stopped FAR_GUARDED_BY(lock);
	uint64_t open_at FAR_GUARDED_BY(lock); /* opens by itself then; FAR_NEVER */
	unsigned inside FAR_GUARDED_BY(lock);
};

struct gated_conf {
	bool closed;
	uint64_t open_after;
};

static const struct far_opt gated_options[] = {
	{ "closed", FAR_OPT_BOOL, offsetof(struct gated_conf, closed), .help = "begin closed", .def = "no" },
	{ "open-after", FAR_OPT_DURATION, offsetof(struct gated_conf, open_after), 0, 3600e9, NULL, "TIME",
	  "begin closed and open by itself after this time" },
	FAR_OPT_END,
};

static bool gated_closed_locked(struct gated *g) FAR_REQUIRES(&g->lock)
{
	if (g->closed && g->open_at != FAR_NEVER && far_now() >= g->open_at)
		g->closed = false;
	return g->closed;
}

static int gated_enter(struct gated *g, unsigned flags)
{
	uint64_t deadline = far_deadline();
	int r = 0;

	far_mutex_lock(&g->lock);
	while (!r && !g->stopped && gated_closed_locked(g)) {
		if (flags & FAR_NOWAIT)
			r = -EAGAIN;
		else if (!far_cond_wait_until(&g->change, &g->lock, far_min(deadline, g->open_at)) && far_now() >= deadline)
			r = -ETIMEDOUT;
	}
	if (g->stopped)
		r = -ESHUTDOWN;
	if (!r)
		g->inside++;
	far_mutex_unlock(&g->lock);
	return r;
}

static int gated_leave(struct gated *g, int r)
{
	far_mutex_lock(&g->lock);
	if (!--g->inside)
		far_cond_broadcast(&g->change);
	far_mutex_unlock(&g->lock);
	return r;
}

static int gated_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct gated *g = self;
	int r = gated_enter(g, flags);
	return r ? r : gated_leave(g, far_read(g->inner, off, buf, len, flags));
}

static int gated_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct gated *g = self;
	int r = gated_enter(g, flags);
	return r ? r : gated_leave(g, far_write(g->inner, off, buf, len, flags));
}

static int gated_flush(void *self)
{
	struct gated *g = self;
	int r = gated_enter(g, 0);
	return r ? r : gated_leave(g, far_flush(g->inner));
}

static int gated_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct gated *g = self;
	int r = gated_enter(g, flags);
	return r ? r : gated_leave(g, far_discard(g->inner, off, len, flags));
}

static int gated_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct gated *g = self;
	int r = gated_enter(g, flags);
	return r ? r : gated_leave(g, far_zero(g->inner, off, len, flags));
}

static int gated_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct gated *g = self;
	int r = gated_enter(g, 0);
	return r ? r : gated_leave(g, far_extents(g->inner, off, len, out, max, n));
}

static void gated_stop(void *self)
{
	struct gated *g = self;

	far_mutex_lock(&g->lock);
	g->stopped = true;
	far_cond_broadcast(&g->change);
	far_mutex_unlock(&g->lock);
	far_stop(g->inner);
}

static void gated_free(struct gated *g)
{
	far_cond_fini(&g->change);
	far_mutex_fini(&g->lock);
	free(g);
}

static void gated_close(void *self)
{
	struct gated *g = self;
	FAR_ASSERT(!g->inside);
	far_close(g->inner);
	gated_free(g);
}

static struct far_backend *gated_inner(void *self)
{
	struct gated *g = self;
	return g->inner;
}

/* No share: a mapping knows no gate. */
static const struct far_ops gated_ops = {
	FAR_OPS_INIT,
	.read = gated_read,
	.write = gated_write,
	.flush = gated_flush,
	.discard = gated_discard,
	.zero = gated_zero,
	.extents = gated_extents,
	.stop = gated_stop,
	.close = gated_close,
	.inner = gated_inner,
};

void far_gated_open(struct far_backend *b)
{
	struct gated *g = far_backend_self(b, gated_read);

	far_mutex_lock(&g->lock);
	g->closed = false;
	far_cond_broadcast(&g->change);
	far_mutex_unlock(&g->lock);
}

int far_gated_close(struct far_backend *b)
{
	struct gated *g = far_backend_self(b, gated_read);
	uint64_t deadline = far_deadline();
	int r = 0;

	far_mutex_lock(&g->lock);
	g->closed = true;
	g->open_at = FAR_NEVER;
	while (!r && g->inside && g->closed) {
		if (g->stopped)
			r = -ESHUTDOWN;
		else if (!far_cond_wait_until(&g->change, &g->lock, deadline) && far_now() >= deadline)
			r = -ETIMEDOUT;
	}
	far_mutex_unlock(&g->lock);
	return r;
}

static int gated_open(const void *conf, struct far_backend *inner, struct far_backend **out, struct far_error *err)
{
	const struct gated_conf *gc = conf;
	struct far_facts facts = *far_facts(inner);
	struct gated *g = calloc(1, sizeof *g);

	if (!g)
		return far_error_set(err, ENOMEM, "layer gated: %s.", far_strerror(ENOMEM));
	g->inner = inner;
	g->closed = gc->closed || gc->open_after;
	g->open_at = gc->open_after ? far_now() + gc->open_after : FAR_NEVER;
	far_mutex_init(&g->lock);
	far_cond_init(&g->change);
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	int r = far_layer_new(&far_layer_gated, &gated_ops, g, &facts, out, err);
	if (r)
		gated_free(g);
	return r;
}

const struct far_layer far_layer_gated = {
	.name = "gated",
	.help = "let calls wait until it is opened",
	.options = gated_options,
	.conf_size = sizeof(struct gated_conf),
	.open = gated_open,
};
