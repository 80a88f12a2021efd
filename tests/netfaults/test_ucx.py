"""What is tried over tcp:// is tried over ucx:// as well, in fewer rounds: a peer takes a second to start.

UCX looks once a process at which network devices there are. So these tests have a process of their own,
whose first look is from within the namespace (``make test-ucx``).
"""

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
