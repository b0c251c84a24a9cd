# SPDX-License-Identifier: Apache-2.0
# Copyright the farpage authors
"""TCP servers of the tests: one that gives each connection to a function, and one that stands in between two others."""
import socket
import threading


def hang_up(*socks):
    for s in socks:
        try:
            s.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


class Listener:
    """Each connection is given to fn(connection), on a thread of its own, and closed when that returns; kept open until close()
    with `keep`."""

    def __init__(self, fn, keep=False):
        self.fn, self.keep, self.kept = fn, keep, []
        self.s = socket.create_server(('127.0.0.1', 0), backlog=64)
        self.port = self.s.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                c, _ = self.s.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(c,), daemon=True).start()

    def serve(self, c):
        try:
            self.fn(c)
        except OSError:
            pass
        finally:
            if self.keep:
                self.kept.append(c)
            else:
                c.close()

    def close(self):
        self.s.close()
        for c in self.kept:
            c.close()


class Between(Listener):
    """Passes bytes on to a port, and keeps them in `seen`: 0 is towards that port. `edit(way, bytes)` may change them. After
    cut[way] bytes the connection ends; with `once` those that come later are left alone."""

    def __init__(self, port, edit=None, cut=(1 << 40, 1 << 40), once=False):
        self.to, self.seen, self.edit = port, [bytearray(), bytearray()], edit or (lambda way, data: data)
        self.left, self.once, self.was_cut = list(cut), once, False
        super().__init__(self.join)

    def join(self, a):
        b = socket.create_connection(('127.0.0.1', self.to))
        back = threading.Thread(target=self.pass_on, args=(1, b, a), daemon=True)
        back.start()
        self.pass_on(0, a, b)
        back.join()
        b.close()

    def room(self, way):
        return 1 << 40 if self.once and self.was_cut else self.left[way]

    def pass_on(self, way, x, y):
        try:
            for s in (x, y):
                s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                data = x.recv(65536)
                if not data:
                    break
                self.seen[way] += data
                room = self.room(way)
                y.sendall(self.edit(way, data[:room]))
                self.left[way] -= len(data)
                if len(data) >= room:
                    self.was_cut = True
                    break
        except OSError:
            pass
        hang_up(x, y)
