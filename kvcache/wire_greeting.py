"""How a connection begins: who asks, who answers, and which memory they share."""

from __future__ import annotations

import msgspec

from kvcache.wire_base import Message, Unsigned
from kvcache.wire_hbm import NO_SLAB, HbmSlab


class Hello(Message, frozen=True, tag="hello", omit_defaults=True):
    """First on every connection. ``map`` asks for the slab's descriptor (unix sockets only).

    ``tenant`` names another tenant than the credential's to act for (role peer).
    ``node`` is the name of the node that asks, if it is one: for it nothing is fetched from other nodes.
    ``writes_ended`` acknowledges that this ``client`` of the process has no copy in flight from any
    connection it had before, so that slots reserved through those can be used again.
    ``hbm`` asks, beside the map, for memory of the GPU ``gpu`` (its UUID; empty: of the CPU), else of one of
    ``joined``, whose memory it can use. Without the map: to match and lease in that GPU's slab for engines of
    the same trust domain that have mapped it, as soon as one has.
    ``pins`` asks, beside the map, to register it with a GPU.
    """

    version: Unsigned
    token: str = ""
    map: bool = False
    client: str = ""
    writes_ended: bool = False
    tenant: str = ""
    node: str = ""
    hbm: bool = False
    gpu: bytes = b""
    joined: list[bytes] = msgspec.field(default_factory=list)
    pins: bool = False

    def __repr__(self) -> str:
        """Without the token, which must not reach a log."""
        return f"Hello(version={self.version}, map={self.map}, client={self.client!r})"


class Welcome(Message, frozen=True, tag="welcome", omit_defaults=True):
    """Answer to Hello. With a map, the slab's descriptor comes as ancillary data of this frame; behind it
    that of ``hbm``, when its ``size_bytes`` are not 0. ``data`` are the addresses at which the node's
    transports listen. ``pinned_unit``, if not 0, allows to register the map: memory for blocks comes in units
    of so many bytes, and none is taken out of the map before this connection ends."""

    version: Unsigned
    node: str
    incarnation: Unsigned
    tenant: str
    roles: list[str]
    tenant_key: bytes
    slab_bytes: Unsigned
    data: list[str] = msgspec.field(default_factory=list)
    hbm: HbmSlab = NO_SLAB
    pinned_unit: Unsigned = 0

    def __repr__(self) -> str:
        """Without the tenant's key, which must not reach a log."""
        return f"Welcome(node={self.node!r}, incarnation={self.incarnation}, tenant={self.tenant!r})"
