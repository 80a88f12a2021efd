"""Transports by the scheme of an address: ours in the table, others' by entry point ``kvcache.transports``.

A module is imported only when its scheme is asked for: what carries RDMA is heavy, and most do without. An
entry point names a callable that takes ``Limits`` and a ``Clock``. A scheme of ours cannot be taken over.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from kvcache.clock import Clock, SystemClock
from kvcache.errors import BadInput
from kvcache.transport.base import Limits, Transport

GROUP = "kvcache.transports"

OURS: dict[str, str] = {
    "nixl": "kvcache.transport.nixl_transport:NixlTransport",
    "tcp": "kvcache.transport.tcp:TcpTransport",
    "ucx": "kvcache.transport.ucx:UcxTransport",
}
KEYED = frozenset({"nixl", "tcp"})
"""Schemes whose listeners let in only who knows a key (``kvcache.transport.keys``)."""


def schemes() -> list[str]:
    """Every scheme ``open_transport`` knows, ours first; that it can be opened here is not said."""
    return [*OURS, *sorted({entry.name for entry in entry_points(group=GROUP)} - OURS.keys())]


def scheme_of(address: str) -> str:
    """RAISES BadInput when the address has none."""
    scheme, found, _ = address.partition("://")
    if not found or not scheme:
        raise BadInput(
            "bad_config", f"{address!r} is no address", "it has no scheme", "write tcp://host:port"
        )
    return scheme


def open_transport(
    scheme: str, limits: Limits | None = None, clock: Clock | None = None, key: bytes = b""
) -> Transport:
    """``key``: what those who connect must know. RAISES BadInput when nobody offers this scheme, or when what
    is offered cannot be loaded. REQUIRES: no key for a scheme outside ``KEYED``."""
    assert not key or scheme in KEYED, f"{scheme}:// knows no keys"
    try:
        make = _factory(scheme)
    except (ImportError, AttributeError) as error:
        raise BadInput(
            "bad_config",
            f"the transport {scheme!r} cannot be loaded",
            str(error),
            f"install it (pip install 'kvcache[{scheme}]'), or choose another",
        ) from error
    if make is None:
        raise BadInput(
            "bad_config",
            f"no transport is called {scheme!r}",
            f"there are {', '.join(schemes())}",
            "choose one of these, or install the package that offers it",
        )
    if not callable(make):
        raise BadInput("bad_config", f"the transport {scheme!r} is no class", f"it is {make!r}"[:200])
    keyed = {"key": key} if key else {}
    transport: Transport = make(limits or Limits(), clock or SystemClock(), **keyed)
    return transport


def _factory(scheme: str) -> object:
    if place := OURS.get(scheme):
        module, _, name = place.partition(":")
        found: object = getattr(importlib.import_module(module), name)
        return found
    for entry in entry_points(group=GROUP, name=scheme):
        loaded: object = entry.load()
        return loaded
    return None
