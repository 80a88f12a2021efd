"""How long a policy may reckon: one that never comes back would stop a node, and all that wait for it.

    begin ──► the policy's call ──► end            look, look, ... from another thread, now and then
                     ▲                                │ the same call has taken ``LIMIT_NS`` of the processor
                     └────── TooSlow, raised there ───┘ the second time that this is seen

What counts is the processor's time in one call, so a machine that looks away for a minute does no harm. The
exception is raised between two instructions of the policy's Python: code in C that does not return, and a
policy that swallows all exceptions for ever, nothing can stop but the end of the process.

Invariant: nothing is raised outside a call. A call says first that it is over (``_busy``), then looks whether
it was suspected; who looks says first that it suspects, and at the next look, under the lock, sees whether
the call goes on. So one of the two sees the other; what was raised too late is taken back.

The sum: 0.3 us a call.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

LIMIT_NS = 5_000_000_000
_NOT_BUSY = 0

_P = ParamSpec("_P")
_T = TypeVar("_T")


class TooSlow(BaseException):
    """A policy took too long. No ``Exception``: a policy that survives its own must not survive this."""


def thread_cpu_ns(thread: int) -> int:
    """The processor time that this thread has had."""
    return time.clock_gettime_ns(time.pthread_getcpuclockid(thread))


class Patience:
    """``call`` from one thread, ``look`` from another."""

    def __init__(self, limit_ns: int = LIMIT_NS, cpu_ns: Callable[[int], int] = thread_cpu_ns) -> None:
        self._limit_ns = limit_ns
        self._cpu_ns = cpu_ns
        self._lock = threading.Lock()
        self._thread = 0
        self._calls = 0
        self._busy = _NOT_BUSY  # The number of the call that goes on.
        self._suspect = _NOT_BUSY  # That of one that takes long.
        self._raised = False
        self._seen = _NOT_BUSY
        self._seen_ns = 0

    def call(self, asked: Callable[_P, _T], *given: _P.args, **named: _P.kwargs) -> _T:
        """What it answers. RAISES TooSlow, and what it raises. Calls are not nested."""
        if self._suspect:
            self._forgive()
        self._thread = threading.get_ident()
        self._calls += 1
        self._busy = self._calls
        try:
            return asked(*given, **named)
        finally:
            self._busy = _NOT_BUSY
            if self._suspect and self._forgive():
                raise TooSlow(f"no answer within {self._limit_ns / 1e9:g} s of the processor's time")

    def look(self) -> None:
        """Called every now and then."""
        busy = self._busy
        if busy == _NOT_BUSY:
            return
        now_ns = self._cpu_ns(self._thread)
        if busy != self._seen:
            self._seen, self._seen_ns = busy, now_ns
        elif now_ns - self._seen_ns >= self._limit_ns:
            if self._suspect != busy:
                self._suspect = busy
                return
            with self._lock:
                if self._busy == busy and not self._raised:
                    self._raised = True
                    _raise_in(self._thread, TooSlow)

    def _forgive(self) -> bool:
        """The suspected call is over. Was something raised for it? It is not raised any more."""
        with self._lock:
            raised = self._raised
            if raised:
                _raise_in(self._thread, None)
            self._raised, self._suspect = False, _NOT_BUSY
            return raised


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """None: not any more, if it was to be."""
    what = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)
