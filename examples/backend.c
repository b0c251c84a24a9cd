/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A backend in one page: every 8 bytes hold their own offset, so that whoever reads a region through any stack of
 * layers, wires and mounts can tell at once whether the right bytes arrived.  Usage: backend SIZE [LAYER...] */
#include <farpage.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int ruler_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	unsigned char *p = buf;

	for (size_t i = 0; i < len; i++, off++)
		p[i] = (unsigned char)((off & ~(uint64_t)7) >> (8 * (off & 7))); /* little-endian */
	return 0;
}

static int ruler_flush(void *self)
{
	return 0; /* nothing is ever written */
}

int main(int argc, char **argv)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = ruler_read, .flush = ruler_flush };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_backend *b;
	struct far_error err;
	uint64_t words[512];

	facts.bytes = argc > 1 ? strtoull(argv[1], NULL, 0) : 1 << 20;
	snprintf(facts.identity, sizeof facts.identity, "ruler");
	int r = far_backend_new(&ops, NULL, &facts, &b);
	if (r) {
		fprintf(stderr, "cannot make the backend: %s\n", strerror(-r));
		return 1;
	}
	for (int i = 2; i < argc; i++)
		if (far_layer_open(argv[i], b, &b, &err)) {
			fprintf(stderr, "%s\n", err.text);
			far_close(b);
			return 1;
		}
	for (uint64_t off = 0; !r && off + sizeof words <= far_size(b); off += sizeof words) {
		r = far_read(b, off, words, sizeof words, 0);
		for (size_t i = 0; !r && i < 512; i++)
			r = words[i] == off + i * 8 ? 0 : -EIO; /* on a little-endian machine */
	}
	printf("%s: %llu bytes, %s\n", far_facts(b)->identity, (unsigned long long)far_size(b), r ? strerror(-r) : "all right");
	far_close(b);
	return r ? 1 : 0;
}
