"""Streams and events of a device: work in a line, and the mark that says it is done.

A *stream* does what it is given one after the other, beside other streams; an *event* marks a place in it.
``CudaStreams`` is torch's; ``CpuStreams`` has a thread a stream and the same contract, so that orders which a
GPU makes rarely are made at will in tests.

    engine's stream  compute ─● e1            ●─ compute, which may overwrite
    copies' stream            └► copy ─● e2 ──┘

Invariants: what is queued behind ``after(event)`` begins when the event is done, never earlier; an event is
done when all that was queued before it is; an event whose device failed raises, each time it is asked.
Work that failed on the CPU fails the events behind it, as on a GPU. Work may write to tensors that an engine
made in inference mode. On CUDA each call is made with the stream's GPU current: a thread begins on GPU 0, and
one call there would take half a GiB of it for good.

The sum: 5 to 10 us of Python a call on CUDA; a wait asks all the time for 0.2 ms, by when most are over, then
every 0.05 to 1 ms.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

import torch

from kvcache.errors import KVCacheError, Unavailable

_SPIN_S: Final = 0.000_2
_PAUSE_S_MIN: Final = 0.000_05
_PAUSE_S_MAX: Final = 0.001
_END_S: Final = 20.0


class Event(Protocol):
    """A place in a stream."""

    def is_done(self) -> bool:
        """RAISES Unavailable when the device failed: nothing behind it counts."""

    def wait(self, timeout_s: float) -> bool:
        """Block until it is done. Was it, in time? RAISES Unavailable as ``is_done``."""


class Stream(Protocol):
    """One owner; ``mark`` and ``after`` also from the other stream's."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what ``work`` does with torch. RAISES Unavailable when the device refuses it.

        What the work touches must live until an event behind it is done."""

    def after(self, event: Event) -> None:
        """What is queued from now on begins when the event is done. Blocks nobody, but for a caller's own
        stream on the CPU, which is the caller. RAISES Unavailable."""

    def mark(self) -> Event:
        """Done when all that is queued by now is. RAISES Unavailable."""


class Streams(Protocol):
    """A device's. One a process and device."""

    device: torch.device

    def new(self, name: str, *, urgent: bool) -> Stream:
        """One that runs beside all others. ``urgent``: its kernels go before others'. RAISES Unavailable."""

    def current(self) -> Stream:
        """The one that the caller computes on."""

    def close(self) -> None:
        """End them, after what is queued, or a while. May be called twice."""


# --- CUDA ---------------------------------------------------------------------------------------


class CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)
        self._device = stream.device

    def is_done(self) -> bool:
        try:
            with torch.cuda.device(self._device):
                done: bool = self.event.query()
        except RuntimeError as error:
            raise failed(error) from error
        return done

    def wait(self, timeout_s: float) -> bool:
        # torch can wait only for ever: asking leaves a way out when the device hangs.
        pause, left_s = threading.Event(), timeout_s
        pause_s = _PAUSE_S_MIN
        until_s = time.perf_counter() + min(_SPIN_S, timeout_s)
        while not self.is_done():
            if time.perf_counter() < until_s:
                continue
            if left_s <= 0:
                return False
            pause.wait(min(pause_s, left_s))
            left_s -= pause_s
            pause_s = min(2 * pause_s, _PAUSE_S_MAX)
        return True


class CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def run(self, work: Callable[[], None]) -> None:
        try:
            with (
                torch.cuda.device(self._stream.device),
                torch.cuda.stream(self._stream),
                torch.inference_mode(),
            ):
                work()
        except RuntimeError as error:
            raise failed(error) from error

    def after(self, event: Event) -> None:
        try:
            if isinstance(event, CudaEvent):
                self._stream.wait_event(event.event)
            elif not event.wait(_END_S):
                raise RuntimeError(f"a copy took over {_END_S} s")
        except RuntimeError as error:
            raise failed(error) from error

    def mark(self) -> Event:
        try:
            return CudaEvent(self._stream)
        except RuntimeError as error:
            raise failed(error) from error


class CudaStreams:
    """REQUIRES of all its streams: no graph is being captured in this process while events are asked."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new(self, name: str, *, urgent: bool) -> Stream:
        try:
            return CudaStream(torch.cuda.Stream(self.device, priority=-1 if urgent else 0))
        except RuntimeError as error:
            raise failed(error) from error

    def current(self) -> Stream:
        return CudaStream(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        """Streams are torch's, and stay."""


# --- CPU ----------------------------------------------------------------------------------------


class CpuEvent:
    """``failure``: why the stream failed before it."""

    def __init__(self) -> None:
        self.failure: RuntimeError | None = None
        self._done = threading.Event()

    def settle(self, failure: RuntimeError | None) -> None:
        """By the stream, once."""
        self.failure = failure
        self._done.set()

    def is_done(self) -> bool:
        return self._done.is_set() and self._is_good()

    def wait(self, timeout_s: float) -> bool:
        return self._done.wait(timeout_s) and self._is_good()

    def _is_good(self) -> bool:
        if self.failure is not None:
            raise failed(self.failure) from self.failure
        return True


class CpuStream:
    """A thread that does what is queued. After a failure it does nothing more, and its events say why."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | CpuEvent | None] = queue.SimpleQueue()
        self._failure: RuntimeError | None = None
        self._is_dead = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=f"kvcache-{name}", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def after(self, event: Event) -> None:
        self._queue.put(lambda: wait_out(event))

    def mark(self) -> Event:
        event = CpuEvent()
        self._queue.put(event)
        if self._is_dead.is_set():
            self._settle_rest()
        return event

    def end(self) -> None:
        """After what is queued. Waits for nothing."""
        self._queue.put(None)

    def close(self) -> None:
        self.end()
        self._thread.join(_END_S)

    def _serve(self) -> None:
        try:
            while (work := self._queue.get()) is not None:
                if isinstance(work, CpuEvent):
                    work.settle(self._failure)
                elif self._failure is None:
                    self._do(work)
                del work  # Else what it holds is held until there is more to do.
        finally:  # Also when our own code is wrong: nobody waits for a thread that is gone.
            self._failure = self._failure or RuntimeError("the stream has ended")
            self._is_dead.set()
            self._settle_rest()

    def _settle_rest(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if isinstance(event := self._queue.get_nowait(), CpuEvent):
                    event.settle(self._failure)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                work()
        except RuntimeError as error:
            self._failure = error
        except KVCacheError as error:
            self._failure = RuntimeError(error.why or error.what)


class CpuCaller:
    """The caller's own line of work: what it computes is done when the call returns."""

    def run(self, work: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                work()
        except RuntimeError as error:
            raise failed(error) from error

    def after(self, event: Event) -> None:
        if not event.wait(_END_S):
            raise failed(RuntimeError(f"a copy took over {_END_S} s"))

    def mark(self) -> Event:
        event = CpuEvent()
        event.settle(None)
        return event


class CpuStreams:
    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._streams: list[CpuStream] = []

    def new(self, name: str, *, urgent: bool) -> Stream:
        stream = CpuStream(name)
        self._streams.append(stream)
        return stream

    def current(self) -> Stream:
        return CpuCaller()

    def close(self) -> None:
        while self._streams:
            self._streams.pop().close()

    def __del__(self) -> None:
        for stream in self._streams:  # Their threads wait for work, and hold nothing else.
            stream.end()


def streams_of(device: torch.device) -> Streams:
    """Those of a device of this process."""
    return CudaStreams(device) if device.type == "cuda" else CpuStreams()


def wait_out(event: Event) -> None:
    """Until it is done, however long. RAISES Unavailable."""
    while not event.wait(_END_S):
        pass


def failed(error: RuntimeError) -> Unavailable:
    """What torch raised, in our words."""
    return Unavailable(
        "unavailable",
        "the device failed under a copy",
        str(error).partition("\n")[0],
        "recompute; if it stays so, restart this process and look for Xid in the kernel's log",
    )
