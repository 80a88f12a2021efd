"""Bugs of what a node tells, put in on purpose: each must turn a named test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

TELLING = "tests/server/test_telling.py"
WATCHING = "tests/server/test_watching.py"
FOLLOWING = "tests/kvcache/test_following.py"
PAGES = "tests/kvcache/test_event_pages.py"

PLANTS = (
    Plant(
        "the first missed batch is left out",
        "kvcache/event_ring.py",
        "seq + 1 - first, None",
        "seq + 2 - first, None",
        f"{TELLING}::test_a_follower_that_comes_back_gets_exactly_what_it_missed",
    ),
    Plant(
        "batches of another life are replayed",
        "server/telling.py",
        "if incarnation == self._publisher.incarnation else None",
        "if incarnation else None",
        f"{TELLING}::test_a_source_that_started_anew_says_so_at_once",
    ),
    Plant(
        "what came behind a shared snapshot is left out",
        "server/telling.py",
        "_read(behind))",
        "_read([]))",
        f"{TELLING}::test_followers_that_come_together_share_one_snapshot",
    ),
    Plant(
        "a tenant sees the events of others",
        "server/watching.py",
        "events=mine, namespaces=names",
        "namespaces=names",
        f"{WATCHING}::test_a_tenant_sees_its_own_in_snapshots_batches_and_what_it_missed",
    ),
    Plant(
        "a tenant's batches have the digests of all",
        "server/watching.py",
        "namespaces=names, digests={})",
        "namespaces=names)",
        f"{WATCHING}::test_a_tenant_sees_its_own_in_snapshots_batches_and_what_it_missed",
    ),
    Plant(
        "blocks without a parent are said to follow the one before",
        "kvcache/event_pages.py",
        'if cutter.is_inside else b""',
        'if piece.start else b""',
        f"{PAGES}::test_every_block_is_told_once_with_the_one_before_it",
    ),
    Plant(
        "a follower always asks for everything",
        "kvcache/following.py",
        "*self._index.cursor(self.node) or (0, 0)",
        "0, 0",
        f"{FOLLOWING}::test_a_new_node_is_asked_for_everything_and_later_for_what_came_behind",
    ),
    Plant(
        "a silent node is followed for ever",
        "kvcache/following.py",
        "silent + 1 if self._heard == heard else 0",
        "0",
        f"{FOLLOWING}::test_a_silent_node_is_left_after_three_beats",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "-"))
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
