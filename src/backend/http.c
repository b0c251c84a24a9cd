/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * An object on a web server, read by ranged GET. Each call borrows a worker: a libcurl handle with a connection that is
 * kept. The caller's thread drives it, so there are no threads of ours, and no more connections than workers.
 *
 * One object, or none: the first answer pins it by ETag, Last-Modified and size. Each request asks for that version alone
 * (If-Match, or If-Unmodified-Since), and each answer must again show the same ETag, the same Last-Modified and, in
 * Content-Range, exactly the bytes that were asked for and the same size; not one byte of another answer is taken. An object
 * that has changed is -ESTALE for good: what was read before and what would be read now are not one region.
 *
 * An answer is judged when its body begins (http_judge()), so nothing but a 206 that fits gets near the caller's buffer,
 * and never more than was asked for.
 *
 *      new --http_pin()--> pinned --an answer that differs--> changed
 *
 * With facts of an earlier time a region opens without contact; whoever reads first pins it, and compares with them.
 */
#define _GNU_SOURCE
#include "backend/backend.h"
#include "backend/http_head.h"

#include "base/clock.h"
#include "base/hash.h"
#include "base/options.h"
#include "base/thread.h"
#include "base/uri.h"

#include <curl/curl.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HTTP_WORKERS 64
#define HTTP_REDIRECTS 5
#define HTTP_HEAD_MAX ((uint64_t)256 * FAR_KIB)
#define HTTP_REST ((uint64_t)64 * FAR_KIB) /* of an error's page that is read to keep the connection */
#define HTTP_KNOWN_MS 3000
#define HTTP_SECRET 1024

struct http_conf {
	int64_t connections;
	uint64_t size, timeout, max_io;
	char *query, *tls_ca, *user, *password_file, *password_env;
	bool unpinned;
};

/* What an object is known by. */
struct http_pin {
	uint64_t bytes;
	char tag[FAR_HTTP_TAG], modified[FAR_HTTP_TAG];
};

struct http;
struct http_worker {
	struct http_worker *next;
	struct http *h;
	CURLM *multi;
	CURL *easy;

	/* of the request that runs */
	struct far_http_head head;
	const struct http_pin *pin; /* NULL: this request finds it out */
	char *dst;
	uint64_t off, len, got, rest, head_n;
	bool judged;
	int verdict;
	char why[CURL_ERROR_SIZE];
};

struct http {
	/* fixed after open */
	char *url, *where;
	struct http_conf conf;
	struct far_facts facts; /* with `known` */
	bool has_facts;
	char password[HTTP_SECRET];
	struct http_worker workers[HTTP_WORKERS];
	unsigned n;

	struct far_mutex lock;
	struct far_cond cond; /* a worker is free, pinning has ended, stop */
	struct http_worker *idle FAR_GUARDED_BY(lock);
	struct http_pin pin FAR_GUARDED_BY(lock); /* does not change once pinned */
	bool pinned FAR_GUARDED_BY(lock), pinning FAR_GUARDED_BY(lock), changed FAR_GUARDED_BY(lock);
	bool stopped FAR_GUARDED_BY(lock);
	/* atomic, relaxed: looked at between two waits */
	_Atomic bool stopping;
};

static const struct far_opt http_options[] = {
	{ "connections", FAR_OPT_INT, offsetof(struct http_conf, connections), 1, HTTP_WORKERS, NULL, "N",
	  "requests at a time, each on its own connection", "8" },
	{ "size", FAR_OPT_SIZE, offsetof(struct http_conf, size), .value_name = "BYTES",
	  .help = "the size that the object must have" },
	{ "timeout", FAR_OPT_DURATION, offsetof(struct http_conf, timeout), .min = 1e6, .max = 3.6e12, .value_name = "TIME",
	  .help = "how long one request may take", .def = "30s" },
	{ "max-request", FAR_OPT_SIZE, offsetof(struct http_conf, max_io), .min = 512, .max = 64 << 20,
	  .value_name = "BYTES", .help = "longest single request", .def = "8M" },
	{ "query", FAR_OPT_STRING, offsetof(struct http_conf, query), .value_name = "TEXT",
	  .help = "the query that belongs to the object's address: what follows '?' there, percent-encoded once more" },
	{ "tls-ca", FAR_OPT_STRING, offsetof(struct http_conf, tls_ca), .value_name = "FILE",
	  .help = "trust these certificates, and no others (https)" },
	{ "user", FAR_OPT_STRING, offsetof(struct http_conf, user), .value_name = "NAME", .help = "log in with this name" },
	{ "password-file", FAR_OPT_STRING, offsetof(struct http_conf, password_file), .value_name = "FILE",
	  .help = "the password is the first line of FILE" },
	{ "password-env", FAR_OPT_STRING, offsetof(struct http_conf, password_env), .value_name = "NAME",
	  .help = "the password is in this environment variable" },
	{ "unpinned", FAR_OPT_BOOL, offsetof(struct http_conf, unpinned),
	  .help = "take an object with neither ETag nor Last-Modified: only a change of its size is noticed" },
	FAR_OPT_END,
};

/* ------------------------------------------------------------------------------------------------ judging answers */

/* What a status other than 206 means, for an object that was there before (pinned) or was not seen yet. */
static int http_status_error(int status, bool pinned)
{
	switch (status) {
	case 401:
	case 403:
	case 407:
		return -EACCES;
	case 404:
	case 410:
		return pinned ? -ESTALE : -ENOENT;
	case 412:
	case 416:
		return -ESTALE;
	case 408:
	case 429:
	case 502:
	case 503:
	case 504:
		return -EBUSY; /* later it may go: the retry layer knows */
	default:
		return status >= 500 ? -EIO : -EPROTO;
	}
}

static bool http_same(const struct http_pin *pin, const struct far_http_head *d)
{
	return !strcmp(pin->tag, d->tag) && !strcmp(pin->modified, d->modified);
}

/* May this body go into the caller's buffer? 0 or the error that the call ends with. */
static int http_judge(const struct http_worker *w)
{
	const struct far_http_head *d = &w->head;

	if (d->status == 416 && !w->pin && d->unsatisfied && d->has_total && !d->total)
		return -ENODATA; /* an empty object: there is no byte to ask for */
	if (d->status == 200 && !w->pin && d->has_length && !d->length)
		return -ENODATA;
	if (d->status == 200)
		return w->pin && !http_same(w->pin, d) ? -ESTALE : -EOPNOTSUPP; /* the whole: ranges are ignored */
	if (d->status != 206)
		return http_status_error(d->status, w->pin);
	if (d->bad || d->encoded || d->parts || !d->ranged || d->unsatisfied || !d->has_total)
		return -EPROTO;
	if (w->pin && (!http_same(w->pin, d) || d->total != w->pin->bytes))
		return -ESTALE;
	if (d->first != w->off || d->last != w->off + w->len - 1 || (d->has_length && d->length != w->len))
		return -EPROTO;
	return 0;
}

static size_t http_head_cb(char *line, size_t one, size_t n, void *opaque)
{
	struct http_worker *w = opaque;

	/* libcurl keeps them all, and those behind the body too. */
	w->head_n += n;
	if (w->head_n > HTTP_HEAD_MAX)
		return 0;
	far_http_head_line(&w->head, line, n);
	return n;
}

static size_t http_body_cb(char *p, size_t one, size_t n, void *opaque)
{
	struct http_worker *w = opaque;

	if (!w->judged) {
		w->judged = true;
		w->verdict = http_judge(w);
	}
	if (w->verdict) {
		/* The short page of an error is read, so that the connection can be used again. */
		w->rest += n;
		return w->head.status != 200 && w->rest <= HTTP_REST ? n : 0;
	}
	if (n > w->len - w->got) {
		w->verdict = -EPROTO;
		return 0;
	}
	memcpy(w->dst + w->got, p, n);
	w->got += n;
	return n;
}

static int http_curl_error(CURLcode code)
{
	switch (code) {
	case CURLE_OK:
		return 0;
	case CURLE_COULDNT_RESOLVE_HOST:
	case CURLE_COULDNT_RESOLVE_PROXY:
		return -EHOSTUNREACH;
	case CURLE_COULDNT_CONNECT:
		return -ECONNREFUSED;
	case CURLE_OPERATION_TIMEDOUT:
		return -ETIMEDOUT;
	case CURLE_SEND_ERROR:
	case CURLE_RECV_ERROR:
	case CURLE_GOT_NOTHING:
	case CURLE_PARTIAL_FILE:
		return -ECONNRESET;
	case CURLE_PEER_FAILED_VERIFICATION:
	case CURLE_SSL_CACERT_BADFILE:
	case CURLE_SSL_ISSUER_ERROR:
		return -EACCES;
	case CURLE_TOO_MANY_REDIRECTS:
		return -ELOOP;
	case CURLE_OUT_OF_MEMORY:
		return -ENOMEM;
	default:
		return -EPROTO;
	}
}

/* ------------------------------------------------------------------------------------------------ requests */

static int http_run(struct http_worker *w, uint64_t until)
{
	CURLcode code = CURLE_OK;
	int running = 1, left, r = 0;

	if (curl_multi_add_handle(w->multi, w->easy))
		return -ENOMEM;
	while (!r && running) {
		if (curl_multi_perform(w->multi, &running))
			r = -ENOMEM;
		else if (atomic_load_explicit(&w->h->stopping, memory_order_relaxed))
			r = -ESHUTDOWN;
		else if (running && far_now() >= until)
			r = -ETIMEDOUT;
		else if (running && curl_multi_poll(w->multi, NULL, 0, (int)far_min((uint64_t)far_deadline_poll_ms(until), 60000), NULL))
			r = -ENOMEM;
	}
	for (CURLMsg *m; !r && (m = curl_multi_info_read(w->multi, &left));)
		if (m->msg == CURLMSG_DONE)
			code = m->data.result;
	curl_multi_remove_handle(w->multi, w->easy); /* ends the connection if it is in the middle of something */
	if (r)
		return r;
	if (!w->judged && (code == CURLE_OK || w->head.status >= 400)) {
		w->judged = true; /* no body came */
		w->verdict = http_judge(w);
	}
	if (w->verdict)
		return w->verdict;
	r = http_curl_error(code);
	return r ? r : w->got == w->len ? 0 : -ECONNRESET;
}

/* GET [off, off + len) into dst. pin NULL: whatever is there. */
static int http_get(struct http_worker *w, const struct http_pin *pin, uint64_t off, void *dst, uint64_t len, uint64_t until)
{
	char range[64], only[FAR_HTTP_TAG + 32];
	struct curl_slist *list = NULL;

	w->head = (struct far_http_head){ 0 };
	w->pin = pin;
	w->dst = dst;
	w->off = off;
	w->len = len;
	w->got = w->rest = w->head_n = 0;
	w->judged = false;
	w->verdict = 0;
	w->why[0] = 0;
	snprintf(range, sizeof range, "%" PRIu64 "-%" PRIu64, off, off + len - 1);
	if (pin && far_http_tag_strong(pin->tag))
		snprintf(only, sizeof only, "If-Match: %s", pin->tag);
	else if (pin && pin->modified[0])
		snprintf(only, sizeof only, "If-Unmodified-Since: %s", pin->modified);
	else
		only[0] = 0;
	if (only[0] && !(list = curl_slist_append(NULL, only)))
		return -ENOMEM;
	int r = curl_easy_setopt(w->easy, CURLOPT_RANGE, range) || curl_easy_setopt(w->easy, CURLOPT_HTTPHEADER, list) ?
			-ENOMEM : http_run(w, until);
	curl_easy_setopt(w->easy, CURLOPT_HTTPHEADER, NULL);
	curl_slist_free_all(list);
	return r;
}

static int http_borrow(struct http *h, uint64_t until, struct http_worker **out)
{
	int r = 0;

	far_mutex_lock(&h->lock);
	while (!r && !h->idle)
		r = h->stopped ? -ESHUTDOWN : far_cond_wait_until(&h->cond, &h->lock, until) ? 0 : -ETIMEDOUT;
	if (h->stopped)
		r = -ESHUTDOWN;
	if (!r) {
		*out = h->idle;
		h->idle = (*out)->next;
	}
	far_mutex_unlock(&h->lock);
	return r;
}

static void http_give_back(struct http *h, struct http_worker *w)
{
	far_mutex_lock(&h->lock);
	w->next = h->idle; /* the one that was used last: its connection is warm */
	h->idle = w;
	far_cond_broadcast(&h->cond);
	far_mutex_unlock(&h->lock);
}

/* ------------------------------------------------------------------------------------------------ pinning */

static void http_identity(const struct http_pin *pin, char out[64])
{
	char text[2 * FAR_HTTP_TAG + 32];
	uint8_t sum[FAR_HASH128];

	int n = snprintf(text, sizeof text, "%s\n%s\n%" PRIu64, pin->tag, pin->modified, pin->bytes);
	far_hash128(sum, text, (size_t)n, 0);
	n = snprintf(out, 64, "http-");
	for (size_t i = 0; i < sizeof sum; i++)
		n += snprintf(out + n, 64 - (size_t)n, "%02x", sum[i]);
}

/* Ask what is there. The text is for the one who opens. */
static int http_look(struct http *h, struct http_worker *w, uint64_t until, struct http_pin *pin, struct far_error *err)
{
	char byte;
	int r = http_get(w, NULL, 0, &byte, 1, until);
	const struct far_http_head *d = &w->head;

	*pin = (struct http_pin){ .bytes = d->total };
	memcpy(pin->tag, d->tag, sizeof pin->tag);
	memcpy(pin->modified, d->modified, sizeof pin->modified);
	if (r == -ENODATA) {
		pin->bytes = 0;
		r = 0;
	}
	if (r == -EOPNOTSUPP)
		return far_error_set(err, EOPNOTSUPP, "cannot open %s: the server ignores ranges: it answers with the whole object. "
				     "Download it first, or serve it with one that knows them", h->where);
	if (r == -EPROTO && d->status)
		return far_error_set(err, EPROTO, "cannot open %s: the server answers with status %d%s", h->where, d->status,
				     d->encoded ? " and an encoded body" : d->status == 206 ?
				     " and a Content-Range that does not fit" : "");
	if (r && d->status && d->status != 206)
		return far_error_set(err, -r, "cannot open %s: the server answers with status %d (%s)", h->where, d->status,
				     far_strerror(r));
	if (r)
		return far_error_set(err, -r, "cannot open %s: %.200s", h->where, w->why[0] ? w->why : far_strerror(r));
	if (!pin->tag[0] && !pin->modified[0] && !h->conf.unpinned)
		return far_error_set(err, EINVAL, "cannot open %s: the server gives it neither ETag nor Last-Modified, so a change "
				     "could not be noticed; add ?unpinned=1 if it never changes", h->where);
	return 0;
}

/* Pin the object, if nobody has, and if it is the one of before. */
static int http_pin(struct http *h, uint64_t until, struct far_error *err)
{
	struct http_worker *w = NULL;
	struct http_pin pin;
	char identity[64];
	int r = 0;

	far_mutex_lock(&h->lock);
	while (!r && h->pinning && !h->pinned)
		r = h->stopped ? -ESHUTDOWN : far_cond_wait_until(&h->cond, &h->lock, until) ? 0 : -ETIMEDOUT;
	bool mine = !r && !h->pinned;
	/* A changed object stays changed, even if the old one is put back: who knows what was read meanwhile. */
	if (!r && h->changed)
		r = -ESTALE;
	h->pinning = h->pinning || (mine && !r);
	far_mutex_unlock(&h->lock);
	if (r || !mine)
		return r;
	r = http_borrow(h, until, &w);
	if (!r) {
		r = http_look(h, w, until, &pin, err);
		http_give_back(h, w);
	}
	if (!r)
		http_identity(&pin, identity);
	far_mutex_lock(&h->lock);
	if (!r && h->has_facts && (pin.bytes != h->facts.bytes || (h->facts.identity[0] && strcmp(identity, h->facts.identity)))) {
		h->changed = true;
		r = far_error_set(err, ESTALE, "%s is not what it was: it has changed on the server", h->where);
	}
	if (!r) {
		h->pin = pin;
		h->pinned = true;
	}
	h->pinning = false;
	far_cond_broadcast(&h->cond);
	far_mutex_unlock(&h->lock);
	return r;
}

/* ------------------------------------------------------------------------------------------------ operations */

static int http_read(void *self, uint64_t off, void *buf, size_t len, unsigned flags)
{
	struct http *h = self;
	uint64_t until = far_min(far_deadline(), far_now() + h->conf.timeout);
	struct http_worker *w;

	if (flags & FAR_NOWAIT)
		return -EAGAIN;
	int r = http_pin(h, until, NULL);
	if (!r)
		r = http_borrow(h, until, &w);
	if (r)
		return r;
	r = http_get(w, &h->pin, off, buf, len, until);
	int status = w->head.status;
	http_give_back(h, w);
	if (r == -ESTALE) {
		far_mutex_lock(&h->lock);
		bool first = !h->changed;
		h->changed = true;
		far_mutex_unlock(&h->lock);
		if (first)
			far_log(FAR_LOG_ERROR, "%s: it has changed on the server (status %d): nothing more is read; open it anew",
				h->where, status);
	}
	return r == -EOPNOTSUPP ? -EPROTO : r;
}

static int http_flush(void *self)
{
	return 0; /* nothing is ever written */
}

static void http_stop(void *self)
{
	struct http *h = self;

	atomic_store_explicit(&h->stopping, true, memory_order_relaxed);
	far_mutex_lock(&h->lock);
	h->stopped = true;
	far_cond_broadcast(&h->cond);
	far_mutex_unlock(&h->lock);
	for (unsigned i = 0; i < h->n; i++)
		curl_multi_wakeup(h->workers[i].multi);
}

static void http_free(struct http *h)
{
	for (unsigned i = 0; i < HTTP_WORKERS; i++) {
		curl_easy_cleanup(h->workers[i].easy);
		if (h->workers[i].multi)
			curl_multi_cleanup(h->workers[i].multi);
	}
	far_opt_fini(http_options, &h->conf);
	explicit_bzero(h->password, sizeof h->password);
	far_cond_fini(&h->cond);
	far_mutex_fini(&h->lock);
	free(h->url);
	free(h->where);
	free(h);
	curl_global_cleanup(); /* counted by libcurl */
}

static void http_close(void *self)
{
	http_free(self);
}

static const struct far_ops http_ops = {
	FAR_OPS_INIT,
	.read = http_read,
	.flush = http_flush,
	.stop = http_stop,
	.close = http_close,
};

/* ------------------------------------------------------------------------------------------------ opening */

static int http_worker_init(struct http *h, struct http_worker *w)
{
	CURL *e = w->easy = curl_easy_init();
	int r = 0;

	w->h = h;
	w->multi = curl_multi_init();
	if (!e || !w->multi)
		return -ENOMEM;
#define HTTP_SET(option, value) (r |= curl_easy_setopt(e, option, value))
	HTTP_SET(CURLOPT_URL, h->url);
	HTTP_SET(CURLOPT_NOSIGNAL, 1L);
	HTTP_SET(CURLOPT_ERRORBUFFER, w->why);
	HTTP_SET(CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
	HTTP_SET(CURLOPT_PROTOCOLS_STR, "http,https");
	/* Once encrypted, always encrypted. */
	HTTP_SET(CURLOPT_REDIR_PROTOCOLS_STR, !strncmp(h->url, "https:", 6) ? "https" : "http,https");
	HTTP_SET(CURLOPT_FOLLOWLOCATION, 1L);
	HTTP_SET(CURLOPT_MAXREDIRS, (long)HTTP_REDIRECTS);
	HTTP_SET(CURLOPT_SUPPRESS_CONNECT_HEADERS, 1L);
	HTTP_SET(CURLOPT_NETRC, (long)CURL_NETRC_IGNORED);
	HTTP_SET(CURLOPT_USERAGENT, "farpage");
	HTTP_SET(CURLOPT_HEADERFUNCTION, http_head_cb);
	HTTP_SET(CURLOPT_HEADERDATA, w);
	HTTP_SET(CURLOPT_WRITEFUNCTION, http_body_cb);
	HTTP_SET(CURLOPT_WRITEDATA, w);
	HTTP_SET(CURLOPT_BUFFERSIZE, 256L * 1024);
	HTTP_SET(CURLOPT_TCP_KEEPALIVE, 1L);
	HTTP_SET(CURLOPT_SSL_VERIFYPEER, 1L);
	HTTP_SET(CURLOPT_SSL_VERIFYHOST, 2L);
	HTTP_SET(CURLOPT_SSLVERSION, (long)CURL_SSLVERSION_TLSv1_2);
	if (h->conf.tls_ca) {
		HTTP_SET(CURLOPT_CAINFO, h->conf.tls_ca);
		HTTP_SET(CURLOPT_CAPATH, NULL);
	}
	if (h->conf.user) {
		HTTP_SET(CURLOPT_HTTPAUTH, (long)CURLAUTH_BASIC | CURLAUTH_DIGEST);
		HTTP_SET(CURLOPT_USERNAME, h->conf.user);
		HTTP_SET(CURLOPT_PASSWORD, h->password);
	}
#undef HTTP_SET
	return r ? -ENOSYS : 0; /* this libcurl lacks something */
}

static int http_password(struct http *h, struct far_error *err)
{
	const char *file = h->conf.password_file, *env = h->conf.password_env, *p = NULL;
	ssize_t n = 0;

	if (!h->conf.user)
		return file || env ? far_error_set(err, EINVAL, "%s: a password needs user=NAME", h->where) : 0;
	if (!file == !env)
		return far_error_set(err, EINVAL, "%s: user=NAME needs password-file=FILE or password-env=NAME", h->where);
	if (file) {
		FAR_CLEANUP(far_close_cleanup) int fd = open(file, O_RDONLY | O_CLOEXEC);
		n = fd < 0 ? -1 : read(fd, h->password, sizeof h->password - 1);
		if (n < 0)
			return far_error_set(err, errno, "%s: cannot read the password in %s: %s", h->where, file, far_strerror(errno));
		h->password[n] = 0;
		h->password[strcspn(h->password, "\r\n")] = 0;
	} else {
		p = getenv(env);
		if (!p || strlen(p) >= sizeof h->password)
			return far_error_set(err, EINVAL, "%s: the environment variable %s is %s", h->where, env,
					     p ? "too long for a password" : "not set");
		memcpy(h->password, p, strlen(p) + 1);
	}
	return 0;
}

/* The address for libcurl: as it was written, without our options. */
static int http_address(struct http *h, const struct far_uri *u, struct far_error *err)
{
	size_t n = strcspn(u->text, "?#");
	const char *q = h->conf.query;

	h->where = strndup(u->text, n);
	if (!h->where || asprintf(&h->url, "%s%s%s", h->where, q ? "?" : "", q ? q : "") < 0) {
		h->url = NULL;
		return far_error_set(err, ENOMEM, "cannot open %s: %s", u->text, far_strerror(ENOMEM));
	}
	if (u->text[n] == '#')
		return far_error_set(err, EINVAL, "%s: a part of an object (#) cannot be opened; write '#' in a name as %%23", u->text);
	if (!u->authority || !u->host[0])
		return far_error_set(err, EINVAL, "%s: the host is missing: %s://HOST/PATH", u->text, u->scheme);
	for (const char *p = h->url; *p; p++)
		if ((unsigned char)*p <= ' ' || *p == 0x7f)
			return far_error_set(err, EINVAL, "%s: blanks and control characters are written as %%XX", u->text);
	if (h->conf.tls_ca && strcmp(u->scheme, "https"))
		return far_error_set(err, EINVAL, "%s: tls-ca goes with https:// only: nothing is encrypted with http://", h->where);
	if (h->conf.tls_ca && access(h->conf.tls_ca, R_OK))
		return far_error_set(err, errno, "%s: cannot read %s: %s", h->where, h->conf.tls_ca, far_strerror(errno));
	return http_password(h, err);
}

static int http_start(struct http *h, struct far_error *err)
{
	int r = 0;

	h->n = (unsigned)h->conf.connections;
	for (unsigned i = 0; i < h->n && !r; i++) {
		r = http_worker_init(h, &h->workers[i]);
		h->workers[i].next = h->idle;
		h->idle = &h->workers[i];
	}
	return r ? far_error_set(err, -r, "cannot open %s: %s", h->where, r == -ENOSYS ?
				 "this libcurl lacks what is needed" : far_strerror(r)) : 0;
}

static int http_contact(struct http *h, const struct far_open_opts *opts, struct far_facts *f, struct far_error *err)
{
	uint64_t ms = opts->deadline_ms ? opts->deadline_ms : 30000;
	uint64_t want = h->conf.size != UINT64_MAX ? h->conf.size : opts->bytes ? opts->bytes : UINT64_MAX;

	if (opts->known) {
		memcpy(&h->facts, opts->known, far_min(opts->known->size, sizeof h->facts));
		h->facts.identity[sizeof h->facts.identity - 1] = 0;
		h->has_facts = true;
		ms = far_min(ms, HTTP_KNOWN_MS);
	}
	int r = http_pin(h, far_min(far_deadline(), far_now() + ms * FAR_MSEC), err);
	bool away = r && opts->known && far_error_is_transient(r) && r != -EIO && r != -EBUSY;
	if (r && !away)
		return r;
	*f = (struct far_facts){ .size = sizeof *f, .max_io = h->conf.max_io, .caps = FAR_CAP_REMOTE };
	if (away) {
		far_log(FAR_LOG_INFO, "%s: cannot be reached now (%s); opened with what was known of it", h->where, far_strerror(r));
		if (err)
			*err = (struct far_error){ 0 };
		f->bytes = h->facts.bytes;
		memcpy(f->identity, h->facts.identity, sizeof f->identity);
	} else {
		f->bytes = h->pin.bytes;
		if (h->pin.tag[0] || h->pin.modified[0])
			http_identity(&h->pin, f->identity);
		snprintf(f->version, sizeof f->version, "%.63s", h->pin.tag[0] ? h->pin.tag : h->pin.modified);
	}
	if (want != UINT64_MAX && want != f->bytes)
		return far_error_set(err, EINVAL, "%s is %" PRIu64 " bytes, not %" PRIu64 ": leave ?size= away", h->where, f->bytes, want);
	return 0;
}

int far_http_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out, struct far_error *err)
{
	struct far_facts facts;
	/* Not repeated: there may be a password in it. */
	if (u->user[0] || strchr(u->host, '@'))
		return far_error_set(err, EINVAL, "%s://...: no name stands in an address: use ?user=NAME&password-file=FILE",
				     u->scheme);
	struct http *h = calloc(1, sizeof *h);
	if (!h || curl_global_init(CURL_GLOBAL_DEFAULT)) {
		free(h);
		return far_error_set(err, ENOMEM, "cannot open %s: %s", u->text, far_strerror(ENOMEM));
	}
	far_mutex_init(&h->lock);
	far_cond_init(&h->cond);
	h->conf = (struct http_conf){ .connections = 8, .size = UINT64_MAX, .timeout = 30 * FAR_SEC, .max_io = 8 * FAR_MIB };
	int r = far_opt_parse(http_options, &h->conf, u->text, u->query, '&', true, err);
	if (!r)
		r = http_address(h, u, err);
	if (!r)
		r = http_start(h, err);
	if (!r)
		r = http_contact(h, opts, &facts, err);
	if (!r) {
		r = far_backend_new(&http_ops, h, &facts, out);
		if (r)
			far_error_set(err, -r, "cannot open %s: %s", h->where, far_strerror(r));
	}
	if (r)
		http_free(h);
	return r;
}
