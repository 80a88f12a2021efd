"""What two ends of ``nixl://`` say to each other over their control socket: frames, and every message.

    length u32 (little-endian) | MessagePack: [kind, field, ...]

A frame has a hard limit, MessagePack is decoded with hard limits (``kvcache.packing``), then typed
validation. No byte of a block is in a frame. First both prove that they know the key of the listener
(``kvcache.transport.keys``): nothing of this process, addresses least of all, is told before.

    who connects: Opening ─►  ◄─ Challenge   Proof ─►  ◄─ Proof   then Hello, from both

    reader                           owner                  writer                        owner of the post
    Ask ticket, sizes ──►            Granted | Refused      Push ticket, source ──►
       (one-sided reads)             ◄── Stop               ◄── Ask source, sizes ... as on the left
    Stage, of plain memory ──►       Staged                 ◄── Filled | Refused
    Done ──►                         Ended, or Refused
    GaveUp ──►

The sum: 10 us to pack or parse a message; a transfer has four, and two more for a write.
"""

from __future__ import annotations

import asyncio
import struct
from contextlib import suppress
from typing import Annotated, get_args

import msgspec

from kvcache.packing import pack, unpack
from kvcache.transport.base import PeerLost
from kvcache.transport.keys import CONNECTS, LISTENS, NONCE_BYTES, is_proof, new_nonce, proof

VERSION = 3
PIECES_MAX = 32_768
PROBE_BYTES = 32
FRAME_BYTES_MAX = 2 << 20
GREETING_BYTES_MAX = 128
"""A frame of somebody who has proved nothing yet."""
BUFFER_BYTES_MAX = 8 << 20
"""So much may lie unsent; a peer that lets more pile up reads nothing."""

_LENGTH = struct.Struct("<I")

Unsigned = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Call = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Sizes = Annotated[list[Annotated[int, msgspec.Meta(gt=0, lt=1 << 48)]], msgspec.Meta(max_length=PIECES_MAX)]
Numbers = Annotated[list[Unsigned], msgspec.Meta(max_length=PIECES_MAX)]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of all messages. ``call`` is the number of whoever asked; each side has numbers of its own."""


class Opening(Message, frozen=True, tag="opening"):
    """First, from who connects."""

    version: Unsigned
    nonce: Nonce


class Challenge(Message, frozen=True, tag="challenge"):
    """Answers Opening."""

    nonce: Nonce


class Proof(Message, frozen=True, tag="proof"):
    """Answers Challenge, and, when it is right, the other side's Proof."""

    proof: bytes


class Hello(Message, frozen=True, tag="hello"):
    """From both, when both have proved that they may. ``description`` is NIXL's own of the sender's serving
    agent and its registered memory, keys included. At ``probe_address`` lies ``probe``: who reads that there
    has a path that works."""

    version: Unsigned
    description: bytes
    probe_address: Unsigned
    probe: bytes


class Memory(Message, frozen=True, tag="memory"):
    """More memory is registered: NIXL's description of that alone."""

    description: bytes


class Wiring(Message, frozen=True, tag="wiring"):
    """The sender makes a new path to the receiver, who has to serve it until ``Wired``."""


class Wired(Message, frozen=True, tag="wired"):
    """The sender can read the receiver's memory."""


class Beat(Message, frozen=True, tag="beat"):
    """The sender lives."""


class Note(Message, frozen=True, tag="note"):
    note: bytes


class Ask(Message, frozen=True, tag="ask"):
    """May I read what is exported under ``ticket``, pieces of these sizes?"""

    call: Call
    ticket: bytes
    sizes: Sizes


class Granted(Message, frozen=True, tag="granted"):
    """The pieces' ``addresses``, and the ``devices`` that their registrations are told by; none when they are
    in memory that is not registered, and have to be staged."""

    call: Call
    addresses: Numbers
    devices: Numbers

    def fits(self, count: int) -> bool:
        return len(self.addresses) == len(self.devices) and len(self.addresses) in (0, count)

    @property
    def places(self) -> list[tuple[int, int]]:
        """REQUIRES: it ``fits``."""
        return list(zip(self.addresses, self.devices, strict=True))


class Stage(Message, frozen=True, tag="stage"):
    """Put ``byte_count`` bytes from ``start``, all pieces in a row, where they can be read."""

    call: Call
    start: Unsigned
    byte_count: Unsigned


class Staged(Message, frozen=True, tag="staged"):
    call: Call
    place: Unsigned


class Done(Message, frozen=True, tag="done"):
    """The reader has read it all and touches it no more. Was it good until now?"""

    call: Call


class Ended(Message, frozen=True, tag="ended"):
    """It was."""

    call: Call


class Refused(Message, frozen=True, tag="refused"):
    """Answers Ask, Stage, Done and Push."""

    call: Call
    why: str


class Stop(Message, frozen=True, tag="stop"):
    """The owner wants his memory back. Answered by ``GaveUp``, unless ``Done`` is on its way."""

    call: Call


class GaveUp(Message, frozen=True, tag="gave_up"):
    """The reader touches it no more."""

    call: Call


class Push(Message, frozen=True, tag="push"):
    """Fill what is posted under ``ticket``, by reading what the sender exports under ``source``."""

    call: Call
    ticket: bytes
    source: bytes
    sizes: Sizes


class Filled(Message, frozen=True, tag="filled"):
    """Answers Push: it is, all of it."""

    call: Call


AnyMessage = (
    Opening
    | Challenge
    | Proof
    | Hello
    | Memory
    | Wiring
    | Wired
    | Beat
    | Note
    | Ask
    | Granted
    | Stage
    | Staged
    | Done
    | Ended
    | Refused
    | Stop
    | GaveUp
    | Push
    | Filled
)
_KINDS = {kind.__struct_config__.tag: kind for kind in get_args(AnyMessage)}
Answer = Granted | Staged | Ended | Refused | Filled


def encode(message: AnyMessage) -> bytes:
    body = pack(msgspec.to_builtins(message, builtin_types=(bytes,)))
    assert len(body) <= FRAME_BYTES_MAX, "a frame has a limit"
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> AnyMessage:
    """RAISES PeerLost."""
    try:
        plain = unpack(body)
        # By its own class: msgspec looks through a union anew at each call, for 12 us.
        kind = _KINDS[plain[0]] if isinstance(plain, list) and plain else AnyMessage
        message: AnyMessage = msgspec.convert(plain, kind, strict=True)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        raise PeerLost(f"it sent what is no message: {error}"[:200]) from error
    return message


def _said(opening_nonce: bytes, challenge_nonce: bytes) -> bytes:
    return b"kvcache nixl" + VERSION.to_bytes(4, "little") + opening_nonce + challenge_nonce


class Control:
    """The control socket of one endpoint. For one loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, message: AnyMessage) -> None:
        """In order with all else. RAISES PeerLost when too much lies unsent already."""
        if self._writer.transport.get_write_buffer_size() > BUFFER_BYTES_MAX:
            raise PeerLost("it reads nothing")
        self._writer.write(encode(message))

    async def drained(self) -> None:
        """There is room for more. RAISES PeerLost."""
        try:
            await self._writer.drain()
        except OSError as error:
            raise PeerLost(f"the connection broke: {error}") from error

    async def receive(self, bytes_max: int = FRAME_BYTES_MAX) -> AnyMessage:
        """RAISES PeerLost."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if length > bytes_max:
                raise PeerLost(f"it sent a frame of {length} bytes")
            return decode(await self._reader.readexactly(length))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise PeerLost("it closed the connection") from error

    async def introduce(self, key: bytes) -> None:
        """As who connects: prove that we know the key, and hear that he does. RAISES PeerLost."""
        nonce = new_nonce()
        self.send(Opening(VERSION, nonce))
        challenge = await self.receive(GREETING_BYTES_MAX)
        if not isinstance(challenge, Challenge):
            raise PeerLost("it did not ask for a proof")
        said = _said(nonce, challenge.nonce)
        self.send(Proof(proof(key, CONNECTS, said)))
        answer = await self.receive(GREETING_BYTES_MAX)
        if not isinstance(answer, Proof) or not is_proof(answer.proof, key, LISTENS, said):
            raise PeerLost("it does not know the key of the address it was looked for at")

    async def let_in(self, key: bytes) -> None:
        """As who listens: hear his proof before anything is told. RAISES PeerLost."""
        opening = await self.receive(GREETING_BYTES_MAX)
        if not isinstance(opening, Opening) or opening.version != VERSION:
            raise PeerLost(f"it does not speak version {VERSION} of nixl://")
        nonce = new_nonce()
        self.send(Challenge(nonce))
        said = _said(opening.nonce, nonce)
        answer = await self.receive(GREETING_BYTES_MAX)
        if not isinstance(answer, Proof) or not is_proof(answer.proof, key, CONNECTS, said):
            raise PeerLost("it does not know the key")
        self.send(Proof(proof(key, LISTENS, said)))

    def cut(self) -> None:
        """Close it at once."""
        self._writer.transport.abort()

    def close(self) -> None:
        """What was sent still goes out. May be called twice."""
        self._writer.close()

    async def closed(self, within_s: float) -> None:
        """It is, and cut when that takes longer. REQUIRES: ``close`` was called."""
        try:
            async with asyncio.timeout(within_s):
                await self._writer.wait_closed()
        except OSError:  # TimeoutError among them.
            self._writer.transport.abort()
            with suppress(OSError):
                await self._writer.wait_closed()
