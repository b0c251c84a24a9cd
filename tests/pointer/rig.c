/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "rig.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <time.h>

struct rig_remote remote;
bool rig_local;
static enum far_mechanism rig_mechanism;
static enum far_tracking rig_tracking;

/* --------------------------------------------------------------------------------------------------------- cases */

uint64_t now_ms(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

void rig_skip(const char *fmt, ...)
{
	va_list ap;

	printf("# skip: ");
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	fflush(stdout);
	_exit(77);
}

void rig_fail(const char *file, int line, const char *fmt, ...)
{
	va_list ap;

	printf("# %s:%d: ", file, line);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	fflush(stdout);
	_exit(1);
}

/* 0, 77, or what went wrong in `why`. The reason of a skip is the case's last line. */
static int rig_run(const struct rig_case *c, char *why, size_t n)
{
	char line[600];
	int out[2], status;

	if (pipe(out) < 0)
		return 1;
	fflush(stdout);
	pid_t pid = fork();
	if (pid == 0) {
		dup2(out[1], STDOUT_FILENO);
		close(out[0]);
		close(out[1]);
		setvbuf(stdout, NULL, _IOLBF, 0);
		alarm(40);
		c->run();
		_exit(0);
	}
	close(out[1]);
	FILE *f = fdopen(out[0], "r");
	why[0] = 0;
	while (f && fgets(line, sizeof line, f)) {
		line[strcspn(line, "\n")] = 0;
		if (strncmp(line, "# skip: ", 8) == 0)
			snprintf(why, n, "%.200s", line + 8);
		else
			printf("%s\n", line);
	}
	waitpid(pid, &status, 0);
	if (f)
		fclose(f);
	if (WIFEXITED(status))
		return WEXITSTATUS(status);
	printf("# ended by signal %d%s\n", WTERMSIG(status), WTERMSIG(status) == SIGALRM ? ": it hung" : "");
	return 1;
}

static unsigned rig_word(const char *const *words, size_t n, const char *word)
{
	for (unsigned k = 0; k < n; k++)
		if (strcmp(words[k], word) == 0)
			return k;
	fprintf(stderr, "no such word: %s\n", word);
	exit(2);
}

int rig_main(int argc, char **argv, const struct rig_case *cases, size_t n)
{
	static const char *const mechanisms[] = { "auto", "share", "move", "continue", "copy", "sigsegv" };
	static const char *const trackings[] = { "auto", "none", "async", "sync", "hash" };
	unsigned at = 0, failed = 0, wanted = 0;
	char why[256];

	for (int k = 1; k < argc; k++) {
		if (strcmp(argv[k], "--mechanism") == 0 && k + 1 < argc)
			rig_mechanism = (enum far_mechanism)rig_word(mechanisms, 6, argv[++k]);
		else if (strcmp(argv[k], "--tracking") == 0 && k + 1 < argc)
			rig_tracking = (enum far_tracking)rig_word(trackings, 5, argv[++k]);
		else if (strcmp(argv[k], "--local") == 0)
			rig_local = true;
		else
			wanted++;
	}
	for (size_t i = 0; i < n; i++) {
		bool run = !wanted;
		for (int k = 1; k < argc; k++)
			run |= strcmp(argv[k], cases[i].name) == 0;
		if (!run)
			continue;
		uint64_t began = now_ms();
		int r = rig_run(&cases[i], why, sizeof why);
		failed += r != 0 && r != 77;
		printf("%sok %u - %s", r && r != 77 ? "not " : "", ++at, cases[i].name);
		if (r == 77)
			printf(" # SKIP %s", why);
		printf("\n# %llu ms\n", (unsigned long long)(now_ms() - began));
		fflush(stdout);
	}
	printf("1..%u\n", at);
	return failed != 0;
}

/* -------------------------------------------------------------------------------------------------------- the remote */

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	bool stopped;
} gate = { PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false };

unsigned char rig_byte(uint64_t off)
{
	return (unsigned char)((off * 7 + (off >> 12) * 29 + (off >> 16) * 3) | 1);
}

bool rig_right(const unsigned char *p, uint64_t off, size_t len)
{
	for (size_t k = 0; k < len; k++) {
		if (p[k] != rig_byte(off + k)) {
			printf("# byte %llu is %u, not %u\n", (unsigned long long)(off + k), p[k], rig_byte(off + k));
			return false;
		}
	}
	return true;
}

bool rig_same(const unsigned char *a, const unsigned char *b, size_t len)
{
	for (size_t k = 0; k < len; k++) {
		if (a[k] != b[k]) {
			printf("# byte %zu is %u here and %u there\n", k, a[k], b[k]);
			return false;
		}
	}
	return true;
}

bool rig_zero(const unsigned char *p, size_t len)
{
	for (size_t k = 0; k < len; k++) {
		if (p[k]) {
			printf("# byte %zu is %u, not 0\n", k, p[k]);
			return false;
		}
	}
	return true;
}

static int remote_wait(unsigned flags)
{
	int r = 0;

	if (!atomic_load(&remote.hold))
		return 0;
	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	pthread_mutex_lock(&gate.lock);
	remote.held++;
	while (atomic_load(&remote.hold) && !gate.stopped) {
		struct timespec t;
		clock_gettime(CLOCK_REALTIME, &t);
		t.tv_nsec += 5000000;
		if (t.tv_nsec >= 1000000000)
			t.tv_sec++, t.tv_nsec -= 1000000000;
		pthread_cond_timedwait(&gate.changed, &gate.lock, &t);
	}
	if (gate.stopped)
		r = -ESHUTDOWN;
	remote.held--;
	pthread_mutex_unlock(&gate.lock);
	return r;
}

static int remote_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	int r = remote_wait(flags);

	if (r)
		return r;
	remote.reads++;
	if (remote.fail_reads)
		return -remote.fail_reads;
	memcpy(buf, remote.data + off, len);
	return 0;
}

static int remote_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	remote.writes++;
	if (remote.fail_writes)
		return -remote.fail_writes;
	memcpy(remote.data + off, buf, len);
	return 0;
}

static int remote_flush(void *self)
{
	remote.flushes++;
	return 0;
}

static void remote_stop(void *self)
{
	pthread_mutex_lock(&gate.lock);
	gate.stopped = true;
	pthread_cond_broadcast(&gate.changed);
	pthread_mutex_unlock(&gate.lock);
}

void rig_open(void)
{
	gate.stopped = false;
	/* Not heap memory: programs that look at all of it must find the mapping and nothing else of this size. */
	remote.data = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(remote.data != MAP_FAILED);
	madvise(remote.data, SIZE, MADV_DONTDUMP);
	for (uint64_t k = 0; k < SIZE; k++)
		remote.data[k] = rig_byte(k);
}

struct far_backend *rig_backend(void)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = remote_read, .write = remote_write, .flush = remote_flush,
					    .stop = remote_stop };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_backend *b;

	facts.bytes = SIZE;
	facts.caps = FAR_CAP_WRITE;
	SAME(far_backend_new(&ops, &remote, &facts, &b), 0);
	return b;
}

/* -------------------------------------------------------------------------------------------------------------- maps */

struct far_mount_opts rig_opts(void)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;

	o.mode = FAR_MODE_MANAGED;
	o.chunk = CHUNK;
	o.pull_workers = 0;
	o.push_workers = 0;
	o.mechanism = rig_mechanism;
	o.tracking = rig_tracking;
	return o;
}

struct far_mount *rig_map(const struct far_mount_opts *opts)
{
	struct far_mount_opts o = opts ? *opts : rig_opts();
	struct far_error err = { 0 };
	struct far_mount *m = NULL;

	if (o.read_only && o.tracking != FAR_TRACK_NONE)
		o.tracking = FAR_TRACK_AUTO;
	if (rig_local && o.mode == FAR_MODE_MANAGED)
		SAME(far_open("mem:8389842", NULL, &o.local_backend, &err), 0);
	if (!remote.data)
		rig_open();
	int r = far_map(rig_backend(), &o, &m, &err);
	if (r == -EOPNOTSUPP || r == -EPERM || r == -ENOSYS)
		rig_skip("%s", err.text);
	if (r)
		rig_fail(__FILE__, __LINE__, "far_map: %d: %s", r, err.text);
	CHECK(far_addr(m) != NULL);
	return m;
}

struct far_status rig_status(struct far_mount *m)
{
	struct far_status st = FAR_STATUS_INIT;

	SAME(far_mount_status(m, &st), 0);
	return st;
}

bool rig_shares(struct far_mount *m)
{
	return rig_status(m).mechanism == FAR_MECH_SHARE;
}

/* ----------------------------------------------------------------------------------------------------------- touches */

static _Thread_local sigjmp_buf touch_jump;
static _Thread_local volatile sig_atomic_t touch_armed;

static void touch_signal(int sig)
{
	if (touch_armed) {
		touch_armed = 0;
		siglongjmp(touch_jump, sig);
	}
	signal(sig, SIG_DFL);
	raise(sig);
}

static void touch_catch(void)
{
	struct sigaction sa = { .sa_handler = touch_signal };
	static _Atomic bool done;

	if (atomic_exchange(&done, true))
		return;
	sigaction(SIGBUS, &sa, NULL);
	sigaction(SIGSEGV, &sa, NULL);
}

int touch(const void *p, unsigned char *seen)
{
	touch_catch();
	int sig = sigsetjmp(touch_jump, 1);
	if (sig)
		return sig;
	touch_armed = 1;
	unsigned char v = *(const volatile unsigned char *)p;
	touch_armed = 0;
	if (seen)
		*seen = v;
	return 0;
}

int store(void *p, unsigned char v)
{
	touch_catch();
	int sig = sigsetjmp(touch_jump, 1);
	if (sig)
		return sig;
	touch_armed = 1;
	*(volatile unsigned char *)p = v;
	touch_armed = 0;
	return 0;
}

static void *toucher_main(void *arg)
{
	struct toucher *t = arg;
	uint64_t began = now_ms();

	t->tid = (pid_t)syscall(SYS_gettid);
	atomic_store(&t->began, true);
	if (t->stores)
		t->how = store((void *)(uintptr_t)t->p, 0xa5);
	else
		t->how = touch(t->p, &t->seen);
	t->took_ms = now_ms() - began;
	atomic_store(&t->ended, true);
	return NULL;
}

void toucher_start(struct toucher *t, const void *p, bool stores)
{
	*t = (struct toucher){ .p = p, .stores = stores };
	touch_catch();
	SAME(pthread_create(&t->t, NULL, toucher_main, t), 0);
	UNTIL(atomic_load(&t->began));
}

void toucher_end(struct toucher *t)
{
	UNTIL(atomic_load(&t->ended));
	pthread_join(t->t, NULL);
}

/* 'S' or 'D' in its stat line, twenty times in a row. */
void toucher_is_stuck(struct toucher *t)
{
	char path[64], line[300];
	unsigned asleep = 0;

	snprintf(path, sizeof path, "/proc/self/task/%d/stat", (int)t->tid);
	for (uint64_t end = now_ms() + LONG_MS; asleep < 20 && now_ms() < end; usleep(1000)) {
		FILE *f = fopen(path, "r");
		CHECK(f && fgets(line, sizeof line, f));
		fclose(f);
		char *state = strrchr(line, ')');
		CHECK(state != NULL);
		asleep = state[2] == 'S' || state[2] == 'D' ? asleep + 1 : 0;
		CHECK(!atomic_load(&t->ended));
	}
	CHECK(asleep == 20);
}

int in_child(void (*fn)(void *), void *arg)
{
	int status = 0;

	fflush(stdout);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		alarm(30);
		fn(arg);
		_exit(0);
	}
	SAME(waitpid(pid, &status, 0), pid);
	return status;
}
