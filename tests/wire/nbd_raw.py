# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""An NBD client made of nothing but bytes, for the tests of the server."""
import os
import socket
import struct
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'system'))
from cli_lib import DEADLINE, equal, true  # noqa: E402

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
    def __init__(self, path, flags=3, sock=None):
        self.s = sock or socket.socket(socket.AF_UNIX)
        self.s.settimeout(DEADLINE)
        if not sock:
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
