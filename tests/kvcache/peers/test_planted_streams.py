"""Bugs of streams and pushes put in on purpose, as in ``test_planted_bugs``: each must turn a test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

RECEIVE = "tests/kvcache/peers/test_receive.py"
PUSH = "tests/kvcache/peers/test_push.py"
SLOTS = "tests/kvcache/peers/test_push_slots.py"
STREAMS = "tests/server/test_streams.py"
HELD = "tests/server/test_streams_held.py"

PLANTS = (
    Plant(
        "slots are free while a follower may read them",
        "server/writing.py",
        "        await self._core.uses.stop(reservation_id)\n        return self._abort(",
        "        return self._abort(",
        f"{HELD}::TestHeldForTheFollower::test_an_abort_ends_it_first",
        waits=True,
    ),
    Plant(
        "what a follower reads is not held after the commit",
        "server/lent.py",
        "        self._lease_id = lease.lease_id\n        if len(lease.keys)",
        "        self._core.ledger.release(lease.lease_id, OWNER, 0)\n        if len(lease.keys)",
        f"{HELD}::TestHeldForTheFollower::test_after_a_commit_by_a_lease_until_he_asks_again",
    ),
    Plant(
        "a ticket outlives the Follow after it",
        "server/streams.py",
        "            await self._lent.stop()\n",
        "            pass\n",
        f"{HELD}::TestHeldForTheFollower::test_a_ticket_of_before_is_no_good",
    ),
    Plant(
        "what is cut off is lent on",
        "server/writing.py",
        "        return before is not None and not",
        "        return False and not",
        f"{HELD}::TestHeldForTheFollower::test_a_parent_that_was_lost",
        waits=True,
    ),
    Plant(
        "another block of the same name goes on with a run",
        "server/streams.py",
        "        if lease.generations != run.generations:\n",
        "        if len(lease.keys) != len(run.keys):\n",
        f"{STREAMS}::TestFollow::test_other_blocks_of_the_same_name_are_not_mixed_in",
    ),
    Plant(
        "a commit need not keep what was promised",
        "server/writing.py",
        "        self._check_promised(reservation, sums)\n",
        "",
        f"{STREAMS}::TestAdvance::test_a_commit_says_what_was_promised",
    ),
    Plant(
        "planes that did not come over the wire advance",
        "server/streams.py",
        "        if wired and self._written.missing(",
        "        if False and self._written.missing(",
        f"{STREAMS}::TestAdvance::test_what_came_over_the_wire_advances_as_far_as_it_was_written",
    ),
    Plant(
        "planes are lent in another order",
        "server/streams.py",
        "        start, stop = plane * spec.plane_bytes, (plane + planes) * spec.plane_bytes\n",
        "        start, stop = (end - planes - plane) * spec.plane_bytes, (end - plane) * spec.plane_bytes\n",
        f"{STREAMS}::TestFollow::test_planes_are_read_as_they_are_written",
    ),
    Plant(
        "planes are put in another order",
        "kvcache/peers/receive.py",
        "                views = [block[plane * spec.plane_bytes : end * spec.plane_bytes]",
        "                views = [block[: (end - plane) * spec.plane_bytes]",
        f"{RECEIVE}::TestItComes::test_all_but_the_last_plane_are_here_before_the_commit",
    ),
    Plant(
        "committed before the last plane is verified",
        "kvcache/peers/receive.py",
        "                    await verifying\n                    return told\n",
        "                    return told\n",
        f"{RECEIVE}::TestItFails::test_the_sums_of_a_plane_are_wrong",
    ),
    Plant(
        "only the last plane is verified",
        "kvcache/peers/receive.py",
        "                if verifying is not None:\n                    await verifying\n",
        "",
        f"{RECEIVE}::TestItFails::test_the_sums_of_a_plane_are_wrong",
    ),
    Plant(
        "committed before all planes are here",
        "kvcache/peers/receive.py",
        "                if plane == spec.plane_count:\n",
        "                if plane >= spec.plane_count - 1:\n",
        f"{RECEIVE}::TestItComes::test_all_but_the_last_plane_are_here_before_the_commit",
    ),
    Plant(
        "a run that failed keeps its slots",
        "kvcache/peers/receive.py",
        "            if not done:\n",
        "            if False:\n",
        f"{RECEIVE}::TestItFails::test_the_writer_aborts",
        waits=True,
    ),
    Plant(
        "each who asks has a stream of his own",
        "kvcache/peers/receive.py",
        "        self._coming.update(dict.fromkeys(mine, flight))\n",
        "        self._coming.update({mine[-1]: flight})\n",
        f"{RECEIVE}::TestItIsShared::test_ten_who_ask_cause_one_stream",
        waits=True,
    ),
    Plant(
        "who waits for part waits for all",
        "kvcache/peers/receive.py",
        "                del self._coming[key]\n        flight.tell()\n\n",
        "                pass\n\n",
        f"{RECEIVE}::TestItIsShared::test_who_wants_less_goes_when_that_is_here",
        waits=True,
    ),
    Plant(
        "the last ticket is kept when all has come",
        "kvcache/peers/receive.py",
        "            await stream.end()\n",
        "",
        f"{RECEIVE}::TestItComes::test_it_is_had_here_when_the_last_plane_is",
        waits=True,
    ),
    Plant(
        "an abort does not wait for a push",
        "kvcache/peers/push.py",
        "            await asyncio.wait([self.task])\n",
        "            await asyncio.sleep(0)\n",
        f"{SLOTS}::TestTheWriterHere::test_an_abort_waits_until_its_slots_are_not_read",
    ),
    Plant(
        "what is pushed is not held after the commit",
        "kvcache/peers/push.py",
        "        self._lease_id = lease.lease_id\n",
        "        here.ledger.release(lease.lease_id, OWNER, 0)\n",
        f"{SLOTS}::TestTheWriterHere::test_a_commit_does_not_wait",
        waits=True,
    ),
    Plant(
        "a push is published before its writer has committed",
        "kvcache/peers/push.py",
        "        await push.beyond(plane)\n        await outlet.commit(reserved, push.sums[mine])\n",
        "        from kvcache.sums import sum_chunks\n"
        "        sums = [sum_chunks([block], spec.chunk_bytes) for block in blocks]\n"
        "        await outlet.commit(reserved, sums)\n",
        f"{PUSH}::TestItComes::test_it_is_published_when_it_is_committed_at_its_writer",
    ),
    Plant(
        "what comes before is not copied",
        "kvcache/peers/push.py",
        '            if error.reason != "parent" or not path:\n',
        "            if True:\n",
        f"{PUSH}::TestItComes::test_what_comes_before_it_is_copied_first",
        waits=True,
    ),
    Plant(
        "a push that ended is waited for",
        "server/arriving.py",
        "        self._keys.difference_update(keys)\n",
        "",
        f"{PUSH}::TestWhoWaits::test_an_abort_wakes_them",
        waits=True,
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "-"))
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
