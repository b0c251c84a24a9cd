/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Tries again what failed for a passing reason: connection lost, refused, timed out, EIO.
 *
 * The wait before try n is between half and all of min(backoff * 2^n, max-backoff), so that many callers do not come
 * back together. `deadline` bounds one call with all its tries and waits, and is handed down as the thread's deadline.
 *
 * The budget bounds retries of all calls together: `budget` in hand, refilled evenly within ten seconds. When it is
 * empty an error is passed on at once: a store that is down is not hammered by everyone who still believes in it.
 *
 * `lock` guards the budget and the counts, and is what waiting calls sleep with; not held across the inner call.
 */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/clock.h"
#include "base/options.h"
#include "base/thread.h"

#include <stdlib.h>

#define RETRY_REFILL (10 * FAR_SEC)

struct retry_conf {
	int64_t tries, eio_tries;
	uint64_t backoff, max_backoff, deadline;
	int64_t budget;
};

struct retry {
	/* fixed after open */
	struct far_backend *inner;
	struct retry_conf conf;

	struct far_mutex lock;
	struct far_cond wake; /* stop */
	bool stopped FAR_GUARDED_BY(lock);
	double tokens FAR_GUARDED_BY(lock);
	uint64_t filled FAR_GUARDED_BY(lock); /* when tokens was brought up to date */
	uint64_t rng FAR_GUARDED_BY(lock);
	struct far_retry_stats stats FAR_GUARDED_BY(lock);
};

static const struct far_opt retry_options[] = {
	{ "tries", FAR_OPT_INT, offsetof(struct retry_conf, tries), 1, 0x1p31, NULL, "N", "tries in all",
	  "as many as the deadline allows", "unlimited", 0 },
	{ "eio-tries", FAR_OPT_INT, offsetof(struct retry_conf, eio_tries), 1, 0x1p31, NULL, "N",
	  "tries of what fails with EIO: the store's own answer, not a lost connection", "unlimited", "unlimited", 0 },
	{ "backoff", FAR_OPT_DURATION, offsetof(struct retry_conf, backoff), 1, 3600e9, NULL, "TIME",
	  "wait before the second try; doubles", "20ms" },
	{ "max-backoff", FAR_OPT_DURATION, offsetof(struct retry_conf, max_backoff), 1, 3600e9, NULL, "TIME",
	  "longest wait", "2s" },
	{ "budget", FAR_OPT_INT, offsetof(struct retry_conf, budget), 1, 0x1p31, NULL, "N",
	  "retries of all calls in ten seconds", "1000" },
	{ "deadline", FAR_OPT_DURATION, offsetof(struct retry_conf, deadline), 1e6, 31536000e9, NULL, "TIME",
	  "for one call with all its tries", "30s" },
	FAR_OPT_END,
};

static void retry_defaults(void *conf)
{
	*(struct retry_conf *)conf = (struct retry_conf){
		.backoff = 20 * FAR_MSEC, .max_backoff = 2 * FAR_SEC, .budget = 1000, .deadline = 30 * FAR_SEC };
}

static bool retry_take_token_locked(struct retry *t, uint64_t now) FAR_REQUIRES(&t->lock)
{
	double max = (double)t->conf.budget;

	t->tokens += (double)(now - t->filled) * max / (double)RETRY_REFILL;
	if (t->tokens > max)
		t->tokens = max;
	t->filled = now;
	if (t->tokens < 1)
		return false;
	t->tokens -= 1;
	return true;
}

static uint64_t retry_pause_locked(struct retry *t, unsigned tried) FAR_REQUIRES(&t->lock)
{
	uint64_t wait = tried - 1 < 32 ? t->conf.backoff << (tried - 1) : t->conf.max_backoff;

	if (tried - 1 >= 32 || wait >> (tried - 1) != t->conf.backoff || wait > t->conf.max_backoff)
		wait = t->conf.max_backoff;
	t->rng = t->rng * 6364136223846793005 + 1442695040888963407;
	return wait - (t->rng >> 33) % (wait / 2 + 1);
}

/* After try number `tried` failed with r: 0 when the next one may begin, else what the call ends with. */
static int retry_again(struct retry *t, unsigned tried, int r)
{
	uint64_t deadline = far_deadline();

	if (!far_error_is_transient(r) || (r == -EIO && t->conf.eio_tries && tried >= t->conf.eio_tries))
		return r;
	far_mutex_lock(&t->lock);
	uint64_t now = far_now(); /* under the lock: the budget's time never runs backwards */
	t->stats.failed++;
	if (now >= deadline)
		r = -ETIMEDOUT;
	else if ((!t->conf.tries || tried < t->conf.tries) && retry_take_token_locked(t, now)) {
		uint64_t until = now + retry_pause_locked(t, tried), end = far_min(until, deadline);
		while (!t->stopped && far_now() < end)
			far_cond_wait_until(&t->wake, &t->lock, end);
		r = t->stopped ? -ESHUTDOWN : until > deadline ? -ETIMEDOUT : 0;
	}
	if (!r)
		t->stats.retries++;
	else
		t->stats.gave_up++;
	far_mutex_unlock(&t->lock);
	return r;
}

/* One call of any kind, so that the loop stands once. */
struct retry_call {
	enum { RETRY_READ, RETRY_WRITE, RETRY_FLUSH, RETRY_DISCARD, RETRY_ZERO, RETRY_EXTENTS } op;
	uint64_t off, len;
	void *in;
	const void *out;
	unsigned flags;
	struct far_extent *extents;
	size_t max, *n;
};

static int retry_once(struct retry *t, const struct retry_call *c)
{
	switch (c->op) {
	case RETRY_READ:
		return far_read(t->inner, c->off, c->in, c->len, c->flags);
	case RETRY_WRITE:
		return far_write(t->inner, c->off, c->out, c->len, c->flags);
	case RETRY_FLUSH:
		return far_flush(t->inner);
	case RETRY_DISCARD:
		return far_discard(t->inner, c->off, c->len, c->flags);
	case RETRY_ZERO:
		return far_zero(t->inner, c->off, c->len, c->flags);
	default:
		return far_extents(t->inner, c->off, c->len, c->extents, c->max, c->n);
	}
}

static int retry_do(void *self, const struct retry_call *c)
{
	struct retry *t = self;
	int r;

	if (c->flags & FAR_NOWAIT) {
		/* A failure is no answer yet: the caller comes again and may wait. */
		r = retry_once(t, c);
		return r && far_error_is_transient(r) ? -EAGAIN : r;
	}
	uint64_t old = far_deadline_limit(far_now() + t->conf.deadline);
	for (unsigned tried = 1;; tried++) {
		r = retry_once(t, c);
		if (!r || (r = retry_again(t, tried, r)))
			break;
	}
	far_deadline_restore(old);
	return r;
}

static int retry_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	return retry_do(self, &(struct retry_call){ RETRY_READ, off, len, .in = buf, .flags = flags });
}

static int retry_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return retry_do(self, &(struct retry_call){ RETRY_WRITE, off, len, .out = buf, .flags = flags });
}

static int retry_flush(void *self)
{
	return retry_do(self, &(struct retry_call){ RETRY_FLUSH });
}

static int retry_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return retry_do(self, &(struct retry_call){ RETRY_DISCARD, off, len, .flags = flags });
}

static int retry_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return retry_do(self, &(struct retry_call){ RETRY_ZERO, off, len, .flags = flags });
}

static int retry_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	return retry_do(self, &(struct retry_call){ RETRY_EXTENTS, off, len, .extents = out, .max = max, .n = n });
}

/* [io, end) has failed: again, together, until one of them has succeeded; what stands behind that is another run, whose tries
 * are counted anew. Returns where the run ended. */
static struct far_io *retry_run(struct retry *t, bool write, struct far_io *io, struct far_io *end, unsigned flags)
{
	for (unsigned tried = 1; io < end; tried++) {
		int r = retry_again(t, tried, io->result);
		if (r) {
			(io++)->result = r;
			tried--;
			continue;
		}
		(write ? far_write_many : far_read_many)(t->inner, io, (size_t)(end - io), flags);
		while (io < end && !io->result)
			io++;
		for (struct far_io *k = io; k < end; k++)
			if (!k->result)
				end = k;
	}
	return io;
}

static void retry_many(struct retry *t, bool write, struct far_io *io, size_t n, unsigned flags)
{
	uint64_t old = far_deadline_limit(far_now() + t->conf.deadline);
	struct far_io *end = io + n, *to;

	(write ? far_write_many : far_read_many)(t->inner, io, n, flags);
	while (io < end) {
		for (to = io; to < end && to->result; to++)
			;
		io = to > io ? retry_run(t, write, io, to, flags) : io + 1;
	}
	far_deadline_restore(old);
}

static void retry_read_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	retry_many(self, false, io, n, flags);
}

static void retry_write_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	retry_many(self, true, io, n, flags);
}

static void retry_stop(void *self)
{
	struct retry *t = self;

	far_mutex_lock(&t->lock);
	t->stopped = true;
	far_cond_broadcast(&t->wake);
	far_mutex_unlock(&t->lock);
	far_stop(t->inner);
}

static void retry_free(struct retry *t)
{
	far_cond_fini(&t->wake);
	far_mutex_fini(&t->lock);
	free(t);
}

static void retry_close(void *self)
{
	struct retry *t = self;
	far_close(t->inner);
	retry_free(t);
}

static struct far_backend *retry_inner(void *self)
{
	struct retry *t = self;
	return t->inner;
}

/* No share: nobody could try a failed store again. */
static const struct far_ops retry_ops = {
	FAR_OPS_INIT,
	.read = retry_read,
	.write = retry_write,
	.flush = retry_flush,
	.discard = retry_discard,
	.zero = retry_zero,
	.extents = retry_extents,
	.read_many = retry_read_many,
	.write_many = retry_write_many,
	.stop = retry_stop,
	.close = retry_close,
	.inner = retry_inner,
};

void far_retry_stats(struct far_backend *b, struct far_retry_stats *st)
{
	struct retry *t = far_backend_self(b, retry_read);

	far_mutex_lock(&t->lock);
	*st = t->stats;
	far_mutex_unlock(&t->lock);
}

static int retry_open(const void *conf, struct far_backend *inner, struct far_backend **out, struct far_error *err)
{
	const struct retry_conf *rc = conf;
	struct far_facts facts = *far_facts(inner);

	if (rc->max_backoff < rc->backoff)
		return far_error_set(err, EINVAL, "layer retry: max-backoff is shorter than backoff.");
	struct retry *t = calloc(1, sizeof *t);
	if (!t)
		return far_error_set(err, ENOMEM, "layer retry: %s.", far_strerror(ENOMEM));
	t->inner = inner;
	t->conf = *rc;
	t->tokens = (double)rc->budget;
	t->filled = t->rng = far_now();
	far_mutex_init(&t->lock);
	far_cond_init(&t->wake);
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	int r = far_layer_new(&far_layer_retry, &retry_ops, t, &facts, out, err);
	if (r)
		retry_free(t);
	return r;
}

const struct far_layer far_layer_retry = {
	.name = "retry",
	.help = "try again, with back-off, a budget and a deadline",
	.options = retry_options,
	.conf_size = sizeof(struct retry_conf),
	.defaults = retry_defaults,
	.open = retry_open,
};
