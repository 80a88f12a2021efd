"""Who is at the other end of a connection: tenant and roles from the credential, never from a message.

Only another node, whose credential has the role ``peer``, says itself for which tenant a connection is.
"""

from __future__ import annotations

import hmac
import socket
import struct
from dataclasses import dataclass, replace

from kvcache.credentials import Credential, Credentials
from kvcache.errors import BadInput, NotAllowed
from kvcache.wire import PROTOCOL_VERSION, Hello

ROLES_INSIDE = frozenset({"router", "operator"})

_UCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """What the kernel says of the process at the other end. ``pid`` 0 and ``uid`` -1: unknown (TCP)."""

    pid: int
    uid: int


@dataclass(frozen=True, slots=True)
class Identity:
    """One connection's rights. ``owner`` names the connection to the ledger. ``inside`` marks the
    node's own HTTP process, which sees the events of all tenants. ``node`` names the node that asks; empty
    for all but nodes. ``hbm`` is the slab of HBM that was given to it, -1: none; ``plans_for`` the trust
    domain and the GPU in whose slab it may lease for others, who map it; None: in none."""

    owner: int
    tenant: str
    roles: frozenset[str]
    arena: int
    mapped: bool
    peer: Peer
    inside: bool = False
    node: str = ""
    hbm: int = -1
    plans_for: tuple[str, bytes] | None = None

    def require(self, *roles: str) -> None:
        """RAISES NotAllowed unless the credential has one of ``roles``."""
        if not self.roles.intersection(roles):
            raise NotAllowed(
                "not_allowed",
                "this credential may not do that",
                f"it needs the role {' or '.join(roles)}",
                "ask the operator for a credential with that role",
            )


def planning(identity: Identity, hello: Hello) -> Identity:
    """With what it asks to plan for: only where who maps is of the same user and tenant (a unix socket)."""
    if not hello.hbm or hello.map or identity.peer.uid < 0:
        return identity
    return replace(identity, plans_for=(f"{identity.peer.uid}-{identity.tenant}", hello.gpu))


def peer_of(connection: socket.socket) -> Peer:
    """The process at the other end of a unix socket; unknown for others."""
    if connection.family != socket.AF_UNIX:
        return Peer(0, -1)
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _gid = _UCRED.unpack(raw)
    return Peer(pid, uid)


def credential_for(
    credentials: Credentials, token: str, peer: Peer, *, loopback: bool, inside_token: str, tenant: str = ""
) -> tuple[Credential, bool]:
    """The credential a Hello proves, and whether it is the node's own HTTP process. ``tenant``: for whom it
    asks to act, its own when empty.

    A token wins over the uid. RAISES NotAllowed, in the same words whatever was wrong."""
    if token:
        if not tenant and hmac.compare_digest(token.encode(), inside_token.encode()):
            return Credential("", ROLES_INSIDE), True
        found = credentials.by_token(token)
    elif peer.uid >= 0:
        found = credentials.by_uid(peer.uid)
    else:
        found = credentials.anonymous if loopback else None
    acting = None if found is None else credentials.acting_for(found, tenant)
    if acting is None:
        raise NotAllowed(
            "not_allowed",
            "no credential fits this connection",
            "the token is unknown, or none was sent and the user is not listed, or another tenant was named",
            "set KVCACHE_TOKEN, or add this user to the node's credentials file; nodes need the role peer",
        )
    return acting, False


def check_version(hello: Hello) -> None:
    """RAISES BadInput."""
    if hello.version != PROTOCOL_VERSION:
        raise BadInput(
            "bad_version",
            f"the client speaks protocol version {hello.version}",
            f"this node speaks version {PROTOCOL_VERSION}",
            "run the same release of kvcache on both sides",
        )
