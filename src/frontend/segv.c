/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A pager without the kernel's help. The view's chunks are in one of two states:
 *
 *     closed -> open     far_segv_show(), whoever has filled the chunk through another mapping
 *     open -> closed     far_segv_hide() before the bytes go away; segv_make_room(), when the view has fallen into so many
 *                        islands that the process would run out of mappings
 *
 * A touch of a closed chunk is a SIGSEGV. Its handler may run on a small stack, in the middle of anything, so it does
 * nothing there but to leave a request in a slot, write the slot's number into a pipe and wait at a futex; the threads of
 * a crew fill. Slots are static and never freed, for a handler of the program's own that runs meanwhile may jump away with
 * siglongjmp(3) and never come back:
 *
 *     free -> asked      segv_ask(), the thread that touches
 *     asked -> done      segv_answer(), a thread of the crew
 *     done -> free       segv_ask(), the same thread; or -> asked by another that finds no free one. Who was robbed sees
 *                        another number in the slot's word, and touches again.
 *
 * Invariants:
 *  1. The handler takes no lock, allocates nothing, and leaves errno as it was.
 *  2. A view is found through `segv_views`; who looks at one counts in its `users`, with all signals blocked, and close
 *     waits until nobody does. Who waits for an answer does not look at it any more.
 *  3. Bit i of `open` is set only while chunk i is readable, and changes under `lock`. A handler that finds it set has
 *     come late and touches again; a store is none of ours whatever it says.
 */
#define _GNU_SOURCE
#include "frontend/segv.h"

#include "base/clock.h"
#include "base/crew.h"
#include "base/io.h"
#include "base/thread.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define SEGV_VIEWS 256
#define SEGV_SLOTS 1024
#define SEGV_THREADS 256

enum { SEGV_FREE, SEGV_ASKED, SEGV_DONE };
#define SEGV_STATE 3u
#define SEGV_ROUND 4u

struct segv_slot {
	_Atomic uint32_t word; /* round << 2 | state: the futex */
	_Atomic int result;
	_Atomic uint64_t off, since;
	_Atomic(struct far_segv *) segv; /* only to be compared */
};

struct segv_view {
	_Atomic(struct far_segv *) segv;
	_Atomic unsigned users;
};

struct far_segv {
	/* fixed after open */
	char *addr;
	uint64_t len, mapped, chunk, chunks;
	int (*fill)(void *opaque, uint64_t off);
	void *opaque;
	pid_t pid;
	int asks[2]; /* a pipe of slots' numbers */
	int stop_pipe[2];
	struct far_crew *crew;
	struct segv_view *view;
	uint64_t most_islands;
	/* atomic */
	_Atomic bool stopped;
	_Atomic uint64_t faults;
	_Atomic uint64_t *open; /* bit i: chunk i is readable; changed under lock */
	struct far_mutex lock;
	uint64_t islands FAR_GUARDED_BY(lock); /* runs of open chunks */
	uint64_t victim FAR_GUARDED_BY(lock);  /* where to look for the next island that is closed */
};

static struct segv_view segv_views[SEGV_VIEWS];
static struct segv_slot segv_slots[SEGV_SLOTS];
static struct far_mutex segv_lock = FAR_MUTEX_INIT;
static unsigned segv_users;           /* under segv_lock */
static struct sigaction segv_old;     /* of the program; changed under segv_lock while no view is there */

/* ------------------------------------------------------------------------------------------------ the handler */

static long segv_futex(_Atomic uint32_t *word, int op, uint32_t value)
{
	return syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

/* A slot that is ours until its word changes; SIZE_MAX: none. */
static size_t segv_take(uint32_t *word)
{
	for (uint32_t want = SEGV_FREE; want <= SEGV_DONE; want += SEGV_DONE)
		for (size_t i = 0; i < SEGV_SLOTS; i++) {
			uint32_t w = atomic_load_explicit(&segv_slots[i].word, memory_order_relaxed);
			uint32_t mine = ((w & ~SEGV_STATE) + SEGV_ROUND) | SEGV_ASKED;
			if ((w & SEGV_STATE) == want && atomic_compare_exchange_strong(&segv_slots[i].word, &w, mine)) {
				*word = mine;
				return i;
			}
		}
	return SIZE_MAX;
}

/* Leave a request. 0: wait for slot *i, whose word is *word; 1: touch again; -errno: SIGBUS. */
static int segv_ask(struct far_segv *s, uint64_t off, size_t *i, uint32_t *word)
{
	struct segv_slot *slot;
	uint16_t number;

	if (atomic_load(&s->stopped))
		return -ESHUTDOWN;
	*i = segv_take(word);
	if (*i == SIZE_MAX)
		return 1; /* a thousand threads wait */
	slot = &segv_slots[*i];
	number = (uint16_t)*i;
	atomic_store(&slot->off, off);
	atomic_store(&slot->since, far_now());
	atomic_store(&slot->segv, s);
	while (write(s->asks[1], &number, sizeof number) != sizeof number) /* there is room for all slots */
		if (errno != EINTR) {
			atomic_store(&slot->word, (*word & ~SEGV_STATE) | SEGV_FREE);
			return -EIO;
		}
	return 0;
}

/* 0: touch again; -errno: SIGBUS. */
static int segv_wait(size_t i, uint32_t word)
{
	struct segv_slot *slot = &segv_slots[i];
	int result = 0;
	uint32_t now;

	while ((now = atomic_load(&slot->word)) == word)
		segv_futex(&slot->word, FUTEX_WAIT, word);
	if (now == ((word & ~SEGV_STATE) | SEGV_DONE)) {
		result = atomic_load(&slot->result);
		if (!atomic_compare_exchange_strong(&slot->word, &now, (now & ~SEGV_STATE) | SEGV_FREE))
			result = 0; /* robbed: that may be another's */
	}
	return result;
}

static bool segv_is_open(const struct far_segv *s, uint64_t i)
{
	return atomic_load_explicit(&s->open[i / 64], memory_order_acquire) >> (i % 64) & 1;
}

/* Whether it was a store: that is an error of the program's. */
static bool segv_is_store(const ucontext_t *uc)
{
#if defined(__x86_64__)
	return uc->uc_mcontext.gregs[REG_ERR] & 2;
#elif defined(__aarch64__)
	const struct _aarch64_ctx *c = (const void *)uc->uc_mcontext.__reserved;

	for (; c->magic && c->size; c = (const void *)((const char *)c + c->size))
		if (c->magic == ESR_MAGIC)
			return ((const struct esr_context *)c)->esr & (1 << 6);
	return false;
#else
	return true;
#endif
}

static bool segv_works(void)
{
#if defined(__x86_64__) || defined(__aarch64__)
	return true;
#else
	return false;
#endif
}

/* The view that has this address, counted in its users. */
static struct segv_view *segv_find(uintptr_t addr, struct far_segv **out)
{
	for (size_t i = 0; i < SEGV_VIEWS; i++) {
		struct segv_view *v = &segv_views[i];
		struct far_segv *s;
		if (!atomic_load_explicit(&v->segv, memory_order_relaxed))
			continue;
		atomic_fetch_add(&v->users, 1); /* before the look: close takes it away and then waits */
		s = atomic_load(&v->segv);
		if (s && addr - (uintptr_t)s->addr < s->mapped) {
			*out = s;
			return v;
		}
		atomic_fetch_sub(&v->users, 1);
	}
	return NULL;
}

/* As the kernel does it when the page of a file cannot be read: SIGBUS, and no way around it. */
static void segv_bus(ucontext_t *uc, void *addr)
{
	siginfo_t info = { .si_signo = SIGBUS, .si_code = BUS_ADRERR };
	struct sigaction sa;

	info.si_addr = addr;
	if (sigismember(&uc->uc_sigmask, SIGBUS) || sigaction(SIGBUS, NULL, &sa) || sa.sa_handler == SIG_IGN) {
		sa = (struct sigaction){ .sa_handler = SIG_DFL };
		sigaction(SIGBUS, &sa, NULL);
		sigdelset(&uc->uc_sigmask, SIGBUS);
	}
	syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), SIGBUS, &info);
}

/* A signal of the program's own. */
static void segv_pass_on(int sig, siginfo_t *info, void *ctx)
{
	struct sigaction dfl = { .sa_handler = SIG_DFL };
	sigset_t mask, old;

	if (segv_old.sa_handler == SIG_IGN && info->si_code <= 0)
		return;
	if (!(segv_old.sa_flags & SA_SIGINFO) && (segv_old.sa_handler == SIG_DFL || segv_old.sa_handler == SIG_IGN)) {
		sigaction(SIGSEGV, &dfl, NULL); /* the instruction fails again, and nobody is in its way */
		if (info->si_code <= 0)
			syscall(SYS_rt_tgsigqueueinfo, getpid(), syscall(SYS_gettid), sig, info);
		return;
	}
	sigorset(&mask, &segv_old.sa_mask, &((ucontext_t *)ctx)->uc_sigmask);
	if (!(segv_old.sa_flags & SA_NODEFER))
		sigaddset(&mask, SIGSEGV);
	pthread_sigmask(SIG_SETMASK, &mask, &old);
	if (segv_old.sa_flags & SA_SIGINFO)
		segv_old.sa_sigaction(sig, info, ctx);
	else
		segv_old.sa_handler(sig);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* All signals are blocked when it begins, so that nobody can jump away from a view that is in use; while it waits, those
 * of the program are delivered. */
static void segv_handler(int sig, siginfo_t *info, void *ctx)
{
	ucontext_t *uc = ctx;
	int saved = errno, r = 1;
	struct far_segv *s = NULL;
	struct segv_view *v = NULL;
	uint32_t word = 0;
	size_t slot = 0;

	if (info->si_code == SEGV_ACCERR && !segv_is_store(uc))
		v = segv_find((uintptr_t)info->si_addr, &s);
	if (!v || s->pid != getpid()) {
		if (v)
			atomic_fetch_sub(&v->users, 1);
		segv_pass_on(sig, info, ctx);
		errno = saved;
		return;
	}
	uint64_t off = (uintptr_t)info->si_addr - (uintptr_t)s->addr;
	if (!segv_is_open(s, off / s->chunk)) {
		atomic_fetch_add_explicit(&s->faults, 1, memory_order_relaxed);
		r = segv_ask(s, off, &slot, &word);
	}
	atomic_fetch_sub(&v->users, 1); /* from here on the view may go */
	if (r == 0) {
		sigset_t all;
		pthread_sigmask(SIG_SETMASK, &uc->uc_sigmask, &all);
		r = segv_wait(slot, word);
		pthread_sigmask(SIG_SETMASK, &all, NULL);
	}
	if (r < 0)
		segv_bus(uc, info->si_addr);
	errno = saved;
}

/* -------------------------------------------------------------------------------------------------- answering */

static void segv_answer(struct far_segv *s, uint16_t number)
{
	struct segv_slot *slot = &segv_slots[number];
	uint32_t word = atomic_load(&slot->word);
	int r = atomic_load(&s->stopped) ? -ESHUTDOWN : s->fill(s->opaque, atomic_load(&slot->off));

	atomic_store(&slot->result, r);
	atomic_store(&slot->word, (word & ~SEGV_STATE) | SEGV_DONE);
	segv_futex(&slot->word, FUTEX_WAKE, INT32_MAX);
}

struct segv_parked {
	struct far_segv *s;
	uint16_t number;
};

static void segv_parked_cb(void *arg)
{
	struct segv_parked *p = arg;

	segv_answer(p->s, p->number);
	free(p);
}

static bool segv_run(void *opaque, struct far_seat *seat)
{
	struct far_segv *s = opaque;
	struct pollfd pf[2] = { { .fd = s->asks[0], .events = POLLIN }, { .fd = s->stop_pipe[0], .events = POLLIN } };
	struct segv_parked *p;
	uint16_t number;

	if (poll(pf, 2, -1) < 0)
		return errno == EINTR;
	if (!(pf[0].revents & POLLIN))
		return !pf[1].revents; /* the last requests are answered first */
	if (read(s->asks[0], &number, sizeof number) != sizeof number)
		return true;
	p = far_crew_leave(seat) ? NULL : malloc(sizeof *p);
	if (p)
		*p = (struct segv_parked){ s, number };
	if (!p || far_crew_park(seat, segv_parked_cb, p)) {
		free(p);
		segv_answer(s, number);
	}
	return true;
}

/* ----------------------------------------------------------------------------------------------- open, closed */

static void segv_mark_locked(struct far_segv *s, uint64_t i, bool open) FAR_REQUIRES(s->lock)
{
	uint64_t bit = (uint64_t)1 << (i % 64);
	unsigned beside = (i > 0 && segv_is_open(s, i - 1)) + (i + 1 < s->chunks && segv_is_open(s, i + 1));

	if (segv_is_open(s, i) == open)
		return;
	if (open)
		atomic_fetch_or_explicit(&s->open[i / 64], bit, memory_order_release);
	else
		atomic_fetch_and_explicit(&s->open[i / 64], ~bit, memory_order_release);
	s->islands += open ? 1 - (uint64_t)beside : (uint64_t)beside - 1;
}

/* Absent pages are closed, and left out of core dumps: they would be dumped as zeros. */
static int segv_protect(struct far_segv *s, uint64_t off, uint64_t len, bool open)
{
	char *at = s->addr + off;

	len = far_min(len, s->mapped - off);
	if (!open && mprotect(at, len, PROT_NONE))
		return -errno;
	if (madvise(at, len, open ? MADV_DODUMP : MADV_DONTDUMP))
		return -errno;
	return open && mprotect(at, len, PROT_READ) ? -errno : 0;
}

/* Close whole islands: that needs no mapping more. */
static int segv_close_island_locked(struct far_segv *s, uint64_t first, uint64_t last) FAR_REQUIRES(s->lock)
{
	int r;

	while (first > 0 && segv_is_open(s, first - 1))
		first--;
	while (last + 1 < s->chunks && segv_is_open(s, last + 1))
		last++;
	r = segv_protect(s, first * s->chunk, (last + 1 - first) * s->chunk, false);
	for (uint64_t i = first; r == 0 && i <= last; i++)
		segv_mark_locked(s, i, false);
	return r;
}

/* There are too many islands: close the next one. What is in it stays; the next touch opens it again. */
static bool segv_make_room_locked(struct far_segv *s) FAR_REQUIRES(s->lock)
{
	for (uint64_t n = 0; n < s->chunks; n++) {
		uint64_t i = (s->victim + n) % s->chunks;
		if (n % 64 == 0 && i % 64 == 0 && !atomic_load_explicit(&s->open[i / 64], memory_order_relaxed) &&
		    i + 64 <= s->chunks) {
			n += 63;
			continue;
		}
		if (segv_is_open(s, i)) {
			s->victim = i + 1;
			return segv_close_island_locked(s, i, i) == 0;
		}
	}
	return false;
}

int far_segv_show(struct far_segv *s, uint64_t off, uint64_t len)
{
	uint64_t first = off / s->chunk, last;
	int r;

	if (!len || off >= s->len)
		return 0;
	last = far_min(far_div_up(off + len, s->chunk), s->chunks) - 1;
	far_mutex_lock(&s->lock);
	while (s->islands >= s->most_islands && segv_make_room_locked(s))
		;
	r = segv_protect(s, first * s->chunk, (last + 1 - first) * s->chunk, true);
	if (r == -ENOMEM && segv_make_room_locked(s))
		r = segv_protect(s, first * s->chunk, (last + 1 - first) * s->chunk, true);
	for (uint64_t i = first; r == 0 && i <= last; i++)
		segv_mark_locked(s, i, true);
	far_mutex_unlock(&s->lock);
	return r;
}

int far_segv_hide(struct far_segv *s, uint64_t off, uint64_t len)
{
	uint64_t first = off / s->chunk, last;
	int r;

	if (!len || off >= s->len)
		return 0;
	last = far_min(far_div_up(off + len, s->chunk), s->chunks) - 1;
	far_mutex_lock(&s->lock);
	r = segv_protect(s, first * s->chunk, (last + 1 - first) * s->chunk, false);
	for (uint64_t i = first; r == 0 && i <= last; i++)
		segv_mark_locked(s, i, false);
	if (r == -ENOMEM)
		r = segv_close_island_locked(s, first, last);
	far_mutex_unlock(&s->lock);
	return r;
}

bool far_segv_shown(const struct far_segv *s, uint64_t off)
{
	return segv_is_open(s, off / s->chunk);
}

char *far_segv_addr(const struct far_segv *s)
{
	return s->addr;
}

uint64_t far_segv_faults(const struct far_segv *s)
{
	return atomic_load_explicit(&s->faults, memory_order_relaxed);
}

unsigned far_segv_blocked(const struct far_segv *s, uint64_t *off, uint64_t *since, unsigned max)
{
	unsigned n = 0;

	for (size_t i = 0; i < SEGV_SLOTS; i++) {
		const struct segv_slot *slot = &segv_slots[i];
		if ((atomic_load(&slot->word) & SEGV_STATE) != SEGV_ASKED || atomic_load(&slot->segv) != s)
			continue;
		if (n < max) {
			off[n] = atomic_load(&slot->off);
			since[n] = atomic_load(&slot->since);
		}
		n++;
	}
	return n;
}

/* ------------------------------------------------------------------------------------------------- open, close */

static bool segv_is_ours(const struct sigaction *sa)
{
	return (sa->sa_flags & SA_SIGINFO) && sa->sa_sigaction == segv_handler;
}

/* Into the table, and the handler in its place. */
static int segv_enter(struct far_segv *s)
{
	struct sigaction sa = { .sa_sigaction = segv_handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART }, now;
	int r = -EMFILE;

	sigfillset(&sa.sa_mask);
	far_mutex_lock(&segv_lock);
	for (size_t i = 0; i < SEGV_VIEWS && r; i++)
		if (!atomic_load(&segv_views[i].segv)) {
			s->view = &segv_views[i];
			r = 0;
		}
	if (r == 0 && sigaction(SIGSEGV, NULL, &now))
		r = -errno;
	if (r == 0 && !segv_is_ours(&now)) {
		segv_old = now;
		r = sigaction(SIGSEGV, &sa, NULL) ? -errno : 0;
	}
	if (r == 0) {
		atomic_store(&s->view->segv, s);
		segv_users++;
	}
	far_mutex_unlock(&segv_lock);
	return r;
}

static void segv_leave(struct far_segv *s)
{
	struct sigaction now;

	atomic_store(&s->view->segv, NULL);
	while (atomic_load(&s->view->users))
		far_sleep_until(far_now() + 50 * FAR_USEC, false);
	far_mutex_lock(&segv_lock);
	if (--segv_users == 0 && sigaction(SIGSEGV, NULL, &now) == 0 && segv_is_ours(&now))
		sigaction(SIGSEGV, &segv_old, NULL);
	far_mutex_unlock(&segv_lock);
}

/* An island has a mapping before and one of its own: leave half of all that may be for the program. */
static uint64_t segv_most_islands(void)
{
	char text[32] = "";
	int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);

	far_fd_close(&fd);
	return far_max(16, (n > 0 ? strtoull(text, NULL, 10) : 65530) / 4);
}

static int segv_map(struct far_segv *s, int shared, void *address, struct far_error *err)
{
	int flags = MAP_SHARED | MAP_NORESERVE | (address ? MAP_FIXED_NOREPLACE : 0);
	void *p = mmap(address, s->mapped, PROT_NONE, flags, shared, 0);

	if (p == MAP_FAILED || (address && p != address)) {
		int code = p == MAP_FAILED ? errno : EEXIST;
		if (p != MAP_FAILED)
			munmap(p, s->mapped);
		return far_error_set(err, code, "cannot map %" PRIu64 " bytes%s: %s", s->mapped,
				     address ? " at that address" : "", far_strerror(code));
	}
	s->addr = p;
	if (madvise(p, s->mapped, MADV_DONTFORK) || madvise(p, s->mapped, MADV_DONTDUMP))
		return far_error_set(err, errno, "cannot keep the map from children and core dumps: %s", far_strerror(errno));
	return 0;
}

static void segv_free(struct far_segv *s)
{
	char stop = 0;

	if (s->crew) {
		(void)!write(s->stop_pipe[1], &stop, 1);
		far_crew_close(s->crew);
	}
	for (int i = 0; i < 2; i++) {
		far_fd_close(&s->asks[i]);
		far_fd_close(&s->stop_pipe[i]);
	}
	if (s->addr)
		munmap(s->addr, s->mapped);
	far_mutex_fini(&s->lock);
	free(s->open);
	free(s);
}

static int segv_start(struct far_segv *s)
{
	int r = pipe2(s->asks, O_CLOEXEC) || pipe2(s->stop_pipe, O_CLOEXEC) ? -errno : 0;

	if (r == 0)
		r = far_crew_open(&s->crew, "far-segv", SEGV_THREADS);
	if (r == 0)
		r = far_crew_seat(s->crew, -1, segv_run, NULL, s);
	return r;
}

int far_segv_open(int shared, uint64_t len, uint64_t chunk, void *address, int (*fill)(void *opaque, uint64_t off),
		  void *opaque, struct far_segv **out, struct far_error *err)
{
	uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
	struct far_segv *s;
	int r;

	if (!segv_works())
		return far_error_set(err, EOPNOTSUPP, "pointers without userfaultfd exist on x86-64 and ARM64 only");
	FAR_ASSERT(chunk >= page && !(chunk & (chunk - 1)));
	s = calloc(1, sizeof *s);
	if (!s)
		return far_error_set(err, ENOMEM, "no memory for a map");
	s->len = len;
	s->mapped = far_max(far_div_up(len, page), 1) * page;
	s->chunk = chunk;
	s->chunks = far_max(far_div_up(len, chunk), 1);
	s->fill = fill;
	s->opaque = opaque;
	s->pid = getpid();
	s->asks[0] = s->asks[1] = s->stop_pipe[0] = s->stop_pipe[1] = -1;
	s->most_islands = segv_most_islands();
	far_mutex_init(&s->lock);
	s->open = calloc(s->chunks / 64 + 1, sizeof *s->open);
	r = s->open ? segv_map(s, shared, address, err) : far_error_set(err, ENOMEM, "no memory for a map");
	if (r == 0) {
		r = segv_start(s);
		if (r == 0)
			r = segv_enter(s);
		if (r)
			far_error_set(err, -r, "cannot serve a map by signals: %s", far_strerror(-r));
	}
	if (r) {
		segv_free(s);
		return r;
	}
	*out = s;
	return 0;
}

void far_segv_stop(struct far_segv *s)
{
	atomic_store(&s->stopped, true);
}

void far_segv_close(struct far_segv *s)
{
	if (!s)
		return;
	far_segv_stop(s);
	segv_leave(s);
	segv_free(s);
}
