"""What a node may listen at, with and without tokens and trust."""

from __future__ import annotations

import pytest

from kvcache.config import NodeConfig
from kvcache.credentials import Credential, Credentials
from kvcache.errors import BadInput
from kvcache.server.binding import refuse_unsafe_data
from kvcache.server.node import Node

WITHOUT = Credentials.default()
WITH = Credentials({"t" * 16: Credential("a", frozenset({"peer"}))}, {}, None, bytes(32))
USERS = Credentials({}, {1000: Credential("a", frozenset({"peer"}))}, None, bytes(32))

LOOPBACK = ["127.0.0.1", "127.9.9.9", "[::1]", "localhost"]
WIDER = ["0.0.0.0", "[::]", "10.0.0.1", "[fe80::1%1]", "a-host", "", "127.0.0.1.example"]


def is_refused(address: str, credentials: Credentials, *, trust: bool = False) -> bool:
    try:
        refuse_unsafe_data(["tcp://127.0.0.1:0", address], credentials, trust)
    except BadInput as error:
        assert error.code == "unsafe_bind"
        assert error.todo
        return True
    return False


@pytest.mark.parametrize("scheme", ["tcp", "another"])
def test_it_takes_a_token_to_be_reached_from_elsewhere(scheme: str) -> None:
    for host in LOOPBACK:
        assert not is_refused(f"{scheme}://{host}:0", WITHOUT), host
    for host in WIDER:
        assert is_refused(f"{scheme}://{host}:0", WITHOUT), host
        assert is_refused(f"{scheme}://{host}:0", USERS), "users are for unix sockets"
        assert is_refused(f"{scheme}://{host}:0", WITHOUT, trust=True), "trust is no credential"
        assert not is_refused(f"{scheme}://{host}:0", WITH), host


def test_nixl_takes_trust_beyond_loopback() -> None:
    for host in LOOPBACK:
        assert not is_refused(f"nixl://{host}:0", WITHOUT), host
    for host in WIDER:
        assert is_refused(f"nixl://{host}:0", WITH), host
        assert not is_refused(f"nixl://{host}:0", WITH, trust=True), host


def test_ucx_takes_trust_wherever_it_says_that_it_listens() -> None:
    for host in (*LOOPBACK, *WIDER):
        assert is_refused(f"ucx://{host}:0", WITH), host
        assert not is_refused(f"ucx://{host}:0", WITH, trust=True), host


def test_a_node_asks() -> None:
    for data in ("tcp://0.0.0.0:0", "ucx://127.0.0.1:0"):
        with pytest.raises(BadInput) as caught:
            Node(NodeConfig(http="none", capacity="8MiB", data=data))
        assert caught.value.code == "unsafe_bind"
