"""A connector's hold on the store: connects when first needed, opens the namespaces, tries again later.

An engine must start and serve while the store is away, so nothing here raises for a store that is
away: ``handles()`` is then empty. A store that refuses (another tenant, a namespace that differs) is
reported once a minute in one line and tried again; the engine computes everything meanwhile.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from kvcache.block import BlockSpec
from kvcache.clock import NS_PER_S, Clock
from kvcache.errors import KVCacheError

if TYPE_CHECKING:
    from kvcache.client.store import BlockingStore, Handle
    from kvcache.namespace import Namespace

RETRY_NS = 1 * NS_PER_S
REPORT_NS = 60 * NS_PER_S

_LOG: Final = logging.getLogger(__name__)


class Attachment:
    """One store connection and the handles of ``namespaces`` (one a rank, in rank order), for one thread."""

    def __init__(
        self,
        connect: Callable[[], BlockingStore],
        namespaces: Sequence[Namespace],
        spec: BlockSpec,
        clock: Clock,
        log: logging.Logger = _LOG,
    ) -> None:
        assert namespaces
        self._connect = connect
        self._namespaces = tuple(namespaces)
        self._clock = clock
        self._log = log
        self._store: BlockingStore | None = None
        self._handles: tuple[Handle, ...] = ()
        self._retry_ns = 0
        self._report_ns = 0
        self._told: Counter[str] = Counter()
        self.spec = spec

    @property
    def store(self) -> BlockingStore:
        """REQUIRES: ``handles()`` was not empty."""
        assert self._store is not None
        return self._store

    @property
    def node(self) -> str:
        """The name of the node, empty when none was reached yet."""
        return self._store.node if self._store is not None else ""

    def news(self) -> dict[str, int]:
        """What the store client has counted, by its own names, since the last call."""
        counters = Counter(self._store.counters if self._store is not None else {})
        grown, self._told = counters - self._told, counters
        return dict(grown)

    def handles(self) -> tuple[Handle, ...]:
        """A handle a namespace, or none at all while the store cannot be used."""
        if self._handles or self._clock.now_ns() < self._retry_ns:
            return self._handles
        try:
            if self._store is None:
                self._store = self._connect()
            store = self._store
            self._handles = tuple(store.open(namespace, self.spec) for namespace in self._namespaces)
        except (KVCacheError, OSError) as error:
            self._later(error)
        else:
            for handle in self._handles:
                self._log.info("kvcache: namespace %s: %s", handle.namespace_id.hex(), handle.verdict)
        return self._handles

    def close(self) -> None:
        """May be called twice."""
        store, self._store, self._handles = self._store, None, ()
        self._told.clear()
        if store is not None:
            store.close()

    def _later(self, error: Exception) -> None:
        now_ns = self._clock.now_ns()
        self._retry_ns = now_ns + RETRY_NS
        if now_ns >= self._report_ns:
            self._report_ns = now_ns + REPORT_NS
            self._log.warning("kvcache: no store for now, everything is computed: %s", error)
