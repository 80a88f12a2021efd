"""The supervisor of the HTTP process, with processes that do not do as they should."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache.config import NodeConfig
from kvcache.errors import BadInput
from kvcache.server import child
from kvcache.server.child import HttpChild

PATIENCE_S = 20


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """What runs instead of Python: a shell script. It leaves its process number in the file returned."""
    monkeypatch.setattr(child, "PAUSE_S_MIN", 0.001)
    monkeypatch.setattr(child, "PAUSE_S_MAX", 0.001)

    def install(script: str) -> Path:
        numbers = tmp_path / "pids"
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\necho $$ >> {numbers}\n{script}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))
        return numbers

    return install


def supervisor() -> HttpChild:
    return HttpChild("unix:///nowhere", NodeConfig(http="127.0.0.1:0"), "token")


def is_alive(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    return True


def test_one_that_never_gets_ready_is_ended(
    program: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = program("exec sleep 60")

    async def play() -> None:
        with pytest.raises(BadInput, match="HTTP does not start"):
            await supervisor().start()

    for start_s in (0.2, 2.0, 20.0):  # A busy machine may need more to begin it.
        monkeypatch.setattr(child, "START_S", start_s)
        asyncio.run(play())
        if numbers.exists():
            break
    assert [is_alive(number) for number in numbers.read_text().split()] == [False]


@pytest.mark.slow
def test_one_that_fails_to_start_again_is_tried_again(
    program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run serves and ends, the second hangs, then nothing can be run at all, then it serves."""
    numbers = program(
        f"""count=$(wc -l < {tmp_path}/pids)
        [ $count = 2 ] && touch {tmp_path}/hangs && exec sleep 60
        echo http://127.0.0.1:1
        [ $count = 1 ] && exit 3
        exec sleep 60"""
    )
    create = asyncio.create_subprocess_exec
    tries: list[int] = []

    async def sometimes(*command: str, **more: object) -> asyncio.subprocess.Process:
        tries.append(len(tries))
        if len(tries) == 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        process = await create(*command, **more)  # type: ignore[arg-type]
        while len(tries) == 2 and not (tmp_path / "hangs").exists():
            await asyncio.sleep(0)
        monkeypatch.setattr(child, "START_S", 0.2 if len(tries) == 2 else PATIENCE_S)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", sometimes)

    async def play() -> None:
        http = supervisor()
        assert await http.start() == "http://127.0.0.1:1"
        async with asyncio.timeout(PATIENCE_S):
            while len(tries) < 4 or len(numbers.read_text().split()) < 3:
                await asyncio.sleep(0)
        _, hung, serving = numbers.read_text().split()
        assert (is_alive(hung), is_alive(serving)) == (False, True)
        await http.close()
        assert not is_alive(serving)

    asyncio.run(play())


@pytest.mark.slow
def test_the_reason_of_one_that_does_not_start_is_the_nodes() -> None:
    """With what helps: it may be another address than HTTP's that cannot be had."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        http = HttpChild(
            "unix:///nowhere/node.sock", NodeConfig(http=f"127.0.0.1:{port}", index_listen="none"), ""
        )
        with pytest.raises(BadInput) as caught:
            asyncio.run(http.start())
        assert (caught.value.code, caught.value.why) == ("address_in_use", "Address already in use")
        index = NodeConfig(http="127.0.0.1:0", index_listen=f"tcp://127.0.0.1:{port}")
        with pytest.raises(BadInput, match="give another --index-listen"):
            asyncio.run(HttpChild("unix:///nowhere/node.sock", index, "").start())
