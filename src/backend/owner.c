/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Who may write, of one content. Three things are kept apart:
 *
 *     session    a client's life, counted in generations. Changes of an older generation are refused, and a generation
 *                begins (far_owner_session) only when those that run have ended: what was given up stays given up.
 *     writer     who had the last lease, by the id that outlives its session. It stands in the record (record.h) together
 *                with the session that it had, so that it is known again after a restart of the server.
 *     lease      the writer's right to be alone, until `until`. Over, the writer may go on as long as nobody else changes
 *                anything.
 *
 *        nobody --lease--> held --time--> lapsed --renewed--> held
 *           ^               |  \             |
 *           |               |   +--release---+--> lapsed (released: no grace after a restart)
 *           |               +--lease by another writer: waits for running changes, epoch + 1 --> held
 *           +------- change by somebody without a lease when lapsed: epoch + 1, no writer
 *
 * A change of hands (owner_take) is the only way to a new epoch: `taking` is set, which lets changes of all others wait;
 * those that run are waited for; the record is written and made durable; then it counts. A server that starts finds the
 * record's writer in a held lease of one full length.
 *
 * Invariants:
 *  1. The record on disk is written by one thread at a time (`recording`), without the lock; `rec` follows when that has
 *     succeeded. rec.dirty is on disk before the first byte changes.
 *  2. Changes of two sessions run at the same time only while there is no writer.
 *  3. `durable` is a version that a finished flush has covered: only that is told to anybody. It never shrinks.
 *  4. While `taking`, no change begins, not even the taker's.
 *  5. seq[i] is the number of the last change that touched extent i; numbers are given when a change has ended, so that
 *     whoever asks what came after number n never misses bytes.
 */
#include "backend/backend.h"
#include "backend/record.h"

#include "base/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OWNER_SESSIONS 1024
#define OWNER_BUCKETS 256
#define OWNER_EXTENTS 65536
#define OWNER_EXTENT_MIN (64 * FAR_KIB)
#define OWNER_SETTLE (2 * FAR_SEC)
#define OWNER_BUMP FAR_SEC /* the version grows at most so often */

struct owner_session {
	struct owner_session *next;
	uint64_t id, generation;
	uint64_t used;           /* when last heard of */
	unsigned running, older; /* changes of this generation, of older ones */
	unsigned waiting;        /* threads that wait for `older` */
	int connections;
	bool fenced; /* its lease is another's now: nothing it sends is done, and only take_over gets it back */
};

struct far_owner {
	/* fixed */
	struct far_backend *b;
	uint64_t ttl, instance;
	bool writable, recorded;
	uint64_t extent; /* bytes an entry of seq */
	size_t extents;

	struct far_mutex lock;
	struct far_cond cond; /* a change ended, the record was written, hands were changed */
	struct far_record rec FAR_GUARDED_BY(lock);
	uint64_t durable FAR_GUARDED_BY(lock);
	bool recording FAR_GUARDED_BY(lock), taking FAR_GUARDED_BY(lock);
	uint64_t taker FAR_GUARDED_BY(lock);
	uint64_t until FAR_GUARDED_BY(lock);   /* of the lease; 0: not held */
	uint64_t stranger FAR_GUARDED_BY(lock); /* without a record: who changed bytes while nobody had a lease; ~0: several */
	unsigned running FAR_GUARDED_BY(lock); /* changes, those without a session included */
	uint64_t change FAR_GUARDED_BY(lock);
	uint64_t bumped FAR_GUARDED_BY(lock), bumped_at FAR_GUARDED_BY(lock); /* change and time when version last grew */
	/* read-only: the mark when last looked at; when it has been the same for long enough, 0: it has */
	uint64_t seen FAR_GUARDED_BY(lock), settles FAR_GUARDED_BY(lock);
	unsigned sessions FAR_GUARDED_BY(lock);
	struct owner_session *bucket[OWNER_BUCKETS] FAR_GUARDED_BY(lock);
	uint64_t *seq FAR_GUARDED_BY(lock);
};

/* -------------------------------------------------------------------------------------------------- sessions */

static struct owner_session **owner_bucket(struct far_owner *o, uint64_t id) FAR_REQUIRES(o->lock)
{
	return &o->bucket[id * 0x9e3779b97f4a7c15 >> 56];
}

static struct owner_session *owner_find(struct far_owner *o, uint64_t id) FAR_REQUIRES(o->lock)
{
	struct owner_session *s = *owner_bucket(o, id);

	while (s && s->id != id)
		s = s->next;
	if (s)
		s->used = far_now();
	return s;
}

/* Forget the session that was silent longest and has nothing going on. Its late messages are refused as unknown. */
static bool owner_forget_one(struct far_owner *o) FAR_REQUIRES(o->lock)
{
	struct owner_session **oldest = NULL;

	for (size_t i = 0; i < OWNER_BUCKETS; i++)
		for (struct owner_session **at = &o->bucket[i]; *at; at = &(*at)->next) {
			const struct owner_session *s = *at;
			if (s->connections > 0 || s->running || s->older || s->waiting || s->id == o->rec.session ||
			    (o->taking && s->id == o->taker))
				continue;
			if (!oldest || s->used < (*oldest)->used)
				oldest = at;
		}
	if (!oldest)
		return false;
	struct owner_session *gone = *oldest;
	*oldest = gone->next;
	free(gone);
	o->sessions--;
	return true;
}

static int owner_add(struct far_owner *o, uint64_t id, uint64_t generation, struct owner_session **out)
	FAR_REQUIRES(o->lock)
{
	if (o->sessions >= OWNER_SESSIONS && !owner_forget_one(o))
		return -EBUSY;
	struct owner_session *s = calloc(1, sizeof *s), **at = owner_bucket(o, id);
	if (!s)
		return -ENOMEM;
	*s = (struct owner_session){ .next = *at, .id = id, .generation = generation, .used = far_now() };
	*at = s;
	o->sessions++;
	*out = s;
	return 0;
}

/* Sleep until something has changed. 0 or -ETIMEDOUT by the thread's deadline. */
static int owner_wait(struct far_owner *o) FAR_REQUIRES(o->lock)
{
	uint64_t deadline = far_deadline();

	return far_cond_wait_until(&o->cond, &o->lock, deadline) || far_now() < deadline ? 0 : -ETIMEDOUT;
}

int far_owner_session(struct far_owner *o, uint64_t session, uint64_t generation)
{
	int r = 0;

	if (!session)
		return 0;
	if (!generation)
		return -EINVAL;
	far_mutex_lock(&o->lock);
	struct owner_session *s = owner_find(o, session);
	if (!s)
		r = owner_add(o, session, generation, &s);
	if (r == 0 && generation > s->generation) {
		s->generation = generation;
		s->older += s->running;
		s->running = 0;
	}
	if (r == 0) {
		s->waiting++;
		while (r == 0 && s->older && s->generation == generation)
			r = owner_wait(o);
		s->waiting--;
		if (r == 0 && s->generation != generation)
			r = -ECANCELED;
	}
	far_mutex_unlock(&o->lock);
	return r;
}

void far_owner_connected(struct far_owner *o, uint64_t session, int change)
{
	if (!session)
		return;
	far_mutex_lock(&o->lock);
	struct owner_session *s = owner_find(o, session);
	if (s)
		s->connections += change;
	far_mutex_unlock(&o->lock);
}

/* ------------------------------------------------------------------------------------------------ the record */

/* Write `next`, and with `durable` make it so; then it is what counts. Nobody else is recording. */
static int owner_record(struct far_owner *o, struct far_record *next, bool durable) FAR_REQUIRES(o->lock)
{
	uint8_t bytes[FAR_RECORD_BYTES];
	int r = 0;

	FAR_ASSERT(!o->recording);
	if (o->recorded) {
		o->recording = true;
		far_mutex_unlock(&o->lock);
		next->mark = far_record_mark(o->b);
		far_record_encode(bytes, next);
		r = far_record_write(o->b, bytes, sizeof bytes);
		if (r == 0 && durable)
			r = far_flush(o->b);
		far_mutex_lock(&o->lock);
		o->recording = false;
	}
	if (r == 0)
		o->rec = *next;
	if (r == 0 && durable)
		o->durable = far_max(o->durable, next->version);
	far_cond_broadcast(&o->cond);
	return r;
}

/* The content changes hands; afterwards `next` counts. Changes of everybody but `session` are kept waiting meanwhile. */
static int owner_take(struct far_owner *o, uint64_t session, struct far_record *next) FAR_REQUIRES(o->lock)
{
	int r = 0;

	FAR_ASSERT(!o->taking);
	o->taking = true;
	o->taker = session;
	for (;;) {
		struct owner_session *s = session ? owner_find(o, session) : NULL;
		if (o->running == (s ? s->running + s->older : 0) && !o->recording)
			break;
		r = owner_wait(o);
		if (r)
			break;
	}
	if (r == 0) {
		/* What was recorded while we waited stays. */
		uint64_t before = o->rec.session;
		next->version = far_max(next->version, o->rec.version);
		next->dirty = o->rec.dirty;
		r = owner_record(o, next, true);
		struct owner_session *s = before && before != session && r == 0 ? owner_find(o, before) : NULL;
		if (s)
			s->fenced = true;
	}
	o->taking = false;
	far_cond_broadcast(&o->cond);
	return r;
}

static bool owner_held(const struct far_owner *o) FAR_REQUIRES(o->lock)
{
	return o->until > far_now();
}

/* --------------------------------------------------------------------------------------------------- changes */

/* Whether the session is known and of this generation. */
static int owner_check(struct far_owner *o, uint64_t session, uint64_t generation, struct owner_session **s)
	FAR_REQUIRES(o->lock)
{
	*s = session ? owner_find(o, session) : NULL;
	if (session && !*s)
		return -ENOTCONN;
	if (*s && generation < (*s)->generation)
		return -ECANCELED;
	return *s && generation > (*s)->generation ? -ENOTCONN : 0;
}

static bool owner_fenced(const struct owner_session *s)
{
	return s && s->fenced;
}

/* Somebody who is not the last writer wants to change bytes, and nobody holds the lease. */
static int owner_orphan(struct far_owner *o, uint64_t session) FAR_REQUIRES(o->lock)
{
	struct far_record next = o->rec;

	next.epoch++;
	next.session = 0;
	memset(next.writer, 0, sizeof next.writer);
	memset(next.holder, 0, sizeof next.holder);
	next.released = false;
	return owner_take(o, session, &next);
}

/* One look: 0: go on, 1: look again, or -errno. */
static int owner_admit(struct far_owner *o, uint64_t session, unsigned flags) FAR_REQUIRES(o->lock)
{
	bool ours = session && session == o->rec.session && o->rec.writer[0];

	if (!ours && !o->taking && owner_held(o))
		return -ESTALE;
	bool orphan = !ours && o->rec.writer[0], dirty = o->recorded && !o->rec.dirty;
	if (!o->taking && !orphan && !dirty)
		return 0;
	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	if (o->taking || o->recording) {
		int r = owner_wait(o);
		return r ? r : 1;
	}
	if (orphan) {
		int r = owner_orphan(o, session);
		return r ? r : 1;
	}
	struct far_record next = o->rec;
	next.dirty = true;
	if (owner_record(o, &next, false)) {
		/* A full disk must not keep bytes from being changed in place. What is lost is only that a change by
		 * another program goes unnoticed, or this one is taken for such, after a crash. */
		far_log(FAR_LOG_WARNING, "the record beside the content could not be written");
		o->rec.dirty = true;
	}
	return 1;
}

int far_owner_change_begin(struct far_owner *o, uint64_t session, uint64_t generation, unsigned flags)
{
	struct owner_session *s;
	int r;

	far_mutex_lock(&o->lock);
	do {
		r = owner_check(o, session, generation, &s);
		if (r == 0)
			r = owner_fenced(s) ? -ESTALE : owner_admit(o, session, flags);
	} while (r > 0);
	if (r == 0) {
		o->running++;
		if (s)
			s->running++;
		if (!o->recorded && !o->rec.writer[0])
			o->stranger = o->stranger && o->stranger != session ? UINT64_MAX : session ? session : UINT64_MAX;
	}
	far_mutex_unlock(&o->lock);
	return r;
}

static void owner_mark(struct far_owner *o, uint64_t off, uint64_t len) FAR_REQUIRES(o->lock)
{
	o->change++;
	if (!len || !o->extents)
		return;
	size_t last = (size_t)far_min((off + len - 1) / o->extent, o->extents - 1);
	for (size_t i = (size_t)(off / o->extent); i <= last; i++)
		o->seq[i] = o->change;
}

void far_owner_change_end(struct far_owner *o, uint64_t session, uint64_t generation, uint64_t off, uint64_t len,
			  bool changed)
{
	far_mutex_lock(&o->lock);
	struct owner_session *s = session ? owner_find(o, session) : NULL;
	if (changed)
		owner_mark(o, off, len);
	FAR_ASSERT(o->running && (!session || s));
	o->running--;
	if (s && generation == s->generation)
		s->running--;
	else if (s)
		s->older--;
	if (o->taking || (s && s->waiting))
		far_cond_broadcast(&o->cond);
	far_mutex_unlock(&o->lock);
}

/* ------------------------------------------------------------------------------------------------------ facts */

static void owner_fill(struct far_owner *o, struct far_origin *out) FAR_REQUIRES(o->lock)
{
	*out = (struct far_origin)FAR_ORIGIN_INIT;
	snprintf(out->identity, sizeof out->identity, "%s",
		 o->rec.identity[0] ? o->rec.identity : far_facts(o->b)->identity);
	snprintf(out->writer, sizeof out->writer, "%s", o->rec.writer);
	out->epoch = o->rec.epoch;
	out->version = o->durable;
	out->instance = o->instance;
	out->change = o->change;
}

/* What stands on another host is forgotten when that one starts again. */
static void owner_instance(struct far_owner *o, struct far_origin *out)
{
	struct far_origin up = FAR_ORIGIN_INIT;

	if ((far_facts(o->b)->caps & FAR_CAP_REMOTE) && far_origin(o->b, &up, FAR_NOWAIT) == 0 && up.instance)
		out->instance ^= up.instance * 0x9e3779b97f4a7c15;
}

/* What is only read here another process may be writing: its mark and record tell. */
static void owner_look(struct far_owner *o)
{
	uint8_t bytes[FAR_RECORD_MAX];
	struct far_record rec;
	size_t n = 0;

	if (o->writable)
		return;
	uint64_t mark = far_record_mark(o->b);
	bool known = far_record_read(o->b, bytes, sizeof bytes, &n) == 0 && far_record_decode(bytes, n, &rec);
	far_mutex_lock(&o->lock);
	/* A file's time changes before its bytes do, and not with every change: once more when it is over. */
	if (mark != o->seen)
		o->settles = far_now() + OWNER_SETTLE;
	o->seen = mark;
	if (o->settles)
		owner_mark(o, 0, far_size(o->b));
	if (far_now() >= o->settles)
		o->settles = 0;
	if (known) {
		o->rec = rec;
		o->durable = rec.version;
	}
	far_mutex_unlock(&o->lock);
}

void far_owner_origin(struct far_owner *o, struct far_origin *out)
{
	owner_look(o);
	far_mutex_lock(&o->lock);
	owner_fill(o, out);
	far_mutex_unlock(&o->lock);
	owner_instance(o, out);
}

int far_owner_flush(struct far_owner *o, struct far_origin *out)
{
	int r = 0;

	far_mutex_lock(&o->lock);
	while (r == 0 && o->recorded && o->change != o->bumped && far_now() - o->bumped_at >= OWNER_BUMP) {
		if (o->recording || o->taking) {
			r = owner_wait(o);
			continue;
		}
		struct far_record next = o->rec;
		uint64_t change = o->change;
		next.version++;
		o->bumped_at = far_now();
		/* The content is flushed all the same when there is no room for a new number. */
		if (owner_record(o, &next, false) == 0)
			o->bumped = change;
		else
			far_log(FAR_LOG_WARNING, "the record beside the content could not be written");
	}
	uint64_t version = o->rec.version; /* one that is just being written is not covered by our flush */
	far_mutex_unlock(&o->lock);
	if (r == 0)
		r = far_flush(o->b);
	far_mutex_lock(&o->lock);
	if (r == 0)
		o->durable = far_max(o->durable, version);
	owner_fill(o, out);
	far_mutex_unlock(&o->lock);
	owner_instance(o, out);
	return r;
}

int far_owner_watch(struct far_owner *o, uint64_t instance, uint64_t since, struct far_extent *out, size_t max, size_t *n,
		    bool *all, struct far_origin *now)
{
	uint64_t size = far_size(o->b);

	*n = 0;
	far_owner_origin(o, now); /* before the list: what ends in between is told twice rather than never */
	far_mutex_lock(&o->lock);
	*all = instance != now->instance || since > o->change;
	for (size_t i = 0; !*all && since < o->change && i < o->extents; i++) {
		if (o->seq[i] <= since)
			continue;
		uint64_t off = i * o->extent, len = far_min(o->extent, size - off);
		struct far_extent *last = *n ? &out[*n - 1] : NULL;
		if (last && (last->off + last->len == off || *n == max)) {
			last->len = off + len - last->off;
		} else if (*n < max) {
			out[(*n)++] = (struct far_extent){ .off = off, .len = len };
		} else {
			*all = true; /* no room at all */
		}
	}
	if (*all)
		*n = 0;
	far_mutex_unlock(&o->lock);
	return 0;
}

/* ------------------------------------------------------------------------------------------------------ lease */

static int owner_lease_text(const struct far_lease *l)
{
	size_t n = strlen(l->writer);

	if (!n || n >= sizeof l->origin.writer)
		return -EINVAL;
	for (const char *p = l->writer; *p; p++)
		if (!((*p >= '0' && *p <= '9') || (*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || *p == '-'))
			return -EINVAL;
	return 0;
}

/* Whether it may be given: 0, -ESTALE or -EBUSY. */
static int owner_verdict(struct far_owner *o, uint64_t session, const struct far_lease *l, bool same) FAR_REQUIRES(o->lock)
{
	/* Without a record the first one after a start is believed, unless somebody else has changed bytes before it. */
	bool believed = !o->recorded && !o->rec.epoch && (!o->stranger || o->stranger == session);

	if (l->take_over)
		return 0;
	if (owner_fenced(owner_find(o, session)))
		return -ESTALE;
	if (l->epoch && l->epoch != o->rec.epoch && !believed)
		return -ESTALE;
	if (o->recorded && l->version > o->durable)
		return -ESTALE;
	if (owner_held(o) && o->rec.session != session && !(same && l->epoch))
		return -EBUSY;
	return 0;
}

static int owner_grant(struct far_owner *o, uint64_t session, struct far_lease *l, bool same) FAR_REQUIRES(o->lock)
{
	struct far_record next = o->rec;
	int r = 0;

	if (!same || l->epoch > o->rec.epoch || !o->rec.epoch) {
		bool first = !o->rec.epoch && !o->recorded && l->epoch;
		next.epoch = first ? l->epoch : far_max(o->rec.epoch, l->epoch) + 1;
	}
	next.version = far_max(o->rec.version, o->recorded ? l->version : 0);
	next.session = session;
	next.released = false;
	snprintf(next.writer, sizeof next.writer, "%s", l->writer);
	snprintf(next.holder, sizeof next.holder, "%s", l->holder ? l->holder : "");
	if (!same || session != o->rec.session || o->rec.released || next.epoch != o->rec.epoch ||
	    next.version != o->rec.version)
		r = owner_take(o, session, &next);
	if (r == 0) {
		struct owner_session *s = owner_find(o, session);
		if (s)
			s->fenced = false;
		o->stranger = 0;
		o->until = far_now() + o->ttl;
		l->ttl_ms = (uint32_t)(o->ttl / FAR_MSEC);
	}
	return r;
}

static int owner_release(struct far_owner *o, uint64_t session, bool same) FAR_REQUIRES(o->lock)
{
	struct far_record next = o->rec;

	if (!same || (owner_held(o) && o->rec.session != session))
		return -ESTALE;
	next.released = true;
	o->until = 0;
	/* It is over whether that can be written or not; a restart would only wait for nothing. */
	if (owner_record(o, &next, false))
		o->rec.released = true;
	return 0;
}

static void owner_refused(struct far_owner *o, struct far_lease *l) FAR_REQUIRES(o->lock)
{
	uint64_t now = far_now();

	if (o->until <= now)
		return;
	const struct owner_session *s = owner_find(o, o->rec.session);
	l->left_ms = (uint32_t)far_div_up(o->until - now, FAR_MSEC);
	l->gone = !s || s->connections <= 0;
	snprintf(l->other, sizeof l->other, "%s", o->rec.holder[0] ? o->rec.holder : o->rec.writer);
}

int far_owner_lease(struct far_owner *o, uint64_t session, uint64_t generation, struct far_lease *l)
{
	struct owner_session *s;
	int r = owner_lease_text(l);

	l->ttl_ms = l->left_ms = 0;
	l->gone = false;
	l->other[0] = 0;
	if (r == 0 && !o->writable)
		r = -EROFS;
	far_mutex_lock(&o->lock);
	while (r == 0 && (o->taking || o->recording))
		r = owner_wait(o);
	if (r == 0)
		r = session ? owner_check(o, session, generation, &s) : -ENOTCONN;
	if (r == 0) {
		bool same = !strcmp(o->rec.writer, l->writer);
		if (l->release) {
			r = owner_release(o, session, same);
		} else {
			r = owner_verdict(o, session, l, same);
			if (r == 0)
				r = owner_grant(o, session, l, same);
		}
	}
	if (r)
		owner_refused(o, l);
	owner_fill(o, &l->origin);
	far_mutex_unlock(&o->lock);
	owner_instance(o, &l->origin);
	return r;
}

/* ---------------------------------------------------------------------------------------------- birth and death */

/* What the record says, brought to this moment. *durable: it must be flushed before anybody hears of it. */
static void owner_resume(struct far_owner *o, bool known, bool *durable) FAR_NO_TSA
{
	struct far_record *rec = &o->rec;
	uint64_t mark = far_record_mark(o->b);

	o->durable = rec->version;
	*durable = false;
	if (!known) {
		memset(rec, 0, sizeof *rec);
		far_record_identity(rec->identity);
		rec->version = 1;
		*durable = true;
	} else if (rec->dirty) { /* ended without a farewell: some of what was written since may be there */
		rec->version++;
		*durable = true;
	} else if (rec->mark && mark && rec->mark != mark) {
		far_log(FAR_LOG_WARNING, "the content was changed by another program since it was served last");
		rec->epoch++;
		rec->version++;
		rec->session = 0;
		memset(rec->writer, 0, sizeof rec->writer);
		memset(rec->holder, 0, sizeof rec->holder);
		*durable = true;
	}
	rec->dirty = false;
	if (rec->writer[0] && !rec->released)
		o->until = far_now() + o->ttl;
}

static int owner_start(struct far_owner *o) FAR_NO_TSA
{
	uint8_t bytes[FAR_RECORD_MAX];
	size_t n = 0;
	bool durable;

	int r = far_record_read(o->b, bytes, sizeof bytes, &n);
	if (r == -EOPNOTSUPP) {
		o->seen = far_record_mark(o->b);
		return 0;
	}
	if (r)
		return r;
	bool known = far_record_decode(bytes, n, &o->rec);
	if (n && !known)
		far_log(FAR_LOG_WARNING, "the record beside the content is damaged: the content gets a new identity");
	if (!o->writable) {
		o->durable = o->rec.version;
		o->seen = far_record_mark(o->b);
		return 0;
	}
	owner_resume(o, known, &durable);
	o->recorded = true;
	far_mutex_lock(&o->lock);
	struct far_record next = o->rec;
	r = owner_record(o, &next, durable);
	far_mutex_unlock(&o->lock);
	if (r != -EOPNOTSUPP && r != -EROFS)
		return r;
	/* It can be read here but not written. */
	o->recorded = false;
	memset(&o->rec, 0, sizeof o->rec);
	o->durable = o->until = 0;
	return 0;
}

int far_owner_new(struct far_backend *b, uint32_t lease_ms, struct far_owner **out) FAR_NO_TSA
{
	struct far_owner *o = calloc(1, sizeof *o);

	if (!o)
		return -ENOMEM;
	far_mutex_init(&o->lock);
	far_cond_init(&o->cond);
	o->b = b;
	o->ttl = (lease_ms ? lease_ms : FAR_LEASE_MS) * FAR_MSEC;
	o->instance = far_record_random();
	o->writable = far_facts(b)->caps & FAR_CAP_WRITE;
	o->extent = OWNER_EXTENT_MIN;
	while (far_div_up(far_size(b), o->extent) > OWNER_EXTENTS)
		o->extent *= 2;
	o->extents = (size_t)far_div_up(far_size(b), o->extent);
	o->seq = calloc(far_max(o->extents, 1), sizeof *o->seq);
	int r = o->seq ? owner_start(o) : -ENOMEM;
	if (r == 0) {
		*out = o;
		return 0;
	}
	o->recorded = false;
	far_owner_free(o);
	return r;
}

void far_owner_farewell(struct far_owner *o)
{
	far_mutex_lock(&o->lock);
	if (o->recorded && o->rec.dirty && !o->running && !o->taking && !o->recording) {
		struct far_record next = o->rec;
		next.dirty = o->rec.dirty = false; /* a change that comes now waits, and says dirty again */
		if (o->change != o->bumped)
			next.version++;
		o->bumped = o->change;
		if (owner_record(o, &next, false))
			o->rec.dirty = true;
	}
	far_mutex_unlock(&o->lock);
}

void far_owner_free(struct far_owner *o) FAR_NO_TSA
{
	if (!o)
		return;
	FAR_ASSERT(!o->running && !o->taking && !o->recording);
	far_owner_farewell(o);
	for (size_t i = 0; i < OWNER_BUCKETS; i++)
		for (struct owner_session *s = o->bucket[i], *next; s; s = next) {
			next = s->next;
			free(s);
		}
	free(o->seq);
	far_cond_fini(&o->cond);
	far_mutex_fini(&o->lock);
	free(o);
}
