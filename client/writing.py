"""A save under way, as its caller holds it: ``store.Writing`` and ``store.BlockingWriting``, from host memory
or from a device."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from kvcache.client import hbm_layered, layered
from kvcache.client.link import Context
from kvcache.client.steps import Operation

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Doing:
    """What there is to do with one draft."""

    advance: Callable[[Context, int], Operation[None]]
    finish: Callable[[Context], Operation[int]]
    abort: Callable[[Context], Operation[None]]


def from_host(draft: layered.Draft) -> Doing:
    return Doing(
        lambda context, planes: layered.advance(context, draft, planes),
        lambda context: layered.finish(context, draft),
        lambda context: layered.abort(context, draft),
    )


def from_device(draft: hbm_layered.Draft) -> Doing:
    return Doing(
        lambda context, planes: hbm_layered.advance(context, draft, planes),
        lambda context: hbm_layered.finish(context, draft),
        lambda context: hbm_layered.abort(context, draft),
    )


class RunAsync(Protocol):
    """How a store drives an operation."""

    def __call__(self, operation: Callable[[Context], Operation[T]]) -> Awaitable[T]: ...


class Run(Protocol):
    """The same for threads."""

    def __call__(self, operation: Callable[[Context], Operation[T]]) -> T: ...


class AsyncWriting:
    """See ``store.Writing``."""

    def __init__(self, run: RunAsync, doing: Doing) -> None:
        self._run = run
        self._doing = doing

    async def advance(self, planes: int) -> None:
        await self._run(partial(_advanced, self._doing, planes))

    async def finish(self) -> int:
        return await self._run(self._doing.finish)

    async def abort(self) -> None:
        await self._run(self._doing.abort)


class BlockingWriting:
    """See ``store.BlockingWriting``."""

    def __init__(self, run: Run, doing: Doing) -> None:
        self._run = run
        self._doing = doing

    def advance(self, planes: int) -> None:
        self._run(partial(_advanced, self._doing, planes))

    def finish(self) -> int:
        return self._run(self._doing.finish)

    def abort(self) -> None:
        self._run(self._doing.abort)


def _advanced(doing: Doing, planes: int, context: Context) -> Operation[None]:
    return doing.advance(context, planes)
