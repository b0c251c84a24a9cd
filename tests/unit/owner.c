/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Who may write: sessions, generations, the lease, the record beside the content. */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "backend/record.h"

#include "base/clock.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cmocka.h>

#define SIZE (4 * FAR_MIB)
#define A 0xaaaa
#define B 0xbbbb
#define LONG_MS 60000

static char dir[] = "/tmp/far-owner-XXXXXX";

static struct far_backend *open_uri(const char *uri)
{
	struct far_error err = { 0 };
	struct far_backend *b = NULL;

	if (far_open(uri, NULL, &b, &err))
		fail_msg("%s", err.text);
	return b;
}

static struct far_backend *open_file(const char *name)
{
	char uri[200];

	snprintf(uri, sizeof uri, "file:%s/%s?size=4M", dir, name);
	return open_uri(uri);
}

static bool attributes(void)
{
	struct far_backend *b = open_file("probe");
	bool yes = far_record_write(b, "x", 1) == 0;

	far_close(b);
	if (!yes)
		print_message("skipped: %s has no extended attributes\n", dir);
	return yes;
}

static struct far_owner *owner_new(struct far_backend *b, uint32_t ms)
{
	struct far_owner *o = NULL;

	assert_int_equal(far_owner_new(b, ms, &o), 0);
	return o;
}

static int lease(struct far_owner *o, uint64_t session, const char *writer, uint64_t epoch, struct far_lease *l)
{
	struct far_lease fresh = FAR_LEASE_INIT;

	fresh.version = l->version;
	fresh.take_over = l->take_over;
	fresh.release = l->release;
	*l = fresh;
	l->writer = writer;
	l->holder = writer;
	l->epoch = epoch;
	int r = far_owner_lease(o, session, 1, l);
	l->release = false;
	return r;
}

static int change(struct far_owner *o, uint64_t session, uint64_t generation)
{
	int r = far_owner_change_begin(o, session, generation, 0);

	if (r == 0)
		far_owner_change_end(o, session, generation, 0, 4096, true);
	return r;
}

static void both(struct far_owner *o)
{
	assert_int_equal(far_owner_session(o, A, 1), 0);
	assert_int_equal(far_owner_session(o, B, 1), 0);
}

/* ------------------------------------------------------------------------------------------------------ tests */

static void test_lease(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_lease l = FAR_LEASE_INIT;

	assert_int_equal(lease(o, A, "a", 0, &l), -ENOTCONN);
	both(o);
	far_owner_connected(o, A, 1);
	assert_int_equal(lease(o, A, "", 0, &l), -EINVAL);
	assert_int_equal(lease(o, A, "a b", 0, &l), -EINVAL);
	assert_int_equal(lease(o, 0, "a", 0, &l), -ENOTCONN);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	assert_true(l.origin.epoch == 1 && l.ttl_ms == LONG_MS && l.origin.identity[0]);
	assert_string_equal(l.origin.writer, "a");
	assert_int_equal(lease(o, A, "a", 1, &l), 0); /* renewed */
	assert_true(l.origin.epoch == 1);

	assert_int_equal(lease(o, B, "b", 0, &l), -EBUSY);
	assert_true(l.left_ms > LONG_MS / 2 && l.left_ms <= LONG_MS && !l.gone && !l.ttl_ms);
	assert_string_equal(l.other, "a");
	far_owner_connected(o, A, -1);
	assert_int_equal(lease(o, B, "b", 0, &l), -EBUSY);
	assert_true(l.gone);
	assert_int_equal(change(o, A, 1), 0);
	assert_int_equal(change(o, B, 1), -ESTALE);
	assert_int_equal(change(o, 0, 0), -ESTALE);
	assert_int_equal(change(o, 0xcccc, 1), -ENOTCONN);
	assert_int_equal(change(o, A, 2), -ENOTCONN);

	l.release = true;
	assert_int_equal(lease(o, B, "b", 0, &l), -ESTALE); /* it is not its to give back */
	l.release = true;
	assert_int_equal(lease(o, A, "a", 1, &l), 0);
	assert_int_equal(lease(o, B, "b", 0, &l), 0);
	assert_true(l.origin.epoch == 2);
	assert_int_equal(lease(o, A, "a", 1, &l), -ESTALE);
	assert_true(l.origin.epoch == 2);
	assert_int_equal(change(o, A, 1), -ESTALE);
	far_owner_free(o);
	far_close(b);
}

/* A lease that is not renewed ends; then its writer may go on until somebody else changes something. */
static void test_expiry(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, 60);
	struct far_lease l = FAR_LEASE_INIT;
	uint64_t start = far_now();

	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	while (lease(o, B, "b", 0, &l) == -EBUSY) {
		assert_true(far_now() - start < 10 * FAR_SEC);
		far_sleep_until(far_now() + FAR_MSEC, false);
	}
	assert_true(far_now() - start >= 60 * FAR_MSEC);
	assert_true(l.origin.epoch == 2);
	assert_int_equal(change(o, A, 1), -ESTALE);

	start = far_now();
	while (change(o, 0, 0) == -ESTALE) {
		assert_true(far_now() - start < 10 * FAR_SEC);
		far_sleep_until(far_now() + FAR_MSEC, false);
	}
	assert_int_equal(lease(o, B, "b", 2, &l), -ESTALE); /* somebody without a lease has written */
	assert_true(l.origin.epoch == 3 && !l.origin.writer[0]);
	assert_int_equal(change(o, B, 1), -ESTALE); /* and what b still had to say is not said over it */
	assert_int_equal(change(o, 0, 0), 0);
	far_owner_free(o);
	far_close(b);
}

static void test_lapsed_goes_on(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, 1);
	struct far_lease l = FAR_LEASE_INIT;

	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	far_sleep_until(far_now() + 3 * FAR_MSEC, false);
	assert_int_equal(change(o, A, 1), 0);
	assert_int_equal(lease(o, A, "a", 1, &l), 0);
	assert_true(l.origin.epoch == 1);
	far_owner_free(o);
	far_close(b);
}

static void test_take_over(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_lease l = FAR_LEASE_INIT;

	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	l.take_over = true;
	assert_int_equal(lease(o, B, "b", 0, &l), 0);
	assert_true(l.origin.epoch == 2);
	l.take_over = false;
	assert_int_equal(lease(o, A, "a", 1, &l), -ESTALE);
	assert_string_equal(l.other, "b");
	assert_int_equal(change(o, A, 1), -ESTALE);
	l.take_over = true; /* over what is newer, and of a content that was put back */
	l.version = 1000;
	assert_int_equal(lease(o, A, "a", 9, &l), 0);
	assert_true(l.origin.epoch == 10 && l.origin.version == 1000);
	assert_int_equal(change(o, A, 1), 0);
	far_owner_free(o);
	far_close(b);
}

/* The same writer comes back with another session: at once, with the same epoch, and its old session is over. */
static void test_restarted_writer(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_lease l = FAR_LEASE_INIT;

	both(o);
	assert_int_equal(lease(o, A, "w", 0, &l), 0);
	assert_int_equal(lease(o, B, "w", 0, &l), -EBUSY); /* it does not know what it had: that may be somebody else */
	assert_int_equal(lease(o, B, "w", 1, &l), 0);
	assert_true(l.origin.epoch == 1);
	assert_int_equal(change(o, A, 1), -ESTALE);
	assert_int_equal(lease(o, A, "w", 1, &l), -ESTALE); /* two of the same id do not take turns */
	assert_int_equal(change(o, B, 1), 0);
	far_owner_free(o);
	far_close(b);
}

struct waiter {
	struct far_thread t;
	struct far_owner *o;
	uint64_t session, generation;
	struct far_lease *l;
	int r;
	_Atomic bool done;
};

static void *waiter_run(void *arg)
{
	struct waiter *w = arg;

	w->r = w->l ? far_owner_lease(w->o, w->session, 1, w->l) : far_owner_session(w->o, w->session, w->generation);
	atomic_store(&w->done, true);
	return NULL;
}

static void test_generations(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, LONG_MS);

	assert_int_equal(far_owner_session(o, 0, 0), 0);
	assert_int_equal(far_owner_session(o, A, 0), -EINVAL);
	assert_int_equal(far_owner_session(o, A, 1), 0);
	assert_int_equal(far_owner_change_begin(o, A, 1, 0), 0); /* one that hangs in the store */
	assert_int_equal(far_owner_session(o, A, 1), 0);         /* another connection of the same generation */
	uint64_t old = far_deadline_limit(far_now() + 20 * FAR_MSEC);
	assert_int_equal(far_owner_session(o, A, 2), -ETIMEDOUT);
	far_deadline_restore(old);
	/* Though it could not be waited for, no other one of that generation gets in. */
	assert_int_equal(change(o, A, 1), -ECANCELED);
	assert_int_equal(far_owner_session(o, A, 1), -ECANCELED);
	struct waiter w = { .o = o, .session = A, .generation = 2 };
	assert_int_equal(far_thread_start(&w.t, "waiter", waiter_run, &w), 0);
	far_sleep_until(far_now() + 20 * FAR_MSEC, false);
	assert_false(atomic_load(&w.done));
	assert_int_equal(change(o, A, 2), 0);
	assert_false(atomic_load(&w.done));
	far_owner_change_end(o, A, 1, 0, 1, true);
	far_thread_join(&w.t);
	assert_int_equal(w.r, 0);
	assert_int_equal(change(o, A, 1), -ECANCELED);
	assert_int_equal(change(o, A, 2), 0);
	far_owner_free(o);
	far_close(b);
}

/* A change of hands waits for the changes of others that run, and lets no new ones begin. */
static void test_hands(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_lease l = FAR_LEASE_INIT;

	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	assert_int_equal(far_owner_change_begin(o, A, 1, 0), 0);
	uint64_t old = far_deadline_limit(far_now() + 20 * FAR_MSEC);
	l.take_over = true;
	assert_int_equal(lease(o, B, "b", 0, &l), -ETIMEDOUT);
	far_deadline_restore(old);
	l.take_over = false;
	assert_int_equal(lease(o, A, "a", 1, &l), 0); /* nothing has happened */
	assert_int_equal(change(o, A, 1), 0);

	struct far_lease k = FAR_LEASE_INIT;
	k.writer = "b";
	k.take_over = true;
	struct waiter w = { .o = o, .session = B, .l = &k };
	assert_int_equal(far_thread_start(&w.t, "waiter", waiter_run, &w), 0);
	uint64_t start = far_now();
	while (far_owner_change_begin(o, A, 1, FAR_NOWAIT) == 0) { /* until the taker has come */
		far_owner_change_end(o, A, 1, 0, 1, true);
		assert_true(far_now() - start < 10 * FAR_SEC);
	}
	assert_false(atomic_load(&w.done));
	far_owner_change_end(o, A, 1, 0, 1, true);
	far_thread_join(&w.t);
	assert_int_equal(w.r, 0);
	assert_true(k.origin.epoch == 2);
	assert_int_equal(change(o, A, 1), -ESTALE);
	far_owner_free(o);
	far_close(b);
}

/* The server starts again: the record's writer has its right for one more length, by its session and by its id. */
static void test_grace(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_lease l = FAR_LEASE_INIT;
	struct far_origin before, now;

	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	far_owner_origin(o, &before);
	far_owner_free(o);

	o = owner_new(b, LONG_MS);
	far_owner_origin(o, &now);
	assert_string_equal(now.identity, before.identity);
	assert_true(now.epoch == before.epoch && now.instance != before.instance);
	assert_int_equal(change(o, A, 1), -ENOTCONN);
	both(o);
	assert_int_equal(lease(o, B, "b", 0, &l), -EBUSY);
	assert_true(l.gone);
	assert_int_equal(change(o, 0, 0), -ESTALE);
	assert_int_equal(change(o, A, 1), 0); /* before it could renew */
	assert_int_equal(lease(o, A, "a", 1, &l), 0);
	far_owner_free(o);

	o = owner_new(b, LONG_MS);
	assert_int_equal(far_owner_session(o, B, 1), 0);
	assert_int_equal(lease(o, B, "a", 1, &l), 0); /* both have started again */
	l.release = true;
	assert_int_equal(lease(o, B, "a", 1, &l), 0);
	far_owner_free(o);

	o = owner_new(b, LONG_MS);
	both(o);
	assert_int_equal(lease(o, A, "c", 0, &l), 0); /* given back: no grace */
	assert_true(l.origin.epoch == 2);
	far_owner_free(o);
	far_close(b);
}

static void copy_file(const char *from, const char *to)
{
	char a[200], z[200], attr[FAR_RECORD_MAX], *bytes = malloc(SIZE);
	struct stat st;

	snprintf(a, sizeof a, "%s/%s", dir, from);
	snprintf(z, sizeof z, "%s/%s", dir, to);
	unlink(z);
	int in = open(a, O_RDONLY), out = open(z, O_WRONLY | O_CREAT, 0600);
	assert_true(in >= 0 && out >= 0 && bytes);
	assert_int_equal(read(in, bytes, SIZE), SIZE);
	assert_int_equal(write(out, bytes, SIZE), SIZE);
	ssize_t n = fgetxattr(in, "user.farpage", attr, sizeof attr);
	assert_true(n > 0);
	assert_int_equal(fsetxattr(out, "user.farpage", attr, (size_t)n, 0), 0);
	fstat(in, &st);
	struct timespec t[2] = { st.st_atim, st.st_mtim };
	assert_int_equal(futimens(out, t), 0);
	close(in);
	close(out);
	free(bytes);
}

static void write_and_flush(struct far_backend *b, struct far_owner *o, uint64_t session, char what, struct far_origin *now)
{
	assert_int_equal(far_owner_change_begin(o, session, 1, 0), 0);
	assert_int_equal(far_write(b, 0, &what, 1, 0), 0);
	far_owner_change_end(o, session, 1, 0, 1, true);
	assert_int_equal(far_owner_flush(o, now), 0);
}

/* An older copy of file and record is put back. */
static void test_rolled_back(void **state)
{
	struct far_lease l = FAR_LEASE_INIT;
	struct far_origin now, then;

	if (!attributes())
		skip();
	struct far_backend *b = open_file("r");
	struct far_owner *o = owner_new(b, LONG_MS);
	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	write_and_flush(b, o, A, '1', &then);
	far_owner_free(o);
	far_close(b);
	copy_file("r", "old");
	b = open_file("r");
	o = owner_new(b, LONG_MS);
	both(o);
	assert_int_equal(lease(o, A, "a", 1, &l), 0);
	write_and_flush(b, o, A, '2', &now);
	assert_true(now.version > then.version);
	far_owner_free(o);
	far_close(b);

	copy_file("old", "r");
	b = open_file("r");
	o = owner_new(b, LONG_MS);
	both(o);
	l.version = now.version;
	assert_int_equal(lease(o, A, "a", 1, &l), -ESTALE);
	assert_true(l.origin.version < now.version && l.origin.epoch == 1); /* so one can tell it from a newer one */
	assert_string_equal(l.origin.identity, now.identity);
	l.version = now.version;
	l.take_over = true;
	assert_int_equal(lease(o, A, "a", 1, &l), 0);
	assert_true(l.origin.version >= now.version);
	far_owner_free(o);
	far_close(b);
}

/* Somebody who is not farpage changes the file between two serves. */
static void test_foreign(void **state)
{
	struct far_lease l = FAR_LEASE_INIT;
	char path[200];

	if (!attributes())
		skip();
	struct far_backend *b = open_file("f");
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_origin now;
	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	write_and_flush(b, o, A, '1', &now);
	far_owner_free(o);
	far_close(b);

	b = open_file("f"); /* nobody did */
	o = owner_new(b, LONG_MS);
	far_owner_origin(o, &now);
	assert_true(now.epoch == 1);
	assert_string_equal(now.writer, "a");
	far_owner_free(o);
	far_close(b);

	snprintf(path, sizeof path, "%s/f", dir);
	int fd = open(path, O_WRONLY);
	assert_int_equal(pwrite(fd, "x", 1, 100), 1);
	struct timespec t[2] = { { .tv_nsec = UTIME_OMIT }, { 1700000000, 5 } }; /* even a clock that went back */
	assert_int_equal(futimens(fd, t), 0);
	close(fd);
	b = open_file("f");
	o = owner_new(b, LONG_MS);
	both(o);
	far_owner_origin(o, &now);
	assert_true(now.epoch == 2 && !now.writer[0]);
	assert_int_equal(lease(o, A, "a", 1, &l), -ESTALE);
	assert_int_equal(lease(o, B, "b", 0, &l), 0);
	far_owner_free(o);
	far_close(b);
}

/* Killed while bytes were changing: that is no foreign change, and the version says that something may be new. */
static void test_killed(void **state)
{
	struct far_origin now, before;
	struct far_lease l = FAR_LEASE_INIT;
	int p[2], status;

	if (!attributes())
		skip();
	assert_int_equal(pipe(p), 0);
	pid_t pid = fork();
	if (pid == 0) {
		struct far_backend *b = open_file("k");
		struct far_owner *o = owner_new(b, LONG_MS);
		both(o);
		lease(o, A, "a", 0, &l);
		write_and_flush(b, o, A, '1', &now);
		change(o, A, 1);
		far_write(b, 5, "y", 1, 0);
		ssize_t n = write(p[1], &now, sizeof now);
		_exit(n != sizeof now);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_int_equal(read(p[0], &before, sizeof before), sizeof before);
	close(p[0]);
	close(p[1]);
	struct far_backend *b = open_file("k");
	struct far_owner *o = owner_new(b, LONG_MS), *second;
	far_owner_origin(o, &now);
	assert_true(now.epoch == 1 && now.version > before.version);
	assert_string_equal(now.identity, before.identity);
	assert_string_equal(far_facts(b)->identity, before.identity);
	/* Another process, or another open, may not write records meanwhile. */
	struct far_backend *twin = open_file("k");
	assert_int_equal(far_owner_new(twin, 0, &second), -EBUSY);
	far_close(twin);
	far_owner_free(o);
	far_close(b);
}

/* The version grows with a flush that has something new, at most once a second. */
static void test_versions(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_origin one, two;

	assert_int_equal(far_owner_flush(o, &one), 0);
	write_and_flush(b, o, 0, 'a', &two);
	assert_true(two.version == one.version + 1 && two.change == one.change + 1);
	uint64_t start = far_now();
	write_and_flush(b, o, 0, 'b', &one);
	if (far_now() - start < FAR_SEC)
		assert_true(one.version == two.version);
	while (one.version == two.version) {
		assert_true(far_now() - start < 10 * FAR_SEC);
		far_sleep_until(far_now() + 50 * FAR_MSEC, false);
		assert_int_equal(far_owner_flush(o, &one), 0);
	}
	assert_true(far_now() - start >= FAR_SEC - 100 * FAR_MSEC && one.version == two.version + 1);
	far_owner_free(o);
	far_close(b);
}

static void test_watch(void **state)
{
	struct far_backend *b = open_uri("mem:4M"); /* 64 extents of 64 KiB */
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_extent list[4];
	struct far_origin now, at;
	bool all;
	size_t n;

	assert_int_equal(far_owner_watch(o, 1, 0, list, 4, &n, &all, &now), 0);
	assert_true(all && n == 0);
	at = now;
	assert_int_equal(far_owner_watch(o, at.instance, at.change, list, 4, &n, &all, &now), 0);
	assert_true(!all && n == 0 && now.change == at.change);
	assert_int_equal(far_owner_change_begin(o, 0, 0, 0), 0);
	far_owner_change_end(o, 0, 0, 65535, 2, true); /* over a border */
	assert_int_equal(far_owner_change_begin(o, 0, 0, 0), 0);
	far_owner_change_end(o, 0, 0, SIZE - 1, 1, true);
	assert_int_equal(far_owner_change_begin(o, 0, 0, 0), 0);
	far_owner_change_end(o, 0, 0, 20 * 65536, 1, false); /* nothing was changed */
	assert_int_equal(far_owner_watch(o, at.instance, at.change, list, 4, &n, &all, &now), 0);
	assert_true(!all && n == 2 && list[0].off == 0 && list[0].len == 131072);
	assert_true(list[1].off == SIZE - 65536 && list[1].len == 65536);
	assert_int_equal(far_owner_watch(o, now.instance, now.change, list, 4, &n, &all, &now), 0);
	assert_true(!all && n == 0);

	/* More than there is room for: joined, nothing is left out. */
	for (uint64_t i = 0; i < 64; i += 2) {
		assert_int_equal(far_owner_change_begin(o, 0, 0, 0), 0);
		far_owner_change_end(o, 0, 0, i * 65536, 1, true);
	}
	uint64_t since = now.change;
	assert_int_equal(far_owner_watch(o, now.instance, since, list, 4, &n, &all, &now), 0);
	assert_true(!all && n == 4);
	for (uint64_t i = 0; i < 64; i += 2) {
		bool told = false;
		for (size_t k = 0; k < n; k++)
			told |= list[k].off <= i * 65536 && i * 65536 < list[k].off + list[k].len;
		assert_true(told);
	}
	assert_int_equal(far_owner_watch(o, now.instance, since, NULL, 0, &n, &all, &now), 0);
	assert_true(all);
	assert_int_equal(far_owner_watch(o, now.instance, now.change + 1, list, 4, &n, &all, &now), 0);
	assert_true(all); /* from the future: it is not of this list */
	far_owner_free(o);
	far_close(b);

	b = open_uri("mem:1T"); /* never more than 65536 extents */
	o = owner_new(b, LONG_MS);
	far_owner_origin(o, &at);
	assert_int_equal(far_owner_change_begin(o, 0, 0, 0), 0);
	far_owner_change_end(o, 0, 0, (1ULL << 40) - 5, 5, true);
	assert_int_equal(far_owner_watch(o, at.instance, at.change, list, 4, &n, &all, &now), 0);
	assert_true(!all && n == 1 && list[0].len == 16 * FAR_MIB && list[0].off + list[0].len == 1ULL << 40);
	far_owner_free(o);
	far_close(b);
}

static int ram_read(void *opaque, uint64_t off, void *buf, size_t len)
{
	memset(buf, 0, len);
	return 0;
}

static int ram_write(void *opaque, uint64_t off, const void *buf, size_t len)
{
	return 0;
}

/* A store without a record: what is known ends with the process, and the first writer after that is believed. */
static void test_without_record(void **state)
{
	struct far_backend *b;
	struct far_lease l = FAR_LEASE_INIT;

	assert_int_equal(far_backend_from(ram_read, ram_write, 1 << 20, NULL, NULL, &b), 0);
	struct far_owner *o = owner_new(b, LONG_MS);
	both(o);
	assert_int_equal(change(o, A, 1), 0);
	assert_int_equal(lease(o, A, "a", 7, &l), 0);
	assert_true(l.origin.epoch == 7 && !l.origin.identity[0] && !l.origin.version);
	assert_int_equal(lease(o, B, "b", 0, &l), -EBUSY);
	l.take_over = true;
	assert_int_equal(lease(o, B, "b", 0, &l), 0);
	assert_true(l.origin.epoch == 8);
	l.take_over = false;
	assert_int_equal(lease(o, A, "a", 7, &l), -ESTALE);
	far_owner_free(o);
	o = owner_new(b, LONG_MS);
	both(o);
	assert_int_equal(change(o, B, 1), 0); /* but not over what somebody else has written meanwhile */
	assert_int_equal(lease(o, A, "a", 7, &l), -ESTALE);
	far_owner_free(o);
	far_close(b);
}

static void test_read_only(void **state)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct far_lease l = FAR_LEASE_INIT;
	struct far_backend *b = open_file("ro");
	struct far_error err;
	char uri[200];

	far_owner_free(owner_new(b, 0));
	far_close(b);
	opts.read_only = true;
	snprintf(uri, sizeof uri, "file:%s/ro", dir);
	assert_int_equal(far_open(uri, &opts, &b, &err), 0);
	struct far_owner *o = owner_new(b, 0);
	struct far_origin now;
	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), -EROFS);
	far_owner_origin(o, &now);
	assert_string_equal(now.identity, far_facts(b)->identity);

	/* Another process serves the same file for writing: who reads here is told. */
	struct far_backend *wb = open_file("ro");
	struct far_owner *wo = owner_new(wb, 0);
	struct far_origin there, again;
	struct far_extent x[2];
	bool all;
	size_t n;
	assert_int_equal(far_owner_watch(o, now.instance, now.change, x, 2, &n, &all, &again), 0);
	assert_true(!all && n == 0);
	far_sleep_until(far_now() + 20 * FAR_MSEC, false); /* the kernel's time of change is as coarse as its tick */
	write_and_flush(wb, wo, 0, 'n', &there);
	assert_int_equal(far_owner_watch(o, again.instance, again.change, x, 2, &n, &all, &now), 0);
	assert_true(!all && n == 1 && x[0].off == 0 && x[0].len == SIZE);
	if (attributes())
		assert_true(now.version == there.version);
	uint64_t start = far_now(); /* until it has been quiet for a while it is told again */
	do {
		assert_int_equal(far_owner_watch(o, now.instance, now.change, x, 2, &n, &all, &now), 0);
		assert_true(!all && far_now() - start < 10 * FAR_SEC);
		far_sleep_until(far_now() + 50 * FAR_MSEC, false);
	} while (n);
	assert_true(far_now() - start >= FAR_SEC);
	far_owner_free(wo);
	far_close(wb);
	far_owner_free(o);
	far_close(b);
}

/* A damaged record is not believed; another content's is not taken for ours. */
static void test_damaged(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, 0);
	struct far_origin before, now;
	uint8_t bytes[FAR_RECORD_MAX];
	struct far_record r;
	size_t n;

	far_owner_origin(o, &before);
	far_owner_free(o);
	assert_int_equal(far_record_read(b, bytes, sizeof bytes, &n), 0);
	assert_int_equal(n, FAR_RECORD_BYTES);
	for (size_t bit = 0; bit < n * 8; bit++) {
		bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
		assert_false(far_record_decode(bytes, n, &r));
		bytes[bit / 8] ^= (uint8_t)(1 << bit % 8);
	}
	for (size_t k = 0; k < n; k++)
		assert_false(far_record_decode(bytes, k, &r));
	bytes[20] ^= 1;
	assert_int_equal(far_record_write(b, bytes, n), 0);
	o = owner_new(b, 0);
	far_owner_origin(o, &now);
	assert_string_not_equal(now.identity, before.identity);
	far_owner_free(o);
	far_close(b);
}

/* More clients than are remembered: the silent ones are forgotten, never the writer. */
static void test_many_sessions(void **state)
{
	struct far_backend *b = open_uri("mem:4M");
	struct far_owner *o = owner_new(b, LONG_MS);
	struct far_lease l = FAR_LEASE_INIT;

	both(o);
	assert_int_equal(lease(o, A, "a", 0, &l), 0);
	for (uint64_t i = 1; i <= 5000; i++)
		assert_int_equal(far_owner_session(o, i << 20, 1), 0);
	assert_int_equal(change(o, A, 1), 0);
	assert_int_equal(change(o, 1 << 20, 1), -ENOTCONN);
	far_owner_free(o);

	o = owner_new(b, LONG_MS);
	for (uint64_t i = 1; i <= 1024; i++) {
		assert_int_equal(far_owner_session(o, i << 20, 1), 0);
		far_owner_connected(o, i << 20, 1);
	}
	assert_int_equal(far_owner_session(o, B, 1), -EBUSY);
	far_owner_free(o);
	far_close(b);
}

/* A store without a server: the same by calls. */
static void test_owned(void **state)
{
	struct far_backend *b = open_file("owned"), *w;
	struct far_lease l = FAR_LEASE_INIT;
	struct far_origin now = FAR_ORIGIN_INIT, again = FAR_ORIGIN_INIT;
	struct far_extent x[2];
	char byte = 'z';
	bool all;
	size_t n;

	if (!attributes())
		skip();
	assert_int_equal(far_owned_new(b, &w), 0);
	assert_int_equal(far_origin(w, &now, FAR_NOWAIT), 0);
	assert_true(now.identity[0] && now.instance);
	assert_string_equal(far_facts(w)->identity, now.identity);
	l.writer = "w";
	assert_int_equal(far_lease(w, &l), 0);
	assert_int_equal(far_write(w, 7, &byte, 1, 0), 0);
	assert_int_equal(far_flush(w), 0);
	assert_int_equal(far_watch(w, now.instance, now.change, x, 2, &n, &all, &again), 0);
	assert_true(!all && n == 1 && x[0].off == 0);
	assert_true(again.version > now.version);
	assert_int_equal(far_zero(w, 0, 4096, 0), 0);
	assert_int_equal(far_discard(w, 0, 4096, 0), 0);
	assert_int_equal(far_read(w, 7, &byte, 1, 0), 0);
	assert_int_equal(byte, 0);
	far_close(w);
	/* Closed in order: a change by another program would be noticed. */
	b = open_file("owned");
	uint8_t bytes[FAR_RECORD_MAX];
	struct far_record r;
	assert_int_equal(far_record_read(b, bytes, sizeof bytes, &n), 0);
	assert_true(far_record_decode(bytes, n, &r) && !r.dirty && r.mark == far_record_mark(b));
	assert_string_equal(r.writer, "w");
	far_close(b);
}

static int setup(void **state)
{
	return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
	static const char *const names[] = { "probe", "r", "old", "f", "k", "ro", "owned" };
	char path[200];

	for (size_t i = 0; i < FAR_ARRAY_LEN(names); i++) {
		snprintf(path, sizeof path, "%s/%s", dir, names[i]);
		unlink(path);
	}
	return rmdir(dir);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_lease),        cmocka_unit_test(test_expiry),
		cmocka_unit_test(test_lapsed_goes_on), cmocka_unit_test(test_take_over),
		cmocka_unit_test(test_restarted_writer), cmocka_unit_test(test_generations),
		cmocka_unit_test(test_hands),        cmocka_unit_test(test_grace),
		cmocka_unit_test(test_rolled_back),  cmocka_unit_test(test_foreign),
		cmocka_unit_test(test_killed),       cmocka_unit_test(test_versions),
		cmocka_unit_test(test_watch),        cmocka_unit_test(test_without_record),
		cmocka_unit_test(test_read_only),    cmocka_unit_test(test_damaged),
		cmocka_unit_test(test_many_sessions), cmocka_unit_test(test_owned),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
