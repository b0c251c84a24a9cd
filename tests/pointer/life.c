/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What a program may do to itself while it has a region as memory: fork, move and drop mappings, lock, catch signals,
 * run another program, end, be looked at. Never zeros where bytes should be. */
#define _GNU_SOURCE
#include "rig.h"

#include <elf.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define AT(chunk) ((uint64_t)(chunk) * CHUNK)
#define LIFE_FAR ((void *)(uintptr_t)0x200000000000) /* far from where the kernel puts things by itself */

/* ---------------------------------------------------------------------------------------------------- the plain uses */

static void reads_and_stores(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	CHECK(rig_right(p + AT(3) + 5, AT(3) + 5, 100));
	CHECK(rig_right(p, 0, SIZE));
	p[AT(7) + 77] = 0;
	memset(p + AT(9) - 10, 0x5a, 20);
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[AT(7) + 77], 0);
	SAME(remote.data[AT(9) - 10], 0x5a);
	SAME(remote.data[AT(9) + 9], 0x5a);
	CHECK(rig_right(remote.data, 0, AT(7)));
	p[AT(7) + 77] = 9; /* the second write to a page that was pushed */
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[AT(7) + 77], 9);
	SAME(far_mount_close(m), 0);
}

static void close_flushes(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	p[AT(4)] = 0;
	p[SIZE - 1] = 0;
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(4)], 0);
	SAME(remote.data[SIZE - 1], 0);
	CHECK(rig_right(remote.data + AT(4) + 1, AT(4) + 1, SIZE - AT(4) - 2));
	CHECK(touch(p, NULL) == SIGSEGV);
}

/* Zeros beyond the end; who writes there is not refused, and nothing of it goes anywhere. */
static void the_tail_is_zero_and_stays_here(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	size_t end = (SIZE + PAGE - 1) & ~(size_t)(PAGE - 1);

	CHECK(rig_right(p + SIZE - 10, SIZE - 10, 10));
	CHECK(rig_zero(p + SIZE, end - SIZE));
	memset(p + SIZE - 5, 0x33, end - SIZE + 5);
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[SIZE - 5], 0x33);
	SAME(remote.data[SIZE - 6], rig_byte(SIZE - 6));
	SAME(far_mount_populate(m, SIZE, 0), 0);
	SAME(far_mount_populate(m, SIZE, 1), -EINVAL);
	SAME(far_mount_close(m), 0);
}

static void a_fixed_address(void)
{
	void *place = LIFE_FAR;
	struct far_mount_opts o = rig_opts();
	struct far_error err = { 0 };
	struct far_mount *m, *second = NULL;

	o.address = place;
	m = rig_map(&o);
	CHECK(far_addr(m) == place);
	CHECK(rig_right(place, 0, 1000));
	struct far_backend *b = rig_backend();
	SAME(far_map(b, &o, &second, &err), -EEXIST);
	CHECK(err.text[0]);
	CHECK(second == NULL);
	far_close(b);
	CHECK(rig_right(place, 0, 1000));
	SAME(far_mount_close(m), 0);
}

static void read_only_refuses_stores(void)
{
	struct far_mount_opts o = rig_opts();
	o.read_only = true;
	struct far_mount *m = rig_map(&o);
	unsigned char *p = far_addr(m);

	CHECK(rig_right(p + AT(2), AT(2), CHUNK));
	if (rig_status(m).mechanism != FAR_MECH_MOVE) { /* pages move between writable mappings only */
		CHECK(store(p + AT(2), 1) == SIGSEGV);
		CHECK(store(p + AT(5), 1) == SIGSEGV);
	}
	SAME(far_mount_discard(m, 0, CHUNK), -EROFS);
	SAME(far_mount_flush(m), 0);
	SAME(far_mount_close(m), 0);
	SAME(remote.writes, 0);
}

static void populate_discard_evict(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	SAME(far_mount_populate(m, AT(8) + 100, 3 * CHUNK), 0);
	remote.fail_reads = EIO;
	CHECK(rig_right(p + AT(8) + 100, AT(8) + 100, 3 * CHUNK));
	remote.fail_reads = 0;
	SAME(far_mount_discard(m, AT(9) + 300, CHUNK), 0); /* over an edge, not at a page */
	CHECK(rig_right(p + AT(9), AT(9), 300));
	CHECK(rig_zero(p + AT(9) + 300, CHUNK));
	CHECK(rig_right(p + AT(10) + 300, AT(10) + 300, CHUNK - 300));
	SAME(far_mount_discard(m, AT(20), 2 * CHUNK), 0); /* nobody ever touched it */
	CHECK(rig_zero(p + AT(20), 2 * CHUNK));
	CHECK(rig_right(p + AT(22), AT(22), 100));
	SAME(far_mount_flush(m), 0);
	CHECK(rig_zero(remote.data + AT(9) + 300, CHUNK));
	CHECK(rig_right(remote.data + AT(9), AT(9), 300));
	CHECK(rig_zero(remote.data + AT(20), 2 * CHUNK));
	unsigned before = remote.reads;
	SAME(far_mount_evict(m, 0, SIZE), 0);
	CHECK(rig_right(p + AT(8), AT(8), CHUNK));
	CHECK(rig_zero(p + AT(20), 2 * CHUNK));
	CHECK(rig_local || rig_status(m).mechanism == FAR_MECH_COPY || remote.reads > before);
	p[AT(30)] = 0; /* dirty: it stays */
	SAME(far_mount_evict(m, AT(30), CHUNK), 0);
	SAME(p[AT(30)], 0);
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(30)], 0);
}

/* ------------------------------------------------------------------------------------------------------------- fork */

static void fork_touch(void *arg)
{
	unsigned char *p = arg;

	CHECK(touch(p + AT(1), NULL) == SIGSEGV); /* was here */
	CHECK(touch(p + AT(40), NULL) == SIGSEGV); /* was not */
	CHECK(store(p + AT(1), 1) == SIGSEGV);
}

static void fork_gives_the_child_an_error(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	CHECK(rig_right(p + AT(1), AT(1), CHUNK));
	p[AT(2)] = 0;
	SAME(in_child(fork_touch, p), 0);
	SAME(system("true"), 0);
	CHECK(rig_right(p + AT(40), AT(40), CHUNK));
	p[AT(41)] = 0;
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(2)], 0);
	SAME(remote.data[AT(41)], 0);
}

static void inherit_touch(void *arg)
{
	unsigned char *p = arg;

	CHECK(rig_right(p + AT(1), AT(1), CHUNK)); /* was here */
	SAME(p[AT(2)], 0);                         /* was stored */
	CHECK(rig_right(p + AT(40), AT(40), CHUNK)); /* was not here */
	p[AT(1)] = 0x11;
	p[AT(42)] = 0x11;
	SAME(p[AT(1)], 0x11);
	SAME(p[AT(42)], 0x11);
	CHECK(rig_right(p + AT(42) + 1, AT(42) + 1, 100));
}

static void fork_inherits_if_asked(void)
{
	struct far_mount_opts o = rig_opts();
	o.inherit = true;
	struct far_mount *m = rig_map(&o);
	unsigned char *p = far_addr(m);

	CHECK(rig_right(p + AT(1), AT(1), CHUNK));
	p[AT(2)] = 0;
	SAME(in_child(inherit_touch, p), 0);
	SAME(in_child(inherit_touch, p), 0);
	CHECK(rig_right(p + AT(1), AT(1), CHUNK)); /* the child's stores are its own */
	CHECK(rig_right(p + AT(42), AT(42), CHUNK));
	CHECK(rig_right(p + AT(50), AT(50), CHUNK));
	p[AT(1)] = 0x22; /* ... and the parent's go on being found after a fork */
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[AT(1)], 0x22);
	SAME(remote.data[AT(42)], rig_byte(AT(42)));
	p[AT(1) + 1] = 0x23;
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(1) + 1], 0x23);
}

static void spawn_and_exec_of_others(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	char *args[] = { (char *)"true", NULL };
	int status;
	pid_t pid;

	p[AT(1)] = 0;
	SAME(posix_spawnp(&pid, "true", NULL, NULL, args, NULL), 0);
	SAME(waitpid(pid, &status, 0), pid);
	SAME(status, 0);
	pid = vfork();
	if (pid == 0) {
		execvp("true", args);
		_exit(127);
	}
	SAME(waitpid(pid, &status, 0), pid);
	SAME(status, 0);
	CHECK(rig_right(p + AT(3), AT(3), CHUNK));
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(1)], 0);
}

/* --------------------------------------------------------------------------------------------------------- mappings */

static void mremap_is_followed(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	size_t whole = (SIZE + PAGE - 1) & ~(size_t)(PAGE - 1);
	unsigned char *place = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(rig_right(p + AT(1), AT(1), CHUNK));
	p[AT(2)] = 0;
	p[AT(64) + 1] = 0;
	/* A part in the middle, not at a chunk's edge. */
	unsigned char *q = mremap(p + AT(64) - PAGE, 4 * CHUNK, 4 * CHUNK, MREMAP_MAYMOVE | MREMAP_FIXED, place + AT(64) - PAGE);
	CHECK(q == place + AT(64) - PAGE);
	CHECK(touch(p + AT(65), NULL) == SIGSEGV);
	SAME(place[AT(64) + 1], 0);
	CHECK(rig_right(place + AT(66), AT(66), CHUNK)); /* was not here yet */
	CHECK(rig_right(p + AT(62), AT(62), 2 * CHUNK - PAGE)); /* the rest of the chunk that was cut */
	place[AT(66) + 3] = 0x44;
	/* All that remained. */
	CHECK(mremap(p, AT(64) - PAGE, AT(64) - PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
	CHECK(touch(p, NULL) == SIGSEGV);
	SAME(place[AT(2)], 0);
	CHECK(rig_right(place + AT(3), AT(3), CHUNK));
	place[AT(3)] = 0x45;
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[AT(2)], 0);
	SAME(remote.data[AT(64) + 1], 0);
	SAME(remote.data[AT(66) + 3], 0x44);
	SAME(remote.data[AT(3)], 0x45);
	CHECK(rig_right(remote.data + AT(4), AT(4), AT(60)));
	place[AT(3) + 1] = 0x46;
	CHECK(rig_right(p + AT(70), AT(70), CHUNK)); /* never moved */
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(3) + 1], 0x46);
}

static void munmap_of_a_part(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	CHECK(rig_right(p + AT(10), AT(10), 4 * CHUNK));
	p[AT(11)] = 0;
	p[AT(10) + 1] = 0x10;
	SAME(far_mount_flush(m), 0);
	p[AT(12)] = 0x12; /* not flushed: what is unmapped is given up */
	p[AT(13) + 3 * PAGE] = 0x13; /* the same chunk as the end of the hole, and stays */
	SAME(munmap(p + AT(10) + PAGE, 3 * CHUNK), 0);
	CHECK(touch(p + AT(11), NULL) == SIGSEGV);
	SAME(p[AT(10) + 1], 0x10);
	SAME(p[AT(13) + 3 * PAGE], 0x13);
	CHECK(rig_right(p + AT(13) + 2 * PAGE, AT(13) + 2 * PAGE, PAGE));
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[AT(11)], 0);
	SAME(remote.data[AT(13) + 3 * PAGE], 0x13);
	CHECK(remote.data[AT(12)] == 0x12 || remote.data[AT(12)] == rig_byte(AT(12)));
	CHECK(rig_right(remote.data + AT(12) + 1, AT(12) + 1, CHUNK)); /* no zeros for what is not there to be read */
	CHECK(rig_right(p + AT(100), AT(100), CHUNK));
	/* Something else may live in the hole now. */
	unsigned char *q = mmap(p + AT(11), PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	CHECK(q == p + AT(11));
	q[5] = 7;
	SAME(far_mount_populate(m, AT(11), CHUNK) == 0 || errno, 1);
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(11) + 5], rig_byte(AT(11) + 5));
	SAME(q[5], 7); /* close unmaps what is ours alone */
}

/* Which advice drops pages here: shared memory is emptied by MADV_REMOVE alone, private memory by the other two. */
static void dropped(int advice, const char *word)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	CHECK(rig_right(p + AT(10), AT(10), 6 * CHUNK));
	p[AT(12) + 9] = 0x12;
	SAME(far_mount_flush(m), 0);
	p[AT(13) + 9] = 0x13;
	p[AT(15) + 2 * PAGE] = 0x15;
	if (madvise(p + AT(11) + PAGE, 4 * CHUNK, advice) < 0) {
		SAME(errno, EINVAL);
		SAME(advice, advice == MADV_DONTNEED ? -1 : advice); /* that one works everywhere */
		printf("# %s is not for this kind of memory\n", word);
	} else {
		CHECK(rig_right(p + AT(11), AT(11), PAGE));
		if (advice != MADV_FREE)
			CHECK(rig_zero(p + AT(11) + PAGE, 4 * CHUNK));
		SAME(p[AT(15) + 2 * PAGE], 0x15);
		CHECK(rig_right(p + AT(15) + PAGE, AT(15) + PAGE, PAGE));
		CHECK(madvise(p + AT(40) + PAGE, CHUNK, advice) == 0); /* nobody ever touched it */
		if (advice != MADV_FREE)
			CHECK(rig_zero(p + AT(40) + PAGE, CHUNK));
		CHECK(rig_right(p + AT(40), AT(40), PAGE));
		CHECK(rig_right(p + AT(41) + PAGE, AT(41) + PAGE, PAGE));
		p[AT(12) + 10] = 0x17; /* stored after it was dropped */
		SAME(far_mount_flush(m), 0);
		SAME(remote.data[AT(12) + 10], 0x17);
		SAME(remote.data[AT(15) + 2 * PAGE], 0x15);
		remote.data[AT(12) + 10] = p[AT(12) + 10] = 0;
		SAME(far_mount_flush(m), 0);
		CHECK(rig_same(p, remote.data, SIZE));
		if (advice != MADV_FREE)
			CHECK(rig_zero(remote.data + AT(11) + PAGE, 4 * CHUNK));
	}
	SAME(far_mount_close(m), 0);
}

static void madvise_dontneed(void)
{
	dropped(MADV_DONTNEED, "MADV_DONTNEED");
}

static void madvise_free(void)
{
	dropped(MADV_FREE, "MADV_FREE");
}

static void madvise_remove(void)
{
	dropped(MADV_REMOVE, "MADV_REMOVE");
}

static void madvise_read_only_forgets(void)
{
	struct far_mount_opts o = rig_opts();
	o.read_only = true;
	struct far_mount *m = rig_map(&o);
	unsigned char *p = far_addr(m);

	CHECK(rig_right(p, 0, SIZE));
	for (int k = 0; k < 3; k++) {
		SAME(madvise(p + AT(10) + PAGE, 4 * CHUNK, MADV_DONTNEED), 0);
		CHECK(rig_right(p, 0, SIZE));
		madvise(p + AT(20) + PAGE, 4 * CHUNK, MADV_FREE);
		CHECK(rig_right(p, 0, SIZE));
	}
	SAME(far_mount_close(m), 0);
}

static void other_advice_changes_nothing(void)
{
	static const int advice[] = { MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE,
				      MADV_COLD, MADV_PAGEOUT, MADV_DONTDUMP, MADV_DODUMP, MADV_DONTFORK };
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	CHECK(rig_right(p, 0, AT(20)));
	p[AT(3)] = 0;
	for (size_t k = 0; k < sizeof advice / sizeof advice[0]; k++) {
		madvise(p, AT(40), advice[k]);
		SAME(p[AT(3)], 0);
		CHECK(rig_right(p + AT(4), AT(4), AT(18)));
		p[AT(4) + k] = rig_byte(AT(4) + k);
	}
	if (rig_status(m).kernel_faults) {
		SAME(madvise(p + AT(50), 8 * CHUNK, MADV_POPULATE_READ), 0);
		remote.fail_reads = EIO;
		CHECK(rig_right(p + AT(50), AT(50), 8 * CHUNK));
		remote.fail_reads = 0;
	}
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(3)], 0);
}

static void mprotect_by_the_program(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	p[AT(1)] = 0;
	SAME(mprotect(p, AT(8), PROT_READ), 0);
	CHECK(store(p + AT(1), 1) == SIGSEGV);
	CHECK(store(p + AT(2), 1) == SIGSEGV);
	CHECK(rig_right(p + AT(3), AT(3), CHUNK));
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[AT(1)], 0);
	SAME(mprotect(p, AT(8), PROT_NONE), 0);
	CHECK(touch(p + AT(3), NULL) == SIGSEGV);
	SAME(mprotect(p, AT(8), PROT_READ | PROT_WRITE), 0);
	p[AT(3)] = 0x33;
	CHECK(rig_right(p + AT(4), AT(4), CHUNK));
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(3)], 0x33);
}

/* Pages in the middle of a chunk that are other mappings to the kernel: a chunk is filled in one step, and that must not fail
 * in a way that leaves zeros. */
static void chunks_of_several_mappings(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	struct rlimit l = { RLIM_INFINITY, RLIM_INFINITY };

	setrlimit(RLIMIT_MEMLOCK, &l);
	SAME(mprotect(p + AT(10) + 3 * PAGE, PAGE, PROT_READ), 0);
	SAME(madvise(p + AT(12) + 5 * PAGE, 2 * PAGE, MADV_DONTDUMP), 0);
	SAME(mlock2(p + AT(14) + 5 * PAGE, 2 * PAGE, MLOCK_ONFAULT), 0);
	SAME(mprotect(p + AT(16) + 3 * PAGE, PAGE, PROT_NONE), 0);
	p[AT(10)] = rig_byte(AT(10));
	for (unsigned c = 9; c < 16; c++)
		CHECK(rig_right(p + AT(c), AT(c), CHUNK));
	CHECK(rig_right(p + AT(16), AT(16), 3 * PAGE));
	SAME(mprotect(p + AT(16) + 3 * PAGE, PAGE, PROT_READ | PROT_WRITE), 0);
	CHECK(rig_right(p + AT(16), AT(16), CHUNK));
	for (unsigned c = 11; c < 17; c++)
		memset(p + AT(c) + 4 * PAGE, 0x21, 4 * PAGE);
	SAME(far_mount_flush(m), 0);
	for (unsigned c = 11; c < 17; c++)
		memset(p + AT(c) + 4 * PAGE, 0x22, 4 * PAGE); /* after they were protected again */
	SAME(far_mount_flush(m), 0);
	CHECK(rig_same(p, remote.data, SIZE));
	SAME(far_mount_discard(m, AT(12) + 100, 3 * CHUNK), 0);
	SAME(far_mount_flush(m), 0);
	CHECK(rig_zero(p + AT(12) + 100, 3 * CHUNK));
	CHECK(rig_same(p, remote.data, SIZE));
	SAME(far_mount_close(m), 0);
}

/* Past the sanitizers, which make nothing of them. */
static int life_mlock(const void *p, size_t len)
{
	return (int)syscall(SYS_mlock, p, len);
}

static int life_munlock(const void *p, size_t len)
{
	return (int)syscall(SYS_munlock, p, len);
}

static void mlock_brings_and_keeps(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	struct rlimit l = { RLIM_INFINITY, RLIM_INFINITY };

	setrlimit(RLIMIT_MEMLOCK, &l);
	if (!rig_status(m).kernel_faults)
		SAME(far_mount_populate(m, AT(5), 4 * CHUNK), 0);
	if (life_mlock(p + AT(5), 4 * CHUNK) < 0)
		rig_skip("mlock: %s", strerror(errno));
	remote.fail_reads = EIO; /* all of it is here, and stays */
	CHECK(rig_right(p + AT(5), AT(5), 4 * CHUNK));
	SAME(far_mount_evict(m, 0, SIZE), 0);
	CHECK(rig_right(p + AT(5), AT(5), 4 * CHUNK));
	remote.fail_reads = 0;
	p[AT(5)] = 0;
	SAME(far_mount_flush(m), 0);
	SAME(life_munlock(p, AT(20)), 0);
	SAME(far_mount_evict(m, 0, SIZE), 0);
	SAME(p[AT(5)], 0);
	CHECK(rig_right(p + AT(6), AT(6), 3 * CHUNK));
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(5)], 0);
}

/* --------------------------------------------------------------------------------------------------- signals, watchers */

static _Atomic unsigned signals_seen;

static void on_usr1(int sig)
{
	signals_seen++;
}

static void signals_reach_a_blocked_thread(void)
{
	struct sigaction sa = { .sa_handler = on_usr1 };
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	struct toucher t;

	sigaction(SIGUSR1, &sa, NULL);
	remote.hold = true;
	toucher_start(&t, p + AT(9) + 5, false);
	UNTIL(remote.held);
	toucher_is_stuck(&t);
	for (unsigned k = 1; k <= 3; k++) {
		pthread_kill(t.t, SIGUSR1);
		UNTIL(signals_seen == k);
	}
	toucher_is_stuck(&t);
	remote.hold = false;
	toucher_end(&t);
	SAME(t.how, 0);
	SAME(t.seen, rig_byte(AT(9) + 5));
	SAME(far_mount_close(m), 0);
}

/* A debugger: reads what is here, gets an error for what is not, and the program goes on as if nothing had been. */
static void a_debugger_sees_no_zeros(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	int go[2], done[2], status;
	pid_t self = getpid(), pid;
	char path[64], c = 0;

	CHECK(rig_right(p + AT(1), AT(1), PAGE));
	CHECK(pipe(go) == 0 && pipe(done) == 0);
	pid = fork();
	if (pid == 0) { /* it watches its parent */
		unsigned char here[100], absent[100];
		alarm(20);
		if (ptrace(PTRACE_SEIZE, self, NULL, NULL) < 0 || ptrace(PTRACE_INTERRUPT, self, NULL, NULL) < 0)
			_exit(77);
		waitpid(self, &status, __WALL);
		snprintf(path, sizeof path, "/proc/%d/mem", (int)self);
		int fd = open(path, O_RDONLY);
		bool ok = pread(fd, here, sizeof here, (off_t)(uintptr_t)(p + AT(1))) == sizeof here && rig_right(here, AT(1), 100);
		ssize_t n = pread(fd, absent, sizeof absent, (off_t)(uintptr_t)(p + AT(60)));
		bool right = n < 0 || (n == sizeof absent && rig_right(absent, AT(60), 100));
		errno = 0;
		long word = ptrace(PTRACE_PEEKDATA, self, p + AT(61), NULL);
		right &= errno != 0 || rig_right((unsigned char *)&word, AT(61), sizeof word);
		ptrace(PTRACE_DETACH, self, NULL, NULL);
		_exit(!ok ? 1 : !right ? 2 : 0);
	}
	SAME(waitpid(pid, &status, 0), pid);
	if (status == 77 << 8)
		rig_skip("this process may not be traced here");
	SAME(status, 0);
	(void)go, (void)done, (void)c;
	CHECK(rig_right(p + AT(60), AT(60), 2 * CHUNK));
	SAME(far_mount_close(m), 0);
}

static void gdb_can_be_attached(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	char cmd[400], line[400];
	bool here = false, zeros = false;

	if (system("command -v gdb > /dev/null") != 0)
		rig_skip("gdb is not installed");
	CHECK(rig_right(p + AT(1), AT(1), PAGE));
	snprintf(cmd, sizeof cmd,
		 "timeout -k 1 30 gdb -nx -batch -p %d -ex 'printf \"HERE %%d\\n\", *(unsigned char *)%p' "
		 "-ex 'printf \"ABSENT %%d\\n\", *(unsigned char *)%p' 2>&1 < /dev/null",
		 (int)getpid(), (void *)(p + AT(1)), (void *)(p + AT(60)));
	FILE *f = popen(cmd, "r");
	CHECK(f != NULL);
	while (fgets(line, sizeof line, f)) {
		int v;
		if (sscanf(line, "HERE %d", &v) == 1)
			here = v == rig_byte(AT(1));
		if (sscanf(line, "ABSENT %d", &v) == 1)
			zeros = v != rig_byte(AT(60));
		if (strstr(line, "ptrace: Operation not permitted"))
			rig_skip("this process may not be traced here");
	}
	pclose(f); /* its exit status is that of the command that was to fail */
	CHECK(here);
	CHECK(!zeros);
	CHECK(rig_right(p + AT(60), AT(60), CHUNK));
	SAME(far_mount_close(m), 0);
}

static void core_crash(void *arg)
{
	struct rlimit l = { RLIM_INFINITY, RLIM_INFINITY };

	setrlimit(RLIMIT_CORE, &l);
	CHECK(chdir(arg) == 0);
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	FILE *f = fopen("addr", "w");
	CHECK(f && fprintf(f, "%p", (void *)p) > 0 && fclose(f) == 0);
	/* All of each chunk is read: what was not asked for comes after what was, maybe after the end. */
	CHECK(rig_right(p + AT(3), AT(3), CHUNK) && rig_right(p + AT(10), AT(10), 2 * CHUNK));
	memcpy(p + AT(3), "this page is here, mark 8d1c", 29);
	signal(SIGABRT, SIG_DFL);
	abort();
}

/* How many bytes a core file in dir has of the region mapped at addr, not counting holes. */
static uint64_t core_holds(const char *dir, uint64_t addr)
{
	char pattern[64];
	glob_t found;
	Elf64_Ehdr head;
	Elf64_Phdr seg;
	uint64_t sum = 0;

	snprintf(pattern, sizeof pattern, "%s/core*", dir);
	CHECK(glob(pattern, 0, NULL, &found) == 0);
	int fd = open(found.gl_pathv[0], O_RDONLY);
	globfree(&found);
	CHECK(fd >= 0 && pread(fd, &head, sizeof head, 0) == sizeof head);
	for (unsigned i = 0; i < head.e_phnum; i++) {
		CHECK(pread(fd, &seg, sizeof seg, (off_t)(head.e_phoff + i * sizeof seg)) == sizeof seg);
		if (seg.p_type != PT_LOAD || seg.p_vaddr >= addr + SIZE || seg.p_vaddr + seg.p_memsz <= addr)
			continue;
		off_t end = (off_t)(seg.p_offset + seg.p_filesz);
		for (off_t at = (off_t)seg.p_offset; (at = lseek(fd, at, SEEK_DATA)) >= 0 && at < end;) {
			off_t hole = lseek(fd, at, SEEK_HOLE);
			sum += (uint64_t)((hole < end ? hole : end) - at);
			at = hole;
		}
	}
	close(fd);
	return sum;
}

/* A core file ends (nobody answers the faults of a dying process), has what was here, and no room for what was not. */
static void a_core_dump_leaves_absent_pages_out(void)
{
	char dir[] = "/tmp/farpage-core-XXXXXX", cmd[200], pattern[128] = "";
	FILE *f = fopen("/proc/sys/kernel/core_pattern", "r");
	struct rlimit l;

	CHECK(f && fgets(pattern, sizeof pattern, f));
	fclose(f);
	if (pattern[0] == '|' || pattern[0] == '/')
		rig_skip("core files do not go to the working directory here (%.60s)", pattern);
	getrlimit(RLIMIT_CORE, &l);
	if (l.rlim_max != RLIM_INFINITY && geteuid() != 0)
		rig_skip("core files are limited here");
	CHECK(mkdtemp(dir) != NULL);
	rig_open();
	int status = in_child(core_crash, dir);
	CHECK(WIFSIGNALED(status) || WIFEXITED(status));
	if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
		_exit(77);
	SAME(WTERMSIG(status), SIGABRT);
	CHECK(WCOREDUMP(status));
	snprintf(cmd, sizeof cmd, "grep -aq 'this page is here, mark 8d1c' %s/core*", dir);
	SAME(system(cmd), 0);
	void *addr;
	snprintf(cmd, sizeof cmd, "%s/addr", dir);
	f = fopen(cmd, "r");
	CHECK(f && fscanf(f, "%p", &addr) == 1);
	fclose(f);
	uint64_t bytes = core_holds(dir, (uint64_t)(uintptr_t)addr);
	unsigned all;
	snprintf(cmd, sizeof cmd, "du -k %s | cut -f1; rm -rf %s", dir, dir);
	f = popen(cmd, "r");
	CHECK(f && fscanf(f, "%u", &all) == 1 && pclose(f) == 0);
	printf("# %" PRIu64 " KiB of the region's %u are in the core file of %u\n", bytes >> 10, SIZE >> 10, all);
	CHECK(bytes >= 3 * CHUNK && bytes <= 5 * CHUNK); /* three chunks are here, and what a file system adds to them */
#ifndef __SANITIZE_ADDRESS__ /* its own memory would be counted */
	CHECK(all < 6000); /* nor are absent pages in it under another address */
#endif
}

/* ----------------------------------------------------------------------------------------------------------- the ends */

#define ENDS 4

static void ends_start(unsigned char *p, struct toucher *t)
{
	remote.hold = true;
	for (unsigned k = 0; k < ENDS; k++)
		toucher_start(&t[k], p + AT(10 + 8 * k), k & 1);
	UNTIL(remote.held);
	for (unsigned k = 0; k < ENDS; k++)
		toucher_is_stuck(&t[k]);
}

static struct far_mount *volatile end_map; /* not forgotten at the end: no leak */

static void end_now(void *arg)
{
	struct far_mount *m = end_map = rig_map(NULL);
	static struct toucher t[ENDS];
	char *args[] = { (char *)"sh", (char *)"-c", (char *)"exit 5", NULL };

	ends_start(far_addr(m), t);
	switch (*(int *)arg) {
	case 0:
		_exit(5);
	case 1:
		exit(5);
	case 2:
		raise(SIGKILL);
		break;
	default:
		execvp("sh", args);
		_exit(1);
	}
}

static void process_ends(int how)
{
	rig_open();
	uint64_t began = now_ms();
	int status = in_child(end_now, &how);

	if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
		_exit(77);
	if (how == 2)
		SAME(WTERMSIG(status), SIGKILL);
	else
		SAME(WEXITSTATUS(status), 5);
	CHECK(now_ms() - began < 10000);
}

static void exit_with_faults_pending(void)
{
	process_ends(0);
	process_ends(1);
}

static void killed_with_faults_pending(void)
{
	process_ends(2);
}

static void exec_with_faults_pending(void)
{
	process_ends(3);
}

static void close_while_threads_fault(enum far_on_fail policy)
{
	struct far_mount_opts o = rig_opts();
	static struct toucher t[ENDS];

	o.on_fail = policy;
	o.deadline_ms = policy == FAR_ON_FAIL_WAIT ? 500 : 60000; /* those that wait are waited for so long */
	struct far_mount *m = rig_map(&o);
	ends_start(far_addr(m), t);
	uint64_t began = now_ms();
	far_mount_close(m);
	CHECK(now_ms() - began < 10000);
	for (unsigned k = 0; k < ENDS; k++) {
		toucher_end(&t[k]);
		/* The range is gone: SIGBUS from the fault, or SIGSEGV from its repetition. Never a value. */
		CHECK(t[k].how == SIGBUS || t[k].how == SIGSEGV);
	}
}

static void close_ends_blocked_faults(void)
{
	close_while_threads_fault(FAR_ON_FAIL_ERROR);
}

static void close_ends_faults_that_wait_for_ever(void)
{
	close_while_threads_fault(FAR_ON_FAIL_WAIT);
}

static void *churn(void *arg)
{
	const unsigned char *p = arg;
	unsigned char v;

	for (unsigned k = 0;; k++) {
		uint64_t off = (uint64_t)k * 2654435761u % SIZE;
		int how = touch(p + off, &v);
		if (how)
			return (void *)(intptr_t)how;
		if (v != rig_byte(off))
			rig_fail(__FILE__, __LINE__, "byte %llu is %u", (unsigned long long)off, v);
	}
}

/* Threads that go on reading while the map is closed read right bytes until they crash. */
static void close_under_readers(void)
{
	for (unsigned round = 0; round < 4; round++) {
		struct far_mount_opts o = rig_opts();
		pthread_t t[3];
		o.local_max = round & 1 ? 16 * CHUNK : 0;
		o.address = LIFE_FAR; /* or something else, a thread's stack, lies there a moment later */
		struct far_mount *m = rig_map(&o);
		for (unsigned k = 0; k < 3; k++)
			SAME(pthread_create(&t[k], NULL, churn, far_addr(m)), 0);
		usleep(20000);
		SAME(far_mount_close(m), 0);
		for (unsigned k = 0; k < 3; k++) {
			void *how;
			pthread_join(t[k], &how);
			CHECK((intptr_t)how == SIGBUS || (intptr_t)how == SIGSEGV);
		}
	}
}

static void many_maps_at_once(void)
{
	struct far_mount *m[12];

	for (unsigned round = 0; round < 2; round++) {
		for (unsigned k = 0; k < 12; k++) {
			m[k] = rig_map(NULL);
			((unsigned char *)far_addr(m[k]))[AT(20)] = rig_byte(AT(20));
		}
		for (unsigned k = 0; k < 12; k++)
			CHECK(rig_right((unsigned char *)far_addr(m[k]) + AT(20 + k), AT(20 + k), CHUNK));
		for (unsigned k = 0; k < 12; k++)
			SAME(far_mount_close(m[(k * 5) % 12]), 0);
	}
}

/* Kinds that need a userfaultfd of another kind, in one process. */
static void maps_of_different_kinds(void)
{
	static const struct {
		enum far_mechanism m;
		enum far_tracking t;
	} kinds[] = { { FAR_MECH_COPY, FAR_TRACK_SYNC }, { FAR_MECH_COPY, FAR_TRACK_HASH }, { FAR_MECH_COPY, FAR_TRACK_AUTO } };
	struct far_mount *m[3];

	for (unsigned k = 0; k < 3; k++) {
		struct far_mount_opts o = rig_opts();
		o.mechanism = kinds[k].m;
		o.tracking = kinds[k].t;
		m[k] = rig_map(&o);
		((unsigned char *)far_addr(m[k]))[AT(10 + k)] = 0;
	}
	for (unsigned k = 0; k < 3; k++) {
		CHECK(rig_right((unsigned char *)far_addr(m[k]) + AT(20), AT(20), CHUNK));
		SAME(far_mount_flush(m[k]), 0);
		SAME(remote.data[AT(10 + k)], 0);
	}
	for (unsigned k = 0; k < 3; k++)
		SAME(far_mount_close(m[(k + 1) % 3]), 0);
}

#define CASE(f) { #f, f }

int main(int argc, char **argv)
{
	static const struct rig_case cases[] = {
		CASE(reads_and_stores),
		CASE(close_flushes),
		CASE(the_tail_is_zero_and_stays_here),
		CASE(a_fixed_address),
		CASE(read_only_refuses_stores),
		CASE(populate_discard_evict),
		CASE(fork_gives_the_child_an_error),
		CASE(fork_inherits_if_asked),
		CASE(spawn_and_exec_of_others),
		CASE(mremap_is_followed),
		CASE(munmap_of_a_part),
		CASE(madvise_dontneed),
		CASE(madvise_free),
		CASE(madvise_remove),
		CASE(madvise_read_only_forgets),
		CASE(other_advice_changes_nothing),
		CASE(mprotect_by_the_program),
		CASE(chunks_of_several_mappings),
		CASE(mlock_brings_and_keeps),
		CASE(signals_reach_a_blocked_thread),
		CASE(a_debugger_sees_no_zeros),
		CASE(gdb_can_be_attached),
		CASE(a_core_dump_leaves_absent_pages_out),
		CASE(exit_with_faults_pending),
		CASE(killed_with_faults_pending),
		CASE(exec_with_faults_pending),
		CASE(close_ends_blocked_faults),
		CASE(close_ends_faults_that_wait_for_ever),
		CASE(close_under_readers),
		CASE(many_maps_at_once),
		CASE(maps_of_different_kinds),
	};
	return rig_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
