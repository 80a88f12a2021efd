"""Waiting for what goes on whatever is asked of the one who waits: a copy in a thread does."""

from __future__ import annotations

import asyncio
from typing import TypeVar

_T = TypeVar("_T")


async def to_the_end(running: asyncio.Future[_T]) -> asyncio.CancelledError | None:
    """Wait until it has ended, even when cancelled meanwhile. Returns the cancellation, to be raised."""
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled
