/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A remote that is slow, fails, or is gone, under a pointer: deadlines, the two policies, what status says, and healing. */
#define _GNU_SOURCE
#include "rig.h"

#include <pthread.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define AT(chunk) ((uint64_t)(chunk) * CHUNK)

static void the_deadline_passes(void)
{
	struct far_mount_opts o = rig_opts();
	struct toucher t[2];
	unsigned char v;

	o.deadline_ms = 300;
	struct far_mount *m = rig_map(&o);
	unsigned char *p = far_addr(m);
	CHECK(rig_right(p + AT(1), AT(1), CHUNK));
	p[AT(2)] = 0;
	remote.hold = true;
	toucher_start(&t[0], p + AT(20) + 9, false);
	toucher_start(&t[1], p + AT(40) + 9, true);
	for (unsigned k = 0; k < 2; k++) {
		toucher_end(&t[k]);
		SAME(t[k].how, SIGBUS);
		CHECK(t[k].took_ms >= 200 && t[k].took_ms < 10000);
	}
	/* What is here is not touched by that. */
	CHECK(rig_right(p + AT(1), AT(1), CHUNK));
	SAME(p[AT(2)], 0);
	struct far_status st = rig_status(m);
	CHECK(st.poisoned >= 2 * PAGE && st.poisoned <= 2 * CHUNK);
	remote.hold = false;
	UNTIL(!remote.held);
	SAME(far_mount_heal(m, 0, SIZE), 0);
	SAME(rig_status(m).poisoned, 0);
	SAME(touch(p + AT(20) + 9, &v), 0);
	SAME(v, rig_byte(AT(20) + 9));
	CHECK(rig_right(p + AT(20), AT(20), CHUNK));
	CHECK(rig_right(p + AT(40), AT(40), CHUNK)); /* the store did not happen */
	p[AT(40)] = 0;
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(40)], 0);
	SAME(remote.data[AT(2)], 0);
}

/* An error of the remote is SIGBUS at once, and again for whoever comes, until it is healed. */
static void an_error_is_sigbus_until_healed(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m), v;

	CHECK(rig_right(p + AT(1), AT(1), CHUNK));
	remote.fail_reads = EIO;
	SAME(touch(p + AT(30), NULL), SIGBUS);
	SAME(store(p + AT(50), 0), SIGBUS);
	SAME(touch(p + AT(30), NULL), SIGBUS);
	CHECK(rig_status(m).poisoned > 0);
	SAME(rig_status(m).last_error, EIO);
	CHECK(rig_right(p + AT(1), AT(1), CHUNK));
	CHECK(far_mount_populate(m, AT(30), CHUNK) < 0);
	remote.fail_reads = 0;
	SAME(touch(p + AT(30), NULL), SIGBUS);
	SAME(far_mount_heal(m, AT(30), CHUNK), 0);
	SAME(touch(p + AT(30), &v), 0);
	SAME(v, rig_byte(AT(30)));
	CHECK(rig_right(p + AT(30), AT(30), CHUNK));
	SAME(touch(p + AT(50), NULL), SIGBUS); /* not in the range that was healed */
	SAME(far_mount_populate(m, AT(50), CHUNK), 0); /* asking for it heals it too */
	CHECK(rig_right(p + AT(50), AT(50), CHUNK));
	p[AT(50)] = 0x50;
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[AT(50)], 0x50);
	SAME(rig_status(m).poisoned, 0);
	SAME(far_mount_close(m), 0);
}

/* A heal while the remote is still away says so, and all stays as it was; never zeros. */
static void healing_too_early(void)
{
	static const unsigned chunk[3][4] = { { 5, 14, 27, 33 }, { 45, 54, 67, 73 }, { 85, 94, 107, 113 } };
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	for (unsigned k = 0; k < 3; k++) {
		remote.fail_reads = EIO;
		for (unsigned c = 0; c < 4; c++)
			SAME(touch(p + AT(chunk[k][c]) + 100, NULL), SIGBUS);
		SAME(far_mount_heal(m, 0, SIZE), -EIO);
		for (unsigned c = 0; c < 4; c++)
			SAME(touch(p + AT(chunk[k][c]) + 100, NULL), SIGBUS);
		SAME(rig_status(m).poisoned, 4 * PAGE);
		remote.fail_reads = 0;
		SAME(far_mount_heal(m, 0, SIZE), 0);
		SAME(rig_status(m).poisoned, 0);
		for (unsigned c = 0; c < 4; c++)
			CHECK(rig_right(p + AT(chunk[k][c]), AT(chunk[k][c]), CHUNK));
	}
	SAME(far_mount_close(m), 0);
	CHECK(rig_right(remote.data, 0, SIZE));
}

static void pulling_heals(void)
{
	struct far_mount_opts o = rig_opts();

	o.pull_workers = -1;
	remote.fail_reads = EIO;
	struct far_mount *m = rig_map(&o);
	unsigned char *p = far_addr(m);
	SAME(touch(p + AT(100), NULL), SIGBUS);
	remote.fail_reads = 0;
	UNTIL(far_mount_wait(m, 100, LONG_MS) == 0); /* a fetch that began before that still fails */
	if (rig_local) /* it was the local store that was filled */
		SAME(far_mount_heal(m, 0, SIZE), 0);
	UNTIL(rig_status(m).poisoned == 0);
	CHECK(rig_right(p, 0, SIZE));
	SAME(far_mount_close(m), 0);
}

/* Everything that the budget has room for is pinned: a page that is touched stays for as long as the touch takes. */
static void a_touch_beside_a_full_budget(void)
{
	for (unsigned round = 0; round < 2; round++) {
		struct far_mount_opts o = rig_opts();
		o.local_max = 8 * CHUNK;
		o.pull_workers = -1;
		if (round) {
			o.mechanism = FAR_MECH_SIGSEGV;
			o.tracking = FAR_TRACK_AUTO;
			o.read_only = true;
		}
		struct far_mount *m = rig_map(&o);
		unsigned char *p = far_addr(m);
		uint64_t most = 8; /* a part of the budget may be kept for what was just given back */
		while (far_mount_pin(m, 0, most * CHUNK))
			CHECK(--most > 4);
		SAME(far_mount_populate(m, 0, most * CHUNK), 0);
		for (unsigned k = 0; k < 300; k++) {
			uint64_t off = (8 + k * 7 % 119) * CHUNK + k;
			CHECK(rig_right(p + off, off, 1));
			if (k % 8 == 0)
				SAME(far_mount_populate(m, off + CHUNK, 2 * CHUNK), 0);
		}
		SAME(far_mount_close(m), 0);
	}
}

static void waiting_for_ever(void)
{
	struct far_mount_opts o = rig_opts();
	struct toucher t;

	o.on_fail = FAR_ON_FAIL_WAIT;
	o.deadline_ms = 100;
	struct far_mount *m = rig_map(&o);
	unsigned char *p = far_addr(m);
	remote.hold = true;
	toucher_start(&t, p + AT(25) + 3, false);
	usleep(300000); /* three deadlines: nothing may happen */
	toucher_is_stuck(&t);
	struct far_status st = rig_status(m);
	SAME(st.poisoned, 0);
	CHECK(st.n_blocked == 1 && st.blocked_at[0] / PAGE == (AT(25) + 3) / PAGE && st.blocked_ms[0] >= 250);
	remote.hold = false;
	toucher_end(&t);
	SAME(t.how, 0);
	SAME(t.seen, rig_byte(AT(25) + 3));
	SAME(far_mount_close(m), 0);
}

/* Errors are asked again until they end: a program that chose to wait sees none. */
static void waiting_out_errors(void)
{
	struct far_mount_opts o = rig_opts();
	struct toucher t;

	o.on_fail = FAR_ON_FAIL_WAIT;
	struct far_mount *m = rig_map(&o);
	unsigned char *p = far_addr(m);
	remote.fail_reads = EIO;
	toucher_start(&t, p + AT(25) + 3, false);
	UNTIL(remote.reads >= 1);
	usleep(100000);
	CHECK(!atomic_load(&t.ended));
	SAME(rig_status(m).poisoned, 0);
	remote.fail_reads = 0;
	toucher_end(&t);
	SAME(t.how, 0);
	SAME(t.seen, rig_byte(AT(25) + 3));
	SAME(far_mount_close(m), 0);
}

static void status_names_blocked_addresses(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);
	struct far_status st;
	struct toucher t[6];
	unsigned found = 0;

	SAME(rig_status(m).n_blocked, 0);
	remote.hold = true;
	for (unsigned k = 0; k < 6; k++)
		toucher_start(&t[k], p + AT(5 + 20 * k) + 2 * PAGE + 7, k & 1);
	UNTIL((st = rig_status(m)).n_blocked == 6);
	for (unsigned k = 0; k < 6; k++)
		for (unsigned j = 0; j < st.n_blocked; j++)
			found += st.blocked_at[j] / PAGE == (AT(5 + 20 * k) + 2 * PAGE) / PAGE;
	SAME(found, 6);
	CHECK(st.blocked >= 1);
	UNTIL((st = rig_status(m)).blocked_ms[0] >= 50);
	remote.hold = false;
	for (unsigned k = 0; k < 6; k++) {
		toucher_end(&t[k]);
		SAME(t[k].how, 0);
	}
	UNTIL(rig_status(m).n_blocked == 0);
	SAME(far_mount_close(m), 0);
}

/* More threads wait than there are receivers and spares: all get on, and what is here is not held up meanwhile. */
static void more_blocked_than_receivers(void)
{
	struct far_mount_opts o = rig_opts();
	static struct toucher t[60];

	o.max_blocked = 4;
	struct far_mount *m = rig_map(&o);
	unsigned char *p = far_addr(m);
	remote.hold = true;
	for (unsigned k = 0; k < 60; k++)
		toucher_start(&t[k], p + AT(2 * k) + 64 * k, k & 1);
	UNTIL(remote.held);
	remote.hold = false;
	for (unsigned k = 0; k < 60; k++) {
		toucher_end(&t[k]);
		SAME(t[k].how, 0);
		if (!(k & 1))
			SAME(t[k].seen, rig_byte(AT(2 * k) + 64 * k));
	}
	SAME(far_mount_close(m), 0);
	for (unsigned k = 1; k < 60; k += 2)
		SAME(remote.data[AT(2 * k) + 64 * k], 0xa5);
}

/* A flush that fails says so until it does not, and loses nothing. */
static void a_flush_that_fails(void)
{
	struct far_mount *m = rig_map(NULL);
	unsigned char *p = far_addr(m);

	if (rig_local)
		rig_skip("with a local store the program's stores are safe in it before the remote is asked");
	p[AT(8)] = 0;
	remote.fail_writes = EIO;
	SAME(far_mount_flush(m), -EIO);
	p[AT(9)] = 0;
	SAME(far_mount_flush(m), -EIO);
	remote.fail_writes = 0;
	SAME(far_mount_flush(m), 0);
	SAME(remote.data[AT(8)], 0);
	SAME(remote.data[AT(9)], 0);
	remote.fail_writes = EIO;
	p[AT(10)] = 0;
	CHECK(far_mount_close(m) == -EIO); /* and all is closed */
	CHECK(touch(p, NULL) == SIGSEGV);
}

/* ------------------------------------------------------------------------------------------------------- a server that dies */

struct serving {
	pid_t pid;
	char path[64], uri[128];
};

/* The region, served by another process. */
static void serving_start(struct serving *s)
{
	int ready[2];
	char c;

	CHECK(pipe(ready) == 0);
	fflush(stdout);
	s->pid = fork();
	CHECK(s->pid >= 0);
	if (s->pid == 0) {
		struct far_server_opts o = FAR_SERVER_OPTS_INIT;
		struct far_error err = { 0 };
		struct far_server *server;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		/* Nothing of a map that is open: a copy of its descriptors would keep its local store locked. */
		dup2(ready[1], 3);
		ready[1] = 3;
		syscall(SYS_close_range, 4, ~0u, 0);
		unlink(s->path);
		if (far_server_new(&o, &server, &err) || far_server_export(server, "r", rig_backend(), &err) ||
		    far_server_listen(server, s->uri, NULL, &err))
			rig_fail(__FILE__, __LINE__, "%s", err.text);
		if (write(ready[1], "x", 1) != 1)
			_exit(1);
		for (;;)
			pause();
	}
	close(ready[1]);
	SAME(read(ready[0], &c, 1), 1);
	close(ready[0]);
}

static void serving_kill(struct serving *s)
{
	kill(s->pid, SIGKILL);
	waitpid(s->pid, NULL, 0);
}

static struct far_mount *serving_map(struct serving *s, const struct far_mount_opts *o)
{
	struct far_error err = { 0 };
	struct far_mount *m;
	int r = far_map_uri(s->uri, o, &m, &err);

	if (r)
		rig_fail(__FILE__, __LINE__, "%s", err.text);
	return m;
}

static void serving_init(struct serving *s)
{
	rig_open();
	snprintf(s->path, sizeof s->path, "/tmp/farpage-trouble-%d", (int)getpid());
	snprintf(s->uri, sizeof s->uri, "grpc+unix:///?socket=%s", s->path);
	serving_start(s);
}

static void the_serving_side_dies(void)
{
	struct far_mount_opts o = rig_opts();
	struct serving s;
	struct toucher t;

	serving_init(&s);
	o.deadline_ms = 700;
	struct far_mount *m = serving_map(&s, &o);
	unsigned char *p = far_addr(m);
	CHECK(rig_right(p + AT(1), AT(1), AT(2)));
	p[AT(2)] = 0;
	serving_kill(&s);
	CHECK(rig_right(p + AT(1), AT(1), CHUNK)); /* what is here stays usable */
	p[AT(2) + 1] = 0;
	toucher_start(&t, p + AT(60), false);
	UNTIL(rig_status(m).n_blocked == 1 || atomic_load(&t.ended)); /* a stall, in which its address is named */
	CHECK(!atomic_load(&t.ended));
	SAME(rig_status(m).blocked_at[0], AT(60));
	toucher_end(&t);
	SAME(t.how, SIGBUS); /* then an error: never zeros */
	CHECK(t.took_ms >= 400 && t.took_ms < 10000);
	CHECK(far_mount_flush(m) < 0);
	serving_start(&s);
	UNTIL(far_mount_flush(m) == 0);
	SAME(remote.data[AT(2)], 0);
	SAME(remote.data[AT(2) + 1], 0);
	SAME(far_mount_heal(m, 0, SIZE), 0);
	CHECK(rig_right(p + AT(60), AT(60), AT(2)));
	SAME(far_mount_close(m), 0);
	serving_kill(&s);
	unlink(s.path);
}

static void the_serving_side_comes_back(void)
{
	struct far_mount_opts o = rig_opts();
	struct serving s;
	struct toucher t[4];

	serving_init(&s);
	o.on_fail = FAR_ON_FAIL_WAIT;
	o.deadline_ms = 300;
	struct far_mount *m = serving_map(&s, &o);
	unsigned char *p = far_addr(m);
	p[AT(2)] = 0;
	serving_kill(&s);
	for (unsigned k = 0; k < 4; k++)
		toucher_start(&t[k], p + AT(60 + k) + k, k == 3);
	usleep(500000);
	for (unsigned k = 0; k < 4; k++)
		CHECK(!atomic_load(&t[k].ended));
	serving_start(&s);
	for (unsigned k = 0; k < 4; k++) {
		toucher_end(&t[k]);
		SAME(t[k].how, 0);
		if (k < 3)
			SAME(t[k].seen, rig_byte(AT(60 + k) + k));
	}
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(2)], 0);
	SAME(remote.data[AT(63) + 3], 0xa5);
	serving_kill(&s);
	unlink(s.path);
}

/* A reader sees what a writer elsewhere has flushed. */
static void a_reader_follows_a_writer(void)
{
	struct far_mount_opts o = rig_opts(), r = rig_opts();
	struct serving s;

	serving_init(&s);
	r.read_only = true;
	r.follow_ms = 20;
	r.tracking = FAR_TRACK_AUTO;
	struct far_mount *writer = serving_map(&s, &o), *reader = serving_map(&s, &r);
	unsigned char *w = far_addr(writer);
	const volatile unsigned char *p = far_addr(reader);
	CHECK(rig_right((const unsigned char *)p, 0, AT(20)));
	SAME(rig_status(reader).follow, FAR_FOLLOW_FOLLOWING);
	for (unsigned k = 0; k < 5; k++) {
		w[AT(3) + 1000 * k] = 0;
		w[AT(90)] = (unsigned char)k;
		SAME(far_mount_flush(writer), 0);
		UNTIL(p[AT(3) + 1000 * k] == 0);
		UNTIL(p[AT(90)] == k);
	}
	CHECK(rig_right((const unsigned char *)p + AT(4), AT(4), AT(10)));
	SAME(far_mount_close(reader), 0);
	SAME(far_mount_close(writer), 0);
	serving_kill(&s);
	unlink(s.path);
}

/* Over a local store that lasts: the next map finds it, even while the remote is away. */
static void a_local_store_that_lasts(void)
{
	char dir[] = "/tmp/farpage-lasts-XXXXXX", local[64], cmd[80];
	struct far_mount_opts o = rig_opts();
	struct serving s;

	serving_init(&s);
	CHECK(mkdtemp(dir) != NULL);
	snprintf(local, sizeof local, "file:%s/store", dir);
	o.local = local;
	o.pull_workers = -1;
	o.deadline_ms = 2000;
	struct far_mount *m = serving_map(&s, &o);
	unsigned char *p = far_addr(m);
	CHECK(rig_status(m).persistent);
	p[AT(2)] = 0;
	SAME(far_mount_wait(m, 100, LONG_MS), 0);
	UNTIL(rig_status(m).local == SIZE);
	SAME(far_mount_close(m), 0);
	SAME(remote.data[AT(2)], 0);
	serving_kill(&s);
	o.durable = FAR_DURABLE_LOCAL;
	m = serving_map(&s, &o); /* offline */
	p = far_addr(m);
	SAME(p[AT(2)], 0);
	CHECK(rig_right(p + AT(3), AT(3), AT(20)));
	p[AT(5)] = 0;
	SAME(far_mount_flush(m), 0); /* to the local store */
	SAME(remote.data[AT(5)], rig_byte(AT(5)));
	serving_start(&s);
	UNTIL(far_mount_close(m) == 0 || 1);
	o.durable = FAR_DURABLE_REMOTE;
	m = serving_map(&s, &o);
	UNTIL(far_mount_flush(m) == 0);
	SAME(remote.data[AT(5)], 0);
	SAME(far_mount_close(m), 0);
	serving_kill(&s);
	unlink(s.path);
	snprintf(cmd, sizeof cmd, "rm -rf %s", dir);
	SAME(system(cmd), 0);
}

#define CASE(f) { #f, f }

int main(int argc, char **argv)
{
	static const struct rig_case cases[] = {
		CASE(the_deadline_passes),
		CASE(an_error_is_sigbus_until_healed),
		CASE(healing_too_early),
		CASE(pulling_heals),
		CASE(a_touch_beside_a_full_budget),
		CASE(waiting_for_ever),
		CASE(waiting_out_errors),
		CASE(status_names_blocked_addresses),
		CASE(more_blocked_than_receivers),
		CASE(a_flush_that_fails),
		CASE(the_serving_side_dies),
		CASE(the_serving_side_comes_back),
		CASE(a_reader_follows_a_writer),
		CASE(a_local_store_that_lasts),
	};
	return rig_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
