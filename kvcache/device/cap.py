"""How much may be copied behind the engine's back: so many bytes a second, saved up for a short while.

A copy over PCIe takes memory bandwidth and launches from the engine that decodes beside it. Held to a share
of the link's rate, copies are under way that share of the time at most, and can slow decoding by no more. An
engine's saves are held so, and what a node copies out of a GPU.

Decides only: no clock, no I/O. One owner. The sum: under 1 us a call.
"""

from __future__ import annotations

from kvcache.clock import NS_PER_MS, NS_PER_S
from kvcache.errors import BadInput

BURST_NS = 10 * NS_PER_MS


class Cap:
    """Bytes that may be copied now grow by ``bytes_s``, up to those of ``BURST_NS``. They may go below 0:
    a step is never cut, and what it took beyond is paid back before the next."""

    def __init__(self, bytes_s: float, now_ns: int) -> None:
        """RAISES BadInput (bad_config) when it would let nothing through."""
        if not bytes_s > 0:
            raise BadInput("bad_config", f"a cap of {bytes_s} bytes a second", "nothing would be saved")
        self._bytes_s = bytes_s
        self._most = bytes_s * BURST_NS / NS_PER_S
        self._left = self._most
        self._at_ns = now_ns

    @classmethod
    def of_share(cls, share: float, link_bytes_s: float, now_ns: int) -> Cap:
        """``share`` of what the link was measured to carry. RAISES BadInput when it is not in (0, 1]."""
        if not 0 < share <= 1:
            raise BadInput("bad_config", f"a share of {share} of the link", "it is over 0 and at most 1")
        return cls(share * link_bytes_s, now_ns)

    def is_open(self, now_ns: int) -> bool:
        """May one more step be copied?"""
        grown = self._bytes_s * (now_ns - self._at_ns) / NS_PER_S
        self._left = min(self._most, self._left + grown)
        self._at_ns = now_ns
        return self._left > 0

    def opens_in_ns(self, now_ns: int) -> int:
        """So long until ``is_open``, when nothing is spent meanwhile. 0: it is."""
        if self.is_open(now_ns):
            return 0
        return int(-self._left * NS_PER_S / self._bytes_s) + 1

    def spend(self, size_bytes: int) -> None:
        """So much is being copied."""
        self._left -= size_bytes
