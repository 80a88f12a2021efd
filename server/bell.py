"""Who waits for something to happen to a block, of which nothing may be known yet.

The sum: nothing while nobody waits; else one look-up a block that is rung for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from kvcache.block import StorageKey
from kvcache.clock import NS_PER_S


class Bell:
    """One owner, the event loop's thread."""

    def __init__(self) -> None:
        self._waiting: dict[StorageKey, set[asyncio.Future[None]]] = {}

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def ring(self, keys: Iterable[StorageKey]) -> None:
        """Something happened to these blocks: who waits for one of them looks again."""
        if not self._waiting:
            return
        for key in keys:
            for future in self._waiting.pop(key, ()):
                if not future.done():
                    future.set_result(None)

    async def wait(self, key: StorageKey, wait_ns: int) -> None:
        """Until something happens to this block, or the time is over."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, set()).add(future)
        try:
            await asyncio.wait([future], timeout=max(0, wait_ns) / NS_PER_S)
        finally:
            waiting = self._waiting.get(key, set())
            waiting.discard(future)
            if not waiting:
                self._waiting.pop(key, None)
