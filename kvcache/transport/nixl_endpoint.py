"""One connection of ``nixl://``: a control socket, and a path to the peer's serving agent.

Every transfer is a one-sided *read*, done by the side whose memory it changes: a write asks the peer to
read. So memory changes only by reads of its own process, which can end them; a peer that was given up on
cannot write here late.

    read    Ask ──► Granted ──► rounds ... ──► Done ──► Ended        Only Ended makes it good: the owner
            └─ Refused          └─ Stop, late, cancelled ──► GaveUp   had not taken his memory back.

What the owner cannot do is to see, or to end, a read of a peer that he has lost: such a peer may read until
he notices. What he reads he has to throw away, because nobody says Ended to him.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, TypeVar

from kvcache.transport.base import NOTE_BYTES_MAX, Note, PeerLost, Priority, Ticket, TransferRefused
from kvcache.transport.flow import until
from kvcache.transport.nixl_lane import Lane, unless
from kvcache.transport.nixl_rounds import SLOT_BYTES, SMALL, apart, in_a_row, length_of, rounds, scatter
from kvcache.transport.nixl_serving import OPEN_MAX, WITHDRAWN, Serving
from kvcache.transport.nixl_wire import (
    PIECES_MAX,
    PROBE_BYTES,
    VERSION,
    Answer,
    AnyMessage,
    Ask,
    Beat,
    Control,
    Done,
    Ended,
    Filled,
    GaveUp,
    Granted,
    Hello,
    Memory,
    Push,
    Refused,
    Stage,
    Staged,
    Stop,
    Wired,
    Wiring,
)
from kvcache.transport.nixl_wire import Note as NoteMessage
from kvcache.transport.pulse import Pulse
from kvcache.transport.tickets import Use

if TYPE_CHECKING:
    from kvcache.transport.nixl_rounds import Place, Span
    from kvcache.transport.nixl_transport import NixlTransport

ROUND_BYTES = 32 << 20
TAKE_BACK_S = FAREWELL_S = 0.1

_T = TypeVar("_T")


class NixlEndpoint:
    """Use ``NixlTransport.connect``. ``path`` is to the peer."""

    def __init__(self, transport: NixlTransport, control: Control, peer: str, note: Note) -> None:
        self._transport = transport
        self._agents = transport.agents
        self._control = control
        self._peer = peer
        self._note = note
        self._why_lost = ""
        self._lost = asyncio.Event()
        self._gate = transport.flow.gate()
        self._pulse = Pulse(transport.limits, transport.clock, lambda: self._say(Beat()), self.lose)
        self._lane: Lane | None = None
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._stopped: dict[int, bool] = {}
        self._serving = Serving(transport, self._say, self.lose)
        self._tasks: set[asyncio.Task[None]] = set()
        self._wired = asyncio.Event()
        self._telling = asyncio.Lock()
        self._is_served = False
        self._is_greeted = False
        self._untold: list[bytes] = []
        self._pulls = 0
        self._no_pulls = asyncio.Event()
        self._no_pulls.set()

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def is_lost(self) -> bool:
        return bool(self._why_lost)

    async def start(self) -> None:
        """Say hello, and make both paths. RAISES PeerLost. REQUIRES: called once, before all else."""
        agents = self._agents
        description = await agents.description()
        self._control.send(Hello(VERSION, description, agents.probe_place, agents.probe))
        self._is_greeted = True
        for untold in self._untold:
            self._say(Memory(untold))
        hello = await self._control.receive()
        if not isinstance(hello, Hello) or hello.version != VERSION or len(hello.probe) != PROBE_BYTES:
            raise PeerLost(f"it does not speak version {VERSION} of nixl://")
        self._lane = Lane(agents, hello, self._say, self._check, self._lost)
        self._pulse.start()
        self._serve_wiring()
        self._task(self._listen())
        await self._lane.wire()
        await self._unless_lost(self._wired.wait())

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        async with self._gate.hold(sum(map(len, into)), priority, deadline_ns):
            await self._pull(ticket, into)

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        sizes = [len(piece) for piece in pieces]
        assert len(sizes) <= PIECES_MAX, "a transfer has a written limit of pieces"
        async with self._gate.hold(sum(sizes), priority, deadline_ns):
            source = self._transport.export(pieces, deadline_ns)
            call = next(self._numbers)
            try:
                await self._ask(Push(call, ticket, source, sizes))
            finally:
                await self._transport.take_back(source, TAKE_BACK_S)

    async def notify(self, note: bytes, deadline_ns: int) -> None:
        assert len(note) <= NOTE_BYTES_MAX, "a note is for few bytes"
        async with until(deadline_ns, self._transport.clock), self._telling:
            await self._unless_lost(self._control.drained())
            self._check()
            self._say(NoteMessage(bytes(note)))
            self._check()

    async def close(self) -> None:
        self.lose("this side closed it")
        if self._tasks:
            await asyncio.wait(self._tasks)

    def remember(self, description: bytes) -> None:
        """More memory is registered here: tell the peer, behind the greeting."""
        if self._is_greeted:
            self._say(Memory(description))
        else:
            self._untold.append(description)

    def lose(self, why: str) -> None:
        """Of no use any more. May be called twice."""
        if self._why_lost:
            return
        self._why_lost = why
        self._lost.set()
        self._pulse.stop()
        self._gate.close(why)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(PeerLost(why))
                answer.exception()  # Seen: a caller that was cancelled will not look at it.
        self._serving.close()
        self._serve_no_wiring()
        self._control.close()
        self._task(self._leave())

    # --- reading --------------------------------------------------------------------------------

    async def _pull(self, ticket: bytes, into: Sequence[memoryview]) -> None:
        """Read what the peer exports. Nothing is in flight when it returns or raises."""
        self._check()
        sizes = [len(view) for view in into]
        assert len(sizes) <= PIECES_MAX, "a transfer has a written limit of pieces"
        call = next(self._numbers)
        self._stopped[call] = False
        self._pulls += 1
        self._no_pulls.clear()
        is_done = False
        try:
            granted = await self._ask(Ask(call, ticket, sizes))
            if not isinstance(granted, Granted) or not granted.fits(len(sizes)):
                raise self._broken("it granted something else")
            await self._carry(call, granted.places, into)
            is_done = True
            await self._ask(Done(call))
        finally:
            self._pulls -= 1
            if not self._pulls:
                self._no_pulls.set()
            del self._stopped[call]
            if not is_done:
                self._say(GaveUp(call))

    async def _carry(self, call: int, places: Sequence[Place], into: Sequence[memoryview]) -> None:
        """All rounds. ``places``: of the peer's pieces, none when he stages them."""
        own = self._agents.regions.places(into)
        round_bytes = ROUND_BYTES if places and own else SLOT_BYTES
        slot = None if own else await self._unless_lost(self._agents.bounce.take())
        try:
            for start, cuts in rounds([len(view) for view in into], round_bytes):
                length = length_of(cuts)
                place = 0 if places else await self._stage(call, start, length)
                remote = apart(places, cuts) if places else [(place, length, SMALL)]
                local = apart(own, cuts) if slot is None else [(slot.place, length, SMALL)]
                if len(local) != len(remote):  # One side in pieces, the other in a row.
                    remote = remote if places else in_a_row(place, cuts)
                    local = local if slot is None else in_a_row(slot.place, cuts)
                await self._round(call, local, remote)
                if slot is not None:
                    scatter(slot.view[:length], cuts, into)
        finally:
            if slot is not None:
                self._agents.bounce.give(slot)

    async def _stage(self, call: int, start: int, length: int) -> int:
        staged = await self._ask(Stage(call, start, length))
        if not isinstance(staged, Staged):
            raise self._broken("it staged nothing")
        return staged.place

    async def _round(self, call: int, local: Sequence[Span], remote: Sequence[Span]) -> None:
        def look() -> None:
            self._check()
            if self._stopped[call]:
                raise TransferRefused(WITHDRAWN)

        look()
        try:
            await self._there.read(local, remote, look)
        except PeerLost as error:
            self.lose(str(error))
            raise
        look()

    # --- what the peer says -----------------------------------------------------------------------

    async def _listen(self) -> None:
        try:
            while True:
                message = await self._control.receive()
                if self.is_lost:
                    return  # What still lay in the buffer.
                self._pulse.heard()
                self._hear(message)
        except PeerLost as error:
            self.lose(str(error))
        finally:
            self.lose("it is not listened to any more")

    def _hear(self, message: AnyMessage) -> None:
        match message:
            case Beat():
                return
            case NoteMessage():
                if len(message.note) > NOTE_BYTES_MAX:
                    raise PeerLost("it sent a note that is too long")
                self._note(self, message.note)
            case Granted() | Staged() | Ended() | Refused() | Filled():
                answer = self._answers.get(message.call)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Stop():
                if message.call in self._stopped:
                    self._stopped[message.call] = True
            case Memory():
                self._there.renew(message.description)
            case Wiring():
                self._serve_wiring()
            case Wired():
                self._serve_no_wiring()
                self._wired.set()
            case Ask() | Stage() | Done() | GaveUp():
                self._serving.hear(message)
            case Push():
                self._accept(message)
            case _:
                raise PeerLost("it said hello twice")

    def _accept(self, push: Push) -> None:
        if len(self._tasks) > OPEN_MAX:
            raise PeerLost("it has too many writes open")
        try:
            use = self._transport.book.take_post(push.ticket, push.sizes)
        except TransferRefused as error:
            self._say(Refused(push.call, str(error)))
            return
        task = self._task(self._fill(push, use))

        def stop() -> None:
            task.cancel()

        use.when_stopped(stop)

    async def _fill(self, push: Push, use: Use) -> None:
        """Read what the peer pushes."""
        why = WITHDRAWN
        try:
            await self._pull(push.source, use.pieces)
            why = "" if not use.is_stopped else why
        except TransferRefused as error:
            why = str(error)
        finally:
            if why or self.is_lost:
                use.end()
                self._say(Refused(push.call, why))
        if not why and not self.is_lost:
            use.complete()
            self._say(Filled(push.call))

    # --- small things ---------------------------------------------------------------------------

    async def _ask(self, message: Ask | Stage | Done | Push) -> Answer:
        """RAISES TransferRefused, PeerLost."""
        self._check()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[message.call] = answer
        try:
            self._say(message)
            got = await answer
        finally:
            del self._answers[message.call]
        if isinstance(got, Refused):
            raise TransferRefused(got.why)
        return got

    def _say(self, message: AnyMessage) -> None:
        """Nothing, when the endpoint is lost; it is lost when the peer reads nothing."""
        if self.is_lost:
            return
        try:
            self._control.send(message)
            self._pulse.said()
        except PeerLost as error:
            self.lose(str(error))

    @property
    def _there(self) -> Lane:
        assert self._lane is not None, "an endpoint is started before it is used"
        return self._lane

    def _check(self) -> None:
        if self._why_lost:
            raise PeerLost(self._why_lost)

    def _broken(self, why: str) -> PeerLost:
        """The peer broke the protocol."""
        self.lose(why)
        return PeerLost(why)

    def _serve_wiring(self) -> None:
        if not self._is_served and not self.is_lost:
            self._is_served = True
            self._agents.guest_came()

    def _serve_no_wiring(self) -> None:
        if self._is_served:
            self._is_served = False
            self._agents.guest_left()

    async def _unless_lost(self, waiting: Coroutine[object, object, _T]) -> _T:
        return await unless(self._lost, waiting, self._check)

    async def _leave(self) -> None:
        """Nothing of this endpoint runs any more, here or in the agents."""
        await self._no_pulls.wait()
        if self._lane is not None:
            await self._lane.leave()
        await self._control.closed(FAREWELL_S)
        self._transport.left(self)

    def _task(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Its PeerLost loses the endpoint."""
        task = asyncio.ensure_future(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except PeerLost as error:
            self.lose(str(error))
