/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "backend/record.h"
#include "backend/backend.h"

#include "base/clock.h"
#include "base/hash.h"

#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#define RECORD_MAGIC "farrec1\n"
#define RECORD_RELEASED 1
#define RECORD_DIRTY 2

static void record_put(uint8_t *p, uint64_t v, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		p[i] = (uint8_t)(v >> 8 * i);
}

static uint64_t record_get(const uint8_t *p, unsigned n)
{
	uint64_t v = 0;

	while (n--)
		v = v << 8 | p[n];
	return v;
}

void far_record_encode(uint8_t out[FAR_RECORD_BYTES], const struct far_record *r)
{
	memset(out, 0, FAR_RECORD_BYTES);
	memcpy(out, RECORD_MAGIC, 8);
	record_put(out + 8, r->epoch, 8);
	record_put(out + 16, r->version, 8);
	record_put(out + 24, r->session, 8);
	record_put(out + 32, r->mark, 8);
	record_put(out + 40, (r->released ? RECORD_RELEASED : 0) | (r->dirty ? RECORD_DIRTY : 0), 4);
	memcpy(out + 48, r->identity, strlen(r->identity));
	memcpy(out + 88, r->writer, strlen(r->writer));
	memcpy(out + 128, r->holder, strlen(r->holder));
	record_put(out + 248, far_hash64(out, 248), 8);
}

bool far_record_decode(const uint8_t *p, size_t n, struct far_record *r)
{
	memset(r, 0, sizeof *r);
	if (n != FAR_RECORD_BYTES || memcmp(p, RECORD_MAGIC, 8) || record_get(p + 248, 8) != far_hash64(p, 248))
		return false;
	r->epoch = record_get(p + 8, 8);
	r->version = record_get(p + 16, 8);
	r->session = record_get(p + 24, 8);
	r->mark = record_get(p + 32, 8);
	uint64_t flags = record_get(p + 40, 4);
	r->released = flags & RECORD_RELEASED;
	r->dirty = flags & RECORD_DIRTY;
	memcpy(r->identity, p + 48, sizeof r->identity - 1);
	memcpy(r->writer, p + 88, sizeof r->writer - 1);
	memcpy(r->holder, p + 128, sizeof r->holder - 1);
	return true;
}

void far_record_facts(const void *buf, size_t n, struct far_facts *f)
{
	struct far_record r;

	if (!far_record_decode(buf, n, &r))
		return;
	snprintf(f->identity, sizeof f->identity, "%s", r.identity);
	snprintf(f->version, sizeof f->version, "%" PRIu64 ".%" PRIu64, r.epoch, r.version);
}

uint64_t far_record_random(void)
{
	uint64_t v = 0;

	/* Before the kernel has any randomness, which no program sees, time and process must do. */
	if (getrandom(&v, sizeof v, 0) != sizeof v)
		v = far_now() * 0x9e3779b97f4a7c15 ^ (uint64_t)getpid() << 40;
	return v ? v : 1;
}

void far_record_identity(char out[40])
{
	uint64_t a = far_record_random(), b = far_record_random();

	/* A UUID of version 4. */
	snprintf(out, 40, "%08x-%04x-4%03x-%04x-%012" PRIx64, (unsigned)(a >> 32), (unsigned)(a >> 16 & 0xffff),
		 (unsigned)(a & 0xfff), (unsigned)(0x8000 | (b >> 48 & 0x3fff)), b & 0xffffffffffff);
}

void far_ram_record_init(struct far_ram_record *r)
{
	far_mutex_init(&r->lock);
	r->n = 0;
}

void far_ram_record_fini(struct far_ram_record *r)
{
	far_mutex_fini(&r->lock);
}

int far_ram_record_read(struct far_ram_record *r, void *buf, size_t cap, size_t *n)
{
	far_mutex_lock(&r->lock);
	*n = r->n <= cap ? r->n : 0;
	int err = r->n <= cap ? 0 : -ENOBUFS;
	if (*n)
		memcpy(buf, r->bytes, *n);
	far_mutex_unlock(&r->lock);
	return err;
}

int far_ram_record_write(struct far_ram_record *r, const void *buf, size_t n)
{
	far_mutex_lock(&r->lock);
	memcpy(r->bytes, buf, n);
	r->n = n;
	far_mutex_unlock(&r->lock);
	return 0;
}
