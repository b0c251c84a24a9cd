/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "backend/http_head.h"

#include <string.h>
#include <strings.h>

struct head_text {
	const char *p;
	size_t n;
};

static bool head_blank(char c)
{
	return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static struct head_text head_trim(const char *p, size_t n)
{
	while (n && head_blank(p[0]))
		p++, n--;
	while (n && head_blank(p[n - 1]))
		n--;
	return (struct head_text){ p, n };
}

static bool head_is(struct head_text t, const char *word)
{
	return t.n == strlen(word) && !strncasecmp(t.p, word, t.n);
}

/* Digits from the front, at least one; they are taken off. */
static bool head_number(struct head_text *t, uint64_t *out)
{
	uint64_t v = 0;
	size_t i = 0;

	for (; i < t->n && t->p[i] >= '0' && t->p[i] <= '9'; i++) {
		unsigned d = (unsigned)(t->p[i] - '0');
		if (v > (FAR_SIZE_MAX - d) / 10)
			return false;
		v = v * 10 + d;
	}
	t->p += i;
	t->n -= i;
	*out = v;
	return i > 0;
}

static bool head_take(struct head_text *t, const char *word)
{
	size_t n = strlen(word);

	if (t->n < n || strncasecmp(t->p, word, n))
		return false;
	t->p += n;
	t->n -= n;
	return true;
}

/* "bytes FIRST-LAST/TOTAL", where TOTAL may be *, and "bytes * /TOTAL" without the blank. */
static bool head_range(struct far_http_head *h, struct head_text t)
{
	struct far_http_head r = { .ranged = true };

	if (!head_take(&t, "bytes"))
		return false;
	t = head_trim(t.p, t.n);
	if (head_take(&t, "*"))
		r.unsatisfied = true;
	else if (!head_number(&t, &r.first) || !head_take(&t, "-") || !head_number(&t, &r.last) || r.last < r.first)
		return false;
	if (!head_take(&t, "/"))
		return false;
	if (!head_take(&t, "*")) {
		r.has_total = true;
		if (!head_number(&t, &r.total) || (!r.unsatisfied && r.last >= r.total))
			return false;
	}
	if (t.n)
		return false;
	bool again = h->ranged && (h->unsatisfied != r.unsatisfied || h->first != r.first || h->last != r.last ||
				   h->has_total != r.has_total || h->total != r.total);
	h->ranged = true;
	h->unsatisfied = r.unsatisfied;
	h->has_total = r.has_total;
	h->first = r.first;
	h->last = r.last;
	h->total = r.total;
	return !again;
}

static bool head_length(struct far_http_head *h, struct head_text t)
{
	uint64_t v;

	if (!head_number(&t, &v) || t.n || (h->has_length && h->length != v))
		return false;
	h->has_length = true;
	h->length = v;
	return true;
}

/* Kept as it is, to be compared and sent back: so no control characters, and not cut. */
static bool head_keep(char out[FAR_HTTP_TAG], struct head_text t)
{
	if (t.n >= FAR_HTTP_TAG || (out[0] && (strlen(out) != t.n || memcmp(out, t.p, t.n))))
		return false;
	for (size_t i = 0; i < t.n; i++)
		if ((unsigned char)t.p[i] < ' ' || t.p[i] == 0x7f)
			return false;
	memcpy(out, t.p, t.n);
	out[t.n] = 0;
	return true;
}

static bool head_tag_ok(const char *tag)
{
	const char *q = !strncmp(tag, "W/", 2) ? tag + 2 : tag;
	size_t n = strlen(q);

	return n >= 2 && q[0] == '"' && q[n - 1] == '"' && !memchr(q + 1, '"', n - 2);
}

static void head_field(struct far_http_head *h, struct head_text name, struct head_text value)
{
	bool ok = true;

	if (head_is(name, "content-range"))
		ok = head_range(h, value);
	else if (head_is(name, "content-length"))
		ok = head_length(h, value);
	else if (head_is(name, "content-encoding"))
		h->encoded = h->encoded || !head_is(value, "identity");
	else if (head_is(name, "content-type"))
		h->parts = h->parts || head_take(&value, "multipart/byteranges");
	else if (head_is(name, "etag"))
		ok = head_keep(h->tag, value) && head_tag_ok(h->tag);
	else if (head_is(name, "last-modified"))
		ok = head_keep(h->modified, value);
	h->bad = h->bad || !ok;
}

static int head_status(struct head_text t)
{
	uint64_t status;

	if (!head_take(&t, "http/"))
		return 0;
	while (t.n && !head_blank(t.p[0]))
		t.p++, t.n--;
	t = head_trim(t.p, t.n);
	return head_number(&t, &status) && status >= 100 && status <= 999 && (!t.n || head_blank(t.p[0])) ? (int)status : 0;
}

void far_http_head_line(struct far_http_head *h, const char *line, size_t n)
{
	struct head_text t = head_trim(line, n);

	if (t.n >= 5 && !strncasecmp(t.p, "http/", 5)) {
		*h = (struct far_http_head){ .status = head_status(t) };
		return;
	}
	const char *colon = t.n ? memchr(t.p, ':', t.n) : NULL;
	if (colon) {
		struct head_text name = { t.p, (size_t)(colon - t.p) };
		head_field(h, name, head_trim(colon + 1, t.n - name.n - 1));
	}
}

bool far_http_tag_strong(const char *tag)
{
	return tag[0] == '"';
}
