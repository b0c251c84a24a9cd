# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""Builds tests/interop/go where Go and the modules that it names are at hand; else says why not."""
import os
import re
import shutil
import subprocess
import tempfile

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'go')
LEAST = (1, 22)


class Missing(Exception):
    """Why the Go peers cannot be had here."""


def go():
    found = shutil.which('go') or shutil.which('/usr/local/go/bin/go')
    if not found:
        raise Missing('go is not installed (1.22 or newer is needed; that of Debian 12 is too old, see https://go.dev/dl)')
    out = subprocess.run([found, 'env', 'GOVERSION'], capture_output=True, text=True).stdout
    version = tuple(int(x) for x in re.findall(r'\d+', out)[:2])
    if version < LEAST:
        raise Missing('go is %s, and 1.22 or newer is needed (see https://go.dev/dl)' % (out.strip() or 'of unknown version'))
    return found


def build(folder):
    """The path of gopeer, built into the folder if it is not there already or older than its source."""
    os.makedirs(folder, exist_ok=True)
    binary = os.path.join(folder, 'gopeer')
    newest = max(os.path.getmtime(os.path.join(SOURCE, n)) for n in os.listdir(SOURCE))
    if os.path.exists(binary) and os.path.getmtime(binary) > newest:
        return binary
    # userfaultfd-go and go-nbd take constants from C headers.
    env = dict(os.environ, CGO_ENABLED='1', GOFLAGS='-mod=readonly -buildvcs=false')
    compiler = go()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = os.path.join(work, 'gopeer')
        try:
            out = subprocess.run([compiler, 'build', '-o', made, '.'], cwd=SOURCE, env=env, capture_output=True, text=True,
                                 timeout=240)
        except subprocess.TimeoutExpired:
            raise Missing('the Go peers were not built within 240 s (does the module proxy answer?)')
        if out.returncode:
            said = ' '.join(out.stderr.split())
            absent = re.search(r'module lookup disabled|dial tcp|no such host|proxyconnect|TLS handshake|i/o timeout', said)
            raise Missing(('the Go modules are not here and the module proxy does not give them: ' if absent else
                           'the Go peers do not build: ') + said[:300])
        os.rename(made, binary)
    return binary
