/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Flush, and what it takes for a pushed byte to be safe.
 *
 * A flush takes a stamp, and a list of the chunks that hold news at that moment: one bit a chunk in `listed`, and a
 * second one in `later` for those that only a push begun after the stamp may take off. A chunk that is PUSHING at the
 * stamp and not REDIRTY was written before its push began, so the end of that push takes it off. Writes after the stamp
 * do not lengthen the list, so a flush ends under endless writes. It fails as soon as a push of a listed chunk fails;
 * the chunk stays dirty, so the next flush lists it again. The last push that a flush waits for takes the flush of the
 * remote with it (FAR_FLUSH): a flush of little is one round trip.
 *
 * A pushed chunk is CLEAN but unstable: a remote that is restarted may have forgotten it. It is marked until a flush of
 * the remote that began after its push has succeeded under the instance (a number that changes with each restart) that
 * it was pushed under; then the local copy is one of two, and may be evicted.
 *
 *   dirty --push--> unstable (fresh) --flush begins--> unstable (covered) --it succeeds--> stable
 *     ^                   |                                   |    it fails: covered, the next flush covers it too
 *     +---- another instance is heard of: far_chunkmap_redirty() on all of them
 *
 * The instance is read before and after each push and each flush of the remote. A push counts if both are the same; a
 * flush of the remote if both are `instance` and no change was seen while it ran. A flush of the region counts if no
 * change was seen since its stamp, else it goes round again.
 *
 * Invariants, under lock:
 *  1. Pushes begin and end (chunk map included) while it is held, so that a flush sees each chunk either before or
 *     after; `began` of a push is a number from the same sequence as the stamps.
 *  2. All that is unstable was pushed under `instance`. A chunk is marked before it becomes clean and until it is
 *     stable or dirty again, so an evictor that has claimed a clean chunk and finds no mark may punch it.
 *  3. At most one flush of the remote runs (`flushing`). Who needs one waits for it, and runs its own only if that one
 *     began too early.
 */
#include "region/push_int.h"

#include <stdlib.h>

#define FLUSH_SETTLE (5 * FAR_SEC) /* pushed bytes become stable after at most about this long */
#define FLUSH_AGAIN 1              /* the remote was restarted meanwhile: once more */

/* ------------------------------------------------------------------------------------------------------- instances */

uint64_t far_push_instance(struct far_region *r)
{
	struct far_origin o = FAR_ORIGIN_INIT;

	return far_origin(r->remote, &o, FAR_NOWAIT) ? 0 : o.instance;
}

struct flush_redirty {
	struct far_push *p;
	uint64_t bytes;
};

static void flush_redirty_one(void *opaque, uint64_t i)
{
	struct flush_redirty *d = opaque;

	if (far_chunkmap_redirty(d->p->r->map, i))
		d->bytes += far_chunkmap_len(d->p->r->map, i);
}

/* What was pushed and not flushed may be gone. */
static void flush_forgotten_locked(struct far_push *p) FAR_REQUIRES(p->lock)
{
	struct flush_redirty d = { .p = p };
	uint64_t since = p->unstable.since, old = atomic_load_explicit(&p->oldest, memory_order_relaxed);

	p->changes++;
	if (!far_unstable_any(&p->unstable))
		return;
	/* Not dirty since the walks began, but since before they were pushed. */
	p->rounds[0].whole = p->rounds[1].whole = false;
	atomic_store_explicit(&p->oldest, old ? far_min(old, since) : since, memory_order_seq_cst);
	far_unstable_take(&p->unstable, flush_redirty_one, &d);
	p->next_round = 0;
	far_cond_broadcast(&p->work);
	far_cond_broadcast(&p->done);
	if (d.bytes)
		far_log(FAR_LOG_WARNING, "the remote was restarted before it was flushed: %" PRIu64 " KiB are pushed again",
			d.bytes / FAR_KIB);
}

/* Whether a push of chunk i that was begun at `began` takes it off the list. */
static bool flush_lists(const struct push_flush *f, uint64_t i, uint64_t began)
{
	uint64_t bit = (uint64_t)1 << (i % 64);

	return (f->listed[i / 64] & bit) && (!(f->later[i / 64] & bit) || began > f->stamp);
}

/* The remote tells of this instance now. */
static void flush_instance_locked(struct far_push *p, uint64_t now) FAR_REQUIRES(p->lock)
{
	if (now == p->instance)
		return;
	p->instance = now;
	flush_forgotten_locked(p);
}

static void flush_listed_locked(struct far_push *p, uint64_t first, uint64_t n, uint64_t began, int err)
	FAR_REQUIRES(p->lock)
{
	for (struct push_flush *f = p->flushes; f; f = f->next)
		for (uint64_t i = first; i < first + n; i++) {
			if (!flush_lists(f, i, began))
				continue;
			if (err) {
				f->err = err;
			} else {
				f->listed[i / 64] &= ~((uint64_t)1 << (i % 64));
				f->left--;
			}
		}
}

void far_push_ended_locked(struct far_push *p, uint64_t first, uint64_t n, uint64_t began, uint64_t before, uint64_t after,
			   int err)
{
	flush_instance_locked(p, after);
	bool ok = !err && before == after;
	if (ok)
		far_unstable_add(&p->unstable, first, n);
	far_persist_fresh(p->r->persist, first, n);
	far_chunkmap_push_end(p->r->map, first, n, ok);
	if (ok || err) /* else it is dirty and listed, and pushed again */
		flush_listed_locked(p, first, n, began, err);
	p->pushes++;
}

void far_push_ended_partial_locked(struct far_push *p, uint64_t i, uint64_t began, uint64_t before, uint64_t after, int err)
{
	flush_instance_locked(p, after);
	bool ok = !err && before == after;
	if (ok)
		far_unstable_add(&p->unstable, i, 1);
	far_persist_fresh(p->r->persist, i, 1);
	far_chunkmap_push_end_partial(p->r->map, i, ok);
	if (ok || err)
		flush_listed_locked(p, i, 1, began, err);
	p->pushes++;
}

void far_push_failed_locked(struct far_push *p, uint64_t i, uint64_t began, int err)
{
	flush_listed_locked(p, i, 1, began, err);
}

/* --------------------------------------------------------------------------------------------- flushing the remote */

bool far_push_unstable(struct far_region *r, uint64_t i)
{
	return far_unstable_has(&r->push->unstable, i);
}

/* Flush the remote once. 0, FLUSH_AGAIN, or the error. */
static int flush_remote_once_locked(struct far_push *p) FAR_REQUIRES(p->lock)
{
	struct far_region *r = p->r;
	uint64_t covers = p->pushes, changes = p->changes, began = far_now();

	p->flushing = true;
	atomic_store_explicit(&p->settle_wanted, false, memory_order_relaxed);
	far_unstable_cover(&p->unstable);
	far_mutex_unlock(&p->lock);
	uint64_t before = far_push_instance(r);
	int err = far_flush(r->remote);
	uint64_t after = far_push_instance(r);
	if (err == -EREMOTEIO)
		err = 0; /* it has flushed, but had been restarted: that is another instance, and known here */
	if (err)
		far_push_refused(r, err);
	far_mutex_lock(&p->lock);
	p->flushing = false;
	flush_instance_locked(p, after);
	/* It says so itself, perhaps of an instance whose end we had noticed and mended: that is no reason to fail. */
	if (err == -EREMOTEIO && changes == p->changes)
		flush_forgotten_locked(p);
	if (err == -EREMOTEIO)
		err = 0;
	if (!err && (before != after || changes != p->changes))
		err = FLUSH_AGAIN;
	if (!err) {
		far_unstable_settle(&p->unstable, began);
		atomic_store_explicit(&r->evict_pause, 0, memory_order_relaxed);
		p->flushed = far_max(p->flushed, covers);
	}
	p->settle_again = err < 0 ? far_now() + FLUSH_SETTLE : 0;
	far_cond_broadcast(&p->done);
	far_cond_signal(&p->work);
	return err;
}

void far_push_last_begin_locked(struct far_push *p, uint64_t first, uint64_t n, uint64_t began, struct far_push_last *l)
{
	*l = (struct far_push_last){ .flush = p->flushes && !p->flushing && p->busy == 1 &&
					      (far_facts(p->r->remote)->caps & FAR_CAP_FLUSH) };
	for (struct push_flush *f = p->flushes; l->flush && f; f = f->next) {
		uint64_t left = f->left;
		for (uint64_t i = first; i < first + n; i++)
			left -= flush_lists(f, i, began);
		l->flush = !left;
	}
	if (!l->flush)
		return;
	p->flushing = true;
	atomic_store_explicit(&p->settle_wanted, false, memory_order_relaxed);
	far_unstable_cover(&p->unstable);
	l->covers = p->pushes;
	l->changes = p->changes;
	l->began = far_now();
}

void far_push_last_end_locked(struct far_push *p, const struct far_push_last *l, uint64_t before, uint64_t after, int err)
{
	if (!l->flush)
		return;
	p->flushing = false;
	if (!err && before == after && l->changes == p->changes) {
		/* What was pushed before, and this push; others that ended meanwhile need another flush. */
		bool alone = p->pushes == l->covers + l->mine;
		if (alone)
			far_unstable_cover(&p->unstable);
		far_unstable_settle(&p->unstable, l->began);
		atomic_store_explicit(&p->r->evict_pause, 0, memory_order_relaxed);
		p->flushed = far_max(p->flushed, alone ? p->pushes : l->covers);
	}
	p->settle_again = err ? far_now() + FLUSH_SETTLE : 0;
	far_cond_broadcast(&p->done);
	far_cond_signal(&p->work);
}

/* Until everything pushed before this call is flushed. FLUSH_AGAIN: an instance has ended since `changes`. */
static int flush_remote_locked(struct far_push *p, uint64_t changes) FAR_REQUIRES(p->lock)
{
	uint64_t covers = p->pushes;

	while (p->changes == changes && p->flushed < covers) {
		int err = 0;
		if (p->stopped)
			return -ESHUTDOWN;
		if (atomic_load_explicit(&p->r->fenced, memory_order_acquire))
			return -ESTALE;
		if (far_now() >= far_deadline())
			return -ETIMEDOUT;
		if (p->flushing)
			far_cond_wait_until(&p->done, &p->lock, far_deadline());
		else
			err = flush_remote_once_locked(p);
		if (err < 0)
			return err;
	}
	return p->changes == changes ? 0 : FLUSH_AGAIN;
}

int far_push_settle(struct far_region *r)
{
	struct far_push *p = r->push;

	far_mutex_lock(&p->lock);
	int err = flush_remote_locked(p, p->changes);
	far_mutex_unlock(&p->lock);
	return err == FLUSH_AGAIN ? -EAGAIN : err;
}

uint64_t far_push_settle_at_locked(struct far_push *p)
{
	bool wanted = atomic_load_explicit(&p->settle_wanted, memory_order_relaxed);

	if (p->flushing || !far_unstable_any(&p->unstable))
		return FAR_NEVER;
	return far_max(p->settle_again, wanted ? 0 : p->unstable.since + FLUSH_SETTLE);
}

void far_push_settle_now_locked(struct far_push *p)
{
	uint64_t old = far_deadline_limit(far_now() + p->r->o.deadline_ms * FAR_MSEC);

	int err = flush_remote_once_locked(p);
	far_deadline_restore(old);
	if (err)
		return;
	far_mutex_unlock(&p->lock);
	far_evict_trim(p->r); /* what was in its way may be evicted now */
	far_mutex_lock(&p->lock);
}

bool far_push_settle_soon(struct far_region *r)
{
	struct far_push *p = r->push;
	bool here = false;

	if (!r->writable || atomic_exchange_explicit(&p->settle_wanted, true, memory_order_relaxed))
		return false;
	far_mutex_lock(&p->lock);
	if (!p->max_threads) {
		here = far_push_settle_at_locked(p) <= far_now();
		atomic_store_explicit(&p->settle_wanted, false, memory_order_relaxed);
	}
	far_cond_broadcast(&p->work);
	far_mutex_unlock(&p->lock);
	return here && !far_push_settle(r);
}

/* ------------------------------------------------------------------------------------------------------------ flush */

static void flush_list(void *opaque, uint64_t i, enum far_chunk s)
{
	struct push_flush *f = opaque;
	uint64_t bit = (uint64_t)1 << (i % 64);

	f->listed[i / 64] |= bit;
	if (s != FAR_PUSHING)
		f->later[i / 64] |= bit;
	f->left++;
}

/* A chunk that was half-written when it was listed is absent again if that write failed: nobody will push it. */
static void flush_prune(struct far_push *p, struct push_flush *f)
{
	for (uint64_t w = 0; f->left && w <= far_chunkmap_chunks(p->r->map) / 64; w++)
		for (uint64_t bits = f->listed[w]; bits; bits &= bits - 1)
			if (!far_chunkmap_has_news(p->r->map, w * 64 + (uint64_t)__builtin_ctzll(bits))) {
				f->listed[w] &= ~(bits & -bits);
				f->left--;
			}
}

/* Wait until the list is empty. Without workers this thread pushes. */
static int flush_wait_locked(struct far_push *p, struct push_flush *f) FAR_REQUIRES(p->lock)
{
	while (f->left && !f->err) {
		if (p->stopped)
			return -ESHUTDOWN;
		if (atomic_load_explicit(&p->r->fenced, memory_order_acquire))
			return -ESTALE;
		if (far_now() >= far_deadline())
			return -ETIMEDOUT;
		if (!p->round) {
			flush_prune(p, f);
			far_push_round_locked(p);
		}
		if (p->max_threads == 0 && far_push_step_locked(p))
			continue;
		if (p->max_threads == 0)
			p->round = false;
		if (f->left && !f->err && (p->busy || p->max_threads))
			far_cond_wait_until(&p->done, &p->lock, far_min(far_deadline(), far_now() + FAR_SEC));
	}
	return f->err;
}

/* One stamp, its list, and the flush of the remote. */
static int flush_stamp_locked(struct far_push *p, struct push_flush *f) FAR_REQUIRES(p->lock)
{
	struct push_flush **at;
	uint64_t changes = p->changes;

	f->stamp = ++p->sequence;
	far_chunkmap_each_dirty(p->r->map, flush_list, f);
	f->next = p->flushes;
	p->flushes = f;
	if (f->left)
		far_push_round_locked(p); /* from the start, whatever the cursor has passed */
	int err = flush_wait_locked(p, f);
	for (at = &p->flushes; *at != f; at = &(*at)->next)
		;
	*at = f->next;
	return err ? err : flush_remote_locked(p, changes);
}

int far_push_flush(struct far_region *r)
{
	struct far_push *p = r->push;
	size_t words = (size_t)(far_chunkmap_chunks(r->map) / 64 + 1);
	int err;

	do {
		struct push_flush f = { .r = r };
		f.listed = calloc(words, sizeof *f.listed);
		f.later = calloc(words, sizeof *f.later);
		err = -ENOMEM;
		if (f.listed && f.later) {
			far_mutex_lock(&p->lock);
			err = flush_stamp_locked(p, &f);
			far_mutex_unlock(&p->lock);
		}
		free(f.listed);
		free(f.later);
	} while (err == FLUSH_AGAIN);
	if (!err)
		far_evict_trim(r);
	return err;
}
