/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A program's memory as a local store, without the program and without receivers: nobody but the store touches it. Its
 * discard evicts, which is no part of the contract for stores of bytes; zeroing takes its place here. */
#define _GNU_SOURCE
#include "contract.h"

#include "frontend/memory.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u

struct store {
	struct far_backend *b;
	struct far_memory *m;
	char *p, *alias;
	uint64_t len;
	int uffd, pagemap, shared;
};

static const struct {
	const char *name;
	enum far_mechanism mechanism;
	enum far_tracking tracking;
	unsigned need;
} stores[] = {
	{ "memory-copy-async", FAR_MECH_COPY, FAR_TRACK_ASYNC, FAR_UFFD_ANY | FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN },
	{ "memory-copy-hash", FAR_MECH_COPY, FAR_TRACK_HASH, FAR_UFFD_ANY },
	{ "memory-move-hash", FAR_MECH_MOVE, FAR_TRACK_HASH, FAR_UFFD_ANY | FAR_UFFD_MOVE },
	{ "memory-continue-hash", FAR_MECH_CONTINUE, FAR_TRACK_HASH, FAR_UFFD_ANY | FAR_UFFD_MINOR | FAR_UFFD_HUGE },
	{ "memory-continue-async", FAR_MECH_CONTINUE, FAR_TRACK_ASYNC,
	  FAR_UFFD_ANY | FAR_UFFD_MINOR | FAR_UFFD_HUGE | FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN | FAR_UFFD_WP_SHMEM | FAR_UFFD_MINOR_WP },
};

static unsigned store_of(const struct contract_subject *s)
{
	unsigned k = 0;

	while (strcmp(stores[k].name, s->name))
		k++;
	return k;
}

static const char *store_lacks(const struct contract_subject *s)
{
	static char text[80];
	unsigned lacks = stores[store_of(s)].need & ~far_uffd_have();

	if (!lacks)
		return NULL;
	snprintf(text, sizeof text, "%s", far_uffd_word(lacks & -lacks));
	return text;
}

/* Pages are missing, and reading, writing and zeroing must do without a fault. */
static int store_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	return far_read(((struct store *)self)->b, off, buf, len, flags);
}

static int store_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	return far_write(((struct store *)self)->b, off, buf, len, flags);
}

static int store_flush(void *self)
{
	return far_flush(((struct store *)self)->b);
}

static int store_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	return far_zero(((struct store *)self)->b, off, len, flags);
}

static void store_close(void *self)
{
	struct store *t = self;

	far_close(t->b);
	munmap(t->p, (size_t)t->len);
	if (t->alias)
		munmap(t->alias, (size_t)t->len);
	close(t->uffd);
	close(t->pagemap);
	if (t->shared >= 0)
		close(t->shared);
	free(t);
}

static int store_map(struct store *t, enum far_mechanism mechanism, unsigned modes)
{
	bool huge = mechanism == FAR_MECH_CONTINUE;
	int r = huge ? far_hugemem_open(t->len, &t->shared) : 0;

	if (r)
		return r;
	t->p = mmap(NULL, (size_t)t->len, PROT_READ | PROT_WRITE, huge ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS, t->shared, 0);
	if (t->p == MAP_FAILED)
		return -errno;
	if (huge) {
		t->alias = mmap(NULL, (size_t)t->len, PROT_READ | PROT_WRITE, MAP_SHARED, t->shared, 0);
		if (t->alias == MAP_FAILED)
			return -errno;
	}
	return far_uffd_register(t->uffd, (uint64_t)(uintptr_t)t->p, t->len, modes);
}

static int store_open(const struct contract_subject *s, const char *dir, uint64_t bytes, const struct far_open_opts *opts,
		      struct far_backend **b, void **ctx)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = store_read, .write = store_write, .flush = store_flush,
					    .discard = store_zero, .zero = store_zero, .close = store_close };
	unsigned k = store_of(s), have = far_uffd_have() & ~(unsigned)(FAR_UFFD_EVENTS | FAR_UFFD_FORK); /* nobody reads them */
	bool arms = stores[k].tracking == FAR_TRACK_ASYNC, minors = stores[k].mechanism == FAR_MECH_CONTINUE;
	struct store *t = calloc(1, sizeof *t);
	struct far_facts facts = { .size = sizeof facts, .bytes = bytes, .caps = FAR_CAP_WRITE };

	t->shared = -1;
	t->len = far_max(far_div_up(bytes, PAGE), 1) * PAGE;
	t->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int r = far_uffd_open(have, &t->uffd);
	if (!r)
		r = store_map(t, stores[k].mechanism, FAR_UFFD_MISSING | (arms ? FAR_UFFD_PROTECT : 0) | (minors ? FAR_UFFD_MINORS : 0));
	struct far_handover_range range = { .addr = (uint64_t)(uintptr_t)t->p, .len = t->len };
	const struct far_memory_conf conf = { .uffd = t->uffd, .pagemap = t->pagemap, .mem = -1, .range = &range, .n = 1,
					      .bytes = bytes, .shift = 12, .mechanism = stores[k].mechanism,
					      .tracking = stores[k].tracking, .have = have, .alias = t->alias,
					      .shared = t->shared };
	if (!r)
		r = far_memory_new(&conf, &t->m, &t->b);
	*ctx = NULL;
	return r ? r : far_backend_new(&ops, t, &facts, b);
}

#define STORE(n) { .name = n, .open = store_open, .lacks = store_lacks, .flags = CONTRACT_NO_READ_ONLY }

const struct contract_subject contract_memory[] = {
	STORE("memory-copy-async"), STORE("memory-copy-hash"), STORE("memory-move-hash"), STORE("memory-continue-hash"),
	STORE("memory-continue-async"), { .name = NULL },
};
