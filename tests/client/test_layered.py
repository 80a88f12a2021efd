"""Saves layer by layer, by themselves: what the node is told, when, and what a failure costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from kvcache.block import BlockSpec
from kvcache.client import layered, leasing
from kvcache.client.layered import STEP_BYTES, Draft
from kvcache.client.store import NO_HINTS, SaveHints
from kvcache.errors import BadInput, NotAllowed, Unavailable
from kvcache.sums import SUM_BYTES, sum_chunks
from kvcache.testing.stores import SPEC
from kvcache.testing.stores_layered import Prompt
from kvcache.wire import (
    Abort,
    Advance,
    Commit,
    Committed,
    Done,
    Leased,
    Reply,
    Request,
    Reserve,
    Reserved,
    TakeLease,
    Write,
)
from tests.client.conftest import Rig
from tests.client.script import Cancelled, Script, context_and_handle, hashes

COUNT = 3
LAYERS = BlockSpec(block_tokens=4, plane_count=32, head_count=2, head_bytes=1024)
WIDE = BlockSpec(block_tokens=4, plane_count=32, head_count=2, head_bytes=1 << 20)


class Memory:
    """The node's memory as a client maps it."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(size)

    def slots(self, offsets: Sequence[int], block_bytes: int) -> list[memoryview]:
        view = memoryview(self.memory)
        return [view[at : at + block_bytes] for at in offsets]

    def pieces(
        self, offsets: Sequence[int], shapes: Sequence[Sequence[memoryview]], block_bytes: int
    ) -> list[memoryview]:
        cut: list[memoryview] = []
        for slot, shape in zip(self.slots(offsets, block_bytes), shapes, strict=True):
            for piece in shape:
                cut.append(slot[: len(piece)])
                slot = slot[len(piece) :]
        return cut

    def warm(self) -> None:
        pass

    def close(self) -> None:
        pass


class Bench:
    """One draft of ``COUNT`` blocks of ``spec``, a node of a few lines, and what it was asked."""

    def __init__(self, spec: BlockSpec = LAYERS, answer: Callable[[Request], Reply | None] | None = None):
        self.spec = spec
        self.context, self.handle = context_and_handle(spec)
        self.memory = Memory(COUNT * spec.block_bytes)
        self.context.link.slab = self.memory  # type: ignore[assignment]  # of a map only these are used
        self.other = answer or (lambda request: None)
        self.script = Script(self.answer)
        self.prefix = hashes(COUNT)
        self.blocks = [bytearray(spec.block_bytes) for _ in range(COUNT)]

    def answer(self, request: Request) -> Reply:
        if (reply := self.other(request)) is not None:
            return reply
        match request:
            case Reserve():
                size = self.spec.block_bytes
                return Reserved(7, 0, COUNT, [at * size for at in range(COUNT)], [1] * COUNT)
            case Commit():
                return Committed(len(request.sums) // (self.spec.chunk_count * SUM_BYTES))
            case Advance() | Abort() | Write():
                return Done()
        raise AssertionError(request)

    def begin(self, hints: SaveHints = NO_HINTS) -> Draft:
        whole = [[block] for block in self.blocks]
        begun = layered.begin(self.context, self.handle, self.prefix, whole, b"", hints)
        return self.script.drive(begun)

    def compute(self, draft: Draft, planes: int, cancel_at: int = -1) -> None:
        """The planes up to ``planes`` get bytes of their own."""
        size = self.spec.plane_bytes
        for number, block in enumerate(self.blocks):
            for plane in range(draft.ready, planes):
                block[plane * size : (plane + 1) * size] = bytes([1 + number + 7 * plane & 0xFF]) * size
        self.script.drive(layered.advance(self.context, draft, planes), cancel_at)

    def finish(self, draft: Draft) -> int:
        return self.script.drive(layered.finish(self.context, draft))

    def told(self) -> list[int]:
        return [request.planes for request in self.script.asked if isinstance(request, Advance)]

    def kinds(self) -> list[str]:
        return [type(request).__name__ for request in self.script.asked]

    def stored(self) -> bool:
        """The node's memory holds the blocks, and the last commit their sums."""
        commit = self.script.asked[-1]
        assert isinstance(commit, Commit)
        right = sum_chunks(self.blocks, self.spec.chunk_bytes)
        return self.memory.memory == b"".join(self.blocks) and commit.sums == right


def test_small_planes_are_told_an_eighth_of_the_block_at_a_time() -> None:
    bench = Bench()
    draft = bench.begin()
    for plane in range(LAYERS.plane_count):
        bench.compute(draft, plane + 1)
    assert bench.told() == [4, 8, 12, 16, 20, 24, 28, 32]
    assert bench.finish(draft) == COUNT
    assert bench.stored()
    assert bench.kinds() == ["Reserve", *["Advance"] * 8, "Commit"]
    assert bench.context.tally.copy()["streamed_blocks"] == COUNT


def test_large_planes_are_told_one_by_one() -> None:
    assert COUNT * WIDE.plane_bytes < STEP_BYTES <= 2 * COUNT * WIDE.plane_bytes
    bench = Bench(WIDE)
    draft = bench.begin()
    for plane in range(6):
        bench.compute(draft, plane + 1)
    assert bench.told() == [2, 4, 6]


def test_what_is_told_are_the_sums_of_the_new_planes_of_each_block() -> None:
    bench = Bench()
    draft = bench.begin()
    for planes in (5, 20):
        bench.compute(draft, planes)
        advance = bench.script.asked[-1]
        assert isinstance(advance, Advance)
        first = {5: 0, 20: 5}[planes] * LAYERS.plane_bytes
        fresh = [memoryview(block)[first : planes * LAYERS.plane_bytes] for block in bench.blocks]
        assert (advance.reservation, advance.planes) == (7, planes)
        assert advance.sums == sum_chunks(fresh, LAYERS.chunk_bytes)
    bench.compute(draft, LAYERS.plane_count)
    assert bench.finish(draft) == COUNT
    assert bench.stored()


@pytest.mark.parametrize("lengths", [[16, 16], [1] * 32, [2, 1, 1] * 8, [3, 1, 28]])
def test_pieces_may_end_anywhere(lengths: list[int]) -> None:
    bench = Bench()
    ends = [sum(lengths[: at + 1]) * LAYERS.plane_bytes for at in range(len(lengths))]
    pieces = [[memoryview(block)[a:b] for a, b in itertools.pairwise([0, *ends])] for block in bench.blocks]
    begun = layered.begin(bench.context, bench.handle, bench.prefix, pieces, b"", NO_HINTS)
    draft = bench.script.drive(begun)
    for planes in (5, 6, 7, 11, 32):
        bench.compute(draft, planes)
    assert bench.finish(draft) == COUNT
    assert bench.stored()


def test_what_was_not_told_is_copied_at_the_end() -> None:
    bench = Bench()
    draft = bench.begin()
    bench.compute(draft, 6)
    for block in bench.blocks:
        block[6 * LAYERS.plane_bytes :] = b"\x5a" * (26 * LAYERS.plane_bytes)
    assert bench.finish(draft) == COUNT
    assert bench.told() == [6]
    assert bench.stored()


def test_a_node_that_will_not_hear_it_is_told_once_and_gets_the_blocks() -> None:
    def deaf(request: Request) -> Reply | None:
        if isinstance(request, Advance):
            raise NotAllowed("not_allowed", "no")
        return None

    bench = Bench(answer=deaf)
    draft = bench.begin()
    for planes in (8, 16, 32):
        bench.compute(draft, planes)
    assert bench.told() == [8]
    assert bench.finish(draft) == COUNT
    assert bench.stored()
    counts = bench.context.tally.copy()
    assert counts["refused_advances"] == 1
    assert "streamed_blocks" not in counts


def test_a_connection_that_ends_costs_the_head_start_only() -> None:
    def gone(request: Request) -> Reply | None:
        if isinstance(request, Advance):
            raise Unavailable("unavailable", "gone")
        return None

    bench = Bench(answer=gone)
    draft = bench.begin()
    bench.compute(draft, 8)
    bench.context.link.number += 1  # The next connection: what it reserves is another reservation.
    bench.compute(draft, 32)
    assert bench.finish(draft) == COUNT
    assert bench.kinds() == ["Reserve", "Advance", "Reserve", "Commit"]
    assert bench.stored()


def test_a_reservation_of_an_earlier_connection_is_never_written_to() -> None:
    bench = Bench()
    draft = bench.begin()
    bench.context.link.number += 1
    bench.compute(draft, 32)
    assert bench.memory.memory == bytes(COUNT * LAYERS.block_bytes)
    bench.script.drive(layered.abort(bench.context, draft))
    assert bench.kinds() == ["Reserve"]


@pytest.mark.parametrize("cancel_at", [0, 1])
def test_a_cancelled_advance_gives_the_slots_back(cancel_at: int) -> None:
    bench = Bench()
    draft = bench.begin()
    with pytest.raises(Cancelled):
        bench.compute(draft, 8, cancel_at)
    assert bench.kinds()[-1] == "Abort"
    assert bench.finish(draft) == COUNT, "the blocks are still there, and are saved whole"
    assert bench.stored()


def test_a_commit_that_is_refused_is_aborted_and_counted() -> None:
    def strict(request: Request) -> Reply | None:
        if isinstance(request, Commit):
            raise BadInput("bad_block", "no")
        return None

    bench = Bench(answer=strict)
    draft = bench.begin()
    bench.compute(draft, 32)
    assert bench.finish(draft) == 0
    assert bench.kinds()[-2:] == ["Commit", "Abort"]
    assert bench.context.tally.copy()["unsaved_blocks:refused"] == COUNT


def test_over_the_wire_nothing_is_reserved_before_the_end() -> None:
    bench = Bench(answer=lambda r: Reserved(7, 0, COUNT, [], []) if isinstance(r, Reserve) else None)
    bench.context.link.slab = None
    draft = bench.begin()
    bench.compute(draft, 32)
    assert bench.kinds() == []
    assert bench.finish(draft) == COUNT
    assert bench.kinds() == ["Reserve", "Write", "Commit"]


def test_slots_that_are_not_in_the_map_are_given_back() -> None:
    replies = iter([Reserved(7, 0, COUNT, [-1] * COUNT, [1] * COUNT), Reserved(0, COUNT, 0, [], [])])
    bench = Bench(answer=lambda r: next(replies) if isinstance(r, Reserve) else None)
    draft = bench.begin()
    bench.compute(draft, 32)
    assert bench.finish(draft) == COUNT
    assert bench.kinds() == ["Reserve", "Abort", "Reserve"]


def test_both_ways_of_saving_name_the_peer_to_push_to() -> None:
    bench = Bench()
    bench.begin(SaveHints(push="node-b"))
    bench.context.link.slab = None
    bench.finish(bench.begin(SaveHints(push="node-c")))
    pushes = [request.push for request in bench.script.asked if isinstance(request, Reserve)]
    assert pushes == ["node-b", "node-c"]


def test_every_call_for_a_lease_names_its_source() -> None:
    """Also those that are made again because blocks are still coming."""
    context, handle = context_and_handle()
    replies = iter([Leased(0, 0, [], [], b"", 0, 0, 2), Leased(3, 2, [], [], bytes(32), 0, 9_000)])
    script = Script(lambda request: next(replies), context.clock)  # type: ignore[arg-type]  # a FakeClock
    script.drive(leasing.lease(context, handle, hashes(2), "r", 30_000, 1_000, "node-a", True))
    asked = [(r.source, r.pushed) for r in script.asked if isinstance(r, TakeLease)]
    assert asked == [("node-a", True)] * 2
    with pytest.raises(BadInput):
        script.drive(leasing.lease(context, handle, hashes(2), "r", 30_000, 0, "n" * 5_000))


def test_a_node_that_goes_away_in_the_middle(rig: Rig) -> None:
    """Over a real connection that is cut: the save is whole afterwards, on the next one."""
    prefix = rig.handle.hashes(range(12))
    work = Prompt(rig.handle, prefix)
    writing = rig.store.begin_save(rig.handle, prefix, [[page] for page in work.pages])
    work.compute(0)
    writing.advance(1)
    rig.proxy.cut()
    rig.recover()
    work.compute(1)
    writing.advance(SPEC.plane_count)
    assert writing.finish() == len(prefix)
    assert rig.store.match(rig.handle, prefix) == len(prefix)
    assert rig.stats()["reservations"] == 0
