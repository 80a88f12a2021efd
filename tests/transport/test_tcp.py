"""TCP keeps the contract; what is its own is below it."""

from __future__ import annotations

import socket

from kvcache.testing.transport_pair import Pair
from kvcache.testing.transports import TransportContract
from kvcache.transport.base import Limits
from kvcache.transport.tcp import DEFAULT_ADDRESS, TcpTransport


class TestTcp(TransportContract):
    address = DEFAULT_ADDRESS

    def setup_method(self) -> None:
        self.taken = socket.socket()

    def teardown_method(self) -> None:
        self.taken.close()

    def make(self, limits: Limits) -> TcpTransport:
        return TcpTransport(limits)

    def nobody(self, pair: Pair) -> str:
        """Nor can anybody meanwhile."""
        self.taken.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{self.taken.getsockname()[1]}"


class TestTcpOfThreeStreams(TestTcp):
    def make(self, limits: Limits) -> TcpTransport:
        return TcpTransport(limits, stream_count=3)
