/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* A scheme of one's own: "rot13:PATH" shows a file with its letters turned by 13 places, both ways. Everything that
 * takes a URI takes it from then on.  Usage: scheme rot13:PATH [TEXT-TO-WRITE-AT-0] */
#include <farpage.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void turn(char *p, size_t len)
{
	for (size_t i = 0; i < len; i++) {
		char c = p[i], a = c >= 'a' && c <= 'z' ? 'a' : c >= 'A' && c <= 'Z' ? 'A' : 0;
		if (a)
			p[i] = (char)(a + (c - a + 13) % 26);
	}
}

static int rot13_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	int r = far_read(self, off, buf, len, flags);
	if (!r)
		turn(buf, len);
	return r;
}

static int rot13_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	char part[4096];
	int r = 0;

	if (flags & FAR_NOWAIT)
		return -EAGAIN; /* several pieces, of which the second could not take the first back */
	for (size_t n; !r && len; off += n, buf = (const char *)buf + n, len -= n) {
		n = len < sizeof part ? len : sizeof part;
		memcpy(part, buf, n);
		turn(part, n);
		r = far_write(self, off, part, n, flags);
	}
	return r;
}

static int rot13_flush(void *self)
{
	return far_flush(self);
}

static void rot13_close(void *self)
{
	far_close(self);
}

static int rot13_open(void *opaque, const char *uri, const struct far_open_opts *opts, struct far_backend **out,
		      struct far_error *err)
{
	static const struct far_ops ops = { FAR_OPS_INIT, .read = rot13_read, .write = rot13_write, .flush = rot13_flush,
					    .close = rot13_close };
	struct far_backend *file;
	char inner[4096];

	snprintf(inner, sizeof inner, "file:%s", uri + strlen("rot13:"));
	int r = far_open(inner, opts, &file, err);
	if (r)
		return r;
	struct far_facts facts = *far_facts(file);
	facts.caps &= ~(uint32_t)FAR_CAP_SHARE; /* a mapping would show the file as it is */
	r = far_backend_new(&ops, file, &facts, out);
	if (r)
		far_close(file);
	return r;
}

int main(int argc, char **argv)
{
	struct far_scheme scheme = { .size = sizeof scheme, .name = "rot13", .help = "a file, turned", .open = rot13_open };
	struct far_backend *b;
	struct far_error err;
	char text[64] = "";

	if (argc < 2 || far_scheme_register(&scheme))
		return 2;
	if (far_open(argv[1], NULL, &b, &err)) {
		fprintf(stderr, "%s\n", err.text);
		return 1;
	}
	size_t len = far_size(b) < sizeof text - 1 ? (size_t)far_size(b) : sizeof text - 1;
	int r = argc > 2 ? far_write(b, 0, argv[2], strlen(argv[2]), 0) : 0;
	if (!r)
		r = far_flush(b);
	if (!r)
		r = far_read(b, 0, text, len, 0);
	printf("%s\n", r ? strerror(-r) : text);
	far_close(b);
	return r ? 1 : 0;
}
