/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* far_map_uri() with `outside`: memory here, served by a child; built against the public header and the shared library. */
#define _GNU_SOURCE
#include <farpage.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#define BYTES (3u << 20 | 1234)

static char dir[] = "/tmp/farpage-outside-XXXXXX";
static char path[100], uri[120];
static unsigned char data[BYTES];
static sigjmp_buf bus;

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void on_bus(int sig)
{
	siglongjmp(bus, sig);
}

static int refused(void)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_mount *m = NULL;
	struct far_error err = { 0 };

	o.outside = true;
	if (!far_map_uri("null:4096", &o, &m, &err)) {
		far_mount_close(m);
		return 0;
	}
	return strstr(err.text, "userfaultfd cannot be used") != NULL;
}

static int setup(void **state)
{
	if (refused()) {
		print_message("skipped: userfaultfd is refused here\n");
		skip();
	}
	for (unsigned k = 0; k < BYTES; k++)
		data[k] = (unsigned char)(k * 7 + (k >> 12) + 1);
	FILE *f = fopen(path, "w");
	assert_non_null(f);
	assert_int_equal(fwrite(data, 1, BYTES, f), BYTES);
	fclose(f);
	return 0;
}

static struct far_mount *map(struct far_mount_opts *o)
{
	struct far_error err = { 0 };
	struct far_mount *m;

	o->outside = true;
	if (far_map_uri(uri, o, &m, &err))
		fail_msg("%s", err.text);
	return m;
}

static void file_is(const unsigned char *want)
{
	static unsigned char got[BYTES + 1];
	FILE *f = fopen(path, "r");

	assert_non_null(f);
	assert_int_equal(fread(got, 1, sizeof got, f), BYTES);
	fclose(f);
	for (unsigned k = 0; k < BYTES; k++)
		if (got[k] != want[k])
			fail_msg("byte %u of the file is %u and not %u", k, got[k], want[k]);
}

/* The child, by its parent: the only one there is. */
static pid_t child_pid(pid_t parent)
{
	char name[64];
	pid_t pid = 0;

	snprintf(name, sizeof name, "/proc/%d/task/%d/children", (int)parent, (int)parent);
	FILE *f = fopen(name, "r");
	if (f && fscanf(f, "%d", &pid) != 1)
		pid = 0;
	if (f)
		fclose(f);
	return pid;
}

static void bytes_are_the_sources(void **state)
{
	for (int mode = FAR_MODE_DIRECT; mode <= FAR_MODE_MANAGED; mode++) {
		struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
		struct far_status st = FAR_STATUS_INIT;
		char buf[8192];
		o.mode = (enum far_mode)mode;
		o.read_only = mode == FAR_MODE_DIRECT;
		struct far_mount *m = map(&o);
		const unsigned char *p = far_addr(m);
		assert_memory_equal(p + 1000000, data + 1000000, 5000);
		int null = open("/dev/null", O_WRONLY), in[2];
		assert_int_equal(far_mount_status(m, &st), 0);
		if (st.kernel_faults) { /* a system call on memory that is not there yet */
			assert_int_equal(pipe(in), 0);
			assert_int_equal(write(in[1], p + 2000000, sizeof buf), sizeof buf);
			assert_int_equal(read(in[0], buf, sizeof buf), sizeof buf);
			assert_memory_equal(buf, data + 2000000, sizeof buf);
			close(in[0]);
			close(in[1]);
		}
		close(null);
		assert_memory_equal(p, data, BYTES);
		for (unsigned k = BYTES; k % 4096; k++)
			assert_int_equal(p[k], 0);
		assert_int_equal(far_mount_status(m, &st), 0);
		assert_true(st.outside);
		assert_int_equal(st.mechanism, FAR_MECH_COPY);
		assert_int_equal(st.bytes, BYTES);
		assert_null(far_path(m));
		assert_int_equal(far_mount_close(m), 0);
	}
}

static void stores_are_pushed(void **state)
{
	static const enum far_tracking ways[] = { FAR_TRACK_AUTO, FAR_TRACK_SYNC, FAR_TRACK_HASH };

	for (unsigned w = 0; w < 3; w++) {
		struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
		struct far_status st = FAR_STATUS_INIT;
		o.mode = FAR_MODE_MANAGED;
		o.tracking = ways[w];
		struct far_mount *m = map(&o);
		unsigned char *p = far_addr(m);
		for (unsigned k = 0; k < 50; k++) {
			unsigned at = (k * 7919u * 4001u + w) % BYTES;
			p[at] = data[at] = (unsigned char)(k + w);
		}
		assert_int_equal(far_mount_flush(m), 0);
		file_is(data);
		p[BYTES - 1] = data[BYTES - 1] = 77;
		p[BYTES] = 1; /* behind the end: goes nowhere */
		assert_int_equal(far_mount_discard(m, 4000, 70000), 0);
		memset(data + 4000, 0, 70000);
		assert_int_equal(p[4000] | p[30000] | p[73999], 0);
		assert_int_equal(p[3999], data[3999]);
		assert_int_equal(p[74000], data[74000]);
		assert_int_equal(far_mount_status(m, &st), 0);
		assert_true(w == 0 || st.tracking == ways[w]);
		assert_int_equal(far_mount_close(m), 0); /* flushes */
		file_is(data);
	}
}

static void populated_memory_needs_nobody(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_status st = FAR_STATUS_INIT, after = FAR_STATUS_INIT;

	o.mode = FAR_MODE_MANAGED;
	o.pull_workers = 0;
	struct far_mount *m = map(&o);
	const unsigned char *p = far_addr(m);
	assert_int_equal(far_mount_populate(m, 65536, 1 << 20), 0);
	assert_int_equal(far_mount_wait_range(m, 65536, 1 << 20, 1000), 0);
	assert_int_equal(far_mount_status(m, &st), 0);
	assert_memory_equal(p + 65536, data + 65536, 1 << 20);
	assert_int_equal(far_mount_status(m, &after), 0);
	assert_int_equal(after.faults, st.faults);
	assert_int_equal(far_mount_wait(m, 100, 50), -ETIMEDOUT);
	assert_int_equal(far_mount_populate(m, BYTES, 1), -EINVAL);
	assert_int_equal(far_mount_stored(m, 65536, 4096), 0);
	assert_int_equal(far_mount_evict(m, 0, 4096), -EOPNOTSUPP);
	assert_int_equal(far_mount_close(m), 0);
}

/* The serving side dead: a stall with a deadline, then SIGBUS, and what is there stays. Never zeros. */
static void a_dead_child_is_a_stall_and_then_sigbus(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_status st = FAR_STATUS_INIT;
	volatile unsigned char got = 99;

	o.mode = FAR_MODE_MANAGED;
	o.pull_workers = 0;
	o.chunk = 4096;
	o.deadline_ms = 300;
	struct far_mount *m = map(&o);
	unsigned char *p = far_addr(m);
	assert_int_equal(p[0], data[0]);
	p[1] = 5;
	pid_t pid = child_pid(getpid());
	assert_true(pid > 0);
	kill(pid, SIGKILL);
	void (*before)(int) = signal(SIGBUS, on_bus); /* cmocka has its own while a test runs */
	volatile double began = now();
	if (!sigsetjmp(bus, 1)) {
		got = p[2u << 20];
		fail_msg("an absent page was %u", got);
	}
	assert_true(now() - began > 0.25 && now() - began < 20);
	if (!sigsetjmp(bus, 1)) {
		got = p[2u << 20]; /* it stays so, and at once */
		fail_msg("an absent page was %u", got);
	}
	signal(SIGBUS, before);
	assert_int_equal(p[0], data[0]);
	assert_int_equal(p[1], 5);
	p[2] = 6; /* a store to what is there goes on, and goes nowhere */
	assert_int_equal(far_mount_flush(m), -ENOTCONN);
	assert_int_equal(far_mount_status(m, &st), -ENOTCONN);
	assert_int_equal(madvise(p, 4096, MADV_DONTNEED), 0); /* its event is read by somebody */
	assert_true(far_mount_close(m) < 0);
}

static void *touch_cb(void *arg)
{
	unsigned char *p = arg;
	return (void *)(uintptr_t)*p;
}

static void a_program_may_wait_for_ever(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct timespec soon;
	pthread_t t;

	o.mode = FAR_MODE_DIRECT;
	o.read_only = true;
	o.chunk = 4096;
	o.on_fail = FAR_ON_FAIL_WAIT;
	o.deadline_ms = 100;
	pid_t child = fork(); /* its end is the end of the touch */
	if (child == 0) {
		struct far_mount *m = map(&o);
		unsigned char *p = far_addr(m);
		kill(child_pid(getpid()), SIGKILL);
		if (pthread_create(&t, NULL, touch_cb, p + (2u << 20)))
			_exit(2);
		clock_gettime(CLOCK_REALTIME, &soon);
		soon.tv_sec++;
		_exit(pthread_timedjoin_np(t, NULL, &soon) == ETIMEDOUT ? 0 : 1);
	}
	int status = -1;
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

/* Killed, with a child that serves: the child notices and goes. */
static void the_child_ends_with_the_program(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	int fd[2];
	pid_t served = 0;

	assert_int_equal(pipe2(fd, O_CLOEXEC), 0);
	pid_t program = fork();
	if (program == 0) {
		close(fd[0]);
		struct far_mount *m = map(&o);
		((unsigned char *)far_addr(m))[0] = 3;
		pid_t pid = child_pid(getpid());
		if (write(fd[1], &pid, sizeof pid) != sizeof pid)
			_exit(1);
		pause();
	}
	assert_int_equal(read(fd[0], &served, sizeof served), sizeof served);
	assert_true(served > 0);
	kill(program, SIGKILL);
	waitpid(program, NULL, 0);
	double end = now() + 30;
	for (int alive = 1; alive && now() < end; usleep(10000)) {
		char name[64], word[8] = "";
		snprintf(name, sizeof name, "/proc/%d/stat", (int)served);
		FILE *f = fopen(name, "r");
		alive = f && fscanf(f, "%*d %*s %7s", word) == 1 && word[0] != 'Z';
		if (f)
			fclose(f);
		if (!alive)
			end = 0;
	}
	assert_true(end == 0);
	close(fd[0]);
	close(fd[1]);
}

static void refusals_have_a_sentence(void **state)
{
	struct far_mount_opts good = FAR_MOUNT_OPTS_INIT, o;
	struct far_error err = { 0 };
	struct far_backend *b;
	struct far_mount *m;

	good.outside = true;
	assert_true(far_map_uri("file:/nowhere/at/all", &good, &m, &err) < 0);
	assert_non_null(strstr(err.text, "/nowhere/at/all"));
	o = good;
	o.local_max = 1 << 20;
	assert_int_equal(far_map_uri(uri, &o, &m, &err), -EOPNOTSUPP);
	assert_non_null(strstr(err.text, "only this process can give pages back"));
	o = good;
	o.mechanism = FAR_MECH_MOVE;
	assert_int_equal(far_map_uri(uri, &o, &m, &err), -EOPNOTSUPP);
	o = good;
	o.inherit = true;
	assert_int_equal(far_map_uri(uri, &o, &m, &err), -EOPNOTSUPP);
	o = good;
	o.address = data; /* something is there, and it is no page's beginning either */
	assert_true(far_map_uri(uri, &o, &m, &err) < 0);
	o.address = (void *)((uintptr_t)data & ~(uintptr_t)4095);
	assert_true(far_map_uri(uri, &o, &m, &err) < 0);
	assert_non_null(strstr(err.text, "Choose another address"));
	assert_int_equal(far_open(uri, NULL, &b, NULL), 0);
	assert_int_equal(far_map(b, &good, &m, &err), -EOPNOTSUPP);
	far_close(b);
}

static void an_address_may_be_chosen(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	void *at = mmap(NULL, 8u << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	assert_ptr_not_equal(at, MAP_FAILED);
	munmap(at, 8u << 20);
	o.address = at;
	o.read_only = true;
	struct far_mount *m = map(&o);
	assert_ptr_equal(far_addr(m), at);
	assert_memory_equal(far_addr(m), data, BYTES);
	assert_int_equal(far_mount_close(m), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup(bytes_are_the_sources, setup),
		cmocka_unit_test_setup(stores_are_pushed, setup),
		cmocka_unit_test_setup(populated_memory_needs_nobody, setup),
		cmocka_unit_test_setup(a_dead_child_is_a_stall_and_then_sigbus, setup),
		cmocka_unit_test_setup(a_program_may_wait_for_ever, setup),
		cmocka_unit_test_setup(the_child_ends_with_the_program, setup),
		cmocka_unit_test_setup(refusals_have_a_sentence, setup),
		cmocka_unit_test_setup(an_address_may_be_chosen, setup),
	};

	if (!mkdtemp(dir))
		return 1;
	snprintf(path, sizeof path, "%s/data", dir);
	snprintf(uri, sizeof uri, "file:%s", path);
	int failed = cmocka_run_group_tests(tests, NULL, NULL);
	unlink(path);
	char other[140];
	snprintf(other, sizeof other, "rm -rf %s", dir);
	return system(other) ? 1 : failed;
}
