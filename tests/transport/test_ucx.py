"""``ucx://`` over TCP keeps the contract of transports. Without ucxx these tests fail: ``make test-ucx``."""

from __future__ import annotations

import pytest

from kvcache.testing.transport_pair import Pair
from kvcache.testing.transports import TransportContract
from kvcache.transport.base import Limits, Transport
from kvcache.transport.table import open_transport

pytestmark = [pytest.mark.ucx, pytest.mark.slow]


class TestUcx(TransportContract):
    address = "ucx://127.0.0.1:0"

    @pytest.fixture(autouse=True)
    def over_tcp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")

    def make(self, limits: Limits) -> Transport:
        return open_transport("ucx", limits)

    def nobody(self, pair: Pair) -> str:
        return "ucx://127.0.0.1:1"
