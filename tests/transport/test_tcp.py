"""TCP keeps the contract; what is its own is below it."""

from __future__ import annotations

import socket

from kvcache.testing.transport_pair import Pair
from kvcache.testing.transports import TransportContract
from kvcache.transport.base import Limits
from kvcache.transport.tcp import DEFAULT_ADDRESS, TcpTransport


class TestTcp(TransportContract):
    address = DEFAULT_ADDRESS

    def make(self, limits: Limits) -> TcpTransport:
        return TcpTransport(limits)

    def nobody(self, pair: Pair) -> str:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        return f"tcp://127.0.0.1:{port}"


class TestTcpOfThreeStreams(TestTcp):
    def make(self, limits: Limits) -> TcpTransport:
        return TcpTransport(limits, stream_count=3)
