/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What pager.c (what happens to a fault, to an event) and receivers.c (who receives them, for which maps) share. */
#ifndef FAR_PAGER_INT_H
#define FAR_PAGER_INT_H

#include "base/crew.h"
#include "base/thread.h"
#include "frontend/pager.h"

#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

#define PAGER_SLOTS 256            /* blocked faults that status can name */
#define PAGER_WATCH_MS 50          /* between looks whether one is past its deadline */
#define PAGER_PAGE ((uint64_t)4096)

struct pager_child {
	struct pager_child *next;
	int fd;
};

struct far_receivers {
	/* fixed after open */
	int uffd, stop_fd, child_fd; /* eventfds: one is written once and never read, the other when there is a child */
	bool ours, has_pidfd;
	struct far_crew *crew;
	void (*ended)(void *opaque);
	void *opaque;
	unsigned seats;
	struct pager_seat {
		struct far_receivers *v;
		bool first;
	} seat[CPU_SETSIZE];

	_Atomic bool gone;         /* the process whose memory it is */
	_Atomic unsigned n_watched; /* blocked faults with a deadline */
	_Atomic uint64_t watch_at;
	struct far_mutex lock;
	struct far_cond changed;   /* a removal is done, a member has fewer users */
	struct far_member *members FAR_GUARDED_BY(lock);
	struct pager_child *children FAR_GUARDED_BY(lock);
};

struct pager_removing {
	struct pager_removing *next;
	uint64_t off, len;
};

struct far_member {
	struct far_receivers *v;
	struct far_member_conf c;
	_Atomic bool stopped;
	_Atomic uint64_t faults;
	_Atomic uint64_t store_next; /* where the last stores that were allowed end */
	_Atomic unsigned n_removing, n_blocked;
	struct {
		_Atomic uint64_t off1, since; /* offset and one; 0: free */
		_Atomic uint64_t until;       /* not waited for any longer; FAR_NEVER: it is given up already, or never is */
	} slot[PAGER_SLOTS];
	/* under the receivers' lock */
	struct far_member *next;
	unsigned users;
	struct pager_removing *removing;
};

static inline void far_pager_ring(int fd)
{
	uint64_t one = 1;
	(void)!write(fd, &one, sizeof one); /* it only fails when it is rung already */
}

/* pager.c. Read one event of a descriptor and carry it out, on the seat or off it. False: there was none. */
bool far_pager_receive(struct far_receivers *v, int fd, struct far_seat *seat);
/* Blocked faults past their deadline raise SIGBUS; does something every PAGER_WATCH_MS at most. */
void far_pager_watch(struct far_receivers *v, struct far_seat *seat);

#endif
