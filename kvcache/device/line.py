"""Where an engine's blocks stand in its work, and what comes of a device that fails or answers nothing there.

    made ── told: behind that place ─┬► done ── joined: the sums
                                     ├► failed: the device is lost, and nothing runs on
                                     └► silent (``waits``): it is given up; what may run on does so before
                                        all that the engine does from then on

The sum: one event to mark the place, one to wait for: 10 us.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvcache.device.streams import Stream, failed, streams_of
from kvcache.device.sums import joined
from kvcache.device.waits import Owner, Waits
from kvcache.errors import Unavailable


class Line:
    """The place in the engine's work at which it was made, whichever thread goes on from there."""

    def __init__(self, owner: Owner, device: torch.device) -> None:
        """RAISES Unavailable."""
        self._owner = owner
        self.waits = Waits(owner)
        self._streams = streams_of(device)
        self._engine = self._streams.current()
        self.ready = self._engine.mark()
        self._beside: list[Stream] = []
        self._is_over = True

    @property
    def here(self) -> Stream:
        """What ``told`` runs on."""
        return self._streams.current()

    def follow(self) -> None:
        """The place moves on: also behind what the current stream has queued by now. RAISES Unavailable."""
        self.here.after(self.ready)
        self.ready = self.here.mark()

    def beside(self) -> Stream:
        """Another, until ``told`` ends. REQUIRES: what is queued there is waited for in ``here``."""
        self._beside.append(self._streams.new("link", urgent=True))
        return self._beside[-1]

    def is_over(self) -> bool:
        """After ``told``: does nothing of it run any more? Not when even the wait for it was interrupted."""
        return self._is_over

    @contextmanager
    def told(self) -> Iterator[None]:
        """Behind that place. What torch raises when the device failed is raised in our words, and the device
        is lost; whatever is raised, nothing that was queued runs on, unless the device is stuck: then what
        the engine does from now on comes after it."""
        if self._owner.is_stuck:
            raise silent()
        current = self._streams.current()
        current.after(self.ready)
        self._is_over = True
        try:
            with torch.inference_mode():  # An engine's tensors may have been made in it.
                yield
        except BaseException as error:
            self._is_over = False
            self._is_over = self._have_ended(*self._beside, current)
            if isinstance(error, RuntimeError):
                raise failed(error) from error
            raise
        finally:
            if self._beside:
                self._beside.clear()
                self._streams.close()

    def joined(self, chunk_sums: torch.Tensor) -> bytes:
        """Once all that was queued is done. RAISES Unavailable when it is not in time."""
        if not self.waits.has_ended(self.here.mark()):
            raise silent()
        return b"".join(joined(chunk_sums))

    def _have_ended(self, *streams: Stream) -> bool:
        """Does nothing that was queued there run any more?"""
        for stream in streams:
            try:
                mark = stream.mark()
                if not self.waits.has_ended(mark):
                    self._engine.after(mark)
            except Unavailable as failure:  # Then nothing there runs on.
                self._owner.lose(failure.why)
        return not self._owner.is_stuck


def silent() -> Unavailable:
    """For what was asked of a device that is stuck."""
    return Unavailable("unavailable", "the device does not answer", "it hangs", "restart this process")
