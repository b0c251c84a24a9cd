/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Connections. A connection carries bytes both ways without blocking; who waits does so in wait(), with a deadline.
 * Each kind is a table of operations: sockets (conn.c), two descriptors or a child process (pipe.c), functions of a user
 * (given.c), and TLS over any of them (tls.h).
 */
#ifndef FAR_NET_H
#define FAR_NET_H

#include "base/clock.h"

#include <sys/types.h>
#include <sys/uio.h>

struct far_conn;

/* Who is at the other end, as far as that was proved: names of its certificate (DNS, mail and URI names, common name), or
 * of the key that it shares with us. */
struct far_peer {
	char **names;
	size_t n;
};
void far_peer_fini(struct far_peer *p);

struct far_conn_ops {
	/* Bytes moved (> 0), 0 at the peer's end (readv only), -EAGAIN, or another -errno. One thread may read while
	 * another writes. After a short count or -EAGAIN the next writev() begins with the bytes that are left. */
	ssize_t (*readv)(struct far_conn *c, const struct iovec *iov, int n);
	ssize_t (*writev)(struct far_conn *c, const struct iovec *iov, int n);
	/* Until it can be read (if `in`) or written (if `out`), or has ended. 0, -ETIMEDOUT at `until`, -errno. */
	int (*wait)(struct far_conn *c, bool in, bool out, uint64_t until);
	/* Bytes written that the peer's system has not acknowledged yet; 0 where that cannot be told. */
	uint64_t (*unacked)(struct far_conn *c);
	/* Both directions, now: every wait() ends, reads give the end, writes fail. Any thread. */
	void (*shutdown)(struct far_conn *c);
	void (*close)(struct far_conn *c);
	/* Optional. Who the peer is, once something was read: 0 or -ENOMEM; *p was empty. */
	int (*peer)(struct far_conn *c, struct far_peer *p);
	/* Optional. Why it failed, as one sentence; "" where there is nothing to say but the error's own name. */
	void (*why)(struct far_conn *c, char *buf, size_t n);
};

enum far_conn_pacing { FAR_CONN_NEW, FAR_CONN_EASED, FAR_CONN_OWN, FAR_CONN_BRISK }; /* conn.c's */

struct far_conn {
	const struct far_conn_ops *ops; /* NULL: not open */
	enum far_conn_pacing pacing;
	int fd;      /* of a socket; -1: it has none, or none that others may use */
	void *state; /* of kinds that are more than a socket */
};

/*
 * Whether to spin before sleeping. Waking a sleeper costs 5 to 50 us at each end, so in a brisk exchange both ends do
 * better to spin through a short wait. The wait before tells: one that was slept through at both ends may have taken
 * three times as long as it will when both spin. But who spins may hold the very CPU that the peer needs, and a yield does
 * not give it away where each of them is in a group of its own (a service, a session): waits that outlast a spin raise
 * doubts, and with many doubts only one wait in FAR_SPIN_TRIAL is spun through.
 */
#define FAR_SPIN (50 * FAR_USEC)
#define FAR_SPIN_TRIAL 16
#define FAR_SPIN_DOUBTS 8
struct far_spin {
	uint64_t last;          /* how long the wait before took */
	unsigned doubts, waits; /* waits: since doubts became many */
};
static inline bool far_spin_wanted(const struct far_spin *s)
{
	return s->last <= 3 * FAR_SPIN && (s->doubts < FAR_SPIN_DOUBTS || s->waits % FAR_SPIN_TRIAL == 0);
}
static inline void far_spin_learn(struct far_spin *s, uint64_t waited)
{
	bool tried = far_spin_wanted(s);

	if (tried && waited > FAR_SPIN)
		s->doubts = s->doubts < FAR_SPIN_DOUBTS ? s->doubts + 2 : s->doubts;
	else if (tried)
		s->doubts -= s->doubts > 0;
	s->waits = s->doubts < FAR_SPIN_DOUBTS ? 0 : s->waits + 1;
	s->last = waited;
}

/* Where to connect or to listen. */
struct far_net_addr {
	const char *host; /* TCP */
	int port;
	const char *path; /* of a unix socket; NULL: TCP */
	const char *command; /* connect only: run it and speak to its standard input and output; NULL: not so */
};

/* Take over a connected stream socket: non-blocking, no delay, keep-alive, a limit for unanswered bytes. -ENOTSOCK. */
int far_conn_socket(struct far_conn *c, int fd);
/* Connect. Ends with -ETIMEDOUT at `until`, with -ESHUTDOWN as soon as `cancel` (a descriptor, -1: none) can be read.
 * The name is looked up by the system's resolver, which keeps no deadline. */
int far_conn_connect(struct far_conn *c, const struct far_net_addr *a, uint64_t until, int cancel,
		     struct far_error *err);
/* What goes over it now and then is waited for: it leaves at once, whatever far_conn_sent() would make of it. A control that
 * paces (bbr) would spread 64 KiB over half a round trip, and every ten seconds over many, because so little tells it nothing
 * of the link. */
void far_conn_brisk(struct far_conn *c);
/* Called now and then by who sends much, with the bytes so far. Who asks for bulk paces it by the wait that it causes; a
 * control that paces too leaves part of the link unused, and within a host costs a timer for every few segments. So there
 * is none at first; where the path loses packets and the system's own choice is bbr, it gets that back. */
void far_conn_sent(struct far_conn *c, uint64_t bytes);
/* Take over two descriptors, of pipes, sockets or a terminal: read from one, write to the other. */
int far_conn_pair(struct far_conn *c, int in, int out);
/* Run a command by the shell and speak to its standard input and output. It lives as long as the connection. */
int far_conn_command(struct far_conn *c, const char *command, struct far_error *err);
/* Use a user's connection; -EINVAL: a function is missing. far_conn_given_back(): forget it, `self` stays the user's. */
int far_conn_given(struct far_conn *c, const struct far_stream_ops *ops, void *self);
void far_conn_given_back(struct far_conn *c);
void far_conn_close(struct far_conn *c); /* what is not open is left alone */
/* As the operations say; nothing where the kind has none. */
int far_conn_peer(struct far_conn *c, struct far_peer *p);
void far_conn_why(struct far_conn *c, char *buf, size_t n);
/* Whether what is said on it stays within this host: a unix socket, loopback. */
bool far_conn_is_local(const struct far_conn *c);

/* A listening socket in *fd; a.port 0 takes a free one, *port tells it. Addresses beyond loopback are refused with
 * -EPERM unless `insecure`. A unix socket that nobody answers on is replaced. */
int far_net_listen(const struct far_net_addr *a, bool insecure, int *fd, int *port, struct far_error *err);
/* A socket that somebody else made listen: 0 if it does, as a stream, and may. *name, to be freed: its path or HOST:PORT. */
int far_net_adopt(int fd, bool insecure, char **name, struct far_error *err);
/* The next connection; -EAGAIN when there is none, or another -errno. Non-blocking, close-on-exec. */
int far_net_accept(int fd, int *out);
/* Wait until fd can be read or cancel can. 0: fd; -ESHUTDOWN: cancel; -ETIMEDOUT. */
int far_net_wait_readable(int fd, int cancel, uint64_t until);

#endif
