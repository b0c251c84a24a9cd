/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * One free list for each power of two, each behind its own lock. A list keeps at most 64 MiB or 4 buffers, whichever
 * is more; what comes back beyond that is freed. Large buffers are mmap'd so that freeing gives the memory back.
 */
#define _GNU_SOURCE
#include "base/pool.h"

#include "base/thread.h"

#include <stdlib.h>
#include <sys/mman.h>

#define POOL_MIN_SHIFT 12
#define POOL_MAX_SHIFT 25
#define POOL_CLASSES (POOL_MAX_SHIFT - POOL_MIN_SHIFT + 1)
#define POOL_KEEP ((size_t)64 << 20)

struct pool_free {
	struct pool_free *next;
};

static struct pool_class {
	struct far_mutex lock;
	struct pool_free *free FAR_GUARDED_BY(lock);
	size_t n FAR_GUARDED_BY(lock);
} pool_class[POOL_CLASSES] = { [0 ... POOL_CLASSES - 1] = { .lock = FAR_MUTEX_INIT } };

static unsigned pool_shift(size_t len)
{
	unsigned shift = POOL_MIN_SHIFT;
	while (((size_t)1 << shift) < len)
		shift++;
	return shift;
}

void *far_buf_get(size_t len)
{
	unsigned shift = pool_shift(len);

	if (shift <= POOL_MAX_SHIFT) {
		struct pool_class *c = &pool_class[shift - POOL_MIN_SHIFT];
		far_mutex_lock(&c->lock);
		struct pool_free *f = c->free;
		if (f) {
			c->free = f->next;
			c->n--;
		}
		far_mutex_unlock(&c->lock);
		if (f)
			return f;
	}
	void *p = mmap(NULL, (size_t)1 << shift, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

void far_buf_put(void *buf, size_t len)
{
	unsigned shift = pool_shift(len);

	if (!buf)
		return;
	if (shift <= POOL_MAX_SHIFT) {
		struct pool_class *c = &pool_class[shift - POOL_MIN_SHIFT];
		struct pool_free *f = buf;
		far_mutex_lock(&c->lock);
		bool keep = c->n < 4 || (c->n + 1) << shift <= POOL_KEEP;
		if (keep) {
			f->next = c->free;
			c->free = f;
			c->n++;
		}
		far_mutex_unlock(&c->lock);
		if (keep)
			return;
	}
	munmap(buf, (size_t)1 << shift);
}
