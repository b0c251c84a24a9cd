#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""crash.py FARPAGE WORKER [ROUNDS] [--seed N] [--seconds N]: kill the mount, the server, the link or the power under
load, start again, and compare every sector with what fsync had promised (worker.c says how).

A setting (where fsync's promise lies, evictions, a round trip ...) lives for some rounds; then the mount is stopped in
order and the server's own file is compared as well. FARPAGE in the environment replaces the first argument."""
import argparse
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import traceback

from rig import (SLOW, Disk, Link, Rig, Skip, ends_on_sigterm, need_fuse, options_of, port_of,
                 say, true, wait_for)

SECTORS = 16384  # 8 MiB
COUNTERS = ('writes', 'flushes', 'failed_writes', 'failed_flushes', 'reads', 'failed_reads')


class Setting:
    """What stays the same for some rounds."""

    def __init__(self, name, rounds, durable='remote', disk=False, link=False, mount=(), rtt='1ms', how='mixed'):
        self.name, self.rounds, self.durable, self.disk, self.link = name, rounds, durable, disk, link
        self.mount, self.rtt, self.how = mount, rtt, how


# The short run: each round names what is struck.
SHORT = [
    Setting('plain', ['mount', 'server', 'both', 'mount twice'], rtt='5ms'),
    Setting('durable local', ['mount', 'both', 'offline', 'server'], durable='local',
            mount=('--push-interval', '30ms')),
    Setting('evicting', ['mount', 'lost', 'both', 'server'], mount=('--local-max', '2M', '--push-interval', '50ms')),
    Setting('power, durable local', ['power here', 'power there', 'power on both'], durable='local', disk=True,
            mount=('--push-interval', '20ms')),
    Setting('power', ['power here', 'power there', 'power there and mount'], disk=True, rtt='2ms',
            mount=('--push-interval', '20ms')),
    Setting('link', ['the dead write', 'link'], link=True, rtt='0ms', mount=('--push-interval', '20ms')),
]


def random_setting(rng):
    durable = rng.choice(['remote', 'local'])
    kinds = ['mount', 'server', 'both', 'mount', 'server twice', 'mount twice']
    disk, link = rng.random() < 0.4, rng.random() < 0.3
    mount = ['--push-interval', rng.choice(['10ms', '50ms', '300ms', '1s'])]
    if rng.random() < 0.4:
        mount += ['--local-max', rng.choice(['1M', '2M', '4M'])]
    if rng.random() < 0.3:
        mount += ['--chunk', rng.choice(['4K', '16K', '256K', '1M'])]
    if rng.random() < 0.2:
        mount += ['--max-partial', rng.choice(['1', '8'])]
    if rng.random() < 0.2:
        mount += ['--dirty-max', rng.choice(['256K', '1M'])]
    if rng.random() < 0.2:
        mount += ['--pull-workers', '0']
    kinds += ['lost'] if durable == 'remote' else ['offline', 'offline']
    if disk:
        kinds += ['power here', 'power there', 'power on both', 'power there and mount'] * 2
    if link:
        kinds += ['the dead write', 'link'] * 3
    return Setting('random', [rng.choice(kinds) for _ in range(rng.randint(4, 8))], durable, disk, link, tuple(mount),
                   rng.choice(['0ms', '1ms', '5ms', '20ms']), rng.choice(['mixed', 'direct', 'buffered']))


class Crash(Rig):
    """One setting at work."""

    def __init__(self, setting, rng, can):
        super().__init__()
        self.s, self.rng, self.can = setting, rng, can
        self.link = self.port = self.server = self.m = self.worker = None
        self.disks = {}
        self.lost = self.kills = 0
        self.totals = dict.fromkeys(COUNTERS, 0)

    # Setting up and taking apart

    def begin(self):
        for name in ('here', 'there'):
            if self.s.disk:
                self.disks[name] = Disk(self, name, 48)
            else:
                os.mkdir(self.path(name))
        os.mkdir(self.path('m'))
        self.work('init', 'there/remote.img', str(SECTORS), str(self.rng.getrandbits(48)))
        self.ledger = open(self.path('ledger'), 'rb')
        self.view = mmap.mmap(self.ledger.fileno(), 4096, access=mmap.ACCESS_READ)
        if self.s.disk:
            os.sync()
        self.start_server()
        if self.s.link:
            self.link = Link(self, self.port)
        self.start_mount()
        self.persisted = len(self.local_files()) > 1

    def close(self):
        if self.worker and self.worker.poll() is None:
            self.worker.kill()
        super().close()

    def work(self, verb, *args, seconds=60):
        """Run the worker; its output. Exit 1: it found something wrong."""
        p = subprocess.run([WORKER, verb, 'ledger'] + list(args), cwd=self.dir, stdin=subprocess.DEVNULL,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors='replace', timeout=seconds * SLOW)
        if p.returncode and not (p.returncode == 3 and 'offline' in args):
            raise AssertionError('%s: %s' % (' '.join([verb] + list(args)), p.stdout))
        return p.stdout

    def start_server(self):
        listen = 'grpc://127.0.0.1:%d' % (self.port or 0)
        more = ['--lease', '2s'] if '--lease' in self.can['serve'] else []
        self.server = self.start('serve', 'file:there/remote.img', '--listen', listen, *more)
        self.port = port_of(self.server.line().split()[1])

    def start_mount(self, *more, seconds=40, wait=True):
        """Who comes with another id waits until the lease of the one before has run out."""
        port = self.link.here if self.link else self.port
        args = ['mount', 'grpc://127.0.0.1:%d' % port, 'm', '--mode', 'managed', '--local', 'file:here/cache.img',
                '--layer', 'delay:rtt=' + self.s.rtt, '--durable', self.s.durable, '--quiet', *self.s.mount, *more]
        end = time.monotonic() + seconds * SLOW
        while True:
            self.m = self.start(*args)
            if not wait:
                return
            try:
                self.file = self.m.line()
                return
            except AssertionError as e:
                busy = 'lease' in str(e) and time.monotonic() < end
                self.forget(self.m)
                if not busy:
                    raise
                time.sleep(0.2)

    # The load

    def counters(self):
        raw = self.view[24:24 + 8 * len(COUNTERS)]
        return {c: int.from_bytes(raw[8 * i:8 * i + 8], 'little') for i, c in enumerate(COUNTERS)}

    def load(self, flushes=1):
        """Start it and wait until it is well under way."""
        was = self.counters()
        threads = self.rng.choice([1, 2, 4, 4, 8])
        self.out = open(self.path('worker.out'), 'w+')
        self.worker = subprocess.Popen([WORKER, 'load', 'ledger', self.file, str(threads),
                                        str(self.rng.getrandbits(40)), self.s.how], cwd=self.dir, stdout=self.out,
                                       stderr=subprocess.STDOUT)
        self.alive()
        wait_for(lambda: self.alive() and self.counters()['writes'] > was['writes'] + 50, 'writes', 60)
        wait_for(lambda: self.alive() and self.counters()['flushes'] >= was['flushes'] + flushes, 'a flush', 60)
        self.was = was

    def flushes(self, what, more=2):
        n = self.counters()['flushes'] + more
        wait_for(lambda: self.alive() and self.counters()['flushes'] >= n, 'flushes ' + what, 90)

    def alive(self):
        """Nothing that was not killed may have ended."""
        for name, r in (('the mount', self.m), ('the server', self.server)):
            if r and r.p.poll() is not None:
                raise AssertionError('%s ended by itself with %s: %s' % (name, r.p.returncode, r.err()))
        if self.worker and self.worker.poll() is not None:
            self.out.seek(0)
            raise AssertionError('the worker ended with %s: %s' % (self.worker.returncode, self.out.read()[-2000:]))
        return True

    def unload(self, stop=False, errors_ok=True):
        """The load has ended, because the file is gone or because we ask."""
        if stop:
            self.worker.send_signal(signal.SIGTERM)
        try:
            code = self.worker.wait(60 * SLOW)
        except subprocess.TimeoutExpired:
            raise AssertionError('the load hangs: deadlines of the mount are over long ago') from None
        self.out.seek(0)
        text = self.out.read()
        self.out.close()
        self.worker = None
        true(code == 0, 'the load found something wrong (%d): %s' % (code, text[-2000:]))
        now = self.counters()
        for c in COUNTERS:
            self.totals[c] += now[c] - self.was[c]
        bad = sum(now[c] - self.was[c] for c in COUNTERS if c.startswith('failed'))
        true(errors_ok or not bad, 'the program heard of an outage that was shorter than the deadline: ' + text[-2000:])

    def soon(self, most=0.3):
        """Some moment."""
        time.sleep(self.rng.random() ** 2 * most)

    # Striking

    def kill_mount(self):
        self.kill(self.m)
        self.m = None
        self.kills += 1

    def kill_server(self):
        self.kill(self.server)
        self.server = None
        self.kills += 1

    def local_files(self):
        return [x for x in os.listdir(self.path('here')) if x != 'lost+found']

    def lose_local(self):
        for name in self.local_files():
            os.unlink(self.path('here/' + name))

    def clean_up(self):
        """After the mount's end: the load has to notice, the path has to be free again."""
        self.unload()
        self.clear_mount()

    def clear_mount(self):
        self.umount('m')
        if not self.persisted:
            self.lose_local()

    def compare(self, *more):
        """What is in the file now; once it is flushed nothing else may ever come."""
        out = self.work('check', self.file, *more)
        self.lost += int(out.split()[-1])
        if ' absent 0 ' in out:
            self.flush()
            self.work('settle')
            if self.s.durable == 'remote':
                self.work('check', 'there/remote.img')

    def flush(self):
        wait_for(lambda: self.alive() and subprocess.run([WORKER, 'flush', 'ledger', self.file], cwd=self.dir,
                                                         stdout=subprocess.DEVNULL, timeout=60 * SLOW).returncode == 0,
                 'a flush that succeeds', 90)

    def strike(self, what):
        getattr(self, 'r_' + what.replace(' ', '_'))()

    def r_mount(self):
        self.load()
        self.soon()
        self.kill_mount()
        self.clean_up()
        self.start_mount()
        self.compare()

    def r_mount_twice(self):
        """It dies again while it finds its feet."""
        self.load()
        self.soon()
        self.kill_mount()
        self.clean_up()
        for _ in range(2):
            self.start_mount(wait=False)
            time.sleep(self.rng.random() * 0.25 * SLOW)
            self.kill_mount()
            self.clear_mount()
        self.start_mount()
        self.compare()

    def r_server(self, errors_ok=False):
        self.load()
        self.soon()
        self.kill_server()
        self.soon(0.2)
        self.start_server()
        self.flushes('with the new server')
        self.unload(stop=True, errors_ok=errors_ok)
        self.compare()

    def r_server_twice(self):
        self.load()
        for _ in range(2):
            self.soon()
            self.kill_server()
            self.start_server()
        self.soon()
        self.unload(stop=True, errors_ok=False)
        self.compare()

    def r_both(self):
        self.load()
        self.soon()
        for kill in self.rng.sample([self.kill_mount, self.kill_server], 2):
            kill()
        self.clean_up()
        self.start_server()
        self.start_mount()
        self.compare()

    def r_lost(self):
        """The disk with the local copy is lost as well; fsync had promised the remote."""
        self.load()
        self.soon()
        self.kill_mount()
        self.clean_up()
        self.lose_local()
        more = ['--take-over'] if '--take-over' in self.can['mount'] and self.rng.random() < 0.5 else []
        self.start_mount(*more)
        self.compare()

    def r_offline(self):
        """The mount comes back without a server. What was written is here, and more can be."""
        whole = '--local-max' not in self.s.mount and '--pull-workers' not in self.s.mount and self.rng.random() < 0.7
        if whole:
            self.run('wait', self.file, '--local', '100%', '--timeout', '60s', code=0, timeout=90)
        self.load()
        self.soon()
        for kill in self.rng.sample([self.kill_mount, self.kill_server], 2):
            kill()
        self.clean_up()
        for _ in range(self.rng.choice([1, 2])):
            self.start_mount('--deadline', '1s')
            if '--local-max' not in self.s.mount:
                self.compare('offline')
            may_wait = set(self.s.mount) & {'--dirty-max', '--max-partial', '--local-max'}
            if not may_wait and (whole or self.s.how == 'direct'):
                self.load()
            self.soon()
            self.kill_mount()
            if self.worker:
                self.unload()
            self.clear_mount()
        if self.rng.random() < 0.5:
            self.start_server()
            self.start_mount()
        else:
            self.start_mount()
            self.soon()
            self.start_server()
        self.compare()

    def r_power_here(self):
        self.load()
        self.soon()
        self.kill_mount()
        self.clean_up()
        self.disks['here'].cut()
        self.start_mount()
        self.compare()

    def r_power_there(self):
        """The server's host goes; the mount lives through it, and what was pushed and not flushed is pushed again."""
        self.load()
        self.soon()
        self.kill_server()
        self.disks['there'].cut()
        self.start_server()
        self.flushes('with the new server')
        self.unload(stop=True, errors_ok=False)
        self.compare()

    def r_power_there_and_mount(self):
        self.load()
        self.soon()
        for kill in self.rng.sample([self.kill_mount, self.kill_server], 2):
            kill()
        self.clean_up()
        self.disks['there'].cut()
        self.start_server()
        self.start_mount()
        self.compare()

    def r_power_on_both(self):
        self.load()
        self.soon()
        for kill in self.rng.sample([self.kill_mount, self.kill_server], 2):
            kill()
        self.clean_up()
        for d in self.disks.values():
            d.cut()
        self.start_server()
        self.start_mount()
        self.compare()

    def r_the_dead_write(self):
        """What the killed mount had sent reaches the server when the next one has written over it."""
        self.load()
        self.soon()
        self.link.hold()
        try:
            wait_for(lambda: self.link.held() > 100000, 'writes on their way', 1)
        except AssertionError:
            pass  # a slow pusher: what there is will do
        self.kill_mount()
        self.clean_up()
        self.start_mount()
        self.compare()
        self.load()
        self.soon(0.1)
        late, pairs = self.link.release()
        say('%d bytes of the dead were delivered' % late)
        self.soon(0.1)
        self.unload(stop=True)
        self.compare()
        for p in pairs:
            self.link.end(p)

    def r_link(self):
        self.load()
        self.soon()
        for _ in range(2):
            fail = self.rng.choice([self.link.cut, self.link.silence])
            fail()
            self.soon(1)
            self.link.up()
            self.soon()
        self.flushes('with the new link')
        self.unload(stop=True, errors_ok=False)
        self.compare()

    def finish(self):
        """The orderly end brings everything to the server's file."""
        wait_for(lambda: self.alive() and self.status(self.file)['dirty'] == 0, 'the end of the push', 90)
        self.run('stop', self.file, code=0, timeout=120)
        code = self.m.p.wait(60)
        true(code == 0, 'the mount ended with %d: %s' % (code, self.m.err()))
        self.m = None
        code = self.server.end()
        true(code == 0, 'the server ended with %d: %s' % (code, self.server.err()))
        self.server = None
        self.work('check', 'there/remote.img')


def one(setting, rng, can, base, deadline):
    """(rounds that were run, whether all was well)."""
    need_fuse()
    w = Crash(setting, rng, can)
    n = 0
    try:
        try:
            w.begin()
        except Skip as e:
            for k, what in enumerate(setting.rounds):
                print('ok %d - %s: %s # SKIP %s' % (base + k + 1, setting.name, what, e), flush=True)
            return len(setting.rounds), True
        for what in setting.rounds:
            n += 1
            began = time.monotonic()
            if not w.persisted and (setting.durable == 'local' or what in ('power here', 'power on both')):
                print('ok %d - %s: %s # SKIP the chunk map is in memory' % (base + n, setting.name, what), flush=True)
                what = None
            else:
                w.strike(what)
            if n == len(setting.rounds) or time.monotonic() > deadline:
                w.finish()
                t = w.totals
                say('%s (%s%s, rtt %s, %s): %d kills, %d writes, %d flushes, %d reads, %d failed; %d sectors that were '
                    'written and not flushed came older' % (
                        setting.name, setting.durable, ''.join(' ' + x for x in setting.mount), setting.rtt,
                        setting.how, w.kills, t['writes'], t['flushes'], t['reads'],
                        t['failed_writes'] + t['failed_flushes'] + t['failed_reads'], w.lost))
            if what:
                print('ok %d - %s: %s (%.1f s)' % (base + n, setting.name, what, time.monotonic() - began), flush=True)
            if time.monotonic() > deadline:
                break
        return n, True
    except Exception:
        for line in traceback.format_exc().splitlines():
            print('# ' + line)
        say('%s %s rtt %s %s' % (setting.durable, ' '.join(setting.mount), setting.rtt, setting.how))
        try:
            say(w.run('status', w.file, '--json', timeout=20).out.replace('\n', '\n# '))
        except Exception:
            pass
        for r in w.running:
            say('%s: exit %s, err: %s' % (' '.join(r.p.args[1:]), r.p.poll(), r.err()[-2000:].replace('\n', '\n#   ')))
        print('not ok %d - %s: %s' % (base + n, setting.name, setting.rounds[max(n, 1) - 1]), flush=True)
        return max(n, 1), False
    finally:
        w.close()


def main():
    a = argparse.ArgumentParser()
    a.add_argument('farpage')
    a.add_argument('worker')
    a.add_argument('rounds', type=int, nargs='?', default=20)
    a.add_argument('--seed', type=int, default=0)
    a.add_argument('--seconds', type=float, default=0)
    a.add_argument('--only', default='')
    a.add_argument('--what', default='', help='strike these, separated by commas')
    a.add_argument('--leave-out', default='', help='do not strike these')
    a.add_argument('--random', action='store_true', help='random settings only')
    args = a.parse_intermixed_args()
    global WORKER
    WORKER = os.path.abspath(args.worker)
    seed = args.seed or int(os.environ.get('FARPAGE_SEED', '0')) or random.SystemRandom().getrandbits(31)
    say('--seed %d' % seed)
    can = {verb: options_of(verb) for verb in ('mount', 'serve')}
    settings = [s for s in SHORT if args.only in s.name and not args.random]
    if args.what:
        for s in settings:
            s.rounds = args.what.split(',')
    began = time.monotonic()
    deadline = began + (args.seconds or 1e9)
    n, good, k = 0, True, 0
    try:
        need_fuse()
    except Skip as e:
        print('SKIP: %s' % e)
        sys.exit(77)
    while n < args.rounds and good and time.monotonic() < deadline:
        rng = random.Random('%d %d' % (seed, k))
        s = settings[k] if k < len(settings) else random_setting(rng)
        s.rounds = [x for x in s.rounds if x not in args.leave_out.split(',')] or ['mount']
        s.rounds = s.rounds[:args.rounds - n]
        ran, good = one(s, rng, can, n, deadline)
        n += ran
        k += 1
    print('1..%d' % n)
    say('%d rounds of %d in %.0f s, --seed %d' % (n, args.rounds, time.monotonic() - began, seed))
    sys.exit(0 if good else 1)


ends_on_sigterm()
main()
