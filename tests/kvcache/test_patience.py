"""A policy that never comes back is stopped, and nothing else ever is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kvcache.guard import PolicyGuard
from kvcache.leaf_lru import LeafLru
from kvcache.patience import Patience, TooSlow
from kvcache.policy import RequestContext
from kvcache.prefix import PrefixTree

NOW = RequestContext(now_ns=1)
LIMIT_NS = 10


class Cpu:
    """The processor's time, as each look finds it: a limit more than the one before."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self, thread: int) -> int:
        self.now_ns += LIMIT_NS
        return self.now_ns


@contextmanager
def looked_after(patience: Patience) -> Iterator[None]:
    """Another thread looks again and again."""
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            patience.look()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def for_ever() -> None:
    while True:
        pass


def stubborn() -> None:
    while True:
        try:
            for_ever()
        except Exception:
            continue


@pytest.mark.parametrize("act", [for_ever, stubborn])
def test_what_never_comes_back_is_stopped(act: Callable[[], None]) -> None:
    patience = Patience(LIMIT_NS, Cpu())
    with looked_after(patience), pytest.raises(TooSlow):
        patience.call(act)
    assert patience.call(int, "3") == 3


def test_what_is_raised_for_a_call_ends_with_it() -> None:
    patience = Patience(LIMIT_NS, Cpu())

    def just_over() -> None:
        for _ in range(3):  # Seen, suspected, stopped.
            thread = threading.Thread(target=patience.look)
            thread.start()
            thread.join()

    with pytest.raises(TooSlow):
        patience.call(just_over)
    assert [patience.call(len, "four") for _ in range(1_000)] == [4] * 1_000


def test_who_comes_back_in_time_is_left_alone() -> None:
    patience = Patience(LIMIT_NS, Cpu())

    def twice_seen() -> str:
        patience.look()
        patience.look()
        return "well"

    for _ in range(3):
        assert patience.call(twice_seen) == "well"
        patience.look()


def test_short_calls_are_left_alone_however_many_there_are() -> None:
    patience = Patience()
    with looked_after(patience):
        assert sum(patience.call(len, "ab") for _ in range(20_000)) == 40_000


def test_a_policy_that_never_comes_back_is_replaced() -> None:
    class Endless(LeafLru):
        def on_request(self, context: RequestContext, path: object) -> None:
            for_ever()

    guard = PolicyGuard(PrefixTree(), 1, Endless, list)
    guard.patience = Patience(LIMIT_NS, Cpu())
    with looked_after(guard.patience):
        guard.on_request(NOW, [])
    assert guard.faults == 1
    assert "TooSlow" in guard.last_fault
    guard.on_request(NOW, [])


def test_what_is_fallen_back_to_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    patience = Patience(LIMIT_NS, Cpu())
    guard = PolicyGuard(PrefixTree(), 1, LeafLru, list)
    guard.patience = patience

    def looked_at(*_: object) -> None:
        for _ in range(9):
            patience.look()

    monkeypatch.setattr(LeafLru, "on_request", looked_at)
    guard.on_request(NOW, [])
    assert (patience._seen, guard.faults) == (0, 0)
