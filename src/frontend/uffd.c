/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * userfaultfd and PAGEMAP_SCAN.
 *
 * What a kernel can do is asked for once and cut by FARPAGE_WITHOUT; nothing else in the tree looks at versions. The
 * kernel's calls for filling stop early in two ways, which are both hidden here:
 *
 *     -EAGAIN, some bytes done     something is in the way at the next page, or the mappings are about to change: again
 *                                  from there, and the real error, if there is one, comes with no bytes done
 *     -EAGAIN, nothing done        a fork, mremap, munmap or madvise of the program waits until its event has been read
 *                                  from this very descriptor
 *
 * The second is why nobody may wait here who alone reads events: far_uffd_on_wait() tells the receiver in time.
 *
 * What a scan calls written. A page is written when it is here (in memory or swapped out), not write-protected, and not
 * the kernel's page of zeros: a store into that one puts another page in its place. So pages that appear as zeros need no
 * arming. Absent pages are asked for by nobody. The kernel has a way that is three times as fast for a mask of one bit,
 * but it counts absent pages and zeros as written and leaves a marker in each (seen on 6.18), and UFFDIO_MOVE fails over
 * markers: far_uffd_written_whole() is for who knows that every page is there.
 */
#define _GNU_SOURCE
#include "frontend/uffd.h"

#include "base/clock.h"
#include "base/thread.h"
#include "frontend/uffd_abi.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define UFFD_MADV_COLLAPSE 25 /* 6.1 */
#define UFFD_EVENTS (UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP)

static const struct {
	unsigned bit;
	const char *word;
	unsigned takes; /* what goes with it */
} uffd_words[] = {
	{ FAR_UFFD_MOVE, "move" },
	{ FAR_UFFD_POISON, "poison" },
	{ FAR_UFFD_WP_ASYNC, "wp_async" },
	{ FAR_UFFD_SCAN, "scan", FAR_UFFD_WP_ASYNC | FAR_UFFD_COLLAPSE },
	{ FAR_UFFD_WP, "wp", FAR_UFFD_WP_SHMEM | FAR_UFFD_WP_ASYNC | FAR_UFFD_MINOR_WP },
	{ FAR_UFFD_WP_SHMEM, "wp_shmem", FAR_UFFD_MINOR_WP },
	{ FAR_UFFD_MINOR, "minor", FAR_UFFD_MINOR_WP },
	{ FAR_UFFD_MINOR_WP, "minor_wp" },
	{ FAR_UFFD_COLLAPSE, "collapse" },
	{ FAR_UFFD_HUGE, "huge" },
	{ FAR_UFFD_THP, "thp" },
	{ FAR_UFFD_EVENTS, "events" },
	{ FAR_UFFD_FORK, "fork" },
	{ FAR_UFFD_KERNEL, "kernel" },
	{ FAR_UFFD_ANY, "uffd", ~0u },
};
/* What Debian 12's own kernel lacks. */
static const char *const uffd_6_1[] = { "move", "poison", "wp_async", "scan", "minor_wp" };

static struct far_mutex uffd_lock = FAR_MUTEX_INIT;
static bool uffd_asked;    /* under uffd_lock */
static unsigned uffd_here; /* under uffd_lock */
static char uffd_why[200]; /* under uffd_lock until uffd_asked */

static uint64_t uffd_page(void)
{
	return (uint64_t)sysconf(_SC_PAGESIZE);
}

static __thread void (*uffd_wait_fn)(void *arg);
static __thread void *uffd_wait_arg;

void far_uffd_on_wait(void (*fn)(void *arg), void *arg)
{
	uffd_wait_fn = fn;
	uffd_wait_arg = arg;
}

void far_uffd_will_wait(void)
{
	if (uffd_wait_fn)
		uffd_wait_fn(uffd_wait_arg);
}

/* ------------------------------------------------------------------------------------------- what is here */

static bool uffd_listed(const char *list, const char *word)
{
	size_t n;

	for (const char *p = list ? list : ""; *p; p += n + (p[n] != '\0')) {
		n = strcspn(p, ", ");
		if (n == strlen(word) && !strncmp(p, word, n))
			return true;
	}
	return false;
}

static bool uffd_masked(const char *list, const char *word)
{
	if (uffd_listed(list, word))
		return true;
	for (size_t i = 0; i < FAR_ARRAY_LEN(uffd_6_1); i++)
		if (!strcmp(word, uffd_6_1[i]))
			return uffd_listed(list, "6.1");
	return false;
}

bool far_without(const char *word)
{
	return uffd_masked(getenv("FARPAGE_WITHOUT"), word);
}

/* A word that means nothing would test nothing. */
static void uffd_check_list(const char *list)
{
	size_t n, i;

	for (const char *p = list ? list : ""; *p; p += n + (p[n] != '\0')) {
		n = strcspn(p, ", ");
		for (i = 0; i < FAR_ARRAY_LEN(uffd_words); i++)
			if (n == strlen(uffd_words[i].word) && !strncmp(p, uffd_words[i].word, n))
				break;
		if (n && i == FAR_ARRAY_LEN(uffd_words) && !(n == 3 && !strncmp(p, "6.1", n)) &&
		    !(n == 4 && !strncmp(p, "fuse", n)))
			far_log(FAR_LOG_WARNING, "FARPAGE_WITHOUT: '%.*s' is no feature that can be masked", (int)n, p);
	}
}

static int uffd_new(bool kernel)
{
	int flags = O_CLOEXEC | O_NONBLOCK, fd, dev;

	if (!kernel)
		return (int)syscall(SYS_userfaultfd, flags | UFFD_USER_MODE_ONLY);
	fd = (int)syscall(SYS_userfaultfd, flags);
	if (fd >= 0)
		return fd;
	dev = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	if (dev >= 0)
		fd = ioctl(dev, FAR_UFFD_DEV_NEW, flags);
	far_fd_close(&dev);
	return fd;
}

static int uffd_api(int fd, uint64_t want, uint64_t *got)
{
	struct uffdio_api api = { .api = UFFD_API, .features = want };

	if (ioctl(fd, UFFDIO_API, &api))
		return -errno;
	*got = api.features;
	return 0;
}

static bool uffd_fork_allowed(bool kernel)
{
	uint64_t got;
	int fd = uffd_new(kernel);
	bool yes = fd >= 0 && uffd_api(fd, UFFD_FEATURE_EVENT_FORK, &got) == 0;

	far_fd_close(&fd);
	return yes;
}

static bool uffd_scan_works(void)
{
	struct far_pm_scan_arg a = { .size = sizeof a, .category_mask = FAR_PAGE_PRESENT, .return_mask = FAR_PAGE_PRESENT };
	struct far_page_region r;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), n = -1;

	a.start = (uintptr_t)&r & ~(uint64_t)(uffd_page() - 1);
	a.end = a.start + uffd_page();
	a.vec = (uintptr_t)&r;
	a.vec_len = 1;
	if (fd >= 0)
		n = ioctl(fd, FAR_PAGEMAP_SCAN, &a);
	far_fd_close(&fd);
	return n >= 0;
}

/* Private memory in huge pages, at least for who asks. */
static bool uffd_thp(void)
{
	char text[64] = "";
	int fd = open("/sys/kernel/mm/transparent_hugepage/enabled", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);

	far_fd_close(&fd);
	return n > 0 && !strstr(text, "[never]");
}

static unsigned uffd_translate(uint64_t features)
{
	static const struct {
		uint64_t features;
		unsigned bit;
	} map[] = {
		{ UFFD_FEATURE_PAGEFAULT_FLAG_WP, FAR_UFFD_WP },
		{ UFFD_FEATURE_PAGEFAULT_FLAG_WP | FAR_FEATURE_WP_SHMEM, FAR_UFFD_WP_SHMEM },
		{ UFFD_FEATURE_PAGEFAULT_FLAG_WP | FAR_FEATURE_WP_ASYNC, FAR_UFFD_WP_ASYNC },
		{ FAR_FEATURE_MOVE, FAR_UFFD_MOVE },
		{ FAR_FEATURE_POISON, FAR_UFFD_POISON },
		{ UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_SHMEM, FAR_UFFD_MINOR },
		/* Nothing says that CONTINUE can arm (6.4); POISON is the next feature that came. */
		{ UFFD_FEATURE_MINOR_SHMEM | FAR_FEATURE_WP_SHMEM | FAR_FEATURE_POISON, FAR_UFFD_MINOR_WP },
		{ UFFD_EVENTS, FAR_UFFD_EVENTS },
	};
	unsigned have = FAR_UFFD_ANY;

	for (size_t i = 0; i < FAR_ARRAY_LEN(map); i++)
		if ((features & map[i].features) == map[i].features)
			have |= map[i].bit;
	return have;
}

static void uffd_explain(char *why, size_t n, int code)
{
	if (code == ENOSYS)
		snprintf(why, n, "this kernel has no userfaultfd: use one with CONFIG_USERFAULTFD");
	else if (code == EPERM || code == EACCES)
		snprintf(why, n, "userfaultfd is refused to this process: allow the system call (a container's seccomp profile?)");
	else
		snprintf(why, n, "userfaultfd does not work here: %s", far_strerror(code));
}

static unsigned uffd_ask(const char *without, char *why, size_t n)
{
	uint64_t features = 0;
	unsigned have = 0;
	int fd, r;

	why[0] = '\0';
	if (uffd_masked(without, "uffd")) {
		snprintf(why, n, "FARPAGE_WITHOUT names uffd: take that word away");
		return 0;
	}
	fd = uffd_new(true);
	if (fd >= 0)
		have = FAR_UFFD_KERNEL;
	else
		fd = uffd_new(false);
	r = fd < 0 ? -errno : uffd_api(fd, 0, &features);
	far_fd_close(&fd);
	if (r) {
		uffd_explain(why, n, -r);
		return 0;
	}
	have |= uffd_translate(features);
	if (uffd_fork_allowed(have & FAR_UFFD_KERNEL))
		have |= FAR_UFFD_FORK;
	if (uffd_scan_works())
		have |= FAR_UFFD_SCAN;
	else
		have &= ~(unsigned)FAR_UFFD_WP_ASYNC;
	if (uffd_thp())
		have |= FAR_UFFD_THP;
	/* No length: the kernel only says whether it knows the advice. */
	if ((have & FAR_UFFD_SCAN) && madvise(NULL, 0, UFFD_MADV_COLLAPSE) == 0)
		have |= FAR_UFFD_COLLAPSE;
	for (size_t i = 0; i < FAR_ARRAY_LEN(uffd_words); i++)
		if (uffd_masked(without, uffd_words[i].word))
			have &= ~(uffd_words[i].bit | uffd_words[i].takes);
	if (!uffd_masked(without, "huge")) {
		r = far_hugemem_open(1, &fd);
		if (r == 0)
			have |= FAR_UFFD_HUGE;
		if (r == 0)
			far_fd_close(&fd);
	}
	return have;
}

unsigned far_uffd_have(void)
{
	unsigned have;

	far_mutex_lock(&uffd_lock);
	if (!uffd_asked) {
		uffd_check_list(getenv("FARPAGE_WITHOUT"));
		uffd_here = uffd_ask(getenv("FARPAGE_WITHOUT"), uffd_why, sizeof uffd_why);
		uffd_asked = true;
	}
	have = uffd_here;
	far_mutex_unlock(&uffd_lock);
	return have;
}

unsigned far_uffd_probe(const char *without)
{
	char why[sizeof uffd_why];

	return uffd_ask(without, why, sizeof why);
}

const char *far_uffd_word(unsigned bit)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(uffd_words); i++)
		if (uffd_words[i].bit == bit)
			return uffd_words[i].word;
	return "?";
}

const char *far_uffd_why(void)
{
	far_uffd_have();
	return uffd_why;
}

/* -------------------------------------------------------------------------------------------- descriptors */

static uint64_t uffd_features(unsigned have)
{
	static const struct {
		unsigned bit;
		uint64_t features;
	} map[] = {
		{ FAR_UFFD_WP, UFFD_FEATURE_PAGEFAULT_FLAG_WP },
		{ FAR_UFFD_WP_SHMEM, FAR_FEATURE_WP_SHMEM },
		{ FAR_UFFD_WP_ASYNC, FAR_FEATURE_WP_ASYNC },
		{ FAR_UFFD_MOVE, FAR_FEATURE_MOVE },
		{ FAR_UFFD_POISON, FAR_FEATURE_POISON },
		{ FAR_UFFD_MINOR, UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_SHMEM },
		{ FAR_UFFD_EVENTS, UFFD_EVENTS },
		{ FAR_UFFD_FORK, UFFD_FEATURE_EVENT_FORK },
	};
	uint64_t want = 0;

	for (size_t i = 0; i < FAR_ARRAY_LEN(map); i++)
		if (have & map[i].bit)
			want |= map[i].features;
	return want;
}

int far_uffd_open(unsigned have, int *fd)
{
	uint64_t got = 0, want = uffd_features(have);
	int u = uffd_new(have & FAR_UFFD_KERNEL), r;

	if (u < 0)
		return -errno;
	r = uffd_api(u, want, &got);
	if (r == 0 && (got & want) != want)
		r = -EOPNOTSUPP;
	if (r) {
		far_fd_close(&u);
		return r;
	}
	*fd = u;
	return 0;
}

int far_uffd_register(int fd, uint64_t addr, uint64_t len, unsigned modes)
{
	struct uffdio_register reg = { .range = { addr, len } };

	if (modes & FAR_UFFD_MISSING)
		reg.mode |= UFFDIO_REGISTER_MODE_MISSING;
	if (modes & FAR_UFFD_PROTECT)
		reg.mode |= UFFDIO_REGISTER_MODE_WP;
	if (modes & FAR_UFFD_MINORS)
		reg.mode |= UFFDIO_REGISTER_MODE_MINOR;
	return ioctl(fd, UFFDIO_REGISTER, &reg) ? -errno : 0;
}

int far_uffd_unregister(int fd, uint64_t addr, uint64_t len)
{
	struct uffdio_range range = { addr, len };

	return ioctl(fd, UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

/* ------------------------------------------------------------------------------------------------ filling */

/* The mappings are changing. Most changes last microseconds; an event that nobody reads lasts as long as that. */
int far_uffd_wait(unsigned *turns)
{
	unsigned n = (*turns)++;

	if (n < 64) {
		far_cpu_relax();
		return 0;
	}
	if (n == 64 && uffd_wait_fn) {
		uffd_wait_fn(uffd_wait_arg);
		return 0;
	}
	if (far_deadline() <= far_now())
		return -ETIMEDOUT;
	if (n < 96)
		far_thread_yield();
	else
		far_sleep_until(far_now() + 50 * FAR_USEC, false);
	return 0;
}

/* After a call that gave `r` and says to have done `moved` of `left` bytes: 1 go on, 0 all done, or -errno. */
static int uffd_step(int r, int64_t moved, uint64_t left, uint64_t *done, unsigned *turns)
{
	int code = r ? errno : 0;

	if (code == 0 && (moved <= 0 || (uint64_t)moved > left))
		moved = (int64_t)left;
	if (moved > 0) {
		*done += far_min((uint64_t)moved, left);
		*turns = 0;
		return (uint64_t)moved < left;
	}
	if (code != EAGAIN && code != EINTR)
		return -code;
	r = far_uffd_wait(turns);
	return r ? r : 1;
}

int far_uffd_copy(int fd, uint64_t addr, const void *src, uint64_t len, unsigned flags, uint64_t *done)
{
	uint64_t n = 0;
	unsigned turns = 0;
	int r = len ? 1 : 0;

	while (r == 1) {
		struct uffdio_copy c = { .dst = addr + n, .src = (uintptr_t)src + n, .len = len - n };
		if (flags & FAR_UFFD_NO_WAKE)
			c.mode |= UFFDIO_COPY_MODE_DONTWAKE;
		if (flags & FAR_UFFD_ARM)
			c.mode |= UFFDIO_COPY_MODE_WP;
		r = ioctl(fd, UFFDIO_COPY, &c);
		if (r && errno == EAGAIN && (flags & FAR_UFFD_ONCE)) {
			n += c.copy > 0 ? far_min((uint64_t)c.copy, len - n) : 0;
			r = -EAGAIN;
			break;
		}
		r = uffd_step(r, c.copy, len - n, &n, &turns);
	}
	if (done)
		*done = n;
	return r;
}

/* ZEROPAGE cannot arm, and protecting afterwards would miss a store in between: zeros are copied then. */
static int uffd_zero_armed(int fd, uint64_t addr, uint64_t len, unsigned flags, uint64_t *done)
{
	static const char zeros[64 * 1024] __attribute__((aligned(4096)));
	uint64_t n = 0, part = 0;
	int r = 0;

	while (r == 0 && n < len) {
		r = far_uffd_copy(fd, addr + n, zeros, far_min(len - n, sizeof zeros), flags, &part);
		n += part;
	}
	if (done)
		*done = n;
	return r;
}

int far_uffd_zero(int fd, uint64_t addr, uint64_t len, unsigned flags, uint64_t *done)
{
	uint64_t n = 0;
	unsigned turns = 0;
	int r = len ? 1 : 0;

	if (flags & FAR_UFFD_ARM)
		return uffd_zero_armed(fd, addr, len, flags, done);
	while (r == 1) {
		struct uffdio_zeropage z = { .range = { addr + n, len - n } };
		if (flags & FAR_UFFD_NO_WAKE)
			z.mode |= UFFDIO_ZEROPAGE_MODE_DONTWAKE;
		r = ioctl(fd, UFFDIO_ZEROPAGE, &z);
		r = uffd_step(r, z.zeropage, len - n, &n, &turns);
	}
	if (done)
		*done = n;
	return r;
}

int far_uffd_continue(int fd, uint64_t addr, uint64_t len, unsigned flags, uint64_t *done)
{
	uint64_t n = 0;
	unsigned turns = 0;
	int r = len ? 1 : 0;

	while (r == 1) {
		struct uffdio_continue c = { .range = { addr + n, len - n } };
		if (flags & FAR_UFFD_NO_WAKE)
			c.mode |= UFFDIO_CONTINUE_MODE_DONTWAKE;
		if (flags & FAR_UFFD_ARM)
			c.mode |= FAR_CONTINUE_MODE_WP;
		r = ioctl(fd, UFFDIO_CONTINUE, &c);
		if (r && errno == EAGAIN && (flags & FAR_UFFD_ONCE)) {
			n += c.mapped > 0 ? far_min((uint64_t)c.mapped, len - n) : 0;
			r = -EAGAIN;
			break;
		}
		r = uffd_step(r, c.mapped, len - n, &n, &turns);
	}
	if (done)
		*done = n;
	return r;
}

/* The kernel's advice to gather pages into a huge one finds one that is whole already, and has but to enter it into the page
 * table. It skips memory that this process may not have in huge pages, and says so or not: whoever touches it then has a
 * fault again. */
bool far_uffd_show_huge(int fd, uint64_t addr, uint64_t len)
{
	return madvise((void *)(uintptr_t)addr, (size_t)len, UFFD_MADV_COLLAPSE) == 0 && far_uffd_wake(fd, addr, len) == 0;
}

int far_uffd_move(int fd, uint64_t addr, uint64_t src, uint64_t len, unsigned flags, uint64_t *done)
{
	uint64_t n = 0;
	unsigned turns = 0;
	int r = len ? 1 : 0;

	while (r == 1) {
		struct far_uffdio_move m = { .dst = addr + n, .src = src + n, .len = len - n,
					     .mode = FAR_MOVE_MODE_ALLOW_SRC_HOLES };
		if (flags & FAR_UFFD_NO_WAKE)
			m.mode |= FAR_MOVE_MODE_DONTWAKE;
		r = ioctl(fd, FAR_UFFDIO_MOVE, &m);
		if (r && errno == EAGAIN && (flags & FAR_UFFD_ONCE)) {
			n += m.move > 0 ? far_min((uint64_t)m.move, len - n) : 0;
			r = -EAGAIN;
			break;
		}
		r = uffd_step(r, m.move, len - n, &n, &turns);
	}
	if (done)
		*done = n;
	return r;
}

int far_uffd_poison(int fd, uint64_t addr, uint64_t len, uint64_t *done)
{
	uint64_t n = 0;
	unsigned turns = 0;
	int r = len ? 1 : 0;

	while (r == 1) {
		struct far_uffdio_poison p = { .range = { addr + n, len - n } };
		r = ioctl(fd, FAR_UFFDIO_POISON, &p);
		r = uffd_step(r, p.updated, len - n, &n, &turns);
	}
	if (done)
		*done = n;
	return r;
}

int far_uffd_protect(int fd, uint64_t addr, uint64_t len, bool protect, unsigned flags)
{
	struct uffdio_writeprotect w = { .range = { addr, len } };
	unsigned turns = 0;
	int r;

	if (protect)
		w.mode |= UFFDIO_WRITEPROTECT_MODE_WP;
	else if (flags & FAR_UFFD_NO_WAKE)
		w.mode |= UFFDIO_WRITEPROTECT_MODE_DONTWAKE;
	while (ioctl(fd, UFFDIO_WRITEPROTECT, &w)) {
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
		r = far_uffd_wait(&turns);
		if (r)
			return r;
	}
	return 0;
}

int far_uffd_wake(int fd, uint64_t addr, uint64_t len)
{
	struct uffdio_range range = { addr, len };

	return ioctl(fd, UFFDIO_WAKE, &range) ? -errno : 0;
}

/* ------------------------------------------------------------------------------------------- what is there */

/* `what` to look for, without the range and the room for answers. */
static int uffd_scan(int pagemap, const struct far_pm_scan_arg *what, uint64_t addr, uint64_t len,
		     int (*fn)(void *opaque, uint64_t addr, uint64_t len), void *opaque)
{
	struct far_page_region found[128];
	uint64_t end = addr + len;
	int r = 0;

	while (r == 0 && addr < end) {
		struct far_pm_scan_arg a = *what;
		int n;
		a.size = sizeof a;
		a.start = addr;
		a.end = end;
		a.vec = (uintptr_t)found;
		a.vec_len = FAR_ARRAY_LEN(found);
		n = ioctl(pagemap, FAR_PAGEMAP_SCAN, &a);
		if (n < 0 && errno == EINTR && a.walk_end <= addr)
			continue;
		if (n < 0)
			return -errno;
		/* What was armed must be told, also after fn() failed: nobody else will find it. */
		for (int i = 0; i < n; i++) {
			int one = fn(opaque, found[i].start, found[i].end - found[i].start);
			if (r == 0)
				r = one;
			if (r && !(a.flags & FAR_SCAN_WP_MATCHING))
				break;
		}
		if (a.walk_end <= addr)
			return -EIO;
		addr = a.walk_end;
	}
	return r;
}

bool far_uffd_huge(int pagemap, uint64_t addr)
{
	struct far_page_region found;
	struct far_pm_scan_arg a = { .size = sizeof a, .start = addr, .end = addr + uffd_page(), .vec = (uintptr_t)&found,
				     .vec_len = 1, .category_mask = FAR_PAGE_HUGE, .return_mask = FAR_PAGE_HUGE };

	return ioctl(pagemap, FAR_PAGEMAP_SCAN, &a) == 1;
}

int far_uffd_written(int pagemap, uint64_t addr, uint64_t len, bool arm,
		     int (*fn)(void *opaque, uint64_t addr, uint64_t len), void *opaque)
{
	struct far_pm_scan_arg what = {
		.flags = FAR_SCAN_CHECK_WPASYNC | (arm ? FAR_SCAN_WP_MATCHING : 0), .category_inverted = FAR_PAGE_PFNZERO,
		.category_mask = FAR_PAGE_WRITTEN | FAR_PAGE_PFNZERO,
		.category_anyof_mask = FAR_PAGE_PRESENT | FAR_PAGE_SWAPPED, .return_mask = FAR_PAGE_WRITTEN,
	};

	return uffd_scan(pagemap, &what, addr, len, fn, opaque);
}

int far_uffd_written_whole(int pagemap, uint64_t addr, uint64_t len, bool arm,
			   int (*fn)(void *opaque, uint64_t addr, uint64_t len), void *opaque)
{
	/* This mask and no other takes the kernel's fast way. */
	struct far_pm_scan_arg what = {
		.flags = FAR_SCAN_CHECK_WPASYNC | (arm ? FAR_SCAN_WP_MATCHING : 0),
		.category_mask = FAR_PAGE_WRITTEN, .return_mask = FAR_PAGE_WRITTEN,
	};

	return uffd_scan(pagemap, &what, addr, len, fn, opaque);
}

static int uffd_pages(int pagemap, uint64_t addr, uint64_t len, uint64_t mask, bool *here)
{
	uint64_t entry[512], page = uffd_page();
	size_t pages = (size_t)(len / page);

	for (size_t i = 0, n; i < pages; i += n) {
		ssize_t got;
		n = (size_t)far_min(pages - i, FAR_ARRAY_LEN(entry));
		do
			got = pread(pagemap, entry, n * sizeof entry[0], (off_t)((addr / page + i) * sizeof entry[0]));
		while (got < 0 && errno == EINTR);
		if (got < 0)
			return -errno;
		n = (size_t)got / sizeof entry[0];
		if (n == 0)
			return -ESRCH;
		for (size_t j = 0; j < n; j++)
			here[i + j] = (entry[j] & mask) != 0;
	}
	return 0;
}

int far_uffd_present(int pagemap, uint64_t addr, uint64_t len, bool *here)
{
	return uffd_pages(pagemap, addr, len, FAR_PM_PRESENT | FAR_PM_SWAP, here);
}

int far_uffd_mapped(int pagemap, uint64_t addr, uint64_t len, bool *here)
{
	return uffd_pages(pagemap, addr, len, FAR_PM_PRESENT, here);
}

/* ------------------------------------------------------------------------------------------------- events */

static void uffd_fault(const struct uffd_msg *m, struct far_uffd_event *e)
{
	uint64_t flags = m->arg.pagefault.flags;

	e->kind = flags & UFFD_PAGEFAULT_FLAG_WP ? FAR_EVENT_STORE :
		  flags & UFFD_PAGEFAULT_FLAG_MINOR ? FAR_EVENT_MINOR : FAR_EVENT_MISSING;
	e->write = flags & UFFD_PAGEFAULT_FLAG_WRITE;
	e->len = uffd_page();
	e->addr = m->arg.pagefault.address & ~(e->len - 1);
}

/* Never blocks, where the kernel can do that (6.10), whatever the process that handed the descriptor over has made of it:
 * O_NONBLOCK belongs to both. */
static ssize_t uffd_read_now(int fd, struct uffd_msg *m)
{
	static _Atomic bool cannot;
	struct iovec v = { m, sizeof *m };

	if (!atomic_load_explicit(&cannot, memory_order_relaxed)) {
		ssize_t n = preadv2(fd, &v, 1, -1, RWF_NOWAIT);
		if (n >= 0 || errno == EAGAIN || errno == EINTR)
			return n;
		if (errno != EOPNOTSUPP && errno != EINVAL && errno != ENOSYS && errno != ESPIPE)
			return n;
		atomic_store_explicit(&cannot, true, memory_order_relaxed);
	}
	return read(fd, m, sizeof *m);
}

int far_uffd_read(int fd, struct far_uffd_event *e)
{
	struct uffd_msg m;
	ssize_t n;

	*e = (struct far_uffd_event){ .fd = -1 };
	do
		n = uffd_read_now(fd, &m);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return errno == EAGAIN ? 0 : -errno;
	if (n != sizeof m)
		return -EPROTO;
	switch (m.event) {
	case UFFD_EVENT_PAGEFAULT:
		uffd_fault(&m, e);
		return 1;
	case UFFD_EVENT_FORK:
		e->kind = FAR_EVENT_FORK;
		e->fd = (int)m.arg.fork.ufd;
		return 1;
	case UFFD_EVENT_REMAP:
		e->kind = FAR_EVENT_REMAP;
		e->addr = m.arg.remap.from;
		e->to = m.arg.remap.to;
		e->len = m.arg.remap.len;
		return 1;
	case UFFD_EVENT_REMOVE:
	case UFFD_EVENT_UNMAP:
		e->kind = m.event == UFFD_EVENT_REMOVE ? FAR_EVENT_REMOVE : FAR_EVENT_UNMAP;
		e->addr = m.arg.remove.start;
		e->len = m.arg.remove.end - m.arg.remove.start;
		return 1;
	default:
		return -EPROTO;
	}
}
