/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A slot is empty, being dialled by one caller, or holds a channel.
 *
 *     EMPTY -> DIALLING -> UP -> EMPTY          far_lanes_pick() takes every arrow; a channel that is dead or told to go
 *       ^_________/                             away makes its slot empty, and the next call dials anew
 *
 * A call goes to the channel of its lane that owes the fewest bytes. Another connection is dialled only when that one
 * owes more than a little (near by: than a few calls), for the caller who finds it so waits for the dial. Each dial looks
 * the host's name up anew: the peer may have moved.
 *
 * No storm. A dial includes the greeting. Once one has failed (`failing`), all slots together make one dial at a time, with
 * growing, jittered pauses, until one succeeds. A caller waits for the next one, by whomever it is made, as far as its
 * deadline allows, and gets its outcome: each call sees at most one failed dial. -ESTALE (the peer answers, but it is the
 * wrong one) is given to callers without waiting.
 */
#include "wire/grpc/lanes.h"

#include "net/access.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define LANES_BUSY (256 * FAR_KIB) /* a channel that owes more is worth another connection */
#define LANES_CALLS 3              /* or more calls, near by: two connections are read on two CPUs */
#define LANES_PAUSE (20 * FAR_MSEC) /* after the first failed dial; doubles */
#define LANES_PAUSE_MAX (2 * FAR_SEC)
#define LANES_PINGS 2 /* in a row: grpc-go hangs up at the fourth */
#define LANES_QUIET (2 * FAR_SEC)
#define LANES_PATIENCE (5 * FAR_SEC)

/* The first words on a connection that nobody else sees yet but far_lanes_stop(). */
static int lanes_greet(struct far_lanes *l, struct far_lanes_slot *s, struct far_channel *channel, uint64_t deadline,
		       struct far_error *err)
{
	if (!l->greet)
		return 0;
	far_mutex_lock(&l->lock);
	bool stopped = l->stopped;
	s->greeted = channel;
	far_mutex_unlock(&l->lock);
	int r = stopped ? -ESHUTDOWN : l->greet(l->opaque, channel, deadline, err);
	far_mutex_lock(&l->lock);
	s->greeted = NULL;
	far_mutex_unlock(&l->lock);
	return r;
}

/* The token for a connection, as metadata. It never goes beyond this host in the clear. */
static int lanes_token(struct far_lanes *l, const struct far_conn *conn, char **out, struct far_error *err)
{
	char *token;

	if (!l->token_file)
		return 0;
	if (!l->tls && !far_conn_is_local(conn))
		return far_error_set(err, EPERM, "cannot open %s: its token would travel in the clear; use grpcs://", l->where);
	int r = far_token_read(l->token_file, &token, err);
	if (r)
		return far_error_prefix(err, "cannot open %s", l->where);
	size_t n = strlen(token) + sizeof "Bearer ";
	*out = malloc(n);
	if (*out)
		snprintf(*out, n, "Bearer %s", token);
	free(token);
	return *out ? 0 : far_error_set(err, ENOMEM, "out of memory");
}

static int lanes_dial(struct far_lanes *l, struct far_lanes_slot *s, uint64_t deadline, struct far_channel **out,
		      struct far_error *err)
{
	struct far_net_addr a = { .host = l->host, .port = l->port, .path = l->path, .command = l->command };
	struct far_conn conn = { 0 };
	int r = far_conn_connect(&conn, &a, deadline, l->cancel, err);

	if (r)
		return r;
	if (s < l->slots[FAR_LANE_DEMAND] + FAR_LANES_MAX && s >= l->slots[FAR_LANE_DEMAND])
		far_conn_brisk(&conn);
	if (l->tls) {
		r = far_tls_client(l->tls, l->tls_name, &conn);
		r = r ? far_error_set(err, -r, "TLS: %s", far_strerror(r)) : far_tls_handshake(&conn, deadline, l->cancel, err);
		if (r) {
			far_conn_close(&conn);
			far_error_prefix(err, "cannot open %s", l->where);
			return r;
		}
	}
	char *authorization = NULL;
	r = lanes_token(l, &conn, &authorization, err);
	if (r) {
		far_conn_close(&conn);
		return r;
	}
	r = far_channel_new(&conn, l->authority, out);
	far_conn_close(&conn);
	if (r)
		free(authorization);
	else
		far_channel_authorize(*out, authorization);
	if (r)
		return far_error_set(err, -r, "cannot use the connection to %s: %s", l->where, far_strerror(r));
	far_channel_keep_alive(*out, l->quiet, l->patience, LANES_PINGS);
	r = lanes_greet(l, s, *out, deadline, err);
	if (r) {
		char why[300];
		if (far_channel_why(*out, why, sizeof why))
			r = far_error_set(err, r == -ECONNRESET ? EPROTO : -r, "cannot open %s: %s", l->where, why);
		far_channel_kill(*out, r);
		far_channel_put(*out);
		*out = NULL;
	}
	return r;
}

/* Make the slot of a channel that takes no more calls empty. */
static void lanes_sweep(struct far_lanes *l, struct far_lanes_slot *s) FAR_REQUIRES(l->lock)
{
	if (!s->channel || far_channel_usable(s->channel) || s->dialling || l->once)
		return;
	FAR_ASSERT(l->dead_n < FAR_ARRAY_LEN(l->dead));
	l->dead[l->dead_n++] = s->channel;
	s->channel = NULL;
	l->lost++;
}

/* Let go of those: the last reference closes the connection, which takes its time where a command is behind it. */
static void lanes_bury(struct far_lanes *l) FAR_REQUIRES(l->lock)
{
	struct far_channel *dead[FAR_ARRAY_LEN(l->dead)];
	size_t n = l->dead_n;

	if (!n)
		return;
	memcpy(dead, l->dead, n * sizeof dead[0]);
	l->dead_n = 0;
	far_mutex_unlock(&l->lock);
	for (size_t i = 0; i < n; i++)
		far_channel_put(dead[i]);
	far_mutex_lock(&l->lock);
}

/* The best channel of a lane, NULL if none is up. *free_slot gets a slot that could be dialled. */
static struct far_lanes_slot *lanes_best(struct far_lanes *l, int lane, struct far_lanes_slot **free_slot, bool *busy)
	FAR_REQUIRES(l->lock)
{
	struct far_lanes_slot *best = NULL;
	uint64_t least = 0;
	int calls;

	*free_slot = NULL;
	for (unsigned i = 0; i < l->n[lane]; i++) {
		struct far_lanes_slot *s = &l->slots[lane][i];
		lanes_sweep(l, s);
		if (!s->channel && !s->dialling && !*free_slot)
			*free_slot = s;
		if (!s->channel || s->dialling)
			continue;
		uint64_t owes = far_channel_owed(s->channel, &calls);
		if (!best || owes < least) {
			best = s;
			least = owes;
			*busy = owes > LANES_BUSY ||
				(calls > LANES_CALLS && atomic_load_explicit(&l->near, memory_order_relaxed));
		}
	}
	return best;
}

/* What the end of a dial means for the next ones. A caller who was short of time says nothing about the peer. */
static void lanes_learn(struct far_lanes *l, int r, const struct far_error *err, uint64_t deadline) FAR_REQUIRES(l->lock)
{
	uint64_t now = far_now();

	if (r == 0) {
		l->failing = false;
		l->pause = 0;
		l->connects++;
		l->reconnects += l->reconnects < l->lost;
		return;
	}
	if (r == -ESHUTDOWN || (r == -ETIMEDOUT && now >= deadline))
		return;
	l->failing = true;
	l->round++;
	l->error = r;
	l->text = *err;
	l->pause = l->pause ? far_min(2 * l->pause, LANES_PAUSE_MAX) : LANES_PAUSE;
	l->rng = l->rng * 6364136223846793005 + 1442695040888963407;
	l->next = now + l->pause - (l->rng >> 33) % (l->pause / 2);
}

/* Dial into a slot, without the lock. */
static int lanes_fill(struct far_lanes *l, struct far_lanes_slot *s, uint64_t deadline, struct far_error *err)
	FAR_REQUIRES(l->lock)
{
	struct far_channel *channel = NULL;

	s->dialling = true;
	l->dialling++;
	lanes_bury(l); /* a command that has the content open must be gone before the next one is run */
	far_mutex_unlock(&l->lock);
	int r = lanes_dial(l, s, deadline, &channel, err);
	far_mutex_lock(&l->lock);
	s->dialling = false;
	l->dialling--;
	if (r == 0 && l->stopped) {
		far_channel_kill(channel, -ESHUTDOWN);
		far_channel_put(channel);
		r = -ESHUTDOWN;
	} else if (r == 0) {
		s->channel = channel;
	}
	lanes_learn(l, r, err, deadline);
	far_cond_broadcast(&l->cond);
	return r;
}

/* What a caller does about a slot that could be dialled while dials fail: 0 dial it, 1 wait (*until), or -errno. */
static int lanes_patience(struct far_lanes *l, uint64_t round, uint64_t deadline, uint64_t *until) FAR_REQUIRES(l->lock)
{
	*until = deadline;
	if (!l->failing)
		return 0;
	if (l->round != round)
		return l->error; /* a dial that this caller waited for */
	if (l->dialling)
		return 1;
	if (far_now() >= l->next)
		return 0;
	if (l->error == -ESTALE || deadline <= l->next)
		return l->error;
	*until = l->next;
	return 1;
}

/* A channel to call on, with a reference. */
int far_lanes_pick(struct far_lanes *l, int lane, uint64_t deadline, struct far_channel **out, struct far_error *err)
{
	struct far_error text = { .code = 0 };
	int r = 0;

	far_mutex_lock(&l->lock);
	if (l->single)
		lane = FAR_LANE_DEMAND;
	uint64_t round = l->round;
	for (;;) {
		struct far_lanes_slot *free_slot;
		uint64_t until = deadline;
		bool busy = false;
		if (l->stopped) {
			r = -ESHUTDOWN;
			break;
		}
		struct far_lanes_slot *best = lanes_best(l, lane, &free_slot, &busy);
		if (free_slot && !l->once && (!best || (busy && !l->failing))) {
			r = lanes_patience(l, round, deadline, &until);
			if (r < 0) {
				text = l->text;
				break;
			}
			if (r == 0) {
				r = lanes_fill(l, free_slot, deadline, &text);
				if (r == 0)
					best = free_slot;
				else if (r == -ESHUTDOWN || !best || !best->channel)
					break;
			}
			r = 0; /* the connection that is there will do */
		}
		if (best && best->channel) {
			*out = best->channel;
			far_channel_get(*out);
			break;
		}
		if (l->once) {
			r = -EPIPE;
			break;
		}
		if (!far_cond_wait_until(&l->cond, &l->lock, until) && until == deadline) {
			r = -ETIMEDOUT;
			break;
		}
	}
	lanes_bury(l);
	far_mutex_unlock(&l->lock);
	if (r && err && text.code)
		*err = text;
	return r;
}

size_t far_lanes_up(struct far_lanes *l, struct far_channel **out, size_t max)
{
	size_t n = 0;

	far_mutex_lock(&l->lock);
	for (int lane = 0; lane < FAR_LANES && !(l->once && n); lane++) {
		for (unsigned i = 0; i < l->n[lane] && n < max; i++) {
			lanes_sweep(l, &l->slots[lane][i]);
			if (!l->slots[lane][i].channel)
				continue;
			out[n] = l->slots[lane][i].channel;
			far_channel_get(out[n++]);
		}
	}
	lanes_bury(l);
	far_mutex_unlock(&l->lock);
	return n;
}

void far_lanes_reset(struct far_lanes *l, int err)
{
	struct far_channel *up[FAR_LANES * FAR_LANES_MAX];
	size_t n = 0;

	far_mutex_lock(&l->lock);
	for (int lane = 0; lane < FAR_LANES && !l->once; lane++) {
		for (unsigned i = 0; i < l->n[lane]; i++) {
			if (!l->slots[lane][i].channel)
				continue;
			up[n++] = l->slots[lane][i].channel;
			l->slots[lane][i].channel = NULL;
			l->lost++;
		}
	}
	far_mutex_unlock(&l->lock);
	for (size_t i = 0; i < n; i++) {
		far_channel_kill(up[i], err);
		far_channel_put(up[i]);
	}
}

void far_lanes_count(struct far_lanes *l, uint64_t *connects, uint64_t *reconnects, uint64_t *lost)
{
	far_mutex_lock(&l->lock);
	*connects = l->connects;
	*reconnects = l->reconnects;
	*lost = l->lost;
	far_mutex_unlock(&l->lock);
}

void far_lanes_stop(struct far_lanes *l)
{
	uint64_t one = 1;
	struct far_channel *up[2 * FAR_LANES * FAR_LANES_MAX];
	size_t n = 0;

	far_mutex_lock(&l->lock);
	l->stopped = true;
	for (unsigned i = 0; i < FAR_LANES * FAR_LANES_MAX; i++) {
		struct far_channel *greeted = l->slots[i / FAR_LANES_MAX][i % FAR_LANES_MAX].greeted;
		if (greeted) {
			far_channel_get(greeted);
			up[n++] = greeted;
		}
	}
	far_cond_broadcast(&l->cond);
	far_mutex_unlock(&l->lock);
	n += far_lanes_up(l, up + n, FAR_ARRAY_LEN(up) - n);
	ssize_t w = write(l->cancel, &one, sizeof one);
	(void)w;
	for (size_t i = 0; i < n; i++) {
		far_channel_kill(up[i], -ESHUTDOWN);
		far_channel_put(up[i]);
	}
}

void far_lanes_adopt(struct far_lanes *l, struct far_channel *channel)
{
	far_mutex_lock(&l->lock);
	l->once = true;
	far_channel_get(channel);
	l->slots[FAR_LANE_DEMAND][0].channel = l->slots[FAR_LANE_BULK][0].channel = channel;
	far_mutex_unlock(&l->lock);
}

int far_lanes_init(struct far_lanes *l, const char *where, unsigned demand, unsigned bulk)
{
	memset(l, 0, sizeof *l);
	l->cancel = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (l->cancel < 0)
		return -errno;
	l->where = strdup(where);
	if (!l->where) {
		far_fd_close(&l->cancel);
		return -ENOMEM;
	}
	far_mutex_init(&l->lock);
	far_cond_init(&l->cond);
	l->quiet = LANES_QUIET;
	l->patience = LANES_PATIENCE;
	l->rng = far_now();
	l->n[FAR_LANE_DEMAND] = (unsigned)far_min(demand, FAR_LANES_MAX);
	l->n[FAR_LANE_BULK] = (unsigned)far_min(bulk, FAR_LANES_MAX);
	return 0;
}

void far_lanes_fini(struct far_lanes *l) FAR_NO_TSA
{
	for (int lane = 0; lane < FAR_LANES; lane++)
		for (unsigned i = 0; i < FAR_LANES_MAX; i++)
			far_channel_put(l->slots[lane][i].channel);
	for (size_t i = 0; i < l->dead_n; i++)
		far_channel_put(l->dead[i]);
	far_fd_close(&l->cancel);
	far_mutex_fini(&l->lock);
	far_cond_fini(&l->cond);
	free(l->where);
	free(l->host);
	free(l->path);
	free(l->command);
	free(l->authority);
	far_tls_put(l->tls);
	free(l->tls_name);
	free(l->token_file);
}
