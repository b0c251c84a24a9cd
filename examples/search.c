/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A sorted array of 10^8 records, 1.6 GB, that is 40 ms away, searched as if it were memory here.
 *
 * The array is made up as it is read and put behind a delay, so the example needs no second host; with a URI in place of
 * both, nothing else changes. It is searched four times by an ordinary binary search:
 *
 *   first start    a touch of what is not here costs a round trip; the order of touches is recorded
 *   second start   the recorded order is pulled ahead of the program
 *   64 threads     each with searches of its own: their round trips overlap
 *   again          all that is touched is here
 *
 * Usage: search [ROUND-TRIP-MS [SEARCHES [RECORDS]]]
 */
#include <farpage.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct record {
	uint64_t key, value;
};

static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 31) * 0x9e3779b97f4a7c15;
	return x ^ x >> 29;
}

static struct record record_at(uint64_t i)
{
	return (struct record){ .key = i * 64 + mix(i) % 64, .value = mix(i + 1) };
}

/* ------------------------------------------------------------------------------- the array, somewhere else */

static int array_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	char *to = buf;

	for (size_t n; len; off += n, to += n, len -= n) {
		struct record r = record_at(off / sizeof r);
		size_t at = off % sizeof r;
		n = sizeof r - at < len ? sizeof r - at : len;
		memcpy(to, (char *)&r + at, n);
	}
	return 0;
}

static int array_flush(void *self)
{
	return 0;
}

static struct far_backend *array_open(uint64_t records, unsigned rtt_ms)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = array_read, .flush = array_flush };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_backend *b;
	struct far_error err;
	char delay[40];

	facts.bytes = records * sizeof(struct record);
	facts.caps = FAR_CAP_REMOTE;
	snprintf(delay, sizeof delay, "delay:rtt=%ums", rtt_ms);
	if (far_backend_new(&ops, NULL, &facts, &b) || far_layer_open(delay, b, &b, &err)) {
		fprintf(stderr, "search: no backend\n");
		exit(1);
	}
	return b;
}

/* -------------------------------------------------------------------------------------------- searching */

struct search {
	const struct record *array;
	uint64_t records, seed, wrong;
	unsigned n;
	pthread_t thread;
};

static const struct record *find(const struct record *array, uint64_t n, uint64_t key)
{
	uint64_t low = 0, high = n;

	while (low < high) {
		uint64_t middle = low + (high - low) / 2;
		if (array[middle].key == key)
			return &array[middle];
		if (array[middle].key < key)
			low = middle + 1;
		else
			high = middle;
	}
	return NULL;
}

static void *search_run(void *arg)
{
	struct search *s = arg;

	for (unsigned k = 0; k < s->n; k++) {
		uint64_t i = mix(s->seed + k) % s->records;
		const struct record *r = find(s->array, s->records, record_at(i).key);
		s->wrong += !r || r != s->array + i || r->value != record_at(i).value;
	}
	return NULL;
}

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

#define THREADS 64

/* n searches, in one thread or many, and what they cost. Returns how many went wrong. */
static uint64_t report(const char *name, struct far_mount *m, uint64_t records, unsigned n, unsigned threads, uint64_t seed,
		       double began)
{
	static const char *const words[] = { "auto", "share", "move", "continue", "copy", "sigsegv" };
	struct far_status before = FAR_STATUS_INIT, after = FAR_STATUS_INIT;
	struct search s[THREADS];
	uint64_t wrong = 0;

	far_mount_status(m, &before);
	for (unsigned k = 0; k < threads; k++) {
		s[k] = (struct search){ .array = far_addr(m), .records = records, .seed = seed + k * 1000003, .n = n };
		if (threads == 1)
			search_run(&s[k]);
		else if (pthread_create(&s[k].thread, NULL, search_run, &s[k]))
			exit(1);
	}
	for (unsigned k = 0; k < threads; k++) {
		if (threads > 1)
			pthread_join(s[k].thread, NULL);
		wrong += s[k].wrong;
	}
	double took = seconds() - began;
	far_mount_status(m, &after);
	printf("%-13s %6u searches in %8.3f s, %9.3f ms each, waited for %5llu fetches (%s)\n", name, n * threads, took,
	       took * 1e3 / (n * threads), (unsigned long long)(after.demand_reads - before.demand_reads),
	       words[after.mechanism]);
	return wrong;
}

static struct far_mount *array_map(uint64_t records, unsigned rtt, const char *order, const char *record)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_backend *b = array_open(records, rtt);
	struct far_mount *m;
	struct far_error err;

	o.read_only = true;
	o.mode = FAR_MODE_MANAGED;
	o.order = order;
	o.record_order = record;
	o.pull_workers = order ? -1 : 0; /* else: fetch only what is touched */
	o.local_max = 256 << 20;         /* of the 1.6 GB; a search touches little */
	if (far_map(b, &o, &m, &err)) {
		fprintf(stderr, "search: %s\n", err.text);
		exit(1);
	}
	return m;
}

int main(int argc, char **argv)
{
	unsigned rtt = argc > 1 ? (unsigned)atoi(argv[1]) : 40, n = argc > 2 ? (unsigned)atoi(argv[2]) : 30;
	uint64_t records = argc > 3 ? strtoull(argv[3], NULL, 0) : 100000000, wrong = 0;
	char trace[] = "/tmp/farpage-search-XXXXXX", order[64];

	if (!records || !n)
		return 2;
	close(mkstemp(trace));
	snprintf(order, sizeof order, "trace:%s", trace);
	printf("%llu records, a round trip of %u ms\n", (unsigned long long)records, rtt);

	double began = seconds();
	struct far_mount *m = array_map(records, rtt, NULL, trace);
	wrong += report("first start", m, records, n, 1, 1, began);
	far_mount_close(m);
	double first = seconds() - began;

	began = seconds();
	m = array_map(records, rtt, order, NULL);
	wrong += report("second start", m, records, n, 1, 1, began);
	printf("%-13s %.1f times as fast\n", "", first / (seconds() - began));
	wrong += report("again", m, records, n, 1, 1, seconds());
	far_mount_close(m);

	m = array_map(records, rtt, NULL, NULL);
	wrong += report("64 threads", m, records, n, THREADS, 7, seconds());
	far_mount_close(m);
	unlink(trace);
	printf(wrong ? "%llu results are wrong\n" : "all results are right\n", (unsigned long long)wrong);
	return wrong != 0;
}
