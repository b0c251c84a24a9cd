/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "cli/progress.h"

#include "base/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PROGRESS_CELLS 24

const char *progress_size(char *buf, size_t n, uint64_t bytes)
{
	static const char *const unit[] = { "B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB" };
	double v = (double)bytes;
	size_t u = 0;

	while (v >= 1024 && u + 1 < FAR_ARRAY_LEN(unit)) {
		v /= 1024;
		u++;
	}
	snprintf(buf, n, v < 10 && v != (double)(uint64_t)v ? "%.1f %s" : "%.0f %s", v, unit[u]);
	return buf;
}

const char *progress_speed(char *buf, size_t n, double rate)
{
	if (rate >= 1e9)
		snprintf(buf, n, "%.1f GB/s", rate / 1e9);
	else if (rate >= 1e6)
		snprintf(buf, n, "%.0f MB/s", rate / 1e6);
	else
		snprintf(buf, n, "%.0f kB/s", rate / 1e3);
	return buf;
}

void progress_init(struct progress *p, const char *name, const char *head, uint64_t total, bool quiet)
{
	const char *term = getenv("TERM");

	*p = (struct progress){ .total = total, .quiet = quiet };
	snprintf(p->name, sizeof p->name, "%s", name);
	snprintf(p->head, sizeof p->head, "%s", head);
	p->tty = isatty(STDERR_FILENO) && !(term && strcmp(term, "dumb") == 0);
	p->began = p->seen_at = far_now();
}

static size_t progress_columns(void)
{
	struct winsize ws;

	return ioctl(STDERR_FILENO, TIOCGWINSZ, &ws) == 0 && ws.ws_col >= 20 ? ws.ws_col - 1 : 200;
}

/* Write `line` over the one that stands there; its rest is blanked. */
static void progress_draw(struct progress *p, const char *line)
{
	size_t len = far_min(strlen(line), progress_columns());
	size_t blank = p->width > len ? p->width - len : 0;

	fprintf(stderr, "\r%.*s%*s", (int)len, line, (int)blank, "");
	fflush(stderr);
	p->width = len;
	p->drawn = true;
}

void progress_update(struct progress *p, uint64_t done, double rate)
{
	char line[800], speed[24], size[24], bar[PROGRESS_CELLS + 1];
	uint64_t now = far_now();

	if (p->quiet || (p->tty && p->drawn && now - p->last < 100 * FAR_MSEC))
		return;
	unsigned percent = p->total ? (unsigned)((double)far_min(done, p->total) * 100 / (double)p->total) : 0;
	if (!p->tty && (p->total ? percent / 10 <= p->tenth || now - p->began < FAR_SEC : now - p->last < 2 * FAR_SEC))
		return;
	p->last = now;
	p->tenth = percent / 10;
	progress_speed(speed, sizeof speed, rate);
	if (!p->total) {
		snprintf(line, sizeof line, "%s  %s  %s", p->tty ? p->head : p->name,
			 progress_size(size, sizeof size, done), speed);
	} else if (p->tty) {
		size_t full = percent * PROGRESS_CELLS / 100;
		memset(bar, '.', PROGRESS_CELLS);
		memset(bar, '#', full);
		bar[PROGRESS_CELLS] = '\0';
		snprintf(line, sizeof line, "%s  [%s] %u %%  %s", p->head, bar, percent, speed);
	} else {
		snprintf(line, sizeof line, "%s  %u %%  %s", p->name, percent, speed);
	}
	if (p->tty)
		progress_draw(p, line);
	else
		fprintf(stderr, "%s\n", line);
}

double progress_rate(struct progress *p, uint64_t done)
{
	uint64_t now = far_now();

	if (now - p->seen_at >= 250 * FAR_MSEC) {
		double now_rate = (double)(done - p->seen) * 1e9 / (double)(now - p->seen_at);
		p->rate = p->rate > 0 ? 0.7 * p->rate + 0.3 * now_rate : now_rate;
		p->seen = done;
		p->seen_at = now;
	}
	return p->rate;
}

void progress_end(struct progress *p, const char *text)
{
	char line[800];

	if (p->quiet)
		return;
	if (text) {
		snprintf(line, sizeof line, "%s  %s", p->tty ? p->head : p->name, text);
		if (p->tty)
			progress_draw(p, line);
		else
			fprintf(stderr, "%s\n", line);
	}
	if (p->tty && p->drawn)
		fputc('\n', stderr);
	p->drawn = false;
	p->width = 0;
}

void progress_clear(struct progress *p)
{
	if (!p->tty || !p->drawn)
		return;
	fprintf(stderr, "\r%*s\r", (int)p->width, "");
	p->drawn = false;
	p->width = 0;
}
