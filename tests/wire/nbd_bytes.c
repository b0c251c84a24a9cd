/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* One NBD connection of the server over a far_conn that counts: how much is read and written at once, and where to. */
#include "backend/backend.h"
#include "base/thread.h"
#include "wire/nbd/proto.h"
#include "wire/server.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define BYTES_MAX (4 << 20)
#define BYTES_REGION 1000000
#define BYTES_HELLO (4 + 16 + 6)

/* What the peer says, in pieces that the test has chosen; what it was told. */
struct peer {
	const uint8_t *said;
	size_t at, piece[16];
	unsigned pieces;
	_Atomic unsigned turn; /* answers are written by other threads, too */
	unsigned fail_at; /* the turn at which a read fails with -EFAULT, if it is one to a long write's place */
	size_t place;     /* longest part of a read that was not to be behind the first one */
	unsigned writes[16]; /* after each piece */
	uint8_t *told;
	size_t told_n;
	struct far_mutex lock;
	struct far_cond changed;
	bool ended;
};

static ssize_t peer_readv(struct far_conn *conn, const struct iovec *iov, int n)
{
	struct peer *p = conn->state;
	size_t done = 0;

	if (p->turn == p->pieces)
		return 0;
	if (n == 2)
		p->place = far_max(p->place, iov[0].iov_len);
	if (n == 2 && p->fail_at && p->turn == p->fail_at) {
		p->fail_at = 0;
		return -EFAULT;
	}
	for (int i = 0; i < n; i++) {
		size_t k = (size_t)far_min(iov[i].iov_len, p->piece[p->turn]);
		memcpy(iov[i].iov_base, p->said + p->at, k);
		p->piece[p->turn] -= k;
		p->at += k;
		done += k;
	}
	if (!p->piece[p->turn])
		p->turn++;
	return (ssize_t)done;
}

static ssize_t peer_writev(struct far_conn *conn, const struct iovec *iov, int n)
{
	struct peer *p = conn->state;
	size_t done = 0;

	p->writes[atomic_load(&p->turn)]++;
	for (int i = 0; i < n; i++) {
		assert_true(p->told_n + iov[i].iov_len <= BYTES_MAX);
		memcpy(p->told + p->told_n, iov[i].iov_base, iov[i].iov_len);
		p->told_n += iov[i].iov_len;
		done += iov[i].iov_len;
	}
	return (ssize_t)done;
}

static int peer_wait(struct far_conn *conn, bool in, bool out, uint64_t until)
{
	return 0;
}

static void peer_nothing(struct far_conn *conn)
{
}

static void peer_ended(void *opaque)
{
	struct peer *p = opaque;

	far_mutex_lock(&p->lock);
	p->ended = true;
	far_cond_signal(&p->changed);
	far_mutex_unlock(&p->lock);
}

/* Until the server has read all and ended the connection. */
static void serve(struct far_backend *b, struct peer *p)
{
	static const struct far_conn_ops ops = { .readv = peer_readv, .writev = peer_writev, .wait = peer_wait,
						 .shutdown = peer_nothing, .close = peer_nothing };
	struct far_export e = { .name = (char *)"disk", .b = b };
	struct far_server_env env = { .exports = &e, .exports_n = 1, .max_request = 32 << 20, .memory_max = 64 << 20,
				      .handshake = 10 * FAR_SEC, .stall = 10 * FAR_SEC };
	struct far_conn conn = { .ops = &ops, .fd = -1, .state = p };
	struct far_nbd_conn *c;
	struct far_crew *crew;

	p->told = malloc(BYTES_MAX);
	assert_non_null(p->told);
	assert_int_equal(far_owner_new(b, 0, &e.owner), 0);
	far_mutex_init(&p->lock);
	far_cond_init(&p->changed);
	assert_int_equal(far_crew_open(&crew, "far-test", 8), 0);
	assert_int_equal(far_nbd_conn_start(&env, crew, &conn, false, peer_ended, p, &c), 0);
	far_mutex_lock(&p->lock);
	while (!p->ended)
		far_cond_wait(&p->changed, &p->lock);
	far_mutex_unlock(&p->lock);
	far_crew_close(crew);
	far_cond_fini(&p->changed);
	far_mutex_fini(&p->lock);
	far_owner_free(e.owner);
	far_close(b);
	assert_int_equal(env.memory, 0);
}

static const uint8_t *said(void)
{
	static uint8_t all[BYTES_MAX];

	/* No zeroes, and GO with the empty name. */
	memcpy(all, "\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0", BYTES_HELLO);
	return all;
}

static size_t request(size_t at, uint16_t type, uint16_t flags, uint64_t off, uint32_t len)
{
	uint8_t *p = (uint8_t *)(uintptr_t)said() + at;

	p = far_nbd_put32(p, FAR_NBD_REQUEST_MAGIC);
	p = far_nbd_put16(p, flags);
	p = far_nbd_put16(p, type);
	p = far_nbd_put64(p, at); /* the cookie */
	p = far_nbd_put64(p, off);
	p = far_nbd_put32(p, len);
	return at + FAR_NBD_REQUEST_BYTES;
}

static size_t data(size_t at, uint8_t byte, size_t n)
{
	memset((uint8_t *)(uintptr_t)said() + at, byte, n);
	return at + n;
}

/* The simple reply to the request that stood at `cookie`; its error, where its bytes are in *body. */
static uint32_t reply(const struct peer *p, size_t cookie, size_t len, const uint8_t **body)
{
	static const uint8_t magic[4] = { 0x67, 0x44, 0x66, 0x98 };

	for (size_t i = 0; i + 16 + len <= p->told_n; i++)
		if (!memcmp(p->told + i, magic, 4) && far_nbd_get64(p->told + i + 8) == cookie) {
			*body = p->told + i + 16;
			return far_nbd_get32(p->told + i + 4);
		}
	fail_msg("the request at %zu was not answered", cookie);
	return 0;
}

static struct far_backend *memory(const char *uri)
{
	struct far_backend *b;

	assert_int_equal(far_open(uri, NULL, &b, NULL), 0);
	return b;
}

static void test_a_batch_costs_one_read_and_one_write(void **state)
{
	struct peer p = { .said = said(), .piece = { BYTES_HELLO }, .pieces = 2 };
	size_t at = BYTES_HELLO, cookie[32];
	const uint8_t *body;

	for (unsigned i = 0; i < 32; i++) {
		cookie[i] = at;
		at = request(at, FAR_NBD_READ, 0, i * 4096, 4096);
	}
	p.piece[1] = at - BYTES_HELLO;
	serve(memory("mem:1000000"), &p);
	for (unsigned i = 0; i < 32; i++)
		assert_int_equal(reply(&p, cookie[i], 4096, &body), 0);
	assert_int_equal(p.turn, 2);
	assert_int_equal(p.writes[2], 1);
	free(p.told);
}

static void test_a_long_write_is_read_to_its_place(void **state)
{
	static const char *const kinds[] = { "mem:1000000", "mem:1000000?private=1" };

	for (unsigned k = 0; k < FAR_ARRAY_LEN(kinds); k++) {
		struct peer p = { .said = said(), .piece = { BYTES_HELLO }, .pieces = 5 };
		const uint8_t *body;
		/* The first makes the pages, the second finds them; of the third little comes before the rest. */
		size_t first = BYTES_HELLO, at = data(request(first, FAR_NBD_WRITE, 0, 0, 600000), 'a', 600000), second = at;
		p.piece[1] = at - first;
		at = data(request(at, FAR_NBD_WRITE, 0, 1, 500000), 'b', 500000);
		p.piece[2] = at - second;
		size_t third = at;
		at = request(at, FAR_NBD_WRITE, FAR_NBD_FUA, 4095, 100000);
		p.piece[3] = at - third;
		size_t rest = at;
		at = data(at, 'c', 100000);
		size_t last = at;
		at = request(at, FAR_NBD_READ, 0, 0, 600001);
		p.piece[4] = at - rest;
		serve(memory(kinds[k]), &p);
		assert_int_equal(reply(&p, first, 0, &body), 0);
		assert_int_equal(reply(&p, second, 0, &body), 0);
		assert_int_equal(reply(&p, third, 0, &body), 0);
		assert_int_equal(reply(&p, last, 600001, &body), 0);
		for (unsigned i = 0; i < 600001; i++) {
			int want = i >= 4095 && i < 104095 ? 'c' : i >= 1 && i < 500001 ? 'b' : i < 600000 ? 'a' : 0;
			assert_int_equal(body[i], want);
		}
		/* All of the third one, of which nothing had come. */
		assert_true(p.place >= 100000);
		free(p.told);
	}
}

static void test_no_memory_for_a_long_write_is_an_error_of_it_alone(void **state)
{
	struct peer p = { .said = said(), .piece = { BYTES_HELLO }, .pieces = 4, .fail_at = 3 };
	const uint8_t *body;
	size_t first = BYTES_HELLO, at = data(request(first, FAR_NBD_WRITE, 0, 0, 300000), 'a', 300000), second = at;

	p.piece[1] = at - first;
	at = request(at, FAR_NBD_WRITE, 0, 0, 300000);
	p.piece[2] = at - second;
	size_t rest = at;
	at = data(at, 'b', 300000);
	size_t last = at;
	at = request(at, FAR_NBD_READ, 0, 0, 16);
	p.piece[3] = at - rest;
	serve(memory("mem:1000000"), &p);
	assert_int_equal(reply(&p, first, 0, &body), 0);
	assert_int_equal(reply(&p, second, 0, &body), 28);
	assert_int_equal(reply(&p, last, 16, &body), 0);
	assert_memory_equal(body, "aaaaaaaaaaaaaaaa", 16);
	free(p.told);
}

static uint8_t plain[BYTES_REGION];

static int plain_read(void *opaque, uint64_t off, void *buf, size_t len)
{
	memcpy(buf, plain + off, len);
	return 0;
}

static int plain_write(void *opaque, uint64_t off, const void *buf, size_t len)
{
	memcpy(plain + off, buf, len);
	return 0;
}

/* A user's own backend of two functions cannot clear faster than it writes. */
static void test_fast_zeroes_are_refused_where_they_are_not_fast(void **state)
{
	struct peer p = { .said = said(), .piece = { BYTES_HELLO }, .pieces = 4 };
	struct far_backend *b;
	const uint8_t *body;
	size_t fast = BYTES_HELLO, slow, last, at;

	memset(plain, 'p', sizeof plain);
	assert_int_equal(far_backend_from(plain_read, plain_write, BYTES_REGION, NULL, NULL, &b), 0);
	slow = request(fast, FAR_NBD_WRITE_ZEROES, FAR_NBD_FAST_ZERO, 0, 100);
	last = request(slow, FAR_NBD_WRITE_ZEROES, 0, 50, 10);
	at = request(last, FAR_NBD_READ, 0, 45, 20);
	p.piece[1] = slow - fast;
	p.piece[2] = last - slow;
	p.piece[3] = at - last;
	/* The second is carried out beside the third: only that it was answered is certain. */
	serve(b, &p);
	assert_int_equal(reply(&p, fast, 0, &body), 95);
	assert_int_equal(reply(&p, slow, 0, &body), 0);
	assert_int_equal(reply(&p, last, 20, &body), 0);
	assert_memory_equal(plain + 45, "ppppp\0\0\0\0\0\0\0\0\0\0ppppp", 20);
	free(p.told);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_a_batch_costs_one_read_and_one_write),
		cmocka_unit_test(test_a_long_write_is_read_to_its_place),
		cmocka_unit_test(test_no_memory_for_a_long_write_is_an_error_of_it_alone),
		cmocka_unit_test(test_fast_zeroes_are_refused_where_they_are_not_fast),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
