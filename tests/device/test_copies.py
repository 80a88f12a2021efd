"""Copies beside the engine: orders of events, what is kept until when, layers."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest

from kvcache.device.copies import Step, copying
from tests.device.rigs import BLOCK, DEVICES, SLOTS, Make, Refusing, rigs, seeded, value_of

RACES = 150

make = pytest.fixture(rigs, name="make")


# --- orders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEVICES)
def test_compute_save_overwrite_finds_no_difference(make: Make, kind: str) -> None:
    rig = make(kind)
    for number in range(RACES):
        at = number % SLOTS
        rig.compute(0, number % 251)
        rig.until([rig.save(str(number), at, 0)])
        rig.compute(0, 255)
        assert value_of(rig.slot(at)) == number % 251
    assert rig.ended == [(str(number), None) for number in range(RACES)]


@pytest.mark.parametrize("kind", DEVICES)
def test_many_saves_under_way_are_each_of_their_own_time(make: Make, kind: str) -> None:
    rig = make(kind)
    copies = []
    for number in range(SLOTS):
        rig.compute(number, number)
        copies.append(rig.save(str(number), number, number))
    rig.until(copies)
    assert [value_of(rig.slot(number)) for number in range(SLOTS)] == list(range(SLOTS))


def test_a_page_overwritten_before_its_copy_has_ended_is_seen(make: Make) -> None:
    """That the races above could be lost: here the order is made."""
    rig = make()
    gate = rig.gate(rig.lane("host"))
    rig.compute(0, 1)
    copy = rig.save("a", 0, 0)
    rig.compute(0, 2)
    rig.finish()
    gate.set()
    rig.until([copy])
    assert value_of(rig.slot(0)) == 2


def test_a_copy_begins_after_what_the_engine_had_queued(make: Make) -> None:
    rig = make()
    gate = rig.gate(rig.engine)
    rig.compute(0, 1)
    copy = rig.save("a", 0, 0)
    assert not copy.is_ended
    gate.set()
    rig.until([copy])
    assert value_of(rig.slot(0)) == 1


def test_a_slot_is_held_until_the_copy_is_done(make: Make) -> None:
    """A reservation ends in ``then``: however often it is asked, not before the event."""
    rig = make()
    gate = rig.gate(rig.lane("host"))
    copy = rig.save("a", 0, 0)
    for _ in range(100):
        rig.copies.pump()
        rig.copies.check()
    assert rig.ended == []
    assert rig.copies.inflight_bytes == BLOCK
    gate.set()
    rig.until([copy])
    rig.copies.pump()
    assert rig.ended == [("a", None)]
    assert rig.copies.inflight_bytes == 0


def test_what_steps_name_is_kept_until_then_and_no_longer(make: Make) -> None:
    rig = make()
    gate = rig.gate(rig.lane("host"))
    named = Refusing(rig.engine, 0)
    alive = weakref.ref(named)
    copy = rig.save("a", 0, 0, [Step(1, partial(_name, named))])
    del named
    assert alive() is not None
    gate.set()
    rig.until([copy])
    gc.collect()
    assert alive() is None


def test_layers_are_saved_while_the_next_computes(make: Make) -> None:
    rig = make()
    rig.compute(0, 1)
    first = rig.save("layer 0", 0, 0)
    gate = rig.gate(rig.engine)
    rig.compute(1, 2)
    second = rig.save("layer 1", 1, 1)
    rig.until([first])
    assert value_of(rig.slot(0)) == 1
    assert not second.is_ended
    gate.set()
    rig.until([second])


@pytest.mark.parametrize("kind", DEVICES)
def test_saves_into_the_slab_are_copies_within_the_device(make: Make, kind: str) -> None:
    rig = make(kind)
    whole = rig.slab.whole(rig.slab.ticket.incarnation)
    rig.compute(3, 5)
    slot = whole[BLOCK : 2 * BLOCK]
    rig.until(
        [rig.copies.save("device", [Step(BLOCK, copying(slot, rig.page(3)))], rig.engine, rig.then("a"))]
    )
    assert value_of(slot.cpu()) == 5


# --- a random caller ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("seed", range(8))
def test_a_random_caller(make: Make, kind: str, seed: int) -> None:
    """Pages and slots are each in one copy at a time or held; each copy ends once, with the right bytes."""
    rig, chance = make(kind, cap_bytes_s=1000 * BLOCK), seeded(seed)
    pages, slots = [0] * SLOTS, [0] * SLOTS
    busy: dict[str, tuple[int, int]] = {}
    copies = {}
    for number in range(200):
        name = str(number)
        page, slot = chance.randrange(SLOTS), chance.randrange(SLOTS)
        for other, (their_page, their_slot) in list(busy.items()):
            while not copies[other].is_ended and (slot == their_slot or page == their_page):
                rig.clock.advance_ms(1)
                rig.until([each for each in copies.values() if each.event is not None])
            if copies[other].is_ended:
                del busy[other]
        match chance.randrange(3):
            case 0:
                rig.compute(page, number % 251)
                pages[page] = number % 251
            case 1:
                copies[name] = rig.save(name, slot, page)
                busy[name], slots[slot] = (page, slot), pages[page]
            case _:
                rig.clock.advance_ms(chance.randrange(3))
                rig.copies.pump()
        rig.copies.check()
    rig.clock.advance_ms(1000)
    rig.until(list(copies.values()))
    rig.finish()
    assert sorted(name for name, _ in rig.ended) == sorted(copies)
    assert all(failure is None for _, failure in rig.ended)
    assert [value_of(rig.slot(at)) for at in range(SLOTS)] == slots
    assert [value_of(rig.page(at).cpu()) for at in range(SLOTS)] == pages


def _name(_: object) -> None:
    """Work that does nothing with what it names."""
