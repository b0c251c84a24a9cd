/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Sessions, lease, Watch, checksums and Flush of farpage.v1, said by hand. */
#include "peer.h"

#include <stdatomic.h>
#include <sys/socket.h>
#include <unistd.h>

#define SIZE (1u << 20)
#define MAX 65536
#define NAME "disk"
#define CALL(peer_, method, out) peer_call(peer_, FAR_GRPC_REGION method, (out)->p, (out)->n)

static _Atomic unsigned fsyncs, fdatasyncs;
static _Atomic int sync_error;

int __wrap_fsync(int fd);
int __wrap_fdatasync(int fd);

int __wrap_fsync(int fd)
{
	fsyncs++;
	errno = sync_error;
	return sync_error ? -1 : 0;
}

int __wrap_fdatasync(int fd)
{
	fdatasyncs++;
	errno = sync_error;
	return sync_error ? -1 : 0;
}

struct message {
	uint8_t bytes[8192];
};

static struct far_pb_out build(struct message *m, enum far_grpc_method method, struct far_grpc_request r)
{
	struct far_pb_out o = { m->bytes, 0, sizeof m->bytes };

	r.export = NAME;
	r.export_n = strlen(NAME);
	far_grpc_encode_request(&o, method, &r);
	if (r.data_n) {
		memcpy(m->bytes + o.n, r.data, r.data_n);
		o.n += r.data_n;
	}
	assert_true(o.n <= o.cap);
	return o;
}

static const uint8_t *body(const struct peer_stream *s, size_t *n)
{
	assert_int_equal(s->status, 0);
	assert_true(s->data_n >= FAR_GRPC_PREFIX);
	*n = s->data_n - FAR_GRPC_PREFIX;
	return s->data + FAR_GRPC_PREFIX;
}

static struct far_grpc_export hello(struct peer *p, uint64_t session, uint64_t generation)
{
	struct message m;
	struct far_grpc_export e;
	size_t n;
	struct far_pb_out o = build(&m, FAR_M_DESCRIBE, (struct far_grpc_request){ .session = session, .generation = generation });
	const uint8_t *b = body(CALL(p, "Describe", &o), &n);

	assert_int_equal(far_grpc_decode_export(b, n, &e), 0);
	assert_true(e.checked && e.sums && e.sessions && e.instance);
	return e;
}

static struct peer_stream *put(struct peer *p, uint64_t session, uint64_t generation, uint64_t off, const char *text)
{
	struct message m;
	uint8_t sum[FAR_GRPC_SUM];
	struct far_grpc_request r = { .session = session, .generation = generation, .off = (int64_t)off, .sum = sum,
				      .data = (const uint8_t *)text, .data_n = strlen(text) };

	far_grpc_sum_data(sum, NAME, strlen(NAME), off, text, strlen(text));
	struct far_pb_out o = build(&m, FAR_M_WRITE, r);
	struct peer_stream *s = CALL(p, "Write", &o);
	if (s->status == 0) {
		const uint8_t *back;
		size_t n;
		const uint8_t *b = body(s, &n);
		assert_int_equal(far_grpc_decode_sum_reply(b, n, &back), 0);
		assert_memory_equal(back, sum, sizeof sum); /* as it was computed there */
	}
	return s;
}

static void refused(const struct peer_stream *s, int status, const char *name)
{
	assert_int_equal(s->status, status);
	assert_string_equal(s->errno_name, name);
}

static struct far_grpc_lease lease(struct peer *p, struct far_grpc_request r)
{
	struct message m;
	struct far_grpc_lease l;
	size_t n;
	struct far_pb_out o = build(&m, FAR_M_LEASE, r);
	const uint8_t *b = body(CALL(p, "Lease", &o), &n);

	assert_int_equal(far_grpc_decode_lease(b, n, &l), 0);
	assert_true(l.checked);
	return l;
}

/* A server over `b` and two connections to it. */
struct rig {
	struct slow slow;
	struct far_backend *b;
	struct far_server *server;
	struct peer *p, *q;
};

static struct peer *rig_connect(struct far_server *s)
{
	struct peer *p = malloc(sizeof *p);
	int sv[2];

	assert_non_null(p);
	assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv), 0);
	assert_int_equal(far_server_serve(s, sv[0], NULL), 0);
	peer_over_fd(p, sv[1]);
	return p;
}

static void rig_hang_up(struct peer **p)
{
	if (*p)
		peer_free(*p);
	free(*p);
	*p = NULL;
}

static int rig_setup(void **state)
{
	struct rig *g = calloc(1, sizeof *g);
	struct far_server_opts opts = FAR_SERVER_OPTS_INIT;

	g->b = slow_open(&g->slow, SIZE);
	opts.lease_ms = 60000;
	assert_int_equal(far_server_new(&opts, &g->server, NULL), 0);
	assert_int_equal(far_server_export(g->server, NAME, g->b, NULL), 0);
	g->p = rig_connect(g->server);
	g->q = rig_connect(g->server);
	*state = g;
	return 0;
}

static int rig_teardown(void **state)
{
	struct rig *g = *state;

	rig_hang_up(&g->p);
	rig_hang_up(&g->q);
	far_server_free(g->server);
	far_close(g->b);
	slow_free(&g->slow);
	free(g);
	return 0;
}

static void test_sessions(void **state)
{
	struct rig *g = *state;

	refused(put(g->p, 7, 1, 0, "x"), 9, "ENOTCONN");
	struct far_grpc_export e = hello(g->p, 7, 1), f = hello(g->q, 0, 0);
	assert_true(e.instance == f.instance);
	assert_int_equal(put(g->p, 7, 1, 0, "x")->status, 0);
	assert_int_equal(put(g->q, 7, 1, 1, "y")->status, 0); /* the session is the server's, not the connection's */
	hello(g->q, 7, 2);
	refused(put(g->p, 7, 1, 0, "z"), 10, "ECANCELED");
	assert_int_equal(put(g->p, 7, 2, 2, "z")->status, 0);
	assert_memory_equal(g->slow.mem, "xyz", 3);
	/* Who has said a session cannot have meant a change without one. */
	refused(put(g->p, 0, 0, 0, "w"), 15, "EBADMSG");
}

/* A write that is held up in the store is over before a new generation begins; one that comes late is not done. */
/* A write elsewhere by the session as it was; one that the server still lets in waits there, and is given up soon. */
static bool zombie_is_refused(struct rig *g)
{
	struct message m;
	uint8_t sum[FAR_GRPC_SUM];
	size_t n;

	far_grpc_sum_data(sum, NAME, strlen(NAME), 100, "late", 4);
	struct far_pb_out o = build(&m, FAR_M_WRITE, (struct far_grpc_request){ .session = 7, .generation = 1, .off = 100, .sum = sum,
				    .data = (const uint8_t *)"late", .data_n = 4 });
	uint8_t *msg = peer_message(o.p, o.n, &n);
	struct peer *third = rig_connect(g->server);
	int32_t id = peer_submit(third, "POST", FAR_GRPC_REGION "Write", "application/grpc", "grpc-timeout", "100m", msg, n, false);
	assert_true(peer_drive(third, id));
	struct peer_stream *s = peer_of(third, id);
	bool yes = s->status == 10;
	if (yes)
		refused(s, 10, "ECANCELED");
	else
		assert_int_equal(s->status, 4);
	rig_hang_up(&third);
	free(msg);
	return yes;
}

static void test_zombie(void **state)
{
	struct rig *g = *state;
	struct message m, d;
	size_t n, k;

	hello(g->p, 7, 1);
	slow_hold(&g->slow, true);
	struct far_pb_out o = build(&m, FAR_M_WRITE, (struct far_grpc_request){ .session = 7, .generation = 1, .off = 10,
				    .data = (const uint8_t *)"old", .data_n = 3 });
	uint8_t *write_msg = peer_message(o.p, o.n, &n);
	int32_t wid = peer_submit(g->p, "POST", FAR_GRPC_REGION "Write", "application/grpc", NULL, NULL, write_msg, n, false);
	peer_drive(g->p, 0);
	assert_true(slow_wait_inside(&g->slow, 1));
	o = build(&d, FAR_M_DESCRIBE, (struct far_grpc_request){ .session = 7, .generation = 2 });
	uint8_t *hello_msg = peer_message(o.p, o.n, &k);
	int32_t hid = peer_submit(g->q, "POST", FAR_GRPC_REGION "Describe", "application/grpc", NULL, NULL, hello_msg, k, false);
	uint64_t until = far_now() + 50 * FAR_MSEC;
	while (far_now() < until) {
		peer_drive(g->q, 0);
		assert_false(peer_of(g->q, hid)->closed);
	}
	until = far_now() + 20 * FAR_SEC;
	while (!zombie_is_refused(g))
		assert_true(far_now() < until);
	slow_hold(&g->slow, false);
	assert_true(peer_drive(g->p, wid) && peer_drive(g->q, hid));
	assert_int_equal(peer_of(g->q, hid)->status, 0);
	assert_memory_equal(g->slow.mem + 10, "old", 3);
	assert_int_equal(put(g->q, 7, 2, 10, "new")->status, 0);
	refused(put(g->p, 7, 1, 10, "old"), 10, "ECANCELED");
	assert_memory_equal(g->slow.mem + 10, "new", 3);
	free(write_msg);
	free(hello_msg);
}

static void test_lease(void **state)
{
	struct rig *g = *state;
	struct far_grpc_request a = { .session = 7, .generation = 1, .writer = "w-a", .writer_n = 3, .holder = "host a", .holder_n = 6 };
	struct far_grpc_request b = { .session = 8, .generation = 1, .writer = "w-b", .writer_n = 3 };
	struct message m;

	struct far_pb_out o = build(&m, FAR_M_LEASE, a);
	refused(CALL(g->p, "Lease", &o), 9, "ENOTCONN");
	hello(g->p, 7, 1);
	hello(g->q, 8, 1);
	struct far_grpc_lease l = lease(g->p, a);
	assert_true(l.answer == FAR_GRPC_GRANTED && l.ttl_ms == 60000 && l.export.epoch == 1 && l.export.size == SIZE);
	assert_string_equal(l.export.writer, "w-a");
	l = lease(g->q, b);
	assert_true(l.answer == FAR_GRPC_BUSY && l.left_ms && !l.gone);
	assert_string_equal(l.other, "host a");
	refused(put(g->q, 8, 1, 0, "b"), 9, "ESTALE");
	assert_int_equal(put(g->p, 7, 1, 0, "a")->status, 0);

	/* The plain service, too. */
	struct peer *plain = rig_connect(g->server);
	static const uint8_t write_at[] = { 8, 0, 0x12, 1, 'p' };
	refused(peer_call(plain, FAR_GRPC_BACKEND "WriteAt", write_at, sizeof write_at), 9, "ESTALE");
	struct far_grpc_request z = { .len = 4096 };
	o = build(&m, FAR_M_ZERO, z);
	refused(CALL(plain, "Zero", &o), 9, "ESTALE");
	o = build(&m, FAR_M_DISCARD, z);
	refused(CALL(plain, "Discard", &o), 9, "ESTALE");
	assert_int_equal(g->slow.mem[0], 'a');

	/* The holder's connection goes away. */
	rig_hang_up(&g->p);
	uint64_t until = far_now() + LIMIT;
	do {
		l = lease(g->q, b);
		assert_true(l.answer == FAR_GRPC_BUSY && far_now() < until);
	} while (!l.gone);
	b.take_over = true;
	l = lease(g->q, b);
	assert_true(l.answer == FAR_GRPC_GRANTED && l.export.epoch == 2);
	hello(plain, 7, 1);
	a.epoch = 1;
	assert_int_equal(lease(plain, a).answer, FAR_GRPC_STALE);
	refused(put(plain, 7, 1, 0, "a"), 9, "ESTALE");
	b.take_over = false;
	b.release = true;
	assert_int_equal(lease(g->q, b).answer, FAR_GRPC_GRANTED);
	rig_hang_up(&plain);

	b.release = false;
	b.generation = 0; /* an older one */
	o = build(&m, FAR_M_LEASE, b);
	refused(CALL(g->q, "Lease", &o), 10, "ECANCELED");
	b.generation = 1;
	b.writer = "not a name";
	b.writer_n = 10;
	o = build(&m, FAR_M_LEASE, b);
	assert_int_equal(CALL(g->q, "Lease", &o)->status, 3);
	o.n -= 10; /* without its check */
	refused(CALL(g->q, "Lease", &o), 15, "EBADMSG");
}

static struct far_grpc_watch watch(struct peer *p, uint64_t instance, uint64_t since, struct far_extent *x, size_t max, size_t *n)
{
	struct message m;
	struct far_grpc_watch w;
	size_t len;
	struct far_pb_out o = build(&m, FAR_M_WATCH,
				    (struct far_grpc_request){ .instance = instance, .since = since, .max = (uint32_t)max });
	const uint8_t *b = body(CALL(p, "Watch", &o), &len);

	assert_int_equal(far_grpc_decode_watch(b, len, &w, x, max, n), 0);
	assert_true(w.checked);
	return w;
}

static void test_watch(void **state)
{
	struct rig *g = *state;
	struct far_extent x[4];
	size_t n;

	struct far_grpc_export e = hello(g->p, 7, 1);
	assert_true(watch(g->q, e.instance + 1, 0, x, 4, &n).all);
	struct far_grpc_watch w = watch(g->q, e.instance, e.change, x, 4, &n);
	assert_true(!w.all && n == 0 && w.export.change == e.change);
	assert_int_equal(put(g->p, 7, 1, 70000, "changed")->status, 0);
	w = watch(g->q, e.instance, w.export.change, x, 4, &n);
	assert_true(!w.all && n == 1 && x[0].off <= 70000 && 70007 <= x[0].off + x[0].len && x[0].len == 65536);
	w = watch(g->q, e.instance, w.export.change, x, 4, &n);
	assert_true(!w.all && n == 0);
	g->slow.error = -EIO; /* who knows how far it came */
	assert_true(put(g->p, 7, 1, 0, "x")->status != 0);
	g->slow.error = 0;
	w = watch(g->q, e.instance, w.export.change, x, 4, &n);
	assert_true(!w.all && n == 1 && x[0].off == 0);
}

/* Reads with sums: of one range in the head, of many before the data, of zeros by their length. */
static void test_read_sums(void **state)
{
	struct rig *g = *state;
	struct message m;

	for (size_t i = 0; i < SIZE; i++)
		g->slow.mem[i] = i / 1000 % 3 ? (uint8_t)(i * 7 + i / 251) : 0;
	for (unsigned ranges = 1; ranges <= FAR_GRPC_MAX_RANGES; ranges += ranges < 10 ? 1 : 59) {
		struct far_grpc_request r = { .sums = true, .zeros = true, .ranges_n = ranges };
		for (unsigned i = 0; i < ranges; i++)
			r.ranges[i] = (struct far_grpc_range){ i * 500, i % 7 ? 500 : 37 };
		struct far_pb_out o = build(&m, FAR_M_READ, r);
		size_t n;
		const uint8_t *b = body(CALL(g->p, "Read", &o), &n), *kinds = NULL, *sums = NULL, *data = NULL, *end = b + n;
		struct far_pb_in in = { b, end };
		struct far_pb_field f;
		while (far_pb_next(&in, &f) > 0) {
			if (f.num == 1)
				kinds = f.data, assert_int_equal(f.len, ranges);
			else if (f.num == 3)
				sums = f.data, assert_int_equal(f.len, ranges * FAR_GRPC_SUM);
			else if (f.num == 2)
				data = f.data, end = f.data + f.len;
		}
		assert_non_null(sums);
		assert_true(!data || sums < data);
		for (unsigned i = 0; i < ranges; i++) {
			uint8_t want[FAR_GRPC_SUM];
			uint64_t off = r.ranges[i].off, len = r.ranges[i].len;
			if (kinds && kinds[i]) {
				far_grpc_sum_span(want, NAME, strlen(NAME), off, len);
			} else {
				assert_memory_equal(data, g->slow.mem + off, len);
				far_grpc_sum_data(want, NAME, strlen(NAME), off, data, len);
				data += len;
			}
			assert_memory_equal(sums + i * FAR_GRPC_SUM, want, sizeof want);
		}
		assert_true(!data || data == end);
	}
}

/* Any one bit of a Write, a Zero or a Discard: what is not done as it was meant is not done at all. */
static void flip(struct rig *g, struct peer **p, enum far_grpc_method method, const char *path, struct far_pb_out *o, uint64_t off,
		 size_t len, uint8_t after)
{
	uint8_t *want = malloc(SIZE);
	bool flushes = method == FAR_M_WRITE && off == 70000;
	unsigned lost = 0;

	for (size_t bit = 0; bit < o->n * 8; bit++) {
		if (bit % 2048 == 0) { /* its streams do not last for ever */
			rig_hang_up(p);
			*p = rig_connect(g->server);
			hello(*p, 7, 1);
		}
		memset(g->slow.mem, 0x55, SIZE);
		o->p[bit / 8] ^= (uint8_t)(1 << bit % 8);
		struct peer_stream *s = peer_call(*p, path, o->p, o->n);
		o->p[bit / 8] ^= (uint8_t)(1 << bit % 8);
		memset(want, 0x55, SIZE);
		if (s->status == 0)
			memset(want + off, after, len);
		/* A flush that was asked for is answered for. */
		struct far_grpc_written w = { .flushed = false };
		if (s->status == 0 && method == FAR_M_WRITE)
			assert_int_equal(far_grpc_decode_written(s->data + 5, s->data_n - 5, &w), 0);
		lost += flushes && s->status == 0 && !w.flushed;
		if (memcmp(want, g->slow.mem, SIZE))
			fail_msg("method %d, bit %zu: status %d, and something else was done", (int)method, bit, s->status);
	}
	free(want);
	if (flushes) /* the flag's tag and value: the client can tell, by the answer */
		assert_true(lost > 0 && lost < 32);
}

static void test_flipped_bits(void **state)
{
	struct rig *g = *state;
	struct message m;
	uint8_t data[64], sum[FAR_GRPC_SUM];
	struct far_grpc_request r = { .session = 7, .generation = 1, .sum = sum, .data = data, .data_n = sizeof data };

	memset(data, 0xab, sizeof data);
	for (int k = 0; k < 3; k++) {
		uint64_t off = (uint64_t[]){ 20, 4096, 70000 }[k];
		r.flush = k == 2;
		r.off = (int64_t)off;
		far_grpc_sum_data(sum, NAME, strlen(NAME), off, data, sizeof data);
		struct far_pb_out o = build(&m, FAR_M_WRITE, r);
		flip(g, &g->p, FAR_M_WRITE, FAR_GRPC_REGION "Write", &o, off, sizeof data, 0xab);
	}
	r = (struct far_grpc_request){ .session = 7, .generation = 1, .sum = sum, .off = 4096, .len = 200 };
	far_grpc_sum_span(sum, NAME, strlen(NAME), 4096, 200);
	struct far_pb_out o = build(&m, FAR_M_ZERO, r);
	flip(g, &g->p, FAR_M_ZERO, FAR_GRPC_REGION "Zero", &o, 4096, 200, 0);
	o = build(&m, FAR_M_DISCARD, r);
	flip(g, &g->p, FAR_M_DISCARD, FAR_GRPC_REGION "Discard", &o, 4096, 200, 0);
}

/* A reply's bits are the client's to check: this is what it has for it. */
static void test_flush_reply(void **state)
{
	struct rig *g = *state;
	struct message m;
	struct far_grpc_flushed f;
	size_t n;

	struct far_grpc_export e = hello(g->p, 7, 1);
	struct far_pb_out o = build(&m, FAR_M_FLUSH, (struct far_grpc_request){ .session = 7, .generation = 1 });
	const uint8_t *b = body(CALL(g->p, "Flush", &o), &n);
	assert_int_equal(far_grpc_decode_flushed(b, n, &f), 0);
	assert_true(f.checked && f.instance == e.instance);
}

/* A flush goes through client, wire, server and layers down to the disk; a failed one stays failed. */
static void test_flush_reaches_the_disk(void **state)
{
	static const char *const layers[] = { "strict:chunk=4096", "tracked", "gated", "chunked" };
	char dir[] = "/tmp/far-sessions-XXXXXX", uri[200], *bound = NULL;
	struct far_backend *b, *c;
	struct far_server *s;
	struct far_error err = { 0 };

	assert_non_null(mkdtemp(dir));
	snprintf(uri, sizeof uri, "file:%s/f?size=1M", dir);
	if (far_open(uri, NULL, &b, &err))
		fail_msg("%s", err.text);
	for (size_t i = 0; i < FAR_ARRAY_LEN(layers); i++)
		if (far_layer_open(layers[i], b, &b, &err))
			fail_msg("%s", err.text);
	assert_int_equal(far_server_new(NULL, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "default", b, NULL), 0);
	assert_int_equal(far_server_listen(s, "grpc://127.0.0.1:0", &bound, &err), 0);
	if (far_open(bound, NULL, &c, &err))
		fail_msg("%s", err.text);
	for (size_t i = 0; i < FAR_ARRAY_LEN(layers); i++)
		if (far_layer_open(layers[i], c, &c, &err))
			fail_msg("%s", err.text);
	for (int i = 0; i < 3; i++) {
		unsigned before = fsyncs + fdatasyncs;
		assert_int_equal(far_write(c, 4096 * (uint64_t)i, "x", 1, 0), 0);
		assert_int_equal(far_flush(c), 0);
		assert_true(fsyncs + fdatasyncs > before);
	}
	/* The record is an attribute, which needs an fsync; a flush with nothing new in it does not. */
	unsigned whole = fsyncs;
	assert_int_equal(far_flush(c), 0);
	assert_int_equal(fsyncs, whole);
	sync_error = EIO;
	assert_int_equal(far_flush(c), -EIO);
	sync_error = 0;
	assert_int_equal(far_flush(c), -EIO);
	far_close(c);
	far_server_free(s);
	far_close(b);
	free(bound);
	snprintf(uri, sizeof uri, "%s/f", dir);
	unlink(uri);
	rmdir(dir);
}

static struct far_server *restart(struct far_server *old, struct far_backend *b, const char *listen, uint32_t lease_ms)
{
	struct far_server_opts opts = FAR_SERVER_OPTS_INIT;
	struct far_server *s;
	struct far_error err = { 0 };

	far_server_free(old);
	opts.lease_ms = lease_ms;
	assert_int_equal(far_server_new(&opts, &s, NULL), 0);
	assert_int_equal(far_server_export(s, "default", b, NULL), 0);
	if (far_server_listen(s, listen, NULL, &err))
		fail_msg("%s", err.text);
	return s;
}

/* The server starts again under a client with a lease. With a record or without one it goes on; when somebody else has
 * written in between, it does not, even towards a server that has not heard of it. */
static void restart_case(struct far_backend *b, bool record)
{
	char dir[] = "/tmp/far-sessions-XXXXXX", uri[200];
	struct far_backend *c, *d;
	struct far_lease l = FAR_LEASE_INIT;
	struct far_error err = { 0 };
	char byte;

	assert_non_null(mkdtemp(dir));
	snprintf(uri, sizeof uri, "grpc+unix:///?socket=%s/s", dir);
	struct far_server *s = restart(NULL, b, uri, 60000);
	if (far_open(uri, NULL, &c, &err))
		fail_msg("%s", err.text);
	l.writer = "w";
	assert_int_equal(far_lease(c, &l), 0);
	assert_true(l.origin.epoch == 1);
	assert_int_equal(far_write(c, 0, "a", 1, 0), 0);
	s = restart(s, b, uri, 60000);
	assert_int_equal(far_write(c, 0, "b", 1, 0), 0); /* before it has renewed */
	l.epoch = 1;
	assert_int_equal(far_lease(c, &l), 0);
	assert_true(l.origin.epoch == 1);
	if (far_open(uri, NULL, &d, &err))
		fail_msg("%s", err.text);
	assert_int_equal(far_write(d, 0, "d", 1, 0), -ESTALE);
	assert_int_equal(far_write(c, 0, "c", 1, 0), 0);

	s = restart(s, b, uri, 1); /* it lapses at once */
	if (record) {
		uint64_t until = far_now() + LIMIT;
		int r;
		while ((r = far_write(d, 0, "d", 1, 0)) == -ESTALE)
			assert_true(far_now() < until);
		assert_int_equal(r, 0);
		s = restart(s, b, uri, 60000);
		assert_int_equal(far_write(c, 0, "e", 1, 0), -ESTALE);
		assert_int_equal(far_lease(c, &l), -ESTALE);
		assert_true(l.origin.epoch == 2);
		assert_int_equal(far_read(c, 0, &byte, 1, 0), 0);
		assert_int_equal(byte, 'd');
		l.take_over = true;
		assert_int_equal(far_lease(c, &l), 0);
		assert_int_equal(far_write(c, 0, "f", 1, 0), 0);
	}
	far_close(d);
	far_close(c);
	far_server_free(s);
	rmdir(dir);
}

static void test_restart(void **state)
{
	struct far_backend *b;

	assert_int_equal(far_open("mem:1M", NULL, &b, NULL), 0);
	restart_case(b, true);
	far_close(b);
}

static void test_restart_without_record(void **state)
{
	struct slow slow;
	struct far_backend *b = slow_open(&slow, SIZE);

	restart_case(b, false);
	far_close(b);
	slow_free(&slow);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(test_sessions, rig_setup, rig_teardown),
		cmocka_unit_test_setup_teardown(test_zombie, rig_setup, rig_teardown),
		cmocka_unit_test_setup_teardown(test_lease, rig_setup, rig_teardown),
		cmocka_unit_test_setup_teardown(test_watch, rig_setup, rig_teardown),
		cmocka_unit_test_setup_teardown(test_read_sums, rig_setup, rig_teardown),
		cmocka_unit_test_setup_teardown(test_flipped_bits, rig_setup, rig_teardown),
		cmocka_unit_test_setup_teardown(test_flush_reply, rig_setup, rig_teardown),
		cmocka_unit_test(test_flush_reaches_the_disk),
		cmocka_unit_test(test_restart),
		cmocka_unit_test(test_restart_without_record),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
