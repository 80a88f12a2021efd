"""What the index says, as a choice needs it: rows of who holds how much, and how current each source is.

Whoever has an index makes a ``View`` of it (``kvcache.routing.views``); a test makes one of plain values.
``find`` and ``place`` may take time, within a deadline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvcache.block import NamespaceId
from kvcache.fleet import Worker
from kvcache.locality import Located
from kvcache.namespace import Namespace
from kvcache.routing.names import Query
from kvcache.routing.telemetry import Told


@dataclass(frozen=True, slots=True)
class SourceState:
    """How current a source is. Not ``known``: it has not told its content yet. ``suspect``: its stream
    broke, and this was so. ``told``: how busy it said it is."""

    known: bool = True
    suspect: bool = False
    age_ms: float = 0.0
    told: Told | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The answers to the queries of one request, in their order. ``trouble``: why there are none."""

    rows: Sequence[Sequence[Located]] = ()
    sources: Mapping[str, SourceState] = field(default_factory=dict)
    trouble: str = ""


class View(Protocol):
    """An index, seen by a router."""

    def namespaces(self) -> Mapping[NamespaceId, Namespace]:
        """All that some source told. The same object as long as nothing was added."""

    def sources_of(self, worker: Worker) -> Sequence[str]:
        """Names of the sources that it can load blocks from, as far as they are known; its own first."""

    def find(self, queries: Sequence[Query]) -> Found:
        """Never raises for the index's sake: then ``trouble`` says why."""

    def place(self, source: str, namespace: NamespaceId, hints: bytes) -> None:
        """A request with these blocks goes there. Never raises for the index's sake."""


class NoView:
    """There is no index."""

    def __init__(self, why: str = "there is no index") -> None:
        self._why = why

    def namespaces(self) -> Mapping[NamespaceId, Namespace]:
        return {}

    def sources_of(self, worker: Worker) -> Sequence[str]:
        return worker.own_sources()

    def find(self, queries: Sequence[Query]) -> Found:
        return Found(trouble=self._why)

    def place(self, source: str, namespace: NamespaceId, hints: bytes) -> None:
        return None
