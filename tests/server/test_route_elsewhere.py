"""A router whose index runs elsewhere chooses as one that has it, and goes on when it is gone."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvcache.address import parse
from kvcache.client.router import Routed, Router
from kvcache.credentials import Credentials
from kvcache.fleet import Fleet, Worker
from kvcache.locator import Locator
from kvcache.routing.views import REFRESH_NS, LocatorView
from kvcache.routing.weights import Weights
from kvcache.sequence import sequence_hashes
from kvcache.server.locate_answers import IndexAnswers
from kvcache.server.locate_frames import LocateFrames
from tests.kvcache.routing.fleet_double import ENGINE, NODE, TOKENS, S, Told, engine, fleet
from tests.server.locate_double import Locators


@dataclass
class Clock:
    ns: int = 10 * S

    def now_ns(self) -> int:
        return self.ns


@dataclass
class Elsewhere:
    """An index, and its look-up service on a socket."""

    folder: Path
    told: Told = field(default_factory=Told)
    clock: Clock = field(default_factory=Clock)
    workers: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        answers = IndexAnswers(self.told.index, self.clock, lambda _: self.workers)
        self.frames = LocateFrames(answers, Credentials.default())
        self.address = self.frames.listen(parse(str(self.folder / "index.sock")))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    running = Elsewhere(tmp_path)
    yield running
    running.frames.close()


@pytest.fixture
def locate() -> Iterator[Locators]:
    made = Locators()
    yield made
    made.close()


def weighed(routed: Routed) -> list[tuple[str, tuple[int, int, int], int, bool, int]]:
    """What a choice was made of, but for ages."""
    return [
        (each.worker, each.cached, each.placed, each.suspect, each.running)
        for each in routed.choice.candidates
    ]


def routers(here: Elsewhere, locator: Locator, workers: Fleet) -> tuple[Router, Router]:
    weights = Weights(running=0)
    near = Router(workers, here.told.index, weights, clock=here.clock)
    return near, Router(workers, locator, weights, clock=here.clock)


def test_both_see_the_same(elsewhere: Elsewhere, locate: Locators) -> None:
    told, now_ns = elsewhere.told, elsewhere.clock.ns
    told.holds(engine("a"), ENGINE, 8, now_ns=now_ns, load={"requests_running": 3.0})
    told.holds("node-a", NODE, 12, "host", now_ns=now_ns)
    told.holds(engine("b"), ENGINE, 9, now_ns=now_ns)
    told.starts("node-b", NODE, now_ns=now_ns)
    told.index.suspect(engine("b"))
    near, far = routers(elsewhere, locate(elsewhere.address), fleet("a", "b", node=True))
    first = near.choose("m", TOKENS)
    assert first.worker.name == "a" and not first.choice.blind
    # Both told the index of their choices: from then on it knows all that there is to know.
    for _ in range(2):
        here, there = near.choose("m", TOKENS), far.choose("m", TOKENS)
        assert weighed(here) == weighed(there) and here.notes == there.notes
    assert weighed(there) == [
        ("a", (128, 64, 0), 128, False, 3),
        ("b", (144, 0, 0), 0, True, 0),
    ]


def test_a_workers_node_is_known_by_what_the_index_says(elsewhere: Elsewhere, locate: Locators) -> None:
    """The router need not reach the node to know which source it is."""
    elsewhere.told.holds("node-7", NODE, 5, "host", now_ns=elsewhere.clock.ns)
    elsewhere.workers["a"] = ["node-7"]
    workers = Fleet.of([Worker(name="a", model="m", node="tcp://10.0.0.2:8211")])
    _, far = routers(elsewhere, locate(elsewhere.address), workers)
    assert weighed(far.choose("m", TOKENS)) == [("a", (0, 80, 0), 0, False, 0)]


def test_what_comes_later_is_seen_and_an_index_that_goes_is_missed(
    elsewhere: Elsewhere, locate: Locators
) -> None:
    told, clock = elsewhere.told, elsewhere.clock
    told.starts(engine("a"), ENGINE, now_ns=clock.ns)
    locator = locate(elsewhere.address, clock=clock)
    far = Router(fleet("a", "b"), locator, clock=clock)
    assert far.choose("m", TOKENS).notes == ("the index knows nothing of b",)
    told.holds(engine("b"), ENGINE, 20, now_ns=clock.ns)
    clock.ns += REFRESH_NS
    routed = far.choose("m", TOKENS)
    assert routed.notes == () and weighed(routed)[1][1] == (320, 0, 0)
    elsewhere.frames.close()
    for _ in range(2):
        clock.ns += REFRESH_NS
        gone = far.choose("m", TOKENS)
        assert gone.choice.blind and "without an index: " in gone.why


def test_who_operates_the_router_is_told_that_the_index_is_gone(
    elsewhere: Elsewhere, locate: Locators, tmp_path: Path
) -> None:
    """Also when no request has asked it."""
    clock = elsewhere.clock
    view = LocatorView(locate(elsewhere.address, clock=clock), clock)
    assert view.troubles() == []
    elsewhere.frames.close()
    clock.ns += REFRESH_NS
    [said] = view.troubles()
    assert "without the index at unix://" in said and "unavailable" in said
    again = Elsewhere(tmp_path)
    clock.ns += 2 * S
    assert view.troubles() == []
    again.frames.close()


def test_an_index_that_began_anew_numbers_its_sources_anew(
    elsewhere: Elsewhere, locate: Locators, tmp_path: Path
) -> None:
    """It counts epochs and sources from the start: as many of them, and other ones."""
    elsewhere.told.holds(engine("a"), ENGINE, 3, now_ns=elsewhere.clock.ns)
    elsewhere.told.holds(engine("b"), ENGINE, 9, now_ns=elsewhere.clock.ns)
    locator = locate(elsewhere.address)
    hints = sequence_hashes(array("I", TOKENS), 16)
    assert held(locator, hints) == {engine("a"): 3, engine("b"): 9}
    elsewhere.frames.close()
    again = Elsewhere(tmp_path)
    again.told.holds(engine("b"), ENGINE, 9, now_ns=again.clock.ns)
    again.told.holds(engine("a"), ENGINE, 3, now_ns=again.clock.ns)
    assert again.address == elsewhere.address
    assert held(locator, hints) == {engine("a"): 3, engine("b"): 9}
    again.frames.close()


def held(locator: Locator, hints: memoryview) -> dict[str, int]:
    found = locator.match(hints)
    assert found is not None, locator.trouble
    return {found.source(row): found.blocks[row] for row in range(found.rows)}
