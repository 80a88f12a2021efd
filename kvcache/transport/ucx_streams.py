"""One transfer's two ends over tagged messages: the sink posts receives and gives credit, the source pays.

    sink:    running ── all chunks in, END well ──► whole      source: running ── all paid, and FIN ──► whole
                ├── stop, or END badly ─► refused                 ├── abort, STOP, FIN badly ─► refused
                ├── lane broke: STOP, END ─► refused              ├── lane broke: END, FIN ───► as FIN says
                └── peer lost ──────────► lost                    └── peer lost ──────────────► lost

* ``done`` is set only when no message into or out of the pieces is under way, and none will start.
* Receives posted by a sink = credit given by it; messages sent by a source = credit received by it.
* At most ``WINDOW_BYTES`` (one chunk at least) and ``WINDOW_MESSAGES`` are posted at a time.
* A lane may break because the peer cut it or because he died: which, only he can say, or his silence.
* Nothing here waits: each event is answered at once, so a test plays any order of them.

The sum: 10 us a message; the window covers 8 ms at 1 GB/s and is what a stop has to wait for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from kvcache.transport.base import PeerLost, TransferRefused
from kvcache.transport.ucx_frames import Frame, Kind, cut, why_bytes

WINDOW_BYTES = 8 << 20
WINDOW_MESSAGES = 64
_EMPTY = memoryview(b"")


class Lane(Protocol):
    """What carries the messages. A future that it gives is never cancelled, and says PeerLost if it broke."""

    def receive(self, transfer: int, into: memoryview) -> asyncio.Future[None]:
        """The next message of this transfer goes into ``into``."""

    def send(self, transfer: int, piece: memoryview) -> asyncio.Future[None]:
        """Done when ``piece`` is read no more."""

    def tell(self, frame: Frame) -> None: ...


class Part:
    """What sink and source share: messages under way, and an outcome that waits for them."""

    def __init__(self, lane: Lane, transfer: int, pieces: Sequence[memoryview], *, is_ours: bool) -> None:
        """``is_ours``: this side began the transfer, and somebody waits for ``done``."""
        self.transfer = transfer
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lane = lane
        self._chunks = cut(pieces)
        self._is_ours = is_ours
        self._is_broken = False
        self._under_way_count = 0
        self._under_way_bytes = 0
        self._failure: Exception | None = None

    def fail(self, why: str) -> None:
        """The peer is lost; the messages end soon, each with an error."""
        self._failure = PeerLost(why)
        self._look()

    def stop(self, why: str) -> None:
        """The pieces are wanted back: start nothing more. Nothing when it is over."""
        if self.done.done() or self._failure is not None:
            return
        self._failure = TransferRefused(why)
        self._say_stopped(why)
        self._look()

    def broke(self) -> None:
        """The lane is no more. May be called often."""
        if not self._is_ours:
            self.stop("the lane broke")
        elif not self._is_broken and self._failure is None and not self.done.done():
            self._is_broken = True
            self._say_stopped("the lane broke")

    def _say_stopped(self, why: str) -> None:
        raise NotImplementedError

    def _follow(self, message: asyncio.Future[None], byte_count: int) -> None:
        self._under_way_count += 1
        self._under_way_bytes += byte_count

        def ended(future: asyncio.Future[None]) -> None:
            self._under_way_count -= 1
            self._under_way_bytes -= byte_count
            if future.cancelled() or future.exception() is not None:
                self.broke()
            self._next()
            self._look()

        message.add_done_callback(ended)

    def _next(self) -> None:
        """A message has ended."""

    def _is_whole(self) -> bool:
        """REQUIRES: nothing is under way, nothing failed."""
        raise NotImplementedError

    def _look(self) -> None:
        if self._under_way_count or self.done.done() or not (self._failure or self._is_whole()):
            return
        self._close()
        if self._failure is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(self._failure)
            self.done.exception()  # Seen: nobody waits for what serves a peer.

    def _close(self) -> None:
        """It is over now, one way or the other."""


class Sink(Part):
    """Fills pieces with what a source sends. Begin with ``open``."""

    def __init__(
        self,
        lane: Lane,
        transfer: int,
        pieces: Sequence[memoryview],
        whole: Callable[[], None] | None = None,
    ) -> None:
        """``whole`` is called when everything is there and before the source is told; it makes this one
        serve a peer's transfer."""
        super().__init__(lane, transfer, pieces, is_ours=whole is None)
        self._given = 0
        self._ended_well = False
        self._whole = whole

    def open(self) -> int:
        """Post the first window. The credit that goes with it."""
        self._post()
        return self._given

    def end(self, ok: bool, why: str) -> None:
        """END came: the source has sent all, or sends nothing of it any more."""
        if ok and self._given == len(self._chunks) and not self._is_broken:
            self._ended_well = True
        elif self._failure is None:
            self._failure = TransferRefused(why or "the peer ended it")
        self._look()

    def _say_stopped(self, why: str) -> None:
        self._lane.tell(Frame(Kind.STOP, self.transfer))

    def _post(self) -> None:
        while self._given < len(self._chunks) and self._under_way_count < WINDOW_MESSAGES:
            chunk = self._chunks[self._given]
            if self._under_way_bytes and self._under_way_bytes + len(chunk) > WINDOW_BYTES:
                return
            self._given += 1
            self._follow(self._lane.receive(self.transfer, chunk), len(chunk))

    def _next(self) -> None:
        if self._failure is not None or self._is_broken or self._given == len(self._chunks):
            return
        if self._under_way_bytes > WINDOW_BYTES // 2 or self._under_way_count > WINDOW_MESSAGES // 2:
            return
        self._post()
        self._lane.tell(Frame(Kind.CREDIT, self.transfer, self._given))

    def _is_whole(self) -> bool:
        return self._ended_well and not self._is_broken

    def _close(self) -> None:
        if self._failure is None and self._whole is not None:
            self._whole()
        if not isinstance(self._failure, PeerLost):
            why = "" if self._failure is None else str(self._failure)
            self._lane.tell(Frame(Kind.FIN, self.transfer, int(self._failure is None), why_bytes(why)))


class Source(Part):
    """Sends pieces as a sink gives credit for them. Pays every credit, with empty messages once it failed."""

    def __init__(self, lane: Lane, transfer: int, pieces: Sequence[memoryview], *, is_ours: bool) -> None:
        super().__init__(lane, transfer, pieces, is_ours=is_ours)
        self._paid = 0
        self._is_finished = not is_ours

    def credit(self, until: int) -> None:
        """The sink has posted receives up to chunk number ``until``. RAISES PeerLost when that cannot be."""
        is_known = self._failure is not None or until <= len(self._chunks)
        if not is_known or not self._paid <= until <= self._paid + WINDOW_MESSAGES:
            raise PeerLost("it gave a credit that cannot be")
        while self._paid < until:
            chunk = self._chunks[self._paid] if self._failure is None else _EMPTY
            self._paid += 1
            self._follow(self._lane.send(self.transfer, chunk), len(chunk))
        if self._paid == len(self._chunks) and self._failure is None:
            self._lane.tell(Frame(Kind.END, self.transfer, 1))
            self._look()

    def finish(self, ok: bool, why: str) -> None:
        """FIN came: the sink has all, or has done with it."""
        self._is_finished = True
        if self._failure is None and not (ok and self._paid == len(self._chunks)):
            self._failure = TransferRefused(why or "the peer ended it")
        self._look()

    def _say_stopped(self, why: str) -> None:
        self._lane.tell(Frame(Kind.END, self.transfer, 0, why_bytes(why)))

    def _is_whole(self) -> bool:
        return self._is_finished and self._paid == len(self._chunks)
