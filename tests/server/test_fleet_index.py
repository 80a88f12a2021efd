"""The index of a fleet: who is followed, once each and as long as wanted, and who is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvcache.errors import BadInput
from kvcache.fleet import Fleet, Stream, Worker
from kvcache.fleet import Node as FleetNode
from kvcache.following import Channel
from kvcache.locality import LocalityIndex
from kvcache.server.fleet_index import TICK_S, FleetIndex
from kvcache.wire import EventBatch
from tests.server.http_double import SPACE, Clock, Node, Pauses, in_loop

A, B = "unix:///run/a.sock", "unix:///run/b.sock"


class Engine:
    def __init__(self) -> None:
        self.connected, self.trouble = False, "not yet"

    async def run(self) -> None:
        self.connected, self.trouble = True, ""
        await asyncio.Event().wait()


class Here:
    def __init__(self) -> None:
        self.clock, self.index = Clock(), LocalityIndex(4 << 20)
        self.nodes = {A: Node("node-a"), B: Node("node-b")}
        self.tokens: list[tuple[str, str]] = []
        self.resyncs: list[str] = []
        self.changes = 0
        self.pauses = Pauses()
        self.fleet = FleetIndex(
            self.index, self.clock, self._connect, self.pauses, self.resyncs.append, self._engine
        )
        self.fleet.changed = self._changed

    def _changed(self) -> None:
        self.changes += 1

    async def _connect(self, address: str, token: str) -> Channel:
        self.tokens.append((address, token))
        return await self.nodes[address].connect()

    def _engine(self, worker: Worker, stream: Stream) -> Engine:
        return Engine()

    async def until_synced(self, *names: str) -> None:
        for _ in range(10_000):
            if sorted(each.source for each in self.index.sources() if each.synced) == sorted(names):
                return
            await asyncio.sleep(0)
        raise AssertionError(self.index.sources())


@asynccontextmanager
async def running() -> AsyncIterator[Here]:
    here = Here()
    try:
        yield here
    finally:
        await here.fleet.close()
        await here.fleet.close()


@in_loop
async def test_a_node_is_followed_once_and_as_long_as_somebody_wants_it() -> None:
    async with running() as here:
        here.nodes[A].stored(SPACE, 4)
        here.fleet.add(Worker(name="w0", node=A), "a-token-of-16-chars")
        here.fleet.add(Worker(name="w1", node=A, sources=("cold",)))
        await here.until_synced("node-a")
        assert here.tokens == [(A, "a-token-of-16-chars")]
        assert here.fleet.worker_sources() == {"w0": ["node-a"], "w1": ["cold", "node-a"]}
        [followed] = here.fleet.followed()
        assert (followed.source, followed.connected, followed.workers) == ("node-a", True, ("w0", "w1"))
        assert here.index.entries_of("node-a") == 4 and here.fleet.troubles() == []
        assert await here.fleet.remove("w0")
        assert here.index.entries_of("node-a") == 4
        assert await here.fleet.remove("w1") and not await here.fleet.remove("w1")
        assert here.index.sources() == [] and here.fleet.followed() == [] and not here.nodes[A].open


@in_loop
async def test_a_fleets_file_is_followed_with_its_tokens(tmp_path: Path) -> None:
    async with running() as here:
        file = tmp_path / "b.token"
        file.write_text("the-token-of-node-b\n")
        file.chmod(0o600)
        here.fleet.follow(
            Fleet.of(
                [Worker(name="w", node=A, events="tcp://h:5557", ranks=2)],
                [FleetNode(address=B, token_file=str(file))],
            )
        )
        await here.until_synced("node-a", "node-b")
        assert sorted(here.tokens) == [(A, ""), (B, "the-token-of-node-b")]
        assert here.fleet.worker_sources() == {"w": ["engine:w", "engine:w/1", "node-a"]}
        assert [each.kind for each in here.fleet.followed()] == ["node", "node", "vllm", "vllm"]
        assert here.changes > 0


@in_loop
async def test_two_nodes_of_one_name_are_not_mixed_up() -> None:
    async with running() as here:
        here.nodes[B].name = "node-a"
        here.fleet.add_node(A)
        await here.until_synced("node-a")
        here.fleet.add_node(B)
        for _ in range(100):
            await asyncio.sleep(0)
        assert "both called node-a" in here.fleet.troubles()[0]
        assert here.fleet.node_source(A) == "node-a" and here.fleet.node_source(B) == ""


@in_loop
async def test_a_node_does_not_pass_for_an_engine() -> None:
    async with running() as here:
        here.nodes[A].name = "engine:w"
        here.fleet.add(Worker(name="w", events="tcp://h:1"))
        here.fleet.add_node(A)
        for _ in range(100):
            await asyncio.sleep(0)
        assert "is called engine:w" in here.fleet.troubles()[0]
        assert here.fleet.node_source(A) == "" and here.index.sources() == []


@in_loop
async def test_a_worker_may_come_back_while_it_is_being_taken_out() -> None:
    async with running() as here:
        worker = Worker(name="w", events="tcp://h:1", ranks=2)
        here.fleet.add(worker)
        await asyncio.sleep(0)
        leaving = asyncio.ensure_future(here.fleet.remove("w"))
        await asyncio.sleep(0)
        here.fleet.add(worker)
        for rank in ("", "/1"):
            here.index.apply(EventBatch(f"engine:w{rank}", 1, 0, True, []), here.clock.ns)
        assert await leaving
        assert [each.source for each in here.index.sources() if each.synced] == ["engine:w", "engine:w/1"]


@in_loop
async def test_who_is_lost_is_marked_and_then_forgotten() -> None:
    async with running() as here:
        here.nodes[A].stored(SPACE, 4)
        here.fleet.add_node(A)
        ticking = asyncio.get_running_loop().create_task(here.fleet.run())
        await here.until_synced("node-a")
        here.nodes[A].die()
        for _ in range(100):
            await asyncio.sleep(0)
        assert here.resyncs == ["connection"] and here.index.entries_of("node-a") == 4
        assert "node-a" in here.fleet.troubles()[-1]
        for _ in range(20):  # Time passes only as we let it.
            here.clock.ns += 250_000_000
            here.pauses.go.release()
            for _ in range(20):
                await asyncio.sleep(0)
        assert here.index.entries_of("node-a") == 0 and TICK_S in here.pauses.taken
        ticking.cancel()


@in_loop
async def test_a_worker_that_cannot_be_is_refused() -> None:
    async with running() as here:
        here.fleet.add(Worker(name="w", events="tcp://h:1"))
        with pytest.raises(BadInput, match="known already"):
            here.fleet.add(Worker(name="w"))
        with pytest.raises(BadInput, match="node of worker"):
            here.fleet.add(Worker(name="x", node="nowhere"))
        assert list(here.fleet.workers) == ["w"]
