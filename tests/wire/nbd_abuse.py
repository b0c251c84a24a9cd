#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""nbd_abuse.py FARPAGE [CASE...]: clients of the NBD server that never end what they ask, or never take the answers.

What each row says it says again and again. Meanwhile another client reads; the process stays, its memory is measured."""
import os
import socket
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'system'))
from cli_lib import DEADLINE, SLACK, cell, equal, main, true, wait_for

OPT = 0x49484156454f5054
EXPORT_NAME, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 3, 5, 6, 7, 8, 9, 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
MIB = 1 << 20


def option(kind, data=b'', n=None):
    return struct.pack('>QII', OPT, kind, len(data) if n is None else n) + data


def request(kind, off=0, n=0, data=b'', cookie=1, flags=0):
    return struct.pack('>IHHQQI', 0x25609513, flags, kind, cookie, off, n) + data


def queries(*q):
    return struct.pack('>I', 0) + struct.pack('>I', len(q)) + b''.join(struct.pack('>I', len(x)) + x for x in q)


HELLO = struct.pack('>I', 3)
BEGIN = HELLO + option(EXPORT_NAME)
CHUNKS = HELLO + option(STRUCTURED) + option(SET_META, queries(b'base:allocation')) + option(GO, struct.pack('>IH', 0, 0))

# Name, what comes first, what comes again and again; whether the connection must end by it. None: it must if the answers are
# taken, since nobody needs so many options.
ROWS = [
    ('lists', HELLO, option(LIST), None),
    ('unknown options', HELLO, option(999, bytes(4000)), None),
    ('options that are too long', HELLO, option(LIST, bytes(200000)), None),
    ('an option of 1 MiB, and more of it', HELLO + option(LIST, b'', MIB), bytes(65536), True),
    ('facts', HELLO, option(INFO, struct.pack('>IHHHH', 0, 3, 0, 1, 3)), None),
    ('contexts', HELLO + option(STRUCTURED), option(SET_META, queries(*[b'base:allocation', b'farpage:', b'x:y'] * 300)), None),
    ('lists of contexts', HELLO + option(STRUCTURED), option(LIST_META, queries(*[b'base:', b'farpage:'] * 300)), None),
    ('names of 4 KiB', HELLO, option(INFO, struct.pack('>I', 4096) + b'n' * 4096 + bytes(2)), None),
    ('STARTTLS', HELLO, option(STARTTLS), None),
    ('no magic', HELLO, b'garbage, nothing but garbage', True),
    ('no magic of a request', BEGIN, b'garbage, nothing but garbage', True),
    ('reads of 4 KiB', BEGIN, request(READ, 0, 4096) * 50, False),
    ('reads of 32 MiB', BEGIN, request(READ, 0, 32 * MIB), False),
    ('reads that are too long', BEGIN, request(READ, 0, 0xffffffff) * 50, False),
    ('reads beyond the end', CHUNKS, request(READ, 1 << 60, 4096) * 50, False),
    ('unknown commands', CHUNKS, request(999) * 50, False),
    ('flushes', BEGIN, request(FLUSH) * 50, False),
    ('caches of everything', BEGIN, request(CACHE, 0, 64 * MIB) * 50, False),
    ('zeroes of everything', BEGIN, request(ZEROES, 0, 64 * MIB) * 50, False),
    ('block status of everything', CHUNKS, request(STATUS, 0, 64 * MIB) * 50, False),
    ('small writes', BEGIN, request(WRITE, 0, 512, bytes(512)) * 20, False),
    ('a write of 4 GiB', BEGIN + request(WRITE, 0, 0xffffffff), bytes(65536), False),
    ('disconnect, and go on', BEGIN + request(DISC), request(READ, 0, 4096) * 50, True),
]


def connect(path):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(DEADLINE)
    s.connect(path)
    return s


def serve(w, *args):
    path = w.path('sock')
    s = w.start('serve', 'mem:64M', '--listen', 'nbd+unix:///?socket=' + path, *args,
                env={'ASAN_OPTIONS': os.environ.get('ASAN_OPTIONS', '') + ':quarantine_size_mb=4'})
    s.line()
    s.path = path
    return s


def get(s, n):
    out = b''
    while len(out) < n:
        piece = s.recv(n - len(out))
        true(piece, 'the server hung up')
        out += piece
    return out


class Others(threading.Thread):
    """An honest client beside."""

    def __init__(self, s):
        super().__init__(daemon=True)
        self.s, self.n, self.worst, self.failed, self.over = connect(s.path), 0, 0, None, False
        get(self.s, 18)
        self.s.sendall(BEGIN)
        get(self.s, 10)

    def run(self):
        try:
            while not self.over:
                began = time.monotonic()
                self.s.sendall(request(READ, 4096, 512, cookie=self.n))
                equal(get(self.s, 16), struct.pack('>IIQ', 0x67446698, 0, self.n), 'reply')
                get(self.s, 512)
                self.worst, self.n = max(self.worst, time.monotonic() - began), self.n + 1
                time.sleep(0.005)
        except Exception as e:
            self.failed = repr(e)

    def end(self):
        before = self.n
        wait_for(lambda: self.failed or self.n > before + 2, 'reads beside')
        self.over = True
        self.join(DEADLINE)
        true(not self.failed, 'beside: %s' % self.failed)


def rss(s):
    with open('/proc/%d/status' % s.p.pid) as f:
        return next(int(x.split()[1]) for x in f if x.startswith('VmRSS')) / 1024


def flood(s, first, again, takes, seconds):
    """True if the server ended it."""
    c = connect(s.path)
    gone = threading.Event()

    def take():
        while not gone.is_set():
            try:
                if not c.recv(MIB):
                    gone.set()
            except socket.timeout:
                pass
            except OSError:
                gone.set()
    if takes:
        threading.Thread(target=take, daemon=True).start()
    else:
        get(c, 18)
    c.settimeout(0.1)
    end = time.monotonic() + seconds
    data = first
    try:
        while time.monotonic() < end and not gone.is_set():
            try:
                data = data[c.send(data):] or again
            except socket.timeout:
                pass
    except OSError:
        gone.set()
    return c, gone.is_set()


def floods(w, takes, *args):
    s = serve(w, *args)
    others = Others(s)
    others.start()
    failed, worst = [], 0
    for name, first, again, ends in ROWS:
        before = rss(s)
        ends = True if ends is None and takes else ends
        c, ended = flood(s, first, again, takes, DEADLINE if ends else 0.2)
        grown = rss(s) - before
        worst = max(worst, grown)
        if os.environ.get('FARPAGE_VERBOSE'):
            print('# %s: %s, grown by %.1f MiB' % (name, 'ended' if ended else 'goes on', grown))
        if ends is not None and ended != ends:
            failed.append('%s: %s' % (name, 'ended' if ended else 'not ended'))
        if grown > 200 * SLACK:
            failed.append('%s: grown by %d MiB' % (name, grown))
        c.close()
        true(s.p.poll() is None, '%s ended the process: %s' % (name, s.err()[-1000:]))
    others.end()
    print('# %d rows, grown by %d MiB at most, the slowest read beside took %.3f s' % (len(ROWS), worst, others.worst))
    true(not failed, '\n'.join(failed))
    true(others.worst < 5, 'a read beside took %.1f s' % others.worst)
    equal(s.end(), 0, 'exit code')


def answers_are_taken(w):
    floods(w, True)


def answers_are_not_taken(w):
    floods(w, False)


def answers_are_late_and_not_taken(w):
    floods(w, False, '--layer', 'delay:rtt=2ms')


def data_that_does_not_come(w):
    s = serve(w)
    others = Others(s)
    others.start()
    before = rss(s)
    clients = [connect(s.path) for _ in range(40)]
    for c in clients:
        get(c, 18)
        c.sendall(BEGIN)
        get(c, 10)
        c.sendall(request(WRITE, 0, 32 * MIB, bytes(100)))
    seen = others.n
    wait_for(lambda: others.n > seen + 20 or others.failed, 'reads beside')
    grown = rss(s) - before
    print('# 40 writes of 32 MiB, 100 bytes of each: %d MiB' % grown)
    true(grown < 200 * SLACK, 'it grew by %d MiB' % grown)
    for c in clients:
        c.close()
    others.end()
    equal(s.end(), 0, 'exit code')


CASES = [answers_are_taken, answers_are_not_taken, answers_are_late_and_not_taken, data_that_does_not_come]
for case in CASES:
    cell('raw bytes', 'farpage is the server')(case)
main(CASES)
