#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""bench/run [--quick] [ROW...]: farpage beside what else there is, in about twelve minutes; the
rows of the pointer (pointer-...) are more than half of that.

Each row is a ratio of two things that were measured in this run, in alternating pairs; each side is represented by its
best. A row names its mechanism. What falls short is printed with its figure and 'short'; what cannot be measured here is
printed as 'skip: reason'. The exit code is 1 only when bytes were wrong or a measurement could not be made: never
because something was slow.

Both sides are read by the same program, `farpage bench --on FILE`, which checks what it reads. The page cache of a file
that is read cold is dropped before each run by fdatasync and POSIX_FADV_DONTNEED, which needs no root.
"""
import glob
import json
import mmap
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(HERE, 'tests', 'interop'), os.path.join(HERE, 'tests', 'path')]
import gopeer  # noqa: E402
import netpath  # noqa: E402

BUILD = os.path.join(HERE, os.environ.get('BUILD', 'build'))
FARPAGE = os.path.join(BUILD, 'farpage')
RAWTCP = os.path.join(BUILD, 'bench', 'rawtcp')
MIB, GIB = 1 << 20, 1 << 30
ROOT = os.geteuid() == 0
HUGE = 'mem:%d?private=1'  # huge pages: what a user serves from who wants speed

# The Go family's engine (r3map v0.1.1, pull over gRPC on loopback, 64 KiB chunks, one connection) as it was measured on
# two shared cores: MiB/s, and CPU seconds a GiB of both ends. It is quoted, not run.
GO_ENGINE_RATE, GO_ENGINE_CPU = 185.7, 5.0


class Skip(Exception):
    """This row cannot be measured here."""


class Broken(Exception):
    """A measurement failed that ought to work."""


# ---------------------------------------------------------------------------------------------- what is started

class Things:
    """All that has to be undone, last first."""

    def __init__(self):
        self.undo = []
        self.dir = None

    def add(self, fn, *args):
        self.undo.append((fn, args))

    def close(self, down_to=0):
        while len(self.undo) > down_to:
            fn, args = self.undo.pop()
            try:
                fn(*args)
            except Exception as e:  # the rest is to be undone all the same
                print('bench: cleaning up: %s' % e, file=sys.stderr)


things = Things()


def end(proc, seconds=10):
    if proc.poll() is None:
        proc.terminate()
        try:
            proc.wait(seconds)
        except subprocess.TimeoutExpired:
            proc.kill()
            proc.wait()


def start(*argv, **kw):
    kw.setdefault('stdout', subprocess.PIPE)
    kw.setdefault('stderr', subprocess.PIPE)
    # A group of its own: Ctrl-C is for us, and we end our children in order.
    proc = subprocess.Popen([str(a) for a in argv], text=True, start_new_session=True, **kw)
    things.add(end, proc)
    return proc


def is_mounted(path):
    with open('/proc/self/mountinfo') as f:
        return any(line.split()[4] == path for line in f)


def unmount(path):
    for _ in range(50):
        if not is_mounted(path):
            return
        if subprocess.run(['fusermount3', '-u', path], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run(['fusermount3', '-u', '-z', path], capture_output=True)


def until(what, fn, seconds=20, proc=None):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        got = fn()
        if got:
            return got
        if proc and proc.poll() is not None:
            raise Broken('%s: it ended: %s' % (what, (proc.stderr.read() or '').strip()[-300:]))
        time.sleep(0.02)
    raise Broken('%s did not happen in %d s' % (what, seconds))


def folder():
    return tempfile.mkdtemp(dir=things.dir)


def mount(source, *options):
    """farpage mount; returns the file and the process."""
    need_fuse()
    where = folder()
    proc = start(FARPAGE, 'mount', source, where, '--quiet', '--control', where + '.sock', *options)
    things.add(unmount, where)
    line = proc.stdout.readline().strip()
    if not line:
        raise Broken('farpage mount %s: %s' % (source, proc.stderr.read().strip()[-300:]))
    return line, proc


def serve(source):
    proc = start(FARPAGE, 'serve', source, '--listen', 'grpc://127.0.0.1:0')
    words = proc.stdout.readline().split()
    uris = [w for w in words if w.startswith('grpc://')]
    if not uris:
        raise Broken('farpage serve %s: %s' % (source, proc.stderr.read().strip()[-300:]))
    return uris[0], proc


def nbdfuse(size):
    need_fuse()
    for program in ('nbdkit', 'nbdfuse'):
        if not shutil.which(program):
            raise Skip('%s is not installed (apt-get install nbdkit libnbd-bin)' % program)
    where = folder()
    proc = start('nbdfuse', where + '/nbd', '[', 'nbdkit', '--exit-with-parent', 'memory', str(size), ']')
    things.add(unmount, where)
    until('nbdfuse', lambda: is_mounted(where), proc=proc)
    path = where + '/nbd'
    until('nbdfuse', lambda: os.path.exists(path) and os.stat(path).st_size == size, proc=proc)
    return path


def need_fuse():
    if not os.access('/dev/fuse', os.R_OK | os.W_OK):
        raise Skip('/dev/fuse is %s' % ('closed to this user' if os.path.exists('/dev/fuse') else 'missing'))


def need_memory(bytes_):
    with open('/proc/meminfo') as f:
        free = next(int(line.split()[1]) * 1024 for line in f if line.startswith('MemAvailable'))
    if free < bytes_ + GIB:
        raise Skip('%d MiB of memory are needed and %d are free' % (bytes_ // MIB + 1024, free // MIB))


def cpu_seconds(*procs):
    ticks = 0
    for p in procs:
        with open('/proc/%d/stat' % p.pid) as f:
            fields = f.read().rsplit(')', 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf('SC_CLK_TCK')


def read_ahead(path, kib):
    """Set it for the file system of path; needs root."""
    dev = os.stat(os.path.dirname(path)).st_dev
    with open('/sys/class/bdi/%d:%d/read_ahead_kb' % (os.major(dev), os.minor(dev)), 'r+') as f:
        old = f.read().strip()
        f.seek(0)
        f.write(str(kib))
    return int(old)


# ---------------------------------------------------------------------------------------------------- measuring

running = None  # the measurement that Ctrl-C must end


def farpage_rows(*argv):
    global running
    proc = subprocess.Popen([FARPAGE, 'bench', '--json'] + [str(a) for a in argv], text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running = proc
    out, err = proc.communicate()
    running = None
    try:
        rows = json.loads(out)['rows']
    except ValueError:
        raise Broken('farpage bench %s: %s' % (' '.join(map(str, argv)), err.strip()[-300:]))
    for row in rows:
        if 'skip' in row:
            raise Skip(row['skip'].replace('skip: ', ''))
        if 'failed' in row:
            raise Broken(row['failed'].replace('failed: ', ''))
        if row['bytes_wrong']:
            raise Broken('%d wrong bytes in %s' % (row['bytes_wrong'], row['set']))
    return rows


def act(name, path, *options):
    return farpage_rows(name, '--on', path, *options)[0]


def value(row):
    return row['value']


def pairs(n, ours, theirs):
    """Alternate; the best of each (more is better)."""
    a, b = [], []
    for _ in range(n):
        a.append(ours())
        b.append(theirs())
    return max(a), max(b)


def raw_tcp_cost(*pages):
    """The best write size of one raw loopback stream: MiB/s, and the fewest CPU seconds of both ends for a GiB; pages: from
    memory into fresh 'huge' or 'small' pages."""
    rate, cpu = 0, 1e9
    for block in (64 << 10, 256 << 10, 1 << 20):
        out = subprocess.run([RAWTCP, str(GIB), str(block), *pages], capture_output=True, text=True)
        if out.returncode:
            raise Broken('rawtcp: %s' % out.stderr.strip())
        one = [float(word) for word in out.stdout.split()]
        rate, cpu = max(rate, one[0]), min(cpu, one[1])
    return rate, cpu


def raw_tcp(*pages):
    return raw_tcp_cost(*pages)[0]


def congestion():
    try:
        with open('/proc/sys/net/ipv4/tcp_congestion_control') as f:
            name = f.read().strip()
            return 'reno' if name.startswith('bbr') else name  # nobody paces on loopback, see rawtcp.c
    except OSError:
        return 'unknown'


# --------------------------------------------------------------------------------------------------------- table

broken = 0


def show(name, figure, unit, target, more, mechanism, upwards=True):
    """target None: a figure without one."""
    if target is None:
        verdict, want = '', ''
    else:
        verdict = 'ok' if (figure >= target if upwards else figure <= target) else 'short'
        want = '%s %g' % ('>=' if upwards else '<=', target)
    print('%-44s %8.2f %-3s %-9s %-6s %s' % (name, figure, unit, want, verdict, more))
    if mechanism:
        print('%-44s %s' % ('', '  ' + mechanism))
    sys.stdout.flush()


def rates(ours, theirs):
    return '%.0f against %.0f MiB/s' % (ours, theirs)


ROWS = []


def row(name):
    def wrap(fn):
        ROWS.append((name, fn))
        return fn
    return wrap


# ---------------------------------------------------------------------------------------------------------- rows

@row('direct')
def row_direct(o):
    size = GIB
    need_memory(3 * size)
    ours, _ = mount('mem:%d' % size, '--mode', 'direct')
    theirs = nbdfuse(size)
    for path in (ours, theirs):
        act('fill', path)
        act('read', path)
    what = 'FUSE <- memory against nbdfuse <- nbdkit memory'
    a, b = pairs(o.pairs, lambda: value(act('cold', ours)), lambda: value(act('cold', theirs)))
    show('cold sequential read', a / b, 'x', 3.0 if ROOT else 2.5, rates(a, b), what + ', each with its own read-ahead')
    if ROOT:
        for path in (ours, theirs):
            read_ahead(path, 128)
        a, b = pairs(o.pairs, lambda: value(act('cold', ours)), lambda: value(act('cold', theirs)))
        show('the same, read-ahead 128 KiB as for a user', a / b, 'x', 2.5, rates(a, b), what)

    def random(path):
        row_ = act('random', path, '--way', 'direct', '--seconds', '500ms')
        return 1e6 / row_['p50_us'], float(row_['note'].split()[0])
    a, b = pairs(o.pairs, lambda: random(ours)[1], lambda: random(theirs)[1])
    show('random 4 KiB O_DIRECT reads, depth 1', a / b, 'x', 4.0, '%.0f against %.0f a second' % (a, b), what)


@row('local')
def row_local(o):
    size = GIB
    need_memory(4 * size)
    ours, proc = mount('mem:%d' % size, '--mode', 'managed')
    control = os.path.dirname(ours)
    tmpfs = '/dev/shm/farpage-bench.%d' % os.getpid()
    things.add(lambda: os.path.exists(tmpfs) and os.unlink(tmpfs))
    with open(tmpfs, 'wb') as f:
        f.truncate(size)
    act('fill', tmpfs)
    act('fill', ours)
    subprocess.run([FARPAGE, 'wait', control, '--control', control + '.sock'], capture_output=True)
    act('cold', ours)
    act('read', ours)
    what = 'page cache over FUSE <- region, all local, against tmpfs'
    a, b = pairs(o.pairs, lambda: value(act('read', ours)), lambda: value(act('read', tmpfs)))
    show('all local, warm', a / b, 'x', 0.9, rates(a, b), what)
    a, b = pairs(o.pairs, lambda: value(act('cold', ours)), lambda: value(act('read', tmpfs)))
    show('all local, page cache dropped', a / b, 'x', 0.4, rates(a, b), 'FUSE <- region, all local, against tmpfs')


@row('pull')
def row_pull(o):
    size = GIB
    need_memory(3 * size)
    need_fuse()
    cpu = []

    def pull():
        r = farpage_rows('rtt', '--rtt', '0', '--backend', 'grpc', '--mode', 'managed', '--size', size)[0]
        cpu.append(r['cpu_s_per_gib'])
        return r['with_open']
    a, b = pairs(o.pairs, pull, raw_tcp)
    what = 'FUSE <- region, pulling <- gRPC <- memory, opening counted'
    show('managed over gRPC, pulling while reading', a / b, 'x', 0.18, rates(a, b),
         '%s, against one raw TCP stream (best of three write sizes, %s both)' % (what, congestion()))
    show('the same against the Go engine\'s figure', a / GO_ENGINE_RATE, 'x', 10, '%.0f against %.0f MiB/s' % (a, GO_ENGINE_RATE),
         what + '; Go: r3map v0.1.1, 64 KiB chunks, its best figure elsewhere')
    show('CPU of both ends', min(cpu), 's', 2.0, 'a GiB; Go\'s engine: %.0f to 20 s' % GO_ENGINE_CPU, what, upwards=False)

    uri, server = serve('mem:%d' % size)
    filler, proc = mount(uri, '--mode', 'direct')
    act('fill', filler)

    def copy():
        begin = time.monotonic()
        out = subprocess.run([FARPAGE, 'copy', uri, 'null:', '--quiet', '--json'], capture_output=True, text=True)
        if out.returncode:
            raise Broken('farpage copy: %s' % out.stderr.strip())
        return size / MIB / (time.monotonic() - begin)
    before = cpu_seconds(server)
    a, b = pairs(o.pairs, copy, raw_tcp)
    show('farpage copy grpc://... null:', a / b, 'x', 0.6, rates(a, b),
         'far_read <- gRPC <- memory, the whole command counted, against one raw TCP stream')


@row('far')
def row_far(o):
    size = 4 * GIB
    try:
        need_memory(2 * size + GIB)
    except Skip:
        size = GIB
        need_memory(3 * size)
    n = 1 if o.quick else 2
    options = ('--mode', 'managed', '--size', size, '--seconds', '60s')
    a, b = pairs(n, lambda: farpage_rows('rtt', '--rtt', '40ms', *options)[0]['with_open'],
                 lambda: farpage_rows('rtt', '--rtt', '0', *options)[0]['with_open'])
    show('managed at 40 ms against 0 ms, %d GiB' % (size // GIB), a / b, 'x', 0.8, rates(a, b) + ', best of %d' % n,
         'FUSE <- region, pulling <- delay 40 ms, unlimited <- memory, opening counted')


@row('absent')
def row_absent(o):
    best = {}
    for _ in range(1 if o.quick else 3):
        for r in farpage_rows('fault-64', '--rtt', '40ms'):
            idle, busy = [float(w) for w in r['note'].replace(',', '').split() if w.replace('.', '').isdigit()][:2]
            old = best.get(r['series'])
            if not old or r['value'] < old[0]:
                best[r['series']] = (r['value'], idle, busy)
    for way, (trips, idle, busy) in best.items():
        show('64 threads, 64 absent chunks, %s' % way, trips, 'RTT', 2, 'the last one served, 40 ms',
             'FUSE receivers that leave their seat <- region <- delay', upwards=False)
        show('a local read meanwhile, its p99', busy / idle, 'x', 2, '%.0f us, idle %.0f us' % (busy, idle), None,
             upwards=False)


@row('first')
def row_first(o):
    for r in farpage_rows('latency', '--rtt', '10ms', '--seconds', '3s'):
        what = '%s, %s' % (r['how'], r['note'].split(';')[0])
        show('first chunk, %s: p50 over R' % r['series'], r['p50_us'] / 1e3, 'ms', 0.15, '', what, upwards=False)
        show('first chunk, %s: p99 over R' % r['series'], r['p99_us'] / 1e3, 'ms', 1, '', None, upwards=False)


@row('scatter')
def row_scatter(o):
    n = 1 if o.quick else 3
    a, b = pairs(n, lambda: value(farpage_rows('scatter', '--rtt', '40ms')[0]),
                 lambda: value(farpage_rows('scatter', '--rtt', '0')[0]))
    show('20000 O_DIRECT 4 KiB writes, absent, 40 ms', a / b, 'x', 0.95,
         '%.0f against %.0f a second, best of %d' % (a, b, n), 'FUSE <- region (side table) <- delay, against 0 ms')


@row('dirty')
def row_dirty(o):
    r = farpage_rows('dirty')[0]
    show('writes past the dirty budget', r['value'] / 50, 'x', 0.95, '%.1f MiB/s, the push may use 50' % r['value'],
         r['how'])
    show('the longest stall meanwhile', r['longest_us'] / 1e3, 'ms', 100, 'of a 128 KiB write', None, upwards=False)


def go_peer():
    """The Go family's program, built where Go and its modules are at hand."""
    try:
        return gopeer.build(os.path.join(BUILD, 'tests', 'interop'))
    except gopeer.Missing as e:
        raise Skip(str(e))


def go_serve(size):
    """The address of the Go family's Backend service over memory with the pattern."""
    server = start(go_peer(), 'grpc-serve', size, stdin=subprocess.PIPE)
    address = server.stdout.readline().strip()
    if not address:
        raise Broken('gopeer: %s' % server.stderr.read().strip())
    return address


# What the Backend service is to do with the Go family on both ends, on one, and with farpage on both.
GRPC_TARGETS = {(4, 1): 2, (4, 32): 3, (64, 1): 4, (64, 32): 4, (1024, 1): 4, (1024, 32): 3}


# How so many blocks are kept on their way: by one caller, or by two who each have a list of 16 (far_read_many).
GRPC_CALLERS = {1: '1', 32: '2x16'}


@row('grpc')
def row_grpc(o):
    """Reads and writes of every combination of the two clients and the two servers, checked byte by byte."""
    size, ms = 64 * MIB, 300 if o.quick else 700
    uri, server = serve(HUGE % size)
    filler, proc = mount(uri, '--mode', 'direct')
    act('fill', filler)
    stop(filler, proc)
    binary, backend = go_peer(), os.path.join(BUILD, 'bench', 'backend')
    address, plain = go_serve(size), uri.split('/')[2]

    def run(client, at, kib, depth, act_, callers=None):
        if client == 'go':
            argv = [binary, 'grpc-bench', address if at == 'go' else plain]
        else:
            argv = [backend, {'go': 'grpc://%s/?size=%d' % (address, size), 'ours': uri + '?sums=0', 'sums': uri}[at]]
        how = depth if client == 'go' else callers or GRPC_CALLERS[depth]
        return numbers(*argv, size, kib << 10, how, ms, act_)

    def one(kib, depth, act_, ours, target, name):
        beside = {'with checksums': ('sums', None)} if ours == ('ours', 'ours') else {}
        if beside and depth > 1:
            beside['of %d callers' % depth] = ('ours', str(depth))
        more = {what: [] for what in beside}

        def we():
            for what, (at, callers) in beside.items():
                more[what].append(run('ours', at, kib, depth, act_, callers)[0])
            return run(*ours, kib, depth, act_)
        a, b = both(o.pairs, we, lambda: run('go', 'go', kib, depth, act_), key=lambda r: -r[0])
        text = 'p50 %.0f against %.0f us (%.1f x), %s' % (a[1], b[1], b[1] / a[1], rates(a[0] * kib / 1024, b[0] * kib / 1024))
        text += ''.join('; %s %.2f x' % (what, max(all_) / b[0]) for what, all_ in more.items())
        show('%s, %d KiB %s, depth %d' % (name, kib, act_, depth), a[0] / b[0], 'x', target, text, None)
    print('%-44s   far_read and far_write <- gRPC <- memory in huge pages, all bytes compared, against r3map\'s services on grpc-go,\n%-44s   '
          'which have no checksums: the ratio is without ours too. Depth 32: two callers with lists of 16 (far_read_many) against 32\n%-44s   '
          'goroutines; beside it 32 callers with one each' % ('gRPC Backend', '', ''))
    for (kib, depth), target in GRPC_TARGETS.items():
        for act_ in ('read', 'write'):
            one(kib, depth, act_, ('ours', 'ours'), target, 'gRPC')
    for name, ours in (('our server, Go client', ('go', 'ours')), ('Go server, our client', ('ours', 'go'))):
        for kib, depth in GRPC_TARGETS if not o.quick else ((64, 32),):
            for act_ in ('read', 'write'):
                one(kib, depth, act_, ours, 1.3, name)


def nbd_listens(where):
    """Something listens at the socket (a look at the file is not enough, and connecting is no harm to any of them)."""
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect(where)
        return True
    except OSError:
        return False
    finally:
        s.close()


def nbd_server(kind, size):
    """(socket, process) of one NBD server over so many bytes of memory."""
    where = os.path.join(folder(), 's')
    if kind.startswith('mem:'):
        proc = start(FARPAGE, 'serve', kind, '--listen', 'nbd+unix:///?socket=' + where, stdout=subprocess.DEVNULL)
    elif kind == 'nbdkit':
        proc = start('nbdkit', '-f', '-U', where, 'memory', size, stdout=subprocess.DEVNULL)
    else:
        # Its words are for a file: it says much about each connection that ends.
        proc = start(go_peer(), 'nbd-serve', where, size, '', stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                     stderr=subprocess.DEVNULL)
    until('%s at %s' % (kind, where), lambda: nbd_listens(where), proc=proc)
    return where, proc


def nbd_uri(server):
    return 'nbd+unix:///?socket=' + server[0]


def nbd_fio(server, rw, block, depth, seconds):
    """(requests a second, microseconds of server CPU for each, requests a second that fio's own CPU allows)."""
    before = cpu_seconds(server[1])
    out = subprocess.run(['fio', '--name=nbd', '--ioengine=nbd', '--uri=' + nbd_uri(server), '--rw=' + rw, '--bs=%d' % block,
                          '--iodepth=%d' % depth, '--time_based', '--runtime=%d' % seconds, '--randseed=7', '--norandommap',
                          '--output-format=json'], capture_output=True, text=True, cwd=things.dir)
    if out.returncode:
        raise Broken('fio: %s' % (out.stderr or out.stdout).strip()[-300:])
    job = json.loads(out.stdout[out.stdout.index('{'):])['jobs'][0]
    job_ = job['write' if 'write' in rw else 'read']
    return job_['iops'], (cpu_seconds(server[1]) - before) * 1e6 / job_['total_ios'], \
        job_['iops'] * 100 / max(job['usr_cpu'] + job['sys_cpu'], 1)


def nbd_replay(server, seconds, batch=32):
    before = cpu_seconds(server[1])
    rate, most = numbers(os.path.join(BUILD, 'bench', 'nbdreplay'), server[0], '', batch, seconds)
    return rate, (cpu_seconds(server[1]) - before) * 1e6 / (rate * seconds), most


def nbd_copy(*where):
    """MiB/s of nbdcopy, its start counted."""
    time.sleep(0.2)  # the server of the copy before this one takes its threads down meanwhile (nbdkit has 64)
    begin = time.monotonic()
    out = subprocess.run(['nbdcopy', *where], capture_output=True, text=True)
    if out.returncode:
        raise Broken('nbdcopy: %s' % out.stderr.strip()[-300:])
    return GIB / MIB / (time.monotonic() - begin)


@row('nbd-server')
def row_nbd_server(o):
    """Our NBD server beside nbdkit's and go-nbd's, all over memory, on a unix socket, with the same clients."""
    for program, package in (('nbdkit', 'nbdkit'), ('fio', 'fio'), ('nbdcopy', 'libnbd-bin')):
        if not shutil.which(program):
            raise Skip('%s is not installed (apt-get install %s)' % (program, package))
    need_memory(5 * GIB)
    seconds = 1 if o.quick else 2
    data = os.path.join('/dev/shm' if os.access('/dev/shm', os.W_OK) else folder(), 'farpage-bench-nbd.%d' % os.getpid())
    things.add(lambda: os.path.exists(data) and os.unlink(data))
    with open(data, 'wb') as f:
        for _ in range(GIB // MIB):
            f.write(os.urandom(MIB))

    def server(kind):
        one = nbd_server(kind, GIB)
        nbd_copy(data, nbd_uri(one))
        return one

    def same(kind, one):
        back = data + '.back'
        things.add(lambda: os.path.exists(back) and os.unlink(back))
        nbd_copy(nbd_uri(one), back)
        if subprocess.run(['cmp', '-s', data, back]).returncode:
            raise Broken('%s did not give back what it was given' % kind)
        os.unlink(back)

    def requests(name, run, ours, theirs, target, against):
        """Rates and server CPU of alternating pairs; each the best that was seen."""
        a, b = [], []
        for _ in range(o.pairs):
            a.append(run(ours))
            b.append(run(theirs))
        rate, cpu, most = max(r for r, _, _ in a), min(c for _, c, _ in a), max(m for _, _, m in a)
        rate_b, cpu_b = max(r for r, _, _ in b), min(c for _, c, _ in b)
        more = '%.0f against %.0f a second, server CPU %.2f against %.2f us each' % (rate, rate_b, cpu, cpu_b)
        if target and rate < target * rate_b:  # as much as this client can ask for if no server ever let it wait
            more += '; this client\'s own CPU allows %.0f, %.2f x' % (most, most / rate_b)
        show(name, rate / rate_b, 'x', target, more, against)
        return cpu / cpu_b
    ours, kit = server(HUGE % GIB), server('nbdkit')
    how = 'NBD <- memory in huge pages (mem:SIZE?private=1), unix socket, against nbdkit memory'
    requests('NBD, fio 4 KiB random reads, depth 1', lambda s: nbd_fio(s, 'randread', 4096, 1, seconds), ours, kit, 1.3, how)
    cost = requests('NBD, fio 4 KiB random reads, depth 32', lambda s: nbd_fio(s, 'randread', 4096, 32, seconds), ours, kit, 1.1,
                    None)
    show('the same, server CPU a request', cost, 'x', 0.5, '', None, upwards=False)
    requests('NBD, 32 random 4 KiB reads a message', lambda s: nbd_replay(s, seconds), ours, kit, 3, 'bench/nbdreplay')
    small = server('mem:%d' % GIB)
    requests('the same, mem:SIZE, which has small pages', lambda s: nbd_replay(s, seconds), small, kit, None, None)
    small[1].terminate()
    for rw in ('read', 'write'):
        requests('NBD, fio sequential %s, 256 KiB, depth 4' % rw, lambda s: nbd_fio(s, rw, 256 << 10, 4, seconds), ours, kit, 1.1,
                 None)
    for name, way in (('out of it', lambda s: nbd_copy(nbd_uri(s), 'null:')), ('into it', lambda s: nbd_copy(data, nbd_uri(s)))):
        a, b = pairs(o.pairs, lambda: way(ours), lambda: way(kit))
        show('NBD, nbdcopy of 1 GiB %s' % name, a / b, 'x', 1.1, rates(a, b), None)
    same('farpage', ours)
    try:
        go = server('go-nbd')
    except Skip as e:
        print('%-44s skip: %s' % ('NBD against go-nbd', e))
        return
    requests('NBD, fio 4 KiB random reads, depth 32, go-nbd', lambda s: nbd_fio(s, 'randread', 4096, 32, seconds), ours, go, 1.8,
             'NBD <- memory in huge pages, unix socket, against go-nbd over memory')
    requests('the same, 32 reads a message', lambda s: nbd_replay(s, seconds), ours, go, 1.8, 'bench/nbdreplay, which costs little CPU')
    a, b = pairs(o.pairs, lambda: nbd_copy(nbd_uri(ours), 'null:'), lambda: nbd_copy(nbd_uri(go), 'null:'))
    show('NBD, nbdcopy of 1 GiB out of it, go-nbd', a / b, 'x', 1.1, rates(a, b), None)


def far_path(rtt_ms, mbit, loss=0):
    try:
        path = netpath.Path(os.path.join(BUILD, 'tests', 'path', 'tundelay'), rtt_ms, mbit, loss)
    except netpath.Missing as e:
        raise Skip(str(e))
    things.add(path.close)
    return path


def serve_far(path, source):
    server = path.start('a', FARPAGE, 'serve', source, '--read-only', '--listen', 'grpc://%s:0' % netpath.SERVER, '--insecure')
    words = server.stdout.readline().split()
    if len(words) < 2:
        raise Broken('farpage serve on the path')
    return words[1]


def mount_far(path, uri, *options):
    where = folder()
    things.add(unmount, where)
    proc = path.start('b', FARPAGE, 'mount', uri, where, '--quiet', '--read-only', '--mode', 'managed', *options)
    line = proc.stdout.readline().strip()
    if not line:
        raise Broken('farpage mount on the path')
    return where, line


def faults_on(rtt, mbit, loss, source, size, chunk, seconds):
    """(p50 and p99 in ms, part of the link that was used) of faults at random while the pull runs from the other end."""
    mark = len(things.undo)
    path = far_path(rtt, mbit, loss)
    where, region = mount_far(path, serve_far(path, source), '--chunk', chunk)
    fd = os.open(region, os.O_RDONLY | os.O_DIRECT)
    page, took, rnd, wrong = mmap.mmap(-1, 4096), [], random.Random(1), 0
    begin, before = time.monotonic(), path.bytes_to_client()
    with open(source[5:], 'rb') as f:
        while time.monotonic() - begin < seconds:
            off = rnd.randrange(size * 3 // 4 // 65536, size // 65536) * 65536
            at = time.monotonic()
            os.preadv(fd, [page], off)
            took.append((time.monotonic() - at) * 1e3)
            wrong += page[:] != os.pread(f.fileno(), 4096, off)
            time.sleep(0.02)
    used = (path.bytes_to_client() - before) * 8 / (time.monotonic() - begin) / mbit / 1e6
    os.close(fd)
    things.close(mark)
    if wrong:
        raise Broken('%d faults gave wrong bytes' % wrong)
    took.sort()
    return took[len(took) // 2], took[len(took) * 99 // 100], used


def exchange_on(rtt, mbit, size):
    """How long a bare exchange takes on the idle path, one byte there and so many back (ms, p50): nobody can do better."""
    mark = len(things.undo)
    path = far_path(rtt, mbit)
    server = path.start('a', sys.executable, '-c', EXCHANGE, 'serve', netpath.SERVER, size)
    if not server.stdout.readline():
        raise Broken('the bare exchange on the path')
    took = float(path.call('b', sys.executable, '-c', EXCHANGE, 'ask', netpath.SERVER, size))
    things.close(mark)
    return took


EXCHANGE = """
import socket, sys, time
size, s = int(sys.argv[3]), socket.socket()
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
if b'bbr' in s.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16): # it would pace a few bytes over a round trip
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b'cubic')
if sys.argv[1] == 'serve':
    s.bind((sys.argv[2], 7000))
    s.listen(1)
    print('up', flush=True)
    s = s.accept()[0]
    while s.recv(1):
        s.sendall(bytes(size))
else:
    s.connect((sys.argv[2], 7000))
    took = []
    for _ in range(80):
        begin, left = time.monotonic(), size
        s.sendall(b'x')
        while left:
            left -= len(s.recv(left))
        took.append((time.monotonic() - begin) * 1e3)
        time.sleep(0.02)
    print(sorted(took)[len(took) // 2])
"""


def pull_over(rtt, mbit, source, size):
    """MiB/s of a managed mount from its start until all is local."""
    mark = len(things.undo)
    path = far_path(rtt, mbit)
    uri = serve_far(path, source)
    begin = time.monotonic()
    where, region = mount_far(path, uri)
    out = subprocess.run([FARPAGE, 'wait', where, '--local', '100%', '--timeout', '120s'], capture_output=True, text=True)
    rate = size / MIB / (time.monotonic() - begin)
    if out.returncode:
        raise Broken('farpage wait: %s' % out.stderr.strip())
    same = subprocess.run(['cmp', source[5:], region]).returncode == 0
    things.close(mark)
    if not same:
        raise Broken('the pull gave wrong bytes')
    return rate


def iperf_on(rtt, mbit, loss=0, seconds=5):
    mark = len(things.undo)
    rate = far_path(rtt, mbit, loss).iperf(seconds)
    things.close(mark)
    if rate is None:
        raise Skip('iperf3 is not installed (apt-get install iperf3)')
    return rate


@row('path')
def row_path(o):
    """A real path between two network namespaces: the kernel's own TCP at both ends, a queue of 8 MiB."""
    need_fuse()
    size = 512 * MIB if o.quick else GIB
    need_memory(4 * size)
    source = '/dev/shm/farpage-bench-path.%d' % os.getpid()
    things.add(lambda: os.path.exists(source) and os.unlink(source))
    with open(source, 'wb') as f:
        for _ in range(size // MIB):
            f.write(os.urandom(MIB))
    how = 'FUSE <- region, pulling <- gRPC <- file on tmpfs, over tundelay, 8 MiB queue, %s' % congestion()
    link = iperf_on(10, 1000)
    for chunk, kib in (('64K', 64), ('4K', 4)):
        seconds = size * 0.6 / 125e6
        runs, trips = [], []
        for _ in range(1 if o.quick else 5):
            trips.append(exchange_on(10, 1000, 1))
            runs.append(faults_on(10, 1000, 0, 'file:' + source, size, chunk, seconds))
        fair = [run for run in runs if run[2] >= 0.85] or [max(runs, key=lambda run: run[2])] # with an idle link it is easy
        p50, p99, used = (min(run[k] for run in fair) for k in range(3))
        trip = min(trips) # of the path as it is: the forwarder and both hosts have to wake up, too
        at = 'above the round trip of one byte on the idle path (%.2f ms), %.2f of the link in use' % (trip, used)
        show('fault over 10 ms while pulling, %s: p50' % chunk, p50 - trip, 'ms', 1,
             '%s; a bare exchange of %d KiB there: %.2f' % (at, kib, exchange_on(10, 1000, kib << 10) - trip), how, upwards=False)
        show('the same: p99', p99 - trip, 'ms', 5, 'p50 and p99 above the 10 ms of the forwarder: %.2f and %.2f ms' %
             (p50 - 10, p99 - 10), None, upwards=False)
        show('the link that is used meanwhile', used, 'x', 0.85, 'of 1 Gbit/s, with all headers; iperf3 alone: %.0f MiB/s' % link, None)
    n = 1 if o.quick else 3
    for rtt, against, target in ((40, 0, 0.8), (100, 100, 0.95)):
        a, b = pairs(n, lambda: pull_over(rtt, 1000, 'file:' + source, size), lambda: iperf_on(against, 1000))
        show('pull of %d MiB at %d ms, 1 Gbit/s' % (size // MIB, rtt), a / b, 'x', target,
             rates(a, b) + ', best of %d' % n, 'opening counted, against iperf3 at %d ms on the same forwarder' % against)
    for rtt, mbit, loss in ((10, 500, 0), (40, 500, 0), (40, 1000, 0)) + (((10, 1000, 1), (40, 1000, 1)) if not o.quick else ()):
        b = iperf_on(rtt, mbit, loss)
        p50, p99, used = faults_on(rtt, mbit, loss, 'file:' + source, size, '64K', 3)
        show('%d ms, %d Mbit/s, %.1f %% lost: p50' % (rtt, mbit, loss / 10), p50 - rtt, 'ms', None,
             'p99 %.1f ms; %.2f of the link used; iperf3 %.0f MiB/s' % (p99 - rtt, used, b), None)


@row('tls')
def row_tls(o):
    """What the same stream costs OpenSSL alone, on a blocking socket."""
    size, where = (256 * MIB if o.quick else GIB), folder()
    need_memory(4 * size)
    if not shutil.which('openssl'):
        raise Skip('the openssl command is not installed')
    cert, key = os.path.join(where, 'cert.pem'), os.path.join(where, 'key.pem')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', key,
                    '-out', cert, '-subj', '/CN=localhost', '-addext', 'subjectAltName=DNS:localhost'], check=True,
                   capture_output=True)

    def stream(how):
        out = subprocess.run([os.path.join(BUILD, 'bench', 'rawtls'), str(size), how, cert, key], capture_output=True, text=True)
        if out.returncode:
            raise Broken('rawtls: %s' % out.stderr.strip())
        return float(out.stdout.split()[0])
    a, b = pairs(o.pairs, lambda: stream('conn'), lambda: stream('raw'))
    show('one TLS stream', a / b, 'x', 0.8, rates(a, b), 'two processes, the connection layer against OpenSSL on a blocking socket')

    data = os.path.join('/dev/shm' if os.access('/dev/shm', os.W_OK) else where, 'farpage-bench-tls.%d' % os.getpid())
    things.add(lambda: os.path.exists(data) and os.unlink(data))
    with open(data, 'wb') as f:
        for _ in range(size // MIB):
            f.write(os.urandom(MIB))
    server = start(FARPAGE, 'serve', 'mem:%d' % size, '--listen', 'grpcs://127.0.0.1:0', '--tls-cert', cert, '--tls-key', key)
    words = server.stdout.readline().split()
    if len(words) < 2:
        raise Broken('farpage serve: %s' % server.stderr.read().strip())
    uri = words[1].replace('127.0.0.1', 'localhost') + '?tls-ca=' + cert

    def copy(*where_):
        begin = time.monotonic()
        out = subprocess.run([FARPAGE, 'copy', *where_, '--quiet'], capture_output=True, text=True)
        if out.returncode:
            raise Broken('farpage copy: %s' % out.stderr.strip())
        return size / MIB / (time.monotonic() - begin)
    copy('file:' + data, uri)
    a, b = pairs(o.pairs, lambda: copy(uri, 'null:'), lambda: stream('raw'))
    show('farpage copy grpcs://... null:', a / b, 'x', 0.8, rates(a, b),
         'far_read <- gRPC <- TLS <- memory, checksums and the whole command counted, against one raw TLS stream')


@row('huge')
def row_huge(o):
    r = farpage_rows('huge')[0]
    words = r['note'].split()
    show('open a region of 1 TiB', r['value'], 'ms', 20, '', r['how'], upwards=False)
    show('memory touched for that', float(words[0]) / 1024, 'MiB', 1, '', None, upwards=False)
    show('idle mount', float(words[words.index('idle') + 1]), '%', 0, 'of a CPU', None, upwards=False)


def a_second(row_):
    return float(row_['note'].split()[0])


def stop(path, proc):
    """Unmount in order; the mount and its map are closed when this returns."""
    proc.send_signal(signal.SIGTERM)
    proc.wait(60)


@row('lasting')
def row_lasting(o):
    """What it costs that the chunk map survives: the local store is a file in either case."""
    size = 4 * GIB
    seconds = os.environ.get('LASTING_SECONDS', '1s' if o.quick else '4s')
    if shutil.disk_usage(things.dir).free < size + GIB:
        raise Skip('%d MiB of disk are needed in %s' % ((size + GIB) // MIB, things.dir))

    def once(what, options, *act_options):
        mark, store = len(things.undo), os.path.join(folder(), 'local')
        path, proc = mount('null:%d' % size, '--mode', 'managed', '--local', 'file:%s' % store, '--pull-workers', '0',
                           '--dirty-max', '%d' % size, *options)
        r = act(what, path, *act_options)
        things.close(mark)
        for f in (store, store + '.farmap'):
            if os.path.exists(f):
                os.unlink(f)
        return r
    what = 'FUSE <- region <- file, map in a file against map in memory'
    n = 2 if o.quick else 3
    a, b = pairs(n, lambda: value(once('write', [], '--seconds', seconds)),
                 lambda: value(once('write', ['--map', 'none'], '--seconds', seconds)))
    show('sequential writes, map in a file', a / b, 'x', 0.9, rates(a, b), what)
    random = ('--way', 'direct', '--block', '64K', '--seconds', seconds)
    a, b = pairs(n, lambda: a_second(once('rewrite', [], *random)),
                 lambda: a_second(once('rewrite', ['--map', 'none'], *random)))
    show('random writes of 64 KiB, map in a file', a / b, 'x', 0.9, '%.0f against %.0f a second' % (a, b), what)


def far_away(port, rtt_ms):
    """An address at which 127.0.0.1:port is so far away."""
    relay = start(os.path.join(BUILD, 'bench', 'relay'), port, int(rtt_ms * 1000))
    line = relay.stdout.readline().strip()
    if not line:
        raise Broken('relay: %s' % relay.stderr.read().strip())
    return '127.0.0.1:' + line


@row('fsync')
def row_fsync(o):
    """fsync here while the remote is far, and fsync there."""
    size, ops = 256 * MIB, 30 if o.quick else 100

    def local(rtt):
        mark, store = len(things.undo), os.path.join(folder(), 'local')
        uri, _ = serve('mem:%d' % size)
        path, _ = mount(uri, '--mode', 'managed', '--local', 'file:%s' % store, '--durable', 'local', '--pull-workers', '0',
                        *(['--layer', 'delay:rtt=%s' % rtt] if rtt else []))
        r = a_second(act('sync', path, '--block', '1M', '--ops', ops))
        things.close(mark)
        return r
    a, b = pairs(2 if o.quick else 3, lambda: local('40ms'), lambda: local(None))
    show('fsync each MiB, --durable local, 40 ms away', a / b, 'x', 0.95, '%.0f against %.0f a second' % (a, b),
         'FUSE <- region <- file, gRPC <- memory at 40 ms against 0 ms')

    rtt = 10
    store = '/dev/shm/farpage-bench-remote.%d' % os.getpid()
    things.add(lambda: os.path.exists(store) and os.unlink(store))
    with open(store, 'wb') as f:
        f.truncate(size)
    uri, _ = serve('file:%s' % store)

    def above(name, uri, trips, how, target):
        path, _ = mount(uri, '--mode', 'managed', '--pull-workers', '0')
        act('sync', path, '--block', '4K', '--ops', 10)
        r = act('sync', path, '--block', '4K', '--ops', ops)
        show(name, r['p50_us'] / 1e3 - trips * rtt, 'ms', target, 'p50 %.2f ms' % (r['p50_us'] / 1e3), how, upwards=False)
    far = far_away(uri.split(':')[2].split('/')[0], rtt)
    above('write 4 KiB and fsync, above one round trip', 'grpc://%s' % far, 1,
          'FUSE <- region <- gRPC farpage.v1, %d ms away <- file on tmpfs' % rtt, 2)
    far = far_away(go_serve(size).rsplit(':', 1)[1], rtt)
    above('the same on the Go service, above two', 'grpc://%s/?size=%d' % (far, size), 2,
          "FUSE <- region <- gRPC, r3map's services on grpc-go, %d ms away <- memory" % rtt, 2)


@row('restart')
def row_restart(o):
    """A region of 1 TiB, some of it local, opened again."""
    size, some = 1 << 40, 256 * MIB
    store = os.path.join(folder(), 'local')
    uri, _ = serve('null:%d' % size)

    def again(kill):
        mark = len(things.undo)
        path, proc = mount(uri, '--mode', 'managed', '--local', 'file:%s' % store, '--pull-workers', '0', '--durable', 'local')
        act('fill', path, '--size', some)
        if kill:
            proc.kill()
            proc.wait()
            unmount(os.path.dirname(path))
        else:
            stop(path, proc)
        things.close(mark)
        mark = len(things.undo)
        began = time.monotonic()
        path, proc = mount(uri, '--mode', 'managed', '--local', 'file:%s' % store, '--pull-workers', '0', '--durable', 'local')
        with open(path, 'rb', buffering=0) as f:
            os.pread(f.fileno(), 4096, some // 2)
        took = (time.monotonic() - began) * 1e3
        stop(path, proc)
        things.close(mark)
        return took
    how = 'from starting the command to the first read that it served; 1 TiB, %d MiB of it local' % (some // MIB)
    show('restart after an orderly end', min(again(False) for _ in range(3)), 'ms', 50, 'best of 3', how, upwards=False)
    show('restart after kill -9', min(again(True) for _ in range(3)), 'ms', 1000, 'best of 3', None, upwards=False)


@row('sums')
def row_sums(o):
    size = GIB
    need_memory(3 * size)
    uri, _ = serve('mem:%d' % size)
    filler, proc = mount(uri, '--mode', 'direct')
    act('fill', filler)
    stop(filler, proc)

    def pull(source):
        mark = len(things.undo)
        path, _ = mount(source, '--mode', 'managed', '--read-only')
        r = value(act('read', path))
        things.close(mark)
        return r
    a, b = pairs(o.pairs, lambda: pull(uri), lambda: pull(uri + '?sums=0'))
    show('reading while pulling, checksums on', a / b, 'x', 0.95, rates(a, b),
         'FUSE <- region <- gRPC farpage.v1 <- memory, against the same without checksums')


# The pointer. Its other side is bench/bare: a handler that does the least, or memory of the program's own.

def numbers(*argv):
    """What a program of bench/ prints."""
    out = subprocess.run([str(a) for a in argv], capture_output=True, text=True, timeout=300)
    if out.returncode:
        raise Broken('%s: %s' % (os.path.basename(argv[0]), out.stderr.strip()[-200:]))
    return [float(w) for w in out.stdout.split() if w not in '.!']


def bare(*argv):
    return numbers(os.path.join(BUILD, 'bench', 'bare'), *argv)


def pointer(case, mechanism, *options):
    return farpage_rows('pointer', '--case', case, '--mechanism', mechanism, *options)[0]


def mechanisms(name, list_, fn):
    """fn for each; one that this kernel lacks is a line of its own."""
    for m in list_:
        try:
            fn(m)
        except Skip as e:
            print('%-44s skip: %s' % ('%s, %s' % (name, m), e))


def both(n, ours, theirs, key=lambda x: x):
    """Alternate; the whole results, best of each (less is better)."""
    a, b = [], []
    for _ in range(n):
        a.append(ours())
        b.append(theirs())
    return min(a, key=key), min(b, key=key)


@row('pointer-seq')
def row_pointer_seq(o):
    size = 512 * MIB
    need_memory(4 * size)

    def one(m):
        a, b, most, how = [], [], [0], ''
        for _ in range(o.pairs):
            r = pointer('seq', m, '--mode', 'managed', '--size', size)
            a.append(value(r))
            how = r['how']
            b.append(bare('seq', size, 4096, 'same')[0])
            try: # what this machine can do at all: new memory, zeroed by the kernel, and one copy, on every CPU
                most.append(bare('most', size, m)[0])
            except Broken:
                pass
        show('first touch in order, %s' % m, max(a) / max(b), 'x', 6 if m == 'copy' else 14,
             rates(max(a), max(b)) +
             (', this machine does %.0f at best: %.1f x' % (max(most), max(most) / max(b)) if max(most) else ''),
             how + ', mapping counted, against a bare 4 KiB handler on the same CPU')
    mechanisms('first touch in order', ('copy', 'move', 'continue'), one)


@row('pointer-share')
def row_pointer_share(o):
    size = 512 * MIB
    need_memory(2 * size)
    how = pointer('share', 'share', '--size', size)['how']
    a, b = pairs(o.pairs, lambda: value(pointer('share', 'share', '--size', size)), lambda: bare('plain', size)[0])
    show('map, populate, read: shareable backend', a / b, 'x', 0.95, rates(a, b),
         how + ', against a plain mapping with MAP_POPULATE')


@row('pointer-single')
def row_pointer_single(o):
    size, n = 512 * MIB, 1000
    need_memory(3 * size)
    for chunk in (4096, 65536):
        a, b = both(o.pairs, lambda: pointer('single', 'copy', '--chunk', chunk, '--ops', n, '--size', size),
                    lambda: bare('single', size, chunk, n, 100), key=lambda r: r['p50_us'] if isinstance(r, dict) else r[0])
        what = 'single faults at random, %d KiB each' % (chunk >> 10)
        show(what + ': p50 over bare', a['p50_us'] - b[0], 'us', 3, '%.1f against %.1f us' % (a['p50_us'], b[0]),
             a['how'] + ', against one bare handler a CPU, 100 us apart', upwards=False)
        show(what[:13] + ', %d KiB: p99 over bare' % (chunk >> 10), a['p99_us'] - b[1], 'us', 10,
             '%.1f against %.1f us' % (a['p99_us'], b[1]), None, upwards=False)


@row('pointer-first')
def row_pointer_first(o):
    size = 512 * MIB
    need_memory(3 * size)
    for chunk in (4096, 65536, MIB, 8 * MIB):
        n = min(300, size // chunk)
        a, b = both(min(o.pairs, 3), lambda: pointer('first', 'copy', '--chunk', chunk, '--size', size),
                    lambda: bare('single', size, 4096, n, 100),
                    key=lambda r: r['p50_us'] if isinstance(r, dict) else r[0])
        # The rest of a long chunk leaves little in the CPU's caches for the next fault, whoever brings it.
        cold = min(bare('first', size, chunk, n, 100)[0] for _ in range(min(o.pairs, 3)))
        show('first byte of a fault, chunk %d KiB' % (chunk >> 10), a['p50_us'] - b[0], 'us', 4,
             '%.1f against %.1f us, p50; a bare handler that brings the rest, too: %.1f' % (a['p50_us'], b[0], cold),
             a['how'] + ', against a bare 4 KiB fault' if chunk == 4096 else None, upwards=False)


@row('pointer-local')
def row_pointer_local(o):
    size = 512 * MIB
    need_memory(4 * size)

    def huge(r):
        return int(r['how'].split(', ')[2].split()[0]) >= 50

    def read(m):
        r = pointer('read', m, '--size', size)
        kind = 'huge' if huge(r) else '4k'
        a, b = pairs(o.pairs, lambda: value(pointer('read', m, '--size', size)), lambda: bare('read', size, kind)[0])
        show('reads when all is local, %s' % m, a / b, 'x', 0.98, rates(a, b),
             r['how'] + ', against memory in %s pages' % kind)

    def store(m):
        r = pointer('store', m, '--size', size)
        kind = 'huge' if huge(r) else '4k'
        a, b = both(o.pairs, lambda: pointer('store', m, '--size', size), lambda: bare('store', size, kind),
                    key=lambda r: value(r) if isinstance(r, dict) else r[0])
        show('second stores into a page, %s' % m, b[0] / value(a), 'x', 1.0, '%.2f against %.2f ns' % (value(a), b[0]),
             a['how'] + ', against memory in %s pages' % kind)
        show('first store into a page, %s' % m, a['p50_us'], 'us', 1.3, 'mean over all pages', None, upwards=False)
    mechanisms('reads when all is local', ('copy', 'move', 'continue'), read)
    mechanisms('stores when all is local', ('copy', 'move', 'continue'), store)


@row('pointer-find')
def row_pointer_find(o):
    need_memory(4 * GIB)

    def one(m):
        a, b = both(o.pairs, lambda: pointer('find', m, '--size', GIB), lambda: bare('hash', GIB),
                    key=lambda r: value(r) if isinstance(r, dict) else r[0])
        show('finding stores, 1 GiB, 1 %% of pages, %s' % m, b[0] / value(a), 'x', 80,
             '%.2f against %.1f ms' % (value(a), b[0]), a['how'] + ', against XXH3 of each 64 KiB')
    mechanisms('finding stores', ('copy', 'move'), one)


@row('pointer-pull')
def row_pointer_pull(o):
    size = GIB
    need_memory(4 * size)
    cpus = len(os.sched_getaffinity(0))

    def one(m):
        how = pointer('pull', m, '--size', 64 * MIB)['how']
        cost = []

        def pull():
            r = pointer('pull', m, '--size', size)
            cost.append(r['cpu_s_per_gib'])
            return value(r)
        a, b = pairs(o.pairs, pull, raw_tcp)
        show('pull over gRPC into a pointer, %s' % m, a / b, 'x', 0.4 if m == 'copy' else 0.6, rates(a, b),
             how + ', mapping counted, against one raw TCP stream (%s)' % congestion())
        pages = 'small' if m == 'copy' else 'huge'
        fresh = [raw_tcp_cost(pages) for _ in range(3)]
        c, cpu = max(r for r, _ in fresh), min(s for _, s in fresh)
        show('the same, against one into fresh memory', a / c, 'x', None, rates(a, c),
             'a raw TCP stream that fills 1 GiB of %s pages from 1 GiB, as a pull does; the first row: one block in cache' % pages)
        # What bounds all of them is the CPUs, which are full: at most so many bytes, however the work is divided.
        most = cpus * 1024 / cpu
        show('the same, CPU of both ends', min(cost) / cpu, 'x', None, '%.2f against %.2f s a GiB' % (min(cost), cpu),
             'raw TCP into fresh memory, without any checksum, keeps %d CPUs busy at %.0f MiB/s: %.2f of the first row\'s stream'
             % (cpus, most, most / b))
    mechanisms('pull over gRPC', ('move', 'continue', 'copy'), one)


@row('pointer-absent')
def row_pointer_absent(o):
    r = min((pointer('absent', 'copy', '--rtt', '40ms') for _ in range(1 if o.quick else 3)), key=value)
    show('64 threads, 64 absent chunks of a pointer', value(r), 'RTT', 2, 'the last one served, 40 ms', r['how'],
         upwards=False)


@row('pointer-go')
def row_pointer_go(o):
    size = 256 * MIB
    need_memory(4 * size)
    binary = go_peer()
    best = None
    for m in ('move', 'copy'):
        try:
            how = pointer('seq', m, '--mode', 'managed', '--size', size)['how']
            best = m
            break
        except Skip:
            continue
    if not best:
        raise Skip('userfaultfd does not work here')
    a, b = pairs(o.pairs, lambda: value(pointer('seq', best, '--mode', 'managed', '--size', size)),
                 lambda: numbers(binary, 'uffd-bench', size)[0])
    show('first touch in order, %s, against Go' % best, a / b, 'x', 10, rates(a, b), how + ', against userfaultfd-go v0.1.2')


@row('pointer-trace')
def row_pointer_trace(o):
    r = max((pointer('trace', 'copy', '--size', 512 * MIB) for _ in range(1 if o.quick else 2)), key=value)
    show('second start with the trace of the first', value(r), 'x', 10, r['note'], r['how'])


# ---------------------------------------------------------------------------------------------------------- main

class Options:
    quick = False
    pairs = 5


def on_signal(number, frame):
    raise KeyboardInterrupt(number)


def run_rows(o, wanted):
    global broken
    for name, fn in ROWS:
        if wanted and name not in wanted:
            continue
        mark = len(things.undo)
        try:
            fn(o)
        except Skip as e:
            print('%-44s skip: %s' % (name, e))
        except Broken as e:
            broken += 1
            print('%-44s failed: %s' % (name, e))
        sys.stdout.flush()
        things.close(mark)


def main():
    o = Options()
    wanted = [a for a in sys.argv[1:] if not a.startswith('-')]
    o.quick = '--quick' in sys.argv
    o.pairs = 2 if o.quick else 5
    unknown = [w for w in wanted if w not in [name for name, _ in ROWS]]
    if unknown or any(a.startswith('-') and a != '--quick' for a in sys.argv[1:]):
        print('usage: bench/run [--quick] [ROW...]; rows: %s' % ' '.join(name for name, _ in ROWS), file=sys.stderr)
        return 2
    if not os.access(FARPAGE, os.X_OK):
        print("bench: %s is missing. Run 'make' first." % FARPAGE, file=sys.stderr)
        return 1
    for s in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, on_signal)
    things.dir = tempfile.mkdtemp(prefix='farpage-bench.')
    things.add(shutil.rmtree, things.dir, True)
    os.environ['TMPDIR'] = things.dir
    began = time.monotonic()
    print('%d CPUs, load %.1f, kernel %s, %s; best of %d alternating pairs where nothing else is said' %
          (os.cpu_count(), os.getloadavg()[0], os.uname().release, 'root' if ROOT else 'an ordinary user', o.pairs))
    if os.getloadavg()[0] > 0.5 * os.cpu_count():
        print('other work shares this machine now: expect figures below what it can do')
    code = 0
    try:
        run_rows(o, wanted)
    except KeyboardInterrupt as e:
        code = 128 + (e.args[0] if e.args else signal.SIGINT)
        if running and running.poll() is None:
            running.kill()
            running.wait()
    finally:
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(s, signal.SIG_IGN)
        things.close()
    if code == 0:
        print('%.0f s; see bench/table.py for how each row is made' % (time.monotonic() - began))
    return code or (1 if broken else 0)


sys.exit(main())
