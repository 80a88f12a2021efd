"""What a node without HBM says to who asks for it. (With HBM: tests/device.)"""

from __future__ import annotations

import pytest

from kvcache import wire
from kvcache.config import load
from kvcache.errors import BadInput
from tests.server.conftest import Serve
from tests.server.talk import HASHES, connected, deadline, opened


def test_nobody_is_given_a_slab(serve: Serve) -> None:
    node = serve()
    with connected(node.node.address, map=True, hbm=True) as channel:
        assert channel.slab_fd is not None
        assert channel.hbm_fd is None
        assert channel.welcome.hbm == wire.NO_SLAB


def test_asking_for_blocks_in_hbm_is_refused_or_finds_nothing(serve: Serve) -> None:
    node = serve()
    with connected(node.node.address, map=True, hbm=True) as channel:
        namespace = opened(channel)
        prefix = b"".join(HASHES[:2])
        leased = channel.call(wire.TakeLease(namespace, prefix, hbm=True), deadline())
        assert isinstance(leased, wire.Leased)
        assert leased.hbm == wire.NOTHING_LEASED
        assert channel.call(wire.Match(namespace, prefix, hbm=True), deadline()) == wire.Matched(0)
        for request in (
            wire.Reserve(namespace, b"", prefix, tier=wire.HBM),
            wire.Release(1, tier=wire.HBM),
            wire.Commit(1, b"", wire.HBM),
            wire.Abort(1, wire.HBM),
        ):
            with pytest.raises(BadInput, match="no memory of a GPU") as caught:
                channel.call(request, deadline())
            assert caught.value.code == "bad_tier"
        with pytest.raises(BadInput, match="host or hbm"):
            channel.call(wire.Release(1, tier="nvme"), deadline())


@pytest.mark.parametrize("settings", [{"hbm": "1KiB"}, {"hbm": "much"}])
def test_a_setting_that_is_none(settings: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="hbm"):
        load(dict(settings), {})
