#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""path.py FARPAGE TUNDELAY [CASE...]: farpage over a long path between two network namespaces: the right bytes, also where
packets are lost, also while they are written back. How fast it is, bench/run path tells. TAP."""
import os
import random
import subprocess
import sys

TUNDELAY = os.path.abspath(sys.argv[2])
del sys.argv[2]
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.join(HERE, '..', 'system'), HERE]
import netpath  # noqa: E402
from cli_lib import FARPAGE, Skip, equal, main, need_fuse, true, wait_for  # noqa: E402

MIB = 1 << 20


def path(w, *args):
    try:
        p = netpath.Path(TUNDELAY, *args)
    except netpath.Missing as e:
        raise Skip(str(e))
    w.close_before = p
    return p


def serve(w, p, *options):
    s = p.start('a', FARPAGE, 'serve', 'file:' + w.path('region'), '--listen', 'grpc://%s:0' % netpath.SERVER, '--insecure', *options)
    return s.stdout.readline().split()[1]


def over(w, rtt_ms, mbit, loss, size):
    """Read at random while the pull runs, then all of it; write here and find it there."""
    need_fuse()
    data = bytearray(w.file('region', size))
    p = path(w, rtt_ms, mbit, loss)
    uri = serve(w, p)
    w.file('t', 0)
    m = p.start('b', FARPAGE, 'mount', uri, w.path('t'), '--mode', 'managed')
    where = m.stdout.readline().strip()
    true(where, 'it was not mounted')
    rnd = random.Random(1)
    fd = os.open(where, os.O_RDWR)
    for _ in range(30):
        off = rnd.randrange(size - 4096)
        equal(os.pread(fd, 4096, off), bytes(data[off:off + 4096]), 'bytes at %d' % off)
    w.run('wait', w.path('t'), '--local', '100%', '--timeout', '100s', code=0)
    equal(w.read('t'), bytes(data), 'content')
    for k in range(50):
        off, piece = rnd.randrange(size - 70000), os.urandom(rnd.randrange(1, 70000))
        os.pwrite(fd, piece, off)
        data[off:off + len(piece)] = piece
    os.fsync(fd)
    equal(w.read('region'), bytes(data), 'content there after fsync')
    os.close(fd)
    m.terminate()
    equal(m.wait(60), 0, 'exit code')


def ten_ms_and_a_gigabit(w):
    over(w, 10, 1000, 0, 64 * MIB)


def forty_ms_and_half_a_gigabit(w):
    over(w, 40, 500, 0, 48 * MIB)


def one_packet_in_a_thousand_is_lost(w):
    over(w, 10, 1000, 1, 32 * MIB)
    w.close_before.close()
    over(w, 40, 500, 1, 16 * MIB)


def demand_fetches_pass_the_pull(w):
    """What is asked for now comes while the pull has far to go."""
    need_fuse()
    data = w.file('region', 128 * MIB)
    p = path(w, 10, 200)
    uri = serve(w, p, '--read-only')
    w.file('t', 0)
    m = p.start('b', FARPAGE, 'mount', uri, w.path('t'), '--mode', 'managed', '--read-only')
    where = m.stdout.readline().strip()
    wait_for(lambda: w.status(w.path('t'))['local'] > 8 * MIB, 'the pull')
    fd = os.open(where, os.O_RDONLY)
    for off in range(100 * MIB, 101 * MIB, 128 << 10):
        equal(os.pread(fd, 4096, off), data[off:off + 4096])
    os.close(fd)
    true(w.status(w.path('t'))['local'] < 100 * MIB, 'the pull was there before the fetches')
    m.terminate()
    m.wait(60)


def only_a_path_that_loses_is_paced_by_tcp(w):
    """Where the system's choice is bbr: no connection has it at first, and bulk gets it when packets are lost."""
    need_fuse()
    for loss in (0, 5):
        w.file('region', 32 * MIB)
        p = path(w, 10, 1000, loss)
        try:
            for side in 'ab':
                p.call(side, 'sysctl', '-qw', 'net.ipv4.tcp_congestion_control=bbr')
        except subprocess.CalledProcessError as e:
            raise Skip('this kernel has no bbr: ' + e.stderr.strip())
        uri = serve(w, p, '--read-only')
        w.file('t', 0)
        m = p.start('b', FARPAGE, 'mount', uri, w.path('t'), '--mode', 'managed', '--read-only')
        true(m.stdout.readline().strip(), 'it was not mounted')
        w.run('wait', w.path('t'), '--local', '100%', '--timeout', '100s', code=0)
        lines = p.call('a', 'ss', '-tinH').splitlines()
        control = {int(l.split('bytes_sent:')[1].split()[0]): l.split()[0] for l in lines if 'bytes_sent:' in l}
        equal(control[max(control)] == 'bbr', loss > 0, 'bulk is paced by %s' % control)
        true(control[min(control)] != 'bbr', 'a connection of few bytes is paced by %s' % control)
        m.terminate()
        equal(m.wait(60), 0, 'exit code')
        p.close()


def alone(case):
    """The mount ends before the path does."""
    def run(w):
        try:
            case(w)
        finally:
            if hasattr(w, 'close_before'):
                w.close_before.close()
    run.__name__ = case.__name__
    return run


main([alone(c) for c in (ten_ms_and_a_gigabit, forty_ms_and_half_a_gigabit, one_packet_in_a_thousand_is_lost,
                         demand_fetches_pass_the_pull, only_a_path_that_loses_is_paced_by_tcp)])
