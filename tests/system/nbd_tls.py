#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""nbd_tls.py FARPAGE [long | CASE...]: NBD over TLS, every server and client that is not ours against ours, in each way of
being right and wrong. A cell either connects and moves the right bytes, encrypted where TLS was asked for, or refuses with a
word why. Somebody in between sees all bytes, so that a fall-back to clear text is found and not believed away."""
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time

from cli_lib import Skip, cell, equal, has, main, message, true
from nbd_lib import PATH, SERVERS, answers, end_of_daemons, farpage, nbd_server, need, place
from tcp_lib import Between

SIZE = 256 << 10
OPT, REPLY = b'IHAVEOPT', struct.pack('>Q', 0x3e889045565a9)
STARTTLS = OPT + struct.pack('>II', 5, 0)


# ------------------------------------------------------------------------------------------------------- clients

class Who:
    """What a client is told: TLS or none, the folder of its certificates (None: nothing), or a file of keys and its name."""

    def __init__(self, tls=True, folder='bare', psk=None, user='alice', env=()):
        self.tls, self.psk, self.user = tls, psk, user
        self.env = {k: place().path(v) for k, v in dict(env).items()}
        self.folder = folder and place().path('dir-' + folder)
        self.keys = place().path('psk-%s/keys.psk' % psk) if psk else None

    def uri(self, port, export):
        if not self.tls:
            return 'nbd://localhost:%d/%s' % (port, export)
        if self.psk:
            return 'nbds://%s@localhost:%d/%s?tls-psk-file=%s' % (self.user, port, export, self.keys)
        return 'nbds://localhost:%d/%s%s' % (port, export, '?tls-certificates=' + self.folder if self.folder else '')


def call(w, *args):
    need(args[0])
    p = subprocess.run(args, cwd=w.dir, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                       env=dict(os.environ, PATH=PATH))
    p.err = p.stderr.decode(errors='replace')
    return p


def by_farpage(w, who, port, export, deadline='10s'):
    p = w.run('copy', who.uri(port, export), 'file:got', '--deadline', deadline, env=dict(who.env, TMPDIR=w.dir))
    true(not [x for x in os.listdir(w.dir) if x.startswith('farpage-ca')], 'the folder of the handshake is left')
    if p.returncode:
        true(p.returncode in (1, 2, 4), 'exit %d: %s' % (p.returncode, p.err))
        message(p.err)
        has(p.err, 'localhost:%d' % port)
    return p.returncode == 0, p.err


def by_nbdcopy(w, who, port, export):
    p = call(w, 'nbdcopy', who.uri(port, export), 'got')
    return p.returncode == 0, p.err


def by_nbdinfo(w, who, port, export):
    p = call(w, 'nbdinfo', '--size', who.uri(port, export))
    if p.returncode == 0:
        equal(p.stdout.strip(), b'%d' % SIZE, 'size')
    return p.returncode == 0, p.err


def by_qemu_img(w, who, port, export):
    need('qemu-img')
    creds = []
    if who.tls:
        creds = ['--object', 'tls-creds-psk,id=t,endpoint=client,username=%s,dir=%s' % (who.user, os.path.dirname(who.keys))
                 if who.psk else 'tls-creds-x509,id=t,endpoint=client,sanity-check=off,dir=' + who.folder]
    image = 'driver=nbd,server.type=inet,server.host=localhost,server.port=%d,export=%s%s' % (
        port, export, ',tls-creds=t' if who.tls else '')
    p = call(w, 'qemu-img', 'convert', *creds, '--image-opts', image, '-O', 'raw', 'got')
    return p.returncode == 0, p.err


def by_fio(w, who, port, export):
    """It compares what it has written itself; what it has written is then on the disk. It lets its library open no file that
    a URI names, so the certificates are where the library looks by itself, for a user other than root."""
    need('fio')
    if 'nbd' not in call(w, 'fio', '--enghelp').stdout.decode():
        raise Skip('this fio has no nbd engine')
    if who.psk:
        raise Skip('it lets its library read no file of keys')
    home = tempfile.mkdtemp(prefix='farpage-fio.')
    try:
        os.makedirs(home + '/.pki')
        if who.tls:
            shutil.copytree(who.folder, home + '/.pki/libnbd')
        subprocess.run(['chmod', '-R', 'a+rX', home], check=True)
        p = subprocess.run(['fio', '--name=x', '--ioengine=nbd', '--uri=' + who.uri(port, export).split('?')[0], '--rw=write',
                            '--bs=64k', '--iodepth=4', '--size=%d' % SIZE, '--verify=crc32c', '--do_verify=1', '--verify_fatal=1'],
                           cwd=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
                           user=65534 if os.geteuid() == 0 else None, env=dict(os.environ, PATH=PATH, HOME=home), text=True)
    finally:
        shutil.rmtree(home)
    return p.returncode == 0 and 'err= 0' in p.stdout, p.stdout


def by_nbd_client(w, who, port, export):
    """It negotiates before it asks the kernel, which here has no NBD: the size that it tells is the proof."""
    if who.psk:
        raise Skip('it knows no shared keys')
    args = ['nbd-client', '-N', export, 'localhost', str(port)]
    if who.tls:
        args += ['-enable-tls', '-cacertfile', who.folder + '/ca-cert.pem', '-tlshostname', 'localhost']
        if os.path.exists(who.folder + '/client-cert.pem'):
            args += ['-certfile', who.folder + '/client-cert.pem', '-keyfile', who.folder + '/client-key.pem']
    p = call(w, *args)
    said = p.stdout.decode(errors='replace')
    return 'size = 0MB' in said, p.err + said


# ---------------------------------------------------------------------------------------------------- conditions

CLEAR, SECRET, NO = 'clear', 'encrypted', 'refused'
# name: how the server is set up, who the client is, what is to come of it
CONDITIONS = {
    'required': (dict(mode='require'), dict(), SECRET),
    'required, plain client': (dict(mode='require'), dict(tls=False), NO),
    'allowed': (dict(mode='allow'), dict(), SECRET),
    'allowed, plain client': (dict(mode='allow'), dict(tls=False), CLEAR),
    'off, plain client': (dict(mode='off'), dict(tls=False), CLEAR),
    'off, TLS client': (dict(mode='off'), dict(), NO),
    'wrong CA': (dict(mode='require'), dict(folder='foreign'), NO),
    'allowed, wrong CA': (dict(mode='allow'), dict(folder='foreign'), NO),
    'expired': (dict(mode='require', cert='old'), dict(), NO),
    'wrong name': (dict(mode='require', cert='named'), dict(), NO),
    'client certificate': (dict(mode='require', verify=True), dict(folder='alice'), SECRET),
    'client certificate missing': (dict(mode='require', verify=True), dict(), NO),
    'client certificate of another CA': (dict(mode='require', verify=True), dict(folder='mallory'), NO),
    'client certificate expired': (dict(mode='require', verify=True), dict(folder='late'), NO),
    'shared key': (dict(mode='require', psk=True), dict(psk='shared'), SECRET),
    'shared key allowed': (dict(mode='allow', psk=True), dict(psk='shared'), SECRET),
    'another key': (dict(mode='require', psk=True), dict(psk='unshared'), NO),
    'unknown user': (dict(mode='require', psk=True), dict(psk='unshared', user='carol'), NO),
    'shared key, plain client': (dict(mode='require', psk=True), dict(tls=False), NO),
    'shared key, TLS off': (dict(mode='off'), dict(psk='shared'), NO),
    'key at a certificate': (dict(mode='require'), dict(psk='shared'), NO),
    'certificate at a key': (dict(mode='require', psk=True), dict(), NO),
}
# Where nothing is said the system's authorities are asked. libnbd by itself would then believe anybody (CVE-2024-7383), so
# these are for our client only.
UNSAID = {
    'no word of an authority': (dict(mode='require'), dict(folder=None), NO),
    'no word of an authority, TLS allowed': (dict(mode='allow'), dict(folder=None), NO),
    'a system that knows the authority': (dict(mode='require'), dict(folder=None, env={'SSL_CERT_FILE': 'ca.pem'}), SECRET),
    'a system that knows another': (dict(mode='require'), dict(folder=None, env={'SSL_CERT_FILE': 'other.pem'}), NO),
    'a system without any': (dict(mode='require'), dict(folder=None, env={'SSL_CERT_FILE': 'nowhere.pem'}), NO),
    'a system that knows it, expired': (dict(mode='require', cert='old'), dict(folder=None, env={'SSL_CERT_FILE': 'ca.pem'}), NO),
    'a system that knows it, wrong name': (dict(mode='require', cert='named'), dict(folder=None, env={'SSL_CERT_FILE': 'ca.pem'}), NO),
    'garbage for an authority': (dict(mode='require'), dict(folder='garbage'), NO),
    'an empty file for an authority': (dict(mode='require'), dict(folder='empty'), NO),
}


def clear_options(up):
    """The options that a client has sent in the clear."""
    out, at = [], bytes(up).find(OPT)
    while at >= 0 and at + 12 <= len(up):
        out.append(struct.unpack('>I', up[at + 8:at + 12])[0])
        at = bytes(up).find(OPT, at + 1)
    return out


def run_cell(w, server, client, how, who, wanted):
    data = w.file('disk', SIZE)
    if client is by_nbd_client:
        how = dict(how, oldest=how.get('oldest', '1.2'))  # it speaks no 1.3
    if server is nbd_server and who == {}:
        who = dict(folder='alice')  # it insists on a certificate
    if server is nbd_server and 'env' in who and wanted == SECRET:
        raise Skip('it insists on a certificate of the client')
    try:
        port, export = server(w, **how)
        b = Between(port)
        who = Who(**who)
        began = time.monotonic()
        went, said = client(w, who, b.port, export)
        true(time.monotonic() - began < 30, 'it took too long')
        equal(went, wanted != NO, 'connected, and it said %r' % said[-1500:])
        if wanted == NO:
            true(said.strip(), 'no word why')
        if wanted == NO and client is by_farpage:  # in words for people
            true('gnutls' not in said and 'handle' not in said, said)
            has(said, 'TLS' if not who.tls or how['mode'] == 'off' else 'key' if who.psk else 'cert' if 'psk' not in how else
                'tls-psk-file')
        if client is by_fio and went:
            data = w.read('disk')
        elif os.path.exists(w.path('got')) and went:
            true(w.read('got') == data, 'other bytes came')
        pieces = [data[k:k + 32] for k in range(0, SIZE, 16384)]
        seen = any(p in b.seen[0] or p in b.seen[1] for p in pieces)
        if wanted == CLEAR and client not in (by_nbdinfo, by_nbd_client):
            true(seen, 'the bytes were not seen in between: nothing was looked at')
        if wanted != CLEAR:
            true(not seen, 'bytes of the disk went in the clear')
        if who.tls:
            # STRUCTURED_REPLY before STARTTLS would be forgotten, but says nothing: no name of an export goes by.
            true(set(clear_options(b.seen[0])) <= {5, 2}, 'options in the clear: %r' % clear_options(b.seen[0]))
        true(answers(port), 'the server is gone')
    finally:
        end_of_daemons(w)


CLIENTS = {'nbdcopy': by_nbdcopy, 'nbdinfo': by_nbdinfo, 'qemu-img': by_qemu_img, 'fio': by_fio, 'nbd-client': by_nbd_client}


# ------------------------------------------------------------------------------------------------ attackers' ways

def reply(option, kind, data=b''):
    return REPLY + struct.pack('>III', option, kind, len(data)) + data


def starttls_is_stripped(w):
    """Somebody answers for the server that it has no TLS, or does not answer at all."""
    data = w.file('disk', SIZE)
    port, export = farpage(w, 'allow')
    good = reply(5, 1)
    for bad in (reply(5, 1 << 31 | 1), reply(5, 1 << 31 | 2), reply(5, 1 << 31 | 3), reply(5, 1 << 31 | 8), reply(7, 1), reply(5, 3),
                b'', good[:19], b'\0' * 20, good + b'\0' * 20, good + reply(8, 1), reply(5, 1, b'well')):
        b = Between(port, lambda way, piece: piece.replace(good, bad) if way else piece)
        went, said = by_farpage(w, Who(), b.port, export, deadline='1s')
        true(not went, 'it connected with %r for an answer' % bad)
        true(set(clear_options(b.seen[0])) <= {5, 2}, 'options in the clear: %r' % clear_options(b.seen[0]))
        true(data[:32] not in b.seen[1], 'bytes of the disk went in the clear')


def talk(w, port):
    """Up to where options are sent, in the clear."""
    s = socket.create_connection(('127.0.0.1', port), 30)
    equal(got(s, 18), b'NBDMAGICIHAVEOPT\0\3', 'greeting')
    s.sendall(struct.pack('>I', 3))
    return s


def got(s, n):
    out = b''
    while len(out) < n:
        piece = s.recv(n - len(out))
        true(piece, 'the end after %r' % out)
        out += piece
    return out


def kind_of(s, option):
    """The kind of the last answer to an option."""
    while True:
        magic, which, kind, n = struct.unpack('>QIII', got(s, 20))
        equal((struct.pack('>Q', magic), which), (REPLY, option), 'an answer')
        got(s, n)
        if kind not in (2, 3, 4):
            return kind


def encrypt(s):
    c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    c.load_verify_locations(place().path('ca.pem'))
    return c.wrap_socket(s, server_hostname='localhost')


def ended(s):
    try:
        while s.recv(4096):
            pass
        return True
    except ConnectionError:
        return True


def go(name):
    return OPT + struct.pack('>III', 7, 6 + len(name), len(name)) + name + b'\0\0'


def words_behind_starttls_are_not_taken(w):
    """What somebody has put behind STARTTLS in the clear is not done after it as if it had come encrypted."""
    w.file('disk', SIZE)
    for mode in ('require', 'allow'):
        port, export = farpage(w, mode)
        for behind in (go(b'disk'), OPT + struct.pack('>II', 8, 0), b'x', go(b'disk')[:9], b'\x16\x03\x01'):
            s = talk(w, port)
            s.sendall(STARTTLS + behind)
            try:
                s = encrypt(s)
                raise AssertionError('it went on after %r' % behind)
            except (ssl.SSLError, OSError):
                pass
            s.close()
        true(answers(port), 'the server is gone')
        w.running[-1].end()


def what_was_said_in_the_clear_is_forgotten(w):
    """Structured replies and contexts that somebody in between has agreed on do not hold after STARTTLS."""
    data = w.file('disk', SIZE)
    port, export = farpage(w, 'allow')
    s = talk(w, port)
    s.sendall(OPT + struct.pack('>II', 8, 0))
    equal(kind_of(s, 8), 1, 'structured replies')
    query = struct.pack('>I', 4) + b'disk' + struct.pack('>II', 1, 15) + b'base:allocation'
    s.sendall(OPT + struct.pack('>II', 10, len(query)) + query)
    equal(kind_of(s, 10), 1, 'a context')
    s.sendall(STARTTLS)
    equal(kind_of(s, 5), 1, 'STARTTLS')
    s = encrypt(s)
    s.sendall(STARTTLS)
    equal(kind_of(s, 5), 1 << 31 | 3, 'STARTTLS once more')
    s.sendall(OPT + struct.pack('>II', 10, len(query)) + query)
    equal(kind_of(s, 10), 1 << 31 | 3, 'a context without structured replies')
    s.sendall(go(b'disk'))
    equal(kind_of(s, 7), 1, 'GO')
    s.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 0, 77, 100, 50))
    equal(got(s, 66), struct.pack('>IIQ', 0x67446698, 0, 77) + data[100:150], 'a simple reply')
    s.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 7, 78, 0, 4096))
    equal(got(s, 16), struct.pack('>IIQ', 0x67446698, 22, 78), 'no block status')
    s.close()


def a_tls_port_does_nothing_in_the_clear(w):
    w.file('disk', SIZE)
    port, export = farpage(w, 'require')
    s = talk(w, port)
    for option in (3, 6, 7, 8, 9, 10, 11, 77):
        s.sendall(OPT + struct.pack('>II', option, 0 if option not in (6, 7) else 10) +
                  (b'' if option not in (6, 7) else b'\0\0\0\4disk\0\0'))
        equal(kind_of(s, option), 1 << 31 | 5, 'option %d' % option)
    s.sendall(OPT + struct.pack('>II', 2, 0))
    equal(kind_of(s, 2), 1, 'ABORT')
    true(ended(s), 'the end')
    s = talk(w, port)
    s.sendall(OPT + struct.pack('>II', 1, 4) + b'disk')
    true(ended(s), 'the end at EXPORT_NAME')
    for first in (b'\x16\x03\x01\2\0\1\0\1\xfc\3\3' + bytes(64), b'GET / HTTP/1.1\r\n\r\n'):
        s = socket.create_connection(('127.0.0.1', port), 30)  # TLS at once, without a word of NBD
        got(s, 18)
        s.sendall(first)
        true(ended(s), 'the end')
    for n in (0, 1, 5, 50):  # the handshake stops
        s = talk(w, port)
        s.sendall(STARTTLS)
        kind_of(s, 5)
        s.sendall((b'\x16\x03\1\2\0\1\0\1\xfc\3\3' + bytes(64))[:n])
        s.shutdown(socket.SHUT_WR)
        true(ended(s), 'the end of half a handshake')
    true(answers(port), 'the server is gone')


def a_unix_socket_has_tls_too(w):
    """With a key, or with whoever answers where that was asked for: there is no name that a certificate could have."""
    data = w.file('disk', SIZE)
    keys = place().path('psk-shared/keys.psk')
    for creds, query, good in ((['--tls-psk', keys], 'tls-psk-file=' + keys, True),
                               (['--tls-psk', keys], 'tls-psk-file=' + place().path('psk-unshared/keys.psk'), False),
                               (['--tls-psk', keys], 'tls-verify=0', False),
                               (['--tls-cert', place().path('good.pem'), '--tls-key', place().path('good.key')], 'tls-verify=0', True),
                               (['--tls-cert', place().path('good.pem'), '--tls-key', place().path('good.key')],
                                'tls-certificates=' + place().path('dir-bare'), False)):
        s = w.start('serve', 'disk=file:disk', '--listen', 'nbds+unix:///?socket=' + w.path('sock'), *creds)
        s.line()
        uri = 'nbds+unix://%s/disk?socket=%s&%s' % ('alice@' if 'psk' in query else '', w.path('sock'), query)
        r = w.run('copy', uri, 'file:got')
        equal(r.returncode == 0, good, query + ': ' + r.err)
        if good:
            equal(w.read('got'), data, 'content')
            if 'psk' in query:
                equal(call(w, 'nbdinfo', '--size', uri).stdout.strip(), b'%d' % SIZE, 'nbdinfo')
        else:
            message(r.err)
        r = w.run('copy', 'nbd+unix:///disk?socket=' + w.path('sock'), 'null:')
        equal(r.returncode, 1, 'in the clear: ' + r.err)
        s.end()


def cut_in_the_handshake(w, step=611):
    """The link is cut after so many bytes, either way: a clear refusal, and the next one is served."""
    data = w.file('disk', SIZE)
    port, export = farpage(w, 'allow', verify=True)
    whole = Between(port)
    went, said = by_farpage(w, Who(folder='alice'), whole.port, export)
    true(went, said)
    refused = 0
    for way in (0, 1):
        for n in range(1, min(4000, len(whole.seen[way])), step):
            cut = [1 << 40, 1 << 40]
            cut[way] = n
            b = Between(port, cut=cut)
            went, said = by_farpage(w, Who(folder='alice'), b.port, export)
            refused += not went
            if went:
                equal(w.read('got'), data, 'cut after %d' % n)
    true(refused, 'no cut hit anything')
    true(answers(port), 'the server is gone')


def cut_all_over_the_handshake(w):
    cut_in_the_handshake(w, 73)


IN_BETWEEN = [starttls_is_stripped, words_behind_starttls_are_not_taken, what_was_said_in_the_clear_is_forgotten,
              a_tls_port_does_nothing_in_the_clear, a_unix_socket_has_tls_too, cut_in_the_handshake, cut_all_over_the_handshake]


def too_old(w):
    """Below --tls-min nothing goes, and nothing goes in the clear instead."""
    run_cell(w, farpage, by_nbd_client, dict(mode='require', oldest='1.3'), dict(), NO)


def matrix():
    for peer, server, client, role in ([(p, s, by_farpage, 'client') for p, s in SERVERS.items()] +
                                       [(p, farpage, c, 'server') for p, c in CLIENTS.items()]):
        for name, (how, who, wanted) in dict(CONDITIONS, **(UNSAID if client is by_farpage else {})).items():
            if server is nbd_server and name == 'client certificate missing':
                how, who = dict(how), dict(folder='bare')
            def case(w, server=server, client=client, how=how, who=who, wanted=wanted):
                run_cell(w, server, client, how, who, wanted)
            case.__name__ = '%s, farpage as %s: %s is %s' % (peer, role, name, wanted)
            case.quick = peer == 'farpage' or name in QUICK.get(peer, ())
            yield cell(peer + ' with TLS', 'farpage is the ' + role, '%s: %s' % (name, wanted))(case)


# What `make check` has of the others; all of it is in the long one.
QUICK = {
    'nbdkit': ('required', 'off, TLS client', 'wrong CA', 'shared key', 'another key', 'client certificate'),
    'qemu-nbd': ('required', 'expired', 'shared key'),
    'qemu-storage-daemon': ('wrong name', 'client certificate'),
    'nbd-server': ('required', 'off, TLS client', 'wrong CA'),
    'nbdcopy': ('required', 'required, plain client', 'wrong CA', 'client certificate', 'client certificate missing', 'shared key'),
    'nbdinfo': ('off, TLS client', 'expired', 'unknown user'),
    'qemu-img': ('required', 'wrong name', 'shared key'),
    'fio': ('required', 'off, plain client'),
    'nbd-client': ('required', 'required, plain client', 'wrong CA'),
}


if __name__ == '__main__':
    for case in IN_BETWEEN:
        cell('somebody in between', 'farpage is both')(case).quick = case is not cut_all_over_the_handshake
    too_old.__name__, too_old.quick = 'nbd-client, farpage as server: TLS 1.2 where 1.3 is the oldest is refused', True
    every = IN_BETWEEN + list(matrix()) + [cell('nbd-client with TLS', 'farpage is the server')(too_old)]
    if sys.argv[2:] == ['long']:
        del sys.argv[2:]
        main(every)
    quick = [c for c in every if c.quick]
    main(quick if not sys.argv[2:] else every)
