"""``ucx://`` over TCP keeps the contract of transports. Without ucxx these tests fail: ``make test-ucx``."""

from __future__ import annotations

import asyncio

import pytest

from kvcache.testing.transport_pair import Pair, contents, soon
from kvcache.testing.transports import TransportContract
from kvcache.transport.base import Limits, Transport
from kvcache.transport.table import open_transport
from kvcache.transport.ucx_endpoint import UcxEndpoint
from kvcache.transport.ucx_frames import Frame
from kvcache.transport.ucx_lane import Wire
from tests.transport.ucx_events import assert_ucx_sees_them_go

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

    def test_ucx_sees_the_pages_of_the_host_tier_go(self) -> None:
        async def scenario(pair: Pair) -> None:
            assert_ucx_sees_them_go()

        self.play(scenario)

    def test_who_asks_before_the_lane_is_open_at_the_other_side_is_served(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The side that was connected to knows a lane first, and asks over another connection."""
        came, asked = UcxEndpoint.lane_came, UcxEndpoint._asked
        waiting: list[tuple[UcxEndpoint, int, Wire]] = []

        def come_late(endpoint: UcxEndpoint, number: int, wire: Wire) -> None:
            if endpoint._open is None:
                came(endpoint, number, wire)
            else:
                waiting.append((endpoint, number, wire))

        def ask(endpoint: UcxEndpoint, frame: Frame) -> None:
            asked(endpoint, frame)
            while waiting:
                came(*waiting.pop())

        monkeypatch.setattr(UcxEndpoint, "lane_came", come_late)
        monkeypatch.setattr(UcxEndpoint, "_asked", ask)

        async def scenario(pair: Pair) -> None:
            while not waiting:
                await asyncio.sleep(0)
            source, into = self.filled_memory(3, [70_000]), self.rooms([70_000])
            await pair.far_end.read(pair.near.export(source, soon()), into, soon())
            assert contents(into) == contents(source)

        self.play(scenario)
