/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* XXH3 as fast as this CPU can: where the library has it, the variant is chosen when it runs (AVX2 is three times SSE2). */
#ifndef FAR_HASH_H
#define FAR_HASH_H

#include <xxhash.h>
#ifdef FAR_XXH_DISPATCH
#include <xxh_x86dispatch.h>
#endif

#endif
