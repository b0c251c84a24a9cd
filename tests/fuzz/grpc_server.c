/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The server's side of a connection, fed with what a client may say behind its greeting; cut into pieces whose length is
 * the first byte. Requests are carried out on a small region. */
#include "backend/backend.h"
#include "wire/grpc/session.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define REGION 5000

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

static void fuzz_serve(struct far_session *s, unsigned how)
{
	struct far_request *r;
	int err;

	while ((r = far_session_next(s))) {
		if (!far_request_run(r, FAR_NOWAIT))
			FAR_ASSERT(far_request_run(r, 0));
		far_session_finish(s, r);
		if (how & 1)
			break;
	}
	/* Written in odd pieces, or not at all for a while. */
	for (int i = 0; !(how & 2) && i < 100 && far_h2_fill(&s->h2, &err); i++) {
		size_t n = s->h2.iov[s->h2.iov_at].iov_len;
		far_h2_wrote(&s->h2, (how & 4) && n > 1 ? n / 2 : n);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const uint8_t hello[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
	struct far_backend *b;
	struct far_session *s = calloc(1, sizeof *s);

	if (size < 2 || !s || far_backend_from(fuzz_read, fuzz_write, REGION, NULL, NULL, &b)) {
		free(s);
		return 0;
	}
	struct far_export e = { (char *)"disk", b, NULL };
	if (far_owner_new(b, 0, &e.owner)) {
		far_close(b);
		free(s);
		return 0;
	}
	struct far_server_env env = { .exports = &e, .exports_n = 1, .max_request = 8192, .memory_max = 65536 };
	size_t step = data[0] ? data[0] : 4096;
	unsigned how = data[1];
	FAR_ASSERT(far_session_init(s, &env) == 0);
	int r = (how & 8) ? 0 : far_session_feed(s, hello, sizeof hello - 1);
	data += 2;
	size -= 2;
	while (size && r == 0) {
		uint8_t *dst;
		size_t n = (size_t)far_min(step, size), direct = far_h2_direct(&s->h2, &dst);
		if (direct) {
			n = (size_t)far_min(n, direct);
			memcpy(dst, data, n);
			r = far_session_feed(s, dst, n);
		} else {
			r = far_session_feed(s, data, n);
		}
		data += n;
		size -= n;
		fuzz_serve(s, how);
	}
	fuzz_serve(s, 0);
	far_session_fini(s);
	FAR_ASSERT(env.memory == 0);
	far_owner_free(e.owner);
	far_close(b);
	free(s);
	return 0;
}
