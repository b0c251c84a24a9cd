/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Buffers that are used again: a fresh malloc of 1 MiB a message costs three to four times the throughput. */
#ifndef FAR_POOL_H
#define FAR_POOL_H

#include "base/base.h"

/* A page-aligned buffer of at least len bytes with undefined content, NULL without memory. Buffers come in powers of
 * two from 4 KiB to 32 MiB; a few of each stay for the next caller. Process-wide, any thread. */
void *far_buf_get(size_t len);
void far_buf_put(void *buf, size_t len); /* len as given to get; NULL is fine */

#endif
