"""The demo's nodes: processes of their own, peers of one another, and what they count.

    node 1 ◄── blocks over tcp:// ──► node 2 ...      each with host memory; the first with NVMe behind it
      └── killed half way, and started anew on its disk

They find each other on unix sockets, so that no port needs to be known before a node has taken it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcache.channel import BlockingChannel
from kvcache.clock import NS_PER_S, SystemClock
from kvcache.testing.processes import NodeProcess
from kvcache.wire import PROTOCOL_VERSION, Hello, Stats, StatsReply

ASK_S = 5
DATA = "tcp://127.0.0.1:0"


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """``nvme_bytes`` of disk for the first node, 0 for none."""

    home: Path
    count: int
    capacity: str
    nvme_bytes: int


class Nodes:
    """All nodes of one demo."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._nodes = [self._new(number) for number in range(settings.count)]
        self._ended: Counter[str] = Counter()

    def start(self) -> None:
        """One after the other: a node looks for its peers until they are there. RAISES Unavailable."""
        for node in self._nodes:
            node.start()

    def close(self) -> None:
        for node in self._nodes:
            node.close()

    def address(self, number: int) -> str:
        """Where clients of this node connect to."""
        return f"unix://{self._settings.home / f'node-{number + 1}.sock'}"

    @property
    def first_pid(self) -> int:
        return self._nodes[0].pid

    @property
    def http(self) -> list[str]:
        return [node.http for node in self._nodes]

    def kill_first(self) -> None:
        """SIGKILL. What it had counted is kept."""
        self._ended.update(self.ask(0))
        self._nodes[0].kill()

    def restart_first(self) -> None:
        """A new node on the same socket and disk. RAISES Unavailable."""
        self._nodes[0] = self._new(0)
        self._nodes[0].start()

    def counted(self) -> dict[str, int]:
        """What all nodes have counted so far, those that were killed included."""
        totals = self._ended.copy()
        for number in range(self._settings.count):
            totals.update(self.ask(number))
        return dict(totals)

    def ask(self, number: int) -> Mapping[str, int]:
        """RAISES Unavailable when it does not answer."""
        deadline_ns = SystemClock().now_ns() + ASK_S * NS_PER_S
        hello = Hello(PROTOCOL_VERSION, client="kvcache demo")
        channel = BlockingChannel.connect(self.address(number), hello, deadline_ns)
        try:
            reply = channel.call(Stats(), deadline_ns)
        finally:
            channel.close()
        assert isinstance(reply, StatsReply), reply
        return {name: int(value) for name, value in reply.values.items()}

    def _new(self, number: int) -> NodeProcess:
        settings = {
            "socket": self.address(number).removeprefix("unix://"),
            "http": "127.0.0.1:0",
            "capacity": self._settings.capacity,
            "name": f"node-{number + 1}",
        }
        others = [self.address(other) for other in range(self._settings.count) if other != number]
        if others:
            settings |= {"data": DATA, "peers": ",".join(others)}
        if number == 0 and self._settings.nvme_bytes:
            settings["nvme"] = f"{self._settings.home / 'tier'}:{self._settings.nvme_bytes}"
        return NodeProcess(settings, self._settings.home / f"node-{number + 1}.log")
