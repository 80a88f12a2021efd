"""An endpoint of ``ucx://``: frames on one connection, bytes on another that can be cut and opened anew.

UCX cannot take back a receive whose message has begun to come; only to end the connection ends it. So the
bytes have a connection of their own, the *lane*: a transfer that does not end in time (its peer stands still)
costs the lane and not the endpoint. Who connected opens the next lane; what else was on the old one is
refused, and asked for again by whoever wants it.

    up ── BYE, silence, broken frames' connection, nonsense ──► lost        lane 1 ── cut ──► lane 2 ── ...

* Memory is touched only through a lane, and a lane's ``cut`` returns when its messages have ended.
* A call that is late or cancelled asks its peer to stop and waits ``GRACE_NS`` for what is under way; then
  it cuts the lane. So it is over well within the 250 ms that the contract gives.

Nothing here knows the library: see ``kvcache.transport.ucx``.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

from kvcache.clock import NS_PER_MS, NS_PER_S, Clock
from kvcache.transport.base import NOTE_BYTES_MAX, Limits, Note, PeerLost, Priority, Ticket, TransferRefused
from kvcache.transport.flow import Flow, until
from kvcache.transport.pulse import Pulse
from kvcache.transport.tickets import Book
from kvcache.transport.ucx_frames import (
    CONTROL,
    FRAME_BYTES_MAX,
    LIFE,
    Frame,
    Kind,
    pack,
    pack_request,
    parse,
    parse_request,
    why_bytes,
)
from kvcache.transport.ucx_lane import DataLane, Wire
from kvcache.transport.ucx_streams import WINDOW_MESSAGES, Part, Sink, Source

GRACE_NS = 120 * NS_PER_MS
BYE_NS = 250 * NS_PER_MS
PARKED_MAX = 1_000


class Shared:
    """What the endpoints of one transport have in common."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self.limits = limits
        self.clock = clock
        self.flow = Flow(limits, clock)
        self.book = Book(clock)
        self.endpoints: set[UcxEndpoint] = set()
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        """Run it to its end, which ``close`` waits for. REQUIRES: it does not raise."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task


class UcxEndpoint:
    """Begin with ``start``."""

    def __init__(
        self,
        shared: Shared,
        peer: str,
        note: Note,
        wire: Wire,
        tags: tuple[int, int],
        open_lane: Callable[[int], Awaitable[Wire]] | None,
    ) -> None:
        """``tags``: the bases of what comes here and of what goes to the peer. ``open_lane``: None for who
        was connected to; RAISES PeerLost."""
        self._shared = shared
        self._peer = peer
        self._note = note
        self._wire = wire
        self._tags = tags
        self._open = open_lane
        self._why_lost = ""
        self._lost = asyncio.Event()
        self._ended = asyncio.Event()
        self._gate = shared.flow.gate()
        self._pulse = Pulse(shared.limits, shared.clock, self._beat, self.lose)
        self._lane: DataLane | None = None
        self._lane_number = 0
        self._lane_came = asyncio.Event()
        self._opening: asyncio.Task[None] | None = None
        self._next_transfer = 1 if open_lane is not None else 2
        self._sinks: dict[int, Sink] = {}
        self._sources: dict[int, Source] = {}
        self._parked: dict[int, list[Frame]] = defaultdict(list)
        self._serve = {Kind.READ: self._serve_read, Kind.WRITE: self._serve_write}

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def is_lost(self) -> bool:
        return bool(self._why_lost)

    def start(self) -> None:
        self._shared.endpoints.add(self)
        self._pulse.start()
        self._shared.spawn(self._listen())
        self._want_lane()

    async def read(
        self,
        ticket: Ticket,
        into: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        assert all(not view.readonly for view in into), "what is read into will be written"
        sizes = [len(view) for view in into]
        async with self._gate.hold(sum(sizes), priority, deadline_ns):
            lane = await self._some_lane()
            sink = Sink(lane, self._new_transfer(), into)
            self._keep(self._sinks, sink, lane)
            request = pack_request(ticket, sizes)
            self.tell(Frame(Kind.READ, sink.transfer, sink.open(), request, lane.number))
            await self._end_of(sink, lane)

    async def write(
        self,
        ticket: Ticket,
        pieces: Sequence[memoryview],
        deadline_ns: int,
        priority: Priority = Priority.DECODE,
    ) -> None:
        sizes = [len(view) for view in pieces]
        async with self._gate.hold(sum(sizes), priority, deadline_ns):
            lane = await self._some_lane()
            source = Source(lane, self._new_transfer(), pieces, is_ours=True)
            self._sources[source.transfer] = source
            lane.add(source)
            self.tell(Frame(Kind.WRITE, source.transfer, 0, pack_request(ticket, sizes), lane.number))
            await self._end_of(source, lane)

    async def notify(self, note: bytes, deadline_ns: int) -> None:
        assert len(note) <= NOTE_BYTES_MAX, "a note is for few bytes"
        async with until(deadline_ns, self._shared.clock):
            self._look()
            told = self._tell(Frame(Kind.NOTE, payload=bytes(note)))
            lost = asyncio.create_task(self._when_lost())
            try:
                await asyncio.wait([told, lost], return_when=asyncio.FIRST_COMPLETED)
            finally:
                lost.cancel()
            self._look()

    async def close(self) -> None:
        if not self._why_lost:
            self._give_up("this side closed it")
            self.tell(Frame(Kind.BYE))  # He cuts the wire when he has it, and all notes before it.
            self._shared.spawn(self._cut_after_bye())
        await self.ended()

    async def ended(self) -> None:
        """Until it is lost and nothing is left of it."""
        await self._ended.wait()

    def tell(self, frame: Frame) -> None:
        self._tell(frame)

    def _tell(self, frame: Frame) -> asyncio.Future[None]:
        self._pulse.said()
        return self._wire.send(self._tags[1] | CONTROL, memoryview(pack(frame)))

    def lose(self, why: str) -> None:
        """The peer is of no use any more. May be called twice."""
        if not self._why_lost:
            self._give_up(why)
            self._shared.spawn(self._cut())

    def lane_came(self, number: int, wire: Wire) -> None:
        """The peer has opened this lane."""
        if self._why_lost or number <= self._lane_number:
            self._shared.spawn(wire.cut())
            return
        if self._lane is not None:
            self._lane.cut("the peer opened another lane")
        self._lane = DataLane(self, number, wire, self._tags)
        self._lane_number = number
        self._lane_came.set()
        for old in [parked for parked in self._parked if parked <= number]:
            for frame in self._parked.pop(old):
                self._serve[frame.kind](frame)

    def lane_ended(self, lane: DataLane) -> None:
        self._shared.spawn(lane.wire.cut())
        if self._lane is lane:
            self._lane = None
            self._lane_came.clear()
            self._want_lane()

    def _want_lane(self) -> None:
        if self._open is not None and not self._why_lost:
            self._opening = self._shared.spawn(self._open_next_lane(self._open))

    def _give_up(self, why: str) -> None:
        self._why_lost = why
        self._pulse.stop()
        self._gate.close(why)
        self._lost.set()
        self._lane_came.set()
        if self._opening is not None:
            self._opening.cancel()
        for part in [*self._sinks.values(), *self._sources.values()]:
            part.fail(why)

    async def _cut_after_bye(self) -> None:
        broken = self._wire.receive(self._tags[0] | LIFE, memoryview(bytearray(8)))
        await asyncio.wait([broken], timeout=BYE_NS / NS_PER_S)
        await self._cut()

    async def _cut(self) -> None:
        if (lane := self._lane) is not None:
            lane.cut(self._why_lost)
            await lane.wire.cut()
        await self._wire.cut()
        self._shared.endpoints.discard(self)
        self._ended.set()

    async def _when_lost(self) -> None:
        await self._lost.wait()

    async def _open_next_lane(self, open_lane: Callable[[int], Awaitable[Wire]]) -> None:
        number = self._lane_number + 1
        while not self._why_lost:
            try:
                wire = await open_lane(number)
            except PeerLost:
                number += 1  # The peer may have seen it, and a number is good once.
                await asyncio.sleep(self._shared.limits.heartbeat_ns / NS_PER_S)
                continue
            self.lane_came(number, wire)
            return

    async def _some_lane(self) -> DataLane:
        """RAISES PeerLost."""
        while self._lane is None and not self._why_lost:
            await self._lane_came.wait()
        self._look()
        assert self._lane is not None, "a lane came"
        return self._lane

    async def _end_of(self, part: Part, lane: DataLane) -> None:
        """RAISES what the part ends with. When cancelled, no message is under way when this returns."""
        try:
            await asyncio.wait([part.done])
        except asyncio.CancelledError:
            part.stop("the caller gave it up")
            self._hurry(part, lane)
            while not part.done.done():
                try:
                    await asyncio.wait([part.done])
                except asyncio.CancelledError:
                    continue  # The first one is raised below; his memory comes first.
            raise
        part.done.result()

    def _hurry(self, part: Part, lane: DataLane) -> None:
        """It was told to stop: when it does not, cut the lane."""
        if not part.done.done():
            timer = asyncio.get_running_loop().call_later(
                GRACE_NS / NS_PER_S, lane.cut, "the lane was cut to end another transfer"
            )
            part.done.add_done_callback(lambda _: timer.cancel())

    async def _listen(self) -> None:
        """Hear the peer's frames until the endpoint is lost."""
        message = memoryview(bytearray(FRAME_BYTES_MAX))
        try:
            while True:
                await self._wire.receive(self._tags[0] | CONTROL, message)
                self._pulse.heard()
                frame = parse(message)
                if not self._why_lost:
                    self._hear(frame)
        except PeerLost as error:
            self.lose(str(error))

    def _hear(self, frame: Frame) -> None:
        """RAISES PeerLost when the frame breaks the protocol."""
        why = frame.payload.decode(errors="replace")
        if frame.kind is Kind.NOTE:
            self._note(self, frame.payload)
        elif frame.kind is Kind.BYE:
            raise PeerLost("the peer closed it")
        elif frame.kind in self._serve:
            self._asked(frame)
        elif frame.kind is Kind.CREDIT and (source := self._sources.get(frame.transfer)):
            source.credit(frame.value)
        elif frame.kind is Kind.END and (sink := self._sinks.get(frame.transfer)):
            sink.end(frame.value == 1, why)
        elif frame.kind is Kind.FIN and (source := self._sources.pop(frame.transfer, None)):
            source.finish(frame.value == 1, why)
        elif frame.kind is Kind.STOP:
            self._stopped(frame.transfer)

    def _stopped(self, transfer: int) -> None:
        """The sink wants no more. It is told of an end, whatever this side has said before."""
        if source := self._sources.get(transfer):
            source.stop("the peer gave it up")
        for lane, frames in list(self._parked.items()):
            frames[:] = [frame for frame in frames if frame.transfer != transfer]
            if not frames:
                del self._parked[lane]
        self.tell(Frame(Kind.END, transfer, 0, why_bytes("the peer gave it up")))

    def _asked(self, frame: Frame) -> None:
        if frame.lane <= self._lane_number:
            self._serve[frame.kind](frame)
        elif sum(map(len, self._parked.values())) < PARKED_MAX:
            # A lane opens at one side before the other, and what is asked on it may come before it.
            self._parked[frame.lane].append(frame)
        else:
            raise PeerLost("it asks for transfers on a lane that is none")

    def _serve_read(self, frame: Frame) -> None:
        ticket, sizes = parse_request(frame.payload)
        lane = self._lane
        if lane is None or lane.number != frame.lane:
            self.tell(Frame(Kind.END, frame.transfer, 0, why_bytes("its lane was cut")))
            return
        try:
            use = self._shared.book.take_export(ticket, sizes)
        except TransferRefused as error:
            source = Source(lane, frame.transfer, [], is_ours=False)
            self._sources[frame.transfer] = source
            source.stop(str(error))
        else:
            source = Source(lane, frame.transfer, use.pieces, is_ours=False)
            self._sources[frame.transfer] = source
            lane.add(source)
            source.done.add_done_callback(lambda _: use.end())
            use.when_stopped(lambda: self._withdrawn(source, lane))
        if frame.value > WINDOW_MESSAGES:
            raise PeerLost("it gave a credit that cannot be")
        source.credit(frame.value)

    def _serve_write(self, frame: Frame) -> None:
        ticket, sizes = parse_request(frame.payload)
        lane = self._lane
        try:
            if lane is None or lane.number != frame.lane:
                raise TransferRefused("its lane was cut")
            use = self._shared.book.take_post(ticket, sizes)
        except TransferRefused as error:
            self.tell(Frame(Kind.FIN, frame.transfer, 0, why_bytes(str(error))))
            return
        sink = Sink(lane, frame.transfer, use.pieces, use.complete)
        self._keep(self._sinks, sink, lane)
        sink.done.add_done_callback(lambda _: use.end())
        use.when_stopped(lambda: self._withdrawn(sink, lane))
        self.tell(Frame(Kind.CREDIT, frame.transfer, sink.open()))

    def _withdrawn(self, part: Part, lane: DataLane) -> None:
        part.stop("the ticket was withdrawn")
        self._hurry(part, lane)

    def _keep(self, parts: dict[int, Sink], part: Sink, lane: DataLane) -> None:
        parts[part.transfer] = part
        lane.add(part)
        part.done.add_done_callback(lambda _: parts.pop(part.transfer, None))

    def _new_transfer(self) -> int:
        while True:
            number = self._next_transfer
            self._next_transfer = number + 2 if number + 2 < LIFE else 2 - number % 2
            if number not in self._sinks and number not in self._sources:
                return number

    def _beat(self) -> None:
        self.tell(Frame(Kind.BEAT))

    def _look(self) -> None:
        if self._why_lost:
            raise PeerLost(self._why_lost)
