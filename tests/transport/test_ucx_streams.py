"""The two ends of a transfer of ``ucx://``, and its frames, in any order of events, without the library."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine

import pytest

from kvcache.transport.base import PeerLost
from kvcache.transport.ucx_frames import (
    CHUNK_BYTES,
    Frame,
    Hello,
    Kind,
    cut,
    pack,
    pack_hello,
    pack_request,
    parse,
    parse_hello,
    parse_request,
)
from kvcache.transport.ucx_streams import WINDOW_MESSAGES, Part, Sink, Source

Message = tuple[memoryview, "asyncio.Future[None]"]


class Line:
    """Both directions of a lane, moved one event at a time by the test."""

    def __init__(self) -> None:
        self.posted: defaultdict[int, deque[Message]] = defaultdict(deque)
        self.sent: defaultdict[int, deque[Message]] = defaultdict(deque)
        self.told: deque[Frame] = deque()
        self.posted_count = self.sent_count = 0
        self.most_posted = 0

    def receive(self, transfer: int, into: memoryview) -> asyncio.Future[None]:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.posted[transfer].append((into, ended))
        self.posted_count += 1
        self.most_posted = max(self.most_posted, len(self.posted[transfer]))
        return ended

    def send(self, transfer: int, piece: memoryview) -> asyncio.Future[None]:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.sent[transfer].append((piece, ended))
        self.sent_count += 1
        return ended

    def tell(self, frame: Frame) -> None:
        self.told.append(parse(memoryview(pack(frame) + b"what was there before")))

    def move(self, transfer: int) -> bool:
        """One message arrives."""
        if not self.sent[transfer] or not self.posted[transfer]:
            return False
        (piece, sent), (into, got) = self.sent[transfer].popleft(), self.posted[transfer].popleft()
        into[: len(piece)] = piece
        sent.set_result(None)
        got.set_result(None)
        return True

    def breaks(self) -> None:
        for waiting in (*self.posted.values(), *self.sent.values()):
            while waiting:
                waiting.popleft()[1].set_exception(PeerLost("broke"))


def hand(frame: Frame, sink: Sink, source: Source) -> None:
    """What an endpoint does with a frame."""
    why = frame.payload.decode()
    if frame.kind is Kind.CREDIT:
        source.credit(frame.value)
    elif frame.kind is Kind.END:
        sink.end(frame.value == 1, why)
    elif frame.kind is Kind.FIN:
        source.finish(frame.value == 1, why)
    elif frame.kind is Kind.STOP:
        source.stop("given up")
        sink.end(False, "given up")


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def run_out(line: Line, sink: Sink, source: Source, draw: random.Random) -> None:
    """Everything that can still happen, in a random order."""
    while True:
        await settle()
        moves: list[Callable[[], object]] = []
        if line.told:
            moves.append(lambda: hand(line.told.popleft(), sink, source))
        if line.sent[sink.transfer] and line.posted[sink.transfer]:
            moves.append(lambda: line.move(sink.transfer))
        if not moves:
            return
        draw.choice(moves)()


def make(
    sizes: list[int], *, reads: bool, done: Callable[[], None] = lambda: None
) -> tuple[Line, Sink, Source]:
    """``reads``: the sink began it, else the source did."""
    line = Line()
    room = [memoryview(bytearray(size)) for size in sizes]
    data = [memoryview(random.Random(size).randbytes(size)) for size in sizes]
    sink = Sink(line, 2, room, None if reads else done)
    source = Source(line, 2, data, is_ours=not reads)
    source.credit(sink.open())
    return line, sink, source


def outcome(part: Part) -> str:
    assert part.done.done(), "it hangs"
    error = part.done.exception()
    return "whole" if error is None else type(error).__name__


def play(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(scenario)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_all_orders_bring_all_bytes(seed: int, reads: bool) -> None:
    async def scenario() -> None:
        draw = random.Random(seed)
        sizes = [draw.choice([1, 64, 4096]) for _ in range(draw.randrange(1, 300))]
        whole: list[bool] = []
        line, sink, source = make(sizes, reads=reads, done=lambda: whole.append(True))
        await run_out(line, sink, source, draw)
        assert (outcome(sink), outcome(source)) == ("whole", "whole")
        assert [bytes(view) for view in sink._chunks] == [bytes(view) for view in source._chunks]
        assert line.posted_count == line.sent_count == len(sizes)
        assert line.most_posted <= WINDOW_MESSAGES
        assert whole == ([] if reads else [True])

    play(scenario())


@pytest.mark.parametrize("who", ["sink", "source"])
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_who_stops_leaves_no_receive_and_no_send(seed: int, reads: bool, who: str) -> None:
    async def scenario() -> None:
        draw = random.Random(seed)
        line, sink, source = make([64] * 200, reads=reads, done=lambda: None)
        for _ in range(draw.randrange(150)):
            line.move(2)
            await settle()
            if line.told and draw.random() < 0.7:
                hand(line.told.popleft(), sink, source)
        (sink if who == "sink" else source).stop("given up")
        await run_out(line, sink, source, draw)
        assert outcome(sink) == "TransferRefused"
        assert outcome(source) == "TransferRefused"
        assert line.posted_count == line.sent_count, "each receive was paid"
        assert not line.posted[2]
        assert not line.sent[2]

    play(scenario())


def test_done_waits_for_what_is_under_way() -> None:
    async def scenario() -> None:
        line, sink, source = make([64] * 4, reads=True)
        sink.stop("given up")
        hand(line.told[0], sink, source)
        await settle()
        assert not sink.done.done(), "four receives still point into the memory"
        for left in (3, 2, 1, 0):
            line.move(2)
            await settle()
            assert sink.done.done() == (left == 0)

    play(scenario())


@pytest.mark.parametrize("ended_first", [True, False])
def test_a_lane_that_broke_is_refused_once_the_peer_says_so(ended_first: bool) -> None:
    async def scenario() -> None:
        line, sink, source = make([64] * 4, reads=True)
        if ended_first:
            hand(line.told.popleft(), sink, source)  # END, while the bytes are still on their way.
        line.breaks()
        await settle()
        assert not sink.done.done(), "was it cut, or is the peer gone? It cannot know"
        await run_out(line, sink, source, random.Random(1))
        assert outcome(sink) == "TransferRefused"

    play(scenario())


def test_a_lane_that_broke_with_its_peer_is_a_peer_lost() -> None:
    async def scenario() -> None:
        line, sink, _ = make([64] * 4, reads=True)
        line.breaks()
        await settle()
        sink.fail("the peer is gone")
        assert outcome(sink) == "PeerLost"

    play(scenario())


def test_a_write_whose_last_message_ended_badly_is_what_the_sink_says() -> None:
    async def scenario() -> None:
        line, sink, source = make([64], reads=False)
        piece, sent = line.sent[2].popleft()
        into, got = line.posted[2].popleft()
        into[:] = piece
        got.set_result(None)
        sent.set_exception(PeerLost("broke after the bytes were there"))
        await run_out(line, sink, source, random.Random(2))
        assert outcome(sink) == outcome(source) == "whole"

    play(scenario())


@pytest.mark.parametrize("credit", [4 + 1, 1 << 40])
def test_a_credit_that_cannot_be_is_a_broken_peer(credit: int) -> None:
    async def scenario() -> None:
        _, _, source = make([64] * 4, reads=True)
        with pytest.raises(PeerLost):
            source.credit(credit)

    play(scenario())


def test_chunks_cover_the_pieces_in_order() -> None:
    pieces = [memoryview(bytearray(size)) for size in (1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES)]
    sizes = [len(chunk) for chunk in cut(pieces)]
    assert sizes == [1, CHUNK_BYTES, CHUNK_BYTES, 1, CHUNK_BYTES, CHUNK_BYTES, CHUNK_BYTES]


def test_frames_come_back_as_they_went() -> None:
    frame = Frame(Kind.READ, 7, 3, pack_request(b"ticket", [1, 1 << 40]), 5)
    assert parse(memoryview(pack(frame) + b"rest")) == frame
    assert parse_request(frame.payload) == (b"ticket", [1, 1 << 40])
    hello = Hello(3, 0xFF << 24, bytes(range(16)))
    assert parse_hello(pack_hello(hello)) == hello


@pytest.mark.parametrize("seed", range(200))
def test_nonsense_is_a_broken_peer_and_nothing_worse(seed: int) -> None:
    draw = random.Random(seed)
    message = bytearray(pack(Frame(Kind.WRITE, 7, 0, pack_request(b"ticket", [5]))))
    for _ in range(draw.randrange(1, 8)):
        message[draw.randrange(len(message))] = draw.randrange(256)
    try:
        parse_request(parse(memoryview(message)).payload)
        parse_hello(bytes(message))
    except PeerLost:
        pass
