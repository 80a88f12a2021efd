"""What a tier's own errands need of the ledger: holding, giving up a part, looking about."""

from __future__ import annotations

from kvcache.leases import LEASES_MAX, NO_LEASE
from tests.kvcache.test_ledger import ANN, BLOCK, BOB, LATE, NEVER, NOW, Desk, joined, key, keys, refused

# --- borrow -------------------------------------------------------------------------------------


def test_what_is_borrowed_stays_wherever_it_stands() -> None:
    desk = Desk(4)
    desk.save("abcd")
    lease = desk.ledger.borrow([key("abc"), key("a")], ANN, LATE)
    desk.ledger.check()
    assert joined(lease.keys) == "abc a"
    assert len(set(lease.slots)) == len(lease.slots) == 2
    assert desk.save("wxyz").reason == "full"  # Only "abcd" could go.
    assert desk.ledger.release(lease.lease_id, ANN, 2)
    assert desk.reserve("wxyz").reason == ""


def test_borrowing_stops_at_the_first_that_cannot_be_found() -> None:
    desk = Desk()
    desk.save("a")
    desk.reserve("ab")
    lease = desk.ledger.borrow([key("a"), key("ab"), key("a")], ANN, LATE)
    assert joined(lease.keys) == "a"
    assert desk.ledger.borrow([key("x"), key("a")], ANN, LATE) == NO_LEASE
    assert desk.ledger.borrow([], ANN, LATE) == NO_LEASE
    desk.ledger.check()


def test_one_lease_has_one_block_size() -> None:
    desk = Desk(8)
    desk.save("a")
    made = desk.ledger.reserve(0, None, keys("x"), BLOCK // 2, ANN, NOW)
    desk.commit(made)
    assert joined(desk.ledger.borrow([key("a"), key("x")], ANN, LATE).keys) == "a"


def test_what_is_borrowed_expires_and_ends_with_its_owner() -> None:
    desk = Desk(1)
    desk.save("a")
    lease = desk.ledger.borrow(keys("a"), ANN, LATE)
    desk.ledger.expire(LATE)
    desk.ledger.check()
    assert not desk.ledger.release(lease.lease_id, ANN, LATE)
    desk.ledger.borrow(keys("a"), ANN, NEVER)
    desk.ledger.disconnect(ANN, writes_ended=True)
    assert desk.reserve("b").reason == ""


def test_borrowing_is_no_use() -> None:
    """The scrubber reads what nobody wanted: that must not keep it."""
    desk = Desk(2)
    desk.save("a")
    desk.save("b")
    lease = desk.ledger.borrow(keys("a"), ANN, LATE)
    desk.ledger.release(lease.lease_id, ANN, 2)
    desk.changes()
    desk.save("c")
    assert ("removed", "a", "evicted") in desk.changes()


def test_nobody_borrows_without_limit() -> None:
    desk = Desk()
    desk.save("a")
    for _ in range(LEASES_MAX):
        assert desk.ledger.borrow(keys("a"), ANN, LATE).lease_id
    assert desk.ledger.borrow(keys("a"), ANN, LATE) == NO_LEASE


def test_a_touch_is_a_use_and_holds_nothing() -> None:
    desk = Desk(2)
    desk.save("a")
    desk.save("b")
    assert desk.ledger.touch(keys("ax"), NOW) == 1
    desk.changes()
    desk.save("c")
    assert ("removed", "b", "evicted") in desk.changes()
    desk.save("d")
    assert ("removed", "a", "evicted") in desk.changes()


# --- shorten ------------------------------------------------------------------------------------


def test_what_is_given_up_is_free_and_the_rest_is_committed() -> None:
    desk = Desk(4)
    made = desk.reserve("abcd")
    left = desk.ledger.shorten(made.reservation_id, ANN, 2)
    desk.ledger.check()
    assert (left.reservation_id, joined(left.keys)) == (made.reservation_id, "a ab")
    assert (left.slots, left.generations) == (made.slots[:2], made.generations[:2])
    assert desk.ledger.reserved(made.reservation_id, ANN) == left
    desk.commit(left)
    assert desk.match("abcd") == 2
    assert len(desk.reserve("xy").keys) == 2


def test_shortened_to_nothing_is_aborted() -> None:
    desk = Desk(2)
    made = desk.reserve("ab")
    left = desk.ledger.shorten(made.reservation_id, ANN, 0)
    assert (left.reservation_id, left.keys, left.slots) == (0, (), ())
    with refused("bad_reservation", desk):
        desk.ledger.reserved(made.reservation_id, ANN)
    assert len(desk.reserve("xy").keys) == 2


def test_shortening_to_all_changes_nothing() -> None:
    desk = Desk()
    made = desk.reserve("ab")
    assert desk.ledger.shorten(made.reservation_id, ANN, 2) == made
    assert desk.ledger.shorten(made.reservation_id, ANN, 9) == made
    desk.commit(made)
    with refused("bad_reservation", desk):
        desk.ledger.shorten(made.reservation_id, ANN, 1)


def test_nobody_shortens_what_is_anothers() -> None:
    desk = Desk()
    made = desk.reserve("ab")
    with refused("bad_reservation", desk):
        desk.ledger.shorten(made.reservation_id, BOB, 1)
    desk.commit(made)


def test_what_was_reserved_behind_what_is_given_up_waits_for_it() -> None:
    desk = Desk()
    made, behind = desk.reserve("ab"), desk.reserve("abc", parent="ab")
    left = desk.ledger.shorten(made.reservation_id, ANN, 1)
    desk.ledger.check()
    desk.commit(left)
    desk.commit(behind)
    assert desk.match("abc") == 1
    desk.save("ab")
    assert desk.match("abc") == 3


# --- looking ------------------------------------------------------------------------------------


def test_ancestors_are_told_nearest_first_the_block_itself_before_them() -> None:
    desk = Desk()
    desk.save("abc")
    desk.reserve("abcd")
    assert joined(list(desk.ledger.ancestors(key("abcd")))) == "abcd abc ab a"
    assert list(desk.ledger.ancestors(key("x"))) == []
    lease = desk.lease("a")
    desk.ledger.quarantine(key("a"), lease.generations[0], LATE)
    assert joined(list(desk.ledger.ancestors(key("abc")))) == "abc ab"


def test_only_what_can_be_found_is_had() -> None:
    desk = Desk()
    made = desk.reserve("a")
    assert not desk.ledger.has(key("a"))
    desk.commit(made)
    assert desk.ledger.has(key("a"))
    assert not desk.ledger.has(key("b"))


def test_the_coldest_are_what_goes_next() -> None:
    desk = Desk(3)
    for path in "abc":
        desk.save(path)
    desk.lease("a")
    desk.changes()
    assert joined(desk.ledger.coldest(NOW, 5)) == "b c"
    assert joined(desk.ledger.coldest(NOW, 1)) == "b"
    desk.save("d")
    assert desk.changes()[0] == ("removed", "b", "evicted")
