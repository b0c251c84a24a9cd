/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The life of `farpage mount`, from opening to the end; see mount_loop.c. */
#ifndef FAR_MOUNT_LOOP_H
#define FAR_MOUNT_LOOP_H

#include "base/thread.h"
#include "mount/mount.h"

struct far_control;
struct json_object;

/* The program that started farpage-serve. */
struct mount_parent {
	int life_fd;       /* gets the path once it is usable; its end is ours */
	int backend_fd;    /* a backend of the program's, over gRPC; -1: open SOURCE */
	int memory_fd;     /* the program hands memory over there, to be served instead of a file; -1: a file */
	const char *hooks; /* control socket that answers hooks; NULL: none */
};

/* The verb `mount` for such a program. */
int mount_for_parent(int argc, char **argv, const struct mount_parent *parent);

struct mount_loop {
	/* fixed before mount_loop_run() */
	struct far_mnt_conf conf;
	uint64_t deadline;       /* ns that the end may wait for open handles */
	const char *source;
	const char *local;       /* where unsaved bytes stay; NULL: memory, gone with us */
	bool keeps;              /* the local store lasts, and its map: the next mount pushes what is unsaved */
	const char *run;         /* --run; NULL: none */
	int ready_fd;            /* the waiting parent of --background; -1: none */
	int life_fd;             /* closes when we are to end; -1: none */
	bool quiet;
	struct far_control *control;

	/* set once when open ended, by the loop's own thread, before the control socket starts */
	struct far_mnt *mnt;

	/* under lock: what the control socket's threads and the loop tell each other */
	struct far_mutex lock;
	struct far_cond changed;
	bool stop_asked FAR_GUARDED_BY(&lock);
	bool stop_now FAR_GUARDED_BY(&lock);
	bool ended FAR_GUARDED_BY(&lock);
	int end_code FAR_GUARDED_BY(&lock);       /* 0 or -errno of the flush */
	uint64_t unsaved FAR_GUARDED_BY(&lock);   /* bytes, after ended */
	char end_text[400] FAR_GUARDED_BY(&lock); /* what to say about them */
	int wake_fd;                              /* eventfd: look at the flags */
};

/* Open, serve, finish. Takes over conf.remote. Returns the exit code. Everything has been said. */
int mount_loop_run(struct mount_loop *l);

/* A request on the control socket (far_control_fn). */
struct json_object *mount_control_cb(void *opaque, const char *op, struct json_object *req);

#endif
