/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Memory of this process alone, in huge pages: `mem:SIZE?private=1`. A memfd costs 1.3 us for each new page of 4 KiB, which
 * is what bounds a pull on a fast path; a huge page costs a twentieth of that. The price: room is taken 2 MiB at a time, and
 * nobody can share it. So it is for what will be filled whole.
 *
 * Whoever waits for 64 KiB would wait for 2 MiB to be cleared, too (0.2 ms and more). So what is written first in a block by
 * a short write that is not FAR_BULK gets small pages there. Each such block splits the mapping, hence HEAP_SMALL_MAX.
 *
 * Reads and writes of the same bytes at once give some mixture of old and new, as with any file.
 */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "backend/record.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HEAP_HUGE ((uint64_t)2 << 20)
#define HEAP_PAGE ((uint64_t)4096)
#define HEAP_SMALL_MAX 4096u /* a process may have 65530 mappings */
#define HEAP_SHORT ((size_t)128 << 10)

struct heap {
	char *base;
	uint64_t mapped;
	_Atomic unsigned small; /* blocks with small pages */
	_Atomic uint64_t *used; /* bit b: somebody wrote to block b */
	struct far_ram_record record;
};

static int heap_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	memcpy(buf, ((struct heap *)self)->base + off, len);
	return 0;
}

static void heap_first_write(struct heap *h, uint64_t block, bool hurry)
{
	uint64_t bit = (uint64_t)1 << (block % 64);

	if (atomic_load_explicit(&h->used[block / 64], memory_order_relaxed) & bit)
		return;
	if (atomic_fetch_or_explicit(&h->used[block / 64], bit, memory_order_relaxed) & bit)
		return;
	if (hurry && atomic_fetch_add_explicit(&h->small, 1, memory_order_relaxed) < HEAP_SMALL_MAX)
		madvise(h->base + block * HEAP_HUGE, HEAP_HUGE, MADV_NOHUGEPAGE);
}

static char *heap_ready(struct heap *h, uint64_t off, size_t len, bool hurry)
{
	for (uint64_t block = off / HEAP_HUGE; block <= (off + len - 1) / HEAP_HUGE; block++)
		heap_first_write(h, block, hurry);
	return h->base + off;
}

static int heap_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	memcpy(heap_ready(self, off, len, !(flags & FAR_BULK) && len < HEAP_SHORT), buf, len);
	return 0;
}

static int heap_flush(void *self)
{
	return 0;
}

/* Whole pages are given back, the ragged ends are set to zero. */
static int heap_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct heap *h = self;
	uint64_t a = far_div_up(off, HEAP_PAGE) * HEAP_PAGE, b = (off + len) / HEAP_PAGE * HEAP_PAGE;

	if (a >= b) {
		memset(h->base + off, 0, (size_t)len);
		return 0;
	}
	memset(h->base + off, 0, (size_t)(a - off));
	memset(h->base + b, 0, (size_t)(off + len - b));
	return madvise(h->base + a, (size_t)(b - a), MADV_DONTNEED) ? -errno : 0;
}

static int heap_record_read(void *self, void *buf, size_t cap, size_t *n)
{
	return far_ram_record_read(&((struct heap *)self)->record, buf, cap, n);
}

static int heap_record_write(void *self, const void *buf, size_t n)
{
	return far_ram_record_write(&((struct heap *)self)->record, buf, n);
}

static void heap_close(void *self)
{
	struct heap *h = self;
	far_ram_record_fini(&h->record);
	munmap(h->base, h->mapped);
	free((void *)h->used);
	free(h);
}

static const struct far_ops heap_ops = {
	FAR_OPS_INIT,
	.read = heap_read,
	.write = heap_write,
	.flush = heap_flush,
	.discard = heap_discard,
	.zero = heap_discard,
	.close = heap_close,
	.record_read = heap_record_read,
	.record_write = heap_record_write,
};

int far_heap_new(uint64_t bytes, struct far_backend **out)
{
	struct far_facts facts = { .size = sizeof facts, .caps = FAR_CAP_WRITE, .bytes = bytes };
	struct heap *h = calloc(1, sizeof *h);

	if (!h)
		return -ENOMEM;
	h->mapped = far_div_up(far_max(bytes, 1), HEAP_HUGE) * HEAP_HUGE;
	h->used = calloc((size_t)far_div_up(h->mapped / HEAP_HUGE, 64), sizeof *h->used);
	if (!h->used) {
		free(h);
		return -ENOMEM;
	}
	h->base = mmap(NULL, h->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (h->base == MAP_FAILED) {
		free((void *)h->used);
		free(h);
		return -ENOMEM;
	}
	far_ram_record_init(&h->record);
	madvise(h->base, h->mapped, MADV_HUGEPAGE); /* a kernel without them works as well, slower */
	madvise(h->base, h->mapped, MADV_DONTFORK);
	madvise(h->base, h->mapped, MADV_DONTDUMP);
	int r = far_backend_new(&heap_ops, h, &facts, out);
	if (r)
		heap_close(h);
	return r;
}

const char *far_heap_address(const struct far_backend *b)
{
	return far_backend_is(b, heap_read) ? ((struct heap *)far_backend_self(b, heap_read))->base : NULL;
}

char *far_heap_place(const struct far_backend *b, uint64_t off, size_t len)
{
	return far_backend_is(b, heap_read) ? heap_ready(far_backend_self(b, heap_read), off, len, len < HEAP_SHORT) : NULL;
}
