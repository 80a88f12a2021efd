"""Makes chosen system calls of a process fail, lie or kill, with strace.

The process waits until the tracer is there, so counting begins with the opening of its device. What it
starts is traced too; each process counts for itself.

The sum: attaching takes 30 ms, a traced call 50 us.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.nursery import Child

END_S = 30.0


def run_traced(child: Child, log: Path, call: str, what: str, when: str) -> tuple[int, int]:
    """Let ``child``, which waits, go with ``what`` done to its calls of ``call``, ``when``: in strace's
    words. Its exit status, and how many calls were tampered with. Skips where nobody may trace."""
    if shutil.which("strace") is None:
        pytest.skip("strace is missing: install it")
    words = ["strace", "-f", "-o", str(log), "-p", str(child.pid)]
    words += ["-e", f"trace={call}", "-e", f"inject={call}:{what}:when={when}"]
    tracer = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    with tracer.stderr as said:
        first = said.readline()
        child.go()
        status = child.end()
        rest = said.read()
    tracer.wait(END_S)
    if "Operation not permitted" in first:
        pytest.skip(f"not on this machine: nobody may trace a process: {first}")
    assert "attached" in first, first + rest
    text = log.read_text(errors="replace")
    return status, text.count("(INJECTED)") + text.count("(DELAYED)") + text.count(
        "+++ killed by SIGKILL +++"
    )
