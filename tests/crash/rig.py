# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""What the crash tests share: a world that is always cleaned up, a disk that loses power, a link that fails."""
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'system'))
import cli_lib  # noqa: E402
from cli_lib import Skip, World, need_fuse, true, wait_for  # noqa: E402,F401

if os.environ.get('FARPAGE'):
    cli_lib.FARPAGE = os.path.abspath(os.environ['FARPAGE'])
SLOW = 4 if os.environ.get('TSAN_OPTIONS') else 2 if os.environ.get('ASAN_OPTIONS') else 1


def say(text):
    print('# ' + text, flush=True)


def tell(argv, timeout=30, check=True, **more):
    """Run a command of the system; its output. A failure names it."""
    p = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                       timeout=timeout, errors='replace', **more)
    if check and p.returncode:
        raise AssertionError('%s: exit %d: %s' % (' '.join(argv), p.returncode, p.stdout.strip()))
    return p.stdout


def mounts_under(path):
    """Mount points at or below path, innermost first."""
    with open('/proc/self/mountinfo') as f:
        found = [line.split()[4] for line in f]
    return [m for m in reversed(found) if m == path or m.startswith(path + '/')]


def loops_of(path):
    """Loop devices on a file below path. The name is the kernel's: it is there after the mount has died, too."""
    found = []
    for name in os.listdir('/sys/block'):
        try:
            with open('/sys/block/%s/loop/backing_file' % name) as f:
                if f.read().startswith(path):
                    found.append('/dev/' + name)
        except OSError:
            pass
    return found


def detach(device, seconds=15):
    """Free a loop device. While a lazily unmounted file system is on its way out the kernel only notes the wish."""
    end = time.monotonic() + seconds
    while os.path.exists('/sys/block/%s/loop/backing_file' % os.path.basename(device)):
        subprocess.run(['losetup', '-d', device], stderr=subprocess.DEVNULL, timeout=30)
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def clear(path):
    """Unmount all below path, dead or alive, and free loop devices on files there."""
    loops = loops_of(path)
    for _ in range(3):
        for m in mounts_under(path):
            lazy = ['umount', '-l', m] if os.geteuid() == 0 else ['fusermount3', '-uz', m]
            subprocess.run(lazy, stderr=subprocess.DEVNULL, timeout=30)
    return all([detach(d) for d in loops])


def need_root():
    if os.geteuid() != 0:
        raise Skip('loop devices and mounting need root')
    if not os.path.exists('/dev/loop-control'):
        raise Skip('/dev/loop-control is missing: no loop devices')


class Rig(World):
    """A World with disks and links."""

    def __init__(self):
        super().__init__()
        self.links = []

    def umount(self, name):
        """Take a dead mount away."""
        for m in mounts_under(self.path(name)):
            tell(['umount', '-l', m] if os.geteuid() == 0 else ['fusermount3', '-uz', m])

    def forget(self, r):
        if r in self.running:
            self.running.remove(r)

    def kill(self, r):
        r.p.kill()
        r.p.wait(30)
        self.forget(r)
        true('Sanitizer' not in r.err() and 'runtime error' not in r.err(), r.err())

    def close(self):
        for link in self.links:
            link.close()
        for r in self.running:  # those that do not end by themselves would hold the rest
            if r.p.poll() is None:
                r.p.kill()
        clear(self.dir)
        super().close()


class Disk:
    """ext4 on a loop device. cut() is what a power cut leaves of it: nothing that was not synced."""

    SHUTDOWN, NOLOGFLUSH = 0x8004587d, b'\2\0\0\0'

    def __init__(self, w, name, mib):
        need_root()
        self.dir = w.path(name)
        self.image = w.path(name + '.disk')
        self.w = w
        with open(self.image, 'wb') as f:
            f.truncate(mib << 20)
        tell(['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0,nodiscard', self.image])
        os.mkdir(self.dir)
        try:
            self.device = tell(['losetup', '-f', '--show', self.image]).strip()
            tell(['mount', self.device, self.dir])
        except AssertionError as e:
            raise Skip('no loop mount: %s' % e) from None

    def cut(self):
        """Nobody may have it open any more."""
        fd = os.open(self.dir, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, self.SHUTDOWN, self.NOLOGFLUSH)
        finally:
            os.close(fd)
        wait_for(lambda: subprocess.run(['umount', self.dir], stderr=subprocess.DEVNULL).returncode == 0,
                 'an unmount of the disk that lost power', 20)
        # The device may still be answering for the old one.
        wait_for(lambda: subprocess.run(['mount', self.device, self.dir], stderr=subprocess.DEVNULL).returncode == 0,
                 'a mount of %s after the power cut' % self.device, 20)


class Link:
    """A TCP proxy. `state` is what happens to bytes and to new connections: 'up', 'silent' (nothing is carried, nobody
    is told) or 'cut' (connections end, new ones are refused). With hold() what clients have sent is kept back while
    they may die; release() delivers it to the server then: the writes of the dead."""

    def __init__(self, w, port):
        self.port, self.state, self.delay = port, 'up', 0.0
        self.lock = threading.Lock()
        self.pairs = []
        self.closed = False
        self.s = socket.socket()
        self.s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.s.bind(('127.0.0.1', 0))
        self.s.listen(64)
        self.here = self.s.getsockname()[1]
        w.links.append(self)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while not self.closed:
            try:
                c, _ = self.s.accept()
            except OSError:
                return
            if self.state == 'cut':
                c.close()
                continue
            threading.Thread(target=self.connect, args=(c,), daemon=True).start()

    def connect(self, c):
        while self.state == 'silent' and not self.closed:
            time.sleep(0.01)
        try:
            d = socket.create_connection(('127.0.0.1', self.port), 5)
            d.settimeout(None)
        except OSError:
            c.close()
            return
        for s in (c, d):
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = {'ends': (c, d), 'held': None}
        with self.lock:
            self.pairs.append(pair)
        threading.Thread(target=self.carry, args=(pair, c, d, True), daemon=True).start()
        self.carry(pair, d, c, False)

    def carry(self, pair, src, dst, up):
        try:
            while True:
                data = src.recv(1 << 18)
                while self.state == 'silent' and not self.closed:
                    time.sleep(0.005)
                if self.delay:
                    time.sleep(self.delay)
                with self.lock:
                    if up and pair['held'] is not None:
                        pair['held'].append(data)
                        if not data:
                            return
                        continue
                if not data:
                    break
                dst.sendall(data)
        except OSError:
            pass
        with self.lock:
            if pair['held'] is not None:
                return
        self.end(pair)

    def end(self, pair):
        for s in pair['ends']:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            s.close()
        with self.lock:
            if pair in self.pairs:
                self.pairs.remove(pair)

    def cut(self):
        self.state = 'cut'
        with self.lock:
            pairs = list(self.pairs)
        for p in pairs:
            self.end(p)

    def silence(self):
        self.state = 'silent'

    def up(self):
        """What was silent stays dead, as after a change of the address; what comes now is carried."""
        if self.state == 'silent':
            with self.lock:
                pairs = list(self.pairs)
            for p in pairs:
                self.end(p)
        self.state = 'up'

    def hold(self):
        with self.lock:
            for p in self.pairs:
                p['held'] = []

    def held(self):
        with self.lock:
            return sum(len(d) for p in self.pairs for d in p['held'] or ())

    def release(self):
        """Bytes that were delivered late."""
        with self.lock:
            held = [p for p in self.pairs if p['held'] is not None]
        late = 0
        for p in held:
            try:
                for data in list(p['held']):
                    p['ends'][1].sendall(data)
                    late += len(data)
            except OSError:
                pass
        return late, held

    def close(self):
        self.closed = True
        self.s.close()
        with self.lock:
            pairs = list(self.pairs)
        for p in pairs:
            self.end(p)


def ends_on_sigterm():
    """A test that is told to end cleans up first."""
    def stop(number, frame):
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def options_of(verb):
    """What this farpage's verb can do: the words of its help."""
    p = subprocess.run([cli_lib.FARPAGE, verb, '--help'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    return set(x.strip(',') for x in p.stdout.decode().split() if x.startswith('--'))


def port_of(uri):
    return int(uri.split(':')[2].split('/')[0])


tempfile.tempdir = os.environ.get('TMPDIR') or ('/dev/shm' if os.access('/dev/shm', os.W_OK) else None)
