"""Messages by which blocks leave a node, or come to it, over a transport (``kvcache.transport``).

They go over the same connection as everything else, which has authenticated the peer; the bytes go over
the transport. A *ticket* is good once, and not after ``remaining_ms``. ``via`` is the scheme of the
transport that the peer will use; the answer's ``address`` is where this node listens with it.

    fetch    TakeLease ─► Export ─► Exported, read with the ticket ... verified ─► Release
    push     Reserve ─► Post ─► Posted, written with the ticket ... ─► Commit, which verifies
    stream   a writer's Advance, plane after plane ─► Follow of a peer, who reads what is written so far

A *plane* is a layer's K or V of one block (``kvcache.block``).
"""

from __future__ import annotations

from kvcache.wire_base import Message, Unsigned


class Export(Message, frozen=True, tag="export"):
    """Let me read ``count`` blocks of the lease from position ``start``: of each, ``planes`` planes from
    ``plane`` on (0: all), and of each plane ``length`` bytes from ``offset`` on (0: all), whole chunks.

    The blocks stay where they are until the lease is released or over, and the ticket's use has ended."""

    lease: Unsigned
    start: Unsigned
    count: Unsigned
    via: str
    plane: Unsigned = 0
    planes: Unsigned = 0
    offset: Unsigned = 0
    length: Unsigned = 0


class Exported(Message, frozen=True, tag="exported"):
    """The pieces, in order: block after block; within one, plane after plane, but one piece when all of it
    was asked for. ``sums`` are all chunk sums of each of these blocks, so that the lease's checksums vouch
    for them, and they for the chunks."""

    address: str
    ticket: bytes
    sums: bytes
    remaining_ms: Unsigned

    def __repr__(self) -> str:
        """Without ticket and address, whose key must not reach a log."""
        return f"Exported(sums={len(self.sums)} bytes, remaining_ms={self.remaining_ms})"


class Post(Message, frozen=True, tag="post"):
    """Let me write ``count`` blocks of the reservation from position ``start``: of each, ``planes`` planes
    from ``plane`` on (0: all)."""

    reservation: Unsigned
    start: Unsigned
    count: Unsigned
    via: str
    plane: Unsigned = 0
    planes: Unsigned = 0


class Posted(Message, frozen=True, tag="posted"):
    """The pieces are ordered as in ``Exported``."""

    address: str
    ticket: bytes
    remaining_ms: Unsigned

    def __repr__(self) -> str:
        """As that of Exported."""
        return f"Posted(remaining_ms={self.remaining_ms})"


class Advance(Message, frozen=True, tag="advance"):
    """The leading ``planes`` planes of every reserved block are written now. ``sums`` are the chunk sums of
    those that were not told before: block after block, all new planes of each."""

    reservation: Unsigned
    planes: Unsigned
    sums: bytes


class Follow(Message, frozen=True, tag="follow"):
    """What is there of the first blocks of ``prefix``, and of their planes from ``plane`` on? Answered when
    there is something, or after ``wait_ms``. Ends the ticket of the Follow before it on this connection.
    ``plane`` above 0 goes on with the blocks of the Follow before it."""

    namespace: bytes
    prefix: bytes
    via: str
    plane: Unsigned = 0
    wait_ms: Unsigned = 0


class Followed(Message, frozen=True, tag="followed"):
    """``state`` is ``held`` (``count`` leading blocks are there whole: take a lease), ``writing`` (``count``
    leading blocks are being written together, and ``planes`` planes of each from the one asked for can be
    read with the ticket; ``sums`` are their chunk sums, block after block), or ``none``."""

    state: str
    count: Unsigned = 0
    planes: Unsigned = 0
    address: str = ""
    ticket: bytes = b""
    sums: bytes = b""
    remaining_ms: Unsigned = 0

    def __repr__(self) -> str:
        """As that of Exported."""
        return f"Followed(state={self.state!r}, count={self.count}, planes={self.planes})"
