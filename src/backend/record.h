/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The record beside a content: what it is, how often it has changed hands, who had it last. Its bytes, little-endian:
 *
 *       0  "farrec1\n"
 *       8  epoch, version, session, mark     4 x 8
 *      40  flags                             4    1: given back by the last writer, 2: may have changed since `mark`
 *      44  zero                              4
 *      48  identity                         40    a text, filled up with zeros; so are the next two
 *      88  writer                           40
 *     128  holder                          120
 *     248  XXH3-64 of the 248 bytes before   8
 *
 * A record that does not fit its checksum is taken for none: then the content gets a new identity, which nobody mistakes
 * for the old one.
 */
#ifndef FAR_RECORD_H
#define FAR_RECORD_H

#include "base/thread.h"

#define FAR_RECORD_BYTES 256

struct far_record {
	char identity[40];
	char writer[40];  /* who had the last lease; "": somebody without one has written since, or nobody ever had one */
	char holder[120]; /* the same for people */
	uint64_t epoch, version;
	uint64_t session; /* the writer's */
	uint64_t mark;    /* of the content when this was written, see far_record_mark() */
	bool released, dirty;
};

void far_record_encode(uint8_t out[FAR_RECORD_BYTES], const struct far_record *r);
/* False: there is none, or it is damaged. */
bool far_record_decode(const uint8_t *p, size_t n, struct far_record *r);
/* A random number other than 0; a random identity. */
uint64_t far_record_random(void);
void far_record_identity(char out[40]);

/* The record of a backend whose content is memory. */
struct far_ram_record {
	struct far_mutex lock;
	size_t n;
	uint8_t bytes[FAR_RECORD_MAX];
};
void far_ram_record_init(struct far_ram_record *r);
void far_ram_record_fini(struct far_ram_record *r);
int far_ram_record_read(struct far_ram_record *r, void *buf, size_t cap, size_t *n);
int far_ram_record_write(struct far_ram_record *r, const void *buf, size_t n);

#endif
