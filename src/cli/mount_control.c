/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What a running mount answers on its control socket. Runs on the socket's threads. */
#define _GNU_SOURCE
#include "cli/mount_loop.h"

#include "base/clock.h"
#include "cli/cli.h"
#include "mount/control.h"

#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define MOUNT_SLICE (200 * FAR_MSEC) /* how long a wait may overlook that the mount is ending */

static const char *mount_string(struct json_object *req, const char *key)
{
	struct json_object *v;

	return json_object_object_get_ex(req, key, &v) && json_object_is_type(v, json_type_string)
		       ? json_object_get_string(v)
		       : NULL;
}

static int64_t mount_int(struct json_object *req, const char *key, int64_t otherwise)
{
	struct json_object *v;

	return json_object_object_get_ex(req, key, &v) && json_object_is_type(v, json_type_int)
		       ? json_object_get_int64(v)
		       : otherwise;
}

static uint64_t mount_until(struct json_object *req)
{
	int64_t ms = mount_int(req, "timeout_ms", -1);

	return ms < 0 || ms > INT32_MAX ? FAR_NEVER : far_now() + (uint64_t)ms * FAR_MSEC;
}

static struct json_object *mount_result(int r, const char *what)
{
	return r < 0 ? far_control_error(r, "%s: %s", what, r == -ETIMEDOUT ? "the deadline passed" : cli_strerror(r))
		     : far_control_ok();
}

static struct json_object *mount_op_status(struct mount_loop *l)
{
	struct far_status st = FAR_STATUS_INIT;

	far_mnt_status(l->mnt, &st);
	struct json_object *o = far_control_status(&st);
	far_control_put(&o, "kind", json_object_new_string("mount"));
	far_control_put(&o, "pid", json_object_new_int((int)getpid()));
	far_control_put(&o, "source", json_object_new_string(l->source));
	far_control_put(&o, "path", json_object_new_string(l->conf.pointer ? "" : far_mnt_path(l->mnt)));
	far_control_put(&o, "why", json_object_new_string(far_mnt_why(l->mnt)));
	return o;
}

/* Call fn in slices of time until it is done, the caller's time is over, or the mount ends. */
static int mount_slices(struct mount_loop *l, uint64_t until, int (*fn)(struct mount_loop *l, const void *arg),
			const void *arg)
{
	for (;;) {
		uint64_t now = far_now();
		uint64_t old = far_deadline_limit(far_min(until, now + MOUNT_SLICE));
		int r = fn(l, arg);
		far_deadline_restore(old);
		if (r != -ETIMEDOUT)
			return r;
		if (far_now() >= until)
			return -ETIMEDOUT;
		if (far_control_ending(l->control))
			return -ESHUTDOWN;
		if (far_now() - now < MOUNT_SLICE / 2) /* not our slice but a failure of the remote */
			return r;
	}
}

static int mount_wait_percent_cb(struct mount_loop *l, const void *arg)
{
	return far_mnt_wait_percent(l->mnt, *(const unsigned *)arg);
}

static int mount_wait_range_cb(struct mount_loop *l, const void *arg)
{
	const struct cli_range *r = arg;

	return far_mnt_wait(l->mnt, r->off, r->len);
}

/* fn on each range that the request names (all of the region if none). */
static struct json_object *mount_ranges(struct mount_loop *l, struct json_object *req, const char *what,
					int (*fn)(struct mount_loop *l, const struct cli_range *range, uint64_t until))
{
	struct far_status st = FAR_STATUS_INIT;
	const char *text = mount_string(req, "ranges");
	struct far_error err = { 0 };
	struct cli_range *v;
	size_t n;

	far_mnt_status(l->mnt, &st);
	int r = cli_ranges(text ? text : "0-", st.bytes, &v, &n, &err);
	if (r < 0)
		return far_control_error(r, "%s", err.text);
	uint64_t until = mount_until(req);
	for (size_t i = 0; i < n && r == 0; i++)
		r = fn(l, &v[i], until);
	free(v);
	return mount_result(r, what);
}

static int mount_wait_one(struct mount_loop *l, const struct cli_range *range, uint64_t until)
{
	return mount_slices(l, until, mount_wait_range_cb, range);
}

static int mount_pull_one(struct mount_loop *l, const struct cli_range *range, uint64_t until)
{
	return far_mnt_prefetch(l->mnt, range->off, range->len);
}

static int mount_evict_one(struct mount_loop *l, const struct cli_range *range, uint64_t until)
{
	return far_mnt_evict(l->mnt, range->off, range->len);
}

static int mount_pin_one(struct mount_loop *l, const struct cli_range *range, uint64_t until)
{
	return far_mnt_pin(l->mnt, range->off, range->len, true);
}

static int mount_unpin_one(struct mount_loop *l, const struct cli_range *range, uint64_t until)
{
	return far_mnt_pin(l->mnt, range->off, range->len, false);
}

static int mount_populate_one(struct mount_loop *l, const struct cli_range *range, uint64_t until)
{
	return far_mnt_populate(l->mnt, range->off, range->len);
}

static int mount_heal_one(struct mount_loop *l, const struct cli_range *range, uint64_t until)
{
	return far_mnt_heal(l->mnt, range->off, range->len);
}

static int mount_stored_one(struct mount_loop *l, const struct cli_range *range, uint64_t until)
{
	return far_mnt_stored(l->mnt, range->off, range->len);
}

static struct json_object *mount_op_wait(struct mount_loop *l, struct json_object *req)
{
	int64_t percent = mount_int(req, "percent", -1);

	if (percent < 0)
		return mount_ranges(l, req, "the ranges are not local", mount_wait_one);
	unsigned p = (unsigned)far_min((uint64_t)percent, 100);
	return mount_result(mount_slices(l, mount_until(req), mount_wait_percent_cb, &p), "not that much is local");
}

static struct json_object *mount_op_flush(struct mount_loop *l, struct json_object *req)
{
	struct json_object *remote;
	bool push = json_object_object_get_ex(req, "remote", &remote) && json_object_get_boolean(remote);
	uint64_t old = far_deadline_limit(mount_until(req));
	int r = push ? far_mnt_push(l->mnt) : far_mnt_flush(l->mnt);

	far_deadline_restore(old);
	return mount_result(r, "what was written is not all on the remote");
}

static struct json_object *mount_op_stop(struct mount_loop *l, struct json_object *req)
{
	struct json_object *now, *o;

	far_mutex_lock(&l->lock);
	if (json_object_object_get_ex(req, "now", &now) && json_object_get_boolean(now))
		l->stop_now = true;
	l->stop_asked = true;
	far_mutex_unlock(&l->lock);
	eventfd_write(l->wake_fd, 1);
	far_mutex_lock(&l->lock);
	while (!l->ended)
		far_cond_wait(&l->changed, &l->lock);
	o = l->end_code < 0 ? far_control_error(l->end_code, "stopped, but the flush failed: %s%s%s", cli_strerror(l->end_code),
					    l->end_text[0] ? ". " : "", l->end_text)
			    : far_control_ok();
	far_control_put(&o, "pid", json_object_new_int((int)getpid()));
	far_control_put(&o, "unsaved", json_object_new_int64((int64_t)l->unsaved));
	far_control_put(&o, "unsaved_text", json_object_new_string(l->end_text));
	far_mutex_unlock(&l->lock);
	return o;
}

struct json_object *mount_control_cb(void *opaque, const char *op, struct json_object *req)
{
	struct mount_loop *l = opaque;

	if (strcmp(op, "status") == 0)
		return mount_op_status(l);
	if (strcmp(op, "flush") == 0)
		return mount_op_flush(l, req);
	if (strcmp(op, "wait") == 0)
		return mount_op_wait(l, req);
	if (strcmp(op, "pull") == 0)
		return mount_ranges(l, req, "cannot pull", mount_pull_one);
	if (strcmp(op, "evict") == 0)
		return mount_ranges(l, req, "cannot evict", mount_evict_one);
	if (strcmp(op, "pin") == 0)
		return mount_ranges(l, req, "cannot pin", mount_pin_one);
	if (strcmp(op, "unpin") == 0)
		return mount_ranges(l, req, "cannot unpin", mount_unpin_one);
	if (l->conf.pointer && strcmp(op, "populate") == 0)
		return mount_ranges(l, req, "cannot populate", mount_populate_one);
	if (l->conf.pointer && strcmp(op, "heal") == 0)
		return mount_ranges(l, req, "cannot heal", mount_heal_one);
	if (l->conf.pointer && strcmp(op, "stored") == 0)
		return mount_ranges(l, req, "cannot take note of stores", mount_stored_one);
	if (strcmp(op, "stop") == 0)
		return mount_op_stop(l, req);
	return far_control_error(EOPNOTSUPP, "this farpage does not know the request '%.60s'", op);
}
