/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Connections: who may listen where, deadlines and stops while connecting, ends that go away. */
#define _GNU_SOURCE
#include "peer.h"

#include "net/net.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int listen_on(const char *host, int *port, struct far_error *err)
{
	struct far_net_addr a = { .host = host };
	int fd = -1;
	int r = far_net_listen(&a, false, &fd, port, err);

	return r ? r : fd;
}

static void test_loopback_only(void **state)
{
	static const char *const no[] = { "0.0.0.0", "::", "" };
	struct far_error err;
	int port;

	for (size_t i = 0; i < FAR_ARRAY_LEN(no); i++) {
		assert_int_equal(listen_on(no[i], &port, &err), -EPERM);
		assert_non_null(strstr(err.text, "--insecure"));
	}
	int fd = listen_on("127.0.0.1", &port, &err);
	assert_true(fd >= 0 && port > 0);
	close(fd);
	fd = listen_on("127.1.2.3", &port, &err);
	assert_true(fd >= 0);
	close(fd);
	struct far_net_addr all = { .host = "0.0.0.0" };
	assert_int_equal(far_net_listen(&all, true, &fd, &port, &err), 0);
	close(fd);
}

static void test_bytes(void **state)
{
	struct far_net_addr a = { .host = "127.0.0.1" };
	struct far_conn c = { 0 }, d = { 0 };
	int fd, peer;
	char buf[8] = "";

	assert_int_equal(far_net_listen(&a, false, &fd, &a.port, NULL), 0);
	assert_int_equal(far_net_accept(fd, &peer), -EAGAIN);
	assert_int_equal(far_conn_connect(&c, &a, far_now() + FAR_SEC, -1, NULL), 0);
	assert_int_equal(far_net_wait_readable(fd, -1, far_now() + FAR_SEC), 0);
	assert_int_equal(far_net_accept(fd, &peer), 0);
	assert_int_equal(far_conn_socket(&d, peer), 0);
	struct iovec out = { (void *)"hello", 5 }, in = { buf, sizeof buf };
	assert_int_equal(d.ops->readv(&d, &in, 1), -EAGAIN);
	assert_int_equal(d.ops->wait(&d, true, false, far_now() + 20 * FAR_MSEC), -ETIMEDOUT);
	assert_int_equal(c.ops->writev(&c, &out, 1), 5);
	assert_int_equal(d.ops->wait(&d, true, false, far_now() + FAR_SEC), 0);
	assert_int_equal(d.ops->readv(&d, &in, 1), 5);
	assert_string_equal(buf, "hello");
	c.ops->shutdown(&c);
	assert_int_equal(d.ops->wait(&d, true, false, far_now() + FAR_SEC), 0);
	assert_int_equal(d.ops->readv(&d, &in, 1), 0);
	far_conn_close(&c);
	far_conn_close(&d);
	far_conn_close(&d);
	close(fd);
}

/* A listener whose queue is full answers nobody: the deadline and the stop both end the wait. */
static void test_connect_waits(void **state)
{
	int cancel = eventfd(0, EFD_CLOEXEC), fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), held[64], n = 0, r = 0;
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof sin;
	struct far_net_addr a = { .host = "127.0.0.1" };
	struct far_conn c = { 0 };
	struct far_error err;
	uint64_t one = 1;

	assert_int_equal(bind(fd, (struct sockaddr *)&sin, sizeof sin), 0);
	assert_int_equal(listen(fd, 0), 0);
	assert_int_equal(getsockname(fd, (struct sockaddr *)&sin, &len), 0);
	a.port = ntohs(sin.sin_port);
	uint64_t began = far_now();
	while (n < 64 && (r = far_conn_connect(&c, &a, far_now() + 100 * FAR_MSEC, cancel, &err)) == 0)
		held[n++] = c.fd;
	if (n < 64) {
		assert_int_equal(r, -ETIMEDOUT);
		assert_true(far_now() - began < 5 * FAR_SEC);
		assert_int_equal(write(cancel, &one, sizeof one), sizeof one);
		assert_int_equal(far_conn_connect(&c, &a, far_now() + LIMIT, cancel, &err), -ESHUTDOWN);
		assert_true(far_now() - began < 10 * FAR_SEC);
	} else {
		puts("skip: this kernel lets a full queue take more connections");
	}
	while (n)
		close(held[--n]);
	close(fd);
	close(cancel);
}

static void test_unix_names(void **state)
{
	char dir[] = "/tmp/far-net-XXXXXX", path[64], longer[200];
	struct far_error err;
	int fd, fd2, port;

	assert_non_null(mkdtemp(dir));
	snprintf(path, sizeof path, "%s/s", dir);
	memset(longer, 'x', sizeof longer - 1);
	longer[sizeof longer - 1] = 0;
	struct far_net_addr a = { .path = path }, b = { .path = longer };
	struct far_conn c = { 0 };
	assert_int_equal(far_net_listen(&b, false, &fd, &port, &err), -ENAMETOOLONG);
	assert_int_equal(far_conn_connect(&c, &a, far_now() + FAR_SEC, -1, &err), -ENOENT);
	assert_int_equal(far_net_listen(&a, false, &fd, &port, &err), 0);
	assert_int_equal(far_net_listen(&a, false, &fd2, &port, &err), -EADDRINUSE);
	assert_int_equal(far_conn_connect(&c, &a, far_now() + FAR_SEC, -1, &err), 0);
	far_conn_close(&c);
	close(fd);
	/* Its server died without a word: the name may be taken again. */
	assert_int_equal(far_conn_connect(&c, &a, far_now() + FAR_SEC, -1, &err), -ECONNREFUSED);
	assert_int_equal(far_net_listen(&a, false, &fd, &port, &err), 0);
	close(fd);
	assert_int_equal(unlink(path), 0);
	/* A file that is no socket is left alone. */
	FILE *f = fopen(path, "w");
	assert_non_null(f);
	fclose(f);
	assert_int_equal(far_net_listen(&a, false, &fd, &port, &err), -EADDRINUSE);
	assert_int_equal(access(path, F_OK), 0);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(rmdir(dir), 0);
}

static void test_no_socket(void **state)
{
	struct far_conn c = { 0 };
	struct far_error err;
	int fd = eventfd(0, EFD_CLOEXEC), dgram = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	assert_int_equal(far_conn_socket(&c, fd), -ENOTSOCK);
	assert_int_equal(far_conn_socket(&c, dgram), -EINVAL);
	assert_null(c.ops);
	close(fd);
	close(dgram);
	struct far_net_addr a = { .host = "no.such.host.invalid", .port = 1 };
	assert_true(far_conn_connect(&c, &a, far_now() + FAR_SEC, -1, &err) < 0);
	assert_non_null(strstr(err.text, "no.such.host.invalid"));
}

/* Of so many waits, each this long, how many are spun through? */
static unsigned spun(struct far_spin *s, unsigned waits, uint64_t each)
{
	unsigned n = 0;

	for (unsigned i = 0; i < waits; i++) {
		n += far_spin_wanted(s);
		far_spin_learn(s, each);
	}
	return n;
}

/* Short waits are spun through, long ones slept through; and those that are over as soon as we sleep, because the peer needs
 * this CPU, soon are, too, but for a few, which find out when that has changed. */
static void test_spin(void **state)
{
	struct far_spin s = { 0 };

	assert_int_equal(spun(&s, 100, FAR_SPIN / 3), 100);
	assert_int_equal(spun(&s, 100, FAR_MSEC), 1);
	assert_int_equal(spun(&s, 100, FAR_SPIN / 3), 99);
	assert_int_equal(spun(&s, 3, 2 * FAR_SPIN), 3); /* now and then */
	assert_int_equal(spun(&s, 100, FAR_SPIN / 3), 100);
	assert_in_range(spun(&s, 1000, FAR_SPIN + FAR_SPIN / 5), 1000 / FAR_SPIN_TRIAL, 1000 / FAR_SPIN_TRIAL + FAR_SPIN_DOUBTS);
	assert_in_range(spun(&s, 100, FAR_SPIN / 3), 1, 99);
	assert_int_equal(spun(&s, 100, FAR_SPIN / 3), 100);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_loopback_only), cmocka_unit_test(test_bytes),   cmocka_unit_test(test_connect_waits),
		cmocka_unit_test(test_unix_names),    cmocka_unit_test(test_no_socket),     cmocka_unit_test(test_spin),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
