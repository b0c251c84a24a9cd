/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Calls that block, many at once and more than there are threads; and every way in which a mount ends. */
#define _GNU_SOURCE
#include "fuse_serve.h"

#include "base/thread.h"
#include "frontend/fuse_int.h"

#include <dlfcn.h>
#include <sys/mount.h>

#define READERS 64
#define LOCAL (1 << 20)
#define STRIDE (1 << 20)
#define BYTES (LOCAL + READERS * (uint64_t)STRIDE)

enum how { DIRECT, BUFFERED, MAPPED };

struct reader {
	struct far_thread thread;
	const char *path;
	enum how how;
	uint64_t off;
	int error; /* errno, 0: it read what it should */
	_Atomic unsigned *done;
};

static void pattern(uint64_t *p, size_t len, uint64_t off)
{
	for (size_t i = 0; i < len / 8; i++)
		p[i] = (off + i * 8) * 0x9E3779B97F4A7C15ull;
}

static int reader_read(struct reader *r, int fd, void *buf)
{
	if (r->how == MAPPED) {
		char *m = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, (off_t)r->off);
		if (m == MAP_FAILED)
			return errno;
		madvise(m, 4096, MADV_RANDOM);
		memcpy(buf, m, 4096);
		munmap(m, 4096);
		return 0;
	}
	posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
	ssize_t n = pread(fd, buf, 4096, (off_t)r->off);
	return n < 0 ? errno : n == 4096 ? 0 : ENODATA;
}

static void *reader_main(void *arg)
{
	struct reader *r = arg;
	uint64_t *buf = aligned_alloc(4096, 4096), want[512];
	int fd = open(r->path, O_RDONLY | (r->how == DIRECT ? O_DIRECT : 0) | O_CLOEXEC);

	pattern(want, 4096, r->off);
	if (fd < 0) {
		r->error = errno;
	} else {
		r->error = reader_read(r, fd, buf);
		if (!r->error && memcmp(buf, want, 4096))
			r->error = EILSEQ;
	}
	close(fd);
	free(buf);
	atomic_fetch_add(r->done, 1);
	return NULL;
}

static void fill_backend(struct serve *s)
{
	uint64_t *p = malloc(STRIDE);

	for (uint64_t off = 0; off < s->bytes; off += STRIDE) {
		pattern(p, STRIDE, off);
		assert_int_equal(far_io_pwrite(s->memfd, off, p, STRIDE, 0), 0);
	}
	free(p);
}

static void start_readers(struct serve *s, struct reader *r, enum how how, _Atomic unsigned *done)
{
	atomic_store(done, 0);
	for (unsigned i = 0; i < READERS; i++) {
		r[i] = (struct reader){ .path = s->path, .how = how, .off = LOCAL + i * (uint64_t)STRIDE, .done = done };
		assert_int_equal(far_thread_start(&r[i].thread, "reader", reader_main, &r[i]), 0);
	}
}

static void join_readers(struct reader *r, int error)
{
	for (unsigned i = 0; i < READERS; i++) {
		far_thread_join(&r[i].thread);
		assert_int_equal(r[i].error, error);
	}
}

static void check_local(struct serve *s)
{
	uint64_t *buf = aligned_alloc(4096, 4096), want[512];
	int fd = open(s->path, O_RDONLY | O_DIRECT | O_CLOEXEC);

	assert_true(fd >= 0);
	for (uint64_t off = 0; off < LOCAL; off += 65536) {
		pattern(want, 4096, off);
		assert_int_equal(pread(fd, buf, 4096, (off_t)off), 4096);
		assert_memory_equal(buf, want, 4096);
	}
	close(fd);
	free(buf);
}

static void start(struct serve *s, unsigned max_blocked, uint64_t deadline)
{
	serve_start(s, &(struct serve_conf){ .bytes = BYTES, .max_blocked = max_blocked, .deadline = deadline,
					     .keep_cache = true });
	fill_backend(s);
	atomic_store(&s->sh->absent, LOCAL);
}

/* 64 calls for absent bytes are all in the backend at the same time, so they cost one round trip; meanwhile local bytes
 * are served. */
static void test_at_once(void **state)
{
	struct reader r[READERS];
	_Atomic unsigned done;

	for (enum how how = DIRECT; how <= MAPPED; how++) {
		struct serve s;
		start(&s, 0, 0);
		start_readers(&s, r, how, &done);
		if (!serve_until(&s.sh->waiting, READERS))
			fail_msg("kind %d: only %u of %d calls came through", how, atomic_load(&s.sh->waiting), READERS);
		assert_true(serve_tell(&s, 'b') >= READERS);
		check_local(&s);
		assert_int_equal(atomic_load(&done), 0);
		atomic_store(&s.sh->open, true);
		join_readers(r, 0);
		assert_int_equal(atomic_load(&s.sh->waiting), 0);
		serve_end(&s);
	}
}

static void wait_blocked(struct serve *s, int64_t n)
{
	uint64_t until = far_now() + SERVE_LIMIT;

	while (serve_tell(s, 'b') < n && far_now() < until)
		far_sleep_until(far_now() + FAR_MSEC, false);
	assert_int_equal(serve_tell(s, 'b'), n);
}

/* More calls than threads: the rest is parked, local bytes are still served, and in the end everybody is. */
static void test_limit(void **state)
{
	struct reader r[READERS];
	_Atomic unsigned done;

	for (enum how how = DIRECT; how <= MAPPED; how++) {
		struct serve s;
		start(&s, 4, 0);
		start_readers(&s, r, how, &done);
		assert_true(serve_until(&s.sh->waiting, 4));
		check_local(&s);
		if (how == DIRECT) {
			/* The kernel holds none of these back: all come here and are parked. */
			wait_blocked(&s, READERS);
		}
		check_local(&s);
		assert_int_equal(atomic_load(&s.sh->waiting_max), 4);
		atomic_store(&s.sh->open, true);
		join_readers(r, 0);
		assert_int_equal(atomic_load(&s.sh->waiting_max), 4);
		serve_end(&s);
	}
}

struct writer {
	struct far_thread thread;
	int fd;
	char *data;
	ssize_t n;
};

static void *writer_main(void *arg)
{
	struct writer *w = arg;
	w->n = pwrite(w->fd, w->data, STRIDE, LOCAL + 3 * STRIDE);
	return NULL;
}

/* A parked write keeps its data while the receivers go on receiving other writes. */
static void test_parked_write(void **state)
{
	struct reader r[READERS];
	struct serve s;
	_Atomic unsigned done;
	struct writer w = { .data = malloc(STRIDE) };
	char *back = malloc(STRIDE);

	start(&s, 2, 0);
	w.fd = open(s.path, O_RDWR | O_CLOEXEC);
	char *m = mmap(NULL, LOCAL, PROT_READ | PROT_WRITE, MAP_SHARED, w.fd, 0);
	assert_ptr_not_equal(m, MAP_FAILED);
	start_readers(&s, r, DIRECT, &done);
	wait_blocked(&s, READERS);
	memset(w.data, 0x77, STRIDE);
	assert_int_equal(far_thread_start(&w.thread, "writer", writer_main, &w), 0);
	wait_blocked(&s, READERS + 1);
	for (int round = 0; round < 10; round++) {
		memset(m, 0xe0 + round, LOCAL);
		assert_int_equal(sync_file_range(w.fd, 0, LOCAL, SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER), 0);
	}
	assert_int_equal(far_io_pread(s.memfd, 0, back, LOCAL, 0), 0);
	assert_memory_equal(back, m, LOCAL);
	atomic_store(&s.sh->open, true);
	far_thread_join(&w.thread);
	assert_int_equal(w.n, STRIDE);
	for (unsigned i = 0; i < READERS; i++)
		far_thread_join(&r[i].thread);
	assert_int_equal(far_io_pread(s.memfd, LOCAL + 3 * STRIDE, back, STRIDE, 0), 0);
	assert_memory_equal(back, w.data, STRIDE);
	munmap(m, LOCAL);
	close(w.fd);
	serve_end(&s);
	free(back);
	free(w.data);
}

static void test_stop(void **state)
{
	struct reader r[READERS];
	struct serve s;
	_Atomic unsigned done;

	start(&s, 16, 0);
	start_readers(&s, r, DIRECT, &done);
	assert_true(serve_until(&s.sh->waiting, 16));
	assert_int_equal(serve_tell(&s, 's'), 0);
	join_readers(r, EIO);
	serve_end(&s);
}

static void test_deadline(void **state)
{
	struct reader r[READERS];
	struct serve s;
	_Atomic unsigned done;

	for (unsigned max = 8; max <= 256; max += 248) {
		start(&s, max, FAR_SEC / 5);
		start_readers(&s, r, DIRECT, &done);
		join_readers(r, EIO); /* parked ones too */
		atomic_store(&s.sh->open, true);
		start_readers(&s, r, DIRECT, &done);
		join_readers(r, 0);
		serve_end(&s);
	}
}

static void kill_handler(int sig)
{
}

/* A program that reads an absent byte, or flushes. */
static pid_t start_program(struct serve *s, bool flush)
{
	fflush(stdout);
	pid_t pid = fork();
	if (pid == 0) {
		char c;
		int fd = open(s->path, O_RDWR);
		posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
		_exit(flush ? fsync(fd) : pread(fd, &c, 1, LOCAL) == 1);
	}
	return pid;
}

/* A program that is killed while it waits for a page or for a flush goes at once; other signals do not cut a call short. */
static void test_kill(void **state)
{
	struct serve s;
	int status;

	for (int flush = 0; flush < 2; flush++) {
		start(&s, 0, 0);
		pid_t pid = start_program(&s, flush);
		assert_true(serve_until(&s.sh->waiting, 1));
		kill(pid, SIGKILL);
		assert_int_equal(waitpid(pid, &status, 0), pid);
		assert_true(WIFSIGNALED(status));
		assert_int_equal(atomic_load(&s.sh->waiting), 1); /* nobody had to open the gate */
		check_local(&s);
		serve_end(&s);
	}
	start(&s, 0, 0);
	pid_t pid = fork();
	if (pid == 0) {
		char c;
		int fd = open(s.path, O_RDONLY);
		posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
		signal(SIGUSR1, kill_handler);
		_exit(pread(fd, &c, 1, LOCAL) == 1 ? 7 : 8);
	}
	assert_true(serve_until(&s.sh->waiting, 1));
	kill(pid, SIGUSR1);
	check_local(&s);
	atomic_store(&s.sh->open, true);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	serve_end(&s);
}

/* In place of libfuse's: with `kill_asking` the program is killed, and the request known to be interrupted, before the
 * server says what to call then. libfuse calls it at once, with the request's lock held: answering frees both. */
static bool kill_asking;
static _Thread_local bool kill_inside;

void fuse_req_interrupt_func(fuse_req_t req, fuse_interrupt_func_t func, void *data)
{
	void (*real)(fuse_req_t, fuse_interrupt_func_t, void *);
	uint64_t until = far_now() + SERVE_LIMIT;

	*(void **)&real = dlsym(RTLD_NEXT, "fuse_req_interrupt_func");
	if (kill_asking) {
		kill(fuse_req_ctx(req)->pid, SIGKILL);
		while (!fuse_req_interrupted(req) && far_now() < until)
			far_sleep_until(far_now() + FAR_MSEC, false);
	}
	kill_inside = true;
	real(req, func, data);
	kill_inside = false;
}

int fuse_reply_err(fuse_req_t req, int e)
{
	int (*real)(fuse_req_t, int);

	*(void **)&real = dlsym(RTLD_NEXT, "fuse_reply_err");
	if (kill_inside) {
		fprintf(stderr, "a request is answered, and so freed, with its lock held\n");
		_exit(1);
	}
	return real(req, e);
}

/* A program that is dead before its call could be answered early: the call is not carried out, and it goes at once. */
static void test_killed_before(void **state)
{
	struct serve s;
	int status;

	for (int flush = 0; flush < 2; flush++) {
		kill_asking = true;
		start(&s, 0, 0);
		kill_asking = false;
		pid_t pid = start_program(&s, flush);
		assert_int_equal(waitpid(pid, &status, 0), pid);
		assert_true(WIFSIGNALED(status));
		assert_int_equal(atomic_load(&s.sh->waiting_max), 0);
		atomic_store(&s.sh->open, true); /* the flush that comes with the last close */
		serve_end(&s);
	}
}

static void test_busy(void **state)
{
	struct serve s;

	start(&s, 0, 0);
	int fd = open(s.path, O_RDWR);
	assert_true(fd >= 0);
	assert_int_equal(serve_tell(&s, 'u'), -EBUSY);
	check_local(&s);
	assert_int_equal(serve_tell(&s, 'W'), 0);
	close(fd);
	assert_int_equal(serve_tell(&s, 'u'), 0);
	assert_int_equal(serve_tell(&s, 'w'), 1);
	assert_int_equal(serve_tell(&s, 'u'), 0);
	struct stat st;
	assert_int_equal(stat(s.path, &st), -1);
	serve_end(&s);
}

static void test_detach(void **state)
{
	struct serve s;
	struct stat st;
	char buf[100], back[100];

	for (int file = 0; file < 2; file++) {
		serve_start(&s, &(struct serve_conf){ .bytes = BYTES, .file = file });
		int fd = open(s.path, O_RDWR);
		assert_true(fd >= 0);
		char *m = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 4096);
		assert_ptr_not_equal(m, MAP_FAILED);
		assert_int_equal(serve_tell(&s, 'd'), 0);
		assert_true(stat(s.path, &st) || st.st_size == 0); /* the path is what it was before */
		assert_int_equal(serve_tell(&s, 'W'), 0);
		memset(buf, 0x33, sizeof buf);
		assert_int_equal(pwrite(fd, buf, sizeof buf, 70000), sizeof buf);
		m[0] = 0x44;
		assert_int_equal(fsync(fd), 0);
		assert_int_equal(far_io_pread(s.memfd, 70000, back, sizeof back, 0), 0);
		assert_memory_equal(buf, back, sizeof buf);
		assert_int_equal(far_io_pread(s.memfd, 4096, back, 1, 0), 0);
		assert_int_equal(back[0], 0x44);
		m[1] = 0x55; /* dirty at the end: written back before the mount is gone */
		close(fd);
		assert_int_equal(serve_tell(&s, 'W'), 0);
		munmap(m, 8192);
		assert_int_equal(serve_tell(&s, 'w'), 1);
		assert_int_equal(far_io_pread(s.memfd, 4097, back, 1, 0), 0);
		assert_int_equal(back[0], 0x55);
		serve_end(&s);
	}
}

/* Closed with a handle open and a call blocked: both get errors, nothing hangs, the mount is gone. */
static void test_abort(void **state)
{
	struct reader r[READERS];
	struct serve s;
	_Atomic unsigned done;
	char c;

	start(&s, 8, 0);
	int fd = open(s.path, O_RDONLY);
	assert_int_equal(pread(fd, &c, 1, 0), 1);
	start_readers(&s, r, DIRECT, &done);
	assert_true(serve_until(&s.sh->waiting, 8));
	serve_end(&s);
	for (unsigned i = 0; i < READERS; i++) {
		far_thread_join(&r[i].thread);
		assert_true(r[i].error != 0);
	}
	errno = 0;
	assert_int_equal(pread(fd, &c, 1, BYTES / 2), -1);
	assert_true(errno == ENOTCONN || errno == ECONNABORTED);
	close(fd);
}

/* Somebody else unmounts it. */
static void test_unmounted(void **state)
{
	struct serve s;
	char command[300], dir[200];

	start(&s, 0, 0);
	strcpy(dir, s.path);
	*strrchr(dir, '/') = 0;
	snprintf(command, sizeof command, geteuid() ? "fusermount3 -u '%s'" : "umount '%s'", dir);
	assert_int_equal(system(command), 0);
	assert_int_equal(serve_tell(&s, 'w'), 1);
	assert_int_equal(serve_tell(&s, 'u'), 0);
	assert_int_equal(serve_tell(&s, 'd'), 0);
	serve_end(&s);
}

static void open_error(const char *target, const char *name, int code, const char *says)
{
	struct far_backend *b;
	struct far_fuse *f = NULL;
	struct far_error err = { 0 };

	assert_int_equal(far_open("mem:4K", NULL, &b, &err), 0);
	struct far_fuse_conf c = { .b = b, .target = target, .name = name, .deadline = FAR_NEVER };
	assert_int_equal(far_fuse_open(&c, &f, &err), -code);
	assert_null(f);
	assert_int_equal(err.code, code);
	if (!strstr(err.text, says))
		fail_msg("'%s' does not say '%s'", err.text, says);
	far_close(b);
}

/* The server dies: programs get ENOTCONN, and a new mount there says what to do. */
static void test_dead_server(void **state)
{
	struct serve s;
	char command[300], dir[200];

	start(&s, 0, 0);
	strcpy(dir, s.path);
	*strrchr(dir, '/') = 0;
	open_error(dir, "region", EBUSY, "already");
	int fd = open(s.path, O_RDONLY);
	kill(s.pid, SIGKILL);
	waitpid(s.pid, NULL, 0);
	assert_int_equal(open(s.path, O_RDONLY), -1);
	assert_int_equal(errno, ENOTCONN);
	open_error(dir, "region", ENOTCONN, "fusermount3 -u");
	close(fd);
	snprintf(command, sizeof command, geteuid() ? "fusermount3 -u '%s'" : "umount '%s'", dir);
	assert_int_equal(system(command), 0);
	assert_int_equal(rmdir(dir), 0);
	assert_int_equal(rmdir(s.dir), 0);
}

static void test_open_errors(void **state)
{
	char dir[] = "/tmp/far-fuse-XXXXXX", fifo[100];

	assert_non_null(mkdtemp(dir));
	snprintf(fifo, sizeof fifo, "%s/fifo", dir);
	assert_int_equal(mkfifo(fifo, 0600), 0);
	open_error("/nonexistent/x", "region", ENOENT, "cannot mount on /nonexistent/x: there is no such");
	open_error(dir, "a/b", EINVAL, "no file name");
	open_error(dir, "", EINVAL, "no file name");
	open_error(dir, "..", EINVAL, "no file name");
	open_error(fifo, "region", EINVAL, "neither a directory nor a regular file");
	unlink(fifo);
	rmdir(dir);
}

/* A file system inside the region, through a loop device. */
static void test_loop(void **state)
{
	struct serve s;
	char command[900];

	if (geteuid() != 0 || access("/dev/loop-control", R_OK | W_OK) || system("command -v mkfs.ext4 >/dev/null")) {
		printf("test_loop: skipped: needs root, /dev/loop-control and mkfs.ext4\n");
		skip();
	}
	serve_start(&s, &(struct serve_conf){ .bytes = 64 << 20, .keep_cache = true });
	snprintf(command, sizeof command,
		 "set -e; cd '%s'; mkdir fs; l=$(losetup -f --show '%s'); trap 'losetup -d $l' EXIT; mkfs.ext4 -q $l; "
		 "mount $l fs; head -c 20000000 /dev/urandom > data; cp data fs/; sync; umount fs; mount $l fs; "
		 "cmp data fs/data; rm fs/data; fstrim fs || :; umount fs; e2fsck -fn $l >/dev/null 2>&1; rmdir fs; rm data",
		 s.dir, s.path);
	int r = system(command);
	if (r) {
		printf("test_loop: the commands ended with %d\n", r);
		snprintf(command, sizeof command, "umount '%s/fs'; rm -rf '%s/fs' '%s/data'", s.dir, s.dir, s.dir);
		assert_int_not_equal(system(command), -1);
	}
	assert_int_equal(r, 0);
	/* losetup -d is done by the last user of the device, a little later */
	uint64_t until = far_now() + SERVE_LIMIT;
	while (serve_tell(&s, 'u') && far_now() < until)
		far_sleep_until(far_now() + 10 * FAR_MSEC, false);
	serve_end(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_at_once),	    cmocka_unit_test(test_limit),
		cmocka_unit_test(test_parked_write), cmocka_unit_test(test_stop),
		cmocka_unit_test(test_deadline),
		cmocka_unit_test(test_kill),	    cmocka_unit_test(test_killed_before),
		cmocka_unit_test(test_busy),
		cmocka_unit_test(test_detach),	    cmocka_unit_test(test_abort),
		cmocka_unit_test(test_unmounted),   cmocka_unit_test(test_dead_server),
		cmocka_unit_test(test_open_errors), cmocka_unit_test(test_loop),
	};

	signal(SIGPIPE, SIG_IGN);
	if (serve_skip("fuse_block"))
		return 77;
	return cmocka_run_group_tests_name("fuse_block", tests, NULL, NULL);
}
