"""Two nodes, an engine that writes plane after plane at one, and requests that wait at the other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from kvcache import wire
from kvcache.clock import NS_PER_MS
from kvcache.peers.receive import Patience, Receiver
from tests.server.follower import say_stopped
from tests.server.peer import different
from tests.server.peer_world import WAIT_MS, Here
from tests.server.talk import SIZE, SPEC, deadline
from tests.server.writer import Writer

PLANES = SPEC.plane_count


class Engine:
    """A ``Writer``, one call after another."""

    def __init__(self, here: Here) -> None:
        self._here = here
        self._loop = asyncio.new_event_loop()
        self._writer = self._loop.run_until_complete(Writer.at(here.node.address))

    def reserve(self, blocks: Sequence[bytes], parent: bytes = b"", push: str = "") -> int:
        return self._loop.run_until_complete(self._writer.reserve(blocks, parent, push)).count

    def advance(self, planes: int = 1, sums: bytes | None = None) -> None:
        self._loop.run_until_complete(self._writer.advance(planes, sums))

    def wrong_sums(self) -> bytes:
        """Of one plane."""
        return bytes(len(self._writer.sums(0, 1)))

    def commit(self, *, flipped: bool = False) -> int:
        """``flipped``: other bytes than the sums are of."""
        return self._loop.run_until_complete(self._writer.commit(flipped=flipped))

    def abort(self) -> None:
        self._loop.run_until_complete(self._writer.abort())

    def vanish(self) -> None:
        """Its connection is cut; then it says that its copies have ended."""
        self._writer.close()
        self._loop.run_until_complete(say_stopped(self._here.node.address))

    def close(self) -> None:
        self._writer.channel.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


class World:
    """``a`` is a peer of ``b``, and the other way round where ``pushes``."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._pool = stack.enter_context(ThreadPoolExecutor(16))
        self.a = self.b = Here.__new__(Here)

    def start(self, *, pushes: bool = False, **settings: object) -> None:
        """``settings`` are those of ``b``."""
        sockets = {name: f"unix://{self._folder}/{name}.sock" for name in "ab"}
        self.a = Here(self._folder, "a", self._stack, peers=sockets["b"] if pushes else "none")
        self.b = Here(self._folder, "b", self._stack, peers="none" if pushes else sockets["a"], **settings)
        here = self.a if pushes else self.b
        here.until(lambda: here.stat("peers:ok") == 1, "it follows")

    def add(self, name: str) -> Here:
        """A third one, with both as peers."""
        sockets = ",".join(f"unix://{self._folder}/{each}.sock" for each in "ab")
        return Here(self._folder, name, self._stack, peers=sockets)

    def engine(self, here: Here | None = None) -> Engine:
        """At ``a``, or there."""
        engine = Engine(here or self.a)
        self._stack.callback(engine.close)
        return engine

    def patience(self, **ms: int) -> None:
        """Of the one that receives."""
        receiver = self.b.node.core.bringing.receiver
        assert isinstance(receiver, Receiver)
        receiver._patience = replace(Patience(), **{name: each * NS_PER_MS for name, each in ms.items()})

    def want(
        self, blocks: Sequence[bytes], wait_ms: int = WAIT_MS, at: Here | None = None, **more: object
    ) -> Future[int]:
        """An engine at ``b`` (or there) asks for these, which ``a`` computes: how many it is given, at once,
        compared byte by byte."""
        here = at or self.b
        channel = here.connect()
        wanted = {"source": "a", **more}

        def load() -> int:
            leased = here.lease(list(blocks), wait_ms, channel, **wanted)
            memory = [memoryview(bytearray(SIZE)) for _ in range(leased.count)]
            if leased.count:
                channel.call(wire.Read(leased.lease, 0, leased.count), deadline(), into=memory)
                channel.call(wire.Release(leased.lease), deadline())
            assert [bytes(view) for view in memory] == [different(block) for block in blocks[: leased.count]]
            return leased.count

        return self._pool.submit(load)

    def until_follows(self, count: int = 1) -> None:
        """So many followers wait at ``a``."""
        self.a.until(lambda: self.a.stat("followers") == count, f"{count} followers wait")

    def until_came(self, planes: int) -> None:
        self.b.until(lambda: self.b.stat("streamed_planes") == planes, f"{planes} planes came")

    def until_quiet(self) -> None:
        """Nothing is held or on its way at either, and every invariant holds."""
        for here in (self.a, self.b):
            here.until_quiet()
            here.until(lambda here=here: here.embedded.call(lambda: idle(here)), "nothing is on its way")  # type: ignore[misc]
            here.embedded.call(here.node.core.check)


def idle(here: Here) -> bool:
    core = here.node.core
    bringing = core.bringing
    receiving = bringing.receiver._flights if bringing.receiver is not None else {}
    pushing = len(bringing.pusher) if bringing.pusher is not None else 0
    open_ = len(core.uses) + len(core.progress) + len(bringing.arriving)
    return not (receiving or pushing or open_ or core.host.coming_bytes)


def worlds(folder: Path) -> Iterator[World]:
    """For a fixture."""
    with ExitStack() as stack:
        yield World(folder, stack)
