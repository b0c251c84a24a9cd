#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""peers.py FARPAGE OURS FOLDER [CASE...]: farpage against the real Go family (tests/interop/go, built into FOLDER): the gRPC
Backend service, go-nbd, and the hand-over of userfaultfd-go, both ways. Bytes and errors are compared one by one. TAP."""
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
OURS, FOLDER = os.path.abspath(sys.argv[2]), os.path.abspath(sys.argv[3])
del sys.argv[2:4]
sys.path[:0] = [os.path.join(HERE, '..', 'system'), HERE]
import gopeer  # noqa: E402
from cli_lib import DEADLINE, Skip, cell, equal, has, main, need_fuse, true, wait_for  # noqa: E402

KIB, MIB = 1 << 10, 1 << 20
SIZE = 12 * MIB + 1234  # nobody's multiple
GRPC_READ_MAX, GRPC_WRITE_MAX = 4194294, 4194299 - 5  # a Go client takes messages of 4 MiB; so does a Go server
CHUNKS = (4 * KIB, 64 * KIB, MIB)


def program(*argv):
    """What is told to a program that answers a line with a line."""
    try:
        p = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as e:
        raise AssertionError('%s: %s' % (argv[0], e))
    return p


def answer(p):
    line = p.stdout.readline()
    if not line:
        raise AssertionError('it ended with %s: %s' % (p.wait(DEADLINE), p.stderr.read()))
    return line.strip()


def ask(p, *words):
    p.stdin.write(' '.join(str(x) for x in words) + '\n')
    p.stdin.flush()
    return answer(p)


def finish(p):
    p.stdin.close()
    out = p.stdout.read()
    equal(p.wait(DEADLINE), 0, 'exit code: ' + p.stderr.read())
    p.stdout.close()
    p.stderr.close()
    return out


def go(w, *args):
    try:
        binary = gopeer.build(FOLDER)
    except gopeer.Missing as e:
        raise Skip(str(e))
    p = program(binary, *args)
    w.others = getattr(w, 'others', []) + [p]
    return p


def go_serve(w, *args):
    p = go(w, 'grpc-serve', *args)
    return p, answer(p)


def ours(w, uri):
    p = program(OURS, uri)
    w.others = getattr(w, 'others', []) + [p]
    first = answer(p)
    return p, first


def where(uri):
    """The HOST:PORT of grpc://HOST:PORT/NAME."""
    return uri.split('/')[2]


def region(w, name='region', size=SIZE, seed=1):
    return w.file(name, size, seed), w.path(name)


def equal_answer(got, size, depth=None):
    true(got.startswith('equal %d at once ' % size), got)
    if depth:
        equal(int(got.split()[-1]), depth, 'calls on their way at once')


def we_read_from_it(w):
    data, path = region(w)
    server, address = go_serve(w, path)
    p, first = ours(w, 'grpc://%s?size=%d' % (address, SIZE))
    equal(first, 'open')
    for chunk in CHUNKS + (2 * MIB, GRPC_READ_MAX, SIZE):
        for depth in (1, 16):
            equal_answer(ask(p, 'get', path, chunk, depth), SIZE)
    for off, n in ((0, 1), (4095, 2), (SIZE - 1, 1), (SIZE - 77, 77), (MIB - 3, 3000), (5, 0)):
        equal(bytes.fromhex(ask(p, 'read', off, n)), data[off:off + n], 'bytes at %d' % off)
    finish(p)
    finish(server)


def written(w, p, chunks):
    """Through client p, to the file `region`: all of it in pieces of each size, then odd ones; what is in it then."""
    for k, chunk in enumerate(chunks):
        data, path = region(w, 'next', seed=k + 2)
        equal_answer(ask(p, 'put', path, chunk, 16), SIZE)
        equal(ask(p, 'sync'), 'ok')
        equal(w.read('region'), data, 'content of the file, pieces of %d' % chunk)
    expected = bytearray(data)
    for off, piece in ((0, b'a'), (4095, b'bcd'), (SIZE - 1, b'z'), (MIB - 1, b'x' * 1000)):
        equal(ask(p, 'write', off, piece.hex()), 'ok %d' % len(piece))
        expected[off:off + len(piece)] = piece
    return bytes(expected)


def we_write_to_it(w):
    region(w)
    server, address = go_serve(w, w.path('region'))
    p, first = ours(w, 'grpc://%s?size=%d' % (address, SIZE))
    equal(first, 'open')
    expected = written(w, p, CHUNKS + (2 * MIB, GRPC_WRITE_MAX, SIZE))
    finish(p)
    finish(server)
    equal(w.read('region'), expected, 'content of the file')


def its_errors_reach_us(w):
    """The file loses its end while it is served: what the Go server calls EOF is EIO here, and the connection lives."""
    data, path = region(w)
    server, address = go_serve(w, path)
    p, first = ours(w, 'grpc://%s?size=%d' % (address, SIZE))
    equal(first, 'open')
    os.truncate(path, 8 * MIB)
    equal(ask(p, 'read', 8 * MIB, 4096), 'error: Input/output error')
    equal(ask(p, 'read', 8 * MIB - 100, 200), 'error: Input/output error')
    equal(bytes.fromhex(ask(p, 'read', 8 * MIB - 100, 100)), data[8 * MIB - 100:8 * MIB])
    equal(ask(p, 'read', SIZE, 1), 'error: Invalid argument')
    finish(p)
    finish(server)
    server, address = go_serve(w, path)
    p, first = ours(w, 'grpc://%s?size=%d' % (address, SIZE))
    has(first, 'error:', str(SIZE))  # found out at open


def we_have_512_calls_at_it(w):
    _, path = region(w, size=4 * MIB)
    server, address = go_serve(w, path, '300ms')
    p, first = ours(w, 'grpc://%s?size=%d' % (address, 4 * MIB))
    equal(first, 'open')
    equal_answer(ask(p, 'get', path, 8 * KIB, 512), 4 * MIB, 512)
    equal_answer(ask(p, 'put', path, 8 * KIB, 512), 4 * MIB, 512)
    finish(p)
    equal(int(finish(server).split()[-1]), 512, 'calls inside the Go server at once')


def we_mount_from_it(w):
    need_fuse()
    data, path = region(w)
    for mode in ('direct', 'managed'):
        server, address = go_serve(w, path)
        w.file('t', 0)
        m = w.mount('grpc://%s?size=%d' % (address, SIZE), 't', '--mode', mode)
        equal(w.read('t'), w.read('region'), 'content through the mount')
        fd = os.open(w.path('t'), os.O_RDWR)
        for off in (0, 4090, 5 * MIB + 3, SIZE - 9):
            os.pwrite(fd, mode[:6].encode(), off)
        os.fsync(fd)
        equal(w.read('region'), w.read('t'), 'content there after fsync')
        os.close(fd)
        equal(m.end(), 0, m.err())
        finish(server)


def it_reads_from_us(w):
    data, path = region(w)
    _, uri = w.serve('file:region')
    p = go(w, 'grpc-client', where(uri))
    for chunk in CHUNKS + (2 * MIB, GRPC_READ_MAX):
        for depth in (1, 16):
            equal_answer(ask(p, 'get', path, chunk, depth), SIZE)
    for off, n in ((0, 1), (4095, 2), (SIZE - 1, 1), (SIZE - 77, 77), (MIB - 3, 3000), (5, 0)):
        equal(bytes.fromhex(ask(p, 'read', off, n)), data[off:off + n], 'bytes at %d' % off)
    finish(p)


def it_writes_to_us(w):
    region(w)
    s, uri = w.serve('file:region')
    p = go(w, 'grpc-client', where(uri))
    expected = written(w, p, CHUNKS + (2 * MIB, GRPC_WRITE_MAX))
    finish(p)
    equal(s.end(), 0, s.err())
    equal(w.read('region'), expected, 'content of the file')


def it_hears_the_same_errors(w):
    """The Go client asks our server and its own for the same; the texts are the same, byte for byte."""
    data, path = region(w)
    _, uri = w.serve('file:region')
    server, address = go_serve(w, path)
    mine, theirs = go(w, 'grpc-client', where(uri)), go(w, 'grpc-client', address)
    for line in ('read %d 4096' % SIZE, 'read %d 4096' % (SIZE - 100), 'read %d 1' % (1 << 40), 'read 0 33554433',
                 'read %d 33554433' % SIZE, 'read 0 %d' % GRPC_READ_MAX, 'read 0 %d' % (GRPC_READ_MAX + 1), 'read 0 33554432',
                 'read 0 %d' % SIZE):
        a, b = ask(mine, line), ask(theirs, line)
        equal(a, b, line)
        true(a.startswith('error: ') or line.endswith(str(GRPC_READ_MAX)), a)
    # A text of each one's own; what matters is that there is one, and that nothing was done.
    for line in ('read -1 4', 'write -1 00', 'read %d 4' % -(1 << 62)):
        for p in (mine, theirs):
            has(ask(p, line), 'error: ')
    has(ask(mine, 'write %d 0011' % SIZE), 'error: ')  # the Go server's file grows
    equal(os.path.getsize(path), SIZE, 'size of the file')
    for p in (mine, theirs):
        equal(bytes.fromhex(ask(p, 'read 0 8')), data[:8])
        finish(p)
    finish(server)


def it_hears_of_a_read_only_region(w):
    data, path = region(w)
    s = w.start('serve', 'file:region', '--read-only', '--listen', 'grpc://127.0.0.1:0')
    p = go(w, 'grpc-client', where(s.line().split()[1]))
    has(ask(p, 'write 0 00'), 'error: ')
    equal(bytes.fromhex(ask(p, 'read 0 16')), data[:16])
    finish(p)
    equal(w.read('region'), data, 'content')


def it_has_512_calls_at_us(w):
    _, path = region(w, size=4 * MIB)
    s = w.start('serve', 'file:region', '--layer', 'delay:rtt=300ms', '--max-blocked', '512', '--listen', 'grpc://127.0.0.1:0')
    p = go(w, 'grpc-client', where(s.line().split()[1]))
    equal_answer(ask(p, 'get', path, 8 * KIB, 512), 4 * MIB, 512)
    equal_answer(ask(p, 'put', path, 8 * KIB, 512), 4 * MIB, 512)
    finish(p)
    equal(s.end(), 0, s.err())


def a_lost_server_is_found_again(w):
    """The Go client's pending calls fail when our server is killed, and it goes on with the next one at that address."""
    _, path = region(w)
    s, uri = w.serve('file:region')
    p = go(w, 'grpc-client', where(uri))
    equal_answer(ask(p, 'get', path, MIB, 4), SIZE)
    s.p.kill()
    s.p.wait()
    has(ask(p, 'read 0 4'), 'error: ')
    w.serve('file:region', listen='grpc://' + where(uri))
    wait_for(lambda: not ask(p, 'read 0 4').startswith('error'), 'the next connection')
    equal_answer(ask(p, 'get', path, MIB, 4), SIZE)
    finish(p)


def nbd_scheme(first):
    if 'nknown' in first or 'no such scheme' in first or "does not know" in first:
        raise Skip('this build has no NBD client: ' + first)
    equal(first, 'open')


def we_use_its_nbd_server(w):
    data, path = region(w, size=8 * MIB)
    server = go(w, 'nbd-serve', w.path('nbd.sock'), path)
    answer(server)
    p, first = ours(w, 'nbd+unix:///default?socket=' + w.path('nbd.sock'))
    nbd_scheme(first)
    for chunk in CHUNKS + (8 * MIB,):
        for depth in (1, 16):
            equal_answer(ask(p, 'get', path, chunk, depth), 8 * MIB)
    for k, chunk in enumerate(CHUNKS + (8 * MIB,)):
        data, other = region(w, 'next', 8 * MIB, seed=k + 2)
        equal_answer(ask(p, 'put', other, chunk, 16), 8 * MIB)
        equal(w.read('region'), data, 'content of the file, pieces of %d' % chunk)
    for off, n in ((0, 1), (4095, 2), (8 * MIB - 1, 1), (MIB - 3, 3000)):
        equal(bytes.fromhex(ask(p, 'read', off, n)), data[off:off + n], 'bytes at %d' % off)
    equal_answer(ask(p, 'get', w.path('next'), 16 * KIB, 512), 8 * MIB)
    has(ask(p, 'read', 8 * MIB - 1, 2), 'error')
    has(ask(p, 'write', 8 * MIB, 'ff'), 'error')
    equal(w.read('region'), data, 'content of the file after refused requests')
    finish(p)
    p, first = ours(w, 'nbd+unix:///nothing?socket=' + w.path('nbd.sock'))
    has(first, 'nothing')
    true(first != 'open', 'an export that is not there was opened')
    server.stdin.close()
    server.wait(DEADLINE)


def nbd_served(w, name, *options):
    s = w.start('serve', name + 'file:region', '--listen', 'nbd+unix:///?socket=' + w.path('nbd.sock'), *options)
    wait_for(lambda: '\n' in s.out() or s.p.poll() is not None, 'our NBD server')
    if '\n' not in s.out():
        if 'nbd' in s.err():
            raise Skip('this build has no NBD server: ' + s.err().strip())
        raise AssertionError(s.err())
    return s


def its_nbd_client_sees_our_exports(w):
    region(w, size=8 * MIB)
    nbd_served(w, 'disk=')
    p = go(w, 'nbd-list', w.path('nbd.sock'))
    has(answer(p), '"disk"')
    equal(p.wait(DEADLINE), 0)


def its_nbd_client_negotiates_with_us(w):
    """The half of go-nbd's client that runs outside the kernel, with client flags of 0 and GO of length 0."""
    region(w, size=8 * MIB)
    nbd_served(w, 'disk=')
    p = go(w, 'nbd-go', w.path('nbd.sock'), 'disk')
    equal(answer(p), 'negotiated')
    equal(p.wait(DEADLINE), 0, p.stderr.read())
    p = go(w, 'nbd-go', w.path('nbd.sock'), 'nothing')
    equal(p.wait(DEADLINE), 1)
    has(p.stderr.read(), 'unknown error')


def we_serve_its_memory(w):
    """Memory of a Go program, faults served by `farpage page`."""
    for size in (4 * MIB, 8 * MIB):
        _, path = region(w, size=size)
        s = w.start('page', 'file:region', '--socket', 'sock')
        has(s.line(), 'listening')
        for _ in range(3):
            p = go(w, 'uffd-send', w.path('sock'), path)
            equal(answer(p), 'equal %d' % size)
            equal(p.wait(DEADLINE), 0)
        equal(s.end(), 0, s.err())


def it_serves_our_memory(w):
    """Our far_uffd_send() in the Go format, faults served by userfaultfd-go."""
    _, path = region(w, size=4 * MIB)
    for _ in range(3):
        p = go(w, 'uffd-recv', w.path('sock'), path)
        equal(answer(p), 'listening')
        out = subprocess.run([OURS, 'hand-over', w.path('sock'), path], capture_output=True, text=True, timeout=DEADLINE)
        if out.returncode == 77:
            raise Skip(out.stdout.strip())
        equal(out.stdout.strip(), 'equal %d' % (4 * MIB))
        p.kill()
        p.wait()
        os.unlink(w.path('sock')) if os.path.exists(w.path('sock')) else None


def matrix():
    we, it = 'farpage is the client', 'farpage is the server'
    for peer, role, cases in (
            ('r3map v0.1.1 Backend, grpc-go 1.65', we, (we_read_from_it, we_write_to_it, its_errors_reach_us,
                                                       we_have_512_calls_at_it, we_mount_from_it)),
            ('r3map v0.1.1 Backend, grpc-go 1.65', it, (it_reads_from_us, it_writes_to_us, it_hears_the_same_errors,
                                                       it_hears_of_a_read_only_region, it_has_512_calls_at_us,
                                                       a_lost_server_is_found_again)),
            ('go-nbd v0.3.2', we, (we_use_its_nbd_server,)),
            ('go-nbd v0.3.2', it, (its_nbd_client_sees_our_exports, its_nbd_client_negotiates_with_us)),
            ('userfaultfd-go v0.1.2', 'farpage has the memory', (it_serves_our_memory,)),
            ('userfaultfd-go v0.1.2', 'farpage serves the faults', (we_serve_its_memory,))):
        for case in cases:
            yield cell(peer, role)(case)


def ended(case):
    """Nobody whom a case has started outlives it."""
    def run(w):
        try:
            case(w)
        finally:
            for p in getattr(w, 'others', []):
                if p.poll() is None:
                    p.kill()
                p.wait()
    run.__name__ = case.__name__
    run.cell = case.cell
    return run


main([ended(case) for case in matrix()])
