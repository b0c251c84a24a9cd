#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""page.py FARPAGE CLIENT VMM [CASE...]: `farpage page` and its clients in all formats of the hand-over: right bytes, many
at once, their deaths and its own end, hostile ones, stores that are pushed. TAP."""
import os
import random
import signal
import socket
import struct
import subprocess
import sys

CLIENT, VMM = os.path.abspath(sys.argv[2]), os.path.abspath(sys.argv[3])
del sys.argv[2:4]
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'system'))
from cli_lib import DEADLINE, Skip, equal, has, main, true, wait_for  # noqa: E402

MIB = 1 << 20
OLD = '6.1' in os.environ.get('FARPAGE_WITHOUT', '')  # as if the kernel had neither asynchronous tracking nor POISON


def ruler(size, first=0):
    return b''.join(struct.pack('<Q', k) for k in range(first, first + size, 8))


def pager(w, source, *args):
    p = w.start('page', source, '--socket', 'sock', '--control', 'ctl', *args)
    has(p.line(), 'listening sock size=')
    return p


class Client:
    """A program that hands memory over and does what it is told, a line each; it answers with a line."""

    def __init__(self, w, size, *args, wait=True, env=None):
        self.p = subprocess.Popen([CLIENT, w.path('sock'), str(size)] + list(args), stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True, env=dict(os.environ, **(env or {})))
        self.first = self.p.stdout.readline().strip() if wait else ''
        if self.first.startswith('skipped'):
            raise Skip(self.first[9:])
        w.clients = getattr(w, 'clients', []) + [self]

    def send(self, line):
        self.p.stdin.write(line + '\n')
        self.p.stdin.flush()

    def answer(self):
        return self.p.stdout.readline().strip()

    def do(self, line):
        self.send(line)
        return self.answer()

    def end(self, number=None):
        if number:
            self.p.send_signal(number)
        else:
            self.p.stdin.close()
        return self.p.wait(DEADLINE)


def status(w):
    return w.status_clients()


def clients(w):
    import json
    return json.loads(w.run('status', '--control', w.path('ctl'), '--json', code=0).out)['clients']


def gone(w, p, n):
    wait_for(lambda: p.err().count(' has gone') >= n, 'the end of %d clients' % n)
    equal(len(clients(w)), 0, 'clients that are left')


def each_format_gives_the_right_bytes(w):
    with open(w.path('src'), 'wb') as f:
        f.write(ruler(8 * MIB))
    p = pager(w, 'file:src')
    for n, how in enumerate(('farpage', 'go', 'go-twice', 'firecracker', 'pieces'), 1):
        c = Client(w, 8 * MIB, how)
        equal(c.first, 'ready', how)
        equal(c.do('check 0 %d' % (8 * MIB)), 'right', how)
        equal(c.end(), 0)
        gone(w, p, n)
    equal(p.end(), 0, p.err())
    true(not os.path.exists(w.path('sock')), 'the socket is still there')


def a_part_of_a_region_and_a_tail(w):
    size = 3 * MIB + 1234
    with open(w.path('src'), 'wb') as f:
        f.write(ruler(3 * MIB + 1240)[:size])
    pager(w, 'file:src')
    c = Client(w, MIB, 'farpage', str(MIB))  # the middle
    equal(c.do('check 0 %d' % MIB), 'right')
    c.end()
    whole = (size + 4095) // 4096 * 4096
    c = Client(w, whole, 'farpage')
    equal(c.do('check 0 %d' % (size // 8 * 8)), 'right')
    equal(c.do('zero %d %d' % (size + 6, whole - size - 6)), 'right', 'behind the end')
    c.end()
    c = Client(w, whole + 4096, 'farpage')
    has(c.first, 'the pager refused the memory', 'the region ends at %d' % size)


def many_clients_and_their_deaths(w):
    data = w.file('src', 24 * MIB, seed=7)
    p = pager(w, 'file:src', '--layer', 'delay:rtt=2ms')
    vmms = [subprocess.Popen([VMM, w.path('sock'), w.path('src'), str(k)] + [[], ['die'], ['late']][k % 3],
                             stdout=subprocess.PIPE, text=True) for k in range(9)]
    for k, v in enumerate(vmms):
        out = v.communicate(timeout=DEADLINE)[0]
        if v.returncode == 77:
            raise Skip(out)
        if k % 3 == 1:
            equal(v.returncode, -signal.SIGKILL)
        else:
            equal(v.returncode, 0, out)
            has(out, 'all right')
    gone(w, p, 9)
    true(os.listdir('/proc/%d/task' % p.p.pid) and len(os.listdir('/proc/%d/fd' % p.p.pid)) < 30, 'descriptors are left')
    equal(w.read('src'), data, 'the snapshot')
    equal(p.end(), 0, p.err())


def over_the_network_with_a_round_trip(w):
    w.file('src', 16 * MIB, seed=3)
    s, uri = w.serve('file:src')
    p = pager(w, uri, '--layer', 'delay:rtt=20ms', '--chunk', '256K')
    v = subprocess.run([VMM, w.path('sock'), w.path('src'), '4'], stdout=subprocess.PIPE, text=True, timeout=DEADLINE)
    if v.returncode == 77:
        raise Skip(v.stdout)
    has(v.stdout, 'all right')
    equal(v.returncode, 0)
    equal(p.end(), 0)


def stores_are_pushed_by_a_flush(w):
    data = bytearray(ruler(4 * MIB))
    with open(w.path('src'), 'wb') as f:
        f.write(data)
    for tracking in ('async', 'sync', 'hash'):
        p = pager(w, 'file:src', '--writable', '--push-interval', '50ms')
        c = Client(w, 4 * MIB, 'writable-' + tracking)
        equal(c.first, 'ready')
        r = random.Random(tracking)
        for k in range(40):
            off, value = r.randrange(MIB // 2) * 8, r.getrandbits(60)
            equal(c.do('store %d %d' % (off, value)), 'stored')
            data[off:off + 8] = struct.pack('<Q', value)
        one = clients(w)[0]
        # A descriptor that only notes stores, and nobody who can read the notes: then it is hashing that finds them.
        want = 'hash' if OLD and tracking == 'async' else tracking
        equal((one['tracking'], one['writable']), (want, True))
        equal(c.do('flush'), 'flushed')
        equal(w.read('src'), bytes(data), tracking + ': after a flush')
        other = Client(w, 4 * MIB, 'writable-sync')
        has(other.first, 'one at a time')
        other.end()
        equal(c.do('store 8 99'), 'stored')
        data[8:16] = struct.pack('<Q', 99)
        equal(c.do('last'), 'flushed')  # the end of its half of the connection
        equal(w.read('src'), bytes(data), tracking + ': after the last flush')
        equal(c.end(), 0)
        wait_for(lambda: not clients(w), 'its end')
        equal(p.end(), 0, p.err())


def a_writable_client_needs_a_writable_pager(w):
    w.file('src', MIB)
    pager(w, 'file:src')
    c = Client(w, MIB, 'writable-async')
    has(c.first, 'without --writable')


def killed_clients_that_write_lose_only_what_is_not_pushed(w):
    with open(w.path('src'), 'wb') as f:
        f.write(bytes(2 * MIB))
    p = pager(w, 'file:src', '--writable', '--push-workers', '0')
    c = Client(w, 2 * MIB, 'writable-async')
    equal(c.do('store 0 1'), 'stored')
    equal(c.do('flush'), 'flushed')
    equal(c.do('store 65536 2'), 'stored')
    c.end(signal.SIGKILL)
    wait_for(lambda: not clients(w), 'its end')
    equal(w.read('src')[:8], struct.pack('<Q', 1))
    equal(w.read('src')[65536:65544], bytes(8))
    c = Client(w, 2 * MIB, 'writable-async')  # the next one may write
    equal(c.first, 'ready')
    equal(c.do('store 131072 3'), 'stored')
    equal(c.do('flush'), 'flushed')
    equal(w.read('src')[131072:131080], struct.pack('<Q', 3))
    equal(c.end(), 0)
    true(p.end(signal.SIGINT) in (0, 3), p.err())  # 3 if it had been noticed that there was something to lose
    has(p.err(), 'lost')


def the_end_waits_for_clients_and_a_second_signal_does_not(w):
    with open(w.path('src'), 'wb') as f:
        f.write(bytes(MIB) + ruler(3 * MIB, MIB))
    p = pager(w, 'file:src', '--pull-workers', '0', '--chunk', '4K')
    c = Client(w, 4 * MIB, 'farpage')
    equal(c.do('check %d 4096' % MIB), 'right')
    p.p.send_signal(signal.SIGTERM)
    wait_for(lambda: 'this ends when they have ended' in p.err(), 'the message')
    equal(c.do('check %d 4096' % (2 * MIB)), 'right', 'it is still served')
    true(p.p.poll() is None)
    late = socket.socket(socket.AF_UNIX)
    try:
        late.connect(w.path('sock'))
        raise AssertionError('the socket still takes clients')
    except (FileNotFoundError, ConnectionRefusedError):
        pass
    p.p.send_signal(signal.SIGTERM)
    equal(p.p.wait(DEADLINE), 130, p.err())
    equal(c.do('check %d 4096' % MIB), 'right', 'what was there stays')
    if OLD or c.do('feature poison') != 'yes':  # then it waits for somebody who has it
        equal(c.do('try %d' % (3 * MIB)), 'waits')
        c.end(signal.SIGKILL)
        return
    equal(c.do('check %d 4096' % (3 * MIB)), 'SIGBUS', 'what was not there')
    equal(c.do('zero 0 4096'), 'SIGBUS', 'zeros that were never fetched are not invented')
    c.end()


def a_killed_pager_is_a_stall_and_not_zeros(w):
    with open(w.path('src'), 'wb') as f:
        f.write(ruler(2 * MIB))
    p = pager(w, 'file:src', '--pull-workers', '0', '--chunk', '4K')
    c = Client(w, 2 * MIB, 'farpage')
    equal(c.do('check 0 4096'), 'right')
    p.p.kill()
    p.p.wait()
    equal(c.do('try %d' % MIB), 'waits')
    p = pager(w, 'file:src')  # a new one takes the same memory; what waits goes on
    equal(c.do('again'), 'ready')
    equal(c.do('tried'), 'right')
    equal(c.do('check 0 %d' % (2 * MIB)), 'right')
    c.end()


def a_dead_source_is_sigbus_at_the_deadline(w):
    w.file('src', 2 * MIB)
    p = pager(w, 'file:src', '--pull-workers', '0', '--chunk', '4K', '--deadline', '300ms', '--layer', 'gated:closed')
    c = Client(w, 2 * MIB, 'farpage')
    if OLD or c.do('feature poison') != 'yes':
        equal(c.do('try %d' % MIB), 'waits')
        wait_for(lambda: 'cannot be told to the program' in p.err(), 'the message')
        c.end(signal.SIGKILL)
        return
    equal(c.do('check 4096 4096'), 'SIGBUS')
    c.end()
    gone(w, p, 1)


def hostile_clients_disturb_nobody(w):
    with open(w.path('src'), 'wb') as f:
        f.write(ruler(4 * MIB))
    p = pager(w, 'file:src', '--max-clients', '40')
    good = Client(w, 4 * MIB, 'farpage')
    r = random.Random(11)
    null = os.open('/dev/null', os.O_RDONLY)
    silent = []
    for k in range(30):
        s = socket.socket(socket.AF_UNIX)
        s.connect(w.path('sock'))
        silent.append(s)
        kind = k % 5
        try:
            if kind == 0:
                s.sendall(r.randbytes(200))
            elif kind == 1:
                s.sendall(b'FARUFFD\n' + struct.pack('<HHI', 1, 1, 0xffffffff) + r.randbytes(100))
            elif kind == 2:
                socket.send_fds(s, [b'[{"base_host_virt_addr":4096,"size":4096,"offset":0}]'], [null])
            elif kind == 3:
                socket.send_fds(s, [bytes(8)], [null] * 100)
            else:
                s.sendall(b'[')  # and then silence
        except (BrokenPipeError, ConnectionResetError):
            pass
    late = Client(w, 4 * MIB, 'firecracker')
    equal(late.do('check 0 %d' % (4 * MIB)), 'right')
    equal(good.do('check 0 %d' % (4 * MIB)), 'right')
    for s in silent:
        s.close()
    wait_for(lambda: len(os.listdir('/proc/%d/fd' % p.p.pid)) < 60, 'their descriptors to be closed')
    # Memory that is not registered, addresses that are not there: fills fail, others go on.
    for how in ('unregistered', 'nowhere', 'no-api'):
        bad = Client(w, 4 * MIB, how)
        bad.end()
    equal(late.do('check 0 %d' % (4 * MIB)), 'right')
    late.end()
    good.end()
    wait_for(lambda: not clients(w), 'their end')
    equal(p.end(), 0, p.err())


def status_names_the_clients(w):
    w.file('src', MIB)
    pager(w, 'file:src')
    c = Client(w, MIB, 'go')  # which waits for no answer
    wait_for(lambda: clients(w), 'the client')
    one = clients(w)[0]
    equal((one['size'], one['process'], one['writable']), (MIB, c.p.pid, False))
    out = w.run('status', '--control', w.path('ctl'), code=0).out
    has(out, 'paging 1 MiB', 'process %d' % c.p.pid)
    c.end()


def a_recorded_order_is_pulled_first(w):
    with open(w.path('src'), 'wb') as f:
        f.write(ruler(4 * MIB))
    p = pager(w, 'file:src', '--pull-workers', '0', '--chunk', '4K', '--record-order', 'trace')
    c = Client(w, 4 * MIB, 'farpage')
    for at in (3 * MIB, MIB, 2 * MIB):
        equal(c.do('check %d 4096' % at), 'right')
    c.end()
    gone(w, p, 1)
    equal(p.end(), 0)
    true(os.path.getsize(w.path('trace')) > 0, 'nothing was recorded')
    p = pager(w, 'file:src', '--chunk', '4K', '--order', 'trace:trace', '--layer', 'delay:rtt=1ms')
    c = Client(w, 4 * MIB, 'farpage')
    equal(c.do('check %d 4096' % (3 * MIB)), 'right')
    c.end()


def wrong_usage_is_told(w):
    w.file('src', MIB)
    has(w.run('page', 'file:src', code=2).err, '--socket is missing')
    has(w.run('page', 'file:src', '--socket', 'x', '--chunk', '5000', code=2).err, 'not a power of two')
    has(w.run('page', 'file:src', '--socket', 'x', '--take-over', code=2).err, 'goes with --writable')
    has(w.run('page', 'file:none', '--socket', 'x', code=1).err, 'it does not exist')
    pager(w, 'file:src', '--writable')
    has(w.run('page', 'file:src', '--socket', 'y', '--writable', code=1).err, 'another mount or server')
    has(w.run('page', 'file:src', '--socket', 'sock', code=1).err, 'another server has it')


main([each_format_gives_the_right_bytes, a_part_of_a_region_and_a_tail, many_clients_and_their_deaths,
      over_the_network_with_a_round_trip, stores_are_pushed_by_a_flush, a_writable_client_needs_a_writable_pager,
      killed_clients_that_write_lose_only_what_is_not_pushed, the_end_waits_for_clients_and_a_second_signal_does_not,
      a_killed_pager_is_a_stall_and_not_zeros, a_dead_source_is_sigbus_at_the_deadline, hostile_clients_disturb_nobody,
      status_names_the_clients, a_recorded_order_is_pulled_first, wrong_usage_is_told])
