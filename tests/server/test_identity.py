"""Who a connection is, and for whom it acts; every refusal in the same words."""

from __future__ import annotations

import pytest

from kvcache.credentials import Credential, Credentials
from kvcache.errors import NotAllowed
from kvcache.server.identity import Peer, credential_for

TOKEN, NODE, INSIDE = "a-token-of-team-a-01", "a-token-of-a-node-001", "the-token-of-the-child"
TEAM_A = Credential("team-a", frozenset({"reader", "writer", "operator"}))
A_NODE = Credential("nodes", frozenset({"reader", "peer"}))
KNOWN = Credentials({TOKEN: TEAM_A, NODE: A_NODE}, {7: TEAM_A, 8: A_NODE}, None, bytes(32))
UNKNOWN = Peer(0, -1)


def who(
    token: str = "",
    tenant: str = "",
    peer: Peer = UNKNOWN,
    loopback: bool = True,
    credentials: Credentials = KNOWN,
) -> tuple[Credential, bool]:
    return credential_for(credentials, token, peer, loopback=loopback, inside_token=INSIDE, tenant=tenant)


def test_by_token_and_by_user() -> None:
    assert who(TOKEN) == (TEAM_A, False)
    assert who(peer=Peer(1, 7)) == (TEAM_A, False)
    assert who(NODE, peer=Peer(1, 7)) == (A_NODE, False), "a token wins"


def test_the_child_is_inside() -> None:
    credential, inside = who(INSIDE)
    assert inside
    assert credential.tenant == ""


@pytest.mark.parametrize(("token", "peer"), [(NODE, UNKNOWN), ("", Peer(1, 8))])
def test_a_peer_acts_for_whom_it_names(token: str, peer: Peer) -> None:
    assert who(token, "team-b", peer) == (Credential("team-b", A_NODE.roles), False)
    assert who(token, "", peer) == (A_NODE, False)


def test_every_refusal_has_the_same_words() -> None:
    said = set()
    for refused in (
        {"token": "an-unknown-token-0001"},
        {"token": TOKEN, "tenant": "team-b"},
        {"token": TOKEN, "tenant": "nodes"},
        {"token": NODE, "tenant": "No Tenant"},
        {"token": INSIDE, "tenant": "team-a"},
        {"peer": Peer(1, 7), "tenant": "team-b"},
        {"peer": Peer(1, 9)},
        {},
        {"tenant": "default", "loopback": False, "credentials": Credentials.default()},
        {"tenant": "team-a", "credentials": Credentials.default()},
    ):
        with pytest.raises(NotAllowed) as caught:
            who(**refused)  # type: ignore[arg-type]  # Each is an argument or two of it.
        said.add(str(caught.value))
    assert len(said) == 1


def test_without_a_file_loopback_may_be_a_peer() -> None:
    credential, _ = who(credentials=Credentials.default(), tenant="default")
    assert "peer" in credential.roles
    assert "operator" not in credential.roles
