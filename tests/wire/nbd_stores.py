#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""nbd_stores.py FARPAGE [CASE...]: what the NBD server does with different stores, and how connections come to it."""
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading

from nbd_raw import (CHUNKED, Client, DISC, EINVAL, EIO, ENOSPC, EPERM, EXT, FLUSH, FUA, READ, SIMPLE, TRIM, WRITE, ZEROES,
                     alive, serve)
from cli_lib import DEADLINE, Skip, cell, equal, has, main, true, wait_for

ENOMEM = 12
MIB = 1 << 20
FARPAGE = os.path.abspath(sys.argv[1])


def write(off, data, cookie=1, flags=0):
    return struct.pack('>IHHQQI', 0x25609513, flags, WRITE, cookie, off, len(data)) + data


# --------------------------------------------------------------------------------------------------- long writes

def long_writes_land_where_they_belong(w):
    """Long writes between short ones, in pieces, over pages that are there or not; memory takes them as they come."""
    seed = int(os.environ.get('FARPAGE_SEED', random.randrange(1 << 30)))
    print('# seed %d' % seed)
    for source in ('mem:4M', 'mem:4M?private=1', 'file:f?size=4M'):
        s = serve(w, source)
        rnd = random.Random(seed)
        want = bytearray(4 * MIB)
        c = Client(s.path).go()
        for _ in range(15):
            if rnd.random() < 0.3:  # the pages go away again
                at, n = rnd.randrange(2 * MIB), rnd.randrange(1, 2 * MIB)
                equal(c.error(TRIM, at, n), 0, 'trim')
                want[at:at + n] = bytes(n)
            burst, slots = b'', rnd.sample(range(4), rnd.randrange(1, 5))
            for slot in slots:  # each in a place of its own: they may be carried out in any order
                n = rnd.choice([1, 5000, 65536, 65537, 300000, MIB])
                off = slot * MIB + rnd.randrange(MIB - n + 1)
                data = rnd.randbytes(n)
                burst += write(off, data, slot, rnd.choice([0, FUA]))
                want[off:off + n] = data
            at, k = 0, rnd.choice([999, 4124, 70000, 4 * MIB])
            while at < len(burst):
                c.put(burst[at:at + k])
                at += k
            equal(sorted(c.reply()[:2] for _ in slots), sorted((slot, 0) for slot in slots), 'replies')
        true(c.read(0, 4 * MIB) == bytes(want), 'bytes differ on ' + source)
        equal(s.end(), 0, 'exit code')


def a_long_write_that_breaks_off_harms_nothing_else(w):
    for source in ('mem:4M', 'mem:4M?private=1', 'file:f?size=4M'):
        s = serve(w, source)
        c = Client(s.path).go()
        equal(c.error(WRITE, 0, 4 * MIB, 0, b'a' * (4 * MIB)), 0, 'write')
        for n in (27, 28, 29, 4096, 4124, 65536, 100000, MIB + 27):
            other = Client(s.path).go()
            other.put(write(MIB + 1, b'b' * MIB)[:n])
            other.s.close()
            got = c.read(0, 4 * MIB)
            true(set(got[:MIB + 1] + got[2 * MIB + 1:]) == {97}, 'a write of which %d bytes came went elsewhere' % n)
            true(got[MIB + 1:2 * MIB + 1].lstrip(b'b').strip(b'a') == b'', 'neither old nor new bytes after %d' % n)
            equal(c.error(WRITE, 0, 4 * MIB, 0, b'a' * (4 * MIB)), 0, 'write')
        alive(s)
        equal(s.end(), 0, 'exit code')


def long_writes_and_reads_of_others_are_whole(w):
    """Each block of 4 KiB is of one write, whatever others do; holes come and go meanwhile. Not every single time: where two
    copy the same bytes at the same moment, and one of them is interrupted there, it may see some of both."""
    s = serve(w, 'mem:1M')
    ended = threading.Event()
    wrong = []

    def watch():
        c = Client(s.path).go(CHUNKED)
        while not ended.is_set():
            got = c.read(0, MIB)
            wrong.extend(i for i in range(0, MIB, 4096) if len(set(got[i + 64:i + 128])) != 1)

    def punch():
        c = Client(s.path).go()
        while not ended.is_set():
            equal(c.error(TRIM, MIB // 2, MIB // 4), 0, 'trim')
    helpers = [threading.Thread(target=f) for f in (watch, punch)]
    for h in helpers:
        h.start()
    try:
        c = Client(s.path).go()
        for i in range(60):
            mark = bytes([65 + i % 26])
            equal(c.error(WRITE, 0, MIB, 0, mark * MIB), 0, 'write')
            got = c.read(0, MIB // 2)
            true(got == mark * (MIB // 2), 'a write that was answered is not there')
    finally:
        ended.set()
        for h in helpers:
            h.join(DEADLINE)
    true(len(wrong) <= 3, 'torn blocks: %r' % wrong)
    equal(s.end(), 0, 'exit code')


# -------------------------------------------------------------------------------------------------------- errors

def each_failure_of_a_store_has_its_number(w):
    w.file('a', MIB)
    for name, number in (('EIO', EIO), ('ENOSPC', ENOSPC), ('EROFS', EPERM), ('ESTALE', EPERM), ('EINVAL', EINVAL),
                         ('ENOMEM', ENOMEM), ('EPROTO', EIO)):
        s = serve(w, 'file:a', args=['--layer', 'fault:rate=1,ops=read+write,errno=' + name])
        for form in (SIMPLE, CHUNKED, EXT):
            c = Client(s.path).go(form)
            for kind, *args in ((READ, 0, 10), (READ, 0, 300000), (WRITE, 0, 3, 0, b'abc'),
                                (WRITE, 0, 100000, FUA, b'x' * 100000), (TRIM, 0, 4096), (ZEROES, 0, 4096)):
                equal(c.error(kind, *args), number, '%s of command %d, %s' % (name, kind, form))
            c.send(DISC)
            true(c.gone(), 'the end')
        equal(s.end(), 0, 'exit code')
        s = serve(w, 'file:a', args=['--layer', 'fault:every=3,ops=flush,errno=' + name])
        c = Client(s.path).go()
        got = []
        for _ in range(6):
            equal(c.error(WRITE, 0, 1, 0, b'x'), 0, 'write')
            got.append(c.error(FLUSH))
        equal(sorted(got), [0] * 4 + [number] * 2, 'flushes, each third of which fails with ' + name)
        s.p.terminate()  # its own last flush may fail, too
        s.p.wait(DEADLINE)


def a_flush_covers_what_other_connections_wrote(w):
    """Not before it: the source is the remote of a managed mount that pushes once in an hour."""
    w.file('a', MIB)
    server, uri = w.serve('file:a')
    os.mkdir(w.path('t'))
    m = w.start('mount', uri, 't', '--mode', 'managed', '--as', 'nbd-socket', '--push-interval', '1h', '--quiet')
    path = m.line()
    a, b = Client(path).go(), Client(path).go()
    true(a.flags & 1 << 8, 'multi-conn is not offered')
    equal(a.error(WRITE, 1000, 5, 0, b'hello'), 0, 'write')
    true(w.read('a')[1000:1005] != b'hello', 'it is on the remote without a flush')
    equal(b.error(FLUSH), 0, 'flush')
    equal(w.read('a')[1000:1005], b'hello', 'on the remote')
    equal(a.error(WRITE, 2000, 3, FUA, b'fua'), 0, 'write with FUA')
    equal(w.read('a')[2000:2003], b'fua', 'on the remote')
    for c in (a, b):
        c.s.close()
    equal(m.end(), 0, m.err())


def a_lease_keeps_nbd_writers_out(w):
    path = w.path('s')
    s = w.start('serve', 'mem:4M', '--listen', 'nbd+unix:///?socket=' + path, '--listen', 'grpc://127.0.0.1:0')
    wait_for(lambda: s.out().count('\n') == 2, 'both listeners')
    uri = s.out().split()[4]
    c = Client(path).go(CHUNKED)
    equal(c.error(WRITE, 0, 4 * MIB, 0, b'a' * (4 * MIB)), 0, 'write')
    os.mkdir(w.path('t'))
    m = w.start('mount', uri, 't', '--mode', 'managed', '--as', 'nbd-socket', '--quiet')
    m.line()

    def outcomes():
        return [c.error(WRITE, 5, n, 0, b'b' * n) for n in (1, 4096, 70000, 2 * MIB)] + [c.error(TRIM, 0, 4096),
                                                                                          c.error(ZEROES, 0, 4096)]
    wait_for(lambda: outcomes() == [EPERM] * 6, 'the lease')
    c.error(FLUSH)
    equal(m.end(), 0, m.err())
    equal(outcomes(), [0] * 6, 'changes when nobody holds a lease')
    equal(c.read(4096, 2 * MIB), b'b' * (2 * MIB - 4091) + b'a' * 4091, 'what was written')
    equal(s.end(), 0, s.err())


def what_is_here_overtakes_what_is_far_away(w):
    w.file('a', 4 * MIB)
    server, uri = w.serve('file:a')
    os.mkdir(w.path('t'))
    m = w.start('mount', uri, 't', '--mode', 'managed', '--as', 'nbd-socket', '--pull-workers', '0', '--quiet', '--layer',
                'delay:rtt=400ms')
    c = Client(m.line()).go()
    c.read(0, 4096)
    far = c.send(READ, 2 * MIB, 4096)
    near = [c.send(READ, i * 512, 4096) for i in range(8)]
    got = [c.reply(4096)[0] for _ in range(9)]
    equal((sorted(got[:8]), got[8]), (near, far), 'the order of the replies')
    c.s.close()
    equal(m.end(), 0, m.err())


# -------------------------------------------------------------------------------------------------- how to come in

def talks(c, data):
    c.go(CHUNKED)
    equal(c.read(0, len(data)), data, 'what is read')
    c.send(DISC)
    true(c.gone(), 'the end')


@cell('libnbd over standard input and output', 'farpage is the server')
def over_standard_input_and_output(w):
    data = w.file('a', 100000)
    here, there = socket.socketpair()
    p = subprocess.Popen([FARPAGE, 'serve', 'file:a', '--listen', 'nbd+stdio:'], cwd=w.dir, stdin=there, stdout=there)
    there.close()
    talks(Client(None, sock=here), data)
    here.close()
    equal(p.wait(DEADLINE), 0, 'exit code')
    if subprocess.run(['/usr/bin/python3', '-c', 'import nbd'], stderr=subprocess.DEVNULL).returncode:
        raise Skip('the Python module nbd is missing (package python3-libnbd)')
    script = ('import nbd,sys\nh=nbd.NBD()\nh.connect_command(sys.argv[1:])\n'
              'print(h.get_size(),h.pread(9,99).hex())\nh.shutdown()')
    got = subprocess.run(['/usr/bin/python3', '-c', script, FARPAGE, 'serve', 'file:a', '--listen', 'nbd+stdio:'], cwd=w.dir,
                         capture_output=True, text=True, timeout=DEADLINE)
    equal((got.returncode, got.stdout), (0, '100000 %s\n' % data[99:108].hex()), got.stderr)


def over_two_pipes(w):
    data = w.file('a', 100000)
    p = subprocess.Popen([FARPAGE, 'serve', 'file:a', '--listen', 'nbd+stdio:'], cwd=w.dir, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
    hello = struct.pack('>IQII', 3, 0x49484156454f5054, 7, 6) + bytes(6)
    p.stdin.write(hello + struct.pack('>IHHQQI', 0x25609513, 0, READ, 5, 1000, 70000))
    p.stdin.write(struct.pack('>IHHQQI', 0x25609513, 0, DISC, 6, 0, 0))
    p.stdin.flush()
    got = p.stdout.read()
    equal(got[:18], b'NBDMAGICIHAVEOPT\0\3', 'greeting')
    equal(got[-70016:-70000], struct.pack('>IIQ', 0x67446698, 0, 5), 'head of the reply')
    true(got[-70000:] == data[1000:71000], 'what is read differs')
    equal(p.wait(DEADLINE), 0, 'exit code')


@cell('libnbd, which opens the socket', 'farpage is the server')
def libnbd_opens_the_socket(w):
    if not shutil.which('nbdinfo'):
        raise Skip('nbdinfo is missing (package libnbd-bin)')
    w.file('a', 100000)
    got = subprocess.run(['nbdinfo', '--size', '--', '[', FARPAGE, 'serve', 'file:a', ']'], cwd=w.dir, capture_output=True,
                         text=True, timeout=DEADLINE)
    equal(got.returncode, 0, got.stderr)
    equal(got.stdout.split()[-1], '100000', 'size')


@cell('systemd-socket-activate', 'farpage is the server')
def the_real_systemd_opens_the_socket(w):
    tool = shutil.which('systemd-socket-activate')
    if not tool:
        raise Skip('systemd-socket-activate is missing (package systemd)')
    data = w.file('a', 100000)
    path = w.path('s')
    with open(w.path('said'), 'w') as said:
        p = subprocess.Popen([tool, '--listen=' + path, '--fdname=nbd', FARPAGE, 'serve', 'file:a'], cwd=w.dir, stdout=said,
                             stderr=said)
    try:
        wait_for(lambda: os.path.exists(path), 'the socket')
        talks(Client(path), data)
        talks(Client(path), data)
        has(w.read('said').decode(), 'listening nbd+unix:///default?socket=' + path)
        p.terminate()
        equal(p.wait(DEADLINE), 0, w.read('said').decode())
    finally:
        p.kill()
        p.wait()


def commands_get_where_the_export_is(w):
    w.file('a', 100000)
    path = w.path('s')
    p = w.run('serve', 'file:a', '--listen', 'nbd+unix:///?socket=' + path, '--run', 'echo "run $FARPAGE $FARPAGE_URI"; exit 5')
    equal(p.returncode, 5, 'exit code')
    equal(p.out.splitlines()[-1], 'run %s nbd+unix:///default?socket=%s' % (path, path), 'FARPAGE and FARPAGE_URI')
    true(not os.path.exists(path), 'the socket is left over')
    p = w.run('serve', 'file:a', '--listen', 'nbd://127.0.0.1:0', '--run', '[ "$FARPAGE" = "$FARPAGE_URI" ]', code=0)
    w.run('serve', 'file:a', '--listen', 'nbd+unix:///?socket=/nowhere/s', '--run', 'touch ran', code=1)
    true(not os.path.exists(w.path('ran')), 'the command was run without a listener')


main([long_writes_land_where_they_belong, a_long_write_that_breaks_off_harms_nothing_else,
      long_writes_and_reads_of_others_are_whole, each_failure_of_a_store_has_its_number,
      a_flush_covers_what_other_connections_wrote, a_lease_keeps_nbd_writers_out,
      what_is_here_overtakes_what_is_far_away, over_standard_input_and_output, over_two_pipes,
      libnbd_opens_the_socket, the_real_systemd_opens_the_socket, commands_get_where_the_export_is])
