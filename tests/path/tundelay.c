/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * tundelay NS_A NS_B DELAY_US RATE_MBIT LOSS_PERMILLE QUEUE_KIB: a long path between two network namespaces.
 *
 * Each namespace (of `ip netns`) gets a TUN device far0, with 10.77.0.1 in A and 10.77.0.2 in B. What is sent into one
 * comes out of the other. Each direction is a queue of QUEUE_KIB before a link of RATE_MBIT (0: no limit), and behind it
 * a delay of DELAY_US; LOSS_PERMILLE of the packets (a fraction will do) are lost. Both ends are the kernel's own TCP, which sees the
 * round trip, the queue and the losses as on a real path. Prints "up" when packets can travel, then runs until it is
 * killed. SIGUSR1: prints for each direction the packets that passed, that were lost, that found the queue full, and the
 * bytes that passed.
 *
 * The link is not simulated packet by packet: `free` is when it has sent all that is queued, so that the queue's length
 * is the time until then. A packet goes into the line with the time at which it comes out.
 *
 * Unless packets are to be lost, the kernel hands over what it would hand to a network card that cuts segments by itself:
 * up to 64 KiB of segments of one MTU at a time, counted with the headers that each would have. A fast link would
 * otherwise cost more CPU than both ends, and be measured instead of them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <arpa/inet.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MTU 1500
#define FRAME_MAX (65536 + 64)
#define SLOTS 65536u /* frames on their way in one direction */
#define RING (96u << 20) /* their bytes */
#define BATCH 64
#define TICK 30000u /* ns: what is due so soon may go now; a wake-up a packet would cost a core */

struct frame {
	uint64_t due;
	size_t at; /* in the ring */
	uint32_t len, wire; /* bytes of ours, and on the link */
};

struct way {
	int in, out;
	struct frame *slot;
	unsigned head, tail; /* put at head, taken at tail */
	unsigned char *ring;
	size_t at; /* where the next frame goes */
	uint64_t free; /* when the link has sent everything */
	uint64_t passed, lost, full, bytes;
};

static uint64_t delay, queue_bytes;
static double ns_a_byte; /* 0: no limit */
static uint32_t loss; /* of 2^32 */
static volatile sig_atomic_t asked;

static void die(const char *what)
{
	fprintf(stderr, "tundelay: %s: %s\n", what, strerror(errno));
	exit(errno == EPERM || errno == EACCES || errno == ENOENT ? 77 : 1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void on_usr1(int sig)
{
	(void)sig;
	asked = 1;
}

static void set_address(int sock, struct ifreq *r, unsigned long request, uint32_t address)
{
	struct sockaddr_in *sin = (struct sockaddr_in *)&r->ifr_addr;

	*sin = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(address) };
	if (ioctl(sock, request, r))
		die("cannot give far0 its address");
}

/* The device in a namespace, with its address; the process stays there. */
static int device(const char *ns, uint32_t address)
{
	struct ifreq r = { .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR };
	char path[300];

	snprintf(path, sizeof path, "/run/netns/%s", ns);
	int n = open(path, O_RDONLY | O_CLOEXEC);
	if (n < 0 || setns(n, CLONE_NEWNET))
		die(path);
	close(n);
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || sock < 0)
		die("/dev/net/tun");
	snprintf(r.ifr_name, sizeof r.ifr_name, "far0");
	if (ioctl(fd, TUNSETIFF, &r))
		die("cannot make a TUN device");
	if (!loss && ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4))
		die("cannot take whole segments from far0");
	set_address(sock, &r, SIOCSIFADDR, address);
	set_address(sock, &r, SIOCSIFNETMASK, 0xffffff00);
	r.ifr_qlen = 10000; /* the queue is ours, not the device's */
	if (ioctl(sock, SIOCSIFTXQLEN, &r))
		die("cannot set the length of far0's queue");
	r.ifr_mtu = MTU;
	if (ioctl(sock, SIOCSIFMTU, &r))
		die("cannot set the MTU of far0");
	r.ifr_flags = IFF_UP | IFF_RUNNING;
	if (ioctl(sock, SIOCSIFFLAGS, &r))
		die("cannot bring far0 up");
	close(sock);
	return fd;
}

static uint32_t chance(void)
{
	static uint64_t x = 1;

	x = x * 6364136223846793005 + 1442695040888963407;
	return (uint32_t)(x >> 32);
}

/* What a frame is on the link: one segment, or several with a header each. */
static uint32_t on_the_link(const unsigned char *data, uint32_t len)
{
	struct virtio_net_hdr h;

	memcpy(&h, data, sizeof h);
	uint32_t bytes = len - (uint32_t)sizeof h, headers = h.hdr_len;
	if (h.gso_type == VIRTIO_NET_HDR_GSO_NONE || !h.gso_size || bytes <= headers)
		return bytes;
	return bytes + ((bytes - headers + h.gso_size - 1) / h.gso_size - 1) * headers;
}

/* Room for one more frame: in one piece, and never where one that waits lies. */
static bool has_room(struct way *w)
{
	if (w->head - w->tail == SLOTS)
		return false;
	if (w->head == w->tail)
		w->at = 0;
	size_t first = w->head == w->tail ? RING : w->slot[w->tail % SLOTS].at;
	if (w->at >= first)
		return first - 1 + RING - w->at >= FRAME_MAX && (w->at + FRAME_MAX <= RING || first > FRAME_MAX);
	return first - w->at > FRAME_MAX;
}

/* Read what the sender has; true if there may be more. */
static bool take_in(struct way *w)
{
	for (int k = 0; k < BATCH; k++) {
		if (!has_room(w))
			return false;
		if (w->at + FRAME_MAX > RING)
			w->at = 0;
		ssize_t n = read(w->in, w->ring + w->at, FRAME_MAX);
		if (n <= (ssize_t)sizeof(struct virtio_net_hdr))
			return false;
		struct frame *f = &w->slot[w->head % SLOTS];
		uint64_t t = now();
		f->wire = on_the_link(w->ring + w->at, (uint32_t)n);
		if (w->free < t)
			w->free = t;
		if (ns_a_byte > 0 && (double)(w->free - t) / ns_a_byte + f->wire > (double)queue_bytes) {
			w->full++;
			continue;
		}
		w->free += (uint64_t)(f->wire * ns_a_byte);
		if (loss && chance() < loss) {
			w->lost++;
			continue;
		}
		f->len = (uint32_t)n;
		f->at = w->at;
		f->due = w->free + delay;
		w->at += (size_t)n;
		w->head++;
	}
	return true;
}

/* Deliver what is due; when the next one will be. */
static uint64_t let_out(struct way *w)
{
	uint64_t t = now() + TICK;

	while (w->tail != w->head) {
		struct frame *f = &w->slot[w->tail % SLOTS];
		if (f->due > t)
			return f->due;
		if (write(w->out, w->ring + f->at, f->len) == (ssize_t)f->len) {
			w->passed++;
			w->bytes += f->wire;
		} else {
			w->full++;
		}
		w->tail++;
	}
	return UINT64_MAX;
}

static void tell(const struct way *w)
{
	for (int i = 0; i < 2; i++)
		printf("%s passed %llu lost %llu full %llu bytes %llu\n", i ? "B-A" : "A-B", (unsigned long long)w[i].passed,
		       (unsigned long long)w[i].lost, (unsigned long long)w[i].full, (unsigned long long)w[i].bytes);
	fflush(stdout);
	asked = 0;
}

static void wait_for(struct way *w, uint64_t due)
{
	struct pollfd p[2] = { { w[0].in, POLLIN, 0 }, { w[1].in, POLLIN, 0 } };
	uint64_t t = now(), ns = due == UINT64_MAX ? 100000000u : due > t + TICK ? due - t - TICK : 0;
	struct timespec ts = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };

	ppoll(p, 2, &ts, NULL);
}

int main(int argc, char **argv)
{
	struct way w[2] = { 0 };
	bool more = false;

	if (argc != 7) {
		fprintf(stderr, "usage: tundelay NS_A NS_B DELAY_US RATE_MBIT LOSS_PERMILLE QUEUE_KIB\n");
		return 2;
	}
	delay = strtoull(argv[3], NULL, 10) * 1000;
	double rate = atof(argv[4]);
	ns_a_byte = rate > 0 ? 8000 / rate : 0;
	loss = (uint32_t)(atof(argv[5]) / 1000 * 4294967296.0);
	queue_bytes = strtoull(argv[6], NULL, 10) << 10;
	w[0].in = w[1].out = device(argv[1], 0x0a4d0001);
	w[1].in = w[0].out = device(argv[2], 0x0a4d0002);
	for (int i = 0; i < 2; i++) {
		w[i].slot = calloc(SLOTS, sizeof *w[i].slot);
		w[i].ring = malloc(RING);
		if (!w[i].slot || !w[i].ring)
			die("memory");
	}
	signal(SIGUSR1, on_usr1);
	prctl(PR_SET_TIMERSLACK, 1);
	/* A link does not get slower because its ends are busy. */
	struct sched_param first = { .sched_priority = 2 }; /* ends that are measured as such may have 1 */
	(void)sched_setscheduler(0, SCHED_RR, &first);
	puts("up");
	fflush(stdout);
	for (;;) {
		if (!more) {
			uint64_t a = let_out(&w[0]), b = let_out(&w[1]);
			wait_for(w, a < b ? a : b);
		}
		more = take_in(&w[0]);
		more = take_in(&w[1]) || more;
		if (more) {
			let_out(&w[0]);
			let_out(&w[1]);
		}
		if (asked)
			tell(w);
	}
}
