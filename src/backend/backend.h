/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * What farpage's own backends and layers share beyond the public contract in farpage.h. A leaf or a layer is made just
 * as a stranger's: an object, a table of operations, far_backend_new(). One contract, one way in.
 */
#ifndef FAR_BACKEND_H
#define FAR_BACKEND_H

#include "base/base.h"

struct far_uri;

/* Leaves. opts is never NULL here. Each takes the parsed URI and checks its own query keys. */
typedef int far_leaf_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out,
			  struct far_error *err);
far_leaf_open far_mem_open;  /* mem:SIZE?private=1 */
far_leaf_open far_file_open; /* file:PATH?size=N&direct=1 */
far_leaf_open far_dir_open;  /* dir:PATH?size=N&chunk=N&max-open=N */
far_leaf_open far_null_open; /* null: or null:SIZE  reads zeros, forgets writes */

/* The object that was given to far_backend_new(). `read` is the operation it was given with: an assert that b really is
 * of the caller's kind. */
void *far_backend_self(const struct far_backend *b, int (*read)(void *, uint64_t, void *, size_t, unsigned));
/* Whether b was made with this read operation: far_backend_self() may be called. */
bool far_backend_is(const struct far_backend *b, int (*read)(void *, uint64_t, void *, size_t, unsigned));
/* Take FAR_CAP_WRITE away; before anyone else sees b. */
void far_backend_set_read_only(struct far_backend *b);

/* Memory of this process alone, in huge pages; reads as zeros. -ENOMEM. */
int far_heap_new(uint64_t bytes, struct far_backend **out);
/* Where its bytes are, for as long as b is open; NULL if b is something else. */
const char *far_heap_address(const struct far_backend *b);

/* The kernel's error numbers of a failed call worth another try: connection lost, refused, timed out, EIO. */
bool far_error_is_transient(int code);

#endif
