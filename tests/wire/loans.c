/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Replies that are sent from the store's own pages: what is lent and what not, who waits for whom, and that whoever reads
 * while others write gets no wrong byte and no spurious error. */
#define _GNU_SOURCE
#include "peer.h"

#include "backend/backend.h"
#include "base/io.h"
#include "wire/loans.h"

#include <stdatomic.h>
#include <unistd.h>

#define KIB64 ((size_t)65536)

static struct far_backend *store(const char *uri, bool full)
{
	struct far_backend *b;
	uint8_t *buf = malloc(1 << 20);

	assert_int_equal(far_open(uri, NULL, &b, NULL), 0);
	memset(buf, 7, 1 << 20);
	for (uint64_t off = 0; full && off < far_size(b); off += 1 << 20)
		assert_int_equal(far_write(b, off, buf, (size_t)far_min(1 << 20, far_size(b) - off), 0), 0);
	free(buf);
	return b;
}

static void test_what_is_lent(void **state)
{
	static const char *const uris[] = { "mem:4M", "mem:4M?private=1" };
	struct far_loan a, b;
	struct far_extent x[4];
	size_t n;

	for (size_t i = 0; i < FAR_ARRAY_LEN(uris); i++) {
		struct far_backend *m = store(uris[i], true);
		struct far_loans *l = far_loans_new(m);
		assert_non_null(l);
		const uint8_t *p = far_loan_take(l, 123, KIB64, &a);
		assert_non_null(p);
		assert_true(p[0] == 7 && p[KIB64 - 1] == 7);
		assert_non_null(far_loan_take(l, 0, 1 << 20, &b)); /* many may have the same */
		assert_null(far_loan_take(l, 0, 4096, &(struct far_loan){ 0 }));           /* short */
		assert_null(far_loan_take(l, (4 << 20) - 4096, KIB64, &(struct far_loan){ 0 })); /* beyond the end */
		far_loan_return(&a);
		far_loan_return(&a);
		far_loan_return(&b);
		far_loans_doubt(l);
		assert_null(far_loan_take(l, 0, KIB64, &a));
		far_loan_return(&a);
		far_loans_free(l);
		far_close(m);
	}
	/* Looking does not fill a hole. */
	struct far_backend *m = store("mem:4M", false);
	struct far_loans *l = far_loans_new(m);
	assert_null(far_loan_take(l, 0, KIB64, &a));
	assert_int_equal(far_extents(m, 0, 4 << 20, x, 4, &n), 0);
	assert_true(n == 1 && x[0].kind == FAR_EXTENT_ZERO);
	far_loans_free(l);
	far_close(m);
	/* A file could be cut. */
	char path[] = "/tmp/farpage-loans.XXXXXX", uri[64];
	int fd = mkstemp(path);
	assert_true(fd >= 0 && ftruncate(fd, 4 << 20) == 0);
	snprintf(uri, sizeof uri, "file:%s", path);
	m = store(uri, true);
	assert_null(far_loans_new(m));
	far_close(m);
	close(fd);
	unlink(path);
}

struct changer {
	struct far_thread t;
	struct far_loans *l;
	_Atomic bool in;
};

static void *changer_run(void *arg)
{
	struct changer *c = arg;

	assert_int_equal(far_loans_change_begin(c->l, 0, 4096, true), 0);
	atomic_store(&c->in, true);
	far_loans_change_end(c->l);
	return NULL;
}

static void test_who_waits(void **state)
{
	struct far_backend *m = store("mem:1M", true);
	struct changer c = { .l = far_loans_new(m) };
	struct far_loan a, b;

	assert_non_null(far_loan_take(c.l, 0, KIB64, &a));
	assert_int_equal(far_loans_change_begin(c.l, 0, 4096, false), -EAGAIN);
	assert_int_equal(far_loans_change_begin(c.l, KIB64, 4096, false), 0); /* elsewhere */
	assert_null(far_loan_take(c.l, 2 * KIB64, KIB64, &b));                /* while anything changes */
	far_loans_change_end(c.l);
	assert_int_equal(far_thread_start(&c.t, "changer", changer_run, &c), 0);
	while (far_loan_take(c.l, 2 * KIB64, KIB64, &b)) { /* it has begun to wait when nothing is lent any more */
		far_loan_return(&b);
		far_thread_yield();
	}
	far_loan_return(&a);
	far_thread_join(&c.t);
	assert_true(atomic_load(&c.in));
	/* What never comes back stops nobody for ever. */
	assert_non_null(far_loan_take(c.l, 0, KIB64, &a));
	uint64_t began = far_now();
	assert_int_equal(far_loans_change_begin(c.l, 0, 4096, true), 0);
	assert_true(far_now() - began >= 50 * FAR_MSEC);
	far_loans_change_end(c.l);
	far_loan_return(&a);
	far_loans_free(c.l);
	far_close(m);
}

/* ------------------------------------------------------------------------------------------------ over a server */

#define SIZE ((uint64_t)2 << 20)
#define ROUNDS 150

struct rig {
	struct far_backend *mem, *far[3]; /* two readers, a writer */
	struct far_server *s;
	bool beside; /* the writer writes to the store itself */
	_Atomic bool end;
	int failed[3];
};

static void rig_run(struct rig *r, unsigned id)
{
	uint8_t *buf = malloc(SIZE);
	uint64_t rng = 88172645463325252ull + id;

	for (unsigned i = 0; (id == 2 ? !atomic_load(&r->end) : i < ROUNDS) && !r->failed[id]; i++) {
		rng = rng * 6364136223846793005 + 1442695040888963407;
		uint64_t off = (rng >> 33) % 8 * (SIZE / 8), len = KIB64 << (rng >> 60) % 3;
		if (id == 2) {
			memset(buf, (int)i, len);
			r->failed[id] = far_write(r->beside ? r->mem : r->far[id], off, buf, len, 0);
		} else if (i % 4 == 0) {
			r->failed[id] = far_read(r->far[id], 0, buf, SIZE, FAR_BULK);
		} else {
			r->failed[id] = far_read(r->far[id], off, buf, len, 0);
		}
	}
	free(buf);
}

static void *rig_reader(void *arg)
{
	rig_run(arg, 0);
	return NULL;
}

static void *rig_reader_too(void *arg)
{
	rig_run(arg, 1);
	return NULL;
}

static void *rig_writer(void *arg)
{
	rig_run(arg, 2);
	return NULL;
}

static uint64_t readers_against_writer(const char *uri, bool beside)
{
	struct rig r = { .mem = store(uri, true), .beside = beside };
	struct far_thread t[3];
	struct far_open_opts ro = FAR_OPEN_OPTS_INIT;
	struct far_error err = { .code = 0 };
	struct far_counters n = FAR_COUNTERS_INIT;
	uint64_t errors = 0;
	uint8_t *a = malloc(SIZE), *b = malloc(SIZE);
	char *at;

	ro.read_only = true;
	assert_int_equal(far_server_new(NULL, &r.s, NULL), 0);
	assert_int_equal(far_server_export(r.s, "disk", r.mem, NULL), 0);
	assert_int_equal(far_server_listen(r.s, "grpc://127.0.0.1:0", &at, NULL), 0);
	for (int i = 0; i < 3; i++)
		if (far_open(at, i < 2 ? &ro : NULL, &r.far[i], &err))
			fail_msg("%s", err.text);
	assert_int_equal(far_thread_start(&t[0], "reader", rig_reader, &r), 0);
	assert_int_equal(far_thread_start(&t[1], "reader", rig_reader_too, &r), 0);
	assert_int_equal(far_thread_start(&t[2], "writer", rig_writer, &r), 0);
	far_thread_join(&t[0]);
	far_thread_join(&t[1]);
	atomic_store(&r.end, true);
	far_thread_join(&t[2]);
	for (int i = 0; i < 3; i++)
		assert_int_equal(r.failed[i], 0);
	assert_int_equal(far_read(r.far[0], 0, a, SIZE, 0), 0);
	assert_int_equal(far_read(r.mem, 0, b, SIZE, 0), 0);
	assert_memory_equal(a, b, SIZE);
	for (int i = 0; i < 3; i++) {
		far_counters(r.far[i], &n);
		errors += n.checksum_errors;
		far_close(r.far[i]);
	}
	far_server_stop(r.s);
	far_server_free(r.s);
	far_close(r.mem);
	free(at);
	free(a);
	free(b);
	return errors;
}

static void test_written_meanwhile(void **state)
{
	assert_int_equal(readers_against_writer("mem:2M", false), 0);
	assert_int_equal(readers_against_writer("mem:2M?private=1", false), 0);
}

/* A program that writes to the store beside its server: sums that do not fit are found, and nobody fails for it. */
static void test_written_beside(void **state)
{
	printf("sums that did not fit: %llu\n", (unsigned long long)readers_against_writer("mem:2M", true));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_what_is_lent),
		cmocka_unit_test(test_who_waits),
		cmocka_unit_test(test_written_meanwhile),
		cmocka_unit_test(test_written_beside),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
