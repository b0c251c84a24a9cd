/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* One call of a client, made once: its request for the service that the peer speaks, its reply, and what became of it. */
#ifndef FAR_GRPC_EXCHANGE_H
#define FAR_GRPC_EXCHANGE_H

#include "wire/grpc/client.h"

enum far_fate {
	FAR_FATE_DONE,    /* answered, also with an error of the peer's own: the caller gets it */
	FAR_FATE_AGAIN,   /* the peer cannot have seen it, or has refused it for the first time */
	FAR_FATE_GARBLED, /* a checksum did not fit, or the answer makes no sense; this connection takes no more calls */
	FAR_FATE_LOST,    /* no answer: of a change nobody knows whether and when it is carried out */
	FAR_FATE_FENCED,  /* a change that was refused: its generation is over or its session unknown */
};

/* One call of any kind. */
struct far_exchange {
	/* what */
	enum far_grpc_method m; /* of farpage.v1; the plain service's counterpart is found from it */
	uint64_t off, len;
	void *dst;
	const void *src;
	unsigned flags;
	uint64_t generation;
	const struct far_lease *lease;
	uint64_t instance, since;
	uint32_t max;
	/* the reply of all but reads */
	uint8_t *reply;
	size_t reply_cap, reply_n;
	struct far_channel *channel; /* make it on this one; NULL: on any */
	/* how it went */
	bool region, refused, careful; /* careful: it was garbled before */
	uint64_t told_by; /* the instance, 0: unknown */
	struct far_hello_seen seen; /* when it was asked, of calls whose reply describes the peer */
	enum far_fate fate;
	int result; /* set by far_exchange_many() only, as the next */
	bool made;
};

/* 0 or -errno; op->fate says what that means. */
int far_exchange(struct far_client *c, struct far_exchange *op, uint64_t deadline);

/* Several reads or writes over one connection of each lane; `ahead` of them are asked for before the answer of the first is
 * taken. Those that were made are marked and have their result; after one that failed the rest may be left. Each ends at
 * `deadline`, and at its own far_client_deadline(), at the latest. */
#define FAR_EXCHANGE_READS 9 /* eight parts, and one over the other lane */
#define FAR_WARM ((size_t)64 * FAR_KIB) /* a demand read of so much keeps its connection warm, see client.c */
void far_exchange_many(struct far_client *c, struct far_exchange *op, size_t n, size_t ahead, uint64_t deadline);

#endif
