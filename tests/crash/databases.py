#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""databases.py FARPAGE [KILLS] [--seed N] [--seconds N] [--only NAME]: databases on a managed mount whose mount, server
and link die. What the database said was committed is there afterwards: here, and on the server once all is pushed.

  sqlite on the file   the region is the database, its journal is a file beside it
  sqlite in ext4       in a file system made in the region, on a loop device
  PostgreSQL in ext4   the same, under pgbench, with clients of our own that note each commit
"""
import argparse
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback

from rig import (SLOW, Disk, Link, Rig, Skip, detach, ends_on_sigterm, loops_of, mounts_under, need_fuse, need_root,
                 options_of, port_of, say, tell, true, wait_for)

SQLITE = '''
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
# In DELETE mode the commit is the journal's end, and FULL does not sync its directory: the manual of sqlite says so.
db.execute('PRAGMA synchronous=' + ('EXTRA' if sys.argv[3] == 'DELETE' else 'FULL'))
db.execute('PRAGMA journal_mode=' + sys.argv[3])
note = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
n = db.execute('SELECT coalesce(max(n), 0) FROM t').fetchone()[0]
while True:
    db.execute('BEGIN IMMEDIATE')
    rows = [(n + k + 1, os.urandom(200 + (n + k) % 900)) for k in range(1 + n % 3)]
    db.executemany('INSERT INTO t(n, v) VALUES(?, ?)', rows)
    db.execute('UPDATE last SET n = ?', (rows[-1][0],))
    db.execute('COMMIT')
    n = rows[-1][0]
    os.write(note, b'%d\\n' % n)
'''


class Sqlite:
    """Rows with rising numbers; each commit is noted in a file outside."""

    def __init__(self, w):
        self.w = w
        self.note = w.path('committed')
        open(self.note, 'w').close()
        self.p = None

    def sql(self, db, text):
        return tell(['sqlite3', '-batch', '-init', '/dev/null', '-cmd', '.timeout 10000', db, text], 60)

    def make(self, db):
        self.sql(db, 'PRAGMA page_size=4096; CREATE TABLE t(n INTEGER PRIMARY KEY, v BLOB); '
                     'CREATE TABLE last(n INTEGER); INSERT INTO last VALUES(0)')

    def committed(self):
        with open(self.note) as f:
            lines = f.read().split()
        return int(lines[-1]) if lines else 0

    def start(self, db):
        self.err = open(self.w.path('sqlite.err'), 'w+')
        mode = self.w.rng.choice(self.modes)
        self.p = subprocess.Popen([sys.executable, '-c', SQLITE, db, self.note, mode], stdin=subprocess.DEVNULL,
                                  stdout=self.err, stderr=self.err)

    def ended(self):
        if self.p.poll() is None:
            return None
        self.err.seek(0)
        return 'the program that uses sqlite ended with %s: %s' % (self.p.returncode, self.err.read()[-1500:])

    def kill(self):
        self.p.kill()
        self.p.wait(30)

    def verify(self, db, where):
        want = self.committed()
        out = self.sql(db, 'PRAGMA integrity_check; SELECT count(*), coalesce(max(n), 0), (SELECT n FROM last) FROM t')
        true(out.startswith('ok\n'), '%s: integrity_check: %s' % (where, out[:1000]))
        count, most, last = [int(x) for x in out.split('\n')[1].split('|')]
        true(count == most == last, '%s: %d rows, the last is %d, noted is %d' % (where, count, most, last))
        true(want <= most <= want + 3, '%s: committed were %d rows, there are %d' % (where, want, most))


class SqliteOnFile(Sqlite):
    """The region is the database. Its size is fixed, so the file has room in free pages from the start."""
    name = 'sqlite on the file'
    mib = 32
    modes = ('DELETE', 'TRUNCATE', 'PERSIST')

    def prepare(self):
        w = self.w
        self.make(w.path('there/remote.img'))
        self.sql(w.path('there/remote.img'), 'CREATE TABLE pad(v); INSERT INTO pad VALUES(zeroblob(%d)); DROP TABLE pad'
                 % (self.mib << 20))
        os.mkdir(w.path('db'))
        open(w.path('db/app.db'), 'w').close()
        w.target = 'db/app.db'

    def begin(self):
        pass

    def go(self):
        self.start(self.w.path('db/app.db'))

    def dead(self):
        self.kill()

    def back(self):
        self.verify(self.w.path('db/app.db'), 'here')

    def leave(self):
        self.kill()
        self.back()

    def verify_copy(self, image):
        shutil.copyfile(image, self.w.path('copy.db'))
        if os.path.exists(self.w.path('db/app.db-journal')):
            shutil.copyfile(self.w.path('db/app.db-journal'), self.w.path('copy.db-journal'))
        self.verify(self.w.path('copy.db'), 'on the server')
        for name in ('copy.db', 'copy.db-journal'):
            if os.path.exists(self.w.path(name)):
                os.unlink(self.w.path(name))


class InExt4:
    """A file system in the region, on a loop device."""

    def prepare_fs(self):
        need_root()
        w = self.w
        with open(w.path('there/remote.img'), 'wb') as f:
            f.truncate(self.mib << 20)
        for d in ('m', 'fs', 'copyfs'):
            os.mkdir(w.path(d))
        w.target = 'm'

    def make_fs(self):
        tell(['mkfs.ext4', '-q', '-F', '-J', 'size=4', '-E', 'lazy_itable_init=0,lazy_journal_init=0', self.w.file])
        self.mount_fs()

    def mount_fs(self):
        dio = ['--direct-io=on'] if self.w.rng.random() < 0.3 else []
        try:
            device = tell(['losetup', '-f', '--show', *dio, self.w.file], 60).strip()
        except AssertionError as e:
            raise Skip('no loop device: %s' % e) from None
        tell(['mount', '-t', 'ext4', device, self.w.path('fs')], 60 * SLOW)

    def drop_fs(self):
        """It is dead below: nothing can be written any more."""
        tell(['umount', '-l', self.w.path('fs')], 60)
        for d in loops_of(self.w.path('m')):
            true(detach(d, 30), '%s cannot be freed' % d)

    def leave_fs(self):
        tell(['umount', self.w.path('fs')], 60 * SLOW)
        for d in loops_of(self.w.path('m')):
            true(detach(d, 30), '%s cannot be freed' % d)

    def with_copy(self, image, fn):
        """A copy of the server's bytes, mounted as after a crash of that host."""
        copy = self.w.path('copy.img')
        tell(['cp', '--sparse=always', image, copy], 60)
        device = tell(['losetup', '-f', '--show', copy]).strip()
        try:
            tell(['mount', '-t', 'ext4', device, self.w.path('copyfs')], 60)
            try:
                fn(self.w.path('copyfs'))
            finally:
                tell(['umount', self.w.path('copyfs')], 60)
        finally:
            detach(device)
            os.unlink(copy)


class SqliteInExt4(Sqlite, InExt4):
    name = 'sqlite in ext4'
    mib = 64
    modes = ('DELETE', 'TRUNCATE', 'PERSIST', 'WAL')

    def prepare(self):
        self.prepare_fs()

    def begin(self):
        self.make_fs()
        self.make(self.w.path('fs/app.db'))

    def go(self):
        self.start(self.w.path('fs/app.db'))

    def dead(self):
        self.kill()
        self.drop_fs()

    def back(self):
        self.mount_fs()
        self.verify(self.w.path('fs/app.db'), 'here')

    def leave(self):
        self.kill()
        self.verify(self.w.path('fs/app.db'), 'here')
        self.leave_fs()

    def verify_copy(self, image):
        self.with_copy(image, lambda fs: self.verify(fs + '/app.db', 'on the server'))


class Postgres(InExt4):
    """The cluster is in the region. Three psql insert numbered rows, each a transaction of its own whose answer is in
    their output; pgbench runs beside them, its log has a line for each transaction it saw committed."""
    name = 'PostgreSQL in ext4'
    mib = 256
    CLIENTS = 3

    def __init__(self, w):
        self.w = w
        self.running = []
        self.server = None
        self.rows = [0] * self.CLIENTS
        self.outs = [None] * self.CLIENTS
        self.logged = 0

    def prepare(self):
        need_root()
        found = sorted(x for x in os.listdir('/usr/lib/postgresql')) if os.path.isdir('/usr/lib/postgresql') else []
        found = [x for x in found if os.path.exists('/usr/lib/postgresql/%s/bin/postgres' % x)]
        if not found:
            raise Skip('PostgreSQL is not installed (apt-get install postgresql)')
        self.bin = '/usr/lib/postgresql/%s/bin/' % found[-1]
        try:
            self.user = pwd.getpwnam('postgres')
        except KeyError:
            raise Skip('there is no user postgres to run it as') from None
        os.chmod(self.w.dir, 0o711)
        self.prepare_fs()
        self.run_dir = self.w.path('run')
        os.mkdir(self.run_dir)
        os.chown(self.run_dir, self.user.pw_uid, self.user.pw_gid)
        self.env = dict(os.environ, PGHOST=self.run_dir, PGUSER='postgres', PGDATABASE='postgres', LC_ALL='C.UTF-8',
                        HOME=self.run_dir)
        self.env.pop('LD_PRELOAD', None)

    def as_user(self, *argv):
        return ['setpriv', '--reuid=%d' % self.user.pw_uid, '--regid=%d' % self.user.pw_gid, '--clear-groups', *argv]

    def make_cluster(self, fs):
        os.mkdir(fs + '/pg')
        os.chown(fs + '/pg', self.user.pw_uid, self.user.pw_gid)
        os.chmod(fs + '/pg', 0o700)
        tell(self.as_user(self.bin + 'initdb', '-D', fs + '/pg', '-N', '--wal-segsize=4', '-A', 'trust', '-E', 'UTF8',
                          '--locale=C.UTF-8'), 120 * SLOW, env=self.env, cwd=self.run_dir)
        with open(fs + '/pg/postgresql.conf', 'a') as f:
            f.write("\nlisten_addresses = ''\nunix_socket_directories = '%s'\nshared_buffers = 16MB\n"
                    'max_wal_size = 64MB\nmin_wal_size = 16MB\nsynchronous_commit = on\nfsync = on\n'
                    'max_connections = 30\nautovacuum = off\nlogging_collector = off\n' % self.run_dir)
        tell(['sync', '-f', fs], 120 * SLOW)

    def begin(self):
        self.make_fs()
        self.make_cluster(self.w.path('fs'))
        self.start_server(self.w.path('fs'))
        self.psql('CREATE TABLE noted(client int, n int, pad text); CREATE INDEX ON noted(client, n)')
        tell(self.as_user(self.bin + 'pgbench', '-i', '-q', '-s', '1'), 120 * SLOW, env=self.env, cwd=self.run_dir)

    def psql(self, text):
        return tell(self.as_user(self.bin + 'psql', '-X', '-q', '-At', '-v', 'ON_ERROR_STOP=1', '-c', text), 120 * SLOW,
                    env=self.env, cwd=self.run_dir)

    def start_server(self, fs):
        self.log = open(self.w.path('postgres.log'), 'a+')
        self.server = subprocess.Popen(self.as_user(self.bin + 'postgres', '-D', fs + '/pg'), env=self.env,
                                       cwd=self.run_dir, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        wait_for(self.ready, 'PostgreSQL that answers', 120 * SLOW)

    def ready(self):
        true(self.server.poll() is None, 'PostgreSQL ended with %s: %s' % (self.server.returncode, self.tail()))
        return subprocess.run(self.as_user(self.bin + 'pg_isready', '-q'), env=self.env, cwd=self.run_dir,
                              timeout=60).returncode == 0

    def tail(self):
        self.log.seek(0)
        return self.log.read()[-3000:]

    def go(self):
        self.running = []
        for c in range(self.CLIENTS):
            script = self.w.path('insert.%d.sql' % c)
            with open(script, 'w') as f:
                for n in range(self.rows[c] + 1, self.rows[c] + 20001):
                    f.write("INSERT INTO noted VALUES (%d, %d, repeat('x', %d));\n" % (c, n, n % 700))
            os.chmod(script, 0o644)
            self.outs[c] = self.w.path('insert.%d.out' % c)
            out = open(self.outs[c], 'w')
            self.running.append(subprocess.Popen(
                self.as_user('stdbuf', '-oL', self.bin + 'psql', '-X', '-v', 'ON_ERROR_STOP=1', '-f', script),
                env=self.env, cwd=self.run_dir, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT))
            out.close()
        self.bench_out = open(self.w.path('pgbench.out'), 'w+')
        self.running.append(subprocess.Popen(
            self.as_user(self.bin + 'pgbench', '-n', '-c', '2', '-T', '600', '-l', '--log-prefix=bench'), env=self.env,
            cwd=self.run_dir, stdin=subprocess.DEVNULL, stdout=self.bench_out, stderr=self.bench_out))

    def acknowledged(self, c):
        """How many of this run's rows psql has said INSERT 0 1 for. A line that was cut off does not count."""
        if not self.outs[c]:
            return 0
        with open(self.outs[c], errors='replace') as f:
            return f.read().count('INSERT 0 1\n')

    def committed(self):
        return sum(self.rows[c] + self.acknowledged(c) for c in range(self.CLIENTS))

    def ended(self):
        if self.server.poll() is not None:
            return 'PostgreSQL ended with %s: %s' % (self.server.returncode, self.tail())
        for p in self.running:
            if p.poll() is not None:
                with open(self.outs[0]) as f:
                    out = f.read()[-500:]
                self.bench_out.seek(0)
                return 'a client of PostgreSQL ended with %s: %s %s %s' % (
                    p.returncode, out, self.bench_out.read()[-1000:], self.tail())
        return None

    def family(self):
        """The postmaster's children."""
        found = []
        for pid in os.listdir('/proc'):
            try:
                with open('/proc/%s/stat' % pid) as f:
                    if int(f.read().rsplit(')', 1)[1].split()[1]) == self.server.pid:
                        found.append(int(pid))
            except (OSError, ValueError, IndexError):
                pass
        return found

    def stop_clients(self):
        for p in self.running:
            p.terminate()
        for p in self.running:
            try:
                p.wait(20)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait(20)
        self.running = []
        for name in os.listdir(self.run_dir):
            if name.startswith('bench.'):
                with open(self.run_dir + '/' + name) as f:
                    self.logged += f.read().count('\n')
                os.unlink(self.run_dir + '/' + name)

    def kill(self):
        """Everything of it, as when the host dies."""
        if self.server and self.server.poll() is None:
            self.server.send_signal(signal.SIGSTOP)
            children = self.family()
            self.server.kill()
            for pid in children:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self.server.wait(30)
            wait_for(lambda: not any(self.lives(pid) for pid in children), 'the end of the backends', 60)
        self.stop_clients()

    @staticmethod
    def lives(pid):
        try:
            with open('/proc/%d/stat' % pid) as f:
                return f.read().rsplit(')', 1)[1].split()[0] != 'Z'
        except OSError:
            return False

    def dead(self):
        self.kill()
        self.drop_fs()

    def verify(self, where):
        for c in range(self.CLIENTS):
            want = self.rows[c] + self.acknowledged(c)
            self.outs[c] = None
            out = self.psql('SELECT count(DISTINCT n), coalesce(max(n), 0) FROM noted WHERE client = %d' % c)
            count, most = [int(x) for x in out.split('|')]
            true(count == most, '%s: client %d: %d rows, the last is %d' % (where, c, count, most))
            true(want <= most <= want + 1,
                 '%s: client %d: committed were %d rows, there are %d' % (where, c, want, most))
            self.rows[c] = most
        a, t, b, h, n = [int(x) for x in self.psql(
            'SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), (SELECT '
            'sum(bbalance) FROM pgbench_branches), coalesce(sum(delta), 0), count(*) FROM pgbench_history').split('|')]
        true(a == t == b == h, '%s: the sums of pgbench differ: %d %d %d %d' % (where, a, t, b, h))
        true(n >= self.logged, '%s: pgbench saw %d commits, there are %d' % (where, self.logged, n))

    def back(self):
        self.mount_fs()
        self.start_server(self.w.path('fs'))
        self.verify('here')

    def stop_server(self):
        self.server.send_signal(signal.SIGINT)
        self.server.wait(120 * SLOW)

    def leave(self):
        self.stop_clients()
        self.verify('here')
        self.stop_server()
        self.leave_fs()

    def verify_copy(self, image):
        def look(fs):
            self.start_server(fs)
            self.verify('on the server')
            self.stop_server()
        self.with_copy(image, look)


class Bench(Rig):
    """A server, a link, a mount, and a database on it."""

    def __init__(self, kind, durable, rng, can):
        super().__init__()
        self.durable, self.rng, self.can = durable, rng, can
        self.app = kind(self)
        self.server = self.m = self.link = self.port = self.disk = None
        self.kills = 0

    def begin(self):
        if os.geteuid() == 0:
            self.disk = Disk(self, 'there', 2 * self.app.mib + 48)
        else:
            os.mkdir(self.path('there'))
        self.app.prepare()
        if self.disk:
            tell(['sync', '-f', self.disk.dir])
        self.start_server()
        self.link = Link(self, self.port)
        self.start_mount()
        self.persisted = len([x for x in os.listdir(self.dir) if x.startswith('cache.img')]) > 1
        self.app.begin()

    def close(self):
        for p in (self.app.p,) if isinstance(self.app, Sqlite) else ():
            if p and p.poll() is None:
                p.kill()
        if isinstance(self.app, Postgres) and self.app.server:
            try:
                self.app.kill()
            except Exception as e:  # the rest has to go all the same
                say('PostgreSQL could not be ended: %s' % e)
        super().close()

    def start_server(self):
        more = ['--lease', '2s'] if '--lease' in self.can['serve'] else []
        self.server = self.start('serve', 'file:there/remote.img', '--listen',
                                 'grpc://127.0.0.1:%d' % (self.port or 0), *more)
        self.port = port_of(self.server.line().split()[1])

    def start_mount(self):
        end = time.monotonic() + 40 * SLOW
        while True:
            self.m = self.start('mount', 'grpc://127.0.0.1:%d' % self.link.here, self.target, '--mode', 'managed',
                                '--local', 'file:cache.img', '--durable', self.durable, '--quiet',
                                '--push-interval', '100ms')
            try:
                self.file = self.m.line()
                return
            except AssertionError as e:
                self.forget(self.m)
                if 'lease' not in str(e) or time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def alive(self):
        for name, r in (('the mount', self.m), ('the server', self.server)):
            if r and r.p.poll() is not None:
                raise AssertionError('%s ended by itself with %s: %s' % (name, r.p.returncode, r.err()))
        return True

    def commits(self, more, what, seconds=90):
        """Wait until so many more are committed; the database must not have heard of anything."""
        n = self.app.committed()

        def enough():
            bad = self.app.ended()
            true(not bad, bad)
            return self.alive() and self.app.committed() >= n + more
        wait_for(enough, 'commits ' + what, seconds)

    def soon(self, most=0.4):
        time.sleep(self.rng.random() ** 2 * most)

    def kill_mount(self):
        self.kill(self.m)
        self.m = None
        self.kills += 1
        self.app.dead()
        for m in mounts_under(self.path(self.target)):
            tell(['umount', '-l', m])
        if not self.persisted:
            for name in os.listdir(self.dir):
                if name.startswith('cache.img'):
                    os.unlink(self.path(name))

    def kill_server(self):
        self.kill(self.server)
        self.server = None
        self.kills += 1

    def power(self):
        """The server's host loses it: what was not flushed there is gone."""
        if self.disk:
            self.disk.cut()

    def strike(self, what):
        self.app.go()
        self.commits(15, 'at first')
        self.soon()
        if what == 'mount':
            self.kill_mount()
            if self.durable == 'remote' and not isinstance(self.app, Postgres):
                self.app.verify_copy(self.path('there/remote.img'))
            self.start_mount()
            self.app.back()
        elif what in ('both', 'power there and mount'):
            self.kill_server()
            self.kill_mount()
            if what != 'both':
                self.power()
            self.start_server()
            self.start_mount()
            self.app.back()
        elif what in ('server', 'power there'):
            self.kill_server()
            if what != 'server':
                self.power()
            self.soon()
            self.start_server()
            self.commits(15, 'with the new server')
        elif what == 'link':
            self.rng.choice([self.link.cut, self.link.silence])()
            self.kills += 1
            if self.durable == 'local':
                self.commits(15, 'without a link')
            self.soon(1.5)
            self.link.up()
            self.commits(15, 'with the new link')
        elif what == 'offline':
            self.all_kept()
            self.rng.choice([self.link.cut, self.link.silence])()
            self.commits(15, 'without a link')
            self.kill_mount()
            self.start_mount()
            self.app.back()
            self.app.go()
            self.commits(15, 'offline, after the restart')
            self.link.up()
            self.commits(15, 'with the new link')
        else:
            raise KeyError(what)
        if what in ('server', 'power there', 'link', 'offline'):
            self.app.kill() if isinstance(self.app, Sqlite) else self.app.stop_clients()
            self.app.verify(*self.here())

    def all_kept(self):
        """Offline there is what the map knew when the mount was killed."""
        def all_of_it():
            m = self.status_map('cache.img.farmap')
            return m['local_chunks'] * m['chunk'] >= m['size']
        wait_for(all_of_it, 'the map to know that all is local', 60)

    def here(self):
        return ('here',) if isinstance(self.app, Postgres) else (self.path(
            'db/app.db' if isinstance(self.app, SqliteOnFile) else 'fs/app.db'), 'here')

    def finish(self):
        self.app.leave()
        wait_for(lambda: self.alive() and self.status(self.file)['dirty'] == 0, 'the end of the push', 90)
        self.run('stop', self.file, code=0, timeout=180)
        code = self.m.p.wait(60)
        true(code == 0, 'the mount ended with %d: %s' % (code, self.m.err()))
        self.m = None
        true(self.server.end() == 0, 'the server: ' + self.server.err())
        self.server = None
        self.app.verify_copy(self.path('there/remote.img'))


def one(name, kind, durable, strikes, rng, can, base, deadline):
    """(strikes that were made, whether all was well)."""
    w = Bench(kind, durable, rng, can)
    n = 0
    began = time.monotonic()
    label = '%s, durable %s' % (kind.name, durable)
    try:
        try:
            w.begin()
        except Skip as e:
            print('ok %d - %s # SKIP %s' % (base + 1, label, e), flush=True)
            return 1, True
        for what in strikes:
            n += 1
            if not w.persisted and durable == 'local' and what not in ('server', 'link'):
                print('ok %d - %s: %s # SKIP the chunk map is in memory' % (base + n, label, what), flush=True)
            elif what.startswith('power') and not w.disk:
                print('ok %d - %s: %s # SKIP a disk that loses power needs root' % (base + n, label, what), flush=True)
            else:
                w.strike(what)
                print('ok %d - %s: %s (%.1f s)' % (base + n, label, what, time.monotonic() - began), flush=True)
            began = time.monotonic()
            if time.monotonic() > deadline:
                break
        n += 1
        w.finish()
        print('ok %d - %s: all is on the server, %d commits' % (base + n, label, w.app.committed()), flush=True)
        return n, True
    except Exception:
        for line in traceback.format_exc().splitlines():
            print('# ' + line)
        for r in w.running:
            say('%s: exit %s, err: %s' % (' '.join(r.p.args[1:]), r.p.poll(), r.err()[-2000:].replace('\n', '\n#   ')))
        print('not ok %d - %s: %s' % (base + max(n, 1), label, strikes[min(max(n, 1), len(strikes)) - 1]), flush=True)
        return max(n, 1), False
    finally:
        w.close()


SHORT = [
    (SqliteOnFile, 'remote', ['mount', 'server', 'link', 'power there and mount', 'power there']),
    (SqliteInExt4, 'remote', ['mount', 'power there', 'link', 'both', 'power there and mount']),
    (SqliteInExt4, 'local', ['link', 'offline', 'power there']),
    (Postgres, 'remote', ['mount', 'server', 'link', 'power there and mount', 'power there']),
]


def main():
    a = argparse.ArgumentParser()
    a.add_argument('farpage')
    a.add_argument('kills', type=int, nargs='?', default=5, help='up to 5: each setting once, with 3 to 5 kills')
    a.add_argument('--seed', type=int, default=0)
    a.add_argument('--seconds', type=float, default=1e9)
    a.add_argument('--only', default='')
    args = a.parse_intermixed_args()
    seed = args.seed or int(os.environ.get('FARPAGE_SEED', '0')) or random.SystemRandom().getrandbits(31)
    say('--seed %d' % seed)
    try:
        need_fuse()
        if not shutil.which('sqlite3'):
            raise Skip('sqlite3 is not installed')
    except Skip as e:
        print('SKIP: %s' % e)
        sys.exit(77)
    can = {verb: options_of(verb) for verb in ('mount', 'serve')}
    began = time.monotonic()
    deadline = began + args.seconds
    n, kills, good, k = 0, 0, True, 0
    plan = [s for s in SHORT if args.only in s[0].name]
    # KILLS up to 5: the plan once.
    while good and time.monotonic() < deadline and (k < len(plan) or 5 < args.kills > kills):
        rng = random.Random('%d %d' % (seed, k))
        kind, durable, strikes = plan[k % len(plan)]
        if k >= len(plan):
            durable = rng.choice(['remote', 'remote', 'local'])
            kinds = ['mount', 'mount', 'server', 'link', 'both', 'power there', 'power there and mount']
            kinds += ['offline'] * 2 if durable == 'local' else []
            strikes = [rng.choice(kinds) for _ in range(6)]
        ran, good = one(kind.name, kind, durable, strikes, rng, can, n, deadline)
        kills += ran - 1
        n += ran
        k += 1
    print('1..%d' % n)
    say('%d kills in %.0f s, --seed %d' % (kills, time.monotonic() - began, seed))
    sys.exit(0 if good else 1)


ends_on_sigterm()
main()
