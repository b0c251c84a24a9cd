#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""cli_mount.py FARPAGE [CASE...]: farpage mount and the verbs that speak to it, through real FUSE."""
import mmap
import os
import shutil
import signal
import socket
import subprocess
import threading
import time

from cli_lib import Skip, equal, has, main, message, need_fuse, true, wait_for

SLOW = 'delay:rtt=20ms,rate=4M'


def as_a_file_in_a_directory(w):
    data = w.file('a', 300001)
    os.mkdir(w.path('d'))
    m = w.mount('file:a', 'd')
    equal(m.path, w.path('d/region'), 'the first line')
    equal(os.listdir(w.path('d')), ['region'], 'directory')
    equal(w.read('d/region'), data, 'content')
    has(m.err(), 'direct')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(os.listdir(w.path('d')), [], 'directory afterwards')


def over_a_file(w):
    data = w.file('a', 300001)
    w.file('b', 0)
    m = w.mount('file:a', 'b', '--mode', 'managed')
    equal(m.path, w.path('b'), 'the first line')
    equal(w.read('b'), data, 'content')
    equal(m.end(signal.SIGINT), 0, 'exit code: ' + m.err())
    equal(w.read('b'), b'', 'the file that was covered')


def what_was_written_is_saved_at_the_end(w):
    """W-A6 (D2): without an fsync, the end is one."""
    for mode in ('direct', 'managed'):
        data = bytearray(w.file('a', 1 << 20))
        w.file('b', 0)
        s, uri = w.serve('file:a')
        m = w.mount(uri, 'b', '--mode', mode, '--layer', 'delay:rtt=5ms')
        has(m.err(), mode + ' (round trip ')
        with open(w.path('b'), 'r+b') as f:
            f.seek(12345)
            f.write(b'written')
        data[12345:12352] = b'written'
        equal(m.end(), 0, 'exit code: ' + m.err())
        equal(w.read('a'), bytes(data), mode)
        equal(s.end(), 0, 'exit code')


def auto_takes_the_round_trip(w):
    w.file('a', 100000)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    for layer, mode in (('delay:rtt=20ms', 'managed'), ('tracked', 'direct')):
        m = w.mount(uri, 'b', '--layer', layer)
        equal(w.status('b')['mode'], mode, layer)
        has(m.err(), mode + ' (round trip ')
        equal(m.end(), 0, 'exit code')
    m = w.mount(uri, 'b', '--local', 'mem:')
    equal(w.status('b')['mode'], 'managed', 'with --local')
    equal(m.end(), 0, 'exit code')


def the_name_is_the_exports(w):
    b = w.file('b', 2000, seed=2)
    w.file('a', 1000)
    os.mkdir(w.path('d'))
    s, uri = w.serve('file:a', 'second=file:b')
    m = w.mount(uri.rsplit('/', 1)[0] + '/second', 'd')
    equal(w.read('d/second'), b, 'content')
    equal(m.end(), 0, 'exit code')
    m = w.mount(uri, 'd', '--name', 'mine')
    equal(m.path, w.path('d/mine'), 'path')


def status_flush_wait_stop(w):
    data = w.file('a', 4 << 20)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--layer', SLOW, '--push-workers', '0')
    st = w.status('b')
    equal((st['mode'], st['size'], st['source'], st['path']), ('managed', 4 << 20, uri, w.path('b')), 'status')
    true(st['local'] < st['size'], 'all is local already')
    has(w.run('wait', 'b', '--local', '100%', '--timeout', '50ms', code=4).err, 'deadline')
    w.run('wait', 'b', '--local', '20%', '--timeout', '30s', code=0)
    true(w.status('b')['local'] * 5 >= 4 << 20, 'not 20 %')
    w.run('wait', 'b', '--local', '3M-3200K,4000K-', '--timeout', '30s', code=0)
    with open(w.path('b'), 'r+b') as f:
        f.seek(100)
        f.write(b'abc')
    wait_for(lambda: w.status('b')['dirty'] > 0, 'dirty bytes')
    equal(w.read('a'), data, 'nothing is pushed yet')
    w.run('flush', 'b', code=0)
    equal(w.read('a'), data[:100] + b'abc' + data[103:], 'after flush')
    equal(w.status('b')['dirty'], 0, 'dirty')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    wait_for(lambda: 'b  all local' in m.err(), 'the line "all local"')
    w.run('stop', 'b', code=0)
    equal(m.p.wait(30), 0, 'exit code')
    has(w.run('status', 'b', code=1).err, 'nothing is mounted')


def flush_takes_what_a_mapping_holds(w):
    data = w.file('a', 1 << 20)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--mode', 'managed')
    with open(w.path('b'), 'r+b') as f, mmap.mmap(f.fileno(), 1 << 20) as p:
        p[5000:5003] = b'xyz'
        w.run('flush', 'b', code=0)
        equal(w.read('a'), data[:5000] + b'xyz' + data[5003:], 'after flush')
    equal(m.end(), 0, 'exit code')


def evict_and_pull(w):
    data = w.file('a', 2 << 20)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--mode', 'managed', '--pull-workers', '0')
    equal(w.status('b')['local'], 0, 'local at first')
    equal(w.read('b'), data, 'content')
    wait_for(lambda: w.status('b')['local'] == 2 << 20, 'all local')
    w.run('evict', 'b', '0-1M', code=0)
    equal(w.status('b')['local'], 1 << 20, 'local after evict')
    has(w.run('evict', 'b', 'x', code=2).err, "'x'")
    w.run('wait', 'b', '--local', '0-1M', '--timeout', '30s', code=0)
    equal(w.status('b')['local'], 2 << 20, 'local after wait')
    equal(w.read('b'), data, 'content')


def in_the_background(w):
    need_fuse()
    data = w.file('a', 100000)
    os.mkdir(w.path('d'))
    p = w.run('mount', 'file:a', 'd', '--background', code=0)
    equal(p.out, w.path('d/region') + '\n', 'output')
    try:
        equal(w.read('d/region'), data, 'content')
        pid = w.status('d')['pid']
    finally:
        w.run('stop', 'd', code=0)
    wait_for(lambda: not os.path.exists('/proc/%d' % pid), 'its end')
    p = w.run('mount', 'file:nowhere', 'd', '--background', code=1)
    has(p.err, 'nowhere')
    equal(p.out, '', 'output')


def run_returns_the_commands_code(w):
    need_fuse()
    data = w.file('a', 100000)
    os.mkdir(w.path('d'))
    equal(w.run('mount', 'file:a', 'd', '--run', 'cat "$FARPAGE" >copy; exit 7', code=7).out, w.path('d/region') + '\n', 'output')
    equal(w.read('copy'), data, 'what the command saw')
    w.run('mount', 'file:a', 'd', '--mode', 'managed', '--run', 'printf new | dd of="$FARPAGE" conv=notrunc 2>/dev/null', code=0)
    equal(w.read('a'), b'new' + data[3:], 'what the command wrote')
    equal(w.run('mount', 'file:a', 'd', '--run', 'kill -9 $$').returncode, 137, 'a killed command')


def a_target_is_taken_once(w):
    w.file('a', 1000)
    os.mkdir(w.path('d'))
    m = w.mount('file:a', 'd')
    p = w.run('mount', 'file:a', 'd', code=1)
    has(p.err, 'another farpage', 'farpage stop')
    message(p.err)
    equal(m.end(), 0, 'exit code')


def a_killed_mount_leaves_a_clear_message(w):
    w.file('a', 1000)
    os.mkdir(w.path('d'))
    m = w.mount('file:a', 'd')
    m.p.kill()
    m.p.wait()
    p = w.run('mount', 'file:a', 'd')
    if p.returncode:  # the kernel keeps the dead mount; its removal is named
        has(p.err, 'fusermount3 -u')
        message(p.err)
    subprocess.run(['fusermount3', '-uz', w.path('d')], stderr=subprocess.DEVNULL)
    m = w.mount('file:a', 'd')  # the control socket that was left is no obstacle
    equal(w.status('d')['size'], 1000, 'size')
    equal(m.end(), 0, 'exit code')


def a_dead_remote_means_exit_3(w):
    w.file('a', 1 << 20)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--mode', 'managed', '--deadline', '2s', '--push-workers', '0')
    w.run('wait', 'b', code=0)
    s.p.kill()
    s.p.wait()
    with open(w.path('b'), 'r+b') as f:
        f.write(b'x' * 70000)
    p = w.run('flush', 'b')
    true(p.returncode in (1, 4), 'flush: %d' % p.returncode)
    has(p.err, 'cannot flush')
    message(p.err)
    equal(m.end(), 3, 'exit code: ' + m.err())
    has(m.err(), 'not on ' + uri, 'lost')
    message(m.err())


def stop_now_says_what_is_lost(w):
    data = w.file('a', 1 << 20)
    w.file('b', 0)
    w.file('c', 1 << 20, seed=3)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--mode', 'managed', '--push-workers', '0', '--local', 'file:c')
    with open(w.path('b'), 'r+b') as f:
        f.write(b'x' * 65536)
    wait_for(lambda: w.status('b')['dirty'] > 0, 'dirty bytes')
    p = w.run('stop', 'b', '--now', code=3)
    has(p.err, '65536 bytes', 'file:c')
    equal(m.p.wait(30), 3, 'exit code')
    has(m.err(), '65536 bytes', 'kept in file:c', 'mount it again')
    equal(w.read('a'), data, 'the remote')
    w.file('b', 0)
    m = w.mount(uri, 'b', '--mode', 'managed')
    w.run('stop', 'b', '--now', code=0)
    equal(m.p.wait(30), 0, 'exit code with nothing unsaved')


def a_second_signal_gives_up(w):
    w.file('a', 1 << 20)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--mode', 'managed', '--push-workers', '0', '--on-fail', 'wait')
    w.run('wait', 'b', code=0)
    s.p.send_signal(signal.SIGSTOP)
    with open(w.path('b'), 'r+b') as f:
        f.write(b'x' * 1000)
    wait_for(lambda: w.status('b')['dirty'] > 0, 'dirty bytes')
    m.p.send_signal(signal.SIGTERM)
    tasks = '/proc/%d/task' % m.p.pid
    wait_for(lambda: any('far-finish' in open('%s/%s/comm' % (tasks, t)).read() for t in os.listdir(tasks)),
             'the orderly end to begin')
    m.p.send_signal(signal.SIGTERM)
    equal(m.p.wait(30), 130, 'exit code: ' + m.err())
    has(m.err(), 'second signal', 'not on ' + uri)
    message(m.err())
    s.p.send_signal(signal.SIGCONT)
    wait_for(lambda: w.read('b') == b'', 'the path to be free again')


def a_long_flush_is_not_cut_off(w):
    """More unsaved bytes than the link carries within the deadline: fsync and the end take their time."""
    w.file('a', 1 << 20)
    os.truncate(w.path('a'), 8 << 20)
    w.file('b', 0)
    for end in ('fsync', 'signal'):
        m = w.mount('file:a', 'b', '--mode', 'managed', '--layer', 'delay:rtt=10ms,rate=1500K', '--deadline', '1500ms',
                    '--pull-workers', '0', '--push-workers', '2' if end == 'fsync' else '0')
        data = os.urandom(4 << 20)
        with open(w.path('b'), 'r+b') as f:
            f.write(data)
            f.flush()
            if end == 'fsync':
                os.fsync(f.fileno())
                equal(w.read('a')[:4 << 20], data, 'the remote after fsync')
        equal(m.end(), 0, 'exit code: ' + m.err())
        equal(w.read('a')[:4 << 20], data, 'the remote')


def pieces_do_not_grow_into_the_deadline(w):
    """A long way makes small pieces look slow; larger ones would not get through in time."""
    w.file('a', 4 << 20)
    w.file('b', 0)
    m = w.mount('file:a', 'b', '--mode', 'managed', '--layer', 'delay:rtt=200ms,rate=1500K', '--deadline', '1500ms',
                '--chunk', '512K', '--pull-workers', '0', '--push-workers', '2')
    data = os.urandom(4 << 20)
    with open(w.path('b'), 'r+b') as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    equal(w.read('a'), data, 'the remote after fsync')
    equal(m.end(), 0, 'exit code: ' + m.err())


def an_open_file_is_served_until_it_closes(w):
    data = w.file('a', 1 << 20)
    w.file('b', 0)
    m = w.mount('file:a', 'b', '--mode', 'managed')
    with open(w.path('b'), 'r+b', buffering=0) as f:
        equal(f.read(3), data[:3], 'before')
        m.p.send_signal(signal.SIGTERM)
        wait_for(lambda: w.read('b') == b'', 'the path to be free')
        f.seek(500000)
        equal(f.read(3), data[500000:500003], 'after')
        f.seek(0)
        f.write(b'late')
    equal(m.p.wait(30), 0, 'exit code: ' + m.err())
    equal(w.read('a')[:4], b'late', 'what was written last')
    has(m.err(), 'held open by')


def a_deadline_gives_an_error_not_a_hang(w):
    w.file('a', 1 << 20)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--mode', 'managed', '--pull-workers', '0', '--deadline', '1s')
    s.p.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        with open(w.path('b'), 'rb', buffering=0) as f:
            f.seek(300000)
            f.read(100)
        raise AssertionError('the read succeeded')
    except OSError as e:
        true(time.monotonic() - began < 30, 'it took %.1f s' % (time.monotonic() - began))
        true(e.errno in (5, 110), 'errno %d' % e.errno)
    s.p.send_signal(signal.SIGCONT)

    def read_works():
        try:
            return len(w.read('b')) == 1 << 20
        except OSError:
            return False
    wait_for(read_works, 'the mount to work again')
    equal(m.end(), 0, 'exit code: ' + m.err())


def waiting_for_ever_is_said_and_ended_by_stop(w):
    w.file('a', 1 << 20)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--mode', 'managed', '--pull-workers', '0', '--on-fail', 'wait', '--deadline', '1s')
    s.p.send_signal(signal.SIGSTOP)
    reader = subprocess.Popen(['dd', 'if=' + w.path('b'), 'of=/dev/null', 'bs=4096', 'count=1', 'skip=50'],
                              stderr=subprocess.DEVNULL)
    wait_for(lambda: 'has not answered for 5 s' in m.err(), 'the message')
    true(reader.poll() is None, 'the reader does not wait')
    true(w.status('b')['blocked'] >= 1, 'blocked')
    w.run('stop', 'b', '--now', code=0)
    equal(m.p.wait(30), 0, 'exit code: ' + m.err())
    true(reader.wait(30) != 0, 'the read succeeded')


def the_file_has_its_size_for_ever(w):
    w.file('a', 5000)
    w.file('b', 0)
    m = w.mount('file:a', 'b')
    with open(w.path('b'), 'r+b', buffering=0) as f:
        try:
            os.ftruncate(f.fileno(), 100)
            raise AssertionError('truncated')
        except PermissionError:
            pass
        try:
            os.pwrite(f.fileno(), b'x', 5000)
            raise AssertionError('written past the end')
        except OSError as e:
            true(e.errno in (28, 27), 'errno %d' % e.errno)
    equal(os.path.getsize(w.path('b')), 5000, 'size')


def a_read_only_mount(w):
    data = w.file('a', 5000)
    w.file('b', 0)
    m = w.mount('file:a', 'b', '--read-only')
    equal(w.read('b'), data, 'content')
    try:
        with open(w.path('b'), 'r+b') as f:
            f.write(b'x')
        raise AssertionError('written')
    except OSError as e:
        true(e.errno in (30, 13, 1), 'errno %d' % e.errno)
    w.run('flush', 'b', code=0)
    equal(m.end(), 0, 'exit code')


def ragged_sizes(w):
    for size in (1, 511, 4095, 4097, 65537, 200001):
        data = bytearray(w.file('a', size, seed=size))
        w.file('b', 0)
        for mode in ('direct', 'managed'):
            m = w.mount('file:a', 'b', '--mode', mode)
            with open(w.path('b'), 'r+b') as f:
                equal(f.read(), bytes(data), '%d bytes, %s' % (size, mode))
                f.seek(size - 1)
                f.write(b'Z' if mode == 'direct' else b'Y')
            data[-1:] = b'Z' if mode == 'direct' else b'Y'
            equal(m.end(), 0, 'exit code')
            equal(w.read('a'), bytes(data), 'remote of %d bytes, %s' % (size, mode))


def the_control_socket_can_be_named(w):
    w.file('a', 5000)
    w.file('b', 0)
    m = w.mount('file:a', 'b', '--control', w.path('c.sock'))
    equal(oct(os.stat(w.path('c.sock')).st_mode & 0o777), '0o600', 'mode of the socket')
    has(w.run('status', '--control', w.path('c.sock'), code=0).out, 'direct')
    has(w.run('status', 'b', code=1).err, 'nothing is mounted', '--control')
    w.run('stop', '--control', w.path('c.sock'), code=0)
    equal(m.p.wait(30), 0, 'exit code')
    true(not os.path.exists(w.path('c.sock')), 'the socket is left')


def garbage_on_the_control_socket(w):
    w.file('a', 5000)
    w.file('b', 0)
    m = w.mount('file:a', 'b', '--control', w.path('c.sock'))
    for data in (b'\n', b'{}\n', b'[1]\n', b'{"op":7}\n', b'{"op":"frob"}\n', b'x' * 100000, b'\xff\x00\n',
                 b'{"op":"wait","percent":-5,"ranges":7}\n', b'{"op":"wait","ranges":"5-x"}\n', b'{"op":"flush","timeout_ms":"x"}\n'):
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(30)
            s.connect(w.path('c.sock'))
            try:
                s.sendall(data)
                s.shutdown(socket.SHUT_WR)
                s.recv(65536)
            except (BrokenPipeError, ConnectionResetError):
                pass
    equal(w.run('status', '--control', w.path('c.sock'), code=0).err, '', 'messages')
    idle = []
    for _ in range(20):  # more silent callers than slots
        s = socket.socket(socket.AF_UNIX)
        s.connect(w.path('c.sock'))
        idle.append(s)
    for s in idle:
        s.close()
    wait_for(lambda: w.run('status', '--control', w.path('c.sock')).returncode == 0, 'an answer')
    equal(m.end(), 0, 'exit code')


def unmounted_by_somebody_else(w):
    data = w.file('a', 100000)
    w.file('b', 0)
    m = w.mount('file:a', 'b', '--mode', 'managed', '--push-workers', '0')
    with open(w.path('b'), 'r+b') as f:
        f.write(b'new')
    subprocess.run(['umount' if os.geteuid() == 0 else 'fusermount3'] + ([] if os.geteuid() == 0 else ['-u']) +
                   [w.path('b')], check=True)
    equal(m.p.wait(30), 0, 'exit code: ' + m.err())
    equal(w.read('a'), b'new' + data[3:], 'the remote')


def sqlite_on_a_slow_mount(w):
    if not shutil.which('sqlite3'):
        raise Skip('sqlite3 is not installed')

    def sql(path, text):
        return subprocess.run(['sqlite3', '-batch', '-init', '/dev/null', w.path(path), text], stdout=subprocess.PIPE,
                              check=True, text=True).stdout
    sql('x.db', 'CREATE TABLE t (i INTEGER PRIMARY KEY, x TEXT); WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 '
        'FROM n WHERE i < 20000) INSERT INTO t SELECT i, hex(randomblob(50)) FROM n; DELETE FROM t WHERE i > 10000')
    w.file('b', 0)
    s, uri = w.serve('file:x.db')
    m = w.mount(uri, 'b', '--layer', 'delay:rtt=10ms,rate=4M')
    equal(sql('b', 'SELECT count(*) FROM t'), '10000\n', 'rows')
    sql('b', "INSERT INTO t SELECT i + 10000, 'new' FROM t LIMIT 2000")
    equal(sql('x.db', 'PRAGMA integrity_check; SELECT count(*) FROM t'), 'ok\n12000\n', 'the remote after COMMIT')
    equal(m.end(), 0, 'exit code')
    equal(sql('x.db', 'PRAGMA integrity_check; SELECT count(*) FROM t'), 'ok\n12000\n', 'the remote')


def many_readers_of_absent_chunks(w):
    data = w.file('a', 4 << 20)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    m = w.mount(uri, 'b', '--layer', 'delay:rtt=50ms', '--pull-workers', '0')
    wrong = []

    def one(i):
        with open(w.path('b'), 'rb', buffering=0) as f:
            f.seek(i * 65536 + i)
            if f.read(100) != data[i * 65536 + i:][:100]:
                wrong.append(i)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(64)]
    began = time.monotonic()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    equal(wrong, [], 'wrong reads')
    true(time.monotonic() - began < 20, 'one after the other')
    equal(m.end(), 0, 'exit code')


main([v for k, v in list(globals().items()) if callable(v) and getattr(v, '__module__', '') == '__main__'])
