"""Between a client and a real node: passes frames on, and does to replies what a test asks for.

What it does not touch is the node's own, so a test with it is as honest as the node. Each connection has
two threads; the slab's descriptor is passed on with the frame it came with, or replaced.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from kvcache.wire import HEADER, Message, Reply, decode_header, decode_reply, encode

# Given call, reply and the whole frame, payload included: what is sent instead. Empty: nothing.
Tamper = Callable[[int, Reply, bytes], bytes]


def instead(kind: type[Message], frame_for: Callable[[int], bytes], once: bool = False) -> Tamper:
    """Replies of this kind are replaced by what ``frame_for`` makes of their call number."""
    left = [1 if once else -1]

    def tamper(call: int, reply: Reply, frame: bytes) -> bytes:
        if not isinstance(reply, kind) or left[0] == 0:
            return frame
        left[0] -= 1
        return frame_for(call)

    return tamper


def changed(kind: type[Message], change: Callable[[Reply], Message]) -> Tamper:
    """Replies of this kind, without payload, are changed."""

    def tamper(call: int, reply: Reply, frame: bytes) -> bytes:
        return encode(call, change(reply)) if isinstance(reply, kind) else frame

    return tamper


class Proxy:
    """Serves ``address`` over the node at ``node_path`` until closed. ``tamper`` may be set any time."""

    def __init__(self, node_path: str, path: Path) -> None:
        self.address = f"unix://{path}"
        self.tamper: Tamper = lambda call, reply, frame: frame
        self.descriptor: int | None = None  # Passed instead of the node's.
        self.connections = 0
        self._node_path = node_path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """May be called twice."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for sock in (*self._sockets, self._listener):
            sock.close()

    def cut(self) -> None:
        """End every connection there is."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            node = socket.socket(socket.AF_UNIX)
            node.connect(self._node_path)
            self.connections += 1
            self._sockets += [client, node]
            for work in (self._requests, self._replies):
                thread = threading.Thread(target=work, args=(client, node))
                self._threads.append(thread)
                thread.start()

    def _requests(self, client: socket.socket, node: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                node.sendall(data)
        _end(client, node)

    def _replies(self, client: socket.socket, node: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                frame, descriptors = _frame(node)
                header = decode_header(frame[: HEADER.size])
                call, reply = decode_reply(frame[HEADER.size : HEADER.size + header.body_bytes])
                passed = [self.descriptor] if descriptors and self.descriptor is not None else descriptors
                if out := self.tamper(call, reply, frame):
                    socket.send_fds(client, [out[:1]], passed)
                    client.sendall(out[1:])
                for descriptor in descriptors:
                    os.close(descriptor)
        _end(client, node)


def _frame(node: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(node, HEADER.size, 4)
    while len(data) < HEADER.size:
        data += _some(node, HEADER.size - len(data))
    header = decode_header(data)
    total = HEADER.size + header.body_bytes + header.payload_bytes
    while len(data) < total:
        data += _some(node, total - len(data))
    return data, descriptors


def _some(node: socket.socket, most: int) -> bytes:
    data = node.recv(most)
    if not data:
        raise EOFError
    return data


def _end(*sockets: socket.socket) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
