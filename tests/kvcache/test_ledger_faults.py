"""What goes wrong around the ledger: owners that vanish, bytes that fail their check, bad policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest

from kvcache.block import StorageKey
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Lease, Ledger, Reservation
from kvcache.policy import EvictionPolicy, RequestContext
from kvcache.tiers.space import Space

BLOCK = 64
NOW = RequestContext(now_ns=1)
LATE = 100


def keys(path: str) -> list[StorageKey]:
    return [StorageKey(path[: end + 1].encode()) for end in range(len(path))]


def new_ledger(units: int, policy: type[EvictionPolicy] = LeafLru, arenas: int = 1) -> Ledger:
    """Units of four blocks of ``BLOCK`` bytes."""
    space = Space(units * 4 * BLOCK, 4 * BLOCK)
    for _ in range(arenas):
        space.add_arena()
    return Ledger(space, policy)


def reserve(ledger: Ledger, path: str, owner: str = "ann", size: int = BLOCK, arena: int = 0) -> Reservation:
    made = ledger.reserve(arena, None, keys(path), size, owner, NOW)
    ledger.check()
    return made


def save(ledger: Ledger, path: str, owner: str = "ann", size: int = BLOCK, arena: int = 0) -> Reservation:
    made = reserve(ledger, path, owner, size, arena)
    blank = [b""] * len(made.keys)
    if made.reservation_id:
        ledger.commit(made.reservation_id, owner, blank, blank)
    ledger.check()
    return made


def lease(ledger: Ledger, path: str, owner: str = "ann", until_ns: int = LATE) -> Lease:
    return ledger.lease(keys(path), owner, until_ns, NOW)


def changes(ledger: Ledger) -> list[tuple[str, list[str], str]]:
    return [(c.kind, [key.decode() for key in c.keys], c.reason) for c in ledger.take_changes()]


# --- owners that vanish -------------------------------------------------------------------------


def test_a_killed_reader_leaves_nothing() -> None:
    ledger = new_ledger(1)
    save(ledger, "abcd")
    lease(ledger, "abcd")
    ledger.disconnect("ann", writes_ended=False)
    assert len(reserve(ledger, "wxyz", "bob").keys) == 4
    assert ledger.stats()["leases"] == 0


def test_the_slots_of_a_vanished_writer_rest_until_it_has_ended() -> None:
    ledger = new_ledger(1)
    first = reserve(ledger, "ab")
    ledger.disconnect("ann", writes_ended=False)
    ledger.check()
    assert ledger.stats()["limbo_blocks"] == 2
    assert not set(reserve(ledger, "abcd", "bob").slots) & set(first.slots)
    assert reserve(ledger, "xy", "bob").reason == "full"
    ledger.writes_ended("ann")
    assert set(reserve(ledger, "xy", "bob").slots) == set(first.slots)


def test_the_keys_of_a_vanished_writer_can_be_written_by_another_at_once() -> None:
    ledger = new_ledger(1)
    reserve(ledger, "ab")
    ledger.disconnect("ann", writes_ended=False)
    save(ledger, "ab", "bob")
    assert ledger.match(keys("ab")) == 2


def test_a_writer_that_is_known_to_have_ended_leaves_free_slots() -> None:
    ledger = new_ledger(1)
    reserve(ledger, "abcd")
    ledger.disconnect("ann", writes_ended=True)
    assert len(reserve(ledger, "wxyz", "bob").keys) == 4


def test_a_shared_lease_outlives_one_of_its_owners() -> None:
    ledger = new_ledger(1)
    save(ledger, "abcd")
    for owner in ("ann", "bob"):
        shared = ledger.lease(keys("abcd"), owner, LATE, NOW, "request")
    ledger.disconnect("ann", writes_ended=True)
    assert reserve(ledger, "x").reason == "full"
    assert ledger.release(shared.lease_id, "bob", 2)


def test_disconnecting_twice_or_a_stranger_does_nothing() -> None:
    ledger = new_ledger(1)
    save(ledger, "ab")
    for _ in range(2):
        ledger.disconnect("ann", writes_ended=False)
        ledger.writes_ended("ann")
    ledger.check()
    assert ledger.match(keys("ab")) == 2


# --- quarantine ---------------------------------------------------------------------------------


def test_a_bad_block_and_what_continues_it_are_no_longer_found() -> None:
    ledger = new_ledger(1)
    made = save(ledger, "abcd")
    changes(ledger)
    assert ledger.quarantine(keys("ab")[-1], made.generations[1], 50)
    ledger.check()
    assert ledger.match(keys("abcd")) == 1
    assert changes(ledger) == [("removed", ["ab", "abc", "abcd"], "quarantined")]
    assert ledger.chunk_sums(keys("abc")[-1]) == b""


def test_its_slot_is_not_used_before_the_time_is_over() -> None:
    ledger = new_ledger(1)
    made = save(ledger, "a")
    ledger.quarantine(made.keys[0], made.generations[0], 50)
    assert len(save(ledger, "wxyz").keys) == 3
    assert ledger.expire(49) == 0
    assert reserve(ledger, "wxyz").reason == "full"
    assert ledger.expire(50) == 1
    assert reserve(ledger, "wxyz").slots == made.slots


def test_nor_while_somebody_still_reads_it() -> None:
    ledger = new_ledger(1)
    made = save(ledger, "a")
    held = lease(ledger, "a", until_ns=LATE)
    ledger.quarantine(made.keys[0], made.generations[0], 50)
    assert ledger.expire(60) == 0
    ledger.check()
    assert ledger.release(held.lease_id, "ann", 61) is True
    assert ledger.expire(62) == 1


def test_what_was_written_anew_is_not_withdrawn_for_the_old() -> None:
    ledger = new_ledger(1)
    made = save(ledger, "a")
    assert not ledger.quarantine(made.keys[0], made.generations[0] - 1, 50)
    assert not ledger.quarantine(keys("x")[0], 1, 50)
    writing = reserve(ledger, "b")
    assert not ledger.quarantine(writing.keys[0], writing.generations[0], 50)
    assert ledger.match(keys("a")) == 1


def test_saving_it_again_brings_back_what_continues_it() -> None:
    ledger = new_ledger(2)
    made = save(ledger, "abcd")
    ledger.quarantine(made.keys[1], made.generations[1], 50)
    changes(ledger)
    again = save(ledger, "abcd")
    assert (again.start, again.keys, again.reason) == (1, (made.keys[1],), "held")
    assert again.slots != (made.slots[1],)
    assert ledger.match(keys("abcd")) == 4
    assert changes(ledger) == [("stored", ["ab", "abc", "abcd"], "committed")]


def test_orphans_go_first() -> None:
    ledger = new_ledger(2)
    save(ledger, "old")
    made = save(ledger, "abcd")
    ledger.quarantine(made.keys[1], made.generations[1], 50)
    assert len(save(ledger, "xyz").keys) == 3
    assert (ledger.match(keys("old")), ledger.match(keys("xyz"))) == (3, 3)
    assert ledger.stats()["orphans"] == 0


def test_a_leased_orphan_stays() -> None:
    ledger = new_ledger(1)
    made = save(ledger, "abcd")
    held = lease(ledger, "abcd")
    ledger.quarantine(made.keys[1], made.generations[1], 50)
    assert reserve(ledger, "x").reason == "full"
    assert ledger.release(held.lease_id, "ann", 2)
    assert len(save(ledger, "xyz").keys) == 3


def test_an_orphan_that_is_being_continued_stays() -> None:
    ledger = new_ledger(1)
    made = save(ledger, "abc")
    ledger.quarantine(made.keys[0], made.generations[0], 1)
    ledger.expire(1)
    more = ledger.reserve(0, made.keys[2], [StorageKey(b"abcd")], BLOCK, "ann", NOW)
    assert len(save(ledger, "xy", "bob").keys) == 1
    ledger.abort(more.reservation_id, "ann")
    assert len(save(ledger, "xyzw", "bob").keys) == 3


def test_a_pinned_block_can_be_quarantined_and_is_then_pinned_no_more() -> None:
    ledger = new_ledger(1)
    made = save(ledger, "a")
    ledger.pin(made.keys)
    assert ledger.quarantine(made.keys[0], made.generations[0], 50)
    ledger.check()
    assert ledger.unpin(made.keys) == 0


# --- bad policies -------------------------------------------------------------------------------


class Raises(LeafLru):
    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        raise ZeroDivisionError("theirs")


class NamesNothing(LeafLru):
    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return ()


class NamesParents(LeafLru):
    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return super().victims(context, 2)[1:]


class NamesStrangers(LeafLru):
    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return [12_345]


class NamesTwice(LeafLru):
    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return list(super().victims(context, 1)) * 2


class NamesTooMany(LeafLru):
    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return super().victims(context, count + 1)


class NamesWhatIsHeld(LeafLru):
    seen: ClassVar[list[int]] = []

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        self.seen[:] = path[-1:]

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        return self.seen


class AdmitsTooMuch(LeafLru):
    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return count + 1


class AdmitsNothing(LeafLru):
    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        return 0


class RaisesEverywhere(LeafLru):
    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        raise RuntimeError("theirs")

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        raise RuntimeError("theirs")

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        raise RuntimeError("theirs")


BAD: dict[type[EvictionPolicy], str] = {
    Raises: "ZeroDivisionError",
    NamesNothing: "named none, though 1 leaves could go",
    NamesParents: "is no leaf",
    NamesStrangers: "block 12345, which is not held",
    NamesTwice: "named 2 blocks, 1 were asked for",
    NamesTooMany: "named 2 blocks, 1 were asked for",
    NamesWhatIsHeld: "is leased, pinned or being written",
    AdmitsTooMuch: "admit answered",
    RaisesEverywhere: "RuntimeError('theirs')",
}


@pytest.mark.parametrize("policy", BAD)
def test_a_policy_that_breaks_the_contract_is_replaced_and_nothing_is_lost(
    policy: type[EvictionPolicy],
) -> None:
    ledger = new_ledger(2, policy)
    save(ledger, "abc")
    save(ledger, "xyzuv")
    held = lease(ledger, "abc")
    save(ledger, "q")
    assert ledger.stats()["policy_faults"] == 1
    assert BAD[policy] in ledger.policy.last_fault
    assert policy.__name__ in ledger.policy.last_fault
    assert ledger.release(held.lease_id, "ann", 2) is True
    assert (ledger.match(keys("abc")), ledger.match(keys("xyzuv")), ledger.match(keys("q"))) == (3, 4, 1)
    assert len(save(ledger, "12345678").keys) == 8


def test_a_policy_may_decline() -> None:
    ledger = new_ledger(1, AdmitsNothing)
    made = reserve(ledger, "ab")
    assert (made.reservation_id, made.reason) == (0, "declined")
    assert ledger.policy.last_fault == ""
