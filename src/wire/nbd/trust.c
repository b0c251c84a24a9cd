/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * libnbd checks a server's certificate when it has found a folder with authorities. When it has found none it takes the
 * system's, and in many versions does not check with them at all (CVE-2024-7383, mended in 1.18.5 and 1.20.2): anybody's
 * certificate will do. So it is never left to look by itself. It gets, the first that is there of
 *
 *   the file that SSL_CERT_FILE names, as our other TLS has it
 *   the folders where libnbd's own programs look
 *   the system's file of all authorities
 *
 * libnbd takes folders only, with a name in it that no system's file has. So a private folder is made with a link to the
 * file, for as long as the handshake takes.
 */
#include "wire/nbd/trust.h"

#include "base/base.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TRUST_NAME "ca-cert.pem"

static const char *const trust_files[] = {
	"/etc/ssl/certs/ca-certificates.crt", /* Debian, Arch, Gentoo */
	"/etc/pki/tls/certs/ca-bundle.crt",   /* Fedora */
	"/etc/ssl/ca-bundle.pem",             /* SUSE */
	"/etc/ssl/cert.pem",                  /* Alpine, BSD */
};

/* The path in `t`, if it fits and there are authorities at it. */
static bool trust_folder(struct far_nbd_trust *t, const char *base, const char *below)
{
	char file[sizeof t->dir + sizeof TRUST_NAME];
	int n = base && base[0] == '/' ? snprintf(t->dir, sizeof t->dir, "%s%s", base, below) : -1;

	if (n < 0 || (size_t)n >= sizeof t->dir)
		return false;
	snprintf(file, sizeof file, "%s/%s", t->dir, TRUST_NAME);
	return access(file, R_OK) == 0;
}

/* Root's home is not asked, neither by libnbd. */
static bool trust_libnbd(struct far_nbd_trust *t)
{
	const char *home = geteuid() ? getenv("HOME") : NULL;

	return trust_folder(t, home, "/.pki/libnbd") || trust_folder(t, home, "/.config/pki/libnbd") ||
	       trust_folder(t, "/etc", "/pki/libnbd");
}

static const char *trust_system(void)
{
	for (size_t i = 0; i < sizeof trust_files / sizeof *trust_files; i++)
		if (access(trust_files[i], R_OK) == 0)
			return trust_files[i];
	return NULL;
}

static int trust_make(struct far_nbd_trust *t, const char *file, struct far_error *err)
{
	const char *tmp = getenv("TMPDIR");
	char link[sizeof t->dir + sizeof TRUST_NAME];
	int n = snprintf(t->dir, sizeof t->dir, "%s/farpage-ca.XXXXXX", tmp && tmp[0] == '/' ? tmp : "/tmp");

	if (n < 0 || (size_t)n >= sizeof t->dir)
		return far_error_set(err, ENAMETOOLONG, "TMPDIR is too long a name");
	if (!mkdtemp(t->dir))
		return far_error_set(err, errno, "cannot make a folder for a link to %s in %s: %s; or give tls-certificates=DIR", file,
				     t->dir, far_strerror(errno));
	t->made = true;
	snprintf(link, sizeof link, "%s/%s", t->dir, TRUST_NAME);
	if (symlink(file, link) == 0)
		return 0;
	int r = far_error_set(err, errno, "cannot make a link to %s in %s: %s; or give tls-certificates=DIR", file, t->dir,
			      far_strerror(errno));
	far_nbd_trust_close(t);
	return r;
}

int far_nbd_trust_open(struct far_nbd_trust *t, struct far_error *err)
{
	const char *file = getenv("SSL_CERT_FILE");
	char *whole = NULL;
	int r;

	t->made = false;
	if (file && access(file, R_OK))
		return far_error_set(err, errno, "cannot read the certificates in %s, which SSL_CERT_FILE names: %s", file, far_strerror(errno));
	if (!file && trust_libnbd(t))
		return 0;
	if (!file && !(file = trust_system()))
		return far_error_set(err, ENOENT, "this host has no certificates of authorities: install ca-certificates, or give "
				     "tls-certificates=DIR with a " TRUST_NAME " in it");
	whole = realpath(file, NULL); /* the link does not stand where we do */
	r = whole ? trust_make(t, whole, err) : far_error_set(err, errno, "cannot read %s: %s", file, far_strerror(errno));
	free(whole);
	return r;
}

void far_nbd_trust_close(struct far_nbd_trust *t)
{
	char link[sizeof t->dir + sizeof TRUST_NAME];

	if (!t->made)
		return;
	snprintf(link, sizeof link, "%s/%s", t->dir, TRUST_NAME);
	unlink(link);
	rmdir(t->dir);
	t->made = false;
}
