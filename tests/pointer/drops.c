/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The kernel lets a program go on to drop pages before anybody knows that it has dropped them. What it does meanwhile is
 * played here step by step, without receivers: a push that reads the pages before they are gone, and then a flush, which
 * must bring the zeros all the same.
 */
#define _GNU_SOURCE
#include "frontend/memory_int.h"

#include "base/clock.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmocka.h>

#define PAGE 4096u
#define SHIFT 14u
#define CHUNK (1u << SHIFT)
#define BYTES (8u * CHUNK)

static struct {
	struct far_backend *remote;
	struct far_memory *m;
	struct far_region *r;
	char *p, *beside; /* beside: registered as well, and nobody's */
	int uffd, pagemap;
	struct far_mutex evicting;
	_Atomic bool over;
	_Atomic unsigned put_back;
} it;

static char byte_at(uint64_t off)
{
	return (char)(1 + off % 251);
}

static void region_open(bool events, bool evicts)
{
	unsigned have = far_uffd_have() & ~(unsigned)(FAR_UFFD_FORK | (events ? 0 : FAR_UFFD_EVENTS));
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_backend *store;
	struct far_error err;
	char uri[32], buf[BYTES];

	snprintf(uri, sizeof uri, "mem:%u", BYTES);
	assert_int_equal(far_open(uri, NULL, &it.remote, &err), 0);
	for (unsigned k = 0; k < BYTES; k++)
		buf[k] = byte_at(k);
	assert_int_equal(far_write(it.remote, 0, buf, BYTES, 0), 0);
	it.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	assert_int_equal(far_uffd_open(have, &it.uffd), 0);
	it.p = mmap(NULL, 2 * BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	assert_ptr_not_equal(it.p, MAP_FAILED);
	it.beside = it.p + BYTES;
	assert_int_equal(far_uffd_register(it.uffd, (uint64_t)(uintptr_t)it.p, 2 * BYTES, FAR_UFFD_MISSING | FAR_UFFD_PROTECT), 0);
	struct far_handover_range range = { .addr = (uint64_t)(uintptr_t)it.p, .len = BYTES };
	const struct far_memory_conf mc = { .uffd = it.uffd, .pagemap = it.pagemap, .mem = -1, .range = &range, .n = 1,
					    .bytes = BYTES, .shift = SHIFT, .mechanism = FAR_MECH_COPY, .tracking = FAR_TRACK_ASYNC,
					    .evicts = evicts,
					    .have = have & ~(unsigned)FAR_UFFD_EVENTS, .shared = -1, .remote = it.remote };
	assert_int_equal(far_memory_new(&mc, &it.m, &store), 0);
	o.chunk = CHUNK;
	o.pull_workers = 0;
	o.push_workers = 0;
	const struct far_region_conf rc = { .memory = far_memory_calls(it.m), .remote = it.remote, .remote_borrowed = true,
					    .local = store, .local_is_zero = true, .opts = &o };
	assert_int_equal(far_region_open(&rc, &it.r, &err), 0);
	assert_int_equal(far_region_wait(it.r, 0, BYTES), 0);
	assert_int_equal(far_region_flush(it.r), 0);
}

static void region_close(void)
{
	far_region_close(it.r);
	far_close(it.remote);
	close(it.uffd);
	close(it.pagemap);
	munmap(it.p, 2 * BYTES);
}

/* What a receiver does when it has read that the program drops [off, off+len). */
static void told(uint64_t off, uint64_t len)
{
	far_memory_dropping(it.m, off, len);
	far_memory_removed(it.m, (uint64_t)(uintptr_t)it.p + off, len);
	assert_int_equal(far_memory_discarded(it.m, it.r, off, len), 0);
	far_memory_dropped(it.m, off, len);
}

static void drop(uint64_t off, uint64_t len)
{
	assert_int_equal(madvise(it.p + off, len, MADV_DONTNEED), 0);
}

static void touch(uint64_t off)
{
	assert_true(far_region_hold(it.r, off));
	assert_int_equal(far_memory_appear(it.m, (uint64_t)(uintptr_t)it.p + off), 0);
	far_region_release(it.r, off);
	assert_int_equal(it.p[off], 0);
}

/* [off, off+len) of the remote is zero, or as it was at first. */
static void remote_is(uint64_t off, uint64_t len, bool zero)
{
	char buf[BYTES];

	assert_int_equal(far_read(it.remote, off, buf, len, 0), 0);
	for (uint64_t k = 0; k < len; k++)
		if (buf[k] != (zero ? 0 : byte_at(off + k)))
			fail_msg("byte %u of the remote is %d", (unsigned)(off + k), buf[k]);
}

static void flush(void)
{
	assert_int_equal(far_region_flush(it.r), 0);
}

/* As after so many other pushes, or so long, that this one is not compared once more. */
static void forget_pushes(void)
{
	far_mutex_lock(&it.m->lock);
	for (unsigned k = 0; k < MEM_RECENT; k++)
		it.m->recent[k].len = 0;
	far_mutex_unlock(&it.m->lock);
}

/* The flush of somebody else, before the pages are gone: as often as it likes it pushes what was there. */
static void told_and_pushed(uint64_t off, uint64_t len)
{
	told(off, len);
	flush();
	flush();
	remote_is(off, len, false);
	forget_pushes();
}

static void seen_when_absent(void **state)
{

	region_open(false, false);
	told_and_pushed(CHUNK + PAGE, 2 * CHUNK);
	drop(CHUNK + PAGE, 2 * CHUNK);
	flush();
	remote_is(CHUNK + PAGE, 2 * CHUNK, true);
	remote_is(0, CHUNK + PAGE, false);
	remote_is(3 * CHUNK + PAGE, CHUNK, false);
	region_close();
}

/* A page that is there again, as zeros, before anybody has seen it absent. */
static void touched_again(void **state)
{

	region_open(false, false);
	told_and_pushed(CHUNK, 2 * CHUNK);
	drop(CHUNK, 2 * CHUNK);
	touch(CHUNK + PAGE); /* and what lies behind it */
	touch(2 * CHUNK + PAGE);
	flush();
	remote_is(CHUNK, 2 * CHUNK, true);
	region_close();
}

/* A fault that was met by somebody else is no sign that the page has been dropped. */
static void touched_before(void **state)
{
	region_open(false, false);
	told_and_pushed(0, CHUNK);
	for (unsigned k = 0; k < CHUNK; k += PAGE)
		assert_int_equal(far_memory_appear(it.m, (uint64_t)(uintptr_t)it.p + k), 0);
	flush();
	forget_pushes();
	drop(0, CHUNK);
	flush();
	remote_is(0, CHUNK, true);
	region_close();
}

static void dropped_in_two_steps(void **state)
{

	region_open(false, false);
	told_and_pushed(0, 2 * CHUNK);
	drop(0, PAGE);
	touch(0);
	flush();
	remote_is(0, PAGE, true);
	remote_is(PAGE, 2 * CHUNK - PAGE, false);
	drop(PAGE, 2 * CHUNK - PAGE);
	flush();
	remote_is(0, 2 * CHUNK, true);
	region_close();
}

static void *drop_beside(void *arg)
{
	(void)arg;
	assert_int_equal(madvise(it.beside, PAGE, MADV_DONTNEED), 0);
	return NULL;
}

static void *drop_first(void *arg)
{
	(void)arg;
	drop(0, CHUNK);
	return NULL;
}

static void event_read(void)
{
	struct far_uffd_event e;

	while (far_uffd_read(it.uffd, &e) <= 0)
		usleep(100);
	assert_int_equal(e.kind, FAR_EVENT_REMOVE);
}

/* The kernel does not tell whether it is this drop or another that is not through. */
static void while_others_drop(void **state)
{
	static const _Alignas(4096) char zeros[PAGE];
	struct far_thread t;
	uint64_t done;

	if (!(far_uffd_have() & FAR_UFFD_EVENTS))
		skip();
	region_open(true, false);
	told_and_pushed(0, CHUNK);
	assert_int_equal(far_thread_start(&t, "first", drop_first, NULL), 0);
	event_read();
	far_thread_join(&t);
	assert_int_equal(far_thread_start(&t, "beside", drop_beside, NULL), 0);
	while (far_uffd_copy(it.uffd, PAGE, zeros, PAGE, FAR_UFFD_ONCE, &done) != -EAGAIN)
		usleep(100);
	flush();
	remote_is(0, CHUNK, true);
	event_read();
	far_thread_join(&t);
	region_close();
}

static void *told_first(void *arg)
{
	(void)arg;
	told(0, CHUNK);
	return NULL;
}

/* Whoever is told waits a moment for the pages to go; what another pushes in that moment is of before. */
static void pushed_while_it_is_told(void **state)
{
	unsigned met = 0;

	for (unsigned k = 0; k < 50; k++) {
		struct far_thread t;
		char buf[CHUNK];
		region_open(false, false);
		assert_int_equal(far_thread_start(&t, "told", told_first, NULL), 0);
		while (!far_mem_drops_late(it.m, 0, CHUNK))
			far_cpu_relax();
		far_sleep_until(far_now() + k * 20 * FAR_USEC, false);
		flush();
		forget_pushes();
		assert_int_equal(far_read(it.remote, 0, buf, CHUNK, 0), 0);
		met += buf[0] != 0 && far_mem_drops_late(it.m, 0, CHUNK);
		drop(0, CHUNK);
		far_thread_join(&t);
		flush();
		remote_is(0, CHUNK, true);
		region_close();
	}
	print_message("# %u of 50 in that moment\n", met);
}

/* Evicts a chunk that has been stored into, which nobody has noted: its pages are put back each time. */
static void *evict_in_vain(void *arg)
{
	(void)arg;
	while (!it.over) {
		far_mutex_lock(&it.m->lock);
		it.m->suspect.n = 0;
		far_mutex_unlock(&it.m->lock);
		far_mutex_lock(&it.evicting);
		it.put_back += far_mem_evict(it.m, 0, CHUNK) == -EBUSY;
		far_mutex_unlock(&it.evicting);
	}
	return NULL;
}

/* Pages that are elsewhere for a moment when the program drops them do not come back. */
static void dropped_while_they_are_evicted(void **state)
{
	const uint64_t last = CHUNK - PAGE;
	struct far_thread t;
	bool here;

	if (!(far_uffd_have() & FAR_UFFD_MOVE))
		skip();
	region_open(false, true);
	far_mutex_init(&it.evicting);
	it.over = false;
	it.put_back = 0;
	it.p[0] ^= 1;
	it.p[last] = 7;
	assert_int_equal(far_thread_start(&t, "evict", evict_in_vain, NULL), 0);
	for (unsigned k = 0; k < 200; k++) {
		unsigned began = it.put_back;
		while (it.put_back < began + 2)
			far_cpu_relax();
		for (uint64_t until = far_now() + k * 37 % 20000; far_now() < until;)
			;
		far_memory_reading(it.m, true);
		far_memory_dropping(it.m, last, PAGE);
		far_memory_removed(it.m, (uint64_t)(uintptr_t)it.p + last, PAGE);
		far_memory_reading(it.m, false);
		drop(last, PAGE);
		assert_int_equal(far_memory_discarded(it.m, it.r, last, PAGE), 0);
		far_memory_dropped(it.m, last, PAGE);
		far_mutex_lock(&it.evicting);
		assert_int_equal(far_uffd_present(it.pagemap, (uint64_t)(uintptr_t)it.p + last, PAGE, &here), 0);
		if (here)
			fail_msg("what was dropped is there again, in round %u", k);
		touch(last);
		it.p[last] = 7;
		far_mutex_unlock(&it.evicting);
	}
	it.over = true;
	far_thread_join(&t);
	print_message("# put back %u times\n", it.put_back);
	assert_true(it.put_back > 0);
	far_mutex_fini(&it.evicting);
	region_close();
}

/* Locked pages cannot be moved, so nothing is in the attic: nobody may wait there while events are not read. (The sanitizers
 * make mlock() do nothing, hence the system calls.) */
static void locked_pages_stay(void **state)
{
	region_open(false, true);
	if (syscall(SYS_mlock, it.p + PAGE, PAGE)) {
		region_close();
		skip();
	}
	alarm(20);
	assert_int_equal(far_mem_evict(it.m, 0, CHUNK), -EBUSY);
	alarm(0);
	for (unsigned k = 0; k < CHUNK; k++)
		assert_int_equal(it.p[k], byte_at(k));
	assert_int_equal(syscall(SYS_munlock, it.p + PAGE, PAGE), 0);
	region_close();
}

int main(void)
{
	const unsigned need = FAR_UFFD_ANY | FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN;
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(seen_when_absent),  cmocka_unit_test(touched_again),
		cmocka_unit_test(touched_before),
		cmocka_unit_test(dropped_in_two_steps), cmocka_unit_test(while_others_drop),
		cmocka_unit_test(pushed_while_it_is_told), cmocka_unit_test(dropped_while_they_are_evicted),
		cmocka_unit_test(locked_pages_stay),
	};

	if ((far_uffd_have() & need) != need) {
		printf("the kernel does not note stores by itself\n");
		return 77;
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
