/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The library's file face, built against the installed header and the shared library alone. */
#include <farpage.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
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

#define SIZE (8u << 20)

static char dir[] = "/tmp/farpage-library-XXXXXX";

/* A backend of ours: what the child reads and writes comes back to this process. */
static struct {
	unsigned char data[SIZE];
	_Atomic unsigned flushes;
	_Atomic int fail;
} own;

static int own_read(void *opaque, uint64_t off, void *buf, size_t len)
{
	if (own.fail)
		return -own.fail;
	memcpy(buf, own.data + off, len);
	return 0;
}

static int own_write(void *opaque, uint64_t off, const void *buf, size_t len)
{
	if (own.fail)
		return -own.fail;
	memcpy(own.data + off, buf, len);
	return 0;
}

static int own_flush(void *opaque)
{
	own.flushes++;
	return 0;
}

static struct far_backend *own_backend(void)
{
	struct far_backend *b;

	own.fail = 0;
	for (unsigned k = 0; k < SIZE; k++)
		own.data[k] = (unsigned char)(k * 7 + (k >> 12));
	assert_int_equal(far_backend_from(own_read, own_write, SIZE, own_flush, NULL, &b), 0);
	return b;
}

struct calls {
	_Atomic unsigned before_flush, before_close, progress;
	_Atomic uint64_t local;
	_Atomic int refuse;
};

static int before_flush(void *opaque)
{
	struct calls *c = opaque;
	c->before_flush++;
	return -c->refuse;
}

static int before_close(void *opaque)
{
	((struct calls *)opaque)->before_close++;
	return 0;
}

static void chunk_local(void *opaque, uint64_t off, uint64_t len)
{
	((struct calls *)opaque)->local += len;
}

static void progress(void *opaque, const struct far_status *st)
{
	assert_int_equal(st->bytes, SIZE);
	((struct calls *)opaque)->progress++;
}

static struct far_mount *open_own(const struct far_mount_opts *o)
{
	struct far_backend *b = own_backend();
	struct far_error err = { 0 };
	struct far_mount *m = NULL;

	if (far_mount_open(b, dir, o, &m, &err) < 0)
		fail_msg("%s", err.text);
	return m;
}

static void a_backend_of_ours_is_a_file(void **state)
{
	struct far_mount *m = open_own(NULL);
	unsigned char buf[5000];
	int fd = far_fd(m);

	assert_true(fd >= 0);
	assert_int_equal(pread(fd, buf, sizeof buf, 12345), sizeof buf);
	assert_memory_equal(buf, own.data + 12345, sizeof buf);
	memset(buf, 0xaa, sizeof buf);
	assert_int_equal(pwrite(fd, buf, sizeof buf, 777), sizeof buf);
	/* A store through a mapping is there after a flush too. */
	unsigned char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	assert_true(p != MAP_FAILED);
	p[SIZE - 1] = 0x5a;
	assert_int_equal(far_mount_flush(m), 0);
	assert_memory_equal(own.data + 777, buf, sizeof buf);
	assert_int_equal(own.data[SIZE - 1], 0x5a);
	assert_true(own.flushes > 0);
	munmap(p, SIZE);
	struct far_status st = FAR_STATUS_INIT;
	assert_int_equal(far_mount_status(m, &st), 0);
	assert_int_equal(st.bytes, SIZE);
	assert_int_equal(st.mode, FAR_MODE_DIRECT);
	assert_int_equal(far_mount_close(m), 0);
}

static void managed_with_hooks(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct calls c = { 0 };
	unsigned char buf[1000];

	o.mode = FAR_MODE_MANAGED;
	o.chunk = 65536;
	o.opaque = &c;
	o.before_flush = before_flush;
	o.before_close = before_close;
	o.chunk_local = chunk_local;
	o.progress = progress;
	struct far_mount *m = open_own(&o);
	assert_int_equal(far_mount_wait_range(m, SIZE - 100, 100, 20000), 0);
	assert_int_equal(far_mount_wait(m, 100, 20000), 0);
	memset(buf, 0x33, sizeof buf);
	assert_int_equal(pwrite(far_fd(m), buf, sizeof buf, 4000), sizeof buf);
	struct far_status st = FAR_STATUS_INIT;
	assert_int_equal(far_mount_status(m, &st), 0);
	assert_int_equal(st.local, SIZE);
	c.refuse = EBUSY;
	assert_int_equal(far_mount_flush(m), -EBUSY);
	c.refuse = 0;
	assert_int_equal(far_mount_flush(m), 0);
	assert_memory_equal(own.data + 4000, buf, sizeof buf);
	assert_true(c.before_flush >= 2);
	memset(own.data + 4000, 0, sizeof buf); /* what is written now must come with close */
	memset(buf, 0x44, sizeof buf);
	assert_int_equal(pwrite(far_fd(m), buf, sizeof buf, 4000), sizeof buf);
	assert_int_equal(far_mount_close(m), 0);
	assert_memory_equal(own.data + 4000, buf, sizeof buf);
	assert_int_equal(c.before_close, 1);
	assert_int_equal(c.local, SIZE);
	assert_true(c.progress > 0);
}

static void a_uri_is_opened_by_the_child(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_error err = { 0 };
	struct far_mount *m;
	char uri[100], target[100], buf[6];

	snprintf(uri, sizeof uri, "file:%s/source?size=100000", dir);
	snprintf(target, sizeof target, "%s/target", dir);
	close(open(target, O_CREAT | O_WRONLY, 0600));
	o.mode = FAR_MODE_MANAGED;
	if (far_mount_open_uri(uri, target, &o, &m, &err) < 0)
		fail_msg("%s", err.text);
	assert_string_equal(far_path(m), target);
	assert_int_equal(pwrite(far_fd(m), "hello", 6, 99990), 6);
	assert_int_equal(far_mount_close(m), 0);
	snprintf(target, sizeof target, "%s/source", dir);
	int fd = open(target, O_RDONLY);
	assert_int_equal(pread(fd, buf, 6, 99990), 6);
	assert_string_equal(buf, "hello");
	close(fd);
}

static void errors_have_the_childs_sentence(void **state)
{
	const struct {
		const char *uri, *target, *says;
	} bad[] = {
		{ "file:/nonexistent/x", NULL, "/nonexistent/x" },
		{ "gopher://x", NULL, "gopher" },
		{ "mem:1M", "/nonexistent", "/nonexistent" },
		{ "mem:1M?what=1", NULL, "what" },
	};

	for (size_t k = 0; k < sizeof bad / sizeof bad[0]; k++) {
		struct far_error err = { 0 };
		struct far_mount *m = NULL;
		assert_true(far_mount_open_uri(bad[k].uri, bad[k].target ? bad[k].target : dir, NULL, &m, &err) < 0);
		assert_null(m);
		assert_true(err.code > 0);
		if (!strstr(err.text, bad[k].says))
			fail_msg("'%s' does not name '%s'", err.text, bad[k].says);
	}
}

static void a_failing_backend_is_an_error_for_the_program(void **state)
{
	struct far_mount *m = open_own(NULL);
	char c;

	own.fail = EIO;
	assert_int_equal(pread(far_fd(m), &c, 1, 1 << 20), -1);
	assert_int_equal(errno, EIO);
	own.fail = 0;
	assert_int_equal(pread(far_fd(m), &c, 1, 1 << 20), 1);
	assert_int_equal(far_mount_close(m), 0);
}

/* The process number of our farpage-serve. */
static int child_of_ours(void)
{
	DIR *d = opendir("/proc");
	struct dirent *e;
	int found = 0;

	while (d && !found && (e = readdir(d))) {
		char name[300], comm[64];
		int pid, parent;
		snprintf(name, sizeof name, "/proc/%s/stat", e->d_name);
		FILE *f = fopen(name, "r");
		if (f && fscanf(f, "%d (%63[^)]) %*c %d", &pid, comm, &parent) == 3 && parent == getpid() &&
		    strncmp(comm, "farpage-serve", 13) == 0)
			found = pid;
		if (f)
			fclose(f);
	}
	if (d)
		closedir(d);
	return found;
}

static void a_killed_child_is_an_error_not_a_hang(void **state)
{
	struct far_mount *m = open_own(NULL);
	char c;
	int fd = far_fd(m), pid = child_of_ours();

	assert_true(pid > 0);
	kill(pid, SIGKILL);
	assert_int_equal(pread(fd, &c, 1, 0), -1);
	assert_true(errno == ENOTCONN || errno == ECONNABORTED || errno == EIO);
	assert_int_equal(far_mount_flush(m) < 0, 1);
	assert_int_equal(far_mount_close(m), -ENOTCONN);
}

/* A program that dies takes its mount along: nothing is left behind but what it had written. */
static void the_program_dies(void **state)
{
	int up[2];
	char c = 0, line[300], target[100];

	assert_int_equal(pipe(up), 0);
	snprintf(target, sizeof target, "%s/target", dir);
	pid_t pid = fork();
	if (pid == 0) {
		struct far_mount *m;
		char uri[100];
		snprintf(uri, sizeof uri, "file:%s/source", dir);
		if (far_mount_open_uri(uri, target, NULL, &m, NULL) == 0 && pwrite(far_fd(m), "after", 6, 5) == 6)
			c = 1;
		if (write(up[1], &c, 1) != 1)
			_exit(1);
		pause();
		_exit(0);
	}
	assert_int_equal(read(up[0], &c, 1), 1);
	assert_int_equal(c, 1);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	close(up[0]);
	close(up[1]);
	bool mounted = true;
	for (time_t until = time(NULL) + 20; mounted && time(NULL) < until; usleep(10000)) {
		FILE *f = fopen("/proc/self/mounts", "r");
		mounted = false;
		while (fgets(line, sizeof line, f))
			mounted = mounted || strstr(line, target);
		fclose(f);
	}
	assert_false(mounted);
	snprintf(target, sizeof target, "%s/source", dir);
	int fd = open(target, O_RDONLY);
	assert_int_equal(pread(fd, line, 6, 5), 6);
	assert_string_equal(line, "after");
	close(fd);
}

/* A server of this process, its export, a mount by the child and a client of this process. */
struct family {
	struct far_backend *content, *client;
	struct far_server *server;
	struct far_mount *mount;
	char *uri, target[100], local[120];
};

static void family_serve(struct family *f)
{
	struct far_server_opts so = FAR_SERVER_OPTS_INIT;
	struct far_error err = { 0 };
	char *bound = NULL;

	assert_int_equal(far_server_new(&so, &f->server, &err), 0);
	assert_int_equal(far_server_export(f->server, "x", f->content, &err), 0);
	if (far_server_listen(f->server, f->uri ? f->uri : "grpc://127.0.0.1:0", &bound, &err) < 0)
		fail_msg("%s", err.text);
	if (f->uri)
		free(bound);
	else
		f->uri = bound;
}

static void family_unserve(struct family *f)
{
	far_server_stop(f->server);
	far_server_free(f->server);
	f->server = NULL;
}

static void family_mount(struct family *f, struct far_mount_opts *o)
{
	struct far_error err = { 0 };

	o->mode = FAR_MODE_MANAGED;
	o->local = f->local;
	o->durable = FAR_DURABLE_LOCAL;
	o->deadline_ms = 1000;
	if (far_mount_open_uri(f->uri, f->target, o, &f->mount, &err) < 0)
		fail_msg("%s", err.text);
}

static void family_open(struct family *f, const char *name)
{
	struct far_error err = { 0 };
	char uri[100];

	*f = (struct family){ .uri = NULL };
	snprintf(f->target, sizeof f->target, "%s/%s.target", dir, name);
	snprintf(f->local, sizeof f->local, "file:%s/%s.local", dir, name);
	snprintf(uri, sizeof uri, "file:%s/%s.content?size=1000000", dir, name);
	close(open(f->target, O_CREAT | O_WRONLY, 0600));
	if (far_open(uri, NULL, &f->content, &err) < 0)
		fail_msg("%s", err.text);
	family_serve(f);
}

static void what_is_kept_is_pushed_by_the_next_mount(void **state)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_status st = FAR_STATUS_INIT;
	struct family f;
	char buf[6];

	family_open(&f, "kept");
	family_mount(&f, &o);
	assert_int_equal(far_mount_wait(f.mount, 100, 20000), 0);
	assert_int_equal(far_mount_status(f.mount, &st), 0);
	assert_true(st.persistent);
	assert_int_equal(st.lease, FAR_LEASE_HELD);
	assert_true(st.epoch > 0);
	assert_int_equal(far_mount_pin(f.mount, 100, 100), 0);
	assert_int_equal(far_mount_evict(f.mount, 0, 1000000), 0);
	assert_int_equal(far_mount_status(f.mount, &st), 0);
	assert_int_equal(st.pinned, 65536);
	assert_int_equal(st.local, 65536);
	assert_int_equal(far_mount_unpin(f.mount, 0, UINT64_MAX), 0);
	assert_int_equal(far_mount_wait_range(f.mount, 0, 1000000, 20000), 0);
	family_unserve(&f);
	assert_int_equal(pwrite(far_fd(f.mount), "kept!", 6, 77777), 6);
	assert_int_equal(far_mount_flush(f.mount), 0); /* it is in the local store */
	assert_true(far_mount_close(f.mount) < 0);     /* and nowhere else */
	family_mount(&f, &o); /* offline */
	assert_int_equal(pread(far_fd(f.mount), buf, 6, 77777), 6);
	assert_string_equal(buf, "kept!");
	assert_int_equal(far_mount_status(f.mount, &st), 0);
	assert_int_equal(st.lease, FAR_LEASE_UNSURE);
	assert_true(st.dirty > 0);
	family_serve(&f);
	for (time_t until = time(NULL) + 20; st.lease != FAR_LEASE_HELD && time(NULL) < until; usleep(10000))
		assert_int_equal(far_mount_status(f.mount, &st), 0);
	assert_int_equal(st.lease, FAR_LEASE_HELD);
	assert_int_equal(far_mount_close(f.mount), 0);
	assert_int_equal(far_read(f.content, 77777, buf, 6, 0), 0);
	assert_string_equal(buf, "kept!");
	family_unserve(&f);
	far_close(f.content);
	free(f.uri);
}

/* Three handles that know of each other, in all orders; the content outlives its server. */
static void handles_are_closed_in_any_order(void **state)
{
	static const char *const orders[] = { "mcs", "msc", "cms", "csm", "smc", "scm" };
	struct far_error err = { 0 };

	far_close(NULL);
	far_server_free(NULL);
	assert_int_equal(far_mount_close(NULL), 0);
	for (size_t k = 0; k < sizeof orders / sizeof orders[0]; k++) {
		struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
		struct far_open_opts oo = FAR_OPEN_OPTS_INIT;
		struct family f;
		char name[20];
		bool served = true;
		oo.read_only = true;
		snprintf(name, sizeof name, "order%zu", k);
		family_open(&f, name);
		family_mount(&f, &o);
		if (far_open(f.uri, &oo, &f.client, &err) < 0)
			fail_msg("%s", err.text);
		assert_int_equal(pwrite(far_fd(f.mount), "order", 6, 10), 6);
		for (const char *c = orders[k]; *c; c++) {
			int r;
			switch (*c) {
			case 'm':
				r = far_mount_close(f.mount);
				assert_true(served ? r == 0 : r < 0);
				break;
			case 'c':
				far_close(f.client);
				break;
			default:
				family_unserve(&f);
				served = false;
			}
		}
		far_close(f.content);
		free(f.uri);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_backend_of_ours_is_a_file),
		cmocka_unit_test(managed_with_hooks),
		cmocka_unit_test(a_uri_is_opened_by_the_child),
		cmocka_unit_test(errors_have_the_childs_sentence),
		cmocka_unit_test(a_failing_backend_is_an_error_for_the_program),
		cmocka_unit_test(a_killed_child_is_an_error_not_a_hang),
		cmocka_unit_test(the_program_dies),
		cmocka_unit_test(what_is_kept_is_pushed_by_the_next_mount),
		cmocka_unit_test(handles_are_closed_in_any_order),
	};
	if (access("/dev/fuse", R_OK | W_OK)) {
		printf("1..0 # SKIP /dev/fuse cannot be used: %s\n", strerror(errno));
		return 77;
	}
	if (!mkdtemp(dir))
		return 1;
	int r = cmocka_run_group_tests_name("library", tests, NULL, NULL);
	char cmd[200] = "true";
	if (r) /* a case that failed may have left its mount */
		printf("%s is left as it was\n", dir);
	else
		snprintf(cmd, sizeof cmd, "rm -rf --one-file-system %s", dir);
	return system(cmd) ? 1 : r;
}
