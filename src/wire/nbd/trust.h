/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* Which authorities may have signed an NBD server's certificate, where the user names none. */
#ifndef FAR_NBD_TRUST_H
#define FAR_NBD_TRUST_H

#include "farpage.h"

struct far_nbd_trust {
	char dir[1024]; /* with a ca-cert.pem, and maybe a client's certificate: what nbd_set_tls_certificates() takes */
	bool made;      /* for this one time */
};

/* -ENOENT: this host knows no authorities. */
int far_nbd_trust_open(struct far_nbd_trust *t, struct far_error *err);
/* Once the handshake is over. */
void far_nbd_trust_close(struct far_nbd_trust *t);

#endif
