#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""h2_abuse.py FARPAGE [CASE...]: clients of the gRPC server that break the rules of HTTP/2, byte by byte (RFC 9113, 7541).

Each row of the tables is one connection: what is sent after the greeting, and how that may end by the RFC. While they
run, another connection makes good calls; the process stays, and its memory stays within bounds."""
import os
import random
import socket
import ssl
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'system'))
from cli_lib import DEADLINE, SLACK, Skip, cell, equal, main, true, wait_for
from tls_lib import authority, certificate

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONT = range(10)
END, HEAD, PADDED, PRIO, ACK = 1, 4, 8, 32, 1
CODES = ['NO_ERROR', 'PROTOCOL_ERROR', 'INTERNAL_ERROR', 'FLOW_CONTROL_ERROR', 'SETTINGS_TIMEOUT', 'STREAM_CLOSED',
         'FRAME_SIZE_ERROR', 'REFUSED_STREAM', 'CANCEL', 'COMPRESSION_ERROR', 'CONNECT_ERROR', 'ENHANCE_YOUR_CALM']
PROTOCOL, INTERNAL, FLOW, CLOSED, SIZE, COMPRESSION, CALM = (CODES.index(x) for x in (
    'PROTOCOL_ERROR', 'INTERNAL_ERROR', 'FLOW_CONTROL_ERROR', 'STREAM_CLOSED', 'FRAME_SIZE_ERROR', 'COMPRESSION_ERROR',
    'ENHANCE_YOUR_CALM'))
READ_AT = '/com.pojtinger.felicitas.r3map.mount.v1.Backend/ReadAt'
BODY = b'\0\0\0\0\2\x08\x04'  # 4 bytes from 0
MAX_FRAME = (1 << 20) + 1024
# What is freed goes back, with sanitizers too.
MEMORY = {'ASAN_OPTIONS': os.environ.get('ASAN_OPTIONS', '') + ':quarantine_size_mb=4'}
GOOD = ((':method', 'POST'), (':scheme', 'http'), (':path', READ_AT), (':authority', 'x'), ('content-type', 'application/grpc'),
        ('te', 'trailers'))


def frame(kind, flags=0, stream=0, payload=b'', length=None):
    n = len(payload) if length is None else length
    return struct.pack('>IBI', n << 8 | kind, flags, stream)[0:5] + struct.pack('>I', stream) + payload


def number(value, bits, first=0):
    """HPACK's integers."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([first | value])
    out, value = bytearray([first | limit]), value - limit
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out + bytes([value]))


def literal(name, value, first=0):
    """One field; not indexed (0), indexed (64), never indexed (16)."""
    name, value = (x if isinstance(x, bytes) else x.encode() for x in (name, value))
    return bytes([first]) + number(len(name), 7) + name + number(len(value), 7) + value


def fields(*more, without=(), first=()):
    return b''.join(literal(n, v) for n, v in tuple(first) + tuple(f for f in GOOD if f[0] not in without) + more)


def head(stream=1, block=None, flags=HEAD):
    return frame(HEADERS, flags, stream, fields() if block is None else block)


def call(stream=1):
    return head(stream) + frame(DATA, END, stream, BODY)


def settings(*pairs):
    return frame(SETTINGS, payload=b''.join(struct.pack('>HI', k, v) for k, v in pairs))


class Client:
    """A connection in the clear or over TLS; `heard` gathers what came."""

    def __init__(self, server, greet=True, hello=()):
        self.s = socket.create_connection(('127.0.0.1', server.port), DEADLINE)
        self.s.settimeout(DEADLINE)
        if server.tls:
            self.s = server.tls.wrap_socket(self.s, server_hostname='localhost')
        self.buf, self.heard, self.gone = b'', [], False
        if greet:
            self.put(PREFACE + settings(*hello) + frame(SETTINGS, ACK) + frame(WINDOW, 0, 0, struct.pack('>I', 1 << 30)))

    def put(self, data):
        """What the server does not want to hear any more need not arrive."""
        try:
            self.s.sendall(data)
        except (ConnectionError, ssl.SSLError):
            self.gone = True

    def half_close(self):
        self.s.shutdown(socket.SHUT_WR)

    def next(self):
        """(kind, flags, stream, payload) or None at the end."""
        while len(self.buf) < 9 or len(self.buf) < 9 + (struct.unpack('>I', self.buf[:4])[0] >> 8):
            try:
                piece = self.s.recv(1 << 17)
            except (ConnectionError, ssl.SSLError):
                piece = b''
            if not piece:
                self.gone = True
                return None
            self.buf += piece
        n, kind, flags, stream = struct.unpack('>I', self.buf[:4])[0] >> 8, self.buf[3], self.buf[4], self.buf[5:9]
        f = (kind, flags, struct.unpack('>I', stream)[0], self.buf[9:9 + n])
        self.buf = self.buf[9 + n:]
        self.heard.append(f)
        return f

    def until(self, wanted):
        while True:
            f = self.next()
            if f is None or wanted(f):
                return f

    def finish(self, stream=1):
        """How it ends: 'GOAWAY CODE', 'RST CODE', 'reply' for the stream, or 'closed'."""
        while True:
            f = self.next()
            if f is None:
                return 'closed'
            kind, flags, at, payload = f
            if kind == GOAWAY:
                code = struct.unpack('>I', payload[4:8])[0]
                while self.next():
                    pass  # the server hangs up by itself
                return 'GOAWAY ' + CODES[code]
            if kind == RST and at == stream and payload != bytes(4):
                return 'RST ' + CODES[struct.unpack('>I', payload[:4])[0]]
            if kind in (HEADERS, DATA) and flags & END and at == stream:
                return 'reply'

    def close(self):
        self.s.close()


def call_once(c, stream=1):
    """A good call on a connection that is still good."""
    c.put(call(stream))
    got = [c.until(lambda f: f[2] == stream and f[0] in (HEADERS, DATA, RST) or f[0] == GOAWAY)]
    while got[-1] and not (got[-1][0] in (RST, GOAWAY) or got[-1][1] & END):
        got.append(c.until(lambda f: f[2] == stream or f[0] == GOAWAY))
    return got[-1] is not None and got[-1][0] == HEADERS and any(f[0] == DATA and f[3][:5] == b'\0\0\0\0\x08' for f in got)


class Others(threading.Thread):
    """Another client's good calls, one after the other; `worst` is the longest that one took."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.c, self.n, self.over, self.worst, self.failed = Client(server), 0, False, 0, None

    def run(self):
        stream = 1
        while not self.over and not self.failed:
            began = time.monotonic()
            try:
                if not call_once(self.c, stream):
                    self.failed = 'a good call got no good answer'
            except Exception as e:
                self.failed = repr(e)
            self.worst = max(self.worst, time.monotonic() - began)
            self.n, stream = self.n + 1, stream + 2
            time.sleep(0.005)

    def end(self):
        before = self.n
        wait_for(lambda: self.failed or self.n > before + 2, 'the good calls beside')
        self.over = True
        self.join(DEADLINE)
        true(not self.failed, 'beside: %s' % self.failed)
        self.c.close()


def serve(w, tls=False, source='mem:64M', args=()):
    listen = 'grpcs://127.0.0.1:0' if tls else 'grpc://127.0.0.1:0'
    if tls:
        authority(w, 'ca')
        certificate(w, 's', 'ca', 'DNS:localhost')
        args = ['--tls-cert', 's.pem', '--tls-key', 's.key'] + list(args)
    s = w.start('serve', source, '--listen', listen, *args, env=MEMORY)
    s.port = int(s.line().split()[1].rsplit(':', 1)[1].split('/')[0])
    s.tls = ssl.create_default_context(cafile=w.path('ca.pem')) if tls else None
    if tls:
        s.tls.set_alpn_protocols(['h2'])
    return s


def rss(s):
    with open('/proc/%d/status' % s.p.pid) as f:
        return next(int(x.split()[1]) for x in f if x.startswith('VmRSS')) / 1024


def alive(s):
    c = Client(s)
    true(call_once(c), 'a good call afterwards')
    c.close()


# ----------------------------------------------------------------------------------------------------- the tables

def goaway(*codes):
    return ['GOAWAY ' + CODES[c] for c in codes] + ['closed']


def rst(*codes):
    """An error of a stream may be treated as one of the connection (5.4)."""
    return ['RST ' + CODES[c] for c in codes] + goaway(*codes)


OK = ['reply']
P = struct.pack
LONG = literal('x-long', 'y' * 9000)

# What it is, what is sent after the greeting, the stream that is looked at if it is not 1, how it may end. A call() behind
# it shows that it was ignored. Of a stream that was reset no more is known, so what comes late for it is thrown away.
ROWS = [
    # 3.4, 4: frames
    ('a frame of an unknown type is ignored', frame(0x77, 0xff, 0, b'hello') + call(), OK),
    ('so is one on a stream', head() + frame(0x77, 0, 1, b'x') + frame(DATA, END, 1, BODY), OK),
    ('unknown flags are ignored', frame(PING, 0xfe & ~ACK, 0, bytes(8)) + call(), OK),
    ('the reserved bit is ignored', frame(PING, 0, 1 << 31, bytes(8)) + call(), OK),
    ('DATA longer than was allowed', head() + frame(DATA, END, 1, b'', MAX_FRAME + 1), goaway(SIZE)),
    ('HEADERS longer than was allowed', frame(HEADERS, HEAD, 1, b'', MAX_FRAME + 1), goaway(SIZE)),
    ('the longest frame that there is', frame(0x77, 0, 0, b'', 0xffffff), goaway(SIZE)),
    ('greeted twice', PREFACE, goaway(PROTOCOL, SIZE)),
    # 5.1: states
    ('DATA on an idle stream', frame(DATA, END, 1, BODY), goaway(PROTOCOL)),
    ('RST_STREAM on an idle stream', frame(RST, 0, 1, P('>I', 8)), goaway(PROTOCOL)),
    ('WINDOW_UPDATE on an idle stream', frame(WINDOW, 0, 1, P('>I', 8)), goaway(PROTOCOL)),
    ('CONTINUATION on an idle stream', frame(CONT, HEAD, 1, fields()), goaway(PROTOCOL)),
    ('DATA after the end of the request', call() + frame(DATA, END, 1, BODY), rst(CLOSED) + OK),
    ('HEADERS after the end of the request', call() + head(), rst(CLOSED) + goaway(PROTOCOL) + OK),
    ('DATA after RST_STREAM', head() + frame(RST, 0, 1, P('>I', 8)) + frame(DATA, END, 1, BODY) + call(3), 3, rst(CLOSED) + OK),
    ('HEADERS after RST_STREAM', head() + frame(RST, 0, 1, P('>I', 8)) + head() + call(3), 3, rst(CLOSED) + goaway(PROTOCOL) + OK),
    ('WINDOW_UPDATE after RST_STREAM', head() + frame(RST, 0, 1, P('>I', 8)) + frame(WINDOW, 0, 1, P('>I', 8)) + call(3), 3, OK),
    ('a stream with an even number', head(2), 2, goaway(PROTOCOL)),
    ('a stream with a smaller number', call(5) + call(3), 3, goaway(PROTOCOL, CLOSED)),
    ('a push from a client', frame(PUSH, HEAD, 1, P('>I', 2) + fields()), goaway(PROTOCOL)),
    ('a push in the middle of a request', head() + frame(PUSH, HEAD, 1, P('>I', 2) + fields()), goaway(PROTOCOL)),
    # 6.1: DATA
    ('DATA on stream 0', frame(DATA, 0, 0, b'x'), goaway(PROTOCOL)),
    ('DATA with more padding than there is', head() + frame(DATA, END | PADDED, 1, b'\x09' + BODY), goaway(PROTOCOL)),
    ('DATA padded, without the byte that says how much', head() + frame(DATA, END | PADDED, 1), goaway(PROTOCOL, SIZE)),
    ('DATA padded as it may be', head() + frame(DATA, END | PADDED, 1, b'\x03' + BODY + bytes(3)), OK),
    # 6.2, 6.10: HEADERS, CONTINUATION
    ('HEADERS on stream 0', frame(HEADERS, HEAD, 0, fields()), goaway(PROTOCOL)),
    ('HEADERS with more padding than there is', frame(HEADERS, HEAD | PADDED, 1, b'\xff' + b'x'), goaway(PROTOCOL, SIZE)),
    ('HEADERS with half a priority', frame(HEADERS, HEAD | PRIO, 1, bytes(4)), goaway(PROTOCOL, SIZE)),
    ('HEADERS in three pieces', frame(HEADERS, 0, 1, fields()[:9]) + frame(CONT, 0, 1, fields()[9:20]) +
     frame(CONT, HEAD, 1, fields()[20:]) + frame(DATA, END, 1, BODY), OK),
    ('PRIORITY between HEADERS and CONTINUATION', frame(HEADERS, 0, 1, fields()) + frame(PRIORITY, 0, 1, bytes(5)), goaway(PROTOCOL)),
    ('an unknown frame between them', frame(HEADERS, 0, 1, fields()) + frame(0x77, 0, 0, b'x'), goaway(PROTOCOL)),
    ('another stream between them', frame(HEADERS, 0, 1, fields()) + head(3), goaway(PROTOCOL)),
    ('DATA between them', frame(HEADERS, 0, 1, fields()) + frame(DATA, 0, 1, BODY), goaway(PROTOCOL)),
    ('SETTINGS between them', frame(HEADERS, 0, 1, fields()) + settings(), goaway(PROTOCOL)),
    ('CONTINUATION of another stream', frame(HEADERS, 0, 1, fields()) + frame(CONT, HEAD, 3, b''), goaway(PROTOCOL)),
    ('CONTINUATION behind the end of the headers', head() + frame(CONT, HEAD, 1, b''), goaway(PROTOCOL)),
    ('CONTINUATION on stream 0', frame(CONT, HEAD, 0, fields()), goaway(PROTOCOL)),
    ('a second HEADERS without END_STREAM', head() + head(), rst(PROTOCOL)),
    # 6.3: PRIORITY, deprecated; nothing may come of it
    ('PRIORITY of an idle stream', frame(PRIORITY, 0, 5, P('>IB', 0, 9)) + call(), OK),
    ('PRIORITY that is too short', frame(PRIORITY, 0, 1, bytes(4)), rst(SIZE)),
    ('PRIORITY on stream 0', frame(PRIORITY, 0, 0, bytes(5)), goaway(PROTOCOL)),
    ('a stream that depends on itself', frame(HEADERS, HEAD | PRIO, 1, P('>IB', 1, 9) + fields()) + frame(DATA, END, 1, BODY),
     rst(PROTOCOL) + OK),
    # 6.4: RST_STREAM
    ('RST_STREAM on stream 0', frame(RST, 0, 0, P('>I', 8)), goaway(PROTOCOL)),
    ('RST_STREAM that is too short', head() + frame(RST, 0, 1, bytes(3)), goaway(SIZE)),
    ('RST_STREAM that is too long', head() + frame(RST, 0, 1, bytes(5)), goaway(SIZE)),
    # 6.5: SETTINGS
    ('SETTINGS on a stream', frame(SETTINGS, 0, 1, bytes(6)), goaway(PROTOCOL)),
    ('SETTINGS of five bytes', frame(SETTINGS, 0, 0, bytes(5)), goaway(SIZE)),
    ('an acknowledgement with something in it', frame(SETTINGS, ACK, 0, bytes(6)), goaway(SIZE)),
    ('ENABLE_PUSH of 2', settings((2, 2)), goaway(PROTOCOL)),
    ('a window of 2^31', settings((4, 1 << 31)), goaway(FLOW)),
    ('frames of 16383', settings((5, 16383)), goaway(PROTOCOL)),
    ('frames of 2^24', settings((5, 1 << 24)), goaway(PROTOCOL)),
    ('ENABLE_CONNECT_PROTOCOL of 2', settings((8, 2)) + call(), goaway(PROTOCOL) + OK),
    ('unknown settings are ignored', settings((0x9999, 7), (0xffff, 1)) + call(), OK),
    ('no table for headers', settings((1, 0)) + call(), OK),
    ('the largest table for headers', settings((1, 0xffffffff)) + call(), OK),
    ('the same setting 400 times', settings(*[(4, 65535 + i) for i in range(400)]) + call(), goaway(CALM) + OK),
    ('no stream allowed to the server', settings((3, 0)) + call(), OK),
    ('headers of one byte allowed', settings((6, 1)) + call(), OK),
    # 6.7, 6.8
    ('PING on a stream', frame(PING, 0, 1, bytes(8)), goaway(PROTOCOL)),
    ('PING of seven bytes', frame(PING, 0, 0, bytes(7)), goaway(SIZE)),
    ('an answer to no PING', frame(PING, ACK, 0, bytes(8)) + call(), OK),
    ('GOAWAY on a stream', frame(GOAWAY, 0, 1, bytes(8)), goaway(PROTOCOL)),
    ('GOAWAY of seven bytes', frame(GOAWAY, 0, 0, bytes(7)), goaway(SIZE)),
    ('calls that came before GOAWAY are answered', call() + frame(GOAWAY, 0, 0, bytes(8)), OK),
    # 6.9: windows
    ('WINDOW_UPDATE of 0, connection', frame(WINDOW, 0, 0, bytes(4)), goaway(PROTOCOL)),
    ('WINDOW_UPDATE of 0, stream', head() + frame(WINDOW, 0, 1, bytes(4)), rst(PROTOCOL)),
    ('WINDOW_UPDATE of three bytes', frame(WINDOW, 0, 0, bytes(3)), goaway(SIZE)),
    ('the window of the connection beyond 2^31 - 1', frame(WINDOW, 0, 0, P('>I', 0x7fffffff)), goaway(FLOW)),
    ('the window of a stream beyond 2^31 - 1', head() + frame(WINDOW, 0, 1, P('>I', 0x7fffffff)) * 2, rst(FLOW)),
    ('the same by SETTINGS', head() + frame(WINDOW, 0, 1, P('>I', 0x7fff0000)) + settings((4, 0x7fffffff)), rst(FLOW)),
    # 8: requests
    ('a name with a capital letter', head(block=fields(('X-Upper', '1'))), rst(PROTOCOL)),
    ('an unknown pseudo-header', head(block=fields(first=[(':what', '1')])), rst(PROTOCOL)),
    ('a pseudo-header of answers', head(block=fields(first=[(':status', '200')])), rst(PROTOCOL)),
    ('a pseudo-header behind the others', head(block=fields((':path', '/'), without=(':path',))), rst(PROTOCOL)),
    ('a pseudo-header twice', head(block=fields(first=[(':method', 'POST')])), rst(PROTOCOL)),
    ('a pseudo-header in the trailers', head() + frame(DATA, 0, 1, BODY) + head(block=literal(':path', '/'), flags=HEAD | END),
     rst(PROTOCOL)),
    ('"connection"', head(block=fields(('connection', 'keep-alive'))), rst(PROTOCOL)),
    ('"transfer-encoding"', head(block=fields(('transfer-encoding', 'chunked'))), rst(PROTOCOL)),
    ('"te" that is not "trailers"', head(block=fields(('te', 'gzip'), without=('te',))), rst(PROTOCOL)),
    ('no method', head(block=fields(without=(':method',))), rst(PROTOCOL)),
    ('no scheme', head(block=fields(without=(':scheme',))), rst(PROTOCOL)),
    ('no path', head(block=fields(without=(':path',))), rst(PROTOCOL)),
    ('an empty path', head(block=fields(first=[(':path', '')], without=(':path',))), rst(PROTOCOL)),
    ('no header at all', head(block=b''), rst(PROTOCOL)),
    ('a content-length that is too small', head(block=fields(('content-length', '3'))) + frame(DATA, END, 1, BODY), rst(PROTOCOL)),
    ('one that is too large', head(block=fields(('content-length', '70'))) + frame(DATA, END, 1, BODY), rst(PROTOCOL)),
    ('one that is no number', head(block=fields(('content-length', '-7'))) + frame(DATA, END, 1, BODY), rst(PROTOCOL)),
    ('a line end in a value', head(block=fields(('x', 'a\r\nb'))), rst(PROTOCOL)),
    ('a zero byte in a value', head(block=fields(('x', 'a\0b'))), rst(PROTOCOL)),
    ('a colon in a name', head(block=fields(('x:y', 'b'))), rst(PROTOCOL)),
    ('an empty name', head(block=fields(('', 'b'))), rst(PROTOCOL)),
    ('trailers behind a request', head() + frame(DATA, 0, 1, BODY) + head(block=literal('x', 'y'), flags=HEAD | END), OK),
    # HPACK
    ('an index of 0', head(block=b'\x80'), goaway(COMPRESSION)),
    ('an index beyond the tables', head(block=b'\xff\x80\x10'), goaway(COMPRESSION)),
    ('an index that ends nowhere', head(block=b'\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f'), goaway(COMPRESSION)),
    ('a table larger than was allowed', head(block=b'\x3f\xe1\xff\x03' + fields()), goaway(COMPRESSION)),
    ('a change of the table at the end', head(block=fields() + b'\x20'), goaway(COMPRESSION)),
    ('a string longer than the block', head(block=b'\0\x7f\xff\xff\x03x'), goaway(COMPRESSION)),
    ('a string of 2^32', head(block=b'\0\x7f\xff\xff\xff\xff\x0fx'), goaway(COMPRESSION)),
    ('Huffman: padding of more than seven bits', head(block=b'\0\x81\xff\x01x' + fields()), goaway(COMPRESSION)),
    ('Huffman: padding with zeros', head(block=b'\0\x81\x18\x01x'[:3] + b'\x01x'), goaway(COMPRESSION) + rst(PROTOCOL)),
    ('Huffman: the end sign', head(block=b'\0\x84\xff\xff\xff\xff\x01x'), goaway(COMPRESSION)),
    ('a block that ends in a field', head(block=fields()[:-3]), goaway(COMPRESSION)),
    ('the smallest table, then the largest', head(block=b'\x20\x3f\xe1\x1f' + fields()) + frame(DATA, END, 1, BODY), OK),
    ('many changes of the table', head(block=b'\x20' * 4000 + fields()) + frame(DATA, END, 1, BODY), goaway(COMPRESSION) + OK),
    # header bombs: more than the server holds, whichever way it is packed
    ('headers of 20 KiB', head(block=fields() + LONG * 2) + frame(DATA, END, 1, BODY), OK),  # with a status that says so
    ('headers of 90 KiB', head(block=fields() + LONG * 10), goaway(CALM)),
    ('one field, referred to 20000 times', head(block=fields() + literal('x-b', 'z' * 3900, 64) + b'\xbe' * 20000), goaway(CALM)),
    ('a cookie crumbled into 3000', head(block=fields(*[('cookie', 'a=%d' % i) for i in range(3000)])), goaway(CALM)),
    # Work without end that no limit on open streams bounds. Newer versions of nghttp2 count, too, and say INTERNAL_ERROR.
    ('1200 calls cancelled at once', b''.join(head(n) + frame(RST, 0, n, P('>I', 8)) for n in range(1, 2401, 2)), 1 << 30,
     goaway(CALM, INTERNAL)),
    ('1200 calls that the server must reset', b''.join(head(n) + frame(WINDOW, 0, n, P('>I', 0x7fffffff)) for n in range(1, 2401, 2)),
     1 << 30, goaway(CALM, INTERNAL)),
    ('a header of one byte, 10000 times', head(block=fields() + literal('a', '') * 10000), goaway(CALM)),
]


def rows(w, tls):
    s = serve(w, tls)
    others = Others(s)
    others.start()
    before = rss(s)
    failed = []
    for row in ROWS:
        name, data = row[:2]
        stream = row[2] if isinstance(row[2], int) else 1
        ends = row[3] if isinstance(row[2], int) else row[2]
        c = Client(s)
        c.put(data)
        try:
            got = c.finish(stream)
        except socket.timeout:
            got = 'silence'
        if os.environ.get('FARPAGE_VERBOSE'):
            print('# %s: %s' % (name, got))
        if got not in ends:
            failed.append('%s: %s, not %s' % (name, got, ' or '.join(ends)))
        if got.startswith('RST') and not call_once(c, 101):
            failed.append('%s: the connection is of no use after %s' % (name, got))
        c.close()
        true(s.p.poll() is None, '%s ended the process: %s' % (name, s.err()[-1000:]))
    others.end()
    grown = rss(s) - before
    print('# %d rows, grown by %d MiB, the slowest call beside took %.3f s' % (len(ROWS), grown, others.worst))
    true(not failed, '\n'.join(failed))
    true(grown < 120 * SLACK, 'it grew by %d MiB' % grown)
    alive(s)
    equal(s.end(), 0, 'exit code')


def every_row_in_the_clear(w):
    rows(w, False)


def every_row_over_tls(w):
    rows(w, True)


# ------------------------------------------------------------------------------------------------------- floods

def opened(n, *more, first=1):
    """Streams opened and done away with; `more` are made for each."""
    return b''.join(head(s, flags=HEAD) + b''.join(m(s) for m in more) for s in range(first, first + 2 * n, 2))


def whole(s):
    return frame(DATA, END, s, BODY)


def cancel(code):
    return lambda s: frame(RST, 0, s, struct.pack('>I', code))


def overflow(s):
    return frame(WINDOW, 0, s, struct.pack('>I', 0x7fffffff))


def bad_again(s):
    return head(s)


# What is sent again and again, and what must come of it: the connection's end, or patience.
FLOODS = [
    ('PING', lambda i: frame(PING, 0, 0, bytes(8)) * 2000, None),
    ('SETTINGS', lambda i: settings((4, 65535 + i % 9)) * 2000, None),
    ('empty SETTINGS', lambda i: settings() * 4000, None),
    ('PRIORITY of other streams', lambda i: b''.join(frame(PRIORITY, 0, 2 * (i * 2000 + j) + 1, bytes(5)) for j in range(2000)), None),
    ('WINDOW_UPDATE', lambda i: b'' if i else frame(WINDOW, 0, 0, struct.pack('>I', 1)) * 50000, None),
    ('unknown frames', lambda i: frame(0x55, 0, 0, bytes(9)) * 2000, None),
    ('acknowledgements', lambda i: frame(PING, ACK, 0, bytes(8)) * 2000, None),
    ('empty DATA', lambda i: (b'' if i else head(1)) + frame(DATA, 0, 1) * 4000, None),
    ('DATA of nothing but padding', lambda i: (b'' if i else head(1)) + frame(DATA, PADDED, 1, b'\x07' + bytes(7)) * 2000, None),
    ('CONTINUATION', lambda i: (b'' if i else frame(HEADERS, 0, 1, fields())) + frame(CONT, 0, 1, literal('x', 'y' * 999)) * 20, True),
    ('empty CONTINUATION', lambda i: (b'' if i else frame(HEADERS, 0, 1, fields())) + frame(CONT, 0, 1) * 4000, True),
    ('open and cancel', lambda i: opened(500, cancel(8), first=1 + 1000 * i), True),
    ('open and cancel with NO_ERROR', lambda i: opened(500, cancel(0), first=1 + 1000 * i), True),
    ('open whole and cancel', lambda i: opened(500, whole, cancel(8), first=1 + 1000 * i), True),
    ('have the server reset', lambda i: opened(500, overflow, first=1 + 1000 * i), True),
    ('have the server reset what runs', lambda i: opened(500, whole, overflow, first=1 + 1000 * i), True),
    ('headers twice', lambda i: opened(500, bad_again, first=1 + 1000 * i), True),
    ('open for ever', lambda i: opened(500, first=1 + 1000 * i), None),
    ('open for ever, before our settings are taken note of', lambda i: (b'' if i else b'-') + opened(500, first=1 + 1000 * i), None),
    ('unknown methods for ever', lambda i: b''.join(
        head(s, fields(first=[(':path', '/x')], without=(':path',)), HEAD | END) for s in range(1 + 1000 * i, 1001 + 1000 * i, 2)), None),
    ('fields for the table, all different', lambda i: head(2 * i + 1, fields() + b''.join(
        literal('x-%d-%d' % (i, j), 'v' * 300, 64) for j in range(30))) + cancel(8)(2 * i + 1), None),
]


def flood(s, make, takes, seconds, most):
    """Send until the server ends it, or for some time. Whether it was ended."""
    c, sent, i = Client(s, greet=make(0)[:1] != b'-'), 0, 0
    if make(0)[:1] == b'-':
        c.put(PREFACE + settings())
    end = time.monotonic() + seconds
    c.s.settimeout(0.2)

    def drain():
        try:
            while not c.gone and c.s.recv(1 << 20):
                pass
            c.gone = True
        except (socket.timeout, ssl.SSLError):
            if not c.gone:
                threading.Event().wait(0.001)
        except OSError:
            c.gone = True
    reader = threading.Thread(target=lambda: [drain() for _ in iter(lambda: c.gone or time.monotonic() > end, True)], daemon=True)
    if takes:
        reader.start()
    while not c.gone and sent < most and time.monotonic() < end:
        piece = make(i).lstrip(b'-') if not i else make(i)
        i += 1
        while piece and not c.gone and time.monotonic() < end:
            try:
                k = c.s.send(piece)
                piece, sent = piece[k:], sent + k
            except socket.timeout:
                pass
            except OSError:
                c.gone = True
    if takes:
        reader.join()
    return c, sent


def floods(w, takes):
    s = serve(w)
    others = Others(s)
    others.start()
    wait_for(lambda: others.n or others.failed, 'a good call')
    failed, worst = [], 0
    for name, make, ends in FLOODS:
        before = rss(s)
        c, sent = flood(s, make, takes, DEADLINE if ends else 0.3, (32 if ends else 4) << 20)
        grown = rss(s) - before
        worst = max(worst, grown)
        if os.environ.get('FARPAGE_VERBOSE'):
            print('# %s: %s after %d KiB, grown by %.1f MiB' % (name, 'ended' if c.gone else 'goes on', sent >> 10, grown))
        if ends and not c.gone:
            failed.append('%s: not ended after %d bytes' % (name, sent))
        if grown > 40 * SLACK:
            failed.append('%s: %d MiB for %d KiB' % (name, grown, sent >> 10))
        c.close()
        true(s.p.poll() is None, '%s ended the process: %s' % (name, s.err()[-1000:]))
    others.end()
    print('# grown by %d MiB at most, the slowest call beside took %.3f s' % (worst, others.worst))
    true(not failed, '\n'.join(failed))
    true(others.worst < 5, 'a call beside took %.1f s' % others.worst)
    alive(s)
    equal(s.end(), 0, 'exit code')


def floods_whose_answers_are_taken(w):
    floods(w, True)


def floods_whose_answers_are_not(w):
    floods(w, False)


# ------------------------------------------------------------------------------------------------- what costs memory

def settled(s):
    """RSS once it does not grow any more."""
    last = []

    def still():
        last.append(rss(s))
        time.sleep(0.03)
        return len(last) > 10 and max(last[-10:]) - min(last[-10:]) < 1
    wait_for(still, 'the end of its growth')
    return last[-1]


def varint(n):
    out = bytearray()
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out + bytes([n]))


def grpc_message(body):
    return b'\0' + struct.pack('>I', len(body)) + body


def read_message(n, off=0):
    return grpc_message(b'\x08' + varint(n) + (b'\x10' + varint(off) if off else b''))


def bodies_that_are_announced_and_do_not_come(w):
    s = serve(w)
    others = Others(s)
    others.start()
    before = settled(s)
    path = READ_AT.replace('ReadAt', 'WriteAt')
    start = b'\0' + struct.pack('>I', 32 << 20) + bytes(600)
    block = fields(first=[(':path', path)], without=(':path',))
    clients = [Client(s) for _ in range(4)]
    for c in clients:
        c.put(b''.join(head(n, block) + frame(DATA, 0, n, start) for n in range(1, 2001, 2)))
    grown = settled(s) - before
    print('# 4000 bodies of 32 MiB, 600 bytes of each: %d MiB' % grown)
    true(grown < 700 * SLACK, 'it grew by %d MiB' % grown)
    for c in clients:
        c.close()
    others.end()
    alive(s)


def a_window_of_nothing(w):
    w.file('data', 40 << 20)
    for source in 'mem:64M', 'file:data':
        s = serve(w, source=source)
        others = Others(s)
        others.start()
        before = settled(s)
        clients = [Client(s, hello=[(4, 0)]) for _ in range(8)]
        for c in clients:
            c.put(b''.join(head(n) + frame(DATA, END, n, read_message(8 << 20)) for n in range(1, 401, 2)))
        grown = settled(s) - before
        print('# %s: 1600 reads of 8 MiB and no window for them: %d MiB' % (source, grown))
        true(grown < 900 * SLACK, 'it grew by %d MiB' % grown)
        # Opened a little, it gives a little, to the byte.
        c = clients[0]
        c.put(frame(WINDOW, 0, 1, struct.pack('>I', 100)))
        got = 0
        while got < 100:
            f = c.until(lambda f: f[0] == DATA or f[0] == GOAWAY)
            equal((f[0], f[2]), (DATA, 1), 'the stream whose window was opened')
            got += len(f[3])
        equal(got, 100, 'bytes that the window lets through')
        for c in clients:
            c.close()
        others.end()
        alive(s)
        equal(s.end(), 0, 'exit code')


def a_window_of_one_byte(w):
    s = serve(w)
    c = Client(s, hello=[(4, 1)])
    c.put(head() + frame(DATA, END, 1, read_message(300)))
    got = b''
    while len(got) < 5 + 6 + 300:
        f = c.until(lambda f: f[0] == DATA or f[0] == GOAWAY)
        equal((f[0], f[2], len(f[3])), (DATA, 1, 1), 'a frame of one byte')
        got += f[3]
        c.put(frame(WINDOW, 0, 1, struct.pack('>I', 1)))
    equal(got[:5], b'\0\0\0\x01\x32', 'prefix')
    # A window below zero (6.9.2): nothing comes until it is positive again.
    c = Client(s, hello=[(4, 100)])
    c.put(head() + frame(DATA, END, 1, read_message(300)))
    f = c.until(lambda f: f[0] == DATA or f[0] == GOAWAY)
    equal((f[0], len(f[3])), (DATA, 100), 'the first piece')
    c.put(settings((4, 10)) + frame(WINDOW, 0, 1, struct.pack('>I', 90)) + frame(PING, 0, 0, b'12345678'))
    f = c.until(lambda f: f[0] == DATA or f[0] == GOAWAY or f[0] == PING and f[3] == b'12345678')
    equal(f[0], PING, 'nothing before the answer to PING')
    c.put(frame(WINDOW, 0, 1, struct.pack('>I', 7)))
    f = c.until(lambda f: f[0] == DATA or f[0] == GOAWAY)
    equal((f[0], len(f[3])), (DATA, 7), 'what the window lets through')


def messages_that_are_too_long(w):
    s = serve(w)
    path = READ_AT.replace('ReadAt', 'WriteAt')
    block = fields(first=[(':path', path)], without=(':path',))
    c = Client(s)
    # Compressed, of an unknown kind, no message: which status each gets stands in hostile.c.
    for n, prefix in enumerate((b'\0\x7f\xff\xff\xff', b'\0\xff\xff\xff\xff', b'\1\0\0\0\4abcd', b'\2\0\0\0\4abcd',
                                b'\0\0\0\0\1\xff')):
        stream = 2 * n + 1
        c.put(head(stream, block) + frame(DATA, END, stream, prefix))
        f = c.until(lambda f: f[2] == stream and f[0] in (HEADERS, RST) or f[0] == GOAWAY)
        true(f[0] == HEADERS and f[1] & END, 'an answer without a message to %r: %r' % (prefix, f))
    # Refused while it is still being sent: the peer is told to stop, the rest is thrown away, the connection stays.
    c.put(head(21, block) + frame(DATA, 0, 21, b'\0\x7f\xff\xff\xff' + bytes(60000)))
    f = c.until(lambda f: f[2] == 21 and f[0] == RST or f[0] == GOAWAY)
    equal((f[0], f[3]), (RST, bytes(4)), 'RST_STREAM with NO_ERROR')
    c.put(frame(DATA, END, 21, bytes(60000)))
    true(call_once(c, 23), 'a good call behind it')


def slow_senders(w):
    s = serve(w)
    quick = Others(s)
    quick.start()
    c = Client(s, greet=False)
    for b in PREFACE + settings() + frame(SETTINGS, ACK) + call():
        c.put(bytes([b]))
    equal(c.finish(), 'reply', 'one byte at a time')
    for cut in 1, 9, 23, 24, 30, 33, 50:
        half = Client(s, greet=False)
        half.put((PREFACE + settings() + call())[:cut])
        half.half_close()
        true(half.finish() == 'closed', 'half a request and then nothing: cut at %d' % cut)
    quick.end()


def seeds_of_garbage(w):
    s = serve(w)
    others = Others(s)
    others.start()
    seed = int(os.environ.get('FARPAGE_SEED', random.randrange(1 << 30)))
    print('# seed %d' % seed)
    rnd = random.Random(seed)
    whole_thing = b''.join(row[1] for row in ROWS[:60] if len(row[1]) < 4000)
    before = settled(s)
    for _ in range(200):
        c = Client(s, greet=rnd.random() < 0.8)
        kind = rnd.randrange(3)
        if kind == 0:
            data = bytearray((call(1) + call(3) + settings((4, 9)) + frame(PING, 0, 0, bytes(8))) * 3)
            for _ in range(rnd.randrange(1, 8)):
                data[rnd.randrange(len(data))] = rnd.randrange(256)
        elif kind == 1:
            data = b''.join(frame(rnd.randrange(12), rnd.randrange(256), rnd.choice([0, 1, 1, 3, 1 << 31, rnd.randrange(1 << 32)]),
                                  rnd.randbytes(rnd.randrange(40))) for _ in range(30))
        else:
            at = rnd.randrange(len(whole_thing))
            data = whole_thing[at:at + 3000]
        c.put(bytes(data))
        try:
            c.half_close()
        except OSError:
            pass
        while c.next():
            pass
        c.close()
    others.end()
    grown = settled(s) - before
    true(grown < 60 * SLACK, 'it grew by %d MiB' % grown)
    equal(s.end(), 0, 'exit code')


def first_bytes_that_come_in_pieces(w):
    """any:// tells gRPC from NBD when it has seen enough."""
    authority(w, 'ca')
    certificate(w, 's', 'ca', 'DNS:localhost')
    s = w.start('serve', 'mem:1M', '--listen', 'any://127.0.0.1:0', '--tls-cert', 's.pem', '--tls-key', 's.key')
    s.port, s.tls = int(s.line().split()[1].rsplit(':', 1)[1].split('/')[0]), None
    for first in 1, 2, 3, 10:
        c = Client(s, greet=False)
        c.s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        c.put(PREFACE[:first])
        time.sleep(0.15)  # longer than a silent client waits for NBD's greeting
        c.put(PREFACE[first:] + settings() + frame(SETTINGS, ACK) + call())
        equal(c.finish(), 'reply', 'after %d bytes' % first)
    context = ssl.create_default_context(cafile=w.path('ca.pem'))
    context.set_alpn_protocols(['h2'])
    for first in 1, 2, 5:
        raw = socket.create_connection(('127.0.0.1', s.port), DEADLINE)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        put, take = ssl.MemoryBIO(), ssl.MemoryBIO()
        t = context.wrap_bio(take, put, server_hostname='localhost')
        done = False
        sent = 0
        while not done:
            try:
                t.do_handshake()
                done = True
            except ssl.SSLWantReadError:
                pass
            out = put.read()
            if not sent and out:
                raw.sendall(out[:first])
                time.sleep(0.15)
                out, sent = out[first:], 1
            raw.sendall(out)
            if not done:
                got = raw.recv(65536)
                true(got, 'hung up in the handshake after %d bytes' % first)
                take.write(got)
        equal(t.version(), 'TLSv1.3')
        raw.close()
    silent = socket.create_connection(('127.0.0.1', s.port), DEADLINE)
    equal(silent.recv(8), b'NBDMAGIC', 'the greeting of who is silent')
    wrong = socket.create_connection(('127.0.0.1', s.port), DEADLINE)
    wrong.sendall(b'GET / HTTP/1.1\r\n\r\n')
    got = b'x'
    while got:
        got = wrong.recv(4096)  # it ends
    equal(s.end(), 0, 'exit code')


# ------------------------------------------------------------------------------------------------ grpcio, as a program would

def grpcio(w, tls):
    try:
        import grpc
    except ImportError:
        raise Skip('python3-grpcio is not installed')
    content = w.file('data', 40 << 20)
    s = serve(w, tls, 'file:data', ['--layer', 'delay:rtt=100ms'])
    where, no_limit = 'localhost:%d' % s.port, [('grpc.max_receive_message_length', -1), ('grpc.max_send_message_length', -1)]
    base = '/com.pojtinger.felicitas.r3map.mount.v1.Backend/'
    channel = (grpc.secure_channel(where, grpc.ssl_channel_credentials(w.read('ca.pem')), no_limit) if tls else
               grpc.insecure_channel(where, no_limit))
    with channel:
        read, write, sync, none = (channel.unary_unary(base + m) for m in ('ReadAt', 'WriteAt', 'Sync', 'Nothing'))

        def request(n, off):
            return read_message(n, off)[5:]

        def data(reply):
            """The bytes of field 2 (a reply: 1 is n, 2 is p)."""
            at, n, shift = 0, 0, 0
            while at < len(reply):
                tag, at, n, shift = reply[at], at + 1, 0, 0
                while True:
                    b, at = reply[at], at + 1
                    n, shift = n | (b & 127) << shift, shift + 7
                    if not b & 128:
                        break
                if tag == 0x12:
                    return reply[at:at + n]
            return b''

        def status(call, message, **more):
            try:
                call(message, timeout=more.pop('timeout', 30), **more)
            except grpc.RpcError as e:
                return e.code()
            return grpc.StatusCode.OK
        code = grpc.StatusCode
        for n, off in ((1, 0), (4096, 4096), (65536, 1), (1 << 20, 12345), (32 << 20, 100)):
            equal(data(read(request(n, off), timeout=30)), content[off:off + n], 'read of %d' % n)
        new = random.Random(7).randbytes(32 << 20)
        write(b'\x08' + varint(4096) + b'\x12' + varint(len(new)) + new, timeout=30)
        sync(b'', timeout=30)
        with open(w.path('data'), 'rb') as f:
            got = f.read()
        true(got == content[:4096] + new + content[4096 + len(new):], 'what was written is in the file')
        waiting = [read.future(request(4096, 4096 * i), timeout=30) for i in range(512)]
        for i, f in enumerate(waiting):
            true(data(f.result()) == got[4096 * i:4096 * i + 4096], 'call %d of 512 at once' % i)
        equal(status(read, request(1, 40 << 20)), code.UNKNOWN, 'a read at the end, as the Go peer says it')
        equal(status(read, request((32 << 20) + 1, 0)), code.UNKNOWN, 'one that is too long')
        equal(status(read, b'\xff\xff'), code.INVALID_ARGUMENT, 'no message')
        equal(status(none, b''), code.UNIMPLEMENTED, 'no method')
        equal(status(read, request(16, 0), metadata=[('farpage-export', 'nowhere')]), code.NOT_FOUND, 'no export')
        equal(status(write, b'\x12' + varint(34 << 20) + bytes(34 << 20)), code.RESOURCE_EXHAUSTED, 'a message that is too long')
        # Deadlines: told to the server, and to the caller when they are over.
        equal(status(read, request(16, 0), timeout=0.02), code.DEADLINE_EXCEEDED, 'a deadline')
        f = read.future(request(16, 0), timeout=30)
        f.cancel()
        true(f.cancelled(), 'a call that was cancelled')
        lost = [read.future(request(4096, 0)) for _ in range(200)]
        for f in lost:
            f.cancel()
        equal(status(read, request(16, 0)), code.OK, 'a call after 200 that were cancelled')
        for kind in grpc.Compression.Gzip, grpc.Compression.Deflate:
            try:
                # What grpcio does not find worth it, it does not compress.
                write(b'\x12' + varint(9000) + bytes(9000), compression=kind, timeout=30)
                raise AssertionError('a compressed message was taken')
            except grpc.RpcError as e:
                equal(e.code(), code.UNIMPLEMENTED, 'compression')
                true('compressed' in e.details(), e.details())
        equal(status(read, request(16, 0)), code.OK, 'a call after that')
        # Many headers, within what is allowed and beyond it.
        equal(status(read, request(16, 0), metadata=[('x-%d' % i, 'v' * 100) for i in range(50)]), code.OK, '7 KiB of headers')
        true(status(read, request(16, 0), metadata=[('x-%d' % i, 'v' * 1000) for i in range(30)]) in
             (code.RESOURCE_EXHAUSTED, code.INTERNAL), '30 KiB of headers')
        equal(status(read, request(16, 0)), code.OK, 'a call after that')
    equal(s.end(), 0, 'exit code')


@cell('grpcio', 'farpage is the server')
def grpcio_in_the_clear(w):
    grpcio(w, False)


@cell('grpcio with TLS', 'farpage is the server')
def grpcio_over_tls(w):
    grpcio(w, True)


CASES = [every_row_in_the_clear, every_row_over_tls, floods_whose_answers_are_taken, floods_whose_answers_are_not,
         bodies_that_are_announced_and_do_not_come, a_window_of_nothing, a_window_of_one_byte, messages_that_are_too_long,
         slow_senders, seeds_of_garbage, first_bytes_that_come_in_pieces, grpcio_in_the_clear, grpcio_over_tls]

for case in CASES:
    cell('grpcio' if case is grpcio_in_the_clear else 'grpcio with TLS' if case is grpcio_over_tls else 'raw HTTP/2 frames',
         'farpage is the server')(case)
main(CASES)
