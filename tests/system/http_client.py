#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""http_client.py FARPAGE [CASE...]: http:// and https:// regions: servers that keep the rules, and that do not."""
import base64
import hashlib
import http.server
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time

from cli_lib import Skip, cell, equal, has, main, message, need_fuse, true, wait_for
from tcp_lib import Listener

MIB = 1 << 20


class Web:
    """A web server of one object. `bend` may change what a ranged GET answers: bend(handler, answer) where answer has
    status, headers and body."""

    def __init__(self, data, bend=None, tls=None, tag=True, modified=True, before=None):
        self.data, self.bend, self.tag, self.modified, self.before = data, bend, tag, modified, before
        self.version = 1
        self.asked = []
        self.conns = 0
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def setup(self):
                web.conns += 1
                super().setup()
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def log_message(self, *args):
                pass

            def do_GET(self):
                web.get(self)

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args):
                pass

        self.s = Server(('127.0.0.1', 0), Handler)
        self.port = self.s.server_address[1]
        if tls:
            self.s.socket = tls.wrap_socket(self.s.socket, server_side=True)
        self.scheme = 'https' if tls else 'http'
        threading.Thread(target=self.s.serve_forever, args=(0.05,), daemon=True).start()

    def uri(self, host='127.0.0.1', path='/object'):
        return '%s://%s:%d%s' % (self.scheme, host, self.port, path)

    def close(self):
        self.s.shutdown()
        self.s.server_close()

    def validators(self):
        h = {}
        if self.tag:
            h['ETag'] = '"v%d"' % self.version
        if self.modified:
            h['Last-Modified'] = 'Tue, 15 Nov 1994 12:45:%02d GMT' % self.version
        return h

    def get(self, r):
        self.asked.append((r.path, dict(r.headers)))
        if self.before and self.before(r):
            return
        data, headers, status, body = self.data, self.validators(), 200, self.data
        match = r.headers.get('If-Match')
        if match and match != headers.get('ETag'):
            status, body = 412, b''
        elif r.headers.get('Range'):
            first, last = (int(x) for x in r.headers['Range'].split('=')[1].split('-'))
            if first >= len(data):
                status, body = 416, b''
                headers['Content-Range'] = 'bytes */%d' % len(data)
            else:
                last = min(last, len(data) - 1)
                status, body = 206, data[first:last + 1]
                headers['Content-Range'] = 'bytes %d-%d/%d' % (first, last, len(data))
        a = {'status': status, 'headers': headers, 'body': body}
        headers['Content-Length'] = str(len(body))
        if self.bend:
            self.bend(r, a)
        r.send_response(a['status'])
        for k, v in a['headers'].items():
            r.send_header(k, v)
        r.end_headers()
        r.wfile.write(a['body'])


def with_web(fn):
    def run(w):
        webs = []

        def make(*args, **kw):
            webs.append(Web(*args, **kw))
            return webs[-1]
        try:
            fn(w, make)
        finally:
            for x in webs:
                x.close()
    run.__name__ = fn.__name__
    return run


@with_web
def copied_whole(w, web):
    for size in (0, 1, 4096, 3 * MIB + 17):
        data = w.file('a', size)
        s = web(data)
        w.run('copy', s.uri() + '?max-request=256K', 'file:b', code=0)
        equal(w.read('b'), data, '%d bytes' % size)
        os.unlink(w.path('b'))
    true(s.conns <= 10, '%d connections for %d requests' % (s.conns, len(s.asked)))
    has(w.run('info', s.uri(), code=0).out, '%d bytes' % size, 'remote')


@with_web
def mounted_both_ways(w, web):
    need_fuse()
    data = w.file('a', 3 * MIB + 17)
    os.mkdir(w.path('d'))
    s = web(data)
    for mode in ('direct', 'managed'):
        m = w.mount(s.uri(), 'd', '--mode', mode)
        with open(m.path, 'rb') as f:
            f.seek(MIB + 5)
            equal(f.read(1000), data[MIB + 5:MIB + 1005])
            f.seek(0)
            equal(f.read(), data, mode)
        try:
            with open(m.path, 'r+b') as f:
                f.write(b'x')
            raise AssertionError('it could be written')
        except OSError:
            pass
        equal(m.end(), 0, m.err())


@with_web
def nothing_of_a_changed_object(w, web):
    """Direct mount: after the change no byte of the new object is shown, and that is said once."""
    need_fuse()
    for kw in ({}, {'tag': False}, {'modified': False}):
        data = w.file('a', 4 * MIB)
        os.makedirs(w.path('d'), exist_ok=True)
        s = web(data, **kw)
        m = w.mount(s.uri(), 'd', '--mode', 'direct', '--deadline', '3s')
        fd = os.open(m.path, os.O_RDONLY)
        try:
            equal(os.pread(fd, 4096, 0), data[:4096])
            s.data = bytes(255 - b for b in data)
            s.version += 1
            try:
                os.pread(fd, 4096, 3 * MIB)
                raise AssertionError('it could be read')
            except OSError:
                pass
        finally:
            os.close(fd)
        m.end()
        has(m.err(), 'has changed')


@with_web
def a_local_copy_of_an_older_object_is_refused(w, web):
    need_fuse()
    data = w.file('a', MIB)
    os.mkdir(w.path('d'))
    s = web(data)
    m = w.mount(s.uri(), 'd', '--local', 'file:cache')
    w.run('wait', 'd', '--local', '100%', code=0)
    equal(m.end(), 0, m.err())
    asked = len(s.asked)
    m = w.mount(s.uri(), 'd', '--local', 'file:cache')
    with open(m.path, 'rb') as f:
        equal(f.read(), data)
    equal(m.end(), 0, m.err())
    true(len(s.asked) < asked + 8, 'it was fetched again')
    away = [True]
    s.before = lambda r: away[0] and (setattr(r, 'close_connection', True), r.connection.shutdown(socket.SHUT_RDWR))
    m = w.mount(s.uri(), 'd', '--local', 'file:cache')
    with open(m.path, 'rb') as f:
        equal(f.read(), data, 'while the server is away')
    equal(m.end(), 0, m.err())
    away[0] = False
    s.version += 1
    r = w.run('mount', s.uri(), 'd', '--local', 'file:cache')
    true(r.returncode, 'an older copy was taken')
    message(r.err)


def bent(change, *words, code=1, **kw):
    """Opening it, or reading it, fails with a message that has these words, and soon."""
    @with_web
    def run(w, web):
        s = web(w.file('a', MIB), bend=change, **kw)
        began = time.monotonic()
        r = w.run('copy', s.uri() + '?timeout=1s', 'file:b')
        true(r.returncode in (1, 2, 4), 'exit %d: %s' % (r.returncode, r.err))
        message(r.err)
        has(r.err, *words)
        true(time.monotonic() - began < 20, 'it took too long')
    return run


def later(change):
    """Only of what comes after the first look."""
    def run(r, a):
        if r.headers['Range'] != 'bytes=0-0':
            change(r, a)
    return run


def header(name, value):
    return lambda r, a: a['headers'].update({name: value}) if value is not None else a['headers'].pop(name, None)


def ignores_ranges(r, a):
    a['status'] = 200
    a['headers'].pop('Content-Range', None)
    a['body'] = b'x' * MIB
    a['headers']['Content-Length'] = str(MIB)


def shifted(r, a):
    first, last = (int(x) for x in r.headers['Range'].split('=')[1].split('-'))
    a['headers']['Content-Range'] = 'bytes %d-%d/%d' % (first + 1, last + 1, MIB + 2)


def more(r, a):
    a['body'] += b'y' * 100
    a['headers']['Content-Length'] = str(len(a['body']))


def unsaid_more(r, a):
    """No Content-Length: until the end of the connection."""
    a['body'] += b'y' * 100
    a['headers'].pop('Content-Length')
    r.close_connection = True
    a['headers']['Connection'] = 'close'


def fewer(r, a):
    a['body'] = a['body'][:len(a['body']) // 2]
    a['headers'].pop('Content-Length')
    r.close_connection = True
    a['headers']['Connection'] = 'close'


def grown(r, a):
    a['headers']['Content-Range'] = a['headers']['Content-Range'].rsplit('/', 1)[0] + '/%d' % (MIB + 1)


def status(n):
    def run(r, a):
        a['status'] = n
    return run


BENT = {
    'ranges_ignored': bent(ignores_ranges, 'ignores ranges'),
    'ranges_ignored_later': bent(later(ignores_ranges)),
    'no_validator': bent(None, 'unpinned', tag=False, modified=False),
    'another_tag_later': bent(later(header('ETag', '"other"')), 'has changed'),
    'no_tag_later': bent(later(header('ETag', None)), 'has changed'),
    'another_size_later': bent(later(grown), 'has changed'),
    'no_content_range': bent(header('Content-Range', None)),
    'no_total': bent(header('Content-Range', 'bytes 0-0/*')),
    'nonsense_range': bent(header('Content-Range', 'bytes 5-1/10')),
    'two_ranges': bent(header('Content-Type', 'multipart/byteranges; boundary=x')),
    'shifted_range': bent(later(shifted)),
    'more_bytes': bent(later(more)),
    'more_bytes_unsaid': bent(later(unsaid_more)),
    'fewer_bytes': bent(later(fewer)),
    'encoded_body': bent(header('Content-Encoding', 'gzip'), 'encoded'),
    'not_found': bent(status(404), '404'),
    'forbidden': bent(status(403), '403'),
    'teapot': bent(status(418), '418'),
}


@with_web
def silence(w, web):
    """From the beginning, and after the first answer."""
    data = w.file('a', MIB)
    for s in (web(data, before=lambda r: time.sleep(60)),
              web(data, before=lambda r: r.headers['Range'] != 'bytes=0-0' and time.sleep(60))):
        began = time.monotonic()
        r = w.run('copy', s.uri() + '?timeout=1s', 'null:', '--deadline', '1s')
        true(r.returncode in (1, 4), 'exit %d' % r.returncode)
        message(r.err)
        has(r.err, 'imed out')
        true(time.monotonic() - began < 20, 'it took too long')


def answers_that_are_none(w):
    """Raw bytes for an answer: endless heads and bodies, bodies without a head, nonsense."""
    head = b'HTTP/1.1 206 x\r\nETag: "x"\r\n'
    for say, again in ((b'', None), (b'\0' * 5000, None), (b'just a body', None), (b'HTTP/1.1 206', None), (head, None),
                       (b'HTTP/9.9 206 x\r\n\r\n', None), (head, b'X-More: %s\r\n' % (b'y' * 1000)), (head + b'X: ', b'z' * 10000),
                       (head + b'Content-Length: -5\r\n\r\n', None), (head + b'Content-Length: 99999999999999999999\r\n\r\n', None),
                       (head + b'Transfer-Encoding: chunked\r\n\r\n', b'fffffffffffffffff\r\n'),
                       (head + b'Content-Range: bytes 0-0/10\r\n\r\n', b'endless' * 100),
                       (b'HTTP/1.1 500 x\r\n\r\n', b'endless' * 100), (b'', b'HTTP/1.1 100 Continue\r\n\r\n'),
                       (b'HTTP/1.1 302 x\r\nLocation: http://[::\r\n\r\n', None)):
        def talk(c, say=say, again=again):
            c.recv(65536)
            c.sendall(say)
            end = time.monotonic() + 15
            while again and time.monotonic() < end:
                c.sendall(again)

        s = Listener(talk)
        try:
            began = time.monotonic()
            r = w.run('copy', 'http://127.0.0.1:%d/x' % s.port, 'null:', '--deadline', '1s')
            true(r.returncode in (1, 4), 'exit %d for %r: %s' % (r.returncode, say, r.err))
            message(r.err)
            true(time.monotonic() - began < 10, 'it took too long for %r' % say)
        finally:
            s.close()


@with_web
def errors_that_pass(w, web):
    """429, 500, 503 and hung up connections now and then: the retry layer goes on."""
    data = w.file('a', 2 * MIB)
    n = [0]

    def now_and_then(r):
        n[0] += 1
        if n[0] % 3 or n[0] < 2:
            return False
        kind = n[0] // 3 % 4
        if kind == 3:
            r.close_connection = True
            r.connection.shutdown(socket.SHUT_RDWR)
            return True
        r.send_response((429, 500, 503)[kind])
        r.send_header('Content-Length', '5')
        r.end_headers()
        r.wfile.write(b'later')
        return True
    s = web(data, before=now_and_then)
    w.run('copy', s.uri() + '?max-request=64K', 'file:b', '--layer', 'retry:backoff=1ms,max-backoff=5ms', code=0)
    equal(w.read('b'), data)


@with_web
def redirects(w, web):
    data = w.file('a', MIB)
    s = web(data)

    def to(target, times):
        def go(r):
            n = int(r.path.rsplit('/', 1)[1]) if r.path.rsplit('/', 1)[1].isdigit() else 0
            r.send_response(302)
            r.send_header('Location', target if n >= times else '/%d' % (n + 1))
            r.send_header('Content-Length', '3')
            r.end_headers()
            r.wfile.write(b'xyz')
            return True
        return go
    w.run('copy', web(b'', before=to(s.uri(), 2)).uri(), 'file:b', code=0)
    equal(w.read('b'), data)
    r = w.run('info', web(b'', before=to('/0', 1000000)).uri(), code=1)
    message(r.err)
    for bad in ('file:///etc/passwd', 'ftp://127.0.0.1/x'):
        r = w.run('info', web(b'', before=to(bad, 0)).uri())
        true(r.returncode, bad)
        message(r.err)


@with_web
def login(w, web):
    data = w.file('a', 1000)
    good = 'Basic ' + base64.b64encode(b'me:s3cret').decode()

    def check(r):
        if r.headers.get('Authorization') == good:
            return False
        r.send_response(401)
        r.send_header('WWW-Authenticate', 'Basic realm="x"')
        r.send_header('Content-Length', '0')
        r.end_headers()
        return True
    s = web(data, before=check)
    with open(w.path('pw'), 'w') as f:
        f.write('s3cret\n')
    w.run('copy', s.uri() + '?user=me&password-file=' + w.path('pw'), 'file:b', code=0)
    equal(w.read('b'), data)
    w.run('copy', s.uri() + '?user=me&password-env=PW', 'file:c', code=0, env={'PW': 's3cret'})
    equal(w.read('c'), data)
    for q, env in (('', {}), ('?user=me&password-env=PW', {'PW': 'wrong'}), ('?user=me', {}), ('?password-file=x', {}),
                   ('?user=me&password-env=NONE', {})):
        r = w.run('info', s.uri() + q, env=env)
        true(r.returncode, q)
        message(r.err)
    r = w.run('info', 'http://me:s3cret@127.0.0.1:%d/x' % s.port)
    true(r.returncode)
    message(r.err)
    true('s3cret' not in r.err, 'the password is in the message')


@with_web
def the_objects_own_query(w, web):
    s = web(w.file('a', 1000))
    w.run('copy', s.uri(path='/a%20b/c') + '?query=k%3D1%26sig%3Da%252Fb', 'null:', code=0)
    true(all(p == '/a%20b/c?k=1&sig=a%2Fb' for p, h in s.asked), s.asked[0][0])
    r = w.run('info', s.uri() + '?k=1', code=2)
    has(r.err, 'connections', 'query')


@with_web
def certificates(w, web):
    if not shutil.which('openssl'):
        raise Skip('openssl is not installed')

    def make(name, host):
        subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes',
                        '-keyout', w.path(name + '.key'), '-out', w.path(name + '.pem'), '-days', '2', '-subj',
                        '/CN=' + host, '-addext', 'subjectAltName=DNS:' + host], check=True, stderr=subprocess.DEVNULL)
        c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        c.load_cert_chain(w.path(name + '.pem'), w.path(name + '.key'))
        return c
    data = w.file('a', 100000)
    good, named = web(data, tls=make('good', 'localhost')), web(data, tls=make('named', 'else.where'))
    w.run('copy', good.uri('localhost') + '?tls-ca=' + w.path('good.pem'), 'file:b', code=0)
    equal(w.read('b'), data)
    for uri in (good.uri('localhost'), good.uri('localhost') + '?tls-ca=' + w.path('named.pem'),
                named.uri('localhost') + '?tls-ca=' + w.path('named.pem'), good.uri('localhost') + '?tls-ca=/none',
                good.uri('localhost').replace('https', 'http'), web(data).uri('localhost').replace('http', 'https'),
                web(data).uri() + '?tls-ca=' + w.path('good.pem')):
        r = w.run('info', uri)
        true(r.returncode, uri)
        message(r.err)
    true(not good.asked or all('Range' in h for p, h in good.asked))


def nginx(w):
    exe = shutil.which('nginx', path=os.environ.get('PATH', '') + ':/usr/sbin')
    if not exe:
        raise Skip('nginx is not installed')
    s = socket.socket()
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
    s.close()
    data = w.file('object', 5 * MIB + 3)
    with open(w.path('conf'), 'w') as f:
        f.write('daemon off; master_process off; pid %s/pid; error_log %s/log;\nevents { }\nhttp { access_log off; '
                'client_body_temp_path %s/t1; proxy_temp_path %s/t2; fastcgi_temp_path %s/t3; uwsgi_temp_path %s/t4; '
                'scgi_temp_path %s/t5; server { listen 127.0.0.1:%d; root %s; } }\n' % (*[w.dir] * 7, port, w.dir))
    p = subprocess.Popen([exe, '-p', w.dir, '-c', w.path('conf')], stderr=subprocess.DEVNULL)
    uri = 'http://127.0.0.1:%d/object' % port

    def up():
        try:
            socket.create_connection(('127.0.0.1', port), 1).close()
            return True
        except OSError:
            return p.poll() is not None
    try:
        wait_for(up, 'nginx')
        w.run('copy', uri, 'file:b', '--verify', code=0)
        equal(w.read('b'), data)
        need_fuse()
        os.mkdir(w.path('d'))
        m = w.mount(uri, 'd')
        with open(m.path, 'rb') as f:
            equal(hashlib.sha256(f.read()).hexdigest(), hashlib.sha256(data).hexdigest())
        equal(m.end(), 0, m.err())
        r = w.run('info', uri + 'x', code=1)
        has(r.err, '404')
    finally:
        p.terminate()
        p.wait()


@with_web
def refused_uris(w, web):
    for uri, words in (('http:///x', ['host']), ('http://h/x?nonsense=1', ['nonsense']), ('http://h/x#part', ['%23']),
                       ('http://h/a b', ['%XX']), ('http+unix://h/x', ['unix']), ('http://h/x?tls-ca=/etc/passwd', ['https'])):
        r = w.run('info', uri)
        true(r.returncode in (1, 2), uri)
        message(r.err)
        has(r.err, *words)


def named(name, fn):
    fn.__name__ = name
    return fn


CASES = ([copied_whole, mounted_both_ways, nothing_of_a_changed_object, a_local_copy_of_an_older_object_is_refused]
     + [named(k, f) for k, f in BENT.items()]
     + [silence, answers_that_are_none, errors_that_pass, redirects, login, the_objects_own_query, certificates, nginx, refused_uris])
for case in CASES:
    cell('nginx' if case is nginx else "a web server of Python's", 'farpage is the client')(case)
main(CASES)
