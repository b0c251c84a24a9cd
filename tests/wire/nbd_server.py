#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""nbd_server.py FARPAGE [CASE...]: the NBD server byte by byte, as the protocol's text has it, and as clients get it wrong."""
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time

from nbd_raw import (ABORT, ACK, CACHE, CHUNKED, Client, DF, DISC, EINVAL, ENOSPC, EPERM, EXPORT_NAME, EXT, EXTENDED, EXT_REQD,
                     FAST_ZERO, FLUSH, FUA, GO, INFO, INVALID, LIST, LIST_META, MAX, NO_HOLE, OPT, PAYLOAD, POLICY, READ,
                     REQ_ONE, SET_META, SIMPLE, STARTTLS, STATUS, STRUCTURED, TOO_BIG, TRIM, UNKNOWN, UNSUP, WRITE, ZEROES,
                     alive, serve)
from cli_lib import DEADLINE, SLACK, cell, equal, has, main, true, wait_for


# --------------------------------------------------------------------------------------------------- negotiation

def options_are_answered(w):
    s = serve(w, 'mem:1M', 'second=mem:5000')
    c = Client(s.path)
    got = c.ask(LIST)
    equal([x[1][4:] for x in got[:-1]], [b'default', b'second'], 'LIST')
    equal(got[-1], (ACK, b''), 'end of LIST')
    equal(c.ask_kind(LIST, b'x'), INVALID, 'LIST with data')
    equal(c.ask_kind(4), UNSUP, 'option 4')
    equal(c.ask_kind(77, b'abc'), UNSUP, 'option 77')
    equal(c.ask_kind(STARTTLS), POLICY, 'STARTTLS without a certificate')
    equal(c.ask_kind(STARTTLS, b'x'), INVALID, 'STARTTLS with data')
    equal(c.ask_kind(STRUCTURED, b'x'), INVALID, 'STRUCTURED_REPLY with data')
    equal(c.ask_kind(INFO, c.named(b'nowhere')), UNKNOWN, 'unknown export')
    equal(c.ask_kind(INFO, c.named(b'second')[:-1]), INVALID, 'a short INFO')
    equal(c.ask_kind(INFO, c.named(b'second') + b'x'), INVALID, 'a long INFO')
    equal(c.ask_kind(INFO, struct.pack('>I', 0xffffffff) + b'second\0\0'), INVALID, 'a name without end')
    got = c.ask(INFO, c.named(b'second', [0, 1, 2, 3, 77]))
    infos = {struct.unpack('>H', x[1][:2])[0]: x[1][2:] for x in got[:-1]}
    equal(sorted(infos), [0, 1, 3], 'infos')
    equal(struct.unpack('>Q', infos[0][:8])[0], 5000, 'size')
    equal(infos[1], b'second', 'name')
    equal(struct.unpack('>III', infos[3]), (1, 4096, MAX), 'block sizes')
    c.option(LIST, b'', 200000)
    c.put(bytes(200000))
    equal(c.answers(LIST)[-1][0], TOO_BIG, 'an option of 200000 bytes')
    equal(c.ask_kind(EXTENDED), ACK, 'EXTENDED_HEADERS')
    equal(c.ask_kind(STRUCTURED), EXT_REQD, 'STRUCTURED_REPLY behind it')
    equal(c.ask(ABORT), [(ACK, b'')], 'ABORT')
    true(c.gone(), 'the end after ABORT')


def export_name_the_old_way(w):
    s = serve(w, 'mem:1M', 'second=mem:5000')
    for flags, zeroes in ((1, 124), (3, 0)):
        c = Client(s.path, flags)
        c.option(EXPORT_NAME, b'second')
        size, export_flags = struct.unpack('>QH', c.get(10))
        equal(size, 5000, 'size')
        equal(c.get(zeroes), bytes(zeroes), 'zeroes')
        equal(c.read(4990, 10), bytes(10), 'read')
    c = Client(s.path)
    c.option(EXPORT_NAME, b'nowhere')
    true(c.gone(), 'the end at an unknown name')
    c = Client(s.path)
    c.ask(EXTENDED)
    c.option(EXPORT_NAME, b'')
    true(c.gone(), 'the end at EXPORT_NAME behind EXTENDED_HEADERS')


def nonsense_ends_the_connection(w):
    s = serve(w, 'mem:1M')
    true(Client(s.path, 4).gone(), 'unknown client flags')
    c = Client(s.path)
    c.put(b'GET / HTTP/1.1\r\n\r\n')
    true(c.gone(), 'an option with another magic')
    c = Client(s.path).go()
    c.put(bytes(28))
    true(c.gone(), 'a request with another magic')
    alive(s)


def go_nbd_sends_a_length_of_zero(w):
    s = serve(w, 'mem:1M')
    for option in (INFO, GO):
        c = Client(s.path, 0)
        c.put(struct.pack('>QII', OPT, option, 0) + struct.pack('>I', 7))
        c.put(b'defa')
        c.put(b'ult\0\0')
        got = c.answers(option)
        equal([struct.unpack('>H', x[1][:2])[0] for x in got[:-1]], [0, 3], 'infos')
        equal(got[-1][0], ACK, 'answer')
    c.form = SIMPLE
    equal(c.read(0, 8), bytes(8), 'read')


def contexts_are_chosen(w):
    s = serve(w, 'mem:1M', 'second=mem:5000')
    c = Client(s.path)
    equal(c.ask_kind(LIST_META, c.queries(b'')), INVALID, 'without structured replies')
    c.ask(STRUCTURED)
    names = lambda got: [x[1][4:] for x in got[:-1]]
    every = [b'base:allocation', b'farpage:local', b'farpage:dirty']
    equal(names(c.ask(LIST_META, c.queries(b''))), every, 'all')
    equal(names(c.ask(LIST_META, c.queries(b'', b'farpage:'))), every[1:], 'a namespace')
    equal(names(c.ask(SET_META, c.queries(b'', b'base:', b'x:y'))), [], 'a namespace cannot be set')
    equal(c.ask_kind(SET_META, c.queries(b'nowhere', b'base:allocation')), UNKNOWN, 'unknown export')
    equal(c.ask_kind(SET_META, c.queries(b'', b'base:allocation')[:-1]), INVALID, 'short')
    equal(c.ask_kind(SET_META, struct.pack('>III', 0, 0xffffffff, 0)), INVALID, 'too many queries')
    equal(names(c.ask(SET_META, c.queries(b'second', b'base:allocation'))), every[:1], 'for another export')
    c.form = CHUNKED
    equal(c.ask_kind(GO, c.named(b'')), ACK, 'GO')
    equal(c.error(STATUS, 0, 4096), EINVAL, 'BLOCK_STATUS of another export\'s context')


# -------------------------------------------------------------------------------------------------- transmission

def every_command_in_every_form(w):
    for form in (SIMPLE, CHUNKED, EXT):
        s = serve(w, 'mem:1M')
        c = Client(s.path).go(form)
        want = bytearray(1 << 20)
        rnd = random.Random(form)
        for _ in range(100):
            off, n = rnd.randrange(1 << 20), rnd.choice([1, 511, 4096, 65536, 70001, 300000])
            n = min(n, (1 << 20) - off)
            kind = rnd.choice([WRITE, READ, READ, TRIM, ZEROES, CACHE, FLUSH])
            flags = rnd.choice([0, FUA])
            if kind == WRITE:
                data = rnd.randbytes(n)
                equal(c.error(WRITE, off, n, flags, data), 0, 'write')
                want[off:off + n] = data
            elif kind == READ:
                equal(c.read(off, n, DF if form != SIMPLE else 0), bytes(want[off:off + n]), 'read %s' % form)
            elif kind in (TRIM, ZEROES):
                flags |= rnd.choice([0, NO_HOLE, FAST_ZERO]) if kind == ZEROES else 0
                equal(c.error(kind, off, n, flags), 0, 'clear')
                want[off:off + n] = bytes(n)
            else:
                equal(c.error(kind, *((0, 0) if kind == FLUSH else (off, n))), 0, 'command %d' % kind)
        equal(c.read(0, 1 << 20), bytes(want), 'all')
        equal(c.read(5, 0), b'', 'nothing')
        c.send(DISC)
        true(c.gone(), 'the end')
        s.end()


def every_error_keeps_the_connection(w):
    w.file('a', 100000)
    for form in (SIMPLE, CHUNKED, EXT):
        s = serve(w, 'mem:100000', 'ro=file:a')
        c = Client(s.path).go(form)
        big = MAX + 1
        for what, wanted, call in [
                ('read past the end', EINVAL, (READ, 99999, 2)),
                ('read far past the end', EINVAL, (READ, 1 << 63, 2)),
                ('a sum beyond 64 bits', EINVAL, (READ, (1 << 64) - 1, 2)),
                ('a read that is too long', EINVAL, (READ, 0, big)),
                ('write past the end', ENOSPC, (WRITE, 99999, 2, 0, b'xx')),
                ('zeroes past the end', ENOSPC, (ZEROES, 99999, 2)),
                ('trim past the end', EINVAL, (TRIM, 99999, 2)),
                ('cache past the end', EINVAL, (CACHE, 99999, 2)),
                ('a flush with a range', EINVAL, (FLUSH, 0, 1)),
                ('block status without a context', EINVAL, (STATUS, 0, 1)),
                ('an unknown command', EINVAL, (8, 0, 0)),
                ('another', EINVAL, (65535, 0, 0)),
                ('an unknown flag', EINVAL, (READ, 0, 1, 1 << 15)),
                ('a flag of another command', EINVAL, (READ, 0, 1, NO_HOLE)),
                ('a write with it', EINVAL, (WRITE, 0, 3, REQ_ONE, b'abc')),
                ('a trim with it', EINVAL, (TRIM, 0, 3, FAST_ZERO))]:
            equal(c.error(*call), wanted, '%s, %s' % (what, form))
            equal(c.read(0, 8), bytes(8), 'a read after ' + what)
        equal(c.error(READ, 0, 1, DF), EINVAL if form == SIMPLE else 0, 'DF')
        equal(c.error(WRITE, 0, big, 0, bytes(big)), ENOSPC, 'a long write')
        equal(c.read(0, 8), bytes(8), 'a read after it')
        if form != SIMPLE:
            c.error(READ, 99999, 2)
            has(c.text, 'end of the export')
        s.end()
        s = serve(w, 'file:a', args=['--read-only'])
        c = Client(s.path).go(form)
        true(c.flags & 2, 'the read-only flag')
        for call in ((WRITE, 0, 3, 0, b'abc'), (TRIM, 0, 3), (ZEROES, 0, 3)):
            equal(c.error(*call), EPERM, 'a change of a read-only export, ' + form)
        equal(c.error(FLUSH), 0, 'a flush of it')
        s.end()


def a_refused_write_is_answered_behind_its_bytes(w):
    """Not before: libnbd takes an answer to what it is still sending for one to nothing, and gives the connection up."""
    s = serve(w, 'mem:1M')
    for form in (SIMPLE, CHUNKED, EXT):
        c = Client(s.path).go(form)
        for off, n in (((1 << 20) - 5, 100000), (0, MAX + 1), ((1 << 20) - 5, 10)):
            data = bytes(n)
            cookie = c.send(WRITE, off, n, data=data[:n - 1])
            true(not select.select([c.s], [], [], 0.05)[0], 'an answer before the last byte')
            c.put(data[n - 1:])
            equal(c.reply(0, off)[:2], (cookie, ENOSPC), 'answer')
        equal(c.read(0, 8), bytes(8), 'a read after it')


def payloads_of_extended_requests(w):
    s = serve(w, 'mem:1M')
    c = Client(s.path).go(EXT)
    equal(c.error(TRIM, 0, 100, PAYLOAD, bytes(100)), EINVAL, 'a trim with a payload')
    equal(c.error(READ, 0, 200000, PAYLOAD, bytes(200000)), EINVAL, 'a read with one')
    equal(c.error(ZEROES, 0, 1 << 40), ENOSPC, '64 bits of zeroes')
    equal(c.read(7, 9), bytes(9), 'a read behind them')


def zeroes_travel_as_holes(w):
    s = serve(w, 'mem:4M')
    c = Client(s.path).go(CHUNKED)
    for n in (4096, 65536, 1 << 20, 4 << 20):
        before = getattr(c, 'holes', 0)
        equal(c.read(0, n), bytes(n), 'zeros')
        equal(c.holes, before + 1, 'a hole of %d' % n)
    c.error(WRITE, 4 * 1024 * 1024 - 1, 1, 0, b'x')
    before = c.holes
    equal(c.read(0, 4 << 20), bytes((4 << 20) - 1) + b'x', 'almost zeros')
    equal(c.holes, before, 'no hole')


def block_status_tells_holes(w):
    w.file('a', 1 << 20, holes=[(65536, 131072)])
    with open(w.path('a'), 'r+b') as f:
        data = f.read()
    with open(w.path('b'), 'wb') as f:  # with a real hole
        f.write(data[:65536])
        f.seek(131072)
        f.write(data[131072:])
    s = serve(w, 'file:b')
    for form in (CHUNKED, EXT):
        c = Client(s.path).go(form, contexts=[b'base:allocation', b'farpage:local', b'farpage:dirty'])
        equal(sorted(c.ids.values()), ['base:allocation', 'farpage:dirty', 'farpage:local'], 'contexts')
        which = {v: k for k, v in c.ids.items()}
        equal(c.error(STATUS, 0, 1 << 20), 0, 'BLOCK_STATUS')
        equal(c.statuses[which['base:allocation']], [(65536, 0), (65536, 3), ((1 << 20) - 131072, 0)], 'allocation')
        equal(c.statuses[which['farpage:local']], [(1 << 20, 1)], 'local')
        equal(c.statuses[which['farpage:dirty']], [(1 << 20, 0)], 'dirty')
        equal(c.error(STATUS, 1000, 1 << 17, REQ_ONE), 0, 'with REQ_ONE')
        equal(c.statuses[which['base:allocation']], [(64536, 0)], 'one')
        equal(c.error(STATUS, 0, 0), EINVAL, 'an empty range')


# ------------------------------------------------------------------------------------------------------- at once

def slow_requests_run_beside_each_other(w):
    s = serve(w, 'mem:1M', args=['--layer', 'delay:rtt=300ms'])
    c = Client(s.path).go()
    began = time.monotonic()
    cookies = {c.send(READ, i * 4096, 4096) for i in range(16)}
    for _ in range(16):
        cookies.remove(c.reply(4096)[0])
    took = time.monotonic() - began
    true(took < 16 * 0.3 / 2, '16 reads of 300 ms took %.1f s' % took)


def many_at_once_each_gets_its_own(w):
    data = w.file('a', 1 << 20)
    for args in ([], ['--layer', 'delay:rtt=1ms']):
        s = serve(w, 'file:a', args=args)
        for form in (SIMPLE, CHUNKED):
            c = Client(s.path).go(form)
            rnd = random.Random(1)
            asked, burst = {}, b''
            for i in range(300):
                off, n = rnd.randrange(900000), rnd.choice([1, 100, 4096, 40000, 100000])
                asked[i] = off, n
                burst += struct.pack('>IHHQQI', 0x25609513, 0, READ, i, off, n)
            at = 0
            pid = os.fork()
            if pid == 0:  # it writes while this process reads
                while at < len(burst):
                    k = rnd.randrange(1, 2000)
                    c.put(burst[at:at + k])
                    at += k
                os._exit(0)
            for _ in range(300):
                if form == SIMPLE:
                    error, cookie = c.simple()
                    off, n = asked.pop(cookie)
                    got = c.get(n)
                else:
                    flags, kind, cookie, _, body = c.chunk()
                    off, n = asked.pop(cookie)
                    error, got = 0, body[8:]
                    equal((flags, kind, struct.unpack('>Q', body[:8])[0]), (1, 1, off), 'chunk')
                equal((error, got), (0, data[off:off + n]), 'reply')
            os.waitpid(pid, 0)
        s.end()


def a_flush_covers_other_connections(w):
    w.file('a', 1 << 20)
    s = serve(w, 'file:a')
    a, b = Client(s.path).go(), Client(s.path).go()
    true(a.flags & 1 << 8, 'multi-conn')
    equal(a.error(WRITE, 1000, 5, 0, b'hello'), 0, 'write')
    equal(b.read(1000, 5), b'hello', 'seen on the other')
    equal(b.error(FLUSH), 0, 'flush')
    equal(w.read('a')[1000:1005], b'hello', 'in the file')


def writes_after_reads_of_the_same_bytes(w):
    """Replies on loan and changes of what is lent."""
    s = serve(w, 'mem:8M')
    c = Client(s.path).go()
    n = 1 << 20
    equal(c.error(WRITE, 0, n, 0, b'a' * n), 0, 'write')
    for i in range(20):
        mark = bytes([65 + i]) * n
        c.send(READ, 0, n, cookie=1)
        first = c.reply(n)[2]
        true(len(set(first)) == 1, 'a torn read')
        c.send(WRITE, 0, n, 0, mark, cookie=2)
        equal(c.reply()[:2], (2, 0), 'write')
        equal(c.read(0, n), mark, 'read')


def changes_in_one_message_with_reads(w):
    """What was asked for first is answered as it was then, wherever the bytes are sent from."""
    for source in ('mem:8M', 'mem:8M?private=1'):  # of what waits one may overtake another
        s = serve(w, source)
        for form in (SIMPLE, CHUNKED):
            c = Client(s.path).go(form)
            for n in (512, 4096, 20000, 65536):
                for kind, length, data, after in ((WRITE, n, b'b' * n, b'b' * n), (TRIM, n, b'', bytes(n)),
                                                  (ZEROES, n, b'', bytes(n)), (WRITE, 1, b'c', b'a' * (n - 1) + b'c')):
                    off = n if length == n else 2 * n - 1
                    equal(c.error(WRITE, 0, 3 * n, 0, b'a' * 3 * n), 0, 'write')
                    head = lambda what, cookie, at, k: struct.pack('>IHHQQI', 0x25609513, 0, what, cookie, at, k)
                    c.put(head(READ, 1, n, n) + head(READ, 2, 2 * n, n) + head(kind, 3, off, length) + data + head(READ, 4, n, n))
                    got = {}
                    for _ in range(4):
                        magic = c.s.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL)
                        cookie = struct.unpack('>Q', magic[8:])[0]
                        got[cookie] = c.reply(0 if cookie == 3 else n, 2 * n if cookie == 2 else n)
                    equal((got[1][2], got[2][2]), (b'a' * n, b'a' * n), '%s, %d bytes: reads before %d' % (source, n, kind))
                    equal(got[3][1], 0, 'change')
                    equal(got[4][2], after, '%s, %d bytes: the read behind %d' % (source, n, kind))
        c = Client(s.path).go()
        equal(c.error(WRITE, 0, 1 << 20, 0, bytes(k >> 12 for k in range(1 << 20))), 0, 'write')
        c.put(b''.join(struct.pack('>IHHQQI', 0x25609513, 0, READ, k, k % 256 << 12, 4096) for k in range(1000)))
        for k in range(1000):
            cookie, error, data = c.reply(4096)
            equal((error, data), (0, bytes([cookie % 256]) * 4096), 'one of a thousand')
        s.end()


# ------------------------------------------------------------------------------------------------------- hostile

def conversation():
    """All that a client says, byte for byte, and where each message ends."""
    out, ends = b'', []
    for m in [struct.pack('>I', 3),
              struct.pack('>QII', OPT, STRUCTURED, 0),
              struct.pack('>QII', OPT, SET_META, 27) + Client.queries(b'', b'base:allocation'),
              struct.pack('>QII', OPT, GO, 6) + Client.named(b''),
              struct.pack('>IHHQQI', 0x25609513, 0, WRITE, 1, 0, 100) + b'w' * 100,
              struct.pack('>IHHQQI', 0x25609513, 0, READ, 2, 0, 100),
              struct.pack('>IHHQQI', 0x25609513, 0, STATUS, 3, 0, 4096),
              struct.pack('>IHHQQI', 0x25609513, 0, FLUSH, 4, 0, 0),
              struct.pack('>IHHQQI', 0x25609513, 0, DISC, 5, 0, 0)]:
        out += m
        ends.append(len(out))
    return out, ends


def sockets(s):
    fds = '/proc/%d/fd/' % s.p.pid
    return sum(os.path.islink(fds + fd) and os.readlink(fds + fd).startswith('socket:') for fd in os.listdir(fds))


def cut_at_every_byte(w):
    """The link is cut before, inside and after each message: nothing hangs, nothing leaks, the next client is served."""
    whole, ends = conversation()
    for args in ([], ['--layer', 'delay:rtt=5ms']):
        s = serve(w, 'mem:1M', args=args)
        before = sockets(s)
        cuts = range(len(whole) + 1) if not args else sorted({max(0, e + d) for e in [0] + ends for d in (-1, 0, 1)})
        for k in cuts:
            for how in ('close', 'half', 'reset'):
                c = Client(s.path, None)
                c.put(whole[:k])
                if how == 'reset':  # with replies unread
                    c.s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                if how == 'half':
                    c.s.shutdown(socket.SHUT_WR)
                    while c.s.recv(65536):
                        pass
                c.s.close()
        alive(s)
        wait_for(lambda: sockets(s) <= before, 'the end of all connections')
        equal(s.end(), 0, 'exit code')


def one_byte_at_a_time(w):
    s = serve(w, 'mem:1M')
    whole, _ = conversation()
    c = Client(s.path, None)
    for b in whole:
        c.put(bytes([b]))
    got = b''
    while True:
        piece = c.s.recv(65536)
        if not piece:
            break
        got += piece
    # in any order: no request waited for the one before
    has(got, struct.pack('>IIQ', 0x67446698, 0, 1), struct.pack('>IHHQI', 0x668e33ef, 1, 1, 2, 108),
        struct.pack('>IHHQI', 0x668e33ef, 1, 5, 3, 12), struct.pack('>IIQ', 0x67446698, 0, 4))
    equal(s.end(), 0, 'exit code')


def garbage_of_all_kinds(w):
    s = serve(w, 'mem:1M')
    seed = int(os.environ.get('FARPAGE_SEED', random.randrange(1 << 30)))
    print('# seed %d' % seed)
    rnd = random.Random(seed)
    whole, _ = conversation()
    for _ in range(300):
        c = Client(s.path, None)
        data = bytearray(whole)
        for _ in range(rnd.randrange(1, 6)):
            data[rnd.randrange(len(data))] = rnd.randrange(256)
        c.put(bytes(data))
        c.s.shutdown(socket.SHUT_WR)
        while c.s.recv(1 << 20):
            pass
        c.s.close()
    alive(s)


def rss(s):
    with open('/proc/%d/status' % s.p.pid) as f:
        return next(int(x.split()[1]) for x in f if x.startswith('VmRSS')) / 1024


def settled(s):
    """RSS once it has stopped to grow."""
    last = []

    def still():
        true(s.p.poll() is None, 'the server ended with %s: %s' % (s.p.returncode, s.err()[-1000:]))
        last.append(rss(s))
        return len(last) > 25 and max(last[-25:]) - min(last[-25:]) < 4
    wait_for(still, 'the end of its growth', 3 * DEADLINE)
    return last[-1]


def a_peer_that_takes_nothing_costs_little(w):
    """64 MiB a connection, 512 MiB together; what a sanitizer notes of a byte is an eighth of it."""
    w.file('a', 40 << 20)
    for args, n, most in ([], 12, 512), (['--layer', 'delay:rtt=1ms'], 2, 128):
        s = serve(w, 'file:a', args=args)
        alive(s)
        clients = [Client(s.path).go() for _ in range(n)]
        before = settled(s)
        for c in clients:
            c.s.setblocking(False)
            for i in range(200):
                try:
                    c.s.send(struct.pack('>IHHQQI', 0x25609513, 0, READ, i, 0, 8 << 20))
                except BlockingIOError:
                    break
        grown = settled(s) - before
        print('# %d connections: grown by %d MiB' % (n, grown))
        alive(s)
        # What lies in the pool of buffers is another 64 MiB.
        true(grown < (most * 1.13 + 64) * SLACK, 'it grew by %d MiB' % grown)
        for c in clients:
            c.s.close()
        equal(s.end(), 0, 'exit code')


def stop_with_clients_there(w):
    s = serve(w, 'mem:1M', args=['--layer', 'delay:rtt=100ms'])
    idle, half, busy = Client(s.path), Client(s.path).go(), Client(s.path).go()
    half.put(b'\x25\x60')
    for i in range(10):
        busy.send(READ, 0, 4096)
    equal(s.end(), 0, 'exit code')
    true(idle.gone() and half.gone(), 'the end for clients')


# ------------------------------------------------------------------------------------------------------ listeners

def both_protocols_on_one_socket(w):
    data = w.file('a', 100000)
    path = w.path('any.sock')
    s = w.start('serve', 'file:a', '--listen', 'any+unix:///?socket=' + path)
    has(s.line(), 'listening any+unix:///default?socket=')
    c = Client(path).go(CHUNKED)
    equal(c.read(0, 100000), data, 'NBD')
    equal(w.run('copy', 'grpc+unix:///?socket=' + path, '-', code=0).stdout, data, 'gRPC')
    c.send(DISC)
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(path)
    silent.close()
    equal(s.end(), 0, 'exit code')


def sockets_that_systemd_opened(w):
    data = w.file('a', 100000)
    tcp = socket.socket()
    tcp.bind(('127.0.0.1', 0))
    tcp.listen()
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(w.path('u.sock'))
    unix.listen()
    script = ('import os,sys\nos.dup2(%d,13);os.dup2(%d,14);os.dup2(13,3);os.dup2(14,4)\n'
              'os.set_inheritable(3,True);os.set_inheritable(4,True)\n'
              'os.environ.update(LISTEN_PID=str(os.getpid()),LISTEN_FDS="2",LISTEN_FDNAMES="both:nbd")\n'
              'os.execv(sys.argv[1],sys.argv[1:])' % (tcp.fileno(), unix.fileno()))
    with open(w.path('out'), 'wb') as out:
        p = subprocess.Popen([sys.executable, '-c', script, os.path.abspath(sys.argv[1]), 'serve', 'file:a'], cwd=w.dir,
                             pass_fds=[tcp.fileno(), unix.fileno()], stdout=out)
    try:
        equal(Client(w.path('u.sock')).go().read(0, 1000), data[:1000], 'NBD')
        uri = 'grpc://127.0.0.1:%d' % tcp.getsockname()[1]
        equal(w.run('copy', uri, '-', code=0).stdout, data, 'gRPC')
        p.terminate()
        equal(p.wait(DEADLINE), 0, 'exit code')
        has(w.read('out').decode(), 'listening any://127.0.0.1:', 'listening nbd+unix:///default?socket=')
    finally:
        p.kill()
        p.wait()


def whole_chunks_only(w):
    """A store that takes whole blocks says so, or is refused with the way out."""
    os.mkdir(w.path('d'))
    p = w.run('serve', 'dir:d?size=1M&chunk=100000', '--listen', 'nbd+unix:///?socket=' + w.path('x'))
    true(p.returncode == 2 or p.returncode == 1, 'exit %d' % p.returncode)
    has(p.err, '--layer chunked')
    os.mkdir(w.path('e'))
    s = serve(w, 'dir:e?size=1M&chunk=4096')
    c = Client(s.path)
    infos = {struct.unpack('>H', x[1][:2])[0]: x[1][2:] for x in c.ask(GO, c.named(b''))[:-1]}
    minimum = struct.unpack('>III', infos[3])[0]
    c.form = SIMPLE
    if minimum > 1:
        equal(c.error(READ, 1, 4096), EINVAL, 'an unaligned read')
        equal(c.error(WRITE, 0, 100, 0, bytes(100)), EINVAL, 'a short write')
    equal(c.error(WRITE, 4096, 4096, 0, b'q' * 4096), 0, 'a whole one')
    equal(c.read(4096, 4096), b'q' * 4096, 'read')


CASES = [options_are_answered, export_name_the_old_way, nonsense_ends_the_connection, go_nbd_sends_a_length_of_zero,
         contexts_are_chosen, every_command_in_every_form, every_error_keeps_the_connection,
         a_refused_write_is_answered_behind_its_bytes, payloads_of_extended_requests,
         zeroes_travel_as_holes, block_status_tells_holes, slow_requests_run_beside_each_other, many_at_once_each_gets_its_own,
         a_flush_covers_other_connections, writes_after_reads_of_the_same_bytes, changes_in_one_message_with_reads, cut_at_every_byte, one_byte_at_a_time,
         garbage_of_all_kinds, a_peer_that_takes_nothing_costs_little, stop_with_clients_there, both_protocols_on_one_socket,
         sockets_that_systemd_opened, whole_chunks_only]

if __name__ == '__main__':
    for case in CASES:
        cell('raw bytes', 'farpage is the server')(case)
    main(CASES)
