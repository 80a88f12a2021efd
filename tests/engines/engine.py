"""An engine in a process of its own, as the tests hold it: commands in, answers out, never outlived."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
ANSWER_S = 90.0
END_S = 20.0


class EngineProcess:
    """``python -m MODULE ARGUMENTS`` that answers JSON lines. Its standard error goes to ``log``."""

    def __init__(self, module: str, arguments: list[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                cwd=ROOT,
            )
        try:
            assert self._answer() == {"ready": True}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({command: arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> int:
        """End of commands; the engine leaves in order. Returns its exit status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            return self._process.wait(END_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(ANSWER_S) else ""
        if not line:
            self._process.kill()
            raise AssertionError("the engine gave no answer; its log ends:\n" + self._log.read_text()[-4000:])
        answer: dict[str, Any] = json.loads(line)
        return answer
