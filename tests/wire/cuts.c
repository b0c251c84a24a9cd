/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A proxy between the real client and the real server does one bad thing to one message: for every message of a short
 * exchange, and every bad thing. Whatever was acknowledged is on the server in the end, every read gives what was
 * acknowledged last, every call ends by its deadline, and with the retry layer no call fails.
 *
 * cuts [direct] [read-only] [managed] [plain]: which clients; direct and plain without arguments. With them each message
 * has many single bits flipped. plain: a peer without sessions and checksums, so no bits are flipped, and what has landed
 * late is put right by the next flush. FAR_SEED and FAR_ONLY=FAULT,MESSAGE repeat one scene.
 */
#define _GNU_SOURCE
#include "peer.h"
#include "proxy.h"

#include "region/region.h"
#include "wire/server.h"

#include <signal.h>
#include <unistd.h>

#define SIZE 65536
#define PAGE 4096
#define THREADS 16
#define CALL (12 * FAR_SEC) /* a call's deadline */
#define SLACK (4 * FAR_SEC) /* of a loaded machine */

enum mode { DIRECT, READ_ONLY, MANAGED, PLAIN, MODES };
static const char *const mode_names[MODES] = { "direct", "read-only", "managed", "plain" };

struct scene {
	enum mode mode;
	enum proxy_fault fault;
	unsigned at, seed;
	struct proxy proxy;
	struct far_server *server;
	struct far_backend *store, *far;
	struct far_region *region;
	uint8_t want[SIZE];
	uint32_t rng;
	unsigned messages;
	bool done;
	char fail[300];
};

static void scene_fail(struct scene *s, const char *what, int r)
{
	if (!s->fail[0])
		snprintf(s->fail, sizeof s->fail, "%s, %s at message %u, seed %u: %s: %s", mode_names[s->mode],
			 proxy_names[s->fault], s->at, s->seed, what, far_strerror(r));
}

/* Make a call under a deadline; one that must not fail. */
#define CALL_OK(s, what, call)                                                                                         \
	do {                                                                                                           \
		if ((s)->fail[0])                                                                                      \
			break;                                                                                         \
		uint64_t began_ = far_now(), old_ = far_deadline_limit(began_ + CALL);                                 \
		int r_ = (call);                                                                                       \
		far_deadline_restore(old_);                                                                            \
		if (far_now() - began_ > CALL + SLACK)                                                                 \
			scene_fail(s, what " outlived its deadline", -ETIMEDOUT);                                      \
		else if (r_)                                                                                           \
			scene_fail(s, what, r_);                                                                       \
	} while (0)

/* Again while the error is a passing one, for calls that the retry layer does not know. */
#define AGAIN(call)                                                                                                    \
	({                                                                                                             \
		int again_;                                                                                            \
		do                                                                                                     \
			again_ = (call);                                                                               \
		while (again_ && again_ != -ESHUTDOWN && far_now() + 10 * FAR_MSEC < far_deadline() &&                 \
		       (far_sleep_until(far_now() + 5 * FAR_MSEC, false), true));                                      \
		again_;                                                                                                \
	})

static void scene_write(struct scene *s, uint64_t off, size_t len)
{
	uint8_t *p = s->want + off;

	for (size_t i = 0; i < len; i++)
		p[i] = (uint8_t)((s->rng = s->rng * 1664525 + 1013904223) >> 24);
	CALL_OK(s, "write", far_write(s->far, off, p, len, 0));
}

static void scene_read(struct scene *s, uint64_t off, size_t len, unsigned flags)
{
	uint8_t *buf = calloc(1, len);

	CALL_OK(s, "read", far_read(s->far, off, buf, len, flags));
	if (!s->fail[0] && memcmp(buf, s->want + off, len))
		scene_fail(s, "a read gave something else than was written", -EBADMSG);
	free(buf);
}

/* Three at once, one page each. */
static void scene_list(struct scene *s, bool write, uint64_t off)
{
	uint8_t *buf = calloc(3, PAGE);
	struct far_io io[3];

	for (size_t i = 0; i < 3; i++) {
		uint64_t at = off + 2 * i * PAGE;
		if (write)
			memset(s->want + at, (int)(s->rng >> 8) + (int)i, PAGE);
		io[i] = (struct far_io){ .off = at, .len = PAGE, .buf = write ? s->want + at : buf + i * PAGE };
	}
	CALL_OK(s, "list", write ? far_write_many(s->far, io, 3, 0) : far_read_many(s->far, io, 3, 0));
	for (size_t i = 0; i < 3 && !s->fail[0]; i++)
		if (memcmp(io[i].buf, s->want + io[i].off, PAGE))
			scene_fail(s, "a list of reads gave something else than was written", -EBADMSG);
	free(buf);
}

static int scene_open(struct scene *s)
{
	struct far_open_opts o = FAR_OPEN_OPTS_INIT;
	struct far_backend *b;
	struct far_error err;
	char uri[100];

	o.deadline_ms = 2000;
	o.read_only = s->mode == READ_ONLY;
	o.demand_connections = o.bulk_connections = 1;
	snprintf(uri, sizeof uri, "grpc://127.0.0.1:%d?silence=350ms&timeout=3s%s", s->proxy.port,
		 s->mode == PLAIN ? "&size=64K" : "");
	int r = far_open(uri, &o, &b, &err);
	if (r)
		return r;
	r = far_layer_open("retry:deadline=12s,backoff=5ms,max-backoff=50ms", b, &s->far, &err);
	if (r)
		far_close(b);
	return r;
}

static int scene_lease(struct scene *s, bool release)
{
	struct far_lease l = FAR_LEASE_INIT;

	l.writer = "cuts";
	l.release = release;
	int r = far_lease(s->far, &l);
	return r == -EOPNOTSUPP ? 0 : r;
}

/* What was written since `then` is among what Watch tells. */
static int scene_watch(struct scene *s, const struct far_origin *then, uint64_t off, uint64_t len)
{
	struct far_extent x[64];
	struct far_origin now = FAR_ORIGIN_INIT;
	bool all;
	size_t n;
	int r = far_watch(s->far, then->instance, then->change, x, FAR_ARRAY_LEN(x), &n, &all, &now);

	if (r || all)
		return r == -EOPNOTSUPP ? 0 : r;
	for (size_t i = 0; i < n; i++)
		if (x[i].off <= off && off + len <= x[i].off + x[i].len)
			return 0;
	scene_fail(s, "Watch does not tell of a change", -EBADMSG);
	return 0;
}

static void scene_writer(struct scene *s)
{
	struct far_origin then = FAR_ORIGIN_INIT;
	struct far_extent x[16];
	size_t n;

	CALL_OK(s, "lease", AGAIN(scene_lease(s, false)));
	scene_read(s, 0, PAGE, 0);
	CALL_OK(s, "origin", AGAIN(far_origin(s->far, &then, 0)));
	scene_write(s, 0, PAGE);
	scene_write(s, PAGE + 100, 3 * PAGE);
	CALL_OK(s, "watch", AGAIN(scene_watch(s, &then, 0, PAGE)));
	memset(s->want + 2 * PAGE, 0, PAGE);
	CALL_OK(s, "zero", far_zero(s->far, 2 * PAGE, PAGE, 0));
	CALL_OK(s, "flush", far_flush(s->far));
	scene_write(s, 0, PAGE);
	scene_list(s, true, 0);
	scene_list(s, false, PAGE);
	scene_read(s, 0, SIZE, FAR_BULK);
	CALL_OK(s, "extents", far_extents(s->far, 0, SIZE, x, FAR_ARRAY_LEN(x), &n));
	CALL_OK(s, "flush", far_flush(s->far));
	scene_read(s, PAGE, 2 * PAGE, 0);
	CALL_OK(s, "release", AGAIN(scene_lease(s, true)));
}

/* Somebody else changes what is read. */
static void scene_reader(struct scene *s)
{
	struct far_origin then = FAR_ORIGIN_INIT;

	scene_read(s, 0, SIZE, 0);
	CALL_OK(s, "origin", AGAIN(far_origin(s->far, &then, 0)));
	for (int i = 0; i < 3 && !s->fail[0]; i++) {
		memset(s->want + i * PAGE, 0x30 + i, PAGE);
		far_write(s->store, (uint64_t)i * PAGE, s->want + i * PAGE, PAGE, 0);
		scene_read(s, 0, 4 * PAGE, i & 1 ? FAR_BULK : 0);
	}
}

static int scene_manage(struct scene *s)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_region_conf conf = { .remote = s->far, .opts = &o };
	struct far_error err;
	char uri[32];

	o.chunk = PAGE;
	o.push_interval_ms = 20;
	o.deadline_ms = (uint32_t)(CALL / FAR_MSEC);
	snprintf(uri, sizeof uri, "mem:%d", SIZE);
	int r = far_open(uri, NULL, &conf.local, &err);
	if (r == 0)
		r = far_region_open(&conf, &s->region, &err);
	if (r)
		return r;
	s->far = far_region_backend(s->region);
	return 0;
}

static void scene_managed(struct scene *s)
{
	int r = scene_manage(s);

	if (r) {
		scene_fail(s, "region", r);
		return;
	}
	scene_write(s, 100, 200);
	scene_read(s, 0, SIZE / 2, 0);
	for (int i = 0; i < 4; i++)
		scene_write(s, (uint64_t)i * 3 * PAGE, 2 * PAGE);
	CALL_OK(s, "flush", far_flush(s->far));
	CALL_OK(s, "evict", far_region_evict(s->region, 0, SIZE));
	scene_write(s, 5 * PAGE, PAGE / 2);
	scene_read(s, 0, SIZE, 0);
	CALL_OK(s, "flush", far_flush(s->far));
}

/* Three acknowledged writes over everything that was written, then what was held back comes. */
static void scene_after_hold(struct scene *s)
{
	for (int i = 0; i < 3 && s->mode != READ_ONLY; i++) {
		scene_write(s, 0, 5 * PAGE);
		CALL_OK(s, "flush", far_flush(s->far));
	}
	if (!proxy_release(&s->proxy))
		scene_fail(s, "what was held back did not reach the server", -ETIMEDOUT);
}

static void scene_compare(struct scene *s)
{
	uint8_t *buf = malloc(SIZE);
	int r = far_read(s->store, 0, buf, SIZE, 0);

	for (size_t i = 0; !r && !s->fail[0] && i < SIZE; i++)
		if (buf[i] != s->want[i]) {
			char text[60];
			snprintf(text, sizeof text, "the server has something else at %zu", i);
			scene_fail(s, text, -EBADMSG);
		}
	free(buf);
}

static void scene_play(struct scene *s)
{
	char *bound = NULL, uri[32];

	s->rng = s->seed;
	snprintf(uri, sizeof uri, "mem:%d", SIZE);
	int r = far_open(uri, NULL, &s->store, NULL) || far_server_new(NULL, &s->server, NULL);
	if (!r && s->mode == PLAIN)
		far_server_plain(s->server);
	if (r || far_server_export(s->server, "disk", s->store, NULL) ||
	    far_server_listen(s->server, "grpc://127.0.0.1:0", &bound, NULL) ||
	    !proxy_start(&s->proxy, atoi(strrchr(bound, ':') + 1))) {
		scene_fail(s, "set-up", -EIO);
		return;
	}
	free(bound);
	memset(s->want, 7, SIZE / 2);
	far_write(s->store, 0, s->want, SIZE, 0);
	proxy_set(&s->proxy, s->fault, s->at, s->seed);
	CALL_OK(s, "open", AGAIN(scene_open(s)));
	if (!s->fail[0])
		(s->mode == READ_ONLY ? scene_reader : s->mode == MANAGED ? scene_managed : scene_writer)(s);
	s->messages = proxy_messages(&s->proxy, &s->done);
	if (s->fault == PROXY_HOLD && s->done && !s->fail[0])
		scene_after_hold(s);
	if (s->mode == PLAIN)
		CALL_OK(s, "flush", far_flush(s->far));
	scene_compare(s);
	if (s->region)
		far_region_close(s->region);
	else
		far_close(s->far);
	proxy_stop(&s->proxy);
	far_server_stop(s->server);
	far_server_free(s->server);
	far_close(s->store);
}

/* ------------------------------------------------------------------------------------------- all of them */

struct theatre {
	struct far_mutex lock;
	enum mode mode;
	unsigned at, messages, seed, played, hit, flips, flip;
	enum proxy_fault fault;
	char fail[300];
};

static void *theatre_run(void *arg)
{
	struct theatre *t = arg;
	struct scene *s = calloc(1, sizeof *s);

	far_mutex_lock(&t->lock);
	while (!t->fail[0] && t->at < t->messages) {
		memset(s, 0, sizeof *s);
		s->mode = t->mode;
		s->fault = t->fault;
		s->at = t->at;
		s->seed = t->seed = t->seed * 1664525 + 1013904223;
		if (t->fault == PROXY_FLIP && ++t->flip < t->flips)
			;
		else if (++t->fault == PROXY_FLIP && t->mode == PLAIN)
			t->fault++;
		else if (t->fault == PROXY_FAULTS) {
			t->flip = 0;
			t->fault = PROXY_CUT;
			t->at++;
		}
		far_mutex_unlock(&t->lock);
		scene_play(s);
		far_mutex_lock(&t->lock);
		t->played++;
		t->hit += s->done;
		if (s->fail[0] && !t->fail[0])
			memcpy(t->fail, s->fail, sizeof t->fail);
	}
	far_mutex_unlock(&t->lock);
	free(s);
	return NULL;
}

static unsigned play_flips = 1;

static void play_all(enum mode mode)
{
	struct theatre t = { .mode = mode, .fault = PROXY_CUT, .flips = play_flips };
	struct far_thread threads[THREADS];
	struct scene *plain = calloc(1, sizeof *plain);
	const char *seed = getenv("FAR_SEED"), *only = getenv("FAR_ONLY");
	unsigned fault = 0;

	t.seed = seed ? (unsigned)strtoul(seed, NULL, 0) : (unsigned)(far_now() ^ (uint64_t)getpid() << 16);
	plain->mode = mode;
	plain->seed = t.seed;
	if (only && sscanf(only, "%u,%u", &fault, &plain->at) == 2) {
		plain->fault = fault;
		scene_play(plain);
		print_message("%u messages, hit: %d\n", plain->messages, plain->done);
		if (plain->fail[0])
			fail_msg("%s", plain->fail);
		free(plain);
		return;
	}
	scene_play(plain);
	if (plain->fail[0])
		fail_msg("%s", plain->fail);
	t.messages = plain->messages;
	free(plain);
	print_message("FAR_SEED=%u %s: %u messages\n", t.seed, mode_names[mode], t.messages);
	assert_true(t.messages > 20);
	far_mutex_init(&t.lock);
	for (int i = 0; i < THREADS; i++)
		assert_int_equal(far_thread_start(&threads[i], "scene", theatre_run, &t), 0);
	for (int i = 0; i < THREADS; i++)
		far_thread_join(&threads[i]);
	print_message("%u scenes, in %u of them something bad was done\n", t.played, t.hit);
	if (t.fail[0])
		fail_msg("%s", t.fail);
	assert_true(t.hit > t.played / 2);
}

static void test_direct(void **state)
{
	play_all(DIRECT);
}

static void test_read_only(void **state)
{
	play_all(READ_ONLY);
}

static void test_managed(void **state)
{
	play_all(MANAGED);
}

static void test_plain(void **state)
{
	play_all(PLAIN);
}

int main(int argc, char **argv)
{
	struct CMUnitTest tests[MODES], all[MODES] = { cmocka_unit_test(test_direct), cmocka_unit_test(test_read_only),
						       cmocka_unit_test(test_managed), cmocka_unit_test(test_plain) };
	size_t n = 0;

	signal(SIGPIPE, SIG_IGN);
	far_log_set_level(getenv("FAR_DEBUG") ? FAR_LOG_DEBUG : FAR_LOG_ERROR);
	for (int m = 0; m < MODES; m++)
		for (int i = 1; i < argc; i++)
			if (!strcmp(argv[i], mode_names[m])) {
				tests[n++] = all[m];
				break;
			}
	if (n) {
		play_flips = 24;
	} else {
		tests[n++] = all[DIRECT];
		tests[n++] = all[PLAIN];
	}
	return _cmocka_run_group_tests("cuts", tests, n, NULL, NULL);
}
