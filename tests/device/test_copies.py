"""Copies beside the engine: both orders of events, what is held until when, layers, steps."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch

from kvcache.device.copies import Step, copy_steps
from tests.device.rigs import BLOCK, DEVICES, PATIENCE_S, SLOTS, Make, Refusing, rigs, seeded, value_of

RACES = 150

make = pytest.fixture(rigs, name="make")


# --- orders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEVICES)
def test_compute_save_overwrite_finds_no_difference(make: Make, kind: str) -> None:
    rig = make(kind)
    for number in range(RACES):
        at = number % SLOTS
        rig.compute(0, number % 251)
        copy = rig.save(str(number), at, 0)
        rig.copies.hold(copy, rig.engine)
        rig.compute(0, 255)
        rig.until([copy])
        assert value_of(rig.slot(at)) == number % 251
    assert rig.ended == [(str(number), None) for number in range(RACES)]


@pytest.mark.parametrize("kind", DEVICES)
def test_many_saves_under_way_are_each_of_their_own_time(make: Make, kind: str) -> None:
    rig = make(kind)
    copies = []
    for number in range(SLOTS):
        rig.compute(0, number)
        copies.append(rig.save(str(number), number, 0))
        rig.copies.hold(copies[-1], rig.engine)
    rig.compute(0, 255)
    rig.until(copies)
    assert [value_of(rig.slot(number)) for number in range(SLOTS)] == list(range(SLOTS))


@pytest.mark.parametrize("kind", DEVICES)
def test_zero_load_compute_finds_no_difference(make: Make, kind: str) -> None:
    """What the engine did to its pages before does not wipe what is loaded; what it does after sees it."""
    rig = make(kind)
    seen = torch.zeros(RACES, BLOCK, dtype=torch.uint8, device=rig.slab.device)
    rig.settle()
    for number in range(RACES):
        at = number % SLOTS
        rig.slot(at).fill_(number % 251)
        rig.compute(at, 0)
        copy = rig.load(str(number), at, at)
        rig.copies.hold(copy, rig.engine)
        rig.engine.run(lambda number=number, at=at: _copy(seen[number], rig.page(at)))
        rig.until([copy])
    rig.finish()
    assert [value_of(row) for row in seen] == [number % 251 for number in range(RACES)]


def test_a_page_overwritten_without_hold_is_seen(make: Make) -> None:
    """That the races above could be lost: here the order is made."""
    rig = make()
    gate = rig.gate(rig.lane("save host"))
    rig.compute(0, 1)
    copy = rig.save("a", 0, 0)
    rig.compute(0, 2)
    rig.finish()
    gate.set()
    rig.until([copy])
    assert value_of(rig.slot(0)) == 2


def test_hold_makes_the_engine_wait_for_the_copy(make: Make) -> None:
    rig = make()
    gate = rig.gate(rig.lane("save host"))
    rig.compute(0, 1)
    copy = rig.save("a", 0, 0)
    rig.copies.hold(copy, rig.engine)
    rig.compute(0, 2)
    after = rig.engine.mark()
    assert not after.is_done()
    gate.set()
    assert after.wait(PATIENCE_S)
    rig.until([copy])
    assert value_of(rig.slot(0)) == 1


def test_a_copy_begins_after_what_the_engine_had_queued(make: Make) -> None:
    rig = make()
    gate = rig.gate(rig.engine)
    rig.compute(0, 1)
    copy = rig.save("a", 0, 0)
    other = rig.load("b", 1, 1)
    assert not copy.is_ended
    assert not other.is_ended
    gate.set()
    rig.until([copy, other])
    assert value_of(rig.slot(0)) == 1


def test_a_slot_is_held_until_the_copy_is_done(make: Make) -> None:
    """A lease ends in ``then``: however often it is asked, not before the event."""
    rig = make()
    gate = rig.gate(rig.lane("load host"))
    copy = rig.load("a", 0, 0)
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
    gate = rig.gate(rig.lane("save host"))
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


def test_layers_are_computed_while_the_next_is_loaded(make: Make) -> None:
    rig = make()
    rig.slot(0).fill_(7)
    first = rig.load("layer 0", 0, 0)
    gate = rig.gate(rig.lane("load host"))
    second = rig.load("layer 1", 1, 1)
    seen = torch.zeros(BLOCK, dtype=torch.uint8)
    rig.copies.hold(first, rig.engine)
    rig.engine.run(lambda: _copy(seen, rig.page(0)))
    rig.finish()
    assert value_of(seen) == 7
    rig.copies.pump()
    assert not second.is_ended
    gate.set()
    rig.until([second])


@pytest.mark.parametrize("kind", DEVICES)
def test_hits_in_the_slab_are_copies_within_the_device(make: Make, kind: str) -> None:
    rig = make(kind)
    whole = rig.slab.whole(rig.slab.ticket.incarnation)
    rig.compute(3, 5)
    into = copy_steps(whole, rig.pages, [(BLOCK, 3 * BLOCK, BLOCK)])
    saved = rig.copies.save("device", into, rig.engine, rig.then("in"))
    rig.until([saved])
    out = copy_steps(rig.pages, whole, [(4 * BLOCK, BLOCK, BLOCK)])
    loaded = rig.copies.load("device", out, rig.engine, rig.then("out"))
    rig.copies.hold(loaded, rig.engine)
    rig.until([loaded])
    rig.finish()
    assert value_of(rig.page(4).cpu()) == 5


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_steps_copy_their_ranges_and_nothing_else(seed: int) -> None:
    chance = seeded(seed)
    source = torch.tensor([chance.randrange(256) for _ in range(400)], dtype=torch.uint8)
    target = torch.full((400,), 0xA5, dtype=torch.uint8)
    wanted = target.clone()
    ranges, at = [], 0
    while at < 300:
        at += chance.choice([0, 0, chance.randrange(20)])
        length = chance.randrange(1, 40)
        out_of = chance.choice([at, chance.randrange(300)])
        ranges.append((at, out_of, length))
        wanted[at : at + length] = source[out_of : out_of + length]
        at += length
    steps = copy_steps(target, source, ranges, step_bytes=chance.choice([7, 64, 1000]))
    chance.shuffle(steps)
    for step in steps:
        step.work()
    assert torch.equal(target, wanted)
    assert sum(step.size_bytes for step in steps) == sum(length for _, _, length in ranges)


def test_neighbours_are_one_copy() -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    steps = copy_steps(memory, torch.ones(100, dtype=torch.uint8), [(0, 10, 20), (20, 30, 20), (60, 50, 5)])
    assert [step.size_bytes for step in steps] == [40, 5]


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
            if slot == their_slot:
                rig.until([copies[other]])
            elif page == their_page:
                rig.copies.hold(copies[other], rig.engine)
            if copies[other].is_ended:
                del busy[other]
        match chance.randrange(4):
            case 0:
                rig.compute(page, number % 251)
                pages[page] = number % 251
            case 1:
                copies[name] = rig.save(name, slot, page)
                busy[name], slots[slot] = (page, slot), pages[page]
            case 2:
                copies[name] = rig.load(name, slot, page)
                rig.copies.hold(copies[name], rig.engine)
                busy[name], pages[page] = (page, slot), slots[slot]
            case _:
                rig.clock.advance_ms(chance.randrange(3))
                rig.copies.pump()
        rig.copies.check()
    rig.until(list(copies.values()))
    rig.finish()
    assert sorted(name for name, _ in rig.ended) == sorted(copies)
    assert all(failure is None for _, failure in rig.ended)
    assert [value_of(rig.slot(at)) for at in range(SLOTS)] == slots
    assert [value_of(rig.page(at).cpu()) for at in range(SLOTS)] == pages


def _name(_: object) -> None:
    """Work that does nothing with what it names."""


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
