/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * Writes to a file that may lose its mount at any moment, keeps a ledger of what was promised, and compares.
 *
 *   worker init LEDGER FILE SECTORS SEED     make both; some 64 KiB pieces of FILE are zeros (version 0), the rest is
 *                                            version 1
 *   worker load LEDGER FILE THREADS SEED HOW write until SIGTERM or until the file is gone; HOW: direct, buffered or
 *                                            mixed
 *   worker check LEDGER FILE [offline]       compare
 *   worker flush LEDGER FILE                 fsync it
 *   worker settle LEDGER                     what the last check saw has been flushed since
 *
 * The ledger is a shared mapping of an ordinary file: it outlives this process. For each sector of 512 bytes it has
 *
 *   acked <= completed <= issued       version numbers; each sector is written by one thread at a time
 *
 *   issued     raised before the write is asked for
 *   completed  raised when the write has returned and all of it was taken
 *   acked      raised to what was completed before an fsync began, when that fsync (of any thread) has returned 0
 *   zeroed     the newest version that was a punched hole: zeros do not tell their version
 *   seen       what the last check found
 *
 * A sector tells all about itself (seed of the run, offset, version, a sum over the rest), so what is found in it is
 * one version as a whole, or torn, or foreign. Right is a version v with acked <= v <= issued.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SECTOR = 512, WORDS = SECTOR / 8, PIECE = 128, MAX_THREADS = 16, MAX_BLOCK = 512 /* sectors */, SHOW = 12 };
#define LEDGER_MAGIC UINT64_C(0x6661726372617368)
#define TORN UINT32_MAX

/* The first page of the ledger. The counters are read by the harness while the worker runs. */
struct head {
	uint64_t magic, sectors, seed;
	_Atomic uint64_t writes, flushes, failed_writes, failed_flushes, reads, failed_reads;
	_Atomic uint32_t next; /* version that is given out next: another load has other threads on a sector */
	uint32_t base;         /* the first one since the last settle: older ones may have come back from the remote only */
};

struct ledger {
	struct head *head;
	uint32_t *acked, *completed, *issued, *zeroed, *seen;
	uint64_t n;
};

struct span {
	uint32_t first, count, version;
};

static struct ledger L;
static atomic_bool stopping;

static void die(const char *what, const char *name)
{
	fprintf(stderr, "worker: cannot %s %s: %s\n", what, name, strerror(errno));
	exit(2);
}

static uint64_t mix(uint64_t x)
{
	x += UINT64_C(0x9e3779b97f4a7c15);
	x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
	x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
	return x ^ x >> 31;
}

static void sector_fill(uint64_t *w, uint64_t s, uint32_t version)
{
	uint64_t x = mix(L.head->seed ^ s << 32 ^ version), sum = 0;

	w[0] = LEDGER_MAGIC ^ L.head->seed;
	w[1] = s * SECTOR;
	w[2] = version;
	for (unsigned i = 3; i < WORDS - 1; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		w[i] = x;
	}
	for (unsigned i = 0; i < WORDS - 1; i++)
		sum = mix(sum ^ w[i]);
	w[WORDS - 1] = sum;
}

/* The version that is in w; TORN: it is no version of this sector. */
static uint32_t sector_version(const uint64_t *w, uint64_t s, const char **why)
{
	uint64_t right[WORDS];
	unsigned zeros = 0;

	for (unsigned i = 0; i < WORDS; i++)
		zeros += w[i] == 0;
	if (zeros == WORDS)
		return L.zeroed[s];
	*why = "torn";
	if (w[0] != (LEDGER_MAGIC ^ L.head->seed) && zeros < WORDS / 2)
		*why = "foreign or torn";
	else if (w[1] != s * SECTOR)
		*why = "of another place";
	if (w[1] != s * SECTOR || w[2] >= TORN)
		return TORN;
	sector_fill(right, s, (uint32_t)w[2]);
	return memcmp(right, w, SECTOR) ? TORN : (uint32_t)w[2];
}

static void ledger_map(const char *path, uint64_t sectors, uint64_t seed)
{
	int fd = open(path, O_RDWR | O_CLOEXEC | (sectors ? O_CREAT | O_TRUNC : 0), 0600);
	struct head h = { .magic = LEDGER_MAGIC, .sectors = sectors, .seed = seed };
	size_t len;
	char *p;

	if (fd < 0)
		die("open", path);
	if (!sectors && (pread(fd, &h, sizeof(h), 0) != sizeof(h) || h.magic != LEDGER_MAGIC))
		die("read", path);
	len = 4096 + h.sectors * 5 * sizeof(uint32_t);
	if (sectors && ftruncate(fd, (off_t)len))
		die("make", path);
	p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		die("map", path);
	close(fd);
	L.head = (void *)p;
	if (sectors)
		*L.head = h;
	L.n = h.sectors;
	L.acked = (void *)(p + 4096);
	L.completed = L.acked + L.n;
	L.issued = L.completed + L.n;
	L.zeroed = L.issued + L.n;
	L.seen = L.zeroed + L.n;
}

static int init(const char *path, const char *file, uint64_t sectors, uint64_t seed)
{
	uint64_t w[WORDS];
	FILE *f = fopen(file, "wb");

	if (!f)
		die("create", file);
	ledger_map(path, sectors, seed);
	atomic_store(&L.head->next, 2);
	L.head->base = 2;
	for (uint64_t s = 0; s < sectors; s++) {
		uint32_t v = mix(seed + s / PIECE) % 4 != 0;

		L.acked[s] = L.completed[s] = L.issued[s] = v;
		memset(w, 0, SECTOR);
		if (v)
			sector_fill(w, s, v);
		if (fwrite(w, SECTOR, 1, f) != 1)
			die("write", file);
	}
	if (fflush(f) || fsync(fileno(f)) || fclose(f))
		die("write", file);
	return 0;
}

/* What was completed and not yet acknowledged by a flush. */
static pthread_mutex_t pending_lock = PTHREAD_MUTEX_INITIALIZER;
static struct span *pending;
static size_t n_pending, room_pending;

static void pending_add(const struct span *s, size_t n)
{
	pthread_mutex_lock(&pending_lock);
	if (n_pending + n > room_pending) {
		room_pending = 2 * (n_pending + n) + 1024;
		pending = realloc(pending, room_pending * sizeof(*pending));
		if (!pending)
			die("allocate", "the list of writes");
	}
	memcpy(pending + n_pending, s, n * sizeof(*s));
	n_pending += n;
	pthread_mutex_unlock(&pending_lock);
}

/* Flush; what was completed before counts as promised only if it says yes. */
static int flush(int fd, bool data_only)
{
	struct span *mine;
	size_t n;
	int rc;

	pthread_mutex_lock(&pending_lock);
	mine = pending;
	n = n_pending;
	pending = NULL;
	n_pending = room_pending = 0;
	pthread_mutex_unlock(&pending_lock);
	rc = (data_only ? fdatasync(fd) : fsync(fd)) ? -errno : 0;
	for (size_t i = 0; !rc && i < n; i++)
		for (uint32_t s = mine[i].first; s < mine[i].first + mine[i].count; s++) {
			uint32_t was = __atomic_load_n(&L.acked[s], __ATOMIC_RELAXED);

			while (was < mine[i].version && !__atomic_compare_exchange_n(&L.acked[s], &was, mine[i].version,
					false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
				;
		}
	if (rc && n)
		pending_add(mine, n);
	free(mine);
	atomic_fetch_add(rc ? &L.head->failed_flushes : &L.head->flushes, 1);
	return rc;
}

struct thread {
	pthread_t id;
	unsigned number, of;
	int direct, buffered;
	const char *how;
	uint64_t x;
	char *buf;
	int rc;
	bool wrong;
};

static uint64_t roll(struct thread *t, uint64_t below)
{
	t->x = mix(t->x);
	return t->x % below;
}

/*
 * Whose sector: the first half goes round by single sectors, so that all threads write into the same chunks and pages;
 * the second half is one stretch a thread.
 */
static void pick(struct thread *t, struct span *s)
{
	uint64_t half = L.n / 2, stretch = (L.n - half) / t->of;

	if (roll(t, 3) == 0) {
		s->first = (uint32_t)(roll(t, half / t->of) * t->of + t->number);
		s->count = 1;
		return;
	}
	s->count = (uint32_t)(1 + roll(t, UINT64_C(1) << roll(t, 10)));
	if (s->count > MAX_BLOCK)
		s->count = MAX_BLOCK;
	if (roll(t, 4) == 0)
		s->count = s->count > 8 ? s->count & ~7u : 8;
	s->first = (uint32_t)(half + t->number * stretch + roll(t, stretch - s->count + 1));
	/* Half of all are at the start of a stretch, so that versions pile up there. */
	if (roll(t, 2))
		s->first = (uint32_t)(half + t->number * stretch + roll(t, stretch / 8));
	if (s->first + s->count > half + (t->number + 1) * stretch)
		s->count = (uint32_t)(half + (t->number + 1) * stretch - s->first);
}

static int write_some(struct thread *t, struct span *s)
{
	bool direct = t->how[0] == 'd' || (t->how[0] == 'm' && roll(t, 2));
	bool hole = s->count > 1 && roll(t, 16) == 0;
	ssize_t n;

	s->version = atomic_fetch_add(&L.head->next, 1);
	for (uint32_t i = 0; i < s->count; i++) {
		__atomic_store_n(&L.issued[s->first + i], s->version, __ATOMIC_RELEASE);
		if (hole)
			L.zeroed[s->first + i] = s->version;
		else
			sector_fill((void *)(t->buf + (size_t)i * SECTOR), s->first + i, s->version);
	}
	if (hole) {
		if (fallocate(t->buffered, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)s->first * SECTOR,
			      (off_t)s->count * SECTOR))
			return -errno;
	} else {
		n = pwrite(direct ? t->direct : t->buffered, t->buf, (size_t)s->count * SECTOR, (off_t)s->first * SECTOR);
		if (n < 0)
			return -errno;
		if (n != (ssize_t)s->count * SECTOR)
			return -EIO;
	}
	for (uint32_t i = 0; i < s->count; i++)
		L.completed[s->first + i] = s->version;
	pending_add(s, 1);
	atomic_fetch_add(&L.head->writes, 1);
	return 0;
}

/* What this thread wrote last must be there; after a failed write parts of it may be. */
static int read_back(struct thread *t, const struct span *s)
{
	const char *why = "";
	ssize_t n = pread(t->direct, t->buf, (size_t)s->count * SECTOR, (off_t)s->first * SECTOR);

	if (n != (ssize_t)s->count * SECTOR)
		return n < 0 ? -errno : -EIO;
	for (uint32_t i = 0; i < s->count; i++) {
		uint32_t k = s->first + i, v = sector_version((void *)(t->buf + (size_t)i * SECTOR), k, &why);

		if (v == TORN || v < L.completed[k] || v > L.issued[k]) {
			printf("# sector %u while it runs: %s, version %u of %u..%u\n", k, v == TORN ? why : "wrong", v,
			       L.completed[k], L.issued[k]);
			t->wrong = true;
			break;
		}
	}
	atomic_fetch_add(&L.head->reads, 1);
	return 0;
}

static bool gone(int rc)
{
	return rc == -ENOTCONN || rc == -ECONNABORTED || rc == -ESHUTDOWN || rc == -ENODEV;
}

static void *run(void *arg)
{
	struct thread *t = arg;
	_Atomic uint64_t *failed;

	while (!atomic_load(&stopping) && !t->wrong) {
		struct span s;
		unsigned what = (unsigned)roll(t, 24);

		pick(t, &s);
		failed = &L.head->failed_writes;
		if (what == 0) {
			t->rc = flush(roll(t, 2) ? t->direct : t->buffered, roll(t, 2));
			failed = NULL;
		} else if (what < 4) {
			t->rc = read_back(t, &s);
			failed = &L.head->failed_reads;
		} else {
			t->rc = write_some(t, &s);
		}
		if (!t->rc)
			continue;
		if (gone(t->rc))
			break;
		if (failed)
			atomic_fetch_add(failed, 1);
		printf("# thread %u: %s: %s\n", t->number, what == 0 ? "fsync" : what < 4 ? "read" : "write", strerror(-t->rc));
		usleep(20000);
	}
	return NULL;
}

static void on_term(int sig)
{
	atomic_store(&stopping, true);
}

static int load(const char *file, unsigned n, uint64_t seed, const char *how)
{
	struct thread t[MAX_THREADS] = { 0 };
	int direct = open(file, O_RDWR | O_DIRECT | O_CLOEXEC), buffered = open(file, O_RDWR | O_CLOEXEC);
	bool wrong = false;

	if (direct < 0 || buffered < 0)
		die("open", file);
	signal(SIGTERM, on_term);
	for (unsigned i = 0; i < n; i++) {
		t[i] = (struct thread){ .number = i, .of = n, .direct = direct, .buffered = buffered, .how = how,
					.x = mix(seed + i) };
		if (posix_memalign((void **)&t[i].buf, 4096, (size_t)MAX_BLOCK * SECTOR))
			die("allocate", "a block");
		if (pthread_create(&t[i].id, NULL, run, &t[i]))
			die("start", "a thread");
	}
	for (unsigned i = 0; i < n; i++) {
		pthread_join(t[i].id, NULL);
		wrong |= t[i].wrong;
		free(t[i].buf);
	}
	free(pending);
	return wrong;
}

static void show_wrong(uint64_t s, uint32_t v, const char *why, unsigned *wrong)
{
	if ((*wrong)++ >= SHOW)
		return;
	printf("# sector %" PRIu64 " (chunk %" PRIu64 "): ", s, s / PIECE);
	if (v == TORN)
		printf("%s", why);
	else
		printf("version %u is %s", v, v > L.issued[s] ? "from nowhere" : "older than what was flushed");
	printf("; flushed %u, written %u, issued %u, hole %u\n", L.acked[s], L.completed[s], L.issued[s], L.zeroed[s]);
}

struct tally {
	uint64_t checked, lost, unread, absent;
	unsigned wrong;
};

/* Compare n sectors from s on. 0, or errno. */
static int check_some(int fd, uint64_t *buf, uint64_t s, uint64_t n, struct tally *t)
{
	ssize_t r = pread(fd, buf, n * SECTOR, (off_t)(s * SECTOR));
	const char *why = "";

	if (r != (ssize_t)(n * SECTOR))
		return r < 0 ? errno : EIO;
	for (uint64_t i = s; i < s + n; i++) {
		uint32_t v = sector_version(buf + (i - s) * WORDS, i, &why);

		L.seen[i] = v;
		t->checked++;
		t->lost += v != TORN && v < L.completed[i];
		if (v == TORN || v < L.acked[i] || v > L.issued[i])
			show_wrong(i, v, why, &t->wrong);
	}
	return 0;
}

/*
 * With `offline` what was not flushed may be absent: that costs a deadline each, so after some of it only those sectors
 * are read that a flush has covered since the last settle. Exit 3: nothing wrong, and not all was there.
 */
static int check(const char *file, bool offline)
{
	/* The page cache would ask for what is beside it, too. */
	int fd = open(file, O_RDONLY | O_CLOEXEC | (offline || getpid() % 2 ? O_DIRECT : 0)), err;
	struct tally t = { 0 };
	uint64_t *buf;

	if (fd < 0)
		die("open", file);
	if (posix_memalign((void **)&buf, 4096, PIECE * SECTOR))
		die("allocate", "a block");
	for (uint64_t s = 0; s < L.n; s += PIECE) {
		uint64_t n = L.n - s < PIECE ? L.n - s : PIECE;

		err = EIO;
		if (t.absent < 3)
			err = check_some(fd, buf, s, n, &t);
		t.absent += err && offline;
		for (uint64_t i = s; err && i < s + n && t.unread < 3; i++) {
			if (offline && L.acked[i] < L.head->base)
				continue;
			err = check_some(fd, buf, i, 1, &t);
			if (err && t.unread++ < 3)
				printf("# sector %" PRIu64 " (chunk %" PRIu64 ") cannot be read: %s; flushed %u, written %u\n", i,
				       i / PIECE, strerror(err), L.acked[i], L.completed[i]);
			err = EIO;
		}
	}
	free(buf);
	close(fd);
	printf("checked %" PRIu64 " wrong %u unread %" PRIu64 " absent %" PRIu64 " lost %" PRIu64 "\n", t.checked, t.wrong,
	       t.unread, t.absent, t.lost);
	return t.wrong || t.unread ? 1 : t.absent ? 3 : 0;
}

static int flush_file(const char *file)
{
	int fd = open(file, O_RDWR | O_CLOEXEC), rc;

	if (fd < 0)
		die("open", file);
	rc = flush(fd, false);
	close(fd);
	if (rc)
		printf("# fsync: %s\n", strerror(-rc));
	return rc ? 1 : 0;
}

static int settle(void)
{
	L.head->base = atomic_load(&L.head->next);
	for (uint64_t s = 0; s < L.n; s++) {
		L.acked[s] = L.completed[s] = L.issued[s] = L.seen[s];
		/* Zeros of now stay what they are; a hole of before never comes back, and version 0 only where it was. */
		if (L.zeroed[s] != L.seen[s])
			L.zeroed[s] = 0;
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *verb = argc > 2 ? argv[1] : "";

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strcmp(verb, "init") && argc == 6)
		return init(argv[2], argv[3], strtoull(argv[4], NULL, 0), strtoull(argv[5], NULL, 0));
	if (argc > 2)
		ledger_map(argv[2], 0, 0);
	if (!strcmp(verb, "load") && argc == 7 && atoi(argv[4]) > 0 && atoi(argv[4]) <= MAX_THREADS)
		return load(argv[3], (unsigned)atoi(argv[4]), strtoull(argv[5], NULL, 0), argv[6]);
	if (!strcmp(verb, "check") && argc >= 4)
		return check(argv[3], argc > 4);
	if (!strcmp(verb, "flush") && argc == 4)
		return flush_file(argv[3]);
	if (!strcmp(verb, "settle"))
		return settle();
	fprintf(stderr, "usage: worker init|load|check|flush|settle LEDGER ...\n");
	return 2;
}
