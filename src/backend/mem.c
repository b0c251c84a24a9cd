/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Memory: an anonymous file (memfd). Read and written by calls where a page may not be there: a read of a hole then takes
 * no page, and a full machine is -ENOSPC rather than SIGBUS. Its size is sealed, so whoever shares it cannot cut it.
 */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "backend/record.h"

#include "base/io.h"
#include "base/options.h"
#include "base/uri.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MEM_PAGE ((uint64_t)4096)
#define MEM_SHORT 65536 /* a longer read the kernel makes as fast; a write never: it locks each page */
#define MEM_AROUND ((uint64_t)65536) /* what the kernel maps at one fault of a read */
#define MEM_LINE 64
#define MEM_SOON 1024
#define MEM_MAPPED_MAX ((uint64_t)1 << 44)

/*
 * Short reads, and writes, of pages that are there go through a mapping, which costs a third of a system call. To look at a
 * page that is not there would put one there, so it is noted which have been written. A note is no more than a hint: the
 * mapping and the file are the same bytes whatever it says.
 */
struct mem {
	int fd;
	uint64_t bytes;
	char *map;              /* NULL: none */
	_Atomic uint64_t *there; /* a bit for each page */
	struct far_ram_record record;
};

static size_t mem_words(uint64_t bytes)
{
	return (size_t)far_div_up(far_div_up(bytes, MEM_PAGE), 64);
}

static void mem_map(struct mem *m)
{
	if (!m->bytes || m->bytes > MEM_MAPPED_MAX || sysconf(_SC_PAGESIZE) != (long)MEM_PAGE)
		return;
	m->there = calloc(mem_words(m->bytes), sizeof *m->there);
	void *p = m->there ? mmap(NULL, m->bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, m->fd, 0) : MAP_FAILED;
	if (p == MAP_FAILED)
		return;
	madvise(p, m->bytes, MADV_DONTFORK);
	madvise(p, m->bytes, MADV_DONTDUMP); /* as it was as a file: a dump would give every hole a page */
	m->map = p;
}

/* The bits of word w that stand for pages of [off, off+len). */
static uint64_t mem_mask(uint64_t w, uint64_t off, uint64_t len)
{
	uint64_t first = off / MEM_PAGE, last = (off + len - 1) / MEM_PAGE, mask = UINT64_MAX;

	if (w == first / 64)
		mask &= UINT64_MAX << first % 64;
	if (w == last / 64)
		mask &= UINT64_MAX >> (63 - last % 64);
	return mask;
}

static bool mem_is_there(const struct mem *m, uint64_t off, size_t len)
{
	if (!m->map)
		return false;
	for (uint64_t w = off / MEM_PAGE / 64; w <= (off + len - 1) / MEM_PAGE / 64; w++) {
		uint64_t mask = mem_mask(w, off, len);
		if ((atomic_load_explicit(&m->there[w], memory_order_relaxed) & mask) != mask)
			return false;
	}
	return true;
}

static void mem_note(struct mem *m, uint64_t off, uint64_t len, bool there)
{
	if (!m->map)
		return;
	for (uint64_t w = off / MEM_PAGE / 64; w <= (off + len - 1) / MEM_PAGE / 64; w++) {
		uint64_t mask = mem_mask(w, off, len), now = atomic_load_explicit(&m->there[w], memory_order_relaxed);
		if (there && (now & mask) != mask)
			atomic_fetch_or_explicit(&m->there[w], mask, memory_order_relaxed);
		else if (!there && (now & mask))
			atomic_fetch_and_explicit(&m->there[w], ~mask, memory_order_relaxed);
	}
}

static int mem_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct mem *m = self;

	if (len <= MEM_SHORT && mem_is_there(m, off, len)) {
		memcpy(buf, m->map + off, len);
		return 0;
	}
	return far_io_pread(m->fd, off, buf, len, 0);
}

static int mem_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct mem *m = self;

	if (mem_is_there(m, off, len)) {
		memcpy(m->map + off, buf, len);
		return 0;
	}
	int r = far_io_pwrite(m->fd, off, buf, len, 0);
	if (r == 0)
		mem_note(m, off, len, true);
	return r;
}

static int mem_flush(void *self)
{
	return 0;
}

static int mem_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct mem *m = self;
	mem_note(m, off, len, false);
	return far_io_punch(m->fd, off, len);
}

static int mem_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct mem *m = self;
	return far_io_extents(m->fd, off, len, out, max, n);
}

static int mem_share(void *self, int *fd)
{
	struct mem *m = self;
	*fd = m->fd;
	return 0;
}

static int mem_record_read(void *self, void *buf, size_t cap, size_t *n)
{
	return far_ram_record_read(&((struct mem *)self)->record, buf, cap, n);
}

static int mem_record_write(void *self, const void *buf, size_t n)
{
	return far_ram_record_write(&((struct mem *)self)->record, buf, n);
}

static void mem_close(void *self)
{
	struct mem *m = self;
	far_ram_record_fini(&m->record);
	if (m->map)
		munmap(m->map, m->bytes);
	free((void *)m->there);
	far_fd_close(&m->fd);
	free(m);
}

static const struct far_ops mem_ops = {
	FAR_OPS_INIT,
	.read = mem_read,
	.write = mem_write,
	.flush = mem_flush,
	.discard = mem_discard,
	.zero = mem_discard,
	.extents = mem_extents,
	.share = mem_share,
	.close = mem_close,
	.record_read = mem_record_read,
	.record_write = mem_record_write,
};

int far_mem_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out,
		 struct far_error *err)
{
	static const struct far_opt options[] = {
		{ "private", FAR_OPT_BOOL, 0, .help = "huge pages of this process alone" },
		FAR_OPT_END,
	};
	bool private = false;
	struct far_facts facts = { .size = sizeof facts, .caps = FAR_CAP_WRITE | FAR_CAP_SHARE };

	int r = far_opt_parse(options, &private, u->text, u->query, '&', true, err);
	if (r)
		return r;
	if (u->authority || far_parse_size(u->path, &facts.bytes) || facts.bytes > FAR_SIZE_MAX)
		return far_error_set(err, EINVAL, "cannot open '%.100s': write mem:SIZE, as in mem:64M.", u->text);
	if (private) {
		r = far_heap_new(facts.bytes, out);
		return r ? far_error_set(err, -r, "cannot open '%.100s': %s.", u->text, far_strerror(r)) : 0;
	}
	struct mem *m = calloc(1, sizeof *m);
	if (!m)
		return far_error_set(err, ENOMEM, "cannot open '%.100s': %s.", u->text, far_strerror(ENOMEM));
	far_ram_record_init(&m->record);
	m->fd = memfd_create("farpage", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (m->fd < 0 || ftruncate(m->fd, (off_t)facts.bytes) < 0 ||
	    fcntl(m->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
		r = far_error_set(err, errno, "cannot open '%.100s': no memory file of that size: %s.", u->text,
				  far_strerror(errno));
		goto close;
	}
	m->bytes = facts.bytes;
	mem_map(m);
	r = far_backend_new(&mem_ops, m, &facts, out);
	if (!r)
		return 0;
	far_error_set(err, -r, "cannot open '%.100s': %s.", u->text, far_strerror(r));
close:
	mem_close(m);
	return r;
}

bool far_backend_is_memory(const struct far_backend *b)
{
	return far_backend_is(b, mem_read) || far_heap_address(b);
}

/* A page that is there may still be unknown to the page table. To read of it brings its fifteen neighbours along; a write
 * would bring it alone. */
static void mem_touch(const struct mem *m, uint64_t off, size_t len)
{
	for (uint64_t at = off / MEM_AROUND * MEM_AROUND; at < off + len; at += MEM_AROUND)
		(void)*(const volatile char *)(m->map + far_max(at, off));
}

char *far_backend_place(const struct far_backend *b, uint64_t off, size_t len)
{
	char *p = far_heap_place(b, off, len);

	if (p || !far_backend_is(b, mem_read))
		return p;
	const struct mem *m = far_backend_self(b, mem_read);
	if (!mem_is_there(m, off, len))
		return NULL;
	mem_touch(m, off, len);
	return m->map + off;
}

/* What is discarded while it is read so is a page of zeros afterwards, until it is discarded again. */
const char *far_backend_bytes(const struct far_backend *b, uint64_t off, size_t len)
{
	const char *base = far_heap_address(b);
	uint64_t size = far_size(b);

	if (!len || len > size || off > size - len)
		return NULL;
	if (base)
		return base + off;
	if (!far_backend_is(b, mem_read))
		return NULL;
	const struct mem *m = far_backend_self(b, mem_read);
	return mem_is_there(m, off, len) ? m->map + off : NULL;
}

/* Enough for the machine to see that it goes on from there. */
void far_backend_soon(const struct far_backend *b, uint64_t off, size_t len)
{
	const char *p = far_backend_bytes(b, off, len);

	for (size_t k = 0; p && k < len && k < MEM_SOON; k += MEM_LINE)
		__builtin_prefetch(p + k);
}
