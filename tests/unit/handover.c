/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Hand-over of memory: the bytes of three formats, what is refused and with which words, and the descriptors. The peers of
 * the Go format are plain C here that send and receive exactly what the Go side was seen to. */
#define _GNU_SOURCE
#include "base/clock.h"
#include "base/thread.h"
#include "frontend/handover.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#define PAGE 4096u

/* ------------------------------------------------------------------------------------------------ bytes */

/* Feed as a stream would, in pieces of `step`. */
static int feed(struct far_handover_in *in, const void *buf, size_t n, size_t step, struct far_error *err)
{
	const char *p = buf;
	size_t want;
	int e = 0;

	while (!e && n && (want = far_handover_want(in))) {
		size_t k = (size_t)far_min(far_min(step, want), n);
		e = far_handover_feed(in, p, k, err);
		p += k;
		n -= k;
	}
	return e;
}

static int decode(const void *buf, size_t n, size_t step, struct far_handover *h, unsigned *with, struct far_error *err)
{
	struct far_handover_in in = { 0 };
	int e = feed(&in, buf, n, step, err);

	if (!e)
		e = in.complete ? far_handover_decode(&in, h, with, err) : -EAGAIN;
	far_handover_in_fini(&in);
	return e;
}

static void all_formats_come_back_as_they_were(void **state)
{
	struct far_handover_range r[3] = { { 0x7f0000000000, 4 * PAGE, 0 },
					   { 0x10000, 2 * PAGE, 4 * PAGE },
					   { 0x7f1000000000, PAGE, (1ull << 40) } };
	unsigned with;
	void *buf;
	size_t n;

	for (enum far_handover_format f = FAR_HANDOVER_FARPAGE; f <= FAR_HANDOVER_FIRECRACKER; f++) {
		struct far_handover h = FAR_HANDOVER_INIT;
		h.format = f;
		h.range = r;
		h.n = f == FAR_HANDOVER_GO ? 1 : 3;
		h.writable = f == FAR_HANDOVER_FARPAGE;
		h.features = 0x1234567890;
		assert_int_equal(far_handover_encode(&h, FAR_HANDOVER_UFFD | FAR_HANDOVER_MEM, &buf, &n, NULL), 0);
		for (size_t step = 1; step < 100; step = step * 2 + 1) {
			struct far_handover got = FAR_HANDOVER_INIT;
			struct far_error err = { .text = "" };
			if (decode(buf, n, step, &got, &with, &err))
				fail_msg("format %d in pieces of %zu: %s", (int)f, step, err.text);
			assert_int_equal(got.format, f);
			assert_int_equal(got.n, h.n);
			for (size_t k = 0; k < h.n; k++) {
				assert_int_equal(got.range[k].addr, r[k].addr);
				assert_int_equal(got.range[k].off, r[k].off);
				assert_int_equal(got.range[k].len, f == FAR_HANDOVER_GO ? 0 : r[k].len);
			}
			assert_int_equal(got.writable, h.writable);
			assert_int_equal(with, f == FAR_HANDOVER_FARPAGE ? FAR_HANDOVER_UFFD | FAR_HANDOVER_MEM : FAR_HANDOVER_UFFD);
			assert_int_equal(got.features, f == FAR_HANDOVER_FARPAGE ? h.features : 0);
			far_handover_fini(&got);
		}
		free(buf);
	}
}

/* The bytes of doc/handover.md, one by one: another program may be built on them. */
static void our_bytes_are_the_documented_ones(void **state)
{
	static const unsigned char want[] = {
		'F', 'A', 'R', 'U', 'F', 'F', 'D', '\n', 1, 0, 1, 0, 72, 0, 0, 0,
		0x21, 0x43, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x10, 0, 0,
		1, 0, 0, 0, 3, 0, 0, 0, 48, 0, 0, 0, 24, 0, 0, 0,
		0, 0x50, 0x34, 0x12, 0, 0x7f, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0,
	};
	static const unsigned char answer[] = { 'F', 'A', 'R', 'U', 'F', 'F', 'D', '!', 1, 0, 0, 0, 26, 0, 0, 0,
						16, 0, 0, 0, 0, 0, 0, 0, 'n', 'o' };
	struct far_handover_range r = { 0x7f0012345000, 2 * PAGE, PAGE };
	struct far_handover h = FAR_HANDOVER_INIT;
	struct far_error err;
	char buf[FAR_HANDOVER_ANSWER + FAR_HANDOVER_MAX_TEXT];
	void *out;
	size_t n;

	h.range = &r;
	h.n = 1;
	h.writable = true;
	h.features = 0x4321;
	assert_int_equal(far_handover_encode(&h, FAR_HANDOVER_UFFD | FAR_HANDOVER_PAGEMAP, &out, &n, NULL), 0);
	assert_int_equal(n, sizeof want);
	assert_memory_equal(out, want, n);
	free(out);
	assert_int_equal(far_handover_answer(buf, -EBUSY, "no"), sizeof answer);
	assert_memory_equal(buf, answer, sizeof answer);
	assert_int_equal(far_handover_answer_len(buf), sizeof answer);
	assert_int_equal(far_handover_answer_read(buf, sizeof answer, &err), -EBUSY);
	assert_string_equal(err.text, "the pager refused the memory: no");
	assert_int_equal(far_handover_answer_read(buf, far_handover_answer(buf, 0, NULL), &err), 0);
	buf[12] = 0;
	assert_int_equal(far_handover_answer_len(buf), 0);
}

static void a_later_version_that_we_understand_is_taken(void **state)
{
	struct far_handover_range r = { 0x10000, PAGE, 0 };
	struct far_handover h = FAR_HANDOVER_INIT, got = FAR_HANDOVER_INIT;
	unsigned char later[120] = { 0 };
	unsigned with;
	void *buf;
	size_t n;

	h.range = &r;
	h.n = 1;
	assert_int_equal(far_handover_encode(&h, FAR_HANDOVER_UFFD, &buf, &n, NULL), 0);
	memcpy(later, buf, 48);
	memcpy(later + 64, (char *)buf + 48, 24); /* a longer header, longer ranges, something behind them */
	later[8] = 7;
	later[12] = sizeof later;
	later[40] = 64;
	later[44] = 40;
	assert_int_equal(decode(later, sizeof later, 1000, &got, &with, NULL), 0);
	assert_int_equal(got.range[0].addr, r.addr);
	far_handover_fini(&got);
	free(buf);
}

struct refusal {
	const char *what;
	const char *want; /* of the sentence */
	int at;           /* change these bytes of a good message of ours */
	unsigned bytes;
	uint64_t value;
};

static void each_refusal_of_ours_has_its_sentence(void **state)
{
	static const struct refusal bad[] = {
		{ "magic", "begins like farpage's and goes on otherwise", 3, 1, 'X' },
		{ "short", "length, 47 bytes, is outside 48 to 65536", 12, 4, 47 },
		{ "long", "length, 4294967295 bytes, is outside", 12, 4, UINT32_MAX },
		{ "version", "is for version 2 and newer, and this farpage knows version 1", 10, 2, 2 },
		{ "huge pages", "pages of 2097152 bytes was handed over: only 4096 are served", 28, 4, 2 << 20 },
		{ "no range", "says 0 ranges", 32, 4, 0 },
		{ "too many", "says 1025 ranges", 32, 4, 1025 },
		{ "all ranges", "says 4294967295 ranges", 32, 4, UINT32_MAX },
		{ "one more than is there", "says 3 ranges of 24 bytes from byte 48 on, and has 96 bytes", 32, 4, 3 },
		{ "start", "from byte 47", 40, 4, 47 },
		{ "start behind", "from byte 97", 40, 4, 97 },
		{ "step", "ranges of 23 bytes", 44, 4, 23 },
		{ "huge step", "ranges of 4294967295 bytes", 44, 4, UINT32_MAX },
		{ "no userfaultfd", "list of descriptors, 0x2, is none", 36, 4, 2 },
		{ "other descriptors", "list of descriptors, 0x11, is none", 36, 4, 17 },
		{ "null", "memory at 0, 4096 bytes", 48, 8, 0 },
		{ "not a page", "must be whole pages", 48, 8, 0x10001 },
		{ "no length", "must be whole pages", 56, 8, 0 },
		{ "not pages", "must be whole pages", 56, 8, 100 },
		{ "offset", "must be whole pages", 64, 8, 1 },
		{ "address", "no memory and no region reaches that far", 48, 8, 1ull << 63 },
		{ "length", "no memory and no region reaches that far", 56, 8, UINT64_MAX & ~4095ull },
		{ "offset too large", "no memory and no region reaches that far", 64, 8, INT64_MAX & ~4095ull },
		{ "same address", "have the address 0x20000 in common", 48, 8, 0x20000 },
		{ "overlap", "have the offset 4096 in common", 64, 8, PAGE },
	};
	struct far_handover_range r[2] = { { 0x10000, PAGE, 0 }, { 0x20000, PAGE, PAGE } };
	struct far_handover h = FAR_HANDOVER_INIT;
	void *good;
	size_t n;

	h.range = r;
	h.n = 2;
	assert_int_equal(far_handover_encode(&h, FAR_HANDOVER_UFFD, &good, &n, NULL), 0);
	for (size_t k = 0; k < FAR_ARRAY_LEN(bad); k++) {
		struct far_handover got = FAR_HANDOVER_INIT;
		struct far_error err = { .text = "" };
		unsigned char buf[96];
		unsigned with;
		memcpy(buf, good, sizeof buf);
		for (unsigned i = 0; i < bad[k].bytes; i++)
			buf[(unsigned)bad[k].at + i] = (unsigned char)(bad[k].value >> (8 * i));
		int e = decode(buf, n, 7, &got, &with, &err);
		if (e != -EPROTO && e != -EPROTONOSUPPORT)
			fail_msg("%s: %d", bad[k].what, e);
		if (!strstr(err.text, bad[k].want))
			fail_msg("%s: '%s' does not say '%s'", bad[k].what, err.text, bad[k].want);
		assert_null(got.range);
	}
	free(good);
}

static void each_refusal_of_the_others_has_its_sentence(void **state)
{
	static const struct {
		const char *text, *want;
	} bad[] = {
		{ "{\"base_host_virt_addr\":4096}", "begins with the byte 0x7b" },
		{ "[]", "has 0 of them" },
		{ "[1]", "without the numbers" },
		{ "[null]", "without the numbers" },
		{ "[{\"base_host_virt_addr\":4096,\"size\":4096}]", "without the numbers" },
		{ "[{\"base_host_virt_addr\":\"4096\",\"size\":4096,\"offset\":0}]", "without the numbers" },
		{ "[{\"base_host_virt_addr\":-4096,\"size\":4096,\"offset\":0}]", "without the numbers" },
		{ "[{\"base_host_virt_addr\":4096.0,\"size\":4096,\"offset\":0}]", "without the numbers" },
		{ "[{\"base_host_virt_addr\":99999999999999999999,\"size\":4096,\"offset\":0}]", "whole pages" },
		{ "[{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0,\"page_size\":2097152}]", "pages of 2097152 bytes" },
		{ "[{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0,\"page_size_kib\":2097152}]", "pages of 2097152 bytes" },
		{ "[{\"base_host_virt_addr\":4096,\"size\":8192,\"offset\":0},{\"base_host_virt_addr\":8192,\"size\":4096,\"offset\":8192}]",
		  "have the address 0x2000 in common" },
		{ "[{]}", "is no JSON" },
		{ "[[[[[[[[[[[[]]]]]]]]]]]]", "is no JSON" },
		{ "[{\"a\":1}]x", "something follows" },
		{ "[{\"a\":1}][", "something follows" },
		{ "hello", "begins with the byte 0x68" },
	};

	for (size_t k = 0; k < FAR_ARRAY_LEN(bad); k++) {
		struct far_handover got = FAR_HANDOVER_INIT;
		struct far_error err = { .text = "" };
		unsigned with;
		int e = decode(bad[k].text, strlen(bad[k].text), 4096, &got, &with, &err);
		if (e != -EPROTO && e != -EPROTONOSUPPORT)
			fail_msg("%s: %d", bad[k].text, e);
		if (!strstr(err.text, bad[k].want))
			fail_msg("%s: '%s' does not say '%s'", bad[k].text, err.text, bad[k].want);
		assert_null(got.range);
	}
	for (int k = 0; k < 2; k++) { /* Go: an address that is none */
		struct far_handover got = FAR_HANDOVER_INIT;
		unsigned char addr[8] = { 0, 0, 0x7f, 0, 0, 0, 0, 1 };
		unsigned with;
		assert_int_equal(decode(k ? addr : (const unsigned char[8]){ 0 }, 8, 3, &got, &with, NULL), -EPROTO);
	}
}

static void json_without_an_end_is_given_up(void **state)
{
	struct far_error err = { .text = "" };
	struct far_handover_in in = { 0 };
	char spaces[1024];
	int e = far_handover_feed(&in, "[", 1, &err);

	memset(spaces, ' ', sizeof spaces);
	for (size_t want; !e && (want = far_handover_want(&in));)
		e = far_handover_feed(&in, spaces, (size_t)far_min(want, sizeof spaces), &err);
	assert_int_equal(e, -EPROTO);
	assert_non_null(strstr(err.text, "does not end within 65536 bytes"));
	far_handover_in_fini(&in);
}

/* What Firecracker's versions send, field by field as its documentation and handlers have it. */
static void firecracker_of_any_age_is_understood(void **state)
{
	static const char *const good[] = {
		"[{\"base_host_virt_addr\":140243350224896,\"size\":4096,\"offset\":0}]",
		"[{\"base_host_virt_addr\":140243350224896,\"size\":4096,\"offset\":0,\"page_size_kib\":4096}]",
		"[{\"base_host_virt_addr\":140243350224896,\"size\":4096,\"offset\":0,\"page_size_kib\":4}]",
		"[{\"base_host_virt_addr\":140243350224896,\"size\":4096,\"offset\":0,\"page_size\":4096,\"page_size_kib\":4096}]\n",
		"[ {\"offset\": 0, \"new\": {\"a\": [1, \"]\\\"\"]}, \"size\": 4096, \"base_host_virt_addr\": 140243350224896} ]",
	};

	for (size_t k = 0; k < FAR_ARRAY_LEN(good); k++) {
		struct far_handover got = FAR_HANDOVER_INIT;
		struct far_error err = { .text = "" };
		unsigned with;
		if (decode(good[k], strlen(good[k]), 5, &got, &with, &err))
			fail_msg("%s: %s", good[k], err.text);
		assert_int_equal(got.n, 1);
		assert_int_equal(got.range[0].addr, 140243350224896);
		far_handover_fini(&got);
	}
}

static void what_cannot_be_told_is_not_sent(void **state)
{
	struct far_handover_range r[2] = { { 0x10000, PAGE, PAGE }, { 0x20000, PAGE, 0 } };
	struct far_handover h = FAR_HANDOVER_INIT;
	struct far_error err;
	void *buf;
	size_t n;

	assert_int_equal(far_handover_encode(&h, 1, &buf, &n, &err), -EINVAL);
	h.range = r;
	h.n = 1;
	h.format = FAR_HANDOVER_GO;
	assert_int_equal(far_handover_encode(&h, 1, &buf, &n, &err), -EINVAL);
	assert_non_null(strstr(err.text, "one range that begins at offset 0"));
	r[0].len = 100;
	h.format = FAR_HANDOVER_FIRECRACKER;
	assert_int_equal(far_handover_encode(&h, 1, &buf, &n, &err), -EINVAL);
	assert_int_equal(far_uffd_send(-1, &h, &err), -EINVAL);
	assert_string_equal(err.text, "cannot hand memory over: there is no userfaultfd");
}

/* ------------------------------------------------------------------------------------------------ descriptors */

static int open_uffd(bool ready)
{
	struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	if (fd < 0)
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY */);
	if (fd >= 0 && ready)
		assert_int_equal(ioctl(fd, UFFDIO_API, &api), 0);
	return fd;
}

static unsigned count_fds(void)
{
	unsigned n = 0;

	for (int fd = 0; fd < 256; fd++)
		n += fcntl(fd, F_GETFD) >= 0;
	return n;
}

static bool handover_is_open(int fd)
{
	return fcntl(fd, F_GETFD) >= 0;
}

static void send_with(int socket, const void *buf, size_t n, const int *fd, size_t fds)
{
	struct iovec iov = { (void *)(uintptr_t)buf, n };
	char control[CMSG_SPACE(sizeof(int) * 253)] __attribute__((aligned(8))) = { 0 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fds) {
		m.msg_control = control;
		m.msg_controllen = CMSG_SPACE(sizeof(int) * fds);
		struct cmsghdr *c = CMSG_FIRSTHDR(&m);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int) * fds);
		memcpy(CMSG_DATA(c), fd, sizeof(int) * fds);
	}
	assert_int_equal(sendmsg(socket, &m, MSG_NOSIGNAL), (ssize_t)n);
}

struct sender {
	int socket;
	struct far_handover h;
	struct far_error err;
	int result;
};

static void *sender_cb(void *arg)
{
	struct sender *s = arg;
	s->result = far_uffd_send(s->socket, &s->h, &s->err);
	return NULL;
}

/* Same inode: the same thing behind the descriptor. Anonymous ones share one; the features tell ours. */
static void ours_goes_over_with_its_answer(void **state)
{
	struct far_handover_range r = { 0x10000, PAGE, 0 };
	int uffd = open_uffd(true), s[2];

	if (uffd < 0) {
		print_message("skipped: userfaultfd is refused here\n");
		skip();
	}
	for (int refused = 0; refused < 2; refused++) {
		struct sender out = { .h = FAR_HANDOVER_INIT };
		struct far_handover h = FAR_HANDOVER_INIT;
		struct far_error err = { .text = "" };
		struct far_thread t = { 0 };
		unsigned before = count_fds();
		assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
		out.socket = s[0];
		out.h.uffd = uffd;
		out.h.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
		out.h.mem = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
		out.h.process = (int)syscall(SYS_pidfd_open, getpid(), 0);
		out.h.writable = true;
		out.h.range = &r;
		out.h.n = 1;
		assert_int_equal(far_thread_start(&t, "sender", sender_cb, &out), 0);
		if (far_uffd_receive(s[1], &h, &err))
			fail_msg("%s", err.text);
		assert_int_equal(h.format, FAR_HANDOVER_FARPAGE);
		assert_true(h.uffd >= 0 && h.pagemap >= 0 && h.mem >= 0 && h.process >= 0 && h.writable);
		assert_int_equal(h.features, UFFD_FEATURE_EVENT_REMOVE);
		assert_true(fcntl(h.uffd, F_GETFL) & O_NONBLOCK);
		char word[8];
		static const char here[8] = "is here";
		assert_int_equal(pread(h.mem, word, sizeof word, (off_t)(uintptr_t)here), sizeof word);
		assert_string_equal(word, here);
		assert_int_equal(far_uffd_accept(s[1], &h, refused ? EBUSY : 0, "another client\033 has it"), 0);
		far_thread_join(&t);
		assert_int_equal(out.result, refused ? -EBUSY : 0);
		if (refused)
			assert_string_equal(out.err.text, "cannot hand memory over: the pager refused the memory: another client  has it");
		far_handover_fini(&h);
		close(out.h.pagemap);
		close(out.h.mem);
		close(out.h.process);
		close(s[0]);
		close(s[1]);
		assert_int_equal(count_fds(), before);
	}
	close(uffd);
}

/* As the Go sender was seen: 8 bytes, then a message of one zero byte with the descriptors [0, uffd]. */
static void go_sends_to_us(void **state)
{
	static const unsigned char addr[8] = { 0, 0, 0x7f, 0x12, 0x34, 0x56, 0x70, 0 };
	struct far_handover h = FAR_HANDOVER_INIT;
	struct far_error err = { .text = "" };
	unsigned before = count_fds();
	int uffd = open_uffd(true), fd[2] = { 0, uffd }, s[2];

	if (uffd < 0) {
		print_message("skipped: userfaultfd is refused here\n");
		skip();
	}
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
	send_with(s[0], addr, sizeof addr, NULL, 0);
	send_with(s[0], "", 1, fd, 2);
	close(uffd);
	if (far_uffd_receive(s[1], &h, &err))
		fail_msg("%s", err.text);
	assert_int_equal(h.format, FAR_HANDOVER_GO);
	assert_int_equal(h.n, 1);
	assert_int_equal(h.range[0].addr, 0x7f1234567000);
	assert_int_equal(h.range[0].len, 0);
	assert_int_equal(h.features, UFFD_FEATURE_EVENT_REMOVE);
	assert_true(h.process >= 0); /* who made the sockets is this process */
	assert_int_equal(far_uffd_accept(s[1], &h, 0, NULL), 0);
	assert_int_equal(recv(s[0], fd, 1, MSG_DONTWAIT), -1); /* no answer in this format */
	far_handover_fini(&h);
	close(s[0]);
	close(s[1]);
	assert_int_equal(count_fds(), before);
}

/* As the Go receiver was seen: a plain read of 8 bytes, which would throw descriptors away; then a message of one byte with
 * room for 24 bytes of control data; exactly two descriptors, the second is used. */
static void go_takes_from_us(void **state)
{
	struct far_handover_range r = { 0x7f1234567000, PAGE, 0 };
	struct far_handover h = FAR_HANDOVER_INIT;
	char control[24] __attribute__((aligned(8))), byte;
	struct iovec iov = { &byte, 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	unsigned char addr[8];
	int s[2], fd[2];

	h.uffd = open_uffd(true);
	if (h.uffd < 0) {
		print_message("skipped: userfaultfd is refused here\n");
		skip();
	}
	h.format = FAR_HANDOVER_GO;
	h.range = &r;
	h.n = 1;
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
	assert_int_equal(far_uffd_send(s[0], &h, NULL), 0);
	assert_int_equal(read(s[1], addr, sizeof addr), 8);
	assert_memory_equal(addr, ((const unsigned char[8]){ 0, 0, 0x7f, 0x12, 0x34, 0x56, 0x70, 0 }), 8);
	assert_int_equal(recvmsg(s[1], &m, 0), 1);
	assert_false(m.msg_flags & MSG_CTRUNC);
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	assert_non_null(c);
	assert_int_equal(c->cmsg_len, CMSG_LEN(2 * sizeof(int)));
	memcpy(fd, CMSG_DATA(c), sizeof fd);
	char path[40], link[64] = "";
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd[1]);
	assert_true(readlink(path, link, sizeof link - 1) > 0);
	assert_string_equal(link, "anon_inode:[userfaultfd]");
	for (int k = 0; k < 2; k++) {
		close(fd[k]);
		close(s[k]);
	}
	close(h.uffd);
}

static void firecracker_sends_to_us(void **state)
{
	static const char json[] = "[{\"base_host_virt_addr\":65536,\"size\":8192,\"offset\":0,\"page_size_kib\":4096},"
				   "{\"base_host_virt_addr\":1048576,\"size\":4096,\"offset\":8192,\"page_size_kib\":4096}]";
	struct far_error err = { .text = "" };
	int uffd = open_uffd(true), null = open("/dev/null", O_RDONLY | O_CLOEXEC);

	if (uffd < 0) {
		print_message("skipped: userfaultfd is refused here\n");
		skip();
	}
	for (int late = 0; late < 3; late++) { /* with the list, with something behind it, after it */
		struct far_handover h = FAR_HANDOVER_INIT;
		int s[2], fd[2] = { uffd, null };
		assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
		send_with(s[0], json, sizeof json - 1, fd, late == 2 ? 0 : late + 1);
		if (late == 2)
			send_with(s[0], "", 1, fd, 1);
		if (far_uffd_receive(s[1], &h, &err))
			fail_msg("%s", err.text);
		assert_int_equal(h.format, FAR_HANDOVER_FIRECRACKER);
		assert_int_equal(h.n, 2);
		assert_int_equal(h.range[1].addr, 1048576);
		assert_int_equal(h.range[1].off, 8192);
		assert_int_equal(h.features, UFFD_FEATURE_EVENT_REMOVE);
		far_handover_fini(&h);
		close(s[0]);
		close(s[1]);
	}
	close(uffd);
	close(null);
}

/* A hostile peer: each of these is refused with a sentence, nothing of it stays open, and nobody waits for long. */
static void hostile_peers_are_refused(void **state)
{
	static const char *const cases[] = { "no descriptor", "too few", "another file", "a pipe as memory", "pagemap as memory",
					     "no API", "hundreds", "cut short", "silence" };
	static const char *const says[] = { "and 0 came", "and 1 came", "descriptor 0 of the hand-over is no userfaultfd",
					    "descriptor 1 of the hand-over is no mem", "descriptor 1 of the hand-over is no mem",
					    "UFFDIO_API and UFFDIO_REGISTER come before", "and 8 came", "closed the connection after 20 bytes",
					    "did not send all of its hand-over in time" };
	static const int codes[] = { EPROTO, EPROTO, EPROTO, EPROTO, EPROTO, EPROTO, EPROTO, EPROTO, ETIMEDOUT };
	struct far_handover_range r = { 0x10000, PAGE, 0 };
	struct far_handover h = FAR_HANDOVER_INIT;
	int uffd = open_uffd(true), raw = open_uffd(false), pipes[2], many[253];
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	void *buf;
	size_t n;

	if (uffd < 0) {
		print_message("skipped: userfaultfd is refused here\n");
		skip();
	}
	assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
	for (size_t k = 0; k < FAR_ARRAY_LEN(many); k++)
		many[k] = uffd;
	h.range = &r;
	h.n = 1;
	for (unsigned k = 0; k < FAR_ARRAY_LEN(cases); k++) {
		const int list[][2] = { { 0 }, { uffd }, { pipes[0] }, { uffd, pipes[0] }, { uffd, pagemap }, { raw }, { 0 }, { uffd }, { uffd } };
		static const unsigned count[] = { 0, 1, 1, 2, 2, 1, 253, 1, 1 };
		struct far_handover got = FAR_HANDOVER_INIT;
		struct far_error err = { .text = "" };
		unsigned with = k == 1 || k == 3 || k == 4 ? FAR_HANDOVER_UFFD | FAR_HANDOVER_MEM : FAR_HANDOVER_UFFD;
		unsigned before = count_fds();
		int s[2];
		assert_int_equal(far_handover_encode(&h, with, &buf, &n, NULL), 0);
		assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
		send_with(s[0], buf, k < 7 ? n : 20, k == 6 ? many : list[k], count[k]);
		if (k == 7)
			shutdown(s[0], SHUT_WR);
		uint64_t old = far_deadline_limit(far_now() + (k == 8 ? 50 * FAR_MSEC : 10 * FAR_SEC));
		int e = far_uffd_receive(s[1], &got, &err);
		far_deadline_restore(old);
		if (e != -codes[k] || !strstr(err.text, says[k]))
			fail_msg("%s: %d, %s", cases[k], e, err.text);
		char answer[64];
		bool told = recv(s[0], answer, sizeof answer, MSG_DONTWAIT) > FAR_HANDOVER_ANSWER;
		assert_true(told == (k < 8)); /* the peer learns why */
		close(s[0]);
		close(s[1]);
		free(buf);
		assert_int_equal(count_fds(), before);
	}
	close(uffd);
	close(raw);
	close(pagemap);
	close(pipes[0]);
	close(pipes[1]);
}

/* A pager that is none, one that goes away, one that says nothing. */
static void a_sender_gets_a_sentence_too(void **state)
{
	struct far_handover_range r = { 0x10000, PAGE, 0 };
	struct far_handover h = FAR_HANDOVER_INIT;
	static const char *const says[] = { "what answered is no pager", "without an answer", "did not answer" };
	char junk[64] = "HTTP/1.1 400 Bad Request\r\n";

	h.uffd = open_uffd(true);
	if (h.uffd < 0) {
		print_message("skipped: userfaultfd is refused here\n");
		skip();
	}
	h.range = &r;
	h.n = 1;
	for (int k = 0; k < 3; k++) {
		struct far_error err = { .text = "" };
		int s[2];
		assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
		if (k == 0)
			assert_int_equal(write(s[1], junk, sizeof junk), sizeof junk);
		if (k == 1)
			shutdown(s[1], SHUT_WR);
		uint64_t old = far_deadline_limit(far_now() + (k == 2 ? 50 * FAR_MSEC : 10 * FAR_SEC));
		assert_true(far_uffd_send(s[0], &h, &err) < 0);
		far_deadline_restore(old);
		if (!strstr(err.text, says[k]))
			fail_msg("%s", err.text);
		close(s[0]);
		close(s[1]);
	}
	close(h.uffd);
}

static void a_pager_says_what_it_cannot_serve(void **state)
{
	static const struct {
		const char *what, *says;
		int code;
	} bad[] = {
		{ "local_max", "only that process can give pages back", EOPNOTSUPP },
		{ "local", "with a local store", EINVAL },
		{ "chunk", "in chunks of 5000 bytes", EINVAL },
		{ "writable", "its pagemap and mem were not given", EINVAL },
		{ "read-only", "the region is read-only", EROFS },
		{ "too long", "the region ends at 65536", EINVAL },
		{ "twice", "overlap or are not in order", EINVAL },
		{ "none", "there is none of it", EINVAL },
		{ "fork", "UFFD_FEATURE_EVENT_FORK", EOPNOTSUPP },
		{ "no uffd", "no userfaultfd was given", EINVAL },
		{ "order", "order", EINVAL },
	};
	struct far_backend *b;
	int uffd = open_uffd(true);

	if (uffd < 0) {
		print_message("skipped: userfaultfd is refused here\n");
		skip();
	}
	assert_int_equal(far_open("mem:65536", NULL, &b, NULL), 0);
	for (unsigned k = 0; k < FAR_ARRAY_LEN(bad); k++) {
		struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
		struct far_handover h = FAR_HANDOVER_INIT;
		struct far_pager *p = NULL;
		struct far_error err = { .text = "" };
		h.range = calloc(2, sizeof *h.range);
		h.range[0] = (struct far_handover_range){ 0x10000, 2 * PAGE, 0 };
		h.range[1] = (struct far_handover_range){ 0x20000, PAGE, k == 6 ? PAGE : 2 * PAGE };
		h.range[0].len = k == 5 ? 17 * PAGE : h.range[0].len;
		h.n = k == 5 ? 1 : k == 7 ? 0 : 2;
		h.uffd = k == 9 ? -1 : fcntl(uffd, F_DUPFD_CLOEXEC, 0);
		h.writable = k == 3 || k == 4;
		h.features = k == 8 ? UFFD_FEATURE_EVENT_FORK : 0;
		o.local_max = k == 0 ? 65536 : 0;
		o.local = k == 1 ? "mem:" : NULL;
		o.chunk = k == 2 ? 5000 : 4096;
		o.read_only = k == 4;
		o.order = k == 10 ? "backwards" : NULL;
		unsigned before = count_fds();
		int e = far_pager_open(&h, b, &o, NULL, NULL, &p, &err);
		if (e != -bad[k].code || !strstr(err.text, bad[k].says))
			fail_msg("%s: %d, %s", bad[k].what, e, err.text);
		assert_int_equal(count_fds(), before);
		assert_true(k == 9 || handover_is_open(h.uffd)); /* nothing of it changed owner */
		far_handover_fini(&h);
	}
	far_close(b);
	close(uffd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(all_formats_come_back_as_they_were),
		cmocka_unit_test(our_bytes_are_the_documented_ones),
		cmocka_unit_test(a_later_version_that_we_understand_is_taken),
		cmocka_unit_test(each_refusal_of_ours_has_its_sentence),
		cmocka_unit_test(each_refusal_of_the_others_has_its_sentence),
		cmocka_unit_test(json_without_an_end_is_given_up),
		cmocka_unit_test(firecracker_of_any_age_is_understood),
		cmocka_unit_test(what_cannot_be_told_is_not_sent),
		cmocka_unit_test(ours_goes_over_with_its_answer),
		cmocka_unit_test(go_sends_to_us),
		cmocka_unit_test(go_takes_from_us),
		cmocka_unit_test(firecracker_sends_to_us),
		cmocka_unit_test(hostile_peers_are_refused),
		cmocka_unit_test(a_sender_gets_a_sentence_too),
		cmocka_unit_test(a_pager_says_what_it_cannot_serve),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
