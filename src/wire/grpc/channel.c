/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One connection, many callers, no thread. Two tokens, each held by at most one caller at a time:
 *
 *   send (`h2.writing` while in the system call, `sending` as a whole): makes batches and writes them, others' requests
 *        included, outside the lock.
 *   read (`reading`): reads the socket outside the lock, feeds the session under it, which completes calls of any caller.
 *
 *      submit -> (send token free? send) -> (read token free? read until own reply is in) -> else sleep on own event
 *                                                                   |
 *                                  pass both tokens on: wake one waiting caller, who takes them
 *
 * Who finds the lock taken, or a reader that is awake, leaves its call in the inbox and sleeps: the reader, or whoever lets
 * go of the lock, takes it in. Long requests are sent by their own callers.
 *
 * Invariants:
 *  1. While a call is pending and both tokens are free, some caller is awake and on its way to take them: whoever gives a
 *     token back wakes one waiting caller (far_chan_pass). A caller who has begun calls and not finished them is awake.
 *  2. The reader never blocks in sending. It waits for room in the socket only together with waiting for input. A sender
 *     who is not the reader waits for room in short slices, because the reader may leave meanwhile.
 *  3. A call's memory is touched by others only while it is on the list; its caller leaves (far_chan_leave), or is taken off
 *     it (far_channel_done), only when no reader is reading into it (`pinned`) and the batch borrows nothing of it.
 *  4. A channel dies once: `error` is set, every pending call gets it, the session is not used again.
 *
 * Signs of life. While calls are pending and nothing comes for `quiet`, the holder of the read token sends a PING; when
 * for `dead` more neither a byte comes nor the peer's system takes any (a slow path is not a dead one), the channel dies.
 * grpc-go hangs up on a client that pings a third time without being told anything in between, hence `max_pings`.
 */
#include "wire/grpc/channel_int.h"

#include "net/tls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHANNEL_SLICE (10 * FAR_MSEC)
#define CHANNEL_GATHER 4 /* so large a part of the calls may wait to be sent together */
#define CHANNEL_SMALL 16384 /* a longer body is sent by its own caller: the reader has to read */
#define CHANNEL_STALE (5 * FAR_MSEC) /* after so long without a call look at what the peer said meanwhile */

static struct far_channel *channel_of(struct far_h2 *h)
{
	return far_container_of(h, struct far_channel, h2);
}

enum channel_event { CHANNEL_LOOK = 1, CHANNEL_LEFT }; /* look again; the call is done, off the list and its caller's alone */

static void channel_drain(struct far_channel *c) FAR_REQUIRES(c->lock);
static bool channel_send(struct far_channel *c) FAR_REQUIRES(c->lock);
static bool channel_has_output(struct far_channel *c) FAR_REQUIRES(c->lock);
static bool channel_wants_sender(struct far_channel *c) FAR_REQUIRES(c->lock);

void far_chan_unlock(struct far_channel *c)
{
	const struct far_event *wake[CHANNEL_WAKE];

	for (;;) {
		unsigned n = c->wake_n;
		memcpy(wake, c->wake, n * sizeof *wake);
		c->wake_n = 0;
		far_mutex_unlock(&c->lock);
		for (unsigned i = 0; i < n; i++)
			far_event_kick(wake[i]);
		atomic_thread_fence(memory_order_seq_cst); /* partner: far_channel_call(), which looks the other way round */
		if (!atomic_load_explicit(&c->inbox, memory_order_relaxed) || !far_mutex_trylock(&c->lock))
			return;
		channel_drain(c);
		if (channel_wants_sender(c))
			channel_send(c);
		far_chan_pass(c);
	}
}

static void channel_wake(struct far_channel *c, struct far_call *call, enum channel_event what) FAR_REQUIRES(c->lock)
{
	const struct far_event *e = &call->event;

	if (far_event_get(e) == (uint32_t)what)
		return; /* it is on its way */
	far_event_set(&call->event, what);
	if (c->wake_n == CHANNEL_WAKE)
		far_event_kick(e);
	else
		c->wake[c->wake_n++] = e;
}

/* For something else than its own end, which has come. */
static void channel_sleep(struct far_channel *c, struct far_call *call) FAR_REQUIRES(c->lock)
{
	call->waiting = true;
	far_chan_unlock(c);
	far_event_wait_until(&call->event, FAR_NEVER);
	far_mutex_lock(&c->lock);
	call->waiting = false;
	far_event_clear(&call->event);
}

static void channel_frame(struct far_h2 *h, const nghttp2_frame *frame) FAR_NO_TSA
{
	struct far_channel *c = channel_of(h);

	if (frame->hd.type == NGHTTP2_GOAWAY) {
		c->draining = true;
		atomic_store_explicit(&c->gone, true, memory_order_release);
	} else if (frame->hd.type == NGHTTP2_HEADERS || frame->hd.type == NGHTTP2_DATA) {
		c->pings = 0;
	}
}

const struct far_h2_ops far_chan_ops = {
	.header = far_call_header,
	.data = far_call_data,
	.closed = far_call_closed,
	.want = far_call_want,
	.frame = channel_frame,
};

void far_chan_die(struct far_channel *c, int err)
{
	if (c->dead)
		return;
	c->dead = true;
	c->error = err;
	atomic_store_explicit(&c->gone, true, memory_order_release);
	for (struct far_call *call = c->calls, *next; call; call = next) {
		next = call->next;
		far_call_done(call, err);
	}
	if (c->conn.ops)
		c->conn.ops->shutdown(&c->conn);
}

/* ---------------------------------------------------------------------------------- sending and reading */

static bool channel_has_output(struct far_channel *c) FAR_REQUIRES(c->lock)
{
	return !c->dead && (far_h2_pending(&c->h2) || c->h2.dirty);
}

/* A reader that is awake sends what has gathered, before it reads again. */
static bool channel_wants_sender(struct far_channel *c) FAR_REQUIRES(c->lock)
{
	return !c->sending && (!c->reading || c->asleep) && channel_has_output(c);
}

/* Nobody is in the system call: give the memory of those who leave back to them. */
static void channel_let_go(struct far_channel *c) FAR_REQUIRES(c->lock)
{
	for (struct far_call *call = c->calls; call && c->leaving; call = call->next) {
		if (!call->leaving)
			continue;
		if (!c->dead && far_h2_detach(&c->h2, call->req.body, call->req.body_n))
			far_chan_die(c, -ENOMEM);
		call->leaving = false;
		c->leaving--;
		channel_wake(c, call, CHANNEL_LOOK);
	}
	if (c->dead)
		far_h2_drop(&c->h2);
}

/* Take the send token and write until nothing is left or the socket is full. True: all is out. */
static bool channel_send(struct far_channel *c) FAR_REQUIRES(c->lock)
{
	bool all = true;
	int r = 0;

	c->sending = true;
	c->unsent = 0;
	atomic_store_explicit(&c->output, false, memory_order_relaxed);
	while (!c->dead && far_h2_fill(&c->h2, &r)) {
		c->h2.writing = true;
		const struct iovec *iov = c->h2.iov + c->h2.iov_at;
		int n = (int)(c->h2.iov_n - c->h2.iov_at);
		far_chan_unlock(c);
		ssize_t k = c->conn.ops->writev(&c->conn, iov, n);
		far_mutex_lock(&c->lock);
		c->h2.writing = false;
		if (k > 0) {
			far_h2_wrote(&c->h2, (size_t)k);
			c->written += (uint64_t)k;
		}
		if (c->leaving)
			channel_let_go(c);
		all = k != -EAGAIN;
		if (k <= 0) {
			r = all ? (k ? (int)k : -EPIPE) : 0;
			break;
		}
	}
	/* A session that has nothing more to say or hear has ended itself over what the peer sent. */
	if (!r && !c->dead && all && far_h2_over(&c->h2))
		r = c->draining ? -ECONNRESET : -EPROTO;
	if (r)
		far_chan_die(c, r);
	c->sending = false;
	return all;
}

/* A sender who is not the reader waits for room. */
static void channel_wait_room(struct far_channel *c, uint64_t deadline) FAR_REQUIRES(c->lock)
{
	bool in = !c->reading;

	c->sending = true;
	far_chan_unlock(c);
	c->conn.ops->wait(&c->conn, in, true, far_min(deadline, far_now() + CHANNEL_SLICE));
	far_mutex_lock(&c->lock);
	c->sending = false;
}

static bool channel_is_asked(struct far_channel *c)
{
	return atomic_load_explicit(&c->output, memory_order_relaxed) || atomic_load_explicit(&c->inbox, memory_order_relaxed);
}

/* One read of the socket, straight to where the bytes belong if that is known, spinning for a moment when there is
 * nothing. Bytes that were fed, or -errno. The read token is held. */
static ssize_t channel_read_some(struct far_channel *c, bool spin) FAR_REQUIRES(c->lock)
{
	struct iovec iov[2];
	uint8_t *dst = NULL;
	size_t direct = far_h2_direct(&c->h2, &dst);
	struct far_call *pin = direct ? far_container_of(nghttp2_session_get_stream_user_data(c->h2.session, c->h2.data_stream),
						struct far_call, s) : NULL;
	int n = 0;

	if (pin) {
		iov[n++] = (struct iovec){ dst, direct };
		pin->pinned++;
	}
	iov[n++] = (struct iovec){ c->spare, CHANNEL_SPARE };
	far_chan_unlock(c);
	ssize_t k = c->conn.ops->readv(&c->conn, iov, n);
	if (k == -EAGAIN && spin && !c->dry)
		c->dry = far_now();
	while (k == -EAGAIN && spin && !channel_is_asked(c) && far_spin_wanted(&c->spin) && far_now() - c->dry < FAR_SPIN) {
		far_thread_yield();
		k = c->conn.ops->readv(&c->conn, iov, n);
	}
	uint64_t now = k > 0 ? far_now() : 0;
	if (now && c->dry) {
		far_spin_learn(&c->spin, now - c->dry);
		c->dry = 0;
	}
	far_mutex_lock(&c->lock);
	if (pin && --pin->pinned == 0 && pin->done && pin->waiting)
		channel_wake(c, pin, CHANNEL_LOOK); /* it left meanwhile; what came for it is still fed under the lock */
	if (k == 0)
		k = -ECONNRESET;
	if (k > 0 && !c->dead) {
		c->heard = now;
		c->pinged = 0;
		if (!c->spoken && !c->tls)
			c->wants_tls = far_tls_looks_like(c->spare, (size_t)k); /* an alert: it found no handshake */
		c->spoken = true;
		size_t first = (size_t)far_min((uint64_t)k, direct);
		int r = first ? far_h2_feed(&c->h2, dst, first) : 0;
		if (r == 0 && (size_t)k > first)
			r = far_h2_feed(&c->h2, c->spare, (size_t)k - first);
		if (r == 0 && far_h2_over(&c->h2))
			r = -ECONNRESET;
		if (r)
			k = r;
	}
	return k;
}

/* Until when the reader may sleep before it looks for signs of life again. */
static uint64_t channel_look_at(struct far_channel *c, uint64_t deadline) FAR_REQUIRES(c->lock)
{
	uint64_t since = far_max(c->heard, c->moved);

	if (c->quiet == FAR_NEVER || (!c->pinged && c->pings >= c->max_pings))
		return deadline;
	if (c->pinged) /* in slices, to see when the peer's system takes something */
		return far_min(deadline, far_min(far_max(since, c->pinged) + c->patience, far_now() + c->patience / 8 + 1));
	return far_min(deadline, since + c->quiet);
}

/* It slept for so long and nothing came. */
static void channel_look(struct far_channel *c) FAR_REQUIRES(c->lock)
{
	uint64_t now = far_now(), left = c->conn.ops->unacked(&c->conn);

	if (c->quiet == FAR_NEVER || c->dead)
		return;
	if (c->written - far_min(left, c->written) > c->taken) {
		c->taken = c->written - left;
		c->moved = now;
	}
	uint64_t since = far_max(c->heard, c->moved);
	if (c->pinged) {
		if (now >= far_max(since, c->pinged) + c->patience)
			far_chan_die(c, -ETIMEDOUT);
	} else if (c->pings < c->max_pings && now >= since + c->quiet) {
		if (nghttp2_submit_ping(c->h2.session, NGHTTP2_FLAG_NONE, NULL)) {
			far_chan_die(c, -ENOMEM);
			return;
		}
		c->h2.dirty = true;
		c->pinged = now;
		c->pings++;
	}
}

/* Hold the read token until the call is done or its time is up. */
static void channel_read(struct far_channel *c, struct far_call *call, uint64_t deadline) FAR_REQUIRES(c->lock)
{
	c->reading = true;
	atomic_store_explicit(&c->awake, true, memory_order_relaxed);
	ssize_t k = 0;
	while (!call->done && !c->dead) {
		bool room = true;
		channel_drain(c);
		/* While replies come, requests gather, as long as the peer has enough to do. */
		if (!c->sending && (k <= 0 || c->unsent * CHANNEL_GATHER >= c->linked) && channel_has_output(c))
			room = channel_send(c);
		if (c->dead)
			break;
		k = channel_read_some(c, room);
		if (k > 0 && c->heard >= deadline)
			break; /* of other things a peer may speak for ever */
		if (k > 0 || call->done)
			continue;
		if (k != -EAGAIN) {
			far_chan_die(c, (int)k);
			break;
		}
		if (!c->sending && channel_has_output(c) && room)
			continue;
		uint64_t until = channel_look_at(c, deadline);
		c->asleep = true;
		atomic_store_explicit(&c->awake, false, memory_order_relaxed); /* far_chan_unlock() looks into the inbox after it */
		far_chan_unlock(c);
		int r = c->conn.ops->wait(&c->conn, true, !room, until);
		far_mutex_lock(&c->lock);
		c->asleep = false;
		atomic_store_explicit(&c->awake, true, memory_order_relaxed);
		if (r == -ETIMEDOUT && until == deadline)
			break;
		if (r == -ETIMEDOUT)
			channel_look(c);
		else if (r)
			far_chan_die(c, r);
	}
	c->reading = false;
	atomic_store_explicit(&c->awake, false, memory_order_relaxed);
	channel_drain(c);
	if (channel_wants_sender(c)) /* it was left to us */
		channel_send(c);
}

/* ---------------------------------------------------------------------------------------------------- calls */

void far_chan_link(struct far_channel *c, struct far_call *call)
{
	call->next = NULL;
	call->prev = c->last;
	if (c->last)
		c->last->next = call;
	else
		c->calls = call;
	c->last = call;
	c->linked++;
	c->unsent++;
}

static void channel_unlink(struct far_channel *c, struct far_call *call) FAR_REQUIRES(c->lock)
{
	if (call->prev)
		call->prev->next = call->next;
	else
		c->calls = call->next;
	if (call->next)
		call->next->prev = call->prev;
	else
		c->last = call->prev;
	c->linked--;
}

/* Put the request into the session. */
int far_chan_submit(struct far_channel *c, struct far_call *call, uint64_t deadline)
{
	static const nghttp2_nv fixed[] = {
		FAR_H2_NV(":method", "POST"),
		FAR_H2_NV(":scheme", "http"), /* or https, see below */
		FAR_H2_NV("content-type", "application/grpc"),
		FAR_H2_NV("te", "trailers"),
		FAR_H2_NV("user-agent", "farpage/0.1"),
	};
	static const nghttp2_nv https = FAR_H2_NV(":scheme", "https");
	nghttp2_nv nv[10] = { fixed[0], c->tls ? https : fixed[1] };
	nghttp2_nv path = FAR_H2_NV(":path", ""), authority = FAR_H2_NV(":authority", "");
	nghttp2_nv authorization = FAR_H2_NV("authorization", "");
	nghttp2_nv export = FAR_H2_NV("farpage-export", ""), timeout = FAR_H2_NV("grpc-timeout", "");
	char seconds[16];
	size_t n = 2;

	call->grpc_status = FAR_CALL_NO_STATUS;
	call->s = (struct far_h2_stream){ .id = 0 };
	call->http_status = 0;
	call->refused = 0;
	call->errno_name[0] = call->text[0] = 0;
	call->req.release = NULL;
	path.value = (uint8_t *)call->path;
	path.valuelen = strlen(call->path);
	authority.value = (uint8_t *)c->authority;
	authority.valuelen = strlen(c->authority);
	nv[n++] = path;
	nv[n++] = authority;
	nv[n++] = fixed[2];
	nv[n++] = fixed[3];
	nv[n++] = fixed[4];
	if (c->authorization) {
		authorization.value = (uint8_t *)c->authorization;
		authorization.valuelen = strlen(c->authorization);
		nv[n++] = authorization;
	}
	if (call->export_header) {
		/* The caller may be gone before the headers are made: let nghttp2 copy this one. */
		export.value = (uint8_t *)call->export_header;
		export.valuelen = strlen(call->export_header);
		export.flags = NGHTTP2_NV_FLAG_NO_COPY_NAME;
		nv[n++] = export;
	}
	uint64_t now = call->tell_deadline && deadline != FAR_NEVER ? far_now() : deadline;
	if (now < deadline && deadline - now < 1000000 * FAR_SEC) {
		/* So that the peer does not work on for nobody. Whole seconds: a few values, which header compression learns. */
		timeout.value = (uint8_t *)seconds;
		timeout.valuelen = (size_t)snprintf(seconds, sizeof seconds, "%" PRIu64 "S", far_div_up(deadline - now, FAR_SEC));
		timeout.flags = NGHTTP2_NV_FLAG_NO_COPY_NAME;
		nv[n++] = timeout;
	}
	atomic_store_explicit(&c->output, true, memory_order_relaxed);
	far_h2_queue(&c->h2, &call->s, &call->req);
	int r = far_h2_request(&c->h2, &call->s, nv, n);
	if (r == -ESTALE) {
		/* All stream ids are used up: a new connection has new ones. */
		c->draining = true;
		atomic_store_explicit(&c->gone, true, memory_order_release);
		call->untouched = true;
		r = -ECONNRESET;
	}
	return r;
}

/* The call ends without a reply: the peer is told, and nothing of it is reported any more. */
void far_chan_abandon(struct far_channel *c, struct far_call *call, int err)
{
	int32_t id = call->s.id;

	if (call->done)
		return;
	far_h2_forget(&c->h2, &call->s);
	if (id)
		far_h2_reset(&c->h2, id, NGHTTP2_CANCEL);
	call->s.id = 0;
	far_call_done(call, err);
}

/* Leave the list; nobody touches the call's memory afterwards. */
void far_chan_leave(struct far_channel *c, struct far_call *call)
{
	while (call->pinned)
		channel_sleep(c, call);
	if (call->s.id)
		far_h2_forget(&c->h2, &call->s); /* the channel died */
	if (c->dead && !c->h2.writing) {
		far_h2_drop(&c->h2);
	} else if (far_h2_borrows(&c->h2, call->req.body, call->req.body_n)) {
		/* Whoever writes is in a system call that does not block, and copies what is left when it comes back. */
		call->leaving = true;
		c->leaving++;
		if (!c->h2.writing)
			channel_let_go(c);
		while (call->leaving)
			channel_sleep(c, call);
	}
	channel_unlink(c, call);
}

/* If its caller sleeps and nothing of it is in use any more, the call is taken off the list here, and the caller goes
 * without asking for the lock, which its waker holds and others want. It held no token, so it has none to pass on. */
void far_channel_done(struct far_call *call) FAR_NO_TSA
{
	struct far_channel *c = call->channel;

	if (!call->waiting)
		return;
	if (call->s.id || call->pinned || far_h2_borrows(&c->h2, call->req.body, call->req.body_n)) {
		channel_wake(c, call, CHANNEL_LOOK);
		return;
	}
	channel_unlink(c, call);
	channel_wake(c, call, CHANNEL_LEFT);
}

/* Give the tokens to somebody: wake one caller who waits. */
void far_chan_pass(struct far_channel *c)
{
	if (c->reading && !channel_wants_sender(c))
		return;
	for (struct far_call *call = c->calls; call; call = call->next) {
		if (call->waiting && !call->done) {
			channel_wake(c, call, CHANNEL_LOOK);
			return;
		}
	}
}

/* Do what is to be done for it. True: others do; sleep. False: it is done. */
static bool channel_work(struct far_channel *c, struct far_call *call, uint64_t deadline, uint64_t silence)
	FAR_REQUIRES(c->lock)
{
	while (!call->done) {
		uint64_t now = deadline == FAR_NEVER ? 0 : far_now();
		if (now >= deadline) {
			/* Silence on the whole connection for the full patience of a call: the peer is gone. */
			if (now - c->heard >= silence)
				far_chan_die(c, -ETIMEDOUT);
			far_chan_abandon(c, call, -ETIMEDOUT);
			if (!c->sending && channel_has_output(c))
				channel_send(c);
			break;
		}
		if (channel_wants_sender(c) || (!c->sending && call->req.body_n > CHANNEL_SMALL && channel_has_output(c))) {
			if (!channel_send(c) && c->reading && !call->done)
				channel_wait_room(c, deadline);
			if (c->reading)
				continue;
		}
		if (call->done)
			break;
		if (!c->reading) {
			channel_read(c, call, deadline);
			continue;
		}
		return true;
	}
	return false;
}

/* Read what has come; nobody reads now. */
void far_chan_hear(struct far_channel *c)
{
	ssize_t k;

	c->reading = true;
	while ((k = channel_read_some(c, false)) > 0)
		;
	if (k != -EAGAIN)
		far_chan_die(c, (int)k);
	c->reading = false;
}

/* The first call after a pause: settings, pings and a farewell that came meanwhile are read before it is made. */
static void channel_catch_up(struct far_channel *c) FAR_REQUIRES(c->lock)
{
	if (c->calls || c->reading || c->dead)
		return;
	uint64_t now = far_now();
	bool stale = now - c->heard >= CHANNEL_STALE;
	c->heard = now; /* silence is counted from the first call that waits */
	c->moved = c->pinged = 0;
	if (stale)
		far_chan_hear(c);
}

static void channel_prepare(struct far_channel *c, struct far_call *call, uint64_t deadline)
{
	call->channel = c;
	call->deadline = deadline;
	far_event_init(&call->event);
	call->untouched = call->linked = false;
	call->done = call->waiting = call->got_message = call->bad_type = false;
}

static void channel_begin(struct far_channel *c, struct far_call *call) FAR_REQUIRES(c->lock)
{
	channel_catch_up(c);
	if (c->dead || c->draining) {
		call->untouched = true;
		call->result = c->dead ? c->error : -ECONNRESET;
	} else {
		call->result = far_chan_submit(c, call, call->deadline);
		call->linked = call->result == 0;
	}
	if (call->linked)
		far_chan_link(c, call);
}

/* Begin what lies in the inbox, in the order in which it came. */
static void channel_drain(struct far_channel *c) FAR_REQUIRES(c->lock)
{
	struct far_call *call = atomic_exchange_explicit(&c->inbox, NULL, memory_order_acquire), *first = NULL, *next;

	for (; call; call = next) {
		next = call->next;
		call->next = first;
		first = call;
	}
	for (; first; first = next) {
		next = first->next;
		channel_begin(c, first);
		if (!first->linked)
			channel_wake(c, first, CHANNEL_LEFT);
	}
}

/* A caller who slept has the lock again. */
static void channel_awake(struct far_channel *c, struct far_call *call) FAR_REQUIRES(c->lock)
{
	channel_drain(c);
	call->waiting = false;
	if (far_event_get(&call->event) == CHANNEL_LEFT)
		call->linked = false;
	far_event_clear(&call->event);
}

/* Ends without the lock. */
static void channel_finish(struct far_channel *c, struct far_call *call, uint64_t deadline, uint64_t silence)
	FAR_RELEASE(c->lock)
{
	while (call->linked && channel_work(c, call, deadline, silence)) {
		call->waiting = true;
		far_chan_unlock(c);
		if (far_event_wait_until(&call->event, deadline) == CHANNEL_LEFT)
			return;
		far_mutex_lock(&c->lock);
		channel_awake(c, call);
	}
	if (call->linked)
		far_chan_leave(c, call);
	far_chan_pass(c);
	far_chan_unlock(c);
}

void far_channel_begin(struct far_channel *c, struct far_call *call, uint64_t deadline)
{
	channel_prepare(c, call, deadline);
	far_mutex_lock(&c->lock);
	channel_begin(c, call);
	far_chan_unlock(c);
}

void far_channel_push(struct far_channel *c)
{
	far_mutex_lock(&c->lock);
	if (channel_wants_sender(c))
		channel_send(c);
	far_chan_unlock(c);
}

int far_channel_finish(struct far_channel *c, struct far_call *call, uint64_t deadline, uint64_t silence)
{
	far_mutex_lock(&c->lock);
	channel_finish(c, call, deadline, silence);
	return call->result;
}

/* Leave the call to whoever reads, or has the lock, with what others bring: one batch for all. False: it is done already;
 * true: the lock is held, and the rest is to be done as usual. */
static bool channel_leave_word(struct far_channel *c, struct far_call *call) FAR_TRY_ACQUIRE(true, c->lock)
{
	call->waiting = true;
	call->next = atomic_load_explicit(&c->inbox, memory_order_relaxed);
	while (!atomic_compare_exchange_weak(&c->inbox, &call->next, call))
		;
	atomic_thread_fence(memory_order_seq_cst); /* partner: far_chan_unlock() */
	if (atomic_load_explicit(&c->awake, memory_order_relaxed) || !far_mutex_trylock(&c->lock)) {
		if (far_event_wait_until(&call->event, call->deadline) == CHANNEL_LEFT)
			return false;
		far_mutex_lock(&c->lock);
	}
	channel_awake(c, call);
	return true;
}

int far_channel_call(struct far_channel *c, struct far_call *call, uint64_t deadline, uint64_t silence)
{
	channel_prepare(c, call, deadline);
	if (call->req.body_n > CHANNEL_SMALL) {
		far_mutex_lock(&c->lock);
	} else {
		bool alone = !atomic_load_explicit(&c->awake, memory_order_relaxed);
		if (!alone || !far_mutex_trylock(&c->lock)) {
			if (channel_leave_word(c, call))
				channel_finish(c, call, deadline, silence);
			return call->result;
		}
	}
	channel_begin(c, call);
	channel_finish(c, call, deadline, silence);
	return call->result;
}
