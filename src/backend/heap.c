/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Memory of this process alone, in huge pages: `mem:SIZE?private=1`. A memfd costs 1.3 us for each new page of 4 KiB, which
 * is what bounds a pull on a fast path; a huge page costs a twentieth of that. The price: room is taken 2 MiB at a time, and
 * nobody can share it. So it is for what will be filled whole.
 *
 * Reads and writes of the same bytes at once give some mixture of old and new, as with any file.
 */
#define _GNU_SOURCE
#include "backend/backend.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HEAP_HUGE ((uint64_t)2 << 20)
#define HEAP_PAGE ((uint64_t)4096)

struct heap {
	char *base;
	uint64_t mapped;
};

static int heap_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	memcpy(buf, ((struct heap *)self)->base + off, len);
	return 0;
}

static int heap_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	memcpy(((struct heap *)self)->base + off, buf, len);
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

static void heap_close(void *self)
{
	struct heap *h = self;
	munmap(h->base, h->mapped);
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
};

int far_heap_new(uint64_t bytes, struct far_backend **out)
{
	struct far_facts facts = { .size = sizeof facts, .caps = FAR_CAP_WRITE, .bytes = bytes };
	struct heap *h = calloc(1, sizeof *h);

	if (!h)
		return -ENOMEM;
	h->mapped = far_div_up(far_max(bytes, 1), HEAP_HUGE) * HEAP_HUGE;
	h->base = mmap(NULL, h->mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (h->base == MAP_FAILED) {
		free(h);
		return -ENOMEM;
	}
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
