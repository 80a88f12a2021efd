"""One request passed on to a worker, and its answer passed back, byte by byte as it comes.

    open ──connected, header, first bytes──► Answer ──more──► ... ──► the end
      └ Silent: nothing was heard of it,        └ Cut: it died in the middle
        another worker may be tried

Nothing is decoded, decompressed or buffered: a worker that is faster than the client is held up by TCP. Every
wait has an end. A connection carries one request: a worker that closed an idle one would else look dead.

The sum: 0.3 ms to connect and ask on loopback, 40 us a chunk.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from multidict import CIMultiDict

from kvcache.fleet import Worker

HOP_BY_HOP = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "transfer-encoding", "upgrade"),
    }
)
AWAY = frozenset({502, 503, 504})
"""Statuses by which a worker, or what stands before it, says that it cannot answer now."""
BUSY = 429
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
"""What this host has no more of: no fault of a worker's."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long what may take, in seconds."""

    connect_s: float = 2.0
    first_byte_s: float = 60.0
    idle_s: float = 60.0
    whole_s: float = 600.0


class Silent(Exception):
    """Nothing of an answer came. ``why`` in plain words; ``dead``: ask this worker nothing for a while;
    ``busy``: it said that it is."""

    def __init__(self, why: str, dead: bool = True, busy: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.dead = dead
        self.busy = busy


class Cut(Exception):
    """The answer ended in the middle."""


class Answer:
    """A worker's answer, of which ``first`` came already."""

    def __init__(self, response: aiohttp.ClientResponse, first: bytes, idle_s: float) -> None:
        self.status = response.status
        self.headers = passed_on(response.headers)
        self.first = first
        self._response = response
        self._idle_s = idle_s

    async def rest(self) -> AsyncIterator[bytes]:
        """What follows ``first``, as it comes. RAISES Cut."""
        while chunk := await self._more():
            yield chunk

    async def _more(self) -> bytes:
        try:
            async with asyncio.timeout(self._idle_s):
                return await self._response.content.readany()
        except TimeoutError as error:
            raise Cut(f"nothing came for {self._idle_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Cut(_said(error)) from error


class Forwarder:
    """``open`` may be called by many at once."""

    def __init__(self, session: aiohttp.ClientSession, waits: Waits) -> None:
        self._session = session
        self._waits = waits

    @asynccontextmanager
    async def open(
        self,
        worker: Worker,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        stream: bool,
        left_s: float,
    ) -> AsyncIterator[Answer]:
        """The worker's answer to this POST; when the block is left, its connection is closed. Without
        ``stream`` nothing comes before all is computed: then ``whole_s`` bounds the wait. ``left_s``: what is
        left of the request's time; a worker that was given less than half its own is not dead for it. RAISES
        Silent."""
        allowed_s = self._waits.first_byte_s if stream else self._waits.whole_s
        within_s = min(allowed_s, left_s)
        response: aiohttp.ClientResponse | None = None
        try:
            try:
                async with asyncio.timeout(within_s):
                    response = await self._session.request(
                        "POST", url_of(worker, path), data=body, headers=headers, allow_redirects=False
                    )
                    self._check(response)
                    first = await response.content.readany()
            except aiohttp.ServerTimeoutError as error:  # Of the connection; a TimeoutError as well.
                raise Silent(_said(error)) from error
            except TimeoutError as error:
                dead = 2 * within_s >= allowed_s
                raise Silent(f"no answer within {within_s:.3g} s", dead) from error
            except (aiohttp.ClientError, OSError) as error:
                raise Silent(_said(error), dead=getattr(error, "errno", None) not in OURS) from error
            yield Answer(response, first, self._waits.idle_s)
        finally:
            if response is not None:
                response.close()

    def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status in AWAY:
            raise Silent(f"it answers {response.status}")
        if response.status == BUSY:
            raise Silent("it answers 429: it is busy", dead=False, busy=True)


def open_session(connections_max: int, waits: Waits) -> aiohttp.ClientSession:
    """Without cookies, proxies of the environment, or decompression; nor does it ask for what the client did
    not ask for, who could not read it."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections_max, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=waits.connect_s, connect=waits.connect_s * 2),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
        trust_env=False,
        raise_for_status=False,
    )


def passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """All but those that are between two ends of one connection."""
    named = {
        name.strip().lower()
        for value in CIMultiDict(headers).getall("Connection", [])
        for name in value.split(",")
    }
    dropped = HOP_BY_HOP | named
    pairs = [(name, value) for name, value in headers.items() if name.lower() not in dropped]
    return CIMultiDict(pairs)


def url_of(worker: Worker, path: str) -> str:
    """``path`` begins with ``/v1``, and so may the worker's own."""
    return worker.url.rstrip("/").removesuffix("/v1") + path


def _said(error: BaseException) -> str:
    """In plain words, without addresses that the client has no need to know."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"it cannot be reached: {error.os_error.strerror or type(error.os_error).__name__}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection"
    if isinstance(error, aiohttp.ServerTimeoutError):
        return "it cannot be reached in time"
    return f"its connection failed: {type(error).__name__}"
