"""Slices over a node that answers wrongly, and over bytes that somebody changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from kvcache.block import BlockSpec, storage_key
from kvcache.client import operations
from kvcache.client.remote import TRANSFER_BYTES
from kvcache.client.slicing import SCRATCH_BYTES
from kvcache.client.store import Grant, Handle, Lease
from kvcache.slices import Slice
from kvcache.sums import SUM_BYTES, block_checksum, sum_chunks
from kvcache.testing.sharded import ShardedModel
from kvcache.testing.slices import prefix_of
from kvcache.wire import PIECES_MAX, SUMS_BYTES_MAX, Blocks, ChunkSums, Read, Reply, Request, Sums, encode
from tests.client.conftest import Rig
from tests.client.proxy import changed
from tests.client.script import Script, context_and_handle, hashes

COUNT = 3
INEXACT = ShardedModel(plane_count=2, head_count=6, head_bytes=32_768)  # Chunks of 2 heads: half is 1.5.
EXACT = ShardedModel(plane_count=2, head_count=4, head_bytes=32_768)  # Half is 1 chunk.
MODELS = pytest.mark.parametrize("model", [INEXACT, EXACT], ids=["inexact", "exact"])


def saved(rig: Rig, model: ShardedModel, first: int = 0) -> Handle:
    handle = rig.store.open(model.namespace(1, 0), model.spec(1))
    blocks = [[model.block(first + at, 1, 0)] for at in range(COUNT)]
    assert rig.store.save(handle, prefix_of(handle, COUNT), blocks) == COUNT
    return handle


def load_half(rig: Rig, model: ShardedModel, lease: Lease, rank: int = 1) -> frozenset[int]:
    """What failed; all else is what rank 1 of 2 would have saved."""
    spec = model.spec(2)
    into = [bytearray(spec.block_bytes) for _ in range(COUNT)]
    heads = (rank * spec.head_count, spec.head_count)
    failed = rig.store.load(lease, [[block] for block in into], heads=heads)
    assert all(into[at] == model.block(at, 2, rank) for at in range(COUNT) if at not in failed)
    return failed


def change_block(rig: Rig, handle: Handle, position: int, change: Callable[[memoryview], None]) -> None:
    """Somebody writes into a block where it lies."""
    core = rig.node.node.core
    key = storage_key(handle.namespace_id, prefix_of(handle, COUNT)[position])

    def work() -> None:
        slot = core.ledger.slot_of(key)
        assert slot is not None
        change(core.host.view(slot, handle.spec.block_bytes))

    rig.node.call(work)


def write(content: bytes, block: memoryview) -> None:
    block[:] = content


def flip(at: int, block: memoryview) -> None:
    block[at] ^= 1


@MODELS
def test_a_flipped_byte_fails_a_slice_that_has_it_in_its_chunks_and_no_other(
    rig: Rig, model: ShardedModel
) -> None:
    handle = saved(rig, model)
    spec, chunk = handle.spec, handle.spec.chunk_bytes
    covers = [Slice(spec, rank * spec.head_count // 2, spec.head_count // 2).cover for rank in range(2)]
    for at in (*range(0, spec.block_bytes, chunk), *range(chunk - 1, spec.block_bytes, chunk)):
        change_block(rig, handle, 1, partial(flip, at))
        lease = rig.store.lease(handle, prefix_of(handle, COUNT))
        for rank, cover in enumerate(covers):
            taken = cover.offset <= at % spec.plane_bytes < cover.offset + cover.length
            assert load_half(rig, model, lease, rank) == ({1} if taken else frozenset()), at
        change_block(rig, handle, 1, partial(flip, at))  # Right again before the node looks at it.
        rig.store.release(lease)
    assert "rejected_blocks:checksum" not in rig.stats()
    assert rig.stats()["reader_disagreed_blocks"] > 0


@MODELS
def test_a_wrong_block_is_reported_and_taken_out(rig: Rig, model: ShardedModel) -> None:
    handle = saved(rig, model)
    change_block(rig, handle, 1, partial(flip, handle.spec.block_bytes - 1))
    lease = rig.store.lease(handle, prefix_of(handle, COUNT))
    assert load_half(rig, model, lease) == {1}
    assert rig.store.counters["failed_blocks:checksum"] == 1
    assert rig.store.counters["loaded_blocks"] == COUNT - 1
    rig.store.release(lease)
    assert rig.store.match(handle, prefix_of(handle, COUNT)) == 1
    assert rig.stats()["rejected_blocks:checksum"] == 1


@MODELS
def test_bytes_that_change_on_the_wire_are_found(rig: Rig, model: ShardedModel) -> None:
    handle = saved(rig, model)

    def tamper(call: int, reply: Reply, frame: bytes) -> bytes:
        return frame[:-1] + bytes([frame[-1] ^ 1]) if isinstance(reply, Blocks) else frame

    rig.proxy.tamper = tamper
    lease = rig.store.lease(handle, prefix_of(handle, COUNT))
    mapped = lease.grants[0].offsets
    assert load_half(rig, model, lease) == (frozenset() if mapped else {COUNT - 1})


@pytest.mark.parametrize("at", [0, 5, -1])
def test_a_sum_that_is_not_the_blocks_fails_it_wherever_it_stands(rig: Rig, at: int) -> None:
    """Sums beside the slice count, too: only all together have the checksum."""
    handle = saved(rig, INEXACT)

    def forge(reply: Reply) -> ChunkSums:
        assert isinstance(reply, ChunkSums)
        sums = bytearray(reply.sums)
        sums[at] ^= 1
        return ChunkSums(bytes(sums))

    rig.proxy.tamper = changed(ChunkSums, forge)
    lease = rig.store.lease(handle, prefix_of(handle, COUNT))
    assert load_half(rig, INEXACT, lease) == {at % COUNT if at < 0 else 0}


def test_sums_that_fit_changed_bytes_do_not_help(rig: Rig) -> None:
    """Bytes and sums fit each other, only the checksum does not."""
    handle = saved(rig, INEXACT)
    change_block(rig, handle, 1, partial(flip, INEXACT.spec(1).block_bytes - 1))
    spec = handle.spec
    changed_block = bytearray(INEXACT.block(1, 1, 0))
    changed_block[-1] ^= 1
    blocks = [INEXACT.block(0, 1, 0), changed_block, INEXACT.block(2, 1, 0)]
    rig.proxy.tamper = changed(ChunkSums, lambda reply: ChunkSums(sum_chunks(blocks, spec.chunk_bytes)))
    assert load_half(rig, INEXACT, rig.store.lease(handle, prefix_of(handle, COUNT))) == {1}


def test_blocks_that_changed_places_are_found_with_their_sums(rig: Rig) -> None:
    handle = saved(rig, INEXACT)
    for position, other in ((0, 1), (1, 0)):
        change_block(rig, handle, position, partial(write, INEXACT.block(other, 1, 0)))

    def swap(reply: Reply) -> ChunkSums:
        assert isinstance(reply, ChunkSums)
        step = handle.spec.chunk_count * SUM_BYTES
        return ChunkSums(reply.sums[step : 2 * step] + reply.sums[:step] + reply.sums[2 * step :])

    rig.proxy.tamper = changed(ChunkSums, swap)
    assert load_half(rig, INEXACT, rig.store.lease(handle, prefix_of(handle, COUNT))) == {0, 1}


@pytest.mark.parametrize("cut", [-1, 8])
def test_sums_of_another_length_end_the_connection(rig: Rig, cut: int) -> None:
    handle = saved(rig, INEXACT)

    def resize(reply: Reply) -> ChunkSums:
        assert isinstance(reply, ChunkSums)
        return ChunkSums(reply.sums[:cut] if cut < 0 else reply.sums + bytes(cut))

    rig.proxy.tamper = changed(ChunkSums, resize)
    assert load_half(rig, INEXACT, rig.store.lease(handle, prefix_of(handle, COUNT))) == {0, 1, 2}
    assert rig.store.counters["ended:bad_reply"] == 1


def test_a_payload_of_fewer_bytes_is_found(rig: Rig) -> None:
    """What the scratch held before is not taken for what did not come."""
    handle = saved(rig, INEXACT)

    def shorten(call: int, reply: Reply, frame: bytes) -> bytes:
        return encode(call, reply) if isinstance(reply, Blocks) else frame

    rig.proxy.tamper = shorten
    lease = rig.store.lease(handle, prefix_of(handle, COUNT))
    expected = frozenset() if lease.grants[0].offsets else {0, 1, 2}
    assert load_half(rig, INEXACT, lease) == expected


def test_a_block_that_was_withdrawn_meanwhile_fails(rig: Rig) -> None:
    handle = saved(rig, INEXACT)
    prefix = prefix_of(handle, COUNT)
    lease = rig.store.lease(handle, prefix)
    core, key = rig.node.node.core, storage_key(handle.namespace_id, prefix[2])

    def withdraw() -> None:
        held = core.ledger.borrow([key], "test", 1 << 62)
        assert core.ledger.quarantine(key, held.generations[0], 1 << 62)
        core.ledger.release(held.lease_id, "test", 0)

    rig.node.call(withdraw)
    assert load_half(rig, INEXACT, lease) == {2}


def test_after_its_end_a_lease_gives_no_slice(rig: Rig) -> None:
    handle = saved(rig, INEXACT)
    lease = rig.store.lease(handle, prefix_of(handle, COUNT), duration_ms=20_000)
    rig.clock.advance_ms(20_001)
    assert load_half(rig, INEXACT, lease) == {0, 1, 2}
    assert rig.store.counters["failed_blocks:expired"] == COUNT


def test_a_lease_that_the_node_ended_gives_no_slice(rig: Rig) -> None:
    handle = saved(rig, INEXACT)
    lease = rig.store.lease(handle, prefix_of(handle, COUNT))
    rig.node.call(lambda: rig.node.node.core.ledger.expire(1 << 62))
    assert load_half(rig, INEXACT, lease) == {0, 1, 2}
    assert rig.store.counters["failed_blocks:lease_lost"] == COUNT


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (BlockSpec(4, 4_096, 2, 64), 40),
        (BlockSpec(4, 600, 2, 65_536), 1),
        (BlockSpec(4, 2, 8, 4_096), 1_024),
        (BlockSpec(4, 64, 4, 65_536), 5),
    ],
    ids=["many planes", "a block is large", "many blocks", "exact"],
)
def test_every_call_stays_within_its_limits(spec: BlockSpec, count: int) -> None:
    context, handle = context_and_handle(spec)
    zeros = sum_chunks([bytes(spec.block_bytes)], spec.chunk_bytes)
    cut = Slice(spec, 0, 1)

    def answer(request: Request) -> Reply:
        if isinstance(request, Sums):
            assert request.count * len(zeros) <= SUMS_BYTES_MAX or request.count == 1
            return ChunkSums(zeros * request.count)
        assert isinstance(request, Read)
        assert request.count * spec.plane_count <= PIECES_MAX
        assert (request.offset, request.length) == (cut.cover.offset, cut.cover.length)
        return Blocks(request.count)

    script = Script(answer)
    prefix = hashes(count)
    checksums = b"".join(
        block_checksum(storage_key(handle.namespace_id, name), spec.block_bytes, spec.chunk_bytes, zeros)
        for name in prefix
    )
    held = Lease(handle, tuple(prefix), (Grant(1, 0, count, (), checksums, 1 << 62),), context.link.number)
    context.link.hold(("host", 1))
    into = [[bytearray(cut.block_bytes)] for _ in range(count)]
    assert script.drive(operations.load(context, held, into, 0, (0, 1))) == frozenset()
    reads = [request for request in script.asked if isinstance(request, Read)]
    assert [read.start for read in reads] == [
        sum(each.count for each in reads[:at]) for at in range(len(reads))
    ]
    assert sum(read.count for read in reads) == count
    most = TRANSFER_BYTES if cut.is_exact else SCRATCH_BYTES
    assert max(script.sent) <= max(most, cut.cover.block_bytes)
