"""The contract of saves that go on while blocks are computed (``store.Writing``), for every store.

``Prompt`` is an engine in the middle of a forward pass: its pages hold other bytes in each plane that was
not computed yet, so a plane that is copied too early makes a block that nobody can load.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from kvcache.block import BlockHash
from kvcache.client.store import BlockStore, Handle, SaveHints
from kvcache.errors import BadInput
from kvcache.testing.stores import PLANE, SIZE, SPEC, StoreContract, content, planes, prompt, whole
from kvcache.wire import BATCH_BLOCKS_MAX

PLANES = SPEC.plane_count


class Prompt:
    """The pages of one prompt while it is computed, plane after plane."""

    def __init__(self, handle: Handle, prefix: Sequence[BlockHash]) -> None:
        self.final = content(handle, prefix)
        self.pages = [bytearray(b"\xee" * SIZE) for _ in prefix]

    def compute(self, plane: int) -> None:
        span = slice(plane * PLANE, (plane + 1) * PLANE)
        for page, final in zip(self.pages, self.final, strict=True):
            page[span] = final[span]


class LayeredContract(StoreContract):
    """``StoreContract``, and saves layer by layer."""

    async def computed(
        self, store: BlockStore, handle: Handle, prefix: Sequence[BlockHash], parent: bytes = b""
    ) -> int:
        """Save ``prefix`` as its planes are computed; how many blocks are held then."""
        work = Prompt(handle, prefix)
        writing = await store.begin_save(handle, prefix, planes(work.pages), parent)
        for plane in range(PLANES):
            work.compute(plane)
            await writing.advance(plane + 1)
        return await writing.finish()

    def test_what_was_saved_plane_by_plane_is_loaded(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 5)
            assert await self.computed(store, handle, prefix) == 5
            assert await self.loaded(store, handle, prefix) == 5
            assert store.counters["saved_blocks"] == 5
            assert store.counters["saved_bytes"] == 5 * SIZE

        self.play(scenario)

    @pytest.mark.parametrize("steps", [(), (1,), (0, 1, 1), (PLANES,)])
    def test_however_it_is_told(self, steps: tuple[int, ...]) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            work = Prompt(handle, prefix)
            hints = SaveHints("prefill_only", 70)
            writing = await store.begin_save(handle, prefix, whole(work.pages), hints=hints)
            done = 0
            for step in steps:
                for plane in range(done, step):
                    work.compute(plane)
                await writing.advance(step)
                done = step
            for plane in range(done, PLANES):
                work.compute(plane)
            assert await writing.finish() == 3
            assert await self.loaded(store, handle, prefix) == 3

        self.play(scenario)

    def test_nothing_is_seen_before_the_end(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            work = Prompt(handle, prefix)
            writing = await store.begin_save(handle, prefix, planes(work.pages))
            for plane in range(PLANES):
                work.compute(plane)
                await writing.advance(plane + 1)
                assert await store.match(handle, prefix) == 0
                assert (await store.lease(handle, prefix, wait_ms=0)).count == 0
            assert await writing.finish() == 3
            assert await store.match(handle, prefix) == 3

        self.play(scenario)

    def test_what_was_aborted_is_not_there_and_can_be_saved(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            work = Prompt(handle, prefix)
            writing = await store.begin_save(handle, prefix, planes(work.pages))
            work.compute(0)
            await writing.advance(1)
            await writing.abort()
            await writing.abort()
            assert await store.match(handle, prefix) == 0
            assert await self.computed(store, handle, prefix) == 3
            assert await self.loaded(store, handle, prefix) == 3

        self.play(scenario)

    def test_only_what_is_not_held_is_written(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 6)
            await self.saved(store, handle, prefix[:2])
            assert await self.computed(store, handle, prefix) == 6
            assert store.counters["saved_blocks"] == 6
            assert await self.computed(store, handle, prefix) == 6, "held already"
            assert store.counters["saved_blocks"] == 6
            assert await self.loaded(store, handle, prefix) == 6

        self.play(scenario)

    def test_a_prompt_grows_run_by_run(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 6)
            assert await self.computed(store, handle, prefix[:2]) == 2
            assert await self.computed(store, handle, prefix[2:], prefix[1]) == 4
            assert await self.loaded(store, handle, prefix) == 6

        self.play(scenario)

    def test_without_its_parent_no_plane_is_saved(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 4)
            assert await self.computed(store, handle, prefix[2:], prefix[1]) == 0
            assert store.counters["unsaved_blocks:parent"] == 2
            assert "missed_calls:refused" not in store.counters
            assert await store.match(handle, prefix) == 0

        self.play(scenario)

    def test_more_blocks_than_one_reservation(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, BATCH_BLOCKS_MAX + 3)
            assert await self.computed(store, handle, prefix) == len(prefix)
            assert await self.loaded(store, handle, prefix) == len(prefix)

        self.play(scenario)

    def test_two_at_once_and_one_content_stays(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 4)
            counts = await asyncio.gather(*(self.computed(store, handle, prefix) for _ in range(4)))
            assert max(counts) == 4
            assert store.counters["saved_blocks"] == 4
            assert await self.loaded(store, handle, prefix) == 4

        self.play(scenario)

    def test_what_the_caller_does_wrong_with_it_is_raised(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            final = planes(content(handle, prefix))
            for blocks, parent in ((final[:2], b""), (final, b"short"), ([[b"x"]] * 3, b"")):
                with pytest.raises(BadInput):
                    await store.begin_save(handle, prefix, blocks, parent)
            writing = await store.begin_save(handle, prefix, final)
            await writing.advance(1)
            for count in (0, PLANES + 1):
                with pytest.raises(BadInput):
                    await writing.advance(count)
            assert await writing.finish() == 3
            with pytest.raises(BadInput):
                await writing.finish()
            with pytest.raises(BadInput):
                await writing.advance(PLANES)
            await writing.abort()
            assert await self.loaded(store, handle, prefix) == 3

        self.play(scenario)

    def test_a_store_that_was_closed_meanwhile_saves_nothing(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            writing = await store.begin_save(handle, prefix, planes(content(handle, prefix)))
            await writing.advance(1)
            await store.close()
            await writing.advance(PLANES)
            assert await writing.finish() == 0
            await writing.abort()
            late = await store.begin_save(handle, prefix, planes(content(handle, prefix)))
            assert await late.finish() == 0

        self.play(scenario)

    def test_no_blocks_are_saved_layer_by_layer_too(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            writing = await store.begin_save(handle, [], [])
            await writing.advance(PLANES)
            assert await writing.finish() == 0

        self.play(scenario)

    def test_a_store_knows_the_name_of_its_node(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            assert store.node
            assert self.make().node == ""

        self.play(scenario)

    def test_a_source_that_nobody_knows_changes_no_bytes(self) -> None:
        async def scenario(store: BlockStore, handle: Handle) -> None:
            prefix = prompt(handle, 3)
            await self.saved(store, handle, prefix)
            for pushed in (False, True):
                lease = await store.lease(handle, prefix, wait_ms=0, source="nobody", pushed=pushed)
                assert lease.count == 3
                await store.release(lease)

        self.play(scenario)
