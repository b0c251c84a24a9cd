/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What libnbd says of a connection that it could not make, in words for who has written the URI. */
#ifndef FAR_NBD_REFUSAL_H
#define FAR_NBD_REFUSAL_H

#include <stdbool.h>

/* NULL: nothing is known of `text`. *code is set to an errno with what is returned. */
const char *far_nbd_refusal(const char *text, bool tls, bool shared_key, int *code);

#endif
