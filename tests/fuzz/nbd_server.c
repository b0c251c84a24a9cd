/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A whole NBD connection of the server over a far_conn that is not one: it gives what the fuzzer says in pieces, and takes
 * replies in pieces too. The first byte is the length of the pieces, the second says how: what is greeted already, which
 * kind of backend, and whether bytes without end follow, as a long write needs them. */
#include "backend/backend.h"
#include "base/thread.h"
#include "wire/nbd/proto.h"
#include "wire/server.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REGION 300000
#define FUZZ_MORE 250000

static uint8_t fuzz_region[REGION];

static int fuzz_read(void *opaque, uint64_t off, void *buf, size_t len)
{
	memcpy(buf, fuzz_region + off, len);
	return 0;
}

static int fuzz_write(void *opaque, uint64_t off, const void *buf, size_t len)
{
	memcpy(fuzz_region + off, buf, len);
	return 0;
}

struct fuzz_conn {
	const uint8_t *data;
	size_t size, at, step, more;
	bool odd;
	struct far_mutex lock;
	struct far_cond changed;
	bool ended;
};

static ssize_t fuzz_readv(struct far_conn *conn, const struct iovec *iov, int n)
{
	struct fuzz_conn *f = conn->state;
	size_t k = (size_t)far_min(far_min(f->step, f->size - f->at), iov[0].iov_len);

	if (!k) {
		k = (size_t)far_min(f->more, iov[0].iov_len);
		memset(iov[0].iov_base, 'w', k);
		f->more -= k;
		return (ssize_t)k;
	}
	if (f->odd && f->at % 3 == 1 && k > 1)
		k = 1;
	memcpy(iov[0].iov_base, f->data + f->at, k);
	f->at += k;
	return (ssize_t)k;
}

static ssize_t fuzz_writev(struct far_conn *conn, const struct iovec *iov, int n)
{
	struct fuzz_conn *f = conn->state;

	return (ssize_t)(f->odd && iov[0].iov_len > 1 ? iov[0].iov_len / 2 : iov[0].iov_len);
}

static int fuzz_wait(struct far_conn *conn, bool in, bool out, uint64_t until)
{
	return 0;
}

static void fuzz_shutdown(struct far_conn *conn)
{
}

static void fuzz_ended(void *opaque)
{
	struct fuzz_conn *f = opaque;

	far_mutex_lock(&f->lock);
	f->ended = true;
	far_cond_signal(&f->changed);
	far_mutex_unlock(&f->lock);
}

/* Everything of the connection is freed when its seat has gone, which is after `ended`: so the crew is made anew. */
static void fuzz_connection(struct far_server_env *env, struct fuzz_conn *f)
{
	static const struct far_conn_ops ops = { .readv = fuzz_readv, .writev = fuzz_writev, .wait = fuzz_wait,
						 .shutdown = fuzz_shutdown, .close = fuzz_shutdown };
	struct far_conn conn = { .ops = &ops, .fd = -1, .state = f };
	struct far_nbd_conn *c;
	struct far_crew *crew;

	FAR_ASSERT(far_crew_open(&crew, "fuzz", 8) == 0);
	FAR_ASSERT(far_nbd_conn_start(env, crew, &conn, false, fuzz_ended, f, &c) == 0);
	far_mutex_lock(&f->lock);
	while (!f->ended)
		far_cond_wait(&f->changed, &f->lock);
	far_mutex_unlock(&f->lock);
	far_crew_close(crew);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint8_t hello[] = "\0\0\0\3IHAVEOPT\0\0\0\10\0\0\0\0IHAVEOPT\0\0\0\12\0\0\0\33\0\0\0\0\0\0\0\1\0\0\0\17base:allocation"
				       "IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0";
	struct far_backend *b;

	if (size < 2 || size > 1 << 20)
		return 0;
	unsigned how = data[1];
	if (how & 1) { /* memory never waits */
		if (far_open(how & 32 ? "mem:300000" : "mem:300000?private=1", NULL, &b, NULL))
			return 0;
	} else if (far_backend_from(fuzz_read, fuzz_write, REGION, NULL, NULL, &b)) {
		return 0;
	}
	struct far_export e = { .name = (char *)"disk", .b = b };
	FAR_ASSERT(far_owner_new(b, 0, &e.owner) == 0);
	struct far_server_env env = { .exports = &e, .exports_n = 1, .max_request = 1 << 18, .memory_max = 1 << 20,
				      .handshake = FAR_SEC, .stall = FAR_SEC };
	struct fuzz_conn f = { .step = data[0] ? data[0] : 100000, .odd = how & 2, .more = how & 16 ? FUZZ_MORE : 0 };
	uint8_t *all = malloc(sizeof hello + size);
	FAR_ASSERT(all);
	size_t n = how & 4 ? sizeof hello - 1 : 0;
	memcpy(all, hello, n);
	if (how & 8 && n) /* extended headers in place of structured replies */
		all[4 + 11] = 11;
	memcpy(all + n, data + 2, size - 2);
	f.data = all;
	f.size = n + size - 2;
	far_mutex_init(&f.lock);
	far_cond_init(&f.changed);
	fuzz_connection(&env, &f);
	FAR_ASSERT(env.memory == 0);
	far_cond_fini(&f.changed);
	far_mutex_fini(&f.lock);
	free(all);
	far_owner_free(e.owner);
	far_close(b);
	return 0;
}
