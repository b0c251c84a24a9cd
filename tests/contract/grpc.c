/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The gRPC wire: a server of ours over memory, file or directory, and the client as it is opened by its URI. */
#define _GNU_SOURCE
#include "contract.h"

#include <stdio.h>
#include <stdlib.h>

struct served {
	struct far_backend *below;
	struct far_server *server;
};

static void served_close(void *ctx)
{
	struct served *v = ctx;

	far_server_stop(v->server);
	far_server_free(v->server);
	far_close(v->below);
	free(v);
}

static int served_open(const struct contract_subject *s, const char *dir, uint64_t bytes,
		       const struct far_open_opts *opts, struct far_backend **b, void **ctx)
{
	struct served *v = calloc(1, sizeof *v);
	struct far_server_opts so = FAR_SERVER_OPTS_INIT;
	struct far_open_opts rw = FAR_OPEN_OPTS_INIT;
	struct far_error err = { .text = "" };
	char *bound = NULL;
	void *none;

	int r = v ? contract_open_uri(s, dir, bytes, &rw, &v->below, &none) : -ENOMEM;
	if (!r)
		r = far_server_new(&so, &v->server, &err);
	if (!r)
		r = far_server_export(v->server, "default", v->below, &err);
	if (!r)
		r = far_server_listen(v->server, "grpc://127.0.0.1:0", &bound, &err);
	if (!r)
		r = far_open(bound, opts, b, &err);
	free(bound);
	if (r) {
		fprintf(stderr, "%s\n", err.text);
		if (v)
			served_close(v);
		return r;
	}
	*ctx = v;
	return 0;
}

const struct contract_subject contract_grpc[] = {
	{ .name = "grpc-mem", .open = served_open, .close = served_close, .uri = "mem:%s",
	  .flags = CONTRACT_SLOW | CONTRACT_SPARSE },
	{ .name = "grpc-file", .open = served_open, .close = served_close, .uri = "file:%d/x?size=%s", .flags = CONTRACT_SLOW },
	{ .name = "grpc-dir", .open = served_open, .close = served_close, .uri = "dir:%d?size=%s", .flags = CONTRACT_SLOW },
	{ .name = "grpc-strict", .open = served_open, .close = served_close, .uri = "mem:%s", .layers = { "strict:chunk=1000" },
	  .flags = CONTRACT_SLOW },
	{ .name = NULL },
};
