"""``nixl://`` on one host (cma) keeps the contract of transports. Without NIXL these tests fail."""

from __future__ import annotations

import pytest

from kvcache.testing.transport_faults import FaultContract
from kvcache.testing.transport_pair import Pair
from kvcache.testing.transports import TransportContract
from kvcache.transport.base import Limits, Transport
from kvcache.transport.table import open_transport

pytestmark = [pytest.mark.nixl, pytest.mark.slow]


class TestNixl(TransportContract):
    address = "nixl://127.0.0.1:0"

    def make(self, limits: Limits) -> Transport:
        return open_transport("nixl", limits)

    def nobody(self, pair: Pair) -> str:
        return "nixl://127.0.0.1:1"


class TestReadsThatCannotBeCalledBack(FaultContract):
    """Over sockets, where UCX emulates reads: one that waits for a peer that stands still stays in flight
    and would write later, so this is where the reading agent is replaced."""

    address = "nixl://127.0.0.1:0"

    @pytest.fixture(autouse=True)
    def emulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")
        monkeypatch.setenv("UCX_PROTO_EMULATION_ENABLE", "y")

    def make(self, limits: Limits) -> Transport:
        return open_transport("nixl", limits)

    def nobody(self, pair: Pair) -> str:
        return "nixl://127.0.0.1:1"

    # The reading agent's end, in the middle of a read that is emulated, makes UCX abort the owner's process.
    # This is why the transport forbids emulated reads unless the environment asks for them.
    test_a_peer_that_stands_still_in_the_middle = None
