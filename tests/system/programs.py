#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""programs.py FARPAGE FSX [CASE...]: other people's programs on a managed mount over gRPC, while it pulls and pushes."""
import os
import shutil
import subprocess
import sys

FSX = os.path.abspath(sys.argv.pop(2))
from cli_lib import FARPAGE, Skip, equal, main, true  # noqa: E402: reads sys.argv

WAN = 'delay:rtt=2ms,rate=200M'
LONG = 30 if os.environ.get('FARPAGE_LONG') else 1  # times the operations, and seeds that differ from run to run


def need(*programs):
    for p in programs:
        if not shutil.which(p):
            raise Skip('%s is not installed' % p)


def call(w, *args, timeout=120):
    p = subprocess.run(args, cwd=w.dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    equal(p.returncode, 0, '%s: %s' % (' '.join(args), p.stdout.decode(errors='replace')[-1500:]))
    return p.stdout.decode(errors='replace')


def mounted(w, size, *options):
    """(mount, path) of an empty region of `size` served from the file a."""
    with open(w.path('a'), 'wb') as f:
        f.truncate(size)
    w.file('t', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 't', '--mode', 'managed', '--layer', WAN, '--push-interval', '50ms', *options)
    return m, m.path


def same(w, m):
    """After the end both hosts hold the same bytes: what the mount showed is on the server."""
    shown = w.read('t')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(w.read('a'), shown, 'the server')


def fsx(w, path, operations, seed):
    print('#', call(w, FSX, path, str(operations * LONG), *([str(seed)] if LONG == 1 else []), timeout=600).splitlines()[0])


def fsx_managed(w):
    m, path = mounted(w, (4 << 20) + 777)
    fsx(w, path, 3000, 1)
    same(w, m)


def fsx_evicting(w):
    m, path = mounted(w, 4 << 20, '--local-max', '512K', '--dirty-max', '256K', '--chunk', '16K')
    fsx(w, path, 1500, 2)
    same(w, m)


def fsx_direct(w):
    with open(w.path('a'), 'wb') as f:
        f.truncate(1 << 20)
    w.file('t', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 't', '--mode', 'direct')
    call(w, FSX, m.path, '1500', '3')
    same(w, m)


def fio_verifies(w):
    need('fio')
    m, path = mounted(w, 32 << 20)
    for engine, direct in (('psync', '0'), ('psync', '1'), ('mmap', '0')):
        call(w, 'fio', '--name=v', '--filename=' + path, '--size=32m', '--rw=randrw', '--bs=4k-64k', '--verify=crc32c',
             '--ioengine=' + engine, '--direct=' + direct, '--io_size=16m', '--fsync=64', '--verify_fatal=1',
             '--fallocate=none', '--allow_file_create=0', '--end_fsync=1', '--numjobs=1', '--randseed=7')
    same(w, m)


def fsx_on_a_machine_under_stress(w):
    """stress-ng takes memory and CPUs while fsx runs on the mount; on files of a region it runs in the next case."""
    need('stress-ng')
    m, path = mounted(w, 16 << 20)
    with open(w.path('stress'), 'wb') as out:
        p = subprocess.Popen(['stress-ng', '--mmap', '2', '--mmap-bytes', '4m', '--cpu', '2', '--temp-path', w.dir,
                              '--timeout', '30s'], cwd=w.dir, stdout=out, stderr=subprocess.STDOUT)
    try:
        fsx(w, path, 500, 4)
        true(p.poll() in (None, 0), 'stress-ng: %s' % w.read('stress').decode(errors='replace'))
    finally:
        p.terminate()
        p.wait(30)
    same(w, m)


def a_file_system_in_the_region(w):
    if os.geteuid() != 0:
        raise Skip('a loop mount needs root')
    need('mkfs.ext4', 'losetup')
    if not os.path.exists('/dev/loop-control'):
        raise Skip('this kernel has no loop devices')
    m, path = mounted(w, 64 << 20)
    call(w, 'mkfs.ext4', '-q', '-F', path)
    os.mkdir(w.path('fs'))
    p = subprocess.run(['mount', '-o', 'loop', path, w.path('fs')], stderr=subprocess.PIPE)
    if p.returncode:
        raise Skip('loop mount: ' + p.stderr.decode().strip())
    try:
        if shutil.which('stress-ng'):
            call(w, 'stress-ng', '--hdd', '1', '--hdd-bytes', '8m', '--hdd-ops', '400', '--temp-path', w.path('fs'),
                 '--verify', '--timeout', '20s')
        shutil.copy(sys.argv[1], w.path('fs/copy'))
        with open(sys.argv[1], 'rb') as a, open(w.path('fs/copy'), 'rb') as b:
            true(a.read() == b.read(), 'a copied file differs')
    finally:
        call(w, 'umount', w.path('fs'))
    equal(m.end(), 0, 'exit code: ' + m.err())
    call(w, 'e2fsck', '-f', '-n', w.path('a'))


def a_block_device(w):
    """file: on a block device, buffered and direct: its size is found, what is copied to it is on it."""
    if os.geteuid() != 0 or not os.path.exists('/dev/loop-control'):
        raise Skip('a loop device needs root and a kernel that has them')
    data = w.file('a', (4 << 20) + 512)
    w.file('disk', (4 << 20) + 512, seed=9)
    p = subprocess.run(['losetup', '--find', '--show', w.path('disk')], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if p.returncode:
        raise Skip('losetup: ' + p.stderr.decode().strip())
    dev = p.stdout.decode().strip()
    try:
        for query in ('', '?direct=1'):
            call(w, FARPAGE, 'copy', 'file:a', 'file:' + dev + query, '--verify')
            call(w, FARPAGE, 'copy', 'file:' + dev + query, 'file:back')
            true(w.read('back') == data, 'what came back from ' + dev + query + ' differs')
            r = w.run('copy', 'file:a?size=1', 'file:' + dev, code=2)
            true('size' in r.err, r.err)
    finally:
        call(w, 'losetup', '--detach', dev)
    true(w.read('disk') == data, 'the disk differs')


def sqlite_with_a_journal_beside_it(w):
    need('sqlite3')
    db = w.path('a')
    call(w, 'sqlite3', db, 'PRAGMA page_size=4096; CREATE TABLE t(id INTEGER PRIMARY KEY, v BLOB); CREATE TABLE pad(v); '
         'INSERT INTO pad SELECT randomblob(1000) FROM (WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c '
         'WHERE x<8000) SELECT x FROM c); DROP TABLE pad;')
    w.file('t', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 't', '--mode', 'managed', '--layer', WAN, '--layer', 'fault:rate=0.02,errno=ECONNRESET')
    for k in range(10):
        call(w, 'sqlite3', m.path, 'INSERT INTO t(v) SELECT randomblob(500) FROM (WITH RECURSIVE c(x) AS (SELECT 1 UNION '
             'ALL SELECT x+1 FROM c WHERE x<100) SELECT x FROM c); UPDATE t SET v = randomblob(400) WHERE id %% 7 = %d;' % (k % 7))
    equal(call(w, 'sqlite3', m.path, 'PRAGMA integrity_check; SELECT count(*) FROM t'), 'ok\n1000\n', 'here')
    same(w, m)
    equal(call(w, 'sqlite3', db, 'PRAGMA integrity_check; SELECT count(*) FROM t'), 'ok\n1000\n', 'there')


main([fsx_managed, fsx_evicting, fsx_direct, fio_verifies, fsx_on_a_machine_under_stress, a_file_system_in_the_region, a_block_device,
      sqlite_with_a_journal_beside_it])
