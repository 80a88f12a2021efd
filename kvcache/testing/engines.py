"""An engine in a process of its own, for tests and the demo: commands in, answers out, never outlived."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvcache.errors import Unavailable

ANSWER_S = 300.0
END_S = 60.0
LOG_CHARS = 4_000


class EngineProcess:
    """``python -m MODULE ARGUMENTS`` that says ``{"ready": true}`` and then answers JSON lines.

    Its standard error goes to ``log``. Use as a context manager: the process never outlives it."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, folder: Path | None = None) -> None:
        """Starts, in ``folder``, and returns at once; ``wait_ready`` waits."""
        self._log = log
        with log.open("ab") as sink:
            # Its own session: Ctrl-C is for the one who drives it, who then ends it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                cwd=folder,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._target, self._source = self._process.stdin, self._process.stdout

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_ready(self) -> EngineProcess:
        """RAISES Unavailable with the end of its log when it does not get ready; it is gone then."""
        try:
            answer = self._answer()
            assert answer == {"ready": True}, answer
        except BaseException:
            self._process.kill()
            self.close()
            raise
        return self

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """RAISES Unavailable when there is no answer."""
        self._target.write(json.dumps({command: arguments}) + "\n")
        self._target.flush()
        return self._answer()

    def close(self) -> int:
        """End of commands; the engine leaves in order, or by force. Returns its exit status. May be
        called twice."""
        try:
            self._target.close()
            return self._process.wait(END_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._source.close()

    def _answer(self) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._source, selectors.EVENT_READ)
            line = self._source.readline() if selector.select(ANSWER_S) else ""
        if not line:
            self._process.kill()
            end = self._log.read_text(errors="replace")[-LOG_CHARS:]
            raise Unavailable("unavailable", "the engine gave no answer; its log ends", end)
        answer: dict[str, Any] = json.loads(line)
        return answer
