"""What the scheduler half of the vLLM connector keeps of one request, and how long that one waits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from kvcache.block import BlockHash
from kvcache.client.connectors.handoff import Handoff
from kvcache.client.connectors.vllm_plan import EngineRequest, LoadJob
from kvcache.clock import NS_PER_MS
from kvcache.request_hints import RequestHints

if TYPE_CHECKING:
    from kvcache.client.store import Lease

IDLE_WAIT_NS_MIN: Final = 5 * NS_PER_MS
IDLE_WAIT_NS_MAX: Final = 20 * NS_PER_MS
ASK_AGAIN_NS_MIN: Final = 5 * NS_PER_MS
ASK_AGAIN_NS_MAX: Final = 100 * NS_PER_MS


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the store holds of a request's prompt, and our right to it (one lease a rank). ``hbm``: with what
    HBM holds."""

    prefix: tuple[BlockHash, ...]
    start: int
    held: int
    leases: tuple[Lease, ...]
    taken_ns: int
    hbm: bool = False


@dataclass(slots=True)
class Wait:
    """For blocks of one request that are coming: ``most_ns`` in all when the store says so, ``promise_ns``
    when only the router does: the engine that prefilled answers before its last blocks are published, so the
    store may not have heard of them yet. Decides, and is told the time."""

    most_ns: int
    promise_ns: int
    since_ns: int = 0  # When blocks of it were first found to be coming; 0: never.
    again_ns: int = 0  # Not asked again before, unless an idle engine can wait in the store.
    is_heard_of: bool = True  # The store itself said that they are coming.

    @classmethod
    def of(cls, handoff: Handoff, load_wait_ms: int, promise_wait_ms: int) -> Wait:
        if handoff.wait_ms >= 0:
            return cls(handoff.wait_ms * NS_PER_MS, handoff.wait_ms * NS_PER_MS)
        return cls(load_wait_ms * NS_PER_MS, min(load_wait_ms, promise_wait_ms) * NS_PER_MS)

    def rests(self, now_ns: int, *, idle: bool) -> bool:
        """Is it too soon to ask again?"""
        return now_ns < self.again_ns and not (idle and self.is_heard_of)

    def step_ns(self, now_ns: int) -> int:
        """How long an idle engine may wait in the store now."""
        wanted_ns = min(max(self._waited_ns(now_ns) // 4, IDLE_WAIT_NS_MIN), IDLE_WAIT_NS_MAX)
        return min(wanted_ns, self._left_ns(now_ns, self.most_ns))

    def asks_again(self, began_ns: int, now_ns: int, *, promised: bool = False) -> bool:
        """Blocks are coming (``promised``: the store has not heard of them): is there time left to wait for
        them? Says when to ask next. ``began_ns`` is when they were asked for."""
        self.since_ns, self.is_heard_of = self.since_ns or began_ns, not promised
        left_ns = self._left_ns(now_ns, self.promise_ns if promised else self.most_ns)
        pause_ns = min(max(self._waited_ns(now_ns) // 4, ASK_AGAIN_NS_MIN), ASK_AGAIN_NS_MAX)
        self.again_ns = now_ns + min(pause_ns, left_ns)
        return left_ns > 0

    def _waited_ns(self, now_ns: int) -> int:
        return now_ns - self.since_ns if self.since_ns else 0

    def _left_ns(self, now_ns: int, most_ns: int) -> int:
        return max(0, most_ns - self._waited_ns(now_ns))


@dataclass(slots=True)
class State:
    """One request, from when the engine takes it in until it is over."""

    request: EngineRequest
    uncacheable: str
    adapter: bytes
    handoff: Handoff
    wait: Wait
    hashes: list[BlockHash] = field(default_factory=list)
    lookup: Lookup | None = None
    loading: LoadJob | None = None
    bad_blocks: set[int] = field(default_factory=set)
    load_failed: bool = False
    saved: int = 0
    issued: int = 0

    @property
    def hints(self) -> RequestHints:
        """What is known of the request; that its prompt is computed for another engine, if nothing is."""
        said = self.handoff.hints
        if self.handoff.do == "prefill" and said.hint == "unknown":
            return replace(said, hint="prefill_only")
        return said
