"""Prompts go to the demo's client processes one at a time, and what became of them is added up.

A thread for each process hands it a prompt and waits for the outcome, so that a fast client takes more
prompts than a slow one. The threads do nothing else; ``Feed`` is the one thing they share.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvcache.clock import NS_PER_S
from kvcache.demo_client import READY, Outcome, Prompt, Setup
from kvcache.demo_report import Totals
from kvcache.errors import Unavailable
from kvcache.eviction.traces.trace import Request, Trace

END_S = 5.0


class Feed:
    """Hands out prompts to the clients' threads, and adds up what came back."""

    def __init__(self, trace: Trace, limit: int, totals: Totals) -> None:
        self.totals = totals
        self.limit = min(limit, trace.request_count)
        self.hit_again_s = -1.0
        self.last_hit: Request | None = None
        self._trace = trace
        self._lock = threading.Lock()
        self._next = 0
        self._closed = False
        self._watch_from_ns = 0

    @property
    def done_share(self) -> float:
        return self.totals.requests / self.limit

    def take(self) -> Request | None:
        """The next prompt; None when there is no more to do."""
        with self._lock:
            if self._closed or self._next >= self.limit:
                return None
            self._next += 1
            return self._trace.request(self._next - 1)

    def give(self, request: Request, outcome: Outcome) -> None:
        """What became of ``request``."""
        with self._lock:
            self.totals.add(request.prompt_tokens, outcome)
            if outcome.hit_blocks:
                self.last_hit = request
            if self._watch_from_ns and self.hit_again_s < 0 and outcome.hit_blocks and not outcome.away:
                self.hit_again_s = (time.monotonic_ns() - self._watch_from_ns) / NS_PER_S

    def watch_for_hit(self) -> None:
        """The node is gone since now: ``hit_again_s`` will be the time from now to the next hit."""
        with self._lock:
            self._watch_from_ns = time.monotonic_ns()

    def close(self) -> None:
        with self._lock:
            self._closed = True


class Client:
    """One client process, and the thread that feeds it: made, then ``begin``, then done or closed."""

    def __init__(self, setup: Setup, feed: Feed, log: Path) -> None:
        """The process starts, and connects by itself."""
        self._setup = setup
        self._feed = feed
        self._log = log
        with log.open("wb") as sink:
            # Its own session: Ctrl-C is for the demo, which then ends its clients.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvcache.demo_client"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._target, self._source = self._process.stdin, self._process.stdout
        self._thread = threading.Thread(target=self._run, name="demo client", daemon=True)
        with contextlib.suppress(BrokenPipeError):  # It is already dead: begin says so.
            self._send(setup)

    def begin(self) -> None:
        """Wait until it is connected, then feed it. RAISES Unavailable when it ends instead."""
        if self._source.readline() != READY:
            self._process.wait()
            self.check()
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def check(self) -> None:
        """RAISES Unavailable when the process ended in the middle of its work."""
        if self._process.poll() not in (None, 0):
            end = self._log.read_text(errors="replace")[-1_000:]
            raise Unavailable("unavailable", f"a client ended with status {self._process.returncode}", end)

    def close(self) -> None:
        """End the process: it has nothing to lose. May be called twice."""
        self._process.kill()
        self._process.wait()
        if self._thread.is_alive():
            self._thread.join(END_S)
        with contextlib.suppress(BrokenPipeError):
            self._target.close()
        self._source.close()

    def _run(self) -> None:
        with contextlib.suppress(BrokenPipeError), self._target, self._source:
            while (request := self._feed.take()) is not None:
                self._send(self._prompt(request))
                line = self._source.readline()
                if not line:
                    return
                self._feed.give(request, msgspec.json.decode(line, type=Outcome))

    def _send(self, message: Setup | Prompt) -> None:
        self._target.write(msgspec.json.encode(message) + b"\n")
        self._target.flush()

    def _prompt(self, request: Request) -> Prompt:
        return Prompt(list(full_blocks(request, self._setup.block_tokens)), request.session)


def full_blocks(request: Request, block_tokens: int) -> Sequence[int]:
    """Those of its blocks that are stored: the tokens say how many, a trailing partial one is not."""
    return request.blocks[: request.prompt_tokens // block_tokens]
