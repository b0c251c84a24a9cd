/* SPDX-License-Identifier: Apache-2.0
 * Copyright the farpage authors */
/*
 * The life of a mount. One thread waits for whatever comes first: a signal, the end of a job, the control socket, the
 * end of --run's command, an unmount by somebody else, or the time to draw progress. What may block (opening, the
 * orderly end) is a job on a thread of its own, so that a second signal is always heard.
 *
 *   OPENING   -> SERVING     mount_loop_opened(): the job far_mnt_open() gave a mount
 *   OPENING   -> ENDED       it failed
 *   SERVING   -> FINISHING   mount_loop_finish(): a signal, `farpage stop`, --run's command ended, unmounted elsewhere
 *   FINISHING -> ENDED       mount_loop_finished(): the job far_mnt_finish() ended
 *   any       -> exit 130    mount_loop_give_up(): a second signal
 *
 * A signal while OPENING is remembered and acted on in SERVING. mnt is used by the loop, by the job and by the control
 * socket's threads; it is closed only after the job was joined and the control socket was closed.
 */
#define _GNU_SOURCE
#include "cli/mount_loop.h"

#include "base/clock.h"
#include "base/uri.h"
#include "cli/cli.h"
#include "mount/control.h"
#include "cli/progress.h"

#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOUNT_STALL (5 * FAR_SEC)

enum mount_state { MOUNT_OPENING, MOUNT_SERVING, MOUNT_FINISHING, MOUNT_ENDED };

struct mount_job {
	struct far_thread thread;
	int done_fd;            /* eventfd: the job has ended; what follows may be read then */
	int result;
	struct far_mnt *opened;
	struct far_error err;
	char holders[400];
	struct mount_loop *l;
};

struct mount_run {
	struct mount_loop *l;
	struct mount_job job;
	struct progress progress;
	enum mount_state state;
	int signals;             /* signalfd */
	unsigned asked;          /* signals that asked for the end */
	pid_t child;             /* of --run; 0: none */
	int child_code;
	bool pulling;
	uint64_t moved, moved_at; /* what had been moved when somebody began to wait, or when it last grew */
	bool stalled;             /* said so */
	int code;
};

/* ------------------------------------------------------------------------------------------------- jobs */

static void *mount_job_open_cb(void *arg)
{
	struct mount_job *j = arg;

	j->result = far_mnt_open(&j->l->conf, &j->opened, &j->err);
	eventfd_write(j->done_fd, 1);
	return NULL;
}

static void *mount_job_finish_cb(void *arg)
{
	struct mount_job *j = arg;

	j->result = far_mnt_finish(j->l->mnt, far_now() + j->l->deadline, j->holders, sizeof j->holders);
	eventfd_write(j->done_fd, 1);
	return NULL;
}

static void mount_job_start(struct mount_run *run, const char *name, void *(*fn)(void *))
{
	int r = far_thread_start(&run->job.thread, name, fn, &run->job);

	if (r < 0) {
		run->job.result = far_error_set(&run->job.err, -r, "cannot start a thread: %s", far_strerror(r));
		eventfd_write(run->job.done_fd, 1);
	}
}

/* ------------------------------------------------------------------------------------------------- --run */

static void mount_child_start(struct mount_run *run)
{
	const char *path = far_mnt_path(run->l->mnt);
	char encoded[3 * PATH_MAX], uri[sizeof encoded + 32];

	if (!run->l->run)
		return;
	far_uri_encode(path, encoded, sizeof encoded);
	snprintf(uri, sizeof uri, run->l->conf.socket ? "nbd+unix:///?socket=%s" : "file:%s", encoded);
	if (cli_run_start(run->l->run, path, uri, &run->child) < 0) {
		run->child = 0;
		run->code = CLI_FAILED;
		run->asked++;
	}
}

static void mount_child_reap(struct mount_run *run)
{
	if (!cli_run_ended(run->child, &run->code))
		return;
	run->child = 0;
	run->asked = run->asked ? run->asked : 1;
}

/* ------------------------------------------------------------------------------------------- the states */

/* The first thing anybody learns: the path, on standard output or to the waiting parent. */
static void mount_announce(struct mount_run *run)
{
	struct mount_loop *l = run->l;

	if (l->ready_fd >= 0) {
		char line[4200];
		int n = snprintf(line, sizeof line, "%s\n", l->conf.pointer ? l->conf.target : far_mnt_path(l->mnt));
		if (write(l->ready_fd, line, (size_t)n) != n)
			run->asked++; /* the parent was killed: nobody knows of this mount */
		far_fd_close(&l->ready_fd);
	} else {
		puts(far_mnt_path(l->mnt));
		fflush(stdout);
	}
}

/* After --background's parent has the path, this process has no terminal any more. */
static void mount_leave_terminal(void)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);

	if (null >= 0) {
		dup2(null, STDIN_FILENO);
		dup2(null, STDOUT_FILENO);
		dup2(null, STDERR_FILENO);
		if (null > STDERR_FILENO)
			close(null);
	}
}

static void mount_show(struct mount_run *run)
{
	struct far_status st = FAR_STATUS_INIT;
	struct mount_loop *l = run->l;
	char head[400], size[24];

	far_mnt_status(l->mnt, &st);
	snprintf(head, sizeof head, "%s  %s  %s", l->conf.target, progress_size(size, sizeof size, st.bytes),
		 far_mnt_why(l->mnt));
	run->pulling = st.mode == FAR_MODE_MANAGED && l->conf.opts.pull_workers != 0 && st.local < st.bytes;
	progress_init(&run->progress, l->conf.target, head, st.bytes, l->quiet);
	if (!l->quiet && (!run->pulling || !run->progress.tty))
		fprintf(stderr, "%s\n", head);
}

/* Programs that wait for a remote which does not answer: say so once, after five seconds of it. */
static void mount_watch(struct mount_run *run, const struct far_status *st)
{
	uint64_t now = far_now(), moved = st->pulled + st->pushed;

	if (!st->blocked || moved != run->moved || st->mode != FAR_MODE_MANAGED) {
		if (run->stalled)
			cli_say("%s answers again", run->l->source);
		run->stalled = false;
		run->moved = moved;
		run->moved_at = now;
		return;
	}
	if (run->stalled || now - run->moved_at < MOUNT_STALL)
		return;
	run->stalled = true;
	if (run->progress.drawn)
		progress_end(&run->progress, NULL);
	cli_say("%" PRIu64 " accesses to %s wait for %s, which has not answered for 5 s%s%s. %s", st->blocked,
		run->l->conf.target, run->l->source, st->last_error ? ": " : "",
		st->last_error ? far_strerror(st->last_error) : "",
		run->l->conf.opts.on_fail == FAR_ON_FAIL_WAIT ? "They wait until it does, or until 'farpage stop --now'"
							      : "They fail when --deadline has passed");
}

static void mount_tick(struct mount_run *run)
{
	struct far_status st = FAR_STATUS_INIT;

	if (run->state != MOUNT_SERVING)
		return;
	far_mnt_status(run->l->mnt, &st);
	mount_watch(run, &st);
	if (!run->pulling)
		return;
	if (st.local >= st.bytes) {
		progress_end(&run->progress, "all local");
		run->pulling = false;
	} else {
		progress_update(&run->progress, st.local, st.pull_rate);
	}
}

static void mount_loop_opened(struct mount_run *run)
{
	struct mount_loop *l = run->l;
	struct far_error err = { 0 };

	if (run->job.result < 0) {
		run->code = cli_fail("cannot mount", &run->job.err);
		run->state = MOUNT_ENDED;
		return;
	}
	l->mnt = run->job.opened;
	run->state = MOUNT_SERVING;
	if (l->control && far_control_start(l->control, mount_control_cb, l, &err) < 0)
		cli_say("%s. status, flush and stop will not reach this mount", err.text);
	bool background = l->ready_fd >= 0;
	mount_announce(run);
	mount_show(run);
	if (background) {
		run->pulling = false;
		l->quiet = true;
		mount_leave_terminal();
	}
	mount_child_start(run);
}

static void mount_loop_finish(struct mount_run *run)
{
	struct mount_loop *l = run->l;

	far_mutex_lock(&l->lock);
	bool now = l->stop_now;
	far_mutex_unlock(&l->lock);
	if (run->progress.drawn)
		progress_end(&run->progress, NULL);
	run->pulling = false;
	run->state = MOUNT_FINISHING;
	if (now) { /* `stop --now`: what is dirty stays unsaved, by request */
		run->job.result = -ECANCELED;
		eventfd_write(run->job.done_fd, 1);
	} else {
		mount_job_start(run, "far-finish", mount_job_finish_cb);
	}
}

/* "1.5 MiB (1572864 bytes) ...": what was not saved and where it is now. */
static void mount_unsaved_text(const struct mount_loop *l, const struct far_status *st, char *buf, size_t n)
{
	uint64_t dirty = st->dirty;
	char size[24];

	if (l->keeps && st->lease == FAR_LEASE_FENCED)
		snprintf(buf, n, "%s (%" PRIu64 " bytes) are not on %.60s, which somebody else has taken over. They are kept in %.60s: "
			 "save them with 'farpage copy --dirty %.60s file:NEW'",
			 progress_size(size, sizeof size, dirty), dirty, l->source, l->local, l->local);
	else if (l->keeps)
		snprintf(buf, n, "%s (%" PRIu64 " bytes) are not on %.80s. They are kept in %.80s: mount it again to push them",
			 progress_size(size, sizeof size, dirty), dirty, l->source, l->local);
	else if (l->local)
		snprintf(buf, n, "%s (%" PRIu64 " bytes) are not on %.100s. They are in the local store %.100s, whose map is lost with this process",
			 progress_size(size, sizeof size, dirty), dirty, l->source, l->local);
	else
		snprintf(buf, n, "%s (%" PRIu64 " bytes) are not on %s and are lost with the local store in memory",
			 progress_size(size, sizeof size, dirty), dirty, l->source);
}

static void mount_loop_finished(struct mount_run *run)
{
	struct far_status st = FAR_STATUS_INIT;
	struct mount_loop *l = run->l;
	int r = run->job.result;
	char text[400] = "";

	far_mnt_status(l->mnt, &st);
	if (st.dirty)
		mount_unsaved_text(l, &st, text, sizeof text);
	if (r < 0 && r != -ECANCELED)
		cli_say("cannot flush %s: %s%s%s", l->conf.target, cli_strerror(r), st.dirty ? ". " : "", text);
	else if (st.dirty)
		cli_say("stopped %s without flushing: %s", l->conf.target, text);
	if (st.dirty || (r < 0 && r != -ECANCELED))
		run->code = CLI_UNSAVED;
	run->state = MOUNT_ENDED;
	far_mutex_lock(&l->lock);
	l->ended = true;
	l->end_code = r == -ECANCELED ? 0 : r;
	l->unsaved = st.dirty;
	snprintf(l->end_text, sizeof l->end_text, "%s", text);
	far_cond_broadcast(&l->changed);
	far_mutex_unlock(&l->lock);
}

/* Detach whatever is mounted on the target: the kernel drops it with our descriptor, but the path would stay broken. */
static void mount_detach(const char *target)
{
	char *const argv[] = { (char *)"fusermount3", (char *)"-u", (char *)"-z", (char *)"-q", (char *)target, NULL };
	extern char **environ;
	pid_t pid;

	if (umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW) == 0)
		return;
	if (posix_spawnp(&pid, argv[0], NULL, NULL, argv, environ) == 0)
		waitpid(pid, NULL, 0);
}

static _Noreturn void mount_loop_give_up(struct mount_run *run)
{
	struct far_status st = FAR_STATUS_INIT;
	struct mount_loop *l = run->l;
	char text[400];

	if (run->state == MOUNT_OPENING)
		cli_say("stopped by a second signal before %s was usable", l->conf.target);
	if (l->mnt) {
		far_mnt_status(l->mnt, &st);
		mount_unsaved_text(l, &st, text, sizeof text);
		cli_say("stopped %s by a second signal: %s", l->conf.target, st.dirty ? text : "nothing was unsaved");
		if (l->conf.socket)
			unlink(far_mnt_path(l->mnt));
		else
			mount_detach(l->conf.target);
	}
	_exit(CLI_SIGNAL);
}

static void mount_signal(struct mount_run *run, int sig)
{
	if (sig == SIGCHLD) {
		mount_child_reap(run);
		return;
	}
	if (!sig)
		return;
	if (run->child) { /* it is the command's to end; its end is ours */
		kill(run->child, sig);
		if (run->asked++ == 0)
			return;
	} else {
		run->asked++;
	}
	if (run->asked >= 2)
		mount_loop_give_up(run);
}

static bool mount_stop_asked(struct mount_loop *l)
{
	far_mutex_lock(&l->lock);
	bool asked = l->stop_asked;
	far_mutex_unlock(&l->lock);
	return asked;
}

static void mount_loop_step(struct mount_run *run)
{
	struct mount_loop *l = run->l;
	struct pollfd p[4] = { { .fd = run->signals, .events = POLLIN },
			       { .fd = run->job.done_fd, .events = POLLIN },
			       { .fd = l->wake_fd, .events = POLLIN },
			       { .fd = run->asked ? -1 : l->life_fd, .events = POLLIN } };
	int tick = !run->pulling ? 1000 : run->progress.tty ? 100 : 500;
	eventfd_t value;

	if (poll(p, 4, run->state == MOUNT_SERVING ? tick : -1) < 0 && errno != EINTR)
		return;
	if (p[0].revents)
		mount_signal(run, cli_signal_take(run->signals));
	if (p[2].revents)
		eventfd_read(l->wake_fd, &value);
	if (p[3].revents) /* the program that uses the file has gone */
		run->asked++;
	if (p[1].revents && eventfd_read(run->job.done_fd, &value) == 0) {
		far_thread_join(&run->job.thread);
		if (run->state == MOUNT_OPENING)
			mount_loop_opened(run);
		else
			mount_loop_finished(run);
	}
	if (run->state != MOUNT_SERVING)
		return;
	mount_tick(run);
	if ((run->asked && !run->child) || mount_stop_asked(l))
		mount_loop_finish(run);
	else if (far_mnt_ended(l->mnt, far_now()))
		mount_loop_finish(run);
}

int mount_loop_run(struct mount_loop *l)
{
	struct mount_run run = { .l = l, .moved_at = far_now(), .signals = cli_signals(l->run != NULL) };

	run.job.l = l;
	run.job.done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	l->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (run.signals < 0 || run.job.done_fd < 0 || l->wake_fd < 0) {
		cli_say("cannot mount on %s: no descriptors are left: %s", l->conf.target, far_strerror(errno));
		return CLI_FAILED;
	}
	far_mutex_init(&l->lock);
	far_cond_init(&l->changed);
	mount_job_start(&run, "far-open", mount_job_open_cb);
	while (run.state != MOUNT_ENDED)
		mount_loop_step(&run);
	if (run.child) /* `farpage stop` while --run's command still runs: it loses the file */
		kill(run.child, SIGTERM);
	far_control_close(l->control);
	l->control = NULL;
	far_mnt_close(l->mnt);
	far_cond_fini(&l->changed);
	far_mutex_fini(&l->lock);
	far_fd_close(&run.job.done_fd);
	far_fd_close(&l->wake_fd);
	close(run.signals);
	return run.code;
}
