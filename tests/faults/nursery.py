"""Processes that are ready at once: one process imports everything, and forks a child for each job.

    python -m tests.faults.nursery      a job on a line of standard input; its child's pid on a line of
                                        standard output. "wait PID": its exit status, once it has ended.

A child leads a process group of its own, with whatever it starts, so that the power can be cut for all of
it. What it says on standard error goes to ``<record>.err``.

The sum: a child takes 3 ms; an interpreter that imports the same, 200 ms.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.faults import writer
from tests.faults.work import Job

ROOT = Path(__file__).resolve().parent.parent.parent
END_S = 90.0  # A job takes a second, traced and on a busy machine twenty.


class Child:
    """A process that does a job. ``pid`` is its own and its group's."""

    def __init__(self, nursery: Nursery, pid: int, job: Job) -> None:
        self._nursery = nursery
        self._job = job
        self._descriptor = os.pidfd_open(pid)
        self.pid = pid

    def ends_within(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1_000))

    def kill(self) -> None:
        """SIGKILL to itself; what it started goes on."""
        signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def kill_all(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)

    def kill_index(self) -> None:
        """SIGKILL to what it started, if anything."""
        for pid in self.children():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def children(self) -> list[int]:
        return children_of(self.pid)

    def go(self) -> None:
        """Let it begin, where it waits."""
        os.kill(self.pid, signal.SIGUSR1)

    def stop_all(self) -> None:
        """SIGSTOP, and wait until nothing of it runs any more."""
        os.killpg(self.pid, signal.SIGSTOP)
        wait_until_stopped([self.pid, *self.children()])

    def end(self, seconds: float = END_S) -> int:
        """Its exit status; it is killed when it takes longer. Once."""
        in_time = self.ends_within(seconds)
        if not in_time:
            self.kill_all()
        status = self._nursery.wait(self.pid)
        os.close(self._descriptor)
        return status if in_time else -signal.SIGALRM

    def said(self) -> str:
        """The end of what it wrote to standard error."""
        return Path(f"{self._job.record}.err").read_text(errors="replace")[-3_000:]


class Nursery:
    """The process that forks. Use as a context manager: it and its children do not outlive it."""

    def __enter__(self) -> Nursery:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-B", "-m", "tests.faults.nursery"]
        self._pids: set[int] = set()
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in list(self._pids):
            os.killpg(pid, signal.SIGKILL)
            self.wait(pid)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(END_S)
        self._process.stdout.close()

    def start(self, job: Job) -> Child:
        pid = int(self._ask(job.to_json()))
        self._pids.add(pid)
        return Child(self, pid, job)

    def wait(self, pid: int) -> int:
        """The exit status of a child that has ended or is about to."""
        self._pids.discard(pid)
        return int(self._ask(f"wait {pid}"))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


def children_of(pid: int) -> list[int]:
    """What any of its threads started."""
    lists = [task.joinpath("children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [int(child) for text in lists for child in text.split()]


def wait_until_stopped(pids: Sequence[int]) -> None:
    poll = select.poll()
    while not all(map(_is_stopped, pids)):
        poll.poll(1)


def _is_stopped(pid: int) -> bool:
    """All its threads, or it has ended."""
    try:
        threads = [each.joinpath("stat").read_text() for each in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return not Path(f"/proc/{pid}").exists()
    return all(text.rpartition(")")[2].split()[0] in "TZX" for text in threads)


def _child(job: Job) -> int:
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    errors = os.open(f"{job.record}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (null, 1), (errors, 2)):
        os.dup2(source, target)
    try:
        writer.run(job)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        return 1
    return 0


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    for line in sys.stdin:
        if line.startswith("wait "):
            _, status = os.waitpid(int(line.split()[1]), 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            job = Job(**json.loads(line))
            answer = os.fork()
            if not answer:
                os._exit(_child(job))
            os.setpgid(answer, answer)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
