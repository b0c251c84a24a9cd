/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#define _GNU_SOURCE
#include "base/base.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The log level is the one piece of process-wide state: set once by the program, before threads start. */
static _Atomic int log_level = FAR_LOG_WARNING;

const char *far_version(void)
{
#define STR_(x) #x
#define STR(x) STR_(x)
	return STR(FAR_VERSION_MAJOR) "." STR(FAR_VERSION_MINOR) "." STR(FAR_VERSION_PATCH);
}

void far_panic(const char *file, int line, const char *what)
{
	far_log(FAR_LOG_ERROR, "internal error at %s:%d: '%s' does not hold. This is a bug in farpage.", file, line, what);
	abort();
}

/* Much of what a sentence quotes was said by somebody else, who is not to write to a terminal, or a line of his own. */
static void base_printable(char *text)
{
	for (unsigned char *p = (unsigned char *)text; *p; p++) {
		if (*p < ' ' || *p == 127)
			*p = '?';
		else if (p[0] == 0xc2 && p[1] >= 0x80 && p[1] < 0xa0) /* the same again in UTF-8 */
			p[0] = p[1] = '?';
	}
}

int far_error_set(struct far_error *err, int code, const char *fmt, ...)
{
	if (err) {
		va_list ap;
		err->code = code;
		va_start(ap, fmt);
		vsnprintf(err->text, sizeof err->text, fmt, ap);
		va_end(ap);
		base_printable(err->text);
	}
	return -code;
}

int far_error_prefix(struct far_error *err, const char *fmt, ...)
{
	char old[sizeof err->text];
	va_list ap;

	if (!err)
		return -EIO;
	memcpy(old, err->text, sizeof old);
	va_start(ap, fmt);
	int n = vsnprintf(err->text, sizeof err->text, fmt, ap);
	va_end(ap);
	if (n >= 0 && (size_t)n < sizeof err->text)
		snprintf(err->text + n, sizeof err->text - (size_t)n, ": %.*s", (int)(sizeof old - 3), old);
	return -err->code;
}

const char *far_strerror(int code)
{
	const char *s = strerrordesc_np(code < 0 ? -code : code);
	return s ? s : "unknown error";
}

void far_log_set_level(enum far_log_level level)
{
	atomic_store_explicit(&log_level, (int)level, memory_order_relaxed);
}

void far_log(enum far_log_level level, const char *fmt, ...)
{
	char line[1024];
	va_list ap;

	if ((int)level > atomic_load_explicit(&log_level, memory_order_relaxed))
		return;
	int at = snprintf(line, sizeof line, "farpage: ");
	va_start(ap, fmt);
	int n = vsnprintf(line + at, sizeof line - (size_t)at - 1, fmt, ap);
	va_end(ap);
	if (n < 0)
		return;
	size_t len = (size_t)at + far_min((uint64_t)n, sizeof line - (size_t)at - 2);
	base_printable(line);
	line[len++] = '\n';
	ssize_t r = write(STDERR_FILENO, line, len);
	(void)r;
}

void far_free_cleanup(void *pp)
{
	free(*(void **)pp);
}

void far_fd_close(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

void far_close_cleanup(int *fd)
{
	far_fd_close(fd);
}
