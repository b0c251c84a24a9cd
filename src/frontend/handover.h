/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The bytes of a hand-over of memory, in three formats (doc/handover.md), without a descriptor in sight: this is what the
 * fuzzer drives. The functions that use sockets are in farpage.h; handover_socket.c has them.
 */
#ifndef FAR_HANDOVER_H
#define FAR_HANDOVER_H

#include "base/base.h"

#define FAR_HANDOVER_MAX_BYTES 65536 /* of a message in any format */
#define FAR_HANDOVER_MAX_RANGES 1024
#define FAR_HANDOVER_MAX_TEXT 400    /* of an answer's sentence */
#define FAR_HANDOVER_ANSWER 24       /* bytes of an answer before its text */

/* Which descriptors come with a message of our format, in this order. */
enum far_handover_with {
	FAR_HANDOVER_UFFD = 1 << 0,
	FAR_HANDOVER_PAGEMAP = 1 << 1,
	FAR_HANDOVER_MEM = 1 << 2,
	FAR_HANDOVER_PROCESS = 1 << 3,
	FAR_HANDOVER_ALL = 15,
};

/* A message that is being received. Zeros at first. */
struct far_handover_in {
	enum far_handover_format format; /* known once n > 0 */
	unsigned char *buf;
	size_t n, cap;
	size_t whole;      /* length of all of it; 0: not known yet */
	unsigned depth;    /* JSON: open brackets */
	bool quoted, escaped, complete;
};
/* At most how many bytes to receive next, so that nothing behind the message is taken; 0: it is complete. */
size_t far_handover_want(const struct far_handover_in *in);
/* These bytes came. 0, -EPROTO (the sentence says what is wrong with them), -ENOMEM. */
int far_handover_feed(struct far_handover_in *in, const void *buf, size_t n, struct far_error *err);
/* A complete message into h: format, ranges (of the Go format one whose length is 0: unknown), writable, features. Which
 * descriptors belong to it, in *with. -EPROTO; -EPROTONOSUPPORT: a version or a page size that is not known here. */
int far_handover_decode(const struct far_handover_in *in, struct far_handover *h, unsigned *with, struct far_error *err);
void far_handover_in_fini(struct far_handover_in *in);

/* The message for h, malloc()ed. -EINVAL with a sentence if h cannot be told in its format. */
int far_handover_encode(const struct far_handover *h, unsigned with, void **out, size_t *n, struct far_error *err);

/* The answer in our format. buf holds FAR_HANDOVER_ANSWER + FAR_HANDOVER_MAX_TEXT; returns its length. */
size_t far_handover_answer(void *buf, int code, const char *text);
/* The length of an answer from its first FAR_HANDOVER_ANSWER bytes; 0: it is none. */
size_t far_handover_answer_len(const void *buf);
/* What a whole answer says: 0 or -errno of the other side with its sentence. */
int far_handover_answer_read(const void *buf, size_t n, struct far_error *err);

#endif
