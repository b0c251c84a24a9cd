/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#ifndef FAR_HOLDERS_H
#define FAR_HOLDERS_H

#include "base/base.h"

/* Write which processes have `path` open or mapped, as "sqlite3 (4711), less (4712)"; "" if none can be seen. Reads
 * /proc only: it never touches the path, which may be served by this very process. */
void far_holders(const char *path, char *out, size_t len);

#endif
