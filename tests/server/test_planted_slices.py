"""Bugs of slices and of cuts, put in on purpose: each must turn a named test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

SLICES = "tests/kvcache/test_slices.py"
CUTS = "tests/kvcache/peers/test_cut.py"
NODES = "tests/server/test_cut.py"

PLANTS = (
    Plant(
        "a slice of any layout",
        "kvcache/slices.py",
        "    if namespace.layout not in CERTIFIED:\n",
        "    if False:\n",
        f"{SLICES}::TestCertified::test_other_layouts_are_refused_by_name",
    ),
    Plant(
        "a slice of packed, scaled or encoded blocks",
        "kvcache/slices.py",
        "        if value != plain:\n",
        "        if False:\n",
        f"{SLICES}::TestCertified::test_what_is_packed_scaled_or_encoded_is_refused_by_name",
    ),
    Plant(
        "a slice of blocks of other numbers",
        "kvcache/slices.py",
        'FREE = ("shape", "tp_rank", "tp_size")\n',
        'FREE = ("shape", "tp_rank", "tp_size", "dtype")\n',
        f"{SLICES}::TestCertified::test_no_other_field_may_differ",
    ),
    Plant(
        "heads that several ranks have are counted as different ones",
        "kvcache/slices.py",
        "    if stored.tp_size * have.head_count != wanted.tp_size * want.head_count:\n",
        "    if False:\n",
        f"{SLICES}::TestCertified::test_repeated_heads_are_refused",
    ),
    Plant(
        "a slice begins at its rank's first head",
        "kvcache/slices.py",
        "    cut = Slice(have, first - stored.tp_rank * have.head_count, end - first)\n",
        "    cut = Slice(have, 0, end - first)\n",
        f"{SLICES}::TestBytes::test_every_rank_gets_what_it_would_have_saved",
    ),
    Plant(
        "joined parts all go to the beginning",
        "kvcache/slices.py",
        "    return Part(stored, cut, first - wanted.tp_rank * want.head_count)\n",
        "    return Part(stored, cut, 0)\n",
        f"{SLICES}::TestBytes::test_every_rank_gets_what_it_would_have_saved",
    ),
    Plant(
        "the chunks of a slice are not compared with their sums",
        "client/slicing.py",
        'sums if found == cover.sums_of(sums) else b""',
        "sums",
        "tests/client/test_slicing.py::test_a_wrong_block_is_reported_and_taken_out",
    ),
    Plant(
        "what is dropped before a slice is kept",
        "client/slicing.py",
        "        lead = cut.offset - cover.offset\n",
        "        lead = 0\n",
        "tests/client/test_slicing.py::test_a_wrong_block_is_reported_and_taken_out",
    ),
    Plant(
        "the sums of other blocks of the lease",
        "server/reading.py",
        "        keys = lease.keys[request.start : request.start + request.count]\n",
        "        keys = lease.keys[: request.count]\n",
        "tests/server/test_slices.py::test_the_sums_of_all_chunks",
    ),
    Plant(
        "a joined block has as many good ones as its best part",
        "kvcache/peers/cut.py",
        "        good = min(len(each.blocks) for each in came)\n",
        "        good = max(len(each.blocks) for each in came)\n",
        f"{CUTS}::test_what_one_part_lacks_the_block_lacks",
    ),
    Plant(
        "every part goes to the beginning of the planes",
        "kvcache/peers/cut.py",
        "        first = self.part.at * wanted.head_bytes\n",
        "        first = 0\n",
        f"{NODES}::test_ranks_that_lie_on_different_peers_are_joined",
    ),
    Plant(
        "a copy is left to itself when the fetch is cancelled",
        "kvcache/uncancelled.py",
        "            cancelled = error\n",
        "            raise error\n",
        f"{CUTS}::test_a_copy_ends_before_its_cancellation_is_heard",
        waits=True,
    ),
    Plant(
        "what came from a peer is not compared with the sums that were told",
        "kvcache/peers/dealing.py",
        " or part.sums_of(sums) != came[at * step_came : (at + 1) * step_came]:\n",
        ":\n",
        f"{NODES}::test_wrong_bytes_in_a_chunk_that_is_read_end_what_comes",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "-"))
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
