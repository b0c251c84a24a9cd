/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What an NBD client makes of a server's words: libnbd reads what the fuzzer says from a socket, greeting and all, while a
 * fixed list of commands waits for its answers; after the last word the server hangs up. The first byte chooses the list.
 * Whatever is said: sizes and extents make sense or are refused, and everything ends. */
#include "net/net.h"
#include "wire/nbd/link.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int __wrap_far_conn_connect(struct far_conn *conn, const struct far_net_addr *to, uint64_t until, int cancel,
			    struct far_error *err);

#define FUZZ_MAX 65536
#define FUZZ_EXTENTS 8

static int fuzz_end = -1; /* the client's */
static char fuzz_buffer[FUZZ_MAX];

int __wrap_far_conn_connect(struct far_conn *conn, const struct far_net_addr *to, uint64_t until, int cancel,
			    struct far_error *err)
{
	int fd = fuzz_end;

	fuzz_end = -1;
	return far_conn_socket(conn, fd);
}

static void fuzz_extents(const struct far_nbd_op *op)
{
	uint64_t at = op->off;

	FAR_ASSERT(op->n <= op->max);
	for (size_t i = 0; i < op->n; i++) {
		const struct far_extent *x = &op->extents[i];
		FAR_ASSERT(x->off == at && x->len && x->len <= op->off + op->len - at);
		FAR_ASSERT(!i || x->kind != op->extents[i - 1].kind);
		at += x->len;
	}
}

static void fuzz_call(struct far_nbd_link *l, const struct far_nbd_export *e, enum far_nbd_command cmd, uint64_t off, size_t len)
{
	struct far_extent extents[FUZZ_EXTENTS];
	struct far_nbd_op op = { .cmd = cmd, .in = fuzz_buffer, .out = fuzz_buffer, .extents = extents, .max = FUZZ_EXTENTS };

	if (off > e->bytes || cmd == FAR_NBD_FLUSH)
		off = 0;
	op.off = off;
	op.len = cmd == FAR_NBD_FLUSH ? 0 : far_min(len, far_min(e->max_io, e->bytes - off));
	if (!op.len && cmd != FAR_NBD_FLUSH)
		return;
	int r = far_nbd_link_call(l, &op, far_now() + FAR_SEC);
	FAR_ASSERT(r <= 0 && r > -4096);
	FAR_ASSERT(r || cmd != FAR_NBD_READ || op.seen == op.len);
	if (cmd == FAR_NBD_EXTENTS)
		fuzz_extents(&op);
}

static void fuzz_commands(struct far_nbd_link *l, const struct far_nbd_export *e, unsigned list)
{
	/* What libnbd would refuse by itself is not asked for: the server has said that it cannot. */
	if (e->extents)
		fuzz_call(l, e, FAR_NBD_EXTENTS, 0, FUZZ_MAX);
	fuzz_call(l, e, FAR_NBD_READ, 0, 512);
	if (list & 1)
		fuzz_call(l, e, FAR_NBD_READ, 4096, FUZZ_MAX);
	if (list & 2 && !e->read_only)
		fuzz_call(l, e, FAR_NBD_WRITE, 0, 512);
	if (list & 4 && e->zero && !e->read_only)
		fuzz_call(l, e, FAR_NBD_ZERO, 512, 4096);
	if (e->flush)
		fuzz_call(l, e, FAR_NBD_FLUSH, 0, 0);
	if (list & 8 && e->extents)
		fuzz_call(l, e, FAR_NBD_EXTENTS, 512, 1 << 30);
	far_nbd_link_alive(l);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static char name[] = "x", none[] = "";
	struct far_nbd_peer peer = { .where = name, .socket = name, .export = none };
	struct far_error err = { 0 };
	struct far_nbd_export e;
	struct far_nbd_link *l;
	int fd[2];

	if (!size || size > FUZZ_MAX)
		return 0;
	FAR_ASSERT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) == 0);
	ssize_t n = send(fd[1], data + 1, size - 1, MSG_DONTWAIT | MSG_NOSIGNAL);
	FAR_ASSERT(size == 1 || n > 0);
	shutdown(fd[1], SHUT_WR);
	fuzz_end = fd[0];
	int r = far_nbd_link_open(&peer, far_now() + FAR_SEC, -1, &l, &e, &err);
	FAR_ASSERT(fuzz_end < 0);
	if (r == 0) {
		FAR_ASSERT(e.bytes <= INT64_MAX && e.block && !(e.block & (e.block - 1)) && e.max_io >= e.block && !(e.max_io % e.block));
		fuzz_commands(l, &e, data[0]);
		FAR_ASSERT(far_nbd_link_pending(l) == 0);
		far_nbd_link_put(l);
	} else {
		FAR_ASSERT(r == -err.code && err.text[0]);
		for (const char *p = err.text; *p; p++)
			FAR_ASSERT((unsigned char)*p >= ' ');
	}
	close(fd[1]);
	return 0;
}
