/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The dispatcher: every call of a backend passes through here, so that no backend checks a range, an alignment or a
 * cap itself, and no caller sees a short count or a failure without a code.
 *
 * Order of the checks: stopped, may it write, range, alignment. Then the request is cut to max_io. A stop only sets a
 * flag and tells the backend; calls that run are the backend's to end. far_close() stops, then destroys; a layer's
 * close does the same to what it wraps, so the stack goes down from the top.
 */
#define _GNU_SOURCE
#include "backend/backend.h"

#include "base/clock.h"
#include "base/pool.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Zeros are written this much at a time where a backend cannot zero. */
#define BACKEND_ZERO_RUN ((uint64_t)1 << 20)
/* Of a list so many, and hardly more than so many bytes, are handed down at a time. */
#define BACKEND_LIST 1024
#define BACKEND_LIST_BYTES ((uint64_t)8 << 20)

struct far_backend {
	/* fixed after open */
	struct far_ops ops;
	void *self;
	struct far_facts facts;
	/* atomic: set once by far_stop(), relaxed: whoever must see it at once is told through ops.stop */
	_Atomic bool stopped;
};

bool far_error_is_transient(int code)
{
	switch (code < 0 ? -code : code) {
	case EIO:
	case ETIMEDOUT:
	case EPIPE:
	case ECONNRESET:
	case ECONNREFUSED:
	case ECONNABORTED:
	case ENOTCONN:
	case ENETDOWN:
	case ENETUNREACH:
	case ENETRESET:
	case EHOSTDOWN:
	case EHOSTUNREACH:
	case ENOBUFS:
	case EAGAIN:
	case EBUSY:
	case EBADMSG: /* bytes were changed on their way: another try may bring them whole */
		return true;
	default:
		return false;
	}
}

static bool backend_facts_ok(const struct far_ops *ops, const struct far_facts *f)
{
	if (!ops->read || !ops->flush || f->bytes > FAR_SIZE_MAX || f->chunk > FAR_SIZE_MAX)
		return false;
	if ((f->caps & FAR_CAP_WRITE) && !ops->write)
		return false;
	if ((f->caps & FAR_CAP_SHARE) && !ops->share)
		return false;
	return !f->chunk || !f->max_io || f->max_io >= f->chunk;
}

int far_backend_new(const struct far_ops *ops, void *self, const struct far_facts *facts, struct far_backend **out)
{
	struct far_backend *b = calloc(1, sizeof *b);

	if (!b)
		return -ENOMEM;
	/* A program built against an older header gives shorter structs, one against a newer header longer ones. */
	memcpy(&b->ops, ops, far_min(ops->size, sizeof b->ops));
	memcpy(&b->facts, facts, far_min(facts->size, sizeof b->facts));
	b->facts.size = sizeof b->facts;
	b->facts.identity[sizeof b->facts.identity - 1] = 0;
	b->facts.version[sizeof b->facts.version - 1] = 0;
	b->self = self;
	if (!backend_facts_ok(&b->ops, &b->facts)) {
		free(b);
		return -EINVAL;
	}
	if (b->facts.chunk && b->facts.max_io)
		b->facts.max_io -= b->facts.max_io % b->facts.chunk;
	*out = b;
	return 0;
}

bool far_backend_is(const struct far_backend *b, int (*read)(void *, uint64_t, void *, size_t, unsigned))
{
	return b->ops.read == read;
}

void *far_backend_self(const struct far_backend *b, int (*read)(void *, uint64_t, void *, size_t, unsigned))
{
	FAR_ASSERT(b->ops.read == read);
	return b->self;
}

void far_backend_set_read_only(struct far_backend *b)
{
	b->facts.caps &= ~(uint32_t)FAR_CAP_WRITE;
}

void far_stop(struct far_backend *b)
{
	if (!b)
		return;
	atomic_store_explicit(&b->stopped, true, memory_order_relaxed);
	if (b->ops.stop)
		b->ops.stop(b->self);
}

void far_close(struct far_backend *b)
{
	if (!b)
		return;
	far_stop(b);
	if (b->ops.close)
		b->ops.close(b->self);
	free(b);
}

const struct far_facts *far_facts(const struct far_backend *b)
{
	return &b->facts;
}

uint64_t far_size(const struct far_backend *b)
{
	return b->facts.bytes;
}

static bool backend_stopped(struct far_backend *b)
{
	return atomic_load_explicit(&b->stopped, memory_order_relaxed);
}

/* An operation answers 0 or -errno. Anything else, a byte count for instance, is a bug of the backend. */
static int backend_code(int r)
{
	FAR_ASSERT(r <= 0 && r >= -4095);
	return r;
}

static int backend_check(struct far_backend *b, uint64_t off, uint64_t len, bool write)
{
	const struct far_facts *f = &b->facts;

	if (backend_stopped(b))
		return -ESHUTDOWN;
	if (write && !(f->caps & FAR_CAP_WRITE))
		return -EROFS;
	if (off > f->bytes || len > f->bytes - off)
		return write ? -ENOSPC : -EINVAL;
	if (len && f->chunk && (off % f->chunk || ((off + len) % f->chunk && off + len != f->bytes)))
		return -EINVAL;
	return 0;
}

int far_read(struct far_backend *b, uint64_t off, void *buf, size_t len, unsigned flags)
{
	int r = backend_check(b, off, len, false);

	for (char *p = buf; !r && len;) {
		size_t n = b->facts.max_io ? far_min(len, b->facts.max_io) : len;
		r = backend_code(b->ops.read(b->self, off, p, n, flags));
		off += n;
		p += n;
		len -= n;
		if (!r && len && backend_stopped(b))
			r = -ESHUTDOWN;
	}
	return r;
}

int far_write(struct far_backend *b, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	int r = backend_check(b, off, len, true);
	bool flush = flags & FAR_FLUSH, able = b->facts.caps & FAR_CAP_FLUSH;

	/* -EAGAIN says that nothing was transferred, which a second piece, or a flush, could not take back. */
	if (!r && (flags & FAR_NOWAIT) && (flush || (b->facts.max_io && len > b->facts.max_io)))
		return -EAGAIN;
	flush = flush && !(able && len);
	for (const char *p = buf; !r && len;) {
		size_t n = b->facts.max_io ? far_min(len, b->facts.max_io) : len;
		r = backend_code(b->ops.write(b->self, off, p, n, n == len && able ? flags : flags & ~(unsigned)FAR_FLUSH));
		off += n;
		p += n;
		len -= n;
		if (!r && len && backend_stopped(b))
			r = -ESHUTDOWN;
	}
	return r || !flush ? r : far_flush(b);
}

/* Whether each of them is one call of the backend. */
static bool backend_many_ok(struct far_backend *b, const struct far_io *io, size_t n, unsigned flags, bool write)
{
	uint64_t most = b->facts.max_io ? b->facts.max_io : UINT64_MAX;

	if (n < 2 || (flags & FAR_NOWAIT) || !(write ? b->ops.write_many : b->ops.read_many))
		return false;
	for (size_t i = 0; i < n; i++)
		if (!io[i].len || io[i].len > most || backend_check(b, io[i].off, io[i].len, write))
			return false;
	return true;
}

/* How many of them: so much that one deadline will do for it. */
static size_t backend_part(const struct far_io *io, size_t n)
{
	uint64_t bytes = 0;
	size_t i = 0;

	while (i < n && i < BACKEND_LIST && bytes < BACKEND_LIST_BYTES)
		bytes += far_min(io[i++].len, BACKEND_LIST_BYTES);
	return i;
}

static void backend_each(struct far_backend *b, struct far_io *io, size_t n, unsigned flags, bool write)
{
	for (size_t i = 0; i < n; i++) {
		if (i && io[i - 1].result == -ETIMEDOUT)
			io[i].result = -ETIMEDOUT;
		else if (write)
			io[i].result = far_write(b, io[i].off, io[i].buf, io[i].len, flags);
		else
			io[i].result = far_read(b, io[i].off, io[i].buf, io[i].len, flags);
	}
}

static int backend_many(struct far_backend *b, struct far_io *io, size_t n, unsigned flags, bool write)
{
	bool late = false;
	int r = 0;

	for (size_t part; n; io += part, n -= part) {
		part = backend_part(io, n);
		if (!late && backend_many_ok(b, io, part, flags, write))
			(write ? b->ops.write_many : b->ops.read_many)(b->self, io, part, flags);
		else if (!late)
			backend_each(b, io, part, flags, write);
		for (size_t i = 0; i < part; i++) {
			io[i].result = late ? -ETIMEDOUT : backend_code(io[i].result);
			r = r ? r : io[i].result;
		}
		for (size_t i = 0; i < part; i++)
			late = late || io[i].result == -ETIMEDOUT;
	}
	return r;
}

int far_read_many(struct far_backend *b, struct far_io *io, size_t n, unsigned flags)
{
	return backend_many(b, io, n, flags, false);
}

int far_write_many(struct far_backend *b, struct far_io *io, size_t n, unsigned flags)
{
	int r = backend_many(b, io, n, flags & ~(unsigned)FAR_FLUSH, true);

	return r || !(flags & FAR_FLUSH) ? r : far_flush(b);
}

int far_flush(struct far_backend *b)
{
	if (backend_stopped(b))
		return -ESHUTDOWN;
	return backend_code(b->ops.flush(b->self));
}

static int backend_write_zeros(struct far_backend *b, uint64_t off, uint64_t len, unsigned flags)
{
	uint64_t chunk = b->facts.chunk ? b->facts.chunk : 1;
	uint64_t run = far_max(BACKEND_ZERO_RUN - BACKEND_ZERO_RUN % chunk, chunk);
	int r = 0;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	run = far_min(run, len);
	void *zeros = far_buf_get(run);
	if (!zeros)
		return -ENOMEM;
	memset(zeros, 0, run);
	while (!r && len) {
		size_t n = far_min(run, len);
		r = far_write(b, off, zeros, n, flags);
		off += n;
		len -= n;
		if (!r && len && far_deadline() != FAR_NEVER && far_now() >= far_deadline())
			r = -ETIMEDOUT;
	}
	far_buf_put(zeros, run);
	return r;
}

typedef int backend_range_op(void *self, uint64_t off, uint64_t len, unsigned flags);

static int backend_clear(struct far_backend *b, backend_range_op *first, backend_range_op *second, uint64_t off,
			 uint64_t len, unsigned flags)
{
	int r = backend_check(b, off, len, true);

	if (r || !len)
		return r;
	r = first ? backend_code(first(b->self, off, len, flags)) : -EOPNOTSUPP;
	if (r == -EOPNOTSUPP && second)
		r = backend_code(second(b->self, off, len, flags));
	return r == -EOPNOTSUPP ? backend_write_zeros(b, off, len, flags) : r;
}

int far_discard(struct far_backend *b, uint64_t off, uint64_t len, unsigned flags)
{
	return backend_clear(b, b->ops.discard, b->ops.zero, off, len, flags);
}

int far_zero(struct far_backend *b, uint64_t off, uint64_t len, unsigned flags)
{
	return backend_clear(b, b->ops.zero, b->ops.discard, off, len, flags);
}

/* Cut what the backend said to [off, off+len). -EIO when it is no cover of that range from its start. */
static int backend_clip(uint64_t off, uint64_t len, struct far_extent *e, size_t *n)
{
	uint64_t pos = off, end = off + len;
	size_t kept = 0;

	for (size_t i = 0; i < *n && pos < end; i++) {
		if (e[i].len > FAR_SIZE_MAX || e[i].off > FAR_SIZE_MAX)
			return -EIO;
		uint64_t to = far_min(e[i].off + e[i].len, end);
		if (to <= pos && e[i].len && !kept)
			continue; /* lies before a range whose start was rounded down */
		if (e[i].off > pos || to <= pos || (kept && e[i].off != pos))
			return -EIO;
		e[kept++] = (struct far_extent){ pos, to - pos, e[i].kind };
		pos = to;
	}
	*n = kept;
	return 0;
}

int far_extents(struct far_backend *b, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	const struct far_facts *f = &b->facts;
	uint64_t from = off, to;
	int r;

	*n = 0;
	if (backend_stopped(b))
		return -ESHUTDOWN;
	if (off > f->bytes || len > f->bytes - off || !max)
		return -EINVAL;
	if (!len)
		return 0;
	to = off + len;
	if (f->chunk) {
		from -= from % f->chunk;
		to = to % f->chunk ? far_min(to - to % f->chunk + f->chunk, f->bytes) : to;
	}
	r = b->ops.extents ? backend_code(b->ops.extents(b->self, from, to - from, out, max, n)) : -EOPNOTSUPP;
	if (!r)
		r = backend_clip(off, len, out, n);
	if (r && r != -EOPNOTSUPP)
		return r;
	if (r || !*n) {
		/* Nothing is known: that is data, never a hole. */
		out[0] = (struct far_extent){ off, len, FAR_EXTENT_DATA };
		*n = 1;
	}
	return 0;
}

int far_share(struct far_backend *b, int *fd)
{
	if (backend_stopped(b))
		return -ESHUTDOWN;
	if (!(b->facts.caps & FAR_CAP_SHARE))
		return -EOPNOTSUPP;
	return backend_code(b->ops.share(b->self, fd));
}

/* ------------------------------------------------------------------------ what layers pass on untouched */

/* The outermost backend from b inwards that has the operation at this place of the table; NULL: none. */
#define BACKEND_WITH(b, op)                                                                                             \
	({                                                                                                              \
		struct far_backend *at_ = (b);                                                                          \
		while (at_ && !at_->ops.op)                                                                             \
			at_ = at_->ops.inner ? at_->ops.inner(at_->self) : NULL;                                        \
		at_;                                                                                                    \
	})

bool far_backend_zeroes(struct far_backend *b)
{
	for (; b; b = b->ops.inner ? b->ops.inner(b->self) : NULL)
		if (!b->ops.zero && !b->ops.discard)
			return false;
	return true;
}

int far_record_read(struct far_backend *b, void *buf, size_t cap, size_t *n)
{
	*n = 0;
	if (backend_stopped(b))
		return -ESHUTDOWN;
	b = BACKEND_WITH(b, record_read);
	return b ? backend_code(b->ops.record_read(b->self, buf, cap, n)) : -EOPNOTSUPP;
}

int far_record_write(struct far_backend *b, const void *buf, size_t n)
{
	if (backend_stopped(b))
		return -ESHUTDOWN;
	if (!(b->facts.caps & FAR_CAP_WRITE))
		return -EROFS;
	if (n > FAR_RECORD_MAX)
		return -EINVAL;
	b = BACKEND_WITH(b, record_write);
	return b ? backend_code(b->ops.record_write(b->self, buf, n)) : -EOPNOTSUPP;
}

uint64_t far_record_mark(struct far_backend *b)
{
	uint64_t mark = 0;

	b = BACKEND_WITH(b, record_write);
	return b && b->ops.record_mark && b->ops.record_mark(b->self, &mark) == 0 ? mark : 0;
}

int far_origin(struct far_backend *b, struct far_origin *out, unsigned flags)
{
	struct far_origin o = FAR_ORIGIN_INIT;
	size_t size = out->size;

	if (backend_stopped(b))
		return -ESHUTDOWN;
	b = BACKEND_WITH(b, origin);
	int r = b ? backend_code(b->ops.origin(b->self, &o, flags)) : -EOPNOTSUPP;
	o.size = size;
	memcpy(out, &o, far_min(size, sizeof o));
	return r;
}

int far_lease(struct far_backend *b, struct far_lease *l)
{
	if (backend_stopped(b))
		return -ESHUTDOWN;
	if (l->size != sizeof *l || !l->writer || !l->writer[0] || strlen(l->writer) >= sizeof l->origin.writer)
		return -EINVAL;
	b = BACKEND_WITH(b, lease);
	return b ? backend_code(b->ops.lease(b->self, l)) : -EOPNOTSUPP;
}

int far_watch(struct far_backend *b, uint64_t instance, uint64_t since, struct far_extent *out, size_t max, size_t *n,
	      bool *all, struct far_origin *now)
{
	*n = 0;
	*all = false;
	if (backend_stopped(b))
		return -ESHUTDOWN;
	if (now->size != sizeof *now)
		return -EINVAL;
	b = BACKEND_WITH(b, watch);
	return b ? backend_code(b->ops.watch(b->self, instance, since, out, max, n, all, now)) : -EOPNOTSUPP;
}

void far_counters(struct far_backend *b, struct far_counters *c)
{
	struct far_counters sum = { .size = sizeof sum };
	size_t size = c->size;

	for (; b; b = b->ops.inner ? b->ops.inner(b->self) : NULL)
		if (b->ops.counters)
			b->ops.counters(b->self, &sum);
	sum.size = size;
	memcpy(c, &sum, far_min(size, sizeof sum));
}

/* ------------------------------------------------------------------------------- four functions of the user's */

struct backend_from {
	int (*read)(void *opaque, uint64_t off, void *buf, size_t len);
	int (*write)(void *opaque, uint64_t off, const void *buf, size_t len);
	int (*flush)(void *opaque);
	void *opaque;
};

static int backend_from_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct backend_from *f = self;
	return (flags & FAR_NOWAIT) ? -EAGAIN : f->read(f->opaque, off, buf, len); /* it may block, who knows */
}

static int backend_from_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct backend_from *f = self;
	return (flags & FAR_NOWAIT) ? -EAGAIN : f->write(f->opaque, off, buf, len);
}

static int backend_from_flush(void *self)
{
	struct backend_from *f = self;
	return f->flush ? f->flush(f->opaque) : 0;
}

int far_backend_from(int (*read)(void *opaque, uint64_t off, void *buf, size_t len),
		     int (*write)(void *opaque, uint64_t off, const void *buf, size_t len), uint64_t size,
		     int (*flush)(void *opaque), void *opaque, struct far_backend **out)
{
	static const struct far_ops ops = {
		FAR_OPS_INIT,
		.read = backend_from_read,
		.write = backend_from_write,
		.flush = backend_from_flush,
		.close = free,
	};
	struct far_facts facts = { .size = sizeof facts, .bytes = size, .caps = write ? FAR_CAP_WRITE : 0 };

	if (!read)
		return -EINVAL;
	struct backend_from *f = malloc(sizeof *f);
	if (!f)
		return -ENOMEM;
	*f = (struct backend_from){ read, write, flush, opaque };
	int r = far_backend_new(&ops, f, &facts, out);
	if (r)
		free(f);
	return r;
}
