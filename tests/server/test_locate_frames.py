"""The look-up service's sockets: who may ask, what is answered, and that garbage ends a connection only."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcache import locate_wire as wire
from kvcache.address import parse
from kvcache.credentials import Credential, Credentials
from kvcache.errors import BadInput
from kvcache.server import locate_frames
from kvcache.server.locate_frames import LocateFrames
from tests.server.locate_double import SPACE, Answers, Locators

ROUTER = "the-router-of-team-a"
READER = "the-reader-of-team-a"
FACTOR = int(os.environ.get("KVCACHE_FAULT_FACTOR", "1"))


def credentials() -> Credentials:
    tokens = {
        ROUTER: Credential("team-a", frozenset({"router"})),
        READER: Credential("team-a", frozenset({"reader"})),
    }
    return Credentials(tokens, {}, None, bytes(32))


class Service:
    def __init__(self, folder: Path) -> None:
        self.socks: list[socket.socket] = []
        self.answers = Answers()
        self.frames = LocateFrames(self.answers, Credentials.default(), connections_max=4)
        self.unix = self.frames.listen(parse(str(folder / "index.sock")))
        self.tcp = self.frames.listen(parse("tcp://127.0.0.1:0"))

    def raw(self, greet: bool = True) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        self.socks.append(sock)
        sock.settimeout(20)
        sock.connect(self.unix.removeprefix("unix://"))
        if greet:
            sock.sendall(wire.greeting(""))
            assert wire.reply(sock.recv(16))[1] == wire.WELCOME
        return sock


@pytest.fixture
def locate() -> Iterator[Locators]:
    locators = Locators()
    yield locators
    locators.close()


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(locate_frames, "CALL_S", 20.0)  # Nobody is late for a busy machine.
    running = Service(tmp_path)
    yield running
    running.frames.close()
    running.frames.close()
    for sock in running.socks:
        sock.close()


def read_to_the_end(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass


def hints(count: int) -> array[int]:
    return array("Q", range(count))


@pytest.mark.parametrize("way", ["unix", "tcp"])
@pytest.mark.parametrize("count", [0, 1, 1_024, 65_536])
def test_a_question_is_answered_in_columns(service: Service, way: str, count: int, locate: Locators) -> None:
    locator = locate(getattr(service, way))
    found = locator.match(hints(count), model="m", namespaces=[SPACE], tiers=5, limit=2, as_of=True)
    assert found is not None, locator.trouble
    assert [found.source(row) for row in range(found.rows)] == ["s0-1", "s1-1", "s2-1"]
    assert found.blocks.tolist() == [count] * 3 and found.tiers[2].tolist() == [count] * 3
    assert (found.namespaces.tolist(), found.suspect.tolist()) == ([5] * 3, [1, 0, 0])
    assert (list(found.incarnation), list(found.seq), list(found.age_ms)) == ([7] * 3, [0, 1, 2], [30] * 3)
    tenant, asked, selector, asked_bytes = service.answers.asked[-1]
    assert (tenant, asked.tiers, asked.limit, asked_bytes) == ("default", 5, 2, count * 8)
    assert selector == wire.Selector("m", frozenset([SPACE]))
    locator.close()


def test_names_are_asked_for_when_they_changed(service: Service, locate: Locators) -> None:
    locator = locate(service.unix)
    for epoch in (1, 1, 2):
        service.answers.epoch = epoch
        found = locator.match(hints(1))
        assert found is not None and found.source(0) == f"s0-{epoch}"
    assert service.frames.asked == 5  # Three matches, and names twice.


def test_placements_and_loads_travel_too(service: Service, locate: Locators) -> None:
    locator = locate(service.unix)
    assert locator.place("s1", SPACE, hints(2))
    assert service.answers.placed == [("default", "s1", SPACE, hints(2).tobytes())]
    sources = locator.sources()
    assert sources is not None and sources[0].load == {"running": 2.0}


def test_a_refusal_leaves_the_connection_open(service: Service, locate: Locators) -> None:
    locator = locate(service.unix)
    assert locator.match(hints(1), model="strange") is None
    assert "unknown_namespace" in locator.trouble
    assert locator.match(hints(1)) is not None and locator.trouble == ""
    assert service.frames.connections == 1


def test_only_routers_and_operators_may_ask(tmp_path: Path, locate: Locators) -> None:
    frames = LocateFrames(Answers(), credentials())
    address = frames.listen(parse("tcp://127.0.0.1:0"))
    for token, said in ((READER, "not_allowed"), ("", "not_allowed"), ("x" * 20, "not_allowed")):
        locator = locate(address, token)
        assert locator.match(hints(1)) is None and said in locator.trouble
    assert locate(address, ROUTER).match(hints(1)) is not None
    frames.close()


def test_a_wide_bind_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unsafe_bind"):
        LocateFrames(Answers(), Credentials.default()).listen(parse("tcp://0.0.0.0:0"))


def test_one_more_connection_than_fits_is_told_so(service: Service) -> None:
    kept = [service.raw() for _ in range(4)]
    refused = service.raw(greet=False)
    body_bytes, kind, *_ = wire.reply(refused.recv(16))
    assert kind == wire.FAILURE and "4 connections are open" in refused.recv(body_bytes).decode()
    assert refused.recv(1) == b""
    for each in kept:
        each.close()


def test_who_comes_while_there_are_no_threads_is_refused_and_the_next_one_served(
    monkeypatch: pytest.MonkeyPatch, service: Service, locate: Locators
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        refused = service.raw(greet=False)
        assert wire.reply(refused.recv(16))[1] == wire.FAILURE
    assert service.frames.connections == 0
    assert locate(service.unix).match(hints(10)) is not None


def test_a_silent_client_holds_up_nobody(service: Service, locate: Locators) -> None:
    """One stopped in the middle of its greeting, one in the middle of a question."""
    first, second = service.raw(greet=False), service.raw()
    first.sendall(wire.greeting("")[:5])
    second.sendall(wire.ask(wire.QUERY, hint_bytes=64)[:20] + b"half")
    assert locate(service.unix).match(hints(10)) is not None


@pytest.mark.parametrize("said", [b"", b"KVLO", wire.greeting("") + wire.ask(wire.QUERY, hint_bytes=64)])
def test_who_is_late_is_closed(
    monkeypatch: pytest.MonkeyPatch, service: Service, said: bytes, locate: Locators
) -> None:
    with monkeypatch.context() as short:
        short.setattr(locate_frames, "CALL_S", 0.05)
        short.setattr(locate_frames, "TICK_S", 0.01)
        slow = service.raw(greet=False)
        slow.sendall(said)
        read_to_the_end(slow)
    assert locate(service.unix).match(hints(10)) is not None


def test_a_second_question_too_early_ends_the_connection(service: Service, locate: Locators) -> None:
    eager = service.raw()
    eager.sendall(wire.ask(wire.NAMES) * 2)
    assert wire.reply(eager.recv(16))[1] == wire.FAILURE
    read_to_the_end(eager)
    assert locate(service.unix).match(hints(1)) is not None


def mutations(random_: random.Random, count: int) -> Iterator[bytes]:
    """Greetings and questions that are cut, flipped, stretched, or nothing but noise."""
    whole = [
        wire.ask(wire.QUERY, wire.write_selector("m", [SPACE]), 64, 3, 5) + bytes(64),
        wire.ask(wire.PLACE, wire.write_place("s0", SPACE), 16) + bytes(16),
        wire.ask(wire.SOURCES),
        wire.ask(wire.NAMES),
    ]
    for _ in range(count):
        raw = bytearray(random_.choice(whole))
        way = random_.randrange(4)
        if way == 0:
            raw = raw[: random_.randrange(len(raw))]
        elif way == 1:
            for _ in range(random_.randint(1, 4)):
                raw[random_.randrange(min(len(raw), 40))] = random_.randrange(256)
        elif way == 2:
            raw[:4] = random_.choice([b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\0\0\x10\0"])
        else:
            raw = bytearray(random_.randbytes(random_.randrange(200)))
        yield bytes(raw)


def test_garbage_ends_a_connection_and_nothing_else(service: Service, locate: Locators) -> None:
    random_ = random.Random(11)
    good = locate(service.unix)
    for number, raw in enumerate(mutations(random_, 150 * FACTOR)):
        sock = service.raw(greet=number % 5 != 0)
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)  # What is cut off never comes.
        read_to_the_end(sock)
        sock.close()
        if number % 50 == 0:
            assert good.match(hints(1)) is not None, good.trouble
    assert good.match(hints(1)) is not None and good.trouble == ""


def test_what_was_said_is_read_back() -> None:
    raw = wire.write_selector("a model", [SPACE, bytes(16)])
    assert len(raw) % 8 == 0 and wire.read_selector(raw) == wire.Selector(
        "a model", frozenset([SPACE, bytes(16)])
    )
    assert wire.read_selector(b"") == wire.Selector("", frozenset()) and wire.write_selector("", []) == b""
    assert wire.read_place(wire.write_place("source", SPACE)) == ("source", SPACE)
    for read in (wire.read_selector, wire.read_place):
        for garbled in (b"\xff" * 8, b"\1\0\xff\0\0\0\0\0", raw[:-8], raw + b"x" * 8):
            with pytest.raises(BadInput):
                read(garbled)
