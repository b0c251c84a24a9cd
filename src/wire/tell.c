/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
#include "wire/tell.h"

#include "base/clock.h"
#include "net/tls.h"

#include <string.h>
#include <sys/socket.h>

#define TELL_SILENCE (100 * FAR_MSEC) /* who says nothing for so long waits to be greeted */
#define TELL_PIECES (5 * FAR_MSEC)    /* that more has come than was seen cannot be waited for: it is looked this often */

bool far_tell_grpc(struct far_conn *conn, uint64_t until, int cancel, bool *tls)
{
	uint8_t p[3];

	*tls = false;
	if (conn->ops->wait(conn, true, false, far_now() + TELL_SILENCE))
		return false;
	for (;;) {
		ssize_t n = recv(conn->fd, p, sizeof p, MSG_PEEK | MSG_DONTWAIT);
		if (n == sizeof p) {
			*tls = far_tls_looks_like(p, sizeof p);
			return *tls || !memcmp(p, "PRI", sizeof p);
		}
		if (n <= 0 || far_now() > until || far_net_wait_readable(cancel, -1, far_now() + TELL_PIECES) == 0)
			return false;
	}
}
