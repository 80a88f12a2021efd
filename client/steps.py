"""What an operation asks of whoever drives it, one step at a time: a call to the node, or work on bytes.

    operation (generator)  --Call | Post | Work | Pause-->  driver (blocking or async)
                           <--Reply | None | sums | None--  or the error, thrown in

Operations hold the one logic of the client; drivers hold the waiting. A driver makes every step end,
by the deadline or by itself, before it goes on, whatever happens to its caller meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from kvcache.errors import Unavailable
from kvcache.wire import Persist, Reply, Request, TakeLease


@dataclass(frozen=True, slots=True)
class Call:
    """REQUIRES: the views are flat byte views."""

    request: Request
    payload: Sequence[memoryview] = ()
    into: Sequence[memoryview] = ()

    @property
    def payload_bytes(self) -> int:
        return sum(map(len, self.payload)) + sum(map(len, self.into))

    @property
    def wait_ms(self) -> int:
        """So long the node may wait by our own wish, before it answers."""
        return self.request.wait_ms if isinstance(self.request, TakeLease | Persist) else 0


@dataclass(frozen=True, slots=True)
class Post:
    """A request whose reply changes nothing: the driver need not wait for it. Calls after it come after."""

    request: Request
    payload_bytes: Literal[0] = 0
    wait_ms: Literal[0] = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """Let time pass, and others have the connection."""

    duration_ns: int


@dataclass(frozen=True, slots=True)
class Work:
    """``run`` takes long and gives up the interpreter's lock; it returns chunk sums."""

    run: Callable[[], bytes]


Step = Call | Post | Work | Pause
Answer = Reply | bytes | None
T = TypeVar("T")
R = TypeVar("R", bound=Reply)
Operation = Generator[Step, Answer, T]


class BadReply(Unavailable):
    """The node's reply makes no sense: nothing it says can be relied on, so it counts as gone."""

    def __init__(self, why: str) -> None:
        super().__init__("unavailable", "the node's reply makes no sense", why, "check the node's version")


def ask(
    kind: type[R], request: Request, payload: Sequence[memoryview] = (), into: Sequence[memoryview] = ()
) -> Operation[R]:
    """RAISES BadReply for a reply of another kind, and what the call raises."""
    reply = yield Call(request, payload, into)
    if not isinstance(reply, kind):
        raise BadReply(f"{type(request).__name__} was answered with {type(reply).__name__}")
    return reply


def post(request: Request) -> Operation[None]:
    """RAISES Unavailable."""
    nothing = yield Post(request)
    assert nothing is None


def pause(duration_ns: int) -> Operation[None]:
    nothing = yield Pause(duration_ns)
    assert nothing is None


def work(run: Callable[[], bytes]) -> Operation[bytes]:
    sums = yield Work(run)
    assert isinstance(sums, bytes)
    return sums


def finished(operation: Operation[T]) -> T:
    """The result of an operation that has no link, and therefore asks for nothing."""
    try:
        step = next(operation)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]  # StopIteration is not generic
    raise AssertionError(f"{step} without a link")
