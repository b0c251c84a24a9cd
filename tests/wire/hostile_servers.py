#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""hostile_servers.py FARPAGE [CASE...]: servers of gRPC, NBD and HTTP that never end what they say, or never say it.

Each row is a server of raw bytes. A copy from it must fail, in time, with a message, and with no more memory than a copy
from an honest one needs; what it took at most is measured by the system."""
import concurrent.futures
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'system'))
from cli_lib import FARPAGE, SLACK, cell, main, true

LIMIT_MIB = 120 * SLACK  # of a whole process; an honest copy takes some 30
LIMIT_S = 25
MIB = 1 << 20


class Server:
    """Runs `talk(c)` for each connection until it returns or the peer has gone."""

    def __init__(self, talk):
        self.talk, self.over, self.said = talk, False, 0
        self.s = socket.create_server(('127.0.0.1', 0), backlog=64)
        self.port = self.s.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                c, _ = self.s.accept()
            except OSError:
                return
            threading.Thread(target=self.one, args=(c,), daemon=True).start()

    def one(self, c):
        c.settimeout(LIMIT_S)
        try:
            self.talk(Peer(self, c))
        except (OSError, struct.error):
            pass
        finally:
            c.close()

    def close(self):
        self.over = True
        self.s.close()


class Peer:
    def __init__(self, server, c):
        self.server, self.c, self.buf = server, c, b''
        self.cond, self.ended = threading.Condition(), False
        threading.Thread(target=self.drain, daemon=True).start()

    def drain(self):
        while True:
            try:
                piece = self.c.recv(65536)
            except OSError:
                piece = b''
            with self.cond:
                self.buf += piece
                self.ended = not piece
                self.cond.notify_all()
            if not piece:
                return

    def get(self, n):
        with self.cond:
            self.cond.wait_for(lambda: len(self.buf) >= n or self.ended, LIMIT_S)
            if len(self.buf) < n:
                raise ConnectionError
            out, self.buf = self.buf[:n], self.buf[n:]
            return out

    def put(self, data):
        if self.server.over:
            raise ConnectionError
        self.c.sendall(data)
        self.server.said += len(data)

    def endless(self, data):
        data = data * max(1, 65536 // len(data))
        while True:
            self.put(data)

    def silence(self):
        with self.cond:
            self.cond.wait_for(lambda: self.ended or self.server.over, LIMIT_S)

    def slowly(self, data):
        for b in data:
            self.put(bytes([b]))
            time.sleep(0.2)


def high_water():
    """MiB that this process has used: Linux counts them as the child's, too, whose memory was ours until it ran its program."""
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith('VmHWM:')) / 1024


def one(name, talk, uri):
    """(seconds, MiB, what is wrong)"""
    s = Server(talk)
    began = time.monotonic()
    env = dict(os.environ, ASAN_OPTIONS=os.environ.get('ASAN_OPTIONS', '') + ':quarantine_size_mb=4')
    p = subprocess.Popen([FARPAGE, 'copy', uri % s.port, 'null:', '--deadline', '1s'], env=env, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ours = high_water()
    killer = threading.Timer(LIMIT_S, p.send_signal, [signal.SIGKILL])
    killer.start()
    err = p.stderr.read()
    p.stderr.close()
    _, status, usage = os.wait4(p.pid, 0)
    killer.cancel()
    p.returncode = os.waitstatus_to_exitcode(status)
    took, rss = time.monotonic() - began, usage.ru_maxrss / 1024
    s.close()
    if os.environ.get('FARPAGE_VERBOSE'):
        print('# %s: exit %d, %.1f s, %d MiB, heard %d MiB: %s' % (name, p.returncode, took, rss, s.said / MIB, err[:100]))
    wrong = None
    if p.returncode not in (1, 4):
        wrong = '%s: exit %d: %r' % (name, p.returncode, err[-2000:])
    elif not err.startswith(b'farpage: ') or len(err) > 2000:
        wrong = '%s: no message, or a strange one: %r' % (name, err[-2000:])
    elif any(c < 32 and c != 10 or c == 127 for c in err) or b'\xc2\x9b' in err or err.count(b'\n') != 1:
        wrong = '%s: what it said reached the terminal: %r' % (name, err)
    elif rss > max(LIMIT_MIB, ours):
        wrong = '%s: %d MiB' % (name, rss)
    return took, rss, wrong


def run(rows, uri):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda row: one(row[0], row[1], uri), rows))
    print('# %d servers, %d MiB at most, %.1f s at most' % (len(rows), max(d[1] for d in done), max(d[0] for d in done)))
    true(not any(d[2] for d in done), '\n'.join(d[2] for d in done if d[2]))


# ------------------------------------------------------------------------------------------------------------ gRPC

def frame(kind, flags=0, stream=0, payload=b'', length=None):
    n = len(payload) if length is None else length
    return struct.pack('>I', n << 8 | kind)[0:4] + struct.pack('>BI', flags, stream) + payload


def field(name, value, first=0):
    assert len(name) < 127 and len(value) < 16000
    n = len(value)
    size = bytes([n]) if n < 127 else bytes([127]) + (bytes([n - 127]) if n - 127 < 128 else
                                                      bytes([(n - 127) & 127 | 128, (n - 127) >> 7]))
    return bytes([first, len(name)]) + name + size + value


ESCAPES = b'\x1b[31mred\x1b]0;title\x07\r\nfarpage: all is well.\n\xc2\x9b31m'
OK = b'\x88' + field(b'content-type', b'application/grpc')
HELLO = frame(4) + frame(4, 1) + frame(8, 0, 0, struct.pack('>I', 1 << 30))


def on_call(say):
    """After the greeting, for each call that comes: say(peer, stream)."""
    def talk(p):
        p.get(24)
        p.put(HELLO)
        while True:
            head = p.get(9)
            n, kind, stream = struct.unpack('>I', b'\0' + head[:3])[0], head[3], struct.unpack('>I', head[5:9])[0]
            p.get(n)
            if kind == 1:
                say(p, stream)
    return talk


def greeted(say):
    def talk(p):
        p.put(HELLO)
        say(p)
    return talk


def reply(p, stream, body=b''):
    p.put(frame(1, 4, stream, OK) + body)


def data(p, stream, start, more):
    """A message that begins so and goes on for ever."""
    reply(p, stream, frame(0, 0, stream, start))
    while True:
        p.put(frame(0, 0, stream, more))


GRPC = [
    ('text without end', lambda p: p.endless(b'hello, who is there?\n')),
    ('zeros without end', lambda p: p.endless(bytes(1000))),
    ('silence', lambda p: p.silence()),
    ('a greeting, slowly', lambda p: p.slowly(HELLO * 3)),
    ('silence after the greeting', greeted(lambda p: p.silence())),
    ('settings without end', greeted(lambda p: p.endless(frame(4, 0, 0, struct.pack('>HI', 4, 70000))))),
    ('pings without end', greeted(lambda p: p.endless(frame(6, 0, 0, bytes(8))))),
    ('answers to pings without end', greeted(lambda p: p.endless(frame(6, 1, 0, bytes(8))))),
    ('unknown frames without end', greeted(lambda p: p.endless(frame(99, 0, 0, bytes(1000))))),
    ('windows without end', greeted(lambda p: p.endless(frame(8, 0, 0, struct.pack('>I', 1))))),
    ('resets without end', greeted(lambda p: p.endless(frame(3, 0, 1, struct.pack('>I', 8))))),
    ('priorities without end', greeted(lambda p: p.endless(frame(2, 0, 7, bytes(5))))),
    ('pushes', on_call(lambda p, n: p.endless(frame(5, 4, n, struct.pack('>I', 2) + OK)))),
    ('headers without end', on_call(lambda p, n: (p.put(frame(1, 0, n, OK)), p.endless(frame(9, 0, n, field(b'x', b'y' * 900)))))),
    ('continuations of nothing', on_call(lambda p, n: (p.put(frame(1, 0, n, OK)), p.endless(frame(9, 0, n))))),
    ('a header bomb', on_call(lambda p, n: p.put(frame(1, 4, n, OK + field(b'x', b'z' * 3900, 64) + b'\xbe' * 16000)))),
    ('headers again and again', on_call(lambda p, n: p.endless(frame(1, 4, n, OK)))),
    ('interim answers without end', on_call(lambda p, n: p.endless(frame(1, 4, n, field(b':status', b'103'))))),
    ('trailers that are a bomb', on_call(lambda p, n: reply(p, n, frame(0, 0, n, bytes(5)) + frame(
        1, 5, n, field(b'x', b'z' * 3900, 64) + b'\xbe' * 16000)))),
    ('a message of 4 GiB', on_call(lambda p, n: data(p, n, b'\0\xff\xff\xff\xff', bytes(16000)))),
    ('a message of 2 GiB', on_call(lambda p, n: data(p, n, b'\0\x7f\xff\xff\xff', bytes(16000)))),
    ('a message of 33 MiB', on_call(lambda p, n: data(p, n, b'\0\x02\x10\0\0', bytes(16000)))),
    ('messages without end', on_call(lambda p, n: data(p, n, b'', bytes(16000)))),
    ('empty frames without end', on_call(lambda p, n: (reply(p, n), p.endless(frame(0, 0, n))))),
    ('padding without end', on_call(lambda p, n: (reply(p, n), p.endless(frame(0, 8, n, b'\xff' + bytes(255)))))),
    ('a message that does not come', on_call(lambda p, n: reply(p, n, frame(0, 0, n, b'\0\0\0\x01\0')))),
    ('a message, slowly', on_call(lambda p, n: (reply(p, n), [p.put(frame(0, 0, n, b'\0')) or time.sleep(0.1) for _ in range(300)]))),
    ('data for other calls', on_call(lambda p, n: p.endless(frame(0, 0, n + 2, bytes(16000))))),
    ('more than the window lets through', on_call(lambda p, n: [p.put(frame(0, 0, n, bytes(16384))) for _ in range(1 << 20)])),
    ('a status of 100 KiB', on_call(lambda p, n: p.put(frame(1, 0, n, OK + field(b'grpc-status', b'2')) + b''.join(
        frame(9, 4 if i == 9 else 0, n, field(b'grpc-message', b'm' * 10000)) for i in range(10))))),
    ('a status that writes to the terminal', on_call(lambda p, n: p.put(frame(1, 5, n, OK + field(b'grpc-status', b'2') + field(
        b'grpc-message', b''.join(b'%%%02x' % c for c in ESCAPES)))))),
    ('a status of 10 KiB', on_call(lambda p, n: p.put(frame(1, 5, n, OK + field(b'grpc-status', b'2') + field(
        b'grpc-message', b'%25\x41' * 2500))))),
]


# ------------------------------------------------------------------------------------------------------------- NBD

REPLY = 0x3e889045565a9


def answer(option, kind, body=b'', n=None):
    return struct.pack('>QIII', REPLY, option, kind, len(body) if n is None else n) + body


def options(say):
    """Greets, then say(peer, option) for each."""
    def talk(p):
        p.put(b'NBDMAGICIHAVEOPT\0\3')
        p.get(4)
        while True:
            _, option, n = struct.unpack('>QII', p.get(16))
            p.get(n)
            say(p, option)
    return talk


def negotiate(p, option, structured=True):
    """The usual answers; True when the requests come next."""
    if option == 8 and structured:
        p.put(answer(8, 1))
    elif option == 10 and structured:
        p.put(answer(10, 4, struct.pack('>I', 5) + b'base:allocation') + answer(10, 1))
    elif option == 7:
        p.put(answer(7, 3, struct.pack('>HQH', 0, 64 * MIB, 0x1 | 0x2 | 0x100)) + answer(7, 1))
        return True
    elif option == 6:
        p.put(answer(6, 3, struct.pack('>HQH', 0, 64 * MIB, 0x3)) + answer(6, 1))
    else:
        p.put(answer(option, 0x80000001))
    return False


def requests(say, structured=True):
    def talk(p):
        def each(p, option):
            while negotiate(p, option, structured):
                while True:
                    _, flags, kind, cookie, off, n = struct.unpack('>IHHQQI', p.get(28))
                    if kind == 2:
                        raise ConnectionError
                    say(p, kind, cookie, off, n)
        options(each)(p)
    return talk


def chunk(cookie, kind, body=b'', flags=0, n=None):
    return struct.pack('>IHHQI', 0x668e33ef, flags, kind, cookie, len(body) if n is None else n) + body


def at(which, say):
    return options(lambda p, option: say(p) if option == which else negotiate(p, option))


def status_then(say):
    """Extents are refused, reads get `say`."""
    return requests(lambda p, kind, k, off, n: say(p, k, off, n) if kind == 0 else p.put(
        chunk(k, 0x8001, struct.pack('>IH', 22, 0), 1)))


NBD = [
    ('text without end', lambda p: p.endless(b'hello, who is there?\n')),
    ('silence', lambda p: p.silence()),
    ('a greeting, slowly', lambda p: p.slowly(b'NBDMAGICIHAVEOPT\0\3' + answer(8, 1) * 9)),
    ('facts without end', at(7, lambda p: p.endless(answer(7, 3, struct.pack('>HQH', 0, MIB, 1))))),
    ('unknown facts without end', at(7, lambda p: p.endless(answer(7, 3, struct.pack('>H', 999) + bytes(4000))))),
    ('a fact of 4 GiB', at(7, lambda p: (p.put(answer(7, 3, b'', 0xffffffff)), p.endless(bytes(65536))))),
    ('a fact of 30 MiB', at(7, lambda p: (p.put(answer(7, 3, b'', 30 * MIB)), p.endless(bytes(65536))))),
    ('contexts without end', at(10, lambda p: p.endless(answer(10, 4, struct.pack('>I', 5) + b'base:allocation')))),
    ('long contexts without end', at(10, lambda p: p.endless(answer(10, 4, struct.pack('>I', 5) + b'x' * 4000)))),
    ('an error of 4 GiB', at(8, lambda p: (p.put(answer(8, 0x80000001, b'', 0xffffffff)), p.endless(bytes(65536))))),
    ('answers to other options', at(8, lambda p: p.endless(answer(77, 1)))),
    ('extents without end', requests(lambda p, kind, k, off, n: p.endless(chunk(k, 5, struct.pack('>III', 5, 4096, 0))))),
    ('a chunk of extents of 4 GiB', requests(lambda p, kind, k, off, n: (p.put(chunk(k, 5, b'', 1, 0xfffffffc)), p.endless(bytes(65536))))),
    ('a chunk of extents of 60 MiB', requests(lambda p, kind, k, off, n: (p.put(chunk(k, 5, struct.pack('>I', 5), 1, 60 * MIB + 4)),
                                                                         p.endless(struct.pack('>II', 512, 0))))),
    ('chunks of data without end', status_then(lambda p, k, off, n: p.endless(chunk(k, 1, struct.pack('>Q', off) + bytes(min(n, 4096)))))),
    ('empty chunks without end', status_then(lambda p, k, off, n: p.endless(chunk(k, 0)))),
    ('holes without end', status_then(lambda p, k, off, n: p.endless(chunk(k, 2, struct.pack('>QI', off, n))))),
    ('errors at an offset without end', status_then(lambda p, k, off, n: p.endless(chunk(k, 0x8002, struct.pack('>IHQ', 5, 0, off))))),
    ('errors without end', status_then(lambda p, k, off, n: p.endless(chunk(k, 0x8001, struct.pack('>IH', 5, 0)) * 9999))),
    ('an error that writes to the terminal', at(7, lambda p: p.put(answer(7, 0x80000002, ESCAPES)))),
    ('an error with 60 KiB of text', status_then(lambda p, k, off, n: p.put(chunk(k, 0x8001, struct.pack('>IH', 5, 60000) + b'e' * 60000, 1)))),
    ('an unknown chunk of 4 GiB', status_then(lambda p, k, off, n: (p.put(chunk(k, 99, b'', 1, 0xffffffff)), p.endless(bytes(65536))))),
    ('unknown chunks without end', status_then(lambda p, k, off, n: p.endless(chunk(k, 99, bytes(1000))))),
    ('data, slowly', status_then(lambda p, k, off, n: (p.put(chunk(k, 1, struct.pack('>Q', off), 1, 8 + n)), p.slowly(bytes(n))))),
    ('data that does not come', status_then(lambda p, k, off, n: p.put(chunk(k, 1, struct.pack('>Q', off), 1, 8 + n)))),
    ('replies to nobody', status_then(lambda p, k, off, n: p.endless(struct.pack('>IIQ', 0x67446698, 0, 1 << 60)))),
]


# ------------------------------------------------------------------------------------------------------------ HTTP

HEAD = b'HTTP/1.1 206 x\r\nETag: "x"\r\n'
FIRST = HEAD + b'Content-Range: bytes 0-0/67108864\r\nContent-Length: 1\r\n\r\nx'


def asked(say):
    def talk(p):
        while True:
            p.get(1)
            with p.cond:
                p.cond.wait_for(lambda: b'\r\n\r\n' in p.buf or p.ended, LIMIT_S)
                if b'\r\n\r\n' not in p.buf:
                    return
                request, p.buf = p.buf.split(b'\r\n\r\n', 1)
            say(p, request)
    return talk


def later(say):
    """The first look is answered well."""
    return asked(lambda p, r: p.put(FIRST) if b'bytes=0-0' in r else say(p))


HTTP = [
    ('silence', lambda p: p.silence()),
    ('text without end', lambda p: p.endless(b'hello\n')),
    ('headers without end', asked(lambda p, r: (p.put(HEAD), p.endless(b'X-More: %s\r\n' % (b'y' * 1000))))),
    ('headers of one letter without end', asked(lambda p, r: (p.put(HEAD), p.endless(b'a:\r\n')))),
    ('one header without end', asked(lambda p, r: (p.put(HEAD + b'X: '), p.endless(b'z')))),
    ('a header in folded lines', asked(lambda p, r: (p.put(HEAD + b'X: a\r\n'), p.endless(b' ' + b'z' * 999 + b'\r\n')))),
    ('interim answers without end', asked(lambda p, r: p.endless(b'HTTP/1.1 100 Continue\r\n\r\n'))),
    ('early hints without end', asked(lambda p, r: p.endless(b'HTTP/1.1 103 x\r\nLink: <a>\r\n\r\n'))),
    ('cookies without end', asked(lambda p, r: (p.put(HEAD), p.endless(b'Set-Cookie: a%s=b\r\n' % os.urandom(20).hex().encode())))),
    ('a body without end', asked(lambda p, r: (p.put(HEAD + b'Content-Range: bytes 0-0/67108864\r\n\r\n'), p.endless(bytes(65536))))),
    ('the same in chunks', asked(lambda p, r: (p.put(HEAD + b'Transfer-Encoding: chunked\r\nContent-Range: bytes 0-0/67108864\r\n\r\n'),
                                               p.endless(b'1000\r\n' + bytes(4096) + b'\r\n')))),
    ('the extension of a chunk without end', asked(lambda p, r: (p.put(HEAD + b'Transfer-Encoding: chunked\r\n\r\n1;'), p.endless(b'x=y;')))),
    ('trailers without end', asked(lambda p, r: (p.put(HEAD + b'Transfer-Encoding: chunked\r\nContent-Range: bytes 0-0/67108864\r\n\r\n'
                                                       b'1\r\nx\r\n0\r\n'), p.endless(b'X-More: %s\r\n' % (b'y' * 1000))))),
    ('an error without end', asked(lambda p, r: (p.put(b'HTTP/1.1 500 x\r\n\r\n'), p.endless(b'so sorry ')))),
    ('a body without end, later', later(lambda p: (p.put(HEAD + b'Content-Range: bytes 0-8388607/67108864\r\n\r\n'), p.endless(bytes(65536))))),
    ('headers without end, later', later(lambda p: (p.put(HEAD), p.endless(b'X-More: %s\r\n' % (b'y' * 1000))))),
    ('a whole object without end, later', later(lambda p: (p.put(b'HTTP/1.1 200 x\r\nETag: "x"\r\n\r\n'), p.endless(bytes(65536))))),
    ('a reason that writes to the terminal', asked(lambda p, r: (p.put(b'HTTP/1.1 500 ' + ESCAPES.replace(b'\r\n', b'') +
                                                                    b'\r\nContent-Length: 0\r\n\r\n')))),
    ('silence later', later(lambda p: p.silence())),
    ('a body, slowly, later', later(lambda p: (p.put(HEAD + b'Content-Range: bytes 0-8388607/67108864\r\nContent-Length: 8388608\r\n\r\n'),
                                               p.slowly(bytes(9000))))),
]


def grpc_servers(w):
    run(GRPC, 'grpc://127.0.0.1:%d')


def nbd_servers(w):
    run(NBD, 'nbd://127.0.0.1:%d/?timeout=1s')


def http_servers(w):
    run(HTTP, 'http://127.0.0.1:%d/object?timeout=1s')


for case in (grpc_servers, nbd_servers, http_servers):
    cell('hostile servers', 'farpage is the client')(case)
main([grpc_servers, nbd_servers, http_servers])
