#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""cli_command.py FARPAGE [CASE...]: words, options, messages and exit codes; serve, info, copy. No mount is needed."""
import json
import os
import pty
import re
import signal
import socket
import time

from cli_lib import FARPAGE, Skip, equal, has, main, message, true, wait_for

RESERVED = ('finalise seed leech snapshot nbd ram-ul ram-dl delta tapisk').split()
SIZES = [0, 1, 511, 4095, 4096, 4097, 65536, 2 * 1024 * 1024, 2 * 1024 * 1024 + 1, 5000001]


def alone_it_prints_eight_lines(w):
    p = w.run(code=0)
    equal(len(p.out.splitlines()), 8, 'lines')
    has(p.out, 'farpage serve', 'farpage mount', 'farpage doctor')


def version_and_help(w):
    has(w.run('--version', code=0).out, 'farpage 0.')
    has(w.run('--help', code=0).out, 'serve', 'mount', 'copy')
    for verb in ('serve', 'mount', 'copy', 'info', 'doctor', 'status', 'flush', 'wait', 'pull', 'evict', 'stop', 'page'):
        has(w.run(verb, '--help', code=0).out, 'usage: farpage ' + verb, '--help')


def reserved_words_say_so(w):
    for word in RESERVED:
        p = w.run(word, 'x', code=2)
        has(p.err, 'farpage %s is not in this version' % word)
        message(p.err)


def wrong_words_are_usage_errors(w):
    w.file('a', 100)
    for args, words in [
            (['frobnicate'], ['frobnicate', '--help']),
            (['copy', 'file:a'], ['missing', 'SRC DST']),
            (['copy', 'file:a', 'file:b', 'file:c'], ["'file:c'", 'too many']),
            (['copy', '--frob', 'file:a', 'file:b'], ['--frob', 'unknown']),
            (['copy', 'file:a', 'file:b', '--workers'], ['--workers', 'needs a value']),
            (['copy', 'file:a', 'file:b', '--workers', 'x'], ['workers', 'x']),
            (['copy', 'file:a', 'file:b', '--workers', '1000000'], ['workers']),
            (['copy', 'file:a', 'file:b', '--connections', '2'], ['--connections', '2+2']),
            (['copy', 'a', 'file:b'], ['no scheme', 'file:a']),
            (['info', 'frob:a'], ['frob', 'unknown scheme', 'mem']),
            (['info', 'mem:1M?frob=1'], ['frob']),
            (['info', 'mem:x'], ['mem:']),
            (['info', 'file:a', '--layer', 'frob'], ['frob', 'delay']),
            (['info', 'file:a', '--layer', 'delay:frob=1'], ['frob', 'rtt']),
            (['info', 'file:a', '--layer', 'delay:rtt=1x'], ['rtt', '1x']),
            (['mount', 'file:a'], ['TARGET']),
            (['mount', 'file:a', '.', '--as', 'nbd'], ['--as nbd', 'not in this version']),
            (['mount', 'file:a', '.', '--chunk', '5000'], ['--chunk', 'power of two']),
            (['mount', 'file:a', '.', '--mode', 'direct', '--local', 'mem:'], ['--mode direct']),
            (['mount', 'file:a', '.', '--background', '--run', 'true'], ['--background', '--run']),
            (['mount', 'file:a', '.', '--name', 'x/y'], ['x/y', '--name']),
            (['serve', 'file:a'], ['--listen']),
            (['serve', 'file:a', 'file:a', '--listen', 'grpc://127.0.0.1:0'], ['no name']),
            (['serve', 'file:a', 'default=file:a', '--listen', 'grpc://127.0.0.1:0'], ['default']),
            (['serve', 'file:a', '--listen', 'grpc://127.0.0.1:0/x'], ['path']),
            (['serve', 'file:a', '--listen', 'frob://127.0.0.1:0'], ['frob']),
            (['status'], ['TARGET']),
            (['wait', '.', '--local', 'much'], ['much', '20%']),
            (['wait', '.', '--timeout', 'soon'], ['soon'])]:
        p = w.run(*args, timeout=20)
        true(p.returncode in (1, 2), '%s: exit %d: %s' % (args, p.returncode, p.err))
        equal(p.out, '', 'output of %s' % args)
        has(p.err, *words)
        message(p.err)
        if args[0] != 'serve':
            equal(p.returncode, 2, 'exit code of %s: %s' % (args, p.err))


def what_is_missing_is_named(w):
    for args, words in [
            (['info', 'file:nowhere'], ['nowhere', 'does not exist']),
            (['copy', 'file:nowhere', 'file:b'], ['nowhere', 'does not exist']),
            (['mount', 'mem:1M', 'nowhere'], ['nowhere', 'mkdir or touch']),
            (['status', '.'], ['nothing is mounted']),
            (['stop', 'nowhere'], ['nowhere']),
            (['status', '--control', w.path('nobody.sock')], ['nobody.sock'])]:
        p = w.run(*args, code=1)
        has(p.err, *words)
        message(p.err)
    true(not os.path.exists(w.path('b')), 'a copy without a source made its DST')


def info_tells_what_a_region_is(w):
    w.file('a', 3 * 65536, holes=[(65536, 131072)])
    os.truncate(w.path('a'), 1 << 20)
    o = json.loads(w.run('info', 'file:a', '--json', code=0).out)
    equal(o['size'], 1 << 20, 'size')
    equal(o['chunk'], 0, 'chunk')
    true(o['data'] <= 3 * 65536 and o['data'] + o['zeros'] == 1 << 20, str(o))
    true('write' in o['caps'], str(o))
    has(w.run('info', 'file:a', code=0).out, '1048576 bytes (1 MiB)')
    equal(os.path.getsize(w.path('a')), 1 << 20, 'info left the size alone')


def doctor_has_an_answer_to_each_question(w):
    o = json.loads(w.run('doctor', '--json', code=0).out)
    for key in ('kernel', 'fuse', 'fusermount3', 'read_ahead', 'userfaultfd', 'pointer_read',
                'pointer_write', 'nbd', 'ublk', 'files', 'threads', 'memory'):
        true(o[key]['state'] in ('ok', 'limited', 'no') and o[key]['found'], key)
        true(o[key]['state'] != 'no' or o[key]['next'], '%s: no next step' % key)
    equal(len([x for x in w.run('doctor', code=0).out.splitlines() if not x.startswith(' ')]), len(o), 'lines')
    # what a kernel lacks changes what is chosen
    for without, read, write in (('uffd', 'sigsegv', None), ('6.1', '(?:continue|copy)', 'copy.*the first store'),
                                 ('6.1,huge', 'copy', 'copy'), ('wp,huge', '(?:move|copy)', '(?:copy.*hashing)')):
        o = json.loads(w.run('doctor', '--json', code=0, env={'FARPAGE_WITHOUT': without}).out)
        if without != 'uffd' and o['userfaultfd']['state'] == 'no':
            continue
        true(re.match(read, o['pointer_read']['found']), without)
        if write:
            true(re.match(write, o['pointer_write']['found']), without)
        else:
            equal(o['pointer_write']['state'], 'no', without)


# ---------------------------------------------------------------------------------------------------- copy

def copies_of_any_size_are_equal(w):
    for size in SIZES:
        data = w.file('a', size, seed=size)
        w.run('copy', 'file:a', 'file:b', '--verify', code=0)
        equal(w.read('b'), data, 'copy of %d bytes' % size)


def an_existing_file_gets_the_length(w):
    for had in (0, 10, 100000, 3000000):
        data = w.file('a', 70000, seed=had, holes=[(0, 4096), (20000, 70000)])
        w.file('b', had, seed=99)
        w.run('copy', 'file:a', 'file:b', '--verify', code=0)
        equal(w.read('b'), data, 'over a file of %d bytes' % had)


def holes_are_kept(w):
    data = w.file('a', 1 << 20)
    os.truncate(w.path('a'), 64 << 20)
    w.run('copy', 'file:a', 'file:b', '--verify', code=0)
    true(os.stat(w.path('b')).st_blocks * 512 < 2 << 20, 'the copy has no holes')
    equal(os.path.getsize(w.path('b')), 64 << 20, 'size')
    equal(w.read('b')[:1 << 20], data, 'data')
    # over a file that was full: its old bytes must go
    w.file('c', 64 << 20, seed=5)
    w.run('copy', 'file:a', 'file:c', '--verify', code=0)
    true(w.read('c')[1 << 20:].count(0) == 63 << 20, 'old bytes are left in a hole')


def a_tebibyte_of_holes_is_quick(w):
    with open(w.path('a'), 'wb') as f:
        try:
            f.truncate(1 << 40)
        except OSError as e:
            raise Skip('no files of 1 TiB here: %s' % e)
        f.seek(1 << 39)
        f.write(b'middle')
    began = time.monotonic()
    w.run('copy', 'file:a', 'file:b', '--workers=4', code=0, timeout=60)
    equal(os.path.getsize(w.path('b')), 1 << 40, 'size')
    with open(w.path('b'), 'rb') as f:
        f.seek(1 << 39)
        equal(f.read(6), b'middle', 'data')
    true(time.monotonic() - began < 50)


def streams(w):
    data = w.file('a', 5000001, holes=[(3000000, 4800000)])
    equal(w.run('copy', 'file:a', '-', code=0).stdout, data, 'to standard output')
    w.run('copy', '-', 'file:b', stdin=data, code=0)
    equal(w.read('b'), data, 'from standard input')
    w.run('copy', '-', 'file:b', stdin=data[:1000], code=0)
    equal(w.read('b'), data[:1000], 'a shorter stream over a longer file')
    w.run('copy', '-', 'file:b', stdin=b'', code=0)
    equal(w.read('b'), b'', 'an empty stream')
    equal(w.run('copy', '-', '-', stdin=data, code=0).stdout, data, 'stream to stream')
    p = w.run('copy', '-', 'mem:1000', stdin=data, code=1)
    has(p.err, 'longer', '1000')
    p = w.run('copy', '-', 'mem:1000', stdin=b'x', code=1)
    has(p.err, 'ended after 1 bytes')
    equal(w.run('copy', 'file:a', 'fd:1', code=0).stdout, data, 'to fd:1')
    w.run('copy', 'file:a', 'fd:77', code=2)
    w.run('copy', '-', 'null:', stdin=data, code=0)
    w.run('copy', 'file:a', 'null:', code=0)
    has(w.run('copy', '-', 'file:b', '--verify', stdin=b'', code=2).err, '--verify')


def another_size_is_refused(w):
    w.file('a', 1000)
    p = w.run('copy', 'file:a', 'mem:1001')
    true(p.returncode in (1, 2))
    has(p.err, '1001', '1000')
    p = w.run('copy', 'file:a', 'file:a', code=2)
    has(p.err, 'same file')
    equal(len(w.read('a')), 1000, 'size')


def a_failed_read_names_its_offset(w):
    w.file('a', 20 << 20)
    p = w.run('copy', 'file:a', 'file:b', '--layer', 'fault:nth=3', '--workers', '1', code=1)
    has(p.err, 'cannot read from file:a', 'offset 524288', 'Input/output error')  # after a look at its beginning and one piece
    message(p.err)


def verify_finds_the_first_difference(w):
    w.file('a', 9 << 20)
    # the layer spoils one read: the copy holds what was read, the second pass reads something else
    p = w.run('copy', 'file:a', 'file:b', '--layer', 'fault:corrupt=0.3,seed=4', '--verify', code=1)
    has(p.err, 'differ', 'first different byte is at offset')


def stores_of_whole_chunks(w):
    for size, chunk in ((1000003, 4096), (1000003, 3000), (70000, 1 << 20), (1 << 20, 4096)):
        data = w.file('a', size, holes=[(20000, 50000)])
        d = 'dir:d%d-%d' % (size, chunk)
        w.run('copy', 'file:a', '%s?size=%d&chunk=%d' % (d, size, chunk), '--verify', code=0)
        w.run('copy', d, 'file:b', '--verify', code=0)
        equal(w.read('b'), data, '%d bytes in chunks of %d' % (size, chunk))
        w.run('copy', 'file:a', d + 'x?size=%d' % size, '--verify', '--layer', 'strict:chunk=512', code=0)
    has(w.run('info', d).out, '4096: only whole aligned chunks')


def a_bar_on_a_terminal(w):
    w.file('a', 4 << 20)
    try:
        pid, fd = pty.fork()
    except OSError as e:
        raise Skip('no terminal to be had: %s' % e)
    if pid == 0:
        os.environ['TERM'] = 'xterm'
        os.execv(FARPAGE, [FARPAGE, 'copy', 'file:' + w.path('a'), 'null:', '--layer', 'delay:rate=4M'])
    out = b''
    try:
        while True:
            data = os.read(fd, 4096)
            if not data:
                break
            out += data
    except OSError:  # the terminal's other end is closed
        pass
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 0, 'exit code')
    has(out.decode(), '\rcopy  null:  4 MiB  [', ' %  ', 'B/s', '####', 'copied 4 MiB')


def json_of_a_copy(w):
    w.file('a', 100000)
    o = json.loads(w.run('copy', 'file:a', 'file:b', '--json', '--verify', code=0).out)
    equal((o['bytes'], o['verified']), (100000, True), 'json')


def a_signal_ends_a_copy(w):
    w.file('a', 8 << 20)
    c = w.start('copy', 'file:a', 'file:b', '--layer', 'delay:rate=1M')
    wait_for(lambda: os.path.exists(w.path('b')), 'the copy to begin')
    wait_for(lambda: 'far-copy' in ''.join(open('/proc/%d/task/%s/comm' % (c.p.pid, t)).read()
                                           for t in os.listdir('/proc/%d/task' % c.p.pid)), 'the workers')
    equal(c.end(signal.SIGINT), 1, 'exit code: ' + c.err())
    has(c.err(), 'stopped by a signal', 'not complete')


# --------------------------------------------------------------------------------------------------- serve

def serve_says_where_it_listens(w):
    data = w.file('x.db', 268435)
    s, uri = w.serve('file:x.db')
    line = s.line()
    true(line.startswith('listening grpc://127.0.0.1:') and line.endswith('/default size=268435'), line)
    w.run('copy', uri, 'file:b', code=0)
    equal(w.read('b'), data, 'copy')
    w.run('copy', uri.rsplit('/', 1)[0], 'file:b', '--verify', code=0)
    equal(s.end(), 0, 'exit code: ' + s.err())
    equal(len(s.out().splitlines()), 1, 'lines')


def serve_ends_on_both_signals(w):
    w.file('a', 1000)
    for number in (signal.SIGINT, signal.SIGTERM):
        s, _ = w.serve('file:a')
        equal(s.end(number), 0, 'exit code: ' + s.err())


def what_is_copied_to_a_server_is_in_its_file(w):
    data = w.file('a', 3000001)
    w.file('b', 3000001, seed=2)
    s, uri = w.serve('file:b')
    w.run('copy', 'file:a', uri, '--verify', code=0)
    equal(w.read('b'), data, 'remote')
    equal(s.end(), 0, 'exit code')


def exports_have_names(w):
    a, b = w.file('a', 1000), w.file('b', 2000, seed=2)
    s, uri = w.serve('file:a', 'second=file:b')
    base = uri.rsplit('/', 1)[0]
    equal(w.run('copy', base + '/second', '-', code=0).stdout, b, 'second')
    equal(w.run('copy', base + '/default', '-', code=0).stdout, a, 'default')
    equal(w.run('copy', base + '/', '-', code=0).stdout, a, 'the empty name')
    p = w.run('info', base + '/third')
    true(p.returncode in (1, 2))
    has(p.err, 'third')
    equal(s.end(), 0, 'exit code')


def a_unix_socket(w):
    data = w.file('a', 5000)
    s, uri = w.serve('file:a', listen='grpc+unix:///?socket=' + w.path('far.sock'))
    has(uri, 'grpc+unix:///default?socket=')
    equal(w.run('copy', uri, '-', code=0).stdout, data, 'copy')
    equal(s.end(), 0, 'exit code')


def a_read_only_server_refuses_writes(w):
    data = w.file('a', 5000)
    w.file('b', 5000, seed=2)
    s = w.start('serve', 'file:a', '--read-only', '--listen', 'grpc://127.0.0.1:0')
    uri = s.line().split()[1]
    p = w.run('copy', 'file:b', uri)
    true(p.returncode == 1, p.err)
    has(p.err, 'read-only' if 'read-only' in p.err else 'Read-only')
    equal(w.read('a'), data, 'the file')
    equal(s.end(), 0, 'exit code')


def a_busy_port_is_named(w):
    w.file('a', 10)
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        p = w.run('serve', 'file:a', '--listen', 'grpc://127.0.0.1:' + port)
        equal(p.returncode, 1, p.err)
        has(p.err, port, 'in use')
        message(p.err)


def beyond_loopback_needs_insecure(w):
    w.file('a', 10)
    p = w.run('serve', 'file:a', '--listen', 'grpc://0.0.0.0:0')
    true(p.returncode in (1, 2))
    has(p.err, '--insecure')
    message(p.err)


def nobody_listens(w):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    p = w.run('info', 'grpc://127.0.0.1:%d' % port, timeout=30)
    true(p.returncode in (1, 4), p.err)
    has(p.err, str(port))
    message(p.err)


def a_silent_peer_meets_the_deadline(w):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        began = time.monotonic()
        p = w.run('info', 'grpc://127.0.0.1:%d' % s.getsockname()[1], '--deadline', '1s', timeout=30)
        true(p.returncode in (1, 4), '%d %s' % (p.returncode, p.err))
        true(time.monotonic() - began < 15, 'it took %.1f s' % (time.monotonic() - began))
        message(p.err)


def serve_has_a_control_socket(w):
    w.file('a', 4096)
    s = w.start('serve', 'file:a', '--listen', 'grpc://127.0.0.1:0', '--control', w.path('c.sock'))
    s.line()
    o = json.loads(w.run('status', '--control', w.path('c.sock'), '--json', code=0).out)
    equal(o['exports'], [{'name': 'default', 'size': 4096}], 'exports')
    w.run('flush', '--control', w.path('c.sock'), code=0)
    has(w.run('pull', '--control', w.path('c.sock'), code=1).err, 'serve')
    w.run('stop', '--control', w.path('c.sock'), code=0)
    equal(s.p.wait(30), 0, 'exit code')
    true(not os.path.exists(w.path('c.sock')), 'the socket is left')


def a_signal_during_open_ends_it(w):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        r = w.start('copy', 'grpc://127.0.0.1:%d' % s.getsockname()[1], 'null:')
        conn, _ = s.accept()
        began = time.monotonic()
        r.end(signal.SIGINT)
        true(time.monotonic() - began < 10, 'it went on')
        conn.close()


main([v for k, v in list(globals().items()) if callable(v) and getattr(v, '__module__', '') == '__main__'])
