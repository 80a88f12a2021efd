"""What only the drivers do: wait for what runs before they let go, and share one connection fairly."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence

import pytest

from kvcache.channel import AsyncChannel
from kvcache.client import connect, connect_blocking, local
from kvcache.client.async_store import AsyncNodeStore
from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.store import BlockingStore
from kvcache.clock import SystemClock
from kvcache.errors import BadInput, NotAllowed, Unavailable
from kvcache.sums import copy_and_sum
from kvcache.testing.stores import EXAMPLE, SPEC, content, prompt, room, whole
from kvcache.wire import Matched, Reply
from tests.client.conftest import PATIENCE_S, MovableClock, Rig, eventually, impatient, options
from tests.client.proxy import Proxy
from tests.server.conftest import EmbeddedNode


class HeldCopy:
    """In place of ``local.copy_and_sum``: stands still in its thread until let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.ended = threading.Event()

    def __call__(self, sources: Sequence[memoryview], targets: Sequence[memoryview], chunk: int) -> bytes:
        self.begun.set()
        assert self.go_on.wait(20)
        sums = copy_and_sum(sources, targets, chunk)
        self.ended.set()
        return sums


@pytest.fixture
def held_copy(monkeypatch: pytest.MonkeyPatch) -> HeldCopy:
    held = HeldCopy()
    monkeypatch.setattr(local, "copy_and_sum", held)
    return held


def stats(node: EmbeddedNode) -> dict[str, float]:
    return node.call(node.node.core.stats)


async def cancelled_half_way(running: asyncio.Task[object], held: HeldCopy) -> None:
    """Cancel while the copy stands still; nothing may be let go before it has ended."""
    await asyncio.to_thread(held.begun.wait, 20)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=0.02)
    assert not done, "the copy still runs"
    running.cancel()
    held.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert held.ended.is_set()


def test_a_cancelled_save_is_aborted_after_its_copy(node: EmbeddedNode, held_copy: HeldCopy) -> None:
    async def main() -> None:
        store = connect(node.node.address, timeout_ms=20_000)
        handle = await store.open(EXAMPLE, SPEC)
        prefix = prompt(handle, 3)
        blocks = whole(content(handle, prefix))
        saving = asyncio.ensure_future(store.save(handle, prefix, blocks))
        await cancelled_half_way(saving, held_copy)
        assert stats(node)["reservations"] == 0
        assert stats(node)["requests:abort"] == 1
        assert await store.match(handle, prefix) == 0
        assert await store.save(handle, prefix, blocks) == 3, "the connection is still good"
        await store.close()

    asyncio.run(main())


def test_a_cancelled_load_leaves_the_buffers_alone_afterwards(
    node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        store = connect(node.node.address, timeout_ms=20_000)
        handle = await store.open(EXAMPLE, SPEC)
        prefix = prompt(handle, 3)
        await store.save(handle, prefix, whole(content(handle, prefix)))
        lease = await store.lease(handle, prefix)
        held = HeldCopy()
        monkeypatch.setattr(local, "copy_and_sum", held)
        await cancelled_half_way(asyncio.ensure_future(store.load(lease, whole(room(3)))), held)
        await store.release(lease)
        assert stats(node)["leases"] == 0
        await store.close()

    asyncio.run(main())


def test_a_copy_is_waited_for_when_everything_is_cancelled(
    node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``asyncio.run`` does at its end, to the tasks within the store too."""

    async def main() -> None:
        store = connect(node.node.address, timeout_ms=20_000)
        handle = await store.open(EXAMPLE, SPEC)
        prefix = prompt(handle, 3)
        await store.save(handle, prefix, whole(content(handle, prefix)))
        lease = await store.lease(handle, prefix)
        held = HeldCopy()
        monkeypatch.setattr(local, "copy_and_sum", held)
        loading = asyncio.ensure_future(store.load(lease, whole(room(3))))
        await asyncio.to_thread(held.begun.wait, 20)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        done, _ = await asyncio.wait([loading], timeout=0.02)
        held.go_on.set()
        assert not done, "the copy still runs"
        with pytest.raises(asyncio.CancelledError):
            await loading
        assert held.ended.is_set()
        await store.close()

    asyncio.run(main())


def test_a_lease_that_was_granted_to_a_cancelled_caller_is_released(node: EmbeddedNode, proxy: Proxy) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def tamper(call: int, reply: Reply, frame: bytes) -> bytes:
        if type(reply).__name__ == "Leased":
            asked.set()
            assert go_on.wait(20)
        return frame

    async def main() -> None:
        store = connect(proxy.address, timeout_ms=20_000)
        handle = await store.open(EXAMPLE, SPEC)
        prefix = prompt(handle, 2)
        await store.save(handle, prefix, whole(content(handle, prefix)))
        proxy.tamper = tamper
        leasing = asyncio.ensure_future(store.lease(handle, prefix))
        await asyncio.to_thread(asked.wait, 20)
        leasing.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await leasing
        assert stats(node)["leases"] == 0
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("driver", [AsyncNodeStore, BlockingNodeStore])
def test_no_new_connection_while_a_copy_over_the_old_one_runs(
    node: EmbeddedNode, proxy: Proxy, held_copy: HeldCopy, driver: type[object]
) -> None:
    """Hello says that no copy of ours is in flight; it must not be said before it is so."""
    if driver is AsyncNodeStore:
        asyncio.run(_no_new_connection_async(proxy, held_copy))
    else:
        _no_new_connection_blocking(proxy, held_copy)
    eventually(lambda: stats(node).get("limbo_blocks", 0) == 0)


async def _no_new_connection_async(proxy: Proxy, held: HeldCopy) -> None:
    store = connect(proxy.address, timeout_ms=20_000)
    handle = await store.open(EXAMPLE, SPEC)
    prefix = prompt(handle, 2)
    saving = asyncio.ensure_future(store.save(handle, prefix, whole(content(handle, prefix))))
    await asyncio.to_thread(held.begun.wait, 20)
    proxy.cut()
    end = asyncio.get_running_loop().time() + 0.2
    while asyncio.get_running_loop().time() < end:
        assert await store.match(handle, prefix) == 0
        assert proxy.connections == 1
        await asyncio.sleep(0.005)
    held.go_on.set()
    assert await saving == 0
    while await store.save(handle, prefix, whole(content(handle, prefix))) == 0:
        await asyncio.sleep(0.005)
    assert proxy.connections == 2
    await store.close()


def _no_new_connection_blocking(proxy: Proxy, held: HeldCopy) -> None:
    store = connect_blocking(proxy.address, timeout_ms=20_000)
    handle = store.open(EXAMPLE, SPEC)
    prefix = prompt(handle, 2)
    counts: list[int] = []
    blocks = whole(content(handle, prefix))
    saving = threading.Thread(target=lambda: counts.append(store.save(handle, prefix, blocks)))
    saving.start()
    assert held.begun.wait(20)
    proxy.cut()
    end_ns = SystemClock().now_ns() + 200_000_000
    while SystemClock().now_ns() < end_ns:
        assert store.match(handle, prefix) == 0
        assert proxy.connections == 1
    held.go_on.set()
    saving.join()
    assert counts == [0]
    eventually(lambda: store.save(handle, prefix, blocks) == 2)
    assert proxy.connections == 2
    store.close()


@pytest.mark.parametrize("rig", ["mapped"], indirect=True)
def test_the_map_outlives_the_connection_for_a_running_copy(rig: Rig, held_copy: HeldCopy) -> None:
    prefix = prompt(rig.handle, 2)
    held_copy.go_on.set()
    assert rig.store.save(rig.handle, prefix, whole(content(rig.handle, prefix))) == 2
    lease = rig.store.lease(rig.handle, prefix)
    held_copy.go_on.clear()
    held_copy.begun.clear()
    into, failed = room(2), []
    loading = threading.Thread(target=lambda: failed.append(rig.store.load(lease, whole(into))))
    loading.start()
    assert held_copy.begun.wait(20)
    rig.store.close()
    held_copy.go_on.set()
    loading.join()
    assert failed == [frozenset()]
    assert into == content(rig.handle, prefix)


def test_threads_that_wait_for_their_turn_give_up_by_their_deadline(proxy: Proxy) -> None:
    store = BlockingNodeStore(options(proxy.address, mapped=True), SystemClock())
    handle = store.open(EXAMPLE, SPEC)
    proxy.tamper = lambda call, reply, frame: b"" if isinstance(reply, Matched) else frame
    counts: list[int] = []
    prefix = prompt(handle, 1)
    together = threading.Barrier(8)

    def ask() -> None:
        together.wait(PATIENCE_S)
        counts.append(store.match(handle, prefix))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    with impatient(store, 150):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert counts == [0] * 8
    # Who came late may have found the store connected again, and met a deadline of his own.
    assert 1 <= store.counters["ended:deadline"] <= store.counters["connects"]
    store.close()


def test_an_interrupt_gives_up_the_connection_and_what_it_held(
    node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = connect_blocking(node.node.address, timeout_ms=20_000)
    handle = store.open(EXAMPLE, SPEC)
    prefix = prompt(handle, 2)

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "copy_and_sum", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save(handle, prefix, whole(content(handle, prefix)))
    assert store.counters["ended:interrupted"] == 1
    eventually(lambda: store.save(handle, prefix, whole(content(handle, prefix))) == 2)
    eventually(lambda: stats(node).get("limbo_blocks", 0) == 0)
    store.close()


def test_a_forked_child_is_told_to_connect_for_itself(
    node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = connect_blocking(node.node.address, timeout_ms=20_000)
    handle = store.open(EXAMPLE, SPEC)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(BadInput, match="another process"):
            store.match(handle, prompt(handle, 1))
    assert store.match(handle, prompt(handle, 1)) == 0
    store.close()


def test_no_node_no_name(tmp_path: object) -> None:
    clock = MovableClock()
    clock.stop()
    store = BlockingNodeStore(options(f"unix://{tmp_path}/nobody.sock", mapped=True), clock)
    with pytest.raises(Unavailable):
        store.open(EXAMPLE, SPEC)
    with pytest.raises(Unavailable):
        store.open(EXAMPLE, SPEC)
    assert store.counters["refused_connects"] == 1, "the second did not even try"
    store.close()


def test_a_token_that_is_none_is_refused_by_name(node: EmbeddedNode) -> None:
    store = connect_blocking(node.node.address, "wrong", timeout_ms=20_000)
    with pytest.raises(NotAllowed):
        store.open(EXAMPLE, SPEC)
    store.close()


def test_closing_while_calls_wait(proxy: Proxy) -> None:
    async def main() -> None:
        store = connect(proxy.address, timeout_ms=20_000)
        handle = await store.open(EXAMPLE, SPEC)
        proxy.tamper = lambda call, reply, frame: b"" if isinstance(reply, Matched) else frame
        calls = [asyncio.ensure_future(store.match(handle, prompt(handle, 1))) for _ in range(4)]
        await asyncio.sleep(0.01)
        await store.close()
        assert await asyncio.gather(*calls) == [0] * 4

    asyncio.run(main())


def test_a_connection_that_no_thread_could_make_is_tried_again(
    node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store = connect_blocking(node.node.address, timeout_ms=20_000)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(Unavailable):
            store.open(EXAMPLE, SPEC)
    eventually(lambda: _opens(store))
    handle = store.open(EXAMPLE, SPEC)
    prefix = prompt(handle, 2)
    with monkeypatch.context() as patch:  # The map is warmed in a thread, or not at all.
        patch.setattr(threading.Thread, "start", fail)
        assert store.save(handle, prefix, whole(content(handle, prefix))) == 2
    store.close()


def _opens(store: BlockingStore) -> bool:
    try:
        store.open(EXAMPLE, SPEC)
    except Unavailable:
        return False
    return True


def test_no_descriptors_left_is_an_outage(node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise OSError("too many open files")

    async def main() -> None:
        store = AsyncNodeStore(options(node.node.address, True), SystemClock())
        monkeypatch.setattr(AsyncChannel, "connect", fail)
        with pytest.raises(Unavailable):
            await store.open(EXAMPLE, SPEC)
        assert store.counters["refused_connects"] == 1
        await store.close()

    asyncio.run(main())
