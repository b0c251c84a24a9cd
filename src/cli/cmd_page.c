/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage page: serve the page faults of other programs' memory from a region. Options, source, lease, listener; the
 * programs are page_clients.c's. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "backend/backend.h"
#include "base/clock.h"
#include "base/thread.h"
#include "cli/page_clients.h"
#include "mount/control.h"
#include "net/net.h"

#include <json-c/json.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

struct page_conf {
	struct far_opt_list layer;
	char *socket, *order, *record_order, *connections, *control;
	bool writable, take_over, quiet;
	uint64_t chunk, dirty_max, push_interval, window, deadline;
	int64_t pull_workers, push_workers, max_clients, max_blocked;
	int on_fail;
};

static const char *const page_on_fails[] = { "error", "wait", NULL };

#define OPT(k, knd, field) { .key = (k), .kind = FAR_OPT_##knd, .offset = offsetof(struct page_conf, field)
static const struct far_opt page_options[] = {
	OPT("socket", STRING, socket), .value_name = "PATH", .help = "programs connect here and hand their memory over" },
	OPT("layer", LIST, layer), .value_name = "NAME[:KEY=VALUE,...]",
	    .help = "wrap SOURCE in a layer, such as delay:rtt=40ms; may be repeated, the first is outermost" },
	OPT("writable", BOOL, writable), .help = "a program may have its stores pushed to SOURCE, one program at a time" },
	OPT("take-over", BOOL, take_over), .help = "with --writable: take the right to write from whoever has it" },
	OPT("chunk", SIZE, chunk), .min = 4096, .max = 32 << 20, .value_name = "SIZE", .def = "64K",
	    .help = "unit of transfer, a power of two from 4K to 32M" },
	OPT("pull-workers", INT, pull_workers), .max = 1024, .value_name = "N", .def = "auto", .also = "auto",
	    .also_value = -1, .help = "background pulls at once; 0: fill only what is touched" },
	OPT("order", STRING, order), .value_name = "ORDER", .def = "sequential",
	    .help = "what is pulled first: sequential, ranges:0-1M,900M- or trace:FILE" },
	OPT("record-order", STRING, record_order), .value_name = "FILE",
	    .help = "write the order of a program's first touches here when it ends, for --order trace:FILE" },
	OPT("window", SIZE, window), .value_name = "SIZE", .def = "auto", .also = "auto",
	    .help = "bytes that may be in flight for one program" },
	OPT("push-workers", INT, push_workers), .max = 1024, .value_name = "N", .def = "8",
	    .help = "background pushes at once; 0: push only at a flush and at the end" },
	OPT("push-interval", DURATION, push_interval), .min = 1e6, .value_name = "DURATION", .def = "1s",
	    .help = "time between background pushes" },
	OPT("dirty-max", SIZE, dirty_max), .min = 65536, .value_name = "SIZE", .def = "1G",
	    .help = "push ahead of time past this many unsaved bytes" },
	OPT("deadline", DURATION, deadline), .min = 1e6, .value_name = "DURATION", .def = "30s",
	    .help = "how long a touch may wait for SOURCE" },
	OPT("on-fail", ENUM, on_fail), .names = page_on_fails, .value_name = "error|wait", .def = "error",
	    .help = "after the deadline the touch raises SIGBUS, or goes on waiting" },
	OPT("max-blocked", INT, max_blocked), .min = 1, .max = 4096, .value_name = "N", .def = "256",
	    .help = "touches of one program that may wait for SOURCE at once" },
	OPT("max-clients", INT, max_clients), .min = 1, .max = 65536, .value_name = "N", .def = "1024",
	    .help = "programs that are served at once" },
	OPT("connections", STRING, connections), .value_name = "DEMAND+BULK", .def = "2+2",
	    .help = "connections to a network SOURCE" },
	OPT("control", STRING, control), .value_name = "PATH",
	    .help = "make a control socket here, for status, flush and stop" },
	OPT("quiet", BOOL, quiet), .help = "say nothing of programs that come and go" },
	FAR_OPT_END
};
#undef OPT

struct page {
	/* fixed once it listens */
	const struct page_conf *conf;
	struct far_backend *source;
	struct far_mount_opts opts;
	struct page_clients *clients;
	int listener, wake; /* wake: eventfd: a client has gone, or `stop` was asked */
	struct far_thread renewer;
	int renew_stop;     /* eventfd */
	struct far_lease lease; /* of the renewer once it runs */
	char writer[40];

	struct far_mutex lock;
	unsigned asked FAR_GUARDED_BY(lock); /* to end: 1 in order, 2 now */
};

/* ------------------------------------------------------------------------------------------------ the lease */

/* Until stop: renew it each third of its time. Losing it is said once; from then on pushes are refused by the source. */
static void *page_renew_cb(void *arg)
{
	struct page *p = arg;
	uint64_t next = far_now() + p->lease.ttl_ms * FAR_MSEC / 3;

	for (;;) {
		if (far_net_wait_readable(p->renew_stop, -1, next) != -ETIMEDOUT)
			return NULL;
		uint64_t old = far_deadline_limit(far_now() + p->lease.ttl_ms * FAR_MSEC);
		p->lease.epoch = p->lease.origin.epoch;
		struct far_lease ask = p->lease;
		int e = far_lease(p->source, &ask);
		far_deadline_restore(old);
		if (e == -ESTALE || e == -EBUSY) {
			cli_say("somebody else owns the region now. Nothing is pushed any more; what was not pushed is lost when its program ends");
			return NULL;
		}
		if (!e)
			p->lease.origin = ask.origin;
		next = far_now() + p->lease.ttl_ms * FAR_MSEC / (e ? 10 : 3);
	}
}

static int page_take_lease(struct page *p)
{
	struct far_error err = { 0 };
	unsigned char id[12];

	if (!p->conf->writable)
		return CLI_GO;
	if (getrandom(id, sizeof id, 0) != sizeof id)
		memset(id, 1, sizeof id);
	for (size_t k = 0; k < sizeof id; k++)
		snprintf(p->writer + 2 * k, 3, "%02x", id[k]);
	p->lease = (struct far_lease)FAR_LEASE_INIT;
	p->lease.writer = p->writer;
	p->lease.holder = "farpage page";
	p->lease.take_over = p->conf->take_over;
	int e = far_lease(p->source, &p->lease);
	if (e == -EOPNOTSUPP)
		return CLI_GO;
	if (e == -EBUSY)
		far_error_set(&err, EBUSY, "%s has the right to write%s. End that one, or take it with --take-over", p->lease.other,
			      p->lease.gone ? ", but is out of reach" : "");
	else if (e)
		far_error_set(&err, -e, "the right to write was not given: %s", far_strerror(e));
	if (e)
		return cli_fail("cannot page", &err);
	p->lease.take_over = false;
	e = far_thread_start(&p->renewer, "far-lease", page_renew_cb, p);
	if (e) {
		far_error_set(&err, -e, "cannot start a thread: %s", far_strerror(e));
		return cli_fail("cannot page", &err);
	}
	return CLI_GO;
}

static void page_give_lease_back(struct page *p)
{
	if (!p->renewer.running)
		return;
	eventfd_write(p->renew_stop, 1);
	far_thread_join(&p->renewer);
	uint64_t old = far_deadline_limit(far_now() + 5 * FAR_SEC);
	p->lease.epoch = p->lease.origin.epoch;
	p->lease.release = true;
	far_lease(p->source, &p->lease);
	far_deadline_restore(old);
}

/* ------------------------------------------------------------------------------------------------ open */

static int page_check(const struct page_conf *c)
{
	if (!c->socket)
		return cli_usage(&cli_page, "--socket is missing: say where programs connect, such as --socket /run/page.sock");
	if (c->chunk & (c->chunk - 1))
		return cli_usage(&cli_page, "--chunk %" PRIu64 " is not a power of two", c->chunk);
	if (!c->writable && c->take_over)
		return cli_usage(&cli_page, "--take-over takes the right to write: it goes with --writable");
	return CLI_GO;
}

static void page_fill(const struct page_conf *c, struct far_mount_opts *o)
{
	*o = (struct far_mount_opts)FAR_MOUNT_OPTS_INIT;
	o->mode = FAR_MODE_MANAGED;
	o->chunk = c->chunk;
	o->dirty_max = c->dirty_max;
	o->pull_workers = (int)c->pull_workers;
	o->push_workers = (int)c->push_workers;
	o->push_interval_ms = (uint32_t)far_min(c->push_interval / FAR_MSEC, UINT32_MAX);
	o->window = c->window;
	o->order = c->order;
	o->record_order = c->record_order;
	o->deadline_ms = (uint32_t)far_min(c->deadline / FAR_MSEC, UINT32_MAX);
	o->on_fail = (enum far_on_fail)c->on_fail;
	o->max_blocked = (uint32_t)c->max_blocked;
	o->take_over = c->take_over;
}

/* A store on this host has no server that knows who may write: it gets an owner here, which also keeps mounts away. */
static int page_own(struct page *p, const char *uri, struct far_error *err)
{
	struct far_backend *outer;

	if (!p->conf->writable || cli_is_network(uri) || (far_facts(p->source)->caps & FAR_CAP_REMOTE))
		return 0;
	int e = far_owned_new(p->source, &outer);
	if (e == -EBUSY)
		return far_error_set(err, EBUSY, "another mount or server of farpage on this host has %s. End that one, or leave "
				     "--writable out", uri);
	if (e == -EOPNOTSUPP)
		return 0;
	if (e)
		return far_error_set(err, -e, "cannot find out who may write to %s: %s", uri, far_strerror(e));
	p->source = outer;
	return 0;
}

static int page_open_source(struct page *p, const char *uri)
{
	struct far_open_opts opts = FAR_OPEN_OPTS_INIT;
	struct far_error err = { 0 };

	opts.read_only = !p->conf->writable;
	opts.deadline_ms = p->opts.deadline_ms;
	if (cli_connections(p->conf->connections, &opts, &err) < 0)
		return cli_usage(&cli_page, "%s", err.text);
	int e = cli_open(uri, &opts, &p->conf->layer, &p->source, &err);
	if (!e && p->conf->writable && !(far_facts(p->source)->caps & FAR_CAP_WRITE))
		e = far_error_set(&err, EROFS, "%s cannot be written. Leave --writable out", uri);
	if (!e)
		e = page_own(p, uri, &err);
	return e ? cli_fail("cannot page", &err) : page_take_lease(p);
}

static int page_listen(struct page *p)
{
	struct page_clients_conf cc = { .source = p->source, .opts = &p->opts, .writable = p->conf->writable,
					.max = (size_t)p->conf->max_clients, .quiet = p->conf->quiet, .wake = p->wake };
	struct far_net_addr a = { .path = p->conf->socket };
	struct far_error err = { 0 };
	int port, e = page_clients_open(&cc, &p->clients);

	if (e)
		far_error_set(&err, -e, "no room for clients: %s", far_strerror(e));
	else
		e = far_net_listen(&a, false, &p->listener, &port, &err);
	if (e)
		return cli_fail("cannot page", &err);
	printf("listening %s size=%" PRIu64 "\n", p->conf->socket, far_size(p->source));
	fflush(stdout);
	return CLI_GO;
}

/* ------------------------------------------------------------------------------------------------ run */

static void page_ask(struct page *p, unsigned how)
{
	far_mutex_lock(&p->lock);
	p->asked = (unsigned)far_max(p->asked, how);
	far_mutex_unlock(&p->lock);
	eventfd_write(p->wake, 1);
}

static struct json_object *page_control_cb(void *opaque, const char *op, struct json_object *req)
{
	struct page *p = opaque;
	struct json_object *now;

	if (strcmp(op, "flush") == 0) {
		int e = page_clients_flush(p->clients);
		return e < 0 ? far_control_error(e, "the flush failed: %s", far_strerror(e)) : far_control_ok();
	}
	if (strcmp(op, "stop") == 0) {
		page_ask(p, json_object_object_get_ex(req, "now", &now) && json_object_get_boolean(now) ? 2 : 1);
		return far_control_ok();
	}
	if (strcmp(op, "status") != 0)
		return far_control_error(-EOPNOTSUPP, "'%s' is for mounts: this is 'farpage page'", op);
	struct json_object *o = far_control_ok();
	far_control_put(&o, "kind", json_object_new_string("page"));
	far_control_put(&o, "pid", json_object_new_int((int)getpid()));
	far_control_put(&o, "size", json_object_new_int64((int64_t)far_size(p->source)));
	far_control_put(&o, "clients", page_clients_json(p->clients));
	return o;
}

static void page_accept(struct page *p)
{
	int fd;

	for (int k = 0; k < 64; k++) { /* then look at the signals again */
		int e = far_net_accept(p->listener, &fd);
		if (e == -EAGAIN)
			return;
		if (e) {
			cli_say("a client could not connect: %s", far_strerror(e));
			far_sleep_until(far_now() + 10 * FAR_MSEC, false); /* no descriptors left: it will not be better at once */
			return;
		}
		page_clients_add(p->clients, fd);
	}
}

/* Until it is asked to end and no client is left, or is asked twice. */
static void page_loop(struct page *p, int signals)
{
	unsigned asked = 0;
	eventfd_t v;

	for (;;) {
		struct pollfd fd[3] = { { .fd = signals, .events = POLLIN },
					{ .fd = p->wake, .events = POLLIN },
					{ .fd = p->listener, .events = POLLIN } };
		if (poll(fd, 3, -1) < 0 && errno != EINTR)
			return;
		if (fd[0].revents && cli_signal_take(signals))
			page_ask(p, asked + 1);
		if (fd[1].revents)
			eventfd_read(p->wake, &v);
		if (fd[2].revents)
			page_accept(p);
		size_t n = page_clients_reap(p->clients);
		far_mutex_lock(&p->lock);
		bool first = !asked && p->asked == 1;
		asked = p->asked;
		far_mutex_unlock(&p->lock);
		if (asked && p->listener >= 0) {
			far_fd_close(&p->listener);
			unlink(p->conf->socket);
		}
		if (asked >= 2 || (asked && !n))
			return;
		if (first)
			cli_say("programs that have memory which is served from here: %zu. This ends when they have ended. A second signal "
				"ends it now; what they have not touched yet then raises SIGBUS", n);
	}
}

static int page_end(struct page *p)
{
	size_t left = 0;
	int e = page_clients_close(p->clients, &left);

	if (p->listener >= 0)
		unlink(p->conf->socket);
	far_fd_close(&p->listener);
	page_give_lease_back(p);
	far_close(p->source);
	far_fd_close(&p->wake);
	far_fd_close(&p->renew_stop);
	far_mutex_fini(&p->lock);
	return e < 0 ? CLI_UNSAVED : left ? CLI_SIGNAL : CLI_OK;
}

static int page_run_open(const struct page_conf *conf, const char *uri)
{
	struct page p = { .conf = conf, .listener = -1, .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
			  .renew_stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) };
	struct far_control *control = NULL;
	struct far_error err = { 0 };
	int signals = cli_signals(false), code = CLI_GO;

	far_mutex_init(&p.lock);
	page_fill(conf, &p.opts);
	if (signals < 0 || p.wake < 0 || p.renew_stop < 0) {
		cli_say("cannot page: no descriptor for signals: %s", far_strerror(errno));
		code = CLI_FAILED;
	}
	if (code == CLI_GO)
		code = page_open_source(&p, uri);
	if (code == CLI_GO && conf->control && far_control_open(conf->control, NULL, &control, &err) < 0)
		code = cli_fail("cannot page", &err);
	if (code == CLI_GO)
		code = page_listen(&p);
	if (code == CLI_GO && control && far_control_start(control, page_control_cb, &p, &err) < 0)
		code = cli_fail("cannot page", &err);
	if (code == CLI_GO)
		page_loop(&p, signals);
	far_control_close(control);
	int end = page_end(&p);
	if (signals >= 0)
		close(signals);
	return code == CLI_GO ? end : code;
}

static int page_run(int argc, char **argv)
{
	struct page_conf conf = { .pull_workers = -1, .push_workers = -1, .deadline = 30 * FAR_SEC, .max_clients = 1024,
				  .max_blocked = 256 };
	struct cli_args args;
	int code = cli_parse(&cli_page, &conf, argc, argv, &args);

	if (code == CLI_GO)
		code = page_check(&conf);
	if (code == CLI_GO)
		code = page_run_open(&conf, args.v[0]);
	cli_parse_fini(&cli_page, &conf, &args);
	return code;
}

const struct cli_verb cli_page = {
	.name = "page", .synopsis = "SOURCE --socket PATH", .cannot = "cannot page",
	.about = "Serve the page faults of other programs' memory.", .options = page_options, .min_args = 1, .max_args = 1,
	.run = page_run,
};
