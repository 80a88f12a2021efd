"""The ledger in small transcripts: one line a step, no time but what is handed in."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvcache.block import StorageKey
from kvcache.errors import BadInput
from kvcache.leaf_lru import LeafLru
from kvcache.leases import LEASES_MAX
from kvcache.ledger import Change, Lease, Ledger, Reservation
from kvcache.policy import RequestContext
from kvcache.tiers.space import Space

BLOCK = 64
ANN, BOB = 1, 2
SOON, LATE, NEVER = 10, 100, 1 << 60
NOW = RequestContext(now_ns=1)


def keys(path: str) -> list[StorageKey]:
    """The keys of "abc": those of "a", "ab" and "abc"."""
    return [StorageKey(path[: end + 1].encode()) for end in range(len(path))]


def key(path: str) -> StorageKey:
    return keys(path)[-1]


class Desk:
    """A ledger over one arena, and the words of these transcripts. ``check`` after every one."""

    def __init__(self, blocks: int = 4) -> None:
        self.space = Space(blocks * BLOCK, BLOCK)
        self.space.add_arena()
        self.ledger = Ledger(self.space, LeafLru)

    def reserve(self, path: str, owner: int = ANN, parent: str = "") -> Reservation:
        before = key(parent) if parent else None
        rest = keys(path)[len(parent) :]
        made = self.ledger.reserve(0, before, rest, BLOCK, owner, NOW)
        self.ledger.check()
        return made

    def commit(self, made: Reservation, owner: int = ANN) -> None:
        marks = [b"sum of " + name for name in made.keys]
        assert self.ledger.commit(made.reservation_id, owner, marks, marks) == len(made.keys)
        self.ledger.check()

    def save(self, path: str, owner: int = ANN) -> Reservation:
        made = self.reserve(path, owner)
        if made.reservation_id:
            self.commit(made, owner)
        return made

    def lease(self, path: str, owner: int = ANN, until_ns: int = LATE, request: str = "") -> Lease:
        lease = self.ledger.lease(keys(path), owner, until_ns, NOW, request)
        self.ledger.check()
        return lease

    def match(self, path: str) -> int:
        self.ledger.check()
        return self.ledger.match(keys(path))

    def changes(self) -> list[tuple[str, str, str]]:
        return [(change.kind, joined(change.keys), change.reason) for change in self.ledger.take_changes()]


def joined(names: Sequence[StorageKey]) -> str:
    return " ".join(name.decode() for name in names)


def refused(code: str, desk: Desk) -> pytest.RaisesExc[BadInput]:
    """Refused with this code, and nothing lost or changed by asking is what the caller asserts."""
    desk.ledger.check()
    return pytest.raises(BadInput, match=rf"\[{code}\]")


# --- writing ------------------------------------------------------------------------------------


def test_what_was_committed_is_found_and_nothing_before() -> None:
    desk = Desk()
    made = desk.reserve("abc")
    assert (made.start, joined(made.keys), made.reason) == (0, "a ab abc", "")
    assert len(set(made.slots)) == 3
    assert desk.match("abc") == 0
    desk.commit(made)
    assert desk.match("abcd") == 3
    assert desk.ledger.take_changes() == [Change("stored", made.keys, None, "committed")]
    more = desk.save("abcd")
    assert desk.ledger.take_changes() == [Change("stored", more.keys, key("abc"), "committed")]


def test_only_what_is_not_held_is_reserved() -> None:
    desk = Desk()
    desk.save("ab")
    made = desk.reserve("abcd")
    assert (made.start, joined(made.keys)) == (2, "abc abcd")
    again = desk.reserve("ab")
    assert (again.reservation_id, again.start, again.keys, again.reason) == (0, 2, (), "held")


def test_what_another_writes_is_busy() -> None:
    desk = Desk()
    desk.reserve("ab", ANN)
    other = desk.reserve("abc", BOB)
    assert (other.reservation_id, other.start, other.reason) == (0, 0, "busy")
    assert desk.reserve("abc", BOB, parent="ab").reason == "busy"


def test_a_writer_may_go_on_behind_what_it_has_not_committed_yet() -> None:
    desk = Desk()
    first, second = desk.reserve("ab"), desk.reserve("abcd", parent="ab")
    desk.changes()
    desk.commit(second)
    assert desk.match("abcd") == 0
    assert desk.changes() == []
    desk.commit(first)
    assert desk.match("abcd") == 4
    assert desk.changes() == [("stored", "a ab abc abcd", "committed")]


def test_what_stands_on_an_aborted_block_is_not_found_until_that_is_saved() -> None:
    desk = Desk()
    first, second = desk.reserve("a"), desk.reserve("ab", parent="a")
    desk.commit(second)
    desk.ledger.abort(first.reservation_id, ANN)
    assert desk.match("ab") == 0
    desk.save("a")
    assert desk.match("ab") == 2


def test_aborted_slots_are_used_again_under_a_new_generation() -> None:
    desk = Desk(1)
    first = desk.reserve("a")
    desk.ledger.abort(first.reservation_id, ANN)
    second = desk.reserve("b")
    assert second.slots == first.slots
    assert second.generations[0] > first.generations[0]


def test_a_reservation_ends_once() -> None:
    desk = Desk()
    made = desk.save("a")
    with refused("bad_reservation", desk):
        desk.ledger.commit(made.reservation_id, ANN, [b""], [b""])
    with refused("bad_reservation", desk):
        desk.ledger.abort(made.reservation_id, ANN)
    made = desk.reserve("b")
    desk.ledger.abort(made.reservation_id, ANN)
    with refused("bad_reservation", desk):
        desk.ledger.commit(made.reservation_id, ANN, [b""], [b""])
    assert (desk.match("a"), desk.match("b")) == (1, 0)


def test_a_reservation_is_its_owners() -> None:
    desk = Desk()
    made = desk.reserve("a", ANN)
    for attempt in (desk.ledger.reserved, desk.ledger.abort):
        with refused("bad_reservation", desk):
            attempt(made.reservation_id, BOB)
    with refused("bad_reservation", desk):
        desk.ledger.commit(made.reservation_id, BOB, [b""], [b""])
    assert desk.ledger.reserved(made.reservation_id, ANN) == made


def test_a_commit_with_too_few_sums_leaves_the_reservation_open() -> None:
    desk = Desk()
    made = desk.reserve("ab")
    with refused("bad_block", desk):
        desk.ledger.commit(made.reservation_id, ANN, [b"1"], [b"1", b"2"])
    desk.commit(made)


def test_a_prefix_that_skips_a_parent_is_refused() -> None:
    desk = Desk(8)
    desk.save("abc")
    for parent, path in ((None, [key("ab")]), (key("a"), [key("abc")]), (None, [key("a"), key("abc")])):
        with refused("bad_prefix", desk):
            desk.ledger.reserve(0, parent, path, BLOCK, ANN, NOW)
    with refused("bad_prefix", desk):
        desk.ledger.reserve(0, key("x"), [key("xy")], BLOCK, ANN, NOW)
    with refused("bad_prefix", desk):
        desk.ledger.reserve(0, None, [key("z"), key("z")], BLOCK, ANN, NOW)
    assert desk.match("abc") == 3


def test_sums_are_kept() -> None:
    desk = Desk()
    desk.save("ab")
    assert desk.ledger.chunk_sums(key("ab")) == b"sum of ab"
    assert desk.lease("ab").checksums == (b"sum of a", b"sum of ab")
    assert desk.ledger.chunk_sums(key("b")) == b""


# --- eviction -----------------------------------------------------------------------------------


def test_the_tail_of_what_was_used_longest_ago_goes() -> None:
    desk = Desk(4)
    desk.save("ab")
    desk.save("cd")
    desk.lease("ab")
    desk.ledger.disconnect(ANN, True)
    desk.changes()
    desk.save("e")
    assert desk.changes() == [("removed", "cd", "evicted"), ("stored", "e", "committed")]
    assert (desk.match("ab"), desk.match("cd"), desk.match("e")) == (2, 1, 1)


def test_the_parent_of_what_is_reserved_never_goes() -> None:
    """Found by a random caller in a first sketch: the new blocks' own parent was the coldest leaf."""
    desk = Desk(2)
    desk.save("ab")
    made = desk.reserve("abc")
    assert (made.reservation_id, made.start, made.reason) == (0, 2, "full")
    assert desk.match("ab") == 2


def test_what_was_being_continued_can_go_once_that_was_given_up() -> None:
    desk = Desk(2)
    desk.save("a")
    made = desk.reserve("ab")
    assert desk.reserve("x").reason == "full"
    desk.ledger.abort(made.reservation_id, ANN)
    assert len(desk.reserve("xy").keys) == 2
    assert desk.ledger.policy.last_fault == ""


def test_less_is_reserved_when_there_is_no_more_room() -> None:
    desk = Desk(3)
    desk.save("x")
    desk.lease("x")
    made = desk.reserve("abcd")
    assert (joined(made.keys), made.reason) == ("a ab", "full")


def test_what_is_leased_pinned_or_being_written_stays() -> None:
    desk = Desk(3)
    desk.save("ab")
    desk.save("c")
    desk.lease("c")
    assert desk.ledger.pin(keys("ab")) == 2
    assert desk.reserve("d").reason == "full"
    assert desk.ledger.unpin(keys("ab")) == 2
    assert desk.reserve("d").reason == ""
    assert desk.reserve("e").reason == ""
    assert desk.reserve("f").reason == "full"
    assert (desk.match("ab"), desk.match("c")) == (0, 1)


def test_pinning_twice_is_pinning_once() -> None:
    desk = Desk(1)
    desk.save("a")
    assert (desk.ledger.pin(keys("ab")), desk.ledger.pin(keys("a"))) == (1, 1)
    assert (desk.ledger.unpin(keys("ab")), desk.ledger.unpin(keys("a"))) == (1, 0)
    assert desk.reserve("b").reason == ""


# --- leases -------------------------------------------------------------------------------------


def test_a_lease_says_where_the_leading_blocks_are() -> None:
    desk = Desk()
    made = desk.save("ab")
    lease = desk.lease("abc")
    assert (lease.keys, lease.slots, lease.generations) == (made.keys, made.slots, made.generations)
    assert (lease.block_bytes, lease.expires_ns) == (BLOCK, LATE)
    assert desk.ledger.leased(lease.lease_id, ANN) == lease
    assert desk.ledger.release(lease.lease_id, ANN, LATE - 1) is True


def test_a_miss_is_an_empty_lease() -> None:
    desk = Desk()
    desk.save("a")
    empty = desk.lease("x")
    assert (empty.lease_id, empty.keys) == (0, ())
    assert desk.lease("a", until_ns=1).lease_id == 0
    assert desk.ledger.lease([], ANN, LATE, NOW).lease_id == 0


def test_a_lease_ends_once_and_is_its_owners() -> None:
    desk = Desk()
    desk.save("a")
    lease = desk.lease("a", ANN)
    with refused("bad_lease", desk):
        desk.ledger.release(lease.lease_id, BOB, 2)
    with refused("bad_lease", desk):
        desk.ledger.leased(lease.lease_id, BOB)
    desk.ledger.release(lease.lease_id, ANN, 2)
    with refused("bad_lease", desk):
        desk.ledger.release(lease.lease_id, ANN, 2)


def test_expiry_forbids_new_reads_frees_the_slots_and_is_told_at_release() -> None:
    desk = Desk(1)
    desk.save("a")
    lease = desk.lease("a", until_ns=SOON)
    assert desk.ledger.expire(SOON - 1) == 0
    assert desk.reserve("b").reason == "full"
    assert desk.ledger.expire(SOON) == 1
    with refused("bad_lease", desk):
        desk.ledger.leased(lease.lease_id, ANN)
    assert desk.reserve("b").slots == lease.slots
    assert desk.ledger.release(lease.lease_id, ANN, SOON + 5) is False


def test_a_release_after_the_end_is_not_intact_even_before_anybody_swept() -> None:
    desk = Desk()
    desk.save("a")
    lease = desk.lease("a", until_ns=SOON)
    assert desk.ledger.release(lease.lease_id, ANN, SOON) is False


def test_scheduler_and_worker_share_a_lease_by_the_request() -> None:
    desk = Desk(2)
    desk.save("ab")
    lease = desk.lease("ab", ANN, SOON, "r1")
    assert desk.lease("ab", BOB, LATE, "r1") == desk.ledger.leased(lease.lease_id, ANN)
    assert desk.lease("ab", ANN, SOON, "r1").lease_id == lease.lease_id
    assert desk.ledger.release(lease.lease_id, ANN, 5)
    assert desk.reserve("c").reason == "full"
    assert desk.ledger.release(lease.lease_id, BOB, SOON + 5) is True
    assert desk.reserve("c").reason == ""


def test_a_lease_that_was_prolonged_by_another_ends_for_both_at_the_later_time() -> None:
    desk = Desk()
    desk.save("a")
    lease = desk.lease("a", ANN, SOON, "r1")
    desk.lease("a", BOB, LATE, "r1")
    assert desk.ledger.expire(SOON) == 0
    assert desk.ledger.leased(lease.lease_id, ANN).expires_ns == LATE
    assert desk.ledger.expire(LATE) == 1


def test_a_lease_whose_time_is_over_is_not_shared_even_before_anybody_swept() -> None:
    desk = Desk()
    desk.save("a")
    lease = desk.lease("a", ANN, SOON, "r1")
    later = RequestContext(now_ns=SOON)
    fresh = desk.ledger.lease(keys("a"), ANN, LATE, later, "r1")
    desk.ledger.check()
    assert fresh.lease_id not in (0, lease.lease_id)
    assert desk.ledger.release(fresh.lease_id, ANN, SOON + 1) is True
    assert desk.ledger.release(lease.lease_id, ANN, SOON + 1) is False


def test_another_request_or_prefix_is_another_lease() -> None:
    desk = Desk()
    desk.save("ab")
    numbers = {
        desk.lease(path, ANN, LATE, name).lease_id
        for path, name in (("ab", "1"), ("a", "1"), ("ab", "2"), ("ab", ""), ("ab", ""))
    }
    assert len(numbers) == 5


def test_an_owner_has_so_many_leases_and_no_more() -> None:
    desk = Desk()
    desk.save("a")
    first = desk.ledger.lease(keys("a"), ANN, SOON, NOW)
    for _ in range(LEASES_MAX - 1):
        assert desk.ledger.lease(keys("a"), ANN, LATE, NOW).lease_id
    assert desk.lease("a", ANN).lease_id == 0
    assert desk.lease("a", BOB).lease_id
    desk.ledger.expire(SOON)
    assert desk.lease("a", ANN).lease_id
    with refused("bad_lease", desk):
        desk.ledger.release(first.lease_id, ANN, 3)
