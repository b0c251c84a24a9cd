# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""Certificates for the tests of TLS, made with the openssl command."""
import os
import shutil
import subprocess

from cli_lib import Skip


def openssl(w, *args):
    subprocess.run(['openssl'] + list(args), cwd=w.dir, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def authority(w, name):
    """NAME.pem and NAME.key: one that signs."""
    if not shutil.which('openssl'):
        raise Skip('the openssl command is not installed')
    openssl(w, 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', name + '.key',
            '-out', name + '.pem', '-subj', '/CN=' + name, '-days', '2')


def certificate(w, name, by, names, days=2, extra=''):
    """NAME.pem and NAME.key, signed by an authority, for `names` such as "DNS:localhost,IP:127.0.0.1"."""
    openssl(w, 'req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', name + '.key', '-out',
            name + '.csr', '-subj', '/CN=' + name)
    with open(w.path(name + '.ext'), 'w') as f:
        f.write('subjectAltName=%s\n%s' % (names, extra))
    openssl(w, 'x509', '-req', '-in', name + '.csr', '-CA', by + '.pem', '-CAkey', by + '.key', '-CAcreateserial', '-days',
            str(days), '-extfile', name + '.ext', '-out', name + '.pem')


def place(w):
    """The usual: authority `ca`, server `s`, clients `alice` and `bob`; authority `other` with client `eve`."""
    authority(w, 'ca')
    authority(w, 'other')
    certificate(w, 's', 'ca', 'DNS:localhost,IP:127.0.0.1')
    certificate(w, 'alice', 'ca', 'DNS:alice.example')
    certificate(w, 'bob', 'ca', 'DNS:bob.example')
    certificate(w, 'eve', 'other', 'DNS:alice.example')
    os.makedirs(w.path('none'), exist_ok=True)
