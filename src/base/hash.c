/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "base/hash.h"

#include <string.h>
#define XXH_STATIC_LINKING_ONLY /* the state's size */
#include <xxhash.h>
#ifdef HAVE_XXH_DISPATCH
#include <xxh_x86dispatch.h>
#define HASH64 XXH3_64bits_dispatch
#define HASH128 XXH3_128bits_withSeed_dispatch
#define HASH128_UPDATE XXH3_128bits_update_dispatch
#else
#define HASH64 XXH3_64bits
#define HASH128 XXH3_128bits_withSeed
#define HASH128_UPDATE XXH3_128bits_update
#endif

/* The hardware fetches ahead within a page only, and the hash itself no further than it: ask for a few pages ahead. */
#define HASH_STEP ((size_t)4096)
#define HASH_AHEAD (4 * HASH_STEP)
#define HASH_LINE 64
#define HASH_COLD (4 * HASH_AHEAD) /* below, it does not pay */

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

static void hash_fetch(const char *p, size_t from, size_t to)
{
	for (size_t at = from; at < to; at += HASH_LINE)
		__builtin_prefetch(p + at, 0, 2);
}

void far_hash128_cold(uint8_t out[FAR_HASH128], const void *p, size_t n, uint64_t seed)
{
	XXH128_canonical_t c;
	XXH3_state_t state;

	if (n < HASH_COLD) {
		far_hash128(out, p, n, seed);
		return;
	}
	XXH3_128bits_reset_withSeed(&state, seed);
	for (size_t at = 0; at < n; at += HASH_STEP) {
		if (at + HASH_AHEAD < n)
			hash_fetch(p, at + HASH_AHEAD, far_min(at + HASH_AHEAD + HASH_STEP, n));
		HASH128_UPDATE(&state, (const char *)p + at, far_min(HASH_STEP, n - at));
	}
	XXH128_canonicalFromHash(&c, XXH3_128bits_digest(&state));
	memcpy(out, c.digest, FAR_HASH128);
}
