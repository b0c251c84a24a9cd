/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/* farpage doctor: what this machine can do, and what to do about the rest. Each check is one function that fills one
 * line: what, its state, and the next step if there is one. */
#define _GNU_SOURCE
#include "cli/cli.h"

#include "cli/progress.h"
#include "frontend/pointer.h"
#include "frontend/uffd.h"

#include <fcntl.h>
#include <json-c/json.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <unistd.h>

struct doctor_conf {
	bool json;
};

static const struct far_opt doctor_options[] = {
	{ "json", FAR_OPT_BOOL, offsetof(struct doctor_conf, json), .help = "write JSON" },
	FAR_OPT_END
};

enum doctor_state { DOCTOR_OK, DOCTOR_LIMITED, DOCTOR_NO };

struct doctor_line {
	enum doctor_state state;
	char found[280];
	char next[280]; /* "" if nothing is to be done */
};

static void doctor_set(struct doctor_line *l, enum doctor_state state, const char *found, const char *next)
{
	l->state = state;
	snprintf(l->found, sizeof l->found, "%s", found);
	snprintf(l->next, sizeof l->next, "%s", next);
}

static bool doctor_read(const char *path, char *buf, size_t n)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, buf, n - 1);

	far_fd_close(&fd);
	buf[got > 0 ? got : 0] = '\0';
	buf[strcspn(buf, "\n")] = '\0';
	return got > 0;
}

/* Whether the shell would find the program. */
static bool doctor_program(const char *name)
{
	const char *path = getenv("PATH");
	char *copy = strdup(path ? path : "/usr/bin:/bin"), *save = NULL, file[4096];
	bool found = false;

	for (char *dir = copy ? strtok_r(copy, ":", &save) : NULL; dir && !found; dir = strtok_r(NULL, ":", &save)) {
		snprintf(file, sizeof file, "%s/%s", dir, name);
		found = access(file, X_OK) == 0;
	}
	free(copy);
	return found;
}

static void doctor_kernel(struct doctor_line *l)
{
	struct utsname u;

	uname(&u);
	snprintf(l->found, sizeof l->found, "%.64s %.64s, %ld CPUs", u.release, u.machine,
		 sysconf(_SC_NPROCESSORS_ONLN));
}

static void doctor_fuse(struct doctor_line *l)
{
	int fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);

	if (fd >= 0)
		doctor_set(l, DOCTOR_OK, "there and usable", "");
	else if (errno == ENOENT || errno == ENODEV || errno == ENXIO)
		doctor_set(l, DOCTOR_NO, "missing: regions cannot be mounted as files",
			   "load it with 'modprobe fuse' (in a container: pass the device with --device /dev/fuse)");
	else if (errno == EACCES || errno == EPERM)
		doctor_set(l, DOCTOR_NO, "not open to this user: regions cannot be mounted as files",
			   "as root: chmod 666 /dev/fuse; in a container add --cap-add SYS_ADMIN");
	else
		doctor_set(l, DOCTOR_NO, far_strerror(errno), "find out why /dev/fuse cannot be opened");
	far_fd_close(&fd);
}

static void doctor_fusermount(struct doctor_line *l)
{
	if (doctor_program("fusermount3"))
		doctor_set(l, DOCTOR_OK, "installed: no root needed to mount", "");
	else if (geteuid() == 0)
		doctor_set(l, DOCTOR_LIMITED, "missing: only root can mount", "apt-get install fuse3");
	else
		doctor_set(l, DOCTOR_NO, "missing: this user cannot mount", "sudo apt-get install fuse3");
}

static void doctor_read_ahead(struct doctor_line *l)
{
	if (geteuid() == 0)
		doctor_set(l, DOCTOR_OK, "1 MiB for mounts: this user may set it", "");
	else
		doctor_set(l, DOCTOR_LIMITED, "128 KiB for mounts: sequential reads run at about two thirds of full speed",
			   "mount as root for 1 MiB, or raise /sys/class/bdi/0:*/read_ahead_kb after mounting");
}

/* The features that newer kernels have, and what is lost without them. */
static void doctor_userfaultfd(struct doctor_line *l)
{
	static const unsigned bits[] = { FAR_UFFD_WP, FAR_UFFD_WP_SHMEM, FAR_UFFD_WP_ASYNC, FAR_UFFD_SCAN, FAR_UFFD_MOVE,
					 FAR_UFFD_POISON, FAR_UFFD_MINOR, FAR_UFFD_MINOR_WP, FAR_UFFD_EVENTS, FAR_UFFD_FORK,
					 FAR_UFFD_HUGE, FAR_UFFD_THP, FAR_UFFD_COLLAPSE };
	unsigned have = far_uffd_have();
	char list[2][100] = { "", "" };

	if (!(have & FAR_UFFD_ANY)) {
		doctor_set(l, DOCTOR_NO, far_uffd_why(), "without it pointers are read-only and served by SIGSEGV");
		return;
	}
	for (size_t i = 0; i < FAR_ARRAY_LEN(bits); i++) {
		char *to = list[!(have & bits[i])];
		snprintf(to + strlen(to), sizeof list[0] - strlen(to), "%s%s", to[0] ? ", " : "", far_uffd_word(bits[i]));
	}
	snprintf(l->found, sizeof l->found, "%s; %s%s%s",
		 have & FAR_UFFD_KERNEL ? "faults of system calls included" : "user mode only: a system call on an absent page gives EFAULT",
		 list[0], list[1][0] ? "; not " : "", list[1]);
	if (!(have & FAR_UFFD_KERNEL)) {
		l->state = DOCTOR_LIMITED;
		snprintf(l->next, sizeof l->next, "as root: sysctl vm.unprivileged_userfaultfd=1");
	} else if (getenv("FARPAGE_WITHOUT") && list[1][0]) {
		l->state = DOCTOR_LIMITED;
		snprintf(l->next, sizeof l->next, "FARPAGE_WITHOUT=%.100s hides some of it", getenv("FARPAGE_WITHOUT"));
	} else if (!(have & FAR_UFFD_WP_ASYNC)) {
		l->state = DOCTOR_LIMITED;
		snprintf(l->next, sizeof l->next, "Linux 6.8 has all of it");
	}
}

/* What a pointer to a large remote region takes, and why not what is faster. */
static void doctor_pointer(struct doctor_line *l, bool writable)
{
	struct far_mount_opts opts = FAR_MOUNT_OPTS_INIT;
	struct far_facts facts = FAR_FACTS_INIT;
	unsigned have = far_uffd_have();
	enum far_mechanism m;
	enum far_tracking t;
	struct far_error err = { 0 };

	facts.bytes = FAR_GIB;
	facts.caps = FAR_CAP_REMOTE | (writable ? FAR_CAP_WRITE : 0);
	if (far_pointer_settle(have, &facts, &opts, writable, true, &m, &t, &err)) {
		l->state = DOCTOR_NO;
		snprintf(l->found, sizeof l->found, "%.250s", err.text);
		snprintf(l->next, sizeof l->next, "see userfaultfd above");
		return;
	}
	snprintf(l->found, sizeof l->found, "%s: %s%s%s", far_mechanism_word(m), far_pointer_words(m), writable ? "; " : "",
		 writable ? far_pointer_tracking_words(t) : "");
	for (enum far_mechanism faster = writable ? FAR_MECH_MOVE : FAR_MECH_CONTINUE; faster < m && m == FAR_MECH_COPY; faster++) {
		size_t n = strlen(l->next);
		snprintf(l->next + n, sizeof l->next - n, "%s%s would be faster, but %s", n ? "; " : "",
			 far_mechanism_word(faster), far_pointer_why_not(have, &facts, &opts, writable, true, faster));
	}
	if (m == FAR_MECH_SIGSEGV) {
		l->state = DOCTOR_LIMITED;
		snprintf(l->next, sizeof l->next, "see userfaultfd above; system calls on absent pages give EFAULT");
	} else if (t == FAR_TRACK_HASH) {
		l->state = DOCTOR_LIMITED;
	}
}

static void doctor_pointer_read(struct doctor_line *l)
{
	doctor_pointer(l, false);
}

static void doctor_pointer_write(struct doctor_line *l)
{
	doctor_pointer(l, true);
}

static void doctor_module(struct doctor_line *l, const char *module, const char *device, const char *what)
{
	char path[100], text[200];

	snprintf(path, sizeof path, "/sys/module/%s", module);
	if (access(path, F_OK) == 0 || access(device, F_OK) == 0) {
		doctor_set(l, DOCTOR_OK, "there", "");
		return;
	}
	snprintf(text, sizeof text, "not loaded: %s", what);
	snprintf(path, sizeof path, "modprobe %s, where the kernel has it", module);
	doctor_set(l, DOCTOR_NO, text, path);
}

static void doctor_nbd(struct doctor_line *l)
{
	doctor_module(l, "nbd", "/dev/nbd0", "no /dev/nbdN (not used by this version)");
}

static void doctor_ublk(struct doctor_line *l)
{
	doctor_module(l, "ublk_drv", "/dev/ublk-control", "no /dev/ublkbN (not used by this version)");
}

static void doctor_files(struct doctor_line *l)
{
	struct rlimit r;

	getrlimit(RLIMIT_NOFILE, &r);
	snprintf(l->found, sizeof l->found, "%llu open files", (unsigned long long)r.rlim_cur);
	if (r.rlim_cur < 1024) {
		l->state = DOCTOR_LIMITED;
		snprintf(l->next, sizeof l->next, "ulimit -n 4096");
	}
}

static void doctor_threads(struct doctor_line *l)
{
	char pids[32] = "", text[64];
	struct rlimit r;

	getrlimit(RLIMIT_NPROC, &r);
	doctor_read("/sys/fs/cgroup/pids.max", pids, sizeof pids);
	if (r.rlim_cur == RLIM_INFINITY)
		snprintf(text, sizeof text, "no limit of this user");
	else
		snprintf(text, sizeof text, "%llu for this user", (unsigned long long)r.rlim_cur);
	snprintf(l->found, sizeof l->found, "%s%s%s", text, pids[0] && strcmp(pids, "max") ? ", of the group " : "",
		 strcmp(pids, "max") ? pids : "");
	if (r.rlim_cur < 600) {
		l->state = DOCTOR_LIMITED;
		snprintf(l->next, sizeof l->next, "ulimit -u 4096, or mount with --max-blocked 64");
	}
}

static void doctor_memory(struct doctor_line *l)
{
	char size[24];
	uint64_t ram = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);

	snprintf(l->found, sizeof l->found, "%s; a larger region needs --local file:PATH or --local-max",
		 progress_size(size, sizeof size, ram));
}

static void doctor_sockets(struct doctor_line *l)
{
	const char *run = getenv("XDG_RUNTIME_DIR");

	if (geteuid() == 0)
		doctor_set(l, access("/run", W_OK) == 0 ? DOCTOR_OK : DOCTOR_LIMITED, "in /run/farpage", "");
	else if (run && run[0] == '/' && access(run, W_OK) == 0)
		snprintf(l->found, sizeof l->found, "in %.150s/farpage", run);
	else
		doctor_set(l, DOCTOR_LIMITED, "in /tmp: XDG_RUNTIME_DIR is not set", "log in through PAM, or use --control PATH");
}

static const struct {
	const char *key, *name;
	void (*check)(struct doctor_line *l);
} doctor_checks[] = {
	{ "kernel", "kernel", doctor_kernel },
	{ "fuse", "/dev/fuse", doctor_fuse },
	{ "fusermount3", "fusermount3", doctor_fusermount },
	{ "read_ahead", "read-ahead", doctor_read_ahead },
	{ "userfaultfd", "userfaultfd", doctor_userfaultfd },
	{ "pointer_read", "read-only pointer", doctor_pointer_read },
	{ "pointer_write", "writable pointer", doctor_pointer_write },
	{ "nbd", "kernel nbd", doctor_nbd },
	{ "ublk", "ublk", doctor_ublk },
	{ "files", "descriptors", doctor_files },
	{ "threads", "threads", doctor_threads },
	{ "memory", "memory", doctor_memory },
	{ "control", "control sockets", doctor_sockets },
};

static const char *const doctor_words[] = { "ok", "limited", "no" };

static void doctor_print(const char *name, const struct doctor_line *l)
{
	printf("%-8s %-17s %s\n", doctor_words[l->state], name, l->found);
	if (l->next[0])
		printf("%-26s -> %s\n", "", l->next);
}

static void doctor_json(struct json_object *out, const char *key, const struct doctor_line *l)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "state", json_object_new_string(doctor_words[l->state]));
	json_object_object_add(o, "found", json_object_new_string(l->found));
	json_object_object_add(o, "next", l->next[0] ? json_object_new_string(l->next) : NULL);
	json_object_object_add(out, key, o);
}

static int doctor_run(int argc, char **argv)
{
	struct doctor_conf conf = { 0 };
	struct cli_args args;
	int code = cli_parse(&cli_doctor, &conf, argc, argv, &args);

	if (code == CLI_GO) {
		struct json_object *out = json_object_new_object();
		for (size_t i = 0; i < FAR_ARRAY_LEN(doctor_checks); i++) {
			struct doctor_line line = { 0 };
			doctor_checks[i].check(&line);
			if (conf.json)
				doctor_json(out, doctor_checks[i].key, &line);
			else
				doctor_print(doctor_checks[i].name, &line);
		}
		if (conf.json)
			puts(json_object_to_json_string_ext(out, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE));
		json_object_put(out);
		code = CLI_OK;
	}
	cli_parse_fini(&cli_doctor, &conf, &args);
	return code;
}

const struct cli_verb cli_doctor = {
	.name = "doctor", .synopsis = "", .cannot = "cannot look", .about = "Say what this machine can do.",
	.options = doctor_options, .run = doctor_run,
};
