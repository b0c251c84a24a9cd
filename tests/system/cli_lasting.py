#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""cli_lasting.py FARPAGE [CASE...]: what a managed mount keeps, who may write, who follows; through real FUSE."""
import json
import os
import re
import signal
import subprocess
import threading
import time

from cli_lib import Skip, equal, has, main, message, need_fuse, true, wait_for
from tcp_lib import Between, hang_up

SIZE = 4 << 20
KEPT = ['--mode', 'managed', '--local', 'file:cache.img']
OFFLINE = KEPT + ['--durable', 'local']


def unmount(w, name='b'):
    """What a killed process leaves."""
    path = w.path(name)
    subprocess.run(['umount', '-l', path] if os.geteuid() == 0 else ['fusermount3', '-uz', path], stderr=subprocess.DEVNULL)


def kill(w, m, name='b'):
    m.p.kill()
    m.p.wait()
    unmount(w, name)


def put(w, name, off, data, sync=True):
    with open(w.path(name), 'r+b', buffering=0) as f:
        f.seek(off)
        f.write(data)
        if sync:
            os.fsync(f.fileno())


def get(w, name, off, n):
    with open(w.path(name), 'rb', buffering=0) as f:
        f.seek(off)
        return f.read(n)


def patched(data, off, new):
    return data[:off] + new + data[off + len(new):]


def world(w, size=SIZE):
    need_fuse()
    data = w.file('a', size)
    w.file('b', 0)
    s, uri = w.serve('file:a')
    return data, s, uri


def serve_again(w, uri, source='file:a'):
    return w.serve(source, listen=uri.rsplit('/', 1)[0])[0]


def all_local(w, *args):
    """A mount of which everything is local and whose map says so."""
    m = w.mount(*args)
    w.run('wait', 'b', '--timeout', '30s', code=0)
    w.run('stop', 'b', code=0)
    equal(m.p.wait(30), 0, 'exit code: ' + m.err())


class Link(Between):
    """A port that leads to a server and can be cut."""

    def __init__(self, uri):
        self.up, self.socks, self.lock = True, [], threading.Lock()
        super().__init__(int(uri.split(':')[2].split('/')[0]))
        self.uri = 'grpc://127.0.0.1:%d' % self.port

    def pass_on(self, way, x, y):
        with self.lock:
            self.socks += [x, y]
            if not self.up:
                hang_up(x, y)
        super().pass_on(way, x, y)

    def cut(self):
        with self.lock:
            self.up = False
            hang_up(*self.socks)
            self.socks = []

    def mend(self):
        with self.lock:
            self.up = True


def short_lease(w):
    need_fuse()
    data = w.file('a', SIZE)
    w.file('b', 0)
    w.file('c', 0)
    s = w.start('serve', 'file:a', '--listen', 'grpc://127.0.0.1:0', '--lease', '1s')
    uri = s.line().split()[1]
    return data, uri, Link(uri)


def a_cut_off_writer_comes_back_too_late(w):
    """While the link is cut its lease ends and somebody else writes and leaves: nothing of the first may follow."""
    data, uri, link = short_lease(w)
    m = w.mount(link.uri, 'b', *OFFLINE, '--push-interval', '10ms')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    link.cut()
    put(w, 'b', 100000, b'too late')
    wait_for(lambda: w.status('b')['lease'] == 'unsure', 'the outage to be seen')
    n = w.mount(uri, 'c', '--mode', 'direct')  # it waits for the lease to end
    put(w, 'c', 2000000, b'in time')
    equal(n.end(), 0, 'exit code: ' + n.err())
    link.mend()
    wait_for(lambda: w.status('b')['lease'] == 'fenced', 'the first to know')
    equal(get(w, 'b', 100000, 8), b'too late', 'what is here')
    try:
        put(w, 'b', 0, b'x')
        raise AssertionError('written')
    except OSError as e:
        equal(e.errno, 116, 'errno')
    equal(m.end(), 3, 'exit code: ' + m.err())
    equal(w.read('a'), patched(data, 2000000, b'in time'), 'the remote')


def a_cut_off_writer_comes_back_in_time(w):
    data, uri, link = short_lease(w)
    m = w.mount(link.uri, 'b', *OFFLINE, '--push-interval', '10ms')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    want = data
    for k in range(3):
        link.cut()
        put(w, 'b', 500000 * k, b'cut %d' % k)
        want = patched(want, 500000 * k, b'cut %d' % k)
        wait_for(lambda: w.status('b')['lease'] == 'unsure', 'the outage to be seen')
        equal(w.read('b'), want, 'what is local')
        link.mend()
        w.run('flush', 'b', '--timeout', '30s', code=0)
        equal(w.read('a'), want, 'the remote')
    true(w.status('b')['reconnects'] > 0, 'no reconnects are counted')
    equal(m.end(), 0, 'exit code: ' + m.err())


def an_offline_start_that_comes_too_late(w):
    data, uri, link = short_lease(w)
    all_local(w, link.uri, 'b', *OFFLINE)
    link.cut()
    m = w.mount(link.uri, 'b', *OFFLINE, '--push-interval', '10ms')
    put(w, 'b', 100000, b'offline')
    n = w.mount(uri, 'c', '--mode', 'direct')
    put(w, 'c', 2000000, b'meanwhile')
    equal(n.end(), 0, 'exit code: ' + n.err())
    link.mend()
    wait_for(lambda: w.status('b')['lease'] == 'fenced', 'it to know')
    has(m.err(), 'somebody else')
    equal(m.end(), 3, 'exit code: ' + m.err())
    equal(w.read('a'), patched(data, 2000000, b'meanwhile'), 'the remote')
    p = w.run('mount', uri, 'b', *OFFLINE, code=1)
    has(p.err, 'unsaved')
    m = w.mount(uri, 'b', *OFFLINE, '--discard-clean', '--force')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(w.read('a'), patched(patched(data, 2000000, b'meanwhile'), 100000, b'offline'), 'the remote')


def a_killed_mount_goes_on(w):
    data, s, uri = world(w)
    m = w.mount(uri, 'b', *OFFLINE, '--push-workers', '0')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    put(w, 'b', 1000000, b'new')
    kill(w, m)
    equal(w.read('a'), data, 'the remote before')
    m = w.mount(uri, 'b', *OFFLINE)
    st = w.status('b')
    true(st['persistent'] and st['local'] > 0, 'nothing was kept: %r' % st)
    want = patched(data, 1000000, b'new')
    equal(w.read('b'), want, 'the file')
    w.run('flush', 'b', code=0)
    equal(w.read('a'), want, 'the remote')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(w.status_map('cache.img.farmap')['dirty_chunks'], 0, 'unsaved chunks')


def another_region_at_the_address_is_waited_out(w):
    data, s, uri = world(w)
    w.file('other', SIZE)
    m = w.mount(uri, 'b', *OFFLINE, '--push-interval', '50ms', '--deadline', '20s')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    s.end()
    s = serve_again(w, uri, 'file:other')
    before = w.read('other')
    put(w, 'b', 1000000, b'new')
    wait_for(lambda: 'not what was opened' in m.err(), 'the mount to notice', 20)
    time.sleep(1)  # pushes have had their time
    equal(w.read('other'), before, 'the other region')
    true(w.status('b')['lease'] != 'fenced', 'fenced by a stranger')
    s.end()
    s = serve_again(w, uri)
    w.run('flush', 'b', code=0)
    equal(w.read('a'), patched(data, 1000000, b'new'), 'the remote')
    equal(m.end(), 0, 'exit code: ' + m.err())


def it_begins_offline(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *OFFLINE)
    equal(s.end(), 0, 'server')
    began = time.monotonic()
    m = w.mount(uri, 'b', *OFFLINE)
    true(time.monotonic() - began < 10, 'it took %.1f s to begin' % (time.monotonic() - began))
    has(m.err(), 'out of reach', 'offline', '100 % local')
    equal(w.read('b'), data, 'what is local')
    put(w, 'b', 70000, b'offline')
    st = w.status('b')
    equal(st['lease'], 'unsure', 'lease')
    true(st['dirty'] > 0, 'nothing is unsaved')
    has(w.run('status', 'b', code=0).out, 'unsure', 'kept when this ends')
    serve_again(w, uri)
    want = patched(data, 70000, b'offline')
    wait_for(lambda: w.read('a') == want, 'what was written to be on the remote')
    wait_for(lambda: w.status('b')['lease'] == 'held', 'the lease')
    equal(m.end(), 0, 'exit code: ' + m.err())


def a_silent_remote_holds_nothing_up(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *OFFLINE)
    s.p.send_signal(signal.SIGSTOP)  # it takes connections and never says a word
    for end in ('stop', 'now'):
        began = time.monotonic()
        m = w.mount(uri, 'b', *OFFLINE)
        true(time.monotonic() - began < 10, 'the start took %.1f s' % (time.monotonic() - began))
        equal(w.read('b'), data, 'what is local')
        began = time.monotonic()
        w.run('stop', 'b', *(['--now'] if end == 'now' else []), code=0)
        true(time.monotonic() - began < 3, 'the end took %.1f s' % (time.monotonic() - began))
        m.p.wait(0.1)  # and the local store is free
    s.p.send_signal(signal.SIGCONT)


def offline_what_is_absent_fails_at_the_deadline(w):
    data, s, uri = world(w)
    m = w.mount(uri, 'b', *OFFLINE, '--pull-workers', '0')
    equal(get(w, 'b', 0, 10), data[:10], 'read')
    wait_for(lambda: w.status('b')['local'] > 0, 'local bytes')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(s.end(), 0, 'server')
    m = w.mount(uri, 'b', *OFFLINE, '--pull-workers', '0', '--deadline', '1s')
    equal(get(w, 'b', 0, 10), data[:10], 'what is local')
    put(w, 'b', 3000000, b'x' * 100, sync=False)  # an absent chunk takes writes
    began = time.monotonic()
    try:
        get(w, 'b', 2000000, 10)
        raise AssertionError('the read succeeded')
    except OSError as e:
        true(0.5 < time.monotonic() - began < 15, 'it took %.1f s' % (time.monotonic() - began))
        true(e.errno in (5, 110), 'errno %d' % e.errno)
    serve_again(w, uri)
    wait_for(lambda: w.status('b')['lease'] == 'held', 'the lease')
    equal(get(w, 'b', 2000000, 10), data[2000000:2000010], 'when it is back')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(w.read('a'), patched(data, 3000000, b'x' * 100), 'the remote')


def one_local_store_is_for_one_mount(w):
    data, s, uri = world(w)
    w.file('c', 0)
    m = w.mount(uri, 'b', *KEPT)
    p = w.run('mount', uri, 'c', *KEPT, code=1)
    has(p.err, 'cache.img')
    message(p.err)
    equal(m.end(), 0, 'exit code: ' + m.err())
    m = w.mount(uri, 'b', *KEPT, '--read-only')
    n = w.mount(uri, 'c', *KEPT, '--read-only')
    equal(w.read('b'), data, 'the first')
    equal(w.read('c'), data, 'the second')
    p = w.run('mount', uri, 'c', *KEPT, code=1)
    message(p.err)
    equal(n.end(), 0, 'exit code: ' + n.err())
    equal(m.end(), 0, 'exit code: ' + m.err())


def another_remote_is_refused(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *KEPT)
    other = w.file('other', SIZE, seed=9)
    s2, uri2 = w.serve('file:other')
    p = w.run('mount', uri2, 'b', *KEPT, code=1)
    has(p.err, 'another region', '--discard-clean')
    message(p.err)
    w.file('longer', SIZE + 4096, seed=9)
    s3, uri3 = w.serve('file:longer')
    p = w.run('mount', uri3, 'b', *KEPT, '--discard-clean', code=2)
    has(p.err, str(SIZE), str(SIZE + 4096), '--local')
    message(p.err)
    m = w.mount(uri2, 'b', *KEPT, '--discard-clean')
    equal(w.read('b'), other, 'the other region')
    equal(m.end(), 0, 'exit code: ' + m.err())


def another_address_of_the_same_region_is_fine(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *KEPT)
    equal(s.end(), 0, 'server')
    s, uri2 = w.serve('file:a')
    m = w.mount(uri2, 'b', *KEPT, '--pull-workers', '0')
    has(m.err(), '100 % local')
    equal(w.read('b'), data, 'content')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(w.status_map('cache.img.farmap')['source'], uri2, 'source in the map')


def what_somebody_else_wrote_is_noticed(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *KEPT)
    w.file('c', 0)
    m = w.mount(uri, 'c', '--mode', 'direct')
    put(w, 'c', 5000, b'other')
    equal(m.end(), 0, 'exit code: ' + m.err())
    p = w.run('mount', uri, 'b', *KEPT, code=1)
    has(p.err, 'somebody else', '--discard-clean')
    message(p.err)
    m = w.mount(uri, 'b', *KEPT, '--discard-clean')
    equal(w.read('b'), patched(data, 5000, b'other'), 'content')
    equal(m.end(), 0, 'exit code: ' + m.err())


def unsaved_bytes_need_force(w):
    data, s, uri = world(w)
    m = w.mount(uri, 'b', *OFFLINE, '--push-workers', '0')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    put(w, 'b', 100000, b'mine')
    w.run('stop', 'b', '--now', code=3)
    equal(m.p.wait(30), 3, 'exit code')
    w.file('c', 0)
    n = w.mount(uri, 'c', '--mode', 'direct')
    put(w, 'c', 3000000, b'theirs')
    equal(n.end(), 0, 'exit code: ' + n.err())
    p = w.run('mount', uri, 'b', *OFFLINE, '--discard-clean', code=1)
    has(p.err, 'unsaved', '--force', 'copy --dirty')
    message(p.err)
    p = w.run('mount', uri, 'b', *OFFLINE, '--force', code=2)
    m = w.mount(uri, 'b', *OFFLINE, '--discard-clean', '--force')
    want = patched(patched(data, 3000000, b'theirs'), 100000, b'mine')
    equal(w.read('b'), want, 'content')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(w.read('a'), want, 'the remote')


def an_older_copy_is_refused(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *KEPT)
    equal(s.end(), 0, 'server')
    subprocess.run(['cp', '-a', w.path('a'), w.path('a.old')], check=True)
    s = serve_again(w, uri)
    m = w.mount(uri, 'b', *KEPT)
    put(w, 'b', 0, b'newer')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(s.end(), 0, 'server')
    os.rename(w.path('a.old'), w.path('a'))
    s = serve_again(w, uri)
    p = w.run('mount', uri, 'b', *KEPT, code=1)
    has(p.err, '--discard-clean')
    message(p.err)
    m = w.mount(uri, 'b', *KEPT, '--discard-clean')
    equal(w.read('b'), data, 'content')
    equal(m.end(), 0, 'exit code: ' + m.err())


def a_second_writer_is_refused(w):
    data, s, uri = world(w)
    w.file('c', 0)
    for mode in ('managed', 'direct'):
        m = w.mount(uri, 'b', '--mode', mode)
        equal(w.status('b')['lease'], 'held', 'lease')
        for other in ('managed', 'direct'):
            p = w.run('mount', uri, 'c', '--mode', other, code=1)
            has(p.err, w.path('b') if w.path('b') in p.err else 'b)', '--read-only', '--take-over')
            message(p.err)
        n = w.mount(uri, 'c', '--mode', 'managed', '--read-only')
        equal(w.read('c'), data, 'beside the writer')
        equal(n.end(), 0, 'exit code: ' + n.err())
        equal(m.end(), 0, 'exit code: ' + m.err())
        m = w.mount(uri, 'c', '--mode', mode)  # it was given back
        equal(m.end(), 0, 'exit code: ' + m.err())


def a_file_here_has_one_writer(w):
    need_fuse()
    data = w.file('a', SIZE)
    w.file('b', 0)
    w.file('c', 0)
    m = w.mount('file:a', 'b', '--mode', 'managed')
    p = w.run('mount', 'file:a', 'c', '--mode', 'managed', code=1)
    has(p.err, 'another mount', '--read-only')
    message(p.err)
    n = w.mount('file:a', 'c', '--mode', 'managed', '--read-only')
    equal(w.read('c'), data, 'beside the writer')
    equal(n.end(), 0, 'exit code: ' + n.err())
    kill(w, m)
    m = w.mount('file:a', 'c', '--mode', 'managed')
    equal(m.end(), 0, 'exit code: ' + m.err())


def a_dead_writers_lease_is_waited_for(w):
    need_fuse()
    w.file('a', SIZE)
    w.file('b', 0)
    s = w.start('serve', 'file:a', '--listen', 'grpc://127.0.0.1:0', '--lease', '2s')
    uri = s.line().split()[1]
    kill(w, w.mount(uri, 'b', '--mode', 'direct'))
    began = time.monotonic()
    m = w.mount(uri, 'b', '--mode', 'direct')
    took = time.monotonic() - began
    true(took < 6, 'it took %.1f s' % took)
    has(m.err(), 'is gone: waiting')
    equal(m.end(), 0, 'exit code: ' + m.err())


def take_over_fences_the_first(w):
    data, s, uri = world(w)
    w.file('c', 0)
    m = w.mount(uri, 'b', *OFFLINE, '--push-workers', '0')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    put(w, 'b', 200000, b'unsaved work')
    n = w.mount(uri, 'c', '--mode', 'managed', '--take-over')
    put(w, 'c', 0, b'the new owner')
    wait_for(lambda: w.status('b')['lease'] == 'fenced', 'the first to know')
    wait_for(lambda: 'copy --dirty file:cache.img' in m.err(), 'the message')
    has(m.err(), 'taken')
    has(w.run('status', 'b', code=0).out, 'FENCED')
    try:
        put(w, 'b', 0, b'late')
        raise AssertionError('written')
    except OSError as e:
        equal(e.errno, 116, 'errno')
    equal(get(w, 'b', 200000, 12), b'unsaved work', 'what is here')
    equal(m.end(), 3, 'exit code: ' + m.err())
    has(m.err(), 'copy --dirty')
    p = w.run('mount', uri, 'b', *OFFLINE, code=1)
    has(p.err, 'unsaved')
    w.run('copy', '--dirty', 'file:cache.img', 'file:saved', '--quiet', code=0)
    saved = w.read('saved')
    equal(len(saved), SIZE, 'size')
    equal(saved[200000:200012], b'unsaved work', 'what was saved')
    equal(n.end(), 0, 'exit code: ' + n.err())
    equal(w.read('a'), patched(data, 0, b'the new owner'), 'the remote')
    true(os.stat(w.path('saved')).st_blocks * 512 < SIZE // 2, 'it has no holes')


def dirty_ranges_go_to_a_server(w):
    data, s, uri = world(w)
    m = w.mount(uri, 'b', *OFFLINE, '--push-workers', '0')
    put(w, 'b', 200001, b'abc')
    w.run('stop', 'b', '--now', code=3)
    equal(m.p.wait(30), 3, 'exit code')
    w.run('copy', '--dirty', 'file:cache.img', uri, code=0)
    equal(w.read('a'), patched(data, 200001, b'abc'), 'the remote')
    has(w.run('copy', '--dirty', 'file:a', 'file:saved').err, 'a.farmap')
    has(w.run('copy', '--dirty', 'mem:1M', 'file:saved', code=2).err, 'chunk map')


def readers_follow(w):
    data, s, uri = world(w)
    names = ('c', 'd', 'e')
    for name in names:
        w.file(name, 0)
    m = w.mount(uri, 'b', '--mode', 'managed')
    n = [w.mount(uri, 'c', '--mode', 'managed', '--read-only', '--follow', '500ms'),
         w.mount(uri, 'd', '--mode', 'direct', '--read-only', '--follow', '500ms'),
         w.mount(uri, 'e', *KEPT, '--read-only', '--follow', '500ms')]
    held = []
    for name in names:
        equal(w.status(name)['follow'], 'following', name)
        held.append(open(w.path(name), 'rb', buffering=0))
        equal(held[-1].read(), data, name)
    for k in range(3):
        put(w, 'b', 1000000 * k, b'round %d' % k)
        began = time.monotonic()
        for f, name in zip(held, names):
            def seen():
                f.seek(1000000 * k)
                return f.read(7) == b'round %d' % k
            wait_for(seen, 'the change in ' + name, 10)
        true(time.monotonic() - began < 5, 'it took %.1f s' % (time.monotonic() - began))
    for f in held:
        f.close()
    equal(w.read('c'), w.read('b'), 'content')
    for x in n + [m]:
        equal(x.end(), 0, 'exit code: ' + x.err())
    m = w.mount(uri, 'e', *KEPT, '--read-only')
    equal(w.read('e'), w.read('a'), 'a follower that was away')
    equal(m.end(), 0, 'exit code: ' + m.err())


def two_followers_share_a_local_store(w):
    data, s, uri = world(w)
    w.file('c', 0)
    w.file('d', 0)
    m = w.mount(uri, 'b', '--mode', 'managed')
    n = [w.mount(uri, x, *KEPT, '--read-only', '--follow', '200ms') for x in ('c', 'd')]
    want = data
    for k in range(5):
        want = patched(want, 400000 * k, b'shared %d' % k)
        put(w, 'b', 400000 * k, b'shared %d' % k)
        for x in ('c', 'd'):
            wait_for(lambda: w.read(x) == want, 'the change in ' + x)
    equal(n[1].end(), 0, 'exit code: ' + n[1].err())
    want = patched(want, 0, b'alone')
    put(w, 'b', 0, b'alone')
    wait_for(lambda: w.read('c') == want, 'the change in c')
    n[1] = w.mount(uri, 'd', *KEPT, '--read-only', '--follow', '200ms')  # once more, after the first was alone
    equal(w.read('d'), want, 'd')
    for x in n:
        equal(x.end(), 0, 'exit code: ' + x.err())
    w.run('check', 'file:cache.img', code=0)
    put(w, 'b', 3000000, b'away')
    want = patched(want, 3000000, b'away')
    x = w.mount(uri, 'c', *KEPT, '--read-only', '--pull-workers', '0')  # only what has changed is forgotten
    wait_for(lambda: w.status('c')['follow'] == 'following', 'it to catch up')
    equal(w.status('c')['local'], SIZE - 65536, 'local')
    equal(w.read('c'), want, 'content')
    equal(x.end(), 0, 'exit code: ' + x.err())
    equal(m.end(), 0, 'exit code: ' + m.err())


def a_follower_loses_and_finds_the_writer(w):
    data, s, uri = world(w)
    m = w.mount(uri, 'b', *KEPT, '--read-only', '--follow', '200ms')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    equal(s.end(), 0, 'server')
    wait_for(lambda: w.status('b')['follow'] == 'lost', 'the loss')
    equal(w.read('b'), data, 'what is here')
    has(m.err(), 'cannot be followed')
    s = serve_again(w, uri)
    wait_for(lambda: w.status('b')['follow'] == 'following', 'the peer')
    w.file('c', 0)
    n = w.mount(uri, 'c', '--mode', 'direct')
    put(w, 'c', 1234567, b'later')
    wait_for(lambda: get(w, 'b', 1234567, 5) == b'later', 'the change')
    equal(n.end(), 0, 'exit code: ' + n.err())
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(s.end(), 0, 'server')
    m = w.mount(uri, 'b', *KEPT, '--read-only', '--follow', '200ms')  # offline
    equal(w.status('b')['follow'], 'lost', 'follow')
    equal(get(w, 'b', 1234567, 5), b'later', 'what is here')
    s = serve_again(w, uri)
    wait_for(lambda: w.status('b')['follow'] == 'following', 'the peer')
    equal(w.read('b'), patched(data, 1234567, b'later'), 'content')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(s.end(), 0, 'server')
    m = w.mount(uri, 'b', *KEPT, '--read-only', '--follow', 'never')  # offline
    s = serve_again(w, uri)
    wait_for(lambda: w.status('b')['follow'] == 'frozen', 'the peer')
    equal(w.read('b'), patched(data, 1234567, b'later'), 'content')
    equal(m.end(), 0, 'exit code: ' + m.err())


def a_follower_takes_nothing_from_an_older_copy(w):
    data, s, uri = world(w)
    w.file('c', 0)
    m = w.mount(uri, 'c', '--mode', 'direct')
    put(w, 'c', 0, b'first')
    equal(m.end(), 0, 'exit code: ' + m.err())
    equal(s.end(), 0, 'server')
    subprocess.run(['cp', '-a', w.path('a'), w.path('a.old')], check=True)
    s = serve_again(w, uri)
    m = w.mount(uri, 'b', '--mode', 'managed', '--read-only', '--follow', '100ms', '--pull-workers', '0', '--deadline', '2s')
    equal(get(w, 'b', 0, 5), b'first', 'content')
    n = w.mount(uri, 'c', '--mode', 'direct')
    put(w, 'c', 0, b'second')
    equal(n.end(), 0, 'exit code: ' + n.err())
    wait_for(lambda: get(w, 'b', 0, 6) == b'second', 'the change')
    equal(s.end(), 0, 'server')
    os.rename(w.path('a.old'), w.path('a'))
    s = serve_again(w, uri)
    wait_for(lambda: 'older copy' in m.err(), 'the message')
    equal(w.status('b')['follow'], 'lost', 'follow')
    equal(get(w, 'b', 0, 6), b'second', 'what is here')
    try:
        get(w, 'b', 3000000, 6)
        raise AssertionError('the older copy was read')
    except OSError as e:
        true(e.errno in (116, 5, 110), 'errno %d' % e.errno)
    equal(m.end(), 0, 'exit code: ' + m.err())


def without_a_list_of_changes_it_is_frozen(w):
    need_fuse()
    data = w.file('a', SIZE)
    w.file('b', 0)
    m = w.mount('file:a', 'b', '--mode', 'managed', '--read-only')
    equal(w.read('b'), data, 'content')
    equal(w.status('b')['follow'], 'frozen', 'follow')
    has(w.run('status', 'b', code=0).out, 'frozen')
    put(w, 'a', 0, b'changed')
    equal(w.read('b'), data, 'it stays as it was')
    equal(m.end(), 0, 'exit code: ' + m.err())


def unsaved_bytes_outlive_every_end(w):
    data, s, uri = world(w)
    want = data
    for k, end in enumerate(('TERM', 'now', 'twice', 'umount', 'lazy', 'abort')):
        m = w.mount(uri, 'b', *OFFLINE, '--push-workers', '0', '--deadline', '1s')
        w.run('wait', 'b', '--timeout', '30s', code=0)
        new = b'end %d' % k
        put(w, 'b', 300000 * k, new)
        want = patched(want, 300000 * k, new)
        s.p.send_signal(signal.SIGSTOP)
        if end == 'TERM':
            equal(m.end(), 3, 'exit code: ' + m.err())
        elif end == 'now':
            w.run('stop', 'b', '--now', code=3)
            equal(m.p.wait(30), 3, 'exit code: ' + m.err())
        elif end == 'twice':
            m.p.send_signal(signal.SIGTERM)
            tasks = '/proc/%d/task' % m.p.pid
            wait_for(lambda: any('far-finish' in open('%s/%s/comm' % (tasks, t)).read() for t in os.listdir(tasks)),
                     'the orderly end to begin')
            m.p.send_signal(signal.SIGTERM)
            equal(m.p.wait(30), 130, 'exit code: ' + m.err())
        elif end == 'abort':
            dev = os.stat(w.path('b')).st_dev
            path = '/sys/fs/fuse/connections/%d/abort' % os.minor(dev)
            if not os.access(path, os.W_OK):
                s.p.send_signal(signal.SIGCONT)
                equal(m.end(), 0, 'exit code: ' + m.err())
                continue
            with open(path, 'w') as f:
                f.write('1')
            equal(m.p.wait(30), 3, 'exit code: ' + m.err())
            unmount(w)
        else:
            lazy = end == 'lazy'
            subprocess.run(['umount'] + ['-l'] * lazy + [w.path('b')] if os.geteuid() == 0 else
                           ['fusermount3', '-u' + 'z' * lazy, w.path('b')], check=True)
            equal(m.p.wait(30), 3, 'exit code: ' + m.err())
        has(m.err(), 'not on ' + uri, 'kept in file:cache.img', 'mount it again')
        message(m.err())
        s.p.send_signal(signal.SIGCONT)
        true(w.status_map('cache.img.farmap')['dirty_chunks'] > 0, 'the map says that nothing is unsaved after ' + end)
        m = w.mount(uri, 'b', *OFFLINE)
        equal(w.read('b'), want, 'content after ' + end)
        w.run('flush', 'b', '--timeout', '30s', code=0)
        equal(w.read('a'), want, 'the remote after ' + end)
        equal(m.end(), 0, 'exit code: ' + m.err())


def memory_says_that_it_is_lost(w):
    data, s, uri = world(w)
    m = w.mount(uri, 'b', '--mode', 'managed', '--push-workers', '0', '--deadline', '1s')
    w.run('wait', 'b', '--timeout', '30s', code=0)
    put(w, 'b', 0, b'lost', sync=False)
    wait_for(lambda: w.status('b')['dirty'] > 0, 'unsaved bytes')
    s.p.kill()
    s.p.wait()
    equal(m.end(), 3, 'exit code: ' + m.err())
    has(m.err(), 'lost with the local store in memory')


def check_finds_a_flipped_byte(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *KEPT)
    p = w.run('check', 'file:cache.img', code=0)
    has(p.out, '64 fit their checksum, 0 do not')
    with open(w.path('cache.img'), 'r+b') as f:
        f.seek(65536 * 5 + 77)
        byte = f.read(1)
        f.seek(65536 * 5 + 77)
        f.write(bytes([byte[0] ^ 1]))
    p = w.run('check', 'file:cache.img', code=1)
    has(p.out, 'bad: 327680-393216', '63 fit', '1 do not')
    message(p.err)
    j = json.loads(w.run('check', 'cache.img.farmap', '--json', code=1).out)
    equal((j['bad'], j['bad_offsets'], j['good']), (1, [327680], 63), 'JSON')
    m = w.mount(uri, 'b', *KEPT)
    has(w.run('check', 'file:cache.img', code=1).err, 'another mount')
    equal(w.read('b'), data, 'a mount fetches it anew')
    true(w.status('b')['local_errors'] >= 1, 'local_errors')
    equal(m.end(), 0, 'exit code: ' + m.err())
    w.run('check', 'file:cache.img', code=0)
    has(w.run('check', 'file:a', code=1).err, 'chunk map')


def pins_survive_local_max(w):
    data, s, uri = world(w)
    m = w.mount(uri, 'b', *KEPT, '--local-max', '1M', '--pull-workers', '2')
    w.run('pin', 'b', '2M-2304K', code=0)
    w.run('wait', 'b', '--local', '2M-2304K', '--timeout', '30s', code=0)
    equal(w.status('b')['pinned'], 256 << 10, 'pinned')
    for _ in range(3):
        equal(w.read('b'), data, 'content')
    before = w.status('b')['demand_reads']
    subprocess.run(['sh', '-c', 'echo 1 >/proc/sys/vm/drop_caches'], stderr=subprocess.DEVNULL)
    equal(get(w, 'b', 2 << 20, 256 << 10), data[2 << 20:][:256 << 10], 'pinned')
    equal(w.status('b')['demand_reads'], before, 'fetches')
    w.run('unpin', 'b', '2M-2304K', code=0)
    equal(w.status('b')['pinned'], 0, 'pinned')
    has(w.run('pin', 'b', 'x', code=2).err, "'x'")
    equal(m.end(), 0, 'exit code: ' + m.err())


def info_explains_a_map(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *KEPT)
    p = w.run('info', 'cache.img.farmap', code=0)
    has(p.out, 'chunk map', uri, '64 chunks (4 MiB)', 'in order')
    p = w.run('info', 'file:cache.img', code=0)
    has(p.out, 'size        %d bytes' % SIZE, uri, '64 chunks')
    j = json.loads(w.run('info', 'file:cache.img', '--json', code=0).out)
    equal((j['map']['local_chunks'], j['map']['chunk'], j['map']['clean'], j['size']), (64, 65536, True, SIZE), 'JSON')
    with open(w.path('cache.img.farmap'), 'r+b') as f:
        f.write(b'\0' * 8192)
    p = w.run('info', 'cache.img.farmap')
    true(p.returncode in (1, 2), 'exit code %d' % p.returncode)
    message(p.err)
    message(w.run('mount', uri, 'b', *KEPT).err)


def a_map_needs_its_store(w):
    data, s, uri = world(w)
    all_local(w, uri, 'b', *KEPT)
    os.unlink(w.path('cache.img'))
    p = w.run('mount', uri, 'b', *KEPT, code=1)
    has(p.err, 'cache.img', 'cannot be found')
    message(p.err)
    has(w.run('mount', uri, 'b', '--map', 'm', code=2).err, '--local')
    os.unlink(w.path('cache.img.farmap'))
    m = w.mount(uri, 'b', '--mode', 'managed', '--local', 'dir:cache.d', '--map', w.path('m'))
    equal(w.read('b'), data, 'content')
    equal(m.end(), 0, 'exit code: ' + m.err())
    true(os.path.exists(w.path('m')), 'no map')
    m = w.mount(uri, 'b', '--mode', 'managed', '--local', 'dir:cache.d', '--map', w.path('m'), '--pull-workers', '0')
    has(m.err(), '100 % local')
    equal(w.read('b'), data, 'content')
    equal(m.end(), 0, 'exit code: ' + m.err())


def the_units_commands_work(w):
    """What systemd would run of dist/farpage@.service."""
    data, s, uri = world(w)
    unit = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'dist', 'farpage@.service.in')
    env = {'SOURCE': uri, 'TARGET': w.path('b'), 'OPTIONS': ' '.join(OFFLINE)}

    def run(key, code):
        with open(unit) as f:
            line = next(x for x in f if x.startswith(key + '='))
        words = line.strip().split('=', 1)[1].split()
        true(words[0] == '@bindir@/farpage', line)
        args = []
        for word in words[1:]:  # $X is split into words, ${X} is not
            if word.startswith('$') and not word.startswith('${'):
                args += env[word[1:]].split()
            else:
                args.append(re.sub(r'\$\{(\w+)\}', lambda m: env[m.group(1)], word))
        return w.run(*args, code=code)
    run('ExecStart', 0)
    try:
        equal(w.read('b'), data, 'content')
        pid = w.status('b')['pid']
        put(w, 'b', 0, b'unit')
    finally:
        run('ExecStop', 0)
    wait_for(lambda: not os.path.exists('/proc/%d' % pid), 'its end')
    equal(w.read('a'), patched(data, 0, b'unit'), 'the remote')


def status_is_what_its_page_says(w):
    data, s, uri = world(w)
    m = w.mount(uri, 'b', *KEPT)
    got = w.status('b')
    page = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'doc', 'status.md')
    rows = {}
    with open(page) as f:
        for line in f:
            row = re.match(r'\| `(\w+)` \|[^|]*\| ([^|]+) \|', line)
            if row:
                rows[row.group(1)] = row.group(2)
    equal(sorted(got), sorted(rows), 'keys')
    for key, kind in rows.items():
        want = bool if kind == 'boolean' else (str, type(None)) if kind == 'string or null' else str if kind == 'string' else int
        true(isinstance(got[key], want), '%s is %r, not %s' % (key, got[key], kind))
    equal(m.end(), 0, 'exit code: ' + m.err())


main([v for k, v in list(globals().items()) if callable(v) and getattr(v, '__module__', '') == '__main__'
      and v not in (unmount, kill, put, get, patched, world, serve_again, all_local, short_lease,
                    Link)])
