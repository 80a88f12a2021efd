"""What is tried over tcp:// is tried over ucx:// as well, in fewer rounds: a peer takes a second to start."""

from __future__ import annotations

import pytest

from tests.netfaults.test_network import NetworkFaults
from tests.netfaults.test_peers_die import PeerFaults

pytestmark = pytest.mark.ucx


class OverTcp:
    @pytest.fixture(autouse=True)
    def over_tcp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")


class TestUcx(OverTcp, NetworkFaults):
    scheme = "ucx"


class TestUcxPeers(OverTcp, PeerFaults):
    scheme = "ucx"
    rounds = 12
