/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * before_flush and before_close are asked at once and their answer counts. Chunks that became local and progress are
 * told by a thread of their own, many chunks in one message, so that the puller never waits for the program.
 */
#define _GNU_SOURCE
#include "cli/serve_hooks.h"

#include "base/clock.h"
#include "base/thread.h"
#include "mount/control.h"

#include <json-c/json.h>
#include <stdlib.h>

#define HOOKS_BATCH 512 /* ranges in a message; the puller waits when two messages' worth are untold */
#define HOOKS_PAUSE (5 * FAR_MSEC)

struct serve_hooks {
	const char *path;   /* fixed */
	struct far_thread thread;

	struct far_mutex lock;
	struct far_cond changed;
	struct {
		uint64_t off, len;
	} range[2 * HOOKS_BATCH];
	size_t n FAR_GUARDED_BY(lock);
	bool has_progress FAR_GUARDED_BY(lock), ending FAR_GUARDED_BY(lock);
	struct far_status progress FAR_GUARDED_BY(lock);
};

static int hooks_call(struct serve_hooks *h, struct json_object *req, const char *op, int timeout_ms)
{
	struct far_error err = { 0 };

	json_object_object_add(req, "op", json_object_new_string(op));
	int r = far_control_call(h->path, NULL, req, timeout_ms, NULL, &err);
	json_object_put(req);
	return r;
}

static int hooks_before_flush(void *opaque)
{
	return hooks_call(opaque, json_object_new_object(), "before-flush", -1);
}

static int hooks_before_close(void *opaque)
{
	return hooks_call(opaque, json_object_new_object(), "before-close", -1);
}

static void hooks_chunk_local(void *opaque, uint64_t off, uint64_t len)
{
	struct serve_hooks *h = opaque;

	far_mutex_lock(&h->lock);
	while (h->n == FAR_ARRAY_LEN(h->range) && !h->ending)
		far_cond_wait(&h->changed, &h->lock);
	if (h->n && h->range[h->n - 1].off + h->range[h->n - 1].len == off) {
		h->range[h->n - 1].len += len;
	} else if (h->n < FAR_ARRAY_LEN(h->range)) {
		h->range[h->n].off = off;
		h->range[h->n++].len = len;
	}
	far_cond_broadcast(&h->changed);
	far_mutex_unlock(&h->lock);
}

static void hooks_progress(void *opaque, const struct far_status *st)
{
	struct serve_hooks *h = opaque;

	far_mutex_lock(&h->lock);
	h->progress = *st;
	h->has_progress = true;
	far_cond_broadcast(&h->changed);
	far_mutex_unlock(&h->lock);
}

static struct json_object *hooks_ranges_locked(struct serve_hooks *h) FAR_REQUIRES(h->lock)
{
	struct json_object *req = json_object_new_object(), *list = json_object_new_array();
	size_t k, n = h->n < HOOKS_BATCH ? h->n : HOOKS_BATCH;

	for (k = 0; k < n; k++) {
		struct json_object *pair = json_object_new_array();
		json_object_array_add(pair, json_object_new_int64((int64_t)h->range[k].off));
		json_object_array_add(pair, json_object_new_int64((int64_t)h->range[k].len));
		json_object_array_add(list, pair);
	}
	for (; k < h->n; k++)
		h->range[k - n] = h->range[k];
	h->n -= n;
	json_object_object_add(req, "ranges", list);
	far_cond_broadcast(&h->changed);
	return req;
}

static void *hooks_main(void *arg)
{
	struct serve_hooks *h = arg;

	far_mutex_lock(&h->lock);
	for (;;) {
		while (!h->n && !h->has_progress && !h->ending)
			far_cond_wait(&h->changed, &h->lock);
		if (!h->n && !h->has_progress)
			break;
		if (!h->ending) /* a moment later there is more to tell in one message */
			far_cond_wait_until(&h->changed, &h->lock, far_now() + HOOKS_PAUSE);
		struct json_object *ranges = h->n ? hooks_ranges_locked(h) : NULL, *progress = NULL;
		if (h->has_progress && !h->n) {
			progress = far_control_status(&h->progress);
			h->has_progress = false;
		}
		far_mutex_unlock(&h->lock);
		if (ranges)
			hooks_call(h, ranges, "local", -1);
		if (progress)
			hooks_call(h, progress, "progress", -1);
		far_mutex_lock(&h->lock);
	}
	far_mutex_unlock(&h->lock);
	return NULL;
}

int serve_hooks_open(const char *path, struct far_mount_opts *o, struct serve_hooks **out, struct far_error *err)
{
	struct serve_hooks *h = calloc(1, sizeof *h);

	if (!h)
		return far_error_set(err, ENOMEM, "out of memory");
	h->path = path;
	far_mutex_init(&h->lock);
	far_cond_init(&h->changed);
	int r = far_thread_start(&h->thread, "far-hooks", hooks_main, h);
	if (r) {
		far_cond_fini(&h->changed);
		far_mutex_fini(&h->lock);
		free(h);
		return far_error_set(err, -r, "cannot start a thread: %s", far_strerror(r));
	}
	o->opaque = h;
	o->before_flush = hooks_before_flush;
	o->before_close = hooks_before_close;
	o->chunk_local = hooks_chunk_local;
	o->progress = hooks_progress;
	*out = h;
	return 0;
}

void serve_hooks_close(struct serve_hooks *h)
{
	if (!h)
		return;
	far_mutex_lock(&h->lock);
	h->ending = true;
	far_cond_broadcast(&h->changed);
	far_mutex_unlock(&h->lock);
	far_thread_join(&h->thread);
	far_cond_fini(&h->changed);
	far_mutex_fini(&h->lock);
	free(h);
}
