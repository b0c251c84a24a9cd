#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""nbd_client.py FARPAGE [CASE...]: nbd:// regions of servers that are not ours, healthy and failing."""
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

from cli_lib import FARPAGE, Skip, cell, equal, has, main, message, need_fuse, true, wait_for
from nbd_lib import Other, answers, free_port, need
from tcp_lib import Between, Listener

MIB = 1 << 20


def nbdkit(w, *args, port=None, tls=()):
    """(server, uri)"""
    need('nbdkit')
    port = port or free_port()
    s = Other(w, ['nbdkit', '-f', '-i', '127.0.0.1', '-p', str(port), *tls, *args])
    wait_for(lambda: answers(port) or s.p.poll() is not None, 'nbdkit')
    true(s.p.poll() is None, s.err())
    return s, 'nbd://127.0.0.1:%d' % port


def unix(w, args, name='sock'):
    s = Other(w, args)
    wait_for(lambda: os.path.exists(w.path(name)) or s.p.poll() is not None, args[0])
    true(s.p.poll() is None, s.err())
    return s, 'nbd+unix:///?socket=%s' % w.path(name)


def there_and_back(w, uri, size, name='a', **kw):
    """Write all of it, read it back by farpage, and let nbdcopy read it."""
    data = w.file(name, size, holes=[(size // 4, size // 2)])
    w.run('copy', 'file:' + name, uri, code=0)
    w.run('copy', uri, 'file:back', code=0)
    equal(w.read('back'), data, 'read back by farpage')
    os.unlink(w.path('back'))
    return data


def nbdkit_memory(w):
    s, uri = nbdkit(w, 'memory', '8M')
    data = there_and_back(w, uri + '/', 8 * MIB)
    has(w.run('info', uri, code=0).out, '8388608 bytes', 'write durable remote')
    if shutil.which('nbdcopy'):
        subprocess.run(['nbdcopy', uri, w.path('theirs')], check=True, timeout=60)
        equal(w.read('theirs'), data, 'read back by nbdcopy')


def nbdkit_with_less(w):
    """Without structured replies, zeroing, several connections, trim; small largest request; large smallest one."""
    for args in (['--no-sr', '--filter=nozero', '--filter=multi-conn', 'memory', '3M', 'multi-conn-mode=disable'],
                 ['--filter=blocksize-policy', 'memory', '3M', 'blocksize-minimum=4096', 'blocksize-maximum=64K',
                  'blocksize-preferred=4K', 'blocksize-error-policy=error'],
                 ['--filter=noextents', '--filter=noparallel', 'memory', '3M']):
        s, uri = nbdkit(w, *args)
        there_and_back(w, uri, 3 * MIB)
        s.kill()


def an_end_that_no_block_reaches(w):
    s, uri = nbdkit(w, '--filter=blocksize-policy', 'memory', '1000000', 'blocksize-minimum=512', 'blocksize-preferred=4K',
                    'blocksize-maximum=1M', 'blocksize-error-policy=error')
    r = w.run('info', uri, code=2)
    message(r.err)
    has(r.err, 'multiple', '512')


def read_only_exports(w):
    w.file('a', MIB)
    s, uri = nbdkit(w, '-r', 'file', w.path('a'))
    w.run('copy', uri, 'file:b', code=0)
    equal(w.read('b'), w.read('a'))
    message(w.run('copy', 'file:a', uri, code=1).err)


def exports_by_name(w):
    for n in ('one', 'two'):
        os.makedirs(w.path('d'), exist_ok=True)
        w.file('d/' + n, MIB, seed=len(n) + ord(n[0]))
    s, uri = nbdkit(w, 'file', 'dir=' + w.path('d'))
    for n in ('one', 'two'):
        w.run('copy', uri + '/' + n, 'file:x', code=0)
        equal(w.read('x'), w.read('d/' + n))
    r = w.run('info', uri + '/three', code=1)
    message(r.err)


def qemu_nbd(w):
    need('qemu-nbd')
    for args in ([], ['-e', '4']):
        w.file('q', 4 * MIB)
        s, uri = unix(w, ['qemu-nbd', '-t', '-f', 'raw', '-k', w.path('sock'), *args, w.path('q')])
        there_and_back(w, uri, 4 * MIB)
        s.p.terminate()
        s.p.wait()
        equal(w.read('q'), w.read('a'), 'what qemu-nbd has written')
        if os.path.exists(w.path('sock')):
            os.unlink(w.path('sock'))


def qemu_nbd_qcow2(w):
    """Holes of an image are zero extents."""
    need('qemu-nbd', 'qemu-img')
    subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', w.path('q'), '64M'], check=True, timeout=60)
    s, uri = unix(w, ['qemu-nbd', '-t', '-f', 'qcow2', '-k', w.path('sock'), w.path('q')])
    has(w.run('info', uri, code=0).out, '0 B data, 64 MiB zeros')
    there_and_back(w, uri + '&size=64M', 64 * MIB)


def qemu_storage_daemon(w):
    need('qemu-storage-daemon')
    w.file('q', 4 * MIB)
    s, uri = unix(w, ['qemu-storage-daemon', '--blockdev', 'driver=file,node-name=f,filename=' + w.path('q'),
                      '--nbd-server', 'addr.type=unix,addr.path=' + w.path('sock'),
                      '--export', 'type=nbd,id=e,node-name=f,name=disk,writable=on'])
    there_and_back(w, uri.replace('///', '///disk'), 4 * MIB)
    equal(w.read('q'), w.read('a'))


def nbd_server(w):
    need('nbd-server')
    port = free_port()
    w.file('q', 4 * MIB)
    with open(w.path('conf'), 'w') as f:
        f.write('[generic]\nport = %d\nlistenaddr = 127.0.0.1\nallowlist = true\n[disk]\nexportname = %s\nflush = true\n'
                'fua = true\ntrim = true\n' % (port, w.path('q')))
    # It knows no foreground in which it serves more than one connection.
    Other(w, ['nbd-server', '-C', w.path('conf'), '-p', w.path('pid')])
    wait_for(lambda: answers(port), 'nbd-server')
    try:
        there_and_back(w, 'nbd://127.0.0.1:%d/disk' % port, 4 * MIB)
        equal(w.read('q'), w.read('a'), 'what nbd-server has written')
    finally:
        os.kill(int(w.read('pid')), signal.SIGTERM)


def errors_are_told(w):
    """What the server answers is what the caller hears; it is not tried for ever."""
    s, uri = nbdkit(w, '--filter=noextents', '--filter=error', 'memory', '4M', 'error-pread=ENOSPC', 'error-pread-rate=100%')
    r = w.run('copy', uri, 'null:', code=1)
    message(r.err)
    has(r.err, 'No space left')
    s.kill()
    s, uri = nbdkit(w, '--filter=noextents', '--filter=error', 'memory', '4M', 'error-pwrite=EPERM', 'error-pwrite-rate=100%')
    w.file('a', 4 * MIB)
    message(w.run('copy', 'file:a', uri, code=1).err)


def errors_now_and_then(w):
    s, uri = nbdkit(w, '--filter=noextents', '--filter=error', 'memory', '8M', 'error-pread=EIO', 'error-pread-rate=20%')
    data = w.file('a', 8 * MIB)
    w.run('copy', 'file:a', uri, code=0)
    w.run('copy', uri, 'file:b', '--layer', 'retry:backoff=1ms,max-backoff=2ms', code=0)
    equal(w.read('b'), data)


def slow_ones_are_given_up(w):
    """A call that takes too long ends its connection; buffers are let go, and nothing hangs."""
    s, uri = nbdkit(w, '--filter=noextents', '--filter=delay', 'memory', '4M', 'rdelay=60')
    began = time.monotonic()
    r = w.run('copy', uri + '?timeout=300ms', 'null:')
    true(r.returncode, 'a read that took a minute')
    message(r.err)
    has(r.err, 'timed out')
    true(time.monotonic() - began < 20, 'it took too long')


def paused(w, path, *commands):
    """Tell nbdkit's pause filter; it answers each with the same letter."""
    with socket.socket(socket.AF_UNIX) as c:
        c.settimeout(30)
        c.connect(path)
        for command in commands:
            c.sendall(command)
            equal(c.recv(1), command.upper(), 'answer of the pause filter')


def a_server_that_pauses(w):
    """nbdkit's pause filter: requests hang and go on. A short pause is waited for, a long one is an error in time, and what
    came before and after has the right bytes."""
    control = w.path('control')
    s, uri = nbdkit(w, '--filter=pause', '--filter=delay', 'memory', '8M', 'pause-control=' + control, 'rdelay=1ms', 'wdelay=1ms')
    data = w.file('a', 8 * MIB)
    for what in (['file:a', uri], [uri, 'file:b']):
        fds = lambda: len(os.listdir('/proc/%d/fd' % s.p.pid))
        paused(w, control, b'p')
        before = fds()
        r = w.start('copy', *what)
        wait_for(lambda: fds() > before or r.p.poll() is not None, 'the connection')
        true(r.p.poll() is None, 'it did not wait: ' + r.err())
        paused(w, control, b'r')
        equal(r.p.wait(60), 0, r.err())
    equal(w.read('b'), data)
    paused(w, control, b'p')
    began = time.monotonic()
    r = w.run('copy', uri + '?timeout=400ms', 'null:', '--deadline', '2s')
    true(r.returncode in (1, 4), 'exit %d: %s' % (r.returncode, r.err))
    message(r.err)
    true(time.monotonic() - began < 20, 'it took too long')
    paused(w, control, b'r')
    w.run('copy', uri, 'file:b', code=0)
    equal(w.read('b'), data)


def slow_in_every_way(w):
    """The filters delay, rate and blocksize, and both of multi-conn's ways to say that connections agree."""
    for args in (['--filter=delay', 'memory', '2M', 'rdelay=3ms', 'wdelay=5ms', 'delay-zero=5ms', 'delay-extents=20ms', 'delay-open=50ms'],
                 ['--filter=rate', 'memory', '2M', 'rate=100M', 'connection-rate=50M'],
                 ['--filter=blocksize', 'memory', '2M', 'minblock=4096', 'maxdata=64K', 'maxlen=128K'],
                 ['--filter=multi-conn', 'memory', '2M', 'multi-conn-mode=emulate'],
                 ['--filter=multi-conn', '--filter=fua', 'memory', '2M', 'multi-conn-mode=plugin', 'fuamode=force'],
                 ['--filter=error', '--filter=noextents', 'memory', '2M', 'error-pwrite=ENOSPC', 'error-pwrite-rate=0%',
                  'error-zero=EIO', 'error-zero-rate=0%']):
        s, uri = nbdkit(w, *args)
        there_and_back(w, uri, 2 * MIB)
        s.kill()


def zeroing_fails(w):
    """What the server cannot zero is told, or written; never left as it was."""
    s, uri = nbdkit(w, '--filter=error', 'memory', '2M', 'error-zero=EIO', 'error-zero-rate=100%')
    w.file('x', 2 * MIB, seed=5)
    w.run('copy', 'file:x', uri, code=0)
    data = w.file('a', 2 * MIB, holes=[(MIB, 2 * MIB)])
    r = w.run('copy', 'file:a', uri)
    w.run('copy', uri, 'file:b', code=0)
    if r.returncode:
        message(r.err)
    else:
        equal(w.read('b'), data)


def stopped_server(w):
    """SIGSTOP: neither an answer nor an end of the connection. Then it goes on."""
    s, uri = nbdkit(w, 'memory', '4M')
    data = w.file('a', 4 * MIB)
    w.run('copy', 'file:a', uri, code=0)
    os.kill(s.p.pid, signal.SIGSTOP)
    r = w.run('copy', uri + '?timeout=500ms', 'null:', '--deadline', '1s')
    true(r.returncode in (1, 4), 'exit %d' % r.returncode)
    message(r.err)
    os.kill(s.p.pid, signal.SIGCONT)
    w.run('copy', uri, 'file:b', code=0)
    equal(w.read('b'), data)


def lost_and_found(w):
    """A managed mount: the server is killed and comes back; the pull goes on, what was written is pushed."""
    need_fuse()
    data = bytearray(w.file('a', 8 * MIB))
    w.file('t', 0)
    s, uri = nbdkit(w, '--filter=rate', 'file', w.path('a'), 'rate=32M')
    port = int(uri.rsplit(':', 1)[1])
    m = w.mount(uri, 't', '--mode', 'managed', '--deadline', '20s')
    s.kill()
    s, uri = nbdkit(w, 'file', w.path('a'), port=port)
    with open(w.path('t'), 'r+b', buffering=0) as f:
        f.seek(5 * MIB)
        f.write(b'x' * 10000)
        os.fsync(f.fileno())
        data[5 * MIB:5 * MIB + 10000] = b'x' * 10000
        f.seek(0)
        got = b''
        while len(got) < len(data):
            got += f.read(MIB)
    equal(got, bytes(data))
    equal(w.read('a'), bytes(data), 'at the server')
    equal(m.end(), 0, 'end of the mount: ' + m.err())


def another_export_is_refused(w):
    """After a reconnect another size: nothing is read from it, nothing written to it."""
    need_fuse()
    w.file('a', 4 * MIB)
    other = w.file('b', 5 * MIB, seed=9)
    w.file('t', 0)
    s, uri = nbdkit(w, 'file', w.path('a'))
    port = int(uri.rsplit(':', 1)[1])
    m = w.mount(uri, 't', '--mode', 'direct', '--deadline', '2s')
    s.kill()
    s, uri = nbdkit(w, 'file', w.path('b'), port=port)
    for op in (lambda fd: os.pread(fd, 4096, MIB), lambda fd: (os.pwrite(fd, b'y' * 4096, 0), os.fsync(fd))):
        fd = os.open(w.path('t'), os.O_RDWR)
        try:
            op(fd)
            raise AssertionError('it went through')
        except OSError:
            pass
        finally:
            try:
                os.close(fd)
            except OSError:
                pass
    m.end()
    equal(w.read('b'), other, 'what is there now')


def begun_without_the_server(w):
    """What is in the local store can be read while the server is away; then it goes on."""
    need_fuse()
    data = bytearray(w.file('a', 2 * MIB))
    os.mkdir(w.path('d'))
    s, uri = nbdkit(w, 'file', w.path('a'))
    port = int(uri.rsplit(':', 1)[1])
    m = w.mount(uri, 'd', '--local', 'file:cache')
    w.run('wait', 'd', '--local', '100%', code=0)
    equal(m.end(), 0, m.err())
    s.kill()
    m = w.mount(uri, 'd', '--local', 'file:cache', '--deadline', '20s')
    equal(w.read('d/region'), bytes(data), 'while it is away')
    s, uri = nbdkit(w, 'file', w.path('a'), port=port)
    with open(m.path, 'r+b', buffering=0) as f:
        f.write(b'new')
        os.fsync(f.fileno())
    equal(w.read('a')[:3], b'new')
    equal(m.end(), 0, m.err())


def fsx_on_both_mounts(w):
    fsx = os.path.join(os.path.dirname(FARPAGE), 'tests/system/fsx')
    if not os.access(fsx, os.X_OK):
        raise Skip('fsx is not built')
    s, uri = nbdkit(w, 'memory', '1M')
    for mode in ('managed', 'direct'):
        w.file(mode, 0)
        m = w.mount(uri, mode, '--mode', mode)
        subprocess.run([fsx, w.path(mode), '1500', '3'], check=True, timeout=120, stdout=subprocess.DEVNULL)
        equal(m.end(), 0, m.err())


def direct_mount(w):
    need_fuse()
    data = bytearray(w.file('a', 4 * MIB))
    w.file('t', 0)
    s, uri = nbdkit(w, 'file', w.path('a'))
    m = w.mount(uri, 't', '--mode', 'direct')
    with open(w.path('t'), 'r+b', buffering=0) as f:
        f.seek(12345)
        f.write(b'z' * 5000)
        data[12345:17345] = b'z' * 5000
        os.fsync(f.fileno())
    equal(w.read('t'), bytes(data))
    equal(w.read('a'), bytes(data), 'at the server')
    equal(m.end(), 0, m.err())


def certificates(w, ca, host='localhost', days=2):
    """A CA in directory `ca`, and a server's certificate by it for `host`."""
    need('openssl')
    d = w.path(ca)
    os.makedirs(d)

    def openssl(*args):
        subprocess.run(['openssl', *args], cwd=d, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    openssl('req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', 'ca-key.pem', '-out', 'ca-cert.pem', '-days', '2',
            '-subj', '/CN=' + ca)
    for name in ('server', 'client'):
        openssl('req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-keyout', name + '-key.pem', '-out', name + '.csr', '-subj',
                '/CN=' + host)
        with open(os.path.join(d, 'ext'), 'w') as f:
            f.write('subjectAltName=DNS:%s\n' % host)
        openssl('x509', '-req', '-in', name + '.csr', '-CA', 'ca-cert.pem', '-CAkey', 'ca-key.pem', '-CAcreateserial',
                '-out', name + '-cert.pem', '-days', str(days), '-extfile', 'ext')
    return d


def refused(w, uri, *words):
    r = w.run('info', uri, '--deadline', '5s')
    true(r.returncode in (1, 2), 'exit %d of %s: %s' % (r.returncode, uri, r.err))
    message(r.err)
    has(r.err, *words)


def tls_by_certificates(w):
    good, other = certificates(w, 'good'), certificates(w, 'other')
    named, old = certificates(w, 'named', host='else.where'), certificates(w, 'old', days=-1)

    def server(d, *args, tls='require'):
        s, uri = nbdkit(w, *args, 'memory', '3M', tls=['--tls=' + tls, '--tls-certificates=' + d])
        return uri.replace('nbd://127.0.0.1', 'nbds://localhost')
    uri = server(good, '--tls-verify-peer')
    there_and_back(w, uri + '?tls-certificates=' + good, 3 * MIB)
    refused(w, uri + '?tls-certificates=' + other)          # another CA, on both sides
    refused(w, server(good))                                # the system's
    refused(w, uri.replace('nbds', 'nbd'))                  # in the clear
    refused(w, uri + '?tls-certificates=' + w.path('none'), 'ca-cert.pem')
    refused(w, server(good) + '?tls-certificates=' + other)
    refused(w, server(named) + '?tls-certificates=' + named)  # another name
    refused(w, server(old) + '?tls-certificates=' + old)      # expired
    w.run('info', server(named) + '?tls-verify=0&tls-certificates=' + named, code=0)
    refused(w, server(good, tls='off') + '?tls-certificates=' + good)  # no TLS there: no fall-back
    w.run('info', server(good, tls='on') + '?tls-certificates=' + good, code=0)


def tls_by_psk(w):
    with open(w.path('keys'), 'w') as f:
        f.write('alice:%s\nbob:%s\n' % ('11' * 32, '22' * 32))
    with open(w.path('wrong'), 'w') as f:
        f.write('alice:%s\n' % ('33' * 32))
    s, uri = nbdkit(w, 'memory', '3M', tls=['--tls=require', '--tls-psk=' + w.path('keys')])
    uri = uri.replace('nbd://', 'nbds://alice@')
    there_and_back(w, uri + '?tls-psk-file=' + w.path('keys'), 3 * MIB)
    refused(w, uri + '?tls-psk-file=' + w.path('wrong'))
    refused(w, uri.replace('alice', 'carol') + '?tls-psk-file=' + w.path('keys'))
    refused(w, uri + '?tls-psk-file=/none', '/none')


def cut_at(w, port, data, up, down):
    """The link is cut once: copying with retries still brings every byte, or opening fails with a message."""
    c = Between(port, cut=(up, down), once=True)
    try:
        r = w.run('copy', 'nbd://127.0.0.1:%d?connections=1&max-request=4K&timeout=2s' % c.port, 'file:b', '--workers', '4', '--layer',
                  'retry:backoff=1ms,max-backoff=2ms')
        if r.returncode:
            true(c.was_cut, 'a failure without a cut: ' + r.err)
            message(r.err)
        else:
            equal(w.read('b'), data, 'cut after %d up, %d down' % (up, down))
        return r.returncode == 0 and c.was_cut
    finally:
        c.close()
        if os.path.exists(w.path('b')):
            os.unlink(w.path('b'))


def link_cut_here_and_there(w):
    """By the command; tests/wire/nbd_cuts.py has every byte."""
    data = w.file('a', 64 << 10)
    s, uri = nbdkit(w, 'file', w.path('a'))
    port = int(uri.rsplit(':', 1)[1])
    mended = 0
    far = 1 << 30
    for n in range(1, 600, 61):
        mended += cut_at(w, port, data, n, far)
    for n in list(range(1, 400, 61)) + [4000, 5000, 20000]:
        mended += cut_at(w, port, data, far, n)
    true(mended > 3, 'no cut hit what could be mended')


def matrix(w):
    """Every server, by every number of connections and size of requests, whole and in pieces."""
    n = 0
    for server in ([], ['--no-sr'], ['--filter=noparallel'], ['--filter=multi-conn', 'multi-conn-mode=emulate'],
                   ['--filter=multi-conn', 'multi-conn-mode=disable'], ['--filter=delay', 'rdelay=1ms', 'wdelay=2ms'],
                   ['--filter=rate', 'rate=200M'], ['--filter=blocksize', 'maxdata=64K', 'minblock=4K'],
                   ['--filter=error', 'error-pread=EIO', 'error-pread-rate=5%']):
        filters = [x for x in server if x.startswith('--')]
        s, uri = nbdkit(w, *filters, 'memory', '16M', *[x for x in server if not x.startswith('--')])
        data = w.file('a', 16 * MIB, holes=[(5 * MIB, 9 * MIB)])
        for q in ('?connections=1', '?connections=16', '?max-request=512', '?max-request=32M'):
            if q == '?max-request=512' and filters in (['--filter=delay'], ['--filter=error']):
                continue
            w.run('copy', 'file:a', uri + q, code=0)
            w.run('copy', uri + q, 'file:b', '--layer', 'retry:backoff=1ms', code=0)
            equal(w.read('b'), data, ' '.join(server) + q)
            n += 1
        s.kill()
    print('# %d combinations' % n)


def refused_uris(w):
    for uri, words in (('nbd:///x', ['host']), ('nbd+unix:///x', ['socket']), ('nbd://h?socket=/x', ['socket']),
                       ('nbd://h?tls-psk-file=/x', ['nbds']), ('nbd://h?nonsense=1', ['nonsense', 'connections']),
                       ('nbds+unix:///?socket=/x', ['tls-psk-file'])):
        r = w.run('info', uri)
        true(r.returncode in (1, 2), uri)
        message(r.err)
        has(r.err, *words)
    r = w.run('info', 'nbd://127.0.0.1:%d' % free_port(), code=1)
    message(r.err)
    has(r.err, 'refused')


# -------------------------------------------------------------------------------------------------- hostile servers

class Hostile(Listener):
    """Fixed newstyle up to the transmission phase of a 1 MiB export; then each request is given to fn(conn, request)."""

    def __init__(self, fn, flags=1 | 4 | 8, size=MIB):
        self.then, self.flags, self.size = fn, flags, size
        super().__init__(self.talk)

    def uri(self):
        return 'nbd://127.0.0.1:%d?timeout=500ms' % self.port

    def need(self, c, n):
        b = b''
        while len(b) < n:
            x = c.recv(n - len(b))
            if not x:
                raise OSError('end')
            b += x
        return b

    def talk(self, c):
        c.sendall(b'NBDMAGICIHAVEOPT' + struct.pack('>H', 3))
        self.need(c, 4)
        while True:
            _, opt, n = struct.unpack('>8sII', self.need(c, 16))
            self.need(c, n)
            reply = lambda t, b=b'': c.sendall(struct.pack('>QIII', 0x3e889045565a9, opt, t, len(b)) + b)
            if opt == 8 and self.flags & 1 << 20:
                reply(1)
            elif opt == 7:
                reply(3, struct.pack('>HQH', 0, self.size, self.flags & 0xffff))
                reply(1)
                break
            else:
                reply(0x80000001)
        while True:
            _, flags, cmd, cookie, off, n = struct.unpack('>IHHQQI', self.need(c, 28))
            if cmd == 2:
                return
            self.then(c, cmd, cookie, off, n)


def hostile(fn, **kw):
    def run(w):
        h = Hostile(fn, **kw)
        try:
            began = time.monotonic()
            r = w.run('copy', h.uri(), 'file:out')
            true(r.returncode in (1, 4), 'exit %d: %s' % (r.returncode, r.err))
            message(r.err)
            true(time.monotonic() - began < 30, 'it took too long')
        finally:
            h.close()
    return run


def simple(cookie, error=0):
    return struct.pack('>IIQ', 0x67446698, error, cookie)


def chunk(cookie, type, body, done=True):
    return struct.pack('>IHHQI', 0x668e33ef, 1 if done else 0, type, cookie, len(body)) + body


HOSTILE = {
    'hang_up_on_a_read': lambda c, cmd, k, off, n: c.close(),
    'half_a_reply': lambda c, cmd, k, off, n: (c.sendall(simple(k) + b'x' * (n // 2)), c.close()),
    'half_a_reply_then_silence': lambda c, cmd, k, off, n: c.sendall(simple(k) + b'x' * (n // 2)),
    'wrong_magic': lambda c, cmd, k, off, n: c.sendall(b'\x11' * 16),
    'wrong_cookie': lambda c, cmd, k, off, n: c.sendall(simple(k + 1000) + b'x' * n),
    'an_unknown_error': lambda c, cmd, k, off, n: c.sendall(simple(k, 0x7fffffff)),
    'structured_unasked': lambda c, cmd, k, off, n: c.sendall(chunk(k, 0, b'')),
}
STRUCTURED = {
    'no_data_at_all': lambda c, cmd, k, off, n: c.sendall(chunk(k, 0, b'')),
    'less_data_than_asked': lambda c, cmd, k, off, n: c.sendall(chunk(k, 1, struct.pack('>Q', off) + b'x' * (n - 1))),
    'data_before_the_range': lambda c, cmd, k, off, n: c.sendall(chunk(k, 1, struct.pack('>Q', off - 1 & (1 << 64) - 1) + b'x' * n)),
    'data_behind_the_range': lambda c, cmd, k, off, n: c.sendall(chunk(k, 1, struct.pack('>Q', off + 1) + b'x' * n)),
    'a_hole_of_4_GiB': lambda c, cmd, k, off, n: c.sendall(chunk(k, 2, struct.pack('>QI', off, 0xffffffff))),
    'a_chunk_of_4_GiB': lambda c, cmd, k, off, n: c.sendall(struct.pack('>IHHQI', 0x668e33ef, 1, 1, k, 0xffffffff)),
    'status_for_a_read': lambda c, cmd, k, off, n: c.sendall(chunk(k, 5, struct.pack('>III', 1, 4096, 0))),
}


def spoken(w, *parts, pause=0):
    """A server that only ever says these bytes, one part an answer, and keeps or ends the connection."""
    def talk(c):
        for p in parts:
            if p is None:
                time.sleep(30)
                return
            c.sendall(p)
            c.recv(65536)

    s = Listener(talk)
    try:
        began = time.monotonic()
        r = w.run('copy', 'nbd://127.0.0.1:%d' % s.port, 'null:', '--deadline', '1s')
        true(r.returncode in (1, 4), 'exit %d: %s' % (r.returncode, r.err))
        message(r.err)
        true(time.monotonic() - began < 20, 'it took too long')
    finally:
        s.close()


def greetings_that_are_none(w):
    hello = b'NBDMAGICIHAVEOPT\0\3'
    answer = lambda opt, t, n, body=b'': struct.pack('>QIII', 0x3e889045565a9, opt, t, n) + body
    for parts in ([b''], [b'SSH-2.0-x\r\n'], [b'NBDMAG', None], [None], [os.urandom(4096)], [hello, None], [hello, b'garbage' * 9],
                  [hello, answer(8, 1, 0xffffffff), None], [hello, answer(8, 0x80000001, 1 << 20), None],
                  [hello, answer(8, 1, 0), answer(10, 4, 0xfffffff0), None],
                  [hello, answer(8, 0x80000001, 0), answer(7, 3, 12, struct.pack('>HQH', 0, 1 << 63, 1)) + answer(7, 1, 0), None],
                  [hello, answer(8, 0x80000001, 0), answer(7, 1, 0), None],
                  [hello, answer(8, 0x80000001, 0), answer(7, 3, 14, struct.pack('>HIII', 3, 3, 5, 1)) + answer(7, 1, 0), None]):
        spoken(w, *parts)


def named(name, fn):
    fn.__name__ = name
    return fn


CELLS = {
    'nbdkit': [nbdkit_memory, nbdkit_with_less, an_end_that_no_block_reaches, read_only_exports, exports_by_name, errors_are_told,
               errors_now_and_then, slow_ones_are_given_up, slow_in_every_way, zeroing_fails, a_server_that_pauses, stopped_server,
               link_cut_here_and_there, lost_and_found, another_export_is_refused, begun_without_the_server, fsx_on_both_mounts,
               direct_mount],
    'nbdkit with TLS': [tls_by_certificates, tls_by_psk],
    'qemu-nbd': [qemu_nbd, qemu_nbd_qcow2],
    'qemu-storage-daemon': [qemu_storage_daemon],
    'nbd-server': [nbd_server],
    'raw bytes': [refused_uris, greetings_that_are_none] + [named(k, hostile(f)) for k, f in HOSTILE.items()] +
                 [named(k, hostile(f, flags=1 | 4 | 8 | 1 << 20)) for k, f in STRUCTURED.items()],
}
for peer, cases in dict(CELLS, long=[matrix]).items():
    for case in cases:
        cell(peer if peer != 'long' else 'nbdkit', 'farpage is the client')(case)


if __name__ == '__main__':
    main([matrix] if sys.argv[2:] == ['long'] and sys.argv.pop() else
         [case for cases in CELLS.values() for case in cases])
