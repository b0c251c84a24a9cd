/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * How a pointer gets its bytes and how its stores are found: chosen once, from what the kernel can do, the region and the
 * options. The order is that of speed; each kind is left out for a reason that stands beside it. What the caller forces is
 * taken, or refused with that reason.
 */
#define _GNU_SOURCE
#include "frontend/pointer.h"

#include "frontend/uffd.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define CHOOSE_HUGE (2 * FAR_MIB)

struct choose {
	unsigned have;
	const struct far_facts *facts;
	const struct far_mount_opts *opts;
	bool writable, managed;
};

const char *far_mechanism_word(enum far_mechanism m)
{
	static const char *const words[] = { "auto", "share", "move", "continue", "copy", "sigsegv" };

	return (unsigned)m < FAR_ARRAY_LEN(words) ? words[m] : "?";
}

const char *far_tracking_word(enum far_tracking t)
{
	static const char *const words[] = { "auto", "none", "async", "sync", "hash" };

	return (unsigned)t < FAR_ARRAY_LEN(words) ? words[t] : "?";
}

/* Why not: NULL, or the reason. `forced`: what merely makes no sense is allowed. */
static const char *choose_share(const struct choose *c, bool forced)
{
	if (!(c->facts->caps & FAR_CAP_SHARE))
		return "the backend has no pages of its own to map";
	if (c->managed)
		return "a managed region has a local copy";
	if (c->opts->inherit)
		return "a child would change the region itself, not a copy";
	if (c->opts->outside)
		return "there is nothing to serve";
	if (c->opts->local_max)
		return "the pages are the backend's, local_max cannot bound them";
	if (!forced && (c->opts->record_order || c->opts->chunk_local || c->opts->priority))
		return "no touch would be seen, and the options ask for that";
	return NULL;
}

static const char *choose_uffd(const struct choose *c)
{
	return c->have & FAR_UFFD_ANY ? NULL : far_uffd_why()[0] ? far_uffd_why() : "userfaultfd does not work here";
}

static const char *choose_move(const struct choose *c, bool forced)
{
	const char *no = choose_uffd(c);

	if (no)
		return no;
	if (!(c->have & FAR_UFFD_MOVE))
		return "this kernel has no UFFDIO_MOVE (6.8)";
	if (forced)
		return NULL;
	if (!(c->have & FAR_UFFD_THP))
		return "there are no transparent huge pages";
	if (!c->writable)
		return "pages move between writable mappings only, and a read-only map shall not be written to";
	if (!(c->have & FAR_UFFD_WP_ASYNC))
		return "moved pages cannot be write-protected as they appear, and this kernel does not note written pages (6.7)";
	if (c->opts->local_max)
		return "local_max is kept chunk by chunk, which would split every huge page";
	if (c->opts->outside)
		return "pages move inside one process only";
	if (c->facts->bytes < CHOOSE_HUGE)
		return "the region is smaller than a huge page";
	return NULL;
}

static const char *choose_continue(const struct choose *c, bool forced)
{
	const char *no = choose_uffd(c);

	if (no)
		return no;
	if (!(c->have & FAR_UFFD_MINOR))
		return "this kernel has no minor faults of shared memory (5.14)";
	if (!(c->have & FAR_UFFD_HUGE))
		return "there is no shared memory in huge pages";
	if (c->opts->inherit)
		return "a child would share the memory, not have a copy";
	if (c->opts->outside)
		return "the other process could not fill it through a second mapping";
	if (forced)
		return NULL;
	if (c->writable && (c->have & (FAR_UFFD_WP_SHMEM | FAR_UFFD_MINOR_WP)) != (FAR_UFFD_WP_SHMEM | FAR_UFFD_MINOR_WP))
		return "UFFDIO_CONTINUE cannot write-protect pages as they appear (6.4)";
	if (c->writable && (c->have & FAR_UFFD_WP_ASYNC))
		return "stores into shared memory would each time be a fault first; of private memory the kernel notes them";
	if (c->opts->local_max || !c->managed || !c->opts->pull_workers)
		return "memory is taken 2 MiB at a time, which suits what will be here as a whole";
	if (c->facts->bytes < CHOOSE_HUGE)
		return "the region is smaller than a huge page";
	return NULL;
}

static const char *choose_sigsegv(const struct choose *c, bool forced)
{
	if (c->writable)
		return "SIGSEGV and mprotect(2) serve read-only maps";
	if (c->opts->inherit || c->opts->outside)
		return "SIGSEGV and mprotect(2) serve the program itself only";
	if (!forced && (c->have & FAR_UFFD_ANY))
		return "userfaultfd works";
	return NULL;
}

static const char *choose_not(const struct choose *c, enum far_mechanism m, bool forced)
{
	switch (m) {
	case FAR_MECH_SHARE:
		return choose_share(c, forced);
	case FAR_MECH_MOVE:
		return choose_move(c, forced);
	case FAR_MECH_CONTINUE:
		return choose_continue(c, forced);
	case FAR_MECH_COPY:
		return choose_uffd(c);
	case FAR_MECH_SIGSEGV:
		return choose_sigsegv(c, forced);
	default:
		return "there is no such mechanism";
	}
}

enum far_mechanism far_pointer_choose(unsigned have, const struct far_facts *f, const struct far_mount_opts *o, bool writable,
				      bool managed)
{
	struct choose c = { have, f, o, writable, managed };

	if (o->mechanism != FAR_MECH_AUTO)
		return o->mechanism;
	for (enum far_mechanism m = FAR_MECH_SHARE; m <= FAR_MECH_SIGSEGV; m++)
		if (!choose_not(&c, m, false))
			return m;
	return FAR_MECH_AUTO;
}

/* Why stores cannot be found this way; NULL: they can. */
static const char *choose_no_tracking(unsigned have, enum far_mechanism m, enum far_tracking t, const struct far_mount_opts *o,
				      bool forced)
{
	unsigned shmem = FAR_UFFD_WP_SHMEM | FAR_UFFD_MINOR_WP;

	if (t == FAR_TRACK_NONE)
		return "the map is writable";
	if (t != FAR_TRACK_SYNC && o->local_max && m != FAR_MECH_CONTINUE && !(have & FAR_UFFD_MOVE))
		return "chunks could not be given back under a program that stores into them: that needs UFFDIO_MOVE (6.8), or "
		       "synchronous tracking";
	if (t == FAR_TRACK_HASH)
		return NULL;
	if (t != FAR_TRACK_ASYNC && t != FAR_TRACK_SYNC)
		return "there is no such tracking";
	if (m == FAR_MECH_MOVE && t == FAR_TRACK_SYNC)
		return "moved pages cannot be write-protected as they appear; async and hash work";
	if (m == FAR_MECH_CONTINUE && (have & shmem) != shmem)
		return "this kernel does not write-protect shared memory as it appears (6.4); hash works";
	if (t == FAR_TRACK_ASYNC && m == FAR_MECH_CONTINUE) /* memory pressure, MADV_PAGEOUT, a huge page that is split */
		return "the kernel forgets that a shared page was written when it takes it out of the page tables; sync works";
	if (t == FAR_TRACK_ASYNC && !(have & FAR_UFFD_WP_ASYNC))
		return "this kernel does not note written pages (6.7)";
	if (t == FAR_TRACK_SYNC && !(have & FAR_UFFD_WP))
		return "this kernel has no write-protection by userfaultfd (5.7)";
	if (t == FAR_TRACK_SYNC && !forced && !(have & FAR_UFFD_KERNEL))
		return "system calls that store into clean pages would fail with EFAULT";
	return NULL;
}

enum far_tracking far_pointer_tracking(unsigned have, enum far_mechanism m, const struct far_mount_opts *o, bool writable)
{
	if (!writable || m == FAR_MECH_SHARE || m == FAR_MECH_SIGSEGV)
		return FAR_TRACK_NONE;
	if (o->tracking != FAR_TRACK_AUTO)
		return o->tracking;
	if (!choose_no_tracking(have, m, FAR_TRACK_ASYNC, o, false))
		return FAR_TRACK_ASYNC;
	if (!choose_no_tracking(have, m, FAR_TRACK_SYNC, o, false))
		return FAR_TRACK_SYNC;
	return FAR_TRACK_HASH;
}

int far_pointer_settle(unsigned have, const struct far_facts *f, const struct far_mount_opts *o, bool writable, bool managed,
		       enum far_mechanism *m, enum far_tracking *t, struct far_error *err)
{
	struct choose c = { have, f, o, writable, managed };
	const char *no;

	*m = far_pointer_choose(have, f, o, writable, managed);
	if (*m == FAR_MECH_AUTO)
		return far_error_set(err, EOPNOTSUPP, "a writable pointer needs userfaultfd: %s; a read-only one would do without",
				     choose_uffd(&c));
	no = choose_not(&c, *m, true);
	if (no)
		return far_error_set(err, EOPNOTSUPP, "the mechanism '%s' cannot be used: %s; leave the choice to farpage",
				     far_mechanism_word(*m), no);
	*t = far_pointer_tracking(have, *m, o, writable);
	no = writable && *m != FAR_MECH_SHARE ? choose_no_tracking(have, *m, *t, o, true) : NULL;
	if (no)
		return far_error_set(err, EOPNOTSUPP, "the tracking '%s' cannot be used: %s; leave the choice to farpage",
				     far_tracking_word(*t), no);
	return 0;
}

const char *far_pointer_words(enum far_mechanism m)
{
	switch (m) {
	case FAR_MECH_SHARE:
		return "the backend's own pages, nothing is copied";
	case FAR_MECH_MOVE:
		return "huge pages, filled aside and moved in by UFFDIO_MOVE";
	case FAR_MECH_CONTINUE:
		return "huge shared memory, filled through a second mapping, UFFDIO_CONTINUE or MADV_COLLAPSE";
	case FAR_MECH_COPY:
		return "4 KiB pages by UFFDIO_COPY";
	case FAR_MECH_SIGSEGV:
		return "a handler of SIGSEGV and mprotect(2)";
	default:
		return "no pointer";
	}
}

const char *far_pointer_tracking_words(enum far_tracking t)
{
	switch (t) {
	case FAR_TRACK_ASYNC:
		return "stores are noted by the kernel, read with PAGEMAP_SCAN";
	case FAR_TRACK_SYNC:
		return "the first store to a page is a fault";
	case FAR_TRACK_HASH:
		return "stores are found by hashing all that is local";
	default:
		return "no stores to look for";
	}
}

const char *far_pointer_why_not(unsigned have, const struct far_facts *f, const struct far_mount_opts *o, bool writable,
				bool managed, enum far_mechanism m)
{
	struct choose c = { have, f, o, writable, managed };
	const char *no = choose_not(&c, m, false);

	return no ? no : "";
}
