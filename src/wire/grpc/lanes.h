/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The connections of a client, in two lanes: demand for what someone waits for, bulk for everything else. */
#ifndef FAR_GRPC_LANES_H
#define FAR_GRPC_LANES_H

#include "net/tls.h"
#include "wire/grpc/channel.h"

#define FAR_LANES_MAX 16 /* connections a lane */

enum { FAR_LANE_DEMAND, FAR_LANE_BULK, FAR_LANES };

struct far_lanes_slot {
	struct far_channel *channel;
	bool dialling;
	struct far_channel *greeted; /* the connection that is being made, while the first words are said on it */
};

struct far_lanes {
	/* fixed after init; the caller fills in the address and `greet` */
	char *where;            /* for messages */
	char *host, *path, *command; /* one of them; owned from here on, as authority is */
	char *authority;
	struct far_tls *tls;    /* owned; NULL: in clear text */
	char *tls_name;         /* whom the server's certificate must name; owned */
	char *token_file;       /* its token goes with each call; read for each connection; owned, NULL: none */
	int port;
	bool once;              /* only the connection that was adopted */
	bool single;            /* one connection for both lanes, made anew when it is lost */
	unsigned n[FAR_LANES];
	int cancel;             /* eventfd, readable once stopped */
	uint64_t quiet, patience; /* signs of life, see far_channel_keep_alive() */
	_Atomic bool near;        /* told by the caller: calls take no time to speak of, nor does a dial */
	/* The first words on a new connection, said by whoever dialled, before anybody else may use it. 0 or -errno: the
	 * connection is closed and the dial has failed. */
	int (*greet)(void *opaque, struct far_channel *channel, uint64_t deadline, struct far_error *err);
	void *opaque;

	struct far_mutex lock;
	struct far_cond cond;
	struct far_lanes_slot slots[FAR_LANES][FAR_LANES_MAX];
	bool stopped;
	struct far_channel *dead[2 * FAR_LANES * FAR_LANES_MAX]; /* taken out of their slots, to be put without the lock */
	size_t dead_n;
	/* after failed dials */
	bool failing;
	unsigned dialling;      /* how many are */
	uint64_t round;         /* counts failed dials */
	uint64_t pause, next;   /* the next dial not before */
	uint64_t rng;
	int error;              /* of the last one, and its sentence */
	struct far_error text;
	/* counters */
	uint64_t connects, reconnects, lost;
};

int far_lanes_init(struct far_lanes *l, const char *where, unsigned demand, unsigned bulk); /* 0 or -errno */
/* No call is on any of them. */
void far_lanes_fini(struct far_lanes *l);
/* Use this one channel for both lanes, and no other; takes the reference over. */
void far_lanes_adopt(struct far_lanes *l, struct far_channel *channel);
/* A channel to call on, with a reference; dials if need be. 0 or -errno; err as far_conn_connect() or greet sets it. */
int far_lanes_pick(struct far_lanes *l, int lane, uint64_t deadline, struct far_channel **out, struct far_error *err);
/* Every connection ends, its calls get err; the next pick dials anew. Not with an adopted one. */
void far_lanes_reset(struct far_lanes *l, int err);
/* Connections that are up, with a reference each; at most max. An adopted one once. */
size_t far_lanes_up(struct far_lanes *l, struct far_channel **out, size_t max);
/* How many connections were made, how many of them in place of a lost one, and how many were lost. */
void far_lanes_count(struct far_lanes *l, uint64_t *connects, uint64_t *reconnects, uint64_t *lost);
/* Pending and later calls get -ESHUTDOWN. */
void far_lanes_stop(struct far_lanes *l);

#endif
