/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What the verbs share: their table, their options, messages, exit codes. */
#ifndef FAR_CLI_H
#define FAR_CLI_H

#include "base/base.h"
#include "base/options.h"

#include <sys/types.h>

#include <stdio.h>

enum cli_exit {
	CLI_GO = -1, /* not an exit code: go on */
	CLI_OK = 0,
	CLI_FAILED = 1,
	CLI_USAGE = 2,
	CLI_UNSAVED = 3,  /* ended, and data was not saved; the message names how much and where it is */
	CLI_DEADLINE = 4, /* a deadline passed */
	CLI_SIGNAL = 130, /* ended by a second signal */
};

struct cli_args {
	char **v;
	size_t n;
};

/* One verb of the command. The option table also makes --help, and a test holds it against the manual. */
struct cli_verb {
	const char *name;
	const char *synopsis; /* what follows the name: "SOURCE [TARGET]" */
	const char *about;    /* one line */
	const char *cannot;   /* "cannot mount": how its messages begin */
	const struct far_opt *options;
	size_t min_args, max_args;
	int (*run)(int argc, char **argv); /* argv[0] is the verb; returns an exit code */
};

extern const struct cli_verb cli_bench, cli_serve, cli_mount, cli_copy, cli_info, cli_doctor, cli_status, cli_flush, cli_wait,
	cli_stop, cli_pull, cli_pin, cli_unpin, cli_evict, cli_check, cli_page;

/* Parse "--key value", "--key=value", "-x value", positional arguments and "--" into conf (already holding defaults)
 * and *args, whose strings stay argv's. CLI_GO, or the exit code to leave with: --help was printed, or an error. */
int cli_parse(const struct cli_verb *verb, void *conf, int argc, char **argv, struct cli_args *args);
void cli_parse_fini(const struct cli_verb *verb, void *conf, struct cli_args *args);

/* One message line on standard error; a final '.' is added if there is none. */
void cli_say(const char *fmt, ...) FAR_PRINTF(1, 2);
/* "farpage: CANNOT: TEXT" for an error of the library; returns the exit code that fits it. */
int cli_fail(const char *cannot, const struct far_error *err);
/* The same for a message of our own; returns CLI_USAGE. */
int cli_usage(const struct cli_verb *verb, const char *fmt, ...) FAR_PRINTF(2, 3);
/* far_strerror(), in farpage's own words where the kernel's mislead. */
const char *cli_strerror(int code);
/* The exit code for a (positive or negative) errno. */
int cli_exit_code(int code);

/* "2+2" into demand and bulk connections. */
int cli_connections(const char *text, struct far_open_opts *opts, struct far_error *err);
/* Open a URI and wrap it in layers; the first named is outermost. */
int cli_open(const char *uri, const struct far_open_opts *opts, const struct far_opt_list *layers,
	     struct far_backend **out, struct far_error *err);
/* The same, for a backend that is open already; on failure it is closed. */
int cli_wrap(struct far_backend *b, const struct far_opt_list *layers, struct far_backend **out,
	     struct far_error *err);
/* Whether the URI's scheme reaches a network peer. */
bool cli_is_network(const char *uri);

/* Parse "0-1M,900M-" into ranges inside [0, bytes); *out is malloc'd. */
struct cli_range {
	uint64_t off, len;
};
int cli_ranges(const char *text, uint64_t bytes, struct cli_range **out, size_t *n, struct far_error *err);

/* Run a shell command with $FARPAGE and $FARPAGE_URI set. 0 or -errno, which was said. */
int cli_run_start(const char *command, const char *path, const char *uri, pid_t *out);
/* Whether it has ended; then *code is its exit code, 128 and the signal if one killed it. */
bool cli_run_ended(pid_t child, int *code);

/* Block SIGINT, SIGTERM and SIGHUP, ignore SIGPIPE; call before any thread starts. Returns a signalfd, or -errno. */
int cli_signals(bool with_child);
/* Take one signal from the signalfd; 0 if there is none. */
int cli_signal_take(int fd);

#endif
