/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Each layer's own rules. That they all behave as backends is tested in tests/contract. */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/clock.h"
#include "base/thread.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define LIMIT (20 * FAR_SEC)
#define BYTES (64 * 1024)

/* -------------------------------------------------------- a backend that counts, and blocks while it is told to */

struct probe {
	struct far_mutex lock;
	struct far_cond change;
	bool hold, stopped; /* hold: calls wait */
	unsigned inside, max_inside, calls, stops, closes;
	uint64_t bytes_read, bytes_written;
	char log[400];
	unsigned char data[BYTES];
};

static int probe_enter(struct probe *p, char what, uint64_t off, uint64_t len)
{
	int r = 0;

	far_mutex_lock(&p->lock);
	size_t at = strlen(p->log);
	snprintf(p->log + at, sizeof p->log - at, "%c%" PRIu64 "+%" PRIu64 " ", what, off, len);
	p->calls++;
	if (++p->inside > p->max_inside)
		p->max_inside = p->inside;
	far_cond_broadcast(&p->change);
	while (p->hold && !p->stopped && !r)
		if (!far_cond_wait_until(&p->change, &p->lock, far_deadline()))
			r = -ETIMEDOUT;
	p->inside--;
	far_cond_broadcast(&p->change);
	if (p->stopped)
		r = -ESHUTDOWN;
	far_mutex_unlock(&p->lock);
	return r;
}

static int probe_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct probe *p = self;
	int r = probe_enter(p, 'r', off, len);
	if (!r)
		memcpy(buf, p->data + off, len);
	return r;
}

static int probe_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct probe *p = self;
	int r = probe_enter(p, 'w', off, len);
	if (!r)
		memcpy(p->data + off, buf, len);
	return r;
}

static int probe_flush(void *self)
{
	return probe_enter(self, 'f', 0, 0);
}

static int probe_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct probe *p = self;
	int r = probe_enter(p, 'd', off, len);
	if (!r)
		memset(p->data + off, 0, len);
	return r;
}

static int probe_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct probe *p = self;
	int r = probe_enter(p, 'z', off, len);
	if (!r)
		memset(p->data + off, 0, len);
	return r;
}

static int probe_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	out[0] = (struct far_extent){ off, len, FAR_EXTENT_DATA };
	*n = 1;
	return probe_enter(self, 'e', off, len);
}

static int probe_share(void *self, int *fd)
{
	*fd = 0;
	return 0;
}

static void probe_stop(void *self)
{
	struct probe *p = self;
	far_mutex_lock(&p->lock);
	p->stopped = true;
	p->stops++;
	far_cond_broadcast(&p->change);
	far_mutex_unlock(&p->lock);
}

static void probe_close(void *self)
{
	((struct probe *)self)->closes++;
}

static struct probe *probe_new(uint64_t chunk, struct far_backend **b)
{
	static const struct far_ops ops = {
		FAR_OPS_INIT, .read = probe_read, .write = probe_write, .flush = probe_flush, .discard = probe_discard,
		.zero = probe_zero, .extents = probe_extents, .share = probe_share, .stop = probe_stop, .close = probe_close,
	};
	struct far_facts f = { .size = sizeof f, .bytes = BYTES, .chunk = chunk, .caps = FAR_CAP_WRITE | FAR_CAP_SHARE };
	struct probe *p = calloc(1, sizeof *p);

	far_mutex_init(&p->lock);
	far_cond_init(&p->change);
	assert_int_equal(far_backend_new(&ops, p, &f, b), 0);
	return p;
}

static void probe_free(struct probe *p)
{
	assert_int_equal(p->closes, 1);
	assert_true(p->stops >= 1);
	far_cond_fini(&p->change);
	far_mutex_fini(&p->lock);
	free(p);
}

static void probe_hold(struct probe *p, bool hold)
{
	far_mutex_lock(&p->lock);
	p->hold = hold;
	far_cond_broadcast(&p->change);
	far_mutex_unlock(&p->lock);
}

static void probe_wait_inside(struct probe *p, unsigned n)
{
	uint64_t until = far_now() + LIMIT;

	far_mutex_lock(&p->lock);
	while (p->inside < n && far_cond_wait_until(&p->change, &p->lock, until))
		;
	assert_int_equal(p->inside, n);
	far_mutex_unlock(&p->lock);
}

static struct far_backend *wrap(const char *spec, struct far_backend *inner)
{
	struct far_backend *b;
	struct far_error err;

	if (far_layer_open(spec, inner, &b, &err))
		fail_msg("%s", err.text);
	return b;
}

static struct far_backend *memory(const char *uri)
{
	struct far_backend *b;
	assert_int_equal(far_open(uri, NULL, &b, NULL), 0);
	return b;
}

/* One call on a thread of its own. */
struct call {
	struct far_backend *b;
	char op;
	uint64_t off, len, deadline;
	unsigned char fill;
	struct far_thread t;
	_Atomic bool began, done;
	int result;
};

static int call_do(struct call *c)
{
	unsigned char *buf = malloc(c->len + 1);
	struct far_extent e;
	size_t n;
	int r;

	memset(buf, c->fill, c->len);
	switch (c->op) {
	case 'r':
		r = far_read(c->b, c->off, buf, c->len, 0);
		break;
	case 'w':
		r = far_write(c->b, c->off, buf, c->len, 0);
		break;
	case 'd':
		r = far_discard(c->b, c->off, c->len, 0);
		break;
	case 'z':
		r = far_zero(c->b, c->off, c->len, 0);
		break;
	case 'f':
		r = far_flush(c->b);
		break;
	case 'G':
		r = far_gated_close(c->b);
		break;
	default:
		r = far_extents(c->b, c->off, c->len, &e, 1, &n);
	}
	free(buf);
	return r;
}

static void *call_run(void *arg)
{
	struct call *c = arg;

	if (c->deadline)
		far_deadline_limit(c->deadline);
	atomic_store(&c->began, true);
	c->result = call_do(c);
	atomic_store(&c->done, true);
	return NULL;
}

static void call_start(struct call *c, struct far_backend *b, char op, uint64_t off, uint64_t len)
{
	uint64_t deadline = c->deadline;

	*c = (struct call){ .b = b, .op = op, .off = off, .len = len, .deadline = deadline };
	assert_int_equal(far_thread_start(&c->t, "call", call_run, c), 0);
	while (!atomic_load(&c->began))
		far_sleep_until(far_now() + 50 * FAR_USEC, false);
}

static int call_end(struct call *c)
{
	far_thread_join(&c->t);
	return c->result;
}

/* ------------------------------------------------------------------------------------------- all layers alike */

static const char ops[] = "rwdzfe";

static const char *const all[] = { "chunked:chunk=4096", "strict:chunk=4096", "tracked", "gated", "delay:rtt=10us,rate=1G",
				   "fault", "retry" };

/* A call that waits below ends when the top is stopped; closing the top closes what is below, once. */
static void stop_reaches_the_bottom(void **state)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(all); i++)
		for (const char *op = ops; *op; op++) {
			struct far_backend *b;
			struct probe *p = probe_new(0, &b);
			struct call c = { .deadline = 0 };
			b = wrap(all[i], b);
			probe_hold(p, true);
			call_start(&c, b, *op, 0, 4096);
			probe_wait_inside(p, 1);
			far_stop(b);
			assert_int_equal(call_end(&c), -ESHUTDOWN);
			far_close(b);
			probe_free(p);
		}
}

/* What a layer waits for by itself: ended by stop, by the thread's deadline, and never begun with FAR_NOWAIT. */
static const char *const waiting[][2] = {
	{ NULL, "delay:rtt=1h" },
	{ NULL, "delay:rate=1" },
	{ NULL, "gated:closed" },
	{ NULL, "gated:open-after=1h" },
	{ "fault:every=1", "retry:backoff=1h,max-backoff=1h,deadline=1h" },
	{ "fault:every=1", "retry:backoff=1ms,max-backoff=1ms,deadline=1h,budget=1000000000" },
};

static struct far_backend *waiting_open(size_t i)
{
	struct far_backend *b = memory("mem:64K");
	if (waiting[i][0])
		b = wrap(waiting[i][0], b);
	return wrap(waiting[i][1], b);
}

static void waits_end_by_stop(void **state)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(waiting); i++)
		for (const char *op = "rw"; *op; op++) {
			struct far_backend *b = waiting_open(i);
			struct call c[3] = { { .deadline = 0 } };
			for (int k = 0; k < 3; k++)
				call_start(&c[k], b, *op, 0, 4096);
			far_sleep_until(far_now() + 2 * FAR_MSEC, false); /* most are waiting by now; the rest is refused */
			far_stop(b);
			for (int k = 0; k < 3; k++)
				assert_int_equal(call_end(&c[k]), -ESHUTDOWN);
			far_close(b);
		}
}

static void waits_end_by_deadline(void **state)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(waiting); i++)
		for (const char *op = "rw"; *op; op++) {
			struct far_backend *b = waiting_open(i);
			uint64_t deadline = far_now() + 20 * FAR_MSEC, old = far_deadline_limit(deadline);
			struct call c = { .b = b, .op = *op, .len = 4096 };
			assert_int_equal(call_do(&c), -ETIMEDOUT);
			far_deadline_restore(old);
			/* not before, unless it was plain from the start; not long after */
			assert_true(far_now() < deadline + LIMIT);
			far_close(b);
		}
}

static void waits_are_refused_with_nowait(void **state)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(waiting); i++) {
		struct far_backend *b = waiting_open(i);
		char buf[10] = "";
		assert_int_equal(far_read(b, 0, buf, 10, FAR_NOWAIT), -EAGAIN);
		assert_int_equal(far_write(b, 0, buf, 10, FAR_NOWAIT), -EAGAIN);
		assert_int_equal(far_discard(b, 0, 10, FAR_NOWAIT), -EAGAIN);
		assert_int_equal(far_zero(b, 0, 10, FAR_NOWAIT), -EAGAIN);
		far_close(b);
	}
}

/* A descriptor would go round the layer; only chunked gives it, which changes nothing but the shape of calls. */
static void share_does_not_go_round_a_layer(void **state)
{
	for (size_t i = 0; i < FAR_ARRAY_LEN(all); i++) {
		struct far_backend *b = wrap(all[i], memory("mem:64K"));
		int fd, chunked = !strncmp(all[i], "chunked", 7);
		assert_int_equal(far_share(b, &fd), chunked ? 0 : -EOPNOTSUPP);
		far_close(b);
	}
}

static void each_refusal_has_its_sentence(void **state)
{
	static const struct {
		const char *inner, *spec;
		int code;
		const char *want;
	} bad[] = {
		{ "mem:1M", "", EINVAL, "unknown layer ''. The known ones are chunked, delay, fault, gated, retry, strict, tracked." },
		{ "mem:1M", "dely:rtt=1", EINVAL,
		  "unknown layer 'dely'. The known ones are chunked, delay, fault, gated, retry, strict, tracked." },
		{ "mem:1M", "delay:rt=1", EINVAL, "layer delay: unknown option 'rt'. The known ones are rtt, jitter, rate." },
		{ "mem:1M", "delay:rtt=x", EINVAL,
		  "layer delay: 'x' is no value for 'rtt': give a duration such as 250us, 40ms, 1.5s or 2m." },
		{ "mem:1M", "chunked", EINVAL,
		  "layer chunked: what is below takes any offset and length. Give chunk=SIZE to use whole chunks all the same." },
		{ "mem:1M", "chunked:chunk=0", EINVAL, "layer chunked: '0' is out of range for 'chunk': give 1 B to 1.0 GiB." },
		{ "mem:1M", "strict", EINVAL, "layer strict: give chunk=SIZE." },
		{ "null:", "tracked", EFBIG,
		  "layer tracked: 9223372036854775807 bytes are too many chunks of 65536. Give a larger chunk=SIZE." },
		{ "mem:1M", "fault:rate=2", EINVAL, "layer fault: '2' is out of range for 'rate': give 0 to 1." },
		{ "mem:1M", "fault:ops=read+seek", EINVAL,
		  "layer fault: 'ops' takes read, write and flush, joined by '+'." },
		{ "mem:1M", "fault:ops=", EINVAL, "layer fault: 'ops' takes read, write and flush, joined by '+'." },
		{ "mem:1M", "fault:disconnect-every=1s", EINVAL, "layer fault: disconnect-every needs disconnect-for=TIME." },
		{ "mem:1M", "fault:errno=E2BIG", EINVAL,
		  "layer fault: 'E2BIG' is no value for 'errno': give one of EIO, ENOSPC, EROFS, ETIMEDOUT, ECONNRESET, "
		  "ECONNREFUSED, EPROTO, ESTALE, EINVAL, ENOMEM." },
		{ "mem:1M", "retry:backoff=3s", EINVAL, "layer retry: max-backoff is shorter than backoff." },
		{ "mem:1M", "retry:tries=0", EINVAL, "layer retry: '0' is out of range for 'tries': give 1 to 2147483648 or unlimited." },
		{ "mem:1M", "gated:closed=x", EINVAL, "layer gated: 'x' is no value for 'closed': give yes or no." },
	};

	for (size_t i = 0; i < FAR_ARRAY_LEN(bad); i++) {
		struct far_backend *inner = memory(bad[i].inner), *b = NULL;
		struct far_error err;
		char buf[4];
		int r = far_layer_open(bad[i].spec, inner, &b, &err);
		assert_string_equal(err.text, bad[i].want);
		assert_int_equal(r, -bad[i].code);
		assert_null(b);
		assert_int_equal(far_read(inner, 0, buf, 4, 0), 0); /* still ours */
		far_close(inner);
	}
	struct far_backend *inner = wrap("strict:chunk=1000", memory("mem:1M")), *b = NULL;
	struct far_error err;
	assert_int_equal(far_layer_open("chunked:chunk=1500", inner, &b, &err), -EINVAL);
	assert_string_equal(err.text, "layer chunked: chunk=1500 is no multiple of the 1000 bytes that what is below takes.");
	assert_int_equal(far_layer_open("strict:chunk=1500", inner, &b, &err), -EINVAL);
	assert_string_equal(err.text, "layer strict: chunk=1500 is no multiple of the 1000 bytes that what is below takes.");
	far_close(inner);
}

/* ---------------------------------------------------------------------------------------------------- chunked */

/* Upstream's cases: chunks of 2, 4 and 8 bytes, buffers of 1 to 128 at every stride. */
static void chunked_takes_any_range(void **state)
{
	static const uint64_t chunks[] = { 2, 4, 8 }, counts[] = { 3, 16, 64 };

	for (size_t i = 0; i < 9; i++) {
		uint64_t chunk = chunks[i / 3], bytes = chunk * counts[i % 3];
		char uri[40], spec[40];
		snprintf(uri, sizeof uri, "mem:%" PRIu64, bytes);
		snprintf(spec, sizeof spec, "strict:chunk=%" PRIu64, chunk);
		struct far_backend *b = wrap("chunked", wrap(spec, memory(uri)));
		unsigned char model[512] = { 0 }, buf[512], value = 1;
		for (size_t len = 1; len <= 128 && len <= bytes; len++)
			for (uint64_t off = 0; off + len <= bytes; off += len) {
				memset(buf, 0xaa, sizeof buf);
				assert_int_equal(far_read(b, off, buf, len, 0), 0);
				assert_memory_equal(buf, model + off, len);
				memset(buf, value++, len);
				memcpy(model + off, buf, len);
				assert_int_equal(far_write(b, off, buf, len, 0), 0);
				assert_int_equal(far_read(b, 0, buf, bytes, 0), 0);
				assert_memory_equal(buf, model, bytes);
			}
		far_close(b);
	}
}

static void chunked_passes_whole_chunks_through(void **state)
{
	static const struct {
		char op;
		uint64_t off, len;
		const char *want;
	} cases[] = {
		{ 'r', 0, 8192, "r0+8192 " },
		{ 'r', 4096, 4096, "r4096+4096 " },
		{ 'r', 1, 1, "r0+4096 " },
		{ 'r', 4000, 5000, "r0+12288 " }, /* one round trip */
		{ 'w', 4096, 8192, "w4096+8192 " },
		{ 'w', 4097, 1, "r4096+4096 w4096+4096 " },
		{ 'w', 4000, 5000, "r0+4096 r8192+4096 w0+12288 " },
		{ 'w', 4096, 5000, "r8192+4096 w4096+8192 " },
		{ 'w', 4000, 96, "r0+4096 w0+4096 " },
		{ 'w', BYTES - 4096, 4096, "w61440+4096 " },
		{ 'd', 4096, 8192, "d4096+8192 " },
		{ 'z', 4096, 8192, "z4096+8192 " },
		{ 'd', 4000, 8192, "r0+4096 w0+4096 d4096+4096 r8192+4096 w8192+4096 " },
		{ 'z', 5000, 10, "r4096+4096 w4096+4096 " },
		{ 'f', 0, 0, "f0+0 " },
		{ 'e', 5000, 10, "e4096+4096 " },
	};
	struct far_backend *b;
	struct probe *p = probe_new(4096, &b);

	b = wrap("chunked", b);
	assert_int_equal(far_facts(b)->chunk, 0);
	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		struct call c = { .b = b, .op = cases[i].op, .off = cases[i].off, .len = cases[i].len };
		p->log[0] = 0;
		assert_int_equal(call_do(&c), 0);
		assert_string_equal(p->log, cases[i].want);
	}
	far_close(b);
	probe_free(p);
}

/* W-A10: the region's last chunk is short; a failing read leaves nothing of an earlier request behind as success. */
static void chunked_has_a_short_tail_W_A10(void **state)
{
	struct far_backend *b = wrap("chunked", wrap("strict:chunk=4096", memory("mem:5000")));
	unsigned char buf[5000];

	memset(buf, 7, sizeof buf);
	assert_int_equal(far_write(b, 4999, buf, 1, 0), 0);
	assert_int_equal(far_write(b, 4000, buf, 200, 0), 0);
	assert_int_equal(far_write(b, 4999, buf, 2, 0), -ENOSPC);
	assert_int_equal(far_read(b, 0, buf, 5000, 0), 0);
	for (unsigned i = 0; i < 5000; i++)
		assert_int_equal(buf[i], (i >= 4000 && i < 4200) || i == 4999 ? 7 : 0);
	far_close(b);
	b = wrap("chunked:chunk=4096", wrap("fault:every=1,ops=read", memory("mem:5000")));
	memset(buf, 9, sizeof buf);
	assert_int_equal(far_write(b, 0, buf, 4096, 0), 0);
	assert_int_equal(far_read(b, 4500, buf, 10, 0), -EIO);
	assert_int_equal(far_write(b, 4500, buf, 10, 0), -EIO); /* could not read what it must keep */
	far_close(b);
}

/* W-A14: the second write to a chunk waits for the first; one to another chunk does not. */
static void chunked_writes_take_turns_W_A14(void **state)
{
	struct call a = { .deadline = 0 }, same = { .deadline = 0 }, other = { .deadline = 0 };
	struct far_backend *b;
	struct probe *p = probe_new(4096, &b);

	b = wrap("chunked", b);
	probe_hold(p, true);
	call_start(&a, b, 'w', 10, 10);
	probe_wait_inside(p, 1);
	call_start(&same, b, 'w', 100, 10);
	call_start(&other, b, 'w', 5000, 10);
	probe_wait_inside(p, 2);
	assert_false(atomic_load(&same.done));
	/* one that waits for its turn keeps its deadline */
	uint64_t old = far_deadline_limit(far_now() + 5 * FAR_MSEC);
	assert_int_equal(far_write(b, 200, "x", 1, 0), -ETIMEDOUT);
	far_deadline_restore(old);
	char whole[4096] = "";
	assert_int_equal(far_write(b, 0, whole, 4096, FAR_NOWAIT), -EAGAIN);
	probe_hold(p, false);
	assert_int_equal(call_end(&a) | call_end(&same) | call_end(&other), 0);
	assert_null(strstr(p->log, "r0+4096 r0+4096"));
	/* and it is ended by a stop */
	probe_hold(p, true);
	call_start(&a, b, 'w', 10, 10);
	probe_wait_inside(p, 1);
	call_start(&same, b, 'w', 100, 10);
	far_stop(b);
	assert_int_equal(call_end(&a), -ESHUTDOWN);
	assert_int_equal(call_end(&same), -ESHUTDOWN);
	far_close(b);
	probe_free(p);
}

/* ----------------------------------------------------------------------------------------------------- strict */

/* Upstream's cases for its chunked layer. */
static void strict_refuses_what_is_no_chunk(void **state)
{
	static const uint64_t chunks[] = { 1, 2, 8, 64, 256, 512, 4096 }, counts[] = { 1, 10, 100 };
	unsigned char *buf = calloc(2, 4096);

	for (size_t i = 0; i < 21; i++) {
		uint64_t chunk = chunks[i / 3], count = counts[i % 3];
		char uri[40], spec[40];
		snprintf(uri, sizeof uri, "mem:%" PRIu64, chunk * count);
		snprintf(spec, sizeof spec, "strict:chunk=%" PRIu64, chunk);
		struct far_backend *b = wrap(spec, memory(uri));
		assert_true(far_facts(b)->chunk == chunk);
		for (uint64_t k = 0; k < count; k++) {
			memset(buf, (int)k, chunk);
			assert_int_equal(far_write(b, k * chunk, buf, chunk, 0), 0);
			assert_int_equal(far_read(b, k * chunk, buf, chunk, 0), 0);
			assert_int_equal(buf[chunk - 1], (unsigned char)k);
		}
		if (chunk > 1) {
			assert_int_equal(far_read(b, 0, buf, chunk - 1, 0), count * chunk == chunk - 1 ? 0 : -EINVAL);
			assert_int_equal(far_write(b, 0, buf, 1, 0), -EINVAL);
			assert_int_equal(far_read(b, 1, buf, chunk - 1, 0), -EINVAL);
		}
		assert_int_equal(far_read(b, count * chunk, buf, chunk, 0), -EINVAL);
		assert_int_equal(far_write(b, count * chunk, buf, chunk, 0), -ENOSPC);
		far_close(b);
	}
	free(buf);
}

/* ---------------------------------------------------------------------------------------------------- tracked */

static void takes(struct far_backend *b, bool go_on, const char *want)
{
	char text[200] = "";
	uint64_t *v;
	size_t n, at = 0;

	assert_int_equal(far_tracked_take(b, go_on, &v, &n), 0);
	for (size_t i = 0; i < n && at < sizeof text; i++)
		at += (size_t)snprintf(text + at, sizeof text - at, "%" PRIu64 " ", v[i]);
	free(v);
	assert_string_equal(text, want);
}

/* Upstream's cases: only after start, each chunk once, only what is new since the last take. */
static void tracked_lists_what_was_written(void **state)
{
	struct far_backend *b = wrap("tracked:chunk=4096", memory("mem:1M"));
	char buf[9000] = "";

	assert_int_equal(far_write(b, 0, buf, 10, 0), 0);
	takes(b, true, "");
	far_tracked_start(b);
	takes(b, true, "");
	assert_int_equal(far_write(b, 4096, buf, 1, 0), 0);
	assert_int_equal(far_write(b, 4100, buf, 1, 0), 0);
	assert_int_equal(far_write(b, 0, buf, 0, 0), 0);
	assert_int_equal(far_read(b, 0, buf, 9000, 0), 0);
	assert_int_equal(far_flush(b), 0);
	assert_int_equal(far_write(b, (1 << 20) - 1, buf, 1, 0), 0);
	takes(b, true, "4096 1044480 ");
	takes(b, true, "");
	assert_int_equal(far_write(b, 4095, buf, 4098, 0), 0);
	assert_int_equal(far_discard(b, 20000, 1, 0), 0);
	assert_int_equal(far_zero(b, 262143, 2, 0), 0); /* across a word of the bitmap */
	takes(b, false, "0 4096 8192 16384 258048 262144 ");
	assert_int_equal(far_write(b, 0, buf, 10, 0), 0);
	takes(b, true, "");
	far_tracked_start(b);
	assert_int_equal(far_zero(b, 0, 1 << 20, 0), 0);
	uint64_t *v;
	size_t n;
	assert_int_equal(far_tracked_take(b, true, &v, &n), 0);
	assert_int_equal(n, 256);
	for (size_t i = 0; i < n; i++)
		assert_int_equal(v[i], i * 4096);
	free(v);
	far_close(b);
	/* a write that failed may have changed something */
	b = wrap("tracked:chunk=4096", wrap("fault:every=1,late", memory("mem:1M")));
	far_tracked_start(b);
	assert_int_equal(far_write(b, 8192, buf, 1, 0), -EIO);
	takes(b, true, "8192 ");
	far_close(b);
	b = wrap("tracked", memory("mem:0"));
	far_tracked_start(b);
	takes(b, true, "");
	far_close(b);
}

static void *tracked_writer(void *arg)
{
	struct call *c = arg;
	for (uint64_t i = 0; i < 1024; i++)
		if (far_write(c->b, (i * 8 + c->off) * 16, "x", 1, 0))
			c->result = -1;
	return NULL;
}

/* While writers run, every chunk they write is in exactly the takes after it: none is missing from all of them. */
static void tracked_loses_none_of_many_writers(void **state)
{
	struct far_backend *b = wrap("tracked:chunk=16", memory("mem:128K"));
	unsigned char *seen = calloc(1, 8192);
	struct call c[8] = { { .result = 0 } };

	far_tracked_start(b);
	for (unsigned i = 0; i < 8; i++) {
		c[i].b = b;
		c[i].off = i;
		assert_int_equal(far_thread_start(&c[i].t, "writer", tracked_writer, &c[i]), 0);
	}
	for (int round = 0; round < 50; round++) {
		uint64_t *v;
		size_t n;
		if (round == 49)
			for (unsigned i = 0; i < 8; i++)
				far_thread_join(&c[i].t);
		assert_int_equal(far_tracked_take(b, true, &v, &n), 0);
		for (size_t i = 0; i < n; i++) {
			assert_true(i == 0 || v[i] > v[i - 1]);
			seen[v[i] / 16]++;
		}
		free(v);
	}
	for (unsigned i = 0; i < 8192; i++)
		assert_int_equal(seen[i], 1);
	free(seen);
	far_close(b);
}

/* ------------------------------------------------------------------------------------------------------ gated */

/* Upstream's cases: blocks when closed, passes when open, also after it was closed again. */
static void gated_lets_calls_wait(void **state)
{
	struct call c[12] = { { .deadline = 0 } };
	struct far_backend *b;
	struct probe *p = probe_new(0, &b);

	b = wrap("gated", b);
	for (int round = 0; round < 3; round++) {
		char buf[4];
		assert_int_equal(far_read(b, 0, buf, 4, 0), 0);
		assert_int_equal(far_gated_close(b), 0);
		assert_int_equal(far_gated_close(b), 0);
		unsigned before = p->calls;
		for (int i = 0; i < 12; i++)
			call_start(&c[i], b, ops[i % 6], (uint64_t)i * 1000, 100);
		assert_int_equal(far_read(b, 0, buf, 4, FAR_NOWAIT), -EAGAIN);
		assert_int_equal(p->calls, before);
		far_gated_open(b);
		far_gated_open(b);
		for (int i = 0; i < 12; i++)
			assert_int_equal(call_end(&c[i]), 0);
		assert_int_equal(p->calls, before + 12);
	}
	far_close(b);
	probe_free(p);
}

/* W-B18: closing the gate waits for the calls that are inside. */
static void gated_close_drains_W_B18(void **state)
{
	struct call in = { .deadline = 0 }, close = { .deadline = 0 };
	struct far_backend *b;
	struct probe *p = probe_new(0, &b);

	b = wrap("gated", b);
	probe_hold(p, true);
	call_start(&in, b, 'w', 0, 10);
	probe_wait_inside(p, 1);
	uint64_t old = far_deadline_limit(far_now() + 5 * FAR_MSEC);
	assert_int_equal(far_gated_close(b), -ETIMEDOUT);
	far_deadline_restore(old);
	call_start(&close, b, 'G', 0, 0);
	assert_false(atomic_load(&close.done));
	probe_hold(p, false);
	assert_int_equal(call_end(&close), 0);
	probe_wait_inside(p, 0);
	assert_int_equal(call_end(&in), 0);
	far_close(b);
	probe_free(p);
}

static void gated_opens_by_itself(void **state)
{
	uint64_t start = far_now();
	struct far_backend *b = wrap("gated:open-after=10ms", memory("mem:1M"));
	char buf[4];

	assert_int_equal(far_read(b, 0, buf, 4, 0), 0);
	assert_true(far_now() - start >= 10 * FAR_MSEC);
	assert_int_equal(far_read(b, 0, buf, 4, FAR_NOWAIT), 0);
	assert_int_equal(far_gated_close(b), 0);
	assert_int_equal(far_read(b, 0, buf, 4, FAR_NOWAIT), -EAGAIN);
	far_close(b);
}

/* ------------------------------------------------------------------------------------------------------ delay */

static void delay_waits_a_round_trip(void **state)
{
	struct far_backend *b = wrap("delay:rtt=3ms,jitter=1ms", memory("mem:1M"));
	struct far_delay_stats st;

	assert_true(far_facts(b)->caps & FAR_CAP_REMOTE);
	for (const char *op = ops; *op; op++) {
		struct call c = { .b = b, .op = *op, .off = 100, .len = 1000 };
		uint64_t start = far_now();
		assert_int_equal(call_do(&c), 0);
		assert_true(far_now() - start >= 3 * FAR_MSEC);
	}
	far_delay_stats(b, &st);
	assert_int_equal(st.calls, 6);
	assert_true(st.last_ns >= 3 * FAR_MSEC && st.total_ns >= 18 * FAR_MSEC);
	far_close(b);
}

/* Round trips run side by side; bytes share the pipe of their direction. */
static void delay_shares_only_the_pipe(void **state)
{
	struct far_backend *b = wrap("delay:rtt=200ms", memory("mem:1M"));
	struct far_delay_stats st;
	struct call c[16];
	uint64_t start = far_now();

	for (int i = 0; i < 16; i++) {
		c[i].deadline = 0;
		call_start(&c[i], b, "rw"[i % 2], 0, 4096);
	}
	for (int i = 0; i < 16; i++)
		assert_int_equal(call_end(&c[i]), 0);
	uint64_t took = far_now() - start;
	far_delay_stats(b, &st);
	assert_true(took >= 200 * FAR_MSEC && st.total_ns >= 16 * 200 * FAR_MSEC);
	assert_true(took < 16 * 200 * FAR_MSEC / 2);
	far_close(b);
	b = wrap("delay:rate=10M", memory("mem:1M"));
	start = far_now();
	for (int i = 0; i < 8; i++)
		call_start(&c[i], b, 'r', 0, 100 * 1024);
	for (int i = 0; i < 8; i++)
		assert_int_equal(call_end(&c[i]), 0);
	assert_true(far_now() - start >= 8 * 100 * FAR_SEC / 10240);
	far_close(b);
	/* the pipe up is not busy with what comes down: a write is done while a long read still waits */
	b = wrap("delay:rate=1M", memory("mem:1M"));
	call_start(&c[0], b, 'r', 0, 1 << 20);
	assert_int_equal(far_write(b, 0, "x", 1, 0), 0);
	assert_false(atomic_load(&c[0].done));
	far_stop(b);
	assert_int_equal(call_end(&c[0]), -ESHUTDOWN);
	far_close(b);
}

/* Those of a list share the round trip, but not the pipe. */
static void delay_waits_once_for_a_list(void **state)
{
	struct far_backend *b = wrap("delay:rtt=200ms", memory("mem:1M"));
	char buf[8][4096];
	struct far_delay_stats st;
	struct far_io io[8];
	uint64_t start = far_now();

	for (size_t i = 0; i < 8; i++)
		io[i] = (struct far_io){ .off = i * 8192, .buf = buf[i], .len = sizeof buf[i] };
	memset(buf, 3, sizeof buf);
	assert_int_equal(far_write_many(b, io, 8, 0), 0);
	memset(buf, 4, sizeof buf);
	assert_int_equal(far_read_many(b, io, 8, 0), 0);
	uint64_t took = far_now() - start;
	assert_true(buf[0][0] == 3 && buf[7][4095] == 3);
	far_delay_stats(b, &st);
	assert_int_equal(st.calls, 2);
	assert_true(took >= 400 * FAR_MSEC && took < 8 * 200 * FAR_MSEC);
	far_close(b);
	b = wrap("delay:rate=1M", memory("mem:1M"));
	start = far_now();
	assert_int_equal(far_read_many(b, io, 8, 0), 0);
	assert_true(far_now() - start >= 8 * FAR_SEC / 256);
	uint64_t old = far_deadline_limit(far_now() + FAR_MSEC);
	assert_int_equal(far_write_many(b, io, 8, 0), -ETIMEDOUT);
	far_deadline_restore(old);
	assert_int_equal(io[7].result, -ETIMEDOUT);
	far_close(b);
}

/* A write that gave up has not changed anything. */
static void delay_gives_up_before_the_write(void **state)
{
	struct far_backend *b;
	struct probe *p = probe_new(0, &b);

	b = wrap("delay:rtt=1h", b);
	uint64_t old = far_deadline_limit(far_now() + FAR_MSEC);
	assert_int_equal(far_write(b, 0, "x", 1, 0), -ETIMEDOUT);
	far_deadline_restore(old);
	assert_int_equal(p->calls, 0);
	far_close(b);
	probe_free(p);
}

/* ------------------------------------------------------------------------------------------------------ fault */

static void faults(const char *spec, char op, const char *want)
{
	struct far_backend *b = wrap(spec, memory("mem:1M"));

	for (; *want; want++) {
		struct call c = { .b = b, .op = op, .off = 0, .len = 10 };
		int r = call_do(&c);
		if ((r != 0) != (*want == 'x'))
			fail_msg("%s: %d at ...%s", spec, r, want);
	}
	far_close(b);
}

static void fault_picks_calls(void **state)
{
	faults("fault", 'r', "........");
	faults("fault:nth=3", 'r', "..x.....");
	faults("fault:every=3", 'w', "..x..x..x");
	faults("fault:every=1,ops=read", 'w', "....");
	faults("fault:every=1,ops=read", 'r', "xxxx");
	faults("fault:every=1,ops=write", 'd', "xxxx");
	faults("fault:every=1,ops=write", 'z', "xxxx");
	faults("fault:every=1,ops=read+write", 'f', "....");
	faults("fault:every=2,ops=flush", 'f', ".x.x");
	faults("fault:rate=1", 'f', "xxxx");
	faults("fault:disconnect-for=1h", 'e', "xxxx");
	faults("fault:disconnect-every=1h,disconnect-for=1h", 'r', "....");
}

static void fault_gives_the_error_it_was_told(void **state)
{
	static const struct {
		const char *name;
		int code;
	} codes[] = { { "EIO", EIO }, { "ENOSPC", ENOSPC }, { "EROFS", EROFS }, { "ETIMEDOUT", ETIMEDOUT },
		      { "ECONNRESET", ECONNRESET }, { "ECONNREFUSED", ECONNREFUSED }, { "EPROTO", EPROTO }, { "ESTALE", ESTALE },
		      { "EINVAL", EINVAL }, { "ENOMEM", ENOMEM } };

	for (size_t i = 0; i < FAR_ARRAY_LEN(codes); i++) {
		char spec[60], buf[4];
		snprintf(spec, sizeof spec, "fault:every=1,errno=%s", codes[i].name);
		struct far_backend *b = wrap(spec, memory("mem:1M"));
		assert_int_equal(far_read(b, 0, buf, 4, 0), -codes[i].code);
		far_close(b);
	}
}

static unsigned fault_count(const char *spec, uint64_t *sum)
{
	struct far_backend *b = wrap(spec, memory("mem:1M"));
	unsigned failed = 0;
	char buf[4];

	*sum = 0;
	for (unsigned i = 0; i < 10000; i++)
		if (far_read(b, 0, buf, 4, 0)) {
			failed++;
			*sum = *sum * 31 + i;
		}
	far_close(b);
	return failed;
}

static void fault_rate_replays(void **state)
{
	uint64_t a, b, c;

	assert_in_range(fault_count("fault:rate=0.1,seed=1", &a), 800, 1200);
	fault_count("fault:rate=0.1,seed=1", &b);
	fault_count("fault:rate=0.1,seed=2", &c);
	assert_true(a == b && a != c);
}

static void fault_corrupts_one_byte(void **state)
{
	struct far_backend *b = wrap("fault:corrupt=0.5,seed=3", memory("mem:1M"));
	unsigned wrong_reads = 0;

	for (int i = 0; i < 200; i++) {
		unsigned char buf[100];
		unsigned wrong = 0;
		assert_int_equal(far_read(b, 0, buf, 100, 0), 0);
		for (int k = 0; k < 100; k++)
			wrong += buf[k] != 0;
		assert_in_range(wrong, 0, 1);
		wrong_reads += wrong;
	}
	assert_in_range(wrong_reads, 50, 150);
	far_close(b);
}

static void fault_late_has_done_the_work(void **state)
{
	struct far_backend *b;
	struct probe *p = probe_new(0, &b);

	b = wrap("fault:every=1,late", b);
	assert_int_equal(far_write(b, 0, "x", 1, 0), -EIO);
	assert_int_equal(far_flush(b), -EIO);
	assert_string_equal(p->log, "w0+1 f0+0 ");
	assert_int_equal(p->data[0], 'x');
	far_close(b);
	probe_free(p);
	b = NULL;
	p = probe_new(0, &b);
	b = wrap("fault:every=1", b);
	assert_int_equal(far_write(b, 0, "x", 1, 0), -EIO);
	assert_int_equal(p->calls, 0);
	far_close(b);
	probe_free(p);
}

/* Connected, then not, then connected again. */
static void fault_disconnects_and_comes_back(void **state)
{
	struct far_backend *b = wrap("fault:disconnect-every=20ms,disconnect-for=20ms", memory("mem:1M"));
	uint64_t until = far_now() + LIMIT;
	unsigned turns = 0, last = 0;

	while (turns < 4 && far_now() < until) {
		char buf[4];
		int r = far_read(b, 0, buf, 4, 0);
		assert_true(r == 0 || r == -ECONNRESET);
		turns += (unsigned)(r != 0) != last;
		last = r != 0;
	}
	assert_int_equal(turns, 4);
	far_close(b);
}

/* ------------------------------------------------------------------------------------------------------ retry */

/* Parts of a backend as one region: calls are cut at their edges, and whoever lent the backend keeps it. */
static void window_joins_parts(void **state)
{
	const struct far_extent part[] = { { .off = 4096, .len = 1000 }, { .off = 0, .len = 512 }, { .off = BYTES - 100, .len = 100 } };
	const struct far_extent one = { .off = 0, .len = BYTES };
	unsigned char got[1612], want[1612];
	struct far_backend *b, *w;
	struct far_extent x[4];
	struct probe *p = probe_new(0, &b);
	size_t n;
	int fd;

	for (unsigned k = 0; k < BYTES; k++)
		p->data[k] = (unsigned char)(k * 31 + (k >> 8));
	memcpy(want, p->data + 4096, 1000);
	memcpy(want + 1000, p->data, 512);
	memcpy(want + 1512, p->data + BYTES - 100, 100);
	assert_int_equal(far_window_new(b, false, part, 3, &w), 0);
	assert_int_equal(far_size(w), 1612);
	for (unsigned at = 0; at < 1612; at += 7)
		for (unsigned len = 1; at + len <= 1612; len += 331) {
			assert_int_equal(far_read(w, at, got, len, 0), 0);
			assert_memory_equal(got, want + at, len);
		}
	assert_int_equal(far_read(w, 1612, got, 1, 0), -EINVAL);
	p->log[0] = 0;
	memset(got, 5, sizeof got);
	assert_int_equal(far_write(w, 999, got, 514, 0), 0);
	assert_string_equal(p->log, "w5095+1 w0+512 w65436+1 ");
	p->log[0] = 0;
	assert_int_equal(far_discard(w, 0, 1001, 0), 0);
	assert_int_equal(far_zero(w, 1500, 20, 0), 0);
	assert_int_equal(far_flush(w), 0);
	assert_string_equal(p->log, "d4096+1000 d0+1 z500+12 z65436+8 f0+0 ");
	assert_int_equal(far_extents(w, 900, 500, x, 4, &n), 0);
	assert_int_equal(n, 1);
	assert_int_equal(x[0].off, 900);
	assert_int_equal(x[0].len, 100);
	assert_int_equal(far_share(w, &fd), -EOPNOTSUPP);
	assert_int_equal(far_record_write(w, got, 1), -EOPNOTSUPP);
	far_stop(w);
	far_close(w);
	assert_int_equal(p->stops + p->closes, 0);
	assert_int_equal(far_window_new(b, true, &one, 1, &w), 0);
	assert_int_equal(far_read(w, 1, got, 1, 0), 0);
	far_stop(w);
	far_close(w);
	probe_free(p);
}

static void retry_tries_again(void **state)
{
	struct far_backend *b = wrap("retry:backoff=10us,max-backoff=20us", wrap("fault:rate=0.5,seed=7", memory("mem:1M")));
	struct far_retry_stats st;

	for (int i = 0; i < 100; i++)
		for (const char *op = ops; *op; op++) {
			struct call c = { .b = b, .op = *op, .off = 100, .len = 1000 };
			assert_int_equal(call_do(&c), 0);
		}
	far_retry_stats(b, &st);
	assert_int_equal(st.gave_up, 0);
	assert_true(st.retries == st.failed && st.retries > 100);
	far_close(b);
}

/* Of a list that is tried again which has failed, and no more. */
static void retry_tries_what_failed_of_a_list(void **state)
{
	struct far_backend *b = wrap("retry:backoff=10us,max-backoff=20us", wrap("fault:every=3", memory("mem:1M")));
	struct far_retry_stats st;
	char buf[5][100];
	struct far_io io[5];

	for (size_t i = 0; i < 5; i++)
		io[i] = (struct far_io){ .off = i * 1000, .buf = buf[i], .len = sizeof buf[i] };
	memset(buf, 7, sizeof buf);
	assert_int_equal(far_write_many(b, io, 5, 0), 0); /* calls 1 to 5 and 6, which fails, too, and 7 */
	far_retry_stats(b, &st);
	assert_true(st.failed == 2 && st.retries == 2 && st.gave_up == 0);
	memset(buf, 0, sizeof buf);
	assert_int_equal(far_read_many(b, io, 5, 0), 0);
	for (size_t i = 0; i < 5; i++)
		assert_true(io[i].result == 0 && buf[i][99] == 7);
	far_close(b);
	b = wrap("retry:tries=2,backoff=1us", wrap("fault:every=1", memory("mem:1M")));
	assert_int_equal(far_read_many(b, io, 5, 0), -EIO);
	assert_true(io[4].result == -EIO);
	far_close(b);
}

static void retry_gives_up(void **state)
{
	static const struct {
		const char *fault, *retry;
		int want;
		uint64_t failed, retries;
	} cases[] = {
		{ "fault:every=1", "retry:tries=1", -EIO, 1, 0 },
		{ "fault:every=1", "retry:tries=4,backoff=1us,max-backoff=1us", -EIO, 4, 3 },
		{ "fault:every=1,errno=ECONNREFUSED", "retry:tries=2,backoff=1us", -ECONNREFUSED, 2, 1 },
		{ "fault:every=1", "retry:budget=5,backoff=1us,max-backoff=1us", -EIO, 6, 5 },
		{ "fault:every=1,errno=ENOSPC", "retry:tries=4", -ENOSPC, 0, 0 },
		{ "fault:every=1,errno=EPROTO", "retry", -EPROTO, 0, 0 },
		{ "fault:every=1,errno=ESTALE", "retry", -ESTALE, 0, 0 },
		{ "fault:nth=1", "retry:backoff=1us", 0, 1, 1 },
		{ "fault:every=1", "retry:eio-tries=2,backoff=1us", -EIO, 1, 1 },
		{ "fault:every=1,errno=ECONNRESET", "retry:eio-tries=1,tries=3,backoff=1us", -ECONNRESET, 3, 2 },
	};

	for (size_t i = 0; i < FAR_ARRAY_LEN(cases); i++) {
		struct far_backend *b = wrap(cases[i].retry, wrap(cases[i].fault, memory("mem:1M")));
		struct far_retry_stats st;
		char buf[4];
		assert_int_equal(far_read(b, 0, buf, 4, 0), cases[i].want);
		far_retry_stats(b, &st);
		assert_int_equal(st.failed, cases[i].failed);
		assert_int_equal(st.retries, cases[i].retries);
		far_close(b);
	}
}

/* Its own deadline holds for the call below too, and is gone afterwards. */
static void retry_has_a_deadline(void **state)
{
	struct far_backend *b;
	struct probe *p = probe_new(0, &b);
	char buf[4];

	b = wrap("retry:deadline=5ms", b);
	probe_hold(p, true);
	assert_int_equal(far_read(b, 0, buf, 4, 0), -ETIMEDOUT);
	assert_true(far_deadline() == FAR_NEVER);
	probe_hold(p, false);
	assert_int_equal(far_read(b, 0, buf, 4, 0), 0);
	far_close(b);
	probe_free(p);
	/* a passing disconnect is waited out */
	b = wrap("retry:backoff=1ms", wrap("fault:disconnect-every=5ms,disconnect-for=5ms", memory("mem:1M")));
	for (uint64_t until = far_now() + 50 * FAR_MSEC; far_now() < until;)
		assert_int_equal(far_read(b, 0, buf, 4, 0), 0);
	far_close(b);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(stop_reaches_the_bottom),
		cmocka_unit_test(waits_end_by_stop),
		cmocka_unit_test(waits_end_by_deadline),
		cmocka_unit_test(waits_are_refused_with_nowait),
		cmocka_unit_test(share_does_not_go_round_a_layer),
		cmocka_unit_test(each_refusal_has_its_sentence),
		cmocka_unit_test(chunked_takes_any_range),
		cmocka_unit_test(chunked_passes_whole_chunks_through),
		cmocka_unit_test(chunked_has_a_short_tail_W_A10),
		cmocka_unit_test(chunked_writes_take_turns_W_A14),
		cmocka_unit_test(strict_refuses_what_is_no_chunk),
		cmocka_unit_test(tracked_lists_what_was_written),
		cmocka_unit_test(tracked_loses_none_of_many_writers),
		cmocka_unit_test(gated_lets_calls_wait),
		cmocka_unit_test(gated_close_drains_W_B18),
		cmocka_unit_test(gated_opens_by_itself),
		cmocka_unit_test(delay_waits_a_round_trip),
		cmocka_unit_test(delay_shares_only_the_pipe),
		cmocka_unit_test(delay_waits_once_for_a_list),
		cmocka_unit_test(delay_gives_up_before_the_write),
		cmocka_unit_test(fault_picks_calls),
		cmocka_unit_test(fault_gives_the_error_it_was_told),
		cmocka_unit_test(fault_rate_replays),
		cmocka_unit_test(fault_corrupts_one_byte),
		cmocka_unit_test(fault_late_has_done_the_work),
		cmocka_unit_test(fault_disconnects_and_comes_back),
		cmocka_unit_test(retry_tries_again),
		cmocka_unit_test(window_joins_parts),
		cmocka_unit_test(retry_tries_what_failed_of_a_list),
		cmocka_unit_test(retry_gives_up),
		cmocka_unit_test(retry_has_a_deadline),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
