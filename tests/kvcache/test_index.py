"""The index of leading blocks: the C++ module and the twin keep one contract.

``KVCACHE_NATIVE=0`` leaves the C++ module out. Nothing else does: where it was not built, these tests fail.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from kvcache import index, index_twin
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


@pytest.mark.slow
@pytest.mark.parametrize("make", makers(), ids=lambda make: make.__module__)
def test_readers_and_one_writer_at_a_time(make: Callable[[int], Index]) -> None:
    """A tail of 900 blocks comes and goes while others ask: never less than the root is found, never more
    than was stored, and what was there all the time always whole."""
    made = make(BYTES_MAX)
    root, tail = path([1] * 300), path([1] * 1_200)[300:]
    other = path([2] * 700)
    steady, moving = made.open(1), made.open(2)
    made.store(steady, 0, blocks(other))
    made.store(moving, 0, blocks(root))
    long, short, kept = blocks(root + tail), blocks(root), blocks(other)
    done = threading.Event()
    wrong: list[object] = []

    def read(ask: Callable[[], bool]) -> None:
        while not done.is_set():
            if not ask():
                wrong.append(ask)
                return

    def between() -> bool:
        counts = list(made.match(long).blocks)
        return len(counts) == 1 and 300 <= counts[0] <= 1_200

    def steadily() -> bool:
        return made.match(kept).as_dict()[1, 0] == 700 and list(made.match(short).blocks) == [300]

    def many() -> bool:
        joined = blocks([*long] * 20)
        found = made.match_many(joined, blocks(range(len(long), len(joined) + 1, len(long))))
        return len(found.ends) == 20 and all(300 <= count <= 1_200 for count in found.blocks)

    readers = [threading.Thread(target=read, args=(ask,)) for ask in (between, steadily, many)]
    for reader in readers:
        reader.start()
    try:
        for turn in range(60):
            assert made.store(moving, turn % 4, blocks(tail), root[-1]) == 0
            extra = made.open(3 + turn % 5)
            made.store(extra, 0, kept)
            assert made.remove(moving, turn % 4, blocks(tail[::-1] if turn % 2 else tail)) == 900
            made.close(extra)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not wrong
    made.check()
