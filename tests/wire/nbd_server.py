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

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'system'))
from cli_lib import DEADLINE, cell, equal, has, main, true, wait_for

OPT, REPLY = 0x49484156454f5054, 0x0003e889045565a9
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = 1, 2, 3, 5, 6, 7, 8, 9, 10, 11
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
ERR = 1 << 31
UNSUP, POLICY, INVALID, UNKNOWN, TOO_BIG, EXT_REQD = ERR | 1, ERR | 2, ERR | 3, ERR | 6, ERR | 9, ERR | 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD = 1, 2, 4, 8, 16, 32
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP = 1, 5, 22, 28, 95
SIMPLE, CHUNKED, EXT = 'simple', 'structured', 'extended'
MAX = 32 << 20


class Gone(Exception):
    pass


class Client:
    def __init__(self, path, flags=3):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(DEADLINE)
        self.s.connect(path)
        self.form, self.cookie, self.flags = SIMPLE, 0, 0
        equal(self.get(18), b'NBDMAGICIHAVEOPT\0\3', 'greeting')
        if flags is not None:
            self.put(struct.pack('>I', flags))

    def put(self, data):
        self.s.sendall(data)

    def get(self, n):
        out = b''
        while len(out) < n:
            try:
                piece = self.s.recv(n - len(out))
            except ConnectionResetError:
                piece = b''
            if not piece:
                raise Gone('the server hung up after %d of %d bytes' % (len(out), n))
            out += piece
        return out

    def gone(self):
        try:
            self.get(1)
        except Gone:
            return True
        return False

    # negotiation

    def option(self, option, data=b'', length=None):
        self.put(struct.pack('>QII', OPT, option, len(data) if length is None else length) + data)

    def answer(self, option):
        magic, which, kind, n = struct.unpack('>QIII', self.get(20))
        equal((magic, which), (REPLY, option), 'head of an answer')
        return kind, self.get(n)

    def answers(self, option):
        """All up to the last one, which is no SERVER, INFO or META."""
        out = []
        while True:
            out.append(self.answer(option))
            if out[-1][0] not in (SERVER, REP_INFO, META):
                return out

    def ask(self, option, data=b''):
        self.option(option, data)
        return self.answers(option)

    def ask_kind(self, option, data=b''):
        return self.ask(option, data)[-1][0]

    @staticmethod
    def named(name, infos=()):
        return struct.pack('>I', len(name)) + name + struct.pack('>H', len(infos)) + b''.join(
            struct.pack('>H', i) for i in infos)

    @staticmethod
    def queries(name, *queries):
        return struct.pack('>I', len(name)) + name + struct.pack('>I', len(queries)) + b''.join(
            struct.pack('>I', len(q)) + q for q in queries)

    def go(self, form=SIMPLE, name=b'', contexts=()):
        if form != SIMPLE:
            equal(self.ask_kind(STRUCTURED if form == CHUNKED else EXTENDED), ACK, form)
        self.form = form
        self.ids = {}
        if contexts:
            for kind, data in self.ask(SET_META, self.queries(name, *contexts))[:-1]:
                self.ids[struct.unpack('>I', data[:4])[0]] = data[4:].decode()
        got = self.ask(GO, self.named(name))
        equal(got[-1][0], ACK, 'GO')
        self.size, self.flags = struct.unpack('>QH', got[0][1][2:])
        return self

    # transmission

    def send(self, kind, off=0, length=0, flags=0, data=b'', cookie=None):
        self.cookie += 1
        cookie = self.cookie if cookie is None else cookie
        if self.form == EXT:
            flags |= PAYLOAD if kind == WRITE else 0
            self.put(struct.pack('>IHHQQQ', 0x21e41c71, flags, kind, cookie, off, length) + data)
        else:
            self.put(struct.pack('>IHHQQI', 0x25609513, flags, kind, cookie, off, length) + data)
        return cookie

    def simple(self):
        magic, error, cookie = struct.unpack('>IIQ', self.get(16))
        equal(magic, 0x67446698, 'magic of a simple reply')
        return error, cookie

    def chunk(self):
        """(flags, type, cookie, off, data) or a simple reply as (1, None, cookie, None, error)"""
        magic = struct.unpack('>I', self.get(4))[0]
        if magic == 0x67446698:
            true(self.form == CHUNKED, 'a simple reply')
            error, cookie = struct.unpack('>IQ', self.get(12))
            return 1, None, cookie, None, error
        if self.form == EXT:
            equal(magic, 0x6e8a278c, 'magic of an extended reply')
            flags, kind, cookie, off, n = struct.unpack('>HHQQQ', self.get(28))
        else:
            equal(magic, 0x668e33ef, 'magic of a structured reply')
            flags, kind, cookie, n = struct.unpack('>HHQI', self.get(16))
            off = None
        return flags, kind, cookie, off, self.get(n)

    def reply(self, length=0, off=0):
        """(cookie, error, data) of the next reply, all chunks of it; `length`: of a read"""
        if self.form == SIMPLE:
            error, cookie = self.simple()
            return cookie, error, self.get(length) if length and not error else b''
        data, error, first, self.statuses = bytearray(length), 0, None, {}
        while True:
            flags, kind, cookie, at, body = self.chunk()
            first = cookie if first is None else first
            equal(cookie, first, 'cookie of a later chunk')
            if self.form == EXT:
                equal(at, off, 'offset in the reply')
            if kind is None:
                error = body
            elif kind == 1:
                where = struct.unpack('>Q', body[:8])[0]
                data[where - off:where - off + len(body) - 8] = body[8:]
            elif kind == 2:
                where, n = struct.unpack('>QI', body)
                data[where - off:where - off + n] = bytes(n)
                self.holes = getattr(self, 'holes', 0) + 1
            elif kind == 5:
                self.statuses[struct.unpack('>I', body[:4])[0]] = list(struct.iter_unpack('>II', body[4:]))
            elif kind == 6:
                which, n = struct.unpack('>II', body[:8])
                self.statuses[which] = list(struct.iter_unpack('>QQ', body[8:]))
                equal(len(self.statuses[which]), n, 'count of descriptors')
            elif kind == 0x8001:
                error, n = struct.unpack('>IH', body[:6])
                equal(len(body), 6 + n, 'length of an error')
                self.text = body[6:].decode()
            else:
                equal((kind, body), (0, b''), 'a chunk')
            if flags & 1:
                return first, error, bytes(data)

    def call(self, kind, off=0, length=0, flags=0, data=b''):
        """(error, data)"""
        cookie = self.send(kind, off, length, flags, data)
        got, error, body = self.reply(length if kind == READ else 0, off)
        equal(got, cookie, 'cookie')
        return error, body

    def error(self, *args, **more):
        return self.call(*args, **more)[0]

    def read(self, off, length, flags=0):
        error, data = self.call(READ, off, length, flags)
        equal(error, 0, 'read')
        return data


def serve(w, *sources, args=()):
    path = w.path('nbd.sock')
    s = w.start('serve', *sources, '--listen', 'nbd+unix:///?socket=' + path, *args)
    s.line()
    s.path = path
    return s


def alive(s):
    """A new client is served."""
    c = Client(s.path).go()
    c.read(0, min(512, c.size))
    c.s.close()


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


def cut_at_every_byte(w):
    """The link is cut before, inside and after each message: nothing hangs, nothing leaks, the next client is served."""
    whole, ends = conversation()
    for args in ([], ['--layer', 'delay:rtt=5ms']):
        s = serve(w, 'mem:1M', args=args)
        fds = lambda: len(os.listdir('/proc/%d/fd' % s.p.pid))
        before = fds()
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
        wait_for(lambda: fds() <= before, 'the end of all connections')
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


def a_peer_that_takes_nothing_costs_little(w):
    w.file('a', 40 << 20)
    for source, args in (('file:a', []), ('file:a', ['--layer', 'delay:rtt=1ms'])):
        s = serve(w, source, args=args)
        alive(s)
        clients = [Client(s.path).go() for _ in range(8)]
        before = rss(s)
        for c in clients:
            c.s.setblocking(False)
            for i in range(200):
                try:
                    c.s.send(struct.pack('>IHHQQI', 0x25609513, 0, READ, i, 0, 8 << 20))
                except BlockingIOError:
                    break
        last = [before]

        def settled():
            now = rss(s)
            last[:] = last[-9:] + [now]
            return len(last) == 10 and max(last) - min(last) < 1
        wait_for(settled, 'the end of its growth')
        alive(s)
        grown = rss(s) - before
        # asan keeps what was freed
        true(grown < 1200, 'it grew by %d MiB' % grown)
        print('# grown by %d MiB' % grown)
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
         a_flush_covers_other_connections, writes_after_reads_of_the_same_bytes, cut_at_every_byte, one_byte_at_a_time,
         garbage_of_all_kinds, a_peer_that_takes_nothing_costs_little, stop_with_clients_there, both_protocols_on_one_socket,
         sockets_that_systemd_opened, whole_chunks_only]

if __name__ == '__main__':
    for case in CASES:
        cell('raw bytes', 'farpage is the server')(case)
    main(CASES)
