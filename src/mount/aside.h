/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#ifndef FAR_ASIDE_H
#define FAR_ASIDE_H

#include "backend/backend.h"

/*
 * The local store of a read-only mount that stands aside: another one keeps it, and its chunk map. What is there is read;
 * it takes nothing more (-ENOSPC), so the region reads past it. Were it filled by two, the slower one could put an older
 * chunk over a newer one. inner changes owner only on success.
 */
int far_aside_new(struct far_backend *inner, struct far_backend **out);

#endif
