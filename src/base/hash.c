/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "base/hash.h"

#include <string.h>
#ifdef HAVE_XXH_DISPATCH
#include <xxh_x86dispatch.h>
#define HASH64 XXH3_64bits_dispatch
#define HASH128 XXH3_128bits_withSeed_dispatch
#else
#include <xxhash.h>
#define HASH64 XXH3_64bits
#define HASH128 XXH3_128bits_withSeed
#endif

uint64_t far_hash64(const void *p, size_t n)
{
	return HASH64(n ? p : "", n);
}

void far_hash128(uint8_t out[FAR_HASH128], const void *p, size_t n, uint64_t seed)
{
	XXH128_canonical_t c;

	XXH128_canonicalFromHash(&c, HASH128(n ? p : "", n, seed));
	memcpy(out, c.digest, FAR_HASH128);
}
