/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 *     fuse_mix [ROUNDS [SEED [PATH]]]
 *
 * One thread stores through a mapping, one writes with pwrite into other bytes of the same pages, and one looks, drops
 * pages from the cache and syncs; underneath, a region pulls from a slow remote, pushes and (every other time) evicts. No
 * look may find less than what was written before it began (stale), nor more than was written when it ended; in the end
 * every last byte is in the file and, after fsync, on the remote (lost). A round is one store of each writer. With PATH the
 * file is somebody else's mount, and the remote is not looked at.
 */
#define _GNU_SOURCE
#include "fuse_serve.h"

#include "base/thread.h"

#include <sched.h>

#define BYTES ((uint64_t)4 << 20)
#define PAGE 4096
#define SLOTS_A_PAGE 8 /* even ones belong to the mapping, odd ones to pwrite */
#define SLOT_STEP (PAGE / SLOTS_A_PAGE)
#define EPOCH 1000 /* rounds on one mount */

struct mix {
	uint64_t bytes, slots, seed;
	unsigned rounds;
	int fd, direct;
	char *map;
	_Atomic uint32_t *started, *done; /* a slot's last version */
	_Atomic unsigned writers;         /* at work */
	_Atomic uint64_t wrong;           /* looks that found what they must not */
};

static uint64_t mix_rnd(uint64_t *x)
{
	*x ^= *x << 13;
	*x ^= *x >> 7;
	*x ^= *x << 17;
	return *x * 0x2545F4914F6CDD1Dull;
}

/* Some way into the page, so that slots of both writers share cache lines and none is aligned to a sector. */
static uint64_t mix_off(uint64_t slot)
{
	uint64_t page = slot / SLOTS_A_PAGE, i = slot % SLOTS_A_PAGE;
	return page * PAGE + i / 2 * 2 * SLOT_STEP + 104 + (i % 2) * 8;
}

static uint64_t mix_value(uint64_t slot, uint32_t version)
{
	return version ? slot << 32 | version : 0;
}

static void mix_write(struct mix *m, bool mapped, uint64_t slot)
{
	uint32_t v = atomic_load(&m->started[slot]) + 1;
	uint64_t value = mix_value(slot, v);

	atomic_store(&m->started[slot], v);
	if (mapped)
		__atomic_store_n((uint64_t *)(m->map + mix_off(slot)), value, __ATOMIC_SEQ_CST);
	else if (pwrite(m->fd, &value, 8, (off_t)mix_off(slot)) != 8)
		atomic_fetch_add(&m->wrong, 1);
	atomic_store(&m->done[slot], v);
}

static void *mix_mapped(void *arg)
{
	struct mix *m = arg;
	uint64_t x = m->seed * 2 + 1;

	for (unsigned i = 0; i < m->rounds; i++) {
		mix_write(m, true, mix_rnd(&x) % (m->slots / 2) * 2);
		if (i % 16 == 0)
			sched_yield();
	}
	atomic_fetch_sub(&m->writers, 1);
	return NULL;
}

static void *mix_pwrite(void *arg)
{
	struct mix *m = arg;
	uint64_t x = m->seed * 2 + 3;

	for (unsigned i = 0; i < m->rounds; i++)
		mix_write(m, false, mix_rnd(&x) % (m->slots / 2) * 2 + 1);
	atomic_fetch_sub(&m->writers, 1);
	return NULL;
}

static void mix_judge(struct mix *m, uint64_t slot, uint64_t got, uint32_t least, const char *how)
{
	uint32_t most = atomic_load(&m->started[slot]), v = (uint32_t)got;

	if (got == mix_value(slot, v) && v >= least && v <= most)
		return;
	printf("fuse_mix: seed %" PRIu64 ": slot %" PRIu64 " at %" PRIu64 " by %s: %" PRIx64
	       ", versions %u to %u are right\n", m->seed, slot, mix_off(slot), how, got, least, most);
	atomic_fetch_add(&m->wrong, 1);
}

static void mix_look(struct mix *m, uint64_t *x)
{
	uint64_t slot = mix_rnd(x) % m->slots, got = 0, off = mix_off(slot);
	uint32_t least = atomic_load(&m->done[slot]);
	const char *how = "mapping";

	if (mix_rnd(x) % 2) {
		how = "pread";
		if (pread(m->fd, &got, 8, (off_t)off) != 8)
			how = "pread, which failed";
	} else {
		got = __atomic_load_n((uint64_t *)(m->map + off), __ATOMIC_SEQ_CST);
	}
	mix_judge(m, slot, got, least, how);
}

/* Force pages out, so that the next look fetches them again. */
static void mix_disturb(struct mix *m, uint64_t *x)
{
	uint64_t off = mix_rnd(x) % m->bytes / PAGE * PAGE, len = far_min(m->bytes - off, (1 + mix_rnd(x) % 64) * PAGE);

	switch (mix_rnd(x) % 8) {
	case 0:
		if (msync(m->map + off, len, MS_SYNC))
			atomic_fetch_add(&m->wrong, 1);
		break;
	case 1:
		if (mix_rnd(x) % 8 == 0 && fsync(m->fd))
			atomic_fetch_add(&m->wrong, 1);
		break;
	case 2:
	case 3:
		sync_file_range(m->fd, (off_t)off, (off_t)len, SYNC_FILE_RANGE_WRITE);
		break;
	default:
		madvise(m->map + off, len, MADV_DONTNEED);
		posix_fadvise(m->fd, (off_t)off, (off_t)len, POSIX_FADV_DONTNEED);
	}
}

/* After the writers: everything, past the page cache; and where the bytes ought to have gone. */
static void mix_last(struct mix *m, int remote)
{
	char *buf = aligned_alloc(PAGE, m->bytes);

	if (fsync(m->fd) || pread(m->direct, buf, m->bytes, 0) != (ssize_t)m->bytes) {
		printf("fuse_mix: the last look: %s\n", strerror(errno));
		atomic_fetch_add(&m->wrong, 1);
	}
	for (int i = 0; i < (remote >= 0 ? 2 : 1); i++) {
		if (i && far_io_pread(remote, 0, buf, m->bytes, 0))
			atomic_fetch_add(&m->wrong, 1);
		for (uint64_t slot = 0; slot < m->slots; slot++) {
			uint64_t got;
			memcpy(&got, buf + mix_off(slot), 8);
			mix_judge(m, slot, got, atomic_load(&m->done[slot]), i ? "a look at the remote" : "the last look");
		}
	}
	free(buf);
}

/* The slots' values must be known: all zero at first. */
static void mix_clear(struct mix *m)
{
	char *zeros = calloc(1, m->bytes);

	if (pwrite(m->fd, zeros, m->bytes, 0) != (ssize_t)m->bytes)
		atomic_fetch_add(&m->wrong, 1);
	free(zeros);
}

/* s: the mount is ours; halfway it is told that everything is local. */
static uint64_t mix_run(const char *path, unsigned rounds, uint64_t seed, struct serve *s)
{
	int remote = s ? s->memfd : -1;
	struct mix m = { .bytes = BYTES, .rounds = rounds, .seed = seed, .slots = BYTES / PAGE * SLOTS_A_PAGE };
	struct far_thread a = { 0 }, b = { 0 };
	uint64_t x = seed * 2 + 5;

	m.fd = open(path, O_RDWR | O_CLOEXEC);
	m.direct = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
	m.map = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, 0);
	m.started = calloc(m.slots, sizeof *m.started);
	m.done = calloc(m.slots, sizeof *m.done);
	if (m.fd < 0 || m.direct < 0 || m.map == MAP_FAILED || lseek(m.fd, 0, SEEK_END) < (off_t)BYTES) {
		printf("fuse_mix: %s: cannot open it, or it has less than 4 MiB\n", path);
		return 1;
	}
	if (remote < 0)
		mix_clear(&m);
	atomic_store(&m.writers, 2);
	if (far_thread_start(&a, "mapped", mix_mapped, &m) || far_thread_start(&b, "pwrite", mix_pwrite, &m))
		return 1;
	for (unsigned i = 0; atomic_load(&m.writers) && atomic_load(&m.wrong) < 20; i++) {
		mix_look(&m, &x);
		if (i % 8 == 0)
			mix_disturb(&m, &x);
		if (i == 200 && s && seed % 4 == 0 && serve_tell(s, 'a'))
			atomic_fetch_add(&m.wrong, 1);
	}
	far_thread_join(&a);
	far_thread_join(&b);
	mix_last(&m, remote);
	munmap(m.map, BYTES);
	close(m.direct);
	close(m.fd);
	free(m.started);
	free(m.done);
	return atomic_load(&m.wrong);
}

static unsigned mix_rounds = 10000;
static uint64_t mix_seed;

static void test_mix(void **state)
{
	for (unsigned done = 0, epoch = 0; done < mix_rounds; done += EPOCH, epoch++) {
		struct serve s;
		unsigned rounds = mix_rounds - done < EPOCH ? mix_rounds - done : EPOCH;
		serve_start(&s, &(struct serve_conf){ .bytes = BYTES, .managed = true, .keep_cache = true,
						      .local_max = (mix_seed + epoch) % 2 ? BYTES / 4 : 0 });
		atomic_store(&s.sh->open, true);
		atomic_store(&s.sh->absent, 0);
		atomic_store(&s.sh->rtt, epoch % 3 * 300 * FAR_USEC);
		uint64_t wrong = mix_run(s.path, rounds, mix_seed + epoch, &s);
		if (wrong)
			printf("fuse_mix: epoch %u, seed %" PRIu64 "\n", epoch, mix_seed + epoch);
		assert_int_equal(wrong, 0);
		serve_end(&s);
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = { cmocka_unit_test(test_mix) };

	signal(SIGPIPE, SIG_IGN);
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc > 1)
		mix_rounds = (unsigned)strtoul(argv[1], NULL, 10);
	mix_seed = argc > 2 && strcmp(argv[2], "0") ? strtoull(argv[2], NULL, 10) : far_now() % 1000000;
	printf("fuse_mix: %u rounds, seed %" PRIu64 "\n", mix_rounds, mix_seed);
	if (argc > 3)
		return mix_run(argv[3], mix_rounds, mix_seed, NULL) ? 1 : 0;
	if (serve_skip("fuse_mix"))
		return 77;
	return cmocka_run_group_tests_name("fuse_mix", tests, NULL, NULL);
}
