/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Writes of an unknown fate towards a peer without sessions. Its connection is ended, but what had reached the peer may
 * still be carried out, and nothing can forbid that. So its range is remembered, in pieces that do not overlap:
 *
 *      (unknown fate) -> OPEN --a write to it is acknowledged--> KEPT       KEPT has a copy of those bytes
 *
 *   before other bytes are written to an OPEN piece it is read back: if the write has landed its fate is known, and the
 *     piece is forgotten;
 *   before a flush each KEPT piece is read back; if it is not what was acknowledged last, it is written again;
 *   a piece is forgotten at the first flush that finds it right PLAIN_AGE after its last unknown write.
 *
 * The limit of this: a write that lands after that flush, or between two flushes and is read meanwhile, is not noticed, as
 * are those of pieces that were given up because PLAIN_BYTES were reached. Against a peer that cancels what it does for a
 * lost connection, as gRPC servers do, that is a window of milliseconds; only sessions (farpage.v1) close it.
 *
 * While there are pieces, changes and flushes go through here one at a time (`busy`): a write made again must not undo
 * another one. With none, nothing is locked. A change that began when there were none may still add and cut pieces while
 * another thread is busy, so whoever drops the lock keeps copies and finds a piece again by its id.
 */
#include "wire/grpc/client.h"

#include <stdlib.h>
#include <string.h>

#define PLAIN_AGE (60 * FAR_SEC)
#define PLAIN_BYTES (64 * FAR_MIB)

struct far_plain_doubt {
	struct far_plain_doubt *next;
	uint64_t off, len, since;
	uint64_t id;               /* grows */
	uint8_t *kept;             /* what was acknowledged last; NULL: OPEN */
	bool once;                 /* OPEN: one write only, with this sum, is outstanding */
	uint8_t sum[FAR_GRPC_SUM];
};

static void plain_drop_locked(struct far_client *c, struct far_plain_doubt **at) FAR_REQUIRES(c->lock)
{
	struct far_plain_doubt *d = *at;

	*at = d->next;
	if (d->kept)
		c->plain.bytes -= d->len;
	atomic_fetch_sub_explicit(&c->plain.n, 1, memory_order_release);
	free(d->kept);
	free(d);
}

static struct far_plain_doubt *plain_add_locked(struct far_client *c, uint64_t off, uint64_t len, const uint8_t *kept)
	FAR_REQUIRES(c->lock)
{
	struct far_plain_doubt *d = calloc(1, sizeof *d);

	if (d && kept)
		d->kept = malloc(len);
	if (!d || (kept && !d->kept)) {
		free(d);
		return NULL;
	}
	if (kept) {
		memcpy(d->kept, kept, len);
		c->plain.bytes += len;
	}
	d->off = off;
	d->len = len;
	d->since = far_now();
	d->id = ++c->plain.ids;
	d->next = c->plain.list;
	c->plain.list = d;
	atomic_fetch_add_explicit(&c->plain.n, 1, memory_order_release);
	return d;
}

static bool plain_meets(const struct far_plain_doubt *d, uint64_t off, uint64_t len)
{
	return d->off < off + len && off < d->off + d->len;
}

/* Take [off, off+len) out of all pieces. *had: there was something. -ENOMEM. */
static int plain_cut_locked(struct far_client *c, uint64_t off, uint64_t len, bool *had) FAR_REQUIRES(c->lock)
{
	*had = false;
	for (struct far_plain_doubt **at = &c->plain.list; *at;) {
		struct far_plain_doubt *d = *at;
		if (!plain_meets(d, off, len)) {
			at = &d->next;
			continue;
		}
		*had = true;
		uint64_t end = d->off + d->len, since = d->since;
		/* New pieces go to the front of the list, behind us. */
		if (d->off < off) {
			struct far_plain_doubt *p = plain_add_locked(c, d->off, off - d->off, d->kept);
			if (!p)
				return -ENOMEM;
			p->since = since;
		}
		if (end > off + len) {
			struct far_plain_doubt *p = plain_add_locked(c, off + len, end - off - len,
								     d->kept ? d->kept + (off + len - d->off) : NULL);
			if (!p)
				return -ENOMEM;
			p->since = since;
		}
		for (at = &c->plain.list; *at != d; at = &(*at)->next)
			;
		plain_drop_locked(c, at);
	}
	return 0;
}

static int plain_enter(struct far_client *c, uint64_t deadline)
{
	int r = 0;

	far_mutex_lock(&c->lock);
	while (c->plain.busy && !r)
		if (!far_cond_wait_until(&c->cond, &c->lock, deadline) && c->plain.busy)
			r = -ETIMEDOUT;
	if (!r)
		c->plain.busy = true;
	far_mutex_unlock(&c->lock);
	return r;
}

static void plain_leave(struct far_client *c)
{
	far_mutex_lock(&c->lock);
	c->plain.busy = false;
	far_cond_broadcast(&c->cond);
	far_mutex_unlock(&c->lock);
}

static void plain_sum(struct far_client *c, uint8_t sum[FAR_GRPC_SUM], uint64_t off, const void *data, uint64_t len)
{
	far_grpc_sum_data(sum, "", 0, off, data, len);
}

/* Where the piece with this id is, or the list's end. */
static struct far_plain_doubt **plain_find_locked(struct far_client *c, uint64_t id) FAR_REQUIRES(c->lock)
{
	struct far_plain_doubt **at = &c->plain.list;

	while (*at && (*at)->id != id)
		at = &(*at)->next;
	return at;
}

/* Whether an open piece (a copy of it) has landed: then it is no doubt any more. */
static int plain_look(struct far_client *c, const struct far_plain_doubt *d)
{
	uint8_t *buf = malloc(d->len), sum[FAR_GRPC_SUM];
	int r = buf ? far_client_read_back(c, d->off, buf, d->len) : -ENOMEM;

	if (r == 0) {
		plain_sum(c, sum, d->off, buf, d->len);
		far_mutex_lock(&c->lock);
		struct far_plain_doubt **at = plain_find_locked(c, d->id);
		if (*at && !memcmp(sum, d->sum, sizeof sum))
			plain_drop_locked(c, at);
		else if (*at)
			(*at)->once = false; /* looked at: not again for each write */
		far_mutex_unlock(&c->lock);
	}
	free(buf);
	return r;
}

bool far_plain_sound(struct far_client *c)
{
	return !atomic_load_explicit(&c->plain.n, memory_order_acquire);
}

int far_plain_begin(struct far_client *c, uint64_t off, const void *src, uint64_t len, uint64_t deadline, bool *entered)
{
	uint8_t sum[FAR_GRPC_SUM];
	int r;

	*entered = false;
	if (far_plain_sound(c))
		return 0;
	r = plain_enter(c, deadline);
	if (r)
		return r;
	plain_sum(c, sum, off, src ? src : "", src ? len : 0);
	for (;;) {
		struct far_plain_doubt copy;
		far_mutex_lock(&c->lock);
		struct far_plain_doubt *d = c->plain.list;
		while (d && (d->kept || !d->once || !plain_meets(d, off, len) ||
			     (d->off == off && d->len == len && !memcmp(d->sum, sum, sizeof sum))))
			d = d->next;
		if (d)
			copy = *d;
		far_mutex_unlock(&c->lock);
		if (!d)
			break;
		r = plain_look(c, &copy);
		if (r) {
			plain_leave(c);
			return r;
		}
	}
	*entered = true;
	return 0;
}

/* A write of an unknown fate. */
static int plain_lost_locked(struct far_client *c, uint64_t off, const void *src, uint64_t len) FAR_REQUIRES(c->lock)
{
	bool had;
	int r = plain_cut_locked(c, off, len, &had);
	struct far_plain_doubt *d = r ? NULL : plain_add_locked(c, off, len, NULL);

	if (!d)
		return -ENOMEM;
	d->once = !had;
	plain_sum(c, d->sum, off, src, len);
	return 0;
}

static int plain_kept_locked(struct far_client *c, uint64_t off, const uint8_t *src, uint64_t len) FAR_REQUIRES(c->lock)
{
	int r = 0;

	for (struct far_plain_doubt *d = c->plain.list, *next; d && !r; d = next) {
		next = d->next;
		if (!plain_meets(d, off, len))
			continue;
		uint64_t from = far_max(off, d->off), to = far_min(off + len, d->off + d->len), since = d->since;
		bool had;
		r = plain_cut_locked(c, from, to - from, &had);
		struct far_plain_doubt *p = r ? NULL : plain_add_locked(c, from, to - from, src + (from - off));
		if (p)
			p->since = since;
		else
			r = -ENOMEM;
	}
	while (c->plain.bytes > PLAIN_BYTES) { /* the oldest are at the end */
		struct far_plain_doubt **at = &c->plain.list, **last = NULL;
		for (; *at; at = &(*at)->next)
			last = (*at)->kept ? at : last;
		plain_drop_locked(c, last);
		far_log(FAR_LOG_WARNING, "%s: too many writes of unknown fate to keep track of", c->where);
	}
	return r;
}

int far_plain_end(struct far_client *c, uint64_t off, const void *src, uint64_t len, int fate, bool entered)
{
	int r = 0;

	if (!far_client_flag(&c->sessions) && far_client_kind(c) != FAR_CLIENT_UNKNOWN && src) {
		far_mutex_lock(&c->lock);
		if (fate == 1)
			r = plain_lost_locked(c, off, src, len);
		else if (fate == 0 && c->plain.list)
			r = plain_kept_locked(c, off, src, len);
		far_mutex_unlock(&c->lock);
	}
	if (entered)
		plain_leave(c);
	return r;
}

/* A copy of the first kept piece with an id in (*id, last]; false: none is left. */
static bool plain_next_locked(struct far_client *c, uint64_t *id, uint64_t last, struct far_plain_doubt *out, int *r)
	FAR_REQUIRES(c->lock)
{
	const struct far_plain_doubt *best = NULL;

	for (const struct far_plain_doubt *d = c->plain.list; d; d = d->next)
		if (d->id > *id && d->id <= last && (!best || d->id < best->id))
			best = d;
	if (!best)
		return false;
	*out = *best;
	*id = best->id;
	out->kept = best->kept ? malloc(best->len) : NULL;
	if (out->kept)
		memcpy(out->kept, best->kept, best->len);
	else if (best->kept)
		*r = -ENOMEM;
	return true;
}

/* A kept piece is what it should be, or is made so. */
static int plain_verify(struct far_client *c, const struct far_plain_doubt *d, bool *late)
{
	uint8_t *buf = malloc(d->len);
	int r = buf ? far_client_read_back(c, d->off, buf, d->len) : -ENOMEM;

	*late = r == 0 && memcmp(buf, d->kept, d->len);
	if (*late) {
		far_log(FAR_LOG_WARNING, "%s: an old write has landed late at %" PRIu64 "; what was written last is written again",
			c->where, d->off);
		r = far_client_write_again(c, d->off, d->kept, d->len);
	}
	free(buf);
	return r;
}

int far_plain_settle(struct far_client *c, uint64_t deadline)
{
	struct far_plain_doubt d;
	uint64_t id = 0;

	if (!atomic_load_explicit(&c->plain.n, memory_order_acquire))
		return 0;
	int r = plain_enter(c, deadline);
	if (r)
		return r;
	far_mutex_lock(&c->lock);
	uint64_t last = c->plain.ids;
	while (!r && plain_next_locked(c, &id, last, &d, &r)) {
		bool late = false;
		far_mutex_unlock(&c->lock);
		if (d.kept)
			r = plain_verify(c, &d, &late);
		free(d.kept);
		far_mutex_lock(&c->lock);
		struct far_plain_doubt **at = plain_find_locked(c, id);
		if (*at && late)
			(*at)->since = far_now();
		else if (*at && !r && far_now() - d.since > PLAIN_AGE)
			plain_drop_locked(c, at);
	}
	far_mutex_unlock(&c->lock);
	plain_leave(c);
	return r;
}

void far_plain_free(struct far_client *c)
{
	far_mutex_lock(&c->lock);
	while (c->plain.list)
		plain_drop_locked(c, &c->plain.list);
	far_mutex_unlock(&c->lock);
}
