"""Bugs of saves layer by layer put in on purpose, as in ``test_planted_bugs``: each must turn a test red."""

from __future__ import annotations

import pytest

from tests.planting import Garden, Plant
from tests.planting import garden as garden

LAYERED = "tests/client/test_layered.py"
CONNECTORS = "tests/client/connectors"
STREAM = f"{CONNECTORS}/test_vllm_stream.py"
DECODE = f"{CONNECTORS}/test_vllm_handoff.py::TestDecode"

PLANTS = (
    Plant(
        "a plane is copied before it is computed",
        "client/layered.py",
        "            yield from _tell(context, draft, Advance(reserved.reservation, planes, sums))\n",
        "            yield from _tell(context, draft, Advance(reserved.reservation, planes, sums))\n"
        "        yield from _copied(context, draft, reserved, spec.plane_count)\n",
        f"{LAYERED}::test_what_was_not_told_is_copied_at_the_end",
    ),
    Plant(
        "what another connection reserved is written to",
        "client/layered.py",
        "    if draft.connection != context.link.number:\n",
        "    if False:\n",
        f"{LAYERED}::test_a_reservation_of_an_earlier_connection_is_never_written_to",
    ),
    Plant(
        "slots of a cancelled save are kept",
        "client/layered.py",
        "        draft.reserved = None\n"
        "        yield from operations.abort(reserved.reservation)\n"
        "        raise\n",
        "        raise\n",
        f"{LAYERED}::test_a_cancelled_advance_gives_the_slots_back",
    ),
    Plant(
        "sums of copies are joined as they came",
        "client/layered.py",
        '    return b"".join(\n        sums[',
        '    return b"".join(draft.sums) or b"".join(\n        sums[',
        f"{LAYERED}::test_what_is_told_are_the_sums_of_the_new_planes_of_each_block",
    ),
    Plant(
        "a step that failed is published",
        "client/connectors/vllm_worker.py",
        "                if computed:\n",
        "                if True:\n",
        f"{STREAM}::test_a_step_that_fails_publishes_nothing",
        waits=True,
    ),
    Plant(
        "slots of a save that ended are kept",
        "client/connectors/vllm_worker.py",
        "            if job.streams:\n                self._dropped.append(job)\n",
        "",
        f"{STREAM}::test_a_step_that_fails_publishes_nothing",
        waits=True,
    ),
    Plant(
        "pages are given away while a layer of them is copied",
        "client/connectors/vllm_worker.py",
        "queued.job if queued is not None else streaming[0] if streaming else None",
        "queued.job if queued is not None else None",
        f"{STREAM}::test_pages_that_are_taken_are_not_read_any_more",
    ),
    Plant(
        "a save begins before its parents are saved",
        "client/connectors/vllm_worker.py",
        "self._loads or self._saves or self._dropped or self._connecting or self._closing):\n"
        "                if streaming := self._due():\n",
        "self._loads or self._dropped or self._connecting or self._closing):\n"
        "                if (streaming := self._due()) or self._saves:\n",
        f"{STREAM}::test_saves_of_earlier_steps_go_first",
        waits=True,
    ),
    Plant(
        "a part is taken while the rest is coming",
        "client/connectors/vllm_scheduler.py",
        "        if coming and state.wait.asks_again(",
        "        if coming and not held and state.wait.asks_again(",
        f"{DECODE}::test_it_does_not_start_with_a_part_while_the_rest_is_coming",
    ),
    Plant(
        "a promise is waited for as long as what is coming",
        "client/connectors/vllm_request.py",
        "self.promise_ns if promised else self.most_ns",
        "self.most_ns",
        f"{DECODE}::test_a_promise_alone_is_not_waited_for_long",
    ),
    Plant(
        "parts of another version are read",
        "client/connectors/handoff.py",
        "    if type(version) is int and version != VERSION:\n",
        "    if False:\n",
        f"{CONNECTORS}/test_handoff.py::test_what_is_not_understood_is_ignored",
    ),
)


@pytest.mark.slow
def test_without_a_plant_all_is_green(garden: Garden) -> None:
    garden.check_control()


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name.replace(" ", "-"))
def test_it_is_caught(garden: Garden, plant: Plant) -> None:
    garden.check_caught(plant)
