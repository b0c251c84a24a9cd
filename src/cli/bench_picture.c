/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The picture of a pointer at work: time from left to right, the region from top to bottom, a colour for what each chunk
 * is at that moment, and a dot where the program had to wait for a touch.
 *
 * Three threads besides the pointer's own: the program, which follows a fixed script; the sampler, which looks at the
 * chunk map 400 times; and the one that called, which waits for both and draws. All of it happens in a child of the bench.
 * What is drawn are the runs of equal colour in each row, one path a colour.
 */
#define _GNU_SOURCE
#include "cli/bench_pointer.h"

#include "backend/backend.h"
#include "base/clock.h"
#include "base/thread.h"
#include "cli/bench_io.h"
#include "cli/bench_touch.h"
#include "frontend/pointer.h"
#include "region/region.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PICTURE_BYTES (64 * FAR_MIB)
#define PICTURE_CHUNK (64 * FAR_KIB)
#define PICTURE_RATE "40M"
#define PICTURE_NS (2400 * FAR_MSEC)
#define PICTURE_WAITS 4096
#define PICTURE_STALL (500 * FAR_USEC) /* a touch that takes longer has waited for the store */

enum { PIC_CHUNKS = PICTURE_BYTES / PICTURE_CHUNK, PIC_ROWS = 512, PIC_SAMPLES = 400 };
enum { PIC_WIDTH = 980, PIC_LEFT = 60, PIC_TOP = 70, PIC_PLOT_W = 900, PIC_PLOT_H = 512, PIC_HEIGHT = 640 };

struct picture_wait {
	uint64_t at, off; /* ns since the start */
	bool store;
};

struct picture {
	struct far_backend *store;
	struct far_pointer *pointer;
	struct far_region *region;
	char *p;
	uint64_t start;
	uint8_t look[PIC_SAMPLES][PIC_ROWS]; /* the most that one of its chunks is */
	struct picture_wait wait[PICTURE_WAITS];
	size_t n_wait;
	uint64_t wrong, flushed_at[2];
	struct far_status st;
};

/* --------------------------------------------------------------------------------------------- the program */

static void picture_touch(struct picture *pic, uint64_t off, bool store)
{
	uint64_t begin = far_now(), word;

	if (store)
		*(volatile uint64_t *)(void *)(pic->p + off) = ~off;
	else
		word = touch_read(pic->p + off);
	uint64_t end = far_now(), expect;
	if (end - begin > PICTURE_STALL && pic->n_wait < PICTURE_WAITS)
		pic->wait[pic->n_wait++] = (struct picture_wait){ begin - pic->start, off, store };
	if (store)
		return;
	bench_pattern(&expect, off, 8);
	pic->wrong += word != expect && word != ~off;
}

/* Touches of `step` bytes apart from `from` to `to`, spread over `ns`. */
static void picture_walk(struct picture *pic, uint64_t from, uint64_t to, uint64_t step, uint64_t ns, bool store)
{
	uint64_t begin = far_now(), n = (to - from) / step;

	for (uint64_t i = 0; i < n; i++) {
		far_sleep_until(begin + ns * i / n, false);
		picture_touch(pic, from + i * step, store);
	}
}

static void picture_scatter(struct picture *pic, uint64_t from, uint64_t to, unsigned n, uint64_t ns, bool store)
{
	uint64_t begin = far_now(), seed = n;

	for (unsigned i = 0; i < n; i++) {
		far_sleep_until(begin + ns * i / n, false);
		picture_touch(pic, from + touch_random(&seed) % ((to - from) / TOUCH_PAGE) * TOUCH_PAGE, store);
	}
}

static void *picture_program(void *arg)
{
	struct picture *pic = arg;
	const uint64_t mib = FAR_MIB, ms = FAR_MSEC;

	picture_scatter(pic, 40 * mib, 64 * mib, 16, 250 * ms, false);        /* ahead of the pull, at random */
	picture_walk(pic, 28 * mib, 40 * mib, 16 * FAR_KIB, 250 * ms, false); /* in order: prefetched */
	picture_walk(pic, 4 * mib, 12 * mib, 4 * FAR_KIB, 250 * ms, true);    /* a file is written */
	picture_scatter(pic, 16 * mib, 60 * mib, 120, 300 * ms, true);        /* a database at work */
	pic->flushed_at[0] = far_now() - pic->start;
	far_pointer_flush(pic->pointer);
	pic->flushed_at[1] = far_now() - pic->start;
	far_region_evict(pic->region, 16 * mib, 24 * mib);
	picture_scatter(pic, 16 * mib, 40 * mib, 24, 300 * ms, false);        /* touched again */
	picture_walk(pic, 48 * mib, 56 * mib, 4 * FAR_KIB, 200 * ms, true);
	return NULL;
}

static void *picture_sampler(void *arg)
{
	struct picture *pic = arg;

	for (unsigned s = 0; s < PIC_SAMPLES; s++) {
		far_sleep_until(pic->start + PICTURE_NS * s / PIC_SAMPLES, false);
		for (unsigned i = 0; i < PIC_CHUNKS; i++) {
			uint8_t *row = &pic->look[s][i * PIC_ROWS / PIC_CHUNKS], look = far_region_look(pic->region, i * PICTURE_CHUNK);
			*row = *row > look ? *row : look;
		}
	}
	return NULL;
}

static int picture_open(struct picture *pic, struct far_error *err)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_pointer_conf conf = { .writable = true, .managed = true, .opts = &o };
	char uri[48], *buf = malloc(PICTURE_CHUNK);
	int r = buf ? 0 : -ENOMEM;

	snprintf(uri, sizeof uri, "mem:%" PRIu64, PICTURE_BYTES);
	if (!r)
		r = far_open(uri, NULL, &pic->store, err);
	for (uint64_t off = 0; off < PICTURE_BYTES && !r; off += PICTURE_CHUNK) {
		bench_pattern(buf, off, PICTURE_CHUNK);
		r = far_write(pic->store, off, buf, PICTURE_CHUNK, FAR_BULK);
	}
	free(buf);
	if (!r)
		r = far_layer_open("delay:rtt=10ms,rate=" PICTURE_RATE, pic->store, &conf.below, err);
	if (r)
		return r;
	o.mode = FAR_MODE_MANAGED;
	o.chunk = PICTURE_CHUNK;
	o.push_interval_ms = 150;
	pic->start = far_now();
	r = far_pointer_open(&conf, &pic->pointer, err);
	if (r) {
		far_close(conf.below);
		return r;
	}
	pic->p = far_pointer_addr(pic->pointer);
	pic->region = far_pointer_region(pic->pointer);
	return 0;
}

/* ----------------------------------------------------------------------------------------------- the drawing */

static const struct {
	const char *colour, *name;
} picture_looks[] = {
	[FAR_LOOK_ABSENT] = { "#eceff3", "absent" },
	[FAR_LOOK_FETCHING] = { "#f2a33a", "being fetched" },
	[FAR_LOOK_LOCAL] = { "#3f7fbf", "local" },
	[FAR_LOOK_DIRTY] = { "#c8322e", "newer here" },
};

static double picture_x(uint64_t at)
{
	return PIC_LEFT + (double)PIC_PLOT_W * (double)far_min(at, PICTURE_NS) / (double)PICTURE_NS;
}

static double picture_y(uint64_t off)
{
	return PIC_TOP + (double)PIC_PLOT_H * (double)off / (double)PICTURE_BYTES;
}

static void picture_runs(FILE *f, const struct picture *pic, enum far_region_look look)
{
	const double h = (double)PIC_PLOT_H / PIC_ROWS, w = (double)PIC_PLOT_W / PIC_SAMPLES;

	fprintf(f, "<path fill=\"%s\" d=\"", picture_looks[look].colour);
	for (unsigned i = 0; i < PIC_ROWS; i++)
		for (unsigned s = 0, n; s < PIC_SAMPLES; s += n) {
			for (n = 1; s + n < PIC_SAMPLES && pic->look[s + n][i] == pic->look[s][i];)
				n++;
			if (pic->look[s][i] == look)
				fprintf(f, "M%g %gh%gv%gh-%gz", PIC_LEFT + s * w, PIC_TOP + i * h, n * w, h, n * w);
		}
	fprintf(f, "\"/>\n");
}

static void picture_legend(FILE *f, const struct picture *pic)
{
	int x = PIC_LEFT;

	fprintf(f, "<text x=\"%d\" y=\"24\" font-size=\"16\" font-weight=\"bold\">A pointer at work: %" PRIu64
		   " MiB of remote memory, 10 ms and 40 MiB/s away</text>\n", PIC_LEFT, PICTURE_BYTES / FAR_MIB);
	for (unsigned k = 0; k < FAR_ARRAY_LEN(picture_looks); k++, x += 130)
		fprintf(f, "<rect x=\"%d\" y=\"38\" width=\"14\" height=\"14\" fill=\"%s\"/><text x=\"%d\" y=\"50\">%s</text>\n", x,
			picture_looks[k].colour, x + 20, picture_looks[k].name);
	fprintf(f, "<circle cx=\"%d\" cy=\"45\" r=\"2.5\" fill=\"black\"/><text x=\"%d\" y=\"50\">a read waited (%s)</text>\n",
		x + 7, x + 20, far_mechanism_word(pic->st.mechanism));
	fprintf(f, "<circle cx=\"%d\" cy=\"45\" r=\"2.5\" fill=\"white\" stroke=\"black\"/><text x=\"%d\" y=\"50\">a store waited "
		   "(%s)</text>\n", x + 167, x + 180, far_tracking_word(pic->st.tracking));
}

static void picture_axes(FILE *f, const struct picture *pic)
{
	for (uint64_t ms = 0; ms * FAR_MSEC <= PICTURE_NS; ms += 200)
		fprintf(f, "<path d=\"M%.1f %dv5\" stroke=\"#555\"/><text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%.1f s</text>\n",
			picture_x(ms * FAR_MSEC), PIC_TOP + PIC_PLOT_H, picture_x(ms * FAR_MSEC), PIC_TOP + PIC_PLOT_H + 20,
			(double)ms / 1e3);
	for (uint64_t mib = 0; mib <= PICTURE_BYTES / FAR_MIB; mib += 8)
		fprintf(f, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%" PRIu64 " MiB</text>\n", PIC_LEFT - 6,
			picture_y(mib * FAR_MIB) + 4, mib);
	for (unsigned i = 0; i < 2; i++)
		fprintf(f, "<path d=\"M%.1f %dv%d\" stroke=\"black\" stroke-dasharray=\"3 3\"/><text x=\"%.1f\" y=\"%d\" "
			   "text-anchor=\"%s\">%s</text>\n",
			picture_x(pic->flushed_at[i]), PIC_TOP - 4, PIC_PLOT_H + 30, picture_x(pic->flushed_at[i]),
			PIC_TOP + PIC_PLOT_H + 38, i ? "middle" : "end", i ? "flushed, 16 to 40 MiB given back" : "flush");
}

static int picture_draw(const struct picture *pic, const char *path, struct far_error *err)
{
	FILE *f = fopen(path, "we");

	if (!f)
		return far_error_set(err, errno, "cannot write %s: %s", path, far_strerror(errno));
	fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"12\">\n"
		   "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" "
		   "fill=\"%s\"/>\n<g shape-rendering=\"crispEdges\">\n",
		PIC_WIDTH, PIC_HEIGHT, PIC_LEFT, PIC_TOP, PIC_PLOT_W, PIC_PLOT_H, picture_looks[FAR_LOOK_ABSENT].colour);
	for (unsigned k = FAR_LOOK_FETCHING; k < FAR_ARRAY_LEN(picture_looks); k++)
		picture_runs(f, pic, (enum far_region_look)k);
	fprintf(f, "</g>\n");
	for (size_t i = 0; i < pic->n_wait; i++)
		fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"2\" fill=\"%s\" stroke=\"black\" stroke-width=\"0.8\"/>\n",
			picture_x(pic->wait[i].at), picture_y(pic->wait[i].off), pic->wait[i].store ? "white" : "black");
	picture_axes(f, pic);
	picture_legend(f, pic);
	fprintf(f, "</svg>\n");
	int r = ferror(f) ? EIO : 0;
	if (fclose(f) != 0 && !r)
		r = errno;
	return r ? far_error_set(err, r, "cannot write %s: %s", path, far_strerror(r)) : 0;
}

/* ------------------------------------------------------------------------------------------------- the child */

static int picture_run(const char *path, struct far_error *err)
{
	struct picture *pic = calloc(1, sizeof *pic);
	struct far_thread program = { 0 }, sampler = { 0 };
	int r = pic ? picture_open(pic, err) : -ENOMEM;

	if (!r)
		r = far_thread_start(&sampler, "bench-sampler", picture_sampler, pic);
	if (!r)
		r = far_thread_start(&program, "bench-program", picture_program, pic);
	far_thread_join(&program);
	far_thread_join(&sampler);
	if (!r) {
		pic->st = (struct far_status)FAR_STATUS_INIT;
		far_pointer_status(pic->pointer, &pic->st);
		r = pic->wrong ? far_error_set(err, EIO, "%" PRIu64 " wrong words in the region", pic->wrong) :
				 picture_draw(pic, path, err);
	}
	if (pic && pic->pointer) {
		far_pointer_stop(pic->pointer);
		far_pointer_close(pic->pointer);
	}
	free(pic);
	return r && !err->code ? far_error_set(err, -r, "the run failed: %s", far_strerror(r)) : r;
}

int bench_picture(const char *path, struct far_error *err)
{
	struct far_error *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int status = 0;

	if (shared == MAP_FAILED)
		return far_error_set(err, errno, "no memory for a picture");
	fflush(NULL);
	pid_t pid = fork();
	if (pid == 0) {
		picture_run(path, shared);
		_exit(0);
	}
	while (pid > 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	*err = *shared;
	munmap(shared, sizeof *shared);
	if (pid < 0 || !WIFEXITED(status))
		return far_error_set(err, ECHILD, "the process that had the pointer was ended by signal %d",
				     pid < 0 ? 0 : WTERMSIG(status));
	return -err->code;
}
