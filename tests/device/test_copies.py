"""Copies beside the engine: both orders of events, what is held until when, the cap, failures, layers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from kvcache.device.copies import Step, copy_steps
from kvcache.device.streams import Event, Stream
from kvcache.errors import Unavailable
from tests.device.rigs import BLOCK, DEVICES, PATIENCE_S, SLOTS, Rig, seeded, value_of

RACES = 150

Make = Callable[..., Rig]


@pytest.fixture
def make() -> Iterator[Make]:
    rigs: list[Rig] = []

    def build(kind: str = "cpu", **arguments: Any) -> Rig:
        rigs.append(Rig(kind, **arguments))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.copies.check()
        rig.close()


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


# --- the cap --------------------------------------------------------------------------------------


def test_saves_go_as_the_cap_lets_them(make: Make) -> None:
    rig = make(cap_bytes_s=1000 * BLOCK)  # One block a millisecond, ten saved up at most.
    copies = [rig.save(str(number), number, 0) for number in range(SLOTS)]
    assert sum(copy.event is not None for copy in copies) == 10
    for more in range(1, 6):
        rig.clock.advance_ms(1)
        rig.copies.pump()
        rig.copies.check()
        assert sum(copy.event is not None for copy in copies) == 10 + more
    rig.until(copies[:15])
    assert not copies[15].is_ended
    assert rig.copies.hurried_bytes == 0
    rig.clock.advance_ms(1)
    rig.until(copies)


def test_loads_are_not_held_by_the_cap(make: Make) -> None:
    rig = make(cap_bytes_s=1.0)
    saves = [rig.save(str(number), number, 0) for number in range(4)]
    load = rig.load("now", 0, 0)
    assert load.event is not None
    rig.until([load])
    assert sum(copy.event is None for copy in saves) == 3


def test_who_must_overwrite_hurries_the_save(make: Make) -> None:
    """Correctness never hangs on the cap."""
    rig = make(cap_bytes_s=1.0)
    rig.compute(0, 1)
    rig.save("first", 0, 0)
    late = rig.save("late", 1, 0)
    assert late.event is None
    rig.copies.hold(late, rig.engine)
    rig.compute(0, 2)
    assert rig.copies.hurried_bytes == BLOCK
    rig.until([late])
    assert value_of(rig.slot(1)) == 1


def test_a_save_of_many_steps_is_queued_in_parts(make: Make) -> None:
    rig = make(cap_bytes_s=100 * BLOCK)  # One block in ten milliseconds, one saved up.
    steps = copy_steps(rig.host, rig.pages, [(0, 0, 4 * BLOCK)], step_bytes=BLOCK)
    copy = rig.save("big", 0, 0, steps)
    for done in range(1, 4):
        assert len(copy.steps) == 4 - done
        rig.clock.advance_ms(10)
        rig.copies.pump()
    assert copy.event is not None
    rig.until([copy])


def test_too_much_under_way_is_refused(make: Make) -> None:
    rig = make(inflight_bytes_max=2 * BLOCK)
    gate = rig.gate(rig.lane("save host"))
    rig.save("a", 0, 0)
    rig.save("b", 1, 0)
    with pytest.raises(Unavailable, match="are under way, at most"):
        rig.save("c", 2, 0)
    gate.set()
    assert [name for name, _ in rig.ended] == []


# --- failures -------------------------------------------------------------------------------------


def _break() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def test_a_device_that_fails_is_lost_for_good(make: Make) -> None:
    rig = make(cap_bytes_s=1.0)
    gate = rig.gate(rig.lane("save host"))
    broken = rig.save("broken", 0, 0, [Step(BLOCK, _break)])
    rig.save("waits", 1, 0)
    gate.set()
    assert rig.copies.wait([broken], PATIENCE_S)
    assert [name for name, _ in rig.ended] == ["waits", "broken"]
    assert all(failure is not None and "illegal memory access" in failure.why for _, failure in rig.ended)
    assert rig.lost == ["CUDA error: an illegal memory access was encountered"]
    with pytest.raises(Unavailable, match="illegal"):
        rig.load("later", 0, 0)
    with pytest.raises(Unavailable, match="illegal"):
        rig.copies.hold(broken, rig.engine)
    with pytest.raises(Unavailable, match="illegal"):
        rig.slab.slots([0], BLOCK, rig.slab.ticket.incarnation)
    rig.copies.check()


class Refusing:
    """A stream that takes ``steps`` more, and then refuses as a device does that has no memory left."""

    def __init__(self, inner: Stream, steps: int, *, dead: bool = False) -> None:
        self._inner = inner
        self._steps = steps
        self._dead = dead

    def run(self, work: Callable[[], None]) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise Unavailable("unavailable", "the device failed under a copy", "out of memory")
        self._inner.run(work)

    def after(self, event: Event) -> None:
        self._inner.after(event)

    def mark(self) -> Event:
        if self._dead:
            raise Unavailable("unavailable", "the device failed under a copy", "it is gone")
        return self._inner.mark()


def test_a_load_that_is_refused_in_the_middle_is_waited_for(make: Make) -> None:
    """A part of it may still be written: the engine computes those pages anew, after it."""
    rig = make()
    rig.slot(0).fill_(9)
    rig.copies._lanes["load", "host"] = Refusing(rig.lane("load host"), 1)
    gate = rig.gate(rig.lane("load host")._inner)  # type: ignore[attr-defined]  # It is a Refusing.
    ranges = [(0, 0, BLOCK), (2 * BLOCK, 2 * BLOCK, BLOCK)]
    copy = rig.copies.load("host", copy_steps(rig.pages, rig.host, ranges), rig.engine, rig.then("a"))
    with pytest.raises(Unavailable, match="out of memory"):
        rig.copies.hold(copy, rig.engine)
    rig.compute(0, 3)
    rig.copies.pump()
    assert rig.ended == []
    gate.set()
    rig.finish()
    rig.until([copy])
    assert value_of(rig.page(0)) == 3
    assert [(name, failure is None) for name, failure in rig.ended] == [("a", False)]
    assert rig.lost == [], "one copy failed, not the device"
    rig.until([rig.save("b", 0, 0)])


@pytest.mark.parametrize("steps", [0, 1])
def test_a_device_that_takes_no_event_is_lost(make: Make, steps: int) -> None:
    rig = make()
    rig.copies._lanes["save", "host"] = Refusing(rig.lane("save host"), steps, dead=True)
    copy = rig.save("a", 0, 0)
    assert copy.is_ended
    assert [(name, failure is None) for name, failure in rig.ended] == [("a", False)]
    assert rig.lost
    with pytest.raises(Unavailable):
        rig.save("b", 0, 0)


def test_an_engine_stream_that_is_gone_is_lost(make: Make) -> None:
    rig = make()
    rig.engine = Refusing(rig.engine, 0, dead=True)
    with pytest.raises(Unavailable, match="failed under a copy"):
        rig.save("a", 0, 0)
    assert rig.lost == ["it is gone"]
    assert rig.ended == []


def test_close_leaves_what_hangs_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its slots are never used again: ``then`` is not called."""
    rig = make()
    monkeypatch.setattr(rig.streams, "close", lambda: None)
    gate = rig.gate(rig.lane("save host"))
    done = rig.load("done", 0, 0)
    rig.save("hangs", 0, 0)
    assert done.event is not None
    assert done.event.wait(PATIENCE_S)
    assert rig.copies.close(0.0) == 1
    assert rig.ended == [("done", None)]
    with pytest.raises(Unavailable, match="closed"):
        rig.save("late", 0, 0)
    gate.set()
    assert rig.copies.close(PATIENCE_S) == 0
    assert rig.ended[1:] == [("hangs", None)]


def test_close_ends_what_was_not_begun(make: Make) -> None:
    rig = make(cap_bytes_s=1.0)
    for number in range(3):
        rig.save(str(number), number, 0)
    assert rig.copies.close(PATIENCE_S) == 0
    assert sorted((name, failure is None) for name, failure in rig.ended) == [
        ("0", True),
        ("1", False),
        ("2", False),
    ]


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
