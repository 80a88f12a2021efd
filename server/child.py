"""The HTTP process of a node: started with it, restarted when it dies, gone when the node is gone.

The child holds the read end of a pipe on its standard input; when the node dies, however it dies, the
pipe ends and the child leaves. It proves who it is with a token that only this node and it know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys

import msgspec

from kvcache.config import NodeConfig, parse_bind
from kvcache.errors import CODES, BadInput

log = logging.getLogger("kvcache.server")

START_S = 20.0
STOP_S = 2.0
PAUSE_S_MIN = 0.2
PAUSE_S_MAX = 10.0


class HttpChild:
    """Supervises ``python -m kvcache.server.http``."""

    def __init__(self, node_address: str, config: NodeConfig, token: str) -> None:
        self._node_address = node_address
        self._config = config
        self._token = token
        self._bind = config.http
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self.restarts = 0

    async def start(self) -> str:
        """The address it serves (``http://127.0.0.1:8210``). RAISES BadInput if it does not start."""
        address = await self._launch()
        host = parse_bind(self._bind, "http")
        assert host is not None
        # A port that the system chose is kept across restarts.
        self._bind = address.removeprefix("http://")
        self._task = asyncio.get_running_loop().create_task(self._watch())
        return address

    async def close(self) -> None:
        """End the child. May be called twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _launch(self) -> str:
        """RAISES BadInput when it does not serve; then no process of it is left."""
        command = [sys.executable, "-m", "kvcache.server.http", "--node", self._node_address]
        command += ["--bind", self._bind, "--index-bytes", str(self._config.index_bytes_max)]
        for address in self._index_addresses():
            command += ["--listen", address]
        if self._config.credentials:
            command += ["--credentials", self._config.credentials]
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "KVCACHE_TOKEN": self._token},
            )
        except OSError as error:
            raise BadInput("unavailable", "the HTTP process cannot be started", str(error)) from error
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), START_S)
        except TimeoutError:
            line = b""
        if not line.startswith(b"http"):
            await self._end()
            raise self._refusal(line)
        return line.decode().strip()

    def _refusal(self, line: bytes) -> BadInput:
        """What the process said on its way out; if it said nothing, it is stuck or has died."""
        try:
            code, what, why, todo = msgspec.json.decode(line, type=tuple[str, str, str, str])
        except msgspec.DecodeError:
            what, why = f"HTTP does not start on {self._bind}", "the log above may have its reason"
            return BadInput("unavailable", what, why, "try again, or --http none")
        return BadInput(code if code in CODES else "unavailable", what, why, todo)

    def _index_addresses(self) -> list[str]:
        """The node's socket may be the default one, which the settings do not name."""
        beside = self._node_address.removeprefix("unix://")
        return msgspec.structs.replace(self._config, socket=beside).index_addresses

    async def _watch(self) -> None:
        pause_s = PAUSE_S_MIN
        while True:
            if self._process is not None:  # None: the last try to start it failed.
                status = await self._process.wait()
                log.error("the HTTP process ended with status %s; it is restarted in %.1f s", status, pause_s)
            self.restarts += 1
            await asyncio.sleep(pause_s)
            try:
                await self._launch()
                pause_s = PAUSE_S_MIN
            except BadInput as error:
                log.error("%s", error)
                pause_s = min(pause_s * 2, PAUSE_S_MAX)
