"""Bugs of tickets put in on purpose, as in ``test_planted_bugs``: each must turn a named test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

EXPORTS = "tests/server/test_exports.py"
POSTS = "tests/server/test_posts.py"
RANDOM = "tests/server/test_exports_random.py::test_long_days"

PLANTS = (
    Plant(
        "blocks are let go before their ticket is withdrawn",
        "server/tickets.py",
        "        await self._out[issued].withdraw(issued.ticket)\n",
        "        issued.over()\n"
        "        issued.over = lambda: None\n"
        "        await self._out[issued].withdraw(issued.ticket)\n",
        RANDOM,
    ),
    Plant(
        "a ticket is over without being withdrawn",
        "server/tickets.py",
        "        await self._out[issued].withdraw(issued.ticket)\n",
        "",
        RANDOM,
    ),
    Plant(
        "an exported block is not held",
        "server/exports.py",
        "        same = (held",
        "        self._let_go(held)\n        same = (held",
        RANDOM,
    ),
    Plant(
        "released without a withdrawal",
        "server/reading.py",
        "            if self._exports.is_exported(request.lease):\n",
        "            if False:\n",
        f"{EXPORTS}::TestExport::test_released_it_is_good_no_more",
    ),
    Plant(
        "summed while a peer may still write",
        "server/writing.py",
        "        await self._exports.stop_posts(reservation.reservation_id)\n",
        "",
        RANDOM,
    ),
    Plant(
        "aborted while a peer may still write",
        "server/writing.py",
        "        if self._core.uses.any(request.reservation):\n",
        "        if False:\n",
        RANDOM,
    ),
    Plant(
        "a connection's end frees slots that a peer may still write",
        "server/handlers.py",
        "        no_copies = not self._identity.mapped and not used\n",
        "        no_copies = not self._identity.mapped\n",
        RANDOM,
    ),
    Plant(
        "the end of a process frees slots that a peer may still write",
        "server/uses.py",
        "        if owner in self._leaving:\n",
        "        if False:\n",
        RANDOM,
    ),
    Plant(
        "the end of tickets frees slots that a process may still write",
        "server/uses.py",
        "        if owner in self._written:\n",
        "        if True:\n",
        f"{POSTS}::TestPost::test_slots_of_a_mapped_writer_wait_for_his_copies_too",
    ),
    Plant(
        "tickets outlive their connection",
        "server/handlers.py",
        "        self._core.tickets.leave(self._identity.owner)\n",
        "",
        f"{EXPORTS}::TestExport::test_a_connection_that_ends_ends_its_tickets",
        waits=True,
    ),
    Plant(
        "tickets outlive their time",
        "server/tickets.py",
        "        for issued in [each for each in self._out if each.until_ns <= now_ns",
        "        for issued in [each for each in self._out if each.until_ns < 0",
        f"{POSTS}::TestPost::test_a_ticket_has_its_time",
        waits=True,
    ),
    Plant(
        "a block written anew is given out for the one that was leased",
        "server/exports.py",
        "        if not same or lease",
        "        if lease",
        f"{EXPORTS}::TestExport::test_a_block_that_was_written_anew",
    ),
    Plant(
        "half a block counts as written",
        "server/written.py",
        "            of[at] |= bits\n",
        "            of[at] |= ~0 >> 1 if bits else 0\n",
        f"{POSTS}::TestPost::test_commit_waits_for_every_plane",
    ),
    Plant(
        "any bytes of a plane can be had, verified or not",
        "server/exports.py",
        " or not whole_chunks:\n",
        ":\n",
        f"{EXPORTS}::TestExport::test_what_is_no_part_of_a_block",
    ),
    Plant(
        "a line is closed under who reads by it",
        "kvcache/peers/plane.py",
        "        return self._call_count == 0 and self.connecting.done()\n",
        "        return self.connecting.done()\n",
        "tests/kvcache/peers/test_plane.py::TestEndpoints::test_one_in_use_is_not_idle",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "-"))
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
