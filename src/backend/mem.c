/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Memory: an anonymous file (memfd). Read and written by calls, not through a mapping: a read of a hole then takes no
 * page, and a full machine is -ENOSPC rather than SIGBUS. Its size is sealed, so whoever shares it cannot cut it.
 */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "backend/record.h"

#include "base/io.h"
#include "base/options.h"
#include "base/uri.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct mem {
	int fd;
	struct far_ram_record record;
};

static int mem_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct mem *m = self;
	return far_io_pread(m->fd, off, buf, len, 0);
}

static int mem_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct mem *m = self;
	return far_io_pwrite(m->fd, off, buf, len, 0);
}

static int mem_flush(void *self)
{
	return 0;
}

static int mem_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct mem *m = self;
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
	struct mem *m = malloc(sizeof *m);
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
