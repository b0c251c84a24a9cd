/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A program that stores through a pointer is killed, again and again, and nothing that it had flushed is lost: neither
 * from the local store that survives it (durable local), nor from the remote (durable remote), with which it starts
 * again.
 *
 * Every aligned word of 8 bytes names its place and its version. A ledger in shared memory has, for each slot of 512
 * bytes, which is stored by one thread at a time,
 *
 *   acked <= stored <= issued
 *
 *   issued   raised before the first word is stored
 *   stored   raised after the last one; of this life only
 *   acked    raised to what was stored before a flush (of this thread) began, when it has returned 0
 *
 * Right is any word whose version is from acked to issued; zeros are wrong everywhere. The next life looks at all of it
 * through the pointer, the parent looks at the remote itself. At the end a life flushes and closes: then both are equal.
 *
 *   pointer [ROUNDS [SEED [KIND]]]     KIND is one of ../pointer/face.c, in all rounds
 */
#define _GNU_SOURCE
#include "../pointer/face.h"

#include "base/clock.h"
#include "base/thread.h"

#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define SLOT 512u
#define WORDS (SLOT / 8)
#define SLOTS 4097u /* one more than whole pages have room for */
#define BYTES ((uint64_t)SLOT * SLOTS)
#define THREADS 3
#define LIVES 4     /* the last one ends in peace */
#define HANG (60 * FAR_SEC)

struct ledger {
	_Atomic uint32_t acked[SLOTS], stored[SLOTS], issued[SLOTS];
	_Atomic uint64_t flushes, stores;
	_Atomic uint32_t version; /* given out last */
	_Atomic bool looked;      /* this life has compared everything */
	uint64_t last[BYTES / 8]; /* what the last life saw */
};

struct round {
	const struct face_kind *kind;
	const char *how;
	enum far_durable durable;
	bool local;
	uint64_t seed;
	char dir[64];
	struct ledger *l;
};

struct writer {
	struct round *r;
	struct far_mount *m;
	unsigned id;
	uint64_t seed;
	struct far_thread t;
};

#define MUST(c)                                                                                                        \
	do {                                                                                                           \
		if (!(c)) {                                                                                            \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #c);                                        \
			_exit(3);                                                                                      \
		}                                                                                                      \
	} while (0)

static uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

static uint64_t word(uint32_t version, uint64_t index)
{
	return (uint64_t)version << 32 | (uint32_t)((index + 1) * 2654435761u);
}

/* Every word of the image is one that may be there. */
static void look(const struct round *r, const uint64_t *image, const char *where)
{
	for (uint64_t i = 0; i < BYTES / 8; i++) {
		uint32_t v = (uint32_t)(image[i] >> 32), acked = r->l->acked[i / WORDS], issued = r->l->issued[i / WORDS];
		if ((uint32_t)image[i] == (uint32_t)word(0, i) && v >= acked && v <= issued)
			continue;
		fprintf(stderr, "seed %llu, %s: byte %llu of %s is %016llx: want %08x with a version from %u to %u\n",
			(unsigned long long)r->seed, r->kind->name, (unsigned long long)(8 * i), where,
			(unsigned long long)image[i], (uint32_t)word(0, i), acked, issued);
		_exit(3);
	}
}

/* What a life begins with: what the one before had stored and not flushed may be gone. */
static void begin_with(const struct round *r, const uint64_t *image)
{
	for (uint64_t s = 0; s < SLOTS; s++) {
		uint32_t oldest = UINT32_MAX;
		for (uint64_t i = s * WORDS; i < (s + 1) * WORDS; i++)
			oldest = far_min(oldest, (uint32_t)(image[i] >> 32));
		r->l->stored[s] = oldest;
	}
}

/* ------------------------------------------------------------------------------------------------ the one that dies */

static void *writer_run(void *arg)
{
	struct writer *w = arg;
	struct ledger *l = w->r->l;
	_Atomic uint64_t *p = far_addr(w->m);
	static uint32_t before[THREADS][SLOTS];

	face_ready();
	for (;;) {
		for (unsigned n = 1 + (unsigned)(rnd(&w->seed) % 40); n; n--) {
			uint64_t s = rnd(&w->seed) % (SLOTS / THREADS) * THREADS + w->id;
			uint32_t v = l->version++ + 1;
			l->issued[s] = v;
			for (unsigned k = 0; k < WORDS; k++)
				atomic_store_explicit(&p[s * WORDS + k], word(v, s * WORDS + k), memory_order_relaxed);
			l->stored[s] = v;
			l->stores++;
		}
		for (uint64_t s = w->id; s < SLOTS; s += THREADS)
			before[w->id][s] = l->stored[s];
		int e = far_mount_flush(w->m);
		if (e)
			fprintf(stderr, "a flush: %s\n", strerror(-e));
		MUST(!e);
		for (uint64_t s = w->id; s < SLOTS; s += THREADS)
			l->acked[s] = before[w->id][s];
		l->flushes++;
		if (rnd(&w->seed) % 8 == 0)
			far_mount_evict(w->m, rnd(&w->seed) % (BYTES - 65536) & ~(uint64_t)0xffff, 65536);
	}
	return NULL;
}

static struct far_mount *life_open(struct round *r)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_error err = { 0 };
	struct far_mount *m;
	char remote[100], local[120], room[64];

	face_kind_apply(r->kind, &o, BYTES, room, sizeof room);
	snprintf(remote, sizeof remote, "file:%s/remote", r->dir);
	snprintf(local, sizeof local, "file:%s/local?size=%llu", r->dir, (unsigned long long)BYTES);
	o.local = r->local ? local : NULL;
	o.mode = r->local ? FAR_MODE_MANAGED : o.mode;
	o.durable = r->durable;
	o.chunk = 16384;
	o.push_interval_ms = 10;
	o.deadline_ms = 30000;
	int e = far_map_uri(remote, &o, &m, &err);
	if (e) {
		fprintf(stderr, "%s\n", err.text);
		_exit(3);
	}
	return m;
}

/* One life: compare, then store and flush until the end, or, the last time, flush and close. */
static void life(struct round *r, bool last)
{
	static struct writer w[THREADS];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	struct far_mount *m = life_open(r);
	uint64_t *image = malloc(BYTES);
	MUST(!face_copy(image, far_addr(m), BYTES));
	look(r, image, "the memory of the next life");
	begin_with(r, image);
	memcpy(r->l->last, image, BYTES);
	free(image);
	r->l->looked = true;
	if (last) {
		MUST(!far_mount_flush(m));
		MUST(!far_mount_close(m));
		return;
	}
	for (unsigned k = 0; k < THREADS; k++) {
		w[k] = (struct writer){ .r = r, .m = m, .id = k, .seed = r->seed * 7919 + r->l->version * 31 + k + 1 };
		MUST(!far_thread_start(&w[k].t, "writer", writer_run, &w[k]));
	}
	for (;;)
		pause();
}

/* ------------------------------------------------------------------------------------------------- the one that kills */

static void remote_make(const struct round *r)
{
	char path[100];
	uint64_t *image = malloc(BYTES);

	snprintf(path, sizeof path, "%s/remote", r->dir);
	int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	for (uint64_t i = 0; i < BYTES / 8; i++)
		image[i] = word(0, i);
	MUST(fd >= 0 && write(fd, image, BYTES) == (ssize_t)BYTES);
	close(fd);
	free(image);
}

static void remote_look(const struct round *r, const uint64_t *same)
{
	char path[100];
	uint64_t *image = malloc(BYTES);

	snprintf(path, sizeof path, "%s/remote", r->dir);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	MUST(fd >= 0 && read(fd, image, BYTES) == (ssize_t)BYTES);
	close(fd);
	look(r, image, "the remote");
	if (same && memcmp(image, same, BYTES)) {
		fprintf(stderr, "seed %llu: the remote differs from the memory after the last flush\n",
			(unsigned long long)r->seed);
		_exit(3);
	}
	free(image);
}

/* Wait until it has flushed some more, then kill it somewhere in its work. False: it died by itself. */
static bool strike(struct round *r, pid_t child, uint64_t *rng)
{
	uint64_t until = far_now() + HANG, want = r->l->flushes + 1 + rnd(rng) % 30;
	int status;

	while (r->l->flushes < want) {
		if (waitpid(child, &status, WNOHANG) == child)
			return false;
		if (far_now() > until) {
			fprintf(stderr, "seed %llu, %s: %llu flushes in %d s\n", (unsigned long long)r->seed, r->kind->name,
				(unsigned long long)r->l->flushes, (int)(HANG / FAR_SEC));
			kill(child, SIGKILL);
			waitpid(child, &status, 0);
			return false;
		}
		far_sleep_until(far_now() + 200 * FAR_USEC, false);
	}
	for (uint64_t stores = r->l->stores + rnd(rng) % 200; r->l->stores < stores && far_now() < until;)
		;
	kill(child, SIGKILL);
	waitpid(child, &status, 0);
	return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
}

static void clear(const struct round *r)
{
	char cmd[100];

	snprintf(cmd, sizeof cmd, "rm -rf '%s'", r->dir);
	MUST(!system(cmd));
}

static bool round_run(unsigned number, struct round *r)
{
	uint64_t rng = r->seed * 2654435761u + 1, began = far_now();
	const char *lacks = face_kind_lacks(r->kind);
	bool good = true;

	if (lacks) {
		printf("ok %u - %s, %s # SKIP not here: %s\n", number, r->how, r->kind->name, lacks);
		return true;
	}
	snprintf(r->dir, sizeof r->dir, "%s/farpage-crash-XXXXXX", access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
	MUST(mkdtemp(r->dir));
	r->l = mmap(NULL, sizeof *r->l, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(r->l != MAP_FAILED);
	remote_make(r);
	for (unsigned k = 0; k < LIVES && good; k++) {
		bool last = k == LIVES - 1;
		int status;
		r->l->looked = false;
		fflush(stdout);
		pid_t child = fork();
		MUST(child >= 0);
		if (!child) {
			life(r, last);
			_exit(0);
		}
		if (last)
			good = waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
		else
			good = strike(r, child, &rng) && r->l->looked;
		if (good && (last || r->durable == FAR_DURABLE_REMOTE))
			remote_look(r, last ? r->l->last : NULL);
	}
	printf("%sok %u - %s, %s (seed %llu, %d kills, %llu slots stored, %llu flushes, %.1f s)\n", good ? "" : "not ", number,
	       r->how, r->kind->name, (unsigned long long)r->seed, LIVES - 1, (unsigned long long)r->l->stores,
	       (unsigned long long)r->l->flushes, (double)(far_now() - began) / FAR_SEC);
	fflush(stdout);
	munmap(r->l, sizeof *r->l);
	clear(r);
	return good;
}

int main(int argc, char **argv)
{
	static const char *const kinds[] = { "copy-async", "continue-sync", "copy-sync", "copy-hash", "auto" };
	unsigned rounds = argc > 1 ? (unsigned)atoi(argv[1]) : 9, bad = 0;
	uint64_t seed = argc > 2 && *argv[2] ? strtoull(argv[2], NULL, 0) : far_now() % 1000000;
	const char *only = argc > 3 ? argv[3] : NULL;

	printf("1..%u\n", rounds);
	for (unsigned k = 0; k < rounds; k++) {
		const char *kind = only ? only : kinds[(k / 3 + k) % FAR_ARRAY_LEN(kinds)];
		struct round r = { .kind = face_kind_find(kind), .seed = seed + k };
		r.local = k % 3 != 0;
		r.durable = k % 3 == 1 ? FAR_DURABLE_LOCAL : FAR_DURABLE_REMOTE;
		r.how = k % 3 == 0 ? "no local store" : k % 3 == 1 ? "durable local" : "durable remote, a local store";
		bad += !round_run(k + 1, &r);
	}
	return bad != 0;
}
