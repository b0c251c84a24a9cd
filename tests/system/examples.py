#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""examples.py FARPAGE PAGE...: runs the examples of a manual page as they stand there, line by line: of farpage-serve(1) each
line that begins with '$ ', of other pages and the README those with `--as nbd-socket`; of farpage-mount(1) the others, too, each
display as one script. What changes are ports (any free one in place of 1337 and 10809), hosta, which is this host, and /mnt.
TAP."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

farpage = os.path.abspath(sys.argv[1])
SECONDS = 60
NEEDS = {'nbdinfo': 'libnbd-bin', 'nbdcopy': 'libnbd-bin', 'nbdsh': 'python3-libnbd', 'qemu-img': 'qemu-utils', 'qemu-io': 'qemu-utils',
         'systemd-socket-activate': 'systemd', 'openssl': 'openssl', 'sqlite3': 'sqlite3', 'sudo': 'mount'}


def lines(path):
    with open(path) as f:
        text = f.read().replace('\\e\n\t', ' ').replace('\\e', '\\')
    found = re.findall(r'^(?:\.Dl )?(?:\$|    (?=farpage)) ?(.+)$', text, re.M)
    return found if path.endswith('farpage-serve.1') else [x for x in found if '--as nbd-socket' in x and x.startswith('farpage')]


def scripts(path):
    """The displays of farpage-mount(1) whose region is a file."""
    with open(path) as f:
        text = f.read().split('.Sh EXAMPLES')[-1]
    found = [x or y for x, y in re.findall(r'^\.Bd -literal[^\n]*\n(.*?)^\.Ed|^\.Dl (\$ [^\n]*)$', text, re.M | re.S)]
    return [re.sub(r'^\$ ', '', x, flags=re.M).strip() for x in found if '--as nbd-socket' not in x]


def prepare(where):
    for name in ('x.db', 'disk.img', 'a.img', 'b.img'):
        with open(os.path.join(where, name), 'wb') as f:
            f.write(os.urandom(1 << 20))
    for name in ('chunks', 'bin', 'dir'):
        os.mkdir(os.path.join(where, name))
    if shutil.which('qemu-img'):
        subprocess.run(['qemu-img', 'create', '-q', '-f', 'qcow2', os.path.join(where, 'disk.qcow2'), '8M'], check=True)
    # Debian's own Python has the modules of Debian's packages.
    if os.path.exists('/usr/bin/python3'):
        os.symlink('/usr/bin/python3', os.path.join(where, 'bin', 'python3'))
    os.symlink(farpage, os.path.join(where, 'bin', 'farpage'))
    for name, says in ('ssh', 'shift\nexec "$@"'), ('sudo', 'exec "$@"'):
        with open(os.path.join(where, 'bin', name), 'w') as f:
            f.write('#!/bin/sh\n%s\n' % says)
        os.chmod(os.path.join(where, 'bin', name), 0o755)
    with open(os.path.join(where, 'keys.json'), 'w') as f:
        # RFC 8037, appendix A
        json.dump({'keys': [{'kty': 'OKP', 'crv': 'Ed25519', 'kid': '1', 'x': '11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo'}]}, f)
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', 's.key',
                    '-out', 's.pem', '-subj', '/CN=localhost'], cwd=where, check=True, capture_output=True)
    shutil.copy(os.path.join(where, 's.pem'), os.path.join(where, 'clients.pem'))
    return dict(os.environ, PATH=os.path.join(where, 'bin') + ':' + os.environ['PATH'])


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def greeted(port):
    """The first bytes of an NBD server, once there is one."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(('127.0.0.1', port), SECONDS) as s:
                return s.recv(18, socket.MSG_WAITALL)
        except ConnectionRefusedError:
            time.sleep(0.02)
    return b''


class Example:
    def __init__(self, where, env, text):
        self.proc = subprocess.Popen(['/bin/sh', '-c', text], cwd=where, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True, start_new_session=True)
        self.said = []

    def line(self):
        got = self.proc.stdout.readline()
        self.said.append(got)
        return got

    def ended(self, stop):
        if stop:
            self.proc.terminate()
        try:
            out, _ = self.proc.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            out = '(did not end)'
        self.said.append(out)
        if self.proc.poll() is None:
            os.killpg(self.proc.pid, signal.SIGKILL)
            self.proc.wait()
        return self.proc.returncode


def run(where, env, command, hosta):
    """What is wrong with it, or None."""
    for here in ('hosta', '127.0.0.1') if '--as nbd-socket' in command else ('hosta',):
        for port in hosta:
            command = command.replace('%s:%s' % (here, port), hosta[port])
    command = command.replace(':1337', ':0')
    lasts = command.startswith('farpage serve') and '--run' not in command
    if command.startswith('systemd-socket-activate'):
        port = free_port()
        e = Example(where, env, 'exec ' + command.replace(':10809', ':%d' % port))
        got = greeted(port)
        code = e.ended(True)
        return None if got == b'NBDMAGICIHAVEOPT' + b'\0\3' and code == 0 else 'greeted with %r, exit %d: %s' % (got, code, e.said)
    command = command.replace(':10809', ':0')
    e = Example(where, env, ('exec ' if lasts else '') + command)
    if lasts:
        for _ in range(command.count('--listen')):
            if not e.line().startswith('listening '):
                break
    code = e.ended(lasts)
    good = code == 0 and (not lasts or all(x.startswith('listening ') for x in e.said[:-1]))
    return None if good else 'exit %d: %s' % (code, ''.join(e.said))


def region_server(where, env):
    """hosta for scripts: a database, and a file system image as the export `disk`."""
    subprocess.run(['sqlite3', os.path.join(where, 'orders.db'), 'CREATE TABLE orders(n); INSERT INTO orders VALUES(1)'], check=True)
    with open(os.path.join(where, 'fs.img'), 'wb') as f:
        f.truncate(8 << 20)
    subprocess.run(['/sbin/mkfs.ext4', '-q', os.path.join(where, 'fs.img')], check=True)
    return Example(where, env, 'exec farpage serve file:orders.db disk=file:fs.img --listen grpc://127.0.0.1:0')


def run_script(where, env, script, hosta):
    """What is wrong with it, or None. It gets a directory of its own; what it leaves running is stopped."""
    place = tempfile.mkdtemp(dir=where)
    os.mkdir(os.path.join(place, 'dir'))
    os.mkdir(os.path.join(place, 'mnt'))
    shutil.copy(os.path.join(where, 'orders.db'), os.path.join(place, 'x.db'))
    wanted = [x for x in ('app.db',) if x in script]
    for name in wanted:
        open(os.path.join(place, name), 'w').close()
    script = script.replace('hosta:1337', hosta).replace(' /mnt', ' mnt')
    e = Example(place, env, 'set -e\n' + script)
    code = e.ended(False)
    said = ''.join(e.said)
    good = code == 0 and ('sqlite3 app.db' not in script or '\n1\n' in '\n' + said)
    if ' mnt' in script and code == 0:
        good = good and os.path.isdir(os.path.join(place, 'mnt', 'lost+found'))
        subprocess.run(['umount', os.path.join(place, 'mnt')])
    if '--background' in script and (code or 'farpage stop' not in script):
        target = wanted[0] if wanted else 'dir'
        good = subprocess.run([farpage, 'stop', target], cwd=place, timeout=SECONDS, capture_output=True).returncode == 0 and good
    return None if good else 'exit %d: %s' % (code, said)


def run_scripts(paths, where, env, first):
    """How many there were, and how many failed."""
    todo = [x for path in paths if path.endswith('farpage-mount.1') for x in scripts(path)]
    lacks = [x for x in ('sqlite3', 'mount') if not shutil.which(x)] + [x for x in ('/sbin/mkfs.ext4', '/dev/fuse') if not os.path.exists(x)]
    server = region_server(where, env) if todo and not lacks else None
    failed = 0
    try:
        hosta = server.line().split()[1].split('/')[2] if server else ''
        for n, script in enumerate(todo, first):
            name = script.replace('#', '').replace('\n', '; ')
            loop = [] if os.geteuid() == 0 and os.path.exists('/dev/loop-control') else ['root with /dev/loop-control']
            missing = lacks + (loop if 'sudo mount' in script else [])
            if missing:
                print('ok %d - %s # SKIP %s is missing' % (n, name, missing[0]))
                continue
            wrong = run_script(where, env, script, hosta)
            failed += bool(wrong)
            if wrong:
                print('\n'.join('# ' + x for x in wrong.splitlines()))
            print('%s %d - %s' % ('not ok' if wrong else 'ok', n, name), flush=True)
    finally:
        if server:
            server.ended(True)
    return len(todo), failed


def main():
    todo = [x for path in sys.argv[2:] for x in lines(path)]
    where, failed = tempfile.mkdtemp(prefix='farpage-examples.'), 0
    server = None
    try:
        env = prepare(where)
        disk = 'file:disk.qcow2' if shutil.which('qemu-img') else 'mem:8M'
        server = Example(where, env, 'exec farpage serve mem:1M disk=%s --listen grpc://127.0.0.1:0 --listen nbd://127.0.0.1:0' % disk)
        hosta = {port: server.line().split()[1].split('/')[2] for port in ('1337', '10809')}
        for n, command in enumerate(todo, 1):
            missing = [x for x in NEEDS if re.search(r'\b%s\b' % x, command) and not shutil.which(x)]
            if missing:
                print('ok %d - %s # SKIP %s is missing (package %s)' % (n, command.replace('#', ''), missing[0], NEEDS[missing[0]]))
                continue
            wrong = run(where, env, command, hosta)
            if wrong:
                failed += 1
                print('\n'.join('# ' + x for x in wrong.splitlines()))
            print('%s %d - %s' % ('not ok' if wrong else 'ok', n, command.replace('#', '')), flush=True)
        more, bad = run_scripts(sys.argv[2:], where, env, len(todo) + 1)
        failed += bad
        print('1..%d' % (len(todo) + more))
    finally:
        if server:
            server.ended(True)
        shutil.rmtree(where, ignore_errors=True)
    return 1 if failed or not todo else 0


sys.exit(main())
