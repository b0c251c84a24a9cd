/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* One kind of option table for the command line, each URI's query and each layer. Ranges stand in the table. */
#ifndef FAR_OPTIONS_H
#define FAR_OPTIONS_H

#include "base/base.h"

enum far_opt_kind {
	FAR_OPT_BOOL,     /* bool: "", 1/0, true/false, yes/no, on/off */
	FAR_OPT_INT,      /* int64_t, decimal */
	FAR_OPT_SIZE,     /* uint64_t, bytes: K M G T (powers of 1024), with or without a final B or iB */
	FAR_OPT_DURATION, /* uint64_t, nanoseconds: us ms s m h; a bare number is seconds */
	FAR_OPT_FLOAT,    /* double */
	FAR_OPT_STRING,   /* char *, malloc'd */
	FAR_OPT_ENUM,     /* int: index into `names`, a list ended by NULL */
	FAR_OPT_LIST,     /* struct far_opt_list: each use appends */
};

struct far_opt_list {
	char **v;
	size_t n;
};

struct far_opt {
	const char *key;
	enum far_opt_kind kind;
	size_t offset;
	double min, max;           /* of numbers; both 0: no limit */
	const char *const *names;  /* FAR_OPT_ENUM */
	const char *value_name;    /* for help: "SIZE"; NULL: none (bool) */
	const char *help;          /* one line */
	const char *def;           /* text of the default, for help; NULL: none */
	const char *also;          /* one more word that is taken for a number, such as "auto" or "none"; gives also_value */
	double also_value;
	char letter;               /* short form on the command line; 0: none */
};
#define FAR_OPT_END { .key = NULL }

/* Set one option. -EINVAL with a sentence that names `where` ("layer delay", "mem:1M"), the key, what was wrong, and
 * for an unknown key the known ones. */
int far_opt_set(const struct far_opt *table, void *conf, const char *where, const char *key, const char *value,
		struct far_error *err);
/* Set from "key=value,key=value" (sep is ',' or '&'); percent-decoded when `decode`. A key alone is "". */
int far_opt_parse(const struct far_opt *table, void *conf, const char *where, const char *text, char sep, bool decode,
		  struct far_error *err);
const struct far_opt *far_opt_find(const struct far_opt *table, const char *key);
/* Free the strings and lists that were set. */
void far_opt_fini(const struct far_opt *table, void *conf);

/* 0 or -EINVAL (not a number, a sign, a fraction of a byte, overflow). */
int far_parse_size(const char *text, uint64_t *out);
int far_parse_duration(const char *text, uint64_t *out_ns);

/* "4.0 KiB" and the like; buf holds at least 16. Returns buf. */
const char *far_format_size(char *buf, size_t n, uint64_t bytes);
const char *far_format_duration(char *buf, size_t n, uint64_t ns);

#endif
