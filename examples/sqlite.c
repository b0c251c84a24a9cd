/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * SQLite with a region as its memory map: the database lives wherever the URI points, and SQLite reads its pages in place
 * (xFetch), through a pointer that far_map_uri() gave. Writes are stores into the same memory; xSync is
 * far_mount_flush(), so a committed transaction is on the remote. The rollback journal is an ordinary local file: after
 * a crash the next start on this host rolls back what was half done, as always with SQLite.
 *
 * The region has a fixed size; how much of it is database stands in SQLite's own header. One program at a time may write:
 * that is farpage's lease, so locks are not needed. If the remote fails for longer than the deadline, the touch of a page
 * that is not here raises SIGBUS, and the transaction is rolled back at the next start.
 *
 * Usage: sqlite URI NAME SQL...     NAME is an empty local file that stands for the database; NAME-journal is its journal
 */
#include <farpage.h>
#include <sqlite3.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct region_file {
	sqlite3_file base;
	struct far_mount *m;
	char *p;
	sqlite3_int64 size, room;
};

static struct far_mount *region; /* what the next open of a main database shows */
static sqlite3_int64 region_room;
static unsigned long fetches, reads, writes, syncs;

/* How much of the memory is database: page size and number of pages, big endian, at 16 and 28 of SQLite's header. */
static sqlite3_int64 header_size(const char *p, sqlite3_int64 room)
{
	const unsigned char *h = (const unsigned char *)p;
	sqlite3_int64 page = h[16] << 8 | h[17], n = (sqlite3_int64)h[28] << 24 | h[29] << 16 | h[30] << 8 | h[31];

	if (memcmp(p, "SQLite format 3", 16))
		return 0;
	page = page == 1 ? 65536 : page;
	return page * n < room ? page * n : room;
}

static int file_close(sqlite3_file *file)
{
	return SQLITE_OK; /* main() closes the mount: its error is the last flush's */
}

static int file_read(sqlite3_file *file, void *buf, int n, sqlite3_int64 off)
{
	struct region_file *f = (struct region_file *)file;
	sqlite3_int64 here = off >= f->size ? 0 : f->size - off < n ? f->size - off : n;

	reads++;
	memcpy(buf, f->p + off, (size_t)here);
	memset((char *)buf + here, 0, (size_t)(n - here));
	return here == n ? SQLITE_OK : SQLITE_IOERR_SHORT_READ;
}

static int file_write(sqlite3_file *file, const void *buf, int n, sqlite3_int64 off)
{
	struct region_file *f = (struct region_file *)file;

	writes++;
	if (off + n > f->room)
		return SQLITE_FULL;
	memcpy(f->p + off, buf, (size_t)n);
	if (off + n > f->size)
		f->size = off + n;
	return SQLITE_OK;
}

static int file_truncate(sqlite3_file *file, sqlite3_int64 size)
{
	struct region_file *f = (struct region_file *)file;

	if (size < f->size && far_mount_discard(f->m, (uint64_t)size, (uint64_t)(f->size - size)))
		return SQLITE_IOERR_TRUNCATE;
	f->size = size;
	return SQLITE_OK;
}

static int file_sync(sqlite3_file *file, int flags)
{
	syncs++;
	return far_mount_flush(((struct region_file *)file)->m) ? SQLITE_IOERR_FSYNC : SQLITE_OK;
}

static int file_size(sqlite3_file *file, sqlite3_int64 *size)
{
	*size = ((struct region_file *)file)->size;
	return SQLITE_OK;
}

static int file_lock(sqlite3_file *file, int level)
{
	return SQLITE_OK;
}

static int file_reserved(sqlite3_file *file, int *out)
{
	*out = 0;
	return SQLITE_OK;
}

static int file_control(sqlite3_file *file, int op, void *arg)
{
	return SQLITE_NOTFOUND;
}

static int file_sector(sqlite3_file *file)
{
	return 4096;
}

static int file_device(sqlite3_file *file)
{
	return 0;
}

/* The page itself, in place: touching it is what fetches it. */
static int file_fetch(sqlite3_file *file, sqlite3_int64 off, int n, void **page)
{
	struct region_file *f = (struct region_file *)file;

	*page = off + n <= f->size ? f->p + off : NULL;
	fetches += *page != NULL;
	return SQLITE_OK;
}

static int file_unfetch(sqlite3_file *file, sqlite3_int64 off, void *page)
{
	return SQLITE_OK;
}

static const sqlite3_io_methods methods = {
	.iVersion = 3, .xClose = file_close, .xRead = file_read, .xWrite = file_write, .xTruncate = file_truncate,
	.xSync = file_sync, .xFileSize = file_size, .xLock = file_lock, .xUnlock = file_lock,
	.xCheckReservedLock = file_reserved, .xFileControl = file_control, .xSectorSize = file_sector,
	.xDeviceCharacteristics = file_device, .xFetch = file_fetch, .xUnfetch = file_unfetch,
};

/* The main database is the region; journals and all else are the default VFS's. */
static int vfs_open(sqlite3_vfs *vfs, const char *name, sqlite3_file *file, int flags, int *out)
{
	sqlite3_vfs *below = vfs->pAppData;
	struct region_file *f = (struct region_file *)file;

	if (!(flags & SQLITE_OPEN_MAIN_DB))
		return below->xOpen(below, name, file, flags, out);
	*f = (struct region_file){ .base.pMethods = &methods, .m = region, .p = far_addr(region), .room = region_room };
	f->size = header_size(f->p, f->room);
	if (out)
		*out = flags;
	return SQLITE_OK;
}

static void vfs_register(void)
{
	static sqlite3_vfs vfs;
	sqlite3_vfs *below = sqlite3_vfs_find(NULL);

	vfs = *below; /* the other calls are about names of local files; they are made with this struct and use its size only */
	vfs.pNext = NULL;
	vfs.zName = "far";
	vfs.pAppData = below;
	vfs.xOpen = vfs_open;
	if (vfs.szOsFile < (int)sizeof(struct region_file))
		vfs.szOsFile = sizeof(struct region_file);
	sqlite3_vfs_register(&vfs, 0);
}

static int print_row(void *opaque, int n, char **value, char **name)
{
	for (int k = 0; k < n; k++)
		printf("%s%s", k ? "|" : "", value[k] ? value[k] : "");
	printf("\n");
	return 0;
}

static int database(const char *name, char **sql)
{
	char *why = NULL;
	sqlite3 *db = NULL;
	FILE *f = fopen(name, "a"); /* SQLite takes the journal's permissions from it */

	if (f)
		fclose(f);
	int r = sqlite3_open_v2(name, &db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, "far");

	if (!r)
		r = sqlite3_exec(db, "PRAGMA mmap_size=2000000000; PRAGMA synchronous=FULL; PRAGMA cache_size=100", NULL, NULL, &why);
	for (; !r && *sql; sql++)
		r = sqlite3_exec(db, *sql, print_row, NULL, &why);
	if (r)
		fprintf(stderr, "sqlite: %s\n", why ? why : sqlite3_errmsg(db));
	sqlite3_free(why);
	sqlite3_close(db);
	return r;
}

int main(int argc, char **argv)
{
	struct far_mount_opts o = FAR_MOUNT_OPTS_INIT;
	struct far_status st = FAR_STATUS_INIT;
	struct far_error err;

	if (argc < 4) {
		fprintf(stderr, "usage: sqlite URI NAME SQL...\n");
		return 2;
	}
	if (far_map_uri(argv[1], &o, &region, &err)) {
		fprintf(stderr, "sqlite: %s\n", err.text);
		return 1;
	}
	far_mount_status(region, &st);
	region_room = (sqlite3_int64)st.bytes;
	vfs_register();
	int r = database(argv[2], argv + 3), e = far_mount_close(region);
	if (e)
		fprintf(stderr, "sqlite: the last flush: %s\n", strerror(-e));
	if (getenv("VERBOSE"))
		fprintf(stderr, "%lu pages read in place, %lu reads by copy, %lu writes, %lu flushes\n", fetches, reads, writes,
			syncs);
	return r || e;
}
