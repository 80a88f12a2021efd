"""The index of leading blocks: the C++ module and the twin keep one contract.

``KVCACHE_NATIVE=0`` leaves the C++ module out. Nothing else does: where it was not built, these tests fail.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
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


@needs_native
@pytest.mark.parametrize("run", [16, 256, 2_000])
def test_nothing_is_refused_while_much_of_the_memory_is_left(run: int) -> None:
    made, generator = index.make_index(600_000), random.Random(run)
    holder = made.open(1)
    while not made.store(holder, 0, array("Q", [generator.getrandbits(64) for _ in range(run)])):
        pass
    assert made.bytes > 0.9 * made.bytes_max


@needs_native
def test_nobody_can_choose_hashes_that_fill_one_part_of_the_table() -> None:
    """These meet in one of 1,024 shards of a table whose factor is known, the golden ratio's."""
    made, generator = index.make_index(4 << 20), random.Random(9)
    mask, inverse = (1 << 64) - 1, pow(0x9E3779B97F4A7C15, -1, 1 << 64)
    chosen = array("Q")
    for _ in range(50_000):
        mixed = (5 << 54 | generator.getrandbits(54)) * inverse & mask
        chosen.append(mixed ^ mixed >> 31 ^ mixed >> 62)
    assert made.store(made.open(1), 0, chosen) == 0
    made.check()


@needs_native
def test_nothing_collects_garbage_under_the_lock() -> None:
    """What a collection runs may write to the index: it would wait for itself. Hence a process apart."""
    program = """
import gc
from array import array
from kvcache.index import make_index
index, one = make_index(1 << 20), array("Q", [1])
holder = index.open(0)
def ask(phase, info):
    index.store(holder, 0, one)
calls = [(index.digest, holder, 0), (index.held, holder, 0), (index.runs, holder, 0), (index.match, one)]
for call, *given in [*calls, (index.match_many, one, one), (index.stats,)]:
    kept = [call(*given) for _ in range(5_000)]
    for allocations in range(1, 6):
        gc.collect()
        gc.callbacks.append(ask)
        gc.set_threshold(allocations)
        for _ in range(8):
            kept.append(call(*given))
        gc.set_threshold(100_000)
        gc.callbacks.clear()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


@needs_native
@pytest.mark.slow
def test_an_index_for_which_there_is_no_memory_answers_nothing_any_more() -> None:
    """Half a change is in it: what it said would be wrong, and what it did would end the process."""
    program = """
import os
import resource
from array import array
from kvcache.index import make_index
index = make_index(64 << 30)
one, other = index.open(1), index.open(2)
told = [array("Q", os.urandom(2_400)) for _ in range(4_000)]
pages = int(open("/proc/self/statm").read().split()[0])
most = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (6 << 20), most))
def raises(call, *given):
    try:
        call(*given)
    except MemoryError:
        return True
    return False
failed = any(raises(index.store, one, 0, each) for each in told)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert failed
calls = [(index.store, one, 0), (index.remove, one, 0), (index.store_loose, other, 0), (index.match,)]
assert all(raises(call, *given, told[0]) for call, *given in calls)
assert raises(index.match_many, told[0], array("Q", [1]))
assert raises(index.open, 3) and raises(index.close, other) and raises(index.clear, one, 0)
assert raises(index.held, one, 0) and raises(index.runs, one, 0) and raises(index.digest, one, 0)
assert raises(index.stats) and raises(index.check) and index.bytes > 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
