"""An NVMe tier that is started with other settings than before."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcache import wire
from kvcache.server.cli import _nvme_words
from tests.server.conftest import Serve
from tests.server.peer_world import NEVER_LATE, WAIT_MS
from tests.server.talk import HASHES, connected, deadline, opened, save, stats

pytestmark = pytest.mark.slow


def restored(serve: Serve, nvme: str, segment: str) -> int:
    """Start a node, make eight blocks durable, end it. How many it had found."""
    node = serve(capacity="1MiB", nvme=nvme, nvme_segment=segment, nvme_scrub_share=0.0, **NEVER_LATE)
    with connected(node.node.address) as channel:
        found = int(stats(channel).get("nvme_restored_blocks", 0))
        namespace = opened(channel)
        save(channel, namespace, HASHES[:8])
        reply = channel.call(wire.Persist(namespace, b"".join(HASHES[:8]), WAIT_MS), deadline())
        assert reply == wire.Matched(8)
        told = channel.call(wire.Stats(), deadline())
        assert isinstance(told, wire.StatsReply)
        assert told.troubles == []
    node.run(node.node.close())
    return found


def test_a_tier_grows_and_shrinks_and_gets_a_smaller_device(serve: Serve, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert restored(serve, f"{first}:16MiB", "1MiB") == 0
    assert restored(serve, f"{first}:2GiB", "auto") == 8, "auto would be 64 MiB for a new directory"
    assert restored(serve, f"{first}:8MiB", "auto") == 8
    assert restored(serve, f"{second}:4MiB,{first}:2GiB", "auto") == 8


def test_the_ready_line_says_how_many_directories_are_used(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    node = serve(capacity="1MiB", nvme=f"{tmp_path}/file:16MiB,{tmp_path}/good:16MiB").node
    assert _nvme_words(node) == "1 of 2 NVMe directories in use"
    assert any("file is not a directory" in each for each in node.core.troubles())
    assert _nvme_words(serve(capacity="1MiB", socket=str(tmp_path / "other.sock")).node) == ""
