# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""What the tests of the command share: running it, waiting for conditions, TAP."""
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

FARPAGE = os.path.abspath(sys.argv[1])
DEADLINE = 60  # of any wait: sanitizers and a busy machine included
SLACK = 5 if 'TSAN_OPTIONS' in os.environ else 1  # of measured memory: the thread sanitizer notes much about each byte


class Skip(Exception):
    pass


class Running:
    """A farpage that runs in the background; its output is in files."""

    def __init__(self, work, args, env=None):
        self.out_path = tempfile.mktemp(dir=work, prefix='out.')
        self.err_path = self.out_path + '.err'
        with open(self.out_path, 'wb') as out, open(self.err_path, 'wb') as err:
            self.p = subprocess.Popen([FARPAGE] + args, cwd=work, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                      env=dict(os.environ, **(env or {})))

    def out(self):
        with open(self.out_path, errors='replace') as f:
            return f.read()

    def err(self):
        with open(self.err_path, errors='replace') as f:
            return f.read()

    def line(self):
        """The first line of standard output."""
        wait_for(lambda: '\n' in self.out() or self.p.poll() is not None, 'a first line of output')
        if '\n' not in self.out():
            raise AssertionError('it ended with %s: %s' % (self.p.returncode, self.err()))
        return self.out().split('\n')[0]

    def end(self, number=signal.SIGTERM):
        """Signal and wait; the exit code."""
        if self.p.poll() is None:
            self.p.send_signal(number)
        return self.p.wait(DEADLINE)


class World:
    """A private directory and the processes of one case; all gone at its end."""

    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix='farpage-cli.')
        self.running = []

    def path(self, name):
        return os.path.join(self.dir, name)

    def run(self, *args, stdin=None, timeout=DEADLINE, code=None, env=None):
        feed = {'stdin': subprocess.DEVNULL} if stdin is None else {'input': stdin}
        p = subprocess.run([FARPAGE] + list(args), cwd=self.dir, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           timeout=timeout, env=dict(os.environ, **(env or {})), **feed)
        p.out, p.err = p.stdout.decode(errors='replace'), p.stderr.decode(errors='replace')
        if code is not None:
            equal(p.returncode, code, 'exit code of farpage %s: %s' % (' '.join(args), p.err))
        return p

    def start(self, *args, env=None):
        r = Running(self.dir, list(args), env)
        self.running.append(r)
        return r

    def serve(self, *sources, listen='grpc://127.0.0.1:0'):
        """(running, uri) of a server."""
        s = self.start('serve', *sources, '--listen', listen)
        line = s.line()
        true(line.startswith('listening '), line)
        return s, line.split()[1]

    def mount(self, *args):
        need_fuse()
        m = self.start('mount', *args)
        m.path = m.line()
        return m

    def file(self, name, size, seed=1, holes=()):
        data = bytearray(random.Random(seed).randbytes(size))
        for a, b in holes:
            data[a:b] = bytes(b - a)
        with open(self.path(name), 'wb') as f:
            f.write(data)
        return bytes(data)

    def read(self, name):
        with open(self.path(name), 'rb') as f:
            return f.read()

    def status(self, target):
        return json.loads(self.run('status', target, '--json', code=0).out)

    def status_map(self, path):
        return json.loads(self.run('info', path, '--json', code=0).out)

    def close(self):
        for r in reversed(self.running):  # mounts before the servers that they need
            if r.p.poll() is None:
                r.p.send_signal(signal.SIGCONT)
                r.p.terminate()
            try:
                r.p.wait(10)
            except subprocess.TimeoutExpired:
                r.p.kill()
                r.p.wait()
        with open('/proc/self/mountinfo') as f:
            for line in f:
                where = line.split()[4]
                if where.startswith(self.dir + '/'):
                    subprocess.run(['umount', '-l', where] if os.geteuid() == 0 else ['fusermount3', '-uz', where],
                                   stderr=subprocess.DEVNULL)
        shutil.rmtree(self.dir, ignore_errors=True)


def need_fuse():
    if not os.access('/dev/fuse', os.R_OK | os.W_OK):
        raise Skip('/dev/fuse is missing or not open to this user')


def wait_for(condition, what, seconds=DEADLINE):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError('%s did not come within %d s' % (what, seconds))
        time.sleep(0.02)


def true(condition, what=''):
    if not condition:
        raise AssertionError(what or 'it is not so')


def equal(got, wanted, what=''):
    if got != wanted:
        raise AssertionError('%s: got %r, wanted %r' % (what, short(got), short(wanted)))


def short(v):
    return v if not isinstance(v, (bytes, str)) or len(v) < 300 else (hashlib.sha256(
        v if isinstance(v, bytes) else v.encode()).hexdigest(), len(v))


def has(text, *words):
    for w in words:
        if w not in text:
            raise AssertionError('%r is not in %r' % (w, text))


def message(text):
    """A message names farpage, has no second 'farpage:' inside, and ends with a full stop."""
    lines = [x for x in text.splitlines() if x.startswith('farpage: ')]
    true(lines, 'no message in %r' % text)
    true(lines[-1].rstrip().endswith(('.', '?')), 'no full stop: %r' % lines[-1])


def cell(peer, role, condition=None):
    """A case belongs into this cell of what tests/interop/results prints; with a condition into a table of those, too."""
    def mark(case):
        case.cell = (peer, role) + ((condition,) if condition else ())
        return case
    return mark


def main(cases):
    """Run the functions as TAP cases; each gets a World."""
    only = sys.argv[2:]
    cases = [c for c in cases if not only or c.__name__ in only]
    print('1..%d' % len(cases), flush=True)
    failed = 0
    for i, case in enumerate(cases, 1):
        name = case.__name__.replace('_', ' ')
        w = World()
        began = time.monotonic()
        if hasattr(case, 'cell'):
            print('# cell: ' + ' | '.join(case.cell), flush=True)
        try:
            case(w)
            print('ok %d - %s' % (i, name), flush=True)
        except Skip as e:
            print('ok %d - %s # SKIP %s' % (i, name, e), flush=True)
        except Exception:
            failed += 1
            for line in traceback.format_exc().splitlines():
                print('# ' + line)
            for r in w.running:
                print('# %s: exit %s, err: %r' % (' '.join(r.p.args[1:]), r.p.poll(), r.err()[-2000:]))
            print('not ok %d - %s' % (i, name), flush=True)
        finally:
            w.close()
        if time.monotonic() - began > 3:
            print('# %s took %.1f s' % (name, time.monotonic() - began), flush=True)
    sys.exit(1 if failed else 0)
