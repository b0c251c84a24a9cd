/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Managed regions: a remote, a local store, and everything between them, against the same checks as a plain backend. */
#define _GNU_SOURCE
#include "contract.h"

#include "region/region.h"

#include <stdio.h>

static int managed_open(const struct contract_subject *s, const char *dir, uint64_t bytes,
			const struct far_open_opts *opts, struct far_backend **b, void **ctx)
{
	struct far_mount_opts mo = FAR_MOUNT_OPTS_INIT;
	struct far_region_conf conf = { .opts = &mo, .local_is_zero = true };
	struct far_region *r;
	struct far_error err = { .text = "" };
	void *none;
	char uri[40];

	mo.chunk = s->flags & CONTRACT_SPARSE ? FAR_MIB : 4096;
	mo.read_only = opts->read_only;
	mo.pull_workers = s->flags & CONTRACT_SPARSE ? 0 : 3;
	mo.push_interval_ms = 1;
	mo.max_partial = 4;
	snprintf(uri, sizeof uri, "mem:%" PRIu64, bytes);
	int e = contract_open_uri(s, dir, bytes, opts, &conf.remote, &none);
	if (e)
		return e;
	e = far_open(uri, NULL, &conf.local, &err);
	if (!e)
		e = far_region_open(&conf, &r, &err);
	if (e) {
		fprintf(stderr, "%s\n", err.text);
		far_close(conf.local);
		far_close(conf.remote);
		return e;
	}
	*b = far_region_backend(r);
	*ctx = r;
	return 0;
}

static void managed_close(void *ctx)
{
	far_region_close(ctx);
}

const struct contract_subject contract_managed[] = {
	{ .name = "managed", .open = managed_open, .close = managed_close, .uri = "mem:%s", .flags = CONTRACT_CLOSES },
	{ .name = "managed-sparse", .open = managed_open, .close = managed_close, .uri = "mem:%s",
	  .flags = CONTRACT_CLOSES | CONTRACT_SPARSE | CONTRACT_BLIND },
	{ .name = "managed-delay", .open = managed_open, .close = managed_close, .uri = "mem:%s",
	  .layers = { "delay:rtt=200us,jitter=200us" }, .flags = CONTRACT_CLOSES | CONTRACT_SLOW },
	{ .name = "managed-fault", .open = managed_open, .close = managed_close, .uri = "mem:%s",
	  .layers = { "fault:every=3", "retry:backoff=50us,max-backoff=100us,budget=1000000" },
	  .flags = CONTRACT_CLOSES | CONTRACT_SLOW },
	{ .name = NULL },
};
