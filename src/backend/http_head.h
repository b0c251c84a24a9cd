/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What a ranged GET needs of an HTTP answer's head; pure: lines in, facts out. */
#ifndef FAR_HTTP_HEAD_H
#define FAR_HTTP_HEAD_H

#include "base/base.h"

#define FAR_HTTP_TAG 256

struct far_http_head {
	int status;          /* 0: there was no status line that makes sense */
	bool bad;            /* a header that matters makes no sense, or is there twice and differs */
	bool encoded;        /* the body is not the bytes themselves (Content-Encoding) */
	bool parts;          /* multipart/byteranges */
	bool ranged;         /* Content-Range was there */
	bool unsatisfied;    /* "bytes ..." was "bytes *" */
	bool has_total;      /* "/TOTAL" was a number */
	bool has_length;     /* Content-Length */
	uint64_t first, last, total, length;
	char tag[FAR_HTTP_TAG];      /* ETag as it was sent, with quotes and W/; "" if none */
	char modified[FAR_HTTP_TAG]; /* Last-Modified */
};

/* One line of the head, with or without its line end. A status line begins anew: after a redirect, or a 1xx. */
void far_http_head_line(struct far_http_head *h, const char *line, size_t n);
/* Whether the entity tag promises byte for byte the same content. */
bool far_http_tag_strong(const char *tag);

#endif
