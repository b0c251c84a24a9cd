/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A store that is opened here, without a server before it, with an owner of its own: what a client of a server gets by
 * farpage.v1 it gets by calls. One session, which never has to begin a second generation.
 */
#include "backend/backend.h"
#include "backend/record.h"

#include <stdlib.h>
#include <string.h>

struct owned {
	/* fixed */
	struct far_backend *inner;
	struct far_owner *owner;
	uint64_t session;
};

static int owned_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct owned *w = self;
	return far_read(w->inner, off, buf, len, flags);
}

static int owned_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct owned *w = self;
	int r = far_owner_change_begin(w->owner, w->session, 1, flags);

	if (r)
		return r;
	r = far_write(w->inner, off, buf, len, flags);
	far_owner_change_end(w->owner, w->session, 1, off, len, r != -EAGAIN);
	return r;
}

static int owned_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct owned *w = self;
	int r = far_owner_change_begin(w->owner, w->session, 1, flags);

	if (r)
		return r;
	r = far_discard(w->inner, off, len, flags);
	far_owner_change_end(w->owner, w->session, 1, off, len, r != -EAGAIN);
	return r;
}

static int owned_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct owned *w = self;
	int r = far_owner_change_begin(w->owner, w->session, 1, flags);

	if (r)
		return r;
	r = far_zero(w->inner, off, len, flags);
	far_owner_change_end(w->owner, w->session, 1, off, len, r != -EAGAIN);
	return r;
}

static int owned_flush(void *self)
{
	struct owned *w = self;
	struct far_origin now;

	return far_owner_flush(w->owner, &now);
}

static int owned_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct owned *w = self;
	return far_extents(w->inner, off, len, out, max, n);
}

static int owned_origin(void *self, struct far_origin *out, unsigned flags)
{
	struct owned *w = self;

	far_owner_origin(w->owner, out);
	return 0;
}

static int owned_lease(void *self, struct far_lease *l)
{
	struct owned *w = self;
	return far_owner_lease(w->owner, w->session, 1, l);
}

static int owned_watch(void *self, uint64_t instance, uint64_t since, struct far_extent *out, size_t max, size_t *n,
		       bool *all, struct far_origin *now)
{
	struct owned *w = self;
	return far_owner_watch(w->owner, instance, since, out, max, n, all, now);
}

static void owned_stop(void *self)
{
	struct owned *w = self;

	far_owner_farewell(w->owner);
	far_stop(w->inner);
}

static void owned_close(void *self)
{
	struct owned *w = self;

	far_owner_free(w->owner);
	far_close(w->inner);
	free(w);
}

static struct far_backend *owned_inner(void *self)
{
	struct owned *w = self;
	return w->inner;
}

static const struct far_ops owned_ops = {
	FAR_OPS_INIT,
	.read = owned_read,
	.write = owned_write,
	.flush = owned_flush,
	.discard = owned_discard,
	.zero = owned_zero,
	.extents = owned_extents,
	.stop = owned_stop,
	.close = owned_close,
	.inner = owned_inner,
	.origin = owned_origin,
	.lease = owned_lease,
	.watch = owned_watch,
};

int far_owned_new(struct far_backend *inner, struct far_backend **out)
{
	struct far_facts facts = *far_facts(inner);
	struct owned *w = calloc(1, sizeof *w);
	struct far_origin now;

	if (!w)
		return -ENOMEM;
	w->inner = inner;
	w->session = far_record_random();
	int r = far_owner_new(inner, 0, &w->owner);
	if (r == 0)
		r = far_owner_session(w->owner, w->session, 1);
	if (r == 0) {
		far_owner_connected(w->owner, w->session, 1);
		far_owner_origin(w->owner, &now);
		memcpy(facts.identity, now.identity, sizeof facts.identity);
		facts.caps &= ~(uint32_t)FAR_CAP_SHARE; /* changes are counted here */
		r = far_backend_new(&owned_ops, w, &facts, out);
	}
	if (r) {
		far_owner_free(w->owner);
		free(w);
	}
	return r;
}
