/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Whole huge pages on their way into a program's memory. A fetch of such reads into what stage() gives:
 *
 *     MOVE      memory of ours, which UFFDIO_MOVE takes away as it is
 *     CONTINUE  (read-only maps) the place itself, in the second mapping: the program does not see it there until a fill shows
 *               it, so it may be anything until then
 *
 * Either way there is one copy, and the kernel's zeroing of new memory, which nothing that was tried avoids.
 */
#define _GNU_SOURCE
#include "frontend/memory_int.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>

/* ------------------------------------------------------------------------------------------------------------- buffers */

/*
 * CONTINUE: the place itself, in the second mapping. Only where nobody but a fetch writes, and where the program sees none of
 * it: a page may be shown already, from a fetch whose rest failed, and bytes that are on their way may be anything. If they do
 * not come, what they have left here is never shown, and the next fetch writes over it.
 */
static void *stage_alias(struct far_memory *m, uint64_t off, uint64_t len)
{
	bool here[FAR_STAGE / MEM_PAGE];
	uint64_t n, addr = far_memory_addr(m, off, &n);

	if (m->c.tracking != FAR_TRACK_NONE || !addr || n < len)
		return NULL;
	for (uint64_t at = 0; at < len; at += FAR_STAGE) {
		if (far_uffd_mapped(m->c.pagemap, addr + at, FAR_STAGE, here) || memchr(here, true, sizeof here))
			return NULL;
	}
	return m->c.alias + off;
}

void *far_mem_stage(void *self, uint64_t off, uint64_t len)
{
	struct far_memory *m = self;
	char *p = NULL, *raw;

	if (off % FAR_STAGE || len % FAR_STAGE || len > MEM_STAGE)
		return NULL;
	if (m->c.mechanism == FAR_MECH_CONTINUE)
		return stage_alias(m, off, len);
	far_mutex_lock(&m->stage_lock);
	if (m->n_stage)
		p = m->stage[--m->n_stage];
	far_mutex_unlock(&m->stage_lock);
	if (p)
		return p;
	raw = mmap(NULL, MEM_STAGE + FAR_STAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (raw == MAP_FAILED)
		return NULL;
	p = (char *)(far_div_up((uintptr_t)raw, FAR_STAGE) * FAR_STAGE);
	if (p > raw)
		munmap(raw, (size_t)(p - raw));
	munmap(p + MEM_STAGE, (size_t)(raw + FAR_STAGE - p));
	madvise(p, MEM_STAGE, MADV_HUGEPAGE);
	madvise(p, MEM_STAGE, MADV_DONTFORK);
	return p;
}

void far_mem_unstage(void *self, void *buf, uint64_t len)
{
	struct far_memory *m = self;
	bool kept = false;

	if (m->c.mechanism == FAR_MECH_CONTINUE)
		return;
	far_mutex_lock(&m->stage_lock);
	if (m->n_stage < FAR_ARRAY_LEN(m->stage)) {
		m->stage[m->n_stage++] = buf;
		kept = true;
	}
	far_mutex_unlock(&m->stage_lock);
	if (!kept)
		munmap(buf, MEM_STAGE);
}

void far_mem_zeros(void *self, uint64_t off, const void *buf, uint64_t len)
{
	struct far_memory *m = self;

	if (m->c.mechanism == FAR_MECH_CONTINUE && buf == m->c.alias + off) /* memory for nothing; if it stays, it is zero */
		(void)fallocate(m->c.shared, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len);
}

/* --------------------------------------------------------------------------------------------------- filling from them */

/*
 * Bytes that were read straight into the second mapping (stage_alias) are shown as the huge pages they are, in one step
 * that also shows whatever else is in these: so all of each must be what is filled here. Pages that are shown one by one cost
 * more than the copy did.
 */
bool far_mem_fill_huge(struct far_memory *m, uint64_t addr, uint64_t off, const char *src, uint64_t len)
{
	/* What is evicted takes the whole huge page out of the program's view, and page by page it comes back. */
	if (!(m->c.have & FAR_UFFD_COLLAPSE) || m->arms || m->c.evicts || src != m->c.alias + off ||
	    (addr | off | len) % FAR_STAGE)
		return false;
	for (uint64_t at = 0; at < len; at += FAR_STAGE) /* else the kernel would go and make one, for milliseconds */
		if (!far_uffd_huge(m->c.pagemap, (uint64_t)(uintptr_t)src + at))
			return false;
	uint64_t from, to;
	bool shown = false;
	if (m->apart)
		far_mem_fill_begin(m);
	if (!m->apart || (far_mem_kept(m, off, off + len, false, &from, &to) && from == off && to == off + len))
		shown = far_uffd_show_huge(m->c.uffd, addr, len);
	if (m->apart)
		far_mem_fill_end(m);
	return shown;
}

/*
 * Where somebody waits for a page, the kernel has a table of small pages already, so a huge page that is moved there is
 * split, and leaves such a table behind: from then on the staging buffer would be filled in small pages, at a third of the
 * speed. It is mapped anew.
 */
static void stage_renew(char *stage, uint64_t len)
{
	if (mmap(stage, (size_t)len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
	    MAP_FAILED)
		return; /* it stays slow */
	madvise(stage, (size_t)len, MADV_HUGEPAGE);
	madvise(stage, (size_t)len, MADV_DONTFORK);
}

int far_mem_fill_moved(struct far_memory *m, uint64_t addr, char *src, uint64_t len, unsigned flags, uint64_t *done)
{
	int err = far_uffd_move(m->c.uffd, addr, (uint64_t)(uintptr_t)src, len, flags, done);

	for (uint64_t at = 0; at < len && !err; at += FAR_STAGE)
		if (!far_uffd_huge(m->c.pagemap, addr + at))
			stage_renew(src + at, FAR_STAGE);
	return err;
}
