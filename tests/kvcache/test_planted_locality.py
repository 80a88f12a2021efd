"""Bugs of the locality index, put in on purpose: each must turn a named test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

TOLD = "tests/kvcache/test_locality.py"
LEASES = "tests/kvcache/test_locality_lease.py"
SOURCE = "kvcache/locality_source.py"

PLANTS = (
    Plant(
        "a gap is not noticed",
        SOURCE,
        "        if told_seq != seq + (not batch.beat):\n",
        "        if False:\n",
        f"{TOLD}::test_a_gap_that_is_too_long_ago_is_healed_by_a_snapshot",
    ),
    Plant(
        "a lower incarnation is taken",
        SOURCE,
        "        if batch.incarnation < self.incarnation:\n",
        "        if False:\n",
        f"{TOLD}::test_the_first_event_of_a_source_that_started_anew_ends_what_it_had",
    ),
    Plant(
        "what a source had stays when it starts anew",
        SOURCE,
        "        self._forget_content()\n        self._stamp = (incarnation, 0, self._stamp[2])\n",
        "        self._stamp = (incarnation, 0, self._stamp[2])\n",
        f"{TOLD}::test_the_first_event_of_a_source_that_started_anew_ends_what_it_had",
    ),
    Plant(
        "a snapshot serves before it is whole",
        SOURCE,
        "            view = View(self._content, self.number, is_shadow=True)\n",
        "            view = View(self._content, self.number)\n",
        f"{TOLD}::test_a_snapshot_replaces_only_when_it_is_whole",
    ),
    Plant(
        "digests are not compared",
        SOURCE,
        "        return not batch.digests or view.partial or view.agrees(batch.digests)\n",
        "        return True\n",
        f"{TOLD}::test_a_difference_that_numbers_do_not_show_is_found_by_the_digest",
    ),
    Plant(
        "who is behind is not suspect",
        SOURCE,
        "        return self._in_order and not self._late and self.seq >= self._ahead\n",
        "        return self._in_order and not self._late\n",
        f"{TOLD}::test_a_lost_batch_is_had_again_from_where_the_index_stands",
    ),
    Plant(
        "who is suspect is not so in answers",
        "kvcache/locality.py",
        "            self._rename(suspects ^ {source.number})\n",
        "            self._rename(suspects - {source.number})\n",
        f"{TOLD}::test_a_lost_batch_is_had_again_from_where_the_index_stands",
    ),
    Plant(
        "a lease never ends",
        SOURCE,
        "        if silent_ns <= DROPPED_NS or not may_drop",
        "        if True or not may_drop",
        f"{LEASES}::test_three_beats_missed_and_what_was_told_is_forgotten",
    ),
    Plant(
        "a batch that comes twice is taken twice",
        SOURCE,
        "            return Applied.STALE\n        if told_seq != seq + (not batch.beat):\n",
        "            told_seq = seq + 1\n        if told_seq != seq + (not batch.beat):\n",
        f"{TOLD}::test_a_batch_told_twice_counts_once",
    ),
    Plant(
        "what is removed on a disk stays",
        "kvcache/locality_view.py",
        "                index.remove(holder, tier, event.hashes)\n",
        "                index.remove(holder, min(tier, 1), event.hashes)\n",
        f"{TOLD}::test_the_digest_of_every_tier_counts",
    ),
    Plant(
        "the digest has no salt",
        "kvcache/locality_view.py",
        '        salt = int.from_bytes(self._content.ids[number][:HINT_BYTES], "little")\n',
        "        salt = 0\n",
        f"{TOLD}::test_ranks_share_hashes_and_are_counted_apart",
    ),
    Plant(
        "what was refused is not said",
        "kvcache/locality_view.py",
        "                    self.partial = True\n",
        "",
        f"{TOLD}::test_over_its_limit_it_says_too_little_and_says_so",
    ),
    Plant(
        "predictions never end",
        "kvcache/locality_placed.py",
        "            for tier in ended:\n",
        "            for tier in ():\n",
        f"{LEASES}::test_a_prediction_ends_between_once_and_twice_its_time",
    ),
    Plant(
        "what was removed is predicted on",
        "kvcache/locality_placed.py",
        "                self._index.remove(holder, tier, event.hashes)\n",
        '                self._index.remove(holder, tier, b"")\n',
        f"{LEASES}::test_what_the_source_tells_goes_before_what_was_predicted",
    ),
    Plant(
        "a late reply to an old question counts",
        SOURCE,
        "        return batch.seq < self.seq or (",
        "        return False and (",
        f"{TOLD}::test_a_snapshot_that_is_older_than_what_is_there_is_ignored",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "-"))
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
