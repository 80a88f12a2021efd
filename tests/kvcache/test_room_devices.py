"""Room on one of several devices: what is coldest there goes, however cold the others are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from kvcache import room
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Ledger
from kvcache.policy import EvictionPolicy, Param, RequestContext, TreeView
from tests.kvcache.test_ledger import ANN, LATE, NOW, keys
from tests.kvcache.test_ledger_devices import Devices


class Plain:
    """Leaf-first LRU that knows nothing of devices."""

    def __init__(self, tree: TreeView, capacity_bytes: int) -> None:
        self._lru = LeafLru(tree, capacity_bytes)

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        return {}

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self._lru.on_request(context, path)

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return count

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        self._lru.on_admitted(context, blocks)

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return self._lru.victims(context, count)

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        self._lru.on_evicted(blocks, reason)

    def state(self) -> bytes:
        return b""

    def load_state(self, data: bytes) -> None:
        pass


@pytest.mark.parametrize("policy", [LeafLru, Plain])
def test_one_device_does_not_make_room_in_another(policy: type[EvictionPolicy]) -> None:
    desk = Devices(1, 1)
    desk.ledger = Ledger(desk.space, policy)
    desk.save("abcd", 0)
    desk.save("wxyz", 1)
    assert len(desk.save("mn", 1).keys) == 2
    assert (desk.match("abcd"), desk.match("wxyz"), desk.match("mn")) == (4, 2, 2)


def test_the_coldest_there_goes_though_all_the_others_are_colder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "VICTIMS_MAX", 8)
    desk = Devices(1, 8)
    for at in range(32):
        desk.save(chr(1_000 + at), 1)
    desk.save("ab", 0)
    desk.save("x", 0)
    desk.save("y", 0)
    assert len(desk.save("z", 0).keys) == 1
    assert (desk.match("ab"), desk.match("x"), desk.match("z")) == (1, 1, 1)
    assert all(desk.match(chr(1_000 + at)) for at in range(32))


def test_what_is_covered_from_elsewhere_goes_if_there_is_no_other_way() -> None:
    desk = Devices(1, 1)
    desk.save("a", 0)
    desk.save("ab", 1, 1)
    desk.save("xyz", 0)
    desk.ledger.lease(keys("xyz"), ANN, LATE, NOW)
    assert len(desk.save("m", 0).keys) == 1
    assert (desk.match("ab"), desk.match("xyz"), desk.match("m")) == (0, 3, 1)


def test_a_segment_of_another_size_is_reclaimed_on_the_same_device() -> None:
    desk = Devices(1, 1)
    desk.save("abcd", 0)
    desk.save("wxyz", 1)
    made = desk.ledger.reserve(0, None, keys("q"), 3 * 4_096, ANN, NOW)
    assert len(made.keys) == 1
    assert (desk.match("abcd"), desk.match("wxyz")) == (0, 4)
    desk.ledger.check()


def test_nothing_goes_for_a_device_that_can_give_nothing() -> None:
    desk = Devices(1, 1)
    desk.save("abcd", 0)
    desk.save("wxyz", 1)
    desk.ledger.lease(keys("abcd"), ANN, LATE, NOW)
    assert desk.reserve("m", 0).reason == "full"
    assert (desk.match("abcd"), desk.match("wxyz")) == (4, 4)
    desk.withdraw(0)
    assert desk.reserve("m", 0).reason == "full"
    assert desk.match("wxyz") == 4


class Elsewhere(LeafLru):
    """Names what lies on the other device."""

    def victims_on(self, context: RequestContext, count: int, device: int) -> Sequence[int]:
        return super().victims_on(context, count, 1 - device)


class Failing(LeafLru):
    def victims_on(self, context: RequestContext, count: int, device: int) -> Sequence[int]:
        raise RuntimeError("failing")


@pytest.mark.parametrize("policy", [Elsewhere, Failing])
def test_a_policy_that_answers_wrongly_is_replaced(policy: type[LeafLru]) -> None:
    desk = Devices(1, 1)
    desk.ledger = Ledger(desk.space, policy)
    desk.save("abcd", 0)
    desk.save("wxyz", 1)
    assert len(desk.save("mn", 0).keys) == 2
    assert "victims_on" in desk.ledger.policy.last_fault
    assert (desk.match("abcd"), desk.match("wxyz")) == (2, 4)
