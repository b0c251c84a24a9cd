/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* The hooks of a program whose file this process serves: asked and told over the program's control socket. */
#ifndef FAR_SERVE_HOOKS_H
#define FAR_SERVE_HOOKS_H

#include "base/base.h"

struct serve_hooks;

/* Fill the hooks of *o with ones that speak to the socket at path. */
int serve_hooks_open(const char *path, struct far_mount_opts *o, struct serve_hooks **out, struct far_error *err);
/* Tell what is left to tell, then end. After the mount was closed. */
void serve_hooks_close(struct serve_hooks *h);

#endif
