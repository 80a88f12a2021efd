"""The index of leading blocks: the C++ module and the twin keep one contract.

``KVCACHE_NATIVE=0`` leaves the C++ module out. Nothing else does: where it was not built, these tests fail.
"""

from __future__ import annotations

import os
import random
import threading
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from xxhash import xxh3_64_intdigest

from kvcache import index, index_twin
from kvcache.errors import BadInput
from kvcache.testing.index_model import BYTES_MAX, blocks, path
from kvcache.testing.indexes import IndexContract

if TYPE_CHECKING:
    from kvcache.index import Index

WITH_NATIVE = os.environ.get("KVCACHE_NATIVE") != "0"
needs_native = pytest.mark.skipif(not WITH_NATIVE, reason="KVCACHE_NATIVE=0 asked for the twin")


def makers() -> list[Callable[[int], Index]]:
    if not index.NATIVE:
        return [index_twin.PrefixIndex]
    return [index.native.PrefixIndex, index_twin.PrefixIndex]


@pytest.mark.parametrize("block_tokens", [*range(1, 80), 127, 128, 256, 300, 1024])
def test_blocks_are_named_by_seeded_sums(block_tokens: int) -> None:
    generator = random.Random(block_tokens)
    tokens = array("I", [generator.getrandbits(32) for _ in range(3 * block_tokens + block_tokens // 2)])
    root = generator.getrandbits(64)
    expected = []
    for at in range(0, 3 * block_tokens, block_tokens):
        seed = expected[-1] if expected else root
        expected.append(xxh3_64_intdigest(tokens[at : at + block_tokens].tobytes(), seed))
    for name_blocks in (index.name_blocks, index_twin.name_blocks):
        assert list(name_blocks(tokens, block_tokens, root)) == expected


@pytest.mark.parametrize("make", makers(), ids=lambda make: make.__module__)
def test_tokens_are_asked_for_by_their_names(make: Callable[[int], Index]) -> None:
    made, tokens = make(BYTES_MAX), array("I", range(100))
    made.store(made.open(4), 0, index.name_blocks(tokens, 16, root=9)[:5])
    assert made.match_tokens(tokens, 16, root=9).as_dict() == {(4, 0): 5}
    assert len(made.match_tokens(tokens, 16)) == 0
    with pytest.raises(BadInput, match="bad_prefix"):
        made.match_tokens(tokens, 0)
    with pytest.raises(BadInput, match="bad_prefix"):
        made.match_tokens(array("Q", [1]), 16)


@needs_native
def test_the_native_module_is_built_and_in_use() -> None:
    assert index.NATIVE, (
        "kvcache/_native/index is missing: no C++ compiler, or `pip install -e .` was not run"
    )
    assert type(index.make_index(1 << 20)).__module__ == "kvcache._native.index"


class TestTwin(IndexContract):
    make = index_twin.PrefixIndex


if index.NATIVE:

    @needs_native
    class TestNative(IndexContract):
        make = index.native.PrefixIndex


def sizes() -> list[tuple[Callable[[int], Index], int, int]]:
    """Each index, how long the tail is and how often it comes: long enough to be read while it does."""
    factor = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))
    return [
        (make, 900, 10 * factor) if make is index_twin.PrefixIndex else (make, 8_000, 50 * factor)
        for make in makers()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "length", "turns"), sizes(), ids=lambda each: getattr(each, "__module__", "")
)
def test_readers_and_one_writer_at_a_time(make: Callable[[int], Index], length: int, turns: int) -> None:
    """A tail comes and goes while others ask: never less than the root is found, never more than was
    stored, and what was there all the time always whole."""
    made = make(BYTES_MAX)
    root, tail = path([1] * 300), path([1] * (300 + length))[300:]
    steady, moving = made.open(1), made.open(2)
    other = path([2] * 700)
    made.store(steady, 0, blocks(other))
    made.store(moving, 0, blocks(root))
    long, short, kept = blocks(root + tail), blocks(root), blocks(other)
    ten = blocks([*long] * 10)
    ends = blocks(range(len(long), len(ten) + 1, len(long)))
    done = threading.Event()
    wrong: list[object] = []

    def read(ask: Callable[[], bool]) -> None:
        while not done.is_set():
            if not ask():
                wrong.append(ask)
                return

    def between() -> bool:
        counts = list(made.match(long).blocks)
        return len(counts) == 1 and 300 <= counts[0] <= len(long)

    def steadily() -> bool:
        return made.match(kept).as_dict()[1, 0] == 700 and list(made.match(short).blocks) == [300]

    def many() -> bool:
        found = made.match_many(ten, ends)
        return len(found.ends) == 10 and all(300 <= count <= len(long) for count in found.blocks)

    def chosen() -> bool:
        found = made.match(long, candidates=array("I", [2, 9]), limit=1)
        return list(found.workers) == [2] and 300 <= found.blocks[0] <= len(long)

    def copied() -> bool:
        hashes, lengths = made.runs(steady, 0)
        return (
            hashes.tobytes() == kept.tobytes() and list(lengths) == [700] and made.digest(steady, 0)[0] == 700
        )

    asked = (between, steadily, many, chosen, copied)
    readers = [threading.Thread(target=read, args=(ask,)) for ask in asked]
    for reader in readers:
        reader.start()
    try:
        for turn in range(turns):
            if turn % 5 == 0:
                assert made.store_runs(moving, turn % 4, blocks(tail), array("H", [100, length - 100])) == 0
            else:
                assert made.store(moving, turn % 4, blocks(tail), root[-1]) == 0
            extra = made.open(3 + turn % 5)
            made.store(extra, 0, kept)
            gone = random.Random(turn).sample(tail, length) if turn % 3 == 0 else tail[:: 1 - turn % 2 * 2]
            assert made.remove(moving, turn % 4, blocks(gone)) == length
            made.close(extra)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not wrong
    made.check()


@pytest.mark.parametrize("make", makers(), ids=lambda make: make.__module__)
def test_one_answer_is_read_by_many_threads(make: Callable[[int], Index]) -> None:
    made, prompt = make(BYTES_MAX), path([1] * 100)
    for worker in range(100):
        made.store(made.open(worker, worker + 100), 1, blocks(prompt[: worker + 1]))
    found = made.match(blocks(prompt))
    names = ("workers", "dp_ranks", "blocks")
    expected = [list(range(100)), list(range(100, 200)), list(range(1, 101))]
    wrong: list[str] = []

    def read(first: int) -> None:
        for turn in range(300):
            at = (first + turn) % 3
            if sorted(getattr(found, names[at])) != expected[at] or sorted(found.tier(1)) != expected[2]:
                wrong.append(names[at])

    readers = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert not wrong
