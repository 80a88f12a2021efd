"""Bugs put into the registering of host memory: each must turn a named test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

OUTLET = "tests/device/test_outlet.py"
LOADING = "tests/device/test_loading.py"
PINNED = "tests/device/test_pinned.py"
HOST = "tests/kvcache/tiers/test_host_pins.py"
REGISTERED = "tests/kvcache/tiers/test_host_registered.py"
PLANE = "tests/kvcache/peers/test_plane.py"
NODE = "tests/server/test_pins.py"

PLANTS = (
    Plant(
        "punched under a pin",
        "kvcache/tiers/host.py",
        "                self._end_pins(arena)\n                self._punch(arena, arena.idle.pop())\n",
        "                arena.pins.clear()\n                self._punch(arena, arena.idle.pop())\n",
        f"{HOST}::test_whatever_happens",
    ),
    Plant(
        "memory is taken from who pins it first",
        "kvcache/tiers/host.py",
        "key=lambda each: len(each.pins) > 0)",
        "key=lambda each: len(each.pins) == 0)",
        f"{HOST}::test_memory_is_taken_where_nobody_pins_it",
    ),
    Plant(
        "pins are given while others may need the memory",
        "kvcache/tiers/host.py",
        "        return 0 if any(other.granted for other in others) else self._unit_bytes\n",
        "        return self._unit_bytes\n",
        f"{HOST}::test_who_is_alone_may_pin",
    ),
    Plant(
        "memory leaves before transports are told",
        "kvcache/tiers/host.py",
        "            self._registrar.forget(told)\n",
        "            del told\n",
        f"{REGISTERED}::test_whatever_happens",
    ),
    Plant(
        "a unit that comes back is not registered",
        "kvcache/tiers/host.py",
        "(told := arena.told.pop(unit, None))",
        "(told := arena.told.get(unit))",
        f"{REGISTERED}::test_a_unit_that_comes_back_is_registered_anew",
    ),
    Plant(
        "transports are told of no memory",
        "server/node.py",
        ", registrar=plane)",
        ")",
        f"{NODE}::test_transports_are_told_before_memory_leaves_its_arena",
    ),
    Plant(
        "a transport that is opened later knows what is gone",
        "kvcache/peers/plane.py",
        "        del self._memory[id(memory)]\n",
        "",
        f"{PLANE}::TestMemory::test_no_transport_knows_what_was_forgotten",
    ),
    Plant(
        "a connection goes on when its pin was ended",
        "server/session.py",
        "        self._is_cut = True\n        if self._transport is not None:\n"
        "            self._transport.abort()\n",
        "        self._is_cut = False\n",
        f"{NODE}::test_a_connection_is_ended_before_memory_leaves_its_arena",
    ),
    Plant(
        "a connection that has ended is pinned still",
        "server/node.py",
        "        self.core.host.unpin(identity.owner)\n",
        "",
        f"{NODE}::test_it_is_told_the_unit",
        waits=True,
    ),
    Plant(
        "unmapped before it is undone",
        "kvcache/device/pinned.py",
        "        with self._changed:\n            self._is_closed = True\n"
        "            self._changed.notify_all()\n",
        "        self._memory = None\n        with self._changed:\n            self._is_closed = True\n"
        "            self._changed.notify_all()\n",
        f"{PINNED}::test_a_connection_that_ends_while_it_is_registered",
        waits=True,
    ),
    Plant(
        "undone under a copy",
        "kvcache/device/pinned.py",
        "        return self._is_closed and not self._users\n",
        "        return self._is_closed\n",
        f"{PINNED}::test_a_connection_that_ends_while_a_copy_runs",
        waits=True,
    ),
    Plant(
        "never undone",
        "kvcache/device/pinned.py",
        "                self._changed.wait_for(self._may_undo)\n            self._undo()\n",
        "                self._changed.wait_for(self._may_undo)\n",
        f"{PINNED}::test_an_engine_over_a_node",
        waits=True,
    ),
    Plant(
        "a copy goes over the edge of what is registered",
        "kvcache/device/pinned.py",
        "        return list(block.split([end - start for start, end in pairwise(edges)]))\n",
        "        return [block]\n",
        f"{PINNED}::test_no_copy_crosses_an_edge",
    ),
    Plant(
        "memory is taken that the node has not given",
        "kvcache/device/pinned.py",
        "        yield from range(-(-start // piece_bytes), hole // piece_bytes)\n",
        "        yield from range(-(-start // piece_bytes), hole // piece_bytes + 2)\n",
        f"{PINNED}::test_what_has_memory_is_registered_and_nothing_else",
        waits=True,
    ),
    Plant(
        "a graph that the engine captures is ended by it",
        "kvcache/device/vmm.py",
        "        with self._current(ordinal), self._beside_captures():\n"
        '            self._call("cuMemHostRegister",',
        '        with self._current(ordinal):\n            self._call("cuMemHostRegister",',
        f"{PINNED}::test_what_is_copied_from_is_registered_next",
        waits=True,
    ),
    Plant(
        "scattered before it has come over the link",
        "kvcache/device/engine.py",
        "            here.after(behind)\n",
        "",
        f"{LOADING}::test_it_returns_when_the_last_copy_is_done",
        waits=True,
    ),
    Plant(
        "what is under way on the link runs on behind an error",
        "kvcache/device/line.py",
        "            self._is_over = self._have_ended(*self._beside, current)\n",
        "            self._is_over = self._have_ended(current)\n",
        f"{LOADING}::test_what_is_under_way_is_waited_for_when_it_fails",
        waits=True,
    ),
    Plant(
        "one part after the other",
        "kvcache/device/engine.py",
        "            if number + 1 < len(starts):\n                arrived = bring(number + 1)\n",
        "            if number:\n                behind = bring(number)\n",
        f"{LOADING}::test_one_that_comes_over_the_link_does_not_wait_for_the_one_before",
        waits=True,
    ),
    Plant(
        "a map is undone although a copy may run",
        "kvcache/device/pinned.py",
        "                self._users -= is_over()\n",
        "                self._users -= 1\n",
        f"{PINNED}::test_a_copy_that_may_still_run_keeps_the_map_for_good",
    ),
    Plant(
        "locked memory is used again although a copy into it has not ended",
        "kvcache/device/served.py",
        "        if self.is_stuck:\n            raise",
        "        if False:\n            raise",
        f"{OUTLET}::test_a_copy_that_comes_late_is_written_to_no_block",
    ),
    Plant(
        "what comes out of a GPU goes straight to the slots",
        "kvcache/device/served.py",
        "        return list(self._halves[number % 2][: sum(lengths)].split(lengths))\n",
        "        return [torch.frombuffer(each, dtype=torch.uint8) for each in part.targets]\n",
        f"{OUTLET}::test_a_copy_that_comes_late_is_written_to_no_block",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
