/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A TCP proxy that knows HTTP/2's frames and does one bad thing to one of them. */
#ifndef FAR_TEST_PROXY_H
#define FAR_TEST_PROXY_H

#include "base/clock.h"
#include "base/thread.h"

#define PROXY_CONNS 64

enum proxy_fault {
	PROXY_NONE,
	PROXY_CUT,   /* end the connection before the message */
	PROXY_TEAR,  /* ... in the middle of it */
	PROXY_DELAY, /* let it wait */
	PROXY_FLIP,  /* one bit of it is the other one */
	PROXY_MUTE,  /* from it on the connection is open but nothing gets through */
	PROXY_HOLD,  /* it and what follows waits until proxy_release(); the client sees silence */
	PROXY_FAULTS,
};
extern const char *const proxy_names[PROXY_FAULTS];

struct proxy_pipe {
	uint8_t *buf; /* read, not yet let through */
	size_t n, cap;
	bool greeted, ended;
};

struct proxy_conn {
	int client, server; /* -1: none */
	struct proxy_pipe up, down;
	bool mute, hold;
	uint64_t until; /* nothing moves before */
};

struct proxy {
	struct far_thread t;
	int fd, port, server_port, wake[2];
	struct far_mutex lock;
	/* under the lock: what to do, and what was seen */
	enum proxy_fault fault;
	unsigned at;       /* the message it is done to */
	unsigned second;   /* ... and once more, so many messages later; 0: not */
	uint64_t delay;
	unsigned seed;
	unsigned messages; /* HEADERS and DATA frames of both directions so far */
	bool done;         /* the fault was */
	bool release, stop, refuse;
	unsigned held;     /* connections whose held bytes are not through yet */
	unsigned dialled;
	/* of the thread */
	struct proxy_conn conn[PROXY_CONNS];
};

bool proxy_start(struct proxy *p, int server_port);
void proxy_set(struct proxy *p, enum proxy_fault fault, unsigned at, unsigned seed);
/* The same, and once more so many messages after the first. */
void proxy_set_twice(struct proxy *p, enum proxy_fault fault, unsigned at, unsigned second, unsigned seed);
/* Let what is held go, and wait until the server has taken it and has ended the connection. False: not in time. */
bool proxy_release(struct proxy *p);
/* Refuse new connections, and end those that are there; or not any more. */
void proxy_refuse(struct proxy *p, bool on);
/* The server is elsewhere now. */
void proxy_lead(struct proxy *p, int server_port);
unsigned proxy_dialled(struct proxy *p);
unsigned proxy_messages(struct proxy *p, bool *done);
void proxy_stop(struct proxy *p);

#endif
