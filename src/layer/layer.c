/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct far_layer *const far_layers[] = {
	&far_layer_chunked,
	&far_layer_delay,
	&far_layer_fault,
	&far_layer_gated,
	&far_layer_retry,
	&far_layer_strict,
	&far_layer_tracked,
	NULL,
};

static const struct far_layer *layer_find(const char *name, size_t len)
{
	for (const struct far_layer *const *l = far_layers; *l; l++)
		if (strlen((*l)->name) == len && !memcmp((*l)->name, name, len))
			return *l;
	return NULL;
}

int far_layer_new(const struct far_layer *l, const struct far_ops *ops, void *self, const struct far_facts *facts,
		  struct far_backend **out, struct far_error *err)
{
	int r = far_backend_new(ops, self, facts, out);
	return r ? far_error_set(err, -r, "layer %s: %s.", l->name, far_strerror(r)) : 0;
}

static int layer_unknown(const char *name, size_t len, struct far_error *err)
{
	char known[200] = "";
	size_t at = 0;

	for (const struct far_layer *const *l = far_layers; *l && at < sizeof known; l++)
		at += (size_t)snprintf(known + at, sizeof known - at, "%s%s", at ? ", " : "", (*l)->name);
	return far_error_set(err, EINVAL, "unknown layer '%.*s'. The known ones are %s.", (int)far_min(len, 60), name, known);
}

int far_layer_open(const char *spec, struct far_backend *inner, struct far_backend **out, struct far_error *err)
{
	size_t len = strcspn(spec, ":");
	const struct far_layer *l = layer_find(spec, len);
	char where[80];

	if (!l)
		return layer_unknown(spec, len, err);
	void *conf = calloc(1, l->conf_size ? l->conf_size : 1);
	if (!conf)
		return far_error_set(err, ENOMEM, "layer %s: %s.", l->name, far_strerror(ENOMEM));
	if (l->defaults)
		l->defaults(conf);
	snprintf(where, sizeof where, "layer %s", l->name);
	int r = far_opt_parse(l->options, conf, where, spec[len] ? spec + len + 1 : "", ',', false, err);
	if (!r)
		r = l->open(conf, inner, out, err);
	far_opt_fini(l->options, conf);
	free(conf);
	return r;
}
