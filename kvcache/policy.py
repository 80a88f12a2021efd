"""What an eviction policy is: the interface between the ledger and whoever chooses what goes.

A policy sees blocks as small dense numbers and the prefix tree as arrays indexed by them
(``TreeView``). It is called once a request and hook, never once a block, so plain Python is fast enough. It
is pure: no clock (time comes in the context), no I/O, no state outside itself; the same object runs in
the store, in a shadow and in replay.

    reserve ── admit ──► (victims ── on_evicted)* ──► commit ── on_admitted ──► ... on_request ...

The core, not the policy, keeps the rules: only leaves go, never what is leased, pinned or being
written; it verifies every answer, and a policy that raises or breaks the contract is replaced by
leaf-first LRU, counted and reported (``kvcache.guard``). ``kvcache.testing.policies.PolicyContract`` is
the contract as tests.

The sum: a hook costs 1 us plus what the policy does; a call with 16 blocks has 20 us to spend.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, runtime_checkable

from kvcache.errors import BadInput

HINTS = ("unknown", "tool_call", "turn_end", "final", "prefill_only")
PRIORITY_MAX = 100


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What is known about a request. Everything but the time is optional, and may be wrong.

    ``hint`` says why the request ended (``HINTS``); ``expected_gap_ms`` when its blocks may be wanted
    again; ``keep_ms`` how long they are worth keeping; a higher ``priority`` is more worth keeping.
    RAISES BadInput for an unknown hint or a priority out of range.
    """

    now_ns: int
    tenant: str = ""
    session: int = -1
    prompt_tokens: int = 0
    hint: str = "unknown"
    priority: int = 50
    expected_gap_ms: int | None = None
    keep_ms: int | None = None

    def __post_init__(self) -> None:
        if self.hint not in HINTS:
            raise BadInput("bad_message", f"hint {self.hint!r}", f"hints are {', '.join(HINTS)}")
        if not 0 <= self.priority <= PRIORITY_MAX:
            raise BadInput("bad_message", f"priority {self.priority}", f"priorities are 0 to {PRIORITY_MAX}")


class TreeView(Protocol):
    """The prefix tree, read only, as arrays indexed by block. A block's entries may be read until
    ``on_evicted`` has returned for it; its number may then be given to another."""

    @property
    def parent(self) -> Sequence[int]:
        """The block before it; -1 at the root, and where the one before it is missing."""

    @property
    def key(self) -> Sequence[Hashable]:
        """Its name: a block that has left and comes back has another number, and the same name."""

    @property
    def children(self) -> Sequence[int]:
        """How many blocks continue it, those being written included; -1 once it has left."""

    @property
    def depth(self) -> Sequence[int]:
        """Blocks from the start of the prompt: 1 for the first."""

    @property
    def block_bytes(self) -> Sequence[int]: ...

    @property
    def holds(self) -> Sequence[int]:
        """Leases, pins and writes that forbid eviction just now."""

    @property
    def device(self) -> Sequence[int]:
        """Which device it lies on, where each has to make its own room; else 0."""

    def is_evictable(self, block: int) -> bool:
        """A leaf that nobody holds."""

    def sample_leaves(self, count: int, random: Random) -> list[int]:
        """At most ``count`` evictable leaves, evenly drawn, with repeats."""

    def evictable_count(self) -> int:
        """How many leaves are evictable just now."""


@dataclass(frozen=True, slots=True)
class Param:
    """One setting of a policy: feeds configuration, command line and tuner."""

    default: float
    low: float
    high: float
    doc: str
    whole: bool = False
    """Only whole numbers."""


class EvictionPolicy(Protocol):
    """Chooses what goes. Constructed as ``policy(tree, capacity_bytes, **settings)``.

    Every committed block is announced by ``on_admitted`` once, and leaves by ``on_evicted`` once.
    """

    def __init__(self, tree: TreeView, capacity_bytes: int) -> None: ...

    @classmethod
    def params(cls) -> Mapping[str, Param]:
        """Every keyword that the constructor takes, beyond the tree and the capacity."""

    def on_request(self, context: RequestContext, path: Sequence[int]) -> None:
        """A request found these blocks: a path, from the first block to the deepest found."""

    def admit(self, context: RequestContext, parent: int, count: int) -> int:
        """How many leading blocks of ``count`` behind ``parent`` (-1: the root) are worth storing."""

    def on_admitted(self, context: RequestContext, blocks: Sequence[int]) -> None:
        """These were committed: a path, first to last."""

    def victims(self, context: RequestContext, count: int) -> Sequence[int]:
        """What should go, in this order: each an evictable leaf once those before it have gone.

        At least one while ``evictable_count()`` is over 0; at most ``count``; fewer only when the
        policy has no more to name. Not all that is named need go, and calling this changes nothing:
        what really went is told by ``on_evicted``."""

    def on_evicted(self, blocks: Sequence[int], reason: str) -> None:
        """These have left, leaves first; some may never have been committed (reason ``aborted``).
        Their parents may be leaves now."""

    def state(self) -> bytes:
        """What was learned, fit for ``load_state`` of a new object; not which blocks are held."""

    def load_state(self, data: bytes) -> None:
        """REQUIRES: no block announced yet. RAISES ValueError for what ``state`` did not make."""


@runtime_checkable
class KeyedPolicy(Protocol):
    """What a policy may answer besides, if it remembers blocks that are not held."""

    def admit_keys(self, context: RequestContext, parent: int, keys: Sequence[Hashable]) -> int:
        """Asked instead of ``admit``: the names of the blocks behind ``parent`` that would be stored.

        It is not said afterwards which were declined; the policy knows. Those it took may yet not be
        committed, for want of room or because their writer gave up."""


@runtime_checkable
class DevicePolicy(Protocol):
    """What a policy may answer besides, for the sake of tiers over several devices. Without it, room on one
    device is found only if something on it is among the coldest of all."""

    def victims_on(self, context: RequestContext, count: int, device: int) -> Sequence[int]:
        """As ``victims``, but all of them lie on ``device``: what is covered by blocks of other devices
        is passed over. None is a right answer."""


MakePolicy = Callable[[TreeView, int], EvictionPolicy]
