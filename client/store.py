"""What an engine asks of a store, in two forms: ``BlockStore`` (async) and ``BlockingStore``.

    open -> Handle        match -> count        lease -> Lease -> load ... -> release
                          save -> count         persist -> count
                          begin_save -> advance, as planes are computed -> finish -> count

The store being down, full, slow or cut off is never an error here: the answer is less (no blocks, all
positions failed), at once or by the deadline, and ``counters`` says why. Only what the caller did wrong
is raised. What ``load`` did not report as failed is in the caller's buffers and verified: in the
caller's memory, against the checksum of the key that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from kvcache.block import BlockHash, BlockSpec, NamespaceId, chain
from kvcache.namespace import Namespace
from kvcache.request_hints import UNKNOWN, RequestHints
from kvcache.wire_hbm import HOST

if TYPE_CHECKING:
    from typing_extensions import Buffer

LEASE_MS: Final = 30_000
LEASE_WAIT_MS: Final = 2_000
PERSIST_WAIT_MS: Final = 10_000

# Every counter of a store. Those after the colon of one name are its reasons.
COUNTERS: Final[Mapping[str, str]] = {
    "matched_blocks": "blocks that match found",
    "leased_blocks": "blocks that were leased",
    "coming_blocks": "blocks a lease ended before: still being read from NVMe when its wait was over",
    "lease_waits": "times that a lease was given back to be asked for again, because blocks were coming",
    "loaded_blocks": "blocks loaded and verified",
    "loaded_bytes": "their bytes",
    "hbm_loaded_blocks": "those of them that came from HBM",
    "fallback_blocks": "those of them that HBM did not give, and the tiers below did",
    "hbm_saved_blocks": "saved blocks that went into HBM",
    "saved_blocks": "blocks written and committed",
    "saved_bytes": "their bytes",
    "streamed_blocks": "saved blocks that were copied, or told to the node, before all planes were computed",
    "advances": "times that the node was told which planes of blocks are written",
    "refused_advances": "saves of which the node would hear nothing before their end",
    "persisted_blocks": "blocks that were found durable",
    "connects": "connections made",
    "pinned_bytes": "bytes of the node's host memory registered with the GPU, for copies at the link's speed",
    "failed_pins": "times that no more of it could be registered: copies of the rest are slower",
    "unmapped_hbm": "connections whose slab of HBM could not be mapped: blocks go to host memory",
    "lost_leases": "leases that had ended before wrong blocks could be reported",
    "failed_blocks:checksum": "the bytes were not those of the block asked for",
    "failed_blocks:expired": "the lease ended before the copy did",
    "failed_blocks:lease_lost": "the lease was released, went with its connection, or is not known any more",
    "failed_blocks:unavailable": "the node was gone, or went in the middle",
    "failed_blocks:refused": "the node refused to send them",
    "unsaved_blocks:full": "the node had no room",
    "unsaved_blocks:busy": "somebody else is writing the same blocks",
    "unsaved_blocks:parent": "the block before the first is not held any more",
    "unsaved_blocks:unavailable": "the node was gone, or went in the middle",
    "unsaved_blocks:refused": "the node did not take them",
    "hbm_unsaved_blocks:full": "HBM had no room; as with those below, host memory was asked next",
    "hbm_unsaved_blocks:busy": "somebody else is writing the same blocks there",
    "hbm_unsaved_blocks:parent": "the block before the first is not held there",
    "hbm_unsaved_blocks:unavailable": "the node was gone, or went in the middle",
    "hbm_unsaved_blocks:refused": "the device did not copy them, or the node did not take them",
    "failed_copies": "saves in which the link to host memory brought other bytes than the device had sent",
    "missed_calls:away": "there was no connection, and it was not yet time to try again",
    "missed_calls:busy": "another thread of this store had the connection until the deadline",
    "missed_calls:refused": "the node refused what should have been in order",
    "missed_calls:not_open": "after a reconnect the node did not take the namespace",
    "ended:deadline": "connections given up because a call missed its deadline",
    "ended:disconnected": "connections that the node ended",
    "ended:bad_frame": "connections given up because the node's frames were none",
    "ended:bad_reply": "connections given up because a reply made no sense",
    "ended:interrupted": "connections given up because a call was interrupted",
    "refused_connects": "connections that failed, or that the node refused",
}

# Why blocks of a lease could not be had.
FAILED_BY: Final = frozenset(name for name in COUNTERS if name.startswith("failed_blocks:"))


@dataclass(frozen=True, slots=True)
class Handle:
    """A namespace that is open at the node. Good for the life of its store, over reconnects too."""

    namespace: Namespace
    spec: BlockSpec
    namespace_id: NamespaceId
    root: BlockHash
    tenant_key: bytes = field(repr=False)
    verdict: str = field(default="", compare=False)
    """In plain words, whether stored blocks fit, and if not which field differs."""

    def hashes(self, tokens: Sequence[int] | bytes, extra: Sequence[bytes] = ()) -> list[BlockHash]:
        """The names of the full blocks of ``tokens`` (``block.chain``). RAISES BadInput."""
        return chain(self.root, self.tenant_key, tokens, self.spec.block_tokens, extra)


@dataclass(frozen=True, slots=True)
class Grant:
    """What the node granted in one call: ``count`` blocks from position ``start`` of the lease.

    ``offsets`` are where they lie in the map, empty without one, -1 for a block to be read over the
    wire. ``expires_ns`` is on this process's clock, and never later than what the node means.
    """

    lease_id: int
    start: int
    count: int
    offsets: Sequence[int]
    checksums: bytes
    expires_ns: int
    tier: str = HOST
    """Whose lease it is; of hbm, ``offsets`` are those of the slab of this ``incarnation``."""
    incarnation: bytes = b""

    @property
    def name(self) -> tuple[str, int]:
        """Of the lease, among all of its connection."""
        return self.tier, self.lease_id


@dataclass(frozen=True, slots=True)
class Lease:
    """A right to read the blocks of ``prefix``, good on the connection it was taken on, until it expires."""

    handle: Handle
    prefix: tuple[BlockHash, ...]
    grants: tuple[Grant, ...]
    connection: int
    coming: int = 0
    """So many blocks right behind are being read from NVMe: another lease, later, may have them."""

    @property
    def count(self) -> int:
        return len(self.prefix)


@dataclass(frozen=True, slots=True)
class SaveHints(RequestHints):
    """For the node's eviction policy: why these blocks were made; and where else they are wanted: ``push`` is
    the name of the node to which this one copies them while they are written. ``below``: by who cannot
    reach this GPU's memory, so they go to host memory and not into HBM, of which other nodes get nothing."""

    push: str = ""
    below: bool = False

    @classmethod
    def of(cls, hints: RequestHints, push: str = "", below: bool = False) -> SaveHints:
        return cls(hints.hint, hints.priority, hints.session, hints.gap_ms, hints.keep_ms, push, below)


NO_HINTS: Final = SaveHints()


class Writing(Protocol):
    """A save under way, begun by ``begin_save``. One call at a time."""

    async def advance(self, planes: int) -> None:
        """The leading ``planes`` planes of every block hold their final bytes: they may be copied, and the
        node told, so that a peer can read ahead. They become visible to nobody. RAISES BadInput when
        ``planes`` goes back or beyond the block, or the save has ended."""

    async def finish(self) -> int:
        """All planes are final: publish. Returns as ``save``. RAISES BadInput when the save has ended."""

    async def abort(self) -> None:
        """The blocks will not be saved. May be called twice, and after the end, when it does nothing."""


class BlockStore(Protocol):
    """For one event loop. A cancelled call ends when its running step has: no copy runs on after it."""

    prefill_tokens_s: float
    """How fast the engine computes what it does not load; 0: not known. Where it is faster than the node's
    disk, the node leaves blocks there. Set by who knows; sent with each match and lease."""

    @property
    def counters(self) -> Mapping[str, int]:
        """A copy of the counters, by the names of ``COUNTERS``; those at zero may be missing."""

    @property
    def node(self) -> str:
        """The name of the node of the latest connection; empty before there was one."""

    async def open(self, namespace: Namespace, spec: BlockSpec) -> Handle:
        """Idempotent. RAISES BadInput, NotAllowed, and Unavailable: without a node there is no name."""

    async def match(self, handle: Handle, prefix: Sequence[BlockHash]) -> int:
        """How many leading blocks are held. Holds nothing. Who is to load them leases the whole prefix at
        once: a node's hit ratio is of what leases asked for."""

    async def lease(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        request: str = "",
        duration_ms: int = LEASE_MS,
        wait_ms: int = LEASE_WAIT_MS,
        source: str = "",
        pushed: bool = False,
        hints: RequestHints = UNKNOWN,
    ) -> Lease:
        """Hold the leading blocks; ``count`` may be 0, which need not be released. With ``request``, all
        who name it share the same blocks until each has released them. Blocks that the node must read
        from NVMe or fetch from a peer first are waited for, for at most ``wait_ms``; ``coming`` are those
        that were not there by then. ``source`` names the node that has these blocks or computes them;
        with ``pushed`` it brings them to ours by itself. ``hints`` are for the node's eviction policy. RAISES
        BadInput."""

    async def load(
        self,
        lease: Lease,
        into: Sequence[Sequence[Buffer]],
        start: int = 0,
        heads: tuple[int, int] | None = None,
    ) -> frozenset[int]:
        """Fill ``into[i]`` (the pieces of one block, in order) with block ``start + i`` of the lease.

        With ``heads``, (first, count), only with these heads of every plane, in one piece or plane by plane:
        for a rank of another tensor parallel degree (``kvcache.slices``). Bytes beside them may be wrong.

        Returns the positions in the lease that could not be had: what their buffers hold is undefined.
        RAISES BadInput when ``into`` is not the shape of blocks of the lease.
        """

    async def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int:
        """Save ``blocks[i]`` (its pieces, in order) as ``prefix[i]``, behind ``parent`` (empty: the first
        block). Returns how many leading blocks of ``prefix`` are held now. RAISES BadInput.

        REQUIRES: the bytes do not change meanwhile. A block that breaks this is refused by its readers.
        """

    async def begin_save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> Writing:
        """Save these blocks while they are computed. What is wrong with the arguments is raised now, all else
        costs no more than the head start. RAISES BadInput as ``save``.

        REQUIRES: planes that were announced do not change until ``finish`` or ``abort`` has returned."""

    async def persist(
        self, handle: Handle, prefix: Sequence[BlockHash], wait_ms: int = PERSIST_WAIT_MS
    ) -> int:
        """Have the leading blocks written to NVMe. Returns, after ``wait_ms`` at most, how many of them are
        durable: neither a crash nor a power cut loses them. 0 without a node, or without NVMe there;
        less than all also when the node will not write more, for its daily budget. RAISES BadInput."""

    async def release(self, lease: Lease) -> None:
        """The reader is done, and says which blocks were wrong. May be called twice."""

    async def close(self) -> None:
        """Leases end, the map goes when no copy uses it any more. May be called twice."""


class BlockingWriting(Protocol):
    """``Writing`` for threads; one at a time."""

    def advance(self, planes: int) -> None: ...

    def finish(self) -> int: ...

    def abort(self) -> None: ...


class BlockingStore(Protocol):
    """The same for threads, as many as there are: calls take turns on one connection, copies do not.

    Not across ``fork``: the child has neither the connection nor the map.
    """

    prefill_tokens_s: float

    @property
    def counters(self) -> Mapping[str, int]: ...

    @property
    def node(self) -> str: ...

    def open(self, namespace: Namespace, spec: BlockSpec) -> Handle: ...

    def match(self, handle: Handle, prefix: Sequence[BlockHash]) -> int: ...

    def lease(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        request: str = "",
        duration_ms: int = LEASE_MS,
        wait_ms: int = LEASE_WAIT_MS,
        source: str = "",
        pushed: bool = False,
        hints: RequestHints = UNKNOWN,
    ) -> Lease: ...

    def load(
        self,
        lease: Lease,
        into: Sequence[Sequence[Buffer]],
        start: int = 0,
        heads: tuple[int, int] | None = None,
    ) -> frozenset[int]: ...

    def save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> int: ...

    def begin_save(
        self,
        handle: Handle,
        prefix: Sequence[BlockHash],
        blocks: Sequence[Sequence[Buffer]],
        parent: bytes = b"",
        hints: SaveHints = NO_HINTS,
    ) -> BlockingWriting: ...

    def persist(self, handle: Handle, prefix: Sequence[BlockHash], wait_ms: int = PERSIST_WAIT_MS) -> int: ...

    def release(self, lease: Lease) -> None: ...

    def close(self) -> None: ...
