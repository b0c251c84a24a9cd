/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "base/uri.h"
#include "region/order.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

/* ---------------------------------------------------------------------------------------------- messages */

static void cli_line(const char *prefix, const char *text)
{
	size_t n = strlen(text);
	const char *dot = n && strchr(".!?\n", text[n - 1]) ? "" : ".";

	fflush(stdout);
	fprintf(stderr, "farpage: %s%s%s%s\n", prefix ? prefix : "", prefix ? ": " : "", text, dot);
	fflush(stderr);
}

void cli_say(const char *fmt, ...)
{
	char text[1200];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	cli_line(NULL, text);
}

const char *cli_strerror(int code)
{
	return code == ESTALE || code == -ESTALE ? "somebody else owns the region now" : far_strerror(code);
}

int cli_exit_code(int code)
{
	return code == ETIMEDOUT || code == -ETIMEDOUT ? CLI_DEADLINE : CLI_FAILED;
}

int cli_fail(const char *cannot, const struct far_error *err)
{
	/* Many sentences of the library begin with what was tried; the verb's own words come first only where they
	 * add something. */
	bool whole = strncmp(err->text, "cannot ", 7) == 0;
	const char *text = err->text[0] ? err->text : far_strerror(err->code);

	cli_line(whole ? NULL : cannot, text);
	return err->code == EINVAL ? CLI_USAGE : cli_exit_code(err->code);
}

int cli_usage(const struct cli_verb *verb, const char *fmt, ...)
{
	char text[1000], hint[80];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof text, fmt, ap);
	va_end(ap);
	size_t n = strlen(text);
	snprintf(hint, sizeof hint, "%s See 'farpage %s --help'.", n && text[n - 1] == '.' ? "" : ".", verb->name);
	if (n + strlen(hint) < sizeof text)
		strcat(text, hint);
	cli_line(verb->cannot, text);
	return CLI_USAGE;
}

/* ----------------------------------------------------------------------------------------------- options */

static void cli_help_option(const struct far_opt *o)
{
	char left[80];
	char letter[8] = "";

	if (o->letter)
		snprintf(letter, sizeof letter, "-%c, ", o->letter);
	if (o->kind == FAR_OPT_BOOL)
		snprintf(left, sizeof left, "%s--%s", letter, o->key);
	else
		snprintf(left, sizeof left, "%s--%s %s", letter, o->key, o->value_name ? o->value_name : "VALUE");
	printf("  %-26s%s %s", left, strlen(left) > 25 ? "\n                            " : "", o->help);
	if (o->def)
		printf(" [%s]", o->def);
	putchar('\n');
}

static void cli_help(const struct cli_verb *verb)
{
	printf("usage: farpage %s %s\n\n%s\n", verb->name, verb->synopsis, verb->about);
	printf("\noptions:\n");
	for (const struct far_opt *o = verb->options; o && o->key; o++)
		cli_help_option(o);
	printf("  %-26s %s\n", "-h, --help", "show this and exit");
	printf("\nfarpage-%s(1) says more.\n", verb->name);
}

static const struct far_opt *cli_letter(const struct far_opt *table, char c)
{
	for (; table && table->key; table++)
		if (table->letter == c)
			return table;
	return NULL;
}

/* One option at argv[*i]; *i moves over a value that stands apart. */
static int cli_parse_one(const struct cli_verb *verb, void *conf, int argc, char **argv, int *i)
{
	struct far_error err = { 0 };
	char key[64];
	const char *arg = argv[*i];
	const char *eq = strchr(arg, '=');
	const struct far_opt *o;
	const char *value = NULL;

	if (arg[1] == '-') {
		snprintf(key, sizeof key, "%.*s", eq ? (int)far_min((uint64_t)(eq - arg - 2), 63) : 63, arg + 2);
		if (strcmp(key, "filter") == 0) /* nbdkit's word for a layer */
			strcpy(key, "layer");
		o = far_opt_find(verb->options, key);
		value = eq ? eq + 1 : NULL;
	} else {
		o = cli_letter(verb->options, arg[1]);
		snprintf(key, sizeof key, "%s", o ? o->key : arg + 1);
		if (arg[2])
			value = arg[2] == '=' ? arg + 3 : arg + 2;
	}
	if (!o)
		return cli_usage(verb, "option '%s' is unknown", arg);
	if (!value && o->kind == FAR_OPT_BOOL)
		value = "";
	if (!value) {
		if (*i + 1 >= argc)
			return cli_usage(verb, "option --%s needs a value (%s)", key, o->value_name ? o->value_name : "VALUE");
		value = argv[++*i];
	}
	if (far_opt_set(verb->options, conf, "the command line", key, value, &err) < 0)
		return cli_usage(verb, "%s", err.text);
	return CLI_GO;
}

int cli_parse(const struct cli_verb *verb, void *conf, int argc, char **argv, struct cli_args *args)
{
	bool only_args = false;

	*args = (struct cli_args){ .v = calloc((size_t)argc + 1, sizeof *args->v) };
	FAR_ASSERT(args->v);
	for (int i = 1; i < argc; i++) {
		const char *a = argv[i];
		if (only_args || a[0] != '-' || !a[1]) {
			args->v[args->n++] = argv[i];
			continue;
		}
		if (strcmp(a, "--") == 0) {
			only_args = true;
			continue;
		}
		if (strcmp(a, "--help") == 0 || strcmp(a, "-h") == 0) {
			cli_help(verb);
			return CLI_OK;
		}
		int code = cli_parse_one(verb, conf, argc, argv, &i);
		if (code != CLI_GO)
			return code;
	}
	if (args->n < verb->min_args)
		return cli_usage(verb, "%s is missing. Usage: farpage %s %s",
				 args->n + 1 == verb->min_args ? "an argument" : "more than one argument", verb->name,
				 verb->synopsis);
	if (args->n > verb->max_args)
		return cli_usage(verb, "'%s' is one argument too many. Usage: farpage %s %s", args->v[verb->max_args],
				 verb->name, verb->synopsis);
	return CLI_GO;
}

void cli_parse_fini(const struct cli_verb *verb, void *conf, struct cli_args *args)
{
	far_opt_fini(verb->options, conf);
	free(args->v);
	*args = (struct cli_args){ 0 };
}

/* --------------------------------------------------------------------------------------------- backends */

int cli_connections(const char *text, struct far_open_opts *opts, struct far_error *err)
{
	unsigned demand, bulk;
	int end = 0;

	if (!text)
		return 0;
	if (sscanf(text, "%3u+%3u%n", &demand, &bulk, &end) != 2 || text[end] || !demand || !bulk || demand > 64 ||
	    bulk > 64)
		return far_error_set(err, EINVAL,
				     "--connections '%s' is not DEMAND+BULK with each from 1 to 64. Write, say, 2+2", text);
	opts->demand_connections = demand;
	opts->bulk_connections = bulk;
	return 0;
}

int cli_wrap(struct far_backend *b, const struct far_opt_list *layers, struct far_backend **out,
	     struct far_error *err)
{
	for (size_t i = layers ? layers->n : 0; i-- > 0;) {
		struct far_backend *outer;
		int r = far_layer_open(layers->v[i], b, &outer, err);
		if (r < 0) {
			far_close(b);
			return r;
		}
		b = outer;
	}
	*out = b;
	return 0;
}

int cli_open(const char *uri, const struct far_open_opts *opts, const struct far_opt_list *layers,
	     struct far_backend **out, struct far_error *err)
{
	struct far_backend *b;
	int r = far_open(uri, opts, &b, err);

	return r < 0 ? r : cli_wrap(b, layers, out, err);
}

bool cli_is_network(const char *uri)
{
	static const char *const here[] = { "mem", "file", "dir", "null", "tape", "proc", "" };
	char scheme[32];

	far_uri_scheme(uri, scheme, sizeof scheme);
	for (size_t i = 0; i < FAR_ARRAY_LEN(here); i++)
		if (strcmp(scheme, here[i]) == 0)
			return false;
	return true;
}

struct cli_ranges {
	struct cli_range *v;
	size_t n;
};

static int cli_range_add(void *opaque, uint64_t off, uint64_t len)
{
	struct cli_ranges *l = opaque;
	struct cli_range *more = len ? realloc(l->v, (l->n + 1) * sizeof *more) : l->v;

	if (!len)
		return 0;
	if (!more)
		return -ENOMEM;
	l->v = more;
	more[l->n++] = (struct cli_range){ off, len };
	return 0;
}

int cli_ranges(const char *text, uint64_t bytes, struct cli_range **out, size_t *n, struct far_error *err)
{
	struct cli_ranges l = { NULL, 0 };
	int r = far_ranges_parse(text, bytes, cli_range_add, &l, err);

	if (r < 0) {
		free(l.v);
		l = (struct cli_ranges){ NULL, 0 };
	}
	*out = l.v;
	*n = l.n;
	return r;
}

/* ---------------------------------------------------------------------------------------------- signals */

int cli_signals(bool with_child)
{
	sigset_t set;

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGHUP);
	if (with_child)
		sigaddset(&set, SIGCHLD);
	if (sigprocmask(SIG_BLOCK, &set, NULL) < 0)
		return -errno;
	int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	return fd < 0 ? -errno : fd;
}

int cli_signal_take(int fd)
{
	struct signalfd_siginfo si;
	ssize_t n = read(fd, &si, sizeof si);

	return n == (ssize_t)sizeof si ? (int)si.ssi_signo : 0;
}
