#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""nbd_peers.py FARPAGE [CASE...]: the NBD server, judged by clients that are not ours. A client that is missing is a skip."""
import json
import os
import random
import shutil
import subprocess

from cli_lib import DEADLINE, Skip, cell, equal, has, main, true, wait_for
from nbd_lib import PATH

SIZE = 16 << 20
LONG = os.environ.get('FARPAGE_LONG')


def tool(name, package):
    path = shutil.which(name, path=PATH)
    if not path:
        raise Skip('%s is missing (package %s)' % (name, package))
    return path


def out(w, *args, code=0, timeout=DEADLINE, feed=None):
    p = subprocess.run(list(args), cwd=w.dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout,
                       stdin=subprocess.DEVNULL if feed is None else None, input=feed, env=dict(os.environ, PATH=PATH))
    text = p.stdout.decode(errors='replace')
    if code is not None:
        equal(p.returncode, code, '%s: %s' % (' '.join(args), text[-2000:]))
    return text


def unix(w, *sources, args=()):
    """A server on a unix socket: its URI without an export's name."""
    unix.n = getattr(unix, 'n', 0) + 1
    path = w.path('nbd%d.sock' % unix.n)
    s = w.start('serve', *sources, '--listen', 'nbd+unix:///?socket=' + path, *args)
    s.line()
    return 'nbd+unix:///?socket=' + path


def nbdinfo_tells_what_is_there(w):
    tool('nbdinfo', 'libnbd-bin')
    w.file('a', 100001)
    uri = unix(w, 'mem:16M', 'ro=file:a')
    d = json.loads(out(w, 'nbdinfo', '--json', uri))
    e = d['exports'][0]
    equal(e['export-size'], SIZE, 'size')
    for what in ('can_cache', 'can_df', 'can_fast_zero', 'can_flush', 'can_fua', 'can_multi_conn', 'can_trim', 'can_zero'):
        true(e[what], what)
    equal(e['contexts'], ['base:allocation', 'farpage:local', 'farpage:dirty'], 'contexts')
    names = [x['export-name'] for x in json.loads(out(w, 'nbdinfo', '--list', '--json', uri))['exports']]
    equal(names, ['default', 'ro'], 'exports')
    equal(out(w, 'nbdinfo', '--size', uri.replace('///', '///ro')).strip(), '100001', 'size of the other')
    out(w, 'nbdinfo', '--is', 'structured', uri)
    true('nowhere' in out(w, 'nbdinfo', uri.replace('///', '///nowhere'), code=None), 'an unknown export')


def nbdcopy_moves_every_byte(w):
    tool('nbdcopy', 'libnbd-bin')
    data = w.file('a', SIZE, holes=[(1 << 20, 5 << 20)])
    uri = unix(w, 'mem:16M')
    for args in (['--connections=4'], ['--synchronous'], ['--requests=1'], ['--no-extents'], ['--connections=1'],
                 ['--request-size=33554432'], ['--request-size=4096', '--requests=64'], ['--allocated'], ['--sparse=65536']):
        out(w, 'nbdcopy', *args, '--flush', 'a', uri)
        out(w, 'nbdcopy', *args, uri, 'b')
        true(w.read('b') == data, 'the copy with %s differs' % args)
    has(out(w, 'nbdinfo', '--map', uri), 'hole,zero')
    tcp = w.start('serve', 'file:a', '--listen', 'nbd://127.0.0.1:0').line().split()[1]
    out(w, 'nbdcopy', tcp, 'c')
    true(w.read('c') == data, 'the copy over TCP differs')


NBDSH = r'''
import nbd
h.set_strict_mode(0)
def fails(what, errno, f, *args, **more):
    try:
        f(*args, **more)
    except nbd.Error as e:
        assert e.errno == errno, (what, e.errno)
    else:
        assert False, what + ' went well'
size = h.get_size()
fails('beyond the end', 'EINVAL', h.pread, 8, size - 4)
fails('far beyond', 'EINVAL', h.pread, 8, 1 << 62)
fails('a write beyond', 'ENOSPC', h.pwrite, b'12345678', size - 4)
fails('trim beyond', 'EINVAL', h.trim, 8, size - 4)
fails('zero beyond', 'ENOSPC', h.zero, 8, size - 4)
h.pwrite(b'odd', 1)
assert h.pread(5, 0) == b'\0odd\0'
h.pwrite(b'x' * 70000, 12345, nbd.CMD_FLAG_FUA)
h.zero(30000, 20000, nbd.CMD_FLAG_NO_HOLE)
h.zero(10, 12345, nbd.CMD_FLAG_FAST_ZERO)
h.trim(100, 12400)
h.cache(size, 0)
h.flush()
want = bytearray(b'x' * 70000)
want[20000 - 12345:50000 - 12345] = bytes(30000)
want[:10] = bytes(10)
want[55:155] = bytes(100)
assert h.pread(70000, 12345) == want
# many at once, waited for in another order
bufs = [(nbd.Buffer(4096), i * 4096) for i in range(64)]
cookies = [h.aio_pread(b, off) for b, off in bufs]
for c in reversed(cookies):
    while not h.aio_command_completed(c):
        h.poll(-1)
chunks = []
def chunk(buf, off, status, error):
    chunks.append((off, len(buf), status))
buf = h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF)
assert len(chunks) == 1, chunks
seen = {}
def extent(context, offset, entries, error):
    seen[context] = list(entries)
h.block_status(size, 0, extent)
assert sorted(seen) == ['base:allocation', 'farpage:dirty', 'farpage:local'], seen
print('done')
'''


def script(w, text, uri):
    tool('nbdsh', 'python3-libnbd')
    if subprocess.run(['/usr/bin/python3', '-c', 'import nbd'], stderr=subprocess.DEVNULL).returncode:
        raise Skip('the Python module nbd is missing (package python3-libnbd)')
    with open(w.path('s.py'), 'w') as f:
        f.write('import nbd,sys\nh = nbd.NBD()\n'
                'for x in ("base:allocation", "farpage:local", "farpage:dirty"):\n    h.add_meta_context(x)\n'
                'h.connect_uri(sys.argv[1])\n' + text)
    has(out(w, '/usr/bin/python3', 's.py', uri), 'done')


def nbdsh_misbehaves(w):
    for source in ('mem:16M', 'file:a?size=16M'):
        script(w, NBDSH, unix(w, source))


BLOCKS = r'''
import nbd, os
assert h.get_block_size(nbd.SIZE_MINIMUM) == 4096, h.get_block_size(nbd.SIZE_MINIMUM)
h.set_strict_mode(0)
for what, f, *args in (('read', h.pread, 100, 0), ('read', h.pread, 4096, 1), ('write', h.pwrite, b'x' * 100, 0),
                       ('write', h.pwrite, b'x' * 4096, 512), ('zero', h.zero, 4095, 4096), ('trim', h.trim, 4096, 1)):
    try:
        f(*args)
        assert False, 'an unaligned %s went well' % what
    except nbd.Error as e:
        assert e.errno == 'EINVAL', (what, e.errno)
    assert h.pread(4096, 8192) == bytes(4096)
h.pwrite(b'y' * 4096, 4096)
assert h.pread(12288, 0) == bytes(4096) + b'y' * 4096 + bytes(4096)
try:
    h.pread(4096, 0, 1 << 14)
    assert False, 'an unknown flag went well'
except nbd.Error as e:
    assert e.errno == 'EINVAL', e.errno
print('done')
'''

OVERSIZED = r'''
import nbd
h.set_strict_mode(0)
big = (32 << 20) + 1
for what, errno, f, *args in (('read', 'EINVAL', h.pread, big, 0), ('write', 'EINVAL', h.pwrite, bytes(big), 0),
                              ('write', 'ENOSPC', h.pwrite, bytes(20 << 20), 60 << 20)):
    try:
        f(*args)
        assert False, 'an oversized %s went well' % what
    except nbd.Error as e:
        assert e.errno == errno, (what, e.errno)
    assert h.pread(5, 0) == bytes(5)
h.pwrite(b'z' * (32 << 20), 1 << 20)
assert h.pread(32 << 20, 1 << 20) == b'z' * (32 << 20)
# more at once than the server lets wait, of all kinds, answers awaited last first
cookies = []
for i in range(300):
    b = nbd.Buffer(65536)
    cookies += [h.aio_pread(b, i * 65536 % (40 << 20)), h.aio_zero(512, (40 << 20) + i * 512), h.aio_flush()]
for c in reversed(cookies):
    while not h.aio_command_completed(c):
        h.poll(-1)
print('done')
'''


def nbdsh_minds_no_blocks(w):
    os.mkdir(w.path('d'))
    script(w, BLOCKS, unix(w, 'dir:d?size=1M&chunk=4096'))


def nbdsh_asks_for_too_much(w):
    script(w, OVERSIZED, unix(w, 'mem:64M'))


def qemu_img_agrees(w):
    tool('qemu-img', 'qemu-utils')
    data = w.file('a', SIZE, holes=[(1 << 20, 5 << 20)])
    uri = unix(w, 'file:r?size=16M', 'q=mem:16M')
    has(out(w, 'qemu-img', 'info', uri), '16 MiB')
    out(w, 'qemu-img', 'convert', '-n', '-f', 'raw', '-O', 'raw', 'a', uri)
    has(out(w, 'qemu-img', 'compare', '-f', 'raw', '-F', 'raw', 'a', uri), 'identical')
    true(w.read('r') == data, 'the file differs')
    ranges = json.loads(out(w, 'qemu-img', 'map', '--output=json', '-f', 'raw', uri))
    equal(sum(r['length'] for r in ranges), SIZE, 'the map\'s ranges')
    true(any(r['zero'] for r in ranges), 'a hole in the map')
    out(w, 'qemu-img', 'convert', '-n', '-W', '-m', '16', '-f', 'raw', '-O', 'raw', 'a', uri)
    out(w, 'qemu-img', 'convert', '-m', '16', '-c', '-f', 'raw', '-O', 'qcow2', uri, 'c.qcow2')
    has(out(w, 'qemu-img', 'compare', '-f', 'qcow2', '-F', 'raw', 'c.qcow2', uri), 'identical')
    w.file('b', SIZE, seed=2)
    has(out(w, 'qemu-img', 'compare', '-f', 'raw', '-F', 'raw', 'b', uri, code=1), 'mismatch at offset 0')
    q = uri.replace('///', '///q')
    out(w, 'qemu-img', 'create', '-f', 'qcow2', q, '10M')
    out(w, 'qemu-io', '-f', 'qcow2', '-c', 'write -P 5 0 3M', '-c', 'discard 1M 1M', q)
    has(out(w, 'qemu-img', 'check', '-f', 'qcow2', q), 'No errors were found')
    out(w, 'qemu-img', 'snapshot', '-c', 'one', q)
    out(w, 'qemu-io', '-f', 'qcow2', '-c', 'write -P 6 0 64k', '-c', 'read -P 6 0 64k', '-c', 'read -P 5 64k 64k', q)
    out(w, 'qemu-img', 'snapshot', '-a', 'one', q)
    out(w, 'qemu-io', '-f', 'qcow2', '-c', 'read -P 5 0 1M', q)
    has(out(w, 'qemu-img', 'check', '-f', 'qcow2', q), 'No errors were found')


def qemu_io_patterns(w):
    tool('qemu-io', 'qemu-utils')
    uri = unix(w, 'mem:16M')
    rnd = random.Random(1)
    want, commands = {}, []
    for i in range(200):
        block, p = rnd.randrange(256), rnd.randrange(1, 256)
        kind = rnd.choice(['write -P %d' % p, 'write -f -P %d' % p, 'aio_write -P %d' % p, 'write -z', 'write -z -u'])
        commands.append('%s %d 64k' % (kind, block << 16))
        if kind.startswith('aio'):
            commands.append('aio_flush')
        want[block] = 0 if '-z' in kind else p
    commands += ['flush'] + ['read -P %d %d 64k' % (p, b << 16) for b, p in want.items()]
    text = out(w, 'qemu-io', '-f', 'raw', uri, feed=('\n'.join(commands) + '\nq\n').encode())
    true('failed' not in text.lower() and 'error' not in text.lower(), text[-1000:])
    equal(text.count('read 65536/65536'), len(want), 'reads')


def fio_verifies(w):
    tool('fio', 'fio')
    uri = unix(w, 'mem:16M')
    if 'nbd' not in out(w, 'fio', '--enghelp'):
        raise Skip('this fio has no nbd engine')
    for depth in ('1', '16'):
        text = out(w, 'fio', '--name=x', '--ioengine=nbd', '--uri=' + uri, '--rw=randwrite', '--bssplit=512/20:4k/60:100k/20',
                   '--blockalign=512', '--size=16m', '--iodepth=' + depth, '--verify=crc32c', '--do_verify=1', '--verify_fatal=1',
                   '--number_ios=3000' if not LONG else '--loops=10', timeout=300)
        has(text, 'err= 0')


def nbdfuse_shows_it(w):
    tool('nbdfuse', 'libnbd-bin')
    if not os.access('/dev/fuse', os.W_OK):
        raise Skip('/dev/fuse is missing or not open to this user')
    data = bytearray(w.file('a', SIZE))
    uri = unix(w, 'file:a')
    os.mkdir(w.path('m'))
    p = subprocess.Popen(['nbdfuse', 'm', uri], cwd=w.dir)
    try:
        wait_for(lambda: os.path.exists(w.path('m/nbd')), 'the file')
        true(w.read('m/nbd') == data, 'the file differs')
        with open(w.path('m/nbd'), 'r+b', buffering=0) as f:
            for off, n in ((0, 1), (4095, 2), (1 << 20, 300000), (SIZE - 7, 7)):
                data[off:off + n] = b'n' * n
                f.seek(off)
                f.write(data[off:off + n])
            os.fsync(f.fileno())
        true(w.read('a') == data, 'what was written is not there')
        true(w.read('m/nbd') == data, 'the file differs after writes')
    finally:
        subprocess.run(['fusermount3', '-u', w.path('m')])
        p.wait(DEADLINE)


def nbd_client_negotiates(w):
    tool('nbd-client', 'nbd-client')
    s = w.start('serve', 'mem:1M', 'second=mem:2M', '--listen', 'nbd://127.0.0.1:0')
    port = s.line().split()[1].split(':')[2].split('/')[0]
    text = out(w, 'nbd-client', '-l', '127.0.0.1', port, code=None)
    has(text, 'default', 'second')
    # The kernel comes in after the negotiation, if it knows NBD at all: what it is told shows that all went well.
    if os.path.exists('/dev/nbd0'):
        raise Skip('this kernel has NBD: the rest would use its devices')
    for name, size in (('default', 1), ('second', 2)):
        for n in (1, 4):
            text = out(w, 'nbd-client', '-N', name, '-C', str(n), '127.0.0.1', port, code=None)
            equal(text.count('size = %dMB' % size), n, text)
    has(out(w, 'nbd-client', '-N', 'nowhere', '127.0.0.1', port, code=1), 'there is no such export')
    path = w.path('c.sock')
    w.start('serve', 'mem:3M', '--listen', 'nbd+unix:///?socket=' + path).line()
    has(out(w, 'nbd-client', '-u', path, '-N', '', code=None), 'size = 3MB')


def errors_of_the_store_keep_the_connection(w):
    tool('qemu-io', 'qemu-utils')
    uri = unix(w, 'mem:16M', args=['--layer', 'fault:rate=0.3,ops=read,seed=1'])
    text = out(w, 'qemu-io', '-f', 'raw', uri, code=None,
               feed=''.join('read %dk 4k\n' % (i * 4) for i in range(200)).encode() + b'q\n')
    bad, good = text.count('Input/output error'), text.count('read 4096/4096')
    true(bad and good and bad + good == 200, '%d good, %d bad' % (good, bad))


def managed(w, *args):
    """A managed mount of a.img over gRPC on nbd.sock: its URI."""
    w.file('a', SIZE)
    s, uri = w.serve('file:a')
    os.mkdir(w.path('t'))
    m = w.start('mount', uri, 't', '--mode', 'managed', '--as', 'nbd-socket', '--quiet', *args)
    path = m.line()
    equal(path, w.path('t/nbd.sock'), 'path')
    return m, 'nbd+unix:///?socket=' + path


def a_mount_as_a_socket(w):
    tool('qemu-io', 'qemu-utils')
    tool('nbdcopy', 'libnbd-bin')
    m, uri = managed(w, '--push-interval', '1h')
    before = w.read('a')
    out(w, 'nbdcopy', uri, 'b')
    true(w.read('b') == before, 'the mount differs')
    # cached writes: the flush at the end is this command's
    out(w, 'qemu-io', '-f', 'raw', '-t', 'writeback', uri, feed=b'write -P 7 1M 64k\nflush\nq\n')
    equal(w.read('a')[1 << 20:(1 << 20) + 65536], b'\7' * 65536, 'flushed to the remote')
    equal(w.status('t')['bytes'] if 'bytes' in w.status('t') else SIZE, SIZE, 'status')
    w.run('stop', 't', code=0)
    equal(m.p.wait(DEADLINE), 0, 'exit code: ' + m.err())
    true(not os.path.exists(w.path('t/nbd.sock')), 'the socket is left')


def contexts_of_a_mount(w):
    tool('nbdinfo', 'libnbd-bin')
    tool('nbdcopy', 'libnbd-bin')
    m, uri = managed(w, '--pull-workers', '0', '--push-interval', '1h')
    ones = lambda context: sum(int(x.split()[0]) for x in out(w, 'nbdinfo', '--map=' + context, '--totals', uri).splitlines()
                               if x.split()[2] == '1')
    equal(ones('farpage:local'), 0, 'local at first')
    out(w, '/usr/bin/python3', '-c', 'import nbd\nh=nbd.NBD()\nh.connect_uri("%s")\nh.pread(4096,0)\nh.flush()\nh.pwrite(b"x"*65536,1<<20)\n'
        % uri)
    true(ones('farpage:local') >= 131072, 'local after a read')
    true(ones('farpage:dirty') >= 65536, 'dirty after a write')
    out(w, '/usr/bin/python3', '-c', 'import nbd\nh=nbd.NBD()\nh.connect_uri("%s")\nh.flush()' % uri)
    equal(ones('farpage:dirty'), 0, 'dirty after a flush')


def cache_starts_a_pull(w):
    tool('nbdinfo', 'libnbd-bin')
    m, uri = managed(w, '--layer', 'delay:rtt=20ms,rate=1M')
    at = 12 << 20

    def local():
        for line in out(w, 'nbdinfo', '--map=farpage:local', uri).splitlines():
            off, n, state = [int(x) for x in line.split()[:3]]
            if off <= at < off + n:
                return state
    equal(local(), 0, 'local before')
    out(w, '/usr/bin/python3', '-c', 'import nbd\nh=nbd.NBD()\nh.connect_uri("%s")\nh.cache(65536,%d)' % (uri, at))
    wait_for(local, 'what CACHE has asked for', 6)  # in its turn it would come after 12 s
    m.end()


def run_gives_its_exit_code(w):
    w.file('a', SIZE)
    os.mkdir(w.path('t'))
    p = w.run('mount', 'file:a', 't', '--as', 'nbd-socket', '--quiet', '--run', 'echo "$FARPAGE" "$FARPAGE_URI"; exit 9')
    equal(p.returncode, 9, 'exit code: ' + p.err)
    sock = w.path('t/nbd.sock')
    has(p.out, '%s nbd+unix:///?socket=%s' % (sock, sock))
    p = w.run('serve', 'file:a', '--listen', 'nbd://127.0.0.1:0', '--run', 'echo "$FARPAGE_URI"; kill -9 $$')
    equal(p.returncode, 137, 'exit code: ' + p.err)
    has(p.out.splitlines()[1], 'nbd://127.0.0.1:', '/default')
    equal(w.run('serve', 'file:a', '--listen', 'nbd://127.0.0.1:0', '--run', 'true').returncode, 0, 'exit code')


AS_SERVER = 'farpage is the server'
CELLS = {
    'nbdinfo': [nbdinfo_tells_what_is_there, contexts_of_a_mount, cache_starts_a_pull],
    'nbdcopy': [nbdcopy_moves_every_byte],
    'nbdsh': [nbdsh_misbehaves, nbdsh_minds_no_blocks, nbdsh_asks_for_too_much],
    'qemu-img': [qemu_img_agrees],
    'qemu-io': [qemu_io_patterns, errors_of_the_store_keep_the_connection, a_mount_as_a_socket],
    'fio': [fio_verifies],
    'nbdfuse': [nbdfuse_shows_it],
    'nbd-client': [nbd_client_negotiates],
}
for peer, cases in CELLS.items():
    for case in cases:
        cell(peer, AS_SERVER)(case)

main([case for cases in CELLS.values() for case in cases] + [run_gives_its_exit_code])
