"""What goes wrong between two nodes is a miss, is counted by its reason, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.clock import NS_PER_MS, NS_PER_S, SystemClock
from kvcache.errors import BadInput
from kvcache.peers import fetch
from kvcache.server import exports
from kvcache.transport.base import PeerLost, Priority, Ticket, TransferRefused
from tests.server.peer_world import WAIT_MS, Flipper, Here, Meddler, Sleeper, Start
from tests.server.talk import HASHES, SIZE, content, deadline

CLOCK = SystemClock()
SHORT_MS = 300


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Nodes with their peers; each is looked at, and closed, at the end."""
    with ExitStack() as stack:

        def begin(name: str, *peers: Here, **settings: object) -> Here:
            addresses = ",".join(peer.node.tcp_address for peer in peers) or "none"
            return Here(tmp_path, name, stack, **{"peers": addresses, **settings})  # type: ignore[arg-type]

        yield begin


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks make a group."""
    monkeypatch.setattr(fetch, "GROUP_BYTES", 2 * SIZE)


@pytest.fixture
def a(start: Start) -> Here:
    """A node that holds eight blocks of one prompt."""
    node = start("a")
    node.save(HASHES[:8])
    return node


@pytest.fixture
def b(start: Start, a: Here) -> Here:
    """Its peer, which knows so."""
    node = start("b", a)
    node.until_known(8)
    return node


@pytest.fixture
def hasty(start: Start, a: Here) -> Here:
    """A peer of ``a`` that soon gives up."""
    node = start("hasty", a, peer_wait_ms=SHORT_MS)
    node.until_known(8)
    return node


class Losing(Meddler):
    """Fills half of what was asked for, and then the peer is gone."""

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        await self.inner.read(ticket, into, deadline_ns, priority)
        for view in into:
            view[: len(view) // 2] = bytes(len(view) // 2)
        raise PeerLost("it went away in the middle")


class Refusing(Meddler):
    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        raise TransferRefused("that ticket is not known")


def quiet(*nodes: Here) -> None:
    for node in nodes:
        node.until_quiet()
        node.embedded.call(node.node.core.check)
        assert node.node.core.host.coming_bytes == 0


# --- wrong bytes --------------------------------------------------------------------------------


def test_a_bit_flipped_at_the_peer_is_a_miss_and_never_published(a: Here, b: Here) -> None:
    a.flip(HASHES[3])
    assert b.load(HASHES[:8]) == 3
    assert b.holds(HASHES[:8]) == 3
    assert b.stat("peer_rejected_blocks:checksum") == 1
    a.until(lambda: a.stat("rejected_blocks:checksum") == 1, "the peer found it wrong, too")
    quiet(a, b)


def test_a_bit_flipped_on_the_way_is_a_miss_and_the_peer_keeps_its_block(a: Here, b: Here) -> None:
    b.on_the_way(Flipper)
    assert b.load(HASHES[:8]) == 0
    assert b.holds(HASHES[:8]) == 0
    assert b.stat("peer_rejected_blocks:checksum") == 8
    a.until(lambda: a.stat("reader_disagreed_blocks") == 8, "the peer looked, and found them right")
    assert a.holds(HASHES[:8]) == 8
    quiet(a, b)


def test_a_peer_whose_block_was_wrong_is_not_asked_for_it_again(a: Here, b: Here) -> None:
    b.on_the_way(Flipper)
    assert b.load(HASHES[:2]) == 0
    asked = a.stat("requests:lease")
    assert asked == 1
    for _ in range(3):
        assert b.load(HASHES[:8]) == 0
    assert a.stat("requests:lease") == asked


def test_another_peer_is_asked_for_what_one_had_wrong(start: Start, a: Here) -> None:
    c = start("c")
    c.save(HASHES[:8])
    b = start("b", a, c)
    b.until_known(16)
    a.flip(HASHES[0])
    a.flip(HASHES[5])
    assert b.load(HASHES[:8]) == 8
    assert b.stat("peer_rejected_blocks:checksum") in (0, 1, 2)
    quiet(a, b, c)


def test_bytes_of_another_block_under_the_right_name_do_not_pass(a: Here, b: Here) -> None:
    """A peer that says of one block what is true of another: its bytes, its sums, its checksum."""

    def exchange() -> None:
        ledger, host = a.node.core.ledger, a.node.core.host
        first, second = ledger.slot_of(a.key(HASHES[0])), ledger.slot_of(a.key(HASHES[1]))
        assert first is not None and second is not None
        host.view(first, SIZE)[:] = host.view(second, SIZE)
        blocks = [ledger._tree.find(a.key(block)) for block in HASHES[:2]]
        for column in (ledger._holdings.checksum, ledger._holdings.sums):
            column[blocks[0]] = column[blocks[1]]

    a.embedded.call(exchange)
    assert b.load(HASHES[:8]) == 0
    assert b.stat("peer_rejected_blocks:checksum") == 1


# --- the peer goes, or does not answer ----------------------------------------------------------


def test_a_peer_that_has_gone_is_a_miss_and_is_told_of(a: Here, b: Here) -> None:
    a.close()
    b.until(lambda: b.stat("peers:lost") == 1, "it is noticed")
    assert b.load(HASHES[:8]) == 0
    assert any("is not followed" in text and "the peer a " in text for text in b.troubles())
    quiet(b)


def test_a_peer_that_comes_back_is_asked_again(start: Start, a: Here, tmp_path: Path) -> None:
    b = start("b", peers=f"unix://{tmp_path / 'a.sock'}")
    b.until_known(8)
    a.close()
    b.until(lambda: b.stat("peers:lost") == 1, "it is noticed")
    again = start("a")
    again.save(HASHES[:4])
    b.until_known(4)
    assert b.load(HASHES[:8]) == 4
    assert b.troubles() == []


def test_a_peer_lost_in_the_middle_is_a_miss_and_nothing_half_is_seen(a: Here, b: Here) -> None:
    b.on_the_way(Losing)
    assert b.load(HASHES[:2]) == 0
    assert b.holds(HASHES[:8]) == 0
    assert b.stat("peer_failed_fetches:lost") == 1
    asked = a.stat("requests:lease")
    assert b.load(HASHES[:2]) == 0
    assert a.stat("requests:lease") == asked, "it is left alone for a while"
    quiet(a, b)


def test_another_peer_goes_on_where_one_was_lost(start: Start, a: Here) -> None:
    c = start("c")
    c.save(HASHES[:8])
    b = start("b", a, c)
    b.until_known(16)
    lost = a.node.data_addresses[0].removeprefix("tcp://")
    b.on_the_way(lambda endpoint: Losing(endpoint) if lost in endpoint.peer else endpoint)
    assert b.load(HASHES[:8]) == 8
    assert b.stat("peer_failed_fetches:lost") >= 1
    quiet(a, b, c)


@pytest.mark.slow
def test_a_transfer_that_takes_too_long_is_given_up_in_its_time(a: Here, hasty: Here) -> None:
    ended: list[str] = []
    hasty.on_the_way(lambda endpoint: Sleeper(endpoint, ended))
    began_ns = CLOCK.now_ns()
    assert hasty.load(HASHES[:2]) == 0
    assert CLOCK.now_ns() - began_ns < WAIT_MS * NS_PER_MS
    assert len(ended) == 1
    assert hasty.stat("peer_failed_fetches:late") == 1
    quiet(a, hasty)


@pytest.mark.slow
def test_a_peer_that_answers_nothing_any_more_is_given_up_in_its_time(
    a: Here, hasty: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay, as those of a process that was stopped."""

    async def nothing(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(exports.Exports, "export", nothing)
    began_ns = CLOCK.now_ns()
    assert hasty.load(HASHES[:2]) == 0
    assert CLOCK.now_ns() - began_ns < WAIT_MS * NS_PER_MS
    assert hasty.stat("peer_failed_fetches:late") == 1
    quiet(a, hasty)


# --- the peer does not give it ------------------------------------------------------------------


def test_a_peer_that_refuses_is_a_miss(a: Here, b: Here) -> None:
    b.on_the_way(Refusing)
    assert b.load(HASHES[:2]) == 0
    assert b.stat("peer_failed_fetches:refused") == 1
    quiet(a, b)


def test_a_peer_without_a_data_address_is_told_of(start: Start) -> None:
    a = start("a", data="none")
    a.save(HASHES[:8])
    b = start("b", a)
    b.until_known(8)
    assert b.load(HASHES[:2]) == 0
    assert b.stat("peer_failed_fetches:refused") == 1
    assert any("has no data address that this node can use" in text for text in b.troubles())
    quiet(a, b)


def test_what_the_peer_has_let_go_meanwhile_is_a_miss(a: Here, b: Here) -> None:
    b.stop_following()
    a.quarantine(HASHES[5])
    assert b.load(HASHES[:8]) == 5
    assert b.stat("peer_failed_fetches:gone") >= 1
    quiet(a, b)


def test_a_namespace_that_the_peer_does_not_know_is_a_miss(start: Start) -> None:
    a = start("a")
    b = start("b", a)
    a.save(HASHES[:2])
    b.until_known(2)
    a.embedded.call(a.node.core.namespaces._known.clear)
    assert b.load(HASHES[:2]) == 0
    assert b.stat("peer_failed_fetches:gone") == 1
    quiet(b)


@pytest.mark.parametrize(
    "reply",
    [
        wire.Done(),
        wire.Leased(0, 2, [], [], b"", 0, 0),
        wire.Leased(1, 3, [], [1] * 3, bytes(48), 0, 0),
        wire.Leased(1, 2, [], [1] * 2, bytes(16), 0, 0),
        wire.Exported("tcp://127.0.0.1:1", b"ticket", b"", 1_000),
        wire.Exported("nonsense", b"ticket", bytes(2 * 8 * 4), 1_000),
        wire.Failure("bad_lease", "no"),
    ],
)
def test_nonsense_of_a_peer_is_a_refusal(
    a: Here, b: Here, reply: wire.Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(reply, wire.Exported | wire.Failure):
        monkeypatch.setattr(exports.Exports, "export", lambda *_: reply)
    else:
        monkeypatch.setattr("kvcache.server.reading.Reading._grant", lambda *_: reply)
    b.channel.call(wire.TakeLease(b.namespace, b"".join(HASHES[:2]), wait_ms=WAIT_MS), deadline())
    monkeypatch.undo()
    assert b.stat("peer_failed_fetches:refused") == 1
    assert b.holds(HASHES[:2]) == 0
    quiet(a, b)


# --- this node ----------------------------------------------------------------------------------


def test_a_node_that_is_closed_while_a_fetch_runs_ends_it_first(start: Start, a: Here) -> None:
    ended: list[str] = []
    begun: list[str] = []
    b = start("patient", a, peer_wait_ms=60_000)
    b.until_known(8)
    b.on_the_way(lambda endpoint: Sleeper(endpoint, ended, begun))
    assert b.lease(HASHES[:8], wait_ms=0).coming == 8
    b.until(lambda: len(begun) == 4, "all are being read")
    began_ns = CLOCK.now_ns()
    b.close()
    assert CLOCK.now_ns() - began_ns < 30 * NS_PER_S
    assert len(ended) == 4
    quiet(a)


def test_a_reader_that_goes_while_his_blocks_come_leaves_them_to_the_next(a: Here, b: Here) -> None:
    impatient = b.connect()
    impatient.post(wire.TakeLease(b.namespace, b"".join(HASHES[:8]), wait_ms=WAIT_MS), deadline())
    b.until(lambda: a.stat("requests:lease") > 0, "the peer is asked")
    impatient.close()
    assert b.load(HASHES[:8]) == 8
    quiet(a, b)


def test_what_is_being_computed_here_is_not_fetched_as_well(a: Here, b: Here) -> None:
    reply = b.channel.call(wire.Reserve(b.namespace, b"", b"".join(HASHES[:4])), deadline())
    assert isinstance(reply, wire.Reserved)
    assert b.load(HASHES[:8], channel=b.connect(), wait_ms=50) == 0
    assert a.stat("requests:lease") == 0
    payload = [memoryview(content(block)) for block in HASHES[:4]]
    b.channel.call(wire.Write(reply.reservation, 0, 4), deadline(), payload)
    b.channel.call(wire.Abort(reply.reservation), deadline())
    assert b.load(HASHES[:8]) == 8


def test_an_address_that_is_none_of_a_control_connection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput), ExitStack() as stack:
        Here(tmp_path, "a", stack, peers="ucx://127.0.0.1:1")


def test_the_node_serves_while_none_of_its_peers_can_be_reached(start: Start) -> None:
    b = start("b", peers="tcp://127.0.0.1:1,tcp://127.0.0.1:2")
    b.save(HASHES[:4])
    assert b.load(HASHES[:8]) == 4
    b.until(lambda: len(b.troubles()) == 2, "both are told of")
