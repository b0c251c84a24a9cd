#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""tls.py FARPAGE [CASE...]: TLS and who may connect, with farpage at both ends, grpcio and libnbd's programs at one."""
import base64
import http.server
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

from cli_lib import FARPAGE, SLACK, Skip, cell, equal, has, main, message, true, wait_for
from tls_lib import certificate, openssl, place

CERT = ['--tls-cert', 's.pem', '--tls-key', 's.key']


def serve(w, *options, listen='grpcs://127.0.0.1:0', sources=('file:data',)):
    s = w.start('serve', *sources, '--listen', listen, *options)
    line = s.line()
    s.port = int(line.split()[1].split('/')[2].rsplit(':', 1)[1]) if 'socket=' not in line else 0
    return s


def uri(s, host='localhost', scheme='grpcs', export='', **options):
    query = '&'.join('%s=%s' % (k.replace('_', '-'), v) for k, v in options.items())
    return '%s://%s:%d/%s%s' % (scheme, host, s.port, export, '?' + query if query else '')


def works(w, where):
    w.run('copy', where, 'file:got', code=0)
    equal(w.read('got'), w.read('data'))


def refused(w, where, *words):
    r = w.run('copy', where, 'null:')
    true(r.returncode == 1, 'exit %d: %s' % (r.returncode, r.err))
    message(r.err)
    has(r.err, *words)


def data(w, size=1 << 20):
    place(w)
    w.file('data', size)


def the_servers_certificate_is_checked(w):
    data(w)
    certificate(w, 'old', 'ca', 'DNS:localhost', days=-1)
    s = serve(w, *CERT, '--read-only')
    works(w, uri(s, tls_ca='ca.pem'))
    works(w, uri(s, '127.0.0.1', tls_ca='ca.pem'))
    refused(w, uri(s, tls_ca='other.pem'), 'unknown authority')
    refused(w, uri(s), 'unknown authority')  # the system's authorities do not know ours
    refused(w, uri(s, tls_ca='ca.pem', tls_name='other.example'), 'for another name', 'localhost')
    refused(w, uri(s, tls_ca='ca.pem', tls_name='127.0.0.2'), 'for another name')
    works(w, uri(s, '127.0.0.1', tls_ca='ca.pem', tls_name='localhost'))
    old = serve(w, '--tls-cert', 'old.pem', '--tls-key', 'old.key', '--read-only')
    has(old.err(), 'has expired')
    refused(w, uri(old, tls_ca='ca.pem'), 'has expired')


def clear_text_and_tls_do_not_meet(w):
    data(w)
    s, plain = serve(w, *CERT, '--read-only'), serve(w, '--read-only', listen='grpc://127.0.0.1:0')
    refused(w, uri(s, scheme='grpc'), 'grpcs://')
    refused(w, uri(plain, tls_ca='ca.pem'), 'speaks no TLS')
    r = w.run('copy', uri(plain, scheme='grpc', tls_ca='ca.pem'), 'null:')
    equal(r.returncode, 2, r.err)
    has(r.err, 'grpcs://')
    r = w.run('serve', 'file:data', '--listen', 'grpcs://127.0.0.1:0')
    equal(r.returncode, 2, r.err)
    has(r.err, '--tls-cert')
    r = w.run('serve', 'file:data', '--listen', 'grpc://0.0.0.0:0')
    has(r.err, '--insecure')
    works(w, uri(s, tls_ca='ca.pem'))  # nobody else was disturbed


def clients_must_show_a_certificate(w):
    data(w)
    certificate(w, 'gone', 'ca', 'DNS:gone.example', days=-1)
    s = serve(w, *CERT, '--tls-ca', 'ca.pem')
    works(w, uri(s, tls_ca='ca.pem', tls_cert='alice.pem', tls_key='alice.key'))
    refused(w, uri(s, tls_ca='ca.pem'), 'wants a certificate')
    wait_for(lambda: "a client's TLS handshake failed: the client has shown no certificate" in s.err(), 'the server tells why')
    refused(w, uri(s, tls_ca='ca.pem', tls_cert='eve.pem', tls_key='eve.key'), 'authority')
    refused(w, uri(s, tls_ca='ca.pem', tls_cert='gone.pem', tls_key='gone.key'), 'expired')
    r = w.run('copy', uri(s, tls_ca='ca.pem', tls_cert='alice.pem', tls_key='bob.key'), 'null:')
    has(r.err, 'does not belong')


def a_unix_socket_has_tls_too(w):
    data(w)
    w.start('serve', 'file:data', '--listen', 'grpcs+unix:///?socket=sock', *CERT).line()
    works(w, 'grpcs+unix:///?socket=sock&tls-ca=ca.pem')
    refused(w, 'grpcs+unix:///?socket=sock&tls-ca=ca.pem&tls-name=x', 'for another name')


def rules_give_rights_to_names(w):
    data(w, 65536)
    w.file('b', 65536, seed=2)
    s = serve(w, *CERT, '--tls-ca', 'ca.pem', '--allow', 'alice.example=ro', '--allow', 'bob=rw:b',
              sources=('file:data', 'b=file:b'))
    alice = dict(tls_ca='ca.pem', tls_cert='alice.pem', tls_key='alice.key')
    bob = dict(tls_ca='ca.pem', tls_cert='bob.pem', tls_key='bob.key')
    works(w, uri(s, **alice))
    r = w.run('copy', 'file:b', uri(s, export='b', **alice))
    true(r.returncode == 1, r.err)
    has(r.err, 'read-only')
    refused(w, uri(s, **bob), 'may not use export')
    w.file('new', 65536, seed=3)
    w.run('copy', 'file:new', uri(s, export='b', **bob), code=0)
    equal(w.read('b'), w.read('new'))
    r = w.run('serve', 'file:data', '--listen', 'grpc://127.0.0.1:0', '--allow', 'x=rw')
    equal(r.returncode, 2, r.err)


def tokens_come_from_a_file(w):
    data(w, 65536)
    with open(w.path('tokens'), 'w') as f:
        f.write('# who: what\nreader:%s\nwriter:%s\n' % ('r' * 20, 'w' * 20))
    for name in 'rwx':
        with open(w.path(name), 'w') as f:
            f.write(name * 20 + '\n')
    s = serve(w, *CERT, '--token-file', 'tokens', '--allow', 'reader=ro', '--allow', 'writer=rw')
    works(w, uri(s, tls_ca='ca.pem', token_file='r'))
    refused(w, uri(s, tls_ca='ca.pem', token_file='x'), 'not one of those')
    refused(w, uri(s, tls_ca='ca.pem'), 'a token is needed')
    r = w.run('copy', 'file:data', uri(s, tls_ca='ca.pem', token_file='r'))
    true(r.returncode == 1, r.err)
    w.run('copy', 'file:data', uri(s, tls_ca='ca.pem', token_file='w'), code=0)
    # Taken out of the file it is worth nothing after the next SIGHUP.
    with open(w.path('tokens'), 'w') as f:
        f.write('writer:%s\n' % ('w' * 20))
    s.p.send_signal(signal.SIGHUP)
    wait_for(lambda: 'read again' in s.err(), 'the reload')
    refused(w, uri(s, tls_ca='ca.pem', token_file='r'), 'not one of those')
    s.end()
    plain = serve(w, '--token-file', 'tokens', listen='grpc://127.0.0.1:0')
    works(w, uri(plain, scheme='grpc', token_file='w'))  # within this host
    plain.end()
    r = w.run('serve', 'file:data', '--listen', 'grpc://0.0.0.0:0', '--token-file', 'tokens', '--insecure')
    equal(r.returncode, 1, 'tokens in the clear: ' + r.err)


class Calls(threading.Thread):
    """Calls without a pause by grpcio until told to stop; `failed` keeps the first that was."""

    def __init__(self, target, credentials):
        super().__init__(daemon=True)
        import grpc
        self.grpc = grpc
        self.channel = grpc.secure_channel(target, credentials)
        self.read = self.channel.unary_unary('/com.pojtinger.felicitas.r3map.mount.v1.Backend/ReadAt')
        self.n, self.failed, self.over = 0, None, False

    def run(self):
        while not self.over and not self.failed:
            try:
                self.read(b'\x08\x80\x20', timeout=30)  # 4096 bytes from 0
                self.n += 1
            except self.grpc.RpcError as e:
                self.failed = e


def need_grpcio():
    try:
        import grpc  # noqa: F401
    except ImportError:
        raise Skip('python3-grpcio is not installed')


def certificates_are_read_again_under_load(w):
    need_grpcio()
    data(w)
    certificate(w, 'next', 'other', 'DNS:localhost')
    s = serve(w, *CERT)
    import grpc
    calls = [Calls('localhost:%d' % s.port, grpc.ssl_channel_credentials(w.read('ca.pem'))) for _ in range(2)]
    for c in calls:
        c.start()
    wait_for(lambda: all(c.n > 20 or c.failed for c in calls), 'the first calls')
    with open(w.path('s.pem'), 'wb') as f:
        f.write(b'no certificate\n')
    s.p.send_signal(signal.SIGHUP)
    wait_for(lambda: 'stays as it was' in s.err(), 'the refusal of a bad file')
    works(w, uri(s, tls_ca='ca.pem'))
    shutil.copy(w.path('next.key'), w.path('s.key'))
    shutil.copy(w.path('next.pem'), w.path('s.pem'))
    s.p.send_signal(signal.SIGHUP)
    wait_for(lambda: 'were read again' in s.err(), 'the new certificate')
    refused(w, uri(s, tls_ca='ca.pem'), 'unknown authority')
    works(w, uri(s, tls_ca='other.pem'))
    before = [c.n for c in calls]
    wait_for(lambda: all(c.failed or c.n > b + 20 for c, b in zip(calls, before)), 'calls after the reload')
    for c in calls:
        c.over = True
        c.join(30)
        true(c.failed is None, 'a call was dropped: %r' % c.failed)


def grpcio_sees_the_right_status(w):
    need_grpcio()
    import grpc
    data(w, 65536)
    with open(w.path('tokens'), 'w') as f:
        f.write('reader:%s\n' % ('r' * 20))
    s = serve(w, *CERT, '--token-file', 'tokens', '--allow', 'reader=ro')
    with grpc.secure_channel('localhost:%d' % s.port, grpc.ssl_channel_credentials(w.read('ca.pem'))) as channel:
        read = channel.unary_unary('/com.pojtinger.felicitas.r3map.mount.v1.Backend/ReadAt')
        write = channel.unary_unary('/com.pojtinger.felicitas.r3map.mount.v1.Backend/WriteAt')
        good = [('authorization', 'Bearer ' + 'r' * 20)]
        got = read(b'\x08\x10', metadata=good, timeout=30)
        equal(got[-16:], w.read('data')[:16])

        def status(call, request, metadata=None):
            try:
                call(request, metadata=metadata, timeout=30)
            except grpc.RpcError as e:
                return e.code()
            return grpc.StatusCode.OK
        equal(status(read, b'\x08\x10'), grpc.StatusCode.UNAUTHENTICATED)
        equal(status(read, b'\x08\x10', [('authorization', 'Bearer ' + 'x' * 20)]), grpc.StatusCode.UNAUTHENTICATED)
        equal(status(read, b'\x08\x10', [('authorization', 'Basic eDp5')]), grpc.StatusCode.UNAUTHENTICATED)
        equal(status(write, b'\x12\x01a', good), grpc.StatusCode.PERMISSION_DENIED)
        equal(status(read, b'\x08\x10', good), grpc.StatusCode.OK)
    equal(w.read('data')[:1], w.file('same', 65536)[:1])


class Issuer:
    """An OpenID Connect issuer on https://localhost: a discovery document, a set of keys, and a count of questions."""

    def __init__(self, w, cert='s'):
        self.w, self.keys, self.asked = w, [], 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body = None
                if self.path == '/.well-known/openid-configuration':
                    body = {'issuer': outer.url, 'jwks_uri': outer.url + '/keys'}
                elif self.path == '/keys':
                    outer.asked += 1
                    body = {'keys': outer.keys}
                self.send_response(200 if body else 404)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *args):
                pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(w.path(cert + '.pem'), w.path(cert + '.key'))
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = 'https://localhost:%d' % self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def b64(b):
    return base64.urlsafe_b64encode(b).rstrip(b'=').decode()


def key(w, kid):
    """An Ed25519 key KID.sign; its public half as a JWK."""
    openssl(w, 'genpkey', '-algorithm', 'ed25519', '-out', kid + '.sign')
    openssl(w, 'pkey', '-in', kid + '.sign', '-pubout', '-outform', 'DER', '-out', kid + '.pub')
    return {'kty': 'OKP', 'crv': 'Ed25519', 'use': 'sig', 'kid': kid, 'x': b64(w.read(kid + '.pub')[-32:])}


def token(w, kid, header=None, **claims):
    head = b64(json.dumps(dict({'alg': 'EdDSA', 'kid': kid}, **(header or {}))).encode())
    body = b64(json.dumps(claims).encode())
    with open(w.path('to-sign'), 'w') as f:
        f.write(head + '.' + body)
    openssl(w, 'pkeyutl', '-sign', '-inkey', kid + '.sign', '-rawin', '-in', 'to-sign', '-out', 'signature')
    return head + '.' + body + '.' + b64(w.read('signature'))


def bearer(w, s, text):
    with open(w.path('token'), 'w') as f:
        f.write(text + '\n')
    return uri(s, tls_ca='ca.pem', token_file='token')


def an_issuers_keys_are_fetched_kept_and_rotated(w):
    data(w, 65536)
    issuer = Issuer(w)
    issuer.keys = [key(w, 'one')]
    try:
        s = serve(w, *CERT, '--oidc-issuer', issuer.url, '--oidc-ca', 'ca.pem', '--audience', 'farpage', '--allow', 'me=ro')
        now = int(time.time())
        claims = dict(iss=issuer.url, aud='farpage', sub='me', exp=now + 600)
        works(w, bearer(w, s, token(w, 'one', **claims)))
        works(w, bearer(w, s, token(w, 'one', **dict(claims, aud=['x', 'farpage']))))
        equal(issuer.asked, 1, 'the keys were not kept')
        refused(w, bearer(w, s, token(w, 'one', **dict(claims, exp=now - 120))), 'expired')
        works(w, bearer(w, s, token(w, 'one', **dict(claims, exp=now - 20))))  # within the skew
        refused(w, bearer(w, s, token(w, 'one', **dict(claims, nbf=now + 600))), 'not good yet')
        refused(w, bearer(w, s, token(w, 'one', **dict(claims, iss='https://other'))), 'another issuer')
        refused(w, bearer(w, s, token(w, 'one', **dict(claims, aud='other'))), 'somebody else')
        refused(w, bearer(w, s, token(w, 'one', **dict(claims, sub='you'))), 'may not use')
        refused(w, bearer(w, s, token(w, 'one', {'alg': 'none'}, **claims)), 'not accepted')
        refused(w, bearer(w, s, token(w, 'one', {'alg': 'HS256'}, **claims)), 'not accepted')
        refused(w, bearer(w, s, token(w, 'one', {'alg': 'RS256'}, **claims)), 'another algorithm')
        good = token(w, 'one', **claims)
        refused(w, bearer(w, s, good[:-6] + ('AAAAAA' if good[-6:] != 'AAAAAA' else 'BBBBBB')[:5] + 'A'), 'signature')
        equal(issuer.asked, 1)
        # A new key: fetched when a token names it, but not more often than every 5 s whoever asks.
        issuer.keys.append(key(w, 'two'))
        fresh = bearer(w, s, token(w, 'two', **claims))
        wait_for(lambda: w.run('copy', fresh, 'null:').returncode == 0, 'the new key', 30)
        asked = issuer.asked
        key(w, 'three')
        for _ in range(5):
            refused(w, bearer(w, s, token(w, 'three', **claims)), 'key')
        true(issuer.asked <= asked + 1, 'the issuer was asked %d times' % (issuer.asked - asked))
    finally:
        issuer.close()
    works(w, bearer(w, s, token(w, 'one', **claims)))  # it need not be there


def an_issuer_with_a_wrong_certificate_is_not_believed(w):
    data(w, 65536)
    certificate(w, 'fake', 'other', 'DNS:localhost')
    issuer = Issuer(w, 'fake')
    issuer.keys = [key(w, 'one')]
    try:
        s = serve(w, *CERT, '--oidc-issuer', issuer.url, '--oidc-ca', 'ca.pem', '--audience', 'farpage')
        claims = dict(iss=issuer.url, aud='farpage', sub='me', exp=int(time.time()) + 600)
        refused(w, bearer(w, s, token(w, 'one', **claims)), 'certificate')
        equal(issuer.asked, 0)
    finally:
        issuer.close()
    r = w.run('serve', 'file:data', '--listen', 'grpcs://127.0.0.1:0', *CERT, '--oidc-issuer', 'http://localhost', '--audience',
              'x')
    equal(r.returncode, 2, r.err)


def a_set_of_keys_comes_from_a_file(w):
    data(w, 65536)
    with open(w.path('keys'), 'w') as f:
        json.dump({'keys': [key(w, 'one')]}, f)
    s = serve(w, *CERT, '--jwks-file', 'keys', '--issuer', 'us', '--audience', 'farpage')
    claims = dict(iss='us', aud='farpage', sub='me', exp=int(time.time()) + 600)
    works(w, bearer(w, s, token(w, 'one', **claims)))
    refused(w, bearer(w, s, token(w, 'one', **dict(claims, iss='them'))), 'another issuer')
    with open(w.path('keys'), 'w') as f:
        json.dump({'keys': [key(w, 'two')]}, f)
    s.p.send_signal(signal.SIGHUP)
    wait_for(lambda: 'read again' in s.err(), 'the reload')
    refused(w, bearer(w, s, token(w, 'one', **claims)), 'not in the set')
    works(w, bearer(w, s, token(w, 'two', **claims)))


def nbdinfo(w, where):
    if not shutil.which('nbdinfo'):
        raise Skip('libnbd-bin is not installed')
    return subprocess.run(['nbdinfo', where], cwd=w.dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)


def nbd_has_certificates_and_shared_keys(w):
    data(w)
    secret = os.urandom(32).hex()
    for name, text in ('keys', 'alice:%s\n' % secret), ('wrong', 'alice:%s\n' % os.urandom(32).hex()), ('mallory', 'mallory:' + secret):
        with open(w.path(name), 'w') as f:
            f.write(text)
    for folder, files in (('ours', {'ca-cert': 'ca.pem', 'client-cert': 'alice.pem', 'client-key': 'alice.key'}),
                          ('bare', {'ca-cert': 'ca.pem'}), ('foreign', {'ca-cert': 'other.pem'})):
        os.mkdir(w.path(folder))
        for to, of in files.items():
            shutil.copy(w.path(of), w.path(folder + '/' + to + '.pem'))
    need, may, psk = (serve(w, *CERT, '--tls-ca', 'ca.pem', '--read-only', listen='nbds://127.0.0.1:0'),
                      serve(w, *CERT, '--read-only', listen='nbd://127.0.0.1:0'),
                      serve(w, '--tls-psk', 'keys', '--read-only', listen='nbds://127.0.0.1:0'))

    def tls(s, folder, host='localhost'):
        return nbdinfo(w, 'nbds://%s:%d/?tls-certificates=%s' % (host, s.port, w.path(folder)))

    def shared(s, who, file):
        return nbdinfo(w, 'nbds://%s@localhost:%d/?tls-psk-file=%s' % (who, s.port, w.path(file)))
    r = tls(need, 'ours')
    equal(r.returncode, 0, r.stdout)
    has(r.stdout, 'with TLS', '1048576')
    for r in tls(need, 'bare'), tls(need, 'foreign'), nbdinfo(w, 'nbd://localhost:%d' % need.port), tls(may, 'foreign'):
        true(r.returncode != 0, r.stdout)
    for r in tls(may, 'bare'), nbdinfo(w, 'nbd://localhost:%d' % may.port), shared(psk, 'alice', 'keys'):
        equal(r.returncode, 0, r.stdout)
    for r in shared(psk, 'alice', 'wrong'), shared(psk, 'mallory', 'mallory'), nbdinfo(w, 'nbd://localhost:%d' % psk.port):
        true(r.returncode != 0, r.stdout)
    both = serve(w, *CERT, '--tls-ca', 'ca.pem', '--tls-psk', 'keys', '--allow', 'alice=ro', listen='nbds://127.0.0.1:0',
                 sources=('mem:1M',))
    for r in tls(both, 'ours'), shared(both, 'alice', 'keys'):
        has(r.stdout, 'is_read_only: true')


def commands_are_run_and_ended(w):
    data(w)
    farpage = FARPAGE
    where = 'exec:echo $$ >>pids; exec %s serve file:data --listen stdio:' % farpage
    works(w, where)
    w.file('new', 1 << 20, seed=9)
    w.run('copy', 'file:new', where, code=0)
    equal(w.read('data'), w.read('new'))
    pids = [int(x) for x in w.read('pids').split()]
    equal(len(pids), 2)
    for pid in pids:
        true(not os.path.exists('/proc/%d' % pid), 'process %d is left over' % pid)
    works(w, 'exec:cat | %s serve file:data --listen stdio: | cat' % farpage)  # pipes
    refused(w, 'exec:exit 3', 'exit code 3')
    began = time.monotonic()
    refused(w, 'exec:trap "" TERM; exec >/dev/null <&1; sleep 600 & wait')
    true(time.monotonic() - began < 20, 'a command that does not end was waited for')


def a_lost_command_is_run_again(w):
    data(w, 8 << 20)
    where = 'exec:echo $$ >>pids; exec %s serve file:data --listen stdio: --layer delay:rtt=1ms' % FARPAGE
    m = w.mount(where, w.path('none'), '--mode', 'direct', '--quiet')
    path = m.path
    with open(path, 'rb') as f:
        equal(f.read(4096), w.read('data')[:4096])
        first = int(w.read('pids').split()[0])
        os.kill(first, signal.SIGKILL)
        f.seek(4 << 20)
        equal(f.read(65536), w.read('data')[4 << 20:(4 << 20) + 65536])
    true(len(w.read('pids').split()) >= 2, 'nothing was run again')
    equal(m.end(), 0, m.err())


class Terminator(threading.Thread):
    """TLS of one version in front of a server in the clear: a peer that is older than ours, or that lies."""

    def __init__(self, w, port, version):
        super().__init__(daemon=True)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = self.context.maximum_version = version
        self.context.set_alpn_protocols(['h2'])
        self.context.load_cert_chain(w.path('s.pem'), w.path('s.key'))
        self.to, self.listener = port, socket.create_server(('127.0.0.1', 0))
        self.port, self.versions = self.listener.getsockname()[1], []
        self.start()

    def run(self):
        while True:
            try:
                c, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.one, args=(c,), daemon=True).start()

    def one(self, c):
        try:
            c = self.context.wrap_socket(c, server_side=True)
            self.versions.append(c.version())
        except (OSError, ssl.SSLError):
            return
        s = socket.create_connection(('127.0.0.1', self.to))
        # One thread: an SSL object is not for two.
        c.settimeout(0)
        try:
            while True:
                select.select([c, s], [], [], 1)
                try:
                    data = c.recv(65536)
                    if not data:
                        return
                    s.sendall(data)
                except ssl.SSLWantReadError:
                    pass
                if select.select([s], [], [], 0)[0]:
                    data = s.recv(65536)
                    if not data:
                        return
                    c.settimeout(30)
                    c.sendall(data)
                    c.settimeout(0)
        except OSError:
            pass
        finally:
            c.close()
            s.close()


def versions_of_tls(w):
    """1.3 inward, and 1.2 only where it was asked for, outward too."""
    data(w)
    old = ssl.create_default_context(cafile=w.path('ca.pem'))
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    def shake(s):
        with socket.create_connection(('127.0.0.1', s.port), 30) as c:
            with old.wrap_socket(c, server_hostname='localhost') as t:
                return t.version()
    s = serve(w, *CERT, '--read-only')
    try:
        raise AssertionError('the server took ' + shake(s))
    except ssl.SSLError as e:
        true('version' in str(e).lower(), str(e))  # it says why
    works(w, uri(s, tls_ca='ca.pem'))
    equal(shake(serve(w, *CERT, '--tls-min', '1.2', '--read-only')), 'TLSv1.2')
    plain = serve(w, '--read-only', listen='grpc://127.0.0.1:0')
    front = Terminator(w, plain.port, ssl.TLSVersion.TLSv1_2)
    refused(w, uri(front, tls_ca='ca.pem'), 'version')
    equal(front.versions, [], 'handshakes')
    works(w, uri(front, tls_ca='ca.pem', tls_min='1.2'))
    true(front.versions and set(front.versions) == {'TLSv1.2'}, front.versions)
    refused(w, uri(front, tls_ca='other.pem', tls_min='1.2'), 'authority')  # checked as strictly
    newer = Terminator(w, plain.port, ssl.TLSVersion.TLSv1_3)
    works(w, uri(newer, tls_ca='ca.pem', tls_min='1.2'))
    equal(set(newer.versions), {'TLSv1.3'}, 'the newest that both know')


def calls_in_flight_outlive_a_reload(w):
    need_grpcio()
    import grpc
    data(w)
    certificate(w, 'next', 'other', 'DNS:localhost')
    with open(w.path('tokens'), 'w') as f:
        f.write('a:%s\n' % ('r' * 20))
    s = serve(w, *CERT, '--tls-ca', 'ca.pem', '--token-file', 'tokens', '--layer', 'delay:rtt=1s')
    credentials = grpc.ssl_channel_credentials(w.read('ca.pem'), w.read('alice.key'), w.read('alice.pem'))
    with grpc.secure_channel('localhost:%d' % s.port, credentials) as channel:
        read = channel.unary_unary('/com.pojtinger.felicitas.r3map.mount.v1.Backend/ReadAt')
        good = [('authorization', 'Bearer ' + 'r' * 20)]
        read(b'\x08\x10', metadata=good, timeout=30)
        calls = [read.future(b'\x08\x10', metadata=good, timeout=30) for _ in range(8)]
        # Requests are begun in their order: when this one is refused, those before it wait for the store.
        try:
            read(b'\x08\x10', metadata=good + [('farpage-export', 'none')], timeout=30)
        except grpc.RpcError as e:
            equal(e.code(), grpc.StatusCode.NOT_FOUND)
        true(not any(f.done() for f in calls), 'they do not take long enough')
        for name in 's.key', 's.pem':
            shutil.copy(w.path('next' + name[1:]), w.path(name))
        shutil.copy(w.path('other.pem'), w.path('ca.pem.new'))
        os.rename(w.path('ca.pem.new'), w.path('ca.pem'))
        with open(w.path('tokens'), 'w') as f:
            f.write('b:%s\n' % ('s' * 20))
        s.p.send_signal(signal.SIGHUP)
        wait_for(lambda: 'read again' in s.err(), 'the reload')
        true(not all(f.done() for f in calls), 'all had ended before the reload')
        for f in calls:
            equal(f.result()[-16:], w.read('data')[:16])
        # The connection is as it was, the token is not.
        try:
            read(b'\x08\x10', metadata=good, timeout=30)
            raise AssertionError('a token that was taken away was taken')
        except grpc.RpcError as e:
            equal(e.code(), grpc.StatusCode.UNAUTHENTICATED)
        read(b'\x08\x10', metadata=[('authorization', 'Bearer ' + 's' * 20)], timeout=30)


def rules_give_rights_over_nbd(w):
    data(w, 65536)
    w.file('b', 65536, seed=2)
    s = serve(w, *CERT, '--tls-ca', 'ca.pem', '--allow', 'alice.example=ro', '--allow', 'bob=rw:b',
              sources=('file:data', 'b=file:b'), listen='nbds://127.0.0.1:0')
    for who in 'alice', 'bob', 'eve':
        os.mkdir(w.path('as-' + who))
        for to, of in ('ca-cert', 'ca.pem'), ('client-cert', who + '.pem'), ('client-key', who + '.key'):
            shutil.copy(w.path(of), w.path('as-%s/%s.pem' % (who, to)))

    def to(who, export=''):
        return uri(s, scheme='nbds', export=export, tls_certificates=w.path('as-' + who))
    works(w, to('alice'))
    equal(w.run('copy', 'file:b', to('alice', 'b')).returncode, 1, 'alice writes')
    w.file('new', 65536, seed=3)
    w.run('copy', 'file:new', to('bob', 'b'), code=0)
    equal(w.read('b'), w.read('new'))
    refused(w, to('bob'))
    refused(w, to('eve', 'b'))
    equal(w.read('b'), w.read('new'))


def an_issuer_that_lies_is_not_believed(w):
    """Whatever it answers costs the call that asked, soon, and nobody else."""
    data(w, 65536)
    honest = key(w, 'one')
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answers['do'](self)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(w.path('s.pem'), w.path('s.key'))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = 'https://localhost:%d' % server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    in_the_clear = http.server.ThreadingHTTPServer(('127.0.0.1', 0), type('Clear', (Handler,), {
        'do_GET': lambda self: (asked.append(self.path), say(self, json.dumps({'keys': [honest]})))}))
    threading.Thread(target=in_the_clear.serve_forever, daemon=True).start()
    asked, over = [], threading.Event()

    def say(h, body, status=200, **headers):
        h.send_response(status)
        for k, v in headers.items():
            h.send_header(k, v)
        h.end_headers()
        try:
            for piece in [body] if isinstance(body, str) else body:
                h.wfile.write(piece.encode() if isinstance(piece, str) else piece)
        except OSError:
            pass

    def discovery(**more):
        return json.dumps(dict({'issuer': url, 'jwks_uri': url + '/keys'}, **more))

    def then(keys):
        return lambda h: say(h, discovery()) if 'well-known' in h.path else keys(h)
    clear = 'http://127.0.0.1:%d/keys' % in_the_clear.server_port
    endless = (b'x' * 65536 for _ in iter(lambda: not over.is_set(), False))
    rows = [
        ('keys in the clear', lambda h: say(h, discovery(jwks_uri=clear)), 'https://'),
        ('keys of a file', lambda h: say(h, discovery(jwks_uri='file://' + w.path('keys'))), 'https://'),
        ('another issuer', lambda h: say(h, discovery(issuer=url + '/other')), 'another issuer'),
        ('no document', lambda h: say(h, '[1, 2'), 'another issuer'),
        ('a document without keys', lambda h: say(h, json.dumps({'issuer': url})), 'https://'),
        ('another place for the document', lambda h: say(h, '', 302, Location=clear), '302'),
        ('another place for the keys', then(lambda h: say(h, '', 307, Location=clear)), '307'),
        ('an error', lambda h: say(h, 'x', 500), '500'),
        ('keys that are none', then(lambda h: say(h, json.dumps({'keys': 'x' * 1000}))), ''),
        ('keys without end', then(lambda h: say(h, endless)), 'longer'),
        ('a document without end', lambda h: say(h, (b' ' * 65536 for _ in iter(lambda: over.is_set(), True))), 'longer'),
        ('deep as a well', lambda h: say(h, '[' * 100000), 'another issuer'),
    ]
    try:
        claims = dict(iss=url, aud='farpage', sub='me', exp=int(time.time()) + 600)
        good = token(w, 'one', **claims)
        for name, do, word in rows:
            answers['do'] = do
            s = serve(w, *CERT, '--oidc-issuer', url, '--oidc-ca', 'ca.pem', '--audience', 'farpage')
            before = rss(s)
            began = time.monotonic()
            refused(w, bearer(w, s, good), word)
            true(time.monotonic() - began < 20, '%s: %.1f s' % (name, time.monotonic() - began))
            true(rss(s) - before < 60 * SLACK, '%s: grown by %d MiB' % (name, rss(s) - before))
            equal(asked, [], 'questions in the clear: ' + name)
            s.end()
        # One that hangs keeps nobody waiting who does not ask it.
        answers['do'] = then(lambda h: say(h, json.dumps({'keys': [honest]})))
        s = serve(w, *CERT, '--oidc-issuer', url, '--oidc-ca', 'ca.pem', '--audience', 'farpage')
        where = bearer(w, s, good)
        works(w, where)
        began = time.monotonic()
        answers['do'] = lambda h: over.wait(60)
        wait_for(lambda: time.monotonic() - began > 5.5, 'the pause between two questions')
        key(w, 'two')
        with open(w.path('token2'), 'w') as f:
            f.write(token(w, 'two', **claims) + '\n')
        slow = w.start('copy', uri(s, tls_ca='ca.pem', token_file='token2'), 'null:')
        began = time.monotonic()
        works(w, where)
        works(w, where)
        true(slow.p.poll() is None or time.monotonic() - began < 4, 'a known key waited for the issuer')
        equal(slow.p.wait(60), 1, 'an unknown key')
        has(slow.err(), 'fetched')
    finally:
        over.set()
        server.shutdown()
        in_the_clear.shutdown()
        server.server_close()
        in_the_clear.server_close()


def rss(s):
    with open('/proc/%d/status' % s.p.pid) as f:
        return next(int(x.split()[1]) for x in f if x.startswith('VmRSS')) / 1024


def nothing_listens_beyond_loopback_in_the_clear(w):
    data(w, 65536)
    with open(w.path('keys'), 'w') as f:
        f.write('alice:%s\n' % ('ab' * 32))
    with open(w.path('tokens'), 'w') as f:
        f.write('a:%s\n' % ('r' * 20))
    clear = ['%s://%s:0' % (scheme, host) for scheme in ('grpc', 'nbd', 'any') for host in ('0.0.0.0', '[::]', '')]
    for listen in clear:
        # Certificates do not help where they are not needed to come in.
        for more in [], CERT, CERT + ['--tls-ca', 'ca.pem']:
            r = w.run('serve', 'file:data', '--listen', listen, *more)
            true(r.returncode in (1, 2), '%s %s listened' % (listen, more))
            has(r.err, '--insecure')
        if '::' not in listen:
            serve(w, '--insecure', listen=listen).end()
    serve(w, *CERT, listen='grpcs://0.0.0.0:0').end()
    serve(w, '--tls-psk', 'keys', listen='nbds://0.0.0.0:0').end()
    for listen in 'grpc://0.0.0.0:0', 'any://0.0.0.0:0', 'nbd://0.0.0.0:0', 'nbds://127.0.0.1:0':
        r = w.run('serve', 'file:data', '--listen', listen, '--token-file', 'tokens', '--insecure', *CERT)
        true(r.returncode in (1, 2), 'tokens on ' + listen)
    # A socket that somebody else has opened is held to the same.
    for host, ok in ('0.0.0.0', False), ('127.0.0.1', True):
        with socket.create_server((host, 0)) as given:
            script = ('import os,sys\nos.dup2(%d,3);os.set_inheritable(3,True)\n'
                      'os.environ.update(LISTEN_PID=str(os.getpid()),LISTEN_FDS="1",LISTEN_FDNAMES="grpc")\n'
                      'os.execv(sys.argv[1],sys.argv[1:])' % given.fileno())
            p = subprocess.Popen([sys.executable, '-c', script, FARPAGE, 'serve', 'file:data'], cwd=w.dir, text=True,
                                 pass_fds=[given.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                if ok:
                    has(p.stdout.readline(), 'listening')
                else:
                    has(p.communicate(timeout=60)[1], '--insecure')
                    true(p.returncode in (1, 2), 'exit %d' % p.returncode)
            finally:
                p.kill()
                p.communicate()


class Stripper(threading.Thread):
    """An NBD server that has no TLS, or has lost it on the way: STARTTLS is answered with `answer`, all else is there."""

    def __init__(self, answer):
        super().__init__(daemon=True)
        self.answer, self.listener, self.options = answer, socket.create_server(('127.0.0.1', 0)), []
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            try:
                c, _ = self.listener.accept()
                with c:
                    self.one(c)
            except (struct.error, ConnectionError):
                pass
            except OSError:
                return

    def one(self, c):
        c.settimeout(30)
        c.sendall(b'NBDMAGICIHAVEOPT\0\3')
        c.recv(4, socket.MSG_WAITALL)
        while True:
            _, option, n = struct.unpack('>QII', c.recv(16, socket.MSG_WAITALL))
            if n:
                c.recv(n, socket.MSG_WAITALL)
            self.options.append(option)
            reply = struct.pack('>QI', 0x3e889045565a9, option)
            if option == 5 and self.answer:
                c.sendall(reply + struct.pack('>II', self.answer, 0))
            elif option == 5:
                c.sendall(reply + struct.pack('>II', 1, 0))
                return  # says yes, and then nothing
            elif option == 7:
                c.sendall(reply + struct.pack('>IIHQH', 3, 12, 0, 1 << 20, 3) + reply + struct.pack('>II', 1, 0))
            else:
                c.sendall(reply + struct.pack('>II', 0x80000001, 0))


def no_tls_is_not_replaced_by_none(w):
    data(w)
    os.mkdir(w.path('bare'))
    shutil.copy(w.path('ca.pem'), w.path('bare/ca-cert.pem'))
    for answer in 0x80000001, 0x80000002, 0x80000003, 0:
        s = Stripper(answer)
        refused(w, uri(s, scheme='nbds', tls_certificates=w.path('bare')))
        true(5 in s.options and not set(s.options) & {1, 6, 7}, 'it went on in the clear: %r' % s.options)
        s.listener.close()
    # grpcs:// says its first word under TLS, or none.
    heard = []
    with socket.create_server(('127.0.0.1', 0)) as trap:
        def listen():
            try:
                c, _ = trap.accept()
                heard.append(c.recv(3, socket.MSG_WAITALL))
                c.sendall(b'\0\0\0\4\0\0\0\0\0')
                heard.append(c.recv(65536))
                c.close()
            except OSError:
                pass
        threading.Thread(target=listen, daemon=True).start()
        refused(w, 'grpcs://localhost:%d/?tls-ca=ca.pem' % trap.getsockname()[1], 'TLS')
    equal(heard[0][:2], b'\x16\x03', 'the first bytes')
    true(not any(b'PRI * HTTP' in x for x in heard), 'HTTP/2 in the clear')


def one_listener_carries_all(w):
    """gRPC and NBD, in the clear and over TLS, on one port."""
    data(w)
    os.mkdir(w.path('bare'))
    shutil.copy(w.path('ca.pem'), w.path('bare/ca-cert.pem'))
    s = serve(w, *CERT, '--read-only', listen='any://127.0.0.1:0')
    for where in (uri(s, scheme='grpc'), uri(s, tls_ca='ca.pem'), uri(s, scheme='nbd'),
                  uri(s, scheme='nbds', tls_certificates=w.path('bare'))):
        works(w, where)
    refused(w, uri(s, tls_ca='other.pem'), 'authority')
    bare = serve(w, '--read-only', listen='any://127.0.0.1:0')
    works(w, uri(bare, scheme='grpc'))
    works(w, uri(bare, scheme='nbd'))
    refused(w, uri(bare, tls_ca='ca.pem'))
    refused(w, uri(bare, scheme='nbds', tls_certificates=w.path('bare')))
    equal(s.end(), 0, 'exit code')


def nbd_on_standard_input_and_output(w):
    data(w, 65536)
    p = subprocess.Popen([FARPAGE, 'serve', 'file:data', '--listen', 'nbd+stdio:'], cwd=w.dir, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)

    def request(kind, off, n, payload=b''):
        p.stdin.write(struct.pack('>IHHQQI', 0x25609513, 0, kind, 7, off, n) + payload)
        p.stdin.flush()
        if kind != 2:
            equal(p.stdout.read(16), struct.pack('>IIQ', 0x67446698, 0, 7), 'reply')
    try:
        equal(p.stdout.read(18), b'NBDMAGICIHAVEOPT\0\3', 'greeting')
        p.stdin.write(struct.pack('>I', 3) + struct.pack('>QII', 0x49484156454f5054, 1, 0))
        p.stdin.flush()
        equal(struct.unpack('>QH', p.stdout.read(10))[0], 65536, 'size')
        request(0, 0, 65536)
        equal(p.stdout.read(65536), w.read('data'), 'data')
        request(1, 8192, 4096, b'q' * 4096)
        request(3, 0, 0)
        equal(w.read('data')[8192:12288], b'q' * 4096)
        request(2, 0, 0)
        equal(p.wait(60), 0, 'exit code')
    finally:
        p.kill()
        p.communicate()


def a_program_starts_its_server(w):
    """nbdcopy [ COMMAND ] passes a socket as systemd does."""
    if not shutil.which('nbdcopy'):
        raise Skip('libnbd-bin is not installed')
    data(w, 65536)
    r = subprocess.run(['nbdcopy', '--', '[', FARPAGE, 'serve', 'file:data', '--read-only', ']', 'got'], cwd=w.dir, text=True,
                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    equal(r.returncode, 0, r.stdout)
    equal(w.read('got'), w.read('data'))


def examples(page, word):
    """The commands of a manual page, or of README.md, that have a word in them; a line that ends in a backslash goes on."""
    top = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..')
    with open(os.path.join(top, page)) as f:
        text = f.read().replace('\\e\n', '').replace('\\en', '\\n').replace('\t', ' ').replace('.Dl $', '$')
    lines = [x.strip() for x in text.splitlines()]
    return [x.lstrip('$ ') for x in lines if x.startswith(('$ ', 'farpage ')) and word in x]


def the_manuals_examples_run(w):
    place(w)
    for name in ('x.db', 'disk.img', 'a.img', 'b.img'):
        w.file(name, 65536)
    shutil.copy(w.path('ca.pem'), w.path('clients.pem'))
    with open(w.path('keys.json'), 'w') as f:
        json.dump({'keys': [key(w, 'one')]}, f)
    made = examples('doc/man/farpage-serve.1', 'openssl')
    equal(len(made), 3, 'examples with openssl')
    for command in made:
        subprocess.run(command.replace('s.key', 'own.key').replace('s.pem', 'own.pem'), shell=True, cwd=w.dir, check=True,
                       stderr=subprocess.DEVNULL)
    seen = set()
    commands = [x for x in examples('doc/man/farpage-serve.1', 'farpage serve') if '--tls' in x]
    true(len(commands) >= 7, commands)
    for command in commands + [x for x in examples('README.md', 'farpage serve') if '--tls' in x]:
        args = shlex.split(re.sub(r':(1337|10809)\b', ':0', command))[1:]
        s = w.start(*args)
        has(s.line(), 'listening ')
        equal(s.end(), 0, command + ': ' + s.err())
        seen |= {x for x in args if x.startswith('--')}
    missing = {x for x in re.findall(r'--[a-z-]+', w.run('serve', '--help').out)
               if re.match('--(tls-(cert|key|ca|psk)|allow|token|jwks|oidc-issuer|issuer|audience)', x)} - seen
    equal(missing, set(), 'options without an example')
    # The clients' half, at a server each.
    with open(w.path('tokens')) as f:
        token = f.readline().split(':')[1]
    with open(w.path('token'), 'w') as f:
        f.write(token)
    servers = {'token-file': serve(w, *CERT, '--token-file', 'tokens', sources=('file:x.db',)),
               'tls-cert': serve(w, *CERT, '--tls-ca', 'ca.pem', sources=('file:disk.img',)),
               'tls-psk-file': serve(w, '--tls-psk', 'keys.psk', listen='nbds://127.0.0.1:0', sources=('mem:1M', 'disk=mem:2M'))}
    run = 0
    for page in 'doc/man/farpage.1', 'README.md':
        for command in examples(page, 'hosta'):
            which = [k for k in servers if k in command]
            if 'serve' in command or not which:
                continue
            run += 1
            args = shlex.split(re.sub(r'hosta(:1337)?/', 'localhost:%d/' % servers[which[0]].port, command))[1:]
            if args[0] == 'mount':
                args = ['info'] + args[1:-1]  # FUSE may not be there, and is not what this is about
            w.run(*args, code=0)
    true(run >= 4, '%d examples of clients' % run)


CASES = [the_servers_certificate_is_checked, clear_text_and_tls_do_not_meet, clients_must_show_a_certificate,
         a_unix_socket_has_tls_too, rules_give_rights_to_names, tokens_come_from_a_file,
         certificates_are_read_again_under_load, grpcio_sees_the_right_status, an_issuers_keys_are_fetched_kept_and_rotated,
         an_issuer_with_a_wrong_certificate_is_not_believed, a_set_of_keys_comes_from_a_file,
         nbd_has_certificates_and_shared_keys, commands_are_run_and_ended, a_lost_command_is_run_again,
         versions_of_tls, calls_in_flight_outlive_a_reload, rules_give_rights_over_nbd, an_issuer_that_lies_is_not_believed,
         nothing_listens_beyond_loopback_in_the_clear, no_tls_is_not_replaced_by_none, one_listener_carries_all,
         nbd_on_standard_input_and_output, a_program_starts_its_server,
         the_manuals_examples_run]
cell('grpcio with TLS', 'farpage is the server')(grpcio_sees_the_right_status)
cell('grpcio with TLS', 'farpage is the server')(certificates_are_read_again_under_load)
cell('nbdinfo with TLS', 'farpage is the server')(nbd_has_certificates_and_shared_keys)

if __name__ == '__main__':
    main(CASES)
