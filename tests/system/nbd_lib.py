# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""NBD servers that are not ours, and ours, for tests: started with or without TLS, and somebody in between."""
import atexit
import os
import shutil
import signal
import socket
import subprocess
import tempfile

from cli_lib import Skip, true, wait_for
from tls_lib import authority, certificate

PATH = os.environ.get('PATH', '') + ':/usr/sbin:/sbin'


def need(*programs):
    for p in programs:
        if not shutil.which(p, path=PATH):
            raise Skip('%s is not installed' % p)


# ---------------------------------------------------------------------------------------------------- certificates

class Place:
    """One folder for all cases: certificates in the way that GnuTLS programs look for them, keys in ours."""

    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix='farpage-tls.')
        atexit.register(shutil.rmtree, self.dir, ignore_errors=True)
        for name in ('ca', 'other'):
            authority(self, name)
        here, elsewhere = 'DNS:localhost,IP:127.0.0.1', 'DNS:elsewhere.example'
        for name, by, names, days in (('good', 'ca', here, 2), ('old', 'ca', here, -1), ('named', 'ca', elsewhere, 2),
                                      ('client', 'ca', 'DNS:alice.example', 2), ('gone', 'ca', 'DNS:alice.example', -1),
                                      ('eve', 'other', 'DNS:alice.example', 2)):
            certificate(self, name, by, names, days)
        for name in ('good', 'old', 'named'):  # servers
            self.folder(name, 'ca', server=name)
        for name, ca, shown in (('alice', 'ca', 'client'), ('late', 'ca', 'gone'), ('mallory', 'ca', 'eve'), ('bare', 'ca', None),
                                ('foreign', 'other', None)):
            self.folder(name, ca, client=shown)
        for name, text in (('garbage', 'no certificate\n'), ('empty', '')):
            self.folder(name, 'ca')
            with open(self.path('dir-%s/ca-cert.pem' % name), 'w') as f:
                f.write(text)
        for name, key in (('shared', '11' * 32), ('unshared', '22' * 32)):
            os.mkdir(self.path('psk-' + name))
            with open(self.path('psk-%s/keys.psk' % name), 'w') as f:
                f.write('alice:%s\ncarol:%s\n' % (key, '33' * 32) if name == 'unshared' else 'alice:%s\n' % key)

    def path(self, name):
        return os.path.join(self.dir, name)

    def folder(self, name, ca, **of):
        os.mkdir(self.path('dir-' + name))
        shutil.copy(self.path(ca + '.pem'), self.path('dir-%s/ca-cert.pem' % name))
        for role, whose in of.items():
            if whose:
                shutil.copy(self.path(whose + '.pem'), self.path('dir-%s/%s-cert.pem' % (name, role)))
                shutil.copy(self.path(whose + '.key'), self.path('dir-%s/%s-key.pem' % (name, role)))


def place():
    if not hasattr(place, 'it'):
        place.it = Place()
    return place.it


def free_port():
    s = socket.socket()
    s.bind(('127.0.0.1', 0))
    n = s.getsockname()[1]
    s.close()
    return n


def answers(port):
    try:
        with socket.create_connection(('127.0.0.1', port), 1) as c:
            return c.recv(8) == b'NBDMAGIC'
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------- servers

class Other:
    """A server of somebody else's, in the foreground; ended with the case."""

    def __init__(self, w, args):
        self.log = w.path('server.log')
        with open(self.log, 'ab') as f:
            self.p = subprocess.Popen(args, cwd=w.dir, stdin=subprocess.DEVNULL, stdout=f, stderr=f, env=dict(os.environ, PATH=PATH))
        w.running.append(self)

    def err(self):
        with open(self.log, errors='replace') as f:
            return f.read()

    def kill(self):
        self.p.kill()
        self.p.wait()


def foreground(w, *args):
    need(args[0])
    port = free_port()
    s = Other(w, [str(a).replace('@PORT', str(port)) for a in args])
    wait_for(lambda: answers(port) or s.p.poll() is not None, args[0])
    true(s.p.poll() is None, s.err())
    return port


def nbdkit(w, mode, cert='good', verify=False, psk=False, threads=16):
    tls = ['--tls=' + {'allow': 'on'}.get(mode, mode)] + ['--tls-verify-peer'] * verify
    if mode != 'off':
        tls += ['--tls-psk=' + place().path('psk-shared/keys.psk') if psk else '--tls-certificates=' + place().path('dir-' + cert)]
    return foreground(w, 'nbdkit', '-f', '-i', '127.0.0.1', '-p', '@PORT', '-t', str(threads), *tls,
                      'file', w.path('disk')), ''


def qemu_creds(mode, cert, verify, psk):
    if mode == 'allow':
        raise Skip('it has TLS or has none, nothing in between')
    if mode == 'off':
        return []
    return ['--object', 'tls-creds-psk,id=t,endpoint=server,dir=' + place().path('psk-shared') if psk else
            'tls-creds-x509,id=t,endpoint=server,sanity-check=off,verify-peer=%s,dir=%s' %
            ('on' if verify else 'off', place().path('dir-' + cert))]


def qemu_nbd(w, mode, cert='good', verify=False, psk=False):
    creds = qemu_creds(mode, cert, verify, psk)
    return foreground(w, 'qemu-nbd', '-t', '-f', 'raw', '-e', '8', '-b', '127.0.0.1', '-p', '@PORT', *creds,
                      *(['--tls-creds', 't'] if creds else []), w.path('disk')), ''


def qemu_storage_daemon(w, mode, cert='good', verify=False, psk=False):
    creds = qemu_creds(mode, cert, verify, psk)
    return foreground(w, 'qemu-storage-daemon', *creds, '--blockdev', 'driver=file,node-name=f,filename=' + w.path('disk'),
                      '--nbd-server', 'addr.type=inet,addr.host=127.0.0.1,addr.port=@PORT' + (',tls-creds=t' if creds else ''),
                      '--export', 'type=nbd,id=e,node-name=f,name=disk,writable=on'), 'disk'


def nbd_server(w, mode, cert='good', verify=False, psk=False):
    need('nbd-server')
    if psk:
        raise Skip('it knows no shared keys')
    port, files = free_port(), ''
    if mode != 'off':
        d = place().path('dir-' + cert)
        files = 'certfile = %s/server-cert.pem\nkeyfile = %s/server-key.pem\ncacertfile = %s/ca-cert.pem\nforce_tls = %s\n' % (
            d, d, d, 'true' if mode == 'require' else 'false')
    with open(w.path('conf'), 'w') as f:
        f.write('[generic]\nport = %d\nlistenaddr = 127.0.0.1\nallowlist = true\n%s[disk]\nexportname = %s\nflush = true\n' % (
            port, files, w.path('disk')))
    # It knows no foreground in which it serves more than one connection.
    Other(w, ['nbd-server', '-C', w.path('conf'), '-p', w.path('pid')])
    wait_for(lambda: answers(port), 'nbd-server')
    return port, 'disk'


def farpage(w, mode, cert='good', verify=False, psk=False, oldest='1.3'):
    creds = []
    if mode != 'off':
        creds = ['--tls-psk', place().path('psk-shared/keys.psk')] if psk else [
            '--tls-cert', place().path(cert + '.pem'), '--tls-key', place().path(cert + '.key')]
    if verify:
        creds += ['--tls-ca', place().path('ca.pem')]
    s = w.start('serve', 'disk=file:disk', '--listen', ('nbds' if mode == 'require' else 'nbd') + '://127.0.0.1:0',
                '--tls-min', oldest, *creds)
    return int(s.line().split()[1].split('/')[2].rsplit(':', 1)[1]), 'disk'


# Each is given what the case's folder calls `disk`, and gives (port, export).
SERVERS = {'nbdkit': nbdkit, 'qemu-nbd': qemu_nbd, 'qemu-storage-daemon': qemu_storage_daemon, 'nbd-server': nbd_server,
           'farpage': farpage}


def end_of_daemons(w):
    if os.path.exists(w.path('pid')):
        os.kill(int(w.read('pid')), signal.SIGTERM)
