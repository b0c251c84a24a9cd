/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Any bytes as a hand-over of memory, in pieces that the first byte chooses: refused with a sentence, or ranges that can be
 * relied on and that come out the same when they are sent on. And any bytes as an answer. */
#include "frontend/handover.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void fuzz_taken(const struct far_handover *h, unsigned with)
{
	struct far_handover again = FAR_HANDOVER_INIT;
	struct far_handover_in in = { 0 };
	unsigned with2;
	void *buf;
	size_t n;

	FAR_ASSERT(h->n >= 1 && h->n <= FAR_HANDOVER_MAX_RANGES && (with & FAR_HANDOVER_UFFD) && !(with & ~15u));
	for (size_t k = 0; k < h->n; k++) {
		const struct far_handover_range *r = &h->range[k];
		FAR_ASSERT(r->addr && r->addr % 4096 == 0 && r->addr < (uint64_t)1 << 56);
		if (h->format == FAR_HANDOVER_GO)
			continue;
		FAR_ASSERT(r->len && r->len % 4096 == 0 && r->off % 4096 == 0 && r->off + r->len <= FAR_SIZE_MAX);
		FAR_ASSERT(!k || h->range[k - 1].off + h->range[k - 1].len <= r->off);
	}
	int e = far_handover_encode(h, with, &buf, &n, NULL);
	FAR_ASSERT(!e || (e == -EINVAL && h->format == FAR_HANDOVER_FIRECRACKER && h->n > 100)); /* longer than it came */
	if (e)
		return;
	FAR_ASSERT(!far_handover_feed(&in, buf, 1, NULL));
	for (size_t at = 1, want; (want = far_handover_want(&in)); at += want) {
		want = far_min(want, n - at);
		FAR_ASSERT(!far_handover_feed(&in, (char *)buf + at, want, NULL));
	}
	FAR_ASSERT(!far_handover_decode(&in, &again, &with2, NULL));
	FAR_ASSERT(again.n == h->n && with2 == with && !memcmp(again.range, h->range, h->n * sizeof *h->range));
	far_handover_fini(&again);
	far_handover_in_fini(&in);
	free(buf);
}

static void fuzz_answer(const uint8_t *data, size_t size)
{
	char buf[FAR_HANDOVER_ANSWER + FAR_HANDOVER_MAX_TEXT] = "";
	struct far_error err = { 0 };

	memcpy(buf, data, far_min(size, sizeof buf));
	size_t n = far_handover_answer_len(buf);
	FAR_ASSERT(n <= sizeof buf);
	if (n && far_handover_answer_read(buf, n, &err))
		FAR_ASSERT(err.code > 0 && err.code < 4096 && err.text[0]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct far_handover h = FAR_HANDOVER_INIT;
	struct far_handover_in in = { 0 };
	struct far_error err = { 0 };
	unsigned with;
	int e = 0;

	fuzz_answer(data, size);
	size_t step = size ? data[0] + 1u : 1, want;
	for (size_t at = 1; at < size && !e && (want = far_handover_want(&in)); at += want) {
		want = far_min(far_min(want, step), size - at);
		e = far_handover_feed(&in, data + at, want, &err);
		FAR_ASSERT(in.n <= FAR_HANDOVER_MAX_BYTES);
	}
	if (!e && in.complete)
		e = far_handover_decode(&in, &h, &with, &err);
	if (e)
		FAR_ASSERT((e == -EPROTO || e == -EPROTONOSUPPORT) && err.code == -e && err.text[0] && !h.range && !h.n);
	else if (in.complete)
		fuzz_taken(&h, with);
	far_handover_in_fini(&in);
	far_handover_fini(&h);
	return 0;
}
