"""A snapshot takes at most ten bytes a block, whatever its runs are, and is cut anywhere without loss."""

from __future__ import annotations

import random
from array import array
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import event_pages
from kvcache.block import NamespaceId
from kvcache.event_pages import PAGE_BYTES_MAX, Part, Snapshot
from kvcache.index import RUN_BLOCKS_MAX, make_index
from kvcache.wire import BlockEvent, EventBatch, encode
from kvcache.wire_events import run_lengths

SPACE = NamespaceId(b"n" * 16)
LENGTHS = {
    "runs of 1": [1] * 200_000,
    "runs of 8": [8] * 25_000,
    "runs of 64": [64] * 3_125,
    "one run": [RUN_BLOCKS_MAX] * 12,
    "hardly any of 2": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2] * 16_000,
    "some of 2": [1, 1, 2] * 50_000,
}


def snapshot(*parts: list[int]) -> Snapshot:
    """Runs of these lengths; the blocks are numbered."""
    made = []
    for number, lengths in enumerate(parts):
        hashes = memoryview(array("Q", range(1, sum(lengths) + 1)))
        space = NamespaceId(number.to_bytes(16, "little"))
        made.append(Part(space, "host", hashes, memoryview(array("H", lengths))))
    return Snapshot("node", 1, 5, [], made, {"host": bytes(24)})


def joined(event: BlockEvent) -> list[tuple[int, int]]:
    """Each block of the event with the block before it, 0 where that is not told."""
    blocks = list(memoryview(event.hashes).cast("Q"))
    starts = {0, *accumulate(memoryview(run_lengths(event)).cast("H"))} if event.runs else {0}
    pairs = [(0 if at in starts else blocks[at - 1], block) for at, block in enumerate(blocks)]
    parent = int.from_bytes(event.parent, "little")
    return [(parent, pairs[0][1]), *pairs[1:]]


def truth(lengths: list[int]) -> list[tuple[int, int]]:
    starts = set(accumulate(lengths, initial=0))
    return [(0 if at in starts else at, at + 1) for at in range(sum(lengths))]


@pytest.mark.parametrize("name", LENGTHS)
def test_it_takes_ten_bytes_a_block_at_most(name: str) -> None:
    made = snapshot(LENGTHS[name])
    sizes = [len(encode(1, page)) for page in made.pages()]
    assert max(sizes) <= PAGE_BYTES_MAX
    assert sum(sizes) <= 10 * len(made.parts[0].hashes)


@given(st.lists(st.lists(st.sampled_from([1, 2, 3, 7]), max_size=12), max_size=4), st.integers(170, 400))
def test_every_block_is_told_once_with_the_one_before_it(parts: list[list[int]], room: int) -> None:
    made = snapshot(*parts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(event_pages, "PAGE_ROOM_BYTES", room)
        patched.setattr(event_pages, "_WINDOW_RUNS", 3)
        pages = list(made.pages())
    assert [page.left for page in pages] == list(range(len(pages)))[::-1]
    assert all(page.snapshot and page.seq == 5 for page in pages)
    for number, lengths in enumerate(parts):
        space = number.to_bytes(16, "little")
        told = [
            pair
            for page in pages
            for event in page.events
            if event.namespace == space
            for pair in joined(event)
        ]
        assert [block for _, block in told] == [block for _, block in truth(lengths)]
        for (before, _), (expected, _) in zip(told, truth(lengths), strict=True):
            assert before in (expected, 0), "it may be left out, but not wrong"
        if 10 * len(lengths) <= sum(lengths):
            assert told == truth(lengths)


def test_many_small_namespaces_are_bounded_too() -> None:
    made = snapshot(*([1] for _ in range(9_000)))
    pages = list(made.pages())
    assert sum(len(page.events) for page in pages) == 9_000
    assert max(len(encode(1, page)) for page in pages) <= PAGE_BYTES_MAX


@pytest.mark.slow
def test_an_index_gives_runs_and_takes_them_back() -> None:
    """Prefixes that branch: the source's index, its pages, a follower's index."""
    chance = random.Random(7)
    source, follower = make_index(1 << 30), make_index(1 << 30)
    holder, copy = source.open(1), follower.open(1)
    for _ in range(2_000):
        run = array("Q", [chance.getrandbits(63) for _ in range(chance.choice([1, 2, 8, 300]))])
        source.store(holder, 1, run)
        source.remove(holder, 1, run[len(run) // 2 : len(run) // 2 + 1])
    hashes, lengths = source.runs(holder, 1)
    for page in Snapshot("node", 1, 1, [], [Part(SPACE, "host", hashes, lengths)], {}).pages():
        for event in page.events:
            follower.store_runs(copy, 1, event.hashes, run_lengths(event) if event.runs else lengths[:1])
    assert follower.digest(copy, 1) == source.digest(holder, 1)


def test_pages_say_what_batch_they_are_as_of() -> None:
    [page] = Snapshot("node", 7, 3, [], [], {"host": bytes(24)}).pages()
    assert page == EventBatch("node", 7, 3, True, [], digests={"host": bytes(24)})
    first, second = list(Snapshot("node", 7, 3, [{"model": "m"}], snapshot([2]).parts, {}).pages())
    assert first.namespaces and not first.events and second.events
    assert all(one.left == next_one.left + 1 for one, next_one in pairwise([first, second]))
