/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The kernel's interface for serving faults: what is here, what is masked, and each call of uffd.h by what it does. */
#define _GNU_SOURCE
#include "frontend/uffd.h"

#include "base/clock.h"
#include "base/thread.h"

#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define PAGE ((uint64_t)4096)
#define HUGE_PAGE (2 * FAR_MIB)
#define LIMIT (20 * FAR_SEC)

#define NEED(bits)                                                                                  \
	do {                                                                                        \
		unsigned lacks = (bits) & ~far_uffd_have();                                         \
		if (lacks) {                                                                        \
			print_message("skipped: no %s here\n", far_uffd_word(lacks & -lacks));      \
			skip();                                                                     \
		}                                                                                   \
	} while (0)

static int pagemap = -1;

static char *map_pages(uint64_t n)
{
	char *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	assert_ptr_not_equal(p, MAP_FAILED);
	return p;
}

/* Memory whose address is a multiple of 2 MiB, of `n` huge pages. */
static char *map_huge(uint64_t n, int fd)
{
	char *p = mmap(NULL, (n + 1) * HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	assert_ptr_not_equal(p, MAP_FAILED);
	p = (char *)(((uintptr_t)p + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
	p = mmap(p, n * HUGE_PAGE, PROT_READ | PROT_WRITE,
		 MAP_FIXED | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED), fd, 0);
	assert_ptr_not_equal(p, MAP_FAILED);
	return p;
}

static int open_uffd(unsigned have)
{
	int fd = -1;

	assert_int_equal(far_uffd_open(have, &fd), 0);
	assert_true(fcntl(fd, F_GETFL) & O_NONBLOCK);
	assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	return fd;
}

static uint64_t at(const void *p)
{
	return (uintptr_t)p;
}

/* A thread that does one thing to memory, and how far it is. */
struct toucher {
	struct far_thread thread;
	volatile char *p;
	char value;
	bool store;
	atomic_bool done;
};

static void *toucher_run(void *arg)
{
	struct toucher *t = arg;

	if (t->store)
		*t->p = t->value;
	else
		t->value = *t->p;
	atomic_store(&t->done, true);
	return NULL;
}

static void toucher_start(struct toucher *t)
{
	atomic_store(&t->done, false);
	assert_int_equal(far_thread_start(&t->thread, "toucher", toucher_run, t), 0);
}

static void await_event(int fd, struct far_uffd_event *e)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };

	assert_int_equal(poll(&p, 1, 20000), 1);
	assert_int_equal(far_uffd_read(fd, e), 1);
}

struct runs {
	uint64_t addr[64], len[64];
	unsigned n;
	int fail;
};

static int runs_add(void *opaque, uint64_t addr, uint64_t len)
{
	struct runs *r = opaque;

	assert_true(r->n < FAR_ARRAY_LEN(r->addr));
	r->addr[r->n] = addr;
	r->len[r->n++] = len;
	return r->fail;
}

static unsigned written(const char *p, uint64_t len, bool arm, struct runs *r)
{
	*r = (struct runs){ 0 };
	assert_int_equal(far_uffd_written(pagemap, at(p), len, arm, runs_add, r), 0);
	return r->n;
}

static void masks(void **state)
{
	unsigned all = far_uffd_probe(""), have;

	(void)state;
	if (!(all & FAR_UFFD_ANY)) {
		print_message("skipped: %s\n", far_uffd_why());
		skip();
	}
	assert_string_equal(far_uffd_word(FAR_UFFD_WP_ASYNC), "wp_async");
	assert_string_equal(far_uffd_word(FAR_UFFD_ANY), "uffd");
	have = far_uffd_probe("6.1");
	assert_int_equal(have & (FAR_UFFD_MOVE | FAR_UFFD_POISON | FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN | FAR_UFFD_MINOR_WP), 0);
	assert_int_equal(have, all & ~(unsigned)(FAR_UFFD_MOVE | FAR_UFFD_POISON | FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN |
						  FAR_UFFD_MINOR_WP | FAR_UFFD_COLLAPSE));
	assert_int_equal(far_uffd_probe("move,huge"), all & ~(unsigned)(FAR_UFFD_MOVE | FAR_UFFD_HUGE));
	assert_int_equal(far_uffd_probe("scan"), all & ~(unsigned)(FAR_UFFD_SCAN | FAR_UFFD_WP_ASYNC | FAR_UFFD_COLLAPSE));
	assert_int_equal(far_uffd_probe("collapse"), all & ~(unsigned)FAR_UFFD_COLLAPSE);
	assert_int_equal(far_uffd_probe("minor events,fork"),
			 all & ~(unsigned)(FAR_UFFD_MINOR | FAR_UFFD_MINOR_WP | FAR_UFFD_EVENTS | FAR_UFFD_FORK));
	assert_int_equal(far_uffd_probe("wp") & (FAR_UFFD_WP | FAR_UFFD_WP_SHMEM | FAR_UFFD_WP_ASYNC), 0);
	assert_int_equal(far_uffd_probe("uffd"), 0);
	assert_int_equal(far_uffd_probe("kernel,mover"), all & ~(unsigned)FAR_UFFD_KERNEL);
}

static void environment(void **state)
{
	char *old = getenv("FARPAGE_WITHOUT");

	(void)state;
	old = old ? strdup(old) : NULL;
	setenv("FARPAGE_WITHOUT", "6.1,fuse", 1);
	assert_true(far_without("move"));
	assert_true(far_without("scan"));
	assert_true(far_without("fuse"));
	assert_false(far_without("huge"));
	setenv("FARPAGE_WITHOUT", "huge", 1);
	assert_true(far_without("huge"));
	assert_false(far_without("hug"));
	assert_false(far_without("move"));
	if (old)
		setenv("FARPAGE_WITHOUT", old, 1);
	else
		unsetenv("FARPAGE_WITHOUT");
	free(old);
}

static void copies(void **state)
{
	char *p = map_pages(8), src[2 * 4096];
	struct far_uffd_event e;
	struct toucher t = { .p = p + 3 * PAGE + 77 };
	bool here[8];
	uint64_t done = 99;
	int fd;

	(void)state;
	NEED(FAR_UFFD_ANY);
	fd = open_uffd(far_uffd_have());
	memset(src, 'x', sizeof src);
	assert_int_equal(far_uffd_copy(fd, at(p), src, PAGE, 0, &done), -ENOENT);
	assert_int_equal(done, 0);
	assert_int_equal(far_uffd_register(fd, at(p), 8 * PAGE, FAR_UFFD_MISSING), 0);
	assert_int_equal(far_uffd_read(fd, &e), 0);

	toucher_start(&t);
	await_event(fd, &e);
	assert_int_equal(e.kind, FAR_EVENT_MISSING);
	assert_int_equal(e.addr, at(p) + 3 * PAGE);
	assert_int_equal(e.len, PAGE);
	assert_false(e.write);
	assert_int_equal(far_uffd_copy(fd, at(p) + 3 * PAGE, src, PAGE, FAR_UFFD_NO_WAKE, &done), 0);
	assert_int_equal(done, PAGE);
	assert_false(atomic_load(&t.done));
	assert_int_equal(far_uffd_wake(fd, at(p) + 3 * PAGE, PAGE), 0);
	far_thread_join(&t.thread);
	assert_int_equal(t.value, 'x');

	/* A page in the way: how far it came, and that the rest is as it was. */
	assert_int_equal(far_uffd_copy(fd, at(p) + 2 * PAGE, src, 2 * PAGE, 0, &done), -EEXIST);
	assert_int_equal(done, PAGE);
	assert_int_equal(far_uffd_present(pagemap, at(p), 8 * PAGE, here), 0);
	for (int i = 0; i < 8; i++)
		assert_int_equal(here[i], i == 2 || i == 3);

	t.store = true;
	t.p = p + 7 * PAGE;
	t.value = 'w';
	toucher_start(&t);
	await_event(fd, &e);
	assert_true(e.write);
	assert_int_equal(far_uffd_copy(fd, at(p) + 7 * PAGE, src, PAGE, 0, NULL), 0);
	far_thread_join(&t.thread);
	assert_int_equal(p[7 * PAGE], 'w');
	assert_int_equal(p[7 * PAGE + 1], 'x');
	assert_int_equal(far_uffd_unregister(fd, at(p), 8 * PAGE), 0);
	assert_int_equal(p[0], 0);
	close(fd);
	munmap(p, 8 * PAGE);
}

static void zeros(void **state)
{
	char *p = map_pages(64);
	uint64_t done = 0;
	bool here[64];
	int fd;

	(void)state;
	NEED(FAR_UFFD_ANY);
	fd = open_uffd(far_uffd_have());
	assert_int_equal(far_uffd_register(fd, at(p), 64 * PAGE, FAR_UFFD_MISSING), 0);
	assert_int_equal(far_uffd_zero(fd, at(p) + PAGE, 40 * PAGE, 0, &done), 0);
	assert_int_equal(done, 40 * PAGE);
	assert_int_equal(far_uffd_zero(fd, at(p), 2 * PAGE, 0, &done), -EEXIST);
	assert_int_equal(done, PAGE);
	assert_int_equal(far_uffd_present(pagemap, at(p), 64 * PAGE, here), 0);
	for (int i = 0; i < 64; i++)
		assert_int_equal(here[i], i < 41);
	for (uint64_t i = 0; i < 41 * PAGE; i += 512)
		assert_int_equal(p[i], 0);
	close(fd);
	munmap(p, 64 * PAGE);
}

/* Synchronous write-protection: the first store is a fault, and allowing it lets it go on. */
static void protects(void **state)
{
	unsigned have = far_uffd_probe("wp_async");
	char *p = map_pages(64), *src = map_pages(64);
	struct toucher t = { .p = p + 5 * PAGE, .store = true, .value = 's' };
	struct far_uffd_event e;
	uint64_t done;
	int fd;

	(void)state;
	NEED(FAR_UFFD_WP);
	fd = open_uffd(have);
	assert_int_equal(far_uffd_register(fd, at(p), 64 * PAGE, FAR_UFFD_MISSING | FAR_UFFD_PROTECT), 0);
	memset(src, 'y', 32 * PAGE);
	assert_int_equal(far_uffd_copy(fd, at(p), src, 32 * PAGE, FAR_UFFD_ARM, &done), 0);
	assert_int_equal(far_uffd_zero(fd, at(p) + 32 * PAGE, 32 * PAGE, FAR_UFFD_ARM, &done), 0);
	assert_int_equal(done, 32 * PAGE);
	for (int i = 0; i < 2; i++) {
		t.p = p + (i ? 40 : 5) * PAGE;
		toucher_start(&t);
		await_event(fd, &e);
		assert_int_equal(e.kind, FAR_EVENT_STORE);
		assert_true(e.write);
		assert_int_equal(e.addr, at((char *)t.p));
		assert_int_equal(far_uffd_protect(fd, e.addr, e.len, false, FAR_UFFD_NO_WAKE), 0);
		assert_int_equal(far_uffd_wake(fd, e.addr, e.len), 0);
		far_thread_join(&t.thread);
		assert_int_equal(*t.p, 's');
		assert_int_equal(t.p[1], i ? 0 : 'y');
		*t.p = 't'; /* free from now on */
	}
	assert_int_equal(far_uffd_protect(fd, at(p), 64 * PAGE, true, 0), 0);
	t.p = p + 5 * PAGE;
	toucher_start(&t);
	await_event(fd, &e);
	assert_int_equal(e.kind, FAR_EVENT_STORE);
	assert_int_equal(far_uffd_protect(fd, at(p), 64 * PAGE, false, 0), 0);
	far_thread_join(&t.thread);
	close(fd);
	munmap(p, 64 * PAGE);
	munmap(src, 64 * PAGE);
}

/* Asynchronous: what is written is told once, absent pages and zeros never are, and looking leaves no marker behind. */
static void scans(void **state)
{
	char *p = map_pages(512), *src = map_pages(64);
	bool here[512];
	struct runs r;
	uint64_t done;
	int fd;

	(void)state;
	NEED(FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN);
	r = (struct runs){ 0 };
	assert_int_equal(far_uffd_written(pagemap, at(p), PAGE, true, runs_add, &r), -EPERM);
	fd = open_uffd(far_uffd_have());
	assert_int_equal(far_uffd_register(fd, at(p), 512 * PAGE, FAR_UFFD_MISSING | FAR_UFFD_PROTECT), 0);
	assert_int_equal(written(p, 512 * PAGE, true, &r), 0);
	memset(src, 'z', 64 * PAGE);
	assert_int_equal(far_uffd_copy(fd, at(p) + 64 * PAGE, src, 64 * PAGE, FAR_UFFD_ARM, &done), 0);
	assert_int_equal(far_uffd_zero(fd, at(p) + 256 * PAGE, 64 * PAGE, 0, &done), 0);
	assert_int_equal(written(p, 512 * PAGE, true, &r), 0);

	p[70 * PAGE] = 1;
	p[71 * PAGE] = 1;
	p[100 * PAGE + 99] = 1;
	p[300 * PAGE] = 1;
	assert_int_equal(p[301 * PAGE], 0); /* loading from zeros is no store */
	for (int turn = 0; turn < 2; turn++) { /* a look that does not arm changes nothing */
		assert_int_equal(written(p, 512 * PAGE, turn == 1, &r), 3);
		assert_int_equal(r.addr[0], at(p) + 70 * PAGE);
		assert_int_equal(r.len[0], 2 * PAGE);
		assert_int_equal(r.addr[1], at(p) + 100 * PAGE);
		assert_int_equal(r.len[1], PAGE);
		assert_int_equal(r.addr[2], at(p) + 300 * PAGE);
	}
	assert_int_equal(written(p, 512 * PAGE, true, &r), 0);
	p[300 * PAGE] = 2;
	assert_int_equal(written(p + 300 * PAGE, PAGE, true, &r), 1);
	assert_int_equal(far_uffd_present(pagemap, at(p), 512 * PAGE, here), 0);
	for (int i = 0; i < 512; i++)
		assert_int_equal(here[i], (i >= 64 && i < 128) || (i >= 256 && i < 320));
	/* A page that was armed, dropped and filled again without arming counts as written. */
	assert_int_equal(far_uffd_unregister(fd, at(p), 512 * PAGE), 0);
	close(fd);
	munmap(p, 512 * PAGE);
	munmap(src, 64 * PAGE);
}

/* More runs than one call of the kernel's gives; a callback that fails does not lose what was armed. */
static void scans_many(void **state)
{
	uint64_t pages = 1024, seen = 0;
	char *p = map_pages(pages), *src = map_pages(pages);
	struct runs r = { .fail = -EIO };
	uint64_t done;
	int fd;

	(void)state;
	NEED(FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN);
	fd = open_uffd(far_uffd_have());
	assert_int_equal(far_uffd_register(fd, at(p), pages * PAGE, FAR_UFFD_MISSING | FAR_UFFD_PROTECT), 0);
	assert_int_equal(far_uffd_copy(fd, at(p), src, pages * PAGE, FAR_UFFD_ARM, &done), 0);
	for (uint64_t i = 0; i < pages; i += 2)
		p[i * PAGE] = 1;
	for (uint64_t i = 0; i < pages; i += 64)
		seen += written(p + i * PAGE, 64 * PAGE, false, &r);
	assert_int_equal(seen, pages / 2);
	r = (struct runs){ .fail = -EIO };
	assert_int_equal(far_uffd_written(pagemap, at(p), 64 * PAGE, true, runs_add, &r), -EIO);
	assert_int_equal(r.n, 32);
	assert_int_equal(written(p, 64 * PAGE, true, &r), 0);
	r = (struct runs){ 0 };
	assert_int_equal(far_uffd_written_whole(pagemap, at(p), 128 * PAGE, true, runs_add, &r), 0);
	assert_int_equal(r.n, 32);
	assert_int_equal(r.addr[31], at(p) + 126 * PAGE);
	assert_int_equal(r.len[31], PAGE);
	r.n = 0;
	assert_int_equal(far_uffd_written_whole(pagemap, at(p), 128 * PAGE, true, runs_add, &r), 0);
	assert_int_equal(r.n, 0);
	close(fd);
	munmap(p, pages * PAGE);
	munmap(src, pages * PAGE);
}

static void moves(void **state)
{
	char *p = map_huge(2, -1), *src = map_huge(2, -1);
	bool here[512];
	uint64_t done;
	int fd;

	(void)state;
	NEED(FAR_UFFD_MOVE);
	madvise(src, 2 * HUGE_PAGE, MADV_HUGEPAGE);
	fd = open_uffd(far_uffd_have());
	assert_int_equal(far_uffd_register(fd, at(p), 2 * HUGE_PAGE, FAR_UFFD_MISSING), 0);
	memset(src, 'm', 2 * HUGE_PAGE);
	assert_int_equal(far_uffd_move(fd, at(p), at(src), HUGE_PAGE, 0, &done), 0);
	assert_int_equal(done, HUGE_PAGE);
	assert_int_equal(p[HUGE_PAGE - 1], 'm');
	assert_int_equal(src[0], 0); /* it is gone from there */
	assert_int_equal(far_uffd_copy(fd, at(p) + HUGE_PAGE + 9 * PAGE, p, PAGE, 0, &done), 0);
	assert_int_equal(far_uffd_move(fd, at(p) + HUGE_PAGE, at(src) + HUGE_PAGE, HUGE_PAGE, 0, &done), -EEXIST);
	assert_int_equal(done, 9 * PAGE);
	madvise(src, 2 * HUGE_PAGE, MADV_DONTNEED);
	madvise(src, 2 * HUGE_PAGE, MADV_NOHUGEPAGE);
	src[12 * PAGE] = 'n';
	assert_int_equal(far_uffd_move(fd, at(p) + HUGE_PAGE + 16 * PAGE, at(src) + 10 * PAGE, 8 * PAGE, 0, &done), 0);
	assert_int_equal(done, 8 * PAGE);
	assert_int_equal(far_uffd_present(pagemap, at(p) + HUGE_PAGE, HUGE_PAGE, here), 0);
	for (int i = 0; i < 32; i++)
		assert_int_equal(here[i], i < 10 || i == 18);
	close(fd);
	munmap(p, 2 * HUGE_PAGE);
	munmap(src, 2 * HUGE_PAGE);
}

static void continues(void **state)
{
	unsigned arm = far_uffd_have() & FAR_UFFD_MINOR_WP ? FAR_UFFD_ARM : 0;
	struct far_uffd_event e;
	struct toucher t = { 0 };
	struct stat st;
	char *p, *alias;
	uint64_t done;
	bool here[512];
	int fd, mem = -1;

	(void)state;
	NEED(FAR_UFFD_MINOR | FAR_UFFD_HUGE);
	assert_int_equal(far_hugemem_open(HUGE_PAGE + 1, &mem), 0);
	assert_int_equal(fstat(mem, &st), 0);
	assert_int_equal(st.st_size, 2 * HUGE_PAGE);
	assert_int_equal(st.st_blocks, 0);
	p = map_huge(2, mem);
	alias = map_huge(2, mem);
	fd = open_uffd(far_uffd_have());
	assert_int_equal(far_uffd_register(fd, at(p), 2 * HUGE_PAGE,
					   FAR_UFFD_MISSING | FAR_UFFD_MINORS | (arm ? FAR_UFFD_PROTECT : 0)), 0);
	alias[5 * PAGE] = 'c';
	assert_int_equal(fstat(mem, &st), 0);
	assert_int_equal(st.st_blocks, HUGE_PAGE / 512); /* one huge page */
	t.p = p + 5 * PAGE;
	toucher_start(&t);
	await_event(fd, &e);
	assert_int_equal(e.kind, FAR_EVENT_MINOR);
	assert_int_equal(far_uffd_continue(fd, at(p) + 4 * PAGE, 2 * PAGE, arm, &done), 0);
	assert_int_equal(done, 2 * PAGE);
	far_thread_join(&t.thread);
	assert_int_equal(t.value, 'c');
	assert_int_equal(far_uffd_continue(fd, at(p) + 3 * PAGE, 2 * PAGE, arm, &done), -EEXIST);
	assert_int_equal(done, PAGE);
	assert_int_equal(far_uffd_present(pagemap, at(p), HUGE_PAGE, here), 0);
	for (int i = 0; i < 512; i++)
		assert_int_equal(here[i], i >= 3 && i < 6);
	if (arm && (far_uffd_have() & FAR_UFFD_WP_ASYNC)) {
		struct runs r;
		assert_int_equal(written(p, 2 * HUGE_PAGE, true, &r), 0);
		alias[4 * PAGE] = 'f'; /* filling is no store */
		assert_int_equal(written(p, 2 * HUGE_PAGE, true, &r), 0);
		p[4 * PAGE] = 's';
		assert_int_equal(written(p, 2 * HUGE_PAGE, true, &r), 1);
		assert_int_equal(r.addr[0], at(p) + 4 * PAGE);
	}
	close(fd);
	munmap(p, 2 * HUGE_PAGE);
	munmap(alias, 2 * HUGE_PAGE);
	close(mem);
}

static sigjmp_buf bus;

static void bus_caught(int sig)
{
	siglongjmp(bus, sig);
}

/* Whether a load raises SIGBUS. */
static bool raises(const volatile char *p)
{
	struct sigaction sa = { .sa_handler = bus_caught }, old;
	bool yes = true;

	sigaction(SIGBUS, &sa, &old);
	if (sigsetjmp(bus, 1) == 0) {
		(void)*p;
		yes = false;
	}
	sigaction(SIGBUS, &old, NULL);
	return yes;
}

static void poisons(void **state)
{
	char *p = map_pages(16), *src = map_pages(1);
	uint64_t done;
	int fd;

	(void)state;
	NEED(FAR_UFFD_POISON);
	fd = open_uffd(far_uffd_have() & ~(unsigned)FAR_UFFD_EVENTS);
	memset(src, 'h', PAGE);
	assert_int_equal(far_uffd_register(fd, at(p), 16 * PAGE, FAR_UFFD_MISSING), 0);
	assert_int_equal(far_uffd_poison(fd, at(p), 8 * PAGE, &done), 0);
	assert_int_equal(done, 8 * PAGE);
	assert_true(raises(p + PAGE));
	assert_int_equal(far_uffd_copy(fd, at(p) + PAGE, src, PAGE, 0, &done), 0); /* healed by filling */
	assert_false(raises(p + PAGE));
	assert_int_equal(p[PAGE], 'h');
	assert_true(raises(p + 2 * PAGE));
	assert_int_equal(far_uffd_poison(fd, at(p), 8 * PAGE, &done), -EEXIST);
	assert_int_equal(madvise(p + 2 * PAGE, PAGE, MADV_DONTNEED), 0); /* or by dropping: missing again */
	assert_int_equal(far_uffd_copy(fd, at(p) + 2 * PAGE, src, PAGE, 0, &done), 0);
	assert_int_equal(p[2 * PAGE], 'h');
	close(fd);
	munmap(p, 16 * PAGE);
	munmap(src, PAGE);
}

/* What the program does to its mappings while somebody reads the events. */
struct mapper {
	struct far_thread thread;
	char *p, *to;
	int what;
	atomic_bool done;
};

static void *mapper_run(void *arg)
{
	struct mapper *m = arg;

	if (m->what == FAR_EVENT_REMOVE)
		madvise(m->p, 4 * PAGE, MADV_DONTNEED);
	else if (m->what == FAR_EVENT_UNMAP)
		munmap(m->p, 4 * PAGE);
	else
		m->to = mremap(m->p, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, m->to);
	atomic_store(&m->done, true);
	return NULL;
}

static void mapper_start(struct mapper *m, int what, char *p)
{
	m->what = what;
	m->p = p;
	atomic_store(&m->done, false);
	assert_int_equal(far_thread_start(&m->thread, "mapper", mapper_run, m), 0);
}

/* Serves as a receiver that must read an event to get on. */
static int waiting_fd;
static struct far_uffd_event waiting_event;

static void waiting(void *arg)
{
	++*(int *)arg;
	await_event(waiting_fd, &waiting_event);
}

static void events(void **state)
{
	char *p = map_pages(16), *to = map_pages(4), *src = map_pages(1);
	struct mapper m = { 0 };
	struct far_uffd_event e;
	uint64_t done, old;
	int fd, called = 0, r;

	(void)state;
	NEED(FAR_UFFD_EVENTS);
	fd = open_uffd(far_uffd_have());
	assert_int_equal(far_uffd_register(fd, at(p), 16 * PAGE, FAR_UFFD_MISSING), 0);
	assert_int_equal(far_uffd_copy(fd, at(p), src, PAGE, 0, &done), 0);

	/* Nobody reads the event: a fill waits until the deadline, or until who fills has been told to let another read. */
	mapper_start(&m, FAR_EVENT_REMOVE, p);
	while (poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, 20000) != 1)
		;
	old = far_deadline_limit(far_now() + 20 * FAR_MSEC);
	r = far_uffd_copy(fd, at(p) + 8 * PAGE, src, PAGE, 0, &done);
	far_deadline_restore(old);
	assert_int_equal(r, -ETIMEDOUT);
	assert_int_equal(done, 0);
	assert_false(atomic_load(&m.done));
	waiting_fd = fd;
	far_uffd_on_wait(waiting, &called);
	assert_int_equal(far_uffd_copy(fd, at(p) + 8 * PAGE, src, PAGE, 0, &done), 0);
	far_uffd_on_wait(NULL, NULL);
	assert_int_equal(called, 1);
	assert_int_equal(waiting_event.kind, FAR_EVENT_REMOVE);
	assert_int_equal(waiting_event.addr, at(p));
	assert_int_equal(waiting_event.len, 4 * PAGE);
	far_thread_join(&m.thread);

	m.to = to;
	mapper_start(&m, FAR_EVENT_REMAP, p + 4 * PAGE);
	await_event(fd, &e);
	if (e.kind == FAR_EVENT_UNMAP) /* what was at the new place: was not ours, but kernels differ */
		await_event(fd, &e);
	assert_int_equal(e.kind, FAR_EVENT_REMAP);
	assert_int_equal(e.addr, at(p) + 4 * PAGE);
	assert_int_equal(e.to, at(to));
	assert_int_equal(e.len, 4 * PAGE);
	if (poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, 100) == 1) {
		await_event(fd, &e);
		assert_int_equal(e.kind, FAR_EVENT_UNMAP);
	}
	far_thread_join(&m.thread);
	assert_int_equal(far_uffd_copy(fd, at(to), src, PAGE, 0, &done), 0);
	assert_int_equal(far_uffd_copy(fd, at(p) + 4 * PAGE, src, PAGE, 0, &done), -ENOENT);

	mapper_start(&m, FAR_EVENT_UNMAP, p + 12 * PAGE);
	await_event(fd, &e);
	assert_int_equal(e.kind, FAR_EVENT_UNMAP);
	assert_int_equal(e.addr, at(p) + 12 * PAGE);
	assert_int_equal(e.len, 4 * PAGE);
	far_thread_join(&m.thread);
	assert_int_equal(far_uffd_read(fd, &e), 0);
	assert_int_equal(far_uffd_unregister(fd, at(p), 4 * PAGE), 0);
	close(fd);
	munmap(to, 4 * PAGE);
	munmap(src, PAGE);
}

static void *forker_run(void *arg)
{
	volatile char *p = arg;
	pid_t pid = fork();
	int status = -1;

	if (pid == 0) /* the page that appears is the child's own */
		_exit(p[0] == 'f' && p[PAGE] == 'p' ? 0 : 1);
	while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	return status == 0 ? NULL : arg;
}

static void forks(void **state)
{
	char *p = map_pages(4), *src = map_pages(2);
	struct far_thread thread = { 0 };
	struct far_uffd_event e, of_child;
	uint64_t done;
	void *failed = NULL;
	bool here[4];
	int fd;

	(void)state;
	NEED(FAR_UFFD_FORK);
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
	print_message("skipped: the thread sanitizer holds its locks in fork(), which waits for a thread that needs them\n");
	skip();
#endif
#endif
	fd = open_uffd(far_uffd_have());
	assert_int_equal(far_uffd_register(fd, at(p), 4 * PAGE, FAR_UFFD_MISSING), 0);
	memset(src, 'f', PAGE);
	memset(src + PAGE, 'p', PAGE);
	assert_int_equal(far_uffd_copy(fd, at(p) + PAGE, src + PAGE, PAGE, 0, &done), 0);
	assert_int_equal(far_thread_start(&thread, "forker", forker_run, p), 0);
	await_event(fd, &e);
	assert_int_equal(e.kind, FAR_EVENT_FORK);
	assert_true(e.fd >= 0);
	assert_true(fcntl(e.fd, F_GETFL) & O_NONBLOCK);
	await_event(e.fd, &of_child);
	assert_int_equal(of_child.kind, FAR_EVENT_MISSING);
	assert_int_equal(of_child.addr, at(p));
	assert_int_equal(far_uffd_copy(e.fd, of_child.addr, src, PAGE, 0, &done), 0);
	pthread_join(thread.t, &failed);
	assert_null(failed);
	assert_int_equal(far_uffd_present(pagemap, at(p), 4 * PAGE, here), 0);
	assert_false(here[0]);
	assert_int_equal(far_uffd_copy(e.fd, at(p), src, PAGE, 0, &done), -ESRCH);
	close(e.fd);
	close(fd);
	munmap(p, 4 * PAGE);
	munmap(src, 2 * PAGE);
}

static void hugemem(void **state)
{
	int fd = -1;
	char *p, line[256];
	bool huge = false;
	FILE *f;

	(void)state;
	NEED(FAR_UFFD_HUGE);
	assert_int_equal(far_hugemem_open(4 * HUGE_PAGE, &fd), 0);
	p = map_huge(4, fd);
	madvise(p, 4 * HUGE_PAGE, MADV_HUGEPAGE);
	memset(p, 1, 4 * HUGE_PAGE);
	f = fopen("/proc/self/smaps", "r");
	assert_non_null(f);
	while (fgets(line, sizeof line, f)) {
		unsigned long kb;
		if (sscanf(line, "ShmemPmdMapped: %lu kB", &kb) == 1 && kb == 4 * HUGE_PAGE / 1024)
			huge = true;
	}
	fclose(f);
	assert_true(huge);
	assert_int_equal(waitpid(-1, NULL, WNOHANG), -1); /* no child is left, nor shown */
	munmap(p, 4 * HUGE_PAGE);
	close(fd);
	assert_int_equal(far_hugemem_open(UINT64_MAX, &fd), -EOPNOTSUPP);
}

/* The same without a privilege: a user namespace, and userfaultfd in user mode. */
static void as_nobody(void **state)
{
	int status;
	pid_t pid;

	(void)state;
	if (geteuid() != 0) {
		print_message("skipped: needs root to become somebody else\n");
		skip();
	}
	pid = fork();
	if (pid == 0) {
		char *p, *src;
		int fd = -1;
		uint64_t done;
		unsigned have;
		/* Whoever gave rights away may not look at himself in /proc until he says that others may, too. */
		if (setgid(65534) || setuid(65534) || prctl(PR_SET_DUMPABLE, 1, 0, 0, 0))
			_exit(1);
		have = far_uffd_probe("");
		if (!(have & FAR_UFFD_ANY))
			_exit(77);
		if (have & FAR_UFFD_FORK)
			_exit(2);
		if (far_uffd_open(have, &fd))
			_exit(3);
		p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		src = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		src[0] = 'n';
		if (far_uffd_register(fd, at(p), PAGE, FAR_UFFD_MISSING) || far_uffd_copy(fd, at(p), src, PAGE, 0, &done))
			_exit(4);
		if (have & FAR_UFFD_HUGE) {
			int mem = -1;
			if (far_hugemem_open(HUGE_PAGE, &mem) || waitpid(-1, NULL, WNOHANG) != -1)
				_exit(5);
		}
		_exit(p[0] == 'n' ? (have & FAR_UFFD_HUGE ? 0 : 78) : 6);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	if (WEXITSTATUS(status) == 77 || WEXITSTATUS(status) == 78) {
		print_message("skipped: nobody may use %s here\n", WEXITSTATUS(status) == 77 ? "userfaultfd" : "user namespaces");
		skip();
	}
	assert_int_equal(WEXITSTATUS(status), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(masks),	cmocka_unit_test(environment), cmocka_unit_test(copies),
		cmocka_unit_test(zeros),	cmocka_unit_test(protects),    cmocka_unit_test(scans),
		cmocka_unit_test(scans_many),	cmocka_unit_test(moves),       cmocka_unit_test(continues),
		cmocka_unit_test(poisons),	cmocka_unit_test(events),      cmocka_unit_test(forks),
		cmocka_unit_test(hugemem),	cmocka_unit_test(as_nobody),
	};

	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	return cmocka_run_group_tests_name("uffd", tests, NULL, NULL);
}
