/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* What does the peer speak? One socket can carry gRPC and NBD, in the clear and over TLS. */
#ifndef FAR_TELL_H
#define FAR_TELL_H

#include "net/net.h"

/* Whoever speaks gRPC does so at once, in the clear or over TLS; an NBD client is silent until it is greeted, for longer than
 * a tenth of a second. Waits for the first bytes, which stay where they are. True: gRPC; *tls: they are TLS. Until `until`, or
 * until `cancel` can be read; who has said nothing whole by then is an NBD client, and finds out what it is. */
bool far_tell_grpc(struct far_conn *conn, uint64_t until, int cancel, bool *tls);

#endif
