"""``nixl://`` on one host (cma) keeps the contract of transports. Without NIXL these tests fail."""

from __future__ import annotations

import pytest

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
