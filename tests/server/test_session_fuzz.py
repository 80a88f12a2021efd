"""A session over a real node's state, fed with anything in any pieces.

However a stream of frames is cut, its replies are the same to the byte. However it is damaged, what comes
back are whole frames, nothing of ours breaks, and nothing stays held when the connection ends.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from kvcache import wire
from kvcache.config import NodeConfig
from kvcache.server.handlers import Connection
from kvcache.server.identity import Identity, Peer
from kvcache.server.node import Node
from kvcache.server.session import Session
from kvcache.testing.clock import FakeClock
from tests.server.talk import HASHES, SIZE, SPEC, content, example, sums_of
from tests.server.wires import MemoryTransport, feed, settled

ROLES = frozenset({"reader", "writer", "router", "operator"})
NAMESPACE = example(tenant="default").namespace_id()
BLOCKS = 3
OPEN = wire.Open(example().to_map(), SPEC.plane_count, SPEC.head_count, SPEC.head_bytes)

Sent = tuple[wire.Request, bytes]
"""A request and its payload."""


def blocks(start: int, count: int) -> list[bytes]:
    return HASHES[start : start + count]


def joined(start: int, count: int) -> bytes:
    return b"".join(blocks(start, count))


def write(reservation: int, start: int, count: int, first: int) -> Sent:
    payload = b"".join(map(content, blocks(first, count)))
    return wire.Write(reservation, start, count), payload


# Numbers of leases and reservations count from 1, so that a conversation can be written down beforehand.
CONVERSATION: list[Sent] = [
    (OPEN, b""),
    (wire.Reserve(NAMESPACE, b"", joined(0, BLOCKS)), b""),
    write(1, 0, BLOCKS, 0),
    (wire.Commit(1, sums_of(*blocks(0, BLOCKS))), b""),
    (wire.TakeLease(NAMESPACE, joined(0, 4)), b""),
    (wire.Read(1, 0, BLOCKS), b""),
    (wire.Release(1, [1]), b""),
]

NUMBERS = st.integers(0, 3)
COUNTS = st.integers(0, BLOCKS)


@st.composite
def requests(draw: st.DrawFn) -> Sent:
    number, start, count = draw(NUMBERS), draw(NUMBERS), draw(COUNTS)
    name = joined(start, count)
    plain: list[wire.Request] = [
        OPEN,
        wire.Match(NAMESPACE, name),
        wire.Match(name, name),
        wire.Match(
            NAMESPACE, name + bytes(draw(st.sampled_from([0, 16 * 5_000])))
        ),  # Over one receive buffer.
        wire.TakeLease(NAMESPACE, name, draw(st.sampled_from(["", "r"]))),
        wire.Release(number, draw(st.lists(NUMBERS, max_size=2))),
        wire.Reserve(NAMESPACE, draw(st.sampled_from([b"", HASHES[0], b"x"])), name),
        wire.Commit(number, sums_of(*blocks(start, count)) if count else b""),
        wire.Abort(number),
        wire.Read(number, start, count),
        wire.Pin(NAMESPACE, name),
        wire.Unpin(NAMESPACE, name + name),
        wire.Hello(wire.PROTOCOL_VERSION),
    ]
    with_payload = [
        write(number, start, count, start),
        (wire.Write(number, start, count), bytes(draw(st.integers(0, 2 * SIZE)))),
        (wire.Match(NAMESPACE, name), bytes(draw(st.integers(0, 100_000)))),
    ]
    return draw(st.sampled_from([*((request, b"") for request in plain), *with_payload]))


STREAMS = st.builds(
    lambda before, upto, more: [*before, *CONVERSATION[:upto], *more],
    st.lists(requests(), max_size=3),
    st.integers(0, len(CONVERSATION)),
    st.lists(requests(), max_size=8),
)


def encoded(stream: Iterable[Sent]) -> bytes:
    frames = [
        wire.encode(call, request, len(payload)) + payload for call, (request, payload) in enumerate(stream)
    ]
    return b"".join(frames)


@st.composite
def cuts(draw: st.DrawFn, data: bytes) -> Sequence[bytes]:
    """The same bytes in pieces; some cuts fall close together, so that headers and bodies are cut too."""
    places = draw(st.lists(st.integers(0, len(data)), max_size=20))
    near = draw(st.lists(st.integers(0, 40), max_size=len(places)))
    ends = sorted(
        {0, len(data), *places, *(min(len(data), at + by) for at, by in zip(places, near, strict=False))}
    )
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def replies_to(pieces: Sequence[bytes]) -> MemoryTransport:
    """Play them to a node of its own. RAISES what broke."""
    node = Node(NodeConfig(capacity="4MiB", http="none", socket="/nowhere"), FakeClock())
    try:
        return asyncio.run(_play(node, pieces))
    finally:
        node.core.close()


async def _play(node: Node, pieces: Sequence[bytes]) -> MemoryTransport:
    broken: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
    core = node.core
    identity = Identity(1, "default", ROLES, core.arena(0, "default"), False, Peer(0, -1))
    connection = Connection(core, identity, lambda batch, call: session.push(batch, call))
    session = Session(connection, lambda: None)
    transport = MemoryTransport(session)
    await feed(session, transport, pieces)
    await settled(transport)
    session.connection_lost(None)
    for _ in range(3):
        await asyncio.sleep(0)
    core.check()
    held = core.ledger.stats()
    assert (held["leases"], held["reservations"], held["limbo_blocks"]) == (0, 0, 0)
    assert not broken, broken
    return transport


@pytest.mark.slow
@given(stream=STREAMS, data=st.data())
def test_however_a_stream_is_cut_its_replies_are_the_same(stream: list[Sent], data: st.DataObject) -> None:
    whole = encoded(stream)
    at_once = replies_to([whole])
    assert [call for call, _, _ in at_once.replies()] == list(range(len(stream)))
    assert replies_to(data.draw(cuts(whole))).sent == at_once.sent


def test_byte_by_byte_too() -> None:
    """A small conversation, as the slowest of networks would bring it."""
    stream = [(OPEN, b""), (wire.Match(NAMESPACE, joined(0, 2)), b"xyz"), (wire.Abort(1), b"")]
    whole = encoded(stream)
    assert replies_to([bytes([byte]) for byte in whole]).sent == replies_to([whole]).sent


def test_the_conversation_does_what_it_should() -> None:
    """Otherwise the fuzz would compare refusals with refusals."""
    replies = replies_to([encoded(CONVERSATION)]).replies()
    kinds = [type(reply).__name__ for _, reply, _ in replies]
    assert kinds == ["Opened", "Reserved", "Done", "Committed", "Leased", "Blocks", "Released"]
    assert replies[5][2] == b"".join(map(content, blocks(0, BLOCKS)))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A stream with a few bytes changed, put in, taken out, or its end missing."""
    stream = [*draw(STREAMS), *draw(st.sampled_from([[], [(wire.Watch(), b"")], [(wire.Stats(), b"")]]))]
    data = bytearray(encoded(stream))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["change", "insert", "remove", "end"]))
        if how == "change" and data:
            data[at] ^= draw(st.integers(1, 255))
        elif how == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=40))
        elif how == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.slow
@given(stream=damaged(), data=st.data())
def test_however_a_stream_is_damaged_nothing_of_ours_breaks(stream: bytes, data: st.DataObject) -> None:
    transport = replies_to(data.draw(cuts(stream)))
    replies = transport.replies()
    event("refused and closed" if transport.closing else "went on")
    if transport.closing:
        call, last, _ = replies[-1]
        assert call == 0
        assert isinstance(last, wire.Failure)


@given(garbage=st.binary(min_size=wire.HEADER.size, max_size=200).filter(lambda data: data[:2] != wire.MAGIC))
def test_garbage_ends_in_a_refusal(garbage: bytes) -> None:
    transport = replies_to([encoded(CONVERSATION[:1]), garbage])
    (_, opened, _), (call, refusal, _) = transport.replies()
    assert isinstance(opened, wire.Opened)
    assert call == 0
    assert isinstance(refusal, wire.Failure)
    assert refusal.code == "bad_frame"
    assert transport.closing
