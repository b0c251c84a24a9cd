/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#ifndef FAR_WIRE_GRPC_CHANNEL_INT_H
#define FAR_WIRE_GRPC_CHANNEL_INT_H

/* What channel.c, where calls run, and channel_life.c share. */
#include "wire/grpc/channel.h"

#include <stdatomic.h>

#define CHANNEL_SPARE 16384
#define CHANNEL_WAKE 64

struct far_channel {
	/* fixed */
	struct far_conn conn;
	char *authority, *authorization;
	bool tls;
	/* atomic */
	_Atomic unsigned refs;
	_Atomic int owed_calls;
	_Atomic int64_t owed;
	_Atomic uint64_t tag, marks;
	_Atomic bool gone; /* partner of `dead` and `draining`, for far_channel_usable() */

	_Atomic bool output; /* there is something to send: the reader ends its spin for it */
	_Atomic bool awake;  /* there is a reader, and it looks into the inbox before it sleeps or goes */
	_Atomic(struct far_call *) inbox; /* calls that came while another thread had the lock, newest first */

	struct far_mutex lock;
	struct far_h2 h2 FAR_GUARDED_BY(lock);
	struct far_call *calls FAR_GUARDED_BY(lock), *last FAR_GUARDED_BY(lock);
	bool sending FAR_GUARDED_BY(lock), reading FAR_GUARDED_BY(lock);
	bool asleep FAR_GUARDED_BY(lock); /* the reader, until something comes */
	bool dead FAR_GUARDED_BY(lock), draining FAR_GUARDED_BY(lock);
	bool spoken FAR_GUARDED_BY(lock), wants_tls FAR_GUARDED_BY(lock); /* the peer has said something; what it was */
	int error FAR_GUARDED_BY(lock);
	unsigned linked FAR_GUARDED_BY(lock), unsent FAR_GUARDED_BY(lock); /* calls on the list; begun since something was sent */
	unsigned leaving FAR_GUARDED_BY(lock); /* callers whose memory the batch still borrows */
	uint64_t heard FAR_GUARDED_BY(lock); /* when bytes came last */
	uint64_t quiet FAR_GUARDED_BY(lock), patience FAR_GUARDED_BY(lock); /* FAR_NEVER: no pings */
	uint64_t pinged FAR_GUARDED_BY(lock);  /* when the PING was sent that is not answered yet; 0: none */
	unsigned pings FAR_GUARDED_BY(lock), max_pings FAR_GUARDED_BY(lock); /* sent since the peer said something */
	uint64_t written FAR_GUARDED_BY(lock), taken FAR_GUARDED_BY(lock);   /* bytes; taken: acknowledged by its system */
	uint64_t moved FAR_GUARDED_BY(lock);   /* when `taken` was last seen to grow */
	/* whom to wake, after the lock has been let go: they would only wait for it */
	const struct far_event *wake[CHANNEL_WAKE] FAR_GUARDED_BY(lock);
	unsigned wake_n FAR_GUARDED_BY(lock);
	/* token: reading */
	uint8_t *spare;
	struct far_spin spin;
	uint64_t dry; /* since when nothing comes; 0: something came last */
};

extern const struct far_h2_ops far_chan_ops;

/* The only way to let go of the lock: whoever does takes in what was put into the inbox meanwhile, and wakes whom it has
 * to. */
void far_chan_unlock(struct far_channel *c) FAR_RELEASE(c->lock);
/* Every pending call gets err. */
void far_chan_die(struct far_channel *c, int err) FAR_REQUIRES(c->lock);
/* Begin a call; it is not on the list yet. 0 or -errno. */
int far_chan_submit(struct far_channel *c, struct far_call *call, uint64_t deadline) FAR_REQUIRES(c->lock);
void far_chan_link(struct far_channel *c, struct far_call *call) FAR_REQUIRES(c->lock);
/* End a call that the peer has not ended. */
void far_chan_abandon(struct far_channel *c, struct far_call *call, int err) FAR_REQUIRES(c->lock);
/* Take a call that is done off the list, once nobody touches its memory. */
void far_chan_leave(struct far_channel *c, struct far_call *call) FAR_REQUIRES(c->lock);
/* Take in what the peer has sent, without waiting. */
void far_chan_hear(struct far_channel *c) FAR_REQUIRES(c->lock);
/* Wake one waiting caller for the tokens that are free. */
void far_chan_pass(struct far_channel *c) FAR_REQUIRES(c->lock);

#endif
