"""A store over a node that answers wrongly, late or not at all, and over bytes that somebody changed."""

from __future__ import annotations

import dataclasses
import fcntl
import mmap
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from kvcache.block import BlockHash
from kvcache.channel import BlockingChannel
from kvcache.client import remote
from kvcache.client.blocking_store import BlockingNodeStore
from kvcache.client.link import BACKOFF_NS_MIN
from kvcache.client.store import Lease
from kvcache.clock import NS_PER_MS, SystemClock
from kvcache.errors import BadInput, Unavailable
from kvcache.sums import sum_chunks
from kvcache.testing.stores import EXAMPLE, SIZE, SPEC, content, prompt, room, whole
from kvcache.wire import (
    HEADER,
    PROTOCOL_VERSION,
    Blocks,
    Committed,
    Hello,
    Leased,
    Matched,
    Opened,
    Reply,
    Reserved,
    Welcome,
    encode,
)
from tests.client.conftest import TIMEOUT_MS, MovableClock, Rig, eventually, impatient, options
from tests.client.proxy import Proxy, changed, instead
from tests.server.conftest import EmbeddedNode


def saved(rig: Rig, count: int = 4, seed: int = 0) -> list[BlockHash]:
    prefix = prompt(rig.handle, count, seed)
    assert rig.store.save(rig.handle, prefix, whole(content(rig.handle, prefix))) == count
    return prefix


def load_all(rig: Rig, lease: Lease) -> frozenset[int]:
    """What failed; all else is what it must be."""
    into = room(lease.count)
    failed = rig.store.load(lease, whole(into))
    expected = content(lease.handle, lease.prefix)
    assert all(into[at] == expected[at] for at in range(lease.count) if at not in failed)
    return failed


def scribble(rig: Rig, change: Callable[[mmap.mmap, tuple[int, ...]], None], prefix: list[BlockHash]) -> None:
    """Another client of this user maps the slab and writes where it may not."""
    scribbler = BlockingNodeStore(options(rig.node.node.address, mapped=True), SystemClock())
    lease = scribbler.lease(scribbler.open(EXAMPLE, SPEC), prefix)
    deadline_ns = SystemClock().now_ns() + 20_000 * NS_PER_MS
    hello = Hello(PROTOCOL_VERSION, map=True)
    channel = BlockingChannel.connect(rig.node.node.address, hello, deadline_ns)
    assert channel.slab_fd is not None
    with mmap.mmap(channel.slab_fd, channel.welcome.slab_bytes) as slab:
        change(slab, tuple(lease.grants[0].offsets))
    channel.close()
    scribbler.release(lease)
    scribbler.close()


@pytest.mark.parametrize("at", [0, SIZE // 2 + 1, SIZE - 1])
@pytest.mark.parametrize("rig", ["mapped"], indirect=True)
def test_a_flipped_byte_is_found_reported_and_taken_out(rig: Rig, at: int) -> None:
    prefix = saved(rig)

    def flip(slab: mmap.mmap, offsets: tuple[int, ...]) -> None:
        slab[offsets[2] + at] ^= 1

    scribble(rig, flip, prefix)
    lease = rig.store.lease(rig.handle, prefix)
    assert load_all(rig, lease) == {2}
    assert rig.store.counters["failed_blocks:checksum"] == 1
    assert rig.store.match(rig.handle, prefix) == 4, "not reported yet"
    rig.store.release(lease)
    assert rig.store.match(rig.handle, prefix) == 2, "the block and what hangs on it are gone"
    assert rig.stats()["rejected_blocks:checksum"] == 1


@pytest.mark.parametrize("rig", ["mapped"], indirect=True)
def test_whole_blocks_that_changed_places_are_found(rig: Rig) -> None:
    prefix = saved(rig)

    def swap(slab: mmap.mmap, offsets: tuple[int, ...]) -> None:
        first, second = (slab[at : at + SIZE] for at in offsets[:2])
        slab[offsets[0] : offsets[0] + SIZE], slab[offsets[1] : offsets[1] + SIZE] = second, first

    scribble(rig, swap, prefix)
    assert load_all(rig, rig.store.lease(rig.handle, prefix)) == {0, 1}


def test_a_node_that_answers_with_another_prompts_blocks_is_found(rig: Rig) -> None:
    """Bytes, sums and checksums all fit one another, only the key does not."""
    theirs, mine = saved(rig, seed=1), saved(rig, seed=2)
    seen: list[Leased] = []

    def remember(reply: Reply) -> Leased:
        assert isinstance(reply, Leased)
        seen.append(reply)
        return reply

    rig.proxy.tamper = changed(Leased, remember)
    right = rig.store.lease(rig.handle, theirs)
    rig.proxy.tamper = changed(Leased, lambda reply: seen[0])
    wrong = rig.store.lease(rig.handle, mine)
    assert load_all(rig, wrong) == {0, 1, 2, 3}
    assert rig.store.counters["failed_blocks:checksum"] == 4
    assert load_all(rig, right) == frozenset()


def test_bytes_that_change_on_the_wire_are_found(rig: Rig) -> None:
    prefix = saved(rig)

    def tamper(call: int, reply: Reply, frame: bytes) -> bytes:
        return frame[:-1] + bytes([frame[-1] ^ 1]) if isinstance(reply, Blocks) else frame

    rig.proxy.tamper = tamper
    mapped = rig.store.lease(rig.handle, prefix).grants[0].offsets
    assert load_all(rig, rig.store.lease(rig.handle, prefix)) == (frozenset() if mapped else {3})


def test_after_its_end_a_lease_gives_nothing(rig: Rig) -> None:
    prefix = saved(rig)
    rig.clock.stop()
    lease = rig.store.lease(rig.handle, prefix, duration_ms=20_000)
    rig.clock.advance_ms(19_000)
    assert load_all(rig, lease) == frozenset()
    rig.clock.advance_ms(1_001)
    assert load_all(rig, lease) == {0, 1, 2, 3}
    assert rig.store.counters["failed_blocks:expired"] == 4
    rig.store.release(lease)
    assert load_all(rig, rig.store.lease(rig.handle, prefix)) == frozenset()


GARBAGE: dict[str, Callable[[int], bytes]] = {
    "nothing, for ever": lambda call: b"",
    "http": lambda call: b"HTTP/1.1 200 OK\r\n\r\n",
    "truncated, then garbage": lambda call: encode(call, Matched(1))[:-1] + b"KV" * 200,
    "an oversized body": lambda call: HEADER.pack(b"KV", PROTOCOL_VERSION, 0, (1 << 32) - 1, 0),
    "an oversized payload": lambda call: HEADER.pack(b"KV", PROTOCOL_VERSION, 0, 8, 1 << 62),
    "another version": lambda call: HEADER.pack(b"KV", 77, 0, 0, 0),
    "another call's number": lambda call: encode(call + 1, Matched(1)),
    "another reply": lambda call: encode(call, Opened(b"", 1, 1, "")),
    "an unasked payload": lambda call: encode(call, Matched(1), 1 << 20) + bytes(1 << 20),
}


@pytest.mark.parametrize("kind", [Matched, Leased, Blocks, Reserved, Committed])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_is_a_miss_and_then_the_store_recovers(
    node: EmbeddedNode, proxy: Proxy, kind: type[Reply], garbage: str
) -> None:
    clock = MovableClock()
    store = BlockingNodeStore(options(proxy.address, kind is not Blocks), clock)
    rig = Rig(node, proxy, clock, store, store.open(EXAMPLE, SPEC))
    prefix = prompt(rig.handle, 3)
    blocks = whole(content(rig.handle, prefix))
    held = store.save(rig.handle, prefix[:2], blocks[:2])
    rig.proxy.tamper = instead(kind, GARBAGE[garbage])
    silent = garbage == "nothing, for ever"
    with impatient(store, 200 if silent else TIMEOUT_MS):
        if store.match(rig.handle, prefix):
            lease = store.lease(rig.handle, prefix)
            load_all(rig, lease)
            store.release(lease)
            assert store.save(rig.handle, prefix[2:], blocks[2:], parent=prefix[1]) == 0 or kind not in (
                Reserved,
                Committed,
            )
    ends = Counter({name: count for name, count in store.counters.items() if name.startswith("ended:")})
    assert set(ends) == {"ended:deadline"} if silent else ends.total() == 1
    rig.proxy.tamper = lambda call, reply, frame: frame
    rig.recover()
    assert held == 2
    assert load_all(rig, store.lease(rig.handle, prefix)) == frozenset()
    assert store.save(rig.handle, prefix, blocks) == 3
    store.close()
    eventually(lambda: rig.stats().get("reservations", 0) == 0)


def reshaped(**fields: object) -> Callable[[Reply], Reply]:
    return lambda reply: msgspec.structs.replace(reply, **fields)


@pytest.mark.parametrize(
    "change",
    [
        reshaped(count=5),
        reshaped(count=3),
        reshaped(checksums=b"x" * 63),
        reshaped(offsets=[0]),
        reshaped(lease=0),
        reshaped(offsets=[0, 0, 0, 1 << 40]),
        reshaped(offsets=[0, 0, 0, (4 << 20) - SIZE + 1]),
    ],
)
@pytest.mark.parametrize("rig", ["mapped"], indirect=True)
def test_a_lease_without_sense_is_a_miss(rig: Rig, change: Callable[[Reply], Reply]) -> None:
    prefix = saved(rig)
    rig.proxy.tamper = changed(Leased, change)
    lease = rig.store.lease(rig.handle, prefix)
    assert load_all(rig, lease) == set(range(lease.count))
    assert rig.store.counters["ended:bad_reply"] == 1
    rig.proxy.tamper = lambda call, reply, frame: frame
    rig.recover()
    assert load_all(rig, rig.store.lease(rig.handle, prefix)) == frozenset()


@pytest.mark.parametrize(
    "change", [reshaped(start=3), reshaped(offsets=[1 << 40] * 4), reshaped(reservation=0)]
)
@pytest.mark.parametrize("rig", ["mapped"], indirect=True)
def test_a_reservation_without_sense_saves_nothing(rig: Rig, change: Callable[[Reply], Reply]) -> None:
    prefix = prompt(rig.handle, 4)
    blocks = whole(content(rig.handle, prefix))
    rig.proxy.tamper = changed(Reserved, change)
    assert rig.store.save(rig.handle, prefix, blocks) == 0
    assert rig.store.counters["unsaved_blocks:unavailable"] == 4
    rig.proxy.tamper = lambda call, reply, frame: frame
    rig.recover()
    assert rig.store.save(rig.handle, prefix, blocks) == 4


@pytest.mark.parametrize("rig", ["mapped"], indirect=True)
def test_blocks_that_lie_elsewhere_are_read_over_the_wire(rig: Rig) -> None:
    prefix = saved(rig)

    def hide(reply: Reply) -> Leased:
        assert isinstance(reply, Leased)
        return msgspec.structs.replace(reply, offsets=[-1, *reply.offsets[1:3], -1])

    rig.proxy.tamper = changed(Leased, hide)
    assert load_all(rig, rig.store.lease(rig.handle, prefix)) == frozenset()
    assert rig.stats()["read_bytes:socket"] == 2 * SIZE


@pytest.mark.parametrize("rig", ["wire"], indirect=True)
def test_a_refused_commit_is_aborted(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = prompt(rig.handle, 4)
    blocks = whole(content(rig.handle, prefix))
    with monkeypatch.context() as patch:
        patch.setattr(remote, "sum_chunks", lambda pieces, chunk: bytes(len(sum_chunks(pieces, chunk))))
        assert rig.store.save(rig.handle, prefix, blocks) == 0
    assert rig.store.counters["unsaved_blocks:refused"] == 4
    assert rig.stats()["reservations"] == 0
    assert rig.store.save(rig.handle, prefix, blocks) == 4


def test_a_number_that_a_new_node_gives_again_is_not_the_old_lease(rig: Rig) -> None:
    prefix = saved(rig)
    rig.proxy.tamper = changed(Leased, reshaped(lease=77))
    old = rig.store.lease(rig.handle, prefix)
    rig.proxy.cut()
    rig.recover()
    new = rig.store.lease(rig.handle, prefix)
    assert [grant.lease_id for grant in (*old.grants, *new.grants)] == [77, 77]
    assert load_all(rig, old) == {0, 1, 2, 3}
    assert rig.store.counters["failed_blocks:lease_lost"] == 4


def test_a_lease_ends_with_its_connection(rig: Rig) -> None:
    prefix = saved(rig)
    lease = rig.store.lease(rig.handle, prefix)
    rig.proxy.cut()
    assert rig.store.match(rig.handle, prefix) == 0
    assert rig.store.counters["ended:disconnected"] == 1
    rig.recover()
    assert load_all(rig, lease) == {0, 1, 2, 3}
    assert rig.store.counters["failed_blocks:lease_lost"] == 4
    rig.store.release(lease)
    assert load_all(rig, rig.store.lease(rig.handle, prefix)) == frozenset()


def test_while_the_node_is_gone_calls_do_not_even_try(rig: Rig) -> None:
    prefix = saved(rig)
    rig.proxy.tamper = instead(Matched, lambda call: b"")
    rig.clock.stop()
    rig.proxy.cut()
    assert rig.store.match(rig.handle, prefix) == 0
    connections = rig.proxy.connections
    for _ in range(10):
        assert rig.store.match(rig.handle, prefix) == 0
        assert rig.store.lease(rig.handle, prefix).count == 0
        assert rig.store.save(rig.handle, prefix, whole(content(rig.handle, prefix))) == 0
    assert rig.proxy.connections == connections
    assert rig.store.counters["missed_calls:away"] == 30
    assert rig.store.counters["unsaved_blocks:unavailable"] == 40


def test_the_back_off_grows_while_the_node_accepts_and_says_nothing(node: EmbeddedNode, proxy: Proxy) -> None:
    clock = MovableClock()
    clock.stop()
    store = BlockingNodeStore(options(proxy.address, mapped=True, timeout_ms=30), clock)

    def silence(call: int) -> bytes:
        """While which the time of the try goes by, and no more."""
        clock.advance_ms(31)
        return b""

    proxy.tamper = instead(Welcome, silence)
    with pytest.raises(Unavailable):
        store.open(EXAMPLE, SPEC)

    def refused(times: int) -> bool:
        return store.counters.get("refused_connects") == times

    eventually(partial(refused, 1))
    for attempt in range(1, 4):
        clock.advance_ms(BACKOFF_NS_MIN // NS_PER_MS * 2 ** (attempt - 1) - 1)
        with pytest.raises(Unavailable):
            store.open(EXAMPLE, SPEC)
        assert store.counters["refused_connects"] == attempt, "too early to try"
        clock.advance_ms(1)
        with pytest.raises(Unavailable):
            store.open(EXAMPLE, SPEC)
        eventually(partial(refused, attempt + 1))
    store.close()


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK])
@pytest.mark.parametrize("fraction", [1, 2])
def test_memory_that_could_be_taken_away_is_not_mapped(
    node: EmbeddedNode, proxy: Proxy, seals: int, fraction: int
) -> None:
    proxy.descriptor = os.memfd_create("slab", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(proxy.descriptor, node.node.core.host.capacity_bytes // fraction)
    fcntl.fcntl(proxy.descriptor, fcntl.F_ADD_SEALS, seals)
    store = BlockingNodeStore(options(proxy.address, mapped=True), SystemClock())
    if seals == fcntl.F_SEAL_SHRINK and fraction == 1:
        assert store.open(EXAMPLE, SPEC)
    else:
        with pytest.raises(
            BadInput, match="not sealed" if seals != fcntl.F_SEAL_SHRINK else "announced"
        ) as caught:
            store.open(EXAMPLE, SPEC)
        assert caught.value.code == "unsafe_slab"
    store.close()
    os.close(proxy.descriptor)


def test_a_file_is_not_mapped(node: EmbeddedNode, proxy: Proxy, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(node.node.core.host.capacity_bytes)
        proxy.descriptor = file.fileno()
        store = BlockingNodeStore(options(proxy.address, mapped=True), SystemClock())
        with pytest.raises(BadInput, match="sealed"):
            store.open(EXAMPLE, SPEC)
        store.close()


def test_a_tenant_that_changed_closes_its_handles(rig: Rig) -> None:
    """Names made with the old key mean nothing under the new one."""
    prefix = saved(rig)
    rig.proxy.tamper = changed(Welcome, reshaped(tenant_key=b"z" * 32))
    rig.proxy.cut()
    rig.recover()
    assert rig.store.match(rig.handle, prefix) == 0
    assert rig.store.counters["missed_calls:not_open"] >= 1
    again = rig.store.open(EXAMPLE, SPEC)
    assert again.root != rig.handle.root
    assert dataclasses.replace(again, root=rig.handle.root, tenant_key=rig.handle.tenant_key) == rig.handle
