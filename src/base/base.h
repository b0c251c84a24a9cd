/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Small things that every file uses: asserts, min/max, errors, log. */
#ifndef FAR_BASE_H
#define FAR_BASE_H

#include "farpage.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>

#define FAR_CLEANUP(fn) __attribute__((cleanup(fn)))
#define FAR_PRINTF(a, b) __attribute__((format(printf, a, b)))
#define far_container_of(p, type, member) ((type *)((char *)(p) - offsetof(type, member)))
#define FAR_ARRAY_LEN(a) (sizeof(a) / sizeof((a)[0]))

#define FAR_KIB ((uint64_t)1 << 10)
#define FAR_MIB ((uint64_t)1 << 20)
#define FAR_GIB ((uint64_t)1 << 30)
#define FAR_SIZE_MAX ((uint64_t)INT64_MAX) /* largest region */

static inline uint64_t far_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t far_max(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t far_div_up(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

/* Asserts check our own promises, never a peer's data; they stay on in release builds. */
_Noreturn void far_panic(const char *file, int line, const char *what);
#define FAR_ASSERT(c) ((c) ? (void)0 : far_panic(__FILE__, __LINE__, #c))

/* Fill *err (may be NULL; an error already there is replaced) and return -code. code is a positive errno. The text is
 * one sentence: what, on what, why, what to do. */
int far_error_set(struct far_error *err, int code, const char *fmt, ...) FAR_PRINTF(3, 4);
/* Put "prefix: " before the text that is there. Returns -err->code. */
int far_error_prefix(struct far_error *err, const char *fmt, ...) FAR_PRINTF(2, 3);
/* strerror() that is thread-safe; the string is static. */
const char *far_strerror(int code);

enum far_log_level { FAR_LOG_ERROR, FAR_LOG_WARNING, FAR_LOG_INFO, FAR_LOG_DEBUG };
/* One line, one write(2) to standard error: no stdio, so it may be used while a fault is being served. */
void far_log(enum far_log_level level, const char *fmt, ...) FAR_PRINTF(2, 3);
void far_log_set_level(enum far_log_level level); /* default FAR_LOG_WARNING */

/* free() through FAR_CLEANUP. */
void far_free_cleanup(void *pp);
void far_close_cleanup(int *fd);
/* close(2) of *fd if >= 0, then *fd = -1. */
void far_fd_close(int *fd);

#endif
