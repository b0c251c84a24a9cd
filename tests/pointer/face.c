/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "face.h"

#include "backend/backend.h"
#include "frontend/uffd.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ASYNC (FAR_UFFD_ANY | FAR_UFFD_WP_ASYNC | FAR_UFFD_SCAN)
#define HUGE_ONES (FAR_UFFD_ANY | FAR_UFFD_MINOR | FAR_UFFD_HUGE)
#define HUGE_ARMED (HUGE_ONES | FAR_UFFD_WP_SHMEM | FAR_UFFD_MINOR_WP)

const struct face_kind face_kinds[] = {
	{ .name = "auto" },
	{ .name = "share", .mechanism = FAR_MECH_SHARE },
	{ .name = "copy-async", .mechanism = FAR_MECH_COPY, .tracking = FAR_TRACK_ASYNC, .need = ASYNC },
	{ .name = "copy-sync", .mechanism = FAR_MECH_COPY, .tracking = FAR_TRACK_SYNC, .need = FAR_UFFD_ANY | FAR_UFFD_WP },
	{ .name = "copy-hash", .mechanism = FAR_MECH_COPY, .tracking = FAR_TRACK_HASH, .need = FAR_UFFD_ANY, .choosy = true },
	{ .name = "continue-sync", .mechanism = FAR_MECH_CONTINUE, .tracking = FAR_TRACK_SYNC,
	  .need = HUGE_ARMED | FAR_UFFD_WP },
	{ .name = "continue-hash", .mechanism = FAR_MECH_CONTINUE, .tracking = FAR_TRACK_HASH, .need = HUGE_ONES },
	{ .name = "move-hash", .mechanism = FAR_MECH_MOVE, .tracking = FAR_TRACK_HASH, .need = FAR_UFFD_ANY | FAR_UFFD_MOVE },
	{ .name = "managed", .managed = true },
	{ .name = "managed-sync", .managed = true, .mechanism = FAR_MECH_COPY, .tracking = FAR_TRACK_SYNC,
	  .need = FAR_UFFD_ANY | FAR_UFFD_WP },
	{ .name = "managed-hash", .managed = true, .tracking = FAR_TRACK_HASH, .need = FAR_UFFD_ANY, .choosy = true },
	{ .name = "local", .managed = true, .local = true },
	{ .name = "local-sync", .managed = true, .local = true, .mechanism = FAR_MECH_COPY, .tracking = FAR_TRACK_SYNC,
	  .need = FAR_UFFD_ANY | FAR_UFFD_WP },
	{ .name = "move", .mechanism = FAR_MECH_MOVE, .need = FAR_UFFD_ANY | FAR_UFFD_MOVE, .read_only = true },
	{ .name = "sigsegv", .mechanism = FAR_MECH_SIGSEGV, .read_only = true, .choosy = true },
	{ .name = NULL },
};

const struct face_kind *face_kind_find(const char *name)
{
	for (const struct face_kind *k = face_kinds; k->name; k++)
		if (!strcmp(k->name, name))
			return k;
	fprintf(stderr, "no kind of pointer is called %s\n", name);
	abort();
}

const char *face_kind_lacks(const struct face_kind *k)
{
	static _Thread_local char text[200];
	unsigned lacks = k->need & ~far_uffd_have();
	size_t at = 0;

	if (!lacks)
		return NULL;
	for (unsigned bit = 1; bit <= lacks; bit <<= 1)
		if ((lacks & bit) && at < sizeof text)
			at += (size_t)snprintf(text + at, sizeof text - at, "%s%s", at ? ", " : "", far_uffd_word(bit));
	return text;
}

void face_kind_apply(const struct face_kind *k, struct far_mount_opts *o, uint64_t bytes, char *room, size_t cap)
{
	o->mode = k->managed ? FAR_MODE_MANAGED : FAR_MODE_DIRECT;
	o->mechanism = k->mechanism;
	o->tracking = k->tracking;
	o->read_only |= k->read_only;
	if (k->local) {
		snprintf(room, cap, "mem:%" PRIu64, bytes);
		o->local = room;
	}
}

int face_map(const struct face_kind *k, struct far_backend *remote, const struct far_mount_opts *o, struct far_mount **m,
	     struct far_error *err)
{
	struct far_status st = FAR_STATUS_INIT;
	int r = far_map(remote, o, m, err);

	if (r)
		return r;
	r = far_mount_status(*m, &st);
	if (r || st.bytes == 0)
		return r;
	if ((o->mechanism != FAR_MECH_AUTO && st.mechanism != o->mechanism) ||
	    (o->tracking != FAR_TRACK_AUTO && !o->read_only && st.tracking != o->tracking)) {
		fprintf(stderr, "%s: asked for mechanism %d and tracking %d, status says %d and %d\n", k->name, o->mechanism,
			o->tracking, st.mechanism, st.tracking);
		abort();
	}
	return 0;
}

/* ------------------------------------------------------------------------------------------------------ touching */

static _Thread_local sigjmp_buf *volatile face_way_out; /* a store before memcpy() that nobody reads would be dropped */

static void face_bus(int sig)
{
	if (face_way_out)
		siglongjmp(*face_way_out, 1);
	signal(sig, SIG_DFL); /* not while copying: a bug, die by it */
}

static void face_catch(void)
{
	struct sigaction sa = { .sa_handler = face_bus, .sa_flags = SA_NODEFER };

	sigemptyset(&sa.sa_mask);
	sigaction(SIGBUS, &sa, NULL);
	sigaction(SIGSEGV, &sa, NULL); /* while a page is healed that another mapping had made poison */
}

void face_ready(void)
{
	static _Thread_local bool ready;
	struct sigaction now;
	sigset_t touch;

	/* cmocka puts handlers of its own in place before each test. */
	if (sigaction(SIGBUS, NULL, &now) == 0 && now.sa_handler != face_bus)
		face_catch();
	if (ready)
		return;
	sigemptyset(&touch);
	sigaddset(&touch, SIGBUS);
	sigaddset(&touch, SIGSEGV);
	pthread_sigmask(SIG_UNBLOCK, &touch, NULL);
	ready = true;
}

int face_copy(void *to, const void *from, size_t len)
{
	sigjmp_buf out;

	face_ready();
	if (sigsetjmp(out, 1)) {
		face_way_out = NULL;
		return -EIO;
	}
	face_way_out = &out;
	memcpy(to, from, len);
	face_way_out = NULL;
	return 0;
}

int face_zero(void *to, size_t len)
{
	sigjmp_buf out;

	face_ready();
	if (sigsetjmp(out, 1)) {
		face_way_out = NULL;
		return -EIO;
	}
	face_way_out = &out;
	memset(to, 0, len);
	face_way_out = NULL;
	return 0;
}

int face_peek(const unsigned char *p)
{
	unsigned char c;
	int r = face_copy(&c, p, 1);

	return r ? r : c;
}

/* ----------------------------------------------------------------------------------------------------- a backend */

struct face {
	struct far_mount *m;
	char *p;
};

static int face_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct face *f = self;

	return face_copy(buf, f->p + off, len);
}

static int face_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct face *f = self;

	return face_copy(f->p + off, buf, len);
}

static int face_flush(void *self)
{
	struct face *f = self;

	return far_mount_flush(f->m);
}

static int face_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct face *f = self;

	return far_mount_discard(f->m, off, len);
}

static int face_clear(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct face *f = self;

	return face_zero(f->p + off, (size_t)len);
}

static void face_close(void *self)
{
	struct face *f = self;

	far_mount_close(f->m);
	free(f);
}

int face_new(struct far_mount *m, uint64_t bytes, bool read_only, struct far_backend **face)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = face_read, .write = face_write, .flush = face_flush,
					    .discard = face_discard, .zero = face_clear, .close = face_close };
	struct far_facts facts = { .size = sizeof facts, .bytes = bytes, .caps = read_only ? 0 : FAR_CAP_WRITE };
	struct face *f = malloc(sizeof *f);

	if (!f)
		return -ENOMEM;
	*f = (struct face){ .m = m, .p = far_addr(m) };
	int r = far_backend_new(&ops, f, &facts, face);
	if (r)
		free(f);
	return r;
}
