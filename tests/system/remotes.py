#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""remotes.py FARPAGE [CASE...]: remotes and disks that misbehave, seen by the program on the mount and by its user."""
import errno
import os
import signal
import subprocess
import time

from cli_lib import Skip, equal, has, main, message, need_fuse, true, wait_for
from tcp_lib import Listener


def uri_of(listener):
    return 'grpc://127.0.0.1:%d?size=1M' % listener.port


def refused_by(w, fn, *words, code=1):
    """Mounting from such a peer ends before the deadline is far behind, with a message."""
    w.file('t', 0)
    p = Listener(fn, keep=True)
    try:
        began = time.monotonic()
        r = w.run('mount', uri_of(p), 't', '--deadline', '2s', '--quiet')
        true(time.monotonic() - began < 30, 'it took too long')
        true(r.returncode in (code, 4), 'exit %d: %s' % (r.returncode, r.err))
        message(r.err)
        has(r.err, 'cannot', 'grpc://127.0.0.1', *words)
    finally:
        p.close()


def one_that_never_answers(w):
    need_fuse()
    refused_by(w, lambda c: time.sleep(60), code=4)


def one_that_hangs_up(w):
    need_fuse()
    refused_by(w, lambda c: c.close())


def one_that_speaks_http_1(w):
    need_fuse()

    def http(c):
        c.recv(4096)
        c.sendall(b'HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n')
    refused_by(w, http)


def one_that_sends_garbage(w):
    need_fuse()

    def garbage(c):
        c.sendall(os.urandom(65536))
        c.recv(1)
    refused_by(w, garbage)


def one_that_stops_in_the_middle(w):
    """Settings, then nothing: the half-open connection of a host that lost power."""
    need_fuse()

    def half(c):
        c.sendall(bytes.fromhex('000000040000000000'))
        time.sleep(60)
    refused_by(w, half, code=4)


def another_size_is_refused(w):
    """W-D6 (D6): a size that is not the remote's is found out at open."""
    w.file('a', 100000)
    w.file('t', 0)
    s, uri = w.serve('file:a')
    r = w.run('mount', uri + '?size=100001', 't', code=2)
    message(r.err)
    has(r.err, '100000', '100001')


def pread(path, off, n=1):
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, n, off)
    finally:
        os.close(fd)


def port_of(uri):
    return uri.split(':')[2].split('/')[0]


def killed_in_the_middle_of_the_pull(w):
    """D5: what is local stays readable, the rest is an error within the deadline, and when the server is back the pull
    goes on and what was written meanwhile is pushed."""
    data = bytearray(w.file('a', 8 << 20))
    w.file('t', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 't', '--mode', 'managed', '--layer', 'delay:rtt=2ms,rate=4M', '--deadline', '2s', '--order',
                'ranges:0-64K')
    w.run('wait', 't', '--local', '0-64K', code=0)
    s.p.kill()
    s.p.wait()
    equal(pread('%s' % w.path('t'), 1000, 100), bytes(data[1000:1100]), 'a local byte')
    fd = os.open(w.path('t'), os.O_RDWR)
    began = time.monotonic()
    try:
        os.pread(fd, 1, (8 << 20) - 1)
        true(w.status('t')['local'] == 8 << 20, 'an absent byte was read without a server')
    except OSError as e:
        equal(e.errno, errno.EIO, 'errno of an absent byte')
    true(time.monotonic() - began < 20, 'it hung')
    os.pwrite(fd, b'written meanwhile', 4 << 20)
    data[4 << 20:(4 << 20) + 17] = b'written meanwhile'
    try:
        os.fsync(fd)
        raise AssertionError('fsync said yes without a server')
    except OSError as e:
        equal(e.errno, errno.EIO, 'errno of fsync')
    s2 = w.start('serve', 'file:a', '--listen', 'grpc://127.0.0.1:' + port_of(uri))
    s2.line()
    w.run('wait', 't', '--local', '100%', '--timeout', '50s')
    wait_for(lambda: w.status('t')['local'] == 8 << 20, 'the rest of the pull')
    os.fsync(fd)
    os.close(fd)
    equal(w.read('t'), bytes(data), 'content here')
    equal(w.read('a'), bytes(data), 'content there')
    equal(m.end(), 0, 'exit code: ' + m.err())


def a_late_answer_is_an_error_at_the_deadline(w):
    w.file('a', 4 << 20)
    w.file('t', 0)
    s, uri = w.serve('file:a')
    for mode in ('direct', 'managed'):
        m = w.mount(uri, 't', '--mode', mode, '--deadline', '700ms', '--layer', 'delay:rtt=50ms')
        s.p.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            fd = os.open(w.path('t'), os.O_RDONLY)
            try:
                os.pread(fd, 1, (4 << 20) - 1)
                late = w.status('t')['local'] == 4 << 20
                true(late, 'read without a server')
            except OSError as e:
                equal(e.errno, errno.EIO, mode)
                true(0.4 < time.monotonic() - began < 15, 'after %.1f s' % (time.monotonic() - began))
            os.close(fd)
        finally:
            s.p.send_signal(signal.SIGCONT)
        wait_for(lambda: read_or_none(w.path('t'), (4 << 20) - 1) is not None, 'the byte, once the server answers')
        equal(m.end(), 0, mode + ': ' + m.err())


def read_or_none(path, off):
    try:
        return pread(path, off)
    except OSError:
        return None


def flaky_connections_are_hidden(w):
    """Short disconnects and single errors on the way are nothing that a program hears of."""
    data = bytearray(w.file('a', 2 << 20))
    w.file('t', 0)
    s, uri = w.serve('file:a')
    for mode in ('direct', 'managed'):
        m = w.mount(uri, 't', '--mode', mode, '--layer', 'fault:rate=0.1,errno=ECONNRESET', '--layer',
                    'fault:disconnect-every=300ms,disconnect-for=30ms')
        equal(w.read('t'), bytes(data), mode)
        fd = os.open(w.path('t'), os.O_RDWR)
        for k in range(50):
            os.pwrite(fd, b'%08d' % k, k * 40000)
            data[k * 40000:k * 40000 + 8] = b'%08d' % k
        os.fsync(fd)
        os.close(fd)
        equal(w.read('a'), bytes(data), mode + ', on the server')
        equal(m.end(), 0, mode + ': ' + m.err())


def a_read_only_remote(w):
    w.file('a', 100000)
    w.file('t', 0)
    s = w.start('serve', 'file:a', '--read-only', '--listen', 'grpc://127.0.0.1:0')
    uri = s.line().split()[1]
    for mode in ('direct', 'managed'):
        m = w.mount(uri, 't', '--mode', mode)
        try:
            os.open(w.path('t'), os.O_RDWR)
            raise AssertionError('opened for writing')
        except OSError as e:
            true(e.errno in (errno.EROFS, errno.EACCES), os.strerror(e.errno))
        equal(len(w.read('t')), 100000, mode)
        equal(m.end(), 0, m.err())


def tmpfs(w, name, size):
    if os.geteuid() != 0:
        raise Skip('a small disk needs root')
    os.mkdir(w.path(name))
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=%d' % size, 'farpage-test', w.path(name)]).returncode:
        raise Skip('tmpfs cannot be mounted')


def a_full_local_disk(w):
    """Reads go on, writes get ENOSPC, nothing hangs, and room is enough to go on."""
    data = bytearray(w.file('a', 8 << 20))
    w.file('t', 0)
    tmpfs(w, 'small', 2 << 20)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 't', '--mode', 'managed', '--local', 'file:small/cache', '--deadline', '5s', '--pull-workers', '2')
    equal(w.read('t'), bytes(data), 'content, through a full local store')
    fd = os.open(w.path('t'), os.O_RDWR)
    hit = False
    for k in range(0, 8 << 20, 65536):
        try:
            os.pwrite(fd, b'x' * 65536, k)
            data[k:k + 65536] = b'x' * 65536
        except OSError as e:
            equal(e.errno, errno.ENOSPC, 'errno')
            hit = True
    true(hit, 'a store of 2 MiB took 8')
    os.fsync(fd)
    equal(w.read('t'), bytes(data), 'content here')
    w.run('evict', 't', code=0)
    os.pwrite(fd, b'room again', 5 << 20)
    data[5 << 20:(5 << 20) + 10] = b'room again'
    os.fsync(fd)
    os.close(fd)
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(w.read('a'), bytes(data), 'content there')


def a_full_disk_on_the_server(w):
    """ENOSPC on the remote is fsync's error, again and again, until there is room."""
    w.file('t', 0)
    tmpfs(w, 'small', 2 << 20)
    s, uri = w.serve('file:small/a?size=8M')
    m = w.mount(uri, 't', '--mode', 'managed', '--deadline', '3s')
    with open(w.path('small/filler'), 'wb') as f:
        f.write(b'y' * (1 << 20))
    fd = os.open(w.path('t'), os.O_RDWR)
    os.pwrite(fd, b'z' * (3 << 19), 0)
    for _ in range(2):
        try:
            os.fsync(fd)
            raise AssertionError('fsync said yes with a full disk')
        except OSError as e:
            equal(e.errno, errno.ENOSPC, 'errno of fsync')
    os.unlink(w.path('small/filler'))
    wait_for(lambda: fsyncs(fd), 'an fsync that works')
    os.close(fd)
    equal(w.read('small/a')[:3 << 19], b'z' * (3 << 19), 'content there')
    equal(m.end(), 0, 'exit code: ' + m.err())


def fsyncs(fd):
    try:
        os.fsync(fd)
        return True
    except OSError:
        return False


main([one_that_never_answers, one_that_hangs_up, one_that_speaks_http_1, one_that_sends_garbage,
      one_that_stops_in_the_middle, another_size_is_refused, killed_in_the_middle_of_the_pull,
      a_late_answer_is_an_error_at_the_deadline, flaky_connections_are_hidden, a_read_only_remote, a_full_local_disk,
      a_full_disk_on_the_server])
