"""Bugs that only a failing network or peer shows, put in on purpose: each must turn a named test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

pytestmark = pytest.mark.timed

PARTITION = "tests/netfaults/test_network.py::TestTcp::test_a_partition[both ways]"
SLOW = "tests/netfaults/test_network.py::TestTcp::test_a_slow_wire"
GIVER = "tests/netfaults/test_nodes.py::test_the_giver_dies"
TAKER = "tests/netfaults/test_nodes.py::test_the_taker_stands_still"

PLANTS = (
    Plant(
        "a silence is not noticed",
        "kvcache/transport/pulse.py",
        "        if now_ns - self._heard_ns >= self._limits.silence_ns:\n",
        "        if False:\n",
        PARTITION,
    ),
    Plant(
        "a read that was late is written to later",
        "kvcache/transport/tcp_endpoint.py",
        "            incoming.stream.let_go(*name)\n",
        "            pass\n",
        SLOW,
    ),
    Plant(
        "a transfer that was cut short is whole",
        "kvcache/transport/tcp_stream.py",
        "        self._views_bytes -= end_bytes\n        self._chunk = None\n",
        "        end = frame(END_OF[outgoing.kind], outgoing.transfer)\n"
        "        self._views.append(memoryview(end)[:end_bytes])\n"
        "        self._chunk = None\n",
        "tests/transport/test_tcp_wire.py::test_an_export_that_is_withdrawn_in_its_last_chunk_is_not_whole",
    ),
    Plant(
        "slots of a fetch that failed stay reserved",
        "kvcache/peers/fetch.py",
        "        if count < len(reservation.keys):\n",
        "        if 0 < count < len(reservation.keys):\n",
        GIVER,
    ),
    Plant(
        "a ticket lasts for as long as its taker likes",
        "server/tickets.py",
        "each.until_ns <= now_ns and each.ending is None]",
        "False]",
        TAKER,
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "-"))
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
