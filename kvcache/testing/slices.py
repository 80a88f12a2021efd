"""The part of a store's contract that is about slices: some heads of each block, for another degree.

``stores.StoreContract`` has it. Each shape is one in which slices and chunks lie differently: a plane that
is one chunk, slices that are whole chunks, heads of several chunks, slices that begin within a chunk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from kvcache.block import BlockHash
from kvcache.client.store import BlockStore, Handle
from kvcache.errors import BadInput
from kvcache.slices import Part, parts
from kvcache.testing.sharded import ShardedModel

MODELS = {
    "a plane is one chunk": ShardedModel(3, 8, 64),
    "slices are whole chunks": ShardedModel(2, 4, 32_768),
    "a head is several chunks": ShardedModel(1, 2, 131_072),
    "slices begin within chunks": ShardedModel(2, 6, 16_384),
}
BLOCKS = 5

Scenario = Callable[[BlockStore], Awaitable[None]]


def prefix_of(handle: Handle, count: int = BLOCKS) -> list[BlockHash]:
    return handle.hashes(range(count * handle.spec.block_tokens))


async def save_rank(store: BlockStore, model: ShardedModel, tp_size: int, tp_rank: int) -> Handle:
    """As an engine of this rank does."""
    handle = await store.open(model.namespace(tp_size, tp_rank), model.spec(tp_size))
    blocks = [[model.block(at, tp_size, tp_rank)] for at in range(BLOCKS)]
    assert await store.save(handle, prefix_of(handle), blocks) == BLOCKS
    return handle


async def load_part(
    store: BlockStore, part: Part, handle: Handle, into: Sequence[bytearray], start: int = 0
) -> frozenset[int]:
    """This part of blocks ``start`` and on, plane by plane, to where it belongs in blocks of another rank."""
    plane_count, head_bytes = part.cut.spec.plane_count, part.cut.spec.head_bytes
    lease = await store.lease(handle, prefix_of(handle))
    assert lease.count == BLOCKS
    pieces: list[list[memoryview]] = []
    for block in into:
        step = len(block) // plane_count
        starts = range(part.at * head_bytes, len(block), step)
        pieces.append([memoryview(block)[at : at + part.cut.length] for at in starts])
    failed = await store.load(lease, pieces, start, (part.cut.first, part.cut.count))
    await store.release(lease)
    return failed


class SliceContract:
    """Every path of the bytes gives a rank of another degree what it would have saved itself."""

    def make(self) -> BlockStore:
        raise NotImplementedError

    def play_slices(self, scenario: Scenario) -> None:
        async def main() -> None:
            store = self.make()
            try:
                await scenario(store)
            finally:
                await store.close()

        asyncio.run(main())

    @pytest.mark.parametrize("shape", MODELS)
    @pytest.mark.parametrize(("stored", "wanted"), [(1, 2), (2, 1), (1, 1)])
    def test_a_rank_of_another_degree_gets_what_it_would_have_saved(
        self, shape: str, stored: int, wanted: int
    ) -> None:
        model = MODELS[shape]

        async def scenario(store: BlockStore) -> None:
            handles = [await save_rank(store, model, stored, rank) for rank in range(stored)]
            for rank in range(wanted):
                into = [bytearray(model.spec(wanted).block_bytes) for _ in range(BLOCKS)]
                for part in parts(model.namespace(wanted, rank), stored):
                    handle = handles[part.stored.tp_rank]
                    assert await load_part(store, part, handle, into) == frozenset()
                assert into == [model.block(at, wanted, rank) for at in range(BLOCKS)]

        self.play_slices(scenario)

    def test_a_slice_in_one_piece_and_of_a_part_of_a_lease(self) -> None:
        model = MODELS["slices begin within chunks"]

        async def scenario(store: BlockStore) -> None:
            handle = await save_rank(store, model, 1, 0)
            lease = await store.lease(handle, prefix_of(handle))
            into = [bytearray(model.spec(3).block_bytes) for _ in range(2)]
            before = store.counters["leased_blocks"]
            assert await store.load(lease, [[block] for block in into], 3, (2, 2)) == frozenset()
            assert into == [model.block(at, 3, 1) for at in (3, 4)]
            assert before == BLOCKS
            assert store.counters["loaded_blocks"] == 2
            assert store.counters["loaded_bytes"] == 2 * model.spec(3).block_bytes
            assert await store.load(lease, [], 5, (2, 2)) == frozenset()
            await store.release(lease)
            assert await store.load(lease, [[block] for block in into], 3, (2, 2)) == {3, 4}

        self.play_slices(scenario)

    def test_a_slice_of_the_wrong_shape_is_raised(self) -> None:
        model = MODELS["a plane is one chunk"]
        half = model.spec(2).block_bytes

        async def scenario(store: BlockStore) -> None:
            handle = await save_rank(store, model, 1, 0)
            lease = await store.lease(handle, prefix_of(handle))
            for into, heads in (
                ([[bytearray(half)]], (0, 5)),
                ([[bytearray(half)]], (5, 4)),
                ([[bytearray(half)]], (0, 0)),
                ([[bytearray(half)]], (-1, 4)),
                ([[bytearray(half + 1)]], (0, 4)),
                ([[bytearray(1), bytearray(half - 1)]], (0, 4)),
                ([[bytes(half)]], (0, 4)),
                ([["text"]], (0, 4)),
            ):
                with pytest.raises(BadInput):
                    await store.load(lease, into, 0, heads)  # type: ignore[arg-type]  # That is the test.
            shared = bytearray(half)
            with pytest.raises(BadInput):
                await store.load(lease, [[shared], [shared]], 0, (0, 4))

        self.play_slices(scenario)
