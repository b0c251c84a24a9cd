/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Pointers: the same checks, with loads and stores in place of calls. A subject "pointer-KIND" is that kind of face.c. */
#define _GNU_SOURCE
#include "contract.h"

#include "../pointer/face.h"

#include <stdio.h>
#include <string.h>

static const struct face_kind *pointer_kind(const struct contract_subject *s)
{
	return face_kind_find(s->flags & CONTRACT_SPARSE ? "managed" : s->name + strlen("pointer-"));
}

static const char *pointer_lacks(const struct contract_subject *s)
{
	return face_kind_lacks(pointer_kind(s));
}

static int pointer_open(const struct contract_subject *s, const char *dir, uint64_t bytes,
			const struct far_open_opts *opts, struct far_backend **b, void **ctx)
{
	const struct face_kind *k = pointer_kind(s);
	struct far_mount_opts mo = FAR_MOUNT_OPTS_INIT;
	struct far_error err = { .text = "" };
	struct far_backend *remote;
	struct far_mount *m;
	char room[40];
	void *none;

	face_kind_apply(k, &mo, bytes, room, sizeof room);
	mo.chunk = s->flags & CONTRACT_SPARSE ? FAR_MIB : 4096;
	mo.read_only = opts->read_only;
	mo.pull_workers = !k->managed || s->flags & CONTRACT_SPARSE ? 0 : 2;
	mo.push_interval_ms = 1;
	mo.follow_ms = UINT32_MAX;
	int e = contract_open_uri(s, dir, bytes, opts, &remote, &none);
	if (e)
		return e;
	e = face_map(k, remote, &mo, &m, &err);
	if (e) {
		fprintf(stderr, "%s\n", err.text);
		far_close(remote);
		return e;
	}
	*ctx = NULL;
	e = face_new(m, bytes, opts->read_only, b);
	if (e)
		far_mount_close(m);
	return e;
}

#define POINTER(n, f, ...) \
	{ .name = "pointer-" n, .open = pointer_open, .lacks = pointer_lacks, .uri = "mem:%s", .flags = f, .layers = { __VA_ARGS__ } }

const struct contract_subject contract_pointer[] = {
	POINTER("share", CONTRACT_SLOW),
	POINTER("auto", CONTRACT_SLOW),
	POINTER("copy-async", CONTRACT_SLOW),
	POINTER("copy-sync", CONTRACT_SLOW),
	POINTER("copy-hash", CONTRACT_SLOW),
	POINTER("continue-sync", CONTRACT_SLOW),
	POINTER("managed", CONTRACT_SLOW),
	POINTER("managed-hash", CONTRACT_SLOW, "strict:chunk=4096"),
	POINTER("local", CONTRACT_SLOW),
	POINTER("local-sync", CONTRACT_SLOW, "delay:rtt=100us,jitter=100us"),
	POINTER("sparse", CONTRACT_SLOW | CONTRACT_SPARSE | CONTRACT_BLIND),
	{ .name = NULL },
};
