/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "cli/bench_out.h"

#include <json-c/json.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void bench_rows_add(struct bench_rows *rows, const struct bench_row *row)
{
	struct bench_row *more = realloc(rows->v, (rows->n + 1) * sizeof *more);

	FAR_ASSERT(more);
	rows->v = more;
	rows->v[rows->n++] = *row;
}

void bench_rows_free(struct bench_rows *rows)
{
	free(rows->v);
	*rows = (struct bench_rows){ 0 };
}

/* --------------------------------------------------------------------------------------------------- table */

/* Three figures that matter, "-" for what was not measured. */
static const char *bench_number(char *buf, size_t n, double v)
{
	if (v == 0)
		snprintf(buf, n, "-");
	else
		snprintf(buf, n, v < 0.95 ? "%.3f" : v < 9.95 ? "%.2f" : v < 99.5 ? "%.1f" : "%.0f", v);
	return buf;
}

void bench_row_print(const struct bench_row *row, const struct bench_row *before)
{
	char value[24], with[24], open[24], p50[24], p99[24], longest[24], cpu[24];

	if (!before || strcmp(before->set, row->set) != 0 || strcmp(before->unit, row->unit) != 0)
		printf("%s%-11s %-8s %-18s %9s %9s %8s %8s %8s %9s %8s  %s\n", before ? "\n" : "", row->set, "at", "what",
		       row->unit, "with open", "open ms", "p50 us", "p99 us", "longest us", "CPU s/GiB", "how");
	if (row->skipped || row->failed) {
		printf("%-11s %-8s %-18s %s\n", "", row->x, row->series, row->note);
		return;
	}
	printf("%-11s %-8s %-18s %9s %9s %8s %8s %8s %9s %8s  %s%s%s%s\n", "", row->x, row->series,
	       bench_number(value, sizeof value, row->value),
	       bench_number(with, sizeof with, row->with_open ? row->with_open : row->value),
	       bench_number(open, sizeof open, row->open_ms), bench_number(p50, sizeof p50, row->p50_us),
	       bench_number(p99, sizeof p99, row->p99_us), bench_number(longest, sizeof longest, row->longest_us),
	       bench_number(cpu, sizeof cpu, row->cpu_s_gib), row->how, row->note[0] ? "; " : "", row->note,
	       row->wrong ? "; WRONG BYTES" : "");
	fflush(stdout);
}

/* ---------------------------------------------------------------------------------------------------- JSON */

static void bench_json_number(struct json_object *o, const char *key, double v)
{
	if (v != 0)
		json_object_object_add(o, key, json_object_new_double(v));
}

static struct json_object *bench_json_row(const struct bench_row *r)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "set", json_object_new_string(r->set));
	json_object_object_add(o, "series", json_object_new_string(r->series));
	json_object_object_add(o, "at", json_object_new_string(r->x));
	json_object_object_add(o, "how", json_object_new_string(r->how));
	if (r->skipped || r->failed) {
		json_object_object_add(o, r->skipped ? "skip" : "failed", json_object_new_string(r->note));
		return o;
	}
	json_object_object_add(o, "value", json_object_new_double(r->value));
	json_object_object_add(o, "unit", json_object_new_string(r->unit));
	bench_json_number(o, "with_open", r->with_open);
	bench_json_number(o, "open_ms", r->open_ms);
	bench_json_number(o, "p50_us", r->p50_us);
	bench_json_number(o, "p99_us", r->p99_us);
	bench_json_number(o, "longest_us", r->longest_us);
	bench_json_number(o, "cpu_s_per_gib", r->cpu_s_gib);
	json_object_object_add(o, "bytes_checked", json_object_new_int64((int64_t)r->checked));
	json_object_object_add(o, "bytes_wrong", json_object_new_int64((int64_t)r->wrong));
	if (r->note[0])
		json_object_object_add(o, "note", json_object_new_string(r->note));
	return o;
}

void bench_rows_json(const struct bench_rows *rows)
{
	struct json_object *top = json_object_new_object(), *list = json_object_new_array();

	json_object_object_add(top, "version", json_object_new_string(far_version()));
	json_object_object_add(top, "rows", list);
	for (size_t i = 0; i < rows->n; i++)
		json_object_array_add(list, bench_json_row(&rows->v[i]));
	puts(json_object_to_json_string_ext(top, JSON_C_TO_STRING_PRETTY));
	json_object_put(top);
}

/* ----------------------------------------------------------------------------------------------------- SVG */

/* A chart a set: places on the x axis in the order in which they came, a line with dots for each series, or bars where
 * there is only one place. The y axis is logarithmic when the values span more than a factor of 30. */

enum { SVG_WIDTH = 760, SVG_HEIGHT = 300, SVG_LEFT = 80, SVG_RIGHT = 190, SVG_TOP = 40, SVG_BOTTOM = 40, SVG_MAX = 64 };

static const char *const svg_colours[] = { "#1f6fb4", "#d1580b", "#2d8a3e", "#8e3fa8", "#b02a37", "#6b6b6b" };

struct svg_chart {
	const struct bench_row *rows[SVG_MAX];
	size_t n;
	const char *x[SVG_MAX], *series[SVG_MAX];
	size_t n_x, n_series;
	double low, high;
	bool logarithmic;
	int top;
};

static size_t svg_place(const char **list, size_t *n, const char *word)
{
	for (size_t i = 0; i < *n; i++)
		if (strcmp(list[i], word) == 0)
			return i;
	list[*n] = word;
	return (*n)++;
}

static double svg_y(const struct svg_chart *c, double v)
{
	double part = c->logarithmic ? log(v / c->low) / log(c->high / c->low) : (v - c->low) / (c->high - c->low);
	return c->top + SVG_HEIGHT - SVG_BOTTOM - part * (SVG_HEIGHT - SVG_TOP - SVG_BOTTOM);
}

static double svg_x(const struct svg_chart *c, size_t place)
{
	return SVG_LEFT + (SVG_WIDTH - SVG_LEFT - SVG_RIGHT) * (c->n_x == 1 ? 0.5 : (0.5 + (double)place) / (double)c->n_x);
}

static void svg_scale(struct svg_chart *c)
{
	double low = INFINITY, high = 0;

	for (size_t i = 0; i < c->n; i++) {
		low = fmin(low, c->rows[i]->value);
		high = fmax(high, c->rows[i]->value);
	}
	c->logarithmic = low > 0 && high > 30 * low;
	c->low = c->logarithmic ? low / 1.5 : 0;
	c->high = c->logarithmic ? high * 1.5 : high > 0 ? high * 1.1 : 1;
}

static void svg_axes(FILE *f, const struct svg_chart *c)
{
	char n[24];

	fprintf(f, "<text x=\"%d\" y=\"%d\" font-weight=\"bold\">%s: %s%s</text>\n", SVG_LEFT, c->top + 22, c->rows[0]->set,
		c->rows[0]->unit, c->logarithmic ? " (logarithmic)" : "");
	for (int i = 0; i <= 4; i++) {
		double v = c->logarithmic ? c->low * pow(c->high / c->low, i / 4.0) : c->high * i / 4.0;
		double y = svg_y(c, v);
		fprintf(f, "<path d=\"M%d %.1fH%d\" stroke=\"#ddd\"/>\n", SVG_LEFT, y, SVG_WIDTH - SVG_RIGHT);
		fprintf(f, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", SVG_LEFT - 6, y + 4,
			v == 0 ? "0" : bench_number(n, sizeof n, v));
	}
	for (size_t i = 0; i < c->n_x; i++)
		fprintf(f, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", svg_x(c, i),
			c->top + SVG_HEIGHT - SVG_BOTTOM + 18, c->x[i]);
}

static void svg_bars(FILE *f, const struct svg_chart *c, size_t series, const struct bench_row *r)
{
	double width = (SVG_WIDTH - SVG_LEFT - SVG_RIGHT) / (double)(c->n_series + 1), y = svg_y(c, r->value);

	fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>\n",
		SVG_LEFT + width * ((double)series + 0.6), y, width * 0.8, c->top + SVG_HEIGHT - SVG_BOTTOM - y,
		svg_colours[series % FAR_ARRAY_LEN(svg_colours)]);
}

static void svg_series(FILE *f, struct svg_chart *c, size_t series)
{
	const char *colour = svg_colours[series % FAR_ARRAY_LEN(svg_colours)];
	bool first = true;

	for (size_t i = 0; i < c->n && c->n_x > 1; i++) {
		if (strcmp(c->rows[i]->series, c->series[series]) != 0)
			continue;
		fprintf(f, "%s%.1f %.1f", first ? "<path fill=\"none\" d=\"M" : "L", svg_x(c, svg_place(c->x, &c->n_x, c->rows[i]->x)),
			svg_y(c, c->rows[i]->value));
		first = false;
	}
	if (!first)
		fprintf(f, "\" stroke=\"%s\" stroke-width=\"2\"/>\n", colour);
	for (size_t i = 0; i < c->n; i++) {
		if (strcmp(c->rows[i]->series, c->series[series]) != 0)
			continue;
		if (c->n_x == 1)
			svg_bars(f, c, series, c->rows[i]);
		else
			fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\"/>\n",
				svg_x(c, svg_place(c->x, &c->n_x, c->rows[i]->x)), svg_y(c, c->rows[i]->value), colour);
	}
	fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"12\" height=\"12\" fill=\"%s\"/><text x=\"%d\" y=\"%d\">%s</text>\n",
		SVG_WIDTH - SVG_RIGHT + 12, c->top + SVG_TOP + (int)series * 18, colour, SVG_WIDTH - SVG_RIGHT + 30,
		c->top + SVG_TOP + (int)series * 18 + 11, c->series[series]);
}

/* The rows from `from` on that belong to one chart; returns where the next one begins. */
static size_t svg_collect(const struct bench_rows *rows, size_t from, struct svg_chart *c)
{
	size_t i = from;

	for (; i < rows->n && strcmp(rows->v[i].set, rows->v[from].set) == 0 &&
	       strcmp(rows->v[i].unit, rows->v[from].unit) == 0; i++) {
		const struct bench_row *r = &rows->v[i];
		if (r->skipped || r->failed || c->n == SVG_MAX)
			continue;
		c->rows[c->n++] = r;
		svg_place(c->x, &c->n_x, r->x);
		svg_place(c->series, &c->n_series, r->series);
	}
	return i;
}

int bench_rows_svg(const struct bench_rows *rows, const char *path)
{
	size_t charts = 0, next;
	FILE *f = fopen(path, "we");

	if (!f)
		return -errno;
	for (size_t i = 0; i < rows->n; i = next, charts++) {
		struct svg_chart c = { 0 };
		next = svg_collect(rows, i, &c);
	}
	fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %zu\" font-family=\"sans-serif\" font-size=\"12\">\n"
		   "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n", SVG_WIDTH, charts * SVG_HEIGHT);
	charts = 0;
	for (size_t i = 0; i < rows->n; i = next) {
		struct svg_chart c = { .top = (int)charts++ * SVG_HEIGHT };
		next = svg_collect(rows, i, &c);
		if (!c.n)
			continue;
		svg_scale(&c);
		svg_axes(f, &c);
		for (size_t s = 0; s < c.n_series; s++)
			svg_series(f, &c, s);
	}
	fprintf(f, "</svg>\n");
	int r = ferror(f) ? -EIO : 0;
	if (fclose(f) != 0 && !r)
		r = -errno;
	return r;
}
