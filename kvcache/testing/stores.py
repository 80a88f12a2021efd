"""The contract of a store, for ``client.store.BlockStore`` and, through ``threaded``, ``BlockingStore``.

Subclass ``StoreContract`` and give ``make``: a new store over the same content each time it is called
within one test, and over none at the start of each test. Each test runs one loop from begin to end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import pytest

from kvcache.block import BlockHash, BlockSpec, storage_key
from kvcache.client.store import BlockStore, Handle
from kvcache.errors import BadInput
from kvcache.namespace import Namespace, shape_of
from kvcache.testing.pattern import Pattern
from kvcache.testing.slices import SliceContract
from kvcache.wire import BATCH_BLOCKS_MAX

SPEC = BlockSpec(block_tokens=4, plane_count=2, head_count=2, head_bytes=1024)
SIZE = SPEC.block_bytes
PLANE = SPEC.plane_bytes
EXAMPLE = Namespace(
    model="m", weights="w", dtype="float32", layout="canonical", block_tokens=4, shape=shape_of(SPEC)
)
PATTERN = Pattern(7, SIZE)


def prompt(handle: Handle, block_count: int, seed: int = 0) -> list[BlockHash]:
    """The hashes of a prompt of its own for each seed."""
    return handle.hashes([seed, *range(1, block_count * SPEC.block_tokens)])


def content(handle: Handle, prefix: Sequence[BlockHash]) -> list[bytearray]:
    """What these blocks are to hold."""
    blocks = [bytearray(SIZE) for _ in prefix]
    for block, name in zip(blocks, prefix, strict=True):
        PATTERN.fill(block, storage_key(handle.namespace_id, name))
    return blocks


def room(block_count: int) -> list[bytearray]:
    return [bytearray(SIZE) for _ in range(block_count)]


def whole(blocks: Sequence[bytearray]) -> list[list[bytearray]]:
    return [[block] for block in blocks]


def planes(blocks: Sequence[bytearray]) -> list[list[memoryview]]:
    views = [memoryview(block) for block in blocks]
    return [[view[at : at + PLANE] for at in range(0, SIZE, PLANE)] for view in views]


Scenario = Callable[[BlockStore, Handle], Awaitable[None]]


class StoreContract(SliceContract):
    """Every store, every driver, every path of the bytes."""

    def make(self) -> BlockStore:
        raise NotImplementedError

    def play(self, scenario: Scenario) -> None:
        """Run with a fresh store and its namespace open."""

        async def main() -> None:
            store = self.make()
            try:
                await scenario(store, await store.open(EXAMPLE, SPEC))
            finally:
                await store.close()

        asyncio.run(main())

    async def saved(self, store: BlockStore, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        return await store.save(handle, prefix, whole(content(handle, prefix)))

    async def loaded(self, store: BlockStore, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        """How many leading blocks can be had; what was had is right."""
        lease = await store.lease(handle, prefix)
        into = room(lease.count)
        failed = await store.load(lease, whole(into))
        await store.release(lease)
        expected = content(handle, prefix[: lease.count])
        assert all(into[at] == expected[at] for at in range(lease.count) if at not in failed)
        return lease.count - len(failed)

    def test_what_was_saved_is_found_and_loaded(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 5)
            assert await store.match(handle, prefix) == 0
            assert await self.saved(store, handle, prefix) == 5
            assert await store.match(handle, prefix) == 5
            assert await self.loaded(store, handle, prefix) == 5
            assert store.counters["loaded_bytes"] == store.counters["saved_bytes"] == 5 * SIZE

        self.play(scenario)

    def test_only_the_leading_blocks_that_are_held(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 6)
            await self.saved(store, handle, prefix[:4])
            assert await store.match(handle, prefix) == 4
            assert await store.match(handle, prefix[:2]) == 2
            assert await store.match(handle, prompt(handle, 6, seed=1)) == 0
            assert await self.loaded(store, handle, prefix) == 4

        self.play(scenario)

    def test_planes_and_whole_blocks_are_the_same_bytes(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            assert await store.save(handle, prefix, planes(content(handle, prefix))) == 3
            assert await self.loaded(store, handle, prefix) == 3
            into = room(3)
            lease = await store.lease(handle, prefix)
            assert await store.load(lease, planes(into)) == frozenset()
            assert into == content(handle, prefix)

        self.play(scenario)

    def test_a_part_of_a_lease_can_be_loaded(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 6)
            await self.saved(store, handle, prefix)
            lease = await store.lease(handle, prefix)
            into = room(3)
            assert await store.load(lease, whole(into), start=2) == frozenset()
            assert into == content(handle, prefix[2:5])
            assert await store.load(lease, [], start=6) == frozenset()

        self.play(scenario)

    def test_a_prompt_grows_behind_its_parent(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 6)
            blocks = whole(content(handle, prefix))
            assert await store.save(handle, prefix[:2], blocks[:2]) == 2
            assert await store.save(handle, prefix[2:], blocks[2:], parent=prefix[1]) == 4
            assert await store.save(handle, prefix, blocks) == 6, "held already"
            assert store.counters["saved_blocks"] == 6
            assert await self.loaded(store, handle, prefix) == 6

        self.play(scenario)

    def test_without_its_parent_nothing_is_saved(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 4)
            blocks = whole(content(handle, prefix))
            assert await store.save(handle, prefix[2:], blocks[2:], parent=prefix[1]) == 0
            assert store.counters["unsaved_blocks:parent"] == 2
            assert "missed_calls:refused" not in store.counters
            assert await store.match(handle, prefix) == 0

        self.play(scenario)

    def test_more_blocks_than_fit_one_call(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, BATCH_BLOCKS_MAX + 3)
            assert await self.saved(store, handle, prefix) == len(prefix)
            lease = await store.lease(handle, prefix)
            assert lease.count == len(prefix)
            into = room(6)
            assert await store.load(lease, whole(into), start=BATCH_BLOCKS_MAX - 3) == frozenset()
            assert into == content(handle, prefix[BATCH_BLOCKS_MAX - 3 :])

        self.play(scenario)

    def test_a_second_store_sees_what_the_first_saved(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            await self.saved(store, handle, prefix)
            other = self.make()
            again = await other.open(EXAMPLE, SPEC)
            assert again.namespace_id == handle.namespace_id
            assert await self.loaded(other, again, prompt(again, 3)) == 3
            await other.close()

        self.play(scenario)

    def test_namespaces_share_nothing(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            other = await store.open(replace(EXAMPLE, dtype="bfloat16"), SPEC)
            prefix = prompt(handle, 3)
            assert prompt(other, 3) == prefix, "names of blocks do not depend on the dtype"
            await self.saved(store, handle, prefix)
            assert await store.match(other, prefix) == 0
            assert await self.saved(store, other, prefix) == 3
            assert await self.loaded(store, other, prefix) == 3
            assert await self.loaded(store, handle, prefix) == 3

        self.play(scenario)

    def test_a_request_is_leased_once_for_all_who_name_it(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            await self.saved(store, handle, prefix)
            other = self.make()
            again = await other.open(EXAMPLE, SPEC)
            first = await store.lease(handle, prefix, "request")
            second = await other.lease(again, prefix, "request")
            third = await store.lease(handle, prefix, "request")
            await store.release(first)
            for holder, lease in ((other, second), (store, third)):
                into = room(3)
                assert await holder.load(lease, whole(into)) == frozenset()
                assert into == content(handle, prefix)
                await holder.release(lease)
            await other.close()

        self.play(scenario)

    def test_nothing_can_be_loaded_by_a_lease_that_was_released(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 2)
            await self.saved(store, handle, prefix)
            lease = await store.lease(handle, prefix)
            await store.release(lease)
            await store.release(lease)
            assert await store.load(lease, whole(room(2))) == {0, 1}
            assert store.counters["failed_blocks:lease_lost"] == 2

        self.play(scenario)

    def test_what_was_persisted_is_counted_and_still_right(self) -> None:
        """A node without NVMe persists nothing, one with it may be out of budget: any count is right."""

        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 5)
            assert await store.persist(handle, prefix) == 0, "nothing is held"
            await self.saved(store, handle, prefix[:4])
            durable = await store.persist(handle, prefix)
            assert 0 <= durable <= 4
            assert await store.persist(handle, prefix[:2], wait_ms=0) <= 2
            assert store.counters.get("persisted_blocks", 0) >= durable
            assert await self.loaded(store, handle, prefix) == 4
            assert await self.saved(store, handle, prefix) == 5

        self.play(scenario)

    def test_what_is_held_in_memory_is_leased_without_a_wait(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            await self.saved(store, handle, prefix)
            for wait_ms in (0, 60_000):
                lease = await store.lease(handle, prefix, wait_ms=wait_ms)
                assert (lease.count, lease.coming) == (3, 0)
                await store.release(lease)
            assert "lease_waits" not in store.counters

        self.play(scenario)

    def test_what_is_coming_lies_right_behind_what_is_leased(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 6)
            await self.saved(store, handle, prefix[:4])
            await store.persist(handle, prefix[:4])
            for wait_ms in (0, 2_000):
                lease = await store.lease(handle, prefix, wait_ms=wait_ms)
                assert 0 <= lease.coming <= 4 - lease.count
                into = room(lease.count)
                assert await store.load(lease, whole(into)) == frozenset()
                assert into == content(handle, prefix[: lease.count])
                await store.release(lease)

        self.play(scenario)

    def test_a_rate_of_prefill_changes_no_bytes(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            await self.saved(store, handle, prefix)
            for rate in (0.0, 0.5, 5_000.5, 1e30, float("inf"), float("nan"), -1.0):
                store.prefill_tokens_s = rate
                assert await store.match(handle, prefix) <= 3
                assert await self.loaded(store, handle, prefix) <= 3
            assert "missed_calls:refused" not in store.counters

        self.play(scenario)

    def test_nothing_asked_nothing_done(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            assert await store.match(handle, []) == 0
            assert await store.persist(handle, []) == 0
            assert await store.save(handle, [], []) == 0
            lease = await store.lease(handle, prompt(handle, 2))
            assert lease.count == 0
            assert await store.load(lease, []) == frozenset()
            await store.release(lease)

        self.play(scenario)

    @pytest.mark.parametrize(
        "bad",
        [
            lambda s, h, p, b: s.match(h, [b"short"]),
            lambda s, h, p, b: s.lease(h, [b"short"]),
            lambda s, h, p, b: s.lease(h, p, "r" * 5_000),
            lambda s, h, p, b: s.lease(h, p, "", 0),
            lambda s, h, p, b: s.lease(h, p, wait_ms=-1),
            lambda s, h, p, b: s.persist(h, [b"short"]),
            lambda s, h, p, b: s.persist(h, p, wait_ms=-1),
            lambda s, h, p, b: s.save(h, [b"short"] * 4, whole(b)),
            lambda s, h, p, b: s.save(h, p, whole(b[:3])),
            lambda s, h, p, b: s.save(h, p, whole(b), parent=b"short"),
            lambda s, h, p, b: s.save(h, p, whole([*b[:3], b[3][:-1]])),
            lambda s, h, p, b: s.save(h, p, [[x[:1], x[1:]] for x in b]),
            lambda s, h, p, b: s.save(h, p, [[memoryview(bytes(SIZE * 2))[::2]]] * 4),
            lambda s, h, p, b: s.save(h, p, [["text"]] * 4),
        ],
    )
    def test_what_the_caller_did_wrong_is_raised_and_changes_nothing(
        self, bad: Callable[[BlockStore, Handle, list[BlockHash], list[bytearray]], Awaitable[object]]
    ) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 4)
            with pytest.raises(BadInput) as caught:
                await bad(store, handle, prefix, content(handle, prefix))
            assert caught.value.what
            assert await store.match(handle, prefix) == 0
            assert await self.saved(store, handle, prefix) == 4

        self.play(scenario)

    def test_a_load_of_the_wrong_shape_is_raised(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 2)
            await self.saved(store, handle, prefix)
            lease = await store.lease(handle, prefix)
            for into, start in (
                (whole(room(3)), 0),
                (whole(room(1)), 2),
                (whole(room(1)), -1),
                ([[bytearray(SIZE + 1)]], 0),
                ([[bytes(SIZE)]], 0),
            ):
                with pytest.raises(BadInput):
                    await store.load(lease, into, start)
            assert await self.loaded(store, handle, prefix) == 2

        self.play(scenario)

    def test_a_namespace_that_contradicts_its_shape_is_raised(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            with pytest.raises(BadInput):
                await store.open(EXAMPLE, replace(SPEC, head_count=4))
            assert await store.open(EXAMPLE, SPEC) == handle

        self.play(scenario)

    def test_many_at_once_do_not_mix(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prompts = [prompt(handle, 4, seed) for seed in range(12)]
            assert await asyncio.gather(*(self.saved(store, handle, each) for each in prompts)) == [4] * 12
            twice = prompts * 2
            assert await asyncio.gather(*(self.loaded(store, handle, each) for each in twice)) == [4] * 24

        self.play(scenario)

    def test_two_writers_of_one_prompt_both_end_and_one_content_stays(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 4)
            counts = await asyncio.gather(*(self.saved(store, handle, prefix) for _ in range(6)))
            assert max(counts) == 4
            assert store.counters["saved_blocks"] == 4
            assert await self.loaded(store, handle, prefix) == 4

        self.play(scenario)

    def test_a_closed_store_misses(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 2)
            await self.saved(store, handle, prefix)
            lease = await store.lease(handle, prefix)
            await store.close()
            await store.close()
            assert await store.match(handle, prefix) == 0
            assert await store.load(lease, whole(room(2))) == {0, 1}
            assert (await store.lease(handle, prefix)).count == 0
            assert await self.saved(store, handle, prefix) == 0
            assert await store.persist(handle, prefix) == 0
            await store.release(lease)

        self.play(scenario)
