"""A real node in its own process, for tests, the demo and benchmarks: start, kill, stop, wake, restart."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from kvcache.errors import Unavailable

READY_S = 60.0
END_S = 30.0


class NodeProcess:
    """``kvcache serve`` with the given settings. Use as a context manager: the process never outlives it."""

    def __init__(
        self, settings: Mapping[str, str], log: Path | None = None, interpreter: str = sys.executable
    ) -> None:
        """``settings`` are those of ``config.NodeConfig``; switches are "true". Its log goes to ``log``, or
        nowhere. Another ``interpreter`` has other transports."""
        self._settings = dict(settings)
        self._log = log
        self._interpreter = interpreter
        self._process: subprocess.Popen[str] | None = None
        self.socket = ""
        self.tcp = ""
        self.http = ""

    def __enter__(self) -> NodeProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the node was not started"
        return self._process.pid

    def start(self) -> None:
        """Start and wait until clients can connect. RAISES Unavailable with the end of its log."""
        assert self._process is None, "the node runs already"
        command = [self._interpreter, "-m", "kvcache", "serve", "--json"]
        for name, value in self._settings.items():
            flag = f"--{name.replace('_', '-')}"
            command += [flag] if value == "true" else [flag, value]
        sink = self._log.open("ab") if self._log else None
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=sink or subprocess.DEVNULL, text=True
            )
        finally:
            if sink:
                sink.close()
        try:
            ready = self._ready_line()
        except BaseException:  # An interrupt too: nobody else would end it.
            self.close()
            raise
        self.socket, self.tcp, self.http = ready["socket"], ready["tcp"], ready["http"]

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self._wait()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def pause(self) -> None:
        """SIGSTOP: the node keeps its sockets and answers nothing, from when this returns."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def wake(self) -> None:
        self.signal(signal.SIGCONT)

    def close(self) -> None:
        """End it politely, else by force. May be called twice."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._wait()

    def _wait(self) -> None:
        assert self._process is not None
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None

    def _ready_line(self) -> dict[str, str]:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(READY_S) else ""
        try:
            ready: dict[str, str] = json.loads(line)
        except ValueError:
            raise Unavailable("unavailable", "the node did not start", self._log_end()) from None
        return ready

    def _log_end(self) -> str:
        if self._log is None or not self._log.exists():
            return "its log was not kept"
        return self._log.read_text(errors="replace")[-1000:]
