"""Blocks from a device by themselves, plane by plane."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvcache.client import hbm_layered
from kvcache.client.store import NO_HINTS, SaveHints
from kvcache.errors import BadInput
from kvcache.sums import sum_chunks
from kvcache.testing.stores import PLANE, SPEC
from kvcache.wire import HBM, HOST, Abort, Commit, Reserve
from tests.client.hbm_script import COUNT, Blocks, Rig, counted
from tests.client.script import Cancelled


def begun(rig: Rig, hints: SaveHints = NO_HINTS) -> hbm_layered.Draft:
    blocks = Blocks(rig.device, COUNT)
    for place, content in zip(blocks.places, rig.content, strict=True):
        place[:] = content
    operation = hbm_layered.begin(rig.context, rig.handle, rig.names, blocks, b"", hints)
    return rig.drive(operation)


def advanced(rig: Rig, draft: hbm_layered.Draft, planes: int) -> None:
    rig.drive(hbm_layered.advance(rig.context, draft, planes))


def finished(rig: Rig, draft: hbm_layered.Draft, cancel_at: int = -1) -> int:
    return rig.drive(hbm_layered.finish(rig.context, draft), cancel_at)


def reserved(rig: Rig) -> list[str]:
    return [each.tier for each in rig.asked if isinstance(each, Reserve)]


def test_planes_go_into_hbm_and_are_published_at_the_end() -> None:
    rig = Rig()
    rig.empty()
    draft = begun(rig)
    advanced(rig, draft, 1)
    [going] = rig.device.going
    assert going.ready == 1
    assert not any(isinstance(each, Commit) for each in rig.asked)
    assert finished(rig, draft) == COUNT
    assert rig.device.memory[PLANE * SPEC.plane_count : COUNT * PLANE * SPEC.plane_count] == b"".join(
        rig.content[1:]
    )
    assert rig.asked[-1] == Commit(7, sum_chunks(rig.content[1:], SPEC.chunk_bytes), HBM)
    assert going.ended
    assert counted(rig.context, "streamed_blocks") == COUNT - 1
    assert not rig.context.link._writings


@pytest.mark.parametrize("hot", [0, 3])
def test_planes_that_are_ready_nobody_knows_when_are_read_by_nobody(hot: int) -> None:
    rig = Rig(hot)
    rig.empty()
    draft = begun(rig)
    assert isinstance(draft.blocks, Blocks)
    draft.blocks.is_placed = False
    advanced(rig, draft, 1)
    assert finished(rig, draft) == 0
    assert not any(isinstance(each, Commit) for each in rig.asked)
    assert all(going.ended and not going.planes for going in rig.device.going)


def test_without_a_slab_they_go_into_host_memory() -> None:
    rig = Rig(on_device=False)
    rig.empty()
    draft = begun(rig)
    advanced(rig, draft, 1)
    assert finished(rig, draft) == COUNT
    assert rig.below_bytes()[PLANE * SPEC.plane_count :] == b"".join(rig.content[1:])
    assert reserved(rig) == [HOST]


def test_what_is_wanted_below_goes_there() -> None:
    rig = Rig()
    draft = begun(rig, SaveHints(below=True))
    assert reserved(rig) == [HOST]
    assert finished(rig, draft) == COUNT


def test_hbm_that_takes_a_part_of_them_takes_none_yet() -> None:
    """All of them go to host memory as they are computed, and HBM takes what it can."""
    rig = Rig()
    rig.room = 3
    draft = begun(rig)
    assert reserved(rig) == [HBM, HOST]
    assert Abort(7, HBM) in rig.asked
    advanced(rig, draft, 1)
    assert finished(rig, draft) == COUNT


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rig: setattr(rig.context.link, "slab", None),
        lambda rig: setattr(rig, "mapped", False),
        lambda rig: rig.refuses.update({HOST: BadInput("bad_prefix", "no parent", "")}),
    ],
    ids=["no map", "not in the map", "refused"],
)
def test_with_nothing_reserved_all_is_saved_at_the_end(spoil: Callable[[Rig], None]) -> None:
    rig = Rig(on_device=False)
    spoil(rig)
    draft = begun(rig)
    assert not rig.device.going
    advanced(rig, draft, 1)
    rig.refuses.clear()
    assert finished(rig, draft) == COUNT


def test_a_device_that_fails_under_way_costs_the_head_start() -> None:
    rig = Rig()
    draft = begun(rig)
    rig.device.failing = 1
    assert finished(rig, draft) == COUNT
    assert Abort(7, HBM) in rig.asked
    assert all(going.ended for going in rig.device.going)


def test_what_the_link_gives_wrong_is_never_committed() -> None:
    rig = Rig(on_device=False)
    rig.device.flips = True
    draft = begun(rig)
    assert finished(rig, draft) == 1, "what was held"
    assert not any(isinstance(each, Commit) for each in rig.asked)
    assert counted(rig.context, "failed_copies") == 2, "once more, in one piece"


def test_nothing_is_given_back_before_its_copies_have_ended() -> None:
    rig = Rig()
    draft = begun(rig)
    [going] = rig.device.going
    ended: list[bool] = []
    answer = rig.answer
    rig.answer = lambda request: (ended.append(going.ended), answer(request))[1]  # type: ignore
    rig.drive(hbm_layered.abort(rig.context, draft))
    assert rig.asked[-1] == Abort(7, HBM)
    assert ended == [True]
    rig.drive(hbm_layered.abort(rig.context, draft))
    with pytest.raises(BadInput, match="has ended"):
        finished(rig, draft)


def test_a_connection_that_is_lost_ends_them_first() -> None:
    """Only then may a new one say that nothing is written any more."""
    rig = Rig()
    draft = begun(rig)
    [going] = rig.device.going
    rig.context.link.end_writings()
    assert going.ended
    assert not draft.ended
    rig.context.link.close()


def test_a_draft_of_a_connection_before_is_saved_anew() -> None:
    rig = Rig()
    draft = begun(rig)
    rig.context.link.end_writings()
    rig.context.link.number += 1
    advanced(rig, draft, 1)
    assert finished(rig, draft) == COUNT
    assert len(rig.device.going) == 2


@pytest.mark.parametrize("planes", [-1, 0, SPEC.plane_count + 1])
def test_planes_only_become_more(planes: int) -> None:
    rig = Rig()
    draft = begun(rig)
    advanced(rig, draft, 1)
    with pytest.raises(BadInput, match="only become more"):
        advanced(rig, draft, planes)


def test_a_caller_that_is_cancelled_leaves_nothing_behind() -> None:
    """At every step of the end."""
    for step in range(1, 20):
        rig = Rig()
        draft = begun(rig)
        try:
            finished(rig, draft, cancel_at=step)
        except Cancelled:
            assert all(going.ended for going in rig.device.going)
            assert isinstance(rig.asked[-1], Abort | Commit)
            continue
        break
    assert step > 2


def test_a_connection_whose_end_is_interrupted_waits_for_its_copies_all_the_same() -> None:
    rig = Rig()
    rig.empty()
    begun(rig)
    rig.device.interrupts = 2
    with pytest.raises(KeyboardInterrupt):
        rig.context.link.end_writings()
    assert all(going.ended for going in rig.device.going)


@pytest.mark.parametrize("ending", [False, True])
def test_one_that_is_cancelled_while_it_begins_or_is_given_up_leaves_nothing_behind(ending: bool) -> None:
    """At every step: what was reserved is given back, and only when its copies have ended."""
    for cancel_at in range(1, 20):
        rig = Rig()
        blocks = Blocks(rig.device, COUNT)
        draft: hbm_layered.Draft | None = None
        try:
            operation = hbm_layered.begin(rig.context, rig.handle, rig.names, blocks, b"", NO_HINTS)
            draft = rig.drive(operation, -1 if ending else cancel_at)
            rig.drive(hbm_layered.abort(rig.context, draft), cancel_at if ending else -1)
            assert rig.asked[-1] == Abort(7, HBM)
            break
        except Cancelled:
            assert rig.asked[-1] == Abort(7, HBM)
            assert all(going.ended for going in rig.device.going)
    assert cancel_at > 1
