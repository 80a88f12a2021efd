"""What a node may listen at: wider than loopback only where a stranger who reaches the port is kept out.

| listens with | at loopback | wider |
| --- | --- | --- |
| control, HTTP, tcp:// and others' transports | always | when there is a token |
| nixl:// | always | with trust_network |
| ucx:// | with trust_network: whatever its address says, it takes every interface | as at loopback |
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcache.config import is_loopback
from kvcache.credentials import Credentials
from kvcache.errors import BadInput
from kvcache.transport.table import scheme_of

_TRUSTING = frozenset({"nixl", "ucx"})


def refuse_unsafe_bind(
    bind: tuple[str, int] | None,
    credentials: Credentials,
    name: str,
    harm: str = "read and write blocks",
) -> None:
    """``harm``: what anybody could do with ``name`` there. RAISES BadInput (unsafe_bind)."""
    if bind is not None and not is_loopback(bind[0]) and not credentials.has_tokens:
        raise BadInput(
            "unsafe_bind",
            f"{name} would listen on {bind[0]}, which others can reach",
            f"no token is configured, so anybody could {harm}",
            "bind 127.0.0.1, or give --credentials with at least one token",
        )


def refuse_unsafe_data(addresses: Sequence[str], credentials: Credentials, trust_network: bool) -> None:
    """RAISES BadInput (unsafe_bind)."""
    for address in addresses:
        scheme = scheme_of(address)
        host = _host(address)
        if scheme not in _TRUSTING:
            refuse_unsafe_bind((host, 0), credentials, "data")
        elif not trust_network and (scheme == "ucx" or not is_loopback(host)):
            raise BadInput(
                "unsafe_bind",
                f"data would listen at {address}",
                f"whoever reaches a port of {scheme}:// can read and write this node's memory",
                "use tcp://, or say --trust-network where every host that reaches it is trusted",
            )


def _host(address: str) -> str:
    """Of ``scheme://host:port``; all of what stands there when it is no such thing."""
    rest = address.partition("://")[2]
    return (rest.rpartition(":")[0] or rest).strip("[]")
