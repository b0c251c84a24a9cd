/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "wire/nbd/service.h"

#include "backend/backend.h"
#include "base/io.h"
#include "wire/loans.h"

#include <stdatomic.h>
#include <stdlib.h>

#define SERVICE_EXTENTS 1024 /* descriptors in a reply, for each context */
#define SERVICE_HOLE_MIN 512

void far_nbd_peer_init(struct far_nbd_peer *peer, const struct far_nbd_hello *h)
{
	const struct far_export *e = h->export;

	*peer = (struct far_nbd_peer){
		.env = h->env, .e = e, .form = h->form,
		.contexts = h->context_for == e ? h->contexts : 0, /* chosen for another export: of no use here */
		.size = far_size(e->b), .min = far_nbd_min_block(e), .max = far_nbd_max_block(h->env, e),
		.writable = far_nbd_writable(h, e),
		.fast_zero = far_backend_zeroes(e->b), .memory = far_backend_is_memory(e->b),
	};
}

/* ------------------------------------------------------------------------------------------------------ checks */

static unsigned service_flags_of(uint16_t type)
{
	switch (type) {
	case FAR_NBD_READ:
		return FAR_NBD_DF;
	case FAR_NBD_WRITE_ZEROES:
		return FAR_NBD_NO_HOLE | FAR_NBD_FAST_ZERO;
	case FAR_NBD_BLOCK_STATUS:
		return FAR_NBD_REQ_ONE;
	default:
		return 0;
	}
}

static int service_check_flags(const struct far_nbd_peer *peer, const struct far_nbd_request *q, const char **why)
{
	/* FUA means nothing to what changes nothing, and harms nobody. */
	unsigned known = service_flags_of(q->type) | FAR_NBD_FUA;

	if (peer->form == FAR_NBD_SIMPLE)
		known &= ~(unsigned)FAR_NBD_DF;
	if (peer->form == FAR_NBD_EXTENDED && q->type == FAR_NBD_WRITE)
		known |= FAR_NBD_PAYLOAD_LEN;
	*why = "a flag that does not belong to this request";
	return q->flags & ~known ? -EINVAL : 0;
}

static int service_check_range(const struct far_nbd_peer *peer, const struct far_nbd_request *q, const char **why)
{
	bool grows = q->type == FAR_NBD_WRITE || q->type == FAR_NBD_WRITE_ZEROES;

	if (q->off > peer->size || q->len > peer->size - q->off) {
		*why = "the request ends beyond the end of the export";
		return grows ? -ENOSPC : -EINVAL;
	}
	/* The region's last block may be a short one. */
	uint64_t mask = peer->min - 1;
	if ((q->off & mask) || ((q->len & mask) && q->off + q->len != peer->size)) {
		*why = "the request is not aligned to the smallest block size";
		return -EINVAL;
	}
	if ((q->type == FAR_NBD_READ || q->type == FAR_NBD_WRITE) && q->len > peer->max) {
		*why = "the request is longer than the largest block size";
		return -EINVAL;
	}
	return 0;
}

int far_nbd_check(const struct far_nbd_peer *peer, const struct far_nbd_request *q, const char **why)
{
	bool change = q->type == FAR_NBD_WRITE || q->type == FAR_NBD_TRIM || q->type == FAR_NBD_WRITE_ZEROES;

	*why = "an unknown request";
	if (q->type > FAR_NBD_BLOCK_STATUS)
		return -EINVAL;
	int r = service_check_flags(peer, q, why);
	if (r)
		return r;
	*why = "the export is read-only";
	if (change && !peer->writable)
		return -EPERM;
	if (q->type == FAR_NBD_FLUSH) {
		*why = "a flush has no range";
		return q->off || q->len ? -EINVAL : 0;
	}
	if (q->type == FAR_NBD_BLOCK_STATUS) {
		*why = "no metadata context was chosen, or the range is empty";
		if (!peer->contexts || !q->len)
			return -EINVAL;
	}
	if (q->type == FAR_NBD_WRITE_ZEROES && q->flags & FAR_NBD_FAST_ZERO && !peer->fast_zero) {
		*why = "zeros would have to be written";
		return -EOPNOTSUPP;
	}
	return service_check_range(peer, q, why);
}

/* ---------------------------------------------------------------------------------------------------- commands */

static int service_flush(struct far_nbd_peer *peer, unsigned flags)
{
	struct far_origin now;

	if (!peer->writable)
		return 0;
	if ((flags & FAR_NOWAIT) && !peer->memory)
		return -EAGAIN;
	atomic_store_explicit(&peer->flushes, true, memory_order_relaxed);
	atomic_store_explicit(&peer->unflushed, false, memory_order_relaxed);
	int r = far_owner_flush(peer->e->owner, &now);
	if (r)
		atomic_store_explicit(&peer->unflushed, true, memory_order_relaxed);
	return r;
}

/* A change, as the plain gRPC service makes it: without a session, so that a lease of somebody else's forbids it. */
static int service_change_begin(struct far_nbd_peer *peer, uint64_t off, uint64_t len, unsigned flags)
{
	const struct far_export *e = peer->e;
	int r = far_owner_change_begin(e->owner, 0, 0, flags & FAR_NOWAIT);

	if (r)
		return r;
	r = far_loans_change_begin(e->loans, off, len, !(flags & FAR_NOWAIT));
	if (r)
		far_owner_change_end(e->owner, 0, 0, off, len, false);
	return r;
}

static void service_change_end(struct far_nbd_peer *peer, uint64_t off, uint64_t len, bool changed)
{
	far_loans_change_end(peer->e->loans);
	far_owner_change_end(peer->e->owner, 0, 0, off, len, changed);
	if (changed && !atomic_load_explicit(&peer->unflushed, memory_order_relaxed))
		atomic_store_explicit(&peer->unflushed, true, memory_order_relaxed);
}

static int service_change(struct far_nbd_peer *peer, const struct far_nbd_request *q, const void *data, unsigned flags)
{
	const struct far_export *e = peer->e;
	int r = service_change_begin(peer, q->off, q->len, flags);

	if (r)
		return r;
	if (q->type == FAR_NBD_WRITE)
		r = far_write(e->b, q->off, data, (size_t)q->len, flags);
	else if (q->flags & FAR_NBD_NO_HOLE)
		r = far_zero(e->b, q->off, q->len, flags);
	else
		r = far_discard(e->b, q->off, q->len, flags);
	service_change_end(peer, q->off, q->len, r != -EAGAIN);
	return r;
}

ssize_t far_nbd_receive(struct far_nbd_peer *peer, uint64_t off, struct far_conn *conn, const struct iovec *iov, int n)
{
	size_t len = iov[0].iov_len;
	int r = service_change_begin(peer, off, len, 0);

	if (r)
		return -ECANCELED;
	ssize_t k = conn->ops->readv(conn, iov, n);
	/* Of what came, not of what might have come: the range may be long and the pieces short. */
	service_change_end(peer, off, k > 0 ? far_min((uint64_t)k, len) : 0, k > 0 || k == -EFAULT);
	return k;
}

int far_nbd_perform(struct far_nbd_peer *peer, const struct far_nbd_request *q, void *data, unsigned flags)
{
	const struct far_export *e = peer->e;
	int r;

	switch (q->type) {
	case FAR_NBD_READ:
		return far_read(e->b, q->off, data, (size_t)q->len, flags);
	case FAR_NBD_FLUSH:
		return service_flush(peer, flags);
	case FAR_NBD_CACHE:
		if (e->prefetch)
			e->prefetch(e->hooks, q->off, q->len);
		return 0;
	default:
		if ((q->flags & FAR_NBD_FUA) && (flags & FAR_NOWAIT) && !peer->memory)
			return -EAGAIN;
		r = q->len ? service_change(peer, q, data, flags) : 0;
		return r == 0 && (q->flags & FAR_NBD_FUA) ? service_flush(peer, flags) : r;
	}
}

bool far_nbd_is_hole(const struct far_nbd_peer *peer, const void *data, size_t len)
{
	return peer->form != FAR_NBD_SIMPLE && len >= SERVICE_HOLE_MIN && far_is_zero(data, len);
}

/* ------------------------------------------------------------------------------------------------ block status */

struct service_list {
	size_t n, max;
	struct {
		uint64_t len;
		uint32_t flags;
	} of[SERVICE_EXTENTS];
};

/* False: there is no room for another. */
static bool service_add(struct service_list *l, uint64_t len, uint32_t flags)
{
	if (l->n && l->of[l->n - 1].flags == flags) {
		l->of[l->n - 1].len += len;
		return true;
	}
	if (l->n == l->max)
		return false;
	l->of[l->n].len = len;
	l->of[l->n++].flags = flags;
	return true;
}

static int service_allocation(struct far_nbd_peer *peer, const struct far_nbd_request *q, struct service_list *l)
{
	struct far_extent list[64];
	uint64_t at = q->off, end = q->off + q->len;

	while (at < end) {
		size_t n = 0;
		int r = far_extents(peer->e->b, at, end - at, list, FAR_ARRAY_LEN(list), &n);
		if (r)
			return l->n ? 0 : r;
		for (size_t i = 0; i < n; i++) {
			bool zero = list[i].kind == FAR_EXTENT_ZERO;
			if (!service_add(l, list[i].len, zero ? FAR_NBD_STATE_HOLE | FAR_NBD_STATE_ZERO : 0))
				return 0;
			at += list[i].len;
		}
		if (!n)
			break;
	}
	return 0;
}

static void service_look(struct far_nbd_peer *peer, const struct far_nbd_request *q, enum far_nbd_context which,
			 struct service_list *l)
{
	const struct far_export *e = peer->e;
	uint64_t at = q->off, end = q->off + q->len;

	while (at < end) {
		/* A store without a chunk map is what it serves: all of it is here, unless it is itself on another host. */
		uint64_t run = end - at;
		unsigned state = far_facts(e->b)->caps & FAR_CAP_REMOTE ? 0 : FAR_EXPORT_LOCAL;
		if (e->look)
			state = e->look(e->hooks, at, end - at, &run);
		FAR_ASSERT(run && run <= end - at);
		bool on = state & (which == FAR_NBD_CONTEXT_LOCAL ? FAR_EXPORT_LOCAL : FAR_EXPORT_DIRTY);
		if (!service_add(l, run, on))
			return;
		at += run;
	}
}

static uint8_t *service_put_list(const struct far_nbd_peer *peer, const struct far_nbd_request *q, unsigned which, bool last,
				 const struct service_list *l, uint8_t *p)
{
	bool ext = peer->form == FAR_NBD_EXTENDED;
	uint32_t len = (uint32_t)(ext ? 8 + 16 * l->n : 4 + 8 * l->n);

	p += far_nbd_put_chunk(peer->form, p, q, last ? FAR_NBD_CHUNK_DONE : 0,
			       ext ? FAR_NBD_CHUNK_BLOCK_STATUS_EXT : FAR_NBD_CHUNK_BLOCK_STATUS, len);
	p = far_nbd_put32(p, which + 1);
	if (ext)
		p = far_nbd_put32(p, (uint32_t)l->n);
	for (size_t i = 0; i < l->n; i++) {
		if (ext) {
			p = far_nbd_put64(p, l->of[i].len);
			p = far_nbd_put64(p, l->of[i].flags);
		} else {
			p = far_nbd_put32(p, (uint32_t)l->of[i].len);
			p = far_nbd_put32(p, l->of[i].flags);
		}
	}
	return p;
}

int far_nbd_status(struct far_nbd_peer *peer, const struct far_nbd_request *q, unsigned flags, uint8_t **out, size_t *n)
{
	unsigned contexts = peer->contexts;

	/* Extents of a file may have to be read from its disk. */
	if ((flags & FAR_NOWAIT) && !peer->memory)
		return -EAGAIN;
	FAR_CLEANUP(far_free_cleanup) struct service_list *l = malloc(sizeof *l);
	uint8_t *buf = malloc(FAR_NBD_CONTEXTS * (FAR_NBD_HEAD_MAX + 16 * (size_t)SERVICE_EXTENTS)), *p = buf;
	int r = l && buf ? 0 : -ENOMEM;
	for (unsigned c = 0; c < FAR_NBD_CONTEXTS && r == 0; c++) {
		if (!(contexts & 1u << c))
			continue;
		l->n = 0;
		l->max = q->flags & FAR_NBD_REQ_ONE ? 1 : SERVICE_EXTENTS;
		if (c == FAR_NBD_CONTEXT_ALLOCATION)
			r = service_allocation(peer, q, l);
		else
			service_look(peer, q, c, l);
		if (r == 0)
			p = service_put_list(peer, q, c, !(contexts >> (c + 1)), l, p);
	}
	if (r) {
		free(buf);
		return r;
	}
	*out = buf;
	*n = (size_t)(p - buf);
	return 0;
}

/* ------------------------------------------------------------------------------------------------------ errors */

size_t far_nbd_put_fail(const struct far_nbd_peer *peer, uint8_t *p, const struct far_nbd_request *q, int err,
			const char *why)
{
	if (peer->form == FAR_NBD_SIMPLE)
		return far_nbd_put_done(peer->form, p, q, far_nbd_errno(err));
	if (!why)
		why = err == -ESTALE ? "another client holds the lease of this export" : far_strerror(err);
	size_t text = far_min(strlen(why), FAR_NBD_FAIL_MAX - FAR_NBD_HEAD_MAX);
	size_t n = far_nbd_put_chunk(peer->form, p, q, FAR_NBD_CHUNK_DONE, FAR_NBD_CHUNK_ERROR, (uint32_t)(6 + text));
	far_nbd_put32(p + n, far_nbd_errno(err));
	far_nbd_put16(p + n + 4, (uint16_t)text);
	memcpy(p + n + 6, why, text);
	return n + 6 + text;
}
