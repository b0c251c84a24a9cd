/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Leader and followers. A *seat* is a place where requests are received (a CPU's turn at /dev/fuse, a connection); at
 * most one thread sits on it. The thread on the seat receives one request and carries it out. Before it would block in
 * a backend it leaves the seat, a spare takes its place and goes on receiving; nothing is handed over or copied, and
 * the spare's wake-up hides behind the network. When the thread is done it becomes a spare itself.
 */
#ifndef FAR_CREW_H
#define FAR_CREW_H

#include "base/base.h"

struct far_crew;
struct far_seat;

/* At most max_threads (at least 2) threads in all, sitting ones included; spares beyond a few end after a second
 * idle. */
int far_crew_open(struct far_crew **out, const char *name, unsigned max_threads);
/* Ends when every seat has ended: the caller first makes the seats' run functions return false (by unmounting,
 * shutting a socket down ...). Waits for parked work. */
void far_crew_close(struct far_crew *c);

/* Add a seat. A thread calls run(opaque, seat) again and again while it returns true and the thread still sits; after
 * false the seat ends and ended(opaque), if not NULL, is called once, after the last run() of any thread that had left
 * the seat and all work parked from it has returned. cpu >= 0: whoever sits is pinned to that CPU. -EAGAIN: there
 * would be no thread left that does not sit. */
int far_crew_seat(struct far_crew *c, int cpu, bool (*run)(void *opaque, struct far_seat *seat),
		  void (*ended)(void *opaque), void *opaque);

/* From inside run(): give the seat to a spare because this thread is about to block. True: done, or this thread has
 * left already; run() may block now, and its return value no longer counts. False: all threads are busy: do not block,
 * park the request instead. */
bool far_crew_leave(struct far_seat *seat);

/* From inside run() after far_crew_leave() gave false: fn(arg) runs on the next thread that is free. 0 or -ENOMEM. */
int far_crew_park(struct far_seat *seat, void (*fn)(void *arg), void *arg);

#endif
