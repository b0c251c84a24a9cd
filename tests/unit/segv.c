/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Pages served by SIGSEGV: touches by many threads, signals of the program's own, errors, eviction, many islands, close. */
#define _GNU_SOURCE
#include "frontend/segv.h"

#include "base/clock.h"
#include "base/thread.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define CHUNK ((uint64_t)64 * 1024)
#define LIMIT (20 * FAR_SEC)

static struct rig {
	struct far_segv *s;
	int fd;
	char *alias;
	volatile const char *p;
	uint64_t len;
	_Atomic int fail;        /* what fill returns */
	_Atomic bool held;       /* fill waits while this is set */
	_Atomic unsigned inside; /* fill */
	_Atomic unsigned fills;
} rig;

static char byte_at(uint64_t off)
{
	return (char)(off / 4096 * 7 + off % 251 + 1);
}

static int rig_fill(void *opaque, uint64_t off)
{
	struct rig *r = opaque;
	uint64_t from = off / CHUNK * CHUNK, to = far_min(from + CHUNK, r->len);

	atomic_fetch_add(&r->inside, 1);
	while (atomic_load(&r->held))
		usleep(1000);
	atomic_fetch_add(&r->fills, 1);
	atomic_fetch_sub(&r->inside, 1);
	if (atomic_load(&r->fail))
		return atomic_load(&r->fail);
	for (uint64_t i = from; i < to; i++)
		r->alias[i] = byte_at(i);
	return far_segv_show(r->s, from, to - from);
}

static void rig_open(uint64_t len)
{
	struct far_error err = { 0 };

	memset(&rig, 0, sizeof rig);
	rig.len = len;
	rig.fd = memfd_create("segv", MFD_CLOEXEC);
	assert_true(rig.fd >= 0 && ftruncate(rig.fd, (off_t)len) == 0);
	rig.alias = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, rig.fd, 0);
	if (far_segv_open(rig.fd, len, CHUNK, NULL, rig_fill, &rig, &rig.s, &err))
		fail_msg("%s", err.text);
	rig.p = far_segv_addr(rig.s);
}

static void rig_close(void)
{
	far_segv_close(rig.s);
	munmap(rig.alias, rig.len);
	close(rig.fd);
}

static void until(bool (*yes)(void))
{
	uint64_t end = far_now() + LIMIT;

	while (!yes() && far_now() < end)
		usleep(1000);
	assert_true(yes());
}

static void reads(void **state)
{
	(void)state;
	rig_open(10 * CHUNK + 5000);
	errno = 77;
	for (uint64_t i = 0; i < rig.len; i += 4093)
		if (rig.p[i] != byte_at(i))
			fail_msg("byte %lu", (unsigned long)i);
	assert_int_equal(errno, 77);
	assert_int_equal(rig.p[rig.len], 0); /* the rest of the last page */
	assert_int_equal(atomic_load(&rig.fills), 11);
	assert_int_equal(far_segv_faults(rig.s), 11);
	/* Evicted: fetched again. */
	assert_true(far_segv_shown(rig.s, 3 * CHUNK));
	assert_int_equal(far_segv_hide(rig.s, 3 * CHUNK, CHUNK), 0);
	assert_false(far_segv_shown(rig.s, 3 * CHUNK));
	memset(rig.alias + 3 * CHUNK, 0, CHUNK);
	assert_int_equal(rig.p[3 * CHUNK + 9], byte_at(3 * CHUNK + 9));
	assert_int_equal(atomic_load(&rig.fills), 12);
	rig_close();
}

struct reader {
	struct far_thread thread;
	unsigned seed;
	bool wrong;
};

static void *reader_run(void *arg)
{
	struct reader *r = arg;

	for (unsigned k = 0; k < 3000; k++) {
		uint64_t off = (uint64_t)rand_r(&r->seed) % rig.len;
		if (rig.p[off] != byte_at(off))
			r->wrong = true;
		if (k % 16 == 0) /* nobody may see a chunk between hide and fill */
			far_segv_hide(rig.s, (uint64_t)rand_r(&r->seed) % rig.len / CHUNK * CHUNK, CHUNK);
	}
	return NULL;
}

/* Library threads block all signals, and a blocked SIGSEGV kills: here they must be let through. */
static void *unblocked(void *arg)
{
	sigset_t none;

	sigemptyset(&none);
	pthread_sigmask(SIG_SETMASK, &none, NULL);
	return reader_run(arg);
}

static void readers(void **state)
{
	struct reader r[16];

	(void)state;
	rig_open(64 * CHUNK);
	for (unsigned i = 0; i < FAR_ARRAY_LEN(r); i++) {
		r[i] = (struct reader){ .seed = i + 1 };
		assert_int_equal(far_thread_start(&r[i].thread, "reader", unblocked, &r[i]), 0);
	}
	for (unsigned i = 0; i < FAR_ARRAY_LEN(r); i++) {
		far_thread_join(&r[i].thread);
		assert_false(r[i].wrong);
	}
	rig_close();
}

static sigjmp_buf back;
static _Atomic int caught;
static void *_Atomic caught_at;

static void catches(int sig, siginfo_t *info, void *ctx)
{
	(void)ctx;
	atomic_store(&caught, sig);
	atomic_store(&caught_at, info->si_addr);
	siglongjmp(back, 1);
}

/* The signal that a load raises, or 0. */
static int raised(const volatile char *p)
{
	struct sigaction sa = { .sa_sigaction = catches, .sa_flags = SA_SIGINFO }, bus;

	sigaction(SIGBUS, &sa, &bus);
	atomic_store(&caught, 0);
	if (sigsetjmp(back, 1) == 0)
		(void)*p;
	sigaction(SIGBUS, &bus, NULL);
	return atomic_load(&caught);
}

static void errors(void **state)
{
	(void)state;
	rig_open(8 * CHUNK);
	atomic_store(&rig.fail, -EIO);
	assert_int_equal(raised(rig.p + 2 * CHUNK + 5), SIGBUS);
	assert_ptr_equal(atomic_load(&caught_at), rig.p + 2 * CHUNK + 5);
	assert_int_equal(raised(rig.p + 2 * CHUNK + 5), SIGBUS);
	atomic_store(&rig.fail, 0); /* the remote is back */
	assert_int_equal(raised(rig.p + 2 * CHUNK + 5), 0);
	far_segv_stop(rig.s);
	assert_int_equal(raised(rig.p + 2 * CHUNK + 5), 0);
	assert_int_equal(raised(rig.p + 3 * CHUNK), SIGBUS);
	rig_close();
}

/* A store, and an address of nobody's: both are the program's own business. */
static void others(void **state)
{
	struct sigaction sa = { .sa_sigaction = catches, .sa_flags = SA_SIGINFO }, old;

	(void)state;
	sigaction(SIGSEGV, &sa, &old);
	rig_open(8 * CHUNK);
	assert_int_equal(rig.p[0], byte_at(0));
	for (int i = 0; i < 3; i++) {
		volatile char *volatile p = i == 0 ? (char *)rig.p : i == 1 ? (char *)rig.p + CHUNK : (char *)8;
		atomic_store(&caught, 0);
		if (sigsetjmp(back, 1) == 0)
			*p = 1;
		assert_int_equal(atomic_load(&caught), SIGSEGV);
		assert_ptr_equal(atomic_load(&caught_at), p);
	}
	assert_int_equal(atomic_load(&rig.fills), 1);
	rig_close();
	sigaction(SIGSEGV, NULL, &sa);
	assert_ptr_equal(sa.sa_sigaction, catches); /* given back */
	sigaction(SIGSEGV, &old, NULL);
}

/* What the default does: a child shows it. */
static int child_ends(void (*act)(void))
{
	int status = 0;
	pid_t pid = fork();

	if (pid == 0) {
		signal(SIGSEGV, SIG_DFL);
		signal(SIGBUS, SIG_DFL);
		act();
		_exit(0);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	return WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}

static volatile char *volatile nowhere = (char *)16;

static void act_wild(void)
{
	rig_open(8 * CHUNK);
	*nowhere = 1;
}

static void act_killed(void)
{
	rig_open(8 * CHUNK);
	raise(SIGSEGV);
}

static void act_bus_blocked(void)
{
	sigset_t bus;

	rig_open(8 * CHUNK);
	atomic_store(&rig.fail, -EIO);
	sigemptyset(&bus);
	sigaddset(&bus, SIGBUS);
	sigprocmask(SIG_BLOCK, &bus, NULL);
	(void)rig.p[0];
}

static void act_works(void)
{
	rig_open(8 * CHUNK);
	_exit(rig.p[5] == byte_at(5) ? 42 : 1);
}

static void defaults(void **state)
{
	(void)state;
	assert_int_equal(child_ends(act_wild), SIGSEGV);
	assert_int_equal(child_ends(act_killed), SIGSEGV);
	assert_int_equal(child_ends(act_bus_blocked), SIGBUS);
	assert_int_equal(child_ends(act_works), 42);
}

static void act_touch_inherited(void)
{
	(void)rig.p[CHUNK];
}

static void act_touch_open(void)
{
	(void)rig.p[0];
}

static void forks(void **state)
{
	(void)state;
	rig_open(8 * CHUNK);
	assert_int_equal(rig.p[0], byte_at(0));
	assert_int_equal(child_ends(act_touch_inherited), SIGSEGV); /* never zeros */
	assert_int_equal(child_ends(act_touch_open), SIGSEGV);
	rig_close();
}

static bool one_inside(void)
{
	return atomic_load(&rig.inside) == 1;
}

static bool nobody_inside(void)
{
	return atomic_load(&rig.inside) == 0;
}

static void rings(int sig, siginfo_t *info, void *ctx)
{
	(void)sig, (void)info, (void)ctx;
	siglongjmp(back, 2);
}

static void *rings_at(void *arg)
{
	until(one_inside);
	while (far_segv_blocked(rig.s, NULL, NULL, 0) != 1)
		usleep(1000);
	pthread_kill(*(pthread_t *)arg, SIGUSR1);
	return NULL;
}

/* A handler of the program's own runs while a page is waited for, and does not come back. */
static void jumps_away(void **state)
{
	struct sigaction sa = { .sa_sigaction = rings, .sa_flags = SA_SIGINFO }, old;
	struct far_thread t = { 0 };
	pthread_t me = pthread_self();
	int came;

	(void)state;
	sigaction(SIGUSR1, &sa, &old);
	rig_open(8 * CHUNK);
	for (volatile int i = 0; i < 3; i++) {
		atomic_store(&rig.held, true);
		assert_int_equal(far_thread_start(&t, "rings", rings_at, &me), 0);
		came = sigsetjmp(back, 1);
		if (came == 0)
			(void)rig.p[i * CHUNK];
		assert_int_equal(came, 2);
		far_thread_join(&t);
		atomic_store(&rig.held, false);
		until(nobody_inside);
		assert_int_equal(rig.p[i * CHUNK + 1], byte_at((uint64_t)i * CHUNK + 1));
	}
	rig_close();
	sigaction(SIGUSR1, &old, NULL);
}

static void *touches(void *arg)
{
	sigset_t none;

	(void)arg;
	sigemptyset(&none);
	pthread_sigmask(SIG_SETMASK, &none, NULL);
	return (void *)(intptr_t)raised(rig.p + 5 * CHUNK);
}

static void *lets_go(void *arg)
{
	(void)arg;
	while (!far_segv_blocked(rig.s, NULL, NULL, 0))
		usleep(1000);
	far_segv_stop(rig.s);
	atomic_store(&rig.fail, -ESHUTDOWN);
	atomic_store(&rig.held, false);
	return NULL;
}

/* A map is closed while a thread waits for a page of it. */
static void closes(void **state)
{
	struct far_thread a = { 0 }, b = { 0 };
	void *sig = NULL;

	(void)state;
	rig_open(8 * CHUNK);
	atomic_store(&rig.held, true);
	assert_int_equal(far_thread_start(&a, "touches", touches, NULL), 0);
	assert_int_equal(far_thread_start(&b, "lets_go", lets_go, NULL), 0);
	pthread_join(a.t, &sig);
	far_thread_join(&b);
	assert_int_equal((intptr_t)sig, SIGBUS);
	rig_close();
}

static unsigned mappings(void)
{
	unsigned n = 0;
	FILE *f = fopen("/proc/self/maps", "r");

	for (int c; f && (c = fgetc(f)) != EOF;)
		n += c == '\n';
	if (f)
		fclose(f);
	return n;
}

/* Every second chunk of a large region: more islands than a process may have mappings. */
static void islands(void **state)
{
	uint64_t n = 20000, wrong = 0, i;

	(void)state;
	rig_open(2 * n * CHUNK);
	for (i = 0; i < n; i++)
		wrong += far_segv_show(rig.s, 2 * i * CHUNK, CHUNK) != 0;
	assert_int_equal(wrong, 0);
	assert_true(mappings() < 40000);
	assert_true(far_segv_shown(rig.s, 2 * (n - 1) * CHUNK));
	for (i = 1; i < 2 * n; i += 998) /* between them */
		wrong += rig.p[i * CHUNK + 3] != byte_at(i * CHUNK + 3);
	assert_int_equal(wrong, 0);
	assert_int_equal(far_segv_show(rig.s, 0, 2 * n * CHUNK), 0);
	assert_int_equal(far_segv_hide(rig.s, 0, 2 * n * CHUNK), 0);
	assert_true(mappings() < 1000);
	rig_close();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(reads),    cmocka_unit_test(readers), cmocka_unit_test(errors), cmocka_unit_test(others),
		cmocka_unit_test(defaults), cmocka_unit_test(forks),   cmocka_unit_test(jumps_away),
		cmocka_unit_test(closes),   cmocka_unit_test(islands),
	};

	return cmocka_run_group_tests_name("segv", tests, NULL, NULL);
}
