# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""A long path on one machine: two network namespaces and tundelay between them. The server lives in `a` (10.77.0.1), the
client in `b`."""
import ctypes
import glob
import json
import os
import shutil
import signal
import subprocess
import time

SERVER = '10.77.0.1'
BUFFER = 64 << 20  # what TCP may use for a connection; the systems' own limits are below one path's content


class Missing(Exception):
    """Why there can be no path here."""


def end_with_us():
    """In a child before it becomes a program: what is killed cannot clean up, and its children must not outlive it."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def remove_left():
    """The namespaces of those who were killed before they could."""
    for name in map(os.path.basename, glob.glob('/run/netns/farpage-*-[ab]')):
        pid = name.split('-')[1]
        if pid.isdigit() and not os.path.exists('/proc/' + pid):
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


class Path:
    def __init__(self, tundelay, rtt_ms, mbit, loss_permille=0, queue_kib=8192):
        if os.geteuid() != 0:
            raise Missing('network namespaces and TUN devices need root')
        for program, package in (('ip', 'iproute2'), ('nsenter', 'util-linux'), ('sysctl', 'procps')):
            if not shutil.which(program):
                raise Missing('%s is not installed (apt-get install %s)' % (program, package))
        if not os.path.exists('/dev/net/tun'):
            raise Missing('/dev/net/tun is missing')
        remove_left()
        self.names = []
        self.link = None
        self.children = []
        try:
            self.make(tundelay, rtt_ms, mbit, loss_permille, queue_kib)
        except Exception:
            self.close()
            raise

    def make(self, tundelay, rtt_ms, mbit, loss_permille, queue_kib):
        for side in 'ab':
            name = 'farpage-%d-%s' % (os.getpid(), side)
            out = subprocess.run(['ip', 'netns', 'add', name], capture_output=True, text=True)
            if out.returncode:
                raise Missing('network namespaces are not to be had: ' + out.stderr.strip())
            self.names.append(name)
            self.call(side, 'ip', 'link', 'set', 'lo', 'up')
            self.call(side, 'sysctl', '-qw', 'net.ipv4.tcp_rmem=4096 131072 %d' % BUFFER,
                      'net.ipv4.tcp_wmem=4096 65536 %d' % BUFFER)
        self.link = subprocess.Popen([tundelay, self.names[0], self.names[1], str(int(rtt_ms * 500)), str(mbit),
                                      str(loss_permille), str(queue_kib)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                     text=True, preexec_fn=end_with_us)
        if self.link.stdout.readline().strip() != 'up':
            raise Missing(self.link.stderr.read().strip() or 'the forwarder does not start')

    def inside(self, side, *argv):
        # Not `ip netns exec`: it takes a mount namespace of its own too, and nobody would see what is mounted in it.
        return ['nsenter', '--net=/run/netns/' + self.names['ab'.index(side)]] + [str(a) for a in argv]

    def call(self, side, *argv):
        return subprocess.run(self.inside(side, *argv), check=True, capture_output=True, text=True).stdout

    def start(self, side, *argv, **more):
        p = subprocess.Popen(self.inside(side, *argv), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             preexec_fn=end_with_us, **more)
        self.children.append(p)
        return p

    def bytes_to_client(self):
        """What has come out of the link at the client's end so far, headers included."""
        self.link.send_signal(signal.SIGUSR1)
        lines = [self.link.stdout.readline() for _ in range(2)]
        return int(lines[0].split()[-1])

    def iperf(self, seconds):
        """MiB/s of one stream from server to client, its start counted, or None without iperf3."""
        if not shutil.which('iperf3'):
            return None
        server = self.start('a', 'iperf3', '-s', '-1')
        for _ in range(100):  # until it listens
            if ':5201' in self.call('a', 'ss', '-ltn'):
                break
            time.sleep(0.05)
        out = self.call('b', 'iperf3', '-c', SERVER, '-R', '-t', seconds, '-J')
        server.wait(10)
        return json.loads(out)['end']['sum_received']['bits_per_second'] / 8 / (1 << 20)

    def close(self):
        for p in self.children[::-1] + [self.link]:  # who asks before who answers
            if p and p.poll() is None:
                p.terminate()
                try:
                    p.wait(10)
                except subprocess.TimeoutExpired:
                    p.kill()
                    p.wait()
        for name in self.names:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)
        self.names = []
