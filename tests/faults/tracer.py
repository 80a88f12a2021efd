"""Makes chosen system calls of processes fail, lie, hang or kill, with strace.

What a traced process starts is traced too; each thread of each process counts its calls for itself.

The sum: attaching takes 30 ms, a traced call 50 us.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.nursery import Child

END_S = 30.0


@contextlib.contextmanager
def attached(
    pids: Sequence[int], call: str, what: str, when: str, log: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """``what`` is done to their calls of ``call``, ``when``, in strace's words, until the end of the block.

    Skips where nobody may trace."""
    if shutil.which("strace") is None:
        pytest.skip("strace is missing: install it")
    words = ["strace", "-f", "-o", str(log or "/dev/null"), "-e", f"trace={call}"]
    words += ["-e", f"inject={call}:{what}:when={when}"]
    for pid in pids:
        words += ["-p", str(pid)]
    tracer = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    with tracer.stderr as said:
        for _ in pids:
            line = said.readline()
            if "Operation not permitted" in line:
                tracer.wait(END_S)
                pytest.skip(f"not on this machine: nobody may trace a process: {line}")
            assert "attached" in line, line + said.read()
        try:
            yield tracer
        finally:
            tracer.send_signal(signal.SIGINT)
            said.read()
            tracer.wait(END_S)


def run_traced(child: Child, log: Path, call: str, what: str, when: str) -> tuple[int, int]:
    """Let ``child``, which waits, go with ``what`` done to its calls from the opening of its device on. Its
    exit status, and how many calls were tampered with."""
    with attached([child.pid], call, what, when, log):
        child.go()
        status = child.end()
    text = log.read_text(errors="replace")
    return status, sum(map(text.count, ("(INJECTED)", "(DELAYED)", "+++ killed by SIGKILL +++")))
