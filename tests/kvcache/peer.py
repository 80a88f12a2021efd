"""The other end of a channel under test, following a script, and a bench that joins the two."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvcache.channel import AsyncChannel, BlockingChannel
from kvcache.clock import NS_PER_MS, SystemClock
from kvcache.wire import (
    HEADER,
    PROTOCOL_VERSION,
    Hello,
    Message,
    Reply,
    Request,
    Welcome,
    decode_header,
    decode_request,
    encode,
)

CLOCK = SystemClock()
PATIENCE_MS = 20_000
HELLO = Hello(PROTOCOL_VERSION)
WELCOME = Welcome(PROTOCOL_VERSION, "node", 7, "default", ["reader"], b"k" * 32, 0)


def soon(ms: int = PATIENCE_MS) -> int:
    return CLOCK.now_ns() + ms * NS_PER_MS


class Peer:
    """The other end: what a node would do, one step at a time, in a thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def take(self) -> tuple[int, Request, bytes]:
        header = decode_header(self._exactly(HEADER.size))
        call, request = decode_request(self._exactly(header.body_bytes))
        return call, request, self._exactly(header.payload_bytes)

    def give(self, call: int, reply: Message, payload: bytes = b"") -> None:
        self.sock.sendall(encode(call, reply, len(payload)) + payload)

    def greet(self, descriptors: Sequence[int] = ()) -> None:
        call, request, _ = self.take()
        assert isinstance(request, Hello)
        socket.send_fds(self.sock, [encode(call, WELCOME)], list(descriptors))

    def wait_for_end(self) -> None:
        while self.sock.recv(1 << 16):
            pass

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self.sock.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)


Script = Callable[[Peer], None]


class Channel(Protocol):
    """What both kinds have in common, seen from a test that waits for everything."""

    ended_by: str
    welcome: Welcome
    slab_fd: int | None

    def call(
        self,
        request: Request,
        deadline_ns: int,
        payload: Sequence[memoryview] = (),
        into: Sequence[memoryview] = (),
    ) -> Reply: ...

    def close(self) -> None: ...


class Waited:
    """An AsyncChannel on a loop of its own."""

    def __init__(self, runner: asyncio.Runner, channel: AsyncChannel) -> None:
        self.runner = runner
        self.channel = channel

    def __getattr__(self, name: str) -> Any:  # Attributes are those of the channel, whatever they are.
        return getattr(self.channel, name)

    def call(self, *arguments: Any, **named: Any) -> Reply:  # Passed through.
        return self.runner.run(self.channel.call(*arguments, **named))


class Bench:
    """Serves scripts on a unix socket and connects the kind of channel under test."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.address = f"unix://{path}"
        self.runner = asyncio.Runner()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._failures: list[BaseException] = []
        self._channels: list[Channel | Waited] = []

    def play(self, script: Script) -> None:
        thread = threading.Thread(target=self._play, args=(script,))
        thread.start()
        self._threads.append(thread)

    def connect(self, script: Script, hello: Hello = HELLO, ms: int = PATIENCE_MS) -> Any:  # A Channel.
        self.play(script)
        if self.kind == "blocking":
            channel: Channel | Waited = BlockingChannel.connect(self.address, hello, soon(ms))
        else:
            waiting = AsyncChannel.connect(self.address, hello, soon(ms))
            channel = Waited(self.runner, self.runner.run(waiting))
        self._channels.append(channel)
        return channel

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self.runner.close()
        for thread in self._threads:
            thread.join()
        self._listener.close()
        assert self._failures == []

    def _play(self, script: Script) -> None:
        try:
            sock, _ = self._listener.accept()
            with sock:
                script(Peer(sock))
        except (EOFError, ConnectionError):
            pass
        except BaseException as error:
            self._failures.append(error)


def run_async(
    tmp_path: Path, script: Script, work: Callable[[AsyncChannel], Coroutine[None, None, None]]
) -> None:
    """``work`` on an asynchronous channel to a peer that follows the script."""
    bench = Bench("async", tmp_path / "node.sock")

    async def main(channel: AsyncChannel) -> None:
        async with channel:
            await asyncio.wait_for(work(channel), 2 * PATIENCE_MS / 1_000)

    waited = bench.connect(script)
    bench.runner.run(main(waited.channel))
    bench.close()
