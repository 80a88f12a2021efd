"""Waits for blocks from NVMe in the real drivers, over a node whose answers say that some are coming."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvcache.channel import AsyncChannel, BlockingChannel
from kvcache.client.async_store import AsyncNodeStore
from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.store import BlockStore, Handle
from kvcache.client.waiting import ALONE_MS
from kvcache.clock import NS_PER_MS, Clock, SystemClock
from kvcache.config import NodeConfig
from kvcache.testing.stores import EXAMPLE, SPEC, content, prompt, room, whole
from kvcache.testing.threaded import Threaded
from kvcache.wire import Leased, Message, Persist, Reply, Request, TakeLease
from tests.client.conftest import TIMEOUT_MS, MovableClock, options
from tests.client.proxy import Proxy, changed
from tests.server.conftest import EmbeddedNode

Scenario = Callable[[BlockStore, Handle], Awaitable[None]]


def play(driver: str, address: str, scenario: Scenario, clock: Clock | None = None) -> None:
    chosen, told = options(address, mapped=True), clock or SystemClock()

    async def main() -> None:
        store: BlockStore
        if driver == "async":
            store = AsyncNodeStore(chosen, told)
        else:
            store = Threaded(BlockingNodeStore(chosen, told))
        await scenario(store, await store.open(EXAMPLE, SPEC))
        await store.close()

    asyncio.run(main())


def leases(node: EmbeddedNode) -> float:
    return node.call(node.node.core.stats)["leases"]


def coming(replies: int) -> Callable[[Reply], Message]:
    """So many leases say that one block is coming."""
    left = [replies]

    def change(reply: Reply) -> Message:
        assert isinstance(reply, Leased)
        left[0] -= 1
        if left[0] < 0:
            return reply
        fields = {name: getattr(reply, name) for name in reply.__struct_fields__}
        return Leased(**{**fields, "coming": 1})

    return change


@pytest.mark.parametrize("driver", ["async", "blocking"])
def test_a_lease_is_taken_again_until_nothing_is_coming(
    driver: str, node: EmbeddedNode, proxy: Proxy
) -> None:
    async def scenario(store: BlockStore, handle: Handle) -> None:
        prefix = prompt(handle, 4)
        await store.save(handle, prefix[:3], whole(content(handle, prefix[:3])))
        proxy.tamper = changed(Leased, coming(2))
        lease = await store.lease(handle, prefix, "request", wait_ms=60_000)
        assert (lease.count, lease.coming) == (3, 0)
        assert store.counters["lease_waits"] == 2
        assert leases(node) == 1
        into = room(3)
        assert await store.load(lease, whole(into)) == frozenset()
        assert into == content(handle, prefix[:3])
        await store.release(lease)
        assert await store.match(handle, prefix) == 3
        assert leases(node) == 0

    play(driver, proxy.address, scenario)


@pytest.mark.parametrize("driver", ["async", "blocking"])
def test_a_lease_without_a_wait_says_what_is_coming(driver: str, proxy: Proxy) -> None:
    async def scenario(store: BlockStore, handle: Handle) -> None:
        prefix = prompt(handle, 4)
        await store.save(handle, prefix[:3], whole(content(handle, prefix[:3])))
        proxy.tamper = changed(Leased, coming(1))
        lease = await store.lease(handle, prefix, wait_ms=0)
        assert (lease.count, lease.coming) == (3, 1)
        assert store.counters["coming_blocks"] == 1

    play(driver, proxy.address, scenario)


def test_a_cancelled_wait_leaves_no_lease(node: EmbeddedNode, proxy: Proxy) -> None:
    async def scenario(store: BlockStore, handle: Handle) -> None:
        prefix = prompt(handle, 4)
        await store.save(handle, prefix[:3], whole(content(handle, prefix[:3])))
        proxy.tamper = changed(Leased, coming(1 << 30))
        leasing = asyncio.ensure_future(store.lease(handle, prefix, wait_ms=60_000))
        while store.counters.get("lease_waits", 0) < 3:
            await asyncio.sleep(0.001)
        leasing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leasing
        assert await store.match(handle, prefix) == 3, "the connection is still good"
        assert leases(node) == 0

    play("async", proxy.address, scenario)


@pytest.mark.parametrize("driver", ["async", "blocking"])
def test_others_have_the_connection_during_a_wait(driver: str, proxy: Proxy) -> None:
    async def scenario(store: BlockStore, handle: Handle) -> None:
        prefix = prompt(handle, 4)
        await store.save(handle, prefix[:3], whole(content(handle, prefix[:3])))
        proxy.tamper = changed(Leased, coming(1 << 30))
        leasing = asyncio.ensure_future(store.lease(handle, prefix, wait_ms=60_000))
        while store.counters.get("lease_waits", 0) < 3:
            await asyncio.sleep(0.001)
        for _ in range(3):
            assert await store.match(handle, prefix) == 3
        assert not leasing.done()
        proxy.tamper = lambda call, reply, frame: frame
        assert (await leasing).count == 3

    play(driver, proxy.address, scenario)


@pytest.mark.parametrize("driver", ["async", "blocking"])
def test_a_call_may_take_as_long_as_the_node_was_asked_to_wait(
    driver: str, node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ms: dict[type[Message], list[float]] = {TakeLease: [], Persist: []}
    clock = MovableClock()
    clock.stop()

    def note(request: Request, deadline_ns: int) -> None:
        if type(request) in given_ms:
            given_ms[type(request)].append((deadline_ns - clock.now_ns()) / NS_PER_MS)

    call, async_call = BlockingChannel.call, AsyncChannel.call

    def noted(self: BlockingChannel, request: Request, deadline_ns: int, *rest: list[memoryview]) -> Reply:
        note(request, deadline_ns)
        return call(self, request, deadline_ns, *rest)

    async def async_noted(
        self: AsyncChannel, request: Request, deadline_ns: int, *rest: list[memoryview]
    ) -> Reply:
        note(request, deadline_ns)
        return await async_call(self, request, deadline_ns, *rest)

    monkeypatch.setattr(BlockingChannel, "call", noted)
    monkeypatch.setattr(AsyncChannel, "call", async_noted)

    async def scenario(store: BlockStore, handle: Handle) -> None:
        prefix = prompt(handle, 1)
        await store.lease(handle, prefix, wait_ms=0)
        await store.lease(handle, prefix, wait_ms=60_000)
        await store.persist(handle, prefix, wait_ms=60_000)

    play(driver, node.node.address, scenario, clock)
    assert given_ms[TakeLease] == [TIMEOUT_MS, TIMEOUT_MS + ALONE_MS]
    # Behind a wait, which the node may be in, the time counts from that wait's end.
    assert given_ms[Persist] == [TIMEOUT_MS + 2 * ALONE_MS]


@pytest.mark.slow
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("driver", ["async", "blocking"])
def test_what_was_persisted_is_had_from_the_next_node_by_one_lease(
    driver: str, beside: bool, tmp_path: Path
) -> None:
    """Over a real tier: durable, the node gone, a new one with nothing in memory, and every byte compared."""
    settings = NodeConfig(
        socket=str(tmp_path / "node.sock"), http="none", capacity="16MiB", nvme=f"{tmp_path}/nvme:64MiB"
    )
    blocks = 1_500  # More than one batch of a lease.

    async def fill(store: BlockStore, handle: Handle) -> None:
        prefix = prompt(handle, blocks)
        assert await store.save(handle, prefix, whole(content(handle, prefix))) == blocks
        assert await store.persist(handle, prefix, wait_ms=60_000) == blocks
        assert store.counters["persisted_blocks"] == blocks

    async def drain(store: BlockStore, handle: Handle) -> None:
        prefix = prompt(handle, blocks)
        others = [asyncio.ensure_future(lease_all(store, handle, seed)) for seed in range(1, 4) if beside]
        early = await store.lease(handle, prefix, wait_ms=0)
        assert early.count + early.coming <= blocks
        await store.release(early)
        lease = await store.lease(handle, prefix, wait_ms=60_000)
        assert (lease.count, lease.coming) == (blocks, 0)
        into = room(blocks)
        assert await store.load(lease, whole(into)) == frozenset()
        assert into == content(handle, prefix)
        await store.release(lease)
        assert await asyncio.gather(*others) == [0] * len(others)
        assert not any(name.startswith(("ended", "missed", "failed")) for name in store.counters)

    async def lease_all(store: BlockStore, handle: Handle, seed: int) -> int:
        return (await store.lease(handle, prompt(handle, 8, seed))).count

    for scenario in (fill, drain):
        node = EmbeddedNode(settings)
        play(driver, node.node.address, scenario)
        node.close()
