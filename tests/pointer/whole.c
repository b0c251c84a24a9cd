/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A read-only map in huge shared pages, into which the remote is read straight: what a read that failed has left there is
 * never seen, zeros stay zeros, and the program may change the mapping while bytes are on their way.
 */
#define _GNU_SOURCE
#include "rig.h"

#include "frontend/uffd.h"

#define BLOCK (2u << 20)
#define BLOCKS 6u
#define BYTES (BLOCKS * BLOCK + 1234u)
#define ZERO_BLOCK 2u                      /* all of it */
#define ZERO_CHUNK (3u * BLOCK + 5u * CHUNK) /* one in a block that is not */

static struct {
	_Atomic bool hold;
	_Atomic unsigned spoil;    /* bit k: the next long read in block k scribbles and fails */
	_Atomic unsigned stubborn; /* ... and each after it */
	_Atomic unsigned held, spoilt;
} far_side;

static unsigned char whole_byte(uint64_t off)
{
	if (off / BLOCK == ZERO_BLOCK || (off >= ZERO_CHUNK && off < ZERO_CHUNK + CHUNK))
		return 0;
	return (unsigned char)(1 + (off * 7 + off / PAGE * 13) % 255);
}

static int whole_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	unsigned char *p = buf;
	unsigned bit = 1u << (off / BLOCK);

	(void)self;
	if ((flags & FAR_NOWAIT) && far_side.hold)
		return -EAGAIN;
	far_side.held++;
	while (far_side.hold)
		usleep(1000);
	far_side.held--;
	if (len >= BLOCK && ((atomic_fetch_and(&far_side.spoil, ~bit) | far_side.stubborn) & bit)) {
		memset(buf, 0xEE, len - CHUNK);
		far_side.spoilt++;
		return -EIO;
	}
	for (size_t k = 0; k < len; k++)
		p[k] = whole_byte(off + k);
	return 0;
}

static int whole_flush(void *self)
{
	(void)self;
	return 0;
}

static struct far_mount *whole_map(void)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = whole_read, .flush = whole_flush };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_backend *b = NULL;
	struct far_mount *m = NULL;
	struct far_error err;

	facts.bytes = BYTES;
	o.mode = FAR_MODE_MANAGED;
	o.read_only = true;
	o.mechanism = FAR_MECH_CONTINUE;
	o.chunk = CHUNK;
	o.order = "ranges:4M-6M"; /* ZERO_BLOCK first: later reads may be shorter, on a machine that is slow */
	if (!(far_uffd_have() & FAR_UFFD_MINOR) || !(far_uffd_have() & FAR_UFFD_HUGE))
		rig_skip("no minor faults of shared memory in huge pages here");
	SAME(far_backend_new(&ops, NULL, &facts, &b), 0);
	if (far_map(b, &o, &m, &err))
		rig_fail(__FILE__, __LINE__, "%s", err.text);
	return m;
}

/* All of it is here, whatever errors that took. */
static void whole_wait(struct far_mount *m)
{
	UNTIL(far_mount_wait(m, 100, 1000) == 0);
}

static bool whole_right(const unsigned char *p, uint64_t off, size_t len)
{
	for (size_t k = 0; k < len; k++)
		if (p[k] != (off + k < BYTES ? whole_byte(off + k) : 0)) {
			fprintf(stderr, "# byte %zu is %d, not %d\n", (size_t)off + k, p[k], whole_byte(off + k));
			return false;
		}
	return true;
}

/* Bytes of [p, p+len) that are mapped in huge pages. */
static uint64_t whole_huge(const unsigned char *p, size_t len)
{
	FILE *f = fopen("/proc/self/smaps", "re");
	unsigned long from, to, kib, sum = 0;
	char line[256];
	int inside = 0;

	CHECK(f);
	while (fgets(line, sizeof line, f)) {
		if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
			inside = from < (uintptr_t)p + len && to > (uintptr_t)p;
		else if (inside && sscanf(line, "ShmemPmdMapped: %lu", &kib) == 1)
			sum += kib * 1024;
	}
	fclose(f);
	return sum;
}

/* Reads that scribble and fail; nothing of what they left is seen, also where the right bytes are zeros. */
static void a_spoilt_read_is_never_seen(void)
{
	far_side.spoil = 1u << 1 | 1u << ZERO_BLOCK | 1u << 4;
	struct far_mount *m = whole_map();
	unsigned char *p = far_addr(m);

	whole_wait(m);
	CHECK(far_side.spoilt > 0);
	CHECK(whole_right(p, 0, (BYTES + PAGE - 1) / PAGE * PAGE));
	SAME(far_mount_close(m), 0);
}

/* Long reads go on failing, and a chunk of zeros is asked for by itself, which needs no fill where all is zero. */
static void zeros_over_a_spoilt_read(void)
{
	far_side.stubborn = 1u << ZERO_BLOCK;
	struct far_mount *m = whole_map();
	const unsigned char *p = far_addr(m), *at = p + ZERO_BLOCK * BLOCK + 5 * CHUNK + 7;
	unsigned char seen = 0xFF;

	UNTIL(far_side.spoilt > 0);
	int how = touch(at, &seen);
	CHECK(how == SIGBUS || (how == 0 && seen == 0)); /* SIGBUS: it met the next long read */
	far_side.stubborn = 0;
	SAME(far_mount_heal(m, 0, BYTES), 0);
	whole_wait(m);
	CHECK(whole_right(p, 0, BYTES));
	SAME(far_mount_close(m), 0);
}

static void blocks_are_huge(void)
{
	far_side.hold = true;
	struct far_mount *m = whole_map();
	unsigned char *p = far_addr(m);

	far_side.hold = false;
	whole_wait(m);
	uint64_t huge = whole_huge(p, BYTES);
	printf("# %u of %u KiB in huge pages\n", (unsigned)(huge >> 10), BYTES >> 10);
	if (far_uffd_have() & FAR_UFFD_COLLAPSE)
		CHECK(huge >= BLOCK); /* memory may be in pieces */
	else
		SAME(huge, 0);
	CHECK(whole_right(p, 0, BYTES));
	/* A part is forgotten, and comes again. */
	SAME(madvise(p + BLOCK + CHUNK, 8 * CHUNK, MADV_DONTNEED), 0);
	SAME(madvise(p + ZERO_BLOCK * BLOCK, BLOCK, MADV_DONTNEED), 0);
	CHECK(whole_right(p, 0, BYTES));
	SAME(far_mount_discard(m, 0, BYTES) <= 0, 1);
	CHECK(whole_right(p, 0, BYTES));
	SAME(far_mount_close(m), 0);
}

static void mappings_change_under_a_read(void)
{
	far_side.hold = true;
	struct far_mount *m = whole_map();
	unsigned char *p = far_addr(m), *q;
	struct toucher t[2];

	UNTIL(far_side.held);
	SAME(mprotect(p + BLOCK + 3 * PAGE, PAGE, PROT_NONE), 0);
	SAME(munmap(p + 3 * BLOCK + 64 * PAGE, PAGE), 0);
	q = mmap(NULL, 2 * BLOCK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(q != MAP_FAILED);
	q = (unsigned char *)(((uintptr_t)q + BLOCK - 1) & ~(uintptr_t)(BLOCK - 1));
	CHECK(mremap(p + 4 * BLOCK, BLOCK, BLOCK, MREMAP_MAYMOVE | MREMAP_FIXED, q) == q);
	toucher_start(&t[0], q + 5 * PAGE, false);
	toucher_start(&t[1], p + BLOCK + 9 * PAGE, false);
	far_side.hold = false;
	for (unsigned k = 0; k < 2; k++) {
		toucher_end(&t[k]);
		SAME(t[k].how, 0);
	}
	SAME(t[0].seen, whole_byte(4 * BLOCK + 5 * PAGE));
	SAME(t[1].seen, whole_byte(BLOCK + 9 * PAGE));
	whole_wait(m);
	SAME(mprotect(p + BLOCK + 3 * PAGE, PAGE, PROT_READ), 0);
	CHECK(whole_right(p, 0, 3 * BLOCK + 64 * PAGE));
	CHECK(whole_right(p + 3 * BLOCK + 65 * PAGE, 3 * BLOCK + 65 * PAGE, BLOCK - 65 * PAGE));
	CHECK(whole_right(q, 4 * BLOCK, BLOCK));
	CHECK(whole_right(p + 5 * BLOCK, 5 * BLOCK, BYTES - 5 * BLOCK));
	SAME(far_mount_close(m), 0);
}

int main(int argc, char **argv)
{
	static const struct rig_case cases[] = {
		{ "a spoilt read is never seen", a_spoilt_read_is_never_seen },
		{ "zeros over a spoilt read", zeros_over_a_spoilt_read },
		{ "blocks are huge", blocks_are_huge },
		{ "mappings change under a read", mappings_change_under_a_read },
	};

	return rig_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
