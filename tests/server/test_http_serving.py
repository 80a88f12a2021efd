"""The door of an HTTP address: how many may stand there, and for how long without a word."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from kvcache.errors import BadInput
from kvcache.server import http_serving
from kvcache.server.http_serving import HttpSite
from tests.server.http_double import in_loop

GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def app() -> web.Application:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="hello")

    made = web.Application()
    made.router.add_get("/", hello)
    return made


@asynccontextmanager
async def serving(connections_max: int = 8) -> AsyncIterator[Callable[[], Awaitable[Line]]]:
    """What opens a connection."""
    site, opened = HttpSite(app(), connections_max), list[asyncio.StreamWriter]()
    host, _, port = (await site.listen("127.0.0.1", 0)).removeprefix("http://").rpartition(":")

    async def line() -> Line:
        reader, writer = await asyncio.open_connection(host, int(port))
        opened.append(writer)
        return reader, writer

    async with asyncio.timeout(20):
        yield line
    for writer in opened:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    await site.close()
    await site.close()


async def closed(line: Line) -> bool:
    """It may be before all was taken that was written."""
    try:
        return await line[0].read() == b""
    except OSError:
        return True


async def answered(line: Line) -> bool:
    try:
        line[1].write(GET)
        return (await line[0].readline()).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


@in_loop
async def test_one_connection_too_many_is_closed_and_there_is_room_when_others_go() -> None:
    async with serving(2) as line:
        one, two = await line(), await line()
        assert await answered(one) and await answered(two)
        assert not await answered(await line())
        one[1].close()
        while not await answered(await line()):
            await asyncio.sleep(0)


@in_loop
async def test_who_never_sends_a_whole_header_is_closed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_serving, "IDLE_S", 0.02)
        async with serving() as line:
            silent, slow = await line(), await line()
            slow[1].write(GET[:20])
            assert await closed(silent) and await closed(slow)


@in_loop
async def test_an_address_in_use_is_named_with_its_setting() -> None:
    first = HttpSite(app())
    url = await first.listen("127.0.0.1", 0)
    second = HttpSite(app(), setting="bind")
    with pytest.raises(BadInput, match=r"cannot be bound.*--bind"):
        await second.listen("127.0.0.1", int(url.rpartition(":")[2]))
    await second.close()
    await first.close()
