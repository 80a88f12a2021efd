"""The owner's side of ``nixl://``: reads that one peer does here, from Ask to its end.

    Ask ──take──► granted ──┬── Done ──► ended: it was good           A peer that does not answer Stop
                            ├── GaveUp ─► ended                       within the limit of silence is lost.
                            └── owner withdraws ── Stop ──► Done (refused) or GaveUp ──► ended

What is exported from registered memory the peer reads where it is; anything else he has staged, a slot's
worth at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcache.clock import NS_PER_S
from kvcache.transport.base import PeerLost, TransferRefused
from kvcache.transport.nixl_rounds import SLOT_BYTES, Slot, gather
from kvcache.transport.nixl_wire import (
    AnyMessage,
    Ask,
    Done,
    Ended,
    GaveUp,
    Granted,
    Refused,
    Stage,
    Staged,
    Stop,
)
from kvcache.transport.tickets import Use

if TYPE_CHECKING:
    from kvcache.transport.nixl_transport import NixlTransport

OPEN_MAX = 1_024
"""So many transfers a peer may have open here, in each direction."""
WITHDRAWN = "the ticket was withdrawn"


class _Read:
    def __init__(self, use: Use) -> None:
        self.use = use
        self.slot: Slot | None = None
        self.staging: asyncio.Task[None] | None = None
        self.patience: asyncio.TimerHandle | None = None

    @property
    def is_good(self) -> bool:
        return not self.use.is_stopped and not self.use.is_over


class Serving:
    """One endpoint's. ``lose`` is called when the peer does not let go."""

    def __init__(
        self, transport: NixlTransport, say: Callable[[AnyMessage], None], lose: Callable[[str], None]
    ) -> None:
        self._transport = transport
        self._agents = transport.agents
        self._say = say
        self._lose = lose
        self._reads: dict[int, _Read] = {}

    def hear(self, message: Ask | Stage | Done | GaveUp) -> None:
        """RAISES PeerLost when the peer breaks the protocol."""
        match message:
            case Ask():
                self._grant(message)
            case Stage():
                self._begin_staging(message)
            case GaveUp():
                self._end(message.call)
            case Done():
                self._finish(message.call)

    def close(self) -> None:
        """The peer is lost. May be called twice."""
        for call in list(self._reads):
            self._end(call)

    def _grant(self, ask: Ask) -> None:
        if ask.call in self._reads or len(self._reads) >= OPEN_MAX:
            raise PeerLost("it has too many reads open, or one twice")
        try:
            use = self._transport.book.take_export(ask.ticket, ask.sizes)
        except TransferRefused as error:
            self._say(Refused(ask.call, str(error)))
            return
        self._reads[ask.call] = _Read(use)
        if self._agents.is_emulated:
            self._agents.guest_came()
        places = self._agents.regions.places(use.pieces)
        self._say(Granted(ask.call, [address for address, _ in places], [device for _, device in places]))
        use.when_stopped(lambda: self._stop(ask.call))

    def _stop(self, call: int) -> None:
        """The owner wants his memory back."""
        read = self._reads.get(call)
        if read is None or read.patience is not None:
            return
        patience_s = self._transport.limits.silence_ns / NS_PER_S
        loop = asyncio.get_running_loop()
        read.patience = loop.call_later(patience_s, self._lose, "it does not let go of what it reads")
        self._say(Stop(call))

    def _finish(self, call: int) -> None:
        read = self._reads.get(call)
        if read is None or not read.is_good:
            self._say(Refused(call, WITHDRAWN))
        else:
            read.use.complete()
            self._say(Ended(call))
        self._end(call)

    def _begin_staging(self, stage: Stage) -> None:
        read = self._reads.get(stage.call)
        if read is None or not read.is_good:
            self._say(Refused(stage.call, WITHDRAWN))
            return
        total = sum(map(len, read.use.pieces))
        is_busy = read.staging is not None and not read.staging.done()
        if is_busy or stage.byte_count > SLOT_BYTES or stage.start + stage.byte_count > total:
            raise PeerLost("it asked for a stage that cannot be")
        read.staging = asyncio.ensure_future(self._put_on_stage(read, stage))

    async def _put_on_stage(self, read: _Read, stage: Stage) -> None:
        read.slot = read.slot or await self._agents.stage.take()
        gather(read.use.pieces, stage.start, read.slot.view[: stage.byte_count])
        self._say(Staged(stage.call, read.slot.place))

    def _end(self, call: int) -> None:
        """It is not read any more, or by nobody whom we know. An unknown one is over already."""
        read = self._reads.pop(call, None)
        if read is None:
            return
        if self._agents.is_emulated:
            self._agents.guest_left()
        if read.patience is not None:
            read.patience.cancel()
        if read.staging is not None:
            read.staging.cancel()
        if read.slot is not None:
            self._agents.stage.give(read.slot)
        read.use.end()
