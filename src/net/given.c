/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A connection of the user's: the functions of struct far_stream_ops. */
#include "net/net.h"

#include <stdlib.h>
#include <string.h>

struct given {
	struct far_stream_ops ops;
	void *self;
};

static ssize_t given_readv(struct far_conn *c, const struct iovec *iov, int n)
{
	struct given *g = c->state;

	return g->ops.readv(g->self, iov, n);
}

static ssize_t given_writev(struct far_conn *c, const struct iovec *iov, int n)
{
	struct given *g = c->state;

	return g->ops.writev(g->self, iov, n);
}

static int given_wait(struct far_conn *c, bool in, bool out, uint64_t until)
{
	struct given *g = c->state;

	return g->ops.wait(g->self, in, out, far_deadline_poll_ms(until));
}

static uint64_t given_unacked(struct far_conn *c)
{
	return 0;
}

static void given_shutdown(struct far_conn *c)
{
	struct given *g = c->state;

	g->ops.shutdown(g->self);
}

static void given_close(struct far_conn *c)
{
	struct given *g = c->state;

	if (g->ops.close)
		g->ops.close(g->self);
	free(g);
	c->state = NULL;
}

static const struct far_conn_ops given_ops = {
	.readv = given_readv,
	.writev = given_writev,
	.wait = given_wait,
	.unacked = given_unacked,
	.shutdown = given_shutdown,
	.close = given_close,
};

int far_conn_given(struct far_conn *c, const struct far_stream_ops *ops, void *self)
{
	struct given *g = calloc(1, sizeof *g);

	if (!g)
		return -ENOMEM;
	memcpy(&g->ops, ops, far_min(ops->size, sizeof g->ops));
	g->self = self;
	if (!g->ops.readv || !g->ops.writev || !g->ops.wait || !g->ops.shutdown) {
		free(g);
		return -EINVAL;
	}
	*c = (struct far_conn){ .ops = &given_ops, .fd = -1, .state = g };
	return 0;
}

void far_conn_given_back(struct far_conn *c)
{
	free(c->state);
	*c = (struct far_conn){ .ops = NULL, .fd = -1 };
}
