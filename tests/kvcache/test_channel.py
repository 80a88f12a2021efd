"""Both channels against a peer that follows a script: replies, refusals, garbage, silence, descriptors."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvcache.channel import AsyncChannel, BlockingChannel
from kvcache.clock import NS_PER_S
from kvcache.errors import BadInput, NotAllowed, Unavailable
from kvcache.wire import (
    HEADER,
    PROTOCOL_VERSION,
    Blocks,
    Failure,
    Hello,
    Match,
    Matched,
    Read,
    Stats,
    Write,
    encode,
)
from tests.kvcache.peer import CLOCK, HELLO, PATIENCE_MS, WELCOME, Bench, Peer, run_async, soon


@pytest.fixture(params=["blocking", "async"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(request.param, tmp_path / "node.sock")
    yield made
    made.close()


def test_calls_are_answered_in_order_and_payloads_land_where_asked(bench: Bench) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, request, payload = peer.take()
        assert isinstance(request, Write) and payload == b"abcdef"
        peer.give(call, Matched(1))
        call, request, _ = peer.take()
        assert isinstance(request, Read)
        peer.give(call, Blocks(2), b"x" * 300_000 + b"y" * 300_000)
        peer.wait_for_end()

    channel = bench.connect(script)
    assert channel.welcome == WELCOME
    assert channel.call(Write(1, 0, 1), soon(), [memoryview(b"abc"), memoryview(b"def")]) == Matched(1)
    into = [memoryview(bytearray(300_000)), memoryview(bytearray(300_000))]
    assert channel.call(Read(1, 0, 2), soon(), (), into) == Blocks(2)
    assert into[0] == b"x" * 300_000 and into[1] == b"y" * 300_000
    assert channel.ended_by == ""


def test_a_large_payload_goes_out_whole(bench: Bench) -> None:
    data = bytes(range(256)) * 20_000

    def script(peer: Peer) -> None:
        peer.greet()
        call, _, payload = peer.take()
        peer.give(call, Matched(int(payload == data)))
        peer.wait_for_end()

    channel = bench.connect(script)
    assert channel.call(Write(1, 0, 1), soon(), [memoryview(data)]) == Matched(1)


def test_a_refusal_is_raised_and_leaves_the_channel_open(bench: Bench) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.give(peer.take()[0], Failure("bad_lease", "gone", "it ended", "take another"))
        peer.give(peer.take()[0], Failure("not_allowed", "no"))
        peer.give(peer.take()[0], Matched(3))
        peer.wait_for_end()

    channel = bench.connect(script)
    with pytest.raises(BadInput, match="it ended"):
        channel.call(Stats(), soon())
    with pytest.raises(NotAllowed):
        channel.call(Stats(), soon())
    assert channel.call(Stats(), soon()) == Matched(3)


def test_silence_past_the_deadline_closes_the_channel(bench: Bench) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.wait_for_end()

    channel = bench.connect(script)
    with pytest.raises(Unavailable, match="in time"):
        channel.call(Stats(), soon(20))
    assert channel.ended_by == "deadline"
    with pytest.raises(Unavailable, match="ended"):
        channel.call(Stats(), soon())


def test_half_a_payload_is_no_answer(bench: Bench) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _, _ = peer.take()
        peer.sock.sendall(encode(call, Blocks(1), 100) + b"x" * 50)
        peer.wait_for_end()

    channel = bench.connect(script)
    with pytest.raises(Unavailable):
        channel.call(Read(1, 0, 1), soon(20), (), [memoryview(bytearray(100))])


def test_a_peer_that_does_not_read_meets_the_deadline(bench: Bench) -> None:
    released = threading.Event()

    def script(peer: Peer) -> None:
        peer.greet()
        released.wait(30)

    channel = bench.connect(script)
    with pytest.raises(Unavailable):
        channel.call(Write(1, 0, 1), soon(30), [memoryview(bytes(8 << 20))])
    assert channel.ended_by == "deadline"
    released.set()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        HEADER.pack(b"KV", PROTOCOL_VERSION, 0, 1 << 30, 0),
        HEADER.pack(b"KV", PROTOCOL_VERSION + 1, 0, 0, 0),
        HEADER.pack(b"KV", PROTOCOL_VERSION, 0, 3, 0) + b"abc",
        encode(99, Matched(1)),
        encode(2, Blocks(1), 100) + b"x" * 100,
        encode(2, Match(b"", b"")),
    ],
)
def test_garbage_ends_the_channel(bench: Bench, garbage: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.take()
        peer.sock.sendall(garbage)
        peer.wait_for_end()

    channel = bench.connect(script)
    with pytest.raises(Unavailable):
        channel.call(Stats(), soon())
    assert channel.ended_by == "bad_frame"


def test_the_end_of_the_node_is_noticed(bench: Bench) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        call, _, _ = peer.take()
        peer.sock.sendall(encode(call, Matched(1))[:-1])

    channel = bench.connect(script)
    with pytest.raises(Unavailable):
        channel.call(Stats(), soon())
    assert channel.ended_by == "disconnected"


def test_nobody_there(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/nobody.sock"
    with pytest.raises(Unavailable):
        BlockingChannel.connect(address, HELLO, soon())
    with pytest.raises(Unavailable):
        asyncio.run(AsyncChannel.connect(address, HELLO, soon()))


@pytest.mark.slow
def test_nobody_waits_for_nodes_that_do_not_answer() -> None:
    """However few threads the loop has for everybody's work."""

    async def ask(address: str, ms: int) -> list[asyncio.Task[AsyncChannel]]:
        asked = [asyncio.create_task(AsyncChannel.connect(address, HELLO, soon(ms))) for _ in range(16)]
        await asyncio.sleep(0)
        return asked

    async def work(address: str) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        patient = await ask(address, 3 * PATIENCE_MS)
        await asyncio.wait_for(loop.run_in_executor(None, os.getpid), PATIENCE_MS / 1_000)
        assert not any(each.done() for each in patient)
        for each in patient:
            each.cancel()
        before = CLOCK.now_ns()
        ended = await asyncio.gather(*await ask(address, 1_000), return_exceptions=True)
        assert all(isinstance(each, Unavailable) for each in ended)
        assert CLOCK.now_ns() - before < 12 * NS_PER_S, "not one after the other"
        await asyncio.gather(*patient, return_exceptions=True)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(work(f"tcp://127.0.0.1:{silent.getsockname()[1]}"))


def test_a_node_that_never_welcomes(bench: Bench) -> None:
    with pytest.raises(Unavailable, match="in time"):
        bench.connect(Peer.wait_for_end, ms=20)


def test_a_refused_hello_says_why(bench: Bench) -> None:
    def script(peer: Peer) -> None:
        peer.give(peer.take()[0], Failure("not_allowed", "no such token"))

    with pytest.raises(NotAllowed, match="no such token"):
        bench.connect(script)


def test_something_else_at_the_address_is_named(bench: Bench) -> None:
    def script(peer: Peer) -> None:
        peer.take()
        peer.sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with pytest.raises(BadInput, match=r"is no kvcache node.*--tcp"):
        bench.connect(script)


def test_the_descriptor_comes_with_the_welcome_and_goes_with_the_channel(bench: Bench) -> None:
    memory = os.memfd_create("slab", os.MFD_CLOEXEC)
    os.ftruncate(memory, 4096)

    def script(peer: Peer) -> None:
        peer.greet([memory])
        peer.wait_for_end()

    channel = bench.connect(script, Hello(PROTOCOL_VERSION, map=True))
    received = channel.slab_fd
    assert received is not None
    assert os.fstat(received).st_ino == os.fstat(memory).st_ino
    assert not os.get_inheritable(received)
    channel.close()
    channel.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(received)
    os.close(memory)


@pytest.mark.parametrize(("count", "wanted"), [(2, True), (1, False), (40, True)])
def test_descriptors_that_were_not_asked_for_are_refused_and_closed(
    bench: Bench, count: int, wanted: bool
) -> None:
    memory = os.memfd_create("slab", os.MFD_CLOEXEC)

    def script(peer: Peer) -> None:
        peer.greet([memory] * count)
        peer.wait_for_end()

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(BadInput):
        bench.connect(script, Hello(PROTOCOL_VERSION, map=wanted))
    bench.runner.close()
    for thread in bench._threads:
        thread.join()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    os.close(memory)


def test_the_reply_to_what_was_posted_is_thrown_away(tmp_path: Path) -> None:
    bench = Bench("blocking", tmp_path / "node.sock")

    def script(peer: Peer) -> None:
        peer.greet()
        first, second, third = (peer.take()[0] for _ in range(3))
        peer.give(first, Failure("bad_lease", "gone"))
        peer.give(second, Blocks(1), b"nobody's")
        peer.give(third, Matched(3))
        peer.wait_for_end()

    channel = bench.connect(script)
    channel.post(Stats(), soon())
    channel.post(Stats(), soon())
    assert channel.call(Stats(), soon()) == Matched(3)
    bench.close()


def test_what_cannot_be_encoded_is_not_sent(bench: Bench) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.give(peer.take()[0], Matched(1))
        peer.wait_for_end()

    channel = bench.connect(script)
    with pytest.raises(BadInput):
        channel.call(Match(b"", bytes(5 << 20)), soon())
    assert channel.call(Stats(), soon()) == Matched(1)


def test_a_cancelled_call_neither_answers_another_nor_writes(tmp_path: Path) -> None:
    asked = threading.Event()

    def script(peer: Peer) -> None:
        peer.greet()
        first, _, _ = peer.take()
        asked.set()
        second, _, _ = peer.take()
        peer.give(first, Blocks(1), b"late")
        peer.give(second, Matched(2))
        peer.wait_for_end()

    async def work(channel: AsyncChannel) -> None:
        view = memoryview(bytearray(b"...."))
        call = asyncio.ensure_future(channel.call(Read(1, 0, 1), soon(), (), [view]))
        await asyncio.to_thread(asked.wait)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await channel.call(Stats(), soon()) == Matched(2)
        assert bytes(view) == b"...."

    run_async(tmp_path, script, work)


def test_many_calls_at_once_each_get_their_own(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        for _ in range(20):
            call, request, _ = peer.take()
            assert isinstance(request, Read)
            peer.give(call, Matched(request.lease))
        peer.wait_for_end()

    async def work(channel: AsyncChannel) -> None:
        calls = [channel.call(Read(number, 0, 1), soon()) for number in range(20)]
        assert await asyncio.gather(*calls) == [Matched(number) for number in range(20)]

    run_async(tmp_path, script, work)


def test_a_deadline_fails_every_call_in_flight(tmp_path: Path) -> None:
    def script(peer: Peer) -> None:
        peer.greet()
        peer.wait_for_end()

    async def work(channel: AsyncChannel) -> None:
        calls = [channel.call(Stats(), soon(20)), channel.call(Stats(), soon(10 * PATIENCE_MS))]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, Unavailable) for result in results)

    run_async(tmp_path, script, work)
