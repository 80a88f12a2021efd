"""The peer stands still or dies in the middle of a transfer, over and over, each time in another way.

    who moves the bytes:  this side reads, or writes;   the peer reads what is exported here, or writes it
    what becomes of him:  he stands still, shorter or longer than a silence, and wakes; or he is killed

Once a call has failed, or the ticket is withdrawn, the memory has another owner; it is looked at again when
the peer is awake and whatever the network held has come. Within 3 s a transfer goes through.

The sum: a transfer takes 0.15 s of the wire, however fast the machine: what becomes of the peer within
MIDDLE_S is before its last byte is sent. A round takes 0.2 s where he wakes in time, a silence more where he
does not; a kill costs the 5 ms of a new peer.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.testing.netns import TwoHosts
from kvcache.testing.stalls import Stalls
from kvcache.testing.transport_pair import CLOCK, LATE_NS
from kvcache.transport.base import Transport
from kvcache.transport.table import open_transport
from tests.netfaults.peers import Peer, Peers
from tests.netfaults.traffic import FAILURES, Calls, Line, fence, rooms, wary

pytestmark = pytest.mark.timed

ROUNDS = 100
LIMITS = wary(300)
COUNT = 12
SIZE = 1 << 20
MOMENT_S = 0.1
MIDDLE_S = 0.04
WIRE_BYTES_PER_S = 80_000_000
PATIENCE_NS = (80 * NS_PER_MS, 1_000 * NS_PER_MS)
HEALED_NS = 3 * NS_PER_S
MOVES = ("we read", "we write", "he reads", "he writes")
FATES = ("stands for a moment", "stands for a silence", "dies")
PLAY_S = 280


class Rounds:
    """A transport, and a peer: another one when he was killed."""

    def __init__(self, transport: Transport, peers: Peers, address: str, seed: int, stalls: Stalls) -> None:
        self.calls = Calls(stalls)
        self.failed: Counter[str] = Counter()
        self.healed_ns: list[int] = []
        self._transport = transport
        self._peers = peers
        self._address = address
        self._way = random.Random(seed)
        self._call_a_peer()

    def _call_a_peer(self) -> None:
        self.peer: Peer = self._peers.start(self._address, LIMITS)
        self.line = Line(self._transport, self.peer.address, self.calls)

    async def one(self, move: str, fate: str) -> None:
        await self.line.up(CLOCK.now_ns() + HEALED_NS)
        if move in ("we read", "we write"):
            whole = await self._we_move(move, fate)
        else:
            whole = await self._he_moves(move, fate)
        self.failed[fate] += not whole
        if fate == "dies":
            self._call_a_peer()
        began_ns = self._now_ns()
        await self._heals(began_ns)
        self.healed_ns.append(self._now_ns() - began_ns)

    def _now_ns(self) -> int:
        return self.calls.stalls.awake_ns()

    async def _we_move(self, move: str, fate: str) -> bool:
        """Whether all of it was moved."""
        way = self.line.read if move == "we read" else self.line.write
        task = asyncio.ensure_future(way(COUNT, SIZE, self._way.choice(PATIENCE_NS)))
        await self._meet(fate)
        (raised,) = await asyncio.gather(task, return_exceptions=True)
        assert raised is None or isinstance(raised, FAILURES), raised
        await self._part(fate)
        return raised is None

    async def _he_moves(self, move: str, fate: str) -> bool:
        pieces, (expected, right) = rooms(COUNT, SIZE), self.calls.expected(COUNT, SIZE)
        filled: list[list[bytes]] = []
        if move == "he reads":
            for piece, data in zip(pieces, expected, strict=True):
                piece[:] = data
            ticket = self._transport.export(pieces, CLOCK.now_ns() + HEALED_NS)
        else:
            ticket = self._transport.post(
                pieces, CLOCK.now_ns() + HEALED_NS, lambda: filled.append([bytes(piece) for piece in pieces])
            )
        word = move.removeprefix("he ").removesuffix("s")
        await self.line.say(f"{word} {SIZE} {COUNT} {ticket.hex()}", CLOCK.now_ns() + HEALED_NS)
        await self._meet(fate)
        asked_ns = CLOCK.now_ns()
        await self.calls.hold("withdraw", self._transport.withdraw(ticket), asked_ns)
        was_filled = len(filled)
        assert filled in ([], [expected])
        self.calls.leave_behind(pieces)
        await self._part(fate)
        answers = await self._answers(fate)
        assert len(filled) == was_filled, "it was filled after it had been withdrawn"
        if move == "he reads":
            assert all(answer == b"has " + right for answer in answers if answer.startswith(b"has"))
        else:
            assert was_filled or b"wrote" not in answers
        return any(not answer.startswith(b"failed") for answer in answers)

    async def _meet(self, fate: str) -> None:
        """What becomes of the peer begins, at some moment."""
        await asyncio.sleep(self._way.uniform(0, MIDDLE_S))
        if fate == "dies":
            self.peer.kill()
            return
        self.peer.stop()
        if fate == "stands for a moment":
            asyncio.get_running_loop().call_later(MOMENT_S, self.peer.wake)

    async def _part(self, fate: str) -> None:
        """He is awake again, if he lives; where he stood for a silence, he was lost for it."""
        if fate == "stands for a silence":
            asked_ns = self._now_ns()
            while self.line.is_up:
                assert self._now_ns() - asked_ns < 2 * LIMITS.silence_ns + LATE_NS, "his silence is not seen"
                await asyncio.sleep(0.005)
            self.peer.wake()

    async def _answers(self, fate: str) -> list[bytes]:
        """What the peer says of what he was asked; nothing, when he is gone or lost."""
        asked_ns = self._now_ns()
        while fate == "stands for a moment" and self.line.is_up and self.line.told.empty():
            assert self._now_ns() - asked_ns < HEALED_NS, "he does not answer"
            await asyncio.sleep(0.002)
        said: list[bytes] = []
        while not self.line.told.empty():
            said.append(self.line.told.get_nowait())
        return said

    async def _heals(self, began_ns: int) -> None:
        while True:
            try:
                await self.line.read(2, 65_536, HEALED_NS - (self._now_ns() - began_ns))
                return
            except FAILURES:
                assert self._now_ns() - began_ns < HEALED_NS, "it does not heal"
                await asyncio.sleep(0.005)


class PeerFaults:
    """For a transport by its scheme. The peer is on the left, who calls is on the right."""

    scheme = ""
    rounds = ROUNDS

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_peers_that_stand_still_or_die(self, hosts: TwoHosts, factor: int) -> None:
        async def main() -> None:
            transport = open_transport(self.scheme, LIMITS)
            try:
                rounds = Rounds(transport, peers, f"{self.scheme}://{hosts.left.address}:0", 1, stalls)
                rounds.calls.expected(COUNT, SIZE)
                kinds = [(move, fate) for move in MOVES for fate in FATES]
                for at in range(self.rounds * factor):
                    await rounds.one(*kinds[at % len(kinds)])
                await fence(rounds.line)
            finally:
                await transport.close()
            rounds.calls.check()
            latest_ms, slowest_ms = rounds.calls.latest_ns() / NS_PER_MS, max(rounds.healed_ns) / NS_PER_MS
            print(f"{self.rounds * factor} rounds, failed in {dict(rounds.failed)}; the latest call ended")
            print(f"{latest_ms:.1f} ms past its deadline, the slowest healing took {slowest_ms:.0f} ms")
            assert all(rounds.failed[fate] > self.rounds // len(FATES) // 3 for fate in FATES)

        hosts.slow(WIRE_BYTES_PER_S)
        with hosts.left.run(Peers) as peers, Stalls() as stalls:
            hosts.right.run(lambda: asyncio.run(asyncio.wait_for(main(), PLAY_S * factor)))


class TestTcp(PeerFaults):
    scheme = "tcp"
