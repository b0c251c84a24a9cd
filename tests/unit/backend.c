/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The dispatcher, the leaves' own rules, and the sentences of far_open(). What all backends share is in tests/contract. */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "base/thread.h"
#include "open.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static char tmp[64];

static const char *in_tmp(const char *fmt, ...)
{
	static char text[4][400];
	static int turn;
	char *to = text[turn++ % 4];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(to, sizeof text[0], fmt, ap);
	va_end(ap);
	return to;
}

static void opens(const char *uri, struct far_backend **b)
{
	struct far_error err;
	if (far_open(uri, NULL, b, &err))
		fail_msg("%s", err.text);
}

/* The sentence may have the temporary directory in it as '$'. */
static void refuses(const char *uri, int code, const char *want)
{
	struct far_backend *b = NULL;
	struct far_error err;
	char text[1200] = "";
	size_t at = 0;

	assert_int_equal(far_open(uri, NULL, &b, &err), -code);
	assert_null(b);
	assert_int_equal(err.code, code);
	for (; *want; want++)
		at += (size_t)(*want == '$' ? snprintf(text + at, sizeof text - at, "%s", tmp) :
					       snprintf(text + at, sizeof text - at, "%c", *want));
	assert_string_equal(err.text, text);
	assert_int_equal(far_open(uri, NULL, &b, NULL), -code);
}

/* --------------------------------------------------------------------------------------------- dispatcher */

/* A backend that writes down what it is asked. */
struct scribe {
	char log[2000];
	int answer;
	int clear_answer;
	struct far_extent extents[4];
	size_t n_extents;
	int closed, stopped, flushes;
};

static void scribe_note(struct scribe *s, const char *what, uint64_t off, uint64_t len)
{
	size_t at = strlen(s->log);
	snprintf(s->log + at, sizeof s->log - at, "%s%" PRIu64 "+%" PRIu64 " ", what, off, len);
}

static int scribe_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct scribe *s = self;
	scribe_note(s, "r", off, len);
	memset(buf, 1, len);
	return s->answer;
}

static int scribe_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct scribe *s = self;
	scribe_note(s, "w", off, len);
	return s->answer;
}

static int scribe_flush(void *self)
{
	struct scribe *s = self;
	s->flushes++;
	return s->answer;
}

static int scribe_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct scribe *s = self;
	scribe_note(s, "d", off, len);
	return s->clear_answer;
}

static int scribe_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct scribe *s = self;
	scribe_note(s, "z", off, len);
	return s->clear_answer;
}

static int scribe_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct scribe *s = self;
	scribe_note(s, "e", off, len);
	*n = s->n_extents;
	memcpy(out, s->extents, sizeof *out * s->n_extents);
	return s->answer;
}

static void scribe_stop(void *self)
{
	((struct scribe *)self)->stopped++;
}

static void scribe_close(void *self)
{
	((struct scribe *)self)->closed++;
}

static const struct far_ops scribe_ops = {
	FAR_OPS_INIT,
	.read = scribe_read,
	.write = scribe_write,
	.flush = scribe_flush,
	.discard = scribe_discard,
	.zero = scribe_zero,
	.extents = scribe_extents,
	.stop = scribe_stop,
	.close = scribe_close,
};

static void contradictions_are_refused(void **state)
{
	static const struct {
		struct far_facts f;
		int want;
	} cases[] = {
		{ { .bytes = FAR_SIZE_MAX, .caps = FAR_CAP_WRITE }, 0 },
		{ { .bytes = FAR_SIZE_MAX + 1 }, -EINVAL },
		{ { .bytes = 5, .chunk = UINT64_MAX }, -EINVAL },
		{ { .bytes = 5, .chunk = 4096, .max_io = 4095 }, -EINVAL },
		{ { .bytes = 5, .chunk = 4096, .max_io = 4096 }, 0 },
		{ { .bytes = 5, .caps = FAR_CAP_SHARE }, -EINVAL },
	};
	struct far_facts f = { .size = sizeof f };
	struct far_ops ops = scribe_ops;
	struct far_backend *b;
	struct scribe s = { .answer = 0 };

	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		f = cases[i].f;
		f.size = sizeof f;
		assert_int_equal(far_backend_new(&scribe_ops, &s, &f, &b), cases[i].want);
		if (!cases[i].want)
			far_close(b);
	}
	f = (struct far_facts){ .size = sizeof f, .caps = FAR_CAP_WRITE };
	ops.write = NULL;
	assert_int_equal(far_backend_new(&ops, &s, &f, &b), -EINVAL);
	ops = scribe_ops;
	ops.read = NULL;
	assert_int_equal(far_backend_new(&ops, &s, &f, &b), -EINVAL);
	ops = scribe_ops;
	ops.flush = NULL;
	assert_int_equal(far_backend_new(&ops, &s, &f, &b), -EINVAL);
	assert_int_equal(far_backend_from(NULL, NULL, 5, NULL, NULL, &b), -EINVAL);
}

/* A program built against a header without the later operations and facts. */
static void older_structs_are_taken(void **state)
{
	struct far_ops ops = scribe_ops;
	struct far_facts f = { .size = offsetof(struct far_facts, caps), .bytes = 100, .caps = FAR_CAP_WRITE };
	struct scribe s = { .answer = 0 };
	struct far_backend *b;
	struct far_extent e;
	size_t n;

	memset(f.identity, 'x', sizeof f.identity);
	ops.size = offsetof(struct far_ops, discard);
	assert_int_equal(far_backend_new(&ops, &s, &f, &b), 0);
	assert_int_equal(far_facts(b)->caps, 0);
	assert_string_equal(far_facts(b)->identity, "");
	assert_int_equal(far_extents(b, 3, 9, &e, 1, &n), 0);
	assert_true(n == 1 && e.off == 3 && e.len == 9 && e.kind == FAR_EXTENT_DATA);
	far_close(b);
	assert_int_equal(s.closed, 0);
	f.size = sizeof f;
	assert_int_equal(far_backend_new(&scribe_ops, &s, &f, &b), 0);
	assert_int_equal(strlen(far_facts(b)->identity), sizeof f.identity - 1);
	far_close(b);
	assert_int_equal(s.closed, 1);
	assert_int_equal(s.stopped, 1);
	far_close(NULL);
	far_stop(NULL);
}

static void long_requests_are_cut(void **state)
{
	struct far_facts f = { .size = sizeof f, .bytes = 1000, .chunk = 100, .max_io = 350, .caps = FAR_CAP_WRITE };
	struct scribe s = { .answer = 0 };
	struct far_backend *b;
	char buf[1000] = "";

	assert_int_equal(far_backend_new(&scribe_ops, &s, &f, &b), 0);
	assert_int_equal(far_facts(b)->max_io, 300);
	assert_int_equal(far_read(b, 100, buf, 700, 0), 0);
	assert_int_equal(far_write(b, 0, buf, 1000, 0), 0);
	assert_string_equal(s.log, "r100+300 r400+300 r700+100 w0+300 w300+300 w600+300 w900+100 ");
	s.log[0] = 0;
	assert_int_equal(far_write(b, 0, buf, 400, FAR_NOWAIT), -EAGAIN);
	assert_int_equal(far_write(b, 0, buf, 300, FAR_NOWAIT), 0);
	assert_string_equal(s.log, "w0+300 ");
	s.log[0] = 0;
	s.answer = -EIO;
	assert_int_equal(far_read(b, 0, buf, 1000, 0), -EIO);
	assert_string_equal(s.log, "r0+300 ");
	far_close(b);
}

static void scribe_read_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	struct scribe *s = self;

	scribe_note(s, "R", n, flags);
	for (size_t i = 0; i < n; i++)
		io[i].result = i == 1 ? s->answer : 0;
}

static void scribe_write_many(void *self, struct far_io *io, size_t n, unsigned flags)
{
	struct scribe *s = self;

	scribe_note(s, "W", n, flags);
	for (size_t i = 0; i < n; i++)
		io[i].result = i == 1 ? s->answer : 0;
}

/* A list goes down whole if each of it is one call there, else piece by piece. */
static void lists_go_down_whole(void **state)
{
	struct far_facts f = { .size = sizeof f, .bytes = 1000, .chunk = 100, .max_io = 300, .caps = FAR_CAP_WRITE };
	struct far_ops ops = scribe_ops;
	struct scribe s = { .answer = 0 };
	struct far_backend *b;
	char buf[1000] = "";
	struct far_io io[] = { { 0, buf, 100, 5 }, { 200, buf, 300, 5 }, { 500, buf, 100, 5 } };

	ops.read_many = scribe_read_many;
	ops.write_many = scribe_write_many;
	assert_int_equal(far_backend_new(&ops, &s, &f, &b), 0);
	assert_int_equal(far_read_many(b, io, 3, FAR_BULK), 0);
	assert_int_equal(far_write_many(b, io, 3, 0), 0);
	assert_int_equal(far_read_many(b, io, 1, 0), 0);
	assert_string_equal(s.log, "R3+2 W3+0 r0+100 ");
	s.log[0] = 0;
	assert_int_equal(far_read_many(b, io, 2, FAR_NOWAIT), 0);
	io[1].len = 400;
	assert_int_equal(far_write_many(b, io, 3, 0), 0);
	assert_string_equal(s.log, "r0+100 r200+300 w0+100 w200+300 w500+100 w500+100 ");
	s.log[0] = 0;
	io[1].off = 150; /* no chunk begins there */
	assert_int_equal(far_read_many(b, io, 3, 0), -EINVAL);
	assert_string_equal(s.log, "r0+100 r500+100 ");
	assert_true(io[0].result == 0 && io[1].result == -EINVAL && io[2].result == 0);
	io[1].off = 200;
	io[1].len = 100;
	/* The flush comes after all of it, and only then. */
	s.log[0] = 0;
	assert_int_equal(far_write_many(b, io, 3, FAR_FLUSH), 0);
	s.answer = -ENOSPC;
	assert_int_equal(far_write_many(b, io, 3, FAR_FLUSH), -ENOSPC);
	assert_true(io[0].result == 0 && io[1].result == -ENOSPC && io[2].result == 0);
	assert_string_equal(s.log, "W3+0 W3+0 ");
	assert_int_equal(s.flushes, 1);
	far_close(b);
}

/* A long list goes down in parts; once one has run out of time the rest is not begun. */
static void long_lists_are_cut(void **state)
{
	struct far_facts f = { .size = sizeof f, .bytes = FAR_SIZE_MAX, .caps = FAR_CAP_WRITE };
	struct far_ops ops = scribe_ops;
	struct scribe s = { .answer = 0 };
	struct far_backend *b;
	struct far_io *io = calloc(2500, sizeof *io);
	static char buf[3 << 20];

	ops.read_many = scribe_read_many;
	assert_int_equal(far_backend_new(&ops, &s, &f, &b), 0);
	for (size_t i = 0; i < 2500; i++)
		io[i] = (struct far_io){ .off = i << 22, .buf = buf, .len = 4096, .result = 1 };
	assert_int_equal(far_read_many(b, io, 2500, 0), 0);
	assert_string_equal(s.log, "R1024+0 R1024+0 R452+0 ");
	assert_true(io[0].result == 0 && io[2499].result == 0);
	for (size_t i = 0; i < 2500; i++)
		io[i].len = sizeof buf;
	s.log[0] = 0;
	assert_int_equal(far_read_many(b, io, 7, 0), 0);
	assert_string_equal(s.log, "R3+0 R3+0 r25165824+3145728 ");
	s.log[0] = 0;
	s.answer = -ETIMEDOUT;
	assert_int_equal(far_read_many(b, io, 7, 0), -ETIMEDOUT);
	assert_string_equal(s.log, "R3+0 ");
	assert_true(io[0].result == 0 && io[1].result == -ETIMEDOUT && io[2].result == 0 && io[3].result == -ETIMEDOUT &&
		    io[6].result == -ETIMEDOUT);
	s.log[0] = 0;
	assert_int_equal(far_write_many(b, io, 7, 0), -ETIMEDOUT);
	assert_string_equal(s.log, "w0+3145728 "); /* one by one, and so the first was the last */
	far_close(b);
	free(io);
}

static void clearing_falls_back(void **state)
{
	struct far_facts f = { .size = sizeof f, .bytes = 3 << 20, .caps = FAR_CAP_WRITE };
	struct far_ops ops = scribe_ops;
	struct scribe s = { .clear_answer = 0 };
	struct far_backend *b;

	assert_int_equal(far_backend_new(&ops, &s, &f, &b), 0);
	assert_int_equal(far_discard(b, 1, 9, 0), 0);
	assert_int_equal(far_zero(b, 2, 9, 0), 0);
	assert_string_equal(s.log, "d1+9 z2+9 ");
	s.clear_answer = -EOPNOTSUPP;
	s.log[0] = 0;
	assert_int_equal(far_discard(b, 1, (2 << 20) + 5, 0), 0);
	assert_string_equal(s.log, "d1+2097157 z1+2097157 w1+1048576 w1048577+1048576 w2097153+5 ");
	assert_int_equal(far_discard(b, 1, 9, FAR_NOWAIT), -EAGAIN);
	s.clear_answer = -EIO;
	s.log[0] = 0;
	assert_int_equal(far_zero(b, 1, 9, 0), -EIO);
	assert_string_equal(s.log, "z1+9 ");
	far_close(b);
	ops.discard = ops.zero = NULL;
	f.chunk = 100000;
	s.log[0] = 0;
	assert_int_equal(far_backend_new(&ops, &s, &f, &b), 0);
	assert_int_equal(far_zero(b, 0, 1100000, 0), 0);
	assert_string_equal(s.log, "w0+1000000 w1000000+100000 ");
	far_close(b);
}

static void extents_are_checked(void **state)
{
	struct far_facts f = { .size = sizeof f, .bytes = 1000, .chunk = 100 };
	struct scribe s = { .n_extents = 3 };
	struct far_extent e[4];
	struct far_backend *b;
	size_t n;

	assert_int_equal(far_backend_new(&scribe_ops, &s, &f, &b), 0);
	/* rounded out for the backend, cut for the caller */
	s.extents[0] = (struct far_extent){ 100, 40, FAR_EXTENT_ZERO };
	s.extents[1] = (struct far_extent){ 140, 60, FAR_EXTENT_DATA };
	s.extents[2] = (struct far_extent){ 200, 800, FAR_EXTENT_ZERO };
	assert_int_equal(far_extents(b, 150, 100, e, 4, &n), 0);
	assert_string_equal(s.log, "e100+200 ");
	assert_int_equal(n, 2);
	assert_true(e[0].off == 150 && e[0].len == 50 && e[0].kind == FAR_EXTENT_DATA);
	assert_true(e[1].off == 200 && e[1].len == 50 && e[1].kind == FAR_EXTENT_ZERO);
	/* a gap, an overlap, no length, a start that is missing, numbers that wrap: no answer at all */
	static const struct far_extent bad[][2] = {
		{ { 100, 40, 0 }, { 150, 50, 0 } }, { { 100, 90, 0 }, { 150, 50, 0 } }, { { 100, 0, 0 }, { 100, 50, 0 } },
		{ { 120, 80, 0 }, { 200, 50, 0 } }, { { UINT64_MAX, 2, 0 }, { 100, 50, 0 } }, { { 100, UINT64_MAX, 0 }, { 0, 0, 0 } },
	};
	s.n_extents = 2;
	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++) {
		memcpy(s.extents, bad[i], sizeof bad[i]);
		assert_int_equal(far_extents(b, 100, 300, e, 4, &n), -EIO);
	}
	/* nothing known is data */
	s.n_extents = 0;
	assert_int_equal(far_extents(b, 150, 100, e, 4, &n), 0);
	assert_true(n == 1 && e[0].off == 150 && e[0].len == 100 && e[0].kind == FAR_EXTENT_DATA);
	s.answer = -EOPNOTSUPP;
	assert_int_equal(far_extents(b, 150, 100, e, 4, &n), 0);
	assert_true(n == 1 && e[0].kind == FAR_EXTENT_DATA);
	s.answer = -EIO;
	assert_int_equal(far_extents(b, 150, 100, e, 4, &n), -EIO);
	far_close(b);
}

static void short_counts_abort(void **state)
{
	struct far_facts f = { .size = sizeof f, .bytes = 1000 };
	struct scribe s = { .answer = 10 };
	struct far_backend *b;
	char buf[10];
	int status;

	assert_int_equal(far_backend_new(&scribe_ops, &s, &f, &b), 0);
	pid_t pid = fork();
	if (!pid) {
		close(STDERR_FILENO);
		far_read(b, 0, buf, 10, 0);
		_exit(0);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
	far_close(b);
}

static int fails_read(void *opaque, uint64_t off, void *buf, size_t len)
{
	return *(int *)opaque;
}

/* W-A8: a store's error is the caller's error, for every code; nothing is turned into success or zeros. */
static void errors_pass_unchanged_W_A8(void **state)
{
	static const int codes[] = { -EIO, -ENOENT, -ETIMEDOUT, -ESTALE, -EPROTO, -ENODATA, -EACCES, -4095 };
	struct far_backend *b;
	char buf[4];
	int code;

	assert_int_equal(far_backend_from(fails_read, NULL, 100, NULL, &code, &b), 0);
	for (size_t i = 0; i < FAR_ARRAY_LEN(codes); i++) {
		code = codes[i];
		assert_int_equal(far_read(b, 0, buf, 4, 0), code);
	}
	far_close(b);
}

static void some_errors_are_worth_another_try(void **state)
{
	static const int yes[] = { EIO, ETIMEDOUT, ECONNRESET, ECONNREFUSED, EPIPE, ENETUNREACH, EHOSTUNREACH },
			 no[] = { 0, EINVAL, EROFS, ENOSPC, ESHUTDOWN, EPROTO, ESTALE, EOPNOTSUPP, EACCES, ENOENT };

	for (size_t i = 0; i < FAR_ARRAY_LEN(yes); i++)
		assert_true(far_error_is_transient(yes[i]) && far_error_is_transient(-yes[i]));
	for (size_t i = 0; i < FAR_ARRAY_LEN(no); i++)
		assert_false(far_error_is_transient(no[i]) || far_error_is_transient(-no[i]));
}

/* ----------------------------------------------------------------------------------------------- far_open */

static void each_refusal_has_its_sentence(void **state)
{
	int fd = open(in_tmp("%s/file", tmp), O_WRONLY | O_CREAT, 0600);
	assert_int_equal(ftruncate(fd, 100), 0);
	close(fd);
	assert_int_equal(mkdir(in_tmp("%s/sub", tmp), 0700), 0);
	assert_int_equal(mkfifo(in_tmp("%s/fifo", tmp), 0600), 0);

	refuses("mem:", EINVAL, "cannot open 'mem:': write mem:SIZE, as in mem:64M.");
	refuses("mem:-1", EINVAL, "cannot open 'mem:-1': write mem:SIZE, as in mem:64M.");
	refuses("mem:8E", EINVAL, "cannot open 'mem:8E': write mem:SIZE, as in mem:64M.");
	refuses("mem://1M", EINVAL, "cannot open 'mem://1M': write mem:SIZE, as in mem:64M.");
	refuses("mem:1M?x=1", EINVAL, "mem:1M?x=1: unknown option 'x'. The known ones are private.");
	refuses("null:x", EINVAL, "cannot open 'null:x': write null: or null:SIZE.");
	refuses("null:?y", EINVAL, "null:?y: unknown option 'y': it takes none.");
	refuses("mem+unix:1M", EINVAL, "cannot open 'mem+unix:1M': 'mem' cannot be combined with '+unix'.");
	refuses("file:", EINVAL, "cannot open 'file:': write file:PATH.");
	refuses("file://host/x", EINVAL, "cannot open 'file://host/x': write file:PATH.");
	refuses(in_tmp("%s/file", tmp), EINVAL,
		"cannot open '$/file': it has no scheme. For a file on this host write file:$/file.");
	refuses(tmp, EINVAL, "cannot open '$': it has no scheme. For a directory on this host write dir:$.");
	refuses(in_tmp("file:%s/no", tmp), ENOENT, "cannot open 'file:$/no': it does not exist. Add ?size=SIZE to create it.");
	refuses(in_tmp("file:%s/no/no?size=1", tmp), ENOENT,
		"cannot open 'file:$/no/no?size=1': its directory does not exist; create it first.");
	refuses(in_tmp("file:%s/sub", tmp), EISDIR,
		"cannot open 'file:$/sub': it is a directory. Use dir:$/sub for one file a chunk.");
	refuses(in_tmp("file:%s/fifo", tmp), EINVAL, "cannot open 'file:$/fifo': it is neither a regular file nor a block device.");
	refuses(in_tmp("file:%s/file?size=101", tmp), EINVAL,
		"cannot open 'file:$/file?size=101': it exists with 100 bytes, not 101. Leave ?size= out to take it as it is.");
	refuses(in_tmp("file:%s/x?size=8E", tmp), EINVAL, "cannot open 'file:$/x?size=8E': a region has less than 2^63 bytes.");
	refuses(in_tmp("file:%s/file?sizes=101", tmp), EINVAL,
		"file:$/file?sizes=101: unknown option 'sizes'. The known ones are size, direct.");
	refuses(in_tmp("dir:%s/no", tmp), ENOENT, "cannot open 'dir:$/no': it does not exist. Add ?size=SIZE to create it.");
	refuses(in_tmp("dir:%s/no/no?size=1", tmp), ENOENT,
		"cannot open 'dir:$/no/no?size=1': the directory above it does not exist.");
	refuses(in_tmp("dir:%s/file", tmp), ENOTDIR, "cannot open 'dir:$/file': it is not a directory. Use file: for a file.");
	refuses(in_tmp("dir:%s/sub", tmp), EINVAL,
		"cannot open 'dir:$/sub': the directory does not tell its size: add ?size=SIZE.");
	refuses("dir:", EINVAL, "cannot open 'dir:': write dir:PATH.");
	refuses(in_tmp("dir:%s/sub?size=8E", tmp), EINVAL,
		"cannot open 'dir:$/sub?size=8E': a region has less than 2^63 bytes.");
	refuses(in_tmp("dir:%s/sub?size=1&max-open=0", tmp), EINVAL,
		"dir:$/sub?size=1&max-open=0: '0' is out of range for 'max-open': give 1 to 65536.");
	refuses(in_tmp("dir:%s/sub?size=1&chunk=0", tmp), EINVAL,
		"dir:$/sub?size=1&chunk=0: '0' is out of range for 'chunk': give 1 B to 1.0 GiB.");

	struct far_error err;
	struct far_backend *b = NULL;
	struct far_open_opts ro = { .size = sizeof ro, .read_only = true };
	assert_int_equal(far_open("nope:1", NULL, &b, &err), -EINVAL);
	assert_non_null(strstr(err.text, "cannot open 'nope:1': unknown scheme. The known ones are mem, file, dir, null"));
	assert_int_equal(far_open(in_tmp("file:%s/no?size=5", tmp), &ro, &b, &err), -ENOENT);
	assert_non_null(strstr(err.text, "it does not exist."));
	assert_int_equal(access(in_tmp("%s/no", tmp), F_OK), -1);
	assert_null(b);
}

static int user_open(void *opaque, const char *uri, const struct far_open_opts *opts, struct far_backend **out,
		     struct far_error *err)
{
	assert_true(opts->size == sizeof *opts && opts->deadline_ms);
	if (!strcmp(uri, "x-mine:fails"))
		return -EACCES;
	struct far_facts f = { .size = sizeof f, .bytes = strlen(uri), .caps = FAR_CAP_WRITE };
	return far_backend_new(&scribe_ops, opaque, &f, out);
}

static void schemes_are_registered(void **state)
{
	struct far_scheme s = { .size = sizeof s, .name = "x-mine", .help = "mine", .open = user_open };
	static const char *const bad[] = { "", "X", "1a", "a:b", "a b", "a/b", "averyveryveryverylongnameofascheme", NULL };
	struct far_scheme_info info;
	struct scribe scribe = { .answer = 0 };
	struct far_backend *b;
	struct far_error err;
	char name[20], user[20];

	s.opaque = &scribe;
	assert_int_equal(far_scheme_register(&s), 0);
	assert_int_equal(far_scheme_register(&s), -EEXIST);
	opens("x-mine:abc?d://%zz", &b);
	assert_int_equal(far_size(b), strlen("x-mine:abc?d://%zz"));
	far_close(b);
	struct far_open_opts ro = { .size = sizeof ro, .read_only = true };
	assert_int_equal(far_open("x-mine:1", &ro, &b, NULL), 0);
	assert_int_equal(far_facts(b)->caps & FAR_CAP_WRITE, 0);
	far_close(b);
	assert_int_equal(far_open("x-mine:fails", NULL, &b, &err), -EACCES);
	assert_string_equal(err.text, "cannot open 'x-mine:fails': Permission denied.");
	assert_int_equal(far_open("nope:1", NULL, &b, &err), -EINVAL);
	assert_non_null(strstr(err.text, ", x-mine."));
	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++) {
		s.name = bad[i];
		assert_int_equal(far_scheme_register(&s), -EINVAL);
	}
	s.name = "mem";
	assert_int_equal(far_scheme_register(&s), -EEXIST);
	s.name = "file+x";
	assert_int_equal(far_scheme_register(&s), -EEXIST);
	s.name = "y";
	s.open = NULL;
	assert_int_equal(far_scheme_register(&s), -EINVAL);
	s.open = user_open;
	s.name = user;
	int r = 0, n = 1;
	for (; !r && n < 100; n++) {
		snprintf(user, sizeof user, "many%d", n);
		r = far_scheme_register(&s);
	}
	assert_int_equal(r, -ENOSPC);
	assert_int_equal(n, 33);
	strcpy(user, "gone"); /* the table was copied */
	opens("many7:x", &b);
	far_close(b);
	size_t i = 0;
	while (far_scheme_info(i, &info))
		snprintf(name, sizeof name, "%s", info.form), i++;
	assert_string_equal(name, "many31");
	assert_true(i > 32);
}

/* --------------------------------------------------------------------------------------------------- leaves */

static void memory_keeps_its_size(void **state)
{
	struct far_backend *b;
	int fd;

	opens("mem:10000", &b);
	assert_int_equal(far_share(b, &fd), 0);
	assert_int_equal(ftruncate(fd, 5), -1);
	assert_int_equal(ftruncate(fd, 50000), -1);
	far_close(b);
}

/* W-B8: an access that crosses the end is refused, and the next call works as before. */
static void memory_survives_its_end_W_B8(void **state)
{
	struct far_backend *b;
	char buf[20] = "";

	opens("mem:10", &b);
	for (int i = 0; i < 3; i++) {
		assert_int_equal(far_read(b, 5, buf, 6, 0), -EINVAL);
		assert_int_equal(far_write(b, 5, buf, 6, 0), -ENOSPC);
		assert_int_equal(far_read(b, (uint64_t)-1, buf, 6, 0), -EINVAL);
		assert_int_equal(far_read(b, 0, buf, 10, 0), 0);
	}
	far_close(b);
}

static void a_new_file_is_sparse(void **state)
{
	struct far_backend *b;
	struct stat st;

	opens(in_tmp("file:%s/new?size=1G", tmp), &b);
	assert_int_equal(stat(in_tmp("%s/new", tmp), &st), 0);
	assert_true(st.st_size == 1 << 30 && st.st_blocks < 100);
	assert_int_equal(far_write(b, 12345, "hello", 5, 0), 0);
	far_close(b);
	opens(in_tmp("file:%s/new?size=1G", tmp), &b);
	far_close(b);
	opens(in_tmp("file:%s/new", tmp), &b);
	char buf[5];
	assert_int_equal(far_read(b, 12345, buf, 5, 0), 0);
	assert_memory_equal(buf, "hello", 5);
	assert_true(far_facts(b)->caps & FAR_CAP_DURABLE);
	far_close(b);
}

/* A file that someone cuts has lost bytes; they are not zeros. */
static void a_cut_file_is_an_error(void **state)
{
	for (int direct = 0; direct < 2; direct++) {
		struct far_backend *b;
		struct far_extent e;
		char buf[8192];
		size_t n;
		opens(in_tmp("file:%s/cut%d?size=16K&direct=%d", tmp, direct, direct), &b);
		memset(buf, 1, sizeof buf);
		assert_int_equal(far_write(b, 0, buf, 8192, 0), 0);
		assert_int_equal(far_write(b, 8192, buf, 8192, 0), 0);
		assert_int_equal(truncate(in_tmp("%s/cut%d", tmp, direct), 5000), 0);
		assert_int_equal(far_read(b, 0, buf, 5000, 0), 0);
		assert_int_equal(far_read(b, 4990, buf, 11, 0), -EIO);
		assert_int_equal(far_read(b, 8192, buf, 8192, 0), -EIO);
		assert_int_equal(far_read(b, 8191, buf, 3, 0), -EIO);
		assert_int_equal(far_extents(b, 0, 16384, &e, 1, &n), -EIO);
		far_close(b);
	}
}

static void a_full_disk_is_passed_on(void **state)
{
	struct rlimit old, small = { 100000, RLIM_INFINITY };
	struct far_backend *b;
	char buf[4096] = "";

	/* EFBIG stands for ENOSPC here: a limit that needs no file system of its own */
	opens(in_tmp("file:%s/full?size=1M", tmp), &b);
	signal(SIGXFSZ, SIG_IGN);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
	small.rlim_max = old.rlim_max;
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
	int r = far_write(b, 200000, buf, 4096, 0), ok = far_write(b, 0, buf, 4096, 0);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
	assert_int_equal(r, -EFBIG);
	assert_int_equal(ok, 0);
	far_close(b);
	if (access("/dev/full", W_OK) == 0)
		refuses("file:/dev/full", EINVAL, "cannot open 'file:/dev/full': it is neither a regular file nor a block device.");
}

static int setup(void **state)
{
	strcpy(tmp, "/tmp/farpage-unit-XXXXXX");
	return mkdtemp(tmp) ? 0 : -1;
}

static int teardown(void **state)
{
	char cmd[100];
	snprintf(cmd, sizeof cmd, "rm -rf '%s'", tmp);
	return system(cmd);
}

/* What a peer asks for next is taken as it came, before anybody has checked it; and no hole gets a page by it. */
static void memory_is_foreseen_anywhere(void **state)
{
	static const uint64_t offs[] = { 0, 4096, 9999, 10000, 65536, UINT64_MAX - 4096, UINT64_MAX };
	static const size_t lens[] = { 0, 1, 4096, 10000, 10001, SIZE_MAX };
	struct far_backend *b;
	struct far_extent e[2];
	size_t n;

	opens("mem:10000", &b);
	for (int filled = 0; filled < 2; filled++) {
		for (size_t i = 0; i < sizeof offs / sizeof offs[0]; i++)
			for (size_t k = 0; k < sizeof lens / sizeof lens[0]; k++)
				far_backend_soon(b, offs[i], lens[k]);
		assert_int_equal(far_extents(b, 0, 10000, e, 2, &n), 0);
		assert_int_equal(e[0].kind, filled ? FAR_EXTENT_DATA : FAR_EXTENT_ZERO);
		assert_int_equal(far_write(b, 0, "x", 1, 0), 0);
	}
	far_close(b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(memory_is_foreseen_anywhere),
		cmocka_unit_test(contradictions_are_refused),
		cmocka_unit_test(older_structs_are_taken),
		cmocka_unit_test(long_requests_are_cut), cmocka_unit_test(lists_go_down_whole), cmocka_unit_test(long_lists_are_cut),
		cmocka_unit_test(clearing_falls_back),
		cmocka_unit_test(extents_are_checked),
		cmocka_unit_test(short_counts_abort),
		cmocka_unit_test(errors_pass_unchanged_W_A8),
		cmocka_unit_test(some_errors_are_worth_another_try),
		cmocka_unit_test(each_refusal_has_its_sentence),
		cmocka_unit_test(schemes_are_registered),
		cmocka_unit_test(memory_keeps_its_size),
		cmocka_unit_test(memory_survives_its_end_W_B8),
		cmocka_unit_test(a_new_file_is_sparse),
		cmocka_unit_test(a_cut_file_is_an_error),
		cmocka_unit_test(a_full_disk_is_passed_on),
	};
	return cmocka_run_group_tests(tests, setup, teardown);
}
