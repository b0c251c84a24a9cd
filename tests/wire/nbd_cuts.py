#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""nbd_cuts.py FARPAGE CUT [long-client | long-server | CASE...]: the link of an NBD connection is cut before, inside and after each message, the
client being ours (CUT, nbd_cut.c, against every server) or the server (raw bytes). Nothing hangs, nothing is done by halves,
no wrong byte comes, and whoever comes next is served."""
import os
import socket
import struct
import subprocess
import sys
import time

CUT = os.path.abspath(sys.argv.pop(2))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'system'))
from cli_lib import DEADLINE, cell, equal, main, true, wait_for  # noqa: E402: reads sys.argv
from nbd_lib import SERVERS, end_of_daemons, nbdkit, place  # noqa: E402
from nbd_raw import (CACHE, CHUNKED, DISC, EXT, EXTENDED, FLUSH, GO, INFO, LIST, LIST_META, OPT, PAYLOAD,  # noqa: E402
                     READ, SET_META, SIMPLE, STARTTLS, STATUS, STRUCTURED, TRIM, WRITE, ZEROES, Client, alive, serve)

MIB = 1 << 20
LONG = 70000  # longer than what is answered from the buffer of requests


# ---------------------------------------------------------------------------------------------------- our client

def cut_client(w, server, step, below=0, first=1, tls=None, query=''):
    w.file('disk', MIB)
    try:
        # nbdkit 1.32 aborts when a connection ends while two of its threads answer (raw_send_socket: sock >= 0).
        more = dict(threads=1) if server is nbdkit else {}
        port, export = server(w, 'require' if tls else 'off', psk=tls == 'psk', **more)
        uri = 'nbd%s://%s127.0.0.1:%%d/%s?connections=1&timeout=4s%s' % ('s' if tls else '', 'alice@' if tls == 'psk' else '',
                                                                     export, query)
        if tls:
            uri += '&tls-psk-file=' + place().path('psk-shared/keys.psk') if tls == 'psk' else (
                '&tls-certificates=' + place().path('dir-bare'))
        p = subprocess.run([CUT, uri, str(port), str(below), str(step), str(first)], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, timeout=400)
        equal(p.returncode, 0, p.stderr.decode(errors='replace')[-2000:])
        print('# ' + p.stdout.decode().strip())
    finally:
        end_of_daemons(w)


def client_cases(step, tls_step):
    for peer, server in SERVERS.items():
        def case(w, server=server):
            cut_client(w, server, step)
        case.__name__ = 'our client at %s, cut after each %s byte' % (peer, '%dth' % step if step > 1 else 'single')
        yield cell(peer, 'farpage is the client')(case)
    for peer in ('nbdkit', 'farpage'):
        for tls in ('certificate', 'psk'):
            def case(w, server=SERVERS[peer], tls=tls):
                cut_client(w, server, tls_step, tls=tls)
            case.__name__ = 'our client at %s over TLS by %s, cut after each %dth byte' % (peer, tls, tls_step)
            yield cell(peer + ' with TLS', 'farpage is the client')(case)


# ---------------------------------------------------------------------------------------------------- our server

def request(form, kind, off, n, cookie, data=b''):
    if form == EXT:
        return struct.pack('>IHHQQQ', 0x21e41c71, PAYLOAD if kind == WRITE else 0, kind, cookie, off, n) + data
    return struct.pack('>IHHQQI', 0x25609513, 0, kind, cookie, off, n) + data


def option(which, data=b''):
    return struct.pack('>QII', OPT, which, len(data)) + data


def conversation(form, fill):
    """All that a client says, as a list of messages; which of them are requests, and which of those write what where."""
    messages = [struct.pack('>I', 3), option(LIST), option(STARTTLS), option(77, b'abc'), option(INFO, Client.named(b''))]
    if form != SIMPLE:
        messages += [option(STRUCTURED if form == CHUNKED else EXTENDED), option(LIST_META, Client.queries(b'')),
                     option(SET_META, Client.queries(b'', b'base:allocation'))]
    messages.append(option(GO, Client.named(b'')))
    greetings = len(messages)
    piece = bytes([fill]) * 100
    requests = [(WRITE, 1000, 100, piece), (READ, 0, 512, b''), (ZEROES, 3000, 77, b''), (WRITE, 2000, 100, piece),
                (TRIM, 4000, 50, b''), (CACHE, 0, 4096, b''), (FLUSH, 0, 0, b''), (WRITE, 10000, LONG, bytes([fill]) * LONG),
                (READ, 500000, LONG, b''), (READ, 900, 300, b'')]
    if form != SIMPLE:
        requests.insert(2, (STATUS, 0, 4096, b''))
    for cookie, (kind, off, n, data) in enumerate(requests, 1):
        messages.append(request(form, kind, off, n, cookie, data))
    messages.append(request(form, DISC, 0, 0, 99))
    return messages, greetings, requests


def places(messages, greetings, step):
    """Where to cut: every byte, but few inside of a long payload."""
    at, out = 0, [0]
    for m in messages:
        inside = list(range(1, min(len(m), 140), step)) + list(range(140, len(m) - 1, 9001)) + [len(m) - 1, len(m)]
        out += [at + k for k in sorted(set(inside)) if 0 < k <= len(m)]
        at += len(m)
    return sorted(set(out))


def whole_requests(messages, greetings, k):
    """How many requests are whole within the first k bytes."""
    at = n = 0
    for i, m in enumerate(messages):
        at += len(m)
        if at <= k and i >= greetings and i < len(messages) - 1:
            n += 1
    return n


def answers_of(raw, form, requests):
    """The cookies that are answered wholly in what came after the negotiation, the bytes of reads being `base`'s: checked by
    the caller. A tail that is cut off is left out."""
    out, at = {}, 0
    while True:
        head = raw[at:at + 4]
        if len(head) < 4:
            return out
        magic = struct.unpack('>I', head)[0]
        if magic == 0x67446698:
            if len(raw) < at + 16:
                return out
            error, cookie = struct.unpack('>IQ', raw[at + 4:at + 16])
            equal(error, 0, 'error of request %d' % cookie)
            kind, off, n, _ = requests[cookie - 1]
            n = n if kind == READ else 0
            if len(raw) < at + 16 + n:
                return out
            out[cookie] = raw[at + 16:at + 16 + n]
            at += 16 + n
            continue
        size = 32 if form == EXT else 20
        equal(magic, 0x6e8a278c if form == EXT else 0x668e33ef, 'magic')
        if len(raw) < at + size:
            return out
        flags, kind, cookie = struct.unpack('>HHQ', raw[at + 4:at + 16])
        n = struct.unpack('>Q' if form == EXT else '>I', raw[at + size - (8 if form == EXT else 4):at + size])[0]
        body = raw[at + size:at + size + n]
        if len(body) < n:
            return out
        at += size + n
        want, off, length, _ = requests[cookie - 1]
        true(kind < 1 << 15, 'an error chunk for request %d' % cookie)
        if kind == 2:
            equal(struct.unpack('>QI', body), (off, length), 'a hole')
            body = body[:8] + bytes(length)
        out[cookie] = out.get(cookie, b'') + (body[8:] if want == READ else b'')
        true(flags & 1, 'one chunk a request')


def talk(s, messages, greetings, k, how):
    """Say the first k bytes, then end in one of three ways. What came back, without the negotiation, where it can be had."""
    c = socket.socket(socket.AF_UNIX)
    c.settimeout(DEADLINE)
    c.connect(s.path)
    raw = b''
    try:
        c.sendall(b''.join(messages)[:k])
        if how == 'half':
            c.shutdown(socket.SHUT_WR)
            while True:
                piece = c.recv(1 << 20)
                if not piece:
                    break
                raw += piece
        elif how == 'reset':
            c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    except (BrokenPipeError, ConnectionResetError):
        true(how != 'half', 'a reset')
    c.close()
    return raw


def head_of(s, form):
    """How many bytes the server says until requests are taken."""
    messages, greetings, _ = conversation(form, 0)
    return len(talk(s, messages, greetings, sum(len(m) for m in messages[:greetings]), 'half'))


def read_by_another(s, off, n):
    c = Client(s.path).go()
    data = c.read(off, n)
    c.s.close()
    return data


def sockets(s):
    n, where = 0, '/proc/%d/fd' % s.p.pid
    for fd in os.listdir(where):
        try:
            n += os.readlink(where + '/' + fd).startswith('socket:')
        except FileNotFoundError:
            pass
    return n


def quiet(fds, before):
    """Nobody is served any more: what was asked for has been done, or never will be."""
    end = time.monotonic() + DEADLINE
    while fds() > before:
        true(time.monotonic() < end, 'a connection stays open')
        time.sleep(0.0002)


def cut_server(w, form, source, args, step, hows=('close', 'half', 'reset')):
    w.file('a', MIB)
    s = serve(w, source, args=args)
    fds = lambda: sockets(s)
    before = fds()
    base = read_by_another(s, 500000, LONG)
    head = head_of(s, form)
    old = {}
    n = 0
    messages, greetings, requests = conversation(form, 0)
    for i, k in enumerate(places(messages, greetings, step)):
        for j, how in enumerate(hows):
            fill = (3 * i + j) % 251 + 1
            messages, greetings, requests = conversation(form, fill)
            raw = talk(s, messages, greetings, k, how)
            whole = whole_requests(messages, greetings, k)
            n += 1
            if how == 'half':
                got = answers_of(raw[head:], form, requests) if whole else {}
                equal(sorted(got), list(range(1, whole + 1)), 'answers after %d bytes' % k)
                for cookie, data in got.items():
                    kind, off, length, _ = requests[cookie - 1]
                    if kind == READ and off == 500000:
                        true(data == base, 'a read gave other bytes, after %d' % k)
            quiet(fds, before)
            for cookie, (kind, off, length, data) in enumerate(requests, 1):
                if kind != WRITE:
                    continue
                now = read_by_another(s, off, 100)  # of a long one its beginning may have been taken
                if cookie > whole and length == 100:
                    true(now == old.get(off, now), 'a write without its end was done, cut after %d bytes, %s' % (k, how))
                elif cookie <= whole and how == 'half':
                    true(now == data[:100], 'a whole write was not done, cut after %d bytes' % k)
                elif length == 100 and off in old:
                    true(now in (data[:100], old[off]), 'half a write was done')
                old[off] = now
    alive(s)
    wait_for(lambda: fds() <= before, 'the end of all connections')
    equal(s.end(), 0, 'exit code: ' + s.err())
    print('# %d cuts' % n)


def cut_replies(w, form, source, args, step):
    """The client goes away after so many bytes of what the server says."""
    w.file('a', MIB)
    s = serve(w, source, args=args)
    fds = lambda: sockets(s)
    before = fds()
    messages, greetings, requests = conversation(form, 1)
    said = b''.join(messages)
    whole = len(talk(s, messages, greetings, len(said), 'half'))
    n = 0
    for k in list(range(1, min(whole, 1500), step)) + list(range(1500, whole, 7001)) + [whole - 1]:
        for how in ('close', 'reset'):
            c = socket.socket(socket.AF_UNIX)
            c.settimeout(DEADLINE)
            c.connect(s.path)
            c.sendall(said)
            left = k
            while left:
                piece = c.recv(left)
                if not piece:
                    break
                left -= len(piece)
            true(not left, 'the server said less')
            if how == 'reset':
                c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            c.close()
            n += 1
    alive(s)
    wait_for(lambda: fds() <= before, 'the end of all connections')
    equal(s.end(), 0, 'exit code: ' + s.err())
    print('# %d cuts' % n)


STORES = {'memory': ('mem:1M', []), 'a file': ('file:a', []), 'a slow store': ('mem:1M', ['--layer', 'delay:rtt=1ms'])}


def server_cases(step, stores):
    for form in (SIMPLE, CHUNKED, EXT):
        for name in stores:
            for what, fn in (('requests', cut_server), ('replies', cut_replies)):
                def case(w, fn=fn, form=form, store=STORES[name]):
                    fn(w, form, *store, step)
                case.__name__ = 'our server with %s, %s %s cut' % (name, form, what)
                yield cell('raw bytes', 'farpage is the server')(case)


if __name__ == '__main__':
    long = {'long-client': lambda: client_cases(1, 17), 'long-server': lambda: server_cases(1, STORES)}.get((sys.argv[2:] or [''])[0])
    if long:
        del sys.argv[2:]
        main(list(long()))
    main(list(client_cases(61, 401)) + list(server_cases(23, ['memory'])))
