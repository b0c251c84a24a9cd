/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* XXH3, by the widest vectors that this CPU has where the library offers that: three times as fast as without. */
#ifndef FAR_HASH_H
#define FAR_HASH_H

#include "base/base.h"

#define FAR_HASH128 16

uint64_t far_hash64(const void *p, size_t n);
/* In the library's canonical form, big-endian. */
void far_hash128(uint8_t out[FAR_HASH128], const void *p, size_t n, uint64_t seed);
/* The same of bytes that most likely lie in no cache: a sixth faster then, slower otherwise. */
void far_hash128_cold(uint8_t out[FAR_HASH128], const void *p, size_t n, uint64_t seed);

#endif
