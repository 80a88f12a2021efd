"""A node without sockets, and peers who do what they may, at the worst time and in any order.

The transport (``held_transport``) touches memory for as long as it may: nonsense is written into what was
posted, and what was exported is looked at, until its withdrawal has returned. So a slot that is used again
too early shows as wrong bytes.

Invariants (``check``, after every step): every block that can be found has its bytes; so have exported
pieces; those of the node's ledger.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from random import Random

from kvcache import wire
from kvcache.block import BlockSpec, storage_key
from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.events import Publisher
from kvcache.eviction.leaf_lru import LeafLru
from kvcache.ledger import Ledger
from kvcache.namespace import shape_of
from kvcache.peers.plane import DataPlane
from kvcache.server.core import Core
from kvcache.server.handlers import Connection
from kvcache.server.identity import Identity, Peer
from kvcache.server.namespaces import Opened
from kvcache.server.session import Answer
from kvcache.sums import sum_chunks
from kvcache.testing.clock import FakeClock
from kvcache.tiers.host import HostTier
from kvcache.tiers.space import Space
from tests.server.held_transport import HeldTransport
from tests.server.talk import HASHES, example

SPEC = BlockSpec(block_tokens=16, plane_count=2, head_count=1, head_bytes=4096)
SIZE = SPEC.block_bytes
CHAINS = [HASHES[0:6], HASHES[6:12], HASHES[12:18]]
CAPACITY_BLOCKS = 10
ROLES = frozenset({"reader", "writer", "peer"})
TURNS = 12


def content(block: bytes) -> bytes:
    return b"".join(block[:1] + at.to_bytes(3, "little") for at in range(SIZE // 4))


class InlineCore(Core):
    """It sums without a thread, so that a test has one order of events."""

    async def sum_chunks(self, views: Sequence[memoryview], chunk_bytes: int) -> bytes:
        await asyncio.sleep(0)
        return sum_chunks(views, chunk_bytes)


class Client:
    """One connection, as a session drives it: a request at a time, and its end whenever."""

    def __init__(self, world: World, owner: int, mapped: bool) -> None:
        identity = Identity(owner, "default", ROLES, world.arena, mapped, Peer(0, -1))
        self.owner = owner
        self.mapped = mapped
        self.leases: dict[int, int] = {}  # blocks of each
        self.reservations: dict[int, list[bytes]] = {}
        self.slots: dict[int, list[memoryview]] = {}
        self.posted: dict[bytes, tuple[int, range, range]] = {}
        self.connection = Connection(world.core, identity, lambda *_: None)
        self.refused = world.refused
        self.busy: asyncio.Task[Answer | None] | None = None

    def views(self) -> list[memoryview]:
        """The slots of all that it has reserved, and not ended."""
        return [view for number in self.reservations for view in self.slots[number]]

    def ask(self, request: wire.Request, answered: Callable[[wire.Reply], None]) -> None:
        """A refusal is an answer too."""
        try:
            answer = self.connection.answer(0, request)
        except BadInput as error:
            self.refused[error.code] += 1
            return
        if isinstance(answer, Coroutine):
            self.busy = asyncio.get_running_loop().create_task(self._later(answer, answered))
        else:
            assert isinstance(answer, wire.Message)
            answered(answer)

    async def _later(
        self, answer: Coroutine[None, None, Answer], answered: Callable[[wire.Reply], None]
    ) -> Answer | None:
        try:
            done = await answer
        except BadInput as error:
            self.refused[error.code] += 1
            done = None
        self.busy = None
        if isinstance(done, wire.Message):
            answered(done)
        return done


class World:
    """Steps are drawn by ``random``. Use ``run``."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.clock = FakeClock()
        self.transport = HeldTransport()
        self.core = self._core()
        namespace = example(shape=shape_of(SPEC), tenant="default")
        self.opened: Opened = self.core.namespaces.open(namespace, SPEC)[0]
        self.arena = self.core.arena(1, "default")
        self._owners = 0
        self.refused: Counter[str] = Counter()
        self.clients = [self._client(at % 2 == 1) for at in range(4)]
        self.gone: list[Client] = []  # whose process may still write
        self.done: Counter[str] = Counter()

    def _core(self) -> Core:
        config = NodeConfig(capacity=f"{CAPACITY_BLOCKS * SIZE}B", unit=f"{SIZE}B", http="none")
        space = Space(config.capacity_bytes, config.unit_bytes)
        host = HostTier(config.capacity_bytes, config.unit_bytes)
        plane = DataPlane([self.transport.address], self.clock, opener=lambda *_: self.transport)
        return InlineCore(config, Ledger(space, LeafLru), space, host, Publisher("n", 1), self.clock, plane)

    def _client(self, mapped: bool) -> Client:
        self._owners += 1
        return Client(self, self._owners, mapped)

    async def run(self, steps: int) -> None:
        await self.core.plane.start()
        self.core.settle()
        for step in self.random.choices(list(STEPS), list(STEPS.values()), k=steps):
            self.done[step.__name__] += step(self)
            await self.turn()
        self.done["committed"] = self.core.counters["stored_blocks:committed"]
        await self.end()

    async def turn(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)
        self.check()

    async def end(self) -> None:
        """Everybody goes, and then nothing is held."""
        for at in range(len(self.clients)):
            self._leave(at)
        await self.turn()
        while self.gone:
            self.process_ends()
        while self.withdrawal_returns():
            await self.turn()
        stats = self.core.stats()
        for name in ("leases", "reservations", "limbo_blocks", "tickets"):
            assert stats[name] == 0, name
        for client in self.clients:
            self._end(client)
        await self.core.uses.close()
        await self.core.tickets.close()
        await self.core.plane.close()
        self.core.close()

    def check(self) -> None:
        for out in self.transport.out.values():
            out.check()
        for chain in CHAINS:
            for block in chain:
                slot = self.core.ledger.slot_of(storage_key(self.opened.namespace_id, block))
                if slot is not None:
                    assert self.core.host.view(slot, SIZE) == content(block), "a block has other bytes"
        self.core.check()

    # --- what readers do ------------------------------------------------------------------------

    def lease(self) -> bool:
        client, blocks = self._idle(lambda each: len(each.leases) < 2), self._blocks()
        if client is None:
            return False

        def answered(reply: wire.Reply) -> None:
            assert isinstance(reply, wire.Leased)
            if reply.count:
                client.leases[reply.lease] = reply.count

        name = self.random.choice(["", "", "shared"])
        duration_ms = self.random.choice([1, 2_000, 30_000])
        client.ask(wire.TakeLease(self._id, b"".join(blocks), name, duration_ms), answered)
        return True

    def export(self) -> bool:
        client = self._idle(lambda each: bool(each.leases))
        if client is None:
            return False
        lease, count = self.random.choice(list(client.leases.items()))
        start = self.random.randrange(count)
        plane = self.random.randrange(2)
        request = wire.Export(lease, start, self.random.randint(1, count - start), "held", plane)
        before = len(self.transport.out)
        client.ask(request, lambda _: None)
        return len(self.transport.out) > before

    def release(self) -> bool:
        client = self._idle(lambda each: bool(each.leases))
        if client is None:
            return False
        lease = self.random.choice(list(client.leases))
        del client.leases[lease]
        client.ask(wire.Release(lease, self.random.choice([[], [], [0]])), lambda _: None)
        return True

    # --- what writers do ------------------------------------------------------------------------

    def reserve(self) -> bool:
        client, blocks = self._idle(lambda each: len(each.reservations) < 2), self._blocks()
        if client is None:
            return False

        def answered(reply: wire.Reply) -> None:
            assert isinstance(reply, wire.Reserved)
            if reply.count:
                mine = blocks[reply.start : reply.start + reply.count]
                client.reservations[reply.reservation] = mine
                slots = self.core.ledger.reserved(reply.reservation, client.owner).slots
                client.slots[reply.reservation] = [self.core.host.view(slot, SIZE) for slot in slots]

        client.ask(wire.Reserve(self._id, b"", b"".join(blocks)), answered)
        return True

    def post(self) -> bool:
        client = self._idle(lambda each: bool(each.reservations))
        if client is None:
            return False
        number, mine = self.random.choice(list(client.reservations.items()))
        whole = self.random.random() < 0.7
        start = 0 if whole else self.random.randrange(len(mine))
        end = len(mine) if whole else self.random.randint(start + 1, len(mine))
        planes = range(2) if whole else self.random.choice([range(2), range(1), range(1, 2)])

        def answered(reply: wire.Reply) -> None:
            assert isinstance(reply, wire.Posted)
            client.posted[reply.ticket] = (number, range(start, end), planes)

        client.ask(wire.Post(number, start, end - start, "held", planes.start, len(planes)), answered)
        return True

    def fill(self) -> bool:
        """The peer writes what he should, all of it."""
        tickets = [
            (client, ticket)
            for client in self.clients
            for ticket, (number, _, _) in client.posted.items()
            if number in client.reservations and ticket in self.transport.out
        ]
        if not tickets:
            return False
        client, ticket = self.random.choice(tickets)
        out = self.transport.out[ticket]
        number, blocks, planes = client.posted.pop(ticket)
        step = SPEC.plane_bytes
        data = b"".join(
            content(client.reservations[number][at])[planes.start * step : planes.stop * step]
            for at in blocks
        )
        for piece in out.pieces:
            piece[:], data = data[: len(piece)], data[len(piece) :]
        assert out.filled is not None
        if out.returned is None:
            out.is_done = True
            out.filled()
        return True

    def scribble(self) -> bool:
        """Somebody writes nonsense where he may: a peer with a ticket, a process whose connection is gone."""
        if self.gone and self.random.random() < 0.5:
            for view in self.random.choice(self.gone).views():
                view[:] = b"\xdd" * len(view)
        elif self.transport.out:
            self.random.choice(list(self.transport.out.values())).scribble()
        return bool(self.transport.out)

    def commit(self) -> bool:
        client = self._idle(lambda each: bool(each.reservations))
        if client is None:
            return False
        number, mine = self.random.choice(list(client.reservations.items()))

        def answered(reply: wire.Reply) -> None:
            assert isinstance(reply, wire.Committed)
            client.reservations.pop(number, None)

        data = [content(block) for block in mine]
        if client.mapped:  # It has written all of it over the map.
            for view, block in zip(client.slots[number], data, strict=True):
                view[:] = block
        sums = sum_chunks(data, SPEC.chunk_bytes)
        client.ask(wire.Commit(number, sums), answered)
        return True

    def abort(self) -> bool:
        client = self._idle(lambda each: bool(each.reservations))
        if client is None:
            return False
        number = self.random.choice(list(client.reservations))
        del client.reservations[number]
        client.ask(wire.Abort(number), lambda _: None)
        return True

    # --- what happens to them -------------------------------------------------------------------

    def disconnect(self) -> bool:
        ready = [at for at, client in enumerate(self.clients) if client.leases or client.reservations]
        if ready:
            self._leave(self.random.choice(ready))
        return bool(ready)

    def process_ends(self) -> bool:
        if not self.gone:
            return False
        client = self.gone.pop(self.random.randrange(len(self.gone)))
        self.core.uses.writes_ended(client.owner)
        return True

    def withdrawal_returns(self) -> bool:
        waiting = [ticket for ticket, out in self.transport.out.items() if out.returned is not None]
        if waiting:
            self.transport.let_return(self.random.choice(waiting))
        return bool(waiting)

    def time_goes_on(self) -> bool:
        self.clock.advance_ms(self.random.choice([1, 500, 5_000]))
        self.core.expire()
        return True

    @property
    def _id(self) -> bytes:
        return self.opened.namespace_id

    def _blocks(self) -> list[bytes]:
        chain = self.random.choice(CHAINS)
        return chain[: self.random.randint(1, len(chain))]

    def _idle(self, fits: Callable[[Client], bool]) -> Client | None:
        idle = [client for client in self.clients if client.busy is None and fits(client)]
        return self.random.choice(idle) if idle else None

    def _leave(self, at: int) -> None:
        client = self.clients[at]
        self.clients[at] = self._client(client.mapped)
        self._end(client)

    def _end(self, client: Client) -> None:
        if client.busy is not None:
            client.busy.cancel()
        client.connection.ended()
        if client.connection.kept_aside:  # As the node's shell does.
            if client.mapped:
                self.gone.append(client)
            else:
                self.core.uses.writes_ended(client.owner)


STEPS = {
    World.lease: 4,
    World.export: 4,
    World.release: 4,
    World.reserve: 8,
    World.post: 6,
    World.fill: 8,
    World.scribble: 4,
    World.commit: 6,
    World.abort: 2,
    World.disconnect: 2,
    World.process_ends: 2,
    World.withdrawal_returns: 5,
    World.time_goes_on: 1,
}
"""Each with how often it is tried."""
