/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * A client is a connection on which a program hands memory over, and what is served of it until that program is gone. It
 * has one thread, which does everything in order:
 *
 *   RECEIVING  far_uffd_receive()             a refusal is said, and told to a client that can hear it
 *   SERVING    page_client_serve()            the receivers of the pager answer faults; this thread answers requests
 *   GONE       the thread has ended           page_clients_reap() joins and frees it
 *
 * SERVING ends when the process has ended (its pidfd, or the kernel says so at a fill), when the connection closes and there
 * is no pidfd, or in page_clients_close(). A connection that closes while the process lives ends nothing: the Go family's
 * programs close it at once, and memory that nobody serves would be zeros or a hang.
 *
 * Requests, in our format: a byte 'F' is a flush, and so is the end of the client's half of the connection; each is answered.
 *
 * The list and the flags are under `lock`. A pager is used by others than its thread (flush, status) only while `users`
 * counts them; its thread waits for them before it closes it.
 */
#define _GNU_SOURCE
#include "cli/page_clients.h"

#include "base/clock.h"
#include "base/thread.h"
#include "cli/cli.h"
#include "cli/progress.h"
#include "frontend/pointer.h"
#include "mount/control.h"

#include <json-c/json.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

struct page_client {
	/* fixed */
	struct page_clients *all;
	struct page_client *next; /* under all->lock */
	struct far_thread thread;
	unsigned number;
	int fd;
	int ended; /* eventfd: the process is gone */
	pid_t pid;

	/* of its thread */
	struct far_handover h;
	uint64_t bytes;

	/* under all->lock */
	struct far_pager *pager; /* NULL: not yet, or no more */
	unsigned users;
	bool writer, closing, gone;
};

struct page_clients {
	/* fixed */
	struct page_clients_conf conf;
	int stop; /* eventfd, never read: everybody sees it */

	struct far_mutex lock;
	struct far_cond changed;
	struct page_client *first FAR_GUARDED_BY(lock);
	size_t n FAR_GUARDED_BY(lock);
	unsigned numbers FAR_GUARDED_BY(lock);
	bool writer FAR_GUARDED_BY(lock);
	int flushed FAR_GUARDED_BY(lock); /* the first error of a last flush */
};

static const char *const page_formats[] = { "farpage", "go", "firecracker" };

/* ------------------------------------------------------------------------------------------------ a client's thread */

static void page_client_ended_cb(void *opaque)
{
	struct page_client *c = opaque;
	eventfd_write(c->ended, 1);
}

/* Whether somebody else has the one place for a writer. One who is about to leave is waited for. */
static bool page_writer_locked(struct page_clients *all) FAR_REQUIRES(all->lock)
{
	uint64_t until = far_now() + 10 * FAR_SEC;

	for (;;) {
		struct page_client *c = all->first;
		while (c && !c->writer)
			c = c->next;
		if (!c || !c->closing)
			return all->writer;
		if (!far_cond_wait_until(&all->changed, &all->lock, until))
			return true;
	}
}

/* Receive is over: make it a pager. */
static int page_client_open(struct page_client *c, struct far_error *err)
{
	struct page_clients *all = c->all;
	struct far_pager *pager;
	bool taken;

	if (c->h.writable && !all->conf.writable)
		return far_error_set(err, EROFS, "its stores are to be pushed, and this pager was started without --writable");
	far_mutex_lock(&all->lock);
	taken = c->h.writable && page_writer_locked(all);
	if (c->h.writable && !taken)
		all->writer = c->writer = true;
	far_mutex_unlock(&all->lock);
	if (taken)
		return far_error_set(err, EBUSY, "another client's stores are pushed to this region already: one at a time");
	for (size_t k = 0; k < c->h.n; k++)
		c->bytes += c->h.range[k].len;
	int e = far_pager_open(&c->h, all->conf.source, all->conf.opts, page_client_ended_cb, c, &pager, err);
	if (e)
		return e;
	c->bytes = c->bytes ? c->bytes : far_size(all->conf.source);
	far_mutex_lock(&all->lock);
	c->pager = pager;
	far_mutex_unlock(&all->lock);
	return 0;
}

/* Flush for the client itself, and tell it. -ESRCH: its memory is gone; else whether it could be told. */
static int page_client_flush(struct page_client *c, const struct far_handover *how)
{
	int e = far_pager_flush(c->pager);
	int told = far_uffd_accept(c->fd, how, e < 0 ? -e : 0, e < 0 ? far_strerror(e) : NULL);

	return e == -ESRCH ? e : told;
}

/* Requests on the connection. 0, or why it has ended: -ESRCH: with the memory. */
static int page_client_request(struct page_client *c, const struct far_handover *how)
{
	char buf[64];
	ssize_t n = recv(c->fd, buf, sizeof buf, MSG_DONTWAIT);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -errno;
	if (n == 0) {
		int e = page_client_flush(c, how);
		return e ? e : -ENOTCONN;
	}
	int e = 0;
	for (ssize_t k = 0; k < n && !e; k++)
		if (buf[k] == 'F')
			e = page_client_flush(c, how);
	return e;
}

static void page_client_serve(struct page_client *c, enum far_handover_format format, bool has_process)
{
	const struct far_handover how = { .size = sizeof how, .format = format, .uffd = -1, .pagemap = -1, .mem = -1, .process = -1 };
	struct pollfd p[3] = { { .fd = c->ended, .events = POLLIN },
			       { .fd = c->all->stop, .events = POLLIN },
			       { .fd = c->fd, .events = POLLIN } };

	for (;;) {
		if (poll(p, 3, -1) < 0 && errno != EINTR)
			return;
		if (p[0].revents || p[1].revents)
			return;
		int e = p[2].revents ? page_client_request(c, &how) : 0;
		if (e == -ESRCH || (e && !has_process))
			return;
		if (e)
			p[2].fd = -1;
	}
}

static void page_client_close(struct page_client *c)
{
	struct page_clients *all = c->all;
	struct far_status st = FAR_STATUS_INIT;
	char size[24];

	far_mutex_lock(&all->lock);
	struct far_pager *pager = c->pager;
	c->pager = NULL;
	c->closing = true;
	while (c->users)
		far_cond_wait(&all->changed, &all->lock);
	far_mutex_unlock(&all->lock);
	if (!pager)
		return;
	far_pager_status(pager, &st);
	int e = far_pager_close(pager);
	if (e == -ESRCH && !st.dirty)
		cli_say("client %u ended without a last flush: what it stored after the one before is lost", c->number);
	else if (e < 0 && st.dirty)
		cli_say("client %u: %s of its stores are lost: %s", c->number, progress_size(size, sizeof size, st.dirty),
			e == -ESRCH ? "its process ended without a flush" : far_strerror(e));
	else if (!all->conf.quiet)
		fprintf(stderr, "client %u has gone: %" PRIu64 " faults were served\n", c->number, st.faults);
	far_mutex_lock(&all->lock);
	if (e < 0 && st.dirty && !all->flushed)
		all->flushed = e;
	far_mutex_unlock(&all->lock);
}

static void page_client_run(struct page_client *c)
{
	struct far_error err = { 0 };
	char size[24];
	int e = far_uffd_receive(c->fd, &c->h, &err);

	if (e) {
		if (!strstr(err.text, " after 0 bytes")) /* somebody looked whether we are there */
			cli_say("client %u (process %d): %s", c->number, (int)c->pid, err.text);
		return;
	}
	enum far_handover_format format = c->h.format;
	struct far_handover how = FAR_HANDOVER_INIT;
	bool has_process = c->h.process >= 0;
	how.format = format;
	e = page_client_open(c, &err);
	if (far_uffd_accept(c->fd, &how, e < 0 ? -e : 0, err.text) && !e)
		cli_say("client %u (process %d): it did not wait for the answer", c->number, (int)c->pid);
	if (e) {
		cli_say("client %u (process %d): %s", c->number, (int)c->pid, err.text);
		return;
	}
	if (!c->all->conf.quiet)
		fprintf(stderr, "client %u (process %d): %s of memory, format %s%s\n", c->number, (int)c->pid,
			progress_size(size, sizeof size, c->bytes), page_formats[format], c->writer ? ", writable" : "");
	page_client_serve(c, format, has_process);
}

static void *page_client_cb(void *arg)
{
	struct page_client *c = arg;
	struct page_clients *all = c->all;

	page_client_run(c);
	page_client_close(c);
	far_handover_fini(&c->h);
	far_fd_close(&c->fd);
	far_mutex_lock(&all->lock);
	c->gone = true;
	if (c->writer)
		all->writer = c->writer = false;
	far_cond_broadcast(&all->changed);
	far_mutex_unlock(&all->lock);
	eventfd_write(all->conf.wake, 1);
	return NULL;
}

/* ------------------------------------------------------------------------------------------------ all of them */

int page_clients_open(const struct page_clients_conf *conf, struct page_clients **out)
{
	struct page_clients *c = calloc(1, sizeof *c);

	if (!c)
		return -ENOMEM;
	c->conf = *conf;
	c->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (c->stop < 0) {
		int e = -errno;
		free(c);
		return e;
	}
	far_mutex_init(&c->lock);
	far_cond_init(&c->changed);
	*out = c;
	return 0;
}

static void page_client_free(struct page_client *c)
{
	far_thread_join(&c->thread);
	far_fd_close(&c->fd);
	far_fd_close(&c->ended);
	free(c);
}

void page_clients_add(struct page_clients *all, int fd)
{
	struct page_client *c = calloc(1, sizeof *c);
	struct ucred peer = { 0 };
	socklen_t len = sizeof peer;
	int e = c ? 0 : -ENOMEM;

	if (c) {
		getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len);
		*c = (struct page_client){ .all = all, .fd = fd, .pid = peer.pid, .h = FAR_HANDOVER_INIT };
		c->ended = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		e = c->ended < 0 ? -errno : 0;
	}
	far_mutex_lock(&all->lock);
	if (!e && all->n >= all->conf.max)
		e = -EUSERS;
	if (!e) {
		c->number = ++all->numbers;
		e = far_thread_start(&c->thread, "far-client", page_client_cb, c);
	}
	if (!e) {
		c->next = all->first;
		all->first = c;
		all->n++;
	}
	far_mutex_unlock(&all->lock);
	if (!e)
		return;
	cli_say("a client (process %d) was turned away: %s", (int)peer.pid,
		e == -EUSERS ? "there are as many as --max-clients allows" : far_strerror(e));
	if (c)
		page_client_free(c);
	else
		far_fd_close(&fd);
}

size_t page_clients_reap(struct page_clients *all)
{
	struct page_client *gone = NULL, *c;

	far_mutex_lock(&all->lock);
	for (struct page_client **at = &all->first; (c = *at);) {
		if (!c->gone) {
			at = &c->next;
			continue;
		}
		*at = c->next;
		c->next = gone;
		gone = c;
		all->n--;
	}
	size_t n = all->n;
	far_mutex_unlock(&all->lock);
	while ((c = gone)) {
		gone = c->next;
		page_client_free(c);
	}
	return n;
}

/* Call fn with each client whose pager is open, without the lock. The list's order may change, so each is looked for by its
 * number: the largest one below the last. */
static int page_clients_each(struct page_clients *all, int (*fn)(struct page_client *c, struct far_pager *p, void *opaque),
			     void *opaque)
{
	unsigned below = UINT32_MAX;
	int first = 0;

	for (;;) {
		struct page_client *c, *best = NULL;
		far_mutex_lock(&all->lock);
		for (c = all->first; c; c = c->next)
			if (c->pager && c->number < below && (!best || c->number > best->number))
				best = c;
		struct far_pager *p = best ? best->pager : NULL;
		if (best)
			best->users++;
		far_mutex_unlock(&all->lock);
		if (!best)
			return first;
		int e = fn(best, p, opaque);
		first = first ? first : e;
		below = best->number;
		far_mutex_lock(&all->lock);
		best->users--;
		far_cond_broadcast(&all->changed);
		far_mutex_unlock(&all->lock);
	}
}

static int page_flush_cb(struct page_client *c, struct far_pager *p, void *opaque)
{
	return far_pager_flush(p);
}

int page_clients_flush(struct page_clients *all)
{
	return page_clients_each(all, page_flush_cb, NULL);
}

static int page_json_cb(struct page_client *c, struct far_pager *p, void *opaque)
{
	struct far_status st = FAR_STATUS_INIT;

	far_pager_status(p, &st);
	struct json_object *o = far_control_status(&st);
	if (o)
		json_object_object_del(o, "ok");
	far_control_put(&o, "client", json_object_new_int64(c->number));
	far_control_put(&o, "process", json_object_new_int(c->pid));
	far_control_put(&o, "writable", json_object_new_boolean(c->h.writable || c->writer));
	if (o && json_object_array_add(opaque, o))
		json_object_put(o);
	return 0;
}

struct json_object *page_clients_json(struct page_clients *all)
{
	struct json_object *list = json_object_new_array();

	if (list)
		page_clients_each(all, page_json_cb, list);
	return list;
}

int page_clients_close(struct page_clients *all, size_t *left)
{
	if (!all)
		return 0;
	*left = page_clients_reap(all);
	eventfd_write(all->stop, 1);
	far_mutex_lock(&all->lock);
	for (struct page_client *c = all->first; c; c = c->next)
		shutdown(c->fd, SHUT_RDWR); /* one that still receives */
	far_mutex_unlock(&all->lock);
	for (struct page_client *c; (c = all->first);) { /* nobody else is left who changes the list */
		all->first = c->next;
		page_client_free(c);
	}
	int e = all->flushed;
	far_fd_close(&all->stop);
	far_cond_fini(&all->changed);
	far_mutex_fini(&all->lock);
	free(all);
	return e;
}
