/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The recorder itself, on a file: backend whose every state is known. */
#define _GNU_SOURCE
#include "record.h"
#include "rig.h"

#include <unistd.h>

#define BYTES 65536u
#define SECTORS (BYTES / RECORD_SECTOR)
#define STEPS 300

static char path[64];

/* The file after each step, and the steps that were flushes. */
static unsigned char state[STEPS + 1][BYTES];
static bool flushed[STEPS + 1];

static void act(struct far_backend *b, unsigned step, uint64_t *random)
{
	unsigned char *now = state[step];
	uint64_t off = record_random(random) % BYTES, len = 1 + record_random(random) % 6000;

	memcpy(now, state[step - 1], BYTES);
	len = far_min(len, BYTES - off);
	switch (record_random(random) % 8) {
	case 0:
		assert_int_equal(far_flush(b), 0);
		flushed[step] = true;
		break;
	case 1:
		assert_int_equal(far_discard(b, off, len, 0), 0);
		memset(now + off, 0, len);
		break;
	default:
		rig_fill(now + off, off, len, step);
		assert_int_equal(far_write(b, off, now + off, len, 0), 0);
	}
}

static void load(unsigned char *to)
{
	FILE *f = fopen(path, "r");
	memset(to, 0, BYTES);
	assert_non_null(f);
	if (fread(to, 1, BYTES, f) != BYTES)
		assert_true(feof(f));
	fclose(f);
}

/* Each sector is as it was after some step from `from` to `to`. */
static void check(const unsigned char *file, unsigned from, unsigned to, unsigned *torn)
{
	for (unsigned s = 0; s < SECTORS; s++) {
		unsigned k = from;
		while (k <= to && memcmp(file + s * RECORD_SECTOR, state[k] + s * RECORD_SECTOR, RECORD_SECTOR))
			k++;
		if (k > to)
			fail_msg("sector %u was never so in steps %u to %u", s, from, to);
		*torn += k > from && k < to;
	}
}

static void every_state_was_there_once(void **opaque)
{
	static unsigned char found[BYTES];
	struct record r = { .path = { path } };
	struct record_cut c;
	struct far_backend *b;
	uint64_t seed = 4711, random = seed;
	unsigned step = 0, last = 0, torn = 0, cuts = 0;
	const struct record_entry *e;
	char uri[100];

	print_message("seed %llu\n", (unsigned long long)seed);
	snprintf(uri, sizeof uri, "file:%s?size=64K", path);
	record_start(&r, NULL, NULL);
	assert_int_equal(far_open(uri, NULL, &b, NULL), 0);
	assert_int_equal(far_flush(b), 0);
	for (unsigned k = 1; k <= STEPS; k++) {
		record_note(&r, k);
		act(b, k, &random);
	}
	record_stop(&r);
	load(found);
	assert_memory_equal(found, state[STEPS], BYTES);

	record_cut_begin(&c, &r);
	while ((e = record_cut_step(&c))) {
		if (e->kind == RECORD_NOTE)
			step = (unsigned)e->off;
		if (e->kind == RECORD_SYNC)
			last = step;
		if (e->kind == RECORD_NOTE || step == 0)
			continue;
		for (enum record_how how = RECORD_NONE; how < RECORD_HOWS; how++) {
			record_cut_choose(&c, 0, how, &random);
			record_cut_store(&c, 0, path);
			load(found);
			check(found, how == RECORD_ALL ? step : last, how == RECORD_NONE ? last : step, &torn);
			cuts++;
		}
		assert_true(!record_cut_certain(&c, 0) || last == step);
	}
	record_cut_choose(&c, 0, RECORD_ALL, &random);
	record_cut_store(&c, 0, path);
	load(found);
	assert_memory_equal(found, state[STEPS], BYTES);
	print_message("%u cuts, %u sectors as they were in between\n", cuts, torn);
	assert_true(cuts > STEPS && torn > 1000);
	record_cut_end(&c);
	record_free(&r);
	far_close(b);
}

/* What the walk must see: a file system that loses what a sync promised. Here: the sync is left out of the record. */
static void a_lost_sync_is_noticed(void **opaque)
{
	struct record r = { .path = { path } };
	static const unsigned char base[BYTES];
	unsigned char found[BYTES];
	struct record_cut c;
	uint64_t random = 1;

	r.base[0] = base;
	r.base_n[0] = BYTES;
	record_start(&r, NULL, NULL);
	record_wrote(&r, 0, 100, "hello", 5);
	record_stop(&r);
	record_cut_begin(&c, &r);
	record_cut_step(&c);
	record_cut_choose(&c, 0, RECORD_NONE, &random);
	record_cut_copy(&c, 0, found, BYTES);
	assert_memory_equal(found, base, BYTES);
	record_cut_choose(&c, 0, RECORD_ALL, &random);
	record_cut_copy(&c, 0, found, BYTES);
	assert_memory_equal(found + 100, "hello", 5);
	record_cut_end(&c);
	record_free(&r);
}

static int setup(void **opaque)
{
	strcpy(path, "/tmp/farpage-record-XXXXXX");
	int fd = mkstemp(path);
	return fd < 0 || close(fd) || unlink(path);
}

static int teardown(void **opaque)
{
	return unlink(path);
}

int main(void)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(every_state_was_there_once), cmocka_unit_test(a_lost_sync_is_noticed) };
	return cmocka_run_group_tests(tests, setup, teardown);
}
