/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Errors on purpose, for tests and for trying out what a program does when its storage fails.
 *
 * Calls that `ops` selects are numbered from 1. Which of them fail, and which bytes are changed, depends on `seed` and
 * the number alone. FAR_NOWAIT calls are answered -EAGAIN and not numbered: the caller comes again without it, and one
 * request counts once.
 */
#define _GNU_SOURCE
#include "layer/layer.h"

#include "base/clock.h"
#include "base/options.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum fault_op { FAULT_READ = 1, FAULT_WRITE = 2, FAULT_FLUSH = 4, FAULT_ALL = 7 };

static const char *const fault_errno_names[] = { "EIO", "ENOSPC", "EROFS", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED",
						 "EPROTO", "ESTALE", "EINVAL", "ENOMEM", NULL };
static const int fault_errno[] = { EIO, ENOSPC, EROFS, ETIMEDOUT, ECONNRESET, ECONNREFUSED, EPROTO, ESTALE, EINVAL, ENOMEM };

struct fault_conf {
	double rate, corrupt;
	int64_t nth, every, seed;
	int error; /* index into fault_errno */
	bool late;
	uint64_t disconnect_every, disconnect_for;
	char *ops;
};

struct fault {
	/* fixed after open */
	struct far_backend *inner;
	struct fault_conf conf; /* without its strings */
	unsigned ops;
	uint64_t start;
	/* atomic: only its own value matters */
	_Atomic uint64_t calls;
};

static const struct far_opt fault_options[] = {
	{ "rate", FAR_OPT_FLOAT, offsetof(struct fault_conf, rate), 0, 1, NULL, "P", "part of the calls that fail, 0 to 1", "0" },
	{ "nth", FAR_OPT_INT, offsetof(struct fault_conf, nth), 1, 0x1p53, NULL, "N", "the N-th call fails" },
	{ "every", FAR_OPT_INT, offsetof(struct fault_conf, every), 1, 0x1p53, NULL, "N", "each N-th call fails" },
	{ "errno", FAR_OPT_ENUM, offsetof(struct fault_conf, error), .names = fault_errno_names, .value_name = "NAME",
	  .help = "with this error", .def = "EIO" },
	{ "late", FAR_OPT_BOOL, offsetof(struct fault_conf, late), .help = "the call is carried out, its answer is lost",
	  .def = "no" },
	{ "disconnect-every", FAR_OPT_DURATION, offsetof(struct fault_conf, disconnect_every), 0, 3600e9, NULL, "TIME",
	  "connected for this long, then ECONNRESET for disconnect-for" },
	{ "disconnect-for", FAR_OPT_DURATION, offsetof(struct fault_conf, disconnect_for), 0, 3600e9, NULL, "TIME",
	  "length of a disconnect" },
	{ "corrupt", FAR_OPT_FLOAT, offsetof(struct fault_conf, corrupt), 0, 1, NULL, "P",
	  "part of the reads that get one wrong byte, 0 to 1", "0" },
	{ "ops", FAR_OPT_STRING, offsetof(struct fault_conf, ops), .value_name = "OP+OP",
	  .help = "calls it concerns: read, write (with discard and zero), flush", .def = "read+write+flush" },
	{ "seed", FAR_OPT_INT, offsetof(struct fault_conf, seed), .value_name = "N", .help = "of the chances", .def = "0" },
	FAR_OPT_END,
};

static uint64_t fault_mix(const struct fault *f, uint64_t call, uint64_t salt)
{
	uint64_t z = (uint64_t)f->conf.seed * 0xd1342543de82ef95 + call * 0x9e3779b97f4a7c15 + salt * 0xda942042e4dd58b5;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static bool fault_chance(const struct fault *f, double p, uint64_t call, uint64_t salt)
{
	return p > 0 && (double)(fault_mix(f, call, salt) >> 11) * 0x1p-53 < p;
}

static bool fault_disconnected(const struct fault *f)
{
	uint64_t cycle = f->conf.disconnect_every + f->conf.disconnect_for;
	return f->conf.disconnect_for && (far_now() - f->start) % cycle >= f->conf.disconnect_every;
}

/* Number the call. 0, or what it fails with. */
static int fault_begin(struct fault *f, enum fault_op op, uint64_t *call)
{
	*call = 0;
	if (fault_disconnected(f))
		return -ECONNRESET;
	if (!(f->ops & op))
		return 0;
	uint64_t n = *call = atomic_fetch_add_explicit(&f->calls, 1, memory_order_relaxed) + 1;
	bool fails = (f->conf.nth && n == (uint64_t)f->conf.nth) || (f->conf.every && n % (uint64_t)f->conf.every == 0) ||
		     fault_chance(f, f->conf.rate, n, 1);
	return fails ? -fault_errno[f->conf.error] : 0;
}

static int fault_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct fault *f = self;
	uint64_t call;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	int r = fault_begin(f, FAULT_READ, &call);
	if (r)
		return r;
	r = far_read(f->inner, off, buf, len, flags);
	if (!r && call && fault_chance(f, f->conf.corrupt, call, 2)) {
		uint64_t z = fault_mix(f, call, 3);
		((unsigned char *)buf)[z % len] ^= (unsigned char)(1 + (z >> 32) % 255);
	}
	return r;
}

/* Whether a call with the chosen error r is not carried out at all. */
static bool fault_skips(const struct fault *f, int r)
{
	return r && (!f->conf.late || r == -ECONNRESET);
}

static int fault_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct fault *f = self;
	uint64_t call;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	int r = fault_begin(f, FAULT_WRITE, &call);
	if (fault_skips(f, r))
		return r;
	int done = far_write(f->inner, off, buf, len, flags);
	return r ? r : done;
}

static int fault_flush(void *self)
{
	struct fault *f = self;
	uint64_t call;
	int r = fault_begin(f, FAULT_FLUSH, &call);

	if (fault_skips(f, r))
		return r;
	int done = far_flush(f->inner);
	return r ? r : done;
}

static int fault_discard(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct fault *f = self;
	uint64_t call;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	int r = fault_begin(f, FAULT_WRITE, &call);
	if (fault_skips(f, r))
		return r;
	int done = far_discard(f->inner, off, len, flags);
	return r ? r : done;
}

static int fault_zero(void *self, uint64_t off, uint64_t len, unsigned flags)
{
	struct fault *f = self;
	uint64_t call;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	int r = fault_begin(f, FAULT_WRITE, &call);
	if (fault_skips(f, r))
		return r;
	int done = far_zero(f->inner, off, len, flags);
	return r ? r : done;
}

static int fault_extents(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n)
{
	struct fault *f = self;
	return fault_disconnected(f) ? -ECONNRESET : far_extents(f->inner, off, len, out, max, n);
}

static void fault_stop(void *self)
{
	struct fault *f = self;
	far_stop(f->inner);
}

static void fault_close(void *self)
{
	struct fault *f = self;
	far_close(f->inner);
	free(f);
}

static struct far_backend *fault_inner(void *self)
{
	struct fault *f = self;
	return f->inner;
}

/* No share: a mapping would never fail. */
static const struct far_ops fault_ops = {
	FAR_OPS_INIT,
	.read = fault_read,
	.write = fault_write,
	.flush = fault_flush,
	.discard = fault_discard,
	.zero = fault_zero,
	.extents = fault_extents,
	.stop = fault_stop,
	.close = fault_close,
	.inner = fault_inner,
};

static int fault_parse_ops(const char *text, unsigned *ops, struct far_error *err)
{
	static const struct {
		const char *name;
		enum fault_op op;
	} names[] = { { "read", FAULT_READ }, { "write", FAULT_WRITE }, { "flush", FAULT_FLUSH } };

	*ops = text ? 0 : FAULT_ALL;
	while (text && *text) {
		size_t n = strcspn(text, "+"), i = 0;
		while (i < FAR_ARRAY_LEN(names) && (strlen(names[i].name) != n || memcmp(names[i].name, text, n)))
			i++;
		if (i == FAR_ARRAY_LEN(names))
			break;
		*ops |= names[i].op;
		text += n;
		text += *text == '+';
	}
	if (!*ops || (text && *text))
		return far_error_set(err, EINVAL, "layer fault: 'ops' takes read, write and flush, joined by '+'.");
	return 0;
}

static int fault_open(const void *conf, struct far_backend *inner, struct far_backend **out, struct far_error *err)
{
	const struct fault_conf *fc = conf;
	struct far_facts facts = *far_facts(inner);
	unsigned ops;

	int r = fault_parse_ops(fc->ops, &ops, err);
	if (r)
		return r;
	if (fc->disconnect_every && !fc->disconnect_for)
		return far_error_set(err, EINVAL, "layer fault: disconnect-every needs disconnect-for=TIME.");
	struct fault *f = calloc(1, sizeof *f);
	if (!f)
		return far_error_set(err, ENOMEM, "layer fault: %s.", far_strerror(ENOMEM));
	f->inner = inner;
	f->conf = *fc;
	f->conf.ops = NULL;
	f->ops = ops;
	f->start = far_now();
	facts.max_io = 0; /* one call is one number, however it is cut below */
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE;
	r = far_layer_new(&far_layer_fault, &fault_ops, f, &facts, out, err);
	if (r)
		free(f);
	return r;
}

const struct far_layer far_layer_fault = {
	.name = "fault",
	.help = "errors, disconnects and wrong bytes on purpose",
	.options = fault_options,
	.conf_size = sizeof(struct fault_conf),
	.open = fault_open,
};
