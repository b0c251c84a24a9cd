/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What a pointer is held against: the least that serves page faults, and plain memory.
 *
 *     bare seq SIZE BYTES same|each       touch every page in order            MiB/s, us a fault
 *     bare single SIZE BYTES N PAUSE_US   touch N random chunks of BYTES       p50 and p99 in us
 *     bare first SIZE BYTES N PAUSE_US    the same, the touched page first     p50 and p99 in us
 *     bare plain SIZE                     map shared memory, populated; read   MiB/s
 *     bare read SIZE 4k|huge              read private memory again and again  MiB/s
 *     bare store SIZE 4k|huge             store into each page again and again ns a page
 *     bare hash SIZE                      XXH3 of each 64 KiB                  ms
 *     bare most SIZE copy|move|continue   fill it, nobody waits for it         MiB/s
 *
 * A handler is a thread that is pinned to a CPU: a blocking read(2) of the userfaultfd, one UFFDIO_COPY of BYTES around
 * the fault out of memory, and again. "same" has one, on the CPU of the program, which is the fastest there is for one
 * program that stays where it is; "each" has one on every CPU.
 *
 * "first" brings the touched page alone, and the rest of its BYTES, as "most" does, when the program goes on: what is left of
 * the CPU's caches after that is what the next fault finds.
 *
 * "most" is no opponent but the ceiling: a thread on every CPU that does nothing but copy from memory and call UFFDIO_COPY
 * for 256 KiB each, or UFFDIO_MOVE for a huge page that it has filled, or fill a huge page of a tmpfs and have it entered into
 * another mapping (MADV_COLLAPSE). No pager can be faster on this machine at this hour: what is left is the kernel's zeroing
 * of new memory and one copy.
 */
#define _GNU_SOURCE
#include "cli/bench_touch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xxhash.h>
#ifdef HAVE_XXH_DISPATCH
#include <xxh_x86dispatch.h>
#endif

#define BARE_CHUNK 65536
#define BARE_ROUNDS 5
#define BARE_PIECE ((uint64_t)256 << 10)

struct bare {
	int fd;
	uint64_t bytes;     /* one fault brings */
	char *memory, *source;
	char *alias;        /* "most", continue: the other mapping of what is memory then */
	size_t size;
	int first;          /* a page alone, before the rest of `bytes` */
	size_t brought;     /* chunks, with "first"; atomic */
	int cpu;            /* of the next handler */
};

static int bare_fail(const char *what)
{
	fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
	return 1;
}

static uint64_t bare_word(uint64_t off)
{
	return (off / 8 + 1) * 0x9e3779b97f4a7c15u;
}

static char *bare_map(size_t size, int advice)
{
	char *p = mmap(NULL, size + (2 << 20), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return NULL;
	p = (char *)(((uintptr_t)p + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
	madvise(p, size, advice);
	return p;
}

static void bare_fill(char *p, size_t size)
{
	for (size_t off = 0; off < size; off += 8)
		*(uint64_t *)(void *)(p + off) = bare_word(off);
}

static void bare_pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

static void bare_bring(const struct bare *b, uint64_t off, uint64_t len)
{
	struct uffdio_copy c = { .dst = (uintptr_t)b->memory + off, .src = (uintptr_t)b->source + off, .len = len };

	if (ioctl(b->fd, UFFDIO_COPY, &c) < 0 && errno == EEXIST)
		ioctl(b->fd, UFFDIO_WAKE, &(struct uffdio_range){ c.dst, c.len });
}

/* The page at `at`, then what is around it in its chunk, which begins at off. */
static void bare_bring_first(struct bare *b, uint64_t at, uint64_t off)
{
	uint64_t end = off + b->bytes, n;

	bare_bring(b, at, TOUCH_PAGE);
	sched_yield(); /* the program may have been woken on this CPU */
	for (; off < end; off += n) {
		n = (off < at ? at : end) - off;
		n = n < BARE_PIECE ? n : BARE_PIECE;
		if (off == at)
			n = TOUCH_PAGE;
		else
			bare_bring(b, off, n);
	}
	__atomic_fetch_add(&b->brought, 1, __ATOMIC_RELEASE);
}

static void *bare_handler(void *arg)
{
	struct bare *b = arg;
	struct uffd_msg msg;

	bare_pin(__atomic_fetch_add(&b->cpu, 1, __ATOMIC_RELAXED));
	for (;;) {
		if (read(b->fd, &msg, sizeof msg) != (ssize_t)sizeof msg || msg.event != UFFD_EVENT_PAGEFAULT)
			continue;
		uint64_t at = msg.arg.pagefault.address - (uintptr_t)b->memory, off = at & ~(b->bytes - 1);
		if (b->first)
			bare_bring_first(b, at & ~(uint64_t)(TOUCH_PAGE - 1), off);
		else
			bare_bring(b, off, b->bytes < b->size - off ? b->bytes : b->size - off);
	}
	return NULL;
}

/* A file of a tmpfs that gives huge pages, mounted nowhere. */
static int bare_tmpfs(size_t size)
{
	int fs = (int)syscall(430 /* fsopen */, "tmpfs", 1), mnt = -1, fd = -1;

	if (fs >= 0 && syscall(431 /* fsconfig */, fs, 1, "huge", "always", 0) == 0 && syscall(431, fs, 1, "size", "0", 0) == 0 &&
	    syscall(431, fs, 6 /* create */, NULL, NULL, 0) == 0)
		mnt = (int)syscall(432 /* fsmount */, fs, 1, 0);
	if (mnt >= 0)
		fd = openat(mnt, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (fd >= 0 && ftruncate(fd, (off_t)size))
		close(fd), fd = -1;
	close(mnt);
	close(fs);
	return fd;
}

/* In place of the private memory: the file, twice. */
static int bare_share(struct bare *b, size_t size)
{
	int fd = bare_tmpfs(size);

	if (fd < 0)
		return bare_fail("tmpfs");
	b->alias = bare_map(size, MADV_HUGEPAGE);
	b->memory = bare_map(size, MADV_HUGEPAGE);
	if (!b->alias || !b->memory ||
	    mmap(b->alias, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED ||
	    mmap(b->memory, size, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
		return bare_fail("mmap");
	close(fd);
	return 0;
}

/* The memory and its source. */
static int bare_open(struct bare *b, size_t size, uint64_t bytes, uint64_t features)
{
	uint64_t minor = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_SHMEM;
	struct uffdio_api api = { .api = UFFD_API, .features = features };

	*b = (struct bare){ .fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC), .bytes = bytes, .size = size };
	if (b->fd < 0)
		b->fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY */);
	if (b->fd < 0 || ioctl(b->fd, UFFDIO_API, &api) < 0)
		return bare_fail("userfaultfd");
	b->source = bare_map(size, MADV_HUGEPAGE);
	if (!b->source)
		return bare_fail("mmap");
	bare_fill(b->source, size);
	char *warm = bare_map(size, MADV_NOHUGEPAGE);
	if (!warm)
		return bare_fail("mmap");
	touch_store_pages(warm, size, 1);
	munmap(warm, size);
	if (features == minor && bare_share(b, size))
		return 1;
	if (!b->alias)
		b->memory = bare_map(size, features ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	struct uffdio_register reg = { .range = { (uintptr_t)b->memory, size }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	if (b->alias)
		reg.mode |= UFFDIO_REGISTER_MODE_MINOR;
	if (!b->memory || ioctl(b->fd, UFFDIO_REGISTER, &reg) < 0)
		return bare_fail("UFFDIO_REGISTER");
	return 0;
}

/* And the handlers; `same`: one, on this thread's CPU, which is CPU 0 from now on. */
static int bare_start(struct bare *b, size_t size, uint64_t bytes, int same)
{
	int n = same ? 1 : (int)sysconf(_SC_NPROCESSORS_ONLN);
	pthread_t t;

	if (bare_open(b, size, bytes, 0))
		return 1;
	for (int i = 0; i < n; i++)
		if ((errno = pthread_create(&t, NULL, bare_handler, b)) != 0)
			return bare_fail("pthread_create");
	if (same)
		bare_pin(0);
	touch_pause(20000000); /* they are in read(2) by then, or a little later: no matter */
	return 0;
}

static int bare_check(const struct bare *b)
{
	for (size_t off = 0; off < b->size; off += TOUCH_PAGE)
		if (touch_read(b->memory + off) != bare_word(off)) {
			fprintf(stderr, "bare: wrong bytes at %zu\n", off);
			return 1;
		}
	return 0;
}

static int bare_seq(size_t size, uint64_t bytes, int same)
{
	struct bare b;

	if (bare_start(&b, size, bytes, same))
		return 1;
	uint64_t begin = touch_now();
	touch_pages(b.memory, size);
	double ns = (double)(touch_now() - begin);
	printf("%.1f %.2f\n", (double)size / 1048576 / (ns / 1e9), ns / 1e3 / ((double)size / (double)bytes));
	return bare_check(&b);
}

static void bare_settle(void *arg, size_t i)
{
	struct bare *b = arg;

	while (__atomic_load_n(&b->brought, __ATOMIC_ACQUIRE) < i)
		touch_pause(100000);
}

static int bare_single(size_t size, uint64_t bytes, size_t n, uint64_t pause, int first)
{
	uint32_t *order = touch_shuffled((uint32_t)(size / bytes), 1);
	uint64_t *ns;
	struct bare b;

	if (n > size / bytes)
		n = size / bytes;
	ns = calloc(n, sizeof *ns);
	if (!order || !ns || bare_start(&b, size, bytes, 0))
		return bare_fail("single");
	b.first = first; /* no handler has anything to do yet */
	uint64_t wrong = touch_chunks(b.memory, order, n, bytes, pause, 1, ns, bare_word, first ? bare_settle : NULL, &b);
	struct touch_times t = touch_times(ns, n);
	printf("%.2f %.2f\n", (double)t.p50 / 1e3, (double)t.p99 / 1e3);
	free(order);
	free(ns);
	return wrong != 0;
}

/* linux/userfaultfd.h of 6.8 */
struct bare_move {
	__u64 dst, src, len, mode;
	__s64 move;
};
#define BARE_MOVE _IOWR(0xAA, 0x05, struct bare_move)
#define BARE_HUGE ((size_t)2 << 20)

struct bare_most {
	struct bare *b;
	int move, cpu;
	size_t next; /* atomic */
};

static int bare_most_piece(struct bare_most *m, char *stage, size_t off, size_t piece)
{
	struct bare_move mv = { (uintptr_t)m->b->memory + off, (uintptr_t)stage, piece, 0, 0 };
	struct uffdio_copy c = { .dst = mv.dst, .src = mv.src, .len = piece };
	char *to = m->b->alias ? m->b->alias + off : stage;

	memcpy(to, m->b->source + off, piece);
	if (m->b->alias)
		return madvise(m->b->memory + off, piece, 25 /* MADV_COLLAPSE */);
	return m->move ? ioctl(m->b->fd, BARE_MOVE, &mv) : ioctl(m->b->fd, UFFDIO_COPY, &c);
}

static void *bare_most_thread(void *arg)
{
	struct bare_most *m = arg;
	size_t piece = m->move || m->b->alias ? BARE_HUGE : BARE_HUGE / 8, off;
	char *stage = bare_map(piece, m->move ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);

	bare_pin(__atomic_fetch_add(&m->cpu, 1, __ATOMIC_RELAXED));
	while (stage && (off = __atomic_fetch_add(&m->next, BARE_HUGE, __ATOMIC_RELAXED)) < m->b->size)
		for (size_t end = off + BARE_HUGE; off < end; off += piece)
			if (bare_most_piece(m, stage, off, piece)) {
				perror("bare: most");
				_exit(1);
			}
	return NULL;
}

static int bare_most(size_t size, const char *how)
{
	uint64_t minor = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_SHMEM;
	int move = strcmp(how, "move") == 0;
	int n = (int)sysconf(_SC_NPROCESSORS_ONLN);
	struct bare b;
	struct bare_most m = { .b = &b, .move = move };
	pthread_t t[256];

	n = n > 256 ? 256 : n;
	if (bare_open(&b, size, TOUCH_PAGE, move ? (uint64_t)1 << 16 : strcmp(how, "continue") == 0 ? minor : 0))
		return 1;
	uint64_t begin = touch_now();
	for (int i = 0; i < n; i++)
		if ((errno = pthread_create(&t[i], NULL, bare_most_thread, &m)) != 0)
			return bare_fail("pthread_create");
	for (int i = 0; i < n; i++)
		pthread_join(t[i], NULL);
	printf("%.1f 0\n", (double)size / 1048576 / ((double)(touch_now() - begin) / 1e9));
	return bare_check(&b);
}

static int bare_plain(size_t size)
{
	int fd = memfd_create("bare", MFD_CLOEXEC);
	char *p;

	if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
		return bare_fail("memfd");
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return bare_fail("mmap");
	bare_fill(p, size);
	munmap(p, size);
	uint64_t begin = touch_now();
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (p == MAP_FAILED)
		return bare_fail("mmap");
	uint64_t sum = touch_sum(p, size);
	printf("%.1f 0 %c\n", (double)size / 1048576 / ((double)(touch_now() - begin) / 1e9), sum ? '.' : '!');
	return 0;
}

/* What memory of our own does, whose pages are all there. */
static int bare_local(size_t size, int huge, int store)
{
	char *p = bare_map(size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	uint64_t best = UINT64_MAX, sum = 0;

	if (!p)
		return bare_fail("mmap");
	bare_fill(p, size);
	for (unsigned i = 0; i < BARE_ROUNDS; i++) {
		uint64_t begin = touch_now();
		if (store)
			touch_store_pages(p, size, i);
		else
			sum += touch_sum(p, size);
		uint64_t ns = touch_now() - begin;
		best = ns < best ? ns : best;
	}
	if (store)
		printf("%.3f 0\n", (double)best / (double)(size / TOUCH_PAGE));
	else
		printf("%.1f 0 %c\n", (double)size / 1048576 / ((double)best / 1e9), sum ? '.' : '!');
	return 0;
}

static int bare_hash(size_t size)
{
	char *p = bare_map(size, MADV_HUGEPAGE);
	uint64_t best = UINT64_MAX, sum = 0;

	if (!p)
		return bare_fail("mmap");
	bare_fill(p, size);
	for (unsigned i = 0; i < BARE_ROUNDS; i++) {
		uint64_t begin = touch_now();
		for (size_t off = 0; off < size; off += BARE_CHUNK)
			sum += XXH3_64bits(p + off, BARE_CHUNK);
		uint64_t ns = touch_now() - begin;
		best = ns < best ? ns : best;
	}
	printf("%.3f 0 %c\n", (double)best / 1e6, sum ? '.' : '!');
	return 0;
}

int main(int argc, char **argv)
{
	size_t size = argc > 2 ? strtoull(argv[2], NULL, 10) & ~((size_t)(2 << 20) - 1) : 0;
	uint64_t bytes = argc > 3 ? strtoull(argv[3], NULL, 10) : 0;
	int pages = bytes >= TOUCH_PAGE && (bytes & (bytes - 1)) == 0, huge = argc > 3 && strcmp(argv[3], "huge") == 0;

	if (size && argc == 5 && pages && strcmp(argv[1], "seq") == 0)
		return bare_seq(size, bytes, strcmp(argv[4], "same") == 0);
	if (size && argc == 6 && pages && (strcmp(argv[1], "single") == 0 || strcmp(argv[1], "first") == 0))
		return bare_single(size, bytes, strtoull(argv[4], NULL, 10), strtoull(argv[5], NULL, 10) * 1000, argv[1][0] == 'f');
	if (size && argc == 3 && strcmp(argv[1], "plain") == 0)
		return bare_plain(size);
	if (size && argc == 4 && (strcmp(argv[1], "read") == 0 || strcmp(argv[1], "store") == 0))
		return bare_local(size, huge, argv[1][0] == 's');
	if (size && argc == 3 && strcmp(argv[1], "hash") == 0)
		return bare_hash(size);
	if (size && argc == 4 && strcmp(argv[1], "most") == 0)
		return bare_most(size, argv[3]);
	fprintf(stderr, "usage: bare seq SIZE BYTES same|each, single|first SIZE BYTES N PAUSE_US, plain SIZE,\n"
			"       read SIZE 4k|huge, store SIZE 4k|huge, hash SIZE, most SIZE copy|move|continue\n");
	return 2;
}
