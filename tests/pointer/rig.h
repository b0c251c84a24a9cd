/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What the tests of a pointer's life share. Each case runs in a process of its own, which maps a region of a backend that
 * can hold, fail and count calls, and may crash: a touch that must fail is made by touch(), which says how it ended. The
 * region's bytes are never zero, so that a page that reads as zeros by mistake is seen.
 */
#ifndef TEST_POINTER_RIG_H
#define TEST_POINTER_RIG_H

#include <farpage.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u
#define CHUNK 65536u
#define SIZE (CHUNK * 128u + 1234u) /* 8 MiB and a tail */
#define LONG_MS 20000               /* no test takes it; where one does, something hangs */

/* ------------------------------------------------------------------------------------------------------ cases */

struct rig_case {
	const char *name;
	void (*run)(void);
};
/* Runs each case in a child and prints TAP. argv: [--mechanism WORD] [--tracking WORD] [--local] [CASE...]. */
int rig_main(int argc, char **argv, const struct rig_case *cases, size_t n);
void rig_skip(const char *fmt, ...) __attribute__((format(printf, 1, 2), noreturn));
void rig_fail(const char *file, int line, const char *fmt, ...) __attribute__((format(printf, 3, 4), noreturn));

#define CHECK(x) ((x) ? (void)0 : rig_fail(__FILE__, __LINE__, "%s", #x))
#define SAME(a, b)                                                                                                             \
	do {                                                                                                                   \
		long long a_ = (long long)(a), b_ = (long long)(b);                                                            \
		if (a_ != b_)                                                                                                  \
			rig_fail(__FILE__, __LINE__, "%s is %lld, %s is %lld", #a, a_, #b, b_);                                \
	} while (0)

/* ----------------------------------------------------------------------------------------------------- the remote */

/* The bytes that the remote holds, and knobs. */
extern struct rig_remote {
	unsigned char *data;
	_Atomic bool hold;              /* reads wait */
	_Atomic int fail_reads, fail_writes; /* errno */
	_Atomic unsigned reads, writes, flushes, held;
} remote;
/* What byte `off` was at first. */
unsigned char rig_byte(uint64_t off);
/* The bytes at p, of offsets from `off` on, are as they were at first; true if so. */
bool rig_right(const unsigned char *p, uint64_t off, size_t len);
bool rig_same(const unsigned char *a, const unsigned char *b, size_t len);
bool rig_zero(const unsigned char *p, size_t len);
void rig_open(void); /* a new remote, rig_byte() everywhere */
struct far_backend *rig_backend(void);

/* ----------------------------------------------------------------------------------------------------------- maps */

/* Options with nothing in the background, and what the command line asked for. */
struct far_mount_opts rig_opts(void);
/* Map the remote; NULL: rig_opts(). */
struct far_mount *rig_map(const struct far_mount_opts *o);
struct far_status rig_status(struct far_mount *m);
extern bool rig_local; /* --local: over a region with a local store of its own */
/* The mapping takes stores back by itself: no region of ours is below it. */
bool rig_shares(struct far_mount *m);

/* -------------------------------------------------------------------------------------------------------- touches */

/* Read or store one byte: 0, SIGBUS or SIGSEGV; *seen gets what was read. */
int touch(const void *p, unsigned char *seen);
int store(void *p, unsigned char v);
/* A thread that touches p. */
struct toucher {
	pthread_t t;
	pid_t tid;
	const unsigned char *p;
	bool stores;
	_Atomic bool began, ended;
	int how;
	unsigned char seen;
	uint64_t took_ms;
};
void toucher_start(struct toucher *t, const void *p, bool stores);
/* Waits for it, at most LONG_MS. */
void toucher_end(struct toucher *t);
/* It is asleep inside its touch, and stays so for a while. */
void toucher_is_stuck(struct toucher *t);

uint64_t now_ms(void);
/* Wait until `x` holds; fails after LONG_MS. */
#define UNTIL(x)                                                                                                               \
	do {                                                                                                                   \
		uint64_t end_ = now_ms() + LONG_MS;                                                                            \
		while (!(x)) {                                                                                                 \
			if (now_ms() > end_)                                                                                   \
				rig_fail(__FILE__, __LINE__, "waited in vain for %s", #x);                                     \
			usleep(1000);                                                                                          \
		}                                                                                                              \
	} while (0)
/* Run fn in a fork of this process: its exit status as waitpid() tells it. */
int in_child(void (*fn)(void *), void *arg);

#endif
