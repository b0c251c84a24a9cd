/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* System calls that are given region memory, absent, here, or both: the kernel must see the right bytes, and what it
 * stores there must be found and pushed. */
#define _GNU_SOURCE
#include "rig.h"

#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#define AT(chunk) ((uint64_t)(chunk) * CHUNK)

/* A map whose memory system calls may be given; else: they fail with EFAULT, which is checked once. */
static struct far_mount *calls_map(const struct far_mount_opts *o)
{
	struct far_mount *m = rig_map(o);

	if (rig_status(m).kernel_faults)
		return m;
	int fd = memfd_create("calls", 0);
	unsigned char *p = far_addr(m);
	CHECK(write(fd, p + AT(100), 100) < 0 && errno == EFAULT);
	SAME(far_mount_populate(m, AT(100), 100), 0);
	SAME(write(fd, p + AT(100), 100), 100);
	SAME(far_mount_close(m), 0);
	rig_skip("the kernel's own faults are not served here; EFAULT, and far_mount_populate() helps, was checked");
}

static int calls_file(void)
{
	char path[] = "/tmp/farpage-calls-XXXXXX";
	int fd = mkstemp(path);

	CHECK(fd >= 0);
	unlink(path);
	return fd;
}

/* What calls stored is on the remote after a flush: byte v in [off, off+len), the neighbours as they were. */
static void stored_arrived(struct far_mount *m, uint64_t off, size_t len, unsigned char v)
{
	SAME(far_mount_flush(m), 0);
	for (size_t k = 0; k < len; k++)
		SAME(remote.data[off + k], v);
	CHECK(rig_right(remote.data + off - 100, off - 100, 100));
	CHECK(rig_right(remote.data + off + len, off + len, 100));
}

static void read_and_write(void)
{
	struct far_mount *m = calls_map(NULL);
	unsigned char *p = far_addr(m), *back = malloc(SIZE), v[3 * CHUNK];
	int fd = calls_file(), tube[2];

	/* Out of the region: absent, in one call of all of it. */
	SAME(write(fd, p, SIZE), SIZE);
	SAME(pread(fd, back, SIZE, 0), SIZE);
	CHECK(rig_right(back, 0, SIZE));
	SAME(far_mount_close(m), 0);
	/* Into the region: absent pages, then pages that are here and clean, then dirty ones. */
	m = calls_map(NULL);
	p = far_addr(m);
	memset(v, 0x61, sizeof v);
	SAME(pwrite(fd, v, sizeof v, 0), sizeof v);
	SAME(pread(fd, p + AT(20) + 500, sizeof v, 0), sizeof v);
	stored_arrived(m, AT(20) + 500, sizeof v, 0x61);
	memset(v, 0x62, sizeof v);
	SAME(pwrite(fd, v, sizeof v, 0), sizeof v);
	SAME(pread(fd, p + AT(20) + 500, sizeof v, 0), sizeof v);
	stored_arrived(m, AT(20) + 500, sizeof v, 0x62);
	/* Short reads into absent pages, through a pipe. */
	CHECK(pipe(tube) == 0);
	SAME(write(tube[1], v, 7000), 7000);
	SAME(read(tube[0], p + AT(40) + 10, 7000), 7000);
	stored_arrived(m, AT(40) + 10, 7000, 0x62);
	struct iovec iov[2] = { { p + AT(50), CHUNK }, { p + AT(60), CHUNK } };
	SAME(pwritev(fd, iov, 2, 0), 2 * CHUNK);
	SAME(pread(fd, back, 2 * CHUNK, 0), 2 * CHUNK);
	CHECK(rig_right(back, AT(50), CHUNK) && rig_right(back + CHUNK, AT(60), CHUNK));
	SAME(far_mount_close(m), 0);
	free(back);
}

static void *calls_receive(void *arg)
{
	int *fd = arg;
	unsigned char *buf = malloc(SIZE);

	for (size_t at = 0; at < SIZE;) {
		ssize_t n = recv(*fd, buf + at, SIZE - at, 0);
		if (n <= 0)
			break;
		at += (size_t)n;
	}
	return buf;
}

static void send_and_receive(void)
{
	struct far_mount *m = calls_map(NULL);
	unsigned char *p = far_addr(m), v[5000];
	int pair[2];
	pthread_t t;
	void *got;

	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
	SAME(pthread_create(&t, NULL, calls_receive, &pair[1]), 0);
	for (size_t at = 0; at < SIZE;) {
		ssize_t n = send(pair[0], p + at, SIZE - at, 0);
		CHECK(n > 0);
		at += (size_t)n;
	}
	pthread_join(t, &got);
	CHECK(rig_right(got, 0, SIZE));
	free(got);
	SAME(far_mount_evict(m, 0, SIZE), 0);
	memset(v, 0x71, sizeof v);
	SAME(send(pair[0], v, sizeof v, 0), sizeof v);
	SAME(recv(pair[1], p + AT(33) + 77, sizeof v, MSG_WAITALL), sizeof v);
	stored_arrived(m, AT(33) + 77, sizeof v, 0x71);
	/* Another process' calls on ours. */
	struct iovec here = { v, sizeof v }, there = { p + AT(70), sizeof v };
	ssize_t n = process_vm_readv(getpid(), &here, 1, &there, 1, 0);
	CHECK(n < 0 || (n == sizeof v && rig_right(v, AT(70), sizeof v)));
	SAME(far_mount_close(m), 0);
}

/* A page cannot be pinned and written to by a device while it is missing, or moved away from under it. */
static void direct_io(void)
{
	struct far_mount *m = calls_map(NULL);
	unsigned char *p = far_addr(m), *buf;
	char path[] = "/tmp/farpage-direct-XXXXXX";
	int fd = mkstemp(path), direct = open(path, O_RDWR | O_DIRECT);

	unlink(path);
	if (direct < 0)
		rig_skip("O_DIRECT on /tmp: %s", strerror(errno));
	CHECK(posix_memalign((void **)&buf, PAGE, AT(8)) == 0);
	SAME(pwrite(direct, p, AT(8), 0), AT(8)); /* absent */
	SAME(pwrite(direct, p, AT(8), (off_t)AT(8)), AT(8)); /* here */
	SAME(pread(fd, buf, AT(8), 0), AT(8));
	CHECK(rig_right(buf, 0, AT(8)));
	SAME(pread(fd, buf, AT(8), (off_t)AT(8)), AT(8));
	CHECK(rig_right(buf, 0, AT(8)));
	memset(buf, 0x81, AT(2));
	SAME(pwrite(direct, buf, AT(2), 0), AT(2));
	SAME(pread(direct, p + AT(30), AT(2), 0), AT(2)); /* into absent pages */
	stored_arrived(m, AT(30), AT(2), 0x81);
	memset(buf, 0x82, AT(2));
	SAME(pwrite(direct, buf, AT(2), 0), AT(2));
	SAME(pread(direct, p + AT(30), AT(2), 0), AT(2)); /* into clean ones, half of which are given back first */
	stored_arrived(m, AT(30), AT(2), 0x82);
	SAME(far_mount_evict(m, AT(31), CHUNK), 0);
	memset(buf, 0x83, AT(2));
	SAME(pwrite(direct, buf, AT(2), 0), AT(2));
	SAME(pread(direct, p + AT(30), AT(2), 0), AT(2));
	stored_arrived(m, AT(30), AT(2), 0x83);
	SAME(far_mount_evict(m, 0, SIZE), 0);
	CHECK(p[AT(31) + 5] == 0x83 && p[AT(32)] == rig_byte(AT(32)));
	SAME(far_mount_close(m), 0);
	free(buf);
}

/* --------------------------------------------------------------------------------------------------------- io_uring */

struct ring {
	int fd;
	unsigned *sq_tail, *sq_array, *cq_head, *cq_tail;
	unsigned sq_mask, cq_mask;
	struct io_uring_sqe *sqe;
	struct io_uring_cqe *cqe;
};

static void ring_open(struct ring *r)
{
	struct io_uring_params p = { 0 };

	r->fd = (int)syscall(SYS_io_uring_setup, 8, &p);
	if (r->fd < 0)
		rig_skip("io_uring: %s", strerror(errno));
	size_t sq_len = p.sq_off.array + p.sq_entries * sizeof(unsigned);
	size_t cq_len = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
	char *sq = mmap(NULL, sq_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQ_RING);
	char *cq = mmap(NULL, cq_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_CQ_RING);
	r->sqe = mmap(NULL, p.sq_entries * sizeof *r->sqe, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, IORING_OFF_SQES);
	CHECK(sq != MAP_FAILED && cq != MAP_FAILED && r->sqe != MAP_FAILED);
	r->sq_tail = (unsigned *)(void *)(sq + p.sq_off.tail);
	r->sq_array = (unsigned *)(void *)(sq + p.sq_off.array);
	r->sq_mask = *(unsigned *)(void *)(sq + p.sq_off.ring_mask);
	r->cq_head = (unsigned *)(void *)(cq + p.cq_off.head);
	r->cq_tail = (unsigned *)(void *)(cq + p.cq_off.tail);
	r->cq_mask = *(unsigned *)(void *)(cq + p.cq_off.ring_mask);
	r->cqe = (struct io_uring_cqe *)(void *)(cq + p.cq_off.cqes);
}

/* One operation, waited for: its result. */
static int ring_do(struct ring *r, int op, int fd, void *buf, unsigned len, uint64_t off, unsigned flags)
{
	unsigned tail = *r->sq_tail, at = tail & r->sq_mask;

	r->sqe[at] = (struct io_uring_sqe){ .opcode = (uint8_t)op, .fd = fd, .addr = (uint64_t)(uintptr_t)buf, .len = len, .off = off,
					    .flags = (uint8_t)flags };
	r->sq_array[at] = at;
	__atomic_store_n(r->sq_tail, tail + 1, __ATOMIC_RELEASE);
	long n;
	do
		n = syscall(SYS_io_uring_enter, r->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0);
	while (n < 0 && errno == EINTR);
	SAME(n, 1);
	UNTIL(__atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE) != *r->cq_head);
	int res = r->cqe[*r->cq_head & r->cq_mask].res;
	__atomic_store_n(r->cq_head, *r->cq_head + 1, __ATOMIC_RELEASE);
	return res;
}

static void uring(void)
{
	struct far_mount *m = calls_map(NULL);
	unsigned char *p = far_addr(m), *buf = malloc(AT(8));
	int fd = calls_file();
	struct ring r;

	ring_open(&r);
	for (unsigned way = 0; way < 2; way++) { /* inline, and on the kernel's worker threads */
		unsigned flags = way ? IOSQE_ASYNC : 0;
		uint64_t at = AT(10 + 40 * way);
		unsigned char v = (unsigned char)(0x91 + way);
		SAME(ring_do(&r, IORING_OP_WRITE, fd, p + at, AT(4), 0, flags), AT(4)); /* absent */
		SAME(pread(fd, buf, AT(4), 0), AT(4));
		CHECK(rig_right(buf, at, AT(4)));
		memset(buf, v, AT(2));
		SAME(pwrite(fd, buf, AT(2), 0), AT(2));
		SAME(ring_do(&r, IORING_OP_READ, fd, p + at + AT(20), AT(2), 0, flags), AT(2)); /* into absent pages */
		stored_arrived(m, at + AT(20), AT(2), v);
		memset(buf, v + 8, AT(2));
		SAME(pwrite(fd, buf, AT(2), 0), AT(2));
		SAME(ring_do(&r, IORING_OP_READ, fd, p + at + AT(20), AT(2), 0, flags), AT(2)); /* into clean ones */
		stored_arrived(m, at + AT(20), AT(2), (unsigned char)(v + 8));
	}
	SAME(far_mount_close(m), 0);
	free(buf);
}

/* Pages that are pinned for long: no store of the kernel's through them is seen, so the program says what was stored. */
static void uring_registered_buffers(void)
{
	struct far_mount *m = calls_map(NULL);
	unsigned char *p = far_addr(m), *buf = malloc(AT(4));
	struct iovec iov = { p + AT(20), AT(4) };
	int fd = calls_file();
	struct ring r;

	ring_open(&r);
	if (syscall(SYS_io_uring_register, r.fd, IORING_REGISTER_BUFFERS, &iov, 1) < 0)
		rig_skip("io_uring's registered buffers: %s", strerror(errno));
	SAME(ring_do(&r, IORING_OP_WRITE_FIXED, fd, p + AT(20), AT(4), 0, 0), AT(4));
	SAME(pread(fd, buf, AT(4), 0), AT(4));
	CHECK(rig_right(buf, AT(20), AT(4)));
	SAME(far_mount_flush(m), 0);
	for (unsigned round = 0; round < 3; round++) {
		unsigned char v = (unsigned char)(0xb1 + round);
		memset(buf, v, AT(2));
		SAME(pwrite(fd, buf, AT(2), 0), AT(2));
		SAME(ring_do(&r, IORING_OP_READ_FIXED, fd, p + AT(21), AT(2), 0, 0), AT(2));
		SAME(far_mount_stored(m, AT(21), AT(2)), 0);
		CHECK(p[AT(21)] == v && p[AT(23) - 1] == v); /* the device's page is still the program's */
		stored_arrived(m, AT(21), AT(2), v);
	}
	close(r.fd);
	SAME(far_mount_close(m), 0);
	free(buf);
}

/* --------------------------------------------------------------------------------------------------------- many threads */

struct reader {
	pthread_t t;
	unsigned char *p;
	unsigned k;
};

static void *reader_main(void *arg)
{
	struct reader *r = arg;
	unsigned char *back = malloc(SIZE);
	int fd = memfd_create("reader", 0);
	uint64_t from = AT(r->k) / 2;

	SAME(pwrite(fd, r->p + from, SIZE - from, 0), SIZE - from);
	SAME(pread(fd, back, SIZE - from, 0), SIZE - from);
	CHECK(rig_right(back, from, SIZE - from));
	close(fd);
	free(back);
	return NULL;
}

/* Each of many threads hands nearly all of the absent region to one system call. */
static void huge_reads_by_many_threads(void)
{
	struct far_mount_opts o = rig_opts();
	struct reader r[16];

	for (unsigned round = 0; round < 2; round++) {
		o.local_max = round ? 40 * CHUNK : 0;
		struct far_mount *m = calls_map(&o);
		for (unsigned k = 0; k < 16; k++) {
			r[k] = (struct reader){ .p = far_addr(m), .k = k };
			SAME(pthread_create(&r[k].t, NULL, reader_main, &r[k]), 0);
		}
		for (unsigned k = 0; k < 16; k++)
			pthread_join(r[k].t, NULL);
		SAME(far_mount_close(m), 0);
	}
}

/* A call that is stopped half-way by an error says how far it came, or EFAULT; never success over bytes that were not there. */
static void an_error_inside_a_call(void)
{
	struct far_mount *m = calls_map(NULL);
	unsigned char *p = far_addr(m), *back = malloc(AT(4));
	int fd = calls_file();

	CHECK(rig_right(p + AT(10), AT(10), CHUNK));
	remote.fail_reads = EIO;
	ssize_t n = write(fd, p + AT(10), AT(4));
	CHECK(n < (ssize_t)AT(4));
	if (n > 0) {
		SAME(pread(fd, back, (size_t)n, 0), n);
		CHECK(rig_right(back, AT(10), (size_t)n));
	} else {
		CHECK(errno == EFAULT || errno == EIO || errno == EHWPOISON);
	}
	remote.fail_reads = 0;
	SAME(far_mount_heal(m, 0, SIZE), 0);
	SAME(pwrite(fd, p + AT(10), AT(4), 0), AT(4));
	SAME(pread(fd, back, AT(4), 0), AT(4));
	CHECK(rig_right(back, AT(10), AT(4)));
	SAME(far_mount_close(m), 0);
	free(back);
}

#define CASE(f) { #f, f }

int main(int argc, char **argv)
{
	static const struct rig_case cases[] = {
		CASE(read_and_write),
		CASE(send_and_receive),
		CASE(direct_io),
		CASE(uring),
		CASE(uring_registered_buffers),
		CASE(huge_reads_by_many_threads),
		CASE(an_error_inside_a_call),
	};
	return rig_main(argc, argv, cases, sizeof cases / sizeof cases[0]);
}
