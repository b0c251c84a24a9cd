/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * No zombie writes. Changes carry a session and a generation. When the fate of one is unknown (no answer in time,
 * connection lost, answer garbled) it may still lie in some buffer and land after newer ones.
 *
 *      SOUND --far_fence_break()--> BROKEN --far_fence_enter()--> FENCING --> SOUND     a hello with the new generation was
 *                                      ^                      |               answered: nothing older will be
 *                                      |______________________|               carried out any more
 *                                        it could not be said in time
 *
 * One thread fences: it takes the next generation, ends the old connections (their calls get -ECANCELED and are made
 * again), and dials. Everybody else who wants to change something waits for it. Nothing is changed while BROKEN, so:
 *
 *  1. a change is sent only under a generation in which no change has an unknown fate;
 *  2. after an error a change may still land, but not after the next change has been sent.
 *
 * A peer without sessions knows no generations: there the connection on which the change was made is ended (client.c) and
 * plain.c does what can be done about the rest.
 */
#include "wire/grpc/client.h"

#include "backend/backend.h"

#define FENCE_TRIES 3

/* A greeting that failed so was most likely garbled; who says it three times is believed. */
static bool fence_garbled(int r)
{
	return r != -ESTALE && r != -ESHUTDOWN && (r == -EBADMSG || !far_error_is_transient(r));
}

/* Tell the peer of generation `gen` on a connection that was made for it. */
static int fence_establish(struct far_client *c, uint64_t gen, uint64_t deadline)
{
	int r = 0;

	if (!far_client_flag(&c->sessions))
		return 0;
	far_lanes_reset(&c->lanes, -ECANCELED);
	for (int i = 0; i < FENCE_TRIES; i++) {
		struct far_channel *channel;
		r = far_lanes_pick(&c->lanes, FAR_LANE_DEMAND, deadline, &channel, NULL);
		if (r && !fence_garbled(r))
			break;
		if (r)
			continue;
		far_mutex_lock(&c->lock);
		bool known = c->acked >= gen;
		far_mutex_unlock(&c->lock);
		/* A connection that was dialled before, or the only one there is. */
		if (!known)
			r = far_hello_greet(c, channel, deadline, NULL);
		far_channel_put(channel);
		if (!r || (r != -ECONNRESET && !fence_garbled(r)))
			break;
	}
	return r;
}

int far_fence_enter(struct far_client *c, uint64_t deadline, uint64_t *generation)
{
	int r = 0;

	far_mutex_lock(&c->lock);
	uint64_t round = c->fence_round;
	while (!r && (c->broken || c->fencing)) {
		if (!c->fencing && c->fence_round != round && c->fence_error) {
			r = c->fence_error; /* of the attempt that this caller waited for */
			break;
		}
		if (c->fencing) {
			if (!far_cond_wait_until(&c->cond, &c->lock, deadline) && (c->broken || c->fencing))
				r = -ETIMEDOUT;
			continue;
		}
		c->fencing = true;
		uint64_t gen = ++c->generation;
		far_mutex_unlock(&c->lock);
		r = fence_establish(c, gen, deadline);
		far_mutex_lock(&c->lock);
		c->fencing = false;
		c->fence_round++;
		/* One who was short of time says nothing to the others. */
		c->fence_error = r == -ETIMEDOUT ? 0 : r;
		if (r == 0)
			c->broken = false;
		far_cond_broadcast(&c->cond);
	}
	*generation = c->generation;
	far_mutex_unlock(&c->lock);
	return r;
}

void far_fence_break(struct far_client *c, uint64_t generation)
{
	far_mutex_lock(&c->lock);
	if (generation >= c->generation)
		c->broken = true;
	far_mutex_unlock(&c->lock);
}
