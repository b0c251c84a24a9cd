/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "peer.h"

#include "backend/backend.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

struct peer_stream *peer_of(struct peer *p, int32_t id)
{
	assert_true(id > 0 && (id - 1) / 2 < PEER_STREAMS);
	return &p->s[(id - 1) / 2];
}

static int peer_header(nghttp2_session *h2, const nghttp2_frame *f, const uint8_t *name, size_t nn, const uint8_t *value,
		       size_t vn, uint8_t flags, void *user)
{
	struct peer_stream *s = peer_of(user, f->hd.stream_id);
	char v[256];

	snprintf(v, sizeof v, "%.*s", (int)far_min(vn, 255), (const char *)value);
	if (nn == 7 && !memcmp(name, ":status", 7))
		s->http = atoi(v);
	else if (nn == 11 && !memcmp(name, "grpc-status", 11))
		s->status = atoi(v);
	else if (nn == 12 && !memcmp(name, "grpc-message", 12))
		far_grpc_percent_decode(s->message, sizeof s->message, v, strlen(v));
	else if (nn == 13 && !memcmp(name, "farpage-errno", 13))
		snprintf(s->errno_name, sizeof s->errno_name, "%.31s", v);
	return 0;
}

static int peer_data(nghttp2_session *h2, uint8_t flags, int32_t id, const uint8_t *data, size_t len, void *user)
{
	struct peer_stream *s = peer_of(user, id);

	s->data = realloc(s->data, s->data_n + len + 1);
	assert_non_null(s->data);
	memcpy(s->data + s->data_n, data, len);
	s->data_n += len;
	return 0;
}

static int peer_frame(nghttp2_session *h2, const nghttp2_frame *f, void *user)
{
	struct peer *p = user;

	if (f->hd.type == NGHTTP2_GOAWAY) {
		p->goaway = true;
		p->goaway_code = f->goaway.error_code;
	}
	if ((f->hd.type == NGHTTP2_HEADERS || f->hd.type == NGHTTP2_DATA) && (f->hd.flags & NGHTTP2_FLAG_END_STREAM))
		peer_of(p, f->hd.stream_id)->ended = true;
	return 0;
}

static int peer_close_cb(nghttp2_session *h2, int32_t id, uint32_t code, void *user)
{
	struct peer_stream *s = peer_of(user, id);

	s->closed = true;
	s->code = code;
	return 0;
}

static ssize_t peer_read(nghttp2_session *h2, int32_t id, uint8_t *buf, size_t len, uint32_t *flags,
			 nghttp2_data_source *src, void *user)
{
	struct peer_stream *s = peer_of(user, id);
	size_t n = (size_t)far_min(len, s->body_n - s->at);

	memcpy(buf, s->body + s->at, n);
	s->at += n;
	if (s->at == s->body_n && s->hang && !n)
		return NGHTTP2_ERR_DEFERRED;
	if (s->at == s->body_n && !s->hang)
		*flags |= NGHTTP2_DATA_FLAG_EOF;
	return (ssize_t)n;
}

static void peer_init(struct peer *p)
{
	nghttp2_session_callbacks *cb;

	memset(p, 0, sizeof *p);
	p->fd = -1;
	for (int i = 0; i < PEER_STREAMS; i++)
		p->s[i].http = p->s[i].status = -1;
	assert_int_equal(nghttp2_session_callbacks_new(&cb), 0);
	nghttp2_session_callbacks_set_on_header_callback(cb, peer_header);
	nghttp2_session_callbacks_set_on_data_chunk_recv_callback(cb, peer_data);
	nghttp2_session_callbacks_set_on_frame_recv_callback(cb, peer_frame);
	nghttp2_session_callbacks_set_on_stream_close_callback(cb, peer_close_cb);
	nghttp2_option *opt;
	assert_int_equal(nghttp2_option_new(&opt), 0);
	nghttp2_option_set_peer_max_concurrent_streams(opt, 1u << 20);
	assert_int_equal(nghttp2_session_client_new2(&p->h2, cb, p, opt), 0);
	nghttp2_option_del(opt);
	nghttp2_session_callbacks_del(cb);
	nghttp2_settings_entry window = { NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, 1 << 24 };
	nghttp2_submit_settings(p->h2, 0, &window, 1);
	nghttp2_session_set_local_window_size(p->h2, 0, 0, 1 << 30);
}

void peer_over_session(struct peer *p, struct far_backend *b, uint64_t max_request)
{
	peer_init(p);
	p->export = (struct far_export){ (char *)"disk", b, NULL };
	assert_int_equal(far_owner_new(b, 300, &p->export.owner), 0);
	p->env = (struct far_server_env){ .exports = &p->export, .exports_n = 1, .max_request = max_request,
					  .handshake = FAR_SEC, .stall = FAR_SEC, .memory_max = 512 << 20 };
	p->session = calloc(1, sizeof *p->session);
	assert_non_null(p->session);
	assert_int_equal(far_session_init(p->session, &p->env), 0);
}

void peer_over_fd(struct peer *p, int fd)
{
	peer_init(p);
	assert_true(fd >= 0);
	fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
	p->fd = fd;
}

void peer_free(struct peer *p)
{
	nghttp2_session_del(p->h2);
	for (int i = 0; i < PEER_STREAMS; i++)
		free(p->s[i].data);
	if (p->fd >= 0)
		close(p->fd);
	if (p->session) {
		far_session_fini(p->session);
		free(p->session);
		assert_int_equal(p->env.memory, 0);
		far_owner_free(p->export.owner);
	}
}

int32_t peer_submit(struct peer *p, const char *method, const char *path, const char *type, const char *name,
		    const char *value, const void *body, size_t n, bool hang)
{
	nghttp2_nv nv[8];
	size_t k = 0;
	nghttp2_data_provider prd = { .read_callback = peer_read };
#define PUT(a, b) nv[k++] = (nghttp2_nv){ (uint8_t *)(a), (uint8_t *)(b), strlen(a), strlen(b), 0 }
	PUT(":method", method);
	PUT(":scheme", "http");
	PUT(":authority", "x");
	if (path)
		PUT(":path", path);
	if (type)
		PUT("content-type", type);
	if (name)
		PUT(name, value);
#undef PUT
	int32_t id = nghttp2_submit_request(p->h2, NULL, nv, k, n || hang ? &prd : NULL, NULL);
	assert_true(id > 0);
	struct peer_stream *s = peer_of(p, id);
	s->body = body;
	s->body_n = n;
	s->hang = hang;
	return id;
}

static bool peer_step_session(struct peer *p)
{
	const uint8_t *data;
	bool moved = false;
	ssize_t n;
	int err;

	while ((n = nghttp2_session_mem_send(p->h2, &data)) > 0) {
		moved = true;
		if (far_session_feed(p->session, data, (size_t)n))
			return false;
	}
	struct far_request *r;
	while ((r = far_session_next(p->session))) {
		moved = true;
		if (!far_request_run(r, FAR_NOWAIT))
			assert_true(far_request_run(r, 0));
		far_session_finish(p->session, r);
	}
	while (far_h2_fill(&p->session->h2, &err)) {
		struct iovec v = p->session->h2.iov[p->session->h2.iov_at];
		moved = true;
		if (nghttp2_session_mem_recv(p->h2, v.iov_base, v.iov_len) < 0)
			fail_msg("the session's bytes make no sense to nghttp2");
		far_h2_wrote(&p->session->h2, v.iov_len);
	}
	return moved && !err;
}

/* 1 moved, 0 nothing for now, -1 ended. */
static int peer_step_fd(struct peer *p, int ms)
{
	static uint8_t buf[65536];
	const uint8_t *data;
	ssize_t n;

	while ((n = nghttp2_session_mem_send(p->h2, &data)) > 0) {
		for (ssize_t at = 0; at < n;) {
			ssize_t k = send(p->fd, data + at, (size_t)(n - at), MSG_NOSIGNAL);
			if (k < 0 && errno == EAGAIN) {
				struct pollfd w = { .fd = p->fd, .events = POLLOUT };
				if (poll(&w, 1, 5000) <= 0)
					return -1;
				continue;
			}
			if (k <= 0)
				return -1;
			at += k;
		}
	}
	struct pollfd r = { .fd = p->fd, .events = POLLIN };
	if (poll(&r, 1, ms) <= 0)
		return 0;
	n = recv(p->fd, buf, sizeof buf, 0);
	if (n <= 0)
		return -1;
	return nghttp2_session_mem_recv(p->h2, buf, (size_t)n) < 0 ? -1 : 1;
}

bool peer_drive(struct peer *p, int32_t id)
{
	uint64_t end = far_now() + LIMIT;

	while (far_now() < end && !(id && peer_of(p, id)->closed)) {
		if (p->session) {
			if (!peer_step_session(p))
				return !id || peer_of(p, id)->closed;
			continue;
		}
		int r = peer_step_fd(p, id ? 100 : 0);
		if (r < 0)
			return id && peer_of(p, id)->closed;
		if (!r && !id)
			return true;
	}
	return !id || peer_of(p, id)->closed;
}

uint8_t *peer_message(const void *body, size_t n, size_t *out_n)
{
	uint8_t *m = malloc(n + FAR_GRPC_PREFIX);

	assert_non_null(m);
	far_grpc_prefix(m, (uint32_t)n);
	if (n)
		memcpy(m + FAR_GRPC_PREFIX, body, n);
	*out_n = n + FAR_GRPC_PREFIX;
	return m;
}

struct peer_stream *peer_call(struct peer *p, const char *path, const void *msg, size_t n)
{
	size_t len;
	uint8_t *m = peer_message(msg, n, &len);
	int32_t id = peer_submit(p, "POST", path, "application/grpc", NULL, NULL, m, len, false);

	assert_true(peer_drive(p, id));
	free(m);
	return peer_of(p, id);
}

static int vector_hex(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

uint8_t *vector_load(const char *name, char dir, size_t *n)
{
	const char *root = getenv("FAR_VECTORS");
	char path[512], *line = NULL;
	size_t cap = 0, len = 0;
	uint8_t *out = malloc(1 << 20);

	assert_non_null(out);
	snprintf(path, sizeof path, "%s/%s.txt", root ? root : "tests/vectors", name);
	FILE *f = fopen(path, "r");
	if (!f)
		fail_msg("cannot open %s: set FAR_VECTORS", path);
	while (getline(&line, &cap, f) > 0) {
		if (line[0] != dir)
			continue;
		for (char *h = line + 2; vector_hex(h[0]) >= 0 && vector_hex(h[1]) >= 0 && len < 1 << 20; h += 2)
			out[len++] = (uint8_t)(vector_hex(h[0]) << 4 | vector_hex(h[1]));
	}
	free(line);
	fclose(f);
	*n = len;
	return out;
}

int tcp_connect(const char *uri)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	const char *port = strrchr(uri, ':');
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	sin.sin_port = htons((uint16_t)atoi(port + 1));
	if (fd >= 0 && connect(fd, (struct sockaddr *)&sin, sizeof sin)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

int tcp_listen(int *port)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t n = sizeof sin;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	assert_true(fd >= 0);
	assert_int_equal(bind(fd, (struct sockaddr *)&sin, sizeof sin), 0);
	assert_int_equal(listen(fd, 16), 0);
	assert_int_equal(getsockname(fd, (struct sockaddr *)&sin, &n), 0);
	*port = ntohs(sin.sin_port);
	return fd;
}

static int slow_enter(struct slow *s, unsigned flags)
{
	far_mutex_lock(&s->lock);
	s->calls++;
	if ((s->hold || s->would_block || s->delay) && (flags & FAR_NOWAIT)) {
		far_mutex_unlock(&s->lock);
		return -EAGAIN;
	}
	if (++s->inside > s->max_inside)
		s->max_inside = s->inside;
	far_cond_broadcast(&s->cond);
	uint64_t end = far_min(far_deadline(), far_now() + LIMIT);
	bool in_time = true;
	while (s->hold && in_time)
		in_time = far_cond_wait_until(&s->cond, &s->lock, end);
	s->inside--;
	int r = in_time ? s->error : -ETIMEDOUT;
	far_cond_broadcast(&s->cond);
	far_mutex_unlock(&s->lock);
	if (s->delay)
		far_sleep_until(far_now() + s->delay, false);
	return r;
}

static int slow_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct slow *s = self;
	int r = s->reads_go ? s->error : slow_enter(s, flags);

	if (r)
		return r;
	memcpy(buf, s->mem + off, len);
	far_mutex_lock(&s->lock);
	s->demand += flags & FAR_BULK ? 0 : len;
	far_mutex_unlock(&s->lock);
	return r;
}

static int slow_write(void *self, uint64_t off, const void *buf, size_t len, unsigned flags)
{
	struct slow *s = self;
	int r = slow_enter(s, flags);

	if (r == 0)
		memcpy(s->mem + off, buf, len);
	return r;
}

static int slow_flush(void *self)
{
	return slow_enter(self, 0);
}

static void slow_close(void *self)
{
}

struct far_backend *slow_open(struct slow *s, size_t size)
{
	struct far_ops ops = { FAR_OPS_INIT, .read = slow_read, .write = slow_write, .flush = slow_flush,
			       .close = slow_close };
	struct far_facts facts = FAR_FACTS_INIT;
	struct far_backend *b = NULL;

	*s = (struct slow){ .size = size, .mem = calloc(1, size + 1) };
	far_mutex_init(&s->lock);
	far_cond_init(&s->cond);
	facts.bytes = size;
	facts.caps = FAR_CAP_WRITE | FAR_CAP_DURABLE;
	assert_int_equal(far_backend_new(&ops, s, &facts, &b), 0);
	return b;
}

void slow_hold(struct slow *s, bool hold)
{
	far_mutex_lock(&s->lock);
	s->hold = hold;
	far_cond_broadcast(&s->cond);
	far_mutex_unlock(&s->lock);
}

bool slow_wait_inside(struct slow *s, unsigned n)
{
	uint64_t end = far_now() + LIMIT;

	far_mutex_lock(&s->lock);
	while (s->inside < n && far_cond_wait_until(&s->cond, &s->lock, end))
		;
	bool ok = s->inside >= n;
	far_mutex_unlock(&s->lock);
	return ok;
}

void slow_free(struct slow *s)
{
	free(s->mem);
	far_mutex_fini(&s->lock);
	far_cond_fini(&s->cond);
}

/* Each has its own stripe; neighbours' bytes in it are an error. */
static void *worker_run(void *arg)
{
	struct worker *w = arg;
	uint8_t *buf = malloc(w->len), *back = malloc(w->len);

	for (unsigned i = 0; i < w->rounds && !w->failed; i++) {
		memset(buf, (int)(w->id * 7 + i + 1), w->len);
		memset(back, 0, w->len);
		uint64_t off = (uint64_t)w->id * w->len;
		unsigned flags = (w->id + i) & 1 ? FAR_BULK : 0;
		w->failed = far_write(w->b, off, buf, w->len, flags);
		if (!w->failed)
			w->failed = far_read(w->b, off, back, w->len, flags);
		if (!w->failed && memcmp(buf, back, w->len))
			w->failed = -EILSEQ;
	}
	free(buf);
	free(back);
	return NULL;
}

struct worker *workers_start(struct far_backend *b, unsigned n, unsigned step, unsigned rounds, size_t len)
{
	struct worker *w = calloc(n, sizeof *w);

	for (unsigned i = 0; i < n; i++) {
		w[i] = (struct worker){ .b = b, .id = i * step, .rounds = rounds, .len = len };
		assert_int_equal(far_thread_start(&w[i].t, "worker", worker_run, &w[i]), 0);
	}
	return w;
}

void workers_end(struct worker *w, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		far_thread_join(&w[i].t);
		assert_int_equal(w[i].failed, 0);
	}
	free(w);
}

void workers(struct far_backend *b, unsigned n, unsigned rounds, size_t len)
{
	workers_end(workers_start(b, n, 1, rounds, len), n);
}
