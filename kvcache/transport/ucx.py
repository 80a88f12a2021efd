"""``ucx://`` on ucxx: tag receives straight into the caller's memory, whatever UCX finds underneath.

    worker of UCX, its thread ──► notifier thread ──► the event loop, where all of ours runs

What was measured, and shapes this file. Only progress in a thread with Python futures leaves an idle
process idle; a thread that waits 1 ms at a time takes 3 % of a core, one that waits 100 ms a third of a
percent, and answers as fast, because UCX wakes it. UCX cuts TCP into 8 KiB pieces unless told otherwise.

A listener of ucxx takes every interface, whatever host the address names. Who can reach its port can make
UCX write to this process's memory: the network must be trusted. See docs/transports.md.

The sum: 100 us from a message's end to the awaiting coroutine, 15 us of a core for each message.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager

import libucx

os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # UCX would complain of what ucxx sets.
libucx.load_library()  # Before ucxx, which otherwise takes whatever UCX the system has.

from ucxx import libucxx  # noqa: E402
from ucxx._lib.arr import Array  # noqa: E402
from ucxx.exceptions import UCXBusyError, UCXError  # noqa: E402
from ucxx.types import Tag  # noqa: E402

from kvcache.address import TcpAddress  # noqa: E402
from kvcache.address import parse as parse_address  # noqa: E402
from kvcache.clock import NS_PER_S, Clock, SystemClock  # noqa: E402
from kvcache.errors import BadInput  # noqa: E402
from kvcache.transport.base import Endpoint, Limits, Note, PeerLost, Ticket  # noqa: E402
from kvcache.transport.flow import until  # noqa: E402
from kvcache.transport.ucx_endpoint import Shared, UcxEndpoint  # noqa: E402
from kvcache.transport.ucx_frames import HELLO_BYTES, Hello, new_tag_base, pack_hello, parse_hello  # noqa: E402

SCHEME = "ucx"
SETTINGS = {"TCP_TX_SEG_SIZE": "512k", "TCP_RX_SEG_SIZE": "512k"}
"""Ours, unless the environment has them as ``UCX_...``."""
HELLO_NS = 5 * NS_PER_S
CUT_NS = 1 * NS_PER_S
_EPOLL_MS = 100
_FUTURES_STEP = 32
"""After so many messages ucxx's pool of 100 futures is filled again: when it is empty ucxx complains."""


class Worker:
    """UCX's context and worker, with the two threads that bring what ends to the running loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        settings = {key: value for key, value in SETTINGS.items() if f"UCX_{key}" not in os.environ}
        self.context = libucxx.UCXContext(settings)
        self.ucx = libucxx.UCXWorker(self.context, enable_delayed_submission=True, enable_python_future=True)
        self.hearing: set[asyncio.Task[None]] = set()
        """What holds the memory of receives that may never end."""
        self._is_ending = False
        self._message_count = 0
        self._notifier = threading.Thread(target=self._notify, name="ucx-notifier", daemon=True)
        self._notifier.start()
        self.ucx.start_progress_thread(polling_mode=False, epoll_timeout=_EPOLL_MS)

    def call(self, work: Callable[[], None]) -> None:
        """Run it on the loop, from any thread; not at all once the loop is closed."""
        try:
            self.loop.call_soon_threadsafe(work)
        except RuntimeError:
            self._is_ending = True

    def heard(self, hearing: asyncio.Task[None]) -> None:
        """One of ``hearing`` has ended."""
        self.hearing.discard(hearing)
        if not hearing.cancelled():
            hearing.exception()  # Seen: who began it may have given up.

    def count_message(self) -> None:
        """One more message begins."""
        self._message_count += 1
        if self._message_count % _FUTURES_STEP == 0:
            self.ucx.populate_python_futures_pool()

    def close(self) -> None:
        """REQUIRES: every wire is cut. Blocks for milliseconds."""
        self._is_ending = True
        self.ucx.stop_request_notifier_thread()
        self._notifier.join()
        self.ucx.stop_progress_thread()

    def _notify(self) -> None:
        asyncio.set_event_loop(self.loop)  # ucxx makes its futures for the loop of this thread.
        told = threading.Event()

        def run() -> None:
            self.ucx.run_request_notifier()
            told.set()

        while not self._is_ending:
            self.ucx.populate_python_futures_pool()
            state = self.ucx.wait_request_notifier(period_ns=NS_PER_S)
            if state == libucxx.PythonRequestNotifierWaitState.Shutdown:
                break
            if state == libucxx.PythonRequestNotifierWaitState.Ready:
                told.clear()
                self.call(run)
                while not told.wait(1.0) and not self._is_ending:
                    pass
        self.ucx.clear_python_futures_pool()


class UcxWire:
    """A connection of UCX. For the worker's loop."""

    def __init__(self, worker: Worker, ucx: libucxx.UCXEndpoint) -> None:
        self._worker = worker
        self._ucx: libucxx.UCXEndpoint | None = ucx
        self._messages: set[asyncio.Task[None]] = set()
        self._cutting: asyncio.Task[None] | None = None

    def receive(self, tag: int, into: memoryview) -> asyncio.Future[None]:
        return self._follow("tag_recv", into, Tag(tag))

    def send(self, tag: int, piece: memoryview) -> asyncio.Future[None]:
        return self._follow("tag_send", piece, Tag(tag))

    async def say(self, message: bytes) -> None:
        """Before there are tags. RAISES PeerLost. REQUIRES: connected; to send sooner can hang UCX."""
        await asyncio.shield(self._follow("stream_send", memoryview(message)))

    async def hear(self) -> bytes:
        """What the peer says. RAISES PeerLost.

        By the connection's stream, and not by an active message: ucxx knows receives of those by their
        connection's place in memory, and one that was given up takes the message of the next connection
        there. A stream's receive, begun when the connection has failed already, never ends: it is not waited
        for, and keeps its few bytes."""
        if self._ucx is None:
            raise PeerLost("the connection is cut")
        message = memoryview(bytearray(HELLO_BYTES))
        array = Array(message)
        try:
            self._ucx.raise_on_error()
            hearing = asyncio.ensure_future(_ended(self._ucx.stream_recv(array), array))
        except UCXError as error:
            raise PeerLost(f"the connection broke: {error}") from error
        self._worker.hearing.add(hearing)
        hearing.add_done_callback(self._worker.heard)
        await asyncio.shield(hearing)
        return bytes(message)

    async def cut(self) -> None:
        if self._cutting is None:
            self._cutting = asyncio.ensure_future(self._cut())
        await asyncio.shield(self._cutting)

    async def _cut(self) -> None:
        ucx, self._ucx = self._ucx, None
        assert ucx is not None, "it is cut once"
        # Off the loop: UCX's thread may want the interpreter before it lets go of the connection.
        await asyncio.to_thread(ucx.close_blocking, CUT_NS, 1)
        ucx.remove_close_callback()
        while self._messages:
            await asyncio.wait(self._messages)

    def _follow(self, method: str, view: memoryview, *tag: libucxx.UCXXTag) -> asyncio.Future[None]:
        """Begin it now, so that what is begun first is matched first."""
        try:
            if self._ucx is None:
                raise PeerLost("the connection is cut")
            self._worker.count_message()
            array = Array(view)
            request = getattr(self._ucx, method)(array, *tag)
        except (UCXError, PeerLost) as error:
            failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            failed.set_exception(PeerLost(str(error)))
            failed.exception()  # Seen: frames are told without waiting.
            return failed
        return self._keep(_ended(request, array))

    def _keep(self, ended: Coroutine[None, None, None]) -> asyncio.Future[None]:
        message = asyncio.ensure_future(ended)
        self._messages.add(message)
        message.add_done_callback(self._over)
        return message

    def _over(self, message: asyncio.Task[None]) -> None:
        self._messages.discard(message)
        if not message.cancelled():
            message.exception()  # Seen, as above.


async def _ended(request: libucxx.UCXRequest, array: Array[memoryview] | None) -> None:
    """``array`` holds its memory until the request has ended. RAISES PeerLost."""
    try:
        await request.wait()
    except UCXError as error:
        raise PeerLost(f"the connection broke: {error}") from error
    finally:
        del array


class UcxListener:
    """Use ``UcxTransport.listen``."""

    def __init__(self, host: str, ucx: libucxx.UCXListener, shared: Shared) -> None:
        self.is_closed = False
        self.sessions: dict[bytes, UcxEndpoint] = {}
        self.greetings: set[asyncio.Task[None]] = set()
        self._address = f"{SCHEME}://{host}:{ucx.port}"
        self._ucx: libucxx.UCXListener | None = ucx
        self._shared = shared

    @property
    def address(self) -> str:
        return self._address

    async def close(self) -> None:
        """New peers are sent away. The port stays taken while peers who came here can ask for lanes."""
        if not self.is_closed:
            self.is_closed = True
            self._shared.spawn(self._end())

    async def _end(self) -> None:
        while self.greetings:  # Who was told that he is taken will ask for lanes.
            await asyncio.wait(self.greetings)
        for endpoint in self.sessions.values():
            await endpoint.ended()
        self._ucx = None  # ucxx ends a listener when nobody has it any more.

    def keep(self, session: bytes, endpoint: UcxEndpoint) -> None:
        self.sessions = {key: end for key, end in self.sessions.items() if not end.is_lost}
        self.sessions[session] = endpoint


class UcxTransport:
    """One worker of UCX, for the running loop."""

    def __init__(self, limits: Limits | None = None, clock: Clock | None = None) -> None:
        self._shared = Shared(limits or Limits(), clock or SystemClock())
        self._worker: Worker | None = None
        self._listeners: list[UcxListener] = []
        self._greetings: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def scheme(self) -> str:
        return SCHEME

    async def listen(self, address: str, accepted: Callable[[Endpoint], None], note: Note) -> UcxListener:
        where = _parse(address)
        worker = self._started()

        def came(ucx: libucxx.UCXEndpoint) -> None:
            worker.call(lambda: self._greeted(UcxWire(worker, ucx), listener, accepted, note))

        try:
            made = libucxx.UCXListener.create(
                worker=worker.ucx, port=where.port, cb_func=came, cb_args=(), deliver_endpoint=True
            )
        except UCXBusyError as error:
            raise BadInput("address_in_use", f"{address} is taken", str(error), "use another port") from error
        except UCXError as error:
            raise BadInput("bad_config", f"UCX cannot listen at {address}", str(error)) from error
        listener = UcxListener(where.host, made, self._shared)
        self._listeners.append(listener)
        return listener

    async def connect(self, address: str, deadline_ns: int, note: Note) -> UcxEndpoint:
        where = _parse(address)
        async with until(deadline_ns, self._shared.clock):
            wire, hello, base = await self._dial(where, 0, b"")

        async def open_lane(number: int) -> UcxWire:
            async with _hello_time():
                return (await self._dial(where, number, hello.session))[0]

        tags = (base, hello.tag_base)
        endpoint = UcxEndpoint(self._shared, address, note, wire, tags, open_lane)
        endpoint.start()
        return endpoint

    def register(self, memory: memoryview) -> None:
        """UCX pins what it needs at its first use and remembers it; ucxx offers no more."""

    def forget(self, memory: memoryview) -> None:
        """UCX sees by itself when pages of this process go, if they go by ``madvise`` (``HostTier``)."""

    def export(self, pieces: Sequence[memoryview], until_ns: int) -> Ticket:
        return self._shared.book.export(pieces, until_ns)

    def post(self, pieces: Sequence[memoryview], until_ns: int, filled: Callable[[], None]) -> Ticket:
        return self._shared.book.post(pieces, until_ns, filled)

    async def withdraw(self, ticket: Ticket) -> None:
        await self._shared.book.withdraw(ticket)

    async def close(self) -> None:
        self._is_closed = True
        for listener in self._listeners:
            await listener.close()
        for greeting in self._greetings:
            greeting.cancel()
        await asyncio.gather(*(endpoint.close() for endpoint in list(self._shared.endpoints)))
        await self._shared.book.close()
        while self._shared.tasks:
            await asyncio.wait(self._shared.tasks)
        worker, self._worker = self._worker, None
        if worker is not None:
            await asyncio.to_thread(worker.close)

    def _started(self) -> Worker:
        """RAISES PeerLost when it was closed."""
        if self._is_closed:
            raise PeerLost("this transport is closed")
        self._worker = self._worker or Worker()
        return self._worker

    async def _dial(self, where: TcpAddress, lane: int, session: bytes) -> tuple[UcxWire, Hello, int]:
        """A connection, what the other side said, and the tag base of this one. RAISES PeerLost."""
        worker, loop = self._started(), asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(where.host, where.port, family=socket.AF_INET)
            wire = UcxWire(worker, libucxx.UCXEndpoint.create(worker.ucx, found[0][4][0], where.port, True))
        except (UCXError, OSError) as error:
            raise PeerLost(f"nobody answers at {where.host}:{where.port}: {error}") from error
        base = new_tag_base(secrets.randbits(40))
        try:
            hello = parse_hello(await wire.hear())
            await wire.say(pack_hello(Hello(lane, base, session)))
            parse_hello(await wire.hear())  # He takes it.
        except BaseException:
            self._shared.spawn(wire.cut())
            raise
        return wire, hello, base

    def _greeted(
        self,
        wire: UcxWire,
        listener: UcxListener,
        accepted: Callable[[Endpoint], None],
        note: Note,
    ) -> None:
        greeting = self._shared.spawn(self._greet(wire, listener, accepted, note))
        for greetings in (self._greetings, listener.greetings):
            greetings.add(greeting)
            greeting.add_done_callback(greetings.discard)

    async def _greet(
        self, wire: UcxWire, listener: UcxListener, accepted: Callable[[Endpoint], None], note: Note
    ) -> None:
        """Who came is a new peer, or one we know with another lane."""
        mine = Hello(0, new_tag_base(secrets.randbits(40)), secrets.token_bytes(16))
        try:
            async with _hello_time():
                await wire.say(pack_hello(mine))
                his = parse_hello(await wire.hear())
                known = listener.sessions.get(his.session)
                if known is None if his.lane else listener.is_closed:
                    raise PeerLost("nobody takes him")
                await wire.say(pack_hello(mine))
        except PeerLost:
            await wire.cut()
            return
        except BaseException:
            self._shared.spawn(wire.cut())
            raise
        if known is not None:
            known.lane_came(his.lane, wire)
            return
        tags = (mine.tag_base, his.tag_base)
        endpoint = UcxEndpoint(self._shared, f"{SCHEME}:// (it connected)", note, wire, tags, None)
        listener.keep(mine.session, endpoint)
        endpoint.start()
        accepted(endpoint)


@asynccontextmanager
async def _hello_time() -> AsyncIterator[None]:
    """RAISES PeerLost when what is inside takes too long."""
    try:
        async with asyncio.timeout(HELLO_NS / NS_PER_S):
            yield
    except TimeoutError as error:
        raise PeerLost("it did not say who it is") from error


def _parse(address: str) -> TcpAddress:
    """RAISES BadInput."""
    scheme, _, rest = address.partition("://")
    if scheme != SCHEME:
        raise BadInput("bad_config", f"{address!r} is no address", "", f"write {SCHEME}://host:port")
    where = parse_address(f"tcp://{rest}")
    assert isinstance(where, TcpAddress), "its scheme says so"
    return where
