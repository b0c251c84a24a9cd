/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "base/options.h"

#include "base/clock.h"
#include "base/uri.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct far_opt *far_opt_find(const struct far_opt *table, const char *key)
{
	for (; table->key; table++)
		if (!strcmp(table->key, key))
			return table;
	return NULL;
}

/* "DIGITS[.DIGITS]" as a fraction num/den with den a power of ten; *end is what follows. */
static int options_number(const char *text, uint64_t *whole, uint64_t *num, uint64_t *den, const char **end)
{
	const char *p = text;

	*whole = *num = 0;
	*den = 1;
	if (!isdigit((unsigned char)*p))
		return -EINVAL;
	for (; isdigit((unsigned char)*p); p++)
		if (__builtin_mul_overflow(*whole, 10, whole) || __builtin_add_overflow(*whole, *p - '0', whole))
			return -EINVAL;
	if (*p == '.') {
		if (!isdigit((unsigned char)*++p))
			return -EINVAL;
		for (; isdigit((unsigned char)*p); p++) {
			if (*den >= 1000000000000000000u)
				return -EINVAL;
			*den *= 10;
			*num = *num * 10 + (uint64_t)(*p - '0');
		}
	}
	*end = p;
	return 0;
}

static int options_scale(uint64_t whole, uint64_t num, uint64_t den, uint64_t unit, bool exact, uint64_t *out)
{
	unsigned __int128 part = (unsigned __int128)num * unit;
	uint64_t v;

	if (exact && part % den)
		return -EINVAL;
	if (__builtin_mul_overflow(whole, unit, &v) || __builtin_add_overflow(v, (uint64_t)(part / den), &v))
		return -EINVAL;
	*out = v;
	return 0;
}

int far_parse_size(const char *text, uint64_t *out)
{
	static const char units[] = "KMGTPE";
	uint64_t whole, num, den, unit = 1;
	const char *p;

	int r = options_number(text, &whole, &num, &den, &p);
	if (r)
		return r;
	const char *u = *p ? strchr(units, toupper((unsigned char)*p)) : NULL;
	if (u) {
		unit = (uint64_t)1 << (10 * (u - units + 1));
		p++;
		if (*p == 'i' && p[1] == 'B')
			p++;
	}
	if (*p == 'B')
		p++;
	if (*p)
		return -EINVAL;
	return options_scale(whole, num, den, unit, true, out);
}

int far_parse_duration(const char *text, uint64_t *out_ns)
{
	static const struct {
		const char *name;
		uint64_t ns;
	} units[] = { { "", FAR_SEC }, { "us", FAR_USEC }, { "ms", FAR_MSEC }, { "s", FAR_SEC }, { "m", 60 * FAR_SEC },
		      { "h", 3600 * FAR_SEC }, { "ns", 1 } };
	uint64_t whole, num, den;
	const char *p;

	int r = options_number(text, &whole, &num, &den, &p);
	if (r)
		return r;
	for (size_t i = 0; i < FAR_ARRAY_LEN(units); i++)
		if (!strcmp(units[i].name, p))
			return options_scale(whole, num, den, units[i].ns, false, out_ns);
	return -EINVAL;
}

/* One decimal below 10, none above: "4.0 KiB", "256 MiB". True unless rounding gave `limit`. */
static bool options_format(char *buf, size_t n, double v, double limit, const char *unit)
{
	if ((v < 9.95 ? v : round(v)) >= limit)
		return false;
	snprintf(buf, n, v < 9.95 ? "%.1f %s" : "%.0f %s", v, unit);
	return true;
}

const char *far_format_size(char *buf, size_t n, uint64_t bytes)
{
	static const char *const units[] = { "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
	double v = (double)bytes;

	if (bytes < 1024) {
		snprintf(buf, n, "%u B", (unsigned)bytes);
		return buf;
	}
	for (size_t i = 0; i < FAR_ARRAY_LEN(units); i++)
		if (options_format(buf, n, v /= 1024, i + 1 < FAR_ARRAY_LEN(units) ? 1024 : INFINITY, units[i]))
			break;
	return buf;
}

const char *far_format_duration(char *buf, size_t n, uint64_t ns)
{
	double v = (double)ns;

	if (ns < 1000)
		snprintf(buf, n, "%u ns", (unsigned)ns);
	else if (options_format(buf, n, v / 1e3, 1000, "us") || options_format(buf, n, v / 1e6, 1000, "ms") ||
		 options_format(buf, n, v / 1e9, 60, "s"))
		return buf;
	else if (ns < 3600 * FAR_SEC)
		snprintf(buf, n, "%um%02us", (unsigned)(ns / FAR_SEC / 60), (unsigned)(ns / FAR_SEC % 60));
	else
		snprintf(buf, n, "%" PRIu64 "h%02um", ns / FAR_SEC / 3600, (unsigned)(ns / FAR_SEC / 60 % 60));
	return buf;
}

static int options_unknown(const struct far_opt *table, const char *where, const char *key, struct far_error *err)
{
	char known[300] = "";
	size_t at = 0;

	for (const struct far_opt *o = table; o->key && at < sizeof known; o++)
		at += (size_t)snprintf(known + at, sizeof known - at, "%s%s", at ? ", " : "", o->key);
	if (!at)
		return far_error_set(err, EINVAL, "%s: unknown option '%.60s': it takes none.", where, key);
	return far_error_set(err, EINVAL, "%s: unknown option '%.60s'. The known ones are %s.", where, key, known);
}

static int options_bad(const struct far_opt *o, const char *where, const char *value, const char *want,
		       struct far_error *err)
{
	return far_error_set(err, EINVAL, "%s: '%.60s' is no value for '%s': give %s%s%s.", where, value, o->key, want,
			     o->also ? " or " : "", o->also ? o->also : "");
}

static int options_range(const struct far_opt *o, double v, const char *where, const char *value, struct far_error *err)
{
	char lo[32], hi[32];

	if (!o->min && !o->max)
		return 0;
	bool open_end = o->max == 0 && o->min > 0;
	if (v >= o->min && (open_end || v <= o->max))
		return 0;
	if (o->kind == FAR_OPT_SIZE) {
		far_format_size(lo, sizeof lo, (uint64_t)o->min);
		far_format_size(hi, sizeof hi, o->max >= 0x1p63 ? (uint64_t)INT64_MAX : (uint64_t)o->max);
	} else if (o->kind == FAR_OPT_DURATION) {
		far_format_duration(lo, sizeof lo, (uint64_t)o->min);
		far_format_duration(hi, sizeof hi, (uint64_t)o->max);
	} else {
		snprintf(lo, sizeof lo, "%g", o->min);
		snprintf(hi, sizeof hi, "%.15g", o->max);
	}
	return far_error_set(err, EINVAL, "%s: '%.60s' is out of range for '%s': give %s %s%s%s%s.", where, value, o->key,
			     lo, open_end ? "or more" : "to ", open_end ? "" : hi, o->also ? " or " : "",
			     o->also ? o->also : "");
}

static int options_bool(const char *value, bool *out)
{
	static const char *const yes[] = { "", "1", "true", "yes", "on" }, *const no[] = { "0", "false", "no", "off" };

	for (size_t i = 0; i < FAR_ARRAY_LEN(yes); i++)
		if (!strcmp(value, yes[i])) {
			*out = true;
			return 0;
		}
	for (size_t i = 0; i < FAR_ARRAY_LEN(no); i++)
		if (!strcmp(value, no[i])) {
			*out = false;
			return 0;
		}
	return -EINVAL;
}

static int options_enum(const struct far_opt *o, int *out, const char *where, const char *value, struct far_error *err)
{
	char known[200] = "";
	size_t at = 0;

	for (int i = 0; o->names[i]; i++) {
		if (!strcmp(o->names[i], value)) {
			*out = i;
			return 0;
		}
		if (at < sizeof known)
			at += (size_t)snprintf(known + at, sizeof known - at, "%s%s", at ? ", " : "one of ", o->names[i]);
	}
	return options_bad(o, where, value, known, err);
}

static int options_numeric(const struct far_opt *o, void *field, const char *where, const char *value,
			   struct far_error *err)
{
	char *end = NULL;
	double v;

	if (o->kind == FAR_OPT_INT) {
		errno = 0;
		long long i = strtoll(value, &end, 10);
		if (errno || end == value || *end || isspace((unsigned char)*value))
			return options_bad(o, where, value, "a whole number", err);
		v = (double)i;
		int r = options_range(o, v, where, value, err);
		if (!r)
			*(int64_t *)field = i;
		return r;
	}
	if (o->kind == FAR_OPT_FLOAT) {
		v = strtod(value, &end);
		if (end == value || *end || !isfinite(v) || isspace((unsigned char)*value))
			return options_bad(o, where, value, "a number", err);
		int r = options_range(o, v, where, value, err);
		if (!r)
			*(double *)field = v;
		return r;
	}
	uint64_t u;
	if (o->kind == FAR_OPT_SIZE ? far_parse_size(value, &u) : far_parse_duration(value, &u))
		return options_bad(o, where, value,
				   o->kind == FAR_OPT_SIZE ? "a size such as 4096, 64K or 1.5G" :
							     "a duration such as 250us, 40ms, 1.5s or 2m", err);
	int r = options_range(o, (double)u, where, value, err);
	if (!r)
		*(uint64_t *)field = u;
	return r;
}

static bool options_also(const struct far_opt *o, void *field, const char *value)
{
	if (!o->also || strcmp(o->also, value))
		return false;
	if (o->kind == FAR_OPT_INT)
		*(int64_t *)field = (int64_t)o->also_value;
	else if (o->kind == FAR_OPT_FLOAT)
		*(double *)field = o->also_value;
	else if (o->kind == FAR_OPT_SIZE || o->kind == FAR_OPT_DURATION)
		*(uint64_t *)field = (uint64_t)o->also_value;
	else
		return false;
	return true;
}

static int options_text(const struct far_opt *o, void *field, const char *value, struct far_error *err)
{
	char *copy = strdup(value);

	if (!copy)
		return far_error_set(err, ENOMEM, "%s", far_strerror(ENOMEM));
	if (o->kind == FAR_OPT_STRING) {
		free(*(char **)field);
		*(char **)field = copy;
		return 0;
	}
	struct far_opt_list *l = field;
	char **v = reallocarray(l->v, l->n + 1, sizeof *v);
	if (!v) {
		free(copy);
		return far_error_set(err, ENOMEM, "%s", far_strerror(ENOMEM));
	}
	l->v = v;
	l->v[l->n++] = copy;
	return 0;
}

int far_opt_set(const struct far_opt *table, void *conf, const char *where, const char *key, const char *value,
		struct far_error *err)
{
	const struct far_opt *o = far_opt_find(table, key);

	if (!o)
		return options_unknown(table, where, key, err);
	void *field = (char *)conf + o->offset;
	switch (o->kind) {
	case FAR_OPT_BOOL:
		return options_bool(value, field) ? options_bad(o, where, value, "yes or no", err) : 0;
	case FAR_OPT_ENUM:
		return options_enum(o, field, where, value, err);
	case FAR_OPT_STRING:
	case FAR_OPT_LIST:
		return options_text(o, field, value, err);
	default:
		return options_also(o, field, value) ? 0 : options_numeric(o, field, where, value, err);
	}
}

int far_opt_parse(const struct far_opt *table, void *conf, const char *where, const char *text, char sep, bool decode,
		  struct far_error *err)
{
	FAR_CLEANUP(far_free_cleanup) char *copy = strdup(text);

	if (!copy)
		return far_error_set(err, ENOMEM, "%s", far_strerror(ENOMEM));
	for (char *item = copy, *next; item; item = next) {
		next = strchr(item, sep);
		if (next)
			*next++ = 0;
		if (!*item)
			continue;
		char *value = strchr(item, '=');
		if (value)
			*value++ = 0;
		else
			value = item + strlen(item);
		if (decode && (far_uri_decode(item) || far_uri_decode(value)))
			return far_error_set(err, EINVAL, "%s: a '%%' in option '%.60s' needs two hexadecimal digits after it.",
					     where, item);
		int r = far_opt_set(table, conf, where, item, value, err);
		if (r)
			return r;
	}
	return 0;
}

void far_opt_fini(const struct far_opt *table, void *conf)
{
	for (; table->key; table++) {
		void *field = (char *)conf + table->offset;
		if (table->kind == FAR_OPT_STRING) {
			free(*(char **)field);
			*(char **)field = NULL;
		} else if (table->kind == FAR_OPT_LIST) {
			struct far_opt_list *l = field;
			for (size_t i = 0; i < l->n; i++)
				free(l->v[i]);
			free(l->v);
			*l = (struct far_opt_list){ 0 };
		}
	}
}
