/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What a chunk map says, for `farpage info`. */
#ifndef FAR_MAP_INFO_H
#define FAR_MAP_INFO_H

#include "base/base.h"

struct far_persist;
struct json_object;

/* The map that `what` is ("X.farmap") or has beside it (file:X, dir:X); 0 and *out NULL: it has none. */
int map_info_find(const char *what, struct far_persist **out, struct far_error *err);
bool map_info_is_map(const char *what);
void map_info_text(const struct far_persist *p);
struct json_object *map_info_json(const struct far_persist *p);

#endif
