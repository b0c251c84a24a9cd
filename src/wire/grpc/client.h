/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What the files of the client half share: dial.c opens it, hello.c greets each new connection, fence.c keeps writes of an
 * unknown fate from landing late, exchange.c makes a call, client.c decides what comes after it. */
#ifndef FAR_GRPC_CLIENT_H
#define FAR_GRPC_CLIENT_H

#include "wire/grpc/lanes.h"
#include "wire/grpc/proto.h"

#include <stdatomic.h>

enum far_client_kind {
	FAR_CLIENT_UNKNOWN, /* not reached yet */
	FAR_CLIENT_PLAIN,   /* the Backend service only */
	FAR_CLIENT_REGION,  /* farpage.v1 */
};

/* Ranges of a peer without sessions in which a write of an unknown fate may still land. */
struct far_plain_doubt;
struct far_plain {
	_Atomic unsigned n;
	/* under the client's lock */
	struct far_plain_doubt *list;
	uint64_t bytes, ids;
	bool busy;
};

/* The newest that was seen. */
struct far_hello_seen {
	uint64_t epoch, revision;
};

struct far_client {
	/* fixed after open */
	const char *where; /* for messages: the URI without its query; of the lanes */
	char *export;
	size_t export_n;
	bool writable, no_sums;
	bool plain_sized;  /* the user told the size, for a peer that cannot */
	uint64_t plain_bytes;
	uint64_t session;  /* random */
	uint64_t timeout;  /* of one call; FAR_NEVER: the thread's deadline alone */
	struct far_lanes lanes;

	/* atomic; set by hellos, read by calls that come after one */
	_Atomic unsigned kind;          /* enum far_client_kind; once known it stays */
	_Atomic bool sums, sessions;
	_Atomic uint64_t checksum_errors;
	_Atomic uint64_t shortest, shortest_at; /* time that a call took, of late; FAR_NEVER: none was made yet */
	_Atomic uint64_t warmed;        /* when much was read on demand, or is */

	struct far_mutex lock;
	struct far_cond cond;
	/* hello.c, under the lock */
	bool has_facts, has_heard, stale;
	unsigned odd;                   /* hellos in a row that the peer did not understand */
	struct far_facts facts;         /* what callers rely on */
	struct far_grpc_export heard;   /* the last that the peer said of itself */
	char identity[64];              /* seen in this client's life, as the next */
	struct far_hello_seen seen;
	uint64_t leased;                /* epoch of the lease; 0: none */
	uint64_t acked;                 /* newest generation that a hello has established */
	uint64_t instance;              /* how often the peer said that what is behind it has forgotten something */
	uint64_t changes, unflushed;    /* changes that were made; the instance of those since the last flush, 0: none */
	bool forgotten;                 /* some of an earlier instance were never flushed */
	/* fence.c, under the lock */
	uint64_t generation;
	bool broken, fencing;
	uint64_t fence_round;
	int fence_error;
	/* plain.c */
	struct far_plain plain;
};

static inline enum far_client_kind far_client_kind(struct far_client *c)
{
	return (enum far_client_kind)atomic_load_explicit(&c->kind, memory_order_acquire);
}

static inline bool far_client_flag(_Atomic bool *flag)
{
	return atomic_load_explicit(flag, memory_order_acquire);
}

/* client.c: the backend's operations, for every kind of peer. */
extern const struct far_ops far_client_ops;
/* One read or write without a second try and without plain.c's care. */
int far_client_read_back(struct far_client *c, uint64_t off, void *buf, size_t len);
int far_client_write_again(struct far_client *c, uint64_t off, const void *buf, size_t len);
uint64_t far_client_deadline(const struct far_client *c);
/* dial.c */
void far_client_free(struct far_client *c);

/*
 * hello.c. far_hello_greet() is the lanes' greeting. -ESTALE: this is not what was opened, or older than what was seen.
 */
int far_hello_greet(void *opaque, struct far_channel *channel, uint64_t deadline, struct far_error *err);
/* The peer has described itself in another reply; `seen` was so when it was asked. 0 or -ESTALE. */
int far_hello_note(struct far_client *c, const struct far_grpc_export *e, const struct far_hello_seen *seen);
struct far_hello_seen far_hello_seen(struct far_client *c);
/* A change was made by this instance. */
void far_hello_changed(struct far_client *c, uint64_t instance);
uint64_t far_hello_changes(struct far_client *c);
/* The lease was granted with this epoch; 0: given back. Fenced: a later hello has told a newer epoch, somebody else has
 * written since; a server that has started again cannot know that of us by itself. */
void far_hello_leased(struct far_client *c, uint64_t epoch);
bool far_hello_fenced(struct far_client *c);
/* A flush that was asked for after so many changes has succeeded. 0, or -EREMOTEIO: not all of them were there any more. */
int far_hello_flushed(struct far_client *c, const struct far_grpc_flushed *f, uint64_t changes);
/* A flush that was asked for after so many changes was answered with -EREMOTEIO by the peer itself. */
void far_hello_forgotten(struct far_client *c, uint64_t changes);
/* Facts of an export; `max_io` is the user's limit. */
int far_hello_facts(struct far_client *c, const struct far_grpc_export *e, uint64_t max_io, struct far_facts *f,
		    struct far_error *err);
/* As the peer told it last. */
uint64_t far_hello_instance(struct far_client *c);
/* The last heard; false: nothing yet. */
bool far_hello_origin(struct far_client *c, struct far_origin *out);

/*
 * fence.c. Before a change: wait until none of an unknown fate is left that could still land, seeing to that if need be.
 * 0 and the generation that the change carries, or why that is not so.
 */
int far_fence_enter(struct far_client *c, uint64_t deadline, uint64_t *generation);
/* The fate of a change of this generation is unknown, or the peer does not know the session. */
void far_fence_break(struct far_client *c, uint64_t generation);

/*
 * plain.c: for peers without sessions. Around each change: begin (0 or why it cannot be made now), then end with what
 * became of it: 0 acknowledged, 1 unknown, -errno it was not made.
 */
bool far_plain_sound(struct far_client *c); /* there are no such ranges now */
int far_plain_begin(struct far_client *c, uint64_t off, const void *src, uint64_t len, uint64_t deadline, bool *entered);
int far_plain_end(struct far_client *c, uint64_t off, const void *src, uint64_t len, int fate, bool entered);
/* Before a flush: what was acknowledged last in those ranges is there, or is written again. */
int far_plain_settle(struct far_client *c, uint64_t deadline);
void far_plain_free(struct far_client *c);

#endif
