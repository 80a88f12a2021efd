"""Who has come to a listener and has not shown yet that he may: bounded, counted, and seldom spoken of.

    enter ──► waiting ──► leave (he proved it, or he is gone)
                 └── too many wait: who has waited longest is sent away

A peer proves himself within two round trips, so it is the strangers who wait longest: a crowd of them, from
one host or many, holds few descriptors for a moment and keeps no peer out. Hosts are told apart by address,
IPv6 by the 64 bits that a host cannot choose.

For one loop. The sum: 20 us a connection when it is full.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable

from kvcache.clock import NS_PER_S, Clock

log = logging.getLogger("kvcache.transport")

WAITING_MAX = 64
WAITING_OF_A_HOST_MAX = 16
_SAY_EVERY_NS = NS_PER_S


class Guest:
    """One who waits. Use ``Doorstep.enter``."""

    def __init__(self, doorstep: Doorstep, host: str, send_away: Callable[[], None]) -> None:
        self.host = host
        self.source = _source(host)
        self.send_away = send_away
        self.is_sent_away = False
        self._doorstep = doorstep

    def leave(self) -> None:
        """He waits no more. May be called twice."""
        self._doorstep.forget(self)

    def refuse(self, why: str) -> None:
        """He is not let in. ``why`` is in our words."""
        if not self.is_sent_away:
            self._doorstep.refused(self.host, why)


class Doorstep:
    def __init__(self, name: str, clock: Clock) -> None:
        """``name``: of the listener, without its key."""
        self.name = name
        self.refused_count = 0
        self._clock = clock
        self._waiting: dict[Guest, None] = {}  # In the order of their coming.
        self._said_ns: int | None = None
        self._said_count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, host: str, send_away: Callable[[], None]) -> Guest:
        """``send_away`` is called when he has to make room, once at most, and not before this returns."""
        guest = Guest(self, host, send_away)
        of_his_host = [other for other in self._waiting if other.source == guest.source]
        if len(of_his_host) >= WAITING_OF_A_HOST_MAX:
            self._send_away(of_his_host[0])
        elif len(self._waiting) >= WAITING_MAX:
            self._send_away(next(iter(self._waiting)))
        self._waiting[guest] = None
        return guest

    def forget(self, guest: Guest) -> None:
        self._waiting.pop(guest, None)

    def refused(self, host: str, why: str) -> None:
        """One was not let in: counted, and said once a second at most."""
        self.refused_count += 1
        now_ns = self._clock.now_ns()
        if self._said_ns is not None and now_ns - self._said_ns < _SAY_EVERY_NS:
            return
        count, self._said_count = self.refused_count - self._said_count, self.refused_count
        self._said_ns = now_ns
        log.warning("%s let %d in no further, the last from %s: %s", self.name, count, host, why)

    def _send_away(self, guest: Guest) -> None:
        self.forget(guest)
        guest.is_sent_away = True
        guest.send_away()
        self.refused(guest.host, "too many came at once")


def _source(host: str) -> str:
    """What bounds are kept by."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or int(found) >> 64)
    return host
