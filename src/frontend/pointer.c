/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Puts a pointer together: the mapping, the memory as a store, the region over it, the receivers of its faults, and the
 * thread that looks for stores. Taken apart in the other order, and the mapping goes while the receivers still run: the
 * kernel reports the unmapping to them, and a thread that touches the memory in that moment must not find it zero.
 *
 * A backend whose own pages can be mapped (SHARE) needs none of this, and what is served by SIGSEGV (pointer_segv.c) brings
 * a region of its own.
 */
#define _GNU_SOURCE
#include "frontend/pointer.h"

#include "base/clock.h"
#include "base/thread.h"
#include "frontend/memory.h"
#include "frontend/pager.h"
#include "frontend/pointer_segv.h"
#include "frontend/uffd_abi.h"
#include "frontend/victim.h"
#include "region/region.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define POINTER_PAGE ((uint64_t)4096)
#define POINTER_TRIES 100
#define POINTER_IDLE_MAX 8 /* times the interval between looks at memory that nobody writes to */

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

struct far_pointer {
	/* fixed after open */
	struct far_mount_opts o;
	enum far_mechanism mechanism;
	enum far_tracking tracking;
	unsigned have;
	bool writable, borrowed, ours, failed;
	uint64_t bytes, len; /* the region; in whole pages */
	char *source;
	struct far_backend *below; /* SHARE and while it is opened; else owned by the region unless borrowed */
	char *addr, *alias;
	int shared, pagemap;
	struct far_handover given;
	struct far_receivers *receivers;
	struct far_memory *memory;
	struct far_victim *victim; /* with local_max; NULL else */
	struct far_backend *limbo; /* its face, between the region and what is below; owned by the region */
	struct far_backend *store; /* the memory; owned by the region */
	struct far_region *region;
	struct far_member *member;
	struct far_segv_pointer *segv; /* instead of all these; has the region */

	struct far_thread looker;
	struct far_mutex lock;
	struct far_cond wake;
	bool stopped FAR_GUARDED_BY(lock);
};

/* ----------------------------------------------------------------------------------------------------------- mapping */

static int pointer_prot(const struct far_pointer *p)
{
	return PROT_READ | (p->writable || p->mechanism == FAR_MECH_MOVE ? PROT_WRITE : 0); /* MOVE wants it writable */
}

/* len bytes of fd (-1: private memory), at a place that suits huge pages, or where the caller wants it. */
static int pointer_mmap(void *at, uint64_t len, int prot, int fd, char **out)
{
	int flags = MAP_NORESERVE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
	uint64_t all = len + FAR_STAGE;

	if (at) {
		void *got = mmap(at, (size_t)len, prot, flags | MAP_FIXED_NOREPLACE, fd, 0);
		if (got != MAP_FAILED && got != at) { /* a kernel that does not know the flag took it for a hint */
			munmap(got, (size_t)len);
			return -EEXIST;
		}
		*out = got;
		return got == MAP_FAILED ? -errno : 0;
	}
	char *raw = mmap(NULL, (size_t)all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (raw == MAP_FAILED)
		return -errno;
	char *base = (char *)(far_div_up((uintptr_t)raw, FAR_STAGE) * FAR_STAGE);
	if (mmap(base, (size_t)len, prot, flags | MAP_FIXED, fd, 0) == MAP_FAILED) {
		int e = errno;
		munmap(raw, (size_t)all);
		return -e;
	}
	if (base > raw)
		munmap(raw, (size_t)(base - raw));
	munmap(base + len, (size_t)(raw + all - (base + len)));
	*out = base;
	return 0;
}

static int pointer_map(struct far_pointer *p, struct far_error *err)
{
	uint64_t huge = far_div_up(p->len, FAR_STAGE) * FAR_STAGE;
	int e = 0;

	if (p->mechanism == FAR_MECH_CONTINUE) {
		e = far_hugemem_open(huge, &p->shared);
		if (!e)
			e = pointer_mmap(NULL, huge, PROT_READ | PROT_WRITE, p->shared, &p->alias);
		if (!e) {
			madvise(p->alias, (size_t)huge, MADV_HUGEPAGE);
			madvise(p->alias, (size_t)huge, MADV_DONTFORK);
			madvise(p->alias, (size_t)huge, MADV_DONTDUMP);
		}
	}
	if (!e)
		e = pointer_mmap(p->o.address, p->len, pointer_prot(p), p->shared, &p->addr);
	if (e == -EEXIST)
		return far_error_set(err, EEXIST, "cannot map %s at %p: something of the program's is there already. Choose "
				     "another address, or none", p->source, p->o.address);
	if (e)
		return far_error_set(err, -e, "cannot map %" PRIu64 " bytes for %s: %s", p->len, p->source, far_strerror(e));
	/* A child would read zeros: nobody serves its faults. */
	if (!p->o.inherit)
		madvise(p->addr, (size_t)p->len, MADV_DONTFORK);
	return 0;
}

static int pointer_register(struct far_pointer *p, struct far_error *err)
{
	unsigned modes = FAR_UFFD_MISSING | (p->mechanism == FAR_MECH_CONTINUE ? FAR_UFFD_MINORS : 0) |
			 (p->tracking == FAR_TRACK_ASYNC || p->tracking == FAR_TRACK_SYNC ? FAR_UFFD_PROTECT : 0);
	int e = far_uffd_register(far_receivers_uffd(p->receivers), (uint64_t)(uintptr_t)p->addr, p->len, modes);

	if (e)
		return far_error_set(err, -e, "userfaultfd refuses the memory for %s: %s", p->source, far_strerror(e));
	return 0;
}

/* ------------------------------------------------------------------------------------------------------------- looking */

static void *pointer_look(void *arg)
{
	struct far_pointer *p = arg;
	const struct far_region_memory *calls = far_memory_calls(p->memory);
	uint64_t interval = (p->o.push_interval_ms ? p->o.push_interval_ms : 1000) * FAR_MSEC, wait = interval;
	struct far_status st = FAR_STATUS_INIT;
	uint64_t pushed = 0;

	far_mutex_lock(&p->lock);
	while (!p->stopped) {
		far_cond_wait_until(&p->wake, &p->lock, far_now() + wait);
		if (p->stopped)
			break;
		far_mutex_unlock(&p->lock);
		uint64_t old = far_deadline_limit(far_now() + 30 * FAR_SEC);
		calls->collect(calls->self, p->region); /* what it could not tell it keeps for the next time */
		far_deadline_restore(old);
		far_region_status(p->region, &st);
		wait = st.dirty || st.pushed != pushed ? interval : far_min(2 * wait, POINTER_IDLE_MAX * interval);
		pushed = st.pushed;
		far_mutex_lock(&p->lock);
	}
	far_mutex_unlock(&p->lock);
	return NULL;
}

/* ---------------------------------------------------------------------------------------------------------------- open */

/* What can be done with a descriptor that was handed over. */
static unsigned pointer_given_have(const struct far_handover *h)
{
	unsigned have = FAR_UFFD_ANY | (far_uffd_have() & (FAR_UFFD_SCAN | FAR_UFFD_POISON));

	/* A descriptor that notes stores makes no faults of them: who cannot read the notes must not count on faults. */
	if ((h->features & UFFD_FEATURE_PAGEFAULT_FLAG_WP) && !(h->features & FAR_FEATURE_WP_ASYNC))
		have |= FAR_UFFD_WP;
	else if ((h->features & FAR_FEATURE_WP_ASYNC) && h->pagemap >= 0 && (have & FAR_UFFD_SCAN))
		have |= FAR_UFFD_WP | FAR_UFFD_WP_ASYNC;
	if ((h->features & (UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP)) != 0)
		have |= FAR_UFFD_EVENTS;
	return have;
}

static int pointer_settle(struct far_pointer *p, const struct far_pointer_conf *conf, struct far_error *err)
{
	if (!conf->given) {
		p->have = far_uffd_have();
		int e = far_pointer_settle(p->have, far_facts(p->below), &p->o, p->writable, conf->managed || p->borrowed,
					   &p->mechanism, &p->tracking, err);
		if (p->tracking == FAR_TRACK_SYNC)
			p->have &= ~(unsigned)FAR_UFFD_WP_ASYNC; /* one descriptor does it one way or the other */
		if (!e && p->o.inherit && !(p->have & FAR_UFFD_FORK))
			e = far_error_set(err, EPERM, "a child cannot be given a view of %s: that needs CAP_SYS_PTRACE. Leave `inherit` "
					  "out, or run with it", p->source);
		return e;
	}
	p->have = pointer_given_have(conf->given);
	p->mechanism = FAR_MECH_COPY;
	if (!p->writable)
		p->tracking = FAR_TRACK_NONE;
	else if (p->have & FAR_UFFD_WP_ASYNC)
		p->tracking = FAR_TRACK_ASYNC;
	else
		p->tracking = p->have & FAR_UFFD_WP ? FAR_TRACK_SYNC : FAR_TRACK_HASH;
	if (p->writable && (conf->given->pagemap < 0 || conf->given->mem < 0))
		return far_error_set(err, EINVAL, "memory whose stores are to be pushed must be handed over with its pagemap and its mem");
	if (p->o.local_max)
		return far_error_set(err, EOPNOTSUPP, "memory of another process cannot be bounded from here: leave local_max out");
	return 0;
}

/* An eighth of what may be here is for what was evicted a moment ago. */
static int pointer_limbo(struct far_pointer *p, struct far_error *err)
{
	uint64_t chunk = p->o.chunk ? p->o.chunk : 64 * FAR_KIB, most = p->o.local_max / 8;

	if (p->borrowed || most < chunk || chunk < POINTER_PAGE || (chunk & (chunk - 1)))
		return 0;
	int e = far_victim_new(p->below, (unsigned)__builtin_ctzll(chunk), most, &p->victim, &p->limbo);
	if (e)
		return far_error_set(err, -e, "no memory for a map of %s", p->source);
	p->o.local_max -= most / chunk * chunk;
	return 0;
}

static int pointer_memory(struct far_pointer *p, const struct far_pointer_conf *conf, struct far_error *err)
{
	struct far_handover_range all = { (uint64_t)(uintptr_t)p->addr, p->len, 0 };
	uint64_t chunk = p->o.chunk ? p->o.chunk : 64 * FAR_KIB;
	struct far_memory_conf mc = {
		.uffd = far_receivers_uffd(p->receivers),
		.pagemap = conf->given ? conf->given->pagemap : p->pagemap,
		.mem = -1,
		.foreign = conf->given != NULL,
		.range = conf->given ? conf->given->range : &all,
		.n = conf->given ? conf->given->n : 1,
		.bytes = p->bytes,
		.shift = (unsigned)__builtin_ctzll(chunk),
		.mechanism = p->mechanism,
		.tracking = p->tracking,
		.evicts = p->o.local_max != 0,
		.have = p->have,
		.alias = p->alias,
		.shared = p->shared,
		.remote = p->below,
		.victim = p->victim,
		.settle = far_receivers_settle_cb,
		.opaque = p->receivers,
	};

	if (conf->given)
		mc.mem = conf->given->mem;
	int e = far_memory_new(&mc, &p->memory, &p->store);
	return e ? far_error_set(err, -e, "no memory for a map of %s", p->source) : 0;
}

static int pointer_region(struct far_pointer *p, const struct far_pointer_conf *conf, struct far_error *err)
{
	struct far_region_conf rc = {
		.memory = far_memory_calls(p->memory),
		.remote = p->limbo ? p->limbo : p->below,
		.local = p->store,
		.local_is_zero = true,
		.ahead_only = !conf->managed || conf->borrowed,
		.remote_borrowed = !p->limbo, /* until all has succeeded: below stays the caller's if not */
		.opts = &p->o,
	};

	p->o.read_only = !p->writable;
	int e = far_region_open(&rc, &p->region, err);
	return e;
}

static int pointer_serve(struct far_pointer *p, struct far_error *err)
{
	struct far_member_conf mc = {
		.memory = p->memory,
		.region = p->region,
		.writable = p->writable,
		.ours = p->ours,
		.deadline = p->o.on_fail == FAR_ON_FAIL_WAIT ? FAR_NEVER : (p->o.deadline_ms ? p->o.deadline_ms : 30000) * FAR_MSEC,
		.source = p->source,
	};
	int e = far_member_add(p->receivers, &mc, &p->member);

	if (!e && p->tracking != FAR_TRACK_NONE && p->o.push_workers)
		e = far_thread_start(&p->looker, "far-look", pointer_look, p);
	return e ? far_error_set(err, -e, "cannot start to serve %s: %s", p->source, far_strerror(e)) : 0;
}

static int pointer_open_share(struct far_pointer *p, struct far_error *err)
{
	int fd, e = far_share(p->below, &fd);

	if (!e)
		e = pointer_mmap(p->o.address, p->len, pointer_prot(p), fd, &p->addr);
	if (e == -EEXIST)
		return far_error_set(err, EEXIST, "cannot map %s at %p: something of the program's is there already. Choose "
				     "another address, or none", p->source, p->o.address);
	return e ? far_error_set(err, -e, "cannot map the pages of %s: %s", p->source, far_strerror(e)) : 0;
}

static int pointer_open_segv(struct far_pointer *p, const struct far_pointer_conf *conf, struct far_error *err)
{
	int e = far_segv_pointer_open(conf, &p->segv, err);

	if (e)
		return e;
	p->region = far_segv_pointer_region(p->segv);
	p->addr = far_segv_pointer_addr(p->segv);
	return 0;
}

static int pointer_open_uffd(struct far_pointer *p, const struct far_pointer_conf *conf, struct far_error *err)
{
	int e = conf->given ? far_receivers_new(conf->given->uffd, conf->given->process >= 0, conf->ended, conf->opaque,
					       &p->receivers, err)
			    : far_receivers_get(p->have, &p->receivers, err);

	if (!e && conf->given)
		conf->given->uffd = -1;
	if (!e && p->ours) {
		p->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
		if (p->pagemap < 0)
			e = far_error_set(err, errno, "cannot open /proc/self/pagemap: %s; is /proc mounted?", far_strerror(errno));
	}
	if (!e && p->ours)
		e = pointer_map(p, err);
	if (!e && p->ours)
		e = pointer_register(p, err);
	if (!e)
		e = pointer_limbo(p, err);
	if (!e)
		e = pointer_memory(p, conf, err);
	if (!e)
		e = pointer_region(p, conf, err);
	return e ? e : pointer_serve(p, err);
}

int far_pointer_open(const struct far_pointer_conf *conf, struct far_pointer **out, struct far_error *err)
{
	struct far_pointer *p = calloc(1, sizeof *p);

	if (!p)
		return far_error_set(err, ENOMEM, "no memory for a map");
	p->o = *conf->opts;
	if (p->o.record_order) /* what came ahead of a touch would never be seen to be touched */
		p->o.pull_workers = 0;
	p->below = conf->below;
	p->borrowed = conf->borrowed;
	p->writable = conf->writable;
	p->ours = !conf->given;
	p->bytes = far_size(conf->below);
	p->len = far_div_up(far_max(p->bytes, 1), POINTER_PAGE) * POINTER_PAGE;
	p->shared = p->pagemap = -1;
	p->given = (struct far_handover)FAR_HANDOVER_INIT;
	p->source = strdup(conf->source ? conf->source : "the region");
	far_mutex_init(&p->lock);
	far_cond_init(&p->wake);
	int e = p->source ? pointer_settle(p, conf, err) : far_error_set(err, ENOMEM, "no memory for a map");
	if (!e)
		e = p->mechanism == FAR_MECH_SHARE ? pointer_open_share(p, err) :
		    p->mechanism == FAR_MECH_SIGSEGV ? pointer_open_segv(p, conf, err) : pointer_open_uffd(p, conf, err);
	if (e) {
		p->borrowed = true; /* below stays the caller's */
		p->failed = true;
		far_pointer_stop(p);
		far_pointer_close(p);
		return e;
	}
	if (p->victim && !p->borrowed)
		far_victim_own(p->victim);
	else if (p->region && !p->segv && !p->borrowed)
		far_region_own_remote(p->region);
	if (conf->given) { /* all but the userfaultfd, which the receivers have */
		p->given = *conf->given;
		*conf->given = (struct far_handover)FAR_HANDOVER_INIT;
	}
	*out = p;
	return 0;
}

/* ------------------------------------------------------------------------------------------------------------- close */

void far_pointer_stop(struct far_pointer *p)
{
	if (p->member && p->o.on_fail == FAR_ON_FAIL_WAIT && !p->failed)
		far_member_wait_idle(p->member, far_now() + (p->o.deadline_ms ? p->o.deadline_ms : 30000) * FAR_MSEC);
	far_mutex_lock(&p->lock);
	p->stopped = true;
	far_cond_broadcast(&p->wake);
	far_mutex_unlock(&p->lock);
	if (p->member)
		far_member_stop(p->member);
	if (p->segv) {
		far_segv_pointer_stop(p->segv);
	} else if (p->region) {
		far_region_stop(p->region);
		far_region_join(p->region);
	} else if (p->below && p->mechanism == FAR_MECH_SHARE && !p->borrowed) {
		far_stop(p->below);
	}
	far_thread_join(&p->looker);
}

/* Where it lies by now; the program may have moved pieces. */
static void pointer_unmap(struct far_pointer *p)
{
	if (!p->ours || !p->addr || p->segv)
		return;
	if (!p->memory) {
		munmap(p->addr, (size_t)p->len);
		return;
	}
	for (uint64_t off = 0, n; off < p->len; off += n) {
		uint64_t addr = far_memory_addr(p->memory, off, &n);
		n = far_min(n, p->len - off);
		if (addr)
			munmap((void *)(uintptr_t)addr, (size_t)n);
	}
}

void far_pointer_close(struct far_pointer *p)
{
	if (!p)
		return;
	pointer_unmap(p); /* threads that fault now find nothing there */
	if (p->member && !p->ours)
		far_memory_leave(p->memory, p->region);
	if (p->member)
		far_member_remove(p->member);
	if (p->segv)
		far_segv_pointer_close(p->segv);
	else if (p->region)
		far_region_close(p->region); /* the memory and what is below go with it */
	else if (p->store)
		far_close(p->store);
	if (!p->region && p->limbo)
		far_close(p->limbo);
	if (!p->region && !p->borrowed)
		far_close(p->below);
	far_receivers_put(p->receivers);
	if (p->alias)
		munmap(p->alias, (size_t)(far_div_up(p->len, FAR_STAGE) * FAR_STAGE));
	far_fd_close(&p->shared);
	far_fd_close(&p->pagemap);
	far_handover_fini(&p->given);
	far_cond_fini(&p->wake);
	far_mutex_fini(&p->lock);
	free(p->source);
	free(p);
}

/* --------------------------------------------------------------------------------------------------------- operations */

void *far_pointer_addr(const struct far_pointer *p)
{
	return p->addr;
}

struct far_region *far_pointer_region(struct far_pointer *p)
{
	return p->region;
}

int far_pointer_flush(struct far_pointer *p)
{
	int err = p->member && p->writable ? far_member_settle(p->member) : 0;

	if (p->region)
		return err ? err : far_region_flush(p->region);
	return p->writable ? far_flush(p->below) : 0;
}

/* What is zero has no page yet. */
static int pointer_show(struct far_pointer *p, uint64_t off, uint64_t end)
{
	const int pagemap = p->ours ? p->pagemap : p->given.pagemap;
	bool here[64];
	int err = 0;

	for (uint64_t n; off < end && !err; off += n) {
		uint64_t together, addr = far_memory_addr(p->memory, off, &together);
		n = far_min(far_min(end - off, together), FAR_ARRAY_LEN(here) * POINTER_PAGE);
		if (!addr || pagemap < 0)
			continue;
		err = far_uffd_present(pagemap, addr, n, here);
		for (uint64_t k = 0; k < n / POINTER_PAGE && !err; k++) {
			if (here[k] || !far_region_hold(p->region, off + k * POINTER_PAGE))
				continue;
			err = far_memory_appear(p->memory, addr + k * POINTER_PAGE);
			far_region_release(p->region, off + k * POINTER_PAGE);
			if (err == -ENODATA) /* the program has dropped it meanwhile: its next touch fetches it */
				err = 0;
		}
	}
	return err;
}

int far_pointer_populate(struct far_pointer *p, uint64_t off, uint64_t len)
{
	uint64_t from = off / POINTER_PAGE * POINTER_PAGE;
	uint64_t end = far_min(far_div_up(off + len, POINTER_PAGE) * POINTER_PAGE, p->len);
	uint64_t old;
	int err;

	if (!p->region)
		return madvise(p->addr + from, (size_t)(end - from), MADV_WILLNEED) ? -errno : 0;
	old = far_deadline_limit(p->o.on_fail == FAR_ON_FAIL_WAIT ? FAR_NEVER : far_now() + (p->o.deadline_ms ? p->o.deadline_ms : 30000) * FAR_MSEC);
	err = p->segv ? far_segv_pointer_populate(p->segv, off, len) : far_region_wait(p->region, off, len);
	if (!err && !p->segv)
		err = pointer_show(p, from, end);
	far_deadline_restore(old);
	return err;
}

/* A store like the program's own, at less than a page, but one that ends with an error where the program's raises SIGBUS. */
static int pointer_store_zeros(struct far_pointer *p, uint64_t off, uint64_t len)
{
	static const char zeros[POINTER_PAGE];
	int err = 0;

	for (unsigned tries = 0; len && tries < POINTER_TRIES && !err; tries++) {
		uint64_t n, addr = far_memory_addr(p->memory, off, &n);
		struct iovec from = { (void *)(uintptr_t)zeros, (size_t)len }, to = { (void *)(uintptr_t)addr, (size_t)len };
		if (!addr || n < len)
			return -EFAULT; /* the program has unmapped it */
		err = far_pointer_populate(p, off, len);
		if (!err && process_vm_writev(getpid(), &from, 1, &to, 1, 0) == (ssize_t)len)
			return 0;
	}
	return err ? err : len ? -EIO : 0;
}

int far_pointer_discard(struct far_pointer *p, uint64_t off, uint64_t len)
{
	uint64_t end = off + len, a = far_min(far_div_up(off, POINTER_PAGE) * POINTER_PAGE, end);
	uint64_t b = end == p->bytes ? end : far_max(end / POINTER_PAGE * POINTER_PAGE, a);

	if (!p->region)
		return far_discard(p->below, off, len, 0);
	if (!p->ours)
		return -EOPNOTSUPP;
	int err = pointer_store_zeros(p, off, a - off);
	if (!err)
		err = pointer_store_zeros(p, b, end - b);
	if (err)
		return err;
	return a < b ? far_zero(far_region_backend(p->region), a, b - a, 0) : 0;
}

int far_pointer_heal(struct far_pointer *p, uint64_t off, uint64_t len)
{
	uint64_t end = off + len, at = off / POINTER_PAGE * POINTER_PAGE, bad, n, last = UINT64_MAX;
	unsigned tries = 0;
	int err = 0;

	if (!p->memory) /* nothing stays poisoned: each touch tries anew */
		return 0;
	uint64_t old = far_deadline_limit(far_now() + (p->o.deadline_ms ? p->o.deadline_ms : 30000) * FAR_MSEC);
	while (!err && far_memory_next_poison(p->memory, at, end, &bad)) {
		tries = bad == last ? tries + 1 : 0;
		at = last = bad;
		if (tries > 3)
			err = -EIO;
		else if (!far_region_hold(p->region, bad))
			err = far_region_wait(p->region, bad, 1);
		else { /* it came when it had been given up */
			uint64_t addr = far_memory_addr(p->memory, bad, &n);
			err = p->writable && addr ? far_memory_appear(p->memory, addr) : 0;
			far_region_release(p->region, bad);
			if (!err && !p->writable)
				err = far_region_refresh(p->region, bad, 1);
		}
	}
	far_deadline_restore(old);
	return err;
}

int far_pointer_stored(struct far_pointer *p, uint64_t off, uint64_t len)
{
	uint64_t from = off / POINTER_PAGE * POINTER_PAGE;

	if (p->memory)
		far_memory_suspect(p->memory, from, far_div_up(off + len - from, POINTER_PAGE) * POINTER_PAGE);
	return 0;
}

int far_pointer_refresh(struct far_pointer *p, uint64_t off, uint64_t len)
{
	if (p->segv)
		return far_segv_pointer_refresh(p->segv, off, len);
	if (!p->region)
		return 0;
	if (p->victim)
		far_victim_pause(p->victim);
	int err = far_region_refresh(p->region, off, len);
	if (p->victim)
		far_victim_resume(p->victim);
	return err;
}

void far_pointer_status(struct far_pointer *p, struct far_status *st)
{
	struct far_status s = FAR_STATUS_INIT;
	size_t size = st->size;

	if (p->region) {
		far_region_status(p->region, &s);
		if (p->segv)
			far_segv_pointer_status(p->segv, &s);
		else
			far_member_status(p->member, &s);
		s.poisoned = p->memory ? far_memory_poisoned(p->memory) : 0;
	} else {
		s.bytes = s.local = p->bytes;
	}
	s.mechanism = p->mechanism;
	s.tracking = p->tracking;
	s.kernel_faults = p->mechanism == FAR_MECH_SHARE || (!p->segv && (p->have & FAR_UFFD_KERNEL));
	s.outside = !p->ours;
	s.size = size;
	memcpy(st, &s, far_min(size, sizeof s));
}
