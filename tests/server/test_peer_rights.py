"""What the role ``peer`` opens at a node: other tenants, and the way to where bytes are moved."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvcache import wire
from kvcache.channel import AsyncChannel, BlockingChannel
from kvcache.errors import BadInput, NotAllowed
from kvcache.server import core
from kvcache.transport.keys import split_key
from tests.server.conftest import EmbeddedNode, Serve
from tests.server.talk import HASHES, deadline, held, lease, opened, refused, reserve, save

NODE, APP, OTHER = "a-token-of-a-node-01", "a-token-of-an-app-01", "a-token-of-an-app-02"
CREDENTIALS = f"""
master_key = "{"0f" * 32}"
credential = [
  {{ token = "{NODE}", tenant = "nodes", roles = ["reader", "writer", "peer"] }},
  {{ token = "{APP}", tenant = "a", roles = ["reader", "writer", "router"] }},
  {{ token = "{OTHER}", tenant = "b", roles = ["reader", "writer"] }},
]
"""


@pytest.fixture
def node(serve: Serve, tmp_path: Path) -> EmbeddedNode:
    path = tmp_path / "credentials.toml"
    path.touch(0o600)
    path.write_text(CREDENTIALS)
    return serve(credentials=str(path), tcp="127.0.0.1:0")


def hello(token: str, tenant: str = "") -> wire.Hello:
    return wire.Hello(wire.PROTOCOL_VERSION, token=token, tenant=tenant)


@contextmanager
def connected(node: EmbeddedNode, token: str, tenant: str = "") -> Iterator[BlockingChannel]:
    channel = BlockingChannel.connect(node.node.tcp_address, hello(token, tenant), deadline())
    try:
        yield channel
    finally:
        channel.close()


def test_a_peer_sees_the_blocks_of_the_tenant_that_it_names(node: EmbeddedNode) -> None:
    with connected(node, APP) as app, connected(node, NODE, "a") as peer, connected(node, NODE, "b") as other:
        assert save(app, opened(app), HASHES[:3]) == 3
        assert peer.welcome.tenant == "a"
        assert peer.welcome.tenant_key == app.welcome.tenant_key
        assert held(peer, opened(peer), HASHES[:3]) == 3
        assert other.welcome.tenant_key != app.welcome.tenant_key
        assert held(other, opened(other), HASHES[:3]) == 0


@pytest.mark.parametrize("tenant", ["b", "nodes", "nobody"])
def test_nobody_else_names_a_tenant(node: EmbeddedNode, tenant: str) -> None:
    with pytest.raises(NotAllowed, match="no credential fits"), connected(node, APP, tenant):
        pass


def test_a_peer_that_names_ever_new_tenants_takes_so_much_and_no_more(
    node: EmbeddedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tenant has memory of its own here, and descriptors with it."""
    monkeypatch.setattr(core, "ARENAS_MAX", 4)
    with connected(node, APP) as app:
        refusals = 0
        for at in range(8):
            try:
                with connected(node, NODE, f"tenant-{at}"):
                    pass
            except BadInput as error:
                assert error.code == "too_large"
                refusals += 1
        assert refusals == 6, "the node's own and that of the app are there"
        assert node.call(node.node.core.stats)["arenas"] == 4
        assert save(app, opened(app), HASHES[:1]) == 1


def test_where_bytes_are_moved_is_told_to_peers_alone(node: EmbeddedNode) -> None:
    with connected(node, APP) as app, connected(node, NODE) as peer:
        assert app.welcome.data == []
        (address,) = peer.welcome.data
        where, key = split_key(address)
        assert key
        assert node.node.data_addresses == [where], "what a log may have"
        namespace = opened(app)
        save(app, namespace, HASHES[:1])
        leased = lease(app, namespace, HASHES[:1])
        refused("not_allowed", app, wire.Export(leased.lease, 0, 1, "tcp"))
        reserved = reserve(app, namespace, HASHES[1:2], HASHES[0])
        refused("not_allowed", app, wire.Post(reserved.reservation, 0, 1, "tcp"))
        refused("not_allowed", app, wire.Follow(namespace, HASHES[0], "tcp"))


def test_a_peer_follows_the_tenant_that_it_acts_for(node: EmbeddedNode) -> None:
    async def seen() -> list[bytes]:
        channel = await AsyncChannel.connect(node.node.tcp_address, hello(NODE, "a"), deadline())
        names: list[bytes] = []
        async for batch in channel.events():
            names += [event.namespace for event in batch.events]
            if batch.snapshot and not batch.left:
                break
        channel.close()
        return names

    with connected(node, APP) as app, connected(node, OTHER) as other:
        mine = opened(app)
        save(app, mine, HASHES[:1])
        save(other, opened(other), HASHES[:1])
        refused("not_allowed", other, wire.Watch())
        assert set(asyncio.run(seen())) == {mine}
