"""The library for routers: where a request goes, by what each worker holds of its prompt and how busy it is.

    router = Router(fleet, index)
    routed = router.choose(model, tokens, session="chat-17")
    with router.sending(routed) as sent:
        ...                       # the request goes to routed.worker.url
        sent.first_token()        # when it has come

``routed.why`` says in a sentence why it is this worker, ``routed.explanation()`` all terms of all candidates.
Nothing is ever raised for the index's sake: without one, or with one that is late, the choice says so and is
made by session, load and turn (docs/routing.md). The decisions are in ``kvcache.routing``; this adds a clock
and a lock. Any thread may call; ``choose`` may wait for an index that runs elsewhere, as long as its
``Locator`` allows.

The sum: for 64 workers 0.3 ms, and the names of the prompt's blocks (8 ns a block for engines' events, 0.9 us
for nodes).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from kvcache.clock import Clock, SystemClock
from kvcache.credentials import Credentials
from kvcache.fleet import Fleet, Role
from kvcache.locality import LocalityIndex
from kvcache.locator import Locator
from kvcache.routing.fleet_state import Asked, FleetState, NoWorker, Placement, Routed
from kvcache.routing.names import Query, TenantKey
from kvcache.routing.view import NoView, View
from kvcache.routing.views import IndexView, LocatorView
from kvcache.routing.waiting import Waiting
from kvcache.routing.weights import Weights

__all__ = ["NoWorker", "Query", "Routed", "Router", "Sent", "Weights"]


class Sent:
    """A request that was sent where the router said."""

    def __init__(self, router: Router, routed: Routed, number: int) -> None:
        self._router = router
        self._routed = routed
        self._number = number

    def first_token(self) -> None:
        """The first token came: its prompt is computed, the worker answers."""
        self._router.first_token(self._routed, self._number)


class Router:
    """One for a process that routes. Everything it keeps is bounded."""

    def __init__(
        self,
        fleet: Fleet,
        index: LocalityIndex | Locator | View | None = None,
        weights: Weights | None = None,
        *,
        tenant_key: TenantKey | None = None,
        seed: int = 0,
        clock: Clock | None = None,
    ) -> None:
        """``index``: in this process, elsewhere, seen in another way, or none. ``tenant_key``: the key of a
        tenant's block names, of nodes that have credentials (``Credentials.tenant_key``)."""
        self._clock = SystemClock() if clock is None else clock
        key = Credentials.default().tenant_key if tenant_key is None else tenant_key
        self._state = FleetState(fleet, Weights() if weights is None else weights, key, seed)
        self._view = self._seen(index)
        self._waiting: Waiting[Placement] = Waiting()
        self._lock = threading.Lock()

    def choose(
        self,
        model: str,
        tokens: Sequence[int] | bytes | None = None,
        *,
        prompt_tokens: int = 0,
        session: str = "",
        role: Role = "any",
        tenant: str = "",
        avoid: Collection[str] = (),
    ) -> Routed:
        """The worker for a prompt of ``tokens`` (ids, or packed by ``kvcache.block.pack_tokens``); None: only
        ``prompt_tokens``, about how many they are, is known. ``session``: requests of one conversation have
        the same. ``tenant``: only its workers; empty: any. ``avoid``: workers that were tried already. The
        index is told of the choice.

        RAISES NoWorker when the fleet has none for this; BadInput for what are no tokens."""
        with self._lock:
            asked = self._state.ask(
                self._view,
                model,
                tokens,
                prompt_tokens=prompt_tokens,
                session=session,
                role=role,
                tenant=tenant,
            )
            return self._chosen(asked, avoid)

    def choose_hints(
        self,
        model: str,
        queries: Sequence[Query],
        prompt_tokens: int,
        *,
        session: str = "",
        role: Role = "any",
        avoid: Collection[str] = (),
    ) -> Routed:
        """The same for who has named the blocks already. RAISES NoWorker."""
        with self._lock:
            asked = self._state.ask_hints(model, queries, prompt_tokens, session, role)
            return self._chosen(asked, avoid)

    @contextmanager
    def sending(self, routed: Routed) -> Iterator[Sent]:
        """Counts the request as in flight on its worker until the end of the block, however that comes."""
        number = self.begin(routed)
        try:
            yield Sent(self, routed, number)
        finally:
            self.end(number)

    def begin(self, routed: Routed) -> int:
        """The request is sent now. Returns its number; an end that nobody tells comes by itself in time."""
        with self._lock:
            now_ns = self._clock.now_ns()
            number = self._state.begin(routed, now_ns)
            self._waiting.begin(number, routed.placements, now_ns)
            return number

    def first_token(self, routed: Routed, number: int) -> None:
        with self._lock:
            self._state.loads.first_token(number, self._clock.now_ns())
            self._state.health.succeeded(routed.worker.name)
            self._place(self._waiting.first_token(number))

    def end(self, number: int) -> None:
        """May be called twice."""
        with self._lock:
            self._state.loads.end(number)
            self._waiting.end(number)

    def failed(self, routed: Routed, why: str) -> None:
        """The worker did not answer: for a while it is passed over. Choose again, with it in ``avoid``."""
        with self._lock:
            self._state.health.failed(routed.worker.name, why, self._clock.now_ns())

    def replace(self, fleet: Fleet) -> None:
        """Other workers from now on."""
        with self._lock:
            self._state.replace(fleet)

    def _chosen(self, asked: Asked, avoid: Collection[str]) -> Routed:
        now_ns = self._clock.now_ns()
        self._place(self._waiting.due(now_ns))
        found = self._view.find(asked.queries)
        routed = self._state.choose(asked, found, self._view, now_ns, avoid=avoid)
        self._place(routed.placements)
        return routed

    def _place(self, placements: Sequence[Placement]) -> None:
        for each in placements:
            self._view.place(each.source, each.namespace, each.hints)

    def _seen(self, index: LocalityIndex | Locator | View | None) -> View:
        if index is None:
            return NoView()
        if isinstance(index, LocalityIndex):
            return IndexView(index, self._clock)
        return LocatorView(index, self._clock) if isinstance(index, Locator) else index
