/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The NBD client as a backend: several connections (link.c) to one export.
 *
 * A call takes the connection with the fewest calls pending. A connection that was lost is replaced by whoever needs one,
 * one dial at a time; the others wait for it and share its failure. More than one is used only if the server says that a
 * flush on one covers what was written on all (CAN_MULTI_CONN).
 *
 * What NBD cannot say, and what is done about it:
 *
 *  - Whether this is still the export that was opened. Size, block sizes and abilities are compared at each connection;
 *    another one is -ESTALE.
 *  - Whether the server was restarted and forgot what was not flushed. `writes` counts answered writes, `flushed` how many
 *    of them a flush has covered, a connection's `born` how many there were when it was made. A flush on a connection that
 *    is older than every write it has to cover proves that all of them met one server. If there is no such connection left,
 *    the flush ends once with -EREMOTEIO, and the instance that far_origin() tells is another one: who has a copy writes
 *    again.
 *  - Whether a write without an answer was carried out. The call fails (-ECONNRESET, -ETIMEDOUT) after its connection has
 *    been reset, so that nothing can follow from this side. What the server had received by then it may still carry out,
 *    even after a later write to the same place on another connection: farpage(1) says so.
 *
 * FAR_FLUSH: FUA covers one write alone. It is used where nothing else is left to be covered, else a flush follows.
 *
 * Discard is WRITE_ZEROES that may make holes. TRIM is not used: what it leaves need not read as zeros.
 */
#define _GNU_SOURCE
#include "wire/nbd/client.h"

#include "base/clock.h"
#include "net/net.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#define CLIENT_TRIES 3                   /* of a call that changes nothing, when connections are lost under it */
#define CLIENT_ZERO ((uint64_t)1 << 30)  /* most that one zero or extents command covers */
#define CLIENT_REDIAL (5 * FAR_SEC)      /* after a failed dial of a connection that is one more */

/* ------------------------------------------------------------------------------------------------ connections */

static unsigned client_limit_locked(const struct far_nbd_client *c) FAR_REQUIRES(&c->lock)
{
	return c->known && c->export.multi ? c->connections : 1;
}

/* Whether what a new connection found is what was opened; the first one tells it. */
static int client_compare_locked(struct far_nbd_client *c, const struct far_nbd_export *e, struct far_error *err)
	FAR_REQUIRES(&c->lock)
{
	if (e->bytes != c->facts.bytes)
		return far_error_set(err, ESTALE, "%s has %" PRIu64 " bytes now, and had %" PRIu64
				     ": it is not what was opened", c->peer.where, e->bytes, c->facts.bytes);
	bool less = ((c->facts.caps & FAR_CAP_WRITE) && e->read_only) || e->block > far_max(c->facts.chunk, 1) ||
		    e->max_io < c->facts.max_io;
	if (c->known)
		less = less || (c->export.flush && !e->flush) || (c->export.fua && !e->fua) || (c->export.zero && !e->zero) ||
		       (c->export.multi && !e->multi);
	if (less)
		return far_error_set(err, ESTALE, "%s can do less than when it was opened: it is not the same export",
				     c->peer.where);
	if (!c->known)
		c->export = *e;
	c->known = true;
	return 0;
}

/* Dial one more; called, and returns, with the lock held. 0, or the failure, which is everyone's. */
static int client_dial_locked(struct far_nbd_client *c, unsigned slot, uint64_t until, struct far_error *err)
	FAR_REQUIRES(&c->lock)
{
	struct far_nbd_link *l = NULL;
	struct far_nbd_export e;
	uint64_t born = c->writes;

	c->dialing = true;
	far_mutex_unlock(&c->lock);
	int r = far_nbd_link_open(&c->peer, until, c->cancel, &l, &e, err);
	far_mutex_lock(&c->lock);
	c->dialing = false;
	if (!r && c->stopped)
		r = -ESHUTDOWN;
	if (!r && c->opened)
		r = client_compare_locked(c, &e, err);
	if (r) {
		c->dial_error = r;
		c->dial_failed = far_now();
	} else {
		if (!c->opened) {
			c->export = e;
			c->known = true;
		}
		c->slots[slot].link = l;
		c->slots[slot].born = born;
		c->connects++;
		c->reconnects += c->slots[slot].used;
		c->slots[slot].used = true;
		l = NULL;
	}
	c->dials++;
	far_cond_broadcast(&c->cond);
	if (l) {
		far_mutex_unlock(&c->lock);
		far_nbd_link_put(l);
		far_mutex_lock(&c->lock);
	}
	return r;
}

/* Take lost connections out of their slots, when they are closed for good. Drops the lock. */
static void client_sweep_locked(struct far_nbd_client *c) FAR_REQUIRES(&c->lock)
{
	for (unsigned i = 0; i < c->connections; i++) {
		struct far_nbd_link *l = c->slots[i].link;
		if (!l)
			continue;
		far_nbd_link_get(l);
		far_mutex_unlock(&c->lock);
		bool alive = far_nbd_link_alive(l);
		if (!alive)
			far_nbd_link_wait_closed(l);
		far_mutex_lock(&c->lock);
		bool ours = !alive && c->slots[i].link == l;
		if (ours)
			c->slots[i].link = NULL;
		far_mutex_unlock(&c->lock);
		if (ours)
			far_nbd_link_put(l);
		far_nbd_link_put(l);
		far_mutex_lock(&c->lock);
	}
}

/* The one with the fewest calls pending, or the oldest. */
static int client_best_locked(struct far_nbd_client *c, bool oldest, unsigned *up, unsigned *load) FAR_REQUIRES(&c->lock)
{
	int best = -1;

	*up = 0;
	*load = 0;
	for (unsigned i = 0; i < c->connections; i++) {
		const struct far_nbd_slot *s = &c->slots[i];
		if (!s->link)
			continue;
		unsigned n = far_nbd_link_pending(s->link);
		++*up;
		if (best < 0 || (oldest ? s->born < c->slots[best].born : n < *load)) {
			best = (int)i;
			*load = n;
		}
	}
	return best;
}

static unsigned client_empty_locked(const struct far_nbd_client *c) FAR_REQUIRES(&c->lock)
{
	unsigned i = 0;

	while (c->slots[i].link)
		i++;
	return i;
}

/* A connection to make a call on, with a reference. */
static int client_pick(struct far_nbd_client *c, bool oldest, uint64_t until, struct far_nbd_link **out, uint64_t *born)
{
	int r = 0, best = -1;

	far_mutex_lock(&c->lock);
	client_sweep_locked(c);
	while (!r && best < 0) {
		unsigned up, load, limit = client_limit_locked(c);
		best = client_best_locked(c, oldest, &up, &load);
		uint64_t dials = c->dials;
		if (c->stopped) {
			r = -ESHUTDOWN;
		} else if (best < 0 && c->dialing) {
			bool timely = far_cond_wait_until(&c->cond, &c->lock, until);
			if (dials != c->dials && c->dial_error && client_best_locked(c, false, &up, &load) < 0)
				r = c->dial_error;
			else if (!timely)
				r = -ETIMEDOUT;
		} else if (best < 0) {
			c->dial_error = 0;
			r = client_dial_locked(c, client_empty_locked(c), until, NULL);
		} else if (load > 1 && up < limit && !c->dialing && !oldest && far_now() > c->dial_failed + CLIENT_REDIAL) {
			/* One more would help; if it cannot be had, those that are there do. */
			(void)client_dial_locked(c, client_empty_locked(c), until, NULL);
			best = client_best_locked(c, oldest, &up, &load);
		}
	}
	if (!r && c->stopped)
		r = -ESHUTDOWN;
	if (!r) {
		*out = far_nbd_link_get(c->slots[best].link);
		*born = c->slots[best].born;
	}
	far_mutex_unlock(&c->lock);
	return r;
}

static uint64_t client_deadline(const struct far_nbd_client *c)
{
	return far_min(far_deadline(), far_now() + c->timeout);
}

/* Make a call; `again`: it changes nothing, so a lost connection is no reason to give up. */
static int client_call(struct far_nbd_client *c, struct far_nbd_op *op, bool again, bool oldest, uint64_t *born)
{
	uint64_t until = client_deadline(c), b;
	int r = 0;

	for (unsigned tries = 1;; tries++) {
		struct far_nbd_link *l = NULL;
		op->lost = op->sent = false;
		r = client_pick(c, oldest, until, &l, born ? born : &b);
		if (r)
			return r;
		r = far_nbd_link_call(l, op, until);
		if (r == -ECONNABORTED)
			far_nbd_link_break(l); /* the server goes down: what comes next goes elsewhere */
		far_nbd_link_put(l);
		if (atomic_load_explicit(&c->stopping, memory_order_relaxed))
			return r ? -ESHUTDOWN : 0;
		if ((r != -ECONNRESET && r != -ENOTCONN) || tries == CLIENT_TRIES || (op->lost && !again) || far_now() >= until)
			return r == -ENOTCONN ? -ECONNRESET : r;
	}
}

/* ------------------------------------------------------------------------------------------------ operations */

int far_nbd_client_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct far_nbd_op op = { .cmd = FAR_NBD_READ, .off = off, .len = len, .in = buf };

	return flags & FAR_NOWAIT ? -EAGAIN : client_call(self, &op, true, false, NULL);
}

static void client_written(struct far_nbd_client *c)
{
	far_mutex_lock(&c->lock);
	c->writes++;
	far_mutex_unlock(&c->lock);
}

static int client_flush(void *self)
{
	struct far_nbd_client *c = self;
	struct far_nbd_op op = { .cmd = FAR_NBD_FLUSH };
	uint64_t born;

	far_mutex_lock(&c->lock);
	uint64_t covers = c->writes;
	bool can = !c->known || c->export.flush;
	far_mutex_unlock(&c->lock);
	int r = can ? client_call(c, &op, true, true, &born) : 0;
	if (r || !can)
		return r;
	far_mutex_lock(&c->lock);
	/* Others may have flushed meanwhile, and told it. */
	bool forgotten = born > c->flushed && covers > c->flushed;
	c->flushed = far_max(c->flushed, covers);
	if (forgotten) {
		c->instance++;
		c->flushed = far_max(c->flushed, born);
	}
	far_mutex_unlock(&c->lock);
	return forgotten ? -EREMOTEIO : 0;
}

static int client_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct far_nbd_client *c = self;
	struct far_nbd_op op = { .cmd = FAR_NBD_WRITE, .off = off, .len = len, .out = buf };

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	if (flags & FAR_FLUSH) {
		far_mutex_lock(&c->lock);
		op.fua = c->known && c->export.fua && c->writes == c->flushed;
		far_mutex_unlock(&c->lock);
	}
	int r = client_call(c, &op, false, false, NULL);
	if (!r && !op.fua)
		client_written(c);
	return r || op.fua || !(flags & FAR_FLUSH) ? r : client_flush(c);
}

static int client_clear(struct far_nbd_client *c, uint64_t off, uint64_t len, unsigned flags, bool hole)
{
	int r = 0;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	far_mutex_lock(&c->lock);
	bool can = c->known && c->export.zero;
	far_mutex_unlock(&c->lock);
	if (!can)
		return -EOPNOTSUPP;
	while (!r && len) {
		struct far_nbd_op op = { .cmd = FAR_NBD_ZERO, .off = off, .len = far_min(len, CLIENT_ZERO), .hole = hole };
		r = client_call(c, &op, false, false, NULL);
		if (!r)
			client_written(c);
		off += op.len;
		len -= op.len;
	}
	return r;
}

static int client_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return client_clear(self, off, len, flags, false);
}

static int client_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return client_clear(self, off, len, flags, true);
}

static int client_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct far_nbd_client *c = self;
	struct far_nbd_op op = { .cmd = FAR_NBD_EXTENTS, .off = off, .len = far_min(len, CLIENT_ZERO), .extents = out,
				 .max = max };

	far_mutex_lock(&c->lock);
	bool can = c->known && c->export.extents;
	far_mutex_unlock(&c->lock);
	if (!can)
		return -EOPNOTSUPP;
	int r = client_call(c, &op, true, false, NULL);
	*n = r ? 0 : op.n;
	return r ? r : op.n ? 0 : -EPROTO;
}

static int client_origin(void *self, struct far_origin *out, unsigned flags)
{
	struct far_nbd_client *c = self;
	struct far_nbd_link *l = NULL;
	uint64_t born;

	/* A connection says that the server is there, and that it is the one. */
	int r = flags & FAR_NOWAIT ? 0 : client_pick(c, false, client_deadline(c), &l, &born);
	far_nbd_link_put(l);
	far_mutex_lock(&c->lock);
	bool known = c->known;
	out->instance = c->instance;
	far_mutex_unlock(&c->lock);
	return r ? r : known ? 0 : -EAGAIN;
}

static void client_counters(void *self, struct far_counters *sum)
{
	struct far_nbd_client *c = self;

	far_mutex_lock(&c->lock);
	sum->connects += c->connects;
	sum->reconnects += c->reconnects;
	far_mutex_unlock(&c->lock);
}

static void client_stop(void *self)
{
	struct far_nbd_client *c = self;
	struct far_nbd_link *l[FAR_NBD_CONNECTIONS];
	uint64_t one = 1;
	unsigned n = 0;

	atomic_store_explicit(&c->stopping, true, memory_order_relaxed);
	far_mutex_lock(&c->lock);
	bool first = !c->stopped;
	c->stopped = true;
	for (unsigned i = 0; first && i < c->connections; i++)
		if (c->slots[i].link)
			l[n++] = far_nbd_link_get(c->slots[i].link);
	far_cond_broadcast(&c->cond);
	far_mutex_unlock(&c->lock);
	if (write(c->cancel, &one, sizeof one) < 0)
		far_log(FAR_LOG_DEBUG, "%s: %s", c->peer.where, far_strerror(errno));
	while (n) {
		/* An idle connection is left to say good-bye when it is closed. */
		if (far_nbd_link_pending(l[--n]))
			far_nbd_link_break(l[n]);
		far_nbd_link_put(l[n]);
	}
}

static void client_close(void *self)
{
	far_nbd_client_free(self);
}

static const struct far_ops client_ops = {
	FAR_OPS_INIT,
	.read = far_nbd_client_read,
	.write = client_write,
	.flush = client_flush,
	.discard = client_discard,
	.zero = client_zero,
	.extents = client_extents,
	.origin = client_origin,
	.counters = client_counters,
	.stop = client_stop,
	.close = client_close,
};

/* ------------------------------------------------------------------------------------------------ opening */

int far_nbd_client_new(unsigned connections, struct far_nbd_client **out)
{
	struct far_nbd_client *c = calloc(1, sizeof *c);

	if (!c)
		return -ENOMEM;
	c->cancel = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (c->cancel < 0) {
		free(c);
		return -errno;
	}
	far_mutex_init(&c->lock);
	far_cond_init(&c->cond);
	c->connections = connections;
	/* Another process's instances are others. */
	if (getrandom(&c->instance, sizeof c->instance, GRND_NONBLOCK) != sizeof c->instance)
		c->instance = far_now() ^ (uint64_t)getpid() << 40;
	c->instance |= 1; /* never 0 */
	*out = c;
	return 0;
}

void far_nbd_client_free(struct far_nbd_client *c)
{
	for (unsigned i = 0; i < c->connections; i++)
		far_nbd_link_put(c->slots[i].link);
	far_fd_close(&c->cancel);
	far_cond_fini(&c->cond);
	far_mutex_fini(&c->lock);
	free(c->peer.where);
	free(c->peer.host);
	free(c->peer.socket);
	free(c->peer.export);
	free(c->peer.tls_certificates);
	free(c->peer.tls_psk_file);
	free(c->peer.tls_username);
	free(c);
}

int far_nbd_client_contact(struct far_nbd_client *c, uint64_t until, struct far_error *err)
{
	far_mutex_lock(&c->lock);
	int r = client_dial_locked(c, 0, until, err);
	far_mutex_unlock(&c->lock);
	return r;
}

struct client_more {
	struct far_nbd_client *c;
	struct far_thread thread;
	unsigned slot;
	uint64_t until;
};

static void *client_more(void *opaque)
{
	struct client_more *m = opaque;
	struct far_nbd_client *c = m->c;
	struct far_nbd_link *l;
	struct far_nbd_export e;

	if (far_nbd_link_open(&c->peer, m->until, c->cancel, &l, &e, NULL))
		return NULL; /* dialled again when it would help */
	far_mutex_lock(&c->lock);
	bool same = !client_compare_locked(c, &e, NULL);
	if (same) {
		c->slots[m->slot].link = l;
		c->slots[m->slot].used = true;
		c->connects++;
	}
	far_mutex_unlock(&c->lock);
	if (!same)
		far_nbd_link_put(l);
	return NULL;
}

int far_nbd_client_start(struct far_nbd_client *c, const struct far_facts *facts, uint64_t until, struct far_backend **out)
{
	struct client_more more[FAR_NBD_CONNECTIONS] = { 0 };

	far_mutex_lock(&c->lock);
	c->facts = *facts;
	c->opened = true;
	unsigned limit = client_limit_locked(c);
	far_mutex_unlock(&c->lock);
	/* The others side by side: it costs the time of one. */
	for (unsigned i = 1; i < limit; i++) {
		more[i] = (struct client_more){ .c = c, .slot = i, .until = until };
		(void)far_thread_start(&more[i].thread, "far-dial", client_more, &more[i]);
	}
	for (unsigned i = 1; i < limit; i++)
		far_thread_join(&more[i].thread);
	return far_backend_new(&client_ops, c, facts, out);
}
