"""The ledger over devices: what they held comes back, and what is lost with one of them."""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.block import Slot, StorageKey
from kvcache.leaf_lru import LeafLru
from kvcache.ledger import Change, Ledger, Reservation, Restored
from kvcache.policy import RequestContext
from kvcache.prefix import NONE
from kvcache.tiers.space import NVME_LAYOUT, Space, make_slot
from tests.kvcache.test_ledger import ANN, LATE, NOW, joined, key, keys

PAYLOAD = 4_096
STRIDE = 8_192
SEGMENT = 4_096 + 4 * STRIDE


class Devices:
    """A ledger over devices of some segments of four slots each. ``check`` after every word."""

    def __init__(self, *segments: int) -> None:
        self.space = Space(sum(segments) * SEGMENT, SEGMENT, NVME_LAYOUT)
        for count in segments:
            self.space.add_arena(count * SEGMENT)
        self.ledger = Ledger(self.space, LeafLru)
        self.entries: dict[StorageKey, Restored] = {}

    def reserve(self, path: str, device: int = 0, start: int = 0) -> Reservation:
        names = keys(path)
        before = names[start - 1] if start else None
        made = self.ledger.reserve(device, before, names[start:], PAYLOAD, ANN, NOW)
        self.ledger.check()
        return made

    def commit(self, made: Reservation) -> None:
        marks = [b"sum of " + name for name in made.keys]
        self.ledger.commit(made.reservation_id, ANN, marks, marks)
        self.ledger.check()
        for name, slot, mark in zip(made.keys, made.slots, marks, strict=True):
            before = StorageKey(name[:-1]) if len(name) > 1 else None
            self.entries[name] = Restored(name, before, slot, PAYLOAD, mark)

    def save(self, path: str, device: int = 0, start: int = 0) -> Reservation:
        made = self.reserve(path, device, start)
        self.commit(made)
        return made

    def restore(self, *entries: Restored) -> str:
        """What is refused."""
        refused = self.ledger.restore(entries)
        self.ledger.check()
        return " ".join(sorted(entry.key.decode() for entry in refused))

    def withdraw(self, device: int) -> int:
        count = self.ledger.withdraw_arena(device, LATE)
        self.ledger.check()
        return count

    def match(self, path: str) -> int:
        return self.ledger.match(keys(path))

    def changes(self) -> list[tuple[str, str, str]]:
        return [(change.kind, joined(change.keys), change.reason) for change in self.ledger.take_changes()]


def entry(path: str, place: int, device: int = 0) -> Restored:
    """The block of ``path`` in slot ``place`` of a device."""
    before = key(path[:-1]) if len(path) > 1 else None
    offset = place // 4 * SEGMENT + 4_096 + place % 4 * STRIDE
    return Restored(key(path), before, make_slot(device, offset), PAYLOAD, b"sum of " + key(path))


def entries(*paths: str, device: int = 0) -> list[Restored]:
    return [entry(path, place, device) for place, path in enumerate(paths)]


# --- restore ------------------------------------------------------------------------------------


def test_what_was_there_is_found_again() -> None:
    desk = Devices(2)
    assert desk.restore(*entries("abc", "a", "abd", "ab", "x")) == ""
    assert [desk.match(path) for path in ("abc", "abd", "xy")] == [3, 3, 1]
    lease = desk.ledger.lease(keys("abd"), ANN, LATE, NOW)
    assert lease.slots == tuple(entry("x", place).slot for place in (1, 3, 2))
    assert lease.checksums == (b"sum of a", b"sum of ab", b"sum of abd")
    assert len(set(lease.generations)) == 3


def test_it_is_told_in_runs_that_continue_a_parent() -> None:
    desk = Devices(2)
    desk.restore(*entries("abc", "a", "abd", "ab", "x"))
    told = desk.ledger.take_changes()
    assert [(joined(each.keys), each.parent) for each in told] == [
        ("a ab", None),
        ("abc", key("ab")),
        ("abd", key("ab")),
        ("x", None),
    ]
    assert {(each.kind, each.reason) for each in told} == {("stored", "restored")}


def test_what_has_nothing_before_it_is_refused() -> None:
    desk = Devices(1)
    assert desk.restore(*entries("a", "abc", "abcd", "xy")) == "abc abcd xy"
    assert desk.space.room(0, PAYLOAD) == 3
    assert desk.restore(entry("ab", 1), entry("abc", 2)) == ""
    assert desk.match("abc") == 3


def test_a_slot_that_cannot_be_had_is_refused_with_all_behind_it() -> None:
    desk = Devices(1)
    desk.save("z")
    misplaced = entry("x", 1)._replace(slot=Slot(entry("x", 1).slot + 512))
    assert desk.restore(entry("a", 0), entry("ab", 2), misplaced, entry("c", 3)) == "a ab x"
    assert desk.space.room(0, PAYLOAD) == 2
    assert desk.match("c") == 1


def test_what_is_held_already_is_refused() -> None:
    desk = Devices(2)
    desk.save("a")
    made = desk.reserve("ab")
    assert desk.restore(entry("a", 4), entry("ab", 5), entry("x", 6), entry("x", 7)) == "a ab x"
    desk.commit(made)
    assert desk.match("ab") == 2
    assert desk.match("x") == 1


def test_it_goes_on_behind_what_is_held() -> None:
    desk = Devices(2)
    desk.save("ab")
    desk.changes()
    assert desk.restore(entry("abcd", 5), entry("abx", 6), entry("abc", 4)) == ""
    told = desk.ledger.take_changes()
    assert [(joined(each.keys), each.parent) for each in told] == [
        ("abc abcd", key("ab")),
        ("abx", key("ab")),
    ]


def test_behind_what_is_only_reserved_it_waits() -> None:
    desk = Devices(2)
    made = desk.reserve("ab")
    assert desk.restore(entry("abc", 4), entry("abcd", 5)) == ""
    assert desk.match("abcd") == 0
    assert desk.changes() == []
    desk.commit(made)
    assert desk.match("abcd") == 4
    assert desk.changes() == [("stored", "a ab abc abcd", "committed")]


def test_behind_what_is_aborted_it_is_orphaned_and_goes_first() -> None:
    desk = Devices(2)
    desk.save("xy")
    made = desk.reserve("ab")
    desk.restore(entry("abc", 4))
    desk.ledger.abort(made.reservation_id, ANN)
    assert len(desk.save("pqrstu").keys) == 6
    assert (desk.match("xy"), desk.match("pqrstu")) == (2, 6)


def test_orphans_are_adopted_by_what_comes_back() -> None:
    desk = Devices(1, 1)
    desk.save("a", 0)
    desk.save("ab", 1, 1)
    desk.save("abc", 0, 2)
    desk.save("abcd", 1, 3)
    lost = [desk.entries[key(path)] for path in ("abc", "a")]
    desk.withdraw(0)
    desk.changes()
    assert desk.match("abcd") == 0
    assert desk.restore(*lost) == ""
    assert desk.match("abcd") == 4
    told = [name for _, names, _ in desk.changes() for name in names.split()]
    assert told == ["a", "ab", "abc", "abcd"]


def test_an_orphan_that_is_being_written_is_not_found_when_its_parent_comes_back() -> None:
    desk = Devices(1, 1)
    desk.save("a", 0)
    made = desk.reserve("ab", 1, 1)
    desk.withdraw(0)
    assert desk.restore(desk.entries[key("a")]) == ""
    assert desk.match("ab") == 1
    desk.commit(made)
    assert desk.match("ab") == 2


def test_what_was_refused_leaves_nothing_behind() -> None:
    desk = Devices(1)
    assert desk.restore(entry("xy", 0)) == "xy"
    assert desk.ledger.stats() == Devices(1).ledger.stats()
    desk.reserve("m")
    assert desk.match("m") == 0


def test_behind_an_orphan_it_waits_with_it() -> None:
    desk = Devices(1, 1)
    desk.save("a", 0)
    desk.save("ab", 1, 1)
    desk.withdraw(0)
    desk.changes()
    assert desk.restore(entry("abc", 1)) == ""
    assert desk.changes() == []
    desk.save("a", 0)
    assert desk.match("abc") == 3


def test_what_is_listed_first_is_the_oldest() -> None:
    desk = Devices(1)
    desk.restore(entry("ab", 0), entry("x", 1), entry("a", 2), entry("y", 3))
    assert joined(desk.ledger.coldest(NOW, 9)) == "ab a x y"


def test_each_branch_has_its_own_age() -> None:
    desk = Devices(2)
    desk.restore(*entries("a", "ab", "abx", "y", "abc"))
    assert joined(desk.ledger.coldest(NOW, 9)) == "abx y abc ab a"


def test_the_policy_hears_of_parents_first_however_they_are_listed() -> None:
    told: list[int] = []

    class Listening(LeafLru):
        def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
            told.extend(blocks)
            super().on_admitted(context, blocks)

    desk = Devices(2)
    desk.ledger = Ledger(desk.space, Listening)
    desk.restore(*entries("abx", "y", "abcd", "ab", "abc", "a"))
    tree = desk.ledger._holdings.tree
    assert sorted(told) == list(range(6))
    assert all(tree.parent[block] in [NONE, *told[:at]] for at, block in enumerate(told))


def test_a_policy_that_fails_over_it_is_replaced() -> None:
    class Deaf(LeafLru):
        def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
            raise RuntimeError("deaf")

    desk = Devices(1)
    desk.ledger = Ledger(desk.space, Deaf)
    assert desk.restore(*entries("a", "ab", "x", "y")) == ""
    assert "deaf" in desk.ledger.policy.last_fault
    assert len(desk.save("pqrs").keys) == 4


def test_nothing_comes_back_of_an_empty_device() -> None:
    desk = Devices(1)
    assert desk.ledger.restore([]) == []
    assert desk.changes() == []


# --- withdraw_arena -----------------------------------------------------------------------------


def test_a_lost_device_takes_what_continues_it_elsewhere() -> None:
    desk = Devices(1, 1)
    desk.save("a", 1)
    desk.save("ab", 0, 1)
    desk.save("abc", 1, 2)
    desk.save("x", 1)
    desk.ledger.take_changes()
    assert desk.withdraw(0) == 1
    assert [(kind, sorted(names.split()), why) for kind, names, why in desk.changes()] == [
        ("removed", ["ab", "abc"], "fenced")
    ]
    assert (desk.match("abc"), desk.match("x")) == (1, 1)
    assert desk.ledger.stats()["orphans"] == 1
    assert desk.space.room(0, PAYLOAD) == 4
    assert desk.withdraw(0) == 0
    assert desk.changes() == []


def test_a_device_may_go_a_part_at_a_time() -> None:
    desk = Devices(2, 1)
    desk.save("abcdef")
    desk.save("xyz", 1)
    desk.reserve("m")
    lease = desk.ledger.lease(keys("a"), ANN, LATE, NOW)
    gone = []
    while count := desk.ledger.withdraw_arena(0, LATE, 4):
        desk.ledger.check()
        gone.append(count)
    assert gone == [4, 2]
    assert (desk.match("a"), desk.match("xyz")) == (0, 3)
    assert desk.space.room(0, PAYLOAD) == 6
    assert desk.ledger.release(lease.lease_id, ANN, 2)


def test_what_is_leased_there_keeps_its_slot_until_the_reader_has_gone() -> None:
    desk = Devices(1)
    made = desk.save("ab")
    lease = desk.ledger.lease(keys("a"), ANN, LATE + 1, NOW)
    assert desk.withdraw(0) == 2
    assert desk.space.room(0, PAYLOAD) == 3
    assert desk.restore(desk.entries[key("a")]) == "a"
    desk.ledger.expire(LATE)
    assert desk.space.room(0, PAYLOAD) == 3
    assert desk.ledger.release(lease.lease_id, ANN, LATE)
    desk.ledger.expire(LATE)
    assert desk.space.room(0, PAYLOAD) == 4
    assert desk.restore(*[desk.entries[name] for name in made.keys]) == ""
    assert desk.match("ab") == 2


def test_a_pin_does_not_outlive_the_device() -> None:
    desk = Devices(1)
    desk.save("ab")
    desk.ledger.pin(keys("ab"))
    desk.withdraw(0)
    assert desk.space.room(0, PAYLOAD) == 4
    assert desk.ledger.unpin(keys("ab")) == 0


def test_what_is_being_written_there_is_its_writers_to_abort() -> None:
    desk = Devices(2, 1)
    desk.save("a")
    made = desk.reserve("ab")
    other = desk.reserve("abc", 1, 2)
    assert desk.withdraw(0) == 1
    assert desk.ledger.reserved(made.reservation_id, ANN) == made
    desk.ledger.abort(made.reservation_id, ANN)
    desk.commit(other)
    assert desk.space.room(0, PAYLOAD) == 8
    assert desk.match("abc") == 0
    desk.save("ab", 1)
    assert desk.match("abc") == 3


def test_what_was_in_quarantine_there_stays_in_it() -> None:
    desk = Devices(1)
    desk.save("ab")
    lease = desk.ledger.lease(keys("a"), ANN, LATE, NOW)
    desk.ledger.quarantine(key("a"), lease.generations[0], LATE)
    desk.ledger.release(lease.lease_id, ANN, 2)
    assert desk.withdraw(0) == 1
    assert desk.space.room(0, PAYLOAD) == 3
    desk.ledger.expire(LATE)
    assert desk.space.room(0, PAYLOAD) == 4


def test_told_changes_are_what_is_found() -> None:
    desk = Devices(1, 1)
    desk.restore(*entries("ab", "a"), *entries("abc", "x", device=1))
    desk.withdraw(1)
    found: set[StorageKey] = set()
    for change in desk.ledger.take_changes():
        found = found | set(change.keys) if change.kind == "stored" else found - set(change.keys)
    assert found == {key("a"), key("ab")}
    assert Change("stored", (key("x"),), None, "restored") not in desk.ledger.take_changes()
