/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "region/partial.h"

#include <stdlib.h>
#include <string.h>

struct far_partial *far_partial_new(uint64_t chunk, uint64_t len)
{
	uint32_t sectors = (uint32_t)far_div_up(len, FAR_PARTIAL_SECTOR);
	struct far_partial *e = calloc(1, sizeof *e + far_div_up(sectors, 64) * sizeof(uint64_t));

	if (e) {
		e->chunk = chunk;
		e->len = len;
		e->sectors = sectors;
	}
	return e;
}

static bool partial_valid(const struct far_partial *e, uint32_t s)
{
	return e->valid[s / 64] >> (s % 64) & 1;
}

static void partial_set(struct far_partial *e, uint32_t s)
{
	if (partial_valid(e, s))
		return;
	e->valid[s / 64] |= (uint64_t)1 << (s % 64);
	e->n_valid++;
	for (unsigned k = 0; k < e->n_ragged; k++)
		if (e->ragged[k].sector == s)
			e->ragged[k--] = e->ragged[--e->n_ragged];
}

/* One range inside one sector: does it need an entry of its own? */
static bool partial_ragged_is_new(const struct far_partial *e, uint32_t s, uint64_t from, uint64_t to)
{
	if (partial_valid(e, s))
		return false;
	for (unsigned k = 0; k < e->n_ragged; k++)
		if (e->ragged[k].sector == s && from <= e->ragged[k].to && to >= e->ragged[k].from)
			return false;
	return true;
}

static uint64_t partial_sector_len(const struct far_partial *e, uint32_t s)
{
	return far_min(FAR_PARTIAL_SECTOR, e->len - (uint64_t)s * FAR_PARTIAL_SECTOR);
}

/* Walk [from, to) sector by sector. */
static void partial_step(uint64_t at, uint64_t to, uint32_t *s, uint64_t *a, uint64_t *b)
{
	*s = (uint32_t)(at / FAR_PARTIAL_SECTOR);
	*a = at % FAR_PARTIAL_SECTOR;
	*b = far_min(FAR_PARTIAL_SECTOR, to - (uint64_t)*s * FAR_PARTIAL_SECTOR);
}

unsigned far_partial_ragged(const struct far_partial *e, uint64_t from, uint64_t to)
{
	unsigned need = 0;
	uint32_t s;
	uint64_t a, b;

	/* Only the first and the last sector can be ragged. */
	partial_step(from, to, &s, &a, &b);
	if (b - a < partial_sector_len(e, s))
		need += partial_ragged_is_new(e, s, a, b);
	if ((to - 1) / FAR_PARTIAL_SECTOR != from / FAR_PARTIAL_SECTOR) {
		partial_step((to - 1) / FAR_PARTIAL_SECTOR * FAR_PARTIAL_SECTOR, to, &s, &a, &b);
		if (b - a < partial_sector_len(e, s))
			need += partial_ragged_is_new(e, s, a, b);
	}
	return need;
}

static void partial_ragged_add(struct far_partial *e, uint32_t s, uint64_t a, uint64_t b)
{
	unsigned at = e->n_ragged;

	if (partial_valid(e, s))
		return;
	for (unsigned k = 0; k < e->n_ragged; k++)
		if (e->ragged[k].sector == s && a <= e->ragged[k].to && b >= e->ragged[k].from) {
			a = far_min(a, e->ragged[k].from);
			b = far_max(b, e->ragged[k].to);
			if (at < e->n_ragged) { /* it joins two */
				e->ragged[k] = e->ragged[--e->n_ragged];
				k--;
			} else {
				at = k;
			}
		}
	if (b - a == partial_sector_len(e, s)) {
		partial_set(e, s);
		return;
	}
	if (at == e->n_ragged) {
		FAR_ASSERT(e->n_ragged < FAR_PARTIAL_RAGGED);
		e->n_ragged++;
	}
	e->ragged[at].sector = s;
	e->ragged[at].from = (uint16_t)a;
	e->ragged[at].to = (uint16_t)b;
}

void far_partial_add(struct far_partial *e, uint64_t from, uint64_t to)
{
	while (from < to) {
		uint32_t s;
		uint64_t a, b;
		partial_step(from, to, &s, &a, &b);
		if (b - a == partial_sector_len(e, s))
			partial_set(e, s);
		else
			partial_ragged_add(e, s, a, b);
		from = (uint64_t)s * FAR_PARTIAL_SECTOR + b;
	}
}

bool far_partial_missing(const struct far_partial *e, uint64_t *from, uint64_t *to)
{
	uint64_t len = e->len, at = *from;
	uint64_t start = UINT64_MAX;

	while (at < len) {
		uint32_t s = (uint32_t)(at / FAR_PARTIAL_SECTOR);
		uint64_t base = (uint64_t)s * FAR_PARTIAL_SECTOR, end = base + partial_sector_len(e, s);
		bool here = partial_valid(e, s);
		uint64_t next = end;

		for (unsigned k = 0; k < e->n_ragged && !here; k++) {
			uint64_t a = base + e->ragged[k].from, b = base + e->ragged[k].to;
			if (e->ragged[k].sector != s)
				continue;
			if (at >= a && at < b) {
				here = true;
				next = b;
			} else if (a > at) {
				next = far_min(next, a);
			}
		}
		if (here && start != UINT64_MAX)
			break;
		if (!here && start == UINT64_MAX)
			start = at;
		at = next;
	}
	if (start == UINT64_MAX)
		return false;
	*from = start;
	*to = at;
	return true;
}

bool far_partial_present(const struct far_partial *e, uint64_t *from, uint64_t *to)
{
	uint64_t a = *from, b;

	if (a >= e->len)
		return false;
	b = a;
	if (!far_partial_missing(e, &b, to)) { /* all of the rest is here */
		*to = e->len;
		return true;
	}
	if (b > a) {
		*to = b;
		return true;
	}
	*from = *to; /* it begins behind that gap */
	return far_partial_present(e, from, to);
}

void far_partial_copy(struct far_partial *out, const struct far_partial *e)
{
	memcpy(out, e, sizeof *e + far_div_up(e->sectors, 64) * sizeof(uint64_t));
	out->next = NULL;
}
