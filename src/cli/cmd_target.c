/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The verbs that speak to a running instance: status, flush, wait, pull, pin, unpin, evict, stop. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "base/clock.h"
#include "mount/control.h"
#include "cli/progress.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TARGET_END_MS 10000 /* for a process that has flushed and unmounted */

struct target_conf {
	char *control, *local;
	uint64_t timeout;
	bool json, now;
};

#define OPT_CONTROL \
	{ "control", FAR_OPT_STRING, offsetof(struct target_conf, control), .value_name = "PATH", \
	  .help = "the instance's control socket; then TARGET may be left out" }
#define OPT_TIMEOUT \
	{ "timeout", FAR_OPT_DURATION, offsetof(struct target_conf, timeout), .value_name = "DURATION", \
	  .help = "give up after this time", .def = "none", .also = "none" }

static const struct far_opt target_status_options[] = {
	OPT_CONTROL,
	{ "json", FAR_OPT_BOOL, offsetof(struct target_conf, json), .help = "write JSON" },
	FAR_OPT_END
};
static const struct far_opt target_flush_options[] = { OPT_CONTROL, OPT_TIMEOUT, FAR_OPT_END };
static const struct far_opt target_wait_options[] = {
	{ "local", FAR_OPT_STRING, offsetof(struct target_conf, local), .value_name = "PERCENT|RANGES",
	  .help = "what must be local: 20%, or ranges such as 0-1M,900M-", .def = "100%" },
	OPT_CONTROL, OPT_TIMEOUT, FAR_OPT_END
};
static const struct far_opt target_ranges_options[] = { OPT_CONTROL, FAR_OPT_END };
static const struct far_opt target_stop_options[] = {
	{ "now", FAR_OPT_BOOL, offsetof(struct target_conf, now), .help = "do not flush: what is unsaved stays unsaved" },
	OPT_CONTROL, OPT_TIMEOUT, FAR_OPT_END
};

struct target {
	const struct cli_verb *verb;
	struct target_conf conf;
	struct cli_args args;
	const char *path; /* TARGET; NULL: only --control was given */
};

/* Parse; CLI_GO or an exit code. TARGET may be missing where --control stands for it. */
static int target_parse(struct target *t, const struct cli_verb *verb, int argc, char **argv)
{
	t->verb = verb;
	int code = cli_parse(verb, &t->conf, argc, argv, &t->args);
	if (code == CLI_GO && !t->args.n && !t->conf.control)
		code = cli_usage(verb, "TARGET is missing: the path that is mounted");
	t->path = t->args.n ? t->args.v[0] : NULL;
	return code;
}

static int target_end(struct target *t, int code)
{
	cli_parse_fini(t->verb, &t->conf, &t->args);
	return code;
}

static struct json_object *target_request(const struct target *t, const char *op)
{
	struct json_object *req = json_object_new_object();

	json_object_object_add(req, "op", json_object_new_string(op));
	if (t->conf.timeout)
		json_object_object_add(req, "timeout_ms", json_object_new_int64((int64_t)(t->conf.timeout / FAR_MSEC)));
	return req;
}

/* Send and free the request. The answer may come a second after the deadline that the instance keeps itself. */
static int target_call(const struct target *t, struct json_object *req, struct json_object **reply)
{
	struct far_error err = { 0 };
	uint64_t ms = t->conf.timeout / FAR_MSEC;
	int timeout = ms && ms < INT32_MAX - 1000 ? (int)ms + 1000 : -1;
	int r = far_control_call(t->conf.control, t->path, req, timeout, reply, &err);

	json_object_put(req);
	if (r == 0)
		return CLI_GO;
	cli_say("%s %s: %s", t->verb->cannot, t->path ? t->path : t->conf.control, err.text);
	return cli_exit_code(r);
}

/* ------------------------------------------------------------------------------------------------ status */

static uint64_t target_int(struct json_object *o, const char *key)
{
	struct json_object *v;

	return json_object_object_get_ex(o, key, &v) ? (uint64_t)json_object_get_int64(v) : 0;
}

static const char *target_string(struct json_object *o, const char *key)
{
	struct json_object *v;
	const char *s = json_object_object_get_ex(o, key, &v) ? json_object_get_string(v) : NULL;

	return s ? s : "";
}

static bool target_bool(struct json_object *o, const char *key)
{
	struct json_object *v;
	return json_object_object_get_ex(o, key, &v) && json_object_get_boolean(v);
}

/* "12:03:44" of milliseconds since 1970. */
static const char *target_time(uint64_t ms, char *buf, size_t n)
{
	time_t t = (time_t)(ms / 1000);
	struct tm tm;

	if (!localtime_r(&t, &tm) || !strftime(buf, n, "%Y-%m-%d %H:%M:%S", &tm))
		snprintf(buf, n, "?");
	return buf;
}

/* Who may write, and whether a reader is up to date. */
static void target_print_owner(struct json_object *o)
{
	const char *lease = target_string(o, "lease"), *follow = target_string(o, "follow");
	static const struct {
		const char *word, *text;
	} say[] = {
		{ "held", "held, no one else may write" },
		{ "unsure", "unsure: the remote is out of reach, nothing is pushed until it is renewed" },
		{ "fenced", "FENCED: somebody else has taken the region over; writes fail, nothing is pushed" },
		{ "following", "following what others write" },
		{ "frozen", "frozen: the remote cannot tell of changes, what was pulled stays as it was" },
		{ "lost", "lost: what is here stays as it was until the remote can be followed again" },
	};

	for (size_t i = 0; i < FAR_ARRAY_LEN(say); i++) {
		if (strcmp(lease, say[i].word) == 0)
			printf("  lease    %s (epoch %" PRIu64 ")\n", say[i].text, target_int(o, "epoch"));
		if (strcmp(follow, say[i].word) == 0)
			printf("  readonly %s\n", say[i].text);
	}
}

static void target_print_managed(struct json_object *o)
{
	char a[24], b[24], c[24], d[24];
	uint64_t size = target_int(o, "size"), local = target_int(o, "local"), age = target_int(o, "oldest_dirty_ms");

	printf("  local    %s (%u %%)%s%s%s\n", progress_size(a, sizeof a, local),
	       size ? (unsigned)((double)local * 100 / (double)size) : 100u, local >= size ? ", all local" : "",
	       target_bool(o, "persistent") ? ", kept when this ends" : ", in memory",
	       target_bool(o, "local_full") ? ", FULL: free some space" : "");
	if (target_int(o, "pinned"))
		printf("  pinned   %s\n", progress_size(a, sizeof a, target_int(o, "pinned")));
	printf("  unsaved  %s", progress_size(a, sizeof a, target_int(o, "dirty")));
	if (age)
		printf(", the oldest for %s", far_format_duration(a, sizeof a, age * FAR_MSEC));
	printf("\n  moved    %s pulled, %s pushed, %s on their way, pulling %s", progress_size(a, sizeof a, target_int(o, "pulled")),
	       progress_size(b, sizeof b, target_int(o, "pushed")), progress_size(c, sizeof c, target_int(o, "inflight")),
	       progress_speed(d, sizeof d, (double)target_int(o, "pull_rate")));
	printf(", pushing %s\n", progress_speed(d, sizeof d, (double)target_int(o, "push_rate")));
}

static void target_print_mount(struct json_object *o)
{
	char a[24], when[32];

	printf("%s  %s  %s\n", target_string(o, "path"), progress_size(a, sizeof a, target_int(o, "size")),
	       target_string(o, "why"));
	printf("  source   %s\n", target_string(o, "source"));
	if (strcmp(target_string(o, "mode"), "managed") == 0)
		target_print_managed(o);
	target_print_owner(o);
	printf("  waiting  %" PRIu64 " accesses wait now\n", target_int(o, "blocked"));
	if (target_int(o, "errors"))
		printf("  errors   %" PRIu64 ", the last: %s%s%s\n", target_int(o, "errors"), target_string(o, "last_error"),
		       target_int(o, "last_error_at") ? " at " : "",
		       target_int(o, "last_error_at") ? target_time(target_int(o, "last_error_at"), when, sizeof when) : "");
	if (target_int(o, "reconnects") || target_int(o, "checksum_errors") || target_int(o, "local_errors"))
		printf("  link     %" PRIu64 " reconnects, %" PRIu64 " wrong checksums; local store: %" PRIu64 " errors\n",
		       target_int(o, "reconnects"), target_int(o, "checksum_errors"), target_int(o, "local_errors"));
	printf("  process  %" PRIu64 "\n", target_int(o, "pid"));
}

static void target_print_serve(struct json_object *o)
{
	struct json_object *list;
	char a[24];

	printf("serving, process %" PRIu64 "\n", target_int(o, "pid"));
	if (!json_object_object_get_ex(o, "exports", &list))
		return;
	for (size_t i = 0; i < json_object_array_length(list); i++) {
		struct json_object *e = json_object_array_get_idx(list, i);
		printf("  %s  %s\n", target_string(e, "name"), progress_size(a, sizeof a, target_int(e, "size")));
	}
}

static void target_print_page(struct json_object *o)
{
	struct json_object *list;
	char a[24], b[24], c[24];

	printf("paging %s, process %" PRIu64 "\n", progress_size(a, sizeof a, target_int(o, "size")), target_int(o, "pid"));
	if (!json_object_object_get_ex(o, "clients", &list))
		return;
	for (size_t i = json_object_array_length(list); i-- > 0;) {
		struct json_object *e = json_object_array_get_idx(list, i);
		printf("  client %" PRIu64 ", process %" PRIu64 "%s: %s, %s local, %s unsaved, %" PRIu64 " faults, %" PRIu64 " wait now\n",
		       target_int(e, "client"), target_int(e, "process"), target_bool(e, "writable") ? ", writable" : "",
		       progress_size(a, sizeof a, target_int(e, "size")), progress_size(b, sizeof b, target_int(e, "local")),
		       progress_size(c, sizeof c, target_int(e, "dirty")), target_int(e, "faults"), target_int(e, "blocked"));
	}
}

static int target_status_run(int argc, char **argv)
{
	struct target t = { 0 };
	struct json_object *reply = NULL;
	int code = target_parse(&t, &cli_status, argc, argv);

	t.conf.timeout = 10 * FAR_SEC;
	if (code == CLI_GO)
		code = target_call(&t, target_request(&t, "status"), &reply);
	if (code == CLI_GO) {
		code = CLI_OK;
		json_object_object_del(reply, "ok");
		if (t.conf.json)
			puts(json_object_to_json_string_ext(reply, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
		else if (strcmp(target_string(reply, "kind"), "serve") == 0)
			target_print_serve(reply);
		else if (strcmp(target_string(reply, "kind"), "page") == 0)
			target_print_page(reply);
		else
			target_print_mount(reply);
	}
	json_object_put(reply);
	return target_end(&t, code);
}

/* ------------------------------------------------------------------------------------------------- flush */

/* What programs stored through mappings lies in the page cache: an fsync from here brings it to the server, which must
 * never fsync its own mount. */
static int target_fsync(const struct target *t, const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	struct stat st;
	int r = 0;

	if (fd < 0 && (errno == EACCES || errno == EROFS))
		fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0)
		r = -errno;
	else if (S_ISREG(st.st_mode) && fsync(fd) < 0)
		r = -errno;
	far_fd_close(&fd);
	if (r < 0) {
		cli_say("cannot flush %s: %s. What was written last is not on the remote; 'farpage status' tells more", path,
			cli_strerror(r));
		return cli_exit_code(r);
	}
	return CLI_GO;
}

static int target_flush_run(int argc, char **argv)
{
	struct target t = { 0 };
	struct json_object *status = NULL, *reply = NULL;
	int code = target_parse(&t, &cli_flush, argc, argv);

	if (code == CLI_GO)
		code = target_call(&t, target_request(&t, "status"), &status);
	if (code == CLI_GO && strcmp(target_string(status, "kind"), "mount") == 0)
		code = target_fsync(&t, target_string(status, "path"));
	if (code == CLI_GO) {
		struct json_object *req = target_request(&t, "flush");
		json_object_object_add(req, "remote", json_object_new_boolean(true));
		code = target_call(&t, req, &reply);
	}
	json_object_put(status);
	json_object_put(reply);
	return target_end(&t, code == CLI_GO ? CLI_OK : code);
}

/* ------------------------------------------------------------------------------------- wait, pull, evict */

static int target_local(const struct target *t, struct json_object *req)
{
	const char *text = t->conf.local ? t->conf.local : "100%";
	struct far_error err = { 0 };
	struct cli_range *v;
	unsigned percent;
	int end = 0;
	size_t n;

	if (sscanf(text, "%3u%%%n", &percent, &end) == 1 && end && !text[end] && percent <= 100) {
		json_object_object_add(req, "percent", json_object_new_int((int)percent));
		return CLI_GO;
	}
	if (cli_ranges(text, FAR_SIZE_MAX, &v, &n, &err) < 0)
		return cli_usage(t->verb, "--local '%s' is neither a percentage (20%%) nor ranges (0-1M,900M-)", text);
	free(v);
	json_object_object_add(req, "ranges", json_object_new_string(text));
	return CLI_GO;
}

static int target_wait_run(int argc, char **argv)
{
	struct target t = { 0 };
	struct json_object *req;
	int code = target_parse(&t, &cli_wait, argc, argv);

	if (code != CLI_GO)
		return target_end(&t, code);
	req = target_request(&t, "wait");
	code = target_local(&t, req);
	if (code == CLI_GO)
		code = target_call(&t, req, NULL);
	else
		json_object_put(req);
	return target_end(&t, code == CLI_GO ? CLI_OK : code);
}

static int target_ranges_run(const struct cli_verb *verb, int argc, char **argv)
{
	struct target t = { 0 };
	struct far_error err = { 0 };
	struct json_object *req;
	struct cli_range *v;
	size_t n;
	int code = target_parse(&t, verb, argc, argv);
	const char *ranges = code == CLI_GO && t.args.n > 1 ? t.args.v[1] : NULL;

	if (code == CLI_GO && ranges) {
		if (cli_ranges(ranges, FAR_SIZE_MAX, &v, &n, &err) < 0)
			code = cli_usage(verb, "%s", err.text);
		else
			free(v);
	}
	if (code != CLI_GO)
		return target_end(&t, code);
	req = target_request(&t, verb->name);
	if (ranges)
		json_object_object_add(req, "ranges", json_object_new_string(ranges));
	code = target_call(&t, req, NULL);
	return target_end(&t, code == CLI_GO ? CLI_OK : code);
}

static int target_pull_run(int argc, char **argv)
{
	return target_ranges_run(&cli_pull, argc, argv);
}

static int target_evict_run(int argc, char **argv)
{
	return target_ranges_run(&cli_evict, argc, argv);
}

static int target_pin_run(int argc, char **argv)
{
	return target_ranges_run(&cli_pin, argc, argv);
}

static int target_unpin_run(int argc, char **argv)
{
	return target_ranges_run(&cli_unpin, argc, argv);
}

/* -------------------------------------------------------------------------------------------------- stop */

/* The answer comes when everything is flushed; the local store is free for another mount when the process has ended. */
static void target_await(struct json_object *reply)
{
	pid_t pid = (pid_t)target_int(reply, "pid");
	int fd = pid > 0 ? (int)syscall(SYS_pidfd_open, pid, 0) : -1;
	struct pollfd p = { .fd = fd, .events = POLLIN };

	if (fd >= 0)
		poll(&p, 1, TARGET_END_MS);
	far_fd_close(&fd);
}

static int target_stop_run(int argc, char **argv)
{
	struct target t = { 0 };
	struct json_object *req, *reply = NULL;
	int code = target_parse(&t, &cli_stop, argc, argv);

	if (code != CLI_GO)
		return target_end(&t, code);
	req = target_request(&t, "stop");
	json_object_object_add(req, "now", json_object_new_boolean(t.conf.now));
	code = target_call(&t, req, &reply);
	if (code != CLI_DEADLINE && reply && target_int(reply, "unsaved")) {
		if (code == CLI_GO)
			cli_say("stopped: %s", target_string(reply, "unsaved_text"));
		code = CLI_UNSAVED;
	}
	if (reply)
		target_await(reply);
	json_object_put(reply);
	return target_end(&t, code == CLI_GO ? CLI_OK : code);
}

const struct cli_verb cli_status = {
	.name = "status", .synopsis = "TARGET", .cannot = "cannot ask", .about = "Say how a running mount is.",
	.options = target_status_options, .max_args = 1, .run = target_status_run,
};
const struct cli_verb cli_flush = {
	.name = "flush", .synopsis = "TARGET", .cannot = "cannot flush",
	.about = "Wait until all that was written to a mount is on its remote.", .options = target_flush_options,
	.max_args = 1, .run = target_flush_run,
};
const struct cli_verb cli_wait = {
	.name = "wait", .synopsis = "TARGET", .cannot = "cannot wait for",
	.about = "Wait until a part of a mount is local.", .options = target_wait_options, .max_args = 1,
	.run = target_wait_run,
};
const struct cli_verb cli_pull = {
	.name = "pull", .synopsis = "TARGET [RANGES]", .cannot = "cannot pull",
	.about = "Pull ranges of a mount before the rest.", .options = target_ranges_options, .max_args = 2,
	.run = target_pull_run,
};
const struct cli_verb cli_evict = {
	.name = "evict", .synopsis = "TARGET [RANGES]", .cannot = "cannot evict",
	.about = "Give the local room of clean chunks back.", .options = target_ranges_options, .max_args = 2,
	.run = target_evict_run,
};
const struct cli_verb cli_pin = {
	.name = "pin", .synopsis = "TARGET [RANGES]", .cannot = "cannot pin",
	.about = "Pull ranges of a mount and keep them local.", .options = target_ranges_options, .max_args = 2,
	.run = target_pin_run,
};
const struct cli_verb cli_unpin = {
	.name = "unpin", .synopsis = "TARGET [RANGES]", .cannot = "cannot unpin",
	.about = "Let what was pinned be evicted again.", .options = target_ranges_options, .max_args = 2,
	.run = target_unpin_run,
};
const struct cli_verb cli_stop = {
	.name = "stop", .synopsis = "TARGET", .cannot = "cannot stop", .about = "Flush and unmount a running mount.",
	.options = target_stop_options, .max_args = 1, .run = target_stop_run,
};
