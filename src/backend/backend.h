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

/* Beside enum far_flags, for local stores that are memory behind a pointer: bytes from the remote; what is there stays. */
#define FAR_FILL (1u << 8)

/* Leaves. opts is never NULL here. Each takes the parsed URI and checks its own query keys. */
typedef int far_leaf_open(const struct far_uri *u, const struct far_open_opts *opts, struct far_backend **out,
			  struct far_error *err);
far_leaf_open far_mem_open;  /* mem:SIZE?private=1 */
far_leaf_open far_file_open; /* file:PATH?size=N&direct=1 */
far_leaf_open far_dir_open;  /* dir:PATH?size=N&chunk=N&max-open=N */
far_leaf_open far_null_open; /* null: or null:SIZE  reads zeros, forgets writes */
far_leaf_open far_http_open; /* http://host/path and https: an object on a web server, read-only */

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
char *far_heap_place(const struct far_backend *b, uint64_t off, size_t len); /* for far_backend_place() */

/* Whether b itself is memory of this host: none of its calls waits for anything. mem.c. */
bool far_backend_is_memory(const struct far_backend *b);
/* Where bytes of such memory may be put without a call of it; NULL: write them as ever. What is put there by the kernel (a
 * read of a socket) fails with -EFAULT when there is no memory left. It stays until b is closed. */
char *far_backend_place(const struct far_backend *b, uint64_t off, size_t len);
/* Where such memory's bytes can be read without a call of it; NULL: read them as ever. Others may change them meanwhile. It
 * stays until b is closed. */
const char *far_backend_bytes(const struct far_backend *b, uint64_t off, size_t len);
/* Such memory will be read there in a moment, at any offset: begin to bring it from where it is slow. */
void far_backend_soon(const struct far_backend *b, uint64_t off, size_t len);
/* Whether far_zero() and far_discard() cost less than writing zeros would, all the way down. */
bool far_backend_zeroes(struct far_backend *b);

/* What the innermost backend with a record calls its mark now; 0: cannot tell. */
uint64_t far_record_mark(struct far_backend *b);
/* For a leaf that has just read its record: put what it says of identity and version into the facts. */
void far_record_facts(const void *buf, size_t n, struct far_facts *f);

/*
 * owner.c: who may write, kept in the record beside the content: identity, epoch, version, last writer. One object an
 * export of a server, or of a store that a mount opens by itself. All thread-safe. A store without a record has an owner
 * all the same, whose memory is the process's.
 */
struct far_owner;
#define FAR_LEASE_MS 10000 /* how long a lease lasts where nobody says */
/* b stays the caller's. -EBUSY: another process has the content open for writing; -EIO and the like: the record could not
 * be read or written. */
int far_owner_new(struct far_backend *b, uint32_t lease_ms, struct far_owner **out);
void far_owner_free(struct far_owner *o);
/* Bring the record up to date, so that a change by another program is noticed at the next start. Before b is stopped;
 * far_owner_free() does it as well. */
void far_owner_farewell(struct far_owner *o);
void far_owner_origin(struct far_owner *o, struct far_origin *out);
/* A session (0: a caller without one) begins a generation: when this returns no change of an older one runs or will. The
 * thread's deadline bounds the wait for those that run. -ECANCELED: there is a newer one already; -EBUSY: too many
 * sessions. */
int far_owner_session(struct far_owner *o, uint64_t session, uint64_t generation);
/* A connection of the session was opened (+1) or has ended (-1). */
void far_owner_connected(struct far_owner *o, uint64_t session, int change);
/* Around everything that changes bytes. 0, -ECANCELED (older generation), -ENOTCONN (session unknown here: say
 * Describe first), -ESTALE (another holds the lease), -EAGAIN with FAR_NOWAIT where it would wait. After 0 change_end()
 * must follow, with the same session and generation, and with whether bytes may have changed. */
int far_owner_change_begin(struct far_owner *o, uint64_t session, uint64_t generation, unsigned flags);
void far_owner_change_end(struct far_owner *o, uint64_t session, uint64_t generation, uint64_t off, uint64_t len,
			  bool changed);
/* The backend's flush, with the record brought up to date in it. out->version: what is durable now. */
int far_owner_flush(struct far_owner *o, struct far_origin *out);
/* l's writer is checked here; session must be known. -EINVAL, -ENOTCONN, -ECANCELED, -ETIMEDOUT besides far_lease()'s
 * codes. */
int far_owner_lease(struct far_owner *o, uint64_t session, uint64_t generation, struct far_lease *l);
int far_owner_watch(struct far_owner *o, uint64_t instance, uint64_t since, struct far_extent *out, size_t max, size_t *n,
		    bool *all, struct far_origin *now);
/* owned.c: a backend over `inner` that has origin, lease and watch through an owner of its own: for a store without a
 * server. inner changes owner only on success. */
int far_owned_new(struct far_backend *inner, struct far_backend **out);

/* The kernel's error numbers of a failed call worth another try: connection lost, refused, timed out, EIO. */
bool far_error_is_transient(int code);

#endif
