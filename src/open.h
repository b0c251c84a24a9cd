/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The list of schemes, for help texts. */
#ifndef FAR_OPEN_H
#define FAR_OPEN_H

#include "base/base.h"

struct far_scheme_info {
	const char *form; /* "file:PATH?size=SIZE&direct=1" */
	const char *help;
};
/* The i-th known scheme, the user's own ones last; false past the end. */
bool far_scheme_info(size_t i, struct far_scheme_info *info);

#endif
