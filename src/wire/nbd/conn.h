/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* One connection of the NBD server: what conn.c (receiving, requests) and send.c (sending, jobs) know of each other. */
#ifndef FAR_NBD_CONN_H
#define FAR_NBD_CONN_H

#include "wire/nbd/service.h"

#include "base/thread.h"
#include "wire/loans.h"

#include <stdatomic.h>

#define FAR_NBD_OUT ((size_t)256 << 10)
#define FAR_NBD_SEGS 256
#define FAR_NBD_SMALL FAR_MIB              /* so much a connection may hold whatever the others do */

/* A request that would have waited: see conn.c. */
struct far_nbd_job {
	struct far_nbd_job *next;
	struct far_nbd_conn *conn;
	struct far_nbd_request q;
	uint8_t *buf;    /* of the pool: data of a read or write */
	size_t cap;
	uint8_t *status; /* a whole reply, malloc()ed */
	size_t status_n;
	size_t body_n;   /* bytes of buf to be sent */
	size_t head_n;
	uint8_t head[FAR_NBD_FAIL_MAX];
};

/* A part of the batch. */
struct far_nbd_seg {
	const void *p;
	size_t n;
	bool points;          /* p is in the store: its bytes from `off` on */
	uint64_t off;
	struct far_loan loan; /* p is on loan */
	void *buf;            /* p is in this buffer of the pool */
	size_t cap;
};

struct far_nbd_conn {
	/* fixed */
	struct far_server_env *env;
	struct far_conn conn;
	void (*ended)(void *opaque);
	void *opaque;
	uint64_t born;
	/* the seat's */
	struct far_nbd_hello hello;
	struct far_nbd_peer peer;
	bool serving;
	uint8_t *in, *out;
	size_t in_at, in_n, out_n;
	struct far_nbd_seg seg[FAR_NBD_SEGS];
	unsigned segs;
	size_t beside;           /* bytes of the batch that are not in `out` */
	struct far_nbd_job *filling; /* a write whose bytes are still coming in */
	size_t filled;
	bool streaming;          /* a write that goes to memory piece by piece as it comes */
	struct far_nbd_request stream;
	uint64_t streamed;
	int stream_err;
	char *place;             /* its bytes are read from the socket to where they belong */
	size_t room;             /* of `in`, to be read into: after a long write so little that the next one's bytes stay out */
	uint64_t skip;           /* bytes of a refused request still to come; then it is answered */
	struct far_nbd_request refused;
	int refused_err;
	const char *refused_why;
	struct far_spin spin;
	unsigned crowded, crowd; /* so many times not to spin; how many it was at first */
	unsigned came;           /* requests since the last read */
	unsigned trial, calm;    /* so many reads until the next stage; how long the quiet one is */
	uint64_t nap;            /* how long a sleep is */
	unsigned few;            /* sleeps in a row that brought too little */
	unsigned stage;          /* of conn_judge(): nothing, this way is measured, the other one */
	uint64_t tried, tried_at, rate; /* requests in this stage; when it began; what this way brought in a second */
	bool lingers, lingered;  /* sleep before a read; the last one was slept before */
	uint64_t dry;            /* since when nothing comes; 0: something came last */
	uint64_t moved;          /* when something came last */
	/* atomic */
	_Atomic unsigned away;   /* jobs that are not yet sent; only the seat adds to it */
	_Atomic bool dead;

	struct far_mutex lock;
	struct far_cond changed; /* sending, away, held, dead */
	bool sending FAR_GUARDED_BY(lock);
	struct far_nbd_job *queue FAR_GUARDED_BY(lock), **queue_end FAR_GUARDED_BY(lock);
	uint64_t held FAR_GUARDED_BY(lock);
};

/* A job with room for n bytes of data, counted in `held`; waits until others leave room, so the batch must have been sent.
 * NULL: no memory. */
struct far_nbd_job *far_nbd_job_new(struct far_nbd_conn *c, const struct far_nbd_request *q, size_t n);
void far_nbd_job_drop(struct far_nbd_job *j);
/* A job is done: send its answer, or leave it to who is sending. Nothing may be touched afterwards but by the crew. */
void far_nbd_job_send(struct far_nbd_job *j);

/* All of it, waiting for room. iov is changed. 0 or -errno. */
int far_nbd_write(struct far_nbd_conn *c, struct iovec *iov, int n);
/* The seat's: send its batch. False: the connection is dead. */
bool far_nbd_flush(struct far_nbd_conn *c);
/* Room for n bytes in the batch's buffer, and for one part beside it. */
uint8_t *far_nbd_out(struct far_nbd_conn *c, size_t n);
/* n bytes were put where far_nbd_out() said. */
void far_nbd_put(struct far_nbd_conn *c, size_t n);

#endif
