"""Answers that are known beforehand, behind real sockets."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence

import msgspec

from kvcache import locate_wire as wire
from kvcache.clock import Clock
from kvcache.errors import BadInput
from kvcache.locator import Locator, Names, Source

SPACE = bytes(range(16))


class Locators:
    """Makes clients, and closes them."""

    def __init__(self) -> None:
        self._made: list[Locator] = []

    def __call__(
        self, address: str, token: str = "", timeout_ms: int = 20_000, clock: Clock | None = None
    ) -> Locator:
        self._made.append(Locator(address, token, timeout_ms, clock))
        return self._made[-1]

    def close(self) -> None:
        for each in self._made:
            each.close()


class Answers:
    """``rows`` sources that hold everything; placements are written down."""

    def __init__(self, rows: int = 3) -> None:
        self.rows = rows
        self.epoch = 1
        self.placed: list[tuple[str, str, bytes, bytes]] = []
        self.asked: list[tuple[str, wire.Asked, wire.Selector, int]] = []
        self.hold = threading.Event()
        self.hold.set()

    def query(self, tenant: str, asked: wire.Asked, selector: bytes, hints: memoryview) -> Sequence[bytes]:
        self.hold.wait(60)
        chosen = wire.read_selector(selector)
        self.asked.append((tenant, asked, chosen, len(hints)))
        if chosen.model == "strange":
            raise BadInput("unknown_namespace", "no such model")
        rows, blocks = self.rows, len(hints) // 8
        table = array("I")
        for row in range(rows):
            table.extend([row, 5, *[blocks] * 5])
        parts = [wire.answer_head(rows, self.epoch, asked.as_of), table.tobytes()]
        parts.append(bytes([1]) + bytes(rows - 1) if rows else b"")
        if asked.as_of:
            parts += [array("Q", [7] * rows).tobytes(), array("Q", range(rows)).tobytes()]
            parts.append(array("I", [30] * rows).tobytes())
        return parts

    def place(self, tenant: str, source: str, namespace: bytes, hints: memoryview) -> None:
        self.placed.append((tenant, source, namespace, bytes(hints)))

    def sources(self, tenant: str) -> bytes:
        told = [Source("s0", 0, "synced", False, 7, 1, 30, 12, {"running": 2.0}, 40)]
        return msgspec.json.encode(told)

    def names(self, tenant: str) -> bytes:
        return msgspec.json.encode(
            Names(self.epoch, {at: f"s{at}-{self.epoch}" for at in range(self.rows)}, [], {"w": ["s0"]})
        )
