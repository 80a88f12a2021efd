"""The client of the look-up service: it never raises, never waits for long, and comes back by itself."""

from __future__ import annotations

import socket
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcache import locate_wire as wire
from kvcache.address import parse
from kvcache.clock import NS_PER_MS
from kvcache.credentials import Credentials
from kvcache.errors import BadInput
from kvcache.locator import PAUSE_NS_MAX, PAUSE_NS_MIN
from kvcache.server.locate_frames import LocateFrames
from tests.server.locate_double import SPACE, Answers, Locators

HINTS = array("Q", range(10))


class Clock:
    def __init__(self) -> None:
        self.ns = 10**9

    def now_ns(self) -> int:
        return self.ns


class Impostor:
    """Listens like an index; ``answer`` says what each connection is told after its greeting."""

    def __init__(self, path: Path, answer: Callable[[socket.socket], None]) -> None:
        self.address = str(path)
        self.connections = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        self._answer = answer
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.recv(1_000)
                connection.sendall(wire.told(wire.WELCOME))
                self._answer(connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def locate() -> Iterator[Locators]:
    locators = Locators()
    yield locators
    locators.close()


@pytest.fixture
def frames() -> Iterator[LocateFrames]:
    running = LocateFrames(Answers(), Credentials.default())
    yield running
    running.close()


def test_nobody_there_is_no_error_and_costs_one_try_a_pause(tmp_path: Path, locate: Locators) -> None:
    clock = Clock()
    locator = locate(str(tmp_path / "none.sock"), clock=clock)
    assert locator.match(HINTS) is None and "No such file" in locator.trouble
    clock.ns += PAUSE_NS_MIN - 1
    assert locator.match(HINTS) is None and "a moment ago" in locator.trouble
    assert locator.sources() is None and locator.names() is None and not locator.place("s", SPACE, HINTS)
    clock.ns += 1
    assert locator.match(HINTS) is None and "a moment ago" not in locator.trouble


def test_pauses_double_to_their_bound_and_end_with_an_answer(
    tmp_path: Path, frames: LocateFrames, locate: Locators
) -> None:
    clock, path = Clock(), tmp_path / "index.sock"
    locator = locate(str(path), clock=clock)
    pause_ns = PAUSE_NS_MIN
    for _ in range(8):
        assert locator.match(HINTS) is None and "No such file" in locator.trouble
        clock.ns += pause_ns
        pause_ns = min(pause_ns * 2, PAUSE_NS_MAX)
    frames.listen(parse(str(path)))
    assert locator.match(HINTS) is not None and locator.trouble == ""
    frames.close()
    assert locator.match(HINTS) is None
    clock.ns += PAUSE_NS_MIN
    assert locator.match(HINTS) is None and "a moment ago" not in locator.trouble


def test_a_connection_closed_meanwhile_is_made_anew_within_the_call(tmp_path: Path, locate: Locators) -> None:
    path = tmp_path / "index.sock"
    locator = locate(str(path))
    for _ in range(2):  # The same address, another index.
        frames = LocateFrames(Answers(), Credentials.default())
        frames.listen(parse(str(path)))
        assert locator.match(HINTS) is not None, locator.trouble
        frames.close()


def test_no_answer_in_time_is_none(tmp_path: Path, locate: Locators) -> None:
    answers = Answers()
    frames = LocateFrames(answers, Credentials.default())
    address = frames.listen(parse(str(tmp_path / "index.sock")))
    patient, hasty = locate(address), locate(address, timeout_ms=20)
    assert patient.match(HINTS) is not None, patient.trouble
    answers.hold.clear()
    assert hasty.match(HINTS) is None and "in time" in hasty.trouble
    answers.hold.set()
    frames.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        wire.told(wire.WELCOME),
        wire.told(wire.TEXT, b"[]"),
        wire.told(wire.ANSWERED, b"x"),
        wire.told(wire.FAILURE, b"{"),
        wire.ANSWER.pack(1 << 31, wire.TEXT, 0, 0, 0),
        wire.ANSWER.pack(0xFFFFFFFF, wire.ANSWERED, 0, 0xFFFFFFFF, 0),
        wire.answer_head(0, 1, False) + b"more",
        wire.answer_head(4, 1, False)[:9],
        b"",
    ],
)
def test_what_is_no_answer_is_none(tmp_path: Path, answer: bytes, locate: Locators) -> None:
    def say(connection: socket.socket) -> None:
        connection.recv(1_000)
        connection.sendall(answer)

    impostor = Impostor(tmp_path / "index.sock", say)
    locator = locate(impostor.address, clock=Clock())
    assert locator.match(HINTS) is None and locator.trouble
    assert locator.match(HINTS) is None and "a moment ago" in locator.trouble
    assert impostor.connections <= 2
    impostor.close()


def test_an_answer_may_come_in_pieces(tmp_path: Path, locate: Locators) -> None:
    whole = b"".join(Answers().query("t", wire.Asked(1, 0, 80, 0, False, 0), b"", memoryview(bytes(80))))
    names = wire.told(wire.TEXT, Answers().names("t"))

    def say(connection: socket.socket) -> None:
        for reply in (whole, names):
            connection.recv(1_000)
            for at in range(len(reply)):
                connection.send(reply[at : at + 1])

    impostor = Impostor(tmp_path / "index.sock", say)
    found = locate(impostor.address).match(HINTS)
    assert found is not None and found.blocks.tolist() == [10] * 3
    impostor.close()


def test_hints_that_are_too_many_or_cut_are_refused_here(
    tmp_path: Path, frames: LocateFrames, locate: Locators
) -> None:
    locator = locate(frames.listen(parse(str(tmp_path / "index.sock"))))
    for wrong in (bytes(8 * 65_537), b"seven b"):
        assert locator.match(wrong) is None and "too_large" in locator.trouble
    assert locator.match(HINTS) is not None


def test_a_wrong_address_is_refused_at_once(locate: Locators) -> None:
    with pytest.raises(BadInput):
        locate("http://index")
    assert locate("tcp://127.0.0.1:1", timeout_ms=20).match(HINTS) is None
    assert PAUSE_NS_MIN >= NS_PER_MS
