#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""nbd_vectors.py FARPAGE [CASE...]: recorded NBD exchanges (tests/vectors/README.md). Our server gets the recorded clients'
messages one by one and must say what the recorded server said, or what is named here where that one was wrong; our client
gets the recorded server's answers. TAP."""
import os
import re
import socket
import struct
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
VECTORS = os.path.join(HERE, '..', 'vectors')
sys.path.insert(0, os.path.join(HERE, '..', 'system'))
from cli_lib import Skip, equal, main, true  # noqa: E402

SIZE = 65536
REGION = b''.join(struct.pack('>Q', k) for k in range(0, SIZE, 8))
OPTION, REQUEST, REPLY, SIMPLE, CHUNK = 0x49484156454f5054, 0x25609513, 0x3e889045565a9, 0x67446698, 0x668e33ef
EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED = 1, 2, 3, 6, 7, 8
READ, WRITE, DISC, FLUSH, TRIM = 0, 1, 2, 3, 4
ACK, SERVER, INFORMATION, ERROR = 1, 2, 3, 1 << 31
EINVAL = 22


def connections(name):
    """[(client's bytes, server's bytes)] of a recording."""
    out = []
    with open(os.path.join(VECTORS, name + '.txt')) as f:
        for line in f:
            if re.match(r'# connection \d+ opened', line):
                out.append((bytearray(), bytearray()))
            elif line[0] in '<>':
                out[-1][line[0] == '<'].extend(bytes.fromhex(line[2:]))
    return [(bytes(a), bytes(b)) for a, b in out]


class Bytes:
    def __init__(self, data):
        self.data = data

    def read(self, n):
        if len(self.data) < n:
            raise EOFError
        out, self.data = self.data[:n], self.data[n:]
        return out


class Wire:
    def __init__(self, path):
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(20)
        self.s.connect(path)

    def read(self, n):
        out = b''
        while len(out) < n:
            piece = self.s.recv(n - len(out))
            if not piece:
                raise EOFError
            out += piece
        return out


def messages(data):
    """The client's flags, and each of its messages with what it asks: (kind, number, offset, length, bytes)."""
    at, out = 4, []
    while at + 16 <= len(data):
        if struct.unpack_from('>Q', data, at)[0] == OPTION:
            number, n = struct.unpack_from('>II', data, at + 8)
            out.append(('option', number, 0, 0, data[at:at + 16 + n]))
            at += 16 + n
            continue
        magic, _, number, _, off, n = struct.unpack_from('>IHHQQI', data, at)
        equal(magic, REQUEST, 'magic at %d' % at)
        end = at + 28 + (n if number == WRITE else 0)
        out.append(('request', number, off, n, data[at:end]))
        at = end
    equal(at, len(data), 'bytes of the client')
    return data[:4], out


def option_answer(s, number):
    """What an option was answered: its end, and what of it has a meaning of its own."""
    if number == EXPORT_NAME:
        size, flags = struct.unpack('>QH', s.read(10))
        return 'export', size
    names, size = [], None
    while True:
        magic, which, kind, n = struct.unpack('>QIII', s.read(20))
        equal((magic, which), (REPLY, number), 'magic and option of a reply')
        data = s.read(n)
        if kind == SERVER:
            while data:  # go-nbd puts all exports into one reply
                end = 4 + struct.unpack('>I', data[:4])[0]
                names.append(data[4:end])
                data = data[end:]
        elif kind == INFORMATION and data[:2] == b'\0\0':
            size = struct.unpack('>Q', data[2:10])[0]
        elif kind == ACK or kind & ERROR:
            return ('ok' if kind == ACK else kind & ~ERROR), names or size


def request_answer(s, number, off, length):
    """(error, data)"""
    magic = struct.unpack('>I', s.read(4))[0]
    if magic == SIMPLE:
        error = struct.unpack('>IQ', s.read(12))[0]
        return error, s.read(length) if number == READ and not error else b''
    data, error = bytearray(length if number == READ else 0), 0
    while True:
        equal(magic, CHUNK, 'magic of a reply')
        flags, kind, _, n = struct.unpack('>HHQI', s.read(16))
        body = s.read(n)
        if kind & 0x8000:
            error = struct.unpack('>I', body[:4])[0]
        elif kind == 1:
            at = struct.unpack('>Q', body[:8])[0] - off
            data[at:at + n - 8] = body[8:]
        if flags & 1:
            return error, b'' if error else bytes(data)
        magic = struct.unpack('>I', s.read(4))[0]


def answer(s, m):
    kind, number, off, length, _ = m
    if kind == 'option':
        return option_answer(s, number)
    return None if number == DISC else request_answer(s, number, off, length)


# Where the recorded server was wrong or knows less, what ours says: {(recording, message's number): answer}
OURS = {
    ('nbd-gonbd-flush', 2): (0, b''),                 # it said EINVAL
    ('nbd-gonbd-trim-eats-stream', 2): (0, b''),      # it waited for bytes
    ('nbd-gonbd-read-past-end', 2): (EINVAL, b''),    # success, then nothing
    ('nbd-gonbd-read-over-tail', 2): (EINVAL, b''),
    ('nbd-gonbd-export-name-option', 0): ('export', SIZE),
}


def played(w, name, served, path):
    for client, server in connections(name):
        flags, ask = messages(client)
        theirs, ours = Bytes(server), Wire(path)
        for s in (theirs, ours):
            equal(s.read(16), b'NBDMAGICIHAVEOPT', 'greeting')
            s.read(2)
        ours.s.sendall(flags)
        for k, m in enumerate(ask):
            ours.s.sendall(m[4])
            what = '%s, message %d (%s %d)' % (name, k, m[0], m[1])
            if m[:2] == ('option', ABORT):
                continue  # an answer may come, or the end
            got = answer(ours, m)
            if (name, k) in OURS:
                equal(got, OURS[name, k], what)
                continue
            try:
                wanted = answer(theirs, m)
            except EOFError:
                raise AssertionError(what + ': the recording has no answer')
            if m[:2] == ('option', STRUCTURED):
                true(got[0] == 'ok', what)  # ours can, theirs cannot
            elif m[0] == 'option' and m[1] == LIST:
                equal(sorted(got[1]), sorted(wanted[1]), what)
            elif got != wanted and name == 'nbd-gonbd-info-empty-name' and m[0] == 'option':
                equal(got[0], 'ok', what)  # one export is the one without a name; theirs knows none such
            else:
                equal(got, wanted, what)
        ours.s.close()
    true(served.p.poll() is None, 'our server is gone')


def serve(w, *options, second=False):
    for name in ('region', 'other'):
        with open(w.path(name), 'wb') as f:
            f.write(REGION)
    path = w.path('nbd.sock')
    names = ['default=file:region'] + (['second=file:other'] if second else [])
    s = w.start('serve', *names, *options, '--listen', 'nbd+unix:///?socket=' + path)
    s.line()
    return s, path


def of(kind):
    names = sorted(n[:-4] for n in os.listdir(VECTORS) if n.startswith(kind))
    true(names, 'no recordings')
    return names


def recorded_clients_and_our_server(w):
    for name in of('nbd-gonbd-'):
        two, read_only = 'two' in name, 'readonly' in name
        s, path = serve(w, *(['--read-only'] if read_only else []), second=two)
        print('# ' + name)
        played(w, name, s, path)
        if name.endswith('read-write-disc'):
            equal(w.read('region')[8192:8196], b'\0\x11\x22\x33', 'what was written')
        s.end()


def the_go_client_and_our_server(w):
    """Its quirks: client flags of 0, GO of length 0."""
    for name in ('nbd-goclient-go-gonbd', 'nbd-goclient-go-unknown-gonbd', 'nbd-goclient-list-gonbd-two'):
        s, path = serve(w, second='two' in name)
        print('# ' + name)
        for client, server in connections(name):
            flags, data = client[:4], client[4:]
            ours, theirs = Wire(path), Bytes(server)
            for x in (ours, theirs):
                x.read(18)
            ours.s.sendall(flags + data)  # all at once: its lengths are not what they say
            number = struct.unpack_from('>I', data, 8)[0]
            got, wanted = option_answer(ours, number), option_answer(theirs, number)
            if number == LIST:
                got, wanted = (got[0], sorted(got[1])), (wanted[0], sorted(wanted[1]))
            equal(got, wanted, name)
            ours.s.close()
        s.end()


class Recorded(threading.Thread):
    """A server that says what go-nbd said to the same option, and to a read the recorded header with the bytes."""

    def __init__(self, path):
        super().__init__(daemon=True)
        self.said, self.asked, self.failed = {}, [], None
        for name in ('nbd-gonbd-opt-info-then-go', 'nbd-gonbd-info'):
            client, server = connections(name)[0]
            s = Bytes(server)
            self.greeting = s.read(18)
            for m in messages(client)[1]:
                before = s.data
                answer(s, m)
                if m[0] == 'option':
                    self.said[m[1]] = before[:len(before) - len(s.data)]
        self.l = socket.socket(socket.AF_UNIX)
        self.l.bind(path)
        self.l.listen(8)

    def run(self):
        while True:
            c, _ = self.l.accept()
            threading.Thread(target=self.talk, args=(c,), daemon=True).start()

    def talk(self, c):
        w = Wire.__new__(Wire)
        w.s = c
        try:
            c.sendall(self.greeting)
            w.read(4)
            while True:
                head = w.read(16)
                if struct.unpack('>Q', head[:8])[0] == OPTION:
                    number, n = struct.unpack('>II', head[8:])
                    w.read(n)
                    self.asked.append(number)
                    c.sendall(self.said.get(number) or struct.pack('>QIII', REPLY, number, ERROR + 1, 0))
                    continue
                magic, _, number, cookie = struct.unpack('>IHHQ', head)
                off, n = struct.unpack('>QI', w.read(12))
                if number == DISC:
                    return
                c.sendall(struct.pack('>IIQ', SIMPLE, 0 if number == READ else EINVAL, cookie) +
                          (REGION[off:off + n] if number == READ else b''))
        except (EOFError, OSError):
            pass


def our_client_and_the_recorded_server(w):
    r = Recorded(w.path('sock'))
    r.start()
    out = w.run('copy', 'nbd+unix:///default?socket=' + w.path('sock'), 'file:' + w.path('out'), '--quiet')
    if out.returncode and 'unknown scheme' in out.err:
        raise Skip('this build has no NBD client (libnbd)')
    equal(out.returncode, 0, out.err)
    equal(w.read('out'), REGION, 'what was copied')
    true(GO in r.asked, 'it never asked for the export')


main([recorded_clients_and_our_server, the_go_client_and_our_server, our_client_and_the_recorded_server])
