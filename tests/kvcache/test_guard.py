"""Whatever a policy does, a call of the ledger ends, holds what it says, and nothing but hits is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count as numbers
from random import Random

import pytest

from kvcache.guard import PolicyGuard
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Ledger
from kvcache.policy import EvictionPolicy, RequestContext, TreeView
from kvcache.prefix import PrefixTree
from kvcache.testing.policies import BLOCK_BYTES, path_keys
from kvcache.tiers.space import Space

STEPS = 150
HOOKS = ("on_request", "admit_keys", "on_admitted", "victims", "on_evicted")


class Unspeakable(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("not even this")


def vandal(hook: str, act: Callable[[Sequence[object]], None]) -> type[LeafLru]:
    """Leaf-first LRU that does this, besides, with what it is given in this call."""

    class Vandal(LeafLru):
        def admit_keys(self, context: RequestContext, parent: int, keys: Sequence[Hashable]) -> int:
            return len(keys)

        def __getattribute__(self, name: str) -> object:
            found = super().__getattribute__(name)
            if name != hook:
                return found

            def called(*given: object) -> object:
                answer = found(*given)
                for each in (*given, answer):
                    if isinstance(each, Sequence):
                        act(each)
                return answer

            return called

    return Vandal


def driven(make: type[EvictionPolicy]) -> Ledger:
    """A ledger after some random requests; each of its answers was held against what was asked."""
    random = Random(7)
    space = Space(24 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    ledger = Ledger(space, make)
    arena = space.add_arena()
    for now_ns in range(1, STEPS):
        context = RequestContext(now_ns=now_ns)
        keys = path_keys("/".join(random.choice("ab") for _ in range(random.randint(1, 8))))
        there = ledger.match(keys)
        lease = ledger.lease(keys, "reader", now_ns + random.randint(1, 9), context)
        assert list(lease.keys) == keys[:there]
        assert [ledger.slot_of(key) for key in lease.keys] == list(lease.slots)
        made = ledger.reserve(arena, None, keys, BLOCK_BYTES, "writer", context)
        assert list(made.keys) == keys[made.start :][: len(made.keys)]
        if made.reservation_id:
            blank = [b""] * len(made.keys)
            ledger.commit(made.reservation_id, "writer", blank, blank)
        ledger.expire(now_ns)
        ledger.check()
    return ledger


def clear(given: Sequence[object]) -> None:
    if isinstance(given, list):
        given.clear()


def reverse(given: Sequence[object]) -> None:
    if isinstance(given, list):
        given.reverse()


def append(given: Sequence[object]) -> None:
    if isinstance(given, list):
        given.append(12_345)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("act", [reverse, append, clear])
def test_what_a_policy_does_with_what_it_is_given_changes_nothing(
    hook: str, act: Callable[[Sequence[object]], None]
) -> None:
    driven(vandal(hook, act))


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, MemoryError, Unspeakable]
)
def test_whatever_a_policy_raises_it_is_replaced(
    hook: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        signal, "getsignal", lambda _: signal.SIG_IGN
    )  # As in a node, which handles it itself.

    def fail(_: Sequence[object]) -> None:
        raise error

    ledger = driven(vandal(hook, fail))
    assert ledger.policy.faults == 1
    assert error.__name__ in ledger.policy.last_fault


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_person_can_interrupt_a_replay(handler: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless that signal means something else here, as in a node, or nothing, as in the background."""

    class Interrupted(LeafLru):
        def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    guard = PolicyGuard(PrefixTree(), 1, Interrupted, list)
    if handler is signal.SIG_IGN:
        guard.on_request(RequestContext(now_ns=1), [])
        assert guard.faults == 1
    else:
        with pytest.raises(KeyboardInterrupt):
            guard.on_request(RequestContext(now_ns=1), [])


def test_an_answer_without_an_end_is_cut_off() -> None:
    class Endless(LeafLru):
        def victims(self, context: RequestContext, count: int) -> Iterator[int]:  # type: ignore[override]
            return numbers()

    ledger = driven(Endless)
    assert ledger.policy.faults == 1


class Leaver(LeafLru):
    def __init__(self, tree: TreeView, capacity_bytes: int) -> None:
        raise SystemExit(3)


def test_a_constructor_ends_no_more_than_the_call() -> None:
    ledger = driven(LeafLru)
    with pytest.raises(RuntimeError, match="SystemExit"):
        ledger.policy.begin_change(Leaver, with_state=False)
    assert not ledger.policy.is_changing


class Leaves(LeafLru):
    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        raise SystemExit

    def state(self) -> bytes:
        raise SystemExit

    def load_state(self, data: bytes) -> None:
        raise SystemExit


def test_a_policy_that_cannot_take_over_leaves_the_other_in_its_place() -> None:
    ledger = driven(LeafLru)
    assert not ledger.policy.begin_change(Leaves, with_state=True)
    while not ledger.policy.change_step(3):
        pass
    assert "SystemExit" in ledger.policy.change_fault
    assert ledger.policy.faults == 0
    ledger.check()
