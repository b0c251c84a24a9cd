/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * farpage: memory and storage that is somewhere else, as a file, a device or a pointer here.
 *
 * This is the only installed header. Everything in it keeps these rules:
 *
 *  - Functions return 0 or -errno. Set-up calls also fill a struct far_error (which may be NULL) with one sentence:
 *    what was tried, on what, why it failed, what to do.
 *  - Offsets are uint64_t, lengths size_t, both in bytes. A region's size is 0 <= size < 2^63 and never changes.
 *  - Public structs of options and operations begin with `size_t size`, set to sizeof the struct by their INIT macro:
 *    a program built against an older header keeps working.
 *  - Any function may be called from any thread unless its comment says otherwise. Threads that the library starts
 *    block all signals.
 *  - close/free of NULL does nothing.
 */
#ifndef FARPAGE_H
#define FARPAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FAR_API __attribute__((visibility("default")))

#define FAR_VERSION_MAJOR 0
#define FAR_VERSION_MINOR 1
#define FAR_VERSION_PATCH 0

/* "0.1.0", of the library that is loaded. */
FAR_API const char *far_version(void);

/* ------------------------------------------------------------------------------------------------ errors */

struct far_error {
	int code;        /* positive errno; 0: no error was set */
	char text[500];  /* one sentence, no final newline; always terminated */
};

/* Data calls return these codes; what each means is the same everywhere:
 *  -EINVAL     offset, length or alignment outside the backend's contract
 *  -EROFS      the backend or mount is read-only
 *  -EAGAIN     FAR_NOWAIT was given and the call would have blocked; nothing was transferred
 *  -ETIMEDOUT  the deadline passed
 *  -ESHUTDOWN  stopped while or before the call ran
 *  -EPROTO     the peer broke the rules of its protocol
 *  -ESTALE     fenced: somebody else owns the region now
 *  -ENOSPC     no room left in the store
 *  -EOPNOTSUPP an optional operation that this backend does not have
 *  -EBADMSG    a checksum does not fit: bytes were changed on their way or in a store
 *  -EBUSY      somebody else holds the lease
 *  -EREMOTEIO  flush: done, but what was written before may be forgotten, for the remote was restarted in between
 *  -EIO        everything else */

/* ---------------------------------------------------------------------------------------------- backends */

struct far_backend;

enum far_flags {
	FAR_NOWAIT = 1 << 0, /* answer -EAGAIN rather than block; a backend that never blocks may ignore it */
	FAR_BULK = 1 << 1,   /* nobody waits for this call now: background traffic (the bulk lane) */
	FAR_FLUSH = 1 << 2,  /* write: and flush, in one round trip where the backend can (FAR_CAP_FLUSH) */
};

enum far_caps {
	FAR_CAP_WRITE = 1 << 0,   /* write, discard and zero are allowed */
	FAR_CAP_DURABLE = 1 << 1, /* flush makes data survive a power cut */
	FAR_CAP_SHARE = 1 << 2,   /* far_share() works */
	FAR_CAP_REMOTE = 1 << 3,  /* calls cross a network: round trips matter */
	FAR_CAP_FLUSH = 1 << 4,   /* write understands FAR_FLUSH; far_write() flushes after it for those that do not */
};

/* What kind of run an extent is. */
enum far_extent_kind {
	FAR_EXTENT_DATA = 0,
	FAR_EXTENT_ZERO = 1, /* reads as zeros: a hole, or known to be zero */
};

struct far_extent {
	uint64_t off;
	uint64_t len;
	enum far_extent_kind kind;
};

/* Facts that are fixed once a backend is open. */
struct far_facts {
	size_t size;         /* sizeof(struct far_facts) */
	uint64_t bytes;      /* the region's size */
	uint64_t chunk;      /* 0: any offset and length; else only whole aligned chunks, one or several neighbouring ones
	                      * a call (the region's last one may be short). Extents may be asked for any range */
	uint64_t max_io;     /* longest single read or write; 0: no limit */
	uint32_t caps;       /* enum far_caps */
	uint32_t reserved;
	char identity[64];   /* which content this is, where the store knows; "" otherwise */
	char version[64];    /* which version of it; "" otherwise */
};
#define FAR_FACTS_INIT { .size = sizeof(struct far_facts) }

/* What is known of the content at this moment. Strings are "" and numbers 0 where nothing is known. */
struct far_origin {
	size_t size;
	char identity[64]; /* which content this is: stays with it when it is moved, differs for any other region */
	char writer[40];   /* id of who was given the last lease */
	uint64_t epoch;    /* grows by one with each new owner */
	uint64_t version;  /* of the content on disk; grows with flushes: an older copy that is put back shows a smaller one */
	uint64_t instance; /* of who keeps it: another number after what was written but not flushed may be forgotten */
	uint64_t change;   /* count of writes seen by this instance; for far_watch() */
};
#define FAR_ORIGIN_INIT { .size = sizeof(struct far_origin) }

/* The right to write: asked for, renewed (with the epoch that was given) and released with one call. */
struct far_lease {
	size_t size;
	const char *writer;  /* 1 to 39 letters, digits, '-': who asks; the same again after a restart */
	const char *holder;  /* for people: host, process, place; NULL: none */
	uint64_t epoch;      /* the one held before; 0: none, whatever is there is taken over as it is */
	uint64_t version;    /* newest one known to have been reached; 0: none */
	bool take_over;      /* even if somebody else holds it, or has written since `epoch` */
	bool release;        /* give it back */
	/* answer */
	uint32_t ttl_ms;     /* 0: or on refusal: how long the other's lease still lasts without renewal */
	uint32_t left_ms;
	bool gone;           /* refused: the other has no connection any more, it may be dead */
	char other[128];     /* refused: the other's `holder` */
	struct far_origin origin; /* after a grant with the epoch that is ours now */
};
#define FAR_LEASE_INIT { .size = sizeof(struct far_lease), .origin = FAR_ORIGIN_INIT }

/* What a stack of backends has counted since it was opened. Each layer adds its own. */
struct far_counters {
	size_t size;
	uint64_t connects;        /* connections made; those after the first are reconnects of their lane */
	uint64_t reconnects;      /* made because an older one was lost */
	uint64_t checksum_errors; /* messages whose checksum did not fit */
	uint64_t retries;         /* calls made again */
};
#define FAR_COUNTERS_INIT { .size = sizeof(struct far_counters) }

#define FAR_RECORD_MAX 512

/* One of several reads or writes that are made together. */
struct far_io {
	uint64_t off;
	void *buf;  /* a write only reads it */
	size_t len;
	int result; /* the answer: 0 or -errno */
};

/*
 * The operations of a backend. read, write and flush are required (write may be NULL without FAR_CAP_WRITE); the rest
 * are optional. Rules for all of them:
 *
 *  - Full transfers only: 0 or -errno, never a short count. After a failed read the buffer's content is undefined
 *    and the caller does not use it.
 *  - Bytes never written read as zeros. "Not found" in a store is zeros; any other failure is an error.
 *  - They run on any thread, many at once, and may block. Nothing is kept of a buffer after return.
 *  - They see only checked arguments: inside the region, len > 0, len <= max_io, aligned to chunk if there is one,
 *    no write without FAR_CAP_WRITE.
 *  - Data is durable only after flush returned 0: everything whose write was answered before flush was called.
 */
struct far_ops {
	size_t size; /* sizeof(struct far_ops) */
	int (*read)(void *self, uint64_t off, void *buf, size_t len, unsigned flags);
	int (*write)(void *self, uint64_t off, const void *buf, size_t len, unsigned flags);
	int (*flush)(void *self);
	/* Discard: the bytes read as zeros afterwards and their room is given back if the store can.
	 * Zero: the bytes read as zeros afterwards. Without them far_discard() and far_zero() write zeros. */
	int (*discard)(void *self, uint64_t off, uint64_t len, unsigned flags);
	int (*zero)(void *self, uint64_t off, uint64_t len, unsigned flags);
	/* Fill at most max extents that cover [off, off+len) from its start, in order, without gaps; *n >= 1 on success.
	 * The cover may end early. Without it everything is data. */
	int (*extents)(void *self, uint64_t off, uint64_t len, struct far_extent *out, size_t max, size_t *n);
	/* A descriptor whose pages are the region (mmap with MAP_SHARED shows and changes it). Owned by the backend. */
	int (*share)(void *self, int *fd);
	/* Make blocked and later calls return -ESHUTDOWN. Does not flush. May be called more than once. */
	void (*stop)(void *self);
	/* Free everything. No other call runs or follows. Does not flush. */
	void (*close)(void *self);

	/* A layer: the backend that it wraps. The operations below that a layer leaves NULL are asked there. */
	struct far_backend *(*inner)(void *self);
	/* A small record that is kept beside the content (at most FAR_RECORD_MAX bytes), moves with it, and is replaced as a
	 * whole. *n = 0: there is none yet. What record_write() wrote is durable after the next flush.
	 * -EBUSY: another process writes records here, it has the content open for writing. */
	int (*record_read)(void *self, void *buf, size_t cap, size_t *n);
	int (*record_write)(void *self, const void *buf, size_t n);
	/* What is known of the content now; with FAR_NOWAIT the last that was heard, without asking anybody. */
	int (*origin)(void *self, struct far_origin *out, unsigned flags);
	/* 0; -EBUSY: another holds it; -ESTALE: somebody else has written since `epoch`, or an older content than `version`
	 * was put back (origin.epoch or origin.version smaller than ours); -EROFS. The answer is filled in all cases. */
	int (*lease)(void *self, struct far_lease *l);
	/* What may have changed since now->change was `since` and now->instance was `instance`: at most max ranges (kind means
	 * nothing), in order, joined as the implementation likes; *all: all of it. *now: for the next call. */
	int (*watch)(void *self, uint64_t instance, uint64_t since, struct far_extent *out, size_t max, size_t *n, bool *all,
		     struct far_origin *now);
	void (*counters)(void *self, struct far_counters *c); /* add to *c */
	/* With record_write(): a number that changes when the content is changed, by this program or another (a file's time
	 * of change). 0: cannot tell. NULL: so. */
	int (*record_mark)(void *self, uint64_t *mark);
	/* Several reads, or several writes, n > 1: sets the result of each, as far_read_many() says. flags: what read or write
	 * take, without FAR_NOWAIT and FAR_FLUSH. NULL: they are made one after another. */
	void (*read_many)(void *self, struct far_io *io, size_t n, unsigned flags);
	void (*write_many)(void *self, struct far_io *io, size_t n, unsigned flags);
};
#define FAR_OPS_INIT .size = sizeof(struct far_ops)

/* Make a backend of operations and an object of yours. Both structs are copied; `self` is yours until close(self)
 * is called by far_close(). -EINVAL: a required operation is missing or the facts contradict each other. */
FAR_API int far_backend_new(const struct far_ops *ops, void *self, const struct far_facts *facts,
			    struct far_backend **out);

/* The same from four functions. write == NULL makes it read-only, flush == NULL does nothing. opaque stays yours. */
FAR_API int far_backend_from(int (*read)(void *opaque, uint64_t off, void *buf, size_t len),
			     int (*write)(void *opaque, uint64_t off, const void *buf, size_t len),
			     uint64_t size, int (*flush)(void *opaque), void *opaque, struct far_backend **out);

struct far_open_opts {
	size_t size;
	bool read_only;       /* open for reading; FAR_CAP_WRITE is not set */
	bool insecure;        /* reserved for listeners; dialling needs no permission */
	uint32_t deadline_ms; /* for opening, connecting included; 0: 30 s */
	uint64_t bytes;       /* size that a remote which cannot tell its own is taken to have; 0: unknown */
	uint32_t demand_connections, bulk_connections; /* network schemes; 0: 2 */
	/* Network schemes: open although the peer cannot be reached now, with these facts of an earlier time. They are
	 * compared when it answers: another size or identity makes every call fail with -ESTALE. NULL: it must answer. */
	const struct far_facts *known;
	bool no_checksums;    /* network schemes: do not ask for checksums of the bytes that travel */
	const char *export_name; /* far_open_stream(): NULL: the default one */
};
#define FAR_OPEN_OPTS_INIT { .size = sizeof(struct far_open_opts) }

/* Open a URI (farpage(1) lists the schemes). opts may be NULL. */
FAR_API int far_open(const char *uri, const struct far_open_opts *opts, struct far_backend **out,
		     struct far_error *err);

/* Stop and destroy a backend, and everything it wraps. Does not flush. No call may be running in it. */
FAR_API void far_close(struct far_backend *b);

/* Make blocked and later calls return -ESHUTDOWN; far_close() is still needed. */
FAR_API void far_stop(struct far_backend *b);

FAR_API const struct far_facts *far_facts(const struct far_backend *b); /* valid as long as b */
FAR_API uint64_t far_size(const struct far_backend *b);

/* Checked calls: range, alignment, caps. len == 0 is 0 at any offset up to the size. flags: enum far_flags. Requests
 * longer than max_io are cut into several. Outside the region: reads -EINVAL, writes -ENOSPC. */
FAR_API int far_read(struct far_backend *b, uint64_t off, void *buf, size_t len, unsigned flags);
FAR_API int far_write(struct far_backend *b, uint64_t off, const void *buf, size_t len, unsigned flags);
/* Several at once, each as by far_read() or far_write(): on their way together where the backend can (network schemes: in
 * few packets, and the caller is woken seldom), else one after another. Each gets its result, whatever becomes of the
 * others, except that once one ran out of time (-ETIMEDOUT), or the connection cannot be had again, those that were not
 * begun end in the same way. Returns the first of them, as the list goes, that is not 0. Ranges of writes must not overlap.
 * With FAR_FLUSH one flush follows if all were written; its error is returned, their results stay. A long list is handed
 * down 8 MiB at a time, each with its own deadline. */
FAR_API int far_read_many(struct far_backend *b, struct far_io *io, size_t n, unsigned flags);
FAR_API int far_write_many(struct far_backend *b, struct far_io *io, size_t n, unsigned flags);
FAR_API int far_flush(struct far_backend *b);
FAR_API int far_discard(struct far_backend *b, uint64_t off, uint64_t len, unsigned flags);
FAR_API int far_zero(struct far_backend *b, uint64_t off, uint64_t len, unsigned flags);
FAR_API int far_extents(struct far_backend *b, uint64_t off, uint64_t len, struct far_extent *out, size_t max,
			size_t *n);
FAR_API int far_share(struct far_backend *b, int *fd);
/* See struct far_ops. -EOPNOTSUPP where neither b nor what it wraps has the operation. */
FAR_API int far_record_read(struct far_backend *b, void *buf, size_t cap, size_t *n);
FAR_API int far_record_write(struct far_backend *b, const void *buf, size_t n);
FAR_API int far_origin(struct far_backend *b, struct far_origin *out, unsigned flags);
FAR_API int far_lease(struct far_backend *b, struct far_lease *l);
FAR_API int far_watch(struct far_backend *b, uint64_t instance, uint64_t since, struct far_extent *out, size_t max,
		      size_t *n, bool *all, struct far_origin *now);
FAR_API void far_counters(struct far_backend *b, struct far_counters *c); /* sums over the stack; *c is set */

/* Wrap `inner` in the layer that `spec` names: "NAME" or "NAME:key=value,...". inner changes owner only on success. */
FAR_API int far_layer_open(const char *spec, struct far_backend *inner, struct far_backend **out,
			   struct far_error *err);

/* Make far_open() know "scheme:rest" or "scheme://rest". `open` gets the whole URI. The table is copied; at most 32
 * may be registered, before other threads use far_open(). -EEXIST: the name is taken. */
struct far_scheme {
	size_t size;
	const char *name; /* lower-case letters, digits, '+', '-' */
	const char *help; /* one line, for `farpage` */
	int (*open)(void *opaque, const char *uri, const struct far_open_opts *opts, struct far_backend **out,
		    struct far_error *err);
	void *opaque;
};
FAR_API int far_scheme_register(const struct far_scheme *scheme);

/*
 * A connection of your own: bytes both ways, in order, none lost, without blocking but in wait. One thread may read while
 * another writes, and several may wait.
 */
struct far_stream_ops {
	size_t size;
	/* Bytes moved (> 0), 0 at the peer's end (readv only), -EAGAIN: not now, or another -errno. */
	ssize_t (*readv)(void *self, const struct iovec *iov, int n);
	ssize_t (*writev)(void *self, const struct iovec *iov, int n);
	/* Until it can be read (if `in`) or written (if `out`), or has ended: 0; after timeout_ms (-1: never) -ETIMEDOUT. */
	int (*wait)(void *self, bool in, bool out, int timeout_ms);
	/* Both directions, now: every wait ends, reads give the end, writes fail. Any thread, more than once. */
	void (*shutdown)(void *self);
	/* May be NULL. Nothing is called after it. */
	void (*close)(void *self);
};
#define FAR_STREAM_OPS_INIT .size = sizeof(struct far_stream_ops)

/* Open what a server offers at the other end of your connection, which speaks gRPC. There is no second connection and no
 * reconnect. opts->export_name says which export. On success `self` belongs to the backend until close(self); on failure it
 * is yours, shut down at most. `where` names the peer in messages. */
FAR_API int far_open_stream(const struct far_stream_ops *ops, void *self, const char *where, const struct far_open_opts *opts,
			    struct far_backend **out, struct far_error *err);

/* ------------------------------------------------------------------------------------------------ mounts */

struct far_mount;

enum far_mode { FAR_MODE_AUTO, FAR_MODE_DIRECT, FAR_MODE_MANAGED };
enum far_on_fail { FAR_ON_FAIL_ERROR, FAR_ON_FAIL_WAIT };
enum far_durable { FAR_DURABLE_REMOTE, FAR_DURABLE_LOCAL };
enum far_lease_state {
	FAR_LEASE_NONE,   /* read-only, or the peer knows no leases */
	FAR_LEASE_HELD,
	FAR_LEASE_UNSURE, /* could not be renewed in time: the peer is out of reach */
	FAR_LEASE_FENCED, /* somebody else owns the region now: writes fail with -ESTALE, nothing is pushed any more */
};
enum far_follow {
	FAR_FOLLOW_NONE,      /* writable */
	FAR_FOLLOW_FROZEN,    /* read-only; the peer cannot tell of changes: what was pulled stays as it was */
	FAR_FOLLOW_FOLLOWING, /* read-only; changes are seen within follow_ms and a round trip */
	FAR_FOLLOW_LOST,      /* the peer is out of reach, or has older content than was seen: what is here stays as it was */
};

/* How a pointer's pages are filled; far_map(3) says what each needs. */
enum far_mechanism {
	FAR_MECH_AUTO,
	FAR_MECH_SHARE,    /* the backend's own pages are mapped: nothing is copied (direct only) */
	FAR_MECH_MOVE,     /* UFFDIO_MOVE of huge pages that were filled aside; UFFDIO_COPY for single chunks */
	FAR_MECH_CONTINUE, /* huge shared memory, filled through a second mapping; UFFDIO_CONTINUE */
	FAR_MECH_COPY,     /* UFFDIO_COPY */
	FAR_MECH_SIGSEGV,  /* a SIGSEGV handler and mprotect(2): read-only, where userfaultfd is refused */
};
/* How stores through a pointer are found. */
enum far_tracking {
	FAR_TRACK_AUTO,
	FAR_TRACK_NONE,  /* read-only, or the pages are the backend's own */
	FAR_TRACK_ASYNC, /* the kernel notes written pages, PAGEMAP_SCAN reads and re-arms (6.7) */
	FAR_TRACK_SYNC,  /* the first store to a clean page is a fault that we allow (5.7, shared memory 5.19) */
	FAR_TRACK_HASH,  /* everything that is local is hashed and compared */
};

struct far_status {
	size_t size;
	enum far_mode mode;          /* DIRECT or MANAGED */
	uint64_t bytes;              /* the region's size */
	uint64_t local;              /* bytes that are here */
	uint64_t dirty;              /* bytes that are newer here than on the remote */
	uint64_t pulled, pushed;     /* bytes moved since open */
	uint64_t inflight;           /* bytes on their way, both directions */
	uint64_t demand_reads;       /* fetches somebody waited for */
	uint64_t blocked;            /* calls that wait for the remote now */
	uint64_t errors;             /* remote calls that failed, retried ones included */
	double pull_rate;            /* bytes a second, over the last second */
	int last_error;              /* positive errno of the last failed remote call; 0: none */
	uint32_t reserved;
	uint64_t window;             /* bytes that may be in flight */
	double push_rate;            /* bytes a second, over the last second */
	uint64_t oldest_dirty_ms;    /* how long the oldest dirty bytes have been so, to a second; 0: none */
	uint64_t last_error_at;      /* of last_error: milliseconds since 1970; 0: none */
	uint64_t reconnects, checksum_errors; /* of the remote: see struct far_counters */
	uint64_t local_errors;       /* reads of the local store that failed or did not fit their checksum */
	uint64_t pinned;             /* bytes that are kept from eviction by far_mount_pin() */
	uint64_t epoch;              /* of the lease */
	enum far_lease_state lease;
	enum far_follow follow;
	bool persistent;             /* the chunk map survives the process */
	bool local_full;             /* the local store took no more bytes when last asked */

	/* Pointers only. */
	enum far_mechanism mechanism;
	enum far_tracking tracking;
	bool kernel_faults;          /* system calls may be given absent memory; else they fail with EFAULT */
	bool outside;                /* served by another process */
	uint64_t faults;             /* that were served */
	uint64_t poisoned;           /* bytes whose use raises SIGBUS, until far_mount_heal() or until they are pulled */
	uint32_t n_blocked;          /* how many of the following are set */
	uint32_t reserved2;
	uint64_t blocked_at[8];      /* offsets that a thread has waited for longest, and for how long */
	uint64_t blocked_ms[8];
};
#define FAR_STATUS_INIT { .size = sizeof(struct far_status) }

struct far_mount_opts {
	size_t size;
	enum far_mode mode;           /* AUTO: managed if `local` or a pull or push option is set, or if the remote is more
	                               * than 1 ms away; else direct */
	bool read_only;
	uint64_t chunk;               /* power of two, 4 KiB to 32 MiB; 0: 64 KiB */
	const char *local;            /* URI of the local store; NULL: "mem:" of the region's size */
	struct far_backend *local_backend; /* instead of a URI; owned by the mount from success on */
	uint64_t local_max;           /* keep at most this many bytes local; 0: no limit */
	uint64_t dirty_max;           /* slow writers down past this many dirty bytes; 0: 1 GiB */
	int pull_workers;             /* -1: grow with the window, at most 32; 0: no background pull */
	int push_workers;             /* -1: 8; 0: push only in flush and close */
	uint32_t push_interval_ms;    /* 0: 1000 */
	uint64_t pull_first;          /* pull this many bytes of the order before the mount is usable */
	uint64_t window;              /* bytes in flight; 0: grows to what the path carries */
	const char *order;            /* NULL: "sequential"; "ranges:0-1M,900M-", "trace:FILE", "hint:mp4" */
	int64_t (*priority)(void *opaque, uint64_t off); /* instead: chunks are pulled by falling priority */
	const char *record_order;     /* write the order of first touches to this file at close */
	enum far_durable durable;     /* what far_mount_flush() promises */
	uint32_t deadline_ms;         /* how long a call may wait for the remote; 0: 30 s */
	enum far_on_fail on_fail;     /* WAIT: for ever */
	uint32_t max_blocked;         /* threads that may wait for the remote; 0: 256 */
	uint32_t max_partial;         /* half-written absent chunks that are kept track of; 0: 65536 */
	const char *map;              /* file of the chunk map; NULL: the path of a file: or dir: local store and ".farmap";
				       * "none": in memory, forgotten at the end */
	bool take_over;               /* take the lease even if somebody else holds it */
	bool discard_clean;           /* the remote is not what the local store was filled from: forget clean chunks */
	bool force;                   /* ... and push dirty ones over what is there now */
	uint32_t follow_ms;           /* read-only: look for changes so often; 0: 1000; UINT32_MAX: never */

	/* far_map() only. */
	void *address;                /* map exactly there (a multiple of the page size, nothing may be there); NULL: anywhere */
	enum far_mechanism mechanism; /* AUTO: the fastest that works here and fits the region */
	enum far_tracking tracking;   /* AUTO: likewise */
	bool inherit;                 /* a child after fork() sees the region too, as a private copy; needs CAP_SYS_PTRACE */
	bool outside;                 /* served by another process (far_map_uri() only) */

	/* Hooks: each gets `opaque`, runs on a thread of the library and must not call back into the mount. A non-zero
	 * return of before_flush or before_close is that call's error. */
	void *opaque;
	int (*before_flush)(void *opaque);
	int (*before_close)(void *opaque);
	void (*chunk_local)(void *opaque, uint64_t off, uint64_t len);
	void (*progress)(void *opaque, const struct far_status *st); /* about 10 a second while something moves */
};
#define FAR_MOUNT_OPTS_INIT { .size = sizeof(struct far_mount_opts), .pull_workers = -1, .push_workers = -1 }

/* Show a region as a file. `target` is an existing directory (the region appears in it as `region`) or an existing
 * file (the region appears as that file). The file is served by a child process, farpage-serve, so that this process
 * may use it freely; threads that serve a caller's own backend or hooks must not touch the mount.
 * far_mount_open_uri() lets the child open the URI (a scheme of far_scheme_register() is this process's own: far_open() it).
 * far_mount_open() takes ownership of `b` on success; its calls come back to this process over a socket. It has no name
 * by which a later mount would know it again: what is local is not kept for that. A local store or a
 * priority given as code cannot be passed to the child: -EOPNOTSUPP. */
FAR_API int far_mount_open_uri(const char *uri, const char *target, const struct far_mount_opts *opts,
			       struct far_mount **out, struct far_error *err);
FAR_API int far_mount_open(struct far_backend *b, const char *target, const struct far_mount_opts *opts,
			   struct far_mount **out, struct far_error *err);
FAR_API const char *far_path(const struct far_mount *m); /* of the file; valid until far_mount_close() */
FAR_API int far_fd(struct far_mount *m);                 /* an open read-write descriptor of it, owned by m; or -errno */
/* After 0 every byte acknowledged before the call is on the remote and the remote's own flush succeeded (or, with
 * FAR_DURABLE_LOCAL, in the local store). After a failure it fails again until that is so. */
FAR_API int far_mount_flush(struct far_mount *m);
/* Wait until `percent` of the region is local, or the range is. 0, -ETIMEDOUT, or the pull's error. */
FAR_API int far_mount_wait(struct far_mount *m, unsigned percent, int timeout_ms);
FAR_API int far_mount_wait_range(struct far_mount *m, uint64_t off, uint64_t len, int timeout_ms);
FAR_API int far_mount_status(struct far_mount *m, struct far_status *st);
/* Keep the chunks of [off, off+len) from eviction once they are local, fetching them soon; or let them go again. */
FAR_API int far_mount_pin(struct far_mount *m, uint64_t off, uint64_t len);
FAR_API int far_mount_unpin(struct far_mount *m, uint64_t off, uint64_t len);
/* Give local clean chunks inside the range back; busy, dirty and pinned ones stay. */
FAR_API int far_mount_evict(struct far_mount *m, uint64_t off, uint64_t len);
/* Flush, unmount, end the child. The flush's error is returned, and everything is closed all the same. */
FAR_API int far_mount_close(struct far_mount *m);

/* ---------------------------------------------------------------------------------------------- pointers */

/*
 * Show a region as memory: far_addr() is its first byte, rounded up to whole pages; what lies beyond the region reads as
 * zeros and is never pushed. What is touched is fetched, what is stored is pushed in the background (managed) and by
 * far_mount_flush(), which covers every store that ended before it was called. The rules for fork, mremap, munmap,
 * madvise, mlock, system calls, signals, debuggers and the end are in far_map(3).
 *
 * far_map() owns `b` on success. With opts->local, stores are pushed into that local store first and from there to the
 * remote; without it the memory itself is the local store. opts->local_max bounds the memory. opts->chunk 0: 64 KiB.
 * All functions for mounts work on it but far_path() and far_fd(). Hooks of opts run in this process. Threads of the
 * caller's backend and hooks must not touch the memory.
 */
FAR_API int far_map(struct far_backend *b, const struct far_mount_opts *opts, struct far_mount **out, struct far_error *err);
FAR_API int far_map_uri(const char *uri, const struct far_mount_opts *opts, struct far_mount **out, struct far_error *err);
FAR_API void *far_addr(const struct far_mount *m); /* valid until far_mount_close() */
/* Fetch the range and put it into the memory: afterwards no touch of it waits (until it is evicted). */
FAR_API int far_mount_populate(struct far_mount *m, uint64_t off, uint64_t len);
/* The range reads as zeros from now on, here and after the next flush on the remote. */
FAR_API int far_mount_discard(struct far_mount *m, uint64_t off, uint64_t len);
/* Fetch the poisoned pages of the range. 0: none is poisoned any more; else the remote's error, and the rest stays so. */
FAR_API int far_mount_heal(struct far_mount *m, uint64_t off, uint64_t len);
/* Something was stored in a way that no tracking sees: by a device into pages that are pinned for long (io_uring's
 * registered buffers). Call it after the I/O has ended and before far_mount_flush(). */
FAR_API int far_mount_stored(struct far_mount *m, uint64_t off, uint64_t len);

/*
 * Memory of another process. Whoever has memory registered with a userfaultfd hands the descriptor over a connected unix
 * stream socket; whoever receives it serves the faults.
 */
struct far_handover_range {
	uint64_t addr; /* in the other process, a multiple of the page size */
	uint64_t len;  /* bytes, likewise */
	uint64_t off;  /* in the region */
};
enum far_handover_format {
	FAR_HANDOVER_FARPAGE,     /* doc/handover.md: length, features, version, acknowledgement */
	FAR_HANDOVER_GO,          /* of userfaultfd-go: start address and descriptor only */
	FAR_HANDOVER_FIRECRACKER, /* JSON list of mappings with the descriptor */
};
struct far_handover {
	size_t size;
	enum far_handover_format format;
	int uffd;           /* owned by who has the struct */
	int pagemap, mem;   /* of the process, "/proc/self/pagemap" and "/proc/self/mem"; -1: not given */
	bool writable;      /* stores are to be pushed: registered with write-protection too */
	uint64_t features;  /* of the userfaultfd: UFFD_FEATURE_* */
	struct far_handover_range *range; /* malloc()ed */
	size_t n;
	int process;        /* pidfd of the process, by which its end is noticed at once; -1: not given */
};
#define FAR_HANDOVER_INIT { .size = sizeof(struct far_handover), .uffd = -1, .pagemap = -1, .mem = -1, .process = -1 }
/* Send h's descriptors and ranges; with our format, wait for the acknowledgement. Nothing of h changes owner. */
FAR_API int far_uffd_send(int socket, const struct far_handover *h, struct far_error *err);
/* Receive what a peer sends in any of the formats. With our format far_uffd_accept() must follow. */
FAR_API int far_uffd_receive(int socket, struct far_handover *h, struct far_error *err);
/* Answer: 0, or a positive errno with a sentence. Nothing happens in the formats that have no answer. */
FAR_API int far_uffd_accept(int socket, const struct far_handover *h, int code, const char *text);
FAR_API void far_handover_fini(struct far_handover *h); /* close the descriptors, free the ranges */

/* Serve faults of memory that was handed over, from `b`, which stays the caller's and outlives the pager. `opts`: chunk,
 * order, pull_workers, deadline, policy and the like. Takes h's descriptors on success. Ends by itself when the other
 * process is gone: then ended(opaque) is called once on a thread of the library. */
struct far_pager;
FAR_API int far_pager_open(struct far_handover *h, struct far_backend *b, const struct far_mount_opts *opts,
			   void (*ended)(void *opaque), void *opaque, struct far_pager **out, struct far_error *err);
/* Every store that ended before is on the backend, and its own flush succeeded. Nothing to do unless h.writable. -ESRCH:
 * the process, or its memory, is gone. */
FAR_API int far_pager_flush(struct far_pager *p);
FAR_API void far_pager_status(struct far_pager *p, struct far_status *st);
/* The last flush's error; -ESRCH: the process ended first, and what it stored after the flush before is lost. */
FAR_API int far_pager_close(struct far_pager *p);

/* ------------------------------------------------------------------------------------------------ server */

struct far_server;

struct far_server_opts {
	size_t size;
	bool insecure;        /* allow listeners beyond loopback without TLS */
	uint64_t max_request; /* longest read or write that is answered; 0: 32 MiB */
	uint32_t max_threads; /* that may block in backends; 0: 64 */
	uint32_t lease_ms;    /* how long a lease lasts without renewal; 0: 10 s */
	/* TLS, for grpcs:// (PEM files; far_server_reload() reads them again). tls_cert: the certificate and those between it
	 * and its authority; tls_key: its key, NULL: in the same file; tls_ca: clients must show a certificate that one of
	 * these has signed, NULL: they need none; tls_psk: lines "NAME:HEX", keys shared with clients in place of certificates;
	 * tls12: version 1.2 will do, too. */
	const char *tls_cert, *tls_key, *tls_ca, *tls_psk;
	bool tls12;
	/* Who may do what. allow: rules "NAME=ro" or "NAME=rw", ":EXPORT" behind one for one export; ended by NULL. NAME is
	 * one of a client's certificate, of a shared key, or of a token; "*" is whoever has one. Without rules whoever may
	 * connect may do all. */
	const char *const *allow;
	/* gRPC: each call must bring a token: one of a file with lines "NAME:TOKEN", or a JSON Web Token (RS256, ES256, EdDSA)
	 * for this audience that was signed with a key of jwks_file (then `issuer` is its issuer) or of the issuer's own, fetched
	 * from it over TLS (oidc_ca: PEM, who may sign its certificate, NULL: the system's). The name is the token's subject. */
	const char *token_file, *jwks_file, *oidc_issuer, *oidc_ca, *issuer, *audience;
};
#define FAR_SERVER_OPTS_INIT { .size = sizeof(struct far_server_opts) }

FAR_API int far_server_new(const struct far_server_opts *opts, struct far_server **out, struct far_error *err);
/* The first export is the default one: also reached as "default", "" and by services without names. The backend stays
 * the caller's and outlives the server. Before the first listen only. -EEXIST: the name is taken. */
FAR_API int far_server_export(struct far_server *s, const char *name, struct far_backend *b, struct far_error *err);
/* Accept connections on a URI such as grpc://127.0.0.1:0. *bound, if not NULL, gets the URI with the real port, to be
 * freed by the caller. */
FAR_API int far_server_listen(struct far_server *s, const char *uri, char **bound, struct far_error *err);
/* Serve one connected stream socket; fd is owned by the server from success on. */
FAR_API int far_server_serve(struct far_server *s, int fd, struct far_error *err);
/* Serve your own connection: `self` is the server's from success on, until close(self). */
FAR_API int far_server_serve_stream(struct far_server *s, const struct far_stream_ops *ops, void *self, struct far_error *err);
/* Read the files with certificates, keys and the like again. Connections that exist go on as they are. On failure
 * everything stays as it was. */
FAR_API int far_server_reload(struct far_server *s, struct far_error *err);
/* End all listeners and connections; calls that run are waited for. */
FAR_API void far_server_stop(struct far_server *s);
FAR_API void far_server_free(struct far_server *s);

#ifdef __cplusplus
}
#endif
#endif
