"""Who waits at a listener: how many, who has to go, and how often it is said."""

from __future__ import annotations

import logging

import pytest

from kvcache.testing.clock import FakeClock
from kvcache.transport.doorstep import WAITING_MAX, WAITING_OF_A_HOST_MAX, Doorstep, Guest


class Door:
    """A doorstep, and who was sent away from it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.step = Doorstep("tcp://here:1", self.clock)
        self.sent_away: list[str] = []

    def enter(self, host: str, name: str = "") -> Guest:
        return self.step.enter(host, lambda: self.sent_away.append(name or host))


def test_of_one_host_who_waits_longest_goes() -> None:
    door = Door()
    door.enter("10.0.0.9")
    for at in range(WAITING_OF_A_HOST_MAX + 2):
        door.enter("10.0.0.1", str(at))
    assert door.sent_away == ["0", "1"]
    assert len(door.step) == WAITING_OF_A_HOST_MAX + 1
    assert door.step.refused_count == 2


def test_of_many_hosts_who_waits_longest_goes() -> None:
    door = Door()
    for at in range(WAITING_MAX + 3):
        door.enter(f"10.0.{at}.1")
    assert door.sent_away == ["10.0.0.1", "10.0.1.1", "10.0.2.1"]
    assert len(door.step) == WAITING_MAX


def test_who_left_makes_room() -> None:
    door = Door()
    for _ in range(3 * WAITING_MAX):
        guest = door.enter("10.0.0.1")
        guest.leave()
        guest.leave()
    assert door.sent_away == []
    assert len(door.step) == 0


@pytest.mark.parametrize(
    ("one", "another", "is_same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%1", "fe80::2%1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("a name", "another name", False),
    ],
)
def test_what_counts_as_one_host(one: str, another: str, is_same: bool) -> None:
    door = Door()
    for _ in range(WAITING_OF_A_HOST_MAX):
        door.enter(one)
    door.enter(another)
    assert door.sent_away == ([one] if is_same else [])


def test_it_is_said_once_a_second_at_most(caplog: pytest.LogCaptureFixture) -> None:
    door = Door()
    with caplog.at_level(logging.WARNING, "kvcache.transport"):
        for _ in range(30):
            guest = door.enter("10.0.0.1")
            guest.refuse("it does not know the key")
            guest.leave()
            door.clock.advance_ms(100)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "tcp://here:1 let 1 in no further, the last from 10.0.0.1: it does not know the key"
    assert [line.split()[2] for line in said] == ["1", "10", "10"]
    assert door.step.refused_count == 30
